"""What each of some processes asks of DistributedDataParallel: it is one process with the joined batch."""

import contextlib
import functools

import pytest
import torch
import torch.distributed as dist
from helpers import close, normal
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import torch_subspace as ts

CLASSES, FEATURES, STEPS = 5, 8, 3
RAGGED = (2, 1, 3, 1, 2)
OPTIMISERS = {
    "sgd": functools.partial(ts.RiemannianSGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": functools.partial(ts.RiemannianAdamW, lr=0.01, amsgrad=True),
}


class Model(nn.Module):
    """The loss belongs to the forward, after which DistributedDataParallel averages gradients."""

    def __init__(self, dims=2):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, FEATURES)).double()
        self.head = ts.GrassmannLinear(FEATURES, CLASSES, dims, dtype=torch.float64)

    def forward(self, x, y=None, **options):
        z = self.body(x)
        return self.head(z) if y is None else self.head.loss(z, y, **options)


def batch(rows, seed=1):
    labels = torch.randint(CLASSES, (rows,), generator=torch.Generator().manual_seed(seed))
    return normal(rows, 6, seed=seed), labels


def part(group, *tensors):
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    return [t.chunk(size)[rank] for t in tensors]


def uneven(group, *tensors):
    """Fewer and fewer rows; the last of four processes has none at all."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    ends = [0, *torch.linspace(0.7, 1, size - 1).mul(len(tensors[0])).ceil().int().tolist(), len(tensors[0])]
    return [t[ends[rank] : ends[rank + 1]] for t in tensors]


def trained(model, make, step, parameters=None):
    opt = make((parameters or ts.param_groups)(model))
    for i in range(STEPS):
        opt.zero_grad()
        step(model, i)
        opt.step()
    return opt


def same_as_alone(group, build, make, alone, shared, parameters=None, **options):
    """Weights and the optimiser's state, after steps of a model whole and in DistributedDataParallel."""
    models = build(), build()
    wrapped = DistributedDataParallel(models[1], process_group=group, **options)
    opts = [trained(model, make, step, parameters) for model, step in zip((models[0], wrapped), (alone, shared))]
    for p, q in zip(models[1].parameters(), models[0].parameters()):
        close(p, q, 1e-10)
        for key, t in opts[0].state[q].items() if q in opts[0].state else ():
            close(opts[1].state[p][key], t, 1e-9, floor=1e-6)
    assert opts[1].skipped_frames == 0


# ------------------------------------------------------------------------------------------- each takes a group


def steps(group):
    def alone(model, i):
        x, y = batch(24, i)
        if i % 2:
            nn.functional.cross_entropy(model(x), y).backward()
        else:
            model(x, y, label_smoothing=0.1).backward()

    def shared(model, i):
        x, y = part(group, *batch(24, i))
        if i % 2 and not model.static_graph:
            nn.functional.cross_entropy(model(x), y).backward()
        else:
            model(x, y, label_smoothing=0.1 * (not i % 2)).backward()

    for make in OPTIMISERS.values():
        for dims, options in ((2, {"static_graph": True}), (RAGGED, {"gradient_as_bucket_view": True})):
            same_as_alone(group, functools.partial(Model, dims), make, alone, shared, **options)


def accumulation(group):
    """torch's no_sync asserts in the first backward of a static graph, whatever the model."""
    def alone(model, i):
        model(*batch(48, i)).backward()

    def shared(model, i):
        x, y = batch(48, i)
        for j in range(3):
            apart = j < 2 and (i > 0 or not model.static_graph)
            with model.no_sync() if apart else contextlib.nullcontext():
                (model(*part(group, x[16 * j :][:16], y[16 * j :][:16])) / 3).backward()

    for make in OPTIMISERS.values():
        same_as_alone(group, Model, make, alone, shared)
        same_as_alone(group, functools.partial(Model, RAGGED), make, alone, shared, static_graph=True)


def uneven_batches(group):
    """Sums, divided by what all processes have together; one has no rows."""
    weights = torch.linspace(0.2, 2, CLASSES, dtype=torch.float64)
    options = {"class_weight": weights, "ignore_index": 3, "label_smoothing": 0.1}

    def alone(model, i):
        model(*batch(13, i), **options).backward()

    def shared(model, i):
        x, y = uneven(group, *batch(13, i))
        total = weights[y[y != 3]].sum()
        dist.all_reduce(total, group=group)
        loss = model(x, y, reduction="sum", **options)
        (loss * dist.get_world_size(group) / total).backward()

    for dims in (2, RAGGED):
        same_as_alone(group, functools.partial(Model, dims), OPTIMISERS["sgd"], alone, shared)


def adapters(group):
    """Factors, cores and the head, which is saved whole."""
    def build():
        model = ts.adapt(Model(), ts.TuckerConfig(rank=2, target_modules=r"body\.\d", save_modules=["head"]))
        torch.manual_seed(1)
        for p in ts.adapter_parameters(model)[0]["params"]:
            nn.init.normal_(p, std=0.3)
        return model

    def alone(model, i):
        model(*batch(24, i)).backward()

    def shared(model, i):
        model(*part(group, *batch(24, i))).backward()

    for make in OPTIMISERS.values():
        same_as_alone(group, build, make, alone, shared, ts.adapter_parameters, static_graph=True)
        same_as_alone(group, build, make, alone, shared, lambda model: [p for p in model.parameters()
                                                                        if p.requires_grad])


def rates(group):
    """Losses of the whole batch, twice before a step, where a process has no points at all."""
    def net():
        torch.manual_seed(0)
        return nn.Linear(6, FEATURES, bias=False).double()

    for loss in (ts.CodingRateLoss, ts.MCR2Loss, ts.MLCLoss):
        def total(model, i, group=None, part=lambda *t: t):
            x, y = part(*batch(16, i))
            z = nn.functional.normalize(model(x), dim=-1)
            given = {ts.CodingRateLoss: (z,), ts.MCR2Loss: (z, y), ts.MLCLoss: (z, z[:, :3] + 1)}[loss]  # noqa: B023
            return loss(process_group=group)(*given)  # noqa: B023

        def alone(model, i):
            (total(model, i) + total(model, i + 10)).backward()  # noqa: B023

        def shared(model, i):
            with model.no_sync():
                total(model, i, group, functools.partial(part, group)).backward()  # noqa: B023
            total(model, i + 10, group, functools.partial(uneven, group)).backward()  # noqa: B023

        same_as_alone(group, net, functools.partial(ts.RiemannianSGD, lr=0.1, momentum=0.9), alone, shared,
                      lambda model: model.parameters())


def heads_in_turn(group):
    """A second head that only the first process asks: the others step it alike; then none does, and it stays."""
    class Two(Model):
        def __init__(self):
            super().__init__()
            self.other = ts.GrassmannLinear(FEATURES, 3, 2, dtype=torch.float64)

        def forward(self, x, y, other=False):
            loss = super().forward(x, y)
            return loss + self.other.loss(self.body(x), y % 3) if other else loss

    def alone(model, i):
        x, y = batch(24, i)
        size = dist.get_world_size(group)
        sum(model(*xy, j == 0 and i == 0) for j, xy in enumerate(zip(x.chunk(size), y.chunk(size)))).div(
            size).backward()

    def shared(model, i):
        model(*part(group, *batch(24, i)), dist.get_rank(group) == 0 and i == 0).backward()

    for make in OPTIMISERS.values():
        same_as_alone(group, Two, make, alone, shared, find_unused_parameters=True)


def joined(group):
    """torch's Join: a process that is out of batches waits for the others, as one with a gradient of zero."""
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    counts = (3, 1, 2, 1)[:size]
    alone, shared = Model(), DistributedDataParallel(Model(), process_group=group)
    opts = [ts.RiemannianSGD(ts.param_groups(m), lr=0.1) for m in (alone, shared)]
    for i in range(3):
        opts[0].zero_grad()
        sum(alone(*batch(4, 10 * i + j)) for j, count in enumerate(counts) if i < count).div(size).backward()
        opts[0].step()
    with Join([shared]):
        for i in range(counts[rank]):
            opts[1].zero_grad()
            shared(*batch(4, 10 * i + rank)).backward()
            opts[1].step()
    for p, q in zip(shared.parameters(), alone.parameters()):
        close(p, q, 1e-10)


def not_finite(group):
    """Where one process has a NaN all leave the classes as they are, and count them."""
    model = DistributedDataParallel(Model(), process_group=group)
    before = model.module.head.weight.clone()
    opt = ts.RiemannianSGD([model.module.head.weight], lr=0.1, momentum=0.9)
    x, y = batch(4)
    x[0, 0] = torch.nan if dist.get_rank(group) == 0 else 0
    with pytest.warns(RuntimeWarning, match="non-finite gradient"):
        model(x, y).backward()
        opt.step()
    assert opt.skipped_frames == CLASSES
    assert torch.equal(model.module.head.weight, before)


def all_checks(rank):
    groups = [dist.new_group([0, 1]), dist.group.WORLD]
    for group in groups:
        if rank < dist.get_world_size(group):
            for check in (steps, accumulation, uneven_batches, adapters, rates, heads_in_turn, joined, not_finite):
                check(group)
