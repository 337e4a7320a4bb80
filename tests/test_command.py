import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from sd35flash_jax.command import run_command


def raising(error):
    def function():
        raise error

    return function


def test_what_is_done_has_status_0_and_its_warnings_follow_the_programs_name(capsys):
    assert run_command(lambda: warnings.warn("the sea is high", stacklevel=1), "ferry") == 0
    assert capsys.readouterr().err == "ferry: the sea is high\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no ticket; buy one"), "no ticket; buy one"),
        (FileExistsError("runs already exists"), "runs already exists"),
        (FloatingPointError("call 3 gave nan"), "call 3 gave nan"),
        (MemoryError(), "out of memory: choose a smaller size or batch, or dtype bfloat16"),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "the device is out of memory: choose a smaller size"),
        (RuntimeError("Unable to initialize backend 'tpu'"), "Unable to initialize backend 'tpu'"),
    ],
)
def test_what_its_user_can_mend_is_one_sentence_and_status_1(error, message, capsys):
    assert run_command(raising(error), "ferry") == 1
    err = capsys.readouterr().err
    assert err.startswith(f"ferry: {message}") and err.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError("a fault in the program"), TypeError("a fault")])
def test_a_fault_in_the_program_is_raised(error):
    with pytest.raises(type(error), match="a fault"):
        run_command(raising(error), "ferry")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM], ids=lambda kind: kind.name)
def test_a_signal_to_stop_interrupts_and_is_the_callers_again_afterwards(kind, capsys):
    before = signal.getsignal(signal.SIGTERM), sys.unraisablehook
    assert run_command(lambda: os.kill(os.getpid(), kind), "ferry") == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert (signal.getsignal(signal.SIGTERM), sys.unraisablehook) == before


PROGRAM = """
import atexit, sys
from sd35flash_jax.command import run_program

def main():
    atexit.register(print, "registered")
    print("printed", end=" ")
    {ending}

run_program(main)
"""


@pytest.mark.parametrize(
    ("ending", "status"),
    [("return 0", 0), ("return 1", 1), ("sys.exit(2)", 2), ("raise ZeroDivisionError", 1)],
)
def test_a_program_ends_with_its_status_after_all_that_is_to_be_done_at_its_end(ending, status):
    program = PROGRAM.format(ending=ending)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (status, "printed registered\n")
    assert ("ZeroDivisionError" in done.stderr) == ("Zero" in ending)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is full")
def test_a_program_whose_last_words_are_lost_fails_without_a_traceback():
    program = "from sd35flash_jax.command import run_program\nrun_program(lambda: print('lost') or 0)"
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, env=buffered
        )
    assert (done.returncode, done.stderr) == (1, "")


def test_a_program_does_without_the_interpreters_teardown():
    """Which would call the finalizer of what a module holds."""
    program = "class Held:\n    def __del__(self): print('torn down')\nheld = Held()\n"
    program += "from sd35flash_jax.command import run_program\nrun_program(lambda: 0)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=True).stdout == b""


COMPILING = """
import os, signal, threading
import jax
from sd35flash_jax.command import leave, run_command

def layers(x):
    for _ in range(1500):
        x = jax.numpy.sin(x @ x)
    return x

def compile_for_long():
    lowered = jax.jit(layers).lower(jax.numpy.ones((8, 8)))
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    lowered.compile()

leave(run_command(compile_for_long, "ferry"))
"""


def test_an_interrupt_while_something_compiles_ends_the_process_with_its_own_status():
    done = subprocess.run([sys.executable, "-c", COMPILING], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
