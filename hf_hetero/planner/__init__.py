"""The planner's room. `Planner` is its one door; nothing here imports torch."""

from hf_hetero.planner.planner import Planner

__all__ = ["Planner"]
