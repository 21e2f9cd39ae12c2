"""Adapters of frozen layers: a training step (forward, gradients of the input and of the adapter), all at one rank.

The floor is the bare frozen layer, forward and gradient of its input. Peers are imported: peft's LoRA, LoHa and LoKr,
LyCORIS's LoCon, both as it rebuilds the weight and in its bypass mode. FLoRA's formula is written from the paper: the
layer plus one on the composed change. Every contender is held against its own change of the weight, composed and
applied in float64; ours and FLoRA's formula are the same function, the peers have other changes of the same rank.

The last case composes a weight: base + scale core x_0 F_0 x_1 ... in one pass.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable

import reference
import torch
from harness import Case, Contender, Target, relative
from torch import nn
from torch.nn.functional import conv2d, linear

import torch_subspace as ts

RANK, SCALE = 16, 0.5
FLOOR, OURS, FLORA = "floor: frozen layer", "ours", "FLoRA's formula"


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


def case(name, layer, size, device, promise=None, flops=0, dtype=torch.float32):
    """All contenders on one layer; `promise` is (time, its stretch, memory) against the floor. Without `flops` it is
    bound by memory on a GPU: the input, the output and the gradients of both."""

    def on(name, make, **options):
        return contender(name, make, layer, size, dtype, device, **options)

    other = {"note": "another change of the same rank"}
    contenders = [on(FLOOR, frozen), on(OURS, ours)]
    if hasattr(ts, "adapt"):
        contenders += [on("ours: adapt(model)", adapted)]
    contenders += [on(FLORA, flora)]
    contenders += [on(f"peft {method}", peft(method), **other) for method in ("LoRA", "LoHa", "LoKr")]
    contenders += [on("LyCORIS LoCon", lycoris(False), **other), on("LyCORIS LoCon, bypass", lycoris(True), **other)]
    targets = []
    if promise:
        time, stretch, memory = promise
        targets = [Target(OURS, (FLOOR,), "<=", time, stretch), Target(OURS, (FLOOR,), "<=", memory, memory, "peak")]
    name = f"{name} {str(dtype).removeprefix('torch.')}"
    moved = 0
    if device == "cuda" and not flops:
        _, x, dy = problem(layer, size, dtype, device)
        moved = 2 * (x.nbytes + dy.nbytes)
    return Case(name, contenders, targets, bytes=moved, flops=flops, seconds=8, dtype=dtype)


# ----------------------------------------------------------------------------------------------------------- compose


def compose(out, into, kernel, device):
    """A convolution's weight plus its change, in torch operations and by the op."""
    seed = torch.Generator().manual_seed(0)
    ranks = [min(RANK, n) for n in (out, into, kernel, kernel)]
    base = torch.randn(out, into, kernel, kernel, generator=seed).to(device)
    core = torch.randn(ranks, generator=seed).to(device)
    factors = [torch.randn(n, r, generator=seed).to(device) for n, r in zip(base.shape, ranks)]
    result = torch.empty_like(base)

    def einsum():
        return base + SCALE * torch.einsum("abcd,oa,ib,yc,xd->oiyx", core, *factors)

    def hand():
        g = factors[2] @ core @ factors[3].mT
        g = (factors[1] @ g.flatten(2)).flatten(1)
        return torch.addmm(base.flatten(1), factors[0], g, alpha=SCALE).view(base.shape)

    def op():
        return ts.tucker_compose(core, factors, scale=SCALE, base=base, out=result)

    def made(name, function):
        def check():
            wide = [t.cpu().double() for t in (core, base, *factors)]
            truth = reference.tucker(wide[0], wide[2:], scale=SCALE, base=wide[1])
            return relative(no_grad(function)().cpu(), truth)

        return Contender(name, lambda: no_grad(function), check)

    no_grad = torch.no_grad()
    floor = Contender("floor: a copy of base", lambda: lambda: result.copy_(base))
    contenders = [floor, made(OURS, op), made("einsum", einsum), made("by hand: matmul and addmm", hand)]
    targets = [Target(OURS, ("einsum",), ">=", 5, 5), Target(OURS, ("by hand: matmul and addmm",), ">=", 1.2, 1.2),
               Target(OURS, (floor.name,), "<=", 1.2, 1.2)]  # fmt: skip
    return Case(f"compose {out}x{into}x{kernel}x{kernel} float32", contenders, targets, bytes=2 * base.nbytes,
                seconds=4)  # fmt: skip


def cases(device):
    """Two linear layers, four kinds of convolutions, and the weight alone; on a GPU a batch of halves first."""
    found = [] if device == "cpu" else [
        case("linear 4096 to 4096, T=8192", (nn.Linear, 4096, 4096), (8192, 4096), device, flops=4 * 8192 * 4096**2,
             dtype=torch.bfloat16),
    ]  # fmt: skip
    return found + [
        case("linear 4096 to 4096, T=512", (nn.Linear, 4096, 4096), (512, 4096), device, (1.05, 1.02, 1.05),
             flops=4 * 512 * 4096**2),
        case("linear 768 to 3072, T=512", (nn.Linear, 768, 3072), (512, 768), device, flops=4 * 512 * 768 * 3072),
        case("conv 3x3, 256 to 256, 56x56, B=8", (nn.Conv2d, 256, 256, 3, ("padding", 1)), (8, 256, 56, 56), device,
             (1.15, 1.1, 1.1), flops=4 * 8 * 56**2 * 256**2 * 9),
        case("depthwise 7x7 (ConvNeXt), C=96, 56x56, B=8", (nn.Conv2d, 96, 96, 7, ("padding", 3), ("groups", 96)),
             (8, 96, 56, 56), device),
        case("grouped 3x3 (ResNeXt), 32 groups of 4, 28x28, B=8",
             (nn.Conv2d, 128, 128, 3, ("padding", 1), ("groups", 32)), (8, 128, 28, 28), device),
        case("patches 16x16 (ViT), 3 to 768, 224x224, B=8", (nn.Conv2d, 3, 768, 16, ("stride", 16)), (8, 3, 224, 224),
             device, flops=4 * 8 * 14**2 * 768 * 3 * 256),
        compose(256, 256, 3, device),
    ]  # fmt: skip
