"""The converter: reads a source's headers, checks that a table accounts for every tensor and every parameter, and
streams the tensors one by one into a checkpoint."""

import hashlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tqdm import tqdm

from conversion import diffusers_layout as layout
from conversion.rules import Rule, Table
from conversion.safetensors_file import Tensor, find_weights, open_all
from sd35flash_jax.checkpoint import DTYPES, StreamedArray, abstract_component, parameters, save_checkpoint
from sd35flash_jax.config import ModelConfig, read_json

Shape = tuple[int, ...]


class ConversionError(ValueError):
    """The source cannot be converted; the message names every tensor or field at fault."""


@dataclass(frozen=True)
class Source:
    """A diffusers folder with its headers read: the tensors and weight files of each component."""

    folder: Path
    config: ModelConfig
    tensors: dict[str, dict[str, Tensor]]
    files: list[Path]
    tokenizers: dict[str, Path]


def convert(
    source: str | os.PathLike, destination: str | os.PathLike, dtype: str | None = None, progress: bool = False
) -> ModelConfig:
    """Convert a diffusers folder into a checkpoint directory.

    Every source tensor is used exactly once and every parameter filled exactly once. Peak memory is a few times the
    largest tensor, whatever the size of the model.

    Args:
        source: a diffusers folder of Stable Diffusion 3 or 3.5, with any of its components.
        destination: the checkpoint directory to make; it must not exist.
        dtype: "bfloat16" or "float32" for the stored weights; as in the source unless given.
        progress: show a bar on standard error.

    Returns:
        The configuration of the new checkpoint.

    Raises:
        ConversionError: the source is not such a folder, is damaged, or does not match its configuration.
        FileExistsError: `destination` exists.
        OSError: the disk is full or not writable. Nothing is left behind after any error.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    try:
        opened = open_diffusers_folder(Path(source))
        plans = {
            name: _plan(name, opened.config, tensors, np.dtype(dtype) if dtype else None)
            for name, tensors in opened.tensors.items()
        }
    except ConversionError:
        raise
    except (ValueError, OSError) as error:
        raise ConversionError(str(error)) from error
    arrays = [array for plan in plans.values() for array in plan.values()]
    total = sum(_bytes(array) for array in arrays)
    _check_space(Path(destination), total)

    with (
        tqdm(total=total, unit="B", unit_scale=True, desc="converting", disable=not progress) as bar,
        ThreadPoolExecutor(1) as hasher,
    ):
        hashes = {file: hasher.submit(_sha256, file) for file in opened.files}
        components = {
            name: {param: _with_progress(array, bar) for param, array in plan.items()} for name, plan in plans.items()
        }

        def describe() -> dict[str, Any]:
            files = {file.relative_to(opened.folder).as_posix(): future.result() for file, future in hashes.items()}
            return {"layout": "diffusers", "name": opened.folder.resolve().name, "sha256": files}

        try:
            save_checkpoint(destination, opened.config, components, opened.tokenizers, describe)
        except BaseException:
            hasher.shutdown(wait=False, cancel_futures=True)
            raise
    return opened.config


def open_diffusers_folder(folder: Path) -> Source:
    """Read the configurations and tensor headers of every component that is there.

    Raises:
        ValueError: the folder does not exist, holds no component, or one of its files is damaged or not supported.
    """
    if not folder.is_dir():
        raise ConversionError(f"{folder} is not a folder; give the diffusers folder that holds transformer/, vae/, ...")
    present = {name: folder / sub for name, sub in layout.FOLDERS.items() if (folder / sub).is_dir()}
    if not present:
        raise ConversionError(
            f"{folder} holds none of {', '.join(f'{sub}/' for sub in layout.FOLDERS.values())}; "
            "give the folder of a diffusers Stable Diffusion 3 or 3.5 pipeline"
        )
    fields = {name: layout.CONFIGS[name](_json_object(sub / "config.json")) for name, sub in present.items()}
    scheduler = folder / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        fields["schedule"] = layout.schedule_config(_json_object(scheduler))
    config = ModelConfig.from_json(fields)

    files = {
        name: find_weights(sub, "model" if name in layout.TOKENIZER_FOLDERS else "diffusion_pytorch_model")
        for name, sub in present.items()
    }
    tokenizers = {name: folder / sub for name, sub in layout.TOKENIZER_FOLDERS.items() if (folder / sub).is_dir()}
    return Source(
        folder,
        config,
        {name: open_all(found) for name, found in files.items()},
        [file for found in files.values() for file in found],
        {name: tokenizer for name, tokenizer in tokenizers.items() if name in present},
    )


def _json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ConversionError(f"{path} is not a JSON object; download it again")
    return content


def _plan(
    name: str, config: ModelConfig, tensors: dict[str, Tensor], dtype: np.dtype | None
) -> dict[str, StreamedArray]:
    """Match the table against both sides, and return every parameter ready to be streamed."""
    table = layout.TABLES[name](getattr(config, name))
    shapes = {param: tuple(array.shape) for param, array in parameters(abstract_component(name, config)).items()}
    tensors = _canonical(tensors, table)
    faults = check_table(table, {key: tensor.shape for key, tensor in tensors.items()}, shapes)
    if faults:
        raise ConversionError(f"{name} does not match its configuration: " + "; ".join(faults))
    rules: dict[str, list[Rule]] = {}
    for rule in table.rules:
        rules.setdefault(rule.param, []).append(rule)
    return {param: _streamed(shapes[param], rules[param], tensors, dtype) for param in shapes}


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


def check_table(table: Table, source_shapes: dict[str, Shape], param_shapes: dict[str, Shape]) -> list[str]:
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


def _streamed(shape: Shape, rules: list[Rule], tensors: dict[str, Tensor], dtype: np.dtype | None) -> StreamedArray:
    stored = {tensors[key].dtype for rule in rules for key in rule.sources}
    target = dtype or (stored.pop() if len(stored) == 1 else np.dtype(np.float32))

    def pieces() -> Iterator[tuple[Any, np.ndarray]]:
        for rule in rules:
            piece = rule.transform.forward([tensors[key].read() for key in rule.sources])
            piece = np.ascontiguousarray(piece).astype(target, copy=False)
            if not _is_finite(piece):
                at_fault = [key for key in rule.sources if not _is_finite(tensors[key].read().astype(target))]
                raise ConversionError(f"{' and '.join(at_fault)} holds NaN or infinite weights; download it again")
            yield (... if rule.layer is None else rule.layer), piece

    return StreamedArray(shape, target, pieces)


def _is_finite(array: np.ndarray) -> bool:
    if array.dtype == ml_dtypes.bfloat16:
        # NumPy's own test is slow for bfloat16; an exponent of all ones marks NaN and infinity.
        return not ((array.view(np.uint16) & 0x7F80) == 0x7F80).any()
    return bool(np.isfinite(array).all())


def _with_progress(array: StreamedArray, bar: tqdm) -> StreamedArray:
    def pieces() -> Iterator[tuple[Any, np.ndarray]]:
        for index, piece in array.pieces():
            yield index, piece
            bar.update(piece.nbytes)

    return StreamedArray(array.shape, array.dtype, pieces)


def _bytes(array: StreamedArray) -> int:
    return math.prod(array.shape) * array.dtype.itemsize


def _check_space(destination: Path, needed: int) -> None:
    folder = destination.absolute().parent
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder} has {free / 1e9:.1f} GB free, but the checkpoint needs {needed / 1e9:.1f} GB")


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
