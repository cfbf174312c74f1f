"""The table of all checks, in the order in which they are told, and their run."""

from collections.abc import Callable, Iterator, Mapping

from hybrid_train.runtime.health import cluster, gpus, libraries, speed_checks, system
from hybrid_train.runtime.health.findings import Finding, broken
from hybrid_train.runtime.health.machine import Machine
from hybrid_train.runtime.health.probe import REQUIRED

Checks = Mapping[str, Callable[[Machine], Finding]]

CHECKS: Checks = {
    "Python": libraries.python,
    "torch": libraries.torch,
    "CUDA": gpus.cuda,
    "driver": gpus.driver,
    "GPUs": gpus.gpus,
    "megatron-core": libraries.megatron,
    "Transformer Engine": libraries.kernels("transformer_engine"),
    "mamba-ssm": libraries.kernels("mamba_ssm"),
    "causal-conv1d": libraries.kernels("causal_conv1d"),
    "apex": libraries.kernels("apex"),
    "transformers": libraries.transformers,
    "NCCL": gpus.nccl,
    **system.CHECKS,
    "SLURM": cluster.slurm,
    "container": cluster.container,
}
MEASUREMENTS: Checks = {
    "matrix product": speed_checks.matrix_product,
    "all-reduce": speed_checks.all_reduce,
}
MODULES = (*REQUIRED, *libraries.KERNELS, "transformers")  # what the checks want imported


def findings(machine: Machine, checks: Checks) -> Iterator[tuple[str, Finding]]:
    """Run checks one after the other; one that fails itself is broken, and the rest go on."""
    for name, check in checks.items():
        try:
            yield name, check(machine)
        except Exception as error:  # a machine that is out of order may raise anything
            fault = f"the check itself failed: {type(error).__name__}: {error}"
            yield name, broken(fault, "look at this part by hand, and report the fault")
