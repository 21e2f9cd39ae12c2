"""SIGReg: values and gradients against the reference, its facts, directions, bad input."""

import math

import pytest
import torch
from helpers import close, normal, same
from hypothesis import given, settings, strategies
from kernels import only_cpu
from sigreg_cases import BACKWARD, OP, SHAPES, TOLERANCE, ours, problem, truth

from torch_subspace.isotropy import sigreg
from torch_subspace.isotropy.sigreg import draw

# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("v, n, d, slices, knots", SHAPES)
def test_matches_the_reference(v, n, d, slices, knots, dtype):
    z, directions = problem(v, n, d, slices, dtype)
    found = ours(z, directions, knots=knots)
    assert found[0].dtype == found[1].dtype == dtype
    close(found, truth(z, directions, knots=knots), TOLERANCE[dtype])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(n=strategies.integers(1, 140), d=strategies.integers(1, 40), slices=strategies.integers(1, 70),
       knots=strategies.integers(2, 40), t_max=strategies.floats(0.1, 6), size=strategies.floats(-2, 1.5),
       dtype=strategies.sampled_from(list(TOLERANCE)))
def test_matches_the_reference_anywhere(n, d, slices, knots, t_max, size, dtype):
    z, directions = problem(1, n, d, slices, dtype)
    z = z * 10**size
    close(ours(z, directions, knots=knots, t_max=t_max), truth(z, directions, knots=knots, t_max=t_max),
          10 * TOLERANCE[dtype])


def test_the_value_is_good_to_a_millionth():
    """At the size that speed is measured at, of standard normal points."""
    z, directions = problem(1, 512, 128, 256, torch.float32)
    z = (z - 0.3) / 0.8
    close(ours(z, directions)[:1], truth(z, directions)[:1], 1e-6)


@pytest.mark.parametrize("size", [1e-20, 1e-3, 1e3, 1e5, 1e12, 1e30])
def test_any_size_of_points(size):
    """Angles of many turns are reduced as exactly as they are known; beyond that, what is found is finite."""
    z, directions = problem(1, 40, 6, 5)
    found, expected = ours(z * size, directions), truth(z * size, directions)
    if size <= 1e5:
        close(found, expected, 1e-9)
    assert all(t.isfinite().all() for t in found)
    assert all(t.isfinite().all() for t in ours((z * size).float(), directions.float()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_widened(dtype):
    z, directions = (t.to(dtype) for t in problem(2, 150, 30, 70))
    loss, dz = ours(z, directions)
    wide_loss, wide_dz = ours(z.float(), directions.float())
    assert loss.dtype == torch.float32 and dz.dtype == dtype
    assert torch.equal(loss, wide_loss) and torch.equal(dz, wide_dz.to(dtype))


def test_views():
    z, directions = problem(6, 20, 5, 8)
    each = [truth(v, directions)[0] for v in z]
    close([sigreg(z.view(2, 3, 20, 5), directions=directions)], [torch.stack(each).view(2, 3)], 1e-12)
    pooled = sigreg(z.view(2, 3, 20, 5), directions=directions, views="pooled")
    assert pooled.shape == ()
    close([pooled], truth(z.reshape(120, 5), directions)[:1], 1e-12)


def test_nothing():
    for shape in ((0, 4, 3), (2, 0, 4, 3)):
        z = torch.zeros(shape, requires_grad=True)
        loss = sigreg(z, seed=0)
        loss.sum().backward()
        assert loss.shape == shape[:-2] and z.grad.shape == shape
    z, directions = torch.zeros(2, 0, 3), torch.eye(3)
    off = OP(z, directions, 5, 0.5)
    assert off.shape == (2, 2, 4, 3) and not off.any()
    assert BACKWARD(off, z, directions, 0.5).shape == z.shape


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_a_number_stays_one(bad):
    """In its own view."""
    z, directions = problem(2, 30, 5, 9)
    z[1, 3, 2] = bad
    for dtype in TOLERANCE:
        loss, dz = ours(z.to(dtype), directions.to(dtype))
        assert loss.isnan().tolist() == [False, True]
        assert dz[0].isfinite().all() and dz[1].isnan().all()


def test_large_points():
    """Finite, as long as their projections are."""
    assert sigreg(torch.full((4, 3), 1e37), seed=0).isfinite()
    assert sigreg(torch.full((4, 3), 3e38), directions=torch.ones(3, 1)).isnan()


def test_memory_of_any_order():
    z, directions = problem(2, 40, 24, 30)
    expected = ours(z, directions)
    for other in (z.mT.contiguous().mT, torch.stack([z, z], -1)[..., 0], z.repeat(1, 2, 2)[:, 40:, :24]):
        assert not other.is_contiguous()
        assert same(ours(other, directions), expected)
    assert same(ours(z, directions.mT.contiguous().mT), expected)


# --------------------------------------------------------------------------------------------------------------- facts


def test_normal_points_are_spread_and_collapsed_ones_not():
    z = normal(4000, 12, dtype=torch.float32)
    loss = sigreg(z, seed=0)
    assert 0.5 < loss < 2  # about 1 for any n
    stretched, shifted, split = z.clone(), z + 0.5, z.sign()
    stretched[:, 0] *= 3
    for worse in (0 * z, 0.5 * z, stretched, shifted, split):
        assert sigreg(worse, seed=0) > 4 * loss
    assert sigreg(0 * z, seed=0) > 100 * loss


def test_collapsed_points_have_the_value_that_the_integral_has():
    """All at 0: n times the integral of (1 - exp(-t²/2))² exp(-t²/2), by 4000 knots up to where nothing is left."""
    found = sigreg(torch.zeros(7, 3, dtype=torch.float64), knots=4000, t_max=12.0, seed=0)
    exact = 7 * math.sqrt(2 * math.pi) * (1 - 2 / math.sqrt(2) + 1 / math.sqrt(3))
    assert abs(found.item() / exact - 1) < 1e-6


def test_invariances():
    z, directions = problem(1, 60, 7, 20)
    loss, dz = ours(z, directions)
    turn = torch.linalg.qr(normal(7, 7, seed=5))[0]
    turned = ours(z @ turn, turn.mT @ directions)
    close([turned[0], turned[1] @ turn.mT], [loss, dz], 1e-12)
    mirrored = ours(-z, directions)
    close([mirrored[0], -mirrored[1]], [loss, dz], 1e-12)
    shuffle = torch.randperm(60)
    close(ours(z[:, shuffle], directions), [loss, dz[:, shuffle]], 1e-12)
    close(ours(z.repeat(1, 3, 1), directions), [3 * loss, dz.repeat(1, 3, 1)], 1e-12)  # as sure of it as of three


# ---------------------------------------------------------------------------------------------------------- directions


def test_a_seed_fixes_the_directions():
    z = normal(50, 9, dtype=torch.float32)
    first, again, other = (sigreg(z, seed=seed) for seed in (7, 7, 8))
    assert torch.equal(first, again) and not torch.equal(first, other)
    state = torch.get_rng_state()
    close([sigreg(z.double(), seed=7)], [first], 1e-5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(0)
    drawn = [sigreg(z) for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(drawn[0], sigreg(z)) and not torch.equal(*drawn)


def test_directions_are_drawn_evenly():
    for seed in (None, 0, 1, 2**63 - 1):
        directions = draw(torch.zeros(1, 6, dtype=torch.float64), 20000, seed, None)
        assert directions.shape == (6, 20000)
        close([directions.norm(dim=0)], [torch.ones(20000)], 1e-12)
        close([directions @ directions.mT / 20000], [torch.eye(6) / 6], 1e-2, absolute=True)
        close([directions.mean(1)], [torch.zeros(6)], 2e-2, absolute=True)
        fourth = directions.pow(4).mean(1)
        close([fourth], [torch.full((6,), 3 / (6 * 8))], 5e-3, absolute=True)
    assert draw(torch.zeros(1, 3), 5, 0, None).shape == (3, 5)  # an odd number of entries


# ---------------------------------------------------------------------------------------------------------- bad input

Z, A = torch.randn(6, 4), torch.eye(4)


@pytest.mark.parametrize("z, options, error, words", [
    ([1.0], {}, TypeError, "z must be a tensor, got list"),
    (Z.long(), {}, TypeError, "z must be float32, .* got torch.int64"),
    (Z[0], {}, ValueError, r"z must be \(..., n, d\) with n > 0 and d > 0, got \(4,\)"),
    (Z[:0], {}, ValueError, r"with n > 0 and d > 0, got \(0, 4\)"),
    (Z[:, :0], {}, ValueError, r"got \(6, 0\)"),
    (Z.expand(0, 6, 4), {"views": "pooled"}, ValueError, r"n > 0 and d > 0, got \(0, 6, 4\), pooled"),
    (Z, {"num_slices": 0}, ValueError, "num_slices must be >= 1, got 0"),
    (Z, {"num_slices": 2.5}, TypeError, "num_slices must be an int, got float 2.5"),
    (Z, {"knots": 1}, ValueError, "knots must be >= 2, got 1"),
    (Z, {"knots": 5000}, ValueError, "knots must be <= 4096, got 5000"),
    (Z, {"t_max": 0}, ValueError, "t_max must be positive and finite, got 0"),
    (Z, {"t_max": math.inf}, ValueError, "t_max must be positive and finite, got inf"),
    (Z, {"views": "all"}, ValueError, "views must be one of each, pooled, got 'all'"),
    (Z, {"seed": 1.5}, TypeError, "seed must be an int, got float 1.5"),
    (Z, {"seed": True}, TypeError, "seed must be an int, got bool True"),
    (Z, {"seed": -1}, ValueError, "seed must be >= 0, got -1"),
    (Z, {"seed": 2**63}, ValueError, "seed is too large, got 9223372036854775808"),
    (Z, {"process_group": "world"}, TypeError, "process_group must be one of torch.distributed, or None, got str"),
    (Z, {"directions": [1.0]}, TypeError, "directions must be a tensor, got list"),
    (Z, {"directions": A.long()}, TypeError, "directions must be float32, .* got torch.int64"),
    (Z, {"directions": A[:3]}, ValueError, r"directions must be \(4, slices\) with slices > 0, got \(3, 4\)"),
    (Z, {"directions": A[:, :0]}, ValueError, r"slices > 0, got \(4, 0\)"),
    (Z, {"directions": A.to("meta")}, ValueError, "one device, got cpu and meta"),
    (Z, {"directions": A, "seed": 0}, ValueError, "seed and directions exclude one another"),
    (Z, {"directions": A.clone().requires_grad_()}, ValueError, r"directions have no gradient"),
])
def test_bad_input_is_named(z, options, error, words):
    with pytest.raises(error, match=words) as caught:
        sigreg(z, **options)
    assert str(caught.value).startswith("sigreg: ")


@only_cpu
def test_the_op_itself_checks_too():
    """Whoever calls torch.ops directly gets an error, never a crash."""
    z = Z[None]
    off = OP(z, A, 5, 0.5)
    assert off.dtype == torch.float64 and off.shape == (1, 2, 4, 4)
    for bad in ((Z, A, 5, 0.5), (z, A[:3], 5, 0.5), (z, A[0], 5, 0.5), (z.half(), A.half(), 5, 0.5),
                (z, A.double(), 5, 0.5), (z.long(), A, 5, 0.5), (z, A[:, :0], 5, 0.5), (z[..., :0], A[:0], 5, 0.5),
                (z, A, 1, 0.5), (z, A, 5000, 0.5), (z, A, 5, 0.0), (z, A, 5, math.nan)):
        with pytest.raises(RuntimeError, match="sigreg: "):
            OP(*bad)
    for bad in ((off.float(), z, A, 0.5), (off[0], z, A, 0.5), (off[:, :1], z, A, 0.5), (off[..., :3], z, A, 0.5),
                (off[:, :, :0], z, A, 0.5), (off, z.repeat(2, 1, 1), A, 0.5), (off, z, A, -1.0)):
        with pytest.raises(RuntimeError, match="sigreg_backward: |sigreg: "):
            BACKWARD(*bad)
