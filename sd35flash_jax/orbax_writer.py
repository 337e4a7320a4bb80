"""Arrays into an Orbax tree, one zarr array each, of which `StreamedArray`s are written piece by piece."""

import logging
import os
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from sd35flash_jax.checkpoint import StreamedArray

_CHUNK_BYTES = 2**28
_WRITERS = 2  # One piece is copied to the system while the disk takes the one before, and the next is made ready.

# Orbax warns at every save that is not in its OCDBT format; ours is plain zarr by choice.
logging.getLogger("absl").addFilter(lambda record: "Skipping merge of OCDBT" not in record.getMessage())


def write_arrays(folder: Path, arrays: Mapping[str, Any], named: str) -> None:
    """Write arrays and `StreamedArray`s into a new folder, by one process; `named` tells its writing from others'."""
    own = jax.process_index()  # Of several processes, the one that calls this writes and waits for no other.
    alone = ocp.options.MultiprocessingOptions(own, {own}, named)
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False,
        use_compression=False,
        type_handler_registry=_STREAMING_REGISTRY,
        multiprocessing_options=alone,
    )
    with ocp.Checkpointer(handler, multiprocessing_options=alone) as checkpointer:
        chunks = dict.fromkeys(arrays, ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES))
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(dict(arrays), save_args=chunks))
    # Nobody reads this note of Orbax, and it says where on this machine the checkpoint was written.
    (folder / "commit_success.txt").unlink(missing_ok=True)


class _StreamedArrayHandler(type_handlers.NumpyHandler):
    """Lets Orbax save `StreamedArray`s: each piece is one zarr chunk, read, written and dropped in turn.

    TensorStore makes the arrays; their chunks, which hold nothing but the bytes of a piece, are written without it,
    because it copies each twice on the way.
    """

    async def serialize(
        self,
        values: Sequence[StreamedArray],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[type_handlers.SaveArgs] | None = None,
    ) -> list[Any]:
        # Nothing is awaited: an interrupt must not find a write of which only a closed event loop knows.
        with ThreadPoolExecutor(_WRITERS) as writers:
            writing: deque[Future[None]] = deque()
            for value, info in zip(values, infos):
                for number, (index, piece) in enumerate(value.pieces()):
                    chunks = value.shape if index is ... else (1, *value.shape[1:])
                    if number == 0:
                        _create_zarr(info.path, value, chunks)
                    key = ".".join(map(str, (0 if index is ... else index, *[0] * (len(chunks) - 1))))
                    if len(writing) == _WRITERS:
                        writing.popleft().result()
                    writing.append(writers.submit(_write_chunk, info.path / key, piece.reshape(chunks), value.dtype))
            for written in writing:
                written.result()
        return []


def _create_zarr(path: Path, array: StreamedArray, chunks: tuple[int, ...]) -> None:
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "file", "path": str(path)},
        "metadata": {"shape": array.shape, "chunks": chunks, "compressor": None},
        "dtype": array.dtype.name,
    }
    ts.open(spec, create=True).result()


def _write_chunk(file: Path, chunk: np.ndarray, dtype: np.dtype) -> None:
    """Write a chunk of an uncompressed zarr array to the disk, and not only to the system's cache of it."""
    with open(file, "xb") as stream:
        stream.write(np.ascontiguousarray(chunk, dtype).reshape(-1).view(np.uint8).data)
        stream.flush()
        os.fsync(stream.fileno())


_STREAMING_REGISTRY = type_handlers.create_type_handler_registry(
    (StreamedArray, _StreamedArrayHandler()),
    # Of an array that is whole on several devices, its first device writes all, not each a part.
    (jax.Array, type_handlers.ArrayHandler(use_replica_parallel=False)),
    (np.ndarray, type_handlers.NumpyHandler()),
)
