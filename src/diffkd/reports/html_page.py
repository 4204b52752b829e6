"""One self-contained HTML page of tables, interactive curves and pictures, which requests nothing from any host."""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

from diffkd.files.weights import write_text
from diffkd.models.extras import require

_WHAT = "a report"


@dataclass(frozen=True)
class PageTable:
    """A table that a click on a header sorts.

    Attributes:
        head: titles of the columns.
        rows: cells as text.
        title: above the table; "" for none.
        words: indices of the columns of text, which may wrap and are aligned left.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    words: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Plot:
    """A figure of plotly.

    Attributes:
        title: above it.
        data: its traces. Names of the user go through :func:`plain`, since plotly reads markup in them.
        layout: its layout, without colours, which follow the page.
        large: draw it as a large square.
    """

    title: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any] = field(default_factory=dict)
    large: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture with a line below it.

    Attributes:
        content: of a PNG file.
        caption: the line.
    """

    content: bytes
    caption: str

    @property
    def source(self) -> str:
        """The picture as a data URI."""
        return f"data:image/png;base64,{base64.b64encode(self.content).decode()}"


@dataclass(frozen=True)
class Pictures:
    """Some pictures side by side, or below each other over the whole width.

    Attributes:
        pictures: the pictures.
        title: above them; "" for none.
        wide: one picture a row.
    """

    pictures: Sequence[Picture]
    title: str = ""
    wide: bool = False


@dataclass(frozen=True)
class Section:
    """A part of a page: lines of text, tables, figures, pictures, and texts as they are, in this order."""

    title: str
    lines: Sequence[str] = ()
    tables: Sequence[PageTable] = ()
    plots: Sequence[Plot] = ()
    pictures: Sequence[Pictures] = ()
    texts: Sequence[tuple[str, str]] = ()

    def __bool__(self) -> bool:
        """Return whether there is anything in it."""
        return any((self.lines, self.tables, self.plots, self.pictures, self.texts))


def check_libraries() -> None:
    """Raise ModuleNotFoundError if a library that a page needs is not installed."""
    for library in ("jinja2", "plotly"):
        require(library, "report", _WHAT)


def write_page(path: Path, title: str, headline: str, sections: Sequence[Section]) -> Path:
    """Write a page atomically. All text is shown as text, never as markup.

    Args:
        path: the .html file.
        title: of the page.
        headline: a line below it.
        sections: its parts; empty ones are left out.

    Returns:
        The path.

    Raises:
        ModuleNotFoundError: if a library of the extra for reports is not installed.
        OSError: if the file cannot be written.
    """
    jinja2 = require("jinja2", "report", _WHAT)
    script = files(require("plotly", "report", _WHAT)).joinpath("package_data", "plotly.min.js")
    shown = [section for section in sections if section]
    plots: dict[str, dict[str, Any]] = {}
    parts = []
    for section in shown:
        named = []
        for plot in section.plots:
            name = f"plot-{len(plots) + 1}"
            plots[name] = {"data": list(plot.data), "layout": dict(plot.layout)}
            named.append({"name": name, "title": plot.title, "large": plot.large})
        parts.append({**vars(section), "plots": named})
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    template = environment.from_string(
        files("diffkd.reports").joinpath("templates", "report.html.j2").read_text(encoding="utf-8")
    )
    text = template.render(
        title=title,
        headline=headline,
        sections=parts,
        plots=plots,
        plotly=jinja2.utils.markupsafe.Markup(script.read_text(encoding="utf-8")),
    )
    write_text(path, text)
    return path


def plain(text: str) -> str:
    """Return a name so that plotly shows it as it is, without reading markup in it.

    >>> plain("<b>cat</b>")
    '&lt;b&gt;cat&lt;/b&gt;'
    """
    return html.escape(text, quote=False)


def lines_plot(title: str, series: Mapping[str, Sequence[tuple[float, float]]], y: str, *, log: bool = False) -> Plot:
    """Return a figure with a curve for each name.

    Args:
        title: above it.
        series: for each name the points (epoch, value).
        y: title of the vertical axis.
        log: draw it on a logarithmic axis.
    """
    data = [
        {
            "type": "scatter",
            "mode": "lines+markers" if len(points) < 40 else "lines",
            "name": plain(name),
            "x": [x for x, _ in points],
            "y": [value for _, value in points],
        }
        for name, points in series.items()
    ]
    axis = {"title": {"text": plain(y)}, **({"type": "log"} if log else {})}
    layout = {"xaxis": {"title": {"text": "epoch"}}, "yaxis": axis, "hovermode": "x unified", "showlegend": True}
    return Plot(title, data, layout)
