import json
from dataclasses import replace

import jax
import numpy as np
import pytest

from benchmarks import run, worker
from benchmarks.cases import ITEMS, Case, Request, make_request
from benchmarks.ours import random_component
from benchmarks.plot import write_plot
from benchmarks.report import format_report, ratios
from benchmarks.run import benchmark
from benchmarks.timing import measure
from sd35flash_jax.checkpoint import parameters, runs_stacked
from sd35flash_jax.cli import main
from sd35flash_jax.config import PRESETS, VAEConfig
from tests.tiny_model import CONFIG

SMALL = replace(
    CONFIG,
    transformer=replace(CONFIG.transformer, depth=1, dual_attention_blocks=0),
    vae=VAEConfig(channels=(4, 4, 4, 4), blocks_per_level=1, norm_groups=4),
    clip_l=replace(CONFIG.clip_l, layers=1),
    clip_g=replace(CONFIG.clip_g, layers=1),
    t5=replace(CONFIG.t5, layers=1),
)


def request_for(*items, model=SMALL, **options) -> Request:
    return make_request(
        **{
            "model": model, "sizes": (32,), "batches": (1,), "items": items, "dtype": "float32", "steps": 2,
            "repeats": 3, "seconds": 0.1,
        } | options
    )  # fmt: skip


def figures(median, **more) -> dict:
    timing = {"first": 1.5, "lower_quartile": 0.9 * median, "upper_quartile": 1.1 * median, "runs": 5}
    return timing | {"median": median, "peak_memory": 2**30} | more


@pytest.fixture
def report() -> dict:
    """Our side and a peer; one of the peer's cases failed."""
    request = request_for("t5", "evaluation", "image", batches=(1, 8))
    rows = [{"side": side} | vars(case) for side in ("ours", "diffusers-eager") for case in request.cases()]
    for row in rows:
        slower = 1.5 if row["side"] == "diffusers-eager" else 1.0
        row |= figures(0.010 * slower * row["batch"])
    for name in figures(1.0):
        rows[-1].pop(name)
    rows[-1]["error"] = "OutOfMemoryError: too large"
    about = {"device": "Test GPU", "platform": "gpu", "jax": "1.2.3", "gemm_flops": 1e12}
    return {
        "date": "2026-11-22T12:00:00+00:00",
        "request": request.to_json(),
        "sides": {"ours": about, "diffusers-eager": {"torch": "4.5", "error": "diffusers-eager was ended after 9 s"}},
        "rows": rows,
    }


def test_items_are_measured_and_written_down(tmp_path):
    lines = []
    items = ("step", "image", "prompt_to_pixels")
    request = request_for(*items)
    report = benchmark(request, [], tmp_path / "out", 120, lines.append)
    written = json.loads((tmp_path / "out" / "benchmark.json").read_text())
    assert Request.from_json(written["request"]) == request
    assert written["rows"] == report["rows"] and written["sides"] == report["sides"]
    assert [row["item"] for row in report["rows"]] == list(items)
    for row in report["rows"]:
        assert "error" not in row, row
        assert 0 < row["lower_quartile"] <= row["median"] <= row["upper_quartile"]
        assert row["peak_memory"] > 2**20 and row["runs"] == 3
    about = report["sides"]["ours"]
    assert about["platform"] == "cpu" and about["jax"] == jax.__version__ and about["gemm_flops"] > 1e8
    assert any("prompt_to_pixels 32 px batch 1" in line for line in lines)
    table = format_report(report)
    assert table.count("\n| ") == 2 + len(items) and "failed" not in table and about["device"] in table


def test_a_case_that_fails_is_reported_and_the_rest_goes_on(monkeypatch):
    from benchmarks import ours

    original = ours.Ours.prepare

    def prepare(self, case):
        if case.item == "decode":
            raise MemoryError("no room\nfor this")
        return original(self, case)

    monkeypatch.setattr(ours.Ours, "prepare", prepare)
    lines = []
    worker.run_side("ours", request_for("evaluation", "decode"), lines.append)
    first, second = [line["row"] for line in lines if "row" in line]
    assert second == {"side": "ours", "item": "decode", "size": 32, "batch": 1, "error": "MemoryError: no room"}
    assert first["median"] > 0


def test_a_side_that_takes_too_long_or_breaks_is_ended_and_said_so(tmp_path, monkeypatch):
    with pytest.raises(ChildProcessError, match=r"ours was ended after 0\.2 s"):
        benchmark(request_for("clip_l"), [], tmp_path, 0.2)
    monkeypatch.setenv("JAX_PLATFORMS", "nonesuch")
    with pytest.raises(ChildProcessError, match="ours ended with status 1"):
        benchmark(request_for("clip_l"), [], tmp_path, 60)


def test_random_parameters_fill_every_place_and_keep_activations_near_one():
    for name in ("transformer", "t5"):
        values = parameters(random_component(name, CONFIG, "bfloat16"))
        for path, array in values.items():
            assert array.dtype == "bfloat16" and 0 < np.asarray(array, np.float32).std() < 1.1, path
            middle = 1 if path.endswith(".scale") else 0
            assert abs(np.asarray(array, np.float32).mean() - middle) < 0.2, path
    stacked = runs_stacked(jax.default_backend())
    kernel = np.asarray(values["layers.gate.kernel" if stacked else "layers.0.gate.kernel"], np.float32)
    assert kernel.std() == pytest.approx(kernel.shape[-2] ** -0.5, rel=0.05)


def test_cases_are_text_first_and_then_sizes_and_batches():
    request = request_for("decode", "t5", "evaluation", sizes=(32, 64), batches=(1, 2))
    assert list(request.cases()) == [
        *(Case("t5", None, batch) for batch in (1, 2)),
        *(Case(item, size, batch) for size in (32, 64) for batch in (1, 2) for item in ("evaluation", "decode")),
    ]


def test_timing_is_of_repeated_calls_within_the_time_given():
    calls = []
    assert measure(lambda: calls.append(1), repeats=7, seconds=9.0).runs == 7
    assert len(calls) == 9, "a first call, one to warm up, and the timed ones"
    assert measure(lambda: None, repeats=7, seconds=0.0).runs == 3


def test_the_table_has_shares_of_the_gemm_rate_images_a_second_and_ratios(report):
    table = format_report(report)
    assert "Test GPU, float32, random weights, 2026-11-22" in table and "jax 1.2.3" in table and "torch 4.5" in table
    rows = [line.split(" | ") for line in table.splitlines() if line.startswith("| denoising and decoding")]
    assert [row[5] for row in rows] == ["100", "100"], "images a second at batch 1 and 8"
    assert rows[0][-1] == "1.50 |" and rows[1][-1] == " |"
    assert ratios(report)["diffusers-eager", Case("evaluation", 32, 1)] == pytest.approx(1.5)
    failures = table.split("Failed:\n")[1].splitlines()
    assert failures == [
        "- diffusers-eager: diffusers-eager was ended after 9 s",
        "- diffusers-eager image 32 px batch 8: failed: OutOfMemoryError: too large",
    ]


def test_the_plot_is_drawn(report, tmp_path):
    pytest.importorskip("matplotlib")
    write_plot(report, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--items", "dream"], "there is no item 'dream' to measure; choose from clip_l"),
        (["--sizes", "100"], "height 100 is not a positive multiple of 16"),
        (["--batches", "0"], "batches must be positive, not 0"),
        (["--seconds", "nan"], "seconds must be positive, not nan"),
        (["--against", "nobody"], "there is no peer 'nobody' to measure against; choose from diffusers"),
    ],
)
def test_wrong_options_are_one_sentence(options, message, tmp_path, capsys):
    assert main(["benchmark", "--output", str(tmp_path / "out"), *options]) == 1
    assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("peer", "extra"), [("diffusers-compile", "reference"), ("keras-hub", "keras-hub")])
def test_a_peer_that_is_not_installed_is_named_with_its_extra(peer, extra, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    assert main(["benchmark", "--against", peer, "--output", str(tmp_path / "out")]) == 1
    assert f"pip install 'sd35flash-jax[{extra}]'" in capsys.readouterr().err


def test_the_command_prints_the_table_and_says_what_a_plot_needs(report, tmp_path, capsys, monkeypatch):
    asked = {}

    def measured(request, against, output, timeout, progress):
        asked.update(request=request, against=against)
        output.mkdir()
        progress("one line")
        return report

    monkeypatch.setattr(run, "benchmark", measured)
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    options = ["--preset", "sd3-medium", "--sizes", "512", "1024", "--batches", "1", "8", "--against", "keras-hub"]
    assert main(["benchmark", "--output", str(tmp_path / "out"), *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == format_report(report) + "\n" == (tmp_path / "out" / "benchmark.md").read_text()
    assert "one line" in captured.err and "pip install 'sd35flash-jax[benchmark]'" in captured.err
    assert asked["request"].model == PRESETS["sd3-medium"] and asked["request"].sizes == (512, 1024)
    assert asked["request"].items == tuple(ITEMS) and asked["against"] == ["keras-hub"]
