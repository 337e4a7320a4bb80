"""Layers, attention, norms, embeddings and stacks of blocks that two or more of the models share."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, Num

from sd35flash_jax.models.streams import KEYS, QUERIES, VALUES, Norms, Projected, ResidualSum

Block = TypeVar("Block", bound=nnx.Module)


class Model(nnx.Module):
    """A whole component; `STACKS` names its attributes that are stacks of equal blocks."""

    STACKS: ClassVar[tuple[str, ...]] = ()


AnyModel = TypeVar("AnyModel", bound=Model)


def _keyed(draw: nnx.Initializer) -> nnx.Initializer:
    """An initializer that draws nothing where it is given no key, for a model of which nothing but shapes is wanted:
    tracing the draws would take two thirds of the time."""

    def initialize(key: Array | None, shape: tuple[int, ...], dtype: Any) -> Array:
        return jnp.zeros(shape, dtype) if key is None else draw(key, shape, dtype)

    return initialize


# Flax's layers with Flax's own initializers, but `_keyed`.
_kernel = _keyed(nnx.initializers.lecun_normal())
_table = _keyed(nnx.initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0))
linear = partial(nnx.Linear, kernel_init=_kernel)
conv = partial(nnx.Conv, kernel_init=_kernel)
embedding = partial(nnx.Embed, embedding_init=_table)


def attention(
    query: Float[Array, "b t n d"],
    key: Float[Array, "b s n d"],
    value: Float[Array, "b s n d"],
    *,
    bias: Float[Array, "1 n t s"] | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Float[Array, "b t c"]:
    """Softmax attention with heads merged on return; `scale` is 1/sqrt(d) unless given.

    On a CPU `_attention_by_heads` serves what has neither bias nor mask. On NVIDIA GPUs cuDNN's flash kernel serves
    bfloat16 operands without bias and with heads of up to 128; all else takes XLA's own attention.
    """
    if bias is None and not causal and jax.default_backend() == "cpu" and _for_one_device():
        return _attention_by_heads(query, key, value, query.shape[-1] ** -0.5 if scale is None else scale)
    return _library_attention(query, key, value, scale, bias, causal)


def joint_attention(streams: Sequence[Projected], heads: int, keys: int) -> list[Float[Array, "b t c"]]:
    """Attention of streams that follow one another on the token axis, of which the first `keys` rows are attended to;
    each stream gets an array of its own. Queries and keys of a stream with scales are RMS-normed by head.

    On a Hopper GPU kernels of our own serve bfloat16 operands with heads of 64.
    """
    if not _on_one_hopper():
        return _portable_joint_attention(heads, keys, streams)
    return _on_hopper(
        partial(_joint_attention, heads, keys), partial(_portable_joint_attention, heads, keys), tuple(streams)
    )


def _joint_attention(heads: int, keys: int, streams: Sequence[Projected]) -> list[Array]:
    # Imported where a kernel is traced: Pallas takes an eighth of a second, and Mosaic a fifth.
    from sd35flash_jax.models import gpu_kernels

    rows, head_size = _rows_of(streams), streams[0].qkv.shape[-1] // (3 * heads)
    aligned = sum(rows) % 8 == 0 and all(count % 64 == 0 for count in rows[:-1])
    if not aligned or head_size != 64 or streams[0].qkv.dtype != jnp.bfloat16:
        query, key, value = gpu_kernels.join_heads(heads, streams, (QUERIES, KEYS, VALUES))
        return _by_stream(_library_attention(query, key[:, :keys], value[:, :keys], None), rows)
    from sd35flash_jax.models.flash_attention import flash_attention

    [key] = gpu_kernels.join_heads(heads, streams, (KEYS,))
    mixed: list[Array] = flash_attention(key, streams, keys, jax.devices()[0].core_count)
    return mixed


def _portable_joint_attention(heads: int, keys: int, streams: Sequence[Projected]) -> list[Array]:
    join = partial(joined_heads, heads)
    query, key, value = differentiable(join, partial(_gradient, join))(streams)
    return _by_stream(attention(query, key[:, :keys], value[:, :keys]), _rows_of(streams))


def _rows_of(streams: Sequence[Projected]) -> list[int]:
    return [stream.qkv.shape[1] for stream in streams]


def _by_stream(mixed: Float[Array, "b t c"], rows: Sequence[int]) -> list[Array]:
    return jnp.split(mixed, list(accumulate(rows))[:-1], axis=1)


def _library_attention(
    query: Float[Array, "b t n d"],
    key: Float[Array, "b s n d"],
    value: Float[Array, "b s n d"],
    scale: float | None,
    bias: Float[Array, "1 n t s"] | None = None,
    causal: bool = False,
) -> Float[Array, "b t c"]:
    options: dict[str, Any] = {"bias": bias, "is_causal": causal, "scale": scale}
    xla = partial(jax.nn.dot_product_attention, implementation="xla", **options)
    cudnn = partial(jax.nn.dot_product_attention, implementation="cudnn", **options)
    if query.dtype == jnp.bfloat16 and bias is None and query.shape[-1] <= 128 and _compute_capability() >= 8:
        forward = partial(jax.lax.platform_dependent, cuda=cudnn, default=xla)
        even = partial(_with_even_tokens, cudnn)
        backward = partial(jax.lax.platform_dependent, cuda=partial(_gradient, even), default=partial(_gradient, xla))
        mixed = differentiable(forward, backward)(query, key, value)
    else:
        mixed = xla(query, key, value)
    return mixed.reshape(*mixed.shape[:2], -1)


def _with_even_tokens(attend: Callable[..., Array], query: Array, key: Array, value: Array) -> Array:
    """`attend` with a token more where their number is odd, which takes no part: JAX refuses cuDNN's gradient else."""
    if query.shape[1] % 2 == key.shape[1] % 2 == 0:
        return attend(query, key, value)
    counts = {"query_seq_lengths": query, "key_value_seq_lengths": key}
    lengths = {name: jnp.full(len(x), x.shape[1], jnp.int32) for name, x in counts.items()}
    padded = (jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0))) for x in (query, key, value))
    return attend(*padded, **lengths)[:, : query.shape[1]]


def _attention_by_heads(
    query: Float[Array, "b t n d"], key: Float[Array, "b s n d"], value: Float[Array, "b s n d"], scale: float
) -> Float[Array, "b t c"]:
    """Softmax attention of a few heads at a time, whose logits stay in a processor's cache. XLA's own transposes the
    logits of all heads in memory, which takes twice as long as the arithmetic."""
    batch, tokens, heads, size = query.shape
    by_head = tuple(x.swapaxes(1, 2).reshape(batch * heads, -1, size) for x in (query, key, value))

    def one(head: tuple[Array, Array, Array]) -> Array:
        query, key, value = head
        logits = jnp.matmul(query, key.T, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * scale)
        return weights.astype(value.dtype) @ value

    together = max(1, _LOGITS_IN_CACHE // (tokens * key.shape[1]))
    mixed = jax.lax.map(one, by_head, batch_size=min(together, batch * heads))
    return mixed.reshape(batch, heads, tokens, size).swapaxes(1, 2).reshape(batch, tokens, -1)


_LOGITS_IN_CACHE = 2**21


def _compute_capability() -> float:
    """That of the first device, if it is an NVIDIA GPU, else 0; cuDNN's flash kernel needs 8."""
    device = jax.devices()[0]
    return float(device.compute_capability) if "cuda" in device.client.platform_version.lower() else 0.0


def _for_one_device() -> bool:
    """Whether what is traced is for one device, as far as a mesh set around it says."""
    return jax.sharding.get_abstract_mesh().size <= 1


def _on_one_hopper() -> bool:
    return _compute_capability() == 9 and _for_one_device()


def _on_hopper(kernel: Callable[..., Any], portable: Callable[..., Any], *arrays: Any) -> Any:
    """What `portable` makes of the arrays: by `kernel`, one of our own that computes the same, on a Hopper GPU. A
    program for several devices takes the portable form, which XLA can divide among them. The gradient is the portable
    form's, of which nothing but the arrays is kept."""
    forward = portable
    if _on_one_hopper():
        forward = partial(jax.lax.platform_dependent, cuda=kernel, default=portable)
    return differentiable(forward, partial(_gradient, portable))(*arrays)


def differentiable(forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
    """A function of arrays with a gradient of its own: `backward` takes the arrays and the cotangents. JAX would
    differentiate both sides of a `platform_dependent`, and keep what either needs."""
    with_gradient = jax.custom_vjp(forward)
    with_gradient.defvjp(
        lambda *arrays: (forward(*arrays), arrays), lambda arrays, cotangents: backward(*arrays, cotangents)
    )
    return with_gradient


def _gradient(function: Callable[..., Any], *arrays_and_cotangents: Any) -> Any:
    *arrays, cotangents = arrays_and_cotangents
    return jax.vjp(function, *arrays)[1](cotangents)


def split_heads(qkv: Float[Array, "b t c3"], heads: int) -> tuple[Array, Array, Array]:
    """Cut a fused projection into query, key and value of `(batch, tokens, heads, head_size)` each."""
    batch, tokens, width = qkv.shape
    query, key, value = jnp.split(qkv.reshape(batch, tokens, 3 * heads, width // (3 * heads)), 3, axis=2)
    return query, key, value


def joined_heads(heads: int, streams: Sequence[Projected]) -> tuple[Array, Array, Array]:
    """The streams' normed queries, normed keys and values in heads, `(batch, tokens, heads, head_size)`, the streams
    one after another on the token axis."""
    queries, keys, values = [], [], []
    for qkv, scales in streams:
        query, key, value = split_heads(qkv, heads)
        queries.append(rms_norm(query, scales[0]) if scales else query)
        keys.append(rms_norm(key, scales[1]) if scales else key)
        values.append(value)
    return jnp.concatenate(queries, axis=1), jnp.concatenate(keys, axis=1), jnp.concatenate(values, axis=1)


def embed(table: nnx.Embed, ids: Int[Array, "..."]) -> Float[Array, "... c"]:
    """Rows of a table, in the dtype of its parameters; `nnx.Embed`, called itself, keeps the one it was built in."""
    return differentiable(_rows, _summed_by_row)(table.embedding[...], ids)


def _rows(table: Float[Array, "v c"], ids: Int[Array, "..."]) -> Float[Array, "... c"]:
    return jnp.take(table, ids, axis=0)


def _summed_by_row(
    table: Float[Array, "v c"], ids: Int[Array, "..."], cotangents: Float[Array, "... c"]
) -> tuple[Float[Array, "v c"], None]:
    """The gradient of `_rows` as a matrix product, summed in float32. As a scatter in bfloat16, what thousands of equal
    ids (of padding) add to one row is lost in rounding, and on a GPU they wait for one another."""
    chosen = jax.nn.one_hot(ids, len(table), dtype=cotangents.dtype)
    total = jnp.einsum("...v,...c->vc", chosen, cotangents, preferred_element_type=jnp.float32)
    return total.astype(table.dtype), None


def rms_norm(x: Float[Array, "... c"], scale: Float[Array, " c"]) -> Float[Array, "... c"]:
    """RMS norm over the last axis in float32, rounded to the dtype of `x` once."""
    wide = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.square(wide).mean(axis=-1, keepdims=True) + 1e-6)
    return (wide * (inverse * scale.astype(jnp.float32))).astype(x.dtype)


def add_and_norm(
    sums: Sequence[ResidualSum], norms: Sequence[Norms]
) -> list[tuple[Float[Array, "b t c"], list[Float[Array, "b t c"]]]]:
    """Each stream's sum, and the sum's norms; both are taken in float32 and rounded to the dtype of `x`.

    On a Hopper GPU a kernel of our own does it in one pass.
    """
    return _on_hopper(_add_and_norm, _portable_add_and_norm, tuple(sums), tuple(norms))


def _add_and_norm(sums: Sequence[ResidualSum], norms: Sequence[Norms]) -> list[tuple[Array, list[Array]]]:
    from sd35flash_jax.models import gpu_kernels

    return gpu_kernels.add_and_norm(sums, norms)


def _portable_add_and_norm(sums: Sequence[ResidualSum], norms: Sequence[Norms]) -> list[tuple[Array, list[Array]]]:
    def one(terms: ResidualSum, own: Norms) -> tuple[Array, list[Array]]:
        batch, _, size = terms.x.shape

        def vector(vectors: Any, index: int) -> Float[Array, "b 1 c"]:
            own_rows = vectors.of(batch)[:, None]
            return own_rows[..., index * size : (index + 1) * size].astype(jnp.float32)

        total = terms.x.astype(jnp.float32)
        for gate, update in zip(terms.gates, terms.updates):
            total = total + vector(terms.vectors, gate) * update
        x = total.astype(terms.x.dtype)
        norms = [(vector(own.vectors, shift), vector(own.vectors, scale)) for shift, scale in own.places]
        return x, [adaptive_layer_norm(x, shift, scale) for shift, scale in norms]

    return [one(terms, own) for terms, own in zip(sums, norms)]


def adaptive_layer_norm(
    x: Float[Array, "b t c"], shift: Float[Array, "b 1 c"], scale: Float[Array, "b 1 c"]
) -> Float[Array, "b t c"]:
    """Layer norm with shift and scale from the conditioning, in float32, rounded to the dtype of `x` once."""
    wide = x.astype(jnp.float32)
    centred = wide - wide.mean(axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + 1e-6)
    return (normed * (1 + scale.astype(jnp.float32)) + shift).astype(x.dtype)


def sinusoidal_embedding(timestep: Num[Array, " b"], size: int, max_period: float = 10_000.0) -> Float[Array, "b c"]:
    """Sinusoids of a timestep in [0, 1000], cosines first, in float32: `(batch, size)`."""
    half = size // 2
    frequencies = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = timestep.astype(jnp.float32)[:, None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


# Stacks of equal blocks. A stack is one module whose parameters have a leading layer axis; where it is worth its longer
# compilation, a list of modules takes its place (`unstacked`).


def stack_blocks(make: Callable[[nnx.Rngs], Block], count: int, rngs: nnx.Rngs) -> Block:
    """Build `count` equal blocks as a stack; without a key if `rngs` has none."""
    key = rngs.params()
    keys = None if key is None else jax.random.split(key, count)
    return jax.vmap(lambda key: make(type(rngs)(key)), axis_size=count)(keys)


def unstacked(module: AnyModel) -> AnyModel:
    """The module with each of its `STACKS` as a list of blocks. A loop over a stack copies every layer's parameters out
    of it before they are used, which takes an eighth of the time at batch 1 on a GPU, and more on a CPU."""
    module = jax.tree.map(lambda array: array, module)
    for name in module.STACKS:
        blocks = getattr(module, name)
        if blocks is not None and not isinstance(blocks, nnx.List):
            arrays, structure = jax.tree.flatten(blocks)
            layers = zip(*(_layers(array) for array in arrays))
            setattr(module, name, nnx.List([jax.tree.unflatten(structure, layer) for layer in layers]))
    return module


def _layers(array: Any) -> Iterable[Any]:
    if isinstance(array, jax.ShapeDtypeStruct):
        return [jax.ShapeDtypeStruct(array.shape[1:], array.dtype)] * len(array)
    return [array[index] for index in range(len(array))]


def map_blocks(blocks: nnx.Module, apply: Callable[[Any], Any]) -> Any:
    """What `apply` makes of each block: stacked for a stack, a list for a list."""
    return [apply(block) for block in blocks] if isinstance(blocks, nnx.List) else jax.lax.map(apply, blocks)


def scan_blocks(blocks: nnx.Module, carry: Any, apply: Callable[..., Any], *each: Any) -> Any:
    """Run blocks in order, `carry = apply(block, carry, *own)`, each with its own share of `each` (made by
    `map_blocks`). A stack is compiled once, whatever its number of blocks."""
    if isinstance(blocks, nnx.List):
        apply = jax.jit(apply)  # Traced once for all that are alike.
        for block, *own in zip(blocks, *each):
            carry = apply(block, carry, *own)
        return carry
    return jax.lax.scan(lambda carry, layer: (apply(layer[0], carry, *layer[1:]), None), carry, (blocks, *each))[0]
