"""What an import path names, and what is said of one that names nothing."""

import re
from pathlib import Path

import pytest

from hybrid_train.schema.extension import imported, is_import_path


def test_a_path_names_an_object_of_a_module() -> None:
    assert imported("pathlib:Path") is Path
    assert imported("hybrid_train.schema.extension:imported") is imported


@pytest.mark.parametrize(
    "text", ["pathlib.Path", "pathlib:", ":Path", "a b:Path", "a.:B", "1a:B", "a:B.c", 7, None]
)
def test_what_is_no_path_is_told_from_one(text: object) -> None:
    assert not is_import_path(text)
    assert is_import_path("pathlib:Path")
    assert is_import_path("my_package.focal:Focal")


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("no_such_package.focal:Focal", "there is no module no_such_package; install"),
        ("hybrid_train.schema.focal:Focal", "there is no module hybrid_train.schema.focal"),
        ("pathlib:Pat", "pathlib has no Pat; it has Path"),
    ],
)
def test_what_names_nothing_is_refused_with_a_way_on(path: str, said: str) -> None:
    with pytest.raises(ValueError, match=re.escape(said)):
        imported(path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_library", "focal_a imports no_such_library, which is not there"),
        ("1 / 0", "focal_b cannot be imported: ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_fails_is_named_with_its_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    module = said.split()[0]
    (tmp_path / f"{module}.py").write_text(f"{text}\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=re.escape(said)):
        imported(f"{module}:Focal")
