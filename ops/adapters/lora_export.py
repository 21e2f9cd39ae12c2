"""Tucker adapters as ordinary LoRA checkpoints of peft: U G V has B = U G and A = V. See lora.py."""
from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common import check_module
from ..files import check_path, write_bytes, write_whole
from ..tucker.tucker import tucker_compose
from .adapted import CONVS, is_conv1d_of_transformers
from .lora import CONFIG, PREFIX, WEIGHTS, targets_of
from .parameters import is_stacked
from .placed import check_at_hand, refuse_fully_sharded, settle
from .state import adapter_names, check_shapes, layers, refuse_merged, refuse_replaced, saved_tensors, unwrapped


def export_lora(model: nn.Module, path: str | os.PathLike[str], name: str = "default") -> None:
    """Write a Tucker adapter as a LoRA checkpoint of peft with the same change: B = U G, A = V, alpha = scale · r.

    Args:
        model: one that `torch_subspace.adapt` or peft with the method `tucker` has adapted.
        path: the folder to write; made if it isn't there.
        name: of the adapter.

    Raises:
        ValueError: there is no such adapter, or peft's LoRA can't say the same: transposed, grouped and dilated
            convolutions, padding modes other than zeros, attention's joint projections, numbers that are not finite.
            Nothing is written then.

    Example:
        >>> import os, tempfile
        >>> from torch_subspace.peft import export_lora
        >>> path = tempfile.mkdtemp()
        >>> export_lora(ts.adapt(torch.nn.Sequential(torch.nn.Linear(6, 8)), ts.TuckerConfig(rank=2)), path)
        >>> sorted(os.listdir(path))
        ['adapter_config.json', 'adapter_model.safetensors']
    """
    check_module("export_lora", model)
    check_path("export_lora", path)
    if not isinstance(name, str):
        raise ValueError(f"export_lora: name must be that of an adapter, got {name!r}")
    settle("export_lora", model)
    refuse_fully_sharded("export_lora", model, "save the adapter, load it into a plain model, and export that")
    found, saved = _parts(model, name)
    check_at_hand("export_lora", ((key, p) for key, (_, _, part) in found.items() for p in part.parameters()))
    tensors, ranks, alphas = {}, {}, {}
    for key, (module, scale, part) in found.items():
        a, b = _from_tucker(key, module, part)
        if not math.isfinite(scale) or not all(torch.isfinite(t).all() for t in (a, b)):
            raise ValueError(f"export_lora: the change of {key!r} by {name!r} is not finite (NaN or infinity)")
        ranks[key], alphas[key] = len(a), _alpha(scale, len(a))
        form = "lora_embedding_{}" if isinstance(module, nn.Embedding) else "lora_{}.weight"
        tensors |= {f"{PREFIX}{key}.{form.format(n)}": t for n, t in (("A", a), ("B", b))}
    tensors |= {f"{PREFIX}{key}.{n}": t for key, state in saved.items() for n, t in state.items()}
    names = [n.removeprefix(PREFIX) for n, m in unwrapped(model).named_modules()]
    (r, _), (alpha, _) = Counter(ranks.values()).most_common(1)[0], Counter(alphas.values()).most_common(1)[0]
    config = {
        "peft_type": "LORA", "r": r, "lora_alpha": alpha, "bias": "none", "inference_mode": True,
        "lora_dropout": max(part.dropout for _, _, part in found.values()),
        "fan_in_fan_out": any(is_conv1d_of_transformers(module) for module, _, _ in found.values()),
        "rank_pattern": {"^" + re.escape(k): n for k, n in ranks.items() if n != r},
        "alpha_pattern": {"^" + re.escape(k): n for k, n in alphas.items() if n != alpha},
        "target_modules": targets_of(found, names), "modules_to_save": list(saved) or None,
        "base_model_name_or_path": getattr(model, "name_or_path", None) or None,
    }
    task = getattr(getattr(model, "peft_config", {}).get(name), "task_type", None)
    config["task_type"] = getattr(task, "value", task)
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / WEIGHTS, tensors, {"format": "pt"})
    write_bytes(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True).encode())


def _parts(model, name):
    """{layer: (module, scale, factors)} and the tensors of saved modules, of peft's adapter or of ours."""
    stacked = [n.removeprefix(PREFIX) for n, m in model.named_modules()
               if name in getattr(m, "tucker_parts", ()) and hasattr(m.tucker_parts[name], "changes")]
    if stacked:
        raise ValueError(f"export_lora: {stacked[0]!r} has adapted parameters, which no LoRA of peft's layers says")
    peft_layers = {n.removeprefix(PREFIX): m for n, m in model.named_modules() if hasattr(m, "tucker_parts")}
    if peft_layers:
        found = {n: (m.base_layer, m.scaling[name], m.tucker_parts[name]) for n, m in peft_layers.items()
                 if name in m.tucker_parts}
        saved = {n.removeprefix(PREFIX): m.modules_to_save[name].state_dict() for n, m in model.named_modules()
                 if isinstance(getattr(m, "modules_to_save", None), nn.ModuleDict) and name in m.modules_to_save}
        known = sorted({a for m in peft_layers.values() for a in m.tucker_parts})
    else:
        refuse_merged("export_lora", model)
        refuse_replaced("export_lora", model)
        check_shapes("export_lora", layers(model))
        found, known = {}, adapter_names(model)
        for n, m in layers(model).items():
            parts = dict(m.tucker[name].items()) if name in m.tucker else {}
            if parts and any(is_stacked(m, p) for p in parts):
                raise ValueError(f"export_lora: {n!r} has adapted parameters, which no LoRA of peft's layers says")
            if parts and set(parts) != {"weight"}:
                raise ValueError(f"export_lora: {n!r} has joint projections, which a LoRA of peft can't adapt alone")
            if parts:
                found[n] = (m, parts["weight"].scale, parts["weight"])
        saved = saved_tensors(model, name)
    if not found:
        raise ValueError(f"export_lora: no adapter {name!r}; there are {known}")
    return found, saved


@torch.no_grad()
def _from_tucker(key, module, part) -> tuple[Tensor, Tensor]:
    """A and B of one layer."""
    core, factors = part()
    if len(factors) == 2:
        u, v = factors
        if isinstance(module, nn.Embedding) or is_conv1d_of_transformers(module):  # their weights are (in, out)
            (v, u), core = factors, core.mT
        if core.shape[1] <= core.shape[0]:  # the core goes to the side that leaves the smaller rank
            u = (u.double() @ core.double()).to(core.dtype)
        else:
            v = (v.double() @ core.mT.double()).to(core.dtype)
        return v.mT, u
    odd = [f"{n}={getattr(module, n)!r}" for n, plain in (("groups", 1), ("padding_mode", "zeros"), ("dilation", None))
           if (set(getattr(module, n)) != {1} if plain is None else getattr(module, n) != plain)]
    if odd or not isinstance(module, CONVS):
        what = " with ".join([type(module).__name__, *odd[:1]])
        raise ValueError(f"export_lora: {key!r} is a {what}, for which peft's LoRA computes something else")
    u = torch.eye(len(core), dtype=core.dtype, device=core.device) if factors[0] is None else factors[0]
    return tucker_compose(core, [None, *factors[1:]]), u.reshape(*u.shape, *[1] * (len(factors) - 2))


def _alpha(scale: float, r: int) -> float:
    """The alpha for which alpha / r is the scale, to the bit where there is one."""
    alpha = scale * r
    near = [alpha, math.nextafter(alpha, math.inf), math.nextafter(alpha, -math.inf)]
    alpha = next((a for a in near if a / r == scale), alpha)
    return int(alpha) if alpha == int(alpha) else alpha
