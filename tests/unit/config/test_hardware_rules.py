"""Formats that the GPUs of a cluster lack are refused before a job queues, memory at its border."""

from pathlib import Path

import pytest

from hybrid_train.config import cards
from hybrid_train.config.compose import compose
from hybrid_train.config.own_conf import conf_dir
from hybrid_train.config.rules_of_cluster import Room, room_for
from hybrid_train.config.rules_of_hardware import gpu_of, refused_by
from hybrid_train.planning.gpu_formats import Gpu
from hybrid_train.schema.precision import GemmFormat, Precision, PrecisionRule
from hybrid_train.schema.problems import ConfigError, Problem
from tests.sampled import sampled
from tests.tiny import tiny_job

F = GemmFormat
A100 = Gpu("A100", (8, 0), (13, 0))
H100 = Gpu("H100", (9, 0), (13, 0))
B200 = Gpu("B200", (10, 0), (13, 0))
B300 = Gpu("B300", (10, 3), (13, 0))
RTX = Gpu("RTX 5090", (12, 0), (13, 0))
CARDS = cards.names()
EXPERIMENTS = sorted(file.stem for file in (conf_dir() / "experiment").glob("nemotron*.yaml"))
CLUSTERS = ("slurm_h100", "slurm_b200", "slurm_gb200")
IN_NVFP4 = ("nemotron3_super", "nemotron3_ultra")
LARGE = ("experiment=nemotron_h_8b", "cluster=slurm_h100", "processes=128")


def refused(*words: str, job: str = "check") -> dict[str, Problem]:
    with pytest.raises(ConfigError) as error:
        compose(job, words)
    return {one.path: one for one in error.value.problems}


def of(gpu: Gpu, precision: Precision, pattern: str = "M-") -> dict[str, Problem]:
    return {one.path: one for one in refused_by(gpu, tiny_job(pattern, precision=precision))}


@pytest.mark.parametrize(
    ("format", "card", "nearest"),
    [
        ("nvfp4", "h100", "fp8_blockwise"),
        ("mxfp8", "h100", "fp8_blockwise"),
        ("mxfp4", "h200", "fp8_blockwise"),
        ("fp8_tensorwise", "a100", "bf16"),
        ("fp8_blockwise", "a10g", "bf16"),
        ("fp8_blockwise", "l40s", "fp8_tensorwise"),
        ("mxfp8", "rtx_5090", "fp8_blockwise"),
    ],
)
def test_a_format_that_the_card_lacks_is_refused_with_the_nearest_that_it_has(
    format: str, card: str, nearest: str
) -> None:
    found = refused(*LARGE, f"precision.format={format}", f"cluster.hardware={card}")
    (problem,) = found.values()
    assert (problem.path, problem.value) == ("precision.format", format)
    assert problem.nearest == nearest
    assert cards.card(card).title in problem.rule
    assert "precision.backend=emulated" in problem.rule
    compose("check", [*LARGE, f"precision.format={nearest}", f"cluster.hardware={card}"])


@pytest.mark.parametrize("card", CARDS)
def test_every_card_takes_bf16(card: str) -> None:
    compose("check", [*LARGE, f"cluster.hardware={card}"])


@pytest.mark.parametrize("card", ["b200", "b300", "gb200", "gb300"])
@pytest.mark.parametrize("format", ["nvfp4", "mxfp8"])
def test_blackwell_of_data_centres_takes_the_formats_of_blocks(card: str, format: str) -> None:
    compose("check", [*LARGE, f"precision={format}", f"cluster.hardware={card}"])


def test_a_submission_is_refused_in_the_same_way() -> None:
    words = ("experiment=nemotron3_super", "dry_run=true", "cluster.nodes=128")
    found = refused(*words, "cluster=slurm_h100", job="submit")
    assert set(found) == {"precision.format", "precision.exceptions.2.format"}
    assert {one.nearest for one in found.values()} == {"fp8_blockwise"}
    compose("submit", [*words, "cluster=slurm_gb200"])


@pytest.mark.parametrize(
    "words",
    [
        ("precision.backend=emulated",),
        ("cluster.hardware=null",),  # what is not known is not refused
        ("cluster.hardware=b200",),
    ],
)
def test_nothing_is_refused_where_the_card_does_not_multiply_or_is_another(
    words: tuple[str, ...],
) -> None:
    compose("check", [*LARGE, "precision=nvfp4", *words])


@pytest.mark.parametrize("card", ["rtx_5090", "rtx_pro_6000"])
def test_rtx_cards_take_nvfp4_without_rotation_and_stochastic_rounding(card: str) -> None:
    words = (*LARGE, f"cluster.hardware={card}", "precision.format=nvfp4")
    found = refused(*words)
    assert set(found) == {"precision.hadamard", "precision.stochastic_rounding"}
    compose("check", [*words, *(f"{path}={one.nearest}" for path, one in found.items())])


def test_a_format_of_an_exception_is_refused_where_it_is_used() -> None:
    rule = PrecisionRule(format=F.mxfp8, modules=["mlp"])
    precision = Precision(format=F.fp8_tensorwise, exceptions=[rule])
    assert of(B200, precision) == {}
    assert set(of(H100, precision)) == {"precision.exceptions.0.format"}
    assert of(H100, precision, pattern="M") == {}  # without the layer that it means


def test_a_format_that_exceptions_cover_is_not_asked_for() -> None:
    whole = [PrecisionRule(format=F.bf16)]
    assert of(A100, Precision(format=F.nvfp4, exceptions=whole)) == {}


def test_a_phase_with_exceptions_of_its_own_is_looked_at() -> None:
    phases = "[{name: main}, {name: late, start: 90%, precision_exceptions: [{format: mxfp8}]}]"
    found = refused(*LARGE, f"train.phases={phases}")
    (path,) = found
    assert path.startswith("train.phases.1.precision_exceptions.0")


@pytest.mark.parametrize("gpu", [B200, B300, RTX])
def test_float32_scales_of_blocks_are_refused_where_products_take_powers_of_two(gpu: Gpu) -> None:
    precision = Precision(format=F.fp8_blockwise, power_of_two_scales=False)
    assert of(H100, precision) == {}
    (found,) = of(gpu, precision).values()
    assert (found.path, found.nearest) == ("precision.power_of_two_scales", "null")
    assert of(gpu, Precision(format=F.fp8_blockwise)) == {}


def test_a_misspelt_card_is_told_with_the_nearest() -> None:
    found = refused(*LARGE, "cluster.hardware=h10")
    assert found["cluster.hardware"].nearest == "h100"


def test_a_card_needs_gpus() -> None:
    words = ("cluster=slurm_cpu", "experiment=tiny_cpu", "cluster.hardware=h100")
    assert "must be null" in refused(*words)["cluster.hardware"].rule


@pytest.mark.parametrize(
    ("kept", "room"),
    [
        (64_000_000_000, Room.fits),  # 80 % of 80 GB
        (64_000_000_001, Room.tight),
        (80_000_000_000, Room.tight),
        (80_000_000_001, Room.no),
    ],
)
def test_room_in_a_card_ends_at_four_fifths_and_at_the_whole(kept: int, room: Room) -> None:
    assert room_for(kept, cards.card("h100")) is room


def test_a_run_that_does_not_fit_is_refused_with_both_sizes() -> None:
    words = ("experiment=nemotron_h_8b", "cluster=slurm_h100", "processes=8")
    shape = ("parallel.tensor=1", "train.global_batch=768")
    found = refused(*words, *shape, "cluster.hardware=rtx_5090")["cluster.hardware"]
    assert found.value == "rtx_5090"
    assert found.rule.startswith("has 32 GB, and a process keeps ")
    assert "activations not counted" in found.rule
    compose("check", [*words, *shape])  # an H100 has the room


def test_check_takes_a_card_without_a_cluster_of_conf() -> None:
    job = compose(
        "check",
        [
            "experiment=tiny_cpu",
            "runtime.device=auto",
            "train.global_batch=16",
            "cluster.hardware=a100",
        ],
    )
    assert job.cluster is not None
    assert job.cluster.hardware == "a100"


def test_a_card_of_the_users_own_is_held_against(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "conf" / "hardware" / "old.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(
        'title: Old\ndevice_names: [Old]\ncompute_capability: "7.0"\nmemory_gb: 16\n',
    )
    found = refused(*LARGE, "cluster.hardware=old")
    assert found["precision.format"].nearest == "fp32"
    assert gpu_of(cards.card("old")).capability == (7, 0)


PAIRS = [(name, cluster) for name in EXPERIMENTS for cluster in CLUSTERS]


@pytest.mark.parametrize(
    ("name", "cluster"),
    sampled(
        PAIRS,
        ("nemotron3_super", "slurm_h100"),
        ("nemotron3_super", "slurm_gb200"),
        ("nemotron_h_8b", "slurm_b200"),
    ),
)
def test_every_published_run_is_taken_by_the_clusters_that_have_its_formats(
    name: str, cluster: str
) -> None:
    words = [f"experiment={name}", f"cluster={cluster}", "dry_run=true"]
    if "_distilled" in name:
        words.append(f"objective.teacher={conf_dir()}")  # any folder: it is not opened here
    if name in IN_NVFP4 and cluster == "slurm_h100":
        assert {one.nearest for one in refused(*words, job="submit").values()} == {"fp8_blockwise"}
    else:
        compose("submit", words)
