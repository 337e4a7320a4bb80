"""CLIP score (arXiv 2104.08718) by a published CLIP model, for any prompts; needs PyTorch and a local folder."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from sd35flash_jax.evaluate.scoring import Figure, Mark
from sd35flash_jax.evaluate.suite import Prompt


class ClipScorer:
    """Marks pictures with 100 times the cosine between CLIP's embeddings of picture and prompt; the figure is the mean.

    Args:
        folder: a CLIP model as transformers stores it, with its tokenizer and image processor, such as a download of
            openai/clip-vit-large-patch14.

    Raises:
        ValueError: PyTorch is not installed, or the folder holds no such model. The network is never asked.
    """

    def __init__(self, folder: Path):
        try:
            import torch
            from transformers import CLIPModel, CLIPProcessor
        except ImportError:
            raise ValueError("the CLIP score needs PyTorch: pip install 'sd35flash-jax[evaluate]'") from None
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} is not a folder with a CLIP model, such as openai/clip-vit-large-patch14's files"
            )
        self._torch = torch
        self._model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
        self._processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)

    def mark(self, prompts: Sequence[Prompt], images: UInt8[np.ndarray, "b h w 3"]) -> list[Mark]:
        texts = [prompt.text for prompt in prompts]
        inputs = self._processor(text=texts, images=list(images), return_tensors="pt", padding=True, truncation=True)
        with self._torch.no_grad():
            out = self._model(**inputs)
        # Both embeddings come normalized.
        scores = 100 * (out.image_embeds * out.text_embeds).sum(dim=-1).numpy()
        return [Mark(None, f"{score:.1f}", np.array([score])) for score in scores]

    def figures(self, prompts: Sequence[Prompt], marks: Sequence[Sequence[Mark]]) -> dict[str, Figure]:
        return {"CLIP score": Figure.over_seeds([np.mean([mark.values for mark in of_seed]) for of_seed in marks])}
