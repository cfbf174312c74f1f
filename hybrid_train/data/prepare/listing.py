"""Which files are meant by a folder or a pattern: links are followed, and each file counts once."""

import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path

from hybrid_train.schema.listed import in_quotes
from hybrid_train.schema.names import nearest
from hybrid_train.schema.problems import UserError


def files_below(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder by name, links that lead nowhere among them; nothing hidden.

    A folder that links lead to comes behind the others, once, so that links may go in circles.

    Raises:
        UserError: if a folder may not be read.
    """
    seen: set[str] = set()
    waiting = [folder]
    for start in waiting:
        if os.path.realpath(start) in seen:
            continue
        for place, folders, names in os.walk(start, onerror=_unreadable):
            seen.add(os.path.realpath(place))
            below = [Path(place, name) for name in _visible(folders)]
            waiting += [one for one in below if one.is_symlink()]
            folders[:] = [
                one.name
                for one in below
                if not one.is_symlink() and os.path.realpath(one) not in seen
            ]
            for path in (Path(place, name) for name in _visible(names)):
                if path.is_file() or leads_nowhere(path):
                    yield path


def _visible(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


def _unreadable(error: OSError) -> None:
    """Refuse what `os.walk` would leave out without a word."""
    raise UserError(f"the folder {error.filename} cannot be read: {error.strerror}") from error


def leads_nowhere(path: Path) -> bool:
    """Tell whether a path is a link to something that is not there."""
    return path.is_symlink() and not path.exists()


def matches(pattern: str) -> list[str]:
    """Return what a pattern with *, ? and [] matches, by name; ** stands for any folders."""
    parts = Path(pattern).parts
    if "**" not in parts:
        return sorted(glob.glob(pattern))
    # glob.glob 3.12 goes through circles of links until their names are too long, all ways there.
    cut = parts.index("**")
    found = []
    for start in glob.glob(str(Path(*parts[:cut]))) if cut else ["."]:
        below = set(files_below(Path(start))) if Path(start).is_dir() else set()
        places = below | {folder for path in below for folder in path.parents}
        found += [
            str(path)
            for path in places
            if path.is_relative_to(start)
            and _fits(path.relative_to(start).parts, parts[cut:])
            and (parts[-1] != "**" or path in below)
        ]
    return sorted(found)


def _fits(names: Sequence[str], patterns: Sequence[str]) -> bool:
    if not patterns:
        return not names
    if patterns[0] == "**":
        return any(_fits(names[skipped:], patterns[1:]) for skipped in range(len(names) + 1))
    return bool(names) and fnmatchcase(names[0], patterns[0]) and _fits(names[1:], patterns[1:])


def nothing_named(
    name: str, what: str = "no such file, folder or match", suffix: str = ""
) -> UserError:
    """Say what an input names that is not there, and which file of this suffix it may mean."""
    parent = next(folder for folder in Path(name).parents if os.path.isdir(folder))
    if not os.access(parent, os.R_OK | os.X_OK, effective_ids=True):
        return UserError(f"input={name}: the folder {parent} may not be read: permission denied")
    near = nearest(name, (str(one).removesuffix(suffix) for one in parent.glob(f"*{suffix}")))
    hint = f"; did you mean {near}?" if near else ""
    if near and "," in near:
        hint = f"; did you mean {near}? A name with a comma needs quotes: input={in_quotes(near)}"
    return UserError(f"input={name}: there is {what}{hint}")


def real_path(path: str) -> str:
    """Return the name that a file has without any link."""
    if os.path.islink(path):
        return os.path.realpath(path)
    folder, name = os.path.split(path)
    return os.path.join(_real_folder(folder), name)


@lru_cache(maxsize=1024)  # files of a folder follow each other
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder)


def once(paths: Sequence[Path]) -> list[Path]:
    """Keep one name of each file: that of the file itself if it is there, else the first link."""
    kept: dict[str, Path] = {}
    for path in paths:
        real = real_path(str(path))
        if real not in kept or (kept[real].is_symlink() and not path.is_symlink()):
            kept[real] = path
    chosen = set(kept.values())
    return [path for path in dict.fromkeys(paths) if path in chosen]
