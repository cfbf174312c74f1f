"""Decoding is measured on the real loop: lengths, bytes and accepted drafts by other ways."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from hybrid_train.anatomy.counts import cache_size
from hybrid_train.data.documents import Joined
from hybrid_train.schema.evaluation import Decoding as Settings
from hybrid_train.schema.problems import UserError, collect
from tests.asked import Texts, log_probs, sources, subject
from tests.tiny import EVERY_KIND, MEGATRON_WARNINGS, alone, tiny_job

pytestmark = MEGATRON_WARNINGS


@pytest.fixture(scope="module")
def asked() -> Iterator[Any]:
    with alone() as groups:
        yield subject(groups)


def decoding(**settings: Any) -> Any:
    from hybrid_train.evaluation.decoding import Decoding

    given = {"lengths": [5, 12], "new_tokens": 6, "prompts": 3} | settings
    return Decoding(given.pop("sources", sources()), Settings(**given), seed=1)


def by_group(items: Any) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for one in items:
        found.setdefault(one.group, []).append(one)
    return found


def test_each_length_has_its_prompts_and_their_tokens_are_counted(asked: Any) -> None:
    found = by_group(decoding().run(asked))
    assert {group: len(items) for group, items in found.items()} == {
        "length=5 drafts=0": 3,
        "length=12 drafts=0": 3,
    }
    for length in (5, 12):
        for one in found[f"length={length} drafts=0"]:
            assert one.values["tokens_per_s"][0] == 5  # behind the first of six
            assert one.values["prompt_tokens_per_s"][0] == length
            assert min(one.values["tokens_per_s"][1], one.values["prompt_tokens_per_s"][1]) > 0


def test_the_cache_has_the_bytes_that_the_sizes_of_the_model_say(asked: Any) -> None:
    known = cache_size(tiny_job(EVERY_KIND).model, kv_bytes=4, ssm_bytes=4)
    # The formula is of all four inputs that a convolution sees, one of which is the new token's.
    known = replace(known, conv_per_sequence=known.conv_per_sequence * 3 // 4)
    for one in decoding().run(asked):
        length = int(one.group.split()[0].removeprefix("length="))
        # The last new token is chosen, not read.
        assert one.values["cache_bytes"] == (known.of_sequence(length + 5), 1)


def test_of_two_drafts_of_which_the_first_is_right_a_step_gains_two_tokens(
    asked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is proposed: the most likely token by a whole pass, and behind it one that is not."""
    from hybrid_train.generation.cached_model import CachedModel

    measure = decoding(lengths=[8], drafts=[2], new_tokens=13, prompts=1)
    text = list(measure._prompts[8][0])
    while len(text) < 8 + 14:
        text.append(int(log_probs(asked, text)[-1, : asked.vocab_size].argmax()))

    def propose(model: CachedModel, rows: slice, length: int, vocab_size: int) -> torch.Tensor:
        place = model.lengths[0] + 1  # behind the token that is read now
        return torch.tensor([[text[place], (text[place + 1] + 1) % vocab_size]])

    monkeypatch.setattr(CachedModel, "propose", propose)
    (one,) = measure.run(asked)
    gained, steps = one.values["acceptance_length"]
    assert gained == 2 * steps > 0
    assert one.values["tokens_per_s"][0] == 12


def test_groups_name_length_and_drafts(asked: Any) -> None:
    found = decoding(lengths=[5], drafts=[0, 1], prompts=1).run(asked)
    assert [one.group for one in found] == ["length=5 drafts=0", "length=5 drafts=1"]
    assert "acceptance_length" not in found[0].values
    # The block that drafts keeps a past of its own.
    assert found[0].values["cache_bytes"] < found[1].values["cache_bytes"]


def test_prompts_are_cut_evenly_and_follow_the_seed() -> None:
    text = Joined("long", [Texts(["abcdefghij" * 10])])
    made = decoding(sources={"long": text}, lengths=[20], prompts=3)
    ids = Texts(["abcdefghij" * 10]).read(0, 0, 60).tolist()  # as many as three prompts
    assert made._prompts[20] == [ids[:20], ids[20:40], ids[40:60]]
    one, other = (decoding(lengths=[5]).items_hash for _ in range(2))
    assert one == other != decoding(lengths=[6]).items_hash


def test_a_prompt_longer_than_the_text_is_refused() -> None:
    with pytest.raises(UserError, match=r"lengths = \[5, 5000\]: the held-out text has"):
        decoding(lengths=[5, 5000])


@pytest.mark.parametrize("settings", [{"lengths": []}, {"lengths": [4, 4]}, {"drafts": []}])
def test_a_list_without_anything_in_it_or_with_something_twice_is_refused(
    settings: dict[str, list[int]],
) -> None:
    (problem,) = collect(Settings(**settings))
    assert problem.path in settings


def test_a_model_in_training_goes_on_as_if_it_had_not_been_asked(asked: Any) -> None:
    before = [one.clone() for one in asked.network.chunks[0].parameters()]
    decoding().run(asked)
    after = list(asked.network.chunks[0].parameters())
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
