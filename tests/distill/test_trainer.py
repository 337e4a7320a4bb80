"""Whole runs compile for minutes on a CPU, and are marked slow."""

import csv
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from sd35flash_jax.checkpoint import load_checkpoint, parameters, read_config, save_checkpoint
from sd35flash_jax.cli import main
from sd35flash_jax.distill.config import DistillConfig, read_distill_config
from sd35flash_jax.distill.trainer import LOSSES, Trainer, append_losses, distill, truncate_losses
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
        "trajectory": {"updates": UPDATES["trajectory"], "learning_rate": 1e-3},
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


def student_arrays(folder: Path) -> dict[str, np.ndarray]:
    loaded = load_checkpoint(folder / "run" / "student", ["transformer"], "float32")
    return {path: np.asarray(array) for path, array in parameters(loaded.components["transformer"]).items()}


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
    """Two blocks, which compile in a bearable time. Read it only."""
    assert CONFIG.transformer is not None
    transformer = replace(CONFIG.transformer, depth=2, heads=2, dual_attention_blocks=1)
    config = replace(CONFIG, transformer=transformer)
    folder = tmp_path_factory.mktemp("teacher")
    write_tokenizers(folder / "tokenizers")
    components = {name: random_parameters(name, seed, config) for seed, name in enumerate(config.components)}
    tokenizers = {name: folder / "tokenizers" / name for name in ("clip_l", "clip_g", "t5")}
    save_checkpoint(folder / "checkpoint", config, components, tokenizers, source="tests")
    return folder / "checkpoint"


@pytest.fixture(scope="module")
def finished(teacher_checkpoint, tmp_path_factory) -> Path:
    """A run of all stages, never interrupted, with a grid of samples at its end. Read it only."""
    folder = tmp_path_factory.mktemp("finished")
    options = {"sample_every": sum(UPDATES.values()), "sample_prompts": ["a red fox", "two cats"]}
    distill(read_distill_config(write_config(folder, teacher_checkpoint, **options)))
    return folder


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
    assert unchanged == {"position_table"}


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
    overrides = ["teacher.cached=5", "split.updates=0"]
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
    assert np.load(kept).shape == (5, 3, 4, 4, 16)
    np.testing.assert_array_equal(np.load(kept), np.load(expected))
    assert read_losses(tmp_path / "interrupted") == read_losses(tmp_path / "whole")
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


def start(config: Path, options: Sequence[str], **environment: str) -> subprocess.Popen:
    settings = [word for override in (*SHORT, "sharding.fsdp=2") for word in ("--set", override)]
    command = [sys.executable, "-m", "sd35flash_jax.cli", "distill", str(config), *settings, *options]
    return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment)


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
    config = read_distill_config(write_config(tmp_path, teacher_checkpoint), ["split.updates=0"])
    trainer = Trainer(config)
    once = trainer._update_once

    def poisoned(*arguments):
        if trainer.position == 2:
            trainer.teacher = jax.tree.map(lambda array: array * np.nan, trainer.teacher)
        once(*arguments)

    trainer._update_once = poisoned
    with pytest.raises(FloatingPointError, match=r"update 3 of trajectory .* last good checkpoint is .*progress/2"):
        trainer.run()
    assert len(read_losses(tmp_path)) == 2


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
