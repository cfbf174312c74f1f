"""Overrides of the command line: read them, and set typed values, collecting every problem."""

import keyword
import math
import re
import shlex
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, cast

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, Node, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import BooleanNode, EnumNode, FloatNode, IntegerNode, StringNode

from hybrid_train.config.names import nearest
from hybrid_train.config.problems import Problem, within_limits
from hybrid_train.config.registry import kinds

_ASSIGNMENT = re.compile(r"(?:\+{0,2})([A-Za-z_][\w./@:-]*)=(.*)", re.DOTALL)
_PLAIN: dict[type[Node], str] = {
    IntegerNode: "must be a whole number",
    FloatNode: "must be a number",
    StringNode: "must be a text",
}
_FAR = 1e30  # beyond every limit
_DELETION = re.compile(r"~[A-Za-z_][\w./@:-]*(=.*)?", re.DOTALL)


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
    for line in lines:
        match = _ASSIGNMENT.fullmatch(line)
        if match and keyword.iskeyword(match[1]):  # import=...: no field can be called so
            _sort(f"{match[1]}_={match[2]}", given, groups)
        elif match and match[1] in raw_keys:
            given.texts.setdefault(match[1], []).append(match[2])
        elif match is None and _DELETION.fullmatch(line) is None:
            given.problems.append(Problem(line, "(nothing)", "write settings as KEY=VALUE"))
        else:
            _sort(line, given, groups)
    return given


def _sort(line: str, given: Given, groups: Collection[str]) -> None:
    """Parse one override and put it where it belongs."""
    key, _, value = line.lstrip("+~").partition("=")
    try:
        override = OverridesParser.create().parse_override(line)
    except HydraException:
        given.problems.append(
            Problem(key, value, "has characters with a meaning of their own", _quoted(key, value))
        )
        return
    if override.is_sweep_override():
        rule = "several values need --multirun; a value with a comma in it needs quotes"
        given.problems.append(Problem(key, value, rule, _quoted(key, value)))
    elif override.key_or_group in groups or override.is_hydra_override():
        given.groups.append(override)
    else:
        given.values.append(override)


def _quoted(key: str, value: str) -> str:
    """Write the override so that both the shell and Hydra's grammar take the value as text."""
    inner = value.replace('"', '\\"')
    return shlex.quote(f'{key}="{inner}"')


def set_value(config: DictConfig, override: Override, groups: Collection[str]) -> Iterator[Problem]:
    """Set one value in a typed config, or yield why it cannot be set."""
    key = override.key_or_group
    text = _text(override)
    if override.is_delete():
        yield Problem(key, "(removed)", "a setting cannot be removed; set it to another value")
        return
    node = node_at(config, key)
    if node is None or override.package is not None:
        yield _unknown(config, key, text, groups)
        return
    group, _, name = key.partition(".")
    if name == "kind" and kinds(group):
        yield Problem(key, text, f"is set by the choice of {group}", f"{group}={text}")
        return
    value: Any = override.value()
    if isinstance(node, StringNode) and isinstance(value, int | float):
        value = text  # 2M, 1e6 and 0123 stay as written where a text is wanted
    try:
        _update(config, key, value)
    except OmegaConfBaseException as error:
        rule, near = _type_rule(node, text, error)
        yield Problem(key, text, rule, _as_it_was(node) if near is None else near)


def _as_it_was(node: Node) -> object | None:
    """Return the value that a number or text has without the override; None if there is none."""
    is_plain = isinstance(node, tuple(_PLAIN))
    if not is_plain or node._is_missing() or node._is_interpolation():
        return None
    return "null" if node._is_none() else node._value()


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
    near = nearest(key, setting_names(config) if "." in key else {*setting_names(config), *groups})
    return Problem(key, text, "there is no such setting", near and f"{near}={text}")


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
    if isinstance(node, ListConfig) and text[:1] not in ("[", "{"):
        return "must be a list", f"[{text}]"
    return str(error).partition("\n")[0], None


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
