"""How good a clustering is, against known classes and by its geometry.

Labels are sequences, arrays or tensors of n integers; what the integers are does not matter. Needs scikit-learn and
scipy.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

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

    true, pred = _labels(labels_true, labels_pred)
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
    true, pred = _labels(labels_true, labels_pred)
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

    true, pred = _labels(labels_true, labels_pred)
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
    labels = _array(labels)
    if labels.shape != (len(z),):
        raise ValueError(f"principal_angles: labels must be {(len(z),)}, got {labels.shape}")
    parts = [z[torch.as_tensor(labels == k)] for k in np.unique(labels)]
    most = min([z.shape[1], *map(len, parts)])
    if not 0 < dim <= most:
        raise ValueError(f"principal_angles: need 0 < dim <= {most}, the features and the smallest cluster, got {dim}")
    frames = torch.stack([torch.linalg.svd(part, full_matrices=False).Vh[:dim] for part in parts])
    cosines = torch.linalg.svdvals(frames[:, None] @ frames.mT)
    return cosines.clamp(max=1).acos().rad2deg()


def _labels(*labels):
    labels = [_array(x) for x in labels]
    for x in labels:
        if x.ndim != 1 or len(x) == 0 or not np.issubdtype(x.dtype, np.integer):
            raise ValueError(f"labels must be n > 0 integers in a row, got {x.dtype} of shape {x.shape}")
    if len(labels[0]) != len(labels[1]):
        raise ValueError(f"labels must be as many as classes, got {len(labels[1])} and {len(labels[0])}")
    return labels


def _array(labels) -> np.ndarray:
    return labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)


def _matrix(name, z) -> Tensor:
    z = torch.as_tensor(z).detach().cpu().double()
    if z.dim() != 2 or 0 in z.shape or not z.isfinite().all():
        raise ValueError(f"{name}: features must be finite, n x d and not empty, got shape {tuple(z.shape)}")
    return z
