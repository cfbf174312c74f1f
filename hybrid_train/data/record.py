"""What the data of a run is, written into its folder, so that a resume on other data is noticed."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrid_train.schema.problems import UserError

if TYPE_CHECKING:
    from hybrid_train.data.run_data import RunData

FILE_NAME = "data.json"


def record_of(data: "RunData") -> dict[str, Any]:
    """Describe the data by what changes when it changes."""
    splits = {"train": data.train, "validation": data.held_out}
    return {
        "tokenizer": data.tokenizer.fingerprint,
        "sources": {
            name: {
                split: {
                    "documents": len(opened.documents[name]),
                    "tokens": opened.documents[name].tokens,
                    "fingerprint": opened.documents[name].fingerprint(),
                }
                for split, opened in splits.items()
                if name in opened.documents
            }
            for name in data.names
        },
    }


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Say which parts of two records differ, by name of the source."""
    found = []
    if before["tokenizer"] != now["tokenizer"]:
        found.append("the tokenizer is another one")
    for name in dict.fromkeys((*before["sources"], *now["sources"])):
        old, new = before["sources"].get(name), now["sources"].get(name)
        if old is None or new is None:
            found.append(f"source {name} {'is new' if old is None else 'is gone'}")
            continue
        for split in dict.fromkeys((*old, *new)):
            if old.get(split) != new.get(split):
                sizes = [
                    f"{part['tokens']:,} tokens in {part['documents']:,} documents"
                    if part
                    else "nothing"
                    for part in (old.get(split), new.get(split))
                ]
                other = ", of other content" if sizes[0] == sizes[1] else ""
                found.append(f"source {name}, {split}: {sizes[0]} before, {sizes[1]} now{other}")
    return found


def read_record(run_dir: Path) -> dict[str, Any] | None:
    """Read the record of a run; None if it has none yet.

    Raises:
        UserError: if the file is damaged.
    """
    path = run_dir / FILE_NAME
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {"tokenizer": found["tokenizer"], "sources": dict(found["sources"])}
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged ({error!r}); delete it if the data is that of the run"
        ) from error


def write_record(run_dir: Path, record: Mapping[str, Any]) -> None:
    """Write the record of a run; a reader never sees half of it."""
    half = run_dir / f"{FILE_NAME}.tmp"
    half.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    half.replace(run_dir / FILE_NAME)
