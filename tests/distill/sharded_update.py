"""A program for several devices: an update on a mesh of 2 x 2 and on one device, and what came of it, as JSON."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding

from sd35flash_jax.distill.adversarial import init_heads
from sd35flash_jax.distill.mmdit import mmdit_networks
from sd35flash_jax.distill.updates import Batch, Optimizers, State, TrajectoryUpdate, begin
from sd35flash_jax.sharding import ROWS, make_mesh, parameter_shardings, replicated, row_sharding
from sd35flash_jax.text import Conditioning
from tests.tiny_model import CONFIG, random_parameters

assert CONFIG.transformer is not None
MODEL = replace(CONFIG, transformer=replace(CONFIG.transformer, depth=2, dual_attention_blocks=1))
SECOND_MOMENT = optax.rmsprop(1e-2, decay=0.999, eps=1e-3, eps_in_sqrt=False, bias_correction=True)
OPTIMIZERS = Optimizers(*[optax.chain(optax.clip_by_global_norm(1.0), SECOND_MOMENT)] * 3)
QUICK = {"xla_backend_optimization_level": 0}
"""These programs run once: their compilation is what takes long."""
UPDATE = TrajectoryUpdate(mmdit_networks(MODEL, False, (1,)), OPTIMIZERS, (1.0, 0.5, 0.0), 0.9)


def updated(mesh: Mesh) -> tuple[State, float]:
    """The state after an update, and the FLOPs of one device."""
    teacher = {path: jnp.array(array) for path, array in random_parameters("transformer", 0, MODEL).items()}
    student = {path: array for path, array in teacher.items() if path != "position_table"}
    heads = init_heads(jax.random.key(0), 1, 64, 8)
    state = State(
        begin(student, OPTIMIZERS.student), student, begin(student, OPTIMIZERS.proxy), begin(heads, OPTIMIZERS.heads)
    )
    draw = np.random.default_rng(0)
    text = Conditioning(draw.standard_normal((2, 4, 10, 96), np.float32), draw.standard_normal((2, 4, 80), np.float32))
    trajectories = draw.standard_normal((2, 3, 4, 8, 8, 16), np.float32)
    shardings = parameter_shardings(mesh, state)
    # Copied: the arrays of the state are given away, and two of its trees may not share one.
    state = jax.device_put(jax.tree.map(jnp.copy, state), shardings)
    teacher = jax.device_put(teacher, parameter_shardings(mesh, teacher))
    batch = Batch(*jax.device_put((text, text, text), row_sharding(mesh, 1)), None)
    batch = replace(batch, real=jax.device_put(trajectories, row_sharding(mesh, 2)))
    with jax.set_mesh(mesh):
        program = jax.jit(UPDATE, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))
        compiled = program.lower(state, teacher, batch, jax.random.key(1)).compile(compiler_options=QUICK)
        after, _ = compiled(state, teacher, batch, jax.random.key(1))
    return after, compiled.cost_analysis()["flops"]


def described(path: tuple, array: jax.Array) -> dict:
    assert isinstance(array.sharding, NamedSharding)
    return {
        "path": jax.tree_util.keystr(path),
        "spec": list(array.sharding.spec),
        "size": array.size,
        "on_device": array.addressable_shards[0].data.size,
    }


if __name__ == "__main__":
    alone = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ROWS, axis_types=(AxisType.Auto, AxisType.Auto))
    (one, flops), (four, flops_of_four) = updated(alone), updated(make_mesh(2))
    differences = jax.tree.map(lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), one, four)
    moved = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), one.student.params, one.proxy.params
    )
    print(
        json.dumps(
            {
                "difference": max(jax.tree.leaves(differences)),
                "moved": max(jax.tree.leaves(moved)),
                "flops": flops_of_four / flops,
                "arrays": [described(*leaf) for leaf in jax.tree_util.tree_leaves_with_path(four)],
            }
        )
    )
