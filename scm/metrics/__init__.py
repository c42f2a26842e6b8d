"""Measures of a decoded head that need no task."""

from scm.metrics.tau_sweep import (
    tau_infer_sweep_from_q_abs,
    tau_infer_sweep_report,
    write_tau_infer_sweep,
)

__all__ = ["tau_infer_sweep_from_q_abs", "tau_infer_sweep_report", "write_tau_infer_sweep"]
