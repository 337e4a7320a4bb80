"""What a checkpoint or an unconverted source holds: components, tensors, memory, origin."""

import dataclasses
import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from conversion.sources import open_source, sha256
from sd35flash_jax.checkpoint import DTYPES, open_stored, read_config, read_origin
from sd35flash_jax.config import PRESETS, ModelConfig


def describe(path: str | os.PathLike, progress: bool = False) -> dict[str, Any]:
    """Describe a checkpoint directory, a diffusers folder or one of Stability's single files, as a JSON value.

    The files of an unconverted source are read once, for their SHA-256; a checkpoint carries those of its source.

    Raises:
        ValueError: there is nothing at `path` that can be read, or it is damaged.
    """
    folder = Path(path).expanduser()
    if (folder / "config.json").is_file():
        config = read_config(folder)
        tensors = {
            name: {
                key: (array.values.dtype.name, array.shape) for key, array in open_stored(folder, name, config).items()
            }
            for name in config.components
        }
        origin = read_origin(folder)
        kind = "checkpoint"
    else:
        source = open_source(folder)
        config = ModelConfig(**{name: part.config for name, part in source.parts.items()}, schedule=source.schedule)
        tensors = {
            name: {key: (tensor.dtype.name, tensor.shape) for key, tensor in part.tensors.items()}
            for name, part in source.parts.items()
        }
        origin = {"sha256": _hashes(source.files, progress)}
        kind = source.layout
    return {
        "path": str(folder),
        "kind": kind,
        "model": _published_name(config),
        "components": {name: _describe_component(config, name, held) for name, held in tensors.items()},
        "schedule": dataclasses.asdict(config.schedule),
        "source": origin,
    }


def format_description(description: dict[str, Any], with_tensors: bool = False) -> str:
    """The description as text; with every tensor's name, dtype and shape if asked for."""
    lines = [f"{description['path']}: {description['kind']}, {description['model'] or 'no published model'}", ""]
    lines += ["| component | parameters | stored as | bfloat16 | float32 | |", "| --- | --- | --- | --- | --- | --- |"]
    for name, component in description["components"].items():
        sizes = " | ".join(f"{component['bytes'][dtype] / 1e9:.2f} GB" for dtype in DTYPES)
        shape = ", ".join(f"{key} {value}" for key, value in component["config"].items() if key in _TELLING)
        stored = ", ".join(component["dtypes"])
        lines.append(f"| {name} | {component['parameters']:,} | {stored} | {sizes} | {shape} |")
    lines += ["", f"schedule: {description['schedule']}", *_origin_lines(description["source"])]
    if with_tensors:
        for name, component in description["components"].items():
            lines += ["", f"{name}:"]
            lines += [f"  {key}  {dtype} {list(shape)}" for key, (dtype, shape) in component["tensors"].items()]
    return "\n".join(lines)


_TELLING = ("depth", "layers", "heads", "hidden_size", "channels", "qk_norm", "dual_attention_blocks", "vocabulary")


def _describe_component(
    config: ModelConfig, name: str, tensors: dict[str, tuple[str, tuple[int, ...]]]
) -> dict[str, Any]:
    parameters = sum(math.prod(shape) for _, shape in tensors.values())
    return {
        "parameters": parameters,
        "dtypes": dict(Counter(dtype for dtype, _ in tensors.values())),
        "bytes": {dtype: parameters * np.dtype(dtype).itemsize for dtype in DTYPES},
        "config": dataclasses.asdict(getattr(config, name)),
        "tensors": tensors,
    }


def _published_name(config: ModelConfig) -> str | None:
    """The published models whose transformer this is."""
    names = [name for name, preset in PRESETS.items() if preset.transformer == config.transformer]
    return " or ".join(names) or None


def _origin_lines(origin: Any) -> list[str]:
    if not isinstance(origin, dict) or "sha256" not in origin:
        return [f"source: {origin}"]
    lines = [f"source: {', '.join(str(origin[key]) for key in ('name', 'layout') if key in origin) or 'these files'}"]
    return lines + [f"  {digest}  {file}" for file, digest in origin["sha256"].items()]


def _hashes(files: dict[str, Path], progress: bool) -> dict[str, str]:
    total = sum(file.stat().st_size for file in files.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="hashing", disable=not progress) as bar:
        return {name: sha256(file, bar.update) for name, file in files.items()}
