"""What we export, read by the reference: the same tensors and the same images."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from conversion import convert, export
from tests import reference_models
from tests.conversion.single_file_source import SMALL
from tests.tiny_model import CONFIG

MODULES = ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3")


def loaded(folder: Path) -> StableDiffusion3Pipeline:
    return StableDiffusion3Pipeline.from_pretrained(folder)


def image(pipe: StableDiffusion3Pipeline) -> torch.Tensor:
    # PyTorch's kernels round by where a weight lies in memory; a copy is always aligned, one mapped from a file is not.
    for name in MODULES:
        for weight in getattr(pipe, name).parameters():
            weight.data = weight.data.clone()
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(
        "a red fox in the snow", generator=generator, num_inference_steps=2, height=64, width=96, output_type="pt"
    ).images


def assert_same(found: StableDiffusion3Pipeline, expected: StableDiffusion3Pipeline) -> None:
    """Every tensor is equal, and so is an image."""
    for name in MODULES:
        state = getattr(expected, name).state_dict()
        assert set(getattr(found, name).state_dict()) == set(state)
        for key, tensor in getattr(found, name).state_dict().items():
            assert torch.equal(tensor, state[key]), f"{name} {key}"
    drawn = image(found)
    assert drawn.std() > 0.05
    assert torch.equal(drawn, image(expected))


def test_the_reference_loads_an_exported_folder(reference_folder, checkpoint, tmp_path):
    export(checkpoint, tmp_path / "exported")
    assert_same(loaded(tmp_path / "exported"), loaded(reference_folder))


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory) -> Path:
    """A model that a single file describes wholly, as the reference saves it. It reads CLIP-L's pooled state as it is
    from a single file, whatever projection is in there."""
    folder = tmp_path_factory.mktemp("small") / "source"
    reference_models.write_folder(folder, SMALL)
    clip = reference_models.clip(SMALL.clip_l)
    clip.text_projection.weight.data = torch.eye(64)
    clip.save_pretrained(folder / "text_encoder")
    return folder


@pytest.mark.filterwarnings("ignore:a single file cannot say")
def test_the_reference_loads_an_exported_single_file(small_folder, tmp_path):
    assert convert(small_folder, tmp_path / "checkpoint") == SMALL
    export(tmp_path / "checkpoint", tmp_path / "model.safetensors", "single-file")
    found = StableDiffusion3Pipeline.from_single_file(
        str(tmp_path / "model.safetensors"), config=str(small_folder), local_files_only=True
    )
    found.text_encoder_3.eval()  # diffusers leaves it in training, with its dropout
    assert_same(found, loaded(small_folder))


def test_shards_in_half_precision_load_as_well(reference_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["conversion.export"], "SHARD_BYTES", 200_000)
    half = loaded(reference_folder).to(torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    assert convert(tmp_path / "half", tmp_path / "checkpoint") == CONFIG
    export(tmp_path / "checkpoint", tmp_path / "exported")
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path / "exported", dtype="auto")
    for name in MODULES:
        state = getattr(half, name).state_dict()
        for key, tensor in getattr(again, name).state_dict().items():
            assert torch.equal(tensor.to(torch.float16), state[key]), f"{name} {key}"
