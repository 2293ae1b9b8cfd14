"""A hook of MkDocs: formulas become MathML while the pages are built, so that they need no script and no network."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(text: str, **_: Any) -> str:
    """The page with its formulas written out."""
    return FORMULA.sub(
        lambda found: convert(html.unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline"),
        text,
    )
