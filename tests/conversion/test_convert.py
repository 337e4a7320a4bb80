import json
import os
import shutil
import signal
import subprocess
from collections import namedtuple
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from conversion import ConversionError, convert
from conversion.safetensors_file import Tensor
from sd35flash_jax.checkpoint import load_checkpoint, parameters
from sd35flash_jax.config import ModelConfig
from tests.diffusers_source import change_config, change_tensors, save_tensors, source_tensors, weights_file
from tests.diffusers_source import write_folder as write_source
from tests.tiny_model import CONFIG

DiskUsage = namedtuple("DiskUsage", "total used free")
CLIP_COMPONENTS = ("clip_l", "clip_g")
BIAS = "text_model.encoder.layers.1.mlp.fc1.bias"
OTHER_BIAS = "text_model.encoder.layers.2.self_attn.k_proj.bias"


@pytest.fixture(scope="module")
def clip_source(tmp_path_factory) -> tuple[Path, dict[str, dict[str, np.ndarray]]]:
    """A source of the two CLIP encoders, and the parameters it must give. Read it only."""
    folder = tmp_path_factory.mktemp("source") / "clips"
    return folder, write_source(folder, CLIP_COMPONENTS)


@pytest.fixture
def source(clip_source, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(clip_source[0], tmp_path / "source"))


def stored_dtype(checkpoint: Path, component: str, param: str) -> str:
    return json.loads((checkpoint / component / param / ".zarray").read_text())["dtype"]


def loaded(checkpoint: Path, component: str) -> dict[str, np.ndarray]:
    module = load_checkpoint(checkpoint, [component], dtype="float32").components[component]
    return {path: np.asarray(array) for path, array in parameters(module).items()}


def assert_holds(checkpoint: Path, expected: dict[str, dict[str, np.ndarray]]) -> None:
    for component, arrays in expected.items():
        found = loaded(checkpoint, component)
        assert set(found) == set(arrays)
        for path, array in arrays.items():
            np.testing.assert_array_equal(found[path], array, err_msg=f"{component} {path}")


def refused(source: Path, *fragments: str, error: type[Exception] = ConversionError, **options: Any) -> str:
    """Convert, expect one sentence of error that holds every fragment, and nothing new beside the source."""
    before = set(source.parent.iterdir())
    with pytest.raises(error) as caught:
        convert(source, source.parent / "checkpoint", **options)
    message = str(caught.value)
    for fragment in fragments:
        assert fragment in message
    assert "\n" not in message
    assert set(source.parent.iterdir()) == before
    return message


# What comes out


def test_every_parameter_arrives_bit_by_bit(tmp_path):
    expected = write_source(tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "checkpoint") == CONFIG
    assert_holds(tmp_path / "checkpoint", expected)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "checkpoint"}


def test_a_source_may_have_only_some_components(clip_source, tmp_path):
    folder, expected = clip_source
    config = convert(folder, tmp_path / "checkpoint")
    assert config == ModelConfig(clip_l=CONFIG.clip_l, clip_g=CONFIG.clip_g)
    assert_holds(tmp_path / "checkpoint", expected)
    assert set(load_checkpoint(tmp_path / "checkpoint").tokenizers) == set(CLIP_COMPONENTS)


def test_tokenizers_are_copied_whole(clip_source, tmp_path):
    folder, _ = clip_source
    convert(folder, tmp_path / "checkpoint")
    for name, sub in (("clip_l", "tokenizer"), ("clip_g", "tokenizer_2")):
        copied = tmp_path / "checkpoint" / "tokenizers" / name
        assert {file.name for file in copied.iterdir()} == {file.name for file in (folder / sub).iterdir()}
        for file in copied.iterdir():
            assert file.read_bytes() == (folder / sub / file.name).read_bytes()


@pytest.mark.parametrize("dtype, stored", [(np.float32, "<f4"), (np.float16, "<f2"), (ml_dtypes.bfloat16, "bfloat16")])
def test_weights_keep_the_dtype_of_the_source(dtype, stored, source, clip_source, tmp_path):
    expected = {path: array.astype(dtype) for path, array in clip_source[1]["clip_l"].items()}
    shutil.rmtree(source / "text_encoder_2")
    save_tensors(source_tensors("clip_l", expected), weights_file(source, "clip_l"))
    convert(source, tmp_path / "checkpoint")
    assert stored_dtype(tmp_path / "checkpoint", "clip_l", "layers.qkv.kernel") == stored
    widened = {path: array.astype(np.float32) for path, array in expected.items()}
    assert_holds(tmp_path / "checkpoint", {"clip_l": widened})


def test_weights_are_cast_on_request(clip_source, tmp_path):
    folder, expected = clip_source
    convert(folder, tmp_path / "checkpoint", dtype="bfloat16")
    assert stored_dtype(tmp_path / "checkpoint", "clip_g", "layers.qkv.kernel") == "bfloat16"
    rounded = {
        component: {path: array.astype(ml_dtypes.bfloat16).astype(np.float32) for path, array in arrays.items()}
        for component, arrays in expected.items()
    }
    assert_holds(tmp_path / "checkpoint", rounded)


def test_layers_of_different_dtypes_are_stacked_in_float32(source, tmp_path):
    change_tensors(source, "clip_l", lambda tensors: tensors.update({BIAS: tensors[BIAS].astype(np.float16)}))
    tensors = load_file(weights_file(source, "clip_l"))
    convert(source, tmp_path / "checkpoint")
    assert stored_dtype(tmp_path / "checkpoint", "clip_l", "layers.linear_1.bias") == "<f4"
    np.testing.assert_array_equal(loaded(tmp_path / "checkpoint", "clip_l")["layers.linear_1.bias"][1], tensors[BIAS])


def split_in_shards(source: Path, name: str, index: str) -> list[Path]:
    whole = weights_file(source, name)
    items = sorted(load_file(whole).items())
    whole.unlink()
    shards = [whole.with_name(f"{whole.stem}-0000{number}-of-00002.safetensors") for number in (1, 2)]
    halves = [dict(items[::2]), dict(items[1::2])]
    for shard, tensors in zip(shards, halves, strict=True):
        save_tensors(tensors, shard)
    weight_map = {key: shard.name for shard, tensors in zip(shards, halves, strict=True) for key in tensors}
    (whole.parent / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return shards


@pytest.mark.parametrize("index", ["model.safetensors.index.json", "model.safetensors.index.fp16.json"])
def test_shards_give_what_one_file_gives(index, source, clip_source, tmp_path):
    split_in_shards(source, "clip_l", index)
    convert(source, tmp_path / "checkpoint")
    assert_holds(tmp_path / "checkpoint", clip_source[1])


def test_the_fp16_variant_is_read_where_it_is_the_only_one(source, clip_source, tmp_path):
    file = weights_file(source, "clip_l")
    file.rename(file.with_name("model.fp16.safetensors"))
    convert(source, tmp_path / "checkpoint")
    assert_holds(tmp_path / "checkpoint", clip_source[1])


def test_the_hash_of_every_weight_file_is_recorded(source, tmp_path):
    files = [*split_in_shards(source, "clip_l", "model.safetensors.index.json"), weights_file(source, "clip_g")]
    convert(source, tmp_path / "checkpoint")
    recorded = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["source"]["sha256"]
    assert recorded == {file.relative_to(source).as_posix(): sha256(file.read_bytes()).hexdigest() for file in files}


def test_a_tensor_repeated_under_its_second_name_is_accepted(tmp_path):
    expected = write_source(tmp_path / "source", ["t5"])
    repeat = lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors["shared.weight"]})  # noqa: E731
    change_tensors(tmp_path / "source", "t5", repeat)
    convert(tmp_path / "source", tmp_path / "checkpoint")
    assert_holds(tmp_path / "checkpoint", expected)


def test_a_tensor_stored_under_its_second_name_alone_is_accepted(tmp_path):
    expected = write_source(tmp_path / "source", ["t5"])
    rename = lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors.pop("shared.weight")})  # noqa: E731
    change_tensors(tmp_path / "source", "t5", rename)
    convert(tmp_path / "source", tmp_path / "checkpoint")
    assert_holds(tmp_path / "checkpoint", expected)


def test_a_second_name_with_other_values_is_refused(tmp_path):
    write_source(tmp_path / "source", ["t5"])
    differ = lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors["shared.weight"] + 1})  # noqa: E731
    change_tensors(tmp_path / "source", "t5", differ)
    refused(tmp_path / "source", "encoder.embed_tokens.weight", "shared.weight")


def test_a_stored_list_of_positions_is_no_parameter(source, clip_source, tmp_path):
    positions = {"text_model.embeddings.position_ids": np.arange(77)[None]}
    change_tensors(source, "clip_l", lambda tensors: tensors.update(positions))
    convert(source, tmp_path / "checkpoint")
    assert_holds(tmp_path / "checkpoint", clip_source[1])


# What is refused: damaged tensors


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_refused_by_name(kept, source):
    file = weights_file(source, "clip_g")
    content = file.read_bytes()
    file.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    refused(source, str(file))


def test_a_file_with_more_than_its_header_says_is_refused_by_name(source):
    file = weights_file(source, "clip_g")
    file.write_bytes(file.read_bytes() + b"\0")
    refused(source, str(file))


def test_a_file_that_is_no_safetensors_is_refused_by_name(source):
    file = weights_file(source, "clip_g")
    file.write_bytes(b"<html>404 Not Found</html>" * 100)
    refused(source, str(file))


def test_missing_tensors_are_named_all_at_once(source):
    change_tensors(source, "clip_l", lambda tensors: (tensors.pop(BIAS), tensors.pop(OTHER_BIAS)))
    refused(source, "clip_l", f"missing tensors: {BIAS}, {OTHER_BIAS}")


def test_surplus_tensors_are_named_all_at_once(source):
    change_tensors(source, "clip_l", lambda tensors: tensors.update(one=np.ones(2), two=np.ones(2)))
    refused(source, "clip_l", "surplus tensors: one, two")


def test_wrong_shapes_are_named_with_the_expected_ones_all_at_once(source):
    change_tensors(source, "clip_l", lambda tensors: tensors.update({BIAS: np.ones(3), OTHER_BIAS: np.ones((32, 1))}))
    message = refused(source, "clip_l", "wrong shapes")
    assert f"{BIAS} (shape (3,), expected (64,))" in message
    assert f"{OTHER_BIAS} (shape (32, 1), expected (32,))" in message


def test_faults_of_different_kinds_are_named_together(source):
    change_tensors(source, "clip_l", lambda tensors: tensors.update({BIAS: np.ones(3), "more": np.ones(2)}))
    change_tensors(source, "clip_l", lambda tensors: tensors.pop(OTHER_BIAS))
    refused(source, f"missing tensors: {OTHER_BIAS}", "surplus tensors: more", f"wrong shapes: {BIAS}")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("key", [BIAS, OTHER_BIAS, "text_model.final_layer_norm.weight"])
def test_a_weight_that_is_not_finite_is_refused_by_name(value, dtype, key, source):
    change_tensors(source, "clip_g", lambda tensors: tensors[key].__setitem__(3, value))
    refused(source, f"{key} holds NaN or infinite", dtype=dtype)


def test_a_weight_too_large_for_the_requested_dtype_is_refused_by_name(source):
    largest = np.finfo(np.float32).max
    change_tensors(source, "clip_g", lambda tensors: tensors[BIAS].__setitem__(0, largest))
    refused(source, BIAS, dtype="bfloat16")


def test_an_unsupported_tensor_dtype_is_named(source):
    change_tensors(source, "clip_g", lambda tensors: tensors.update({BIAS: tensors[BIAS] > 0}))
    refused(source, str(weights_file(source, "clip_g")), "BOOL")


# What is refused: files and folders


def test_a_tensor_in_two_shards_is_refused_by_name(source):
    shards = split_in_shards(source, "clip_l", "model.safetensors.index.json")
    tensors = [load_file(shard) for shard in shards]
    save_tensors(tensors[1] | {BIAS: np.ones(64, np.float32)}, shards[1])
    save_tensors(tensors[0] | {BIAS: np.ones(64, np.float32)}, shards[0])
    refused(source, BIAS, str(shards[0]), str(shards[1]))


def test_a_missing_shard_is_named(source):
    shards = split_in_shards(source, "clip_l", "model.safetensors.index.json")
    shards[1].unlink()
    refused(source, f"{shards[1]} does not exist")


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "{absolute}"])
def test_an_index_that_names_a_file_outside_its_folder_is_refused(name, source):
    elsewhere = source / "elsewhere.safetensors"
    weights_file(source, "clip_l").rename(elsewhere)
    name = name.format(absolute=elsewhere)
    index = source / "text_encoder" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {BIAS: name}}))
    refused(source, str(index), repr(name))


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "\xff"])
def test_a_damaged_index_is_refused_by_name(content, source):
    weights_file(source, "clip_l").unlink()
    index = source / "text_encoder" / "model.safetensors.index.json"
    index.write_bytes(content.encode("latin-1"))
    refused(source, str(index))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt", "model.pt"])
def test_pickled_weights_are_refused(name, source):
    file = weights_file(source, "clip_l")
    file.rename(file.with_name(name))
    refused(source, name, "pickle")


def test_a_component_without_weights_is_refused(source):
    weights_file(source, "clip_l").unlink()
    refused(source, str(source / "text_encoder"), "no weights")


def test_a_missing_component_configuration_is_named(source):
    (source / "text_encoder_2" / "config.json").unlink()
    refused(source, f"{source / 'text_encoder_2' / 'config.json'} does not exist")


@pytest.mark.parametrize("content", ["", "{", "[1]", "null", "\xff", '"{}"', "[" * 100_000])
def test_a_damaged_component_configuration_is_refused_by_name(content, source):
    file = source / "text_encoder_2" / "config.json"
    file.write_bytes(content.encode("latin-1"))
    refused(source, str(file))


def test_a_source_that_is_not_there_is_named(tmp_path):
    (tmp_path / "x").mkdir()
    refused(tmp_path / "x" / "nothing", str(tmp_path / "x" / "nothing"))


def test_a_folder_without_components_is_refused(tmp_path):
    (tmp_path / "source").mkdir()
    refused(tmp_path / "source", "transformer/", "text_encoder_3/")


def test_an_unsupported_dtype_is_refused(source):
    refused(source, "float8", "bfloat16", dtype="float8")


# What is refused: configurations


@pytest.fixture(scope="module")
def whole_source(tmp_path_factory) -> Path:
    """A source of all components, without weights: configurations are read first. Read it only."""
    folder = tmp_path_factory.mktemp("whole") / "source"
    write_source(folder)
    for file in folder.rglob("*.safetensors"):
        file.unlink()
    return folder


@pytest.mark.parametrize(
    "sub, key, value",
    [
        ("transformer", "qk_norm", "layer_norm"),
        ("transformer", "dual_attention_layers", [1, 2]),
        ("transformer", "out_channels", 8),
        ("transformer", "caption_projection_dim", 100),
        ("vae", "use_quant_conv", True),
        ("vae", "use_post_quant_conv", True),
        ("vae", "mid_block_add_attention", False),
        ("vae", "act_fn", "relu"),
        ("vae", "in_channels", 4),
        ("vae", "up_block_types", ["AttnUpDecoderBlock2D"] * 4),
        ("text_encoder_3", "feed_forward_proj", "relu"),
        ("scheduler", "_class_name", "EulerDiscreteScheduler"),
        ("scheduler", "use_dynamic_shifting", True),
        ("scheduler", "use_karras_sigmas", True),
        ("scheduler", "invert_sigmas", True),
        ("scheduler", "stochastic_sampling", True),
        ("scheduler", "num_train_timesteps", 500),
    ],
)
def test_an_unsupported_configuration_is_refused_by_field(sub, key, value, whole_source, tmp_path):
    source = Path(shutil.copytree(whole_source, tmp_path / "source"))
    change_config(source, sub, **{key: value})
    refused(source, key, repr(value), "T5" if sub == "text_encoder_3" else sub)


@pytest.mark.parametrize(
    "sub, key, value",
    [
        ("transformer", "num_layers", 0),
        ("transformer", "num_layers", "four"),
        ("transformer", "num_attention_heads", None),
        ("transformer", "patch_size", -2),
        ("transformer", "joint_attention_dim", 10**12),
        ("transformer", "sample_size", "128"),
        ("transformer", "sample_size", None),
        ("transformer", "patch_size", 0),
        ("transformer", "num_attention_heads", [4]),
        ("transformer", "dual_attention_layers", 3),
        ("vae", "block_out_channels", [32, 64]),
        ("vae", "block_out_channels", 32),
        ("vae", "scaling_factor", None),
        ("text_encoder", "hidden_act", "relu"),
        ("text_encoder", "eos_token_id", -1),
        ("text_encoder", "hidden_size", 2.5),
        ("text_encoder_3", "d_model", None),
        ("scheduler", "shift", -1.0),
        ("scheduler", "shift", "three"),
    ],
)
def test_an_impossible_configuration_value_is_refused(sub, key, value, whole_source, tmp_path):
    source = Path(shutil.copytree(whole_source, tmp_path / "source"))
    change_config(source, sub, **{key: value})
    refused(source)


# What is refused: the destination


@pytest.mark.parametrize("kind", ["folder", "file", "dangling link"])
def test_an_existing_destination_is_refused_and_left_alone(kind, source):
    destination = source.parent / "checkpoint"
    if kind == "folder":
        destination.mkdir()
        (destination / "mine").write_text("precious")
    elif kind == "file":
        destination.write_text("precious")
    else:
        destination.symlink_to("nowhere")
    refused(source, str(destination), "already exists", error=FileExistsError)
    if kind == "folder":
        assert (destination / "mine").read_text() == "precious"
    elif kind == "file":
        assert destination.read_text() == "precious"
    else:
        assert os.readlink(destination) == "nowhere"


def test_too_little_space_is_refused_before_anything_is_written(source, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: DiskUsage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(Tensor, "read", lambda tensor: pytest.fail("a tensor was read"))
    refused(source, str(source.parent), "free", error=OSError)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 256 KiB, less than the checkpoint needs."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_leaves_nothing_behind(small_disk, clip_source, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: DiskUsage(10**9, 0, 10**9))
    with pytest.raises(OSError) as caught:
        convert(clip_source[0], small_disk / "checkpoint")
    assert "space" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert list(small_disk.iterdir()) == []


# Interruptions


def failing_at(read: int, fail, monkeypatch) -> None:
    """Call `fail` in place of the given reading of a tensor."""
    count = iter(range(10**6))
    original = Tensor.read

    def counted(tensor: Tensor) -> np.ndarray:
        if next(count) == read:
            fail()
        return original(tensor)

    monkeypatch.setattr(Tensor, "read", counted)


@pytest.mark.parametrize("read", [0, 30, 75])
def test_an_interrupt_leaves_nothing_behind(read, source, monkeypatch):
    failing_at(read, lambda: signal.raise_signal(signal.SIGINT), monkeypatch)
    refused(source, error=KeyboardInterrupt)  # type: ignore[arg-type]


@pytest.mark.parametrize("read", [0, 30, 75])
def test_a_failing_read_leaves_nothing_behind(read, source, monkeypatch):
    def fail() -> None:
        raise OSError(5, "Input/output error")

    failing_at(read, fail, monkeypatch)
    refused(source, "Input/output error", error=OSError)


def test_the_source_is_not_changed(source):
    before = {file: file.read_bytes() for file in source.rglob("*") if file.is_file()}
    convert(source, source.parent / "checkpoint")
    assert {file: file.read_bytes() for file in source.rglob("*") if file.is_file()} == before
