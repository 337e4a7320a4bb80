import argparse
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from sd35flash_jax import checkpoint, cli
from sd35flash_jax.cli import main
from sd35flash_jax.evaluate import run
from sd35flash_jax.evaluate.fid import FidScorer
from sd35flash_jax.evaluate.run import Sampler
from sd35flash_jax.evaluate.suite import Prompt, suite


@pytest.fixture
def asked(monkeypatch):
    """What the command asks to be evaluated."""
    asked = argparse.Namespace()

    def evaluate(samplers, prompts, seeds, output, scorer, batch, dtype, progress):
        vars(asked).update(locals())
        return "the table"

    monkeypatch.setattr(run, "evaluate", evaluate)
    monkeypatch.setattr(run, "check_evaluation", lambda *_: None)
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


def test_evaluate_takes_prompts_from_a_file(asked, monkeypatch, tmp_path):
    monkeypatch.setattr(cli, "_scorer", lambda *_: None)
    (tmp_path / "prompts.txt").write_text("a red fox\n\nan old sailor\n")
    assert main(["evaluate", "--scorer", "clip", "--clip", "x", "--prompt-file", str(tmp_path / "prompts.txt")]) == 0
    assert asked.prompts == [Prompt("given", "a red fox"), Prompt("given", "an old sailor")]


@pytest.mark.parametrize(
    "row", ["teacher", "teacher=runs/a", "teacher=runs/a:many:1", "=runs/a:4", "=runs/a:4:1", "runs/a:4:1"]
)
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
        (["--prompt-file", "x", "--prompts", "3", "--scorer", "clip", "--clip", "y"], "--prompts counts the suite's"),
        (["--clip", "x"], "--clip FOLDER would not be used; leave that out, or choose --scorer clip"),
        (
            ["--scorer", "clip", "--clip", "x", "--inception", "y", "--reference", "z"],
            "--inception FILE and --reference FOLDER would not be used; leave that out, or choose --scorer fid",
        ),
        (["--prompts", "0"], "1 to 110 prompts of each category, not 0"),
        (["--scorer", "clip", "--clip", "nowhere"], "nowhere is not a folder with a CLIP model"),
    ],
)
def test_options_that_do_not_go_together_are_one_sentence(options, message, monkeypatch, tmp_path, capsys):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *options]) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


def test_evaluate_without_any_checkpoint_says_what_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(checkpoint, "BUNDLED", tmp_path / "absent")
    assert main(["evaluate", "--output", str(tmp_path / "out")]) == 1
    assert "no model is bundled" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "already exists; remove it or choose another destination"),
        (["--seeds", "0", "--output", "new"], "seeds must be from 1 to 1000, not 0"),
        (["runs/absent", "--output", "new"], "runs/absent is not a checkpoint"),
    ],
)
def test_what_can_be_refused_is_refused_before_a_scorer_is_loaded(options, message, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "earlier.png").touch()
    assert main(["evaluate", "--scorer", "clip", "--clip", "absent", *options]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), RuntimeError("DefaultCPUAllocator: not enough")],
)
def test_out_of_memory_names_the_batch_as_the_mend(error, asked, monkeypatch, capsys):
    def evaluate(*_, **__):
        raise error

    monkeypatch.setattr(run, "evaluate", evaluate)
    assert main(["evaluate", "--batch", "64"]) == 1
    assert "out of memory with --batch 64: choose a smaller one" in capsys.readouterr().err


def test_a_fault_of_another_kind_is_not_taken_for_a_want_of_memory(asked, monkeypatch):
    def evaluate(*_, **__):
        raise RuntimeError("a fault in the program")

    monkeypatch.setattr(run, "evaluate", evaluate)
    with pytest.raises(RuntimeError, match="a fault in the program"):
        main(["evaluate"])


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


def test_a_torchvision_of_another_build_than_pytorchs_is_said(fid_files, monkeypatch):
    class Unfit:
        def __getattr__(self, name):
            raise RuntimeError("operator torchvision::nms does not exist")

    weights, reference, _ = fid_files
    monkeypatch.setitem(sys.modules, "torch_fidelity", Unfit())
    with pytest.raises(
        ValueError, match=r"cannot be imported \(operator torchvision::nms.*; install torchvision again"
    ):
        FidScorer(weights, reference, 2049)


def test_damaged_weights_of_inception_are_named(fid_files, monkeypatch):
    weights, reference, _ = fid_files

    def load(name, features, file):
        raise EOFError("Ran out of input")

    monkeypatch.setattr(sys.modules["torch_fidelity"], "FeatureExtractorInceptionV3", load)
    with pytest.raises(ValueError, match=r"inception\.pth is damaged, or is not torch-fidelity's weights"):
        FidScorer(weights, reference, 2049)


def test_an_image_of_the_reference_that_cannot_be_read_is_named(fid_files):
    weights, reference, _ = fid_files
    file = reference / "7.png"
    file.write_bytes(file.read_bytes()[:45])
    with pytest.raises(ValueError, match=r"7\.png cannot be read as an image"):
        FidScorer(weights, reference, 2049)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small CLIP model as transformers stores it. Read it only."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from tests.tiny_model import CLIP_VOCABULARY, TEXT
    from training.tokenizers import write_clip_tokenizer

    folder = tmp_path_factory.mktemp("clip") / "clip"
    write_clip_tokenizer(folder, TEXT.splitlines(), CLIP_VOCABULARY, 77, "<|endoftext|>")
    shared = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = shared | {"vocab_size": CLIP_VOCABULARY, "eos_token_id": CLIP_VOCABULARY - 1}
    config = transformers.CLIPConfig(text_config=text, vision_config=shared | {"image_size": 32, "patch_size": 8})
    torch.manual_seed(0)
    transformers.CLIPModel(config).save_pretrained(folder)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    transformers.CLIPImageProcessor(**size).save_pretrained(folder)
    return folder


def test_clip_scores_are_what_transformers_computes(clip_folder):
    import torch
    import transformers

    from sd35flash_jax.evaluate.clip import ClipScorer

    model = transformers.CLIPModel.from_pretrained(clip_folder).eval()
    prompts = suite(2)[:3]
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    scorer = ClipScorer(clip_folder)
    marks = scorer.mark(prompts, images)
    inputs = transformers.CLIPProcessor.from_pretrained(clip_folder)(
        text=[prompt.text for prompt in prompts], images=list(images), return_tensors="pt", padding=True
    )
    with torch.no_grad():
        logits = model(**inputs).logits_per_image / model.logit_scale.exp()
    expected = 100 * logits.diagonal().numpy()
    np.testing.assert_allclose([mark.values[0] for mark in marks], expected, rtol=1e-4)
    assert all(mark.right is None for mark in marks)
    figure = scorer.figures(prompts, [marks, marks])["CLIP score"]
    assert figure.mean == pytest.approx(expected.mean(), rel=1e-4) and figure.spread == pytest.approx(0, abs=1e-6)


def test_a_clip_model_stored_in_half_precision_marks_in_float32(clip_folder, tmp_path):
    import torch
    import transformers

    from sd35flash_jax.evaluate.clip import ClipScorer

    half = Path(shutil.copytree(clip_folder, tmp_path / "half"))
    transformers.CLIPModel.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    images = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3), np.uint8)
    (ours,), (whole,) = (ClipScorer(folder).mark(suite(1)[:1], images) for folder in (half, clip_folder))
    assert ours.values == pytest.approx(whole.values, abs=1)


def test_a_prompt_longer_than_clip_reads_is_cut_though_the_tokenizer_does_not_say_how_long_that_is(
    clip_folder, tmp_path
):
    from sd35flash_jax.evaluate.clip import ClipScorer

    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    scorer, images = ClipScorer(folder), np.zeros((1, 64, 64, 3), np.uint8)
    (long,), (longer,) = (scorer.mark([Prompt("given", "a red fox " * count)], images) for count in (99, 100))
    assert long.values == longer.values


def _truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def _spoil(folder):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"no pickle")


def _keep_the_text_side_alone(folder):
    import transformers

    transformers.CLIPTextModelWithProjection.from_pretrained(folder).save_pretrained(folder)


def _drop_the_image_side(folder):
    arrays = load_file(folder / "model.safetensors")
    kept = {name: array for name, array in arrays.items() if not name.startswith(("vision_model.", "visual_"))}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})


def _fill_with_nan(folder):
    arrays = load_file(folder / "model.safetensors")
    arrays["visual_projection.weight"][:] = np.nan
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})


def _widen(folder):
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"]["intermediate_size"] = 64
    (folder / "config.json").write_text(json.dumps(config))


def _take_tokens_off(folder):
    arrays, name = load_file(folder / "model.safetensors"), "text_model.embeddings.token_embedding.weight"
    arrays[name] = arrays[name][:-50]
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = len(arrays[name])
    (folder / "config.json").write_text(json.dumps(config))


def _remove(*names):
    return lambda folder: [(folder / name).unlink() for name in names]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_truncate, "model.safetensors is damaged, or its config.json is; download both again"),
        (_spoil, "pytorch_model.bin is damaged, or its config.json is; download both again"),
        (_keep_the_text_side_alone, "config.json says model_type 'clip_text_model', not 'clip'"),
        (_drop_the_image_side, "or has them in other shapes, such as visual_projection.weight; download a whole CLIP"),
        (_widen, "model.safetensors lacks 6 weights of the model that its config.json describes"),
        (_take_tokens_off, "has more tokens than its model"),
        (_fill_with_nan, "gives a score that is not finite"),
        (_remove("model.safetensors"), "holds no weights; download model.safetensors too"),
        (_remove("vocab.json", "merges.txt"), "holds no tokenizer (tokenizer.json or vocab.json)"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not valid JSON"),
        (
            lambda folder: (folder / "preprocessor_config.json").write_text("{"),
            "preprocessor_config.json is missing or damaged",
        ),
    ],
)
def test_a_clip_folder_that_is_not_whole_is_refused_in_one_sentence(damage, message, clip_folder, tmp_path, capsys):
    folder = Path(shutil.copytree(clip_folder, tmp_path / "clip"))
    damage(folder)
    capsys.readouterr()
    output = tmp_path / "out"
    assert main(["evaluate", "--scorer", "clip", "--clip", str(folder), "--output", str(output)]) == 1
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not output.exists()
