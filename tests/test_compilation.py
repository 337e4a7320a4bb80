import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import jax
import numpy as np
import pytest

from sd35flash_jax import compilation, save_checkpoint
from tests.tiny_model import CONFIG, random_parameters

FLAGS = ("--xla_gpu_a=true", "--xla_gpu_b=2")


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """JAX's settings as a user finds them, in a home of their own; put back afterwards."""
    names = (
        "jax_enable_compilation_cache",
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
    )
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update("jax_enable_compilation_cache", True)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache_folder(settings, tmp_path):
    compilation.configure()
    folder = tmp_path / "cache" / "sd35flash-jax" / "xla"
    assert settings.jax_compilation_cache_dir == str(folder) and folder.is_dir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert settings.jax_persistent_cache_min_compile_time_secs == 0


def test_without_xdg_the_cache_is_in_the_home_folder(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compilation.cache_folder() == tmp_path / ".cache" / "sd35flash-jax" / "xla"


def test_a_folder_and_threshold_that_the_user_has_set_stay(settings, tmp_path):
    settings.update("jax_compilation_cache_dir", "/elsewhere")
    compilation.configure()
    assert settings.jax_compilation_cache_dir == "/elsewhere"
    assert settings.jax_persistent_cache_min_compile_time_secs == 1
    settings.update("jax_compilation_cache_dir", None)
    settings.update("jax_persistent_cache_min_compile_time_secs", 5.0)
    compilation.configure()
    assert settings.jax_persistent_cache_min_compile_time_secs == 5
    assert not (tmp_path / "elsewhere").exists()


def test_the_cache_can_be_switched_off(settings, tmp_path):
    settings.update("jax_enable_compilation_cache", False)
    compilation.configure()
    assert settings.jax_compilation_cache_dir is None
    assert list(tmp_path.iterdir()) == []


def test_a_cache_folder_that_cannot_be_made_is_done_without(settings, tmp_path, monkeypatch, capfd, recwarn):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compilation.configure()
    assert settings.jax_compilation_cache_dir is None
    assert capfd.readouterr() == ("", "") and not recwarn.list


@pytest.mark.parametrize(
    ("own", "together"),
    [
        ("", "--xla_gpu_a=true --xla_gpu_b=2"),
        ("--xla_gpu_b=9", "--xla_gpu_a=true --xla_gpu_b=9"),
        ("--xla_gpu_a=false  --xla_dump_to=/x", "--xla_gpu_b=2 --xla_gpu_a=false --xla_dump_to=/x"),
        ("flags.txt", "flags.txt"),
    ],
)
def test_a_users_own_xla_flags_win(own, together):
    assert compilation.with_flags(own, FLAGS) == together
    assert compilation.with_flags(together, FLAGS) == together, "a second time changes nothing"


def test_gpu_flags_are_set_only_where_jax_has_cuda(settings, monkeypatch):
    monkeypatch.setattr(compilation, "GPU_FLAGS", FLAGS)
    monkeypatch.setattr(compilation, "_has_cuda_plugin", lambda: False)
    compilation.configure()
    assert "XLA_FLAGS" not in os.environ
    monkeypatch.setattr(compilation, "_has_cuda_plugin", lambda: True)
    compilation.configure()
    assert os.environ.pop("XLA_FLAGS") == "--xla_gpu_a=true --xla_gpu_b=2"


@pytest.mark.parametrize(
    ("own", "kept"),
    [("", {"a": 1, "b": 2}), ("--b=3 --c=4", {"a": 1}), ("--a=3 --b", {}), ("flags.txt", None)],
)
def test_a_programs_own_options_leave_out_what_a_user_has_named(own, kept, monkeypatch):
    monkeypatch.setattr(compilation, "_has_cuda_plugin", lambda: True)
    monkeypatch.setattr(compilation, "_USERS_FLAGS", own)
    assert compilation.gpu_options({"a": 1, "b": 2}) == kept
    monkeypatch.setattr(compilation, "_has_cuda_plugin", lambda: False)
    assert compilation.gpu_options({"a": 1, "b": 2}) is None


def test_a_program_with_options_of_its_own_is_compiled_ahead_and_not_again(compilations):
    """XLA for CPUs knows the options for GPUs too."""
    program = jax.jit(lambda x: x + 1, compiler_options=compilation.GPU_SIDE_BY_SIDE)
    placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    program.lower(jax.ShapeDtypeStruct((3,), np.float32, sharding=placed)).compile()
    assert compilations, "the listener hears compilations"
    array = jax.device_put(np.ones(3, np.float32), placed)
    compilations.clear()
    result = program(array)
    assert compilations == []
    np.testing.assert_array_equal(result, 2)


@pytest.fixture
def no_memory_settings(monkeypatch):
    for name in compilation._MEMORY_SETTINGS:
        monkeypatch.setenv(name, "")  # Put back at the end, whatever is set meanwhile.
        monkeypatch.delenv(name)


@pytest.mark.parametrize("error", [None, RuntimeError("Unable to initialize backend 'cuda'"), ValueError("x")])
def test_devices_start_in_a_thread_which_leaves_it_to_others_to_say_that_there_are_none(
    error, monkeypatch, no_memory_settings
):
    unhandled: list[object] = []
    monkeypatch.setattr(threading, "excepthook", unhandled.append)
    monkeypatch.setattr(compilation, "configure", lambda: None)
    started = Mock(side_effect=error)
    monkeypatch.setattr(jax, "devices", lambda: started(threading.current_thread()))
    before = set(threading.enumerate())
    compilation.start_devices()
    for thread in set(threading.enumerate()) - before:
        thread.join()
    [call] = started.call_args_list
    assert call.args[0] is not threading.current_thread() and unhandled == []


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        ({}, "false"),
        ({"XLA_PYTHON_CLIENT_PREALLOCATE": "true"}, "true"),
        ({"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.5"}, None),
        ({"XLA_CLIENT_MEM_FRACTION": "0.5"}, None),
    ],
)
def test_memory_is_taken_as_it_is_needed_unless_the_user_says_how(own, kept, monkeypatch, no_memory_settings):
    monkeypatch.setattr(compilation, "configure", lambda: None)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    compilation.start_devices()
    assert os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") == kept


@pytest.mark.skipif(not compilation.GPU_FLAGS, reason="there are none")
def test_this_version_of_xla_knows_every_flag():
    """An unknown flag ends the process; XLA for CPUs knows those for GPUs too."""
    flags = os.environ | {"XLA_FLAGS": " ".join(compilation.GPU_FLAGS), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", "import jax; jax.devices()"], env=flags, check=True)


DENOISE = """
import json, sys
import jax, numpy as np
from sd35flash_jax import Conditioning, FlashPipeline

counts = {"compiled": 0, "loaded": 0}
events = {"/jax/compilation_cache/cache_misses": "compiled", "/jax/compilation_cache/cache_hits": "loaded"}
def listen(event, **_):
    if event in events:
        counts[events[event]] += 1
jax.monitoring.register_event_listener(listen)

pipe = FlashPipeline.from_pretrained(sys.argv[1])
conditioning = Conditioning(np.ones((1, 5, 96)), np.ones((1, 80)))
results = []
for height in map(int, sys.argv[2:]):
    pipe.denoise(pipe.noise(0, 1, height, 64), conditioning).block_until_ready()
    results.append(dict(counts))
    counts.update(compiled=0, loaded=0)
print(json.dumps(results))
"""


def test_a_size_compiles_once_and_then_comes_from_the_cache_in_a_new_process(tmp_path):
    transformer = replace(CONFIG.transformer, depth=1, dual_attention_blocks=0)
    config = replace(CONFIG, transformer=transformer, vae=None, clip_l=None, clip_g=None, t5=None)
    parameters = {"transformer": random_parameters("transformer", config=config)}
    save_checkpoint(tmp_path / "checkpoint", config, parameters)

    def denoise_in_a_new_process() -> list[dict[str, int]]:
        done = subprocess.run(
            [sys.executable, "-c", DENOISE, str(tmp_path / "checkpoint"), "64", "96", "64"],
            env=os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=True,
        )
        assert "Error" not in done.stderr and "Warning" not in done.stderr, done.stderr
        return json.loads(done.stdout)

    one_size, other_size, one_size_again = denoise_in_a_new_process()
    assert one_size["compiled"] > 0 and other_size["compiled"] > 0 and one_size["loaded"] == 0
    assert one_size_again == {"compiled": 0, "loaded": 0}
    one_size_later, other_size_later, _ = denoise_in_a_new_process()
    assert one_size_later["compiled"] == other_size_later["compiled"] == 0
    assert one_size_later["loaded"] == one_size["compiled"]


@pytest.mark.parametrize(
    "cache, enabled", [("/somewhere", True), ("gs://bucket", True), ("/somewhere", False), ("", True)]
)
def test_what_is_kept_beside_the_cache_is_kept_beside_a_local_one_that_is_on(cache, enabled):
    before = jax.config.jax_compilation_cache_dir, jax.config.jax_enable_compilation_cache
    try:
        jax.config.update("jax_compilation_cache_dir", cache)
        jax.config.update("jax_enable_compilation_cache", enabled)
        path = compilation.kept_path("lowered", "program", "what it is for")
        if enabled and cache.startswith("/"):
            assert path.parent == Path("/somewhere/lowered") and path.name.startswith("program-")
        else:
            assert path is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before[0])
        jax.config.update("jax_enable_compilation_cache", before[1])


def test_what_is_kept_is_read_as_it_was_written_from_folders_that_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "kept"
    assert compilation.read_kept(path) is None
    compilation.keep(path, b"content")
    assert compilation.read_kept(path) == b"content"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert compilation.read_kept(path) is None
    path.unlink()
    path.mkdir()
    assert compilation.read_kept(path) is None


def test_code_has_a_digest_that_changes_with_it(tmp_path, monkeypatch):
    real = compilation._digest_of_code()
    assert real == compilation._CODE
    monkeypatch.setattr(compilation, "__file__", str(tmp_path / "compilation.py"))
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "layer.py").write_text("a = 1")
    first = compilation._digest_of_code()
    (tmp_path / "models" / "layer.py").write_text("a = 2")
    assert len({real, first, compilation._digest_of_code()}) == 3
