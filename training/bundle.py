"""The model in the box: a distilled checkpoint stored as int8 where the package looks for it.

    python -m training.bundle CHECKPOINT

Prints how far its pictures are from those of the weights as they were.
"""

import argparse
from pathlib import Path

import numpy as np

from sd35flash_jax import FlashPipeline, load_checkpoint, save_checkpoint
from sd35flash_jax.checkpoint import BUNDLED
from sd35flash_jax.evaluate.suite import suite
from training.model import SOURCE

COMPARED = 16


def bundle(checkpoint: Path, destination: Path) -> None:
    """Store every component of a checkpoint as int8."""
    loaded = load_checkpoint(checkpoint, dtype="float32")
    save_checkpoint(destination, loaded.config, loaded.components, loaded.tokenizers, SOURCE, int8=True)


def psnr(checkpoint: Path, other: Path) -> float:
    """The peak signal-to-noise ratio, in dB, of the pictures that two checkpoints draw of the suite's first prompts."""
    prompts = [prompt.text for prompt in suite()[::34]][:COMPARED]
    drawn = []
    for path in (checkpoint, other):
        result = FlashPipeline.from_pretrained(path, dtype="float32")(prompts)
        drawn.append(np.stack([np.asarray(image, np.float32) for image in result.images]))
    return float(-10 * np.log10(np.square((drawn[0] - drawn[1]) / 255).mean()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Put a checkpoint into the package.")
    parser.add_argument("checkpoint", type=Path)
    options = parser.parse_args()
    bundle(options.checkpoint, BUNDLED)
    size = sum(file.stat().st_size for file in BUNDLED.rglob("*") if file.is_file())
    print(
        f"{BUNDLED}: {size / 1e6:.1f} MB, PSNR to the weights as they were {psnr(options.checkpoint, BUNDLED):.1f} dB"
    )
