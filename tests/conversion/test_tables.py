import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conversion import diffusers_layout as layout
from conversion import single_file_layout
from conversion.convert import check_table
from conversion.rules import IDENTITY, Rule, Table
from conversion.safetensors_file import Tensor
from sd35flash_jax.checkpoint import parameter_shapes
from sd35flash_jax.config import COMPONENTS, PRESETS, ModelConfig
from tests.diffusers_source import source_config, source_tensors
from tests.tiny_model import CONFIG, random_parameters

MANIFESTS = Path(__file__).parents[2].parent / "shared" / "manifests"
PUBLISHED = {
    "sd3-medium": "sd3_medium",
    "sd3.5-medium": "sd3.5_medium",
    "sd3.5-large": "sd3.5_large",
    "sd3.5-large-turbo": "sd3.5_large",
}
LAYOUTS = {"diffusers": layout.TABLES, "single file": single_file_layout.TABLES}
SUB_FOLDERS = {sub: name for name, sub in layout.FOLDERS.items()}


def param_shapes(name: str, config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return dict(parameter_shapes(name, config))


def read_manifest(preset: str, layout: str) -> dict:
    file = MANIFESTS / f"{PUBLISHED[preset]}.{layout}.json"
    if not file.exists():
        pytest.skip("the list of the published files' tensors is not beside this repository (../shared/manifests)")
    return json.loads(file.read_text())


@pytest.fixture(params=PUBLISHED)
def manifest(request):
    """A published model: its tensors' names and shapes by component, its transformer's configuration, our preset."""
    return read_manifest(request.param, "diffusers"), PRESETS[request.param]


def assert_covered(name: str, table: Table, shapes: dict[str, tuple[int, ...]], preset: ModelConfig) -> None:
    for alias, key in table.aliases.items():
        repeated = shapes.pop(alias, None)
        assert shapes.setdefault(key, repeated) == (repeated or shapes[key])
    assert not table.ignored & set(shapes)
    assert check_table(table, shapes, param_shapes(name, preset)) == []


def test_every_tensor_of_the_published_files_has_its_parameter_and_shape(manifest):
    content, preset = manifest
    components = {SUB_FOLDERS[sub]: tensors for sub, tensors in content.items() if sub in SUB_FOLDERS}
    assert "transformer" in components
    for name, tensors in components.items():
        table = layout.TABLES[name](getattr(preset, name))
        assert_covered(name, table, {key: tuple(shape) for key, shape in tensors.items()}, preset)


@pytest.mark.parametrize("preset", PUBLISHED)
@pytest.mark.parametrize("with_text_encoders", [False, True])
def test_every_tensor_of_the_published_single_files_has_its_parameter_and_shape(preset, with_text_encoders):
    content = read_manifest(preset, "single_file")
    shapes = content["single_file"] | (content["single_file_incl_text_encoders"] if with_text_encoders else {})
    tensors = {key: Tensor(Path("x"), np.dtype(np.float16), tuple(shape), 0) for key, shape in shapes.items()}
    parts = single_file_layout.split_components(Path("x"), tensors, None)
    assert set(parts) == set(COMPONENTS if with_text_encoders else ("transformer", "vae"))
    for name, part in parts.items():
        found = {key: tensor.shape for key, tensor in part.items()}
        config = getattr(ModelConfig.from_json({name: single_file_layout.CONFIGS[name](found)}), name)
        assert config == getattr(PRESETS[preset], name)
        assert_covered(name, single_file_layout.TABLES[name](config), found, PRESETS[preset])


@pytest.mark.parametrize("name", ["clip_l", "clip_g", "t5"])
def test_the_published_text_encoders_are_known_without_their_prefix(name):
    shapes = read_manifest("sd3.5-medium", "single_file")["single_file_incl_text_encoders"]
    prefix = single_file_layout.PREFIXES[name]
    tensors = {
        key.removeprefix(prefix): Tensor(Path("x"), np.dtype(np.float16), tuple(shape), 0)
        for key, shape in shapes.items()
        if key.startswith(prefix)
    }
    assert set(single_file_layout.split_components(Path("x"), tensors, None)) == {name}


def test_the_published_transformer_configuration_is_the_preset(manifest):
    content, preset = manifest
    config = ModelConfig.from_json({"transformer": layout.transformer_config(content["config"])})
    assert config.transformer == preset.transformer


MMDIT_STYLES = [
    replace(CONFIG.transformer, qk_norm=qk_norm, dual_attention_blocks=dual, depth=depth)
    for qk_norm in (False, True)
    for depth, dual in [(1, 0), (1, 1), (2, 1), (4, 0), (4, 2), (4, 3), (4, 4)]
]
VAE_STYLES = [
    replace(CONFIG.vae, channels=channels) for channels in [(32, 32, 32, 32), (32, 64, 96, 96), (96, 64, 64, 32)]
]
STYLES = [
    *((name, CONFIG) for name in COMPONENTS),
    *(("transformer", ModelConfig(style)) for style in MMDIT_STYLES),
    *(("vae", ModelConfig(vae=style)) for style in VAE_STYLES),
]


@pytest.mark.parametrize("name, config", STYLES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_table_fills_every_parameter_once_and_uses_no_tensor_twice(name, config, layout):
    table = LAYOUTS[layout][name](getattr(config, name))
    sources = [key for rule in table.rules for key in rule.sources]
    assert len(sources) == len(set(sources))
    shapes = param_shapes(name, config)
    faults = check_table(table, {}, shapes)
    assert [fault.split(":")[0] for fault in faults] == ["missing tensors"]


@pytest.mark.parametrize("name, config", STYLES)
def test_a_configuration_survives_the_way_through_the_diffusers_names(name, config):
    for written in (source_config(getattr(config, name)), layout.WRITERS[name](getattr(config, name))):
        fields = layout.CONFIGS[name](json.loads(json.dumps(written)))
        assert getattr(ModelConfig.from_json({name: fields}), name) == getattr(config, name)


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_tables_match_the_tensors_that_the_reference_classes_have(name):
    pytest.importorskip("torch", reason="needs the reference extra")
    pytest.importorskip("diffusers", reason="needs the reference extra")
    from tests import reference_models

    config = getattr(CONFIG, name)
    model = reference_models.BUILDERS[name](config)
    table = layout.TABLES[name](config)
    tensors = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    tensors = {key: shape for key, shape in tensors.items() if key not in table.aliases and key not in table.ignored}
    assert check_table(table, tensors, param_shapes(name, CONFIG)) == []


def faults_after(change) -> list[str]:
    """What `check_table` finds for the tiny autoencoder after `change` has worked on its three arguments."""
    table = layout.vae_table(CONFIG.vae)
    arguments = {
        "rules": list(table.rules),
        "sources": {key: array.shape for key, array in source_tensors("vae", random_parameters("vae")).items()},
        "params": param_shapes("vae", CONFIG),
    }
    change(**arguments)
    return check_table(Table(arguments["rules"]), arguments["sources"], arguments["params"])


BIAS = "encoder.conv_in.bias"
KERNEL = "encoder.conv_in.kernel"


def use_twice(rules, sources, params) -> None:
    rules.append(Rule("more", (BIAS,), IDENTITY))
    params["more"] = (32,)


@pytest.mark.parametrize(
    "change, fault",
    [
        (lambda rules, sources, params: None, None),
        (lambda rules, sources, params: sources.pop(BIAS), f"missing tensors: {BIAS}"),
        (lambda rules, sources, params: sources.update(more=(1,)), "surplus tensors: more"),
        (lambda rules, sources, params: sources.update({BIAS: (3,)}), f"{BIAS} (shape (3,), expected (32,))"),
        (lambda rules, sources, params: rules.append(rules[0]), f"parameters filled twice: ('{KERNEL}', None)"),
        (lambda rules, sources, params: params.update(more=(1,)), "parameters not filled: ('more', None)"),
        (lambda rules, sources, params: params.pop(BIAS), f"rules without a parameter: ('{BIAS}', None)"),
        (use_twice, f"tensors used twice: {BIAS}"),
    ],
)
def test_each_fault_between_table_and_model_is_named(change, fault):
    faults = faults_after(change)
    assert any(fault in found for found in faults) if fault else faults == []
