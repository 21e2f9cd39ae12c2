"""Files of `ManifoldClustering`: safetensors, with all that is no tensor as JSON in the metadata."""

from __future__ import annotations

import json
import os

import numpy as np
import torch

from ..files import write_whole
from .readout import MOST
from .training import ordinary

FORMAT, VERSION = "torch_subspace.clustering", 1
OBJECTS = ("encoder", "callbacks", "device")  # parameters that a file can't or shouldn't hold
FITTED = ("_mean", "_anchors", "_potentials", "_anchor_labels", "labels_")


def write_clustering(estimator, path: str | os.PathLike[str]) -> None:
    """Write a fitted estimator."""
    parameters = {k: _plain(v) for k, v in estimator.get_params(deep=False).items() if k not in OBJECTS}
    about = {
        "parameters": {k: v for k, v in parameters.items() if v is not _plain},
        "own_encoder": estimator.encoder is not None,
        "scale": estimator._scale,
        "n_features_in": estimator.n_features_in_,
        "feature_names_in": list(getattr(estimator, "feature_names_in_", ())),
        "history": estimator.history_,
    }
    tensors = {f"network.{k}": v for k, v in estimator.network_.state_dict().items()}
    tensors |= {k: torch.as_tensor(getattr(estimator, k), device="cpu") for k in FITTED}
    write_whole(path, tensors, {"format": FORMAT, "version": str(VERSION), "estimator": json.dumps(about)})


def _plain(value):
    """A parameter as JSON has it; this function itself where it can't."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (list, tuple)):
        parts = [_plain(v) for v in value]
        return _plain if _plain in parts else parts
    return value if value is None or isinstance(value, (bool, int, float, str)) else _plain


def read_clustering(cls, path: str | os.PathLike[str], encoder):
    """A fitted estimator of class `cls` from a file."""
    tensors, about = _read(path)
    if about["own_encoder"] and encoder is None:
        raise ValueError(f"load: {os.fspath(path)!r} holds an encoder of its own kind: give encoder=, a module like it")
    if encoder is not None and not about["own_encoder"]:
        raise ValueError(f"load: {os.fspath(path)!r} holds the default encoder, encoder= must be None")
    try:
        parameters = {k: tuple(v) if isinstance(v, list) else v for k, v in about["parameters"].items()}
        estimator = cls(**parameters, encoder=encoder)
        estimator._check_parameters()
        estimator._mean, estimator._scale = tensors["_mean"].numpy(), float(about["scale"])
        estimator.n_features_in_ = int(about["n_features_in"])
        if about["feature_names_in"]:
            estimator.feature_names_in_ = np.asarray(about["feature_names_in"], dtype=object)
        estimator.history_ = about["history"]
        estimator._anchors, estimator._potentials = tensors["_anchors"], tensors["_potentials"]
        estimator._anchor_labels, estimator.labels_ = tensors["_anchor_labels"], tensors["labels_"].numpy()
        _check_anchors(estimator)
        with ordinary(torch.device(estimator.device), True):
            points = estimator._scaled(np.zeros((2, estimator.n_features_in_), dtype=np.float32))
            estimator.network_ = estimator._build(points, torch.Generator()).eval()
            state = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
            estimator.network_.load_state_dict(state)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = "its encoder does not fit" if about["own_encoder"] else "its contents contradict each other"
        raise ValueError(f"load: {os.fspath(path)!r}: {why}: {error}") from error
    return estimator


def _check_anchors(estimator) -> None:
    points, labels = len(estimator._anchors), estimator._anchor_labels
    shapes = [tuple(t.shape) for t in (estimator._anchors, estimator._potentials, labels, estimator._mean)]
    if shapes != [(points, estimator.dim), (points,), (points,), (estimator.n_features_in_,)] or not points:
        raise ValueError(f"tensors of shapes {shapes}")
    most = MOST if estimator.n_clusters is None else estimator.n_clusters
    for found in (labels.numpy(), estimator.labels_):
        if found.ndim != 1 or found.dtype != np.int64 or found.min() < 0 or found.max() >= most:
            raise ValueError("labels that are not clusters")
    estimator.n_clusters_ = int(labels.max()) + 1


def _read(path):
    """Tensors and description; ValueError where the file is not one of ours, or broken."""
    from safetensors import SafetensorError, safe_open

    path = os.fspath(path)
    if not os.path.isfile(path):
        raise FileNotFoundError(f"load: no file {path!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or metadata.get("version") != str(VERSION):
                found = f"{metadata.get('format')!r}, version {metadata.get('version')!r}"
                raise ValueError(f"load: {path!r} is not a clustering of torch_subspace that this can read: {found}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        about = json.loads(metadata["estimator"])
        missing = {"parameters", "own_encoder", "scale", "n_features_in", "feature_names_in", "history"} - set(about)
        missing |= set(FITTED) - set(tensors)
        if missing:
            raise ValueError(f"{sorted(missing)[0]!r} is missing")
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        if str(error).startswith("load:"):
            raise
        raise ValueError(f"load: {path!r} is truncated or not a safetensors file of ours: {error!r}") from error
    return tensors, about
