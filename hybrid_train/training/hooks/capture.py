"""The hook that captures CUDA graphs of layers once, behind the warm-up steps."""

import logging

from hybrid_train.megatron import cuda_graphs
from hybrid_train.schema.gpu import Gpu
from hybrid_train.training.engine import StepReport
from hybrid_train.training.loop import Hook, Run
from hybrid_train.training.network import Network

_log = logging.getLogger(__name__)


class CaptureGraphs(Hook):
    """Captures the layers of all networks when enough steps have warmed them up.

    A run that goes on warms up anew: a graph is of this process alone. Does nothing where layers
    are not to be captured, as on a CPU.
    """

    def __init__(self, settings: Gpu) -> None:
        self._left = settings.cuda_graph_warmup_steps

    def step_end(self, run: Run, report: StepReport) -> None:
        if self._left == 0:
            return
        self._left -= 1
        if self._left == 0:
            for network in run.engine.networks.values():
                if network.optimizer is not None and cuda_graphs.captures_layers(network.chunks):
                    self._capture(run, network)

    def _capture(self, run: Run, network: Network) -> None:
        engine = run.engine
        assert network.optimizer is not None
        cuda_graphs.capture_layers(
            network.chunks,
            network.optimizer,
            network.groups,
            network.balance_losses,
            shape=(engine.microbatch, engine.sequence_length),
            global_batch=engine.sequences_per_step,
        )
        _log.info("CUDA graphs of the layers are captured; steps replay them from here on")
