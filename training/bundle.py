"""The model in the box: a distilled checkpoint stored as int8 where the package looks for it.

    python -m training.bundle CHECKPOINT [DESTINATION]

Prints how far its pictures are from those of the weights as they were.
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from sd35flash_jax import FlashPipeline, load_checkpoint, save_checkpoint
from sd35flash_jax.checkpoint import BUNDLED, read_config
from sd35flash_jax.command import leave, run_command
from sd35flash_jax.evaluate.suite import suite
from training.model import SOURCE

COMPARED = 16


def bundle(checkpoint: Path, destination: Path) -> float:
    """Store every component of a checkpoint as int8, and return the pictures' `psnr` to those of its weights.

    A checkpoint at `destination` is replaced, after the new one was written beside it and has drawn its pictures;
    until then it stays as it is.

    Raises:
        ValueError: `checkpoint` is none, or cannot draw pictures, or a weight is NaN or infinite; or there is
            something else than a checkpoint at `destination`.
        OSError: the disk is full or not writable.
    """
    destination = destination.resolve()
    if destination.exists():
        read_config(destination)  # Nothing but a checkpoint is replaced.
    loaded = load_checkpoint(checkpoint, dtype="float32")
    destination.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{destination.name}.", dir=destination.parent) as folder:
        new, old = Path(folder, destination.name), Path(folder, f"{destination.name}.old")
        save_checkpoint(new, loaded.config, loaded.components, loaded.tokenizers, SOURCE, int8=True)
        distance = psnr(checkpoint, new)
        try:
            if destination.exists():
                destination.rename(old)
            new.rename(destination)
        except BaseException:
            if old.exists() and not destination.exists():
                old.rename(destination)
            raise
    return distance


def psnr(checkpoint: Path, other: Path) -> float:
    """The peak signal-to-noise ratio, in dB, of the pictures that two checkpoints draw of the suite's first prompts."""
    prompts = [prompt.text for prompt in suite()[::34]][:COMPARED]
    drawn = []
    for path in (checkpoint, other):
        result = FlashPipeline.from_pretrained(path, dtype="float32")(prompts)
        drawn.append(np.stack([np.asarray(image, np.float32) for image in result.images]))
    return float(-10 * np.log10(np.square((drawn[0] - drawn[1]) / 255).mean()))


def main(checkpoint: Path, destination: Path) -> None:
    distance = bundle(checkpoint, destination)
    size = sum(file.stat().st_size for file in destination.rglob("*") if file.is_file())
    print(f"{destination}: {size / 1e6:.1f} MB, PSNR to the weights as they were {distance:.1f} dB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Put a checkpoint into the package.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("destination", type=Path, nargs="?", default=BUNDLED, help="the package's own, unless given")
    options = parser.parse_args()
    leave(run_command(lambda: main(options.checkpoint, options.destination), "training.bundle"))
