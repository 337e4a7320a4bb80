"""Stable Diffusion 3.5-Flash, four-step text-to-image, in pure JAX."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sd35flash_jax.checkpoint import load_checkpoint, save_checkpoint
    from sd35flash_jax.config import ModelConfig
    from sd35flash_jax.pipeline import FlashPipeline
    from sd35flash_jax.text import Conditioning

__all__ = ["Conditioning", "FlashPipeline", "ModelConfig", "load_checkpoint", "save_checkpoint"]

_HOMES = {
    "Conditioning": "text",
    "FlashPipeline": "pipeline",
    "ModelConfig": "config",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import what the package offers when it is asked for, not before: the command line then answers at once, and can
    start a GPU before it imports the rest."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
