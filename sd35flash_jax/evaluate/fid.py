"""The Frechet inception distance (arXiv 1706.08500) to a folder of images; needs torch-fidelity and its weights."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from sd35flash_jax.evaluate.frechet import frechet_distance
from sd35flash_jax.evaluate.scoring import Figure, Mark
from sd35flash_jax.evaluate.suite import Prompt

FEATURES = 2048
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class FidScorer:
    """Takes Inception's 2048 pooled features of each picture; the figure is the distance of all of a sampler's pictures
    to the reference.

    Args:
        weights: torch-fidelity's own file of Inception's weights, such as weights-inception-2015-12-05-6726825d.pth.
            PyTorch unpickles it, so take it from there alone.
        reference: a folder of images.
        pictures: how many a sampler draws in all.

    Raises:
        ValueError: torch-fidelity is not installed, the weights are missing or damaged, an image cannot be read, or
            there are too few pictures or images for a covariance of their features. The network is never asked.
    """

    def __init__(self, weights: Path, reference: Path, pictures: int):
        files = sorted(file for file in reference.glob("*") if file.suffix.lower() in _SUFFIXES)
        for owner, count in ((reference, len(files)), ("a sampler", pictures)):
            if count <= FEATURES:
                raise ValueError(f"FID needs more than {FEATURES} pictures on each side, and {owner} has {count}")
        if not weights.is_file():
            raise ValueError(
                f"{weights} is missing: download torch-fidelity's weights of Inception, and name their file"
            )
        try:
            import torch
            from torch_fidelity import FeatureExtractorInceptionV3
        except ImportError:
            raise ValueError("FID needs torch-fidelity: pip install 'sd35flash-jax[evaluate]'") from None
        except RuntimeError as error:
            # What torchvision, which torch-fidelity imports, raises beside a PyTorch of another build.
            raise ValueError(f"torch-fidelity cannot be imported ({error}); install torchvision again") from error
        self._torch = torch
        try:
            self._inception = FeatureExtractorInceptionV3("inception-v3-compat", [str(FEATURES)], str(weights))
        except Exception as error:  # pickle and PyTorch raise many kinds for a damaged file
            raise ValueError(
                f"{weights} is damaged, or is not torch-fidelity's weights of Inception; download it again"
            ) from error
        self._reference = np.concatenate([self._features(_read_image(file)[None]) for file in files])

    def mark(self, prompts: Sequence[Prompt], images: UInt8[np.ndarray, "b h w 3"]) -> list[Mark]:
        return [Mark(None, "", features) for features in self._features(images)]

    def figures(self, prompts: Sequence[Prompt], marks: Sequence[Sequence[Mark]]) -> dict[str, Figure]:
        features = np.array([mark.values for of_seed in marks for mark in of_seed])
        return {"FID": Figure(frechet_distance(features, self._reference))}

    def _features(self, images: UInt8[np.ndarray, "b h w 3"]) -> Float[np.ndarray, "b 2048"]:
        pixels = self._torch.tensor(images.transpose(0, 3, 1, 2))
        with self._torch.no_grad():
            return self._inception(pixels)[0].numpy()


def _read_image(file: Path) -> UInt8[np.ndarray, "h w 3"]:
    try:
        return np.asarray(Image.open(file).convert("RGB"))
    except Exception as error:  # Pillow raises many kinds for a damaged file, and few of them name it
        raise ValueError(f"{file} cannot be read as an image ({error}); remove it or replace it") from error
