"""Coding rates of points of any length: multiples of one row, whose rate has a closed form, in every membership."""

import math

import pytest
import torch
from helpers import close, normal
from kernels import only_cpu

import torch_subspace as ts

EACH = pytest.mark.parametrize("kind", ["none", "labels", "weights"])


def on_a_line(n, d, exponent, dtype):
    """Points c_i u of length about 2^exponent, without rounding; R and dR/dz in float64 for eps = 0.5."""
    u = normal(d, seed=d).mul(64).round() / 64
    c = math.ldexp(1.0, exponent) * (torch.arange(n, dtype=torch.float64) % 3 + 1)
    x = d / (0.5 * n) * (c.square().sum() * u.square().sum())
    z = c[:, None] * u
    return z.to(dtype), torch.log1p(x) / 2, d / (0.5 * n) / (1 + x) * z


def membership(kind, n, dtype):
    return {"none": None, "labels": torch.zeros(n, dtype=torch.int64), "weights": torch.ones(n, 1, dtype=dtype)}[kind]


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n, d", [(40, 12), (12, 40), (1, 9), (300, 270)])
def test_long_points_of_rank_one(n, d, dtype, kind):
    for exponent in (-30, -10, 0, 10, 17, 25, 30):
        z, rate, dz = on_a_line(n, d, exponent, dtype)
        z.requires_grad_()
        found = ts.coding_rate(z, membership(kind, n, dtype))
        close(found, rate, 1e-4 if kind == "weights" and dtype == torch.float32 else 1e-5)
        dz_found, = torch.autograd.grad(found, z)
        longest = math.sqrt(2 * d / n) / 2 if exponent > 0 else dz.abs().max().item()  # there can be; there is
        close(dz_found, dz, (1e-4 + 4e-15 * math.exp(rate)) * longest, absolute=True)


@only_cpu
@EACH
def test_what_float64_rounds_away_is_refused(kind):
    for n, d in ((40, 12), (20, 20)):
        z, _, _ = on_a_line(n, d, 50, torch.float64)
        with pytest.raises(RuntimeError, match="coding_rate.*scale z"):
            ts.coding_rate(z, membership(kind, n, torch.float64))


@EACH
@pytest.mark.parametrize("length", [1e10, 1e15])
def test_long_points_of_full_rank_are_right(kind, length):
    """Where nothing cancels the length does not matter: R grows by half the rank times log of its square."""
    z = torch.nn.functional.normalize(normal(60, 8), dim=1)
    first, second = (ts.coding_rate(s * z, membership(kind, 60, torch.float64)) for s in (length, 100 * length))
    assert abs(second - first - 8 * math.log(100)) < 1e-9


@EACH
def test_mixed_lengths_of_low_rank(kind):
    """One class of long points on a line and one of short ones, or all of them as one, in float32."""
    z, rate, _ = on_a_line(30, 6, 30, torch.float32)
    short = torch.nn.functional.normalize(normal(30, 6, seed=1), dim=1).float()
    if kind == "none":
        u, whole = z[0].double() / z[0].double().norm(), torch.cat([z, short]).double()
        rest = short.double() - short.double() @ u[:, None] * u
        square = 6 / (0.5 * 60)
        expected = (torch.logdet(torch.eye(6, dtype=torch.float64) + square * rest.mT @ rest)
                    + torch.log(square * (whole @ u).square().sum())) / 2
        close(ts.coding_rate(whole.float()), expected, 1e-5)
        return
    labels = torch.arange(60) // 30
    member = labels if kind == "labels" else torch.nn.functional.one_hot(labels).float()
    close(ts.coding_rate(torch.cat([z, short]), member), (rate + ts.coding_rate(short.double())) / 2, 1e-5)


def test_the_plain_formula_says_nan_rather_than_something_wrong():
    for kind in ("none", "labels", "weights"):
        for exponent, well in ((5, True), (30, False)):
            z, rate, _ = on_a_line(20, 6, exponent, torch.float64)
            member = membership(kind, 20, torch.float64)
            try:
                dz, found = torch.func.grad_and_value(lambda z, m=member: ts.coding_rate(z, m))(z)
            except RuntimeError:  # the factorisation itself
                assert not well
                continue
            assert bool(found.isfinite()) == well and bool(dz.isfinite().all()) == well
            assert not well or abs(found / rate - 1) < 1e-9


def test_the_plain_formula_of_weights_is_in_float64():
    z, rate, _ = on_a_line(20, 6, 10, torch.float32)
    found = torch.func.vmap(lambda w: ts.coding_rate(z, w))(torch.ones(2, 20, 1))
    close(found, rate.expand(2), 1e-6)
