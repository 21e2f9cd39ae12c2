"""torch-subspace: subspace methods for PyTorch.

Grassmann class representation (subspace logits, fused cross-entropy, Riemannian optimisers), Tucker adapters (FLoRA)
and coding rates (MCR², MLC) as torch ops with pure-C kernels, and the layers, adapters, losses and the clusterer that
let standard models pick them up.
"""
import sys as _sys
from typing import TYPE_CHECKING, Any

try:
    from . import library
except (ImportError, OSError) as _error:
    if _sys.argv[:1] == ["-m"] and "torch_subspace" in _sys.orig_argv:  # `python -m torch_subspace` says it in a line
        print(f"torch_subspace can't be loaded: {_error}", file=_sys.stderr)
        raise SystemExit(2) from None
    raise
from . import distributed as distributed
from . import grassmann as grassmann
from . import isotropy as isotropy
from . import lowrank as lowrank
from .adapters.adapt import adapt, adapter_parameters, adapter_summary, delete_adapter, disabled, set_adapter
from .adapters.config import TuckerConfig
from .adapters.files import load_adapter, save_adapter
from .adapters.merge import merge, merge_and_unload, unmerge
from .adapters.spectral import SpectralConfig
from .adapters.state import active_adapters, adapter_names
from .grassmann.cross_entropy import subspace_cross_entropy
from .grassmann.head import swap_head
from .grassmann.layers import GrassmannLinear
from .grassmann.logits import subspace_logits
from .grassmann.optim import RiemannianAdamW, RiemannianSGD, param_groups
from .grassmann.rsgd import grassmann_step_
from .isotropy import gated_cosine as _gated_cosine  # noqa: F401  (lazy families: torch.ops has gradients at once)
from .isotropy import sigreg as _sigreg  # noqa: F401
from .library import show_config
from .lowrank import fastfood as _fastfood  # noqa: F401
from .lowrank import hadamard as _hadamard  # noqa: F401
from .lowrank import newton_schulz as _newton_schulz  # noqa: F401
from .lowrank import product as _product  # noqa: F401
from .precision import get_float32_matmul_precision, set_float32_matmul_precision
from .rates import coding_rate_soft as _coding_rate_soft  # noqa: F401
from .rates.coding_rate import coding_rate, rate_reduction
from .rates.losses import CodingRateLoss, MCR2Loss, MLCLoss
from .transport.sinkhorn import sinkhorn
from .tucker.tucker import tucker_compose
from .tucker.tucker_conv import tucker_conv
from .tucker.tucker_linear import tucker_linear

__version__ = library.__version__

__all__ = [
    "CodingRateLoss",
    "GrassmannLinear",
    "MCR2Loss",
    "MLCLoss",
    "RiemannianAdamW",
    "RiemannianSGD",
    "SpectralConfig",
    "TuckerConfig",
    "active_adapters",
    "adapt",
    "adapter_names",
    "adapter_parameters",
    "adapter_summary",
    "coding_rate",
    "delete_adapter",
    "disabled",
    "get_float32_matmul_precision",
    "grassmann_step_",
    "load_adapter",
    "merge",
    "merge_and_unload",
    "param_groups",
    "rate_reduction",
    "save_adapter",
    "set_adapter",
    "set_float32_matmul_precision",
    "show_config",
    "sinkhorn",
    "subspace_cross_entropy",
    "subspace_logits",
    "swap_head",
    "tucker_compose",
    "tucker_conv",
    "tucker_linear",
    "unmerge",
]


if TYPE_CHECKING:
    from .clustering.manifold import ManifoldClustering as ManifoldClustering


def __getattr__(name: str) -> Any:
    if name == "ManifoldClustering":  # needs scikit-learn, which nothing else here does
        from .clustering.manifold import ManifoldClustering

        return ManifoldClustering
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "ManifoldClustering"])
