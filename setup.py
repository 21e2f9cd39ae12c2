"""Builds the libraries with CMake and installs them into the package.

torch is not imported: the libraries use its stable C ABI only. What to build is told by variables of the environment:
TORCH_SUBSPACE_CUDA=AUTO|ON|OFF, CUDAARCHS or TORCH_CUDA_ARCH_LIST, MAX_JOBS, CMAKE_ARGS, for example
CMAKE_ARGS=-DTS_OPENBLAS=system, and those that CMake itself reads.
"""

import atexit
import contextlib
import fcntl
import gzip
import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
CMAKE_MINIMUM = (3, 24)

# Everything that CMake or a compiler reads once, when a build folder is configured for the first time.
SETTINGS = """
    TORCH_SUBSPACE_CUDA CMAKE_ARGS CMAKE_BUILD_TYPE CMAKE_GENERATOR CMAKE_PREFIX_PATH CMAKE_TOOLCHAIN_FILE
    CMAKE_C_COMPILER_LAUNCHER CMAKE_CUDA_COMPILER_LAUNCHER CC CFLAGS LDFLAGS CPATH C_INCLUDE_PATH LIBRARY_PATH
    CUDACXX CUDAHOSTCXX CUDAFLAGS CUDAARCHS TORCH_CUDA_ARCH_LIST CUDA_PATH CUDAToolkit_ROOT
    NVCC_PREPEND_FLAGS NVCC_APPEND_FLAGS
""".split()


def version_of(tool):
    """It is run, not just looked for: inside pip's isolation the launcher of a venv's own cmake or ninja is broken."""
    try:
        text = subprocess.run([tool, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    version = re.search(r"(\d+)\.(\d+)", text)
    return version and tuple(map(int, version.groups()))


def have_cmake():
    return (version_of("cmake") or (0, 0)) >= CMAKE_MINIMUM


def need_tools():
    if not have_cmake():
        sys.exit("torch-subspace needs CMake 3.24 or newer to build: pip install cmake")
    compilers = shlex.split(os.environ.get("CC", ""))[:1] or ["cc", "gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        sys.exit(
            f"torch-subspace needs a C compiler to build, and there is no {' or '.join(compilers)}: "
            "install one (Debian, Ubuntu: apt install gcc) or name yours in CC"
        )


def generator(arguments):
    """Ninja where there is one, unless another is asked for. A cached path may be of an environment that is gone."""
    asked = os.environ.get("CMAKE_GENERATOR", "Ninja") != "Ninja" or any(a.startswith("-G") for a in arguments)
    return [] if asked or not version_of("ninja") else ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"]


def configuration(with_ninja):
    """A name for all that configures a build: two that differ in any of it never share a folder."""
    compilers = [os.environ.get(name, "").split(" ")[0] for name in ("CC", "CUDACXX", "CUDAHOSTCXX")]
    files = [shutil.which(name) for name in ("cc", "gcc", "g++", "clang", "ld", "nvcc", *filter(None, compilers))]
    tools = [(os.path.realpath(file), os.stat(file).st_mtime_ns) for file in filter(None, files)]
    told = [os.environ.get(name) for name in SETTINGS]
    whole = ROOT, platform.machine(), version_of("cmake"), with_ninja, told, tools
    return hashlib.sha256(repr(whole).encode()).hexdigest()[:12]


@contextlib.contextmanager
def alone(folder):
    """One build of this tree after another; they end as one that found everything done."""
    folder.mkdir(exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another build in {folder}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            pass  # a file system without locks
        yield


class CMakeBuild(build_ext):
    """configure, build, install: lib/*.so go into the package folder."""

    def run(self):
        need_tools()
        in_place = self.inplace or self.editable_mode
        package = ROOT / "ops" if in_place else Path(self.build_lib, "torch_subspace").resolve()
        with alone(ROOT / "build"):
            self.build(package)

    def build(self, package):
        arguments = shlex.split(os.environ.get("CMAKE_ARGS", ""))
        ninja = generator(arguments)
        folder = ROOT / "build" / f"setup-{configuration(bool(ninja))}"
        whole = folder / "whole"  # is there unless a configuration was cut short, or a build by other than Ninja
        self.cmake(
            *("-S", ROOT, "-B", folder, *ninja, f"--log-level={'STATUS' if self.verbose else 'WARNING'}"),
            *([] if whole.exists() else ["--fresh"]),
            *("-DCMAKE_INSTALL_MESSAGE=NEVER", f"-DPython3_EXECUTABLE={sys.executable}"),
            f"-DTORCH_SUBSPACE_CUDA={os.environ.get('TORCH_SUBSPACE_CUDA', 'AUTO')}",
            *arguments,
        )
        if ninja:
            whole.touch()
        else:
            whole.unlink(missing_ok=True)  # make would take half a file for a whole one
        jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
        try:
            self.cmake("--build", folder, "--parallel", jobs)
        finally:
            whole.touch()
        self.cmake("--install", folder, "--prefix", package)
        installed = (folder / "install_manifest.txt").read_text().splitlines()
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


class PrivateBuild(build):
    """The folder a wheel is put together in: no file of an earlier one comes along, and two at once do not meet."""

    def initialize_options(self):
        super().initialize_options()
        self.build_base = tempfile.mkdtemp(prefix="torch-subspace-")
        atexit.register(shutil.rmtree, self.build_base, ignore_errors=True)


# Two builds give the same bytes: files have no times and no owners, and the rights that git gives them.
EPOCH = os.environ.setdefault("SOURCE_DATE_EPOCH", "315532800")  # 1980, the first year that a zip file has


def rights(executable):
    return 0o755 if executable else 0o644


class AnyPythonWheel(bdist_wheel):
    """Nothing uses Python's C API, so that one wheel serves every Python 3."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]

    def write_wheelfile(self, *args, **kwargs):
        super().write_wheelfile(*args, **kwargs)
        for path in Path(self.bdist_dir).rglob("*"):
            path.chmod(rights(path.is_dir() or path.suffix == ".so"))


class PlainArchive(sdist):
    """The same bytes whoever makes it, and when."""

    def run(self):
        shutil.rmtree(ROOT / "torch_subspace.egg-info", ignore_errors=True)  # what it lists would come along
        super().run()

    def make_archive(self, base_name, format, root_dir=None, base_dir=None, owner=None, group=None):
        def plain(member):
            member.mtime, member.mode = int(EPOCH), rights(member.isdir() or member.mode & 0o100)
            member.uid = member.gid = 0
            member.uname = member.gname = ""
            return member

        Path(base_name).parent.mkdir(parents=True, exist_ok=True)
        with (
            open(f"{base_name}.tar.gz", "wb") as file,
            gzip.GzipFile("", "wb", fileobj=file, mtime=int(EPOCH)) as packed,
            tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as archive,
        ):
            archive.add(base_dir, filter=plain)  # in the order of their names
        return file.name


if __name__ == "__main__":
    setup(
        packages=["torch_subspace", *(f"torch_subspace.{name}" for name in find_packages("ops"))],
        package_dir={"torch_subspace": "ops"},
        package_data={"torch_subspace": ["py.typed"]},
        ext_modules=[Extension("torch_subspace.native", sources=[])],  # no pure Python: the wheel is for one platform
        cmdclass={"bdist_wheel": AnyPythonWheel, "build": PrivateBuild, "build_ext": CMakeBuild, "sdist": PlainArchive},
        setup_requires=[] if have_cmake() else ["cmake>=3.24"],  # what pip adds to its isolated build
    )
