"""CLIP score (arXiv 2104.08718) by a published CLIP model, for any prompts; needs PyTorch and a local folder."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from sd35flash_jax.config import read_json
from sd35flash_jax.evaluate.scoring import Figure, Mark
from sd35flash_jax.evaluate.suite import Prompt
from sd35flash_jax.text import load_tokenizer

_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
"""Where transformers looks for a model's weights, first come, first taken."""


class ClipScorer:
    """Marks pictures with 100 times the cosine between CLIP's embeddings of picture and prompt, in float32; the figure
    is the mean.

    Args:
        folder: a CLIP model as transformers stores it, with its tokenizer and image processor, such as a download of
            openai/clip-vit-large-patch14.

    Raises:
        ValueError: PyTorch is not installed, or the folder does not hold the whole of such a model, or a file of it is
            damaged. The network is never asked.
    """

    def __init__(self, folder: Path):
        try:
            import torch
            import transformers
        except ImportError:
            raise ValueError("the CLIP score needs PyTorch: pip install 'sd35flash-jax[evaluate]'") from None
        self._torch = torch
        with _quiet():
            self._model = _load_model(folder)
            self._tokens = self._model.config.text_config.max_position_embeddings
            tokenizer = load_tokenizer("clip_l", folder)
            if len(tokenizer) > self._model.config.text_config.vocab_size:
                raise ValueError(f"the tokenizer in {folder} has more tokens than its model; download both again")
            file = folder / "preprocessor_config.json"
            try:
                images = transformers.CLIPImageProcessor.from_pretrained(folder, local_files_only=True)
            except Exception as error:  # many kinds, as in text.load_tokenizer
                raise ValueError(f"{file} is missing or damaged; download it again") from error
            self._processor = transformers.CLIPProcessor(images, tokenizer)
        # A trial, so that weights which are not finite are not found out after hours of drawing.
        (trial,) = self.mark([Prompt("given", "a picture")], np.full((1, 64, 64, 3), 128, np.uint8))
        if not np.isfinite(trial.values).all():
            raise ValueError(f"the CLIP model in {folder} gives a score that is not finite; download its weights again")

    def mark(self, prompts: Sequence[Prompt], images: UInt8[np.ndarray, "b h w 3"]) -> list[Mark]:
        texts = [prompt.text for prompt in prompts]
        inputs = self._processor(
            text=texts, images=list(images), return_tensors="pt", padding=True, truncation=True, max_length=self._tokens
        )
        with self._torch.no_grad():
            out = self._model(**inputs)
        # Both embeddings come normalized.
        scores = 100 * (out.image_embeds * out.text_embeds).sum(dim=-1).numpy()
        return [Mark(None, f"{score:.1f}", np.array([score])) for score in scores]

    def figures(self, prompts: Sequence[Prompt], marks: Sequence[Sequence[Mark]]) -> dict[str, Figure]:
        return {"CLIP score": Figure.over_seeds([np.mean([mark.values for mark in of_seed]) for of_seed in marks])}


def _load_model(folder: Path) -> Any:
    """The model in float32, every weight of it from the folder: transformers itself only warns of those that are
    absent, and makes them up."""
    import torch
    from transformers import CLIPModel

    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not a folder with a CLIP model, such as openai/clip-vit-large-patch14's files")
    config = read_json(file)
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "clip":
        raise ValueError(
            f"{file} says model_type {kind!r}, not 'clip': the score takes a whole CLIP model, text and image side, "
            "such as openai/clip-vit-large-patch14's files"
        )
    weights = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise ValueError(f"{folder} holds no weights; download {_WEIGHTS[0]} too")
    try:
        loaded: Any = CLIPModel.from_pretrained(
            folder,
            local_files_only=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # They are in the report, and refused below.
        )
    except Exception as error:  # transformers, safetensors and pickle raise many kinds for a damaged file
        raise ValueError(f"{weights} is damaged, or its config.json is; download both again") from error
    model, report = loaded
    made_up = sorted({*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])})
    if made_up:
        raise ValueError(
            f"{weights} lacks {len(made_up)} weights of the model that its config.json describes, or has them in other "
            f"shapes, such as {made_up[-1]}; download a whole CLIP model"
        )
    return model.eval()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' bars and reports: what is wrong is said in one sentence."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
