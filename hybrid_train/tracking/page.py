"""Gateway to Jinja2: fills a template; whatever is put into it is shown as text."""

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def fill(template: Path, **content: Any) -> str:
    """Fill a template.

    Args:
        template: the file.
        content: by the names that it uses; all but what `drawn` has marked is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**content)


def drawn(svg: str) -> Markup:
    """Mark a picture of `tracking/svg.py`, which escapes its own texts, as one."""
    return Markup(svg)
