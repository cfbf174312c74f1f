"""How large the rooms of the house are: files, imports, and how the whole config travels.

    python -m tests.house [CHECKOUT]

Counts the files of the package, who imports whom and who imports megatron.core, then trains one
step of tiny_cpu and notes in which files functions run until it ends. "Rooms" are the files that a
function gets the whole config in; a "climb" is a call with it in a layer above that of the call
before, a "return" one in a file that it had left. Printed beside the goals.
"""

import ast
import json
import os
import statistics
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parents[1]
SMALL = 40  # lines
GOALS = {
    "files / lines of the package": "about 220",
    "file length: median / p95 / max": "150 / 400 / 500",
    f"files under {SMALL} lines": "at most 10 %",
    "modules imported by one other": "at most 40",
    "packages that import megatron.core": "1",
    "replacements without a guard": "0",
    "files to the first step": "at most 90",
    "whole config: rooms / climbs / returns": "at most 25 / 8 / 20",
}
# Runs a job in this process and writes what was called before the first step was over.
TRACED = """
import json, sys, threading
from pathlib import Path
root, out = Path(sys.argv[1]) / "hybrid_train", sys.argv[2]
from hybrid_train.schema.train import TrainJob
files, functions, changes, rooms, done, before = set(), set(), 0, [], False, None
def look(frame, event, _):
    global changes, before, done
    code = frame.f_code
    if event != "call" or done or not code.co_filename.startswith(str(root)):
        return
    if code.co_name.startswith("<") or not code.co_flags & 1:  # a module or the body of a class
        return
    name = str(Path(code.co_filename).relative_to(root))
    files.add(name); functions.add((name, code.co_qualname))
    changes += name != before
    before = name
    count = code.co_argcount + code.co_kwonlyargcount
    given = {one: frame.f_locals.get(one) for one in code.co_varnames[:count]}
    if given.get("job") is not None or any(type(one) is TrainJob for one in given.values()):
        rooms.append(name)
    done = code.co_name == "step_end" and name.startswith("training")
sys.setprofile(look)
from hybrid_train.jobs.cli import main
try:
    main(["train", *sys.argv[3:]])
except SystemExit:
    pass
sys.setprofile(None)
Path(out).write_text(json.dumps([sorted(files), len(functions), changes, rooms]))
"""


def main() -> int:
    """Print the table."""
    root = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else HERE
    found = dict(counted(root)) | dict(travelled(root))
    width = max(map(len, GOALS))
    for name, goal in GOALS.items():
        print(f"{name:{width}}  {found[name]:>24}  {goal}")
    return 0


def counted(root: Path) -> Iterator[tuple[str, str]]:
    """Yield what the files alone tell."""
    files = sorted((root / "hybrid_train").rglob("*.py"))
    trees = {path: ast.parse(path.read_text()) for path in files}
    lines = sorted(len(path.read_text().splitlines()) for path in files)
    yield "files / lines of the package", f"{len(files)} / {sum(lines)}"
    tail = lines[round(0.95 * (len(lines) - 1))]
    yield (
        "file length: median / p95 / max",
        f"{statistics.median(lines):.0f} / {tail} / {lines[-1]}",
    )
    small = sum(one < SMALL for one in lines)
    yield f"files under {SMALL} lines", f"{small / len(lines):.0%} ({small} of {len(lines)})"
    importers = importers_of(root, trees)
    single = [name for name, ones in importers.items() if len(ones) == 1]
    yield "modules imported by one other", str(len(single))
    walls = {
        str(path.relative_to(root / "hybrid_train").parts[0])
        for path, tree in trees.items()
        if any(one.split(".")[:2] == ["megatron", "core"] for one in imports(tree))
    }
    yield "packages that import megatron.core", f"{len(walls)} ({', '.join(sorted(walls))})"
    bare = [f"{path.name}:{line}" for path, tree in trees.items() for line in replaced(tree)]
    yield "replacements without a guard", str(len(bare))


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the modules that a file imports, names of a package as modules too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (one.name for one in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{one.name}" for one in node.names)


def importers_of(root: Path, trees: dict[Path, ast.Module]) -> dict[str, set[str]]:
    """Return the modules of the package, each with those that import it."""
    names = {
        path: ".".join(path.relative_to(root).with_suffix("").parts)
        for path in trees
        if path.name != "__init__.py"
    }
    importers: dict[str, set[str]] = {name: set() for name in names.values()}
    for path, name in names.items():
        for one in set(imports(trees[path])) & importers.keys():
            importers[one].add(name)
    return importers


def replaced(tree: ast.Module) -> Iterator[int]:
    """Yield the lines that put something in the place of a name of torch or Megatron."""
    foreign = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for one in node.names:
                top = (module or one.name).split(".")[0]
                if top in ("torch", "megatron") and not _is_class(one.name):
                    foreign.add((one.asname or one.name).split(".")[0])
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else []
        for target in targets:
            base = target
            while isinstance(base, ast.Attribute):
                base = base.value
            named = isinstance(target, ast.Attribute) and isinstance(base, ast.Name)
            if named and base.id in foreign:
                yield node.lineno


def _is_class(name: str) -> bool:
    return name[:1].isupper()


def travelled(root: Path) -> Iterator[tuple[str, str]]:
    """Yield what a run of one step tells."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "calls.json"
        words = ("experiment=tiny_cpu", f"run_dir={folder}/run")
        done = subprocess.run(
            [sys.executable, "-c", TRACED, str(root), str(out), *words],
            cwd=root,
            env=os.environ | {"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
        )
        if not out.is_file():
            sys.exit(done.stdout + done.stderr)
        files, functions, changes, rooms = json.loads(out.read_text())
    yield (
        "files to the first step",
        f"{len(files)} ({functions} functions, {changes} changes of file)",
    )
    level = levels(root)
    visits = [name for n, name in enumerate(rooms) if n == 0 or name != rooms[n - 1]]
    climbs = sum(
        level[one.split("/")[0]] < level[other.split("/")[0]]
        for one, other in zip(visits[1:], visits, strict=False)
    )
    returns = sum(count - 1 for count in Counter(visits).values())
    yield "whole config: rooms / climbs / returns", f"{len(set(rooms))} / {climbs} / {returns}"


def levels(root: Path) -> dict[str, int]:
    """Return the layer of each package, from 0 at the top."""
    settings = tomllib.loads((root / "pyproject.toml").read_text())
    (layers,) = (
        contract["layers"]
        for contract in settings["tool"]["importlinter"]["contracts"]
        if contract["type"] == "layers"
    )
    return {
        package.strip(): number for number, row in enumerate(layers) for package in row.split("|")
    }


if __name__ == "__main__":
    sys.exit(main())
