"""Subspace logits: values and gradients against the reference, the facts of Grassmann logits, and what is refused."""

import functools

import helpers
import pytest
import reference as ref
import torch
from hypothesis import given, settings, strategies
from kernels import MULTIPLIES_BF16, only_cpu

import torch_subspace as ts
import torch_subspace.grassmann.logits as module

OP = torch.ops.torch_subspace
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SHAPES = [  # B, C, k, n: tiny, padded, one class, many panels, several batch blocks, k = n, k > a panel's share
    (1, 1, 1, 1), (3, 5, 2, 7), (64, 100, 8, 128), (300, 70, 3, 50), (17, 3, 33, 70), (600, 200, 8, 33),
    (5, 2000, 1, 16), (9, 4, 12, 12), (2, 3, 64, 80), (257, 65, 8, 20),
]
close = functools.partial(helpers.close, floor=0.1)  # k = n: the truth is 0


def frames(c, k, n, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed + 1000 * c + 10 * k + n)
    return ref.orthonormal(torch.randn(c, k, n, dtype=torch.float64, generator=g)).to(dtype)


def features(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=g).to(dtype)


def both(x, w, dlogits, **options):
    """(values, dx, dweight) of ours in x's dtype and of the reference in float64 at the same points."""
    out = []
    for f, dtype in ((ts.subspace_logits, x.dtype), (ref.logits, torch.float64)):
        a, b = x.detach().to(dtype).requires_grad_(), w.detach().to(dtype).requires_grad_()
        y = f(a, b, **options)
        out.append((y.detach(), *torch.autograd.grad(y, (a, b), dlogits.to(dtype))))
    return out


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("keep", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("b, c, k, n", SHAPES)
def test_matches_the_reference(b, c, k, n, dtype, normalize, keep, monkeypatch):
    monkeypatch.setattr(module, "KEEP_PROJECTIONS", 1 << 40 if keep else -1)
    x, w, g = features(b, n, dtype=dtype), frames(c, k, n, dtype), features(b, c, seed=1)
    close(*both(x, w, g, normalize=normalize, gamma=7.0), TOLERANCE[dtype])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(b=strategies.integers(0, 40), dims=strategies.lists(strategies.integers(1, 9), min_size=1, max_size=40),
       extra=strategies.integers(0, 30), normalize=strategies.booleans(),
       dtype=strategies.sampled_from(list(TOLERANCE)))
def test_ragged_matches_the_reference_anywhere(b, dims, extra, normalize, dtype):
    n = max(dims) + extra
    w = torch.cat([frames(1, k, n, dtype, seed=i)[0] for i, k in enumerate(dims)])
    x, g = features(b, n, dtype=dtype), features(b, len(dims), seed=1)
    if b == 0:
        assert ts.subspace_logits(x, w, dims=dims).shape == (0, len(dims))
    else:
        close(*both(x, w, g, normalize=normalize, dims=dims), TOLERANCE[dtype])


def test_equal_dims_are_the_uniform_case():
    x, w = features(9, 20), frames(7, 3, 20)
    assert torch.equal(ts.subspace_logits(x, w), ts.subspace_logits(x, w.view(21, 20), dims=[3] * 7))


@only_cpu
@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 2e-3), (torch.bfloat16, 1.6e-2)], ids=str)
@pytest.mark.parametrize("b, c, k, n", [(70, 20, 4, 33), (300, 90, 8, 64), (3, 700, 1, 16)])
def test_half_types_are_computed_in_float32(b, c, k, n, dtype, tolerance):
    x, w, g = features(b, n, dtype=dtype), frames(c, k, n, dtype), features(b, c, seed=1).to(dtype)
    ours, truth = both(x, w, g)
    assert all(t.dtype == dtype for t in ours)
    close(ours, truth, tolerance)
    # no worse than rounding the truth: the sums themselves are float32
    rounded = [t.to(dtype).double() for t in truth]
    exact = 1 if dtype == torch.bfloat16 and MULTIPLIES_BF16 else 3  # gradients: test_logits_bfloat16.py
    for a, r, t in list(zip(ours, rounded, truth))[:exact]:
        assert (a.double() - t).abs().max() <= 1.01 * (r - t).abs().max() + 1e-5 * t.abs().max()


def test_half_conversion_is_exact_over_every_value():
    """Every float16 and bfloat16 there is survives widening and narrowing: k = n = 1, gamma = 1, W = 1 gives |x|."""
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(dtype)
        x = x[x.isfinite()].reshape(-1, 1)
        x = x[(x.abs() > 1e-18) & (x.abs() < 1e18) | (x == 0)].reshape(-1, 1)  # the square stays in float32's range
        one = torch.ones(1, 1, 1, dtype=dtype)
        assert torch.equal(ts.subspace_logits(x, one, gamma=1.0, normalize=False), x.abs())


@pytest.mark.parametrize("shape", [(20,), (2, 20), (2, 3, 20), (0, 20), (2, 0, 3, 20)])
def test_leading_dimensions(shape):
    x, w = features(*shape), frames(5, 3, 20)
    y = ts.subspace_logits(x, w)
    assert y.shape == (*shape[:-1], 5)
    assert torch.allclose(y, ref.logits(x, w), atol=1e-12)


def test_strided_inputs():
    w, x = frames(5, 3, 20), features(20, 9)
    dense = ts.subspace_logits(x.T.contiguous(), w)
    assert torch.equal(ts.subspace_logits(x.T, w), dense)
    assert torch.equal(ts.subspace_logits(x.T, w.mT.contiguous().mT), dense)
    assert torch.equal(ts.subspace_logits(x.T[:1].expand(9, 20), w), dense[:1].expand(9, 5))
    y = ts.subspace_logits(x.T.contiguous(), w.requires_grad_())
    y.sum().backward()  # a gradient of zero strides
    assert w.grad.isfinite().all()


# -------------------------------------------------------------------------------------------------------------- facts


def rotation(c, k):
    return torch.linalg.qr(features(c, k, k, seed=5))[0]


def test_a_rotation_of_the_frame_changes_nothing_and_turns_the_gradient():
    x, w, r, g = features(30, 40), frames(6, 5, 40), rotation(6, 5), features(30, 6, seed=1)
    (y, dx, dw), (y2, dx2, dw2) = both(x, w, g)[0], both(x, r @ w, g)[0]
    assert torch.allclose(y, y2, atol=1e-12) and torch.allclose(dx, dx2, atol=1e-12)
    assert torch.allclose(r @ dw, dw2, atol=1e-12)


def test_frame_times_gradient_is_symmetric():
    x, w = features(30, 40), frames(6, 5, 40)
    _, _, dw = both(x, w, features(30, 6, seed=1))[0]
    assert torch.allclose(w @ dw.mT, (w @ dw.mT).mT, atol=1e-12)


def test_frame_against_its_gradient_gives_the_logits_back():
    """The logits are homogeneous in W of degree one: <W_c, dL/dW_c> = sum_b g y."""
    x, w, g = features(30, 40), frames(6, 5, 40), features(30, 6, seed=1)
    y, _, dw = both(x, w, g)[0]
    assert torch.allclose((w * dw).sum((1, 2)), (g * y).sum(0), atol=1e-11)


def test_the_gradient_is_orthogonal_to_a_normalised_feature():
    x = features(30, 40)
    _, dx, _ = both(x, frames(6, 5, 40), features(30, 6, seed=1))[0]
    assert (dx * x).sum(-1).abs().max() < 1e-12


def test_one_dimension_is_the_cosine_and_all_dimensions_are_gamma():
    x = features(30, 12)
    cosine = torch.nn.functional.cosine_similarity(x[:, None], frames(6, 1, 12)[:, 0], dim=-1)
    assert torch.allclose(ts.subspace_logits(x, frames(6, 1, 12)), 25 * cosine.abs(), atol=1e-12)
    assert torch.allclose(ts.subspace_logits(x, frames(6, 12, 12)), torch.full((30, 6), 25.0).double(), atol=1e-12)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_logits_lie_between_zero_and_gamma(dtype):
    y = ts.subspace_logits(features(200, 40, dtype=dtype), frames(60, 8, 40, dtype))
    assert y.min() >= 0 and y.max() <= 25 * (1 + 1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1e10, 1e25])
def test_any_length_of_feature_is_the_same_direction(scale):
    x, w = features(5, 30, dtype=torch.float32), frames(4, 3, 30, torch.float32)
    length = (x * scale).double().norm(dim=-1, keepdim=True)
    expected = ts.subspace_logits(x, w) * (length / 1e-12).clamp(max=1).float()  # clamped there, as F.normalize does
    assert torch.allclose(ts.subspace_logits(x * scale, w), expected, rtol=1e-5)


def test_a_zero_projection_has_zero_gradient():
    w = torch.eye(6, dtype=torch.float64)[None, :2].clone().requires_grad_()
    for row in (torch.zeros(6), torch.eye(6)[4]):
        x = row.double()[None].clone().requires_grad_()
        y = ts.subspace_logits(x, w)
        dx, dw = torch.autograd.grad(y.sum(), (x, w))
        assert y.item() == 0 and not dx.any() and not dw.any()


def test_a_nan_row_stays_in_its_row():
    x = features(6, 20, dtype=torch.float32)
    x[2, 3] = float("nan")
    y = ts.subspace_logits(x, frames(5, 3, 20, torch.float32))
    assert y[2].isnan().all() and y[[0, 1, 3, 4, 5]].isfinite().all()


# ------------------------------------------------------------------------------------------------- torch's machinery


def test_gradcheck():
    x, w = features(4, 7).requires_grad_(), frames(3, 2, 7).requires_grad_()
    for normalize in (True, False):
        assert torch.autograd.gradcheck(lambda a, b, n=normalize: ts.subspace_logits(a, b, normalize=n), (x, w))
        assert torch.autograd.gradgradcheck(lambda a, b, n=normalize: ts.subspace_logits(a, b, normalize=n), (x, w))
    ragged = frames(1, 6, 7)[0].detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: ts.subspace_logits(a, b, dims=[1, 3, 2]), (x, ragged))
    assert torch.autograd.gradgradcheck(lambda a, b: ts.subspace_logits(a, b, dims=[1, 3, 2]), (x, ragged))


def test_only_the_gradients_that_are_asked_for():
    x, w = features(8, 20), frames(5, 3, 20)
    for need_x, need_w in ((True, False), (False, True)):
        a, b = x.clone().requires_grad_(need_x), w.clone().requires_grad_(need_w)
        ts.subspace_logits(a, b).square().sum().backward()
        assert (a.grad is not None, b.grad is not None) == (need_x, need_w)
    dx, dweight = OP.logits_backward(features(8, 5), x, w, module.starts(None, x.device), x.new_empty(0, 0), 25.0, True,
                                     False, True)
    assert dx.numel() == 0 and dweight.shape == w.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, w = features(6, 20, dtype=dtype), frames(5, 3, 20, dtype)
    none, start = module.starts(None, x.device), torch.tensor([0, 4, 15])
    y, proj = OP.logits(x, w, none, 25.0, True, True)
    torch.library.opcheck(OP.logits, (x.requires_grad_(), w.requires_grad_(), none, 25.0, True, True))
    torch.library.opcheck(OP.logits, (x, w.detach().view(15, 20), start, 25.0, False, False))
    torch.library.opcheck(OP.logits_backward, (y.detach(), x.detach(), w.detach(), none, proj, 25.0, True, True, True))
    torch.library.opcheck(OP.logits_backward, (y.detach(), x.detach(), w.detach(), none, proj, 25.0, True, False, True))


@pytest.mark.slow
def test_compile_without_graph_breaks():
    torch._dynamo.reset()
    w = frames(5, 3, 20, torch.float32).requires_grad_()

    def loss(x, w):
        return ts.subspace_logits(x.relu(), w).square().mean()

    compiled = torch.compile(loss, fullgraph=True)
    for b in (4, 6, 9):
        x = features(b, 20, dtype=torch.float32).requires_grad_()
        ours, eager = (torch.autograd.grad(f(x, w), (x, w)) for f in (compiled, loss))
        assert all(torch.allclose(a, e, atol=1e-5) for a, e in zip(ours, eager))


@pytest.mark.parametrize("dims", [3, (1, 2, 3, 4, 5)], ids=["uniform", "ragged"])
def test_an_exported_program_is_for_any_batch_and_runs_without_us(dims):
    layer = ts.GrassmannLinear(20, 5, dims)
    x = features(4, 20, dtype=torch.float32)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("b")},))
    assert "torch_subspace" not in program.graph_module.code
    x = x.repeat(3, 1)
    x[2, 3] = torch.nan
    for made in (program, program.run_decompositions()):
        assert torch.allclose(made.module()(x), layer(x), atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_what_it_is_for_a_linear_layer(dtype):
    x = features(8, 20, dtype=torch.float32).requires_grad_()
    w = frames(5, 3, 20, torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = ts.subspace_logits(x, w)
        assert ts.subspace_logits(x.double(), w.double()).dtype == torch.float64
    assert y.dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32
    assert torch.allclose(y.float(), ref.logits(x, w), atol=0.2)


def test_torch_func_and_forward_mode():
    """An outside op cannot take part in these; the plain formula steps in, so that no tangent is silently zero."""
    x, v, w = features(6, 20), features(6, 20, seed=3), frames(5, 3, 20)
    y, tangent = torch.func.jvp(lambda x: ts.subspace_logits(x, w), (x,), (v,))
    expected = torch.func.jvp(lambda x: ref.logits(x, w), (x,), (v,))
    assert torch.allclose(y, expected[0]) and torch.allclose(tangent, expected[1]) and tangent.any()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, v)
        assert torch.allclose(torch.autograd.forward_ad.unpack_dual(ts.subspace_logits(dual, w)).tangent, expected[1])
    assert torch.allclose(torch.func.grad(lambda w: ts.subspace_logits(x, w).sum())(w),
                          torch.func.grad(lambda w: ref.logits(x, w).sum())(w))
    t = torch.arange(6) % 5
    rows = torch.vmap(torch.func.grad(lambda w, x, t: ts.subspace_cross_entropy(x[None], w, t[None])),
                      (None, 0, 0))(w, x, t)
    leaf = w.clone().requires_grad_()
    ts.subspace_cross_entropy(x, leaf, t, reduction="sum").backward()
    assert torch.allclose(rows.sum(0), leaf.grad)


def test_meta():
    w = frames(5, 3, 20, torch.float32)
    assert ts.subspace_logits(torch.empty(4, 20, device="meta"), w.to("meta")).shape == (4, 5)


def test_repeatable_and_close_for_any_number_of_threads():
    x, w, g = features(300, 64, dtype=torch.float32), frames(70, 8, 64, torch.float32), features(300, 70).float()
    results = []
    for _ in helpers.threads(1, 2, 2, 3, 7):
        results.append(both(x, w, g)[0])
    assert helpers.same(results[1], results[2])
    for other in results[1:]:
        close(other, [t.double() for t in results[0]], TOLERANCE[torch.float32])


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("x, w, options, error, words", [
    (features(4, 7), frames(3, 2, 8), {}, ValueError, "7 features but weight has 8"),
    (features(4, 7), frames(3, 2, 7)[0], {}, ValueError, r"weight must be \(C, k, n\)"),
    (features(4, 7).float(), frames(3, 2, 7), {}, TypeError, "share a dtype"),
    (features(4, 7).long(), frames(3, 2, 7), {}, TypeError, "int64"),
    (features(4, 3), torch.randn(2, 5, 3).double(), {}, ValueError, "0 < k <= n, got k=5, n=3"),
    (features(4, 3), torch.randn(2, 0, 3).double(), {}, ValueError, "0 < k <= n, got k=0"),
    (features(4, 7)[0, 0], frames(3, 2, 7), {}, ValueError, "scalar"),
    (features(4, 7), frames(1, 6, 7)[0], {"dims": [3, 2]}, ValueError, "dims sum to 5 but weight has 6 rows"),
    (features(4, 7), frames(1, 6, 7)[0], {"dims": [8, -2]}, ValueError, r"dims\[0\]=8"),
    (features(4, 7), frames(3, 2, 7), {"dims": [2, 2, 2]}, ValueError, "with dims"),
    (features(4, 7), frames(3, 2, 7), {"gamma": float("nan")}, ValueError, "gamma"),
    ([1.0], frames(3, 2, 7), {}, TypeError, "x must be a tensor, got list"),
    (features(4, 7), frames(3, 2, 7).to("meta"), {}, ValueError, "one device"),
])
def test_bad_input_is_named(x, w, options, error, words):
    with pytest.raises(error, match=words) as caught:
        ts.subspace_logits(x, w, **options)
    assert "subspace_logits" in str(caught.value)


def test_the_op_itself_checks_too():
    """Whoever calls torch.ops directly gets an error, never a crash."""
    x, w, none = features(4, 7), frames(3, 2, 7), torch.empty(0, dtype=torch.int64)
    rows = w.view(6, 7)
    for bad in ((x[:, :3], w, none), (x.float(), w, none), (x, rows, none), (x, rows, torch.tensor([0, 9])),
                (x, rows, torch.tensor([0, 4, 2, 6])), (x[0], w, none), (x.long(), w.long(), none)):
        with pytest.raises(RuntimeError, match="logits: "):
            OP.logits(*bad, 25.0, True, False)
    with pytest.raises(RuntimeError, match="proj"):
        OP.logits_backward(features(4, 3), x, w, none, x.new_empty(2, 2), 25.0, True, True, True)


def test_no_classes_and_no_rows():
    w = torch.empty(0, 3, 7, dtype=torch.float64, requires_grad=True)
    x = features(4, 7).requires_grad_()
    y = ts.subspace_logits(x, w)
    assert y.shape == (4, 0)
    y.sum().backward()
    assert not x.grad.any()
    w, x = frames(3, 2, 7).requires_grad_(), features(0, 7).requires_grad_()
    ts.subspace_logits(x, w).sum().backward()
    assert not w.grad.any() and x.grad.shape == (0, 7)
