"""Tucker convolutions on a GPU against the CPU kernels in float64. Never run so far: no GPU was at hand."""

import functools

import helpers
import pytest
import torch

import torch_subspace as ts
import torch_subspace.tucker.tucker_conv_forms as forms

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

OP = torch.ops.torch_subspace
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = [(1, 1, 1, 1), (2, 6, 9, 3), (3, 70, 300, 17), (8, 64, 3136, 16), (2, 2000, 49, 9)]  # b, n, p, r
close = functools.partial(helpers.close, floor=1e-2, device="cuda")


def problem(b, n, p, r, dtype, last):
    """x, f, z, w, representable in dtype (x) and float32 (the rest), on the CPU in float64."""
    g = torch.Generator().manual_seed(b + n + p + r)
    x, f, z, w = (torch.randn(*s, generator=g) for s in ((b, n, p), (n, r), (b, r, p), (b, r, p)))
    x, z, w = (t.mT.contiguous() if last else t for t in (x.to(dtype), z, w))
    return [t.double() for t in (x, f, z, w)]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_pointwise_ends(shape, dtype, last, dropout):
    x, f, z, w = problem(*shape, dtype, last)
    seed = torch.tensor([12345])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ours = [x.to("cuda", dtype), *(t.to("cuda", wide) for t in (f, z, w))]
    expected = OP.tucker_project(x, f, w, seed, dropout, last, True, True)
    close(OP.tucker_project(ours[0], ours[1], ours[3], seed.cuda(), dropout, last, True, True), expected,
          TOLERANCE[torch.float64 if dtype == torch.float64 else torch.float32])
    OP.tucker_expand_(x, z, f, seed, dropout, last)
    OP.tucker_expand_(ours[0], ours[2], ours[1], seed.cuda(), dropout, last)
    close([ours[0]], [x], TOLERANCE[dtype])


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", ["chain", "composed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_values_and_gradients(dtype, form, transposed, last, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    g = torch.Generator().manual_seed(1)
    shapes = ((2, 16, 9, 8), (16, 24, 3, 3), (24,), (4, 5, 3, 3), (16, 4), (24, 5))
    if not transposed:
        shapes = ((2, 16, 9, 8), (24, 16, 3, 3), (24,), (5, 4, 3, 3), (24, 5), (16, 4))
    inputs = [torch.randn(*s, generator=g).to(dtype).double() for s in shapes]
    results = []
    for device, to in (("cpu", torch.float64), ("cuda", dtype)):
        leaves = [t.to(device, to) for t in inputs]
        if last:
            leaves[:2] = [t.contiguous(memory_format=torch.channels_last) for t in leaves[:2]]
        x, w, b, core, u, v = (t.requires_grad_() for t in leaves)
        y = ts.tucker_conv(x, w, b, core, [u, v, None, None], stride=2, padding=1, transposed=transposed, form=form)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(device, to)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    close(results[1], results[0], TOLERANCE[dtype])


@pytest.mark.parametrize("form, groups", [("chain", 1), ("composed", 1), ("composed", 16)])
def test_a_zero_core_gives_the_base_bit_for_bit(form, groups):
    x, w = torch.randn(2, 16, 9, 8, device="cuda"), torch.randn(16, 16 // groups, 3, 3, device="cuda")
    core, u, v = (torch.zeros(4, 1 if groups > 1 else 4, 3, 3), torch.randn(16, 4),
                  torch.randn(16 // groups, 1 if groups > 1 else 4))
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, benchmark=False):
        y = ts.tucker_conv(x, w, None, core.cuda(), [u.cuda(), v.cuda(), None, None], form=form, groups=groups)
        assert torch.equal(y, torch.nn.functional.conv2d(x, w, None, groups=groups))


def test_the_mask_is_the_cpus():
    x, seed = torch.zeros(2, 3, 50, 40), torch.tensor([-7])
    for t in (x, x.contiguous(memory_format=torch.channels_last)):
        assert torch.equal(forms.mask(t.cuda(), seed.cuda(), 0.3).cpu(), forms.mask(t, seed, 0.3))


def test_no_waiting():
    x, w = torch.randn(2, 16, 9, 8, device="cuda"), torch.randn(16, 16, 3, 3, device="cuda")
    leaves = [t.cuda().requires_grad_() for t in (torch.randn(4, 4, 3, 3), torch.randn(16, 4), torch.randn(16, 4))]

    def step():
        y = ts.tucker_conv(x, w, None, leaves[0], [*leaves[1:], None, None], form="chain", dropout=0.1)
        torch.autograd.grad(y.sum(), leaves)

    step()  # the first call looks for an algorithm
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def test_gradcheck():
    x, w = torch.randn(1, 3, 4, 4).double().cuda(), torch.randn(2, 3, 2, 2).double().cuda()
    leaves = [torch.randn(*s).double().cuda().requires_grad_() for s in ((2, 2, 2, 2), (2, 2), (3, 2))]
    for form in ("chain", "composed"):
        assert torch.autograd.gradcheck(
            lambda c, u, v, f=form: ts.tucker_conv(x, w, None, c, [u, v, None, None], form=f), leaves, nondet_tol=1e-10)
