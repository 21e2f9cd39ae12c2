"""What each of some processes asks of torch.distributed.checkpoint: what two have saved any number loads, to the bit.

insightface #2027 asks for it in vain: its Partial-FC writes a file per process, of that process's classes.
"""

import functools
import itertools

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import close, normal
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

import torch_subspace as ts

CLASSES, FEATURES = 5, 12
RAGGED = (2, 1, 3, 1, 2)
OPTIMISERS = {
    "sgd": functools.partial(ts.RiemannianSGD, lr=0.1, momentum=0.9),
    "adam": functools.partial(ts.RiemannianAdamW, lr=0.01, amsgrad=True),
}
KINDS = ("sharded", "uniform", "ragged")


def alone(kind, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(FEATURES, FEATURES), ts.GrassmannLinear(FEATURES, CLASSES, RAGGED if kind == "ragged"
                                                                          else 3))


def built(kind, mesh, seed=0):
    model = alone(kind, seed)
    if mesh is None:
        return model
    if kind == "sharded":
        for layer in model:
            fully_shard(layer, mesh=mesh)
        register_fsdp_forward_method(model[1], "loss")
        return model
    return ts.distributed.shard_head(model, mesh)


def train(model, opt, steps):
    for i in steps:
        x = normal(8, FEATURES, seed=i, dtype=torch.float32)
        opt.zero_grad()
        model[1].loss(model[0](x), torch.arange(8) % CLASSES).backward()
        opt.step()


def whole(value):
    if isinstance(value, dict):
        return {key: whole(v) for key, v in value.items()}
    if isinstance(value, torch.Tensor):
        return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()
    return value


def state_of(model, opt, **options):
    found = states.get_state_dict(model, opt, options=states.StateDictOptions(**options))
    return dict(zip(("model", "optimizer"), found))


def assert_same(found, expected):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def saved_and_loaded(meshes, rank, folder):
    for i, (kind, make) in enumerate(itertools.product(KINDS, OPTIMISERS.values())):
        save_and_load(meshes, rank, f"{folder}/{i}", kind, make, flat=i in (1, 2, 5))


def save_and_load(meshes, rank, folder, kind, make, flat):
    """flat: how the optimiser's state is asked for, and whether param_groups found the frames."""
    groups = (lambda model: model.parameters()) if flat else functools.partial(ts.param_groups, weight_decay=0.1)
    state_now = functools.partial(state_of, flatten_optimizer_state_dict=flat)
    two, expected = meshes[1], [None]
    if rank < 2:
        model = built(kind, two)
        opt = make(groups(model))
        train(model, opt, range(2))
        state = state_now(model, opt)
        dcp.save(state, checkpoint_id=folder, process_group=two.get_group())
        saved = whole(state)
        train(model, opt, range(2, 4))
        expected = [(saved, whole(state_now(model, opt)))]
    dist.broadcast_object_list(expected)
    saved, later = expected[0]
    for mesh in [*meshes, *([None] if kind != "ragged" else [])]:  # None: a plain model, without a group
        if rank < (mesh.size() if mesh else 1):
            model = built(kind, mesh, seed=1)
            opt = make(groups(model))
            state = state_now(model, opt)
            who = {"process_group": mesh.get_group()} if mesh else {"no_dist": True}
            dcp.load(state, checkpoint_id=folder, **who)
            states.set_state_dict(model, opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"],
                                  options=states.StateDictOptions(flatten_optimizer_state_dict=flat))
            assert_same(whole(state_now(model, opt)), saved)
            train(model, opt, range(2, 4))
            found = whole(state_now(model, opt))
            if mesh is two:
                assert_same(found, later)
            for key, value in later["model"].items():
                close(found["model"][key], value, 1e-5)


def consolidated(mesh, folder):
    """One safetensors file of all weights, which a model on one process loads, and the other way round."""
    for kind, make in itertools.product(KINDS, OPTIMISERS.values()):
        path, options = f"{folder}/{kind}.safetensors", {"full_state_dict": True}
        model, again, plain = built(kind, mesh), built(kind, mesh, seed=1), alone(kind, seed=1)
        opts = [make(m.parameters()) for m in (model, plain)]
        train(model, opts[0], range(2))
        found = state_of(model, opts[0], **options, cpu_offload=True)
        if dist.get_rank() == 0:
            save_file(found["model"], path)
            states.set_optimizer_state_dict(plain, opts[1], whole(found["optimizer"]))
        dist.barrier()
        plain.load_state_dict(load_file(path))
        x = normal(4, FEATURES, dtype=torch.float32)
        close(plain(x), model(x).detach(), 1e-5)
        assert plain[1].frame_error() < 1e-6
        states.set_model_state_dict(again, load_file(path) if dist.get_rank() == 0 else {},
                                    options=states.StateDictOptions(**options, broadcast_from_rank0=True))
        assert_same(whole(again.state_dict()), whole(model.state_dict()))
        again = built(kind, mesh, seed=1)
        again.load_state_dict(model.state_dict())
        assert_same(whole(again.state_dict()), whole(model.state_dict()))
        train(model, opts[0], range(2, 4))
        if dist.get_rank() == 0:
            train(plain, opts[1], range(2, 4))
        expected = whole(model.state_dict())
        if dist.get_rank() == 0:
            again = alone(kind)
            again.load_state_dict(expected)
            for p, q in zip(plain.parameters(), again.parameters()):
                close(p, q.detach(), 1e-5)



def all_checks(rank, folder):
    meshes = [DeviceMesh("cpu", list(range(count))) for count in (1, 2, 3, 4)]
    saved_and_loaded(meshes, rank, folder)
