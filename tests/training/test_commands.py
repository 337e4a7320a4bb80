"""The stages as commands: what a user can mend is one sentence, before anything is written."""

import os
import runpy
import signal
import sys

import pytest

from sd35flash_jax import checkpoint
from sd35flash_jax.text import read_prompts
from sd35flash_jax.world.objects import THINGS

WORDS = [word for thing in THINGS for words in (thing.words, thing.plurals) for word in words]


@pytest.fixture
def command(monkeypatch, tmp_path, capsys):
    """Runs `python -m training.STAGE` in an empty folder; returns its status and what it says on standard error."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "_exit", sys.exit)

    def run(stage, *arguments):
        monkeypatch.setattr(sys, "argv", [stage, *arguments])
        monkeypatch.delitem(sys.modules, f"training.{stage}", raising=False)
        with pytest.raises(SystemExit) as exit:
            runpy.run_module(f"training.{stage}", run_name="__main__")
        return exit.value.code, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("stage", "arguments", "message"),
    [
        ("autoencoder", ["."], "autoencoder already exists; remove it or choose another destination"),
        ("detector", ["absent", "."], "detector.safetensors already exists; remove it or choose another destination"),
        ("detector", ["absent", "new"], "absent is not a checkpoint"),
        ("teacher", ["absent", "."], "teacher already exists; remove it or choose another destination"),
        ("teacher", ["absent", "new"], "absent is not a checkpoint"),
        ("teacher", ["absent", "new", "--resume", "absent"], "--resume needs the --tokenizers of its weights"),
        ("teacher", ["absent", "new", "--batch", "0"], "--batch must be a positive multiple of the number of devices"),
        ("teacher", ["absent", "new", "--scenes", "99"], "00 or more, 100 a device, not 99"),
        ("bundle", ["absent", "new"], "absent is not a checkpoint"),
        ("prompts", ["teacher"], "teacher already exists; remove it or choose another destination"),
        ("prompts", ["new/prompts.txt", "--count", "0"], "--count must be positive, not 0"),
        ("sprites", ["absent", "absent"], "absent/data-by-emoji.json is missing; unpack unicode-emoji-json"),
    ],
)
def test_a_mistake_is_one_sentence_and_nothing_is_written(stage, arguments, message, command, tmp_path):
    existing = {"autoencoder", "teacher", "detector.safetensors"}
    for name in existing:
        (tmp_path / name).mkdir()
    status, err = command(stage, *arguments)
    assert status == 1 and err.startswith(f"training.{stage}: ") and message in err and err.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == existing


def test_too_few_seconds_are_said(command):
    status, err = command("autoencoder", "runs", "--seconds", "0")
    assert status == 1 and "training.autoencoder: the time was over after 0 calls" in err and "Traceback" not in err


@pytest.mark.parametrize("stage", ["bundle", "detector", "teacher"])
def test_an_interrupt_is_said(stage, command, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_checkpoint", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    monkeypatch.setattr("sd35flash_jax.load_checkpoint", checkpoint.load_checkpoint)
    assert command(stage, "runs/checkpoint", "new") == (130, "interrupted\n")


@pytest.mark.parametrize("stage", ["autoencoder", "bundle", "detector", "prompts", "sprites", "teacher"])
def test_wrong_usage_exits_with_2(stage, command):
    assert command(stage)[0] == 2


def test_the_prompts_are_captions_of_their_own_one_a_line(command, tmp_path):
    assert command("prompts", "runs/prompts.txt", "--count", "30") == (0, "")
    prompts = read_prompts(tmp_path / "runs" / "prompts.txt")
    assert len(prompts) == 30 and len(set(prompts)) > 25
    assert [prompt for prompt in prompts if not any(word.lower() in prompt.lower() for word in WORDS)] == []
