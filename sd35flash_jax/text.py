"""prompts -> tokens -> Conditioning: the three tokenizers and encoders, joined as SD3 joins them."""

import contextlib
import hashlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jaxtyping import Array, Float, Int

from sd35flash_jax.compilation import GPU_SIDE_BY_SIDE, gpu_options, keep, kept_path, read_kept
from sd35flash_jax.config import CLIPConfig, ModelConfig
from sd35flash_jax.frozen import Frozen
from sd35flash_jax.kept_programs import kept

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


@partial(jax.tree_util.register_dataclass, data_fields=["context", "pooled"], meta_fields=[])
@dataclass(frozen=True)
class Conditioning:
    """What the transformer knows of a prompt: `context` `(batch, tokens, 4096)` and `pooled` `(batch, 2048)`."""

    context: Float[Array, "b t c"]
    pooled: Float[Array, "b p"]


with contextlib.suppress(ValueError):  # Registered already, where this module is loaded again.
    export.register_pytree_node_serialization(
        Conditioning,
        serialized_name="sd35flash_jax.Conditioning",
        serialize_auxdata=lambda _: b"",
        deserialize_auxdata=lambda _: (),
    )


def read_prompts(path: Path) -> list[str]:
    """One prompt a line; empty lines are skipped.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or has no prompt.
    """
    try:
        lines = [line.strip() for line in path.expanduser().read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise ValueError(
            f"the prompt list {path} cannot be read ({error.strerror}); write a file of one prompt a line"
        ) from None
    except UnicodeDecodeError:
        raise ValueError(f"the prompt list {path} is not UTF-8 text; save it as such") from None
    prompts = [line for line in lines if line]
    if not prompts:
        raise ValueError(f"the prompt list {path} has no prompt; write one prompt a line")
    return prompts


def load_tokenizer(encoder: str, folder: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a text encoder, from `vocab.json` and `merges.txt`, `spiece.model` or `tokenizer.json`.

    Raises:
        ValueError: the folder holds no such files, or damaged ones.
    """
    from transformers import CLIPTokenizer, T5Tokenizer

    options: dict[str, Any] = {}
    if encoder == "clip_g" and not (folder / "tokenizer_config.json").exists():
        # Without a configuration CLIP's own padding, the end-of-text token, would be used; OpenCLIP pads with "!".
        options["pad_token"] = "!"
    kind = T5Tokenizer if encoder == "t5" else CLIPTokenizer
    stored = ("tokenizer.json", "spiece.model" if encoder == "t5" else "vocab.json")
    if not any((folder / name).is_file() for name in stored):
        raise ValueError(f"{folder} holds no tokenizer ({' or '.join(stored)})")
    try:
        return kind.from_pretrained(folder, local_files_only=True, **options)
    except Exception as error:  # the tokenizer libraries raise many kinds for a damaged file
        raise ValueError(f"the tokenizer in {folder} cannot be read: {error}") from error


def load_prompt_tokenizer(encoder: str, folder: Path) -> "Tokenizer":
    """The tokenizer of a text encoder as far as prompts need it: that of the `tokenizers` library, with the encoder's
    padding. It is kept between processes, because transformers, which makes it, takes most of a second to import.

    Raises:
        ValueError: as `load_tokenizer`, or the tokenizer has no token to pad with.
    """
    from tokenizers import Tokenizer

    files = sorted(file for file in folder.glob("*") if file.is_file())
    digests = [(file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files]
    path = kept_path("tokenizers", encoder, digests)
    content = None if path is None else read_kept(path)
    if content is not None:
        return Tokenizer.from_str(content.decode())
    whole = load_tokenizer(encoder, folder)
    if whole.pad_token_id is None:
        raise ValueError(f"the tokenizer in {folder} names no token to pad with")
    tokenizer: Tokenizer = whole.backend_tokenizer
    tokenizer.enable_padding(pad_id=whole.pad_token_id, pad_token=whole.pad_token)
    if path is not None:
        keep(path, tokenizer.to_str().encode())
    return tokenizer


def token_counts(config: ModelConfig, t5_tokens: int) -> dict[str, int]:
    """How many tokens each encoder reads; both CLIPs read, or stand for, the same number."""
    clip_tokens = (config.clip_l or config.clip_g or CLIPConfig).positions
    return {"clip_l": clip_tokens, "clip_g": clip_tokens, "t5": t5_tokens}


def tokenize(
    tokenizers: Mapping[str, "Tokenizer"], prompts: Sequence[str], counts: Mapping[str, int]
) -> dict[str, Int[np.ndarray, "b t"]]:
    """Token ids of each encoder, `(batch, count)` int32, cut and padded to its count.

    Warns where an encoder does not see the end of a prompt.

    Raises:
        ValueError: a prompt is not text.
    """
    for prompt in prompts:
        if not isinstance(prompt, str) or prompt.encode("utf-8", "replace").decode() != prompt:
            raise ValueError(f"a prompt must be text that UTF-8 can hold, not {prompt!r}")
    tokens = {}
    for encoder, tokenizer in tokenizers.items():
        count, padding = counts[encoder], tokenizer.padding or {}
        tokenizer.no_truncation()
        lengths = [sum(encoding.attention_mask) for encoding in tokenizer.encode_batch(list(prompts))]
        for prompt, length in zip(prompts, lengths):
            if length > count:
                warnings.warn(
                    f"{encoder} reads {count} tokens and does not see the end of a prompt of {length}: {prompt[:60]}",
                    stacklevel=2,
                )
        tokenizer.enable_truncation(count)
        tokenizer.enable_padding(**(padding | {"length": count}))
        tokens[encoder] = np.asarray([encoding.ids for encoding in tokenizer.encode_batch(list(prompts))], np.int32)
    return tokens


@partial(jax.jit, static_argnames=("config", "t5_tokens"), compiler_options=gpu_options(GPU_SIDE_BY_SIDE))
@kept
def encode_tokens(
    encoders: dict[str, Frozen],
    tokens: dict[str, Int[Array, "b t"]],
    *,
    config: ModelConfig,
    t5_tokens: int,
) -> Conditioning:
    """Run the encoders and join their states (SD3 paper, section 4 and figure 2a).

    Penultimate states of CLIP-L and CLIP-G side by side, zero-padded to the context's width, then T5's states after
    them on the token axis; pooled states side by side. An encoder that is not in `encoders` gives zeros, as in the
    encoder dropout that SD3 was trained with.
    """
    assert config.transformer is not None
    batch = next(iter(tokens.values())).shape[0]
    dtype = jax.tree.leaves(encoders)[0].dtype
    clip_tokens = token_counts(config, t5_tokens)["clip_l"]
    states, pooled = [], []
    for name, width in clip_widths(config).items():
        if name in encoders:
            state, pool = encoders[name].module(tokens[name])
        else:
            state, pool = jnp.zeros((batch, clip_tokens, width), dtype), jnp.zeros((batch, width), dtype)
        states.append(state)
        pooled.append(pool)
    clip_context = jnp.concatenate(states, axis=-1)
    padding = config.transformer.context_size - clip_context.shape[-1]
    clip_context = jnp.pad(clip_context, ((0, 0), (0, 0), (0, padding)))
    if "t5" in encoders:
        t5_context = encoders["t5"].module(tokens["t5"])
    else:
        t5_context = jnp.zeros((batch, t5_tokens, config.transformer.context_size), dtype)
    return Conditioning(jnp.concatenate([clip_context, t5_context], axis=1), jnp.concatenate(pooled, axis=-1))


def clip_widths(config: ModelConfig) -> dict[str, int]:
    """Widths of the two CLIP encoders' states; an encoder the model lacks takes what the other leaves of `pooled`."""
    assert config.transformer is not None
    total = config.transformer.pooled_size
    if config.clip_l is not None:
        left = config.clip_l.projection_size
    else:
        left = total - config.clip_g.projection_size if config.clip_g else total
    return {"clip_l": left, "clip_g": total - left}
