"""Whole runs compile for minutes on a CPU, and are marked slow."""

import contextlib
import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sd35flash_jax import FlashPipeline, compilation
from sd35flash_jax.checkpoint import load_checkpoint, parameters, read_config, save_checkpoint
from sd35flash_jax.cli import main
from sd35flash_jax.config import TEXT_ENCODERS
from sd35flash_jax.distill.config import (
    DistillConfig,
    ShardingConfig,
    TeacherConfig,
    TrainingConfig,
    TrajectoryConfig,
    read_distill_config,
)
from sd35flash_jax.distill.stages import optimizers, trajectory_optimizer, without_momentum
from sd35flash_jax.distill.trainer import (
    LOSSES,
    Trainer,
    append_losses,
    check_division,
    distill,
    remove_leftovers,
    truncate_losses,
)
from sd35flash_jax.distill.trajectory import teacher_sigmas
from sd35flash_jax.schedule import shifted_sigmas
from tests.tiny_model import CONFIG, random_parameters, write_tokenizers

UPDATES = {"trajectory": 3, "matching": 3, "split-low": 2, "split-high": 2}


def write_config(folder: Path, checkpoint: Path, **training: object) -> Path:
    """Two steps, all stages, on the small checkpoint."""
    folder.mkdir(exist_ok=True)
    (folder / "prompts.txt").write_text("a red fox\n\ntwo cats\na bowl of soup\na green bicycle\n")
    sections = {
        "teacher": {"checkpoint": str(checkpoint), "steps": 3, "guidance": 2.0},
        "student": {"sigmas": [1.0, 0.5]},
        "training": {
            "prompts": str(folder / "prompts.txt"),
            "output": str(folder / "run"),
            "batch": 2,
            "height": 32,
            "width": 32,
            "max_t5_tokens": 8,
            "dtype": "float32",
            "text_dropout": 0.2,
            "checkpoint_every": 1,
        }
        | training,
        "trajectory": {"updates": UPDATES["trajectory"], "learning_rate": 1e-3, "optimizer": "muon"},
        "matching": {"updates": UPDATES["matching"], "learning_rate": 1e-3, "proxy_updates": 1, "head_size": 8},
        "split": {"updates": UPDATES["split-low"]},
    }
    lines = []
    for section, values in sections.items():
        lines += [f"[{section}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    (folder / "distill.toml").write_text("\n".join(lines))
    return folder / "distill.toml"


def read_losses(folder: Path) -> list[dict[str, str]]:
    with (folder / "run" / "losses.csv").open() as file:
        return list(csv.DictReader(file))


def student_arrays(folder: Path, name: str = "run/student") -> dict[str, np.ndarray]:
    loaded = load_checkpoint(folder / name, ["transformer"], "float32")
    return {path: np.asarray(array) for path, array in parameters(loaded.components["transformer"]).items()}


def write_teacher(folder: Path, seed: int = 0, without: Sequence[str] = (), tokenizers: bool = True) -> Path:
    """Two blocks, which compile in a bearable time; some components and the tokenizers may be left out."""
    assert CONFIG.transformer is not None
    transformer = replace(CONFIG.transformer, depth=2, heads=2, dual_attention_blocks=1)
    config = replace(CONFIG, transformer=transformer)
    config = replace(config, **dict.fromkeys(without))
    write_tokenizers(folder / "tokenizers")
    components = {name: random_parameters(name, seed + at, config) for at, name in enumerate(config.components)}
    kept = {name: folder / "tokenizers" / name for name in config.components if name in TEXT_ENCODERS and tokenizers}
    save_checkpoint(folder / "checkpoint", config, components, kept, source="tests")
    return folder / "checkpoint"


def run_interrupted(config: DistillConfig, after: int) -> None:
    """Start a run and interrupt it after a number of updates."""
    trainer = Trainer(config)
    once = trainer._update_once

    def interrupted(*arguments):
        if trainer.position == after:
            raise KeyboardInterrupt
        once(*arguments)

    trainer._update_once = interrupted
    with pytest.raises(KeyboardInterrupt):
        trainer.run()


@pytest.fixture(scope="module")
def teacher_checkpoint(tmp_path_factory) -> Path:
    """Read it only."""
    return write_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def finished(teacher_checkpoint, tmp_path_factory) -> Path:
    """A run of all stages, never interrupted, with a grid of samples at its end. Read it only."""
    folder = tmp_path_factory.mktemp("finished")
    options = {"sample_every": sum(UPDATES.values()), "sample_prompts": ["a red fox", "two cats"], "keep_stages": True}
    distill(read_distill_config(write_config(folder, teacher_checkpoint, **options)))
    return folder


@pytest.mark.slow
def test_the_students_that_stages_a_and_b_end_with_are_kept_where_that_is_asked_for(finished):
    stages = finished / "run" / "stages"
    assert {path.name for path in stages.iterdir()} == {"trajectory", "matching"}
    students = [student_arrays(finished, f"run/{name}") for name in ("stages/trajectory", "stages/matching", "student")]
    for one, other in zip(students, students[1:]):
        assert any((one[path] != other[path]).any() for path in one)
    assert read_config(stages / "matching") == read_config(finished / "run" / "student")


@pytest.mark.slow
def test_a_run_writes_a_student_that_generates_with_its_own_sigmas(finished, teacher_checkpoint, tmp_path, capsys):
    student = finished / "run" / "student"
    assert read_config(student).schedule.sigmas == ((1.0, 0.5),)
    request = ["--steps", "2", "--height", "32", "--width", "32", "--max-t5-tokens", "8"]
    assert (
        main(["generate", "a red fox", "--checkpoint", str(student), "--output", str(tmp_path / "x.png"), *request])
        == 0
    )
    teacher = parameters(load_checkpoint(teacher_checkpoint, ["transformer"], "float32").components["transformer"])
    arrays = student_arrays(finished)
    unchanged = {path for path in teacher if np.array_equal(arrays[path], teacher[path])}
    # Nothing reads the queries of the last block's text, and so nothing trains the norm of theirs.
    assert {"position_table"} <= unchanged <= {"position_table", "last_block.context.attention.query_norm.scale"}


@pytest.mark.slow
def test_a_run_writes_a_row_of_losses_for_every_update_and_a_grid_of_samples(finished):
    rows = read_losses(finished)
    assert [row["stage"] for row in rows] == [stage for stage, count in UPDATES.items() for _ in range(count)]
    assert [int(row["update"]) for row in rows] == list(range(1, len(rows) + 1))
    assert all(float(row["trajectory"]) > 0 for row in rows[:3])
    assert all(
        float(row[loss]) != 0 for row in rows[3:] for loss in ("matching", "adversarial", "proxy", "discriminator")
    )
    grid = finished / "run" / "samples" / f"{len(rows):06d}.png"
    assert grid.is_file()


@pytest.mark.slow
@pytest.mark.parametrize("interrupted_after", [1, 5, 9])
def test_a_run_that_was_interrupted_goes_on_bit_for_bit(interrupted_after, finished, teacher_checkpoint, tmp_path):
    config = read_distill_config(write_config(tmp_path, teacher_checkpoint))
    run_interrupted(config, interrupted_after)
    assert not (tmp_path / "run" / "student").exists()
    distill(config)
    assert read_losses(tmp_path) == read_losses(finished)
    expected = student_arrays(finished)
    for path, array in student_arrays(tmp_path).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_bit_for_bit(finished, teacher_checkpoint, tmp_path):
    config = write_config(tmp_path, teacher_checkpoint)
    command = [sys.executable, "-m", "sd35flash_jax.cli", "distill", str(config)]
    losses = tmp_path / "run" / "losses.csv"
    for rows in (2, 6, 9):
        process = subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})
        while process.poll() is None and not (losses.exists() and len(losses.read_text().splitlines()) > rows):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    subprocess.run(command, check=True)
    assert read_losses(tmp_path) == read_losses(finished)
    expected = student_arrays(finished)
    for path, array in student_arrays(tmp_path).items():
        np.testing.assert_array_equal(array, expected[path], err_msg=path)


@pytest.mark.slow
def test_a_run_that_keeps_trajectories_makes_them_once_and_goes_on_bit_for_bit(teacher_checkpoint, tmp_path):
    overrides = ["teacher.cached=7", "trajectory.held_out=2", "trajectory.check_every=2", "split.updates=0"]
    whole, interrupted = (
        read_distill_config(write_config(tmp_path / name, teacher_checkpoint), overrides)
        for name in ("whole", "interrupted")
    )
    distill(whole)
    run_interrupted(interrupted, 2)
    [kept] = (tmp_path / "interrupted" / "run").glob("trajectories-*")
    made = kept.stat().st_mtime_ns
    distill(interrupted)
    assert kept.stat().st_mtime_ns == made
    [expected] = (tmp_path / "whole" / "run").glob("trajectories-*")
    assert np.load(kept).shape == (7, 3, 4, 4, 16)
    np.testing.assert_array_equal(np.load(kept), np.load(expected))
    losses = read_losses(tmp_path / "whole")
    assert read_losses(tmp_path / "interrupted") == losses
    checked = [row["update"] for row in losses if row["held_out"]]
    assert checked == ["2", "3"], "every second update of stage (a), and its last"
    arrays = student_arrays(tmp_path / "whole")
    for path, array in student_arrays(tmp_path / "interrupted").items():
        np.testing.assert_array_equal(array, arrays[path], err_msg=path)


SHORT = ("split.updates=0", "trajectory.updates=2", "matching.updates=1")


@pytest.fixture(scope="module")
def short(teacher_checkpoint, tmp_path_factory) -> Path:
    """A run of two stages on one device. Read it only."""
    folder = tmp_path_factory.mktemp("short")
    distill(read_distill_config(write_config(folder, teacher_checkpoint), SHORT))
    return folder


def start(
    config: Path, options: Sequence[str], stderr: int | None = None, **environment: str
) -> "subprocess.Popen[bytes]":
    settings = [word for override in (*SHORT, "sharding.fsdp=2") for word in ("--set", override)]
    command = [sys.executable, "-m", "sd35flash_jax.cli", "distill", str(config), *settings, *options]
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment, stderr=stderr)


def assert_same_up_to_rounding(folder: Path, expected: Path) -> None:
    for row, own in zip(read_losses(folder), read_losses(expected), strict=True):
        assert [float(row[loss] or 0) for loss in LOSSES] == pytest.approx(
            [float(own[loss] or 0) for loss in LOSSES], rel=1e-3
        )
    arrays = student_arrays(expected)
    for path, array in student_arrays(folder).items():
        np.testing.assert_allclose(array, arrays[path], atol=1e-4, err_msg=path)


@pytest.mark.slow
def test_a_run_goes_on_on_several_devices_as_on_one(short, teacher_checkpoint, tmp_path):
    config = write_config(tmp_path, teacher_checkpoint)
    run_interrupted(read_distill_config(config, SHORT), 1)
    assert start(config, [], XLA_FLAGS="--xla_force_host_platform_device_count=2").wait() == 0
    assert_same_up_to_rounding(tmp_path, short)


@pytest.mark.slow
def test_a_run_of_two_processes_is_that_of_one(short, teacher_checkpoint, tmp_path):
    """They find each other as under Open MPI."""
    options = {"sample_every": 3, "sample_prompts": ["a red fox"]}
    config = write_config(tmp_path, teacher_checkpoint, **options)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    cluster = {
        "OMPI_MCA_orte_hnp_uri": "0.0;tcp://127.0.0.1:0",
        "OMPI_COMM_WORLD_SIZE": "2",
        "JAX_COORDINATOR_PORT": port,
    }
    ranks = [{"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank} for rank in "01"]
    processes = [start(config, ["--distributed"], **cluster, **rank) for rank in ranks]
    assert [process.wait() for process in processes] == [0, 0]
    assert_same_up_to_rounding(tmp_path, short)
    assert (tmp_path / "run" / "samples" / "000003.png").is_file()


@pytest.mark.slow
def test_a_lora_run_changes_the_kernels_of_the_blocks_alone(teacher_checkpoint, tmp_path):
    overrides = ["student.lora_rank=2", "split.updates=0", "trajectory.updates=1", "matching.updates=1"]
    distill(read_distill_config(write_config(tmp_path, teacher_checkpoint, batch=4, micro_batches=2), overrides))
    teacher = parameters(load_checkpoint(teacher_checkpoint, ["transformer"], "float32").components["transformer"])
    changed = {path for path, array in student_arrays(tmp_path).items() if not np.array_equal(array, teacher[path])}
    assert changed == {path for path in teacher if "block" in path and path.endswith(".kernel")}


@pytest.mark.slow
def test_a_finished_run_is_not_started_again(finished, teacher_checkpoint):
    with pytest.raises(FileExistsError, match="this run is done"):
        distill(read_distill_config(finished / "distill.toml"))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_good_checkpoint(teacher_checkpoint, tmp_path):
    options = {"sample_every": 1, "sample_prompts": ["a red fox"]}
    config = read_distill_config(write_config(tmp_path, teacher_checkpoint, **options), ["split.updates=0"])
    trainer = Trainer(config)
    once, drawn = trainer._update_once, []
    trainer.sample = drawn.append

    def poisoned(*arguments):
        if trainer.position == 2:
            trainer.teacher = jax.tree.map(lambda array: array * np.nan, trainer.teacher)
        once(*arguments)

    trainer._update_once = poisoned
    with pytest.raises(FloatingPointError, match=r"update 3 of trajectory .* last good checkpoint is .*progress/2"):
        trainer.run()
    assert len(read_losses(tmp_path)) == len(drawn) == 2


@pytest.mark.slow
def test_a_run_that_was_killed_while_it_drew_samples_draws_them_again(teacher_checkpoint, tmp_path):
    options = {"sample_every": 1, "sample_prompts": ["a red fox"]}
    config = read_distill_config(write_config(tmp_path, teacher_checkpoint, **options), SHORT)
    drawn = []

    def killed(path):
        drawn.append(path.name)
        if len(drawn) == 2:
            raise KeyboardInterrupt

    for _ in range(2):
        trainer = Trainer(config)
        trainer.sample = killed
        with contextlib.suppress(KeyboardInterrupt):
            trainer.run()
    assert drawn == ["000001.png", "000002.png", "000002.png", "000003.png"]


def test_held_out_trajectories_are_not_trained_on_and_their_loss_is_the_students(teacher_checkpoint, tmp_path):
    overrides = ["teacher.cached=8", "trajectory.held_out=4"]
    trainer = Trainer(read_distill_config(write_config(tmp_path, teacher_checkpoint), overrides))
    trainer._run_stages = lambda: None
    trainer.run()
    (path,) = (tmp_path / "run").glob("trajectories-*")
    kept = np.load(path).astype(np.float32)
    read = np.concatenate([trainer._read_kept("trajectories", update) for update in range(4)])
    assert {row.tobytes() for row in read} == {row.tobytes() for row in np.load(path)[:4]}

    teacher = FlashPipeline.from_pretrained(teacher_checkpoint, dtype="float32", max_t5_tokens=8)
    prompts = [trainer.prompts[row] for row in trainer.row_prompts[4:]]
    conditioning, errors = teacher.encode(prompts), []
    for step, (sigma, following) in enumerate([(1.0, 0.5), (0.5, 0.0)]):
        chord = (kept[4:, step + 1] - kept[4:, step]) / (following - sigma)
        errors.append(np.asarray(teacher.velocity(kept[4:, step], 1000 * sigma, conditioning)) - chord)
    with jax.set_mesh(trainer.mesh):
        loss = trainer._held_out_loss()
    np.testing.assert_allclose(loss, np.square(errors).mean(), rtol=1e-4)


def test_the_teachers_steps_lie_where_its_shift_puts_them(teacher_checkpoint, tmp_path):
    trainer = Trainer(read_distill_config(write_config(tmp_path, teacher_checkpoint), ["teacher.shift=1.5"]))
    trainer._run_stages = lambda: None
    trainer.run()
    assert trainer.described.schedule.shift != 1.5
    expected, _ = teacher_sigmas(np.array([1.0, 0.5, 0.0]), shifted_sigmas(3, 1.5))
    np.testing.assert_allclose(trainer.make_batch.__wrapped__.synthesis.teaching.levels, expected, atol=1e-6)


def test_a_student_begins_with_the_weights_of_its_checkpoint_and_the_proxy_with_the_teachers(
    teacher_checkpoint, tmp_path
):
    earlier = write_teacher(tmp_path / "earlier", seed=9)
    trainer = Trainer(
        read_distill_config(write_config(tmp_path, teacher_checkpoint), [f"student.checkpoint={earlier}"])
    )
    learners = (trainer.state.student.params, earlier), (trainer.state.ema, earlier), (trainer.state.proxy.params, None)
    for learned, checkpoint in learners:
        begun = load_checkpoint(checkpoint or teacher_checkpoint, ["transformer"], "float32").components["transformer"]
        expected = parameters(begun)
        assert all(np.array_equal(array, expected[path]) for path, array in learned.items())


def test_a_students_checkpoint_of_another_shape_is_refused_before_it_is_loaded(teacher_checkpoint, tmp_path, capsys):
    alone = replace(CONFIG, **dict.fromkeys(name for name in CONFIG.components if name != "transformer"))
    components = {"transformer": random_parameters("transformer", 0, alone)}
    save_checkpoint(tmp_path / "deeper", alone, components, source="tests")
    config = write_config(tmp_path, teacher_checkpoint)
    assert main(["distill", str(config), "--set", f"student.checkpoint={tmp_path / 'deeper'}"]) == 1
    assert "has no transformer of the shape of" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_on_the_students_own_points_goes_on_bit_for_bit(teacher_checkpoint, tmp_path):
    overrides = ["trajectory.points=student", "matching.updates=0", "split.updates=0", "trajectory.updates=6"]
    folders = [tmp_path / "whole", tmp_path / "interrupted"]
    configs = [read_distill_config(write_config(folder, teacher_checkpoint), overrides) for folder in folders]
    run_interrupted(configs[1], 3)
    for folder, config in zip(folders, configs):
        distill(config)
        assert float(read_losses(folder)[-1]["trajectory"]) < float(read_losses(folder)[0]["trajectory"])
    whole, interrupted = map(student_arrays, folders)
    assert all(np.array_equal(array, interrupted[path]) for path, array in whole.items())


def test_a_retrained_teacher_at_the_same_path_gets_trajectories_of_its_own(tmp_path):
    folder, run = tmp_path / "teacher", tmp_path / "run"
    checkpoint = write_teacher(folder)
    config = read_distill_config(write_config(tmp_path, checkpoint), ["teacher.cached=2"])
    run_interrupted(config, 0)
    (first,) = run.glob("trajectories-*")
    moved = folder.rename(tmp_path / "moved") / "checkpoint"
    write_teacher(folder, seed=9)
    run_interrupted(config, 0)
    (other,) = set(run.glob("trajectories-*")) - {first}
    differ = np.any(np.load(other) != np.load(first), axis=(2, 3, 4))
    assert not differ[:, 0].any() and differ[:, 1:].all(), "the noise is the same, and nothing else"
    run_interrupted(
        read_distill_config(tmp_path / "distill.toml", ["teacher.cached=2", f"teacher.checkpoint={moved}"]), 0
    )
    assert set(run.glob("trajectories-*")) == {first, other}, "the first teacher is known where it is now"


@pytest.mark.slow
def test_a_run_goes_on_with_its_own_student_and_teacher_alone(teacher_checkpoint, tmp_path):
    config = write_config(tmp_path, teacher_checkpoint)
    run_interrupted(read_distill_config(config, SHORT), 1)
    other = write_teacher(tmp_path / "other", seed=9)
    for setting, name in (
        ("student.sigmas=[1.0, 0.4]", r"student.sigmas = \[1.0, 0.5\], not \[1.0, 0.4\]"),
        ("student.lora_rank=2", "student.lora_rank = 0, not 2"),
        ("matching.head_size=4", "matching.head_size = 8, not 4"),
        (f"teacher.checkpoint={other}", "SHA-256 of teacher.checkpoint"),
    ):
        with pytest.raises(ValueError, match=f"holds a run with {name}.*choose another training.output"):
            Trainer(read_distill_config(config, [*SHORT, setting]))


@pytest.mark.slow
def test_a_run_removes_what_a_killed_one_left_half_written(teacher_checkpoint, tmp_path):
    config = read_distill_config(write_config(tmp_path, teacher_checkpoint), SHORT)
    run_interrupted(config, 1)
    run = tmp_path / "run"
    (run / ".student.partial-0a1b2c3d" / "vae").mkdir(parents=True)
    (run / "progress" / "2.orbax-checkpoint-tmp" / "arrays").mkdir(parents=True)
    run_interrupted(config, 1)
    assert sorted(path.name for path in run.iterdir()) == ["losses.csv", "progress"]
    assert [path.name for path in (run / "progress").iterdir()] == ["1"]


@pytest.mark.slow
def test_a_stages_student_that_was_kept_right_before_the_run_was_killed_is_made_again(teacher_checkpoint, tmp_path):
    config = read_distill_config(write_config(tmp_path, teacher_checkpoint), SHORT)
    run_interrupted(config, 1)
    stages = tmp_path / "run" / "stages"
    for name in ("trajectory", ".matching.partial-0a1b2c3d"):
        (stages / name / "vae").mkdir(parents=True)
    run_interrupted(config, 1)
    assert list(stages.iterdir()) == []


# What a run refuses, and what it begins with


def refused(config: Path, capsys, *overrides: str) -> str:
    """The one sentence with which the command ends, before it loads anything or makes the run's folder."""
    options = [word for override in overrides for word in ("--set", override)]
    assert main(["distill", str(config), *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert not (config.parent / "run" / "progress").exists()
    return captured.err


def test_a_prompt_list_without_prompts_is_refused_first(tmp_path, capsys):
    config = write_config(tmp_path, tmp_path / "absent")
    (tmp_path / "prompts.txt").write_text("\n \n")
    assert "prompts.txt has no prompt; write one prompt a line" in refused(config, capsys)


@pytest.mark.parametrize(
    ("without", "message"),
    [
        (["transformer"], "has no transformer to distil"),
        (["clip_l", "clip_g", "t5"], "has no text encoder to read the prompts with"),
        (["vae"], "has no vae to draw training.sample_prompts with"),
    ],
)
def test_a_teacher_that_lacks_a_component_is_refused_before_it_is_loaded(without, message, tmp_path, capsys):
    checkpoint = write_teacher(tmp_path / "teacher", without=without)
    config = write_config(tmp_path, checkpoint, sample_every=1, sample_prompts=["a red fox"])
    assert message in refused(config, capsys)


def test_a_teacher_without_tokenizers_is_refused_before_it_is_loaded(tmp_path, capsys):
    config = write_config(tmp_path, write_teacher(tmp_path / "teacher", tokenizers=False))
    assert "has no tokenizer for clip_g and clip_l and t5; convert its source again" in refused(config, capsys)


def test_a_teacher_that_is_no_checkpoint_is_refused_in_a_sentence(tmp_path, capsys):
    assert "absent is not a checkpoint" in refused(write_config(tmp_path, tmp_path / "absent"), capsys)


def test_a_size_that_the_teacher_cannot_make_is_refused_before_it_is_loaded(teacher_checkpoint, tmp_path, capsys):
    assert "height 40 is not a positive multiple of 16" in refused(
        write_config(tmp_path, teacher_checkpoint, height=40), capsys
    )


def test_an_output_that_cannot_be_a_folder_is_named(teacher_checkpoint, tmp_path, capsys):
    config = write_config(tmp_path, teacher_checkpoint)
    (tmp_path / "run").touch()
    assert "run cannot be made (File exists); choose another training.output" in refused(config, capsys)


def test_a_run_that_is_done_is_not_started_again(tmp_path, capsys):
    config = write_config(tmp_path, tmp_path / "absent")
    (tmp_path / "run" / "student").mkdir(parents=True)
    assert "run/student already exists: this run is done" in refused(config, capsys)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"training": {"batch": 12, "micro_batches": 2}},
            "training.batch / training.micro_batches = 6 does not divide",
        ),
        ({"teacher": {"cache_batch": 6}}, "teacher.cache_batch = 6 does not divide over 4 devices"),
        (
            {"matching": {"head_size": 7}},
            "matching.head_size = 7 does not divide over 2 devices; choose a multiple of 2",
        ),
    ],
)
def test_numbers_that_do_not_divide_over_the_devices_are_refused_by_name(changed, message):
    whole = DistillConfig(TeacherConfig("teacher"), TrainingConfig("prompts.txt", "run"), sharding=ShardingConfig(2))
    check_division(whole, 4)
    for section, values in changed.items():
        own = replace(getattr(whole, section), **values)
        with pytest.raises(ValueError, match=message):
            check_division(replace(whole, **{section: own}), 4)


@pytest.mark.parametrize(
    ("settings", "devices", "message"),
    [
        (["training.batch=3"], 2, "= 3 does not divide over 2 devices; choose a multiple of 2"),
        (["sharding.fsdp=4"], 2, "2 devices do not divide into groups of sharding.fsdp=4; choose a divisor"),
        (
            ["sharding.fsdp=3", "training.batch=3", "matching.head_size=6"],
            3,
            "does not divide over sharding.fsdp=3 devices; choose another number",
        ),
    ],
)
def test_what_does_not_divide_over_the_devices_is_refused_before_the_teacher_is_loaded(
    settings, devices, message, teacher_checkpoint, tmp_path
):
    config = write_config(tmp_path, teacher_checkpoint)
    options = [word for setting in settings for word in ("--set", setting)]
    flags = f"--xla_force_host_platform_device_count={devices}"
    process = start(config, options, stderr=subprocess.PIPE, XLA_FLAGS=flags)
    _, error = process.communicate()
    assert process.returncode == 1 and error.decode().endswith(f"{message}\n") and error.count(b"\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_its_compiled_programs_as_the_other_commands_do(tmp_path, monkeypatch, capsys):
    called = []
    monkeypatch.setattr(compilation, "configure", lambda: called.append(True))
    refused(write_config(tmp_path, tmp_path / "absent"), capsys)
    assert called == [True]


def test_what_was_half_written_is_removed_and_what_is_whole_stays(tmp_path):
    whole = ["losses.csv", "trajectories-0123456789ab.npy", "student/config.json"]
    half = [".trajectories-0123456789ab.npy.partial-0a1b2c3d", ".student.partial-0a1b2c3d/vae/0.0"]
    for name in whole + half:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()) == sorted(whole)


# The optimizer


def adam_and_ours(rate: float) -> tuple[optax.GradientTransformation, optax.GradientTransformation]:
    config = DistillConfig(TeacherConfig("teacher"), TrainingConfig("prompts.txt", "run", clip=1.0))
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b1=0.0))
    return adam, optimizers(config, without_momentum(rate)).student


def test_the_optimizer_takes_the_steps_of_adam_without_momentum():
    draw = np.random.default_rng(0)
    params = {"kernel": jnp.zeros((40, 5)), "bias": jnp.zeros(5)}
    states = [optimizer.init(params) for optimizer in adam_and_ours(1e-3)]
    for size in np.geomspace(1e-9, 1e3, 30):
        gradients = {
            name: np.float32(size) * draw.standard_normal(array.shape, np.float32) for name, array in params.items()
        }
        gradients["bias"][0] = 0
        taken = []
        for at, optimizer in enumerate(adam_and_ours(1e-3)):
            steps, states[at] = optimizer.update(gradients, states[at], params)
            taken.append(steps)
        for expected, found in zip(*map(jax.tree.leaves, taken)):
            np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)
            assert np.abs(found).max() > 1e-6


def test_the_optimizer_keeps_one_moment_of_each_parameter():
    params = {"kernel": jnp.zeros((40, 5)), "bias": jnp.zeros(5)}
    sizes = [
        sum(array.size for array in jax.tree.leaves(optimizer.init(params)) if array.ndim)
        for optimizer in adam_and_ours(1e-3)
    ]
    assert sizes == [2 * 205, 205]


def test_muon_keeps_one_moment_of_a_blocks_kernel_and_adam_two_of_all_else():
    shapes = {"dual_blocks.image.attention.qkv.kernel": (3, 8, 24), "last_block.image.attention.qkv.kernel": (8, 24)}
    shapes |= {"patch_embed.kernel": (4, 8), "dual_blocks.image.attention.qkv.bias": (3, 24)}
    optimizer = trajectory_optimizer(TrajectoryConfig(optimizer="muon"))
    moments = optimizer.init({path: jnp.zeros(shape) for path, shape in shapes.items()})
    paths = [keys[-1] for keys, _ in jax.tree_util.tree_leaves_with_path(moments)]
    kept = Counter(key.key for key in paths if isinstance(key, jax.tree_util.DictKey) and key.key in shapes)
    assert kept == dict(zip(shapes, (1, 1, 2, 2)))


# Losses


def test_rows_of_losses_that_no_checkpoint_holds_are_taken_back(tmp_path):
    path = tmp_path / "losses.csv"
    for update in (1, 2, 3):
        append_losses(path, update, "trajectory", {"trajectory": update / 3})
    whole = path.read_text()
    append_losses(path, 4, "trajectory", {"trajectory": 1.0})
    path.write_text(path.read_text() + "5,traj")
    truncate_losses(path, 3)
    assert path.read_text() == whole
    truncate_losses(path, 0)
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize("written", ["", "update,st"])
def test_losses_of_a_run_killed_before_their_header_was_written_begin_anew(written, tmp_path):
    path = tmp_path / "losses.csv"
    path.write_text(written)
    truncate_losses(path, 0)
    append_losses(path, 1, "trajectory", {"trajectory": 0.5})
    assert [line.partition(",")[0] for line in path.read_text().splitlines()] == ["update", "1"]
