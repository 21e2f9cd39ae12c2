"""What is built on the ops, on a GPU: heads, adapters and their files, optimisers, losses, clustering.

Each is compared with the same on the CPU in float32; TF32 is off. Never run so far.
"""

import copy
import functools
import io

import helpers
import pytest
import torch
from cases import DEVICE, PRESENT, exact_products, without_waiting
from torch import nn

import torch_subspace as ts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not PRESENT, reason=f"needs {DEVICE}")]
close = functools.partial(helpers.close, floor=1e-2, device=None)


@pytest.fixture(autouse=True)
def exact():
    with exact_products():
        yield


class Net(nn.Module):
    """A convolution of each kind, attention and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16)
        self.grouped = nn.Conv2d(16, 32, 1, groups=4)
        self.up = nn.ConvTranspose2d(32, 16, 2, stride=2)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.fc = nn.Linear(16, 7)

    def forward(self, x):
        x = self.up(self.grouped(self.depthwise(self.stem(x)).relu()).relu())
        x = x.flatten(2).mT
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.fc(x.mean(1))


def net():
    torch.manual_seed(0)
    return Net(), torch.randn(4, 3, 12, 12), torch.arange(4)


def adapted(**options):
    """On the CPU, with an adapter that changes something."""
    model, x, target = net()
    targets = ["stem", "depthwise", "grouped", "up", "attention.out_proj", "fc"]
    ts.adapt(model, ts.TuckerConfig(rank=3, target_modules=targets, **options))
    with torch.no_grad():
        for group in ts.adapter_parameters(model):
            for p in group["params"]:
                p.add_(0.1 * torch.randn(p.shape))
    return model, x, target


def trained(model, x, target, steps=3, **options):
    """Losses of some steps, and the parameters after them."""
    optimiser = ts.RiemannianSGD(ts.param_groups(model, weight_decay=1e-4), lr=0.02, momentum=0.9, **options)
    losses = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target)
        loss.backward()
        optimiser.step()
        losses.append(loss.detach())
    return [*losses, *(p.detach() for p in model.parameters())]


@pytest.mark.parametrize("last", [False, True], ids=["channels first", "channels last"])
def test_adapters_train_as_on_the_cpu(last):
    model, x, target = adapted()
    ours, here = copy.deepcopy(model).to(DEVICE), x.to(DEVICE)
    if last:
        ours, here = ours.to(memory_format=torch.channels_last), here.contiguous(memory_format=torch.channels_last)
    close(trained(ours, here, target.to(DEVICE)), trained(model, x, target), 5e-4)


def test_adapt_on_the_device_puts_the_adapter_there():
    model, x, _ = net()
    ts.adapt(model.to(DEVICE), ts.TuckerConfig(rank=3, target_modules="all-conv"))
    assert all(p.device.type == torch.device(DEVICE).type for p in model.parameters())
    assert model(x.to(DEVICE)).shape == (4, 7)


def test_merge_and_unmerge():
    model, x, _ = adapted()
    expected = model(x).detach()
    model, x = model.to(DEVICE), x.to(DEVICE)
    base = [p.detach().clone() for p in model.parameters()]
    ts.merge(model)
    close([model(x).detach()], [expected], 1e-4)
    ts.unmerge(model)
    assert helpers.same(base, model.parameters())
    close([model(x).detach()], [expected], 1e-4)


def test_a_file_moves_between_devices(tmp_path):
    model, x, _ = adapted()
    expected = model(x).detach()
    ts.save_adapter(copy.deepcopy(model).to(DEVICE), tmp_path / "there.safetensors")
    ts.save_adapter(model, tmp_path / "here.safetensors")
    for name in ("here", "there"):
        for device in ("cpu", DEVICE):
            plain = net()[0].to(device)
            ts.load_adapter(plain, tmp_path / f"{name}.safetensors")
            close([plain(x.to(device)).detach()], [expected], 1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_adapters_of_a_half_model(dtype):
    model, x, target = adapted()
    expected = model.double()(x.double()).detach()
    model = model.float().to(DEVICE).to(dtype)
    y = model(x.to(DEVICE, dtype))
    nn.functional.cross_entropy(y.float(), target.to(DEVICE)).backward()
    close([y.detach()], [expected], 0.05)
    assert all(p.grad.isfinite().all() for group in ts.adapter_parameters(model) for p in group["params"])


@pytest.mark.parametrize("init", ["linear", "random"])
def test_swap_head_trains_as_on_the_cpu(init):
    model, x, target = net()
    ts.swap_head(model, 7, 3, init=init, name="fc")
    ours = copy.deepcopy(model).to(DEVICE)
    close(trained(ours, x.to(DEVICE), target.to(DEVICE)), trained(model, x, target), 2e-3)


def test_swap_head_on_the_device():
    model, x, _ = net()
    ts.swap_head(model.to(DEVICE), 5, 2, name="fc")
    assert model.fc.weight.device.type == torch.device(DEVICE).type and model(x.to(DEVICE)).shape == (4, 5)


@pytest.mark.parametrize("make", [
    lambda groups: ts.RiemannianSGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    lambda groups: ts.RiemannianAdamW(groups, lr=1e-3),
], ids=["SGD", "AdamW"])
def test_an_optimiser_resumes_to_the_bit(make):
    def start(seed):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), ts.GrassmannLinear(20, 6, 3)).to(DEVICE)
        return model, make(ts.param_groups(model, weight_decay=1e-3))

    def steps(model, optimiser, count):
        g = torch.Generator().manual_seed(5)
        for _ in range(count):
            optimiser.zero_grad()
            model(torch.randn(9, 12, generator=g).to(DEVICE)).square().mean().backward()
            optimiser.step()

    first, optimiser = start(0)
    steps(first, optimiser, 3)
    kept = io.BytesIO()
    torch.save((first.state_dict(), optimiser.state_dict()), kept)
    steps(first, optimiser, 2)
    kept.seek(0)
    second, again = start(1)
    for target, state in zip((second, again), torch.load(kept, map_location="cpu")):  # as one would
        target.load_state_dict(state)
    steps(second, again, 2)
    assert helpers.same(first.parameters(), second.parameters())


@pytest.mark.parametrize("name", ["rate", "mcr2", "soft mcr2", "mlc", "mlc cpp"])
def test_losses(name):
    g = torch.Generator().manual_seed(0)
    z, c = (nn.functional.normalize(torch.randn(2, 40, 12, generator=g), dim=-1) for _ in range(2))
    labels, soft = torch.arange(40) % 4, torch.rand(40, 5, generator=g).softmax(-1)
    loss, other = {"rate": (ts.CodingRateLoss(), ()), "mcr2": (ts.MCR2Loss(), (labels,)),
                   "soft mcr2": (ts.MCR2Loss(), (soft,)), "mlc": (ts.MLCLoss(eta=0.3), (c,)),
                   "mlc cpp": (ts.MLCLoss(eta=0.3, mode="cpp"), (c,))}[name]
    results = []
    for device in (DEVICE, "cpu"):
        leaf, rest = z.to(device, copy=True).requires_grad_(), [t.to(device) for t in other]
        value = loss(leaf, *rest)
        results.append((value.detach(), *torch.autograd.grad(value, leaf)))
    close(*results, 2e-4)
    leaf, rest = z.to(DEVICE).requires_grad_(), [t.to(DEVICE) for t in other]
    loss(leaf, *rest).backward()
    with without_waiting():
        loss(leaf, *rest).backward()


def test_clustering():
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    g = torch.Generator().manual_seed(0)
    centres = 4 * torch.randn(3, 10, generator=g)
    truth = torch.arange(150) % 3
    points = (centres[truth] + 0.3 * torch.randn(150, 10, generator=g)).numpy()
    found = ts.ManifoldClustering(3, hidden=(32,), dim=8, init_epochs=10, epochs=5, batch_size=150, device=DEVICE,
                                  random_state=0).fit_predict(points)
    assert found.shape == (150,) and len(set(found.tolist())) == 3
    for label in range(3):
        assert len(set(found[truth.numpy() == label].tolist())) == 1
