"""The libraries use torch's stable C ABI and nothing else, and load quietly."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import elf
import pytest
import torch

from torch_subspace import library

ROOT = Path(__file__).resolve().parent.parent
TORCH = Path(torch.__file__).parent
LIBRARIES = sorted(library.LIB.glob("libtorch_subspace_*.so"))
STAND_INS = {name: (ROOT / f"shim/symbols_{name}.txt").read_text().split() for name in ("torch_cpu", "torch_cuda")}
TORCHS = re.compile("aoti_|torch_|c10_")

each_library = pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.stem)


def run(*command):
    if not shutil.which(command[0]):
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def symbols(path, which, *, weak=True):
    """Dynamic symbols without their version, either `--undefined-only` or `--defined-only`."""
    lines = [line.split() for line in run("nm", "-D", which, str(path)).splitlines()]
    return {name.split("@")[0] for *_, kind, name in lines if weak or kind != "w"}


def declared():
    """The functions of torch_stable.h: those every torch from the floor up has, and the newer ones."""
    text = re.sub(r"/\*.*?newer than the floor.*?\*/", "NEWER", (ROOT / "shim/torch_stable.h").read_text())
    return [set(re.findall(r"\b((?:aoti_)?torch_\w+)\(", part)) for part in text.split("NEWER")]


def test_declarations_agree_with_torchs_headers():
    run(
        *("c++", "-std=c++20", "-fsyntax-only", "-DUSE_CUDA", f"-I{TORCH}/include", f"-I{ROOT}/shim"),
        str(ROOT / "tests/abi/check_declarations.cpp"),
    )


def test_stand_ins_list_what_the_header_declares():
    always, _ = declared()
    assert set(STAND_INS["torch_cpu"]) | set(STAND_INS["torch_cuda"]) == always
    for names in STAND_INS.values():
        assert names == sorted(set(names))


@pytest.mark.parametrize("name", STAND_INS)
def test_this_torch_has_the_symbols(name):
    path = TORCH / f"lib/lib{name}.so"
    if not path.exists():
        pytest.skip(f"this torch has no lib{name}.so")
    assert set(STAND_INS[name]) <= symbols(path, "--defined-only")


@each_library
def test_only_c_symbols_are_taken(path):
    taken = symbols(path, "--undefined-only")
    assert not [s for s in taken if s.startswith(("_Z", "Py", "_Py")) or "GLIBCXX" in s or s == "__gxx_personality_v0"]
    linked = {s for s in symbols(path, "--undefined-only", weak=False) if TORCHS.match(s)}
    assert linked <= set(STAND_INS["torch_cpu"]) | set(STAND_INS["torch_cuda"])
    assert {s for s in taken if TORCHS.match(s)} - linked <= declared()[1]  # weak: this torch may be older


@each_library
def test_only_its_own_names_are_given(path):
    assert all(s.startswith("torch_subspace_") for s in symbols(path, "--defined-only"))


@pytest.mark.parametrize("path", sorted(library.LIB.glob("*.so")), ids=lambda path: path.stem)
def test_how_it_is_linked(path):
    assert not elf.faults(path)


@pytest.mark.skipif(not shutil.which("objdump"), reason="no objdump")
def test_no_register_of_mmx_is_used():
    """Without emms behind it, all of x87 that follows, long double that is, would be NaN."""
    code = subprocess.run(["objdump", "-d", "--no-show-raw-insn", library.LIB / "libtorch_subspace_cpu.so"], check=True,
                          capture_output=True, text=True).stdout
    assert "ret" in code and not re.findall(r".*%mm[0-7].*", code)


def test_nothing_else_lies_beside_them():
    names = {path.name for path in library.LIB.iterdir()}
    cpu = {"libtorch_subspace_cpu.so"}
    cuda = {"libtorch_subspace_cuda.so", "cuda_version"} if "cuda_version" in names else set()
    openblas = {"libscipy_openblas.so", "LICENSE-openblas.txt"} if "libscipy_openblas.so" in names else set()
    assert names == cpu | cuda | openblas


@each_library
def test_torch_abi_audit(path):
    pytest.importorskip("torch_abi_audit")
    run(f"{sysconfig.get_path('scripts')}/torch-abi-audit", "--check", "torch", str(path))


def fresh_python(code, **environment):
    """What `code` prints in a Python of its own."""
    kept = {k: v for k, v in os.environ.items() if k not in ("OPENBLAS_NUM_THREADS", "SUBSPACE_ISA")}
    done = subprocess.run([sys.executable, "-c", code], env=kept | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_import_is_silent_and_leaves_the_environment_alone():
    code = "import torch, os; old = dict(os.environ); import torch_subspace; assert dict(os.environ) == old"
    assert fresh_python(code) == fresh_python("import torch")


def test_import_loads_no_compiler():
    """torch.compile's modules take as long as torch itself, and set TORCHINDUCTOR_CACHE_DIR for the user."""
    code = "import torch, sys; old = set(sys.modules); import torch_subspace; print(*set(sys.modules) - old)"
    loaded = fresh_python(code).split()
    assert "torch_subspace.grassmann.optim" in loaded
    assert not [name for name in loaded if name.startswith(("torch._dynamo", "torch._inductor", "triton", "sympy"))]


def test_import_registers_all_of_every_op():
    """Fake kernels, and with them gradients: for torch.ops, and for programs that others have exported."""
    print_lacking = (
        "import torch, torch_subspace; find = torch._library.simple_registry.singleton.find; "
        "names = [n for n in torch._C._dispatch_get_all_op_names() if n.startswith('torch_subspace::')]; "
        "print(len(names), *(n for n in names if find(n).fake_impl.kernel is None))")
    count, *lacking = fresh_python(print_lacking).split()
    assert int(count) > 20 and not lacking


def test_import_is_quick():
    """Counted in calls, none of them another package's import; its seconds are measured by tests/bench/overhead.py."""
    code = ("import torch, sys; old = set(sys.modules); calls = []\n"
            "sys.setprofile(lambda frame, event, arg: event.endswith('call') and calls.append(0))\n"
            "import torch_subspace\n"
            "sys.setprofile(None); print(len(calls), *set(sys.modules) - old)")
    calls, *loaded = fresh_python(code).split()
    assert {name.partition(".")[0] for name in loaded} == {"torch_subspace"}
    assert 10_000 < int(calls) < 150_000  # 98 000 when this was written: 0.04 s where torch takes 1.1


@pytest.mark.parametrize("level", library.config()["CPU"]["available"].split())
def test_the_instruction_set_can_be_forced(level):
    text = fresh_python("import torch_subspace as ts; ts.show_config()", SUBSPACE_ISA=level)
    assert f"instruction set: {level}\n" in text


def test_a_source_tree_that_was_not_built_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "LIB", tmp_path / "ops" / "lib")
    with pytest.raises(ImportError, match="not built: run `pip install"):
        library._load_cpu()


@pytest.mark.parametrize(
    "built_for, torchs, reason",
    [("13", None, "without CUDA"), (None, "13.0", "built without CUDA"), ("13", "12.9", "CUDA 13, this torch for")],
)
def test_cuda_of_another_kind_is_left_alone(tmp_path, monkeypatch, built_for, torchs, reason):
    if built_for:
        (tmp_path / "cuda_version").write_text(built_for + "\n")
    monkeypatch.setattr(library, "LIB", tmp_path)
    monkeypatch.setattr(torch.version, "cuda", torchs)
    loaded, why_not = library._load_cuda()
    assert loaded is None and reason in why_not
