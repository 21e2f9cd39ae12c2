"""Derivatives beyond the first: each is that of the one before it, of every order, or refused in so many words.

What an op's backward hands to autograd must itself be part of the graph. Where it is not, the next derivative is not
missed but wrong: the other paths to it are still there. Inputs here depend on one another, as those of a hypernetwork
do: what one owes to another must be counted once.
"""

import importlib

import pytest
import torch
from helpers import normal
from names import HOMES, PEFT

import torch_subspace as ts
from torch_subspace import grassmann, isotropy, lowrank
from torch_subspace.selftest import ROWS
from torch_subspace.tucker.depthwise import depthwise_weight_gradient

Z, V = normal(7, 3), normal(7, 3, seed=1)  # the point and the direction
OTHER, GATE = normal(4, 3, seed=2), normal(7, 3, seed=3).sigmoid()
FRAMES, LABELS = torch.linalg.qr(normal(5, 3, 2, seed=6)).Q.mT, torch.arange(7) % 5
CORE, FACTOR = normal(2, 2, seed=4), normal(5, 2, seed=5)
WEIGHT, KERNEL, CUBE = normal(5, 3, seed=7), normal(3, 2, 2, 2, seed=8), normal(2, 2, 2, 2, seed=9)

FUNCTIONS = {
    "subspace_logits": lambda z: ts.subspace_logits(z, FRAMES).sin().sum(),
    "subspace_logits of frames": lambda z: ts.subspace_logits(Z, FRAMES + 0.1 * z[:5, None]).sin().sum(),
    "subspace_cross_entropy": lambda z: ts.subspace_cross_entropy(z, FRAMES, LABELS),
    "subspace_scores": lambda z: grassmann.subspace_scores(z, FRAMES).sin().sum(),
    "subspace_denoise": lambda z: grassmann.subspace_denoise(z, FRAMES, noise=0.5).sin().sum(),
    "subspace_patch": lambda z: grassmann.subspace_patch(Z, z, z[0]).sin().sum(),
    "grouped_normalize": lambda z: grassmann.grouped_normalize(z, (1, 2)).sin().sum(),
    "coding_rate": lambda z: ts.coding_rate(z, eps=0.5),
    "rate_reduction": lambda z: ts.rate_reduction(z, LABELS, eps=0.5),
    "tucker_compose": lambda z: ts.tucker_compose(CORE, [z[:5, :2], z[2:, 1:]]).sin().sum(),
    "tucker_compose of a core": lambda z: ts.tucker_compose(z[:2, :2] ** 2, [FACTOR, None]).sin().sum(),
    "tucker_linear": lambda z: ts.tucker_linear(z, WEIGHT, None, z[:2, :2], FACTOR, z[5:]).sin().sum(),
    "tucker_conv": lambda z: ts.tucker_conv(
        z.flatten()[:18].view(1, 2, 3, 3), KERNEL, None, z[0, 0] * CUBE, [z[:3, :2], z[3:5, 1:], None, None]
    ).sin().sum(),
    "depthwise": lambda z: depthwise_weight_gradient(
        z.mT[None, :, :7], z.mT[None, :, 2:].square(), (3,), (1,), (0,), (1,)).sin().sum(),
    "hadamard": lambda z: lowrank.hadamard(z[:4].mT).sin().sum(),
    "fastfood": lambda z: lowrank.fastfood(z, 5, seed=0).sin().sum(),
    "fastfood_adjoint": lambda z: lowrank.fastfood_adjoint(z, 5, seed=0).sin().sum(),
    "sigreg": lambda z: isotropy.sigreg(z, seed=0, num_slices=8),
    "newton_schulz": lambda z: lowrank.newton_schulz(z, steps=2).sin().sum(),
    "lambda_orthogonality": lambda z: isotropy.lambda_orthogonality(z, 1.0),
    "gated_cosine": lambda z: isotropy.gated_cosine(z, OTHER, GATE).square().sum(),
    "simlap_loss": lambda z: isotropy.simlap_loss(z, z.roll(1, 0), GATE, LABELS, LABELS.roll(1)),
    "ridge_transition": lambda z: isotropy.ridge_transition(z, z.roll(1, 0)).sin().sum(),
    "group_lasso": lambda z: isotropy.group_lasso(z, [3, 4]),
}
REFUSED = {  # and from which order on
    "coding_rate_soft": (lambda z: ts.coding_rate(z, GATE, eps=0.5).sum(), 2),
    "sinkhorn": (lambda z: ts.sinkhorn(z @ z.mT, eta=1.0).square().sum(), 2),
    "von_neumann_entropy": (isotropy.von_neumann_entropy, 3),
    "procrustes": (lambda z: isotropy.procrustes(z, z.square()).sin().sum(), 2),
}


def test_every_op_with_a_derivative_is_here():
    """By its own word, or by a public function of its file."""
    here = {name.split()[0] for name in (*FUNCTIONS, *REFUSED)}
    for home in (home for home in HOMES if home != PEFT):
        here |= {getattr(importlib.import_module(home), n).__module__.rpartition(".")[2] for n in here & {*HOMES[home]}}
    with_one = [row.op for row in ROWS if row.trained]
    assert not [op for op in with_one if op not in here]


def along(function, order, at=0.0):
    """The derivative of function(Z + t V) at t."""
    t = torch.tensor(at, dtype=torch.float64, requires_grad=True)
    value = function(Z + t * V)
    for _ in range(order):
        value, = torch.autograd.grad(value, t, create_graph=True)
    return value.item()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_each_derivative_is_that_of_the_one_before(name):
    function, h = FUNCTIONS[name], 3e-4
    for order in (2, 3):
        below = [along(function, order - 1, at) for at in (-2 * h, -h, h, 2 * h)]
        expected = (8 * (below[2] - below[1]) - (below[3] - below[0])) / (12 * h)
        assert along(function, order) == pytest.approx(expected, rel=1e-6, abs=1e-7 * max(map(abs, below)))


@pytest.mark.parametrize("name", REFUSED)
def test_a_derivative_that_is_not_there_is_refused(name):
    """Also beside something that has one, where a missing path would go unnoticed."""
    function, order = REFUSED[name]
    along(function, order - 1)
    with pytest.raises((RuntimeError, NotImplementedError), match="derivative|gradient of its gradient"):
        along(lambda z: function(z) + z.square().sum() ** 2, order)
