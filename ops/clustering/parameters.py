"""What the parameters of `ManifoldClustering` must be; looked at by `fit`, as scikit-learn does."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn


class InvalidParameter(ValueError, TypeError):
    """A parameter of a wrong type or value; both kinds of error, as scikit-learn's own."""


def check_parameters(estimator) -> None:
    """Raises InvalidParameter, which names the parameter, the rule and the value."""
    values = estimator.get_params(deep=False)

    def need(good, name, rule):
        if not good:
            raise InvalidParameter(f"ManifoldClustering: {name} must be {rule}, got {values[name]!r}")

    clusters = values["n_clusters"]
    need(clusters is None or _whole(clusters) and clusters > 0, "n_clusters", "a whole number > 0 or None")
    for name in ("dim", "views", "batch_size", "readout_size"):
        need(_whole(values[name]) and values[name] > 0, name, "a whole number > 0")
    for name in ("init_epochs", "epochs", "neighbors"):
        need(_whole(values[name]) and values[name] >= 0, name, "a whole number >= 0")
    for name in ("eps", "eta", "lr"):
        need(_number(values[name]) and values[name] > 0, name, "a number > 0")
    for name in ("reg", "weight_decay"):
        need(_number(values[name]) and values[name] >= 0, name, "a number >= 0")
    need(values["readout_size"] >= (clusters or 0), "readout_size", f">= n_clusters={clusters}")
    need(values["batch_size"] > 1, "batch_size", "> 1")
    encoder, invariance, augment = (values[name] for name in ("encoder", "invariance", "augment"))
    need(encoder is None or isinstance(encoder, nn.Module), "encoder", "a torch module or None")
    pair = _listed(invariance) and len(invariance) == 2
    need(pair and all(_number(w) and w >= 0 for w in invariance), "invariance", "two numbers >= 0")
    need(_sizes(values["hidden"]), "hidden", "a sequence of whole numbers > 0")
    known = augment is None or callable(augment) or isinstance(augment, str) and augment in ("noise", "images")
    need(known, "augment", "'noise', 'images', a callable or None")
    shape = values["image_shape"]
    if shape is not None or isinstance(augment, str) and augment == "images":
        good = _sizes(shape) and len(shape) in (2, 3)
        need(good, "image_shape", "(height, width) or (channels, height, width)")
    need(isinstance(values["verbose"], (bool, numbers.Integral, np.bool_)), "verbose", "True or False")
    callbacks = values["callbacks"]
    need(callbacks is None or _listed(callbacks) and all(map(callable, callbacks)), "callbacks",
         "a sequence of callables or None")
    seed = values["random_state"]
    seeded = seed is None or seed is np.random or isinstance(seed, np.random.RandomState)
    need(seeded or _whole(seed) and 0 <= seed < 2**32, "random_state",
         "a whole number from 0 to 2**32 - 1, a numpy RandomState or None")
    _check_device(values["device"], need)


def _check_device(device, need) -> None:
    rule = "a device that torch can use"
    try:
        usable = torch.device(device).type != "meta"
        torch.empty(0, device=device)
    except (RuntimeError, TypeError, AssertionError) as error:
        why = str(error).splitlines()[0]
        need(False, "device", f"{rule} ({why})")
    need(usable, "device", f"{rule} and that holds values")


def _whole(value) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _number(value) -> bool:
    real = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return real and bool(np.isfinite(value))


def _listed(value) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _sizes(value) -> bool:
    return _listed(value) and all(_whole(size) and size > 0 for size in value)
