"""Conversion between other projects' weight files and our checkpoints; the only place that knows their names."""

from conversion.convert import ConversionError, convert
from conversion.export import export

__all__ = ["ConversionError", "convert", "export"]
