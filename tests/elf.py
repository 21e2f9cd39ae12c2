"""What our shared libraries may ask of a system, read from the files: no torch is needed, and none is loaded."""

import re
import subprocess

SYSTEM = {"libc.so.6", "libm.so.6", "libdl.so.2", "libpthread.so.0", "ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1"}
CUDA = {f"{name}.so.{major}" for name in ("libcublas", "libcudart") for major in (12, 13)}  # torch's own, by soname
NEEDED = {
    "libtorch_subspace_cpu.so": SYSTEM | {"libtorch_cpu.so", "libscipy_openblas.so", "libopenblas.so.0"},
    "libtorch_subspace_cuda.so": SYSTEM | {"libtorch_cpu.so", "libtorch_cuda.so"} | CUDA,
    "libscipy_openblas.so": SYSTEM,
}
GLIBC = 2, 28  # the oldest that torch itself runs on


def faults(path):
    """What is wrong with how a library is linked; nothing, if nothing is."""
    text = subprocess.run(["readelf", "-dVW", path], check=True, capture_output=True, text=True).stdout
    ours = path.name.startswith("libtorch_subspace_")
    found = []
    if unmeant := set(re.findall(r"\(NEEDED\).*\[(.*)\]", text)) - NEEDED[path.name]:
        found.append(f"needs {', '.join(sorted(unmeant))}")
    run_paths = re.findall(r"\(R(?:UN)?PATH\).*\[(.*)\]", text)
    if run_paths != ["$ORIGIN"] * ours:  # beside us lies OpenBLAS; torch is loaded
        found.append(f"looks for libraries in {run_paths}")
    if ours and "NODELETE" not in text:
        found.append("can be unloaded, and torch keeps pointers to the kernels")
    if foreign := set(re.findall(r"Name: ((?:GLIBCXX|CXXABI|GCC|GOMP|GFORTRAN)_\S+)", text)):
        found.append(f"needs a compiler's run time: {', '.join(sorted(foreign))}")
    versions = {tuple(map(int, number.split("."))) for number in re.findall(r"Name: GLIBC_([\d.]+)", text)}
    if (newest := max(versions)) > GLIBC:
        found.append(f"needs glibc {newest}")
    if ours and (places := set(re.findall(rb"/[\w./+~-]+/(?:cpu|cuda|shim)/[\w./]+\.\w+", path.read_bytes()))):
        found.append(f"tells where it was built: {sorted(places)}")
    return found
