"""Groups of frames: built from a model, checked, and the numbers Adam needs of each class.

A parameter group with `manifold="grassmann"` holds frames: (C, k, n) weights, or (Σdims, n) with a `dims` entry. One
with `manifold="stiefel"` holds frames whose rows themselves count: these, or any (..., k, n).
"""

import fnmatch
import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..common import (
    FINITE,
    NOT_NEGATIVE,
    WIDE,
    check_betas,
    check_flag,
    check_module,
    check_rate,
    check_word,
    reshard,
    told,
)
from .frames import (
    MANIFOLDS,
    RETRACTIONS,
    TRANSPORTS,
    check_stiefel,
    check_transport,
    is_known,
    is_layer,
    is_sharded,
    is_stack,
    known_as,
)


def param_groups(
    model: nn.Module,
    *,
    lr: float | Tensor | None = None,
    weight_decay: float | Tensor | None = None,
    frame_lr_factor: float = 1.0,
    no_decay: str | Iterable[str] = (),
) -> list[dict[str, Any]]:
    """Split the parameters of `model` into groups that any of this package's optimisers takes.

    Args:
        model: a module; each parameter is listed once, shared or not, trainable or not.
        lr: learning rate to write into the groups, for wrappers that fill in rates before the optimiser sees the groups
            (ZeroRedundancyOptimizer); by default they take the optimiser's own when they are added.
        weight_decay: weight decay of the Euclidean parameters; by default the optimiser's own. Frames have none: a
            subspace has no length.
        frame_lr_factor: the frames' learning rate as a multiple of `lr`.
        no_decay: shell-style patterns of parameter names without weight decay, such as `("*.bias", "*norm*")`.

    Returns:
        A list of dicts with the Euclidean parameters, those without decay, then the weights of every `GrassmannLinear`,
        a group per `dims`, then the bases of modules such as `SubspacePatch`. Empty groups are left out.

    Raises:
        TypeError: `model` is no module, or a number is of another kind.
        ValueError: a number is negative or not finite.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), ts.GrassmannLinear(8, 4, subspace_dim=2))
        >>> groups = ts.param_groups(model, weight_decay=1e-4, no_decay="*.bias")
        >>> [(group.get("manifold"), group.get("weight_decay"), len(group["params"])) for group in groups]
        [(None, 0.0001, 1), (None, 0.0, 1), ('grassmann', 0.0, 1)]
    """
    from .layers import GrassmannLinear  # here, since layers may use what is above
    from .stiefel import StiefelModule

    check_module("param_groups", model)
    for what, value in (("frame_lr_factor", frame_lr_factor), ("weight_decay", weight_decay), ("lr", lr)):
        if value is not None or what == "frame_lr_factor":
            check_rate("param_groups", what, value)
    if not isinstance(no_decay, Iterable) or isinstance(no_decay, bytes):
        raise TypeError(f"param_groups: no_decay must be a pattern or several, got {told(no_decay)}")
    no_decay = (no_decay,) if isinstance(no_decay, str) else tuple(no_decay)
    for pattern in no_decay:
        if not isinstance(pattern, str):
            raise TypeError(f"param_groups: no_decay must hold strings, got {told(pattern)}")
    reshard(model)
    frames = {}  # dims -> weights
    for name, module in model.named_modules():
        if isinstance(module, GrassmannLinear):
            if not isinstance(module.weight, nn.Parameter):
                raise ValueError(
                    f"param_groups: the weight of {name or 'the model'!r}, a {type(module).__name__}, is made of other "
                    "parameters, as by prune or weight_norm: frames can't be masked or rescaled, remove that first"
                )
            dims = getattr(module, "dims", None)
            frames.setdefault(None if dims is None else tuple(dims), {})[module.weight] = None
    bases = dict.fromkeys(module.basis for module in model.modules() if isinstance(module, StiefelModule))
    taken = {p for weights in (*frames.values(), bases) for p in weights}
    plain = [(name, p) for name, p in model.named_parameters() if p not in taken]
    exempt = {p for name, p in plain if any(fnmatch.fnmatchcase(name, pattern) for pattern in no_decay)}
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups = [
        {"params": [p for _, p in plain if p not in exempt], **decay},
        {"params": [p for _, p in plain if p in exempt], "weight_decay": 0.0},
    ]
    for dims, weights in frames.items():
        group = {"params": list(weights), "weight_decay": 0.0, "manifold": "grassmann", "lr_factor": frame_lr_factor}
        groups.append(group if dims is None else group | {"dims": dims})
    groups.append({"params": list(bases), "weight_decay": 0.0, "manifold": "stiefel", "lr_factor": frame_lr_factor})
    if lr is not None:
        for group in groups:
            group["lr"] = lr * frame_lr_factor if is_frames(group) else lr
    return [group for group in groups if group["params"]]


def is_frames(group):
    return group.get("manifold", "euclidean") != "euclidean"


def enter_frames(name, group):
    """Note which parameters of a Euclidean group are a layer's frames: `frames`, dims, places in `params` and manifold
    of each kind."""
    check_not_flat(name, group["params"])
    found = [] if is_frames(group) else [(i, known_as(p)) for i, p in enumerate(group["params"]) if is_known(p)]
    if found:
        parts = partition(found, key=lambda item: item[1])
        group["frames"] = [(dims, [i for i, _ in part], manifold) for (dims, manifold), part in parts]


def parts_of(group):
    """The group, then the frames that stand in it as groups of their own."""
    yield group
    for dims, places, manifold in group.get("frames", ()):
        part = group | {"params": [group["params"][i] for i in places], "manifold": manifold, "weight_decay": 0.0}
        yield part if dims is None else part | {"dims": dims}


RATES = {"lr": NOT_NEGATIVE, "momentum": NOT_NEGATIVE, "weight_decay": NOT_NEGATIVE, "eps": NOT_NEGATIVE,
         "lr_factor": NOT_NEGATIVE, "dampening": FINITE}
WORDS = {"manifold": ("euclidean", *MANIFOLDS), "retraction": RETRACTIONS, "transport": TRANSPORTS}
FLAGS = ("nesterov", "maximize", "amsgrad", "differentiable", "capturable")


def check_values(name, options):
    """What a group says, or an optimiser's arguments; raises in `name`'s voice."""
    if not isinstance(options["params"], Iterable):
        raise TypeError(f"{name}: params must be tensors or dicts, got {told(options['params'])}")
    for key, value in options.items():
        if key in RATES:
            check_rate(name, key, value, RATES[key])
        elif key in FLAGS or key in ("foreach", "fused") and value is not None:
            check_flag(name, key, value)
        elif key in WORDS:
            check_word(name, key, value, WORDS[key])
    check_betas(name, options.get("betas", (0.9, 0.9)))


def check_group(name, group):
    """Raises in `name`'s voice unless the group is Euclidean or can be stepped on its manifold."""
    if not is_frames(group):
        return
    check_transport(name, group["transport"], group["retraction"], group["manifold"])
    if group.get("differentiable"):
        raise ValueError(f"{name}: frames are stepped in place: differentiable=True is for Euclidean groups only")
    dims = group.get("dims")
    for p in group["params"]:
        check_shards(name, p, dims)
        shape = tuple(p.shape)
        if p.dtype not in WIDE:
            raise TypeError(
                f"{name}: frames in params must be float32 or float64, got {p.dtype}: half precision cannot hold an "
                "orthonormal frame; "
                "keep float32 master weights and run the model under torch.autocast"
            )
        if dims is None and group["manifold"] == "stiefel":
            check_stiefel(name, "frames in params", p)
        elif dims is None and not (p.dim() == 3 and 0 < p.shape[1] <= p.shape[2]):
            raise ValueError(f"{name}: frames in params without dims must be (C, k, n) with 0 < k <= n, got {shape}")
        if is_stack(p, dims):
            if len(dims) != shape[0] or max(dims, default=0) != shape[1]:
                raise ValueError(f"{name}: frames in params with dims {dims} that are sharded by class must be "
                                 f"(C, largest of dims, n), got {shape}")
        elif dims is not None and not (p.dim() == 2 and sum(dims) == shape[0] and all(0 < k <= shape[1] for k in dims)):
            raise ValueError(f"{name}: frames in params with dims {dims} must be (sum of dims, n) with 0 < dims <= n, "
                             f"got {shape}")


def check_not_flat(name, params):
    """Raises where FullyShardedDataParallel has made a layer's frames a part of a vector."""
    for p in params:
        inside = any(is_layer(info.module) for info in getattr(p, "_param_infos", ()))
        if inside or (getattr(p, "_fsdp_flattened", False) and p.dim() == 1 and is_known(p)):
            raise ValueError(f"{name}: FullyShardedDataParallel has flattened frames, which are none any more: take "
                             "torch.distributed.fsdp.fully_shard, or keep them whole by ignored_states=[head.weight] "
                             "and average their gradient yourself")


def check_shards(name, p, dims):
    """Raises where the classes of a sharded weight are not whole."""
    if not is_sharded(p):
        return
    cut = [i for i, placement in enumerate(p.placements) if p.device_mesh.size(i) > 1 and not placement.is_replicate()]
    if dims is None and cut and p.dim() != 3:
        raise ValueError(f"{name}: frames that are sharded must be (C, k, n), got {tuple(p.shape)}, cut within "
                         "a frame: keep it whole")
    if dims is not None and cut and p.dim() == 2:
        raise ValueError(
            f"{name}: frames with dims are cut within classes where they are sharded: cut them between classes before, "
            "by torch_subspace.distributed.shard_head, take one subspace_dim for all classes, or keep them whole by "
            "fully_shard(..., ignored_params={head.weight}) and average their gradient yourself"
        )
    if not all(getattr(p.placements[i], "dim", None) == 0 for i in cut):  # what fully_shard makes of a shard is none
        raise ValueError(f"{name}: frames must be sharded by class, along dimension 0, got {p.placements}")


def scalar(lr):
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def partition(items, key):
    parts = {}
    for item in items:
        parts.setdefault(key(item), []).append(item)
    return parts.items()


def class_blocks(tensor, dims):
    """The classes of a weight as stacks of equal k: pairs of class numbers and a (m, k, n) tensor."""
    if dims is None:
        return [(range(tensor.shape[0]), tensor)]
    blocks = tensor.split(dims)
    return [
        (numbers, torch.stack([blocks[c] for c in numbers]))
        for _, numbers in partition(range(len(dims)), key=dims.__getitem__)
    ]


PIECE = 1 << 24  # entries


def pieces(dims, frames, per_class):
    """Frames and tensors like them, and tensors with an entry a class, by pieces of classes: of each its dims and part.

    What a step makes beside them is held for a piece at a time, of PIECE entries or a 64th of all.
    """
    first, *_ = frames
    count = min(64, -(-first.numel() // PIECE))
    if count <= 1:
        yield dims, frames, per_class
        return
    classes = first.shape[0] if dims is None else len(dims)
    ends = range(classes + 1) if dims is None else [0, *itertools.accumulate(dims)]
    size = -(-classes // count)
    for i in range(0, classes, size):
        j = min(classes, i + size)
        yield (None if dims is None else dims[i:j], [t[ends[i] : ends[j]] for t in frames],
               [None if t is None else t[i:j] for t in per_class])


def horizontal_gradient(weight, grad, dims=None, manifold="grassmann"):
    """D = G - (G Wᵀ) W, shaped like G, and ||D||² / (k n) of every class, (C,) in float64; the symmetric part of G Wᵀ
    alone on the Stiefel manifold.

    A rotation of the frame leaves the second as it is. It is never below what the rounding of G can account for: else a
    gradient that lies within the subspace would have its rounding errors blown up to a full step.
    """
    if dims == ():  # a process without classes
        return grad, grad.new_zeros(0, dtype=torch.float64)
    horizontal, squares = {}, {}
    with torch.autocast(weight.device.type, enabled=False):
        for (classes, w), (_, g) in zip(class_blocks(weight, dims), class_blocks(grad, dims), strict=True):
            inner = g @ w.mT
            d = torch.baddbmm(g, inner if manifold == "grassmann" else (inner + inner.mT) / 2, w, alpha=-1)
            square, whole = (torch.linalg.vector_norm(t, dim=(1, 2), dtype=torch.float64).square() for t in (d, g))
            square = torch.maximum(square, torch.finfo(w.dtype).eps * whole) / max(1, w[:1].numel())
            if dims is None:
                return d, square
            horizontal.update(zip(classes, d.unbind(), strict=True))
            squares.update(zip(classes, square.unbind(), strict=True))
    order = range(len(dims))
    return torch.cat([horizontal[c] for c in order]), torch.stack([squares[c] for c in order])


def adam_rates(square, step, mean, peak, *, lr, betas, eps):
    """Adam's step size of every class, (C,) in float64; moves `step`, the mean of `square` and its `peak` (or None) on.

    A class whose `square` is not finite stays as it was, like its frame. Bias corrections are taken in float64, since
    1 - beta2 has lost three digits in float32.
    """
    finite = square.isfinite()
    beta1, beta2 = betas
    step.add_(finite)
    mean.copy_(torch.where(finite, beta2 * mean + (1 - beta2) * square, mean).clamp_(max=torch.finfo(mean.dtype).max))
    top = mean if peak is None else torch.maximum(peak, mean, out=peak)
    t = step.double().clamp_(min=1)
    return lr / ((1 - beta1**t) * ((top.double() / (1 - beta2**t)).sqrt() + eps))
