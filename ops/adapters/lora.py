"""Ordinary LoRA checkpoints (adapter_model.safetensors and adapter_config.json) as Tucker adapters.

A LoRA of a linear layer, ΔW = s B A, is the Tucker form with core G = I, U = B and V = A. A convolution's, where A has
the kernel and B is 1 x 1, has core A and one factor, B, on the output mode. Scales carry over as
alpha / r. The other way is in lora_export.py. peft itself is imported only when a model is wrapped by it.
"""
from __future__ import annotations

import contextlib
import functools
import inspect
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..common import check_flag, check_module, told
from .adapted import CONVS, is_conv1d_of_transformers, is_packed
from .config import TuckerConfig
from .files import put_adapter
from .names import places
from .placed import settle
from .state import check_new_name, refuse_merged, unwrapped
from .targets import has_kind, weights_of

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal", None)  # the others change the base weights
REFUSED = ("use_dora", "lora_bias", "target_parameters", "layer_replication", "trainable_token_indices",
           "alora_invocation_tokens", "use_qalora", "megatron_config")

Source = str | os.PathLike[str] | tuple[Mapping[str, Tensor], Mapping[str, Any] | Any]  # the Any has `to_dict`


def import_lora(model: nn.Module, source: Source, name: str = "default", *, standalone: bool = False) -> nn.Module:
    """Put a LoRA checkpoint on a model as a Tucker adapter with the same change, ready to be trained on.

    Where the checkpoint has base weights too, as peft adds them for embeddings and heads that are adapted or resized,
    and they aren't the model's: a layer with a LoRA takes them over, any other becomes a saved module. A model of
    transformers with another vocabulary is resized to the checkpoint's.

    Args:
        model: a plain model, or a `PeftModel` with Tucker adapters, which gets one more.
        source: folder of a peft LoRA adapter; or (state_dict, config) with the names that peft saves.
        name: of the adapter.
        standalone: put it on as `torch_subspace.adapt` does, without peft. Otherwise a plain model is wrapped.

    Returns:
        the `PeftModel`, or with `standalone` the model itself.

    Raises:
        FileNotFoundError: no such checkpoint.
        ValueError: it isn't an ordinary LoRA (DoRA, biases, starts that change the base weights, LoRA of single
            parameters), it doesn't fit the model, or a layer is a grouped convolution, where peft's LoRA is no change
            of the weight. The model is then as it was.

    Example:
        >>> import copy, peft, tempfile
        >>> from torch_subspace.peft import import_lora
        >>> plain, x = torch.nn.Sequential(torch.nn.Linear(6, 8)), torch.randn(4, 6)
        >>> config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        >>> lora = peft.get_peft_model(copy.deepcopy(plain), config)
        >>> path = tempfile.mkdtemp()
        >>> lora.save_pretrained(path)
        >>> model = import_lora(plain, path, standalone=True)
        >>> torch.allclose(model(x), lora(x), atol=1e-5)
        True
    """
    check_module("import_lora", model)
    check_flag("import_lora", "standalone", standalone)
    if not isinstance(name, str) or not name:
        raise ValueError(f"import_lora: name must be that of an adapter, got {name!r}")
    tensors, config = _read(source)
    pairs, rest = _pairs(tensors)
    inner = model.get_base_model() if hasattr(model, "get_base_model") else unwrapped(model)
    if standalone and hasattr(model, "get_base_model"):
        raise ValueError("import_lora: standalone=True needs the plain model, this one is peft's")
    with _vocabulary(inner, rest), contextlib.ExitStack() as written:
        modules = {n.replace(".base_layer", ""): m.base_layer if hasattr(m, "tucker_parts") else m
                   for n, m in inner.named_modules() if not n.endswith(".base_layer")}
        at, hint = places([*pairs, *(key.rpartition(".")[0] for key in rest)], modules)
        made = {at.get(key, key): _to_tucker(key, modules.get(at.get(key)), hint, *pair) for key, pair in pairs.items()}
        saved, bases = _saved(rest, config, modules, made, at)
        written.enter_context(_written(bases))
        alphas = {at[key]: _pattern(config.get("alpha_pattern"), key, config.get("lora_alpha", 8)) for key in pairs}
        if standalone:
            root = {at[key]: math.sqrt(len(a)) if config.get("use_rslora") else len(a) for key, (a, _) in pairs.items()}
            model = _put_on(model, name, made, {key: alpha / root[key] for key, alpha in alphas.items()}, saved, config)
        else:
            asked = {at[key]: [len(a), "full"] if a.dim() > 2 else len(a) for key, (a, _) in pairs.items()}
            model = _wrap(model, name, made, asked, alphas, saved, config, modules)
    return model


def _read(source) -> tuple[dict[str, Tensor], dict]:
    if not isinstance(source, (str, os.PathLike)):
        both = source if isinstance(source, (tuple, list)) and len(source) == 2 else (None, None)
        tensors, config = both[0], both[1].to_dict() if hasattr(both[1], "to_dict") else both[1]
        if not isinstance(tensors, Mapping) or not isinstance(config, Mapping):
            raise TypeError(f"import_lora: source must be a folder or (state_dict, config), got {told(source)}")
        tensors, config = dict(tensors), dict(config)
    else:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        folder = Path(source)
        for file in (WEIGHTS, CONFIG):
            if not (folder / file).is_file():
                raise FileNotFoundError(f"import_lora: source {os.fspath(source)!r} has no {file}")
        try:
            tensors, config = load_file(folder / WEIGHTS), json.loads((folder / CONFIG).read_text())
        except (SafetensorError, json.JSONDecodeError) as error:
            what = os.fspath(source)
            raise ValueError(f"import_lora: {what!r} is truncated or no adapter of peft: {error}") from error
    kind = str(getattr(config.get("peft_type"), "value", config.get("peft_type")))
    if kind != "LORA":
        raise ValueError(f"import_lora: source must be a LoRA checkpoint, got peft_type {kind}")
    if config.get("init_lora_weights") not in PLAIN_INITS:
        how = config["init_lora_weights"]
        raise ValueError(f"import_lora: init_lora_weights={how!r} has changed the base weights; save the adapter with "
                         "path_initial_model_for_weight_conversion first")
    odd = [key for key in REFUSED if config.get(key)] + (["bias"] if config.get("bias", "none") != "none" else [])
    if odd:
        raise ValueError(f"import_lora: only ordinary LoRA, this one has {odd[0]}={config[odd[0]]!r}")
    return tensors, config


def _pairs(tensors) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """{layer: (A, B)} and what belongs to no LoRA layer."""
    found, rest = {}, {}
    for key, tensor in tensors.items():
        key = key.removeprefix(PREFIX).replace("_orig_mod.", "").replace(".base_layer.", ".")
        if ".original_module." in key:  # of a saved module, which is there too
            continue
        key = key.replace(".modules_to_save.", ".")
        match = re.fullmatch(r"(.+)\.lora_(?:embedding_)?([AB])(\.weight)?", key)
        if match:
            found.setdefault(match[1], {})[match[2]] = tensor
        elif ".lora_" in key:
            raise ValueError(f"import_lora: only ordinary LoRA, the checkpoint has {key!r}")
        else:
            rest[key] = tensor
    lonely = [key for key, pair in found.items() if len(pair) < 2]
    if lonely or not found:
        what = f"{lonely[0]!r} lacks its A or B" if lonely else "the checkpoint has no LoRA"
        raise ValueError(f"import_lora: {what}")
    return {key: (pair["A"], pair["B"]) for key, pair in found.items()}, rest


@contextlib.contextmanager
def _vocabulary(model, rest) -> Iterator[None]:
    """A model of transformers with as many rows as the checkpoint's embeddings have; as it was, if that is no use."""
    before, n = None, None
    if hasattr(model, "resize_token_embeddings"):
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            name = next((n for n, m in model.named_modules() if m is embedding), None)
            tensor = next((t for k, t in rest.items() if name and _is_end(k.removesuffix(".weight"), name)), None)
            weight = getattr(embedding, "weight", None)
            if tensor is not None and weight is not None and tensor.dim() == 2 and len(tensor) != len(weight):
                before, n = len(weight), len(tensor)
    if n is not None:
        fast = "mean_resizing" in inspect.signature(model.resize_token_embeddings).parameters
        resize = functools.partial(model.resize_token_embeddings, **({"mean_resizing": False} if fast else {}))
        resize(n)
    try:
        yield
    except BaseException:
        if n is not None:
            resize(before)
        raise


@contextlib.contextmanager
def _written(bases) -> Iterator[None]:
    """The weights with what the checkpoint has in them; as they were, if that is no use."""
    before = [weight.detach().clone() for weight, _ in bases]
    try:
        with torch.no_grad():
            for weight, tensor in bases:
                weight.copy_(tensor)
        yield
    except BaseException:
        with torch.no_grad():
            for (weight, _), old in zip(bases, before):
                weight.copy_(old)
        raise


def _is_end(a: str, b: str) -> bool:
    """Is one the last parts of the other?"""
    return ("." + a).endswith("." + b) or ("." + b).endswith("." + a)


def _to_tucker(key, module, hint, a: Tensor, b: Tensor) -> tuple[str, torch.Size, list[int | None], dict[str, Tensor]]:
    """(parameter, its shape, ranks, tensors by name) of one layer, without the scale."""
    if module is None or not has_kind(module):
        what = "there is no such layer" if module is None else f"it is a {type(module).__name__}"
        raise ValueError(f"import_lora: {key!r} can't take a LoRA: {what} in the model{hint}")
    (parameter, shape), *more = weights_of(module).items()
    groups, a, b, r = getattr(module, "groups", 1), a.float(), b.float(), a.shape[0]
    if more or groups > 1 or (len(shape) > 2 and not isinstance(module, CONVS)):
        what = f"{type(module).__name__} with groups={groups}" if groups > 1 else type(module).__name__
        raise ValueError(f"import_lora: {key!r} is a {what}, on which peft's LoRA is no change of one weight")
    if isinstance(module, nn.Embedding) or is_conv1d_of_transformers(module):
        factors = [a.mT, b]
    else:
        factors = [b.flatten(1), a.mT] if len(shape) == 2 else [b.flatten(1), None]
    whole = len(shape) > 2  # A is the core then, and all modes but the first are whole
    fits = all(tuple(f.shape) == (d, r) for f, d in zip(factors, shape) if f is not None)
    if not fits or (whole and a.shape[1:] != shape[1:]):
        raise ValueError(f"import_lora: {key!r} is {tuple(shape)} in the model, with A {tuple(a.shape)} and "
                         f"B {tuple(b.shape)} in the checkpoint")
    core = a if whole else torch.eye(r)
    for mode, factor in enumerate(factors):
        if factor is not None and r > shape[mode]:  # a rank above the size: the factor is the identity
            core = torch.tensordot(factor, core, dims=([1], [mode])).movedim(0, mode)
            factors[mode] = torch.eye(shape[mode])
    ranks = [None if f is None else f.shape[1] for f in factors] + [None] * (len(shape) - 2)
    named = {"core": core} | {f"factor{i}": f for i, f in enumerate(factors) if f is not None}
    return parameter, shape, ranks, {n: t.contiguous() for n, t in named.items()}


def _pattern(patterns: Mapping | None, key: str, otherwise):
    """As peft reads rank_pattern and alpha_pattern."""
    return next((v for p, v in (patterns or {}).items() if re.match(rf"(.*\.)?({p})$", key)), otherwise)


def _saved(rest, config, modules, made, at) -> tuple[dict[str, dict[str, Tensor]], list[tuple[Tensor, Tensor]]]:
    """The modules that the checkpoint keeps whole, and [(weight, what the checkpoint has)] of layers with a LoRA.

    peft adds the weights of embeddings and heads that are adapted or resized. Those that the model has already are
    left out; the others make saved modules where there is no LoRA.
    """
    saved, bases = {}, []
    for key, tensor in rest.items():
        owner, _, leaf = key.rpartition(".")
        n = at.get(owner, owner)
        module, kept = modules.get(n), next((m for m in modules if m and f"{n}.".startswith(m + ".") and any(
            m == asked or m.endswith("." + asked) for asked in config.get("modules_to_save") or ())), None)
        if kept is not None:
            saved.setdefault(kept, {})[f"{n}.{leaf}"[len(kept) + 1:]] = tensor
            continue
        weight = None if module is None else module._parameters.get(leaf)
        if weight is None or is_packed(weight):
            what = "is packed in the model" if weight is not None else "belongs to no LoRA and no saved module"
            raise ValueError(f"import_lora: the checkpoint has {key!r}, which {what}")
        if weight.shape != tensor.shape:
            has, got = tuple(weight.shape), tuple(tensor.shape)
            raise ValueError(f"import_lora: {key!r} is {has} in the model, {got} in the checkpoint")
        eps = max(torch.finfo(t.dtype).eps for t in (weight, tensor))
        if torch.allclose(weight.detach().float().cpu(), tensor.float().cpu(), rtol=eps, atol=0):
            continue
        if n in made:
            bases.append((weight, tensor))
        else:
            saved[n] = {k: t.detach() for k, t in module.state_dict().items()} | saved.get(n, {}) | {leaf: tensor}
    for key, state in saved.items():
        has, got = ({n: tuple(t.shape) for n, t in d.items()} for d in (modules[key].state_dict(), state))
        if has != got:
            raise ValueError(f"import_lora: saved module {key!r} is {has} in the model, {got} in the checkpoint")
    return saved, bases


def _put_on(model, name, made, scales, saved, config) -> nn.Module:
    """As a file of ours with this adapter would be."""
    check_new_name("import_lora", name)
    settle("import_lora", unwrapped(model))
    refuse_merged("import_lora", model)
    dropout = float(config.get("lora_dropout") or 0)
    described = {key: {parameter: {"shape": shape, "ranks": ranks, "scale": scales[key], "dropout": dropout}}
                 for key, (parameter, shape, ranks, _) in made.items()}
    tensors = {f"{key}.{parameter}.{n}": t for key, (parameter, _, _, named) in made.items() for n, t in named.items()}
    tensors |= {f"{key}.{n}": t for key, state in saved.items() for n, t in state.items()}
    note = TuckerConfig(rank=int(config.get("r", 8)), alpha=config.get("lora_alpha", 8), dropout=dropout,
                        scaling="rslora" if config.get("use_rslora") else "lora", target_modules=tuple(made),
                        save_modules=tuple(saved)).to_dict()
    about = {"config": note, "layers": described, "saved": {key: list(state) for key, state in saved.items()}}
    put_adapter(unwrapped(model), name, tensors, about, "import_lora: the checkpoint")
    return model


def _wrap(model, name, made, asked, alphas, saved, config, modules) -> nn.Module:
    """By way of peft: a config that gives just these ranks, then the tensors."""
    import peft

    from ..peft import TuckerConfig as PeftTuckerConfig

    r, alpha = int(config.get("r", 8)), config.get("lora_alpha", 8)
    ranks = {"^" + re.escape(key): rank for key, rank in asked.items() if rank != r}
    same = {k: config.get(k) for k in ("task_type", "revision", "base_model_name_or_path")}
    whole = [*(config.get("modules_to_save") or ()), *saved]
    tucker = PeftTuckerConfig(
        r=r, alpha=alpha, scaling="rslora" if config.get("use_rslora") else "lora",
        dropout=float(config.get("lora_dropout") or 0), target_modules=targets_of(made, modules), rank_pattern=ranks,
        alpha_pattern={"^" + re.escape(key): a for key, a in alphas.items() if a != alpha},
        modules_to_save=list(dict.fromkeys(whole)) or None, **same)
    if isinstance(model, peft.PeftModel):
        model.add_adapter(name, tucker)
    else:
        model = peft.get_peft_model(model, tucker, name)
    tensors = {f"{PREFIX}{key}.tucker_parts.{n}": t for key, (_, _, _, named) in made.items() for n, t in named.items()}
    tensors |= {f"{PREFIX}{key}.{n}": t for key, state in saved.items() for n, t in state.items()}
    odd = peft.set_peft_model_state_dict(model, tensors, adapter_name=name).unexpected_keys
    if odd:
        raise ValueError(f"import_lora: {odd[0]!r} has no place in the model")
    return model


def targets_of(names, modules) -> list[str] | str:
    """target_modules that mean these layers and no other: the names, or where one is the end of another a pattern."""
    if any(n not in names and n.endswith(tuple("." + key for key in names)) for n in modules):
        return "|".join(re.escape(key) for key in names)
    return sorted(names)
