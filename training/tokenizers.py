"""Small tokenizers of the three kinds, trained on captions and written as the published ones are stored."""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers


def write_clip_tokenizer(folder: Path, lines: Iterable[str], vocabulary: int, length: int, padding: str) -> None:
    """Byte-level BPE that marks the ends of words, in a new folder; ids are those of CLIP's order: bytes, bytes that
    end a word, merges, start and end of text.

    Raises:
        ValueError: the lines do not yield so large a vocabulary.
    """
    letters = list(_byte_letters().values())
    specials = ["<|startoftext|>", "<|endoftext|>"]
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    merges_wanted = vocabulary - 2 * len(letters) - len(specials)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, end_of_word_suffix="</w>", initial_alphabet=letters, show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"][:merges_wanted]
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), *specials]
    if len(set(tokens)) != vocabulary:
        raise ValueError(f"the text yields {len(merges)} merges, but {merges_wanted} are wanted")

    folder.mkdir(parents=True)
    _write_json(folder / "vocab.json", {token: number for number, token in enumerate(tokens)})
    written = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(written) + "\n", encoding="utf-8")
    special_tokens = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": padding,
        "unk_token": "<|endoftext|>",
    }
    _write_json(folder / "special_tokens_map.json", special_tokens)
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True}
    _write_json(folder / "tokenizer_config.json", special_tokens | settings)


def _byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def write_t5_tokenizer(folder: Path, lines: Iterable[str], vocabulary: int) -> None:
    """A unigram model over words with a leading mark, in a new folder: padding, end, unknown, then pieces.

    Raises:
        ValueError: the trainer made a larger vocabulary.
    """
    specials = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=specials, unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    if tokenizer.get_vocab_size() > vocabulary:
        raise ValueError(f"the T5 tokenizer has {tokenizer.get_vocab_size()} tokens, more than {vocabulary}")
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    special_tokens = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write_json(folder / "special_tokens_map.json", special_tokens)
    settings = {"tokenizer_class": "T5TokenizerFast", "model_max_length": 512, "extra_ids": 0}
    _write_json(folder / "tokenizer_config.json", special_tokens | settings)


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
