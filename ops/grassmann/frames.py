"""What frames are: (C, k, n), the k rows of a class orthonormal; or (sum of dims, n) where dimensions differ."""
from __future__ import annotations

import functools
import itertools
import math
import operator
import weakref
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ..common import check_floating, told, whole
from ..ragged import packed, unpack_

RETRACTIONS = ("geodesic", "polar", "qr", "cayley")  # in the order of subspace_retraction, shim/contract/subspace.h
TRANSPORTS = ("project", "parallel")
MANIFOLDS = ("grassmann", "stiefel")


def check_frames(name: str, x: Tensor, weight: Tensor, dims: Iterable[int] | None,
                 what: str = "weight") -> tuple[int, ...] | None:
    """Shapes, dtypes and devices that every op on (x, frames) asks for; raises in `name`'s voice. Returns the dims.

    what: the name of the frames there.
    """
    check_floating(name, "x", x)
    check_floating(name, what, weight)
    if is_sharded(weight) and not is_sharded(x):
        raise TypeError(f"{name}: {what} is sharded over processes, and whole only inside the forward of a module that "
                        "was given to fully_shard: shard the head as well, and tell its other methods by "
                        "torch.distributed.fsdp.register_fsdp_forward_method(head, 'loss')")
    if x.dtype != weight.dtype:
        raise TypeError(f"{name}: x and {what} must share a dtype, got {x.dtype} and {weight.dtype}")
    if x.device != weight.device:
        raise ValueError(f"{name}: x and {what} must be on one device, got {x.device} and {weight.device}")
    if x.dim() < 1:
        raise ValueError(f"{name}: x must be (..., n), got a scalar")
    dims = check_dims(name, weight, dims, what)
    if x.shape[-1] != weight.shape[-1]:
        raise ValueError(f"{name}: x has {x.shape[-1]} features but {what} has {weight.shape[-1]}")
    return dims


def check_dims(name: str, weight: Tensor, dims: Iterable[int] | None, what: str = "weight") -> tuple[int, ...] | None:
    """A weight of frames is (C, k, n) with 0 < k <= n, or (sum of dims, n) with such dims, which are returned."""
    if dims is not None and type(dims) is not tuple:
        dims = as_dims(name, dims)
    if weight.dim() != (3 if dims is None else 2):
        want = "(C, k, n), or 2-D with dims" if dims is None else "(sum of dims, n) with dims"
        raise ValueError(f"{name}: {what} must be {want}, got shape {tuple(weight.shape)}")
    n = weight.shape[-1]
    if dims is None:
        if weight.shape[0] > 0 and not 0 < weight.shape[1] <= n:
            raise ValueError(f"{name}: {what} must have 0 < k <= n, got k={weight.shape[1]}, n={n}")
        return dims
    for c, k in enumerate(dims):
        if type(k) is not int and not torch.compiler.is_compiling():
            return check_dims(name, weight, as_dims(name, dims), what)
        if not 0 < k <= n:
            raise ValueError(f"{name}: need 0 < k <= n, got dims[{c}]={k}, n={n} of {what}")
    if sum(dims) != weight.shape[0]:
        raise ValueError(f"{name}: dims sum to {sum(dims)} but {what} has {weight.shape[0]} rows")
    return dims


def as_dims(name: str, dims: Iterable[int] | None) -> tuple[int, ...] | None:
    """Subspace dimensions as a tuple of ints, from any integers in a row; raises in `name`'s voice."""
    if dims is None:
        return None
    try:
        found = tuple(dims)
        if isinstance(dims, (str, bytes, dict, set)) or any(isinstance(k, bool) for k in found):
            raise TypeError
        symbols = torch.compiler.is_compiling()  # ints may be
        return found if symbols else tuple(int(operator.index(k)) for k in found)
    except TypeError:
        raise TypeError(f"{name}: dims must be a sequence of ints, a subspace dimension each, got {told(dims)}"
                        ) from None


def check_stiefel(name: str, what: str, weight: Tensor) -> None:
    """Points of the Stiefel manifold are (..., k, n) with 0 < k <= n; raises in `name`'s voice."""
    if weight.dim() < 2 or not (0 < weight.shape[-2] <= weight.shape[-1] or 0 in weight.shape[:-2]):
        raise ValueError(f"{name}: {what} on the Stiefel manifold must be (..., k, n) with 0 < k <= n, got shape "
                         f"{tuple(weight.shape)}")


def stacked(t: Tensor, dims: Sequence[int] | None) -> Tensor:
    """(..., k, n) as (C, k, n), in the same memory."""
    return t if dims is not None or t.dim() == 3 else t.view(math.prod(t.shape[:-2]), *t.shape[-2:])


def check_transport(name: str, transport: str, retraction: str, manifold: str) -> None:
    """Parallel transport is along the Grassmannian's geodesics; raises in `name`'s voice."""
    if transport == "parallel" and retraction != "geodesic":
        raise ValueError(f'{name}: transport="parallel" follows geodesics, got retraction={retraction!r}')
    if transport == "parallel" and manifold == "stiefel":
        raise ValueError(f'{name}: transport="parallel" has no closed form for manifold="stiefel": take "project"')


def class_dims(subspace_dim, num_classes: int, in_features: int) -> tuple[int, ...] | None:
    """The checked dimensions of ragged classes, None for a single int."""
    rule = f"GrassmannLinear: subspace_dim must be an int or {num_classes} ints, got {told(subspace_dim)}"
    ragged = isinstance(subspace_dim, Iterable) and getattr(subspace_dim, "ndim", 1) > 0
    if isinstance(subspace_dim, (str, bytes, Mapping, set)):
        raise TypeError(rule)
    try:
        dims = [whole("", "", k, -(1 << 63)) for k in (subspace_dim if ragged else [subspace_dim])]
    except TypeError:
        raise TypeError(rule) from None
    except ValueError:
        raise ValueError(rule) from None
    if ragged and len(dims) != num_classes:
        raise ValueError(f"{rule} ({len(dims)} of them)")
    for k in dims:
        if not 1 <= k <= in_features:
            raise ValueError(f"GrassmannLinear: need 1 <= subspace_dim <= in_features = {in_features}, got {k}")
    return tuple(dims) if ragged else None


# Of a weight that is sharded over processes each one steps the classes that it has; the layer's own methods take all.
def is_sharded(weight: Tensor) -> bool:
    return hasattr(weight, "placements")


def local(t: Tensor) -> Tensor:
    """What this process has of it, in the same memory; under no_grad."""
    return t.to_local() if is_sharded(t) else t


def is_stack(weight: Tensor, dims: Sequence[int] | None) -> bool:
    """Ragged frames that are padded, so that they can be sharded by class?"""
    return dims is not None and is_sharded(weight) and weight.dim() == 3


def own_classes(weight: Tensor) -> range:
    """Those that this process has of a weight that is sharded by class, as torch.chunk cuts."""
    classes, mesh = range(weight.shape[0]), weight.device_mesh
    cuts = [(i, placement) for i, placement in enumerate(weight.placements) if not placement.is_replicate()]
    for i, _ in sorted(cuts, key=lambda cut: hasattr(cut[1], "split_factor")):  # what fully_shard has cut came last
        most = -(-len(classes) // mesh.size(i))
        classes = classes[mesh.get_local_rank(i) * most :][:most]
    return classes


def own_dims(weight: Tensor, dims: tuple[int, ...] | None) -> tuple[int, ...] | None:
    """Of the classes that this process has."""
    if not is_stack(weight, dims):
        return dims
    classes = own_classes(weight)
    return dims[classes.start : classes.stop]


def of_all(weight: Tensor, own: Tensor) -> Tensor:
    """The number that each process that shares a weight has, in a row."""
    from torch.distributed.tensor import DTensor, Shard

    mesh = weight.device_mesh
    return DTensor.from_local(own.reshape(1), mesh, [Shard(0)] * mesh.ndim, run_check=False).full_tensor()


def own_frames(weight: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """What this process has, as a step takes frames: in the same memory, but of a stack a copy, to be put back."""
    return packed(local(weight), own_dims(weight, dims)) if is_stack(weight, dims) else local(weight)


def as_held(t: Tensor, weight: Tensor, dims: tuple[int, ...] | None) -> Tensor:
    """Of an optimiser's state, in the weight's form: the model may have been moved after a step, and processes that
    shared ragged classes out have had stacks."""
    if dims is not None and t.dim() > weight.dim():
        t = packed(t, dims)
    return t if (t.dtype, t.device) == (weight.dtype, weight.device) else t.to(weight.device, weight.dtype)


def put_own(weight: Tensor, frames: Tensor, dims: tuple[int, ...] | None) -> None:
    """What has become of `own_frames(weight, dims)`."""
    if is_stack(weight, dims):
        unpack_(local(weight), frames, own_dims(weight, dims))


def gathered(weight: Tensor) -> Tensor:
    return weight.full_tensor() if is_sharded(weight) else weight


def put(weight: Tensor, frames: Tensor) -> None:
    """weight <- frames that were changed in `gathered(weight)`; of several processes' frames, the first one's."""
    if is_sharded(weight):
        weight.copy_(distributed(frames, weight, 0))


def distributed(frames: Tensor, weight: Tensor, source: int | None = None) -> Tensor:
    """Sharded like the weight, from what the process of rank `source` has, or from what each one has."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(frames, weight.device_mesh, weight.placements, src_data_rank=source)


def per_class(weight: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """(classes,) of zeros, sharded like the weight."""
    if not is_sharded(weight):
        return weight.new_zeros(classes, dtype=dtype)
    own = local(weight)
    zeros = own.new_zeros(own.shape[0] if own.dim() == 3 else classes, dtype=dtype)
    return type(weight).from_local(zeros, weight.device_mesh, weight.placements, run_check=False, shape=(classes,),
                                   stride=(1,))


def starts(dims: Sequence[int] | None, device: torch.device) -> Tensor:
    """First row of each class and one past the last, as the kernels want it; empty for uniform frames."""
    if dims is None:
        return torch.empty(0, dtype=torch.int64, device=device)
    if device.type != "cuda" or torch.compiler.is_compiling():
        return torch.tensor(_first_rows(dims), dtype=torch.int64, device=device)
    with torch.inference_mode(False):  # it may be saved for a backward later
        return _starts(tuple(dims), device)


def _first_rows(dims: Sequence[int]) -> list[int]:
    return [0, *itertools.accumulate(int(k) for k in dims)]


@functools.lru_cache(maxsize=64)  # a copy to the GPU would stall the stream at every call
def _starts(dims: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(_first_rows(dims), dtype=torch.int64, device=device)


# Which tensors are frames, by identity, with their dims and the version at which they were last taken for orthonormal.
# A layer enters its weight: so optimisers know it in any group, and a forward can tell that others have moved it.
_known: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_layers: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def know(weight: Tensor, dims: Sequence[int] | None, manifold: str = "grassmann") -> None:
    """Enter a layer's weight as frames, orthonormal as it is now."""
    _known[weight] = None if dims is None else tuple(dims), _version(weight), manifold


def forget(weight: Tensor) -> None:
    """For now: torch exchanges no tensor that is referred to."""
    _known.pop(weight, None)


def _version(weight: Tensor) -> int:
    return 0 if weight.is_inference() else weight._version  # what inference mode has made counts none


def enter_layer(layer: torch.nn.Module) -> None:
    """Enter a layer itself: some (accelerate, FSDP) put another weight in it without a word."""
    _layers.add(layer)


def is_layer(module: torch.nn.Module) -> bool:
    return module in _layers


def is_known(weight: Tensor) -> bool:
    """Is this the weight of a layer?"""
    if weight not in _known:
        for layer in list(_layers):
            if layer._parameters.get("weight") is weight:
                know(weight, layer.dims)
    return weight in _known


def known_as(weight: Tensor) -> tuple[tuple[int, ...] | None, str]:
    """The dims of a layer's frames, and the manifold."""
    dims, _, manifold = _known[weight]
    return dims, manifold


def dims_at(tensor: Tensor) -> tuple[tuple[int, ...] | None] | None:
    """(dims,) where a layer's frames lie in the memory of `tensor`, such as their detached view; None elsewhere."""
    for weight, (dims, *_) in list(_known.items()):
        if weight.shape == tensor.shape and weight.data_ptr() == tensor.data_ptr():
            return (dims,)
    return None


def moved_by_others(weight: Tensor) -> bool:
    """Has anything but our own steps written to these frames? What does not count versions (`.data`) is not seen."""
    return _known[weight][1] != _version(weight)


def stepped(weights: Sequence[Tensor]) -> None:
    """Our own step was the last to write to these."""
    for weight in weights:
        weight = weight if weight._base is None else weight._base  # some classes of it
        dims, version, manifold = _known.get(weight, (None, None, None))
        if version == _version(weight) - 1:
            _known[weight] = dims, version + 1, manifold
