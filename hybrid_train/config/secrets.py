"""Credentials stay out of everything that is written: what looks like one becomes `<hidden>`.

Three things are looked for: user and password of a URL and parts of its query with a telling name,
tokens whose form is known, and the values of environment variables that hold credentials.
"""

import dataclasses
import os
import re
from collections.abc import Sequence
from typing import Any

MASK = "<hidden>"  # a plain scalar of YAML, and no part of an address
# s3://bucket and abfs://container@account are no credentials: of those a password alone is hidden.
_PASSWORD = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/@:'\"]*:[^\s/@'\"]+@", re.IGNORECASE)
_USER = re.compile(r"(\b(?:https?|ftps?|git|ssh)://)[^\s/@:'\"]+@", re.IGNORECASE)
_QUERY = re.compile(
    r"([?&;](?:[\w.-]*(?:token|secret|passw|signature|credential|api_?key|access_?key)[\w.-]*"
    r"|sig|key|pwd|auth)=)[^&;#\s'\"]+",
    re.IGNORECASE,
)
_KNOWN_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}|glpat-[\w-]{20,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}|sk-[\w-]{20,}|xox[abprs]-[\w-]{10,})(?![A-Za-z0-9])"
)
_VARIABLE = re.compile(
    r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|API_KEY|ACCESS_KEY|SECRET_KEY|ACCESS_KEY_ID|SAS)$"
)
# A word of a command that sets what is secret: hooks.upload.password=x, +a.api_key=x; no tokens=4M.
_SETTING = re.compile(
    r"(?:^|[._+-])(?:token|secret|passw(?:or)?d|passphrase|credentials?"
    r"|(?:api|access|secret)[_-]?key|sas)$",
    re.IGNORECASE,
)
_SHORTEST = 8  # characters of a value; a shorter one would be found in innocent words


def masked(text: str) -> str:
    """Return a text with `<hidden>` in place of every credential."""
    for pattern in (_PASSWORD, _USER):
        text = pattern.sub(rf"\1{MASK}@", text)
    text = _QUERY.sub(rf"\1{MASK}", text)
    text = _KNOWN_FORMS.sub(MASK, text)
    for value in _values_of_environment():
        text = text.replace(value, MASK)
    return text


def masked_words(words: Sequence[str]) -> list[str]:
    """Return the words of a command line with `<hidden>` in place of every credential.

    What a setting or an option with a telling name holds is hidden too, whatever it looks like.
    """
    found = []
    option = False  # whether the word before was an option whose value this is
    for word in words:
        key, equals, _ = word.partition("=")
        telling = _SETTING.search(key) is not None
        if option and not word.startswith("-"):
            found.append(MASK)
        else:
            found.append(f"{key}={MASK}" if telling and equals else masked(word))
        option = telling and not equals and word.startswith("-")
    return found


def masked_data(data: Any) -> Any:
    """Return nested dictionaries, lists and dataclasses with every text masked, keys included."""
    if isinstance(data, str):
        return masked(data)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        parts = {part.name: getattr(data, part.name) for part in dataclasses.fields(data)}
        return dataclasses.replace(data, **masked_data(parts))
    if isinstance(data, dict):
        return {masked_data(key): masked_data(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [masked_data(value) for value in data]
    return data


def _values_of_environment() -> list[str]:
    """List values of variables whose name says that they are secret, the longest first."""
    found = {
        value.strip()
        for name, value in os.environ.items()
        if _VARIABLE.search(name.upper()) and len(value.strip()) >= _SHORTEST
    }
    return sorted(found - {""}, key=len, reverse=True)
