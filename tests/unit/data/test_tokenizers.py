"""A trained tokenizer writes any text, and transformers reads what it saves."""

import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from hybrid_train.data.any_tokenizer import open_tokenizer
from hybrid_train.data.tokenizers import END_OF_DOCUMENT, Tokenizer, train_byte_level_bpe
from hybrid_train.schema.formats import TOKENIZER as FORMAT
from hybrid_train.schema.problems import UserError

CORPUS = ["def f(x):\n    return x + 1\n", "the cat sat on the mat; the dog sat on the cat"] * 5
TOKENIZER = train_byte_level_bpe(CORPUS, vocab_size=300)


@given(st.text())
def test_any_text_comes_back_as_it_was(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


@pytest.mark.parametrize(
    "text", ["", "  \t\n\r\n", "e\u0301 \u00e9", "\U0001f600\u200d", "\x00\x1f"]
)
def test_white_space_accents_and_control_characters_come_back(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_text_cannot_close_a_document() -> None:
    ids = TOKENIZER.encode(f"a {END_OF_DOCUMENT} b")
    assert TOKENIZER.end_of_document not in ids
    assert TOKENIZER.decode(ids) == f"a {END_OF_DOCUMENT} b"


def test_special_tokens_are_left_out_on_request() -> None:
    ids = [*TOKENIZER.encode("a"), TOKENIZER.end_of_document]
    assert TOKENIZER.decode(ids) == f"a{END_OF_DOCUMENT}"
    assert TOKENIZER.decode(ids, skip_special=True) == "a"


def test_the_vocabulary_has_the_size_asked_for_or_what_the_corpus_allows() -> None:
    varied = [f"name{i} = value{i * i}" for i in range(200)]
    assert train_byte_level_bpe(varied, vocab_size=300).vocab_size == 300
    assert train_byte_level_bpe(["ab ab"], 300).vocab_size == 257 + 2  # bytes, end; "ab", " ab"


def test_a_batch_is_encoded_like_its_texts() -> None:
    assert TOKENIZER.encode_batch(CORPUS) == [TOKENIZER.encode(text) for text in CORPUS]


def test_training_twice_gives_the_same_tokenizer(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "a")
    train_byte_level_bpe(CORPUS, vocab_size=300).save(tmp_path / "b")
    first, second = ((tmp_path / name / "tokenizer.json").read_bytes() for name in "ab")
    assert first == second


def test_a_saved_tokenizer_is_read_back(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.encode(CORPUS[0]) == TOKENIZER.encode(CORPUS[0])
    assert loaded.end_of_document == TOKENIZER.end_of_document


def test_transformers_reads_a_saved_tokenizer(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra hf")
    TOKENIZER.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in CORPUS:
        ids = TOKENIZER.encode(text)
        assert theirs.encode(text) == ids
        assert theirs.decode(ids) == text
    assert theirs.eos_token_id == TOKENIZER.end_of_document
    assert len(theirs) == TOKENIZER.vocab_size


def test_the_end_of_document_may_be_written_the_old_way(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    special = {"eos_token": {"content": END_OF_DOCUMENT, "lstrip": False}}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(special))
    assert Tokenizer.load(tmp_path).end_of_document == TOKENIZER.end_of_document


def test_a_tokenizer_says_its_format_and_one_from_elsewhere_says_none(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    said = json.loads(path.read_text())
    assert said["hybrid_train_format"] == FORMAT.stamp()
    said["hybrid_train_format"]["version"] += 1
    path.write_text(json.dumps(said))
    with pytest.raises(UserError, match=r"tokenizer folder, format 2\).*upgrade hybrid_train"):
        open_tokenizer(tmp_path)
    del said["hybrid_train_format"]
    path.write_text(json.dumps(said))
    assert open_tokenizer(tmp_path).vocab_size == TOKENIZER.vocab_size


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none/tokenizer\.json does not exist"):
        Tokenizer.load(tmp_path / "none")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", "{}", "is no tokenizer"),
        ("tokenizer_config.json", "{", "is no JSON"),
        (
            "tokenizer_config.json",
            '{"eos_token": "</s>"}',
            "lacks the end-of-document token '</s>'",
        ),
    ],
)
def test_a_broken_folder_is_explained(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    TOKENIZER.save(tmp_path)
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        Tokenizer.load(tmp_path)


def test_a_folder_without_an_end_of_document_token_is_refused(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").unlink()
    with pytest.raises(UserError, match="add eos_token"):
        Tokenizer.load(tmp_path)


def test_a_fingerprint_is_that_of_the_file_and_survives_a_copy(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "a")
    path = tmp_path / "a" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text())))  # the same, written another way
    loaded = Tokenizer.load(tmp_path / "a")
    assert loaded.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    loaded.save(tmp_path / "b")
    assert Tokenizer.load(tmp_path / "b").fingerprint == loaded.fingerprint
    assert loaded.fingerprint != TOKENIZER.fingerprint


def test_a_folder_that_asks_for_short_texts_does_not_cut_documents(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(content | {"truncation": cut}))
    assert Tokenizer.load(tmp_path).encode(CORPUS[1]) == TOKENIZER.encode(CORPUS[1])


def test_special_tokens_get_the_first_ids_and_the_first_ends_documents() -> None:
    trained = train_byte_level_bpe(CORPUS, 300, special_tokens=["<end>", "<pad>"])
    assert trained.end_of_document == 0
    assert trained.decode([0, 1]) == "<end><pad>"


# How words are cut by Qwen2.5 and Qwen3, and by Llama 3 (tiktoken's cl100k with digits by three).
CUTS = {
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama_3": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
NASTY = (
    "caf\u00e9 \u4e2d\u6587\uff0c\u65e5\u672c\u8a9e \ud55c\uad6d 12345 1,234.5",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\x00\x01\x1b[0m\x7f\u0085\u200b\ufeff\u2028",
    "it's IT'S  two\t\ttabs\r\n\n\nlines  ",
    "a<|begin|><|end|> <|eot_id|><|pad_7|>b",
    "\ufffd\ue000",
)
SPECIAL = ("<|begin|>", "<|end|>", "<|eot_id|>")


def family(name: str) -> Backend:
    """A tokenizer.json as a family has it, with merges of a small text."""
    backend = Backend(models.BPE(ignore_merges=name == "llama_3"))
    if name == "qwen":
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CUTS[name]), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*CORPUS, *NASTY[:4]], trainer)
    backend.add_special_tokens(list(SPECIAL))
    if name == "llama_3":
        start = ("<|begin|>", backend.token_to_id("<|begin|>"))
        backend.post_processor = processors.TemplateProcessing("<|begin|> $A", None, [start])
    return backend


@pytest.mark.parametrize("name", CUTS)
def test_families_of_byte_level_tokenizers_are_read_as_transformers_reads_them(
    name: str, tmp_path: Path
) -> None:
    from transformers import PreTrainedTokenizerFast

    backend = family(name)
    theirs = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>"
    )
    theirs.save_pretrained(tmp_path)
    ours = open_tokenizer(tmp_path)
    for text in NASTY:
        spelt = theirs(text)["input_ids"]  # with its begin, and special tokens for what they are
        assert ours.encode_prompt(text, begin=True, special=True) == spelt
        ids = ours.encode(text)
        assert not set(ids) & {backend.token_to_id(one) for one in SPECIAL}
        assert ours.decode(ids) == text
        assert ours.encode_batch([text]) == [ids]
    assert ours.decode([*ids, ours.end_of_document]) == text + "<|end|>"
    assert ours.decode([*ids, ours.end_of_document], skip_special=True) == text


@pytest.mark.parametrize("name", CUTS)
def test_no_half_character_of_a_family_is_given_out(name: str, tmp_path: Path) -> None:
    from hybrid_train.generation.text import GrowingText

    ours = Tokenizer(family(name), {"eos_token": "<|end|>"})
    for text in NASTY[:5]:
        growing, shown = GrowingText(ours, ours.encode("a")), ""
        for token in ours.encode(text):
            piece, rest = growing.add(token)
            shown += piece
            assert text.startswith(shown)  # a half character would be U+FFFD
        assert shown + rest == text


def test_ids_of_no_token_are_no_text() -> None:
    """Rows that pad an embedding: Qwen2.5 has 151,665 tokens and up to 152,064 rows."""
    ids = TOKENIZER.encode("the cat")
    for skip in (False, True):
        found = TOKENIZER.decode([*ids, TOKENIZER.vocab_size, 10**6], skip_special=skip)
        assert found == "the cat"
