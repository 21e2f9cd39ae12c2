"""Tucker composition on a GPU against the CPU kernels in float64. Never run so far: no GPU was at hand."""

import functools

import helpers
import pytest
import torch

import torch_subspace as ts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OP = torch.ops.torch_subspace
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [  # d, r (None: no factor)
    ((1, 1), (1, 1)), ((300, 517), (16, 9)), ((7, 5), (None, None)), ((20, 30), (None, 4)), ((5, 6), (9, 11)),
    ((256, 64, 3, 3), (16, 8, 3, 3)), ((130, 70, 3, 3), (17, 5, None, None)), ((2, 600, 20), (2, 8, None)),
    ((6, 5, 4, 3, 2), (2, 3, None, 2, 5)), ((3, 4, 2, 5, 3, 2), (2, 2, 2, 2, 2, 2)),
]
close = functools.partial(helpers.close, floor=1e-2, device="cuda")


def problem(d, r, dtype):
    """core, factors, base and dout in float64; base and dout representable in dtype."""
    g = torch.Generator().manual_seed(sum(d))
    factors = [None if q is None else torch.randn(p, q, generator=g).double() for p, q in zip(d, r)]
    core = torch.randn(*(q or p for p, q in zip(d, r)), generator=g).double()
    base, dout = (torch.randn(*d, generator=g).to(dtype).double() for _ in range(2))
    return core, factors, base, dout


def run(core, factors, base, dout, dtype, device):
    """Value and gradients; half types are those of base, beside float32 factors."""
    wide = torch.promote_types(dtype, torch.float32)
    core, *factors = (None if t is None else t.to(device, wide).requires_grad_() for t in (core, *factors))
    base, dout = base.to(device, dtype).requires_grad_(), dout.to(device, dtype)
    y = ts.tucker_compose(core, factors, scale=0.5, base=base)
    y.backward(dout)
    return y.detach(), *(t.grad for t in (core, *factors, base) if t is not None)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("d, r", SHAPES, ids=str)
def test_values_and_gradients(d, r, dtype):
    inputs = problem(d, r, dtype)
    close(run(*inputs, dtype, "cuda"), run(*inputs, torch.float64, "cpu"), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_in_place(dtype):
    core, factors, base, _ = problem((256, 64, 3, 3), (16, 8, 3, 3), dtype)
    wide = torch.promote_types(dtype, torch.float32)
    core, *factors = (t.to("cuda", wide) for t in (core, *factors))
    base = base.to("cuda", dtype)
    expected = ts.tucker_compose(core, factors, base=base)
    assert torch.equal(ts.tucker_compose(core, factors, base=base, out=base), expected)


def test_only_the_gradients_that_are_asked_for():
    core, factors, base, _ = problem((30, 20, 3), (3, 5, 2), torch.float64)
    whole = [t.cuda() for t in (core, *factors, base)]
    for need in range(1, 32):
        leaves = [t.clone().requires_grad_(bool(need >> i & 1)) for i, t in enumerate(whole)]
        ts.tucker_compose(leaves[0], leaves[1:4], base=leaves[4]).sum().backward()
        assert [leaf.grad is not None for leaf in leaves] == [bool(need >> i & 1) for i in range(5)]


def test_gradcheck():
    core, factors, base, _ = problem((4, 3, 2), (2, 2, None), torch.float64)
    inputs = [t.cuda().requires_grad_() for t in (core, *factors[:2], base)]
    assert torch.autograd.gradcheck(lambda c, u, v, b: ts.tucker_compose(c, [u, v, None], base=b), inputs)


def test_same_bits_every_time():
    inputs = problem((256, 128, 3, 3), (16, 8, 3, 3), torch.float32)
    first, second = (run(*inputs, torch.float32, "cuda") for _ in range(2))
    assert helpers.same(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    core, factors, base, dout = problem((12, 8, 3), (3, 4, None), torch.float32)
    core, *lists = (t.float().cuda() for t in (core, *factors[:2], torch.empty(0)))
    base, dout = base.to("cuda", dtype), dout.to("cuda", dtype)
    torch.library.opcheck(OP.tucker_compose, (core.clone().requires_grad_(), lists, [base], 0.5))
    torch.library.opcheck(OP.tucker_compose_backward, (dout, core, lists, 0.5, 0b0101))
    torch.library.opcheck(OP.tucker_compose_out, (core, lists, [base], 0.5, torch.empty_like(base)))
