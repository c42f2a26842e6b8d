"""Heads and layers that answer projective tuples, or values with a mask of the bottoms."""

from scm.layers.angular_projective import AngularProjectiveHead
from scm.layers.basis import BasisFunction, ChebyshevBasis, CustomBasis, MonomialBasis
from scm.layers.normalization import SCMNorm, SCMSoftmax
from scm.layers.projective_rational import (
    ProjectiveRationalMultiHead,
    ProjectiveRRModelConfig,
    RRProjectiveRationalModel,
)
from scm.layers.scm_rational import SCMRationalLayer

__all__ = [
    "AngularProjectiveHead",
    "BasisFunction",
    "ChebyshevBasis",
    "CustomBasis",
    "MonomialBasis",
    "ProjectiveRRModelConfig",
    "ProjectiveRationalMultiHead",
    "RRProjectiveRationalModel",
    "SCMNorm",
    "SCMRationalLayer",
    "SCMSoftmax",
]
