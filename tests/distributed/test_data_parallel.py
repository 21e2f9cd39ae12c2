"""Training on shares of the rows is training on all of them; what some processes have saved others go on from."""

from groups import in_a_group


def test_replicas_train_as_one_process_does(tmp_path):
    in_a_group(4, tmp_path, "data_parallel_checks", "all_checks")


def test_shards_train_as_one_process_does(tmp_path):
    in_a_group(2, tmp_path, "sharded_checks", "all_checks", str(tmp_path))


def test_any_number_of_processes_loads_what_two_have_saved(tmp_path):
    in_a_group(4, tmp_path, "checkpoint_checks", "all_checks", str(tmp_path))
