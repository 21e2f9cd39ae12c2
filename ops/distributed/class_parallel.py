"""Class-parallel heads: the frames' classes are shared out among processes, the features are not.

What Megatron's vocabulary-parallel cross-entropy and Partial-FC (arXiv 2203.15565) are for linear layers, on DTensor.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ParallelStyle

from .. import GrassmannLinear, subspace_logits
from ..common import autocast, check_flag, check_module, check_number, told, transformed, weight_for
from ..ragged import padded
from .loss import Chosen, Gradient, Part

__all__ = ["ClassParallel", "shard_head"]

RATE = (5e-324, 1, "in (0, 1]")
INPUTS = Replicate(), Shard(0)
Module = TypeVar("Module", bound=nn.Module)


class ClassParallel(ParallelStyle):
    """A `GrassmannLinear` whose classes are shared out among the processes of a one-dimensional mesh.

    For `torch.distributed.tensor.parallel.parallelize_module`; `shard_head` does the same by itself. The layer's
    weight becomes a DTensor (C, k, n), `Shard(0)`: each process has C / R classes, uneven ones as `torch.chunk` cuts.
    `loss` sums each process's classes as ever and joins them in two small all-reduces: nowhere are there logits.

    Keyword Args:
        input_layouts: how features (and targets) are given: `Replicate()`, the same ones to all processes (the
            default), or `Shard(0)`, to each its own rows, as many as to any other. The loss is that of all rows.
        output_layouts: what the layer's call returns: `Replicate()`, all logits in each process (the default),
            `Shard(-1)`, those of its own classes, or `Shard(0)`, its share of the rows with all logits.
        use_local_output: whether logits are a plain tensor (the default) or a DTensor.
        sample_rate: in (0, 1]; below 1, in training mode, `loss` takes so many of each process's classes for all, drawn
            anew each time, those of the labels always among them (Partial-FC); at least as many as there are rows.
        sparse_grad: whether the weight's gradient then names those classes alone: `.grad` is a DTensor whose local
            tensor is sparse (C of the process, with k and n dense), which both optimisers step by itself.

    The numbers are those of the layer on one process up to rounding, whatever the options: labels or probabilities,
    class weights, smoothing (over all classes), `ignore_index`, ragged classes. These are held as wide as the largest
    one, with zeros after a class's own rows. All else is DTensor's: optimisers, `torch.distributed.checkpoint`, and
    `fully_shard` over another dimension of the mesh.

    With `input_layouts=Shard(0)` gradients are those of the mean over the processes of what each returns: parameters
    before the head are to be averaged, as DistributedDataParallel and `fully_shard` do; the head's own are ready.

    With `sample_rate` the loss is biased, as the classes left out are missing in its sum of exponentials: too low, by
    up to about log(1 / sample_rate), and with it the pull towards the label's class; nothing is corrected. Smoothing is
    over the classes that stay. One that is left out has a gradient of zero, and goes where momentum, SGD's or Adam's,
    carries it; with `sparse_grad` its momentum waits, as `RiemannianSGD` and `RiemannianAdamW` say. In evaluation mode
    all classes are taken.

    With `sparse_grad` a backward goes through one call of `loss`; several backwards add up. `torch.amp.GradScaler`,
    which float16 needs, and `fully_shard` of the head refuse it, and so does `nn.utils.clip_grad_norm_` where torch has
    no norm of a sparse tensor (2.11). Under `torch.compile` the gradient is dense.

    Raises:
        TypeError, ValueError: a module other than a `GrassmannLinear`, one whose weight is sharded already, a mesh of
            several dimensions, layouts of another kind, a rate out of range, sparse_grad without a rate below 1.

    Source: arXiv 2308.01547 for the layer, arXiv 1909.08053 for the merge, arXiv 2203.15565 for sampling.

    Example:
        >>> import torch.distributed as dist
        >>> from torch.distributed.tensor.parallel import parallelize_module
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> model = torch.nn.ModuleDict({"body": torch.nn.Linear(6, 16), "head": ts.GrassmannLinear(16, 5, 3)})
        >>> model = parallelize_module(model, mesh, {"head": ts.distributed.ClassParallel()})
        >>> features, labels = model["body"](torch.randn(8, 6)), torch.randint(5, (8,))
        >>> model["head"].loss(features, labels, label_smoothing=0.1).backward()
        >>> model["head"].weight.placements, model["head"].weight.grad.shape
        ((Shard(dim=0),), torch.Size([5, 3, 16]))
        >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        *,
        input_layouts: Placement | None = None,
        output_layouts: Placement | None = None,
        use_local_output: bool = True,
        sample_rate: float = 1.0,
        sparse_grad: bool = False,
    ) -> None:
        super().__init__()
        self.input_layouts = layout("ClassParallel", "input_layouts", input_layouts, INPUTS)
        self.output_layouts = layout("ClassParallel", "output_layouts", output_layouts,
                                     (Replicate(), Shard(-1), Shard(0)))
        check_flag("ClassParallel", "use_local_output", use_local_output)
        check_number("ClassParallel", "sample_rate", sample_rate, RATE)
        check_flag("ClassParallel", "sparse_grad", sparse_grad)
        if sparse_grad and sample_rate == 1:
            raise ValueError("ClassParallel: sparse_grad=True needs a sample_rate below 1, got 1: the loss over all "
                             "classes has a gradient of each")
        self.use_local_output = bool(use_local_output)
        self.sample_rate = float(sample_rate)
        self.sparse_grad = bool(sparse_grad)

    def __repr__(self) -> str:
        return (f"ClassParallel(input_layouts={self.input_layouts!r}, output_layouts={self.output_layouts!r}, "
                f"use_local_output={self.use_local_output}, sample_rate={self.sample_rate:g}, "
                f"sparse_grad={self.sparse_grad})")

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        check_head("ClassParallel", module, device_mesh)
        weight = module.weight
        frames = weight.detach() if module.dims is None else padded(weight.detach(), module.dims)
        shards = distribute_tensor(frames, device_mesh, [Shard(0)], src_data_rank=self.src_data_rank)
        module.weight = nn.Parameter(shards, requires_grad=weight.requires_grad)
        module.class_parallel = self
        return module

    def enter(self, head: GrassmannLinear, x: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor, Part]:
        """For the head's loss: all features and targets, the process's own frames, and what these are a part of."""
        x, weight, mesh = self._inputs(head, x)
        if isinstance(target, DTensor):
            target = target.full_tensor()
        elif isinstance(target, Tensor) and self.input_layouts.is_shard():
            target = DTensor.from_local(target, mesh, [self.input_layouts], run_check=False).full_tensor()
        part = Part(mesh, head.num_classes)
        if head.training and self.sample_rate < 1 and isinstance(target, Tensor):
            if target.is_floating_point():
                raise ValueError("ClassParallel: sample_rate is for labels, got probabilities as target: with a "
                                 "sample_rate below 1 classes that they name are left out")
            if target.dtype == torch.int64 and target.device == weight.device:  # others the loss refuses
                weight = self._chosen(head, weight, part.sample(self.sample_rate, target))
        x, weight = autocast(x, weight)  # what stays alone is rounded, and not held twice
        return x, weight_for(x, weight), target, part

    def _chosen(self, head: GrassmannLinear, weight: Tensor, kept: Tensor) -> Tensor:
        """Frames of the classes that stay."""
        if not self.sparse_grad or torch.compiler.is_compiling():
            return weight.index_select(0, kept)
        if getattr(head, "_is_fsdp_managed_module", False):
            raise RuntimeError("ClassParallel: sparse_grad is for heads that are not under fully_shard, which sums "
                               "dense gradients alone")
        return Chosen.apply(head.weight, kept)

    def logits(self, head: GrassmannLinear, x: Tensor) -> Tensor:
        """What the head's call returns."""
        x, weight, mesh = self._inputs(head, x)
        own = subspace_logits(x, weight_for(x, weight), gamma=head.gamma, normalize=head.normalize)
        shape = (*x.shape[:-1], head.num_classes)
        stride = torch.empty(shape, device="meta").stride()
        logits = DTensor.from_local(own, mesh, [Shard(own.dim() - 1)], run_check=False, shape=shape, stride=stride)
        logits = logits.redistribute(placements=[self.output_layouts])
        if not self.use_local_output:
            return logits
        by_rows = self.output_layouts == Shard(0) and own.dim() > 1
        return Gradient.apply(logits.to_local(), 1 / mesh.size()) if by_rows else logits.to_local()

    def _inputs(self, head: GrassmannLinear, x: Tensor) -> tuple[Tensor, Tensor, DeviceMesh]:
        """All features, whose gradients all processes add up, the process's own frames, and the mesh of these."""
        weight = head.weight
        if not isinstance(weight, DTensor) or weight.device_mesh.ndim != 1 or not weight.placements[0].is_shard(0):
            where = f"{weight.placements} of {weight.device_mesh}" if isinstance(weight, DTensor) else told(weight)
            raise ValueError("ClassParallel: the head's weight must be sharded by class along one dimension of a mesh; "
                             "outside the forward of fully_shard it isn't, unless its other methods are told by "
                             f"torch.distributed.fsdp.register_fsdp_forward_method(head, 'loss'). Got {where}")
        if transformed():
            raise RuntimeError("ClassParallel: classes on several processes take no part in torch.func's transforms, "
                               "forward-mode derivatives and traces")
        mesh = weight.device_mesh
        if not isinstance(x, Tensor):
            raise TypeError(f"ClassParallel: x must be a tensor, got {told(x)}")
        if not isinstance(x, DTensor):
            x = Gradient.apply(x, mesh.size() if self.input_layouts.is_shard() else 1)
            x = DTensor.from_local(x, mesh, [self.input_layouts], run_check=False)
        x = x.redistribute(placements=[Replicate()]).to_local(grad_placements=[Partial()])
        return x, Gradient.apply(weight.to_local(), 1), mesh


def layout(name: str, what: str, given: Placement | None, known: tuple[Placement, ...]) -> Placement:
    """One of those that are known, by default the first; raises in `name`'s voice."""
    if given is None:
        return known[0]
    if not isinstance(given, Placement) or given not in known:
        error = ValueError if isinstance(given, Placement) else TypeError
        raise error(f"{name}: {what} must be one of {', '.join(map(repr, known))}, got {told(given)}")
    return given


def check_head(name: str, head: object, mesh: object) -> None:
    """Raises in `name`'s voice unless the classes of the head can be shared out among the mesh."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"{name}: mesh must be a DeviceMesh, got {told(mesh)}")
    if mesh.ndim != 1:
        raise ValueError(f"{name}: mesh must have one dimension, got {mesh}: take one of it, as in mesh['classes']")
    if not isinstance(head, GrassmannLinear):
        raise TypeError(f"{name}: classes are those of a GrassmannLinear, got {told(type(head))}")
    if head.class_parallel is not None or type(head.weight) is not nn.Parameter:
        raise ValueError(f"{name}: the head's weight must be a parameter that is whole, got {told(head.weight)}: share "
                         "classes out first of all, before fully_shard and optimisers")


def shard_head(
    model: Module,
    mesh: DeviceMesh,
    *,
    input_layouts: Placement | None = None,
    output_layouts: Placement | None = None,
    use_local_output: bool = True,
    sample_rate: float = 1.0,
    sparse_grad: bool = False,
) -> Module:
    """Share the classes of each `GrassmannLinear` of a model out among the processes of a mesh; returns the model.

    `parallelize_module` with `ClassParallel` for every head, wherever it stands. All processes of the mesh call it,
    before the optimiser is made; the frames of the first one count.

    Args:
        model: a module, changed in place; or the head itself.
        mesh: a `DeviceMesh` of one dimension, such as `mesh["classes"]` of a larger one, over whose other dimension
            `fully_shard` can then be applied.
        input_layouts, output_layouts, use_local_output, sample_rate, sparse_grad: as for `ClassParallel`.

    Raises:
        TypeError, ValueError: as `ClassParallel`; no head in the model. Nothing is changed then.

    Example:
        >>> import torch.distributed as dist
        >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 16), ts.GrassmannLinear(16, 5, 3))
        >>> mesh = dist.init_device_mesh("cpu", (1,))
        >>> model = ts.distributed.shard_head(model, mesh, sample_rate=0.5, sparse_grad=True)
        >>> opt = ts.RiemannianSGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model[1].loss(model[0](torch.randn(8, 6)), torch.randint(5, (8,))).backward()
        >>> opt.step()
        >>> model[1].frame_error().item() < 1e-5
        True
        >>> dist.destroy_process_group()
    """
    check_module("shard_head", model)
    style = ClassParallel(input_layouts=input_layouts, output_layouts=output_layouts,
                          use_local_output=use_local_output, sample_rate=sample_rate, sparse_grad=sparse_grad)
    heads = [module for module in model.modules() if isinstance(module, GrassmannLinear)]
    if not heads:
        raise ValueError("shard_head: model must have a GrassmannLinear; swap_head puts one in")
    for head in heads:
        check_head("shard_head", head, mesh)
    for head in heads:
        style._apply(head, mesh)
    return model
