"""Scores are squared lengths, the denoiser is Tweedie's formula, class subspaces are those of the data."""

from functools import partial

import pytest
import torch
from helpers import close, frame_error, normal
from sklearn.datasets import load_digits

from torch_subspace import GrassmannLinear
from torch_subspace.grassmann import class_subspaces, subspace_denoise, subspace_scores

DIMS = [None, (1, 3, 2)]


def frames_of(dims, n=7, k=2):
    stacks = [torch.linalg.qr(normal(n, d, seed=d + i)).Q.mT for i, d in enumerate(dims or (k,) * 3)]
    return torch.cat(stacks) if dims else torch.stack(stacks)


def projectors(frames, dims):
    return [f.mT @ f for f in (frames.split(dims) if dims else frames)]


def log_density(x, frames, dims, signal, noise):
    """log p(x) but for a constant."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    covariances = [signal**2 * p + noise**2 * eye for p in projectors(frames, dims)]
    laws = [torch.distributions.MultivariateNormal(eye.new_zeros(len(eye)), each) for each in covariances]
    return torch.stack([law.log_prob(x) for law in laws]).logsumexp(0)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("how", ["half", "autocast"])
def test_squares_that_are_no_float16_are_scores(how, trained):
    """Labels by float16's scores were those of the first that is infinite."""
    frames, x = torch.eye(4).view(4, 1, 4), torch.tensor([0.0, 270.0, 0.0, 500.0])
    if how == "half":
        x, frames = x.half(), frames.half()
    with torch.autocast("cpu", torch.float16, enabled=how == "autocast"):
        scores = subspace_scores(x.requires_grad_(trained), frames)
    assert scores.dtype == torch.float32
    assert torch.equal(scores, torch.tensor([0.0, 72900.0, 0.0, 250000.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_of_half_types_are_those_with_gradients(dtype):
    x = torch.randn(500, 16).to(dtype)
    frames = torch.linalg.qr(torch.randn(10, 16, 3)).Q.mT.contiguous().to(dtype)
    found, truth = subspace_scores(x, frames), subspace_scores(x, frames.clone().requires_grad_())
    torch.testing.assert_close(found, truth.detach())
    assert torch.equal(found.argmax(-1), truth.argmax(-1))


def test_on_meta():
    x, frames = torch.empty(3, 6, device="meta"), torch.empty(4, 2, 6, device="meta")
    for trained in (False, True):
        x.requires_grad_(trained)
        assert subspace_scores(x, frames).shape == (3, 4) and subspace_denoise(x, frames).shape == (3, 6)


@pytest.mark.parametrize("dims", DIMS, ids=["alike", "ragged"])
def test_scores(dims):
    frames, x = frames_of(dims), normal(2, 5, 7, seed=1)
    wanted = torch.stack([(x @ p).square().sum(-1) for p in projectors(frames, dims)], -1)
    torch.testing.assert_close(subspace_scores(x, frames, dims=dims), wanted, rtol=1e-12, atol=1e-13)
    assert torch.autograd.gradcheck(lambda x, f: subspace_scores(x, f, dims=dims),
                                    (x[0].requires_grad_(), frames.requires_grad_()))


@pytest.mark.parametrize("signal, noise", [(1.0, 0.5), (1.7, 0.2), (0.4, 2.0)])
@pytest.mark.parametrize("dims", DIMS, ids=["alike", "ragged"])
def test_the_denoiser_is_tweedies_formula(dims, signal, noise):
    frames, x = frames_of(dims), normal(6, 7, seed=2).requires_grad_()
    (score,) = torch.autograd.grad(log_density(x, frames, dims, signal, noise).sum(), x)
    found = subspace_denoise(x, frames, signal, noise, dims=dims)
    torch.testing.assert_close(found, (x + noise**2 * score) / signal, rtol=1e-9, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x, f: subspace_denoise(x, f, signal, noise, dims=dims),
                                    (x, frames.clone().requires_grad_()))


@pytest.mark.parametrize("dims", DIMS, ids=["alike", "ragged"])
def test_without_noise_the_nearest_subspace_has_it(dims):
    frames, x = frames_of(dims), normal(9, 7, seed=3)
    parts = torch.stack([x @ p for p in projectors(frames, dims)])
    best = parts.square().sum(-1).argmax(0)
    wanted = parts[best, torch.arange(9)]
    for noise in (0.0, 5e-324, 1e-200, 1e-12):
        found = subspace_denoise(2 * x, frames, 2.0, noise, dims=dims)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
    mean = subspace_denoise(1e-3 * x, frames, 1.0, 1e9, dims=dims)  # nothing is known: the mean of all points
    assert mean.abs().max() < 1e-18


@pytest.mark.parametrize("dims", DIMS, ids=["alike", "ragged"])
def test_other_ways_to_call_it(dims):
    frames, x = frames_of(dims), normal(5, 7, seed=4)
    wanted = subspace_denoise(x, frames, noise=0.3, dims=dims)

    def denoise(x):
        return subspace_denoise(x, frames, noise=0.3, dims=dims)

    for found in (torch.func.vmap(denoise)(x), denoise(x.view(5, 1, 7))[:, 0], torch.stack([denoise(v) for v in x]),
                  torch.compile(denoise, fullgraph=True, dynamic=True, backend="aot_eager")(x)):
        torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)
    tangent = normal(5, 7, seed=5)
    _, forward = torch.func.jvp(denoise, (x,), (tangent,))
    leaf = x.clone().requires_grad_()
    (backward,) = torch.autograd.grad(denoise(leaf), leaf, tangent)
    torch.testing.assert_close((forward * tangent).sum(), (backward * tangent).sum())
    assert denoise(x[:0]).shape == (0, 7)
    assert not subspace_denoise(x, torch.zeros(0, 2, 7, dtype=x.dtype)).any()


@pytest.mark.parametrize("dims", [None, (3, 1)], ids=["alike", "ragged"])
def test_derivatives_where_a_projection_is_zero(dims):
    """Of a dead row, or a point that a subspace is orthogonal to: a length has no derivative there, its square has."""
    frames = torch.eye(4, dtype=torch.float64).reshape((2, 2, 4) if dims is None else (4, 4)).requires_grad_()
    x = torch.tensor([[0.3, 0.4, 0, 0], [0, 0, 0, 0.2], [0, 0, 0, 0]], dtype=torch.float64, requires_grad=True)
    for function in (lambda x, w: subspace_scores(x, w, dims=dims),
                     lambda x, w: subspace_denoise(x, w, noise=0.5, dims=dims)):
        assert torch.autograd.gradcheck(function, (x, frames))
        assert torch.autograd.gradgradcheck(function, (x, frames))
        with torch.no_grad():
            values = function(x, frames)
        close(function(x, frames), values, 1e-14)


@pytest.mark.parametrize("size", [1e-37, 1e-30, 1e-22, 1e-10, 1e10, 1e19, 1e30, 1e37])
@pytest.mark.parametrize("noise", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dims", DIMS, ids=["alike", "ragged"])
def test_denoising_does_not_depend_on_the_unit(size, noise, dims):
    x, frames = (normal(5, 7) * size).float(), frames_of(dims).float()
    expected = subspace_denoise(x.double() / size, frames.double(), noise=noise, dims=dims)
    for trained in (False, True):
        leaf = x.clone().requires_grad_(trained)
        found = subspace_denoise(leaf, frames, size, noise * size, dims=dims)
        assert found.requires_grad is trained
        close(found, expected, 1e-5)


def test_points_of_all_sizes_at_once():
    sizes = torch.tensor([0, 1e-36, 1e-20, 1, 1e20, 1e36])
    x, frames = normal(6, 7).float() * sizes[:, None], frames_of(None).float()
    for noise in (0.0, 0.5):
        expected = subspace_denoise(x.double(), frames.double(), noise=noise)
        for trained in (False, True):
            found = subspace_denoise(x.clone().requires_grad_(trained), frames, noise=noise).detach()
            for row, truth in zip(found, expected, strict=True):
                close(row, truth, 1e-5)


def test_class_subspaces_of_short_directions():
    frames = frames_of(None, n=12, k=3)
    x = torch.cat([normal(50, 3, seed=c) * torch.tensor([1e9, 1, 1]) @ frames[c] for c in range(3)])
    found = class_subspaces(x, torch.arange(3).repeat_interleave(50), 3)
    close(found.mT @ found, frames.mT @ frames, 1e-5)


def test_class_subspaces_are_in_order_and_rounding_is_drawn_anew():
    for seed in range(20):
        left, right = torch.linalg.qr(normal(6, 3, seed=seed)).Q, torch.linalg.qr(normal(4, 3, seed=100 + seed)).Q
        points = left * torch.tensor([1, 0.1, 4e-8]).double() @ right.mT
        found, again = (class_subspaces(points, torch.zeros(6, dtype=torch.int64), 4,
                                        generator=torch.Generator().manual_seed(1))[0] for _ in range(2))
        assert torch.equal(found, again) and frame_error(found) < 1e-14
        assert ((found[:3] * right.mT).sum(1).abs() > 1 - 1e-14).all()
        points = normal(4, 2, seed=seed) @ normal(2, 4, seed=100 + seed)  # a plane, but for rounding
        one, two = (class_subspaces(points, torch.zeros(4, dtype=torch.int64), 3,
                                    generator=torch.Generator().manual_seed(draw))[0] for draw in (1, 2))
        assert torch.equal(one[:2], two[:2]) and (one[2] @ two[2]).abs() < 1 - 1e-9


@pytest.mark.filterwarnings("ignore:init_from_features")
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e15])
@pytest.mark.parametrize("shape", [(6, 9), (40, 12), (12, 300)])
def test_rounding_of_float32_is_no_direction(shape, size):
    """Points of a plane, computed in float32: what is asked for beyond that plane is drawn, by each seed anew."""
    def drawn(x, seed):
        return class_subspaces(x, torch.zeros(len(x), dtype=torch.int64), 4,
                               generator=torch.Generator().manual_seed(seed))[0]

    def layer(x, seed, dtype):
        head = GrassmannLinear(shape[1], 1, 4, dtype=dtype)
        generator = torch.Generator().manual_seed(seed)
        head.init_from_features(x, torch.zeros(len(x), dtype=torch.int64), generator=generator)
        return head.weight.detach()[0]

    for seed in range(5):
        x = (size * normal(shape[0], 2, seed=seed, dtype=torch.float32)) @ normal(2, shape[1], seed=50 + seed).float()
        for find in (drawn, *(partial(layer, dtype=dtype) for dtype in (torch.float32, torch.float64))):
            one, two = find(x, 1), find(x, 2)
            assert frame_error(one) < 1e-6
            assert torch.equal(one[:2], two[:2]) and (one[2:] @ two[2:].mT).abs().amax() < 1 - 1e-6
        longer = x + size * 1e-4 * normal(*shape, seed=9, dtype=torch.float32)  # of lengths that are none
        assert torch.equal(drawn(longer, 1), drawn(longer, 2))


def test_half_types_are_computed_in_float32():
    frames, x = frames_of(None).bfloat16(), (100 * normal(5, 7, seed=6)).bfloat16()
    wanted = subspace_denoise(x.double(), frames.double(), noise=0.3)
    found = subspace_denoise(x, frames, noise=0.3)
    assert found.dtype == torch.bfloat16 and (found - wanted).abs().max() < 0.01 * wanted.abs().max()
    with torch.autocast("cpu", torch.bfloat16):
        kept = subspace_denoise(x.float(), frames.float(), noise=0.3)
    assert kept.dtype == torch.float32 and (kept - wanted).abs().max() < 1e-5 * wanted.abs().max()


def test_points_of_planted_subspaces():
    """Found exactly, whatever their order; with noise, the denoiser is nearer than the points and than one PCA."""
    planted, label = frames_of(None, n=12, k=3), torch.arange(300) % 3
    clean = torch.einsum("nk,nkd->nd", normal(300, 3, seed=7), planted[label])
    found = class_subspaces(clean, label, 3)
    assert frame_error(found) < 1e-13
    torch.testing.assert_close(found.mT @ found, planted.mT @ planted, rtol=0, atol=1e-12)
    assert (subspace_scores(clean, found).argmax(-1) == label).all()
    seen = clean + 0.3 * normal(300, 12, seed=8)
    energy = torch.linalg.eigh(clean.mT @ clean).eigenvectors.flip(1)

    def error(x):
        return (x - clean).square().mean()

    assert error(subspace_denoise(seen, found, noise=0.3)) < 0.5 * min(
        error(seen @ energy[:, :r] @ energy[:, :r].mT) for r in range(1, 13))


def test_class_subspaces_of_few_points_and_half_types():
    x, generator = normal(4, 6, seed=9), torch.Generator().manual_seed(1)
    y = torch.tensor([3, 0, 3, 0])
    frames = class_subspaces(x.half(), y, 3, num_classes=5, generator=generator)
    assert frames.shape == (5, 3, 6) and frames.dtype == torch.float32 and frame_error(frames) < 1e-6
    torch.testing.assert_close(subspace_scores(x.float(), frames)[torch.arange(4), y], x.float().square().sum(1),
                               rtol=1e-2, atol=0)
    order = subspace_scores(x[[0, 2]], class_subspaces(x[[0, 2]], torch.zeros(2, dtype=torch.int64), 2).view(2, 1, 6))
    assert order.sum(0)[0] >= order.sum(0)[1]  # by energy


@pytest.fixture(scope="module")
def splits():
    """Real digits, grey values from 0 to 1: 1200 known, 597 held out, three times."""
    x, y = (torch.tensor(part) for part in load_digits(return_X_y=True))
    orders = [torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    return [((x / 16)[order[:1200]], y[order[:1200]], (x / 16)[order[1200:]], y[order[1200:]]) for order in orders]


@pytest.mark.parametrize("k, least", [(4, 0.965), (8, 0.976), (16, 0.985)])
def test_digits_by_the_nearest_class_subspace(k, least, splits):
    right = [(subspace_scores(asked, class_subspaces(known, y, k)).argmax(1) == truth).double().mean().item()
             for known, y, asked, truth in splits]
    assert sum(right) / 3 > least and min(right) > least - 0.01, right


def test_noise_of_digits_by_the_classes_subspaces_and_by_one_pca(splits):
    """With noise of some size the classes' subspaces leave less than the best single PCA, its rank the best for the
    very images it is measured on; with little, those of few dimensions leave more."""
    ratios = {}
    for seed, (known, y, asked, _) in enumerate(splits):
        noisy = normal(*asked.shape, seed=seed)
        whole = class_subspaces(known, torch.zeros_like(y), 64)[0]
        frames = class_subspaces(known, y, 32)
        for noise, k in ((0.1, 8), (0.1, 16), (0.1, 32), (0.3, 8), (0.6, 4)):
            seen, own = asked + noise * noisy, frames[:, :k]
            kept = (seen @ whole.mT).square() - 2 * (seen @ whole.mT) * (asked @ whole.mT)  # |Pz|^2 - 2 <Pz, x>
            best = (kept.cumsum(1).mean(0).amin() + asked.square().sum(1).mean()).item()
            size = (subspace_scores(known, own).amax(1).mean() / k).sqrt().item()
            left = (size * subspace_denoise(seen, own, size, noise) - asked).square().sum(1).mean().item()
            ratios.setdefault((noise, k), []).append(left / best)
    mean = {case: sum(ratio) / 3 for case, ratio in ratios.items()}
    assert mean[0.3, 8] < 0.75 and mean[0.6, 4] < 0.82, ratios
    assert mean[0.1, 8] > 1.5 and mean[0.1, 16] > 1.05 and mean[0.1, 32] < 0.95, ratios


@pytest.mark.parametrize("call, message", [
    (lambda x, f: subspace_scores(x, f[..., :5]), "subspace_scores: x has 7 features but frames has 5"),
    (lambda x, f: subspace_scores(x.float(), f), "subspace_scores: x and frames must share a dtype"),
    (lambda x, f: subspace_denoise(x, f[0]), r"subspace_denoise: frames must be \(C, k, n\)"),
    (lambda x, f: subspace_denoise(x, f, 0.0), "subspace_denoise: signal must be a finite number above 0, got 0.0"),
    (lambda x, f: subspace_denoise(x, f, noise=-1), "subspace_denoise: noise must be a finite number of at least 0"),
    (lambda x, f: class_subspaces(x, torch.arange(5), 8), "k must be at most the features of x, 7, got 8"),
    (lambda x, f: class_subspaces(x, torch.arange(5) - 1, 2), "0 <= y < num_classes = 4, got labels -1 to 3"),
    (lambda x, f: class_subspaces(x * torch.inf, torch.arange(5), 2), "class_subspaces: a point is not finite"),
    (lambda x, f: class_subspaces(x[:0], torch.arange(0), 2), "class_subspaces: y is empty: num_classes must be given"),
])
def test_wrong_input(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call(normal(5, 7), frames_of(None))
