"""Whatever a job would read is described by what it holds."""

from pathlib import Path

from hybrid_train.jobs.study_stages import file_versions
from hybrid_train.schema.data import Data, Quickstart, Source
from hybrid_train.schema.job_roots import GenerateJob
from hybrid_train.schema.train import TrainJob


def test_token_files_are_described_by_their_index_and_size(tmp_path: Path) -> None:
    prefix = str(tmp_path / "tokens")
    data = Data(sources={"mine": Source(train=[prefix])}, cache=str(tmp_path))
    found = []
    for index, content in ((b"1", b"aa"), (b"2", b"aa"), (b"1", b"aaa"), (b"1", b"aa")):
        Path(f"{prefix}.idx").write_bytes(index)
        Path(f"{prefix}.bin").write_bytes(content)
        found.append(file_versions(TrainJob, {"data": data}, ["data.cache"]))
    assert list(found[0]) == [f"data.sources.train {prefix}"]
    assert found[0] == found[3]
    assert found[0] not in found[1:3]


def test_of_a_run_folder_only_what_can_be_loaded_counts(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_1").mkdir(parents=True)
    for name in ("config.yaml", "history.jsonl", "checkpoints/step_1/weights"):
        (tmp_path / name).write_text("first")
    sections = {"checkpoint": str(tmp_path), "prompt_file": None}
    first = file_versions(GenerateJob, sections)
    (tmp_path / "history.jsonl").write_text("second")
    assert file_versions(GenerateJob, sections) == first
    (tmp_path / "checkpoints" / "step_1" / "weights").write_text("second")
    assert file_versions(GenerateJob, sections) != first


def test_the_quickstart_is_described_by_versions_and_what_is_not_there_by_nothing() -> None:
    data = Quickstart(folder="nowhere", packages=["numpy"])
    found = file_versions(TrainJob, {"data": data, "run_dir": "nowhere"})
    assert found.keys() == {"data"}
    assert found["data"].keys() == {"python", "numpy"}  # type: ignore[attr-defined]
