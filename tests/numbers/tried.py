"""Every number that a config can hold, and the values that are tried for it.

A field counts once, by the class that has it; where a job uses the class twice, the first place is
taken. What a base brings along gives a field something to act on.
"""

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints
from unittest import mock

from hybrid_train.config import compose, overrides
from hybrid_train.schema.limits import Range, Tokens, TokensOrShare
from hybrid_train.schema.problems import ConfigError

TRIED = ("nan", "inf", "-inf", "-1", "0", "1", "1e30", "", "[1]", "{a: 1}")
MORE = (str(10**30), "1e400", "true", "null", "0.5", "2", "3", "4", "8", "1e-30")
TINY = (
    *("experiment=tiny_cpu", "data=streams", "runtime.threads=1", "runtime.peak_tflops=1"),
    *("train.sequence_length=16", "train.microbatch=1", "train.global_batch=1", "train.tokens=32"),
    *("train.validation_batches=1", "schedule.warmup_tokens=0", "checkpoint.async_save=false"),
    *("model.pattern=M*E-/*E", "model.hidden_size=16", "model.attention.heads=2"),
    *("model.attention.kv_heads=1", "model.attention.head_dim=8", "model.mamba.heads=2"),
    *("model.mamba.head_dim=16", "model.mamba.groups=1", "model.mamba.chunk_size=8"),
    *("model.mamba.state_size=4", "model.mlp.intermediate_size=16", "model.moe.latent_size=8"),
    *("model.moe.intermediate_size=16", "model.moe.shared_intermediate_size=16"),
    *(
        f"data.sources.{name}.{name}.{count}"
        for name in ("copy", "recall", "brackets", "sums")
        for count in ("documents=60", "validation_documents=8", "max_items=6")
    ),
)
FILES = ("input=[setup.py]", "output=unused")
# Jobs, and what makes their defaults a config without problems; the run folder is put in later.
BASES = {
    "train": TINY,
    "check": ("experiment=tiny_cpu",),
    "rehearse": ("experiment=tiny_cpu",),
    "submit": ("experiment=tiny_cpu", "cluster=slurm_cpu"),
    "distill_targets": ("experiment=tiny_cpu", "objective.teacher=tests", "output=unused"),
    "study": ("study=long_context",),
    "generate": ("checkpoint=tests", "prompt=a"),
    "evaluate": ("checkpoint=tests", "tasks=sums"),
    "importance": ("checkpoint=tests", "output=unused"),
    "prune": ("checkpoint=tests", "output=unused", "share=0.5"),
    "count": ("model=tiny", "model.vocab_size=256"),
    "convert": ("import=tests", "output=unused"),
    "verify": ("checkpoint=tests", "hf=tests"),
    "data_show": ("run_dir=tests", "step=1"),
    "data_tokenize": (*FILES, "tokenizer=tests"),
    "data_split": ("input=[tests]", "output=unused", "shares=[0.5,0.5]"),
    "data_split.tokens": ("input=[tests]", "output=unused", "tokens_per_shard=1k"),
    "data_inspect": ("input=[tests]",),
    "data_train_tokenizer": FILES,
    "train.quickstart": ("experiment=tiny_cpu",),
    "train.taught": (
        "experiment=tiny_cpu",
        "objective=distill",
        "objective.teachers=[{checkpoint: tests}]",
    ),
}
ONE_FACTOR = (
    *(f"model.attention.rope.{one}" for one in ("theta=100", "fraction=0.25", "scaling=longrope")),
    *(f"model.attention.rope.{one}=[1]" for one in ("short_factors", "long_factors")),
)
# What a setting needs beside it to have something to do.
BESIDE = {
    "train.phases": (
        "train.phases=[{name: a},{name: b,start: 50%}]", "train.global_batch=2", "train.tokens=128",
        "data.packing=none",
    ),
    # Of a head of 8 channels two turn, with one factor, or all, whose waves are 6 to 199 tokens.
    "model.attention.rope.short_factors": ONE_FACTOR,
    "model.attention.rope.long_factors": (
        *ONE_FACTOR, "model.attention.rope.original_length=8", "data.packing=none",
    ),
    "model.attention.rope.maximum_length": (
        *(f"model.attention.rope.{one}" for one in ("theta=100", "scaling=longrope")),
        *(f"model.attention.rope.{one}=[1,1,1,1]" for one in ("short_factors", "long_factors")),
        *("model.attention.rope.original_length=2", "model.attention.rope.maximum_length=64"),
        "data.packing=none",
    ),
    "model.attention.rope": (
        *(f"model.attention.rope.{one}" for one in ("theta=100", "scaling=llama3")),
        "model.attention.rope.original_length=32",
    ),
    "model.layers": ("model.layers=[{layers: all,mlp: {intermediate_size: 8}}]",),
    # In packed rows of few tokens MTP may find no label.
    "train.sequence_length": ("data.packing=none",),
    "train.batch_ramp": ("train.batch_ramp.tokens=32", "train.global_batch=4", "train.tokens=128"),
    "train.microbatch": ("train.global_batch=2",),
    "train.validation": ("train.tokens=48",),
    "data.sources.copy": ("data.blend.copy=1000",),
    "data.validation_blend": ("data.validation_blend={copy: 5,sums: 1}",),
    "precision.amax_history": ("precision.format=fp8_delayed", "train.tokens=64"),
    "precision.statistics_interval": ("precision.format=fp8_tensorwise",),
    "parallel.bucket_parameters": ("parallel.overlap_grad_reduce=true",),
    "parallel.recompute_layers": ("parallel.recompute=full",),
    "profile": ("profile.tool=torch", "profile.start=1", "profile.steps=1"),
    "schedule.decay_tokens": ("schedule.decay_tokens=24",),
    "schedule.final_lr_ratio": ("schedule.decay_tokens=24",),
    "checkpoint.keep": ("checkpoint.interval=1",),
}  # fmt: skip
# A training run whose lists have something in them.
LISTED = (*BESIDE["train.phases"], *BESIDE["model.layers"])


@dataclass(frozen=True)
class Field:
    """A field that holds numbers."""

    base: str  # of BASES
    path: str
    owner: str  # name of the class and of the field in it
    shape: str  # number, text, list, dict
    ends: tuple[str, ...]  # of its range

    def lines(self) -> Iterator[str]:
        """Yield the overrides that are tried."""
        for value in dict.fromkeys((*TRIED, *MORE, *self.ends)):
            if self.shape == "dict":
                yield f"{self.path}.copy={value}"
            elif self.shape == "list" and value[:1] not in ("[", "{", ""):
                yield f"{self.path}=[{value}]"
            else:
                yield f"{self.path}={value}"
        if self.shape in ("dict", "list"):
            yield from (f"{self.path}={value}" for value in ("", "nan", "1", "[nan,1]", "{a: nan}"))

    @property
    def beside(self) -> tuple[str, ...]:
        """What has to be set, too."""
        return next((BESIDE[start] for start in BESIDE if self.path.startswith(start)), ())


@cache
def fields_of(base: str) -> list[Field]:
    """Return the fields of a base."""
    found: dict[str, Field] = {}
    extra = LISTED if base == "train" else ()
    for one in _walk(composer(base).job(*extra), base, ""):
        found.setdefault(one.owner, one)
    return list(found.values())


@cache
def every() -> list[Field]:
    """Return the fields of all bases, each once."""
    found: dict[str, Field] = {}
    for base in BASES:
        for one in fields_of(base):
            found.setdefault(one.owner, one)
    return list(found.values())


def numeric_owners(schema: type[Any]) -> set[str]:
    """Return the fields below a schema that hold numbers, those of optional parts, too."""
    found = set()
    for field in fields(schema):
        hint = get_type_hints(schema, include_extras=True)[field.name]
        if _shape(hint):
            found.add(_owner(schema, field.name))
        for part in _inside(hint):
            found |= numeric_owners(part)
    return found


def _inside(hint: Any) -> Iterator[type[Any]]:
    if is_dataclass(hint):
        yield hint
    elif get_origin(hint) is not Annotated:
        for inner in get_args(hint):
            yield from _inside(inner)


def _owner(schema: type[Any], name: str) -> str:
    owner = next(
        one for one in reversed(schema.__mro__) if name in getattr(one, "__annotations__", {})
    )
    return f"{owner.__name__}.{name}"


def _walk(section: Any, base: str, path: str) -> Iterator[Field]:
    schema: Any = type(section)
    for field in fields(section):
        hint = get_type_hints(schema, include_extras=True)[field.name]
        place, value = f"{path}{field.name}", getattr(section, field.name)
        if shape := _shape(hint):
            owner = _owner(schema, field.name)
            yield Field(base, place, owner, shape, tuple(map(str, _ends(hint))))
        parts = {place: value}
        if isinstance(value, list):
            parts = {f"{place}.{number}": one for number, one in enumerate(value)}
        elif isinstance(value, dict):
            parts = {f"{place}.{name}": one for name, one in value.items()}
        for where, part in parts.items():
            if is_dataclass(part) and where != "train.phases.0":  # its start is fixed
                yield from _walk(part, base, f"{where}.")


def _shape(hint: Any) -> str | None:
    """Say how a type holds numbers; None if it holds none."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint in (int, float):
        return "number"
    if origin is Annotated:
        if inner[0] is not str:
            return _shape(inner[0])
        return "text" if isinstance(inner[1], Tokens | TokensOrShare) else None
    if origin in (Union, UnionType):
        return next(filter(None, map(_shape, inner)), None)
    if origin in (list, dict) and _shape(inner[-1]) == "number":
        return "list" if origin is list else "dict"
    return None


def _ends(hint: Any) -> Iterator[float]:
    if get_origin(hint) is Annotated:
        for limit in hint.__metadata__:
            if isinstance(limit, Range):
                yield from (limit.low, limit.high)
    for inner in get_args(hint):
        yield from _ends(inner)


@cache
def composer(base: str) -> "Composer":
    """Return what composes a base."""
    return Composer(base)


class Composer:
    """Composes a base once, and then with further overrides each time."""

    def __init__(self, base: str) -> None:
        self._job = base.partition(".")[0]
        self._draft = compose.draft(self._job, BASES[base])
        assert not self._draft.problems, self._draft.problems
        self._groups = compose.group_names(self._job)

    def job(self, *lines: str) -> Any:
        """Return the job with the overrides.

        Raises:
            ConfigError: as `compose` does.
        """
        given = overrides.read(lines, self._groups)
        config = copy.deepcopy(self._draft.config)
        problems = [*given.problems]
        for override in given.values:
            problems.extend(overrides.set_value(config, override, self._groups))
        draft = dataclasses.replace(self._draft, config=config, problems=problems)
        with mock.patch.object(compose, "draft", return_value=draft):
            return compose.compose(self._job, [])

    def refusal(self, *lines: str) -> str | None:
        """Return what is said about the overrides, None if they are accepted."""
        try:
            self.job(*lines)
        except ConfigError as error:
            return str(error)
        return None
