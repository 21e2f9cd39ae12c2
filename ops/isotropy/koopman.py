"""Linear dynamics of features: the ridge regression of the next ones on these, and the loss that makes them linear.

    K = (Zᵀ Z + eta 1)⁻¹ Zᵀ Z'                        the transition, of a trajectory's features Z and their successors
      = Zᵀ (Z Zᵀ + eta 1)⁻¹ Z'                        the same where there are fewer points than features
"""
from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common import (
    NOT_NEGATIVE,
    POSITIVE,
    all_reduce,
    check_flag,
    check_floating,
    check_group,
    check_number,
    check_word,
    full_precision,
    told,
    unit,
    whole,
    wide_dtype,
)
from .entropy import von_neumann_entropy
from .products import check_points, gram, product, solve, summed

SIGNS = ("maximise", "minimise")


def ridge_transition(z: Tensor, z_next: Tensor, *, eta: float = 0.1,
                     process_group: dist.ProcessGroup | None = None) -> Tensor:
    """The matrix K for which ``z @ K`` is nearest to ``z_next``, with a penalty eta ‖K‖².

    Args:
        z: features, (..., n, d), n and d above 0; each leading index has a transition of its own.
        z_next: what they become, (..., n, e), usually e = d.
        eta: weight of the penalty, above 0.
        process_group: a torch.distributed group whose processes each hold a part of the points, some perhaps none, or
            None.

    Returns:
        K, (..., d, e), of z's dtype; float32 for half types, which are widened first (also under autocast). Between
        float32 and float64, z decides. NaN where z has NaN or infinity, or Zᵀ Z + eta 1 is not positive definite in its
        dtype.

    Differentiable in both any number of times. In a process group the gradient is that of the sum of all processes'
    (equal) functions of K.

    Raises:
        TypeError: z or z_next is no dense floating tensor, or another argument is of a wrong kind.
        ValueError: shapes, devices or values do not fit.

    Example:
        >>> z, turn = torch.randn(100, 3), torch.tensor([[0.0, 1, 0], [-1, 0, 0], [0, 0, 0.5]])
        >>> torch.allclose(ts.isotropy.ridge_transition(z, z @ turn, eta=1e-3), turn, atol=1e-3)
        True
    """
    name = "ridge_transition"
    check_number(name, "eta", eta, POSITIVE)
    check_group(name, process_group)
    _check_pair(name, z, z_next, process_group)
    wide, after = z.to(wide_dtype(z.dtype)), z_next.to(wide_dtype(z.dtype))
    n, d = z.shape[-2:]
    if n < d and process_group is None:
        return product(wide, solve(_ridge(gram(wide.mT), eta), after))
    moments = torch.cat((gram(wide), product(wide, after)), -1)
    if process_group is not None:
        moments = all_reduce(moments, process_group)
    return solve(_ridge(moments[..., :d], eta), moments[..., d:])


def _ridge(a: Tensor, eta: float) -> Tensor:
    return a + eta * torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)


def _check_pair(name: str, z: Tensor, z_next: Tensor, group: object) -> None:
    check_points(name, "z", z, group)
    check_points(name, "z_next", z_next, group)
    if z.shape[:-1] != z_next.shape[:-1] or z.device != z_next.device:
        raise ValueError(f"{name}: z and z_next must be of the same points, on one device, got {tuple(z.shape)} on "
                         f"{z.device} and {tuple(z_next.shape)} on {z_next.device}")


def koopman_information_loss(z: Tensor, z_next: Tensor, *, decode: Callable[[Tensor], Tensor] | None = None,
                             states: Tensor | None = None, next_states: Tensor | None = None, alpha: float = 2.0,
                             beta: float = 0.1, lam: float = 0.1, k: int = 3, tau: float = 0.07, eta: float = 0.1,
                             entropy: str = "maximise", detach: bool = False,
                             process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Features whose dynamics are linear, that keep neighbours in time together, and that use many directions.

        loss = prediction + lam reconstruction + alpha InfoNCE - beta S

    prediction: mean squared error of ``z K`` against the next features, K the mean of the trajectories' ridge
    transitions; with a decoder of ``decode(z K)`` against the next states. reconstruction: that of ``decode(z)``
    against the states; only with a decoder. InfoNCE: of a point of a trajectory, by cosines, its neighbours up to k
    steps away against the trajectory's other points; of points that have all 2 k neighbours. S: the von Neumann entropy
    of the covariance of all points.

    Args:
        z: features of trajectories, (B, T, d), T at least 2 k + 2.
        z_next: those a step later, likewise.
        decode, states, next_states: a function from features to states, and the states that z and z_next are features
            of, of any shape; all three, or none. Without, nothing keeps features from becoming short, which makes the
            error of prediction small.
        alpha, beta, lam: weights, at least 0.
        k: steps that make neighbours, at least 1.
        tau: InfoNCE's temperature.
        eta: of `ridge_transition`.
        entropy: "maximise" subtracts beta S, as the paper's text has it, which keeps features from collapsing.
            "minimise" adds it, as the public trainer does.
        detach: K is taken for a constant in the gradient, as in the public trainer.
        process_group: a torch.distributed group whose processes each hold a part of the trajectories, some perhaps
            none, or None.

    Returns:
        a scalar of z's dtype; float32 for half types, which are widened first (also under autocast). To be minimised.

    In a process group the gradient is that of the sum of all processes' (equal) losses, after DistributedDataParallel's
    mean that of the whole batch.

    Raises:
        TypeError: features or states are no dense floating tensors, or another argument is of a wrong kind.
        ValueError: shapes, devices or values do not fit, or a decoder comes without states.

    Source: text and public code of information-theoretic Koopman learning, which differ in the entropy's sign. Errors
    are means over time, where that code has sums.

    Example:
        >>> x, decode = torch.randn(4, 17, 6).cumsum(1), torch.nn.Linear(8, 6)
        >>> z = torch.nn.Linear(6, 8)(x)
        >>> loss = ts.isotropy.koopman_information_loss(z[:, :-1], z[:, 1:], decode=decode, states=x[:, :-1],
        ...                                             next_states=x[:, 1:])
        >>> loss.backward()
    """
    name, group = "koopman_information_loss", process_group
    k = _check_options(name, alpha, beta, lam, k, tau, eta, entropy, detach, group)
    return _information(name, z, z_next, decode, states, next_states, alpha, beta, lam, k, tau, eta, entropy, detach,
                        group)


def _check_options(name, alpha, beta, lam, k, tau, eta, entropy, detach, group) -> int:
    """k as an int; raises in `name`'s voice unless all can be used."""
    for what, value in (("alpha", alpha), ("beta", beta), ("lam", lam)):
        check_number(name, what, value, NOT_NEGATIVE)
    check_number(name, "tau", tau, POSITIVE)
    check_number(name, "eta", eta, POSITIVE)
    check_word(name, "entropy", entropy, SIGNS)
    check_flag(name, "detach", detach)
    check_group(name, group)
    return whole(name, "k", k, 1)


def _information(name, z, z_next, decode, states, next_states, alpha, beta, lam, k, tau, eta, entropy, detach,
                 group) -> Tensor:
    """The loss, with options that have been checked; errors are in `name`'s voice."""
    _check_pair(name, z, z_next, None)
    if z.dim() != 3 or z_next.shape != z.shape or (z.shape[0] == 0 and group is None):
        raise ValueError(f"{name}: z and z_next must be (B, T, d) with B > 0, got {tuple(z.shape)} and "
                         f"{tuple(z_next.shape)}")
    if z.shape[1] < 2 * k + 2:
        raise ValueError(f"{name}: z must have T >= 2 k + 2 = {2 * k + 2} steps, got {tuple(z.shape)}")
    _check_states(name, decode, states, next_states)
    wide, after = z.to(wide_dtype(z.dtype)), z_next.to(wide_dtype(z.dtype))
    transition = _mean(ridge_transition(wide, after, eta=eta), group, (0,))  # of trajectories, each with its own
    with full_precision(z):
        ahead = product(wide.flatten(0, 1).mT, transition.detach() if detach else transition).view_as(after)
        loss = alpha * _mean(neighbour_nce(wide, k, tau), group)
    if decode is None:
        loss = loss + _mean((ahead - after).square(), group)
    else:
        loss = loss + _mean(_errors(name, decode, ahead, next_states, "next_states"), group)
        loss = loss + lam * _mean(_errors(name, decode, wide, states, "states"), group)
    spread = von_neumann_entropy(wide.flatten(0, 1), of="covariance", process_group=group)
    return loss - beta * spread if entropy == "maximise" else loss + beta * spread


def _mean(x: Tensor, group: dist.ProcessGroup | None, over: tuple[int, ...] | None = None) -> Tensor:
    """Over all entries, or these dimensions; of all processes together."""
    over = tuple(range(x.dim())) if over is None else over
    if group is None:
        return x.mean(over)
    total, count = summed(x.sum(over), math.prod(x.shape[i] for i in over), group)
    return total / count


def _check_states(name, decode, states, next_states) -> None:
    given = {"decode": decode, "states": states, "next_states": next_states}
    if len({value is None for value in given.values()}) > 1:
        missing = [what for what, value in given.items() if value is None]
        raise ValueError(f"{name}: decode, states and next_states go together, got None for "
                         f"{' and '.join(missing)}")
    if decode is None:
        return
    if not callable(decode) or isinstance(decode, type):
        raise TypeError(f"{name}: decode must be a function of features, got {told(decode)}")
    for what in ("states", "next_states"):
        check_floating(name, what, given[what])


def _errors(name, decode, z, states, what) -> Tensor:
    found = decode(z)
    if not isinstance(found, Tensor) or found.shape != states.shape or found.device != states.device:
        got = (f"{tuple(found.shape)} on {found.device}, {what} {tuple(states.shape)} on {states.device}"
               if isinstance(found, Tensor) else told(found))
        raise ValueError(f"{name}: decode(z) must be like {what}, got {got}")
    wide = wide_dtype(found.dtype)
    return (found.to(wide) - states.to(wide)).square()


class KoopmanInformationLoss(nn.Module):
    """`koopman_information_loss` as a module.

        loss = prediction + lam reconstruction + alpha InfoNCE - beta S

    Args:
        alpha, beta, lam, k, tau, eta, entropy, detach, process_group: as for `koopman_information_loss`, which says
            what the terms are.

    Shape: z, z_next (B, T, d), T at least 2 k + 2. A scalar of z's dtype; float32 for half types.

    ``loss(z, z_next, decode=decoder, states=x, next_states=x_next)`` measures errors in states of any shape; without a
    decoder nothing keeps features from becoming short, which makes the error of prediction small.

    Raises: TypeError, ValueError as `koopman_information_loss`; of the options, when it is made.

    Source: text and public code of information-theoretic Koopman learning, which differ in the entropy's sign.

    Example:
        >>> x = torch.randn(4, 17, 6).cumsum(1)
        >>> z = x.requires_grad_()
        >>> loss = ts.isotropy.KoopmanInformationLoss()(z[:, :-1], z[:, 1:])
        >>> torch.equal(loss, ts.isotropy.koopman_information_loss(z[:, :-1], z[:, 1:]))
        True
        >>> loss.backward()
    """

    def __init__(self, alpha: float = 2.0, beta: float = 0.1, lam: float = 0.1, *, k: int = 3, tau: float = 0.07,
                 eta: float = 0.1, entropy: str = "maximise", detach: bool = False,
                 process_group: dist.ProcessGroup | None = None) -> None:
        super().__init__()
        self.k = _check_options("KoopmanInformationLoss", alpha, beta, lam, k, tau, eta, entropy, detach,
                                process_group)
        self.alpha, self.beta, self.lam = alpha, beta, lam
        self.tau, self.eta, self.entropy, self.detach = tau, eta, entropy, bool(detach)
        self.process_group = process_group

    def forward(self, z: Tensor, z_next: Tensor, *, decode: Callable[[Tensor], Tensor] | None = None,
                states: Tensor | None = None, next_states: Tensor | None = None) -> Tensor:
        return _information("KoopmanInformationLoss", z, z_next, decode, states, next_states, self.alpha, self.beta,
                            self.lam, self.k, self.tau, self.eta, self.entropy, self.detach, self.process_group)

    def extra_repr(self) -> str:
        return (f"alpha={self.alpha}, beta={self.beta}, lam={self.lam}, k={self.k}, tau={self.tau}, eta={self.eta}, "
                f"entropy={self.entropy!r}, detach={self.detach}")


def neighbour_nce(z: Tensor, k: int, tau: float) -> Tensor:
    """-log of the share that a point's neighbours have of exp(cosine / tau), (B, T - 2 k), for z (B, T, d)."""
    z = unit(z)
    t = torch.arange(z.shape[1], device=z.device)
    away = (t[k : len(t) - k, None] - t).abs()  # of those with all neighbours
    cosine = product(z[:, k : len(t) - k].mT, z.mT).masked_fill(away == 0, -torch.inf) / tau
    near = cosine.masked_fill(away > k, -torch.inf)
    return cosine.logsumexp(-1) - near.logsumexp(-1)
