"""The group lasso and its proximal step."""

import math

import pytest
import torch
from helpers import close, normal, same

from torch_subspace.isotropy import GroupLassoLoss, group_lasso, prox_group_lasso_

GROUPS = (2, 1, 3)


def test_values():
    weight = normal(6, 4)
    expected = sum(part.norm() for part in weight.split(GROUPS))
    close([group_lasso(weight, GROUPS)], [expected], 1e-14)
    close([group_lasso(weight.view(6, 2, 2), list(GROUPS)), group_lasso(weight[:, 0], GROUPS)],
          [expected, sum(part.norm() for part in weight[:, 0].split(GROUPS))], 1e-14)
    single = group_lasso(weight.float(), GROUPS)
    assert single.dtype == torch.float32 and group_lasso(weight.half(), GROUPS).dtype == torch.float32
    close([single], [expected], 1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(group_lasso(weight.float(), GROUPS), single)


def test_the_module_is_the_function():
    weight = normal(6, 4)
    for groups in (GROUPS, iter(GROUPS), torch.tensor(GROUPS)):
        loss = GroupLassoLoss(groups)
        assert torch.equal(loss(weight), group_lasso(weight, GROUPS)) and loss.groups == GROUPS
        assert repr(loss) == "GroupLassoLoss(groups=(2, 1, 3))"
    for groups, error in (((0, 6), ValueError), ((2.0, 4), TypeError), (6, TypeError)):
        with pytest.raises(error, match="GroupLassoLoss: groups must be sizes along dimension 0"):
            GroupLassoLoss(groups)
    with pytest.raises(ValueError, match="group_lasso: groups have 6 rows, weight has 5"):
        GroupLassoLoss(GROUPS)(weight[1:])


def test_derivatives_and_groups_of_zeros():
    weight = normal(6, 4).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: group_lasso(w, GROUPS), weight)
    assert torch.autograd.gradgradcheck(lambda w: group_lasso(w, GROUPS), weight)
    zero = weight.detach().clone()
    zero[:2] = 0
    zero.requires_grad_()
    (dweight,) = torch.autograd.grad(group_lasso(zero, GROUPS), zero, create_graph=True)
    assert not dweight[:2].any() and dweight.isfinite().all()
    close([part.norm() for part in dweight.detach().split(GROUPS)[1:]], [torch.ones(()).double()] * 2, 1e-12)
    (second,) = torch.autograd.grad(dweight.sum(), zero)
    assert second.isfinite().all()
    (expected,) = torch.autograd.grad(group_lasso(weight, GROUPS), weight)
    close([torch.func.grad(group_lasso)(weight.detach(), GROUPS)], [expected], 1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_step_is_the_exact_minimum(dtype):
    weight = normal(6, 4).to(dtype)
    found = weight.clone()
    assert prox_group_lasso_(found, GROUPS, 1.5) is found
    for before, after in zip(weight.double().split(GROUPS), found.double().split(GROUPS)):
        length = before.norm()
        expected = before * max(0.0, 1 - 1.5 / length.item())
        close([after], [expected], {torch.float64: 1e-13, torch.float32: 1e-6}.get(dtype, 1e-2), floor=1e-3)
        assert length > 1.5 or not after.any()
    if dtype == torch.float64:
        def objective(w):
            return (w - weight).square().sum() / 2 + 1.5 * group_lasso(w, GROUPS)

        least = objective(found)
        for seed in range(20):
            assert objective(found + 10.0 ** -(seed % 5) * normal(6, 4, seed=seed)) > least


def test_edges_of_the_step():
    weight = normal(6, 4)
    weight[:2] = 0
    found = prox_group_lasso_(weight.clone(), GROUPS, 0.0)
    assert torch.equal(found, weight)
    assert not prox_group_lasso_(weight.clone(), GROUPS, 1e9).any()
    assert not prox_group_lasso_(-weight, GROUPS, 1e9).signbit().any()  # no -0
    nothing = torch.zeros(0, 3)
    assert group_lasso(nothing, []) == 0 and prox_group_lasso_(nothing, [], 1.0) is nothing
    weight[2, 0], weight[5, 3] = math.nan, math.inf
    found = prox_group_lasso_(weight.clone(), GROUPS, 0.5)
    assert not found[:2].any() and found[2].isnan().all() and found[5, 3] == math.inf
    parameter = torch.nn.Parameter(normal(6, 4))
    prox_group_lasso_(parameter, GROUPS, 0.1)
    assert parameter.requires_grad and parameter.grad_fn is None
    strided = normal(4, 6).mT
    assert same([prox_group_lasso_(strided.clone().mT.contiguous().mT, GROUPS, 0.5)],
                [prox_group_lasso_(strided.contiguous(), GROUPS, 0.5)])


@pytest.mark.parametrize("size", [1e-38, 1e-23, 1e19, 1e37])
def test_units_do_not_matter(size):
    """Squares are beyond float32."""
    weight = normal(6, 4)
    single = (weight * size).float().requires_grad_()
    expected = sum((part.norm() for part in weight.split(GROUPS)), torch.zeros(()).double())
    found = group_lasso(single, GROUPS)
    close([found.detach().double() / size], [expected], 1e-6)
    (dweight,) = torch.autograd.grad(found, single)
    close([dweight], [torch.cat([part / part.norm() for part in weight.split(GROUPS)])], 1e-6)
    single = single.detach()
    assert torch.equal(prox_group_lasso_(single.clone(), GROUPS, 0.0), single)
    after = prox_group_lasso_(single.clone(), GROUPS, 1.5 * size)
    close([after.double() / size], [prox_group_lasso_(weight.clone(), GROUPS, 1.5)], 1e-6)


@pytest.mark.parametrize("shape, strides, shared", [
    ((3, 2), (1, 1), True), ((2, 3), (2, 1), True), ((6, 4), (0, 1), True), ((2, 2, 2), (3, 1, 2), True),
    ((4, 3), (2, 3), True), ((2, 3), (3, 2), False), ((3, 2), (1, 3), False), ((3, 2), (4, 2), False),
    ((3, 1), (1, 0), False), ((0, 3), (1, 0), False), ((3,), (2,), False),
], ids=str)
def test_elements_that_share_memory(shape, strides, shared):
    """An element written twice has the second one's value."""
    memory = torch.arange(1.0, 40)
    weight = memory.as_strided(shape, strides)
    before, sizes = memory.clone(), [1] * shape[0]
    if shared:
        with pytest.raises(ValueError, match="weight must have no elements that share memory"):
            prox_group_lasso_(weight, sizes, 0.5)
        assert torch.equal(memory, before)
    else:
        expected = prox_group_lasso_(weight.clone(), sizes, 0.5)
        assert torch.equal(prox_group_lasso_(weight, sizes, 0.5), expected)


def test_planted_groups_are_recovered():
    """Three of eight groups of features matter: proximal gradient finds them, and exactly those."""
    sizes = [1, 2, 3, 4, 1, 2, 3, 4]
    for seed in range(3):
        planted = normal(20, 5, seed=seed)
        parts = planted.split(sizes)
        for g, part in enumerate(parts):
            if g not in (1, 4, 6):
                part.zero_()
        x = normal(120, 20, seed=seed + 1)
        y = x @ planted + 0.1 * normal(120, 5, seed=seed + 2)
        weight, step = torch.zeros_like(planted), 120 / torch.linalg.matrix_norm(x, 2).square().item()
        for _ in range(200):
            weight -= step * x.mT @ (x @ weight - y) / 120
            prox_group_lasso_(weight, sizes, step * 0.1)
        alive = [g for g, part in enumerate(weight.split(sizes)) if part.any()]
        assert alive == [1, 4, 6]
        assert (weight - planted).norm() < 0.2 * planted.norm()


@pytest.mark.slow
def test_compile_without_graph_breaks():
    torch._dynamo.reset()
    weight = normal(6, 4, dtype=torch.float32).requires_grad_()

    def both(weight):
        return group_lasso(weight, GROUPS) + prox_group_lasso_(weight.detach().clone(), GROUPS, 0.5).sum()

    found, expected = torch.compile(both, fullgraph=True, backend="aot_eager")(weight), both(weight)
    close([found.detach(), *torch.autograd.grad(found, weight)],
          [expected.detach(), *torch.autograd.grad(expected, weight)], 1e-6)


W = torch.randn(6, 4)


@pytest.mark.parametrize("weight, groups, error, words", [
    (W, (2, 3), ValueError, r"groups have 5 rows, weight has 6: got sizes tuple \(2, 3\)"),
    (W, (0, 6), ValueError, "groups must be sizes along dimension 0, ints of at least 1, got tuple"),
    (W, (2.0, 4), TypeError, "groups must be sizes along dimension 0"),
    (W, "222", TypeError, "got str '222'"),
    (W, 6, TypeError, "groups must be sizes along dimension 0, ints of at least 1, got int 6"),
    (W[0, 0], (1,), ValueError, r"weight must be \(rows, ...\), got a scalar"),
])
def test_bad_input_is_named(weight, groups, error, words):
    with pytest.raises(error, match=words):
        group_lasso(weight, groups)
    with pytest.raises(error, match=words):
        prox_group_lasso_(weight, groups, 0.1)
    with pytest.raises(ValueError, match=r"prox_group_lasso_: weight must have no elements that share memory, got "
                                         r"strides \(0, 1\) for shape \(6, 4\)"):
        prox_group_lasso_(W[:1].expand(6, 4), (6,), 0.1)
    with pytest.raises(ValueError, match="prox_group_lasso_: step must be finite and >= 0, got -1"):
        prox_group_lasso_(W, (6,), -1)
