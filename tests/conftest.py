"""Fixtures shared by all tests: small models, and the table of measured differences to the reference."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sd35flash_jax.checkpoint import save_checkpoint
from tests.tiny_model import CONFIG, random_parameters, write_tokenizers

HAS_REFERENCE = all(importlib.util.find_spec(name) for name in ("torch", "diffusers"))


def pytest_report_header() -> str | None:
    return None if HAS_REFERENCE else "parity with the reference is not tested: the reference extra is not installed"


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint with random weights, made by this project alone. Read it only."""
    folder = tmp_path_factory.mktemp("small")
    write_tokenizers(folder / "tokenizers")
    components = {name: random_parameters(name, seed) for seed, name in enumerate(CONFIG.components)}
    tokenizers = {name: folder / "tokenizers" / name for name in ("clip_l", "clip_g", "t5")}
    save_checkpoint(folder / "checkpoint", CONFIG, components, tokenizers, source="tests")
    return folder / "checkpoint"


@pytest.fixture(scope="session")
def reference_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete diffusers folder that the reference classes wrote. Read it only."""
    if not HAS_REFERENCE:
        pytest.skip("needs the reference extra")
    from tests import reference_models

    folder = tmp_path_factory.mktemp("reference") / "tiny-sd3.5"
    reference_models.write_folder(folder)
    return folder


@pytest.fixture(scope="session")
def checkpoint(reference_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`reference_folder`, converted."""
    from conversion import convert

    destination = tmp_path_factory.mktemp("converted") / "checkpoint"
    convert(reference_folder, destination)
    return destination


RecordParity = Callable[..., None]


@pytest.fixture
def record_parity(request: pytest.FixtureRequest) -> RecordParity:
    """`record_parity(item, error, tolerance, relative=None, **remarks)`: fails if the error is above the tolerance, and
    adds a row to the table at the end of the run."""

    def record(item: str, error: float, tolerance: float, relative: float | None = None, **remarks: Any) -> None:
        row = {"item": item, "error": float(error), "tolerance": float(tolerance), "relative": relative} | remarks
        request.node.user_properties.append(("parity", row))
        assert error <= tolerance, f"{item}: error {error:.3g} is above {tolerance:.3g}"

    return record


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    rows = [
        value
        for report in reports
        if getattr(report, "when", None) == "call"
        for key, value in report.user_properties
        if key == "parity"
    ]
    if not rows:
        return
    terminalreporter.section("parity with the reference")
    terminalreporter.write_line("| item | error | relative | tolerance | remarks |")
    terminalreporter.write_line("| --- | --- | --- | --- | --- |")
    for row in rows:
        known = ("item", "error", "relative", "tolerance")
        remarks = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in row.items() if key not in known)
        relative = "" if row["relative"] is None else f"{row['relative']:.1e}"
        line = f"| {row['item']} | {row['error']:.1e} | {relative} | {row['tolerance']:.1e} | {remarks} |"
        terminalreporter.write_line(line)
