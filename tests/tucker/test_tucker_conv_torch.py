"""Tucker convolutions as ops of torch: autograd, torch.func, torch.compile, autocast and threads."""

import pytest
import torch
from helpers import normal, same, threads
from tucker_conv_cases import FORMS, KINDS, NONE, OP, base, both, close, composed, problem

import torch_subspace as ts


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
        dy = normal(*y.shape, seed=1)
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
    assert same(*grads)


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
    assert y.dtype == dtype and same(inside, outside)
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
    results = []
    for _ in threads(1, 2, 2, 3):
        x, w, *_ = inputs
        flat, u, w = inputs[0].reshape(2, 64, -1), torch.ones(64, 16), torch.ones(2, 16, 1600)
        results.append(OP.tucker_project(flat, u, w, NONE, 0.0, False, True, True))
    assert same(results[1], results[2])
    for other in results[1:]:
        close(other, [t.double() for t in results[0]], 1e-5)
