"""The planner's room. `Planner` is its door, `PlannerProcess` the same in another process; none of it needs torch."""

from hf_hetero.config import Backend, Solver
from hf_hetero.planner.planner import Planner
from hf_hetero.planner.problem import MAX_TOKENS
from hf_hetero.planner.process import PlannerLost, PlannerProcess

__all__ = ["MAX_TOKENS", "Backend", "Planner", "PlannerLost", "PlannerProcess", "Solver"]
