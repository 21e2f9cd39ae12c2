"""Tucker convolutions of every kind, and their composed float64 form."""

import functools
import warnings

import helpers
import reference as ref
import torch

import torch_subspace as ts

OP = torch.ops.torch_subspace
FORMS = ["chain", "composed"]
CONV = {3: torch.nn.functional.conv1d, 4: torch.nn.functional.conv2d, 5: torch.nn.functional.conv3d}
TRANSPOSED = {3: torch.nn.functional.conv_transpose1d, 4: torch.nn.functional.conv_transpose2d,
              5: torch.nn.functional.conv_transpose3d}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
NONE = torch.empty(0, dtype=torch.int64)
close = functools.partial(helpers.close, floor=1e-3)


def base(x, weight, bias=None, *, stride=1, padding=0, dilation=1, groups=1, transposed=False, output_padding=0):
    """torch's own convolution with tucker_conv's arguments."""
    if transposed:
        return TRANSPOSED[weight.dim()](x, weight, bias, stride, padding, output_padding, groups, dilation)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an uneven "same" makes a copy
        return CONV[weight.dim()](x, weight, bias, stride, padding, dilation, groups)


def composed(x, weight, bias, core, *factors, scale=1.0, **options):
    """The truth: one convolution with the composed weight."""
    return base(x, ref.tucker(core, factors, scale=scale, base=weight), bias, **options)


def problem(spatial=(7, 6), channels=(6, 8), ranks=(3, 2), kernel=3, *, batch=2, dtype=torch.float64, last=False,
            groups=1, transposed=False, seed=0):
    """x, weight, bias, core, factor, factor, factor, ... with the identity on the last mode."""
    g = torch.Generator().manual_seed(seed + sum(spatial) + sum(channels))
    (inputs, outputs), n = channels, len(spatial)
    wide = torch.float64 if dtype == torch.float64 else torch.float32

    def randn(*shape, dtype=wide):
        return torch.randn(*shape, dtype=torch.float64, generator=g).to(dtype)

    kernel = (kernel,) * n if isinstance(kernel, int) else kernel
    shape = ((inputs, outputs // groups) if transposed else (outputs, inputs // groups)) + kernel
    ranks = tuple(min(r, d) for r, d in zip(ranks, shape))
    x = randn(batch, inputs, *spatial, dtype=dtype)
    weight = randn(*shape, dtype=dtype)
    if last and n > 1:
        x, weight = (t.contiguous(memory_format=LAST[n + 2]) for t in (x, weight))
    inner = (*(min(2, k) for k in kernel[:-1]), kernel[-1])
    factors = [randn(d, r) for d, r in zip(shape, (*ranks, *inner))]
    return [x, weight, randn(outputs, dtype=dtype), randn(*ranks, *inner), *factors[:-1], None]


def both(inputs, **options):
    """(values, every gradient) of ours in the inputs' dtypes and of the truth in float64 at the same points."""
    out, ours_only = [], {k: options.pop(k) for k in ("form", "dropout", "training") if k in options}
    for wide in (False, True):
        leaves = [t if t is None else t.detach().double().contiguous() if wide else t.detach() for t in inputs]
        leaves = [t if t is None else t.requires_grad_() for t in leaves]
        f = composed if wide else lambda x, w, b, c, *u, **o: ts.tucker_conv(x, w, b, c, u, **o, **ours_only)
        y = f(*leaves, **options)
        dy = helpers.normal(*y.shape, seed=1, dtype=y.dtype)
        out.append((y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)))
    return out


KINDS = {  # spatial, transposed, options
    "1d": ((9,), False, {"padding": 1}),
    "2d": ((7, 6), False, {"padding": 1}),
    "3d": ((5, 4, 6), False, {"padding": 1}),
    "stride": ((9, 8), False, {"stride": 2, "padding": (1, 0)}),
    "dilation": ((9, 8), False, {"dilation": (1, 2), "padding": 2}),
    "valid": ((7, 6), False, {"padding": "valid"}),
    "same": ((7, 6), False, {"padding": "same", "dilation": 2}),
    "1d transposed": ((6,), True, {"padding": 1}),
    "2d transposed": ((5, 6), True, {"stride": 2, "padding": 1, "output_padding": 1}),
    "3d transposed": ((3, 4, 3), True, {"dilation": 2, "stride": 2, "output_padding": (1, 0, 1)}),
}
