"""The table of schemas, by group and kind, and their registration with Hydra.

A YAML file of a group starts from `/schema/GROUP/KIND`; a saved run finds the class of a section
again by the `kind` it wrote. Groups with one schema only call it `base`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from hybrid_train.config.commands import ROOTS
from hybrid_train.schema.checkpoint import Checkpoint
from hybrid_train.schema.cluster import Cluster
from hybrid_train.schema.data import Data, Quickstart
from hybrid_train.schema.limits import MOST_TOKENS
from hybrid_train.schema.model import Model
from hybrid_train.schema.objective import OBJECTIVES
from hybrid_train.schema.optimizer import AdamW
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import Precision
from hybrid_train.schema.profile import Profile
from hybrid_train.schema.recovery import Recovery
from hybrid_train.schema.runtime import Runtime
from hybrid_train.schema.schedule import Cosine, Schedule, Wsd
from hybrid_train.schema.tracking import Tracking
from hybrid_train.schema.units import is_tokens, tokens

SCHEMAS: dict[tuple[str, str], type[Any]] = {
    **{("job", root): command.schema for root, command in ROOTS.items() if command.schema},
    ("model", "base"): Model,
    ("parallel", "base"): Parallel,
    ("precision", "base"): Precision,
    ("data", "files"): Data,
    ("data", "quickstart"): Quickstart,
    ("optimizer", "adamw"): AdamW,
    ("schedule", "constant"): Schedule,
    ("schedule", "cosine"): Cosine,
    ("schedule", "wsd"): Wsd,
    **{("objective", kind): schema for kind, schema in OBJECTIVES.items()},
    ("checkpoint", "base"): Checkpoint,
    ("recovery", "base"): Recovery,
    ("tracking", "base"): Tracking,
    ("runtime", "base"): Runtime,
    ("profile", "base"): Profile,
    ("cluster", "base"): Cluster,
}


@cache  # of all commands it would be half of the time of a composition
def register(job_name: str) -> None:
    """Make the schemas that a command needs known to Hydra: those of all groups, and its own.

    A second call changes nothing.
    """
    _register_groups()
    if ("job", job_name) in SCHEMAS:
        schema = SCHEMAS["job", job_name]
        ConfigStore.instance().store(group="schema/job", name=job_name, node=schema)


@cache
def _register_groups() -> None:
    """Make schemas known to Hydra as `schema/GROUP/KIND`, and `${share:PART,TOKENS}` to YAML."""
    OmegaConf.register_new_resolver("share", share, replace=True)
    store = ConfigStore.instance()
    for (group, kind), schema in SCHEMAS.items():
        if group != "job":
            store.store(group=f"schema/{group}", name=kind, node=schema)
    # Hydra copies its sources twice a composition, each time with all schemas, and changes none.
    vars(store)["__deepcopy__"] = lambda _: store


@contextmanager
def root_without_file(job_name: str) -> Iterator[None]:
    """Let the schema of a job be its root for as long as the block lasts.

    Beside a file of this name Hydra would take the schema for one of Hydra 1.0, and warn.
    """
    store = ConfigStore.instance()
    store.store(name=job_name, node=SCHEMAS[("job", job_name)])
    try:
        yield
    finally:
        del store.repo[f"{job_name}.yaml"]


@contextmanager
def sections_of(job_name: str, sections: dict[str, DictConfig]) -> Iterator[None]:
    """Let the schema of a job have sections of other kinds for as long as the block lasts."""
    store, schema = ConfigStore.instance(), SCHEMAS.get(("job", job_name))
    if schema is None or not sections:
        yield
        return
    root = OmegaConf.structured(schema)
    for place, section in sections.items():
        root[place] = section
    store.store(group="schema/job", name=job_name, node=root)
    try:
        yield
    finally:
        store.store(group="schema/job", name=job_name, node=schema)


def share(part: float, total: str) -> str:
    """Return a part of a number of tokens, so that the phases of a schedule follow its length."""
    # A total that is no number, or beyond the limit, is reported where it stands, once.
    is_sound = is_tokens(total) and tokens(total) <= MOST_TOKENS
    return str(round(part * tokens(total))) if is_sound else "0"


def kinds(group: str) -> dict[str, type[Any]]:
    """Return the schemas of a group by kind; empty for a group that is not in the table."""
    return {kind: schema for (owner, kind), schema in SCHEMAS.items() if owner == group}
