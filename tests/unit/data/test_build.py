"""From the data section of a run to its batches."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hybrid_train.config.problems import ConfigError, UserError
from hybrid_train.config.schema.data import Data, Quickstart
from hybrid_train.config.schema.train import Train, TrainJob
from hybrid_train.data.build import DataBundle, build_data, check_data
from hybrid_train.data.quickstart import prepare


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


def build(
    run: TrainJob, *, data_rank: int = 0, data_size: int = 1, consumed: int = 0
) -> DataBundle:
    return build_data(
        run,
        data_rank=data_rank,
        data_size=data_size,
        consumed_sequences=consumed,
        barrier=lambda: None,
        is_main=True,
    )


def test_the_data_last_for_the_steps_that_reach_the_tokens(corpus: Data) -> None:
    # 1000 tokens in steps of 128 are 7.8 steps
    assert len(list(build(job(corpus)).train)) >= 8 * 4


def test_a_longer_run_resumes_where_a_shorter_one_stopped(corpus: Data) -> None:
    short, long = build(job(corpus, tokens="512")), build(job(corpus, tokens="100k"))
    for _ in range(4 * 4):
        assert torch.equal(next(short.train).tokens, next(long.train).tokens)
    resumed = build(job(corpus, tokens="100k"), consumed=short.train.consumed_sequences)
    assert torch.equal(next(resumed.train).tokens, next(long.train).tokens)


def test_two_ranks_read_what_one_reads(corpus: Data) -> None:
    one = build(job(corpus))
    two = [build(job(corpus), data_rank=rank, data_size=2) for rank in range(2)]
    for bundle in two:
        assert len(bundle.validation or ()) == len(one.validation or ()) / 2
    whole = torch.cat([next(one.train).tokens for _ in range(4)])
    parts = torch.cat([next(bundle.train).tokens for _ in range(2) for bundle in two])
    assert torch.equal(whole, parts)


def test_validation_does_not_depend_on_the_seed_of_the_run(corpus: Data) -> None:
    first, second = (build(job(corpus, seed=seed)) for seed in (1, 2))
    assert not torch.equal(next(first.train).tokens, next(second.train).tokens)
    assert torch.equal(next(iter(first.validation)).tokens, next(iter(second.validation)).tokens)


def test_the_description_says_epochs_and_a_small_validation_part(corpus: Data) -> None:
    train, validation = build(job(corpus, tokens="100k", validation_batches=1000)).description
    assert "tokens in 39 documents" in train
    assert "epochs" in train
    assert "of the 8000 sequences of train.validation_batches=1000" in validation


def test_the_unigram_loss_lies_between_zero_and_a_uniform_guess(corpus: Data) -> None:
    bundle = build(job(corpus))
    assert bundle.unigram_cross_entropy is not None
    assert 0 < bundle.unigram_cross_entropy < torch.tensor(float(bundle.vocab_size)).log()


def test_a_run_may_go_without_validation(corpus: Data) -> None:
    bundle = build(job(Data(train=corpus.train, tokenizer=corpus.tokenizer)))
    assert bundle.validation is None
    assert bundle.unigram_cross_entropy is None
    assert "none" in bundle.description[1]


def test_only_the_main_process_writes_and_the_others_wait_for_it(
    corpus: Data, tmp_path: Path
) -> None:
    data = Data(train=corpus.train, tokenizer=corpus.tokenizer, cache=str(tmp_path / "cache"))
    seen: list[str] = []

    def barrier(name: str) -> Callable[[], None]:
        return lambda: seen.append(f"{name}: {len(list(tmp_path.glob('cache/*/*')))} folders")

    def start(name: str) -> None:
        build_data(
            job(data),
            data_rank=0,
            data_size=1,
            consumed_sequences=0,
            barrier=barrier(name),
            is_main=name == "main",
        )

    with pytest.raises(UserError, match="that all processes can reach"):
        start("other")  # nobody has written: this barrier waits for nobody
    start("main")
    start("other")
    assert seen == ["other: 0 folders", "main: 1 folders", "other: 1 folders"]


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
