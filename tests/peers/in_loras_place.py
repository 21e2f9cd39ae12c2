"""A pytest plugin: in peft's own tests LoraConfig is our TuckerConfig; LoRA's words are translated, tests of other
methods left out, and failures counted by reason."""
from __future__ import annotations

import collections
import functools
import importlib.machinery
import importlib.util
import inspect
import re
import sys
import types
from pathlib import Path

import pytest


class _Absent(types.ModuleType):
    """What stands for a package that a test file imports and few of its tests use."""

    __version__ = "0"

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)

        def skip(*_, **__):
            pytest.skip(f"needs {self.__name__}")

        return type(name, (), {"__init__": skip, "from_pretrained": skip})


class _Parameterized:
    """The package `parameterized` on pytest's own means."""

    @staticmethod
    def expand(cases):
        def decorate(test):
            names = list(inspect.signature(test).parameters)[1:]
            return pytest.mark.parametrize(names, [case if len(names) > 1 else case[0] for case in cases])(test)

        return decorate


for _name in ("diffusers", "datasets", "parameterized"):
    if importlib.util.find_spec(_name) is None:
        sys.modules[_name] = _Absent(_name)
        sys.modules[_name].__spec__ = importlib.machinery.ModuleSpec(_name, None)
        sys.modules[_name].parameterized = _Parameterized

import peft  # noqa: E402
import torch  # noqa: E402

from torch_subspace.peft import TuckerConfig, TuckerLayer, TuckerModel  # noqa: E402

LORA, LORA_LAYER = peft.LoraConfig, peft.tuners.lora.LoraLayer
PLACES = {LORA: TuckerConfig, peft.LoraModel: TuckerModel, LORA_LAYER: TuckerLayer}
PASSED_BY = {"fan_in_fan_out", "megatron_config", "megatron_core", "use_qalora", "qalora_group_size"}
DEFAULTS = {f.name: f.default for f in LORA.__dataclass_fields__.values()}

# (what the failure says, or the test's name, why it isn't ours), the first that matches
NOT_OURS = (
    (r"\blora_(A|B|embedding_A|embedding_B|magnitude_vector)\b|'lora_|lora_alpha|init_lora_weights|\.use_dora"
     r"|has no attribute '(r|_register_custom_module|_restore_weights|use_dora)'|test_repr_lora|assert 'lora' in"
     r"|'LoraModel'|'lora\.|'LORA'|test_nb_params|test_model_with_injected_layers"
     r"|`LoraLayer`s|ParamWrapper|param_wrapper|tuners\.lora\.|test_nested_config_survives",
     "LoRA's own names and numbers"),
    (r"\bmatches (nothing|none of)", "names that match nothing: errors here, warnings in LoRA"),
    (r"test_save_pretrained_auto|test_module_matching_lora|\b768\.", "about the model of that name on the hub"),
    (r"adapter_names|test_mixed_adapter_batches", "adapters mixed in a batch, which the guide excludes"),
    (r"test_(parameters_after_loading_model|disable_adapters)[^\n]*(\n.*)*\bnan, +nan",
     "diverges at a learning rate of 0.5, set for LoRA"),
    (r"PeftMixedModel|test_mixed\.py", "PeftMixedModel takes methods of peft's own"),
    (r"offline mode|LocalEntryNotFound|hf\.co|huggingface\.co", "needs the hub"),
)


def _as_ours(init):
    """TuckerConfig's __init__ that understands LoRA's arguments too. What only LoRA has is noted, and skips the test
    that uses it."""

    @functools.wraps(init)
    def translated(self, *args, **kwargs):
        words, own = set(kwargs) - set(TuckerConfig.__dataclass_fields__), []
        if "scaling" not in kwargs:  # it is not a copy of one of ours
            scaling = "rslora" if kwargs.pop("use_rslora", False) else "lora"
            kwargs = {"r": 8, "alpha": kwargs.pop("lora_alpha", 8), "scaling": scaling} | kwargs
        if "lora_dropout" in kwargs:
            kwargs["dropout"] = kwargs.pop("lora_dropout")
        if kwargs.get("bias") == "lora_only":
            kwargs["bias"] = "tucker_only"
        start = kwargs.pop("init_lora_weights", True)
        if start not in (True, False):
            own.append(f"init_lora_weights={start!r}")
        for word in words & set(kwargs):
            value = kwargs.pop(word)
            if word not in DEFAULTS:
                raise TypeError(f"LoraConfig.__init__() got an unexpected keyword argument {word!r}")
            if value and value != DEFAULTS[word] and word not in PASSED_BY:
                own.append(word)
        self.__dict__["of_lora_alone"], self.__dict__["stirred"] = own, start is False
        if own and _running:
            _skip(self)
        init(self, *args, **kwargs)

    return translated


def _skip(config):
    if getattr(config, "of_lora_alone", None):
        pytest.skip("LoRA's own option: " + ", ".join(sorted(config.of_lora_alone)))


def _stirred(inject_adapter):
    """Where LoRA is asked for a start other than zero, cores other than zero."""

    def inject(self, model, adapter_name, *args, **kwargs):
        config = self.peft_config[adapter_name]
        _skip(config)
        inject_adapter(self, model, adapter_name, *args, **kwargs)
        layers = [m for m in model.modules() if isinstance(m, TuckerLayer) and adapter_name in m.tucker_parts]
        for layer in layers if getattr(config, "stirred", False) else ():
            for name, p in layer.tucker_parts[adapter_name].named_parameters():
                if name.endswith("core"):
                    torch.nn.init.normal_(p)

    return inject


_running = []
TuckerConfig.__init__ = _as_ours(TuckerConfig.__init__)
TuckerModel.inject_adapter = _stirred(TuckerModel.inject_adapter)
peft.LoraConfig, peft.LoraModel = TuckerConfig, TuckerModel


class _Everything:
    """The names of models that have been fetched once, for peft's tests: all of them."""

    def __contains__(self, name):
        return True

    def __getitem__(self, name):
        return 1

    def __setitem__(self, name, count):
        pass

    get = __getitem__


def _flat(value):
    if isinstance(value, dict):
        value = list(value.values())
    return [v for inner in value for v in _flat(inner)] if isinstance(value, (list, tuple, set)) else [value]


def _source(item) -> str:
    """Of the test, its fixtures and the methods that it calls."""
    made = [f.func for defs in item._fixtureinfo.name2fixturedefs.values() for f in defs]
    made = [f for f in made if f.__module__ == item.function.__module__]
    text = "".join(map(inspect.getsource, [item.function, *made]))
    called = [getattr(item.cls, n, None) for n in set(re.findall(r"self\.(\w+)\(", text))]
    return text + "".join(inspect.getsource(f) for f in called if inspect.isfunction(f))


def _is_ours(item) -> bool:
    values = _flat(getattr(item, "callspec", None).params) if hasattr(item, "callspec") else []
    kinds = [v if isinstance(v, type) else type(v) for v in values]
    kinds = [k for k in kinds if issubclass(k, peft.PeftConfig)]
    return TuckerConfig in kinds if kinds else bool(re.search(r"\bLoraConfig\b", _source(item)))


def pytest_collection_modifyitems(config, items):
    tools = sys.modules.get("tests.testing_utils")
    if tools is not None:
        tools._HUB_MODEL_ACCESSES = _Everything()
    for module in {item.module for item in items}:
        for name, value in list(vars(module).items()):
            if isinstance(value, type) and value in PLACES:
                setattr(module, name, PLACES[value])
    ours = [_is_ours(item) for item in items]
    config.hook.pytest_deselected(items=[item for item, our in zip(items, ours) if not our])
    items[:] = [item for item, our in zip(items, ours) if our]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    _running.append(item)
    try:
        return (yield)
    finally:
        _running.pop()


# ---------------------------------------------------------------------------------------------------------------------
# The counts
# ---------------------------------------------------------------------------------------------------------------------

_counts = collections.defaultdict(collections.Counter)
_reasons = collections.defaultdict(list)


def pytest_runtest_logreport(report):
    file = Path(report.nodeid.split("::")[0]).name
    text = str(report.longrepr or "")
    if report.failed:
        last = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")] or text.splitlines()[-1:]
        said = "\n".join([report.nodeid, *last])
        why = next((why for pattern, why in NOT_OURS if re.search(pattern, said)), None)
        _counts[file]["not ours" if why else "failed"] += 1
        _reasons[why and f"not ours: {why}" or re.sub(r"0x\w+|\d+", "#", last[0])[:110]].append(report.nodeid)
    elif report.skipped and not hasattr(report, "wasxfail"):
        why = report.longrepr[2] if isinstance(report.longrepr, tuple) else text
        own = "LoRA's own option" in why
        _counts[file]["not ours" if own else "skipped by peft"] += 1
        if own:
            _reasons["not ours: " + why.removeprefix("Skipped: ")].append(report.nodeid)
    elif report.when == "call":
        _counts[file]["passed"] += 1


def pytest_terminal_summary(terminalreporter):
    names, write = ("passed", "failed", "not ours", "skipped by peft"), terminalreporter.write_line
    terminalreporter.section("peft's own tests, our config in LoRA's place")
    for why, tests in sorted(_reasons.items(), key=lambda item: (item[0].startswith("not ours"), -len(item[1]))):
        write(f"{len(tests):5}  {why}")
        for test in [] if why.startswith("not ours") else tests[:3]:
            write(f"       {test.split('/')[-1]}")
    write(f"\n{'file':36}" + "".join(f"{n:>16}" for n in names))
    rows = sorted(_counts.items()) + [("all", sum(_counts.values(), collections.Counter()))]
    for file, count in rows:
        write(f"{file:36}" + "".join(f"{count[n]:>16}" for n in names))
