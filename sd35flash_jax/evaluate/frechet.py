"""Distances between pictures in a space of features."""

import numpy as np
from jaxtyping import Float


def frechet_distance(one: Float[np.ndarray, "n c"], other: Float[np.ndarray, "m c"]) -> float:
    """The squared Frechet distance (arXiv 1706.08500) of two sets of features, each taken as a Gaussian:
    `|mean - mean'|^2 + trace(C + C' - 2 (C C')^(1/2))` with covariances C and C', in float64.

    The trace of the root is taken of `C^(1/2) C' C^(1/2)`, which has the same eigenvalues and is symmetric.

    Raises:
        ValueError: a set has no more vectors than features, so that its covariance says nothing in some
            directions.
    """
    for features in (one, other):
        count, width = features.shape
        if count <= width:
            raise ValueError(f"the Frechet distance of {width} features needs more than {width} pictures, not {count}")
    one, other = one.astype(np.float64), other.astype(np.float64)
    covariance, other_covariance = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    values, vectors = np.linalg.eigh(covariance)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    product_values = np.linalg.eigvalsh(root @ other_covariance @ root)
    between = np.square(one.mean(axis=0) - other.mean(axis=0)).sum()
    spread = np.trace(covariance) + np.trace(other_covariance) - 2 * np.sqrt(product_values.clip(0)).sum()
    return float(between + max(spread, 0.0))


def diversity(features: Float[np.ndarray, "seeds prompts c"]) -> float:
    """The distance between the features of two pictures of one prompt, from different seeds, on average over all such
    pairs and all prompts.

    Raises:
        ValueError: there is only one seed.
    """
    seeds = len(features)
    if seeds < 2:
        raise ValueError("diversity needs pictures of two seeds at least")
    first, second = np.triu_indices(seeds, 1)
    return float(np.linalg.norm(features[first] - features[second], axis=-1).mean())
