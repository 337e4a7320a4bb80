"""What programs are traced to, kept between processes beside the compiled programs themselves.

JAX finds a compiled program by what it is lowered to, so every process traces and lowers the Python code anew, which
takes seconds at true size. `kept` writes the result down the first time, as StableHLO (`jax.export`), and reads it from
then on. A file serves the same code, versions, device, configuration and shapes alone. Any of them can be deleted at
any time, which is also the only way that old ones go.
"""

import hashlib
import logging
from collections.abc import Callable
from functools import cache, wraps
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax import export

from sd35flash_jax.compilation import keep, kept_folder
from sd35flash_jax.frozen import Frozen

Function = TypeVar("Function", bound=Callable[..., Any])

# A file serves one version of JAX alone, so that it need not be stable what these do.
_CHECKS_WAIVED = [
    export.DisabledSafetyCheck.custom_call(name)
    for name in ("mosaic_gpu_v2", "__gpu$xla.gpu.triton", "__cudnn$fmhaSoftmax")
]


def kept(function: Function) -> Function:
    """For a function under `jax.jit` of arrays and `Frozen` modules: where all of the latter have an `identity`, the
    function is traced once and kept. Such a program runs on one device of the default backend and has no gradient.
    Keyword arguments are static. Nothing is kept while JAX's cache of compiled programs is off or not a local folder.
    """

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        folder, identities = kept_folder("lowered"), _identities(arguments)
        if folder is None or None in identities:
            return function(*arguments, **options)
        leaves, structure = jax.tree.flatten(arguments)
        shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]

        def of_leaves(*leaves: Any) -> Any:
            return function(*jax.tree.unflatten(structure, leaves), **options)

        shown = [(shape.shape, shape.dtype.name) for shape in shapes]
        description = repr((function.__qualname__, identities, sorted(options.items()), shown, _surroundings()))
        path = folder / f"{function.__name__}-{hashlib.sha256(description.encode()).hexdigest()}"
        program = _read(path)
        if program is None:
            program = export.export(jax.jit(of_leaves), disabled_checks=_CHECKS_WAIVED)(*shapes)
            keep(path, bytes(program.serialize()))
        return program.call(*leaves)

    return call  # type: ignore[return-value]


def _identities(arguments: Any) -> list[str | None]:
    nodes = jax.tree.leaves(arguments, is_leaf=lambda node: isinstance(node, Frozen))
    return [node.identity for node in nodes if isinstance(node, Frozen)]


def _surroundings() -> tuple[Any, ...]:
    """All else that tracing depends on."""
    device = jax.devices()[0]
    chosen = [getattr(jax.config, name) for name in ("jax_default_matmul_precision", "jax_enable_x64")]
    return _code(), device.platform, device.device_kind, getattr(device, "core_count", None), chosen


@cache
def _code() -> str:
    """A digest of this package, with the versions of those that trace it."""
    package = Path(__file__).parent
    digest = hashlib.sha256(repr([version(name) for name in ("jax", "jaxlib", "flax")]).encode())
    for file in sorted(package.rglob("*.py")):
        digest.update(str(file.relative_to(package)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _read(path: Path) -> export.Exported | None:
    try:
        program = export.deserialize(bytearray(path.read_bytes()))
    except FileNotFoundError:
        return None
    except Exception as error:  # A damaged file can fail in many ways, and costs no more than one that is missing.
        logging.getLogger(__name__).info("%s is not read: %s", path, error)
        return None
    if b"mosaic_gpu" in program.mlir_module_serialized:
        import jax.experimental.mosaic.gpu  # noqa: F401  Tells XLA where the library is that runs such kernels.
    return program
