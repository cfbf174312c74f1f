"""config.json, whatever the family: which one it is of, and which one a model of ours becomes.

The keys of each family are its own (`hf/families/`).
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hybrid_train.anatomy.axes import Axis
from hybrid_train.anatomy.layers import layers
from hybrid_train.hf.families.llama import LLAMA
from hybrid_train.hf.families.mistral import MISTRAL
from hybrid_train.hf.families.nemotron import NEMOTRON
from hybrid_train.hf.families.nemotron_h import NEMOTRON_H
from hybrid_train.hf.families.nemotron_nas import NEMOTRON_NAS
from hybrid_train.hf.families.phi3 import PHI3
from hybrid_train.hf.families.qwen2 import QWEN2
from hybrid_train.hf.families.qwen3 import QWEN3
from hybrid_train.hf.family import Family
from hybrid_train.schema.model import SECTIONS, Model
from hybrid_train.schema.pattern import parse
from hybrid_train.schema.problems import UserError

FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# A new model becomes one of the first of them that can say it.
FAMILIES: tuple[Family, ...] = (
    NEMOTRON_H, LLAMA, QWEN3, QWEN2, PHI3, NEMOTRON, MISTRAL, NEMOTRON_NAS,
)  # fmt: skip
_TOKEN_KEYS = (  # of a generation config, lists of token ids
    "bad_words_ids",
    "begin_suppress_tokens",
    "force_words_ids",
    "forced_decoder_ids",
    "sequence_bias",
    "suppress_tokens",
)
# What of a model section decides no logits: how it began, how it is stored, how it is trained.
_APART = {"init_std", "vocab_multiple", "moe.bias_update_rate", "layers"}


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
        UserError: if it is missing, no JSON, or of another kind of model.
    """
    path = folder / FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    kind = config.get("model_type") if isinstance(config, dict) else None
    known = [one.model_type for one in FAMILIES]
    if kind not in known:
        raise UserError(
            f"{path}: model_type is {kind!r}; only models of {', '.join(known)} are converted"
        )
    return dict(config)


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a config that was read."""
    found = next(one for one in FAMILIES if one.model_type == config["model_type"])
    return found.of_config(config)


def to_model(config: Mapping[str, Any], path: Path) -> Model:
    """Translate a config into our model section.

    Raises:
        UserError: naming every key that is missing, senseless, or of another kind of model.
    """
    return family_of(config).to_model(config, path)


def family_for(model: Model, began: Mapping[str, Any] | None = None) -> Family:
    """Choose the family that a model of ours becomes.

    Args:
        model: ours, with sizes of their own for some layers.
        began: the config.json that it began with; its family is kept if it can say the model.

    Raises:
        UserError: if no family can say it, with what is wrong for each.
    """
    own = [] if began is None else [family_of(began)]
    reasons: dict[str, list[str]] = {}
    for family in (*own, *FAMILIES):
        found = [*family.refusals(model)] or [*family.uneven(model)]
        if not found:
            return family
        reasons.setdefault(family.model_type, found)
    if any(letter in parse(model.pattern).layers for letter in "ME"):  # no other has such layers
        reasons = {NEMOTRON_H.model_type: reasons[NEMOTRON_H.model_type]}
    said = "\n  ".join(f"{name}: {'; '.join(found)}" for name, found in reasons.items())
    raise UserError(f"no family of Hugging Face can say this model:\n  {said}")


def changes(before: Model, now: Model) -> list[str]:
    """Name the settings that decide the logits of a model and are not as they were."""
    old, new = dict(_computation(before)), dict(_computation(now))
    found = [key for key in new if old.get(key) != new[key]]
    return found or (["layers"] if _axes_of_layers(before) != _axes_of_layers(now) else [])


def _computation(model: Model) -> Iterator[tuple[str, object]]:
    """Yield what of a model decides its logits, by the names of our settings."""
    pattern = parse(model.pattern)
    yield "pattern", str(pattern)
    absent = {section for letter, section in SECTIONS.items() if letter not in pattern.layers}
    if not pattern.mtp:
        absent.add("mtp")
    yield from _leaves(model, "", _APART | absent | {"pattern"})


def _axes_of_layers(model: Model) -> list[list[int]]:
    return [[layer.sizes.along(axis) for axis in Axis] for layer in layers(model)]


def _leaves(section: object, prefix: str, apart: set[str]) -> Iterator[tuple[str, object]]:
    assert is_dataclass(section)
    for one in fields(section):
        name, value = prefix + one.name, getattr(section, one.name)
        if name in apart:
            continue
        if is_dataclass(value):
            yield from _leaves(value, f"{name}.", apart)
        else:
            yield name, value


def renewed(said: Mapping[str, Any], made: Mapping[str, Any], model: Model) -> dict[str, Any]:
    """Return a config as it was read, but for the keys that describe the computation.

    Args:
        said: as it was read.
        made: of the same family, for the model as it is now.
        model: that.
    """
    keys = family_of(said).computation_keys(model)
    kept = {key: value for key, value in said.items() if key not in keys}
    return kept | {key: value for key, value in made.items() if key in keys}


def names_tokens(key: str) -> bool:
    """Tell whether the value of a key is made of token ids, which mean nothing elsewhere."""
    return key.endswith(("_token_id", "_token_ids")) or key in _TOKEN_KEYS


def generation_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the generation config that follows from a config.json."""
    return {
        "_from_model_config": True,
        **{key: config[key] for key in TOKEN_IDS if config.get(key) is not None},
        "use_cache": True,
    }
