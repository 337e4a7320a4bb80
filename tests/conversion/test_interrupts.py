"""Conversions that are stopped from outside: the destination is then absent or whole, and a rerun succeeds."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sd35flash_jax.checkpoint import load_checkpoint
from tests.diffusers_source import write_folder

COMPONENTS = ("transformer", "t5")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interrupts") / "source"
    write_folder(folder, COMPONENTS)
    return folder


def start(folder: Path, destination: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sd35flash_jax.cli", "convert", str(folder), str(destination)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)


def wait_for_partial(room: Path, process: subprocess.Popen[str]) -> None:
    """Until the conversion has begun to write."""
    while process.poll() is None and not list(room.glob(".made.partial-*")):
        time.sleep(0.01)


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGKILL, signal.SIGTERM], ids=lambda kind: kind.name)
def test_a_stopped_conversion_leaves_the_destination_absent_or_whole(kind, folder, tmp_path):
    draw = random.Random(int(kind))
    for attempt in range(2):
        room = tmp_path / str(attempt)
        room.mkdir()
        process = start(folder, room / "made")
        wait_for_partial(room, process)
        time.sleep(draw.uniform(0, 0.8))
        process.send_signal(kind)
        _, messages = process.communicate(timeout=60)
        assert "Traceback" not in messages, messages
        whole = (room / "made").exists()
        if kind != signal.SIGKILL:
            # A killed process can take nothing back; any other stop does.
            assert {path.name for path in room.iterdir()} == ({"made"} if whole else set())
        if not whole:
            assert start(folder, room / "made").wait(timeout=120) == 0
        assert set(load_checkpoint(room / "made").components) == set(COMPONENTS)


SWALLOWED = """
import os, signal, sys, time
from sd35flash_jax import cli

signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job that a shell started in the background

class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)

def convert(options):
    Finalized()
    time.sleep(30)

cli._convert = convert
sys.exit(cli.main(["convert", "source", "destination"]))
"""


def test_an_interrupt_that_python_swallows_in_a_finalizer_still_interrupts():
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, timeout=25)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
