"""Training: a teacher's checkpoint and a list of prompts in, a student's checkpoint out, through all stages.

A run's folder holds

    progress/       Orbax checkpoints of the whole training state, each written whole or not at all
    trajectories-*  the teacher's, if they are kept (teacher.cached); the name tells what they depend on
    losses.csv      one row an update
    samples/        grids of the configured prompts
    student/        the result: a checkpoint directory as any other, with the student's own sigmas
    stages/         the students of stages (a) and (b), if they are kept (training.keep_stages)

Everything random is a function of the seed and the number of the update, and so is the order of the prompts: a run that
was killed goes on from its last checkpoint bit for bit as if it had not been.
"""

import csv
import hashlib
import math
import shutil
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental.multihost_utils import sync_global_devices
from jaxtyping import Array
from PIL import Image
from tqdm import tqdm

from sd35flash_jax import compilation
from sd35flash_jax.checkpoint import (
    abstract_component,
    load_checkpoint,
    parameters,
    read_config,
    save_checkpoint,
    tokenizer_folders,
    with_parameters,
)
from sd35flash_jax.config import DOWNSAMPLING, TEXT_ENCODERS, MMDiTConfig, ModelConfig, ScheduleConfig
from sd35flash_jax.distill.config import DistillConfig
from sd35flash_jax.distill.data import (
    Ahead,
    BatchMaker,
    Real,
    Synthesis,
    kept_trajectories,
    prompt_order,
    weights_digest,
)
from sd35flash_jax.distill.lora import Params, merge_lora
from sd35flash_jax.distill.split_timestep import interpolate
from sd35flash_jax.distill.stages import Stage, in_parts, initial_state, make_stages, teaching, update_program
from sd35flash_jax.distill.trajectory import whole_trajectory_loss
from sd35flash_jax.distill.updates import (
    Batch,
    Metrics,
    State,
    TrajectoryUpdate,
    begin,
)
from sd35flash_jax.pipeline import FlashPipeline, check_size
from sd35flash_jax.schedule import choose_sigmas
from sd35flash_jax.sharding import make_mesh, parameter_shardings, put, replicated, row_sharding
from sd35flash_jax.text import Conditioning, clip_widths, read_prompts, token_counts, tokenize

LOSSES = (
    "trajectory",
    "matching",
    "adversarial",
    "student_gradient",
    "proxy",
    "proxy_gradient",
    "discriminator",
    "held_out",
)
"""The columns of losses.csv."""
UNREAD = 8
"""How many updates' losses may wait to be read: to read them at once would let the device wait for the host."""


def distill(config: DistillConfig, progress: bool = False) -> Path:
    """Run a distillation, or go on with it where its folder holds one, and return the student's checkpoint.

    Raises:
        ValueError: the configuration does not fit the teacher's checkpoint, the devices, or what the folder holds, or
            there is no prompt. Before the teacher's weights are read.
        FloatingPointError: a loss or gradient is not finite; the last good checkpoint is named.
        FileExistsError: the student is there already.
        OSError: the disk is full or not writable.
    """
    destination = Path(config.training.output).expanduser() / "student"
    if destination.exists():
        raise FileExistsError(f"{destination} already exists: this run is done; choose another training.output")
    trainer = Trainer(config, progress)
    trainer.run()
    trainer.save_student(destination)
    return destination


class Trainer:
    """One run. `state` is what is being trained; `kept` holds the students that a later stage needs."""

    def __init__(self, config: DistillConfig, progress: bool = False):
        compilation.configure()
        self.config = config
        self.folder = Path(config.training.output).expanduser().absolute()
        self.prompts = read_prompts(Path(config.training.prompts))
        self.mesh = make_mesh(config.sharding.fsdp)
        self.writes = jax.process_index() == 0
        self.progress = progress and self.writes
        check_division(config, self.mesh.size)
        self.described = read_config(config.teacher.checkpoint)
        self.model = check_teacher(config, self.described)
        check_student(config, self.model)
        self.structure = abstract_component("transformer", self.described)
        self.sigmas = (*config.student.sigmas, 0.0)
        self.stages = make_stages(config, self.described)
        whole = replicated(self.mesh)
        self.key = jax.jit(jax.random.key, out_shardings=whole)(config.training.seed)
        # What does not divide over the devices is refused here; so far the teacher's weights are shapes.
        begun = self._begun(self.stages[0])  # All stages have parameters of the same shapes.
        shapes = parameters(self.structure)
        parameter_shardings(self.mesh, jax.eval_shape(begun, shapes, shapes, self.key))
        read = [name for name in self.described.components if name != "vae"]
        self.digest = weights_digest(Path(config.teacher.checkpoint).expanduser(), read)
        self.manager = self._open_progress()
        self.stage, self.done = self._read_position()
        self.loaded = load_checkpoint(config.teacher.checkpoint, None, config.training.dtype, whole, self.progress)
        params: Params = parameters(self.loaded.components.pop("transformer"))
        self.teacher: Params = jax.device_put(params, parameter_shardings(self.mesh, params))
        del params  # whole on every device
        self.pipeline = FlashPipeline.from_checkpoint(self.loaded, config.training.max_t5_tokens)
        self.state = in_parts(self.mesh, self._begun(self._coming()), self.teacher, self._start(), self.key)
        self.kept: dict[str, Params] = {}
        self.unread: deque[tuple[str, int, int, Metrics]] = deque()

    # The stages in order

    def run(self) -> None:
        """Go through the stages from where the folder's last checkpoint ended."""
        self._resume()
        with jax.set_mesh(self.mesh):
            self._read_prompts()
            self._run_stages()
        self.manager.close()

    def _run_stages(self) -> None:
        total = sum(stage.updates for stage in self.stages)
        update = update_program(self.mesh)
        with tqdm(total=total, initial=self.position, desc="distilling", disable=not self.progress) as bar:
            while self.stage < len(self.stages):
                stage = self.stages[self.stage]
                bar.set_description(stage.name)
                while self.done < stage.updates:
                    self._update_once(stage, update, bar)
                self._report(bar)
                self._finish_stage(stage)

    def _coming(self) -> Stage:
        """The stage that is being done, or the last one when all are."""
        return self.stages[min(self.stage, len(self.stages) - 1)]

    def _begun(self, stage: Stage) -> Callable[[Params, Params, Array], State]:
        """What makes, of teacher, what the student begins as, and key, the state of a training that begins with a
        stage."""
        return partial(initial_state, self.config, self.described, stage.update.optimizers)

    def _start(self) -> Params:
        """What the student begins as."""
        checkpoint = self.config.student.checkpoint
        if checkpoint is None:
            return self.teacher
        loaded = load_checkpoint(checkpoint, ["transformer"], "float32", replicated(self.mesh), self.progress)
        params: Params = parameters(loaded.components["transformer"])
        return jax.device_put(params, parameter_shardings(self.mesh, params))

    @property
    def position(self) -> int:
        """How many updates of all stages are done: it numbers checkpoints, and seeds each update."""
        return sum(stage.updates for stage in self.stages[: self.stage]) + self.done

    def _update_once(self, stage: Stage, update: Any, bar: tqdm) -> None:
        batch_key, update_key = _update_keys(self.key, self.position)
        batch = self._batch(stage, batch_key)
        self.state, metrics = update(stage.update, self.state, self.teacher, batch, update_key)
        self.done += 1
        if isinstance(stage.update, TrajectoryUpdate) and self._is_checked(stage):
            metrics["held_out"] = self._held_out_loss()
        self.unread.append((stage.name, self.done, self.position, metrics))
        self._report(bar, UNREAD)
        training = self.config.training
        # Before the checkpoint: a run that is killed while it draws goes on from an earlier one, and draws again.
        if training.sample_every and training.sample_prompts and self.position % training.sample_every == 0:
            self._report(bar)
            self.sample(self.folder / "samples" / f"{self.position:06d}.png")
        if self.position % training.checkpoint_every == 0 and self.done < stage.updates:
            self._report(bar)
            self.save()

    def _is_checked(self, stage: Stage) -> bool:
        checked = self.config.trajectory
        return checked.held_out > 0 and (self.done % checked.check_every == 0 or self.done == stage.updates)

    def _held_out_loss(self) -> Array:
        """The averaged student's loss on the trajectories that are not trained on, a micro-batch at a time."""
        assert self.trajectories is not None
        part = self.config.training.batch // self.config.training.micro_batches
        losses = []
        for start in range(self.trained, len(self.trajectories), part):
            rows = np.arange(start, start + part)
            points = self._by_rows(self.trajectories[rows])
            losses.append(self.whole_loss(self.state.ema, self.teacher, points, self._conditioning(rows)))
        return jnp.stack(losses).mean()

    def _report(self, bar: tqdm, waiting: int = 0) -> None:
        """Read the losses of all updates but the last few. No checkpoint is written while there are unread ones, so
        that each is a good one, and no sample is drawn of a student that is not finite."""
        while len(self.unread) > waiting:
            stage, done, position, metrics = self.unread.popleft()
            values = {name: float(value) for name, value in jax.device_get(metrics).items()}
            if not all(map(math.isfinite, values.values())):
                raise FloatingPointError(self._not_finite(stage, done, values))
            if self.writes:
                append_losses(self.folder / "losses.csv", position, stage, values)
            bar.set_postfix({name: f"{value:.3g}" for name, value in values.items()}, refresh=False)
            bar.update()

    def _finish_stage(self, stage: Stage) -> None:
        """The averaged student goes on with fresh optimizer state; the branches of stage (c) are merged at the end."""
        student = self.state.ema
        if stage.name == "split-low":
            self.kept["low"] = student
            student = self.kept["base"]
        if stage.name == "split-high":
            student = interpolate(self.kept.pop("low"), student, self.config.split.low_weight)
            del self.kept["base"]
        self.stage, self.done = self.stage + 1, 0
        if self.stage < len(self.stages) and self.stages[self.stage].name == "split-low":
            self.kept["base"] = student

        def go_on(state: State, student: Params) -> State:
            # An update takes over the arrays of its state, so that the state may not share them with `kept`.
            learner = begin(jax.tree.map(jnp.copy, student), self._coming().update.optimizers.student)
            return replace(state, student=learner, ema=jax.tree.map(jnp.copy, student))

        self.state = in_parts(self.mesh, go_on, self.state, student)
        if self.config.training.keep_stages and stage.name in ("trajectory", "matching"):
            self.save_student(self.folder / "stages" / stage.name)
        self.save()

    # Data

    def _read_prompts(self) -> None:
        """Everything about prompts and trajectories that is done once."""
        config, training = self.config, self.config.training
        counts = token_counts(self.described, self.pipeline.max_t5_tokens)
        self.tokens = tokenize(self.pipeline.tokenizers, self.prompts, counts)
        self.negative = self.pipeline.encode([config.teacher.negative_prompt])

        size = (training.height // DOWNSAMPLING, training.width // DOWNSAMPLING, self.model.latent_channels)
        synthesis = Synthesis(self.stages[0].update.networks.teacher, teaching(config, self.described), size)
        widths = clip_widths(self.described)
        maker = BatchMaker(
            synthesis,
            self.mesh,
            training.micro_batches,
            training.text_dropout,
            (widths["clip_l"], widths["clip_g"]),
            counts["clip_l"],
        )
        self.make_batch = jax.jit(maker, static_argnames="real")
        # Training reads numbered rows: those of the prompt list, or of the trajectories that are kept.
        self.row_prompts, self.trajectories = np.arange(len(self.prompts)), None
        if config.teacher.cached:
            self.row_prompts = prompt_order(len(self.prompts), training.seed, 0, config.teacher.cached)
            self.trajectories = self._kept_trajectories(synthesis)
            self.read_kept = {real: Ahead(partial(self._read_kept, real)) for real in ("trajectories", "samples")}
        self.trained = len(self.row_prompts) - config.trajectory.held_out

        def whole_loss(student: Params, teacher: Params, points: Array, conditioning: Conditioning) -> Array:
            network = self.stages[0].update.networks.student(student, teacher)
            trajectory = points.swapaxes(0, 1).astype(jnp.float32)
            return whole_trajectory_loss(network, trajectory, jnp.array(self.sigmas), conditioning)

        self.whole_loss = jax.jit(whole_loss, out_shardings=replicated(self.mesh))

    def _kept_trajectories(self, synthesis: Synthesis) -> np.ndarray:
        config, training = self.config.teacher, self.config.training
        key = jax.random.fold_in(self.key, 2**32 - 1)  # Updates count up from 0.
        of_rows = jax.jit(synthesis.of_rows, out_shardings=replicated(self.mesh))

        def synthesize(rows: np.ndarray) -> Array:
            return of_rows(self.teacher, key, self._by_rows(rows), self._conditioning(rows), self.negative)

        depends_on = (
            "Adams-Bashforth",
            self.digest,
            self.described,
            (synthesis.teaching.levels, config.guidance, config.negative_prompt, config.cached),
            self.sigmas,
            self.prompts,
            training.seed,
            training.dtype,
            self.pipeline.max_t5_tokens,
            synthesis.shape,
        )
        digest = hashlib.sha256(repr(depends_on).encode()).hexdigest()[:12]
        shape = (config.cached, len(self.sigmas), *synthesis.shape)
        path = self.folder / f"trajectories-{digest}.npy"
        return kept_trajectories(path, shape, config.cache_batch or training.batch, synthesize, self.progress)

    def _conditioning(self, rows: np.ndarray) -> Conditioning:
        tokens: Any = {name: self._by_rows(ids[self.row_prompts[rows]]) for name, ids in self.tokens.items()}
        return self.pipeline.encode_tokens(tokens)

    def _read_kept(self, real: Real, position: int) -> Array:
        """What an update reads of the trajectories that are kept."""
        assert self.trajectories is not None
        rows = prompt_order(self.trained, self.config.training.seed, position, self.config.training.batch)
        return self._by_rows(self.trajectories[rows] if real == "trajectories" else self.trajectories[rows, -1])

    def _by_rows(self, array: np.ndarray) -> Array:
        return put(array, row_sharding(self.mesh))

    def _batch(self, stage: Stage, key: Array) -> Batch:
        """The prompts of this update, encoded, and what it reads of the teacher."""
        training = self.config.training
        rows = prompt_order(self.trained, training.seed, self.position, training.batch)
        real: Real = "samples" if self.config.matching.adversarial_weight else "nothing"
        if isinstance(stage.update, TrajectoryUpdate):
            real = "nothing" if stage.update.corrections else "trajectories"
        kept = None if self.trajectories is None or real == "nothing" else self.read_kept[real](self.position)
        return self.make_batch(self.teacher, self._conditioning(rows), self.negative, kept, key, real=real)

    # Files

    def _open_progress(self) -> ocp.CheckpointManager:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"{self.folder} cannot be made ({error.strerror}); choose another training.output") from None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self.config.training.keep,
            cleanup_tmp_directories=True,  # those of a run that was killed while it wrote
            enable_async_checkpointing=False,
            create=True,
        )
        return ocp.CheckpointManager(self.folder / "progress", options=options)

    def _read_position(self) -> tuple[int, int]:
        """Stage and updates of it done in the last checkpoint, if that is of this student and this teacher."""
        latest = self.manager.latest_step()
        if latest is None:
            return 0, 0
        stored = self.manager.restore(latest, args=ocp.args.Composite(position=ocp.args.JsonRestore())).position
        for name, value in self._fixed().items():
            if stored.get(name) != value:
                raise ValueError(
                    f"{self.folder} holds a run with {name} = {stored.get(name)}, not {value}; set that back, or "
                    "choose another training.output"
                )
        return stored["stage"], stored["done"]

    def _fixed(self) -> dict[str, Any]:
        """What a run that goes on cannot change, for what it has learned would mean something else."""
        return {
            "student.sigmas": list(self.config.student.sigmas),
            "student.lora_rank": self.config.student.lora_rank,
            "trajectory.optimizer": self.config.trajectory.optimizer,
            "matching.head_size": self.config.matching.head_size,
            "SHA-256 of teacher.checkpoint": self.digest,
        }

    def save(self) -> None:
        """Write the whole training state under the number of updates done."""
        content = {"arrays": ocp.args.StandardSave(_leaves((self.state, self.kept)))}
        content["position"] = ocp.args.JsonSave({"stage": self.stage, "done": self.done} | self._fixed())
        self.manager.save(self._number(), args=ocp.args.Composite(**content))

    def _resume(self) -> None:
        latest = self.manager.latest_step()
        if latest is not None:
            self._restore(latest)
        if self.writes:
            remove_leftovers(self.folder)
            remove_leftovers(self.folder / "stages")
            for stage in self.stages[self.stage :]:  # Kept right before the run was killed, and to be kept again.
                if (kept := self.folder / "stages" / stage.name).exists():
                    shutil.rmtree(kept)
            truncate_losses(self.folder / "losses.csv", self.position)

    def _restore(self, latest: int) -> None:
        names = {"split-low": ("base",), "split-high": ("base", "low")}
        current = self.stages[self.stage].name if self.stage < len(self.stages) else ""
        kept = {name: self.state.ema for name in names.get(current, ())}
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, (self.state, kept))
        arrays = ocp.args.StandardRestore(_leaves(target))
        restored = self.manager.restore(latest, args=ocp.args.Composite(arrays=arrays)).arrays
        ordered = [restored[name] for name in sorted(restored)]
        self.state, self.kept = jax.tree.unflatten(jax.tree.structure(target), ordered)

    def _number(self) -> int:
        """Checkpoints are numbered by updates and stages done, so that no number comes twice."""
        return self.position + self.stage

    def _not_finite(self, stage: str, done: int, values: dict[str, float]) -> str:
        bad = ", ".join(name for name, value in values.items() if not math.isfinite(value))
        latest = self.manager.latest_step()
        where = (
            "there is no checkpoint yet"
            if latest is None
            else f"the last good checkpoint is {self.manager.directory / str(latest)}"
        )
        return (
            f"update {done} of {stage} gave {bad} that is not finite; {where}: lower the learning rate and "
            "run again to go on from there"
        )

    # Results

    def transformer(self) -> nnx.Module:
        """The averaged student as a module in the compute dtype, whole on every device."""
        own: Any = merge_lora(self.teacher, self.state.ema) if self.config.student.lora_rank else self.state.ema
        params = self.teacher | {path: array.astype(self.teacher[path].dtype) for path, array in own.items()}
        return with_parameters(self.structure, jax.device_put(params, replicated(self.mesh)))

    def sample(self, path: Path) -> None:
        """A row of pictures of the configured prompts, one seed each."""
        training = self.config.training
        components = self.loaded.components | {"transformer": self.transformer()}
        pipeline = FlashPipeline(self.described, components, self.pipeline.tokenizers, training.max_t5_tokens)
        result = pipeline(
            list(training.sample_prompts),
            sigmas=self.config.student.sigmas,
            height=training.height,
            width=training.width,
        )
        if self.writes:
            grid = Image.fromarray(np.concatenate([np.asarray(image) for image in result.images], axis=1))
            path.parent.mkdir(parents=True, exist_ok=True)
            grid.save(path)

    def save_student(self, destination: Path) -> None:
        """The student as a checkpoint directory: the teacher's other components and tokenizers, and its own sigmas."""
        own = self.config.student.sigmas
        others = tuple(sigmas for sigmas in self.described.schedule.sigmas if len(sigmas) != len(own))
        schedule = ScheduleConfig(self.described.schedule.shift, (*others, own))
        components = self.loaded.components | {"transformer": self.transformer()}
        if self.writes:
            save_checkpoint(
                destination,
                replace(self.described, schedule=schedule),
                components,
                self.loaded.tokenizers,
                source={"distilled from": str(self.config.teacher.checkpoint), "sigmas": list(own)},
            )
        sync_global_devices("the student is saved")


def check_teacher(config: DistillConfig, described: ModelConfig) -> MMDiTConfig:
    """The transformer of the teacher's checkpoint, which `described` describes, if this distillation can use it.

    Raises:
        ValueError: the checkpoint lacks a component or a tokenizer, or cannot make pictures of the configured size.
    """
    checkpoint, training = config.teacher.checkpoint, config.training
    if described.transformer is None:
        raise ValueError(f"{checkpoint} has no transformer to distil; convert a source that has")
    encoders = [name for name in described.components if name in TEXT_ENCODERS]
    if not encoders:
        raise ValueError(f"{checkpoint} has no text encoder to read the prompts with; convert a source that has")
    unread = set(encoders) - set(tokenizer_folders(Path(checkpoint).expanduser(), encoders))
    if unread:
        raise ValueError(
            f"{checkpoint} has no tokenizer for {' and '.join(sorted(unread))}; convert its source again, with "
            "--tokenizers"
        )
    if described.vae is None and training.sample_every and training.sample_prompts:
        raise ValueError(
            f"{checkpoint} has no vae to draw training.sample_prompts with; convert a source that has, or set "
            "training.sample_every=0"
        )
    check_size(described, training.height, training.width)
    choose_sigmas(described.schedule, 1, config.student.sigmas)
    return described.transformer


def check_student(config: DistillConfig, teacher: MMDiTConfig) -> None:
    """Refuse a checkpoint that the student cannot begin with.

    Raises:
        ValueError: its transformer is not of the teacher's shape, or there is none.
    """
    checkpoint = config.student.checkpoint
    if checkpoint is not None and read_config(checkpoint).transformer != teacher:
        raise ValueError(
            f"student.checkpoint {checkpoint} has no transformer of the shape of {config.teacher.checkpoint}; choose a "
            "student of that teacher, or leave it out"
        )


def check_division(config: DistillConfig, devices: int) -> None:
    """Refuse numbers that do not divide over the devices they are for.

    Raises:
        ValueError: rows do not divide over all devices, or the heads' size does not over a group of them.
    """
    training = config.training
    for name, number, parts in (
        ("training.batch / training.micro_batches", training.batch // training.micro_batches, devices),
        ("teacher.cache_batch", config.teacher.cache_batch, devices),
        ("matching.head_size", config.matching.head_size, config.sharding.fsdp),
    ):
        if number % parts:
            raise ValueError(f"{name} = {number} does not divide over {parts} devices; choose a multiple of {parts}")


def append_losses(path: Path, update: int, stage: str, values: dict[str, float]) -> None:
    """One row; the columns are those of every stage, so that a file stays one table."""
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(["update", "stage", *LOSSES])
        writer.writerow([update, stage, *(repr(values[name]) if name in values else "" for name in LOSSES)])


def truncate_losses(path: Path, updates: int) -> None:
    """Take back the rows of updates that are not in the checkpoint from which a run goes on."""
    if not path.exists():
        return
    header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
    if not header.endswith("\n"):  # killed before anything was written into the new file
        path.unlink()
        return
    kept = [row for row in rows if row.endswith("\n") and int(row.partition(",")[0]) <= updates]
    partial_path = path.with_suffix(".partial")
    partial_path.write_text("".join([header, *kept]), encoding="utf-8")
    partial_path.replace(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what a run that was killed had half written in its folder; what is whole has another name."""
    for path in folder.glob(".*.partial-*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


@jax.jit
def _update_keys(key: Array, update: int) -> tuple[Array, Array]:
    batch_key, update_key = jax.random.split(jax.random.fold_in(key, update))
    return batch_key, update_key


def _leaves(tree: Any) -> dict[str, Any]:
    """A tree's leaves by number: what Orbax stores."""
    return {f"{index:06d}": leaf for index, leaf in enumerate(jax.tree.leaves(tree))}
