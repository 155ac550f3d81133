"""The room of pictures and tables: of plans, runs and simulations. It needs no torch, and matplotlib only to draw."""

from hf_hetero.report.plan_picture import draw_plan
from hf_hetero.report.records import read_records
from hf_hetero.report.report import most_mixed, report_run, summarise, write_report

__all__ = ["draw_plan", "most_mixed", "read_records", "report_run", "summarise", "write_report"]
