"""The prompts that the teacher is distilled on: captions, one a line.

python -m training.prompts FILE
"""

import argparse
from pathlib import Path

from sd35flash_jax.checkpoint import written_whole
from sd35flash_jax.command import leave, run_command
from training.data import draw_captions

SEED = 0


def main(path: Path, count: int) -> None:
    if count < 1:
        raise ValueError(f"--count must be positive, not {count}")
    with written_whole(path) as partial_path:
        partial_path.write_text("".join(f"{text}\n" for text in draw_captions(count, SEED)), "utf-8")
    print(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the prompts for distillation.")
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=40_000)
    options = parser.parse_args()
    leave(run_command(lambda: main(options.file, options.count), "training.prompts"))
