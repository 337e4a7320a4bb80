"""Arithmetic of one update of stage (b), counted from the recipe: how often each network is evaluated for a row."""

from dataclasses import dataclass, replace

from benchmarks.flops import transformer_flops
from sd35flash_jax.config import MMDiTConfig
from sd35flash_jax.distill.config import MatchingConfig
from sd35flash_jax.distill.stages import head_depths

BACKWARD = 2
"""A way back in evaluations: as much for the parameters' gradients as for the activations'."""
BACKWARD_OF_INPUTS = 1
"""A way back through parameters that are constants."""


@dataclass(frozen=True)
class Passes:
    """Evaluations of each network for one row in one update, ways back included. `features` are evaluations of the
    proxy as far as its deepest head."""

    student: float
    proxy: float
    teacher: float
    features: float


def matching_passes(config: MatchingConfig, steps: int) -> Passes:
    """What an update of stage (b) asks for, for a student of so many steps; on average over the step it draws.

    Each of the `proxy_updates`: the student's whole trajectory, the proxy there and back; for the adversary, the
    student's step once more for the point that is compared, and the features of that and of a real sample.

    The student's own: on average `(steps - 1) / 2` steps to where it starts, one step there and back, the teacher's two
    guided halves, the proxy; for the adversary, the features of where it arrives, there and back to the inputs.
    """
    adversary = int(config.adversarial_weight > 0)
    halves = 1 if config.guidance == 1 else 2
    return Passes(
        student=config.proxy_updates * (steps + adversary) + (steps - 1) / 2 + 1 + BACKWARD,
        proxy=config.proxy_updates * (1 + BACKWARD) + 1,
        teacher=halves if config.guidance_term == "joint" else 2 + halves,
        features=adversary * (2 * config.proxy_updates + 1 + BACKWARD_OF_INPUTS),
    )


def matching_flops(
    model: MMDiTConfig, config: MatchingConfig, steps: int, rows: int, latent_side: int, text_tokens: int
) -> float:
    """One update of stage (b) with so many rows of square latents. Left out: what rematerialisation computes again, the
    heads, and the sums that merge LoRAs."""
    passes, deepest = matching_passes(config, steps), max(head_depths(model.depth))
    below = replace(model, depth=deepest, dual_attention_blocks=min(deepest, model.dual_attention_blocks))
    whole, part = (transformer_flops(each, latent_side, latent_side, text_tokens) for each in (model, below))
    return rows * ((passes.student + passes.proxy + passes.teacher) * whole + passes.features * part)
