"""Every public call with good arguments, and what kind of thing each argument is (bad_values.py)."""

import functools
import math
import tempfile
from pathlib import Path

import bad_frames
import bad_input as table
import bad_values as bad
import torch
from bad_input import Call, call, method
from bad_isotropy import CALLS as ISOTROPY
from bad_lowrank import CALLS as LOWRANK
from helpers import normal
from torch import nn

import torch_subspace as ts
from torch_subspace import distributed, grassmann, metrics
from torch_subspace.grassmann.head import PointwiseGrassmannLinear

INF = math.inf


CALLS: dict[str, Call] = ISOTROPY | LOWRANK
add = functools.partial(table.add, CALLS)


def x(*shape):
    return lambda: normal(*shape, seed=1, dtype=torch.float32)


def w():
    return torch.linalg.qr(normal(4, 2, 6).mT).Q.mT.float().contiguous()


def ragged():
    return w().flatten(0, 1)[1:4].contiguous()


FRAMES, RAGGED = lambda: w(), lambda: ragged()
GAMMA, POSITIVE = bad.number(INF, -INF), bad.number(0, -1, INF)
RATE, SHARE = bad.number(INF, -INF, -0.1), bad.number(-0.1, 1.0, INF)



def in_a_group(function):
    """Of one process, whose mesh stands for "a mesh"."""

    def run(**arguments):
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        try:
            mesh = torch.distributed.init_device_mesh("cpu", (1,))
            function(**{k: mesh if isinstance(v, str) and v == "a mesh" else v for k, v in arguments.items()})
        finally:
            torch.distributed.destroy_process_group()

    return run


# ------------------------------------------------------------------------------------------------------- frames
BATCHES = "x: dimensions more, a dimension less, no rows"
add("subspace_logits", call(ts.subspace_logits, x=x(3, 6), weight=FRAMES, gamma=2.0, normalize=True),
    x=bad.tensor, weight=bad.tensor, gamma=GAMMA, normalize=bad.flag, fine=f"{BATCHES}; weight: no rows")
add("subspace_logits ragged", call(ts.subspace_logits, x=x(3, 6), weight=RAGGED, dims=(2, 1)),
    weight=bad.tensor, dims=bad.dims)
ENTROPY = {"class_weight": bad.optional(bad.tensor), "ignore_index": bad.whole(2**70),
           "label_smoothing": bad.number(-0.1, 1.1, INF), "reduction": bad.word}
OPTIONS = {"class_weight": lambda: torch.ones(4), "ignore_index": -100, "label_smoothing": 0.1, "reduction": "mean"}
TARGET = torch.tensor([0, 1, 3])
add("subspace_cross_entropy", call(ts.subspace_cross_entropy, x=x(3, 6), weight=FRAMES, target=TARGET, gamma=2.0,
                                   normalize=True, **OPTIONS),
    x=bad.tensor, weight=bad.tensor, target=bad.labels, gamma=GAMMA, normalize=bad.flag, **ENTROPY,
    fine="class_weight: another float")
add("subspace_cross_entropy ragged", call(ts.subspace_cross_entropy, x=x(3, 6), weight=RAGGED, target=TARGET % 2,
                                          dims=(2, 1)), weight=bad.tensor, target=bad.labels, dims=bad.dims)
add("subspace_cross_entropy soft", call(ts.subspace_cross_entropy, x=x(3, 6), weight=FRAMES,
                                        target=lambda: torch.full((3, 4), 0.25)),
    target=bad.tensor, fine="target: another float")
RULE = {"lr": RATE, "momentum": RATE, "dampening": bad.number(INF), "weight_decay": RATE, "nesterov": bad.flag,
        "maximize": bad.flag, "retraction": bad.word, "transport": bad.word}
SGD = {"lr": 0.1, "momentum": 0.9, "dampening": 0.0, "weight_decay": 0.1, "nesterov": True, "maximize": False,
       "retraction": "geodesic", "transport": "project"}
add("grassmann_step_", call(ts.grassmann_step_, weight=FRAMES, grad=x(4, 2, 6),
                            momentum_buffer=lambda: torch.zeros(4, 2, 6), manifold="grassmann", **SGD),
    weight=bad.tensor, grad=bad.tensor, momentum_buffer=bad.tensor, manifold=bad.word, **RULE)
add("grassmann_step_ stiefel", call(ts.grassmann_step_, weight=lambda: w()[0], grad=x(2, 6), lr=0.1,
                                    manifold="stiefel"), weight=bad.tensor, grad=bad.tensor, lr=RATE)
add("grassmann_step_ ragged", call(ts.grassmann_step_, weight=RAGGED, grad=x(3, 6), lr=0.1, dims=(2, 1)),
    weight=bad.tensor, grad=bad.tensor, lr=RATE, dims=bad.dims, fine="lr: a tensor")  # one of each class
add("grassmann_step_ several", call(
    ts.grassmann_step_, weight=lambda: [w(), w()], grad=lambda: [w() + 1, w() + 1], lr=0.1, momentum=0.9,
    momentum_buffer=lambda: [w() * 0, w() * 0]),
    weight=lambda good: bad.tensors(good) | {"one twice": [good[0], good[0]]}, grad=bad.tensors, lr=RATE,
    momentum_buffer=lambda good: bad.tensors(good) | {"Nones": [None, None], "one twice": [good[0], good[0]]})
LAYOUT = bad.optional(bad.those(**{"a string": "Shard(0)"}))
STYLE = {"input_layouts": LAYOUT, "output_layouts": LAYOUT, "use_local_output": bad.flag,
         "sample_rate": bad.number(0, -0.1, 1.1, INF), "sparse_grad": bad.flag}
add("distributed.ClassParallel", call(distributed.ClassParallel, input_layouts=None, output_layouts=None,
                                      use_local_output=True, sample_rate=0.5, sparse_grad=False), **STYLE)
add("distributed.shard_head", call(
    in_a_group(distributed.shard_head), model=lambda: ts.GrassmannLinear(6, 4, 2), mesh="a mesh", input_layouts=None,
    output_layouts=None, use_local_output=True, sample_rate=0.5, sparse_grad=False), ("ClassParallel",),
    model=bad.module,
    mesh=lambda good: bad.NO_SEQUENCE, **STYLE)
add("distributed.plan", call(
    distributed.plan, num_classes=4, features=6, k=2, batch=8, ranks=2, dtype=torch.float32, optimizer="sgd",
    momentum=0.9, amsgrad=False, sample_rate=0.5, input_layouts=None, device="cpu", threads=1),
    **dict.fromkeys(("num_classes", "features", "batch", "ranks", "threads"), bad.whole(0, -1, 2**70)),
    k=bad.whole(0, -1, 7, 2**70), dtype=bad.dtype, optimizer=bad.word, momentum=bad.number(-0.1, INF), amsgrad=bad.flag,
    sample_rate=bad.number(0, -0.1, 1.1, INF), input_layouts=LAYOUT, device=bad.word)
add("distributed.plan ragged", call(distributed.plan, num_classes=3, features=6, k=(2, 1, 1), batch=8, ranks=2),
    k=bad.dims, fine="k: an int")
add("grassmann.average_frames", call(grassmann.average_frames, frames=lambda: [w(), w()], weights=[1.0, 2.0],
                                     of="bases"),
    frames=bad.tensors, of=bad.word,
    weights=lambda good: bad.NO_SEQUENCE | {
        "strings": ["a", "b"], "negative": [-1, 2], "zeros": [0, 0], "nan": [math.nan, 1.0], "three": [1, 2, 3],
        "rows": [[1, 2]], "complex": [1j, 1], "Nones": [None, None], "meta": torch.ones(2, device="meta"),
        "sparse": torch.ones(2).to_sparse()},
    fine="weights: None")
add("grassmann.average_frames ragged", call(grassmann.average_frames, frames=lambda: [ragged(), ragged()], dims=(2, 1)),
    dims=bad.dims)
add("grassmann.FrameAverage", call(grassmann.FrameAverage, decay=0.9, of="bases"), decay=bad.optional(SHARE),
    of=bad.word)
add("grassmann.FrameAverage's call", call(grassmann.FrameAverage(), averaged=x(2, 3), current=x(2, 3), num_averaged=1),
    ("FrameAverage",), num_averaged=bad.whole(-1), current=bad.tensor, averaged=bad.tensor,
    fine="current: another float, float8; averaged: another float")

add("grassmann.subspace_scores", call(grassmann.subspace_scores, x=x(5, 6), frames=FRAMES), x=bad.tensor,
    frames=bad.tensor, fine=f"{BATCHES}; frames: no rows")
add("grassmann.subspace_scores ragged", call(grassmann.subspace_scores, x=x(5, 6), frames=RAGGED, dims=(2, 1)),
    dims=bad.dims)
add("grassmann.subspace_denoise", call(grassmann.subspace_denoise, x=x(5, 6), frames=FRAMES, signal=1.0, noise=0.5),
    x=bad.tensor, frames=bad.tensor, signal=POSITIVE, noise=bad.number(-1, INF),
    fine=f"{BATCHES}; frames: no rows")
add("grassmann.subspace_denoise ragged", call(grassmann.subspace_denoise, x=x(5, 6), frames=RAGGED, dims=(2, 1)),
    dims=bad.dims)
add("grassmann.class_subspaces", call(grassmann.class_subspaces, x=x(5, 6), y=torch.tensor([0, 1, 1, 2, 0]),
                                      k=2, num_classes=3, generator=None),
    x=bad.tensor, y=bad.labels, k=bad.whole(0, -1, 7, 2**70), num_classes=bad.whole(0, -1, 2, 2**70),
    generator=bad.generator, fine="num_classes: None; x: another float")

bad_frames.add_calls(add, w)

add("grassmann.KSubspaces", call(
    lambda **parameters: grassmann.KSubspaces(**parameters).fit(normal(9, 6, seed=1)), n_clusters=3, dim=2, n_init=1,
    max_iter=5, tol=1e-3, random_state=0), ("KSubspaces",),
    n_clusters=bad.whole(0, -1, 10, 2**70), dim=bad.whole(0, -1, 7, 2**70),
    n_init=bad.whole(0, -1, 2**70), max_iter=bad.whole(0, -1, 2**70), tol=bad.number(-1, INF),
    random_state=bad.optional(bad.whole(-1, 2**32)))

add("set_float32_matmul_precision", call(ts.set_float32_matmul_precision, precision="highest"), precision=bad.word)

# ------------------------------------------------------------------------------------------------------- layers
HEAD = {"in_features": 6, "num_classes": 4, "subspace_dim": 2, "gamma": 2.0, "normalize": True}
SIZES = {"subspace_dim": bad.whole(0, -1, 9, 2**70), "gamma": POSITIVE, "normalize": bad.flag}


def head():
    return ts.GrassmannLinear(6, 4, 2)


add("GrassmannLinear", call(ts.GrassmannLinear, **HEAD, device="cpu", dtype=torch.float32),
    in_features=bad.whole(-1, 0, 2**70), num_classes=bad.whole(-1, 2**70), device=bad.device, dtype=bad.dtype, **SIZES)
add("GrassmannLinear ragged", call(ts.GrassmannLinear, in_features=6, num_classes=3, subspace_dim=(2, 1, 1)),
    subspace_dim=bad.dims, fine="subspace_dim: an int")
add("GrassmannLinear.forward", call(lambda x: head()(x), x=x(3, 6)), ("subspace_logits",), x=bad.tensor, fine=BATCHES)
add("GrassmannLinear.loss", method(head, "loss", x=x(3, 6), target=TARGET, **OPTIONS), ("subspace_cross_entropy",),
    x=bad.tensor, target=bad.labels, **ENTROPY, fine="class_weight: another float")
POINTWISE = ("PointwiseGrassmannLinear", "subspace_logits", "subspace_cross_entropy")
add("GrassmannLinear.forward of points", call(lambda x: PointwiseGrassmannLinear(6, 4, 2)(x), x=x(3, 6, 2)), POINTWISE,
    x=bad.tensor, fine="x: no columns, no rows")
add("GrassmannLinear.loss of points", method(lambda: PointwiseGrassmannLinear(6, 4, 2), "loss", x=x(3, 6, 2),
                                             target=torch.zeros(3, 2, dtype=torch.int64)), POINTWISE,
    x=bad.tensor, target=bad.labels)
add("GrassmannLinear.from_linear", call(ts.GrassmannLinear.from_linear, linear=lambda: nn.Linear(6, 4), subspace_dim=2,
                                        gamma=2.0, normalize=True, generator=None),
    ("GrassmannLinear",), linear=bad.module, generator=bad.generator, **SIZES)
add("GrassmannLinear.init_from_vectors", method(head, "init_from_vectors", vectors=x(4, 6), generator=None),
    vectors=bad.tensor, generator=bad.generator, fine="vectors: another float")
add("GrassmannLinear.init_from_features", method(head, "init_from_features", x=x(9, 6), y=torch.arange(9) % 4,
                                                 generator=None),
    x=bad.tensor, y=bad.labels, generator=bad.generator, fine="x: another float")
add("GrassmannLinear.load_gcr", method(head, "load_gcr", checkpoint=lambda: {"fc.weight": w().flatten(0, 1)}),
    ("GrassmannLinear",), checkpoint=bad.those(
        state={"state_dict": None}, none={"fc.weight": None}, list={"fc.weight": [1.0]}, ints={1: 2}, tensor=w(),
        many={"a.fc.weight": w(), "b.fc.weight": w()}, sparse={"fc.weight": w().flatten(0, 1).to_sparse()}))
add("GrassmannLinear.frame_error", method(head, "frame_error", dtype=torch.float64), dtype=bad.dtype)

# --------------------------------------------------------------------------------------------- models, optimisers


def model():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), ts.GrassmannLinear(8, 4, 2))


def plain():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))


add("param_groups", call(ts.param_groups, model=lambda: model(), lr=0.1, weight_decay=0.1, frame_lr_factor=1.0,
                         no_decay="*.bias"),
    model=bad.module, lr=bad.optional(RATE), weight_decay=bad.optional(RATE), frame_lr_factor=RATE,
    no_decay=bad.patterns, fine="no_decay: broken")
add("swap_head", call(ts.swap_head, model=lambda: plain(), num_classes=4, subspace_dim=2, gamma=2.0, normalize=True,
                      init="linear", name=None),
    ("GrassmannLinear", "init_from_features"), model=bad.module, num_classes=bad.optional(bad.whole(0, -1, 1, 2**70)),
    init=lambda good: bad.word(good) | {
        "one": (torch.ones(3, 8),), "Nones": (None, None), "lists": ([1.0], [1]), "three": (1, 2, 3),
        "words": ("linear", "linear"), "sparse": (torch.ones(3, 8).to_sparse(), torch.zeros(3, dtype=torch.int64))},
    name=bad.optional(bad.name), **SIZES)
STEPS = {"RiemannianSGD": {**RULE}, "RiemannianAdamW": {
    **{key: RULE[key] for key in ("lr", "weight_decay", "maximize", "retraction", "transport")},
    "betas": bad.betas, "eps": bad.number(-1.0, INF), "amsgrad": bad.flag, "capturable": bad.flag}}
GOOD = {"RiemannianSGD": SGD | {"weight_decay": 0.0, "nesterov": False}, "RiemannianAdamW": {
    **{key: SGD[key] for key in ("lr", "maximize", "retraction", "transport")}, "weight_decay": 0.0,
    "betas": (0.9, 0.99), "eps": 1e-8, "amsgrad": True, "capturable": False}}
TORCHS = ("Invalid ", "optimize", "Nesterov", "Tensor lr")  # torch's own words, which users know
PARAMS = bad.those(
    tensor=torch.ones(2), module=nn.Linear(2, 2), empty=[], numbers=[3], strings=["a"], nothing=[{"lr": 1.0}],
    nones=[{"params": None}], product=[nn.Parameter(torch.ones(2)) * 2],
    ints=[{"params": [torch.ones(4, 2, 6, dtype=torch.int64)], "manifold": "grassmann"}],
    matrix=[{"params": [torch.ones(2, 6)], "manifold": "grassmann"}])
for kind, rule in STEPS.items():
    cls = getattr(ts, kind)

    def made(cls=cls):
        return cls([nn.Parameter(torch.ones(2))], lr=0.1)

    def added(cls=cls, kind=kind, made=made):
        group = {"params": [nn.Parameter(ragged())], "manifold": "grassmann", "dims": (2, 1), **GOOD[kind]}
        return lambda **options: made().add_param_group(options), group

    extra = {"foreach": bad.optional(bad.flag), "differentiable": bad.flag, "fused": bad.optional(bad.flag)}
    add(kind, call(cls, params=lambda: list(model().parameters()), foreach=None, differentiable=False, fused=None,
                   **GOOD[kind]), TORCHS, params=PARAMS, **rule, **extra)
    group = {"params": [nn.Parameter(torch.ones(2))]}
    add(f"{kind}.add_param_group", method(made, "add_param_group", param_group=group), (kind,),
        param_group=bad.those(list=[1]))
    add(f"{kind}.add_param_group of frames", added, (kind,), dims=bad.dims, manifold=bad.word, **rule)
    add(f"{kind}.step", method(made, "step", closure=None), (kind,), closure=bad.function, fine="closure: None")

# ------------------------------------------------------------------------------------------------------- losses
LOSS = {"eps": POSITIVE, "reduction": bad.word, "process_group": bad.optional(bad.those())}
MEAN = {"eps": 0.5, "reduction": "mean", "process_group": None}
add("CodingRateLoss", call(ts.CodingRateLoss, **MEAN), **LOSS)
add("MCR2Loss", call(ts.MCR2Loss, **MEAN), **LOSS)
add("MLCLoss", call(ts.MLCLoss, eta=0.1, reg=0.05, mode="implicit", **MEAN), eta=POSITIVE, reg=bad.number(-1, INF),
    mode=bad.word, **LOSS)
WIDENED = "z: another float, dimensions more"
POINTS, PAIRS = x(5, 3), torch.arange(5) % 2
add("CodingRateLoss.forward", call(ts.CodingRateLoss(), z=POINTS), ("coding_rate",), z=bad.tensor,
    fine=f"{WIDENED}, meta")
add("MCR2Loss.forward", call(ts.MCR2Loss(), z=POINTS, membership=PAIRS), ("rate_reduction",), z=bad.tensor,
    membership=bad.labels, fine=f"{WIDENED}; membership: large")
add("MLCLoss.forward", call(ts.MLCLoss(eta=1.0), z=POINTS, c=POINTS), ("MLCLoss", "rate_reduction"), z=bad.tensor,
    c=bad.tensor, fine="z: another float; c: another float")
add("MLCLoss.membership", call(ts.MLCLoss(eta=1.0).membership, c=POINTS), ("MLCLoss",), c=bad.tensor,
    fine="c: another float, dimensions more, meta")
for rate, given in ((ts.coding_rate, bad.optional), (ts.rate_reduction, lambda kind: kind)):
    add(rate.__name__, call(rate, z=POINTS, membership=PAIRS, eps=0.5), z=bad.tensor, membership=given(bad.labels),
        eps=POSITIVE, fine=f"{WIDENED}; membership: large")
    add(f"{rate.__name__} soft", call(rate, z=POINTS, membership=lambda: torch.full((5, 2), 0.5)),
        membership=given(bad.tensor), fine="membership: another float, no columns")

# ---------------------------------------------------------------------------------------------------- transport
SQUARE = x(4, 4)
add("sinkhorn", call(ts.sinkhorn, scores=SQUARE, eta=1.0, tol=1e-3, max_iter=100, row=lambda: torch.ones(4),
                     col=lambda: torch.ones(4), symmetric=False, mode="implicit"),
    scores=bad.tensor, eta=POSITIVE, tol=bad.number(-1e-6), max_iter=bad.whole(-1, 2**70), mode=bad.word,
    row=bad.optional(bad.tensor), col=bad.optional(bad.tensor), symmetric=bad.optional(bad.flag),
    fine="scores: another float, dimensions more; row: another float; col: another float; max_iter: a float")

# ------------------------------------------------------------------------------------------------------- Tucker
add("tucker_compose", call(ts.tucker_compose, core=x(2, 3), factors=lambda: [x(5, 2)(), x(6, 3)()], scale=0.5,
                           base=x(5, 6)),
    core=bad.tensor, factors=bad.tensors, scale=GAMMA, base=bad.optional(bad.tensor),
    fine="core: another float; base: another float")
add("tucker_compose into", call(ts.tucker_compose, core=x(2, 3), factors=lambda: [x(5, 2)(), x(6, 3)()], out=x(5, 6)),
    out=bad.optional(bad.tensor), fine="out: another float")
add("tucker_linear", call(ts.tucker_linear, x=x(4, 6), weight=x(5, 6), bias=x(5), core=x(2, 3), u=x(5, 2), v=x(3, 6),
                          scale=0.5, dropout=0.1, training=True),
    x=bad.tensor, weight=bad.optional(bad.tensor), bias=bad.optional(bad.tensor), core=bad.tensor, u=bad.tensor,
    v=bad.tensor, scale=GAMMA, dropout=SHARE, training=bad.flag,
    fine=f"{BATCHES}; core: another float; u: another float; v: another float")
add("tucker_conv", call(
    ts.tucker_conv, x=x(2, 4, 5, 5), weight=x(6, 4, 3, 3), bias=x(6), core=x(2, 2, 3, 3),
    factors=lambda: [x(6, 2)(), x(4, 2)(), None, None], scale=0.5, stride=1, padding=1, dilation=1, groups=1,
    transposed=False, output_padding=0, form="auto", dropout=0.0, training=True),
    ("Calculated padded input size",), x=bad.tensor, weight=bad.tensor, bias=bad.optional(bad.tensor), core=bad.tensor,
    factors=bad.tensors, scale=GAMMA, stride=bad.geometry(0, -1), padding=bad.geometry(-1),
    dilation=bad.geometry(0, -1), groups=bad.whole(0, -1, 5), transposed=bad.flag, output_padding=bad.geometry(-1),
    form=bad.word, dropout=SHARE, training=bad.flag, fine="x: a dimension less, no rows; core: another float")

# ------------------------------------------------------------------------------------------------------- adapters
add("TuckerConfig", call(
    ts.TuckerConfig, rank=2, kernel_rank=2, alpha=1.0, target_modules="0", rank_pattern={"0": 2}, init="lecun",
    scaling="lora", dropout=0.1, save_modules="2", exclude_modules="1", alpha_pattern={"0": 1.0},
    target_parameters="0.weight", train="core"),
    rank=bad.ranks, kernel_rank=bad.ranks, alpha=bad.optional(bad.number(INF)), init=bad.word,
    scaling=bad.optional(bad.word), target_modules=bad.patterns, target_parameters=bad.patterns,
    save_modules=bad.patterns, exclude_modules=bad.patterns,
    rank_pattern=bad.by_pattern(2.5, None, 0, "2"), alpha_pattern=bad.by_pattern("2", math.nan, True),
    dropout=SHARE, train=bad.word)

add("SpectralConfig", call(
    ts.SpectralConfig, rank=2, target_modules="0", rank_pattern={"0": 0.5}, save_modules="2", exclude_modules="1",
    target_parameters="0.weight", save_vectors=True),
    rank=bad.whole(0, -1, 1.0, 0.0, -0.5), target_modules=bad.patterns, target_parameters=bad.patterns,
    save_modules=bad.patterns, exclude_modules=bad.patterns, rank_pattern=bad.by_pattern(2.5, None, 0, "2"),
    save_vectors=bad.flag)


def adapted():
    return ts.adapt(plain(), ts.TuckerConfig(rank=2, target_modules="0", save_modules="2"))


add("adapt", call(ts.adapt, model=lambda: plain(), config=ts.TuckerConfig(rank=2), name="new"),
    model=bad.module, name=bad.name, fine="config: None",
    config=lambda good: bad.NO_SEQUENCE | {"its class": ts.TuckerConfig, "as a dict": good.to_dict()})


def within_disabled(model):
    with ts.disabled(model):
        pass


for function in (ts.adapter_names, ts.active_adapters, ts.adapter_summary, ts.merge, ts.merge_and_unload, ts.disabled):
    none_is_fine = function in (ts.adapter_names, ts.active_adapters)
    add(function.__name__, call(within_disabled if function is ts.disabled else function, model=lambda: adapted()),
        model=lambda good: bad.module(good) | {"a plain one": plain()},
        fine="model: a plain one" if none_is_fine else "")
add("unmerge", call(ts.unmerge, model=lambda: ts.merge(adapted())),
    model=lambda good: bad.module(good) | {"not merged": adapted()})
add("set_adapter", call(ts.set_adapter, model=lambda: adapted(), which="default"), ("no adapter",),
    model=bad.module, which=lambda good: {k: v for k, v in bad.name(good).items() if k != "None"} | {
        "an int key": {3: 1.0}, **{f"holds {v!r}": {"default": v} for v in (math.nan, "1", None, [1], True)}})
add("delete_adapter", call(ts.delete_adapter, model=lambda: adapted(), name="default"), ("no adapter",),
    model=bad.module, name=bad.name)
add("adapter_parameters", call(ts.adapter_parameters, model=lambda: adapted(), lr=0.1, lr_multipliers={"0.core": 2.0}),
    model=bad.module, lr=bad.optional(RATE),
    lr_multipliers=bad.by_pattern("a", math.nan, -1, None), fine="lr_multipliers: None")


@functools.cache
def folder():
    kept = tempfile.TemporaryDirectory()
    ts.save_adapter(adapted(), Path(kept.name) / "a.safetensors")
    return kept


FILE = lambda: Path(folder().name) / "a.safetensors"  # noqa: E731
OSERROR = ("Is a directory", "Not a directory", "No such file", "no file", "no adapter")  # and which
add("save_adapter", call(ts.save_adapter, model=lambda: adapted(), path=FILE, name="default"), OSERROR,
    model=bad.module, path=bad.path, name=bad.name)
add("load_adapter", call(ts.load_adapter, model=lambda: plain(), path=FILE, name="default"), OSERROR,
    model=bad.module, path=bad.path, name=bad.name)

# ------------------------------------------------------------------------------------------------------- metrics
for metric in (metrics.match_clusters, metrics.clustering_accuracy, metrics.clustering_scores):
    add(f"metrics.{metric.__name__}", call(metric, labels_true=[0, 0, 1, 1], labels_pred=[3, 3, 2, 2]),
        labels_true=bad.classes, labels_pred=bad.classes)
AS_NUMBERS = "z: a list, an array, another float, int, bool, float8"
add("metrics.effective_rank", call(metrics.effective_rank, z=x(4, 3)), z=bad.tensor, fine=AS_NUMBERS)
add("metrics.principal_angles", call(metrics.principal_angles, z=x(4, 3), labels=[0, 0, 1, 1], dim=1), z=bad.tensor,
    labels=bad.classes, dim=bad.whole(0, -1, 5), fine=AS_NUMBERS)
