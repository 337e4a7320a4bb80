"""What was measured, in words: progress lines, and the report as Markdown."""

from typing import Any

from benchmarks.cases import ITEMS, Case, Request, flops

GIB = 2**30
_IMAGE_ITEMS = ("image", "prompt_to_pixels")


def describe_row(row: dict[str, Any]) -> str:
    """One result as a line of progress."""
    place = " ".join(filter(None, [row["side"], row["item"], _size(row), f"batch {row['batch']}"]))
    if "error" in row:
        return f"{place}: failed: {row['error']}"
    return f"{place}: {_milliseconds(row['median'])} ms (first call {row['first']:.1f} s, {row['runs']} runs)"


def format_report(report: dict[str, Any]) -> str:
    """The report as Markdown: where and when it was measured, one table, and what failed."""
    request = Request.from_json(report["request"])
    lines = [*_heading(report, request), "", *_table(report, request)]
    failures = [f"- {name}: {side['error']}" for name, side in report["sides"].items() if "error" in side]
    failures += [f"- {describe_row(row)}" for row in report["rows"] if "error" in row]
    return "\n".join([*lines, *(["", "Failed:", *failures] if failures else [])])


def ratios(report: dict[str, Any]) -> dict[tuple[str, Case], float]:
    """Each peer's median time over ours, where both were measured: above 1, ours is faster."""
    medians = _medians(report)
    return {
        (side, case): median / medians["ours", case]
        for (side, case), median in medians.items()
        if side != "ours" and ("ours", case) in medians
    }


def _heading(report: dict[str, Any], request: Request) -> list[str]:
    ours = report["sides"]["ours"]
    lines = [f"{ours['device']}, {request.dtype}, random weights, {report['date']}", ""]
    for name, side in report["sides"].items():
        known = {key: value for key, value in side.items() if key not in ("device", "platform", "gemm_flops", "error")}
        lines.append(f"- {name}: " + ", ".join(f"{key} {value}" for key, value in known.items()))
    if "gemm_flops" in ours:
        lines.append(f"- a large matrix product in {request.dtype}: {ours['gemm_flops'] / 1e12:.4g} TFLOP/s")
    return lines


def _table(report: dict[str, Any], request: Request) -> list[str]:
    peers = [name for name in report["sides"] if name != "ours"]
    columns = ["item", "size", "batch", "median ms", "quartiles", "images/s", "TFLOP/s", "of GEMM", "first call s"]
    columns += ["peak GiB", *(heading for peer in peers for heading in (f"{peer} ms", "ratio"))]
    rows = {(row["side"], _case(row)): row for row in report["rows"] if "error" not in row}
    compared = ratios(report)
    gemm = report["sides"]["ours"].get("gemm_flops")
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for case in request.cases():
        named = ITEMS[case.item].format(steps=request.steps)
        cells = [named, str(case.size or ""), str(case.batch), *_figures(rows.get(("ours", case)), case, request, gemm)]
        for peer in peers:
            row = rows.get((peer, case))
            cells += [_milliseconds(row["median"]) if row else ""]
            cells += [f"{compared[peer, case]:.2f}" if (peer, case) in compared else ""]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _figures(row: dict[str, Any] | None, case: Case, request: Request, gemm: float | None) -> list[str]:
    if row is None:
        return ["failed", *[""] * 6]
    rate = flops(case, request) / row["median"]
    return [
        _milliseconds(row["median"]),
        f"{_milliseconds(row['lower_quartile'])}-{_milliseconds(row['upper_quartile'])}",
        f"{case.batch / row['median']:.3g}" if case.item in _IMAGE_ITEMS else "",
        f"{rate / 1e12:.3g}",
        f"{rate / gemm:.0%}" if gemm else "",
        f"{row['first']:.1f}",
        f"{row['peak_memory'] / GIB:.1f}",
    ]


def _medians(report: dict[str, Any]) -> dict[tuple[str, Case], float]:
    return {(row["side"], _case(row)): row["median"] for row in report["rows"] if "error" not in row}


def _case(row: dict[str, Any]) -> Case:
    return Case(row["item"], row["size"], row["batch"])


def _size(row: dict[str, Any]) -> str:
    return f"{row['size']} px" if row["size"] else ""


def _milliseconds(seconds: float) -> str:
    """With three digits, as many decimals as that takes."""
    value = 1000 * seconds
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
