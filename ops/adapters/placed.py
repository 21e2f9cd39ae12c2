"""Where a model's tensors are: in this process, sharded over several, on the meta device, in an offloader's hands.

fully_shard has DTensors between two forwards, and plain tensors whose memory comes and goes around them. accelerate's
offload hooks leave parameters on the meta device and keep their values in a map. DistributedDataParallel averages the
gradients of the parameters that were trainable when it was made, and of no others.
"""
from __future__ import annotations

import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..common import reshard

# These read an attribute to move the parameter that they take it for.
MOVERS = ("accelerate.utils.modeling", "torch.distributed.fsdp._flat_param", "torch.distributed.tensor.parallel.style")


def read_by_a_mover(depth: int = 2) -> bool:
    """Is the property that asks read by one of them? `depth` frames above is who reads."""
    return sys._getframe(depth).f_globals.get("__name__") in MOVERS


def is_sharded(t) -> bool:
    return type(t).__name__ == "DTensor"


def settle(function: str, model: nn.Module) -> None:
    """fully_shard's parameters as they are between two forwards, whatever ran last; raises in `function`'s voice for
    FullyShardedDataParallel, which has none of a layer's own."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not torch.distributed.is_initialized():
        return
    flat = any(isinstance(m, fsdp.FullyShardedDataParallel) for m in model.modules())
    if flat or any(getattr(p, "_fsdp_flattened", False) for p in model.parameters()):
        raise ValueError(f"{function}: FullyShardedDataParallel has flattened the parameters; use "
                         "torch.distributed.fsdp.fully_shard, or call it before the model is wrapped")
    reshard(model)


def refuse_fully_sharded(function: str, model: nn.Module, instead: str) -> None:
    for name, module in model.named_modules():
        owned = any(is_sharded(p) for p in module._parameters.values())
        if owned or any(c.__name__ == "FSDPModule" for c in type(module).__mro__):
            raise ValueError(f"{function}: {name or 'the model'!r} is sharded: {instead}")


def writes(tensors: Iterable[Tensor]) -> bool:
    """Is it this process's part to write a file of these? Of sharded tensors the first process of their mesh writes."""
    meshes = [t.device_mesh for t in tensors if is_sharded(t)]
    return not meshes or not any(meshes[0].get_coordinate() or ())


# ---------------------------------------------------------------------------------------------------------------------
# accelerate
# ---------------------------------------------------------------------------------------------------------------------


def offload_hook(module: nn.Module):
    """accelerate's hook that brings the module's parameters for a forward; None without one."""
    hook = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    return next((h for h in hooks if getattr(h, "offload", False) and h.weights_map is not None), None)


def refuse_blocks(function: str, model: nn.Module) -> None:
    """Raises if accelerate brings a block's parameters as one, by a list that has no place for factors."""
    for name, module in model.named_modules():
        hook = offload_hook(module)
        if hook is not None and hook.place_submodules:
            raise ValueError(f"{function}: {name or 'the model'!r} is offloaded as a block (preload_module_classes): "
                             "put adapters on before that")


def home(module: nn.Module, parameter: Tensor) -> torch.device:
    """The device that a layer computes on with this parameter of its own."""
    hook = offload_hook(module) if parameter.is_meta else None
    return parameter.device if hook is None or hook.execution_device is None else torch.device(hook.execution_device)


def values_of(module: nn.Module, name: str) -> Tensor:
    """A parameter of the module's own, out of the offloader's hands if need be."""
    parameter = module._parameters[name]
    hook = offload_hook(module) if parameter.is_meta else None
    return parameter if hook is None else hook.weights_map[name]


def whole(function: str, model: nn.Module, path: str, t: Tensor) -> Tensor:
    """All values of `t`, which is at `path` in the model: gathered, or out of the offloader's hands."""
    if is_sharded(t):
        return t.full_tensor()
    if not t.is_meta:
        return t
    parts = path.split(".")
    for i in range(len(parts) - 1, -1, -1):  # the hook may be that of a module above
        hook = offload_hook(model.get_submodule(".".join(parts[:i])))
        if hook is not None and ".".join(parts[i:]) in hook.weights_map:
            return hook.weights_map[".".join(parts[i:])]
    raise ValueError(f"{function}: {path!r} is on the meta device and has no values")


def gathered(module: nn.Module) -> nn.Module:
    """The module, or one like it with the whole of its sharded parameters."""
    if not any(map(is_sharded, module._parameters.values())):
        return module
    twin = module._replicate_for_data_parallel()
    twin._parameters = {n: p.full_tensor() if is_sharded(p) else p for n, p in module._parameters.items()}
    return twin


def check_at_hand(function: str, named: Iterable[tuple[str, Tensor]]) -> None:
    for name, t in named:
        if t.is_meta:
            raise ValueError(f"{function}: {name!r} is on the meta device, without values or offloaded; load it, or "
                             "take the hooks off: accelerate.hooks.remove_hook_from_module(model, recurse=True)")


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def like(source: Tensor, place: Tensor) -> Tensor:
    """`source` as it has to be to stand where `place` is: its shard of it, or the whole."""
    if not is_sharded(place):
        return source.full_tensor() if is_sharded(source) else source
    if is_sharded(source):
        return source
    from torch.distributed.tensor import DTensor, Replicate

    mesh = place.device_mesh
    everywhere = DTensor.from_local(source.to(place.device), mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, place.placements)


@torch.no_grad()
def put(place: Tensor, source: Tensor) -> None:
    """Write `source` into `place`."""
    place.copy_(like(source, place))


# ---------------------------------------------------------------------------------------------------------------------
# DistributedDataParallel
# ---------------------------------------------------------------------------------------------------------------------


def several_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def unseen_by_ddp(parameters: Iterable[Tensor]) -> bool | None:
    """In DistributedDataParallel's forward: does one of them need a gradient that won't be averaged? None elsewhere."""
    ddp = nn.parallel.DistributedDataParallel._active_ddp_module
    if ddp is None:
        return None
    reducer, seen = ddp.__dict__.get("tucker_reduced", (None, None))
    if reducer is not ddp.reducer:
        seen = {id(p) for bucket in ddp.reducer._get_zeros_like_grad_buckets() for p in bucket.parameters()}
        ddp.__dict__["tucker_reduced"] = ddp.reducer, seen
    return any(p.requires_grad and id(p) not in seen for p in parameters)


def still_unchecked(function: str, chosen: Iterable[str], parameters: Iterable[Tensor]) -> bool:
    """Once after a switch, in the next forward of DistributedDataParallel: raises in `function`'s voice where gradients
    would not be averaged. False when that has been asked."""
    unseen = unseen_by_ddp(parameters)
    if unseen:
        raise ValueError(f"{function}: {', '.join(chosen)}: chosen after DistributedDataParallel took the parameters, "
                         "so that gradients would not be averaged: choose before, or wrap again")
    return unseen is None
