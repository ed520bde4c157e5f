from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.decomposition import PCA

from ood_runners.backbones import Projection, ProjectionFitter
from ood_runners.errors import DataError


@pytest.fixture(scope="module")
def patches() -> NDArray[np.float32]:
    """float32 (40, 10, 10, 12): correlated channels of falling variance, far from the origin."""
    rng = np.random.default_rng(0)
    mixed = rng.normal(size=(4000, 12)) * 0.7 ** np.arange(12) @ np.linalg.qr(rng.normal(size=(12, 12)))[0]
    return (mixed + 5).reshape(40, 10, 10, 12).astype(np.float32)


def test_power_minus_a_half_is_scikit_learns_whitening(patches: NDArray[np.float32]) -> None:
    rows = patches.reshape(-1, 12)
    pca = PCA(6, whiten=True, svd_solver="full").fit(rows)
    projected = ProjectionFitter().partial_fit(patches).finish(6, power=-0.5).apply(patches)
    assert projected.dtype == np.float32
    expected = pca.transform(rows)
    signs = np.sign((projected.reshape(-1, 6) * expected).sum(axis=0))
    np.testing.assert_allclose(projected.reshape(-1, 6) * signs, expected, atol=2e-3)


@pytest.mark.parametrize("power", [0.0, -0.25, -0.5])
def test_component_variances_are_scaled_by_their_power(patches: NDArray[np.float32], power: float) -> None:
    rows = patches.reshape(-1, 12)
    variances = PCA(5).fit(rows).explained_variance_
    projected = ProjectionFitter().partial_fit(patches).finish(5, power).apply(rows)
    np.testing.assert_allclose(projected.var(axis=0, ddof=1), variances ** (1 + 2 * power), rtol=1e-3)
    np.testing.assert_allclose(projected.mean(axis=0), 0, atol=1e-3)


def test_a_stream_fits_as_the_whole(patches: NDArray[np.float32]) -> None:
    whole = ProjectionFitter().partial_fit(patches).finish(6)
    stream = ProjectionFitter()
    for start in range(0, 40, 7):
        stream.partial_fit(patches[start : start + 7])
    np.testing.assert_allclose(stream.finish(6).matrix, whole.matrix, atol=1e-4)
    np.testing.assert_allclose(stream.finish(6).mean, whole.mean, atol=1e-5)


def test_the_largest_coefficient_of_each_component_is_positive(patches: NDArray[np.float32]) -> None:
    matrix = ProjectionFitter().partial_fit(patches).finish(12).matrix
    assert (matrix[np.abs(matrix).argmax(axis=0), np.arange(matrix.shape[1])] > 0).all()


def test_float16_patches_and_more_rows_than_a_chunk() -> None:
    rows = np.random.default_rng(1).normal(3, 2, (20_000, 4)).astype(np.float16)
    projection = ProjectionFitter().partial_fit(rows).finish(4, power=-0.5)
    np.testing.assert_allclose(np.cov(projection.apply(rows).T), np.eye(4), atol=5e-3)


def test_no_more_components_than_the_data_have() -> None:
    rng = np.random.default_rng(2)
    flat = (rng.normal(size=(500, 3)) @ rng.normal(size=(3, 20))).astype(np.float32)
    projection = ProjectionFitter().partial_fit(flat).finish(128)
    assert projection.matrix.shape == (20, 3)
    assert np.isfinite(projection.apply(flat)).all()
    assert ProjectionFitter().partial_fit(rng.normal(size=(5, 20))).finish(128).matrix.shape == (20, 4)


def test_patches_without_variance_are_refused() -> None:
    with pytest.raises(DataError, match="All patches of all pictures are the same"):
        ProjectionFitter().partial_fit(np.full((2, 3, 3, 5), 7.1, np.float32)).finish()
    with pytest.raises(DataError, match="too few patches"):
        ProjectionFitter().finish()


def test_bias_and_arrays(patches: NDArray[np.float32]) -> None:
    projection = ProjectionFitter().partial_fit(patches).finish(6)
    np.testing.assert_allclose(
        patches @ projection.matrix + projection.bias, projection.apply(patches), rtol=1e-4, atol=1e-4
    )
    again = Projection.from_arrays(projection.to_arrays())
    np.testing.assert_array_equal(again.apply(patches), projection.apply(patches))


def test_the_fine_map_leads_to_the_projection_of_enlarged_channels(patches: NDArray[np.float32]) -> None:
    factors = np.where(np.arange(12) < 4, 2.0, 1.0)
    projection = ProjectionFitter().partial_fit(patches).finish(12, enlarged=factors)
    enlarged = ProjectionFitter().partial_fit(patches * factors.astype(np.float32)).finish(12)
    # With all components nothing is lost, so that distances are those of the enlarged patches' own projection.
    rows = patches.reshape(-1, 12)[:50]
    near = projection.apply(rows) @ projection.fine
    expected = enlarged.apply(rows * factors.astype(np.float32))
    apart, wanted = (np.linalg.norm(one[:, None] - one[None], axis=2) for one in (near, expected))
    np.testing.assert_allclose(apart, wanted, rtol=2e-2, atol=1e-2)
    assert not np.allclose(
        wanted, np.linalg.norm(projection.apply(rows)[:, None] - projection.apply(rows)[None], axis=2)
    )
    again = Projection.from_arrays(projection.to_arrays())
    np.testing.assert_array_equal(again.fine, projection.fine)
    assert ProjectionFitter().partial_fit(patches).finish(12).fine is None
