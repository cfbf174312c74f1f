"""Gateway to lm-eval 0.4: its tasks are read, and its model interface is ours on a live network.

Every process of a layout asks the same requests; `generation` shares them out among data-parallel
ranks and gives all of them the same answers. So lm-eval sees one process, and the layout does not
matter to it. Nothing is downloaded: a task whose data is not on this machine is refused.

Source: lm-eval 0.4.13, api/model.py (the interface) and models/huggingface.py, whose tokens,
windows and stops ours are.
"""

import contextlib
import hashlib
import io
import json
import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import huggingface_hub.constants
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.evaluator import evaluate
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import (
    get_rolling_token_windows,
    handle_non_serializable,
    make_disjoint_window,
)

from hybrid_train.evaluation.reader import LmEvalReader
from hybrid_train.generation.text import AnswerText
from hybrid_train.runtime import ranks
from hybrid_train.schema.evaluation import Harness
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.units import counted

if TYPE_CHECKING:
    from hybrid_train.training.network import Network

MAX_NEW_TOKENS = 256  # of an answer where a task says nothing, as in lm-eval's own backends
_RESAMPLES = 1000  # by which lm-eval estimates the error of what is no mean
_SINGLE_PROCESS = "DISABLE_MULTIPROC"  # it would fork this process, whose threads are at work
_KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until", "multiple_choice")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
_SAID = ("until", "max_gen_toks", "do_sample", *_SAMPLING)  # what a task may say of answers
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """Tasks that are loaded, and how their texts become tokens; nothing of it needs a model.

    Attributes:
        settings: what was asked for.
        reader: of the run.
        loaded: lm-eval's tasks and groups.
    """

    settings: Harness
    reader: LmEvalReader
    loaded: Mapping[str, Any]


def prepare(settings: Harness, run_dir: Path) -> Prepared:
    """Load tasks with their data, and check that they fit the run.

    Args:
        settings: which tasks.
        run_dir: the run whose model will answer them.

    Raises:
        UserError: on all processes, if a task is not there, asks for what is not supported, or its
            data is not on this machine; or if a file of the run is damaged.
    """
    reader = LmEvalReader.of(run_dir, settings)
    with _offline(), _seeded(settings.seed):
        manager = _manager(settings)
        loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
        for name in settings.tasks:
            for part, found in _loaded(manager, name).items():
                loaded.setdefault(part, {}).update(found)
    for name, task in loaded["tasks"].items():
        _require_fit(name, task, reader)
        own = task.get_config("num_fewshot")
        if settings.num_fewshot is not None and own == 0 != settings.num_fewshot:
            _log.warning("%s says num_fewshot: 0 itself, and stays so", name)
        elif settings.num_fewshot is not None or own is None:
            task.set_config(key="num_fewshot", value=settings.num_fewshot or 0)
        task.set_fewshot_seed(seed=settings.seed)
    return Prepared(settings, reader, loaded)


def _manager(settings: Harness) -> TaskManager:
    """Return the index of the tasks of a folder, with the stock ones where one of them is asked."""
    if settings.include is not None:
        folder = Path(settings.include)
        if not folder.is_dir():
            raise _refused(f"harness.include = {folder}: must be a folder with YAML files of tasks")
        own = TaskManager(include_path=str(folder), include_defaults=False)
        if all(name in own.task_index for name in settings.tasks):
            return own
    manager = TaskManager(include_path=settings.include)  # reads 14,000 files
    for name in settings.tasks:
        if name not in manager.task_index:
            near = nearest(name, manager.all_tasks)
            where = "" if settings.include is None else f" in {settings.include} or"
            raise _refused(
                f"harness.tasks = {name}: there is no such task{where} among those of lm-eval"
                + (f"; nearest: {near}" if near else "")
            )
    return manager


def _loaded(manager: TaskManager, name: str) -> dict[str, Any]:
    """Load one task or group, with its data."""
    try:
        return dict(manager.load([name]))
    except Exception as error:  # of lm-eval, of datasets, or of code beside a YAML file
        what = f"{type(error).__name__}: {error}".strip().split("\n")[0]
        advice = "repair the task"
        if isinstance(error, OSError):  # as are all of a missing file, data set, or network
            advice = (
                "nothing is downloaded, so data of a stock task must be in the cache of Hugging "
                f"Face's datasets on this machine ({datasets.config.HF_DATASETS_CACHE}): load it "
                "once where there is a network, and copy the cache; paths of local data are "
                "relative to the folder of the command"
            )
        raise _refused(f"harness.tasks = {name}: cannot be loaded: {what}; {advice}") from error


def _require_fit(name: str, task: Any, reader: LmEvalReader) -> None:
    """Refuse a task that cannot be answered, before a model is loaded."""
    what = ""
    if task.OUTPUT_TYPE not in _KINDS:
        what = f"asks for {task.OUTPUT_TYPE}; supported are {', '.join(_KINDS)}"
    elif getattr(task, "UNSAFE_CODE", False):
        what = "runs code that the model writes, outside any sandbox"
    elif getattr(task, "MULTIMODAL", False):
        what = "has images or sound, which the model does not read"
    elif task.OUTPUT_TYPE == "generate_until":
        said = normalize_gen_kwargs(task.config.generation_kwargs or {}, MAX_NEW_TOKENS)
        if unknown := sorted(said.keys() - set(_SAID)):
            what = f"has generation_kwargs {', '.join(unknown)}; known are {', '.join(_SAID)}"
        elif said["max_gen_toks"] >= reader.max_length:
            what = (
                f"asks for max_gen_toks = {said['max_gen_toks']}, which leaves nothing of "
                f"max_length = {reader.max_length} for the prompt; set harness.max_length"
            )
    if what:
        raise _refused(f"harness.tasks = {name}: the task {what}")


def run(prepared: Prepared, network: "Network") -> dict[str, Any]:
    """Let a model answer the tasks; every process of its layout calls this alike.

    The network may be in training, and goes on as if nothing had been; so does the random state.

    Args:
        prepared: the tasks, which hold the answers afterwards: prepare them anew for another model.
        network: of the run that they were prepared for.

    Returns:
        What lm-eval returns, as plain data, equal on every process: `results` (metrics and their
        standard errors by task), `samples` (of each task, each with hashes of document, prompt and
        target), `configs`, `versions`, `n-shot`, `n-samples` and others; and `config_hashes`, of
        each task's config, SHA-256, and `cut`, how many requests lost their beginning.

    Raises:
        UserError: if a request cannot be answered, or a score is not finite.
    """
    settings, model = prepared.settings, LiveModel(prepared.reader, network, prepared.settings)
    with _seeded(settings.seed), _quiet():
        found = evaluate(
            model, prepared.loaded, limit=settings.limit, bootstrap_iters=_RESAMPLES,
            system_instruction=settings.system, apply_chat_template=settings.apply_chat_template,
            fewshot_as_multiturn=settings.apply_chat_template and settings.fewshot_as_multiturn,
        )  # fmt: skip
    plain: dict[str, Any] = json.loads(json.dumps(found, default=handle_non_serializable))
    plain["config_hashes"] = {
        name: hashlib.sha256(json.dumps(one, sort_keys=True).encode()).hexdigest()
        for name, one in plain["configs"].items()
    }
    plain["cut"] = model.cut
    return plain


class LiveModel(TemplateLM):
    """lm-eval's model interface on a network, under any layout.

    Attributes:
        cut: requests whose beginning was left out, since they are longer than what the model reads.
    """

    def __init__(self, reader: LmEvalReader, network: "Network", settings: Harness) -> None:
        super().__init__()
        self.cut = 0
        self._reader, self._network, self._settings = reader, network, settings

    @property
    def eot_token_id(self) -> int:
        return self._reader.tokenizer.end_of_document

    @property
    def prefix_token_id(self) -> int:
        return self._reader.prefix

    @property
    def tokenizer_name(self) -> str:
        return self._reader.tokenizer.fingerprint

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        template = self._reader.template
        return template.source if template is not None and chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write messages as a prompt; without `add...`, the answer begins with the last one."""
        assert self._reader.template is not None, "lm-eval asks only where there is one"
        if add_generation_prompt:
            return self._reader.template.render(chat_history, {})
        *before, begun = chat_history
        return self._reader.template.render(before, {}) + begun["content"]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any
    ) -> list[int]:
        return self._reader.encode(string, begin=add_special_tokens)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        for request in requests:
            context, continuation = request.args
            if not continuation:
                raise _refused(
                    f"{request.task_name}: document {request.doc_id} asks for the probability of "
                    f"an empty text behind {context[-40:]!r}; repair the task"
                )
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Score continuations, each given its context: sums of log-probabilities, nats."""
        from hybrid_train.generation.scoring import Rows, Text
        from hybrid_train.generation.shared_contexts import score_continuations

        texts, cut, most = [], 0, self._reader.max_length + 1
        for said, context, continuation in requests:
            if not 0 < len(continuation) < most:
                raise _refused(
                    f"a continuation of {counted(len(continuation), 'token')} cannot be scored "
                    f"with max_length = {most - 1}: {said and said[1][:40]!r}"
                )
            tokens = (context + continuation)[-most:]
            cut += len(context) + len(continuation) > most
            texts.append(Text(tokens, len(tokens) - len(continuation)))
        self._say_cut(cut, len(requests))
        rows = Rows(tokens=self._settings.batch_tokens)
        scores = score_continuations(self._network, texts, rows=rows)
        return [(float(one.log_probs.double().sum()), bool(one.greedy.all())) for one in scores]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            for window in get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self._reader.max_length, context_len=1
            ):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += log_prob
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        from hybrid_train.generation.batching import Batching, stream

        asked, stops, cut = [], [], 0
        times: dict[str, int] = {}  # how often a request was made before: each draws anew
        for request in requests:
            context, said = request.args
            kwargs = normalize_gen_kwargs(said, MAX_NEW_TOKENS)
            room = self._reader.max_length - kwargs["max_gen_toks"]
            tokens = self.tok_encode(context) or [self.prefix_token_id]
            cut += len(tokens) > room
            key = json.dumps([context, said], sort_keys=True)
            times[key] = times.get(key, -1) + 1
            stops.append([one for one in kwargs["until"] if one])
            asked.append(self._request(tokens[-room:], kwargs, stops[-1], times[key]))
        self._say_cut(cut, len(requests))
        batching = Batching(vocab_size=self._reader.tokenizer.vocab_size, rows=self._settings.batch)
        answers: list[list[int]] = [[] for _ in asked]
        for new in stream(self._network, asked, batching):
            answers[new.request] += new.tokens
        return [self._text(*one) for one in zip(answers, stops, strict=True)]

    def _request(
        self, prompt: list[int], kwargs: Mapping[str, Any], stops: Sequence[str], number: int
    ) -> Any:
        """Return what the engine is asked for."""
        from hybrid_train.generation.requests import Request
        from hybrid_train.generation.sampling import Sampling

        said = {name: kwargs[name] for name in _SAMPLING if kwargs.get(name) is not None}
        if not kwargs.get("do_sample"):
            said["temperature"] = 0.0
        seed = (self._settings.seed + number) % 2**64
        return Request(
            prompt=prompt,
            sampling=Sampling(seed=seed, **said),
            max_new_tokens=kwargs["max_gen_toks"],
            ends=self._reader.ends,
            watch=lambda: _Stops(self._reader.tokenizer, prompt, stops),
        )

    def _text(self, tokens: Sequence[int], stops: Sequence[str]) -> str:
        """Return the text of an answer up to the first stop, as lm-eval cuts it."""
        text = self._reader.tokenizer.decode(tokens, skip_special=True)
        for stop in stops:
            text = text.split(stop)[0]
        return text

    def _say_cut(self, cut: int, of: int) -> None:
        self.cut += cut
        if cut:
            _log.warning(
                "%d of %s of lm-eval are longer than max_length = %d tokens: their beginnings are "
                "left out", cut, counted(of, "request"), self._reader.max_length,
            )  # fmt: skip


class _Stops(AnswerText):
    """Watches an answer for the strings that end it."""

    def forced(self) -> int | None:
        return None


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Let no data set be looked for in the network: both libraries read this at their import."""
    libraries: list[Any] = [datasets.config, huggingface_hub.constants]
    before = [one.HF_HUB_OFFLINE for one in libraries]
    for one in libraries:
        one.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for one, value in zip(libraries, before, strict=True):
            one.HF_HUB_OFFLINE = value


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Let what tasks draw from the generators of Python and numpy follow from a seed, for a while.

    lm-eval seeds them before it loads tasks; a run that is evaluated must not notice.
    """
    state, arrays = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(state)
        np.random.set_state(arrays)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep lm-eval in this process and off stdout, which is for results."""
    os.environ[_SINGLE_PROCESS] = "1"  # nothing else reads it
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        if not ranks.is_main():
            stack.enter_context(contextlib.redirect_stderr(io.StringIO()))  # bars of progress
        yield


def _refused(text: str) -> UserError:
    error = UserError(text)
    error.on_all_ranks = True  # every process reads the same tasks
    return error
