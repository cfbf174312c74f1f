"""From the data section of a run to its batches."""

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrid_train.data.any_tokenizer import open_tokenizer
from hybrid_train.data.batch import Row
from hybrid_train.data.loader import Loader, Validation
from hybrid_train.data.prepare.manifest import Manifest, TokenizerFacts
from hybrid_train.data.quickstart import prepare
from hybrid_train.data.run_data import RunData, check_data, open_data
from hybrid_train.planning.phases import lay_out
from hybrid_train.schema.data import Data, Quickstart, Source, Split
from hybrid_train.schema.problems import ConfigError, UserError
from hybrid_train.schema.train import Train, TrainJob


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Data:
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "lib").mkdir()
    for i in range(40):
        (folder / "lib" / f"m{i}.py").write_text(f"def f{i}(x):\n    return {i} * x\n" * 10)
    return prepare(Quickstart(folder=str(folder / "out"), vocab_size=300), folder / "lib")


def job(data: Data, **changes: object) -> TrainJob:
    settings = {"tokens": "1k", "sequence_length": 16, "microbatch": 2, "global_batch": 8}
    return TrainJob(train=Train(**{**settings, **changes}), data=data)


def build(run: TrainJob) -> RunData:
    return open_data(run.data, lay_out(run), barrier=lambda: None, is_main=True)


def loader(found: RunData, rank: int = 0, size: int = 1, tokens_seen: int = 0) -> Loader:
    phase_span = found.plans[0].phase_span
    return found.loader(phase_span, data_rank=rank, data_size=size, tokens_seen=tokens_seen)


def validation(found: RunData, rank: int = 0, size: int = 1) -> Validation:
    one = found.validation(found.plans[0].phase_span, data_rank=rank, data_size=size)
    assert one is not None
    return one


def test_a_longer_run_resumes_where_a_shorter_one_stopped(corpus: Data) -> None:
    short, long = (loader(build(job(corpus, tokens=tokens))) for tokens in ("512", "100k"))
    for _ in range(4 * 4):
        assert torch.equal(next(short).tokens, next(long).tokens)
    resumed = loader(build(job(corpus, tokens="100k")), tokens_seen=512)
    assert torch.equal(next(resumed).tokens, next(long).tokens)


def test_rows_of_both_splits_pass_the_transforms_of_the_run(corpus: Data) -> None:
    def numbered(row: Row) -> Row:
        one = row.identity
        place = np.array([one.split is Split.validation, one.number, one.position, one.seed])
        return replace(row, loss_weights=row.loss_weights / 2, row_extras={"place": place})

    run = job(corpus, tokens="100k")
    plain = build(run)
    found = replace(plain, transforms=(numbered,))
    for at, before in enumerate((0, 512)):
        batch, untouched = (next(loader(one, tokens_seen=before)) for one in (found, plain))
        assert torch.equal(batch.tokens, untouched.tokens)
        assert torch.equal(batch.loss_weights, untouched.loss_weights / 2)
        seed = run.train.seed
        expected = [[0, 32 * at + n, before + 16 * n, seed] for n in range(2)]
        assert batch.row_extras["place"].tolist() == expected
    first = next(iter(validation(found)))
    assert first.row_extras["place"][:, 0].all()


def test_two_ranks_read_what_one_reads(corpus: Data) -> None:
    found = build(job(corpus))
    one, two = loader(found), [loader(found, rank, 2) for rank in range(2)]
    for rank in range(2):
        assert len(validation(found, rank, 2)) == len(validation(found)) / 2
    whole = torch.cat([next(one).tokens for _ in range(4)])
    parts = torch.cat([next(own).tokens for _ in range(2) for own in two])
    assert torch.equal(whole, parts)


def test_validation_does_not_depend_on_the_seed_of_the_run(corpus: Data) -> None:
    first, second = (build(job(corpus, seed=seed)) for seed in (1, 2))
    assert not torch.equal(next(loader(first)).tokens, next(loader(second)).tokens)
    rows = [next(iter(validation(found))).tokens for found in (first, second)]
    assert torch.equal(*rows)


def test_validation_repeats_no_token(corpus: Data) -> None:
    found = build(job(corpus, validation_batches=1000))
    (documents,) = found.held_out.documents.values()
    assert validation(found).num_sequences == (documents.tokens - 1) // 16


def test_the_description_says_epochs_and_a_small_validation_part(corpus: Data) -> None:
    lines = build(job(corpus, tokens="100k", validation_batches=1000)).description()
    assert "tokens in 39 documents" in lines[0]
    assert "epochs so far" in lines[2]
    assert "of the 8000 sequences asked for" in lines[-1]


def test_a_source_that_is_repeated_often_is_warned_of(
    corpus: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("hybrid_train.data.run_data"), "warning", said.append)
    build(job(corpus, tokens="100k")).description()
    (warning,) = said
    assert "source data will be repeated" in warning


def test_the_unigram_loss_lies_between_zero_and_a_uniform_guess(corpus: Data) -> None:
    bundle = build(job(corpus))
    assert bundle.unigram_cross_entropy is not None
    assert 0 < bundle.unigram_cross_entropy < torch.tensor(float(bundle.vocab_size)).log()


def test_a_run_may_go_without_validation(corpus: Data) -> None:
    found = build(job(Data(train=corpus.train, tokenizer=corpus.tokenizer)))
    assert found.validation(found.plans[0].phase_span, data_rank=0, data_size=1) is None
    assert found.unigram_cross_entropy is None
    assert "none" in found.description()[-1]


def test_the_main_process_builds_before_the_others_pass(corpus: Data) -> None:
    run, seen = job(corpus), []
    for is_main in (True, False):
        open_data(run.data, lay_out(run), barrier=lambda: seen.append("met"), is_main=is_main)
    assert seen == ["met", "met"]


@pytest.mark.parametrize("field", ["train", "tokenizer"])
def test_missing_settings_are_named_all_at_once(field: str) -> None:
    with pytest.raises(ConfigError, match=f"data.{field}"):
        check_data(Data())


def test_a_prefix_that_does_not_exist_is_refused_before_anything_is_written(
    corpus: Data, tmp_path: Path
) -> None:
    broken = Data(train=[str(tmp_path / "none")], tokenizer=corpus.tokenizer)
    with pytest.raises(UserError, match=r"none\.idx does not exist"):
        check_data(broken)
    assert list(tmp_path.iterdir()) == []


def test_whole_data_and_an_unbuilt_quickstart_pass_the_check(corpus: Data, tmp_path: Path) -> None:
    check_data(corpus)
    check_data(Quickstart(folder=str(tmp_path)))


def test_files_of_another_tokenizer_are_named(corpus: Data, tmp_path: Path) -> None:
    own = open_tokenizer(corpus.tokenizer or "")
    other = replace(TokenizerFacts.of("elsewhere/tokenizer", own), fingerprint="another")
    for name, facts in (("mine", TokenizerFacts.of("here", own)), ("theirs", other)):
        for suffix in (".bin", ".idx"):
            shutil.copy(corpus.train[0] + suffix, tmp_path / (name + suffix))
        manifest = Manifest(1, 1, "uint16", facts, [], {})
        (tmp_path / f"{name}.json").write_text(manifest.text())
    sources = {name: Source(train=[str(tmp_path / name)]) for name in ("mine", "theirs")}
    with pytest.raises(
        UserError, match=r"theirs \(source theirs\) by elsewhere/tokenizer"
    ) as refused:
        check_data(Data(sources=sources, tokenizer=corpus.tokenizer))
    assert f"{tmp_path}/theirs (source theirs) by" in str(refused.value)
    assert "source mine" not in str(refused.value)
