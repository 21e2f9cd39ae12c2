"""What looks at all CUDA kernels, tests/gpu/sanitize.py and tests/cuda_check.py: it sees them all, and tells ours."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "gpu"))

import sanitize  # noqa: E402


def test_sanitize_sees_the_source_of_every_kernel(monkeypatch, tmp_path):
    kernels = sanitize.our_kernels()
    assert len(kernels) >= 30
    kept = tmp_path / "resources.txt"
    kept.write_text(sanitize.KEPT.read_text() + "logits.not_there<float>   1 0 0\n")
    monkeypatch.setattr(sanitize, "KEPT", kept)
    with pytest.raises(SystemExit, match="not_there"):
        sanitize.our_kernels()


FAULT = "Invalid __global__ read of size 4 bytes"
SANITIZER = """#!{python}
import subprocess, sys
code = subprocess.run(sys.argv[sys.argv.index("-u") - 1:]).returncode
for line in {report!r}:
    print("=========", line, flush=True)
sys.exit(code)
"""


@pytest.mark.parametrize("seconds, report, result", [
    (0.5, [], r"memcheck: stopped: nothing found in \d+ s, not done: logits float32, .*logits ragged bfloat16"),
    (100, [FAULT, "    at write_logits<float>(int)+0x10 in logits.cu:20", ""], r"memcheck: failed: 1 reports"),
], ids=["no time", "a fault"])
def test_sanitize(tmp_path, seconds, report, result):
    """A compute-sanitizer that runs the program, and has something to report."""
    stub = tmp_path / "compute-sanitizer"
    stub.write_text(SANITIZER.format(python=sys.executable, report=report))
    stub.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "SUBSPACE_TEST_DEVICE": "cpu"}
    done = subprocess.run([sys.executable, "tests/gpu/sanitize.py", "--tool", "memcheck", "--small", "--case", "logits",
                           "--seconds", str(seconds)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert re.fullmatch(result, done.stdout.strip().splitlines()[-1]), done.stdout + done.stderr
    assert done.returncode == 1 and "case: done" not in done.stdout


@pytest.mark.parametrize("place, ours", [("write_logits<float>(int)+0x10", True), ("cutlass::gemm+0x10", False),
                                         ("at::native::write_logits+0x10", False)])
def test_a_report_is_ours_where_it_names_a_kernel_of_ours(place, ours):
    found = sanitize.reports([f"========= {FAULT}\n", f"=========     at {place}\n", "=========\n"])
    assert [sanitize.is_ours(report, "racecheck", sanitize.our_kernels()) for report in found] == [ours]


def test_cuda_check_wants_every_file_built(tmp_path):
    found = subprocess.run([sys.executable, str(ROOT / "tests" / "cuda_check.py"), str(tmp_path)], capture_output=True,
                           text=True)
    assert found.returncode != 0 and "not built under" in found.stderr and "logits.cu.o" in found.stderr
