"""torch-subspace: subspace methods for PyTorch.

Grassmann class representation (subspace logits, fused cross-entropy, Riemannian optimisers) as torch
ops with pure-C kernels, and the layers that let a standard model pick them up.
"""
from . import library
from .adapter_config import TuckerConfig
from .adapter_files import load_adapter, save_adapter
from .adapter_merge import merge, merge_and_unload, unmerge
from .adapter_state import active_adapters, adapter_names
from .adapters import adapt, adapter_parameters, adapter_summary, delete_adapter, disabled, set_adapter
from .cross_entropy import subspace_cross_entropy
from .head import swap_head
from .layers import GrassmannLinear
from .library import show_config
from .logits import subspace_logits
from .optim import RiemannianAdamW, RiemannianSGD, param_groups
from .rsgd import grassmann_step_
from .tucker import tucker_compose
from .tucker_conv import tucker_conv
from .tucker_linear import tucker_linear

__version__ = library.__version__

__all__ = [
    "GrassmannLinear",
    "RiemannianAdamW",
    "RiemannianSGD",
    "TuckerConfig",
    "active_adapters",
    "adapt",
    "adapter_names",
    "adapter_parameters",
    "adapter_summary",
    "delete_adapter",
    "disabled",
    "grassmann_step_",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "param_groups",
    "save_adapter",
    "set_adapter",
    "show_config",
    "subspace_cross_entropy",
    "subspace_logits",
    "swap_head",
    "tucker_compose",
    "tucker_conv",
    "tucker_linear",
    "unmerge",
]
