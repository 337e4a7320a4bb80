"""The first image of a new process, from the start of `sd35flash-jax generate` to its end:

    python -m benchmarks.first_image

Random weights of a preset's size are written to a folder, with the tokenizers of the model in the box. Then one process
after another makes an image of them: without compiled programs, with those of the process before, and so again after
the weights have left the system's memory, so that they come from the disk.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks.machine import versions
from sd35flash_jax.checkpoint import (
    StreamedArray,
    abstract_component,
    bundled_checkpoint,
    parameters,
    save_checkpoint,
    tokenizer_folders,
)
from sd35flash_jax.command import leave, run_command
from sd35flash_jax.config import PRESETS, TEXT_ENCODERS, ModelConfig

PROMPT = "three strawberries above a frog on a blue background"
STATES = {
    "nothing compiled": "weights in the system's memory, no compiled programs",
    "compiled": "weights in the system's memory, programs of an earlier process",
    "compiled, weights on disk": "weights on the disk, programs of an earlier process",
}


def write_random_checkpoint(path: Path, config: ModelConfig) -> None:
    """A checkpoint of random bfloat16 weights, kernels scaled by their inputs, that is written piece by piece."""
    draw = np.random.default_rng(0).standard_normal(2**20, np.float32)

    def values(param: str, shape: tuple[int, ...]) -> np.ndarray:
        deviation = float(np.prod(shape[:-1])) ** -0.5 if param.endswith(".kernel") else 0.2
        block = (draw * deviation + param.endswith(".scale")).astype(ml_dtypes.bfloat16)
        return np.resize(block, shape)

    def pieces(param: str, shape: tuple[int, ...], stacked: bool) -> Iterator[tuple[Any, np.ndarray]]:
        layers = range(shape[0]) if stacked else [...]
        return ((layer, values(param, shape[stacked:])) for layer in layers)

    def component(name: str) -> dict[str, StreamedArray]:
        module, dtype = abstract_component(name, config), np.dtype(ml_dtypes.bfloat16)
        return {
            param: StreamedArray(
                array.shape, dtype, partial(pieces, param, array.shape, param.split(".")[0] in module.STACKS)
            )
            for param, array in parameters(module).items()
        }

    tokenizers = tokenizer_folders(bundled_checkpoint(), TEXT_ENCODERS)
    save_checkpoint(path, config, {name: component(name) for name in config.components}, tokenizers)


def measure(
    checkpoint: Path, size: int, dtype: str, repeats: int, progress: Callable[[str], object] = lambda line: None
) -> dict[str, list[dict[str, Any]]]:
    """Seconds, how many programs were compiled and what `generate` says of its stages for each of `STATES`, `repeats`
    times but for the first.

    Raises:
        ChildProcessError: an image could not be made.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for state in list(STATES) if hasattr(os, "posix_fadvise") else list(STATES)[:-1]:
            for _ in range(1 if state == "nothing compiled" else repeats):
                if state.endswith("on disk"):
                    _evict(checkpoint)
                run = _generate(checkpoint, size, dtype, Path(folder))
                found.setdefault(state, []).append(run)
                progress(f"{state}: {run['seconds']:.1f} s, {run['compiled']} programs compiled ({run['stages']})")
    return found


def _generate(checkpoint: Path, size: int, dtype: str, folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "sd35flash_jax.cli", "generate", PROMPT, "--checkpoint", str(checkpoint)]
    command += ["--height", str(size), "--width", str(size), "--dtype", dtype, "--output", str(folder / "image.png")]
    # A cache of its own, whatever the user has set for theirs.
    programs = folder / "programs"
    cache = {"JAX_ENABLE_COMPILATION_CACHE": "1", "JAX_COMPILATION_CACHE_DIR": str(programs)}
    cache["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    before = len(list(programs.glob("*-cache")))
    start = time.perf_counter()
    run = subprocess.run(command, env=os.environ | cache, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    last = run.stderr.strip().splitlines()[-1:]
    if run.returncode:
        raise ChildProcessError(f"generate failed: {' '.join(last)}")
    compiled = len(list(programs.glob("*-cache"))) - before
    return {"seconds": seconds, "compiled": compiled, "stages": " ".join(last)}


def _evict(checkpoint: Path) -> None:
    """Let the system forget what it holds of the files, which only those that are on the disk already allow."""
    for file in checkpoint.rglob("*"):
        if file.is_file():
            with open(file, "rb") as stream:
                os.fdatasync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def format_rows(found: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| | median s | all | stages of the last |", "| --- | --- | --- | --- |"]
    for state, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        every = ", ".join(f"{each:.1f}" for each in seconds)
        lines.append(f"| {STATES[state]} | {statistics.median(seconds):.1f} | {every} | {runs[-1]['stages']} |")
    return "\n".join(lines)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.first_image",
        description="measure the first image of a new process, from its start to its end",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="sd3.5-medium")
    parser.add_argument("--size", type=int, default=1024, metavar="PIXELS")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="where the weights are or will be, and stay")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure what the options say, print the table, and write the file."""
    if options.repeats < 1:
        raise ValueError(f"--repeats must be positive, not {options.repeats}")
    say = partial(print, file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = options.checkpoint or Path(folder) / options.preset
        if not checkpoint.exists():
            say(f"writing random weights to {checkpoint}")
            write_random_checkpoint(checkpoint, PRESETS[options.preset])
        found = measure(checkpoint, options.size, options.dtype, options.repeats, say)
    print(format_rows(found))
    if options.output:
        about = {name: getattr(options, name) for name in ("preset", "size", "dtype")}
        report = about | {"versions": versions("jax", "jaxlib", "transformers"), "runs": found}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report, indent=1), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    return run_command(lambda: run(options), "benchmarks.first_image")


if __name__ == "__main__":
    leave(main())
