"""One update of the distillation's stage (b) at true size, with random weights in place of a checkpoint:

    python -m benchmarks.distillation --batch 8 --lora-rank 64 --output update.json

The state, the update and its program are the trainer's own, over all devices that JAX sees; random conditioning stands
in for the text encoders. Prints one row of Markdown under its heading.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from benchmarks.cases import TEXT_TOKENS
from benchmarks.distillation_flops import matching_flops
from benchmarks.machine import jax_device_name, jax_peak_bytes, versions
from benchmarks.ours import gemm_rate, random_parameters
from benchmarks.timing import duration
from sd35flash_jax import compilation
from sd35flash_jax.checkpoint import parameter_shapes
from sd35flash_jax.command import leave, run_command
from sd35flash_jax.config import DOWNSAMPLING, PRESETS, ModelConfig
from sd35flash_jax.distill.config import DistillConfig, make_distill_config
from sd35flash_jax.distill.lora import Params
from sd35flash_jax.distill.stages import in_parts, initial_state, make_stages, update_program
from sd35flash_jax.distill.trainer import check_division
from sd35flash_jax.distill.updates import Batch, MatchingUpdate, State
from sd35flash_jax.pipeline import check_size
from sd35flash_jax.sharding import make_mesh, parameter_shardings, replicated, row_sharding
from sd35flash_jax.text import Conditioning

GIB = 2**30
GEMM_REPEATS, GEMM_SECONDS = 20, 1.0


@dataclass(frozen=True)
class Update:
    """One update of stage (b) of a distillation of `model`, on a mesh of devices."""

    model: ModelConfig
    config: DistillConfig
    mesh: Mesh

    @cached_property
    def update(self) -> MatchingUpdate:
        update = make_stages(self.config, self.model)[1].update
        assert isinstance(update, MatchingUpdate)
        return update

    @property
    def flops(self) -> float:
        """Model arithmetic of the update, on all devices together."""
        assert self.model.transformer is not None
        config, side = self.config, self.config.training.height // DOWNSAMPLING
        steps = len(config.student.sigmas)
        return matching_flops(self.model.transformer, config.matching, steps, config.training.batch, side, TEXT_TOKENS)

    def shapes(self) -> tuple[State, Params, Batch, Array]:
        """State, teacher, batch and key as shapes with their shardings; nothing is allocated."""
        dtype = self.config.training.dtype
        teacher = {
            path: jax.ShapeDtypeStruct(shape, dtype)
            for path, shape in parameter_shapes("transformer", self.model).items()
        }
        key = jax.eval_shape(jax.random.key, 0)
        state = jax.eval_shape(self._initial_state, teacher, key)
        teacher, state = (_placed(tree, parameter_shardings(self.mesh, tree)) for tree in (teacher, state))
        batch = jax.eval_shape(self._random_batch, key)
        batch = _placed(batch, jax.tree.map(lambda _: row_sharding(self.mesh, 1), batch))
        return state, teacher, batch, _placed(key, replicated(self.mesh))

    def arrays(self) -> tuple[State, Params, Batch, Array]:
        """The same with random values, each made in the parts that its devices hold."""
        shapes = parameter_shapes("transformer", self.model)
        placed = {path: array.sharding for path, array in self.shapes()[1].items()}
        teacher = random_parameters(shapes, self.config.training.dtype, placed)
        key = jax.jit(jax.random.key, out_shardings=replicated(self.mesh))(self.config.training.seed)
        state = in_parts(self.mesh, self._initial_state, teacher, key)
        batch = jax.jit(self._random_batch, out_shardings=row_sharding(self.mesh, 1))(key)
        return state, teacher, batch, key

    def compile(self) -> Any:
        """The trainer's program of the update, compiled for `shapes`."""
        state, *others = self.shapes()
        with jax.set_mesh(self.mesh):
            return update_program(self.mesh).lower(self.update, state, *others).compile()

    def _initial_state(self, teacher: Params, key: Array) -> State:
        return initial_state(self.config, self.model, self.update.optimizers, teacher, teacher, key)

    def _random_batch(self, key: Array) -> Batch:
        """Micro-batches of unit noise: `TEXT_TOKENS` tokens of context, and latents of square images."""
        transformer, training = self.model.transformer, self.config.training
        assert transformer is not None
        rows = (training.micro_batches, training.batch // training.micro_batches)
        latents = (training.height // DOWNSAMPLING, training.width // DOWNSAMPLING, transformer.latent_channels)
        keys = jax.random.split(key, 4)

        def conditioning(key: Array) -> Conditioning:
            context, pooled = jax.random.split(key)
            return Conditioning(
                jax.random.normal(context, (*rows, TEXT_TOKENS, transformer.context_size), training.dtype),
                jax.random.normal(pooled, (*rows, transformer.pooled_size), training.dtype),
            )

        real = jax.random.normal(keys[3], (*rows, *latents))
        return Batch(conditioning(keys[0]), conditioning(keys[1]), conditioning(keys[2]), real)


def measure_update(
    model: ModelConfig,
    config: DistillConfig,
    repeats: int,
    compile_only: bool = False,
    progress: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Compile one update, run it once to warm up and then `repeats` times, unless `compile_only`.

    Raises:
        ValueError: the size or the numbers do not fit the model or the devices.
        FloatingPointError: a loss is not finite.
    """
    compilation.configure()
    jax.config.update("jax_enable_compilation_cache", False)
    training = config.training
    check_size(model, training.height, training.width)
    mesh = make_mesh(config.sharding.fsdp)
    check_division(config, mesh.size)
    update = Update(model, config, mesh)
    start = time.perf_counter()
    program = update.compile()
    report = {
        "device": jax_device_name(),
        "devices": mesh.size,
        "versions": versions("sd35flash-jax", "jax", "jaxlib", "flax", "optax"),
        "trained": "everything" if not config.student.lora_rank else f"LoRA of rank {config.student.lora_rank}",
        "fsdp": config.sharding.fsdp,
        "size": training.height,
        "batch": training.batch,
        "micro_batches": training.micro_batches,
        "proxy_updates": config.matching.proxy_updates,
        "rematerialise": training.rematerialise,
        "compile_seconds": time.perf_counter() - start,
        "memory": _memory(program),
        "flops": update.flops,
    }
    progress(f"compiled: {report}")
    return report if compile_only else report | _timed(update, program, repeats, progress)


def _timed(update: Update, program: Any, repeats: int, progress: Callable[[str], object]) -> dict[str, Any]:
    gemm = gemm_rate(update.config.training.dtype, GEMM_REPEATS, GEMM_SECONDS)
    progress(f"a large matrix product: {gemm / 1e12:.4g} TFLOP/s")
    state, teacher, batch, key = update.arrays()
    metrics: dict[str, Array] = {}

    def once() -> None:
        nonlocal state, metrics, key
        key = jax.random.fold_in(key, 1)
        state, metrics = program(update.update, state, teacher, batch, key)
        jax.block_until_ready((state, metrics))

    seconds = []
    for _ in range(1 + repeats):
        seconds.append(duration(once))
        losses = {name: float(value) for name, value in jax.device_get(metrics).items()}
        progress(f"{seconds[-1]:.3f} s, {losses}")
        if not all(map(math.isfinite, losses.values())):
            raise FloatingPointError(f"a loss or gradient is not finite: {losses}")
    median = float(np.median(seconds[1:]))
    return {
        "gemm_flops": gemm,
        "first_seconds": seconds[0],
        "seconds": seconds[1:],
        "median": median,
        "of_gemm": update.flops / median / (gemm * update.mesh.size),
        "peak_memory": jax_peak_bytes(),
        "losses": losses,
    }


def format_row(report: dict[str, Any]) -> str:
    """A report as a row of Markdown under its heading; what was not run is left empty."""
    memory, seconds = report["memory"], report.get("median")
    columns = {
        "devices": f"{report['devices']} x {report['device']}",
        "trained": report["trained"],
        "fsdp": report["fsdp"],
        "size": report["size"],
        "batch": report["batch"],
        "micro-batches": report["micro_batches"],
        "proxy updates": report["proxy_updates"],
        "rematerialised": "yes" if report["rematerialise"] else "no",
        "compilation s": f"{report['compile_seconds']:.1f}",
        "arguments GiB": f"{memory['arguments'] / GIB:.1f}",
        "temporaries GiB": f"{memory['temporaries'] / GIB:.1f}",
        "in all GiB": f"{memory['total'] / GIB:.1f}",
        "TFLOP": f"{report['flops'] / 1e12:.4g}",
        "update s": f"{seconds:.3f}" if seconds else "",
        "peak GiB": f"{report['peak_memory'] / GIB:.1f}" if seconds else "",
        "TFLOP/s a device": f"{report['flops'] / seconds / report['devices'] / 1e12:.4g}" if seconds else "",
        "of GEMM": f"{report['of_gemm']:.0%}" if seconds else "",
    }
    rows = (columns, ["---"] * len(columns), columns.values())
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def _memory(program: Any) -> dict[str, int]:
    """Bytes on each device, by the compiler's own count: what is passed in, what is returned in new memory, what is
    held in between, and the sum."""
    found = program.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporaries": found.temp_size_in_bytes,
    }
    return parts | {"total": sum(parts.values())}


def _placed(tree: PyTree, shardings: PyTree) -> PyTree:
    return jax.tree.map(
        lambda array, sharding: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding), tree, shardings
    )


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks.distillation",
        description="measure one update of the distillation's stage (b) with random weights",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--preset", choices=PRESETS, default="sd3.5-medium")
    parser.add_argument("--size", type=int, default=512, metavar="PIXELS")
    parser.add_argument("--batch", type=int, default=8, metavar="ROWS", help="of an update, on all devices together")
    parser.add_argument("--micro-batches", type=int, default=1, help="parts of the batch, one after another")
    parser.add_argument("--lora-rank", type=int, default=0, help="0 trains every parameter")
    parser.add_argument("--fsdp", type=int, default=1, help="over how many devices each large parameter is cut")
    parser.add_argument("--proxy-updates", type=int, default=5, help="of the proxy in one update")
    parser.add_argument("--no-rematerialise", action="store_true", help="keep all activations for the way back")
    parser.add_argument("--repeats", type=int, default=3, help="timed updates, after one to warm up")
    parser.add_argument("--compile-only", action="store_true", help="say what memory the update needs, and stop")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> None:
    """Measure what the options say, print the row, and write the file."""
    if options.repeats < 1:
        raise ValueError(f"--repeats must be positive, not {options.repeats}")
    sections: dict[str, dict[str, Any]] = {
        "teacher": {"checkpoint": ""},
        "training": {
            "prompts": "",
            "output": "",
            "batch": options.batch,
            "micro_batches": options.micro_batches,
            "rematerialise": not options.no_rematerialise,
            "height": options.size,
            "width": options.size,
        },
        "student": {"lora_rank": options.lora_rank},
        "matching": {"proxy_updates": options.proxy_updates},
        "split": {"updates": 0},
        "sharding": {"fsdp": options.fsdp},
    }
    config = make_distill_config(sections, "the update")
    to_stderr = partial(print, file=sys.stderr, flush=True)
    report = measure_update(PRESETS[options.preset], config, options.repeats, options.compile_only, to_stderr)
    print(format_row(report))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"preset": options.preset} | report, indent=1), encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    return run_command(lambda: run(options), "benchmarks.distillation")


if __name__ == "__main__":
    leave(main())
