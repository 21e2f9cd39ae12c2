"""ManifoldClustering wherever it is called, with whatever it is given: torch's switches, threads, input, parameters."""

import contextlib
import threading
import warnings

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning
from torch import nn

import torch_subspace as ts

QUICK = {"n_clusters": 3, "hidden": (8,), "dim": 4, "views": 2, "init_epochs": 2, "epochs": 2, "neighbors": 5,
         "random_state": 0}
X = np.random.default_rng(0).normal(size=(40, 5)) + 4 * (np.arange(40) % 3 == 1)[:, None] * np.eye(5)[0]


def found(X=X, **parameters):
    model = ts.ManifoldClustering(**QUICK | parameters).fit(X)
    return model.transform(X), model.predict(X), model.labels_


@pytest.fixture(scope="module")
def plain():
    return found()


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("switch", [
    lambda: default_dtype(torch.float64), lambda: default_dtype(torch.bfloat16), lambda: default_device("meta"),
    lambda: torch.device("meta"), torch.no_grad, torch.inference_mode,
    lambda: torch.autocast("cpu", dtype=torch.bfloat16),
], ids=["float64", "bfloat16", "set_default_device", "with device", "no_grad", "inference_mode", "autocast"])
def test_torchs_switches_change_nothing(switch, plain, tmp_path):
    with switch():
        assert same(found(), plain)
        encoder = nn.Sequential(nn.Linear(5, 8, device="cpu"), nn.ReLU())
        model = ts.ManifoldClustering(**QUICK, encoder=encoder).fit(X)
        model.save(tmp_path / "model")
        again = ts.ManifoldClustering.load(tmp_path / "model", encoder=encoder)
        assert np.array_equal(again.predict(X), model.predict(X))
    assert same([model.predict(X)], [again.predict(X)])


def test_two_threads_have_the_results_of_one():
    """Also where the encoder and the views draw from torch's own generators, which are left as they were."""
    encoder = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.ReLU())
    kinds = [{}, {"encoder": encoder}, {"augment": lambda x: x + 0.1 * torch.randn_like(x)}]
    jobs = [kind | {"random_state": seed} for kind in kinds for seed in (0, 1)]
    state = torch.get_rng_state()
    expected, results = [found(**job) for job in jobs], [None] * len(jobs)

    def work(first):
        for i in range(first, len(jobs), 2):
            results[i] = found(**jobs[i])

    pair = [threading.Thread(target=work, args=(first,)) for first in (0, 1)]
    for thread in pair:
        thread.start()
    for thread in pair:
        thread.join()
    assert all(same(r, e) for r, e in zip(results, expected, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("n, batch_size, augment, neighbors", [(5, 2, None, 0), (3, 2, None, 0), (2, 2, "noise", 1)])
def test_no_batch_is_of_one(n, batch_size, augment, neighbors):
    _, labels, _ = found(X[:n], n_clusters=2, batch_size=batch_size, augment=augment, neighbors=neighbors)
    assert labels.shape == (n,)


def test_the_bar_is_there_before_the_work(monkeypatch, capsys):
    from torch_subspace.clustering import manifold

    shown = []
    monkeypatch.setattr(manifold, "viewer", lambda *_: shown.append(capsys.readouterr().err))
    found(verbose=True)
    assert "neighbors:" in shown[0] and "0/4" in shown[0]


@pytest.mark.parametrize("offset, scale", [(1e9, 1.0), (-1e12, 1e3), (0.0, 1e-200), (0.0, 1e200)])
def test_float64_is_centred_before_it_is_rounded(offset, scale, plain):
    z, labels, _ = found(scale * X + offset)
    assert np.array_equal(labels, plain[1]) and np.abs(z - plain[0]).max() < 1e-3
    assert np.abs(z - plain[0]).max() < 1e-5 or offset == -1e12


def test_predict_is_centred_too():
    model = ts.ManifoldClustering(**QUICK).fit(X + 1e9)
    assert np.array_equal(model.predict(X + 1e9), model.labels_)


@pytest.mark.parametrize("distinct", [1, 2])
def test_fewer_distinct_points_than_clusters(distinct):
    points = np.repeat(np.eye(3)[:distinct], 6, 0)
    with pytest.warns(ConvergenceWarning, match=f"the distinct points, {distinct}, and so the clusters, are fewer"):
        _, predicted, labels = found(points)
    assert same([predicted], [labels])
    assert len({*zip(labels, np.arange(6 * distinct) // 6, strict=True)}) == len({*labels}) == distinct


def test_what_converges_says_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        found(np.repeat(np.eye(3), 6, 0))


@pytest.mark.parametrize("make", [
    lambda: X.tolist(), lambda: X.astype(object), lambda: X.astype(np.float16), lambda: (9 * X).astype(int),
    lambda: torch.tensor(X, requires_grad=True), lambda: torch.tensor(X).bfloat16(),
], ids=["lists", "objects", "half", "integers", "tensor", "bfloat16 tensor"])
def test_input_of_other_kinds(make):
    assert len(found(make())[1]) == 40


@pytest.mark.parametrize("bad, words", [
    (X[:, 0], "Expected 2D array"), (X[:0], "0 sample"), (X[:, :0], "0 feature"), (None, "points .n, f., got None"),
    (X.astype(complex), "Complex data not supported"), (np.full((4, 2), "a"), "could not convert string"),
    (X * np.where(np.arange(40) == 3, np.nan, 1)[:, None], "NaN"), (np.sign(X) * 1e308, "spread that float64 holds"),
])
def test_input_that_cannot_be_clustered(bad, words):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with pytest.raises(TypeError if bad is None else ValueError, match=words):
            found(bad)


def test_sparse_input():
    sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(TypeError, match=r"Sparse data was passed for X.*toarray"):
        found(sparse.csr_matrix(X))


@pytest.mark.parametrize("name, value", [
    ("device", "gpu"), ("device", 1.5), ("device", "meta"), ("callbacks", print), ("callbacks", [3]),
    ("verbose", "yes"), ("random_state", "seed"), ("random_state", -1), ("hidden", "ab"), ("invariance", "ab"),
    ("augment", [1]), ("image_shape", "ab"), ("n_clusters", "two"), ("eps", "0.2"), ("lr", torch.tensor(1e-3)),
])
def test_parameters_of_wrong_types_are_named(name, value):
    with pytest.raises(ValueError, match=f"ManifoldClustering: {name} must be") as caught:
        found(**{name: value})
    assert isinstance(caught.value, TypeError)  # both, as scikit-learn's InvalidParameterError
