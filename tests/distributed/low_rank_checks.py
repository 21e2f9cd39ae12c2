"""What each of two processes asks of LowRankAdamW: it is one process with the joined batch, replicated or sharded."""

import copy
import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import close, normal, same
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from torch_subspace.lowrank import LowRankAdamW
from torch_subspace.lowrank.projectors import PROJECTORS

STEPS = 4


def net():
    """Odd numbers of rows: a convolution and a layer of more columns than rows, one of more rows, and AdamW's own."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 7, 3), nn.Flatten(), nn.Linear(7 * 16, 9), nn.Tanh(), nn.Linear(9, 31), nn.Tanh(),
                         nn.Linear(31, 2)).double()


def batch(step):
    return normal(8, 1, 6, 6, seed=step), normal(8, 2, seed=step + 100)


def trained(model, optimizer, share, steps=STEPS, first=0):
    """Of (rank, world) the share of the rows; the parameters then."""
    rank, world = share
    for i in range(first, first + steps):
        x, y = (t.chunk(world)[rank] for t in batch(i))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step()
    return [whole(p.detach()).clone() for p in model.parameters()]


def whole(t):
    return t.full_tensor() if hasattr(t, "placements") else t


def replicas(share):
    """To the bit the same everywhere, and to rounding one process."""
    expected = net()
    expected = trained(expected, LowRankAdamW(expected.parameters(), rank=3, error_feedback="int8"), (0, 1))
    model = DistributedDataParallel(net())
    found = trained(model, LowRankAdamW(model.parameters(), rank=3, error_feedback="int8"), share)
    close(found, expected, 1e-6)
    for p in found:
        other = [torch.empty_like(p) for _ in range(2)]
        dist.all_gather(other, p)
        assert torch.equal(*other)


def shards(share, mesh, folder):
    for projector in PROJECTORS:
        for feedback in (None, "int8"):
            make = functools.partial(LowRankAdamW, lr=1e-2, rank=3, projector=projector, every=2,
                                     error_feedback=feedback)
            expected, model = net(), net()
            expected = trained(expected, make(expected.parameters()), (0, 1))
            fully_shard(model, mesh=mesh)
            optimizer = make(model.parameters())
            close(trained(model, optimizer, share), expected, 1e-6)
    rows, columns = (optimizer.state[model[i].weight] for i in (2, 4))  # 9 x 112, 31 x 9
    assert rows["exp_avg"].shape == (112, 3) and not hasattr(rows["exp_avg"], "placements")
    assert columns["exp_avg"].shape == (31, 3) and columns["exp_avg"].placements == (Shard(0),)
    assert all(s["error"].placements == (Shard(0),) for s in (rows, columns))
    assert optimizer.state_bytes() < 8 * sum(p.numel() for p in model.parameters())
    gone_on_from(share, mesh, model, optimizer, make, folder)


def gone_on_from(share, mesh, model, optimizer, make, folder):
    """A checkpoint in shards, bit for bit; and one that is gathered."""
    held = dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer)))
    dcp.save(held, checkpoint_id=f"{folder}/sharded")
    options = states.StateDictOptions(full_state_dict=True)
    full = copy.deepcopy(states.get_state_dict(model, optimizer, options=options))  # which holds steps themselves
    expected = trained(model, optimizer, share, first=STEPS)
    for gathered in (False, True):
        other = net()
        fully_shard(other, mesh=mesh)
        again = make(other.parameters())
        if gathered:
            states.set_state_dict(other, again, model_state_dict=full[0], optim_state_dict=full[1], options=options)
        else:
            trained(other, again, share, 1)  # what is to be loaded has to be there
            held = dict(zip(("model", "optimizer"), states.get_state_dict(other, again)))
            dcp.load(held, checkpoint_id=f"{folder}/sharded")
            states.set_state_dict(other, again, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
        assert same(trained(other, again, share, first=STEPS), expected)


def experts(share, mesh):
    """Whole matrices in each process, and some others of a gradient that is not finite."""
    start, results = normal(3, 8, 12), []
    for p in (nn.Parameter(start.clone()), nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))):
        optimizer = LowRankAdamW([p], rank=2, side="columns")
        for i in range(3):
            grad = normal(3, 8, 12, seed=i)
            p.grad = distribute_tensor(grad, mesh, [Shard(0)]) if hasattr(p, "placements") else grad
            optimizer.step()
        results.append(whole(p.detach()))
    close(results[1], results[0], 1e-9)
    p = nn.Parameter(distribute_tensor(start[0].clone(), mesh, [Shard(0)]))
    p.grad = distribute_tensor(start[1].clone(), mesh, [Shard(0)])
    if share[0]:
        p.grad.to_local()[0, 0] = float("nan")
    optimizer = LowRankAdamW([p], rank=2, projector="cosine", every=2)
    with pytest.warns(RuntimeWarning, match="non-finite gradient"):
        optimizer.step()
    assert torch.equal(whole(p.detach()), start[0]) and optimizer.skipped == 1


def refused(mesh):
    p = nn.Parameter(distribute_tensor(normal(8, 12), mesh, [Shard(1)]))
    p.grad = distribute_tensor(normal(8, 12), mesh, [Shard(1)])
    with pytest.raises(RuntimeError, match="LowRankAdamW: a DTensor must be sharded along dimension 0"):
        LowRankAdamW([p], rank=2).step()


def all_checks(rank, folder):
    share, mesh = (rank, 2), init_device_mesh("cpu", (2,))
    replicas(share)
    shards(share, mesh, folder)
    experts(share, mesh)
    refused(mesh)
