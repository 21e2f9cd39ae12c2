"""The coding rate: values against the reference, its facts, float32 where it is hard, bad input."""

import math

import pytest
import reference as ref
import torch
from coding_rate_cases import BACKWARD, OP, TOLERANCE, labels_of, ours, points, truth
from helpers import close, normal, same
from hypothesis import given, settings, strategies
from kernels import only_cpu

import torch_subspace as ts
from torch_subspace.rates.coding_rate import _groups as groups

NONE = torch.empty(0, dtype=torch.int64)
SHAPES = [  # n, d, classes (0: no labels); all sides: the tiles up to 256, their edges, the threads' share, OpenBLAS
    (1, 1, 0), (7, 5, 0), (5, 7, 0), (20, 33, 0), (130, 48, 0), (64, 64, 0), (65, 200, 0), (1500, 20, 0), (40, 1500, 0),
    (200, 256, 0), (300, 257, 0), (600, 300, 0), (300, 600, 0), (2100, 96, 0),
    (1, 3, 1), (12, 4, 12), (60, 7, 9), (50, 80, 4), (300, 31, 5), (600, 320, 2), (900, 64, 30), (800, 16, 400),
]


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n, d, classes", SHAPES)
def test_matches_the_reference(n, d, classes, dtype):
    z, labels = points(n, d, dtype), labels_of(n, classes)
    found = ours(z, labels)
    assert found[0].dtype == found[1].dtype == dtype
    close(found, truth(z, labels), TOLERANCE[dtype])


@settings(max_examples=100, deadline=None, derandomize=True)
@given(n=strategies.integers(1, 90), d=strategies.integers(1, 90), classes=strategies.integers(0, 12),
       eps=strategies.floats(-4, 1), size=strategies.floats(-3, 3), dtype=strategies.sampled_from(list(TOLERANCE)))
def test_matches_the_reference_anywhere(n, d, classes, eps, size, dtype):
    z, labels = points(n, d, dtype) * 10**size, labels_of(n, classes)
    close(ours(z, labels, 10**eps), truth(z, labels, 10**eps), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_large_groups_of_several_sizes(dtype):
    """Sides of 300, 400, 300, 30, no whole blocks among them, by points and by features; two are ill-conditioned."""
    z, labels = points(1500, 400, dtype), torch.arange(4).repeat_interleave(torch.tensor([300, 800, 370, 30]))
    z[250:900] *= 30 * torch.logspace(0, -4, 400, dtype=dtype)
    order = torch.randperm(1500, generator=torch.Generator().manual_seed(0))
    z, labels = z[order], labels[order]
    close(ours(z, labels), truth(z, labels), TOLERANCE[dtype])
    views = torch.stack((z, 2 * z))
    for found, view in zip(zip(*ours(views, labels)), views):
        close(found, truth(view, labels), TOLERANCE[dtype])


def test_views():
    """Leading dimensions are views, with labels of their own or shared."""
    z = torch.stack([points(40, 12, seed=v) for v in range(6)])
    own = torch.stack([labels_of(40, 5, seed=v) for v in range(6)])
    for labels, of in ((None, lambda v: None), (own[0], lambda v: own[0]), (own, lambda v: own[v])):
        each = [truth(z[v], of(v)) for v in range(6)]
        rate, dz = torch.stack([e[0] for e in each]), torch.stack([e[1] for e in each])
        close(ours(z, labels), (rate, dz), 1e-12)
        if labels is not None and labels.dim() == 2:
            labels = labels.view(2, 3, 40)
        close(ours(z.view(2, 3, 40, 12), labels), (rate.view(2, 3), dz.view(2, 3, 40, 12)), 1e-12)
    drate = torch.randn(6, dtype=torch.float64)
    z = z.requires_grad_()
    (dz,) = torch.autograd.grad(ts.coding_rate(z), z, drate)
    close([dz], [drate[:, None, None] * torch.stack([truth(v)[1] for v in z])], 1e-12)


def test_no_views():
    z = torch.randn(3, 0, 4, 5, requires_grad=True)
    for labels in (None, torch.zeros(4, dtype=torch.int64), torch.zeros(3, 0, 4, dtype=torch.int64)):
        rate = ts.coding_rate(z, labels)
        rate.sum().backward()
        assert rate.shape == (3, 0) and z.grad.shape == z.shape


def test_any_labels():
    """Only which points share a label counts: not its value, nor the order of the points, nor classes nobody is in."""
    z, labels = points(70, 9), labels_of(70, 6)
    rate, dz = ours(z, labels)
    big = torch.tensor([2**62, 5, 0, 2**63 - 1, 77, 2**40])
    renamed = big[torch.searchsorted(labels.unique(), labels)]
    close(ours(z, renamed), (rate, dz), 1e-14)
    shuffle = torch.randperm(70)
    close(ours(z[shuffle], labels[shuffle]), (rate, dz[shuffle]), 1e-12)
    close(ours(z, torch.full((70,), 3)), ours(z), 1e-14)


def test_empty_groups_of_the_op_itself():
    z, labels = points(30, 6)[None], labels_of(30, 3)
    order = labels.argsort(stable=True)[None]
    sizes = torch.tensor([0, *[int((labels == v).sum()) for v in labels.unique()]])
    ends = [0, 0, sizes[1], sizes[1], sizes[1:3].sum(), 30]  # empty ones first, between and last
    start = torch.tensor(ends + [30] * (31 - len(ends)))[None]
    rate, factor = OP(z, order, start, 0.5, True)
    dz = BACKWARD(torch.ones(1, dtype=torch.float64), z, order, start, factor, 0.5)
    close((rate[0], dz[0]), truth(z[0], labels), 1e-12)


def test_the_factor_may_be_kept_or_not():
    for n, d, classes in ((50, 20, 4), (300, 270, 0), (20, 700, 2)):
        for dtype in TOLERANCE:
            z = points(n, d, dtype)[None]
            order, start = groups(z, labels_of(n, classes)[None] if classes else None)
            rate, factor = OP(z, order, start, 0.5, True)
            again, none = OP(z, order, start, 0.5, False)
            assert torch.equal(rate, again) and none.shape == (1, 0)
            drate = torch.ones(1, dtype=dtype)
            kept, made = (BACKWARD(drate, z, order, start, f, 0.5) for f in (factor, none))
            assert torch.equal(kept, made)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_widened(dtype):
    z, labels = points(60, 40).to(dtype), labels_of(60, 4)
    for some in (None, labels):
        rate, dz = ours(z, some)
        wide_rate, wide_dz = ours(z.float(), some)
        assert rate.dtype == torch.float32 and dz.dtype == dtype
        assert torch.equal(rate, wide_rate) and torch.equal(dz, wide_dz.to(dtype))


def test_memory_of_any_order():
    z, labels = points(40, 24), labels_of(40, 3)
    for some in (None, labels):
        expected = ours(z, some)
        for other in (z.mT.contiguous().mT, torch.stack([z, z], -1)[..., 0], z.repeat(2, 2)[40:, :24]):
            assert not other.is_contiguous()
            assert same(ours(other, some), expected)
    wide = torch.stack([labels, labels], -1)[:, 1]
    assert torch.equal(ts.coding_rate(z, wide), ts.coding_rate(z, labels))
    x = z.clone().requires_grad_()
    (dz,) = torch.autograd.grad(ts.coding_rate(x.expand(3, 40, 24)), x, torch.ones(3, dtype=torch.float64)[::1])
    close([dz], [3 * truth(z)[1]], 1e-12)


# --------------------------------------------------------------------------------------------------------------- facts


@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=strategies.integers(1, 40), d=strategies.integers(1, 40), eps=strategies.floats(0.01, 5),
       seed=strategies.integers(0, 1000))
def test_facts_of_r(n, d, eps, seed):
    z = points(n, d, seed=seed)
    rate, dz = ours(z, eps=eps)
    turn = torch.linalg.qr(normal(d, d, seed=seed))[0]
    assert torch.allclose(ts.coding_rate(z @ turn, eps=eps), rate, rtol=1e-11)  # rotations
    assert torch.allclose(ts.coding_rate(z.flip(0), eps=eps), rate, rtol=1e-11)  # the order of the points
    assert torch.allclose(ts.coding_rate(z.repeat(3, 1), eps=eps), rate, rtol=1e-11)  # every point three times
    assert torch.allclose(ts.coding_rate(z.mT, eps=eps * n**2 / d**2), rate, rtol=1e-11)  # Z Z' and Z' Z agree
    least, most = 0.5 * math.log1p(d / eps), 0.5 * d * math.log1p(1 / eps)
    assert least * (1 - 1e-12) <= rate <= most * (1 + 1e-12)  # unit rows: all alike, and evenly spread
    a = torch.eye(d, dtype=torch.float64) + d / (n * eps) * z.mT @ z
    assert torch.allclose((dz * z).sum(), d - torch.cholesky_inverse(torch.linalg.cholesky(a)).trace(), atol=1e-9)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(n=strategies.integers(2, 40), d=strategies.integers(1, 30), classes=strategies.integers(2, 8),
       seed=strategies.integers(0, 1000))
def test_facts_of_rc(n, d, classes, seed):
    z, labels = points(n, d, seed=seed), labels_of(n, classes, seed)
    rate = ts.coding_rate(z, labels)
    assert rate <= ts.coding_rate(z) * (1 + 1e-12)  # the whole takes no less than its parts
    assert torch.allclose(ts.rate_reduction(z, labels), ts.coding_rate(z) - rate, atol=1e-12)
    merged = torch.where(labels == labels.max(), labels.min(), labels)
    assert ts.coding_rate(z, merged) >= rate * (1 - 1e-12)
    zero = ts.coding_rate(z, torch.arange(n))  # every point for itself: 1/2 log(1 + d/eps)
    assert torch.allclose(zero, torch.tensor(0.5 * math.log1p(2 * d), dtype=torch.float64))


def test_orthogonal_classes_reduce_the_rate_most():
    """Two classes in orthogonal subspaces against the same points in one."""
    first, second = points(50, 8), points(50, 8, seed=5)
    labels = torch.arange(100) // 50
    apart = torch.cat([torch.cat([first, 0 * first], 1), torch.cat([0 * second, second], 1)])
    together = torch.cat([torch.cat([first, 0 * first], 1), torch.cat([second, 0 * second], 1)])
    assert ts.rate_reduction(apart, labels) > 10 * ts.rate_reduction(together, labels) > 0


# -------------------------------------------------------------------------------------------- float32 where it is hard


def collapsed(n, d, noise, seed=0):
    """Unit points around one direction."""
    g = torch.Generator().manual_seed(seed)
    centre = torch.randn(1, d, dtype=torch.float64, generator=g)
    z = centre + noise * torch.randn(n, d, dtype=torch.float64, generator=g)
    return torch.nn.functional.normalize(z, dim=-1).float()


@pytest.mark.parametrize("eps", [0.5, 1e-2, 1e-4])
@pytest.mark.parametrize("noise", [0.0, 1e-3, 0.03, 0.3, 3.0])
@pytest.mark.parametrize("n, d", [(20, 512), (200, 128), (128, 128), (33, 7), (300, 310)])
def test_collapsed_features(n, d, noise, eps):
    z = collapsed(n, d, noise)
    close(ours(z, eps=eps), truth(z, eps=eps), 1e-5)
    labels = torch.arange(n) % 3
    close(ours(z, labels, eps), truth(z, labels, eps), 1e-5)


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1e-3, 1e3, 1e6, 1e18])
def test_any_size_of_features(size):
    """Relative digits are kept where all that X has is below float32's, and where its square is above float32's."""
    for n, d in ((30, 60), (60, 30), (270, 300)):
        z = points(n, d, torch.float32) * size
        close(ours(z), truth(z), 1e-5)
        close(ours(z, torch.arange(n) % 4), truth(z, torch.arange(n) % 4), 1e-5)


def test_one_hard_class_among_easy_ones():
    z = torch.cat([points(40, 24, torch.float32), collapsed(40, 24, 1e-3), 1e3 * points(40, 24, torch.float32, 3)])
    labels = torch.arange(120) // 40
    shuffle = torch.randperm(120)
    z, labels = z[shuffle], labels[shuffle]
    close(ours(z, labels, 1e-3), truth(z, labels, 1e-3), 1e-5)


@only_cpu
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n, d", [(30, 8), (8, 30), (300, 400)])
def test_values_that_are_not_finite_are_reported(n, d, bad):
    for dtype in TOLERANCE:
        z = points(n, d, dtype)
        z[4, 5] = bad
        with pytest.raises(RuntimeError, match="coding_rate: view 0, group 0: the factorisation failed; z holds"):
            ts.coding_rate(z)
        with pytest.raises(RuntimeError, match="view 1, group 2: the factorisation failed"):
            ts.coding_rate(torch.stack([points(n, d, dtype), z]), (torch.arange(n) + 2) % 4 + 6)
    with pytest.raises(RuntimeError, match="beyond float64's range"):
        ts.coding_rate(points(n, d) * 1e200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [40, 64, 193])
@pytest.mark.parametrize("d", [520, 640, 736, 1000, 1008, 2000, 2064])
def test_long_rows_are_summed_in_parts(dtype, n, d):
    """Of which no column counts twice, wherever they end."""
    z = torch.nn.functional.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(d + n)), dim=-1)
    truth, ours = z.double().requires_grad_(), z.to(dtype).requires_grad_()
    rate, expected = ts.coding_rate(ours, torch.zeros(n, dtype=torch.int64)), ref.coding_rate(truth)
    rate.backward(), expected.backward()
    bound = 1e-5 if dtype == torch.float32 else 1e-12
    assert abs(rate.item() / expected.item() - 1) < bound
    assert (ours.grad - truth.grad).norm() < bound * truth.grad.norm()


# ---------------------------------------------------------------------------------------------------------- bad input

Z, LABELS = torch.randn(6, 4), torch.arange(6) % 2


@pytest.mark.parametrize("z, labels, eps, error, words", [
    ([1.0], None, 0.5, TypeError, "z must be a tensor, got list"),
    (Z.long(), None, 0.5, TypeError, "z must be float32, .* got torch.int64"),
    (Z[0], None, 0.5, ValueError, r"z must be \(..., n, d\) with n > 0 and d > 0, got \(4,\)"),
    (Z[:0], None, 0.5, ValueError, r"got \(0, 4\)"),
    (Z[:, :0], None, 0.5, ValueError, r"got \(6, 0\)"),
    (Z, None, 0.0, ValueError, "eps must be a number above 0, got 0.0"),
    (Z, None, -1, ValueError, "eps must be a number above 0, got -1"),
    (Z, None, math.inf, ValueError, "eps .* got inf"),
    (Z, None, math.nan, ValueError, "eps .* got nan"),
    (Z, None, torch.tensor(0.5), ValueError, "eps"),
    (Z, [0] * 6, 0.5, TypeError, "membership must be a tensor, got list"),
    (Z, LABELS.int(), 0.5, TypeError, "membership must be int64 labels or floating, got torch.int32"),
    (Z, LABELS.bool(), 0.5, TypeError, "got torch.bool"),
    (Z, LABELS.to("meta"), 0.5, ValueError, "one device, got cpu and meta"),
    (Z, LABELS[:5], 0.5, ValueError, r"labels must be \(6,\), got \(5,\)"),
    (Z.expand(2, 6, 4), LABELS.expand(3, 6), 0.5, ValueError, r"labels must be \(6,\) or \(2, 6\), got \(3, 6\)"),
    (Z, LABELS - 1, 0.5, ValueError, "labels must be 0 or more, got -1"),
    (Z, torch.rand(5, 2), 0.5, ValueError, r"soft membership must be .* got \(5, 2\)"),
    (Z, torch.rand(6), 0.5, ValueError, "soft membership"),
    (Z, torch.rand(6, 2).to(torch.complex64), 0.5, TypeError, "complex64"),
])
def test_bad_input_is_named(z, labels, eps, error, words):
    with pytest.raises(error, match=words) as caught:
        ts.coding_rate(z, labels, eps=eps)
    assert "coding_rate" in str(caught.value)
    if labels is not None:
        with pytest.raises(error, match=words) as caught:
            ts.rate_reduction(z, labels, eps=eps)
        assert "rate_reduction" in str(caught.value)


def test_rate_reduction_needs_a_membership():
    with pytest.raises(TypeError, match="rate_reduction: membership must be a tensor, got None"):
        ts.rate_reduction(Z, None)


@only_cpu
def test_the_op_itself_checks_too():
    """Whoever calls torch.ops directly gets an error, never a crash."""
    z, order, start = Z[None], torch.arange(6)[None], torch.tensor([[0, 2, 6, 6, 6, 6, 6]])
    assert OP(z, order, start, 0.5, True)[1].shape == (1, 24)
    for bad in ((Z, NONE, NONE, 0.5), (z.half(), NONE, NONE, 0.5), (z[:, :0], NONE, NONE, 0.5),
                (z[..., :0], NONE, NONE, 0.5), (z, NONE, NONE, 0.0), (z, NONE, NONE, math.nan), (z, order, NONE, 0.5),
                (z, NONE, start, 0.5), (z, order[0], start[0], 0.5), (z, order.int(), start.int(), 0.5),
                (z, order[:, :5], start, 0.5), (z, order, start[:, :6], 0.5), (z, order + 1, start, 0.5),
                (z, order - 1, start, 0.5), (z, order, start + 1, 0.5), (z, order, start.flip(1), 0.5),
                (z, order, torch.tensor([[0, 3, 2, 6, 6, 6, 6]]), 0.5),
                (z, order, torch.tensor([[0, 2, 5, 5, 5, 5, 5]]), 0.5)):
        with pytest.raises(RuntimeError, match="coding_rate: "):
            OP(*bad, False)
    _, factor = OP(z, order, start, 0.5, True)
    one = torch.ones(1)
    for bad in ((one.double(), z, factor), (torch.ones(2), z, factor), (one[0], z, factor), (one, z, factor[:, :5]),
                (one, z, factor.double()), (one, z.half(), factor)):
        with pytest.raises(RuntimeError, match="coding_rate_backward: |coding_rate: "):
            BACKWARD(*bad[:2], order, start, bad[2], 0.5)
