"""The Hugging Face folder that a run began with: its files without the weights, kept as they are.

A run folder holds them in `hf/`, and so does every run that starts from its weights. What a run was
tokenized with lies in `tokenizer/`; where that is another tokenizer, the ids of special tokens that
the files name are of no use any more.
"""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hybrid_train.checkpoint import layout
from hybrid_train.checkpoint.lineage import FILE_NAME as LINEAGE
from hybrid_train.data.any_tokenizer import (
    FolderTokenizer,
    copy_tokenizer,
    has_vocabulary,
    open_tokenizer,
    read_settings,
    same_tokenizer,
    tokenizer_files,
)
from hybrid_train.hf import config_json
from hybrid_train.hf.files import as_strict_json, write_json
from hybrid_train.schema.problems import UserError

FOLDER = "hf"
_SETTINGS = (config_json.FILE, config_json.GENERATION_FILE)
_log = logging.getLogger(__name__)


def keep(source: Path, run_dir: Path) -> None:
    """Keep the files of a folder in a run folder that is made of it.

    Raises:
        UserError: if a file of settings is damaged.
    """
    for name in (*_SETTINGS, *tokenizer_files(source)):
        if name.endswith(".json"):
            read_settings(source / name)
    target = run_dir / FOLDER
    target.mkdir()
    kept = [*_SETTINGS, *copy_tokenizer(source, target)]
    for name in _SETTINGS:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    copy_tokenizer(source, run_dir / layout.TOKENIZER)
    rest = [name for name in _names(source) if name not in (*kept, LINEAGE)]
    if rest:
        _log.info("left out, and not part of an export: %s", ", ".join(rest))


def _names(folder: Path) -> list[str]:
    """List what lies in a folder but tensors, and folders by their files."""
    tensors = (".safetensors", ".safetensors.index.json", ".bin", ".pt")
    return sorted(
        str(path.relative_to(folder))
        for path in (*folder.glob("*"), *folder.glob("*/*"))
        if path.is_file() and not path.name.endswith(tensors)
    )


def pass_on(loaded: Path | None, run_dir: Path) -> None:
    """Give a new run the files of the run whose weights it starts from, if it has any."""
    if (run_dir / FOLDER).is_dir():
        shutil.rmtree(run_dir / FOLDER)
    if loaded is None:
        return
    if (loaded / FOLDER).is_dir():
        shutil.copytree(loaded / FOLDER, run_dir / FOLDER)
    if not same_tokenizer(loaded / layout.TOKENIZER, run_dir / layout.TOKENIZER):
        _log.warning(
            "the data of this run is of another tokenizer than %s, whose weights it starts from: "
            "an export has the tokenizer and the token ids of the data",
            loaded,
        )


@dataclass(frozen=True)
class Origin:
    """What a run folder says of special tokens, templates and how to write text.

    Attributes:
        run_dir: the run folder.
        folder: the kept files; None if the run did not begin with a Hugging Face folder.
        is_same_tokenizer: whether the run was tokenized as that folder says.
    """

    run_dir: Path
    folder: Path | None
    is_same_tokenizer: bool

    @classmethod
    def of(cls, run_dir: Path) -> "Origin":
        """Read it from a run folder.

        Raises:
            UserError: if a file is damaged.
        """
        kept = run_dir / FOLDER
        folder = kept if (kept / config_json.FILE).is_file() else None
        same = folder is not None and same_tokenizer(kept, run_dir / layout.TOKENIZER)
        return cls(run_dir, folder, same)

    def token_ids(self) -> dict[str, Any]:
        """Return the token ids for config.json: of the run's tokenizer, empty if it has none."""
        folder = self.run_dir / layout.TOKENIZER
        return _ids_of(open_tokenizer(folder)) if has_vocabulary(folder) else {}

    def ends(self, tokenizer: FolderTokenizer) -> frozenset[int]:
        """Return the tokens that end a text: those of the folder, else the end of a document.

        Raises:
            UserError: if the folder says something else than token ids.
        """
        if self.folder is not None and self.is_same_tokenizer:
            for name in reversed(_SETTINGS):  # that of generation counts, as in transformers
                said = read_settings(self.folder / name).get("eos_token_id")
                if said is not None:
                    return frozenset(_token_ids(self.folder / name, said))
        return frozenset([tokenizer.end_of_document])

    def copy_tokenizer(self, output: Path) -> list[str]:
        """Copy the tokenizer's files to an export; return their names."""
        own = self.run_dir / layout.TOKENIZER
        source = self.folder if self.folder is not None and self.is_same_tokenizer else own
        copied = copy_tokenizer(source, output)
        others = [
            name
            for name in tokenizer_files(own)
            if source != own
            and not (name in copied and (own / name).read_bytes() == (source / name).read_bytes())
        ]
        if others:
            _log.info(
                "the tokenizer is that of the folder that the run began with, and so are its "
                "files; those of data.tokenizer that differ are left out: %s",
                ", ".join(others),
            )
        for name in copied:
            if name.endswith(".json"):
                as_strict_json(output / name)
        return copied

    def write_generation_config(self, output: Path, config: Mapping[str, Any]) -> None:
        """Write generation_config.json, where the folder had one or there was no folder.

        Args:
            output: the folder of the export.
            config: its config.json.
        """
        target = output / config_json.GENERATION_FILE
        if self.folder is None:
            write_json(target, config_json.generation_config(config))
            return
        source = self.folder / config_json.GENERATION_FILE
        if not source.is_file():
            return
        if self.is_same_tokenizer:
            shutil.copyfile(source, target)
            as_strict_json(target)
        else:
            said = read_settings(source)
            write_json(target, self.with_own_ids(said, source))

    def with_own_ids(self, said: Mapping[str, Any], path: Path) -> dict[str, Any]:
        """Put the token ids of the run's tokenizer in place of those in a file; say what goes."""
        ids = self.token_ids()
        gone = [key for key in said if config_json.names_tokens(key) and key not in ids]
        _log.warning(
            "%s: the run was trained with another tokenizer than the folder it began with; token "
            "ids are of the new one: %s%s",
            path.name,
            ", ".join(f"{key} {said.get(key)} -> {ids[key]}" for key in ids),
            f"; left out: {', '.join(gone)}" if gone else "",
        )
        return {key: value for key, value in said.items() if key not in gone} | ids


def _ids_of(tokenizer: FolderTokenizer) -> dict[str, Any]:
    end, named = tokenizer.end_of_document, tokenizer.special_ids
    # A batch needs something to be padded with, and readers take the end of a text for it.
    pad = named.get("pad_token", end)
    return {
        "bos_token_id": named.get("bos_token"),
        "eos_token_id": end,
        "pad_token_id": pad,
    }


def _token_ids(path: Path, said: Any) -> list[int]:
    ids = said if isinstance(said, list) else [said]
    if not all(type(one) is int for one in ids):
        raise UserError(
            f"{path}: eos_token_id is {json.dumps(said)}; it must be a token id, or a list of them"
        )
    return ids
