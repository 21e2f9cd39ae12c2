"""What the tests' modules import stays: the garbage collector need not look through it, now or later.

And what a second release of torch is asked: --other-torch leaves out what that release cannot change.
"""

import gc
import numbers
import re

import pytest
import torch

# By what their names match; of all other tests that differ in numbers alone, --other-torch runs the first.
ONE_TORCH = {
    "there is no torch in it": r"/test_(build|gpu_quick|kernel_checks|bench_\w+)\.py|::test_(links_lead|name_has)",
    "machine code": r"test_abi\.py::test_(no_register|the_instr)",
    "what is learnt from data": r"_(example|examples|sets)\.py|(?<!its_)(?<!loses_)digits|test_features_become_linear",
    "numbers of our kernels, not of torch's own": r"^(?!.*test_(entropy|koopman|distillation|orthogonality)).*"
                                                  r"(_matches_the_reference|test_memory_is_a_tenth|test_ten_thousand)",
    "scikit-learn's manners": r"::test_scikit_learns_own_checks",
    "models that test_adapt_train_save_load_merge has": r"::test_each_layer_is_seen",
    "needs a GPU": r"tests/gpu/",
}


def pytest_addoption(parser):
    parser.addoption("--other-torch", action="store_true", help="only what a release of torch can change")


def is_number(value):
    """A size or a dtype: no switch, which may choose another way through torch, nor a name, a model, a function."""
    return isinstance(value, (numbers.Number, torch.dtype)) and not isinstance(value, bool)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--other-torch"):
        return
    left_out, seen, chosen = re.compile("|".join(ONE_TORCH.values())), set(), {True: [], False: []}
    for item in items:
        call = getattr(item, "callspec", None)
        named = [name for name, value in call.params.items() if not is_number(value)] if call else []
        key = item.nodeid.partition("[")[0], *((name, call.indices[name]) for name in named)
        runs = key not in seen and not left_out.search(item.nodeid)
        chosen[runs].append(item)
        seen |= {key} if runs else set()
    config.hook.pytest_deselected(items=chosen[False])
    items[:] = chosen[True]


@pytest.hookimpl(hookwrapper=True)
def pytest_collection():
    gc.disable()
    yield
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.unfreeze()  # for those that count at the end what was never freed
