"""What a report says of several runs: their last values, what differs between their configs."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hybrid_train.config.secrets import masked
from hybrid_train.jobs.report_figures import compared, style
from hybrid_train.jobs.report_page import Content, Table, page, without_credentials
from hybrid_train.jobs.run_list import failures, shown
from hybrid_train.jobs.run_state import RunState
from hybrid_train.tracking.metrics import show_duration

# What is compared first comes first: on a telephone the rest is out of sight.
_HEADS = (
    "run", "avg loss", "val loss", "steps", "tokens", "state", "gradient norm", "tokens/s",
    "a step", "MFU", "time of steps", "goodput",
)  # fmt: skip
_NOT_COMPARED = ("run_dir",)  # differs always
_MISSING = object()  # of a key that a config does not have


def comparison(states: Mapping[str, RunState], left_out: Mapping[str, str], place: Path) -> str:
    """Return the page of several runs.

    Args:
        states: by the names of the runs.
        left_out: why others cannot be read, by their names.
        place: the folder that has them all.
    """
    states = {name: without_credentials(state) for name, state in states.items()}
    troubles = [*failures(states.items()), *((name, masked(why)) for name, why in left_out.items())]
    tables = [_differences(states)]
    if troubles:
        tables.append(Table("Failed, or left out", ("run", "why"), troubles))
    return page(
        Content(
            title=place.resolve().name or str(place),
            subtitle=f"{len(states)} run{'s' * (len(states) != 1)} in {place}",
            first_tables=[_last_values(states)],
            pictures=list(compared(states)),
            tables=tables,
        ),
        list(states.values()),
    )


def _last_values(states: Mapping[str, RunState]) -> Table:
    rows = [tuple(_values(name, state)) for name, state in states.items()]
    colours = [style(number)[0] for number in range(len(states))]
    return Table("Last values", _HEADS, rows, colours=colours, numbers=True)


def _values(name: str, state: RunState) -> Iterator[str]:
    yield name
    yield shown("smoothed_loss", state.smoothed_loss)
    yield shown("validation_loss", state.last_of("validation_loss"))
    yield f"{state.step:,}"
    yield shown("tokens", state.tokens)
    yield state.state
    for metric in ("grad_norm", "tokens_per_s", "step_time_s", "mfu"):
        yield shown(metric, state.last_of(metric))
    times = (line.get("step_time_s", 0.0) for line in state.lines)
    yield show_duration(sum(seconds for seconds in times if math.isfinite(seconds)))
    share = state.goodput.share if state.goodput else math.nan
    yield f"{share:.1%}" if math.isfinite(share) else "-"


def _differences(states: Mapping[str, RunState]) -> Table:
    """Return the table of the settings that differ; the shorter of runs and settings are across."""
    found = differing([state.config for state in states.values()])
    title = "Settings that differ"
    if not found:
        note = "None: these runs have the same config." if len(states) > 1 else "There is one run."
        return Table(title, (), (), note)
    colours = [style(number)[0] for number in range(len(states))]
    if len(found) > len(states):
        rows = [(key, *values) for key, values in found.items()]
        return Table(title, ("setting", *states), rows, numbers=True)
    rows = [
        (name, *(values[number] for values in found.values())) for number, name in enumerate(states)
    ]
    return Table(title, ("run", *found), rows, colours=colours, numbers=True)


def differing(configs: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the settings that are not the same in all configs, with the value in each."""
    flat = [dict(_settings(config)) for config in configs]
    keys = sorted({key for one in flat for key in one})
    values = {key: [one.get(key, _MISSING) for one in flat] for key in keys}
    return {
        key: [_written(value) for value in of_key]
        for key, of_key in values.items()
        if key not in _NOT_COMPARED and any(value != of_key[0] for value in of_key)
    }


def _settings(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _written(value: Any) -> str:
    if value is _MISSING:
        return "-"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
