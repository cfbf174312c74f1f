"""Settings of parts that a package of a user's own brings: found, typed, checked and frozen."""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hybrid_train.config.compose import compose
from hybrid_train.config.describe import config_text, settings
from hybrid_train.config.frozen import freeze, load
from hybrid_train.schema.objective import NextToken
from hybrid_train.schema.problems import ConfigError, Problem
from hybrid_train.schema.pruning import Mask

PARTS = """
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

from hybrid_train.schema.extension import HookSettings
from hybrid_train.schema.limits import Factor
from hybrid_train.schema.objective import ObjectiveSettings
from hybrid_train.schema.problems import Problem


@dataclass(kw_only=True)
class Focal(ObjectiveSettings):
    implementation: ClassVar[str] = "owned.work:FocalLoss"
    gamma: Factor = 2.0  # how much less easy tokens count
    floor: float = 0.0

    def problems(self) -> Iterator[Problem]:
        if self.floor > self.gamma:
            yield Problem("floor", self.floor, "must not be above gamma", self.gamma)


@dataclass(kw_only=True)
class Average(HookSettings):
    implementation: ClassVar[str] = "owned.work:AverageLoss"
    decay: float = 0.9


@dataclass(kw_only=True)
class Nameless(HookSettings):
    pass


@dataclass(kw_only=True)
class Lost(HookSettings):
    implementation: ClassVar[str] = "owned.nowhere:Lost"


class Plain:
    pass
"""
EXPERIMENT = """# @package _global_
# An objective of one's own
defaults:
  - tiny_cpu
objective: {kind: "owned.parts:Focal", gamma: 3}
hooks:
  - {kind: "owned.parts:Average", decay: 0.5}
"""
CHOICE = """# Easy tokens count less
kind: owned.parts:Focal
gamma: 4
"""
TINY = "experiment=tiny_cpu"


@pytest.fixture(autouse=True)
def owned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put a package and YAML files of a user's own where they are found."""
    files = {
        "owned/__init__.py": "",
        "owned/parts.py": PARTS,
        "owned/work.py": "raise AssertionError('settings are checked without the code for them')",
        "owned/broken.py": "1 / 0",
        "conf/experiment/mine.yaml": EXPERIMENT,
        "conf/objective/focal.yaml": CHOICE,
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()  # a folder that was looked at in the same moment
    monkeypatch.setenv("HYBRID_TRAIN_OWN_CONF", str(tmp_path / "conf"))
    yield
    forget()


def forget() -> None:
    """Take the package out of the modules that Python has imported."""
    for name in [one for one in sys.modules if one.partition(".")[0] == "owned"]:
        del sys.modules[name]


def problems(*lines: str) -> dict[str, Problem]:
    with pytest.raises(ConfigError) as error:
        compose("train", lines)
    return {problem.path: problem for problem in error.value.problems}


@pytest.mark.parametrize(
    ("lines", "gamma"),
    [
        (["experiment=mine"], 3.0),
        (["experiment=mine", "objective.gamma=5"], 5.0),
        ([TINY, "objective=focal"], 4.0),
        ([TINY, "objective=focal", "objective.gamma=6"], 6.0),
        ([TINY, "objective.kind=owned.parts:Focal"], 2.0),
        ([TINY, "objective.kind=owned.parts:Focal", "objective.gamma=7"], 7.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("job_name", ["train", "check"])
def test_an_objective_of_ones_own_is_named_by_its_import_path(
    job_name: str, lines: list[str], gamma: float
) -> None:
    objective: Any = compose(job_name, lines).objective  # type: ignore[union-attr]
    assert type(objective).__name__ == "Focal"
    assert (objective.kind, objective.gamma) == ("owned.parts:Focal", gamma)
    assert objective.moe_aux_loss_scale == 1e-4


def test_a_choice_of_the_command_line_takes_the_place_of_one_in_a_file() -> None:
    job = compose("train", ["experiment=mine", "objective=next_token"])
    assert job.objective == NextToken()
    assert compose("train", ["experiment=mine", "objective=focal"]).objective.kind == (
        "owned.parts:Focal"
    )


def test_one_composition_leaves_the_next_as_it_was() -> None:
    compose("train", ["experiment=mine"])
    assert compose("train", [TINY]).objective == NextToken()


def test_a_list_of_parts_is_typed_entry_by_entry() -> None:
    hooks = compose("train", ["experiment=mine", "hooks.0.decay=0.25"]).hooks
    assert [(type(one).__name__, one.decay) for one in hooks] == [("Average", 0.25)]
    line = "hooks=[{kind: 'owned.parts:Average'},{kind: 'owned.parts:Average',decay: 0.1}]"
    assert [one.decay for one in compose("train", [TINY, line]).hooks] == [0.9, 0.1]


def test_an_edit_of_ours_is_a_word_beside_one_of_ones_own(tmp_path: Path) -> None:
    lines = (
        "edits=[{kind: mask, share: 0.5, model: {hidden_size: 24}},tests.masking:FreezeEmbedding]"
    )
    job: Any = compose("train", [TINY, lines])
    mask, own = job.edits
    assert (type(mask), mask.share, mask.model.hidden_size) == (Mask, 0.5, 24)
    assert type(own).__name__ == "FreezeEmbedding"
    freeze(job, tmp_path / "run")
    assert load(tmp_path / "run") == job


def test_a_run_folder_gives_them_back(tmp_path: Path) -> None:
    job = compose("train", ["experiment=mine"])
    freeze(job, tmp_path / "run")
    assert load(tmp_path / "run") == job


def test_a_run_folder_whose_package_is_gone_says_so(tmp_path: Path) -> None:
    freeze(compose("train", ["experiment=mine"]), tmp_path / "run")
    (tmp_path / "owned").rename(tmp_path / "gone")
    forget()
    with pytest.raises(ConfigError, match=r"objective\.kind .*no module owned.*PYTHONPATH"):
        load(tmp_path / "run")


def test_help_lists_their_settings_with_the_comments_of_their_own() -> None:
    found = {one.name: one for one in settings("train", ["experiment=mine"])}
    assert found["objective.gamma"].default == "3.0"
    assert found["objective.gamma"].comment == "how much less easy tokens count"
    assert "kind: owned.parts:Focal" in config_text(
        "train", ["experiment=mine"], "job", resolve=True
    )


@pytest.mark.parametrize(
    ("line", "path", "rule"),
    [
        ("objective.kind=owned.parts:Focl", "objective.kind", "has no Focl; it has Focal"),
        ("objective.kind=nowhere.parts:Focal", "objective.kind", "there is no module nowhere"),
        ("objective.kind=owned.nothing:Focal", "objective.kind", "no module owned.nothing"),
        ("objective.kind=owned.broken:Focal", "objective.kind", "ZeroDivisionError"),
        ("objective.kind=owned.parts:Average", "objective.kind", "derives from"),
        ("objective.kind=owned.parts:Plain", "objective.kind", "must be a dataclass"),
        ("objective.kind=next_token", "objective.kind", "is set by the choice of objective"),
        ("hooks=[{kind: 'owned.parts:Focal'}]", "hooks.0.kind", "schema.extension.HookSettings"),
        ("hooks=[{kind: 'owned.parts:Nameless'}]", "hooks.0.kind", "must name the code"),
        ("hooks=[{kind: 'owned.parts:Lost'}]", "hooks.0.kind", "there is no module owned.nowhere"),
        ("hooks=[{decay: 1}]", "hooks.0", "must have a kind"),
        ("hooks=[7]", "hooks.0", "must have a kind"),
        ("hooks=[mask]", "hooks.0", "must have a kind"),
        ("edits=[maske]", "edits.0", "must have a kind, mask, or package.module:Class"),
        ("edits=[mask]", "edits.0.share", "must be set, or budget"),
        ("edits=[{kind: mask, share: 7}]", "edits.0.share", "must be"),
        ("edits=[{kind: mask, size: 7}]", "edits.0.size", "Mask has no such setting; it has model"),
        ("hooks=[{kind: 'owned.parts:Average',decy: 1}]", "hooks.0.decy", "it has decay"),
        ("hooks=[{kind: 'owned.parts:Average',decay: much}]", "hooks.0.decay", "Float"),
    ],
)
def test_what_is_wrong_with_a_part_is_said_where_it_stands(line: str, path: str, rule: str) -> None:
    assert rule in problems(TINY, line)[path].rule


def test_their_limits_and_rules_are_checked_with_all_others() -> None:
    found = problems("experiment=mine", "objective.gamma=nan", "train.seed=-1")
    assert set(found) == {"objective.gamma", "train.seed"}
    found = problems("experiment=mine", "objective.floor=9")
    assert found["objective.floor"].nearest == 3.0
    assert problems("experiment=mine", "objective.gama=1")["objective.gama"].nearest == (
        "objective.gamma=1"
    )


def test_a_kind_in_a_frozen_config_that_is_no_kind_is_refused(tmp_path: Path) -> None:
    job = compose("train", [TINY])
    job.objective.kind = "nex_token"
    freeze(job, tmp_path / "run")
    with pytest.raises(ConfigError, match="must be one of next_token, distill, or package"):
        load(tmp_path / "run")


TWO = """
from dataclasses import dataclass, replace
from typing import ClassVar

from hybrid_train.schema.limits import Size
from hybrid_train.schema.model import Model
from hybrid_train.schema.objective import ObjectiveSettings


@dataclass(kw_only=True)
class Pair(ObjectiveSettings):
    implementation: ClassVar[str] = "hybrid_train.training.next_token:NextToken"
    width: Size = 64
    pattern: str = "M-"

    def models(self, model: Model) -> dict[str, Model]:
        mlp = replace(model.mlp, intermediate_size=self.width)
        return {"main": model, "judge": replace(model, pattern=self.pattern, mlp=mlp)}
"""


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("objective.width=63", r"\[network judge\]"),
        ("objective.pattern=MX", r"model\.pattern (.|\n)*\[network judge\]"),
    ],
)
def test_every_network_of_an_objective_is_held_against_the_layout(
    line: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pair.py").write_text(TWO)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    lines = ["experiment=tiny_cpu", "parallel.tensor=2", "objective.kind=pair:Pair"]
    compose("train", lines)
    with pytest.raises(ConfigError, match=said):
        compose("train", [*lines, line])
