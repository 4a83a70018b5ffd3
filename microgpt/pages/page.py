"""A page from a template: one file, everything in it, nothing loaded."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from microgpt import __version__
from microgpt.runs.files import write_whole

FOLDER = Path(__file__).resolve().parent / "templates"


def render(template: str, **context: Any) -> str:
    """The HTML of a page. Every text is escaped, whatever name or document it came from.

    The page's own policy allows its style, its pictures and its one script, and nothing from
    elsewhere.
    """
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    script = (FOLDER / "keys.js").read_text(encoding="utf-8")
    sha256 = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(template).render(
        style=Markup((FOLDER / "style.css").read_text(encoding="utf-8")),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline';"
        f" script-src 'sha256-{sha256}'; base-uri 'none'; form-action 'none'",
        version=__version__,
        **context,
    )


def write(path: Path, html: str) -> None:
    """Write a page to its file, whole or not at all."""
    write_whole(path, html.encode("utf-8", "xmlcharrefreplace"))


def figure(x: float) -> str:
    """A number as it is read: four digits, and a power of ten where it needs one."""
    return f"{x:.4g}"
