"""The truth the kernels are held against: plain torch in float64, one obvious formula at a time.

Nothing here is fast, and nothing shares more with the kernels than a formula on paper: the geodesic goes
through an SVD, the polar factor through eigh, Cayley through its n x n matrix.
"""

import torch

# ---------------------------------------------------------------------------------------------------------------------
# rsgd: one step of Riemannian SGD on frames, rows orthonormal, `weight` (..., k, n)
# ---------------------------------------------------------------------------------------------------------------------


def orthonormal(weight):
    """The frame nearest to `weight`: its polar factor. A step starts there, so that drift does not add up."""
    u, _, vt = torch.linalg.svd(weight, full_matrices=False)
    return u @ vt


def horizontal(weight, direction):
    """The part of `direction` that moves the subspace: what is left without its components in the span of the rows."""
    return direction - direction @ weight.mT @ weight


def geodesic(weight, tangent):
    """Exponential map: along every singular direction of `tangent` the frame turns by the singular value."""
    u, s, vt = torch.linalg.svd(tangent, full_matrices=False)
    return u @ (s.cos()[..., None] * (u.mT @ weight) + s.sin()[..., None] * vt)


def polar(weight, tangent):
    """(Y Yᵀ)^(-1/2) Y with Y = W + tangent."""
    y = weight + tangent
    value, vector = torch.linalg.eigh(y @ y.mT)
    return (vector * value.rsqrt()[..., None, :]) @ vector.mT @ y


def qr(weight, tangent):
    """The Q of Y = W + tangent, signs chosen so that R has a positive diagonal."""
    q, r = torch.linalg.qr((weight + tangent).mT)
    return (q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]).mT


def cayley(weight, tangent):
    """W (I + A/2) (I - A/2)^-1 with the skew n x n matrix A = Wᵀ tangent - tangentᵀ W.

    (I - A/2)^-1 = (I + A/2) (I - A²/4)^-1, an SPD system: torch's LU can hang on two threads from n = 256 on.
    """
    a = weight.mT @ tangent - tangent.mT @ weight
    eye = torch.eye(a.shape[-1], dtype=a.dtype)
    y = weight @ (eye + a / 2) @ (eye + a / 2)
    return torch.cholesky_solve(y.mT, torch.linalg.cholesky(eye - a @ a / 4)).mT


RETRACTIONS = {"geodesic": geodesic, "polar": polar, "qr": qr, "cayley": cayley}


def tangential(weight, direction):
    """On the Stiefel manifold: `direction` without the symmetric part of its components along the rows."""
    inner = direction @ weight.mT
    return direction - (inner + inner.mT) / 2 @ weight


def turning(weight, tangent):
    """The skew n x n matrix Z of least rank with Z Wᵀ = tangentᵀ."""
    z = tangent.mT @ weight
    return z - z.mT + weight.mT @ (tangent @ weight.mT) @ weight


def stiefel_geodesic(weight, tangent):
    """Of the canonical metric."""
    return (torch.linalg.matrix_exp(turning(weight, tangent)) @ weight.mT).mT


def stiefel_cayley(weight, tangent):
    z = turning(weight, tangent)
    eye = torch.eye(z.shape[-1], dtype=z.dtype)  # (I - Z/2)^-1 by the SPD system of `cayley`
    y = (eye + z / 2) @ (eye + z / 2) @ weight.mT
    return torch.cholesky_solve(y, torch.linalg.cholesky(eye - z @ z / 4)).mT


STIEFEL = {"geodesic": stiefel_geodesic, "polar": polar, "qr": qr, "cayley": stiefel_cayley}


def transport(weight, tangent, moved):
    """`moved`, a horizontal vector at W, carried in parallel along the geodesic that starts along `tangent`."""
    u, s, vt = torch.linalg.svd(tangent, full_matrices=False)
    along = moved @ vt.mT  # turns with the frame; what is orthogonal to the tangent stays
    return moved - along @ vt + along @ (s.cos()[..., None] * vt - s.sin()[..., None] * (u.mT @ weight))


def rsgd_step(
    weight,
    grad,
    buffer=None,
    *,
    lr,
    momentum=0.0,
    dampening=0.0,
    weight_decay=0.0,
    nesterov=False,
    maximize=False,
    retraction="geodesic",
    transport_by="project",
    manifold="grassmann",
):
    """The new (weight, buffer) of frames (C, k, n); `lr` a number or one per class (C,)."""
    weight, grad = weight.double(), grad.double()
    lr = torch.as_tensor(lr, dtype=torch.float64).reshape(-1, 1, 1)
    g = (-grad if maximize else grad) + weight_decay * weight
    direction = g
    if buffer is not None:
        buffer = momentum * buffer.double() + (1 - dampening) * g
        direction = g + momentum * buffer if nesterov else buffer
    frame = orthonormal(weight)
    if manifold == "stiefel":
        buffer = None if buffer is None else tangential(frame, buffer)
        return STIEFEL[retraction](frame, -lr * tangential(frame, direction)), buffer
    tangent = -lr * horizontal(frame, direction)
    if buffer is not None and transport_by == "parallel":
        buffer = transport(frame, tangent, horizontal(frame, buffer))
    return RETRACTIONS[retraction](frame, tangent), buffer


def principal_angles(a, b):
    """Principal angles (..., k) between the row spaces of two frames, accurate near 0 (from sines and cosines)."""
    cos = torch.linalg.svdvals(a @ b.mT).clamp(max=1)
    sin = torch.linalg.svdvals(b - b @ a.mT @ a).clamp(max=1).flip(-1)
    return torch.atan2(sin, cos)


# ---------------------------------------------------------------------------------------------------------------------
# logits and cross_entropy: `weight` (C, k, n), or (sum of dims, n) with dims; `x` (..., n)
# ---------------------------------------------------------------------------------------------------------------------


def logits(x, weight, *, gamma=25.0, normalize=True, dims=None):
    """gamma || W_c x || with x divided by max(|x|, 1e-12); differentiable where no projection is 0."""
    if normalize:
        x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=1e-12)
    frames = weight.unbind(0) if dims is None else weight.split(list(dims))
    return gamma * torch.stack([torch.linalg.vector_norm(x @ frame.mT, dim=-1) for frame in frames], -1)


def cross_entropy(y, target, *, class_weight=None, ignore_index=-100, label_smoothing=0.0, reduction="mean"):
    """Softmax cross-entropy of logits (N, C), row by row from its definition."""
    classes = y.shape[-1]
    weight = torch.ones(classes, dtype=y.dtype) if class_weight is None else class_weight.to(y.dtype)
    if target.dtype == torch.int64:
        counted = target != ignore_index
        hot = torch.nn.functional.one_hot(target.clamp(min=0), classes).to(y.dtype) * counted[:, None]
        even = counted[:, None].to(y.dtype) / classes
        mass = (weight[target.clamp(min=0)] * counted).sum()
    else:
        hot, even, mass = target.to(y.dtype), 1 / classes, y.shape[0]
    tau = weight * ((1 - label_smoothing) * hot + label_smoothing * even)
    loss = -(tau * torch.log_softmax(y, -1)).sum(-1)
    return {"none": loss, "sum": loss.sum(), "mean": loss.sum() / max(mass, 1e-300)}[reduction]


# ---------------------------------------------------------------------------------------------------------------------
# tucker: a weight's change is a small core with a factor on every mode
# ---------------------------------------------------------------------------------------------------------------------


def tucker(core, factors, *, scale=1.0, base=None):
    """scale * core x_0 factor_0 x_1 ... + base, one mode after the other; a factor of None is the identity."""
    for mode, factor in enumerate(factors):
        if factor is not None:
            core = torch.tensordot(factor.to(core.dtype), core, dims=([1], [mode])).movedim(0, mode)
    return scale * core if base is None else base.to(core.dtype) + scale * core


def depthwise_weight_gradient(x, dy, kernel, stride, padding, dilation, groups=None):
    """d<dy, conv(x, w)>/dw of a depthwise convolution, or one of so many groups, by autograd through torch's own."""
    spatial, groups = x.dim() - 2, groups or x.shape[1]
    conv = (torch.conv1d, torch.conv2d, torch.conv3d)[spatial - 1]
    weight = torch.zeros(dy.shape[1], x.shape[1] // groups, *kernel, dtype=x.dtype, requires_grad=True)
    y = conv(x, weight, None, stride, padding, dilation, groups)
    return torch.autograd.grad(y, weight, dy)[0]


# ---------------------------------------------------------------------------------------------------------------------
# coding_rate: points z (n, d); eps is the papers' epsilon squared
# ---------------------------------------------------------------------------------------------------------------------


def coding_rate(z, labels=None, *, eps=0.5):
    """R(Z) from the singular values, or with labels (n,) the mean rate of the classes weighted by their sizes."""
    n, d = z.shape
    if labels is not None:
        parts = [z[labels == label] for label in labels.unique()]
        return sum(len(part) / n * coding_rate(part, eps=eps) for part in parts)
    return 0.5 * torch.log1p(d / (n * eps) * torch.linalg.svdvals(z).square()).sum()


# ---------------------------------------------------------------------------------------------------------------------
# coding_rate_soft: z (V, n, d), weights (V, n, K)
# ---------------------------------------------------------------------------------------------------------------------


def coding_rate_soft(z, weights, eps):
    """sum_k t_k/(2n) logdet(I + d/(t_k eps) Z' diag(w_k) Z), class by class; empty classes are left out."""
    n, d = z.shape[1:]
    rates = []
    for points, columns in zip(z, weights.mT):
        rate = 0 * points.sum() + 0 * columns.sum()
        for w in columns:
            t = w.sum()
            if t > 0:
                a = torch.eye(d, dtype=z.dtype) + d / (t * eps) * (points.mT * w) @ points
                rate = rate + t / n * torch.linalg.cholesky(a).diagonal().log().sum()
        rates.append(rate)
    return torch.stack(rates) if rates else z.new_zeros(0)


# ---------------------------------------------------------------------------------------------------------------------
# sinkhorn: plan = f exp(scores / eta) g with given row and column sums
# ---------------------------------------------------------------------------------------------------------------------


def sinkhorn(scores, *, eta=0.1, row=None, col=None, sweeps=2000):
    """Rows and columns normalised in turn in the log domain; autograd through all of it is the exact gradient too."""
    s = scores / eta
    log_row, log_col = (0.0 if t is None else t.log() for t in (row, col))
    g = torch.zeros_like(s[..., 0, :])
    for _ in range(sweeps):
        f = log_row - torch.logsumexp(s + g[..., None, :], -1)
        g = log_col - torch.logsumexp(s + f[..., :, None], -2)
    return torch.exp(s + f[..., :, None] + g[..., None, :])


def sinkhorn_symmetric(scores, *, eta=0.1, row=None, sweeps=200):
    """The same of symmetric scores by one potential, half way to its row normalisation each time."""
    s, f = scores / eta, torch.zeros_like(scores[..., 0])
    log_row = 0.0 if row is None else row.log()
    for _ in range(sweeps):
        f = (f + log_row - torch.logsumexp(s + f[..., None, :], -1)) / 2
    return torch.exp(s + f[..., :, None] + f[..., None, :])


def sinkhorn_gradient(plan, dplan, *, eta=0.1):
    """(dscores, drow, dcol) of <plan, dplan> by dense least squares on the equations of the potentials.

    d plan = plan o (d scores / eta + da 1' + 1 db'), with da, db such that the sums stay at row and col.
    """
    m, weighted = plan.shape[0], plan * dplan
    top = torch.cat([torch.diag(plan.sum(1)), plan], 1)
    system = torch.cat([top, torch.cat([plan.mT, torch.diag(plan.sum(0))], 1)])
    value, vector = torch.linalg.eigh(system)
    known = value > 1e-10 * value.max()
    inverse = torch.where(known, 1 / value.where(known, torch.ones_like(value)), 0)
    solution = vector @ (inverse * (vector.mT @ torch.cat([weighted.sum(1), weighted.sum(0)])))
    x, y = solution[:m], solution[m:]
    return (weighted - plan * (x[:, None] + y)) / eta, x, y


def sinkhorn_half_steps(scores, *, eta=0.1, half_steps=5):
    """Doubly stochastic as the public code of MLC and CPP has it: so many half steps, column potentials detached."""
    s = scores / eta
    f, g = torch.zeros_like(s[..., 0]), torch.zeros_like(s[..., 0, :])
    for step in range(half_steps):
        if step % 2 == 0:
            f = -torch.logsumexp(s + g[..., None, :], -1)
        else:
            g = -torch.logsumexp(s + f[..., :, None], -2).detach()
    return torch.exp(s + f[..., :, None] + g[..., None, :])


# ---------------------------------------------------------------------------------------------------------------------
# hadamard, fastfood: rows x (..., n), n a power of two
# ---------------------------------------------------------------------------------------------------------------------


def hadamard(x, *, normalize=False):
    """A product with the matrix of Sylvester's construction."""
    n, matrix = x.shape[-1], torch.ones(1, 1, dtype=x.dtype)
    for _ in range(n.bit_length() - 1):
        matrix = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=x.dtype), matrix)
    return x @ matrix / (n**0.5 if normalize else 1)


def fastfood(signs, order, normal, size):
    """P (size, d) of B (d,), Π as the places that entries are taken from (n,), and G (n,)."""
    identity = torch.eye(len(normal), dtype=torch.float64)
    columns = hadamard(identity)[:, : len(signs)] * signs.double()  # H B
    columns = hadamard((normal.double()[:, None] * columns[order]).mT).mT  # H G Π of it
    return columns[:size] / (size * normal.double().square().sum()).sqrt()


# ---------------------------------------------------------------------------------------------------------------------
# sigreg: points z (..., n, d), directions (d, slices)
# ---------------------------------------------------------------------------------------------------------------------


def sigreg(z, directions, *, knots=17, t_max=3.0):
    """The mean over directions of the Epps-Pulley statistic, n times the weighted squared distance of characteristic
    functions by the trapezoidal rule over both signs of t."""
    t = torch.linspace(0, t_max, knots, dtype=z.dtype)
    normal = torch.exp(-t.square() / 2)
    weight = torch.full_like(t, 2 * t_max / (knots - 1)) * normal
    weight[0], weight[-1] = weight[0] / 2, weight[-1] / 2
    angle = (z @ directions)[..., None] * t
    error = (angle.cos().mean(-3) - normal).square() + angle.sin().mean(-3).square()
    return z.shape[-2] * (error @ weight).mean(-1)


# ---------------------------------------------------------------------------------------------------------------------
# newton_schulz: matrices x (..., m, n)
# ---------------------------------------------------------------------------------------------------------------------


def newton_schulz(x, triples, *, eps=1e-7):
    """x over its length, then a X + b (X Xᵀ) X + c (X Xᵀ)² X for each triple; of a tall one the transpose's."""
    if x.shape[-2] > x.shape[-1]:
        return newton_schulz(x.mT, triples, eps=eps).mT
    y = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for a, b, c in triples:
        gram = y @ y.mT
        y = a * y + b * gram @ y + c * gram @ gram @ y
    return y


# ---------------------------------------------------------------------------------------------------------------------
# isotropy in plain torch: points (..., n, d), weights (k, n)
# ---------------------------------------------------------------------------------------------------------------------


def von_neumann_entropy(z):
    """By the singular values of one matrix of points."""
    p = torch.linalg.svdvals(z).square()
    p = p / p.sum(-1, keepdim=True)
    return -torch.xlogy(p, p).sum(-1)


def ridge_transition(z, z_next, *, eta=0.1):
    """Least squares of the points and sqrt(eta) times the identity below them, which is to become 0."""
    d = z.shape[-1]
    below = eta**0.5 * torch.eye(d, dtype=z.dtype).expand(*z.shape[:-2], d, d)
    after = torch.cat([z_next, z_next.new_zeros(*z.shape[:-2], d, z_next.shape[-1])], -2)
    return torch.linalg.lstsq(torch.cat([z, below], -2), after).solution


def neighbour_nce(z, k, tau):
    """Of one trajectory (T, d), point by point."""
    z = z / z.norm(dim=-1, keepdim=True)
    losses = []
    for t in range(k, len(z) - k):
        share = {s: torch.exp(z[t] @ z[s] / tau) for s in range(len(z)) if s != t}
        losses.append(-torch.log(sum(e for s, e in share.items() if abs(s - t) <= k) / sum(share.values())))
    return torch.stack(losses)


def gated_cosine(z1, z2, gate):
    """With all b x n x k gated points."""
    first, second = (gate * z1)[..., :, None, :], gate[..., :, None, :] * z2[..., None, :, :]
    return (first * second).sum(-1) / (first.norm(dim=-1) * second.norm(dim=-1))


def lambda_orthogonality(weight, lam, *, alpha=1.0):
    f = torch.linalg.matrix_norm(weight @ weight.mT - torch.eye(weight.shape[-2], dtype=weight.dtype))
    return torch.sigmoid(alpha * (f - lam)) * f


def similarity_distillation(old, new, *, tau, alpha):
    """Rows and columns of one matrix, one after the other."""
    losses = []
    for before, after in ((old, new), (old.mT, new.mT)):
        for i in range(len(new)):
            p, q = torch.softmax(before[i] / tau, -1), torch.softmax(after[i] / tau, -1)
            losses.append(-q[i].log() + (alpha * (p * (p / q).log()).sum() if before[i].argmax() == i else 0))
    return torch.stack(losses).mean()
