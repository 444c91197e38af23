"""Figures of the report: each as SVG that follows the page's colours, and as PNG."""

from b2t.report.figures.axes import COLOURS, SEVERITY
from b2t.report.figures.codes import correlation_png, sizing_plot, usage_png
from b2t.report.figures.compare import COMPARED, plots_of_several
from b2t.report.figures.draw import Plot, render
from b2t.report.figures.run import plots_of
from b2t.report.figures.signals import traces_png

__all__ = [
    "COLOURS",
    "COMPARED",
    "SEVERITY",
    "Plot",
    "correlation_png",
    "plots_of",
    "plots_of_several",
    "render",
    "sizing_plot",
    "traces_png",
    "usage_png",
]
