"""How the pages are built: formulas as MathML, which needs no script and no network; no headings for bare fields."""

import html
import re
from typing import Any

import griffe
from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_content(text: str, **_: Any) -> str:
    """MkDocs: the page with its formulas written out."""

    def written(found: re.Match[str]) -> str:
        return convert(html.unescape(found[2]).strip(), display="block" if found[1] == "div" else "inline")

    return FORMULA.sub(written, text)


class Fields(griffe.Extension):
    """The fields of a named tuple stand in the docstring of its class; what Python says of them itself does not help."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Without that text."""
        if attr.docstring and attr.docstring.value.startswith("Alias for field number"):
            attr.docstring = None
