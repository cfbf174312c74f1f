"""The cards of conf/hardware: whole, found by name and by device, and those of a user's own."""

from pathlib import Path

import pytest
import yaml

from hybrid_train.config import cards, own_conf
from hybrid_train.config.own_conf import conf_dir
from hybrid_train.config.rules_of_hardware import PINNED_CUDA, gpu_of
from hybrid_train.config.supported import pinned
from hybrid_train.planning.gpu_formats import native_formats
from hybrid_train.schema.hardware import Card
from hybrid_train.schema.precision import GemmFormat
from hybrid_train.schema.problems import ConfigError

F = GemmFormat
FILES = {file.stem: file for file in sorted((conf_dir() / "hardware").glob("*.yaml"))}
PLAIN, TENSOR = {F.fp32, F.bf16}, {F.fp8_tensorwise, F.fp8_delayed}
HOPPER = PLAIN | TENSOR | {F.fp8_blockwise}
FORMATS = {
    **dict.fromkeys(("a100", "a10g"), PLAIN),
    "l40s": PLAIN | TENSOR,
    **dict.fromkeys(("h100", "h200"), HOPPER),
    **dict.fromkeys(("b200", "b300", "gb200", "gb300"), HOPPER | {F.mxfp8, F.nvfp4}),
    **dict.fromkeys(("rtx_5090", "rtx_pro_6000"), HOPPER | {F.nvfp4}),
}
OWN = """title: H20
device_names: [NVIDIA H20]
compute_capability: "9.0"
memory_gb: 96
peak_tflops: {bf16: 148}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return conf/hardware of a working folder of the user's own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(own_conf.ENVIRONMENT, raising=False)
    place = tmp_path / "conf" / "hardware"
    place.mkdir(parents=True)
    return place


def rule(name: str) -> str:
    with pytest.raises(ConfigError) as refused:
        cards.card(name)
    (found,) = refused.value.problems
    return str(found)


def test_the_cards_are_those_of_the_table_of_formats() -> None:
    assert FILES.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FILES)
def test_a_card_says_everything_and_where_it_is_from(name: str) -> None:
    text = FILES[name].read_text()
    said = yaml.safe_load(text)
    fields = set(Card.__dataclass_fields__)
    assert said.keys() == fields, "a figure that is not known is null"
    assert said["peak_tflops"].keys() == {"bf16", "fp8", "fp4"}
    assert "Sources:" in text
    card = cards.card(name)
    assert card.nvlink_gpus == said["nvlink_gpus"]
    assert card.peak_tflops.fp8 is None or card.capability >= (8, 9)
    assert card.peak_tflops.fp4 is None or card.capability >= (10, 0)


@pytest.mark.parametrize("name", FILES)
def test_dense_fp8_has_twice_the_rate_of_bf16(name: str) -> None:
    """A figure with sparsity beside one without would be off by two."""
    peaks = cards.card(name).peak_tflops
    if peaks.bf16 is not None and peaks.fp8 is not None:
        assert peaks.fp8 / peaks.bf16 == pytest.approx(2, rel=0.02)


@pytest.mark.parametrize("name", FILES)
def test_a_card_multiplies_the_formats_of_its_generation(name: str) -> None:
    assert set(native_formats(gpu_of(cards.card(name)))) == FORMATS[name]


def test_a_device_is_of_one_card() -> None:
    devices = [device for name in FILES for device in cards.card(name).device_names]
    assert len(devices) == len(set(devices))


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("NVIDIA GB300", "gb300"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA GeForce RTX 5090", "rtx_5090"),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", "rtx_pro_6000"),
    ],
)
def test_a_card_is_found_by_the_name_of_its_device(device: str, name: str) -> None:
    assert cards.card_of_device(device) == (name, cards.card(name))


@pytest.mark.parametrize(
    "device",
    [
        "NVIDIA H100 PCIe",
        "NVIDIA H100 NVL",
        "NVIDIA H200 NVL",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 5090 Laptop GPU",
        "NVIDIA GeForce RTX 5090 D",
        "NVIDIA A10",
    ],
)
def test_a_slice_or_another_form_of_a_gpu_is_not_that_gpu(device: str) -> None:
    assert cards.card_of_device(device) is None


def test_a_misspelt_card_gets_the_nearest_name() -> None:
    assert rule("gb20").endswith("nearest: gb200")
    assert "must be a card of conf/hardware: a100, a10g, b200" in rule("gb20")
    assert rule("../cluster/slurm_h100").startswith("cluster.hardware = ../cluster/slurm_h100")


def test_a_user_adds_a_card(folder: Path) -> None:
    (folder / "h20.yaml").write_text(OWN)
    card = cards.card("h20")
    assert (card.title, card.capability, card.memory_gb) == ("H20", (9, 0), 96)
    assert (card.peak_tflops.bf16, card.peak_tflops.fp8, card.memory_tb_s) == (148, None, None)
    assert cards.card_of_device("NVIDIA H20") == ("h20", card)
    assert "h20" in rule("nothing of the kind")


def test_a_file_that_is_changed_is_read_again(folder: Path) -> None:
    file = folder / "h20.yaml"
    file.write_text(OWN)
    assert cards.card("h20").memory_gb == 96
    file.write_text(OWN.replace("96", "141"))
    assert cards.card("h20").memory_gb == 141


def test_a_card_of_ones_own_goes_first_for_its_device(folder: Path) -> None:
    (folder / "throttled.yaml").write_text(OWN.replace("NVIDIA H20", "NVIDIA H200"))
    found = cards.card_of_device("NVIDIA H200")
    assert found is not None
    assert found[0] == "throttled"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (OWN.replace("memory_gb", "memory"), "memory: a card has no such setting; nearest: memory"),
        (OWN.replace("memory_gb: 96\n", ""), "memory_gb: every card must say it"),
        (OWN.replace("96", "-1"), "memory_gb = -1.0: must be at least 0.1"),
        (OWN.replace("96", "much"), "memory_gb: Value 'much' of type 'str' could not be converted"),
        (OWN.replace("9.0", "sm_90"), "compute_capability = sm_90: must be two whole numbers"),
        (OWN + "title: twice\n", "this key stands there twice"),
        ("- a\n", "holds a list"),
        ("defaults: [h100]\n" + OWN, "defaults: a card has no such setting"),
    ],
)
def test_what_is_wrong_with_a_card_is_told_with_its_file(
    text: str, told: str, folder: Path
) -> None:
    (folder / "h20.yaml").write_text(text)
    found = rule("h20")
    assert str(folder / "h20.yaml") in found
    assert told in found


def test_a_name_that_the_program_has_is_refused(folder: Path) -> None:
    (folder / "h100.yaml").write_text(OWN)
    assert "give that one another name" in rule("h100")
    (folder / "h100.yaml").write_bytes(FILES["h100"].read_bytes())
    assert cards.card("h100").title == "H100 SXM"  # a copy is no other file


def test_cards_are_asked_under_the_cuda_that_is_installed() -> None:
    major, minor = PINNED_CUDA
    assert pinned()["cuda-toolkit"].startswith(f"{major}.{minor}.")
