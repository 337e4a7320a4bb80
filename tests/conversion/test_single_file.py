"""Stability's single files: what is found in them, and what comes out."""

import json
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file

from conversion import ConversionError, convert
from conversion.safetensors_file import Tensor
from conversion.single_file_layout import split_components
from sd35flash_jax.checkpoint import load_checkpoint, parameters
from sd35flash_jax.config import COMPONENTS, ModelConfig
from tests.conversion.single_file_source import SMALL, original_tensors, write_file
from tests.conversion.test_convert import assert_holds, loaded, stored_dtype
from tests.diffusers_source import save_tensors
from tests.diffusers_source import write_folder as write_diffusers_folder
from tests.tiny_model import CONFIG, random_parameters, write_tokenizers

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*has the shape of no published model"),
    pytest.mark.filterwarnings("ignore:the checkpoint has no tokenizer"),
]
MODEL = ("transformer", "vae")


def write_fp8(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """A safetensors file with fp8 tensors, which the library cannot write from NumPy."""
    codes = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(ml_dtypes.float8_e4m3fn): "F8_E4M3"}
    header, data = {}, b""
    for key, tensor in tensors.items():
        start, data = len(data), data + tensor.tobytes()
        header[key] = {"dtype": codes[tensor.dtype], "shape": tensor.shape, "data_offsets": [start, len(data)]}
    encoded = json.dumps(header).encode()
    file.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)


def change_file(file: Path, **changes: np.ndarray | None) -> None:
    tensors = load_file(file) | {key: tensor for key, tensor in changes.items() if tensor is not None}
    save_tensors({key: tensor for key, tensor in tensors.items() if changes.get(key, tensor) is not None}, file)


def refused(source: Path, *fragments: str, **options) -> None:
    before = set(source.parent.iterdir())
    with pytest.raises(ConversionError) as caught:
        convert(source, source.parent / "checkpoint", **options)
    for fragment in fragments:
        assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    assert set(source.parent.iterdir()) == before


# What comes out


@pytest.mark.parametrize("dtype, stored", [(np.float32, "<f4"), (np.float16, "<f2"), (ml_dtypes.bfloat16, "bfloat16")])
def test_a_model_file_gives_every_parameter_bit_by_bit(dtype, stored, tmp_path):
    expected = write_file(tmp_path / "sd3.5_medium.safetensors", MODEL, dtype=dtype)
    config = convert(tmp_path / "sd3.5_medium.safetensors", tmp_path / "checkpoint")
    assert config == ModelConfig(SMALL.transformer, SMALL.vae)
    assert stored_dtype(tmp_path / "checkpoint", "transformer", "blocks.image.attention.qkv.kernel") == stored
    assert_holds(tmp_path / "checkpoint", expected)


@pytest.mark.parametrize("components", [("transformer", "vae", "clip_l", "clip_g"), COMPONENTS])
def test_a_file_may_include_text_encoders(components, tmp_path):
    expected = write_file(tmp_path / "incl_clips.safetensors", components)
    config = convert(tmp_path / "incl_clips.safetensors", tmp_path / "checkpoint")
    assert config == ModelConfig(**{name: getattr(SMALL, name) for name in components})
    assert_holds(tmp_path / "checkpoint", expected)


def write_bare(folder: Path, name: str, seed: int = 0) -> tuple[Path, dict[str, dict[str, np.ndarray]]]:
    arrays = random_parameters(name, seed, SMALL)
    file = folder / f"{name}.safetensors"
    save_tensors(original_tensors(name, arrays), file)
    return file, {name: arrays}


@pytest.mark.parametrize("name", ["transformer", "vae", "t5"])
def test_a_component_without_prefix_is_known_by_its_names(name, tmp_path):
    file, expected = write_bare(tmp_path, name)
    assert convert(file, tmp_path / "checkpoint").components == (name,)
    assert_holds(tmp_path / "checkpoint", expected)


def test_components_come_from_several_sources(tmp_path):
    expected = write_file(tmp_path / "model.safetensors", MODEL)
    files = {}
    for seed, name in enumerate(("vae", "clip_l", "clip_g", "t5"), 5):
        files[name], arrays = write_bare(tmp_path, name, seed)
        expected |= arrays
    write_tokenizers(tmp_path / "tokenizers", ("tokenizer", "clip_g", "tokenizer_3"))
    config = convert(
        tmp_path / "model.safetensors",
        tmp_path / "checkpoint",
        components=files,
        tokenizers=tmp_path / "tokenizers",
    )
    assert config == SMALL
    assert_holds(tmp_path / "checkpoint", expected)
    assert set(load_checkpoint(tmp_path / "checkpoint", []).config.components) == set(COMPONENTS)
    assert {path.name for path in (tmp_path / "checkpoint" / "tokenizers").iterdir()} == {"clip_l", "clip_g", "t5"}

    source = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["source"]
    digest = {file.name: sha256(file.read_bytes()).hexdigest() for file in tmp_path.glob("*.safetensors")}
    assert source["layout"] == "single-file" and source["name"] == "model.safetensors"
    assert source["sha256"] == {"model.safetensors": digest["model.safetensors"]}
    assert source["components"] == {
        name: {"layout": "single-file", "name": file.name, "sha256": {file.name: digest[file.name]}}
        for name, file in files.items()
    }


def test_a_component_of_a_folder_is_replaced_by_another_folders(tmp_path):
    expected = write_diffusers_folder(tmp_path / "source", ["clip_l", "clip_g"])
    other = write_diffusers_folder(tmp_path / "other", ["t5", "clip_g"])
    components = {"clip_g": tmp_path / "other", "t5": tmp_path / "other" / "text_encoder_3"}
    config = convert(tmp_path / "source", tmp_path / "checkpoint", components=components)
    assert config == ModelConfig(clip_l=CONFIG.clip_l, clip_g=CONFIG.clip_g, t5=CONFIG.t5)
    assert_holds(tmp_path / "checkpoint", {"clip_l": expected["clip_l"]} | other)
    source = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["source"]
    assert source["layout"] == "diffusers" and set(source["sha256"]) == {"text_encoder/model.safetensors"}
    assert set(source["components"]["clip_g"]["sha256"]) == {"text_encoder_2/model.safetensors"}
    assert set(source["components"]["t5"]["sha256"]) == {"model.safetensors"}


def test_clip_l_without_a_projection_has_the_identity(tmp_path):
    expected = write_file(tmp_path / "clips.safetensors", ["clip_l", "clip_g"], dtype=np.float16)
    change_file(tmp_path / "clips.safetensors", **{"text_encoders.clip_l.transformer.text_projection.weight": None})
    convert(tmp_path / "clips.safetensors", tmp_path / "checkpoint")
    expected["clip_l"]["projection.kernel"] = np.eye(64)
    assert_holds(tmp_path / "checkpoint", expected)
    assert stored_dtype(tmp_path / "checkpoint", "clip_l", "projection.kernel") == "<f2"


def test_clip_g_needs_its_projection(tmp_path):
    write_file(tmp_path / "clips.safetensors", ["clip_g"])
    change_file(tmp_path / "clips.safetensors", **{"text_encoders.clip_g.transformer.text_projection.weight": None})
    refused(tmp_path / "clips.safetensors", "missing tensors: text_projection.weight")


@pytest.mark.parametrize("t5_name", ["shared.weight", "encoder.embed_tokens.weight", "both"])
def test_tensors_that_are_no_parameters_are_ignored_by_name(t5_name, tmp_path):
    expected = write_file(tmp_path / "model.safetensors", ["clip_l", "t5"])
    t5 = "text_encoders.t5xxl.transformer."
    shared = load_file(tmp_path / "model.safetensors")[t5 + "shared.weight"]
    extra = {
        "text_encoders.clip_l.logit_scale": np.float32(4.6),
        "text_encoders.t5xxl.logit_scale": np.float32(4.6),
        "text_encoders.clip_l.transformer.text_model.embeddings.position_ids": np.arange(77)[None],
        t5 + "spiece_model": np.arange(9, dtype=np.uint8),
        t5 + "shared.weight": None if t5_name == "encoder.embed_tokens.weight" else shared,
    }
    if t5_name != "shared.weight":
        extra[t5 + "encoder.embed_tokens.weight"] = shared
    change_file(tmp_path / "model.safetensors", **extra)
    convert(tmp_path / "model.safetensors", tmp_path / "checkpoint")
    assert_holds(tmp_path / "checkpoint", expected)


# fp8


def test_fp8_weights_become_bfloat16_without_loss(tmp_path):
    every_value = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn)
    finite = every_value[np.isfinite(every_value.astype(np.float32))]
    tensors = original_tensors("t5", random_parameters("t5", 0, SMALL))
    stored = {key: np.resize(finite, tensor.shape) for key, tensor in tensors.items()}
    write_fp8(tmp_path / "t5xxl_fp8_e4m3fn.safetensors", stored)
    convert(tmp_path / "t5xxl_fp8_e4m3fn.safetensors", tmp_path / "checkpoint")
    assert stored_dtype(tmp_path / "checkpoint", "t5", "token_embed.embedding") == "bfloat16"
    found = loaded(tmp_path / "checkpoint", "t5")
    np.testing.assert_array_equal(found["token_embed.embedding"], stored["shared.weight"].astype(np.float32))
    np.testing.assert_array_equal(
        found["layers.down.kernel"][1],
        stored["encoder.block.1.layer.1.DenseReluDense.wo.weight"].astype(np.float32).T,
    )


def test_an_fp8_clip_l_without_a_projection_has_the_identity(tmp_path):
    tensors = original_tensors("clip_l", random_parameters("clip_l", 0, SMALL))
    stored = {key: tensor.astype(ml_dtypes.float8_e4m3fn) for key, tensor in tensors.items()}
    del stored["text_projection.weight"]
    write_fp8(tmp_path / "clip_l.safetensors", stored)
    write_file(tmp_path / "vae.safetensors", ["vae"])
    files = {"clip_l": tmp_path / "clip_l.safetensors"}
    convert(tmp_path / "vae.safetensors", tmp_path / "checkpoint", components=files)
    assert stored_dtype(tmp_path / "checkpoint", "clip_l", "projection.kernel") == "bfloat16"
    np.testing.assert_array_equal(loaded(tmp_path / "checkpoint", "clip_l")["projection.kernel"], np.eye(64))


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_scaled_fp8_weights_are_multiplied_by_their_scales(dtype, tmp_path):
    random = np.random.default_rng(0)
    tensors = original_tensors("t5", random_parameters("t5", 0, SMALL))
    stored, expected = {"scaled_fp8": np.zeros(0, ml_dtypes.float8_e4m3fn)}, {}
    for key, tensor in tensors.items():
        if tensor.ndim < 2 or key == "shared.weight":
            stored[key] = tensor.astype(np.float16)
            expected[key] = stored[key].astype(np.float32)
        else:
            scale = np.float32(random.uniform(0.001, 0.1))
            stored[key] = (tensor / scale).astype(ml_dtypes.float8_e4m3fn)
            stored[key.removesuffix("weight") + "scale_weight"] = scale.reshape(() if "0" in key else (1,))
            stored[key.removesuffix("weight") + "scale_input"] = np.float32(1).reshape(())
            expected[key] = stored[key].astype(np.float32) * scale
    stored = {key: np.asarray(tensor) for key, tensor in stored.items()}
    write_fp8(tmp_path / "t5xxl_scaled.safetensors", stored)
    convert(tmp_path / "t5xxl_scaled.safetensors", tmp_path / "checkpoint", dtype=dtype)
    found = original_tensors("t5", loaded(tmp_path / "checkpoint", "t5"))
    for key, tensor in expected.items():
        rounded = tensor if dtype or stored[key].dtype == np.float16 else tensor.astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(found[key], rounded.astype(np.float32), err_msg=key)
    qkv = stored_dtype(tmp_path / "checkpoint", "t5", "layers.qkv.kernel")
    assert qkv == ("<f4" if dtype else "bfloat16")


def test_an_fp8_nan_is_refused_by_name(tmp_path):
    tensors = original_tensors("t5", random_parameters("t5", 0, SMALL))
    stored = {key: tensor.astype(ml_dtypes.float8_e4m3fn) for key, tensor in tensors.items()}
    stored["encoder.final_layer_norm.weight"] = np.full(192, np.nan).astype(ml_dtypes.float8_e4m3fn)
    write_fp8(tmp_path / "t5.safetensors", stored)
    refused(tmp_path / "t5.safetensors", "encoder.final_layer_norm.weight holds NaN")


@pytest.mark.parametrize("size, of", [(3, "fp8"), (1, "float32"), (1, None)])
def test_a_scale_that_fits_no_weight_is_refused_by_name(size, of, tmp_path):
    tensors = original_tensors("t5", random_parameters("t5", 0, SMALL))
    key = "encoder.block.0.layer.0.SelfAttention.k" if of else "nothing"
    if of == "fp8":
        tensors[f"{key}.weight"] = tensors[f"{key}.weight"].astype(ml_dtypes.float8_e4m3fn)
    write_fp8(tmp_path / "t5.safetensors", tensors | {f"{key}.scale_weight": np.ones(size, np.float32)})
    refused(tmp_path / "t5.safetensors", f"{key}.scale_weight", f"{key}.weight")


# What is refused, and what is warned of


def test_an_unknown_file_is_refused(tmp_path):
    save_tensors({"lora.up": np.ones(2)}, tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "x.safetensors holds no tensors of Stable Diffusion 3", "lora.up")


def test_a_file_of_two_components_without_prefixes_is_refused(tmp_path):
    tensors = [original_tensors(name, random_parameters(name, 0, SMALL)) for name in ("t5", "clip_l")]
    save_tensors(tensors[0] | tensors[1], tmp_path / "x.safetensors")
    refused(tmp_path / "x.safetensors", "several components without prefixes")


def test_a_component_file_of_a_diffusers_folder_is_told_to_be_given_as_the_folder(tmp_path):
    write_diffusers_folder(tmp_path / "source", ["vae"])
    file = tmp_path / "source" / "vae" / "diffusion_pytorch_model.safetensors"
    refused(file, str(file), "give the folder")


def test_a_clip_file_of_unpublished_width_needs_its_name(tmp_path):
    file, expected = write_bare(tmp_path, "clip_l")
    refused(file, "width 64", "--clip-l", "--clip-g")
    model = tmp_path / "model.safetensors"
    expected |= write_file(model, ["vae"])
    convert(model, tmp_path / "checkpoint", components={"clip_l": file})
    assert_holds(tmp_path / "checkpoint", expected)


@pytest.mark.parametrize("width, name", [(768, "clip_l"), (1280, "clip_g")])
def test_a_published_clip_is_known_by_its_width(width, name):
    key = "text_model.embeddings.token_embedding.weight"
    tensor = Tensor(Path("x"), np.dtype(np.float16), (49408, width), 0)
    for wanted in (None, "clip_l", "clip_g"):
        assert set(split_components(Path("x"), {key: tensor}, wanted)) == {name}


def test_a_file_given_for_a_component_that_it_lacks_is_refused(tmp_path):
    write_file(tmp_path / "model.safetensors", ["vae"])
    file, _ = write_bare(tmp_path, "transformer")
    refused(tmp_path / "model.safetensors", f"{file} holds no t5: it holds transformer", components={"t5": file})


def test_components_that_do_not_fit_each_other_are_refused(tmp_path):
    write_file(tmp_path / "model.safetensors", ["transformer"])
    write_diffusers_folder(tmp_path / "other", ["t5"])
    refused(tmp_path / "model.safetensors", "t5.hidden_size 96", "192", components={"t5": tmp_path / "other"})


def test_a_component_that_does_not_exist_is_refused(tmp_path):
    write_file(tmp_path / "model.safetensors", ["vae"])
    refused(tmp_path / "model.safetensors", "unet", "transformer", components={"unet": tmp_path})


def test_surplus_tensors_are_named_with_and_without_a_prefix(tmp_path):
    write_file(tmp_path / "model.safetensors", ["vae"])
    change_file(tmp_path / "model.safetensors", **{"model_ema.decay": np.ones(1)})
    refused(tmp_path / "model.safetensors", "surplus tensors: model_ema.decay")
    change_file(
        tmp_path / "model.safetensors", **{"model_ema.decay": None, "first_stage_model.loss.logvar": np.ones(1)}
    )
    refused(tmp_path / "model.safetensors", "surplus tensors: loss.logvar")


@pytest.mark.parametrize("key", ["context_embedder.weight", "joint_blocks.1.x_block.attn.qkv.bias"])
def test_missing_tensors_are_named(key, tmp_path):
    write_file(tmp_path / "model.safetensors", ["transformer"])
    change_file(tmp_path / "model.safetensors", **{"model.diffusion_model." + key: None})
    refused(tmp_path / "model.safetensors", "transformer", f"missing tensors: {key}")


@pytest.mark.parametrize(
    "key, shape", [("x_embedder.proj.weight", (64, 64)), ("pos_embed", (1,)), ("x_embedder.proj.weight", (0, 16, 2, 2))]
)
def test_impossible_shapes_are_refused(key, shape, tmp_path):
    write_file(tmp_path / "model.safetensors", ["transformer"])
    change_file(tmp_path / "model.safetensors", **{"model.diffusion_model." + key: np.ones(shape, np.float32)})
    refused(tmp_path / "model.safetensors")


def test_a_tokenizer_folder_that_lacks_one_is_refused(tmp_path):
    write_file(tmp_path / "model.safetensors", ["clip_l", "t5"])
    write_tokenizers(tmp_path / "tokenizers", ("tokenizer", "tokenizer_2", "elsewhere"))
    refused(tmp_path / "model.safetensors", "no tokenizer for t5", "tokenizer_3/", tokenizers=tmp_path / "tokenizers")


def test_an_unpublished_shape_and_a_missing_tokenizer_are_warned_of(tmp_path):
    write_file(tmp_path / "model.safetensors", ["clip_l"])
    with pytest.warns(UserWarning) as caught:
        convert(tmp_path / "model.safetensors", tmp_path / "checkpoint")
    messages = [str(warning.message) for warning in caught]
    assert any("clip_l" in message and "no published model" in message for message in messages)
    assert any("no tokenizer for clip_l" in message and "--tokenizers" in message for message in messages)


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("depth, dual", [(1, 0), (1, 1), (3, 0), (3, 2), (3, 3)])
def test_every_kind_of_transformer_is_inferred_from_its_shapes(qk_norm, depth, dual, tmp_path):
    transformer = replace(
        SMALL.transformer, heads=2, head_size=64, depth=depth, qk_norm=qk_norm, dual_attention_blocks=dual
    )
    expected = write_file(tmp_path / "x.safetensors", ["transformer"], ModelConfig(transformer))
    assert convert(tmp_path / "x.safetensors", tmp_path / "checkpoint").transformer == transformer
    component = load_checkpoint(tmp_path / "checkpoint", dtype="float32").components["transformer"]
    for path, array in parameters(component).items():
        np.testing.assert_array_equal(array, expected["transformer"][path])
