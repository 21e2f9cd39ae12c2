"""The weight gradient of depthwise and other grouped convolutions: against torch's own in float64, its derivatives, and
what is refused."""

import functools

import helpers
import pytest
import reference as ref
import torch
from hypothesis import assume, given, settings, strategies

from torch_subspace.tucker.depthwise import depthwise_weight_gradient

OP = torch.ops.torch_subspace.depthwise
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
CONV = (torch.conv1d, torch.conv2d, torch.conv3d)
SHAPES = [  # b, c, m, in, kernel, stride, padding, dilation, and n where it is not 1: c groups of n channels
    (2, 3, 1, (9,), (3,), (1,), (1,), (1,)),
    (1, 1, 1, (1,), (1,), (1,), (0,), (1,)),
    (2, 2, 2, (40,), (9,), (2,), (4,), (3,)),
    (2, 6, 1, (14, 14), (7, 7), (1, 1), (3, 3), (1, 1)),  # ConvNeXt
    (2, 3, 1, (33, 70), (7, 7), (1, 1), (3, 3), (1, 1)),
    (3, 2, 3, (17, 15), (3, 5), (2, 2), (1, 2), (1, 1)),  # three outputs per channel
    (2, 2, 1, (20, 21), (3, 3), (1, 1), (6, 6), (6, 6)),  # wide dilation
    (2, 2, 1, (19, 23), (4, 6), (3, 2), (0, 1), (2, 3)),
    (1, 3, 1, (32, 32), (4, 4), (4, 4), (0, 0), (1, 1)),  # patches
    (1, 2, 1, (30, 30), (2, 2), (7, 9), (1, 0), (1, 1)),  # columns nobody reads
    (1, 2, 1, (2, 2), (3, 3), (1, 1), (5, 5), (2, 2)),  # windows that see only padding
    (2, 3, 2, (5, 6, 7), (3, 2, 3), (1, 2, 1), (1, 0, 2), (1, 1, 2)),
    (1, 2, 1, (4, 9, 9), (3, 3, 3), (2, 2, 2), (1, 1, 1), (2, 1, 1)),
    (2, 3, 4, (14, 14), (3, 3), (1, 1), (1, 1), (1, 1), 4),  # ResNeXt
    (2, 2, 3, (15, 17), (3, 3), (2, 2), (1, 1), (1, 1), 2),
    (1, 2, 5, (20, 9), (5, 4), (1, 2), (2, 0), (2, 1), 3),
    (2, 1, 3, (18,), (3,), (3,), (1,), (2,), 5),  # one group
    (1, 2, 2, (4, 6, 7), (2, 3, 3), (1, 2, 1), (1, 0, 2), (1, 1, 2), 2),
    (1, 1, 40, (6, 6), (3, 3), (1, 1), (1, 1), (1, 1), 12),  # more sums than are held at a time
]
close = functools.partial(helpers.close, floor=0.1)


def problem(b, c, m, size, kernel, stride, padding, dilation, n=1, dtype=torch.float64):
    """x, dy and the geometry."""
    g = torch.Generator().manual_seed(b + c + m + sum(size))
    out = [(w + 2 * p - d * (k - 1) - 1) // s + 1 for w, k, s, p, d in zip(size, kernel, stride, padding, dilation)]
    x = torch.randn(b, c * n, *size, dtype=torch.float64, generator=g)
    dy = torch.randn(b, c * m, *out, dtype=torch.float64, generator=g)
    return x.to(dtype), dy.to(dtype), kernel, stride, padding, dilation, c


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, dtype):
    x, dy, *geometry = problem(*shape, dtype=dtype)
    ours = depthwise_weight_gradient(x, dy, *geometry)
    assert ours.dtype == dtype
    close(ours, ref.depthwise_weight_gradient(x.double(), dy.double(), *geometry), TOLERANCE[dtype])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=strategies.data(), dtype=strategies.sampled_from(list(TOLERANCE)))
def test_matches_the_reference_anywhere(data, dtype):
    dims = data.draw(strategies.integers(1, 3))

    def ints(least, most):
        return tuple(data.draw(strategies.lists(strategies.integers(least, most), min_size=dims, max_size=dims)))

    b, c, m, n = (data.draw(strategies.integers(1, 3)) for _ in range(4))
    kernel, stride, padding, dilation = ints(1, 9 if dims < 3 else 4), ints(1, 5), ints(0, 5), ints(1, 4)
    size = ints(1, 40 if dims < 3 else 9)
    assume(all(w + 2 * p > d * (k - 1) for w, k, p, d in zip(size, kernel, padding, dilation)))
    x, dy, *geometry = problem(b, c, m, size, kernel, stride, padding, dilation, n, dtype)
    close(depthwise_weight_gradient(x, dy, *geometry),
          ref.depthwise_weight_gradient(x.double(), dy.double(), *geometry), TOLERANCE[dtype])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_adjoint_of_the_convolution(shape):
    """<D(x, dy), w> = <dy, conv(x, w)> for every w, and D is linear in either argument."""
    x, dy, kernel, *how, groups = problem(*shape)
    geometry = kernel, *how, groups
    w = torch.randn(dy.shape[1], x.shape[1] // groups, *kernel, dtype=torch.float64)
    y = CONV[len(kernel) - 1](x, w, None, *how, groups)
    inner = (depthwise_weight_gradient(x, dy, *geometry) * w).sum()
    assert torch.allclose(inner, (y * dy).sum(), rtol=1e-10, atol=1e-9)
    other = torch.randn_like(x)
    both = depthwise_weight_gradient(2 * x - other, dy, *geometry)
    parts = [depthwise_weight_gradient(t, dy, *geometry) for t in (x, other)]
    assert torch.allclose(both, 2 * parts[0] - parts[1], atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_half_types_are_summed_in_float32(shape, dtype):
    x, dy, *geometry = problem(*shape, dtype=dtype)
    truth = ref.depthwise_weight_gradient(x.double(), dy.double(), *geometry)
    ours = depthwise_weight_gradient(x, dy, *geometry)
    assert ours.dtype == dtype
    assert OP(x, dy, *geometry).dtype == torch.float32
    close(OP(x, dy, *geometry), truth, 1e-5)
    rounding = (truth.to(dtype).double() - truth).abs().max()
    assert (ours.double() - truth).abs().max() <= rounding + 1e-4 * truth.abs().max()


def test_memory_of_any_order():
    x, dy, *geometry = problem(*SHAPES[3])
    truth = depthwise_weight_gradient(x, dy, *geometry)
    last = [t.to(memory_format=torch.channels_last) for t in (x, dy)]
    wide = [torch.stack([t, t], -1)[..., 0] for t in (x, dy)]
    for a, b in (last, wide, (x.mT.contiguous().mT, dy)):
        assert not a.is_contiguous()
        assert torch.equal(depthwise_weight_gradient(a, b, *geometry), truth)


def test_nothing_to_sum():
    for x, dy, shape in ((torch.randn(0, 4, 5, 5), torch.randn(0, 8, 5, 5), (8, 1, 3, 3)),
                         (torch.randn(2, 0, 5, 5), torch.randn(2, 0, 5, 5), (0, 1, 3, 3)),
                         (torch.randn(2, 4, 0, 5), torch.randn(2, 4, 0, 5), (4, 1, 3, 3))):
        dweight = depthwise_weight_gradient(x, dy, (3, 3), (1, 1), (1, 1), (1, 1))
        assert dweight.shape == shape and not dweight.any()


# ---------------------------------------------------------------------------------------------------------- machinery


@pytest.mark.parametrize("shape", [
    (1, 2, 3, (5, 4), (3, 2), (1, 2), (1, 0), (1, 1), 2),
    (2, 3, 1, (9,), (3,), (1,), (1,), (1,)),
    (1, 2, 2, (8, 9), (4, 3), (3, 2), (0, 1), (2, 3)),
    (1, 2, 1, (2, 2), (3, 3), (1, 1), (5, 5), (2, 2)),
    (1, 2, 2, (2, 3, 3), (2, 2, 2), (1, 2, 1), (1, 0, 1), (1, 1, 2)),
], ids=str)
def test_its_derivatives(shape):
    x, dy, *geometry = problem(*shape)
    inputs = x.requires_grad_(), dy.requires_grad_()
    fast = {"fast_mode": True}
    assert torch.autograd.gradcheck(lambda x, dy: depthwise_weight_gradient(x, dy, *geometry), inputs, **fast)
    assert torch.autograd.gradgradcheck(lambda x, dy: depthwise_weight_gradient(x, dy, *geometry), inputs, **fast)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    for shape in (SHAPES[0], SHAPES[5], SHAPES[11], SHAPES[14]):
        x, dy, *geometry = problem(*shape, dtype=dtype)
        torch.library.opcheck(OP, (x.requires_grad_(), dy.requires_grad_(), *geometry))


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[14]], ids=str)
def test_torch_func_takes_the_plain_formula(shape):
    x, dy, *geometry = problem(*shape)
    v = torch.randn_like(x)
    _, tangent = torch.func.jvp(lambda x: depthwise_weight_gradient(x, dy, *geometry), (x,), (v,))
    assert torch.allclose(tangent, depthwise_weight_gradient(v, dy, *geometry))
    rows = torch.vmap(lambda x, dy: depthwise_weight_gradient(x[None], dy[None], *geometry))(x, dy)
    assert torch.allclose(rows.sum(0), depthwise_weight_gradient(x, dy, *geometry))


@pytest.mark.slow
def test_compile_without_graph_breaks():
    torch._dynamo.reset()
    compiled = torch.compile(depthwise_weight_gradient, fullgraph=True)
    for shape in (*SHAPES[3:6], SHAPES[14]):
        inputs = problem(*shape, dtype=torch.float32)
        assert torch.allclose(compiled(*inputs), depthwise_weight_gradient(*inputs), atol=1e-4)


@pytest.mark.parametrize("n", [1, 3])
def test_same_bits_for_any_number_of_threads(n):
    """An output is summed by one thread in one order, alone or beside another."""
    x, dy, *geometry = problem(3, 7, 2, (20, 20), (3, 3), (1, 1), (1, 1), (1, 1), n, torch.float32)
    results = []
    for _ in helpers.threads(1, 2, 3, 16):
        results.append(depthwise_weight_gradient(x, dy, *geometry))
    assert all(torch.equal(results[0], r) for r in results[1:])


# ---------------------------------------------------------------------------------------------------------- bad input

X, DY, ONE = torch.randn(2, 3, 8, 8), torch.randn(2, 6, 6, 6), (1, 1)


@pytest.mark.parametrize("inputs, error, words", [
    (([1.0], DY, (3, 3), ONE, (0, 0), ONE), TypeError, "x must be a tensor, got list"),
    ((X.long(), DY.long(), (3, 3), ONE, (0, 0), ONE), TypeError, "int64"),
    ((X, DY.double(), (3, 3), ONE, (0, 0), ONE), TypeError, "share a dtype"),
    ((X, DY.to("meta"), (3, 3), ONE, (0, 0), ONE), ValueError, "one device"),
    ((X[0, 0], DY[0, 0], (3, 3), ONE, (0, 0), ONE), ValueError, "one to three spatial dimensions"),
    ((X, DY[0], (3, 3), ONE, (0, 0), ONE), ValueError, "one to three spatial dimensions"),
    ((X, DY, (3,), ONE, (0, 0), ONE), ValueError, r"kernel must be 2 ints of at least 1, got \(3,\)"),
    ((X, DY, (3, 3), (0, 1), (0, 0), ONE), ValueError, "stride must be 2 ints of at least 1"),
    ((X, DY, (3, 3), ONE, (0, -1), ONE), ValueError, "padding must be 2 ints of at least 0"),
    ((X, DY, (3, 3), ONE, (0, 0), (1, 0)), ValueError, "dilation"),
    ((X, DY[:, :4], (3, 3), ONE, (0, 0), ONE), ValueError, "a multiple of 3"),
    ((X, DY[:1], (3, 3), ONE, (0, 0), ONE), ValueError, r"dy must be \(2, a multiple"),
    ((X, DY, (3, 3), ONE, (0, 0), ONE, 2), ValueError, "groups must be a positive int that divides the 3 channels"),
    ((X, DY, (3, 3), ONE, (0, 0), ONE, 0), ValueError, "groups must be a positive int"),
    ((X, DY[:, :4], (3, 3), ONE, (0, 0), ONE, 3), ValueError, "a multiple of 3"),
    ((X, DY, (3, 3), ONE, (1, 1), ONE), ValueError, r"output is \(..., 8, 8\), got dy of \(2, 6, 6, 6\)"),
])
def test_bad_input_is_named(inputs, error, words):
    with pytest.raises(error, match=words) as caught:
        depthwise_weight_gradient(*inputs)
    assert "depthwise_weight_gradient" in str(caught.value)


def test_the_op_itself_checks_too():
    """Whoever calls torch.ops directly gets an error, never a crash."""
    zero = (0, 0)
    for bad in ((X, DY.double(), (3, 3), ONE, zero, ONE, 3), (X.long(), DY.long(), (3, 3), ONE, zero, ONE, 3),
                (X[0, 0], DY[0, 0], (3, 3), ONE, zero, ONE, 3), (X, DY, (3,), ONE, zero, ONE, 3),
                (X, DY, (3, 3), (0, 1), zero, ONE, 3), (X, DY, (3, 3), ONE, (-1, 0), ONE, 3),
                (X, DY, (3, 3), ONE, (1, 1), ONE, 3), (X, DY, (1 << 40, 3), ONE, zero, ONE, 3),
                (X, DY[:, :4], (3, 3), ONE, zero, ONE, 3), (X, DY[:1], (3, 3), ONE, zero, ONE, 3),
                (X, DY[:, :0], (3, 3), ONE, zero, ONE, 3), (X, DY, (3, 3), ONE, zero, ONE, 2),
                (X, DY, (3, 3), ONE, zero, ONE, 0), (X, DY, (3, 3), ONE, zero, ONE, -3)):
        with pytest.raises(RuntimeError, match="depthwise: "):
            OP(*bad)
