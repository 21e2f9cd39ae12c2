"""What optimisers of few dimensions share: AdamW with options of its own in every group, and steps of matrices beside
torch's of all else."""
from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..common import check_betas, check_flag, check_rate, told, wide_dtype
from .matrices import matrix_shape


class MatrixOptimizer(torch.optim.AdamW):
    """AdamW but for matrices, which a subclass steps in `_matrix_steps`; its own options are checked by `_checked`."""

    # The bare function: torch's wrappers around it call the hooks, which belong to the whole step.
    _adamw_step = inspect.unwrap(torch.optim.AdamW.step)
    _warned = False

    def __init__(self, params: ParamsT, own: dict[str, Any], **torchs: Any) -> None:
        if not isinstance(params, Iterable):
            raise TypeError(f"{type(self).__name__}: params must be tensors or dicts, got {told(params)}")
        self._own = own | self._checked(own | torchs)
        super().__init__(params, **torchs)

    def _checked(self, options: dict[str, Any]) -> dict[str, Any]:
        """Of a group's options or the constructor's the ints, as such; raises in this class's voice."""
        raise NotImplementedError

    def _matrix_steps(self) -> None:
        """The step of all parameters, without gradients."""
        raise NotImplementedError

    def _steps(self, group: dict[str, Any], p: Tensor) -> bool:
        """Whether p takes torch's step."""
        raise NotImplementedError

    def _keeps(self, loaded: Mapping[str, Any]) -> bool:
        """Whether a parameter's state that is loaded is as wide as steps are: torch gives it the parameter's dtype."""
        return True

    def _misfit(self, group: dict[str, Any], p: Tensor, loaded: Mapping[str, Any]) -> Sequence[int] | None:
        """The shape of a tensor that is loaded and can't be of p's state; None where all may be."""
        return next((t.shape for key, t in loaded.items() if key.startswith("exp_avg") and t.shape != p.shape), None)

    def _matrix(self, group: dict[str, Any], shape: Sequence[int]) -> Sequence[int]:
        """The matrix, or the matrices, as which a parameter of that shape is stepped."""
        return matrix_shape(shape, group["rank"]) or tuple(shape)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with options of its own.

        Args:
            param_group: ``{"params": ..., option: value}``.
        """
        # torch's constructors build the defaults and add the groups in one go: ours join them here.
        self.defaults.update(self.__dict__.pop("_own", {}))
        name = type(self).__name__
        if not isinstance(param_group, dict):
            raise TypeError(f"{name}: param_group must be a dict, got {told(param_group)}")
        if "params" not in param_group:
            raise ValueError(f"{name}: a param_group must have 'params', got {told(param_group)}")
        super().add_param_group(param_group | self._checked(param_group))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for key in self.defaults:
                group.setdefault(key, self.defaults[key])

    def state_dict(self) -> dict[str, Any]:
        """As torch's optimisers have it, and "shapes", those of all parameters: a state of a matrix in few dimensions
        is as large as its transpose's."""
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"]]
        return super().state_dict() | {"shapes": shapes}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state that `state_dict` has returned, to the bit, or that of `torch.optim.AdamW`.

        Args:
            state_dict: groups and state; the parameters in the order they have here.

        Raises:
            TypeError: state_dict is no optimiser's.
            ValueError: it has options out of range, or the state of parameters of other shapes. Nothing is changed.
        """
        if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= state_dict.keys():
            raise TypeError(f"{type(self).__name__}: state_dict must be an optimiser's, got {told(state_dict)}")
        for group in state_dict["param_groups"]:
            self._checked(group)
        places = self._loaded(state_dict)
        shapes = state_dict.get("shapes") or [p.shape for _, p, _ in places]  # older ones don't tell
        for (group, p, loaded), shape in zip(places, shapes):
            other = self._misfit(group, p, loaded)
            if other is None and loaded and self._matrix(group, shape) != self._matrix(group, p.shape):
                other = shape
            if other is not None:
                raise ValueError(f"{type(self).__name__}: state_dict must be of parameters of the same shapes, got "
                                 f"{tuple(other)} for {tuple(p.shape)}")
        super().load_state_dict(state_dict)
        for _, p, loaded in self._loaded(state_dict):
            for key, t in loaded.items() if self._keeps(loaded) else ():
                if isinstance(t, Tensor) and key != "step":
                    dtype = wide_dtype(p.dtype) if t.is_floating_point() else t.dtype
                    if self.state[p][key].dtype != dtype:
                        self.state[p][key] = t.to(p.device, dtype, copy=True)

    def _loaded(self, state_dict: Mapping[str, Any]) -> list[tuple[dict[str, Any], Tensor, Mapping[str, Any]]]:
        """Each parameter, what a state has for it, and before them its group's options there."""
        own = (p for group in self.param_groups for p in group["params"])
        places = ((group, i) for group in state_dict["param_groups"] for i in group["params"])
        return [(self.defaults | group, p, state_dict["state"].get(i, {})) for (group, i), p in zip(places, own)]

    def _init_group(self, group, *lists):
        # torch's step asks this for the tensors of a group and does nothing when there are none.
        own = [p for p in group["params"] if self._steps(group, p)]
        return super()._init_group(group | {"params": own}, *lists) if own else False

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
        with torch.no_grad():
            for group in self.param_groups:
                group.update(self._checked(group))
            self._matrix_steps()
        return loss

    @property
    def skipped(self) -> int | Tensor:
        """Matrices left as they were for a gradient that is not finite so far; a tensor off the CPU."""
        return sum(group.get("skipped", 0) for group in self.param_groups)

    def _count(self, number: int, skipped: int | Tensor, who: str = "") -> None:
        """Matrices of a group that were left alone; `who` is one, in words."""
        if isinstance(skipped, int) and not skipped:
            return
        group = self.param_groups[number]
        group["skipped"] = group.get("skipped", 0) + skipped
        if isinstance(skipped, int) and not self._warned:
            self._warned = True
            many = f"{skipped} matrix(es) of parameter group {number}"
            stays = "stays as it is" if who else "stay as they were"
            warnings.warn(f"{type(self).__name__}: {who or many} had a non-finite gradient and {stays}; later ones are "
                          "only counted, in .skipped", RuntimeWarning, stacklevel=5)


def check_torchs(name: str, options: dict[str, Any]) -> None:
    """AdamW's options, where they are there; raises in `name`'s voice."""
    for key in ("lr", "eps", "weight_decay"):
        if key in options:
            check_rate(name, key, options[key])
    if "betas" in options:
        check_betas(name, options["betas"])
    if options.get("amsgrad"):
        raise ValueError(f"{name}: amsgrad must be False: there is no largest second moment of what is projected")
    for key in options.keys() & {"maximize", "foreach"}:
        if key == "maximize" or options[key] is not None:
            check_flag(name, key, options[key])
