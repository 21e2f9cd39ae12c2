"""Heads whose classes are shared out among processes: values, gradients and steps are those of the head on one."""

import pytest
from groups import in_a_group


def test_any_number_of_processes_computes_what_one_does(tmp_path):
    in_a_group(4, tmp_path, "class_parallel_checks", "all_checks")


@pytest.mark.slow
def test_loss_and_logits_are_one_graph_each(tmp_path):
    in_a_group(2, tmp_path, "class_parallel_calls", "compiled")
