"""The scan: chunked against sequential, both against finite differences, steps against both."""

import pytest
import torch
from torch import Tensor

from hybrid_train.ops.scan import (
    advance,
    chunked_outputs,
    chunked_scan,
    sequential_scan,
    step,
    window_scan,
)
from tests.packed import index_of, spans

NAMES = ["x", "dt", "a", "b", "c", "d", "initial_state"]


def scan_inputs(
    length: int = 17,  # no multiple of 4: the last chunk is short
    groups: int = 2,
    dtype: torch.dtype = torch.float64,
    largest_step: float = 1.0,
    batch: int = 2,
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return {
        "x": normal(batch, length, 4, 3),
        "dt": largest_step * uniform(batch, length, 4),
        "a": -0.1 - 4 * uniform(4),
        "b": normal(batch, length, groups, 5),
        "c": normal(batch, length, groups, 5),
        "d": normal(4),
        "initial_state": normal(batch, 4, 3, 5),
    }


def gradients(outputs: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = outputs[0].new_zeros(())
    for output in outputs:
        weight = torch.randn(output.shape, generator=generator, dtype=torch.float64)
        total = total + (output * weight).sum()
    return list(torch.autograd.grad(total, list(inputs.values())))


@pytest.mark.parametrize("length", [1, 17], ids="length={}".format)
@pytest.mark.parametrize("chunk", [1, 4, 17, 64], ids="chunk={}".format)
@pytest.mark.parametrize("groups", [1, 2, 4], ids="groups={}".format)
def test_chunked_scan_equals_sequential_scan(length: int, chunk: int, groups: int) -> None:
    inputs = {n: t.requires_grad_() for n, t in scan_inputs(length, groups).items()}
    expected = sequential_scan(**inputs)
    actual = chunked_scan(**inputs, chunk=chunk)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs))


@pytest.mark.parametrize("chunk", [1, 2, 5], ids="chunk={}".format)
def test_chunked_scan_passes_gradcheck(chunk: int) -> None:
    inputs = {n: t.requires_grad_() for n, t in scan_inputs(3, batch=1).items()}

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return chunked_scan(**dict(zip(NAMES, tensors, strict=True)), chunk=chunk)

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def test_sequential_scan_passes_gradcheck() -> None:
    inputs = {n: t.requires_grad_() for n, t in scan_inputs(3, batch=1).items()}

    def run(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return sequential_scan(**dict(zip(NAMES, tensors, strict=True)))

    assert torch.autograd.gradcheck(run, tuple(inputs.values()))


def test_gradient_of_one_output_alone_is_right() -> None:
    inputs = {n: t.requires_grad_() for n, t in scan_inputs().items()}
    for which in (0, 1):
        expected = torch.autograd.grad(
            sequential_scan(**inputs)[which].square().sum(),
            list(inputs.values()),
            allow_unused=True,
        )
        actual = torch.autograd.grad(
            chunked_scan(**inputs, chunk=4)[which].square().sum(), list(inputs.values())
        )
        for found, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(found, torch.zeros_like(found) if wanted is None else wanted)


@pytest.mark.parametrize("chunk", [1, 4, 17, 64], ids="chunk={}".format)
def test_outputs_alone_equal_those_beside_a_last_state(chunk: int) -> None:
    # The first chunk receives no state and the last one hands none on: other code paths.
    inputs = {n: t.requires_grad_() for n, t in scan_inputs().items() if n != "initial_state"}
    actual, (expected, _) = chunked_outputs(**inputs, chunk=chunk), sequential_scan(**inputs)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients((actual,), inputs), gradients((expected,), inputs))


@pytest.mark.parametrize("largest_step", [0.1, 1.0, 200.0], ids="dt<{}".format)
def test_float32_chunks_stay_as_close_to_float64_as_the_recurrence(largest_step: float) -> None:
    # dt < 200 makes a chunk decay by up to exp(-25000): prefix sums in float32 would be off there.
    exact = {n: t.requires_grad_() for n, t in scan_inputs(200, largest_step=largest_step).items()}
    rounded = {n: t.detach().float().requires_grad_() for n, t in exact.items()}
    expected, actual = sequential_scan(**exact), chunked_scan(**rounded, chunk=64)
    for found, wanted in zip(actual, expected, strict=True):
        # 16 roundings of 2^-24 relative to the largest value: sums over N = 5 and earlier tokens.
        torch.testing.assert_close(
            found.double(), wanted, rtol=0, atol=2**-20 * float(wanted.detach().abs().max())
        )


def test_gradients_in_float32_under_strong_decay() -> None:
    # Relative to the largest entry of each. The decay rates get the difference of sums over a
    # chunk, which keeps 3 digits; everything else keeps its float32 accuracy.
    exact = {n: t.requires_grad_() for n, t in scan_inputs(200, largest_step=20.0).items()}
    rounded = {n: t.detach().float().requires_grad_() for n, t in exact.items()}
    expected = gradients(sequential_scan(**exact), exact)
    actual = gradients(chunked_scan(**rounded, chunk=64), rounded)
    for name, found, wanted in zip(NAMES, actual, expected, strict=True):
        limit = 1e-3 if name == "a" else 2**-20
        assert (found - wanted).abs().max() <= limit * wanted.abs().max(), name


@pytest.mark.parametrize("width", [1, 2, 7], ids="window={}".format)
def test_windows_behind_a_carried_state_equal_the_whole_sequence(width: int) -> None:
    inputs = scan_inputs()
    whole, last = chunked_scan(**inputs, chunk=4)
    x, dt, a, b, c, d, state = inputs.values()
    outputs, state = [], state.clone()
    for parts in zip(*(part.split(width, dim=1) for part in (x, dt, b, c)), strict=True):
        xs, dts, bs, cs = parts
        outputs.append(window_scan(state, xs, dts, a, bs, cs, d))
        advance(state, xs, dts, a, bs)
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
    torch.testing.assert_close(state, last)


def test_single_steps_from_a_carried_state_equal_the_whole_sequence() -> None:
    inputs = scan_inputs()
    whole, last = chunked_scan(**inputs, chunk=4)
    x, dt, a, b, c, d, state = inputs.values()
    state = state.clone()
    parts = zip(*(part.unbind(1) for part in (x, dt, b, c)), strict=True)
    outputs = [
        step(state, xs, dts, a, bs.flatten(0, 1)[:, None], cs.flatten(0, 1)[:, None], d)
        for xs, dts, bs, cs in parts
    ]
    torch.testing.assert_close(torch.stack(outputs, dim=1), whole)
    torch.testing.assert_close(state, last)


def test_a_state_takes_in_as_many_tokens_of_each_row_as_are_wanted() -> None:
    x, dt, a, b, c, _, state = scan_inputs().values()
    counts = torch.arange(len(x)) + 2
    advanced = state.clone()
    advance(advanced, x[:, :5], dt[:, :5], a, b[:, :5], counts)
    for row, count in enumerate(counts.tolist()):
        few = (part[row : row + 1, :count] for part in (x, dt, b, c))
        xs, dts, bs, cs = few
        _, expected = sequential_scan(xs, dts, a, bs, cs, initial_state=state[row : row + 1])
        torch.testing.assert_close(advanced[row : row + 1], expected)


def test_bfloat16_inputs_give_bfloat16_outputs_and_gradients_and_a_float32_state() -> None:
    inputs = {n: t.requires_grad_() for n, t in scan_inputs(dtype=torch.bfloat16).items()}
    y, last = chunked_scan(**inputs, chunk=4)
    expected, _ = sequential_scan(**{n: t.detach().float() for n, t in inputs.items()})
    assert (y.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=2**-8)  # rounded once
    assert all(g.dtype == torch.bfloat16 for g in gradients((y, last), inputs))


def test_without_direct_path_and_state_both_are_zero() -> None:
    inputs = scan_inputs()
    bare = {n: t for n, t in inputs.items() if n not in ("d", "initial_state")}
    zeros = {n: torch.zeros_like(inputs[n]) for n in ("d", "initial_state")}
    torch.testing.assert_close(
        chunked_scan(**bare, chunk=4), chunked_scan(**bare, **zeros, chunk=4)
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk": 0}, "chunk = 0"),
        ({"dt": torch.ones(2, 17, 3)}, "dt has shape"),
        ({"initial_state": torch.ones(2, 4, 5, 3)}, "initial_state has shape"),
        ({"c": torch.ones(2, 17, 4, 5)}, "c has shape"),
    ],
    ids=["chunk", "dt", "state", "groups"],
)
def test_operands_that_do_not_fit_are_refused(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {**scan_inputs(), "chunk": 4, **change}
    with pytest.raises(ValueError, match=message):
        chunked_scan(**arguments)  # type: ignore[arg-type]


PACKED = index_of([5, 1, 9, 8], [23], [20, 2, 1])  # within chunks, over them, along their ends


def by_documents(inputs: dict[str, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    """The sequential scan of every document for itself, and the states of the last of each row."""
    outputs: list[list[Tensor]] = [[] for _ in index]
    last: list[Tensor] = [inputs["d"]] * len(index)
    for row, start, end in spans(index):
        along = {n: inputs[n][row : row + 1, start:end] for n in ("x", "dt", "b", "c")}
        state = inputs["initial_state"][row : row + 1] if start == 0 else None
        y, last[row] = sequential_scan(**along, a=inputs["a"], d=inputs["d"], initial_state=state)
        outputs[row].append(y)
    return torch.cat([torch.cat(row, dim=1) for row in outputs]), torch.cat(last)


@pytest.mark.parametrize("chunk", [None, 1, 4, 8, 23, 64], ids="chunk={}".format)
def test_documents_that_share_a_row_are_scanned_as_if_alone(chunk: int | None) -> None:
    inputs = {n: t.requires_grad_() for n, t in scan_inputs(23, batch=3).items()}
    expected = by_documents(inputs, PACKED)
    if chunk is None:
        actual = sequential_scan(**inputs, sequence_index=PACKED)
    else:
        actual = chunked_scan(**inputs, chunk=chunk, sequence_index=PACKED)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients(actual, inputs), gradients(expected, inputs))


def test_outputs_alone_know_documents_too() -> None:
    inputs = scan_inputs(23, batch=3)
    del inputs["initial_state"]
    expected = sequential_scan(**inputs, sequence_index=PACKED)[0]
    actual = chunked_outputs(**inputs, chunk=8, sequence_index=PACKED)
    torch.testing.assert_close(actual, expected)
