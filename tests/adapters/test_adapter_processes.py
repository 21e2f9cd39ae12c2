"""Adapters in two processes: fully_shard and DistributedDataParallel. One run of processes.py for all tests."""
import json

import pytest
import torch

if not torch.distributed.is_available():
    pytest.skip("this torch has no torch.distributed", allow_module_level=True)

import processes
from helpers import in_two_processes


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    in_two_processes(processes.work, str(folder))
    return [json.loads((folder / f"found{rank}").read_text()) for rank in range(2)]


@pytest.mark.parametrize("name", processes.CHECKS)
def test_in_two_processes(found, name):
    for rank, results in enumerate(found):
        assert name in results, "not reached: an earlier check failed"
        assert results[name] is None, f"process {rank}: {results[name]}"
