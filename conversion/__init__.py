"""Conversion between other projects' weight files and our checkpoints; the only place that knows their names."""

from conversion.convert import ConversionError, convert

__all__ = ["ConversionError", "convert"]
