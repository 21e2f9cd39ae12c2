"""What every CUDA kernel takes on every architecture -- registers, stack, static shared memory -- within kept limits.

    python tests/cuda_check.py build/cuda             # a build's objects; fails where a kernel has grown
    python tests/cuda_check.py build/cuda --update    # writes cuda/resources.txt anew

A kernel's line holds the most that it takes on any architecture. Stack is what does not fit into registers: spills,
and arrays that are indexed at run time. Another release of the CUDA compiler allocates otherwise, and then only what no
GPU can run is an error. Needs cuobjdump, from a CUDA toolkit or from triton.
"""

import argparse
import collections
import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

CUDA = Path(__file__).resolve().parent.parent / "cuda"
KEPT = CUDA / "resources.txt"
KINDS = "registers", "stack", "shared"
MOST = {"registers": 255, "stack": 1 << 10, "shared": 48 << 10}  # beyond these a kernel is not launched, or crawls


def tool():
    """cuobjdump's path."""
    found = shutil.which("cuobjdump")
    if not found and (triton := importlib.util.find_spec("triton")):
        path = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(path) if path.exists() else None
    if not found:
        sys.exit("cuda_check: no cuobjdump: install CUDA's, or triton")
    return found


def compiler():
    """The release of nvcc, such as 13.0."""
    text = subprocess.run(["nvcc", "--version"], check=True, capture_output=True, text=True).stdout
    return re.search(r"release ([\d.]+)", text).group(1)


def measured(build):
    """{kernel: {kind: most}} of all architectures in a build's objects, and the architectures."""
    found, architectures = collections.defaultdict(lambda: dict.fromkeys(KINDS, 0)), set()
    objects = sorted(build.rglob("torch_subspace_cuda.dir/cuda/**/*.cu.o"))
    if absent := {f"{path.name}.o" for path in CUDA.rglob("*.cu")} - {path.name for path in objects}:
        sys.exit(f"cuda_check: not built under {build}: {', '.join(sorted(absent))}")
    for path in objects:
        usage = [tool(), "--dump-resource-usage", str(path)]
        dump = subprocess.run(usage, check=True, capture_output=True, text=True).stdout
        names = subprocess.run(["c++filt"], input=dump, check=True, capture_output=True, text=True).stdout
        kernel = None
        for line in names.splitlines():
            if match := re.match(r"arch = (\w+)", line.strip()):
                architectures.add(match.group(1))
            elif match := re.match(r"\s*Function (.*):$", line):
                kernel = f"{path.name.split('.')[0]}.{plain(match.group(1))}"
            elif kernel and (match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", line)):
                for kind, value in zip(KINDS, map(int, match.groups()), strict=True):
                    found[kernel][kind] = max(found[kernel][kind], value)
                kernel = None
    return found, architectures


def plain(name):
    """`name<T>` of a demangled signature: no result, no parameters, no namespaces."""
    depth, start = 0, 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == " " and depth == 0:
            start = i + 1
        if c == "(" and depth == 0 and i > start:
            return name[start:i].replace("__nv_bfloat16", "bfloat16").replace("__half", "half")
    return name


def kept():
    """What the file holds: the compiler's release, and {kernel: {kind: most}}."""
    lines = KEPT.read_text().splitlines()
    rows = [re.match(r"(.*?)\s+(\d+)\s+(\d+)\s+(\d+)$", line).groups() for line in lines if line[:1] not in "# "]
    return lines[0].split()[-1], {name: dict(zip(KINDS, map(int, rest), strict=True)) for name, *rest in rows}


def update(found):
    """Write the file."""
    width = max(map(len, found))
    rows = [
        f"{name:<{width}} {row['registers']:4} {row['stack']:5} {row['shared']:6}"
        for name, row in sorted(found.items())
    ]
    head = f"# registers, stack, static shared memory: the most on any architecture, by nvcc {compiler()}"
    KEPT.write_text("\n".join([head, *rows]) + "\n")


def complaints(found):
    """Lines about what is beyond its limit."""
    release, limits = kept()
    same = release == compiler()
    for name, row in sorted(found.items()):
        if same and name not in limits:
            yield f"{name} is not in {KEPT.name}"
        for kind, value in row.items():
            limit = limits.get(name, MOST)[kind] if same else MOST[kind]
            if value > limit:
                yield f"{name}: {kind} {value}, at most {limit}"
    if same:
        yield from (f"{name} is in {KEPT.name}, but no kernel" for name in sorted(limits.keys() - found.keys()))


def main():
    """Check, or write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("build", type=Path, help="folder with a CMake build somewhere in it")
    parser.add_argument("--update", action="store_true", help=f"write {KEPT.name} instead")
    args = parser.parse_args()
    found, architectures = measured(args.build)
    print(f"{len(found)} kernels on {', '.join(sorted(architectures))}")
    if args.update:
        return update(found)
    wrong = list(complaints(found))
    if wrong:
        sys.exit("\n".join(["cuda_check: run with --update if this is meant to be", *wrong]))


if __name__ == "__main__":
    main()
