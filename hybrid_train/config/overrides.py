"""Overrides of the command line: read them, and set typed values, collecting every problem."""

import functools
import keyword
import math
import os
import re
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import BooleanNode, EnumNode, FloatNode, IntegerNode, StringNode

from hybrid_train.config.commands import quoted, setting, typed
from hybrid_train.config.registry import kinds
from hybrid_train.schema.extension import is_import_path
from hybrid_train.schema.names import nearest, nearest_key
from hybrid_train.schema.problems import Problem, within_limits

BARE_RULE = "write settings as KEY=VALUE"
COMMA_RULE = "several values need --multirun; a value with a comma in it needs quotes"
OWN_FILE = "conf/experiment/NAME.yaml, taken by experiment=NAME"
_ASSIGNMENT = re.compile(r"(?:\+{0,2})([A-Za-z_][\w./@:-]*)=(.*)", re.DOTALL)
_PLAIN: dict[type[Node], str] = {
    IntegerNode: "must be a whole number",
    FloatNode: "must be a number",
    StringNode: "must be a text",
}
_FAR = 1e30  # beyond every limit
_DELETION = re.compile(r"~[A-Za-z_][\w./@:-]*(=.*)?", re.DOTALL)
_MOST = 500  # settings of a command line; each takes milliseconds to read
_MOST_BRACKETS = 1000
_NOT_TEXT = re.compile("[\udc80-\udcff\0]")  # bytes of the command line that are not UTF-8
_INTERPOLATION = re.compile(r"(\\*)\$\{")  # \${ is a plain ${, and \\ before it one backslash
# Of a list: texts in quotes, letters that structure it, and what stands between.
_PARTS = re.compile(
    r"""("(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[\[\]{}(),]|[^\[\]{}(),"']+|.)""", re.DOTALL
)
HYDRA_RULE = "Hydra's own settings do nothing here; leave it out"
_SWEEP_FOLDERS = "Hydra writes nothing here; each of several runs gets run_dir/WHAT_DIFFERS"
_INSTEAD_OF_HYDRA = {
    "hydra.run.dir": "Hydra writes nothing here; run_dir=PATH is the folder of a run",
    "hydra.sweep.dir": _SWEEP_FOLDERS,
    "hydra.sweep.subdir": _SWEEP_FOLDERS,
    "hydra.mode": "does nothing here; --multirun runs every combination of values",
    "hydra.verbose": "does nothing here; see tracking.* and profile=torch",
}


@dataclass
class Given:
    """What a command line asks for, sorted by how it is applied."""

    groups: list[Override] = field(default_factory=list)  # choices of config groups
    values: list[Override] = field(default_factory=list)  # single settings
    texts: dict[str, list[str]] = field(default_factory=dict)  # taken as they stand
    problems: list[Problem] = field(default_factory=list)


def read(lines: Sequence[str], groups: Collection[str], raw_keys: Collection[str] = ()) -> Given:
    """Sort overrides into group choices, values and raw texts; problems are part of the answer.

    Args:
        lines: overrides in Hydra's grammar, `key=value`.
        groups: names of the config groups.
        raw_keys: keys whose value is plain text without a grammar; each repetition adds one.
    """
    given = Given()
    read_so_far = 0
    for line in lines:
        match = _ASSIGNMENT.fullmatch(line)
        if _NOT_TEXT.search(line):
            key, _, value = map(_printable, line.partition("="))
            given.problems.append(Problem(key, value, _not_text()))
        elif match and match[1] in raw_keys:
            given.texts.setdefault(match[1], []).append(match[2])
        elif match is None and _DELETION.fullmatch(line) is None:
            given.problems.append(Problem(line or '""', "(nothing)", BARE_RULE))
        elif (read_so_far := read_so_far + 1) > _MOST:
            rule = f"are too many for a command line, which takes {_MOST}; write them into a file"
            given.problems.append(Problem("settings", f"{len(lines):,}", f"{rule}: {OWN_FILE}"))
            break
        elif match and keyword.iskeyword(match[1]):  # import=...: no field can be called so
            _sort(f"{match[1]}_={match[2]}", given, groups)
        else:
            _sort(line, given, groups)
    return given


def _not_text() -> str:
    encoding = sys.getfilesystemencoding()
    hint = "" if encoding == "utf-8" else "; with PYTHONUTF8=1 it may be UTF-8"
    return f"has bytes that are no text in {encoding}{hint}"


def _printable(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _sort(line: str, given: Given, groups: Collection[str]) -> None:
    """Parse one override and put it where it belongs."""
    override = parse(line)
    if isinstance(override, Problem):
        given.problems.append(override)
        return
    key, text = override.key_or_group, _text(override)
    if override.is_hydra_override():
        given.problems.append(Problem(key, text, _INSTEAD_OF_HYDRA.get(key, HYDRA_RULE)))
    elif key in groups and override.package is not None:
        rule = f"a choice of {key} has one place; write {key}={text}"
        given.problems.append(Problem(f"{key}@{override.package}", text, rule))
    elif key in groups and override.is_sweep_override():
        given.problems.append(Problem(key, text, "several choices need --multirun"))
    elif key in groups:
        given.groups.append(override)
    else:
        given.values.append(override)


def parse(line: str, *, is_sweep: bool = False) -> Override | Problem:
    """Read one override; text that Hydra's grammar does not know is taken as it stands.

    Letters beyond ASCII, and = # ( ) and the like, can only be part of a text. What may mean two
    things is refused: a comma, which separates values of a sweep, and quotes without their end.

    Args:
        line: `key=value`, `+key=value` or `~key`.
        is_sweep: whether commas do separate values.
    """
    key, _, value = line.lstrip("+~").partition("=")
    if sum(map(value.count, "[{(")) > _MOST_BRACKETS:  # Hydra would read for minutes
        return Problem(key, value, "has too many brackets to be read; write it into a file")
    before = line[: len(line) - len(value)]
    try:
        # What looks like a list and is none is text as a whole: the setting says which it can be.
        override = _hydra(line) or _hydra(before + _in_quotes(value, is_sweep))
        override = override or _hydra(before + quoted(value))
    except ValueError as error:
        return Problem(key, value, str(error), typed(setting(key, value)))
    if override is None:
        return Problem(key, value, "there is no such setting")
    override.input_line = line
    return override


@functools.cache
def _parser() -> OverridesParser:
    return OverridesParser.create()


def _hydra(line: str) -> Override | None:
    """Return what Hydra reads; None if it cannot."""
    try:
        return _parser().parse_override(line)
    except (HydraException, RecursionError):
        return None


def _in_quotes(value: str, is_sweep: bool) -> str:
    """Put the texts of a value that Hydra cannot read into quotes; lists keep their brackets.

    Raises:
        ValueError: with the rule, if the value may mean two things.
    """
    text = value.strip()
    if not (is_sweep or text.startswith(("[", "{"))):
        if "," in text:
            raise ValueError(COMMA_RULE)
        if text.startswith(("'", '"')):
            raise ValueError("begins with a quote that is not closed at its end")
        return quoted(text)
    parts = _PARTS.findall(text)
    if not {"(", ")", "'", '"'}.isdisjoint(parts):
        raise ValueError("texts with quotes or ( ) among several need quotes, each its own")
    return "".join(part if part in "[]{}," else _quoted_entry(part) for part in parts)


def _quoted_entry(text: str) -> str:
    """Quote one text of a list, or the value of `name: value`, unless Hydra can read it."""
    if not text.strip() or _hydra(f"key={text}") is not None:
        return text
    name, colon, value = text.partition(": ")
    return f"{name}: {quoted(value.strip())}" if colon else quoted(text.strip())


def set_value(config: DictConfig, override: Override, groups: Collection[str]) -> Iterator[Problem]:
    """Set one value in a typed config, or yield why it cannot be set."""
    key = override.key_or_group
    text = _text(override)
    node = node_at(config, key)
    if node is None or override.package is not None:
        yield _unknown(config, key, text, groups)
        return
    if override.is_delete():
        yield Problem(key, "(removed)", "a setting cannot be removed; set it to another value")
        return
    if override.is_sweep_override():
        form = typed(setting(key, text)) if isinstance(node, StringNode) else None
        yield Problem(key, text, COMMA_RULE if form else "several values need --multirun", form)
        return
    group, _, name = key.partition(".")
    if name == "kind" and kinds(group):
        if is_import_path(override.value()):  # the composition has made the section of this kind
            return
        yield Problem(key, text, f"is set by the choice of {group}", f"{group}={text}")
        return
    value: Any = override.value()
    if isinstance(node, StringNode) and isinstance(value, int | float | list | dict):
        value = text  # 2M, 1e6, 0123 and [a] stay as written where a text is wanted
    try:
        _update(config, key, _at_home(value))
    except OmegaConfBaseException as error:
        rule, near = _type_rule(node, text, error)
        yield Problem(key, text, rule, _as_it_was(node) if near is None else near)


def _as_it_was(node: Node) -> object | None:
    """Return the value that a number or text has without the override; None if there is none."""
    is_plain = isinstance(node, tuple(_PLAIN))
    if not is_plain or node._is_missing() or node._is_interpolation():
        return None
    return "null" if node._is_none() else node._value()


def as_it_stands(text: str) -> str:
    r"""Write a text so that OmegaConf reads it back: ${x} names no other setting, ??? is no gap."""
    if text == "???":
        return "${oc.decode:'\"???\"'}"
    return _INTERPOLATION.sub(lambda found: "\\" + 2 * found[1] + "${", text)


def _at_home(value: Any) -> Any:
    """Put the home folder in place of ~/, as bash does in `run_dir=~/runs/x`; zsh does not."""
    if isinstance(value, list):
        return [_at_home(one) for one in value]
    return os.path.expanduser(value) if str(value).startswith("~/") else value


def _text(override: Override) -> str:
    """Return the value as the user wrote it."""
    return (override.input_line or "").partition("=")[2]


def node_at(config: DictConfig, key: str) -> Node | None:
    """Return the node at a dotted path, or None where the schema has no such setting.

    Where names are the user's own, as those of sources, a new one is a setting like any other.
    """
    node: Node | None = config
    for part in key.split("."):
        if isinstance(node, ListConfig) and part.isdecimal() and int(part) < len(node):
            node = cast("Node", node._get_node(int(part)))
        elif isinstance(node, DictConfig) and part in node.keys():  # noqa: SIM118 (`in` hides ???)
            node = node._get_node(part)
        elif isinstance(node, DictConfig):
            node = _new_entry(node, part)
        else:
            return None
    return node


def _update(config: DictConfig, key: str, value: Any) -> None:
    """Set a value; entries on the way to it that do not exist yet are made with it."""
    there, rest = key, []
    while OmegaConf.select(config, there, throw_on_missing=False) is None and "." in there:
        there, _, last = there.rpartition(".")
        rest.append(last)
    if rest and OmegaConf.select(config, there, throw_on_missing=False) is None:
        section = cast("DictConfig", config._get_node(there))  # such as the cluster of `check`
        config[there] = OmegaConf.structured(section._metadata.ref_type)
    if len(rest) > 1:
        for part in rest:
            value = {part: value}
        OmegaConf.update(config, there, value, merge=True, force_add=True)
    else:
        OmegaConf.update(config, key, value, merge=True, force_add=True)


def _new_entry(node: DictConfig, name: str) -> Node | None:
    """Return what an entry of a new name would be, or None where names are given."""
    kind = node._metadata.object_type
    if node._is_none():  # a section that may be left out, such as the stream of a source
        optional = OmegaConf.structured(node._metadata.ref_type)
        return optional._get_node(name) if name in optional.keys() else None  # noqa: SIM118
    if kind is not dict:
        return None
    element = node._metadata.element_type
    if is_dataclass(element):
        return cast("Node", OmegaConf.structured(element))
    if element is str:
        return StringNode(None, is_optional=True)
    return FloatNode(None, is_optional=True) if element is float else None


def setting_names(config: DictConfig, prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every setting."""
    for name in map(str, config):
        node = config._get_node(name)
        path = f"{prefix}{name}"
        yield path
        if isinstance(node, DictConfig) and not node._is_none():
            yield from setting_names(node, f"{path}.")


def _unknown(config: DictConfig, key: str, text: str, groups: Collection[str]) -> Problem:
    """Say that there is no such setting, and which one is meant."""
    group, _, name = key.partition(".")
    section = OmegaConf.select(config, group) if "." in key else None
    chosen = section.get("kind") if isinstance(section, DictConfig) else None
    owners = [
        kind
        for kind, schema in kinds(group).items()
        if name in getattr(schema, "__dataclass_fields__", {})
    ]
    if chosen and owners:
        rule = f"{group}={chosen} has no such setting; {group}={' or '.join(owners)} has"
        return Problem(key, text, rule)
    is_part = text.startswith("{")  # then a section is meant, else a single setting
    known = {
        name
        for name in setting_names(config)
        if isinstance(node_at(config, name), DictConfig) == is_part
    }
    near = nearest_key(key, known if "." in key else {*known, *groups})
    return Problem(key, text, "there is no such setting", near and typed(f"{near}={text}"))


def _type_rule(node: Node, text: str, error: Exception) -> tuple[str, object | None]:
    """Return the rule that a value broke by its type, and the nearest value that keeps it."""
    if isinstance(node, EnumNode):
        members = list(node.enum_type.__members__)
        return f"must be one of {', '.join(members)}", nearest(text, members)
    for kind, rule in _PLAIN.items():
        if isinstance(node, kind):
            return rule, _nearest_whole(node, text) if kind is IntegerNode else None
    if isinstance(node, BooleanNode):
        return "must be true or false", nearest(text.lower(), ["true", "false"])
    if isinstance(node, DictConfig):
        return "is a section, not a single setting; set one of its keys", None
    said = str(error).partition("\n")[0]
    return _list_rule(node, text, said) if isinstance(node, ListConfig) else (said, None)


def _list_rule(node: ListConfig, text: str, said: str) -> tuple[str, object | None]:
    """Say what is wrong with a list or an entry of it, from what OmegaConf says of the entry."""
    if not (text.startswith("[") and text.endswith("]")):
        return "must be a list, such as [a,b]", None if text[:1] in ("[", "{") else f"[{text}]"
    schema = node._metadata.element_type
    is_schema = isinstance(schema, type) and is_dataclass(schema)
    if is_schema and (key := re.match(r"Key '(.+)' not in '(\w+)'", said)):
        known = [one.name for one in fields(schema)]
        if key[2] != schema.__name__:
            return f"a part of an entry has no setting {key[1]}", None
        near = nearest(key[1], known)
        of_entry = f"an entry has no setting {key[1]}; it has {', '.join(known)}"
        return of_entry, near and re.sub(rf"\b{re.escape(key[1])}(?=:)", near, text)
    if value := re.match(r"Invalid value '(.+)', expected one of \[(.+)\]", said):
        near = nearest(value[1], value[2].split(", "))
        return f"{value[1]} must be one of {value[2]}", near and text.replace(value[1], near)
    if "is not a ListConfig" in said:
        return "a value in an entry must be a list, such as [a]", None
    return said, None


def _nearest_whole(node: Node, text: str) -> object | None:
    """Return the nearest whole number to a number that is none, within the limits of its field."""
    try:
        number = float(text)
    except ValueError:
        return None
    if math.isnan(number):
        return None
    whole = round(max(-_FAR, min(number, _FAR)))  # infinity has no whole number beside it
    parent = node._get_parent()
    schema = parent._metadata.object_type if isinstance(parent, DictConfig) else None
    return within_limits(schema, str(node._key()), whole) if is_dataclass(schema) else whole
