"""The coding rate of soft memberships: values and gradients against the reference, algebra, precision, errors."""

import itertools

import pytest
import reference as ref
import torch
from helpers import close, same, threads
from hypothesis import given, settings, strategies
from kernels import only_cpu

import torch_subspace.rates.coding_rate_soft as module
from torch_subspace.rates.coding_rate_soft import soft_rate

OP = torch.ops.torch_subspace
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SHAPES = [  # views, n, d, K: one of everything, class by class, face-split, n < d, odd sizes, tiles of one row
    (1, 1, 1, 1), (2, 30, 7, 3), (1, 40, 5, 33), (3, 60, 33, 40), (1, 100, 64, 100), (1, 300, 130, 5), (1, 9, 30, 40),
    (2, 1, 6, 2), (1, 530, 48, 37), (1, 90, 17, 1), (1, 600, 6, 64), (1, 70, 70, 50),
]


def problem(v, n, d, k, dtype=torch.float64, length=1.0, seed=0):
    """Rows of unit length (times `length`) around a few directions, and weights of which one column is empty."""
    g = torch.Generator().manual_seed(seed + v + 3 * n + 5 * d + 7 * k)
    z = torch.nn.functional.normalize(torch.randn(v, n, d, dtype=torch.float64, generator=g), dim=-1) * length
    weights = torch.rand(v, n, k, dtype=torch.float64, generator=g) ** 3
    if k > 2:
        weights[:, :, 1] = 0
    return z.to(dtype), weights.to(dtype)


def of(f, z, weights, dtype, eps=0.5):
    """Rate, dz and dweights."""
    drate = torch.linspace(0.5, 1.5, z.shape[0], dtype=torch.float64)
    leaves = [t.detach().to(dtype).requires_grad_() for t in (z, weights)]
    rate = f(*leaves, eps)
    return rate.detach(), *torch.autograd.grad(rate, leaves, drate.to(dtype))


def both(z, weights, eps=0.5):
    """Those of ours and of the reference in float64 at the same points."""
    return of(soft_rate, z, weights, z.dtype, eps), of(ref.coding_rate_soft, z, weights, torch.float64, eps)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, dtype):
    z, weights = problem(*shape, dtype)
    ours, truth = both(z, weights)
    assert all(t.dtype == dtype for t in ours)
    close(ours, truth, TOLERANCE[dtype])
    close([soft_rate(z, weights, 0.5)], truth[:1], TOLERANCE[dtype])  # without gradients, and so without inverses


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_inverses_that_are_not_kept_are_made_again(monkeypatch, shape, dtype):
    z, weights = problem(*shape, dtype)
    monkeypatch.setattr(module, "KEEP_INVERSES", 0)
    close(*both(z, weights), TOLERANCE[dtype])


@settings(max_examples=80, deadline=None, derandomize=True)
@given(v=strategies.integers(1, 3), n=strategies.integers(1, 70), d=strategies.integers(1, 40),
       k=strategies.integers(1, 70), eps=strategies.floats(0.05, 2), dtype=strategies.sampled_from(list(TOLERANCE)))
def test_matches_the_reference_anywhere(v, n, d, k, eps, dtype):
    close(*both(*problem(v, n, d, k, dtype), eps), TOLERANCE[dtype])


def test_weights_of_any_scale():
    z, weights = problem(1, 50, 9, 40)
    weights = weights * torch.logspace(-9, 9, 40, dtype=torch.float64)
    close(*both(z, weights), 1e-12)
    ours, truth = both(z.float(), weights.float())
    close(ours[:2], truth[:2], 1e-5)


def test_weights_so_small_that_float32_would_lose_them():
    z, weights = problem(1, 50, 9, 5, torch.float32)
    weights[..., 3] *= 1e-30
    ours, truth = both(z, weights)
    close(ours, truth, 1e-5)
    assert ((ours[2][..., 3] - truth[2][..., 3]).abs() <= 1e-5 * truth[2][..., 3].abs().max()).all()


def test_nothing_to_sum():
    for shape in ((0, 5, 3, 4), (2, 5, 3, 0), (2, 5, 3, 4), (2, 5, 3, 40)):
        z, weights = (t.requires_grad_() for t in problem(*shape))
        rate = soft_rate(z, 0 * weights, 0.5)
        grads = torch.autograd.grad(rate.sum(), (z, weights))
        assert rate.shape == shape[:1] and not rate.any()
        assert all(g.shape == t.shape and not g.any() for g, t in zip(grads, (z, weights)))
    z, weights = problem(1, 30, 4, 40, torch.float32)
    rate, dz, dweights = both(torch.zeros_like(z), weights)[0]
    assert not rate.any() and not dz.any() and not dweights.any()


def test_only_the_gradients_asked_for():
    for shape in ((1, 40, 8, 5), (1, 40, 8, 50)):
        z, weights = problem(*shape)
        whole = of(soft_rate, z, weights, z.dtype)
        z.requires_grad_()
        assert torch.equal(torch.autograd.grad(soft_rate(z, weights, 0.5).sum() * 0.5, z)[0], whole[1])
        weights.requires_grad_()
        assert torch.equal(torch.autograd.grad(soft_rate(z.detach(), weights, 0.5).sum() * 0.5, weights)[0], whole[2])


def test_strided_inputs():
    z, weights = problem(2, 40, 8, 50)
    rate = soft_rate(z, weights, 0.5)
    assert torch.equal(soft_rate(z.mT.contiguous().mT, weights.mT.contiguous().mT, 0.5), rate)
    assert torch.equal(soft_rate(z[:1].expand(2, 40, 8), weights[:1].expand(2, 40, 50), 0.5), rate[[0, 0]])


# ------------------------------------------------------------------------------------------------------------ algebra



@pytest.mark.parametrize("shape", [(1, 50, 9, 4), (1, 50, 9, 40), (1, 8, 20, 35)], ids=str)
def test_homogeneous_in_the_weights(shape):
    """Rc(a W) = a Rc(W), and so <W, dRc/dW> = Rc."""
    z, weights = problem(*shape)
    weights.requires_grad_()
    rate = soft_rate(z, weights, 0.5)
    (dweights,) = torch.autograd.grad(rate, weights)
    assert torch.allclose((weights * dweights).sum(), rate, rtol=1e-12)
    assert torch.allclose(soft_rate(z, 3 * weights, 0.5), 3 * rate, rtol=1e-12)


@pytest.mark.parametrize("n, d, classes", [(60, 9, 4), (60, 20, 40)])
def test_one_hot_weights_are_hard_labels(n, d, classes):
    z, _ = problem(1, n, d, classes)
    labels = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(3))
    eye, expected = torch.eye(d, dtype=torch.float64), 0
    for c in labels.unique():
        members = z[0, labels == c]
        m = members.shape[0]
        factor = torch.linalg.cholesky(eye + d / (m * 0.5) * members.mT @ members)
        expected += m / n * factor.diagonal().log().sum()
    one_hot = torch.nn.functional.one_hot(labels, classes).double()[None]
    assert torch.allclose(soft_rate(z, one_hot, 0.5), expected, rtol=1e-12)


@pytest.mark.parametrize("n, d", [(50, 9), (9, 50)])
def test_one_class_of_ones_is_the_rate_itself(n, d):
    z, _ = problem(1, n, d, 1)
    eye = torch.eye(n, dtype=torch.float64)
    expected = torch.linalg.cholesky(eye + d / (n * 0.5) * z[0] @ z[0].mT).diagonal().log().sum()
    assert torch.allclose(soft_rate(z, torch.ones(1, n, 1, dtype=torch.float64), 0.5), expected, rtol=1e-12)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=strategies.integers(2, 50), d=strategies.integers(1, 20), k=strategies.integers(2, 60),
       seed=strategies.integers(0, 99))
def test_never_above_the_rate_and_merging_never_lowers(n, d, k, seed):
    """logdet is concave: R >= Rc for rows that sum to one, and two columns in one never lower Rc."""
    z, weights = problem(1, n, d, k, seed=seed)
    weights = weights + 1e-3
    weights = weights / weights.sum(-1, keepdim=True)
    whole, parts = soft_rate(z, weights.sum(-1, keepdim=True), 0.5), soft_rate(z, weights, 0.5)
    merged = soft_rate(z, torch.cat([weights[..., :1] + weights[..., 1:2], weights[..., 2:]], -1), 0.5)
    assert parts <= merged * (1 + 1e-12) and merged <= whole * (1 + 1e-12)


@pytest.mark.parametrize("shape", [(1, 50, 9, 4), (1, 50, 9, 40), (1, 8, 20, 35)], ids=str)
def test_rotations_and_permutations_change_nothing(shape):
    z, weights = problem(*shape)
    rate = soft_rate(z, weights, 0.5)
    g = torch.Generator().manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(shape[2], shape[2], dtype=torch.float64, generator=g)).Q
    points, classes = torch.randperm(shape[1], generator=g), torch.randperm(shape[3], generator=g)
    assert torch.allclose(soft_rate(z @ rotation, weights, 0.5), rate, rtol=1e-12)
    assert torch.allclose(soft_rate(z[:, points], weights[:, points], 0.5), rate, rtol=1e-12)
    assert torch.allclose(soft_rate(z, weights[..., classes], 0.5), rate, rtol=1e-12)


def test_fewer_points_than_features_are_turned_into_as_few():
    """n < d goes through the n x n factor of Z; the op itself would take either."""
    z, weights = problem(2, 9, 30, 40)
    dual = of(soft_rate, z, weights, z.dtype)
    leaves = z.clone().requires_grad_(), weights.clone().requires_grad_()
    rate = OP.coding_rate_soft(*leaves, 0.5, True)[0]
    primal = (rate.detach(), *torch.autograd.grad(rate, leaves, torch.linspace(0.5, 1.5, 2, dtype=torch.float64)))
    close(dual, primal, 1e-12)
    assert OP.coding_rate_soft(*leaves, 0.5, True)[1].shape == (2, 40, 465)
    collapsed = z[:, :1].expand(2, 9, 30).contiguous()  # of rank one
    close(*both(collapsed, weights), 1e-9)


# ---------------------------------------------------------------------------------------------------------- precision


@pytest.mark.parametrize("classes", [7, 50], ids=["few", "many"])
@pytest.mark.parametrize("length", [1e-4, 1e-2, 0.3, 1.0, 4.0, 20.0, 1e3], ids=str)
@pytest.mark.parametrize("what", ["spread", "rank three", "collapsed", "outlier"])
def test_float32_keeps_its_digits(what, length, classes):
    """Rate and gradients of any size, features as degenerate as they come. Where all are nearly one, A^-1 z is up to a
    thousand times shorter than z before care is taken, and that many roundings of float32 show."""
    shorter = 1 + 24 / 0.5 * length**2 if what in ("collapsed", "rank three") else 1
    z, weights = problem(1, 90, 24, classes)
    if what == "rank three":
        z = z[..., :3] @ problem(1, 3, 24, 1)[0] + 1e-3 * z
    elif what == "collapsed":
        z = z[:, :1] + 1e-3 * z
    elif what == "outlier":
        z[:, 5] *= 100
    z = (length * z).float()
    close(*both(z, weights.float()), 1e-5 if shorter > 1e5 else max(1e-5, 6 * 2**-24 * min(shorter, 1000)))


@pytest.mark.parametrize("classes", [7, 50], ids=["few", "many"])
def test_float64_where_everything_is_extreme(classes):
    """eps 1e-4 and norms of 1e3 at once: d/eps |z|^2 = 2e11, of which rounding alone takes 5e-5. Collapsed features
    have a closed form: A_k = I + c z z', logdet A_k = log(1 + c |z|^2)."""
    n, d, eps = 60, 24, 1e-4
    z, weights = problem(1, n, d, classes, length=1e3)
    close(*both(z, weights, eps), 1e-10)
    close(*both(z.float(), weights.float(), eps), 1e-5)
    z = z[:, :1].expand(1, n, d).contiguous()
    leaves = z.clone().requires_grad_(), weights.clone().requires_grad_()
    rate = soft_rate(*leaves, eps)
    dz, _ = torch.autograd.grad(rate, leaves)
    c = d / eps * 1e6
    mass = weights.sum()
    assert torch.allclose(rate, mass / (2 * n) * torch.log1p(torch.tensor(c, dtype=torch.float64)), rtol=1e-5)
    expected = d / (n * eps) * weights.sum(-1, keepdim=True) * z / (1 + c)
    assert (dz - expected).abs().max() <= 1e-3 * expected.abs().max()
    dz32, = torch.autograd.grad(soft_rate(leaves[0].float(), leaves[1].float(), eps), leaves[:1])
    assert (dz32 - expected).abs().max() <= 1e-3 * expected.abs().max()


def test_care_is_for_one_view_alone():
    z, weights = problem(3, 60, 8, 40, torch.float32)
    z[1] = z[1, :1] * 100
    _, inverse, stats = OP.coding_rate_soft(z, weights, 0.5, True)
    assert (stats[1, 1] == -1).all() and not inverse[1].any()
    assert (stats[[0, 2], 1] >= 0).all() and inverse[[0, 2]].any()
    close(*both(z, weights), 1e-5)


# ---------------------------------------------------------------------------------------------------------- machinery


@pytest.mark.parametrize("shape", [(1, 4, 3, 2), (2, 7, 3, 33), (1, 3, 5, 4)], ids=str)
def test_gradcheck(shape):
    z, weights = problem(*shape)
    inputs = z.requires_grad_(), (weights + 0.1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, w: soft_rate(z, w, 0.5), inputs)


def test_no_second_derivative():
    z, weights = problem(1, 9, 3, 4)
    z.requires_grad_()
    (dz,) = torch.autograd.grad(soft_rate(z, weights, 0.5), z, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        dz.sum().backward()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_opcheck(dtype):
    for shape, keep in itertools.product(((2, 20, 5, 4), (2, 20, 5, 40)), (True, False)):
        z, weights = problem(*shape, dtype)
        inputs = z.requires_grad_(), weights.requires_grad_(), 0.5, keep
        torch.library.opcheck(OP.coding_rate_soft, inputs)
        rate, inverse, stats = OP.coding_rate_soft(*inputs)
        torch.library.opcheck(OP.coding_rate_soft_backward,
                              (rate.detach(), z.detach(), weights.detach(), inverse, stats, 0.5, True, True))


def test_torch_func_takes_the_plain_formula():
    z, weights = problem(3, 20, 5, 4)
    truth = of(ref.coding_rate_soft, z, weights, torch.float64)
    assert torch.allclose(torch.func.grad(lambda z: soft_rate(z, weights, 0.5)[0])(z)[0] * 0.5, truth[1][0])
    rows = torch.vmap(lambda z, w: soft_rate(z[None], w[None], 0.5)[0])(z, weights)
    assert torch.allclose(rows, truth[0])
    v = torch.randn_like(z)
    _, tangent = torch.func.jvp(lambda z: soft_rate(z, weights, 0.5), (z,), (v,))
    drate = torch.linspace(0.5, 1.5, 3, dtype=torch.float64)
    assert torch.allclose((tangent * drate).sum(), (truth[1] * v).sum())


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(2, 20, 5, 40), (1, 5, 20, 4)], ids=str)
def test_compile_without_graph_breaks(shape):
    torch._dynamo.reset()
    z, weights = problem(*shape)
    compiled = torch.compile(lambda z, w: soft_rate(z, w, 0.5).sum(), fullgraph=True)
    found = []
    for f in (compiled, lambda z, w: soft_rate(z, w, 0.5).sum()):
        leaves = z.clone().requires_grad_(), weights.clone().requires_grad_()
        rate = f(*leaves)
        found.append((rate.detach(), *torch.autograd.grad(rate, leaves)))
    close(*found, 1e-12)


def test_autocast_changes_nothing():
    for shape in ((1, 30, 8, 40), (1, 8, 30, 40)):
        z, weights = problem(*shape, torch.float32)
        rate = soft_rate(z, weights, 0.5)
        with torch.autocast("cpu", torch.bfloat16):
            again = soft_rate(z, weights, 0.5)
        assert again.dtype == torch.float32 and torch.equal(again, rate)


@pytest.mark.parametrize("shape", [(1, 300, 20, 5), (1, 300, 20, 50), (1, 60, 8, 40)], ids=str)
@pytest.mark.parametrize("length", [1, 1e3], ids=["fast", "careful"])
def test_same_bits_every_time(shape, length):
    points = problem(*shape, torch.float32, length)
    truth = of(ref.coding_rate_soft, *points, torch.float64)
    for _ in threads(1, 2, 3):
        first, again = (of(soft_rate, *points, torch.float32) for _ in range(2))
        assert same(first, again)
        close(first, truth, 1e-5)


# ---------------------------------------------------------------------------------------------------------- bad input


def test_dtypes_are_checked():
    z, weights = problem(1, 9, 3, 4)
    for a, b in ((z.float(), weights), (z.half(), weights.half()), (z.long(), weights.long())):
        with pytest.raises(TypeError, match="both float32 or both float64"):
            soft_rate(a, b, 0.5)


@only_cpu
@pytest.mark.parametrize("classes", [4, 40])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_values_are_checked(dtype, classes):
    for value, words in ((-0.5, "weights must be >= 0, got -0.5 at view 1, point 7, class 2"),
                         (float("nan"), "the weight at view 1, point 7, class 2 is not finite"),
                         (float("inf"), "the weight at view 1, point 7, class 2 is not finite")):
        z, weights = problem(2, 9, 3, classes, dtype)
        weights[1, 7, 2] = value
        with pytest.raises(RuntimeError, match=words):
            soft_rate(z, weights, 0.5)
        z, weights = problem(2, 9, 3, classes, dtype)
        if value != -0.5:
            z[1, 4, 2] = value
            with pytest.raises(RuntimeError, match="z is not finite, or its length overflows, at view 1, point 4"):
                soft_rate(z, weights, 0.5)
    z, weights = problem(1, 9, 3, classes)
    with pytest.raises(RuntimeError, match="not positive definite in float64"):
        soft_rate(z * 1e150, weights, 1e-30)


def test_the_op_itself_checks_too():
    """Whoever calls torch.ops directly gets an error, never a crash."""
    z, weights = problem(1, 9, 3, 4)
    for bad in ((z[0], weights, 0.5), (z, weights[0], 0.5), (z[:, :5], weights, 0.5), (z.float(), weights, 0.5),
                (z, weights[:0], 0.5), (z.half(), weights.half(), 0.5), (z, weights, 0.0), (z, weights, -1.0),
                (z, weights, float("nan")), (z[:, :0], weights[:, :0], 0.5), (z[..., :0], weights, 0.5)):
        with pytest.raises(RuntimeError, match="coding_rate_soft: "):
            OP.coding_rate_soft(*bad, True)
    rate, inverse, stats = OP.coding_rate_soft(z, weights, 0.5, True)
    for bad in ((rate[:0], z, weights, inverse, stats), (rate.float(), z, weights, inverse, stats),
                (rate, z, weights, inverse[..., :5], stats), (rate, z, weights, inverse, stats[:, :1]),
                (rate, z, weights, inverse.float(), stats), (rate, z, weights[:, :5], inverse, stats)):
        with pytest.raises(RuntimeError, match="coding_rate_soft"):
            OP.coding_rate_soft_backward(*bad, 0.5, True, True)


@pytest.mark.parametrize("length", [1.0, 30.0, 1000.0])
def test_fewer_points_than_features_of_a_lower_rank(length):
    """What the rows have beyond their rank is nothing, also where they are long."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(64, 8, generator=g) @ torch.randn(8, 256, generator=g)
    z = (length * torch.nn.functional.normalize(rows, dim=-1))[None].requires_grad_()
    weights = torch.softmax(torch.randn(1, 64, 3, generator=g), -1)
    truth = z.detach().double().requires_grad_()
    expected = ref.coding_rate_soft(truth, weights.double(), 0.5)
    rate = soft_rate(z, weights, 0.5)
    rate.backward(), expected.backward()
    assert abs(rate.item() / expected.item() - 1) < 1e-5
    assert (z.grad - truth.grad).norm() < 1e-3 * truth.grad.norm()
