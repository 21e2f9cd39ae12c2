"""Streaming PCA finds what full PCA does, in one pass, with scikit-learn's manners."""

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.utils.estimator_checks import parametrize_with_checks

from torch_subspace.lowrank import StreamingPCA

every_method = pytest.mark.parametrize("method", ["block_power", "oja"])


@parametrize_with_checks([StreamingPCA(1), StreamingPCA(1, method="oja")])
def test_scikit_learns_own_checks(estimator, check):
    check(estimator)


def digits(seed):
    x = load_digits(return_X_y=True)[0]
    return x[np.random.RandomState(seed).permutation(len(x))]


def streamed(x, k, batch=100, **options):
    model = StreamingPCA(k, random_state=0, **options)
    for part in np.array_split(x, max(1, len(x) // batch)):
        model.partial_fit(part)
    return model


def held(model, x, full):
    """The share of the best components' variance, and the cosine of the largest angle between the spans."""
    along = ((x - x.mean(0)) @ model.components_.T).var(0, ddof=1).sum() / full.explained_variance_.sum()
    return along, np.linalg.svd(full.components_ @ model.components_.T, compute_uv=False)[-1]


@pytest.mark.parametrize("method, most, near", [("block_power", 0.9995, 0.995), ("oja", 0.998, 0.99)])
@pytest.mark.parametrize("seed", range(3))
def test_digits_in_random_order(method, most, near, seed):
    x = digits(seed)
    full = PCA(10, svd_solver="full").fit(x)
    model = streamed(x, 10, method=method)
    along, cosine = held(model, x, full)
    assert most < along < 1 + 1e-9 and cosine > near
    np.testing.assert_allclose(model.explained_variance_.sum(), full.explained_variance_.sum(), rtol=0.01)
    np.testing.assert_allclose(model.mean_, x.mean(0), atol=1e-12)
    np.testing.assert_allclose(model.explained_variance_ratio_.sum(), full.explained_variance_ratio_.sum(), rtol=0.01)
    gram = model.components_ @ model.components_.T
    np.testing.assert_allclose(gram, np.eye(10), atol=1e-12)
    assert model.n_samples_seen_ == len(x)
    fitted = StreamingPCA(10, method=method, random_state=0).fit(x)
    assert held(fitted, x, full)[0] > most - 0.002
    along = ((x - x.mean(0)) @ fitted.components_.T).var(0, ddof=1)
    np.testing.assert_allclose(fitted.explained_variance_, along, rtol=1e-9)


@every_method
@pytest.mark.parametrize("dtype, most", [(np.float64, 1e-9), (np.float32, 1e-3)])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_few_directions_are_found_exactly(method, dtype, most, scale):
    draw = np.random.RandomState(1)
    x = ((draw.randn(400, 3) @ draw.randn(3, 12) + 2) * scale).astype(dtype)
    model = streamed(x, 3, 50, method=method)
    assert model.components_.dtype == dtype and model.transform(x).dtype == dtype
    assert np.abs(model.inverse_transform(model.transform(x)) - x).max() < most * np.abs(x).max()
    wide = x.astype(float)
    full = PCA(3).fit(wide)
    np.testing.assert_allclose(model.explained_variance_, full.explained_variance_, rtol=1e-3)


def test_the_mean_and_the_scatter_do_not_depend_on_the_batches():
    x = np.random.RandomState(2).randn(90, 6) + np.linspace(0, 50, 90)[:, None]  # whose mean drifts
    full = PCA(6).fit(x)
    for batch in (1, 7, 90):
        model = streamed(x, 6, batch)
        np.testing.assert_allclose(model.explained_variance_, full.explained_variance_, rtol=1e-8)
        np.testing.assert_allclose(np.abs(model.components_ @ full.components_.T), np.eye(6), atol=1e-6)
        np.testing.assert_allclose(model.explained_variance_ratio_.sum(), 1)


def test_a_few_long_rows_do_not_stop_oja():
    draw = np.random.RandomState(0)
    x = np.concatenate([digits(0) * 0.02, 30 * draw.randn(4, 64)])
    x = x[draw.permutation(len(x))]
    full = PCA(10, svd_solver="full").fit(x)
    assert held(streamed(x, 10, method="oja"), x, full)[0] > 0.999
    assert held(streamed(x, 10, method="oja", n_aside=0), x, full)[0] < 0.96
    assert held(streamed(x, 10), x, full)[0] > 0.999


@every_method
def test_copies_go_on_alike(method):
    x = digits(0)[:600]
    model = streamed(x[:300], 4, method=method)
    others = [pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    for m in (model, *others):
        m.partial_fit(x[300:])
    assert all(np.array_equal(m.components_, model.components_) for m in others)
    fresh = clone(model)
    assert not hasattr(fresh, "components_") and fresh.get_params() == model.get_params()
    assert list(model.get_feature_names_out()) == [f"streamingpca{i}" for i in range(4)]
    again = [StreamingPCA(4, method=method, random_state=3).fit(x) for _ in range(2)]
    assert np.array_equal(again[0].components_, again[1].components_)
    again[0].fit(x[:100])  # forgets
    assert again[0].n_samples_seen_ == 100


def test_whatever_torch_is_set_to():
    x = digits(0)[:300]
    plain = StreamingPCA(3, random_state=0).fit(x)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        other = StreamingPCA(3, random_state=0).fit(torch.tensor(x, device="cpu"))
        assert np.array_equal(other.transform(x), plain.transform(x))
    assert np.array_equal(plain.components_, other.components_)


@every_method
@pytest.mark.parametrize("x", [np.zeros((6, 4)), np.ones((6, 4)), np.eye(4)[[0, 0, 1]], np.ones((1, 4))], ids=range(4))
def test_rows_of_fewer_directions(method, x):
    for model in (StreamingPCA(3, method=method, random_state=0).fit(x), streamed(x, 3, 2, method=method)):
        np.testing.assert_allclose(model.components_ @ model.components_.T, np.eye(3), atol=1e-6)
        assert np.isfinite(model.explained_variance_).all() and model.explained_variance_[-1] < 1e-12
        np.testing.assert_allclose(model.inverse_transform(model.transform(x)), x, atol=1e-6)


@pytest.mark.parametrize("options, x, match", [
    ({"n_components": 5}, np.ones((5, 4)), "n_components must be at most n_features=4, got 5"),
    ({"n_components": 0}, np.ones((5, 4)), "n_components must be >= 1"),
    ({"method": "power"}, np.ones((5, 4)), "method must be one of block_power, oja, got 'power'"),
    ({"n_components": 2.0}, np.ones((5, 4)), "n_components must be an int"), ({}, None, "X must be rows"),
    ({"batch_size": 0}, np.ones((5, 4)), "batch_size"), ({"n_oversamples": -1}, np.ones((5, 4)), "n_oversamples"),
    ({"n_aside": 1.5}, np.ones((5, 4)), "n_aside"), ({"random_state": "a"}, np.ones((5, 4)), "random_state"),
    ({}, np.full((5, 4), np.nan), "NaN"), ({}, torch.ones(5, 4, device="meta"), "meta"),
    ({}, torch.ones(5, 4).to_sparse(), "must be dense")])
def test_what_it_refuses(options, x, match):
    with pytest.raises((TypeError, ValueError), match=match):
        StreamingPCA(**{"n_components": 2} | options).fit(x)


def test_what_a_fitted_one_refuses():
    model = StreamingPCA(2, random_state=0).fit(np.eye(4))
    before = model.components_.copy()
    for call, x, match in ((model.partial_fit, np.ones((3, 5)), "5 features"),
                           (model.transform, np.ones((3, 5)), "5 features"),
                           (model.partial_fit, np.full((3, 4), np.inf), "infinity"),
                           (model.inverse_transform, np.ones((3, 3)), r"X must be \(n, 2\), got shape \(3, 3\)")):
        with pytest.raises(ValueError, match=match):
            call(x)
    assert np.array_equal(model.components_, before) and model.n_samples_seen_ == 4
    model = StreamingPCA(2, n_oversamples=1, random_state=0).partial_fit(np.eye(4)).set_params(n_components=4)
    with pytest.raises(ValueError, match="n_components must be at most the 3 directions held since the .*, got 4"):
        model.partial_fit(np.eye(4))
    assert model.n_samples_seen_ == 4 and model.fit(np.eye(4)).components_.shape == (4, 4)
