"""A module's hooks around another forward than its own: what `module(...)` does, but for what it computes."""
from __future__ import annotations

import torch
from torch import nn
from torch.utils.hooks import BackwardHook


def has_hooks(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
                or module._backward_pre_hooks)


def inside_hooks(module: nn.Module, forward, args: tuple, kwargs: dict):
    """`forward` between the hooks of `module`, in the order of `nn.Module.__call__`."""
    for key, hook in tuple(module._forward_pre_hooks.items()):
        if key in module._forward_pre_hooks_with_kwargs:
            changed = hook(module, args, kwargs)
            args, kwargs = (args, kwargs) if changed is None else changed
        else:
            changed = hook(module, args)
            args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
    backward = None
    if module._backward_hooks or module._backward_pre_hooks:
        if module._is_full_backward_hook is False:
            raise ValueError("tucker: register_backward_hook of a wrapped layer is not run; "
                             "use register_full_backward_hook")
        backward = BackwardHook(module, list(module._backward_hooks.values()),
                                list(module._backward_pre_hooks.values()))
        args = backward.setup_input_hook(args)
    result = None
    try:
        result = forward(*args, **kwargs)
    except Exception:
        _run_forward_hooks(module, args, kwargs, result, only_always=True)
        raise
    result = _run_forward_hooks(module, args, kwargs, result)
    return result if backward is None else backward.setup_output_hook(result)


def _run_forward_hooks(module, args, kwargs, result, only_always=False):
    for key, hook in tuple(module._forward_hooks.items()):
        if only_always and key not in module._forward_hooks_always_called:
            continue
        more = (kwargs,) if key in module._forward_hooks_with_kwargs else ()
        changed = hook(module, args, *more, result)
        result = result if changed is None else changed
    return result


def is_hooked_by_accelerate(module: nn.Module) -> bool:
    return "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__


def inside_accelerate(module: nn.Module, forward, args: tuple, kwargs: dict):
    """`forward` where accelerate has brought the parameters of `module` and moved its inputs."""
    hook = module._hf_hook
    args, kwargs = hook.pre_forward(module, *args, **kwargs)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not hook.no_grad):
        result = forward(*args, **kwargs)
    return hook.post_forward(module, result)
