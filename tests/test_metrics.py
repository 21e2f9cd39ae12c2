"""Clustering metrics against brute force, closed forms and scikit-learn."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from torch_subspace.metrics import (
    clustering_accuracy,
    clustering_scores,
    effective_rank,
    match_clusters,
    principal_angles,
)

pairs = st.integers(1, 12).flatmap(
    lambda n: st.tuples(*[st.lists(st.integers(0, k), min_size=n, max_size=n) for k in (3, 4)])
)


def by_brute_force(true, pred):
    """The best accuracy over all one-to-one assignments."""
    true, pred = np.asarray(true), np.asarray(pred)
    names = list(range(5)) + [-1] * 5
    return max(
        np.mean(np.asarray(names)[list(order)][pred] == true) for order in itertools.permutations(range(6), 5)
    )


class TestAccuracy:
    @settings(deadline=None, max_examples=40)
    @given(pairs)
    def test_is_the_best_of_all_assignments(self, labels):
        assert clustering_accuracy(*labels) == pytest.approx(by_brute_force(*labels))

    @settings(deadline=None, max_examples=40)
    @given(pairs)
    def test_the_renamed_clusters_reach_it(self, labels):
        true, pred = map(np.asarray, labels)
        renamed = match_clusters(true, pred)
        assert (renamed == true).mean() == clustering_accuracy(true, pred)
        assert len(np.unique(renamed)) == len(np.unique(pred))  # one to one
        for label in np.unique(renamed):
            assert len(np.unique(pred[renamed == label])) == 1

    def test_names_do_not_matter(self):
        true = np.repeat([3, 7, 9], 5)
        assert clustering_accuracy(true, np.repeat([20, -4, 0], 5)) == 1
        assert clustering_scores(true, np.repeat([2, 0, 1], 5)) == {"acc": 1, "nmi": 1, "ari": 1}

    def test_more_clusters_than_classes(self):
        true, pred = np.zeros(6, int), np.array([0, 0, 0, 1, 1, 2])
        assert clustering_accuracy(true, pred) == 0.5
        assert match_clusters(true, pred)[:3].tolist() == [0, 0, 0]
        assert set(match_clusters(true, pred)[3:]).isdisjoint({0})

    def test_fewer_clusters_than_classes(self):
        assert clustering_accuracy([0, 1, 2, 3], [0, 0, 0, 0]) == 0.25

    def test_tensors_and_lists(self):
        true = torch.tensor([0, 0, 1, 1])
        assert clustering_accuracy(true, [1, 1, 0, 1]) == 0.75

    def test_scores_are_scikit_learns(self):
        from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

        rng = np.random.default_rng(0)
        true, pred = rng.integers(0, 4, (2, 50))
        scores = clustering_scores(true, pred)
        assert scores["nmi"] == normalized_mutual_info_score(true, pred)
        assert scores["ari"] == adjusted_rand_score(true, pred)

    @pytest.mark.parametrize("true, pred", [([0, 1], [0]), ([], []), ([0.5, 1], [0, 1]), ([[0, 1]], [[0, 1]])])
    def test_bad_labels(self, true, pred):
        with pytest.raises(ValueError, match="labels must be"):
            clustering_accuracy(true, pred)


class TestEffectiveRank:
    @pytest.mark.parametrize("rank", [1, 3, 8])
    def test_counts_equal_singular_values(self, rank):
        q = torch.linalg.qr(torch.randn(20, 8, dtype=torch.float64)).Q
        assert effective_rank(q[:, :rank]) == pytest.approx(rank)

    def test_of_two_values(self):
        p = 0.75
        z = torch.diag(torch.tensor([3.0, 1.0, 0.0]))
        assert effective_rank(z) == pytest.approx(math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p)))

    def test_scale_and_rotation_do_not_matter(self):
        z = torch.randn(30, 6, dtype=torch.float64)
        q = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q
        assert effective_rank(7 * z @ q) == pytest.approx(effective_rank(z))

    def test_zero_and_bad(self):
        assert effective_rank(torch.zeros(3, 2)) == 0
        with pytest.raises(ValueError, match="finite"):
            effective_rank(torch.tensor([[float("nan")]]))
        with pytest.raises(ValueError, match="n x d"):
            effective_rank(torch.ones(3))


class TestPrincipalAngles:
    def test_of_planes_with_a_known_angle(self):
        angle = math.radians(30)
        first = torch.tensor([[1.0, 0, 0, 0], [0, 1, 0, 0]])
        second = torch.tensor([[math.cos(angle), 0, math.sin(angle), 0], [0, 0, 0, 1]])
        mix = torch.randn(2, 9, 2, dtype=torch.float64)
        z = torch.cat([mix[0] @ first.double(), mix[1] @ second.double()])
        angles = principal_angles(z, [5] * 9 + [2] * 9, 2)
        assert angles.shape == (2, 2, 2)
        assert torch.allclose(angles[0, 1], torch.tensor([30.0, 90.0], dtype=torch.float64), atol=1e-5)
        assert torch.allclose(angles[0, 1], angles[1, 0])
        assert torch.allclose(angles[[0, 1], [0, 1]], torch.zeros(2, 2, dtype=torch.float64), atol=1e-5)

    @pytest.mark.parametrize("dim", [0, 3])
    def test_bad_dim(self, dim):
        with pytest.raises(ValueError, match=f"0 < dim <= 2.* got {dim}"):
            principal_angles(torch.randn(6, 4), [0, 0, 0, 0, 1, 1], dim)

    def test_bad_labels(self):
        with pytest.raises(ValueError, match="labels must be"):
            principal_angles(torch.randn(6, 4), [0, 1], 1)
