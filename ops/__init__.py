"""torch-subspace: subspace methods for PyTorch.

Grassmann class representation (subspace logits, fused cross-entropy, Riemannian optimisers) as torch
ops with pure-C kernels, and the layers that let a standard model pick them up.
"""
from . import library
from .cross_entropy import subspace_cross_entropy
from .head import swap_head
from .layers import GrassmannLinear
from .library import show_config
from .logits import subspace_logits
from .optim import RiemannianAdamW, RiemannianSGD, param_groups
from .rsgd import grassmann_step_

__version__ = library.__version__

__all__ = [
    "GrassmannLinear",
    "RiemannianAdamW",
    "RiemannianSGD",
    "grassmann_step_",
    "param_groups",
    "show_config",
    "subspace_cross_entropy",
    "subspace_logits",
    "swap_head",
]
