"""A whole module trained in a few dimensions: theta = theta_0 + P theta_d, with P random and fixed.

theta_0 (D,) are the parameters that require a gradient, one after another, frozen where they are; theta_d (d,) is all
that is trained and stored, and begins at zero. The module runs with its parameters exchanged for theta for the time
of a forward; P theta_d is linear, so that the gradient of theta_d is P's adjoint of the parameters' own.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torch.nn.parameter import is_lazy

from ..common import FLOATS, check_module, check_word, full_precision, told, whole
from ..fingerprint import COUNT, differs, values
from .projections import KINDS

NAME = "RandomSubspace"


class RandomSubspace(nn.Module):
    """A module whose parameters move in a random subspace of few dimensions.

    Args:
        module: any module. Its parameters that require a gradient, D numbers in all, are frozen as theta_0, and no
            longer require one; frozen ones and buffers stay as they are. A parameter used in several places counts
            once.
        dim: d, from 1 to D: how many numbers are trained.
        kind: of the projection P (D, d), whose columns have length 1:
            ``"fastfood"`` is a product of Hadamard transforms, signs, a permutation and normal numbers, made anew from
            the seed at each forward: O(D log D) time, no memory beyond the vector of D. ``"dense"`` has normal columns
            and keeps D d numbers: for small modules. ``"sparse"`` has about sqrt(D) entries a column, and keeps those.
        seed: of the projection, an int from 0 to 2^63 - 1; the same on every process of a group.

    Attributes:
        theta: the `torch.nn.Parameter` (d,), zeros at first; float64 where a parameter of theta_0 is, else float32. It
            is the only parameter that requires a gradient.
        module: the module; called itself it runs at theta_0.
        seed: the projection's, part of the `state_dict`.

    Calling it calls the module at theta. Optimisers, schedulers, DDP, `torch.compile`, `copy.deepcopy` and
    `torch.utils.checkpoint` inside the module work as for any module. Parameters of half precision are added to in
    float32 and rounded once.

    The `state_dict` holds theta, the seed with a few values of theta_0 to know it by, and the module's buffers (running
    statistics), and nothing of theta_0: to load it, make the module as before (a checkpoint, a seed), wrap it in the
    same kind and dim with any seed, and call `load_state_dict`.

    A learning rate means something else than for the parameters: a step of length s moves theta by about s. Adam with
    1e-2 to 1e-1 is where to look first.

    Raises:
        TypeError: module is no module, or has trainable parameters that are not dense and real.
        ValueError: no parameter requires a gradient; dim is not from 1 to D; another kind, or a seed out of range;
            loading a state of another kind, or of other parameters theta_0.

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
            _check(name, p)
        self._sizes = {name: p.numel() for name, p in trained.items()}
        if not self.size:
            raise ValueError(f"{NAME}: no parameter of module requires a gradient")
        if dim > self.size:
            raise ValueError(f"{NAME}: dim must be at most {self.size}, the numbers that require a gradient, got {dim}")
        first = next(iter(trained.values()))
        wide = any(p.dtype == torch.float64 for p in trained.values())
        self.theta = nn.Parameter(torch.zeros(dim, device=first.device, dtype=torch.float64 if wide else torch.float32))
        self._project()
        for p in trained.values():
            p.requires_grad_(False)
        self.module = module
        self._running, self._outer = False, None
        self.register_state_dict_post_hook(_without_frozen)
        self._hooks = [handle for part in module.modules() for handle in (
            part.register_forward_pre_hook(self._enter), part.register_forward_hook(self._leave, always_call=True))]

    @property
    def size(self) -> int:
        """D, how many numbers theta_0 has."""
        return sum(self._sizes.values())

    def extra_repr(self) -> str:
        return f"dim={len(self.theta)}, size={self.size}, kind={self.kind!r}, seed={self.seed}"

    def _project(self) -> None:
        """The projection of the present seed; what it keeps are buffers, but no part of the state."""
        self._projection = KINDS[self.kind](self.size, len(self.theta), self.seed)
        for name, kept in self._projection.made().items():
            self.register_buffer(name, kept.to(self.theta.device), persistent=False)

    def parameters_at(self, theta: Tensor | None = None) -> dict[str, Tensor]:
        """The module's parameters theta_0 + P theta_d, differentiable in theta_d.

        Args:
            theta: theta_d (d,), default: the module's own.

        Returns:
            {name in `module`: tensor}, of theta_0's shapes and dtypes, as `torch.func.functional_call` takes them.

        Raises:
            TypeError, ValueError: theta is no tensor, or of another shape.
        """
        theta = self.theta if theta is None else theta
        if not isinstance(theta, Tensor):
            raise TypeError(f"{NAME}.parameters_at: theta must be a tensor, got {told(theta)}")
        if theta.shape != self.theta.shape:
            raise ValueError(f"{NAME}.parameters_at: theta must have shape {tuple(self.theta.shape)}, got "
                             f"{told(theta)}")
        with full_precision(theta):
            return self._moved(self._step(theta))

    def _step(self, theta: Tensor) -> Tensor:
        return self._projection.apply(theta, dict(self.named_buffers(recurse=False)))

    def _moved(self, step: Tensor) -> dict[str, Tensor]:
        base = dict(self.module.named_parameters())
        return {name: (base[name] + part.view(base[name].shape).to(base[name].device)).to(base[name].dtype)
                for name, part in zip(self._sizes, step.split(list(self._sizes.values())))}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns, at theta."""
        before, self._running = self._running, True
        try:
            return functional_call(self.module, self.parameters_at(), args, kwargs)
        finally:
            self._running = before

    def _enter(self, part: nn.Module, args: Any) -> None:
        """A part that a checkpoint runs again in a backward runs as it did before: at theta."""
        if torch.compiler.is_compiling() or self._running or torch._C._current_graph_task_id() < 0:
            return
        at, self._running, self._outer = self._moved(_Again.apply(self.theta, self)), True, (part, [])
        names = {id(p): name for name, p in self.module.named_parameters() if name in at}
        for owner in self.module.modules():
            for key, p in owner._parameters.items():
                if id(p) in names:
                    self._outer[1].append((owner, key, p))
                    owner._parameters[key] = at[names[id(p)]]

    def _leave(self, part: nn.Module, args: Any, output: Any) -> None:
        if self._outer is not None and self._outer[0] is part:
            for owner, key, p in self._outer[1]:
                owner._parameters[key] = p
            self._running, self._outer = False, None

    @torch.no_grad()
    def merge_and_unload(self) -> nn.Module:
        """The module, its parameters set to theta and requiring gradients again; the wrapper is of no more use."""
        at, base = self.parameters_at(), dict(self.module.named_parameters())
        for name, moved in at.items():
            base[name].copy_(moved)
            base[name].requires_grad_()
        for handle in self._hooks:
            handle.remove()
        return self.module

    # ----------------------------------------------------------------------------------------------------- its state

    def _frozen(self) -> dict[str, nn.Parameter]:
        """Under all its names, what the state leaves to the module."""
        return {f"module.{name}": p for name, p in self.module.named_parameters(remove_duplicate=False)}

    def get_extra_state(self) -> Tensor:
        """The kind, the seed, and what theta_0 is known by, as int64: what writes tensors alone writes this too."""
        base = [p.detach() for name, p in self.module.named_parameters() if name in self._sizes]
        coarsest = max((p.dtype for p in base), key=lambda dtype: torch.finfo(dtype).eps)
        known = torch.tensor(values(base), dtype=torch.float64).view(torch.int64).tolist()
        return torch.tensor([list(KINDS).index(self.kind), self.seed, self.size, FLOATS.index(coarsest), *known])

    def set_extra_state(self, state: Tensor) -> None:
        """The seed of a state that has been checked."""
        if self.seed != (seed := int(state[1])):
            self.seed = seed
            self._project()

    def _load_from_state_dict(self, state_dict, prefix, *rest) -> None:
        if f"{prefix}_extra_state" in state_dict:
            self._check_state(state_dict[f"{prefix}_extra_state"])
        for name, p in self._frozen().items():
            state_dict.setdefault(prefix + name, p)  # nothing of the module's is missing
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _check_state(self, state: object) -> None:
        """Raises unless it is of this kind and of the same theta_0: before anything is changed."""
        if not isinstance(state, Tensor) or state.dtype != torch.int64 or state.shape != (4 + COUNT,):
            raise TypeError(f"{NAME}: _extra_state must be what state_dict has of it, got {told(state)}")
        kind, _, size, dtype = state[:4].tolist()
        own = self.get_extra_state()
        if (kind, size) != (own[0], own[2]):
            raise ValueError(f"{NAME}: the state is of {_words(kind, size)}, this is {_words(*own[[0, 2]].tolist())}")
        prints = [{"dtype": str(FLOATS[s[3]]).removeprefix("torch."), "values": s[4:].view(torch.float64).tolist()}
                  for s in (own, state.cpu())]
        if differs(*prints):
            raise ValueError(f"{NAME}: the state is of a module with other parameters theta_0: "
                             f"{prints[1]['values'][:2]}... there, {prints[0]['values'][:2]}... here")


class _Again(torch.autograd.Function):
    """P theta for a second run: a checkpoint counts what is saved, and this saves nothing."""

    @staticmethod
    def forward(ctx, theta, subspace):
        ctx.subspace = subspace
        with full_precision(theta):
            return subspace._step(theta)

    @staticmethod
    def backward(ctx, dstep):
        with torch.enable_grad(), full_precision(dstep):
            theta = ctx.subspace.theta.detach().requires_grad_()
            return torch.autograd.grad(ctx.subspace._step(theta), theta, dstep)[0], None


def _words(kind: int, size: int) -> str:
    return f"kind {dict(enumerate(KINDS)).get(kind)!r} over {size} parameters"


def _without_frozen(module: RandomSubspace, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for name in module._frozen():
        state.pop(prefix + name, None)


def _check(name: str, p: nn.Parameter) -> None:
    """Raises unless it can be moved."""
    if is_lazy(p):
        raise TypeError(f"{NAME}: {name} has no shape yet: run the module once before")
    if p.is_meta:
        raise TypeError(f"{NAME}: {name} is on the meta device: give the module its values before")
    if isinstance(p, DTensor):
        raise TypeError(f"{NAME}: {name} is sharded: wrap the module before it is")
    if p.layout is not torch.strided or p.dtype not in FLOATS:
        raise TypeError(f"{NAME}: {name} must be dense and float32, float64, float16 or bfloat16, got {told(p)}")
