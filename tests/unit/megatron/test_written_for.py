"""What was read of torch and Megatron-Core is what is installed, and nothing is replaced early."""

import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_train.megatron import written_for
from hybrid_train.runtime.replacements import Replacement, to_do

ROOT = Path(__file__).parents[3]
# Imports every module of the package, then lists the names of the table that are not the library's.
IMPORTS = """
import importlib, pkgutil, warnings
warnings.simplefilter("ignore")
import hybrid_train
from hybrid_train.runtime import cpu
for module in pkgutil.walk_packages(hybrid_train.__path__, "hybrid_train."):
    if not module.name.endswith(("__main__", "hf.verify")):
        importlib.import_module(module.name)
from operator import attrgetter
from hybrid_train.megatron import written_for
for row in written_for.TABLE:
    holder = importlib.import_module(row.module)
    for name in row.names:
        owner = attrgetter(name.rpartition(".")[0])(holder) if "." in name else holder
        found = getattr(owner, name.rpartition(".")[2], None)
        if getattr(found, "__module__", "").startswith("hybrid_train"):
            print(row.module, name)
"""


def test_the_installed_libraries_are_those_that_our_code_was_written_for() -> None:
    """Read each again that is listed here, fix ours where needed, then write the new digest."""
    assert to_do(written_for.TABLE) == []


@pytest.mark.slow
def test_no_import_replaces_anything() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("row", written_for.REPLACED, ids=lambda row: row.names[0])
def test_every_replacement_says_why_and_what_was_read(row: Replacement) -> None:
    assert row.names
    assert row.reason
    assert row.read


@pytest.mark.parametrize(
    "row", [row for row in written_for.TABLE if row.fault], ids=lambda row: row.fault
)
def test_a_fault_has_its_row_in_the_list_of_faults(row: Replacement) -> None:
    rows = (ROOT / "docs" / "upstream_faults.md").read_text().splitlines()
    assert any(line.startswith(f"| {row.fault}") for line in rows)
