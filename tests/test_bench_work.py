"""tests/bench/work.py against counts: flops of plain formulas by torch's own counter, bytes by adding up tensors."""

import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import conv2d, linear
from torch.utils.flop_counter import FlopCounterMode

import torch_subspace as ts
from torch_subspace import grassmann, isotropy, lowrank
from torch_subspace.lowrank.fastfood import draws, plain
from torch_subspace.tucker.depthwise import depthwise_weight_gradient

BENCH = Path(__file__).with_name("bench")
sys.path.insert(0, str(BENCH))
import work  # noqa: E402

N, D, K, C, B = 12, 20, 4, 5, 6


def some(*shape):
    return torch.randn(shape)


def triangle(a, b=None):
    """The lower triangle of a bᵀ, where that is symmetric: its rows one by one, as far as the diagonal."""
    b = a if b is None else b
    for i in range(len(a)):
        a[i:i + 1] @ b[:i + 1].mT
    return a @ a.mT if a is b else a @ b.mT


def flops(function, *given):
    """Flops of the products in a function; whole squares that `triangle` returns are left out."""
    squares = 0

    def seen(a, b=None):
        nonlocal squares
        squares += 2 * len(a) ** 2 * a.shape[1]
        return triangle(a, b)

    with FlopCounterMode(display=False) as counter:
        function(*given, seen)
    return counter.get_total_flops() - squares


def sums(function, *given):
    """Numbers that sums and differences in a function make."""

    def made(*_, out_val, **__):
        return out_val.numel()

    made._get_raw = True  # torch's word for a rule that is given tensors, not shapes
    rules = dict.fromkeys((torch.ops.aten.add, torch.ops.aten.sub), made)
    with FlopCounterMode(display=False, custom_mapping=rules) as counter:
        function(*given)
    return counter.get_total_flops()


def both(function, *leaves):
    """A function and its gradients, for the counter."""
    leaves = [t.requires_grad_() for t in leaves]
    y = function(*leaves)
    torch.autograd.grad(y, leaves, torch.ones_like(y))


def spectral(x, t):
    """Five steps of Newton-Schulz, on the matrix."""
    for _ in range(5):
        gram = t(x)
        x = (gram + t(gram)) @ x


def gram_only(x, t):
    """The same, on its Gram matrix; all that commutes is symmetric."""
    r, q = t(x), None
    for step in range(5):
        p = t(r)
        q = p if q is None else t(q, p)
        r = t(t(r, p), p) if step < 4 else r
    q @ x


def chunk(x):
    """A transform by sums and differences."""
    n, width = x.shape[-1], 1
    while width < n:
        a, b = x.view(-1, n // (2 * width), 2, width).unbind(2)
        x, width = torch.cat((a + b, a - b), 2), 2 * width
    return x.view(-1, n)


def folded(x, length):
    """A long vector's pieces, added up."""
    total, *rest = x.view(-1, length)
    for piece in rest:
        total = total + piece
    return total


def lengths(d, size):
    return 1 << work.bits(d), 1 << work.bits(size)


def short_fastfood(theta, size, signs, order, normal):
    """Its product with transforms no longer than need be."""
    d, (p, q) = len(theta), lengths(len(theta), size)
    first = chunk(torch.nn.functional.pad(theta * signs, (0, p - d))).repeat(1, max(p, q) // p)[0]
    return chunk(folded(normal * first[order], q)).view(-1)[:size] * (size * normal.square().sum()) ** -0.5


def transposed(dy, d):
    """As many sums as its gradient has."""
    p, q = lengths(d, len(dy))
    chunk(folded(chunk(torch.nn.functional.pad(dy, (0, q - len(dy)))).repeat(1, max(p, q) // q)[0], p))


def products_of_step(w, m, t):
    """The geodesic's, of a class."""
    (m @ w.mT), t(m), torch.eye(len(w)) @ w, torch.eye(len(w)) @ m


def hand(core, o, i, h, w, t):
    """A mode at a time."""
    g = h @ core @ w.mT
    o @ (i @ g.flatten(2)).flatten(1)


def frozen_linear(x, w, v, core, u, t):
    """A frozen layer, and its adapter."""
    both(lambda x, v, core, u: linear(x, w) + x @ v.mT @ core.mT @ u.mT, x, v, core, u)


def thin_convolutions(x, w, v, core, u, t):
    """The same of a convolution."""
    both(lambda x, v, core, u: conv2d(x, w) + conv2d(conv2d(conv2d(x, v), core), u), x, v, core, u)


def tap_by_tap(x, t):
    """Gradients of 3 x 3 kernels, a channel alone, where both the output's gradient and the input are there."""
    for i in range(3):
        for j in range(3):
            near = [slice(max(0, step - 1), 8 + min(0, step - 1)) for step in (i, j)]
            far = [slice(max(0, 1 - step), 8 + min(0, 1 - step)) for step in (i, j)]
            a, b = x[:, :, near[0], near[1]], x[:, :, far[0], far[1]]
            a.transpose(0, 1).flatten(1)[:, None] @ b.transpose(0, 1).flatten(1)[..., None]


def ridge_and_back(z, after, c, t):
    """The gradient's part in Zᵀ Z is symmetric, that in Zᵀ Z' is not."""
    t(z.mT), z.mT @ after, z @ (c @ c), after @ c, z @ c


def koopman_and_back(z, after, c, t):
    """Two trajectories' ridges, the mean transition there and back, cosines with all but 2 + 2 points, the entropy."""
    for own, following in zip(z, after):
        ridge_and_back(own, following, c, t)
        both(torch.matmul, own.clone(), c.clone())
        both(lambda a, b: a @ b.mT, own[2:-2].clone(), own.clone())
    entropy_and_back(z.flatten(0, 1), c, t)


def entropy_and_back(z, c, t):
    """V log(p) Vᵀ is symmetric."""
    t(z.mT), t(c), z @ c


COUNTED = [  # what work.py says, a formula of the op, what it is given
    (work.logits(B, N, C, K, False), lambda x, w, t: linear(x, w), (some(B, N), some(C * K, N))),
    (work.logits(B, N, C, K, True), lambda x, w, t: both(linear, x, w), (some(B, N), some(C * K, N))),
    (work.cross_entropy(B, N, C, K), lambda x, w, t: both(linear, x, w), (some(B, N), some(C * K, N))),
    (work.rsgd(1, 64, N), products_of_step, (some(64, N), some(64, N))),
    (work.assignment(N, D, C, K), lambda x, w, t: linear(x, w), (some(N, D), some(C * K, D))),
    (work.k_subspaces(64, 256, 1, K), lambda x, w, t: (linear(x, w), t(x)), (some(64, 256), some(K, 256))),
    (work.denoise(N, D, C, K), lambda x, w, t: x @ w.mT @ w, (some(N, D), some(C * K, D))),
    (work.patch(N, D, K), lambda x, v, t: both(lambda x, v: x @ v.mT @ v, x, v), (some(N, D), some(K, D))),
    (work.distances(1, 64, D, K), lambda x, v, z, t: (x @ v.mT, t(z), some(64, 64) @ z, z.mT @ x),
     (some(64, D), some(K, D), some(64, K))),
    (work.probe(1, N, D, K, C, B), lambda x, v, z, p, q, t: (x @ v.mT, z.mT @ x, both(linear, z[1:].clone(), p),
                                                             both(linear, z.clone(), q)),
     (some(N, D), some(K, D), some(N, K), some(C, K), some(B, K))),
    (work.margin_loss(64, D, K), lambda x, w, z, t: (both(linear, x, w), t(z), some(64, 64) @ z),
     (some(64, D), some(K, D), some(64, K))),
    (work.entropy(640, 64), entropy_and_back, (some(640, 64), some(64, 64))),
    (work.ridge(640, 64), ridge_and_back, (some(640, 64), some(640, 64), some(64, 64))),
    (work.koopman(2, 640, 64, 2), koopman_and_back, (some(2, 640, 64), some(2, 640, 64), some(64, 64))),
    (work.procrustes(N, D, False), lambda x, y, u, v, t: (x.mT @ y, u @ v),
     (some(N, D), some(N, D), some(D, D), some(D, D))),
    (work.procrustes(N, D, True), lambda x, y, u, v, t: (x.mT @ y, u @ v, turn := u @ (u.mT @ v @ v.mT) @ v, y @ turn,
                                                         x @ turn), (some(N, D), some(N, D), some(D, D), some(D, D))),
    (work.orthogonal_adapter(N, D), lambda x, q, t: both(linear, x, q), (some(N, D), some(D, D))),
    (work.gated_cosine(B, N, K),
     lambda z1, z2, g, t: (both(lambda a, b: a @ b.mT, z1, z2), both(lambda a, b: a @ b.mT, g, z2)),
     (some(B, K), some(N, K), some(B, K))),
    (work.lambda_orthogonality(1, 64), lambda w, t: t(w) @ w, (some(64, 64),)),
    (work.sigreg(1, N, D, K), lambda z, a, t: (z @ a) @ a.mT, (some(N, D), some(D, K))),
    (work.newton_schulz(64, 64), spectral, (some(64, 64),)),
    (work.product(N, K, D), lambda a, b, t: a @ b, (some(N, D), some(D, K))),
    (work.newton_schulz(64, 640), gram_only, (some(64, 640),)),
    (work.trion(640, 80, 64), lambda m, q, p, t: (m @ q, p @ q.mT, gram_only(p.mT, t)),
     (some(640, 80), some(80, 64), some(640, 64))),
    (work.coso(N, 2, 3, 5), lambda g, s, r, m, t: (g @ (g.mT @ (g @ s)), g @ r @ r.mT, g @ m @ m.mT),
     (some(N, N), some(N, 3), some(N, 2), some(N, 5))),
    (work.low_rank_adamw([(D, N), (N, 2), (7,)], K, True), lambda g, q, t: g @ (g.mT @ (g @ q)) @ q.mT,
     (some(D, N), some(N, K))),
    (work.low_rank_adamw([(N, D)], K, False), lambda g, q, t: (g @ q) @ q.mT, (some(D, N), some(N, K))),
    (work.coding_rate(640, 64, 0), lambda z, t: t(z.mT) @ z.mT, (some(640, 64),)),
    (work.coding_rate(64, 640, 0), lambda z, t: t(z) @ z, (some(64, 640),)),
    (work.coding_rate(128, 640, 2), lambda z, t: [t(own) @ own for own in z.chunk(2)], (some(128, 640),)),
    (work.coding_rate_soft(N, 64, C), lambda z, t: [t(z.mT, (z + c).mT) @ z.mT for c in range(C)], (some(N, 64),)),
    (work.sinkhorn(N), lambda k, f, t: (k @ f, k @ f), (some(N, N), some(N, 1))),
    (work.depthwise(2, 3, 8, 3), tap_by_tap, (some(2, 3, 8, 8),)),
    (work.tucker((10, 9, 3, 5), (4, 3, 2, 2)), hand,
     (some(4, 3, 2, 2), some(10, 4), some(9, 3), some(3, 2), some(5, 2))),
    (work.tucker_linear(B, N, D, K), frozen_linear, (some(B, N), some(D, N), some(K, N), some(K, K), some(D, K))),
    (work.tucker_conv((2, 32, 10, 10), (2, 48, 8, 8), 3, 1, K), thin_convolutions,
     (some(2, 32, 10, 10), some(48, 32, 3, 3), some(K, 32, 1, 1), some(K, K, 3, 3), some(48, K, 1, 1))),
    (work.tucker_conv((2, 32, 10, 10), (2, 48, 8, 8), 3, 4, K),
     lambda x, w, t: [both(conv2d, *own) for own in zip(x.chunk(4, 1), w.chunk(4))],
     (some(2, 32, 10, 10), some(48, 8, 3, 3))),
]  # fmt: skip


@pytest.mark.parametrize("said, function, given", COUNTED)
def test_flops(said, function, given):
    found = flops(function, *given)
    assert abs(found / said["flops"] - 1) <= 1 / 60, (found, said)  # a triangle of 64 is a little more than half


@pytest.mark.parametrize("side, k, stride, padding", [(8, 3, 1, 1), (9, 3, 2, 1), (7, 7, 1, 3), (12, 4, 4, 0),
                                                      (5, 1, 1, 0)])
def test_taps_that_are_not_padding(side, k, stride, padding):
    reached = conv2d(torch.ones(1, 1, side, side), torch.ones(1, 1, k, k), stride=stride, padding=padding)
    assert work.inside(side, reached.shape[-1], k, stride, padding) == reached.sum()


def test_sums_of_transforms():
    assert sums(chunk, some(3, 16)) == work.hadamard(3, 16)["flops"]
    for d, size in ((9, 100), (100, 9)):
        theta, drawn = some(d).double(), draws(d, max(lengths(d, size)), 1, torch.device("cpu"))
        drawn = [t.double() if t.is_floating_point() else t for t in drawn]
        torch.testing.assert_close(short_fastfood(theta, size, *drawn), plain(theta, size, 1))
        found = sums(short_fastfood, theta, size, *drawn) + sums(transposed, some(size), d)
        assert found == work.fastfood(d, size)["flops"]


# ------------------------------------------------------------------------------------------------------------ bytes


def moved(function, *given, backward=True, needed=True):
    """Bytes of all that is read and written, forward and backward each once; `needed`: the backward reads it all."""
    leaves = [t.requires_grad_() if backward and t.is_floating_point() and not getattr(t, "frozen", False) else t
              for t in given]
    y = function(*leaves)
    total = sum(t.nbytes for t in leaves) + y.nbytes
    if backward:
        wanted = [t for t in leaves if t.requires_grad]
        total += sum(t.nbytes for t in torch.autograd.grad(y, wanted, torch.ones_like(y)))
        total += y.nbytes + (sum(t.nbytes for t in leaves) if needed else 0)
    return total


def frozen(t):
    t.frozen = True
    return t


def with_basis(method, parameters, *given):
    """A probe's method."""
    probe = grassmann.OrthogonalProbe(N, K, *(len(p) for p in parameters[1:]))
    called = torch.nn.Module()
    called.probe, called.forward = probe, lambda *given: getattr(probe, method)(*given)
    names = ("probe.basis", "probe.pairs", "probe.tokens")
    return torch.func.functional_call(called, dict(zip(names, parameters)), given)


def margin_loss(x, weight, bias, label):
    """A learner's."""
    model = grassmann.DynamicSubspaceLearners(D, B)
    called = torch.nn.Module()
    called.model, called.forward = model, model.loss
    return torch.func.functional_call(called, {"model.embed.weight": weight, "model.embed.bias": bias}, (x, label))


def added(y, a, b):
    """In place: y is read and written."""
    torch.ops.torch_subspace.product_(y[None], a[None], b[None], False, False, 1.0, 1.0)
    return y


LABELS, FRAMES = torch.arange(N) % C, torch.linalg.qr(some(C, N, K)).Q.mT.contiguous()
MOVED = [
    (work.logits(B, N, C, K, False), lambda x, w: ts.subspace_logits(x, w), (some(B, N), FRAMES), {"backward": False}),
    (work.logits(B, N, C, K, True), lambda x, w: ts.subspace_logits(x, w), (some(B, N), FRAMES.clone()), {}),
    (work.cross_entropy(N, N, C, K), ts.subspace_cross_entropy, (some(N, N), FRAMES.clone(), LABELS), {}),
    (work.assignment(B, N, C, K), lambda x, w: ts.grassmann.subspace_scores(x, w).argmax(1), (some(B, N), FRAMES),
     {"backward": False}),
    (work.denoise(B, N, C, K), grassmann.subspace_denoise, (some(B, N), FRAMES), {"backward": False}),
    (work.patch(B, N, K), grassmann.subspace_patch, (some(B, N), some(B, N), some(K, N)), {}),
    (work.distances(2, B, N, K), lambda x, v: with_basis("distances", [v], x), (frozen(some(2, B, N)), some(K, N)), {}),
    (work.probe(2, B, N, K, C, D), lambda x, v, p, q, tree, pair, token: with_basis("loss", [v, p, q], x, tree, pair,
                                                                                   token),
     (frozen(some(2, B, N)), some(K, N), some(C, K), some(D, K), frozen(torch.rand(2, B - 1)),
      torch.arange(2 * B - 2).view(2, -1) % C, torch.arange(2 * B).view(2, -1)), {}),
    (work.grouped_normalize(B, D), lambda x: grassmann.grouped_normalize(x, (12, 8)), (some(B, D),), {}),
    (work.margin_loss(N, D, B), margin_loss, (some(N, D), some(B, D), some(B), LABELS), {}),
    (work.entropy(N, D), isotropy.von_neumann_entropy, (some(N, D),), {}),
    (work.ridge(N, D), isotropy.ridge_transition, (some(N, D), some(N, D)), {}),
    (work.koopman(2, N, D, 2), isotropy.KoopmanInformationLoss(k=2), (some(2, N, D), some(2, N, D)), {}),
    (work.procrustes(N, D, False), isotropy.procrustes, (some(N, D), some(N, D)), {"backward": False}),
    (work.procrustes(D, K, True), isotropy.procrustes, (some(D, K), some(D, K)), {}),
    (work.orthogonal_adapter(N, D), linear, (some(N, D), some(D, D)), {}),
    (work.distillation(N), lambda old, new: isotropy.similarity_distillation(old, new, tau=1.0, alpha=1.0),
     (frozen(some(N, N)), some(N, N)), {}),
    (work.group_lasso(N, D), lambda w: isotropy.group_lasso(w, [K] * (N // K)), (some(N, D),), {}),
    (work.proximal(N, D), lambda w: isotropy.prox_group_lasso_(w, [K] * (N // K), 0.1), (some(N, D),),
     {"backward": False}),
    (work.gated_cosine(B, N, K), isotropy.gated_cosine, (some(B, K), some(N, K), torch.rand(B, K)), {}),
    (work.lambda_orthogonality(2, D), lambda *w: isotropy.lambda_orthogonality(w, 1.0).sum(),
     (some(D, D), some(D, D)), {}),
    (work.sigreg(2, N, D, K), lambda z, a: isotropy.sigreg(z, directions=a).mean(),
     (some(2, N, D), frozen(torch.nn.functional.normalize(some(D, K), dim=0))), {}),
    (work.hadamard(3, 16), lowrank.hadamard, (some(3, 16),), {"backward": False}),
    (work.fastfood(9, 100), lambda x: lowrank.fastfood(x, 100, seed=1), (some(9),), {"needed": False}),
    (work.newton_schulz(N, D), lowrank.newton_schulz, (some(N, D),), {"backward": False}),
    (work.product(N, K, D), added, (some(N, K), some(N, D), some(D, K)), {"backward": False}),
    (work.coding_rate(N, D, 0), ts.coding_rate, (some(N, D),), {}),
    (work.coding_rate(N, D, C), ts.coding_rate, (some(N, D), LABELS), {}),
    (work.coding_rate_soft(N, D, C), ts.coding_rate, (some(N, D), some(N, C).softmax(1)), {}),
    (work.sinkhorn(N), lambda s: ts.sinkhorn(s, eta=1.0), (some(N, N),), {}),
    (work.depthwise(2, 3, 8, 3), lambda x, dy: depthwise_weight_gradient(x, dy, (3, 3), (1, 1), (1, 1), (1, 1)),
     (some(2, 3, 8, 8), some(2, 3, 8, 8)), {"backward": False}),
    (work.tucker((10, 9, 3, 5), (4, 3, 2, 2)), lambda base, core, *f: ts.tucker_compose(core, f, scale=1.0, base=base),
     (some(10, 9, 3, 5), some(4, 3, 2, 2), some(10, 4), some(9, 3), some(3, 2), some(5, 2)), {"backward": False}),
    (work.tucker_linear(B, N, D, K), lambda x, w, core, u, v: ts.tucker_linear(x, w, None, core, u, v, scale=1.0),
     (some(B, N), frozen(some(D, N)), some(K, K), some(D, K), some(K, N)), {}),
    (work.tucker_conv((2, 8, 8, 8), (2, 12, 8, 8), 3, 1, K),
     lambda x, w, core, u, v: ts.tucker_conv(x, w, None, core, [u, v, None, None], scale=1.0, padding=(1, 1)),
     (some(2, 8, 8, 8), frozen(some(12, 8, 3, 3)), some(K, K, 3, 3), some(12, K), some(8, K)), {}),
]  # fmt: skip


@pytest.mark.parametrize("said, function, given, options", MOVED)
def test_bytes(said, function, given, options):
    assert moved(function, *given, **options) == said["bytes"]


def adamw(params):
    return lowrank.LowRankAdamW(params, lr=1e-3, rank=K)


STEPS = [  # shapes, optimiser, and of its state what is read and written
    (work.rsgd(C, K, N), [(C, K, N)], lambda p: ts.RiemannianSGD([{"params": p, "manifold": "grassmann"}], lr=0.1,
                                                                 momentum=0.9), ["momentum_buffer"]),
    (work.trion(D, N, K), [(D, N)], lambda p: lowrank.Trion(p, lr=0.1, rank=K), ["momentum_buffer"]),
    (work.coso(D, 2, K, 0), [(D, D)], lambda p: lowrank.CoSO(p, lr=0.1, rank=2, sketch_rank=K),
     ["exp_avg", "exp_avg_sq", "sketch"]),
    (work.low_rank_adamw([(D, N), (N, D), (7,)], K, True), [(D, N), (N, D), (7,)], adamw, ["exp_avg", "exp_avg_sq"]),
]  # fmt: skip


@pytest.mark.parametrize("said, shapes, make, state", STEPS)
def test_bytes_of_steps(said, shapes, make, state):
    params = [torch.nn.Parameter(FRAMES.clone() if len(shape) == 3 else some(*shape)) for shape in shapes]
    for p in params:
        p.grad = some(*p.shape)
    optimizer = make(params)
    optimizer.step()
    found = sum(2 * p.nbytes + p.grad.nbytes for p in params)
    for p in params:
        found += sum(2 * optimizer.state[p][key].nbytes for key in state)
    assert found == said["bytes"]


def test_every_bench_takes_its_work_from_there():
    for path in BENCH.glob("*/bench_*.py"):
        text = path.read_text()
        assert not re.search(r"\b(bytes|flops)=", text), path
        assert text.count("**work.") == len(re.findall(r"\bCase\(", text)), path
