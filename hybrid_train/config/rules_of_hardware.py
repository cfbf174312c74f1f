"""Rules about the GPUs of a cluster: the card is known, and it multiplies the formats of the run.

The same rule of formats is asked of the GPU that is there when a run starts (`precision/te.py`).
Whether a run fits into the memory of a card: `rules_of_cluster.kept_fits_the_gpus`.
"""

from collections.abc import Iterator

from hybrid_train.anatomy.gemm_formats import formats_of
from hybrid_train.config import cards
from hybrid_train.config.rules_of_precision import EMULATE, is_native, written_formats
from hybrid_train.planning.gpu_formats import (
    BLOCKS_TAKE_FLOAT_SCALES,
    NVFP4_ROTATES_AND_ROUNDS,
    Gpu,
    nearest_native,
)
from hybrid_train.planning.gpu_formats import is_native as multiplies
from hybrid_train.schema.hardware import Card
from hybrid_train.schema.job_roots import CheckJob, SubmitJob
from hybrid_train.schema.layer_ranges import is_range
from hybrid_train.schema.precision import GemmFormat
from hybrid_train.schema.problems import ConfigError, Problem
from hybrid_train.schema.train import TrainJob

PINNED_CUDA = (13, 0)  # of the torch that constraints.txt installs; the start of a run asks again


def card_of(job: TrainJob) -> Card | None:
    """Return the card of the cluster that a job is for; None where it names none that is sound."""
    cluster = job.cluster if isinstance(job, SubmitJob | CheckJob) else None
    if cluster is None or cluster.hardware is None:
        return None
    try:
        return cards.card(cluster.hardware)
    except ConfigError:
        return None  # `card_is_known` reports it


def gpu_of(card: Card) -> Gpu:
    """Return a card as far as formats depend on it, under the CUDA that we install."""
    return Gpu(card.title, card.capability, PINNED_CUDA)


def card_is_known(job: TrainJob, _: int) -> Iterator[Problem]:
    """`cluster.hardware` names a file of conf/hardware that says what a card is."""
    cluster = job.cluster if isinstance(job, SubmitJob | CheckJob) else None
    if cluster is None or cluster.hardware is None:
        return
    try:
        cards.card(cluster.hardware)
    except ConfigError as error:
        yield from error.problems


def card_multiplies_the_formats(job: TrainJob, _: int) -> Iterator[Problem]:
    """The GPUs of the cluster have the formats that they are asked for, before a job queues."""
    card = card_of(job)
    if card is not None and is_native(job):
        yield from refused_by(gpu_of(card), job)


def refused_by(gpu: Gpu, job: TrainJob) -> Iterator[Problem]:
    """Yield each format of a job that a GPU does not multiply, and options that it does not take.

    Args:
        gpu: that computes the GEMMs itself.
        job: with rules of layers that can be read; nothing is said of others.
    """
    if not all(is_range(rule.layers) for rule in job.precision.exceptions):
        return
    of_layers = formats_of(job.model, job.precision).values()
    used = {format for one in of_layers for format in one.formats.values()}
    for path, format in written_formats(job):
        if format in used and not multiplies(format, gpu):
            rule = f"{gpu} does not multiply it; {EMULATE}"
            yield Problem(path, format.value, rule, nearest_native(format, gpu).value)
    yield from _refused_options(gpu, job, used)


def _refused_options(gpu: Gpu, job: TrainJob, used: set[GemmFormat]) -> Iterator[Problem]:
    """Yield options of formats that a GPU multiplies, which it does not take with them."""
    precision = job.precision
    native = {format for format in used if multiplies(format, gpu)}
    blocks = GemmFormat.fp8_blockwise in native and not BLOCKS_TAKE_FLOAT_SCALES.has(gpu)
    if blocks and precision.power_of_two_scales is False:
        rule = f"{gpu} takes fp8_blockwise with scales that are powers of two alone; {EMULATE}"
        yield Problem("precision.power_of_two_scales", False, rule, "null")
    if GemmFormat.nvfp4 not in native or NVFP4_ROTATES_AND_ROUNDS.has(gpu):
        return
    for name, words in (("hadamard", "rotate"), ("stochastic_rounding", "round at random")):
        if getattr(precision, name):
            rule = f"{gpu} does not {words} in NVFP4, as compute capability 10.x does; {EMULATE}"
            yield Problem(f"precision.{name}", True, rule, "false")


HARDWARE_RULES = (card_is_known, card_multiplies_the_formats)
