"""Planted unions of subspaces are found exactly, with scikit-learn's manners."""

import pickle
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import close, normal
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils.estimator_checks import parametrize_with_checks

from torch_subspace.grassmann import KSubspaces, k_subspaces
from torch_subspace.metrics import clustering_accuracy


def planted(seed, clusters=5, dim=3, features=16, each=50, noise=0.0, dtype=np.float64):
    draw = np.random.RandomState(seed)
    points = [draw.randn(each, dim) @ np.linalg.qr(draw.randn(features, dim))[0].T for _ in range(clusters)]
    x = np.concatenate(points)
    order = draw.permutation(len(x))
    return (x + noise * draw.randn(*x.shape))[order].astype(dtype), np.repeat(np.arange(clusters), each)[order]


def distances(x, frames):
    """The truth, in float64: of points to the rows' subspaces."""
    bases = torch.linalg.qr(torch.as_tensor(frames).double().mT).Q
    x = torch.as_tensor(x).double()
    return torch.stack([(x - x @ basis @ basis.mT).norm(dim=1) for basis in bases], 1)


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


@pytest.mark.parametrize("dtype, size", [
    *((np.float32, size) for size in (1e-38, 1e-30, 3e19, 1e30, 2e37)),
    *((np.float64, size) for size in (1e-300, 1e-200, 1e-100, 1e155, 1e200, 1e306)),
])
def test_points_of_any_size(dtype, size):
    eps = float(np.finfo(dtype).eps)
    x = (planted(1, noise=0.1)[0] * size).astype(dtype)
    model = KSubspaces(5, 3, n_init=2, random_state=0).fit(x)
    assert np.array_equal(model.predict(x), model.labels_)
    true, far = distances(x.astype(float) / size, model.frames_), model.transform(x)
    assert far.dtype == dtype and np.array_equal(far.argmin(1), model.labels_)
    close(torch.from_numpy(far.astype(float) / size), true, 8 * eps)
    wanted = size * (size * true.amin(1).square().sum().item())  # no exception where it is inf
    assert model.inertia_ == -model.score(x) == pytest.approx(wanted, rel=8 * eps)


def test_what_no_float_holds_is_infinite():
    x = planted(1, noise=0.1)[0]
    x = (x * (3.4e38 / np.abs(x).max())).astype(np.float32)
    model = KSubspaces(5, 3, n_init=2, random_state=0).fit(x)
    true, far = distances(x, model.frames_), torch.from_numpy(model.transform(x))
    beyond = true > torch.finfo(torch.float32).max
    assert beyond.any() and not beyond.all() and torch.equal(far == np.inf, beyond)
    close(far[~beyond], true[~beyond], 1e-6)
    assert model.inertia_ == -model.score(x) == pytest.approx(true.amin(1).square().sum().item(), rel=1e-6)


@pytest.mark.parametrize("dtype, most", [(np.float32, 100), (np.float64, 900)])
def test_small_points_beside_large_ones(dtype, most):
    x, _ = planted(1, noise=0.1, dtype=dtype)
    model = KSubspaces(5, 3, n_init=2, random_state=0).fit(x)
    sizes = 2.0 ** np.random.RandomState(0).randint(-most, most, (len(x), 1))
    mixed = x * sizes.astype(dtype)
    assert np.array_equal(model.predict(mixed), model.labels_)
    assert np.array_equal(model.transform(mixed), model.transform(x) * sizes.astype(dtype))
    again = KSubspaces(5, 3, n_init=2, random_state=0).fit(mixed)
    assert np.array_equal(again.predict(mixed), again.labels_) and again.inertia_ == -again.score(mixed)


@pytest.mark.parametrize("dtype, length, away, rel", [
    (np.float32, 100, 1e-2, 1e-6), (np.float32, 100, 1e-4, 1e-6), (np.float64, 100, 1e-8, 1e-4),
])
def test_small_distances_of_long_points(dtype, length, away, rel, monkeypatch):
    axes = torch.linalg.qr(normal(3, 16, 16)).Q
    unit = [torch.nn.functional.normalize(normal(3, 50, n, seed=n), dim=2) for n in (2, 14)]
    points = length * unit[0] @ axes[:, :2] + away * unit[1] @ axes[:, 2:]
    x = points.flatten(0, 1).numpy().astype(dtype)
    model = KSubspaces(3, 2, random_state=0).fit(x)
    assert clustering_accuracy(np.repeat(range(3), 50), model.labels_) == 1
    eps, true = float(np.finfo(dtype).eps), distances(x, model.frames_)
    far = torch.from_numpy(model.transform(x))
    own = far.amin(1)
    close(far, true, 4 * eps * length, absolute=True)  # not sqrt(eps): in float32 that is .03
    close(own, true.amin(1), rel)  # of the distance
    close(own, torch.full_like(own, away), away / 5 + 4 * eps * length, absolute=True)
    assert model.inertia_ == -model.score(x) == pytest.approx(true.amin(1).square().sum().item(), rel=rel)
    other = np.float64 if dtype is np.float32 else np.float32
    asked = x.astype(other)
    close(torch.from_numpy(model.transform(asked)), distances(asked, model.frames_), 4e-7 * length, absolute=True)
    monkeypatch.setattr(k_subspaces, "CHUNK", 100)  # six points at a time
    assert -model.score(x) == pytest.approx(model.inertia_, rel=rel)
    close(torch.from_numpy(model.transform(x)).amin(1), own, rel)


def bunches(seed, lengths, offset=0.0, features=32, each=200):
    """Points of three planes, whose axes have lengths, beside an offset that all share."""
    draw = np.random.RandomState(seed)
    axes = np.linalg.qr(draw.randn(features, 7))[0].T
    parts = [draw.randn(each, 2) * lengths @ axes[1 + 2 * c : 3 + 2 * c] for c in range(3)]
    return np.concatenate(parts) + offset * axes[0], np.repeat(range(3), each)


@pytest.mark.parametrize("dtype, offset", [(np.float32, 30), (np.float32, 300), (np.float32, 3000), (np.float64, 1e8)])
def test_beside_an_offset(dtype, offset):
    """What tells points apart is less than scores, or a Gram matrix of squares, can tell."""
    eps = float(np.finfo(dtype).eps)
    for seed in range(3):
        x, label = bunches(seed, (1, 1), offset)
        x = x.astype(dtype)
        model = KSubspaces(3, 3, n_init=5, random_state=0).fit(x)
        assert clustering_accuracy(label, model.labels_) == 1 and np.array_equal(model.predict(x), model.labels_)
        assert model.inertia_ == -model.score(x) < (4 * eps * offset) ** 2 * len(x)
        assert np.array_equal(model.transform(x).argmin(1), model.labels_)


@pytest.mark.parametrize("dtype, short", [(np.float32, 5e-3), (np.float32, 2e-3), (np.float32, 1e-5),
                                          (np.float64, 1e-7), (np.float64, 1e-12)])
def test_short_directions_beside_long_ones(dtype, short):
    eps = float(np.finfo(dtype).eps)
    for seed in range(3):
        x, label = bunches(seed, (1, short))
        model = KSubspaces(3, 2, n_init=5, random_state=0).fit(x.astype(dtype))
        assert clustering_accuracy(label, model.labels_) == 1
        assert model.inertia_ < (4 * eps) ** 2 * len(x), "as good as the points, not as their squares"


def test_starts_and_seeds():
    x, _ = planted(2, noise=0.3)
    one, two = (KSubspaces(5, 3, random_state=3).fit(x) for _ in range(2))
    assert np.array_equal(one.labels_, two.labels_) and np.array_equal(one.frames_, two.frames_)
    few = [KSubspaces(5, 3, n_init=1, random_state=seed).fit(x).inertia_ for seed in range(6)]
    assert one.inertia_ <= np.median(few)
    with pytest.warns(ConvergenceWarning, match="max_iter=1 "):
        KSubspaces(5, 3, n_init=1, max_iter=1, random_state=0).fit(x)


def test_the_transition():
    """examples/phase_transition.py: with k points of a subspace any fit is luck, with four per dimension all is found;
    random unions of three subspaces of R^64."""
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    from phase_transition import found

    assert not any(found(3, 3, seed, starts=5) for seed in range(4))
    assert all(found(3, 12, seed, starts=10) for seed in range(4))


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
