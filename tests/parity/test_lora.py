"""LoRAs that PEFT made, merged into our weights, against the reference that computes them beside its own."""

from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from sd35flash_jax import Conditioning, FlashPipeline
from tests.parity.comparison import as_torch, max_error

TRANSFORMER_MODULES = [
    *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    *("attn.to_add_out", "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
    *("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out", "context_embedder", "pos_embed.proj"),
    *("timestep_embedder.linear_1", "timestep_embedder.linear_2", "text_embedder.linear_1", "text_embedder.linear_2"),
]
FLASH_SD3_MODULES = [
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("proj", "linear", "linear_1", "linear_2"),
]
"""As in the training script of flash-sd3, which leaves alpha at PEFT's default of 8."""
CLIP_MODULES = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]
PROMPTS = ["a red fox in the snow", "two cats"]
HEIGHT, WIDTH = 96, 144


@pytest.fixture
def ours(checkpoint) -> FlashPipeline:
    return FlashPipeline.from_pretrained(checkpoint, "float32")


@pytest.fixture
def reference(reference_folder) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(reference_folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def randomised(model: Any, seed: int) -> Any:
    """Both factors at random (PEFT starts one at zero), so that the update is about as large as the weight."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in sorted(model.named_parameters()):
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
    return model


def velocities(pipe: FlashPipeline, transformer: Any) -> tuple[np.ndarray, np.ndarray]:
    config = pipe.config.transformer
    draw = np.random.default_rng(0)
    latents = draw.standard_normal((2, 12, 18, config.latent_channels), np.float32)
    context = draw.standard_normal((2, 9, config.context_size), np.float32)
    pooled = draw.standard_normal((2, config.pooled_size), np.float32)
    timestep = np.float32([900.0, 20.0])
    with torch.no_grad():
        expected = transformer(
            hidden_states=as_torch(latents.transpose(0, 3, 1, 2)),
            encoder_hidden_states=as_torch(context),
            pooled_projections=as_torch(pooled),
            timestep=as_torch(timestep),
        ).sample
    velocity = pipe.velocity(latents, timestep, Conditioning(context, pooled))
    return np.asarray(velocity), expected.numpy().transpose(0, 2, 3, 1)


def pixels(pipe: FlashPipeline, reference: StableDiffusion3Pipeline) -> tuple[np.ndarray, np.ndarray]:
    noise = np.asarray(pipe.noise(0, len(PROMPTS), HEIGHT, WIDTH))
    expected = reference(
        PROMPTS,
        latents=as_torch(noise.transpose(0, 3, 1, 2)),
        num_inference_steps=4,
        guidance_scale=1.0,
        height=HEIGHT,
        width=WIDTH,
        output_type="np",
    ).images
    return np.asarray(pipe.decode(pipe.denoise(noise, pipe.encode(PROMPTS), steps=4))), expected


def save_lora(pipe: StableDiffusion3Pipeline, folder: Path, alpha: int, with_metadata: bool) -> None:
    """Give the reference's transformer and CLIP encoders a LoRA each, and save them in one file as diffusers does."""
    layers, metadata = {}, {}
    for name, modules, seed in (
        ("transformer", TRANSFORMER_MODULES, 0),
        ("text_encoder", CLIP_MODULES, 1),
        ("text_encoder_2", CLIP_MODULES, 2),
    ):
        model = getattr(pipe, name)
        config = LoraConfig(
            r=4, lora_alpha=alpha, target_modules=modules, rank_pattern={"attn.to_q": 3}, alpha_pattern={"ff.net.2": 5}
        )
        model.add_adapter(config)
        layers[f"{name}_lora_layers"] = get_peft_model_state_dict(randomised(model, seed))
        if with_metadata:
            metadata[f"{name}_lora_adapter_metadata"] = config.to_dict()
    pipe.save_lora_weights(folder, **layers, **metadata)


@pytest.mark.parametrize(("scale", "with_metadata"), [(1.0, False), (0.4, True)])
def test_a_lora_that_diffusers_saved_changes_everything_as_in_diffusers(
    ours, reference, reference_folder, tmp_path, scale, with_metadata, record_parity
):
    save_lora(StableDiffusion3Pipeline.from_pretrained(reference_folder), tmp_path, 6, with_metadata)
    reference.load_lora_weights(tmp_path, adapter_name="lora")
    reference.set_adapters("lora", scale)
    before, _ = velocities(ours, reference.transformer)
    ours.load_lora(tmp_path / "pytorch_lora_weights.safetensors", scale)
    item = f"LoRA, scale {scale:g}, alpha {'from the header' if with_metadata else 'absent'}"

    velocity, expected = velocities(ours, reference.transformer)
    assert max_error(before, velocity) > 0.1 * np.abs(expected).max(), "the LoRA matters"
    record_parity(f"{item}, velocity", max_error(velocity, expected) / np.abs(expected).max(), 1e-4)

    conditioning = ours.encode(PROMPTS)
    context, _, pooled, _ = reference.encode_prompt(PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False)
    for name, mine, theirs in (("context", conditioning.context, context), ("pooled", conditioning.pooled, pooled)):
        error = max_error(np.asarray(mine), theirs.detach().numpy()) / float(theirs.abs().max())
        record_parity(f"{item}, {name}", error, 1e-4)

    image, expected = pixels(ours, reference)
    assert expected.std() > 0.05, "a flat image would agree with anything"
    record_parity(f"{item}, pixels after 4 steps", max_error(image, expected), 1e-4)


def test_an_adapter_that_peft_saved_counts_the_alpha_in_its_configuration(
    ours, reference_folder, tmp_path, record_parity
):
    """The style of flash-sd3: a folder with adapter_config.json and keys that begin with base_model.model."""
    transformer = SD3Transformer2DModel.from_pretrained(reference_folder / "transformer")
    config = LoraConfig(r=16, target_modules=FLASH_SD3_MODULES)
    randomised(get_peft_model(transformer, config), seed=3).save_pretrained(tmp_path)
    fresh = SD3Transformer2DModel.from_pretrained(reference_folder / "transformer")
    adapted = PeftModel.from_pretrained(fresh, tmp_path).eval()
    before, _ = velocities(ours, adapted)
    ours.load_lora(tmp_path)
    velocity, expected = velocities(ours, adapted)
    assert max_error(before, velocity) > 0.1 * np.abs(expected).max(), "the LoRA matters"
    record_parity("LoRA, folder of PEFT, velocity", max_error(velocity, expected) / np.abs(expected).max(), 1e-4)


@pytest.mark.parametrize(
    "options", [{"use_rslora": True}, {"alpha_pattern": {r"transformer_blocks\.[01]\.attn\.to_k": 9}}]
)
def test_a_scaling_rule_of_peft_is_followed(ours, reference_folder, tmp_path, options, record_parity):
    transformer = SD3Transformer2DModel.from_pretrained(reference_folder / "transformer")
    config = LoraConfig(r=4, lora_alpha=2, target_modules=["to_k"], **options)
    adapted = randomised(get_peft_model(transformer, config), seed=4).eval()
    adapted.save_pretrained(tmp_path)
    ours.load_lora(tmp_path / "adapter_model.safetensors")
    velocity, expected = velocities(ours, adapted)
    item = f"LoRA, {next(iter(options))}, velocity"
    record_parity(item, max_error(velocity, expected) / np.abs(expected).max(), 1e-4, PEFT=peft.__version__)


def test_two_loras_add_up(ours, reference, tmp_path, reference_folder, record_parity):
    for number, modules in enumerate((["to_q", "norm1.linear"], ["to_q", "ff.net.2"])):
        transformer = SD3Transformer2DModel.from_pretrained(reference_folder / "transformer")
        transformer.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=modules))
        layers = get_peft_model_state_dict(randomised(transformer, seed=number))
        reference.save_lora_weights(tmp_path / str(number), transformer_lora_layers=layers)
        reference.load_lora_weights(tmp_path / str(number), adapter_name=str(number))
        ours.load_lora(tmp_path / str(number), (0.5, -0.7)[number])
    reference.set_adapters(["0", "1"], [0.5, -0.7])
    velocity, expected = velocities(ours, reference.transformer)
    record_parity("LoRA, two at once, velocity", max_error(velocity, expected) / np.abs(expected).max(), 1e-4)
