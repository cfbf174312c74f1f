"""The plan of a run: what it says, what it refuses, and that it needs neither GPUs nor torch."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.anatomy import counts
from hybrid_train.config.compose import compose
from hybrid_train.config.own_conf import conf_dir
from hybrid_train.data.tokenizers import train_byte_level_bpe
from hybrid_train.jobs import cli
from hybrid_train.jobs.run_plan import decay_steps
from hybrid_train.planning.phases import lay_out
from hybrid_train.schema.units import show_bytes, show_tokens
from tests.sampled import sampled

EXPERIMENTS = {file.stem: file for file in sorted((conf_dir() / "experiment").glob("*.yaml"))}
SUPER = ("experiment=nemotron3_super", "processes=1024")
H100 = "cluster=slurm_h100"


@pytest.fixture(autouse=True)
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["check", *words]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["check", *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def said(text: str, name: str) -> str:
    """Return what stands behind a word at the start of a line."""
    found = re.search(rf"^{name} +(.*?) *$", text, re.MULTILINE)
    assert found, text
    return found[1]


def test_the_plan_says_how_processes_and_batch_are_split(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = plan(capsys, *SUPER)
    # 1024 / (4 * 4) = 64 groups of different sequences, 3072 / 64 = 48 microbatches of one.
    assert said(text, "processes") == "1,024 = tensor 4 x pipeline 4 x context 1 x data 64"
    assert said(text, "batch").startswith(
        "3,072 sequences = data 64 x microbatch 1 x 48 microbatches; 25.2M tokens a step"
    )
    # 1024 / (1 * 32 * 4) = 8 processes hold the same experts.
    assert said(text, "experts") == "512 = expert 32 x 16 a process; expert_tensor 1, expert-data 8"
    assert said(text, "sequence") == "8,192 tokens; 2,048 on each tensor rank between layers"
    # 993,411 steps reach 25T; 51B in steps of 16 x 1,048,576 tokens make 3,040 more.
    length = said(text, "length")
    assert length.startswith(
        "25.051T tokens = 996,451 steps; warm-up 200B = 7,948; decay 5T = 198,683"
    )
    assert "they would wait 5.9% of a step" in said(text, "pipeline")  # 3 / (48 + 3)


def test_every_phase_has_a_row_with_what_it_changes(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, *SUPER)
    assert said(text, "phases").startswith(
        "4, in the table at the end; above it length, work and the time in all"
    )
    rows = {row[0]: row[1:] for row in map(cells, text.splitlines()) if len(row) >= 8}
    assert rows["1"][:5] == ["0", "20T", "794,729", "8,192", "3,072"]
    assert rows["2"][:6] == ["20T", "5T", "198,682", "8,192", "3,072", "schedule"]
    long = "tensor 2 x pipeline 4 x context 64 x data 2, expert 64"
    assert rows["long"][:6] == ["25T", "34B", "2,027", "1,048,576", "16", "4.5e-06"]
    assert rows["long"][7:] == rows["mixed"][7:] == [long]
    assert len(rows["2"]) == 7  # on the layout of the first
    kept = [row[6] for row in rows.values() if row[6].endswith("B")]
    assert kept[0] == kept[1] != kept[2] == kept[3]


def cells(line: str) -> list[str]:
    return re.split(r"  +", line.strip())


def test_the_work_of_a_run_is_that_of_its_phases(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, *SUPER)
    job = compose("check", list(SUPER))
    wanted = sum(
        counts.flops_per_token(job.model, 131072, one.job.train.sequence_length).training
        * (one.end - one.start)
        for one in lay_out(job)
    )
    assert said(text, "work").startswith(f"{wanted:.3g} FLOP in all")


def test_a_run_of_one_phase_has_no_table_of_phases(capsys: pytest.CaptureFixture[str]) -> None:
    assert "phase" not in plan(capsys, "experiment=ladder_3m")


def test_the_plan_says_which_sources_it_lacks(capsys: pytest.CaptureFixture[str]) -> None:
    assert "The phases name sources (syn_crawl_high, code, " in plan(capsys, *SUPER)
    assert "name sources" not in plan(capsys, "experiment=nemotron_h_8b", "processes=128")


def test_steps_of_the_decay_are_those_of_the_phases_that_decay() -> None:
    words = ("experiment=tiny_cpu", "schedule=wsd", "schedule.decay_tokens=1024")
    second = "{name: b, start: 2048, sequence_length: 32}"
    third = "{name: c, start: 2560, sequence_length: 64, constant_lr: 1e-5}"
    job = compose(
        "check", [*words, "train.tokens=5120", f"train.phases=[{{name: a}},{second},{third}]"]
    )
    # Of 2560 scheduled tokens the last 1024: 512 in steps of 256, then 512 in steps of 128.
    assert decay_steps(lay_out(job), 1024) == 2 + 4


def test_a_batch_that_grows_takes_more_steps(capsys: pytest.CaptureFixture[str]) -> None:
    ramp = "train.batch_ramp={tokens:120k,start_batch:4,increment:4}"
    words = ("experiment=tiny_cpu", "train.tokens=1M", "train.global_batch=16", ramp)
    text = plan(capsys, *words)
    assert "grows from 4 by 4 over 120k" in said(text, "batch")
    # 40k tokens each in steps of 4, 8 and 12 times 64 tokens, each stage to its first step beyond:
    # 157 steps end at 40192, 78 at 80128, 52 at 120064; 880k in steps of 1024 make 860 more.
    assert said(text, "length").startswith("1M tokens = 1,147 steps")


def test_the_plan_shows_the_cut_and_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, *SUPER)
    pattern = compose("check", list(SUPER)).model.pattern
    (cut,) = re.findall(r"^[ME*|]+/\*E/\*E$", text, re.MULTILINE)
    assert cut.count("|") == 3
    assert cut.replace("|", "") == pattern
    layers = cut.split("/")[0].split("|")
    named = [f"embedding + {layers[0]}", *layers[1:3], f"{layers[3]} + head + MTP"]
    for number, contents in enumerate(named):
        row = rf"^{number}  {re.escape(contents)} +{number} +[01]\.\d\d +[\d.]+B$"
        assert re.search(row, text, re.MULTILINE)


def test_the_cut_that_is_printed_can_be_given_back(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("experiment=nemotron_h_8b", "processes=8", "parallel.pipeline=4")
    text = plan(capsys, *words, "parallel.tensor=1")
    (cut,) = re.findall(r"^[M*|-]+$", text, re.MULTILINE)
    again = plan(capsys, *words, "parallel.tensor=1", f'model.pattern="{cut}"')
    assert again == text


def test_a_rank_with_several_stages_keeps_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, *SUPER, "parallel.virtual_pipeline=2")
    table = text[text.index("\nstage ") : text.index("\nCost")]
    stages, kept = table.strip().split("\n\n")
    ranks = [re.split(r"  +", row.strip())[-3] for row in stages.splitlines()[1:]]
    assert ranks == ["0", "1", "2", "3"] * 2
    assert [row.split()[0] for row in kept.splitlines()[1:]] == ["0", "1", "2", "3"]


def test_the_least_time_follows_from_the_peak(capsys: pytest.CaptureFixture[str]) -> None:
    assert "not known" in said(plan(capsys, *SUPER), "time")
    text = plan(capsys, *SUPER, "runtime.peak_tflops=1000")
    found = re.search(r"([\d.]+e\+24) FLOP in all, ([\d.]+) TFLOP", said(text, "work"))
    assert found
    # A TFLOP at 1000 TFLOP/s takes a millisecond.
    assert f"more than {float(found[2]) / 1000:.2f}s a step" in said(text, "time")
    days = float(found[1]) / 1024 / 1e15 / 86400
    assert f"{int(days)}d" in said(text, "time")


def test_what_the_plan_does_not_need_may_be_unset(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, *SUPER)
    _, unset = text.split("Still to be set")
    assert re.findall(r"^  (\S+)", unset, re.MULTILINE) == ["data.train", "data.tokenizer"]


def test_data_that_is_set_must_be_there(capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, *SUPER, "data.train=[nowhere/tokens]", "data.tokenizer=nowhere")
    assert "data.train = nowhere/tokens: there is no file" in told
    assert "data.tokenizer = nowhere: must be a folder with a tokenizer.json" in told


def test_with_data_nothing_is_left_to_be_set(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tokenizer = train_byte_level_bpe(["a text to learn from"] * 9, vocab_size=280)
    tokenizer.save(tmp_path)
    for suffix in (".bin", ".idx"):
        (tmp_path / f"tokens{suffix}").touch()
    words = [*SUPER, f"data.train=[{tmp_path}/tokens]", f"data.tokenizer={tmp_path}"]
    text = plan(capsys, *words, "model.vocab_size=null")
    assert "Still to be set" not in text
    rows = -(-tokenizer.vocab_size // 128) * 128
    assert f"vocabulary {rows};" in said(text, "model")


def test_a_vocabulary_of_unknown_size_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(capsys, *SUPER, "model.vocab_size=null")
    assert "model.vocab_size = null: must be set" in told


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["processes=1000"], "processes = 1000: must be a multiple of 128"),
        (["processes=1000"], "nearest: 1024"),
        (["processes=0"], "processes = 0: must be at least 1"),
        (["parallel.tensor=3"], "parallel.tensor = 3: must divide model.attention.heads (32)"),
        (["parallel.pipeline=89"], "parallel.pipeline = 89: makes 89 stages of 88 main layers"),
        (["train.global_batch=3000"], "train.global_batch = 3000: must be a multiple of 1 "),
        (["runtime.peak_tflops=0"], "runtime.peak_tflops = 0.0: must be at least 1e-06"),
    ],
)
def test_a_plan_that_cannot_run_is_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert told in refusal(capsys, *SUPER, *words)


def test_every_problem_is_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    told = refusal(
        capsys, *SUPER, "processes=100", "train.sequence_length=8190", "parallel.expert=3"
    )
    for path in ("processes", "train.sequence_length", "parallel.expert"):
        assert f"  {path} = " in told


def test_a_check_is_refused_under_torchrun(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    assert "without torchrun" in refusal(capsys, *SUPER)


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan(capsys, *words, "json=true"))
    return found


def test_json_says_what_the_tables_say(capsys: pytest.CaptureFixture[str]) -> None:
    found, text = as_json(capsys, *SUPER), plan(capsys, *SUPER)
    assert found["problems"] == []
    layout, batch, length = found["layout"], found["batch"], found["length"]
    degrees = [layout[name] for name in ("tensor", "pipeline", "context", "data")]
    assert (found["processes"], degrees) == (1024, [4, 4, 1, 64])
    assert (layout["expert"], layout["experts_per_process"], layout["expert_data"]) == (32, [16], 8)
    assert (batch["microbatches"], batch["tokens_per_step"]) == (48, 3072 * 8192)
    assert (length["steps"], length["warmup_steps"]) == (996_451, 7_948)
    assert said(text, "model").startswith(
        f"{show_tokens(found['model']['parameters'])} parameters, "
        f"{show_tokens(found['model']['active_parameters'])} active"
    )
    assert sum(found["model"]["parameters_by_kind"].values()) == found["model"]["parameters"]
    assert said(text, "work").startswith(f"{found['flops']['of_the_run']:.3g} FLOP in all")
    for rank in found["pipeline_ranks"]:
        kept = [rank[f"{part}_bytes"] for part in ("weights", "gradients", "optimizer", "kept")]
        assert sum(kept[:3]) == kept[3]
        number, cost = rank["pipeline_rank"], f"{rank['cost']:.2f}"
        cells = [str(number), cost, show_tokens(rank["parameters"]), *map(show_bytes, kept)]
        assert re.search(r" *" + r" +".join(map(re.escape, cells)), text)
    assert {one["name"] for one in found["phases"]} == {"1", "2", "long", "mixed"}
    assert [one["setting"] for one in found["still_to_be_set"]] == ["data.train", "data.tokenizer"]
    assert found["cluster"] is None


def test_json_lists_the_problems_of_a_run_that_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main(["check", *SUPER, "processes=1000", "--json"]) == 2
    shown = capsys.readouterr()
    (problem,) = json.loads(shown.out)["problems"]
    assert (problem["setting"], problem["value"], problem["nearest"]) == ("processes", 1000, "1024")
    assert "processes = 1000: must be a multiple of 128" in shown.err


def test_layers_count_from_1_in_settings_tables_and_json(
    capsys: pytest.CaptureFixture[str],
) -> None:
    tiny = ("experiment=tiny_cpu", "precision=mxfp8", "model.pattern=M*-M")
    words = (*tiny, "precision.exceptions=[{format: bf16, layers: 1}]")
    text, found = plan(capsys, *words), as_json(capsys, *words)
    assert re.search(r"^mamba\.in_proj +bf16 +1, 1 +exception 0: layers 1", text, re.MULTILINE)
    assert re.search(r"^mamba\.in_proj +mxfp8 +1, 4 *$", text, re.MULTILINE)
    modules = found["formats"][0]["modules"]
    assert {"module": "mamba.in_proj", "format": "bf16", "layers": [1]} in modules
    assert {"module": "mamba.in_proj", "format": "mxfp8", "layers": [4]} in modules
    assert "layers count from 1" in refusal(
        capsys, *tiny, "precision.exceptions=[{format: bf16, layers: 0}]"
    )


def test_a_cluster_says_how_many_nodes_a_run_takes_and_what_is_left_of_a_gpu(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("experiment=nemotron_h_8b", H100)
    text, found = plan(capsys, *words, "processes=128"), as_json(capsys, *words, "processes=128")
    cluster = found["cluster"]
    most = max(rank["kept_bytes"] for rank in found["pipeline_ranks"])
    assert (cluster["nodes"], cluster["gpus_per_node"]) == (16, 8)
    assert cluster["most_kept_bytes"] >= most
    assert cluster["left_bytes"] == 80 * 10**9 - cluster["most_kept_bytes"]
    kept = show_bytes(cluster["most_kept_bytes"])
    assert said(text, "cluster") == "16 nodes with 8 GPUs on each"
    assert (
        said(text, "memory")
        == f"keeps {kept} of 80 GB (H100 SXM): fits; activations are not counted"
    )
    assert cluster["room"] == "fits"
    assert "how much memory a GPU has" not in text


def test_a_cluster_says_what_its_gpus_are(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("experiment=nemotron_h_8b", H100, "processes=128")
    text = plan(capsys, *words)
    assert said(text, "GPU") == (
        "H100 SXM, 80 GB at 3.35 TB/s; bf16 989, fp8 1,979 TFLOP/s; NVLink 900 GB/s among 8"
    )
    formats = "fp32, bf16, fp8_tensorwise, fp8_delayed, fp8_blockwise"
    assert said(text, "formats") == f"the GPU multiplies {formats}"
    gpu = as_json(capsys, *words)["cluster"]["gpu"]
    assert (gpu["name"], gpu["title"], gpu["memory_gb"]) == ("h100", "H100 SXM", 80)
    assert gpu["peak_tflops"] == {"bf16": 989, "fp8": 1979, "fp4": None}
    assert gpu["formats"] == ["fp32", "bf16", "fp8_tensorwise", "fp8_delayed", "fp8_blockwise"]
    unknown = as_json(capsys, *words, "cluster.hardware=null")["cluster"]
    assert (unknown["gpu"], unknown["room"], unknown["gpu_memory_bytes"]) == (None, None, None)
    assert "cluster.hardware=NAME says" in plan(capsys, *words, "cluster.hardware=null")


def test_a_run_in_more_than_four_fifths_of_a_gpu_is_tight(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The phase with the long sequences keeps most, and it counts."""
    whole = as_json(capsys, *SUPER)
    phases = [one["most_kept_bytes"] for one in whole["phases"]]
    most = max(phases)
    assert most > phases[0]
    monkeypatch.chdir(tmp_path)
    card = tmp_path / "conf" / "hardware" / "small.yaml"
    card.parent.mkdir(parents=True)
    memory_gb = most / 0.9 / 1e9
    card.write_text(
        f"title: Small\ndevice_names: []\ncompute_capability: '10.0'\nmemory_gb: {memory_gb}\n"
    )
    words = (*SUPER, "cluster=slurm_b200", "cluster.hardware=small")
    found = as_json(capsys, *words)["cluster"]
    assert (found["most_kept_bytes"], found["room"]) == (most, "tight")
    left = show_bytes(round(memory_gb * 1e9) - most)
    told = f"(Small): tight, {left} are left for buffers of CUDA and NCCL and for activations,"
    assert told in said(plan(capsys, *words), "memory")


@pytest.mark.parametrize(
    ("words", "tflops", "source"),
    [
        ([], 989, "bf16, H100 SXM"),
        (["precision.format=fp8_blockwise"], 1979, "fp8_blockwise, H100 SXM"),
        (["precision=nvfp4", "cluster.hardware=b200"], 9000, "nvfp4, B200"),
        (["precision=nvfp4", "precision.backend=emulated"], 989, "bf16, H100 SXM"),
        (["runtime.peak_tflops=500"], 500, "runtime.peak_tflops"),
    ],
)
def test_no_run_is_faster_than_the_peak_of_its_card(
    words: list[str], tflops: float, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["experiment=nemotron_h_8b", H100, "processes=128", *words]
    flops = as_json(capsys, *words)["flops"]
    assert flops["peak_flops"] == tflops * 1e12
    told = f"the whole peak of {tflops:g} TFLOP/s ({source})"
    assert told in " ".join(plan(capsys, *words).split())


def test_a_card_without_a_figure_for_a_format_gives_no_time(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("experiment=nemotron_h_8b", "cluster=slurm_b200", "processes=128", "precision=nvfp4")
    assert as_json(capsys, *words, "cluster.hardware=b300")["flops"]["peak_flops"] is None


def test_processes_are_those_of_the_nodes_where_none_are_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ("experiment=nemotron_h_56b", H100)
    assert as_json(capsys, *words, "cluster.nodes=64")["processes"] == 512
    assert as_json(capsys, *words, "cluster.nodes=64", "processes=512")["cluster"]["nodes"] == 64


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["cluster.nodes=2", "processes=8"], "processes = 8: must be 16: cluster.nodes (2) x 8"),
        (["processes=12", "parallel.tensor=1"], "processes = 12: must be a multiple of 8, the"),
        (["runtime.device=cpu"], "runtime.device = cpu: leaves 8 GPUs of every node idle"),
        (
            ["parallel.tensor=8", "parallel.pipeline=2", "cluster.nodes=3"],
            "nodes = 3: makes 24 processes",
        ),
        (["precision.format=nvfp4"], "nvfp4: H100 SXM (compute capability 9.0, CUDA 13.0) does"),
    ],
)
def test_what_a_cluster_cannot_give_is_refused(
    words: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in refusal(capsys, "experiment=nemotron_h_8b", H100, *words)


@pytest.mark.parametrize(
    "name",
    sampled(EXPERIMENTS, "quickstart", "ladder_60m", "nemotron3_super"),
)
def test_every_experiment_has_a_plan(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    stated = re.search(r"^# processes: (\d+)", EXPERIMENTS[name].read_text(), re.MULTILINE)
    processes = int(stated[1]) if stated else 1
    words = [f"experiment={name}", f"processes={processes}"]
    if "_distilled" in name:
        words.append(f"objective.teacher={conf_dir()}")  # any folder: there is no such parent here
    text = plan(capsys, *words)
    assert said(text, "processes").startswith(f"{processes:,} = ")
    tables = text.count("pipeline rank")
    assert tables == (2 if "|" in text else 1)


def test_a_check_imports_neither_torch_nor_megatron(tmp_path: Path) -> None:
    code = (
        "import sys; from hybrid_train.jobs import cli; code = cli.main(sys.argv[1:]); "
        "sys.exit(code or sum(name in sys.modules for name in ('torch', 'megatron', 'numpy')))"
    )
    command = [sys.executable, "-c", code, "check", *SUPER]
    done = subprocess.run(command, check=False, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.iterdir()) == []


def test_streams_need_no_tokenizer_to_be_planned(capsys: pytest.CaptureFixture[str]) -> None:
    text = plan(capsys, "experiment=tiny_cpu", "data=streams", "processes=1")
    # END; 32 + 1 words of copy, 64 + 64 + 1 of recall, 2 x 4 brackets, 23 + 1 of sums: 195,
    # padded to a multiple of 128.
    assert "vocabulary 256" in said(text, "model")


def test_formats_are_shown_where_something_is_quantized_and_again_where_a_phase_changes_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    phases = "[{name: a}, {name: heal, start: 50%, precision_exceptions: [{format: bf16}]}]"
    tiny = ("experiment=tiny_cpu", "processes=1")
    text = plan(capsys, *tiny, "precision=mxfp8", f"train.phases={phases}")
    first, healed = text.split("Formats of the GEMMs")[1:]
    assert "mamba.in_proj" in first
    assert "mxfp8" in first
    assert "from phase heal on" in healed
    assert "exception 0: everything" in healed
    healed, notes = healed.split("a GPU that computes quantized GEMMs would refuse it")
    assert "mxfp8" not in healed
    assert "mamba.in_proj in mxfp8 on a GPU" in notes
    assert "Formats of the GEMMs" not in plan(capsys, *tiny, "precision=bf16")


def test_weights_that_are_kept_in_fp8_are_counted_in_each_phase(
    capsys: pytest.CaptureFixture[str],
) -> None:
    phases = "[{name: a}, {name: heal, start: 50%, precision_exceptions: [{format: bf16}]}]"
    words = ("experiment=tiny_cpu", "processes=1", "precision=fp8_tensorwise")
    words += ("precision.exceptions=[]", "precision.fp8_param_gather=true")
    text = plan(capsys, *words, f"train.phases={phases}")
    first, healed = text.split("Formats of the GEMMs")[1:]
    # The nine of MTP stay in bfloat16.
    assert said(first, "FP8 parameters:") == "weights of 12 of 21 linear layers, kept and gathered"
    assert "FP8 parameters" not in healed
