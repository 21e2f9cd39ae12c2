"""GrassmannLinear: the facts of arXiv 2308.01547, the ways to start it, its checkpoints and its errors."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torch_subspace import GrassmannLinear

DOUBLE = {"dtype": torch.float64}
RAGGED = (1, 3, 2, 4)


def rows(layer):
    """The frames, one (k, n) matrix a class."""
    return list(layer.weight.detach()) if layer.dims is None else list(layer.weight.detach().split(layer.dims))


def assert_frames(layer, tol=1e-6):
    for w in rows(layer):
        w = w.double()
        assert (w @ w.mT - torch.eye(len(w), dtype=w.dtype)).abs().max() <= tol


def contains(w, v, tol=1e-6):
    """Whether the span of the orthonormal rows of w holds v."""
    return (v - v @ w.mT @ w).norm() <= tol * v.norm()


class TestFacts:
    @given(n=st.integers(1, 12), num_classes=st.integers(1, 6), batch=st.integers(0, 5), data=st.data())
    @settings(max_examples=40, deadline=None)
    def test_logits_lie_between_zero_and_gamma(self, n, num_classes, batch, data):
        ks = st.integers(1, n)
        k = data.draw(st.one_of(ks, st.lists(ks, min_size=num_classes, max_size=num_classes)))
        layer = GrassmannLinear(n, num_classes, k, gamma=7.0, **DOUBLE)
        assert_frames(layer, 1e-12)
        y = layer(torch.randn(batch, n, **DOUBLE))
        assert y.shape == (batch, num_classes)
        assert ((y >= 0) & (y <= 7 * (1 + 1e-12))).all()

    @pytest.mark.parametrize("k", [3, RAGGED])
    def test_rotating_a_frame_leaves_the_logits(self, k):
        layer, x = GrassmannLinear(6, 4, k, **DOUBLE), torch.randn(5, 6, **DOUBLE)
        before = layer(x)
        turned = [torch.linalg.qr(torch.randn(len(w), len(w), **DOUBLE))[0] @ w for w in rows(layer)]
        with torch.no_grad():
            layer.weight.copy_(torch.cat(turned).view_as(layer.weight))
        torch.testing.assert_close(layer(x), before)

    def test_a_whole_space_gives_gamma(self):
        y = GrassmannLinear(5, 3, 5, gamma=2.0, **DOUBLE)(torch.randn(4, 5, **DOUBLE))
        torch.testing.assert_close(y, torch.full_like(y, 2.0))

    def test_one_direction_gives_the_cosine(self):
        layer, x = GrassmannLinear(5, 3, 1, gamma=2.0, **DOUBLE), torch.randn(4, 5, **DOUBLE)
        cos = torch.cosine_similarity(x[:, None], layer.weight[:, 0], dim=-1)
        torch.testing.assert_close(layer(x), 2 * cos.abs())

    def test_without_normalize_the_logits_grow_with_the_feature(self):
        layer, x = GrassmannLinear(5, 3, 2, normalize=False, **DOUBLE), torch.randn(4, 5, **DOUBLE)
        torch.testing.assert_close(layer(3 * x), 3 * layer(x))

    @pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6), (0, 6)])
    def test_takes_any_leading_dimensions(self, shape):
        assert GrassmannLinear(6, 4, 2)(torch.randn(shape)).shape == (*shape[:-1], 4)

    @pytest.mark.parametrize("k", [2, RAGGED])
    @pytest.mark.parametrize("soft", [False, True])
    def test_loss_is_the_cross_entropy_of_the_logits(self, k, soft):
        layer, x = GrassmannLinear(6, 4, k, **DOUBLE), torch.randn(5, 6, **DOUBLE)
        target = torch.rand(5, 4, **DOUBLE).softmax(-1) if soft else torch.tensor([0, 3, -100, 1, 2])
        want = nn.functional.cross_entropy(layer(x), target, label_smoothing=0.1)
        torch.testing.assert_close(layer.loss(x, target, label_smoothing=0.1), want)

    def test_loss_passes_its_options_on(self):
        layer, x, target = GrassmannLinear(6, 3, 2, **DOUBLE), torch.randn(4, 6, **DOUBLE), torch.tensor([0, 1, 2, 1])
        class_weight = torch.tensor([1.0, 2.0, 3.0], **DOUBLE)
        got = layer.loss(x, target, class_weight=class_weight, ignore_index=1, reduction="none")
        want = nn.functional.cross_entropy(layer(x), target, weight=class_weight, ignore_index=1, reduction="none")
        torch.testing.assert_close(got, want)

    @pytest.mark.parametrize("k", [2, RAGGED])
    def test_gradients_reach_the_frames_and_the_features(self, k):
        layer, x = GrassmannLinear(6, 4, k), torch.randn(5, 6, requires_grad=True)
        layer.loss(x, torch.tensor([0, 1, 2, 3, 0])).backward()
        assert layer.weight.grad.shape == layer.weight.shape
        assert layer.weight.grad.abs().sum() > 0 and x.grad.abs().sum() > 0


class TestFrames:
    def test_attributes(self):
        layer = GrassmannLinear(16, 5, 3, gamma=10, normalize=False)
        assert (layer.in_features, layer.num_classes, layer.out_features) == (16, 5, 5)
        assert (layer.subspace_dim, layer.dims, layer.gamma, layer.normalize) == (3, None, 10.0, False)
        assert layer.weight.shape == (5, 3, 16) and layer.weight.requires_grad
        assert repr(layer) == (
            "GrassmannLinear(in_features=16, num_classes=5, subspace_dim=3, gamma=10, normalize=False)"
        )

    def test_ragged_attributes(self):
        layer = GrassmannLinear(6, 4, list(RAGGED))
        assert layer.dims == layer.subspace_dim == RAGGED and layer.weight.shape == (10, 6)
        assert "subspace_dim=1..4" in repr(layer)

    def test_no_classes(self):
        assert GrassmannLinear(6, 0, 2)(torch.randn(3, 6)).shape == (3, 0)
        assert GrassmannLinear(6, 0, []).weight.shape == (0, 6)
        assert GrassmannLinear(6, 0, 2).frame_error() == 0

    def test_the_seed_decides(self):
        a, b = (torch.manual_seed(0) and GrassmannLinear(6, 4, 2) for _ in range(2))
        assert torch.equal(a.weight, b.weight)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
    def test_dtype(self, dtype):
        layer = GrassmannLinear(32, 3, 4, dtype=dtype)
        assert layer.weight.dtype == dtype
        assert layer.frame_error() < {2: 2e-2, 4: 3e-7, 8: 1e-14}[dtype.itemsize]

    @pytest.mark.parametrize("k", [2, RAGGED])
    def test_meta_device(self, k):
        layer = GrassmannLinear(6, 4, k, device="meta")
        layer.reset_parameters()
        layer = layer.to_empty(device="cpu")
        layer.reset_parameters()
        assert_frames(layer)

    @pytest.mark.parametrize("k", [3, RAGGED])
    def test_many_classes_are_taken_in_chunks(self, k, monkeypatch):
        x, y = torch.randn(30, 6), torch.arange(30) % 4
        whole = GrassmannLinear(6, 4, k).init_from_features(x, y)
        monkeypatch.setitem(GrassmannLinear._chunks.__globals__, "CHUNK", 1)
        chunked = GrassmannLinear(6, 4, k).init_from_features(x, y)
        torch.testing.assert_close(chunked(x), whole(x))
        assert_frames(GrassmannLinear(6, 4, k).orthonormalize_())

    @pytest.mark.parametrize("k", [3, RAGGED])
    def test_orthonormalize_is_the_nearest_frame(self, k):
        layer = GrassmannLinear(6, 4, k, **DOUBLE)
        with torch.no_grad():
            layer.weight.add_(torch.randn_like(layer.weight), alpha=0.3)
        want = [u @ vh for u, _, vh in (torch.linalg.svd(w, full_matrices=False) for w in rows(layer))]
        assert layer.frame_error() > 1e-3
        assert layer.orthonormalize_() is layer
        for w, near in zip(rows(layer), want, strict=True):
            torch.testing.assert_close(w, near)
        assert layer.frame_error() < 1e-14

    def test_orthonormalize_takes_dependent_and_tiny_rows(self):
        layer = GrassmannLinear(6, 4, 3)
        with torch.no_grad():
            layer.weight[0] = 0
            layer.weight[1, 1] = layer.weight[1, 0]
            layer.weight[2] *= 1e-30
            layer.weight[3] *= 1e30
        assert layer.orthonormalize_().frame_error() < 1e-6

    def test_orthonormalize_names_a_non_finite_class_and_changes_nothing(self):
        layer = GrassmannLinear(6, 4, 2)
        with torch.no_grad():
            layer.weight[0] *= 2
            layer.weight[2, 1, 3] = math.nan
        before = layer.weight.clone()
        with pytest.raises(ValueError, match=r"non-finite.*\[2\]"):
            layer.orthonormalize_()
        torch.testing.assert_close(layer.weight, before, equal_nan=True)
        assert layer.frame_error().isnan()

    def test_frame_error(self):
        layer = GrassmannLinear(6, 4, 2)
        with torch.no_grad():
            layer.weight[1] *= 2
        torch.testing.assert_close(float(layer.frame_error()), 3.0, rtol=1e-5, atol=0)


class TestFromLinear:
    def test_with_one_direction_classes_rank_by_the_cosine(self):
        linear, x = nn.Linear(6, 5, **DOUBLE), torch.randn(7, 6, **DOUBLE)
        cos = torch.cosine_similarity(x[:, None], linear.weight, dim=-1)
        layer = GrassmannLinear.from_linear(linear, 1)
        torch.testing.assert_close(layer(x), 25 * cos.abs())

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
        torch.testing.assert_close(layer(x)[torch.arange(len(y)), y], torch.full((len(y),), 25.0, **DOUBLE))

    def test_is_the_uncentred_pca(self):
        x, y = torch.randn(50, 8, **DOUBLE) + 1, torch.arange(50) % 3
        layer = GrassmannLinear(8, 3, 4, normalize=False, **DOUBLE).init_from_features(x, y)
        for c, w in enumerate(rows(layer)):
            truth = torch.linalg.svd(x[y == c], full_matrices=False)[2][:4]
            torch.testing.assert_close(w.mT @ w, truth.mT @ truth)

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


class TestErrors:
    @pytest.mark.parametrize(
        ("args", "options", "error", "match"),
        [
            ((8, 3, 0), {}, ValueError, "1 <= subspace_dim <= in_features = 8, got 0"),
            ((8, 3, 9), {}, ValueError, "got 9"),
            ((8, 3, -1), {}, ValueError, "got -1"),
            ((0, 3, 1), {}, ValueError, "in_features = 0"),
            ((8, 3, (1, 2)), {}, ValueError, "3 ints"),
            ((8, 3, (1, 2, 9)), {}, ValueError, "got 9"),
            ((8, 3, 2.0), {}, TypeError, "2.0"),
            ((8, 3, None), {}, TypeError, "None"),
            ((8, 3, "four"), {}, TypeError, "four"),
            ((8, 3, (1, 2, 3.0)), {}, TypeError, "ints"),
            ((8, -3, 2), {}, ValueError, "num_classes must be >= 0"),
            ((8.0, 3, 2), {}, TypeError, "in_features must be an int"),
            ((8, "3", 2), {}, TypeError, "num_classes must be an int"),
            ((8, 3, 2), {"gamma": 0}, ValueError, "gamma"),
            ((8, 3, 2), {"gamma": math.nan}, ValueError, "gamma"),
            ((8, 3, 2), {"gamma": math.inf}, ValueError, "gamma"),
            ((8, 3, 2), {"dtype": torch.int64}, TypeError, "floating-point"),
        ],
    )
    def test_construction(self, args, options, error, match):
        with pytest.raises(error, match=match) as caught:
            GrassmannLinear(*args, **options)
        assert "GrassmannLinear" in str(caught.value)

    def test_a_feature_of_another_length(self):
        with pytest.raises(ValueError):
            GrassmannLinear(8, 3, 2)(torch.randn(4, 7))


class TestCheckpoints:
    @pytest.mark.parametrize("k", [2, RAGGED])
    @pytest.mark.parametrize("key", ["weight", "fc.weight"])
    def test_loads_the_papers_layout(self, k, key):
        source, layer = GrassmannLinear(6, 4, k), GrassmannLinear(6, 4, k)
        state = {key: source.weight.detach().reshape(-1, 6)}
        layer.load_state_dict(state)
        assert torch.equal(layer.weight, source.weight)
        assert list(state) == [key]

    def test_loads_inside_a_model(self):
        model = nn.Sequential(nn.Linear(6, 6), nn.ModuleDict({"head": GrassmannLinear(6, 4, 2)}))
        weight = GrassmannLinear(6, 4, 2).weight.detach()
        state = {**nn.Sequential(nn.Linear(6, 6)).state_dict(), "1.head.fc.weight": weight.flatten(0, 1)}
        model.load_state_dict(state)
        assert torch.equal(model[1]["head"].weight, weight)
        model.load_state_dict(state, assign=True)
        assert model[1]["head"].weight.shape == (4, 2, 6)

    def test_load_gcr_takes_a_whole_checkpoint(self):
        weight = GrassmannLinear(6, 4, 2).weight.detach()
        state = {"backbone.conv1.weight": torch.ones(3, 3), "backbone.se.fc.weight": torch.ones(2, 2)}
        checkpoint = {"meta": {}, "state_dict": {**state, "head.fc.weight": weight.flatten(0, 1)}}
        for given_dict in (checkpoint, checkpoint["state_dict"], {"fc.weight": weight.flatten(0, 1)}):
            layer = GrassmannLinear(6, 4, 2)
            assert layer.load_gcr(given_dict) is layer
            assert torch.equal(layer.weight, weight)
        with pytest.raises(ValueError, match="head.fc.weight"):
            GrassmannLinear(6, 4, 2).load_gcr({"state_dict": {"a.weight": weight}})
        with pytest.raises(RuntimeError, match="size mismatch"):
            GrassmannLinear(6, 4, 3).load_gcr(checkpoint)

    @pytest.mark.parametrize("shape", [(4, 3, 6), (12, 6), (8, 5), (2, 4, 6)])
    def test_other_shapes_are_torchs_size_mismatch(self, shape):
        with pytest.raises(RuntimeError, match="size mismatch for weight"):
            GrassmannLinear(6, 4, 2).load_state_dict({"weight": torch.ones(shape)})

    def test_a_missing_or_strange_key_is_reported(self):
        with pytest.raises(RuntimeError, match="Missing"):
            GrassmannLinear(6, 4, 2).load_state_dict({})
        layer = GrassmannLinear(6, 4, 2)
        with pytest.raises(RuntimeError, match="Unexpected"):
            layer.load_state_dict({**layer.state_dict(), "fc.bias": torch.ones(4)})

    @pytest.mark.parametrize("k", [2, RAGGED])
    def test_copies_are_equal(self, k):
        layer, file = GrassmannLinear(6, 4, k, gamma=3.0, normalize=False), io.BytesIO()
        torch.save(layer.state_dict(), file)
        loaded = GrassmannLinear(6, 4, k, gamma=3.0, normalize=False)
        loaded.load_state_dict(torch.load(io.BytesIO(file.getvalue())))
        x = torch.randn(5, 6)
        for other in (loaded, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert repr(other) == repr(layer) and other.dims == layer.dims
            assert torch.equal(other(x), layer(x))


class TestPrecision:
    @pytest.mark.parametrize("convert", ["half", "bfloat16"])
    def test_converting_a_model_leaves_the_frames_in_float32(self, convert):
        model = nn.Sequential(nn.Linear(6, 6), GrassmannLinear(6, 4, 2))
        before = model[1].weight.clone()
        getattr(model, convert)()
        assert model[0].weight.dtype.itemsize == 2
        assert torch.equal(model[1].weight, before)
        y = model(torch.randn(3, 6, dtype=model[0].weight.dtype))
        assert y.dtype == model[0].weight.dtype
        y.sum().backward()
        assert model[1].weight.grad.dtype == torch.float32
        assert model.double()[1].weight.dtype == torch.float64
        assert getattr(model, convert)()[1].weight.dtype == torch.float32

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_a_half_batch_meets_float32_frames(self, dtype):
        layer, x = GrassmannLinear(32, 4, 8), torch.randn(5, 32)
        y = layer(x.to(dtype))
        assert y.dtype == dtype
        torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=2e-2)
        loss = layer.loss(x.to(dtype), torch.tensor([0, 1, 2, 3, 0]))
        torch.testing.assert_close(loss.float(), layer.loss(x, torch.tensor([0, 1, 2, 3, 0])), rtol=3e-2, atol=3e-2)

    def test_autocast(self):
        layer, x = GrassmannLinear(32, 4, 8), torch.randn(5, 32)
        with torch.autocast("cpu", torch.bfloat16):
            y, loss = layer(x), layer.loss(x.bfloat16(), torch.tensor([0, 1, 2, 3, 0]))
        torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=2e-2)
        loss.backward()
        assert layer.weight.grad.dtype == torch.float32

    @pytest.mark.parametrize("k", [2, RAGGED])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_compiles_to_one_graph(self, k, dtype):
        layer, x = GrassmannLinear(6, 4, k), torch.randn(5, 6, dtype=dtype)
        target = torch.tensor([0, 1, 2, 3, 0])
        forward = torch.compile(layer, fullgraph=True, backend="aot_eager")
        loss = torch.compile(layer.loss, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(forward(x), layer(x))
        torch.testing.assert_close(loss(x, target), layer.loss(x, target))
        loss(x, target).backward()
        assert layer.weight.grad is not None
