"""Gateway to Jinja for chat templates: messages become the text that a model was taught to answer.

A template is code that comes with a model, of whoever made it. It runs in Jinja's sandbox, which
shows it messages and variables as plain data and lets it call nothing else; what it may call is
what transformers offers to it (5.23, utils/chat_template_utils.py), so that it writes the same.
"""

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import meta, nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from hybrid_train.data.any_tokenizer import CONFIG, named_tokens, read_settings
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
_LARGEST = 10**7  # letters or entries that a product in a template may make

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

    @cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return _environment().from_string(self.source)
        except TemplateError as error:
            raise UserError(f"{self.where} is no template: {_said(error)}") from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """The names that the template reads and does not set itself."""
        try:
            found = meta.find_undeclared_variables(_environment().parse(self.source))
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
            raise UserError(
                f"{self.where} tries what no template may do: {_said(error)}; do not trust the "
                "folder that it came with"
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
    text = str(error) or type(error).__name__
    return f"{text} (line {line})" if line else text


class _Generation(Extension):
    """The block `{% generation %}`, which marks what a model learns from; here it is its text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, which makes no text beyond all memory either."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and abs(right) > 100:  # noqa: PLR2004 (no template needs as much)
            raise SecurityError(f"a power of {right}")
        sizes = [len(one) for one in (left, right) if hasattr(one, "__len__")]
        times = [one for one in (left, right) if isinstance(one, int)]
        if operator == "*" and sizes and times and sizes[0] * times[0] > _LARGEST:
            raise SecurityError(f"a text or list of {sizes[0] * times[0]:,} entries")
        return super().call_binop(context, operator, left, right)


class _Dict:
    """The function `dict` for templates, and nothing else of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args, **kwargs)


class _Namespace(Namespace):
    """The object `namespace` for templates, without the names that Python keeps for itself."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        own, *rest = args
        for name in (values := dict(*rest, **kwargs)):
            _require_plain(name)
        Namespace.__init__(own, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_plain(name)
        super().__setitem__(name, value)


def _require_plain(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a name that begins with an underscore: {name}")


def _environment() -> ImmutableSandboxedEnvironment:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception, "strftime_now": _strftime_now,
        "dict": _Dict(), "namespace": _Namespace,
    }  # fmt: skip
    environment.globals.update(functions)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Write JSON without the escapes for HTML that Jinja's own filter puts in."""
    known = {"indent": None, "separators": None, "sort_keys": False} | options
    return json.dumps(value, ensure_ascii=ensure_ascii, **known)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
