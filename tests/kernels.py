"""Which kernels stand behind the CPU: its own, or the CUDA kernels in their place (`make pytest-cuda-on-cpu`)."""

import pytest

import torch_subspace.library

LEVEL = torch_subspace.library.config()["CPU"]["instruction set"]
ON_A_CPU = not LEVEL.startswith("sm_")
only_cpu = pytest.mark.skipif(not ON_A_CPU, reason="a GPU does not look at values, and rounds to half in between")
# and so rounds a bfloat16 gradient's factor in between, as torch's layers do
MULTIPLIES_BF16 = LEVEL in ("avx512_bf16", "amx_bf16")
