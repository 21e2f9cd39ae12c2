"""The probe finds a planted tree metric, and some of the syntax of Python's own library in a small embedding."""

import ast
import copy
import inspect
import zlib

import helpers
import pytest
import reference as ref
import torch
from helpers import normal
from optim_cases import ADAM, SGD

import torch_subspace as ts
from torch_subspace.grassmann import OrthogonalProbe


def test_its_values():
    probe = OrthogonalProbe(7, 3, 4, 5, dtype=torch.float64)
    x, v = normal(2, 6, 7, seed=1), probe.basis
    z = x @ v.mT
    near = (z[:, 1:] - z[:, :-1]).square().sum(-1)
    helpers.close(probe(x), near, 1e-14, absolute=True)
    far = probe.distances(x)
    helpers.close(far.diagonal(1, 1, 2), near, 1e-14, absolute=True)
    helpers.close(far, torch.cdist(z, z).square(), 1e-12, absolute=True)
    distance, pair, token = normal(2, 5, seed=2).abs(), torch.arange(10).view(2, 5) % 4, torch.arange(12).view(2, 6) % 5
    entropy = torch.nn.functional.cross_entropy
    expected = ((near - distance).abs().mean()
                + entropy(((z[:, 1:] - z[:, :-1]) @ probe.pairs.mT).flatten(0, 1), pair.flatten())
                + entropy((z @ probe.tokens.mT).flatten(0, 1), token.flatten()))
    helpers.close(probe.loss(x, distance, pair, token), expected, 1e-13)
    longer = torch.cat([x, normal(2, 3, 7, seed=3)], 1)  # padding counts for nothing
    padded = [torch.nn.functional.pad(t, (0, 3), value=v)
              for t, v in ((distance, torch.nan), (pair, -100), (token, -100))]
    helpers.close(probe.loss(longer, *padded), expected, 1e-13)
    assert probe.loss(x, torch.full_like(distance, torch.nan)) == 0
    loss = torch.compile(probe.loss, fullgraph=True, backend="aot_eager")(x, distance)
    helpers.close(loss, (near - distance).abs().mean(), 1e-13)
    half = copy.deepcopy(probe).float()
    assert (half(x.bfloat16()) - probe(x.bfloat16().double())).abs().max() < 1e-5


def test_float32_distances_of_near_tokens_far_out_are_those_of_their_differences():
    probe = OrthogonalProbe(7, 7)
    with torch.no_grad():
        probe.basis.copy_(torch.eye(7))
    x = (100 + 1e-3 * normal(2, 6, 7, seed=1)).float().requires_grad_()
    x.data[0, 3] = x.data[0, 2]
    weight = normal(2, 6, 6, seed=2).float()

    def found(distances):
        return distances, *torch.autograd.grad((weight * distances).sum(), x)

    z = x.double()
    exact = (z[:, :, None] - z[:, None]).square().sum(-1)
    ours = probe.distances(x)
    assert ours.dtype == torch.float32 and not ours.diagonal(0, 1, 2).any() and ours[0, 2, 3] == 0 <= ours.min()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-6, atol=1e-9 * exact.max().item())
    helpers.close(found(ours), found(exact), 1e-5)


def tree(count, generator):
    """Parents of a random tree, each before its children."""
    return [None] + [int(torch.randint(max(0, i - 6), i, (1,), generator=generator)) for i in range(1, count)]


def ancestors(parents):
    """Of each node, itself first."""
    found = []
    for i, parent in enumerate(parents):
        found.append([i] if parent is None else [i, *found[parent]])
    return found


@pytest.mark.parametrize("kind", [SGD, ADAM], ids=lambda kind: kind.__name__)
def test_a_planted_tree_is_found(kind):
    """Nodes add up the directions of their ancestors, so that squared distances are paths; noise is in all others."""
    g = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(normal(40, 40, seed=1))[0].mT.float()
    inside, outside = axes[:12], axes[12:]
    sentences, paths = [], []
    for _ in range(60):
        own = ancestors(tree(12, g))
        order = torch.randperm(12, generator=g).tolist()
        vectors = torch.zeros(12, 12)
        for row, node in enumerate(order):
            vectors[row, own[node][:-1]] = 1
        sentences.append(vectors @ inside + 1.5 * torch.randn(12, 28, generator=g) @ outside)
        paths.append([len(set(own[a]) ^ set(own[b])) for a, b in zip(order, order[1:])])
    x, distance = torch.stack(sentences), torch.tensor(paths, dtype=torch.float32)
    probe = OrthogonalProbe(40, 12, generator=g)
    options = {"lr": 0.02, "momentum": 0.9} if kind is SGD else {"lr": 0.05}
    optimiser = kind(ts.param_groups(probe), **options)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 300)
    before = probe.loss(x, distance).item()
    for _ in range(300):
        optimiser.zero_grad()
        probe.loss(x, distance).backward()
        optimiser.step()
        schedule.step()
    assert probe.basis_error() < 1e-6
    after = probe.loss(x, distance).item()
    assert after < 0.1 * before, (before, after)
    angles = ref.principal_angles(probe.basis.detach().double(), inside[1:].double())  # no path has the root's edge
    assert angles.max() < 0.2


def leaves(node, path=()):
    """(what stands there, its ancestors) of the names, constants and arguments of a syntax tree, from left to right."""
    path = (*path, node)
    word = getattr(node, "id", None) or getattr(node, "arg", None) or getattr(node, "attr", None)
    if isinstance(node, ast.Constant):
        word = type(node.value).__name__
    inner = [leaf for child in ast.iter_child_nodes(node) if not isinstance(child, ast.expr_context)
             for leaf in leaves(child, path)]
    return inner + ([(word, path)] if word else []) if inner or word else []


def corpus(modules):
    """Words and syntactic distances of the statements in the functions of modules of the standard library."""
    found = []
    for module in modules:
        for statement in ast.walk(ast.parse(inspect.getsource(module))):
            if not isinstance(statement, (ast.Assign, ast.Return, ast.Expr, ast.AugAssign)):
                continue
            own = leaves(statement)
            if 6 <= len(own) <= 24:
                paths = [{id(n) for n in path} for _, path in own]
                found.append(([word for word, _ in own], [len(a ^ b) for a, b in zip(paths, paths[1:])]))
    return found


def embedded(words, size=24, window=2):
    """A vector of each word that its characters decide, beside those of its neighbours."""
    own = torch.stack([torch.randn(size, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
                       for word in [""] * window + words + [""] * window])
    return torch.cat([own[i : i + len(words)] for i in range(2 * window + 1)], 1) / size**0.5


def test_syntax_of_the_standard_library():
    """In modules held out, distances in the trained subspace go with those of the trees; in a random one and in that
    of PCA they don't."""
    import argparse
    import calendar
    import configparser
    import csv
    import shutil
    import statistics
    import textwrap

    def batch(modules):
        statements = corpus(modules)
        most = max(len(words) for words, _ in statements)
        x, distance = torch.zeros(len(statements), most, 120), torch.full((len(statements), most - 1), torch.nan)
        for i, (words, paths) in enumerate(statements):
            x[i, : len(words)], distance[i, : len(paths)] = embedded(words), torch.tensor(paths, dtype=torch.float32)
        return x, distance

    x, distance = batch([argparse, calendar, csv, shutil, statistics])
    other, truth = batch([configparser, textwrap])
    known = ~truth.isnan()
    assert len(x) > 300 and known.sum() > 300

    def correlation(probe):
        with torch.no_grad():
            return torch.corrcoef(torch.stack([probe(other)[known], truth[known]]))[0, 1].item()

    principal, tokens = OrthogonalProbe(120, 16), x[x.any(-1)]
    with torch.no_grad():
        principal.basis.copy_(torch.linalg.svd(tokens - tokens.mean(0), full_matrices=False).Vh[:16])
    for seed in range(3):
        probe = OrthogonalProbe(120, 16, generator=torch.Generator().manual_seed(seed))
        before = correlation(probe)
        scale = torch.nn.Parameter(torch.tensor(3.0))  # the embedding has no unit
        optimiser = ADAM([*probe.parameters(), scale], lr=0.02, weight_decay=0.0)
        for _ in range(60):
            optimiser.zero_grad()
            probe.loss(scale * x, distance).backward()
            optimiser.step()
        assert probe.basis_error() < 1e-6
        after = correlation(probe)
        assert after > max(before, correlation(principal)) + 0.15 and after > 0.2, (before, after)


@pytest.mark.parametrize("call, message", [
    (lambda p: p(torch.randn(4, 5)), r"need x \(..., T, 6\), got \(4, 5\)"),
    (lambda p: p(torch.randn(4, 6).double()), "must share a dtype"),
    (lambda p: p.loss(torch.randn(4, 6), torch.ones(4)), "distance"),
    (lambda p: p.loss(torch.randn(4, 6), torch.ones(3), torch.zeros(3, dtype=torch.int64)), "a probe of pair_labels"),
    (lambda p: p.loss(torch.randn(4, 6), torch.ones(3), None, torch.full((4,), 3)), "0 <= token < 3, got labels 3"),
    (lambda p: p.loss(torch.randn(4, 6), torch.ones(3), None, torch.zeros(3, dtype=torch.int64)), "token must be"),
    (lambda p: OrthogonalProbe(4, 5), "dim must be at most in_features=4, got 5"),
])
def test_wrong_input(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(OrthogonalProbe(6, 2, token_labels=3))


def test_tokens_that_nothing_is_known_of_take_no_part():
    """NaN or infinity there, at the end or in between, changes no bit of the loss or of a gradient."""
    probe = OrthogonalProbe(7, 3, 4, 5, dtype=torch.float64)
    x, distance = normal(2, 6, 7, seed=1), normal(2, 5, seed=2).abs()
    distance[0, 3:], distance[1, 1:3] = torch.nan, torch.nan
    pair, token = (torch.full(shape, -100) for shape in ((2, 5), (2, 6)))
    pair[0, 1], token[0, 0], token[1, 1] = 3, 4, 2

    def found(x, *labels):
        leaf, (basis, *vectors) = x.clone().requires_grad_(), probe.parameters()
        loss = probe.loss(leaf, distance, *labels)
        return loss, *torch.autograd.grad(loss, [leaf, basis, *vectors[: 2 * bool(labels)]])

    for labels in ((), (pair, token)):
        clean = found(x, *labels)
        assert all(t.isfinite().all() for t in clean)
        for bad in (torch.nan, torch.inf):
            padded = x.clone()
            padded[0, 5] = padded[1, 2] = bad  # of which no distance and no label is known
            assert helpers.same(found(padded, *labels), clean)
    padded[0, 4:] = torch.nan
    assert found(padded, pair, token)[0].isfinite()
    token[0, 5] = 1  # a label makes it count
    assert found(padded, pair, token)[0].isnan() and found(torch.full_like(x, torch.nan))[0].isnan()
    half = OrthogonalProbe(7, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half.loss(padded.bfloat16(), distance.bfloat16()).backward()
    assert half.basis.grad.isfinite().all()


def test_memory_that_is_given_is_no_label(monkeypatch):
    """to_empty leaves whatever the memory held."""
    probe, empty = OrthogonalProbe(16, 4, 3, 5, device="meta"), torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **how: empty(t, **how).fill_(7))
    probe.to_empty(device="cpu")
    assert probe.basis_error() < 1e-5
    for vectors in (probe.pairs, probe.tokens):
        assert 0 < vectors.abs().max() < 1
