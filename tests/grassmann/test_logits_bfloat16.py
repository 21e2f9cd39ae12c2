"""Logits and loss in bfloat16, which some processors multiply themselves: as exact as torch's own linear layer is."""

import pytest
import reference as ref
import torch
from hypothesis import given, settings, strategies
from kernels import MULTIPLIES_BF16, only_cpu
from test_logits import features, frames
from torch.nn import functional as F

import torch_subspace as ts
import torch_subspace.grassmann.logits as module

BF16 = torch.bfloat16
SIZES = [(1, 1, 1, 1), (70, 20, 4, 33), (300, 90, 8, 64), (3, 700, 1, 16), (33, 40, 3, 1030), (513, 5, 7, 21)]


def gradients(function, x, w, *rest, **options):
    """Of x and w, in float64."""
    x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
    return [g.double() for g in torch.autograd.grad(function(x, w, *rest, **options), (x, w), torch.ones(()))]


def by_linear(x, w, dlogits, normalize, gamma):
    """What torch's linear layer makes of both gradients, all around it being float64: it takes and gives bfloat16."""
    length = x.double().norm(dim=1, keepdim=True) if normalize else torch.ones(x.shape[0], 1)
    rows, xhat = w.flatten(0, 1), x.double() / length
    z = xhat @ rows.double().T
    norms = z.view(-1, *w.shape[:2]).norm(dim=2)
    factor = torch.where(norms > 0, gamma * dlogits.double() / norms, 0)
    dz = z * factor.repeat_interleave(w.shape[1], 1)
    layer_x, layer_w = xhat.to(BF16).requires_grad_(), rows.detach().requires_grad_()
    dx, dw = torch.autograd.grad(F.linear(layer_x, layer_w), (layer_x, layer_w), dz.to(BF16))
    dx = dx.double()
    if normalize:
        dx = (dx - xhat * (xhat * dx).sum(1, keepdim=True)) / length
    return dx.to(BF16).double(), dw.view_as(w).double()


@only_cpu
@settings(max_examples=60, deadline=None, derandomize=True)
@given(b=strategies.integers(1, 300), c=strategies.integers(1, 60), k=strategies.integers(1, 9),
       extra=strategies.integers(0, 90), normalize=strategies.booleans(), keep=strategies.booleans())
def test_gradients_are_as_exact_as_torchs_linear_layer_has_them(b, c, k, extra, normalize, keep):
    n, gamma = k + 8 + extra, 3.0
    x, w, g = features(b, n, dtype=BF16), frames(c, k, n, BF16), features(b, c, seed=1).to(BF16)
    truth = gradients(lambda x, w: (ref.logits(x, w, normalize=normalize, gamma=gamma) * g.double()).sum(), x.double(),
                      w.double())
    old, module.KEEP_PROJECTIONS = module.KEEP_PROJECTIONS, 1 << 40 if keep else -1
    ours = gradients(lambda x, w: (ts.subspace_logits(x, w, normalize=normalize, gamma=gamma) * g).float().sum(), x, w)
    module.KEEP_PROJECTIONS = old
    for a, t, e in zip(ours, by_linear(x, w, g, normalize, gamma), truth, strict=True):
        assert (a - e).norm() <= 1.05 * (t - e).norm() + 1e-6 * e.norm()


@only_cpu
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("b, c, k, n", SIZES)
def test_values_are_the_truth_rounded(b, c, k, n, normalize):
    x, w = features(b, n, dtype=BF16), frames(c, k, n, BF16)
    truth = ref.logits(x.double(), w.double(), normalize=normalize)
    ours = ts.subspace_logits(x, w, normalize=normalize).double()
    assert (ours - truth).abs().max() <= 1.01 * (truth.to(BF16).double() - truth).abs().max()
    labels = torch.arange(b) % c
    loss = ts.subspace_cross_entropy(x, w, labels, normalize=normalize)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), F.cross_entropy(truth, labels), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("power", [-100, -30, 30, 100])
def test_lengths_do_not_matter_however_large_or_small(power):
    x, w = features(9, 33, dtype=BF16), frames(7, 3, 33, BF16)
    scaled = x * 2.0**power
    scaled[2], x[2] = 0, 0
    assert torch.equal(ts.subspace_logits(scaled, w), ts.subspace_logits(x, w)) or power < -38  # below 1e-12: as torch
    if power > 0:
        ours, truth = (gradients(f, a, b) for f, a, b in (
            (lambda x, w: ts.subspace_logits(x, w).float().sum(), scaled, w),
            (lambda x, w: ref.logits(x, w).sum(), scaled.double(), w.double())))
        for a, e in zip(ours, truth):
            assert (a - e).norm() <= 0.01 * e.norm()


@pytest.mark.parametrize("n", [32, 33])
def test_what_is_not_finite_stays_where_it_is(n):
    """In pairs an odd row's last entry stands beside the next row's first."""
    x, w = features(6, n, dtype=BF16), frames(9, 2, n, BF16)
    clean = ts.subspace_logits(x, w)
    w[4, 0, 0] = torch.nan
    x[3, n - 1], x[4, 0] = torch.inf, torch.nan
    y = ts.subspace_logits(x, w)
    wrong = torch.zeros(6, 9, dtype=torch.bool)
    wrong[:, 4] = wrong[3] = wrong[4] = True
    assert torch.equal(y.isnan(), wrong)
    assert torch.equal(y[~wrong], clean[~wrong])


@only_cpu
def test_a_batch_of_several_blocks_is_summed_before_it_is_rounded():
    x, w, labels = features(600, 40, dtype=BF16), frames(30, 4, 40, BF16), torch.arange(600) % 30
    ours = gradients(lambda x, w: ts.subspace_cross_entropy(x, w, labels), x, w)
    truth = gradients(lambda x, w: F.cross_entropy(ref.logits(x, w), labels), x.double(), w.double())
    for a, e in zip(ours, truth):
        assert (a - e).norm() <= (4e-3 if MULTIPLIES_BF16 else 2e-3) * e.norm()
