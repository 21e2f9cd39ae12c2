"""Training on a GPU: no waiting for the device, side streams, CUDA graphs. Never run so far: no GPU was at hand."""

import functools

import helpers
import pytest
import torch
from cases import without_waiting
from torch import nn

import torch_subspace as ts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
close = functools.partial(helpers.close, absolute=True)


class Training:
    """A small model, a batch and an optimiser on one device; the same every time."""

    def __init__(self, device, optimiser=ts.RiemannianSGD, **options):
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(32, 64), ts.GrassmannLinear(64, 20, 4)
        self.model = nn.Sequential(self.body, nn.ReLU(), self.head).to(device)
        self.x, self.target = torch.randn(48, 32).to(device), torch.randint(20, (48,)).to(device)
        options = options or {"lr": 0.05, "momentum": 0.9}
        self.optimiser = optimiser(ts.param_groups(self.model, weight_decay=1e-4), **options)

    def step(self):
        self.optimiser.zero_grad(set_to_none=True)
        loss = self.head.loss(self.body(self.x).relu(), self.target)
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def weights(self):
        return [p.detach().cpu().double() for p in self.model.parameters()]


@pytest.mark.parametrize("optimiser, options", [(ts.RiemannianSGD, {}), (ts.RiemannianAdamW, {"lr": 1e-3})], ids=str)
def test_trains_as_on_the_cpu(optimiser, options):
    cpu, gpu = (Training(device, optimiser, **options) for device in ("cpu", "cuda"))
    losses = [(cpu.step(), gpu.step()) for _ in range(20)]
    assert losses[-1][1] < losses[0][1]
    close(cpu.weights(), gpu.weights(), 1e-3)


def test_a_step_never_waits_for_the_device():
    training = Training("cuda")
    training.step()
    with without_waiting():
        for _ in range(3):
            training.step()


def test_the_ops_never_wait_for_the_device():
    x = torch.randn(8, 16, device="cuda", requires_grad=True)
    weight = torch.randn(5, 2, 16, device="cuda", requires_grad=True)
    target, lr = torch.tensor([0, 9, 1, 2, 3, 4, 0, 1], device="cuda"), torch.tensor(0.1, device="cuda")
    torch.cuda.synchronize()
    with without_waiting():
        ts.subspace_logits(x, weight).sum().backward()
        ts.subspace_cross_entropy(x, weight, target).backward()
        with torch.no_grad():
            ts.grassmann_step_(weight, weight.grad, lr=lr)


def test_a_side_stream():
    plain, side = Training("cuda"), Training("cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    for _ in range(5):
        plain.step()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # work on another stream would now overtake
        for _ in range(5):
            side.step()
    torch.cuda.synchronize()
    close(plain.weights(), side.weights(), 0)


def test_a_captured_step():
    plain, captured = Training("cuda"), Training("cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(4):
        graph.replay()
    for _ in range(7):
        plain.step()
    torch.cuda.synchronize()
    close(plain.weights(), captured.weights(), 1e-6)


def test_the_step_length_of_a_graph_can_change():
    weight = torch.linalg.qr(torch.randn(3, 40, 4, device="cuda")).Q.mT.contiguous()
    grad, lr = torch.randn_like(weight) / 10, torch.tensor(0.0, dtype=torch.float64, device="cuda")
    before, graph = weight.clone(), torch.cuda.CUDAGraph()
    ts.grassmann_step_(weight.clone(), grad, lr=lr)
    with torch.cuda.graph(graph):
        ts.grassmann_step_(weight, grad, lr=lr)
    graph.replay()
    close([weight.cpu()], [before.cpu()], 1e-6)
    lr.fill_(0.5)
    graph.replay()
    expected = before.clone()
    ts.grassmann_step_(expected, grad, lr=0.5)
    close([weight.cpu()], [expected.cpu()], 1e-5)


def test_grad_scaler():
    training, scaler = Training("cuda"), torch.amp.GradScaler("cuda")
    for _ in range(3):
        training.optimiser.zero_grad()
        with torch.autocast("cuda", torch.float16):
            loss = training.head.loss(training.body(training.x).relu(), training.target)
        scaler.scale(loss).backward()
        scaler.step(training.optimiser)
        scaler.update()
    assert all(w.isfinite().all() for w in training.weights())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    first, second = Training("cuda:0"), Training("cuda:1")
    for _ in range(3):
        first.step(), second.step()
    close(first.weights(), second.weights(), 0)
