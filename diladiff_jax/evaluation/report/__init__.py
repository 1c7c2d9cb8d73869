"""The report of a sweep: its files, its plots, and one page that shows everything."""

from diladiff_jax.evaluation.report.folder import write, write_page, write_report
from diladiff_jax.evaluation.report.page import render
from diladiff_jax.evaluation.report.samples import sample_models
from diladiff_jax.evaluation.report.scores import scores_table
from diladiff_jax.evaluation.report.text import summary, table

__all__ = [
    "render",
    "sample_models",
    "scores_table",
    "summary",
    "table",
    "write",
    "write_page",
    "write_report",
]
