"""A model that trains on its raw tuple and answers with decoded values."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from scm.inference.strict import InferenceConfig, InferenceResult, strict_inference


class SCMInferenceWrapper(nn.Module):
    """In train mode returns what the model returns; in eval mode its strictly decoded `InferenceResult`.

    The model is called with the same arguments. A first argument that is a pair (x, Q_valid) calls the model
    with x, and Q_valid, shaped as Q, gates as a second denominator with the same threshold. Whatever the
    model returns after (P, Q), such as a pole logit, is left out of decoding.
    """

    def __init__(
        self,
        model: nn.Module,
        config: InferenceConfig | None = None,
        *,
        experimental_provenance: bool | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.config = InferenceConfig() if config is None else config

    def forward(self, x: Any, *args: Any, **kwargs: Any) -> InferenceResult | Any:
        """Call the model; TypeError in eval mode where it does not return a tuple of tensors (P, Q, ...)."""
        validity: Tensor | None = None
        if isinstance(x, tuple) and len(x) == 2:
            x, validity = x
        outputs = self.model(x, *args, **kwargs)
        if self.training:
            return outputs
        numerator, denominator = projective_pair(outputs)
        return strict_inference(
            numerator,
            denominator,
            self.config,
            validity_factors=validity,
            validity_taus=self.config.tau_infer,
        )


def projective_pair(outputs: Any) -> tuple[Tensor, Tensor]:
    """The first two of a model's outputs; TypeError where they are not two tensors."""
    if not isinstance(outputs, (tuple, list)) or len(outputs) < 2:
        raise TypeError(f"the model must return (P, Q), got {type(outputs).__name__}")
    numerator, denominator = outputs[0], outputs[1]
    if not (isinstance(numerator, Tensor) and isinstance(denominator, Tensor)):
        kinds = f"{type(numerator).__name__}, {type(denominator).__name__}"
        raise TypeError(f"the model must return two tensors (P, Q), got {kinds}")
    return numerator, denominator
