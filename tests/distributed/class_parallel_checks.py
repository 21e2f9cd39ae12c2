"""What each of some processes asks of a class-parallel head. Apart from the tests: DTensor takes long to import."""

import contextlib
import copy
import functools

import pytest
import torch
from class_parallel_calls import wrong_input
from class_parallel_cases import (
    CLASSES,
    FEATURES,
    RAGGED,
    batch,
    head,
    results,
    same_as_alone,
    whole,
)
from helpers import close, normal
from plan_checks import compare as same_as_planned
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.experimental import implicit_replication
from torch.distributed.tensor.parallel import parallelize_module

import torch_subspace as ts

OPTIMISERS = {
    "sgd": functools.partial(ts.RiemannianSGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": functools.partial(ts.RiemannianAdamW, lr=0.1, amsgrad=True),
}


# ------------------------------------------------------------------------------- each takes a mesh of some processes


def losses(mesh):
    x, labels = batch()
    ignored = torch.where(torch.arange(10) % 4 == 0, 2, labels)
    soft = normal(10, CLASSES, seed=4).softmax(-1)
    weights = torch.linspace(0, 2, CLASSES, dtype=torch.float64)
    for dims in (3, RAGGED):
        alone = head(dims)
        shared = ts.distributed.shard_head(copy.deepcopy(alone), mesh)
        for target, options in (
            (labels, {}),
            (labels, {"label_smoothing": 0.1, "reduction": "none"}),
            (ignored, {"label_smoothing": 0.3, "class_weight": weights, "ignore_index": 2}),
            (ignored, {"class_weight": weights, "ignore_index": 2, "reduction": "sum"}),
            (soft, {}),
            (soft, {"label_smoothing": 0.1, "class_weight": weights, "reduction": "none"}),
        ):
            same_as_alone(alone, shared, x, target, **options)
        same_as_alone(alone, shared, x.reshape(2, 5, -1), target.reshape(2, 5, -1), **options)
        same_as_alone(alone, shared, x)
        same_as_alone(alone, shared, x[0])
    x, labels = batch(dtype=torch.float32)
    alone = head(dtype=torch.float32)
    shared = ts.distributed.shard_head(copy.deepcopy(alone), mesh)
    same_as_alone(alone, shared, x, labels, label_smoothing=0.1, tolerance=2e-6)
    for options in ({"gamma": 2.0, "normalize": False}, {"classes": 1}):
        alone = head(**options)
        shared = ts.distributed.shard_head(copy.deepcopy(alone), mesh)
        same_as_alone(alone, shared, x.double(), labels % alone.num_classes)


def smoothing(mesh):
    """Over all classes. Megatron-LM #737 and #7464: each rank took the number of those that it had, and their mean."""
    x, labels = batch()
    shared = ts.distributed.shard_head(head(), mesh)
    with CommDebugMode() as sent:
        loss = shared.loss(x.requires_grad_(), labels, label_smoothing=0.2, reduction="none")
    assert sent.get_total_counts() == 2 * (mesh.size() > 1), sent.get_comm_counts()
    with CommDebugMode() as sent:
        loss.sum().backward()
    assert sent.get_total_counts() == (mesh.size() > 1), sent.get_comm_counts()
    with torch.no_grad():
        logs = head()(x).log_softmax(-1)
    close(loss, -(0.8 * logs.gather(1, labels[:, None])[:, 0] + 0.2 * logs.mean(-1)), 1e-13)


def layouts(mesh):
    size, rank = mesh.size(), mesh.get_local_rank()
    x, labels = batch(6 * size)
    mine = slice(6 * rank, 6 * rank + 6)
    alone = head()
    shard = functools.partial(ts.distributed.shard_head, mesh=mesh)
    logits = alone(x).detach()
    own = shard(copy.deepcopy(alone), output_layouts=Shard(-1))(x)
    assert torch.equal(own, logits.chunk(size, -1)[rank])
    placed = shard(copy.deepcopy(alone), output_layouts=Shard(-1), use_local_output=False)
    close(placed(x).full_tensor(), logits, 1e-13)
    close(placed(DTensor.from_local(x[mine], mesh, [Shard(0)])).full_tensor(), logits, 1e-13)

    # Rows of its own in each process: gradients before the head are to be averaged.
    loss, dx, dweight = results(alone, x, labels)
    cross_entropy = nn.functional.cross_entropy
    for out in (Replicate(), Shard(0)):
        shared = shard(copy.deepcopy(alone), input_layouts=Shard(0), output_layouts=out)
        given = labels if out == Replicate() else labels[mine]
        value, *gradients = results(shared, x[mine], labels[mine])
        close((value, gradients[0] / size, gradients[1]), (loss, dx[mine], dweight), 1e-12)
        _, *gradients = results(shared, x[mine], run=lambda x: cross_entropy(shared(x), given))  # noqa: B023
        close((gradients[0] / size, gradients[1]), (dx[mine], dweight), 1e-12)


def half_precision(mesh):
    alone = head(dtype=torch.float32)
    x, labels = batch(dtype=torch.float32)
    for target, options in (((labels,), {}), ((), {}), ((labels,), {"sample_rate": 0.9})):  # of few classes all stay
        shared = ts.distributed.shard_head(copy.deepcopy(alone), mesh, **options)
        with torch.autocast("cpu", torch.bfloat16):
            same_as_alone(alone, shared, x, *target, tolerance=2e-2)
        same_as_alone(alone, shared, x.bfloat16(), *target, tolerance=2e-2)


def sampling(mesh):
    rate, classes, size = 0.25, 40, mesh.size()
    alone = head(classes=classes)
    shared = ts.distributed.shard_head(copy.deepcopy(alone), mesh, sample_rate=rate)
    x, labels = batch(4, classes)
    labels[3] = -100
    weights = torch.linspace(0.5, 2, classes, dtype=torch.float64)
    options = {"class_weight": weights, "label_smoothing": 0.1}
    torch.manual_seed(7)
    value, dx, dweight = results(shared, x, labels, **options)
    kept = dweight.flatten(1).any(1).nonzero()[:, 0]
    most = -(-classes // size)
    assert kept.shape[0] == sum(max(-(-n // 4), 4) for n in [most] * (classes // most) + [classes % most] if n)
    assert set(labels[:3].tolist()) <= set(kept.tolist())
    among = torch.searchsorted(kept, labels.clamp(min=0)).where(labels >= 0, -100)

    def reference(frames, x):
        logits = ts.subspace_logits(x, frames, gamma=alone.gamma)
        return nn.functional.cross_entropy(logits, among, weight=weights[kept], label_smoothing=0.1)

    frames, inputs = alone.weight.detach()[kept].requires_grad_(), x.clone().requires_grad_()
    expected = reference(frames, inputs)
    expected.mul(normal(1, seed=2)[0]).backward()
    close((value, dx, dweight[kept]), (expected.detach(), inputs.grad, frames.grad), 1e-12)
    state = whole_of_all(mesh, torch.get_rng_state())
    assert all(torch.equal(state[0], other) for other in state)

    for make in OPTIMISERS.values():
        opt = make(shared.parameters())
        for _ in range(2):
            opt.zero_grad()
            shared.loss(x, labels).backward()
            opt.step()
    assert shared.frame_error() < 1e-12
    with pytest.raises(ValueError, match="sample_rate is for labels"):
        shared.loss(x, normal(4, classes).softmax(-1))
    alone.load_state_dict({"weight": whole(shared.weight)})
    same_as_alone(alone, shared.eval(), x, labels)


def sparse_gradients(mesh):
    """They name the classes of the sample alone, and steps by them are those by dense ones once all have caught up."""
    momentum = functools.partial(ts.RiemannianSGD, lr=0.1, momentum=0.9, transport="parallel")
    for classes, dims in ((42, 3), (42, RAGGED * 6), (2, (2, 1))):
        x, labels = batch(4, classes)
        heads = [ts.distributed.shard_head(head(dims, classes=classes), mesh, sample_rate=0.1, sparse_grad=sparse)
                 for sparse in (True, False)]
        for h in heads:
            torch.manual_seed(1)
            for _ in range(2):  # which add up
                h.loss(x, labels).backward()
        with contextlib.suppress(NotImplementedError):  # torch 2.11 has no norm of a sparse tensor
            norms = [nn.utils.clip_grad_norm_(h.parameters(), 0.1).full_tensor() for h in heads]
            close(norms[0], norms[1], 1e-12)
        with torch.no_grad():
            own = heads[0].weight.grad.to_local()
            assert own.is_sparse and own.coalesce().indices().shape[1] <= 8
            close(own.to_dense(), heads[1].weight.grad.to_local(), 1e-14)

        opts = [momentum(h.parameters()) for h in heads]
        for step in range(4):
            opts[0].zero_grad()
            heads[0].loss(x, labels).backward()
            with torch.no_grad():
                heads[1].weight.grad.to_local().copy_(heads[0].weight.grad.to_local().to_dense())
            if step == 2:  # a checkpoint with what is still to come
                saved, opts[0] = copy.deepcopy(opts[0].state_dict()), momentum(heads[0].parameters())
                opts[0].load_state_dict(saved)
            for opt in opts:
                opt.step()
        opts[0].catch_up()
        close(whole(heads[0].weight), whole(heads[1].weight), 1e-12)
        assert opts[0].state[heads[0].weight].keys() == {"momentum_buffer"} and opts[0].skipped_frames == 0

        adam, before = ts.RiemannianAdamW(heads[0].parameters(), lr=0.1, amsgrad=True), heads[0].weight.detach().clone()
        for _ in range(2):
            adam.step()
        with torch.no_grad():
            steps = adam.state[heads[0].weight]["step"].to_local()
            assert torch.equal(steps.nonzero()[:, 0], heads[0].weight.grad.to_local().coalesce().indices()[0])
            assert torch.equal((heads[0].weight - before).to_local().flatten(1).any(1), steps > 0)
        assert heads[0].frame_error() < 1e-12
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    with pytest.raises(NotImplementedError, match="_values"):
        scaler.unscale_(adam)
    with pytest.raises(ValueError, match="sparse_grad=True needs a sample_rate below 1"):
        ts.distributed.ClassParallel(sparse_grad=True)


def whole_of_all(mesh, t):
    return DTensor.from_local(t[None], mesh, [Shard(0)]).full_tensor()


def steps(mesh):
    """Given the same gradients both optimisers take the same steps, to the bit."""
    for dims in (3, RAGGED, (2, 1)):
        for make in OPTIMISERS.values():
            alone = head(dims, classes=7 if dims == 3 else len(dims))
            shared = ts.distributed.shard_head(copy.deepcopy(alone), mesh)
            opts = [make(h.parameters()) for h in (alone, shared)]
            for _ in range(3):
                x, labels = batch(classes=alone.num_classes)
                opts[1].zero_grad()
                shared.loss(x, labels).backward()
                alone.weight.grad = whole(shared.weight.grad, shared.dims)
                for opt in opts:
                    opt.step()
                assert torch.equal(whole(shared.weight, shared.dims), alone.weight)
                assert opts[1].skipped_frames == 0
            state = opts[1].state[shared.weight]
            for key, value in opts[0].state[alone.weight].items():
                own = whole(state[key], shared.dims if state[key].dim() == 3 else None)
                assert torch.equal(own, value), key
            opt = make(shared.parameters())  # a checkpoint's
            opt.load_state_dict(opts[1].state_dict())
            opt.step()

        before = nn.utils.clip_grad_norm_(alone.parameters(), 0.01)
        close(nn.utils.clip_grad_norm_(shared.parameters(), 0.01).full_tensor(), before, 1e-12)
        close(whole(shared.weight.grad, shared.dims), alone.weight.grad, 1e-12)


def clipping(mesh):
    """Beside parameters that are no DTensors."""
    x, labels = batch()
    norms = []
    for share in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(FEATURES, FEATURES, dtype=torch.float64), head())
        if share:
            ts.distributed.shard_head(model, mesh)
        model[1].loss(model[0](x), labels).backward()
        with implicit_replication():
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        norms.append(norm.full_tensor() if share else norm)
    close(norms[1], norms[0], 1e-12)


def drawing(mesh):
    """Each process draws its own frames, all go on with equal random numbers, and a head is loaded and saved whole."""
    for dims in (3, RAGGED):
        alone = head(dims)
        with torch.device("meta"):
            shared = ts.GrassmannLinear(FEATURES, CLASSES, dims, dtype=torch.float64)
        ts.distributed.shard_head(shared, mesh).to_empty(device="cpu")
        torch.manual_seed(5)
        for again in (shared.reset_parameters, functools.partial(shared.init_from_vectors, normal(CLASSES, FEATURES)),
                      functools.partial(shared.init_from_features, *batch(30)), shared.orthonormalize_):
            again()
            assert shared.frame_error() < 1e-12
            frames = whole(shared.weight)
            assert frames.flatten(1).unique(dim=0).shape[0] == CLASSES
            assert torch.equal(frames.any(-1).sum(1), torch.tensor(shared.dims or [3] * CLASSES))
        state = whole_of_all(mesh, torch.get_rng_state())
        assert all(torch.equal(state[0], other) for other in state)
        if dims == 3:
            first = normal(CLASSES, FEATURES)
            shared.init_from_vectors(first)
            close(whole(shared.weight)[:, 0], nn.functional.normalize(first, dim=-1), 1e-12)

        shared.load_state_dict(alone.state_dict())
        assert torch.equal(whole(shared.weight, shared.dims), alone.weight)
        again = copy.deepcopy(shared)
        again.load_state_dict(shared.state_dict())
        assert torch.equal(whole(again.weight, shared.dims), alone.weight)
        alone.reset_parameters()
        alone.load_state_dict({"weight": whole(shared.weight)})
        assert torch.equal(whole(shared.weight, shared.dims), alone.weight)
        with torch.no_grad():
            shared.weight.to_local()[-1:] = torch.nan
        with pytest.raises(ValueError, match="non-finite weight in . classes"):
            shared.orthonormalize_()
        assert shared.frame_error().isnan()


def plans(mesh):
    torch.manual_seed(0)
    alone = nn.ModuleDict({"body": nn.Linear(5, FEATURES, dtype=torch.float64), "head": head()})
    shared = parallelize_module(copy.deepcopy(alone), mesh, {"head": ts.distributed.ClassParallel()})
    x, labels = normal(6, 5), torch.arange(6)
    for model in (alone, shared):
        model["head"].loss(model["body"](x), labels).backward()
    groups = ts.param_groups(shared, weight_decay=0.1)
    assert [group.get("manifold") for group in groups] == [None, "grassmann"]
    assert groups[1]["params"] == [shared["head"].weight]
    close(shared["body"].weight.grad, alone["body"].weight.grad, 1e-12)
    close(whole(shared["head"].weight.grad), alone["head"].weight.grad, 1e-12)
    shared = ts.distributed.shard_head(ts.swap_head(nn.ModuleDict({"head": nn.Conv2d(FEATURES, 3, 1)}), 4), mesh)
    maps = normal(2, FEATURES, 3, 3, dtype=torch.float32)
    assert shared["head"](maps).shape == (2, 4, 3, 3)
    shared["head"].loss(maps, torch.zeros(2, 3, 3, dtype=torch.int64)).backward()


def with_data_parallelism(mesh):
    """A mesh of 2 x 2: rows are shared out along the first dimension, classes along the second."""
    row = mesh["data"].get_local_rank()
    for dims in (3, RAGGED):
        for make in OPTIMISERS.values():
            models = []
            for share in (False, True):
                torch.manual_seed(0)
                model = nn.Sequential(nn.Linear(FEATURES, FEATURES, dtype=torch.float64), head(dims))
                if share:
                    ts.distributed.shard_head(model, mesh["classes"])
                    for layer in model:
                        fully_shard(layer, mesh=mesh["data"])
                    register_fsdp_forward_method(model[1], "loss")
                opt = make(model.parameters())
                x, labels = batch()
                if share:
                    x, labels = x.chunk(2)[row], labels.chunk(2)[row]
                for _ in range(3):
                    opt.zero_grad()
                    model[1].loss(model[0](x), labels).backward()
                    opt.step()
                models.append(model)
            alone, shared = models
            close(whole(shared[0].weight), alone[0].weight, 1e-10)
            close(whole(shared[1].weight, shared[1].dims), alone[1].weight, 1e-10)
            assert shared[1].frame_error() < 1e-12


def rows_of_their_own(mesh):
    """As Partial-FC is trained: rows and classes are shared out among the same processes, the body is under DDP."""
    rank, size = mesh.get_local_rank(), mesh.size()
    x, labels = batch(6 * size)
    bodies, heads = [], []
    for share in (False, True):
        torch.manual_seed(0)
        body, last = nn.Linear(FEATURES, FEATURES, dtype=torch.float64), head()
        if share:
            body = nn.parallel.DistributedDataParallel(body)
            ts.distributed.shard_head(last, mesh, input_layouts=Shard(0))
            x, labels = x.chunk(size)[rank], labels.chunk(size)[rank]
        opt = ts.RiemannianSGD([*body.parameters(), *last.parameters()], lr=0.1)
        for _ in range(3):
            opt.zero_grad()
            last.loss(body(x), labels).backward()
            opt.step()
        bodies.append(body.module if share else body)
        heads.append(last)
    close(bodies[1].weight, bodies[0].weight, 1e-11)
    close(whole(heads[1].weight), heads[0].weight, 1e-11)


def planned(mesh):
    """Memory about, bytes that are sent exactly."""
    same_as_planned(mesh, 1001, 64, 4, 48, tolerance=0.15)
    same_as_planned(mesh, 1001, 64, 4, 48, own_rows=True, optimiser="adamw", tolerance=0.15)


def all_checks(rank):
    meshes = [DeviceMesh("cpu", list(range(count))) for count in (1, 2, 3, 4)]
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "classes"))
    for mesh in meshes:
        if rank < mesh.size():
            for check in (losses, smoothing, layouts, steps, drawing, planned):
                check(mesh)
    for check in (half_precision, sampling, sparse_gradients, clipping, plans, rows_of_their_own, wrong_input):
        check(meshes[-1])
    with_data_parallelism(pairs)
    under_fsdp = ts.distributed.shard_head(head(), pairs["classes"], sample_rate=0.5, sparse_grad=True)
    fully_shard(under_fsdp, mesh=pairs["data"])
    register_fsdp_forward_method(under_fsdp, "loss")
    with pytest.raises(RuntimeError, match="sparse_grad is for heads that are not under fully_shard"):
        under_fsdp.loss(*batch())
    with pytest.raises(ValueError, match=r"mesh must have one dimension.*mesh\['classes'\]"):
        ts.distributed.shard_head(head(), pairs)
