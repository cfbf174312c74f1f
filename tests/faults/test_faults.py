"""A run that several faults happen to ends as one that none happened to; the history names each.

`python -m tests.faults` is the long form, with thirty faults of all kinds.
"""

from pathlib import Path

import pytest

from hybrid_train.tracking import history
from tests.faults import drill

pytestmark = pytest.mark.xdist_group("faults")

STEPS = 150
WHAT = (
    ("kill", 24, 1), ("nan", 33, 0), ("corrupt", 48, 0), ("full", 62, 1), ("spike", 75, 0),
    ("sigterm", 84, 1), ("hang", 104, 1), ("vanish", 124, 0),
)  # fmt: skip
FAULTS: list[drill.Fault] = [
    {"id": number, "kind": kind, "step": step, "rank": rank}
    for number, (kind, step, rank) in enumerate(WHAT)
]


@pytest.mark.slow
def test_a_run_survives_faults_of_many_kinds_to_the_bit(tmp_path: Path) -> None:
    of_data = [fault for fault in FAULTS if fault["kind"] in drill.OF_DATA]
    straight = drill.run(tmp_path / "straight", of_data, STEPS)
    struck = drill.run(tmp_path / "struck", FAULTS, STEPS)
    assert len(struck.struck()) == len(FAULTS) - len(of_data), "a fault did not happen"
    told = history.read(struck.run_dir)
    assert drill.missing(FAULTS, told) == []
    assert drill.unasked(FAULTS, told) == 0
    drill.compare(struck, straight, STEPS)
