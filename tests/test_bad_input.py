"""Wrong arguments of every public call: an error that says whose, which and what, and nothing is changed."""

import importlib
import inspect

import bad_calls
import numpy as np
import pytest
import torch
from bad_calls import CALLS
from bad_input import faults
from names import HOMES, PEFT
from torch import nn

import torch_subspace as ts
from torch_subspace import metrics


def public():
    """{name: function} of all that is public and takes arguments, methods of public classes included."""
    found = {}
    for module in (importlib.import_module(home) for home in HOMES if home != PEFT):
        found |= {f"{module.__name__}.{n}".removeprefix("torch_subspace."): getattr(module, n) for n in module.__all__}
    for name, cls in [(n, c) for n, c in found.items() if inspect.isclass(c)]:
        found |= {f"{name}.{n}": getattr(cls, n) for n, f in vars(cls).items()
                  if not n.startswith("_") and (inspect.isfunction(f) or isinstance(f, classmethod))}
    return found


def parameters(name, function):
    kinds = inspect.signature(function).parameters.values()
    return {p.name for p in kinds if p.kind is not p.VAR_KEYWORD} - {"self"}  # what another is to check


NOT_ASKED = {  # what torch or we ourselves call
    "GrassmannLinear.register_parameter", "GrassmannLinear.extra_repr", "TuckerConfig.ranks", "TuckerConfig.scale",
    "SpectralConfig.ranks", "SpectralConfig.scale",
    *(f"grassmann.DynamicSubspaceLearners.{name}" for name in ("get_extra_state", "set_extra_state", "extra_repr")),
    *(f"isotropy.{name}.extra_repr" for name in (
        "SIGRegLoss", "LeJEPALoss", "KoopmanInformationLoss", "OrthogonalAdapter", "SimLAPLoss",
        "LambdaOrthogonalityLoss", "SimilarityDistillationLoss", "GroupLassoLoss")),
    *(f"lowrank.RandomSubspace.{name}" for name in ("forward", "extra_repr", "get_extra_state", "set_extra_state")),
    "lowrank.IntrinsicDimension", "lowrank.IntrinsicDimension.plot",  # what is found, and matplotlib's arguments
    "distributed.ClassParallel.enter", "distributed.ClassParallel.logits",
    *(f"grassmann.KSubspaces.{name}" for name in (  # scikit-learn's own checks ask them
        "fit", "fit_predict", "fit_transform", "predict", "score", "set_output", "transform")),
    *(f"lowrank.StreamingPCA.{name}" for name in (
        "fit", "fit_transform", "inverse_transform", "partial_fit", "set_output", "transform")),
}


def test_every_argument_of_every_public_call_is_tried():
    tried = {}
    for key, call in CALLS.items():
        tried.setdefault(key.split()[0], set()).update(call.kinds)
    forgotten = {name: sorted(missing) for name, function in public().items() if name not in NOT_ASKED
                 and (missing := parameters(name, function) - tried.get(name, set()))}
    assert not forgotten, "give these a line in bad_calls.py"


@pytest.mark.parametrize("key", CALLS)
def test_wrong_arguments_are_named(key):
    assert not faults(CALLS[key])


HEAD = ts.GrassmannLinear(6, 3, (2, 1, 1), gamma=25.0)
X = torch.randn(4, 6)


@pytest.mark.parametrize("dims", [[2, 1, 1], range(2, 3), torch.Size([2, 1, 1]), np.array([2, 1, 1]),
                                  torch.tensor([2, 1, 1]), (k for k in (2, 1, 1)), (np.int64(2), 1, 1)],
                         ids=lambda dims: type(dims).__name__)
def test_integers_of_any_kind_are_dims(dims):
    if isinstance(dims, range):
        weight, dims, expected = HEAD.weight[:2], dims, ts.subspace_logits(X, HEAD.weight[:2], dims=(2,))
    else:
        weight, expected = HEAD.weight, HEAD(X)
    assert torch.equal(ts.subspace_logits(X, weight, dims=dims), expected)


@pytest.mark.parametrize("make", [
    lambda n: ts.GrassmannLinear(n(6), n(3), n(2), gamma=np.float32(2), normalize=np.bool_(True)),
    lambda n: ts.GrassmannLinear(n(6), n(2), np.array([2, 1]), gamma=n(2), normalize=1),
    lambda n: ts.TuckerConfig(rank=n(2), alpha=n(2), dropout=np.float32(0.1)),
    lambda n: ts.RiemannianSGD([nn.Parameter(X)], lr=np.float32(0.1), momentum=n(0), nesterov=np.bool_(False)),
    lambda n: ts.RiemannianAdamW([nn.Parameter(X)], lr=torch.tensor(0.1), betas=[np.float64(0.9), 0.99]),
    lambda n: ts.MLCLoss(eps=np.float32(0.5), eta=n(1), reg=n(0)),
    lambda n: ts.param_groups(HEAD, lr=np.float32(0.1), weight_decay=torch.tensor(0.1), no_decay=["*.bias"]),
    lambda n: ts.swap_head(bad_calls.plain(), n(5), n(2)),
    lambda n: ts.grassmann_step_(HEAD.weight.detach().clone(), torch.zeros(4, 6), lr=n(1), dims=[n(2), n(1), n(1)]),
    lambda n: metrics.principal_angles(X, [0, 0, 1, 1], n(1)),
])
def test_numbers_of_numpy_are_numbers(make):
    for number in (np.int64, np.int32, int):
        make(number)
