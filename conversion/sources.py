"""What can be converted: a diffusers folder, or Stability's files, opened as configurations and named tensors."""

import hashlib
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from conversion import diffusers_layout, single_file_layout
from conversion.rules import Table
from conversion.safetensors_file import Tensor, find_weights, open_all, open_safetensors
from sd35flash_jax.config import COMPONENTS, PRESETS, TEXT_ENCODERS, ModelConfig, ScheduleConfig, read_json


@dataclass(frozen=True)
class Part:
    """One component of a source: its configuration, its layout's table and its tensors."""

    config: Any
    table: Table
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """A folder or file with its headers read; `schedule` and `tokenizers` are what stands beside its components."""

    path: Path
    layout: str
    parts: dict[str, Part]
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    tokenizers: dict[str, Path] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, Path]:
        """The weight files by their names within the source."""
        files = sorted({tensor.file for part in self.parts.values() for tensor in part.tensors.values()})
        return {file.relative_to(self.path).as_posix() if file != self.path else file.name: file for file in files}


def open_source(path: Path, without: Collection[str] = ()) -> Source:
    """Read the configurations and tensor headers of a whole folder or file, but for the components in `without`.

    Raises:
        ValueError: there is nothing, of no known layout, or one of its files is damaged or not supported.
    """
    if path.is_file():
        opened = open_single_file(path)
        return replace(opened, parts={name: part for name, part in opened.parts.items() if name not in without})
    if not path.is_dir():
        raise ValueError(
            f"{path} is not a folder or file; give a diffusers folder, which holds transformer/, vae/, ..., or a "
            "safetensors file"
        )
    folders = {name: path / sub for name, sub in diffusers_layout.FOLDERS.items() if (path / sub).is_dir()}
    if not folders:
        raise ValueError(
            f"{path} holds none of {', '.join(f'{sub}/' for sub in diffusers_layout.FOLDERS.values())}; "
            "give the folder of a diffusers Stable Diffusion 3 or 3.5 pipeline, or a single safetensors file"
        )
    schedule = {}
    scheduler = path / "scheduler" / "scheduler_config.json"
    if scheduler.exists():
        schedule = {"schedule": diffusers_layout.schedule_config(_json_object(scheduler))}
    return Source(
        path,
        "diffusers",
        _open_folders({name: folder for name, folder in folders.items() if name not in without}),
        ModelConfig.from_json(schedule).schedule,
        {name: path / sub for name, sub in diffusers_layout.TOKENIZER_FOLDERS.items() if (path / sub).is_dir()},
    )


def open_component(path: Path, name: str) -> Source:
    """Read one component of a file, of a whole folder, or of its own folder.

    Raises:
        ValueError: it is not there, or as `open_source`.
    """
    if name not in COMPONENTS:
        raise ValueError(f"there is no component {name!r}; choose from {', '.join(COMPONENTS)}")
    if path.is_file():
        opened = open_single_file(path, name)
    elif (path / "config.json").is_file():
        opened = Source(path, "diffusers", _open_folders({name: path}))
    else:
        opened = open_source(path, without=set(COMPONENTS) - {name})
    if name not in opened.parts:
        held = f": it holds {', '.join(opened.parts)}" if opened.parts else ""
        raise ValueError(f"{path} holds no {name}{held}")
    return replace(opened, parts={name: opened.parts[name]})


def _open_folders(folders: dict[str, Path]) -> dict[str, Part]:
    fields = {
        name: diffusers_layout.CONFIGS[name](_json_object(folder / "config.json")) for name, folder in folders.items()
    }
    config = ModelConfig.from_json(fields)
    return {
        name: Part(
            getattr(config, name),
            diffusers_layout.TABLES[name](getattr(config, name)),
            open_all(find_weights(folder, diffusers_layout.STEMS[name])),
        )
        for name, folder in folders.items()
    }


def open_single_file(file: Path, wanted: str | None = None) -> Source:
    """Read the headers of a file in Stability's layout and infer the configurations of its components.

    Raises:
        ValueError: the file is damaged, or not in that layout.
    """
    parts = {}
    for name, tensors in single_file_layout.split_components(file, open_safetensors(file), wanted).items():
        try:
            fields = single_file_layout.CONFIGS[name]({key: tensor.shape for key, tensor in tensors.items()})
        except KeyError as error:
            raise ValueError(f"the {name} in {file} is not whole; missing tensors: {error.args[0]}") from None
        except (ValueError, IndexError, ZeroDivisionError):
            raise ValueError(f"the {name} in {file} has tensors of shapes that no such model has") from None
        config = getattr(ModelConfig.from_json({name: fields}), name)
        if config not in [getattr(preset, name) for preset in PRESETS.values()]:
            warnings.warn(
                f"the {name} in {file} has the shape of no published model; what shapes do not say, such as sizes of "
                "heads and groups, is taken from those",
                stacklevel=3,
            )
        parts[name] = Part(config, single_file_layout.TABLES[name](config), tensors)
    return Source(file, "single-file", parts)


def find_tokenizers(folder: Path, components: Collection[str]) -> dict[str, Path]:
    """The tokenizers' folders of the text encoders among `components`.

    Raises:
        ValueError: one is not there.
    """
    found = {}
    for name in TEXT_ENCODERS:
        if name in components:
            subs = (diffusers_layout.TOKENIZER_FOLDERS[name], name)
            there = [folder / sub for sub in subs if (folder / sub).is_dir()]
            if not there:
                raise ValueError(f"{folder} holds no tokenizer for {name}, neither {subs[0]}/ nor {subs[1]}/")
            found[name] = there[0]
    return found


_HASHED_AT_ONCE = 2**20


def sha256(file: Path, after_block: Callable[[int], object]) -> str:
    """The SHA-256 of a file; `after_block` is called with the length of each block that has been read."""
    digest = hashlib.sha256()
    block = memoryview(bytearray(_HASHED_AT_ONCE))
    with open(file, "rb", buffering=0) as stream:
        while length := stream.readinto(block):
            digest.update(block[:length])
            after_block(length)
    return digest.hexdigest()


def _json_object(path: Path) -> dict[str, Any]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a JSON object; download it again")
    return content
