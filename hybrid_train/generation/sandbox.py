"""Sandbox of chat templates: what foreign code may call, and how long a value it may make.

What it may call is what transformers offers to it (5.23, utils/chat_template_utils.py), so that it
writes the same. A bound is held before a value is made, where its size follows from what it is made
of; loops, and the text of lists in lists, have none.
"""

import datetime
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import FILTERS, make_attrgetter
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.sandbox import (
    ImmutableSandboxedEnvironment,
    SandboxedEscapeFormatter,
    SandboxedFormatter,
)
from jinja2.utils import Namespace
from markupsafe import Markup

_LARGEST = 10**7  # letters, entries or bits of one value that a template makes
# A field of `%`: flags, width and precision.
_PERCENT = re.compile(r"%(?:\([^)]*\))?([#0\- +\d.*]*)")


class _Generation(Extension):
    """The block `{% generation %}`, which marks what a model learns from; here it is its text."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own form)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class TooLargeError(SecurityError):
    """A text, list or number beyond `_LARGEST`."""


def _require_small(size: int) -> None:
    if size > _LARGEST:
        raise TooLargeError(f"a text, list or number of {size:,} letters, entries or bits")


def _joined(parts: Iterable[str]) -> str:
    kept, size = [], 0
    for part in parts:
        size += len(part)
        _require_small(size)
        kept.append(part)
    return "".join(kept)


class _Code(CodeGenerator):
    """Jinja's compiler, which has the sandbox look at what `~` makes."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 (Jinja's name)
        self.write("environment.bounded(")
        super().visit_Concat(node, frame)
        self.write(")")


class _BoundedFields(SandboxedFormatter):
    """What `format` of a text does, with a bound on all of its fields."""

    _size = 0

    def format_field(self, value: Any, format_spec: str) -> Any:
        _require_small(_widths(format_spec))
        made = super().format_field(value, format_spec)
        self._size += len(made)
        _require_small(self._size)
        return made


class _BoundedEscape(_BoundedFields, SandboxedEscapeFormatter):
    """The same of a text that is marked as safe, which escapes what it is given."""


def _widths(form: str) -> int:
    return sum(int(digits[:20]) for digits in re.findall(r"\d+", form))


def _percent_size(form: str, /, *given: Any, **named: Any) -> int:
    """Bound what `%` makes: each of its fields has a width, or that of a value."""
    texts = [len(one) for one in (*given, *named.values()) if isinstance(one, str)]
    stars = [abs(one) for one in given if isinstance(one, int)]
    fields = _PERCENT.findall(str(form))
    wide = sum(_widths(one) + one.count("*") * max(stars, default=0) for one in fields)
    return len(str(form)) + wide + len(fields) * max(texts, default=0)


def _replaced_size(text: Any, old: Any, new: Any, count: int | None = None) -> int:
    times = str(text).count(str(old))
    times = times if count is None or count < 0 else min(times, count)
    return len(str(text)) + times * len(str(new))


def _joined_size(between: str, parts: Sequence[Any]) -> int:
    return sum(len(str(one)) for one in parts) + len(between) * len(parts)


def _indented_size(text: str, width: int | str = 4, *_: Any, **_named: Any) -> int:
    wide = len(width) if isinstance(width, str) else width
    return len(text) + (len(text.splitlines()) + 1) * wide


_METHOD_SIZES: dict[str, Callable[..., int]] = {  # of a text; in letters, at most
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), lambda text, width, *_: width),
    "expandtabs": lambda text, tabsize=8: len(text) + text.count("\t") * tabsize,
    "replace": _replaced_size, "join": _joined_size,
    "translate": lambda text, table: len(text) * max([1, *(len(str(table[key])) for key in table)]),
}  # fmt: skip
_FILTER_SIZES: dict[str, Callable[..., int]] = {
    "center": lambda text, width=80: width, "format": _percent_size, "indent": _indented_size,
    "replace": _replaced_size, "batch": lambda rows, linecount, *_, **_named: linecount,
    "slice": lambda rows, slices, *_, **_named: slices,
}  # fmt: skip


def _bounded_filter(act: Callable[..., Any], size: Callable[..., int]) -> Callable[..., Any]:
    skipped = 1 if hasattr(act, "jinja_pass_arg") else 0

    @functools.wraps(act)
    def bounded(*args: Any, **named: Any) -> Any:
        _require_small(size(*args[skipped:], **named))
        return act(*args, **named)

    return bounded


@jinja2.pass_eval_context
def _join(context: EvalContext, value: Any, d: Any = "", attribute: str | int | None = None) -> Any:
    if attribute is not None:
        value = map(make_attrgetter(context.environment, attribute), value)
    parts = list(value)
    _require_small(_joined_size(str(d), parts))
    return FILTERS["join"](context, parts, d)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, in which no operator, method or filter makes one text beyond all memory."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})
    code_generator_class = _Code
    concat = staticmethod(_joined)  # of the whole text, of macros and of blocks

    def bounded(self, value: str) -> str:
        _require_small(len(value))
        return value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(one) for one in (left, right) if hasattr(one, "__len__")]
        whole = [one for one in (left, right) if isinstance(one, int)]
        if operator == "%" and isinstance(left, str):
            values = right if isinstance(right, tuple) else (right,)
            named = {str(key): right[key] for key in right} if isinstance(right, Mapping) else {}
            _require_small(_percent_size(left, *values, **named))
        elif operator == "**" and len(whole) == 2:  # noqa: PLR2004 (both)
            _require_small(left.bit_length() * right)
        elif operator == "*" and sizes and whole:
            _require_small(sizes[0] * whole[0])
        elif operator in ("*", "+"):
            _require_small(sum(sizes) + sum(one.bit_length() for one in whole))
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *args: Any, **named: Any) -> Any:  # noqa: N805
        text, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        if isinstance(text, str) and name in _METHOD_SIZES:
            if name == "join":  # of an iterator, which is read once
                args = tuple(map(list, args))
            _require_small(_METHOD_SIZES[name](text, *args, **named))
        return super().call(__context, __obj, *args, **named)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        if super().wrap_str_format(value) is None:
            return None
        text, is_map = value.__self__, value.__name__ == "format_map"

        def formatted(*args: Any, **named: Any) -> str:
            fields = (
                _BoundedEscape(self, escape=text.escape)
                if isinstance(text, Markup)
                else _BoundedFields(self)
            )
            made = fields.vformat(text, (), *args) if is_map else fields.vformat(text, args, named)
            return type(text)(made)

        return formatted


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


def sandbox() -> ImmutableSandboxedEnvironment:
    """Return a new sandbox with all that templates call."""
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    for name, size in _FILTER_SIZES.items():
        environment.filters[name] = _bounded_filter(environment.filters[name], size)
    environment.filters |= {"tojson": _to_json, "join": _join}
    del environment.globals["lipsum"]  # text without end
    functions: dict[str, Callable[..., Any]] = {
        "raise_exception": _raise_exception, "strftime_now": _strftime_now,
        "dict": _Dict(), "namespace": _Namespace,
    }  # fmt: skip
    environment.globals.update(functions)
    return environment


def _to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
    """Write JSON without the escapes for HTML that Jinja's own filter puts in."""
    known = {"indent": None, "separators": None, "sort_keys": False} | options
    if isinstance(known["indent"], int):
        _require_small(len(json.dumps(value)) * known["indent"])
    return json.dumps(value, ensure_ascii=ensure_ascii, **known)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)
