"""What `plan` says of a step is what a step takes, counted while it runs."""

import re
from pathlib import Path

import pytest
import torch

import torch_subspace as ts
from torch_subspace.grassmann import groups

ROOT = Path(__file__).resolve().parents[2]
SIZES = {  # classes, features, k, batch, and what else
    "small": (2000, 128, 8, 64, {}),
    "medium": (4000, 256, 4, 300, {"optimiser": "adamw"}),
    "large": (3000, 512, 8, 128, {}),
    "a sample": (3000, 128, 4, 64, {"sample_rate": 0.25, "optimiser": "plain"}),
    "halves": (3000, 128, 4, 64, {"dtype": torch.bfloat16}),
    "a sample of halves": (3000, 128, 4, 64, {"dtype": torch.bfloat16, "sample_rate": 0.25}),
    "float64": (2000, 128, 4, 64, {"dtype": torch.float64, "optimiser": "adamw"}),
    "ragged": (700, 256, (1, 2, 4, 3) * 175, 64, {}),
    "ragged, AdamW": (700, 256, (1, 2, 4, 3) * 175, 64, {"optimiser": "adamw"}),
}


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("size", SIZES)
def test_memory_of_a_step_is_that_planned(size, mesh):
    from plan_checks import compare

    *sizes, options = SIZES[size]
    compare(mesh, *sizes, **options, tolerance=0.05)


def constants(path, *names):
    """Of a C header or source."""
    text = (ROOT / path).read_text()
    found = [re.search(rf"\b{name}\b(?: =)? \(?(?:\(int64_t\))?([\d <]+)", text)[1] for name in names]
    return tuple(eval(value) for value in found)


def test_it_knows_how_the_kernels_cut_their_work():
    from torch_subspace.distributed import planner

    tiles = constants("cpu/grassmann/panels.c", "PANEL_ROWS", "BLOCK", "ROUND_ROWS")
    assert tiles == (planner.PANEL_ROWS, planner.BLOCK, planner.ROUND_ROWS)
    depth, strips = constants("cpu/grassmann/panels.c", "MULTIPLY_DEPTH", "MULTIPLY_STRIPS")
    assert planner.PACKED == 3 * depth * strips
    assert constants("cuda/grassmann/panels_shape.h", "PANEL_TILE", "PANEL_BLOCK") == (
        planner.PANEL_TILE, planner.PANEL_BLOCK)
    assert constants("cuda/grassmann/rsgd_shape.h", "RSGD_SCRATCH_BYTES", "RSGD_SHARED_K") == (
        planner.SCRATCH, planner.SHARED_K)
    assert planner.PIECE == groups.PIECE


def test_products_and_passes_are_those_of_the_head():
    sizes = {"num_classes": 1000, "features": 64, "k": 4, "batch": 8192}
    planned = ts.distributed.plan(**sizes, ranks=1, device="cuda")
    numbers = 1000 * 4 * 64
    assert (planned.forward.flops, planned.backward.flops, planned.step.flops) == (
        2 * 8192 * numbers, 6 * 8192 * numbers, 8 * 4 * numbers)
    assert [share.traffic for share in planned.shares] == [2 * 4 * numbers, 7 * 4 * numbers, 5 * 4 * numbers]
    assert planned.sent == 0
    split = ts.distributed.plan(**sizes, ranks=3, device="cuda")
    assert split.classes == 334
    assert split.flops == planned.flops * 334 // 1000
    ragged = ts.distributed.plan(**sizes | {"k": [1, 4] * 500}, ranks=1, device="cuda")
    assert ragged.parameters == planned.parameters
    assert ragged.step.flops < planned.step.flops


def test_a_plan_is_a_table_that_can_be_read():
    planned = ts.distributed.plan(10**7, 512, 8, 4096, 64, optimizer="adamw", sample_rate=0.1, dtype=torch.float16)
    lines = str(planned).splitlines()
    assert lines[0] == "10,000,000 classes of 8 x 512, 4096 rows, 64 processes: each"
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "parameters", "gradient", "state", "forward", "backward", "step", "peak, and sums"]
    assert len({len(line) for line in lines[5:]}) == 1


def test_a_k_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="plan: k must be at most features = 6, got 7"):
        ts.distributed.plan(3, 6, 7, 8, 2)
    with pytest.raises(ValueError, match=r"plan: k must be an int or 3 ints, got tuple \(1, 2\)"):
        ts.distributed.plan(3, 6, (1, 2), 8, 2)
