"""What each of two processes asks of fully_shard: precision, clipping, adapters on a frozen base."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checkpoint_checks import consolidated
from helpers import close, normal
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)

import torch_subspace as ts

CLASSES, FEATURES = 5, 32
HALVES = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, FEATURES), nn.Tanh(), ts.GrassmannLinear(FEATURES, CLASSES, 3))


def batch():
    return normal(16, 20, seed=1, dtype=torch.float32), torch.arange(16) % CLASSES


def gradients(model, loss=True):
    model.zero_grad()
    x, y = batch()
    value = model[2].loss(model[1](model[0](x)), y) if loss else nn.functional.cross_entropy(model(x).float(), y)
    value.backward()
    return value.detach(), [getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for p in model.parameters()]


def whole(t):
    return t.full_tensor() if hasattr(t, "placements") else t


def mixed_precision(mesh):
    """Frames are rounded for the product alone, or when they are gathered; shards, gradients and steps are float32."""
    expected = gradients(net())
    for loss in (True, False):
        for own_policy in (True, False):
            model = net()
            fully_shard(model[2], mesh=mesh, **({} if own_policy else {"mp_policy": HALVES}))
            fully_shard(model[0], mesh=mesh, mp_policy=HALVES)
            register_fsdp_forward_method(model[2], "loss")
            if not loss:
                fully_shard(model, mesh=mesh, mp_policy=HALVES)
            value, found = gradients(model, loss)
            close(value.float(), expected[0], 2e-2)
            for a, e in zip(found, expected[1]):
                assert a.dtype == torch.float32
                close(a, e, 4e-2)
            for make in (functools.partial(ts.RiemannianSGD, lr=0.1, momentum=0.9), ts.RiemannianAdamW):
                alone = net()
                for p, q in zip(alone.parameters(), model.parameters()):
                    p.data.copy_(whole(q.detach()))
                    p.grad = whole(q.grad).clone()
                for m in (alone, model):
                    make(m.parameters()).step()
                for p, q in zip(alone.parameters(), model.parameters()):
                    assert q.dtype == torch.float32 and torch.equal(whole(q), p)
            assert model[2].frame_error() < 1e-5


def clipping(mesh):
    for norm_type in (2.0, float("inf")):
        alone, model = net(), net()
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        norms = []
        for m in (alone, model):
            gradients(m, loss=False)
            norms.append(nn.utils.clip_grad_norm_(m.parameters(), 0.01, norm_type))
        close(whole(norms[1]), norms[0], 1e-6)
        for p, q in zip(alone.parameters(), model.parameters()):
            close(whole(q.grad), p.grad, 1e-6)
        for m in (alone, model):
            ts.RiemannianSGD(m.parameters(), lr=0.1).step()
        for p, q in zip(alone.parameters(), model.parameters()):
            close(whole(q), p, 1e-6)


def accumulation(mesh):
    alone, model = net(), net()
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    x, y = batch()
    for m in (alone, model):
        for part in (slice(4), slice(4, 16)):
            if m is model:
                m.set_requires_gradient_sync(part.stop == 16)
            nn.functional.cross_entropy(m(x[part]), y[part], reduction="sum").backward()
    for p, q in zip(alone.parameters(), model.parameters()):
        close(whole(q.grad), p.grad, 1e-6)


def after_a_forward(mesh):
    """The outermost module keeps what it has gathered: what is done to the head reaches the shards all the same."""
    model = fully_shard(net(), mesh=mesh)
    x, _ = batch()
    model(x)
    assert all(hasattr(p, "placements") for group in ts.param_groups(model) for p in group["params"])
    for again in (model[2].orthonormalize_, model[2].reset_parameters,
                  functools.partial(model[2].init_from_vectors, normal(CLASSES, FEATURES))):
        with torch.no_grad():
            model[2].weight.mul_(3)
        model(x)
        again()
        model(x)
        assert model[2].frame_error() < 1e-5
        model.reshard()
        assert model[2].frame_error() < 1e-5


def flattened(mesh):
    """FullyShardedDataParallel leaves no frames to step."""
    for orig in (False, True):
        model = FullyShardedDataParallel(net(), use_orig_params=orig, device_id=torch.device("cpu"))
        for make in (ts.RiemannianSGD, ts.RiemannianAdamW):
            with pytest.raises(ValueError, match="FullyShardedDataParallel has flattened frames.*fully_shard"):
                make(model.parameters(), lr=0.1)


def adapters(mesh, folder):
    """A frozen base, adapters and a head: trained, switched, disabled, saved, loaded and merged."""
    def build(seed=1):
        model = net()
        for name in ("a", "b"):
            ts.adapt(model, ts.TuckerConfig(rank=2, target_modules=["0"], save_modules=["2"]), name=name)
        torch.manual_seed(seed)
        for name in ("b", "a"):
            ts.set_adapter(model, name)
            for p in ts.adapter_parameters(model)[0]["params"]:
                nn.init.normal_(p, std=0.3)
        return model

    def sharded(model):
        for layer in (model[0], model[2], model):
            fully_shard(layer, mesh=mesh)
        return model

    x, _ = batch()
    alone, model = build(), sharded(build())
    for name in ("a", "b"):
        for m in (alone, model):
            ts.set_adapter(m, name)
            opt = ts.RiemannianAdamW(ts.adapter_parameters(m), lr=0.01)
            for _ in range(2):
                opt.zero_grad()
                nn.functional.cross_entropy(m(x), batch()[1]).backward()
                nn.utils.clip_grad_norm_([p for p in m.parameters() if p.requires_grad], 1.0)
                opt.step()
        close(model(x), alone(x), 1e-5)
    with ts.disabled(model), ts.disabled(alone):
        close(model(x), alone(x), 1e-5)
    for name in ("a", "b"):
        for m in (alone, model):
            ts.set_adapter(m, name)
        ts.save_adapter(model, f"{folder}/{name}", name=name)
        dist.barrier()
        fresh = sharded(build(seed=2))
        ts.load_adapter(fresh, f"{folder}/{name}", name=name)
        assert torch.equal(fresh(x), model(x))
        plain = ts.load_adapter(net(), f"{folder}/{name}")
        close(plain(x), alone(x), 1e-5)
    before = model(x)
    ts.merge(model)
    close(model(x), before, 1e-5)
    ts.unmerge(model)
    assert torch.equal(model(x), before)


def adapters_in_checkpoints(mesh, folder):
    """Of two processes; loaded by two and by a plain model, with the frozen base or without."""
    def build(seed, sharded=True):
        model = ts.adapt(net(), ts.TuckerConfig(rank=2, target_modules=["0"], save_modules=["2"]))
        torch.manual_seed(seed)
        for p in ts.adapter_parameters(model)[0]["params"]:
            nn.init.normal_(p, std=0.3)
        for layer in (model[0], model[2], model) if sharded else ():
            fully_shard(layer, mesh=mesh)
        return model, ts.RiemannianAdamW(ts.adapter_parameters(model), lr=0.01)

    def train(model, opt):
        opt.zero_grad()
        nn.functional.cross_entropy(model(batch()[0]), batch()[1]).backward()
        opt.step()

    for trainable in (False, True):
        model, opt = build(1)
        train(model, opt)
        options = states.StateDictOptions(ignore_frozen_params=trainable, strict=not trainable)
        weights, state = states.get_state_dict(model, opt, options=options)
        dcp.save({"model": weights, "optimizer": state}, checkpoint_id=f"{folder}/adapted{trainable}")
        train(model, opt)
        for sharded in (True, False):
            other, opt = build(2, sharded)
            weights, state = states.get_state_dict(other, opt, options=options)
            found = {"model": weights, "optimizer": state}
            dcp.load(found, checkpoint_id=f"{folder}/adapted{trainable}")
            states.set_state_dict(other, opt, model_state_dict=found["model"], optim_state_dict=found["optimizer"],
                                  options=options)
            train(other, opt)
            for p, q in zip(model.parameters(), other.parameters()):
                assert torch.equal(whole(p), whole(q))


def all_checks(rank, folder):
    mesh = init_device_mesh("cpu", (2,))
    for check in (mixed_precision, clipping, accumulation, after_a_forward, flattened):
        check(mesh)
    adapters(mesh, folder)
    adapters_in_checkpoints(mesh, folder)
    consolidated(mesh, folder)
