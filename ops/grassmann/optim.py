"""Optimisers for a whole model: frames take a Riemannian step, all other parameters that of torch's own optimiser.

Frames are the weights of our layers, in whatever group they stand, and all parameters of a group with
`manifold="grassmann"` or "stiefel"; `param_groups` gives them groups of their own. All others are Euclidean and go
through the code of `torch.optim.SGD` and `torch.optim.AdamW`, bit for bit.

Subspace classification and its optimiser: arXiv 2308.01547. Geodesics: Edelman, Arias and Smith, SIAM J. Matrix Anal.
Appl. 20(2), 1998. One second moment per manifold: Bécigneul and Ganea, ICLR 2019.
"""

import inspect
import math

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .classes import all_catch_up, catch_up
from .frames import local, per_class, stacked
from .groups import adam_rates, horizontal_gradient, is_frames, param_groups, partition, parts_of, pieces, scalar
from .rsgd import grassmann_step_
from .whole_model import WholeModel

__all__ = ["RiemannianAdamW", "RiemannianSGD", "param_groups"]


class RiemannianSGD(WholeModel, torch.optim.SGD):
    """Stochastic gradient descent for a whole model: `torch.optim.SGD`, with Riemannian steps for groups of frames.

    A frame follows `retraction` along the part of its gradient, momentum included, that is orthogonal to its subspace.
    No QR is ever needed, since every step also repairs the rounding of the last one.

    Args:
        params: parameters or dicts as for torch's optimisers, or `param_groups(model)`. Weights of
            `GrassmannLinear` are frames in any group, without weight decay. A group with `manifold="grassmann"` holds
            nothing but frames: float32 or float64, (C, k, n), or (Σdims, n) with a `dims` entry. With
            `manifold="stiefel"` the rows of a frame count, not only their span: orthonormal (..., k, n), as `basis` of
            `grassmann.SubspacePatch` is; their direction G - sym(G Wᵀ) W turns them among themselves too.
        lr: learning rate, a number or a 1-element tensor. A frame group without its own `lr` takes lr times its
            `lr_factor`, once, when it is added: `group["lr"]` is always the rate in use. Schedulers that set one peak
            for all groups (`OneCycleLR`, `CyclicLR`) need a list of peaks to keep the ratio. Measured: peaks from 1e-2
            to 1e-1 did about as well for a ResNet-18 from scratch, with momentum 0.9.
        momentum, dampening, nesterov, maximize: as in torch. Nesterov's direction is projected as a whole.
        weight_decay: number or tensor, for Euclidean groups; a frame group has 0 unless it says otherwise.
        retraction: "geodesic", "polar", "qr" or "cayley"; a group's own entry wins. On the Stiefel manifold geodesics
            are the canonical metric's.
        transport: "project" keeps the momentum in the ambient space and projects it at each step; "parallel" carries
            its horizontal part along the geodesic, on the Grassmannian. On the Stiefel manifold "project" keeps its
            tangent part, as a gradient there has a large one that is none.
        foreach, fused, differentiable: torch's implementations for the Euclidean groups. With `fused=True`, GradScaler
            leaves unscaling and skipping to the optimiser, frames included.

    A class whose gradient is not finite keeps its frame and momentum while the others move. Such classes are counted in
    `skipped_frames` (an int, or a tensor where frames are on a GPU), and on a CPU the first give a RuntimeWarning.

    A sparse gradient of frames (C, k, n), of one sparse dimension, names the classes that are stepped; no others are
    read or written. Their momentum is lazy: a class named again after s steps first catches up with what s dense steps
    of a zero gradient would have done, by one step of length lr (mu + ... + mu^s). With transport="parallel" and rates
    that stay the frames are those of a dense optimiser that is given the same gradients, up to rounding; else to first
    order in lr. `catch_up` brings all classes to the present. Of sharded frames the local gradient is sparse, as
    `distributed.ClassParallel(sparse_grad=True)` makes it; ragged ones have to be sharded, and weight decay to be 0.

    Raises:
        ValueError: bad values, frames of a wrong shape, an unknown manifold, retraction or transport.
        TypeError: frames in half precision: keep float32 masters.
        RuntimeError: a sparse gradient that does not name classes; torch's own about `fused` and `foreach`.

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

    @torch.no_grad()
    def catch_up(self) -> None:
        """Bring all classes to the present: those that sparse gradients have not named take the steps they missed.

        Frames and state are then those of a dense optimiser. Call it before evaluating or saving, and before the
        learning rate or the momentum drops: whoever catches up later does so at the rates of then. Without sparse
        gradients, or without momentum, there is nothing to do.

        Example:
            >>> head = ts.GrassmannLinear(8, 4, subspace_dim=2)
            >>> opt = ts.RiemannianSGD(head.parameters(), lr=0.1, momentum=0.9)
            >>> for classes in ([0, 1], [2, 3]):
            ...     index, values = torch.tensor([classes]), torch.randn(2, 2, 8)
            ...     head.weight.grad = torch.sparse_coo_tensor(index, values, (4, 2, 8), check_invariants=True)
            ...     opt.step()
            >>> opt.catch_up()    # of classes 0 and 1, by their momentum
            >>> head.frame_error().item() < 1e-5
            True
        """
        for group in self.param_groups:
            for part in parts_of(group):
                for p in part["params"] if is_frames(part) else ():
                    self._follow(p, part.get("dims"))
                    if "steps" in self.state.get(p, ()) and part["momentum"] != 0:
                        all_catch_up(part, p, self.state[p])

    def _buffer(self, group, classes):
        """The momentum of some classes, which have caught up, and their frames."""
        p, state = classes.weight, self.state[classes.weight]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(p)
        if classes.index is None and "steps" in state:
            all_catch_up(group, p, state)
        own, buffer = classes.take(p), classes.take(state["momentum_buffer"])
        if classes.index is not None:
            if "steps" not in state:  # how many there were, and after how many of them each class was stepped last
                state["steps"], state["step"] = 0, per_class(p, p.shape[0], torch.int64)
            catch_up(group, own, buffer, state["steps"] - classes.take(state["step"]), classes.dims)
            found = getattr(self, "found_inf", None)
            state["steps"] += 1 if found is None else int(found == 0)
            local(state["step"]).index_fill_(0, classes.index, state["steps"])
        return own, buffer

    def _step_frames(self, group, work):
        rule = {key: group[key] for key in ("momentum", "nesterov", "maximize", "retraction", "transport", "manifold")}
        rule |= {"lr": scalar(group["lr"]), "weight_decay": float(group["weight_decay"])}
        skipped = 0

        def kind(c):  # what one call can hold together; a buffer's first step has no dampening, as in torch
            p = c.weight
            return p.device, p.dtype, self.state.get(p, {}).get("momentum_buffer") is not None, c.dims

        for (_, _, moving, rule["dims"]), part in partition(work, kind):
            if group["momentum"] != 0:
                own, buffers = zip(*[self._buffer(group, classes) for classes in part])
            else:
                own, buffers = [classes.take(classes.weight) for classes in part], None
            rule["dampening"] = group["dampening"] if moving else 0.0
            skipped = skipped + grassmann_step_(own, self._grads(part), buffers, **rule)
            for i, classes in enumerate(part):
                classes.put(classes.weight, own[i])
                if buffers:
                    classes.put(self.state[classes.weight]["momentum_buffer"], buffers[i])
        return skipped


class RiemannianAdamW(WholeModel, torch.optim.AdamW):
    """Adam for a whole model: `torch.optim.AdamW`, with Riemannian Adam steps for groups of frames.

    Frames keep the running mean of their horizontal gradient and, per class, one of its squared norm over k n. A
    rotation within the subspace leaves that alone, where Adam's entrywise one would depend on the basis. geoopt's
    RiemannianAdam sums where this takes the mean: its lr and eps, divided by sqrt(k n), give the same steps here.

    Args:
        params: as for `RiemannianSGD`.
        lr: learning rate, a number or a 1-element tensor; frame groups as for `RiemannianSGD`. Best in validation, as
            peaks of a one-cycle schedule: 3e-3 to 1e-2 for a head with random frames on frozen text features, 1e-3 to
            1e-2 for a head and a small network before it, 1e-2 to 1e-1 where that ends in a normalisation.
        betas, eps, amsgrad, maximize: as in torch.
        weight_decay: for Euclidean groups; frames have none.
        retraction, transport: as for `RiemannianSGD`.
        foreach, capturable, differentiable, fused: torch's implementations for the Euclidean groups.

    Of a sparse gradient of frames the classes named are stepped, as by `RiemannianSGD`, but lazily as
    `torch.optim.SparseAdam`: the means of all others stay as they are, and each class's bias is corrected by the number
    of its own steps. A class is where a dense optimiser of its own, given its gradients alone, would have it.

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

    def _step_frames(self, group, work):
        beta1, beta2 = map(float, group["betas"])
        skipped = 0
        for classes, grad in zip(work, self._grads(work), strict=True):
            p, state = classes.weight, self.state[classes.weight]
            if not state:
                dims = group.get("dims")
                count = math.prod(p.shape[:-2]) if dims is None else len(dims)
                state["step"] = per_class(p, count, torch.float32)  # a skipped one does not age
                state["exp_avg"] = torch.zeros_like(p)
                state["exp_avg_sq"] = per_class(p, count, p.dtype)
                if group["amsgrad"]:
                    state["max_exp_avg_sq"] = per_class(p, count, p.dtype)
            own, taken = classes.take(p), {key: classes.take(t) for key, t in state.items() if t is not None}
            ages = taken["step"], taken["exp_avg_sq"], taken.get("max_exp_avg_sq") if group["amsgrad"] else None
            frames = [stacked(t, classes.dims) for t in (own, grad.contiguous(), taken["exp_avg"])]
            for dims, (w, g, m), moments in pieces(classes.dims, frames, ages):
                g, square = horizontal_gradient(w, g, dims, group["manifold"])
                rates = adam_rates(square, *moments, lr=scalar(group["lr"]), betas=(beta1, beta2), eps=group["eps"])
                skipped = skipped + grassmann_step_(
                    w, g, m, lr=rates, momentum=beta1, dampening=beta1, maximize=group["maximize"],
                    retraction=group["retraction"], transport=group["transport"], dims=dims, manifold=group["manifold"],
                )
            classes.put(p, own)
            for key, t in taken.items():
                classes.put(state[key], t)
        return skipped
