"""The table of commands, each with its settings and what runs it; and commands as text to be typed.

A command without groups of choices needs no file in conf/: its settings are those of its schema.

Two readers take letters for their own: the shell and Hydra's grammar of overrides. Every command
and every setting that a message proposes is written here, so that both give back what was meant.
"""

import dataclasses
import importlib
import re
import shlex
from dataclasses import dataclass, field
from typing import Any

from hybrid_train.schema.importance import ImportanceJob
from hybrid_train.schema.job_roots import (
    CheckJob,
    ConvertJob,
    CountJob,
    DistillTargetsJob,
    DoctorJob,
    EvaluateJob,
    GenerateJob,
    IndexJob,
    LineageJob,
    RehearseJob,
    ReportJob,
    ResumeJob,
    ShowJob,
    StatusJob,
    SubmitJob,
    VerifyJob,
)
from hybrid_train.schema.prepare import (
    CountTokensJob,
    InspectJob,
    MergeJob,
    SplitJob,
    TokenizeJob,
    TrainTokenizerJob,
    VerifyTokensJob,
)
from hybrid_train.schema.pruning import PruneJob
from hybrid_train.schema.study import StudyJob
from hybrid_train.schema.train import TrainJob

# What Hydra reads as plain text. A number is read as one, but a setting of text keeps its letters.
_PLAIN = re.compile(r"[A-Za-z0-9_./:@%+-]+")
_EXPERIMENTS = "`hybrid-train experiments` lists experiments with everything set"
_MODELS = "`hybrid-train models` lists the models that have a name: model=NAME"
_STUDIES = "name=NAME takes one that is ready: `hybrid-train study --help` lists them"


@dataclass(frozen=True)
class Command:
    """One command.

    Attributes:
        summary: what it does, as what follows its name in a sentence.
        entry: "module:function" of `jobs`, which gets the job; words, where there is no schema.
        schema: the dataclass of its settings; None: it has none.
        texts: settings that take text as it stands: commas and * mean nothing to Hydra there.
        words: words of the command line for groups of conf/ that have another name.
        ready: what to say of choices that are ready, where something is not set.
        says_what_starts: whether a line comes first: its module takes seconds to import (torch).
    """

    summary: str
    entry: str
    schema: type[Any] | None = None
    texts: tuple[str, ...] = ()
    words: dict[str, str] = field(default_factory=dict)
    ready: str = ""
    says_what_starts: bool = False

    @property
    def module(self) -> str:
        """The import path of the module that runs it."""
        return f"hybrid_train.jobs.{self.entry.partition(':')[0]}"

    def run(self, job: Any) -> int | None:
        """Run it; its module is imported now."""
        entry = getattr(importlib.import_module(self.module), self.entry.partition(":")[2])
        code: int | None = entry(job)
        return code

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
        "train:run",
        TrainJob,
        ready=_EXPERIMENTS,
        says_what_starts=True,
    ),
    "resume": Command(
        "goes on with a run as its folder says",
        "resume:run",
        ResumeJob,
        texts=("overrides",),
        says_what_starts=True,
    ),
    "check": Command(
        "checks a training run for processes=N and prints its plan",
        "check:run",
        CheckJob,
        ready=_EXPERIMENTS,
    ),
    "rehearse": Command(
        "builds ranks of a training run at true size without a GPU, and compares their calls",
        "rehearse:run",
        RehearseJob,
        ready=_EXPERIMENTS,
        says_what_starts=True,
    ),
    "submit": Command(
        "queues a training run on a cluster with SLURM",
        "submit:run",
        SubmitJob,
        ready=_EXPERIMENTS,
    ),
    "status": Command(
        "says how a run is: state, progress, attempts; of several, a line each",
        "status:run",
        StatusJob,
        texts=("run_dir",),
    ),
    "lineage": Command(
        "says what the weights of a run come from: parents, teachers, and theirs",
        "lineage_tree:run",
        LineageJob,
    ),
    "report": Command(
        "writes a page with the curves of a run, or of several over each other",
        "report:run",
        ReportJob,
        texts=("run_dir",),
    ),
    "generate": Command(
        "writes text with a trained model",
        "generate:run",
        GenerateJob,
        texts=("prompt", "messages", "stop"),
        says_what_starts=True,
    ),
    "evaluate": Command(
        "measures models: held-out text and tasks, with intervals; several side by side",
        "evaluate:run",
        EvaluateJob,
        texts=("checkpoint", "tasks"),
        says_what_starts=True,
    ),
    "distill_targets": Command(
        "runs a teacher over the rows of a run once, and keeps what it says of them",
        "distill_targets:run",
        DistillTargetsJob,
        ready=_EXPERIMENTS,
        says_what_starts=True,
    ),
    "importance": Command(
        "scores what in a trained model matters: channels, neurons, heads, experts, layers",
        "importance:run",
        ImportanceJob,
        texts=("tasks",),
        says_what_starts=True,
    ),
    "study": Command(
        "compares variants of a run with a baseline, several seeds each",
        "study:run",
        StudyJob,
        texts=("overrides",),
        words={"name": "study"},
        ready=_STUDIES,
        says_what_starts=True,
    ),
    "experiments": Command(
        "lists the experiments that are ready to run", "listings:run_experiments"
    ),
    "models": Command("lists the models that have a name", "listings:run_models"),
    "doctor": Command(
        "examines this machine: libraries, GPUs, limits, speed; and says what to fix",
        "doctor:run",
        DoctorJob,
    ),
    "count": Command(
        "counts parameters, tensors, FLOPs and cache of a model",
        "listings:run_count",
        CountJob,
        ready=_MODELS,
    ),
    "convert": Command(
        "turns a folder of Hugging Face or Megatron into a run, or back",
        "convert:run_convert",
        ConvertJob,
        says_what_starts=True,
    ),
    "verify": Command(
        "compares a checkpoint with a Hugging Face folder: tensors, logits",
        "convert:run_verify",
        VerifyJob,
        says_what_starts=True,
    ),
    "prune": Command(
        "cuts a smaller model out of a checkpoint, as a run of its own",
        "prune:run",
        PruneJob,
        says_what_starts=True,
    ),
    "data tokenize": Command(
        "turns text into token files; goes on after a kill",
        "data_tokenize:run_tokenize",
        TokenizeJob,
        texts=("input",),
    ),
    "data merge": Command(
        "joins token files of one tokenizer", "data_files:run_merge", MergeJob, texts=("input",)
    ),
    "data split": Command(
        "splits token files by shares or by tokens",
        "data_files:run_split",
        SplitJob,
        texts=("input",),
    ),
    "data inspect": Command(
        "shows lengths and documents of token files",
        "data_files:run_inspect",
        InspectJob,
        texts=("input",),
    ),
    "data count": Command(
        "counts documents and tokens of token files",
        "data_files:run_count",
        CountTokensJob,
        texts=("input",),
    ),
    "data verify": Command(
        "reads token files whole and checks them: checksums, index, token ids",
        "data_files:run_verify",
        VerifyTokensJob,
        texts=("input",),
    ),
    "data index": Command(
        "builds the indices of a run's data ahead and prints its blend",
        "data_show:run_index",
        IndexJob,
        says_what_starts=True,
    ),
    "data show": Command(
        "shows what a run reads at a step", "data_show:run_show", ShowJob, says_what_starts=True
    ),
    "data train_tokenizer": Command(
        "trains a byte-level BPE tokenizer on text",
        "data_tokenize:run_train_tokenizer",
        TrainTokenizerJob,
        texts=("input", "special_tokens"),
    ),
}
ROOTS = {name.replace(" ", "_"): command for name, command in COMMANDS.items()}


def root_of(name: str) -> str:
    """Return the name that a command has in conf/: "data tokenize" -> "data_tokenize"."""
    return name.replace(" ", "_")


def setting(key: str, value: object) -> str:
    """Return the override that gives a setting of text this value: `run_dir="a (2)"`."""
    return f"{key}={quoted(str(value))}"


def quoted(text: str) -> str:
    """Return a text as Hydra's grammar reads it, in quotes where it needs them."""
    if _PLAIN.fullmatch(text) and text.lower() != "null":
        return text
    from hydra.core.override_parser.types import Quote, QuotedString  # takes a moment to import

    return str(QuotedString(text, Quote.double).with_quotes())


def typed(*words: str) -> str:
    """Return words as they are typed into a shell, `typed(setting("run_dir", path))` for one."""
    # What shlex leaves bare means nothing to zsh either, but for a = that begins a word.
    return " ".join(f"'{word}'" if word.startswith("=") else shlex.quote(word) for word in words)


def command(*words: str) -> str:
    """Return a command of the program: `hybrid-train status run_dir=runs/first`."""
    return typed("hybrid-train", *words)
