"""The help pages, and the tables of every page that is printed.

A page tells the most used settings of a command in a sentence each, on two screens. What a setting
means in detail stands beside its field in `schema/`; `--help=all` shows that, and every choice.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields

from rich.console import Console
from rich.table import Table

from hybrid_train.config import describe
from hybrid_train.config.commands import Command
from hybrid_train.schema.evaluation import Tasks

_RUN = {
    "run_dir": "The run lives in this folder; the same folder goes on with the same run.",
    "train.tokens": "The run ends at the first step that reaches this many tokens: 2M, 1.5B, 10T.",
    "train.sequence_length": "Each sequence has this many tokens.",
    "train.global_batch": "Each step reads this many sequences, over all processes.",
    "train.microbatch": "Each forward pass of a process reads this many sequences.",
    "train.seed": "Weights and the order of the data follow from this number.",
    "train.validation_interval": "Validation runs every so many steps; 0: only at the end.",
    "model.pattern": "Each letter is a layer: M Mamba-2, * attention, - MLP, E experts; "
    "/ begins an MTP depth.",
    "data.train": "Training reads these token files (prefixes without .bin and .idx).",
    "data.validation": "Validation reads these token files.",
    "data.tokenizer": "This folder holds the tokenizer that made the token files.",
    "schedule.peak_lr": "The learning rate rises to this value.",
    "schedule.warmup_tokens": "The learning rate rises over this many tokens.",
    "parallel.tensor": "Each layer is split over this many processes.",
    "parallel.pipeline": "The layers are cut into stages for this many processes.",
    "parallel.expert": "The experts of a layer are spread over this many processes.",
    "parallel.context": "Each sequence is split over this many processes.",
    "checkpoint.interval": "A checkpoint is saved every so many steps; 0: only at the end.",
    "checkpoint.load": "The run starts from this run or checkpoint, or its URL, with its model.",
    "runtime.device": "The run takes a GPU where there is one (auto), or cpu, or cuda.",
}
_OF_A_PLAN = (  # what decides sizes and layout, and what must be set
    *("run_dir", "train.tokens", "train.sequence_length", "train.global_batch", "schedule.peak_lr"),
    *("model.pattern", "parallel.tensor", "parallel.pipeline", "parallel.expert"),
    "parallel.context",
)
_INPUT = {"input": "The text is in these files, globs or folders, with commas between them."}
_TOKENS = {"input": "The tokens are in these files (prefixes without .bin and .idx), with commas."}
_OUTPUT = {"output": "The token files get this name, without .bin and .idx."}
_OVERWRITE = {"overwrite": "Files of that name are replaced if this is true."}
_TEXT = {
    "format": "The files hold jsonl, parquet, text or lines; auto goes by their names.",
    "text_key": "The text stands under this key of a JSON line, or in this Parquet column.",
}

_TASKS = ", ".join(one.name for one in fields(Tasks))

MOST_USED: dict[str, dict[str, str]] = {
    "train": _RUN,
    "resume": {
        "run_dir": "The run that goes on lives in this folder.",
        "overrides": "Settings that change: write them as they are, such as train.tokens=2M.",
    },
    "check": {
        "processes": "The run will have this many processes, on all machines together.",
        **_RUN,
    },
    "rehearse": {
        "processes": "The run will have this many processes, on all machines together.",
        "rank": "This rank is built; null: the first one of each pipeline stage.",
        "twin": "A small twin of each layout takes a step on this machine if this is true.",
        "storage_gb_per_s": "All processes together write this many GB (1e9 bytes) a second.",
        "process_gb_per_s": "Each process writes this many GB (1e9 bytes) a second.",
        **{name: told for name, told in _RUN.items() if name in _OF_A_PLAN},
    },
    "distill_targets": {
        "objective.teacher": "The teacher is this run, or one checkpoint of it.",
        "output": "The targets are written to this folder; the same command goes on after a kill.",
        "what": "The final hidden states are stored (hidden), or the most likely tokens (top_k).",
        "objective.top_k": "So many tokens are stored with what=top_k.",
        "dtype": "Hidden states are stored in this format; keep: as the teacher computes them.",
        "dry_run": "Size and time are said and nothing is written if this is true; --dry-run.",
        **{name: told for name, told in _RUN.items() if name in _OF_A_PLAN},
    },
    "prune": {
        "checkpoint": "The parent is this run, or one checkpoint of it (folder or URL).",
        "ranking": "What matters least by this ranking of the checkpoint is cut.",
        "output": "The child becomes a run in this new folder.",
        "share": "The child has this share of the parent's parameters at most.",
        "budget": "The child has this many parameters at most: 4.5B.",
        "shrink": "Share and budget make these smaller; depth only where widths do not suffice.",
        "model.hidden_size": "The vectors between the layers have this many elements.",
        "model.mlp.intermediate_size": "The inner vectors of an MLP have this many elements.",
        "model.mamba.heads": "Each Mamba-2 layer has this many heads.",
        "model.attention.heads": "Each attention layer has this many query heads.",
        "model.moe.experts": "Each layer of experts has this many of them.",
        "model.layers": "Some layers, counted in the parent, have sizes of their own.",
        "depth.together": "Layers stay or go, and are counted, by so many neighbours: 2 of *-*-*-.",
        "depth.drop": "These main layers go, counted from 1: [3,17-32].",
        "depth.layers": "This many main layers stay, those that matter most.",
        "depth.block": "This many neighbours go, those that matter least together.",
        "depth.metric": "Layers matter by this metric of the ranking.",
        "mtp": "The MTP blocks are cut like the layers (keep), or left out (drop).",
        "dry_run": "The sizes are printed and nothing is written if this is true.",
    },
    "lineage": {
        "run_dir": "The weights lie in this folder, of a run or an exported one.",
    },
    "status": {
        "run_dir": "The run that is looked at lives in this folder.",
        "json": "The answer is one JSON object if this is true; --json is short for it.",
    },
    "report": {
        "run_dir": "The run that is reported lives in this folder.",
        "output": "The page is written to this file; null: report.html in the run folder.",
    },
    "generate": {
        "checkpoint": "The model comes from this run, or one checkpoint of it (folder or URL).",
        "prompt": "The text goes on from this prompt; repeat prompt=TEXT for several.",
        "messages": "The text answers this conversation, JSON, by the chat template of the model.",
        "prompt_file": "Each line of this file is a prompt, too; of a .jsonl with its settings.",
        "output": "Each answer becomes a line of JSON here; the same command goes on after a kill.",
        "log_probs": "The lines have the log-probability of each new token if this is true.",
        "n": "Each prompt gets this many answers.",
        "max_new_tokens": "Each answer ends after this many new tokens at the latest.",
        "stop": "An answer ends before this text; repeat stop=TEXT for several.",
        "ignore_end": "Answers go on behind the model's end tokens if this is true.",
        "temperature": "Tokens are drawn at this temperature; 0 takes the most likely one.",
        "top_k": "Tokens are drawn among this many of the most likely ones; 0: among all.",
        "top_p": "Tokens are drawn among the likeliest ones that make up this probability.",
        "min_p": "Tokens are drawn that have this share of the likeliest one's probability.",
        "repetition_penalty": "Tokens that were there before get less likely by this factor.",
        "seed": "What is drawn follows from this number.",
        "bos": "Prompts begin with what the tokenizer puts there if this is true.",
        "special_tokens": "Special tokens spelt out in a prompt are tokens if this is true.",
        "reasoning": "The model thinks before it answers (on) or not (off), in a chat.",
        "template": "The chat template has this name.",
        "template_variables": "The template reads these variables, a JSON object.",
        "thinking_budget": "Thinking ends at the first newline from this many tokens on.",
        "thinking_grace": "Thinking ends without a newline after so many tokens more.",
        "batch": "This many answers grow together.",
        "drafts": "The model's MTP block drafts this many tokens ahead, which one pass verifies; "
        "null: as many as pay, none where none do.",
        **{f"parallel.{one}": _RUN[f"parallel.{one}"] for one in ("tensor", "pipeline", "expert")},
        "runtime.device": "The model runs on a GPU where there is one (auto), or cpu, or cuda.",
    },
    "importance": {
        "checkpoint": "The model that is scored comes from this run or checkpoint.",
        "output": "The ranking is written to this new folder, which `prune` reads.",
        "rows": "So many rows are read, of `sequence_length` tokens each.",
        "sequence_length": "A row has this many tokens; null: as the run was trained.",
        "files": "The rows are of these token files; []: of the data that the run was trained on.",
        "over_tokens": "What the tokens of a row show becomes one number: mean, l2, variance.",
        "over_rows": "The numbers of all rows become the score: l2, mean.",
        "experts": "Experts are scored by their output, or by their layer without them (without).",
        "layers": "Layers are scored by these: cosine, hidden_mse, hidden_nmse, logits_mse, "
        "logits_nmse, loss, accuracy.",
        "iterative": "So many layers are taken out one after the other, the cheapest first.",
        "blocks": "Blocks of these lengths are taken out as one: [8,16].",
        "together": "Layers are taken out by so many neighbours, and counted so: 2 of *-*-*-.",
        "tasks": "Accuracy is measured on this task.",
        **{f"parallel.{one}": _RUN[f"parallel.{one}"] for one in ("tensor", "pipeline", "expert")},
    },
    "evaluate": {
        "checkpoint": "The models come from these runs or checkpoints, with commas between them.",
        "tasks": "The models are asked these tasks, with commas between them: " + _TASKS + ".",
        "task.heldout.files": "Held-out text is in these token files; []: the first run's.",
        "task.heldout.tokens": "Held-out text has this many tokens of each source.",
        "harness.tasks": "The models are asked these tasks of lm-eval.",
        "harness.include": "This folder has one's own tasks of lm-eval, in YAML files.",
        "against": "Held-out text compares each model with this one: divergence, agreement.",
        "limit": "Each task has at most this many items; null: all of its own.",
        "samples": "Each item that is answered in writing gets this many answers, for pass@k.",
        "temperature": "Answers are drawn at this temperature; 0 takes the most likely tokens.",
        "seed": "Which text is held out, and what is drawn, follow from this number.",
        "output": "Each result becomes a JSON file in this folder; what is there is not run again.",
        "batch": "This many answers grow together.",
        **{f"parallel.{one}": _RUN[f"parallel.{one}"] for one in ("tensor", "pipeline", "expert")},
        "runtime.device": _RUN["runtime.device"],
    },
    "study": {
        "run_dir": "Each run of the study gets the folder run_dir/VARIANT/seed_N.",
        "baseline": "The other variants are compared with this one.",
        "only": "These variants run beside the baseline; without any, all do.",
        "part": "The variants of this part run; null: those of all parts.",
        "seeds": "Each variant is trained once with each of these seeds.",
        "short": "The study takes its short form if this is true: a minute, to see that it works.",
        "overrides": "These settings hold in every run, after all that the study says.",
        "parallel": "This many runs go at once; null: one for each core, one alone on a GPU.",
        "keep_checkpoints": "The checkpoints of finished runs stay if this is true.",
    },
    "doctor": {
        "measure": "A GEMM and an all-reduce are timed, too, if this is true.",
        "json": "The answer is one JSON object if this is true; --json is short for it.",
    },
    "count": {
        "sequence_length": "FLOPs and cache are counted for sequences of this many tokens.",
        "model.vocab_size": "The vocabulary has this many tokens; null: that of the tokenizer.",
        "model.pattern": _RUN["model.pattern"],
        "model.hidden_size": "The vectors between the layers have this many elements.",
        "model.attention.heads": "Each attention layer has this many query heads.",
        "model.mamba.heads": "Each Mamba-2 layer has this many heads.",
        "model.mlp.intermediate_size": "The inner vectors of an MLP have this many elements.",
        "model.moe.experts": "Each layer of experts has this many of them.",
    },
    "convert": {
        "import": "This folder becomes a run: of Hugging Face, Megatron-LM, Bridge or NeMo 2.",
        "export": "This run, or checkpoint (folder or URL), becomes a folder of one of these.",
        "output": "The result is written to this folder, which must be new.",
        "format": "Whose folder an export becomes; that of an import is recognised.",
        "tokenizer": "An import takes this tokenizer; null: that of the folder, if it has one.",
        "dtype": "The tensors are written in this format; keep: as they are.",
        "shard_gb": "Each file of an export has at most this many gigabytes (1e9 bytes).",
    },
    "verify": {
        "checkpoint": "This run, or checkpoint (folder or URL), is one side of the comparison.",
        "hf": "This Hugging Face folder is the other side.",
        "logits": "The logits are compared, too, if this is true; transformers computes theirs.",
        "length": "Logits are compared on sequences of this many tokens.",
        "sequences": "Logits are compared on this many sequences.",
        "tolerance": "Logits may differ by this share of their standard deviation.",
    },
    "data_tokenize": {
        **_INPUT,
        **_OUTPUT,
        "tokenizer": "This Hugging Face folder, or SentencePiece model, makes the tokens.",
        **_TEXT,
        "workers": "This many processes tokenize; null: one for each core.",
        "max_bad_share": "The command stops if a larger share of the lines holds no document.",
        **_OVERWRITE,
    },
    "data_merge": {**_TOKENS, **_OUTPUT, **_OVERWRITE},
    "data_split": {
        **_TOKENS,
        "output": "Each part is called OUTPUT-NAME, or OUTPUT-00000 and so on.",
        "shares": "The documents are drawn into parts of these shares, such as [0.99,0.01].",
        "names": "The parts get these names, one for each share.",
        "tokens_per_shard": "The documents are cut, in their order, into parts of so many tokens.",
        "seed": "What is drawn follows from this number.",
        **_OVERWRITE,
    },
    "data_inspect": {
        **_TOKENS,
        "document": "The text of the document of this number is printed, too.",
        "tokenizer": "This tokenizer decodes the text; null: that of the manifest.",
    },
    "data_count": _TOKENS,
    "data_verify": {
        **_TOKENS,
        "tokenizer": "Token ids must be in the vocabulary of this one, where no manifest says.",
    },
    "data_index": {
        "run_dir": "The run will live in this folder; nothing is written there.",
        **{
            key: _RUN[key]
            for key in (
                *("train.tokens", "train.sequence_length", "train.global_batch", "train.seed"),
                *("data.train", "data.validation", "data.tokenizer"),
            )
        },
        "data.cache": "The indices are kept in this folder; null: beside the token files.",
    },
    "data_show": {
        "run_dir": "The run that is looked at lives in this folder.",
        "step": "The sequences of this step are shown; the first step is 1.",
        "rows": "At most this many sequences of the step are shown.",
        "characters": "At most this many characters of each sequence are shown.",
    },
    "data_train_tokenizer": {
        **_INPUT,
        "output": "The tokenizer is written to this folder, which must be new.",
        "vocab_size": "The vocabulary has this many tokens.",
        "special_tokens": "These tokens stand for no text; the first ends a document.",
        "sample_share": "This share of the text is read.",
        **_TEXT,
    },
    "submit": {
        "run_dir": _RUN["run_dir"],
        "dry_run": "The batch script is printed and nothing is queued if this is true; --dry-run "
        "is short for it.",
        "cluster.nodes": "The job asks for this many nodes; null: the fewest that can run it.",
        "cluster.min_nodes": "The job starts with this many nodes if there are no more.",
        "cluster.hardware": "The GPUs are this card of conf/hardware, such as h100 or gb200.",
        "cluster.partition": "The job waits in this partition; null: that of the cluster.",
        "cluster.account": "The job is charged to this account.",
        "cluster.time_limit": "The job is saved and queued again after this time.",
        "cluster.container.image": "Each node starts this container.",
        "cluster.setup": "Each node runs these lines of shell first, such as module load.",
        **{
            key: _RUN[key]
            for key in (
                *("train.tokens", "train.sequence_length", "train.global_batch", "model.pattern"),
                *("train.microbatch", "data.train", "data.tokenizer", "schedule.peak_lr"),
                *("parallel.tensor", "parallel.pipeline", "parallel.expert"),
                *("checkpoint.interval", "checkpoint.load"),
            )
        },
    },
}

SCREEN_LINES, SCREEN_COLUMNS = 30, 100  # a help page takes two such screens at the most
_SHOWN_CHOICES = 8  # of a group
_EXAMPLES = {
    "a first run": "hybrid-train train experiment=quickstart",
    "what there is": "hybrid-train experiments",
    "other values": "hybrid-train train experiment=quickstart train.tokens=2M run_dir=runs/longer",
    "two processes": "torchrun --nproc-per-node 2 -m hybrid_train train experiment=quickstart "
    "parallel.tensor=2",
    "text": 'hybrid-train generate checkpoint=runs/quickstart prompt="def main("',
}
_PIPED_WIDTH = 120  # columns where there is no terminal to ask
_UNLIMITED_WIDTH = 10_000  # columns; what a table would take if it could


def console() -> Console:
    """Return a console for pages of text, readable in a pipe too."""
    plain = Console(highlight=False, markup=False)
    return (
        plain if plain.is_terminal else Console(highlight=False, markup=False, width=_PIPED_WIDTH)
    )


def table(rows: Iterable[Sequence[str]], heads: Sequence[str] | None = None) -> Table:
    """Lay out rows in columns without lines; the last column wraps."""
    layout = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=heads is not None)
    listed = list(rows)
    width = len(listed[0]) if listed else 0
    for column in range(width):
        layout.add_column(heads[column] if heads else "", overflow="fold", no_wrap=column == 0)
    for row in listed:
        layout.add_row(*row)
    return layout


def show_numbers(
    page: Console, rows: Sequence[Sequence[str]], heads: Sequence[str], words: int = 1
) -> None:
    """Print a table whose columns are numbers, but for the first; no number is ever broken.

    Args:
        page: where to.
        rows: as many cells each as there are heads.
        heads: of the columns.
        words: how many columns hold words.
    """
    layout = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column, head in enumerate(heads):
        layout.add_column(head, justify="left" if column < words else "right", no_wrap=True)
    for row in rows:
        layout.add_row(*row)
    unlimited = page.options.update(width=_UNLIMITED_WIDTH)
    page.width = max(page.width, page.measure(layout, options=unlimited).maximum)
    page.print(layout)


def show_left_out(page: Console, left_out: Mapping[str, str]) -> None:
    """Say what is not in a table, and why."""
    for name, why in left_out.items():
        page.print(f"\n{name} is left out: {why}", soft_wrap=True)


def show_commands(commands: Mapping[str, Command], flags: Mapping[str, str]) -> None:
    """Print what `hybrid-train` can do."""
    page = console()
    page.print("Usage: hybrid-train COMMAND [GROUP=CHOICE ...] [KEY=VALUE ...] [OPTIONS]\n")
    page.print("Commands")
    page.print(table((f"  {name}", command.summary) for name, command in commands.items()))
    page.print("\nOptions")
    page.print(table((f"  {flag}", meaning) for flag, meaning in flags.items()))
    page.print("\nExamples")
    page.print(table((f"  {aim}", command) for aim, command in _EXAMPLES.items()), soft_wrap=True)
    page.print("\n`hybrid-train COMMAND --help` explains a command and its settings.")


def show_without_settings(name: str, command: Command) -> None:
    """Print the page of a command that takes no settings."""
    page = console()
    page.print(f"`hybrid-train {name}` {command.summary}. It takes no settings.")


def show_command(name: str, command: Command, root: str, lines: Sequence[str]) -> None:
    """Print the groups of a command with what is chosen, and the settings that are used most.

    Args:
        name: as it is typed.
        command: what it is.
        root: name of its root in conf/.
        lines: overrides.
    """
    keys = {one.name: one for one in describe.settings(root, lines)}  # first: they may be wrong
    groups = list(_group_rows(root, lines))
    used = MOST_USED.get(root) or {key: one.comment for key, one in keys.items()}
    common = [(f"  {key}", keys[key].default, words) for key, words in used.items() if key in keys]
    page = console()
    _show_usage(page, name, command, bool(groups))
    given = " with these choices" if lines else ""
    page.print(f"\nKEY=VALUE sets one value. The most used keys, and their values{given}:")
    page.print(table(common))
    if any(value == describe.UNSET for _, value, _ in common):
        chosen = " or comes with an experiment" if _has_experiments(groups) else ""
        page.print(f"`{describe.UNSET}` stands where a value has to be given{chosen}.")
    if groups:
        page.print("\nGROUP=CHOICE sets many values at once. Now chosen, and what else there is:")
        page.print(table(groups))
    page.print()
    what = f"every choice and all {len(keys)} keys" if groups else f"all {len(keys)} keys in detail"
    page.print(f"`hybrid-train {name} --help=all` shows {what}.", soft_wrap=True)
    page.print("`hybrid-train --help` explains the options.", soft_wrap=True)


def _group_rows(root: str, lines: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """Yield a row for each group that offers a choice: its name, what is chosen, the others."""
    chosen, choices = describe.chosen(root, lines), describe.choices(root)
    for group, options in sorted(choices.items(), key=lambda one: one[0] != "experiment"):
        own = chosen[group]
        others = [name for name in options if name != own]
        shown = ", ".join(others[:_SHOWN_CHOICES])
        more = len(others) - _SHOWN_CHOICES
        if others:
            yield f"  {group}", own or "(none)", f"{shown} and {more} more" if more > 0 else shown


def _has_experiments(groups: Sequence[Sequence[str]]) -> bool:
    return any(row[0].strip() == "experiment" for row in groups)


def show_all(name: str, command: Command, root: str, lines: Sequence[str]) -> None:
    """Print every choice of every group of a command, and every key with its value.

    Args:
        name: as it is typed.
        command: what it is.
        root: name of its root in conf/.
        lines: overrides.
    """
    keys = list(describe.settings(root, lines))  # first: nothing is printed if an override is wrong
    rows = [
        (f"  {group}={choice}" if choice else f"  {group}", description)
        for group, options in describe.choices(root).items()
        for choice, description in options.items()
    ]
    page = console()
    _show_usage(page, name, command, bool(rows))
    if rows:
        page.print("\nGROUP=CHOICE sets many values at once:")
        page.print(table(rows))
    page.print("\nKEY=VALUE sets one value. All keys" + (" with these choices:" if lines else ":"))
    page.print(table((f"  {key.name}", key.default, key.comment) for key in keys))


def _show_usage(page: Console, name: str, command: Command, has_groups: bool) -> None:
    page.print(f"`hybrid-train {name}` {command.summary}.\n", soft_wrap=True)
    groups = "[GROUP=CHOICE ...] " if has_groups else ""
    page.print(f"Usage: hybrid-train {name} {groups}[KEY=VALUE ...] [OPTIONS]", soft_wrap=True)
