"""The tables of `count` and `models` hold the figures of `anatomy/counts.py`."""

import re

import pytest

from hybrid_train.anatomy import counts
from hybrid_train.config.compose import compose
from hybrid_train.config.own_conf import conf_dir
from hybrid_train.jobs import cli
from hybrid_train.schema.pattern import parse

NAMES = sorted(file.stem for file in (conf_dir() / "model").glob("*.yaml"))


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(words) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    return shown.out


def numbers(text: str, name: str) -> list[int]:
    """Return the whole numbers of the row that starts with `name`."""
    (row,) = [line for line in text.splitlines() if line.startswith(name)]
    return [int(word.replace(",", "")) for word in row[len(name) :].split()]


def test_the_sums_of_a_model_are_its_counts(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "count", "model=nemotron3_super")
    model = compose("count", ["model=nemotron3_super"]).model
    size, flops = counts.parameters(model, 131072), counts.flops_per_token(model, 131072, 8192)
    tensors = counts.tensors(model).total
    assert numbers(text, "total") == [
        88, tensors, size.total, size.active, flops.forward, flops.training,
    ]  # fmt: skip
    assert size.total == 123_611_033_088  # of the published checkpoint


def test_the_parts_of_a_model_sum_to_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "count", "model=nemotron3_super")
    table = text.split("\n\n")[1].splitlines()[1:]
    # The last four columns of every row: parameters, active, forward and training FLOPs.
    rows = [[int(word.replace(",", "")) for word in line.split()[-4:]] for line in table]
    *parts, total = rows
    assert len(parts) == 7  # M, *, E, MTP, embedding, head, final norm
    assert [sum(column) for column in zip(*parts, strict=True)] == total


def test_only_layers_that_a_model_has_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "count", "model=nemotron_h_8b")
    assert "experts (E)" not in text
    assert "MTP  " not in text
    assert numbers(text, "Mamba-2 (M)")[0] == 24


def test_the_cache_of_a_sequence_grows_with_its_length(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("count", "model=nemotron_h_8b")
    text = printed(capsys, *words, "sequence_length=1000")
    cache = counts.cache_size(compose("count", list(words[1:])).model)
    assert f"1,000 tokens  {cache.of_sequence(1000):,}" in text
    assert f"{cache.kv_per_token:,}" in text


def test_attention_costs_more_in_a_longer_sequence(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("count", "model=nemotron_h_8b")
    short = printed(capsys, *words, "sequence_length=1024")
    long = printed(capsys, *words, "sequence_length=1048576")
    assert numbers(short, "attention (*)")[-1] < numbers(long, "attention (*)")[-1]
    assert numbers(short, "Mamba-2 (M)") == numbers(long, "Mamba-2 (M)")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["model=ladder_10m", "model.vocab_size=null"], "model.vocab_size = null: must be set"),
        (["model=nemotron_h_8b", "model.pattern=MXM"], "nearest: MM"),
        (["model=nemotron_h_8b", "sequence_length=0"], "sequence_length = 0: must be at least 1"),
        ([], "`hybrid-train models` lists the models"),
    ],
)
def test_a_count_that_cannot_be_made_is_refused(
    capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert cli.main(["count", *words]) == 2
    assert told in capsys.readouterr().err


def test_layers_in_words_count_the_main_part_and_the_mtp_depths() -> None:
    assert parse("MEM*|E-/*E/*E").in_words() == "2M 1* 1- 2E + 2 x *E"
    assert parse("M-").in_words() == "1M 1-"


def test_every_named_model_is_listed_small_ones_first(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, "models")
    rows = [line.split() for line in text.split("\n\n")[0].splitlines()[1:]]
    assert sorted(row[0] for row in rows) == NAMES
    sizes = []
    for name in (row[0] for row in rows):
        model = compose("count", [f"model={name}", "model.vocab_size=131072"]).model
        sizes.append(counts.parameters(model, 0).total)
        assert re.search(rf"^{name} +{re.escape(parse(model.pattern).in_words())} ", text, re.M)
    # Ladder models have vocabularies of their own, so neighbours of like size may swap.
    assert sizes[0] == min(sizes)
    assert sizes[-1] == max(sizes)


def test_a_listed_model_has_the_published_number_of_parameters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = printed(capsys, "models")
    (row,) = [line for line in text.splitlines() if line.startswith("nemotron_h_56b ")]
    assert " 56,324,350,464 " in row


def test_a_model_without_vocabulary_has_dashes(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = [line for line in printed(capsys, "models").splitlines() if line.startswith("tiny ")]
    assert row.split().count("-") == 3


def test_models_takes_no_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["models", "model=tiny"]) == 2
    assert "models takes no settings" in capsys.readouterr().err
