"""A GPU in one short call: build for it, test it, look for faults, then measure. `make gpu-quick` runs this.

    python tests/gpu/quick.py --seconds 520 --out build/gpu-quick
    python tests/gpu/quick.py --again last               # only what failed or was not reached
    python tests/gpu/quick.py --again results.tar.gz     # the same after a call on another machine, by its results

Every stage has a budget, what is left of the seconds less what is kept for later stages, and is stopped at its end.
What it has found until then stands: --out holds summary.md and results.tar.gz, renewed every few seconds, with all
logs, test outcomes and rows. Exit status: 1 something failed, 2 nothing failed but something was not reached, else 0.
Without a GPU the stages say so and skip.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import bundle
from verdicts import all_tests, by_code, judge_bench, judge_machine, judge_tests, judge_tool, last_line, rows_of

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "bench"))
PACKAGES, LIVE = ROOT / "build" / "gpu-packages", ROOT / "build" / "gpu-live"
STAMP = PACKAGES / "torch_subspace.stamp"  # of which sources, and for which GPU, the build in there is
KEPT = {"tests": 0.2, "rows": 0.33}  # shares of all seconds that the stages before leave to these
SUMMING_UP, GRACE, LEAST, RENEWED, NATIVE = 8, 8, 10, 10, 150  # seconds
LARGEST = 2 << 20  # of a log, its end, in the results
LARGE = "tests/gpu/test_cuda_memory.py"  # one after the other, up to 45 GiB
TOOLS = "memcheck", "racecheck", "synccheck"


@dataclasses.dataclass
class Stage:
    """
    command: what to run, given its seconds.
    judge: what came of it, from (exit code or None where it was stopped, folder, its log's text): a status ("passed",
        "failed", "stopped", "skipped") and words.
    most: seconds it gets at most.
    environment: beside what there is.
    """

    name: str
    command: Callable[[float], list[str]]
    judge: Callable[[int | None, Path, str], tuple[str, str]]
    most: float = float("inf")
    environment: dict = dataclasses.field(default_factory=dict)


# ----------------------------------------------------------------------------------------------------- running stages


def together(stages, seconds, folder, renew):
    """Run stages side by side, each within its seconds; {name: (status, words, seconds)}."""
    running, found, begun, renewed = {}, {}, time.monotonic(), time.monotonic()
    try:
        for stage in stages:
            mine = min(seconds, stage.most)
            with (folder / f"{stage.name}.log").open("w") as log:
                running[stage.name] = stage, mine, subprocess.Popen(
                    stage.command(mine), cwd=ROOT, env=os.environ | stage.environment, stdin=subprocess.DEVNULL,
                    stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            print(f"{stage.name}: begun, {mine:.0f} s at most", flush=True)
        while running:
            time.sleep(0.1)
            now = time.monotonic()
            late = [name for name, (_, mine, process) in running.items()
                    if process.poll() is None and now - begun > mine]
            stop([running[name][2] for name in late])
            for name in [name for name, (_, _, process) in running.items() if process.poll() is not None]:
                stage, _, process = running.pop(name)
                code = None if name in late else process.returncode
                found[name] = *judged(stage, code, folder), time.monotonic() - begun
                print(f"{name}: {found[name][0]} after {found[name][2]:.0f} s: {found[name][1]}", flush=True)
            if now - renewed > RENEWED:
                renewed = now
                renew(found)
    except KeyboardInterrupt:
        stop([process for _, _, process in running.values()])
        renew(found | {name: (*judged(stage, None, folder), time.monotonic() - begun)
                       for name, (stage, _, _) in running.items()})
        raise
    return found


def stop(processes):
    """First as a user would, so that they sum up."""
    for number, grace in ((signal.SIGINT, GRACE), (signal.SIGKILL, 60)):
        left = [process for process in processes if process.poll() is None]
        end = time.monotonic() + grace
        for process in left:
            os.killpg(process.pid, number)
        for process in left:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, end - time.monotonic()))
    for process in processes:  # what a leader leaves behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def judged(stage, code, folder):
    """The stage's own judgement; one that fails to judge has failed."""
    text = (folder / f"{stage.name}.log").read_text(errors="replace")
    try:
        return stage.judge(code, folder, text)
    except Exception as problem:
        return "failed", f"its results can't be read: {type(problem).__name__}: {problem}"


# ----------------------------------------------------------------------------------------------------------- the stages


def architecture():
    """Of this GPU, as nvcc counts; CUDAARCHS comes first, and 90 where neither tells."""
    if os.environ.get("CUDAARCHS"):
        return os.environ["CUDAARCHS"]
    told = query("compute_cap")
    return told.replace(".", "") if told else "90"


def query(what):
    """nvidia-smi's answer, "" where there is none."""
    try:
        command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader", "--id=0"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def wanted_stamp():
    """What a build must be of and for."""
    return f"{bundle.sources()} sm_{architecture()}"


def judge_build(code, folder, text):
    """Leaves its stamp."""
    if code == 0:
        STAMP.write_text(wanted_stamp())
        return "passed", f"for sm_{architecture()}"
    return "failed", last_line(text)


def phases(folder, again, cores):
    """Stages in the order of phases; those of a phase run side by side."""
    python, jobs = sys.executable, max(1, cores // 2)
    done = {"SUBSPACE_DONE": str(folder / "done.txt")} if again else {}
    folders = [str(ROOT / "tests" / "gpu"), str(ROOT / "tests" / "bench"), os.environ.get("PYTHONPATH", "")]

    def pytest(name, count, *what):  # not loadgroup: with that xdist doesn't survive a process that ends
        command = [python, "-m", "pytest", *what, "-m", "gpu", "-q", "--tb=short", "-p", "outcomes", "-p",
                   "no:cacheprovider", "--dist", "load", "-n", str(count), "--max-worker-restart", "1000"]
        environment = {"SUBSPACE_OUTCOMES": str(folder / f"{name}.jsonl"), "SUBSPACE_LIMIT": "90",
                       "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(folders)} | done
        return Stage(name, lambda s: command, functools.partial(judge_tests, name), environment=environment)

    native = (f"cmake -S . -B build/gpu-native -DTS_TESTS=ON -DTS_CUDA_ON_CPU=OFF -DTORCH_SUBSPACE_CUDA=OFF "
              f"-DPython3_EXECUTABLE={python} && cmake --build build/gpu-native --parallel {max(1, cores // 4)} && "
              f"ctest --test-dir build/gpu-native --parallel {max(1, cores // 4)}")
    build = Stage("build", lambda s: ["make", "gpu-build", f"PYTHON={python}"], judge_build,
                  environment={"PIP_VERBOSE": "2", "MAX_JOBS": str(cores)})
    tests = [
        Stage("machine", lambda s: [python, __file__, "--machine"], judge_machine, 60),
        Stage("selftest", lambda s: [python, "-m", "torch_subspace"], by_code, 90),
        pytest("tests", jobs, "tests/gpu", f"--ignore={LARGE}"),
        pytest("memory", 1, LARGE),
        *(Stage(tool, lambda s, tool=tool: [python, "tests/gpu/sanitize.py", "--tool", tool, "--small", "--seconds",
                                            f"{s - 10:.0f}"], judge_tool) for tool in TOOLS),
        Stage("native", lambda s: ["nice", "sh", "-c", native], by_code, NATIVE),
    ]
    bench = Stage("bench", lambda s: [python, "tests/bench/bench.py", "--device", "cuda", "--seconds", f"{s - 15:.0f}",
                                      "--results", str(folder / "bench"), *(["--missing"] if again else [])],
                  judge_bench)
    return {"build": [build], "tests": tests, "rows": [bench]}


def machine():
    """Print where this is, as JSON."""
    import harness
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(json.dumps(harness.environment(device, torch.get_num_threads())))


# --------------------------------------------------------------------------------------------------------- the summary


def summary(found, folder, spent):
    """The page, and the exit status."""
    statuses = [status for status, *_ in found.values()]
    names, tests = all_tests(folder)
    planned, there, wrong = rows_of(folder / "bench")
    known = folder / "machine.log"
    try:
        where = json.loads(re.findall(r"^\{.*\}$", known.read_text(), re.M)[-1])
    except (OSError, ValueError, IndexError):
        where = {}
    code = 1 if "failed" in statuses else 2 if {"stopped", "not begun"} & set(statuses) else 0
    skipped = [name for name, (status, *_) in found.items() if status == "skipped"]
    verdict = {0: f"what ran has passed; skipped: {', '.join(skipped)}" if skipped else "all passed",
               1: "something FAILED", 2: "nothing failed, but not all was reached"}[code]
    if where.get("device") == "cpu":
        verdict = f"there is no GPU: nothing was shown on one ({verdict})"
    card = where.get("device") or query("name") or "unknown GPU"
    told = [card, *(f"{name} {where[key]}" for name, key in (
        ("driver", "driver version"), ("CUDA", "cuda"), ("torch", "torch"), ("commit", "commit"), ("on", "cpu"))
        if key in where)]
    lines = [f"# {verdict}", "", f"{', '.join(told)}; {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime())}; "
             f"{spent:.0f} s in this call.", "", "| stage | | s | |", "|---|---|---|---|"]
    lines += [f"| {name} | {status} | {seconds:.0f} | {words} |" for name, (status, words, seconds) in found.items()]
    for name, (status, *_) in found.items():
        log = folder / f"{name}.log"
        if status == "failed" and log.exists() and name not in ("tests", "memory", "bench"):
            lines += ["", f"## {name}", "", "```", *log.read_text(errors="replace").splitlines()[-20:], "```"]
    failed = [name for name in names if tests.get(name) == "failed"]
    lines += listed("Tests that failed", failed) + listed("Rows without our time", [
        f"{op}, {case}: {why}" for (op, case), why in wrong.items()])
    lines += listed("Tests not reached", [name for name in names if name not in tests])
    lines += listed("Rows not reached", [f"{op}, {case}" for op, case in planned if (op, case) not in there])
    table = folder / "bench" / "gpu.md"
    if table.exists():
        lines += ["", table.read_text().replace("# On a GPU", "## Rows").rstrip()]
    return "\n".join(lines) + "\n", code


def listed(title, names, most=30):
    """A heading and the first names; all are in the results."""
    if not names:
        return []
    rest = [f"* and {len(names) - most} more"] if len(names) > most else []
    return ["", f"## {title}: {len(names)}", "", *(f"* {name}" for name in names[:most]), *rest]


def publish(out, folder, found, spent):
    """Write both files of --out anew; the exit status."""
    text, code = summary(found, folder, spent)
    (folder / "state.json").write_text(json.dumps(found, indent=1) + "\n")
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.md").write_text(text)
    part = out / "results.tar.gz.part"
    with tarfile.open(part, "w:gz") as archive:
        for path in sorted(folder.rglob("*")):
            if not path.is_file():
                continue
            with path.open("rb") as file:
                info = archive.gettarinfo(fileobj=file, arcname=str(path.relative_to(folder)))
                file.seek(max(0, info.size - LARGEST))
                info.size = min(info.size, LARGEST)
                archive.addfile(info, file)
    part.replace(out / "results.tar.gz")
    return code


# ---------------------------------------------------------------------------------------------------------------- main


def earlier(again, out, folder):
    """Results that are gone on with: {stage: what came of it}. An empty folder where there are none."""
    archive = out / "results.tar.gz" if again in ("1", "last") else Path(again or "")
    state = folder / "state.json"
    if again and (again not in ("1", "last") or not state.exists()):
        if not archive.is_file():
            sys.exit(f"there is nothing to go on with: no {state} and no {archive}")
        shutil.rmtree(folder, ignore_errors=True)
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    if not again:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    return json.loads(state.read_text()) if again else {}


def leave_out(folder):
    """Write the names of the tests that are not run again."""
    _, found = all_tests(folder)
    (folder / "done.txt").write_text("".join(f"{name}\n" for name, word in found.items() if word == "passed"))


def run(plan, seconds, out, folder, before, built):
    """All phases within the seconds; the exit status. What passed `before` is left out, and a build that is there."""
    begun = time.monotonic()
    found = {name: tuple(result) for name, result in before.items() if result[0] == "passed"}
    found = {name: result for name, result in found.items() if name not in ("build", "machine")}
    if built:
        found["build"] = "passed", "it is there already, of these sources", 0.0
    plan = {phase: [stage for stage in stages if stage.name not in found] for phase, stages in plan.items()}
    order = list(plan)
    for i, phase in enumerate(order):
        spare = sum(KEPT[later] * seconds for later in order[i + 1:] if plan[later])
        left = seconds - SUMMING_UP - GRACE - spare - (time.monotonic() - begun)
        if left < LEAST or found.get("build", ("passed",))[0] != "passed":
            why = "no time was left" if left < LEAST else "there is no build"
            found |= {stage.name: ("not begun", why, 0.0) for stage in plan[phase]}
            continue
        earlier_found = dict(found)
        found |= together(plan[phase], left, folder, lambda new, earlier_found=earlier_found: publish(
            out, folder, earlier_found | new, time.monotonic() - begun))
        publish(out, folder, found, time.monotonic() - begun)
    code = publish(out, folder, found, time.monotonic() - begun)
    print("\n" + (out / "summary.md").read_text(), flush=True)
    return code


def interrupted(number, frame):
    """As if it came from the keyboard; with a handler of our own the children keep theirs."""
    raise KeyboardInterrupt


def main():
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=520, help="for everything")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "gpu-quick", help="folder of the two results")
    parser.add_argument("--again", help="last, or a results.tar.gz: only what failed or was not reached there")
    parser.add_argument("--machine", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.machine:
        return machine()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, interrupted)
    bundle.name_commit()
    before = earlier(args.again, args.out, LIVE)
    if args.again:
        leave_out(LIVE)
    built = STAMP.exists() and STAMP.read_text() == wanted_stamp()
    plan = phases(LIVE, bool(args.again), os.cpu_count() or 1)
    try:
        sys.exit(run(plan, args.seconds, args.out, LIVE, before, built))
    except KeyboardInterrupt:
        sys.exit(f"interrupted; what there is lies in {args.out}")


if __name__ == "__main__":
    main()
