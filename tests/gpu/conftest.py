"""Without a GPU, one line says why nothing here runs. With one that we can't use, it is an error to go on."""

from pathlib import Path

import pytest
from cases import DEVICE, ON_GPU, PRESENT

import torch_subspace.library


def pytest_sessionstart():
    cuda = torch_subspace.library.config()["CUDA"]
    if ON_GPU and Path("/dev/nvidia0").exists() and not PRESENT:
        raise pytest.UsageError("there is a GPU, but torch can't use it: torch.cuda.is_available() is False")
    if ON_GPU and PRESENT and not cuda["loaded"]:
        raise pytest.UsageError(f"torch_subspace has no CUDA kernels here: {cuda['why not']}")


def pytest_report_header():
    return [] if PRESENT else [f"no {DEVICE} device: the tests that need one are skipped"]


def pytest_terminal_summary(terminalreporter):
    if not PRESENT:
        terminalreporter.write_line(f"no {DEVICE} device was found: nothing was tested on one")
