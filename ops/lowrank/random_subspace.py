"""A whole module trained in a few dimensions: theta = theta_0 + P theta_d, with P random and fixed.

theta_0 (D,) are the parameters that require a gradient, one after another, frozen where they are; theta_d (d,) is all
that is trained and stored, and begins at zero. Each of the parameters is parametrized by torch's own means: whoever
reads it gets its part of theta, in a forward, in a part that a checkpoint runs again, in any thread. P theta_d is
computed once for a value of theta_d; it is linear and saves nothing, so that its graph serves any number of backwards,
and the gradient of theta_d is P's adjoint of the parameters' own.
"""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..common import FLOATS, check_module, check_word, full_precision, told, transformed, whole
from .projections import KINDS

NAME = "RandomSubspace"


class RandomSubspace(nn.Module):
    """A module whose parameters move in a random subspace of few dimensions.

    Args:
        module: any module. Its parameters that require a gradient, D numbers in all, are frozen as theta_0 and
            parametrized (`torch.nn.utils.parametrize`); frozen ones and buffers stay as they are. A parameter used in
            several places counts once.
        dim: d, from 1 to D: how many numbers are trained.
        kind: of the projection P (D, d), whose columns have length 1, with ``"fastfood"`` on average:
            ``"fastfood"`` is a product of Hadamard transforms, signs, a permutation and normal numbers, made anew from
            the seed: O(D log D) time, no memory beyond vectors of D. ``"dense"`` has normal columns and keeps D d
            numbers: for small modules. ``"sparse"`` has about sqrt(D) entries a column, and keeps those.
        seed: of the projection, an int from 0 to 2^63 - 1; the same on every process of a group.

    Attributes:
        theta: the `torch.nn.Parameter` (d,), zeros at first; float64 where a parameter of theta_0 is, else float32. It
            is the only parameter that requires a gradient.
        module: the module, at theta however it is called, its parts and their weights too.
        seed: the projection's, part of the `state_dict`.

    Optimisers, schedulers, DDP, `torch.compile`, `torch.export`, `copy.deepcopy`, checkpoints inside the module and
    several threads work as for any module; pickling the module whole does not, as for whatever is parametrized.
    Parameters of half precision are added to in float32 and rounded once.

    The `state_dict` holds theta, the seed with a number of each tensor of theta_0 to know it by, the module's buffers
    (running statistics), and what has been added to the module or trained besides; nothing of theta_0. To load it, make
    the module as before (a checkpoint, a seed), wrap it in the same kind and dim with any seed, and call
    `load_state_dict`.

    A learning rate means something else than for the parameters: a step of length s moves theta by about s. Adam with
    1e-2 to 1e-1 is where to look first.

    Raises:
        TypeError: module is no module, is scripted, or has trainable parameters that are not dense and real.
        ValueError: no parameter requires a gradient; dim is not from 1 to D; another kind, or a seed out of range;
            loading a state of another kind or dim, or of other parameters theta_0.
        RuntimeError: the module has been merged.

    Source: Li et al., "Measuring the intrinsic dimension of objective landscapes" (2018, arXiv 1804.08838); Fastfood:
    Le, Sarlos and Smola (2013); of language models: Aghajanyan et al. (2020, arXiv 2012.13255).

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(64, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))
        >>> model = ts.lowrank.RandomSubspace(model, 200, seed=1)
        >>> opt = torch.optim.Adam([model.theta], lr=0.02)
        >>> model(torch.randn(5, 64)).logsumexp(1).sum().backward(); opt.step()
        >>> model.theta.shape, [name for name, p in model.named_parameters() if p.requires_grad]
        (torch.Size([200]), ['theta'])
        >>> sorted(model.state_dict())
        ['_extra_state', 'theta']
        >>> plain = model.merge_and_unload()    # the module itself, at theta
    """

    def __init__(self, module: nn.Module, dim: int, kind: str = "fastfood", *, seed: int = 0) -> None:
        super().__init__()
        check_module(NAME, module, "module")
        check_word(NAME, "kind", kind, KINDS)
        dim, self.seed, self.kind = whole(NAME, "dim", dim, 1), whole(NAME, "seed", seed), kind
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for name, p in trained.items():
            check_parameter(NAME, name, p)
        if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            raise TypeError(f"{NAME}: module must not be scripted, got {type(module).__name__}")
        self.size = sum(p.numel() for p in trained.values())
        if not self.size:
            raise ValueError(f"{NAME}: no parameter of module requires a gradient")
        if dim > self.size:
            raise ValueError(f"{NAME}: dim must be at most {self.size}, the numbers that require a gradient, got {dim}")
        first = next(iter(trained.values()))
        wide = any(p.dtype == torch.float64 for p in trained.values())
        self.theta = nn.Parameter(torch.zeros(dim, device=first.device, dtype=torch.float64 if wide else torch.float32))
        self._project()
        self._frozen = {name: p._version for name, p in module.named_parameters() if not p.requires_grad}
        self._parts = _parametrize(self, module, trained)
        self.module: nn.Module | None = module
        self.register_state_dict_post_hook(_without_base)

    def extra_repr(self) -> str:
        return f"dim={len(self.theta)}, size={self.size}, kind={self.kind!r}, seed={self.seed}"

    def _project(self) -> None:
        """The projection of the present seed; what it keeps are buffers, but no part of the state."""
        self._projection = KINDS[self.kind](self.size, len(self.theta), self.seed)
        made = self._projection.made()
        for name, kept in made.items():
            self.register_buffer(name, kept.to(self.theta.device), persistent=False)
        self._ddp_params_and_buffers_to_ignore = list(made)  # equal on all processes
        self._at: tuple[Any, ...] | None = None  # what P theta was computed of, and P theta
        self._now: Tensor | None = None  # in a trace's forward

    def _apply(self, fn: Any, recurse: bool = True) -> RandomSubspace:
        super()._apply(fn, recurse)
        self._at = None
        if any(kept.is_floating_point() and kept.dtype != torch.float32 for kept in self.buffers(recurse=False)):
            self._project()  # of all its digits
        return self

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_at": None}  # which has a graph, and can be made again

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, at theta."""
        if self.module is None:
            raise RuntimeError(f"{NAME}: the module has been merged and is no longer held here")
        if not (torch.compiler.is_compiling() or transformed()):
            return self.module(*args, **kwargs)
        self._now = self._step(self.theta)  # once for the trace
        try:
            return self.module(*args, **kwargs)
        finally:
            self._now = None

    def _step(self, theta: Tensor) -> Tensor:
        with full_precision(theta):
            return self._projection.apply(theta, dict(self.named_buffers(recurse=False)))

    def _current(self) -> Tensor:
        """P theta (D,), computed once while theta is what it is."""
        theta = self.theta
        if torch.compiler.is_compiling() or transformed() or type(theta) not in (nn.Parameter, Tensor):
            return self._step(theta) if self._now is None else self._now
        key = (theta, theta._version, theta.data_ptr(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        at = self._at
        if at is None or at[0] is not theta or at[1:5] != key[1:]:
            self._at = at = (*key, _Project.apply(theta, self))
        return at[5]

    def parameters_at(self, theta: Tensor | None = None) -> dict[str, Tensor]:
        """The module's parameters theta_0 + P theta_d, differentiable in theta_d.

        Args:
            theta: theta_d (d,), default: the module's own.

        Returns:
            {name in the plain module: tensor}, of theta_0's shapes and dtypes, as `torch.func.functional_call` takes
            them for a module that is not wrapped.

        Raises:
            TypeError, ValueError: theta is no floating tensor, or of another shape.
            RuntimeError: the module has been merged.
        """
        if self.module is None:
            raise RuntimeError(f"{NAME}.parameters_at: the module has been merged and is no longer held here")
        if theta is not None and (not isinstance(theta, Tensor) or theta.dtype not in FLOATS):
            raise TypeError(f"{NAME}.parameters_at: theta must be a floating tensor, got {told(theta)}")
        if theta is not None and theta.shape != self.theta.shape:
            raise ValueError(f"{NAME}.parameters_at: theta must have shape {tuple(self.theta.shape)}, got "
                             f"{told(theta)}")
        step = self._current() if theta is None else self._step(theta)
        return {name: part.moved(base, step) for name, (part, base) in self._bases().items()}

    def _bases(self) -> dict[str, tuple[_Part, nn.Parameter]]:
        """{name in the plain module: its parametrization, theta_0's parameter}."""
        found = {}
        for owner in self.module.modules():
            for chain in getattr(owner, "parametrizations", {}).values():
                for part in chain:
                    if isinstance(part, _Part) and part.of is self and part.name not in found:
                        found[part.name] = part, chain.original
        return {name: found[name] for name in self._parts}

    @torch.no_grad()
    def merge_and_unload(self) -> nn.Module:
        """The module, its parameters set to theta and requiring gradients again; the wrapper is of no more use.

        Raises:
            RuntimeError: it has been merged before.
        """
        at, bases, module = self.parameters_at(), self._bases(), self.module
        _plain(self, module)
        for name, (_, base) in bases.items():
            base.copy_(at[name])
            base.requires_grad_()
        self.module = None
        return module

    # ----------------------------------------------------------------------------------------------------- its state

    def _base(self) -> list[nn.Parameter | None]:
        """theta_0's parameters, then those that were frozen before; None for such as have been changed since."""
        if self.module is None:
            raise RuntimeError(f"{NAME}: the module has been merged and is no longer held here")
        now = dict(self.module.named_parameters())
        kept = [now[name] if name in now and now[name]._version == version and not now[name].requires_grad else None
                for name, version in self._frozen.items()]
        return [base for _, base in self._bases().values()] + kept

    def _held(self) -> dict[str, nn.Parameter]:
        """Under all their names here, the parameters that a state leaves to the module."""
        base = {id(p) for p in self._base() if p is not None}
        return {f"module.{name}": p for name, p in self.module.named_parameters(remove_duplicate=False)
                if id(p) in base}

    def get_extra_state(self) -> Tensor:
        """The kind, the seed, the sizes and what theta_0 is known by, as int64: what writes tensors alone can hold."""
        base = self._base()
        sums = torch.tensor([_weighted(p) for p in base], dtype=torch.float64).view(torch.int64).tolist()
        coarsest = max((p.dtype for p in base if p is not None and p.dtype in FLOATS),
                       key=lambda dtype: torch.finfo(dtype).eps)
        return torch.tensor([list(KINDS).index(self.kind), self.seed, self.size, len(self.theta),
                             FLOATS.index(coarsest), *sums])

    def set_extra_state(self, state: Tensor) -> None:
        """The seed of a state that has been checked."""
        if self.seed != (seed := int(state[1])):
            self.seed = seed
            self._project()

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        if f"{prefix}_extra_state" in state_dict:
            self._check_state(state_dict[f"{prefix}_extra_state"])
        for name, p in self._held().items():
            state_dict.setdefault(prefix + name, p)  # nothing of the module's is missing
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._at = None

    def _check_state(self, state: object) -> None:
        """Raises unless it is of this kind and dim and of the same theta_0: before anything is changed."""
        if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.dim() != 1 or len(state) < 5:
            raise TypeError(f"{NAME}: _extra_state must be what state_dict has of it, got {told(state)}")
        state, own = state.cpu(), self.get_extra_state()
        kind, seed, size, dim, dtype = state[:5].tolist()
        if [kind, size, dim] != own[[0, 2, 3]].tolist() or seed < 0 or not 0 <= dtype < len(FLOATS):
            raise ValueError(f"{NAME}: the state is of {_words(kind, dim, size)}, this is "
                             f"{_words(*own[[0, 3, 2]].tolist())}")
        there, here = (s[5:].view(torch.float64).tolist() for s in (state, own))
        eps = max(torch.finfo(FLOATS[d]).eps for d in (dtype, int(own[4])))
        if len(there) != len(here) or any(abs(a - b) > 8 * eps * float(torch.linalg.vector_norm(p.detach().double()))
                                          for a, b, p in zip(there, here, self._base()) if p is not None):
            raise ValueError(f"{NAME}: the state is of a module with other parameters theta_0")


def _words(kind: int, dim: int, size: int) -> str:
    return f"kind {dict(enumerate(KINDS)).get(kind)!r}, {dim} of {size} dimensions"


def _without_base(module: RandomSubspace, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for name in module._held():
        state.pop(prefix + name, None)


@torch.no_grad()
def _weighted(p: Tensor | None) -> float:
    """A sum of all entries with weights from 1 to 2: what p is known by, up to its rounding; NaN where it has none."""
    if p is None or p.is_meta or p.dtype not in FLOATS:
        return math.nan
    place = torch.arange(p.numel(), dtype=torch.float64, device=p.device)
    return float(p.detach().double().flatten() @ (1 + (place * 0.6180339887498949).frac_()))


def check_parameter(name: str, what: str, p: nn.Parameter) -> None:
    """Raises in `name`'s voice unless it can be moved."""
    if is_lazy(p):
        raise TypeError(f"{name}: {what} has no shape yet: run the module once before")
    if p.is_meta:
        raise TypeError(f"{name}: {what} is on the meta device: give the module its values before")
    if isinstance(p, DTensor):
        raise TypeError(f"{name}: {what} is sharded: wrap the module before it is")
    if p.layout is not torch.strided or p.dtype not in FLOATS:
        raise TypeError(f"{name}: {what} must be dense and float32, float64, float16 or bfloat16, got {told(p)}")


# ------------------------------------------------------------------------------------------------ the module's tensors


class _Part(nn.Module):
    """A parameter's parametrization: theta_0's part as it stands there, and its part of P theta."""

    def __init__(self, of: RandomSubspace, name: str, begin: int) -> None:
        super().__init__()
        object.__setattr__(self, "of", of)  # which holds this one, and is no part of it
        self.name, self.begin = name, begin

    def forward(self, base: Tensor) -> Tensor:
        return self.moved(base, self.of._current())

    def moved(self, base: Tensor, step: Tensor) -> Tensor:
        part = step[self.begin : self.begin + base.numel()].view(base.shape)
        return (base + part.to(base.device)).to(base.dtype)


def _parametrize(of: RandomSubspace, module: nn.Module, trained: dict[str, nn.Parameter]) -> list[str]:
    """Every use of each parameter, and the parameters frozen. Returns their names."""
    places = [(owner, key, p) for owner in module.modules() for key, p in owner._parameters.items()]
    begin = 0
    for name, p in trained.items():
        part = _Part(of, name, begin)
        begin += p.numel()
        p.requires_grad_(False)
        for owner, key, q in places:
            if q is p:
                parametrize.register_parametrization(owner, key, part, unsafe=True)
    return list(trained)


def _plain(of: RandomSubspace, module: nn.Module) -> None:
    """Without the parametrizations."""
    for owner in list(module.modules()):
        for key, chain in list(getattr(owner, "parametrizations", {}).items()):
            if any(isinstance(part, _Part) and part.of is of for part in chain):
                parametrize.remove_parametrizations(owner, key, leave_parametrized=False)


class _Project(torch.autograd.Function):
    """P theta, and nothing saved for the backward."""

    @staticmethod
    def forward(ctx, theta, of):
        ctx.of = of
        return of._step(theta)

    @staticmethod
    def backward(ctx, dstep):
        return _Adjoint.apply(dstep, ctx.of), None


class _Adjoint(torch.autograd.Function):
    """P' of a gradient."""

    @staticmethod
    def forward(ctx, dstep, of):
        ctx.of = of
        with torch.enable_grad():
            theta = of.theta.detach().requires_grad_()
            return torch.autograd.grad(of._step(theta), theta, dstep)[0]

    @staticmethod
    def backward(ctx, dtheta):
        return _Project.apply(dtheta, ctx.of), None
