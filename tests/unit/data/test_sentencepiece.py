"""A SentencePiece model serves wherever a Hugging Face tokenizer does."""

import base64
import hashlib
import json
from pathlib import Path

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers

from hybrid_train.data.any_tokenizer import open_tokenizer
from hybrid_train.data.sentencepiece import SentencePieceTokenizer
from hybrid_train.data.tokenizers import Tokenizer, train_byte_level_bpe
from hybrid_train.schema.problems import UserError

LINES = [f"the cat number {i} sat on the mat of the dog {i * i}" for i in range(200)]


def trained(folder: Path, **options: object) -> Path:
    folder.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES), model_prefix=str(folder / "tokenizer"), vocab_size=320,
        model_type="bpe", byte_fallback=True, minloglevel=2, **options,
    )  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("model") / "m")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> SentencePieceTokenizer:
    return SentencePieceTokenizer.load(folder)


def test_ids_are_those_of_the_library(folder: Path, tokenizer: SentencePieceTokenizer) -> None:
    bare = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert tokenizer.encode_batch(LINES) == [bare.encode(line) for line in LINES]
    assert tokenizer.encode(LINES[3]) == bare.encode(LINES[3])
    assert tokenizer.vocab_size == bare.vocab_size() == 320
    assert tokenizer.end_of_document == bare.eos_id()


@pytest.mark.parametrize("text", ["the cat", "caf\u00e9 \u4e2d \U0001f600", "a </s> b"])
def test_text_comes_back_and_cannot_close_a_document(
    tokenizer: SentencePieceTokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.end_of_document not in ids
    assert tokenizer.decode(ids) == text


def test_special_tokens_are_left_out_on_request(tokenizer: SentencePieceTokenizer) -> None:
    ids = [*tokenizer.encode("the cat"), tokenizer.end_of_document]
    assert tokenizer.decode(ids) == "the cat</s>"
    assert tokenizer.decode(ids, skip_special=True) == "the cat"


@pytest.mark.parametrize("name", ["", "tokenizer.model"])
def test_a_folder_or_a_file_is_opened_by_what_it_holds(folder: Path, name: str) -> None:
    found = open_tokenizer(folder / name)
    assert isinstance(found, SentencePieceTokenizer)
    content = (folder / "tokenizer.model").read_bytes()
    assert found.fingerprint == hashlib.sha256(content).hexdigest()


def test_a_folder_with_both_is_read_by_its_tokenizer_json(tmp_path: Path) -> None:
    trained(tmp_path / "both")
    train_byte_level_bpe(LINES, 300).save(tmp_path / "both")
    assert isinstance(open_tokenizer(tmp_path / "both"), Tokenizer)


def test_a_saved_model_is_read_back(tokenizer: SentencePieceTokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert again.encode(LINES[0]) == tokenizer.encode(LINES[0])
    assert again.fingerprint == tokenizer.fingerprint
    assert again.end_of_document == tokenizer.end_of_document


def test_a_model_without_an_end_takes_that_of_its_folder_or_is_refused(tmp_path: Path) -> None:
    options = {"eos_id": -1, "user_defined_symbols": ["<end>"]}
    folder = trained(tmp_path / "endless", **options)
    with pytest.raises(UserError, match=r"no end-of-document token.* as eos_token in"):
        open_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    found = open_tokenizer(folder)
    assert found.decode([found.end_of_document]) == "<end>"
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<none>"}))
    with pytest.raises(UserError, match="no end-of-document token"):
        open_tokenizer(folder)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "holds no tokenizer"), ("none.model", "does not exist"), ("bad.model", "is no Sen")],
)
def test_what_is_no_tokenizer_is_explained(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=message):
        open_tokenizer(tmp_path / name)


NASTY = (  # a name for each kind of text that has gone wrong in some tokenizer
    "caf\u00e9 na\u00efve \u4e2d\u6587\uff0c\u65e5\u672c\u8a9e \ud55c\uad6d",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1e9\U0001f1ea",
    "\x00\x01\x1b[0m\x7f\u0085\u200b\ufeff\u2028",
    "e\u0301 \u00e9 \ufb01 \u212b",
    "  two  blanks \t\ttabs\r\n\n\nlines  ",
    "the <s>cat</s> sat <0x41> <unk> \u2581 x",
    "\ufffd\ue000\uffff",
    "",
    " ",
)


def as_llama_2(folder: Path) -> Tokenizer:
    """The tokenizer.json that transformers makes of such a model: merges by the rank of what they
    make, bytes where there is no piece (convert_slow_tokenizer.py, LlamaConverter)."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = {model.id_to_piece(number): number for number in range(model.get_piece_size())}
    merges = [
        (number, (piece[:cut], piece[cut:]))
        for piece, number in ids.items()
        if not (model.is_control(number) or model.is_byte(number) or model.is_unknown(number))
        for cut in range(1, len(piece))
        if piece[:cut] in ids and piece[cut:] in ids
    ]
    merges.sort(key=lambda one: (one[0], ids[one[1][0]], ids[one[1][1]]))
    backend = Backend(
        models.BPE(
            ids, [pair for _, pair in merges], unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    )
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.fixture(scope="module")
def llama_2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as Llama 2 and Nemotron-4 have it: text as it stands, digits one by one."""
    return trained(
        tmp_path_factory.mktemp("llama") / "m", normalization_rule_name="identity",
        remove_extra_whitespaces=False, split_digits=True, allow_whitespace_only_pieces=True,
    )  # fmt: skip


@pytest.mark.parametrize("text", NASTY)
def test_both_forms_of_a_tokenizer_with_bytes_make_the_same_of_a_text(
    llama_2: Path, text: str
) -> None:
    one, other = SentencePieceTokenizer.load(llama_2), as_llama_2(llama_2)
    bare = sentencepiece.SentencePieceProcessor(model_file=str(llama_2 / "tokenizer.model"))
    ids = one.encode(text)
    assert ids == bare.encode(text) == other.encode(text)
    assert one.end_of_document not in ids
    assert one.decode(ids) == other.decode(ids) == text.replace("\u2581", " ")


ADDED = {"<pad>": 320, "<|im_start|>": 321, "<|im_start|>x": 330}


@pytest.fixture
def with_added(llama_2: Path, tmp_path: Path) -> Path:
    """A folder that adds tokens behind the pieces, and leaves ids between them out."""
    (tmp_path / "tokenizer.model").write_bytes((llama_2 / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<pad>": 320, "</s>": 2}))
    decoder = {str(ADDED[name]): {"content": name} for name in ("<|im_start|>", "<|im_start|>x")}
    config = {"added_tokens_decoder": decoder, "pad_token": "<pad>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


def test_tokens_that_a_folder_adds_have_ids_and_text_does_not_make_them(
    with_added: Path, llama_2: Path
) -> None:
    found, bare = SentencePieceTokenizer.load(with_added), SentencePieceTokenizer.load(llama_2)
    assert (found.vocab_size, bare.vocab_size) == (331, 320)
    assert found.special_ids["pad_token"] == 320
    text = "the <|im_start|>x<pad> cat <|im_start|>"
    assert found.encode(text) == bare.encode(text)
    ids = found.encode_prompt(text, begin=False, special=True)
    assert [one for one in ids if one >= 320] == [330, 320, 321]  # the longest that fits
    assert found.decode([*found.encode("the"), 321, 320]) == "the<|im_start|><pad>"
    assert found.decode([*found.encode("the"), 321, 320], skip_special=True) == "the"
    assert found.fingerprint != bare.fingerprint


def test_ids_of_no_token_are_no_text(with_added: Path) -> None:
    """As `transformers` has it: rows that pad an embedding, and ids between added tokens."""
    found = SentencePieceTokenizer.load(with_added)
    ids = found.encode("the cat")
    for skip in (False, True):
        assert found.decode([325, *ids, 331, 10**6], skip_special=skip) == "the cat"


def test_an_added_token_may_end_documents(with_added: Path, tmp_path: Path) -> None:
    folder = trained(tmp_path / "endless", eos_id=-1)
    for name in ("added_tokens.json", "tokenizer_config.json"):
        (folder / name).write_bytes((with_added / name).read_bytes())
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": "<pad>"}))
    found = SentencePieceTokenizer.load(folder)
    assert found.end_of_document == 320
    found.save(tmp_path / "saved")
    again = open_tokenizer(tmp_path / "saved")
    assert (again.vocab_size, again.end_of_document) == (331, 320)
    assert again.fingerprint == found.fingerprint


def test_damaged_added_tokens_are_named(with_added: Path) -> None:
    (with_added / "added_tokens.json").write_text(json.dumps({"<pad>": "many"}))
    with pytest.raises(UserError, match="does not say which tokens are added"):
        SentencePieceTokenizer.load(with_added)


def test_the_file_of_another_library_is_known_by_what_is_in_it(tmp_path: Path) -> None:
    """Llama 3 has such a tokenizer.model beside its tokenizer.json."""
    lines = [f"{base64.b64encode(bytes([one])).decode()} {one}\n" for one in range(256)]
    (tmp_path / "tokenizer.model").write_text("".join(lines))
    with pytest.raises(UserError, match=r"tiktoken's list of tokens.* take the tokenizer\.json"):
        open_tokenizer(tmp_path)
