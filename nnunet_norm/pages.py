"""Reports for people: tables as HTML and as Markdown, figures within the page, one file that needs nothing else."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from io import BytesIO
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 2rem auto; max-width: 62rem;
  padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; }
table { border-collapse: collapse; margin: .6rem 0; font-size: .92rem; }
caption { text-align: left; font-size: .88rem; color: #444; padding-bottom: .4rem; max-width: 60rem; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child, .words th, .words td { text-align: left; } thead th { border-bottom: 2px solid #999; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption { font-size: .88rem; color: #444; }
.verdict { border-left: .5rem solid; padding: .8rem 1rem; font-size: 1.08rem; background: #f7f7f7; }
.problem { border-color: #c62828; } .fine { border-color: #2e7d32; } .unknown { border-color: #f9a825; }
.wide { overflow-x: auto; width: max-content; min-width: 100%; max-width: 96vw; position: relative; left: 50%;
  transform: translateX(-50%); } .wide td, .wide th { white-space: nowrap; padding: .2rem .45rem; font-size: .85rem; }
"""
"""Of every page."""


def html_page(title: str, parts: Iterable[str]) -> str:
    """A page.

    Args:
        title: also its first heading.
        parts: HTML, in order.
    """
    head = (
        f'<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style></head><body>'
    )
    return "\n".join(["<!DOCTYPE html>", head, f"<h1>{escape(title)}</h1>", *parts, "</body></html>"]) + "\n"


def html_table(caption: str, header: Sequence[str], rows: Sequence[Sequence[str]], *, words: bool = False) -> str:
    """A table.

    Args:
        caption: stands alone.
        header: of the columns.
        rows: as long as the header.
        words: whether cells are no numbers.
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    start = '<table class="words">' if words else "<table>"
    return f"{start}<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table>"


def html_figure(png: bytes, caption: str) -> str:
    """A picture within the page, with a caption that stands alone, or an empty one."""
    data = base64.b64encode(png).decode("ascii")
    text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="" src="data:image/png;base64,{data}">{text}</figure>'


def text_table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines for a terminal, with the columns aligned at their left.

    Args:
        rows: all of one length; the header is the first.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose columns also line up in a terminal."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(f"{c:<{w}}" for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def as_png(figure: Figure) -> bytes:
    """The file's bytes."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", facecolor="white")
    return buffer.getvalue()
