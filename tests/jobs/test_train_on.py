"""Random Hugging Face folders are imported, trained on twice in a row, and given back."""

from pathlib import Path

import pytest

from hybrid_train.hf.read import import_folder
from hybrid_train.hf.write import export_checkpoint
from tests.hf_random import random_folder
from tests.hf_walk import file_differences, trained_on

ONE_FILE = 2**40  # bytes


# Of tests/hf_walk.py, which has many more and compares tensors, losses and gradients, too: latent
# experts and several chat templates; Mamba, MTP and the spelling of released files.
@pytest.mark.parametrize("seed", [3, 8])
def test_a_folder_that_was_trained_on_comes_back_with_every_file(seed: int, tmp_path: Path) -> None:
    folder = random_folder(seed, tmp_path / "hf")
    import_folder(folder, tmp_path / "imported", None)
    last = trained_on(tmp_path / "imported", folder, tmp_path)
    export_checkpoint(last, tmp_path / "out", None, ONE_FILE)
    assert file_differences(folder, tmp_path / "out") == []
