"""Wrong arguments of ManifoldClustering: an error that says whose, which and what, and nothing is changed."""

import functools
import inspect
import math
import tempfile
from pathlib import Path

import bad_input
import bad_values as bad
import numpy as np
import pytest
import torch
from bad_input import Call, call, faults, method

import torch_subspace as ts

CALLS: dict[str, Call] = {}
add = functools.partial(bad_input.add, CALLS)
INF, X = math.inf, np.random.default_rng(0).normal(size=(12, 4))
SMALL = {"n_clusters": 2, "hidden": (4,), "dim": 3, "init_epochs": 0, "epochs": 0, "random_state": 0,
         "readout_size": 8}


def fit(**parameters):
    return ts.ManifoldClustering(**SMALL | parameters).fit(X)


@functools.cache
def fitted():
    return fit()


@functools.cache
def folder():
    kept = tempfile.TemporaryDirectory()
    fitted().save(Path(kept.name) / "a.safetensors")
    return kept


ABOVE, COUNT = bad.number(0, -1, INF), bad.whole(0, -1)
add("ManifoldClustering", call(
    fit, n_clusters=2, encoder=None, hidden=(4,), dim=3, eps=0.5, eta=0.1, reg=0.05, invariance=(1.0, 1.0),
    augment="noise", image_shape=(2, 2), views=2, neighbors=2, init_epochs=0, epochs=0, batch_size=8, lr=1e-3,
    weight_decay=0.0, readout_size=8, device="cpu", random_state=0, verbose=False, callbacks=None),
    n_clusters=bad.optional(COUNT), dim=COUNT, views=COUNT, batch_size=bad.whole(0, -1, 1),
    readout_size=bad.whole(0, 1), neighbors=bad.whole(-1), init_epochs=bad.whole(-1), epochs=bad.whole(-1),
    eps=ABOVE, eta=ABOVE, lr=ABOVE,
    reg=bad.number(-1, INF), weight_decay=bad.number(-1, INF), verbose=bad.flag, device=bad.device,
    random_state=bad.optional(bad.whole(-1, 2**32)), encoder=bad.optional(bad.those()),
    invariance=bad.those(one=(1.0,), negative=(1.0, -1.0), strings=("a", "b"), nan=(1.0, math.nan)),
    augment=bad.optional(lambda good: bad.function(good) | {"another": "word"}),
    callbacks=bad.optional(bad.those(strings=["a"])),
    hidden=lambda good: bad.NO_SEQUENCE | {"zero": (0,), "floats": (2.0,), "strings": ("4",)},
    image_shape=bad.optional(bad.those(one=(4,), others=(2, 3), floats=(2.0, 2.0))),
    fine="verbose: a number")
FILE = lambda: Path(folder().name) / "a.safetensors"  # noqa: E731
OSERROR = ("Is a directory", "Not a directory", "No such file", "no file")
add("ManifoldClustering.save", method(fitted, "save", path=FILE), OSERROR, path=bad.path)
add("ManifoldClustering.load", call(ts.ManifoldClustering.load, path=FILE, encoder=None), OSERROR, path=bad.path,
    encoder=bad.optional(bad.those()))
T = torch.from_numpy(X)
OURS = {
    "None": (None, "got None"), "sparse": (T.to_sparse(), "X must be dense, got torch.sparse_coo"),
    "nested": (torch.nested.nested_tensor([T, T]), "X must be dense, got a nested tensor"),
    "meta": (T.to("meta"), "X must hold numbers"), "infinite spread": (np.sign(X) * 1e308, "X must have a spread"),
}
SKLEARN = {
    "a word": ("word", "convert string"), "an object": (bad.Thing(), "not 'Thing'"), "a number": (3, "scalar array"),
    "a dict": ({"a": 1}, "not 'dict'"), "a row": (X[0], "got 1D array"), "a cube": (X[None], "dim 3"),
    "no rows": (X[:0], "0 sample"), "no columns": (X[:, :0], "0 feature"), "complex": (X + 1j, "Complex data"),
    "uneven": ([[1.0, 2.0], [1.0]], "inhomogeneous"), "nan": (np.full((12, 4), math.nan), "Input X contains NaN"),
    "infinity": (np.full((12, 4), INF), "Input X contains infinity"),
}


def test_every_parameter_is_tried():
    tried = {"self"}.union(*(set(call.kinds) for key, call in CALLS.items() if key == "ManifoldClustering"))
    assert tried >= set(inspect.signature(ts.ManifoldClustering).parameters)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", [*OURS, *SKLEARN])
@pytest.mark.parametrize("method", ["fit", "predict", "transform", "fit_predict"])
def test_points(method, key):
    estimator = ts.ManifoldClustering(**SMALL) if "fit" in method else fitted()
    value, message = (OURS | SKLEARN)[key]
    if key == "infinite spread" and "fit" not in method:
        return
    with pytest.raises((TypeError, ValueError), match=f"{'^ManifoldClustering: .*' if key in OURS else ''}{message}"):
        getattr(estimator, method)(value)
    assert np.array_equal(fitted().predict(X), fitted().labels_)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("key", CALLS)
def test_wrong_arguments_are_named(key):
    assert not faults(CALLS[key])
