import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sd35flash_jax.config import (
    COMPONENTS,
    PRESETS,
    CLIPConfig,
    MMDiTConfig,
    ModelConfig,
    ScheduleConfig,
    T5Config,
    VAEConfig,
    read_json,
)
from tests.tiny_model import CONFIG

SIZES = st.integers(1, 2**24)
COUNTS = st.integers(0, 2**24)
NUMBERS = st.floats(-1e6, 1e6)
POSITIVE = st.floats(1e-6, 1e6)
CONFIGS = st.builds(
    ModelConfig,
    transformer=st.none()
    | st.builds(MMDiTConfig, SIZES, SIZES, SIZES, SIZES, qk_norm=st.booleans(), dual_attention_blocks=COUNTS),
    vae=st.none() | st.builds(VAEConfig, st.tuples(SIZES, SIZES, SIZES, SIZES), SIZES, scale=POSITIVE, shift=NUMBERS),
    clip_l=st.none()
    | st.builds(CLIPConfig, SIZES, SIZES, SIZES, SIZES, SIZES, st.sampled_from(["gelu", "quick_gelu"]), SIZES),
    clip_g=st.none() | st.builds(CLIPConfig, SIZES, SIZES, SIZES, SIZES, SIZES, st.just("gelu"), norm_epsilon=POSITIVE),
    t5=st.none() | st.builds(T5Config, SIZES, SIZES, position_buckets=SIZES, norm_epsilon=POSITIVE),
    schedule=st.builds(ScheduleConfig, st.floats(0.1, 100)),
)


@given(CONFIGS)
def test_a_configuration_survives_json(config):
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_published_configuration_survives_json(name):
    assert ModelConfig.from_json(json.loads(json.dumps(PRESETS[name].to_json()))) == PRESETS[name]


def test_distilled_schedules_survive_json():
    config = dataclasses.replace(CONFIG, schedule=ScheduleConfig(3.0, ((1.0, 0.75, 0.5, 0.25), (1.0, 0.5))))
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@given(st.sets(st.sampled_from(COMPONENTS)))
def test_components_are_those_present_in_the_fixed_order(present):
    config = ModelConfig(**{name: getattr(CONFIG, name) for name in present})
    assert config.components == tuple(name for name in COMPONENTS if name in present)


def changed(path: str, value: Any) -> dict[str, Any]:
    data = json.loads(json.dumps(CONFIG.to_json()))
    *parents, field = path.split(".")
    part = data
    for parent in parents:
        part = part[parent]
    part[field] = value
    return data


@pytest.mark.parametrize(
    "path, value",
    [
        ("transformer.depth", "many"),
        ("transformer.depth", 0),
        ("transformer.heads", -1),
        ("transformer.heads", 2.5),
        ("transformer.hidden", 64),
        ("transformer.dual_attention_blocks", -1),
        ("vae.channels", 3),
        ("vae.scale", None),
        ("vae.scale", 0.0),
        ("vae.shift", float("nan")),
        ("clip_l.activation", "relu"),
        ("clip_g.vocabulary", 2**40),
        ("t5.layers", []),
        ("t5", 7),
        ("schedule.shift", 0.0),
        ("schedule.sigmas", [[1.5]]),
        ("more", 1),
    ],
)
def test_a_wrong_or_unknown_field_is_named(path, value):
    with pytest.raises(ValueError, match="the model configuration is not valid") as caught:
        ModelConfig.from_json(changed(path, value))
    assert path in str(caught.value)


def test_all_wrong_fields_are_named_at_once():
    data = changed("transformer.depth", "many") | {"schedule": {"shift": -1}}
    with pytest.raises(ValueError) as caught:
        ModelConfig.from_json(data)
    assert "transformer.depth" in str(caught.value)
    assert "schedule.shift" in str(caught.value)


def test_a_missing_field_is_named():
    data = CONFIG.to_json()
    del data["clip_l"]["hidden_size"]
    with pytest.raises(ValueError, match=r"clip_l\.hidden_size"):
        ModelConfig.from_json(data)


@pytest.mark.parametrize("data", [None, [], "config", 3])
def test_something_other_than_an_object_is_refused(data):
    with pytest.raises(ValueError, match="the model configuration is not valid"):
        ModelConfig.from_json(data)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff{}", b"[" * 100_000])
def test_a_file_that_is_not_json_is_named(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_json_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist") as caught:
        read_json(tmp_path / "a.json")
    assert str(tmp_path / "a.json") in str(caught.value)


def test_the_presets_have_the_published_numbers_of_parameters():
    # SD3 paper, table 7 and the model cards: 2 billion for the mediums and 8 billion for the large.
    def transformer_size(name: str) -> float:
        from sd35flash_jax.checkpoint import abstract_component, parameters

        arrays = parameters(abstract_component("transformer", PRESETS[name]))
        return sum(array.size for path, array in arrays.items() if path != "position_table") / 1e9

    assert transformer_size("sd3-medium") == pytest.approx(2.03, abs=0.01)
    assert transformer_size("sd3.5-medium") == pytest.approx(2.24, abs=0.02)
    assert transformer_size("sd3.5-large") == pytest.approx(8.06, abs=0.02)
