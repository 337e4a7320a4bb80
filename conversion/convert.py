"""The converter: reads a source's headers, checks that a table accounts for every tensor and every parameter, and
streams the tensors one by one into a checkpoint."""

import math
import os
import shutil
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from conversion.lora import LayerUpdates, open_loras, updated
from conversion.rules import Rule, Table
from conversion.safetensors_file import Tensor
from conversion.sources import Part, Source, find_tokenizers, open_component, open_source, sha256
from sd35flash_jax.checkpoint import DTYPES, StreamedArray, parameter_shapes, refuse_existing, save_checkpoint
from sd35flash_jax.config import COMPONENTS, TEXT_ENCODERS, ModelConfig

Shape = tuple[int, ...]
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_TESTED_AT_ONCE = 2**16


class ConversionError(ValueError):
    """The source cannot be converted; the message names every tensor or field at fault."""


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    dtype: str | None = None,
    progress: bool = False,
    *,
    components: Mapping[str, str | os.PathLike] | None = None,
    tokenizers: str | os.PathLike | None = None,
    loras: Sequence[tuple[str | os.PathLike, float]] = (),
) -> ModelConfig:
    """Convert a diffusers folder or Stability's single safetensors files into a checkpoint directory.

    Every source tensor is used exactly once and every parameter filled exactly once. Peak memory is a few times the
    largest tensor, whatever the size of the model.

    Args:
        source: a diffusers folder, or a single file, of Stable Diffusion 3 or 3.5, with any of its components.
        destination: the checkpoint directory to make; it must not exist.
        dtype: "bfloat16" or "float32" for the stored weights; as in the source unless given, and bfloat16 for fp8.
        progress: show a bar on standard error.
        components: where to take a component from in place of `source`, by its name in `config.COMPONENTS`: a file, a
            component's diffusers folder, or the folder or file of a whole model.
        tokenizers: a folder that holds the tokenizers as a diffusers folder or a checkpoint's `tokenizers` does; that
            of `source` unless given.
        loras: LoRA files to merge into the weights, each with its scale.

    Returns:
        The configuration of the new checkpoint.

    Raises:
        ConversionError: the source is of no known layout, is damaged, or does not match its configuration.
        FileExistsError: `destination` exists.
        OSError: the disk is full or not writable. Nothing is left behind after any error.

    Warns:
        UserWarning: a single file has shapes of no published model, or a text encoder comes without a tokenizer.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    refuse_existing(Path(destination).expanduser())
    overrides = {name: Path(path).expanduser() for name, path in (components or {}).items()}
    try:
        main = open_source(Path(source).expanduser(), without=set(overrides))
        others = {name: open_component(path, name) for name, path in overrides.items()}
        parts = main.parts | {name: other.parts[name] for name, other in others.items()}
        parts = {name: parts[name] for name in COMPONENTS if name in parts}
        config = ModelConfig(**{name: part.config for name, part in parts.items()}, schedule=main.schedule)
        ModelConfig.from_json(config.to_json())  # refuses components that do not fit each other
        found = find_tokenizers(Path(tokenizers).expanduser(), config.components) if tokenizers else main.tokenizers
        updates = open_loras(loras, config)
        plans = {
            name: _plan(name, config, part, np.dtype(dtype) if dtype else None, updates.get(name, {}))
            for name, part in parts.items()
        }
    except ConversionError:
        raise
    except (ValueError, OSError) as error:
        raise ConversionError(str(error)) from error
    mute = [name for name in config.components if name in TEXT_ENCODERS and name not in found]
    if mute:
        warnings.warn(
            f"the checkpoint has no tokenizer for {' and '.join(mute)}, so it cannot encode prompts; name a folder "
            "that holds tokenizers with --tokenizers",
            stacklevel=2,
        )
    total = sum(_bytes(array) for plan in plans.values() for array in plan.values())
    check_space(Path(destination).expanduser(), total)

    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=not progress) as bar,
        ThreadPoolExecutor(1) as hasher,
    ):
        stop = threading.Event()

        def unless_stopped(_: int) -> None:
            if stop.is_set():
                raise CancelledError

        # Component by component, as they are converted: what one thread has read, the other finds in memory.
        files = dict.fromkeys(tensor.file for part in parts.values() for tensor in part.tensors.values())
        hashes = {file: hasher.submit(sha256, file, unless_stopped) for file in files}
        arrays = {
            name: {param: _with_progress(array, bar) for param, array in plan.items()} for name, plan in plans.items()
        }

        def describe_one(opened: Source) -> dict[str, Any]:
            digests = {name: hashes[file].result() for name, file in opened.files.items()}
            return {"layout": opened.layout, "name": opened.path.resolve().name, "sha256": digests}

        def describe() -> dict[str, Any]:
            elsewhere = {name: describe_one(other) for name, other in others.items()}
            merged = [{"name": Path(path).resolve().name, "scale": scale} for path, scale in loras]
            described = describe_one(main) | ({"components": elsewhere} if elsewhere else {})
            return described | ({"loras": merged} if merged else {})

        try:
            save_checkpoint(
                destination, config, arrays, {name: found[name] for name in found if name in parts}, describe
            )
        except BaseException:
            stop.set()
            raise
    return config


def _plan(
    name: str, config: ModelConfig, part: Part, dtype: np.dtype | None, updates: Mapping[str, LayerUpdates]
) -> dict[str, StreamedArray]:
    """Match the table against both sides, and return every parameter ready to be streamed."""
    table = part.table
    shapes = parameter_shapes(name, config)
    tensors = _with_optional(_canonical(part.tensors, table), table, shapes)
    faults = check_table(table, {key: tensor.shape for key, tensor in tensors.items()}, shapes)
    if faults:
        raise ConversionError(f"{name} does not match its configuration: " + "; ".join(faults))
    rules: dict[str, list[Rule]] = {}
    for rule in table.rules:
        rules.setdefault(rule.param, []).append(rule)
    return {param: _streamed(shapes[param], rules[param], tensors, dtype, updates.get(param, {})) for param in shapes}


def _canonical(tensors: dict[str, Tensor], table: Table) -> dict[str, Tensor]:
    """Give aliased tensors their first name and drop the ignored ones."""
    kept = {key: tensor for key, tensor in tensors.items() if key not in table.ignored}
    for alias, key in table.aliases.items():
        if alias in kept:
            repeated = kept.pop(alias)
            original = kept.setdefault(key, repeated)
            if original.shape != repeated.shape or not np.array_equal(original.read(), repeated.read()):
                raise ConversionError(f"{alias} should repeat {key}, but differs from it")
    return kept


@dataclass(frozen=True)
class _Constant:
    """What an optional tensor stands for where a file leaves it out."""

    array: np.ndarray
    is_fp8 = False

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def shape(self) -> Shape:
        return self.array.shape

    def read(self) -> np.ndarray:
        return self.array


def _with_optional(
    tensors: dict[str, Tensor], table: Table, param_shapes: Mapping[str, Shape]
) -> dict[str, Tensor | _Constant]:
    """The tensors with those added that may be missing and are."""
    missing = set(table.optional) - set(tensors)
    dtype = min(map(_kept_dtype, tensors.values()), key=lambda dtype: dtype.itemsize, default=None)
    constants = {
        key: _Constant(table.optional[key](shape).astype(dtype))
        for rule in table.rules
        for key, shape in zip(rule.sources, _source_shapes(rule, param_shapes[rule.param]))
        if key in missing
    }
    return tensors | constants


def check_table(table: Table, source_shapes: Mapping[str, Shape], param_shapes: Mapping[str, Shape]) -> list[str]:
    """What keeps a table from using every source tensor exactly once and filling every parameter exactly once, all
    faults at once; empty if nothing does."""
    used = Counter(key for rule in table.rules for key in rule.sources)
    filled = Counter((rule.param, rule.layer) for rule in table.rules)
    stacked = {rule.param for rule in table.rules if rule.layer is not None}
    slots = {
        (param, layer)
        for param, shape in param_shapes.items()
        for layer in (range(shape[0]) if param in stacked else [None])
    }
    expected = {
        key: shape
        for rule in table.rules
        if (rule.param, rule.layer) in slots
        for key, shape in zip(rule.sources, _source_shapes(rule, param_shapes[rule.param]))
    }
    wrong = [
        f"{key} (shape {source_shapes[key]}, expected {shape})"
        for key, shape in expected.items()
        if key in source_shapes and source_shapes[key] != shape
    ]
    kinds = {
        "missing tensors": sorted(set(used) - set(source_shapes)),
        "surplus tensors": sorted(set(source_shapes) - set(used)),
        "wrong shapes": wrong,
        "tensors used twice": sorted(key for key, count in used.items() if count > 1),
        "parameters filled twice": sorted(str(slot) for slot, count in filled.items() if count > 1),
        "parameters not filled": sorted(map(str, slots - set(filled))),
        "rules without a parameter": sorted(map(str, set(filled) - slots)),
    }
    return [f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names]


def _source_shapes(rule: Rule, param_shape: Shape) -> list[Shape]:
    shape = param_shape if rule.layer is None else param_shape[1:]
    return list(rule.transform.source_shapes(shape, len(rule.sources)))


def _kept_dtype(tensor: Tensor | _Constant) -> np.dtype:
    """The dtype to store a tensor in: its own, but bfloat16, which holds every fp8 value, for fp8."""
    return BFLOAT16 if tensor.is_fp8 else tensor.dtype


def _streamed(
    shape: Shape,
    rules: list[Rule],
    tensors: dict[str, Tensor | _Constant],
    dtype: np.dtype | None,
    updates: LayerUpdates,
) -> StreamedArray:
    stored = {_kept_dtype(tensors[key]) for rule in rules for key in rule.sources}
    target = dtype or (stored.pop() if len(stored) == 1 else np.dtype(np.float32))

    def pieces() -> Iterator[tuple[Any, np.ndarray]]:
        for rule in rules:
            changed = rule.layer in updates
            sources = [
                tensors[key].read().astype(np.float32 if changed else target, copy=False) for key in rule.sources
            ]
            piece = np.ascontiguousarray(rule.transform.forward(sources))
            if changed:
                piece = updated(piece, updates[rule.layer]).astype(target)
            if not is_finite(piece):
                at_fault = [key for key in rule.sources if not is_finite(tensors[key].read().astype(target))]
                at_fault = at_fault or [f"{key} with its LoRA" for key in rule.sources]
                raise ConversionError(f"{' and '.join(at_fault)} holds NaN or infinite weights; download it again")
            yield (... if rule.layer is None else rule.layer), piece

    return StreamedArray(shape, target, pieces)


def is_finite(array: np.ndarray) -> bool:
    flat = array.reshape(-1)
    blocks = (flat[start : start + _TESTED_AT_ONCE] for start in range(0, flat.size, _TESTED_AT_ONCE))
    return all(map(_is_finite, blocks))  # a block and what is computed of it stay in the processor's cache


def _is_finite(block: np.ndarray) -> bool:
    if block.dtype == BFLOAT16:
        # NumPy's own test is slow for bfloat16; an exponent of all ones marks NaN and infinity.
        return bool((block.view(np.uint16) & 0x7F80).max() < 0x7F80)
    return bool(np.isfinite(block).all())


def _with_progress(array: StreamedArray, bar: tqdm) -> StreamedArray:
    def pieces() -> Iterator[tuple[Any, np.ndarray]]:
        for index, piece in array.pieces():
            yield index, piece
            bar.update(piece.nbytes)

    return StreamedArray(array.shape, array.dtype, pieces)


def _bytes(array: StreamedArray) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def check_space(destination: Path, needed: int) -> None:
    folder = destination.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free, but {needed / 1e9:.1f} GB are needed")
