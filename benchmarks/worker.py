"""One side of the benchmark in a process of its own:

    python -m benchmarks.worker SIDE < REQUEST

Reads a `Request` as JSON and prints one line of JSON for each result as it comes. Whatever the libraries print goes to
standard error. A case that fails gives its reason in place of figures, and the next one is measured.
"""

import gc
import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from benchmarks.cases import Case, Request, Side, repetitions
from benchmarks.timing import measure

SIDES = {
    "ours": ("benchmarks.ours", ()),
    "diffusers-eager": ("benchmarks.diffusers_peer", (False,)),
    "diffusers-compile": ("benchmarks.diffusers_peer", (True,)),
    "keras-hub": ("benchmarks.keras_hub_peer", ()),
}
"""The module of each side, whose `open_side` takes the request and these."""


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # Nothing but results goes to the real standard output.
    request = Request.from_json(json.load(sys.stdin))
    run_side(sys.argv[1], request, lambda line: print(json.dumps(line), file=out, flush=True))


def run_side(name: str, request: Request, emit: Callable[[dict[str, Any]], None]) -> None:
    """Measure every case of the request that a side has, and emit `about` and each row."""
    module, options = SIDES[name]
    side: Side = importlib.import_module(module).open_side(request, *options)
    emit({"about": side.about()})
    if (rate := side.gemm()) is not None:
        emit({"gemm_flops": rate})
    for case in request.cases():
        if case.item in side.items:
            emit({"row": {"side": name} | asdict(case) | _measured(side, case, request)})
            gc.collect()


def _measured(side: Side, case: Case, request: Request) -> dict[str, Any]:
    try:
        timing = measure(side.prepare(case), request.repeats, request.seconds)
    except Exception as error:  # A case may fail in as many ways as there are libraries under it.
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return {"error": f"{type(error).__name__}: {reason}"[:300]}
    figures = asdict(timing)
    for name in ("median", "lower_quartile", "upper_quartile"):
        figures[name] /= repetitions(case.item)
    return figures | {"peak_memory": side.peak_memory()}


if __name__ == "__main__":
    main()
