"""The way back: a checkpoint directory to a diffusers folder or one of Stability's single files, read and written
piece by piece."""

import json
import math
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from conversion import diffusers_layout, single_file_layout
from conversion.convert import ConversionError, check_space, is_finite
from conversion.rules import Rule, Shape, Table
from conversion.safetensors_file import write_safetensors
from sd35flash_jax.checkpoint import DTYPES, StoredArray, open_stored, read_config, tokenizer_folders, written_whole
from sd35flash_jax.config import ModelConfig, ScheduleConfig, T5Config
from sd35flash_jax.schedule import unshifted

LAYOUTS = ("diffusers", "single-file")
SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Piece:
    """One rule turned around: the stored array that it reads and the tensors that it writes, with all their names."""

    rule: Rule
    store: StoredArray
    dtype: np.dtype
    names: tuple[tuple[str, ...], ...]

    @property
    def shapes(self) -> Iterable[Shape]:
        shape = self.store.shape if self.rule.layer is None else self.store.shape[1:]
        return self.rule.transform.source_shapes(shape, len(self.rule.sources))

    @property
    def tensors(self) -> dict[str, tuple[np.dtype, Shape]]:
        return {name: (self.dtype, shape) for names, shape in zip(self.names, self.shapes) for name in names}

    @property
    def bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for dtype, shape in self.tensors.values())

    def read(self) -> Iterator[np.ndarray]:
        array = self.store.read(self.dtype, self.rule.layer)
        if not is_finite(array):
            raise ConversionError(f"{self.rule.param} holds weights that are NaN or infinite in {self.dtype.name}")
        for names, tensor in zip(self.names, self.rule.transform.backward(array, len(self.rule.sources))):
            yield from [tensor] * len(names)


def export(
    checkpoint: str | os.PathLike,
    destination: str | os.PathLike,
    layout: str = "diffusers",
    dtype: str | None = None,
    progress: bool = False,
) -> None:
    """Write a checkpoint as a diffusers folder that `StableDiffusion3Pipeline.from_pretrained` loads, or as a single
    file under Stability's names, which holds no tokenizers.

    Every tensor is bit for bit what was converted, if neither way changed its dtype. Peak memory is a few times the
    largest parameter, or its largest layer where it is stacked.

    Args:
        checkpoint: a checkpoint directory.
        destination: the folder or file to make; it must not exist.
        layout: "diffusers" or "single-file".
        dtype: "bfloat16" or "float32" for the weights; as stored unless given, and float32 for int8.
        progress: show a bar on standard error.

    Raises:
        CheckpointError: the checkpoint is missing or damaged.
        ConversionError: an option is not supported, or a weight is not finite.
        FileExistsError: `destination` exists.
        OSError: the disk is full or not writable. Nothing is left behind after any error.

    Warns:
        UserWarning: the layout has no place for something that the checkpoint says.
    """
    if layout not in LAYOUTS:
        raise ConversionError(f"layout {layout!r} is not supported; choose one of {', '.join(LAYOUTS)}")
    if dtype is not None and dtype not in DTYPES:
        raise ConversionError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    source, target = Path(checkpoint), Path(destination)
    config = read_config(source)
    tables = diffusers_layout.TABLES if layout == "diffusers" else single_file_layout.TABLES
    plans = {
        name: _plan(tables[name](getattr(config, name)), open_stored(source, name, config), dtype)
        for name in config.components
    }
    for sigmas in config.schedule.sigmas:
        given = ", ".join(f"{sigma:.6g}" for sigma in unshifted(sigmas, config.schedule.shift))
        warnings.warn(
            f"neither layout can hold the checkpoint's own schedule of {len(sigmas)} steps: give diffusers' pipeline, "
            f"which shifts what it is given, sigmas=[{given}]",
            stacklevel=2,
        )
    if config.t5 is not None and config.t5_tokens != T5Config.max_tokens:
        warnings.warn(
            f"this model's T5 reads {config.t5_tokens} tokens: give diffusers' pipeline max_sequence_length="
            f"{config.t5_tokens}",
            stacklevel=2,
        )
    total = sum(piece.bytes for plan in plans.values() for piece in plan)
    check_space(target, total)
    if layout == "single-file":
        _warn_of_unsaid(config, plans)
    with (
        written_whole(target) as path,
        tqdm(total=total, unit="B", unit_scale=True, desc="exporting", disable=not progress) as bar,
    ):
        if layout == "diffusers":
            _write_folder(path, config, plans, tokenizer_folders(source, config.components), bar)
        else:
            prefixes = single_file_layout.PREFIXES
            _write(path, [(prefixes[name], piece) for name, plan in plans.items() for piece in plan], bar)


def _plan(table: Table, stored: Mapping[str, StoredArray], dtype: str | None) -> list[Piece]:
    repeats = {key: alias for alias, key in table.aliases.items() if alias in table.repeated}
    pieces = []
    for rule in table.rules:
        store = stored[rule.param]
        names = tuple((key, repeats[key]) if key in repeats else (key,) for key in rule.sources)
        pieces.append(Piece(rule, store, np.dtype(dtype or store.dtype), names))
    return pieces


def _write(file: Path, pieces: Iterable[tuple[str, Piece]], bar: tqdm) -> None:
    """Write tensors under their names with the given prefixes."""
    # Wide dtypes first: readers need every tensor aligned to its dtype.
    ordered = sorted(pieces, key=lambda item: -item[1].dtype.itemsize)
    tensors = {prefix + name: entry for prefix, piece in ordered for name, entry in piece.tensors.items()}

    def arrays() -> Iterator[np.ndarray]:
        for _, piece in ordered:
            yield from piece.read()
            bar.update(piece.bytes)

    write_safetensors(file, tensors, arrays())


# The diffusers folder


def _write_folder(
    folder: Path, config: ModelConfig, plans: Mapping[str, list[Piece]], tokenizers: Mapping[str, Path], bar: tqdm
) -> None:
    folder.mkdir()
    _write_json(folder / "model_index.json", diffusers_layout.write_model_index(plans, tokenizers))
    (folder / "scheduler").mkdir()
    schedule = diffusers_layout.write_schedule_config(config.schedule)
    _write_json(folder / "scheduler" / "scheduler_config.json", schedule)
    for name, tokenizer in tokenizers.items():
        copied = shutil.copytree(tokenizer, folder / diffusers_layout.TOKENIZER_FOLDERS[name])
        if name == "clip_g" and not (copied / "tokenizer_config.json").exists():
            # Without it the tokenizer would pad as CLIP-L's does.
            _write_json(copied / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", "pad_token": "!"})
    for name, plan in plans.items():
        sub = folder / diffusers_layout.FOLDERS[name]
        sub.mkdir()
        _write_json(sub / "config.json", diffusers_layout.WRITERS[name](getattr(config, name)))
        _write_shards(sub, diffusers_layout.STEMS[name], plan, bar)


def _write_shards(folder: Path, stem: str, plan: list[Piece], bar: tqdm) -> None:
    shards: list[list[Piece]] = [[]]
    for piece in plan:
        if shards[-1] and sum(other.bytes for other in shards[-1]) + piece.bytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(piece)
    if len(shards) == 1:
        _write(folder / f"{stem}.safetensors", [("", piece) for piece in plan], bar)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        _write(folder / name, [("", piece) for piece in shard], bar)
        weight_map |= {key: name for piece in shard for key in piece.tensors}
    index = {"metadata": {"total_size": sum(piece.bytes for piece in plan)}, "weight_map": weight_map}
    _write_json(folder / f"{stem}.safetensors.index.json", index)


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


# The single file


def _warn_of_unsaid(config: ModelConfig, plans: Mapping[str, list[Piece]]) -> None:
    """Warn of fields that a reader of the shapes alone would take for others."""
    unsaid = ["schedule.shift"] if config.schedule.shift != ScheduleConfig().shift else []
    for name, plan in plans.items():
        shapes = {key: shape for piece in plan for key, (_, shape) in piece.tensors.items()}
        component = getattr(config, name)
        read = getattr(ModelConfig.from_json({name: single_file_layout.CONFIGS[name](shapes)}), name)
        # The coordinates of the position table are in the table, which the file holds.
        differing = [key for key, value in vars(component).items() if value != getattr(read, key)]
        unsaid += [f"{name}.{key}" for key in differing if key != "position_base"]
    if unsaid:
        warnings.warn(
            f"a single file cannot say {', '.join(unsaid)}: its readers take the values of the published models",
            stacklevel=3,
        )
