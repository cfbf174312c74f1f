"""The table of schemas, by group and kind, and their registration with Hydra.

A YAML file of a group starts from `/schema/GROUP/KIND`; a saved run finds the class of a section
again by the `kind` it wrote. Groups with one schema only call it `base`.
"""

from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from hybrid_train.schema.check import CheckJob
from hybrid_train.schema.checkpoint import Checkpoint
from hybrid_train.schema.cluster import Cluster
from hybrid_train.schema.convert import ConvertJob
from hybrid_train.schema.count import CountJob
from hybrid_train.schema.data import Data, Quickstart
from hybrid_train.schema.doctor import DoctorJob
from hybrid_train.schema.generate import GenerateJob
from hybrid_train.schema.limits import MOST_TOKENS
from hybrid_train.schema.model import Model
from hybrid_train.schema.objective import NextToken
from hybrid_train.schema.optimizer import AdamW
from hybrid_train.schema.parallel import Parallel
from hybrid_train.schema.precision import Precision
from hybrid_train.schema.prepare import (
    CountTokensJob,
    InspectJob,
    MergeJob,
    SplitJob,
    TokenizeJob,
    TrainTokenizerJob,
    VerifyTokensJob,
)
from hybrid_train.schema.profile import Profile
from hybrid_train.schema.recovery import Recovery
from hybrid_train.schema.report import ReportJob, StatusJob
from hybrid_train.schema.resume import ResumeJob
from hybrid_train.schema.runtime import Runtime
from hybrid_train.schema.schedule import Cosine, Schedule, Wsd
from hybrid_train.schema.show import IndexJob, ShowJob
from hybrid_train.schema.study import StudyJob
from hybrid_train.schema.submit import SubmitJob
from hybrid_train.schema.tracking import Tracking
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.units import is_tokens, tokens
from hybrid_train.schema.verify import VerifyJob

SCHEMAS: dict[tuple[str, str], type[Any]] = {
    ("job", "train"): TrainJob,
    ("job", "check"): CheckJob,
    ("job", "submit"): SubmitJob,
    ("job", "study"): StudyJob,
    ("job", "resume"): ResumeJob,
    ("job", "generate"): GenerateJob,
    ("job", "count"): CountJob,
    ("job", "doctor"): DoctorJob,
    ("job", "convert"): ConvertJob,
    ("job", "verify"): VerifyJob,
    ("job", "status"): StatusJob,
    ("job", "report"): ReportJob,
    ("job", "data_index"): IndexJob,
    ("job", "data_show"): ShowJob,
    ("job", "data_tokenize"): TokenizeJob,
    ("job", "data_merge"): MergeJob,
    ("job", "data_split"): SplitJob,
    ("job", "data_inspect"): InspectJob,
    ("job", "data_count"): CountTokensJob,
    ("job", "data_verify"): VerifyTokensJob,
    ("job", "data_train_tokenizer"): TrainTokenizerJob,
    ("model", "base"): Model,
    ("parallel", "base"): Parallel,
    ("precision", "base"): Precision,
    ("data", "files"): Data,
    ("data", "quickstart"): Quickstart,
    ("optimizer", "adamw"): AdamW,
    ("schedule", "constant"): Schedule,
    ("schedule", "cosine"): Cosine,
    ("schedule", "wsd"): Wsd,
    ("objective", "next_token"): NextToken,
    ("checkpoint", "base"): Checkpoint,
    ("recovery", "base"): Recovery,
    ("tracking", "base"): Tracking,
    ("runtime", "base"): Runtime,
    ("profile", "base"): Profile,
    ("cluster", "base"): Cluster,
}


@cache  # a fifth of the time of a composition
def register() -> None:
    """Make every schema known to Hydra as `schema/GROUP/KIND`, and `${share:PART,TOKENS}` to YAML.

    A second call changes nothing.
    """
    OmegaConf.register_new_resolver("share", share, replace=True)
    store = ConfigStore.instance()
    for (group, kind), schema in SCHEMAS.items():
        store.store(group=f"schema/{group}", name=kind, node=schema)
    # Hydra copies its sources twice a composition, each time with all schemas, and changes none.
    vars(store)["__deepcopy__"] = lambda _: store


def share(part: float, total: str) -> str:
    """Return a part of a number of tokens, so that the phases of a schedule follow its length."""
    # A total that is no number, or beyond the limit, is reported where it stands, once.
    is_sound = is_tokens(total) and tokens(total) <= MOST_TOKENS
    return str(round(part * tokens(total))) if is_sound else "0"


def kinds(group: str) -> dict[str, type[Any]]:
    """Return the schemas of a group by kind; empty for a group that is not in the table."""
    return {kind: schema for (owner, kind), schema in SCHEMAS.items() if owner == group}
