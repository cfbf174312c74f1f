"""The pinned versions: read from constraints.txt, compared by release."""

import pytest

from hybrid_train.config.supported import (
    is_pinned,
    pinned,
    plain_name,
    read_pins,
)


def test_pins_are_read_without_comments_and_extras() -> None:
    text = (
        "# torch==1.0\nmegatron-core==0.19.2\nJinja2==3.1.6\n\ntransformer_engine_torch==2.20.2\n"
    )
    assert read_pins(text) == {
        "megatron-core": "0.19.2",
        "jinja2": "3.1.6",
        "transformer-engine-torch": "2.20.2",
    }


def test_the_list_of_this_tree_is_found() -> None:
    assert {"torch", "megatron-core", "mamba-ssm"} <= set(pinned())


def test_without_a_list_nothing_is_pinned(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").touch()
    monkeypatch.setenv("HYBRID_TRAIN_CONF", str(tmp_path / "conf"))
    assert pinned() == {}


@pytest.mark.parametrize(
    ("found", "pin", "rebuilt", "same"),
    [
        ("2.11.0", "2.11.0", False, True),
        ("2.11.0+cpu", "2.11.0", False, True),
        ("2.11.1", "2.11.0", False, False),
        ("2.11.0a0+a6c236b9fd.nv26.03", "2.11.0", True, True),
        ("2.11.0a0+a6c236b9fd.nv26.03", "2.11.0", False, False),
        ("2.12.0a0+0291f960b6.nv26.04", "2.11.0", True, False),
        ("2.3.2.post1", "2.3.2.post1", False, True),
        ("2.3.2", "2.3.2.post1", False, False),
    ],
)
def test_a_version_is_the_pinned_one_if_its_release_is(
    found: str, pin: str, rebuilt: bool, same: bool
) -> None:
    assert is_pinned(found, pin, rebuilt=rebuilt) is same


def test_names_are_compared_in_one_spelling() -> None:
    assert plain_name("transformer_engine.Torch") == "transformer-engine-torch"
