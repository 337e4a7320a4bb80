import hashlib
import json

import pytest

from conversion import convert
from conversion.info import describe, format_description
from sd35flash_jax.checkpoint import parameter_shapes, save_checkpoint
from sd35flash_jax.cli import main
from sd35flash_jax.config import ModelConfig
from tests.diffusers_source import weights_file, write_folder
from tests.tiny_model import CONFIG, random_parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("info") / "tiny-sd3.5"
    write_folder(folder)
    return folder


@pytest.fixture(scope="module")
def converted(folder, tmp_path_factory):
    destination = tmp_path_factory.mktemp("info") / "checkpoint"
    convert(folder, destination, dtype="bfloat16")
    return destination


def count(name: str) -> int:
    sizes = []
    for shape in parameter_shapes(name, CONFIG).values():
        size = 1
        for side in shape:
            size *= side
        sizes.append(size)
    return sum(sizes)


@pytest.mark.parametrize("name", CONFIG.components)
def test_source_and_checkpoint_have_the_same_parameters_counted(name, folder, converted):
    for path, dtype in ((folder, "float32"), (converted, "bfloat16")):
        component = describe(path)["components"][name]
        assert component["parameters"] == count(name)
        assert set(component["dtypes"]) == {dtype}
        assert component["bytes"] == {"bfloat16": 2 * count(name), "float32": 4 * count(name)}


def test_a_checkpoint_tells_the_hashes_of_its_source_as_the_source_does(folder, converted):
    of_source, of_checkpoint = describe(folder), describe(converted)
    assert (of_source["kind"], of_checkpoint["kind"]) == ("diffusers", "checkpoint")
    assert of_source["source"]["sha256"] == of_checkpoint["source"]["sha256"]
    digest = hashlib.sha256(weights_file(folder, "vae").read_bytes()).hexdigest()
    assert of_source["source"]["sha256"]["vae/diffusion_pytorch_model.safetensors"] == digest


def test_the_text_names_every_component_and_on_request_every_tensor(converted):
    description = describe(converted)
    text = format_description(description)
    assert f"| transformer | {count('transformer'):,} | bfloat16 |" in text and "depth 4" in text
    assert "position_table" not in text
    assert "  position_table  bfloat16 [24, 24, 64]" in format_description(description, with_tensors=True)


def test_int8_weights_are_said_to_be_stored_as_such_and_their_scales_are_no_parameters(tmp_path):
    save_checkpoint(tmp_path / "int8", ModelConfig(t5=CONFIG.t5), {"t5": random_parameters("t5")}, int8=True)
    description = describe(tmp_path / "int8")
    assert description["components"]["t5"]["parameters"] == count("t5")
    assert set(description["components"]["t5"]["dtypes"]) == {"int8", "float32"}
    assert "  layers.qkv.kernel  int8 [3, 96, 192]" in format_description(description, with_tensors=True)


def test_the_command_prints_json_and_refuses_what_it_cannot_read(converted, tmp_path, capsys):
    assert main(["info", str(converted), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "checkpoint"
    assert main(["info", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and str(tmp_path) in captured.err
