"""Random Hugging Face folders of the family, by seed: every option of model, tokenizer, texts."""

import json
import math
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import NemotronHConfig, NemotronHForCausalLM, PreTrainedTokenizerFast

from hybrid_train.hf import config_json
from hybrid_train.hf.families.nemotron_h import LAYER_TYPES
from hybrid_train.hf.read import SINGLE
from tests.hf_folders import mtp_tensors, scatter, write_files

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<turn>", "</turn>")
LINES = ["hello world good line", "system user assistant", "a line of words, and one more"]
CHAT = "{% for m in messages %}<turn>{{ m['role'] }}\n{{ m['content'] }}</turn>{% endfor %}"
_POSITIONS = 512


def random_folder(seed: int, folder: Path) -> Path:
    """Write the folder of a seed: its tensors in float32, everything else as drawn."""
    draw = random.Random(seed)
    tokenizer = _tokenizer(draw)
    model = _model(draw, seed, len(tokenizer) + draw.choice((0, 0, 1, 2, 13)))
    model.save_pretrained(folder, save_original_format=draw.random() < 0.5)
    tensors = load_file(folder / SINGLE) | mtp_tensors(folder)
    (folder / SINGLE).unlink()
    write_files(folder, tensors, draw.choice((1, 1, 2, 3)))
    _write_tokenizer(draw, tokenizer, folder)
    _write_settings(draw, folder)
    return folder


def _tokenizer(draw: random.Random) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 262 to 300 tokens; its size is odd as often as even."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=draw.randint(262, 300), special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    backend.train_from_iterator(LINES * 3, trainer)
    around = draw.choice(("nothing", "nothing", "begin", "both"))
    if around != "nothing":
        end = " </s>" if around == "both" else ""
        backend.post_processor = processors.TemplateProcessing(
            single=f"<s> $A{end}", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    names = {"eos_token": "</s>"}
    names |= {"bos_token": "<s>"} if around != "nothing" or draw.random() < 0.7 else {}
    names |= {"pad_token": draw.choice(("<pad>", "</s>"))} if draw.random() < 0.8 else {}
    names |= {"unk_token": "<unk>"} if draw.random() < 0.5 else {}
    turns = list(SPECIAL[4:]) if draw.random() < 0.7 else []
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=draw.choice((_POSITIONS, 10**30)),
        additional_special_tokens=turns, **names,
    )  # fmt: skip


def _model(draw: random.Random, seed: int, vocab_size: int) -> NemotronHForCausalLM:
    config = NemotronHConfig(vocab_size=vocab_size, **_sizes(draw))
    config._attn_implementation = config._experts_implementation = "eager"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = NemotronHForCausalLM(config).eval()
    scatter(model, seed)
    if config.tie_word_embeddings:  # transformers 5.23 ties nothing
        model.lm_head.weight.data = model.model.embeddings.weight.data.clone()
    return model


def _sizes(draw: random.Random) -> dict[str, Any]:
    heads, mamba_heads, experts = (draw.choice((1, 2, 3, 4, 6)) for _ in range(3))
    experts = max(experts, 2)  # transformers 5.23 cannot run one
    letters = [draw.choice("M*-E") for _ in range(draw.randint(1, 6))]
    inner = draw.choice((["*", "E"], ["*"], ["E"], ["-", "*"], ["*", "E", "-"]))
    mtp = {
        "num_nextn_predict_layers": 1,
        "mtp_layers_block_type": [LAYER_TYPES[letter] for letter in inner],
    }
    return {
        "hidden_size": draw.choice((16, 24, 32, 40)),
        "layers_block_type": [LAYER_TYPES[letter] for letter in letters],
        "num_attention_heads": heads,
        "num_key_value_heads": draw.choice(_divisors(heads)),
        "head_dim": draw.choice((4, 8, 12)),
        "intermediate_size": draw.choice((24, 40, 64)),
        "ssm_state_size": draw.choice((4, 8, 16)),
        "mamba_num_heads": mamba_heads,
        "mamba_head_dim": draw.choice((4, 8, 16)),
        "n_groups": draw.choice(_divisors(mamba_heads)),
        "chunk_size": draw.choice((4, 8, 16, 32, 128)),
        "n_routed_experts": experts,
        "num_experts_per_tok": draw.randint(1, experts),
        "moe_intermediate_size": draw.choice((8, 24, 32)),
        "moe_shared_expert_intermediate_size": draw.choice((8, 16, 48)),
        "moe_latent_size": draw.choice((None, None, 8, 20)),
        "routed_scaling_factor": draw.choice((1.0, 2.5, 0.5)),
        "layer_norm_epsilon": draw.choice((1e-5, 1e-6)),
        "tie_word_embeddings": draw.random() < 0.3,
        "max_position_embeddings": _POSITIONS,
        "time_step_min": 1e-30,  # transformers takes it for a lower limit of dt
        **(mtp if draw.random() < 0.4 else {}),
    }


def _divisors(number: int) -> list[int]:
    return [one for one in range(1, number + 1) if number % one == 0]


def _write_tokenizer(draw: random.Random, tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer, with chat templates of each kind that there is."""
    kind = draw.choice(("none", "inside", "file", "several", "legacy", "folder"))
    if kind in ("file", "inside"):
        tokenizer.chat_template = CHAT
    elif kind == "several":
        tokenizer.chat_template = {"default": CHAT, "tool_use": CHAT + "tools"}
    tokenizer.save_pretrained(folder, save_jinja_files=kind != "inside")
    if kind == "legacy":
        (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT}))
    elif kind == "folder":
        (folder / "chat_templates").mkdir()
        (folder / "chat_templates" / "tools.jinja").write_text(CHAT)
    if draw.random() < 0.3:
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text()) | {"add_bos_token": draw.random() < 0.5}
        path.write_text(json.dumps(settings, indent=1))


def _write_settings(draw: random.Random, folder: Path) -> None:
    """Write config.json as one of the kinds of writers would, and how to write text."""
    ids = {
        "bos_token_id": draw.choice((1, None)),
        "eos_token_id": draw.choice((2, [2], [2, 5], [5, 2, 7])),
        "pad_token_id": draw.choice((3, 2, None)),
    }
    config = json.loads((folder / config_json.FILE).read_text()) | ids
    limit = draw.choice(("absent", "tagged", "bare"))
    values = {"tagged": [0.0, {"__float__": "Infinity"}], "bare": [0.0, math.inf]}
    config.pop("time_step_limit", None)
    config |= {"time_step_limit": values[limit]} if limit in values else {}
    if draw.random() < 0.5:  # as the released files have it
        words = config.pop("layers_block_type")
        letters = {word: letter for letter, word in LAYER_TYPES.items()}
        config["hybrid_override_pattern"] = "".join(letters[word] for word in words)
        config["num_hidden_layers"] = len(words)
        config["rms_norm_eps"] = config.pop("layer_norm_epsilon")
    if draw.random() < 0.5:
        config |= {"auth": {"by": "a lab", "numbers": [1, 2.5]}, "notes": "é, 水"}
    (folder / config_json.FILE).write_text(json.dumps(config, indent=2))
    path = folder / config_json.GENERATION_FILE
    if draw.random() < 0.2:
        path.unlink(missing_ok=True)
        return
    more = draw.choice(({}, {"do_sample": True, "top_p": 0.95}, {"suppress_tokens": [7]}))
    kept = {key: value for key, value in ids.items() if value is not None}
    path.write_text(json.dumps(kept | {"eos_token_id": draw.choice((2, [2, 5], [5]))} | more))
