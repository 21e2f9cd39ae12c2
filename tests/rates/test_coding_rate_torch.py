"""The coding rate as an op of torch: autograd, torch.func, torch.compile, autocast and threads."""

import pytest
import torch
from coding_rate_cases import BACKWARD, OP, TOLERANCE, labels_of, ours, points, truth
from helpers import close, threads

import torch_subspace as ts
from torch_subspace.rates.coding_rate import _groups as groups


@pytest.mark.parametrize("n, d, classes", [(7, 5, 0), (5, 9, 0), (17, 3, 0), (14, 4, 3), (9, 6, 5)])
def test_derivatives(n, d, classes):
    z, labels = points(n, d).requires_grad_(), labels_of(n, classes)
    assert torch.autograd.gradcheck(lambda z: ts.coding_rate(z, labels), z)
    assert torch.autograd.gradgradcheck(lambda z: ts.coding_rate(z, labels), z)
    both = torch.stack([z.detach(), z.detach().flip(0)]).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda z: ts.coding_rate(z, labels), both, fast_mode=True)


def test_second_derivatives_with_labels_of_each_view():
    z = torch.stack([points(11, 4, seed=v) for v in range(3)]).requires_grad_()
    labels = torch.stack([labels_of(11, 3, seed=v) for v in range(3)])
    assert torch.autograd.gradgradcheck(lambda z: ts.coding_rate(z, labels), z, fast_mode=True)


def test_torch_func_takes_the_plain_formula():
    z, labels = points(12, 5), labels_of(12, 3)
    v = torch.randn_like(z)
    for some in (None, labels):
        rate, dz = truth(z, some)
        close([torch.func.grad(lambda z, g=some: ts.coding_rate(z, g))(z)], [dz], 1e-11)
        out, tangent = torch.func.jvp(lambda z, g=some: ts.coding_rate(z, g), (z,), (v,))
        close((out, tangent), (rate, (dz * v).sum()), 1e-11)
        views = torch.stack([z, 2 * z])
        close([torch.vmap(lambda z, g=some: ts.coding_rate(z, g))(views)], [ts.coding_rate(views, some)], 1e-11)
    many = torch.stack([labels, labels.flip(0)])
    close([torch.vmap(ts.coding_rate, (None, 0))(z, many)], [ts.coding_rate(z.expand(2, 12, 5), many)], 1e-11)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n, d, size, keep", [(9, 4, 0, True), (4, 9, 0, False), (12, 4, 4, True), (9, 5, 2, False)])
def test_opcheck(n, d, size, keep, dtype):
    """With groups of d points the whole factor is used; else its rest is left as it was found."""
    z = torch.stack([points(n, d, dtype), points(n, d, dtype, seed=1)])
    order, start = (t.contiguous() for t in groups(z, torch.arange(n)[None] // size if size else None))
    torch.library.opcheck(OP, (z.requires_grad_(), order, start, 0.5, keep))
    factor = OP(z.detach(), order, start, 0.5, keep)[1]
    torch.library.opcheck(BACKWARD, (torch.ones(2, dtype=dtype), z.detach(), order, start, factor, 0.5))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(ts.rate_reduction, fullgraph=True, dynamic=dynamic)
    for n, d in ((40, 20), (20, 40), (50, 30)):
        labels = labels_of(n, 4)
        for z in (points(n, d, torch.float32), torch.stack([points(n, d, torch.float32)] * 2)):
            a, b = z.clone().requires_grad_(), z.clone().requires_grad_()
            loss = compiled(a, labels)
            expected = ts.rate_reduction(b, labels)
            assert torch.allclose(loss, expected, atol=1e-6)
            loss.sum().backward(), expected.sum().backward()
            assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_autocast_leaves_float32_alone():
    z, labels = points(30, 12, torch.float32), labels_of(30, 3)
    expected = ts.coding_rate(z, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ts.coding_rate(z, labels), expected)
        rate = ts.coding_rate(z.bfloat16(), labels)
    assert rate.dtype == torch.float32 and torch.equal(rate, ts.coding_rate(z.bfloat16(), labels))


@pytest.mark.parametrize("n, d, classes", [(2000, 40, 0), (700, 310, 0), (310, 700, 2), (900, 64, 30), (3000, 130, 2)])
def test_same_bits_for_any_number_of_threads(n, d, classes):
    z, labels = points(n, d, torch.float32), labels_of(n, classes)
    z[::3] *= 30  # some of it in double
    results = []
    for _ in threads(1, 2, 3, 16):
        results.append(ours(z, labels))
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(results[0], r))


def test_it_trains():
    """Gradient ascent on the rate reduction turns mixed classes into orthogonal ones."""
    torch.manual_seed(0)
    labels = torch.arange(60) % 3
    free = torch.randn(60, 12, requires_grad=True)
    optimizer = torch.optim.Adam([free], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        (-ts.rate_reduction(torch.nn.functional.normalize(free, dim=-1), labels, eps=0.1)).backward()
        optimizer.step()
    z = torch.nn.functional.normalize(free.detach(), dim=-1)
    similar = (z @ z.mT).abs()
    same = labels[:, None] == labels
    assert similar[~same].max() < 0.05 < 0.2 < similar[same].mean()
