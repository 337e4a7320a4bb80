import dataclasses
import functools
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
LAYERS = st.integers(1, 1024)
NUMBERS = st.floats(-1e6, 1e6)
POSITIVE = st.floats(1e-6, 1e6)


@st.composite
def clips(draw) -> CLIPConfig:
    heads, head_size = draw(st.integers(1, 2**12)), draw(st.integers(1, 2**12))
    activation = draw(st.sampled_from(["gelu", "quick_gelu"]))
    size = heads * head_size
    return CLIPConfig(
        size, draw(LAYERS), heads, draw(SIZES), size, activation, draw(SIZES), norm_epsilon=draw(POSITIVE)
    )


@st.composite
def transformers(draw) -> MMDiTConfig:
    depth = draw(LAYERS)
    dual = draw(st.integers(0, depth))
    return MMDiTConfig(
        depth, draw(SIZES), 4 * draw(LAYERS), draw(SIZES), qk_norm=draw(st.booleans()), dual_attention_blocks=dual
    )


WIDTHS = st.integers(1, 2**18).map(lambda groups: 32 * groups)
# A component at a time: together they must fit each other, which the tests of contradictions below vary.
CONFIGS = st.one_of(
    st.builds(ModelConfig, transformer=transformers()),
    st.builds(
        ModelConfig,
        vae=st.builds(VAEConfig, st.tuples(WIDTHS, WIDTHS, WIDTHS, WIDTHS), LAYERS, scale=POSITIVE, shift=NUMBERS),
    ),
    st.builds(ModelConfig, clip_l=clips(), clip_g=clips()),
    st.builds(
        ModelConfig,
        t5=st.builds(
            T5Config, SIZES, LAYERS, position_buckets=st.integers(4, 500), norm_epsilon=POSITIVE, max_tokens=SIZES
        ),
        schedule=st.builds(ScheduleConfig, st.floats(0.1, 100), st.just(((1.0, 0.5), (0.9,)))),
    ),
)


@given(CONFIGS)
def test_a_configuration_survives_json(config):
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("name", PRESETS)
def test_a_published_configuration_survives_json(name):
    assert ModelConfig.from_json(json.loads(json.dumps(PRESETS[name].to_json()))) == PRESETS[name]


def test_a_configuration_from_before_t5_had_a_number_of_tokens_has_the_published_one():
    data = CONFIG.to_json()
    del data["t5"]["max_tokens"]
    assert ModelConfig.from_json(data).t5_tokens == ModelConfig().t5_tokens == 256


@pytest.mark.parametrize("config", [*PRESETS.values(), ModelConfig()])
def test_the_published_models_draw_1024_pixels_a_side(config):
    assert config.default_size == 1024


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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clip_l.heads": 5}, "clip_l.hidden_size 32 does not divide into 5 heads"),
        ({"clip_g.projection_size": 64}, "clip_g.projection_size 64 is not its hidden_size 48"),
        ({"t5.position_max_distance": 8}, "t5.position_buckets 32 do not fit t5.position_max_distance 8"),
        ({"t5.hidden_size": 64}, "t5.hidden_size 64 is not transformer.context_size 96"),
        ({"clip_g.positions": 32}, "clip_l.positions 77 are not clip_g's 32"),
        ({"vae.norm_groups": 24}, "do not divide into 24 norm_groups"),
        ({"vae.latent_channels": 4}, "vae.latent_channels 4 are not transformer's 16"),
        ({"transformer.dual_attention_blocks": 5}, "transformer.dual_attention_blocks 5 are more than its depth"),
        ({"transformer.pooled_size": 128}, "the CLIP encoders' widths 80 do not make transformer.pooled_size 128"),
        ({"transformer.context_size": 64}, "the CLIP encoders' widths 80 are more than transformer.context_size 64"),
        ({"schedule.sigmas": [[0.2, 0.9]]}, r"schedule.sigmas \[0.2, 0.9\] do not fall strictly"),
        ({"schedule.sigmas": [[1.0, 0.5], [0.9, 0.4]]}, "schedule.sigmas has two schedules of one length"),
    ],
)
def test_fields_that_contradict_each_other_are_named(changes, message):
    data = json.loads(json.dumps(CONFIG.to_json()))
    for path, value in changes.items():
        *sections, field = path.split(".")
        functools.reduce(dict.__getitem__, sections, data)[field] = value
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_json(data)
