"""Which kernels stand behind the CPU: its own, or the CUDA kernels in their place (`make pytest-cuda-on-cpu`)."""

import pytest

import torch_subspace.library

ON_A_CPU = not torch_subspace.library.config()["CPU"]["instruction set"].startswith("sm_")
only_cpu = pytest.mark.skipif(not ON_A_CPU, reason="a GPU does not look at values, and rounds to half in between")
