"""Ids beyond the vocabulary are named when they are read, where the first sample is blind."""

from pathlib import Path

import pytest

from hybrid_train.data.run_data import RunData, count_tokens, open_data
from hybrid_train.data.token_files import write_documents
from hybrid_train.planning.phases import lay_out
from hybrid_train.schema.data import Data, Packing, Remote, Source
from hybrid_train.schema.problems import UserError
from hybrid_train.schema.train import Train, TrainJob
from tests.unit.data.corpus import write_stray
from tests.unit.data.prepare.texts import TOKENIZER

SIZE = TOKENIZER.vocab_size  # 400; a model may pad it to 512


def opened(tmp_path: Path, train: str, validation: str, packing: Packing) -> RunData:
    TOKENIZER.save(tmp_path / "tokenizer")
    data = Data(
        sources={"web": Source(train=[train], validation=[validation])},
        tokenizer=str(tmp_path / "tokenizer"),
        packing=packing,
        remote=Remote(cache=str(tmp_path / "cache")),
    )
    train_ = Train(tokens="20k", sequence_length=256, microbatch=2, global_batch=2)
    job = TrainJob(train=train_, data=data)
    return open_data(job.data, lay_out(job), barrier=lambda: None, is_main=True)


@pytest.mark.parametrize("stray", [SIZE, SIZE + 100, 65_535, -1])
@pytest.mark.parametrize("packing", list(Packing))
def test_a_stray_id_is_named_with_source_file_document_and_place(
    tmp_path: Path, stray: int, packing: Packing
) -> None:
    prefix = write_stray(tmp_path / "a", stray, SIZE)
    for name in (prefix, f"file://{prefix}"):  # the second goes through blocks, as over a network
        data = opened(tmp_path, name, name, packing)
        phase_span = data.plans[0].phase_span
        held_out = data.validation(phase_span, data_rank=0, data_size=1)
        assert held_out is not None
        said = (
            rf"^source web: document \d+ of {name} holds token {stray} at place 40, but the "
            rf"vocabulary ends at {SIZE - 1}"
        )
        with pytest.raises(UserError, match=said):
            list(data.loader(phase_span, data_rank=0, data_size=1, tokens_seen=0))
        with pytest.raises(UserError, match=said):
            list(held_out)


@pytest.mark.parametrize("stray", [SIZE, -1])
def test_counting_the_tokens_of_a_file_names_a_stray_id(tmp_path: Path, stray: int) -> None:
    prefix = write_stray(tmp_path / "a", stray, SIZE)
    with pytest.raises(UserError, match=rf"a\.bin holds token {stray}, but the vocabulary ends"):
        count_tokens([prefix], SIZE)


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("packing", list(Packing))
def test_a_part_without_a_token_is_named(tmp_path: Path, split: str, packing: Packing) -> None:
    write_documents(tmp_path / "none", [[], [], []], vocab_size=SIZE)
    write_documents(tmp_path / "some", [[1] * 600 + [0]], vocab_size=SIZE)
    files = {"train": str(tmp_path / "some"), "validation": str(tmp_path / "some")}
    files[split] = str(tmp_path / "none")
    said = f"the {split} part of source web holds no token: all 3 documents of {tmp_path}/none are"
    with pytest.raises(UserError, match=said):
        opened(tmp_path, files["train"], files["validation"], packing)
