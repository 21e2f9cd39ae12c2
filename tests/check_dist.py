"""What `make dist` made, before it is tested or published.

    python tests/check_dist.py dist        # one sdist and one wheel

The wheel: its tag is no younger than what it holds, its libraries are the ones that were built and nothing besides,
and OpenBLAS is there as its makers ship it, with its licence. The sdist: all the sources that git knows, and no more.
"""

import hashlib
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

import elf
import scipy_openblas32

ROOT = Path(__file__).resolve().parent.parent
BUILT = "CMakeLists.txt", "cpu", "cuda", "ops", "shim", "setup.py", "tests"
LEFT_OUT = re.compile(r"tests/bench/results/|.*\.md$")


def only(folder, pattern):
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        sys.exit(f"check_dist: {len(found)} files {pattern} in {folder}, not one")
    return found[0]


def tracked():
    """The files that git knows; of an unpacked sdist none are."""
    if not (ROOT / ".git").exists():
        return set()
    done = subprocess.run(["git", "ls-files", *BUILT], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return set(done.stdout.splitlines())


def sdist_faults(path):
    with tarfile.open(path) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
        dated = {member.mtime for member in archive}
    known = tracked()
    beside = {f for f in files if f.split("/")[0] in BUILT and Path(ROOT, f).is_file()} - known
    missing = {f for f in known if not LEFT_OUT.match(f)} - files
    yield from (f"{file} is not git's" for file in sorted(beside) if known)
    yield from (f"lacks {file}" for file in sorted(missing))
    if len(dated) != 1:
        yield "its files have dates of their own"


def wheel_faults(path, folder):
    tag = re.fullmatch(r"torch_subspace-[\w.]+-py3-none-manylinux_(\d+)_(\d+)_(?:x86_64|aarch64)\.whl", path.name)
    if not tag or tuple(map(int, tag.groups())) > elf.GLIBC:
        yield f"its tag is not manylinux_{elf.GLIBC[0]}_{elf.GLIBC[1]} or older"
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder)
        names = [name for name in archive.namelist() if not name.endswith("/")]
    package = {name for name in names if name.startswith("torch_subspace/")}
    if beside := [name for name in set(names) - package if not re.match(r"torch_subspace-[\w.]+\.dist-info/", name)]:
        yield f"holds {beside} beside the package"
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        yield "lacks our licence"

    library = {name.removeprefix("torch_subspace/lib/") for name in package if name.startswith("torch_subspace/lib/")}
    due = {"LICENSE-openblas.txt", "libscipy_openblas.so", "libtorch_subspace_cpu.so"}
    if library not in (due, due | {"cuda_version", "libtorch_subspace_cuda.so"}):
        yield f"has {sorted(library)} in lib/"
    python = {f"torch_subspace/{name.removeprefix('ops/')}" for name in tracked() if name.startswith("ops/")}
    if python and python != package - {f"torch_subspace/lib/{name}" for name in library}:
        yield f"differs from ops/: {sorted(python ^ package)}"

    for file in sorted(Path(folder, "torch_subspace").rglob("*.so")):
        yield from (f"{file.name} {fault}" for fault in elf.faults(file))
    openblas = Path(scipy_openblas32.__file__).parent / "lib/libscipy_openblas.so"
    copies = (openblas, folder / "torch_subspace/lib/libscipy_openblas.so")
    if len({hashlib.sha256(copy.read_bytes()).digest() for copy in copies}) != 1:
        yield "OpenBLAS is not the one that was asked for"


def main():
    folder = Path(sys.argv[1])
    sdist, wheel = only(folder, "*.tar.gz"), only(folder, "*.whl")
    with tempfile.TemporaryDirectory() as unpacked:
        faults = [f"{sdist.name}: {fault}" for fault in sdist_faults(sdist)]
        faults += [f"{wheel.name}: {fault}" for fault in wheel_faults(wheel, Path(unpacked))]
    for path in (sdist, wheel):
        print(f"{path}: {path.stat().st_size / 2**20:.1f} MiB, sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}")
    sys.exit("\n".join(faults) if faults else 0)


if __name__ == "__main__":
    main()
