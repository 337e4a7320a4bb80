"""The losses of distillations as a picture, a panel for each loss and a line for each run:

python -m training.curves "two steps=runs/two/losses.csv" --losses trajectory --output curves.png
"""

import argparse
import csv
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from sd35flash_jax.command import leave, run_command


def read_losses(path: Path) -> dict[str, np.ndarray]:
    """Each loss of a run by its name, `(values, 2)` of update and value, without the updates that do not have it.

    Raises:
        ValueError: the file cannot be read, or is not what a distillation writes.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        names = [name for name in rows[0] if name not in ("update", "stage")]
        found = {name: [(int(row["update"]), float(row[name])) for row in rows if row[name]] for name in names}
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name the losses.csv of a run") from None
    except (IndexError, KeyError, TypeError, ValueError):
        raise ValueError(f"{path} is not the losses.csv of a run") from None
    return {name: np.array(values) for name, values in found.items() if values}


def draw(runs: dict[str, dict[str, np.ndarray]], losses: Sequence[str], window: int, output: Path) -> None:
    """Write the picture; a line is the mean of `window` updates.

    Raises:
        ValueError: no run has one of the losses.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.5 * len(losses), 3.2), layout="constrained")
    for panel, loss in zip(figure.subplots(1, len(losses), squeeze=False)[0], losses):
        if not any(loss in run for run in runs.values()):
            raise ValueError(f"no run has the loss {loss!r}; there are {', '.join(sorted({*chain(*runs.values())}))}")
        for number, (name, run) in enumerate(runs.items()):
            if loss in run:
                width = min(window, len(run[loss]))
                smooth = (np.convolve(column, np.full(width, 1 / width), "valid") for column in run[loss].T)
                panel.plot(*smooth, f"C{number}", label=name)  # A run has one colour in all panels.
        panel.set(title=loss, xlabel="update")
        panel.legend(fontsize="small")
    figure.savefig(output, dpi=110)


def _named(text: str) -> tuple[str, Path]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form NAME=LOSSES")
    return name, Path(path)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="training.curves", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("runs", type=_named, nargs="+", metavar="NAME=LOSSES", help="a run's losses.csv")
    parser.add_argument("--losses", nargs="+", required=True, metavar="LOSS", help="columns of the files")
    parser.add_argument("--window", type=int, default=50, help="updates that a point of a line is the mean of")
    parser.add_argument("--output", type=Path, default=Path("curves.png"), help="PNG file to write")
    options = parser.parse_args(arguments)
    if options.window < 1:
        parser.error(f"--window must be positive, not {options.window}")
    return run_command(
        lambda: draw(
            {name: read_losses(path) for name, path in options.runs}, options.losses, options.window, options.output
        ),
        "training.curves",
    )


if __name__ == "__main__":
    leave(main())
