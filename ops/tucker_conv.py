"""A convolution with a Tucker-core adapter, of any kind torch has, without keeping its change of weight.

    y = conv(x, W + dW) + b,        dW = scale * core x_0 factor_0 x_1 factor_1 ...

Two forms of the same function. `chain`: dW is itself a chain of three convolutions, pointwise into the rank of
the inputs, a small one there, pointwise out of the rank of the outputs,

    z1 = U_in' drop(x)      z2 = conv(z1, C)      y = conv(x, W) + b + U_out z2      C = scale core x_2 K ...
    h  = U_out' dy          k  = conv'(h, C)      dx = conv'(dy, W) + drop(U_in k)
    dU_out = sum dy z2'     dC = d<h, conv(z1, C)>/dC                dU_in = sum drop(x) k'

where only x is kept; the ends are one pass each over x, y, dy or dx (cpu/tucker_conv.c). `composed`: W + dW is
made for one convolution, dropped at once and made again for dx; the parameters' gradient comes from that of W.
FLoRA, arXiv 2405.14739; the chain is Tucker-2 as in Kim et al., arXiv 1511.06530.
"""
from __future__ import annotations

import contextlib
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library  # noqa: F401  (registers torch.ops.torch_subspace)
from .logits import _wide, transformed
from .tucker import tucker_compose

_op = torch.ops.torch_subspace
_aten = torch.ops.aten
_NAME = "tucker_conv"
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_HALF = (torch.float16, torch.bfloat16)

FORMS = ("auto", "chain", "composed")

# The chain's products are skinny: a flop there is taken to cost as much as so many of a dense convolution.
SKINNY = 2.0


def tucker_conv(x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, factors, *, scale: float = 1.0, stride=1,
                padding=0, dilation=1, groups: int = 1, transposed: bool = False, output_padding=0,
                form: str = "auto", dropout: float = 0.0, training: bool = True) -> Tensor:
    """Convolution of ``x`` with ``weight`` plus ``scale`` times the Tucker product of ``core`` and ``factors``.

    Args:
        x: (batch, in, *spatial) or (in, *spatial) with 1 to 3 spatial dimensions, channels first or last in memory.
        weight: (out, in / groups, *kernel), or (in, out / groups, *kernel) when ``transposed``; of x's dtype.
        bias: (out,) or None.
        core: (r_0, r_1, ...), one rank for each dimension of the weight; float32 or float64.
        factors: one (d_i, r_i) for each dimension d_i of the weight, in its order, or None for the identity.
        scale: what the adapter's part is multiplied by.
        stride, padding, dilation, groups, output_padding: as in torch's convolutions; padding may be "same" or
            "valid" unless ``transposed``.
        transposed: a transposed convolution.
        form: "chain" (three small convolutions beside the base, groups == 1), "composed" (one with the sum of both
            weights) or "auto", the one with fewer flops (see ``chain_is_cheaper``). The function is the same.
        dropout: probability of dropping an entry of the adapter's input, 0 <= dropout < 1; the mask is drawn again
            in the backward, not kept.
        training: without it nothing is dropped.

    Returns:
        What torch's convolution returns, in its shape, dtype and memory format. With a core of zeros it is that
        convolution's result, bit for bit. Beside float16 and bfloat16 the adapter is computed in float32, and in the
        chain rounded once; there the composed form rounds dW for a convolution of its own, as dW would be lost in W.

    Differentiable in ``x``, ``weight``, ``bias``, ``core`` and ``factors``, twice; in forward mode and under
    torch.func by the plain formula. Kept for the backward: x and the parameters. Under autocast x, weight and bias
    are cast, the adapter is not.

    Raises:
        TypeError: a tensor is none, or its dtype does not fit.
        ValueError: shapes, devices, ``form``, ``padding``, ``dropout`` or another value do not fit.

    Source: arXiv 2405.14739.
    """
    x, weight, bias = _autocast(x, weight, bias)
    factors = _check(x, weight, bias, core, factors, scale, groups, transposed, form, dropout)
    dims = weight.dim() - 2
    stride, dilation, output_padding = (_tuple(name, value, dims, least) for name, value, least in (
        ("stride", stride, 1), ("dilation", dilation, 1), ("output_padding", output_padding, 0)))
    batch = x if x.dim() == weight.dim() else x[None]
    batch, padding = _pad(batch, weight, padding, stride, dilation, transposed)
    how = (stride, padding, dilation, transposed, output_padding, groups)
    dropout = float(dropout) if training else 0.0

    core, *factors = (t if t is None else t.to(_wide(x.dtype)) for t in (core, *factors))
    if transformed():
        y = _plain(batch, weight, bias, tucker_compose(core, factors, scale=scale), F.dropout(batch, dropout), how)
    elif _chain_wanted(form, batch, weight, core, factors, how, dropout):
        inner = tucker_compose(core, [None, None, *factors[2:]], scale=scale)
        u_out, u_in = factors[:2] if not transposed else factors[1::-1]
        y = _Chain.apply(batch, weight, bias, inner, u_in, u_out, _seed(x, dropout), dropout, how)
    else:
        base = None if dropout or x.dtype in _HALF else weight
        made = tucker_compose(core, factors, scale=scale, base=base)
        y = _Composed.apply(batch, weight, bias, _like(made.to(x.dtype), _is_last(weight)), _seed(x, dropout), dropout,
                            how, float(scale), core, *factors)
    return y if x.dim() == weight.dim() else y[0]


def chain_is_cheaper(batch: int, inside: int, outside: int, weight, ranks, transposed: bool, training: bool) -> bool:
    """Is the chain cheaper than composing, for a dense convolution from ``inside`` to ``outside`` positions an image?

    With T positions, k entries of the kernel, I and O channels and ranks r_I and r_O, forward and backward take

        chain       2 T (I r_I + r_I r_O k + O r_O)      forward, and 2.5 times that backward
        composed    2 O I k min(r_I, r_O)                each time W + dW is made and for the parameters' gradient,
                    2 T O I k                            dense gradient of the weight, when training

    flops, those of the chain SKINNY times as slow. T is that of the outputs, of the inputs where these are meant.
    """
    (o, i), (ro, ri) = (weight[1::-1], ranks[1::-1]) if transposed else (weight[:2], ranks[:2])
    k, middle = math.prod(weight[2:]), inside if transposed else outside
    chain = 2 * batch * (inside * i * ri + middle * ri * ro * k + outside * o * ro)
    make = 2 * o * i * k * min(ri, ro)
    if not training:
        return SKINNY * chain <= make
    return SKINNY * 3.5 * chain <= 4 * make + 2 * batch * middle * o * i * k


def _chain_wanted(form, x, weight, core, factors, how, dropout):
    stride, padding, dilation, transposed, output_padding, groups = how
    if groups > 1 or form != "auto":
        return form == "chain"
    if dropout or x.dtype in _HALF:  # composed would be a second dense convolution
        return True
    if torch.compiler.is_compiling():  # sizes may be symbols: as for large images, where only channels decide
        return chain_is_cheaper(1 << 20, 1, 1, weight.shape, core.shape, transposed, True)
    outside = [(n - 1) * s - 2 * p + d * (k - 1) + q + 1 if transposed else (n + 2 * p - d * (k - 1) - 1) // s + 1
               for n, k, s, p, d, q in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding)]
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (core, *factors))
    return chain_is_cheaper(x.shape[0], math.prod(x.shape[2:]), math.prod(outside), weight.shape, core.shape,
                            transposed, training)


# ---------------------------------------------------------------------------------------------------- input


def _check(x, weight, bias, core, factors, scale, groups, transposed, form, dropout):
    def require(condition, error, words):
        if not condition:
            raise error(f"{_NAME}: {words}")

    factors = list(factors)
    named = [("x", x), ("weight", weight), ("bias", bias), ("core", core)]
    named += [(f"factors[{i}]", f) for i, f in enumerate(factors)]
    for what, t in named:
        if t is None and what not in ("x", "weight", "core"):
            continue
        require(isinstance(t, Tensor), TypeError, f"{what} must be a tensor, got {type(t).__name__}")
        allowed = _FLOATS if what in ("x", "weight", "bias") else _FLOATS[:2]
        require(t.dtype in allowed, TypeError, f"{what} must be {' or '.join(map(str, allowed))}, got {t.dtype}")
        require(t.device == x.device, ValueError, f"{what} must be on x's device {x.device}, got {t.device}")
        if what in ("weight", "bias"):
            require(t.dtype == x.dtype, TypeError, f"x and {what} must share a dtype, got {x.dtype} and {t.dtype}")
    n = weight.dim()
    require(3 <= n <= 5, ValueError, f"weight must have 3 to 5 dimensions, got shape {tuple(weight.shape)}")
    require(x.dim() in (n, n - 1), ValueError, f"x must have {n} dimensions, or {n - 1} without a batch, got shape "
                                               f"{tuple(x.shape)}")
    require(isinstance(groups, int) and groups > 0, ValueError, f"groups must be a positive int, got {groups!r}")
    require(weight.shape[0] % groups == 0, ValueError, f"weight's {weight.shape[0]} rows are not {groups} groups")
    inputs = weight.shape[0] if transposed else weight.shape[1] * groups
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    require(x.shape[1 - n] == inputs, ValueError, f"x has {x.shape[1 - n]} channels but weight takes {inputs}")
    require(bias is None or bias.shape == (outputs,), ValueError, f"bias must be ({outputs},), got shape "
                                                                  f"{None if bias is None else tuple(bias.shape)}")
    require(core.dim() == n and len(factors) == n, ValueError, f"core must have {n} dimensions and a factor for each, "
            f"got {core.dim()} and {len(factors)} factors")
    for i, f in enumerate(factors):
        r, d = core.shape[i], weight.shape[i]
        require(r > 0, ValueError, f"core must not be empty, got shape {tuple(core.shape)}")
        require(r == d if f is None else f.shape == (d, r), ValueError, f"factors[{i}] must be ({d}, {r})"
                f", or None where the rank is the size, got {None if f is None else tuple(f.shape)}")
    require(form in FORMS, ValueError, f"form must be one of {', '.join(FORMS)}, got {form!r}")
    require(form != "chain" or groups == 1, ValueError, f"the chain takes no groups, got groups={groups}")
    require(not isinstance(scale, Tensor) and abs(scale) < math.inf, ValueError, f"scale must be finite, got {scale!r}")
    require(0 <= dropout < 1, ValueError, f"dropout must be in [0, 1), got {dropout!r}")
    return factors


def _tuple(name, value, dims, least):
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) != dims or not all(isinstance(v, int) and v >= least for v in values):
        raise ValueError(f"{_NAME}: {name} must be an int of at least {least}, or {dims} of them, got {value!r}")
    return values


def _pad(x, weight, padding, stride, dilation, transposed):
    """x and its padding as numbers; of an uneven "same" the surplus is put onto x first, as torch does."""
    dims = weight.dim() - 2
    if not isinstance(padding, str):
        return x, _tuple("padding", padding, dims, 0)
    if transposed or padding not in ("same", "valid"):
        raise ValueError(f'{_NAME}: padding must be a number{"" if transposed else ", same or valid"}, got {padding!r}')
    if padding == "valid":
        return x, (0,) * dims
    if any(s != 1 for s in stride):
        raise ValueError(f'{_NAME}: padding "same" needs stride 1, got {stride}')
    total = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:])]
    if any(t % 2 for t in total):
        x = F.pad(x, [side for t in reversed(total) for side in (0, t % 2)])
    return x, tuple(t // 2 for t in total)


def _autocast(*tensors):
    """What autocast does for a convolution; float64 is left alone, as everywhere in torch."""
    x = tensors[0]
    if not isinstance(x, Tensor) or x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return tensors
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.is_floating_point() and t.dtype != torch.float64 else t
                 for t in tensors)


def _no_autocast(x):
    """The casts are done: what is wide stays so."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _seed(x, dropout):
    if not dropout:
        return torch.empty(0, dtype=torch.int64, device=x.device)
    return torch.randint(-(1 << 63), (1 << 63) - 1, (1,), dtype=torch.int64, device=x.device)


# ---------------------------------------------------------------------------------------------- the pointwise ends


def _is_last(t):
    """Channels last in memory; an image of one position is both, and then the vectors run along the channels."""
    return (t.movedim(1, -1).is_contiguous() and not t.is_contiguous()) or math.prod(t.shape[2:]) == 1


def _flat(t, last):
    b, n, p = *t.shape[:2], math.prod(t.shape[2:])
    return t.movedim(1, -1).reshape(b, p, n) if last else t.reshape(b, n, p)


def _project(x, f, seed, dropout, w=None, need_z=True):
    """z = f' drop(x) and, given w, df = sum drop(x) w'; f None is the identity."""
    if f is None:
        return x.to(_wide(x.dtype)) * _mask(x, seed, dropout) if dropout else x.to(_wide(x.dtype)), None
    last, spatial = _is_last(x), x.shape[2:]
    inner = x.new_empty(0, 0, 0) if w is None else _flat(w, last)
    z, df = _op.tucker_project(_flat(x, last), f, inner, seed, dropout, last, need_z, w is not None)
    if need_z:
        b, r = x.shape[0], f.shape[1]
        z = z.view(b, *spatial, r).movedim(-1, 1) if last else z.view(b, r, *spatial)
        # a small convolution is twice as fast with its channels last, and z is small enough to be turned
        z = _like(z, not last and z.dtype == torch.float32 and not x.is_cuda)
    return z, df


def _expand_(x, z, f, seed, dropout):
    """x += drop(f z), in place wherever torch's convolution returned something dense."""
    if f is None:
        return (x + (z * _mask(x, seed, dropout) if dropout else z)).to(x.dtype)
    last = _is_last(x)
    if not last and not x.is_contiguous():
        x = x.contiguous()
    b, n, p = *x.shape[:2], math.prod(x.shape[2:])
    _op.tucker_expand_(x.movedim(1, -1).view(b, p, n) if last else x.view(b, n, p), _flat(z, last), f, seed, dropout,
                       last)
    return x


def _mask(x, seed, dropout):
    """What drop multiplies the entries of x by: drop of ones."""
    ones = x.new_ones((x.shape[0], 1, *x.shape[2:]), dtype=_wide(x.dtype))
    mask = torch.zeros_like(x, dtype=ones.dtype)
    return _expand_(mask, ones, ones.new_ones(x.shape[1], 1), seed, dropout)


@torch.library.register_fake("torch_subspace::tucker_project")
def _(x, f, w, seed, dropout, last, need_z, need_df):
    b, n, p = x.shape if not last else (x.shape[0], x.shape[2], x.shape[1])
    shape = ((b, p, f.shape[1]) if last else (b, f.shape[1], p)) if need_z else (0, 0, 0)
    return x.new_empty(shape, dtype=_wide(x.dtype)), f.new_empty(f.shape if need_df else (0, 0), dtype=_wide(x.dtype))


@torch.library.register_fake("torch_subspace::tucker_expand_")
def _(x, z, f, seed, dropout, last):
    return None


# --------------------------------------------------------------------------------------------------- the two forms


def _conv(x, weight, bias, how):
    return torch.convolution(x, weight, bias, *how)


def _conv_backward(dy, x, weight, how, need):
    if not any(need):
        return None, None, None
    sizes = [dy.shape[1]] if need[2] else None
    if need[1] and x.dtype == torch.float64:  # there torch refuses the gradient of a weight with channels last
        weight = weight.contiguous()
    return _aten.convolution_backward(dy, x, weight, sizes, *how, need)


def _plain(x, weight, bias, delta, dropped, how):
    """The definition, in torch's own differentiable operations."""
    return _conv(x, weight, bias, how) + _conv(dropped, delta.to(x.dtype), None, how)


def _dropped(x, seed, dropout):
    return x * _mask(x, seed, dropout).to(x.dtype) if dropout else x


def _twice():
    """Is this backward itself to be differentiated? Then it runs by the plain formula."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _plain_gradients(function, inputs, need, dy):
    """Gradients that can be differentiated; each input has a name of its own, should one depend on another."""
    inputs = [t if t is None else t.view_as(t) for t in inputs]
    asked = [t for t, wanted in zip(inputs, need) if wanted]
    grads = iter(torch.autograd.grad(function(*inputs), asked, dy, create_graph=True))
    return [next(grads) if wanted else None for wanted in need]


class _Chain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, inner, u_in, u_out, seed, dropout, how):
        ctx.save_for_backward(x, weight, bias, inner, u_in, u_out, seed)
        ctx.dropout, ctx.how = dropout, how
        with _no_autocast(x):
            y = _conv(x, weight, bias, how)
            z = _conv(_project(x, u_in, seed, dropout)[0], inner, None, how)
            return _expand_(y, z, u_out, seed[:0], 0.0)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, inner, u_in, u_out, seed = ctx.saved_tensors
        need, dropout, how = ctx.needs_input_grad[:6], ctx.dropout, ctx.how
        with _no_autocast(x):
            if _twice():
                return *_plain_gradients(_chain_formula(seed, dropout, how), (x, weight, bias, inner, u_in, u_out),
                                         need, dy), None, None, None
            dx, dweight, dbias = _conv_backward(dy, x, weight, how, list(need[:3]))
            dinner = du_in = du_out = None
            if need[0] or any(need[3:]):
                z1 = z2 = None
                if need[3] or need[5]:
                    z1, _ = _project(x, u_in, seed, dropout)
                if need[5]:
                    z2 = _conv(z1, inner, None, how)
                h, du_out = _project(dy, u_out, seed[:0], 0.0, z2, need[0] or need[3] or need[4])
                if need[0] or need[3] or need[4]:
                    if z1 is None:
                        z1 = x.new_empty((x.shape[0], inner.shape[0 if how[3] else 1], *x.shape[2:]), dtype=h.dtype)
                    k, dinner, _ = _conv_backward(h, z1, inner, how, [need[0] or need[4], need[3], False])
                del z1, z2, h
                if need[4]:
                    _, du_in = _project(x, u_in, seed, dropout, k, False)
                if need[0]:
                    if dropout and _is_last(dx) != _is_last(x):  # the mask goes by places in x
                        turned = _expand_(torch.empty_like(x).copy_(dx), k, u_in, seed, dropout)
                        dx = torch.empty_like(dx).copy_(turned)
                    else:
                        dx = _expand_(dx, k, u_in, seed, dropout)
            return dx, dweight, dbias, dinner, du_in, du_out if need[5] else None, None, None, None


def _chain_formula(seed, dropout, how):
    def formula(x, weight, bias, inner, u_in, u_out):
        channels = (u_in, u_out) if how[3] else (u_out, u_in)
        delta = tucker_compose(inner, [*channels, *[None] * (inner.dim() - 2)])
        return _plain(x, weight, bias, delta, _dropped(x, seed, dropout), how)

    return formula


class _Composed(torch.autograd.Function):
    """`made` is W + dW, or dW alone where the base must not be touched (half types) or not dropped. It is made
    outside, so that tucker_compose's own backward takes its gradient to the parameters, and not kept: core and
    factors come along only to make it again."""

    @staticmethod
    def forward(ctx, x, weight, bias, made, seed, dropout, how, scale, core, *factors):
        ctx.save_for_backward(x, weight, bias, seed, core, *factors)
        ctx.dropout, ctx.how, ctx.scale = dropout, how, scale
        ctx.alone, ctx.last = bool(dropout) or x.dtype in _HALF, _is_last(weight)
        with _no_autocast(x):
            if not ctx.alone:
                return _conv(x, made, bias, how)
            # not in place: what a method changes and returns is a constant to torch 2.11's compiler
            return _conv(x, weight, bias, how) + _conv(_dropped(x, seed, dropout), made, None, how)

    @staticmethod
    def backward(ctx, dy):
        x, weight, bias, seed, core, *factors = ctx.saved_tensors
        need, dropout, how, alone = ctx.needs_input_grad[:4], ctx.dropout, ctx.how, ctx.alone
        none = (None,) * (5 + len(factors))

        def make():  # in a compiler's eyes a backward must not look at what tucker_compose checks: the op itself
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                made = tucker_compose(core, factors, scale=ctx.scale, base=None if alone else weight)
            else:
                none = core.new_empty(0)
                made = _op.tucker_compose(core, [none if f is None else f for f in factors], [] if alone else [weight],
                                          ctx.scale)
            return _like(made.to(x.dtype), ctx.last)

        def formula(x, weight, bias, made):
            if alone:
                return _plain(x, weight, bias, made, _dropped(x, seed, dropout), how)
            return _conv(x, made, bias, how)

        with _no_autocast(x):
            if _twice():
                need = (need[0], need[1] and alone, *need[2:])
                return *_plain_gradients(formula, (x, weight, bias, make()), need, dy), *none
            if not alone:
                dx, dmade, dbias = _gradients(dy, x, make() if need[0] else weight, how, [need[0], need[3], need[2]])
                return dx, None, dbias, dmade, *none
            dx, dweight, dbias = _gradients(dy, x, weight, how, list(need[:3]))
            again = _dropped(x, seed, dropout) if need[3] else x
            ddropped, dmade, _ = _gradients(dy, again, make() if need[0] else weight, how, [need[0], need[3], False])
            if need[0]:
                dx = dx + (ddropped * _mask(x, seed, dropout).to(x.dtype) if dropout else ddropped)
            return dx, dweight, dbias, dmade, *none


def _like(made, last):
    """In the weight's memory format, which decides on that of the result."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return made.contiguous(memory_format=formats[made.dim()]) if last and made.dim() in formats else made


def _gradients(dy, x, weight, how, need):
    """_conv_backward, but for the weight of a depthwise convolution on the CPU, where torch's takes its time."""
    stride, padding, dilation, transposed, _, groups = how
    direct = _depthwise is not None and groups > 1 and groups == x.shape[1] and not transposed and not x.is_cuda
    if not (need[1] and direct):
        return _conv_backward(dy, x, weight, how, need)
    dx, _, dbias = _conv_backward(dy, x, weight, how, [need[0], False, need[2]])
    dweight = _depthwise(x, dy, weight.shape[2:], stride, padding, dilation)
    return dx, dweight.to(weight.dtype), dbias


try:
    from .depthwise import depthwise_weight_gradient as _depthwise
except ImportError:
    _depthwise = None
