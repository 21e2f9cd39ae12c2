"""How `ManifoldClustering` reads clusters from the plan Γ (m, m), and how many there are where nobody says.

Γ is doubly stochastic: a walk among the points. t steps of it weigh an eigenvector by its eigenvalue to the t.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..rates.coding_rate import coding_rate

MOST, PATIENCE = 32, 5  # clusters that are tried for, and how many numbers in a row may be no better


class Walk:
    """The eigenvectors of Γ, symmetrised, for any number of clusters."""

    def __init__(self, plan: Tensor):
        self.values, self.vectors = torch.linalg.eigh((plan + plan.mT).double().cpu() / 2)

    def divide(self, clusters: int, random: np.random.RandomState) -> Tensor:
        """Labels int64 (m,) by spectral clustering.

        Twice as many eigenvectors as clusters are taken, and rows have unit length: where Γ has more groups than asked
        for, small ones are then joined to others, rather than large ones to each other. How fast the walk mixes depends
        on the points, so it takes as many steps as let the last eigenvector weigh a third of the first: what tells
        clusters apart stays, and what only divides them counts for less.
        """
        from sklearn.cluster import KMeans

        values, vectors = self.values[-2 * clusters :].clamp(1e-9, 1), self.vectors[:, -2 * clusters :]
        steps = -math.log(3) / values[0].clamp(max=1 - 1e-9).log()
        rows = normalize(vectors * values**steps)
        labels = KMeans(clusters, n_init=20, random_state=random).fit_predict(rows.numpy())
        return torch.as_tensor(labels, dtype=torch.int64)

    def divide_briefly(self, z: Tensor, eps: float, most: int, random: np.random.RandomState) -> Tensor:
        """Labels of as many clusters as code the points' features z most briefly, `most` at most."""
        best, shortest, since = torch.zeros(len(z), dtype=torch.int64), code_length(z, None, eps), 0
        for clusters in range(2, most + 1):
            labels = self.divide(clusters, random)
            length = code_length(z, labels.to(z.device), eps)
            best, shortest, since = (labels, length, 0) if length < shortest else (best, shortest, since + 1)
            if since == PATIENCE:
                break
        return best


def code_length(z: Tensor, labels: Tensor | None, eps: float) -> float:
    """Nats that all points take, each cluster coded by itself (Ma et al., IEEE TPAMI 29, 2007).

    Its n_k points and its basis, (n_k + d) R(Z_k), and who belongs to it, n_k log(n/n_k).
    """
    groups = [z] if labels is None else [z[labels == label] for label in labels.unique()]
    return sum((len(g) + z.shape[1]) * coding_rate(g, eps=eps).item() + len(g) * math.log(len(z) / len(g))
               for g in groups)
