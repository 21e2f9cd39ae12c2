"""LowRankAdamW of two processes is that of one."""

from groups import in_a_group


def test_replicas_and_shards_train_as_one_process_does(tmp_path):
    in_a_group(2, tmp_path, "low_rank_checks", "all_checks", str(tmp_path))
