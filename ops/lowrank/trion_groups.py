"""Which parameters of a model `Trion` is to orthogonalise, and which AdamW steps better."""
from __future__ import annotations

import fnmatch
from collections.abc import Iterable
from typing import Any

from torch import nn

from ..common import check_module, told
from .trion_step import is_matrix


def trion_groups(model: nn.Module, adamw: str | Iterable[str] = (), **options: Any) -> list[dict[str, Any]]:
    """Parameter groups for `Trion`: hidden matrices, and what AdamW steps better: embeddings, vectors, classifiers.

    Args:
        model: its parameters that have gradients; each once, whatever is tied.
        adamw: names of modules or parameters that AdamW is to have, whole ones or patterns with * and ?: the
            classifier's at least, which Muon's authors keep out.
        options: of both groups, as `Trion` takes them.

    Returns:
        ``[{"params": ..., "algorithm": "trion"}, {"params": ..., "algorithm": "adamw"}]``, without what is empty.

    Raises:
        TypeError: model is no module, or adamw no names.
        ValueError: a name that the model has not.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(50, 16), torch.nn.Linear(16, 16), torch.nn.Linear(16, 50))
        >>> hidden, rest = ts.lowrank.trion_groups(model, adamw="2")
        >>> len(hidden["params"]), len(rest["params"])
        (1, 4)
    """
    name = "trion_groups"
    check_module(name, model)
    patterns = [adamw] if isinstance(adamw, str) else list(adamw) if isinstance(adamw, Iterable) else [adamw]
    if any(not isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f"{name}: adamw must be names, got {told(adamw)}")
    names = {name for name, _ in [*model.named_modules(remove_duplicate=False),
                                  *model.named_parameters(remove_duplicate=False)] if name}
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ValueError(f"{name}: adamw must be names of the model's modules or parameters, got {pattern!r}")
    kept = {p for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
            for p in module.parameters(recurse=False)}
    for at, p in model.named_parameters(remove_duplicate=False):
        parts = at.split(".")
        paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
        if any(fnmatch.fnmatchcase(path, pattern) for path in paths for pattern in patterns):
            kept.add(p)
    own = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in own if p not in kept and is_matrix(p.shape)]
    rest = [p for p in own if p in kept or not is_matrix(p.shape)]
    return [{**options, "params": params, "algorithm": algorithm}
            for params, algorithm in ((hidden, "trion"), (rest, "adamw")) if params]
