"""Tucker convolutions: every kind against the composed float64 form, the facts of the adapter, bad input."""

import importlib

import pytest
import reference as ref
import torch
from hypothesis import given, settings, strategies
from tucker_conv_cases import FORMS, KINDS, NONE, OP, base, both, close, composed, problem

import torch_subspace as ts
import torch_subspace.tucker.tucker_conv_forms as forms

module = importlib.import_module("torch_subspace.tucker.tucker_conv")  # the function has the module's name
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}

# ------------------------------------------------------------------------------------------------------------- values


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
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("n, m", [(2, 3), (4, 4), (7, 1)])
def test_small_groups(n, m, dtype, last):
    """The weight's gradient is a kernel of ours from eight columns on."""
    for spatial in ((19,), (8, 17), (3, 4, 9)):
        inputs = problem(spatial, (3 * n, 3 * m), (2, 2), dtype=dtype, last=last, groups=3)
        close(*both(inputs, groups=3, padding=1, dilation=1, scale=1.3), TOLERANCE[dtype])


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spatial, kernel", [((9,), (3,)), ((8, 9), (2, 3)), ((11, 7), (4, 2)), ((4, 5, 7), (2, 1, 3))])
def test_patches(spatial, kernel, dtype, form, last):
    """Side by side, with or without a rest: the input's gradient is one product."""
    inputs = problem(spatial, (3, 8), (4, 2), kernel, dtype=dtype, last=last)
    close(*both(inputs, stride=kernel, form=form), TOLERANCE[dtype])


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


@pytest.mark.parametrize("last", [False, True], ids=["first", "last"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stride", [2, 4])
@pytest.mark.parametrize("channels, ranks", [((6, 8), (3, 3)), ((3, 5), (2, 3))])
def test_strided_pointwise(channels, ranks, stride, form, last):
    """ResNets' downsampling: where torch's own weight gradient can write beyond its buffers, time and again."""
    inputs = problem((16, 8), channels, ranks, (1, 1), dtype=torch.float32, last=last)
    for _ in range(20):
        close(*both(inputs, form=form, stride=stride), 1e-5)


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
    ({}, {"scale": float("inf")}, ValueError, "scale must be a finite number, got inf"),
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
