"""Reports: one self-contained HTML page from results, with tables, plots, pictures and what reproduces each cell."""

from bench.report.command import report_command

__all__ = ["report_command"]
