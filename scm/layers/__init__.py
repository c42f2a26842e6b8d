"""Heads and layers that answer projective tuples, or values with a mask of the bottoms."""

from scm.layers.angular_projective import AngularProjectiveHead
from scm.layers.basis import BasisFunction, ChebyshevBasis, CustomBasis, MonomialBasis
from scm.layers.hybrid_rational import FullyIntegratedRational, HybridTRRational, NearPoleStatistics
from scm.layers.normalization import SCMNorm, SCMSoftmax
from scm.layers.pole_head import PoleHead, PoleHeadConfig
from scm.layers.projective_rational import (
    ProjectiveRationalMultiHead,
    ProjectiveRRModelConfig,
    RRProjectiveRationalModel,
)
from scm.layers.scm_rational import SCMRationalLayer
from scm.layers.tr_rational import LayerContract, TRRational

__all__ = [
    "AngularProjectiveHead",
    "BasisFunction",
    "ChebyshevBasis",
    "CustomBasis",
    "FullyIntegratedRational",
    "HybridTRRational",
    "LayerContract",
    "MonomialBasis",
    "NearPoleStatistics",
    "PoleHead",
    "PoleHeadConfig",
    "ProjectiveRRModelConfig",
    "ProjectiveRationalMultiHead",
    "RRProjectiveRationalModel",
    "SCMNorm",
    "SCMRationalLayer",
    "SCMSoftmax",
    "TRRational",
]
