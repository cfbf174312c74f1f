"""The YAML files that a composition reads, looked at before Hydra reads them.

Whatever is wrong with the text of a file is told with its path and line: Hydra, OmegaConf and
PyYAML each stop in their own way, with a traceback or without an end.
"""

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml  # type: ignore[import-untyped]
from omegaconf import OmegaConf

from hybrid_train.config import overrides
from hybrid_train.schema.names import nearest, nearest_key
from hybrid_train.schema.problems import Problem, UserError
from hybrid_train.schema.train import TrainJob

GLOBAL_GROUPS = ("experiment", "study")  # their files set keys of the whole job
_HEADER = re.compile(r"#\s*@package\s*_global_\s*")
_NO_TEXT = re.compile("[\ud800-\udfff\0]")
_MOST_VALUES = 100_000  # of a file, aliases written out
_DEEPEST = 100
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _FaultError(Exception):
    """What is wrong with a file, and in which line."""

    def __init__(self, rule: str, line: int | None = None, value: str = "") -> None:
        super().__init__(rule)
        self.line, self.value = line, value


@dataclass
class Walk:
    """The files that a choice leads to.

    Attributes:
        folders: where files lie; the first is that of the program.
        problems: what is wrong with them.
        files: path and content of each by name, such as experiment/quickstart.
    """

    folders: Sequence[Path]
    problems: list[Problem] = field(default_factory=list)
    files: dict[str, tuple[Path, yaml.MappingNode]] = field(default_factory=dict)
    _above: list[str] = field(default_factory=list)

    def visit(self, name: str) -> None:
        """Read a file and those that its defaults name; one that is not there is skipped."""
        places = [folder / f"{name}.yaml" for folder in self.folders]
        there = [place for place in places if place.exists()]
        if name in self.files or not there:
            return
        try:
            if len({place.read_bytes() for place in there}) > 1:
                raise _FaultError(
                    f"is another file in {there[1].parent}; give that one another name"
                )
            content = _mapping(there[0])
            self.files[name] = there[0], content
            _require_header(name, there[0])
            _refuse_hydra(content)
            for group, choice, line in _included(name, content):
                self._follow(name, f"{group}/{choice}" if group else choice, line)
        except OSError as error:
            self._add(there[0], _FaultError(f"cannot be read: {error.strerror}"))
        except _FaultError as fault:
            self._add(there[0], fault)

    def _follow(self, name: str, next_name: str, line: int) -> None:
        way = [*self._above, name]
        if next_name in way:
            circle = " -> ".join([*way[way.index(next_name) :], next_name])
            raise _FaultError(f"is in a circle of defaults: {circle}", line, next_name)
        if not any((folder / f"{next_name}.yaml").exists() for folder in self.folders):
            rule = f"there is no file {next_name}.yaml in {', '.join(map(str, self.folders))}"
            fault = _FaultError(rule, line, next_name)
            self._add(self.files[name][0], fault, self._alike(next_name))
            return
        self._above.append(name)
        self.visit(next_name)
        self._above.pop()

    def _alike(self, name: str) -> str | None:
        group, _, choice = name.rpartition("/")
        near = nearest(
            choice, [one.stem for f in self.folders for one in (f / group).glob("*.yaml")]
        )
        return near and f"{group}/{near}"

    def _add(self, file: Path, fault: _FaultError, near: str | None = None) -> None:
        place = f"{file}, line {fault.line}" if fault.line else str(file)
        self.problems.append(Problem(place, fault.value or "(its text)", str(fault), near))

    def place(self, key: str) -> tuple[str, str] | None:
        """Return file and line, and the value, of a dotted key; None if no file sets it."""
        if not self.files:
            return None
        root, *rest = self.files
        # An experiment has the last word, and what includes another file the last but one.
        rest.sort(key=lambda name: name.partition("/")[0] not in GLOBAL_GROUPS)
        for name in (*rest, root):
            file, content = self.files[name]
            group = name.partition("/")[0]
            for path in (key, key.removeprefix(f"{group}.")):
                node = _at(content, path.split("."))
                if node is not None:
                    value = node.value if isinstance(node, yaml.ScalarNode) else "(a section)"
                    return f"{file}, line {node.start_mark.line + 1}", value
        return None

    def sets(self, name: str, key: str) -> str | None:
        """Return what a file sets a top-level key to; None if it does not, or is not there."""
        node = _at(self.files[name][1], [key]) if name in self.files else None
        return node.value if isinstance(node, yaml.ScalarNode) else None

    def named_in(self, text: str) -> str | None:
        """Return the file that a text of Hydra names, as in: In 'experiment/mine': ..."""
        named = re.match(r"In '([^']*)'", text)
        return str(self.files[named[1]][0]) if named and named[1] in self.files else None


def walk(job_name: str, choices: Sequence[str], folders: Sequence[Path]) -> Walk:
    """Look at every file of a job.

    Args:
        job_name: name of its root.
        choices: of groups, GROUP=NAME.
        folders: where files lie; the first is that of the program.
    """
    found = Walk(folders)
    found.visit(job_name)
    for choice in choices:
        group, _, name = choice.lstrip("+").partition("=")
        if not choice.startswith("~"):
            found.visit(f"{group}/{name.strip(chr(34))}")
    return found


def explained(error: BaseException, files: Walk | None = None) -> Problem:
    """Turn what Hydra says about files and values into one problem: the key, the file, why."""
    text = " ".join(line.strip() for line in str(error).splitlines())
    rule, _, rest = text.partition(" Config search path:")[0].partition("full_key: ")
    inner: BaseException | None = error
    while inner is not None and not rest:  # Hydra leaves the key to the exception inside its own
        rest = getattr(inner, "full_key", None) or ""
        inner = inner.__cause__ or inner.__context__
    key = rest.split()[0] if rest and not rest.startswith("object_type=") else ""
    place = files.place(key) if files and key else None
    file = files.named_in(rule) if files else None
    where, value = place or (file, "(as composed)")
    rule = rule.rpartition("composing config: ")[2].strip() or "is nothing that can be read"
    if re.search(r"Key '.*' not in '", rule) and where:
        known = overrides.setting_names(OmegaConf.structured(TrainJob))
        return Problem(key, value, f"{where}: there is no such setting", nearest_key(key, known))
    if not key and where:
        return Problem(where, "(its settings)", f"a value of another kind is wanted: {rule}")
    return Problem(key or "conf", value, f"{where}: {rule}" if where else rule)


def text_of(path: Path) -> str:
    """Read a YAML file.

    Raises:
        UserError: if it cannot be read, or is not UTF-8.
    """
    try:
        return _text(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except _FaultError as fault:
        where = f"{path}, line {fault.line}" if fault.line else str(path)
        raise UserError(f"{where}: {fault}") from fault


def _text(data: bytes) -> str:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise _FaultError("is not UTF-8; save the file in this encoding", line) from error
    if text.startswith("\ufeff"):
        raise _FaultError("begins with a byte order mark; save the file as UTF-8 without one", 1)
    return text


def _mapping(path: Path) -> yaml.MappingNode:
    """Read a file whose top level is a mapping, each key once, no alias within itself."""
    if not path.is_file():
        raise _FaultError("is no file")
    text = _text(path.read_bytes())
    try:
        content = yaml.compose(text, Loader=_LOADER)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = text.splitlines()[mark.line] if mark and mark.line < text.count("\n") else ""
        tab = "; YAML is indented with spaces, not tabs" if "\t" in line else ""
        raise _FaultError(f"is no YAML: {error.problem}{tab}", mark and mark.line + 1) from error
    except yaml.YAMLError as error:
        raise _FaultError(f"is no YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise _FaultError("is nested too deeply") from error
    if content is None or (isinstance(content, yaml.ScalarNode) and not content.value):
        raise _FaultError("is empty; an experiment sets keys, such as `train: {tokens: 2M}`")
    if not isinstance(content, yaml.MappingNode):
        kind = "a list" if isinstance(content, yaml.SequenceNode) else "a single value"
        raise _FaultError(f"holds {kind}; settings are written as `key: value`", 1)
    _count(content, {}, [])
    return content


def _count(node: yaml.Node, known: dict[int, int], above: list[int]) -> int:
    """Return the number of values below a node, aliases written out."""
    line = node.start_mark.line + 1
    if id(node) in above:
        raise _FaultError("has an alias (*) that stands within its own anchor (&)", line)
    if len(above) > _DEEPEST:
        raise _FaultError("is nested too deeply", line)
    if isinstance(node, yaml.ScalarNode) and _NO_TEXT.search(node.value):
        raise _FaultError("has a letter that no text can have", line)
    if id(node) not in known:
        below = list(_children(node))
        known[id(node)] = 1 + sum(_count(one, known, [*above, id(node)]) for one in below)
    if known[id(node)] > _MOST_VALUES:
        raise _FaultError(f"has aliases (*) that stand for more than {_MOST_VALUES:,} values", line)
    return known[id(node)]


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _FaultError("has a list or a section as a key", line)
            if not key.tag.endswith((":str", ":merge")):
                rule = f"is a key that YAML reads as {key.tag.rpartition(':')[2]}; put it in quotes"
                raise _FaultError(rule, line, key.value)
            if key.value in seen:
                raise _FaultError("this key stands there twice", line, key.value)
            seen.add(key.value)
            yield value


def _require_header(name: str, path: Path) -> None:
    """Settings of an experiment belong to the whole job, which a first line has to say."""
    group = name.partition("/")[0]
    lines = path.read_text(encoding="utf-8").lstrip().splitlines()
    comments = itertools.takewhile(lambda line: line.startswith("#"), lines)
    if "/" not in name or group not in GLOBAL_GROUPS or any(map(_HEADER.fullmatch, comments)):
        return
    rule = "lacks the first line `# @package _global_`; without it all of it lands in"
    raise _FaultError(f"{rule} {group}.*", 1)


def _refuse_hydra(content: yaml.MappingNode) -> None:
    for key, _ in content.value:
        if key.value == "hydra":
            raise _FaultError(overrides.HYDRA_RULE, key.start_mark.line + 1, "hydra")


def _included(name: str, content: yaml.MappingNode) -> Iterator[tuple[str, str, int]]:
    """Yield group, choice and line of each entry of a defaults list."""
    group = name.rpartition("/")[0]
    defaults = next((value for key, value in content.value if key.value == "defaults"), None)
    if defaults is None:
        return
    if not isinstance(defaults, yaml.SequenceNode):
        raise _FaultError("defaults is a list: `- quickstart`", defaults.start_mark.line + 1)
    for entry in defaults.value:
        line = entry.start_mark.line + 1
        pairs = entry.value if isinstance(entry, yaml.MappingNode) else [(None, entry)]
        for key, value in pairs:
            names = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for one in names:
                if not isinstance(one, yaml.ScalarNode):
                    raise _FaultError("an entry of defaults is NAME or GROUP: NAME", line)
                yield from _entry(group, key and key.value, one, line)


def _entry(
    group: str, key: str | None, value: yaml.ScalarNode, line: int
) -> Iterator[tuple[str, str, int]]:
    """Yield what one entry of a defaults list names, unless it is a schema or nothing."""
    where = (key or "").removeprefix("override ").removeprefix("optional ").strip()
    place, choice = where.partition("@")[0], value.value.partition("@")[0]
    if place.lstrip("/").startswith("hydra"):
        raise _FaultError(overrides.HYDRA_RULE, line, place)
    is_nothing = value.tag.endswith(":null") or choice in ("_self_", "???") or "${" in choice
    if is_nothing or "schema/" in place + choice or "optional " in (key or ""):
        return
    if key is None and choice.startswith("/"):
        yield "", choice[1:], line
    elif key is None:
        yield group, choice, line
    elif place.startswith("/") or not group:
        yield place.lstrip("/"), choice, line
    else:
        yield f"{group}/{place}", choice, line


def _at(node: yaml.Node, parts: Sequence[str]) -> yaml.Node | None:
    for part in parts:
        pairs = node.value if isinstance(node, yaml.MappingNode) else []
        node = next((value for key, value in pairs if key.value == part), None)
        if node is None:
            return None
    return node
