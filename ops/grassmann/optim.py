"""Optimisers for a whole model: frames take a Riemannian step, all other parameters that of torch's own optimiser.

Frames are the weights of our layers, in whatever group they stand, and all parameters of a group with
`manifold="grassmann"`; `param_groups` gives them groups of their own. All others are Euclidean and go through the code
of `torch.optim.SGD` and `torch.optim.AdamW`, bit for bit.

Subspace classification and its optimiser: arXiv 2308.01547. Geodesics: Edelman, Arias and Smith, SIAM J. Matrix Anal.
Appl. 20(2), 1998. One second moment per manifold: Bécigneul and Ganea, ICLR 2019.
"""

import contextlib
import inspect
import warnings
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..common import told
from .frames import as_dims, local, own_dims, own_frames, per_class, put_own
from .groups import (
    adam_rates,
    check_group,
    check_values,
    enter_frames,
    horizontal_gradient,
    is_frames,
    param_groups,
    partition,
    parts_of,
    pieces,
    scalar,
)
from .rsgd import grassmann_step_

__all__ = ["RiemannianAdamW", "RiemannianSGD", "param_groups"]


class _WholeModel:
    """What both optimisers add to torch's: frame groups, checked when added and stepped after the Euclidean ones."""

    _warned = False

    @property
    def skipped_frames(self) -> int | Tensor:
        """Classes left as they were for a non-finite gradient so far; a tensor off the CPU. Kept in the groups."""
        return sum(group.get("skipped_frames", 0) for group in self.param_groups)

    @skipped_frames.setter
    def skipped_frames(self, count: int | Tensor) -> None:
        for i, group in enumerate(self.param_groups):
            group["skipped_frames"] = 0 if i else count

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        # torch's constructors build the defaults and add the groups in one go: ours join them here.
        self.defaults.update(self.__dict__.pop("_frame_defaults", {}))
        name = type(self).__name__
        if not isinstance(param_group, dict):
            raise TypeError(f"{name}: param_group must be a dict, got {told(param_group)}")
        if "params" not in param_group:
            raise ValueError(f"{name}: a param_group must have 'params', got {told(param_group)}")
        check_values(name, param_group)
        if "dims" in param_group:
            param_group = param_group | {"dims": as_dims(name, param_group["dims"])}
        if is_frames(param_group):
            param_group.setdefault("weight_decay", 0.0)
            if "lr" not in param_group and param_group.get("lr_factor", 1.0) != 1.0:
                param_group["lr"] = self.defaults["lr"] * param_group["lr_factor"]
        super().add_param_group(param_group)
        try:
            check_values(name, self.param_groups[-1])
            enter_frames(self.param_groups[-1])
            for part in parts_of(self.param_groups[-1]):
                check_group(name, part)
            self._check_rule(self.param_groups[-1])
        except Exception:
            self.param_groups.pop()
            raise

    def _check_kinds(self, **options):
        """Of the constructor's arguments. What is out of range torch refuses in its own words, or the group does."""
        if isinstance(options["lr"], Tensor):
            del options["lr"]
        with contextlib.suppress(ValueError):
            check_values(type(self).__name__, options)

    def _check_rule(self, group):
        """What the optimiser itself asks of a group."""

    def __setstate__(self, state):
        built = self.__dict__.get("param_groups", ())
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("retraction", self.defaults.get("retraction", "geodesic"))
            group.setdefault("transport", self.defaults.get("transport", "project"))
        # A checkpoint brings rates and buffers; what a parameter is was said at construction. So torch's own loads too.
        for group, own in zip(self.param_groups, built, strict=False):
            for key in ("manifold", "dims", "frames"):
                group.pop(key, None)
                if key in own:
                    group[key] = own[key]

    def _init_group(self, group, *lists):
        # torch's step asks this for the tensors of a group and does nothing when there are none.
        if is_frames(group):
            return False
        if taken := {i for _, places in group.get("frames", ()) for i in places}:
            group = group | {"params": [p for i, p in enumerate(group["params"]) if i not in taken]}
        return super()._init_group(group, *lists)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of every parameter that has a gradient.

        Args:
            closure: evaluates the model again and returns the loss, with gradients on.

        Returns:
            The closure's value, or None.
        """
        loss = None
        if closure is not None:
            if not callable(closure):
                raise TypeError(f"{type(self).__name__}: closure must be a function or None, got {told(closure)}")
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            work = [(i, part, self._frames(part)) for i, group in enumerate(self.param_groups)
                    for part in parts_of(group) if is_frames(part)]
            self._euclidean_step()
            skipped = [(i, self._step_frames(group, frames)) for i, group, frames in work if frames]
        for i, classes in skipped:
            self._count(i, classes)
        return loss

    def _frames(self, group):
        """The group's frames that have a gradient. Raises before anything has moved."""
        frames = [p for p in group["params"] if p.grad is not None]
        for p in frames:
            if p.grad.is_sparse:
                raise RuntimeError(f"{type(self).__name__}: frames need dense gradients, got a sparse one")
            for key, t in self.state[p].items() if p in self.state else ():
                if key != "step" and t is not None and (t.dtype, t.device) != (p.dtype, p.device):
                    self.state[p][key] = t.to(p.device, p.dtype)  # the model was moved after a step
        return frames

    def _grads(self, frames, dims):
        """Their gradients, unscaled as GradScaler asks of fused optimisers.

        Where it found an overflow they are NaN: the op then leaves all alone and the host never has to know.
        """
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is None and found is None:
            return [own_frames(p.grad, dims) for p in frames]
        device = frames[0].device
        factor = torch.ones((), device=device) if scale is None else scale.to(device).reciprocal()
        if found is not None:
            factor = torch.where(found.to(device) > 0, torch.nan, factor)
        return [own_frames(p.grad, dims) * factor.to(p.dtype) for p in frames]

    # torch 2.11 cannot trace attributes set on an optimiser. torch.compiler.disable would load the compiler at import;
    # this is what torch.optim itself uses.
    @torch._disable_dynamo
    def _count(self, number, skipped):
        found = getattr(self, "found_inf", None)
        if found is not None:
            skipped = torch.where(found.to(skipped.device) > 0, 0, skipped)  # GradScaler's own skip is no news
        on_host = skipped.device.type == "cpu"
        skipped = int(skipped) if on_host else skipped  # elsewhere a look at the number would wait for the device
        group = self.param_groups[number]
        before = group.get("skipped_frames", 0)
        if isinstance(before, torch.Tensor) and not on_host:
            before += skipped.to(before.device)  # in place: a replayed CUDA graph counts
        elif not on_host or skipped:
            group["skipped_frames"] = before + skipped
        if on_host and skipped and not self._warned:
            self._warned = True
            warnings.warn(
                f"{type(self).__name__}: {skipped} class(es) of parameter group {number} had a non-finite gradient and "
                "kept their frames; later ones are only counted, in .skipped_frames",
                RuntimeWarning,
                stacklevel=6,
            )


class RiemannianSGD(_WholeModel, torch.optim.SGD):
    """Stochastic gradient descent for a whole model: `torch.optim.SGD`, with Riemannian steps for groups of frames.

    A frame follows `retraction` along the part of its gradient, momentum included, that is orthogonal to its subspace.
    No QR is ever needed, since every step also repairs the rounding of the last one.

    Args:
        params: parameters or dicts as for torch's optimisers, or `param_groups(model)`. Weights of
            `GrassmannLinear` are frames in any group, without weight decay. A group with `manifold="grassmann"` holds
            nothing but frames: float32 or float64, (C, k, n), or (Σdims, n) with a `dims` entry.
        lr: learning rate, a number or a 1-element tensor. A frame group without its own `lr` takes lr times its
            `lr_factor`, once, when it is added: `group["lr"]` is always the rate in use. Schedulers that set one peak
            for all groups (`OneCycleLR`, `CyclicLR`) need a list of peaks to keep the ratio.
        momentum, dampening, nesterov, maximize: as in torch. Nesterov's direction is projected as a whole.
        weight_decay: number or tensor, for Euclidean groups; a frame group has 0 unless it says otherwise.
        retraction: "geodesic", "polar", "qr" or "cayley"; a group's own entry wins.
        transport: "project" keeps the momentum in the ambient space and projects it at each step; "parallel" carries
            its horizontal part along the geodesic.
        foreach, fused, differentiable: torch's implementations for the Euclidean groups. With `fused=True`, GradScaler
            leaves unscaling and skipping to the optimiser, frames included.

    A class whose gradient is not finite keeps its frame and momentum while the others move. Such classes are counted in
    `skipped_frames` (an int, or a tensor where frames are on a GPU), and on a CPU the first give a RuntimeWarning.

    Raises:
        ValueError: bad values, frames of a wrong shape, an unknown manifold, retraction or transport.
        TypeError: frames in half precision: keep float32 masters.
        RuntimeError: a frame with a sparse gradient; torch's own about `fused` and `foreach`.

    Source: arXiv 2308.01547; Edelman, Arias and Smith (1998) for the geodesics.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), ts.GrassmannLinear(8, 4, subspace_dim=2))
        >>> opt = ts.RiemannianSGD(ts.param_groups(model, weight_decay=1e-4), lr=0.1, momentum=0.9)
        >>> torch.nn.functional.cross_entropy(model(torch.randn(10, 6)), torch.arange(10) % 4).backward()
        >>> opt.step()
        >>> model[1].frame_error().item() < 1e-5, opt.skipped_frames
        (True, 0)
    """

    # The bare function: torch's wrappers around it call the hooks, which belong to the whole step.
    _euclidean_step = inspect.unwrap(torch.optim.SGD.step)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float | Tensor = 0.0,
        nesterov: bool = False,
        *,
        retraction: str = "geodesic",
        transport: str = "project",
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._frame_defaults = {"retraction": retraction, "transport": transport}
        self._check_kinds(
            params=params, lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
        )
        super().__init__(
            params,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )

    def _step_frames(self, group, frames):
        rule = {key: group[key] for key in ("momentum", "nesterov", "maximize", "retraction", "transport")}
        rule |= {"lr": scalar(group["lr"]), "weight_decay": float(group["weight_decay"])}
        dims, skipped = group.get("dims"), 0

        def kind(p):  # what one call can hold together; a buffer's first step has no dampening, as in torch
            return p.device, p.dtype, self.state.get(p, {}).get("momentum_buffer") is not None, own_dims(p, dims)

        for (_, _, moving, rule["dims"]), part in partition(frames, kind):
            buffers = None
            if group["momentum"] != 0:
                for p in part if not moving else ():
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                buffers = [own_frames(self.state[p]["momentum_buffer"], dims) for p in part]
            rule["dampening"], own = group["dampening"] if moving else 0.0, [own_frames(p, dims) for p in part]
            skipped = skipped + grassmann_step_(own, self._grads(part, dims), buffers, **rule)
            for i, p in enumerate(part):
                put_own(p, own[i], dims)
                if buffers:
                    put_own(self.state[p]["momentum_buffer"], buffers[i], dims)
        return skipped


class RiemannianAdamW(_WholeModel, torch.optim.AdamW):
    """Adam for a whole model: `torch.optim.AdamW`, with Riemannian Adam steps for groups of frames.

    Frames keep the running mean of their horizontal gradient and, per class, one of its squared norm over k n. A
    rotation within the subspace leaves that alone, where Adam's entrywise one would depend on the basis. geoopt's
    RiemannianAdam sums where this takes the mean: its lr and eps, divided by sqrt(k n), give the same steps here.

    Args:
        params: as for `RiemannianSGD`.
        lr: learning rate, a number or a 1-element tensor; frame groups as for `RiemannianSGD`.
        betas, eps, amsgrad, maximize: as in torch.
        weight_decay: for Euclidean groups; frames have none.
        retraction, transport: as for `RiemannianSGD`.
        foreach, capturable, differentiable, fused: torch's implementations for the Euclidean groups.

    Non-finite gradients and errors: as for `RiemannianSGD`; weight decay asked of a frame group is a ValueError.

    Source: Bécigneul and Ganea (2019), Riemannian Adaptive Optimization Methods; arXiv 2308.01547.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), ts.GrassmannLinear(8, 4, subspace_dim=2))
        >>> opt = ts.RiemannianAdamW(ts.param_groups(model, weight_decay=0.01), lr=1e-3)
        >>> torch.nn.functional.cross_entropy(model(torch.randn(10, 6)), torch.arange(10) % 4).backward()
        >>> opt.step()
        >>> model[1].frame_error().item() < 1e-5
        True
    """

    _euclidean_step = inspect.unwrap(torch.optim.AdamW.step)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | Tensor = 1e-2,
        amsgrad: bool = False,
        *,
        retraction: str = "geodesic",
        transport: str = "project",
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        self._frame_defaults = {"retraction": retraction, "transport": transport}
        self._check_kinds(
            params=params, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize,
            foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
        )
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )

    def _check_rule(self, group):
        if is_frames(group) and group["weight_decay"] != 0:
            raise ValueError(f"{type(self).__name__}: weight decay shrinks, and a subspace has no length: a frame "
                             f"group needs weight_decay=0, got {group['weight_decay']}")

    def _step_frames(self, group, frames):
        beta1, beta2 = map(float, group["betas"])
        dims, skipped = group.get("dims"), 0
        for p, grad in zip(frames, self._grads(frames, dims), strict=True):
            state = self.state[p]
            if not state:
                classes = p.shape[0] if dims is None else len(dims)
                state["step"] = per_class(p, classes, torch.float32)  # a skipped one does not age
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = per_class(p, classes, p.dtype)
                if group["amsgrad"]:
                    state["max_exp_avg_sq"] = per_class(p, classes, p.dtype)
            elif state["step"].device != p.device:  # torch leaves "step" where the checkpoint had it
                state["step"] = state["step"].to(p.device)
            own, mean = own_frames(p, dims), own_frames(state["exp_avg"], dims)
            state = {key: local(t) for key, t in state.items()}
            ages = state["step"], state["exp_avg_sq"], state.get("max_exp_avg_sq") if group["amsgrad"] else None
            for part, (w, g, m), moments in pieces(own_dims(p, dims), (own, grad, mean), ages):
                g, square = horizontal_gradient(w, g, part)
                rates = adam_rates(square, *moments, lr=scalar(group["lr"]), betas=(beta1, beta2), eps=group["eps"])
                skipped = skipped + grassmann_step_(
                    w, g, m, lr=rates, momentum=beta1, dampening=beta1, maximize=group["maximize"],
                    retraction=group["retraction"], transport=group["transport"], dims=part,
                )
            put_own(p, own, dims)
            put_own(self.state[p]["exp_avg"], mean, dims)
        return skipped
