import tempfile
from pathlib import Path
from unittest.mock import patch

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from safetensors import safe_open
from safetensors.numpy import load_file

from training.pieces import load_pieces, save_pieces

PIECE_BYTES = 100

names = st.text("abc._0", min_size=1, max_size=12)
dtypes = st.sampled_from([np.dtype(ml_dtypes.bfloat16), np.dtype(np.int8), np.dtype(np.float32)])


@st.composite
def named_arrays(draw):
    """Arrays of any bytes, not-a-numbers and single numbers among them."""
    dtype, shape = draw(dtypes), draw(array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=5))
    return draw(arrays(np.uint8, (*shape, dtype.itemsize))).view(dtype).reshape(shape)


@given(st.dictionaries(names, named_arrays(), max_size=8))
@settings(deadline=None, max_examples=60)
def test_arrays_come_back_as_they_were_from_files_that_are_not_too_large(given):
    with tempfile.TemporaryDirectory() as folder, patch("training.pieces.PIECE_BYTES", PIECE_BYTES):
        save_pieces(Path(folder), given)
        read = load_pieces(Path(folder))
        pieces = [load_file(file) for file in Path(folder).iterdir()]
    assert read.keys() == given.keys()
    for name, array in given.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert read[name].tobytes() == array.tobytes()
    assert all(len(piece) <= 1 or sum(array.nbytes for array in piece.values()) <= PIECE_BYTES for piece in pieces)


def test_small_arrays_share_a_file(tmp_path):
    save_pieces(tmp_path, {f"layer.{i}": np.full(3, i, np.float32) for i in range(10)})
    (file,) = tmp_path.iterdir()
    with safe_open(file, "numpy") as opened:
        assert len(opened.keys()) == 10


def test_a_transposed_array_comes_back_with_its_values_in_place(tmp_path):
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    save_pieces(tmp_path, {"kernel": array})
    np.testing.assert_array_equal(load_pieces(tmp_path)["kernel"], array)


def test_earlier_pieces_are_replaced(tmp_path):
    with patch("training.pieces.PIECE_BYTES", PIECE_BYTES):
        save_pieces(tmp_path, {f"old.{i}": np.zeros(20, np.float32) for i in range(4)})
        save_pieces(tmp_path, {"new": np.ones(2, np.int8)})
    assert load_pieces(tmp_path).keys() == {"new"}


def test_a_folder_without_pieces_is_said_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"holds no safetensors files; run the stage of training that writes them"):
        load_pieces(tmp_path)


def test_a_truncated_piece_is_named(tmp_path):
    save_pieces(tmp_path, {"kernel": np.ones(3, np.float32)})
    (piece,) = tmp_path.iterdir()
    piece.write_bytes(piece.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"000\.safetensors is truncated or damaged .*; run the stage that writes it"):
        load_pieces(tmp_path)
