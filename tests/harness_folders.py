"""A random model as our run, as our export, and tasks of lm-eval for it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrid_train.hf.read import import_folder
from hybrid_train.hf.write import export_checkpoint
from hybrid_train.schema.evaluation import Harness
from tests.harness_tasks import LONGEST, TASKS, write_tasks
from tests.hf_random import random_folder

CHAT = (
    "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}</turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
# Around a text the tokenizer of the first folder puts nothing, of the others BOS, or BOS and EOS.
AROUND = {"nothing": "", "begin": "<s> $A", "both edges": "<s> $A </s>"}


@dataclass
class Folders:
    """A model as our run, as our export, and tasks for it."""

    run: Path
    export: Path
    tasks: Path

    def settings(self, **settings: Any) -> Harness:
        given: dict[str, Any] = {"tasks": list(TASKS), "max_length": LONGEST}
        return Harness(include=str(self.tasks), **given | settings)

    def theirs(self, batch: int = 4) -> HFLM:
        model = AutoModelForCausalLM.from_pretrained(self.export, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(self.export)
        return HFLM(
            pretrained=model, tokenizer=tokenizer, max_length=LONGEST, batch_size=batch,
            device="cpu",
        )  # fmt: skip


def written(folder: Path, around: str) -> Folders:
    """Import a random model whose tokenizer puts these tokens around a text, and export it."""
    source = random_folder(1, folder / "source")
    backend = json.loads((source / "tokenizer.json").read_text())
    backend["post_processor"] = None
    if around:
        parts = [
            {"Sequence": {"id": "A", "type_id": 0}}
            if one == "$A"
            else {"SpecialToken": {"id": one, "type_id": 0}}
            for one in around.split()
        ]
        special = {
            name: {"id": name, "ids": [number], "tokens": [name]}
            for name, number in (("<s>", 1), ("</s>", 2))
        }
        backend["post_processor"] = {
            "type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": special,
        }  # fmt: skip
    (source / "tokenizer.json").write_text(json.dumps(backend))
    named = json.loads((source / "tokenizer_config.json").read_text())
    named.pop("add_bos_token", None)
    named.pop("chat_template", None)
    (source / "tokenizer_config.json").write_text(json.dumps(named | {"bos_token": "<s>"}))
    (source / "chat_template.jinja").write_text(CHAT)
    import_folder(source, folder / "run", None)
    export_checkpoint(folder / "run", folder / "export", None, 2**40)
    return Folders(folder / "run", folder / "export", write_tasks(folder / "tasks"))
