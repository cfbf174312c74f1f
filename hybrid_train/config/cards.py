"""The one table of cards: files of conf/hardware, those of the user's own too, read and found.

`cluster.hardware` names a card by its file, and a run finds that of its GPU by the device name.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from hybrid_train.config import overrides, yaml_files
from hybrid_train.config.own_conf import conf_folders
from hybrid_train.schema.hardware import Card
from hybrid_train.schema.names import nearest, nearest_key
from hybrid_train.schema.problems import ConfigError, Problem, collect

GROUP = "hardware"  # folder of conf/
SETTING = "cluster.hardware"


def names() -> list[str]:
    """Return the names of all cards, those of the user's own first."""
    return list(_files())


def card(name: str) -> Card:
    """Return the card of a name.

    Raises:
        ConfigError: if there is none, or its file is faulty.
    """
    known = _files()
    if name not in known:
        rule = f"must be a card of conf/{GROUP}: {', '.join(sorted(known))}"
        raise ConfigError([Problem(SETTING, name, rule, nearest(name, known))])
    return _read(name, tuple((path, path.stat().st_mtime_ns) for path in known[name]))


def _files() -> dict[str, list[Path]]:
    """Return the files of each name: one, unless two folders have the name."""
    program, *own = conf_folders()
    found: dict[str, list[Path]] = {}
    for folder in (*own, program):
        for file in sorted((folder / GROUP).glob("*.yaml")):
            found.setdefault(file.stem, []).append(file)
    return found


def card_of_device(device_name: str) -> tuple[str, Card] | None:
    """Return name and card of a GPU that calls itself so; None if no card does.

    The whole name counts: a slice of a GPU (MIG), or a PCIe form of it, has another peak.

    Raises:
        ConfigError: if the file of any card is faulty.
    """
    each = ((name, card(name)) for name in names())
    return next((one for one in each if device_name in one[1].device_names), None)


@lru_cache(maxsize=64)
def _read(name: str, files: tuple[tuple[Path, int], ...]) -> Card:
    """Read the file of a card; again when it has changed.

    Args:
        name: of the card.
        files: that have the name, and when each was changed, in ns.

    Raises:
        ConfigError: if there are several that differ, or what it says is no card.
    """
    path = files[0][0]
    walk = yaml_files.Walk(conf_folders())
    walk.visit(f"{GROUP}/{name}")
    if walk.problems:
        raise ConfigError(walk.problems)
    typed = OmegaConf.structured(Card)
    try:
        whole = cast("DictConfig", OmegaConf.merge(typed, OmegaConf.load(path)))
    except OmegaConfBaseException as error:
        raise ConfigError([_explained(path, error)]) from error
    missing = [key for key in map(str, whole) if OmegaConf.is_missing(whole, key)]
    if missing:
        raise ConfigError([Problem(str(path), ", ".join(missing), "every card must say it")])
    read = cast("Card", OmegaConf.to_object(whole))
    if found := list(_with_file(path, read)):
        raise ConfigError(found)
    return read


def _explained(path: Path, error: OmegaConfBaseException) -> Problem:
    """Say which key does not fit the settings of a card."""
    key = (error.full_key or "").strip()
    known = list(overrides.setting_names(OmegaConf.structured(Card)))
    if key and key not in known:
        return Problem(str(path), key, "a card has no such setting", nearest_key(key, known))
    why = " ".join(str(error).partition("full_key:")[0].split())
    return Problem(str(path), key or "(its settings)", why)


def _with_file(path: Path, read: Card) -> Iterator[Problem]:
    """Yield what is wrong with the values of a card, each with the file that it stands in."""
    for one in collect(read):
        yield Problem(f"{path}: {one.path}", one.value, one.rule, one.nearest)
