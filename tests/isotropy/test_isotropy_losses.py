"""Losses of isotropy: their parts, the public codes' conventions, bad input, and that they load when used."""

import subprocess
import sys
from pathlib import Path

import pytest
import reference as ref
import torch
from helpers import close, normal
from sigreg_cases import problem

import torch_subspace as ts
from torch_subspace.isotropy import LeJEPALoss, SIGRegLoss, sigreg
from torch_subspace.isotropy.sigreg import draw


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_sigreg_loss(reduction):
    z = problem(3, 20, 5, 1)[0]
    each = sigreg(z, num_slices=9, knots=5, t_max=2.0, seed=4)
    expected = {"mean": each.mean(), "sum": each.sum(), "none": each}[reduction]
    assert torch.equal(SIGRegLoss(9, 5, 2.0, reduction=reduction)(z, seed=4), expected)
    pooled = SIGRegLoss(9, 5, 2.0, reduction=reduction, views="pooled")(z, seed=4)
    assert torch.equal(pooled, sigreg(z, num_slices=9, knots=5, t_max=2.0, seed=4, views="pooled"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_lejepa_loss(dtype):
    z, centre = normal(4, 30, 6).to(dtype), normal(2, 30, 6, seed=1).to(dtype)
    wide, other = z.double(), centre.double()
    spread = ref.sigreg(wide, draw(wide, 40, 3, None)).mean()
    apart, away = wide - wide.mean(0), wide - other.mean(0)
    for options, given, distance in (({}, (z,), apart.square().sum(-1)), ({"distance": "mean"}, (z,), apart.square()),
                                     ({"distance": "mean"}, (z, centre), away.square())):
        for weight in (0.02, 0.5, 0, 1):
            found = LeJEPALoss(weight, num_slices=40, **options)(*given, seed=3)
            assert found.dtype == (dtype if dtype == torch.float64 else torch.float32)
            expected = weight * spread + (1 - weight) * distance.mean()
            close([found], [expected], 1e-12 if dtype == torch.float64 else 1e-5)


def test_the_authors_minimal_code():
    """Its loss and gradient, with the directions that it would draw."""
    z, directions = normal(4, 64, 16).requires_grad_(), torch.nn.functional.normalize(normal(16, 256, seed=1), dim=0)
    t = torch.linspace(0, 3, 17, dtype=torch.float64)
    weight = torch.full((17,), 2 * 3 / 16, dtype=torch.float64)
    weight[[0, -1]] = 3 / 16
    angle = (z @ directions).unsqueeze(-1) * t
    off = (angle.cos().mean(-3) - torch.exp(-t * t / 2)).square() + angle.sin().mean(-3).square()
    spread = (off @ (weight * torch.exp(-t * t / 2)) * 64).mean()
    theirs = 0.02 * spread + 0.98 * (z.mean(0) - z).square().mean()
    ours = 0.02 * sigreg(z, directions=directions).mean()
    ours = ours + LeJEPALoss(weight=0, distance="mean")(z) * 0.98
    close([ours, *torch.autograd.grad(ours, z)], [theirs, *torch.autograd.grad(theirs, z)], 1e-12)


@pytest.mark.parametrize("knots, t_max, slices", [(17, 3.0, 1024), (9, 4.0, 50)])
def test_lightlys_formulas(knots, t_max, slices):
    """Its SIGReg and LeJEPALoss, 1.6: both terms of all views, global and local; the centre of the global ones."""
    others, ours = normal(2, 24, 6).requires_grad_(), normal(3, 24, 6, seed=1).requires_grad_()  # global, local
    every, lam = torch.cat([others, ours]), 0.05
    t = torch.linspace(0, t_max, knots, dtype=torch.float64)
    normal_one = torch.exp(-t.square() / 2)
    weight = torch.full_like(t, 2 * t_max / (knots - 1))
    weight[[0, -1]] /= 2
    angle = (every @ draw(every, slices, 3, None)).unsqueeze(-1) * t  # views, points, directions, knots
    apart = (angle.cos().mean(1) - normal_one).square() + angle.sin().mean(1).square()
    spread = (24 * apart @ (weight * normal_one)).mean()
    both = lam * spread + (1 - lam) * (others.mean(0) - every).square().mean()
    found = LeJEPALoss(lam, num_slices=slices, knots=knots, t_max=t_max, distance="mean")(
        torch.cat([others, ours]), others, seed=3)
    for mine, theirs in ((SIGRegLoss(slices, knots, t_max)(every, seed=3), spread), (found, both)):
        close([mine.detach(), *torch.autograd.grad(mine, (others, ours), retain_graph=True)],
              [theirs.detach(), *torch.autograd.grad(theirs, (others, ours), retain_graph=True)], 1e-11)


def test_the_page_has_lightlys_call():
    """In the row that names it."""
    page = (Path(__file__).parents[2] / "docs" / "isotropy.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith("| `lightly`: `LeJEPALoss")]
    theirs, call = (cell.strip(" `").removeprefix("lightly`: `") for cell in row.strip("|").split("|"))
    assert theirs == "LeJEPALoss(lambda_param)(local_proj=local_proj, global_proj=global_proj)"
    given = {"local_proj": normal(3, 24, 6, seed=1), "global_proj": normal(2, 24, 6), "lambda_param": 0.05}
    torch.manual_seed(0)
    found = eval(call, {"torch": torch, "LeJEPALoss": LeJEPALoss, **given})
    torch.manual_seed(0)
    every = torch.cat([given["global_proj"], given["local_proj"]])
    spread = sigreg(every, directions=draw(every, 1024, None, None)).mean()
    distance = (given["global_proj"].mean(0) - every).square().mean()
    close([found], [0.05 * spread + 0.95 * distance], 1e-12)


def test_gradients_of_both_terms():
    z, centre = normal(3, 7, 4).requires_grad_(), normal(2, 7, 4, seed=1).requires_grad_()
    for given in ((z,), (z, centre)):
        assert torch.autograd.gradcheck(lambda *views: LeJEPALoss(0.3, num_slices=5)(*views, seed=0), given)


@pytest.mark.parametrize("make, error, words", [
    (lambda: SIGRegLoss(0), ValueError, "SIGRegLoss: num_slices must be >= 1, got 0"),
    (lambda: SIGRegLoss(knots=1), ValueError, "SIGRegLoss: knots must be >= 2, got 1"),
    (lambda: SIGRegLoss(reduction="max"), ValueError, "reduction must be one of mean, sum, none, got 'max'"),
    (lambda: LeJEPALoss(1.5), ValueError, r"LeJEPALoss: weight must be in \[0, 1\], got 1.5"),
    (lambda: LeJEPALoss(distance="l1"), ValueError, "LeJEPALoss: distance must be one of squared, mean, got 'l1'"),
    (lambda: LeJEPALoss(views="all"), ValueError, "LeJEPALoss: views must be one of each, pooled"),
    (lambda: LeJEPALoss()(normal(5, 4)), ValueError, r"LeJEPALoss: z must be \(V, n, d\) with V > 0, got \(5, 4\)"),
    (lambda: LeJEPALoss()(normal(0, 5, 4)), ValueError, r"got \(0, 5, 4\)"),
    (lambda: LeJEPALoss()(normal(2, 5, 4), normal(2, 6, 4)), ValueError, "z and centre must be of the same points"),
])
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_the_family_is_loaded_on_first_use():
    """And its names are functions and classes, whatever was imported first."""
    program = """
import sys, torch_subspace as ts
assert "torch_subspace.isotropy.losses" not in sys.modules
import torch_subspace.isotropy.sigreg
assert callable(ts.isotropy.sigreg) and ts.isotropy.LeJEPALoss and set(ts.isotropy.__all__) <= set(dir(ts.isotropy))
try:
    ts.isotropy.nothing
except AttributeError as error:
    assert "no attribute 'nothing'" in str(error)
else:
    raise SystemExit(1)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
    assert ts.isotropy.sigreg is sigreg
