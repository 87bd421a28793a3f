"""Comparing evaluation runs: tables, the paper's pictures, and the questions of two runs side by side."""

from cosup.report.load import Condition, Run, conditions_of, read_run
from cosup.report.write import write_report

__all__ = ["Condition", "Run", "conditions_of", "read_run", "write_report"]
