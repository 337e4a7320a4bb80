"""How a command ends: in an exit status, with one sentence where it failed, and with no interrupt lost."""

import atexit
import contextlib
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import NoReturn

EXIT_FAILED = 1
EXIT_INTERRUPTED = 130


def run_command(function: Callable[[], object], program: str) -> int:
    """Run it and return the exit status: 0 done, 1 failed with one sentence, 130 interrupted.

    That sentence, and every warning, goes to standard error after the program's name.
    """
    warnings.showwarning = lambda message, *_, **__: print(f"{program}: {message}", file=sys.stderr)
    try:
        with _interruptible():
            function()
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except MemoryError:
        failure = "out of memory: choose a smaller size or batch, or dtype bfloat16"
    except (ValueError, OSError, FloatingPointError) as error:
        failure = str(error)
    except RuntimeError as error:
        # JAX's own kinds: an exhausted device, and a platform asked for in the environment that cannot be had.
        if "RESOURCE_EXHAUSTED" in str(error):
            failure = "the device is out of memory: choose a smaller size or batch, or dtype bfloat16"
        elif "Unable to initialize backend" in str(error):
            failure = str(error)
        else:
            raise
    print(f"{program}: {failure}", file=sys.stderr)
    return EXIT_FAILED


def run_program(main: Callable[[], int]) -> NoReturn:
    """Run a whole process: `main`, what is registered with `atexit`, and the end with main's status. The interpreter's
    own teardown is left out: with JAX imported it takes half a second, for memory that the system takes back anyway."""
    status: int | None = None

    def end() -> None:
        if status is not None:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            except OSError:
                os._exit(EXIT_FAILED)  # What was printed is lost: its reader has gone, or the disk is full.
            os._exit(status)

    atexit.register(end)  # The first that is registered is the last that is called.
    status = main()
    gc.freeze()  # At the end of a process a search for reference cycles would be in vain.
    leave(status)


def leave(status: int) -> NoReturn:
    """End the process; after an interrupt at once, because a thread of XLA's that still compiles would crash in the
    interpreter's teardown."""
    if status == EXIT_INTERRUPTED:
        sys.stdout.flush()
        os._exit(status)
    sys.exit(status)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM interrupts as SIGINT does, so that what is half written is taken back, and no interrupt is lost: Python
    swallows an exception raised in a finalizer or a weak reference's callback, so that one is raised again."""

    def interrupt_again(unraisable: "sys.UnraisableHookArgs") -> None:
        if issubclass(unraisable.exc_type, KeyboardInterrupt):
            threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            reported(unraisable)

    terminated = signal.signal(signal.SIGTERM, signal.default_int_handler)
    reported, sys.unraisablehook = sys.unraisablehook, interrupt_again
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, terminated)
        sys.unraisablehook = reported
