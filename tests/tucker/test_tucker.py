"""Tucker composition: values and gradients against the reference, its algebra, and what is refused."""

import functools

import helpers
import pytest
import reference as ref
import torch
from hypothesis import given, settings, strategies

import torch_subspace as ts

OP = torch.ops.torch_subspace
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}
SHAPES = [  # d, r (None: no factor): tiny, linear, lone modes, short ends, r > d, mode 0 not last, five and six modes
    ((1, 1), (1, 1)), ((70, 50), (4, 6)), ((300, 517), (16, 9)), ((700, 3), (5, 2)), ((3, 700), (2, 5)),
    ((5, 6), (9, 11)), ((7, 5), (None, None)), ((20, 30), (None, 4)), ((256, 64, 3, 3), (16, 8, 3, 3)),
    ((64, 48, 3, 3), (8, 6, 3, 2)), ((130, 70, 3, 3), (17, 5, None, None)), ((64, 64, 1, 1), (4, 4, 1, 1)),
    ((20, 16, 5), (None, 4, 3)), ((2, 600, 20), (2, 8, None)), ((50, 2, 40), (60, None, 30)), ((8, 1, 3), (3, 1, 2)),
    ((6, 5, 4, 3, 2), (2, 3, None, 2, 5)), ((3, 4, 2, 5, 3, 2), (2, 2, 2, 2, 2, 2)),
]
close = functools.partial(helpers.close, floor=0.1)


def normal(*shape, dtype=torch.float64, seed=0):
    return helpers.normal(*shape, seed=seed + sum(shape), dtype=dtype)


def problem(d, r, dtype=torch.float64):
    """core, factors and base."""
    factors = [None if q is None else normal(p, q, dtype=dtype, seed=i) for i, (p, q) in enumerate(zip(d, r))]
    return normal(*(q or p for p, q in zip(d, r)), dtype=dtype, seed=7), factors, normal(*d, dtype=dtype, seed=8)


def both(core, factors, base, dout, scale=0.5):
    """[value, gradients...] of ours and of the reference in float64 at the same points."""
    found = []
    for f, dtype in ((ts.tucker_compose, None), (ref.tucker, torch.float64)):
        leaves = [None if t is None else t.detach().to(dtype or t.dtype).requires_grad_()
                  for t in (core, *factors, base)]
        y = f(leaves[0], leaves[1:-1], scale=scale, base=leaves[-1])
        grads = torch.autograd.grad(y, [t for t in leaves if t is not None], dout.to(y.dtype))
        found.append((y.detach(), *grads))
    return found


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("based", [True, False], ids=["based", "alone"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("d, r", SHAPES, ids=str)
def test_matches_the_reference(d, r, dtype, based):
    core, factors, base = problem(d, r, dtype)
    close(*both(core, factors, base if based else None, normal(*d, seed=9)), TOLERANCE[dtype])


@settings(max_examples=120, deadline=None, derandomize=True)
@given(data=strategies.data(), modes=strategies.integers(2, 6), dtype=strategies.sampled_from(list(TOLERANCE)))
def test_matches_the_reference_anywhere(data, modes, dtype):
    sizes = strategies.integers(1, {2: 200, 3: 40, 4: 16, 5: 7, 6: 5}[modes])
    d = data.draw(strategies.lists(sizes, min_size=modes, max_size=modes))
    r = [data.draw(strategies.one_of(strategies.none(), strategies.integers(1, p + 2))) for p in d]
    close(*both(*problem(d, r, dtype), normal(*d, seed=9)), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype, ulp", [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)], ids=str)
@pytest.mark.parametrize("d, r", [((70, 33), (4, 6)), ((64, 48, 3, 3), (8, 6, 3, 2)), ((20, 16, 5), (None, 4, 3))])
def test_a_half_base_is_rounded_once(d, r, dtype, ulp):
    core, factors, base = problem(d, r, torch.float32)
    base, dout = base.to(dtype), normal(*d, seed=9).to(dtype)
    (y, *grads), (truth, *expected) = both(core, factors, base, dout)
    assert y.dtype == dtype and grads[-1].dtype == dtype and all(g.dtype == torch.float32 for g in grads[:-1])
    assert ((y.double() - truth).abs() <= ulp * truth.abs() + 1e-4).all()
    close(grads, expected, 2e-5)
    target = base.clone()
    assert ts.tucker_compose(core, factors, scale=0.5, base=target, out=target) is target
    assert torch.equal(target, y)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_factors_get_half_gradients(dtype):
    core, factors, base = problem((40, 30), (3, 4), dtype)
    (y, *grads), truth = both(core, factors, base, normal(40, 30, seed=9).to(dtype))
    assert y.dtype == dtype and all(g.dtype == dtype for g in grads)
    close((y, *grads), truth, 1e-2)
    assert ts.tucker_compose(core, factors).dtype == dtype


def test_float64_anywhere_is_computed_in_float64():
    core, factors, base = problem((40, 30), (3, 4))
    exact = ref.tucker(core, factors, base=base.float())
    y = ts.tucker_compose(core, factors, base=base.float())
    assert y.dtype == torch.float32 and torch.equal(y, exact.float())
    out = torch.empty_like(base, dtype=torch.bfloat16)
    assert torch.equal(ts.tucker_compose(core, factors, base=base.bfloat16(), out=out),
                       ref.tucker(core, factors, base=base.bfloat16()).bfloat16())
    y = ts.tucker_compose(core.float(), [f.float() for f in factors], base=base)
    assert y.dtype == torch.float64


def test_strided_inputs():
    core, factors, base = problem((40, 30), (3, 4))
    dense = ts.tucker_compose(core, factors, base=base)
    strided = [f.T.contiguous().T for f in factors]
    assert torch.equal(ts.tucker_compose(core.T.contiguous().T, strided, base=base.T.contiguous().T), dense)
    assert torch.equal(ts.tucker_compose(core, factors, base=base[:1].expand(40, 30)),
                       ts.tucker_compose(core, factors, base=base[:1].repeat(40, 1)))
    core.requires_grad_()
    ts.tucker_compose(core, factors, base=base).sum().backward()  # a gradient of zero strides
    assert core.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_out_is_the_same(dtype):
    core, factors, base = problem((64, 48, 3, 3), (8, 6, 3, 2), torch.promote_types(dtype, torch.float32))
    base = base.to(dtype)
    expected, old = ts.tucker_compose(core, factors, base=base), base.clone()
    for out in (torch.empty_like(base), torch.empty_like(base).to(memory_format=torch.channels_last)):
        assert ts.tucker_compose(core, factors, base=base, out=out) is out
        assert torch.equal(out, expected) and torch.equal(base, old)
    if dtype.itemsize > 2:  # a negative by a bit is written to by torch
        negative = torch._neg_view(torch.zeros_like(base))
        assert torch.equal(ts.tucker_compose(core, factors, base=base, out=negative).clone(), expected)
    alone = torch.empty_like(base)
    ts.tucker_compose(core, factors, out=alone)
    assert torch.equal(alone, ts.tucker_compose(core, factors).to(dtype))
    version = base._version
    ts.tucker_compose(core, factors, base=base, out=base)
    assert torch.equal(base, expected) and base._version > version


def test_out_may_share_memory_with_anything():
    core, factors, base = problem((12, 12), (12, 12))
    expected = ts.tucker_compose(core, factors, base=base)
    for which in (core, *factors):
        args = [t.clone() for t in (core, *factors)]
        out = next(a for a, t in zip(args, (core, *factors)) if t is which)
        assert torch.equal(ts.tucker_compose(args[0], args[1:], base=base, out=out), expected)
    memory = torch.cat([base.view(-1), base.new_zeros(12)])
    assert torch.equal(ts.tucker_compose(core, factors, base=memory[:144].view(12, 12),
                                         out=memory[12:].view(12, 12)), expected)


# -------------------------------------------------------------------------------------------------------------- facts


def test_no_core_is_the_base_bit_for_bit():
    core, factors, base = problem((64, 48, 3, 3), (8, 6, 3, 2), torch.float32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(ts.tucker_compose(core * 0, factors, base=base.to(dtype)), base.to(dtype))


def test_base_joins_by_one_addition():
    for d, r in SHAPES:
        core, factors, base = problem(d, r, torch.float32)
        assert torch.allclose(ts.tucker_compose(core, factors, base=base),
                              base + ts.tucker_compose(core, factors), rtol=1e-6, atol=1e-6)


def test_an_identity_core_is_lora():
    u, v, base = normal(70, 4), normal(50, 4, seed=1), normal(70, 50)
    y = ts.tucker_compose(torch.eye(4, dtype=torch.float64), [u, v], scale=2.0, base=base)
    assert torch.allclose(y, base + 2 * u @ v.T, atol=1e-12)


def test_none_is_the_identity_factor():
    core, factors, _ = problem((20, 16, 5), (None, 4, 3))
    eye = torch.eye(20, dtype=torch.float64)
    assert torch.allclose(ts.tucker_compose(core, factors), ts.tucker_compose(core, [eye, *factors[1:]]), atol=1e-12)


def test_unfoldings_have_the_ranks_of_the_core():
    d, r = (30, 20, 10), (3, 5, 2)
    core, factors, _ = problem(d, r)
    y = ts.tucker_compose(core, factors)
    for i in range(3):
        others = core.numel() // r[i]
        assert torch.linalg.matrix_rank(y.movedim(i, 0).reshape(d[i], -1)) == min(r[i], others)


def test_a_change_of_gauge_changes_nothing():
    core, factors, _ = problem((30, 20, 10), (3, 5, 2))
    turn = torch.linalg.qr(normal(5, 5, seed=3))[0]
    turned = torch.tensordot(turn, core, dims=([1], [1])).movedim(0, 1)
    y = ts.tucker_compose(turned, [factors[0], factors[1] @ turn.T, factors[2]])
    assert torch.allclose(y, ts.tucker_compose(core, factors), atol=1e-12)


def test_every_factor_against_its_gradient_gives_the_same():
    """The change is linear in the core and in every factor: <x, dx> = <dout, change> for each of them."""
    core, factors, _ = problem((30, 20, 10), (3, 5, 2))
    dout = normal(30, 20, 10, seed=5)
    y, *grads = both(core, factors, None, dout)[0]
    for x, dx in zip((core, *factors), grads):
        assert torch.allclose((x * dx).sum(), (y * dout).sum(), atol=1e-9)


# ------------------------------------------------------------------------------------------------- torch's machinery


@pytest.mark.parametrize("d, r", [((4, 3), (2, 2)), ((3, 4, 2, 2), (2, 3, 2, None)), ((3, 2, 2), (None, 3, 2))])
def test_gradcheck(d, r):
    core, factors, base = problem(d, r)
    inputs = [t.requires_grad_() for t in (core, base, *factors) if t is not None]

    def f(core, base, *rest):
        rest = iter(rest)
        return ts.tucker_compose(core, [None if q is None else next(rest) for q in r], scale=0.7, base=base)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


def test_only_the_gradients_that_are_asked_for():
    core, factors, base = problem((30, 20, 3), (3, 5, 2))
    whole = [core, *factors, base]
    truth = both(core, factors, base, torch.ones(30, 20, 3))[1][1:]
    for need in range(1, 32):
        leaves = [t.clone().requires_grad_(bool(need >> i & 1)) for i, t in enumerate(whole)]
        ts.tucker_compose(leaves[0], leaves[1:4], scale=0.5, base=leaves[4]).sum().backward()
        for i, (leaf, expected) in enumerate(zip(leaves, truth)):
            assert (leaf.grad is not None) == bool(need >> i & 1)
            assert leaf.grad is None or torch.allclose(leaf.grad, expected, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    core, factors, base = problem((12, 8, 3), (3, 4, None), torch.float32)
    base, none = base.to(dtype), torch.empty(0)
    lists = [*factors[:2], none]
    torch.library.opcheck(OP.tucker_compose, (core, lists, [base], 0.5))
    torch.library.opcheck(OP.tucker_compose, (core.clone().requires_grad_(), [*(f.clone().requires_grad_()
                          for f in factors[:2]), none], [base.clone().requires_grad_()], 0.5))
    torch.library.opcheck(OP.tucker_compose, (core, lists, [], 0.5))
    torch.library.opcheck(OP.tucker_compose_backward, (base, core, lists, 0.5, 0b0101))
    torch.library.opcheck(OP.tucker_compose_out, (core, lists, [base], 0.5, torch.empty_like(base)))


@pytest.mark.slow
def test_compile_without_graph_breaks():
    torch._dynamo.reset()
    core, factors, base = problem((24, 16, 3), (3, 4, None), torch.float32)
    leaves = [t.requires_grad_() for t in (core, *factors[:2])]

    def loss(core, u, v, x):
        weight = ts.tucker_compose(core, [u, v, None], scale=0.5, base=base)
        return torch.nn.functional.conv1d(x, weight).square().mean()

    compiled, x = torch.compile(loss, fullgraph=True), normal(2, 16, 10, dtype=torch.float32)
    ours, eager = (torch.autograd.grad(f(*leaves, x), leaves) for f in (compiled, loss))
    assert all(torch.allclose(a, e, atol=1e-4, rtol=1e-4) for a, e in zip(ours, eager))

    def merge(core, u, v, weight):
        return ts.tucker_compose(core, [u, v, None], base=weight, out=weight)

    with torch.no_grad():
        target, expected = base.clone(), ts.tucker_compose(*leaves[:1], [*leaves[1:], None], base=base)
        torch.compile(merge, fullgraph=True)(*leaves, target)
    assert torch.allclose(target, expected, atol=1e-5)


def test_autocast_changes_nothing():
    core, factors, base = problem((24, 16), (3, 4), torch.float32)
    expected = ts.tucker_compose(core, factors, base=base)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ts.tucker_compose(core, factors, base=base), expected)


def test_torch_func_and_forward_mode():
    """An outside op cannot take part in these; the plain formula steps in, so that no tangent is silently zero."""
    core, factors, base = problem((12, 8, 3), (3, 4, None))
    v = normal(3, 4, 3, seed=4)
    expected = ref.tucker(v, factors)  # linear in the core
    _, tangent = torch.func.jvp(lambda c: ts.tucker_compose(c, factors, base=base), (core,), (v,))
    assert torch.allclose(tangent, expected)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(core, v)
        y = torch.autograd.forward_ad.unpack_dual(ts.tucker_compose(dual, factors, base=base))
        assert torch.allclose(y.tangent, expected)
    grad = torch.func.grad(lambda u: ts.tucker_compose(core, [u, *factors[1:]]).square().sum())(factors[0])
    leaf = factors[0].clone().requires_grad_()
    ts.tucker_compose(core, [leaf, *factors[1:]]).square().sum().backward()
    assert torch.allclose(grad, leaf.grad)
    cores = torch.stack([core, 2 * core])
    assert torch.allclose(torch.vmap(lambda c: ts.tucker_compose(c, factors))(cores)[1],
                          2 * ts.tucker_compose(core, factors))


def test_meta():
    core, factors, base = problem((12, 8, 3), (3, 4, None), torch.float32)
    meta = [None if f is None else f.to("meta") for f in factors]
    assert ts.tucker_compose(core.to("meta"), meta).shape == (12, 8, 3)
    assert ts.tucker_compose(core.to("meta"), meta, base=base.to("meta").half()).dtype == torch.float16


def test_repeatable_and_close_for_any_number_of_threads():
    core, factors, base = problem((256, 128, 3, 3), (16, 8, 3, 3), torch.float32)
    dout, results = normal(256, 128, 3, 3, seed=9).float(), []
    for _ in helpers.threads(1, 2, 2, 3, 7):
        results.append(both(core, factors, base, dout)[0])
    assert helpers.same(results[1], results[2])
    for other in results[1:]:
        close(other, [t.double() for t in results[0]], TOLERANCE[torch.float32])


# ---------------------------------------------------------------------------------------------------------- bad input

CORE, U, V, W = normal(2, 3), normal(5, 2), normal(7, 3), normal(5, 7)


@pytest.mark.parametrize("core, factors, options, error, words", [
    ([1.0], [U, V], {}, TypeError, "core must be a tensor, got list"),
    (CORE.long(), [U, V], {}, TypeError, "int64"),
    (CORE[0], [V], {}, ValueError, r"2 to 6 dimensions, got shape \(3,\)"),
    (CORE.view(1, 1, 1, 1, 1, 2, 3), [None] * 7, {}, ValueError, "2 to 6 dimensions"),
    (CORE, [U], {}, ValueError, "as many factors, got 1"),
    (CORE, [V, U], {}, ValueError, r"factors\[0\] must be \(d, 2\) for core \(2, 3\), got \(7, 3\)"),
    (CORE, [U, V[0]], {}, ValueError, r"factors\[1\] must be \(d, 3\)"),
    (CORE, [U, 3.0], {}, TypeError, r"factors\[1\] must be a tensor, got float"),
    (CORE, [U, V.int()], {}, TypeError, r"factors\[1\] must be float32"),
    (CORE, [U, V.to_sparse()], {}, TypeError, r"factors\[1\] must be dense"),
    (CORE, [U, V.to("meta")], {}, ValueError, r"factors\[1\] is on meta, core on cpu"),
    (CORE, [U, V[:0]], {}, ValueError, "dimension 1: sizes must be above 0, got d=0, r=3"),
    (CORE, [U, V], {"scale": float("nan")}, ValueError, "scale must be a finite number, got nan"),
    (CORE, [U, V], {"scale": torch.tensor(1.0)}, ValueError, "scale must be a finite number"),
    (CORE, [U, V], {"base": W.T}, ValueError, r"base has shape \(7, 5\), core and factors compose \(5, 7\)"),
    (CORE, [U, V], {"base": W.bool()}, TypeError, "base must be float32"),
    (CORE, [U, V], {"out": W.T}, ValueError, r"out has shape \(7, 5\), the result \(5, 7\)"),
    (CORE, [U, V], {"base": W, "out": W.float()}, TypeError, "out must have base's dtype"),
    (CORE, [U, V], {"out": W[:1].expand(5, 7)}, ValueError, "share memory"),
    (CORE, [U, V], {"out": W.new_ones(99).as_strided((5, 7), (1, 1))}, ValueError, "share memory"),
    (CORE, [U, V], {"out": W.clone().requires_grad_()}, ValueError, "no_grad"),
    (CORE.clone().requires_grad_(), [U, V], {"out": W}, ValueError, "no_grad"),
])
def test_bad_input_is_named(core, factors, options, error, words):
    before = W.clone()
    with pytest.raises(error, match=words) as caught:
        ts.tucker_compose(core, factors, **options)
    assert "tucker_compose" in str(caught.value) and torch.equal(W, before)


def test_the_op_itself_checks_too():
    """Whoever calls torch.ops directly gets an error, never a crash."""
    none = CORE.new_empty(0)
    for bad in ((CORE, [U], []), (CORE, [V, U], []), (CORE, [U, V.float()], []), (CORE, [U, V], [W.T]),
                (CORE, [U, V], [W, W]), (CORE, [U, V], [W.float()]), (CORE, [U, none], [W]), (CORE[0], [V], []),
                (CORE.long(), [U.long(), V.long()], []), (CORE.half(), [U.half(), V.half()], [])):
        with pytest.raises(RuntimeError, match="tucker_compose: "):
            OP.tucker_compose(*bad, 1.0)
    with pytest.raises(RuntimeError, match="contiguous"):
        OP.tucker_compose_out(CORE, [U, V], [], 1.0, W.T.contiguous().T)
    with pytest.raises(RuntimeError, match="share a dtype"):
        OP.tucker_compose_out(CORE.float(), [U.float(), V.float()], [W.float()], 1.0, W.half())
    with pytest.raises(RuntimeError, match="dout does not have"):
        OP.tucker_compose_backward(W.T, CORE, [U, V], 1.0, 7)
    with pytest.raises(RuntimeError, match="above 0"):
        OP.tucker_compose(CORE[:0], [none, V], [], 1.0)
