"""Tensors whose memory is not there: given back (as fully_shard does), or never there. Never a crash of the process."""

import pytest
import torch

from torch_subspace.selftest import ROWS

torch.manual_seed(0)


def cases():
    return [pytest.param(row, i, id=f"{row.op}-{i}") for row in ROWS for i, t in enumerate(row.make(*row.small))
            if t.is_floating_point()]  # labels are read by torch first, which crashes


def float32(row):
    return [t.float() if t.is_floating_point() else t for t in row.make(*row.small)]


@pytest.mark.parametrize("row, which", cases())
def test_freed_storage_is_refused(row, which):
    tensors = float32(row)
    tensors[which].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="memory is not allocated|not allocated yet|out of bounds"):  # torch's too
        row.ours(*tensors)


@pytest.mark.parametrize("offset", [0, 3])
def test_a_part_of_a_freed_storage_is_refused(offset):
    v = torch.ones(2 * 6 + offset)[offset:].view(2, 6)
    for freed in (v, v.new_ones(6, 4 + offset)[:, offset:offset + 2].mT):  # torch itself would copy the second
        freed.untyped_storage().resize_(offset * 4)
        with pytest.raises(RuntimeError, match="^tucker_linear_: a tensor of 12 elements has a storage of"):
            torch.ops.torch_subspace.tucker_linear_(torch.ones(3, 6), torch.ones(3, 6), torch.ones(2, 2),
                                                    torch.ones(6, 2), freed, torch.empty(0, dtype=torch.int64), 1., 0.,
                                                    False)


def test_memory_that_is_there_is_taken():
    y = torch.zeros(3, 6)
    ones = torch.ones(12, 6)
    for v in (ones[::6], ones[:1].expand(2, 6), ones.view(-1)[-12:].view(2, 6), ones.view(36, 2)[-6:].mT):
        torch.ops.torch_subspace.tucker_linear_(y.zero_(), torch.ones(3, 6), torch.ones(2, 2), torch.ones(6, 2), v,
                                                torch.empty(0, dtype=torch.int64), 1., 0., False)
        assert torch.equal(y, torch.full((3, 6), 24.))


def with_others():
    """Without ops of one tensor, and without those whose rows call torch.ops: there meta is right as well."""
    rows = [(c, c.values[0]) for c in cases()]
    return [c for c, row in rows if len(row.make(*row.small)) > 1 and row.op not in ("depthwise", "product")]


@pytest.mark.parametrize("row, which", with_others())
def test_a_tensor_on_meta_beside_others_is_refused(row, which):
    tensors = float32(row)
    tensors[which] = tensors[which].to("meta")
    with pytest.raises((ValueError, RuntimeError), match="meta|device"):
        row.ours(*tensors)
