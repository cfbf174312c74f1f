"""What NVIDIA's trainers store beside tensors: arguments and counters, read without running code.

It is a pickle: in `common.pt` until core 0.18, since then an item of the checkpoint, and in
Megatron-Bridge's `train_state.pt`. torch's own reader of plain data (`weights_only`) reads it, and
knows besides the classes that Megatron-Core itself admits (`safe_globals.py` in 0.19.2). Each of
those but the namespace of arguments comes as a record that does nothing; all others are refused.
"""

import argparse
import contextlib
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hybrid_train.schema.problems import UserError

_ASKED = re.compile(r"GLOBAL ([\w.]+)")
ADMITTED = (
    "types.SimpleNamespace",
    "pathlib.PosixPath",
    "pathlib._local.PosixPath",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.dtypes.UInt32DType",
    "megatron.core.enums.ModelType",
    "megatron.core.optimizer.optimizer_config.OptimizerConfig",
    "megatron.core.rerun_state_machine.RerunDiagnostic",
    "megatron.core.rerun_state_machine.RerunMode",
    "megatron.core.rerun_state_machine.RerunState",
    "megatron.core.transformer.enums.AttnBackend",
    "megatron.core.transformer.enums.CudaGraphModule",
    "megatron.core.transformer.enums.CudaGraphScope",
    "megatron.core.transformer.enums.InferenceCudaGraphScope",
    "_io.BytesIO",
    "signal.Signals",
    "torch._C.Generator",
)


class _Record:
    """An object that is of no use here: what it was made of is dropped."""

    def __new__(cls, *_: object) -> "_Record":
        return super().__new__(cls)

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


_RECORDS = [(type(name.rpartition(".")[2], (_Record,), {}), name) for name in ADMITTED]


def read(content: bytes, place: object) -> dict[str, Any]:
    """Read a dictionary that torch.save wrote; namespaces in it become dictionaries, too.

    Args:
        content: of the file, or of the item.
        place: where it stands, for errors.

    Raises:
        UserError: if it is damaged, or asks for a class that is not admitted, by its name.
    """
    try:
        with _only_records():
            loaded = torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
        is_alone = isinstance(loaded, list) and len(loaded) == 1
        plain = _plain(loaded[0] if is_alone else loaded)
    except Exception as error:  # a damaged file raises almost anything
        asked = _ASKED.search(str(error))
        if asked:
            raise UserError(
                f"{place} asks for {asked[1]}, which is neither plain data nor a class that "
                "Megatron-Core admits there; it was not read, since a pickle can run code"
            ) from error
        first = str(error).partition("\n")[0]
        raise UserError(f"{place} is damaged: {first}") from error
    if not isinstance(plain, dict):
        raise UserError(f"{place} holds {type(plain).__name__}, where a dictionary should be")
    return plain


@contextlib.contextmanager
def _only_records() -> Iterator[None]:
    """Admit our records alone; Megatron-Core, once imported, admits the classes themselves."""
    before = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals([argparse.Namespace, *_RECORDS])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)


def _plain(value: Any) -> Any:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    return value


def whole_number(state: Mapping[str, Any], name: str, place: object) -> int:
    """Return a count; 0 where there is none.

    Raises:
        UserError: if it is something else.
    """
    value = state.get(name)
    if value is None:
        return 0
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or value < 0:
        raise UserError(f"{place}: {name} is {value!r}; it must be a whole number")
    return value


def optimizer_steps(common: Mapping[str, Any]) -> int | None:
    """Return how many steps an optimizer has taken; None if it does not say.

    The count stands in its groups of parameters, or beside them as `common_step`; chained
    optimizers have one each, and all the same.
    """
    names = ("optimizer", "optimizer_states")  # of Megatron-LM and Bridge, of NeMo 2
    return next((_steps_in(common[name]) for name in names if name in common), None)


def _steps_in(tree: object) -> int | None:
    branches: Iterable[object] = ()
    if isinstance(tree, dict):
        for name in ("step", "common_step"):
            if tree.get(name) is not None and not isinstance(tree[name], dict | list):
                return whole_number(tree, name, "the optimizer")
        branches = tree.values()
    elif isinstance(tree, list):
        branches = tree
    return next((steps for one in branches if (steps := _steps_in(one)) is not None), None)
