"""Random Hugging Face folders are imported, trained on twice in a row, and given back."""

from pathlib import Path

import pytest

from hybrid_train.data.token_files import write_documents
from hybrid_train.data.tokenizers import train_byte_level_bpe
from hybrid_train.hf.read import import_folder
from hybrid_train.hf.write import export_checkpoint
from tests.hf_random import random_folder
from tests.hf_walk import file_differences, trained_on
from tests.jobs.command import train
from tests.sampled import sampled

ONE_FILE = 2**40  # bytes


# Of tests/hf_walk.py, which has many more and compares tensors, losses and gradients, too: latent
# experts and several chat templates; Mamba, MTP and the spelling of released files.
@pytest.mark.parametrize("seed", sampled([3, 8]))
def test_a_folder_that_was_trained_on_comes_back_with_every_file(seed: int, tmp_path: Path) -> None:
    folder = random_folder(seed, tmp_path / "hf")
    import_folder(folder, tmp_path / "imported", None)
    last = trained_on(tmp_path / "imported", folder, tmp_path)
    export_checkpoint(last, tmp_path / "out", None, ONE_FILE)
    assert file_differences(folder, tmp_path / "out") == []


def test_a_tokenizer_with_more_tokens_than_the_weights_is_refused(tmp_path: Path) -> None:
    import_folder(random_folder(3, tmp_path / "hf"), tmp_path / "imported", None)
    names = [f"<{number}>" for number in range(99)]
    train_byte_level_bpe(["text"], 400, special_tokens=names).save(tmp_path / "other")
    write_documents(tmp_path / "tokens", [[5, 6, 7, 0]] * 99, vocab_size=300)
    done = train(
        tmp_path / "run", "data=files", f"data.train=[{tmp_path / 'tokens'}]",
        f"data.tokenizer={tmp_path / 'other'}", "checkpoint.load_only=weights",
        f"checkpoint.load={tmp_path / 'imported'}",
    )  # fmt: skip
    assert done.code == 2
    assert f"weights of {tmp_path / 'imported'} have no more rows" in done.err
    assert not (tmp_path / "run").exists()
