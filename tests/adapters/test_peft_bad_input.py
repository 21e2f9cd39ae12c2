"""Wrong arguments of peft's method: an error that says whose, which and what, and nothing is changed."""

import functools
import math
from pathlib import Path

import bad_input
import bad_values as bad
import pytest
from bad_calls import INF, SHARE, adapted, folder, plain
from bad_input import Call, call, faults, method
from helpers import optional

peft = optional("peft")
from torch_subspace.peft import SpectralConfig, TuckerConfig, export_lora, import_lora  # noqa: E402

CALLS: dict[str, Call] = {}
add = functools.partial(bad_input.add, CALLS)


@functools.cache
def checkpoint():
    path = Path(folder().name) / "lora"
    peft.get_peft_model(plain(), peft.LoraConfig(r=2, target_modules=["0"])).save_pretrained(path)
    return path


add("TuckerConfig", call(
    TuckerConfig, r=2, kernel_rank=2, alpha=1.0, scaling="lora", dropout=0.1, init="lecun", target_modules=["0"],
    exclude_modules=["1"], layers_to_transform=[0], layers_pattern=["layers"], rank_pattern={"0": 2},
    alpha_pattern={"0": 1.0}, modules_to_save=["2"], bias="none", train="core"),
    ("TuckerConfig: rank",), r=bad.ranks, kernel_rank=bad.ranks, alpha=bad.optional(bad.number(INF)),
    scaling=bad.optional(bad.word), dropout=SHARE, init=bad.word, train=bad.word, bias=bad.word,
    layers_to_transform=bad.optional(bad.those(strings=["a"], floats=[0.5], fraction=0.5, negative=[-1])),
    rank_pattern=bad.by_pattern(2.5, None, 0, "2"), alpha_pattern=bad.by_pattern("2", math.nan, True),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"), bad.patterns),
    fine="layers_to_transform: a number, a dict; rank_pattern: None; alpha_pattern: None")
add("SpectralConfig", call(
    SpectralConfig, r=2, target_modules=["0"], exclude_modules=["1"], layers_to_transform=[0],
    layers_pattern=["layers"], rank_pattern={"0": 0.5}, modules_to_save=["2"], bias="none"),
    r=bad.whole(0, -1, 1.0, -0.5), bias=bad.word, rank_pattern=bad.by_pattern(2.5, None, 0, "2"),
    layers_to_transform=bad.optional(bad.those(strings=["a"], floats=[0.5], fraction=0.5, negative=[-1])),
    **dict.fromkeys(("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"), bad.patterns),
    fine="layers_to_transform: a number, a dict; rank_pattern: None")
add("import_lora", call(import_lora, model=lambda: plain(), source=lambda: checkpoint(), name="new", standalone=True),
    ("load_adapter",), model=bad.module, name=bad.name, standalone=bad.flag, source=bad.those(
        list=[1], folder=str(Path(__file__).parent), empty="", one=({},), nones=(None, None), lists=([1], [2]),
        half=(None, {"peft_type": "LORA"})))
add("export_lora", call(export_lora, model=lambda: adapted(), path=lambda: Path(folder().name) / "out", name="default"),
    ("no adapter",), model=bad.module, name=bad.name, path=lambda good: {
        key: value for key, value in bad.path(good).items() if key not in ("a folder", "in no folder")})


def model():
    made = peft.get_peft_model(plain(), TuckerConfig(r=2, target_modules=["0"]))
    made.add_adapter("other", TuckerConfig(r=2, target_modules=["0"]))
    return made.base_model


def layer():
    return model().model[0]


UNKNOWN = bad.those(**{"unknown": "nowhere"})
NUMBERS = {"strings": ["a", "b"], "nan": [math.nan, 1.0], "Nones": [None, None], "bools": [True, False],
           "lists": [[1.0], [1.0]], "one less": [1.0], "one more": [1.0] * 3}
add("TuckerModel.add_weighted_adapter", method(
    model, "add_weighted_adapter", adapters=["default", "other"], weights=[1.0, 1.0], adapter_name="new",
    combination_type="ties_svd", svd_rank=2, svd_clamp=0.9, svd_full_matrices=True, svd_driver=None, density=0.5,
    majority_sign_method="total"), ("Adapter",),
    adapters=bad.those(unknown=["default", "nowhere"], numbers=[1, 2], Nones=[None, None], empty=[]),
    weights=bad.those(**NUMBERS), adapter_name=bad.name, combination_type=bad.word,
    svd_rank=bad.optional(bad.whole(0, -1)), svd_clamp=bad.optional(bad.number(-1, 1.5)),
    density=bad.number(-0.1, 1.5, INF), majority_sign_method=bad.word)
add("TuckerModel.delete_adapter", method(model, "delete_adapter", adapter_name="other"), ("Adapter",),
    adapter_name=lambda good: {k: v for k, v in UNKNOWN(good).items() if not isinstance(v, str)})  # in peft's words
add("TuckerModel.merge_adapter", method(model, "merge_adapter", adapter_names=["default"], safe_merge=False), (
    "adapter_names",), adapter_names=bad.optional(bad.those(unknown=["nowhere"])), safe_merge=bad.flag)
add("TuckerLayer.get_delta_weight", method(layer, "get_delta_weight", adapter_name="default"), adapter_name=UNKNOWN)
for scaled in ("set_scale", "scale_layer", "unscale_layer"):
    more = {"adapter": "default"} if scaled == "set_scale" else {}
    add(f"TuckerLayer.{scaled}", method(layer, scaled, scale=2.0, **more), scale=bad.number(INF),
        fine="scale: None" if scaled == "unscale_layer" else "")


@pytest.mark.parametrize("key", CALLS)
def test_wrong_arguments_are_named(key):
    assert not faults(CALLS[key])
