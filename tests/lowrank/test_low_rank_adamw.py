"""LowRankAdamW: AdamW itself where nothing is projected, the formula where something is."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from helpers import close, normal, same
from low_rank_cases import FEEDBACKS, PROJECTORS, Reference, fixed, matrix, net, singular, stepped, train
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import torch_subspace as ts
from torch_subspace.lowrank import LowRankAdamW, low_rank_adamw, matrices, projectors, walsh

# ------------------------------------------------------------------------------------------------------- AdamW itself


@pytest.mark.parametrize("options", [
    {}, {"foreach": True}, {"foreach": False}, {"maximize": True, "weight_decay": 0.0},
    {"lr": torch.tensor(1e-2)}, {"betas": (0.8, 0.9), "eps": 1e-3}], ids=str)
def test_without_a_side_above_rank_it_is_adamw(options):
    options = {"lr": 1e-2, "weight_decay": 0.1} | options
    expected, model = net(), net()
    expected = train(expected, torch.optim.AdamW(expected.parameters(), **options), 4)
    assert same(train(model, LowRankAdamW(model.parameters(), rank=16, **options), 4)[-6:], expected[-6:])
    model = net()
    assert same(train(model, LowRankAdamW(model.parameters(), rank=27, **options), 4), expected)


def rounds_once():
    """Whether this BLAS adds a product to beta C with a single rounding, as MKL does on Intel's processors."""
    c, a = matrix(16, 40), matrix(16, 40)
    return not torch.equal(torch.addmm(c, a, torch.eye(40), beta=0.9), c * 0.9 + a)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_identity_as_a_projector_is_adamw(monkeypatch, decay):
    """At full rank, by the code that projects: bit for bit, but where decay and update are rounded once, not twice."""

    def identity(projector, g, rank, start, group):
        return torch.eye(g.shape[-1]), g @ torch.eye(g.shape[-1])

    def all_matrices(shape, rank):
        return tuple(shape) if len(shape) == 2 else None

    monkeypatch.setattr(matrices, "project", identity)
    monkeypatch.setattr(matrices, "matrix_shape", all_matrices)
    monkeypatch.setattr(low_rank_adamw, "matrix_shape", all_matrices)
    expected, model = net(), net()
    expected = train(expected, torch.optim.AdamW(expected.parameters(), lr=1e-2, weight_decay=decay), 12)
    optimizer = LowRankAdamW(model.parameters(), lr=1e-2, weight_decay=decay)
    assert same(train(model, optimizer, 12), expected) or (decay and rounds_once())
    p, q = matrix(12, 20), matrix(12, 20)
    expected = stepped(p, torch.optim.AdamW([p], lr=1e-2, weight_decay=decay), 12)
    found = stepped(q, LowRankAdamW([q], lr=1e-2, weight_decay=decay), 12)
    assert same([found], [expected]) or ((found - expected).abs() <= 12 * 2.0**-24 * expected.abs().clamp(min=1)).all()
    assert sum("basis" in state for state in optimizer.state.values()) == 2


# -------------------------------------------------------------------------------------------------------- the formula


@pytest.mark.parametrize("every, chunk", [(1, 20), (3, 20), (3, 1 << 17)])
@pytest.mark.parametrize("projector", ["svd", "cosine", "hadamard"])
def test_the_formula(projector, every, chunk, monkeypatch):
    monkeypatch.setattr(sys.modules["torch_subspace.lowrank.range_finder"], "CHUNK", chunk)
    p = matrix(9, 20, dtype=torch.float64)
    options = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1, "every": every, "scale": 0.5}
    basis = singular(4) if projector == "svd" else fixed(projector, 4)
    for feedback in (False, True):
        q = matrix(9, 20, dtype=torch.float64)
        reference = Reference(q.detach(), basis, feedback=feedback, **options)
        optimizer = LowRankAdamW([q], rank=4, projector=projector, side="columns", **options,
                                 error_feedback="dense" if feedback else None)
        for i in range(7):
            q.grad = normal(9, 20, seed=i) * torch.arange(1, 21) ** -0.5
            optimizer.step()
            close(q.detach(), reference.step(q.grad), 1e-9)
    assert p.dtype == torch.float64


@pytest.mark.parametrize("projector", PROJECTORS)
def test_both_sides(projector):
    """A matrix by rows is its transpose by columns, and the shorter side is what is taken."""
    found = []
    for shape, side in (((12, 30), "rows"), ((12, 30), "shorter"), ((30, 12), "columns"), ((30, 12), "shorter")):
        p = nn.Parameter(normal(12, 30) if shape[0] == 12 else normal(12, 30).mT.contiguous())
        optimizer = LowRankAdamW([p], rank=3, projector=projector, side=side, lr=0.1)
        for i in range(4):
            p.grad = normal(12, 30, seed=i) if shape[0] == 12 else normal(12, 30, seed=i).mT.contiguous()
            optimizer.step()
        assert optimizer.state[p]["exp_avg"].shape == (30, 3)
        found.append(p.detach() if shape[0] == 12 else p.detach().mT)
    close(found[1:], found[:1] * 3, 1e-9)


@pytest.mark.parametrize("side", ["rows", "columns"])
@pytest.mark.parametrize("every", [1, 2])
def test_hadamards_basis_by_transforms(monkeypatch, side, every):
    """From rank 64 on: there and back, some rows at a time, with feedback and what is not contiguous too."""
    monkeypatch.setattr(walsh, "CHUNK", 1000)
    options = {"lr": 0.01, "weight_decay": 0.1, "every": every}
    for feedback in (None, "dense"):
        p = matrix(72, 100, dtype=torch.float64)
        start = p.detach().mT if side == "rows" else p.detach()
        reference = Reference(start, fixed("hadamard", 64), feedback=bool(feedback), **options)
        optimizer = LowRankAdamW([p], rank=64, projector="hadamard", side=side, error_feedback=feedback, **options)
        for i in range(4):
            p.grad = normal(72, 100, seed=i) * torch.arange(1, 101) ** -0.5
            optimizer.step()
            expected = reference.step(p.grad.mT if side == "rows" else p.grad)
            close(p.detach(), expected.mT if side == "rows" else expected, 1e-9)
    strided = nn.Parameter(p.detach().mT.contiguous().mT)
    same_steps = [stepped(q, LowRankAdamW([q], rank=64, projector="hadamard", side=side))
                  for q in (strided, nn.Parameter(p.detach().clone()))]
    close(same_steps[0], same_steps[1], 1e-12)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("feedback", FEEDBACKS)
def test_what_is_not_finite_is_seen_in_blocks_that_no_column_is_of(feedback, every):
    """All columns are from the first of three blocks, the entry in the second."""
    p, weight = matrix(200, 192), torch.ones(192)
    weight[64:] = 1e-3
    optimizer = LowRankAdamW([p], rank=64, projector="hadamard", every=every, error_feedback=feedback)
    for i in range(4):
        p.grad = normal(200, 192, seed=i, dtype=torch.float32) * weight
        before = p.detach().clone()
        if i == 1:
            p.grad[3, 100] = torch.nan
            with pytest.warns(RuntimeWarning, match="had a non-finite gradient"):
                optimizer.step()
            assert optimizer.state[p]["hadamard"].max() < 64
        else:
            optimizer.step()
        assert torch.equal(p, before) == (i == 1) and optimizer.skipped == (i > 0)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("rank", [16, 64])
@pytest.mark.parametrize("projector", ["cosine", "hadamard"])
def test_rounding_is_not_stepped_along(projector, rank, every):
    """A gradient in three columns of a fixed basis: AdamW's step is in these alone."""
    p, kept = matrix(200, 128), [3, 40, 90]
    q = (ts.lowrank.cosine_basis(128) if projector == "cosine" else
         projectors.columns("hadamard", torch.arange(128), 128, torch.float32))
    optimizer = LowRankAdamW([p], rank=rank, projector=projector, every=every, lr=0.1, weight_decay=0.0)
    for i in range(4):
        p.grad, before = normal(200, 3, seed=i, dtype=torch.float32) @ q[:, kept].mT, p.detach().clone()
        optimizer.step()
        moved = p.detach() - before
        within = moved @ q[:, kept]
        assert (moved - within @ q[:, kept].mT).norm() < 1e-5 * moved.norm() and within.abs().min() > 0


@pytest.mark.parametrize("size, blocks", [(256, 1), (384, 3), (320, 5), (100, 3), (7, 3), (1, 1)])
def test_hadamards_basis_of_any_size(size, blocks):
    """Orthonormal and symmetric, in blocks of powers of two, whichever way it is applied."""
    entries = projectors.columns("hadamard", torch.arange(size), size, torch.float64)
    eye = torch.eye(size, dtype=torch.float64)
    close([entries @ entries, entries.mT], [eye, entries], 1e-14)
    close(walsh.walsh_spectrum(eye), entries, 1e-14)
    assert len(walsh.blocks(size)) == blocks and sum(walsh.blocks(size)) == size


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("projector", ["range", "svd"])
def test_a_gradient_of_lower_rank(projector, dtype, rank):
    """AdamW's sign in the one coordinate that there is. What rounding leaves of the others is not stepped along."""
    p, left, right = matrix(30, 24, dtype=dtype), normal(30, 1, seed=1), normal(24, 1, seed=2)
    before = p.detach().clone()
    optimizer = LowRankAdamW([p], rank=rank, projector=projector, lr=0.1, eps=0.0 if rank == 1 else 1e-30,
                             weight_decay=0.0)
    for scale in (1, 1e3, 1e-12):
        p.grad = (scale * left @ right.mT).to(dtype)
        optimizer.step()
        if scale == 1:
            expected = -0.1 * left.sign() @ right.mT / right.norm()
            close(p.detach() - before, expected, 1e-5 if dtype == torch.float32 else 1e-12)
    assert torch.linalg.matrix_rank(p.detach() - before, rtol=1e-4) == 1 and p.isfinite().all()


def test_kept_directions_of_a_gradient_that_has_fewer():
    """Columns of rounding alone are 0, all others the product to the bit, whatever the unit."""
    g, basis = normal(40, 3, seed=1) @ normal(3, 12, seed=2), torch.linalg.qr(normal(12, 5, seed=3)).Q
    basis[:, 4] = torch.linalg.svd(g).Vh[5]  # which g does not have
    for scale in (1.0, 1e-150, 1e150):
        expected = (scale * g) @ basis
        assert 0 < expected[:, 4].abs().max() < 1e-14 * scale * g.abs().max()
        low = projectors.along(scale * g, basis, None)
        assert torch.equal(low[:, :4], expected[:, :4]) and not low[:, 4].any()
    assert torch.equal(projectors.along(normal(40, 12), basis, None), normal(40, 12) @ basis)


def test_moments_turn_with_the_basis():
    """Directions that are found again in another order, and with other signs, make no difference."""
    p, order, sign = matrix(6, 9, dtype=torch.float64), torch.tensor([2, 0, 1]), torch.tensor([1.0, -1, -1])
    q = torch.linalg.qr(normal(9, 3, seed=3)).Q
    moments = normal(6, 3, seed=4), normal(6, 3, seed=5).square()
    from torch_subspace.lowrank.projectors import carried

    turned = carried(moments, ("basis", q), ("basis", q[:, order] * sign), 9)
    close(turned, [moments[0][:, order] * sign, moments[1][:, order]], 1e-13)
    mean, square = carried(moments, ("cosine", torch.tensor([1, 4, 7])), ("cosine", torch.tensor([0, 4, 8])), 9)
    assert torch.equal(mean, moments[0][:, [1, 1, 1]] * torch.tensor([0.0, 1, 0]))
    assert torch.equal(square, moments[1][:, [1, 1, 1]] * torch.tensor([0.0, 1, 0]))
    both = [carried(moments, (kind, torch.tensor([1, 4, 7])), ("basis", q), 9) for kind in ("cosine", "hadamard")]
    assert all((square >= 0).all() for _, square in both) and p.grad is None


# ------------------------------------------------------------------------------------------------ what is a matrix


def test_convolutions_embeddings_and_other_layouts():
    conv, flat = matrix(16, 5, 3, 3), nn.Parameter(normal(16, 45, dtype=torch.float32))
    last = nn.Parameter(conv.detach().clone(memory_format=torch.channels_last))
    results = []
    for p in (conv, flat, last):
        optimizer = LowRankAdamW([p], rank=4, lr=0.01)
        for i in range(3):
            p.grad = normal(16, 45, seed=i, dtype=torch.float32).view(p.shape)
            optimizer.step()
        results.append(p.detach().flatten(1))
    assert torch.equal(results[0], results[1]) and last.is_contiguous(memory_format=torch.channels_last)
    close(results[2], results[1], 1e-6)
    words = nn.Embedding(40, 12)
    before = words.weight.detach().clone()
    words(torch.tensor([3, 5, 3])).square().sum().backward()
    LowRankAdamW(words.parameters(), rank=2, weight_decay=0.0).step()
    changed = (words.weight != before).any(1)
    assert changed[[3, 5]].all() and changed.sum() == 2


@pytest.mark.parametrize("feedback", FEEDBACKS)
@pytest.mark.parametrize("projector", PROJECTORS)
def test_experts_are_that_many_matrices(projector, feedback):
    make = functools.partial(LowRankAdamW, rank=3, projector=projector, lr=0.1, error_feedback=feedback, every=2)
    experts = matrix(3, 8, 64, dtype=torch.float64)
    single = [nn.Parameter(e.clone()) for e in experts.detach()]
    together, apart = make([experts]), make(single)
    for i in range(4):
        experts.grad = normal(3, 8, 64, seed=i)
        for p, g in zip(single, experts.grad):
            p.grad = g.clone()
        together.step()
        apart.step()
    close(list(experts.detach()), [p.detach() for p in single], 1e-9)
    assert together.state[experts]["exp_avg"].shape == (3, 64, 3)
    assert together.state_bytes() == apart.state_bytes() - 2 * 4  # a count of steps each
    assert matrices.matrix_shape((6, 5, 3), 4) == (6, 15)  # of a convolution along one dimension
    assert matrices.matrix_shape((6, 2, 2), 4) is matrices.matrix_shape((), 1) is matrices.matrix_shape((0, 9, 9), 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype):
    p, wide = matrix(12, 20, dtype=dtype), matrix(12, 20, dtype=torch.float64)
    wide.data.copy_(p)
    results = []
    for q in (p, wide):
        optimizer = LowRankAdamW([q], rank=3, lr=0.05, error_feedback="int8")
        for i in range(3):
            q.grad = normal(12, 20, seed=i).bfloat16().to(q.dtype)
            optimizer.step()
        results.append(q.detach())
    close(results[0], results[1], 1e-15 if dtype == torch.float64 else 2e-2)
    state = LowRankAdamW([p], rank=3)
    stepped(p, state, 1)
    assert state.state[p]["exp_avg"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


# ----------------------------------------------------------------------------------------------------- its memory


@pytest.mark.parametrize("shape", [(512, 512), (256, 1024), (640, 384)])
@pytest.mark.parametrize("projector", PROJECTORS)
def test_state_bytes(projector, shape):
    p, plain, rank = matrix(*shape), matrix(*shape), 32
    optimizer, full = LowRankAdamW([p], rank=rank, projector=projector), torch.optim.AdamW([plain])
    assert optimizer.state_bytes() == 0
    stepped(p, optimizer, 2)
    stepped(plain, full, 2)
    m, n = max(shape), min(shape)
    basis = 4 * n * rank if projector in ("range", "svd") else 8 * rank
    assert optimizer.state_bytes() == 4 * 2 * m * rank + basis + 4
    whole = sum(t.nbytes for t in full.state[plain].values())
    assert optimizer.state_bytes() <= 1.1 * rank * (m + n) / (m * n) * whole
    fed = LowRankAdamW([p], rank=rank, projector=projector, error_feedback="int8")
    stepped(p, fed, 1)
    assert fed.state_bytes() - optimizer.state_bytes() <= 1.03 * m * n


@pytest.mark.parametrize("feedback", ["int8", "dense"])
@pytest.mark.parametrize("side", ["rows", "columns"])
def test_error_feedback_loses_nothing(feedback, side):
    """What went into the moments and what is left out add up to all gradients, to rounding, of 8 bits or all."""
    p, total, given = matrix(40, 96), 0, 0
    optimizer = LowRankAdamW([p], rank=4, error_feedback=feedback, lr=1.0, betas=(0.0, 0.0), side=side)
    for i in range(5):
        p.grad = normal(40, 96, seed=i, dtype=torch.float32)
        optimizer.step()
        state = optimizer.state[p]
        low, q = state["exp_avg"], state["basis"]
        total, given = total + p.grad, given + (low @ q.mT if side == "columns" else q @ low.mT)
    error = matrices.fed(torch.zeros(40, 96), state)
    close(given + error, total, 1e-6 if feedback == "dense" else 0.1)
    if feedback == "int8":
        assert state["error"].dtype == torch.int8 and state["error_scale"].shape == (40, 1)
        assert state["error"].abs().amax(1).eq(127).all()  # the scale is the largest's


def test_blocks_of_8_bits():
    from torch_subspace.lowrank import feedback

    sizes = {1: 1, 31: 1, 64: 1, 256: 1, 384: 2, 512: 2, 1000: 4, 1009: 1, 4096: 16, 30522: 3 * 2 * 1}
    found = {size: feedback.blocks(size) for size in sizes}
    assert all(size % count == 0 for size, count in found.items())
    assert {size: found[size] for size in list(sizes)[:-1]} == {k: sizes[k] for k in list(sizes)[:-1]}
    g = normal(700, 512, dtype=torch.float32)  # several chunks
    state = feedback.left_out(g, torch.zeros(700, 1), torch.zeros(1, 512), "int8")
    assert (feedback.fed(torch.zeros_like(g), state) - g).abs().max() <= 0.51 * state["error_scale"].max()
    several = feedback.left_out(g.view(70, 10, 512), torch.zeros(70, 10, 1), torch.zeros(70, 1, 512), "int8")
    assert torch.equal(several["error"].view(700, 512), state["error"])


@pytest.mark.parametrize("rank, most", [(4, 0.129), (16, 0.039), (64, 0.030)])
def test_digits(monkeypatch, rank, most):
    """The training loss of a network whose 256 x 256 layers are projected, AdamW's being 0.01 to 0.02: within what
    singular vectors and the range finder were first measured to leave."""
    pytest.importorskip("sklearn", reason="scikit-learn is not installed")
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "examples")
    import projectors

    found = projectors.train(projectors.low_rank(rank=rank), seed=0)
    assert found["loss"] < most and found["accuracy"] > 0.93


@pytest.mark.parametrize("projector", PROJECTORS)
def test_no_step_stalls(projector):
    """All do the same work, where directions are found in each: GaLore's every two hundredth takes a decomposition."""
    weight = nn.Parameter(normal(90, 70, dtype=torch.float32))
    opt, work = LowRankAdamW([weight], rank=8, projector=projector), []
    for i in range(7):
        weight.grad = normal(90, 70, seed=i, dtype=torch.float32)
        with Operations() as made:
            opt.step()
        work.append(made.names)
    assert work[0] and all(names == work[1] for names in work[2:])


class Operations(TorchDispatchMode):
    """The names and sizes of what torch does."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append((str(func), [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)]))
        return func(*args, **(kwargs or {}))
