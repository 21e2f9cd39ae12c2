"""What the tests' modules import stays: the garbage collector need not look through it, now or later."""

import gc

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # for those that count at the end what was never freed
