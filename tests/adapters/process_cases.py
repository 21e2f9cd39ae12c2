"""What the checks of processes.py share: a network with adapters, how it is sharded, its gradients."""

import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

import torch_subspace as ts

X = torch.linspace(-1, 1, 24).view(4, 6)


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8)), nn.Linear(8, 3))


def adapted(*names, save=()):
    """With factors and cores at random, the same in both processes."""
    model = net()
    for i, name in enumerate(names or ("default",)):
        ts.adapt(model, ts.TuckerConfig(rank=2 + i, target_modules=["0", "1.0"], save_modules=save), name=name)
        fill(model, i)
    return model


def fill(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in ts.adapter_parameters(model)[0]["params"]:
            p.normal_()
    return model


def shard(model, mesh, **how):
    fully_shard(model[1], mesh=mesh, **how)
    return fully_shard(model, mesh=mesh, **how)


def near(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def gradients(model, x=X):
    model.zero_grad()
    y = model(x)
    (y**2).mean().backward()
    return y.detach(), {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in model.named_parameters()
                        if p.grad is not None}
