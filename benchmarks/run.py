"""The benchmark as a whole: every side in a process of its own, one after another, results written as they come."""

import contextlib
import datetime
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Request
from benchmarks.report import describe_row

_PEERS: dict[str, tuple[tuple[str, ...], str]] = {
    "diffusers": (("torch", "diffusers"), "reference"),
    "keras-hub": (("keras", "keras_hub"), "keras-hub"),
}
"""The modules each peer needs, and the extra of this package that brings them."""

PEERS = ("diffusers", "diffusers-eager", "diffusers-compile", "keras-hub")
"""What `against` may name; `diffusers` is eager and, on a GPU, compiled."""


def benchmark(
    request: Request,
    against: Sequence[str],
    output: Path,
    timeout: float,
    progress: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Measure this project and then each peer, and write `benchmark.json` into `output` after every result.

    Args:
        request: what to measure.
        against: peers out of `PEERS`.
        output: folder to write to; made if need be.
        timeout: seconds after which a side's process is ended; what it had measured by then is kept.
        progress: called with a line for each result.

    Returns:
        The report: `request`, `date`, `sides` with what each runs on or why it ended early, and `rows`.

    Raises:
        ValueError: a peer is unknown or not installed.
        ChildProcessError: our own side could not start.
    """
    for peer in against:
        if peer not in PEERS:
            raise ValueError(f"there is no peer {peer!r} to measure against; choose from {', '.join(PEERS)}")
        _check_installed(peer)
    output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "request": request.to_json(),
        "sides": {},
        "rows": [],
    }
    _measure_side("ours", request, timeout, report, output, progress)
    about = report["sides"]["ours"]
    if "platform" not in about:
        raise ChildProcessError(about["error"])
    for side in _sides(against, about["platform"]):
        _measure_side(side, replace(request, platform=about["platform"]), timeout, report, output, progress)
    return report


def _sides(against: Sequence[str], platform: str) -> list[str]:
    """The sides that peers stand for, each once."""
    modes = ["diffusers-eager"] if platform == "cpu" else ["diffusers-eager", "diffusers-compile"]
    named = [side for peer in against for side in (modes if peer == "diffusers" else [peer])]
    return list(dict.fromkeys(named))


def _check_installed(peer: str) -> None:
    modules, extra = _PEERS["diffusers" if peer.startswith("diffusers") else peer]
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise ValueError(f"{peer} needs {' and '.join(missing)}: pip install 'sd35flash-jax[{extra}]'")


def _measure_side(
    name: str,
    request: Request,
    timeout: float,
    report: dict[str, Any],
    output: Path,
    progress: Callable[[str], object],
) -> None:
    """Run one side to its end and add what it finds to the report."""
    side = report["sides"][name] = {}
    for line in _lines(name, request, timeout):
        if "row" in line:
            report["rows"].append(line["row"])
            progress(describe_row(line["row"]))
        else:
            side.update(line.pop("about", line))
            progress(f"{name}: " + ", ".join(f"{key} {value}" for key, value in side.items()))
        _write(report, output)


def _lines(side: str, request: Request, timeout: float) -> Iterator[dict[str, Any]]:
    """What a side's process prints, parsed; where it does not end well, a last `{"error": reason}`."""
    command = [sys.executable, "-m", "benchmarks.worker", side]
    # A session of its own, so that the processes it starts can be ended with it.
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdin and process.stdout
    overdue = threading.Event()

    def end() -> None:
        overdue.set()
        _kill(process)

    timer = threading.Timer(timeout, end)
    timer.start()
    try:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(request.to_json()))
            process.stdin.close()
        for line in process.stdout:
            yield json.loads(line)
        status = process.wait()
    finally:
        timer.cancel()
        _kill(process)
    if overdue.is_set():
        yield {"error": f"{side} was ended after {timeout:g} s"}
    elif status:
        yield {"error": f"{side} ended with status {status}; its own messages are above"}


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _write(report: dict[str, Any], output: Path) -> None:
    """Replace the report file at once, so that it is whole whenever it is read."""
    partial = output / ".benchmark.json.partial"
    partial.write_text(json.dumps(report, indent=1), encoding="utf-8")
    partial.replace(output / "benchmark.json")
