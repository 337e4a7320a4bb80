"""What the training reads: prompts in a random order, and the teacher's guided trajectories, made as they are needed or
all at the start. Everything is a function of the seed and of a row's or an update's number."""

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import sync_global_devices
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float16, Int, PyTree
from tqdm import tqdm

from sd35flash_jax.checkpoint import written_whole
from sd35flash_jax.distill.flow import Velocity, guided
from sd35flash_jax.distill.text_dropout import drop_text_encoders
from sd35flash_jax.distill.trajectory import synthesize_trajectory
from sd35flash_jax.distill.updates import Batch, Teaching
from sd35flash_jax.sharding import row_sharding
from sd35flash_jax.text import Conditioning

_T = TypeVar("_T")


class Ahead(Generic[_T]):
    """A function of the number of an update that is asked for one number after another: while one result is used, a
    thread makes the next."""

    def __init__(self, make: Callable[[int], _T]):
        self.make = make
        self.thread = ThreadPoolExecutor(1)
        self.waiting: dict[int, Future[_T]] = {}

    def __call__(self, number: int) -> _T:
        """The result for this number; whatever else was made ahead is dropped."""
        made = self.waiting.pop(number, None) or self.thread.submit(self.make, number)
        self.waiting = {number + 1: self.thread.submit(self.make, number + 1)}
        return made.result()


def prompt_order(count: int, seed: int, update: int, rows: int) -> Int[np.ndarray, " rows"]:
    """Which of `count` prompts an update reads: the list in a new random order each epoch."""
    positions = range(update * rows, (update + 1) * rows)
    return np.array([_epoch(count, seed, position // count)[position % count] for position in positions])


@lru_cache(maxsize=2)
def _epoch(count: int, seed: int, epoch: int) -> Int[np.ndarray, " count"]:
    return np.random.default_rng([seed, epoch]).permutation(count)


@dataclass(frozen=True)
class Synthesis:
    """The teacher's guided trajectories from noise. `velocity` makes its parameters a network; `shape` is that of one
    row of latents."""

    velocity: Callable[[PyTree], Velocity]
    teaching: Teaching
    shape: tuple[int, ...]

    def __call__(
        self, teacher: PyTree, noise: Float[Array, "b ..."], conditioning: Any, negative: Any
    ) -> Float[Array, "k+1 b ..."]:
        """The points at the student's levels."""
        levels, indices = jnp.array(self.teaching.levels), np.array(self.teaching.indices)
        strong = guided(self.velocity(teacher), conditioning, negative, self.teaching.guidance)
        return synthesize_trajectory(strong, noise, levels, indices, conditioning)

    def of_rows(
        self, teacher: PyTree, key: Array, numbers: Int[Array, " b"], conditioning: Any, negative: Any
    ) -> Float16[Array, "b k+1 ..."]:
        """The trajectories of numbered rows, whose noise depends on key and number alone; `negative` is one row.

        Half precision suffices: it has eight times the resolution of bfloat16, in which the student reads them.
        """
        noise = jax.vmap(lambda number: jax.random.normal(jax.random.fold_in(key, number), self.shape))(numbers)
        points = self(teacher, noise, conditioning, repeated(negative, len(numbers)))
        return points.swapaxes(0, 1).astype(jnp.float16)


def kept_trajectories(
    path: Path,
    shape: tuple[int, ...],
    batch: int,
    synthesize: Callable[[Int[np.ndarray, " b"]], Float16[Array, "b k+1 ..."]],
    progress: bool = False,
) -> Float16[np.ndarray, "n k+1 ..."]:
    """Trajectories of `shape`, read from a file as rows are asked for; where it is not there, it is made first, by
    `synthesize` of a batch of row numbers at a time. Of several processes, the first writes and all read.

    Raises:
        FloatingPointError: a point of a trajectory is not finite, or too large for half precision.
        OSError: the disk is full or not writable. Nothing is left behind.
    """
    if not path.exists():
        batches = _synthesized(shape[0], batch, synthesize, progress)
        if jax.process_index() == 0:
            with written_whole(path) as partial_path:
                _write_rows(partial_path, shape, batches)
        else:
            for _ in batches:  # Every process takes its part in making them.
                pass
        sync_global_devices(f"{path} is whole")
    return np.load(path, mmap_mode="r")


def _synthesized(
    count: int, batch: int, synthesize: Callable[[Int[np.ndarray, " b"]], Array], progress: bool
) -> Iterator[Float16[np.ndarray, "b k+1 ..."]]:
    """All rows in turn, a batch at a time."""
    with tqdm(total=count, unit="row", desc="synthesizing trajectories", disable=not progress) as bar:
        for start in range(0, count, batch):
            # The last batch is filled up with the first rows, lest a smaller one compile anew.
            made = np.asarray(synthesize(np.arange(start, start + batch) % count))[: count - start]
            if not np.isfinite(made).all():
                raise FloatingPointError(
                    "the teacher's trajectories are not finite; check its weights and lower teacher.guidance"
                )
            yield made
            bar.update(len(made))


def _write_rows(path: Path, shape: tuple[int, ...], batches: Iterator[Float16[np.ndarray, "b k+1 ..."]]) -> None:
    """A NumPy file, written as a stream: to a file that is mapped into memory a full disk is death, and no error."""
    with path.open("xb") as file:
        header = {"descr": np.dtype(np.float16).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for rows in batches:
            file.write(rows.tobytes())
        file.flush()
        os.fsync(file.fileno())


def weights_digest(checkpoint: Path, components: Sequence[str]) -> str:
    """The SHA-256 of some of a checkpoint's components and their tokenizers: their files are read, at some 2 GB/s."""
    digest = hashlib.sha256()
    for folder in (part / name for name in components for part in (checkpoint, checkpoint / "tokenizers")):
        # Without Orbax's own notes, which say when the checkpoint was written.
        for path in sorted(file for file in folder.rglob("[!_]*") if file.is_file()):
            digest.update(path.relative_to(checkpoint).as_posix().encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


Real = Literal["trajectories", "samples", "nothing"]
"""What an update reads of the teacher: its trajectories, their ends, or nothing."""


@dataclass(frozen=True)
class BatchMaker:
    """Makes an update's batch, in one program, with the rows of each micro-batch over the devices of `mesh`.
    `clip_widths` and `clip_tokens` are as in `drop_text_encoders`."""

    synthesis: Synthesis
    mesh: Mesh
    micro_batches: int
    text_dropout: float
    clip_widths: tuple[int, int]
    clip_tokens: int

    def __call__(
        self,
        teacher: PyTree,
        conditioning: Conditioning,
        negative: Conditioning,
        kept: Float[Array, "b ..."] | None,
        key: Array,
        real: Real,
    ) -> Batch:
        """A batch of micro-batches.

        Args:
            teacher: the teacher's parameters.
            conditioning: of the batch's prompts.
            negative: one row, for all.
            kept: what `real` says, if it was made before: `(b, k+1, h, w, c)` or `(b, h, w, c)`.
            key: random key.
            real: what the update reads of the teacher.
        """
        noise_key, dropout_key = jax.random.split(key)
        rows = len(conditioning.pooled)
        student = drop_text_encoders(conditioning, dropout_key, self.text_dropout, self.clip_widths, self.clip_tokens)
        given = jax.random.normal(noise_key, (rows, *self.synthesis.shape)) if kept is None else kept
        batch: Batch = jax.tree.map(
            lambda array: array.reshape(self.micro_batches, -1, *array.shape[1:]),
            Batch(conditioning, student, repeated(negative, rows), given.astype(jnp.float32)),
        )
        batch = jax.lax.with_sharding_constraint(batch, row_sharding(self.mesh, 1))
        if kept is not None:
            return replace(batch, real=batch.real.swapaxes(1, 2)) if real == "trajectories" else batch
        if real == "nothing":
            return batch
        points = jax.lax.map(
            lambda micro: self.synthesis(teacher, *micro), (batch.real, batch.conditioning, batch.negative)
        )
        return replace(batch, real=points if real == "trajectories" else points[:, -1])


def repeated(row: PyTree, count: int) -> PyTree:
    """One row as a batch of equal ones."""
    return jax.tree.map(lambda array: jnp.broadcast_to(array, (count, *array.shape[1:])), row)
