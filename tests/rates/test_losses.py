"""Coding-rate losses: their signs, reductions and views, and process groups against one process."""

import math

import pytest
import torch
from helpers import close, in_two_processes, normal
from torch.nn.functional import normalize

import torch_subspace as ts


def points(n=40, d=6, views=(), seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*views, n, d, generator=g, dtype=dtype), dim=-1)


def half_logdet(a):
    return torch.linalg.cholesky(a).diagonal(dim1=-2, dim2=-1).log().sum(-1)


def rate(z, eps):
    n, d = z.shape
    return half_logdet(torch.eye(d, dtype=z.dtype) + d / (n * eps) * z.mT @ z)


def soft_rate(z, weights, eps):
    n, d = z.shape
    total = 0
    for w in weights.unbind(-1):
        t = w.sum()
        if t > 0:
            total = total + t / n * half_logdet(torch.eye(d, dtype=z.dtype) + d / (t * eps) * (w[:, None] * z).mT @ z)
    return total


LABELS = torch.arange(40) % 3


class TestValues:
    def test_coding_rate_loss(self):
        z = points()
        assert torch.allclose(ts.CodingRateLoss(eps=0.2)(z), -rate(z, 0.2), rtol=1e-12)

    def test_mcr2_loss(self):
        z = points()
        one_hot = torch.nn.functional.one_hot(LABELS).double()
        expected = soft_rate(z, one_hot, 0.5) - rate(z, 0.5)
        assert torch.allclose(ts.MCR2Loss()(z, LABELS), expected, rtol=1e-12)
        assert torch.allclose(ts.MCR2Loss()(z, one_hot), expected, rtol=1e-12)

    def test_mlc_loss(self):
        z, c = points(), points(d=5, seed=1)
        loss = ts.MLCLoss(eps=0.3, eta=0.15, reg=0.05)
        gamma = loss.membership(c)
        assert torch.allclose(gamma.sum(0), torch.ones(40, dtype=torch.float64), atol=1e-5)
        assert torch.allclose(gamma, gamma.mT, atol=1e-12)
        expected = soft_rate(z, gamma, 0.3) - rate(z, 0.3) + 0.025 * gamma.square().sum()
        assert torch.allclose(loss(z, c), expected, rtol=1e-10)

    def test_rows_of_c_are_normalised(self):
        z, c = points(), points(d=5, seed=1)
        assert torch.allclose(ts.MLCLoss()(z, c), ts.MLCLoss()(z, 7 * c), rtol=1e-10)

    @pytest.mark.parametrize("mode", ["implicit", "cpp"])
    @pytest.mark.parametrize("size", [1e-30, 1e-20, 1e19, 1e30])
    def test_the_unit_of_c_does_not_matter(self, size, mode):
        z, loss, weight = points(), ts.MLCLoss(eps=0.3, eta=0.3, mode=mode), normal(40, 40)
        c = points(d=5, seed=1) * torch.linspace(0.1, 10, 40, dtype=torch.float64)[:, None]

        def found(z, c):
            c = c.detach().requires_grad_()
            gamma, total = loss.membership(c), loss(z, c)
            of_gamma = torch.autograd.grad((weight.to(gamma) * gamma).sum(), c)
            return gamma, total, *of_gamma, *torch.autograd.grad(total, c)

        gamma, total, *gradients = found(z.float(), (c * size).float())
        expected = found(z, c)
        close([gamma, total, *(dc.double() * size for dc in gradients)], expected, 1e-4)
        close([torch.vmap(loss.membership)((c * size).float()[None])[0]], expected[:1], 1e-5)

    def test_a_row_of_zeros_has_no_gradient(self):
        c = points(d=5, seed=1)
        c[3] = 0
        c.requires_grad_()
        (dc,) = torch.autograd.grad(ts.MLCLoss().membership(c).square().sum(), c)
        assert dc.isfinite().all() and dc.any() and not dc[3].any()

    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_views(self, reduction):
        z, c = points(views=(3,)), points(d=5, views=(3,), seed=1)
        for make, extra in ((ts.CodingRateLoss, ()), (ts.MCR2Loss, (LABELS,)), (ts.MLCLoss, (c,))):
            each = torch.stack([make()(z[v], *(e[v] if e.dim() == 3 else e for e in extra)) for v in range(3)])
            expected = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
            assert torch.allclose(make(reduction=reduction)(z, *extra), expected, rtol=1e-10)

    def test_gradients(self):
        z = points(12, 4).requires_grad_()
        assert torch.autograd.gradcheck(ts.CodingRateLoss(), (z,))
        assert torch.autograd.gradcheck(lambda z: ts.MCR2Loss()(z, LABELS[:12]), (z,))

    def test_gradients_through_the_projection(self):
        z, c = points(10, 4).requires_grad_(), points(10, 3, seed=1).requires_grad_()
        loss = ts.MLCLoss(eps=0.3, eta=0.5)
        loss.membership = lambda c: ts.sinkhorn((normalize(c, dim=-1) @ normalize(c, dim=-1).mT).abs(), eta=0.5,
                                                tol=1e-13, max_iter=1000, symmetric=True)
        assert torch.autograd.gradcheck(loss, (z, c), rtol=1e-4)

    def test_a_loss_goes_down(self):
        torch.manual_seed(0)
        z, c = points(60, 8, dtype=torch.float32).requires_grad_(), points(60, 8, seed=1, dtype=torch.float32)
        c.requires_grad_()
        opt, loss = torch.optim.SGD([z, c], lr=0.1), ts.MLCLoss()
        first = loss(normalize(z, dim=-1), c).item()
        for _ in range(10):
            opt.zero_grad()
            last = loss(normalize(z, dim=-1), c)
            last.backward()
            opt.step()
        assert last.item() < first

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_inputs(self, dtype):
        z, c = points(dtype=torch.float32).to(dtype), points(d=5, seed=1, dtype=torch.float32).to(dtype)
        for loss, extra in ((ts.CodingRateLoss(), ()), (ts.MCR2Loss(), (LABELS,)), (ts.MLCLoss(), (c,))):
            found, expected = loss(z, *extra), loss(z.double(), *(e.double() if e.dim() == 2 else e for e in extra))
            assert found.dtype == torch.float32
            assert abs(found.item() / expected.item() - 1) < 1e-4

    def test_autocast_rounds_nothing(self):
        z, c = (t.requires_grad_() for t in (points(dtype=torch.float32), points(d=5, seed=1, dtype=torch.float32)))
        for loss, extra in ((ts.CodingRateLoss(), ()), (ts.MCR2Loss(), (LABELS,)), (ts.MLCLoss(), (c,)),
                            (ts.MLCLoss(mode="cpp"), (c,))):
            leaves = [z, *(e for e in extra if e is c)]
            expected = loss(z, *extra)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                found = loss(z, *extra)
                assert torch.equal(found, expected)
                gradients = torch.autograd.grad(found, leaves)
            assert all(map(torch.equal, gradients, torch.autograd.grad(expected, leaves)))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert ts.MLCLoss().membership(c).dtype == torch.float32

    def test_compile(self):
        z, c = points(dtype=torch.float32), points(d=5, seed=1, dtype=torch.float32)
        for loss, extra in ((ts.CodingRateLoss(), ()), (ts.MCR2Loss(), (LABELS,)), (ts.MLCLoss(), (c,))):
            assert torch.allclose(torch.compile(loss, fullgraph=True)(z, *extra), loss(z, *extra), rtol=1e-5)


class TestBadInput:
    @pytest.mark.parametrize("make", [ts.CodingRateLoss, ts.MCR2Loss, ts.MLCLoss])
    def test_arguments(self, make):
        for eps in (0, -1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match="eps must be positive"):
                make(eps=eps)
        with pytest.raises(TypeError, match="eps must be a number"):
            make(eps="0.5")
        with pytest.raises(ValueError, match="reduction must be one of"):
            make(reduction="max")

    def test_mlc(self):
        with pytest.raises(ValueError, match="eta must be positive"):
            ts.MLCLoss(eta=0)
        with pytest.raises(ValueError, match="reg must be finite and >= 0"):
            ts.MLCLoss(reg=-1)
        with pytest.raises(ValueError, match="mode must be"):
            ts.MLCLoss(mode="exact")
        with pytest.raises(ValueError, match="same points"):
            ts.MLCLoss()(points(), points(30))
        assert ts.MLCLoss(reg=0)(points(), points()).isfinite()

    def test_negative_labels(self):
        with pytest.raises(ValueError, match="labels must be 0 or more"):
            ts.MCR2Loss()(points(), LABELS - 1)


# ------------------------------------------------------------------------------------------------ two processes


PARTS = [(0, 16, 33), (0, 5, 33)]


def worker(rank, folder):
    """Losses and gradients of this rank's part, for both ways to part, and a step under DistributedDataParallel."""
    torch.set_num_threads(1)
    found = []
    for parts in PARTS:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store{parts[1]}", rank=rank,
                                             world_size=2)
        group = torch.distributed.group.WORLD
        x, labels, weights = (t[parts[rank] : parts[rank + 1]] for t in data())
        for make, extra in ((ts.CodingRateLoss, ()), (ts.MCR2Loss, (labels,)), (ts.MCR2Loss, (weights,)),
                            (ts.MLCLoss, "c")):
            torch.manual_seed(0)
            net = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(6, 9, bias=False).double())
            z, c = normalize(net(x), dim=-1).split([5, 4], -1)
            loss = make(process_group=group)(z, *((c,) if extra == "c" else extra))
            loss.backward()
            found.append((loss.detach(), net.module.weight.grad))
        torch.distributed.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


def data():
    return points(33), torch.arange(33) % 4, points(33, 3, seed=2).abs()


def test_two_processes_have_the_loss_and_the_gradient_of_the_whole_batch(tmp_path):
    """Also with parts of different sizes, and classes that one process does not see."""
    in_two_processes(worker, str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    x, labels, weights = data()
    for i, (make, extra) in enumerate(((ts.CodingRateLoss, ()), (ts.MCR2Loss, (labels,)), (ts.MCR2Loss, (weights,)),
                                       (ts.MLCLoss, "c"))):
        torch.manual_seed(0)
        net = torch.nn.Linear(6, 9, bias=False).double()
        z, c = normalize(net(x), dim=-1).split([5, 4], -1)
        loss = make()(z, *((c,) if extra == "c" else extra))
        loss.backward()
        for rank in range(2):
            for parts, (value, grad) in zip(PARTS, results[rank][i::4]):
                assert torch.allclose(value, loss, rtol=1e-9), (make, rank, parts)
                assert torch.allclose(grad, net.weight.grad, rtol=1e-6, atol=1e-9), (make, rank, parts)


def test_a_group_checks_what_it_is_given(tmp_path):
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        loss = ts.MCR2Loss(process_group=torch.distributed.group.WORLD)
        with pytest.raises(TypeError, match="membership must be a tensor"):
            loss(points(), None)
        for wrong in (LABELS[:1], points(1, 3).abs(), LABELS - 1, -points(40, 3).abs()):
            with pytest.raises(ValueError, match="coding_rate: "):
                loss(points(), wrong)
        with pytest.raises(TypeError, match="int64"):
            loss(points(), LABELS.int())
        with pytest.raises(ValueError, match="z must have points in one process at least"):
            loss(points()[:0], LABELS[:0])
        with pytest.raises(ValueError, match="n > 0"):
            ts.MLCLoss(process_group=torch.distributed.group.WORLD)(points()[:0], points()[:0])
    finally:
        torch.distributed.destroy_process_group()
