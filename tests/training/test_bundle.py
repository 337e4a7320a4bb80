import errno
import os
import shutil
from pathlib import Path

import pytest

from sd35flash_jax.checkpoint import read_config, read_origin
from tests.tiny_model import CONFIG
from training import bundle as module
from training.bundle import bundle
from training.model import SOURCE


@pytest.fixture(autouse=True)
def compared(monkeypatch):
    """Which checkpoints' pictures are compared; none are drawn."""
    compared = []
    monkeypatch.setattr(module, "psnr", lambda *paths: compared.append(paths) or 50.0)
    return compared


@pytest.fixture
def box(small_checkpoint, tmp_path) -> Path:
    """A checkpoint with a file that a new one has not."""
    box = Path(shutil.copytree(small_checkpoint, tmp_path / "box"))
    (box / "old").touch()
    return box


def assert_as_it_was(box):
    assert (box / "old").exists() and read_origin(box) == "tests" and list(box.parent.iterdir()) == [box]


def test_a_checkpoint_is_stored_as_int8_where_there_was_none(small_checkpoint, tmp_path):
    assert bundle(small_checkpoint, tmp_path / "new" / "box") == 50.0
    assert list((tmp_path / "new").iterdir()) == [tmp_path / "new" / "box"]
    assert read_config(tmp_path / "new" / "box") == CONFIG and read_origin(tmp_path / "new" / "box") == SOURCE


def test_the_old_one_is_replaced_and_nothing_is_left_of_it(small_checkpoint, box):
    bundle(small_checkpoint, box)
    assert read_origin(box) == SOURCE and not (box / "old").exists() and list(box.parent.iterdir()) == [box]


def test_the_old_one_is_there_until_the_new_one_has_drawn_its_pictures(small_checkpoint, box, monkeypatch):
    def interrupted(checkpoint, new):
        assert read_origin(new) == SOURCE and (box / "old").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "psnr", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bundle(small_checkpoint, box)
    assert_as_it_was(box)


def test_the_old_one_stays_if_the_new_one_cannot_be_written(small_checkpoint, box, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sd35flash_jax.checkpoint._file_sizes", full)
    with pytest.raises(OSError, match="no space left for box"):
        bundle(small_checkpoint, box)
    assert_as_it_was(box)


def test_the_old_one_comes_back_if_the_new_one_cannot_take_its_place(small_checkpoint, box, monkeypatch):
    rename = Path.rename

    def broken(path, target):
        if target == box and path.name == "box":
            raise OSError("the disk was lost")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", broken)
    with pytest.raises(OSError, match="the disk was lost"):
        bundle(small_checkpoint, box)
    assert_as_it_was(box)


def test_a_link_to_a_checkpoint_goes_on_leading_to_it(small_checkpoint, box):
    link = box.with_name("link")
    os.symlink(box, link)
    bundle(small_checkpoint, link)
    assert link.is_symlink() and read_origin(box) == SOURCE


def test_a_folder_that_is_no_checkpoint_is_not_replaced(small_checkpoint, tmp_path, compared):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "fox.png").touch()
    with pytest.raises(ValueError, match="pictures is not a checkpoint"):
        bundle(small_checkpoint, tmp_path / "pictures")
    assert (tmp_path / "pictures" / "fox.png").exists() and compared == []
