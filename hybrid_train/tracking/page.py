"""Gateway to Jinja2: fills a template; whatever is put into it is shown as text.

Scripts are the exception: ours and plotly.js, which a page may run by their hashes and no others.
"""

import base64
import hashlib
import json
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup


def fill(template: Path, **content: Any) -> str:
    """Fill a template.

    Args:
        template: the file.
        content: by the names that it uses; all but scripts and data is escaped.
    """
    environment = Environment(
        loader=FileSystemLoader(template.parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template.name).render(**content)


def script(text: str) -> Markup:
    """Mark a script of our own, or of a library, as one; it stands in the page as it is."""
    return Markup(text)


def script_hash(text: str) -> str:
    """Return how a Content-Security-Policy names a script that stands in the page."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def data(value: Any) -> Markup:
    """Write plain data as JSON that no text in it can break out of."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace("&", "\\u0026"))
