"""Checkpoints on disk: one directory with the configuration, an Orbax tree for each component, and the tokenizers.

    config.json      format version, model configuration, where the weights came from, every file's size
    transformer/     Orbax: one zarr array a parameter, stacked parameters in one chunk a layer; int8 ones have a second
                     array with their scales
    vae/  clip_l/  clip_g/  t5/
    tokenizers/clip_l/  tokenizers/clip_g/  tokenizers/t5/

A checkpoint appears under its name only when it is whole, and its files' sizes are checked when it is opened, because
zarr reads a missing chunk as zeros.
"""

import contextlib
import errno
import itertools
import json
import math
import mmap
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import tensorstore as ts
from flax import nnx
from tqdm import tqdm

from sd35flash_jax.config import COMPONENTS, ModelConfig, read_json
from sd35flash_jax.models.clip import CLIPTextEncoder
from sd35flash_jax.models.layers import Model, unstacked
from sd35flash_jax.models.mmdit import MMDiT
from sd35flash_jax.models.t5 import T5Encoder
from sd35flash_jax.models.vae import VAE
from sd35flash_jax.quantize import dequantize, quantize

BUNDLED = Path(__file__).parent / "flash_mini"
"""The checkpoint that the package carries."""
FORMAT = 1
DTYPES = ("bfloat16", "float32")
_MODULES: dict[str, type[Any]] = {
    "transformer": MMDiT,
    "vae": VAE,
    "clip_l": CLIPTextEncoder,
    "clip_g": CLIPTextEncoder,
    "t5": T5Encoder,
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
)
_SCALES = ".int8_scales"  # Ends the name of the array that holds an int8 parameter's scales.

AnyModule = TypeVar("AnyModule", bound=nnx.Module)


class CheckpointError(ValueError):
    """A checkpoint is missing, damaged, or not what was asked for."""


@dataclass(frozen=True)
class StreamedArray:
    """A parameter that is written piece by piece, so that it never stands in memory whole.

    `pieces` yields each index along the leading axis with its array, or `...` with the whole array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[tuple[Any, np.ndarray]]]

    def whole(self) -> np.ndarray:
        """All of it in memory after all."""
        array = np.empty(self.shape, self.dtype)
        for index, piece in self.pieces():
            array[index] = piece
        return array


@dataclass(frozen=True)
class StoredArray:
    """A parameter on the disk, to be read whole or in part: a zarr array, its folder and, where it is int8, the float32
    scales that broadcast against it."""

    values: ts.TensorStore
    folder: Path
    scales: np.ndarray | None = None

    # All that TensorStore is asked about an array is asked once, and not again for each layer.
    @cached_property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @cached_property
    def dtype(self) -> np.dtype:
        """That of the weights: float32 where they are stored as int8."""
        return np.dtype(self.values.dtype.numpy_dtype if self.scales is None else np.float32)

    def read(self, dtype: np.dtype, layer: int | None = None, index: tuple[slice, ...] = ()) -> np.ndarray:
        """The weights, or the part at `index`, of a layer or of all, cast. Unless they are stored as int8, they come in
        a buffer that JAX takes over on a CPU without a copy."""
        region: tuple[Any, ...] = index if layer is None else (layer, *index)
        values = self.values[region]
        if self.scales is not None:
            scales = np.broadcast_to(self.scales, self.shape)[region]
            return dequantize(values.read().result(), scales).astype(dtype, copy=False)
        buffer = np.empty(math.prod(values.shape) * dtype.itemsize + _CPU_ALIGNMENT, np.uint8)
        start = -buffer.ctypes.data % _CPU_ALIGNMENT
        weights = buffer[start : start + buffer.size - _CPU_ALIGNMENT].view(dtype).reshape(values.shape)
        ts.array(weights).write(ts.cast(values, ts.dtype(dtype))).result()
        return weights

    def mapped(self, layer: int | None = None) -> np.ndarray | None:
        """The weights of a layer or of all as they lie in their file, mapped into memory and not copied; none where
        they are not all in one file, or not as they are."""
        shape = self.shape if layer is None else (1, *self.shape[1:])
        if shape != self._plain_chunk:
            return None
        key = ".".join(["0" if layer is None else str(layer), *["0"] * (len(shape) - 1)])
        # Of all ways, the one with the fewest calls of the system: each may lose Python's lock to another thread.
        descriptor = os.open(f"{self.folder}/{key}", os.O_RDONLY)
        try:
            whole = np.frombuffer(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ), self.dtype)
        finally:
            os.close(descriptor)
        return whole.reshape(shape if layer is None else shape[1:])

    @cached_property
    def _plain_chunk(self) -> tuple[int, ...] | None:
        """The shape of what is in one file; none where that is not the weights as they are in memory."""
        stored = self.values.spec().to_json()["metadata"]
        is_plain = stored["compressor"] is None and stored["order"] == "C" and not stored["dtype"].startswith(">")
        return tuple(stored["chunks"]) if is_plain and self.scales is None else None


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` returns: the components that were asked for, and the tokenizers' folders by encoder."""

    config: ModelConfig
    components: dict[str, nnx.Module]
    tokenizers: dict[str, Path]


def build_component(name: str, config: ModelConfig, seed: int = 0) -> Model:
    """A component with fresh random float32 parameters."""
    return _MODULES[name](getattr(config, name), rngs=nnx.Rngs(seed))


def abstract_component(name: str, config: ModelConfig, stacked: bool = True) -> Model:
    """The component with shapes in place of parameters; nothing is allocated. Its blocks are stacks or lists."""
    module = jax.eval_shape(lambda: _MODULES[name](getattr(config, name), rngs=_NoKeys()))
    return module if stacked else unstacked(module)


@dataclass(frozen=True)
class _NoKeys:
    """In place of `nnx.Rngs` where nothing but shapes is wanted."""

    key: None = None

    def params(self) -> None:
        return self.key


def runs_stacked(platform: str) -> bool:
    """Whether a pipeline runs blocks as stacks on a platform; training does everywhere, for their fast compilation."""
    return platform not in ("cpu", "gpu")


def parameters(module: nnx.Module, kind: type[nnx.Variable] = nnx.Variable) -> dict[str, Any]:
    """Every array of a module, or those of a kind, by dotted path; the layers of a stack share one array."""
    return {_dotted(path): variable.get_value() for path, variable in nnx.to_flat_state(nnx.state(module, kind))}


@lru_cache(maxsize=len(COMPONENTS))
def parameter_shapes(name: str, config: ModelConfig) -> Mapping[str, tuple[int, ...]]:
    """The shape of every stored array of a component by its dotted path."""
    return {path: tuple(array.shape) for path, array in parameters(abstract_component(name, config)).items()}


def with_parameters(module: AnyModule, arrays: Mapping[str, Any]) -> AnyModule:
    """The module with other arrays at some of its dotted paths; the rest is shared."""
    leaves, structure = _leaves(module)
    return jax.tree.unflatten(structure, [arrays.get(path, leaf) for path, leaf in leaves])


def _leaves(module: nnx.Module) -> tuple[list[tuple[str, Any]], jax.tree_util.PyTreeDef]:
    """Every array of a module by dotted path, in a tenth of the time that NNX's own functions take, and what
    `jax.tree.unflatten` makes the module of again."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(module)
    # Less the variable's own part of the path.
    return [(jax.tree_util.keystr(path[:-1], simple=True, separator="."), leaf) for path, leaf in leaves], structure


def own_path(module: nnx.Module, param: str, layer: int | None) -> tuple[str, int | None]:
    """Where a module has a layer of a stacked parameter: in its stack, or as a parameter of its own in a list."""
    stack, _, rest = param.partition(".")
    if layer is not None and isinstance(getattr(module, stack), nnx.List):
        return f"{stack}.{layer}.{rest}", None
    return param, layer


def _stored_path(module: Any, path: str) -> tuple[str, int | None]:
    """The way back: the parameter that a path of a module is stored in, and its layer if it has one of its own."""
    stack, _, rest = path.partition(".")
    if stack in module.STACKS and isinstance(getattr(module, stack), nnx.List):
        layer, _, rest = rest.partition(".")
        return f"{stack}.{rest}", int(layer)
    return path, None


def _dotted(path: Sequence[Any]) -> str:
    return ".".join(map(str, path))


# Writing


def save_checkpoint(
    path: str | os.PathLike,
    config: ModelConfig,
    components: Mapping[str, nnx.Module | Mapping[str, Any]],
    tokenizers: Mapping[str, Path] | None = None,
    source: Any = None,
    int8: bool = False,
) -> None:
    """Write a checkpoint directory, whole or not at all.

    Args:
        path: the new directory; it must not exist.
        config: the configuration; its components are those of `components`.
        components: each component as a module, or as its parameters (arrays or `StreamedArray`s) by dotted path.
        tokenizers: the folder of each text encoder's tokenizer files, to be copied.
        source: a JSON value that says where the weights came from, or a function called for it after the weights are
            written.
        int8: store every parameter of two axes or more, a stack's own not counted, as int8 with float32 scales, in a
            quarter of float32's space; the others are stored as given.

    Raises:
        FileExistsError: `path` exists.
        ValueError: `components` are not those of `config`, or a weight to be stored as int8 is NaN or infinite.
        OSError: the disk is full or not writable. Nothing is left behind.
    """
    destination = Path(path).expanduser()
    if set(components) != set(config.components):
        raise ValueError(f"the configuration has {config.components}, but the components are {tuple(components)}")
    # Imported where it writes: what reads weights needs no more than TensorStore, and starts sooner.
    from sd35flash_jax.orbax_writer import write_arrays

    with written_whole(destination) as folder:
        folder.mkdir()
        for name, tokenizer in (tokenizers or {}).items():
            _copy_tokenizer(tokenizer, folder / "tokenizers" / name)
        for name, component in components.items():
            arrays = _stored_arrays(component) if isinstance(component, nnx.Module) else dict(component)
            if int8:
                arrays = _quantized(name, arrays)
            write_arrays(folder / name, arrays, destination.name)
        header = {
            "format": FORMAT,
            "model": config.to_json(),
            "source": source() if callable(source) else source,
            "files": _file_sizes(folder),
        }
        (folder / "config.json").write_text(json.dumps(header, indent=1), encoding="utf-8")


def _stored_arrays(module: nnx.Module) -> dict[str, Any]:
    """A module's parameters as they are stored, stacks of layers as one."""
    arrays: dict[str, Any] = {}
    layers: dict[str, dict[int, jax.Array]] = {}
    for path, array in _leaves(module)[0]:
        param, layer = _stored_path(module, path)
        if layer is None:
            arrays[param] = array
        else:
            layers.setdefault(param, {})[layer] = array
    return arrays | {
        param: StreamedArray((len(own), *own[0].shape), np.dtype(own[0].dtype), partial(_pieces, own))
        for param, own in layers.items()
    }


def _quantized(component: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    stored: dict[str, Any] = {}
    for param, array in arrays.items():
        shared = _shared_axes(component, param, len(array.shape))
        if shared:
            whole = array.whole() if isinstance(array, StreamedArray) else np.asarray(array)
            stored[param], stored[param + _SCALES] = quantize(whole, shared, f"{component}.{param}")
        else:
            stored[param] = array
    return stored


def _shared_axes(component: str, param: str, ndim: int) -> tuple[int, ...]:
    """The axes along which the values of an int8 parameter share a scale; none if it is not to be stored as int8.

    Each layer of a stack and each output channel, a kernel's last axis, has scales of its own. An embedding table has
    one for each row in their place: rows are read one at a time, and those of rare and of frequent tokens differ in
    size, so that a scale for a whole column would be too coarse for most of them.
    """
    first = int(param.split(".")[0] in _MODULES[component].STACKS)
    if ndim - first < 2:
        return ()
    own = ndim - 2 if param.endswith(".embedding") else ndim - 1
    return tuple(axis for axis in range(first, ndim) if axis != own)


def _pieces(layers: Mapping[int, jax.Array]) -> Iterator[tuple[Any, np.ndarray]]:
    return ((index, np.asarray(layer)) for index, layer in layers.items())


@contextlib.contextmanager
def written_whole(destination: Path) -> Iterator[Path]:
    """A path beside `destination`, for a file or folder to be made, that takes its name at the end or vanishes."""
    refuse_existing(destination)
    made = [parent for parent in destination.absolute().parents if not parent.exists()]
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial_path = destination.parent / f".{destination.name}.partial-{secrets.token_hex(4)}"
    try:
        yield partial_path
        refuse_existing(destination)
        partial_path.rename(destination)
    except BaseException as error:
        _remove(partial_path)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if getattr(error, "errno", None) == errno.ENOSPC or "RESOURCE_EXHAUSTED" in str(error):  # TensorStore's name
            raise OSError(f"{destination.absolute().parent} has no space left for {destination.name}") from error
        raise


_SETTLED = 5
"""Looks, a tenth of a second apart, at which a removed path has to be away."""


def _remove(path: Path) -> None:
    """Remove a file or folder until it has been away for half a second: threads that wrote to it when an interrupt came
    go on with what they had begun, and TensorStore makes anew the folder of a file that it writes."""
    away = 0 if path.exists() else _SETTLED
    for _ in range(60):
        if away == _SETTLED:
            return
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
        time.sleep(0.1)
        away = 0 if path.exists() else away + 1


def refuse_existing(destination: Path) -> None:
    """Raises FileExistsError if anything is at `destination`."""
    if destination.exists() or destination.is_symlink():
        raise FileExistsError(f"{destination} already exists; remove it or choose another destination")


def _copy_tokenizer(source: Path, destination: Path) -> None:
    """Copy the files that a tokenizer is read from; a downloaded folder may hold, or link to, anything else."""
    destination.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        file = source / name
        if file.is_symlink() and not file.exists():
            raise ValueError(f"{file} is a link to a file that is not there; download it again")
        if file.is_file():
            shutil.copyfile(file, destination / name)


def _file_sizes(folder: Path) -> dict[str, int]:
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): file.stat().st_size for file in files}


# Reading


def bundled_checkpoint() -> Path:
    """The checkpoint in this package.

    Raises:
        CheckpointError: this installation has none.
    """
    if not BUNDLED.is_dir():
        raise CheckpointError(
            "no model is bundled with this installation of sd35flash-jax, so a checkpoint must be named: download the "
            "diffusers folder of Stable Diffusion 3.5, convert it with `sd35flash-jax convert FOLDER CHECKPOINT`, and "
            "give CHECKPOINT"
        )
    return BUNDLED


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The configuration of a checkpoint directory.

    Raises:
        CheckpointError: there is no checkpoint at `path`, or it is damaged or of another format version.
    """
    folder = Path(path).expanduser()
    try:
        return ModelConfig.from_json(_read_header(folder)["model"])
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'} is damaged: {error}") from None


def read_origin(path: str | os.PathLike) -> Any:
    """Where a checkpoint's weights came from, as `save_checkpoint` was told.

    Raises:
        CheckpointError: as `read_config`.
    """
    return _read_header(Path(path).expanduser()).get("source")


def load_checkpoint(
    path: str | os.PathLike,
    components: Sequence[str] | None = None,
    dtype: str = "bfloat16",
    device: jax.Device | jax.sharding.Sharding | None = None,
    progress: bool = False,
    stacked: bool = True,
) -> Checkpoint:
    """Restore components of a checkpoint, each parameter straight to its dtype and device.

    Args:
        path: a directory written by `save_checkpoint` or the converter.
        components: names out of `config.COMPONENTS`; all that the checkpoint has unless given.
        dtype: "bfloat16" or "float32", for parameters and arithmetic.
        device: the device or sharding for every parameter; JAX's default device unless given.
        progress: show a bar on standard error.
        stacked: equal blocks as stacks, which compile fast, or as lists, which run faster on a GPU or CPU.

    Raises:
        CheckpointError: no checkpoint is there, a file is missing or truncated, or a component was asked for that
            the checkpoint does not have; the message says which.
        ValueError: `dtype` is not one of the two.
    """
    return read_weights(path, open_checkpoint(path, components, dtype, device, stacked), progress)


def open_checkpoint(
    path: str | os.PathLike,
    components: Sequence[str] | None = None,
    dtype: str = "bfloat16",
    device: jax.Device | jax.sharding.Sharding | None = None,
    stacked: bool | None = True,
) -> Checkpoint:
    """What `load_checkpoint` returns, with a `ShapeDtypeStruct` in place of each parameter: programs can be compiled
    for it while `read_weights` brings the weights. With None for `stacked` blocks are as `runs_stacked` says."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported; choose one of {', '.join(DTYPES)}")
    folder = Path(path).expanduser()
    config = read_config(folder)
    wanted = config.components if components is None else tuple(components)
    absent = [name for name in wanted if name not in config.components]
    if absent:
        raise CheckpointError(
            f"{folder} has no {' and no '.join(absent)}: it holds {', '.join(config.components) or 'no component'}"
        )
    _check_files(folder, wanted)
    # Shapes come before the device, which may be starting yet.
    shapes = {name: abstract_component(name, config) for name in wanted}
    sharding = jax.device_put(0, device).sharding  # what JAX makes of a device, a sharding, or its default
    if not (runs_stacked(next(iter(sharding.device_set)).platform) if stacked is None else stacked):
        shapes = {name: unstacked(module) for name, module in shapes.items()}
    placed = partial(jax.ShapeDtypeStruct, dtype=np.dtype(dtype), sharding=sharding)
    modules: dict[str, nnx.Module] = {
        name: jax.tree.map(lambda array: placed(array.shape), module) for name, module in shapes.items()
    }
    return Checkpoint(config, modules, tokenizer_folders(folder, wanted))


def read_weights(path: str | os.PathLike, opened: Checkpoint, progress: bool = False) -> Checkpoint:
    """The checkpoint that `open_checkpoint` described, with its weights, of which several are read at a time.

    Raises:
        CheckpointError: a file is damaged.
    """
    folder = Path(path).expanduser()
    total = sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(opened.components))
    readers = ThreadPoolExecutor(_READERS)
    try:
        reading: dict[str, list[Future[list[jax.Array]]]] = {}
        for name, module in opened.components.items():
            # Arrays are read while those of the next component are opened.
            reading[name] = [readers.submit(_read, group) for group in _groups(_reads(folder / name, module))]
        with tqdm(total=total, unit="B", unit_scale=True, desc="loading", disable=not progress) as bar:
            for future in as_completed(itertools.chain.from_iterable(reading.values())):
                bar.update(sum(array.nbytes for array in future.result()))
    finally:
        readers.shutdown(cancel_futures=True)
    components: dict[str, nnx.Module] = {}
    for name, module in opened.components.items():
        arrays = [array for part in reading[name] for array in part.result()]
        components[name] = jax.tree.unflatten(jax.tree.structure(module), arrays)
    return Checkpoint(opened.config, components, opened.tokenizers)


def open_stored(path: str | os.PathLike, name: str, config: ModelConfig) -> dict[str, StoredArray]:
    """A component's parameters by dotted path, in the dtypes they are stored in, to be read piece by piece.

    Raises:
        CheckpointError: a file is missing or truncated.
    """
    _check_files(Path(path), [name])
    shapes = parameter_shapes(name, config)
    return _open_stored(Path(path) / name, shapes)


def tokenizer_folders(path: str | os.PathLike, components: Sequence[str]) -> dict[str, Path]:
    """The folders of the tokenizers that a checkpoint has for these components."""
    folders = {name: Path(path) / "tokenizers" / name for name in components}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def _read_header(folder: Path) -> dict[str, Any]:
    if (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"{folder} is a diffusers folder; convert it first with: sd35flash-jax convert {folder} CHECKPOINT"
        )
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is not a checkpoint (it has no config.json); make one with: sd35flash-jax convert SOURCE "
            f"{folder}"
        )
    try:
        header = read_json(folder / "config.json")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise CheckpointError(f"{folder}/config.json is not of checkpoint format {FORMAT}; convert the source again")
    if "model" not in header or not isinstance(header.get("files"), dict):
        raise CheckpointError(f"{folder}/config.json is damaged; convert the checkpoint again")
    return header


def _check_files(folder: Path, components: Sequence[str]) -> None:
    unwanted = set(COMPONENTS) - set(components)
    for name, size in _read_header(folder)["files"].items():
        owner = name.removeprefix("tokenizers/").split("/")[0]
        if owner in unwanted:
            continue
        file = f"{folder}/{name}"  # Not a Path, which takes several times as long: there are thousands of files.
        try:
            found = os.stat(file)
        except (FileNotFoundError, NotADirectoryError):
            found = None
        if found is None or not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"the checkpoint is damaged: {file} is missing; convert it again")
        if found.st_size != size:
            raise CheckpointError(
                f"the checkpoint is damaged: {file} has {found.st_size} bytes in place of {size}; convert it again"
            )


class _Read(NamedTuple):
    """What is to be read of a stored array, for one parameter."""

    stored: StoredArray
    layer: int | None
    wanted: jax.ShapeDtypeStruct

    @property
    def nbytes(self) -> int:
        return self.wanted.size * self.wanted.dtype.itemsize


def _reads(folder: Path, module: nnx.Module) -> list[_Read]:
    """What brings each parameter of a module of `ShapeDtypeStruct`s from where it is stored to where it belongs, in the
    order of the module's leaves."""
    places = [(*_stored_path(module, path), wanted) for path, wanted in _leaves(module)[0]]
    shapes: dict[str, tuple[int, ...]] = {}
    for param, layer, wanted in places:
        count = () if layer is None else (len(getattr(module, param.split(".")[0])),)
        shapes[param] = (*count, *wanted.shape)
    stores = _open_stored(folder, shapes)
    return [_Read(stores[param], layer, wanted) for param, layer, wanted in places]


def _groups(reads: Iterable[_Read]) -> Iterator[list[_Read]]:
    """What is waited for together: each wait may lose Python's lock to another thread, which keeps it for a while."""
    group: list[_Read] = []
    size = 0
    for read in reads:
        if group and size + read.nbytes > _GROUP_BYTES:
            yield group
            group, size = [], 0
        group.append(read)
        size += read.nbytes
    if group:
        yield group


def _read(group: Sequence[_Read]) -> list[jax.Array]:
    # Waiting bounds what is in host memory to what the readers hold.
    return jax.block_until_ready([_begin(read) for read in group])


def _begin(read: _Read) -> jax.Array:
    stored, layer, wanted = read
    assert wanted.sharding is not None
    part: Callable[[Any], np.ndarray] = partial(stored.read, np.dtype(wanted.dtype), layer)
    if stored.dtype == wanted.dtype and not on_host(wanted.sharding):
        # What goes to a device need not be copied on the way. On the host itself JAX would keep the file's own memory.
        mapped = stored.mapped(layer)
        part = part if mapped is None else mapped.__getitem__
    return jax.make_array_from_callback(wanted.shape, wanted.sharding, part)


def on_host(sharding: jax.sharding.Sharding) -> bool:
    """Whether arrays that are placed so are in the host's own memory."""
    devices: set[Any] = sharding.device_set
    return any(device.platform == "cpu" for device in devices)


# Where `StoredArray.mapped` does not serve them, arrays are read with TensorStore, a few at a time and out of the
# system's own memory of the files: Orbax itself would hold each on the host twice.
_READERS = 4
_GROUP_BYTES = 2**26
_READING = ts.Context(
    {
        "file_io_concurrency": {"limit": _READERS},
        "file_io_mode": {"mode": "memmap"},
        "cache_pool": {"total_bytes_limit": 0},
    }
)
_CPU_ALIGNMENT = 64


def _open_stored(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, StoredArray]:
    values = _open_zarrs(folder, shapes)
    shared = {
        param: _shared_axes(folder.name, param, len(shapes[param]))
        for param, store in values.items()
        if store.dtype == ts.int8
    }
    scales = _open_zarrs(
        folder,
        {
            param + _SCALES: tuple(1 if axis in axes else side for axis, side in enumerate(shapes[param]))
            for param, axes in shared.items()
        },
    )
    return {
        param: StoredArray(store, folder / param, scales[param + _SCALES].read().result() if param in shared else None)
        for param, store in values.items()
    }


def _open_zarrs(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, ts.TensorStore]:
    """The arrays of these names and shapes, all opened before the first is waited for: each wait may lose Python's lock
    to another thread, which keeps it for a while."""
    opening = {
        name: ts.open(
            {"driver": "zarr", "kvstore": {"driver": "file", "path": str(folder / name)}}, read=True, context=_READING
        )
        for name in shapes
    }
    stores = {}
    for name, shape in shapes.items():
        path = folder / name
        try:
            stores[name] = opening[name].result()
        except ValueError as error:
            raise CheckpointError(
                f"the checkpoint is damaged: {path} cannot be read ({error}); convert it again"
            ) from None
        if stores[name].shape != shape:
            raise CheckpointError(f"{path} has shape {stores[name].shape} in place of {shape}")
    return stores
