"""What is written holds no credentials, and is otherwise as it was."""

import pytest

from hybrid_train.config.secrets import masked, masked_data, masked_words


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pa55word@host.org/data/web", "https://<hidden>@host.org/data/web"),
        ("see s3://me:pa55word@bucket/x, twice", "see s3://<hidden>@bucket/x, twice"),
        ("https://t0ken@host.org/data", "https://<hidden>@host.org/data"),
        ("https://h.org/a?sv=1&sig=abc%3D&x=2", "https://h.org/a?sv=1&sig=<hidden>&x=2"),
        ("https://h.org/a?X-Amz-Signature=ab12", "https://h.org/a?X-Amz-Signature=<hidden>"),
        ("https://h.org/a?access_token=ab12#part", "https://h.org/a?access_token=<hidden>#part"),
        ("name: hf_abcdefghijklmnopqrstuvwxyz", "name: <hidden>"),
        ("name: AKIAIOSFODNN7EXAMPLE", "name: <hidden>"),
    ],
)
def test_credentials_are_masked(text: str, shown: str) -> None:
    assert masked(text) == shown
    assert masked(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "https://storage.example.org/code",
        "abfs://container@account.dfs.core.windows.net/web",
        "data/tokenizer_hf_small",
        "git log -1 --format=%an, mail@example.org",
        "https://h.org/a?version=3&keyword=web",
        "step 12: loss 3.4 (a@b)",
    ],
)
def test_what_is_no_credential_stays(text: str) -> None:
    assert masked(text) == text


def test_values_of_secret_variables_are_masked_wherever_they_stand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wJalr/XUtnFEMI")
    monkeypatch.setenv("DATA_TOKENIZER_PATH", "/data/tokenizer")
    monkeypatch.setenv("SHORT_TOKEN", "on")
    tree = {"a": ["x 0123456789abcdef", 3], "b": {"wJalr/XUtnFEMI": "/data/tokenizer on"}}
    assert masked_data(tree) == {"a": ["x <hidden>", 3], "b": {"<hidden>": "/data/tokenizer on"}}


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        (["hooks.upload.password=hunter2"], ["hooks.upload.password=<hidden>"]),
        (["+a.api_key='x y'", "b=1"], ["+a.api_key=<hidden>", "b=1"]),
        (["--token", "abc", "abc"], ["--token", "<hidden>", "abc"]),
        (["--auth-token=abc"], ["--auth-token=<hidden>"]),
        (["--token", "--json"], ["--token", "--json"]),
        (["train.tokens=4M", "data.tokenizer=a", "model.token_shift=1"], None),
        (["data.url=https://a:b12345@host.org/x"], ["data.url=https://<hidden>@host.org/x"]),
    ],
)
def test_words_of_a_command_lose_what_a_telling_name_holds(
    words: list[str], shown: list[str] | None
) -> None:
    assert masked_words(words) == (words if shown is None else shown)
