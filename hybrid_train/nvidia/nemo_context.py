"""context/io.json of NeMo 2: the model as a config of the library fiddle, written without it.

NeMo reads it with `io.load_context(path, subpath="model")`: it imports the classes that are named
there, and calls them. A class with its arguments becomes an object with an entry for itself, one
for the names of its arguments, and two empty ones for tags and history.

Sources: fiddle 0.3.1, _src/experimental/serialization.py, whose own reader reads it in the tests;
NeMo 8cfedd7, lightning/io/mixin.py `load` and lightning/io/pl.py.
"""

from collections.abc import Mapping
from typing import Any

CALLED, TARGET = "_call_", "_target_"  # as NeMo's YAML has them, too
_CONTEXT = "nemo.lightning.io.pl.TrainerContext"
_FIDDLE = "fiddle._src.config"
_VERSION = "0.0.1"  # of fiddle's JSON
_ROOT = "<root>"


def io_json(model: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of io.json.

    Args:
        model: the class under `_target_` and its arguments: numbers, texts, None, such tables of
            their own, or with `_call_` false the class or function itself.
    """
    objects: dict[str, Any] = {}
    root = _value({TARGET: _CONTEXT, "model": model, "trainer": None}, _ROOT, objects)
    return {
        "root": root,
        "objects": objects,
        "refcounts": dict.fromkeys(objects, 1),
        "version": _VERSION,
    }


def _value(value: Any, path: str, objects: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        return {"type": "leaf", "value": value, "paths": [path]}
    if value.get(CALLED) is False:
        return {**_named(value[TARGET]), "paths": [path]}
    arguments = {name: one for name, one in sorted(value.items()) if name != TARGET}
    items = [[f"Attr(name={name!r})", _value(one, f"{path}.{name}", objects)]
             for name, one in arguments.items()]  # fmt: skip
    names = [[f"Index(index={number})", name] for number, name in enumerate(arguments)]
    described = {
        "fn_or_cls": _named(value[TARGET]),
        "argument_names": _put(objects, _object("builtins.tuple", names, None)),
        "argument_tags": _put(objects, _empty_table()),
        "argument_history": _put(objects, _empty_table()),
    }
    kind = f"{_FIDDLE}.BuildableTraverserMetadata"
    fields = [[f"Attr(name={name!r})", one] for name, one in described.items()]
    metadata = _put(objects, _object(kind, fields, _named(kind)))
    return _put(objects, {**_object(f"{_FIDDLE}.Config", items, metadata), "paths": [path]})


def _empty_table() -> dict[str, Any]:
    return _object("builtins.dict", [], _object("builtins.tuple", [], None))


def _object(kind: str, items: list[Any], metadata: Any) -> dict[str, Any]:
    return {"type": _named(kind), "items": items, "metadata": metadata}


def _put(objects: dict[str, Any], one: dict[str, Any]) -> dict[str, Any]:
    key = f"object_{len(objects) + 1}"
    objects[key] = one
    return {"type": "ref", "key": key}


def _named(name: str) -> dict[str, Any]:
    module, _, symbol = name.rpartition(".")
    return {"type": "pyref", "module": module, "name": symbol}
