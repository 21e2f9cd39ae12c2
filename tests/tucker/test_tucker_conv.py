"""Tucker convolutions: every kind against the composed float64 form, the facts of the adapter, and what is refused."""

import importlib
import warnings

import pytest
import reference as ref
import torch
from hypothesis import given, settings, strategies

import torch_subspace as ts
import torch_subspace.tucker.tucker_conv_forms as forms

module = importlib.import_module("torch_subspace.tucker.tucker_conv")  # the function has the module's name

OP = torch.ops.torch_subspace
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
FORMS = ["chain", "composed"]
CONV = {3: torch.nn.functional.conv1d, 4: torch.nn.functional.conv2d, 5: torch.nn.functional.conv3d}
TRANSPOSED = {3: torch.nn.functional.conv_transpose1d, 4: torch.nn.functional.conv_transpose2d,
              5: torch.nn.functional.conv_transpose3d}
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
NONE = torch.empty(0, dtype=torch.int64)


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
        dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        out.append((y.detach(), *torch.autograd.grad(y, [t for t in leaves if t is not None], dy)))
    return out


def close(ours, truth, tolerance):
    for a, b in zip(ours, truth, strict=True):
        assert a.shape == b.shape
        assert (a.double() - b).abs().max() <= tolerance * b.abs().max().clamp(min=1e-3)


# ------------------------------------------------------------------------------------------------------------- values

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


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_matches_the_composed_form(kind, dtype, form, last):
    spatial, transposed, options = KINDS[kind]
    inputs = problem(spatial, dtype=dtype, last=last, transposed=transposed)
    close(*both(inputs, form=form, transposed=transposed, scale=0.7, **options), TOLERANCE[dtype])


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("groups, channels, transposed", [(2, (6, 8), False), (6, (6, 6), False), (6, (6, 12), False),
                                                          (2, (6, 8), True), (6, (6, 6), True)])
def test_groups_are_composed(groups, channels, transposed, dtype, last):
    for spatial in ((9,), (7, 6), (4, 5, 3)):
        inputs = problem(spatial, channels, dtype=dtype, last=last, groups=groups, transposed=transposed)
        close(*both(inputs, groups=groups, transposed=transposed, padding=1, stride=2, scale=1.3), TOLERANCE[dtype])


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("shape", [(70, 33, 17, 24, 19), (40, 64, 16, 16, 5), (3, 50, 3, 9, 14), (130, 5, 33, 4, 1)])
def test_larger_chains(shape, last):
    inputs_, outputs, ri, ro, size = shape
    inputs = problem((size, size), (inputs_, outputs), (ro, ri), dtype=torch.float32, last=last, batch=3)
    close(*both(inputs, form="chain", padding=1), 1e-4)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=strategies.data(), n=strategies.integers(1, 3), transposed=strategies.booleans(),
       last=strategies.booleans(), form=strategies.sampled_from(["auto", *FORMS]), batch=strategies.integers(1, 3))
def test_any_geometry(data, n, transposed, last, form, batch):
    def ints(low, high):
        return tuple(data.draw(strategies.integers(low, high)) for _ in range(n))

    kernel, stride, dilation, padding = ints(1, 3), ints(1, 3), ints(1, 2), ints(0, 1)
    spatial = tuple(d * (k - 1) + 1 + extra for d, k, extra in zip(dilation, kernel, ints(0, 4)))
    channels, ranks = data.draw(strategies.tuples(*[strategies.integers(1, 20)] * 2)), (3, 2)
    options = {"output_padding": tuple(max(s, d) - 1 for s, d in zip(stride, dilation))} if transposed else {}
    if transposed:
        padding = (0,) * n
    inputs = problem(spatial, channels, ranks, kernel, batch=batch, last=last, transposed=transposed)
    close(*both(inputs, form=form, transposed=transposed, stride=stride, dilation=dilation, padding=padding, **options),
          1e-11)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("groups", [1, 2])
def test_half_types(dtype, tolerance, form, groups):
    if groups > 1 and form == "chain":
        pytest.skip("the chain takes no groups")
    for last in (False, True):
        inputs = problem(dtype=dtype, last=last, groups=groups)
        ours, truth = both(inputs, form=form, padding=1, groups=groups)
        assert [t.dtype for t in ours[1:]] == [t.dtype for t in inputs if t is not None] and ours[0].dtype == dtype
        close(ours, truth, tolerance)


def test_a_half_base_keeps_a_delta_that_its_weights_would_lose():
    x, w, b, core, *factors = problem((8, 8), (32, 32), (4, 4), dtype=torch.bfloat16)
    core = core * 1e-4
    truth = composed(*(t if t is None else t.double() for t in (x, torch.zeros_like(w), None, core, *factors)))
    for form in FORMS:
        y = ts.tucker_conv(x, torch.zeros_like(w), None, core, factors, form=form)
        assert (y.double() - truth).abs().max() < 2e-2 * truth.abs().max()


@pytest.mark.parametrize("kernel", [2, 4, (2, 3), (5, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_same_padding_may_be_uneven(kernel, form):
    inputs = problem((7, 8), kernel=kernel)
    for dilation in (1, 2, 3):
        close(*both(inputs, form=form, padding="same", dilation=dilation), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_without_a_batch(form):
    for spatial in ((9,), (7, 6), (4, 5, 3)):
        inputs = problem(spatial, batch=1)
        inputs[0] = inputs[0][0]
        close(*both(inputs, form=form, padding=1), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_identity_factors(form):
    """A rank of the whole size needs no factor, on any mode."""
    for last in (False, True):
        x, w, b, core, *factors = problem((7, 6), (4, 5), (5, 4), last=last)
        full = torch.randn(5, 4, 3, 3, dtype=torch.float64)
        close(*both([x, w, b, full, None, None, None, None], form=form, padding=1), 1e-12)
        close(*both([x, w, b, full, factors[0], None, None, None], form=form, padding=1), 1e-12)
        close(*both([x, w, b, full, None, factors[1], None, None], form=form, padding=1), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_strided_inputs(form):
    x, w, b, core, *factors = problem((7, 6), (6, 8))
    dense = ts.tucker_conv(x, w, b, core, factors, form=form, padding=1)
    wide = torch.stack([x, x], -1)[..., 0]
    factors_t = [f if f is None else f.T.contiguous().T for f in factors]
    assert torch.allclose(ts.tucker_conv(wide, w, b, core, factors_t, form=form, padding=1), dense, atol=1e-12)
    mixed = x.contiguous(memory_format=torch.channels_last).requires_grad_()  # weight first, x last
    y = ts.tucker_conv(mixed, w, b, core.requires_grad_(), factors, form=form, padding=1)
    assert torch.allclose(y, dense, atol=1e-12)
    y.sum().backward()  # a gradient of zero strides
    assert mixed.grad.isfinite().all() and core.grad.isfinite().all()


def test_a_sequence_that_is_stored_last():
    """A transformer's (batch, length, channels), seen as channels first without a copy."""
    inputs = problem((9,), (6, 8))
    inputs[0] = inputs[0].mT.contiguous().mT
    close(*both(inputs, form="chain", padding=1), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_to_do(form):
    x, w, b, core, *factors = problem()
    leaves = [t.requires_grad_() for t in (x[:0], core, *factors[:3])]
    y = ts.tucker_conv(leaves[0], w, b, leaves[1], factors, form=form)
    assert y.shape == (0, 8, 5, 4)
    y.sum().backward()
    assert leaves[0].grad.shape == x[:0].shape and not core.grad.any() and not factors[0].grad.any()


# -------------------------------------------------------------------------------------------------------------- facts


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_zero_core_gives_the_base_bit_for_bit(kind, form, dtype, last):
    spatial, transposed, options = KINDS[kind]
    x, w, b, core, *factors = problem(spatial, dtype=dtype, last=last, transposed=transposed)
    for dropout in (0.0, 0.5):
        x.requires_grad_()
        y = ts.tucker_conv(x, w, b, torch.zeros_like(core), factors, form=form, transposed=transposed, dropout=dropout,
                           **options)
        truth = base(x, w, b, transposed=transposed, **options)
        assert torch.equal(y, truth) and y.stride() == truth.stride()
        dx, dtruth = (torch.autograd.grad(t, x, torch.ones_like(t))[0] for t in (y, truth))
        assert torch.equal(dx, dtruth) and dx.stride() == dtruth.stride()


def test_a_pointwise_convolution_is_a_linear_layer():
    x, w, b, core, *_ = problem((7, 6), kernel=1, dtype=torch.float32)
    u, v = torch.randn(8, 3), torch.randn(6, 2)
    linear = ts.tucker_linear(x.movedim(1, -1), w[:, :, 0, 0], b, core[:, :, 0, 0], u, v.T, scale=0.5).movedim(-1, 1)
    for form in FORMS:
        y = ts.tucker_conv(x, w, b, core, [u, v, None, None], scale=0.5, form=form)
        assert torch.allclose(y, linear, atol=1e-4)


def test_the_forms_are_one_function():
    inputs = problem((14, 14), (32, 48), (8, 8), dtype=torch.float32)
    chain, comp = (both(inputs, form=form, padding=1)[0] for form in FORMS)
    close(chain, [t.double() for t in comp], 1e-5)


def test_the_rank_of_what_the_adapter_adds():
    x, w, b, core, *factors = problem((14, 14), (32, 48), (3, 4))
    y = ts.tucker_conv(x, torch.zeros_like(w), None, core, factors, form="chain").movedim(1, -1).reshape(-1, 48)
    assert torch.linalg.matrix_rank(y) == 3


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
def test_dropout(form, last):
    """The mask is a function of the seed and of the place in memory; the gradients use the forward's."""
    inputs = [t if t is None else t.requires_grad_() for t in problem((7, 6), (40, 8), last=last, dtype=torch.float64)]
    x, w, b, core, *factors = inputs
    leaves = [t for t in inputs if t is not None]
    torch.manual_seed(3)
    y = ts.tucker_conv(x, w, b, core, factors, form=form, dropout=0.3, padding=1)
    grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
    torch.manual_seed(3)
    mask = forms.mask(x, module.draw_seed(0.3, x.device), 0.3)
    assert (mask[mask != 0] - 1 / 0.7).abs().max() < 1e-12 and 0.2 < (mask == 0).double().mean() < 0.4
    truth = base(x, w, b, padding=1) + base(x * mask, ref.tucker(core, factors), None, padding=1)
    close((y, *grads), (truth, *torch.autograd.grad(truth, leaves, torch.ones_like(y))), 1e-12)
    calm = ts.tucker_conv(x, w, b, core, factors, form=form, dropout=0.3, training=False, padding=1)
    assert torch.equal(calm, ts.tucker_conv(x, w, b, core, factors, form=form, padding=1))


def test_the_mask_is_splitmix():
    """The same as tucker_linear's and the GPU's: SplitMix64 of the seed and the flat index."""
    seed, x = torch.tensor([-12345]), torch.zeros(2, 3, 5, 4, dtype=torch.float64)
    expected = []
    for i in range(x.numel()):
        h = (-12345 + (i + 1) * 0x9E3779B97F4A7C15) % (1 << 64)
        h = (h ^ (h >> 30)) * 0xBF58476D1CE4E5B9 % (1 << 64)
        h = (h ^ (h >> 27)) * 0x94D049BB133111EB % (1 << 64)
        expected.append(0.0 if ((h ^ (h >> 31)) >> 40) / (1 << 24) < 0.3 else 1 / 0.7)
    first = forms.mask(x, seed, 0.3)
    assert torch.allclose(first.flatten(), torch.tensor(expected, dtype=torch.float64))
    last = forms.mask(x.contiguous(memory_format=torch.channels_last), seed, 0.3)
    assert torch.equal(last.movedim(1, -1).flatten(), first.flatten())


def test_only_x_and_the_parameters_are_kept():
    for form in FORMS:
        inputs = [t if t is None else t.requires_grad_() for t in problem((14, 14), (16, 24), dtype=torch.float32)]
        known, kept = {t.data_ptr() for t in inputs if t is not None}, []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            ts.tucker_conv(*inputs[:4], inputs[4:], form=form, padding=1, dropout=0.1, training=form == "chain")
        others = [t for t in kept if t.data_ptr() not in known]
        assert sum(t.numel() for t in others) <= 2 * inputs[3].numel() + 200, [t.shape for t in others]


def test_the_rule():
    def cheaper(shape, hw, stride=1, rank=16, training=True):
        ranks = (min(rank, shape[0]), min(rank, shape[1]), *shape[2:])
        return ts_rule(8, hw * hw, (hw // stride) ** 2, shape, ranks, False, training)

    ts_rule = module.chain_is_cheaper
    assert cheaper((256, 256, 3, 3), 56) and cheaper((64, 64, 3, 3), 56) and cheaper((512, 512, 3, 3), 7)
    assert cheaper((2048, 512, 1, 1), 7) and not cheaper((64, 256, 1, 1), 56)
    assert not cheaper((256, 256, 3, 3), 56, training=False)  # nothing but W + dW to make


# ------------------------------------------------------------------------------------------------- torch's machinery


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["1d", "2d", "2d transposed", "same"])
def test_gradcheck(kind, form):
    spatial, transposed, options = KINDS[kind]
    inputs = problem(tuple(4 for _ in spatial), (3, 2), (2, 2), 2, batch=1, transposed=transposed)
    leaves = [t.requires_grad_() for t in inputs if t is not None]

    def f(x, w, b, c, *u):
        return ts.tucker_conv(x, w, b, c, [*u, None], form=form, transposed=transposed, scale=0.7, **options)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_gradcheck_with_dropout_and_groups(form):
    groups = 1 if form == "chain" else 2
    inputs = problem((4, 4), (4, 2), (2, 2), 2, batch=1, groups=groups)
    leaves = [t.requires_grad_() for t in inputs if t is not None]

    def f(x, w, b, c, *u):
        torch.manual_seed(5)
        return ts.tucker_conv(x, w, b, c, [*u, None], form=form, groups=groups, dropout=0.4)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves, atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_only_the_gradients_that_are_asked_for(form):
    inputs = problem()
    names = [i for i, t in enumerate(inputs) if t is not None]
    full = dict(zip([None, *names], both(inputs, form=form, padding=1)[1]))
    for asked in [[i] for i in names] + [[0, 3], [3, 4, 5], [0, 4], [1, 5]]:
        leaves = [t if t is None else t.detach().clone().requires_grad_(i in asked) for i, t in enumerate(inputs)]
        y = ts.tucker_conv(*leaves[:4], leaves[4:], form=form, padding=1)
        dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        y.backward(dy)
        for i, t in enumerate(leaves):
            if i in asked:
                close([t.grad], [full[i]], 1e-12)
            elif t is not None:
                assert t.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    x, f, w = torch.randn(2, 6, 9).to(dtype), torch.randn(6, 3), torch.randn(2, 3, 9)
    seed = torch.tensor([7])
    for last in (False, True):
        a, b = (t.mT.contiguous() if last else t for t in (x, w))
        for needs in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(OP.tucker_project, (a, f, b, seed, 0.3, last, *needs))
        torch.library.opcheck(OP.tucker_expand_, (a, b, f, NONE, 0.0, last))


@pytest.mark.slow
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("form, groups", [("chain", 1), ("composed", 1), ("composed", 2)])
def test_compile_without_graph_breaks(form, groups, dropout):
    torch._dynamo.reset()
    inputs = problem((9, 8), dtype=torch.float32, groups=groups)
    leaves = [t.requires_grad_() for t in inputs if t is not None]

    def loss(x, w, b, c, *u):
        y = ts.tucker_conv(x.relu(), w, b, c, [*u, None], form=form, groups=groups, padding=1, dropout=dropout)
        return y.square().mean()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(2)
    ours = torch.autograd.grad(compiled(*leaves), leaves)
    torch.manual_seed(2)
    eager = torch.autograd.grad(loss(*leaves), leaves)
    assert all(torch.allclose(a, e, rtol=1e-4, atol=1e-4 * e.abs().max().item()) for a, e in zip(ours, eager))


class Layer(torch.nn.Module):
    def __init__(self, inputs, **options):
        super().__init__()
        self.weight, self.bias, self.core, self.u, self.v, self.k = (torch.nn.Parameter(t.clone()) for t in inputs[1:7])
        self.options = options

    def forward(self, x):
        factors = [self.u, self.v, self.k, None]
        return ts.tucker_conv(x, self.weight, self.bias, self.core, factors, padding=1, **self.options)


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_default_compiler(form):
    torch._dynamo.reset()
    inputs = problem((9, 8), dtype=torch.float32)
    layer = Layer(inputs, form=form)
    compiled = torch.compile(layer, fullgraph=True)
    grads = []
    for f in (layer, compiled):
        layer.zero_grad()
        f(inputs[0]).square().sum().backward()
        grads.append([p.grad for p in layer.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item()) for a, b in zip(*grads))


@pytest.mark.parametrize("form", FORMS)
def test_export(form):
    inputs = problem((9, 8), dtype=torch.float32, batch=4)
    layer = Layer(inputs, form=form)
    program = torch.export.export(layer, (inputs[0],), dynamic_shapes=({0: torch.export.Dim("b", min=2, max=64)},))
    if form == "chain":
        assert "torch_subspace.tucker_project" in program.graph_module.code
    assert torch.allclose(program.module()(inputs[0]), layer(inputs[0]), atol=1e-4)
    more = inputs[0].repeat(3, 1, 1, 1)
    assert torch.allclose(program.module()(more), layer(more), atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_checkpointing(form, reentrant):
    inputs = problem((9, 8), dtype=torch.float32)
    layer, grads = Layer(inputs, form=form, dropout=0.3), []
    for kept in (False, True):
        x = inputs[0].clone().requires_grad_()
        torch.manual_seed(4)
        y = layer(x) if kept else torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=reentrant)
        grads.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
                     if kept or not reentrant else None)
        if grads[-1] is None:
            y.square().sum().backward()
            grads[-1] = [x.grad, *(p.grad for p in layer.parameters())]
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_is_what_it_is_for_a_convolution(dtype, form):
    inputs = problem((9, 8), dtype=torch.float32)
    leaves = [t.requires_grad_() for t in inputs if t is not None]
    x, w, b, core, *factors = leaves
    with torch.autocast("cpu", dtype=dtype):
        y = ts.tucker_conv(x, w, b, core, [*factors, None], form=form, padding=1)
        assert torch.equal(ts.tucker_conv(x, w, b, core * 0, [*factors, None], form=form, padding=1),
                           base(x, w, b, padding=1))
        assert ts.tucker_conv(*(t if t is None else t.double() for t in inputs[:4]),
                              [t if t is None else t.double() for t in inputs[4:]]).dtype == torch.float64
        inside = torch.autograd.grad(y.float().square().sum(), leaves, retain_graph=True)
    outside = torch.autograd.grad(y.float().square().sum(), leaves)
    assert y.dtype == dtype and all(torch.equal(a, b) for a, b in zip(inside, outside))
    assert all(g.dtype == torch.float32 for g in outside)
    truth = composed(*(t if t is None else t.double() for t in inputs), padding=1)
    close([y], [truth], 3e-2)


def test_torch_func_and_forward_mode():
    inputs = problem((5, 4), (3, 4))
    x, w, b, core, *factors = inputs
    v = torch.randn_like(core)
    for form in FORMS:
        y, tangent = torch.func.jvp(lambda c, f=form: ts.tucker_conv(x, w, b, c, factors, form=f), (core,), (v,))
        truth, expected = torch.func.jvp(lambda c: composed(x, w, b, c, *factors), (core,), (v,))
        assert torch.allclose(y, truth) and torch.allclose(tangent, expected) and tangent.any()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(core, v)
            out = torch.autograd.forward_ad.unpack_dual(ts.tucker_conv(x, w, b, dual, factors, form=form))
            assert torch.allclose(out.tangent, expected)
        rows = torch.vmap(torch.func.grad(lambda c, x, f=form: ts.tucker_conv(x, w, b, c, factors, form=f).sum()),
                          (None, 0))(core, x)
        leaf = core.clone().requires_grad_()
        ts.tucker_conv(x, w, b, leaf, factors, form=form).sum().backward()
        assert torch.allclose(rows.sum(0), leaf.grad)


def test_one_tensor_in_two_places():
    """A gradient that is differentiated again must not run through what else an input depends on."""
    x, w, b, _, *_ = problem((4, 4), (3, 3), (2, 2), 1)
    u = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    for form in FORMS:
        def f(u, form=form):
            return ts.tucker_conv(x, w, b, (u.T @ u)[..., None, None], [u, u, None, None], form=form)

        assert torch.autograd.gradcheck(f, (u,)) and torch.autograd.gradgradcheck(f, (u,))


def test_meta():
    inputs = [t if t is None else t.to("meta").requires_grad_() for t in problem(dtype=torch.float32)]
    for form in FORMS:
        y = ts.tucker_conv(*inputs[:4], inputs[4:], form=form, padding=1)
        assert y.shape == (2, 8, 7, 6) and y.is_meta


def test_inference_mode():
    x, w, b, core, *factors = problem(dtype=torch.float32)
    expected = [ts.tucker_conv(x, w, b, core, factors, form=form) for form in FORMS]
    with torch.inference_mode():
        for form, y in zip(FORMS, expected):
            assert torch.equal(ts.tucker_conv(x, w, b, core, factors, form=form), y)


def test_repeatable_and_close_for_any_number_of_threads():
    inputs = problem((40, 40), (64, 48), (16, 16), dtype=torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            x, w, *_ = inputs
            flat, u, w = inputs[0].reshape(2, 64, -1), torch.ones(64, 16), torch.ones(2, 16, 1600)
            results.append(OP.tucker_project(flat, u, w, NONE, 0.0, False, True, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results[1], results[2]))
    for other in results[1:]:
        close(other, [t.double() for t in results[0]], 1e-5)


# ---------------------------------------------------------------------------------------------------------- bad input

BAD = [
    ({"x": torch.randn(2, 5, 7, 6).double()}, {}, ValueError, "x has 5 channels but weight takes 6"),
    ({"x": torch.randn(6, 7).double()}, {}, ValueError, "x must have 4 dimensions, or 3 without a batch"),
    ({"x": torch.randn(2, 6, 7, 6)}, {}, TypeError, "x and weight must share a dtype"),
    ({"x": [1.0]}, {}, TypeError, "x must be a tensor, got list"),
    ({"x": torch.ones(2, 6, 7, 6, dtype=torch.int64)}, {}, TypeError, "x must be .*, got torch.int64"),
    ({"weight": torch.randn(8, 6).double()}, {}, ValueError, "weight must have 3 to 5 dimensions"),
    ({"weight": torch.randn(8, 6, 3, 3).double().to("meta")}, {}, ValueError, "weight must be on x's device"),
    ({"bias": torch.randn(7).double()}, {}, ValueError, r"bias must be \(8,\), got shape \(7,\)"),
    ({"core": torch.randn(3, 2, 2).double()}, {}, ValueError, "core must have 4 dimensions"),
    ({"core": torch.randn(3, 2, 2, 3).half()}, {}, TypeError, "core must be .*float16"),
    ({"core": torch.randn(0, 2, 2, 3).double()}, {}, ValueError, "core must not be empty"),
    ({"core": torch.randn(3, 3, 2, 3).double()}, {}, ValueError, r"factors\[1\] must be \(6, 3\)"),
    ({"core": torch.randn(3, 2, 2, 2).double()}, {}, ValueError, r"factors\[3\] must be \(3, 2\)"),
    ({}, {"form": "best"}, ValueError, "form must be one of auto, chain, composed, got 'best'"),
    ({}, {"form": "chain", "groups": 2}, ValueError, "weight takes 12"),
    ({}, {"groups": 0}, ValueError, "groups must be a positive int, got 0"),
    ({}, {"groups": 3}, ValueError, "weight's 8 rows are not 3 groups"),
    ({}, {"padding": "full"}, ValueError, "padding must be a number, same or valid, got 'full'"),
    ({}, {"padding": (1, 2, 3)}, ValueError, r"padding must be an int of at least 0, or 2 of them, got \(1, 2, 3\)"),
    ({}, {"padding": "same", "stride": 2}, ValueError, "needs stride 1"),
    ({}, {"stride": 0}, ValueError, "stride must be an int of at least 1"),
    ({}, {"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1.0"),
    ({}, {"scale": float("inf")}, ValueError, "scale must be finite, got inf"),
]


@pytest.mark.parametrize("changed, options, error, words", BAD)
def test_bad_input_is_named(changed, options, error, words):
    inputs = dict(zip(("x", "weight", "bias", "core"), problem()[:4])) | {"factors": problem()[4:]} | changed
    with pytest.raises(error, match=words) as caught:
        ts.tucker_conv(*inputs.values(), **options)
    assert "tucker_conv" in str(caught.value)


def test_the_chain_takes_no_groups():
    x, w, b, core, *factors = problem(groups=2)
    with pytest.raises(ValueError, match="the chain takes no groups, got groups=2"):
        ts.tucker_conv(x, w, b, core, factors, groups=2, form="chain")


def test_the_op_itself_checks_too():
    """Whoever calls torch.ops directly gets an error, never a crash."""
    x, f, w, seed = torch.randn(2, 6, 9), torch.randn(6, 3), torch.randn(2, 3, 9), torch.tensor([7])
    for bad in ((x[:, :5], f, w, seed, 0.1), (x.double(), f, w, seed, 0.1), (x, f.double(), w, seed, 0.1),
                (x, f, w[:, :, :8], seed, 0.1), (x, f, w.double(), seed, 0.1), (x, f, w, NONE, 0.1),
                (x, f, w, seed.float(), 0.1), (x, f, w, seed, 1.0), (x, f, w, seed, -0.1), (x[0], f, w, seed, 0.1),
                (x.long(), f, w, seed, 0.1), (x, f[:, :0], w[:, :0], seed, 0.1)):
        with pytest.raises(RuntimeError, match="tucker_"):
            OP.tucker_project(*bad, False, True, True)
        with pytest.raises(RuntimeError, match="tucker_"):
            OP.tucker_expand_(bad[0].clone(), bad[2], bad[1], *bad[3:], False)
    with pytest.raises(RuntimeError, match="contiguous"):
        OP.tucker_expand_(x.mT, w.mT.contiguous(), f, NONE, 0.0, True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups, transposed", [(2, False), (4, True), (8, False), (8, True)])
def test_a_zero_core_gives_the_grouped_base_bit_for_bit(groups, transposed, dtype):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x, weight = torch.randn(2, 8, 9, 7).to(dtype).requires_grad_(), torch.randn(8, 8 // groups, 3, 3).to(dtype)
    factors = [torch.randn(d, 2, dtype=wide) for d in weight.shape]
    convolution = torch.nn.functional.conv_transpose2d if transposed else torch.nn.functional.conv2d
    y = ts.tucker_conv(x, weight, None, torch.zeros(2, 2, 2, 2, dtype=wide), factors, groups=groups,
                       transposed=transposed)
    truth = convolution(x, weight, groups=groups)
    dy = torch.randn_like(y)
    assert torch.equal(y, truth)
    assert torch.equal(*(torch.autograd.grad(out, x, dy)[0] for out in (y, truth)))
