"""What isotropy has beside its two ops, on a GPU against the CPU in float64. Never run so far: no GPU was at hand."""

import functools

import helpers
import pytest
import torch
from cases import DEVICE, ON_GPU, PRESENT
from helpers import frame_error, normal
from torch import nn

from torch_subspace import isotropy as iso

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not PRESENT, reason="needs a GPU")]
only_gpu = pytest.mark.skipif(not ON_GPU, reason="a GPU's own")
close = functools.partial(helpers.close, device=torch.device(DEVICE).type, floor=1e-2)
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5}


def states(z):
    """What a decoder has to make of features."""
    return z.detach().cumsum(-1)


def koopman(z, **options):
    return iso.KoopmanInformationLoss(k=2, **options)(z[:, :-1], z[:, 1:])


def decoded(z):
    """A decoder without parameters, and errors in states."""
    now, after = z[:, :-1], z[:, 1:]
    return iso.KoopmanInformationLoss(k=2)(now, after, decode=torch.tanh, states=states(now), next_states=states(after))


def lejepa(z, *centre, **options):
    return iso.LeJEPALoss(0.3, num_slices=70, **options)(z, *centre, seed=3)


def mod_x(new, **options):
    """From similarities of which the former model had most rows right."""
    n = new.shape[-1]
    old = normal(n, n, seed=8).to(new) + 2 * torch.eye(n, dtype=new.dtype, device=new.device)
    return iso.similarity_distillation(old, new, tau=0.5, alpha=3.0, **options)


POINTS, VIEWS, SERIES = normal(300, 24), normal(3, 50, 8), normal(6, 17, 5)
CALLS = {
    **{f"von_neumann_entropy of {of}": (functools.partial(iso.von_neumann_entropy, of=of), [VIEWS])
       for of in ("points", "covariance", "directions")},
    "von_neumann_entropy, few points": (iso.von_neumann_entropy, [normal(2, 9, 70)]),
    "ridge_transition": (iso.ridge_transition, [VIEWS, normal(3, 50, 6, seed=1)]),
    "ridge_transition, few points": (functools.partial(iso.ridge_transition, eta=2.0), [normal(9, 40), normal(9, 3)]),
    "procrustes": (iso.procrustes, [VIEWS, VIEWS @ normal(8, 8, seed=2) / 8 + VIEWS]),
    "lambda_orthogonality": (lambda w: iso.lambda_orthogonality(w, 3.0), [normal(2, 20, 30) / 5]),
    "lambda_orthogonality, large": (lambda w: iso.lambda_orthogonality(w, 12.0), [normal(300, 400) / 20]),
    "lambda_orthogonality of several": (lambda *w: iso.lambda_orthogonality(w, 0.5, alpha=2.0),
                                        [normal(9, 20) / 4, normal(20, 9) / 4, normal(5, 5) / 4]),
    "LeJEPALoss": (lejepa, [VIEWS]),
    "LeJEPALoss, pooled, to a centre": (functools.partial(lejepa, views="pooled", distance="mean"),
                                        [VIEWS, normal(2, 50, 8, seed=1)]),
    "SIGRegLoss": (lambda z: iso.SIGRegLoss(70)(z, seed=3), [VIEWS]),
    "KoopmanInformationLoss": (koopman, [SERIES]),
    "KoopmanInformationLoss, detached": (functools.partial(koopman, detach=True, entropy="minimise"), [SERIES]),
    "KoopmanInformationLoss in states": (decoded, [SERIES]),
    "similarity_distillation": (mod_x, [normal(40, 40, seed=1)]),
    "similarity_distillation off the diagonal": (
        functools.partial(mod_x, rows="all", diagonal=False, symmetric=False, divergence_tau=1.0), [normal(9, 9)]),
    "group_lasso": (lambda w: iso.group_lasso(w, (7, 1, 92, 200)), [POINTS * (torch.arange(300) != 7)[:, None]]),
}


def both(call, inputs, device, dtype):
    """The value, and its gradients."""
    leaves = [t.to(device, dtype, copy=True).requires_grad_() for t in inputs]
    y = call(*leaves)
    weight = torch.linspace(-1, 2, y.numel(), dtype=torch.float64).view(y.shape).to(y)
    return y.detach(), *torch.autograd.grad((y * weight).sum(), leaves)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name, dtype):
    close(both(*CALLS[name], DEVICE, dtype), both(*CALLS[name], "cpu", torch.float64), TOLERANCE[dtype])


@pytest.mark.parametrize("name", CALLS)
def test_autocast_rounds_nothing(name):
    expected = both(*CALLS[name], DEVICE, torch.float32)
    with torch.autocast(torch.device(DEVICE).type, dtype=torch.bfloat16):
        close(both(*CALLS[name], DEVICE, torch.float32), expected, 1e-6)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_proximal_steps(dtype):
    weight, sizes = normal(30, 4, 3) / 3, (3, 1, 6, 20)
    expected, found = weight.clone(), weight.to(DEVICE, dtype)
    for step in (0.0, 0.7, 0.7):
        assert iso.prox_group_lasso_(found, sizes, step) is found
        close([found], [iso.prox_group_lasso_(expected, sizes, step)], TOLERANCE[dtype])
    assert not found[3].any() and found[0].any()  # the group of one row is gone


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e19, 1e30])
def test_units_do_not_matter(size):
    for name in ("von_neumann_entropy of points", "von_neumann_entropy of directions", "procrustes"):
        call, inputs = CALLS[name]
        value, *gradients = both(call, [t * size for t in inputs], DEVICE, torch.float32)
        close([value, *(d.double() * size for d in gradients)], both(call, inputs, "cpu", torch.float64), 1e-4)


@pytest.mark.parametrize("call", [iso.von_neumann_entropy, iso.ridge_transition, iso.procrustes],
                         ids=lambda call: call.__name__)
def test_not_a_number_stays_in_its_view(call):
    """Decompositions on a GPU are told of it before they start."""
    inputs = [t.to(DEVICE).clone() for t in ((VIEWS,) if call is iso.von_neumann_entropy else (VIEWS, VIEWS.flip(0)))]
    clean = call(*inputs)
    inputs[0][1, 3, 2] = torch.nan
    found = call(*inputs)
    assert found[1].isnan().all()
    close([found[0], found[2]], [clean[0], clean[2]], 1e-12)


# ------------------------------------------------------------------------------------------------------------- modules


def pairs(device, dtype=torch.float64):
    """Points of two views, and their classes."""
    y = torch.stack([torch.arange(40) % 7, torch.arange(40) * 3 % 7]).to(device)
    return [normal(40, 12, seed=i).to(device, dtype).requires_grad_() for i in (1, 2)], y


def moved(module):
    return module.cuda() if ON_GPU else module.cpu()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_contrast_under_gates_moves(dtype):
    torch.manual_seed(0)
    loss, results = iso.SimLAPLoss(7, 12, width=9, dtype=torch.float64), []
    for device, kind in (("cpu", torch.float64), (DEVICE, dtype)):
        loss = (moved(loss) if device == DEVICE else loss).to(kind)
        z, y = pairs(device, kind)
        gate = loss.gate(*y)
        value = loss(*z, *y)
        results.append([gate.detach(), value.detach(), *torch.autograd.grad(value, [*z, *loss.parameters()])])
    close(results[1], results[0], TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_an_orthogonal_adapter_moves(dtype):
    """With its start, which may be Procrustes', and into plain layers."""
    x, turn = POINTS, torch.linalg.qr(normal(24, 24, seed=1)).Q
    adapter, linear = iso.OrthogonalAdapter(24, dtype=torch.float64), nn.Linear(9, 24, dtype=torch.float64)
    adapter.weight = iso.procrustes(x, x @ turn).mT
    expected = both(adapter, [x], "cpu", torch.float64)
    plain = [adapter.merge().weight, *adapter.merge(linear).parameters()]
    moved(adapter).to(dtype), moved(linear).to(dtype)
    close(both(adapter, [x], DEVICE, dtype), expected, TOLERANCE[dtype])
    close([adapter.merge().weight, *adapter.merge(linear).parameters()], plain, TOLERANCE[dtype])
    adapter.weight = iso.procrustes(x.to(DEVICE, dtype), (x @ turn).to(DEVICE, dtype)).mT
    close([adapter.weight], [turn.mT], TOLERANCE[dtype])


def test_what_is_made_there_is_there():
    there = torch.device(DEVICE).type
    loss, adapter = iso.SimLAPLoss(7, 12, device=DEVICE), iso.OrthogonalAdapter(12, device=DEVICE)
    (z, _), y = pairs(DEVICE, torch.float32)
    views = torch.stack([z.detach(), z.detach() + 1])
    made = [*loss.parameters(), *adapter.parameters(), *adapter.buffers(), loss.gate(*y), adapter(z),
            *adapter.merge().parameters(), iso.LeJEPALoss()(views), iso.SIGRegLoss()(views, seed=0),
            iso.group_lasso(z, (30, 10)), iso.von_neumann_entropy(z), iso.ridge_transition(z, z), iso.procrustes(z, z),
            iso.lambda_orthogonality([z, z.mT], 0.5)]
    assert {t.device.type for t in made} == {there} and all(t.isfinite().all() for t in made)
    torch.manual_seed(0)
    first, second = iso.LeJEPALoss()(views), iso.LeJEPALoss()(views)
    torch.manual_seed(0)
    assert first != second and iso.LeJEPALoss()(views) == first  # directions are from the device's own generator


@only_gpu
@pytest.mark.parametrize("call", [
    lambda z: iso.ridge_transition(z, z.cpu()), lambda z: iso.procrustes(z, z.cpu()),
    lambda z: iso.OrthogonalAdapter(24)(z), lambda z: iso.lambda_orthogonality([z, z.cpu()], 1.0),
    lambda z: iso.LeJEPALoss()(z[None], z[None].cpu()), lambda z: iso.similarity_distillation(
        (z @ z.mT).cpu(), z @ z.mT, tau=1.0, alpha=1.0),
    lambda z: iso.SimLAPLoss(3, 24, device=DEVICE)(z, z, *torch.zeros(2, 300, dtype=torch.int64)),
])
def test_two_devices_are_refused(call):
    with pytest.raises(ValueError, match="cuda"):
        call(POINTS.to(DEVICE))


# ------------------------------------------------------------------------------------------------------------ training


def trained(device, make, loss, steps=6):
    """The losses of some steps, and a module's parameters after them."""
    torch.manual_seed(0)
    module = make().to(device)
    optimiser, losses = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9), []
    for _ in range(steps):
        optimiser.zero_grad()
        losses.append(loss(module, device))
        losses[-1].backward()
        optimiser.step()
    return [torch.stack(losses).detach(), *(p.detach() for p in module.parameters())]


def network():
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12)).double()


class Gated(nn.Module):
    """A network whose output SimLAP judges, which is trained beside it."""

    def __init__(self):
        super().__init__()
        self.body, self.loss = network(), iso.SimLAPLoss(7, 12, width=9, dtype=torch.float64)

    def forward(self, device):
        (z1, z2), y = pairs(device)
        return self.loss(self.body(z1), self.body(z2), *y)


def embedded(body, device):
    z = body(normal(2, 60, 12).to(device))
    return iso.LeJEPALoss(0.5, num_slices=40)(z, seed=0) - 0.1 * iso.von_neumann_entropy(z, of="covariance").mean()


def foretold(body, device):
    z = body(normal(5, 15, 12).cumsum(1).to(device) / 4)
    return iso.KoopmanInformationLoss(alpha=0.1, tau=0.5)(z[:, :-1], z[:, 1:])


def compatible(body, device):
    """Near to old features that are turned, as alike to one another, by weights nearly orthogonal and in groups."""
    x = normal(60, 12).to(device)
    old, new = x @ iso.procrustes(x, x.roll(1, -1)), body(x)
    weights = [body[0].weight, body[2].weight]
    return ((new - old).square().mean() + 0.1 * iso.lambda_orthogonality(weights, 0.5).sum()
            + 0.1 * iso.similarity_distillation(old @ old.mT / 12, new @ new.mT / 12, tau=1.0, alpha=1.0)
            + 0.01 * iso.group_lasso(weights[0], (4,) * 4))


def turned(adapter, device):
    x = normal(60, 12).to(device)
    return (adapter(x) - x.roll(1, -1)).square().mean()


@pytest.mark.parametrize("make, loss", [(network, embedded), (network, foretold), (network, compatible),
                                        (Gated, lambda module, device: module(device)),
                                        (functools.partial(iso.OrthogonalAdapter, 12, dtype=torch.float64), turned)],
                         ids=["LeJEPA", "Koopman", "compatible", "SimLAP", "adapter"])
def test_steps_are_those_of_the_cpu(make, loss):
    expected, found = (trained(device, make, loss) for device in ("cpu", DEVICE))
    assert expected[0][-1] < expected[0][0]
    close(found, expected, 1e-8)


def test_an_adapter_stays_orthogonal():
    adapter = moved(iso.OrthogonalAdapter(12))
    optimiser = torch.optim.SGD(adapter.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        optimiser.zero_grad()
        turned(adapter, DEVICE).backward()
        optimiser.step()
    assert adapter.weight.device.type == torch.device(DEVICE).type and frame_error(adapter.weight[None]) < 1e-5
