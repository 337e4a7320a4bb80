import shutil
from pathlib import Path

import numpy as np
import pytest

from sd35flash_jax.text import load_prompt_tokenizer, load_tokenizer, read_prompts, token_counts, tokenize
from tests.tiny_model import CONFIG, END_OF_TEXT, write_tokenizers

SHARED = Path(__file__).parents[2] / "shared" / "sd3-medium-diffusers"
PROMPT = "A red fox's photo, in the SNOW café: 3 strawberries!!"


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tokenizers")
    write_tokenizers(folder)
    return {name: folder / name for name in ("clip_l", "clip_g", "t5")}


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {name: load_prompt_tokenizer(name, folder) for name, folder in folders.items()}


def test_each_encoder_gets_its_own_count_and_padding(tokenizers):
    counts = token_counts(CONFIG, t5_tokens=20)
    tokens = tokenize(tokenizers, ["a red fox", "soup"], counts)
    assert {name: array.shape for name, array in tokens.items()} == {
        "clip_l": (2, 77),
        "clip_g": (2, 77),
        "t5": (2, 20),
    }
    assert all(array.dtype == np.int32 for array in tokens.values())
    assert tokens["clip_l"][1, -1] == END_OF_TEXT
    assert tokens["clip_g"][1, -1] == tokenizers["clip_g"].token_to_id("!") == 0
    assert tokens["t5"][1, -1] == 0


def test_a_prompt_that_an_encoder_cannot_read_to_its_end_is_cut_with_a_warning(tokenizers):
    with pytest.warns(UserWarning, match="clip_l reads 77 tokens and does not see the end"):
        tokens = tokenize({"clip_l": tokenizers["clip_l"]}, ["fox " * 100], {"clip_l": 77})
    assert tokens["clip_l"].shape == (1, 77) and tokens["clip_l"][0, -1] == END_OF_TEXT


def test_clip_g_pads_with_its_own_token_even_without_a_tokenizer_config(folders, tmp_path):
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(folders["clip_g"] / name, tmp_path)
    bare = load_prompt_tokenizer("clip_g", tmp_path)
    whole = load_prompt_tokenizer("clip_g", folders["clip_g"])
    for prompt in ("a red fox", PROMPT):
        np.testing.assert_array_equal(
            tokenize({"clip_g": bare}, [prompt], {"clip_g": 77})["clip_g"],
            tokenize({"clip_g": whole}, [prompt], {"clip_g": 77})["clip_g"],
        )


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name} holds no tokenizer"):
        load_tokenizer("t5", tmp_path)


@pytest.mark.parametrize("encoder", ["clip_l", "t5"])
def test_a_damaged_tokenizer_is_named(encoder, tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": ')
    with pytest.raises(ValueError, match=f"the tokenizer in .*{tmp_path.name} cannot be read"):
        load_tokenizer(encoder, tmp_path)


@pytest.mark.parametrize("encoder", ["clip_l", "clip_g", "t5"])
def test_ids_of_prompts_are_those_that_transformers_gives(folders, tokenizers, encoder):
    prompts = [PROMPT, "", "fox " * 100, "soup"]
    reference = load_tokenizer(encoder, folders[encoder])
    expected = reference(prompts, padding="max_length", max_length=30, truncation=True).input_ids
    with pytest.warns(UserWarning, match=f"of {len(reference(prompts[2]).input_ids)}: fox fox"):
        found = tokenize({encoder: tokenizers[encoder]}, prompts, {encoder: 30})
    assert found[encoder].tolist() == expected


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setattr("sd35flash_jax.compilation._local_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "tokenizers"


@pytest.mark.parametrize("encoder", ["clip_l", "clip_g", "t5"])
def test_a_tokenizer_is_kept_and_then_read_without_transformers(folders, kept, encoder, monkeypatch):
    counts = {encoder: 60}
    first = tokenize({encoder: load_prompt_tokenizer(encoder, folders[encoder])}, [PROMPT, ""], counts)
    monkeypatch.setattr("sd35flash_jax.text.load_tokenizer", None)
    again = tokenize({encoder: load_prompt_tokenizer(encoder, folders[encoder])}, [PROMPT, ""], counts)
    np.testing.assert_array_equal(first[encoder], again[encoder])
    assert len(list(kept.iterdir())) == 1


def test_a_kept_tokenizer_serves_the_files_that_it_was_made_of_alone(folders, kept, tmp_path):
    shutil.copytree(folders["clip_l"], tmp_path / "own")
    assert load_prompt_tokenizer("clip_l", tmp_path / "own").padding["pad_token"] != "!"
    shutil.copytree(folders["clip_g"], tmp_path / "own", dirs_exist_ok=True)
    assert load_prompt_tokenizer("clip_l", tmp_path / "own").padding["pad_token"] == "!"
    assert len(list(kept.iterdir())) == 2


def test_a_damaged_kept_tokenizer_is_made_anew(folders, kept):
    load_prompt_tokenizer("t5", folders["t5"])
    [file] = kept.iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    load_prompt_tokenizer("t5", folders["t5"])
    assert file.read_bytes() == whole


def test_a_tokenizer_that_names_no_padding_is_refused(folders, tmp_path, monkeypatch):
    whole = load_tokenizer("clip_l", folders["clip_l"])
    whole.pad_token = None
    monkeypatch.setattr("sd35flash_jax.text.load_tokenizer", lambda *_: whole)
    with pytest.raises(ValueError, match="names no token to pad with"):
        load_prompt_tokenizer("clip_l", folders["clip_l"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the published tokenizers in ../shared")
@pytest.mark.parametrize(
    ("encoder", "folder", "files"),
    [
        ("clip_l", "tokenizer", ["vocab.json", "merges.txt"]),
        ("clip_g", "tokenizer_2", ["vocab.json", "merges.txt"]),
        ("t5", "tokenizer_3", ["spiece.model"]),
        ("t5", "tokenizer_3", ["tokenizer.json"]),
    ],
)
def test_the_published_tokenizers_load_from_each_form_they_are_stored_in(encoder, folder, files, tmp_path):
    for name in files:
        shutil.copy(SHARED / folder / name, tmp_path)
    whole = load_prompt_tokenizer(encoder, SHARED / folder)
    partial = load_prompt_tokenizer(encoder, tmp_path)
    counts = {encoder: 77}
    expected = tokenize({encoder: whole}, [PROMPT, ""], counts)[encoder]
    np.testing.assert_array_equal(tokenize({encoder: partial}, [PROMPT, ""], counts)[encoder], expected)
    # T5 ends with </s> and <pad>; CLIP-L repeats <|endoftext|>; OpenCLIP pads with "!".
    assert expected[1].tolist()[-2:] == {"clip_l": [49407] * 2, "clip_g": [0] * 2, "t5": [0] * 2}[encoder]


def test_prompts_are_read_from_a_file_one_a_line_and_empty_lines_are_skipped(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a fox\n\n  an old café \n", encoding="utf-8")
    assert read_prompts(Path("~/prompts.txt")) == ["a fox", "an old café"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n \n", r"prompts\.txt has no prompt; write one prompt a line"),
        (b"\xff\xfe", r"prompts\.txt is not UTF-8 text; save it as such"),
        (None, r"prompts\.txt cannot be read \(No such file"),
    ],
)
def test_a_file_that_prompts_cannot_be_read_from_is_named(content, message, tmp_path):
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_prompts(tmp_path / "prompts.txt")
