"""What is asked of all optimisers of few dimensions: no autocast in a step, and states of others."""

import pytest
import torch
from helpers import normal
from torch import nn

from torch_subspace.lowrank import CoSO, LowRankAdamW, Trion

MAKE = {
    "LowRankAdamW": lambda p: LowRankAdamW(p, lr=1e-2, rank=4),
    "LowRankAdamW, svd": lambda p: LowRankAdamW(p, lr=1e-2, rank=4, projector="svd"),
    "LowRankAdamW, cosine": lambda p: LowRankAdamW(p, lr=1e-2, rank=4, projector="cosine", error_feedback="int8"),
    "LowRankAdamW, hadamard": lambda p: LowRankAdamW(p, lr=1e-2, rank=4, projector="hadamard"),
    "Trion": lambda p: Trion(p, lr=1e-2, rank=4),
    "CoSO": lambda p: CoSO(p, lr=1e-2, rank=4, sketch_rank=8),
}


def weights(*shape, seed=0):
    return nn.Parameter(normal(*shape, seed=seed, dtype=torch.float32))


def steps(p, opt, count, begin=0):
    """How long each is."""
    found = []
    for i in range(begin, begin + count):
        before, p.grad = p.detach().clone(), normal(*p.shape, seed=10 + i, dtype=torch.float32)
        opt.step()
        found.append((p.detach() - before).norm().item())
    return found


@pytest.mark.parametrize("name", MAKE)
def test_a_step_under_autocast_is_the_same(name):
    found = []
    for enabled in (False, True):
        p = weights(12, 20)
        opt = MAKE[name]([p])
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            steps(p, opt, 3)
        if name == "CoSO":
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                opt.consolidate()
                steps(p, opt, 2, 3)
        found.append(p.detach())
    assert torch.equal(*found)


@pytest.mark.parametrize("name", ["LowRankAdamW", "CoSO"])
def test_steps_after_a_state_of_adamw_are_no_longer(name):
    p = weights(12, 20)
    adamw = torch.optim.AdamW([p], 1e-2, weight_decay=0.0)
    longest = max(steps(p, adamw, 30)[5:])
    opt = MAKE[name]([p])
    opt.load_state_dict(adamw.state_dict())
    assert max(steps(p, opt, 10, 30)) < 1.6 * longest


def test_a_rank_from_all_inputs_down_and_none_up():
    p = weights(12, 20)
    opt = CoSO([p], lr=1e-2, rank=20, sketch_rank=20)
    before = steps(p, opt, 10)
    opt.param_groups[0]["rank"] = 4
    assert max(steps(p, opt, 10, 10)) < 1.5 * max(before)
    state = opt.state_dict()
    opt.param_groups[0]["rank"] = 20
    with pytest.raises(ValueError, match=r"CoSO: rank must stay below the inputs .* got 20 for a parameter of"):
        opt.step()
    assert opt.state[p]["step"] == state["state"][0]["step"]


def test_what_is_protected_stays_so():
    p = weights(12, 20)
    opt = CoSO([p], lr=1e-2, rank=4, sketch_rank=8)
    steps(p, opt, 3)
    opt.consolidate()
    opt.param_groups[0]["protect"] = False
    with pytest.raises(ValueError, match="CoSO: protect must stay True for what has been protected, got False"):
        opt.step()


def test_a_state_of_another_shape_is_refused():
    p, q = weights(8, 8), weights(4, 16)
    first, second = MAKE["Trion"]([p]), MAKE["Trion"]([q])
    steps(p, first, 1)
    with pytest.raises(ValueError, match=r"Trion: state_dict must be of parameters of the same shapes, got \(8"):
        second.load_state_dict(first.state_dict())
    assert not second.state[q]


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("there, here", [((12, 9), (13, 9)), ((20, 9), (9, 9)), ((12, 40), (12, 9)), ((9,), (8,)),
                                         ((3, 8, 9), (2, 8, 9)), ((12, 9), (8,)), ((9,), (12, 9))])
def test_states_of_other_shapes_are_refused_before_anything_changes(name, there, here):
    """As they come of parameters in another order, or of another model."""
    first, second = weights(*there), weights(*here, seed=1)
    saved, opt = MAKE[name]([first]), MAKE[name]([second])
    steps(first, saved, 1)
    steps(second, opt, 1)
    with pytest.raises(ValueError, match="state_dict must be of parameters of the same shapes, got .* for"):
        opt.load_state_dict(saved.state_dict())
    assert steps(second, opt, 1, begin=1)[0] > 0 and second.isfinite().all()
    saved.load_state_dict(saved.state_dict())
