import base64
import re

from matplotlib.figure import Figure

from nnunet_norm.pages import as_png, html_figure, html_page, html_table, markdown_table, text_table


def test_words_are_no_markup() -> None:
    """Enforces that names with < and & are shown as they are, in titles, captions and cells."""
    page = html_page("a < b", [html_table("c & d", ("<th>",), [("e < f",)])])
    assert "<h1>a &lt; b</h1>" in page
    assert "<caption>c &amp; d</caption>" in page
    assert "<th>&lt;th&gt;</th>" in page
    assert "<td>e &lt; f</td>" in page


def test_a_picture_lies_within_the_page() -> None:
    """Enforces that the PNG file can be had back from the page to the last byte, and no empty caption."""
    png = as_png(Figure(figsize=(1, 1), dpi=20))
    html = html_figure(png, "")
    (data,) = re.findall(r'src="data:image/png;base64,([^"]*)"', html)
    assert base64.b64decode(data) == png
    assert "figcaption" not in html
    assert "<figcaption>what &lt;</figcaption>" in html_figure(png, "what <")


def test_markdown_columns_line_up() -> None:
    """Enforces that a table can be read in a terminal, and that a | within a cell ends no column."""
    assert markdown_table(("a", "long"), [("1|2", "x"), ("", "y")]).splitlines() == [
        "| a    | long |",
        "| ---- | ---- |",
        "| 1\\|2 | x    |",
        "|      | y    |",
    ]


def test_columns_of_text_line_up() -> None:
    """Enforces the widest cell's width for a column, and no spaces at the end of a line."""
    assert text_table([("a", "b"), ("long", ""), ("", "c")]) == ["a     b", "long", "      c"]
