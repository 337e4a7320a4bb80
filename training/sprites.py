"""The atlas of sprites, from the two npm packages that hold the pictures and their names.

npm pack @lobehub/fluent-emoji-3d@1.1.0 && npm pack unicode-emoji-json@0.9.0     # then unpack both
python -m training.sprites PICTURES_PACKAGE NAMES_PACKAGE
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from sd35flash_jax.command import leave, run_command
from sd35flash_jax.world.compose import ATLAS, COLUMNS, SPRITE_SIDE
from sd35flash_jax.world.objects import THINGS


def sprite_files(pictures: Path, names: Path) -> list[Path]:
    """The picture of each thing, in order.

    Raises:
        ValueError: the names are missing, or a thing has no picture.
    """
    file = names / "data-by-emoji.json"
    if not file.is_file():
        raise ValueError(f"{file} is missing; unpack unicode-emoji-json and give its folder")
    described = json.loads(file.read_text(encoding="utf-8"))
    emoji = {entry["name"]: text for text, entry in described.items()}
    files = []
    for thing in THINGS:
        code = "-".join(f"{ord(letter):04x}" for letter in emoji.get(thing.sprite, ""))
        candidates = [pictures / "assets" / f"{form}.webp" for form in (code, code.replace("-fe0f", ""))]
        found = next((path for path in candidates if path.is_file()), None)
        if found is None:
            raise ValueError(
                f"{pictures} has no picture of {thing.sprite}; unpack @lobehub/fluent-emoji-3d and give its folder"
            )
        files.append(found)
    return files


def build_atlas(files: list[Path]) -> Image.Image:
    """Every sprite at `SPRITE_SIDE`, row by row."""
    rows = -(-len(files) // COLUMNS)
    atlas = Image.new("RGBA", (COLUMNS * SPRITE_SIDE, rows * SPRITE_SIDE))
    for index, path in enumerate(files):
        sprite = Image.open(path).convert("RGBA").resize((SPRITE_SIDE, SPRITE_SIDE), Image.Resampling.LANCZOS)
        atlas.paste(sprite, (index % COLUMNS * SPRITE_SIDE, index // COLUMNS * SPRITE_SIDE))
    return atlas


def main(pictures: Path, names: Path) -> None:
    build_atlas(sprite_files(pictures, names)).save(ATLAS, quality=90, method=6)
    print(ATLAS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Build the atlas of sprites.")
    parser.add_argument("pictures", type=Path, help="unpacked @lobehub/fluent-emoji-3d")
    parser.add_argument("names", type=Path, help="unpacked unicode-emoji-json")
    options = parser.parse_args()
    leave(run_command(lambda: main(options.pictures, options.names), "training.sprites"))
