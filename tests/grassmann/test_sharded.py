"""A head under FSDP2: each process steps its own classes, and the weights are those of one process, to the bit."""

import functools

import pytest
import torch
from helpers import in_two_processes
from torch import nn

import torch_subspace as ts

KINDS = {
    "sgd": functools.partial(ts.RiemannianSGD, lr=0.1),
    "nesterov": functools.partial(ts.RiemannianSGD, lr=0.1, momentum=0.9, nesterov=True),
    "adam": functools.partial(ts.RiemannianAdamW, lr=0.1),
    "amsgrad": functools.partial(ts.RiemannianAdamW, lr=0.1, amsgrad=True),
}


def model(classes=5, dim=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 32), ts.GrassmannLinear(32, classes, dim))


def train(net, make, steps=3):
    opt = make(net.parameters())
    x = torch.randn(8, 20, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        opt.zero_grad()
        net(x).square().sum().backward()
        opt.step()
    return opt


def same_as_alone(net, alone):
    for p, q in zip(net.parameters(), alone.parameters()):
        assert torch.equal(p.full_tensor(), q)


def worker(rank, folder):
    from torch.distributed import destroy_process_group, fsdp, init_process_group
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
    from torch.distributed.device_mesh import init_device_mesh

    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        shard = functools.partial(fsdp.fully_shard, mesh=init_device_mesh("cpu", (2,)))
        for classes in (5, 1):  # 3 and 2 classes; 1 and none
            for kind, make in KINDS.items():
                alone, net = model(classes), shard(model(classes))
                train(alone, make)
                opt = train(net, make)
                same_as_alone(net, alone)
                assert net[1].weight.to_local().shape[0] == (3 - rank if classes == 5 else 1 - rank)
                saved = get_optimizer_state_dict(net, opt)["state"]
                assert kind == "sgd" or saved["1.weight"].keys() == opt.state[net[1].weight].keys()
                assert opt.skipped_frames == 0

        net, alone = model(), model()
        shard(net[1])
        x, y = torch.randn(8, 32, generator=torch.Generator().manual_seed(1)), torch.arange(8) % 5
        with pytest.raises(TypeError, match="weight is sharded.*register_fsdp_forward_method"):
            net[1].loss(x, y)
        fsdp.register_fsdp_forward_method(net[1], "loss")
        for head in (net[1], alone[1]):
            head.loss(x, y).backward()
        assert torch.equal(net[1].weight.grad.full_tensor(), alone[1].weight.grad)

        assert net[1].frame_error() < 1e-6
        with torch.no_grad():
            net[1].weight.mul_(2)
        assert net[1].orthonormalize_().frame_error() < 1e-6
        with torch.device("meta"):
            probe = ts.grassmann.OrthogonalProbe(16, 4, 3, 5)
        shard(probe).to_empty(device="cpu")
        tokens = probe.tokens.full_tensor()
        assert probe.basis_error() < 1e-5 and 0 < tokens.abs().max() < 1 and len(tokens.unique(dim=0)) == 5
        with torch.device("meta"):
            empty = model()
        torch.manual_seed(rank)
        assert shard(empty).to_empty(device="cpu")[1].frame_error() < 1e-6

        net = shard(model(dim=(1, 2, 3, 4, 5)))
        with pytest.raises(ValueError, match="cut within classes.*ignored_params"):
            ts.RiemannianSGD(net.parameters(), lr=0.1)
    finally:
        destroy_process_group()


def test_two_processes_step_as_one(tmp_path):
    in_two_processes(worker, str(tmp_path))
