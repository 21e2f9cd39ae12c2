"""What a GPU machine without a network needs beside the wheels of `make gpu-bundle`, and which of them it lacks.

    python tests/gpu/bundle.py gpu-bundle 60            # add GoogleTest's sources; fails above 60 MiB
    python tests/gpu/bundle.py --missing peft geoopt    # prints those that this python can't import
"""

import hashlib
import io
import re
import shutil
import sys
import tarfile
import urllib.request
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
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


def collect(folder, most):
    """Complete the folder, list it, and refuse it when it is too large to travel."""
    googletest(folder)
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
    else:
        collect(Path(sys.argv[1]), float(sys.argv[2]))
