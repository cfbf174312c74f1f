"""Experts compute the same while somebody listens, whatever is marked on the way to them."""

import pytest
import torch

from hybrid_train.schema.importance import ExpertMetric
from tests.scored import frozen_network, packed_rows, passes_of, settings
from tests.tiny import MEGATRON_WARNINGS, alone, tiny_job

pytestmark = MEGATRON_WARNINGS


@pytest.mark.parametrize("metric", ExpertMetric)
def test_a_model_that_is_listened_to_gives_what_it_gives_alone(metric: ExpertMetric) -> None:
    from hybrid_train.compression.activations import Activations

    with alone() as groups:
        tiny = tiny_job("MEE/E")
        network = frozen_network(tiny, groups)
        passes = passes_of(network, packed_rows(3))  # some tokens are padding, and marked
        heard = Activations(network, tiny.model, settings(experts=metric))
        made = {}
        for name in ("alone", "listening"):
            for batches in passes.groups(3):
                if name == "alone":
                    found = passes.run(batches, lambda out, _: out.mtp_hidden, with_mtp=True)
                else:
                    with heard.listening():
                        found = passes.run(
                            batches, lambda out, _: out.mtp_hidden, with_mtp=True, seeing=heard.see
                        )
                made.setdefault(name, []).extend(hidden for (hidden,) in found)
    assert len(made["alone"]) == 3
    for one, other in zip(made["alone"], made["listening"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
