"""What each of two processes asks of Trion and CoSO: with sharded parameters each is one process, up to rounding."""

import functools

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers import close, normal
from low_rank_checks import net, trained, whole
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from torch_subspace.lowrank import CoSO, Trion

TRIONS = ({"rank": 3}, {"rank": 1, "adjust_lr_fn": "match_rms_adamw"}, {"rank": 40})  # the last: of whole sides
COSOS = ({"rank": 2, "sketch_rank": 3}, {"rank": 3, "sketch_rank": 2, "every": 2}, {"rank": 4, "sketch_rank": 20},
         {"rank": 8, "sketch_rank": 200, "weight_decay": 0.1})  # the last two: all rows of some, and all columns


def sharded(mesh, make):
    model = net()
    fully_shard(model, mesh=mesh)
    return model, make(model.parameters())


def alike(share, mesh, make, tasks):
    """A net, in `tasks` of four steps each; the optimiser of the sharded one."""
    one = net()
    expected, (model, optimizer) = make(one.parameters()), sharded(mesh, make)
    for task in range(tasks):
        truth = trained(one, expected, (0, 1), first=4 * task)
        close(trained(model, optimizer, share, first=4 * task), truth, 1e-6)
        if tasks > 1:
            expected.consolidate()
            optimizer.consolidate()
    return model, optimizer


def checkpoints(share, mesh, make, folder, model, optimizer):
    """What is loaded from shards goes on as what has been saved."""
    held = dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer)))
    dcp.save(held, checkpoint_id=folder)
    expected = trained(model, optimizer, share, first=9)
    other, again = sharded(mesh, make)
    trained(other, again, share, 1)  # what is to be loaded has to be there
    held = dict(zip(("model", "optimizer"), states.get_state_dict(other, again)))
    dcp.load(held, checkpoint_id=folder)
    states.set_state_dict(other, again, model_state_dict=held["model"], optim_state_dict=held["optimizer"])
    close(trained(other, again, share, first=9), expected, 1e-12)


def stacks(mesh, make, tasks):
    """Three experts, two here and one there, of which one has no gradient."""
    results = []
    for split in (False, True):
        placed = functools.partial(distribute_tensor, device_mesh=mesh, placements=[Shard(0)]) if split else torch.clone
        p = nn.Parameter(placed(normal(3, 8, 12)))
        optimizer = make([p])
        for i in range(3 * tasks):
            p.grad = placed(normal(3, 8, 12, seed=i) * torch.tensor([1.0, 0, 1])[:, None, None])
            optimizer.step()
            if tasks > 1 and i % 3 == 2:
                optimizer.consolidate()
        results.append([whole(p.detach()), *([optimizer.memory(p)] if tasks > 1 else [])])
    close(results[1], results[0], 1e-7)


def not_finite(mesh, make, rank):
    p = nn.Parameter(distribute_tensor(normal(8, 12), mesh, [Shard(0)]))
    p.grad = distribute_tensor(normal(8, 12, seed=1), mesh, [Shard(0)])
    if rank:
        p.grad.to_local()[0, 0] = float("nan")
    optimizer = make([p])
    with pytest.warns(RuntimeWarning, match="non-finite gradient"):
        optimizer.step()
    assert torch.equal(whole(p.detach()), normal(8, 12)) and optimizer.skipped == 1
    columns = nn.Parameter(distribute_tensor(normal(8, 12), mesh, [Shard(1)]))
    columns.grad = distribute_tensor(normal(8, 12), mesh, [Shard(1)])
    name = type(optimizer).__name__
    with pytest.raises(RuntimeError, match=f"{name}: a DTensor must be sharded along dimension 0"):
        make([columns]).step()


def all_checks(rank, folder):
    share, mesh = (rank, 2), init_device_mesh("cpu", (2,))
    for options in TRIONS:
        make = functools.partial(Trion, lr=0.02, **options)
        model, optimizer = alike(share, mesh, make, 1)
    buffer = optimizer.state[model[2].weight]["momentum_buffer"]
    assert isinstance(buffer, DTensor) and buffer.placements == (Shard(0),)
    assert optimizer.state_bytes() < 0.6 * sum(p.numel() * 8 for p in model.parameters()) + 400
    checkpoints(share, mesh, make, f"{folder}/trion", model, optimizer)
    stacks(mesh, functools.partial(Trion, rank=3), 1)
    not_finite(mesh, functools.partial(Trion, rank=3), rank)
    for options in COSOS:
        make = functools.partial(CoSO, lr=1e-2, **options)
        model, optimizer = alike(share, mesh, make, 2)
        assert optimizer.memory(model[2].weight).shape[-1] > 0
    checkpoints(share, mesh, make, f"{folder}/coso", *alike(share, mesh, make, 1))
    stacks(mesh, functools.partial(CoSO, lr=1e-2, rank=3, sketch_rank=4), 2)
    not_finite(mesh, functools.partial(CoSO, rank=3), rank)
