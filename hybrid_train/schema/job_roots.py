"""The roots of the jobs beside training: `check`, `submit`, `count`, `generate` and others.

Not here: jobs that prepare data (`schema/prepare.py`), and the study (`schema/study.py`).
"""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Annotated

from omegaconf import MISSING

from hybrid_train.schema.cluster import Cluster
from hybrid_train.schema.evaluation import Asking, Drafts, Harness
from hybrid_train.schema.limits import (
    COLDEST,
    FILE,
    Count,
    CountOrNone,
    Factor,
    FileName,
    Length,
    Name,
    Processes,
    Range,
    Seed,
    Share,
)
from hybrid_train.schema.model import Model
from hybrid_train.schema.names import listed_paths
from hybrid_train.schema.objective import Distill
from hybrid_train.schema.parallel import Degrees
from hybrid_train.schema.pattern import parse, repair
from hybrid_train.schema.problems import Problem
from hybrid_train.schema.runtime import Runtime
from hybrid_train.schema.train import TrainJob

Bandwidth = Annotated[float, Range(1e-6, 1e6)]  # in 1e9 bytes a second


@dataclass(kw_only=True)
class CheckJob(TrainJob):
    """A training run that is looked at before it starts."""

    processes: Processes | None = None  # on all machines; None: those of the cluster's nodes, or 1
    cluster: Cluster | None = None  # what the run is held against; None: nothing
    json: bool = False  # print one JSON object instead of tables; also: --json


@dataclass(kw_only=True)
class RehearseJob(CheckJob):
    """A training run of which ranks are built without memory, and a small twin takes a step."""

    rank: CountOrNone | None = None  # the one that is built; None: the first of each pipeline stage
    twin: bool = True  # let a small twin of each layout take a step, and compare its ranks' calls
    storage_gb_per_s: Bandwidth | None = None  # 1e9 bytes that all processes together write
    process_gb_per_s: Bandwidth | None = None  # 1e9 bytes that one process writes

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        processes = self.processes or 1
        if self.rank is not None and self.rank >= processes:
            rule = f"must be below the number of processes ({processes})"
            yield Problem("rank", self.rank, rule, processes - 1)
        if self.parallel.fsdp:
            rule = "must be false: Megatron-FSDP has buffers of its own, which nothing here counts"
            yield Problem("parallel.fsdp", True, rule, False)
        if self.precision.fp8_param_gather:
            rule = "must be false: weights in FP8 have no memory that could be left out"
            yield Problem("precision.fp8_param_gather", True, rule, False)
        if reduced := self.optimizer.reduced_state:
            name, value = next(iter(reduced.items()))
            rule = "must be float32: reduced state is made with the first step, and none is taken"
            yield Problem(f"optimizer.{name}", value, rule, "float32")


class WeightFormat(enum.Enum):
    """Number format that weights get; `keep` leaves each as it is."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class TargetKind(enum.Enum):
    """What is stored of what a teacher says of a token."""

    hidden = "hidden"  # its final hidden states, of which its head makes all
    top_k = "top_k"  # its objective.top_k most likely tokens, and the log of the sum of all


@dataclass(kw_only=True)
class DistillTargetsJob(TrainJob):
    """A training run whose teacher is run ahead of it, over all of its rows."""

    output: FileName = MISSING  # folder of the targets; the same command goes on after a kill
    what: TargetKind = TargetKind.hidden
    dtype: WeightFormat = WeightFormat.keep  # of hidden states; keep: as the teacher computes them
    dry_run: bool = False  # say size and time of the targets, and write none

    def problems(self) -> Iterator[Problem]:
        """Check what the job says of the objective."""
        if not isinstance(self.objective, Distill):
            yield Problem("objective", self.objective.kind, "must be distill", "distill")
            return
        if self.objective.teacher is None:
            rule = "must name the one teacher whose targets are stored"
            yield Problem("objective.teacher", None, rule)
        if self.what is TargetKind.top_k and self.objective.top_k is None:
            rule = "must say how many tokens are stored, for what=top_k"
            yield Problem("objective.top_k", None, rule, 64)
        if self.what is TargetKind.top_k and self.dtype is not WeightFormat.keep:
            rule = "is that of hidden states; what=top_k stores logits in float32"
            yield Problem("dtype", self.dtype.value, rule, WeightFormat.keep.value)


@dataclass(kw_only=True)
class SubmitJob(TrainJob):
    """A training run that SLURM is to start."""

    cluster: Cluster = field(default_factory=Cluster)
    dry_run: bool = False  # print what would be submitted; data may be chosen later


def training_job(job: SubmitJob) -> TrainJob:
    """Return the run alone, as it is frozen into its folder."""
    return TrainJob(**{one.name: getattr(job, one.name) for one in fields(TrainJob)})


@dataclass(kw_only=True)
class ResumeJob:
    """A run that goes on, or begins, with the config that lies in its folder."""

    run_dir: FileName = MISSING
    overrides: list[str] = field(default_factory=list)  # settings of `train`: train.tokens=2M


@dataclass(kw_only=True)
class CountJob:
    """Parameters, tensors, FLOPs and cache bytes of a model."""

    model: Model = field(default_factory=Model)
    sequence_length: Length = 8192  # tokens; attention and its cache grow with it

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if self.model.vocab_size is None:
            rule = "must be set: the model takes that of the tokenizer, and here is none"
            yield Problem("model.vocab_size", "null", rule, 131072)
        try:
            parse(self.model.pattern)
        except ValueError as error:
            pattern = self.model.pattern
            yield Problem("model.pattern", pattern, str(error), repair(pattern))


class ExportFormat(enum.Enum):
    """Whose folder an export becomes."""

    huggingface = "huggingface"
    megatron_lm = "megatron_lm"
    bridge = "bridge"
    nemo = "nemo"


@dataclass(kw_only=True)
class ConvertJob:
    """A folder of Hugging Face or of NVIDIA's trainers becomes a run, or the other way round."""

    import_: FileName | None = None  # the folder, whosever; on the command line import=FOLDER
    export: FileName | None = None  # a run folder, one checkpoint of it, or the URL of either
    output: FileName = MISSING  # new run folder, or new folder of the export
    format: ExportFormat = ExportFormat.huggingface  # of the export; an import's is recognised
    dtype: WeightFormat = WeightFormat.keep  # expert biases stay float32
    shard_gb: Annotated[float, Range(0.001, 1000)] = 5.0  # files of Hugging Face, in 1e9 bytes
    tokenizer: FileName | None = None  # of an import; null: that of the folder, if it has one

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if (self.import_ is None) == (self.export is None):
            given = "neither" if self.export is None else "both"
            yield Problem("import, export", given, "one of them names what is converted")
        if self.import_ is not None and self.format is not ExportFormat.huggingface:
            yield Problem(
                "format", self.format.value, "is that of an export; an import's is recognised",
                ExportFormat.huggingface.value,
            )  # fmt: skip
        if self.export is not None and self.tokenizer is not None:
            rule = "is for an import; an export takes that of the run"
            yield Problem("tokenizer", self.tokenizer, rule, "null")


@dataclass(kw_only=True)
class VerifyJob:
    """Names, shapes, formats and values of both sides, then logits of the same tokens."""

    checkpoint: FileName = MISSING  # a run folder, one checkpoint of it, or the URL of either
    hf: FileName = MISSING  # Hugging Face folder
    logits: bool = True  # needs transformers, and room for both models in float32
    length: Length = 300  # tokens of each sequence
    sequences: Count = 2
    tolerance: Share = 1e-4  # of a logit, as a share of the standard deviation of all
    seed: Seed = 1234  # of the tokens
    runtime: Runtime = field(default_factory=Runtime)


class Reasoning(enum.Enum):
    """Whether a model thinks before it answers, where its chat template can say so."""

    on = "on"
    off = "off"


@dataclass(kw_only=True)
class AnswerSettings:
    """How prompts are answered: what a line of a prompt file may set for itself, too."""

    max_new_tokens: Annotated[int, Range(1, 2**20)] = 128  # of each answer, its end token counted
    n: Annotated[int, Range(1, 2**16)] = 1  # answers of each prompt; each has a seed of its own
    temperature: Factor = 0.0  # 0: greedy
    top_k: CountOrNone = 0  # 0: all tokens
    top_p: Share = 1.0
    min_p: Share = 0.0  # of the probability of the likeliest token; 0: all tokens
    repetition_penalty: Annotated[float, Range(0.01, 100)] = 1.0  # of prompt and answer; 1: none
    seed: Seed = 1234  # of the first answer; the next ones count on from it
    stop: list[str] = field(default_factory=list)  # stop=TEXT ends an answer; repeat it for several
    include_stop: bool = False  # the text has the stop that ended it, too
    ignore_end: bool = False  # go on behind the end tokens, up to max_new_tokens
    bos: bool | None = None  # begin as the tokenizer does; None: if the model was imported
    special_tokens: bool = False  # <|im_start|> in a prompt is that token, not its letters
    reasoning: Reasoning | None = None  # of a chat; None: as its template has it
    template: Name | None = None  # the chat template of this name; None: default, or tool_use
    template_variables: str | None = None  # JSON object, what the template reads: {"effort": "low"}
    thinking_budget: CountOrNone | None = None  # tokens of thinking, then the next newline ends it
    thinking_grace: CountOrNone = 500  # tokens more, then thinking ends without a newline
    thinking_end: str = "\n</think>\n\n"  # what is forced there; with the closing marker
    thinking_markers: list[str] = field(default_factory=lambda: ["<think>", "</think>"])

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if 0 < self.temperature < COLDEST:
            rule = f"must be 0, the most likely token, or at least {COLDEST}"
            yield Problem("temperature", self.temperature, rule, 0)
        if self.n > 1 and self.temperature == 0:
            rule = "must be 1 at temperature 0, where all answers of a prompt are equal"
            yield Problem("n", self.n, rule, 1)
        for stop in self.stop:
            if not stop:
                yield Problem("stop", '""', "must be a text; without stop= there is none")
            elif stop.startswith('["') and stop.endswith('"]'):
                yield Problem(
                    "stop", stop, "is one text as it stands; repeat stop=TEXT for several"
                )
        if len(self.thinking_markers) != 2 or not all(self.thinking_markers):  # noqa: PLR2004
            rule = "must be two texts: what opens thinking, and what closes it"
            yield Problem("thinking_markers", self.thinking_markers, rule, "[<think>,</think>]")
        elif self.thinking_markers[1] not in self.thinking_end:
            rule = f"must have {self.thinking_markers[1]} in it, which closes thinking"
            yield Problem("thinking_end", repr(self.thinking_end), rule)
        if self.thinking_budget is not None and self.reasoning is Reasoning.off:
            rule = "must be null where reasoning=off: there is no thinking to end"
            yield Problem("thinking_budget", self.thinking_budget, rule, "null")


@dataclass(kw_only=True)
class GenerateJob(AnswerSettings):
    """Text from a checkpoint. Without temperature the most likely token is taken each time."""

    checkpoint: FileName = MISSING  # a run folder, one checkpoint of it, or the URL of either
    prompt: list[str] = field(default_factory=list)  # prompt=TEXT; repeat it for several
    messages: list[str] = field(default_factory=list)  # JSON, a conversation; repeat for several
    prompt_file: FileName | None = None  # one prompt per line, or .jsonl with settings of each
    output: FileName | None = None  # a line of JSON per answer; None: text on stdout
    log_probs: bool = False  # output has those of the new tokens, in nats
    batch: Annotated[int, Range(1, 4096)] = 8  # answers that grow together
    drafts: Drafts | None = 0  # tokens that an MTP block drafts ahead; null: as many as pay
    parallel: Degrees = field(default_factory=Degrees)
    runtime: Runtime = field(default_factory=Runtime)

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        if self.log_probs and self.output is None:
            rule = "must be false without output=FILE.jsonl, where they would stand"
            yield Problem("log_probs", True, rule, False)


@dataclass(kw_only=True)
class EvaluateJob(Asking):
    """How good models are: tasks and held-out text, with intervals; several side by side."""

    checkpoint: list[str] = MISSING  # runs, checkpoints, URLs of either: checkpoint=runs/a,runs/b
    harness: Harness = field(default_factory=Harness)  # tasks of lm-eval, beside those of `tasks`
    against: FileName | None = None  # a run whose next tokens heldout compares with the model's
    output: FileName | None = None  # folder of results: a JSON file for each model and task
    parallel: Degrees = field(default_factory=Degrees)
    runtime: Runtime = field(default_factory=Runtime)

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        yield from super().problems()
        names = listed_paths(self.checkpoint)
        if not names:
            yield Problem("checkpoint", "[]", "must name at least one run or checkpoint")
        for number, name in enumerate(names):
            if name in names[:number]:
                yield Problem("checkpoint", name, "is there twice")
        if not self.task_names and not self.harness.tasks:
            yield Problem("tasks", "[]", "must name at least one task", "heldout")
        if self.against is not None and "heldout" not in self.task_names:
            rule = "must be null without the task heldout, which compares both models"
            yield Problem("against", self.against, rule, "null")


@dataclass(kw_only=True)
class RunsJob:
    """A job that looks at runs: run_dir=RUNS, repeated or with commas."""

    run_dir: list[str] = MISSING  # run folders, folders of runs, globs; run_dir=runs/a,runs/sweep

    def problems(self) -> Iterator[Problem]:
        """Check the limits of this section."""
        if not listed_paths(self.run_dir):
            yield Problem("run_dir", "[]", "must name at least one run folder or folder of runs")
        for name in listed_paths(self.run_dir):
            if bad := FILE.broken(name):
                yield Problem("run_dir", name, bad[0])


@dataclass(kw_only=True)
class StatusJob(RunsJob):
    """How runs are, in words or as JSON."""

    json: bool = False  # one JSON object, for scripts


@dataclass(kw_only=True)
class ReportJob(RunsJob):
    """One HTML file about a run, or about several over each other."""

    output: FileName | None = None  # None: report.html in the run folder, or the folder of the runs


@dataclass(kw_only=True)
class LineageJob:
    """What the weights of a folder come from: parents, teachers, and theirs."""

    run_dir: FileName = MISSING  # a run folder, or an exported one


@dataclass(kw_only=True)
class ShowJob:
    """The rows of one step of a run: their sources, documents and texts."""

    run_dir: FileName = MISSING
    step: Count = MISSING  # the first is 1
    rows: Count = 8  # of the step, at most
    characters: CountOrNone = 300  # of the text of a row, at most


@dataclass(kw_only=True)
class IndexJob(TrainJob):
    """A training run whose indices of the data are built ahead."""


@dataclass(kw_only=True)
class DoctorJob:
    """What is examined, and how it is told."""

    measure: bool = True  # time a GEMM and an all-reduce too, some seconds
    json: bool = False  # print one JSON object instead of lines; also: --json
