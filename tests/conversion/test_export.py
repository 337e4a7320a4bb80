"""The way back, and every way round: what is exported is what was converted, bit by bit."""

import json
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file
from transformers import AutoTokenizer

from conversion import ConversionError, convert, export
from conversion import diffusers_layout as layout
from conversion.safetensors_file import Tensor, find_weights, open_all, open_safetensors
from sd35flash_jax.checkpoint import (
    CheckpointError,
    load_checkpoint,
    open_stored,
    parameters,
    read_config,
    save_checkpoint,
)
from sd35flash_jax.cli import main
from sd35flash_jax.config import COMPONENTS, CLIPConfig, MMDiTConfig, ModelConfig, ScheduleConfig, T5Config, VAEConfig
from sd35flash_jax.text import load_tokenizer
from tests.conversion.single_file_source import SMALL, write_file
from tests.conversion.test_convert import assert_holds, loaded
from tests.diffusers_source import source_config
from tests.diffusers_source import write_folder as write_diffusers_folder
from tests.tiny_model import CONFIG, random_parameters

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has the shape of no published model"),
    pytest.mark.filterwarnings("ignore:the checkpoint has no tokenizer"),
    pytest.mark.filterwarnings("ignore:a single file cannot say"),
]


def assert_same_tensors(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """The same names, dtypes and bytes."""
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert found[key].read().tobytes() == tensor.read().tobytes(), key


def folder_tensors(folder: Path) -> dict[str, dict[str, Tensor]]:
    return {
        name: open_all(find_weights(folder / sub, layout.STEMS[name]))
        for name, sub in layout.FOLDERS.items()
        if (folder / sub).is_dir()
    }


# Every way round, for random models


def multiples(of: int, most: int) -> st.SearchStrategy[int]:
    return st.integers(1, most).map(lambda count: count * of)


@st.composite
def transformers(draw) -> MMDiTConfig:
    depth, qk_norm = draw(st.integers(1, 4)), draw(st.booleans())
    return MMDiTConfig(
        depth=depth,
        heads=draw(st.integers(1, 3)),
        head_size=draw(st.sampled_from([8, 16])) if qk_norm else 64,
        patch_size=draw(st.integers(1, 2)),
        latent_channels=draw(st.integers(1, 4)),
        context_size=draw(st.integers(1, 40)),
        pooled_size=draw(st.integers(1, 40)),
        position_table_side=draw(st.integers(1, 8)),
        qk_norm=qk_norm,
        dual_attention_blocks=draw(st.integers(0, depth)),
    )


def vaes() -> st.SearchStrategy[VAEConfig]:
    widths = multiples(32, 3)
    return st.builds(
        VAEConfig,
        channels=st.tuples(widths, widths, widths, widths),
        blocks_per_level=st.integers(1, 2),
        latent_channels=st.integers(1, 4),
    )


@st.composite
def clips(draw, activation: str) -> CLIPConfig:
    heads = draw(st.integers(1, 2))
    sizes = [draw(st.integers(1, 40)) for _ in range(3)]
    width = 64 * heads
    return CLIPConfig(
        width,
        draw(st.integers(1, 3)),
        heads,
        sizes[0],
        width,
        activation,  # type: ignore[arg-type]
        vocabulary=sizes[1],
        positions=sizes[2],
    )


def t5s() -> st.SearchStrategy[T5Config]:
    size = st.integers(1, 40)
    return st.builds(
        T5Config,
        hidden_size=size,
        layers=st.integers(1, 3),
        heads=st.integers(1, 3),
        head_size=st.integers(1, 8),
        feed_forward_size=size,
        vocabulary=size,
        position_buckets=st.integers(4, 40),
    )


KINDS = {
    "transformer": transformers(),
    "vae": vaes(),
    "clip_l": clips("quick_gelu"),
    "clip_g": clips("gelu"),
    "t5": t5s(),
}


@st.composite
def models(draw) -> ModelConfig:
    """One component or two, which fit each other."""
    names = draw(st.sets(st.sampled_from(COMPONENTS), min_size=1, max_size=2))
    config = ModelConfig(**{name: draw(KINDS[name]) for name in names})
    if config.transformer is not None:
        width = max((config.clip_l or config.clip_g or config.transformer).hidden_size, 40)
        changes = {
            "latent_channels": config.vae.latent_channels if config.vae else config.transformer.latent_channels,
            "context_size": config.t5.hidden_size if config.t5 else width,
            "pooled_size": width,
        }
        config = replace(config, transformer=replace(config.transformer, **changes))
    return config


@settings(max_examples=8, deadline=None)
@given(
    models(),
    st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
    st.sampled_from(["diffusers", "single-file"]),
    st.sampled_from(["diffusers", "single-file"]),
)
def test_every_way_round_gives_the_same_tensors(tmp_path_factory, config, dtype, first, second):
    """checkpoint -> one layout -> checkpoint -> the other -> checkpoint -> the first again."""
    folder = tmp_path_factory.mktemp("round")
    arrays = {
        name: {path: array.astype(dtype) for path, array in random_parameters(name, 0, config).items()}
        for name in config.components
    }
    save_checkpoint(folder / "0", config, arrays)
    for number, kind in enumerate((first, second, first)):
        export(folder / f"{number}", folder / f"{number}.{kind}", kind)
        assert convert(folder / f"{number}.{kind}", folder / f"{number + 1}") == config
        for name, expected in arrays.items():
            for path, stored in open_stored(folder / f"{number + 1}", name, config).items():
                found = stored.read(stored.dtype)
                assert found.dtype == dtype
                assert found.tobytes() == expected[path].tobytes(), path
    start, end = folder / f"0.{first}", folder / f"2.{first}"
    if first == "single-file":
        assert start.read_bytes() == end.read_bytes()
    else:
        for name, tensors in folder_tensors(start).items():
            assert_same_tensors(folder_tensors(end)[name], tensors)
        files = [file.relative_to(start) for file in start.rglob("*") if file.is_file()]
        assert files == [file.relative_to(end) for file in end.rglob("*") if file.is_file()]
    shutil.rmtree(folder)


# From a source and back


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_a_single_file_comes_back_bit_by_bit(dtype, tmp_path):
    write_file(tmp_path / "model.safetensors", COMPONENTS, dtype=dtype)
    convert(tmp_path / "model.safetensors", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "again.safetensors", "single-file")
    found, expected = (open_safetensors(tmp_path / f"{name}.safetensors") for name in ("again", "model"))
    t5 = "text_encoders.t5xxl.transformer."
    # Both names of T5's embedding are written: readers differ in the one they look for.
    expected[t5 + "encoder.embed_tokens.weight"] = expected[t5 + "shared.weight"]
    assert_same_tensors(found, expected)


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    """The tiny model's `source` and its `checkpoint`. Read it only."""
    folder = tmp_path_factory.mktemp("converted")
    write_diffusers_folder(folder / "source")
    convert(folder / "source", folder / "checkpoint")
    return folder


def test_a_diffusers_folder_comes_back_bit_by_bit(converted, tmp_path):
    export(converted / "checkpoint", tmp_path / "again")
    expected = folder_tensors(converted / "source")
    assert set(expected) == set(COMPONENTS)
    for name, tensors in folder_tensors(tmp_path / "again").items():
        assert_same_tensors(tensors, expected[name])
    for name, sub in layout.FOLDERS.items():
        written = json.loads((tmp_path / "again" / sub / "config.json").read_text())
        assert written.items() >= source_config(getattr(CONFIG, name)).items()
    for sub in ("scheduler", *layout.TOKENIZER_FOLDERS.values()):
        for file in (converted / "source" / sub).iterdir():
            again = tmp_path / "again" / sub / file.name
            if sub == "scheduler":
                assert json.loads(again.read_text()) == json.loads(file.read_text())
            else:
                assert again.read_bytes() == file.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize("kind", ["diffusers", "single-file"])
def test_int8_weights_are_exported_as_the_float32_ones_that_they_stand_for(kind, tmp_path):
    config = ModelConfig(clip_l=CONFIG.clip_l)
    save_checkpoint(tmp_path / "int8", config, {"clip_l": random_parameters("clip_l")}, int8=True)
    export(tmp_path / "int8", tmp_path / "exported", kind)
    convert(tmp_path / "exported", tmp_path / "again")
    expected = parameters(load_checkpoint(tmp_path / "int8", dtype="float32").components["clip_l"])
    for path, stored in open_stored(tmp_path / "again", "clip_l", config).items():
        assert stored.dtype == np.float32
        np.testing.assert_array_equal(stored.read(stored.dtype), expected[path])


def test_the_number_of_t5_s_tokens_goes_round_through_the_diffusers_folder(tmp_path):
    config = ModelConfig(t5=replace(CONFIG.t5, max_tokens=32))
    save_checkpoint(tmp_path / "checkpoint", config, {"t5": random_parameters("t5")})
    export(tmp_path / "checkpoint", tmp_path / "exported")
    assert (
        json.loads((tmp_path / "exported" / "text_encoder_3" / "config.json").read_text())["max_sequence_length"] == 32
    )
    assert convert(tmp_path / "exported", tmp_path / "again") == config


def test_the_written_files_are_what_the_library_reads(converted, tmp_path):
    export(converted / "checkpoint", tmp_path / "model.safetensors", "single-file")
    mapped = {key: tensor.read() for key, tensor in open_safetensors(tmp_path / "model.safetensors").items()}
    read = load_file(tmp_path / "model.safetensors")
    assert set(read) == set(mapped)
    for key, tensor in read.items():
        np.testing.assert_array_equal(mapped[key], tensor)
    with safe_open(tmp_path / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_of_several_dtypes_are_aligned_to_theirs(tmp_path):
    arrays = random_parameters("clip_l")
    arrays |= {path: array.astype(np.float16) for path, array in arrays.items() if "bias" in path}
    odd = arrays["token_embed.embedding"].astype(np.float16)
    save_checkpoint(
        tmp_path / "checkpoint", ModelConfig(clip_l=CONFIG.clip_l), {"clip_l": arrays | {"token_embed.embedding": odd}}
    )
    export(tmp_path / "checkpoint", tmp_path / "model.safetensors", "single-file")
    tensors = open_safetensors(tmp_path / "model.safetensors").values()
    assert {tensor.dtype.itemsize for tensor in tensors} == {2, 4}
    assert all(tensor.offset % tensor.dtype.itemsize == 0 for tensor in tensors)


def test_large_components_are_written_in_shards(converted, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["conversion.export"], "SHARD_BYTES", 200_000)
    export(converted / "checkpoint", tmp_path / "again")
    shards = sorted((tmp_path / "again" / "transformer").glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert shards[0].name == f"diffusion_pytorch_model-00001-of-{count:05}.safetensors"
    index = json.loads((tmp_path / "again" / "text_encoder_3" / "model.safetensors.index.json").read_text())
    tensors = folder_tensors(tmp_path / "again")
    assert set(index["weight_map"]) == set(tensors["t5"])
    assert index["metadata"]["total_size"] == sum(t.size * t.dtype.itemsize for t in tensors["t5"].values())
    for name, expected in folder_tensors(converted / "source").items():
        assert_same_tensors(tensors[name], expected)


def test_a_checkpoint_of_some_components_says_so_in_its_index(tmp_path):
    write_diffusers_folder(tmp_path / "source", ["transformer", "clip_g"])
    convert(tmp_path / "source", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "again")
    index = json.loads((tmp_path / "again" / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "SD3Transformer2DModel"]
    assert index["text_encoder_2"][0] == index["tokenizer_2"][0] == "transformers"
    assert index["vae"] == index["text_encoder_3"] == index["tokenizer"] == [None, None]
    assert not (tmp_path / "again" / "vae").exists()


@pytest.mark.parametrize("kind", ["diffusers", "single-file"])
def test_weights_are_cast_on_request(kind, converted, tmp_path):
    export(converted / "checkpoint", tmp_path / "out", kind, dtype="bfloat16")
    files = [tmp_path / "out"] if kind == "single-file" else sorted((tmp_path / "out").rglob("*.safetensors"))
    assert len(files) == (1 if kind == "single-file" else len(COMPONENTS))
    dtypes = {tensor.dtype for file in files for tensor in open_safetensors(file).values()}
    assert dtypes == {np.dtype(ml_dtypes.bfloat16)}


def test_clip_gs_padding_survives_where_its_tokenizer_has_no_configuration(converted, tmp_path):
    shutil.copytree(converted / "source", tmp_path / "source")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "source" / "tokenizer_2" / name).unlink()
    convert(tmp_path / "source", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out")
    written = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer_2")
    ours = load_tokenizer("clip_g", tmp_path / "checkpoint" / "tokenizers" / "clip_g")
    options = {"padding": "max_length", "max_length": 77}
    assert written("a red fox", **options).input_ids == ours("a red fox", **options).input_ids
    assert written.pad_token == "!"


# What is refused or warned of


def refused(checkpoint: Path, destination: Path, *fragments: str, error: type[Exception], **options) -> None:
    before = set(destination.parent.iterdir())
    with pytest.raises(error) as caught:
        export(checkpoint, destination, **options)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    assert set(destination.parent.iterdir()) == before


@pytest.mark.parametrize("kind", ["diffusers", "single-file"])
def test_an_existing_destination_is_refused_and_left_alone(kind, converted, tmp_path):
    (tmp_path / "out").write_text("precious")
    refused(converted / "checkpoint", tmp_path / "out", "already exists", error=FileExistsError, layout=kind)
    assert (tmp_path / "out").read_text() == "precious"


@pytest.mark.parametrize("option, value", [("layout", "gguf"), ("dtype", "float8")])
def test_an_unsupported_option_is_refused(option, value, converted, tmp_path):
    refused(converted / "checkpoint", tmp_path / "out", value, error=ConversionError, **{option: value})


def test_no_checkpoint_is_refused(tmp_path):
    refused(tmp_path / "absent", tmp_path / "out", "absent is not a checkpoint", error=CheckpointError)


def test_a_damaged_checkpoint_is_refused(converted, tmp_path):
    shutil.copytree(converted / "checkpoint", tmp_path / "checkpoint")
    chunk = next((tmp_path / "checkpoint" / "vae").rglob("0.0.0.0"))
    chunk.write_bytes(chunk.read_bytes()[:-1])
    refused(tmp_path / "checkpoint", tmp_path / "out", str(chunk), error=CheckpointError)


@pytest.mark.parametrize("kind", ["diffusers", "single-file"])
@pytest.mark.parametrize("dtype, value", [(None, np.nan), ("bfloat16", np.finfo(np.float32).max)])
def test_a_weight_that_would_not_be_finite_is_refused_by_name(kind, dtype, value, tmp_path):
    arrays = random_parameters("clip_l")
    arrays["layers.linear_1.bias"][1, 3] = value
    save_checkpoint(tmp_path / "checkpoint", ModelConfig(clip_l=CONFIG.clip_l), {"clip_l": arrays})
    checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
    refused(checkpoint, out, "layers.linear_1.bias", error=ConversionError, layout=kind, dtype=dtype)


@pytest.mark.parametrize("kind", ["diffusers", "single-file"])
def test_an_interrupt_leaves_nothing_behind(kind, converted, tmp_path, monkeypatch):
    def interrupt(array):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["conversion.export"], "is_finite", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(converted / "checkpoint", tmp_path / "out", kind)
    assert list(tmp_path.iterdir()) == []


def test_what_a_layout_cannot_say_is_warned_of(tmp_path):
    schedule = ScheduleConfig(shift=2.0, sigmas=((1.0, 0.5),))
    config = ModelConfig(clip_g=CONFIG.clip_g, schedule=schedule)
    save_checkpoint(tmp_path / "checkpoint", config, {"clip_g": random_parameters("clip_g")})
    with pytest.warns(UserWarning) as caught:
        export(tmp_path / "checkpoint", tmp_path / "out", "single-file")
    messages = [str(warning.message) for warning in caught]
    assert any("sigmas" in message for message in messages)
    assert any("schedule.shift, clip_g.heads, clip_g.eos_token_id:" in message for message in messages)


# The command line


def test_the_command_line_converts_from_several_sources_and_exports(tmp_path, capsys):
    expected = write_file(tmp_path / "model.safetensors", ["transformer", "vae"])
    others = write_file(tmp_path / "others.safetensors", ["vae", "clip_l", "clip_g", "t5"])
    write_diffusers_folder(tmp_path / "folder", ["clip_l"])
    others_file = str(tmp_path / "others.safetensors")
    options = ["--clip-l", others_file, "--clip-g", others_file, "--t5", others_file]
    options += ["--tokenizers", str(tmp_path / "folder")]
    checkpoint = tmp_path / "checkpoint"
    assert main(["convert", str(tmp_path / "model.safetensors"), str(checkpoint), *options]) == 0
    assert capsys.readouterr().out == f"{checkpoint}\n"
    assert read_config(checkpoint) == SMALL
    assert_holds(checkpoint, {**others, **expected})

    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 0
    single = ["--layout", "single-file", "--dtype", "bfloat16"]
    assert main(["export", str(checkpoint), str(tmp_path / "out.safetensors"), *single]) == 0
    captured = capsys.readouterr()
    assert captured.out == f"{tmp_path / 'out'}\n{tmp_path / 'out.safetensors'}\n"
    assert "exporting" in captured.err
    assert main(["export", str(checkpoint), str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'out'} already exists" in capsys.readouterr().err
    convert(tmp_path / "out", tmp_path / "again")
    for name in COMPONENTS:
        found = loaded(tmp_path / "again", name)
        for path, array in loaded(checkpoint, name).items():
            np.testing.assert_array_equal(found[path], array)
    assert not [name for name in os.listdir(tmp_path) if "partial" in name]
