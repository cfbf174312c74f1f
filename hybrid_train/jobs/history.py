"""history.jsonl in a run folder: what was done to a run beside training it, a line each."""

import json
import time
from collections.abc import Mapping
from pathlib import Path

FILE_NAME = "history.jsonl"


def note(run_dir: Path, event: str, details: Mapping[str, object]) -> None:
    """Append an event with the time, in UTC."""
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with (run_dir / FILE_NAME).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"time": now, "event": event, **details}) + "\n")
