import jax
import pytest
from flax import nnx

from sd35flash_jax.models.layers import conv, embedding, linear


@pytest.mark.parametrize(
    ("ours", "flax", "sizes"),
    [(linear, nnx.Linear, (3, 4)), (conv, nnx.Conv, (3, 4, (3, 3))), (embedding, nnx.Embed, (5, 4))],
)
def test_a_layer_begins_with_the_weights_that_flax_gives_it(ours, flax, sizes):
    mine, expected = (jax.tree.leaves(layer(*sizes, rngs=nnx.Rngs(0))) for layer in (ours, flax))
    assert [array.tolist() for array in mine] == [array.tolist() for array in expected]
