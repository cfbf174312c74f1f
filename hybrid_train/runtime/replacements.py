"""Names of other libraries that ours stand for: one way to put them there, and to check them.

A library may change under what was written for it, without a word. So each replacement lists the
functions and classes that were read when it was written, with a digest of their source; `changed`
compares them with what is installed, without importing it. The table of Megatron-Core is
`megatron/written_for.py`; that of torch's calls for a GPU stands here.
"""

import ast
import functools
import hashlib
import importlib
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_DIGITS = 12  # of a digest: enough to see a change


@dataclass(frozen=True)
class Replacement:
    """What of a library ours stand for, or what a class of ours overrides.

    Attributes:
        module: import path of the module that holds the names.
        names: in the module; "Class.method" in a class of it. Empty: nothing is replaced, a class
            of ours derives from what was read.
        reason: why, in a sentence.
        read: what was read when it was written, "name" in the module or "other.module:name", each
            with the digest of its source.
        fault: where docs/upstream_faults.md has a row of it, words that this row begins with.
        optional: names that are there only where an optional library could be imported.
    """

    module: str
    names: tuple[str, ...]
    reason: str
    read: Mapping[str, str] = field(default_factory=dict)
    fault: str = ""
    optional: tuple[str, ...] = ()

    def put(self, **ours: Any) -> None:
        """Put ours in place, all names of it.

        Args:
            **ours: by name; the dot of "Class.method" is written as two underscores.
        """
        named = {name.replace(".", "__"): name for name in self.names}
        assert ours.keys() == named.keys(), f"{self.module}: {sorted(ours.keys() ^ named.keys())}"
        holder: Any = importlib.import_module(self.module)
        for key, value in ours.items():
            path, _, name = named[key].rpartition(".")
            owner = operator.attrgetter(path)(holder) if path else holder
            there = hasattr(owner, name) or name in self.optional
            assert there, f"{self.module} has no {named[key]} any more"
            setattr(owner, name, value)

    def present(self) -> dict[str, Any]:
        """Return what stands in the places now, as `put` takes it; for names of a module alone."""
        holder = importlib.import_module(self.module)
        return {name: getattr(holder, name) for name in self.names}

    def changed(self) -> Iterator[str]:
        """Yield the sources that are not those that were read, with the digest of today."""
        for name, digest in self.read.items():
            module, _, inner = name.rpartition(":")
            found = source_digest(module or self.module, inner)
            if found != digest:
                yield f"{module or self.module}:{inner} is {found or 'gone'}, was {digest}"


# What code written for CUDA asks of torch; `cpu` has what stands for it where there is no GPU.
FACTORIES = ("tensor", "empty", "zeros", "ones", "full", "rand", "randn", "arange", "as_tensor")
DEVICE_CALLS = Replacement(
    "torch.cuda",
    (
        *("current_device", "set_device", "synchronize", "empty_cache", "Stream", "Event"),
        *("current_stream", "default_stream", "stream", "device", "is_current_stream_capturing"),
        *("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all", "nvtx"),
    ),
    "a CPU has neither devices nor streams: what core asks of them is done already",
)
TENSORS = Replacement(
    "torch",
    ("Tensor.cuda", "Tensor.type", "nn.Module.to", "compile", *FACTORIES),
    "what core puts on a GPU stays on the CPU; nothing is compiled",
    {"torch.nn.modules.module:Module.to": "94743f98beae"},
)
COLLECTIVES = Replacement(
    "torch.distributed",
    (
        *("DeviceMesh.from_group", "all_to_all_single", "all_gather", "reduce_scatter"),
        *("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"),
    ),
    "gloo takes lists of ints and parts of one size alone, and copies where one process is alone",
    {
        f"torch.distributed.distributed_c10d:{name}": digest
        for name, digest in (
            ("all_to_all_single", "5eecf45ddcf7"),
            ("all_gather", "58f5dd8a2968"),
            ("reduce_scatter", "5d4a9af171cc"),
            ("all_reduce", "6ddfc543d0bc"),
            ("all_gather_into_tensor", "4f14da915e4e"),
            ("reduce_scatter_tensor", "b03878247967"),
        )
    },
)
OBJECTS = Replacement(
    "torch.distributed",
    ("all_gather_object",),
    "one process stands for a rank of a run whose others are not there: they would say the same",
    {"torch.distributed.distributed_c10d:all_gather_object": "654406cac673"},
)
TORCH = (DEVICE_CALLS, TENSORS, COLLECTIVES, OBJECTS)


def to_do(table: Iterable[Replacement]) -> list[str]:
    """Return what is to be read again before the installed versions can be trusted."""
    return [
        f"{line}; read it again: {one.reason}"
        for one in table
        if _file_of(one.module) is not None  # an optional library may be absent
        for line in one.changed()
    ]


def source_digest(module: str, name: str) -> str:
    """Return a digest of a function or class, without comments and docstrings; empty: not there.

    Where a module defines a name several times, as for versions of another library, all count.
    """
    path = _file_of(module)
    nodes = [] if path is None else list(_definitions(_tree(path), name.split(".")))
    if not nodes:
        return ""
    text = "\n".join(ast.unparse(_without_docstrings(node)) for node in nodes)
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def _file_of(module: str) -> Path | None:
    """Find the file of a module; only the outermost package is looked for, nothing is imported."""
    first, *rest = module.split(".")
    spec = find_spec(first)
    for root in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(root, *rest)
        for file in (path.with_suffix(".py") if rest else path, path / "__init__.py"):
            if file.is_file():
                return file
    return None


def _definitions(tree: ast.AST, names: list[str]) -> Iterator[ast.AST]:
    """Yield the definitions of a dotted name, in the order of the file."""
    for node in _statements(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == names[0]:
            if len(names) == 1:
                yield node
            else:
                yield from _definitions(node, names[1:])


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield the statements of a body, those in its branches too, but not those of functions."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _statements(node)


def _without_docstrings(node: ast.AST) -> ast.AST:
    for inner in ast.walk(node):
        if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            first = inner.body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                inner.body = inner.body[1:] or [ast.Pass()]
    return node
