"""`python -m torch_subspace`: right ops pass, a wrong one is named, and what can't be loaded is a line."""

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import torch_subspace
from torch_subspace import __main__ as program
from torch_subspace import selftest

CMAKE = (Path(__file__).resolve().parents[1] / "CMakeLists.txt").read_text()
OPS = [name.split("/")[-1] for name in re.search(r"^set\(ops\s+([^)]+)\)", CMAKE, re.M).group(1).split()]


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["torch_subspace", *words])
    code = program.main()
    return code, capsys.readouterr()


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_a_row(op):
    assert op in [row.op for row in selftest.ROWS]


def test_all_is_right_within_seconds(monkeypatch, capsys):
    start = time.process_time()
    code, told = call(monkeypatch, capsys)
    assert code == 0 and time.process_time() - start < 20
    for row in selftest.ROWS:
        assert re.search(rf"^{row.op} +cpu +ok +max error", told.out, re.M)
    assert "instruction set" in told.out


@pytest.mark.parametrize("change", [
    lambda y: y * (1 + 1e-4),
    lambda y: y * y.detach().fill_(1).index_fill_(0, torch.tensor([0]), float("nan")),
    lambda y: y[:1],
    lambda y: y.double(),
], ids=["off by 1e-4", "nan", "shape", "dtype"])
def test_a_wrong_value_is_named(monkeypatch, capsys, change):
    row = selftest.ROWS[0]
    wrong = dataclasses.replace(row, ours=lambda *t: change(row.ours(*t)))
    monkeypatch.setattr(selftest, "ROWS", (wrong, *selftest.ROWS[1:]))
    code, told = call(monkeypatch, capsys)
    assert code == 1 and "FAILED on cpu: logits\n" in told.out


@pytest.mark.parametrize("row", [row for row in selftest.ROWS if row.trained], ids=lambda row: row.op)
def test_a_wrong_gradient_is_seen(row):
    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx, t):
            return t.clone()

        @staticmethod
        def backward(ctx, g):
            return g * (1 + 1e-3)

    wrong = dataclasses.replace(
        row, ours=lambda *t: row.ours(*t[: row.trained - 1], Off.apply(t[row.trained - 1]), *t[row.trained:]))
    assert selftest.error(row, torch.float32, "cpu") < row.tolerance < selftest.error(wrong, torch.float32, "cpu")


def test_an_op_that_raises_is_named(monkeypatch, capsys):
    def refuse(*_):
        raise RuntimeError("no kernel")

    monkeypatch.setattr(selftest, "ROWS", (dataclasses.replace(selftest.ROWS[2], ours=refuse),))
    code, told = call(monkeypatch, capsys)
    assert code == 1 and "RuntimeError: no kernel" in told.out


def test_switches_stay():
    before = torch.backends.cuda.matmul.allow_tf32
    with selftest._exact_products():
        assert not torch.backends.cuda.matmul.allow_tf32
    assert torch.backends.cuda.matmul.allow_tf32 == before


def test_the_bench_has_a_line_an_op(monkeypatch, capsys):
    small = tuple(dataclasses.replace(row, large=row.small) for row in selftest.ROWS)
    monkeypatch.setattr(selftest, "ROWS", small)
    selftest.bench("cpu", seconds=0.1)
    lines = capsys.readouterr().out.strip().splitlines()
    assert [line.split()[0] for line in lines[1:]] == OPS


@pytest.mark.skipif("cuda" in selftest.devices(), reason="there is a GPU")
def test_a_device_that_is_not_there(monkeypatch, capsys):
    code, told = call(monkeypatch, capsys, "--device", "cuda")
    assert code == 2 and "there is no cuda" in told.err


def in_a_copy(folder, change, *command):
    """Python in which the package is a copy that `change` has broken."""
    package = folder / "torch_subspace"
    shutil.copytree(Path(torch_subspace.__file__).parent, package, ignore=shutil.ignore_patterns("lib", "__pycache__"))
    change(package)
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run([sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True)


def another_torch(package):
    """A library.py that wants a torch of the future."""
    source = (package / "library.py").read_text()
    (package / "library.py").write_text(source.replace("OLDEST_TORCH = (2, 11)", "OLDEST_TORCH = (99, 0)"))


@pytest.mark.parametrize("change, reason", [(lambda package: None, "is not built"), (another_torch, "torch")],
                         ids=["not built", "torch too old"])
def test_what_cannot_be_loaded_is_said_in_a_line(tmp_path, change, reason):
    done = in_a_copy(tmp_path, change, "-m", "torch_subspace")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert re.search(rf"^torch_subspace can't be loaded: .*{reason}", done.stderr, re.M)


def test_an_import_raises_as_ever(tmp_path):
    done = in_a_copy(tmp_path, lambda package: None, "-c", "import torch_subspace")
    assert done.returncode == 1 and "ImportError" in done.stderr
