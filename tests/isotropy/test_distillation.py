"""Mod-X: similarities that a former model had right are kept."""

import math

import pytest
import reference as ref
import torch
from helpers import close, normal
from sklearn.datasets import load_digits
from torch import nn

from torch_subspace.isotropy import SimilarityDistillationLoss, similarity_distillation


def similarities(n=6, seed=0):
    """Of a model that is right about most rows."""
    return normal(n, n, seed=seed) + 1.5 * torch.eye(n, dtype=torch.float64)


def test_matches_the_reference():
    for seed in range(3):
        old, new = similarities(seed=seed), similarities(seed=seed + 10)
        assert 0 < (old.argmax(1) == torch.arange(6)).sum() < 6 or seed
        expected = ref.similarity_distillation(old, new, tau=0.5, alpha=3.0)
        close([similarity_distillation(old, new, tau=0.5, alpha=3.0)], [expected], 1e-12)
        single = similarity_distillation(old.float(), new.float(), tau=0.5, alpha=3.0)
        assert single.dtype == torch.float32
        close([single], [expected], 1e-5)
    both = [torch.stack([similarities(seed=s), similarities(seed=s + 1)]) for s in (0, 10)]
    found = similarity_distillation(*both, tau=0.5, alpha=3.0)
    close([found], [torch.stack([similarity_distillation(o, n, tau=0.5, alpha=3.0) for o, n in zip(*both)])], 1e-12)


def test_what_its_words_leave_out():
    old, new = similarities(), similarities(seed=10)
    nce = nn.functional.cross_entropy(new / 0.5, torch.arange(6))
    rows = [nn.functional.kl_div((new / 0.5).log_softmax(1), (old / 0.5).log_softmax(1), log_target=True,
                                 reduction="none").sum(1)]
    off = ~torch.eye(6, dtype=torch.bool)
    without = [m[off].view(6, 5) / 0.5 for m in (old, new)]
    rows.append(nn.functional.kl_div(without[1].log_softmax(1), without[0].log_softmax(1), log_target=True,
                                     reduction="none").sum(1))
    right = old.argmax(1) == torch.arange(6)
    for diagonal, each in ((True, rows[0]), (False, rows[1])):
        for word, kept in (("all", each), ("correct", each * right)):
            found = similarity_distillation(old, new, tau=0.5, alpha=2.0, rows=word, diagonal=diagonal, symmetric=False)
            close([found], [nce + 2 * kept.mean()], 1e-12)


def test_the_public_code():
    """Its divergence is at temperature 1, summed over rows; rows that the old model had wrong become the new one's."""
    old, new = similarities(), similarities(seed=10).requires_grad_()
    label, theirs = torch.arange(6), 0
    for before, after in ((old.clone(), new), (old.mT.clone(), new.mT)):
        wrong = before.argmax(1) != label
        before[wrong] = after.detach()[wrong]
        divergence = nn.functional.kl_div(after.log_softmax(1), before.softmax(1), reduction="sum")
        theirs = theirs + (nn.functional.cross_entropy(after / 0.1, label) + 3 * divergence) / 2
    ours = similarity_distillation(old, new, tau=0.1, alpha=6 * 3, divergence_tau=1)
    close([ours.detach(), *torch.autograd.grad(ours, new)], [theirs.detach(), *torch.autograd.grad(theirs, new)], 1e-12)


OPTIONS = [{}, {"diagonal": False}, {"rows": "all"}, {"symmetric": False}]


@pytest.mark.parametrize("options", [*OPTIONS, {"divergence_tau": 1.0}], ids=str)
def test_the_module_is_the_function(options):
    old, new = (torch.stack([similarities(seed=s), similarities(seed=s + 1)]) for s in (0, 10))
    each = similarity_distillation(old, new, tau=0.5, alpha=2.0, **options)
    assert each.shape == (2,)
    for reduction, expected in (("mean", each.mean()), ("sum", each.sum()), ("none", each)):
        loss = SimilarityDistillationLoss(tau=0.5, alpha=2.0, reduction=reduction, **options)
        assert torch.equal(loss(old, new), expected)
    assert torch.equal(SimilarityDistillationLoss(tau=0.5, alpha=2.0, **options)(old[0], new[0]), each[0])
    assert all(f"{what}={value!r}" in repr(loss) for what, value in options.items())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_derivatives(options):
    old, new = similarities(4).requires_grad_(), similarities(4, seed=10).requires_grad_()

    def loss(new):
        return similarity_distillation(old, new, tau=0.5, alpha=2.0, **options)

    assert torch.autograd.gradcheck(loss, new)
    assert torch.autograd.gradgradcheck(loss, new)
    loss(new).backward()
    assert old.grad is None


def test_halves_autocast_and_not_a_number():
    old, new = similarities().half(), similarities(seed=10).half()
    wide = similarity_distillation(old.float(), new.float(), tau=0.1, alpha=1.0)
    assert wide.dtype == torch.float32 and torch.equal(similarity_distillation(old, new, tau=0.1, alpha=1.0), wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(similarity_distillation(old.float(), new.float(), tau=0.1, alpha=1.0), wide)
    for t in (old, new):
        t[0, 1] = math.nan
        assert similarity_distillation(old, new, tau=0.1, alpha=1.0).isnan()
        t[0, 1] = 0


@pytest.mark.parametrize("rows", ["correct", "all"])
@pytest.mark.parametrize("diagonal", [True, False])
def test_masked_entries_have_no_part(rows, diagonal):
    """-inf in both, or in the old alone: as very small numbers, which exp makes 0; in a row that the old model had
    wrong, in the new alone, too."""
    old, new = similarities(), similarities(seed=10)
    right = old.argmax(1) == torch.arange(6)
    assert right[2] and not right[0]
    options = {"tau": 0.5, "alpha": 2.0, "rows": rows, "diagonal": diagonal, "symmetric": False}
    cases = [("both", 2), ("old", 2)] + [("new", 0)] * (rows == "correct")
    for who, row in cases:
        results = []
        for low in (-math.inf, -1e5):
            before, after = old.clone(), new.clone()
            for t in {"both": (before, after), "old": (before,), "new": (after,)}[who]:
                t[row, 4] = low
            after.requires_grad_()
            loss = similarity_distillation(before, after, **options)
            results.append([loss.detach(), *torch.autograd.grad(loss, after)])
        close(*results, 1e-12)
    old[2, 4] = new[2, 4] = -math.inf
    assert similarity_distillation(old, new, **options | {"symmetric": True}).isfinite()


@pytest.mark.parametrize("rows", ["correct", "all"])
@pytest.mark.parametrize("diagonal", [True, False])
def test_a_row_that_is_masked_is_not_counted(rows, diagonal):
    """In InfoNCE it is: that is of the new similarities. Masked in both, too, where that leaves the pair's own."""
    old, new = similarities(), similarities(seed=10)
    off = ~torch.eye(6, dtype=torch.bool)[2]
    options = {"tau": 0.5, "rows": rows, "diagonal": diagonal, "symmetric": False}

    def of(old, new, alpha):
        new = new.clone().requires_grad_()
        loss = similarity_distillation(old, new, alpha=alpha, **options)
        (slope,) = torch.autograd.grad(loss, new, create_graph=True)
        (second,) = torch.autograd.grad(slope.square().sum(), new)
        return loss.detach(), slope.detach(), second

    def divergence(old, new):
        return [a - b for a, b in zip(of(old, new, 2.0)[:2], of(old, new, 0.0)[:2])]

    own, whole, both = old.clone(), old.clone(), new.clone()
    own[2, off] = both[2, off] = whole[2] = -math.inf
    none = old.clone()
    none[2] = new[2]  # whose divergence is 0
    expected = [6 / 5 * t for t in divergence(none, new)]
    assert expected[0] > 0
    for before, after in [(whole, new), (whole, both)] + [(own, new), (own, both)] * (not diagonal):
        close(divergence(before, after), expected, 1e-12)
        assert all(t.isfinite().all() for t in of(before, after, 2.0))
        assert similarity_distillation(before, after, alpha=2.0, **options | {"symmetric": True}).isfinite()
    nothing = torch.full_like(old, -math.inf)
    found, plain = of(nothing, new, 2.0), of(old, new, 0.0)
    close(found, plain, 1e-12)
    several = torch.stack([old, whole, nothing]), torch.stack([new] * 3)
    close([similarity_distillation(*several, alpha=2.0, **options)],
          [torch.stack([of(before, new, 2.0)[0] for before in several[0]])], 1e-12)


@pytest.mark.slow
def test_compile_without_graph_breaks():
    torch._dynamo.reset()
    old, new = similarities().float(), similarities(seed=10).float().requires_grad_()

    def loss(new):
        return similarity_distillation(old, new, tau=0.5, alpha=2.0)

    found, expected = torch.compile(loss, fullgraph=True, backend="aot_eager")(new), loss(new)
    close([found.detach(), *torch.autograd.grad(found, new)], [expected.detach(), *torch.autograd.grad(expected, new)],
          1e-5)


def test_less_of_old_digits_is_forgotten():
    """Upper and lower halves of digits are pairs; of 0 to 4 first, then of 5 to 9, with the old model's similarities or
    without. Share of 300 pairs that find one another, mean (range) of seeds 0 to 4:

        old pairs   .248 (.227 to .283) at first, .046 (.033 to .060) without, .111 (.100 to .120) with distillation
        new pairs                                 .247 (.230 to .270)          .151 (.137 to .163)

    What is kept is paid for."""
    image, label = load_digits(return_X_y=True)
    halves = torch.tensor(image, dtype=torch.float32).div(16).view(-1, 2, 32).transpose(0, 1)
    first, second = (halves[:, torch.tensor(label < 5) == early] for early in (True, False))

    def similar(towers, pairs):
        a, b = (nn.functional.normalize(tower(half), dim=1) for tower, half in zip(towers, pairs))
        return a @ b.mT

    def train(towers, pairs, seed, old=None, alpha=0.0, steps=100):
        draw, optimizer = torch.Generator().manual_seed(seed), torch.optim.Adam(towers.parameters(), lr=3e-3)
        for _ in range(steps):
            some = pairs[:, torch.randperm(pairs.shape[1], generator=draw)[:128]]
            with torch.no_grad():
                before = similar(old or towers, some)
            optimizer.zero_grad()
            similarity_distillation(before, similar(towers, some), tau=0.1, alpha=alpha).backward()
            optimizer.step()
        return towers

    def towers():
        return nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16)) for _ in range(2))

    def recall(model, pairs):
        """Among 300."""
        with torch.no_grad():
            return (similar(model, pairs[:, :300]).argmax(1) == torch.arange(300)).float().mean().item()

    found = []
    for seed in range(5):
        torch.manual_seed(seed)
        old = train(towers(), first, seed)
        row = [recall(old, first)]
        for alpha in (0.0, 20.0):
            new = towers()
            new.load_state_dict(old.state_dict())
            train(new, second, seed, old, alpha)
            row += [recall(new, first), recall(new, second)]
        found.append(row)
    before, without, new_without, kept, new_kept = torch.tensor(found).unbind(1)
    assert (before > kept).all() and (kept > 1.5 * without).all() and kept.mean() > 2 * without.mean()
    assert (new_kept < new_without).all() and (new_kept > 0.1).all()


S = torch.randn(3, 3)


@pytest.mark.parametrize("old, new, options, error, words", [
    (S, S[:2], {}, ValueError, r"similarity_distillation: new must be \(..., n, n\) with n > 0, got \(2, 3\)"),
    (S, S[:2, :2], {}, ValueError, r"old and new must be alike, got \(3, 3\) on cpu and \(2, 2\) on cpu"),
    (S, S, {"tau": 0}, ValueError, "tau must be positive and finite, got 0"),
    (S, S, {"alpha": -1}, ValueError, "alpha must be finite and >= 0, got -1"),
    (S, S, {"rows": "some"}, ValueError, "rows must be one of correct, all, got 'some'"),
    (S[:1, :1], S[:1, :1], {"diagonal": False}, ValueError, "diagonal=False needs n > 1"),
])
def test_bad_input_is_named(old, new, options, error, words):
    with pytest.raises(error, match=words):
        similarity_distillation(old, new, **{"tau": 0.1, "alpha": 1.0} | options)
    if options and "diagonal" not in options:
        with pytest.raises(error, match=f"SimilarityDistillationLoss: {words}"):
            SimilarityDistillationLoss(**{"tau": 0.1, "alpha": 1.0} | options)
    with pytest.raises(ValueError, match="reduction must be one of mean, sum, none, got 'max'"):
        SimilarityDistillationLoss(tau=0.1, alpha=1.0, reduction="max")
