"""Samplers made to draw a list of prompts over some seeds, marked, timed and written down."""

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from sd35flash_jax.checkpoint import (
    DTYPES,
    CheckpointError,
    bundled_checkpoint,
    open_stored,
    read_config,
    refuse_existing,
    tokenizer_folders,
)
from sd35flash_jax.config import TEXT_ENCODERS
from sd35flash_jax.evaluate.detector import SIDE, Detector, load_detector, look
from sd35flash_jax.evaluate.report import draw_grid, format_table, shrink
from sd35flash_jax.evaluate.scoring import Figure, Mark, Scorer, WorldScorer
from sd35flash_jax.evaluate.suite import Prompt
from sd35flash_jax.pipeline import FlashPipeline, check_request, image_bytes
from sd35flash_jax.world.compose import compose, scene_arrays, sprites
from sd35flash_jax.world.scenes import lay_out

COMPOSED = "composed pictures"
"""The name of the row that says how well the detector reads pictures that are right for certain."""
_SEEDS_APART = 1_000_000
_REFERENCE_SEED = 1000
"""The first of the reference's seeds. A row has no more seeds than this many, so that the reference's pictures are
others than those of the first row."""

Paint = Callable[[Sequence[Prompt], int], UInt8[np.ndarray, "b h w 3"]]
"""Draws prompts; picture i depends on its prompt and on the number plus i alone."""


@dataclass(frozen=True)
class Sampler:
    """A checkpoint, the bundled one if None, and how it is sampled."""

    name: str
    checkpoint: Path | None = None
    steps: int = 4
    guidance: float = 1.0


class Row(NamedTuple):
    """What became of one sampler."""

    name: str
    sampler: Sampler | None
    """None where the pictures were composed."""
    figures: dict[str, Figure]
    marks: list[list[Mark]]
    """Of each seed, one for each prompt."""
    seconds: float
    """For a picture, from its prompt to its bytes on the host; the median over batches, so that compiling is left
    out of a run of several."""


def evaluate(
    samplers: Sequence[Sampler],
    prompts: Sequence[Prompt],
    seeds: int,
    output: Path,
    scorer: Scorer | None = None,
    batch: int = 32,
    dtype: str = "bfloat16",
    progress: bool = False,
) -> str:
    """Draw, mark and write down every sampler; what is done is on the disk after each, and stays if a later one fails.

    `output` gets evaluation.json, evaluation.md, and for each row a grid of pictures with right and wrong ones.

    Args:
        samplers: one row of the table each.
        prompts: `suite()`, or others for a scorer that takes any.
        seeds: pictures of each prompt.
        output: a folder, made if need be; it must not hold anything.
        scorer: the world's detector unless given; it marks composed pictures first, of the first sampler's size, for
            the table's first row.
        batch: pictures at a time.
        dtype: of the samplers, "bfloat16" or "float32".
        progress: show bars on standard error.

    Returns:
        The table as Markdown.

    Raises:
        ValueError: as `check_evaluation`; or the detector is missing or damaged. All before anything is drawn.
        OSError: as `check_evaluation`; or the disk is full.
    """
    check_evaluation(samplers, prompts, seeds, output, batch, dtype)
    # Composed as large as the samplers draw, so that sharpness alone is no difference.
    side = read_config(_checkpoint(samplers[0])).default_size if samplers else SIDE
    composed = partial(compose_prompts, side=side)
    judge = scorer or world_scorer(load_detector(), composed, prompts, seeds, batch)
    measured = partial(
        _measure, scorer=judge, prompts=prompts, seeds=seeds, batch=batch, output=output, progress=progress
    )
    rows = []
    with _made_folder(output):
        if scorer is None:
            rows.append(measured(COMPOSED, None, composed))
            _write(output, rows, prompts)
        # Neighbours of one checkpoint share its weights.
        for checkpoint, neighbours in groupby(samplers, key=lambda sampler: sampler.checkpoint):
            pipe = FlashPipeline.from_pretrained(checkpoint, dtype=dtype, progress=progress)
            for sampler in neighbours:
                rows.append(measured(sampler.name, sampler, painter(pipe, sampler)))
                _write(output, rows, prompts)
        return (output / "evaluation.md").read_text(encoding="utf-8").rstrip()


def check_evaluation(
    samplers: Sequence[Sampler], prompts: Sequence[Prompt], seeds: int, output: Path, batch: int, dtype: str
) -> None:
    """Refuse what `evaluate` would refuse; the command does so before it loads a scorer.

    Raises:
        ValueError: an option is out of range, or a checkpoint is missing, damaged, or lacks what drawing takes.
        OSError: `output` holds something or cannot be made.
    """
    if not 1 <= seeds <= _REFERENCE_SEED:
        raise ValueError(f"seeds must be from 1 to {_REFERENCE_SEED}, not {seeds}")
    if batch < 1:
        raise ValueError(f"batch must be positive, not {batch}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    if not prompts:
        raise ValueError("there is no prompt to draw")
    if len({_stem(name) for name in (COMPOSED, *(sampler.name for sampler in samplers))}) <= len(samplers):
        raise ValueError(f"samplers must have names of their own, other than {COMPOSED!r}")
    if not output.is_dir() or any(output.iterdir()):
        refuse_existing(output)
    standing = next(folder for folder in (output.absolute(), *output.absolute().parents) if folder.exists())
    if not standing.is_dir() or not os.access(standing, os.W_OK):
        raise OSError(f"{output} cannot be written: {standing} is not a folder that may be; choose another")
    for sampler in samplers:
        _check_sampler(sampler)


def _check_sampler(sampler: Sampler) -> None:
    path = _checkpoint(sampler)
    config = read_config(path)
    encoders = [name for name in TEXT_ENCODERS if name in config.components]
    absent = [name for name in ("transformer", "vae") if name not in config.components]
    absent += [] if encoders else ["text encoder"]
    if absent:
        raise CheckpointError(f"{path} has no {' and no '.join(absent)}; convert a source that holds what is missing")
    check_request(config, 1, sampler.steps, None, sampler.guidance, None, None, 0)
    unread = [name for name in encoders if name not in tokenizer_folders(path, encoders)]
    if unread:
        raise CheckpointError(f"{path} has no tokenizer for {', '.join(unread)}; convert it again with --tokenizers")
    for name in config.components:
        open_stored(path, name, config)  # Damage is found now, not after hours of other samplers.


def world_scorer(detector: Detector, composed: Paint, prompts: Sequence[Prompt], seeds: int, batch: int) -> WorldScorer:
    """A scorer whose reference is as many composed pictures of the prompts as a sampler draws."""
    views = (
        view
        for seed in range(_REFERENCE_SEED, _REFERENCE_SEED + seeds)
        for _, images, count, _ in _batches(composed, prompts, seed, batch)
        for view in look(detector, images)[:count]
    )
    return WorldScorer(detector, np.array([view.features for view in views]))


def painter(pipe: FlashPipeline, sampler: Sampler) -> Paint:
    """How a sampler draws, at its model's own size."""
    side = pipe.config.default_size
    negative = pipe.encode([""]) if sampler.guidance > 1 else None

    def paint(prompts: Sequence[Prompt], number: int) -> UInt8[np.ndarray, "b h w 3"]:
        noise = pipe.noise(number, len(prompts), side, side)
        conditioning = pipe.encode([prompt.text for prompt in prompts])
        latents = pipe.denoise(noise, conditioning, steps=sampler.steps, guidance=sampler.guidance, negative=negative)
        return image_bytes(pipe.decode(latents))

    return paint


def compose_prompts(prompts: Sequence[Prompt], number: int, side: int = SIDE) -> UInt8[np.ndarray, "b side side 3"]:
    """Pictures that are right for certain, laid out anew for each number."""
    generators = [np.random.default_rng(number + index) for index in range(len(prompts))]
    scenes = [lay_out(prompt.content(rng), rng) for prompt, rng in zip(prompts, generators)]
    return image_bytes(compose(sprites(), scene_arrays(scenes), side))


def _checkpoint(sampler: Sampler) -> Path:
    return sampler.checkpoint.expanduser() if sampler.checkpoint else bundled_checkpoint()


def _stem(name: str) -> str:
    """A sampler's name as its grid's file has it."""
    return name.replace("/", " ")


@contextlib.contextmanager
def _made_folder(path: Path) -> Iterator[None]:
    """A folder, made with its parents; those in which nothing stands when all fails vanish again."""
    made = [folder for folder in (path, *path.absolute().parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _write_whole(file: Path, write: Callable[[Path], object]) -> None:
    """A file that takes its name, or the place of the one before, only when it is whole."""
    unfinished = file.with_name(f".{file.name}.partial")
    try:
        write(unfinished)
        unfinished.replace(file)
    finally:
        unfinished.unlink(missing_ok=True)


def _measure(
    name: str,
    sampler: Sampler | None,
    paint: Paint,
    *,
    scorer: Scorer,
    prompts: Sequence[Prompt],
    seeds: int,
    batch: int,
    output: Path,
    progress: bool,
) -> Row:
    marks: list[list[Mark]] = []
    thumbnails, times = [], []
    with tqdm(total=seeds * len(prompts), desc=name, unit="picture", disable=not progress) as bar:
        for seed in range(seeds):
            marks.append([])
            for filled, images, count, seconds in _batches(paint, prompts, seed, batch):
                marks[-1] += scorer.mark(filled, images)[:count]
                thumbnails += [shrink(image) for image in images[:count]] if seed == 0 else []
                times.append(seconds / batch)
                bar.update(count)
    grid = draw_grid(prompts, marks[0], thumbnails)
    _write_whole(output / f"{_stem(name)}.png", partial(grid.save, format="PNG"))
    return Row(name, sampler, scorer.figures(prompts, marks), marks, float(np.median(times)))


def _batches(
    paint: Paint, prompts: Sequence[Prompt], seed: int, batch: int
) -> Iterator[tuple[Sequence[Prompt], UInt8[np.ndarray, "b h w 3"], int, float]]:
    """The prompts batch by batch: with their pictures, how many of them count, and the seconds that they took. All
    batches have one size, so that one program serves them: the last is filled up with what does not count."""
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        filled = [*part, *[part[-1]] * (batch - len(part))]
        began = time.perf_counter()
        images = paint(filled, seed * _SEEDS_APART + start)
        yield filled, images, len(part), time.perf_counter() - began


def _write(output: Path, rows: Sequence[Row], prompts: Sequence[Prompt]) -> None:
    report = {
        "date": date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "prompts": len(prompts),
        "seeds": len(rows[0].marks),
        "rows": [_row_as_json(row, prompts) for row in rows],
    }
    for name, text in (("evaluation.json", json.dumps(report, indent=1)), ("evaluation.md", format_table(report))):
        _write_whole(output / name, partial(Path.write_text, data=text + "\n", encoding="utf-8"))


def _row_as_json(row: Row, prompts: Sequence[Prompt]) -> dict[str, Any]:
    return {
        "name": row.name,
        **(_sampler_as_json(row.sampler, row.seconds) if row.sampler else {}),
        "figures": {name: figure._asdict() for name, figure in row.figures.items()},
        "pictures": [
            {"prompt": prompt.text, "category": prompt.category, "seed": seed, "right": mark.right, "seen": mark.seen}
            for seed, of_seed in enumerate(row.marks)
            for prompt, mark in zip(prompts, of_seed)
        ],
    }


def _sampler_as_json(sampler: Sampler, seconds: float) -> dict[str, Any]:
    checkpoint = str(sampler.checkpoint or "bundled")
    return {"checkpoint": checkpoint, "steps": sampler.steps, "guidance": sampler.guidance, "seconds": seconds}
