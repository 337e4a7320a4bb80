"""Compilation settings, all of them: XLA's flags for GPUs, and the cache of compiled programs between processes, with
what else is kept beside it.

`configure` is called where a pipeline is loaded, never on import, and whatever the user has set wins:

- `XLA_FLAGS` keeps every flag it has; ours are put before them, and only those it does not name. Some programs have
  options of their own (`GPU_SIDE_BY_SIDE`), again but for those it names.
- `JAX_COMPILATION_CACHE_DIR` (or `jax.config`) chooses another folder, `JAX_ENABLE_COMPILATION_CACHE=0` turns the cache
  off, `JAX_COMPILATION_CACHE_MAX_SIZE` bounds it in bytes, but not what else is kept beside it, a megabyte or so for a
  model and size. Its folder can be deleted at any time.
- `XLA_PYTHON_CLIENT_PREALLOCATE`, or a fraction of the memory that is to be taken, keeps `start_devices` from setting
  the former.
"""

import contextlib
import hashlib
import logging
import os
import secrets
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import entry_points, version
from pathlib import Path
from typing import Any

import jax

GPU_FLAGS: tuple[str, ...] = (
    # cuBLASLt for every matrix product: it takes bias, GELU and sum into the product, and needs no kernels compiled.
    "--xla_gpu_enable_triton_gemm=false",
    # No joining of products of one operand: at one row it copies the weights, which costs more than it saves.
    "--xla_gpu_dot_merger_threshold_mb=0",
)
"""What XLA is told on NVIDIA GPUs; `docs/performance.md` says what each gives."""

GPU_SIDE_BY_SIDE = {
    "xla_gpu_graph_enable_concurrent_region": True,
    "xla_gpu_command_buffer_scheduling_mode": "CONCURRENT",
}
"""For the text encoders' program: their kernels are small and independent, and run side by side in a CUDA graph. All
else is better off in order: kernels side by side cannot share memory, and an evaluation of the transformer takes a
tenth longer at 512 px."""

_USERS_FLAGS = os.environ.get("XLA_FLAGS", "").strip()  # On import, before `configure` adds ours.
_MEMORY_SETTINGS = {
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_CLIENT_MEM_FRACTION",
}
_ENABLED = "jax_enable_compilation_cache"
_FOLDER = "jax_compilation_cache_dir"
_MIN_COMPILE_TIME = "jax_persistent_cache_min_compile_time_secs"


def configure() -> None:
    """Set what the user has not: XLA's flags, if JAX has not started its backend yet, and the persistent cache."""
    if GPU_FLAGS and _has_cuda_plugin():
        os.environ["XLA_FLAGS"] = with_flags(os.environ.get("XLA_FLAGS", ""), GPU_FLAGS)
    _use_persistent_cache()


def start_devices() -> None:
    """`configure`, and start JAX's backend in a thread, beside which Python can go on. What fails there fails again,
    with its message, for the first who needs a device. For a process that ends soon, memory is taken as it is needed:
    most of a GPU's at once, as JAX does, takes most of a second to give back (`XLA_PYTHON_CLIENT_PREALLOCATE`)."""

    def start() -> None:
        with contextlib.suppress(Exception):
            jax.devices()

    configure()
    if not _MEMORY_SETTINGS & os.environ.keys():
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    threading.Thread(target=start, daemon=True).start()  # Who is refused need not wait for it.


def gpu_options(options: Mapping[str, Any]) -> dict[str, Any] | None:
    """A program's own compiler options, on NVIDIA GPUs: those that the user's `XLA_FLAGS` do not name."""
    if not _has_cuda_plugin() or _names_a_file(_USERS_FLAGS):
        return None
    named = {_flag_name(flag) for flag in _USERS_FLAGS.split()}
    return {name: value for name, value in options.items() if name not in named}


def with_flags(own: str, flags: Sequence[str]) -> str:
    """A user's XLA_FLAGS with those of `flags` added before them that they do not name themselves.

    XLA reads XLA_FLAGS that do not begin with a dash as the name of a file of flags; such are left alone.
    """
    own = own.strip()
    if _names_a_file(own):
        return own
    named = {_flag_name(flag) for flag in own.split()}
    return " ".join([*(flag for flag in flags if _flag_name(flag) not in named), *own.split()])


def cache_folder() -> Path:
    """Where compiled programs are kept unless the user says otherwise.

    Raises:
        RuntimeError: the user has no home folder.
    """
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sd35flash-jax" / "xla"


def kept_path(kind: str, name: str, description: object) -> Path | None:
    """Where something is kept between processes, beside the cache, for whatever `description` says in words that mean
    the same in every process, and for this package's code. Nowhere if the cache is off or not a local folder."""
    digest = hashlib.sha256(repr((_CODE, description)).encode()).hexdigest()
    folder = _local_folder()
    return None if folder is None else folder / kind / f"{name}-{digest}"


def keep(path: Path, content: bytes) -> None:
    """Write what belongs at a `kept_path`, whole or not at all: every process can do without it. Code that has changed
    since it was imported keeps nothing, because it would be taken for that of the changed code."""
    partial = path.with_name(f".{path.name}.partial-{secrets.token_hex(4)}")
    try:
        if _digest_of_code() == _CODE:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            partial.write_bytes(hashlib.sha256(content).digest() + content)
            partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        logging.getLogger(__name__).info("%s is not kept: %s", path, error)


def read_kept(path: Path) -> bytes | None:
    """What is kept at a path, if anything is and is as it was written."""
    try:
        stored = path.read_bytes()
    except OSError:
        return None
    digest, content = stored[:32], stored[32:]
    return content if hashlib.sha256(content).digest() == digest else None


def _local_folder() -> Path | None:
    folder = getattr(jax.config, _FOLDER)
    return Path(folder) if folder and "://" not in folder and getattr(jax.config, _ENABLED) else None


def _digest_of_code() -> str:
    """That of this package, with the versions of those whose part in what is kept is as large."""
    package = Path(__file__).parent
    versions = [version(name) for name in ("flax", "jax", "jaxlib", "tokenizers", "transformers")]
    digest = hashlib.sha256(repr(versions).encode())
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


_CODE = _digest_of_code()  # On import: code that changes later is not the code that runs.


def _names_a_file(flags: str) -> bool:
    return bool(flags) and not flags.startswith("-")


def _flag_name(flag: str) -> str:
    return flag.lstrip("-").split("=")[0]


@cache
def _has_cuda_plugin() -> bool:
    """Whether JAX for NVIDIA GPUs is installed. Elsewhere XLA may not know its flags, and an unknown one is fatal."""
    return any(plugin.name.startswith("xla_cuda") for plugin in entry_points(group="jax_plugins"))


def _use_persistent_cache() -> None:
    if getattr(jax.config, _FOLDER) or not getattr(jax.config, _ENABLED):
        return
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        writable = os.access(folder, os.W_OK | os.X_OK)
    except (OSError, RuntimeError):
        writable = False
    if not writable:
        logging.getLogger(__name__).info("compiled programs are not kept: the cache folder cannot be written")
        return
    jax.config.update(_FOLDER, str(folder))
    if _MIN_COMPILE_TIME.upper() not in os.environ and getattr(jax.config, _MIN_COMPILE_TIME) == 1.0:
        jax.config.update(_MIN_COMPILE_TIME, 0.0)  # The many small programs of a first image add up too.
