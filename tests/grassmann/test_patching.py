"""Patches by the formula; trained ones find a planted attribute; what is written where nothing reads is told apart."""

import copy
import pickle
import sys
from pathlib import Path

import helpers
import pytest
import torch
from helpers import normal
from optim_cases import ADAM, SGD

import torch_subspace as ts
from torch_subspace.grassmann import SubspacePatch, rowspace_split, subspace_patch


def rows(r, d, *lead, seed=0, dtype=torch.float64):
    return torch.linalg.qr(normal(*lead, d, r, seed=seed)).Q.mT.to(dtype)


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("lead", [(), (5,), (2, 5)], ids=str)
def test_a_patch_is_the_formula(lead):
    base, source, v = normal(*lead, 7, seed=1), normal(*lead, 7, seed=2), rows(3, 7)
    patched = subspace_patch(base, source, v)
    helpers.close(patched, base + (source - base) @ v.mT @ v, 1e-14, absolute=True)
    helpers.close(patched @ v.mT, source @ v.mT, 1e-14, absolute=True)  # has the source's coordinates there
    off = torch.eye(7, dtype=torch.float64) - v.mT @ v
    helpers.close(patched @ off, base @ off, 1e-14, absolute=True)  # and its own elsewhere
    helpers.close(subspace_patch(base, source, rows(7, 7)), source, 1e-14, absolute=True)
    one = normal(7, seed=3)
    along = base + ((source @ one - base @ one) / (one @ one))[..., None] * one
    helpers.close(subspace_patch(base, source, one), along, 1e-14, absolute=True)
    helpers.close(subspace_patch(base, source, one), subspace_patch(base, source, one[None] / one.norm()), 1e-14,
                  absolute=True)


def test_a_subspace_each():
    base, source, v = normal(4, 7, seed=1), normal(4, 7, seed=2), rows(3, 7, 4)
    expected = torch.stack([subspace_patch(*each) for each in zip(base, source, v)])
    helpers.close(subspace_patch(base, source, v), expected, 1e-14, absolute=True)
    helpers.close(subspace_patch(base, source[:1], v)[0], expected[0], 1e-14, absolute=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("power", [-200, -30, -20, 0, 20, 30, 200])
def test_a_direction_of_any_length(power, dtype):
    """Its square may overflow or vanish; the gradient in v is of degree -1 in its length."""
    if abs(power) > 30 and dtype == torch.float32:
        power = {-200: -36, 200: 37}[power]
    inputs = [normal(4, 7, seed=i) for i in (1, 2)]
    v = normal(7, seed=3)

    def of(dtype, size):
        leaves = [t.to(dtype).requires_grad_() for t in (*inputs, v.double() * size)]
        patched = subspace_patch(*leaves)
        *others, dv = torch.autograd.grad(patched.sin().sum(), leaves)
        return [patched.detach(), *others, dv.double() * size]

    helpers.close(of(dtype, 10.0**power), of(torch.float64, 1.0), 1e-5 if dtype == torch.float32 else 1e-13)


def test_no_direction():
    """v = 0 takes nothing, like an empty `null`; what it does to others has a gradient, and of no NaN."""
    leaves = [t.requires_grad_() for t in (normal(4, 7, seed=1), normal(4, 7, seed=2), normal(7) * 0)]
    patched = subspace_patch(*leaves)
    assert torch.equal(patched, leaves[0])
    found = torch.autograd.grad(patched.sin().sum(), leaves)
    helpers.close(found[0], leaves[0].detach().cos(), 1e-14)
    assert not found[1].any() and not found[2].any()
    assert subspace_patch(leaves[0], leaves[1], leaves[2] / 0).isnan().all()
    assert subspace_patch(normal(4, 0), normal(4, 0), normal(0)).shape == (4, 0)


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
@pytest.mark.parametrize("v", [torch.eye(7)[:2], torch.eye(7)[0]], ids=["frame", "direction"])
def test_what_is_not_finite(v, bad):
    """It leaves no entry of its vector finite, also where the patch moves nothing, and other vectors alone."""
    clean = torch.ones(3, 7), torch.zeros(3, 7)
    for which in (0, 1):
        given = [t.clone() for t in clean]
        given[which][1, 6] = bad
        patched = subspace_patch(*given, v)
        assert not patched[1].isfinite().any()
        assert torch.equal(patched[[0, 2]], subspace_patch(*clean, v)[[0, 2]])


def test_its_gradients():
    inputs = [t.requires_grad_() for t in (normal(2, 5, seed=1), normal(2, 5, seed=2), rows(2, 5))]
    assert torch.autograd.gradcheck(subspace_patch, inputs) and torch.autograd.gradgradcheck(subspace_patch, inputs)
    along = [*inputs[:2], normal(5, seed=3).requires_grad_()]
    assert torch.autograd.gradcheck(subspace_patch, along) and torch.autograd.gradgradcheck(subspace_patch, along)
    weight = normal(3, 5, seed=4)
    assert torch.autograd.gradcheck(lambda v: rowspace_split(v, weight), inputs[:1])


def test_other_ways_to_call_it():
    base, source, v = normal(4, 7, seed=1), normal(4, 7, seed=2), rows(3, 7)
    expected = subspace_patch(base, source, v)
    helpers.close(torch.func.vmap(subspace_patch, (0, 0, None))(base, source, v), expected, 1e-14, absolute=True)
    compiled = torch.compile(subspace_patch, fullgraph=True, dynamic=True, backend="aot_eager")
    helpers.close(compiled(base, source, v), expected, 1e-14, absolute=True)
    half = subspace_patch(base.bfloat16(), source.bfloat16(), v.float())
    assert half.dtype == torch.bfloat16 and (half - expected).abs().max() < 0.03
    with torch.autocast("cpu", torch.bfloat16):
        helpers.close(subspace_patch(base.float(), source.float(), v.float()), expected, 1e-6, absolute=True)
    assert subspace_patch(base[:0], source[:0], v).shape == (0, 7)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_split_without_graph_breaks(dynamic):
    fast = torch.compile(rowspace_split, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for v, weight in ((normal(6, 7), normal(3, 7, seed=1)), (normal(2, 9), normal(12, 9, seed=1)[:, :1].expand(12, 9)),
                      (normal(2, 9), torch.zeros(4, 9, dtype=torch.float64))):
        for found, expected in zip(fast(v, weight), rowspace_split(v, weight)):
            helpers.close(found, expected, 1e-12, absolute=True)
    with pytest.raises(torch.linalg.LinAlgError):
        fast(normal(4, 5), normal(3, 5) / 0)


def test_the_module_keeps_its_basis():
    patch = SubspacePatch(9, 3, generator=torch.Generator().manual_seed(0))
    same = SubspacePatch(9, 3, generator=torch.Generator().manual_seed(0))
    assert torch.equal(patch.basis, same.basis) and patch.basis_error() < 1e-6
    assert patch.half().basis.dtype == torch.float32 and patch.double().basis.dtype == torch.float64
    x = torch.randn(2, 9, dtype=torch.float16)
    assert same(x, x).dtype == torch.float16
    empty = SubspacePatch(9, 3, device="meta").to_empty(device="cpu")
    for each in (copy.deepcopy(same), pickle.loads(pickle.dumps(same)), empty):
        assert each.basis_error() < 1e-6
        group = ts.param_groups(torch.nn.Sequential(torch.nn.Linear(2, 2), each))[-1]
        assert group["manifold"] == "stiefel" and group["params"][0] is each.basis
        for kind in (SGD, ADAM):
            optimiser = kind(each.parameters(), lr=0.1)
            for _ in range(3):
                each.basis.grad = torch.randn(3, 9)
                optimiser.step()
            assert each.basis_error() < 1e-6


# ------------------------------------------------------------------------------------------- a planted second attribute


class Planted(torch.nn.Module):
    """Hidden units of 24; what is read of them says which of 4 kinds a point is, and a bit that is none of it."""

    def __init__(self):
        super().__init__()
        self.write, self.read = torch.nn.Linear(12, 24), torch.nn.Linear(24, 5)

    def hidden(self, x):
        return self.write(x).tanh()

    def forward(self, x):
        return self.read(self.hidden(x))


def points(count, seed):
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(4, (count,), generator=generator)
    bit = torch.randint(2, (count,), generator=generator)
    centres = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))
    x = centres[kind] + (2 * bit[:, None] - 1) * centres[4] + 0.3 * torch.randn(count, 12, generator=generator)
    return x, kind, bit


def loss_of(out, kind, bit):
    return (torch.nn.functional.cross_entropy(out[:, :4], kind)
            + torch.nn.functional.binary_cross_entropy_with_logits(out[:, 4], bit.float()))


def accuracy(out, kind, bit):
    right = out[:, :4].argmax(1) == kind, (out[:, 4] > 0) == (bit == 1)
    return [each.double().mean().item() for each in right]


@pytest.fixture(scope="module")
def planted():
    torch.manual_seed(1)
    model = Planted()
    optimiser = torch.optim.Adam(model.parameters(), 0.02)
    x, kind, bit = points(600, 1)
    for _ in range(150):
        optimiser.zero_grad()
        loss_of(model(x), kind, bit).backward()
        optimiser.step()
    assert min(accuracy(model(x), kind, bit)) > 0.97
    return model.requires_grad_(False)


def swapped(count, seed):
    """Bases, sources, and what the model should say of a base with a source's bit."""
    base, kind, _ = points(count, seed)
    source, _, bit = points(count, seed + 1)
    return base, source, kind, bit


@pytest.mark.parametrize("kind_of", [SGD, ADAM], ids=lambda kind: kind.__name__)
def test_alignment_search_finds_where_the_bit_is(planted, kind_of):
    found = []
    for seed in range(3):
        patch = SubspacePatch(24, 1, generator=torch.Generator().manual_seed(seed))
        base, source, kind, bit = swapped(600, 10)
        h = planted.hidden(base), planted.hidden(source)
        fresh = swapped(400, 20)
        chance = accuracy(planted.read(patch(planted.hidden(fresh[0]), planted.hidden(fresh[1]))), *fresh[2:])
        options = {"lr": 0.3, "momentum": 0.9} if kind_of is SGD else {"lr": 0.03}
        optimiser = kind_of(patch.parameters(), **options)
        for _ in range(100):
            optimiser.zero_grad()
            loss_of(planted.read(patch(*h)), kind, bit).backward()
            optimiser.step()
        assert patch.basis_error() < 1e-6
        after = accuracy(planted.read(patch(planted.hidden(fresh[0]), planted.hidden(fresh[1]))), *fresh[2:])
        assert chance[1] < 0.75 and min(after) > 0.93, (chance, after)
        found.append(patch.basis.detach()[0])
    # what moves the bit is in the rows that are read; the rest of the direction does nothing by itself
    out = planted.read(h[0])
    row, null = rowspace_split(found[0], planted.read.weight)
    helpers.close(planted.read.weight @ null, torch.zeros(5), 1e-6, absolute=True)
    helpers.close(planted.read(subspace_patch(*h, null)), out, 1e-4, absolute=True)
    by_row = accuracy(planted.read(subspace_patch(*h, row)), kind, bit)
    assert min(by_row) > 0.9


def test_the_illusion():
    """A bit is written where nothing reads, and a row that is read says nothing of it: along both the patch moves the
    answer, along neither alone; the direction that the answer is really made of does it by its row alone."""
    generator = torch.Generator().manual_seed(0)
    axes = rows(8, 8, seed=5)
    used, dormant, unread = axes[0], axes[1], axes[2]
    weight = torch.stack([used, dormant])  # the answer is read[0] + read[1]
    bit = torch.randint(2, (200,), generator=generator) * 2.0 - 1
    other = torch.randn(200, 8, generator=generator, dtype=torch.float64) * 0.1
    other = other - other @ axes[:3].mT @ axes[:3]
    hidden = bit[:, None] * (used + 3 * unread) + other  # nothing of it along `dormant`
    base, source = hidden[bit < 0][:80], hidden[bit > 0][:80]

    def flipped(v):
        answer = (subspace_patch(base, source, v) @ weight.mT).sum(-1)
        return (answer > 0).double().mean().item()

    illusory = dormant + unread
    row, null = rowspace_split(illusory, weight)
    helpers.close(row, dormant, 1e-14, absolute=True)
    helpers.close(null, unread, 1e-14, absolute=True)
    assert (flipped(illusory), flipped(row), flipped(null)) == (1.0, 0.0, 0.0)
    genuine = used + 0.2 * unread
    row, null = rowspace_split(genuine, weight)
    assert (flipped(genuine), flipped(row), flipped(null)) == (1.0, 1.0, 0.0)
    moved = subspace_patch(base, source, null) @ weight.mT
    helpers.close(moved, base @ weight.mT, 1e-14, absolute=True)


@pytest.mark.parametrize("seed", range(3))
def test_the_turn_of_real_digits(seed):
    """examples/patching.py, briefly: a network on digits, upright or turned, and patches of its last hidden layer."""
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
    import patching
    from sklearn.datasets import load_digits

    data = load_digits()
    image, digit = torch.tensor(data.images, dtype=torch.float32) / 16, torch.tensor(data.target)
    torch.manual_seed(seed)
    order = torch.randperm(len(digit))
    (x, *labels), (other, *truth) = (patching.both_ways(image[part], digit[part]) for part in order.split(1200))
    net = patching.learn(x, *labels, steps=300)
    base, source = patching.pairs(*truth, 1000)
    h, asked, read = net[:6](x), net[:6](other), net[6:]

    def interchanged(basis):
        return patching.right(read(subspace_patch(asked[base], asked[source], basis)), truth[0][base], truth[1][source])

    found = {r: interchanged(patching.align(read, h, *labels, r, steps=60)) for r in (1, 4)}
    alone = patching.right(net(other), *truth)
    assert alone[2] > 0.85 and all(both > alone[2] - 0.05 for _, _, both in found.values()), (alone, found)
    principal = torch.linalg.svd(h - h.mean(0), full_matrices=False).Vh
    assert interchanged(principal[:4])[2] < 0.5 and interchanged(rows(4, 32, dtype=torch.float32))[2] < 0.5
    whole = interchanged(torch.eye(32))
    assert whole[0] < 0.1 and whole[1] > 0.95  # all of the source, its digit too


@pytest.mark.parametrize("weight, rank", [(torch.zeros(3, 6), 0), (torch.ones(3, 6), 1), (normal(9, 6), 6),
                                          (torch.zeros(0, 6), 0)], ids=["zeros", "ones", "all", "no rows"])
def test_rows_of_any_rank(weight, rank):
    weight, v = weight.double(), normal(4, 6, seed=1)
    row, null = rowspace_split(v, weight)
    helpers.close(row + null, v, 1e-14, absolute=True)
    assert not weight.numel() or (null @ weight.mT).abs().max() < 1e-13
    assert rank != 6 or null.abs().max() < 1e-13
    assert rank != 0 or row.abs().max() == 0
    assert torch.linalg.matrix_rank(row) == min(rank, 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("m, d", [(64, 768), (512, 1024)])
def test_rows_of_halves(m, d, dtype):
    """Their own eps, of so many features, would take all singular values for zero."""
    weight, v = normal(m, d, seed=1).to(dtype), normal(3, d, seed=2).to(dtype)
    row, null = rowspace_split(v, weight)
    assert row.dtype == null.dtype == dtype
    expected = rowspace_split(v.double(), weight.double())
    helpers.close((row, null), expected, torch.finfo(dtype).eps)
    rounding = torch.finfo(dtype).eps / 2 * torch.linalg.matrix_norm(weight.double(), 2) * null.double().norm(dim=-1)
    assert ((weight.double() @ null.double().mT).norm(dim=0) < rounding).all()
    twice = torch.cat((weight[:5], 2 * weight[:5]))  # of rank 5
    helpers.close(rowspace_split(v, twice), rowspace_split(v, weight[:5]), torch.finfo(dtype).eps)


@pytest.mark.parametrize("call, message", [
    (lambda: subspace_patch(normal(3, 4), normal(3, 4), normal(2, 5)), "need base"),
    (lambda: subspace_patch(normal(3, 4), normal(2, 4), normal(2, 4)), "must broadcast"),
    (lambda: subspace_patch(normal(3, 4), normal(3, 5), normal(2, 4)), "source must be shaped like base"),
    (lambda: subspace_patch(normal(3, 4), normal(3, 4).float(), normal(2, 4)), "must share a dtype"),
    (lambda: subspace_patch(normal(3, 4), normal(3, 4), normal(5, 4)), "0 < r <= d"),
    (lambda: SubspacePatch(4, 5), "dim must be at most in_features=4, got 5"),
    (lambda: SubspacePatch(4, 2, dtype=torch.float16), "dtype must be float32 or float64"),
    (lambda: rowspace_split(normal(4), normal(3, 5)), "need v"),
    (lambda: rowspace_split(normal(5), normal(3, 5) / 0), "weight is not finite"),
])
def test_wrong_input(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_pyvenes_interface():
    """The same as its own low-rank intervention, with a basis that our optimisers move."""
    interventions = pytest.importorskip("pyvene.models.interventions", exc_type=ImportError)
    from torch_subspace.grassmann.pyvene import SubspaceIntervention

    options = {"embed_dim": 9, "low_rank_dimension": 4, "subspace_partition": [[0, 2], [2, 4]]}
    ours, theirs = SubspaceIntervention(**options), interventions.LowRankRotatedSpaceIntervention(**options)
    theirs.rotate_layer.weight = ours.patch.basis.detach().mT.contiguous()
    base, source = torch.randn(3, 9), torch.randn(3, 9)
    for subspaces in (None, [[0], [0], [0]], [[0], [1], [0]]):
        helpers.close(ours(base, source, subspaces), theirs(base, source, subspaces), 1e-5, absolute=True)
    helpers.close(ours(base, source, [[0, 1], [], [1]])[0], ours(base, source)[0], 1e-6, absolute=True)
    optimiser = SGD(ours.parameters(), lr=0.1)
    ours(base, source, [[0], [1], [1]]).square().sum().backward()
    optimiser.step()
    assert ours.patch.basis_error() < 1e-6


def test_an_intervenable_model_of_pyvene():
    """The states of one token are patched, and the basis is trained in place."""
    pyvene = pytest.importorskip("pyvene", exc_type=ImportError)
    transformers = pytest.importorskip("transformers")
    from torch_subspace.grassmann.pyvene import SubspaceIntervention

    torch.manual_seed(0)
    size = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2}
    tokens = {"bos_token_id": None, "eos_token_id": None}
    plain = transformers.GPT2LMHeadModel(transformers.GPT2Config(**size, **tokens)).eval()
    base, source = torch.randint(50, (2, 4, 8))
    before = plain(base).logits.detach()
    place = pyvene.RepresentationConfig(0, "block_output", "pos", 1, low_rank_dimension=3)
    model = pyvene.IntervenableModel(pyvene.IntervenableConfig([place], SubspaceIntervention), plain)
    model.disable_model_gradients()
    (intervention,) = model.interventions.values()
    logits = model({"input_ids": base}, [{"input_ids": source}], {"sources->base": (7, 7)})[1].logits
    moved = (logits - before).abs().amax((0, 2))
    assert not moved[:7].any() and moved[7] > 1e-3
    logits[:, -1].square().sum().backward()
    basis = intervention.patch.basis.detach().clone()
    SGD(intervention.parameters(), lr=0.1).step()
    assert not torch.equal(basis, intervention.patch.basis) and intervention.patch.basis_error() < 1e-6
