"""What a GPU machine without a network needs beside the wheels of `make gpu-bundle`, and which of them it lacks.

    python tests/gpu/bundle.py gpu-bundle 60            # add GoogleTest's sources and the commit; fails above 60 MiB
    python tests/gpu/bundle.py --locked peft geoopt     # prints their lines of locks/newest.txt, hashes included
    python tests/gpu/bundle.py --missing peft geoopt    # prints those that this python can't import
"""

import hashlib
import io
import os
import re
import shutil
import subprocess
import sys
import tarfile
import urllib.request
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COMMIT = ROOT / "gpu-bundle" / "commit"
BUILT_OF = "cpu", "cuda", "shim", "ops", "CMakeLists.txt", "setup.py", "pyproject.toml"
SYSTEM = Path("/usr/src/googletest")
NEEDED = "CMakeLists.txt", "LICENSE", *(f"googletest/{part}" for part in ("CMakeLists.txt", "cmake", "include", "src"))


def plain(name):
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def googletest(folder):
    """The part of its sources that a build without gMock reads: the system's, or the release that CMake would fetch."""
    if (SYSTEM / "googletest").is_dir():
        for part in NEEDED:
            source, target = SYSTEM / part, folder / "googletest" / part
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, dirs_exist_ok=True)
            elif source.exists():
                shutil.copy(source, target)
        return
    text = (ROOT / "tests/native/CMakeLists.txt").read_text()
    url, digest = re.search(r"URL (\S+)\s+URL_HASH SHA256=(\w+)", text).groups()
    data = urllib.request.urlopen(url).read()
    if hashlib.sha256(data).hexdigest() != digest:
        sys.exit(f"{url} is not what tests/native/CMakeLists.txt expects")
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        for member in archive.getmembers():
            member.name = member.name.partition("/")[2]
            if member.isfile() and member.name.startswith(NEEDED):
                archive.extract(member, folder / "googletest", filter="data")


def sources():
    """A digest of what the package is built of."""
    digest = hashlib.sha256()
    for name in BUILT_OF:
        top = ROOT / name
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path.is_file() and not {"lib", "__pycache__"} & set(path.relative_to(ROOT).parts):
                digest.update(f"{path.relative_to(ROOT)}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def git(*words):
    """What git prints; None where there is no history."""
    try:
        told = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()


def name_commit():
    """In a copy without history the benchmarks take the commit from SUBSPACE_COMMIT: the one of the bundle."""
    if git("rev-parse", "HEAD") is None and COMMIT.exists():
        commit, _, digest = COMMIT.read_text().rpartition(" ")
        os.environ.setdefault("SUBSPACE_COMMIT", commit if digest == sources() else f"{commit} with changes")


def locked(names):
    """What locks/newest.txt says of packages, as pip reads it: version and hashes."""
    lines = re.findall(r"^(\S+)(==.*(?:\n    .*)+)", (ROOT / "locks/newest.txt").read_text(), re.M)
    lines = {plain(name): name + rest for name, rest in lines}
    if unknown := [name for name in names if plain(name) not in lines]:
        sys.exit(f"locks/newest.txt has no {', '.join(unknown)}")
    return [lines[plain(name)] for name in names]


def collect(folder, most):
    """Complete the folder, list it, and refuse it when it is too large to travel."""
    googletest(folder)
    commit = git("describe", "--always", "--exclude=*", "--dirty= with changes")
    if commit:
        (folder / "commit").write_text(f"{commit} {sources()}")
    parts = [(sum(f.stat().st_size for f in (p.rglob("*") if p.is_dir() else (p,)) if f.is_file()), p.name)
             for p in folder.iterdir()]
    for size, name in sorted(parts, reverse=True):
        print(f"{size / 2**20:7.2f} MiB  {name}")
    total = sum(size for size, _ in parts) / 2**20
    print(f"{total:7.2f} MiB in {folder}, of {most:g} allowed")
    if total > most:
        sys.exit(f"{folder} is too large")


if __name__ == "__main__":
    if sys.argv[1] == "--missing":
        have = {plain(d.name) for d in distributions()}
        print(*(name for name in sys.argv[2:] if plain(name) not in have), sep="\n")
    elif sys.argv[1] == "--locked":
        print(*locked([re.split("[<>=]", name)[0] for name in sys.argv[2:]]), sep="\n")
    else:
        collect(Path(sys.argv[1]), float(sys.argv[2]))
