import subprocess
import sys

import pytest
from PIL import Image

from sd35flash_jax.cli import main


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


def test_generate_without_a_checkpoint_says_what_is_missing_and_how_to_get_it(capsys):
    status, out, err = run(capsys, "generate", "a red fox")
    assert status == 1 and out == ""
    assert "no model ships with this version" in err and "sd35flash-jax convert FOLDER CHECKPOINT" in err


def test_a_size_is_refused_before_anything_is_loaded(small_checkpoint, tmp_path, capsys):
    status, _, err = run(capsys, *small(small_checkpoint, tmp_path / "x.png", "--height", 100))
    assert status == 1 and err == "sd35flash-jax: height 100 is not a positive multiple of 16; try 96 or 112\n"


def test_a_folder_that_does_not_exist_is_refused_before_anything_is_loaded(small_checkpoint, tmp_path, capsys):
    status, _, err = run(capsys, *small(small_checkpoint, tmp_path / "nowhere" / "x.png"))
    assert status == 1 and "nowhere/x.png does not exist" in err and "loading" not in err


def test_a_diffusers_folder_given_as_checkpoint_is_told_to_be_converted(tmp_path, capsys):
    status, _, err = run(capsys, "generate", "a red fox", "--checkpoint", tmp_path)
    assert status == 1 and "sd35flash-jax convert" in err and "Traceback" not in err


def test_a_failed_conversion_says_why_and_leaves_nothing(tmp_path, capsys):
    status, out, err = run(capsys, "convert", tmp_path / "absent", tmp_path / "new")
    assert status == 1 and out == "" and "absent is not a folder" in err
    assert list(tmp_path.iterdir()) == []


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
