"""The planner's room. `Planner` is its door, `PlannerProcess` the same elsewhere; nothing here imports torch."""

from hf_hetero.planner.planner import Planner, Solver
from hf_hetero.planner.process import PlannerLost, PlannerProcess
from hf_hetero.planner.program import Backend

__all__ = ["Backend", "Planner", "PlannerLost", "PlannerProcess", "Solver"]
