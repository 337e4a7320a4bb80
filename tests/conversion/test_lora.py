import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from conversion import ConversionError, convert
from conversion.lora import merged, open_lora
from sd35flash_jax import FlashPipeline
from sd35flash_jax.checkpoint import load_checkpoint, parameters
from sd35flash_jax.cli import main
from sd35flash_jax.models.layers import unstacked
from tests.diffusers_source import write_folder
from tests.tiny_model import CONFIG

WIDTH = CONFIG.transformer.hidden_size
DRAW = np.random.default_rng(0)
Lora = Callable[..., Path]


def factors(size_in: int = WIDTH, size_out: int = WIDTH, rank: int = 3) -> tuple[np.ndarray, np.ndarray]:
    return DRAW.standard_normal((rank, size_in), np.float32), DRAW.standard_normal((size_out, rank), np.float32)


def peft(module: str, down: np.ndarray, up: np.ndarray) -> dict[str, np.ndarray]:
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


def kohya(module: str, down: np.ndarray, up: np.ndarray, alpha: float) -> dict[str, np.ndarray]:
    return {f"{module}.lora_down.weight": down, f"{module}.lora_up.weight": up, f"{module}.alpha": np.float32(alpha)}


@pytest.fixture
def write(tmp_path) -> Lora:
    def write(tensors: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> Path:
        file = tmp_path / f"lora-{len(list(tmp_path.iterdir()))}.safetensors"
        save_file({key: np.ascontiguousarray(value) for key, value in tensors.items()}, file, metadata)
        return file

    return write


def deltas(file: Path, scale: float = 1.0) -> dict[tuple[str, str, int | None], np.ndarray]:
    """What a LoRA adds, by component, parameter and layer."""
    return {
        (component, param, layer): sum(update.delta() for update in updates)
        for component, params in open_lora(file, scale, CONFIG).items()
        for param, layers in params.items()
        for layer, updates in layers.items()
    }


def assert_equal_deltas(first: Any, second: Any) -> None:
    assert first.keys() == second.keys()
    for place, delta in first.items():
        np.testing.assert_allclose(delta, second[place], rtol=1e-5, atol=1e-5, err_msg=str(place))


# Names


def test_a_fused_projection_gets_each_source_in_its_own_columns(write):
    down, up = factors()
    (place, delta), *others = deltas(write(peft("transformer.transformer_blocks.1.attn.to_k", down, up))).items()
    assert place == ("transformer", "dual_blocks.image.attention.qkv.kernel", 1) and not others
    query, key, value = np.split(delta, 3, axis=1)
    np.testing.assert_allclose(key, (up @ down).T, rtol=1e-5, atol=1e-6)
    assert not query.any() and not value.any()


SAME_WEIGHT = {
    "transformer": [
        "transformer.transformer_blocks.2.ff.net.0.proj",
        "base_model.model.transformer_blocks.2.ff.net.0.proj",
        "transformer_blocks.2.ff.net.0.proj",
        "lora_unet_transformer_blocks_2_ff_net_0_proj",
        "lora_transformer_transformer_blocks_2_ff_net_0_proj",
        "lora_unet_joint_blocks_2_x_block_mlp_fc1",
        "diffusion_model.joint_blocks.2.x_block.mlp.fc1",
    ],
    "clip_l": [
        "text_encoder.text_model.encoder.layers.1.self_attn.v_proj",
        "lora_te1_text_model_encoder_layers_1_self_attn_v_proj",
    ],
    "clip_g": [
        "text_encoder_2.text_model.encoder.layers.1.mlp.fc2",
        "lora_te2_text_model_encoder_layers_1_mlp_fc2",
    ],
    "t5": [
        "text_encoder_3.encoder.block.1.layer.0.SelfAttention.q",
        "lora_te3_encoder_block_1_layer_0_SelfAttention_q",
    ],
}
SHAPES = {"transformer": (WIDTH, 4 * WIDTH), "clip_l": (32, 32), "clip_g": (96, 48), "t5": (96, 64)}


@pytest.mark.parametrize("component", SAME_WEIGHT)
def test_every_style_of_names_means_the_same_weight(write, component):
    down, up = factors(*SHAPES[component])
    first, *others = (deltas(write(kohya(module, down, up, 1.5))) for module in SAME_WEIGHT[component])
    assert {place[0] for place in first} == {component}
    for other in others:
        assert_equal_deltas(first, other)


@pytest.mark.parametrize(
    ("down_key", "up_key"),
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora.down.weight", "lora.up.weight"),
        ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
        ("lora_down.weight", "lora_up.weight"),
    ],
)
def test_every_style_of_factor_means_the_same(write, down_key, up_key):
    module = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
    down, up = factors(32, 32)
    expected = deltas(write(peft(module, down, up)))
    assert_equal_deltas(deltas(write({f"{module}.{down_key}": down, f"{module}.{up_key}": up})), expected)


def test_a_fused_projection_of_the_original_names_is_the_three_of_diffusers(write):
    down, up = factors(WIDTH, 3 * WIDTH)
    fused = write(kohya("lora_unet_joint_blocks_0_x_block_attn2_qkv", down, up, 3.0))
    separate: dict[str, np.ndarray] = {}
    for name, part in zip(("to_q", "to_k", "to_v"), np.split(up, 3)):
        separate |= peft(f"transformer.transformer_blocks.0.attn2.{name}", down, part)
    assert_equal_deltas(deltas(fused), deltas(write(separate)))


@pytest.mark.parametrize(
    ("original", "diffusers"),
    [
        ("final_layer_adaLN_modulation_1", "norm_out.linear"),
        ("joint_blocks_3_context_block_adaLN_modulation_1", "transformer_blocks.3.norm1_context.linear"),
    ],
)
def test_a_modulation_that_diffusers_stores_the_other_way_round_is_turned(write, original, diffusers):
    down, up = factors(WIDTH, 2 * WIDTH)
    shift, scale = np.split(up, 2)
    assert_equal_deltas(
        deltas(write(kohya(f"lora_unet_{original}", down, up, 3.0))),
        deltas(write(peft(f"transformer.{diffusers}", down, np.concatenate([scale, shift])))),
    )


def test_the_patch_embedding_takes_convolutions_as_factors(write):
    down = DRAW.standard_normal((3, 16, 2, 2), np.float32)
    up = DRAW.standard_normal((WIDTH, 3, 1, 1), np.float32)
    (place, delta), *others = deltas(write(peft("transformer.pos_embed.proj", down, up))).items()
    assert place == ("transformer", "patch_embed.kernel", None) and not others
    weight = np.einsum("or,rchw->hwco", up[:, :, 0, 0], down)
    np.testing.assert_allclose(delta, weight.reshape(-1, WIDTH), rtol=1e-5, atol=1e-5)


# Strength

MODULE = "transformer.transformer_blocks.3.attn.to_out.0"


def test_alpha_over_rank_multiplies_the_product(write):
    down, up = factors(rank=4)
    (delta,) = deltas(write(kohya(MODULE, down, up, 6.0)), scale=-0.5).values()
    np.testing.assert_allclose(delta, -0.5 * 6.0 / 4 * (up @ down).T, rtol=1e-5, atol=1e-6)


def test_the_updates_are_linear_in_the_scale(write):
    file = write(kohya(MODULE, *factors(), 2.0))
    (once,), (thrice,) = deltas(file).values(), deltas(file, 3.0).values()
    np.testing.assert_allclose(3 * once, thrice, rtol=1e-5, atol=1e-6)


def test_an_alpha_in_the_header_counts_for_its_component_alone(write):
    tensors = peft(MODULE, *factors(rank=4)) | peft("text_encoder.text_projection", *factors(32, 32, rank=4))
    plain = deltas(write(tensors))
    header = {"transformer.lora_alpha": 8, "transformer.alpha_pattern": {}, "transformer.use_rslora": False}
    scaled = deltas(write(tensors, {"lora_adapter_metadata": json.dumps(header)}))
    for place, delta in plain.items():
        np.testing.assert_allclose(scaled[place], delta * (2 if place[0] == "transformer" else 1), rtol=1e-5, atol=1e-6)


def test_an_adapter_of_peft_without_its_configuration_is_warned_of(write):
    down, up = factors()
    file = write(peft("base_model.model.transformer_blocks.3.attn.to_out.0", down, up))
    with pytest.warns(UserWarning, match=r"adapter_config.json is missing"):
        (delta,) = deltas(file).values()
    np.testing.assert_allclose(delta, (up @ down).T, rtol=1e-5, atol=1e-6)


def test_half_precision_factors_are_multiplied_in_float32(write):
    down, up = (array.astype(np.float16) for array in factors())
    (delta,) = deltas(write(peft(MODULE, down, up))).values()
    np.testing.assert_allclose(delta, (up.astype(np.float32) @ down.astype(np.float32)).T, rtol=1e-5, atol=1e-6)


# Merging


def test_merging_rounds_each_element_once(write):
    file = write(peft("transformer.proj_out", *factors(WIDTH, 64)) | peft("transformer.proj_out", *factors(WIDTH, 64)))
    kernel = DRAW.standard_normal((WIDTH, 64)).astype(jax.numpy.bfloat16)
    layers = open_lora(file, 0.3, CONFIG)["transformer"]["out.kernel"]
    expected = kernel.astype(np.float32) + sum(update.delta() for update in layers[None])
    np.testing.assert_array_equal(merged(kernel, layers), expected.astype(jax.numpy.bfloat16))


@pytest.fixture
def pipe(small_checkpoint) -> FlashPipeline:
    return FlashPipeline.from_pretrained(small_checkpoint, max_t5_tokens=32)


@pytest.fixture
def lora(write) -> Path:
    """A LoRA of the transformer, in both kinds of stack, and of CLIP-L."""
    tensors = kohya("lora_unet_transformer_blocks_1_attn_to_q", *factors(), 3.0)
    tensors |= kohya("lora_unet_transformer_blocks_3_ff_net_2", *factors(4 * WIDTH, WIDTH), 3.0)
    return write(tensors | kohya("lora_te1_text_model_encoder_layers_0_mlp_fc1", *factors(32, 64), 3.0))


TOUCHED = {
    ("transformer", "dual_blocks.1.image.attention.qkv.kernel"),
    ("transformer", "last_block.image.feed_forward.linear_2.kernel"),
    ("clip_l", "layers.0.linear_1.kernel"),
}


def snapshot(pipe: FlashPipeline) -> dict[tuple[str, str], np.ndarray]:
    return block_by_block(pipe.components)


def block_by_block(components: dict[str, Any]) -> dict[tuple[str, str], np.ndarray]:
    """Copies of all parameters, with names that are the same on every platform."""
    return {
        (name, param): np.array(array)
        for name, module in components.items()
        for param, array in parameters(unstacked(module)).items()
    }


def changes(before: dict[Any, np.ndarray], after: dict[Any, np.ndarray]) -> set[Any]:
    return {place for place, array in before.items() if array.tobytes() != after[place].tobytes()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_changes_the_named_parameters_alone_and_unloading_restores_every_bit(small_checkpoint, dtype, lora):
    pipe = FlashPipeline.from_pretrained(small_checkpoint, dtype)
    before = snapshot(pipe)
    pipe.load_lora(lora, 0.7)
    assert changes(before, snapshot(pipe)) == TOUCHED
    pipe.load_lora(lora, -0.2)
    assert changes(before, snapshot(pipe)) == TOUCHED
    pipe.unload_lora()
    assert changes(before, snapshot(pipe)) == set()
    pipe.unload_lora()
    assert changes(before, snapshot(pipe)) == set()


def test_a_scale_of_zero_changes_nothing(pipe, lora):
    before = snapshot(pipe)
    pipe.load_lora(lora, 0.0)
    assert changes(before, snapshot(pipe)) == set()


def test_another_pipeline_with_the_same_components_is_left_alone(pipe, lora):
    other = FlashPipeline(pipe.config, pipe.components, pipe.tokenizers, max_t5_tokens=32)
    before = snapshot(other)
    pipe.load_lora(lora)
    assert changes(before, snapshot(other)) == set()


def test_nothing_recompiles_for_a_lora(pipe, lora, compilations):
    size: dict[str, Any] = {"height": 48, "width": 112}
    plain = pipe(["a red fox"] * 3, **size)
    assert compilations, "the listener hears compilations"
    compilations.clear()
    pipe.load_lora(lora)
    merged = pipe(["a red fox"] * 3, **size)
    pipe.unload_lora()
    again = pipe(["a red fox"] * 3, **size)
    assert compilations == []
    assert not np.array_equal(plain.latents, merged.latents)
    np.testing.assert_array_equal(plain.latents, again.latents)
    assert merged.metadata[0]["loras"] == f"{lora.name} 1" and "loras" not in again.metadata[0]


def test_an_interrupted_load_leaves_no_lora(pipe, lora, monkeypatch):
    before = snapshot(pipe)
    calls = []

    def fail_at_the_second(array: np.ndarray, layers: Any) -> np.ndarray:
        calls.append(array)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return merged(array, layers)

    monkeypatch.setattr("conversion.lora.merged", fail_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        pipe.load_lora(lora)
    assert changes(before, snapshot(pipe)) == set() and pipe.loras == []


def test_a_lora_of_an_encoder_that_is_not_loaded_is_refused(small_checkpoint, lora):
    pipe = FlashPipeline.from_pretrained(small_checkpoint, text_encoders=("clip_g",))
    before = snapshot(pipe)
    with pytest.raises(ValueError, match=r"does not fit the transformer, vae, clip_g of this model: tensors without"):
        pipe.load_lora(lora)
    assert changes(before, snapshot(pipe)) == set()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "tiny"
    write_folder(folder)
    return folder


def stored(checkpoint: Path) -> dict[tuple[str, str], np.ndarray]:
    components = load_checkpoint(checkpoint, dtype="float32").components
    return {
        (name, param): np.asarray(a) for name, module in components.items() for param, a in parameters(module).items()
    }


def test_converting_with_loras_gives_what_loading_them_gives(source, lora, tmp_path):
    convert(source, tmp_path / "plain")
    convert(source, tmp_path / "merged", loras=[(lora, 0.7)])
    pipe = FlashPipeline.from_pretrained(tmp_path / "plain", "float32")
    pipe.load_lora(lora, 0.7)
    plain, merged_once = (
        block_by_block(load_checkpoint(tmp_path / name, dtype="float32").components) for name in ("plain", "merged")
    )
    assert changes(snapshot(pipe), merged_once) == set()
    assert changes(plain, merged_once) == TOUCHED
    header = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert header["source"]["loras"] == [{"name": lora.name, "scale": 0.7}]


def test_converting_several_loras_adds_them_and_rounds_once(source, lora, tmp_path):
    convert(source, tmp_path / "plain")
    convert(source, tmp_path / "merged", "bfloat16", loras=[(lora, 0.7), (lora, -0.2)])
    plain, merged_once = stored(tmp_path / "plain"), stored(tmp_path / "merged")
    added = {place: np.zeros_like(array) for place, array in plain.items()}
    for (component, param, layer), delta in deltas(lora, 0.5).items():
        added[component, param][... if layer is None else layer] = delta
    for place, array in plain.items():
        exact = array + added[place]
        np.testing.assert_allclose(merged_once[place], exact, rtol=2**-8, atol=1e-6, err_msg=str(place))


def test_a_conversion_refuses_a_lora_before_it_writes(source, write, tmp_path):
    file = write(peft("transformer.transformer_blocks.99.attn.to_q", *factors()))
    with pytest.raises(ConversionError, match=r"blocks.99.attn.to_q.lora_A"):
        convert(source, tmp_path / "new", loras=[(file, 1.0)])
    assert not (tmp_path / "new").exists()


# The command line


def test_convert_merges_loras(source, lora, tmp_path, capsys):
    options = ["--lora", str(lora), "--lora-scale", "0.5"]
    assert main(["convert", str(source), str(tmp_path / "new"), *options]) == 0
    header = json.loads((tmp_path / "new" / "config.json").read_text())
    assert header["source"]["loras"] == [{"name": lora.name, "scale": 0.5}]


def generate(checkpoint: Path, output: Path, *options: Any) -> int:
    sizes = ("--height", 48, "--width", 112, "--max-t5-tokens", 32, "--steps", 1)
    arguments = ("generate", "a red fox", "--checkpoint", checkpoint, "--output", output, *sizes, *options)
    return main([str(argument) for argument in arguments])


def test_generate_merges_loras_with_their_scales(small_checkpoint, lora, tmp_path, capsys):
    options = ("--lora", lora, "--lora-scale", 0.5, "--lora", lora, "--lora-scale", -0.5)
    assert generate(small_checkpoint, tmp_path / "fox.png", *options) == 0
    assert Image.open(tmp_path / "fox.png").text["loras"] == f"{lora.name} 0.5, {lora.name} -0.5"
    assert generate(small_checkpoint, tmp_path / "fox.png", "--lora", lora) == 0
    assert Image.open(tmp_path / "fox.png").text["loras"] == f"{lora.name} 1"


def test_generate_refuses_a_lora_before_anything_is_loaded(small_checkpoint, lora, tmp_path, capsys):
    for options, message in (
        (("--lora", tmp_path / "absent.safetensors"), "absent.safetensors does not exist"),
        (("--lora", lora, "--lora-scale", 1, "--lora-scale", 2), "2 --lora-scale do not fit 1 --lora"),
    ):
        assert generate(small_checkpoint, tmp_path / "fox.png", *options) == 1
        error = capsys.readouterr().err
        assert message in error and "loading" not in error


# What is refused


def test_every_fault_is_named_at_once(write):
    down, up = factors()
    tensors = peft(MODULE, down, up)
    tensors |= peft("transformer.transformer_blocks.99.attn.to_q", down, up)
    tensors |= {"something.else": down}
    tensors |= {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": down}
    tensors |= peft("transformer.transformer_blocks.0.attn.to_k", down, up[:, :2])
    tensors |= peft("transformer.transformer_blocks.0.attn.to_v", down[:, 1:], up)
    tensors |= peft("transformer.transformer_blocks.1.attn.to_q", down * np.float32(np.nan), up)
    tensors |= kohya("lora_unet_transformer_blocks_3_attn_to_out_0", down, up, 1.0)
    tensors |= {"transformer.transformer_blocks.1.attn.to_k.alpha": np.ones((), np.float32)}
    tensors |= {"lora_unet_transformer_blocks_1_attn_to_v.alpha": np.ones(2, np.float32)}
    tensors |= peft("transformer.transformer_blocks.1.attn.to_v", down, up)
    with pytest.raises(ValueError) as caught:
        open_lora(write(tensors), 1.0, CONFIG)
    _, *faults = str(caught.value).replace(" of this model: ", "; ").split("; ")
    named = dict(fault.split(": ", 1) for fault in faults)
    assert named.keys() == {
        "tensors without a place",
        "tensors that repeat another",
        "tensors without a partner",
        "wrong shapes",
        "NaN or infinite values",
        "alphas that are not one number",
    }
    assert "blocks.99.attn.to_q.lora_A" in named["tensors without a place"]
    assert "something.else" in named["tensors without a place"]
    assert "blocks.0.attn.to_q.lora_A" in named["tensors without a partner"]
    assert "blocks.1.attn.to_k.alpha" in named["tensors without a partner"]
    assert "blocks.0.attn.to_k.lora_A.weight (3, 64)" in named["wrong shapes"]
    assert "blocks.0.attn.to_v.lora_A.weight (3, 63)" in named["wrong shapes"]
    assert "blocks.1.attn.to_q.lora_A" in named["NaN or infinite values"]
    assert "blocks_1_attn_to_v.alpha" in named["alphas that are not one number"]
    assert "blocks.3.attn.to_out.0" in named["tensors that repeat another"]


@pytest.mark.parametrize(
    ("key", "method"),
    [
        (f"{MODULE}.dora_scale", "DoRA"),
        (f"{MODULE}.lora_magnitude_vector.weight", "DoRA"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.lokr_w1", "LoKr"),
        ("lora_unet_joint_blocks_0_x_block_attn_qkv.hada_w1_a", "LoHa"),
    ],
)
def test_other_methods_are_refused_by_name(write, key, method):
    with pytest.raises(ValueError, match=f"is a {method}, but only plain LoRA is supported: {key}"):
        open_lora(write(peft(MODULE, *factors()) | {key: np.ones(3, np.float32)}), 1.0, CONFIG)


@pytest.mark.parametrize("scale", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite_is_refused(write, scale):
    with pytest.raises(ValueError, match="the scale of a LoRA must be a finite number"):
        open_lora(write(peft(MODULE, *factors())), scale, CONFIG)


def test_a_file_that_is_no_lora_is_refused(tmp_path, write):
    with pytest.raises(ValueError, match=r"missing.safetensors does not exist"):
        open_lora(tmp_path / "missing.safetensors", 1.0, CONFIG)
    with pytest.raises(ValueError, match="not a safetensors file; other formats can run code"):
        open_lora(tmp_path / "lora.bin", 1.0, CONFIG)
    with pytest.raises(ValueError, match=r"holds no adapter_model.safetensors or pytorch_lora_weights.safetensors"):
        open_lora(tmp_path, 1.0, CONFIG)
    with pytest.raises(ValueError, match="holds no tensors"):
        open_lora(write({}), 1.0, CONFIG)
    (tmp_path / "cut.safetensors").write_bytes(write(peft(MODULE, *factors())).read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"cut.safetensors is truncated or damaged"):
        open_lora(tmp_path / "cut.safetensors", 1.0, CONFIG)


@pytest.mark.parametrize(
    "header",
    [
        "{",
        "[1]",
        "{}[]",
        '{"transformer.r": 4}',
        '{"transformer.lora_alpha": "many"}',
        '{"transformer.lora_alpha": NaN}',
        '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(": 2}}',
        '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": 3}',
    ],
)
def test_a_damaged_configuration_is_refused(write, header):
    file = write(peft(MODULE, *factors()), {"lora_adapter_metadata": header})
    with pytest.raises(ValueError, match="the LoRA configuration in"):
        open_lora(file, 1.0, CONFIG)
