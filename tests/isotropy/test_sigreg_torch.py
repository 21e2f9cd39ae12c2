"""SIGReg as an op of torch: autograd, torch.func, torch.compile, autocast, threads and processes."""

import pytest
import torch
from helpers import close, in_two_processes, same, threads
from sigreg_cases import BACKWARD, OP, TOLERANCE, ours, problem, truth

import torch_subspace as ts
from torch_subspace.isotropy import sigreg


@pytest.mark.parametrize("v, n, d, slices, knots", [(1, 5, 3, 4, 5), (2, 4, 6, 3, 18), (1, 1, 1, 1, 2)])
def test_derivatives(v, n, d, slices, knots):
    z, directions = problem(v, n, d, slices)
    z.requires_grad_()

    def loss(z):
        return sigreg(z, directions=directions, knots=knots)

    assert torch.autograd.gradcheck(loss, z)
    assert torch.autograd.gradgradcheck(loss, z)


def test_torch_func_takes_the_plain_formula():
    z, directions = problem(3, 12, 5, 7)
    v = torch.randn_like(z[0])
    loss, _ = truth(z[0], directions)

    def function(z):
        return sigreg(z, directions=directions)

    leaf = z[0].clone().requires_grad_()
    (one,) = torch.autograd.grad(function(leaf), leaf)
    close([torch.func.grad(function)(z[0])], [one], 1e-11)
    close(torch.func.jvp(function, (z[0],), (v,)), (loss, (one * v).sum()), 1e-11)
    close([torch.vmap(function)(z)], [function(z)], 1e-11)
    close([torch.vmap(lambda z: sigreg(z, seed=3))(z)], [sigreg(z, seed=3)], 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("v, n, d, slices, knots", [(2, 9, 4, 3, 17), (1, 3, 2, 70, 19)])
def test_opcheck(v, n, d, slices, knots, dtype):
    z, directions = problem(v, n, d, slices, dtype)
    torch.library.opcheck(OP, (z.clone().requires_grad_(), directions, knots, 0.2))
    torch.library.opcheck(BACKWARD, (OP(z, directions, knots, 0.2), z.clone().requires_grad_(), directions, 0.2))


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_without_graph_breaks(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(lambda z, seed: sigreg(z, num_slices=40, seed=seed), fullgraph=True, dynamic=dynamic)
    for n, d, seed in ((40, 20, 5), (50, 12, 6)):
        a = problem(2, n, d, 1, torch.float32)[0].requires_grad_()
        b = a.detach().clone().requires_grad_()
        loss, expected = compiled(a, seed), sigreg(b, num_slices=40, seed=seed)
        close([loss.detach()], [expected.detach()], 1e-5)
        loss.sum().backward(), expected.sum().backward()
        close([a.grad], [b.grad], 1e-5)
    drawn = torch.compile(sigreg, fullgraph=True, dynamic=dynamic, backend="aot_eager")(a)
    assert drawn.isfinite().all()


def test_autocast_leaves_float32_alone():
    z, directions = problem(2, 40, 12, 30, torch.float32)
    expected = ours(z, directions)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(ours(z, directions), expected)
        drawn = sigreg(z, seed=0)
        loss = sigreg(z.bfloat16(), directions=directions)
    assert torch.equal(drawn, sigreg(z, seed=0))
    assert loss.dtype == torch.float32 and torch.equal(loss, sigreg(z.bfloat16(), directions=directions))


@pytest.mark.parametrize("v, n, d, slices, knots", [(1, 5000, 40, 70, 17), (3, 300, 90, 200, 17), (2, 140, 20, 65, 40)])
def test_same_bits_for_any_number_of_threads(v, n, d, slices, knots):
    z, directions = problem(v, n, d, slices, torch.float32)
    results = [ours(z, directions, knots=knots) for _ in threads(1, 2, 3, 16)]
    assert all(same(results[0], r) for r in results[1:])


def test_it_trains():
    """Points in a far corner become standard normal."""
    torch.manual_seed(0)
    z = (0.1 * torch.randn(400, 6) + 2).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    slower = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 400)
    for step in range(400):
        optimizer.zero_grad()
        loss = sigreg(z, num_slices=32, seed=step)
        loss.backward()
        optimizer.step()
        slower.step()
    found = z.detach()
    assert loss < 1
    close([found.mean(0)], [torch.zeros(6)], 0.15, absolute=True)
    close([found.T.cov()], [torch.eye(6)], 0.35, absolute=True)


# ------------------------------------------------------------------------------------------------ two processes

PARTS = [(0, 16, 33), (0, 0, 33)]
CALLS = [("SIGRegLoss", {}), ("SIGRegLoss", {"views": "pooled", "knots": 20}), ("LeJEPALoss", {}),
         ("LeJEPALoss", {"distance": "mean", "weight": 0.5})]


def data():
    return problem(2, 33, 6, 1, seed=3)[0]


def network():
    torch.manual_seed(0)
    return torch.nn.Linear(6, 9, bias=False).double()


def worker(rank, folder):
    """Losses and gradients of this rank's part, for both ways to part, and a step under DistributedDataParallel."""
    torch.set_num_threads(1)
    found = []
    for parts in PARTS:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store{parts[1]}", rank=rank,
                                             world_size=2)
        group = torch.distributed.group.WORLD
        for name, options in CALLS:
            net = torch.nn.parallel.DistributedDataParallel(network())
            z = net(data()[:, parts[rank] : parts[rank + 1]])
            loss = getattr(ts.isotropy, name)(num_slices=40, process_group=group, **options)(z, seed=5)
            loss.backward()
            found.append((loss.detach(), net.module.weight.grad))
        torch.manual_seed(rank)  # what each would draw is another
        z = data()[:, parts[rank] : parts[rank + 1]]
        found.append((sigreg(z, num_slices=3, process_group=group).sum(), torch.zeros(1)))
        torch.distributed.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


def test_two_processes_have_the_loss_and_the_gradient_of_the_whole_batch(tmp_path):
    """Also with parts of different sizes, and a process without points."""
    in_two_processes(worker, str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for i, (name, options) in enumerate(CALLS):
        net = network()
        loss = getattr(ts.isotropy, name)(num_slices=40, **options)(net(data()), seed=5)
        loss.backward()
        for rank in range(2):
            for value, grad in results[rank][i :: len(CALLS) + 1]:
                close([value, grad], [loss.detach(), net.weight.grad], 1e-9)
    torch.manual_seed(0)
    expected = sigreg(data(), num_slices=3).sum()
    for rank in range(2):
        close([r[0] for r in results[rank][len(CALLS) :: len(CALLS) + 1]], [expected] * 2, 1e-12)


def test_a_group_without_points(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="sigreg: z must have points in one process at least"):
            sigreg(torch.zeros(0, 4), process_group=torch.distributed.group.WORLD)
    finally:
        torch.distributed.destroy_process_group()
