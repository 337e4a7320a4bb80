from dataclasses import replace

import jax
import numpy as np
import pytest

from sd35flash_jax import Conditioning, FlashPipeline, checkpoint, save_checkpoint
from tests.tiny_model import CONFIG, random_parameters

SIZE = {"height": 64, "width": 96}


@pytest.fixture(scope="module")
def pipe(small_checkpoint) -> FlashPipeline:
    return FlashPipeline.from_pretrained(small_checkpoint, dtype="float32", max_t5_tokens=32)


def test_nothing_recompiles_for_a_new_prompt_seed_guidance_step_count_or_sigmas(pipe, compilations):
    pipe("a red fox", **SIZE)
    # The first call compiles, or an earlier test has: start from a shape that this process has never seen.
    pipe(["a red fox"] * 3, height=80, width=48)
    assert compilations, "the listener hears compilations"
    compilations.clear()
    pipe(["two cats", "a lake", "soup"], height=80, width=48, seed=7, steps=2)
    pipe(["two cats"] * 3, height=80, width=48, guidance=4.5, negative_prompt="rain", steps=9)
    pipe(["a lake"] * 3, height=80, width=48, guidance=2.0, sigmas=[1.0, 0.7, 0.4, 0.2])
    pipe(["a lake"] * 3, height=80, width=48, steps=50, progress=True)
    assert compilations == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_call_compiles_nothing_where_its_size_was_compiled_for_while_the_weights_were_read(
    small_checkpoint, dtype, compilations
):
    pipe = FlashPipeline.from_pretrained(small_checkpoint, dtype, max_t5_tokens=24, compile_for=(2, 112, 80))
    assert compilations, "the listener hears compilations"
    compilations.clear()
    pipe(["a red fox", "two cats"], height=112, width=80, guidance=2.0)
    assert compilations == []


@pytest.mark.parametrize("on_host", [True, False])
def test_programs_run_once_while_tokenizers_load_where_that_sets_a_device_up(small_checkpoint, on_host, monkeypatch):
    monkeypatch.setattr("sd35flash_jax.pipeline.on_host", lambda sharding: on_host)
    decoded = []
    monkeypatch.setattr(FlashPipeline, "decode", lambda pipe, latents: decoded.append(latents.shape) or latents)
    pipe = FlashPipeline.from_pretrained(small_checkpoint, max_t5_tokens=24, compile_for=(2, 112, 80))
    assert decoded == [] if on_host else decoded == [(2, 14, 10, 16)]
    assert set(pipe.tokenizers) == {"clip_l", "clip_g", "t5"}


def test_what_cannot_be_compiled_for_is_refused(pipe):
    with pytest.raises(ValueError, match="height 100"):
        pipe.compile(1, 100, 64)
    with pytest.raises(ValueError, match="at least one image"):
        pipe.compile(0)
    with pytest.raises(ValueError, match="has no vae"):
        FlashPipeline(pipe.config, {"transformer": pipe.components["transformer"]}, {}).compile()


def test_denoising_is_guided_euler_integration_of_the_velocity(pipe):
    positive, negative = pipe.encode(["a red fox"]), pipe.encode(["rain"])
    noise = pipe.noise(3, 1, **SIZE)
    sigmas = np.float32([1.0, 0.8, 0.3, 0.0])
    for guidance in (1.0, 3.0):
        latents = np.asarray(noise)
        for sigma, following in zip(sigmas, sigmas[1:]):
            velocity = np.asarray(pipe.velocity(latents, 1000 * sigma, positive))
            if guidance > 1:
                away = np.asarray(pipe.velocity(latents, 1000 * sigma, negative))
                velocity = away + guidance * (velocity - away)
            latents = latents + (following - sigma) * velocity
        result = pipe.denoise(noise, positive, sigmas=sigmas, guidance=guidance, negative=negative)
        np.testing.assert_allclose(result, latents, atol=1e-5 * np.abs(latents).max())


def test_guidance_up_to_one_ignores_the_negative_prompt(pipe):
    noise, positive = pipe.noise(0, 1, **SIZE), pipe.encode(["a red fox"])
    plain = pipe.denoise(noise, positive)
    for guidance in (0.0, 1.0):
        same = pipe.denoise(noise, positive, guidance=guidance, negative=pipe.encode(["rain"]))
        np.testing.assert_array_equal(plain, same)


def test_image_i_of_a_batch_is_the_single_image_of_the_ith_next_seed(pipe):
    prompts = ["a red fox", "two cats", "a lake"]
    batch = pipe(prompts, seed=10, guidance=3.0, **SIZE)
    for index, prompt in enumerate(prompts):
        single = pipe(prompt, seed=10 + index, guidance=3.0, **SIZE)
        scale = np.abs(single.latents).max()
        np.testing.assert_allclose(batch.latents[index], single.latents[0], atol=1e-5 * scale)
        difference = np.asarray(batch.images[index], int) - np.asarray(single.images[0], int)
        assert np.abs(difference).max() <= 1


def test_noise_depends_on_its_seed_alone(pipe):
    batch = np.asarray(pipe.noise(5, 3, **SIZE))
    assert batch.shape == (3, 8, 12, 16) and batch.dtype == np.float32
    for index in range(3):
        np.testing.assert_array_equal(batch[index], pipe.noise(5 + index, 1, **SIZE)[0])
    assert not np.array_equal(batch[0], batch[1])
    assert abs(batch.mean()) < 0.05 and abs(batch.std() - 1) < 0.05


def test_the_same_call_twice_gives_the_same_latents_bit_for_bit(pipe):
    np.testing.assert_array_equal(pipe("a red fox", **SIZE).latents, pipe("a red fox", **SIZE).latents)


def test_prompt_and_seed_change_the_image(pipe):
    fox = pipe("a red fox", **SIZE).latents
    assert not np.allclose(fox, pipe("two cats", **SIZE).latents)
    assert not np.allclose(fox, pipe("a red fox", seed=1, **SIZE).latents)


def test_the_result_carries_images_latents_timings_and_metadata(pipe):
    result = pipe(["a red fox", "two cats"], seed=3, steps=2, guidance=2.0, negative_prompt="rain", **SIZE)
    assert [image.size for image in result.images] == [(96, 64)] * 2
    assert result.latents.shape == (2, 8, 12, 16)
    assert set(result.timings) == {"encode", "denoise", "decode"}
    first, second = result.metadata
    assert (first["prompt"], first["seed"], second["seed"]) == ("a red fox", "3", "4")
    assert first["steps"] == "2" and first["sigmas"].split()[0] == "1" and first["negative_prompt"] == "rain"
    assert first["software"].startswith("sd35flash-jax ")


def test_metadata_tells_what_the_image_depends_on(small_checkpoint):
    pipe = FlashPipeline.from_pretrained(small_checkpoint, text_encoders="t5", max_t5_tokens=16)
    (metadata,) = pipe("a red fox", negative_prompt="rain", **SIZE).metadata
    assert metadata["text_encoders"] == "t5" and metadata["max_t5_tokens"] == "16" and metadata["dtype"] == "bfloat16"
    assert "negative_prompt" not in metadata, "it has no effect without guidance"


def test_pixels_are_in_range_and_encode_back_to_latents_of_the_right_shape(pipe):
    latents = pipe.noise(0, 2, **SIZE)
    pixels = pipe.decode(latents)
    assert pixels.shape == (2, 64, 96, 3) and pixels.dtype == np.float32
    assert pixels.min() >= 0 and pixels.max() <= 1
    assert pipe.encode_image(pixels).shape == latents.shape


def test_one_row_of_conditioning_serves_a_whole_batch(pipe):
    noise = pipe.noise(0, 2, **SIZE)
    shared = pipe.denoise(noise, pipe.encode(["a red fox"]))
    repeated = pipe.denoise(noise, pipe.encode(["a red fox"] * 2))
    np.testing.assert_allclose(shared, repeated, atol=1e-5 * np.abs(repeated).max())


def test_an_encoder_that_is_left_out_gives_zeros(small_checkpoint, pipe):
    clips = FlashPipeline.from_pretrained(
        small_checkpoint, dtype="float32", text_encoders=("clip_l", "clip_g"), max_t5_tokens=32
    ).encode(["a red fox"])
    t5 = FlashPipeline.from_pretrained(
        small_checkpoint, dtype="float32", text_encoders=("t5",), max_t5_tokens=32
    ).encode(["a red fox"])
    whole = pipe.encode(["a red fox"])
    np.testing.assert_array_equal(clips.context[:, :77], whole.context[:, :77])
    np.testing.assert_array_equal(clips.pooled, whole.pooled)
    np.testing.assert_array_equal(clips.context[:, 77:], 0)
    np.testing.assert_array_equal(t5.context[:, 77:], whole.context[:, 77:])
    np.testing.assert_array_equal(t5.context[:, :77], 0)
    np.testing.assert_array_equal(t5.pooled, 0)


def test_a_checkpoint_without_text_encoders_works_from_conditioning_of_any_length(tmp_path):
    config = replace(CONFIG, clip_l=None, clip_g=None, t5=None)
    save_checkpoint(tmp_path / "bare", config, {name: random_parameters(name) for name in config.components})
    pipe = FlashPipeline.from_pretrained(tmp_path / "bare", dtype="float32")
    draw = np.random.default_rng(0)
    for tokens in (1, 5):
        conditioning = Conditioning(draw.normal(size=(1, tokens, 96)), draw.normal(size=(1, 80)))
        latents = pipe.denoise(pipe.noise(0, 1, **SIZE), conditioning)
        assert np.isfinite(latents).all()
    with pytest.raises(ValueError, match="no text encoder is loaded"):
        pipe("a red fox", **SIZE)


def test_a_missing_component_is_named(tmp_path):
    config = replace(CONFIG, vae=None)
    save_checkpoint(tmp_path / "blind", config, {name: random_parameters(name) for name in config.components})
    pipe = FlashPipeline.from_pretrained(tmp_path / "blind", dtype="float32")
    with pytest.raises(ValueError, match="this checkpoint has no vae"):
        pipe.decode(pipe.noise(0, 1, **SIZE))


def test_from_pretrained_without_a_path_loads_the_bundled_model(small_checkpoint, monkeypatch):
    monkeypatch.setattr(checkpoint, "BUNDLED", small_checkpoint)
    assert FlashPipeline.from_pretrained().config == CONFIG


def test_from_pretrained_without_a_path_says_how_to_get_a_model_where_none_is_bundled(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path / "absent")
    with pytest.raises(checkpoint.CheckpointError, match="sd35flash-jax convert FOLDER CHECKPOINT"):
        FlashPipeline.from_pretrained()


def test_token_count_and_size_are_the_checkpoint_s_own_unless_given(pipe):
    config = replace(
        CONFIG, t5=replace(CONFIG.t5, max_tokens=16), transformer=replace(CONFIG.transformer, position_base=4)
    )
    own = FlashPipeline(config, pipe.components, pipe.tokenizers)
    assert own.encode(["a red fox"]).context.shape == (1, 77 + 16, 96)
    assert own("a red fox").images[0].size == (64, 64) and own("a red fox", height=32).images[0].size == (64, 32)
    assert FlashPipeline(config, pipe.components, pipe.tokenizers, max_t5_tokens=8).max_t5_tokens == 8
    assert FlashPipeline(replace(CONFIG, t5=None), pipe.components, pipe.tokenizers).max_t5_tokens == 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"height": 100}, "height 100 is not a positive multiple of 16; try 96 or 112"),
        ({"width": 0}, "width 0 is not a positive multiple of 16"),
        ({"width": -64}, "width -64 is not a positive multiple of 16"),
        ({"height": 400}, "height 400 is beyond the model's position table, which ends at 384"),
        ({"seed": -1}, "seeds must be in"),
        ({"seed": 2**32}, "seeds must be in"),
        ({"steps": 0}, "steps must be from 1 to 1000"),
        ({"sigmas": [0.5, 1.0]}, "sigmas must fall strictly"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
    ],
)
def test_an_option_out_of_range_is_refused(pipe, options, message):
    with pytest.raises(ValueError, match=message):
        pipe("a red fox", **(SIZE | options))


def test_a_dtype_or_encoder_that_does_not_exist_is_refused(small_checkpoint):
    with pytest.raises(ValueError, match="dtype 'float8' is not supported; choose one of bfloat16, float32"):
        FlashPipeline.from_pretrained(small_checkpoint, dtype="float8")
    with pytest.raises(ValueError, match="no text encoder 'clip_h'"):
        FlashPipeline.from_pretrained(small_checkpoint, text_encoders=("clip_h",))


def test_arrays_of_the_wrong_shape_are_refused(pipe):
    good = pipe.encode(["a red fox"])
    noise = pipe.noise(0, 2, **SIZE)
    with pytest.raises(ValueError, match=r"latents must be \(batch, height/8, width/8, 16\)"):
        pipe.denoise(noise[..., :8], good)
    with pytest.raises(ValueError, match=r"context must be \(batch, tokens, 96\)"):
        pipe.denoise(noise, Conditioning(good.context[..., :10], good.pooled))
    with pytest.raises(ValueError, match=r"pooled must be \(batch, 80\)"):
        pipe.denoise(noise, Conditioning(good.context, good.pooled[:, :10]))
    three = pipe.encode(["a", "b", "c"])
    with pytest.raises(ValueError, match="does not fit a batch of 2"):
        pipe.denoise(noise, three)
    shorter = Conditioning(good.context[:, :50], good.pooled)
    with pytest.raises(ValueError, match="the negative context has 50 tokens and the positive one 109"):
        pipe.denoise(noise, good, guidance=2.0, negative=shorter)
    with pytest.raises(ValueError, match="needs a negative Conditioning"):
        pipe.denoise(noise, good, guidance=2.0)
    with pytest.raises(ValueError, match="timestep must be one number"):
        pipe.velocity(noise, 1001.0, good)
    with pytest.raises(ValueError, match=r"pixels must be \(batch, height, width, 3\)"):
        pipe.encode_image(np.zeros((64, 96, 3)))
    with pytest.raises(ValueError, match=r"pixels must be floats in \[0, 1\], not uint8"):
        pipe.encode_image(np.zeros((1, 64, 96, 3), np.uint8))
    with pytest.raises(ValueError, match="latents must be"):
        pipe.denoise(noise[:0], good)
    with pytest.raises(ValueError, match="at least one image"):
        pipe.noise(0, -2, **SIZE)


@pytest.mark.parametrize("prompt", ["fox \udcff", 3, None])
def test_a_prompt_that_is_not_text_is_refused(pipe, prompt):
    with pytest.raises(ValueError, match="a prompt must be text that UTF-8 can hold"):
        pipe([prompt], **SIZE)


def test_a_negative_context_of_another_length_does_not_matter_without_guidance(pipe):
    noise, positive = pipe.noise(0, 1, **SIZE), pipe.encode(["a red fox"])
    shorter = Conditioning(positive.context[:, :50], positive.pooled)
    np.testing.assert_array_equal(pipe.denoise(noise, positive), pipe.denoise(noise, positive, negative=shorter))


def test_a_checkpoint_of_which_nothing_is_loaded_is_refused(tmp_path):
    save_checkpoint(
        tmp_path / "text",
        replace(CONFIG, transformer=None, vae=None, clip_l=None, clip_g=None),
        {"t5": random_parameters("t5")},
    )
    with pytest.raises(ValueError, match="there is no component to run"):
        FlashPipeline.from_pretrained(tmp_path / "text", text_encoders=())


def test_the_dtype_of_a_pipeline_is_that_of_its_parameters(small_checkpoint, pipe):
    assert pipe.dtype == "float32"
    assert FlashPipeline.from_pretrained(small_checkpoint).dtype == "bfloat16"
    assert FlashPipeline(pipe.config, pipe.components, pipe.tokenizers).dtype == "float32"


def test_negative_prompts_must_be_as_many_as_the_prompts(pipe):
    with pytest.raises(ValueError, match="2 negative prompts do not fit 1 prompts"):
        pipe("a red fox", negative_prompt=["rain", "fog"], guidance=2.0, **SIZE)


def test_an_image_of_nan_is_an_error_and_not_a_black_picture(pipe):
    broken = FlashPipeline(pipe.config, pipe.components, pipe.tokenizers, max_t5_tokens=32)
    broken.components["vae"] = jax.tree.map(lambda array: array * np.nan, pipe.components["vae"])
    with pytest.raises(FloatingPointError, match="came out as NaN"):
        broken("a red fox", **SIZE)
