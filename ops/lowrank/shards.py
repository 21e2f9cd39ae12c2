"""Parameters of FSDP2 (DTensors): what a process has of a matrix, and what it has to ask the others for."""
from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def local(t: Tensor) -> Tensor:
    """What this process has of it."""
    return t.to_local() if hasattr(t, "placements") else t


def sharing(name: str, p: Tensor, dims: int) -> tuple[dist.ProcessGroup | None, slice | None]:
    """The processes that have rows of a matrix, and which rows this one has; None where each has whole ones, of `dims`
    3 some of a stack."""
    if not hasattr(p, "placements"):
        return None, None
    split = [i for i, placement in enumerate(p.placements) if not placement.is_replicate()]
    if len(split) > 1 or any(not p.placements[i].is_shard(0) for i in split) or p.grad.placements != p.placements:
        raise RuntimeError(
            f"{name}: a DTensor must be sharded along dimension 0, over one dimension of its mesh, as fully_shard "
            f"does, its gradient likewise, got {p.placements} and {p.grad.placements} for shape {tuple(p.shape)}")
    if not split or dims == 3:
        return None, None
    mesh, rows = p.device_mesh, p.shape[0]
    begin = min(-(-rows // mesh.size(split[0])) * mesh.get_local_rank(split[0]), rows)  # as torch.chunk cuts
    return mesh.get_group(split[0]), slice(begin, begin + p.to_local().shape[0])


def owners(p: Tensor) -> dist.ProcessGroup | None:
    """The processes among which a parameter, a matrix or a stack, is cut up."""
    split = [i for i, placement in enumerate(getattr(p, "placements", ())) if not placement.is_replicate()]
    return p.device_mesh.get_group(split[0]) if split else None


def placed(t: Tensor, weight: Tensor) -> Tensor:
    """Of this process's rows, or matrices, a DTensor as the weight is."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((weight.shape[0], *t.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(t.contiguous(), weight.device_mesh, weight.placements, run_check=False, shape=shape,
                              stride=stride)


def gathered(t: Tensor, weight: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """All rows, where a group's processes have some each."""
    return t if group is None else placed(t, weight).full_tensor()


def total(t: Tensor, group: dist.ProcessGroup | None, op: str = "SUM") -> Tensor:
    """The sum over a group's processes, or "MAX" or "MIN", in place."""
    if group is not None:
        dist.all_reduce(t, getattr(dist.ReduceOp, op), group)
    return t


def all_finite(each: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """Whether matrices are finite, of what each process says about its rows."""
    return each if group is None else total(each.float(), group, "MIN") > 0
