import numpy as np
import pytest

from sd35flash_jax.evaluate.frechet import diversity, frechet_distance


def features(mean, covariance, count=2000, seed=0):
    """Vectors whose sample mean and covariance are exactly these."""
    values = np.random.default_rng(seed).normal(size=(count, len(mean)))
    values -= values.mean(axis=0)
    values = values @ np.linalg.inv(np.linalg.cholesky(np.cov(values, rowvar=False))).T
    return values @ np.linalg.cholesky(covariance).T + mean


def test_the_distance_of_diagonal_gaussians_has_a_closed_form():
    mean, other = np.array([1.0, 2.0, 3.0]), np.array([1.5, 0.0, 3.0])
    deviations, others = np.array([1.0, 2.0, 0.5]), np.array([3.0, 2.0, 0.1])
    expected = np.square(mean - other).sum() + np.square(deviations - others).sum()
    ours = frechet_distance(features(mean, np.diag(deviations**2)), features(other, np.diag(others**2), seed=1))
    assert ours == pytest.approx(expected, rel=1e-9)


def test_the_distance_of_correlated_gaussians_agrees_with_the_matrix_root():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(3)
    one, other = (rng.normal(size=(500, 8)) @ rng.normal(size=(8, 8)) for _ in range(2))
    covariances = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    assert frechet_distance(one, other) == pytest.approx(expected, rel=1e-8)


def test_the_distance_of_a_set_to_itself_is_zero_even_where_features_never_vary():
    values = np.random.default_rng(0).normal(size=(100, 5)).astype(np.float32)
    values[:, 2] = values[:, 1]
    values[:, 3] = 7
    assert frechet_distance(values, values) == pytest.approx(0, abs=1e-6)


def test_the_distance_is_symmetric():
    one, other = (np.random.default_rng(seed).normal(size=(50, 4)) * (1 + seed) for seed in (0, 1))
    assert frechet_distance(one, other) == pytest.approx(frechet_distance(other, one))


@pytest.mark.parametrize("counts", [(4, 100), (100, 4), (1, 1)])
def test_too_few_pictures_for_a_covariance_are_refused(counts):
    one, other = (np.ones((count, 4)) for count in counts)
    with pytest.raises(ValueError, match=f"4 features needs more than 4 pictures, not {min(counts)}"):
        frechet_distance(one, other)


def test_diversity_is_the_mean_distance_between_pictures_of_one_prompt():
    values = np.array([[[0.0, 0], [5, 5]], [[3.0, 4], [5, 5]], [[0.0, 0], [5, 5]]])  # Three seeds, two prompts.
    assert diversity(values) == pytest.approx((5 + 0 + 5) / 3 / 2)


def test_diversity_of_one_seed_is_refused():
    with pytest.raises(ValueError, match="two seeds at least"):
        diversity(np.zeros((1, 4, 3)))
