"""A class-parallel head that is called wrongly, or compiled; as class_parallel_checks.py, apart from the tests."""

import pytest
import torch
from class_parallel_cases import RAGGED, batch, head, results
from helpers import close, normal
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import parallelize_module

import torch_subspace as ts


def wrong_input(mesh):
    x, labels = batch()
    shared = ts.distributed.shard_head(head(), mesh)
    for raised, message, call in (
        (ValueError, "must be a parameter that is whole", lambda: ts.distributed.shard_head(shared, mesh)),
        (ValueError, r"target: labels must be in \[0, 7\), got 7", lambda: shared.loss(x, labels + 7 - labels)),
        (ValueError, r"probabilities must be \(10, 7\)", lambda: shared.loss(x, normal(10, 4))),
        (ValueError, "detach them", lambda: shared.loss(x, normal(10, 7).requires_grad_())),
        (ValueError, r"class_weight must be \(7,\)", lambda: shared.loss(x, labels, class_weight=torch.ones(4))),
        (ValueError, "x has 5 features", lambda: shared.loss(normal(10, 5), labels)),
        (TypeError, "x must be a tensor", lambda: shared("word")),
        (RuntimeError, "torch.func", lambda: torch.func.grad(lambda x: shared.loss(x, labels))(x)),
        (RuntimeError, "no second derivative", lambda: torch.autograd.grad(
            shared.loss(x.requires_grad_(), labels), x, create_graph=True)),
        (RuntimeError, "no second derivative", lambda: torch.autograd.grad(
            shared(x).sum(), shared.weight, create_graph=True)),
        (TypeError, "classes are those of a GrassmannLinear, got.*Linear", lambda: parallelize_module(
            nn.Linear(3, 4), mesh, ts.distributed.ClassParallel())),
        (ValueError, "model must have a GrassmannLinear", lambda: ts.distributed.shard_head(nn.Linear(3, 4), mesh)),
        (ValueError, "layouts must be one of", lambda: ts.distributed.ClassParallel(input_layouts=Shard(1))),
    ):
        with pytest.raises(raised, match=message):
            call()


def compiled(rank):
    mesh = init_device_mesh("cpu", (2,))
    x, labels = batch()
    for layouts in ({}, {"input_layouts": Shard(0), "output_layouts": Shard(0)}):
        shared = ts.distributed.shard_head(head(RAGGED), mesh, **layouts)
        fast = torch.compile(shared, backend="aot_eager", fullgraph=True)
        close(results(shared, x, run=fast), results(shared, x), 1e-12)
    for options in ({}, {"sample_rate": 0.5}, {"sample_rate": 0.5, "sparse_grad": True}):
        shared = ts.distributed.shard_head(head(), mesh, **options)
        eager = ts.distributed.shard_head(head(), mesh, **options | {"sparse_grad": False})  # as a graph's always is
        fast = torch.compile(shared.loss, backend="aot_eager", fullgraph=True)
        torch.manual_seed(1)
        expected = results(eager, x, labels, label_smoothing=0.1)
        torch.manual_seed(1)
        close(results(shared, x, labels, run=fast, label_smoothing=0.1), expected, 1e-12)
