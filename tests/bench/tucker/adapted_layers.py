"""Adapters of frozen layers: what bench_tucker_linear.py and bench_tucker_conv.py share.

A training step is the forward and the gradients of the input and of the adapter, all at one rank.

The floor is the bare frozen layer, forward and gradient of its input. Peers are imported: peft's LoRA, LoHa and LoKr,
LyCORIS's LoCon, both as it rebuilds the weight and in its bypass mode. FLoRA's formula is written from the paper: the
layer plus one on the composed change. Beside ours is `SpectralConfig` of the same rank. Every contender is held against
its own change of the weight, composed and applied in float64; ours and FLoRA's formula are the same function, all
others have other changes of the same rank.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
import work
from harness import Case, Contender, Target, relative
from torch import nn
from torch.nn.functional import conv2d, linear

import torch_subspace as ts

RANK, SCALE = 16, 0.5
DECOMPOSED = 1 << 23  # channels in and out whose singular vectors do not take minutes
FLOOR, OURS, ADAPTED, FLORA = "floor: frozen layer", "ours", "ours: adapt(model)", "FLoRA's formula"


@dataclasses.dataclass
class Adapter:
    """A frozen layer with something to train.

    call: the adapted layer, a function of x.
    parameters: what is trained.
    change: returns the change of the weight, differentiable in the parameters; None: it has none.
    """

    call: Callable
    parameters: list
    change: Callable | None = None


def apply(layer, x, weight, bias):
    """The layer's operation with another weight."""
    if isinstance(layer, nn.Linear):
        return linear(x, weight, bias)
    return conv2d(x, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


# ------------------------------------------------------------------------------------------------------- contenders


def frozen(layer):
    """The bare layer."""
    return Adapter(layer, [])


def tucker_parameters(layer):
    """Core and factors, wide beside a layer of halves; kernel modes have none."""
    size = layer.weight.shape
    ranks = [min(RANK, n) for n in size[:2]]
    seed = torch.Generator().manual_seed(1)
    shapes = [(*ranks, *size[2:]), (size[0], ranks[0]), (size[1], ranks[1])]
    drawn = [torch.randn(shape, generator=seed, dtype=torch.float32) / shape[0] ** 0.5 for shape in shapes]
    wide = torch.promote_types(layer.weight.dtype, torch.float32)
    return [t.to(layer.weight.device, wide).requires_grad_() for t in drawn]


def composed(core, *factors):
    """The change of the weight by one einsum."""
    return SCALE * torch.einsum("abhw,oa,ib->oihw" if core.dim() == 4 else "ab,oa,ib->oi", core, *factors)


def ours(layer):
    """`tucker_linear` or `tucker_conv`."""
    core, out, into = parameters = tucker_parameters(layer)
    if isinstance(layer, nn.Linear):
        parameters[2] = v = into.detach().mT.contiguous().requires_grad_()

        def call(x):
            return ts.tucker_linear(x, layer.weight, layer.bias, core, out, v, scale=SCALE)

        return Adapter(call, parameters, lambda: composed(core, out, v.mT))
    geometry = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}

    def call(x):
        return ts.tucker_conv(x, layer.weight, layer.bias, core, [out, into, None, None], scale=SCALE, **geometry)

    return Adapter(call, parameters, lambda: composed(*parameters))


def adapted(layer):
    """What `adapt` makes of the layer."""
    model = nn.Sequential(layer)
    ts.adapt(model, ts.TuckerConfig(rank=RANK, target_modules="0"))
    parameters = [p for p in model.parameters() if p.requires_grad]  # core and factors; its scale is 1
    return filled(model, parameters, lambda: composed(*parameters) / SCALE)


def spectral(layer):
    """What `adapt` makes of it for singular values: a number for each of the leading ones is trained."""
    model = nn.Sequential(layer)
    ts.adapt(model, ts.SpectralConfig(rank=RANK, target_modules="0"))
    (own,) = [module for module in model.modules() if hasattr(module, "factor1")]
    return filled(model, [own.core], lambda: (own.factor0 * own.core) @ own.factor1.mT)


def flora(layer):
    """The paper's layer: the change is composed at every forward, and has an operation of its own."""
    parameters = tucker_parameters(layer)

    def call(x):
        return layer(x) + apply(layer, x, composed(*parameters).to(x.dtype), None)

    return Adapter(call, parameters, lambda: composed(*parameters))


def filled(call, parameters, change):
    """An adapter whose parameters are random: some start at zero, which hides errors."""
    seed = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in parameters:
            p.copy_(torch.randn(p.shape, generator=seed, dtype=torch.float32) / max(1, p[0].numel()) ** 0.5)
    return Adapter(call, parameters, change)


def peft(method):
    """A method of peft: its config class and the name of the option that draws random weights."""

    def make(layer):
        import peft as package

        options = {"LoRA": {"lora_alpha": RANK}, "LoHa": {"alpha": RANK}, "LoKr": {"alpha": RANK}}[method]
        config = getattr(package, {"LoRA": "LoraConfig"}.get(method, f"{method}Config"))
        model = package.inject_adapter_in_model(config(r=RANK, target_modules=["0"], **options), nn.Sequential(layer))
        parameters = [p for p in model.parameters() if p.requires_grad]
        return filled(model, parameters, lambda: model[0].get_delta_weight("default"))

    return make


def lycoris(bypass):
    """LyCORIS's LoCon, which is LoRA: a rebuilt weight, or two small operations beside the layer."""

    def make(layer):
        from lycoris.modules.locon import LoConModule

        change = LoConModule("bench", layer, lora_dim=RANK, alpha=RANK, bypass_mode=bypass)
        change.to(layer.weight)
        change.apply_to()
        if bypass and not change.bypass_mode:
            raise NotImplementedError("LoCon has no bypass mode for grouped convolutions")
        parameters = [p for p in change.parameters() if p.requires_grad]
        return filled(layer, parameters, lambda: change.get_diff_weight(shape=layer.weight.shape)[0])

    return make


# ------------------------------------------------------------------------------------------------------------ layers


@functools.cache
def problem(layer, size, dtype, device):
    """Frozen layer, input and gradient of the output; `layer` is its class and arguments."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = layer[0](*layer[1:4], **dict(layer[4:])).to(device, dtype).requires_grad_(False)
        x = torch.randn(size).to(device, dtype)
        dy = torch.randn_like(made(x))
    return made, x.requires_grad_(), dy


def step(adapter, x, dy):
    """The result of a step and its gradients."""
    y = adapter.call(x)
    return y, *torch.autograd.grad(y, [x, *adapter.parameters], dy)


def contender(name, make, layer, size, dtype, device, **options):
    """One way to adapt the layer. `make` gets a copy with the same weight, as some change the layer."""

    def fresh(layer):
        with torch.random.fork_rng():
            return make(copy.deepcopy(layer, {id(p): p for p in layer.parameters()}))

    def build():
        frozen_layer, x, dy = problem(layer, size, dtype, device)
        adapter = fresh(frozen_layer)
        entry.kept = sum(t.nbytes for t in (x, *adapter.parameters))  # their gradients
        return lambda: step(adapter, x, dy)

    def check():
        frozen_layer, x, dy = problem(layer, size, dtype, device)
        few = 16 if isinstance(frozen_layer, nn.Linear) else 1
        given = [x[:few].detach().requires_grad_(), dy[:few]]
        adapter = fresh(frozen_layer)
        wide = copy.deepcopy(frozen_layer).double()
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # peers make their parameters in it
        try:
            truth = fresh(wide)
        finally:
            torch.set_default_dtype(before)
        with torch.no_grad():
            for p, q in zip(truth.parameters, adapter.parameters, strict=True):
                p.copy_(q)

        def call(x):
            change = truth.change().reshape(wide.weight.shape) if truth.change else 0
            return apply(wide, x, wide.weight + change, wide.bias)

        doubled = [t.detach().double() for t in given]
        expected = step(Adapter(call, truth.parameters), doubled[0].requires_grad_(), doubled[1])
        return relative([t.detach() for t in step(adapter, *given)], [t.detach() for t in expected])

    def saved():
        frozen_layer, x, _ = problem(layer, size, dtype, device)
        adapter = fresh(frozen_layer)
        known = {t.untyped_storage().data_ptr() for t in (x, *frozen_layer.parameters(), *adapter.parameters)}
        found = {}

        def pack(t):
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = adapter.call(x)
        del y
        return sum(size for where, size in found.items() if where not in known)

    entry = Contender(name, build, check, peak=True, saved=saved, **options)
    return entry


def case(name, layer, size, device, promise=None, dtype=torch.float32, beside=None):
    """All contenders on one layer; `promise` is (time, its stretch, memory) against the floor. beside: another dtype
    that ours is timed in too, which must take half as much time again."""

    def on(name, make, **options):
        return contender(name, make, layer, size, dtype, device, **options)

    other = {"note": "another change of the same rank"}
    contenders = [on(FLOOR, frozen), on(OURS, ours), on(ADAPTED, adapted)]
    if layer[1] * layer[2] <= DECOMPOSED:
        contenders += [on("ours: adapt(model), SpectralConfig", spectral, note="singular values alone")]
    contenders += [on(FLORA, flora)]
    contenders += [on(f"peft {method}", peft(method), **other) for method in ("LoRA", "LoHa", "LoKr")]
    contenders += [on("LyCORIS LoCon", lycoris(False), **other), on("LyCORIS LoCon, bypass", lycoris(True), **other)]
    targets = []
    if promise:
        time, stretch, memory = promise
        targets = [Target(OURS, (FLOOR,), "<=", time, stretch),
                   *(Target(name, (FLOOR,), "<=", memory, memory, "peak") for name in (OURS, ADAPTED))]
    if beside:
        slower = f"ours: {str(beside).removeprefix('torch.')}"
        contenders += [contender(slower, ours, layer, size, beside, device)]
        targets += [Target(OURS, (slower,), ">=", 1.5, 2)]
    name = f"{name} {str(dtype).removeprefix('torch.')}"
    kind, into, out, *rest = layer
    if kind is nn.Linear:
        least = work.tucker_linear(size[0], into, out, RANK, dtype.itemsize)
    else:
        kernel, options = rest[0], dict(rest[1:])
        groups = options.get("groups", 1)
        padding, stride = options.get("padding", 0), options.get("stride", 1)
        side = (size[2] + 2 * padding - kernel) // stride + 1
        least = work.tucker_conv(size, (size[0], out, side, side), kernel, groups, RANK, dtype.itemsize, stride,
                                 padding)
    return Case(name, contenders, targets, **least, seconds=8, dtype=dtype)
