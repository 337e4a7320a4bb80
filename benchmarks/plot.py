"""The report as a picture: a panel for each size and batch, a bar for each item and side."""

from pathlib import Path
from typing import Any

from benchmarks.cases import ITEMS


def write_plot(report: dict[str, Any], file: Path) -> None:
    """Draw median times with their quartiles.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    measured = [row for row in report["rows"] if "error" not in row]
    panels = list(dict.fromkeys((row["size"], row["batch"]) for row in measured))
    if not panels:
        return
    figure = Figure(figsize=(9, 1 + 2.6 * len(panels)), layout="constrained")
    figure.suptitle(f"{report['sides']['ours']['device']}, {report['request']['dtype']}, {report['date'][:10]}")
    sides = [name for name in report["sides"] if any(row["side"] == name for row in measured)]
    axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
    for axis, (size, batch) in zip(axes, panels):
        shown = [row for row in measured if (row["size"], row["batch"]) == (size, batch)]
        items = [item for item in ITEMS if any(row["item"] == item for row in shown)]
        height = 0.8 / len(sides)
        for number, side in enumerate(sides):
            rows = [row for row in shown if row["side"] == side]
            middles = [1000 * row["median"] for row in rows]
            below = [1000 * (row["median"] - row["lower_quartile"]) for row in rows]
            above = [1000 * (row["upper_quartile"] - row["median"]) for row in rows]
            places = [items.index(row["item"]) + (number - (len(sides) - 1) / 2) * height for row in rows]
            axis.barh(places, middles, height, xerr=[below, above], label=side)
        axis.set_yticks(range(len(items)), [item.replace("_", " ") for item in items])
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlabel("ms")
        axis.set_title(", ".join(filter(None, [size and f"{size} px", f"batch {batch}"])), loc="left")
    axes[0].legend()
    figure.savefig(file, dpi=120)
