"""GrassmannLinear: the ways to start it, from a linear layer and from features."""

import math
import warnings

import pytest
import torch
from helpers import frame_error, normal
from layers_cases import DOUBLE, assert_frames, rows
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch_subspace import GrassmannLinear, swap_head
from torch_subspace.grassmann.initial import drawn_frames, principal_directions


def contains(w, v, tol=1e-6):
    """Whether the span of the orthonormal rows of w holds v."""
    return (v - v @ w.mT @ w).norm() <= tol * v.norm()


class TestDraw:
    @pytest.mark.parametrize("k", [1, 3, 5, 6, (1, 2, 5, 6, 6) * 40])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    def test_subspaces_are_uniform_in_any_dimension(self, k, dtype):
        """The mean of their projectors is k/n on the diagonal; frames are exact where k is near n too."""
        torch.manual_seed(0)
        layer = GrassmannLinear(6, 200 if isinstance(k, tuple) else 4000, k, dtype=dtype)
        assert_frames(layer, 4e-7 if dtype == torch.float32 else 1e-14)
        if not isinstance(k, tuple):
            mean = torch.einsum("ckn,ckm->nm", layer.weight, layer.weight).double() / 4000
            torch.testing.assert_close(mean, torch.eye(6).double() * k / 6, rtol=0, atol=0.03)
            signs = layer.weight.double().mean((0, 1))
            assert signs.abs().max() < 0.04  # bases lean nowhere

    def test_precision_is_that_of_the_frames_under_autocast(self):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert_frames(GrassmannLinear(64, 10, 4))
            assert_frames(GrassmannLinear.from_linear(nn.Linear(64, 10), 4))

    def test_products_of_low_precision_are_noticed(self, monkeypatch):
        product = torch.Tensor.__matmul__
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: product(a, b).bfloat16().to(a.dtype)
                            if a.dtype == torch.float32 else product(a, b))
        layers = [GrassmannLinear(64, 10, 4), GrassmannLinear.from_linear(nn.Linear(64, 10), 4)]
        monkeypatch.undo()
        for layer in layers:
            assert_frames(layer)

    def test_costs_a_few_times_the_numbers_alone(self):
        """In entries that are written; and not class by class."""
        for make in (lambda: GrassmannLinear(768, 1000, 8),
                     lambda: swap_head(nn.Sequential(nn.ReLU(), nn.Linear(768, 1000)))):
            with Written() as written:
                make()
            assert 1000 * 8 * 768 < written.entries < 6 * 1000 * 8 * 768 and written.calls < 1000


class Written(TorchDispatchMode):
    """Counts torch's ops, and the entries that they write."""

    calls = entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info and not r.alias_info.is_write for r in func._schema.returns)
        self.calls += 1
        self.entries += 0 if is_view else sum(t.numel() for t in tree_leaves(found) if isinstance(t, torch.Tensor))
        return found


class TestFromLinear:
    def test_with_one_direction_classes_rank_by_the_cosine(self):
        linear, x = nn.Linear(6, 5, **DOUBLE), torch.randn(7, 6, **DOUBLE)
        cos = torch.cosine_similarity(x[:, None], linear.weight, dim=-1)
        layer = GrassmannLinear.from_linear(linear, 1)
        torch.testing.assert_close(layer(x), layer.gamma * cos.abs())

    @pytest.mark.parametrize("k", [1, 3, 6, (1, 2, 3, 6, 6)])
    def test_the_class_vector_comes_first(self, k):
        linear = nn.Linear(6, 5)
        layer = GrassmannLinear.from_linear(linear, k, gamma=3.0, normalize=False)
        assert_frames(layer)
        assert (layer.gamma, layer.normalize) == (3.0, False)
        for w, v in zip(rows(layer), linear.weight.detach(), strict=True):
            torch.testing.assert_close(w[0], v / v.norm())

    def test_a_zero_class_vector_is_replaced(self):
        linear = nn.Linear(6, 5)
        nn.init.zeros_(linear.weight[1:3])
        assert_frames(GrassmannLinear.from_linear(linear, 3))

    def test_a_tiny_class_vector_keeps_its_direction(self):
        linear = nn.Linear(6, 5, dtype=torch.float64)
        with torch.no_grad():
            linear.weight *= 1e-200
        layer = GrassmannLinear.from_linear(linear, 2)
        torch.testing.assert_close(layer.weight[:, 0], nn.functional.normalize(linear.weight * 1e200, dim=-1))

    def test_generator(self):
        linear = nn.Linear(6, 5)
        a, b = (GrassmannLinear.from_linear(linear, 3, generator=torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(a.weight, b.weight)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_keeps_dtype_but_for_half(self, dtype):
        layer = GrassmannLinear.from_linear(nn.Linear(6, 5, dtype=dtype).eval(), 3)
        assert layer.weight.dtype == (dtype if dtype.itemsize > 2 else torch.float32)
        assert not layer.training
        assert_frames(layer)

    def test_meta(self):
        assert GrassmannLinear.from_linear(nn.Linear(6, 5, device="meta"), 3).weight.is_meta

    def test_errors(self):
        with pytest.raises(ValueError, match="<= in_features = 6, got 7"):
            GrassmannLinear.from_linear(nn.Linear(6, 5), 7)
        with pytest.raises(TypeError, match="from_linear"):
            GrassmannLinear.from_linear(nn.Conv2d(6, 5, 1), 2)
        linear = nn.Linear(6, 5)
        nn.init.constant_(linear.weight[0], math.inf)
        with pytest.raises(ValueError, match="non-finite"):
            GrassmannLinear.from_linear(linear, 2)

    def test_init_from_vectors_keeps_given_frames(self):
        given_frames = GrassmannLinear(6, 4, 2).weight.detach()
        wider = GrassmannLinear(6, 4, 3).init_from_vectors(given_frames)
        torch.testing.assert_close(wider.weight.detach()[:, :2], given_frames)
        assert_frames(wider)
        narrower = GrassmannLinear(6, 4, 1).init_from_vectors(given_frames)
        torch.testing.assert_close(narrower.weight.detach(), given_frames[:, :1])
        with pytest.raises(ValueError, match=r"\(4, j, 6\)"):
            wider.init_from_vectors(given_frames[:2])


class TestInitFromFeatures:
    def clusters(self, k=2, each=9, num_classes=3, n=8):
        """Features that lie in k-dimensional subspaces, their labels shuffled, and the subspaces."""
        frames = rows(GrassmannLinear(n, num_classes, k, **DOUBLE))
        x = torch.cat([torch.randn(each, k, **DOUBLE) @ w for w in frames])
        y = torch.arange(num_classes).repeat_interleave(each)
        order = torch.randperm(len(y))
        return x[order], y[order], frames

    @pytest.mark.parametrize("each", [4, 20])  # fewer and more samples than features: both sides of the Gram matrix
    def test_finds_the_subspaces(self, each):
        x, y, frames = self.clusters(each=each)
        layer = GrassmannLinear(8, 3, 2, **DOUBLE)
        assert layer.init_from_features(x, y) is layer
        for w, truth in zip(rows(layer), frames, strict=True):
            assert contains(w, truth, 1e-12)
        torch.testing.assert_close(layer(x)[torch.arange(len(y)), y], torch.full((len(y),), layer.gamma, **DOUBLE))

    def test_is_the_uncentred_pca(self):
        x, y = torch.randn(50, 8, **DOUBLE) + 1, torch.arange(50) % 3
        layer = GrassmannLinear(8, 3, 4, normalize=False, **DOUBLE).init_from_features(x, y)
        for c, w in enumerate(rows(layer)):
            truth = torch.linalg.svd(x[y == c], full_matrices=False)[2][:4]
            torch.testing.assert_close(w.mT @ w, truth.mT @ truth)

    def test_short_directions_beside_a_long_one(self):
        x, y, frames = self.clusters(num_classes=2, each=20)
        x = x + 1e9 * nn.functional.normalize(torch.ones(8, **DOUBLE), dim=0)
        layer = GrassmannLinear(8, 2, 3, normalize=False, **DOUBLE).init_from_features(x, y)
        for c, w in enumerate(rows(layer)):
            assert contains(w, frames[c], 1e-5)

    def test_normalized_features_count_alike(self):
        x, y, _ = self.clusters()
        x = x + 0.1 * torch.randn_like(x)
        a = GrassmannLinear(8, 3, 2, **DOUBLE).init_from_features(x, y)
        b = GrassmannLinear(8, 3, 2, **DOUBLE).init_from_features(x * torch.rand(len(x), 1, **DOUBLE).add(0.1), y)
        for w, v in zip(rows(a), rows(b), strict=True):
            torch.testing.assert_close(w.mT @ w, v.mT @ v)

    @pytest.mark.parametrize("k", [4, (4, 1, 8, 2)])
    def test_completes_classes_with_too_few_samples(self, k):
        x = torch.randn(6, 8)
        x[5] = x[4]  # class 2 has two equal samples, class 3 none
        y = torch.tensor([0, 0, 0, 1, 2, 2])
        layer = GrassmannLinear(8, 4, k).init_from_features(x, y)
        assert_frames(layer)
        for c in range(3):
            dim = len(rows(layer)[c])
            if dim >= (y == c).sum():
                assert contains(rows(layer)[c], x[y == c], 1e-5)

    def test_half_features_and_no_features(self):
        x, y, _ = self.clusters()
        assert_frames(GrassmannLinear(8, 3, 2).init_from_features(x.bfloat16(), y))
        assert_frames(GrassmannLinear(8, 3, 2).init_from_features(torch.zeros(4, 8), torch.zeros(4, dtype=torch.int64)))
        assert_frames(GrassmannLinear(8, 3, 2).init_from_features(x[:0], y[:0]))

    def test_classifies_digits_without_training(self):
        datasets = pytest.importorskip("sklearn.datasets", reason="scikit-learn's digits are not installed")
        x, y = (torch.from_numpy(a) for a in datasets.load_digits(return_X_y=True))
        layer = GrassmannLinear(64, 10, 4, **DOUBLE).init_from_features(x[:1200], y[:1200].long())
        assert (layer(x[1200:]).argmax(-1) == y[1200:]).double().mean() > 0.9

    @pytest.mark.parametrize(
        ("x", "y", "error", "match"),
        [
            (torch.ones(4, 7), torch.zeros(4).long(), ValueError, "need x"),
            (torch.ones(4, 8), torch.zeros(3).long(), ValueError, "need x"),
            (torch.ones(8), torch.zeros(8).long(), ValueError, "need x"),
            (torch.ones(4, 8), torch.full((4,), 3), ValueError, "labels 3 to 3"),
            (torch.ones(4, 8), torch.full((4,), -1), ValueError, "labels -1 to -1"),
            (torch.full((4, 8), math.nan), torch.zeros(4).long(), ValueError, "not finite"),
            (torch.ones(4, 8), torch.zeros(4), TypeError, "int64"),
            (torch.ones(4, 8).long(), torch.zeros(4).long(), TypeError, "floating"),
        ],
    )
    def test_errors_change_nothing(self, x, y, error, match):
        layer = GrassmannLinear(8, 3, 2)
        before = layer.weight.clone()
        with pytest.raises(error, match=match):
            layer.init_from_features(x, y)
        assert torch.equal(layer.weight, before)


class TestByHeart:
    """A class that starts from few features knows them."""

    def start(self, each, k, layer=None, classes=3):
        layer = layer or GrassmannLinear(40, classes, k)
        y = torch.arange(classes).repeat_interleave(each if isinstance(each, int) else torch.tensor(each))
        return layer.init_from_features(torch.randn(len(y), 40), y)

    @pytest.mark.parametrize("each, k, count", [(8, 2, 8), (1, 2, 1), ((8, 9, 5), 2, 5), ((0, 3, 0), 2, 3),
                                                (7, (1, 2, 2), 7)])
    def test_few_features_are_told_of(self, each, k, count):
        with pytest.warns(UserWarning, match=f"init_from_features: .*the median has {count} for k = 2") as caught:
            self.start(each, k)
        assert len(caught) == 1 and caught[0].filename == __file__

    @pytest.mark.parametrize("each, k", [(9, 2), ((8, 9, 9), 2), (9, (3, 2, 2)), ((0, 9, 0), 2), (0, 2)])
    def test_enough_are_not(self, each, k):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            self.start(each, k)

    def test_a_swapped_head_says_it_too(self):
        model = nn.Sequential(nn.ReLU(), nn.Linear(40, 3))
        with pytest.warns(UserWarning, match="or start at random"):
            swap_head(model, init=(torch.randn(9, 40), torch.arange(9) % 3))

    def test_of_few_features_little_is_left_to_learn(self):
        """What the warning says: own features lie in the subspaces, others of the same kind do not."""
        torch.manual_seed(0)
        y, own, others = torch.arange(60) % 3, torch.randn(60, 40), torch.randn(600, 40)
        few = GrassmannLinear(40, 3, 8, gamma=25.0)
        with pytest.warns(UserWarning, match="know these by heart"):
            few.init_from_features(own, y)
        assert few.loss(own, y) < 0.1 < 1 < few.loss(others, torch.arange(600) % 3)


@pytest.mark.parametrize("given", [0, 1])
@pytest.mark.parametrize("k, n", [(8, 768), (4, 8), (8, 8), (1, 5), (16, 20)])
def test_random_frames_are_orthonormal_however_near_k_is_to_n(k, n, given):
    """In one pass, in two, or by QR; rows that are given come first, as they are."""
    first = torch.nn.functional.normalize(torch.randn(50, 1, n), dim=-1) if given else None
    frames = drawn_frames((50, k, n), first, None, torch.device("cpu"), torch.float32, torch.float64)
    wide = frames.double()
    assert (wide @ wide.mT - torch.eye(k)).abs().max() < 2e-6
    assert first is None or (frames[:, :1] - first).abs().max() < 1e-6


@pytest.mark.parametrize("dtype, powers", [(torch.float32, 5), (torch.float64, 12)], ids=str)
@pytest.mark.parametrize("m, n", [(40, 12), (12, 40), (2000, 256)])
def test_principal_directions_are_as_exact_as_points(m, n, dtype, powers):
    """Of lengths down to the dtype's own rounding, where a Gram matrix ends at its root; and no more than there are."""
    eps = torch.finfo(dtype).eps
    for seed in range(3):
        left, right = (torch.linalg.qr(normal(size, 6, seed=seed + size)).Q for size in (m, n))
        length = 10 ** -torch.linspace(0, powers, 6, dtype=torch.float64)
        x = (left * length @ right.mT).to(dtype)
        found = principal_directions(x, 6)
        v, wide = found.double(), x.double()
        assert found.shape == (6, n) and frame_error(found) < 16 * eps
        assert (wide - wide @ v.mT @ v).norm() < 20 * eps
        assert ((v * right.mT).sum(1).abs() > 1 - 1e-4).all()  # the largest first
        assert len(principal_directions(x, 8)) == 6


FLOAT, WIDE = torch.float32, torch.float64


@pytest.mark.parametrize("dtype, m, n, lengths", [
    (WIDE, 6, 4, (1, 0.1, 4e-8)), (WIDE, 4, 6, (1, 0.1, 4e-8)), (WIDE, 50, 8, (1, 0.1, 2e-7)),
    (WIDE, 50, 64, (1, 0.1, 2e-7)), (WIDE, 4, 4, (1, 3.2e-6, 3.7e-7, 2e-13)),
    (WIDE, 40, 12, (1, 0.2, 6e-3, 2.7e-7, 2.1e-7, 6.8e-9, 1.5e-9, 1.1e-9, 2.5e-12)),
    (WIDE, 20, 8, (1, 0.3, 0.05, 0.02)), (WIDE, 8, 20, (1, 0.3, 0.05, 0.02)),
    (FLOAT, 50, 4, (1, 3e-3)), (FLOAT, 4, 50, (1, 3e-3)), (FLOAT, 200, 16, (1, 6e-3)), (FLOAT, 6, 4, (1, 0.1, 4e-5)),
    (FLOAT, 50, 8, (1, 0.1, 3e-4, 1e-4)), (FLOAT, 20, 8, (1, 0.3, 0.05, 0.02)), (FLOAT, 8, 20, (1, 0.3, 0.05, 0.02)),
])
def test_no_long_direction_is_tilted_by_short_ones(dtype, m, n, lengths):
    """Each row, and the first rows' span, is right to rounding of the longest over a gap: what no method betters."""
    eps, rank = torch.finfo(dtype).eps, len(lengths)
    length = torch.tensor(lengths, dtype=WIDE)
    below = length - torch.cat([length[1:], length.new_zeros(1)])  # the gaps of spans
    gap = torch.minimum(below, torch.cat([below.new_ones(1), below[:-1]]))
    for seed in range(20):
        left, right = (torch.linalg.qr(normal(size, rank, seed=seed + 100 * size)).Q for size in (m, n))
        x = (left * length @ right.mT).to(dtype)
        for k in range(1, rank + 1):
            found = principal_directions(x, k).double()
            assert found.shape == (k, n) and frame_error(found) < 16 * eps
            cosines = (found @ right[:, :k]).diagonal()[:, None]
            assert ((found - cosines * right[:, :k].mT).norm(dim=1) < 16 * eps / gap[:k]).all()
            assert (right[:, :k].mT - right[:, :k].mT @ found.mT @ found).norm() < 16 * eps / below[k - 1]
            assert ((x.double() @ found.mT).norm(dim=0) - length[:k]).abs().max() < 16 * eps  # so in order


@pytest.mark.parametrize("dtype", [FLOAT, WIDE], ids=str)
@pytest.mark.parametrize("m, n, rank, seeds", [
    (3, 3, 1, 40), (3, 3, 2, 40), (4, 4, 2, 40), (4, 4, 3, 40), (5, 3, 2, 40), (2, 9, 1, 40), (40, 12, 5, 20),
    (12, 40, 5, 20), (400, 60, 20, 2)])
def test_rounding_is_no_direction(dtype, m, n, rank, seeds):
    for seed in range(seeds):
        a, b = normal(m, rank, seed=seed).to(dtype), normal(rank, n, seed=1000 + seed).to(dtype)
        product = a @ b
        for x in (product, torch.cat([product, product.sum(0, keepdim=True)]), nn.functional.normalize(product)):
            assert len(principal_directions(x, min(m, n))) == rank
