"""The two forms in which a convolution with a Tucker-core adapter is computed; tucker_conv.py chooses among them.

`chain`: dW is itself a chain of three convolutions, pointwise into the rank of the inputs, a small one there,
pointwise out of the rank of the outputs,

    z1 = U_in' drop(x)      z2 = conv(z1, C)      y = conv(x, W) + b + U_out z2      C = scale core x_2 K ...
    h  = U_out' dy          k  = conv'(h, C)      dx = conv'(dy, W) + drop(U_in k)
    dU_out = sum dy z2'     dC = d<h, conv(z1, C)>/dC                dU_in = sum drop(x) k'

where only x is kept; the ends are one pass each over x, y, dy or dx (cpu/tucker/tucker_conv.c). `composed`: W + dW is
made for one convolution, dropped at once and made again for dx; the parameters' gradient comes from that of W.
FLoRA, arXiv 2405.14739; the chain is Tucker-2 as in Kim et al., arXiv 1511.06530.
"""
from __future__ import annotations

import contextlib
import math

import torch

from ..common import HALF, plain_gradients, wide_dtype
from .depthwise import depthwise_weight_gradient
from .tucker import tucker_compose

_op = torch.ops.torch_subspace
_aten = torch.ops.aten


# ---------------------------------------------------------------------------------------------- the pointwise ends


def is_last(t):
    """Channels last in memory; an image of one position is both, and then the vectors run along the channels."""
    return (t.movedim(1, -1).is_contiguous() and not t.is_contiguous()) or math.prod(t.shape[2:]) == 1


def _flat(t, last):
    b, n, p = *t.shape[:2], math.prod(t.shape[2:])
    return t.movedim(1, -1).reshape(b, p, n) if last else t.reshape(b, n, p)


def _project(x, f, seed, dropout, w=None, need_z=True):
    """z = f' drop(x) and, given w, df = sum drop(x) w'; f None is the identity."""
    if f is None:
        return x.to(wide_dtype(x.dtype)) * mask(x, seed, dropout) if dropout else x.to(wide_dtype(x.dtype)), None
    last, spatial = is_last(x), x.shape[2:]
    inner = x.new_empty(0, 0, 0) if w is None else _flat(w, last)
    z, df = _op.tucker_project(_flat(x, last), f, inner, seed, dropout, last, need_z, w is not None)
    if need_z:
        b, r = x.shape[0], f.shape[1]
        z = z.view(b, *spatial, r).movedim(-1, 1) if last else z.view(b, r, *spatial)
        # a small convolution is twice as fast with its channels last, and z is small enough to be turned
        z = in_format(z, not last and z.dtype == torch.float32 and not x.is_cuda)
    return z, df


def _expand_(x, z, f, seed, dropout):
    """x += drop(f z), in place wherever torch's convolution returned something dense."""
    if f is None:
        return (x + (z * mask(x, seed, dropout) if dropout else z)).to(x.dtype)
    last = is_last(x)
    if not last and not x.is_contiguous():
        x = x.contiguous()
    b, n, p = *x.shape[:2], math.prod(x.shape[2:])
    _op.tucker_expand_(x.movedim(1, -1).view(b, p, n) if last else x.view(b, n, p), _flat(z, last), f, seed, dropout,
                       last)
    return x


def mask(x, seed, dropout):
    """What drop multiplies the entries of x by: drop of ones."""
    ones = x.new_ones((x.shape[0], 1, *x.shape[2:]), dtype=wide_dtype(x.dtype))
    zeros = torch.zeros_like(x, dtype=ones.dtype)
    return _expand_(zeros, ones, ones.new_ones(x.shape[1], 1), seed, dropout)


@torch.library.register_fake("torch_subspace::tucker_project")
def _(x, f, w, seed, dropout, last, need_z, need_df):
    b, n, p = x.shape if not last else (x.shape[0], x.shape[2], x.shape[1])
    shape = ((b, p, f.shape[1]) if last else (b, f.shape[1], p)) if need_z else (0, 0, 0)
    dtype = wide_dtype(x.dtype)
    return x.new_empty(shape, dtype=dtype), f.new_empty(f.shape if need_df else (0, 0), dtype=dtype)


@torch.library.register_fake("torch_subspace::tucker_expand_")
def _(x, z, f, seed, dropout, last):
    return None


# --------------------------------------------------------------------------------------------------- the two forms


def _no_autocast(x):
    """The casts are done: what is wide stays so."""
    if x.is_meta or not torch.is_autocast_enabled(x.device.type):
        return contextlib.nullcontext()
    return torch.autocast(x.device.type, enabled=False)


def _conv(x, weight, bias, how):
    return torch.convolution(x, weight, bias, *how)


def _conv_backward(dy, x, weight, how, need):
    if not any(need):
        return None, None, None
    sizes = [dy.shape[1]] if need[2] else None
    stride, padding, *_, transposed, _, _ = how
    pointwise = math.prod(weight.shape[2:]) == 1 and not any(padding) and not transposed
    if (need[1] or need[2]) and pointwise and max(stride) > 1:
        # The weight meets the positions that the strides visit, so they alone are taken. Nor is torch's own way safe:
        # where a processor has AVX2 alone it writes beyond its buffers for fewer than eight channels that come last.
        visited = x[(..., *(slice(None, None, s) for s in stride))]
        dx, _, _ = _conv_backward(dy, x, weight, how, [need[0], False, False])
        _, dweight, dbias = _conv_backward(dy, visited, weight, ([1] * len(stride), *how[1:]), [False, *need[1:]])
        return dx, dweight, dbias
    if need[0] and not x.is_cuda and _is_patches(weight, how):
        _, dweight, dbias = _conv_backward(dy, x, weight, how, [False, *need[1:]])
        return _patch_gradient(dy, x, weight), dweight, dbias
    if need[1] and x.dtype == torch.float64:  # there torch refuses the gradient of a weight with channels last
        weight = weight.contiguous()
    return _aten.convolution_backward(dy, x, weight, sizes, *how, need)


def _is_patches(weight, how):
    """Side by side, of few channels: torch's gradient of the input takes several times as long as the forward there."""
    stride, padding, dilation, transposed, _, groups = how
    size = list(weight.shape[2:])
    return (weight.shape[1] < 8 and size == list(stride) and math.prod(size) > 1 and not any(padding)
            and all(d == 1 for d in dilation) and not transposed and groups == 1)


def _patch_gradient(dy, x, weight):
    """dx of such a convolution: each entry is in one patch, so it is one product, put in its place."""
    kernel, count = weight.shape[2:], dy.shape[2:]
    whole = all(n * k == size for n, k, size in zip(count, kernel, x.shape[2:]))
    dx = torch.empty_like(x) if whole else torch.zeros_like(x)
    patches, n = dx, len(kernel)
    for i in range(n):  # (b, channels, count, kernel, count, kernel, ...)
        patches = patches.narrow(2 + 2 * i, 0, count[i] * kernel[i]).unflatten(2 + 2 * i, (count[i], kernel[i]))
    product = (weight.flatten(1).mT @ dy.flatten(2)).view(x.shape[0], x.shape[1], *kernel, *count)
    patches.copy_(product.permute(0, 1, *(at for i in range(n) for at in (2 + n + i, 2 + i))))
    return dx


def plain(x, weight, bias, delta, dropped, how):
    """The definition, in torch's own differentiable operations."""
    return _conv(x, weight, bias, how) + _conv(dropped, delta.to(x.dtype), None, how)


def _dropped(x, seed, dropout):
    return x * mask(x, seed, dropout).to(x.dtype) if dropout else x


def _twice():
    """Is this backward itself to be differentiated? Then it runs by the plain formula."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


class Chain(torch.autograd.Function):
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
                return *plain_gradients(_chain_formula(seed, dropout, how), (x, weight, bias, inner, u_in, u_out),
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
                    if dropout and is_last(dx) != is_last(x):  # the mask goes by places in x
                        turned = _expand_(torch.empty_like(x).copy_(dx), k, u_in, seed, dropout)
                        dx = torch.empty_like(dx).copy_(turned)
                    else:
                        dx = _expand_(dx, k, u_in, seed, dropout)
            return dx, dweight, dbias, dinner, du_in, du_out if need[5] else None, None, None, None


def _chain_formula(seed, dropout, how):
    def formula(x, weight, bias, inner, u_in, u_out):
        channels = (u_in, u_out) if how[3] else (u_out, u_in)
        delta = tucker_compose(inner, [*channels, *[None] * (inner.dim() - 2)])
        return plain(x, weight, bias, delta, _dropped(x, seed, dropout), how)

    return formula


class Composed(torch.autograd.Function):
    """`made` is W + dW, or dW alone where the base must not be touched (half types) or not dropped. It is made
    outside, so that tucker_compose's own backward takes its gradient to the parameters, and not kept: core and
    factors come along only to make it again."""

    @staticmethod
    def forward(ctx, x, weight, bias, made, seed, dropout, how, scale, core, *factors):
        ctx.save_for_backward(x, weight, bias, seed, core, *factors)
        ctx.dropout, ctx.how, ctx.scale = dropout, how, scale
        ctx.alone, ctx.last = bool(dropout) or x.dtype in HALF, is_last(weight)
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
            return in_format(made.to(x.dtype), ctx.last)

        def formula(x, weight, bias, made):
            if alone:
                return plain(x, weight, bias, made, _dropped(x, seed, dropout), how)
            return _conv(x, made, bias, how)

        with _no_autocast(x):
            if _twice():
                need = (need[0], need[1] and alone, *need[2:])
                return *plain_gradients(formula, (x, weight, bias, make()), need, dy), *none
            if not alone:
                dx, dmade, dbias = _gradients(dy, x, make() if need[0] else weight, how, [need[0], need[3], need[2]])
                return dx, None, dbias, dmade, *none
            dx, dweight, dbias = _gradients(dy, x, weight, how, list(need[:3]))
            again = _dropped(x, seed, dropout) if need[3] else x
            ddropped, dmade, _ = _gradients(dy, again, make() if need[0] else weight, how, [need[0], need[3], False])
            if need[0]:
                dx = dx + (ddropped * mask(x, seed, dropout).to(x.dtype) if dropout else ddropped)
            return dx, dweight, dbias, dmade, *none


def in_format(made, last):
    """In the weight's memory format, which decides on that of the result."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return made.contiguous(memory_format=formats[made.dim()]) if last and made.dim() in formats else made


def _gradients(dy, x, weight, how, need):
    """_conv_backward, but for the weight of a depthwise convolution on the CPU, or of one with small groups, where
    torch's takes its time: from eight channels a group on, or with few columns, it is the faster one."""
    stride, padding, dilation, transposed, _, groups = how
    small = weight.shape[1] == 1 or weight.shape[1] < 8 <= dy.shape[-1]
    if not (need[1] and small and groups > 1 and not transposed and not x.is_cuda):
        return _conv_backward(dy, x, weight, how, need)
    dx, _, dbias = _conv_backward(dy, x, weight, how, [need[0], False, need[2]])
    dweight = depthwise_weight_gradient(x, dy, weight.shape[2:], stride, padding, dilation, groups)
    return dx, dweight.to(weight.dtype), dbias
