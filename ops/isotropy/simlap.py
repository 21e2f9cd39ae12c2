"""What two classes have in common: contrast under gates that the pair of classes chooses (SimLAP)."""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..common import (
    FLOATS,
    POSITIVE,
    all_reduce,
    check_dense,
    check_device,
    check_floating,
    check_group,
    check_number,
    gather_rows,
    told,
    transformed,
    whole,
    wide_dtype,
)
from .gated_cosine import gated_cosine


def simlap_loss(z1: Tensor, z2: Tensor, gate: Tensor, y1: Tensor, y2: Tensor, *, tau: float = 0.1,
                process_group: dist.ProcessGroup | None = None) -> Tensor:
    """Pairs of things of two classes, near to one another in the coordinates that their gates open.

        l_bn       = cos(g_b z1_b, g_b z2_n) / tau
        loss       = mean_b mean_p -log(exp l_bp / (exp l_bp + sum_m exp l_bm))
        p          the positives: n with y2_n = y2_b, of which the partner, b itself, is one
        m          the negatives: n with y2_n other than both y1_b and y2_b

    Candidates of class y1_b are neither, unless it is y2_b, too: what tells the two classes apart is not asked for.

    Args:
        z1, z2: the two points of each pair, (b, k).
        gate: g, weights of the coordinates for each pair, (b, k), any numbers, from wherever: `SimLAPLoss` learns them
            from the classes.
        y1, y2: their classes, (b,) int64, any numbers.
        tau: temperature, above 0; default 0.1.
        process_group: a torch.distributed group whose processes each hold a part of the pairs, some perhaps none, or
            None. The processes' z2 and y2 are gathered, z2 with its gradient, and the mean is over all pairs: the
            gradient is that of the sum of all processes' (equal) losses, after DistributedDataParallel's mean that of
            the whole batch.

    Returns:
        a scalar of z1's dtype; float32 for half types, which are widened first (also under autocast). To be minimised.

    Differentiable in points and gates any number of times.

    Raises:
        TypeError: points or gates are no dense floating tensors, labels no int64 ones, or another argument is of a
            wrong kind.
        ValueError: shapes, devices or values do not fit.

    Source: SimLAP's logits and temperature, and that both classes are taken out of the negatives. Ours: a positive
    competes with the negatives alone, not with other positives; which candidates are positive; the mean over pairs,
    also where one has more positives than another.

    Example:
        >>> z1, z2 = torch.randn(2, 8, 16, requires_grad=True)
        >>> y1, y2 = torch.randint(10, (2, 8))
        >>> gates = torch.rand(10, 16, requires_grad=True)      # one for each class, say: open where both are
        >>> ts.isotropy.simlap_loss(z1, z2, gates[y1] * gates[y2], y1, y2).backward()
    """
    name = "simlap_loss"
    check_number(name, "tau", tau, POSITIVE)
    check_group(name, process_group)
    _check_pairs(name, z1, z2, y1, y2, None, process_group)
    check_floating(name, "gate", gate)
    if gate.shape != z1.shape or gate.device != z1.device:
        raise ValueError(f"{name}: gate must be like z1, got {tuple(gate.shape)} on {gate.device} and "
                         f"{tuple(z1.shape)} on {z1.device}")
    return _contrast(name, z1, z2, gate, y1, y2, tau, process_group)


def _check_pairs(name: str, z1: Tensor, z2: Tensor, y1: Tensor, y2: Tensor, features: int | None,
                 group: object) -> None:
    for what, z in (("z1", z1), ("z2", z2)):
        check_floating(name, what, z)
        fits = z.dim() == 2 and (z.shape[1] == features if features else z.shape[1] > 0)
        if not fits or (z.shape[0] == 0 and group is None):
            least = " and ".join(["b > 0"] * (group is None) + ["k > 0"] * (features is None))
            raise ValueError(f"{name}: {what} must be (b, {features or 'k'}){' with ' * bool(least)}{least}, got "
                             f"{tuple(z.shape)}")
    if z2.shape != z1.shape or z2.device != z1.device:
        raise ValueError(f"{name}: z1 and z2 must be pairs, on one device, got {tuple(z1.shape)} on {z1.device} "
                         f"and {tuple(z2.shape)} on {z2.device}")
    for what, y in (("y1", y1), ("y2", y2)):
        _check_labels(name, what, y, z1.device)
        if y.shape != z1.shape[:1]:
            raise ValueError(f"{name}: {what} must be ({len(z1)},), a label of each pair, got {tuple(y.shape)}")


def _check_labels(name: str, what: str, y: Tensor, device: torch.device) -> None:
    check_dense(name, what, y)
    if y.dtype != torch.int64:
        raise TypeError(f"{name}: {what} must be int64, got {y.dtype}")
    if y.dim() != 1:
        raise ValueError(f"{name}: {what} must be (b,), got {tuple(y.shape)}")
    if y.device != device:
        raise ValueError(f"{name}: {what} must be on {device}, got {y.device}")


def _contrast(name: str, z1: Tensor, z2: Tensor, gate: Tensor, y1: Tensor, y2: Tensor, tau: float,
              group: dist.ProcessGroup | None) -> Tensor:
    """The loss of what has been checked."""
    others, label = z2.to(wide_dtype(z1.dtype)), y2
    if group is not None:
        others, label = gather_rows(others, group), gather_rows(y2, group)
    logits = gated_cosine(z1, others, gate) / tau
    positive = y2[:, None] == label
    left_out = positive | (y1[:, None] == label)
    # a row without negatives has a sum of nearly 0, whose logarithm is finite and has a gradient
    rest = logits.masked_fill(left_out, torch.finfo(logits.dtype).min / 2).logsumexp(-1, keepdim=True)
    each = -nn.functional.logsigmoid(logits - rest).masked_fill(~positive, 0)
    loss = each.sum(-1) / positive.sum(-1)
    if group is None:
        return loss.mean()
    if not z1.is_cuda and not len(label):
        raise ValueError(f"{name}: z1 must have pairs in one process at least, got {tuple(z1.shape)} in each")
    return all_reduce(loss.sum(), group) / len(label)


class SimLAPLoss(nn.Module):
    """`simlap_loss` under gates that are learnt: pairs of things of two classes, near to one another in the coordinates
    that a gate opens for those classes.

        g_b        = sigmoid(MLP((E[y1_b] + E[y2_b]) / 2))              the gate, the same for (y1, y2) and (y2, y1)

    Args:
        num_classes: rows of the table E.
        features: k, the length of points and gates.
        tau: temperature, above 0; default 0.1.
        width: of E's rows and of the MLP's hidden layer; default 512.
        process_group: as for `simlap_loss`. The gate has parameters, so this module belongs inside what is wrapped.
        device, dtype: of the parameters.

    Shape: z1, z2 (b, k), y1, y2 (b,) int64 labels below num_classes. A scalar of z1's dtype; float32 for half types.
    Cosines are in full precision, also under autocast, where the gate's MLP is what autocast makes of it.

    ``loss.gate(y1, y2)`` is the gate, (b, k), for `gated_cosine` with other points.

    Raises:
        TypeError: points are no dense floating tensors, labels no int64 ones, or another argument is of a wrong kind.
        ValueError: shapes, devices or values do not fit.

    Source: SimLAP's gate and temperature; one hidden layer, with a ReLU, is ours. The rest is `simlap_loss`'s.

    Example:
        >>> loss = ts.isotropy.SimLAPLoss(10, 16)
        >>> z1, z2 = torch.randn(2, 8, 16)
        >>> y1, y2 = torch.randint(10, (2, 8))
        >>> loss(z1, z2, y1, y2).backward()
        >>> gate = loss.gate(y1, y2)
        >>> torch.equal(loss(z1, z2, y1, y2), ts.isotropy.simlap_loss(z1, z2, gate, y1, y2))
        True
        >>> gate.shape, torch.equal(gate, loss.gate(y2, y1))
        (torch.Size([8, 16]), True)
    """

    def __init__(self, num_classes: int, features: int, *, tau: float = 0.1, width: int = 512,
                 process_group: dist.ProcessGroup | None = None, device: torch.device | str | int | None = None,
                 dtype: torch.dtype | None = None) -> None:
        super().__init__()
        name = "SimLAPLoss"
        self.num_classes, self.features = (whole(name, what, value, 1) for what, value in (
            ("num_classes", num_classes), ("features", features)))
        check_number(name, "tau", tau, POSITIVE)
        self.tau, self.width, self.process_group = tau, whole(name, "width", width, 1), process_group
        check_group(name, process_group)
        check_device(name, device)
        if dtype is not None and dtype not in FLOATS:
            raise TypeError(f"{name}: dtype must be float32, float64, float16 or bfloat16, got {told(dtype)}")
        self.classes = nn.Embedding(self.num_classes, self.width, device=device, dtype=dtype)
        self.network = nn.Sequential(nn.Linear(self.width, self.width, device=device, dtype=dtype), nn.ReLU(),
                                     nn.Linear(self.width, self.features, device=device, dtype=dtype))

    def gate(self, y1: Tensor, y2: Tensor) -> Tensor:
        """Numbers in (0, 1), (b, k), of pairs of classes, (b,) each."""
        for what, y in (("y1", y1), ("y2", y2)):
            _check_labels("SimLAPLoss", what, y, self.classes.weight.device)
            self._check_range(what, y)
        if y1.shape != y2.shape:
            raise ValueError(f"SimLAPLoss: y1 and y2 must be of the same pairs, got {tuple(y1.shape)} and "
                             f"{tuple(y2.shape)}")
        return torch.sigmoid(self.network((self.classes(y1) + self.classes(y2)) / 2))

    def forward(self, z1: Tensor, z2: Tensor, y1: Tensor, y2: Tensor) -> Tensor:
        name, group = "SimLAPLoss", self.process_group
        _check_pairs(name, z1, z2, y1, y2, self.features, group)
        return _contrast(name, z1, z2, self.gate(y1, y2), y1, y2, self.tau, group)

    def _check_range(self, what: str, y: Tensor) -> None:
        if y.is_cpu and len(y) and not torch.compiler.is_compiling() and not transformed():
            low, high = (t.item() for t in y.aminmax())
            if low < 0 or high >= self.num_classes:
                raise ValueError(f"SimLAPLoss: {what} must be labels from 0 to {self.num_classes - 1}, got "
                                 f"{low if low < 0 else high}")

    def extra_repr(self) -> str:
        return f"num_classes={self.num_classes}, features={self.features}, tau={self.tau}, width={self.width}"
