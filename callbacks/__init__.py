"""Callbacks: look at a step's report; log it, draw it, refit the cost model for later plans."""

from hf_hetero.callbacks.calibration import CalibrationCallback
from hf_hetero.callbacks.plan_metrics import PlanMetricsCallback
from hf_hetero.callbacks.step_report import StepReportCallback

__all__ = ["CalibrationCallback", "PlanMetricsCallback", "StepReportCallback"]
