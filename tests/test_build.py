"""setup.py and CMake: what a build takes from the environment, and that no build spoils another.

setup.py runs in a copy of the tree, mostly with a stand-in for cmake that notes how it was called.
"""

import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
CMAKE = shutil.which("cmake")
FOR_REAL = f'exec {CMAKE} "$@"'

STAND_IN = f"""#!/bin/sh
echo "$@" >>"$CALLS"
case "$1" in
--version) exec {CMAKE} --version ;;
--build) eval "$DURING_BUILD" ;;
--install) mkdir -p "$4/lib" && touch "$4/lib/made" && echo "$4/lib/made" >"$2/install_manifest.txt" ;;
*) mkdir -p "$4" && eval "$DURING_CONFIGURE" ;;
esac
"""


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


class Tree:
    """A copy of the sources, to be built with a stand-in for cmake."""

    def __init__(self, folder):
        left_out = shutil.ignore_patterns(".*", "build", "dist", "docs", "examples", "*.egg-info", "lib", "__pycache__")
        self.root, self.tools, self.log = folder / "tree", folder / "tools", folder / "calls"
        shutil.copytree(ROOT, self.root, ignore=left_out)
        executable(self.tools / "cmake", STAND_IN)
        self.environment = {k: v for k, v in os.environ.items() if k not in SETUP["SETTINGS"] + ["MAX_JOBS"]}
        self.environment |= {"PATH": f"{self.tools}:{os.environ['PATH']}", "CALLS": str(self.log)}

    def setup(self, *command, **environment):
        """setup.py, started; with a session of its own, so that all of it can be killed."""
        return subprocess.Popen(
            [sys.executable, "setup.py", "-q", *command],
            cwd=self.root,
            env=self.environment | environment,
            start_new_session=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def build(self, **environment):
        """The calls of cmake in an in-place build that goes well."""
        self.log.unlink(missing_ok=True)
        process = self.setup("build_ext", "--inplace", **environment)
        text, _ = process.communicate(timeout=120)
        assert process.returncode == 0, text
        return self.calls()

    def calls(self):
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line.split() for line in lines if line != "--version"]

    def kill_while(self, word, **environment):
        """A build that is killed, with all that it started, once cmake's call with `word` has begun."""
        self.log.unlink(missing_ok=True)
        process = self.setup("build_ext", "--inplace", **environment)
        deadline = time.monotonic() + 60
        while not any(word in call for call in self.calls()) and time.monotonic() < deadline:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


def folder(calls):
    return next(call[call.index("-B") + 1] for call in calls if "-B" in call)


# ------------------------------------------------------------- interrupted


def test_an_interrupted_configuration_is_not_continued(tree):
    tree.kill_while("-B", DURING_CONFIGURE="sleep 60")
    assert "--fresh" in tree.build()[0]
    assert "--fresh" not in tree.build()[0]  # nor is a good one thrown away


def test_a_configuration_that_failed_is_not_continued(tree):
    process = tree.setup("build_ext", "--inplace", DURING_CONFIGURE="exit 1")
    assert "could not be built" in process.communicate()[0] and process.returncode
    assert "--fresh" in tree.build()[0]


def test_an_interrupted_build_goes_on_with_ninja(tree):
    executable(tree.tools / "ninja", "#!/bin/sh\necho 1.11\n")
    tree.kill_while("--build", DURING_BUILD="sleep 60")
    calls = tree.build()
    assert "-GNinja" in calls[0] and "--fresh" not in calls[0]


def test_an_interrupted_build_starts_over_with_make(tree):
    make = {"CMAKE_GENERATOR": "Unix Makefiles"}
    tree.kill_while("--build", DURING_BUILD="sleep 60", **make)
    assert "--fresh" in tree.build(**make)[0]
    process = tree.setup("build_ext", "--inplace", DURING_BUILD="exit 1", **make)  # an error in our code
    assert "could not be built" in process.communicate()[0]
    assert "--fresh" not in tree.build(**make)[0]


def test_cmake_recovers_from_what_an_interruption_leaves(tree):
    """CMake itself this time: half of what is known of the compiler is written, the cache is not."""
    variables = {"TORCH_SUBSPACE_CUDA": "OFF", "DURING_CONFIGURE": FOR_REAL}
    build = Path(folder(tree.build(**variables)))
    (build / "whole").unlink()
    (build / "CMakeCache.txt").unlink()
    compiler = next(build.glob("CMakeFiles/*/CMakeCCompiler.cmake"))
    whole = compiler.read_text()
    compiler.write_text(whole[:100])
    tree.build(**variables)
    assert compiler.read_text() == whole and (build / "CMakeCache.txt").exists()


# ------------------------------------------------------- configured differently


@pytest.mark.parametrize("name", SETUP["SETTINGS"])
def test_every_setting_has_a_folder_of_its_own(name, monkeypatch):
    monkeypatch.delenv(name, raising=False)
    without = SETUP["configuration"](True)
    monkeypatch.setenv(name, "90")
    assert SETUP["configuration"](True) != without
    monkeypatch.delenv(name)
    assert SETUP["configuration"](True) == without


@pytest.mark.parametrize("tool", ["cc", "nvcc"])
def test_another_compiler_has_a_folder_of_its_own(tool, monkeypatch, tmp_path):
    before = SETUP["configuration"](True)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert SETUP["configuration"](True) == before  # an environment of pip's, gone tomorrow
    executable(tmp_path / tool, "#!/bin/sh\n")
    assert SETUP["configuration"](True) != before


def test_a_moved_tree_has_a_folder_of_its_own(tree):
    first = folder(tree.build())
    moved = tree.root.with_name("moved")
    tree.root.rename(moved)
    tree.root = moved
    calls = tree.build()
    assert Path(folder(calls)).parent == moved / "build" and Path(folder(calls)).name != Path(first).name
    assert "--fresh" in calls[0]


def test_openblas_and_ninja_of_an_environment_that_is_gone(tree):
    """pip's isolated environments have a new name each time; the folder stays, no path into the old one does."""
    made = []
    for name in ("first", "second"):
        environment = tree.root.parent / name
        (environment / "scipy_openblas32").mkdir(parents=True)
        (environment / "scipy_openblas32/__init__.py").touch()
        executable(environment / "bin/ninja", "#!/bin/sh\necho 1.11.1\n")
        calls = tree.build(
            TORCH_SUBSPACE_CUDA="OFF",
            DURING_CONFIGURE=FOR_REAL,
            PYTHONPATH=str(environment),
            PATH=f"{environment}/bin:{tree.environment['PATH']}",
        )
        made.append(folder(calls))
        shutil.rmtree(environment)
    assert made[0] == made[1]
    for file in ("build.ninja", "CMakeCache.txt"):
        text = (Path(made[0]) / file).read_text()
        assert f"{tree.root.parent}/second/" in text and f"{tree.root.parent}/first/" not in text


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not installed")
def test_a_folder_can_change_its_architectures(tmp_path):
    """CMake alone, as its presets use it."""
    command = [CMAKE, "-GUnix Makefiles", "-S", ROOT, "-B", tmp_path, f"-DPython3_EXECUTABLE={sys.executable}"]
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDAARCHS", "TORCH_CUDA_ARCH_LIST")}
    for asked in ({}, {"CUDAARCHS": "90"}, {"TORCH_CUDA_ARCH_LIST": "8.6"}):
        done = subprocess.run(command, env=kept | asked, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    flags = (tmp_path / "CMakeFiles/torch_subspace_cuda.dir/flags.make").read_text()
    assert "arch=compute_86,code=[sm_86]" in flags and "compute_90" not in flags


# ---------------------------------------------------------------- at once


def test_two_at_once_take_turns(tree):
    note = 'echo begin >>"$CALLS"; sleep 0.5; echo end >>"$CALLS"'
    both = [tree.setup("build_ext", "--inplace", DURING_BUILD=note, CFLAGS=flags) for flags in ("-O1", "-O2")]
    texts = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], texts
    assert [call for call in tree.calls() if call in (["begin"], ["end"])] == [["begin"], ["end"]] * 2


def test_max_jobs_is_obeyed(tree):
    build = next(call for call in tree.build(MAX_JOBS="3") if call[0] == "--build")
    assert build[-2:] == ["--parallel", "3"]


def test_a_wheel_is_put_together_in_a_folder_of_its_own(tree):
    stale = tree.root / "build/lib/torch_subspace/gone.py"
    stale.parent.mkdir(parents=True)
    stale.touch()
    process = tree.setup("bdist_wheel")
    assert process.communicate(timeout=120) and process.returncode == 0
    wheel = next((tree.root / "dist").glob("*.whl"))
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True).stdout
    assert "torch_subspace/lib/made" in names and "gone.py" not in names


# -------------------------------------------------------------- same bytes


@pytest.mark.parametrize("command", ["sdist", "bdist_wheel"])
def test_two_builds_give_the_same_bytes(command, tmp_path):
    made = []
    for name, mask, date in (("here", 0o022, 10**9), ("there", 0o077, 2 * 10**9)):
        (tmp_path / name).mkdir()
        old = os.umask(mask)
        try:
            tree = Tree(tmp_path / name)
            (tree.root / "torch_subspace.egg-info").mkdir()
            (tree.root / "torch_subspace.egg-info/SOURCES.txt").write_text(f"{name}\n")  # of an earlier time
            (tree.root / name).touch()
            for file in tree.root.rglob("*"):
                os.utime(file, (date, date))
                file.chmod(file.stat().st_mode & ~mask)
            process = tree.setup(command)
            text, _ = process.communicate(timeout=120)
        finally:
            os.umask(old)
        assert process.returncode == 0, text
        made.append(next((tree.root / "dist").iterdir()))
    assert made[0].name == made[1].name and made[0].read_bytes() == made[1].read_bytes()


# ------------------------------------------------------------ architectures


def architectures(folder, *, gpus=(), known="75 80 86 89 90 100 110 120 121", version="13.0", **environment):
    """What cuda/architectures.cmake answers, and what it says."""
    executable(folder / "nvidia-smi", "#!/bin/sh\n" + (f"printf '%s\\n' {' '.join(gpus)}\n" if gpus else "exit 9\n"))
    executable(folder / "nvcc", f"#!/bin/sh\nprintf 'compute_%s\\n' {known}\n")
    (folder / "ask.cmake").write_text(
        "cmake_minimum_required(VERSION 3.24)\n"
        f'set(CUDAToolkit_VERSION {version})\nset(CMAKE_CUDA_COMPILER "{folder}/nvcc")\n'
        f'include("{ROOT}/cuda/architectures.cmake")\n'
        'cuda_architectures(found "$ENV{CUDAARCHS}")\nmessage("FOUND ${found}")\n'
    )
    kept = {k: v for k, v in os.environ.items() if k not in ("CUDAARCHS", "TORCH_CUDA_ARCH_LIST")}
    done = subprocess.run(
        [CMAKE, "-P", folder / "ask.cmake"],
        env=kept | {"PATH": f"{folder}:{os.environ['PATH']}"} | environment,
        capture_output=True,
        text=True,
    )
    text = " ".join((done.stdout + done.stderr).split())
    return text.split("FOUND ")[1] if done.returncode == 0 else None, text


ALL = "80-real;86-real;89-real;90-real;100;120"


@pytest.mark.parametrize(
    "told, expected",
    [
        ({}, ALL),
        ({"version": "12.4", "known": "50 80 86 89 90"}, "80-real;86-real;89-real;90"),
        ({"gpus": ("9.0", "8.6", "9.0")}, "86-real;90"),
        ({"gpus": ("7.5",)}, ALL),
        ({"gpus": ("7.5", "8.0")}, "80"),
        ({"gpus": ("12.0",), "version": "12.4", "known": "80 86 89 90"}, "80-real;86-real;89-real;90"),
        ({"CUDAARCHS": "90;80-real", "TORCH_CUDA_ARCH_LIST": "8.6"}, "90;80-real"),
        ({"CUDAARCHS": "all", "gpus": ("9.0",)}, ALL),
        ({"CUDAARCHS": "native", "gpus": ("9.0",)}, "90"),
        ({"CUDAARCHS": "90a-real;100f"}, "90a-real;100f"),
        ({"TORCH_CUDA_ARCH_LIST": "8.0;9.0+PTX", "gpus": ("8.6",)}, "80-real;90"),
        ({"TORCH_CUDA_ARCH_LIST": "8.6 9.0"}, "86-real;90-real"),
        ({"TORCH_CUDA_ARCH_LIST": "9.0a, 12.0+PTX"}, "90a-real;120"),
        ({"TORCH_CUDA_ARCH_LIST": "Ampere Hopper+PTX"}, "80-real;86-real;90"),
        ({"TORCH_CUDA_ARCH_LIST": "7.5 8.0"}, "80-real"),
    ],
)
def test_architectures(told, expected, tmp_path):
    found, text = architectures(tmp_path, **told)
    assert found == expected, text


@pytest.mark.parametrize(
    "told, said",
    [
        ({"CUDAARCHS": "sm_90"}, 'CUDAARCHS: "sm_90" is not an architecture'),
        ({"CUDAARCHS": "70"}, "no architecture of compute capability 8.0 or newer"),
        ({"CUDAARCHS": "150"}, "does not know 150"),
        ({"CUDAARCHS": "native"}, "nvidia-smi finds no GPU"),
        ({"TORCH_CUDA_ARCH_LIST": "9"}, 'TORCH_CUDA_ARCH_LIST: "9" is not a compute capability such as 8.0'),
        ({"TORCH_CUDA_ARCH_LIST": "Zuse"}, '"Zuse" is not a compute capability'),
        ({"TORCH_CUDA_ARCH_LIST": " "}, "no architecture"),
    ],
)
def test_architectures_that_are_refused(told, said, tmp_path):
    found, text = architectures(tmp_path, **told)
    assert found is None and said in text, text
