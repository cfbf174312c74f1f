"""The export of a run as a checkpoint of Megatron-LM, Megatron-Bridge or NeMo 2.

Weights go under the same names, by stream; the place in the training goes with them, the state of
the optimizer does not: theirs is tied to groups of parameters that their arguments make. The
checkpoint says that it was saved without (`no_save_optim`), and they load it so.

Modules of Transformer Engine ask a checkpoint for an `_extra_state`. Without FP8 it is empty, and
so it is written for each module that may ask: Megatron-Core refuses a checkpoint without.
"""

import argparse
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml  # type: ignore[import-untyped]

from hybrid_train.anatomy.kinds import HEAD
from hybrid_train.anatomy.layers import stored_tensors
from hybrid_train.checkpoint.block_moves import Cast, Copied, move_all, moves
from hybrid_train.checkpoint.tensor_files import CheckpointWriter, StoredTensors, torch_saved
from hybrid_train.data.any_tokenizer import copy_tokenizer, has_vocabulary
from hybrid_train.hf.files import new_folder
from hybrid_train.hf.write import Checkpoint, Weights, open_checkpoint, trained_length
from hybrid_train.nvidia import arguments
from hybrid_train.nvidia.checkpoint_folders import (
    CONTEXT,
    IO_FILE,
    LATEST,
    MODEL_FILE,
    PREFIX_OF_NEMO,
    RELEASE,
    RUN_CONFIG,
    TOKENIZERS,
    TRACKER,
    TRAIN_STATE,
    WEIGHTS,
    Trainer,
)
from hybrid_train.nvidia.nemo_context import CALLED, TARGET, io_json
from hybrid_train.planning.degrees import padded_vocab_size
from hybrid_train.schema.units import counted

_CONTENT = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
_ONE_RANK = dict.fromkeys(
    ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"), 1
)
_PROVIDER = "megatron.bridge.models.hybrid.hybrid_provider.HybridModelProvider"
_NEMO_MODEL = "nemo.collections.llm.gpt.model.ssm.MambaModel"
_NEMO_DATA = "PreTrainingDataModule"  # whose state NeMo keeps under the name of its class
_NEMO_TOKENIZERS = (
    "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer",
    "nemo.collections.common.tokenizers.sentencepiece_tokenizer.SentencePieceTokenizer",
)
_NEMO_CONFIG = "nemo.collections.llm.gpt.model.ssm.SSMConfig"
_log = logging.getLogger(__name__)


class _Run:
    """What is exported: a checkpoint of ours, and what it says of itself."""

    def __init__(self, path: Path, dtype: torch.dtype | None) -> None:
        self.checkpoint: Checkpoint = open_checkpoint(path)
        self.cast = Cast(dtype)
        self.model = self.checkpoint.model
        self.rows = padded_vocab_size(self.checkpoint.vocab_size, self.model.vocab_multiple)
        self.tensors = list(stored_tensors(self.model, self.rows))
        self.fields = arguments.to_fields(self.model)
        position = self.checkpoint.found.position()
        self.step = int(position.get("step", 0))
        self.length = trained_length(self.checkpoint)
        self.samples = int(position.get("tokens", 0)) // self.length

    @property
    def sizes(self) -> dict[str, int]:
        """What all of them say of vocabulary and sequences."""
        return {"vocab_size": self.checkpoint.vocab_size, "seq_length": self.length}


def export_as(path: Path, output: Path, dtype: torch.dtype | None, trainer: Trainer) -> str:
    """Write a checkpoint of ours as one of theirs.

    Args:
        path: a run folder or one checkpoint of it.
        output: the new folder; must not be there yet.
        dtype: number format of the weights; None: as they are; expert biases stay float32.
        trainer: whose.

    Returns:
        What was done, in words.

    Raises:
        UserError: if the checkpoint is damaged, or theirs cannot say what the model is; nothing is
            left behind.
    """
    run = _Run(path, dtype)
    with StoredTensors(run.checkpoint.found.path) as stored:
        weights = Weights(stored, best=dtype == torch.float32)
        run.checkpoint.require_model(weights)
        with new_folder(output) as partial:
            folder = _layout(partial, run, trainer)
            _write(folder, run, weights, trainer)
    _say(run, output, trainer)
    tensors = counted(len(run.tensors), "tensor")
    return f"{output}: {tensors} of {run.checkpoint.found.path} for {trainer.value}"


def _layout(folder: Path, run: _Run, trainer: Trainer) -> Path:
    """Write all files but those of the tensors; return the folder that these go to."""
    tokenizer = run.checkpoint.found.run_dir / "tokenizer"
    if trainer is Trainer.nemo:
        weights, context = folder / WEIGHTS, folder / CONTEXT
        weights.mkdir()
        context.mkdir()
        _keep_tokenizer(tokenizer, context / TOKENIZERS[1])
        model = _nemo_model(run, _nemo_tokenizer(context / TOKENIZERS[1]))
        _write_yaml(context / MODEL_FILE, model)
        (context / IO_FILE).write_text(json.dumps(io_json(model), indent=1), encoding="utf-8")
        return weights
    # Megatron-LM refuses iteration 0 before November 2025 (#2199), and knows this word always.
    is_release = trainer is Trainer.megatron_lm and run.step == 0
    weights = folder / (RELEASE if is_release else f"iter_{run.step:07d}")
    weights.mkdir()
    (folder / TRACKER).write_text(RELEASE if is_release else str(run.step), encoding="utf-8")
    _keep_tokenizer(tokenizer, weights / TOKENIZERS[0])
    if trainer is Trainer.bridge:
        _write_yaml(weights / RUN_CONFIG, _run_config(run))
        state = torch_saved(_train_state(run))
        (weights / TRAIN_STATE).write_bytes(state)
        (folder / LATEST).write_bytes(state)
    return weights


def _keep_tokenizer(source: Path, target: Path) -> None:
    if has_vocabulary(source):
        target.mkdir()
        copy_tokenizer(source, target)


def _write(folder: Path, run: _Run, weights: Weights, trainer: Trainer) -> None:
    prefix = PREFIX_OF_NEMO if trainer is Trainer.nemo else ""
    copied = [
        Copied(
            key, prefix + key, run.cast.of(weights.dtype(key), keeps_float32=one.float32)
        )
        for key, _, one in run.tensors
    ]  # fmt: skip
    writer = CheckpointWriter(folder)
    try:
        move_all(moves(copied, weights, writer), weights, run.cast)
        for name in _extra_states(run):
            writer.put(prefix + name, [None])
        writer.finish(_common(run, trainer))
    finally:
        writer.close()


def _extra_states(run: _Run) -> Iterator[str]:
    """Name the empty states of Transformer Engine's modules: linears, norms, attention."""
    for name in dict.fromkeys(_modules(run)):
        yield f"{name}._extra_state/shard_0_1"
    for key, shape, one in run.tensors:
        if one.of_experts:
            module = key.removesuffix(".weight")
            for expert in range(shape[0]):
                yield f"{module}._extra_state/shard_{expert}_{shape[0]}"


def _modules(run: _Run) -> Iterator[str]:
    for key, _, one in run.tensors:
        module, _, name = key.rpartition(".")
        if one.of_experts or name not in ("weight", "layer_norm_weight", "z"):
            continue
        yield module.removesuffix(".weight")  # of a packed one: in_proj.weight.z
        if one.linear == "attention.qkv":
            yield f"{module.rpartition('.')[0]}.core_attention"
    yield HEAD.stored.removesuffix(".weight")  # one that is tied has no weight, and asks, too


def _common(run: _Run, trainer: Trainer) -> dict[str, Any]:
    """Return what lies beside the tensors."""
    if trainer is Trainer.nemo:
        return {
            "global_step": run.step,
            "epoch": 0,
            "content_metadata": _CONTENT,
            _NEMO_DATA: {"consumed_samples": run.samples},
        }
    common = {
        "checkpoint_version": 3.0,
        "iteration": run.step,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": _CONTENT,
    }
    if trainer is Trainer.bridge:
        return common
    return {"args": argparse.Namespace(**_arguments(run)), **common}


def _arguments(run: _Run) -> dict[str, Any]:
    """Return arguments of Megatron-LM: of the model, the place in its training, the format."""
    train, half = run.checkpoint.job.train, _is_half(run)
    return {
        **arguments.to_arguments(run.model),
        **run.sizes,
        **_ONE_RANK,
        "max_position_embeddings": run.length,
        "padded_vocab_size": run.rows,
        "iteration": run.step,
        "consumed_train_samples": run.samples,
        "consumed_valid_samples": 0,
        "skipped_train_samples": 0,
        "micro_batch_size": train.microbatch,
        "global_batch_size": train.global_batch,
        "bf16": half,
        "fp16": False,
        "params_dtype": torch.bfloat16 if half else torch.float32,
        "world_size": 1,
        "data_parallel_size": 1,
        "ckpt_format": "torch_dist",
        "use_dist_ckpt": True,
        "no_save_optim": True,
        "no_save_rng": True,
    }


def _is_half(run: _Run) -> bool:
    wanted = run.cast.dtype
    return (
        run.checkpoint.job.precision.base.value == "bf16"
        if wanted is None
        else wanted == torch.bfloat16
    )


def _fields(run: _Run) -> dict[str, Any]:
    half = _is_half(run)
    dtype = {TARGET: f"torch.{'bfloat16' if half else 'float32'}", CALLED: False}
    return {
        **run.fields,
        **run.sizes,
        "activation_func": {
            TARGET: arguments.FUNCTIONS[run.model.mlp.activation][0],
            CALLED: False,
        },
        "bf16": half,
        "fp16": False,
        "params_dtype": dtype,
    }


def _run_config(run: _Run) -> dict[str, Any]:
    return {
        "model": {
            TARGET: _PROVIDER,
            **_fields(run),
            **_ONE_RANK,
            "should_pad_vocab": True,
        },
        "checkpoint": {"save_optim": False, "save_rng": False, "fully_parallel_save": True},
    }


def _train_state(run: _Run) -> dict[str, torch.Tensor]:
    """Return the counters of Megatron-Bridge: `TrainState.state_dict` of its training/state.py."""
    counts = {
        "step": run.step,
        "consumed_train_samples": run.samples,
        "skipped_train_samples": 0,
        "consumed_valid_samples": 0,
    }
    flags = dict.fromkeys(("do_train", "do_valid", "do_test"), False)
    return {
        **{name: torch.tensor(count, dtype=torch.int64) for name, count in counts.items()},
        "floating_point_operations_so_far": torch.tensor(0.0, dtype=torch.float64),
        **{name: torch.tensor(flag) for name, flag in flags.items()},
    }


def _nemo_model(run: _Run, tokenizer: dict[str, str]) -> dict[str, Any]:
    fields = _fields(run)
    pattern = fields.pop("hybrid_layer_pattern")
    config = {TARGET: _NEMO_CONFIG, "hybrid_override_pattern": pattern, **fields}
    return {
        TARGET: _NEMO_MODEL,
        "config": config,
        **({"tokenizer": tokenizer} if tokenizer else {}),
    }


def _nemo_tokenizer(folder: Path) -> dict[str, str]:
    """Name the class for a tokenizer in a context; its path is relative to the context."""
    if (folder / "tokenizer.json").is_file():
        return {TARGET: _NEMO_TOKENIZERS[0], "pretrained_model_name": folder.name}
    if (folder / "tokenizer.model").is_file():
        return {TARGET: _NEMO_TOKENIZERS[1], "model_path": f"{folder.name}/tokenizer.model"}
    return {}


def _write_yaml(path: Path, content: dict[str, Any]) -> None:
    path.write_text(yaml.safe_dump(content, sort_keys=True), encoding="utf-8")


def _say(run: _Run, output: Path, trainer: Trainer) -> None:
    _log.info("the optimizer's state stays behind: %s is loaded without", output)
    if trainer is Trainer.nemo:
        _log.info(
            "%s names model and tokenizer; trainer, optimizer and data are those of your recipe "
            "(nl.AutoResume with RestoreConfig)",
            output / CONTEXT / IO_FILE,
        )
    if loss := run.cast.in_words(len(run.tensors)):
        _log.warning("%s", loss)
