"""`torch_subspace.isotropy`: features that spread like a standard normal distribution in every direction."""

from typing import TYPE_CHECKING

from ..common import lazy

if TYPE_CHECKING:
    from .alignment import OrthogonalAdapter as OrthogonalAdapter
    from .alignment import procrustes as procrustes
    from .distillation import similarity_distillation as similarity_distillation
    from .entropy import von_neumann_entropy as von_neumann_entropy
    from .gated_cosine import gated_cosine as gated_cosine
    from .groups import group_lasso as group_lasso
    from .groups import prox_group_lasso_ as prox_group_lasso_
    from .koopman import KoopmanInformationLoss as KoopmanInformationLoss
    from .koopman import koopman_information_loss as koopman_information_loss
    from .koopman import ridge_transition as ridge_transition
    from .losses import GroupLassoLoss as GroupLassoLoss
    from .losses import LambdaOrthogonalityLoss as LambdaOrthogonalityLoss
    from .losses import LeJEPALoss as LeJEPALoss
    from .losses import SIGRegLoss as SIGRegLoss
    from .losses import SimilarityDistillationLoss as SimilarityDistillationLoss
    from .orthogonality import lambda_orthogonality as lambda_orthogonality
    from .sigreg import sigreg as sigreg
    from .simlap import SimLAPLoss as SimLAPLoss
    from .simlap import simlap_loss as simlap_loss

_FILES = {
    "GroupLassoLoss": "losses",
    "KoopmanInformationLoss": "koopman",
    "LambdaOrthogonalityLoss": "losses",
    "LeJEPALoss": "losses",
    "OrthogonalAdapter": "alignment",
    "SIGRegLoss": "losses",
    "SimLAPLoss": "simlap",
    "SimilarityDistillationLoss": "losses",
    "gated_cosine": "gated_cosine",
    "group_lasso": "groups",
    "koopman_information_loss": "koopman",
    "lambda_orthogonality": "orthogonality",
    "procrustes": "alignment",
    "prox_group_lasso_": "groups",
    "ridge_transition": "koopman",
    "sigreg": "sigreg",
    "similarity_distillation": "distillation",
    "simlap_loss": "simlap",
    "von_neumann_entropy": "entropy",
}
__all__ = [
    "GroupLassoLoss",
    "KoopmanInformationLoss",
    "LambdaOrthogonalityLoss",
    "LeJEPALoss",
    "OrthogonalAdapter",
    "SIGRegLoss",
    "SimLAPLoss",
    "SimilarityDistillationLoss",
    "gated_cosine",
    "group_lasso",
    "koopman_information_loss",
    "lambda_orthogonality",
    "procrustes",
    "prox_group_lasso_",
    "ridge_transition",
    "sigreg",
    "similarity_distillation",
    "simlap_loss",
    "von_neumann_entropy",
]

__getattr__, __dir__ = lazy(__name__, _FILES)
