"""Without a GPU, one line says why nothing here runs."""

from cases import DEVICE, PRESENT


def pytest_report_header():
    return [] if PRESENT else [f"no {DEVICE} device: the tests that need one are skipped"]


def pytest_terminal_summary(terminalreporter):
    if not PRESENT:
        terminalreporter.write_line(f"no {DEVICE} device was found: nothing was tested on one")
