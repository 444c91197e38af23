"""Drawing a figure twice: as SVG that follows the page's colours, and as PNG for paper."""

import io
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_INK, _LINE = "#010203", "#040506"
"""Stand-ins in the SVG for the page's text and line colours."""
_PAPER_INK, _PAPER_LINE = "#1b1f24", "#c9ced6"


@dataclass(frozen=True)
class Plot:
    """A figure of the report.

    Attributes:
        name: file name without ending.
        title: heading.
        svg: inline SVG without width and height.
        png: file content.
    """

    name: str
    title: str
    svg: str
    png: bytes


def on_paper(name: str, draw: Callable[[Axes], None]) -> bytes:
    """PNG with the colours of paper."""
    return _drawn(draw, _PAPER_INK, _PAPER_LINE, "white", name, "png")


def render(name: str, title: str, draw: Callable[[Axes], None]) -> Plot:
    """Draw once for the page and once for paper."""
    svg = _drawn(draw, _INK, _LINE, "none", name, "svg").decode()
    return Plot(name, title, _inline(svg, title), on_paper(name, draw))


def _drawn(
    draw: Callable[[Axes], None], ink: str, line: str, paper: str, salt: str, kind: str
) -> bytes:
    style: dict[Any, Any] = {
        "text.color": ink,
        "axes.labelcolor": ink,
        "axes.edgecolor": line,
        "xtick.color": ink,
        "ytick.color": ink,
        "grid.color": line,
        "axes.facecolor": "none",
        "figure.facecolor": paper,
        "savefig.facecolor": paper,
        "legend.frameon": False,
        "legend.fontsize": 8,
        "legend.handlelength": 1.3,
        "legend.columnspacing": 1.2,
        "font.size": 8.5,
        "axes.labelsize": 8.5,
        "lines.linewidth": 1.3,
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
    }
    content = io.BytesIO()
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(4.2, 3.0), layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure.subplots())
        for axes in figure.axes:
            axes.spines[["top", "right"]].set_visible(False)
        # Ticks change when the layout gives them room: the second layout sees what stays.
        figure.draw_without_rendering()
        figure.savefig(
            content, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None
        )
    return content.getvalue()


def _inline(svg: str, title: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    label = title.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    svg = re.sub(r"font:\s*([\d.]+px)\s*[^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    return svg.replace(_INK, "currentColor").replace(_LINE, "var(--line)")
