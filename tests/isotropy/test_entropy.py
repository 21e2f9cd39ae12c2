"""The von Neumann entropy: values, gradients where eigenvalues repeat or are 0, transforms, bad input."""

import math

import pytest
import reference as ref
import torch
from helpers import close, normal, same
from torch.autograd import forward_ad

from torch_subspace.isotropy import von_neumann_entropy

SHAPES = [(7, 4), (3, 6), (1, 1), (1, 5), (2, 5, 3), (2, 3, 4, 9), (40, 12)]
PREPARED = {"points": lambda z: z, "covariance": lambda z: z - z.mean(-2, keepdim=True),
            "directions": lambda z: z / z.norm(dim=-1, keepdim=True)}


def of(function, z, **options):
    """Entropies, and the gradient of a sum of them."""
    z = z.detach().requires_grad_()
    entropy = function(z, **options)
    weight = torch.arange(1, entropy.numel() + 1, dtype=entropy.dtype).view(entropy.shape)
    return entropy.detach(), torch.autograd.grad((weight * entropy).sum(), z)[0]


def turned(*lengths, n=9, seed=0):
    """Points whose singular values are these, in no special directions."""
    d = len(lengths)
    q, v = (torch.linalg.qr(normal(m, d, seed=seed + m)).Q for m in (n, d))
    return q * torch.tensor(lengths, dtype=torch.float64) @ v.mT


@pytest.mark.parametrize("kind", ["points", "directions"])
def test_a_point_of_zeros_is_as_none(kind):
    """Derivatives too, the second ones as well: there is no direction to change."""
    def found(z):
        z = z.requires_grad_()
        entropy = von_neumann_entropy(z, of=kind)
        (first,) = torch.autograd.grad(entropy, z, create_graph=True)
        return entropy.detach(), first[:7].detach(), torch.autograd.grad(first[:7].square().sum(), z)[0]

    z = normal(7, 4)
    value, first, second = found(z.clone())
    close(found(torch.cat([z, torch.zeros(1, 4)])), [value, first, torch.cat([second, torch.zeros(1, 4)])], 1e-12)


@pytest.mark.parametrize("kind", PREPARED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_the_reference(shape, kind):
    z = normal(*shape)
    if kind == "covariance" and shape[-2] == 1:
        z = torch.cat([z, -z])  # a point alone has no covariance
    expected = of(lambda z: ref.von_neumann_entropy(PREPARED[kind](z)), z)
    close(of(von_neumann_entropy, z, of=kind), expected, 1e-9, floor=1e-3)
    single = of(von_neumann_entropy, z.float(), of=kind)
    assert single[0].dtype == single[1].dtype == torch.float32
    close(single, expected, 2e-5, floor=0.1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_halves_are_widened_also_under_autocast(dtype):
    z = normal(2, 9, 5).to(dtype)
    entropy, dz = of(von_neumann_entropy, z)
    wide = of(von_neumann_entropy, z.float())
    assert entropy.dtype == torch.float32 and dz.dtype == dtype
    assert same((entropy, dz), (wide[0], wide[1].to(dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert same(of(von_neumann_entropy, z.float()), wide)


def test_known_values():
    assert von_neumann_entropy(torch.eye(6, dtype=torch.float64)).sub(math.log(6)).abs() < 1e-14
    assert von_neumann_entropy(turned(3, 3, 0, 0)).sub(math.log(2)).abs() < 1e-12
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    assert von_neumann_entropy(turned(*p.sqrt().tolist())).sub(1.5 * math.log(2)).abs() < 1e-12
    z = normal(8, 3)
    turn = torch.linalg.qr(normal(3, 3, seed=1)).Q
    close([von_neumann_entropy(100 * z @ turn)], [von_neumann_entropy(z)], 1e-12)
    close([von_neumann_entropy(z + 7, of="covariance")], [von_neumann_entropy(z, of="covariance")], 1e-12)
    lengths = torch.linspace(1, 9, 8, dtype=torch.float64)[:, None]
    close([von_neumann_entropy(lengths * z, of="directions")], [von_neumann_entropy(z, of="directions")], 1e-12)


@pytest.mark.parametrize("kind", PREPARED)
@pytest.mark.parametrize("size", [1e-35, 1e-23, 1e-13, 1e19, 1e20, 1e37])
def test_units_do_not_matter(size, kind):
    z = normal(2, 30, 4)
    z[1] *= 1e-2
    expected = of(von_neumann_entropy, z, of=kind)
    entropy, dz = of(von_neumann_entropy, (z * size).float(), of=kind)
    close([entropy, dz.double() * size], expected, 1e-5)
    few = von_neumann_entropy((z[:, :3] * size).float(), of=kind)
    close([few], [von_neumann_entropy(z[:, :3], of=kind)], 1e-5)
    plain = torch.vmap(lambda z: von_neumann_entropy(z, of=kind))((z * size).float())
    close([plain], [expected[0]], 1e-5)


def test_rows_of_all_lengths():
    """As directions they weigh the same."""
    z, lengths = normal(30, 4), 10.0 ** torch.linspace(-30, 30, 30, dtype=torch.float64)[:, None]
    expected, dz = of(von_neumann_entropy, z, of="directions")
    found = of(von_neumann_entropy, (z * lengths).float(), of="directions")
    close([found[0], found[1] * lengths], [expected, dz], 1e-5)
    z[3] = 0
    entropy, dz = of(von_neumann_entropy, z, of="directions")
    close([entropy], [von_neumann_entropy(torch.cat((z[:3], z[4:])), of="directions")], 1e-13)
    assert dz.isfinite().all() and not dz[3].any()


@pytest.mark.parametrize("lengths", [(1, 1, 1), (2, 2, 1), (1, 1 + 1e-9, 0.5), (1, 1.01, 0.99), (3, 1e-3, 1e-3)])
def test_derivatives_where_eigenvalues_repeat(lengths):
    z = turned(*lengths).requires_grad_()
    assert torch.autograd.gradcheck(von_neumann_entropy, z)
    assert torch.autograd.gradgradcheck(von_neumann_entropy, z)


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("kind", PREPARED)
def test_derivatives(shape, kind):
    z = normal(*shape).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: von_neumann_entropy(z, of=kind), z)
    assert torch.autograd.gradgradcheck(lambda z: von_neumann_entropy(z, of=kind), z)


@pytest.mark.parametrize("n", [9, 3])
def test_the_gradient_where_eigenvalues_are_0(n):
    """It exists, and Z's part in the null space is 0; also of points that are exactly 0 in a feature."""
    z = turned(2, 1, 0, 0, n=9)[:n]
    z[:, 3] = 0
    z.requires_grad_()
    assert torch.autograd.gradcheck(von_neumann_entropy, z)
    (dz,) = torch.autograd.grad(von_neumann_entropy(z), z)
    null = torch.linalg.svd(z.detach())[2][2:].mT
    assert dz.isfinite().all() and (dz @ null).abs().max() < 1e-12
    (single,) = torch.autograd.grad(von_neumann_entropy(leaf := z.detach().float().requires_grad_()), leaf)
    close([single], [dz], 1e-4)


def test_third_derivatives_are_refused():
    z = normal(4, 3).requires_grad_()
    (dz,) = torch.autograd.grad(von_neumann_entropy(z), z, create_graph=True)
    (ddz,) = torch.autograd.grad(dz.square().sum(), z, create_graph=True)
    with pytest.raises(RuntimeError, match="third derivatives"):
        ddz.sum().backward()


def test_nothing_is_left():
    for z, kind in ((torch.zeros(4, 3), "points"), (torch.ones(4, 3), "covariance"), (torch.zeros(4, 3), "directions")):
        entropy, dz = of(von_neumann_entropy, z, of=kind)
        assert entropy == 0 and not dz.any()
    z = torch.zeros(0, 4, 3)
    assert von_neumann_entropy(z).shape == (0,)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_not_a_number_stays_one(bad):
    """In its own view."""
    z = normal(2, 6, 4)
    z[1, 3, 2] = bad
    entropy, dz = of(von_neumann_entropy, z)
    assert entropy.isnan().tolist() == [False, True]
    assert dz[0].isfinite().all() and dz[1].isnan().all()


def test_values_and_gradients_in_torch_func():
    """By the function's own rules: as outside of it."""
    z, v = normal(3, 6, 4), normal(6, 4, seed=1)
    entropy, dz = of(von_neumann_entropy, z[0])
    close([torch.func.grad(von_neumann_entropy)(z[0])], [dz], 1e-11)
    close(torch.func.jvp(von_neumann_entropy, (z[0],), (v,)), (entropy, (dz * v).sum()), 1e-11)
    close([torch.vmap(von_neumann_entropy)(z)], [von_neumann_entropy(z)], 1e-12)


SINGULAR = [(1, 1, 1), (2, 2, 1), (3, 1e-3, 1e-3), (3, 2, 1)]


@pytest.mark.parametrize("lengths", SINGULAR)
def test_second_derivatives_in_torch_func(lengths):
    """Exact where eigenvalues repeat, whatever mode is within which."""
    z = turned(*lengths)
    expected = torch.autograd.functional.hessian(von_neumann_entropy, z)
    rules = torch.func.jacfwd, torch.func.jacrev
    for hessian in [torch.func.hessian] + [lambda f, a=a, b=b: a(b(f)) for a in rules for b in rules]:
        close([hessian(von_neumann_entropy)(z)], [expected], 1e-9)
    two = torch.stack([z, 2 * z])
    close([torch.vmap(torch.func.hessian(von_neumann_entropy))(two)], [torch.stack([expected, expected / 4])], 1e-9)
    for mode in ("reverse-mode", "forward-mode"):
        found = torch.autograd.functional.hessian(von_neumann_entropy, z, vectorize=True, outer_jacobian_strategy=mode)
        close([found.detach()], [expected], 1e-9)
    for a in rules:
        with pytest.raises(RuntimeError, match="third derivatives"):
            a(torch.func.hessian(von_neumann_entropy))(z)


@pytest.mark.parametrize("lengths", SINGULAR)
@pytest.mark.parametrize("kind", PREPARED)
def test_second_derivatives_in_forward_mode(kind, lengths):
    """Within a level and after it, reverse over forward and the other way round; also torch.func in a level, a level in
    torch.func."""
    def function(z):
        return von_neumann_entropy(z, of=kind)

    def slope(z):
        return forward_ad.unpack_dual(function(forward_ad.make_dual(z, along))).tangent

    def slope_in_its_level(z):
        with forward_ad.dual_level():
            return slope(z)

    z, along = turned(*lengths), normal(9, 3, seed=1)
    expected = (torch.autograd.functional.hessian(function, z) * along).sum((-2, -1))
    leaf, found = z.clone().requires_grad_(), []
    with forward_ad.dual_level():
        found += torch.autograd.grad(slope(leaf), leaf)
        dual = forward_ad.make_dual(leaf, along)
        found += torch.autograd.grad(forward_ad.unpack_dual(function(dual)).tangent, dual)
        for gradient in (torch.autograd.grad(function(dual), leaf)[0], torch.func.grad(function)(dual)):
            found.append(forward_ad.unpack_dual(gradient).tangent.detach())
        after = slope(leaf)
    found += torch.autograd.grad(after, leaf)
    found.append(torch.func.grad(slope_in_its_level)(z))
    found.append(torch.vmap(torch.func.grad(slope_in_its_level))(torch.stack([z, z]))[1])
    found.append(torch.autograd.functional.hvp(function, z, along)[1])
    close(found, [expected] * len(found), 1e-9)


def test_second_derivatives_are_differentiable_in_what_they_are_linear_in():
    """The vector that a Hessian is multiplied with, and the derivative that came from above."""
    z, v, w = turned(2, 2, 1), normal(9, 3, seed=1), torch.tensor(2.0, dtype=torch.float64)
    expected = torch.autograd.functional.hessian(von_neumann_entropy, z)

    def product(w, v):
        return torch.func.jvp(torch.func.grad(lambda z: w * von_neumann_entropy(z)), (z,), (v,))[1]

    def twice_reverse(w, v):
        return torch.func.grad(lambda z: (torch.func.grad(lambda z: w * von_neumann_entropy(z))(z) * v).sum())(z)

    for of_both in (product, twice_reverse):
        for rule in (torch.func.jacfwd, torch.func.jacrev):
            by_w, by_v = rule(of_both, (0, 1))(w, v)
            close([by_w, by_v], [(expected * v).sum((-2, -1)), 2 * expected], 1e-9)


def test_the_gradient_where_eigenvalues_are_0_in_torch_func():
    z = turned(2, 1, 0, 0)
    _, expected = of(von_neumann_entropy, z)
    close([torch.func.grad(von_neumann_entropy)(z), torch.func.jacfwd(von_neumann_entropy)(z)], [expected] * 2, 1e-9)


def test_not_a_number_in_torch_func():
    z = normal(2, 6, 4)
    z[1, 3, 2] = math.nan
    close([torch.vmap(von_neumann_entropy)(z)[0]], [von_neumann_entropy(z[0])], 1e-12)
    assert torch.vmap(von_neumann_entropy)(z)[1].isnan()
    assert all(t.isnan() for t in torch.func.jvp(von_neumann_entropy, (z[1],), (z[0],)))
    assert torch.func.grad(von_neumann_entropy)(z[1]).isnan().all()


@pytest.mark.slow
def test_compile_without_graph_breaks():
    torch._dynamo.reset()
    compiled = torch.compile(von_neumann_entropy, fullgraph=True, backend="aot_eager")
    z = normal(2, 9, 5, dtype=torch.float32)
    close(of(compiled, z), of(von_neumann_entropy, z), 1e-5)


def test_it_trains():
    """Points near a line come to fill the space."""
    z = (normal(20, 1) @ normal(1, 4, seed=1) + 0.01 * normal(20, 4, seed=2)).requires_grad_()
    optimizer = torch.optim.Adam([z], lr=0.1)
    before = von_neumann_entropy(z).item()
    for _ in range(60):
        optimizer.zero_grad()
        (-von_neumann_entropy(z)).backward()
        optimizer.step()
    assert before < 0.01 and von_neumann_entropy(z) > 0.99 * math.log(4)


@pytest.mark.parametrize("z, options, error, words", [
    ([1.0], {}, TypeError, "von_neumann_entropy: z must be a tensor, got list"),
    (torch.ones(4), {}, ValueError, r"z must be \(..., n, d\) with n > 0 and d > 0, got \(4,\)"),
    (torch.ones(0, 4), {}, ValueError, r"n > 0 and d > 0, got \(0, 4\)"),
    (torch.ones(3, 4), {"of": "rows"}, ValueError, "of must be one of points, covariance, directions, got 'rows'"),
])
def test_bad_input_is_named(z, options, error, words):
    with pytest.raises(error, match=words):
        von_neumann_entropy(z, **options)
