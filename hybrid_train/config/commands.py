"""The table of commands: what each is called, its settings, and the module that carries it out.

A command without groups of choices needs no file in conf/: its settings are those of its schema.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from hybrid_train.schema.check import CheckJob
from hybrid_train.schema.convert import ConvertJob
from hybrid_train.schema.count import CountJob
from hybrid_train.schema.doctor import DoctorJob
from hybrid_train.schema.generate import GenerateJob
from hybrid_train.schema.prepare import (
    CountTokensJob,
    InspectJob,
    MergeJob,
    SplitJob,
    TokenizeJob,
    TrainTokenizerJob,
    VerifyTokensJob,
)
from hybrid_train.schema.report import ReportJob, StatusJob
from hybrid_train.schema.resume import ResumeJob
from hybrid_train.schema.show import IndexJob, ShowJob
from hybrid_train.schema.study import StudyJob
from hybrid_train.schema.submit import SubmitJob
from hybrid_train.schema.train import TrainJob
from hybrid_train.schema.verify import VerifyJob

_JOBS = "hybrid_train.jobs"
_EXPERIMENTS = "`hybrid-train recipes` lists experiments with everything set"
_MODELS = "`hybrid-train models` lists the models that have a name: model=NAME"
_STUDIES = "name=NAME takes one that is ready: `hybrid-train study --help` lists them"


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: what it does, as what follows its name in a sentence.
        module: has run(job), or run(words) where there is no schema.
        schema: the dataclass of its settings; None: it has none.
        texts: settings that take text as it stands: commas and * mean nothing to Hydra there.
        words: words of the command line for groups of conf/ that have another name.
        ready: what to say of choices that are ready, where something is not set.
        says_what_starts: whether a line comes first: its module takes seconds to import (torch).
    """

    summary: str
    module: str
    schema: type[Any] | None = None
    texts: tuple[str, ...] = ()
    words: dict[str, str] = field(default_factory=dict)
    ready: str = ""
    says_what_starts: bool = False

    @property
    def prints_json(self) -> bool:
        """Whether it prints one JSON object if asked."""
        return self.schema is not None and "json" in {
            one.name for one in dataclasses.fields(self.schema)
        }


# A name of two words is a command of a family: `hybrid-train data tokenize`.
COMMANDS = {
    "train": Command(
        "trains a model, or goes on with a run that stopped",
        f"{_JOBS}.train",
        TrainJob,
        ready=_EXPERIMENTS,
        says_what_starts=True,
    ),
    "resume": Command(
        "goes on with a run as its folder says",
        f"{_JOBS}.resume",
        ResumeJob,
        texts=("overrides",),
        says_what_starts=True,
    ),
    "check": Command(
        "checks a training run for processes=N and prints its plan",
        f"{_JOBS}.check",
        CheckJob,
        ready=_EXPERIMENTS,
    ),
    "submit": Command(
        "queues a training run on a cluster with SLURM",
        f"{_JOBS}.submit",
        SubmitJob,
        ready=_EXPERIMENTS,
    ),
    "status": Command(
        "says how a run is: state, progress, attempts; of several, a line each",
        f"{_JOBS}.status",
        StatusJob,
        texts=("run_dir",),
    ),
    "report": Command(
        "writes a page with the curves of a run, or of several over each other",
        f"{_JOBS}.report",
        ReportJob,
        texts=("run_dir",),
    ),
    "generate": Command(
        "writes text with a trained model",
        f"{_JOBS}.generate",
        GenerateJob,
        texts=("prompt",),
        says_what_starts=True,
    ),
    "study": Command(
        "compares variants of a run with a baseline, several seeds each",
        f"{_JOBS}.study",
        StudyJob,
        texts=("overrides",),
        words={"name": "study"},
        ready=_STUDIES,
        says_what_starts=True,
    ),
    "recipes": Command("lists the experiments that are ready to run", f"{_JOBS}.recipes"),
    "models": Command("lists the models that have a name", f"{_JOBS}.models"),
    "doctor": Command(
        "examines this machine: libraries, GPUs, limits, speed; and says what to mend",
        f"{_JOBS}.doctor",
        DoctorJob,
    ),
    "count": Command(
        "counts parameters, tensors, FLOPs and cache of a model",
        f"{_JOBS}.count",
        CountJob,
        ready=_MODELS,
    ),
    "convert": Command(
        "turns a Hugging Face folder into a checkpoint, or back",
        f"{_JOBS}.convert",
        ConvertJob,
        says_what_starts=True,
    ),
    "verify": Command(
        "compares a checkpoint with a Hugging Face folder: tensors, logits",
        f"{_JOBS}.verify",
        VerifyJob,
        says_what_starts=True,
    ),
    "data tokenize": Command(
        "turns text into token files; goes on after a kill",
        f"{_JOBS}.data_tokenize",
        TokenizeJob,
        texts=("input",),
    ),
    "data merge": Command(
        "joins token files of one tokenizer", f"{_JOBS}.data_merge", MergeJob, texts=("input",)
    ),
    "data split": Command(
        "splits token files by shares or by tokens",
        f"{_JOBS}.data_split",
        SplitJob,
        texts=("input",),
    ),
    "data inspect": Command(
        "shows lengths and documents of token files",
        f"{_JOBS}.data_inspect",
        InspectJob,
        texts=("input",),
    ),
    "data count": Command(
        "counts documents and tokens of token files",
        f"{_JOBS}.data_count",
        CountTokensJob,
        texts=("input",),
    ),
    "data verify": Command(
        "reads token files whole and checks them: checksums, index, token ids",
        f"{_JOBS}.data_verify",
        VerifyTokensJob,
        texts=("input",),
    ),
    "data index": Command(
        "builds the indices of a run's data ahead and prints its blend",
        f"{_JOBS}.data_index",
        IndexJob,
        says_what_starts=True,
    ),
    "data show": Command(
        "shows what a run reads at a step", f"{_JOBS}.data_show", ShowJob, says_what_starts=True
    ),
    "data train_tokenizer": Command(
        "trains a byte-level BPE tokenizer on text",
        f"{_JOBS}.data_train_tokenizer",
        TrainTokenizerJob,
        texts=("input", "special_tokens"),
    ),
}
ROOTS = {name.replace(" ", "_"): command for name, command in COMMANDS.items()}


def root_of(name: str) -> str:
    """Return the name that a command has in conf/: "data tokenize" -> "data_tokenize"."""
    return name.replace(" ", "_")
