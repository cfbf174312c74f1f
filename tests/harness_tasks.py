"""Tasks of lm-eval from files: one of each kind of request, with data that they are made for."""

import json
import random
from pathlib import Path
from typing import Any

import yaml

WORDS = ["hello", "world", "good", "line", "system", "user", "assistant", "a", "of", "words"]
WORDS += ["and", "one", "more"]
TASKS = ("choices", "letters", "last_word", "texts", "answers")
LONGEST = 96  # tokens that the model of a test reads at once; some documents are longer


def write_tasks(folder: Path, documents: int = 6) -> Path:
    """Write a folder of tasks and their data."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(5)
    rows = [_document(draw, number) for number in range(documents)]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, settings in _settings().items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(data)}},
            "test_split": "test",
            "metadata": {"version": 1},
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | settings))
    return folder


def _document(draw: random.Random, number: int) -> dict[str, Any]:
    def words(least: int, most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, most)))

    text = words(3, 9) + (" <turn>" if number % 3 == 0 else "")
    return {
        "text": text,
        "long": words(60, 90) if number % 2 else words(1, 9),
        "choices": [words(1, 4), words(2, 5), words(1, 2), words(1, 1) + " "],
        "gold": draw.randrange(4),
        "word": draw.choice(WORDS),
    }


def _settings() -> dict[str, dict[str, Any]]:
    few = {"num_fewshot": 2, "fewshot_split": "test", "fewshot_config": {"sampler": "default"}}
    return {
        "choices": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}} ",  # a space at its end goes over to the choices
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{gold}}",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
            **few,
        },
        "letters": {
            "output_type": "multiple_choice",
            "doc_to_text": "{{text}}\nAnswer:",
            "doc_to_choice": ["a", "o", "e", "s"],
            "doc_to_target": "{{gold}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        },
        "last_word": {
            "output_type": "loglikelihood",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "target_delimiter": "",
            "metric_list": [
                {"metric": "perplexity", "aggregation": "perplexity"},
                {"metric": "acc", "aggregation": "mean"},
            ],
        },
        "texts": {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{long}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
        "answers": {
            "output_type": "generate_until",
            "doc_to_text": "{{text}}\nMore:",
            "doc_to_target": "{{word}}",
            "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 24, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
            **few,
        },
    }
