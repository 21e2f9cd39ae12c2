"""A pytest plugin for a machine that may be taken back at any time: `-p outcomes`, with tests/gpu and tests/bench on
PYTHONPATH.

SUBSPACE_OUTCOMES names a file to which every outcome is added as it comes, after the names of all tests; SUBSPACE_DONE
one of tests to leave out, a line each. A process of xdist whose GPU a fault has broken, or in which a test takes more
than SUBSPACE_LIMIT seconds, is replaced.
"""

import json
import os
import re
import threading
from pathlib import Path

import pytest


def plain(name):
    """A test's name without the group that xdist's loadgroup adds."""
    return re.sub(r"@[\w-]+$", "", name)


def read(path):
    """Names of the tests that there are, and {name: its last outcome}. What did not pass before the last collection is
    left out: it runs again."""
    names, outcomes = {}, {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
        except ValueError:  # half a line, where the writer was stopped
            continue
        if "tests" in row:
            outcomes = {name: outcome for name, outcome in outcomes.items() if outcome == "passed"}
            names = dict.fromkeys([*outcomes, *row["tests"]])
        else:
            outcomes[row["test"]] = row["outcome"]
    return list(names), outcomes


def write(path, row):
    """Add a line."""
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")


class Writer:
    """In the process that collects from all others."""

    def __init__(self, path):
        self.path, self.collected = path, False
        path.open("a").write("\n")  # after half a line of one that was stopped

    def pytest_collection_finish(self, session):
        self.collect([item.nodeid for item in getattr(session, "items", ())])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids):
        self.collect(ids)

    def collect(self, names):
        """Once: all processes collect the same."""
        if names and not self.collected:
            self.collected = True
            write(self.path, {"tests": [plain(name) for name in names]})

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            write(self.path, {"test": plain(report.nodeid), "outcome": report.outcome})


class Guard:
    """In each process of xdist: ends it where a test breaks the GPU, or hangs, so that those to come have a new one."""

    def __init__(self, path, seconds):
        self.path, self.seconds, self.failed, self.clock = path, seconds, False, None

    def pytest_runtest_logstart(self, nodeid):
        self.clock = threading.Timer(self.seconds, self.end, [nodeid, f"took more than {self.seconds:g} s"])
        self.clock.daemon = True
        self.clock.start()

    def end(self, nodeid, why):
        write(self.path, {"test": plain(nodeid), "outcome": "failed", "why": why})
        os._exit(1)

    def pytest_runtest_logreport(self, report):
        self.failed |= report.outcome == "failed"

    def pytest_runtest_logfinish(self, nodeid):
        self.clock.cancel()
        if self.failed:
            import gpu_timing

            if gpu_timing.broken():
                self.end(nodeid, "the GPU does nothing more for this process")
        self.failed = False


def pytest_configure(config):
    """One of the two for each process."""
    path = Path(os.environ["SUBSPACE_OUTCOMES"]).absolute()
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Guard(path, float(os.environ.get("SUBSPACE_LIMIT", "90"))))
    else:
        config.pluginmanager.register(Writer(path))


def pytest_collection_modifyitems(config, items):
    """Leave out what is done already."""
    if "SUBSPACE_DONE" in os.environ:
        done = set(Path(os.environ["SUBSPACE_DONE"]).read_text().splitlines())
        config.hook.pytest_deselected(items=[item for item in items if plain(item.nodeid) in done])
        items[:] = [item for item in items if plain(item.nodeid) not in done]
