import gc
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from sd35flash_jax import checkpoint
from sd35flash_jax.cli import main
from tests.tiny_model import CONFIG


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def small(checkpoint, output, *more):
    return (
        "generate", "a red fox", "--checkpoint", checkpoint, "--output", output, "--height", 64, "--width", 96,
        "--max-t5-tokens", 32, *more,
    )  # fmt: skip


def test_generate_writes_a_png_that_says_how_it_was_made(small_checkpoint, tmp_path, capsys):
    output = tmp_path / "fox.png"
    status, out, err = run(capsys, *small(small_checkpoint, output, "--seed", 7, "--steps", 3))
    assert status == 0 and out == f"{output}\n"
    assert "denoising" in err and "decode" in err
    image = Image.open(output)
    assert image.size == (96, 64)
    text = image.text
    assert text["prompt"] == "a red fox" and text["seed"] == "7" and text["steps"] == "3"
    assert text["sigmas"].startswith("1 ") and text["software"].startswith("sd35flash-jax 0.")
    assert list(tmp_path.iterdir()) == [output]


def test_generate_needs_no_more_than_a_prompt_where_a_model_is_bundled(small_checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "BUNDLED", Path(shutil.copytree(small_checkpoint, tmp_path / "flash_mini")))
    output = tmp_path / "fox.png"
    status, out, _ = run(capsys, "generate", "a red fox", "--output", output)
    assert status == 0 and out == f"{output}\n"
    image = Image.open(output)
    assert image.size == (CONFIG.default_size, CONFIG.default_size) == (192, 192)
    assert image.text["checkpoint"] == "flash_mini" and image.text["max_t5_tokens"] == "256"


def test_generate_without_any_checkpoint_says_what_is_missing_and_how_to_get_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path / "absent")
    status, out, err = run(capsys, "generate", "a red fox")
    assert status == 1 and out == ""
    assert "no model is bundled" in err and "sd35flash-jax convert FOLDER CHECKPOINT" in err


def test_a_size_is_refused_before_anything_is_loaded(small_checkpoint, tmp_path, capsys):
    status, _, err = run(capsys, *small(small_checkpoint, tmp_path / "x.png", "--height", 100))
    assert status == 1 and err == "sd35flash-jax: height 100 is not a positive multiple of 16; try 96 or 112\n"


def test_a_folder_that_does_not_exist_is_refused_before_anything_is_loaded(small_checkpoint, tmp_path, capsys):
    status, _, err = run(capsys, *small(small_checkpoint, tmp_path / "nowhere" / "x.png"))
    assert status == 1 and "nowhere/x.png does not exist" in err and "loading" not in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "-1"], "seeds must be in"),
        (["--guidance", "nan"], "guidance must be a finite number"),
        (["--sigmas", "0.2", "0.9"], "sigmas must fall strictly"),
        (["--output", "."], "does not name a PNG file"),
        (["--output", "fox.jpg"], "fox.jpg does not name a PNG file"),
    ],
)
def test_what_can_be_refused_is_refused_before_anything_is_loaded(options, message, small_checkpoint, tmp_path, capsys):
    status, _, err = run(capsys, *small(small_checkpoint, tmp_path / "x.png", *options))
    assert status == 1 and message in err and "loading" not in err
    assert list(tmp_path.iterdir()) == []


def test_a_negative_prompt_without_guidance_is_said_to_have_no_effect(small_checkpoint, tmp_path, capsys):
    status, _, err = run(capsys, *small(small_checkpoint, tmp_path / "x.png", "--negative", "rain"))
    assert status == 0 and "--negative has no effect" in err
    assert "negative_prompt" not in Image.open(tmp_path / "x.png").text


def test_a_diffusers_folder_given_as_checkpoint_is_told_to_be_converted(tmp_path, capsys):
    (tmp_path / "model_index.json").write_text("{}")
    status, _, err = run(capsys, "generate", "a red fox", "--checkpoint", tmp_path)
    assert status == 1
    assert err == (
        f"sd35flash-jax: {tmp_path} is a diffusers folder; convert it first with: "
        f"sd35flash-jax convert {tmp_path} CHECKPOINT\n"
    )


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path, capsys):
    status, _, err = run(capsys, "generate", "a red fox", "--checkpoint", tmp_path)
    assert status == 1 and f"{tmp_path} is not a checkpoint" in err


def test_a_platform_that_cannot_be_had_is_one_sentence(small_checkpoint, tmp_path):
    arguments = [str(argument) for argument in small(small_checkpoint, tmp_path / "x.png")]
    done = subprocess.run(
        [sys.executable, "-m", "sd35flash_jax.cli", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "nonesuch"},
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "Unable to initialize backend" in done.stderr


def test_a_failed_conversion_says_why_and_leaves_nothing(tmp_path, capsys):
    status, out, err = run(capsys, "convert", tmp_path / "absent", tmp_path / "new")
    assert status == 1 and out == "" and "absent is not a folder" in err
    assert list(tmp_path.iterdir()) == []


IMPORTED = """
import sys
import sd35flash_jax
from sd35flash_jax.cli import main
assert "jax" not in sys.modules, "the package and its command line are imported without JAX"
status = main(sys.argv[1:])
print(*(name for name in ("orbax", "transformers", "jax.experimental.pallas") if name in sys.modules))
sys.exit(status)
"""


def test_generate_imports_neither_jax_before_it_begins_nor_what_it_does_not_use(small_checkpoint, tmp_path):
    arguments = [str(argument) for argument in small(small_checkpoint, tmp_path / "x.png")]
    own = {"JAX_ENABLE_COMPILATION_CACHE": "1", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache")}
    for imported in ("transformers", ""):  # A second process reads the tokenizers that the first has kept.
        command = [sys.executable, "-c", IMPORTED, *arguments]
        run = subprocess.run(command, env=os.environ | own, check=True, capture_output=True, text=True)
        assert run.stdout.splitlines()[-1] == imported


@pytest.mark.parametrize("seed", [0, -1], ids=["done", "failed"])
def test_pythons_settings_are_put_back_after_an_image(seed, small_checkpoint, tmp_path, capsys):
    def settings():
        return gc.isenabled(), gc.get_freeze_count(), sys.getswitchinterval()

    before = settings()
    assert run(capsys, *small(small_checkpoint, tmp_path / "x.png", "--seed", seed))[0] == -seed
    assert settings() == before
    gc.disable()
    try:
        assert run(capsys, *small(small_checkpoint, tmp_path / "y.png", "--seed", -1))[0] == 1
        assert not gc.isenabled()
    finally:
        gc.enable()


@pytest.mark.parametrize("arguments", [[], ["paint"], ["generate"], ["generate", "x", "--steps", "many"]])
def test_wrong_usage_exits_with_2(arguments):
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    assert exit.value.code == 2


def test_the_installed_module_runs_and_prints_its_help():
    done = subprocess.run(
        [sys.executable, "-m", "sd35flash_jax.cli", "--help"], capture_output=True, text=True, check=True
    )
    assert "generate" in done.stdout and "convert" in done.stdout
