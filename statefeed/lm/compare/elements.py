"""HTML elements of the report."""

import html
import re
from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure

from statefeed.lm.compare.figures import svg

_LONG = 40  # characters


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls if it is wider than the page."""
    head = "".join(f"<th>{html.escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    """A cell of a table; one with a sentence may be wrapped."""
    kind = ' class="long"' if len(text) > _LONG else ""
    return f"<td{kind}>{html.escape(text)}</td>"


def heading(text: str) -> str:
    """A heading within a section."""
    return f"<h3>{html.escape(text[:1].upper() + text[1:])}</h3>"


def note(text: str) -> str:
    """A paragraph in small print; nothing for an empty text."""
    return f'<p class="note">{html.escape(text)}</p>' if text else ""


def figure_grid(drawn: Mapping[str, Figure], title: str = "") -> str:
    """A grid of figures with their names as captions.

    Args:
        drawn: figures by name.
        title: title of the section, which is removed from captions.
    """
    parts = []
    for name, figure in drawn.items():
        caption = html.escape(name.removeprefix(f"{title}: "))
        content = f"{svg(figure)}<figcaption>{caption}</figcaption>"
        parts.append(f'<figure role="img" aria-label="{caption}">{content}</figure>')
    return f'<div class="figures">{"".join(parts)}</div>' if parts else ""


def unique_ids(body: str) -> str:
    """Make the ids of all SVG elements of a page unique, since matplotlib uses the same ids in every figure."""
    parts = re.split(r"(<svg.*?</svg>)", body, flags=re.DOTALL)
    return "".join(
        re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>f{k}-", part) if k % 2 else part for k, part in enumerate(parts)
    )
