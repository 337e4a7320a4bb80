"""Fixtures shared by all tests: small models, and the table of measured differences to the reference."""

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from sd35flash_jax.checkpoint import save_checkpoint
from tests.tiny_model import CONFIG, random_parameters, write_tokenizers

HAS_REFERENCE = all(importlib.util.find_spec(name) for name in ("torch", "diffusers", "peft"))


def pytest_report_header() -> str | None:
    return None if HAS_REFERENCE else "parity with the reference is not tested: the reference extra is not installed"


@pytest.fixture(scope="session", autouse=True)
def no_compilation_cache() -> Iterator[None]:
    """The user's own cache of compiled programs is neither read nor written, here or in processes that tests start."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_ENABLE_COMPILATION_CACHE", "0")
        jax.config.update("jax_enable_compilation_cache", False)
        yield


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


@pytest.fixture
def compilations() -> Iterator[list[str]]:
    """Every program that XLA compiles while the test runs."""
    seen: list[str] = []

    def listen(event: str, duration: float, **_: object) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seen
    jax.monitoring.unregister_event_duration_listener(listen)


RecordParity = Callable[..., None]


@pytest.fixture
def record_parity(request: pytest.FixtureRequest) -> RecordParity:
    """`record_parity(item, error, tolerance, relative=None, **remarks)`: fails if the error is above the tolerance, and
    adds a row to the table at the end of the run."""

    def record(item: str, error: float, tolerance: float, relative: float | None = None, **remarks: Any) -> None:
        row: dict[str, Any] = {"item": item, "error": float(error), "tolerance": float(tolerance)}
        row["relative"] = None if relative is None else float(relative)
        row |= {key: str(value) for key, value in remarks.items()}  # plain values, which processes can hand on
        request.node.user_properties.append(("parity", row))
        assert error <= tolerance, f"{item}: error {error:.3g} is above {tolerance:.3g}"

    return record


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """The parity table: the worst case of each subject, or every case with -v."""
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
    subjects: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        whole = terminalreporter.config.get_verbosity() > 0
        subject = row["item"].split(",")[0] + (", bfloat16 rounding (RMS)" if "bfloat16" in row["item"] else "")
        subjects.setdefault(row["item"] if whole else subject, []).append(row)
    terminalreporter.section("parity with the reference")
    terminalreporter.write_line("| subject | cases | worst error | tolerance | remarks |")
    terminalreporter.write_line("| --- | --- | --- | --- | --- |")
    for subject, cases in subjects.items():
        worst = max(cases, key=lambda row: row["error"] / row["tolerance"] if row["tolerance"] else row["error"])
        remarks = {key: value for key, value in worst.items() if key not in ("item", "error", "relative", "tolerance")}
        if worst["relative"] is not None:
            remarks = {"relative": f"{worst['relative']:.1e}"} | remarks
        described = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in remarks.items())
        line = f"| {subject} | {len(cases)} | {worst['error']:.1e} | {worst['tolerance']:.1e} | {described} |"
        terminalreporter.write_line(line)
