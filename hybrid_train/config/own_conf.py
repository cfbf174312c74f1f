"""Folders with YAML files: conf/ of the program, and those of the user's own, which add to it.

The user's are, in this order: those of `--config-dir PATH` (or `hydra.searchpath=[PATH]`, or PATHs
in the variable HYBRID_TRAIN_OWN_CONF, which commands that are started from here inherit), then
conf/ of the working folder. A name is taken once: `yaml_files` refuses a file that is here and
there.
"""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import ConfigError, Problem, UserError

if TYPE_CHECKING:
    from hydra.core.config_loader import ConfigLoader

ENVIRONMENT = "HYBRID_TRAIN_OWN_CONF"
OPTION = "--config-dir"
_HERE = "conf"
_SEARCHPATH = "hydra.searchpath"


def conf_dir() -> Path:
    """Return the folder of YAML files.

    Raises:
        UserError: if it is in none of the places where it may lie.
    """
    own = os.environ.get("HYBRID_TRAIN_CONF")
    source_tree = Path(__file__).resolve().parents[2] / "conf"
    wheel = Path(sys.prefix) / "share" / "hybrid_train" / "conf"
    places = [Path(own).resolve()] if own else [source_tree, wheel]
    for place in places:
        if (place / "train.yaml").is_file():
            return place
    looked = ", ".join(str(place) for place in places)
    raise UserError(
        f"no folder with the configuration (train.yaml in it) at {looked}; install the package "
        "again, or set HYBRID_TRAIN_CONF to the conf folder"
    )


def conf_folders(own: Sequence[Path] = ()) -> list[Path]:
    """Return every folder of YAML files, that of the program first."""
    return [conf_dir(), *own, *folders(conf_dir())]


def folders(main: Path) -> list[Path]:
    """Return the user's folders, as named and in the working folder.

    Args:
        main: conf/ of the program.
    """
    named = [Path(one) for one in os.environ.get(ENVIRONMENT, "").split(os.pathsep) if one]
    here = Path(_HERE)
    found = [*named, *([here.absolute()] if os.path.isdir(here) else [])]
    unique = {one.resolve(): one for one in reversed(found)}
    return [one for one in found if unique[one.resolve()] is one and one.resolve() != main]


def checked(names: Sequence[str]) -> list[Path]:
    """Return folders that the user has named, from the root.

    Raises:
        ConfigError: if one is not there, or cannot be handed on to other processes.
    """
    found = [Path(name.removeprefix("file://")).expanduser().absolute() for name in names]
    wrong = [one for one in found if not os.path.isdir(one)]
    if wrong:
        raise ConfigError(
            Problem(OPTION, one, "there is no such folder", _alike(one)) for one in wrong
        )
    if cut := [one for one in found if os.pathsep in str(one)]:
        rule = f"must have no {os.pathsep} in its name, which ends a folder in {ENVIRONMENT}"
        raise ConfigError(Problem(OPTION, one, rule) for one in cut)
    return found


def _alike(folder: Path) -> str | None:
    try:
        beside = [entry.name for entry in folder.parent.iterdir() if entry.is_dir()]
    except OSError:
        return None
    name = nearest(folder.name, beside)
    return str(folder.with_name(name)) if name else None


def taken_out(lines: Sequence[str]) -> tuple[list[str], list[Path]]:
    """Split overrides into those that are left and the folders of `hydra.searchpath`.

    Raises:
        ConfigError: if it is no list of folders that are there.
    """
    rest, found = [], list[Path]()
    for line in lines:
        key, _, text = line.partition("=")
        if key.lstrip("+") != _SEARCHPATH:
            rest.append(line)
            continue
        from hybrid_train.config import overrides  # Hydra takes a moment to import

        read = overrides.parse(line)
        names = read if isinstance(read, Problem) else read.value()
        if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
            rule = f"must be a list of folders: '{_SEARCHPATH}=[PATH]'; {OPTION} PATH is the same"
            raise ConfigError([Problem(_SEARCHPATH, text, rule)])
        found += checked(names)
    return rest, found


def name(paths: Sequence[Path]) -> None:
    """Let this process, and those that it starts, look into folders."""
    known = os.environ.get(ENVIRONMENT)
    if paths:
        os.environ[ENVIRONMENT] = os.pathsep.join([*map(str, paths), *filter(None, [known])])


@contextmanager
def as_it_was() -> Iterator[None]:
    """Forget at the end of the block what was named in it."""
    before = os.environ.get(ENVIRONMENT)
    try:
        yield
    finally:
        os.environ.pop(ENVIRONMENT, None)
        if before is not None:
            os.environ[ENVIRONMENT] = before


def add_folders(loader: "ConfigLoader", own: Sequence[Path]) -> None:
    """Have Hydra look into folders after its own, before the schemas.

    Hydra's way to say so is an override, which does not reach the questions for choices (1.3).
    """
    path = loader.get_search_path()
    schemas = path.get_path().pop()
    for folder in own:
        path.append("own", f"file://{folder}")
    path.append(schemas.provider, schemas.path)
    cast("Any", loader).repository.initialize_sources(path)
