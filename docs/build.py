"""Hooks and extensions for MkDocs: pages from the root, formulas as MathML, no headings for the fields of named tuples."""

import html
import re
from pathlib import Path
from typing import Any

import griffe
from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_files(files: Any, config: Any) -> None:
    """Add CONTRIBUTING.md and CHANGELOG.md of the root as pages."""
    for name in ("CONTRIBUTING", "CHANGELOG"):
        text = (ROOT / f"{name}.md").read_text().replace("](docs/", "](")
        files.append(File.generated(config, f"{name.lower()}.md", content=text))


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return the text of a page with its links to files of the root pointing to their pages."""
    return re.sub(r"\]\(\.\./(CONTRIBUTING|CHANGELOG)\.md\)", lambda link: f"]({link[1].lower()}.md)", markdown)


def on_page_content(text: str, **_: Any) -> str:
    """Convert the formulas of a page to MathML, which needs neither a script nor a network."""

    def to_mathml(found: re.Match[str]) -> str:
        formula = html.unescape(found[2]).strip()
        if found[1] == "span":
            return convert(formula, display="inline")
        return f'<div class="formula">{convert(formula, display="block")}</div>'

    return FORMULA.sub(to_mathml, text)


class Fields(griffe.Extension):
    """Extension that drops Python's docstrings of named-tuple fields; the docstring of the class describes them."""

    def on_attribute_instance(self, *, attr: griffe.Attribute, **_: Any) -> None:
        """Remove the docstring "Alias for field number N" of a field."""
        if attr.docstring and attr.docstring.value.startswith("Alias for field number"):
            attr.docstring = None
