"""CUDA graphs: forward and backward of every op, and whole training steps, captured once and replayed with new data.
Never run so far.

A capture also proves that nothing on the way waits for the device, allocates past torch or uses another stream.
"""

import functools

import helpers
import pytest
import torch
from cases import BY_NAME, CASES, DEVICE, DROPOUT, ON_GPU, PRESENT, both, cast, gradient_of
from torch import nn

import torch_subspace as ts

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not PRESENT, reason=f"needs {DEVICE}")]
close = functools.partial(helpers.close, floor=1e-2, device=None)


class Replay:
    """A function captured on a graph; on the CPU, where there are none, the function itself."""

    def __init__(self, function, warm=3):
        if not ON_GPU:
            for _ in range(warm + 1):
                self.result = function()
            self.replay = function
            return
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(warm):
                function()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = function()

    def __call__(self):
        if not ON_GPU:
            self.result = self.replay()
        else:
            self.graph.replay()
            torch.cuda.synchronize()
        return self.result


def both_with(case, leaves, dy):
    """As cases.both, with a gradient of the result that is there already."""
    y = case.call(*leaves)
    gradients = torch.autograd.grad(y, leaves[: case.trained], dy, allow_unused=True) if case.trained else ()
    return [y.detach(), *(g for g in gradients if g is not None)]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_an_op_replays_with_new_inputs(case):
    leaves = cast(case, case.make(), torch.float32, DEVICE)
    dy = gradient_of(case, leaves)
    replay = Replay(lambda: both_with(case, leaves, dy))
    close(replay(), both_with(case, leaves, dy), 1e-5 * case.scale)
    if "symmetric" in case.name or "rsgd" in case.name:  # other values are no symmetric matrix, no frames
        changed = range(1, 3) if "rsgd" in case.name else ()
    else:
        changed = [i for i, t in enumerate(leaves) if t.is_floating_point()]
    with torch.no_grad():
        for i in changed:
            leaves[i].mul_(0.9)
    close(replay(), both_with(case, leaves, dy), 1e-5 * case.scale)


@pytest.mark.parametrize("case", DROPOUT, ids=lambda case: case.name)
def test_every_replay_drops_anew(case):
    leaves = cast(case, case.make(), torch.float32, DEVICE)
    dy = gradient_of(case, leaves)
    replay = Replay(lambda: both_with(case, leaves, dy))
    first = [t.clone() for t in replay()]
    assert not torch.equal(first[0], replay()[0])
    # what is zero on the way forward is zero on the way back: the seed is that of this replay
    assert all(t.isfinite().all() for t in replay())


class Step:
    """A model, its optimiser and a batch: forward, loss, backward and update. The same every time."""

    def __init__(self, name, device):
        torch.manual_seed(0)
        self.x, self.target = torch.randn(32, 3, 8, 8), torch.randint(5, (32,))
        body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16),
                             nn.Flatten(), nn.Linear(1024, 24), nn.Tanh())
        head = nn.Linear(24, 5)
        if name.startswith("head"):
            head = ts.GrassmannLinear(24, 5, 3)
        model = nn.Sequential(body, head)
        if name.startswith("adapters"):
            for p in model.parameters():
                p.requires_grad_(False)
            config = ts.TuckerConfig(rank=4, target_modules=["0.0", "0.2", "0.4"], save_modules=["1"],
                                     dropout=0.3 if "dropout" in name else 0.0)
            ts.adapt(model, config)
            with torch.no_grad():  # a core of zeros has no gradient of its factors
                for group in ts.adapter_parameters(model):
                    for p in group["params"]:
                        p.add_(0.05 * torch.randn(p.shape))
        self.model, self.name = model.to(device).float(), name
        self.x, self.target = self.x.to(device), self.target.to(device)
        self.loss = {"mcr2": ts.MCR2Loss(), "mlc": ts.MLCLoss(eta=0.3)}.get(name)
        groups = ts.param_groups(self.model, weight_decay=1e-4)
        if name == "head, AdamW":
            self.optimiser = ts.RiemannianAdamW(groups, lr=1e-3, capturable=device != "cpu")
        else:
            self.optimiser = ts.RiemannianSGD(groups, lr=1e-3 if self.loss else 0.01, momentum=0.9)

    def __call__(self):
        self.optimiser.zero_grad(set_to_none=True)
        features = self.model[0](self.x)
        if self.loss is None and isinstance(self.model[1], ts.GrassmannLinear):
            loss = self.model[1].loss(features, self.target)
        elif self.loss is None:
            loss = nn.functional.cross_entropy(self.model[1](features), self.target)
        else:
            z = nn.functional.normalize(features, dim=-1)
            loss = self.loss(z, self.target if self.name == "mcr2" else self.model[1](features))
        loss.backward()
        self.optimiser.step()
        return loss.detach()

    def parameters(self):
        return [p.detach().cpu().double() for p in self.model.parameters()]


STEPS = "head", "head, AdamW", "adapters", "adapters, dropout", "mcr2", "mlc"


@pytest.mark.parametrize("name", STEPS)
def test_a_training_step(name):
    """Some steps on a graph are those without: parameters, momentum and loss."""
    plain, captured = Step(name, DEVICE), Step(name, DEVICE)
    before = plain.parameters()
    replay = Replay(captured)  # three steps; recording is none
    done = 3 if ON_GPU else 4
    for _ in range(5):
        loss = replay()
    expected = [plain() for _ in range(done + 5)]
    assert loss.isfinite() and any(not torch.equal(a, b) for a, b in zip(before, captured.parameters(), strict=True))
    if "dropout" not in name:
        close([loss, *captured.parameters()], [expected[-1], *plain.parameters()], 2e-4)
        assert expected[-1] < expected[0]


@pytest.mark.parametrize("name", [name for name in STEPS if "dropout" not in name])
def test_a_training_step_is_the_cpus(name):
    ours, cpu = Step(name, DEVICE), Step(name, "cpu")
    cpu.model.double()
    cpu.x = cpu.x.double()
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for _ in range(3):
            losses = ours(), cpu()
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    close([losses[0], *ours.parameters()], [losses[1], *cpu.parameters()], 1e-3)


@pytest.mark.parametrize("name", ["logits", "coding_rate_soft", "sinkhorn"])
def test_two_graphs_do_not_share_what_they_work_on(name):
    case = BY_NAME[name]
    first, second = (cast(case, case.make(), torch.float32, DEVICE) for _ in range(2))
    with torch.no_grad():
        second[0].mul_(0.5)
    expected = [both(case, leaves) for leaves in (first, second)]
    dy = gradient_of(case, first)
    replays = [Replay(lambda leaves=leaves: both_with(case, leaves, dy)) for leaves in (first, second)]
    found = [replay() for replay in replays]
    for f, e in zip(found, expected, strict=True):
        close(f, e, 1e-5 * case.scale)
