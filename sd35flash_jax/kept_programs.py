"""What programs are traced to, kept between processes beside the compiled programs themselves.

JAX finds a compiled program by what it is lowered to, so every process traces and lowers the Python code anew, which
takes seconds at true size. `kept` writes the result down the first time, as StableHLO (`jax.export`), and reads it from
then on. A file serves the same code, versions, device, configuration and shapes alone. Any of them can be deleted at
any time, which is also the only way that old ones go.
"""

import logging
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax import export

from sd35flash_jax.compilation import keep, kept_path, read_kept
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
    Keyword arguments are static. What cannot be written down is traced as ever."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        identities = _identities(arguments)
        if None in identities:
            return function(*arguments, **options)
        placed, structure = jax.tree_util.tree_flatten_with_path(arguments)
        leaves = [leaf for _, leaf in placed]
        shown = [(jax.tree_util.keystr(place), leaf.shape, leaf.dtype.name) for place, leaf in placed]
        name = function.__module__, function.__qualname__
        path = kept_path("lowered", function.__name__, (name, identities, sorted(options.items()), shown, _settings()))
        if path is None:
            return function(*arguments, **options)

        def of_leaves(*leaves: Any) -> Any:
            return function(*jax.tree.unflatten(structure, leaves), **options)

        program = _read(path)
        if program is None:
            shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
            try:
                program = export.export(jax.jit(of_leaves), disabled_checks=_CHECKS_WAIVED)(*shapes)
                keep(path, bytes(program.serialize()))
            except Exception as error:  # Whatever is wrong with the function itself is raised by it again.
                logging.getLogger(__name__).info("%s is not kept: %s", path, error)
                return function(*arguments, **options)
        return program.call(*leaves)

    return call  # type: ignore[return-value]


def _identities(arguments: Any) -> list[str | None]:
    nodes = jax.tree.leaves(arguments, is_leaf=lambda node: isinstance(node, Frozen))
    return [node.identity for node in nodes if isinstance(node, Frozen)]


def _settings() -> tuple[Any, ...]:
    """What tracing depends on besides the code and its arguments."""
    device = jax.devices()[0]
    chosen = [getattr(jax.config, name) for name in ("jax_default_matmul_precision", "jax_enable_x64")]
    return device.platform, device.device_kind, getattr(device, "core_count", None), chosen


def _read(path: Path) -> export.Exported | None:
    content = read_kept(path)
    if content is None:
        return None
    program = export.deserialize(bytearray(content))
    if b"mosaic_gpu" in program.mlir_module_serialized:
        import jax.experimental.mosaic.gpu  # noqa: F401  Tells XLA where the library is that runs such kernels.
    return program
