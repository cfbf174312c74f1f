"""Figures of results, models side by side, and the files: whole, known by hashes, or refused."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hybrid_train.schema.problems import UserError
from tests.tiny import MEGATRON_WARNINGS, alone

pytestmark = MEGATRON_WARNINGS
NUMBER = 60


@pytest.fixture(scope="module", autouse=True)
def process() -> Any:
    with alone():  # what is measured imports Megatron
        yield


def result(model: str = "a", better: float = 0.0, task: str = "sums", **changes: Any) -> Any:
    """Items of two groups, right at random; with better > 0 some more."""
    from hybrid_train.evaluation.results import Checkpoint, Result
    from hybrid_train.evaluation.runner import ItemResult

    random = np.random.default_rng(0)
    right = random.random(NUMBER) < 0.5 + better
    items = tuple(
        ItemResult(f"item {n}", {"accuracy": (float(one), 1.0)}, f"shots={n % 2}", said={"n": n})
        for n, one in enumerate(right)
    )
    checkpoint = Checkpoint(f"{model}/step_00000001", model * 64, "tokenizer")
    made = Result(task, checkpoint, {"items": NUMBER}, "hash", 0, {"torch": "2"}, items)
    return replace(made, **changes)


def heldout(model: str = "a", tokenizer: str = "one", worse: float = 0.0) -> Any:
    """Documents with nats, whose text has other tokens for another tokenizer."""
    from hybrid_train.evaluation.runner import ItemResult

    random = np.random.default_rng(1)
    items = []
    for number in range(NUMBER):
        tokens, nats = 100.0 + number + 10 * (tokenizer != "one"), random.normal(300 + worse, 20)
        values = {"loss": (nats, tokens), "bits_per_byte": (nats / math.log(2), 400.0 + number)}
        items.append(ItemResult(f"code/{number}", values))
    made = result(model, task="heldout", items=tuple(items))
    return replace(made, checkpoint=replace(made.checkpoint, tokenizer=tokenizer))


def test_figures_are_of_all_items_and_of_each_group_with_intervals() -> None:
    one = result()
    whole, first, second = one.figures()
    grades = [item.values["accuracy"][0] for item in one.items]
    assert (whole.group, whole.items, first.group, first.items) == ("", 60, "shots=0", 30)
    assert whole.value == pytest.approx(sum(grades) / 60)
    assert first.value == pytest.approx(sum(grades[::2]) / 30)
    assert whole.low < whole.value < whole.high
    assert second.high - second.low > whole.high - whole.low


def test_perplexity_is_the_exponential_of_the_loss_and_of_its_interval() -> None:
    loss, perplexity, bits = heldout().figures()
    assert (loss.metric, perplexity.metric, bits.metric) == ("loss", "perplexity", "bits_per_byte")
    ends = [math.exp(one) for one in (loss.value, loss.low, loss.high)]
    assert [perplexity.value, perplexity.low, perplexity.high] == pytest.approx(ends)


def test_a_difference_is_paired_so_it_is_surer_than_two_intervals() -> None:
    from hybrid_train.evaluation.results import difference

    one, other = heldout("a"), heldout("b", worse=2.0)
    found = difference(one, other, "", "loss")
    wanted = next(iter(other.figures())).value - next(iter(one.figures())).value
    assert found is not None
    assert found.estimate == pytest.approx(wanted)
    assert 0 < found.low < found.high
    alone = next(iter(one.figures()))
    assert found.high - found.low < (alone.high - alone.low) / 10  # documents vary far more
    better = difference(result("a"), result("b", better=0.2), "", "accuracy")
    assert better is not None
    assert 0 < better.low < better.estimate
    same = difference(result("a"), result("b"), "shots=1", "accuracy")
    assert same is not None
    assert same.low <= 0 == same.estimate <= same.high


def test_what_is_one_per_token_is_not_compared_across_tokenizers_and_is_marked() -> None:
    from hybrid_train.evaluation.results import difference, rows

    one, other = heldout("a"), heldout("b", tokenizer="two", worse=2.0)
    assert difference(one, other, "", "loss") is None
    assert difference(one, other, "", "bits_per_byte").low > 0  # type: ignore[union-attr]
    lines = {line[2]: line for line in rows([one, other])}
    assert set(lines) == {"loss *", "perplexity *", "bits_per_byte"}
    assert lines["loss *"][-2:] == ("-", "-")
    assert lines["bits_per_byte"][-2].startswith("+")


def test_few_documents_have_figures_without_an_interval() -> None:
    from hybrid_train.evaluation.results import difference, rows

    few = [replace(one, items=one.items[:4]) for one in (heldout("a"), heldout("b", worse=2.0))]
    assert [line[4] for line in rows(few[:1])] == ["-"] * 3
    apart = difference(*few, "", "loss")
    assert apart is not None
    assert apart.estimate > 0
    assert apart.high == -apart.low == math.inf


def test_results_of_other_items_or_settings_are_refused_by_name() -> None:
    from hybrid_train.evaluation.results import difference

    for what, change in (("items", {"items_hash": "other"}), ("settings", {"settings": {}})):
        with pytest.raises(UserError, match=rf"sums: b/step_00000001 .* other {what} than a/"):
            difference(result(), replace(result("b"), **change), "", "accuracy")


def test_a_file_is_read_as_it_was_written_and_has_what_a_reader_needs(tmp_path: Path) -> None:
    from hybrid_train.evaluation.results import ResultFolder

    folder, one = ResultFolder(tmp_path / "new"), result()
    assert folder.open([one]) == [None]
    folder.write(one)
    assert folder.open([replace(one, items=(), versions={})]) == [one]
    (path,) = (tmp_path / "new").iterdir()
    assert path.name == "a-step_00000001-aaaaaaaa-sums.json"
    found = json.loads(path.read_text())
    assert found["hashes"] == one.hashes
    assert found["versions"] == {"torch": "2"}
    assert found["figures"][0]["metric"] == "accuracy"
    assert found["items"][3]["said"] == {"n": 3}


@pytest.mark.parametrize(
    ("change", "what"),
    [({"seed": 1}, "settings"), ({"settings": {}}, "settings"), ({"items_hash": "b"}, "items")],
)
def test_a_file_with_other_content_is_refused_and_stays(
    tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    from hybrid_train.evaluation.results import ResultFolder

    folder, one = ResultFolder(tmp_path), result()
    folder.open([])
    folder.write(one)
    (path,) = tmp_path.iterdir()
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"was made with other {what}; choose another output"):
        folder.read(replace(one, **change))
    assert path.read_bytes() == before


@pytest.mark.parametrize("harm", ["cut", "changed"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, harm: str) -> None:
    from hybrid_train.evaluation.results import ResultFolder

    folder, one = ResultFolder(tmp_path), result()
    folder.open([])
    folder.write(one)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    changed = text.replace('"items_hash": "hash"', '"items_hash": "bash"')
    path.write_text(text[:500] if harm == "cut" else changed)
    with pytest.raises(UserError, match=rf"{path.name} is damaged"):
        folder.read(one)


def test_a_folder_of_anything_else_is_no_folder_of_results(tmp_path: Path) -> None:
    from hybrid_train.evaluation.results import ResultFolder

    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match=r"holds thesis.txt, which is no result"):
        ResultFolder(tmp_path)
    with pytest.raises(UserError, match="is a file"):
        ResultFolder(tmp_path / "thesis.txt")


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured() -> None:
    from hybrid_train.evaluation.results import ResultFolder

    with pytest.raises(UserError, match="output = /proc/results: cannot be written to"):
        ResultFolder(Path("/proc/results")).open([])
