"""Prompts of a job: from its command line, from a file of text lines, from a file of JSON lines."""

import dataclasses
import enum
import json
import logging
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hybrid_train.generation.chat import require_messages
from hybrid_train.schema.job_roots import AnswerSettings, GenerateJob
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import UserError, collect

GENERATED = "generated"  # the field of an output line that an input line must not have
_FORMS = ("prompt", "messages", "tokens")  # one of them is what is answered
_SETTINGS = {one.name: one for one in dataclasses.fields(AnswerSettings)}
_KNOWN = {*_FORMS, *_SETTINGS, "id", "tools"}  # fields of a line that mean something
_OF_JOB = {one.name for one in dataclasses.fields(GenerateJob)} - _KNOWN
_OF_CHAT = ("reasoning", "template", "template_variables")  # settings that a template alone reads
_SEEDS_APART = 2**32  # between the seeds of prompts that have none of their own
_SEEDS = 2**64
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """What is to be answered, and how.

    Attributes:
        name: id of its line, or its number among all prompts, from 1.
        where: what a message calls it: `prompt 1`, or `prompts.jsonl, line 3`.
        content: a text, messages, or token ids.
        tools: of messages: descriptions of functions; None: there are none.
        settings: how it is answered.
        seed: of its first answer.
        fields: all of its line, which the output repeats.
    """

    name: str | int
    where: str
    content: str | list[dict[str, Any]] | list[int]
    tools: Any = None
    settings: AnswerSettings
    seed: int
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, Any]:
        """What the template reads beside the messages, but for the reasoning.

        Raises:
            UserError: if it is no JSON object.
        """
        said = self.settings.template_variables
        found = {} if said is None else _parsed(said, f"{self.where}: template_variables")
        if not isinstance(found, dict):
            raise UserError(f"{self.where}: template_variables = {said}: must be a JSON object")
        return found


def read_prompts(job: GenerateJob) -> list[Prompt]:
    """Return the prompts of the command line, then those of the file, all of them sound.

    Raises:
        UserError: naming the prompt, or file and line, and what is wrong.
    """
    _require_other_output(job)
    common = AnswerSettings(**{name: getattr(job, name) for name in _SETTINGS})
    given: list[tuple[str, dict[str, Any]]] = [
        (f"prompt {number}", {"prompt": text}) for number, text in enumerate(job.prompt, start=1)
    ]
    for number, text in enumerate(job.messages, start=1):
        where = "messages" if len(job.messages) == 1 else f"messages {number}"
        given.append((where, {"messages": _parsed(text, where)}))
    if job.prompt_file is not None:
        given += _lines_of(Path(job.prompt_file))
    prompts = [
        _prompt(fields, where, number, common)
        for number, (where, fields) in enumerate(given, start=1)
    ]
    _require_unlike_names(prompts)
    _require_chat(prompts, common)
    _warn_of_fields(prompts)
    return prompts


def _require_other_output(job: GenerateJob) -> None:
    """Refuse to write answers into the file of the prompts."""
    if job.prompt_file is None or job.output is None:
        return
    prompts, output = Path(job.prompt_file), Path(job.output)
    try:
        is_same = output.samefile(prompts)
    except OSError:  # one is not there, or cannot be looked at, which is said where it is opened
        return
    if is_same:
        raise UserError(
            f"output = {output}: is the file of the prompts, {prompts}; choose another output"
        )


def _lines_of(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the prompts of a file, each with what a message calls it."""
    try:
        if path.is_dir():
            raise UserError(f"prompt_file = {path}: is a folder; name a file of prompts")
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"prompt_file = {path}: cannot be read: {error}") from error
    if not any(line.strip() for line in lines):
        raise UserError(f"prompt_file = {path}: needs one prompt per line; it is empty")
    for number, line in enumerate(lines, start=1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        if path.suffix != ".jsonl":
            yield where, {"prompt": line}
            continue
        fields = _parsed(line, where)
        if not isinstance(fields, dict):
            raise UserError(f'{where}: must be a JSON object such as {{"prompt": "..."}}')
        yield where, fields


def _parsed(text: str, where: str) -> Any:
    """Read JSON that can be written again as UTF-8, and of which nothing is lost."""

    def constant(word: str) -> None:
        raise ValueError(f"{word} is no JSON")

    def number(digits: str) -> float:
        if not math.isfinite(found := float(digits)):
            raise UserError(f"{where}: the number {digits} is beyond those of float64")
        return found

    def fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise UserError(f"{where}: the field {json.dumps(key)} is there twice")
            found[key] = value
        return found

    try:
        found = json.loads(
            text, parse_constant=constant, parse_float=number, object_pairs_hook=fields
        )
        json.dumps(found, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: has half of a surrogate pair, {error.object[error.start]!r}, which is no "
            "character"
        ) from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: is no JSON: {error}") from error
    return found


def _prompt(fields: dict[str, Any], where: str, number: int, common: AnswerSettings) -> Prompt:
    """Make a prompt of a line, or say what is wrong with it."""
    forms = [name for name in _FORMS if name in fields]
    if len(forms) != 1:
        raise UserError(
            f"{where}: needs one of {', '.join(_FORMS)}; it has {' and '.join(forms) or 'none'}"
        )
    if GENERATED in fields:
        raise UserError(f"{where}: the field {GENERATED} is the place of the answer; rename it")
    name = fields.get("id", number)
    if not isinstance(name, str | int) or isinstance(name, bool):
        raise UserError(f"{where}: id = {json.dumps(name)}: must be a text or a whole number")
    settings = _with_own(common, fields, where)
    seed = settings.seed if "seed" in fields else settings.seed + (number - 1) * _SEEDS_APART
    return Prompt(
        name=name, where=where, content=_content(forms[0], fields[forms[0]], where),
        tools=fields.get("tools"), settings=settings, seed=seed % _SEEDS, fields=fields,
    )  # fmt: skip


def seed_of(prompt: Prompt, answer: int) -> int:
    """Return the seed of an answer of a prompt, from 0: they count on."""
    return (prompt.seed + answer) % _SEEDS


def _content(form: str, value: Any, where: str) -> Any:
    if form == "messages":
        try:
            return require_messages(value)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from error
    if form == "prompt" and not isinstance(value, str):
        raise UserError(f"{where}: prompt must be a text")
    if form == "tokens" and not (
        isinstance(value, list) and value and all(type(one) is int and one >= 0 for one in value)
    ):
        raise UserError(f"{where}: tokens must be a list of token ids, at least one")
    return value


def _with_own(common: AnswerSettings, fields: dict[str, Any], where: str) -> AnswerSettings:
    """Put the settings of a line over those of the job."""
    own = {name: fields[name] for name in fields.keys() & _SETTINGS.keys()}
    if not own:
        return common
    if isinstance(own.get("template_variables"), dict):  # a text on the command line alone
        own["template_variables"] = json.dumps(own["template_variables"])
    hints = typing.get_type_hints(AnswerSettings)
    typed = {name: _typed(hints[name], value, f"{where}: {name}") for name, value in own.items()}
    settings = dataclasses.replace(common, **typed)
    problems = list(collect(settings))
    if problems:
        raise UserError("\n".join(f"{where}: {problem}" for problem in problems))
    return settings


def _typed(hint: Any, value: Any, what: str) -> Any:
    """Return a value of JSON as the type of a setting has it."""
    is_union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    kinds = typing.get_args(hint) if is_union else (hint,)
    for kind in kinds:
        if kind is float and type(value) is int:
            is_far = abs(value) > _SEEDS  # beyond every limit, perhaps beyond float64
            return float(value) if not is_far else math.copysign(math.inf, (value > 0) - 0.5)
        if kind == list[str] and isinstance(value, list):
            if all(isinstance(one, str) for one in value):
                return value
        elif isinstance(kind, type) and issubclass(kind, enum.Enum):
            if value in kind.__members__:
                return kind[value]
        elif isinstance(kind, type) and not typing.get_origin(kind) and type(value) is kind:
            return value
    names = " or ".join(_name_of(kind) for kind in kinds)
    raise UserError(f"{what} = {json.dumps(value)}: must be {names}")


def _name_of(kind: Any) -> str:
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return " or ".join(f'"{name}"' for name in kind.__members__)
    words = {
        bool: "true or false", int: "a whole number", float: "a number", str: "a text",
        types.NoneType: "null",
    }  # fmt: skip
    return words.get(kind, "a list of texts")


def _require_chat(prompts: Sequence[Prompt], common: AnswerSettings) -> None:
    """Refuse what a template alone reads where there are no messages: it would do nothing."""
    for prompt in prompts:
        own = [name for name in (*_OF_CHAT, "tools") if prompt.fields.get(name) is not None]
        if own and "messages" not in prompt.fields:
            raise UserError(
                f"{prompt.where}: {own[0]} is for messages alone; leave it out, or write messages"
            )
    given = [name for name in _OF_CHAT if getattr(common, name) is not None]
    if given and not any("messages" in prompt.fields for prompt in prompts):
        raise UserError(
            f"{given[0]}: is for messages alone, and no prompt has them; leave it out, or write "
            "messages"
        )


def _warn_of_fields(prompts: Sequence[Prompt]) -> None:
    """Name fields that look like settings and are none, each once: the output repeats them."""
    seen = set(_KNOWN)
    for prompt in prompts:
        for name in [one for one in prompt.fields if one not in seen]:
            seen.add(name)
            if name in _OF_JOB:
                hint = "is a setting of the whole job, and sets nothing for one prompt"
            elif near := nearest(name, _KNOWN):
                hint = f"sets nothing; if {near} is meant, write that"
            else:
                continue
            _log.warning("%s: the field %s %s", prompt.where, name, hint)


def _require_unlike_names(prompts: Sequence[Prompt]) -> None:
    """Refuse two prompts of one id: their answers could not be told apart."""
    seen: dict[str | int, str] = {}
    for prompt in prompts:
        if prompt.name in seen:
            raise UserError(
                f"{prompt.where}: id {json.dumps(prompt.name)} is that of {seen[prompt.name]}, "
                "too; each prompt needs its own (without one it is the number of the prompt)"
            )
        seen[prompt.name] = prompt.where
