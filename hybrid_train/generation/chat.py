"""Gateway to Jinja for chat templates: messages become the text that a model was taught to answer.

A template is code that comes with a model, of whoever made it. It runs in Jinja's sandbox, which
shows it messages and variables as plain data and lets it call nothing else.
"""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.exceptions import SecurityError, TemplateError

from hybrid_train.data.any_tokenizer import CONFIG, named_tokens, read_settings
from hybrid_train.generation.sandbox import TooLargeError, sandbox
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
DEFAULT, WITH_TOOLS = "default", "tool_use"  # names that transformers chooses by itself
_FOLDER = "additional_chat_templates"
_REASONING = (
    "reasoning_content",
    "thinking",
    "reasoning",
)  # of a message; templates read the first
_SWITCHES = ("enable_thinking", "thinking")  # variables that switch reasoning on and off
_LONGEST_SAID = 1000  # letters of what a template says

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """A template of a tokenizer's folder.

    Attributes:
        where: file and name, for messages.
        source: in Jinja.
        special: special tokens by their use, which templates read: bos_token and others.
    """

    where: str
    source: str
    special: Mapping[str, str]

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return sandbox().from_string(self.source)
        except TemplateError as error:
            raise UserError(f"{self.where} is no template: {_said(error)}") from error

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads and does not set itself."""
        try:
            found = meta.find_undeclared_variables(sandbox().parse(self.source))
        except TemplateError as error:
            raise UserError(f"{self.where} is no template: {_said(error)}") from error
        return frozenset(found)

    def render(
        self, messages: Sequence[Message], variables: Mapping[str, Any], tools: Any = None
    ) -> str:
        """Write messages as the prompt of the next answer of the assistant.

        Args:
            messages: plain data, as JSON has it, which `require_messages` found sound.
            variables: further ones that the template reads.
            tools: descriptions of functions that may be called; None: there are none.

        Raises:
            UserError: with what the template says, or where it tries what a sandbox forbids.
        """
        given = {
            **self.special, **variables, "messages": [_with_reasoning(one) for one in messages],
            "tools": tools, "documents": None, "add_generation_prompt": True,
        }  # fmt: skip
        try:
            text = self._compiled.render(given)
            text.encode()
        except SecurityError as error:
            advice = "do not trust the folder that it came with"
            if isinstance(error, TooLargeError):
                advice = f"shorten the messages, if they are so long, or {advice}"
            raise UserError(
                f"{self.where} tries what no template may do: {_said(error)}; {advice}"
            ) from error
        except UserError:
            raise
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise UserError(f"{self.where} writes {half!r}, which is no character") from error
        except Exception as error:  # it is foreign code, which may fail in any way
            raise UserError(f"{self.where} refuses the messages: {_said(error)}") from error
        if not text:
            raise UserError(f"{self.where} makes an empty text of the messages; repair the file")
        return text

    def with_reasoning(self, *, is_on: bool) -> dict[str, bool]:
        """Return the variable that switches reasoning.

        Raises:
            UserError: if the template has no such switch.
        """
        for name in _SWITCHES:
            if name in self.variables:
                return {name: is_on}
        raise UserError(
            f"reasoning: {self.where} has no variable for it ({', '.join(_SWITCHES)}); models that "
            "take a word for it, as /no_think, read it in a message"
        )

    def require_variables(self, names: Sequence[str]) -> None:
        """Refuse variables that the template does not read: they would do nothing.

        Raises:
            UserError: naming what it reads.
        """
        for name in names:
            if name not in self.variables:
                near = nearest(name, self.variables)
                raise UserError(
                    f"template_variables: {self.where} reads no {name}"
                    + (f"; nearest: {near}" if near else "")
                )


def open_template(folders: Sequence[Path], name: str | None, *, has_tools: bool) -> ChatTemplate:
    """Return the template of a tokenizer's folder.

    Args:
        folders: where it may be; the first one with a template counts.
        name: of one of several; None: `default`, or `tool_use` where there are tools.
        has_tools: whether the messages come with tools.

    Raises:
        UserError: if there is no template, none of that name, or a file is damaged.
    """
    for folder in folders:
        if found := _templates_of(folder):
            chosen = name or (WITH_TOOLS if has_tools and WITH_TOOLS in found else DEFAULT)
            if chosen not in found:
                near = nearest(chosen, found)
                hint = f"; nearest: template={near}" if near else ""
                raise UserError(
                    f"template = {chosen}: {folder} has {', '.join(sorted(found))}" + hint
                )
            where, source = found[chosen]
            return ChatTemplate(where, source, named_tokens(folder))
    raise UserError(
        f"messages need a chat template, and {folders[0]} has none (chat_template.jinja, or "
        f"chat_template in {CONFIG}); put the model's there, or write a prompt"
    )


def _templates_of(folder: Path) -> dict[str, tuple[str, str]]:
    """Return file and source of each template of a folder; files count before settings."""
    said = read_settings(folder / CONFIG).get("chat_template")
    if said is None:
        said = read_settings(folder / "chat_template.json").get("chat_template")
    found: dict[str, tuple[str, str]] = {}
    where = str(folder / CONFIG)
    if isinstance(said, str):
        found[DEFAULT] = (where, said)
    elif isinstance(said, dict):
        found |= {str(name): (f"{where}, {name}", str(one)) for name, one in said.items()}
    elif isinstance(said, list):
        for one in said:
            if not (isinstance(one, dict) and {"name", "template"} <= one.keys()):
                raise UserError(f"{where}: chat_template must be a text, or a list of named ones")
            found[one["name"]] = (f"{where}, {one['name']}", one["template"])
    files = {DEFAULT: folder / "chat_template.jinja"}
    files |= {path.stem: path for path in sorted((folder / _FOLDER).glob("*.jinja"))}
    named = {name: path for name, path in files.items() if path.is_file()}
    for name, path in named.items():
        try:
            found[name] = (str(path), path.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is no text: {error}; download it again") from error
    return found


def require_messages(messages: object) -> list[dict[str, Any]]:
    """Return messages if they are such.

    Raises:
        ValueError: in a sentence, if they are something else.
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError("messages must be a list of at least one message")
    for number, one in enumerate(messages, start=1):
        if not isinstance(one, dict) or not isinstance(one.get("role"), str):
            raise ValueError(f'message {number} must be like {{"role": "user", "content": "Hi"}}')
        role, content = one["role"], one.get("content")
        if role not in ROLES:
            near = nearest(role, ROLES)
            hint = f"; nearest: {near}" if near else ""
            raise ValueError(
                f"message {number} is of {role!r}; it must be of one of {', '.join(ROLES)}{hint}"
            )
        if not (isinstance(content, str | list) or (content is None and role == "assistant")):
            raise ValueError(f"message {number} needs content, a text or a list of parts")
    if messages[-1]["role"] == "assistant":
        raise ValueError(
            "the last message is of the assistant, so there is nothing to answer; to continue a "
            "text, write a prompt"
        )
    return messages


def _with_reasoning(message: Message) -> dict[str, Any]:
    """Give reasoning the name that templates read, whichever name it has."""
    said = next((message[key] for key in _REASONING if message.get(key) is not None), None)
    if said is None:
        return dict(message)
    return {"thinking": said, **message, "reasoning_content": said}


def _said(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    text = str(error)[:_LONGEST_SAID] or type(error).__name__
    text = "".join(one if one.isprintable() else " " for one in text)
    return f"{text} (line {line})" if line else text
