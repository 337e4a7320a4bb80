"""Hostile sources: whatever is done to a folder's files, conversion ends in a whole checkpoint or in one clear message,
soon, in bounded memory, and writes nothing but its destination.

A few hundred mutations by default; `pytest -m slow -s tests/conversion/test_fuzz.py` tries 12 000 and counts outcomes.
"""

import json
import random
import resource
import shutil
import struct
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion import convert
from conversion.diffusers_layout import clip_table
from sd35flash_jax.checkpoint import load_checkpoint, parameter_shapes
from sd35flash_jax.config import CLIPConfig, ModelConfig
from tests.diffusers_source import source_config

CONFIG = ModelConfig(clip_l=CLIPConfig(8, 2, 2, 16, 8, "gelu", vocabulary=16, positions=4))
LONGEST_SECONDS = 20
LONGEST_MESSAGE = 20_000
MOST_GROWTH_KIB = 400 * 1024

NUMBERS = [None, True, -1, 0, 1, 3, 7, 2**31, 2**53, 2**63, 2**64, 10**30, -(2**63), 0.5, 1e308, float("nan")]
TEXTS = [
    "",
    "x",
    "../x",
    "/etc/passwd",
    "a/../../b",
    "\x00",
    "\ud800",
    "é" * 300,
    "F32",
    "BF16",
    "F8_E4M3",
    "I64",
    "Q9",
]
OTHERS: list[Any] = [[], {}, [[]], [1, [2]], {"a": {"b": []}}, [0, 8], [8, 0], ["0", "8"]]
VALUES = NUMBERS + TEXTS + OTHERS


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> Path:
    """One small text encoder, in two shards."""
    folder = tmp_path_factory.mktemp("fuzz") / "template"
    encoder = folder / "text_encoder"
    encoder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    arrays = {
        param: draw.normal(size=shape).astype(np.float32) for param, shape in parameter_shapes("clip_l", CONFIG).items()
    }
    tensors: dict[str, np.ndarray] = {}
    for rule in clip_table(CONFIG.clip_l).rules:
        array = arrays[rule.param] if rule.layer is None else arrays[rule.param][rule.layer]
        tensors |= dict(zip(rule.sources, rule.transform.backward(array, len(rule.sources))))
    shards = {"model-00001.safetensors": sorted(tensors)[::2], "model-00002.safetensors": sorted(tensors)[1::2]}
    for file, keys in shards.items():
        save_file({key: np.ascontiguousarray(tensors[key]) for key in keys}, encoder / file)
    weight_map = {key: file for file, keys in shards.items() for key in keys}
    (encoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (encoder / "config.json").write_text(json.dumps(source_config(CONFIG.clip_l)))
    return folder


def flip_bytes(file: Path, draw: random.Random) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(draw.choice([1, 1, 2, 8, 64])):
        if content:
            content[draw.randrange(len(content))] = draw.randrange(256)
    file.write_bytes(bytes(content))


def cut_or_grow(file: Path, draw: random.Random) -> None:
    content = file.read_bytes()
    choices = [b"", content[: draw.randrange(len(content))], content + draw.randbytes(draw.choice([1, 8, 4096]))]
    file.write_bytes(draw.choice(choices))


def change_json(file: Path, draw: random.Random) -> None:
    """Put an odd value at a random place of a JSON file."""
    data = json.loads(file.read_text())
    file.write_text(json.dumps(changed(data, draw)))


def deepen_json(file: Path, draw: random.Random) -> None:
    file.write_text(draw.choice(["[" * 100_000, '{"a":' * 50_000, "", "null", "[1,", '"\\ud800"', "\x00", "NaN"]))


def changed(data: Any, draw: random.Random) -> Any:
    if isinstance(data, dict) and data and draw.random() < 0.9:
        key = draw.choice(list(data))
        action = draw.random()
        if action < 0.15:
            return {name: value for name, value in data.items() if name != key}
        if action < 0.3:
            return data | {draw.choice(TEXTS): data[key]}
        return data | {key: changed(data[key], draw)}
    if isinstance(data, list) and data and draw.random() < 0.5:
        index = draw.randrange(len(data))
        return [*data[:index], changed(data[index], draw), *data[index + 1 :]]
    return draw.choice(VALUES)


def change_header(file: Path, draw: random.Random) -> None:
    """Mutate a safetensors header as JSON, or its length, or repeat a key."""
    content = file.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header, body = content[8 : 8 + length], content[8 + length :]
    action = draw.random()
    if action < 0.2:
        lengths = [0, 1, length - 1, length + 1, len(content), 2**31, 2**63, 2**64 - 1, draw.randrange(2**64)]
        file.write_bytes(struct.pack("<Q", draw.choice(lengths)) + header + body)
        return
    if action < 0.3:
        first = json.dumps(json.loads(header)).split(", ")[0]
        header = header.replace(b"{", first.encode() + b",", 1)
    elif action < 0.4:
        header = header.replace(b"text_model", draw.choice([b"\xff\xfe", b"../../x", b"\\u0000", b""]), 1)
    else:
        header = json.dumps(changed(json.loads(header), draw)).encode("utf-8", "surrogatepass")
    file.write_bytes(struct.pack("<Q", len(header)) + header + body)


def poison(file: Path, draw: random.Random) -> None:
    tensors = load_file(file)
    key = draw.choice(sorted(tensors))
    tensor = tensors[key].copy()
    tensor.flat[draw.randrange(tensor.size)] = draw.choice([np.nan, np.inf, -np.inf, 3e38])
    save_file(tensors | {key: tensor}, file)


def retype(file: Path, draw: random.Random) -> None:
    tensors = load_file(file)
    key = draw.choice(sorted(tensors))
    dtype = draw.choice([np.float64, np.float16, np.int64, np.int8, np.bool_, np.uint8])
    with np.errstate(all="ignore"):
        save_file(tensors | {key: tensors[key].astype(dtype)}, file)


WEIGHTS, INDEX, CONFIGURATION = "model-00001.safetensors", "model.safetensors.index.json", "config.json"
MUTATIONS: list[tuple[str, Callable[[Path, random.Random], None], int]] = [
    (WEIGHTS, change_header, 8),
    (WEIGHTS, flip_bytes, 3),
    (WEIGHTS, cut_or_grow, 2),
    (WEIGHTS, poison, 1),
    (WEIGHTS, retype, 1),
    (INDEX, change_json, 4),
    (INDEX, flip_bytes, 1),
    (INDEX, deepen_json, 1),
    (CONFIGURATION, change_json, 4),
    (CONFIGURATION, flip_bytes, 1),
    (CONFIGURATION, deepen_json, 1),
]


def attempt(template: Path, room: Path, seed: int) -> str:
    """One mutated conversion in `room`; returns its outcome, or fails."""
    draw = random.Random(seed)
    room.mkdir()
    shutil.copytree(template, room / "source")
    (name, mutate, _) = draw.choices(MUTATIONS, [weight for *_, weight in MUTATIONS])[0]
    mutate(room / "source" / "text_encoder" / name, draw)
    start = time.perf_counter()
    try:
        convert(room / "source", room / "made")
        outcome = "converted"
    except (ValueError, OSError) as error:
        message = str(error)
        assert 0 < len(message) < LONGEST_MESSAGE, f"seed {seed}: a message of {len(message)} characters"
        outcome = f"{mutate.__name__} refused"
    seconds = time.perf_counter() - start
    assert seconds < LONGEST_SECONDS, f"seed {seed} took {seconds:.0f} s"
    left = {path.name for path in room.iterdir()}
    assert left == ({"source", "made"} if outcome == "converted" else {"source"}), f"seed {seed} left {left}"
    if outcome == "converted":
        (encoder,) = load_checkpoint(room / "made", dtype="float32").components.values()
        assert encoder is not None
    shutil.rmtree(room)
    return outcome


def run(template: Path, folder: Path, seeds: range) -> Counter[str]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = Counter(attempt(template, folder / str(seed), seed) for seed in seeds)
    growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert growth < MOST_GROWTH_KIB, f"memory grew by {growth} KiB"
    assert list(folder.iterdir()) == []
    return outcomes


def test_mutated_sources_end_in_a_whole_checkpoint_or_one_message(template, tmp_path):
    outcomes = run(template, tmp_path, range(300))
    assert 0 < outcomes["converted"] < 200, outcomes
    assert len(outcomes) > 5, "many kinds of mutation were refused"


@pytest.mark.slow
def test_twelve_thousand_mutated_sources_end_in_a_whole_checkpoint_or_one_message(template, tmp_path):
    print(run(template, tmp_path, range(1000, 13_000)))
