import os
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sd35flash_jax import FlashPipeline, compilation
from sd35flash_jax.checkpoint import parameters
from sd35flash_jax.frozen import Frozen
from sd35flash_jax.kept_programs import kept
from sd35flash_jax.models.mmdit import MMDiT
from sd35flash_jax.models.vae import VAE

X = np.float32([[1, 2, 3]])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where programs are kept while the test runs; JAX's own cache stays off."""
    monkeypatch.setattr(compilation, "_local_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "lowered"


@pytest.fixture
def traced():
    return []


@pytest.fixture
def program(traced):
    """Makes a program as a new process has it, which notes each time that its Python code runs."""

    def make():
        @partial(jax.jit, static_argnames="power")
        @kept
        def apply(layer, x, *, power=2):
            traced.append(x.shape)
            return {"sum": layer.module(x) ** power, "first": x[:, 0]}

        return apply

    return make


def layer(seed: int = 0, identity: str | None = "layer") -> Frozen[nnx.Linear]:
    return Frozen(nnx.Linear(3, 2, rngs=nnx.Rngs(seed)), identity)


def test_a_program_is_traced_once_and_then_read_with_the_same_results(folder, program, traced):
    first, again = (program()(layer(), X) for _ in range(2))
    assert traced == [(1, 3)] and len(list(folder.iterdir())) == 1
    jax.tree.map(np.testing.assert_array_equal, first, again)
    expected = layer().module(X) ** 2
    np.testing.assert_allclose(again["sum"], expected, rtol=1e-6)


def test_a_kept_program_takes_other_weights(folder, program, traced):
    first, other = (program()(layer(seed), X)["sum"] for seed in (0, 1))
    assert traced == [(1, 3)] and not np.allclose(first, other)
    np.testing.assert_allclose(other, layer(1).module(X) ** 2, rtol=1e-6)


def test_whatever_a_program_depends_on_has_a_program_of_its_own(folder, program, traced, monkeypatch):
    def differently(**surroundings):
        before = len(traced)
        with jax.default_matmul_precision(surroundings.get("precision", "default")):
            module = layer(identity=surroundings.get("identity", "layer"))
            program()(module, surroundings.get("x", X), power=surroundings.get("power", 2))
        return len(traced) - before

    assert differently() == 1 and differently() == 0
    assert differently(x=np.ones((2, 3), np.float32)) == 1
    assert differently(x=X.astype(jnp.bfloat16)) == 1
    assert differently(identity="another") == 1
    assert differently(precision="highest") == 1
    assert differently(power=3) == 1
    monkeypatch.setattr(compilation, "_CODE", "changed")
    monkeypatch.setattr(compilation, "_digest_of_code", lambda: "changed")
    assert differently() == 1
    assert len(list(folder.iterdir())) == 7


def test_a_program_belongs_to_the_names_of_its_arguments(folder, traced):
    @jax.jit
    @kept
    def one_of(layer, inputs):
        traced.append(list(inputs))
        return inputs["first"] if "first" in inputs else -inputs["second"]

    for name, sign in (("first", 1), ("second", -1)):
        np.testing.assert_array_equal(one_of(layer(), {name: X}), sign * X)
    assert traced == [["first"], ["second"]]


def test_code_that_changed_after_its_import_keeps_nothing(folder, program, monkeypatch):
    monkeypatch.setattr(compilation, "_digest_of_code", lambda: "changed")
    program()(layer(), X)
    assert not folder.exists()


def test_a_program_that_cannot_be_written_down_runs_all_the_same(folder, capsys):
    @jax.jit
    @kept
    def shown(layer, x):
        jax.debug.print("x is {}", x[0, 0])
        return layer.module(x)

    np.testing.assert_allclose(shown(layer(), X), layer().module(X), rtol=1e-6)
    jax.effects_barrier()
    assert "x is 1.0" in capsys.readouterr().out and not folder.exists()


def test_nothing_is_kept_of_a_module_without_identity(folder, program, traced):
    for _ in range(2):
        program()(layer(identity=None), X)
    assert len(traced) == 2 and not folder.exists()


DAMAGE = {
    "empty": lambda whole: b"",
    "another file": lambda whole: b"not a program",
    "half": lambda whole: whole[: len(whole) // 2],
    "a byte changed": lambda whole: whole[:700] + bytes([whole[700] ^ 1]) + whole[701:],
    "a block of zeros": lambda whole: whole[:400] + bytes(200) + whole[600:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_made_anew(folder, program, traced, damage):
    program()(layer(), X)
    [file] = folder.iterdir()
    whole = file.read_bytes()
    assert DAMAGE[damage](whole) != whole
    file.write_bytes(DAMAGE[damage](whole))
    np.testing.assert_allclose(program()(layer(), X)["sum"], layer().module(X) ** 2, rtol=1e-6)
    assert len(traced) == 2
    program()(layer(), X)
    assert len(traced) == 2, "it is whole again"


@pytest.mark.skipif(os.geteuid() == 0 if hasattr(os, "geteuid") else False, reason="the superuser may write anywhere")
def test_a_folder_that_cannot_be_written_is_done_without(folder, program):
    folder.parent.mkdir()
    folder.parent.chmod(0o500)
    np.testing.assert_allclose(program()(layer(), X)["sum"], layer().module(X) ** 2, rtol=1e-6)


def test_a_file_in_the_place_of_the_folder_is_done_without(folder, program):
    folder.parent.mkdir()
    folder.write_text("in the way")
    np.testing.assert_allclose(program()(layer(), X)["sum"], layer().module(X) ** 2, rtol=1e-6)
    assert [path.name for path in folder.parent.iterdir()] == ["lowered"]


def test_a_pipeline_that_is_compiled_for_while_it_is_loaded_traces_no_kept_program(
    small_checkpoint, folder, monkeypatch, compilations
):
    evaluations = []
    predict = MMDiT.predict
    monkeypatch.setattr(MMDiT, "predict", lambda *arguments: evaluations.append(1) or predict(*arguments))
    images = []
    for _ in range(2):
        jax.clear_caches()
        evaluations.clear()
        pipe = FlashPipeline.from_pretrained(small_checkpoint, max_t5_tokens=24, compile_for=(1, 64, 48))
        compilations.clear()
        images.append(pipe("a red fox", height=64, width=48, guidance=2.0).images[0])
        assert compilations == []
    assert evaluations == [] and {file.name.split("-")[0] for file in folder.iterdir()} == {
        "encode_tokens",
        "modulations",
        "add_velocity",
        "_decode",
    }
    plain = FlashPipeline.from_pretrained(small_checkpoint, max_t5_tokens=24)
    images.append(plain("a red fox", height=64, width=48, guidance=2.0).images[0])
    first, again, traced = (np.asarray(image) for image in images)
    np.testing.assert_array_equal(first, again)
    assert np.abs(first.astype(int) - traced).max() <= 1


def test_another_size_and_other_weights_are_drawn_as_they_are_without_kept_programs(small_checkpoint, folder):
    jax.clear_caches()
    pipe = FlashPipeline.from_pretrained(small_checkpoint, max_t5_tokens=24, compile_for=(1, 64, 48))
    plain = FlashPipeline.from_pretrained(small_checkpoint, max_t5_tokens=24)
    drawn = []
    for weight in (1, 2):
        for one in (pipe, plain):
            parameter = np.asarray(parameters(plain.components["transformer"])["patch_embed.kernel"])
            one._put("transformer", {"patch_embed.kernel": parameter * weight})
            drawn.append(np.asarray(one("a red fox", height=80, width=64).images[0], np.int32))
    first, first_plain, other, other_plain = drawn
    assert np.abs(first - first_plain).max() <= 1 and np.abs(other - other_plain).max() <= 1
    assert np.abs(first - other).max() > 1 and len(list(folder.iterdir())) == 4 + 2  # of evaluation and decoding


def test_a_component_of_ones_own_has_no_kept_program(small_checkpoint, folder):
    class Black(VAE):
        def decode(self, latents):
            return 0 * super().decode(latents)

    size = {"height": 64, "width": 48}
    pipe = FlashPipeline.from_pretrained(small_checkpoint, max_t5_tokens=24, compile_for=(1, 64, 48))
    noise = pipe.noise(0, 1, **size)
    assert np.asarray(pipe.decode(noise)).max() > 0
    black = Black(pipe.config.vae, rngs=nnx.Rngs(0))
    pipe.components["vae"] = jax.tree.map(lambda array: array.astype(jnp.bfloat16), black)
    assert np.asarray(pipe.decode(noise)).max() == 0


def test_a_pipeline_on_several_devices_keeps_no_program(small_checkpoint, tmp_path):
    script = f"""
import jax
from jax.sharding import NamedSharding, PartitionSpec
from sd35flash_jax import FlashPipeline
jax.config.update("jax_compilation_cache_dir", {str(tmp_path)!r})
mesh = jax.make_mesh((2,), ("data",))
for device in (None, NamedSharding(mesh, PartitionSpec())):
    pipe = FlashPipeline.from_pretrained({str(small_checkpoint)!r}, device=device, compile_for=(1, 64, 48))
    print(pipe("a red fox", height=64, width=48).images[0].size, pipe._keeps_programs)
"""
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "1"
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert run.stdout.split("\n")[:2] == ["(48, 64) True", "(48, 64) False"], run.stderr
    assert len(list((tmp_path / "lowered").iterdir())) == 4


@pytest.mark.gpu
def test_kernels_of_our_own_run_in_a_process_that_did_not_trace_them(tmp_path):
    script = f"""
import jax, jax.numpy as jnp
from flax import nnx
from sd35flash_jax import compilation
from sd35flash_jax.frozen import Frozen
from sd35flash_jax.kept_programs import kept
from sd35flash_jax.models.layers import add_and_norm, joint_attention
from sd35flash_jax.models.streams import Norms, Projected, ResidualSum, Vectors
compilation.configure()
jax.config.update("jax_compilation_cache_dir", {str(tmp_path)!r})

@jax.jit
@kept
def mix(layer, x):
    print("traced")
    vectors = Vectors(jnp.ones((1, 128), x.dtype), jnp.int32(0))
    [(_, [normed])] = add_and_norm([ResidualSum(x)], [Norms(vectors, ((0, 1),))])
    return joint_attention([Projected(layer.module(normed), (jnp.ones(64), jnp.ones(64)))], 2, 128)[0]

layer = nnx.Linear(64, 384, param_dtype=jnp.bfloat16, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
x = jax.random.normal(jax.random.key(0), (1, 128, 64), jnp.bfloat16)
mixed = mix(Frozen(layer, "layer"), x)
print(float(jnp.abs(mixed - mix(Frozen(layer), x)).max()))
"""
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "1", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # This process may have most of the memory already.
    for traced in (["traced", "traced", "0.0"], ["traced", "0.0"]):
        run = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
        )
        assert run.stdout.split() == traced, run.stderr
