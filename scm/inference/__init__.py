"""What a trained head answers: strict decoding, and the threshold it decodes with."""

from scm.inference.calibration import (
    CalibratedHead,
    CalibrationError,
    CalibrationRecord,
    GaugeMismatchError,
    UncalibratedWarning,
    calibrate,
    calibrated_decode,
)
from scm.inference.patterns import SemanticDecodeResult, decode_strict_censored_3way
from scm.inference.strict import (
    InferenceConfig,
    InferenceResult,
    strict_inference,
    strict_inference_numpy,
    threshold_in,
)
from scm.inference.wrapper import SCMInferenceWrapper

__all__ = [
    "CalibratedHead",
    "CalibrationError",
    "CalibrationRecord",
    "GaugeMismatchError",
    "InferenceConfig",
    "InferenceResult",
    "SCMInferenceWrapper",
    "SemanticDecodeResult",
    "UncalibratedWarning",
    "calibrate",
    "calibrated_decode",
    "decode_strict_censored_3way",
    "strict_inference",
    "strict_inference_numpy",
    "threshold_in",
]
