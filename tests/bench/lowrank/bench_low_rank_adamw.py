"""LowRankAdamW's step: ours by each projector, GaLore's, APOLLO's and Fira's own code, torch's AdamW.

In steps that find directions anew, and in those between. The floor is the products with the gradient that such a step
has, and nothing else: of directions found four, of kept ones two. Saved is the state.
"""

import functools
import importlib
import warnings

import torch
import work
from harness import Case, Contender, Target, relative
from torch import nn

from torch_subspace.lowrank import LowRankAdamW
from torch_subspace.lowrank.product import add_product_, product

FLOOR, OURS, FIXED = "floor: matrix products alone", "ours", "ours: Hadamard's basis"
ADAMW = "torch AdamW(fused=True), all dimensions"
RANK, LR, DECAY, GAP = 128, 1e-6, 0.01, 1 << 30
MINILM = [(30522, 384), (512, 384), *[*[(384, 384)] * 4, (1536, 384), (384, 1536)] * 6, *[(384,)] * 62]


def parameters(shapes, device):
    """Weights, with gradients whose columns become shorter."""
    seed, made = torch.Generator().manual_seed(0), []
    for shape in shapes:
        p = nn.Parameter(torch.randn(shape, generator=seed).to(device))
        p.grad = (torch.randn(shape, generator=seed) * torch.arange(1, shape[-1] + 1) ** -0.5).to(device)
        made.append(p)
    return made


def groups(shapes, device, **options):
    """Matrices with a projector's options, and what has none."""
    made = parameters(shapes, device)
    low, rest = [[p for p in made if (min(p.shape) > RANK and p.dim() == 2) == kind] for kind in (True, False)]
    return [{"params": low, **options}, *([{"params": rest}] if rest else [])]


def held(thing):
    """Bytes of the tensors in a state, and in objects there."""
    if isinstance(thing, torch.Tensor):
        return thing.nbytes
    if isinstance(thing, dict):
        return sum(held(v) for v in thing.values())
    if isinstance(thing, (list, tuple)):
        return sum(map(held, thing))
    return held(vars(thing)) if hasattr(thing, "__dict__") else 0


def contender(name, make, check=None, note=""):
    """An optimiser's step, after a first one."""

    @functools.lru_cache(maxsize=1)
    def build():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            optimizer = make()
            optimizer.step()
        return optimizer

    def saved():
        return sum(held(state) for state in build().state.values())

    def function():
        step = build().step
        build.cache_clear()
        return step

    return Contender(name, function, check, note=note, saved=saved)


def ours(shapes, device, name, **options):
    """The op's own step, held against the formula from the state that it leaves."""

    def make():
        return LowRankAdamW(groups(shapes, device), lr=LR, rank=RANK, weight_decay=DECAY, **options)

    def check():
        p = parameters(shapes[:1], device)[0]
        before, optimizer = p.detach().double(), LowRankAdamW([p], lr=1.0, rank=RANK, weight_decay=DECAY, **options)
        optimizer.step()
        state = {key: t.double() for key, t in optimizer.state[p].items()}
        u = state["exp_avg"] / 0.1 / ((state["exp_avg_sq"] / 1e-3).sqrt() + 1e-8)
        from torch_subspace.lowrank.projectors import KINDS, columns

        kind = next(key for key in KINDS if key in state)
        q = columns(kind, optimizer.state[p][kind], min(p.shape), torch.float64)
        change = u @ q.mT if p.shape[0] >= p.shape[1] else q @ u.mT
        return relative([(p.detach().double() - before).cpu()], [(-change - DECAY * before).cpu()])

    return contender(name, make, check)


def peer(shapes, device, name, module, cls, **options):
    """Another package's optimiser, with its options for a group."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = getattr(importlib.import_module(module), cls)
    except ImportError as problem:
        return Contender(name, lambda: None, missing=f"{module}: {problem}".splitlines()[0])
    return contender(name, lambda: found(groups(shapes, device, rank=RANK, **options), lr=LR, weight_decay=DECAY),
                     note="another step")


def peers(shapes, device, gap, decompositions):
    """All peers; those that decompose gradients in this step, if they are wanted."""
    options = {"update_proj_gap": gap, "scale": 1.0}
    made = [peer(shapes, device, "apollo-torch", "apollo_torch", "APOLLOAdamW", proj="random", proj_type="std",
                 scale_type="channel", **options),
            peer(shapes, device, "pytorch_optimizer APOLLO", "pytorch_optimizer", "APOLLO", projection_type="random",
                 scale_type="channel", **options)]
    for name, module, cls, word in (("galore-torch", "galore_torch", "GaLoreAdamW", "proj_type"),
                                    ("pytorch_optimizer GaLore", "pytorch_optimizer", "GaLore", "projection_type"),
                                    ("pytorch_optimizer Fira", "pytorch_optimizer", "Fira", "projection_type")):
        made.append(peer(shapes, device, name, module, cls, **{word: "std"}, **options) if decompositions else
                    Contender(name, lambda: None, missing="its decomposition takes a minute"))
    return made


def products(shapes, device, number):
    """The matrix products of a step at this machine's rate, torch's or our library's, and nothing else."""

    def build():
        made = [p for group in groups(shapes, device)[:1] for p in group["params"]]
        work = [(p.detach(), p.grad) if p.shape[0] >= p.shape[1] else (p.detach().mT, p.grad.mT) for p in made]
        work = [(w, g, torch.randn(g.shape[1], RANK, device=device)) for w, g in work]

        @torch.no_grad()
        def step():
            for w, g, q in work:
                y = product(g, q)
                if number == 4:
                    y = product(g, product(g.mT, y))
                a, b = (y, q.mT) if w.is_contiguous() else (q, y.mT)
                add_product_(w if w.is_contiguous() else w.mT, a, b, 1 - LR * DECAY, 1e-12)

        return step

    return Contender(FLOOR, build)


def case(name, shapes, device, found, decompositions):
    """All contenders at one size."""
    every, gap, number = (1, 1, 4) if found else (GAP, GAP, 2)
    rivals = peers(shapes, device, gap, decompositions)
    contenders = [
        products(shapes, device, number), ours(shapes, device, OURS, every=every),
        ours(shapes, device, "ours: cosines", projector="cosine", every=every),
        ours(shapes, device, FIXED, projector="hadamard", every=every),
        ours(shapes, device, "ours: feedback in 8 bits", error_feedback="int8", every=every), *rivals,
        contender(ADAMW, lambda: torch.optim.AdamW(parameters(shapes, device), lr=LR, weight_decay=DECAY, fused=True))]
    targets = [Target(OURS, (FLOOR,), "<=", 1.3, 1.15)]
    for rival in rivals:  # APOLLO draws its directions, so a fixed basis is what to compare with where they are new
        drawn = found and "apollo" in rival.name.lower()
        targets.append(Target(FIXED if drawn else OURS, (rival.name,), ">=", 1, 2))
    return Case(f"{name} rank={RANK} float32, directions {'found' if found else 'kept'}", contenders, targets,
                **work.low_rank_adamw(shapes, RANK, found), seconds=20)


def cases(device):
    """Square matrices, and the layers of a MiniLM."""
    square = {n: [(n, n)] for n in (1024, 4096)}
    return [case("4096x4096", square[4096], device, True, False), case("4096x4096", square[4096], device, False, False),
            case("1024x1024", square[1024], device, True, True), case("1024x1024", square[1024], device, False, True),
            case("MiniLM", MINILM, device, True, True), case("MiniLM", MINILM, device, False, True)]
