"""The pieces of HTML that a report is made of.

Invariant: what comes from a corpus is escaped here or by the caller, who hands over HTML.
"""

from __future__ import annotations

import base64
from html import escape

from megatron_tokedit.analysis import figures


def picture(pictures: dict[str, bytes], name: str, caption: str) -> str:
    """A figure with its bytes inside; nothing where it was not drawn."""
    if name not in pictures:
        return ""
    data = base64.b64encode(pictures[name]).decode()
    text = escape(caption)
    image = f'<img alt="{text}" src="data:image/png;base64,{data}">'
    return f"<figure>{image}<figcaption>{text}</figcaption></figure>"


def table(heads: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML already; the first column is the row's name."""
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join(
        "<tr>"
        + "".join(
            f"<{'th' if not i else 'td'}>{cell}</{'th' if not i else 'td'}>" for i, cell in enumerate(row)
        )
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def dot(index: int, name: str) -> str:
    """A corpus's name with its colour."""
    return f'<span class="dot" style="background:{figures.colour_of(index)}"></span>{escape(name)}'


def visible(text: str) -> str:
    """Text of tokens with its spaces and line ends to be seen, as HTML."""
    shown = escape(text).replace(" ", "&middot;").replace("\t", "&#8677;")
    return shown.replace("\r", "&#9229;").replace("\n", "&#8629;")
