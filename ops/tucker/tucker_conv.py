"""A convolution with a Tucker-core adapter, of any kind torch has, without keeping its change of weight.

    y = conv(x, W + dW) + b,        dW = scale * core x_0 factor_0 x_1 factor_1 ...

Here is what users call: its checks, and the choice between the two forms of tucker_conv_forms.py by counted flops.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import (
    FLOATS,
    HALF,
    WIDE,
    autocast,
    check_dense,
    check_flag,
    check_word,
    exporting,
    transformed,
    wide_dtype,
)
from .tucker import as_factors, tucker_compose
from .tucker_conv_forms import Chain, Composed, in_format, is_last, plain
from .tucker_linear import check_options, draw_seed

_NAME = "tucker_conv"

FORMS = ("auto", "chain", "composed")

# The chain's products are skinny: a flop there is taken to cost as much as so many of a dense convolution.
SKINNY = 2.0


def tucker_conv(x: Tensor, weight: Tensor, bias: Tensor | None, core: Tensor, factors: Sequence[Tensor | None], *,
                scale: float = 1.0, stride: int | Sequence[int] = 1, padding: int | str | Sequence[int] = 0,
                dilation: int | Sequence[int] = 1, groups: int = 1, transposed: bool = False,
                output_padding: int | Sequence[int] = 0, form: str = "auto", dropout: float = 0.0,
                training: bool = True) -> Tensor:
    """Convolution of ``x`` with ``weight`` plus ``scale`` times the Tucker product of ``core`` and ``factors``.

    Args:
        x: ``(batch, in, *spatial)`` or ``(in, *spatial)``, 1 to 3 spatial dimensions, channels first or last in memory.
        weight: ``(out, in / groups, *kernel)``, or ``(in, out / groups, *kernel)`` when ``transposed``; of x's dtype.
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

    Differentiable in ``x``, ``weight``, ``bias``, ``core`` and ``factors`` any number of times; in forward
    mode and under torch.func by the plain formula. Kept for the backward: x and the parameters. Under
    autocast x, weight and bias are cast, the adapter is not.

    Raises:
        TypeError: a tensor is none, or its dtype does not fit.
        ValueError: shapes, devices, ``form``, ``padding``, ``dropout`` or another value do not fit.

    Source: arXiv 2405.14739.

    Example:
        >>> x, weight = torch.randn(2, 4, 8, 8), torch.randn(6, 4, 3, 3)
        >>> core, u, v = torch.zeros(2, 2, 3, 3), torch.randn(6, 2), torch.randn(4, 2)
        >>> y = ts.tucker_conv(x, weight, None, core, [u, v, None, None], padding=1)
        >>> torch.equal(y, torch.nn.functional.conv2d(x, weight, padding=1))
        True
    """
    x, weight, bias = autocast(x, weight, bias)
    factors = _check(x, weight, bias, core, factors, scale, groups, transposed, form, dropout, training)
    dims = weight.dim() - 2
    stride, dilation, output_padding = (_tuple(name, value, dims, least) for name, value, least in (
        ("stride", stride, 1), ("dilation", dilation, 1), ("output_padding", output_padding, 0)))
    batch = x if x.dim() == weight.dim() else x[None]
    batch, padding = _pad(batch, weight, padding, stride, dilation, transposed)
    how = (stride, padding, dilation, transposed, output_padding, groups)
    dropout = float(dropout) if training else 0.0

    core, *factors = (t if t is None else t.to(wide_dtype(x.dtype)) for t in (core, *factors))
    if transformed():
        y = plain(batch, weight, bias, tucker_compose(core, factors, scale=scale), F.dropout(batch, dropout), how)
    elif _chain_wanted(form, batch, weight, core, factors, how, dropout):
        # a factor that is square reduces nothing: the small convolution takes it in
        square = [f is not None and f.shape[0] == f.shape[1] for f in factors[:2]]
        within = [f if whole else None for f, whole in zip(factors, square)]
        inner = tucker_compose(core, [*within, *factors[2:]], scale=scale)
        ends = [None if whole else f for f, whole in zip(factors, square)]
        u_out, u_in = ends if not transposed else ends[::-1]
        y = Chain.apply(batch, weight, bias, inner, u_in, u_out, draw_seed(dropout, x.device), dropout, how)
    else:
        base = None if dropout or x.dtype in HALF else weight
        made = tucker_compose(core, factors, scale=scale, base=base)
        made = in_format(made.to(x.dtype), is_last(weight))
        seed = draw_seed(dropout, x.device)
        y = Composed.apply(batch, weight, bias, made, seed, dropout, how, float(scale), core, *factors)
    return y if x.dim() == weight.dim() else y[0]


def chain_is_cheaper(batch: int, inside: int, outside: int, weight, ranks, transposed: bool, training: bool) -> bool:
    """Is the chain cheaper than composing, for a dense convolution from ``inside`` to ``outside`` positions an image?

    With T positions, k entries of the kernel, I and O channels and ranks r_I and r_O, forward and backward take

        chain       2 T (I r_I + r_I r_O k + O r_O)      forward, and 2.5 times that backward; ends that
                                                         reduce nothing (I = r_I, O = r_O) are not there
        composed    2 O I k min(r_I, r_O)                each time W + dW is made and for the parameters' gradient,
                    2 T O I k                            dense gradient of the weight, when training

    flops, those of the chain SKINNY times as slow. T is that of the outputs, of the inputs where these are meant.
    """
    (o, i), (ro, ri) = (weight[1::-1], ranks[1::-1]) if transposed else (weight[:2], ranks[:2])
    k, middle = math.prod(weight[2:]), inside if transposed else outside
    chain = 2 * batch * (inside * i * ri * (i > ri) + middle * ri * ro * k + outside * o * ro * (o > ro))
    make = 2 * o * i * k * min(ri, ro)
    if not training:
        return SKINNY * chain <= make
    return SKINNY * 3.5 * chain <= 4 * make + 2 * batch * middle * o * i * k


def _chain_wanted(form, x, weight, core, factors, how, dropout):
    stride, padding, dilation, transposed, output_padding, groups = how
    if groups > 1 or form != "auto" or exporting():  # composed is all torch's own
        return form == "chain"
    if dropout or x.dtype in HALF:  # composed would be a second dense convolution
        return True
    if torch.compiler.is_compiling():  # sizes may be symbols: as for large images, where only channels decide
        return chain_is_cheaper(1 << 20, 1, 1, weight.shape, core.shape, transposed, True)
    outside = [(n - 1) * s - 2 * p + d * (k - 1) + q + 1 if transposed else (n + 2 * p - d * (k - 1) - 1) // s + 1
               for n, k, s, p, d, q in zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, output_padding)]
    training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (core, *factors))
    return chain_is_cheaper(x.shape[0], math.prod(x.shape[2:]), math.prod(outside), weight.shape, core.shape,
                            transposed, training)


# ---------------------------------------------------------------------------------------------------- input


def _check(x, weight, bias, core, factors, scale, groups, transposed, form, dropout, training):
    factors = as_factors(_NAME, factors)
    named = [("x", x, FLOATS), ("weight", weight, FLOATS), ("bias", bias, FLOATS), ("core", core, WIDE)]
    named += [(f"factors[{i}]", f, WIDE) for i, f in enumerate(factors)]
    for i, (what, t, allowed) in enumerate(named):
        if t is None and (i == 2 or i > 3):
            continue
        check_dense(_NAME, what, t)
        if t.dtype not in allowed:
            raise TypeError(f"{_NAME}: {what} must be {' or '.join(map(str, allowed))}, got {t.dtype}")
        if t.device != x.device:
            raise ValueError(f"{_NAME}: {what} must be on x's device {x.device}, got {t.device}")
        if 0 < i < 3 and t.dtype != x.dtype:
            raise TypeError(f"{_NAME}: x and {what} must share a dtype, got {x.dtype} and {t.dtype}")
    n = weight.dim()
    if not 3 <= n <= 5:
        raise ValueError(f"{_NAME}: weight must have 3 to 5 dimensions, got shape {tuple(weight.shape)}")
    if x.dim() not in (n, n - 1):
        raise ValueError(f"{_NAME}: x must have {n} dimensions, or {n - 1} without a batch, as weight has, got shape "
                         f"{tuple(x.shape)}")
    check_flag(_NAME, "transposed", transposed)
    if not isinstance(groups, int) or isinstance(groups, bool) or groups < 1:
        raise ValueError(f"{_NAME}: groups must be a positive int, got {groups!r}")
    if weight.shape[0] % groups:
        raise ValueError(f"{_NAME}: weight's {weight.shape[0]} rows are not {groups} groups")
    inputs = weight.shape[0] if transposed else weight.shape[1] * groups
    outputs = weight.shape[1] * groups if transposed else weight.shape[0]
    if x.shape[1 - n] != inputs:
        raise ValueError(f"{_NAME}: x has {x.shape[1 - n]} channels but weight takes {inputs}")
    if bias is not None and bias.shape != (outputs,):
        raise ValueError(f"{_NAME}: bias must be ({outputs},), got shape {tuple(bias.shape)} beside weight "
                         f"{tuple(weight.shape)}")
    if core.dim() != n or len(factors) != n:
        raise ValueError(f"{_NAME}: core must have {n} dimensions and a factor for each, got core {tuple(core.shape)} "
                         f"and {len(factors)} factors")
    if 0 in core.shape:
        raise ValueError(f"{_NAME}: core must not be empty, got shape {tuple(core.shape)}")
    for i, (f, r, d) in enumerate(zip(factors, core.shape, weight.shape)):
        if r != d if f is None else f.shape != (d, r):
            raise ValueError(f"{_NAME}: factors[{i}] must be ({d}, {r}) for this weight, or None where the rank is the "
                             f"size, got {None if f is None else tuple(f.shape)}")
    check_word(_NAME, "form", form, FORMS)
    if form == "chain" and groups > 1:
        raise ValueError(f"{_NAME}: the chain takes no groups, got groups={groups}")
    check_options(_NAME, scale, dropout, training)
    return factors


def _tuple(name, value, dims, least):
    values = (value,) * dims if isinstance(value, int) else tuple(value) if isinstance(value, Sequence) else ()
    if len(values) != dims or not all(isinstance(v, int) and not isinstance(v, bool) and v >= least for v in values):
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
