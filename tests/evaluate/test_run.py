import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from sd35flash_jax.checkpoint import save_checkpoint
from sd35flash_jax.evaluate import run
from sd35flash_jax.evaluate.detector import Detector, load_detector
from sd35flash_jax.evaluate.run import COMPOSED, Sampler, compose_prompts, evaluate, painter
from sd35flash_jax.evaluate.scoring import Figure, Mark
from sd35flash_jax.evaluate.suite import Prompt, suite
from sd35flash_jax.pipeline import FlashPipeline
from tests.tiny_model import CONFIG, random_parameters


class FakePipeline:
    """Paints each picture in a shade that tells its noise's seed; remembers what it was asked for."""

    config = SimpleNamespace(default_size=32)

    def __init__(self):
        self.batches, self.sampled = [], []

    def encode(self, prompts):
        return list(prompts)

    def noise(self, seed, batch, height, width):
        self.batches.append((seed, batch))
        return np.arange(seed, seed + batch)

    def denoise(self, noise, conditioning, *, steps, guidance, negative):
        assert len(noise) == len(conditioning) and (negative == [""] if guidance > 1 else negative is None)
        self.sampled.append((steps, guidance))
        return noise

    def decode(self, latents):
        return jnp.broadcast_to((latents % 100 / 255)[:, None, None, None], (len(latents), 32, 32, 3))


class FakeScorer:
    """Finds every second shade right."""

    def mark(self, prompts, images):
        assert images.dtype == np.uint8 and len(prompts) == len(images)
        return [Mark(bool(image[0, 0, 0] % 2 == 0), f"shade {image[0, 0, 0]}", image[0, 0, :1]) for image in images]

    def figures(self, prompts, marks):
        return {"right": Figure.over_seeds([np.mean([mark.right for mark in of_seed]) for of_seed in marks])}


@pytest.fixture
def pipeline(monkeypatch):
    pipeline = FakePipeline()
    loads = []
    monkeypatch.setattr(
        run, "FlashPipeline", SimpleNamespace(from_pretrained=lambda path, **_: loads.append(path) or pipeline)
    )
    pipeline.loads = loads
    return pipeline


def test_every_sampler_is_a_row_of_the_table_and_of_the_json_and_a_grid(small_checkpoint, pipeline, tmp_path):
    samplers = [Sampler("few", small_checkpoint, 4), Sampler("many", small_checkpoint, 50, 5.5)]
    table = evaluate(samplers, suite(2), 2, tmp_path / "out", FakeScorer(), batch=4)
    assert table.splitlines()[2:4] == [
        "| sampler | steps | guidance | right | ms a picture |",
        "| --- |" + " --- |" * 4,
    ]
    assert table.splitlines()[4].startswith("| few | 4 | 1 | 0.500 ± 0.000 | ")
    assert table.splitlines()[5].startswith("| many | 50 | 5.5 | 0.500 ± 0.000 | ")
    assert (tmp_path / "out" / "evaluation.md").read_text() == table + "\n"
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (report["prompts"], report["seeds"]) == (10, 2)
    assert [(row["name"], row["steps"], row["guidance"]) for row in report["rows"]] == [
        ("few", 4, 1),
        ("many", 50, 5.5),
    ]
    first, *_, last = report["rows"][0]["pictures"]
    assert first == {
        "prompt": suite(1)[0].text, "category": "single object", "seed": 0, "right": True, "seen": "shade 0",
    }  # fmt: skip
    assert (last["seed"], last["category"], len(report["rows"][0]["pictures"])) == (1, "position", 20)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "evaluation.json", "evaluation.md", "few.png", "many.png",
    }  # fmt: skip
    assert pipeline.loads == [small_checkpoint] and set(pipeline.sampled) == {(4, 1.0), (50, 5.5)}


def test_all_batches_have_one_size_and_each_picture_a_seed_of_its_own(small_checkpoint, pipeline, tmp_path):
    evaluate([Sampler("few", small_checkpoint)], suite(2), 2, tmp_path, FakeScorer(), batch=4)
    assert pipeline.batches == [(0, 4), (4, 4), (8, 4), (1_000_000, 4), (1_000_004, 4), (1_000_008, 4)]


def test_a_grid_frames_wrong_pictures_in_red(small_checkpoint, pipeline, tmp_path):
    evaluate([Sampler("a/b", small_checkpoint)], suite(2), 1, tmp_path, FakeScorer(), batch=4)
    grid = np.asarray(Image.open(tmp_path / "a b.png"))
    framed = (grid == [255, 0, 0]).all(axis=-1)
    assert framed.any(axis=1)[:20].any() and framed.any(axis=0).sum() > 4
    assert not framed[:, :200].any()  # The first column shows what is right.


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 0}, "seeds must be from 1 to 1000, not 0"),
        ({"seeds": 1001}, "seeds must be from 1 to 1000, not 1001"),
        ({"batch": 0}, "batch must be positive"),
        ({"dtype": "float16"}, "dtype 'float16' is not supported"),
        ({"prompts": []}, "no prompt to draw"),
        ({"samplers": [Sampler("one"), Sampler("one")]}, "names of their own"),
        ({"samplers": [Sampler("a/b"), Sampler("a b")]}, "names of their own"),
        ({"samplers": [Sampler(COMPOSED)]}, "names of their own"),
        ({"steps": 0}, "steps must be from 1"),
        ({"guidance": float("nan")}, "guidance must be a finite number"),
    ],
)
def test_what_can_be_refused_is_refused_before_anything_is_drawn(change, message, small_checkpoint, pipeline, tmp_path):
    sampler = Sampler("one", small_checkpoint, change.pop("steps", 4), change.pop("guidance", 1.0))
    given = {"samplers": [sampler], "prompts": suite(1), "seeds": 1, "output": tmp_path / "out", "scorer": FakeScorer()}
    with pytest.raises(ValueError, match=message):
        evaluate(**given | change)
    assert not pipeline.loads and not (tmp_path / "out").exists()


def test_a_folder_with_an_earlier_evaluation_is_refused_before_anything_is_drawn_and_stays(
    small_checkpoint, pipeline, tmp_path
):
    (tmp_path / "older.png").write_bytes(b"older")
    with pytest.raises(FileExistsError, match="already exists; remove it or choose another destination"):
        evaluate([Sampler("one", small_checkpoint)], suite(1), 1, tmp_path, FakeScorer())
    assert not pipeline.loads and [path.name for path in tmp_path.iterdir()] == ["older.png"]


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_drawn(small_checkpoint, pipeline, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"file/out cannot be written: .*file is not a folder"):
        evaluate([Sampler("one", small_checkpoint)], suite(1), 1, tmp_path / "file" / "out", FakeScorer())
    assert not pipeline.loads


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (["vae"], "has no vae; convert a source that holds what is missing"),
        (["transformer", "vae"], "has no transformer and no vae; convert"),
        (["clip_l", "clip_g", "t5"], "has no text encoder; convert"),
    ],
)
def test_a_checkpoint_that_lacks_what_drawing_takes_is_refused_before_any_is_loaded(
    absent, message, small_checkpoint, pipeline, tmp_path
):
    lacking = tmp_path / "lacking"
    config = replace(CONFIG, **dict.fromkeys(absent))
    save_checkpoint(lacking, config, {name: random_parameters(name) for name in config.components})
    samplers = [Sampler("whole", small_checkpoint), Sampler("lacking", lacking)]
    with pytest.raises(ValueError, match=f"lacking {message}"):
        evaluate(samplers, suite(1), 1, tmp_path / "out", FakeScorer())
    assert not pipeline.loads and not (tmp_path / "out").exists()


def test_a_checkpoint_without_a_tokenizer_or_with_a_cut_file_is_refused_before_any_is_loaded(
    small_checkpoint, pipeline, tmp_path
):
    untold = tmp_path / "untold"
    save_checkpoint(untold, CONFIG, {name: random_parameters(name) for name in CONFIG.components})
    cut = Path(shutil.copytree(small_checkpoint, tmp_path / "cut"))
    chunk = max((cut / "vae").rglob("*"), key=lambda file: file.stat().st_size)
    chunk.write_bytes(chunk.read_bytes()[:-4])
    for damaged, message in (
        (untold, "untold has no tokenizer for clip_l, clip_g, t5"),
        (cut, "is damaged: .*cut/vae"),
    ):
        samplers = [Sampler("whole", small_checkpoint), Sampler("damaged", damaged)]
        with pytest.raises(ValueError, match=message):
            evaluate(samplers, suite(1), 1, tmp_path / "out", FakeScorer())
    assert not pipeline.loads and not (tmp_path / "out").exists()


def test_prompts_of_which_only_the_text_is_known_are_not_for_the_worlds_scorer(monkeypatch, pipeline, tmp_path):
    monkeypatch.setattr(run, "load_detector", lambda: Detector(rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="nothing can be composed for 'a red fox'"):
        evaluate([], [Prompt("given", "a red fox")], 1, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_failure_before_the_first_row_leaves_nothing_behind(small_checkpoint, pipeline, monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "decode", lambda latents: jnp.full((len(latents), 32, 32, 3), jnp.nan))
    with pytest.raises(FloatingPointError):
        evaluate([Sampler("one", small_checkpoint)], suite(1), 1, tmp_path / "new" / "out", FakeScorer(), batch=5)
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_a_later_row_leaves_the_whole_rows_before_it(small_checkpoint, pipeline, monkeypatch, tmp_path):
    def save_half(file, format):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    grids = iter([Image.new("RGB", (1, 1)), SimpleNamespace(save=save_half)])
    monkeypatch.setattr(run, "draw_grid", lambda *_: next(grids))
    samplers = [Sampler("first", small_checkpoint), Sampler("second", small_checkpoint)]
    with pytest.raises(OSError, match="No space left"):
        evaluate(samplers, suite(1), 1, tmp_path / "out", FakeScorer(), batch=5)
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {"evaluation.json", "evaluation.md", "first.png"}
    (row,) = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert row["name"] == "first"


def test_a_missing_detector_is_said_before_anything_is_drawn(small_checkpoint, pipeline, monkeypatch, tmp_path):
    monkeypatch.setattr(run, "load_detector", lambda: load_detector(tmp_path / "absent"))
    with pytest.raises(ValueError, match="absent are missing"):
        evaluate([Sampler("one", small_checkpoint)], suite(1), 1, tmp_path / "out")
    assert not pipeline.loads and not (tmp_path / "out").exists()


def test_composed_pictures_are_the_first_row_where_the_detector_judges(monkeypatch, tmp_path):
    monkeypatch.setattr(run, "load_detector", lambda: Detector(rngs=nnx.Rngs(0)))
    table = evaluate([], suite(1), 2, tmp_path, batch=4)
    assert table.splitlines()[2] == (
        "| sampler | steps | guidance | single object | two objects | counting | background | position | overall "
        "| diversity | ms a picture |"
    )
    assert table.splitlines()[4].startswith(f"| {COMPOSED} |  |  | ")


def test_a_last_batch_that_is_not_full_compiles_nothing_new(monkeypatch, tmp_path, compilations):
    monkeypatch.setattr(run, "load_detector", lambda: Detector(rngs=nnx.Rngs(0)))
    evaluate([], suite(1)[:4], 1, tmp_path / "one", batch=4)
    compilations.clear()
    evaluate([], suite(1), 1, tmp_path / "two", batch=4)
    assert compilations == []


def test_composed_pictures_are_the_same_for_one_number_and_new_for_another():
    prompts = suite(1)
    first, again, other = (compose_prompts(prompts, number) for number in (0, 0, 5))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (5, 256, 256, 3) and first.dtype == np.uint8
    assert all((one != two).mean() > 0.2 for one, two in zip(first, other))


def test_a_sampler_draws_what_the_pipeline_does(small_checkpoint):
    pipe = FlashPipeline.from_pretrained(small_checkpoint, dtype="float32", max_t5_tokens=32)
    transformer = replace(CONFIG.transformer, position_base=4)
    pipe.config = replace(CONFIG, transformer=transformer)
    assert pipe.config.default_size == 64
    prompts = suite(2)[:2]
    ours = painter(pipe, Sampler("guided", steps=2, guidance=3.0))(prompts, 7)
    result = pipe([prompt.text for prompt in prompts], steps=2, guidance=3.0, seed=7)
    for image, theirs in zip(ours, result.images):
        # The empty prompt is encoded once here, and once for each picture there.
        np.testing.assert_allclose(image.astype(int), np.asarray(theirs).astype(int), atol=1)


def test_pictures_are_composed_as_large_as_the_first_sampler_draws(small_checkpoint, pipeline, monkeypatch, tmp_path):
    sizes = []

    def compose(prompts, number, side):
        sizes.append(side)
        return np.zeros((len(prompts), side, side, 3), np.uint8)

    monkeypatch.setattr(run, "compose_prompts", compose)
    monkeypatch.setattr(run, "load_detector", lambda: Detector(rngs=nnx.Rngs(0)))
    evaluate([Sampler("one", small_checkpoint)], suite(1), 1, tmp_path, batch=5)
    assert sizes == [CONFIG.default_size] * 2
