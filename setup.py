"""Builds the libraries with CMake and installs them into the package.

torch is not imported: the libraries use its stable C ABI only. What to build is told by two variables of the
environment: TORCH_SUBSPACE_CUDA=AUTO|ON|OFF and CMAKE_ARGS, for example CMAKE_ARGS=-DTS_OPENBLAS=system.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CMAKE_MINIMUM = (3, 24)


def have_cmake():
    """It is run, not just looked for: inside pip's isolation the launcher of a venv's own cmake is broken."""
    try:
        text = subprocess.run(["cmake", "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return False
    version = re.search(r"version (\d+)\.(\d+)", text)
    return version is not None and tuple(map(int, version.groups())) >= CMAKE_MINIMUM


def need_tools():
    if not have_cmake():
        sys.exit("torch-subspace needs CMake 3.24 or newer to build: pip install cmake")
    compilers = shlex.split(os.environ.get("CC", ""))[:1] or ["cc", "gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        sys.exit(
            f"torch-subspace needs a C compiler to build, and there is no {' or '.join(compilers)}: "
            "install one (Debian, Ubuntu: apt install gcc) or name yours in CC"
        )


class CMakeBuild(build_ext):
    """configure, build, install: lib/*.so go into the package folder."""

    def run(self):
        need_tools()
        in_place = self.inplace or self.editable_mode
        package = ROOT / "ops" if in_place else Path(self.build_lib, "torch_subspace").resolve()
        build = ROOT / "build" / "editable" if in_place else Path(self.build_temp).resolve()
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count())
        if shutil.which("ninja") and not (build / "CMakeCache.txt").exists():
            os.environ.setdefault("CMAKE_GENERATOR", "Ninja")
        self.cmake(
            *("-S", ROOT, "-B", build, "--log-level=WARNING", "-DCMAKE_INSTALL_MESSAGE=NEVER"),
            *(f"-DCMAKE_INSTALL_PREFIX={package}", f"-DPython3_EXECUTABLE={sys.executable}"),
            f"-DTORCH_SUBSPACE_CUDA={os.environ.get('TORCH_SUBSPACE_CUDA', 'AUTO')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        )
        self.cmake("--build", build, "--parallel", jobs)
        self.cmake("--install", build)
        installed = (build / "install_manifest.txt").read_text().splitlines()
        for file in (package / "lib").iterdir():
            if str(file) not in installed:
                file.unlink()  # of an earlier build, such as one with CUDA

    def cmake(self, *args):
        if subprocess.run(["cmake", *map(str, args)], stdout=sys.stderr).returncode:
            sys.exit("torch-subspace could not be built: the reason is in the lines above")

    # CMake decides what is built, and the wheel takes the whole package folder.
    def get_outputs(self):
        return []

    def get_output_mapping(self):
        return {}


class AnyPythonWheel(bdist_wheel):
    """Nothing uses Python's C API, so that one wheel serves every Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    packages=["torch_subspace", *(f"torch_subspace.{name}" for name in find_packages("ops"))],
    package_dir={"torch_subspace": "ops"},
    package_data={"torch_subspace": ["py.typed"]},
    ext_modules=[Extension("torch_subspace.native", sources=[])],  # no pure Python: the wheel is for one platform
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": AnyPythonWheel},
    setup_requires=[] if have_cmake() else ["cmake>=3.24"],  # what pip adds to its isolated build
)
