import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from sd35flash_jax import checkpoint
from sd35flash_jax.cli import main
from sd35flash_jax.evaluate import run
from sd35flash_jax.evaluate.fid import FidScorer
from sd35flash_jax.evaluate.run import Sampler
from sd35flash_jax.evaluate.suite import suite


@pytest.fixture
def asked(monkeypatch):
    """What the command asks to be evaluated."""
    asked = argparse.Namespace()

    def evaluate(samplers, prompts, seeds, output, scorer, batch, dtype, progress):
        vars(asked).update(locals())
        return "the table"

    monkeypatch.setattr(run, "evaluate", evaluate)
    return asked


def test_evaluate_prints_the_table_of_a_checkpoint_and_of_those_it_is_compared_with(asked, capsys):
    compared = ["--compare", "teacher=runs/a:b:50:4.5", "--compare", "mini=:2:1"]
    assert main(["evaluate", "runs/student", "--steps", "4", *compared, "--prompts", "3", "--seeds", "2"]) == 0
    assert capsys.readouterr().out == "the table\n"
    assert asked.samplers == [
        Sampler("student, 4 steps", Path("runs/student"), 4, 1.0),
        Sampler("teacher", Path("runs/a:b"), 50, 4.5),
        Sampler("mini", None, 2, 1.0),
    ]
    assert asked.prompts == suite(3) and (asked.seeds, asked.batch, asked.scorer) == (2, 32, None)


def test_evaluate_takes_the_bundled_model_and_the_whole_suite_unless_told_otherwise(asked):
    assert main(["evaluate"]) == 0
    assert asked.samplers == [Sampler("bundled model, 4 steps")] and asked.prompts == suite() and asked.seeds == 3


@pytest.mark.parametrize("row", ["teacher", "teacher=runs/a", "teacher=runs/a:many:1", "=runs/a:4", "runs/a:4:1"])
def test_a_row_of_another_form_is_wrong_usage(row, capsys):
    with pytest.raises(SystemExit) as exit:
        main(["evaluate", "--compare", row])
    assert exit.value.code == 2 and "NAME=CHECKPOINT:STEPS:GUIDANCE" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--scorer", "clip"], "--scorer clip needs --clip FOLDER"),
        (["--scorer", "fid", "--inception", "x"], "--scorer fid needs --inception FILE and --reference FOLDER"),
        (
            ["--scorer", "fid", "--inception", "x", "--reference", "y"],
            "more than 2048 pictures on each side, and y has 0",
        ),
        (["--prompt-file", "x"], "give --prompt-file with another --scorer"),
        (["--prompts", "0"], "1 to 110 prompts of each category, not 0"),
        (["--scorer", "clip", "--clip", "nowhere"], "nowhere is not a folder with a CLIP model"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(options, message, capsys):
    pytest.importorskip("torch")
    assert main(["evaluate", *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


def test_evaluate_without_any_checkpoint_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path / "absent")
    assert main(["evaluate", "--output", str(tmp_path / "out")]) == 1
    assert "no model is bundled" in capsys.readouterr().err and not (tmp_path / "out").exists()


class Extractor:
    """In place of torch-fidelity's Inception: a few means of a picture, among features that never vary."""

    def __init__(self, name, features, weights):
        assert features == ["2048"] and Path(weights).is_file()

    def __call__(self, pixels):
        features = pixels.float().mean(dim=(2, 3)) / 255
        return (features.repeat(1, 683)[:, :2048],)


@pytest.fixture
def fid_files(tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.setitem(sys.modules, "torch_fidelity", SimpleNamespace(FeatureExtractorInceptionV3=Extractor))
    weights, reference = tmp_path / "inception.pth", tmp_path / "reference"
    weights.touch()
    reference.mkdir()
    images = np.random.default_rng(0).integers(0, 256, (2049, 1, 1, 3), np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(reference / f"{number}.png")
    return weights, reference, images


def test_fid_is_the_distance_of_a_samplers_pictures_to_the_reference(fid_files):
    weights, reference, images = fid_files
    scorer = FidScorer(weights, reference, 2049)
    darker = scorer.mark([], images // 2)
    (same,), (other,) = (scorer.figures([], [marks]).values() for marks in (scorer.mark([], images), darker))
    assert same.mean == pytest.approx(0, abs=1e-3) and other.mean > 10 and other.spread is None


def test_fid_of_too_few_pictures_is_refused_before_anything_is_drawn(fid_files):
    weights, reference, _ = fid_files
    with pytest.raises(ValueError, match="more than 2048 pictures on each side, and a sampler has 2048"):
        FidScorer(weights, reference, 2048)


def test_missing_weights_of_inception_and_a_missing_package_are_said(fid_files, monkeypatch):
    weights, reference, _ = fid_files
    with pytest.raises(ValueError, match=r"absent\.pth is missing: download"):
        FidScorer(weights.with_name("absent.pth"), reference, 2049)
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(ValueError, match="FID needs torch-fidelity: pip install"):
        FidScorer(weights, reference, 2049)


def test_clip_scores_are_what_transformers_computes(tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from sd35flash_jax.evaluate.clip import ClipScorer
    from tests.tiny_model import CLIP_VOCABULARY, TEXT
    from training.tokenizers import write_clip_tokenizer

    folder = tmp_path / "clip"
    write_clip_tokenizer(folder, TEXT.splitlines(), CLIP_VOCABULARY, 77, "<|endoftext|>")
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shared | {"vocab_size": CLIP_VOCABULARY, "eos_token_id": CLIP_VOCABULARY - 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=shared | {"image_size": 32, "patch_size": 8})
    torch.manual_seed(0)
    model = transformers.CLIPModel(config).eval()
    model.save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)

    prompts = suite(2)[:3]
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    scorer = ClipScorer(folder)
    marks = scorer.mark(prompts, images)
    inputs = transformers.CLIPProcessor.from_pretrained(folder)(
        text=[prompt.text for prompt in prompts], images=list(images), return_tensors="pt", padding=True
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    expected = 100 * logits.diagonal().numpy()
    np.testing.assert_allclose([mark.values[0] for mark in marks], expected, rtol=1e-4)
    assert all(mark.right is None for mark in marks)
    figure = scorer.figures(prompts, [marks, marks])["CLIP score"]
    assert figure.mean == pytest.approx(expected.mean(), rel=1e-4) and figure.spread == pytest.approx(0, abs=1e-6)
