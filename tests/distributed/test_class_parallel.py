"""Heads whose classes are shared out among processes: values, gradients and steps are those of the head on one."""

import pytest
import torch
from helpers import in_processes


def in_a_group(rank, count, folder, check):
    import class_parallel_checks
    from torch.distributed import destroy_process_group, init_process_group

    torch.set_num_threads(1)
    init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=count)
    try:
        getattr(class_parallel_checks, check)(rank)
    finally:
        destroy_process_group()


def test_any_number_of_processes_computes_what_one_does(tmp_path):
    in_processes(4, in_a_group, 4, str(tmp_path), "all_checks")


@pytest.mark.slow
def test_the_loss_is_one_graph(tmp_path):
    in_processes(2, in_a_group, 2, str(tmp_path), "compiled")
