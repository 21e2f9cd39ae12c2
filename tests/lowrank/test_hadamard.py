"""The Walsh-Hadamard transform: values to the bit, facts, derivatives, torch's habits, bad input."""

import functools
import math

import pytest
import reference
import torch
from helpers import close, normal, threads
from kernels import only_cpu

from torch_subspace.lowrank import hadamard
from torch_subspace.lowrank.hadamard import plain

OP = torch.ops.torch_subspace.hadamard
WIDE = [torch.float32, torch.float64]


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-14), (torch.float32, 1e-6)], ids=str)
@pytest.mark.parametrize("bits", range(11))
def test_matches_the_reference(bits, dtype, tolerance):
    x = normal(3, 1 << bits).to(dtype)
    for normalize in (False, True):
        found = hadamard(x, normalize=normalize)
        assert found.dtype == dtype
        close(found, reference.hadamard(x.double(), normalize=normalize), tolerance)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("v, bits", [(5, 1), (3, 4), (700, 5), (9, 10), (7, 12), (4, 13), (3, 14), (2, 16), (1, 18),
                                     (1, 21)])
def test_bits_are_those_of_sums_and_differences(v, bits, dtype):
    """Taken one bit of a place at a time, whatever blocks the kernels go by."""
    x = normal(v, 1 << bits, dtype=dtype)
    assert torch.equal(hadamard(x), plain(x, 1.0))
    assert torch.equal(hadamard(x, normalize=True), plain(x, 1 / math.sqrt(1 << bits)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v, bits", [(3, 0), (5, 3), (3, 9), (40, 11), (2, 15)])
def test_halves_are_rounded_once(v, bits, dtype):
    x = normal(v, 1 << bits).to(dtype)
    for normalize in (False, True):
        assert torch.equal(hadamard(x, normalize=normalize), hadamard(x.float(), normalize=normalize).to(dtype))


def test_any_dimensions_and_memory():
    x = normal(2, 3, 32)
    expected = hadamard(x.view(6, 32)).view(2, 3, 32)
    assert torch.equal(hadamard(x), expected) and torch.equal(hadamard(x[0, 0]), expected[0, 0])
    for other in (x.mT.contiguous().mT, torch.stack([x, x], -1)[..., 0], x.repeat(1, 2, 2)[:, 3:, :32]):
        assert not other.is_contiguous()
        assert torch.equal(hadamard(other), expected)
    for shape in ((0, 8), (3, 0, 4)):
        nothing = torch.zeros(shape, requires_grad=True)
        hadamard(nothing).sum().backward()
        assert nothing.grad.shape == hadamard(nothing).shape == shape
    assert hadamard(torch.empty(2, 8, device="meta")).shape == (2, 8)


def test_not_a_number_stays_in_its_row():
    x = normal(3, 64)
    x[1, 5] = torch.nan
    found = hadamard(x)
    assert found[1].isnan().all() and found[::2].isfinite().all()


def test_facts():
    """Its own inverse but for n, symmetric, keeps lengths, and takes a place to a row of signs."""
    x, y = normal(2, 1 << 12)
    close(hadamard(hadamard(x)), x * (1 << 12), 1e-13)
    close(hadamard(x) @ y, x @ hadamard(y), 1e-12)
    close(hadamard(x, normalize=True).norm(), x.norm(), 1e-13)
    rows = hadamard(torch.eye(16))
    assert torch.equal(rows @ rows, 16 * torch.eye(16)) and torch.equal(rows, rows.mT)
    assert rows[5].tolist() == [(-1.0) ** (5 & j).bit_count() for j in range(16)]


# --------------------------------------------------------------------------------------------------- torch's habits


@pytest.mark.parametrize("shape", [(2, 8), (1,), (3, 2, 4)])
def test_derivatives(shape):
    x = normal(*shape).requires_grad_()
    for normalize in (False, True):
        call = functools.partial(hadamard, normalize=normalize)
        assert torch.autograd.gradcheck(call, x)
        assert torch.autograd.gradgradcheck(call, x)


def test_nothing_is_saved_for_the_backward():
    x, saved = torch.randn(4, 64, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = hadamard(x)
    assert not saved
    (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert torch.equal(dx, hadamard(torch.ones_like(x)))


def test_third_derivatives():
    x = normal(8).requires_grad_()
    (first,) = torch.autograd.grad(hadamard(x).pow(4).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    z, ones = hadamard(x).detach(), torch.ones_like(x)
    expected = hadamard(24 * z * hadamard(ones).square())
    close(third, expected, 1e-12)


def test_torch_func_takes_the_plain_formula():
    x, v = normal(2, 5, 16)
    close(torch.func.grad(lambda x: hadamard(x).pow(3).sum())(x), hadamard(3 * hadamard(x).square()), 1e-12)
    value, tangent = torch.func.jvp(hadamard, (x,), (v,))
    assert torch.equal(value, hadamard(x)) and torch.equal(tangent, hadamard(v))
    assert torch.equal(torch.vmap(hadamard)(x), hadamard(x))
    assert torch.equal(torch.vmap(hadamard, in_dims=1)(x.mT), hadamard(x))


@pytest.mark.parametrize("dtype", [*WIDE, torch.bfloat16], ids=str)
@pytest.mark.parametrize("v, n", [(3, 16), (1, 1), (0, 4)])
def test_opcheck(v, n, dtype):
    torch.library.opcheck(OP, (normal(v, n).to(dtype).requires_grad_(), 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: hadamard(2 * x, normalize=True).square(), fullgraph=True, dynamic=dynamic)
    for shape in ((3, 64), (5, 256)):
        a = normal(*shape, dtype=torch.float32).requires_grad_()
        b = a.detach().clone().requires_grad_()
        found, expected = compiled(a), hadamard(2 * b, normalize=True).square()
        close(found.detach(), expected.detach(), 1e-6)
        found.sum().backward(), expected.sum().backward()
        close(a.grad, b.grad, 1e-6)


def test_autocast_changes_nothing():
    x = normal(3, 64, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(hadamard(x), hadamard(x.clone())) and hadamard(x).dtype == torch.float32
        assert hadamard(x.half()).dtype == torch.float16


@pytest.mark.parametrize("v, bits, dtype", [(300, 10, torch.float32), (1, 18, torch.float32), (3, 17, torch.float64),
                                            (70, 13, torch.bfloat16), (1, 17, torch.float16)])
def test_same_bits_for_any_number_of_threads(v, bits, dtype):
    x = normal(v, 1 << bits).to(dtype)
    results = [hadamard(x) for _ in threads(1, 2, 3, 16)]
    assert all(torch.equal(results[0], r) for r in results[1:])


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize("x, options, error, words", [
    ([1.0], {}, TypeError, "x must be a tensor, got list"),
    (torch.ones(4, dtype=torch.int64), {}, TypeError, "x must be float32, .* got torch.int64"),
    (torch.ones(4).to_sparse(), {}, TypeError, "x must be dense"),
    (torch.ones(3), {}, ValueError, r"x must be \(..., n\) with n a power of two up to 2\^26, got \(3,\)"),
    (torch.ones(2, 0), {}, ValueError, r"got \(2, 0\)"),
    (torch.tensor(1.0), {}, ValueError, r"got \(\)"),
    (torch.ones(1).expand(1 << 27), {}, ValueError, r"up to 2\^26, got \(134217728,\)"),
    (torch.ones(4), {"normalize": "yes"}, TypeError, "normalize must be a bool, got str 'yes'"),
])
def test_bad_input_is_named(x, options, error, words):
    with pytest.raises(error, match=words) as caught:
        hadamard(x, **options)
    assert str(caught.value).startswith("hadamard: ")


@only_cpu
def test_the_op_itself_checks_too():
    for bad in (torch.ones(4), torch.ones(2, 3), torch.ones(2, 0), torch.ones(2, 4).long()):
        with pytest.raises(RuntimeError, match="hadamard: "):
            OP(bad, 1.0)
