"""The settings of each command that are used most, in the order of a help page, each in a sentence.

What a setting means in detail stands beside its field in `schema/`; `--help=all` shows that.
"""

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
    "checkpoint.load": "The run starts from this run folder or checkpoint, with its model.",
    "runtime.device": "The run takes a GPU where there is one (auto), or cpu, or cuda.",
}
_INPUT = {"input": "The text is in these files, globs or folders, with commas between them."}
_TOKENS = {"input": "The tokens are in these files (prefixes without .bin and .idx), with commas."}
_OUTPUT = {"output": "The token files get this name, without .bin and .idx."}
_OVERWRITE = {"overwrite": "Files of that name are replaced if this is true."}
_TEXT = {
    "format": "The files hold jsonl, parquet, text or lines; auto goes by their names.",
    "text_key": "The text stands under this key of a JSON line, or in this Parquet column.",
}

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
    "status": {
        "run_dir": "The run that is looked at lives in this folder.",
        "json": "The answer is one JSON object if this is true; --json is short for it.",
    },
    "report": {
        "run_dir": "The run that is reported lives in this folder.",
        "output": "The page is written to this file; null: report.html in the run folder.",
    },
    "generate": {
        "checkpoint": "The model comes from this run folder, or from one checkpoint of it.",
        "prompt": "The text goes on from this prompt; repeat prompt=TEXT for several.",
        "prompt_file": "Each line of this file is a prompt, too.",
        "max_new_tokens": "The text ends after this many new tokens at the latest.",
        "temperature": "Tokens are drawn at this temperature; 0 takes the most likely one.",
        "top_k": "Tokens are drawn among this many of the most likely ones; 0: among all.",
        "top_p": "Tokens are drawn among the likeliest ones that make up this probability.",
        "seed": "What is drawn follows from this number.",
        "runtime.device": "The model runs on a GPU where there is one (auto), or cpu, or cuda.",
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
        "measure": "A matrix product and an all-reduce are timed, too, if this is true.",
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
        "import": "This Hugging Face folder becomes a checkpoint.",
        "export": "This run folder, or checkpoint, becomes a Hugging Face folder.",
        "output": "The result is written to this folder, which must be new.",
        "dtype": "The tensors are written in this format; keep: as they are.",
        "shard_gb": "Each file of an export has at most this many gigabytes (1e9 bytes).",
    },
    "verify": {
        "checkpoint": "This run folder, or checkpoint, is one side of the comparison.",
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
