"""Lists of the command line: names with commas are in quotes, and a path that is there wins."""

import shlex
from pathlib import Path

import pytest

from hybrid_train.schema.names import (
    in_quotes,
    listed,
    listed_paths,
)


@pytest.mark.parametrize(
    ("texts", "names"),
    [
        (["a,b", "[c, d ]"], ["a", "b", "c", "d"]),
        (['"a,b",c'], ["a,b", "c"]),
        (["['a,b', \"c,d\"]"], ["a,b", "c,d"]),
        (["it's,x"], ["it's", "x"]),  # a mark within a name is a letter
        (['"a"b,c'], ['"a"b', "c"]),
        (["a b (1),lr=3e-4,\u00e9"], ["a b (1)", "lr=3e-4", "\u00e9"]),
        ([" ,, ", "[]", '""'], []),
    ],
)
def test_commas_part_names_unless_they_are_in_quotes(texts: list[str], names: list[str]) -> None:
    assert listed(texts) == names


@pytest.mark.parametrize("name", ["a,b", "[a,b]", '"a,b"', " a,b", "a=1,(b)"])
@pytest.mark.parametrize("suffix", ["", ".idx"])
def test_a_path_that_exists_as_it_is_written_is_one_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, suffix: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert listed_paths([name]) != [name]
    Path(name + suffix).write_bytes(b"")
    assert listed_paths([name, "x,y"]) == [name, "x", "y"]


@pytest.mark.parametrize("name", ["a,b", "it's,b", 'a,"b"'])
def test_a_name_in_quotes_is_that_name(name: str) -> None:
    (word,) = shlex.split(in_quotes(name))
    assert listed([word, "x"]) == [name, "x"]
