"""Planted unions of subspaces are found exactly, with scikit-learn's manners."""

import pickle
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from torch_subspace.grassmann import KSubspaces
from torch_subspace.metrics import clustering_accuracy


def planted(seed, clusters=5, dim=3, features=16, each=50, noise=0.0, dtype=np.float64):
    draw = np.random.RandomState(seed)
    points = [draw.randn(each, dim) @ np.linalg.qr(draw.randn(features, dim))[0].T for _ in range(clusters)]
    x = np.concatenate(points)
    order = draw.permutation(len(x))
    return (x + noise * draw.randn(*x.shape))[order].astype(dtype), np.repeat(np.arange(clusters), each)[order]


@parametrize_with_checks([KSubspaces(n_clusters=3, dim=1, n_init=2)])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
@pytest.mark.parametrize("dtype, most", [(np.float64, 1e-14), (np.float32, 1e-6)])
def test_planted_subspaces_are_found(dtype, most, scale):
    for seed in range(3):
        x, label = planted(seed, dtype=dtype)
        model = KSubspaces(5, 3, random_state=seed).fit((x * scale).astype(dtype))
        assert clustering_accuracy(label, model.labels_) == 1
        assert model.inertia_ / scale**2 < most * (x.astype(float) ** 2).sum() and model.frames_.dtype == dtype
        gram = model.frames_ @ model.frames_.transpose(0, 2, 1)
        assert np.abs(gram - np.eye(3)).max() < (1e-12 if dtype is np.float64 else 1e-5)


def test_what_it_says_of_points_agrees():
    x, label = planted(1, noise=0.1)
    model = KSubspaces(5, 3, random_state=0)
    found = model.fit_predict(x)
    assert clustering_accuracy(label, found) > 0.98
    far = model.transform(x)
    assert far.shape == (250, 5) and np.array_equal(far.argmin(1), model.predict(x))
    assert np.array_equal(model.predict(x), found)
    assert -model.score(x) == pytest.approx((far.min(1) ** 2).sum()) == pytest.approx(model.inertia_)
    projected = [np.linalg.norm(x - x @ f.T @ f, axis=1) for f in model.frames_]
    np.testing.assert_allclose(far, np.stack(projected, 1), atol=1e-12)
    assert list(model.get_feature_names_out()) == [f"ksubspaces{i}" for i in range(5)]
    again = pickle.loads(pickle.dumps(model))
    assert np.array_equal(again.transform(x), far)


def test_starts_and_seeds():
    x, _ = planted(2, noise=0.3)
    one, two = (KSubspaces(5, 3, random_state=3).fit(x) for _ in range(2))
    assert np.array_equal(one.labels_, two.labels_) and np.array_equal(one.frames_, two.frames_)
    few = [KSubspaces(5, 3, n_init=1, random_state=seed).fit(x).inertia_ for seed in range(6)]
    assert one.inertia_ <= np.median(few)
    with pytest.warns(ConvergenceWarning, match="max_iter=1 "):
        KSubspaces(5, 3, n_init=1, max_iter=1, random_state=0).fit(x)


@pytest.mark.parametrize("x", [np.zeros((6, 4)), np.ones((6, 4)), np.eye(4)[[0, 0, 1, 1, 2, 2]]], ids=range(3))
def test_points_of_fewer_subspaces(x):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = KSubspaces(4, 2, random_state=0).fit(x)
    assert model.inertia_ < 1e-25 and np.isfinite(model.frames_).all() and model.frames_.shape == (4, 2, 4)


def test_whatever_torch_is_set_to():
    x, _ = planted(3)
    plain = KSubspaces(5, 3, n_init=2, random_state=0).fit(x)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        other = KSubspaces(5, 3, n_init=2, random_state=0).fit(torch.tensor(x, device="cpu", requires_grad=False))
        assert np.array_equal(other.predict(x), plain.labels_)
    assert np.array_equal(plain.frames_, other.frames_)


@pytest.mark.parametrize("x, message", [
    (None, "X must be points"), (np.ones((2, 4)), "n_clusters must be at most n_samples, got 3 with n_samples=2"),
    (np.ones((5, 1)), "dim must be at most n_features=1, got 2"), (torch.ones(5, 4).to_sparse(), "must be dense"),
    (torch.ones(5, 4, device="meta"), "meta"), (np.full((5, 4), np.nan), "NaN"),
])
def test_points_that_cannot_be_clustered(x, message):
    with pytest.raises((TypeError, ValueError), match=message):
        KSubspaces(3, 2).fit(x)
