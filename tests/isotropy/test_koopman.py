"""Linear dynamics: the ridge transition, the loss's terms, a pendulum and Lorenz's system, processes."""

import math

import pytest
import reference as ref
import torch
from helpers import close, in_two_processes, normal, same
from torch import nn

import torch_subspace as ts
from torch_subspace.isotropy import (
    KoopmanInformationLoss,
    koopman_information_loss,
    procrustes,
    ridge_transition,
    von_neumann_entropy,
)
from torch_subspace.isotropy.koopman import neighbour_nce

SHAPES = [((7, 4), 4), ((3, 6), 6), ((1, 1), 2), ((2, 5, 3), 3), ((2, 2, 3, 8), 5)]


def pendulum(count, steps, dt=0.2, damping=0.1, seed=0):
    """Angles and velocities, (count, steps, 2), by Runge and Kutta's fourth order; released between 0.3 and 3 rad."""
    angle = 0.3 + 2.7 * normal(count, seed=seed).sigmoid()
    state = torch.stack([angle, torch.zeros_like(angle)], -1)
    return integrate(lambda s: torch.stack([s[:, 1], -s[:, 0].sin() - damping * s[:, 1]], -1), state, steps, dt)


def lorenz(count, steps, dt=0.02, seed=0):
    """Lorenz's attractor, (count, steps, 3), about a tenth of its size."""
    def flow(s):
        x, y, z = s.unbind(-1)
        return torch.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], -1)

    state = normal(count, 3, seed=seed) + torch.tensor([1.0, 1, 25], dtype=torch.float64)
    return integrate(flow, state, steps + 100, dt)[:, 100:] / 10


def integrate(flow, state, steps, dt):
    states = [state]
    for _ in range(steps - 1):
        a = flow(state)
        b = flow(state + dt / 2 * a)
        c = flow(state + dt / 2 * b)
        d = flow(state + dt * c)
        states.append(state := state + dt / 6 * (a + 2 * b + 2 * c + d))
    return torch.stack(states, 1)


# ---------------------------------------------------------------------------------------------------------- transition


@pytest.mark.parametrize("shape, e", SHAPES, ids=str)
def test_matches_the_reference(shape, e):
    z, after = normal(*shape), normal(*shape[:-1], e, seed=1)
    for eta in (0.1, 3.0):
        expected = ref.ridge_transition(z, after, eta=eta)
        close([ridge_transition(z, after, eta=eta)], [expected], 1e-11)
        single = ridge_transition(z.float(), after.float(), eta=eta)
        assert single.dtype == torch.float32
        close([single], [expected], 1e-4)


@pytest.mark.parametrize("shape, e", [((5, 3), 2), ((2, 2, 3), 3)], ids=str)
def test_derivatives_of_the_transition(shape, e):
    z, after = normal(*shape).requires_grad_(), normal(*shape[:-1], e, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(ridge_transition, (z, after))
    assert torch.autograd.gradgradcheck(ridge_transition, (z, after))


def test_a_planted_map_is_recovered():
    """Several, each from its own points; and from fewer points than features, exactly where they are."""
    planted = normal(3, 5, 5, seed=1)
    z = normal(3, 40, 5)
    close([ridge_transition(z, z @ planted, eta=1e-9)], [planted], 1e-8)
    few = normal(3, 7)
    found = ridge_transition(few, few @ (planted := normal(7, 7, seed=2)), eta=1e-9)
    close([few @ found], [few @ planted], 1e-7)


def test_halves_and_autocast():
    z, after = normal(9, 5).bfloat16(), normal(9, 5, seed=1).bfloat16()
    wide = ridge_transition(z.float(), after.float())
    assert torch.equal(ridge_transition(z, after), wide) and wide.dtype == torch.float32
    leaves = [t.float().requires_grad_() for t in (z, after)]
    expected = torch.autograd.grad(ridge_transition(*leaves).square().sum(), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ridge_transition(*leaves)
        assert torch.equal(found, wide)
        assert same(torch.autograd.grad(found.square().sum(), leaves), expected)


@pytest.mark.parametrize("function", [ridge_transition, procrustes], ids=lambda f: f.__name__)
def test_the_first_of_two_dtypes_decides(function):
    """As of gated cosines; each has its gradient in its own."""
    given = normal(9, 4), normal(9, 4, seed=1)
    for first, second in ((torch.float32, torch.float64), (torch.float64, torch.float32)):
        x, y = (t.to(dtype).requires_grad_() for t, dtype in zip(given, (first, second)))
        found = function(x, y)
        assert torch.equal(found, function(x, y.to(first))) and found.dtype == first
        assert [d.dtype for d in torch.autograd.grad(found[0, 1], (x, y))] == [first, second]


def test_not_a_number_stays_in_its_view():
    z, after = normal(2, 6, 3), normal(2, 6, 3, seed=1)
    z[1, 0, 0] = math.nan
    found = ridge_transition(z, after)
    assert found[0].isfinite().all() and found[1].isnan().all()
    found = torch.vmap(ridge_transition)(z, after)
    close([found[0]], [ridge_transition(z[0], after[0])], 1e-12)
    assert found[1].isnan().all()
    assert torch.func.jvp(lambda z: ridge_transition(z, after[1]), (z[1],), (z[0],))[0].isnan().all()
    series = normal(2, 3, 6, 4)
    series[1, 0, 0, 0] = math.nan
    loss = KoopmanInformationLoss(k=1)
    close([torch.vmap(lambda z: loss(z, z))(series)[0]], [loss(series[0], series[0])], 1e-11)
    assert torch.vmap(lambda z: loss(z, z))(series)[1].isnan()
    assert torch.func.jvp(lambda z: loss(z, z), (series[1],), (series[0],))[0].isnan()


def test_what_is_not_positive_definite_is_not_a_number():
    """In torch.func, too, where the factor that Cholesky had begun would be taken for one."""
    z = torch.stack([normal(6, 3), 1e9 * torch.ones(6, 3, dtype=torch.float64)])
    z[1, :, 1] = 3e8
    for found in (ridge_transition(z, z), torch.vmap(ridge_transition)(z, z)):
        assert found[0].isfinite().all() and found[1].isnan().all()


def test_torch_func_takes_the_plain_formula():
    z, after = normal(3, 6, 4), normal(3, 6, 4, seed=1)
    close([torch.vmap(ridge_transition)(z, after)], [ridge_transition(z, after)], 1e-12)
    value, slope = torch.func.jvp(lambda z: ridge_transition(z, after[0]), (z[0],), (after[0],))
    leaf = z[0].clone().requires_grad_()
    (dz,) = torch.autograd.grad(ridge_transition(leaf, after[0]).sum(), leaf)
    close([slope.sum()], [(dz * after[0]).sum()], 1e-11)


# ---------------------------------------------------------------------------------------------------------------- loss


@pytest.mark.parametrize("entropy, sign", [("maximise", -1), ("minimise", 1)])
def test_the_loss_is_the_sum_of_its_terms(entropy, sign):
    z, after, decode = normal(3, 9, 4), normal(3, 9, 4, seed=1), nn.Linear(4, 6).double()
    x, x_next = normal(3, 9, 6, seed=2), normal(3, 9, 6, seed=3)
    with torch.no_grad():
        ahead = z @ torch.stack([ref.ridge_transition(*pair) for pair in zip(z, after)]).mean(0)
        nce = torch.stack([ref.neighbour_nce(t, 3, 0.07) for t in z]).mean()
        flat = z.reshape(27, 4)
        spread = ref.von_neumann_entropy(flat - flat.mean(0))
        both = 2.0 * nce + sign * 0.1 * spread
        close([KoopmanInformationLoss(entropy=entropy)(z, after)], [(ahead - after).square().mean() + both], 1e-11)
        errors = (decode(ahead) - x_next).square().mean() + 0.1 * (decode(z) - x).square().mean()
        found = KoopmanInformationLoss(entropy=entropy)(z, after, decode=decode, states=x, next_states=x_next)
    close([found], [errors + both], 1e-11)


@pytest.mark.parametrize("options", [
    {}, {"alpha": 1.0, "beta": 0.5, "lam": 2.0, "k": 2, "tau": 0.3, "eta": 1.0},
    {"entropy": "minimise", "detach": True},
], ids=str)
def test_the_function_is_the_module(options):
    z, after, x, x_next = (normal(3, 9, 4, seed=seed) for seed in range(4))
    for given in ({}, {"decode": torch.tanh, "states": x, "next_states": x_next}):
        results = []
        for loss in (KoopmanInformationLoss(**options), lambda *z, **o: koopman_information_loss(*z, **o, **options)):
            leaf = z.clone().requires_grad_()
            value = loss(leaf, after, **given)
            results.append([value.detach(), *torch.autograd.grad(value, leaf)])
        assert same(*results)


def test_neighbours():
    z = normal(2, 11, 3)
    for k in (1, 2, 4):
        close([neighbour_nce(z, k, 0.5)], [torch.stack([ref.neighbour_nce(t, k, 0.5) for t in z])], 1e-12)


@pytest.mark.parametrize("lengths", [1e-30, 1e-20, 1e19, 1e30, "all"])
def test_neighbours_have_no_unit(lengths):
    """Cosines of points of any lengths, and their gradients; one of 0 has cosines of 0 and no gradient."""
    z, weight = normal(2, 11, 3), normal(2, 7, seed=1)
    if lengths == "all":
        lengths = 10.0 ** torch.linspace(-30, 30, 11, dtype=torch.float64)[:, None]

    def found(z):
        z = z.detach().requires_grad_()
        nce = neighbour_nce(z, 2, 0.5)
        return nce.detach(), torch.autograd.grad((weight.to(nce) * nce).sum(), z)[0]

    expected, dz = found(z)
    nce, slope = found((z * lengths).float())
    close([nce, slope * lengths], [expected, dz], 1e-5)
    z[0, 5] = 0
    nce, slope = found((z * lengths).float())
    assert nce.isfinite().all() and slope.isfinite().all() and not slope[0, 5].any()
    close([nce, slope * lengths], found(z), 1e-5)


@pytest.mark.parametrize("size", [1e-30, 1e-20])
def test_of_tiny_features_neighbours_and_entropy_are_left(size):
    z, after = normal(3, 9, 4), normal(3, 9, 4, seed=1)
    expected = 2.0 * neighbour_nce(z, 3, 0.07).mean() - 0.1 * von_neumann_entropy(z.flatten(0, 1), of="covariance")
    close([KoopmanInformationLoss()(*((t * size).float() for t in (z, after)))], [expected], 1e-5)


@pytest.mark.parametrize("detach", [False, True])
def test_derivatives_of_the_loss(detach):
    z, after = normal(2, 5, 3).requires_grad_(), normal(2, 5, 3, seed=1).requires_grad_()
    loss = KoopmanInformationLoss(k=1, tau=0.5, detach=detach)
    if not detach:
        assert torch.autograd.gradcheck(loss, (z, after))
        assert torch.autograd.gradgradcheck(loss, (z, after))
    (ours,) = torch.autograd.grad(loss(z, after), after)
    ahead = z @ ridge_transition(z, after).mean(0)
    (ahead_alone,) = torch.autograd.grad((ahead.detach() - after).square().mean(), after)
    assert torch.allclose(ours, ahead_alone) == detach


def test_halves_of_the_loss():
    z, after = normal(2, 9, 4).half(), normal(2, 9, 4, seed=1).half()
    wide = KoopmanInformationLoss()(z.float(), after.float())
    assert wide.dtype == torch.float32
    assert torch.equal(KoopmanInformationLoss()(z, after), wide)
    leaves = [t.float().requires_grad_() for t in (z, after)]
    expected = torch.autograd.grad(KoopmanInformationLoss()(*leaves), leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = KoopmanInformationLoss()(*leaves)
        assert torch.equal(found, wide) and same(torch.autograd.grad(found, leaves), expected)


def foretold(z, transition, decode, states, steps=4):
    """The error of states so many steps ahead, as a part of their variance."""
    for _ in range(steps):
        z = z @ transition
    true = states[:, steps:]
    return ((decode(z[:, : true.shape[1]]) - true).square().mean() / (true - true.mean((0, 1))).square().mean()).item()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("states, features", [(pendulum(12, 33), 8), (lorenz(12, 33), 10)], ids=["pendulum", "Lorenz"])
def test_features_become_linear(states, features, seed):
    """One linear map for all trajectories foretells four steps better in features than in the states themselves.

    Error as a part of the states' variance: .0012 to .0023 against .0112 of pendulums, .010 to .013 against .282 of
    Lorenz's system."""
    torch.manual_seed(seed)
    states = states.float()
    x, x_next, size = states[:, :-1], states[:, 1:], states.shape[-1]
    encode = nn.Sequential(nn.Linear(size, 32), nn.Tanh(), nn.Linear(32, features))
    decode = nn.Sequential(nn.Linear(features, 32), nn.Tanh(), nn.Linear(32, size))
    optimizer = torch.optim.Adam([*encode.parameters(), *decode.parameters()], lr=1e-2)
    loss = KoopmanInformationLoss(alpha=1e-3, beta=1e-3, lam=1.0, eta=1e-3)
    for _ in range(300):
        optimizer.zero_grad()
        loss(encode(x), encode(x_next), decode=decode, states=x, next_states=x_next).backward()
        optimizer.step()
    with torch.no_grad():
        errors = []
        for now, after, back in ((encode(x), encode(x_next), decode), (x, x_next, lambda x: x)):
            transition = ridge_transition(now.flatten(0, 1), after.flatten(0, 1), eta=1e-3)
            errors.append(foretold(now, transition, back, states))
    print("{:.4f} against {:.4f}".format(*errors))
    assert errors[0] < errors[1] / 3


def test_the_entropys_sign_is_what_it_says():
    """A step along the loss's gradient raises the entropy, or lowers it."""
    z = (normal(4, 12, 6) * torch.tensor([3.0, 2, 1, 0.5, 0.3, 0.1])).requires_grad_()
    for word, sign in (("maximise", 1), ("minimise", -1)):
        loss = KoopmanInformationLoss(alpha=0, beta=100.0, entropy=word)(z[:, :-1], z[:, 1:])
        (dz,) = torch.autograd.grad(loss, z)
        step = z - 1e-3 * dz
        before, after = (von_neumann_entropy(t[:, :-1].flatten(0, 1), of="covariance") for t in (z, step))
        assert sign * (after - before) > 0


@pytest.mark.slow
def test_compile_without_graph_breaks():
    torch._dynamo.reset()
    z, after = normal(2, 9, 4, dtype=torch.float32).requires_grad_(), normal(2, 9, 4, seed=1, dtype=torch.float32)
    loss = KoopmanInformationLoss()
    found = torch.compile(loss, fullgraph=True, backend="aot_eager")(z, after)
    close([found.detach(), *torch.autograd.grad(found, z)],
          [loss(z, after).detach(), *torch.autograd.grad(loss(z, after), z)], 1e-5)


Z = torch.randn(2, 9, 3)


@pytest.mark.parametrize("make, error, words", [
    (lambda: ridge_transition(Z, Z[:, :5]), ValueError, "ridge_transition: z and z_next must be of the same points"),
    (lambda: ridge_transition(Z, Z, eta=0), ValueError, "eta must be positive and finite, got 0"),
    (lambda: KoopmanInformationLoss(entropy="+"), ValueError, "entropy must be one of maximise, minimise, got '\\+'"),
    (lambda: KoopmanInformationLoss(k=0), ValueError, "k must be >= 1, got 0"),
    (lambda: KoopmanInformationLoss(beta=-1), ValueError, "beta must be finite and >= 0, got -1"),
    (lambda: KoopmanInformationLoss(k=4)(Z, Z), ValueError, r"z must have T >= 2 k \+ 2 = 10 steps, got \(2, 9, 3\)"),
    (lambda: koopman_information_loss(Z, Z, k=4), ValueError, r"koopman_information_loss: z must have T >= 2 k \+ 2"),
    (lambda: koopman_information_loss(Z, Z, tau=0), ValueError, "koopman_information_loss: tau must be positive"),
    (lambda: koopman_information_loss(Z, Z, states=Z), ValueError, "got None for decode and next_states"),
    (lambda: KoopmanInformationLoss()(Z[0], Z[0]), ValueError, r"must be \(B, T, d\) with B > 0, got \(9, 3\)"),
    (lambda: KoopmanInformationLoss()(Z, Z, decode=nn.Identity(), states=Z), ValueError,
     "decode, states and next_states go together, got None for next_states"),
    (lambda: KoopmanInformationLoss()(Z, Z, decode=nn.Linear(3, 2), states=Z, next_states=Z), ValueError,
     r"decode\(z\) must be like next_states, got \(2, 9, 2\)"),
    (lambda: KoopmanInformationLoss()(Z, Z, decode=lambda z: [z], states=Z, next_states=Z), ValueError,
     r"decode\(z\) must be like next_states, got list"),
])
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


# ------------------------------------------------------------------------------------------------ two processes

PARTS = [(0, 2, 5), (0, 0, 5)]
CALLS = {  # of features (B, T, d)
    "entropy": lambda z, group: von_neumann_entropy(z.flatten(0, 1), process_group=group),
    "of the covariance": lambda z, group: von_neumann_entropy(z.flatten(0, 1), of="covariance", process_group=group),
    "in tiny units": lambda z, group: von_neumann_entropy(1e-200 * z.flatten(0, 1), process_group=group),
    "of views": lambda z, group: von_neumann_entropy(torch.stack([z.flatten(0, 1), z.flatten(0, 1) + 1]),
                                                     of="directions", process_group=group).sum(),
    "transition": lambda z, group: ridge_transition(z[:, :-1].flatten(0, 1), z[:, 1:].flatten(0, 1),
                                                    process_group=group).square().sum(),
    "function": lambda z, group: koopman_information_loss(z[:, :-1], z[:, 1:], k=2, process_group=group),
    "loss": lambda z, group: KoopmanInformationLoss(k=2, process_group=group)(z[:, :-1], z[:, 1:]),
}


def network():
    torch.manual_seed(0)
    return nn.Linear(6, 4).double()


def worker(rank, folder):
    """Losses and gradients of this rank's part, for both ways to part, under DistributedDataParallel."""
    torch.set_num_threads(1)
    found = []
    for parts in PARTS:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store{parts[1]}", rank=rank,
                                             world_size=2)
        for call in CALLS.values():
            net = nn.parallel.DistributedDataParallel(network())
            loss = call(net(normal(5, 8, 6)[parts[rank] : parts[rank + 1]]), torch.distributed.group.WORLD)
            loss.backward()
            found.append((loss.detach(), net.module.weight.grad, net.module.bias.grad))
        torch.distributed.destroy_process_group()
    torch.save(found, f"{folder}/{rank}.pt")


def test_two_processes_have_the_loss_and_the_gradient_of_the_whole_batch(tmp_path):
    """Also with parts of different sizes, and a process without points."""
    in_two_processes(worker, str(tmp_path))
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    for i, call in enumerate(CALLS.values()):
        net = network()
        loss = call(net(normal(5, 8, 6)), None)
        loss.backward()
        for rank in range(2):
            for found in results[rank][i :: len(CALLS)]:
                close(found, [loss.detach(), net.weight.grad, net.bias.grad], 1e-9, floor=1e-3)


def test_a_group_without_points(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="von_neumann_entropy: z must have points in one process at least"):
            ts.isotropy.von_neumann_entropy(torch.zeros(0, 4), process_group=torch.distributed.group.WORLD)
    finally:
        torch.distributed.destroy_process_group()
