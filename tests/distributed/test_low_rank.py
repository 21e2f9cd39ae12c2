"""Optimisers of few dimensions of two processes are those of one."""

from groups import in_a_group


def test_replicas_and_shards_train_as_one_process_does(tmp_path):
    in_a_group(2, tmp_path, "low_rank_checks", "all_checks", str(tmp_path))


def test_trion_and_coso_of_shards_are_those_of_one_process(tmp_path):
    in_a_group(2, tmp_path, "matrix_checks", "all_checks", str(tmp_path))
