"""Files of stored targets: whole or absent, of the size that is said before."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from hybrid_train.distillation.target_folder import DIGESTS, SUMS, Header, bytes_of_rows
from hybrid_train.distillation.target_writer import write_whole


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_writer_that_dies_leaves_no_file_of_that_name(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os if call == "fsync" else Path, call, die)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "file", b"content")
    assert not (tmp_path / "file").exists()


def test_a_file_that_is_replaced_is_the_old_one_or_the_new_one(tmp_path: Path) -> None:
    for content in (b"old", b"new"):
        write_whole(tmp_path / "file", content)
        assert (tmp_path / "file").read_bytes() == content
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("what", "number", "dtype"),
    [("hidden", None, "float32"), ("hidden", None, "bfloat16"), ("top_k", 64, "float32")],
)
def test_the_size_that_is_said_is_that_of_the_values(
    what: str, number: int | None, dtype: str
) -> None:
    header = Header(
        what=what, top_k=number, dtype=dtype, vocab_size=512, mtp_depths=2 if number is None else 0,
        tokenizer="", data={}, seed=0, teacher={}, parts=[],
    )  # fmt: skip
    tokens, width = 1000, 48
    shapes = {"hidden": (width,), "tokens": (number or 0,), "logits": (number or 0,), "log_sum": ()}
    kinds = {"tokens": torch.int32, "log_sum": torch.float32}
    values = {
        name: torch.zeros(
            tokens,
            *shapes.get(name, (width,)),
            dtype=kinds.get(name, getattr(torch, dtype)),
        )
        for name in header.names
    }
    of_rows = {name: torch.zeros(1, dtype=torch.int64) for name in (DIGESTS, SUMS)}
    said = bytes_of_rows(1, tokens, header.width(width))
    assert said == sum(one.nbytes for one in (of_rows | values).values())
    assert 0 < len(save(of_rows | values)) - said < 1000  # what is left is the table of the file
