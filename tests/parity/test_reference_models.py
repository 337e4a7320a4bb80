"""The stand-in for a published model is one: the reference's own pipeline runs from it."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from sd35flash_jax.checkpoint import load_checkpoint, parameters
from tests.parity.comparison import max_error
from tests.tiny_model import CLIP_VOCABULARY, CONFIG, END_OF_TEXT, T5_VOCABULARY


@pytest.fixture(scope="module")
def pipe(reference_folder) -> StableDiffusion3Pipeline:
    pipe = StableDiffusion3Pipeline.from_pretrained(reference_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_reference_pipeline_draws_from_the_folder(pipe):
    prompts = ["a red fox in the snow", "an astronaut rides a horse"]
    one, other = pipe(
        prompts,
        num_inference_steps=2,
        guidance_scale=1.0,
        height=64,
        width=96,
        latents=torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(0)).repeat(2, 1, 1, 1),
        output_type="np",
    ).images
    assert one.shape == (64, 96, 3)
    assert one.std() > 0.05
    assert max_error(one, other) > 0.05  # The prompt matters.


def test_the_tokenizers_agree_with_the_configurations(pipe):
    text = "A red fox; 雪 don't"
    tokenizers = (pipe.tokenizer, pipe.tokenizer_2)
    first, second = (tokenizer(text, padding="max_length", max_length=77)["input_ids"] for tokenizer in tokenizers)
    words = first.index(END_OF_TEXT) + 1
    assert len(pipe.tokenizer) == len(pipe.tokenizer_2) == CLIP_VOCABULARY
    assert first[:words] == second[:words]
    assert set(first[words:]) == {END_OF_TEXT}
    assert set(second[words:]) == {0}
    third = pipe.tokenizer_3(text)["input_ids"]
    assert len(pipe.tokenizer_3) <= T5_VOCABULARY
    assert third[-1] == pipe.tokenizer_3.eos_token_id == pipe.text_encoder_3.config.eos_token_id
    assert pipe.tokenizer_3.pad_token_id == pipe.text_encoder_3.config.pad_token_id


def test_no_parameter_of_the_folder_is_trivial(checkpoint):
    assert load_checkpoint(checkpoint).config == CONFIG
    for name, module in load_checkpoint(checkpoint, dtype="float32").components.items():
        for path, array in parameters(module).items():
            spread = np.asarray(array).std()
            assert spread > 0.01, f"{name} {path} is all but constant"
