"""Rows that scores are made from: what is refused before any is read."""

import pytest

from hybrid_train.jobs.importance import _require_runnable
from hybrid_train.schema.data import Data, Packing
from hybrid_train.schema.importance import ImportanceJob
from hybrid_train.schema.model import Rope, RopeScaling
from hybrid_train.schema.problems import ConfigError
from tests.tiny import LENGTH, tiny_job


def test_a_longer_row_does_not_choose_factors_that_its_documents_are_too_short_for() -> None:
    reads = tiny_job("*-*-", data=Data(packing=Packing.best_fit))
    reads.model.attention.rope = Rope(
        theta=100.0, scaling=RopeScaling.longrope, original_length=LENGTH
    )
    asked = ImportanceJob(checkpoint="", output="")
    _require_runnable(asked, reads, reads.model)
    reads.train.sequence_length = 2 * LENGTH
    with pytest.raises(ConfigError, match=r"sequence_length = 32: must be at most .* \(16\)"):
        _require_runnable(asked, reads, reads.model)
