"""A whole module trained in a few dimensions: theta = theta_0 + P theta_d, with P random and fixed.

theta_0 (D,) are the parameters that require a gradient, one after another, frozen where they are; theta_d (d,) is all
that is trained and stored, and begins at zero. Each of the parameters is parametrized by torch's own means: whoever
reads it gets its part of theta, in a forward, in a part that a checkpoint runs again, in any thread. P theta_d is
computed once for a value of theta_d; it is linear and saves nothing, so that its graph serves any number of backwards,
and the gradient of theta_d is P's adjoint of the parameters' own.
"""
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrize

from ..common import FLOATS, check_module, check_word, full_precision, told, transformed, whole
from .parts import (
    CHANGED,
    Kept,
    Known,
    Part,
    check_dense_gradients,
    check_memory,
    check_parameter,
    coarseness,
    code,
    known,
    own_chains,
    own_class,
    parametrized,
    rounding,
    running,
)
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
        seed: the projection's, part of the `state_dict`; it can't be set.

    Optimisers, schedulers, DDP, `torch.compile`, `torch.export`, `copy.deepcopy`, checkpoints inside the module and
    several threads work as for any module; pickling the module whole does not, as for whatever is parametrized.
    Parameters of half precision are added to in float32 and rounded once.

    The `state_dict` holds theta, the seed with a number of each tensor of theta_0 to know it by, the module's buffers
    (running statistics), and what has been added to the module, changed or trained besides; nothing else of theta_0. To
    load it, make the module as before (a checkpoint, a seed), wrap it in the same kind and dim with any seed, and call
    `load_state_dict`.

    A learning rate means something else than for the parameters: a step of length s moves theta by about s. Adam with
    1e-2 to 1e-1 is where to look first.

    Raises:
        TypeError: module is no module, is scripted, or has trainable parameters that are not dense and real, or whose
            gradients are sparse.
        ValueError: no parameter requires a gradient, or two have the same memory; dim is not from 1 to D; another kind,
            or a seed out of range; loading a state of another kind or dim, or of other parameters theta_0.
        RuntimeError: the module has been merged; merging what has been parametrized once more.

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
        dim, self._seed, self.kind = whole(NAME, "dim", dim, 1), whole(NAME, "seed", seed), kind
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        for name, p in trained.items():
            check_parameter(NAME, name, p)
        if any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()):
            raise TypeError(f"{NAME}: module must not be scripted, got {type(module).__name__}")
        check_memory(NAME, module)
        check_dense_gradients(NAME, module)
        self.size = sum(p.numel() for p in trained.values())
        if not self.size:
            raise ValueError(f"{NAME}: no parameter of module requires a gradient")
        if dim > self.size:
            raise ValueError(f"{NAME}: dim must be at most {self.size}, the numbers that require a gradient, got {dim}")
        first = next(iter(trained.values()))
        wide = any(p.dtype == torch.float64 for p in trained.values())
        with torch.inference_mode(False):
            self.theta = nn.Parameter(torch.zeros(dim, device=first.device,
                                                  dtype=torch.float64 if wide else torch.float32))
        self._kept = Kept()
        self._project()
        others = {name: p for name, p in module.named_parameters() if not p.requires_grad}
        self._known = {name: (known(p).bits, p.dtype) for name, p in (trained | others).items()}
        self._order = [(owner, list(owner._parameters)) for owner in module.modules()]
        self._parts = parametrized(self, module, trained)
        self.module: nn.Module | None = module
        self.register_state_dict_post_hook(_without_base)

    @property
    def seed(self) -> int:
        return self._seed

    def extra_repr(self) -> str:
        return f"dim={len(self.theta)}, size={self.size}, kind={self.kind!r}, seed={self.seed}"

    def _project(self) -> None:
        """The projection of the present seed; what it keeps are buffers, but no part of the state."""
        self._projection = KINDS[self.kind](self.size, len(self.theta), self.seed)
        with torch.inference_mode(False):
            made = {name: kept.to(self.theta.device) for name, kept in self._projection.made().items()}
        for name, kept in made.items():
            self.register_buffer(name, kept, persistent=False)
        self._ddp_params_and_buffers_to_ignore = list(made)  # equal on all processes
        self._kept.at = None
        self._now: Tensor | None = None  # in a compiled forward

    def _apply(self, fn: Any, recurse: bool = True) -> RandomSubspace:
        probe = {dtype: torch.empty(0, dtype=dtype, device=self.theta.device) for dtype in FLOATS}
        same = []
        if self.module is not None and any(fn(t).dtype != dtype for dtype, t in probe.items()):
            same = [name for name, (p, _) in self._base().items() if p is not None]
        was_meta, made = self.theta.is_meta, {id(kept) for kept in self.buffers(recurse=False)}

        def of_seed(t: Tensor) -> Tensor:  # the projection goes along, neither rounded nor what a memory held
            if id(t) not in made:
                return fn(t)
            device = fn(t[:0]).device
            return torch.empty_like(t, device=device) if t.is_meta else t.to(device)

        super()._apply(of_seed, recurse)
        now = self._now_there() if same else {}
        for name in same:  # rounded, which is no change
            dtypes = self._known[name][1], now[name].dtype
            self._known[name] = known(now[name]).bits, max(dtypes, key=coarseness)
        self._kept.at = None
        if was_meta and not self.theta.is_meta:  # to_empty: as it begins
            nn.init.zeros_(self.theta)
            self._project()
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> RandomSubspace:
        for owner in self.modules():  # weights that were read, in an LSTM's list or where weight_norm puts them
            for value in vars(owner).values():
                for t in value if isinstance(value, list) else (value,):
                    if isinstance(t, Tensor) and not t.is_leaf:
                        memo[id(t)] = t.detach().clone()
        memo[id(self)] = new = self.__class__.__new__(self.__class__)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, at theta."""
        if self.module is None:
            raise RuntimeError(f"{NAME}: the module has been merged and is no longer held here")
        if torch.compiler.is_compiling():
            self._now = self._step(self.theta)  # once for the trace
            try:
                return self.module(*args, **kwargs)
            finally:
                self._now = None
        inside, before = running.steps, running.steps.get(id(self))
        inside[id(self)] = self._step(self.theta) if self._anew() else self._current()
        try:
            return self.module(*args, **kwargs)
        finally:
            del inside[id(self)]
            if before is not None:
                inside[id(self)] = before

    def _step(self, theta: Tensor) -> Tensor:
        with full_precision(theta):
            return self._projection.apply(theta, dict(self.named_buffers(recurse=False)))

    def _anew(self) -> bool:
        """Whether P theta is part of what is traced or captured, or theta is none that can be looked at."""
        return (transformed() or type(self.theta) not in (nn.Parameter, Tensor)
                or self.theta.is_cuda and torch.cuda.is_current_stream_capturing())

    def _current(self) -> Tensor:
        """P theta (D,), computed once while theta is what it is.

        Its numbers are compared, as there are many ways to change them that torch doesn't count: `theta.data`, fused
        optimisers, other processes. Within a forward of ours that was done at its beginning, and a backward runs at
        what the forward ran at: there its count is enough.
        """
        theta = self.theta
        if torch.compiler.is_compiling():
            return self._step(theta) if self._now is None else self._now
        inside = running.steps.get(id(self))
        if self._anew():
            return self._step(theta) if inside is None else inside
        key = (None if theta.is_inference() else theta._version, theta.data_ptr(), theta.requires_grad,
               torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        at = self._kept.at
        trusted = inside is not None or torch._C._current_graph_task_id() != -1
        if at is None or at[0] is not theta or at[1] != key or not (trusted or torch.equal(theta, at[2])):
            self._kept.at = at = theta, key, theta.detach().clone(), _Project.apply(theta, self)
        return at[3]

    def parameters_at(self, theta: Tensor | None = None) -> dict[str, Tensor]:
        """The module's parameters theta_0 + P theta_d, differentiable in theta_d.

        Args:
            theta: theta_d (d,), default: the module's own.

        Returns:
            {name in the plain module: tensor}, of theta_0's shapes and dtypes, as `torch.func.functional_call` takes
            them for a module that is not wrapped.

        Raises:
            TypeError, ValueError: theta is no floating tensor, or of another shape.
            RuntimeError: the module has been merged, or is sharded.
        """
        if self.module is None:
            raise RuntimeError(f"{NAME}.parameters_at: the module has been merged and is no longer held here")
        if theta is not None and (not isinstance(theta, Tensor) or theta.dtype not in FLOATS):
            raise TypeError(f"{NAME}.parameters_at: theta must be a floating tensor, got {told(theta)}")
        if theta is not None and theta.shape != self.theta.shape:
            raise ValueError(f"{NAME}.parameters_at: theta must have shape {tuple(self.theta.shape)}, got "
                             f"{told(theta)}")
        if isinstance(self.theta, DTensor):
            raise RuntimeError(f"{NAME}.parameters_at: theta is sharded: load the state into a module that is not")
        step = self._current() if theta is None else self._step(theta)
        return {name: part.moved(base, step) for name, (part, base) in self._bases().items()}

    def _bases(self) -> dict[str, tuple[Part, nn.Parameter]]:
        """{name in the plain module: its parametrization, theta_0's parameter}."""
        found = {}
        for _, _, chain in own_chains(self, self.module):
            for part in chain:
                if isinstance(part, Part) and part.of is self:
                    found.setdefault(part.name, (part, chain.original))
        return {name: found[name] for name in self._parts if name in found}  # not of a layer that was replaced

    @torch.no_grad()
    def merge_and_unload(self) -> nn.Module:
        """The module, its parameters set to theta and requiring gradients again; the wrapper is of no more use.

        Raises:
            RuntimeError: it has been merged before, or one of its parameters has been parametrized since.
        """
        at, bases, module = self.parameters_at(), self._bases(), self.module
        chains = own_chains(self, module)
        for _, key, chain in chains:
            if len(chain) > 1:
                raise RuntimeError(f"{NAME}.merge_and_unload: {key} has been parametrized once more: remove that first")
        for owner, key, _ in chains:
            own_class(owner)
            parametrize.remove_parametrizations(owner, key, leave_parametrized=False)
        for owner, order in self._order:  # what is registered again comes last
            for key in [*order, *(key for key in owner._parameters if key not in order)]:
                if key in owner._parameters:
                    owner._parameters[key] = owner._parameters.pop(key)
        for name, (_, base) in bases.items():
            base.copy_(at[name])
            base.requires_grad_()
        self.module = None
        return module

    # ----------------------------------------------------------------------------------------------------- its state

    def _now_there(self) -> dict[str, nn.Parameter]:
        """{name in the plain module: parameter}, of theta_0, and what is there under its own name."""
        return dict(self.module.named_parameters()) | {name: base for name, (_, base) in self._bases().items()}

    def _base(self) -> dict[str, tuple[nn.Parameter | None, Known]]:
        """{name in the plain module: a parameter that a state leaves to it, what it is known by}, theta_0's first; None
        for what has been changed since, or is trained besides."""
        if self.module is None:
            raise RuntimeError(f"{NAME}: the module has been merged and is no longer held here")
        now = self._now_there()
        found: dict[str, tuple[nn.Parameter | None, Known]] = {}
        for name, (bits, _) in self._known.items():
            p = now.get(name)
            there = Known(None) if p is None else known(p)
            same = p is not None and not p.requires_grad and there.bits == bits
            found[name] = p if same else None, there
        return found

    def _held(self, codes: list[int]) -> dict[str, nn.Parameter]:
        """Under all their names here, the parameters that a state with these codes leaves to the module."""
        now = self._now_there()
        base = {id(now[name]) for name, mark in zip(self._known, codes) if mark != CHANGED and name in now}
        return {f"module.{name}": p for name, p in self.module.named_parameters(remove_duplicate=False)
                if id(p) in base}

    def get_extra_state(self) -> Tensor:
        """The kind, the seed, the sizes; of each parameter of theta_0 the coarsest dtype that it has had, or that it
        has been changed, and the sum that it is known by: as int64, for what writes tensors alone."""
        base = self._base()
        codes = [CHANGED if p is None else code(self._known[name][1]) for name, (p, _) in base.items()]
        sums = torch.tensor([own.sum for _, own in base.values()], dtype=torch.float64, device="cpu").view(torch.int64)
        return torch.tensor([list(KINDS).index(self.kind), self.seed, self.size, len(self.theta),
                             *codes, *sums.tolist()], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """The seed of a state that has been checked."""
        if self.seed != (seed := int(state[1])):
            self._seed = seed
            self._project()

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        if f"{prefix}_extra_state" in state_dict:
            codes = self._check_state(state_dict[f"{prefix}_extra_state"])
            for name, p in self._held(codes).items():
                state_dict.setdefault(prefix + name, p)  # nothing of the module's is missing
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._kept.at = None
        if any(kept.device != self.theta.device for kept in self.buffers(recurse=False)):  # assigned from elsewhere
            self._project()

    def _check_state(self, state: object) -> list[int]:
        """Raises unless it is of this kind and dim and of the same theta_0: before anything is changed. Returns of each
        parameter whether the state or this module's has been changed."""
        if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.dim() != 1 or len(state) < 4:
            raise TypeError(f"{NAME}: _extra_state must be what state_dict has of it, got {told(state)}")
        kind, seed, size, dim, *rest = state.tolist()
        here = [list(KINDS).index(self.kind), self.size, len(self.theta)]
        if [kind, size, dim] != here or seed < 0:
            raise ValueError(f"{NAME}: the state is of {_words(kind, dim, size)}, this is "
                             f"{_words(here[0], here[2], here[1])}")
        base = self._base()
        if len(rest) != 2 * len(base):
            raise ValueError(f"{NAME}: the state is of a module with other parameters theta_0")
        codes = rest[: len(base)]
        sums = state.cpu()[4 + len(base) :].view(torch.float64).tolist()
        for i, (name, (p, own)) in enumerate(base.items()):
            if codes[i] == CHANGED or p is None:
                codes[i] = CHANGED
            elif abs(sums[i] - own.sum) > rounding(codes[i], self._known[name][1]) * own.length:
                raise ValueError(f"{NAME}: the state is of a module with other parameters theta_0")
        return codes


def _words(kind: int, dim: int, size: int) -> str:
    return f"kind {dict(enumerate(KINDS)).get(kind)!r}, {dim} of {size} dimensions"


def _without_base(module: RandomSubspace, state: dict[str, Any], prefix: str, metadata: object) -> None:
    codes = state[f"{prefix}_extra_state"][4:].tolist()
    for name in module._held(codes[: len(codes) // 2]):
        state.pop(prefix + name, None)


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
