"""What both optimisers add to torch's: groups of frames, checked when added and stepped after Euclidean parameters."""

import contextlib
import warnings
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from ..common import told
from .classes import with_gradient
from .frames import as_dims, as_held
from .groups import check_group, check_values, enter_frames, is_frames, parts_of


class WholeModel:
    """Mixed in before one of torch's optimisers; `_step_frames` steps the `Classes` of a group."""

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
            enter_frames(name, self.param_groups[-1])
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
        if taken := {i for _, places, _ in group.get("frames", ()) for i in places}:
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
            skipped = [(i, self._step_frames(group, classes)) for i, group, classes in work if classes]
        for i, classes in skipped:
            self._count(i, classes)
        return loss

    def _frames(self, group):
        """The classes of the group's frames that have a gradient. Raises before anything has moved."""
        frames = [p for p in group["params"] if p.grad is not None]
        for p in frames:
            self._follow(p, group.get("dims"))
        return [with_gradient(type(self).__name__, group, p) for p in frames]

    def _follow(self, p, dims):
        """The model may have been moved after a step, and the state that was loaded may have had another form."""
        for key, t in self.state[p].items() if p in self.state else ():
            if isinstance(t, Tensor):
                self.state[p][key] = t.to(p.device) if key == "step" else as_held(t, p, dims)

    def _grads(self, work):
        """Their gradients, unscaled as GradScaler asks of fused optimisers.

        Where it found an overflow they are NaN: the op then leaves all alone and the host never has to know.
        """
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if scale is None and found is None:
            return [classes.grad for classes in work]
        device = work[0].grad.device
        factor = torch.ones((), device=device) if scale is None else scale.to(device).reciprocal()
        if found is not None:
            factor = torch.where(found.to(device) > 0, torch.nan, factor)
        return [classes.grad * factor.to(classes.grad.dtype) for classes in work]

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
