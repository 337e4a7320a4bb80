"""Stable Diffusion 3.5-Flash, four-step text-to-image, in pure JAX."""

from sd35flash_jax.checkpoint import load_checkpoint, save_checkpoint
from sd35flash_jax.config import ModelConfig
from sd35flash_jax.pipeline import FlashPipeline
from sd35flash_jax.text import Conditioning

__all__ = ["Conditioning", "FlashPipeline", "ModelConfig", "load_checkpoint", "save_checkpoint"]
