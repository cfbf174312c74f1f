"""The config of a run folder that an earlier version of the program wrote."""

from pathlib import Path

from hybrid_train.config import frozen
from hybrid_train.config.compose import compose
from hybrid_train.schema.precision import Gemm

EXCEPTIONS = "precision.exceptions=[{gemms: [wgrad], format: bf16}]"
PHASES = (
    "train.phases=[{name: a}, {name: b, start: 50%, "
    "precision_exceptions: [{gemms: [dgrad], format: bf16}]}]"
)


def test_an_exception_under_its_former_name_is_read(tmp_path: Path) -> None:
    job = compose("train", ["experiment=tiny_cpu", "precision=nvfp4", EXCEPTIONS, PHASES])
    frozen.freeze(job, tmp_path)
    path = tmp_path / frozen.FROZEN_NAME
    written = path.read_text()
    assert written.count("gemms:") == 2
    path.write_text(written.replace("gemms:", "products:"))
    loaded = frozen.load(tmp_path)
    assert loaded.precision.exceptions[0].gemms == [Gemm.wgrad]
    assert loaded.train.phases[1].precision_exceptions is not None
    assert loaded.train.phases[1].precision_exceptions[0].gemms == [Gemm.dgrad]
