import json
import mmap
import os
import shutil
import threading
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from sd35flash_jax.checkpoint import (
    BUNDLED,
    Checkpoint,
    CheckpointError,
    StoredArray,
    StreamedArray,
    abstract_component,
    build_component,
    load_checkpoint,
    parameters,
    read_config,
    save_checkpoint,
    with_parameters,
    written_whole,
)
from sd35flash_jax.config import PRESETS, ModelConfig
from tests.tiny_model import CONFIG, random_parameters

CLIP = ModelConfig(clip_l=CONFIG.clip_l, clip_g=CONFIG.clip_g)


@pytest.fixture(scope="module")
def clip_checkpoint(tmp_path_factory) -> tuple[Path, dict[str, dict[str, np.ndarray]]]:
    """A checkpoint of two components and what it holds. Read it only."""
    folder = tmp_path_factory.mktemp("clip") / "checkpoint"
    arrays = {name: random_parameters(name, seed) for seed, name in enumerate(CLIP.components)}
    save_checkpoint(folder, CLIP, arrays, source={"name": "a test"})
    return folder, arrays


@pytest.fixture
def damaged(clip_checkpoint, tmp_path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(clip_checkpoint[0], tmp_path / "checkpoint"))


def values(checkpoint: Checkpoint, name: str) -> dict[str, np.ndarray]:
    return {path: np.asarray(array) for path, array in parameters(checkpoint.components[name]).items()}


def chunks(folder: Path, param: str) -> list[Path]:
    return sorted(file for file in (folder / param).iterdir() if not file.name.startswith("."))


# Round trips


def test_every_parameter_survives_bit_by_bit(clip_checkpoint):
    folder, arrays = clip_checkpoint
    loaded = load_checkpoint(folder, dtype="float32")
    assert loaded.config == CLIP
    assert tuple(loaded.components) == CLIP.components
    for name in CLIP.components:
        found = values(loaded, name)
        assert set(found) == set(arrays[name])
        for path, array in arrays[name].items():
            np.testing.assert_array_equal(found[path], array)


@pytest.mark.parametrize("where", ["written", "bundled"])
def test_no_file_of_a_checkpoint_says_where_it_was_written(where, clip_checkpoint):
    folder = clip_checkpoint[0] if where == "written" else BUNDLED
    files = [file for file in folder.rglob("*") if file.is_file() and not file.name[0].isdigit()]
    assert len(files) > 10
    places = [str(folder.parent).encode(), b".partial-"]
    assert [file for file in files if any(place in file.read_bytes() for place in places)] == []


def test_a_module_survives_with_its_outputs(tmp_path):
    config = ModelConfig(clip_l=CONFIG.clip_l)
    module = build_component("clip_l", config, seed=3)
    save_checkpoint(tmp_path / "checkpoint", config, {"clip_l": module})
    again = load_checkpoint(tmp_path / "checkpoint", dtype="float32").components["clip_l"]
    tokens = jnp.arange(14, dtype=jnp.int32).reshape(2, 7)
    for mine, expected in zip(again(tokens), module(tokens)):
        np.testing.assert_array_equal(mine, expected)


def test_components_built_from_different_seeds_differ():
    one, other = (parameters(build_component("clip_l", CONFIG, seed)) for seed in (1, 2))
    kernel = "layers.qkv.kernel"
    assert not np.array_equal(one[kernel], other[kernel])
    assert not np.array_equal(one[kernel][0], one[kernel][1])


@pytest.mark.parametrize("config", [CONFIG, PRESETS["sd3.5-medium"]], ids=["tiny", "sd3.5-medium"])
@pytest.mark.parametrize("name", CONFIG.components)
def test_a_component_described_without_keys_is_the_one_that_is_built_with_them(name, config):
    described, built = abstract_component(name, config), jax.eval_shape(lambda: build_component(name, config))
    assert jax.tree.structure(described) == jax.tree.structure(built)
    assert jax.tree.leaves(described) == jax.tree.leaves(built)
    assert nnx.graphdef(described) == nnx.graphdef(built)


def test_parameters_are_cast_while_they_are_loaded(clip_checkpoint):
    folder, arrays = clip_checkpoint
    found = values(load_checkpoint(folder, dtype="bfloat16"), "clip_l")
    for path, array in arrays["clip_l"].items():
        assert found[path].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(found[path], array.astype(ml_dtypes.bfloat16))


def test_bfloat16_weights_load_exactly_as_float32(tmp_path):
    config = ModelConfig(clip_l=CONFIG.clip_l)
    arrays = {path: array.astype(ml_dtypes.bfloat16) for path, array in random_parameters("clip_l").items()}
    save_checkpoint(tmp_path / "checkpoint", config, {"clip_l": arrays})
    found = values(load_checkpoint(tmp_path / "checkpoint", dtype="float32"), "clip_l")
    for path, array in arrays.items():
        np.testing.assert_array_equal(found[path], array.astype(np.float32))


def test_streamed_parameters_are_stored_as_whole_ones_are(clip_checkpoint, tmp_path):
    _, arrays = clip_checkpoint

    def streamed(path: str, array: np.ndarray) -> StreamedArray:
        stacked = path.startswith("layers.")
        return StreamedArray(array.shape, array.dtype, lambda: iter(enumerate(array) if stacked else [(..., array)]))

    components = {name: {path: streamed(path, array) for path, array in arrays[name].items()} for name in arrays}
    save_checkpoint(tmp_path / "checkpoint", CLIP, components)
    loaded = load_checkpoint(tmp_path / "checkpoint", dtype="float32")
    for name in CLIP.components:
        for path, array in arrays[name].items():
            np.testing.assert_array_equal(values(loaded, name)[path], array)


def test_a_streamed_layer_of_zeros_has_its_file(tmp_path):
    config = ModelConfig(clip_l=CONFIG.clip_l)
    arrays = random_parameters("clip_l")
    zeros = np.zeros_like(arrays["layers.linear_1.bias"])
    streamed = {"layers.linear_1.bias": StreamedArray(zeros.shape, zeros.dtype, lambda: iter(enumerate(zeros)))}
    save_checkpoint(tmp_path / "checkpoint", config, {"clip_l": arrays | streamed})
    assert len(chunks(tmp_path / "checkpoint" / "clip_l", "layers.linear_1.bias")) == len(zeros)
    assert not values(load_checkpoint(tmp_path / "checkpoint"), "clip_l")["layers.linear_1.bias"].any()


@pytest.mark.parametrize("stacked", [True, False])
def test_what_goes_to_a_device_is_mapped_from_its_files_where_they_hold_it_as_it_is(
    stacked, clip_checkpoint, tmp_path, monkeypatch
):
    _, arrays = clip_checkpoint
    # Some arrays in one file, the others in a file for each layer.
    streamed = {
        name: {
            path: StreamedArray(array.shape, array.dtype, partial(enumerate, array))
            if path.startswith("layers.") and path.endswith(".kernel")
            else array
            for path, array in own.items()
        }
        for name, own in arrays.items()
    }
    save_checkpoint(tmp_path / "checkpoint", CLIP, streamed)
    expected = load_checkpoint(tmp_path / "checkpoint", dtype="float32", stacked=stacked)

    mapped: list[bool] = []

    def noted(self, layer=None, make=StoredArray.mapped):
        made = make(self, layer)
        memory = made
        while isinstance(memory, np.ndarray):
            memory = memory.base
        mapped.append(isinstance(getattr(memory, "obj", memory), mmap.mmap))
        return made

    monkeypatch.setattr(StoredArray, "mapped", noted)
    monkeypatch.setattr("sd35flash_jax.checkpoint.on_host", lambda sharding: False)
    found = load_checkpoint(tmp_path / "checkpoint", dtype="float32", stacked=stacked)
    assert True in mapped and False in mapped
    for name in CLIP.components:
        for path, array in values(expected, name).items():
            np.testing.assert_array_equal(values(found, name)[path], array)
    mapped.clear()
    load_checkpoint(tmp_path / "checkpoint", dtype="bfloat16", stacked=stacked)
    assert not mapped


# int8


@pytest.fixture(scope="module")
def int8_checkpoint(tmp_path_factory) -> tuple[Path, dict[str, dict[str, np.ndarray]]]:
    """The whole tiny model stored as int8, and what it was made of. Read it only."""
    folder = tmp_path_factory.mktemp("int8") / "checkpoint"
    arrays = {name: random_parameters(name, seed) for seed, name in enumerate(CONFIG.components)}
    save_checkpoint(folder, CONFIG, arrays, int8=True)
    return folder, arrays


@pytest.mark.parametrize("name", CONFIG.components)
def test_int8_weights_load_within_half_a_scale_and_all_others_bit_by_bit(name, int8_checkpoint):
    folder, arrays = int8_checkpoint
    found = values(load_checkpoint(folder, [name], dtype="float32"), name)
    assert set(found) == set(arrays[name])
    for path, array in arrays[name].items():
        stacked = path.startswith(("layers.", "blocks.", "dual_blocks."))
        if array.ndim - stacked < 2:
            np.testing.assert_array_equal(found[path], array)
            continue
        # A scale for each output channel, or row of an embedding table, and layer.
        channel = array.ndim - (2 if path.endswith(".embedding") else 1)
        shared = tuple(axis for axis in range(int(stacked), array.ndim) if axis != channel)
        scales = np.abs(array).max(axis=shared, keepdims=True) / 127
        assert (np.abs(found[path] - array) <= 0.5001 * scales).all(), path
        assert not np.array_equal(found[path], array)


def test_int8_weights_load_as_bfloat16_and_as_lists_of_layers_with_the_same_values(int8_checkpoint):
    folder, _ = int8_checkpoint
    exact = values(load_checkpoint(folder, dtype="float32"), "transformer")
    rounded = values(load_checkpoint(folder, dtype="bfloat16"), "transformer")
    for path, array in exact.items():
        np.testing.assert_array_equal(rounded[path], array.astype(ml_dtypes.bfloat16))
    listed = values(load_checkpoint(folder, dtype="float32", stacked=False), "transformer")
    np.testing.assert_array_equal(
        listed["blocks.0.image.attention.qkv.kernel"], exact["blocks.image.attention.qkv.kernel"][0]
    )


def test_a_module_of_listed_layers_is_stored_as_int8_as_its_stack_is(int8_checkpoint, tmp_path):
    folder, arrays = int8_checkpoint
    config = ModelConfig(clip_l=CONFIG.clip_l)
    save_checkpoint(tmp_path / "stacked", config, {"clip_l": arrays["clip_l"]})
    listed = load_checkpoint(tmp_path / "stacked", dtype="float32", stacked=False).components
    save_checkpoint(tmp_path / "listed", config, listed, int8=True)
    expected = values(load_checkpoint(folder, ["clip_l"]), "clip_l")
    for path, array in values(load_checkpoint(tmp_path / "listed"), "clip_l").items():
        np.testing.assert_array_equal(array, expected[path])


def test_an_int8_checkpoint_is_a_third_as_large(int8_checkpoint, small_checkpoint):
    def weights(folder: Path) -> int:
        return sum(file.stat().st_size for file in (folder / "transformer").rglob("*.[0-9]*"))

    assert weights(int8_checkpoint[0]) < weights(small_checkpoint) / 3


def test_a_weight_that_int8_cannot_store_is_named_and_nothing_is_left(tmp_path):
    arrays = random_parameters("clip_l")
    arrays["layers.qkv.kernel"][1, 2, 3] = np.nan
    with pytest.raises(ValueError, match=r"clip_l\.layers\.qkv\.kernel has 1 of \d+ weights that are NaN or infinite"):
        save_checkpoint(tmp_path / "new", ModelConfig(clip_l=CONFIG.clip_l), {"clip_l": arrays}, int8=True)
    assert list(tmp_path.iterdir()) == []


def test_lost_scales_are_named(int8_checkpoint, tmp_path):
    folder = Path(shutil.copytree(int8_checkpoint[0], tmp_path / "checkpoint"))
    (chunk,) = chunks(folder / "vae", "encoder.conv_in.kernel.int8_scales")
    chunk.unlink()
    assert_refused(folder, f"{chunk} is missing")


def test_one_component_loads_alone(clip_checkpoint):
    folder, arrays = clip_checkpoint
    loaded = load_checkpoint(folder, ["clip_g"], dtype="float32")
    assert tuple(loaded.components) == ("clip_g",)
    kernel = "layers.qkv.kernel"
    np.testing.assert_array_equal(values(loaded, "clip_g")[kernel], arrays["clip_g"][kernel])


def test_one_component_loads_though_another_is_damaged(damaged):
    shutil.rmtree(damaged / "clip_l")
    load_checkpoint(damaged, ["clip_g"])
    with pytest.raises(CheckpointError, match="clip_l"):
        load_checkpoint(damaged, ["clip_l"])


def test_the_configuration_is_read_without_weights(damaged):
    shutil.rmtree(damaged / "clip_l")
    assert read_config(damaged) == CLIP


def test_the_tokenizers_of_the_loaded_encoders_are_found(small_checkpoint):
    assert set(load_checkpoint(small_checkpoint, ["vae", "clip_g"]).tokenizers) == {"clip_g"}
    folder = load_checkpoint(small_checkpoint, ["clip_g"]).tokenizers["clip_g"]
    assert (folder / "merges.txt").is_file()


# The directory


def test_every_file_is_accounted_for_with_its_size(small_checkpoint):
    recorded = json.loads((small_checkpoint / "config.json").read_text())["files"]
    found = {
        file.relative_to(small_checkpoint).as_posix(): file.stat().st_size
        for file in small_checkpoint.rglob("*")
        if file.is_file()
    }
    found.pop("config.json")
    assert recorded == found
    assert {name.split("/")[0] for name in found} == {*CONFIG.components, "tokenizers"}


def test_where_the_weights_came_from_is_recorded(clip_checkpoint):
    assert json.loads((clip_checkpoint[0] / "config.json").read_text())["source"] == {"name": "a test"}


def test_a_checkpoint_can_be_moved(clip_checkpoint, tmp_path):
    folder = Path(shutil.copytree(clip_checkpoint[0], tmp_path / "elsewhere"))
    kernel = "layers.qkv.kernel"
    found = values(load_checkpoint(folder, ["clip_l"], dtype="float32"), "clip_l")
    np.testing.assert_array_equal(found[kernel], clip_checkpoint[1]["clip_l"][kernel])


def test_a_relative_path_is_understood(clip_checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_checkpoint("made/here", CLIP, clip_checkpoint[1])
    assert read_config(tmp_path / "made" / "here") == CLIP
    assert tuple(load_checkpoint("made/here").components) == CLIP.components


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o755), (0o077, 0o700)])
def test_a_checkpoint_has_the_permissions_of_any_new_folder(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        save_checkpoint(tmp_path / "checkpoint", ModelConfig(), {})
    finally:
        os.umask(before)
    assert (tmp_path / "checkpoint").stat().st_mode & 0o777 == mode


# Refusals


def test_an_existing_destination_is_refused_and_left_alone(clip_checkpoint, tmp_path):
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine").write_text("precious")
    with pytest.raises(FileExistsError, match="already exists"):
        save_checkpoint(tmp_path / "checkpoint", CLIP, clip_checkpoint[1])
    assert [file.read_text() for file in (tmp_path / "checkpoint").iterdir()] == ["precious"]


def test_components_that_the_configuration_does_not_have_are_refused(clip_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="clip_g"):
        save_checkpoint(tmp_path / "checkpoint", ModelConfig(clip_l=CONFIG.clip_l), clip_checkpoint[1])
    assert list(tmp_path.iterdir()) == []


def test_a_failure_while_writing_leaves_nothing_behind(clip_checkpoint, tmp_path):
    def source():
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        save_checkpoint(tmp_path / "checkpoint", CLIP, clip_checkpoint[1], source=source)
    assert list(tmp_path.iterdir()) == []


def assert_refused(folder: Path, *fragments: str, **options) -> None:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(folder, **options)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("param", ["layers.qkv.kernel", "token_embed.embedding"])
def test_a_missing_chunk_is_named(param, damaged):
    chunk = chunks(damaged / "clip_g", param)[-1]
    chunk.unlink()
    assert_refused(damaged, f"{chunk} is missing")


@pytest.mark.parametrize("param", ["layers.qkv.kernel", "token_embed.embedding"])
def test_a_truncated_chunk_is_named(param, damaged):
    chunk = chunks(damaged / "clip_g", param)[-1]
    size = chunk.stat().st_size
    os.truncate(chunk, size - 1)
    assert_refused(damaged, str(chunk), f"{size - 1} bytes in place of {size}")


def test_missing_metadata_is_named(damaged):
    metadata = damaged / "clip_g" / "_METADATA"
    metadata.unlink()
    assert_refused(damaged, f"{metadata} is missing")


def test_a_missing_tokenizer_file_is_named(small_checkpoint, tmp_path):
    folder = Path(shutil.copytree(small_checkpoint, tmp_path / "checkpoint"))
    (folder / "tokenizers" / "clip_l" / "merges.txt").unlink()
    assert_refused(folder, "merges.txt is missing", components=["clip_l"])


def test_a_component_that_the_checkpoint_does_not_have_is_named(clip_checkpoint):
    assert_refused(clip_checkpoint[0], "t5", "clip_l, clip_g", components=["clip_l", "t5"])


def test_parameters_are_replaced_by_their_paths_alone(clip_checkpoint):
    module = load_checkpoint(clip_checkpoint[0], stacked=False).components["clip_l"]
    paths = ("layers.1.qkv.bias", "token_embed.embedding")
    changed = parameters(with_parameters(module, {path: path for path in paths}))
    assert {path: changed[path] for path in paths} == {path: path for path in paths}
    assert all(changed[path] is array for path, array in parameters(module).items() if path not in paths)


def test_an_unsupported_dtype_is_named(clip_checkpoint):
    with pytest.raises(ValueError, match="float16"):
        load_checkpoint(clip_checkpoint[0], dtype="float16")


def test_a_folder_that_is_no_checkpoint_is_refused_with_the_remedy(tmp_path):
    assert_refused(tmp_path, f"{tmp_path} is not a checkpoint", "sd35flash-jax convert")
    assert_refused(tmp_path / "nothing", "is not a checkpoint")


@pytest.mark.parametrize("content", ['{"_class_name": "SD3Transformer2DModel"}', "[]", "null", '{"format": 99}'])
def test_a_configuration_of_another_kind_is_refused_with_the_remedy(content, tmp_path):
    (tmp_path / "config.json").write_text(content)
    assert_refused(tmp_path, str(tmp_path), "convert")


def change_header(folder: Path, **changes) -> None:
    header = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(header | changes))


@pytest.mark.parametrize("content", ["", "{", "\xff"])
def test_a_damaged_configuration_is_named(content, damaged):
    (damaged / "config.json").write_bytes(content.encode("latin-1"))
    assert_refused(damaged, str(damaged / "config.json"))


@pytest.mark.parametrize("missing", ["model", "files"])
def test_a_header_without_one_of_its_parts_is_refused(missing, damaged):
    header = json.loads((damaged / "config.json").read_text())
    del header[missing]
    (damaged / "config.json").write_text(json.dumps(header))
    assert_refused(damaged, str(damaged / "config.json"))


def test_an_invalid_model_configuration_is_refused_by_field(damaged):
    model = CLIP.to_json()
    model["clip_l"]["layers"] = "three"
    change_header(damaged, model=model)
    assert_refused(damaged, str(damaged / "config.json"), "clip_l.layers")


def test_a_configuration_that_contradicts_the_weights_is_refused_by_parameter(damaged):
    model = CLIP.to_json()
    model["clip_l"]["feed_forward_size"] = 65
    change_header(damaged, model=model)
    assert_refused(damaged, "clip_l", "layers.linear_1", "65", components=["clip_l"])


def test_a_component_loads_though_the_tokenizer_of_another_is_gone(small_checkpoint, tmp_path):
    shutil.copytree(small_checkpoint, tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "tokenizers" / "t5")
    assert set(load_checkpoint(tmp_path / "copy", ("clip_l", "clip_g")).tokenizers) == {"clip_l", "clip_g"}
    with pytest.raises(CheckpointError, match=r"tokenizers/t5/.* is missing"):
        load_checkpoint(tmp_path / "copy", ("t5",))


def test_a_failed_save_takes_back_the_folders_it_made(tmp_path):
    def fail():
        raise ValueError("stop here")

    with pytest.raises(ValueError, match="stop here"):
        save_checkpoint(tmp_path / "new" / "deep" / "checkpoint", ModelConfig(), {}, source=fail)
    assert list(tmp_path.iterdir()) == []


def test_only_files_of_a_tokenizer_are_copied_and_a_dangling_link_is_named(tmp_path):
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text("{}")
    (tokenizer / "extra.py").write_text("raise SystemExit")
    save_checkpoint(tmp_path / "checkpoint", ModelConfig(), {}, {"t5": tokenizer})
    copied = tmp_path / "checkpoint" / "tokenizers" / "t5"
    assert [file.name for file in copied.iterdir()] == ["tokenizer.json"]
    (tokenizer / "spiece.model").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"spiece\.model is a link to a file that is not there"):
        save_checkpoint(tmp_path / "other", ModelConfig(), {}, {"t5": tokenizer})


def test_nothing_is_left_of_a_folder_that_was_still_written_into_when_it_was_given_up(tmp_path, monkeypatch):
    remove, late = shutil.rmtree, [True]

    def remove_while_written(path: Path, **options: bool) -> None:
        remove(path, **options)
        if late and late.pop():
            path.mkdir()
            (path / "chunk").write_text("late")

    monkeypatch.setattr(shutil, "rmtree", remove_while_written)
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "model") as folder:
        folder.mkdir()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_a_writer_makes_anew_after_an_interrupt_is_removed_again(tmp_path):
    with pytest.raises(KeyboardInterrupt), written_whole(tmp_path / "model") as folder:
        folder.mkdir()
        late = threading.Timer(0.25, lambda: (folder / "transformer").mkdir(parents=True))
        late.start()
        raise KeyboardInterrupt
    late.join()
    assert list(tmp_path.iterdir()) == []
