"""Reading clusters from a plan: groups of any mixing, the length of a code, and the number of clusters by it."""

import math

import numpy as np
import pytest
import torch

import torch_subspace as ts
from torch_subspace.clustering.readout import Walk, code_length
from torch_subspace.metrics import clustering_accuracy


def planted(clusters, dim=3, features=24, each=40):
    """Unit points on orthogonal subspaces, and their labels."""
    g = torch.Generator().manual_seed(clusters)
    frames = torch.linalg.qr(torch.randn(features, clusters * dim, generator=g)).Q.T.reshape(clusters, dim, features)
    points = torch.nn.functional.normalize(torch.randn(clusters, each, dim, generator=g), dim=-1) @ frames
    return points.flatten(0, 1), torch.arange(clusters).repeat_interleave(each)


def chains(leak, groups=3, size=30):
    """A walk along `groups` chains, that leaves its chain with probability `leak`, and the chains."""
    step = torch.diag_embed(torch.full((size - 1,), 0.25, dtype=torch.float64), 1)
    step = step + step.T
    step += torch.diag(1 - step.sum(1))
    walk = torch.block_diag(*[step] * groups)
    return (1 - leak) * walk + leak / len(walk), torch.arange(groups).repeat_interleave(size)


@pytest.mark.parametrize("leak", [1e-4, 1e-2])
def test_walks_are_read_whether_they_mix_soon_or_late(leak):
    plan, chain = chains(leak)
    found = Walk(plan).divide(3, np.random.RandomState(0))
    assert found.dtype == torch.int64 and clustering_accuracy(chain, found) == 1


def test_walks_that_are_no_walk_any_more():
    for plan in (torch.eye(6), torch.full((6, 6), 1 / 6)):  # nobody moves; all mix at once
        found = Walk(plan).divide(2, np.random.RandomState(0))
        assert found.shape == (6,) and 0 <= found.min() <= found.max() < 2


def test_a_code_is_shortest_for_what_the_points_are():
    z, label = planted(4)
    one, right = code_length(z, None, 0.2), code_length(z, label, 0.2)
    joined, split = label // 2, 2 * label + torch.arange(len(z)) % 2
    assert right < min(one, code_length(z, joined, 0.2), code_length(z, split, 0.2))
    by_hand = sum((40 + 24) * ts.coding_rate(z[label == k], eps=0.2).item() + 40 * math.log(4) for k in range(4))
    assert abs(right - by_hand) < 1e-3


@pytest.mark.parametrize("clusters", [1, 2, 5, 8])
def test_the_number_of_subspaces(clusters):
    z, label = planted(clusters)
    walk = Walk(ts.MLCLoss(eps=0.2, eta=0.1).membership(z))
    found = walk.divide_briefly(z, 0.2, 32, np.random.RandomState(0))
    assert found.max() + 1 == clusters and clustering_accuracy(label, found) > 0.97
    few = walk.divide_briefly(z, 0.2, 3, np.random.RandomState(0))
    assert few.max() + 1 <= 3
