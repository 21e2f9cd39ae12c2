"""Procrustes and the orthogonal adapter."""

import copy
import math

import pytest
import torch
from helpers import close, frame_error, normal, optional, same
from torch import nn

from torch_subspace.isotropy import OrthogonalAdapter, procrustes

# ---------------------------------------------------------------------------------------------------------- procrustes


def turn(d, seed=0, determinant=None):
    q = torch.linalg.qr(normal(d, d, seed=seed)).Q
    if determinant is not None and torch.linalg.det(q).sign() != determinant:
        q[0] *= -1
    return q


@pytest.mark.parametrize("determinant", [1, -1])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_planted_turn_is_found(dtype, determinant):
    x, q = normal(3, 20, 5).to(dtype), torch.stack([turn(5, seed, determinant) for seed in range(3)]).to(dtype)
    found = procrustes(x, x @ q)
    assert found.dtype == dtype
    close([found], [q], 1e-12 if dtype == torch.float64 else 1e-5)


def test_no_other_turn_is_nearer():
    x, y = normal(9, 4), normal(9, 4, seed=1)
    q = procrustes(x, y)
    assert frame_error(q) < 1e-14
    least = (x @ q - y).norm()
    for seed in range(20):
        skew = normal(4, 4, seed=seed) * 10 ** -(seed % 4)
        assert (x @ q @ torch.matrix_exp(skew - skew.mT) - y).norm() >= least
        assert (x @ turn(4, seed) - y).norm() >= least


@pytest.mark.parametrize("case", ["any", "repeated", "of rank 2 of 3", "views"])
def test_derivatives_of_procrustes(case):
    x, y = normal(6, 3), normal(6, 3, seed=1)
    if case == "repeated":  # singular values of xᵀ y
        x, y = torch.linalg.qr(x).Q, torch.linalg.qr(x).Q @ turn(3)
    elif case == "of rank 2 of 3":  # one singular value is 0: the sign of its direction is open, its slope isn't
        y = y @ torch.diag(torch.tensor([1.0, 1, 0], dtype=torch.float64)) + 1e-3 * y
    elif case == "views":
        x, y = normal(2, 6, 3), normal(2, 6, 3, seed=1)
    assert torch.autograd.gradcheck(procrustes, (x.requires_grad_(), y.requires_grad_()))


@pytest.mark.parametrize("sizes", [(1e-21, 1e-21), (1e-35, 1e-35), (3e18, 3e18), (1e37, 1e37), (1e37, 1e-35)])
def test_units_do_not_matter(sizes):
    x, y, weight = normal(2, 20, 4), normal(2, 20, 4, seed=1), normal(4, 4, seed=2)
    x[1] *= 1e-3

    def found(x, y):
        x, y = x.detach().requires_grad_(), y.detach().requires_grad_()
        q = procrustes(x, y)
        return [q.detach(), *torch.autograd.grad((weight.to(q.dtype) * q).sum(), (x, y))]

    q, dx, dy = found(*((t * size).float() for t, size in zip((x, y), sizes)))
    close([q, dx.double() * sizes[0], dy.double() * sizes[1]], found(x, y), 1e-4)
    close([torch.vmap(procrustes)((x * sizes[0]).float(), (y * sizes[1]).float())], [procrustes(x, y)], 1e-5)


def test_second_derivatives_of_procrustes_are_refused():
    x = normal(6, 3).requires_grad_()
    (dx,) = torch.autograd.grad(procrustes(x, normal(6, 3, seed=1)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="procrustes: differentiable once"):
        (dx.sum() + x.sum()).backward()  # also beside others, with a constant gradient of Q


def test_where_it_is_not_unique():
    """Fewer points than features: still orthogonal, still nearest, and a finite gradient."""
    x, q = normal(3, 6), turn(6)
    x.requires_grad_()
    found = procrustes(x, x.detach() @ q)
    assert frame_error(found) < 1e-13
    close([(x @ found).detach()], [x.detach() @ q], 1e-12)
    (dx,) = torch.autograd.grad(found.square().sum() + (found * normal(6, 6)).sum(), x)
    assert dx.isfinite().all()
    assert frame_error(procrustes(torch.zeros(3, 4), torch.zeros(3, 4))) < 1e-6


def test_halves_autocast_and_not_a_number():
    x, y = normal(2, 8, 4).bfloat16(), normal(2, 8, 4, seed=1).bfloat16()
    wide = procrustes(x.float(), y.float())
    assert wide.dtype == torch.float32 and torch.equal(procrustes(x, y), wide)
    leaf = x.float().requires_grad_()
    expected = torch.autograd.grad(procrustes(leaf, y.float())[0, 0].sum(), leaf)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = procrustes(leaf, y.float())
        assert torch.equal(found, wide) and same(torch.autograd.grad(found[0, 0].sum(), leaf), expected)
    x[1, 0, 0] = math.nan
    found = procrustes(x, y)
    assert torch.equal(found[0], wide[0]) and found[1].isnan().all()


@pytest.mark.parametrize("case", ["any", "repeated", "of rank 2 of 3"])
def test_torch_func_and_forward_mode(case):
    """Repeated singular values, at which svd's own derivatives are NaN, are nothing special there either."""
    x, y, v, weight = normal(2, 6, 3), normal(2, 6, 3, seed=1), normal(2, 6, 3, seed=2), normal(3, 3, seed=3)
    if case == "repeated":
        x = torch.linalg.qr(x).Q
        y = x @ turn(3)
    elif case == "of rank 2 of 3":
        x[..., 2] = 0

    def loss(x, y):
        return (procrustes(x, y) * weight).sum()

    leaves = [t.clone().requires_grad_() for t in (x, y)]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert all(d.isfinite().all() for d in expected)
    one = [d[0] for d in expected]
    close([torch.vmap(procrustes)(x, y)], [procrustes(x, y)], 1e-12)
    for gradient in (torch.func.grad(loss, (0, 1)), torch.func.jacrev(loss, (0, 1)), torch.func.jacfwd(loss, (0, 1))):
        close(gradient(x[0], y[0]), one, 1e-11)
    close(torch.vmap(torch.func.grad(loss, (0, 1)))(x, y), expected, 1e-11)
    value, slope = torch.func.jvp(lambda x: loss(x, y[0]), (x[0],), (v[0],))
    close([value, slope], [loss(x[0], y[0]), (one[0] * v[0]).sum()], 1e-11, absolute=True)
    for strategy in ("reverse-mode", "forward-mode"):
        found = torch.autograd.functional.jacobian(loss, (x[0], y[0]), vectorize=True, strategy=strategy)
        close([t.detach() for t in found], one, 1e-11)


@pytest.mark.parametrize("outer", [torch.func.jacfwd, torch.func.jacrev], ids=lambda f: f.__name__)
@pytest.mark.parametrize("inner", [torch.func.jacfwd, torch.func.jacrev], ids=lambda f: f.__name__)
def test_torch_func_has_no_second_derivatives_either(outer, inner):
    """Rather than wrong ones."""
    x, y = normal(6, 3), normal(6, 3, seed=1)
    with pytest.raises(RuntimeError, match="procrustes: differentiable once"):
        outer(inner(lambda x: procrustes(x, y)[0, 0]))(x)


def test_not_a_number_in_torch_func():
    x, y = normal(2, 6, 3), normal(2, 6, 3, seed=1)
    x[1, 2, 0] = math.nan
    found = torch.vmap(procrustes)(x, y)
    close([found[0]], [procrustes(x[0], y[0])], 1e-12)
    assert found[1].isnan().all()
    value, slope = torch.func.jvp(lambda x: procrustes(x, y[1]), (x[1],), (y[1],))
    assert value.isnan().all() and slope.isnan().any()


# ------------------------------------------------------------------------------------------------------------- adapter


def test_it_starts_as_the_identity_and_stays_orthogonal():
    adapter = OrthogonalAdapter(6)
    x, q = normal(50, 6, dtype=torch.float32), turn(6, determinant=1).float()
    assert torch.equal(adapter(x), x)
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.05)
    for _ in range(120):
        optimizer.zero_grad()
        (adapter(x) - x @ q).square().mean().backward()
        optimizer.step()
        assert frame_error(adapter.weight) < 5e-6
    close([adapter.weight.detach()], [q.mT], 0.05)
    assert (adapter(x) - x @ q).square().mean() < 1e-3


@pytest.mark.parametrize("determinant", [1, -1])
def test_it_starts_where_procrustes_ends(determinant):
    x, q = normal(20, 4), turn(4, determinant=determinant)
    adapter = OrthogonalAdapter(4, dtype=torch.float64)
    adapter.weight = procrustes(x, x @ q).mT
    close([adapter(x).detach()], [x @ q], 1e-12)
    adapter(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())


WRONG = {
    "type": ("eye", TypeError, "weight must be a tensor, got str 'eye'"),
    "shape": (torch.eye(3), ValueError, r"weight must have shape \(4, 4\), got \(3, 3\)"),
    "dtype": (torch.eye(4).double(), TypeError, "weight must be torch.float32, as the adapter is, got torch.float64"),
    "half": (torch.eye(4).bfloat16(), TypeError, "weight must be torch.float32, as the adapter is, got torch.bfloat16"),
    "device": (torch.eye(4, device="meta"), ValueError, "weight must be on cpu, as the adapter is, got meta"),
    "nan": (torch.eye(4).index_put((torch.tensor(1), torch.tensor(2)), torch.tensor(math.nan)), ValueError,
            r"weight must be finite, got nan at \(1, 2\)"),
    "inf": (-torch.eye(4) / 0, ValueError, r"weight must be finite, got -inf at \(0, 0\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_weight_that_is_refused_changes_nothing(case):
    adapter, (weight, error, message) = OrthogonalAdapter(4), WRONG[case]
    adapter.weight = turn(4, 3).float()
    with torch.no_grad():
        next(adapter.parameters()).add_(0.1 * torch.randn(4, 4))
    before, state = adapter.weight.detach(), copy.deepcopy(adapter.state_dict())
    with pytest.raises(error, match=f"OrthogonalAdapter: {message}"):
        adapter.weight = weight
    assert same(list(adapter.state_dict().values()), list(state.values())) and torch.equal(adapter.weight, before)
    adapter(torch.randn(2, 4)).square().sum().backward()
    adapter.weight = turn(4, 5).float()
    assert frame_error(adapter.weight) < 1e-6


def test_derivatives_of_the_adapter():
    adapter = OrthogonalAdapter(3, dtype=torch.float64)
    adapter.weight = turn(3)
    (raw,) = adapter.parameters()
    x = normal(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, raw: torch.func.functional_call(adapter, {"parametrizations.weight.original": raw}, (x,)),
        (x, raw.detach().requires_grad_()))


def test_merged():
    adapter = OrthogonalAdapter(4, dtype=torch.float64)
    adapter.weight = turn(4, 3)
    x, before = normal(5, 3), nn.Linear(3, 4).double()
    alone, both = adapter.merge(), adapter.merge(before)
    assert type(alone) is type(both) is nn.Linear and alone.bias is None
    close([both(x).detach(), alone(before(x)).detach()], [adapter(before(x)).detach()] * 2, 1e-13)
    assert alone.weight.requires_grad and alone.weight is not adapter.weight
    single = nn.Linear(3, 4, bias=False)
    merged = adapter.merge(single)
    assert merged.weight.dtype == torch.float32 and merged.bias is None and merged.in_features == 3
    close([merged(x.float()).detach()], [adapter(single(x.float())).detach()], 1e-6)


def test_its_state_is_saved_and_copied():
    adapter, other = OrthogonalAdapter(4), OrthogonalAdapter(4)
    adapter.weight = turn(4, 3).float()
    with torch.no_grad():
        next(adapter.parameters()).add_(0.1 * torch.randn(4, 4))
    other.load_state_dict(adapter.state_dict())
    copied = copy.deepcopy(adapter)
    assert torch.equal(other.weight, adapter.weight) and torch.equal(copied.weight, adapter.weight)
    assert adapter.to(torch.float64).weight.dtype == torch.float64


def test_dtypes_of_the_adapter():
    adapter = OrthogonalAdapter(4)
    adapter.weight = turn(4, 3).float()
    x = normal(5, 4).bfloat16()
    expected = adapter(x.float())
    assert adapter(x).dtype == torch.bfloat16 and torch.equal(adapter(x), expected.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(adapter(x.float()), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_of_halves_keeps_it_orthogonal(dtype):
    """Q rounded to bfloat16 is off by 3e-3."""
    adapter = OrthogonalAdapter(32)
    adapter.weight = turn(32).float()
    x, before = normal(5, 32).to(dtype), adapter.weight.detach()
    model = nn.Sequential(nn.Linear(32, 32), adapter).to(dtype)
    assert model[0].weight.dtype == dtype and torch.equal(adapter.weight, before)
    assert frame_error(adapter.weight) < 1e-6 and adapter(x).dtype == model(x).dtype == dtype
    with torch.no_grad():
        next(adapter.parameters()).add_(0.1 * torch.randn(32, 32))
    assert frame_error(adapter.weight) < 1e-5
    assert adapter.double().weight.dtype == torch.float64 and adapter.half().weight.dtype == torch.float32


MADE = [lambda: OrthogonalAdapter(4, device="meta"), lambda: OrthogonalAdapter(4).to("meta")]


@pytest.mark.parametrize("make", MADE, ids=["made there", "moved there"])
def test_without_values(make):
    """On the meta device; memory that is given holds the identity, then what is loaded."""
    source = OrthogonalAdapter(4)
    source.weight = turn(4, 3, -1).float()
    with torch.no_grad():
        next(source.parameters()).add_(0.1 * normal(4, 4))
    x = normal(5, 4, dtype=torch.float32)
    adapter, eye = make(), torch.eye(4)
    assert adapter(x.to("meta")).shape == (5, 4) and adapter.merge().weight.is_meta
    assert all(t.is_meta for t in adapter.state_dict().values())
    torch.full((16, 16), 7.0)  # memory that was used before
    model = nn.Sequential(nn.Sequential(adapter)).to_empty(device="cpu")
    assert torch.equal(adapter.weight, eye) and torch.equal(model(x), x)
    adapter.load_state_dict(source.state_dict())
    assert torch.equal(adapter.weight, source.weight)
    adapter.reset_parameters()
    assert torch.equal(adapter.weight, eye)
    adapter(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in adapter.parameters())
    with torch.device("meta"):
        other = OrthogonalAdapter(4)
    other.load_state_dict(source.state_dict(), assign=True)
    assert torch.equal(other.weight, source.weight)
    skipped = nn.utils.skip_init(OrthogonalAdapter, 4, dtype=torch.float64)
    assert torch.equal(skipped.weight, eye.double())


def test_accelerate_puts_it_in_place(tmp_path):
    accelerate = optional("accelerate")
    from safetensors.torch import save_file

    source = nn.Sequential(OrthogonalAdapter(4))
    source[0].weight = turn(4).float()
    save_file(source.state_dict(), tmp_path / "model.safetensors")
    with accelerate.init_empty_weights():
        model = nn.Sequential(OrthogonalAdapter(4))
    accelerate.load_checkpoint_and_dispatch(model, str(tmp_path / "model.safetensors"), device_map={"": "cpu"})
    assert torch.equal(model[0].weight, source[0].weight)


@pytest.mark.slow
def test_compile_without_graph_breaks():
    torch._dynamo.reset()
    adapter, x, y = OrthogonalAdapter(4), normal(8, 4, dtype=torch.float32), normal(8, 4, seed=1, dtype=torch.float32)

    def aligned(x, y):
        return adapter(x) @ procrustes(x, y)

    compiled, results = torch.compile(aligned, fullgraph=True, backend="aot_eager"), []
    for function in (compiled, aligned):
        leaf = x.clone().requires_grad_()
        found = function(leaf, y)
        results.append([found.detach(), *torch.autograd.grad(found.square().sum() + found[0].sum(), leaf)])
    close(*results, 1e-5)


X = torch.randn(5, 3)


@pytest.mark.parametrize("make, error, words", [
    (lambda: procrustes(X, X[:, :2]), ValueError, r"x and y must be alike, got \(5, 3\) on cpu and \(5, 2\) on cpu"),
    (lambda: procrustes(X[0], X[0]), ValueError, r"procrustes: x must be \(..., n, d\)"),
    (lambda: OrthogonalAdapter(0), ValueError, "OrthogonalAdapter: d must be >= 1, got 0"),
    (lambda: OrthogonalAdapter(2, dtype=torch.float16), TypeError, "must be float32 or float64, got dtype torch.float"),
    (lambda: OrthogonalAdapter(2)(X), ValueError, r"OrthogonalAdapter: x must be \(..., 2\), got \(5, 3\)"),
    (lambda: OrthogonalAdapter(2).merge(nn.Linear(2, 3)), ValueError, "linear must have 2 outputs, got 3"),
    (lambda: OrthogonalAdapter(2).merge(nn.Conv2d(2, 2, 1)), TypeError, "linear must be an nn.Linear, got Conv2d"),
])
def test_bad_input_is_named(make, error, words):
    with pytest.raises(error, match=words):
        make()
