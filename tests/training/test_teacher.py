from argparse import Namespace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sd35flash_jax.checkpoint import Checkpoint, abstract_component, load_checkpoint, parameters
from sd35flash_jax.config import TEXT_ENCODERS
from tests.tiny_model import random_parameters
from tests.training.tiny import SIZE, TINY
from training import autoencoder, teacher
from training.model import TEXT_TOKENS
from training.pieces import save_pieces
from training.teacher import Data, flow_matching_loss, initial_parameters, table_in_place, write_checkpoint

BATCH = 32
LATENTS = (BATCH, SIZE // 8, SIZE // 8, 16)


def compiled(function, *arguments):
    """Quickly: what takes long here is to compile."""
    return jax.jit(function).lower(*arguments).compile({"xla_backend_optimization_level": 0})


@pytest.fixture(scope="module")
def initial():
    return compiled(partial(initial_parameters, TINY))()


@pytest.fixture(scope="module")
def loss(initial):
    """The loss and its gradient, of parameters, latents and key."""
    structures = {
        name: table_in_place(abstract_component(name, TINY), TINY, name, jnp.float32) for name in teacher.TRAINED
    }
    draw = np.random.default_rng(0)

    def ids(*shape):
        return {
            name: jnp.array(draw.integers(0, getattr(TINY, name).vocabulary, shape, np.int32)) for name in TEXT_ENCODERS
        }

    tokens, no_caption = ids(BATCH, teacher.CAPTIONS, TEXT_TOKENS), ids(TEXT_TOKENS)
    of = partial(flow_matching_loss, structures, TINY)

    def gradient(params, latents, key):
        return jax.value_and_grad(of, has_aux=True)(params, Data(latents, tokens, no_caption), key, jnp.float32)

    return compiled(gradient, initial, jnp.zeros(LATENTS), jax.random.key(0))


@pytest.mark.parametrize("clean", [0.0, 2.0])
def test_the_loss_begins_as_the_noises_and_the_pictures_power_for_the_velocity_is_zero(loss, initial, clean):
    latents = jnp.full(LATENTS, clean, jnp.float32)
    (value, metrics), _ = loss(initial, latents, jax.random.key(0))
    assert value == metrics["loss"] == pytest.approx(1 + clean**2, abs=0.15)
    assert metrics["late"] == pytest.approx(1 + clean**2, abs=0.3)


def test_every_parameter_learns_once_the_blocks_are_open_text_encoders_included(loss, initial):
    """But for the queries of the context in the last block, where it ends."""
    draw = np.random.default_rng(1)
    opened = {path: array + 0.05 * draw.standard_normal(array.shape, np.float32) for path, array in initial.items()}
    latents = jnp.array(draw.standard_normal(LATENTS, np.float32))
    _, gradients = loss(opened, latents, jax.random.key(0))
    unmoved = [path for path, gradient in gradients.items() if not np.asarray(gradient).any()]
    assert unmoved == ["transformer.last_block.context.attention.query_norm.scale"]
    assert all(np.isfinite(gradient).all() for gradient in gradients.values())


def test_only_what_comes_out_of_the_transformer_learns_at_first(loss, initial):
    _, gradients = loss(initial, jnp.ones(LATENTS), jax.random.key(0))
    moved = {path for path, gradient in gradients.items() if np.asarray(gradient).any()}
    assert moved == {"transformer.out.kernel", "transformer.out.bias"}


def test_training_begins_from_all_parameters_but_the_position_table(initial):
    expected = {
        f"{name}.{path}"
        for name in teacher.TRAINED
        for path in parameters(abstract_component(name, TINY))
        if path != "position_table"
    }
    assert initial.keys() == expected
    assert all(array.dtype == jnp.float32 for array in initial.values())


def test_t5s_queries_begin_smaller_than_its_keys(initial):
    queries, keys, _ = jnp.split(initial["t5.layers.qkv.kernel"], 3, axis=-1)
    assert queries.std() * TINY.t5.head_size**0.5 == pytest.approx(float(keys.std()), rel=0.1)


def test_a_written_checkpoint_holds_what_was_trained_the_autoencoder_and_the_tokenizers(
    initial, tokenizer_folders, tmp_path
):
    draw = np.random.default_rng(2)
    trained = {path: draw.standard_normal(array.shape).astype(jnp.bfloat16) for path, array in initial.items()}
    vae = random_parameters("vae", 3, TINY)
    write_checkpoint(tmp_path / "teacher", TINY, trained, vae, tokenizer_folders)
    loaded = load_checkpoint(tmp_path / "teacher", dtype="float32")
    assert loaded.config == TINY
    assert set(loaded.components) == {"vae", *teacher.TRAINED}
    read = {f"{name}.{path}": a for name, module in loaded.components.items() for path, a in parameters(module).items()}
    table = read.pop("transformer.position_table")
    assert table.shape == (TINY.transformer.position_table_side,) * 2 + (TINY.transformer.hidden_size,)
    assert np.abs(table).max() == pytest.approx(1, abs=0.01)
    expected = trained | {f"vae.{path}": array for path, array in vae.items()}
    assert read.keys() == expected.keys()
    for path, array in read.items():
        np.testing.assert_array_equal(array, np.asarray(expected[path], np.float32), err_msg=path)
    for name, folder in tokenizer_folders.items():
        for file in folder.iterdir():
            assert (loaded.tokenizers[name] / file.name).read_bytes() == file.read_bytes()


def test_a_result_that_is_there_already_is_refused_before_anything_is_trained(tmp_path):
    for name in ("autoencoder", "teacher"):
        (tmp_path / name).mkdir()
    with pytest.raises(FileExistsError, match="teacher already exists"):
        teacher.main(Namespace(output=tmp_path, name="teacher", seconds=1.0))
    with pytest.raises(FileExistsError, match="autoencoder already exists"):
        autoencoder.main(tmp_path, 1.0, 1, 1, SIZE, "float32")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"resume": "weights"}, "--resume needs the --tokenizers of its weights"),
        ({"batch": 6}, "--batch must be a positive multiple of the number of devices, 4, not 6"),
        ({"batch": 0}, "--batch must be a positive multiple of the number of devices, 4, not 0"),
        ({"scenes": 399}, "--scenes must be 400 or more, 100 a device, not 399"),
    ],
)
def test_options_that_do_not_fit_one_another_or_the_devices_are_refused(given, message, tmp_path):
    fit = {"output": tmp_path, "name": "teacher", "resume": None, "tokenizers": None, "batch": 8, "scenes": 400}
    teacher.check_options(Namespace(**fit), devices=4)
    with pytest.raises(ValueError, match=message):
        teacher.check_options(Namespace(**(fit | given)), devices=4)


def test_tokenizers_of_an_earlier_run_are_not_written_over(tmp_path):
    (tmp_path / "tokenizers").mkdir()
    options = Namespace(output=tmp_path, name="teacher", resume=None, tokenizers=None, batch=8, scenes=400)
    with pytest.raises(FileExistsError, match="tokenizers already exists"):
        teacher.check_options(options, devices=1)


def test_weights_of_another_model_are_not_gone_on_from(tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "load_checkpoint", lambda *_: Checkpoint(TINY, {}, {}))
    monkeypatch.setattr(teacher, "initial_parameters", lambda _: {"kernel": jnp.zeros(3)})
    save_pieces(tmp_path / "weights", {"kernel": np.zeros(4)})
    given = {
        "resume": tmp_path / "weights",
        "tokenizers": tmp_path,
        "autoencoder": tmp_path,
        "output": tmp_path / "new",
    }
    options = Namespace(**given, name="teacher", seconds=1, batch=8, scenes=800, dtype="float32")
    with pytest.raises(ValueError, match="weights holds the weights of another model"):
        teacher.main(options)
    assert not (tmp_path / "new").exists()
