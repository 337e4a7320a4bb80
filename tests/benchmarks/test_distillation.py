import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import distillation
from benchmarks.cases import TEXT_TOKENS
from benchmarks.distillation import Update, format_row
from benchmarks.distillation_flops import BACKWARD, BACKWARD_OF_INPUTS, matching_passes
from benchmarks.flops import transformer_flops
from sd35flash_jax.config import PRESETS
from sd35flash_jax.distill.adversarial import init_heads
from sd35flash_jax.distill.config import MatchingConfig, make_distill_config
from sd35flash_jax.distill.stages import update_program
from sd35flash_jax.distill.updates import Batch, MatchingUpdate, Networks, Optimizers, State, begin
from sd35flash_jax.models import layers
from sd35flash_jax.sharding import make_mesh
from tests.distill.networks import SIZE, mlp, mlp_features, random_mlp
from tests.tiny_model import CONFIG

ROOT = Path(__file__).parents[2]
TINY = replace(CONFIG, transformer=replace(CONFIG.transformer, depth=1, heads=2, dual_attention_blocks=0))
ARGUMENTS = ["--preset", "tiny", "--size", "32", "--batch", "2", "--proxy-updates", "1", "--repeats", "1"]
ROWS = 2


# The command


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    monkeypatch.setattr(distillation, "GEMM_REPEATS", 1)


def check_measured(report: dict, printed: str) -> None:
    """A row under its heading, and the figures that it is made of."""
    heading, _, row = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in printed.splitlines())
    cells = dict(zip(heading, row, strict=True))
    assert cells["trained"] == report["trained"] and cells["update s"] == f"{report['median']:.3f}"
    assert printed.strip() == format_row(report)
    assert report["preset"] == "tiny" and report["versions"]["jax"] == jax.__version__
    assert len(report["seconds"]) == 1 and report["median"] == report["seconds"][0] > 0
    assert report["of_gemm"] * report["gemm_flops"] * report["devices"] == pytest.approx(
        report["flops"] / report["median"]
    )
    memory = report["memory"]
    assert 0 < memory["arguments"] < memory["total"] == sum(memory.values()) - memory["total"]
    assert memory["temporaries"] > 0 and report["peak_memory"] > 2**20
    assert {"proxy", "discriminator", "matching", "adversarial", "student_gradient"} <= set(report["losses"])


def test_an_update_over_two_devices_is_measured_and_written_down(tmp_path):
    output = tmp_path / "new" / "update.json"
    program = (
        "import sys\n"
        "from benchmarks import distillation\n"
        "from sd35flash_jax.config import PRESETS\n"
        "from tests.benchmarks.test_distillation import TINY\n"
        "PRESETS['tiny'], distillation.GEMM_REPEATS = TINY, 1\n"
        "sys.exit(distillation.main(sys.argv[1:]))"
    )
    flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-c", program, *ARGUMENTS, "--fsdp", "2", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True, text=True)
    assert "compiled" in done.stderr
    report = json.loads(output.read_text())
    check_measured(report, done.stdout)
    assert report["trained"] == "everything" and report["devices"] == report["fsdp"] == 2


def test_the_memory_alone_is_said_of_shapes(monkeypatch, capsys):
    monkeypatch.setattr(Update, "arrays", lambda self: pytest.fail("an array was made"))
    monkeypatch.setattr(Update, "compile", lambda self: jax.jit(lambda x: x + 1).lower(jnp.zeros(5)).compile())
    assert distillation.main([*ARGUMENTS, "--lora-rank", "2", "--compile-only"]) == 0
    heading, _, row = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()
    )
    cells = dict(zip(heading, row, strict=True))
    assert cells["trained"] == "LoRA of rank 2" and cells["devices"].startswith("1 x ")
    assert cells["in all GiB"] == "0.0" and cells["update s"] == cells["peak GiB"] == cells["of GEMM"] == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--repeats", "0"], "--repeats must be positive, not 0"),
        (["--size", "40"], "multiple"),
        (["--batch", "0"], "training.batch"),
        (["--batch", "3", "--micro-batches", "2"], "training.batch 3 does not divide into 2 micro_batches"),
        (["--lora-rank", "-1"], "student.lora_rank"),
        (["--fsdp", "2"], "1 devices do not divide into groups of sharding.fsdp=2"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_sentence(arguments, said, capsys):
    assert distillation.main([*ARGUMENTS, *arguments]) == 1
    printed = capsys.readouterr()
    assert said in printed.err and printed.err.startswith("benchmarks.distillation: ")
    assert len(printed.err.splitlines()) == 1 and not printed.out


# The count of evaluations


def counting(counts: Counter, name: str, network):
    """`network`, parameters -> latents, timestep, conditioning -> values, with a count of the rows that it is evaluated
    for and of those whose gradient it is asked for, where the values are known: what is merely traced does not run."""

    def run(params, *inputs):
        if not isinstance(inputs[0], jax.core.Tracer):
            counts[name] += len(inputs[0]) / ROWS
        return network(params)(*inputs)

    def forward(params, *inputs):
        return run(params, *inputs), (params, inputs)

    def backward(kept, cotangents):
        params, inputs = kept
        if not isinstance(inputs[0], jax.core.Tracer):
            counts[f"{name} backward"] += len(inputs[0]) / ROWS
        return jax.vjp(lambda params, *inputs: network(params)(*inputs), params, *inputs)[1](cotangents)

    counted = jax.custom_vjp(run)
    counted.defvjp(forward, backward)
    return lambda params: lambda *inputs: counted(params, *inputs)


def evaluations(config: MatchingConfig, sigmas: tuple[float, ...], step: int) -> Counter:
    """How often an update that trains one step evaluates each network for a row: it runs operation by operation."""
    counts: Counter = Counter()
    networks = Networks(
        teacher=counting(counts, "teacher", mlp),
        student=lambda params, _: counting(counts, "student", mlp)(params),
        proxy=lambda params, _: counting(counts, "proxy", mlp)(params),
        features=lambda params, _: counting(counts, "features", mlp_features)(params),
    )
    optimizers = Optimizers(*[optax.sgd(1e-3)] * 3)
    teacher, student, proxy = (
        jax.tree.map(lambda array: jnp.array(array, jnp.float32), random_mlp(seed)) for seed in range(3)
    )
    heads = init_heads(jax.random.key(0), 2, 5, 4)
    state = State(
        begin(student, optimizers.student), student, begin(proxy, optimizers.proxy), begin(heads, optimizers.heads)
    )
    draw = np.random.default_rng(0)
    text, negative = (jnp.array(draw.standard_normal((1, ROWS, 3)), jnp.float32) for _ in range(2))
    batch = Batch(text, text, negative, jnp.array(draw.standard_normal((1, ROWS, SIZE)), jnp.float32))
    update = MatchingUpdate(networks, optimizers, sigmas, (step, step + 1), 0.9, config)
    with jax.disable_jit():
        update(state, teacher, batch, jax.random.key(0))
    return counts


@pytest.mark.parametrize(
    "config",
    [
        MatchingConfig(proxy_updates=2),
        MatchingConfig(proxy_updates=1, guidance_term="decoupled", points="renoised", adversarial_weight=0.0),
        MatchingConfig(proxy_updates=1, guidance=1.0),
    ],
)
def test_the_counted_passes_are_those_of_an_update_on_average_over_its_steps(config):
    counts: Counter = Counter()
    for step in range(3):
        counts.update(evaluations(config, (1.0, 0.7, 0.4, 0.0), step))
    passes = matching_passes(config, 3)
    assert passes.student == counts["student"] / 3 + BACKWARD * counts["student backward"] / 3
    assert passes.proxy == counts["proxy"] / 3 + BACKWARD * counts["proxy backward"] / 3
    assert passes.teacher == counts["teacher"] / 3 and not counts["teacher backward"]
    assert passes.features == counts["features"] / 3 + BACKWARD_OF_INPUTS * counts["features backward"] / 3


def test_the_arithmetic_of_an_update_is_what_xla_counts(monkeypatch):
    """Nothing is compiled or allocated. XLA counts the body of a loop once, so each stack holds one block here and the
    student takes one step; it counts the two loops to where that step starts, which take none here, and of the features
    the last block, which nothing reads."""
    monkeypatch.setattr(layers, "_for_one_device", lambda: False)  # attention that does not loop over heads
    medium = PRESETS["sd3.5-medium"]
    transformer = replace(medium.transformer, depth=3, heads=8, dual_attention_blocks=1, position_table_side=16)
    sections = {
        "teacher": {"checkpoint": ""},
        "training": {
            "prompts": "", "output": "", "batch": 1, "height": 256, "width": 256, "rematerialise": False
        },
        "student": {"sigmas": [1.0]},
        "matching": {"proxy_updates": 1},
        "split": {"updates": 0},
    }  # fmt: skip
    update = Update(replace(medium, transformer=transformer), make_distill_config(sections, "the test"), make_mesh(1))
    state, *others = update.shapes()
    with jax.set_mesh(update.mesh):
        found = update_program(update.mesh).lower(update.update, state, *others).cost_analysis()["flops"]
    whole = transformer_flops(transformer, 32, 32, TEXT_TOKENS)
    last_block = whole - transformer_flops(replace(transformer, depth=2), 32, 32, TEXT_TOKENS)
    assert update.flops + 2 * whole + 3 * last_block == pytest.approx(found, rel=0.02)
