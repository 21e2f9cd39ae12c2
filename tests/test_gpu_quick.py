"""`make gpu-quick` without a GPU: budgets, results of what was stopped, and what is done again, on stub commands."""

import functools
import json
import os
import signal
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import types
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / part) for part in ("gpu", "bench")]

import bench  # noqa: E402
import bundle  # noqa: E402
import gpu_table  # noqa: E402
import outcomes  # noqa: E402
import quick  # noqa: E402


def python(code):
    """A command."""
    return lambda seconds: [sys.executable, "-c", textwrap.dedent(code)]


def stage(name, code, judge=quick.by_code, **options):
    return quick.Stage(name, python(code), judge, **options)


def go(tmp_path, plan, seconds=20.0, before=None, built=True):
    """Run it; the exit status, the state and the summary."""
    live, out = tmp_path / "live", tmp_path / "out"
    live.mkdir(exist_ok=True)
    code = quick.run({phase: plan.get(phase, []) for phase in ("build", "tests", "rows")}, seconds, out, live,
                     before or {}, built)
    return code, json.loads((live / "state.json").read_text()), (out / "summary.md").read_text()


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(quick, "SUMMING_UP", 0)
    monkeypatch.setattr(quick, "GRACE", 1)
    monkeypatch.setattr(quick, "LEAST", 1)


# ------------------------------------------------------------------------------------------------------------- budgets


def test_a_stage_that_overruns_is_stopped_and_named_and_what_it_wrote_stays(tmp_path):
    write = f"""
        import time
        open({str(tmp_path / 'live' / 'rows')!r}, "w").write("one row")
        print("begun", flush=True)
        time.sleep(60)
    """
    start = time.monotonic()
    code, state, summary = go(tmp_path, {"tests": [stage("slow", write, most=3), stage("fast", "print('fine')")]})
    assert time.monotonic() - start < 15
    assert code == 2 and state["slow"][0] == "stopped" and state["fast"][:2] == ["passed", "fine"]
    assert "| slow | stopped |" in summary and "not all was reached" in summary
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert archive.extractfile("rows").read() == b"one row"
        assert b"begun" in archive.extractfile("slow.log").read()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["results.tar.gz", "summary.md"]


def test_one_that_ignores_the_interrupt_is_killed_with_its_children(tmp_path):
    deaf = """
        import signal, subprocess, sys, time
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        print(child.pid, flush=True)
        time.sleep(60)
    """
    _, state, _ = go(tmp_path, {"tests": [stage("deaf", deaf, most=2)]})
    assert state["deaf"][0] == "stopped"
    child = int((tmp_path / "live" / "deaf.log").read_text().split()[0])
    status = Path(f"/proc/{child}/status")
    assert not status.exists() or "zombie" in status.read_text()


def test_time_is_kept_for_later_phases(tmp_path):
    plan = {"build": [stage("build", "import time; time.sleep(60)", lambda *_: ("passed", ""))],
            "tests": [stage("tests", "pass", lambda *_: ("passed", ""))],
            "rows": [stage("bench", "pass", lambda *_: ("passed", ""))]}
    code, state, _ = go(tmp_path, plan, seconds=16, built=False)
    assert state["build"][2] < 16 * (1 - 0.2 - 0.33) + 1
    assert code == 0 and state["tests"][0] == state["bench"][0] == "passed"


def test_without_a_build_nothing_begins(tmp_path):
    plan = {"build": [stage("build", "print('nvcc fatal'); raise SystemExit(1)")], "rows": [stage("bench", "pass")]}
    code, state, summary = go(tmp_path, plan, built=False)
    assert code == 1 and state["build"][:2] == ["failed", "nvcc fatal"] and state["bench"][0] == "not begun"
    assert "there is no build" in summary


def test_what_no_time_is_left_for_is_named(tmp_path):
    code, state, _ = go(tmp_path, {"rows": [stage("bench", "pass")]}, seconds=1.5)
    assert code == 2 and state["bench"][:2] == ["not begun", "no time was left"]


def test_an_interrupted_call_leaves_its_results(tmp_path):
    program = f"""
        import signal, sys
        sys.path[:0] = [{str(ROOT / 'tests' / 'gpu')!r}]
        from pathlib import Path
        import quick
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, quick.interrupted)
        slow = quick.Stage("slow", lambda s: [sys.executable, "-c", "import time; time.sleep(60)"], quick.by_code)
        live, out = Path({str(tmp_path / 'live')!r}), Path({str(tmp_path / 'out')!r})
        live.mkdir()
        quick.run({{"tests": [slow]}}, 50, out, live, {{}}, True)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True)
    assert "slow: begun" in process.stdout.readline()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) != 0
    assert "| slow | stopped |" in (tmp_path / "out" / "summary.md").read_text()


def test_a_long_log_comes_back_by_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(quick, "LARGEST", 100)
    go(tmp_path, {"tests": [stage("talks", "print('x' * 1000 + 'the end')")]})
    with tarfile.open(tmp_path / "out" / "results.tar.gz") as archive:
        assert archive.extractfile("talks.log").read().endswith(b"xthe end\n")
        assert archive.getmember("talks.log").size == 100


# --------------------------------------------------------------------------------------------------------------- tests

SUITE = """
    import os, time, pytest
    def test_good(): pass
    def test_bad(): assert os.environ.get("REPAIRED")
    @pytest.mark.skip
    def test_skipped(): pass
    def test_hangs(): time.sleep(float(os.environ.get("HANGS", 0)))
    @pytest.mark.parametrize("i", range(3))
    def test_of_several(i): pass
"""


def suite(tmp_path, environment, done=False):
    """The stage "tests" on a small suite, in two processes."""
    live = tmp_path / "live"
    live.mkdir(exist_ok=True)
    (tmp_path / "test_suite.py").write_text(textwrap.dedent(SUITE))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    command = [sys.executable, "-m", "pytest", str(tmp_path), "-q", "-p", "xdist.plugin", "-p", "outcomes",
               "--dist", "load", "-n", "2", "--rootdir", str(tmp_path), "-c", str(tmp_path / "pytest.ini")]
    folders = os.pathsep.join([*(str(ROOT / "tests" / part) for part in ("gpu", "bench")),
                               os.environ.get("PYTHONPATH", "")])
    settings = {"SUBSPACE_OUTCOMES": str(live / "tests.jsonl"), "PYTHONPATH": folders,
                "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"} | environment
    if done:
        settings["SUBSPACE_DONE"] = str(live / "done.txt")
        quick.leave_out(live)
    judge = functools.partial(quick.judge_tests, "tests")
    return quick.Stage("tests", lambda seconds: command, judge, environment=settings)


def test_outcomes_come_as_they_are_and_only_failures_run_again(tmp_path):
    code, state, summary = go(tmp_path, {"tests": [suite(tmp_path, {})]}, seconds=60)
    assert code == 1 and state["tests"][:2] == ["failed", "5 passed, 1 failed, 1 skipped, 0 not reached"]
    assert "## Tests that failed: 1\n\n* test_suite.py::test_bad" in summary
    code, state, _ = go(tmp_path, {"tests": [suite(tmp_path, {"REPAIRED": "1"}, done=True)]}, 60, state)
    assert code == 0 and state["tests"][:2] == ["passed", "6 passed, 0 failed, 1 skipped, 0 not reached"]
    assert "1 passed, 1 skipped" in (tmp_path / "live" / "tests.log").read_text()
    code, state, _ = go(tmp_path, {"tests": [stage("tests", "raise SystemExit(3)")]}, 60, state)
    assert code == 0, "what has passed is left out"


def test_tests_that_were_not_reached_are_named(tmp_path):
    path = tmp_path / "tests.jsonl"
    writer = outcomes.Writer(path)
    writer.collect(["a", "b", "c[1]@group"])
    outcomes.write(path, {"test": "a", "outcome": "passed"})
    path.rename(tmp_path / "begun")
    copy = f"import shutil, time; shutil.copy({str(tmp_path / 'begun')!r}, {str(tmp_path / 'live/tests.jsonl')!r})"
    slow = stage("tests", f"{copy}; time.sleep(60)", functools.partial(quick.judge_tests, "tests"), most=2)
    code, state, summary = go(tmp_path, {"tests": [slow]})
    assert code == 2 and state["tests"][:2] == ["stopped", "1 passed, 0 failed, 0 skipped, 2 not reached"]
    assert "## Tests not reached: 2\n\n* b\n* c[1]" in summary


def test_a_process_whose_gpu_is_broken_or_hangs_is_replaced(tmp_path):
    """A stand-in for gpu_timing says that it is broken once a test has failed."""
    (tmp_path / "gpu_timing.py").write_text("def broken(): return True\n")
    broken = suite(tmp_path, {"HANGS": "300", "SUBSPACE_LIMIT": "4"})
    broken.environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), broken.environment["PYTHONPATH"]])
    code, state, _ = go(tmp_path, {"tests": [broken]}, seconds=60)
    assert code == 1 and state["tests"][1] == "4 passed, 2 failed, 1 skipped, 0 not reached"
    told = [json.loads(line) for line in (tmp_path / "live" / "tests.jsonl").read_text().splitlines() if "why" in line]
    assert {row["test"].split("::")[1]: row["why"] for row in told} == {
        "test_bad": "the GPU does nothing more for this process", "test_hangs": "took more than 4 s"}


def test_half_a_line_is_no_outcome(tmp_path):
    path = tmp_path / "tests.jsonl"
    path.write_text('{"tests": ["a", "b"]}\n{"test": "a", "outcome": "passed"}\n{"test": "b", "outc')
    assert outcomes.read(path) == (["a", "b"], {"a": "passed"})
    outcomes.Writer(path)
    outcomes.write(path, {"test": "b", "outcome": "failed"})
    assert outcomes.read(path)[1] == {"a": "passed", "b": "failed"}


# ---------------------------------------------------------------------------------------------------------- benchmarks


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU for bench.py whose every case takes a moment: a list of the cases that were measured."""
    measured = []
    here = {"device": "NVIDIA H100 80GB HBM3", "commit": "abc", "torch": "2.11.0", "date": "2026-11-28 00:00 UTC",
            "multiprocessors": 132, "memory_gib": 79.0, "l2_mib": 50.0, "cuda": "13.0", "driver version": "580.1"}

    def cases(op, device):
        return [types.SimpleNamespace(name=f"{op} {i}", contenders=[types.SimpleNamespace(name="ours")])
                for i in range(2 if op != "depthwise" else 1)]

    def run_on_gpu(case, scale, top):
        measured.append(case.name)
        return [{"case": case.name, "contender": name, "p20_ms": 1.0, "p50_ms": 1.0, "p80_ms": 2.0, "of_bound": 0.5}
                for name in ("ours", "eager")]

    monkeypatch.setattr(bench, "cases", cases)
    monkeypatch.setattr(bench, "draw", lambda *_: None)
    monkeypatch.setattr(bench.harness, "environment", lambda *_: dict(here))
    monkeypatch.setattr(bench.harness, "run_on_gpu", run_on_gpu)
    monkeypatch.setattr(bench.gpu_timing, "ceilings", lambda: {"copy": 3e12, "float32": 5e13})
    monkeypatch.setattr(bench.gpu_timing, "broken", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return types.SimpleNamespace(measured=measured, here=here, folder=tmp_path / "live" / "bench")


def bench_main(monkeypatch, folder, *words):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--device", "cuda", "--results", str(folder), *words])
    bench.main()


def test_headlines_come_first(monkeypatch, gpu):
    bench_main(monkeypatch, gpu.folder)
    assert gpu.measured[:5] == ["rsgd 0", "logits 0", "cross_entropy 0", "sinkhorn 0", "coding_rate 0"]
    assert gpu.measured[len(bench.OPS):][:2] == ["rsgd 1", "logits 1"]
    rows = 2 * len(bench.OPS) - 1
    words = f"{rows} of {rows} rows, 0 of them without our time"
    assert quick.judge_bench(0, gpu.folder.parent, "") == ("passed", words)


def test_rows_not_reached_are_named_and_measured_again(monkeypatch, gpu, capsys, tmp_path):
    bench_main(monkeypatch, gpu.folder, "--seconds", "-1")
    assert not gpu.measured and "rsgd, rsgd 0: not reached" in capsys.readouterr().out
    bench_main(monkeypatch, gpu.folder, "--op", "rsgd")
    (gpu.folder / "plan.json").write_text(json.dumps([["rsgd", "rsgd 0"], ["rsgd", "rsgd 1"], ["logits", "logits 0"]]))
    assert quick.judge_bench(None, gpu.folder.parent, "")[0] == "stopped"
    assert "## Rows not reached: 1\n\n* logits, logits 0" in quick.summary({}, gpu.folder.parent, 1)[0]
    gpu.measured.clear()
    bench_main(monkeypatch, gpu.folder, "--missing", "--op", "rsgd", "--op", "logits")
    assert gpu.measured == ["logits 0", "logits 1"]


def test_a_row_without_our_time_is_a_failure_and_measured_again(monkeypatch, gpu):
    bench_main(monkeypatch, gpu.folder, "--op", "rsgd")
    path = gpu.folder / "rsgd_cuda.json"
    found = json.loads(path.read_text())
    found["rows"][0] = {"case": "rsgd 0", "contender": "ours", "missing": "wrong: off by 1e-2 of the reference"}
    path.write_text(json.dumps(found))
    assert quick.judge_bench(0, gpu.folder.parent, "")[0] == "failed"
    assert "* rsgd, rsgd 0: ours: wrong: off by" in quick.summary({}, gpu.folder.parent, 1)[0]
    gpu.measured.clear()
    bench_main(monkeypatch, gpu.folder, "--missing", "--op", "rsgd")
    assert gpu.measured == ["rsgd 0"] and quick.judge_bench(0, gpu.folder.parent, "")[0] == "passed"


def test_rows_of_another_card_are_not_mixed_in(monkeypatch, gpu):
    bench_main(monkeypatch, gpu.folder, "--op", "rsgd")
    gpu.here["device"] = "NVIDIA H200"
    gpu.measured.clear()
    bench_main(monkeypatch, gpu.folder, "--op", "rsgd", "--missing")
    assert gpu.measured == ["rsgd 0", "rsgd 1"]


def test_a_case_that_breaks_the_gpu_is_a_row_and_a_new_process_goes_on(monkeypatch, gpu):
    def fault(case, scale, top):
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")

    started = []
    monkeypatch.setattr(bench.harness, "run_on_gpu", fault)
    monkeypatch.setattr(bench.gpu_timing, "broken", lambda: True)
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words) or sys.exit())
    with pytest.raises(SystemExit):
        bench_main(monkeypatch, gpu.folder)
    assert started[0][-5:-1] == ["--missing", "--after", "1", "--seconds"]
    assert "illegal memory access" in json.loads((gpu.folder / "rsgd_cuda.json").read_text())["rows"][0]["missing"]


def test_a_case_that_hangs_is_a_row_and_a_new_process_goes_on(monkeypatch, gpu):
    started = threading.Event()
    monkeypatch.setattr(bench, "HANGS", 0.2)
    monkeypatch.setattr(bench.harness, "run_on_gpu", lambda *_: started.wait(20) and sys.exit())
    monkeypatch.setattr(os, "execv", lambda *_: started.set())
    with pytest.raises(SystemExit):
        bench_main(monkeypatch, gpu.folder)
    row = json.loads((gpu.folder / "rsgd_cuda.json").read_text())["rows"][0]
    assert row["missing"] == "took more than 0.2 s" and row["contender"] == "ours"


@pytest.mark.parametrize("card", ["NVIDIA H100 80GB HBM3", "NVIDIA H200"])
def test_the_table_names_the_card(monkeypatch, gpu, card):
    gpu.here["device"] = card
    bench_main(monkeypatch, gpu.folder, "--op", "rsgd")
    text = gpu_table.write(gpu.folder)
    assert f"rsgd: {card} (132 multiprocessors, 79 GiB" in text and "No GPU has run this" not in text


def test_without_a_gpu_the_benchmarks_say_so(tmp_path):
    text = "there is no GPU: nothing was measured\n\n0 s\n"
    assert quick.judge_bench(0, tmp_path, text)[0] == "skipped"


# ------------------------------------------------------------------------------------------------- the rest of the plan


def test_every_stage_has_a_command(tmp_path):
    plan = quick.phases(tmp_path, False, 16)
    assert list(plan) == ["build", "tests", "rows"]
    for stages in plan.values():
        for one in stages:
            assert all(isinstance(word, str) for word in one.command(100.0))


@pytest.mark.parametrize("text, result", [
    ("memcheck\n   1 s  logits\nmemcheck: passed: nothing found\n\nmemcheck: passed: nothing found\n",
     ("passed", "nothing found")),
    ("racecheck: failed: 2 reports\n", ("failed", "2 reports")),
    ("synccheck: stopped: nothing found in 9 s, not done: rsgd qr float32\n",
     ("stopped", "nothing found in 9 s, not done: rsgd qr float32")),
    ("skipped: there is no GPU\n", ("skipped", "there is no GPU")),
    ("Traceback\nModuleNotFoundError: x\n", ("failed", "ModuleNotFoundError: x")),
])
def test_a_sanitizers_last_line_is_its_verdict(tmp_path, text, result):
    assert quick.judge_tool(0, tmp_path, text) == result


def test_results_of_another_machine_are_gone_on_with(tmp_path):
    go(tmp_path, {"tests": [stage("one", "print('fine')"), stage("two", "raise SystemExit(1)")]})
    before = quick.earlier(str(tmp_path / "out" / "results.tar.gz"), tmp_path / "nowhere", tmp_path / "there")
    assert before["one"][0] == "passed" and before["two"][0] == "failed" and (tmp_path / "there" / "two.log").exists()
    with pytest.raises(SystemExit, match="nothing to go on with"):
        quick.earlier("last", tmp_path / "nowhere", tmp_path / "empty")
    assert quick.earlier(None, tmp_path / "nowhere", tmp_path / "there") == {}
    assert not list((tmp_path / "there").iterdir())


def test_a_build_counts_for_its_sources_and_its_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(quick, "STAMP", tmp_path / "stamp")
    monkeypatch.setenv("CUDAARCHS", "90")
    assert quick.judge_build(0, tmp_path, "built\n") == ("passed", "for sm_90")
    assert quick.STAMP.read_text() == quick.wanted_stamp()
    monkeypatch.setenv("CUDAARCHS", "86")
    assert quick.STAMP.read_text() != quick.wanted_stamp()


def test_the_commit_of_a_copy_without_history_is_the_bundles(monkeypatch, tmp_path):
    monkeypatch.setattr(bundle, "git", lambda *_: None)
    monkeypatch.setattr(bundle, "COMMIT", tmp_path / "commit")
    for digest, commit in ((bundle.sources(), "abc1234"), ("other", "abc1234 with changes")):
        monkeypatch.delenv("SUBSPACE_COMMIT", raising=False)
        bundle.COMMIT.write_text(f"abc1234 {digest}")
        bundle.name_commit()
        assert os.environ.pop("SUBSPACE_COMMIT") == commit
