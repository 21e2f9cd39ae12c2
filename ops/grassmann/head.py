"""`swap_head`: give a standard classifier a subspace head in place (arXiv 2308.01547 changes the last layer only).

torchvision, timm and transformers are known by their conventions alone and are never imported.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..common import HALF, check_dense, check_module, told, whole
from . import watch
from .layers import GrassmannLinear, logits_of_layer

__all__ = ["PointwiseGrassmannLinear", "swap_head"]

# Where models keep their classifier, the words for the last layer inside it, and the second classifiers trained on the
# same targets: those of distilled models, and the auxiliary ones of Inception, GoogLeNet, VOLO and segmentation.
HEADS = (
    "fc", "classifier", "head", "heads", "last_linear", "classif", "score", "classification_head", "logits_proj",
    "cls_classifier", "sequence_summary.summary",
)
LAST = ("out_proj", "linear_out", "fc2", "fc", "linear", "head", "l")
SECOND = (
    "head_dist", "dist_head", "distillation_classifier", "classifier_distill", "aux_head", "aux1", "aux2", "AuxLogits",
    "aux_classifier",
)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _channels_last(what: str, t: Tensor) -> Tensor:
    check_dense("PointwiseGrassmannLinear", what, t)
    if t.dim() < 2:
        raise ValueError(f"PointwiseGrassmannLinear: {what} must be (B, channels, *spatial), got {tuple(t.shape)}")
    return t.movedim(1, -1)


def logits_of_pointwise_layer(x: Tensor, weight: Tensor, gamma: float, normalize: bool,
                              dims: tuple[int, ...] | None) -> Tensor:
    """What the layer computes, one call in the graphs of torch.fx."""
    return logits_of_layer(_channels_last("x", x), weight, gamma, normalize, dims).movedim(x.dim() - 1, 1)


torch.fx.wrap("logits_of_pointwise_layer")


class PointwiseGrassmannLinear(GrassmannLinear):
    """`GrassmannLinear` in the place of a 1x1 convolution: maps (B, n, *spatial) to logits (B, C, *spatial)."""

    def forward(self, x: Tensor) -> Tensor:
        if self.class_parallel is not None:
            return super().forward(_channels_last("x", x)).movedim(-1, 1)
        watch.look(self)
        return logits_of_pointwise_layer(x, self.weight, self.gamma, self.normalize, self.dims)

    def loss(self, x: Tensor, target: Tensor, **options) -> Tensor:
        """As `GrassmannLinear.loss`, with x (B, n, *spatial) and target (B, *spatial) or soft (B, C, *spatial)."""
        check_dense("PointwiseGrassmannLinear", "target", target)
        target = _channels_last("target", target) if target.is_floating_point() else target
        return super().loss(_channels_last("x", x), target, **options)


def swap_head(
    model: nn.Module,
    num_classes: int | None = None,
    subspace_dim: int | Sequence[int] = 8,
    *,
    gamma: float | str = "auto",
    normalize: bool = True,
    init: str | tuple[Tensor, Tensor] = "linear",
    name: str | None = None,
) -> nn.Module:
    """Replace a model's classifier by a `GrassmannLinear`; returns the same model, changed in place.

    The classifier of a torchvision, timm or transformers model is found by its conventions, that of another model by
    the same names or because it is the only linear layer or ends a Sequential; for the rest there is `name`. Second
    classifiers that learn the same targets are swapped along: those of distilled models, and the auxiliary ones of
    Inception, GoogLeNet, VOLO and torchvision's segmentation models. A 1x1 convolution becomes a
    `PointwiseGrassmannLinear`.

    The new head keeps the device, the training mode and the dtype of the old one (frames of a half-precision model are
    float32 and the logits keep the model's dtype). As a new layer it is trainable, also in a frozen model; the old
    head's bias and hooks go. What the model says of its number of classes (timm's `num_classes`, transformers'
    `num_labels`) is brought up to date; timm's `pretrained_cfg` still describes the pretrained weights.

    Args:
        model: any `nn.Module`. Swap before the optimiser, `DistributedDataParallel` or `fully_shard` take parameters.
        num_classes: C; None keeps the present number.
        subspace_dim, gamma, normalize: as in `GrassmannLinear`; gamma="auto" goes by the size of the new head.
        init: "linear" starts each class from its present class vector (from its frame when the head is a
            `GrassmannLinear` already) where the number of classes stays the same, and is "random" where it changes;
            "random"; or features and labels (x (N, n), y (N,)) for `init_from_features` of the main classifier, when
            second ones start as with "linear". That warns of few features a class, where random frames are better.
        name: dotted name of the layer to replace, in place of the search.

    Raises:
        TypeError: `model` is not a module, or the layer isn't a Linear, a 1x1 convolution or a GrassmannLinear.
        ValueError: the classifier can't be told (the message names candidates); its weight is tied to another module,
            parametrised, sharded or quantised; an argument is out of range; the model is for several labels at once or
            for regression (transformers' `problem_type`), or has one output: logits of subspaces are never negative.
            Nothing is changed on an error.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> ts.swap_head(model, subspace_dim=2)[2]
        GrassmannLinear(in_features=8, num_classes=3, subspace_dim=2, gamma=3.6, normalize=True)
    """
    check_module("swap_head", model)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ValueError("swap_head: swap the head before DistributedDataParallel takes the parameters")
    if _is_linear(model):
        raise ValueError("swap_head: the model is itself the classifier; use GrassmannLinear.from_linear")
    if num_classes is not None:
        num_classes = whole("swap_head", "num_classes", num_classes, 1)
    if isinstance(init, str) and init not in ("linear", "random"):
        raise ValueError(f'swap_head: init must be "linear", "random" or (x, y), got {init!r}')
    if not isinstance(init, str) and (not isinstance(init, (tuple, list)) or len(init) != 2):
        raise TypeError(f'swap_head: init must be "linear", "random" or (x, y), got {told(init)}')
    if name is not None and not isinstance(name, str):
        raise TypeError(f"swap_head: name must be a module's dotted name or None, got {told(name)}")
    names = _find(model) if name is None else [name]
    if not names:
        why = "it has num_classes=0" if vars(model).get("num_classes") == 0 else _candidates(model)
        raise ValueError(f"swap_head: can't tell the classifier of {type(model).__name__}; {why}")
    olds = [_checked(model, n) for n in names]
    _refuse_signed(model, num_classes if num_classes is not None else _num_classes(olds[0]))
    inits = [init] + ["linear" if not isinstance(init, str) else init] * (len(olds) - 1)
    news = [_new_head(old, num_classes, subspace_dim, gamma, normalize, i) for old, i in zip(olds, inits, strict=True)]
    for n, old, new in zip(names, olds, news, strict=True):
        for parent in list(model.modules()):  # a module may be registered in several places
            for key in [k for k, child in parent._modules.items() if child is old]:
                setattr(parent, key, new)
        _restate(model, n, _num_classes(old), new.num_classes)
    return model


def _refuse_signed(model, count: int) -> None:
    """Lengths of projections are never negative: they can be told from one another, but not each from 0."""
    kind = getattr(getattr(model, "config", None), "problem_type", None)
    if kind in ("multi_label_classification", "regression"):
        raise ValueError(f"swap_head: the model's config says problem_type={kind!r}, and subspace logits are lengths, "
                         "never negative: a sigmoid of one is at least 1/2. They are for one label of several")
    if count == 1:
        raise ValueError("swap_head: num_classes must be 2 or more, got 1: one class has one logit, a length, never "
                         "negative: a sigmoid of it is at least 1/2, and a value to regress may be anything. Take "
                         "num_classes=2 and cross-entropy")


def _num_classes(layer) -> int:
    return layer.out_channels if isinstance(layer, CONVS) else layer.out_features


def _is_linear(module) -> bool:
    if isinstance(module, CONVS):
        one = {*module.kernel_size, *module.stride, module.groups} == {1}
        return one and (module.padding in ("same", "valid") or not any(module.padding))
    return isinstance(module, (nn.Linear, GrassmannLinear))


def _linears(module, size: int | None = None) -> list[str]:
    """Dotted names of the linear layers with `size` outputs (None: any) in a module, itself included as ""."""
    return [n for n, m in module.named_modules() if _is_linear(m) and size in (None, _num_classes(m))]


def _get(model, path: str):
    try:
        return model.get_submodule(path)
    except AttributeError:
        return None


def _last(model, path: str, size: int | None) -> str | None:
    """Name of the classifying layer inside the part of the model at `path`; None when there is none or a doubt."""
    part = _get(model, path)
    inside = _linears(part, size) if part is not None else []
    if isinstance(part, nn.Sequential):
        inside = inside[-1:]
    elif len(inside) > 1:
        inside = [n for word in LAST for n in inside if n.rpartition(".")[2] == word][:1]
    return f"{path}.{inside[0]}".strip(".") if inside else None


def _main(model, size: int | None) -> list[str]:
    """Names of the classifiers whose outputs the model gives, by timm's word for them or by the usual names."""
    known = (getattr(model, "default_cfg", None) or {}).get("classifier") or ()
    known = [_last(model, path, size) for path in ((known,) if isinstance(known, str) else known)]
    usual = [_last(model, path, size) for path in HEADS]
    frames = [n for n, m in model.named_modules() if isinstance(m, GrassmannLinear)]
    known, usual = [n for n in known if n], [n for n in usual if n]
    return known or next((names for names in (usual, frames) if len(names) == 1), [])


def _only(model, size: int | None) -> list[str]:
    """Name of the only linear layer with `size` outputs, or of a Sequential's last."""
    names = _linears(model, size)
    names = names[-1:] if isinstance(model, nn.Sequential) else names
    return names if len(names) == 1 and names[0] else []


def _find(model) -> list[str]:
    """Names of the model's classifiers, the main one first; none when it can't tell."""
    size = getattr(getattr(model, "config", None), "num_labels", None) or vars(model).get("num_classes")
    sizes = [size, None] if size else [] if size == 0 else [None]  # a count may be out of date
    names = next((names for search in (_main, _only) for s in sizes if (names := search(model, s))), [])
    if not names:
        children = list(model.named_children())
        if len(children) == 1:  # a wrapper: torch.compile, DataParallel, transformers' TimmWrapper
            names = [f"{children[0][0]}.{n}" for n in _find(children[0][1])]
        return names
    size = _num_classes(model.get_submodule(names[0]))
    seconds = [_last(model, path, size) for path in SECOND]
    return [*names, *(n for n in seconds if n and n not in names)]


def _candidates(model) -> str:
    names = [n for n in _linears(model) if n]
    if not names:
        return "it has no linear layer"
    names = [n for n in names if not isinstance(model.get_submodule(n), CONVS)] or names
    names = [f"{n!r} ({_num_classes(model.get_submodule(n))} outputs)" for n in names[-8:]]
    return f"give name=, for instance {', '.join(names)}"


def _checked(model, name: str):
    """The layer to replace, once it is sure that it can be."""
    layer = _get(model, name)
    if layer is None:
        raise ValueError(f"swap_head: no module named {name!r}; {_candidates(model)}")
    if not _is_linear(layer):
        kinds = "a Linear, a 1x1 convolution or a GrassmannLinear"
        raise TypeError(f"swap_head: {name!r} is a {type(layer).__name__}, not {kinds}; {_candidates(model)}")
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is None:
        raise ValueError(f"swap_head: the weight of {name!r} is parametrised, as by weight_norm; remove that first")
    if type(weight) is not nn.Parameter:
        raise ValueError(f"swap_head: the weight of {name!r} is a {type(weight).__name__}: lazy, sharded or quantised")
    owners = [n for n, m in model.named_modules() if any(p is weight for p in m.parameters(recurse=False))]
    if len(owners) > 1:
        raise ValueError(f"swap_head: the weight of {name!r} is tied: {owners} share it")
    return layer


def _new_head(old, num_classes, subspace_dim, gamma, normalize, init):
    pointwise = isinstance(old, (*CONVS, PointwiseGrassmannLinear))
    cls = PointwiseGrassmannLinear if pointwise else GrassmannLinear
    n = old.in_channels if isinstance(old, CONVS) else old.in_features
    count = _num_classes(old) if num_classes is None else num_classes
    weight = old.weight
    dtype = torch.float32 if weight.dtype in HALF else weight.dtype
    new = cls._empty(weight.device, n, count, subspace_dim, gamma=gamma, normalize=normalize, dtype=dtype)
    if not isinstance(init, str):
        new.init_from_features(*init)
    elif init == "linear" and new.num_classes == _num_classes(old) and getattr(old, "dims", None) is None:
        new.init_from_vectors(weight if isinstance(old, GrassmannLinear) else weight.flatten(1))
    else:
        new.reset_parameters()
    return new.train(old.training)


def _restate(model, name: str, old: int, new: int) -> None:
    """Bring the number of classes up to date in the model and in the modules that hold the head."""
    if old == new:
        return
    parts = name.split(".")
    for holder in [model, *(model.get_submodule(".".join(parts[:i])) for i in range(1, len(parts)))]:
        config = getattr(holder, "config", None)
        if getattr(config, "num_labels", None) == old:
            config.num_labels = new  # transformers renames id2label and label2id with it
        for key in ("num_classes", "num_labels"):
            if vars(holder).get(key) == old:
                setattr(holder, key, new)
