"""The room of callbacks, which look at a step's report: they log it, record it, or refit the cost model."""

from hf_hetero.callbacks.calibration import CalibrationCallback
from hf_hetero.callbacks.plan_metrics import PlanMetricsCallback
from hf_hetero.callbacks.progress import StepProgressCallback
from hf_hetero.callbacks.rank_speeds import RankSpeedsCallback
from hf_hetero.callbacks.step_report import StepReportCallback

__all__ = [
    "CalibrationCallback",
    "PlanMetricsCallback",
    "RankSpeedsCallback",
    "StepProgressCallback",
    "StepReportCallback",
]
