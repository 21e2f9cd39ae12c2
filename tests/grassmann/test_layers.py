"""GrassmannLinear: the facts of arXiv 2308.01547, its frames, its checkpoints and its errors."""

import copy
import io
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers_cases import DOUBLE, assert_frames, rows
from torch import nn

from torch_subspace import GrassmannLinear

RAGGED = (1, 3, 2, 4)


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

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_layerwise_casting_leaves_the_frames_alone(self, dtype):
        for kept in (torch.float32, torch.bfloat16):
            model = nn.Sequential(nn.Linear(6, 6), GrassmannLinear(6, 4, 2, dtype=kept))
            before = model[1].weight.clone()
            model.to(dtype)
            assert model[0].weight.dtype == dtype and torch.equal(model[1].weight, before)
            assert model[1].weight.dtype == kept

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
