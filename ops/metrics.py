"""How good a clustering is, against known classes and by its geometry.

Labels are sequences, arrays or tensors of n integers; what the integers are does not matter. Needs scikit-learn and
scipy.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .common import check_dense, told, whole

__all__ = [
    "clustering_accuracy",
    "clustering_scores",
    "effective_rank",
    "match_clusters",
    "principal_angles",
]

Array = npt.ArrayLike | Tensor


def match_clusters(labels_true: Array, labels_pred: Array) -> npt.NDArray[np.integer[Any]]:
    """The clusters' labels renamed to those of the classes, one to one, such that most points agree.

    The best of all assignments is found by the Hungarian algorithm. Where there are more clusters than classes, those
    left over get labels of their own, beyond the classes'.

    Returns:
        int64 array (n,)

    Raises:
        ValueError: labels that are not two rows of n > 0 integers.

    Example:
        >>> from torch_subspace.metrics import match_clusters
        >>> match_clusters([0, 0, 1, 1], [7, 7, 3, 3])
        array([0, 0, 1, 1])
    """
    from scipy.optimize import linear_sum_assignment

    true, pred = _labels("match_clusters", labels_true, labels_pred)
    classes, truth = np.unique(true, return_inverse=True)
    clusters, found = np.unique(pred, return_inverse=True)
    table = np.zeros((len(clusters), len(classes)), dtype=np.int64)
    np.add.at(table, (found, truth), 1)
    rows, columns = linear_sum_assignment(table, maximize=True)
    name = classes.max() + 1 + np.arange(len(clusters))
    name[rows] = classes[columns]
    return name[found]


def clustering_accuracy(labels_true: Array, labels_pred: Array) -> float:
    """Fraction of the points whose cluster is matched with their class (ACC), by the best one-to-one assignment.

    Raises:
        ValueError: labels that are not two rows of n > 0 integers.

    Example:
        >>> from torch_subspace.metrics import clustering_accuracy
        >>> clustering_accuracy([0, 0, 1, 1], [7, 7, 7, 3])
        0.75
    """
    true, pred = _labels("clustering_accuracy", labels_true, labels_pred)
    return float((match_clusters(true, pred) == true).mean())


def clustering_scores(labels_true: Array, labels_pred: Array) -> dict[str, float]:
    """{"acc", "nmi", "ari"}: `clustering_accuracy`, and scikit-learn's normalised mutual information and adjusted Rand
    index.

    Example:
        >>> from torch_subspace.metrics import clustering_scores
        >>> scores = clustering_scores([0, 0, 1, 1], [7, 7, 3, 3])
        >>> {name: round(float(value), 2) for name, value in scores.items()}
        {'acc': 1.0, 'nmi': 1.0, 'ari': 1.0}
    """
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    true, pred = _labels("clustering_scores", labels_true, labels_pred)
    return {
        "acc": clustering_accuracy(true, pred),
        "nmi": float(normalized_mutual_info_score(true, pred)),
        "ari": float(adjusted_rand_score(true, pred)),
    }


def effective_rank(z: Array) -> float:
    """exp(H(p)) with p = s / Σs, s the singular values of z (n, d): between 1 and min(n, d), 0 where z is zero.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.

    Example:
        >>> from torch_subspace.metrics import effective_rank
        >>> round(effective_rank(torch.eye(3, 5)), 4)
        3.0
    """
    s = torch.linalg.svdvals(_matrix("effective_rank", z))
    if s.sum() == 0:
        return 0.0
    p = s / s.sum()
    return float(torch.special.entr(p).sum().exp())


def principal_angles(z: Array, labels: Array, dim: int) -> Tensor:
    """Angles between the subspaces that the clusters' points span, as far as `dim` directions describe them.

    Args:
        z: features (n, d); not centred, since a cluster's subspace goes through the origin.
        labels: integers (n,).
        dim: directions per cluster, those of its largest singular values; at most d and the smallest cluster's size.

    Returns:
        float64 (K, K, dim) in degrees, ascending, between any two of the K clusters in the order of their labels.

    Raises:
        ValueError: labels that don't fit z, dim out of range.

    Example:
        >>> from torch_subspace.metrics import principal_angles
        >>> z, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
        >>> principal_angles(z, labels, dim=2)[0, 1]
        tensor([90., 90.], dtype=torch.float64)
    """
    z = _matrix("principal_angles", z)
    labels, dim = _integers("principal_angles", "labels", labels), whole("principal_angles", "dim", dim)
    if labels.shape != (len(z),):
        raise ValueError(f"principal_angles: labels must be {(len(z),)}, got {labels.shape}")
    parts = [z[torch.as_tensor(labels == k)] for k in np.unique(labels)]
    most = min([z.shape[1], *map(len, parts)])
    if not 0 < dim <= most:
        raise ValueError(f"principal_angles: need 0 < dim <= {most}, the features and the smallest cluster, got {dim}")
    frames = torch.stack([torch.linalg.svd(part, full_matrices=False).Vh[:dim] for part in parts])
    cosines = torch.linalg.svdvals(frames[:, None] @ frames.mT)
    return cosines.clamp(max=1).acos().rad2deg()


def _labels(name, labels_true, labels_pred):
    true, pred = _integers(name, "labels_true", labels_true), _integers(name, "labels_pred", labels_pred)
    if len(true) != len(pred):
        raise ValueError(f"{name}: labels must be as many in labels_pred as in labels_true, got {len(pred)} and "
                         f"{len(true)}")
    return true, pred


def _integers(name, what, labels) -> np.ndarray:
    rule, given = f"{name}: {what}: labels must be n > 0 integers in a row", labels
    if isinstance(labels, Tensor):
        _check_numbers(name, what, labels)
        labels = labels.detach().cpu().numpy()
    try:
        labels = np.asarray(labels)
    except (TypeError, ValueError):  # rows of different lengths
        raise ValueError(f"{rule}, got {told(labels)}") from None
    if labels.ndim != 1 or len(labels) == 0 or not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"{rule}, got {told(given)}, {labels.dtype} of shape {labels.shape}")
    return labels


def _matrix(name, z) -> Tensor:
    try:
        z = torch.as_tensor(z)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name}: z must be features n x d, got {told(z)}") from None
    _check_numbers(name, "z", z)
    z = z.detach().cpu().double()
    if z.dim() != 2 or 0 in z.shape or not z.isfinite().all():
        raise ValueError(f"{name}: z: features must be finite, n x d and not empty, got shape {tuple(z.shape)}")
    return z


def _check_numbers(name, what, t) -> None:
    """A tensor that there are real numbers in."""
    check_dense(name, what, t)
    if t.is_meta or t.is_complex() or t.is_quantized:
        raise TypeError(f"{name}: {what} must hold real numbers, got {told(t)} on {t.device}")
