"""What the layers of a model remember of texts that grow, each at its own pace.

Megatron's static context (core 0.19.2) lets all sequences of a batch have one length, its dynamic
one needs CUDA. Here every text has a row with a length of its own. A pass reads a *window*: up to W
new tokens for each row of a range, as a piece of a prompt, one token, or a token with drafts behind
it. Of a window a row keeps as many tokens as it is told, the first ones; what the others left is
overwritten or was never taken in.

Dimensions: R rows, B rows of a pass, W tokens of its window, C channels and K taps of the
convolution, H heads, P head width, G groups, N state.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - the field's name for it

from hybrid_train.megatron.mamba import MambaMixer
from hybrid_train.ops.attention import cached_attention
from hybrid_train.ops.conv import window_conv
from hybrid_train.ops.rope import angles, frequencies, uses_long
from hybrid_train.ops.scan import advance, chunked_scan, step, window_scan
from hybrid_train.schema.model import Rope, RopeScaling

FEW = 16  # tokens up to which the outputs of a window cost less in one product than in chunks
_BLOCK = 256  # by which the room for keys and values grows


@dataclass(frozen=True)
class Window:
    """The new tokens of one pass.

    Attributes:
        rows: which rows it reads.
        starts: tokens that each has had before.
        width: W.
        counts: how many of the W tokens each row keeps; None: it is said after the pass.
        turning: cosine and sine of the angles of each token, [B * W, 1, 1, channels]; None: no
            positions.
    """

    rows: slice
    starts: tuple[int, ...]
    width: int
    counts: tuple[int, ...] | None
    device: torch.device
    turning: tuple[Tensor, Tensor] | None = None

    @cached_property
    def kept(self) -> Tensor | None:
        """The counts, [B]; None where they are not known, or every token is kept."""
        return self.as_counts(self.counts)

    def as_counts(self, counts: Sequence[int] | None) -> Tensor | None:
        """Return counts as a tensor [B]; None for none, and where every token is kept."""
        if counts is None or min(counts) == self.width:
            return None
        return torch.tensor(counts, device=self.device)

    @property
    def seen_keys(self) -> int:
        """How many keys the last query of the longest row sees."""
        return max(self.starts) + self.width

    @cached_property
    def even(self) -> bool:
        """Whether all rows have one length."""
        return len(set(self.starts)) == 1

    @cached_property
    def begins(self) -> bool:
        """Whether all rows begin with it."""
        return self.even and self.starts[0] == 0

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """The row and the position of each token, [B, 1] and [B, W]."""
        rows = torch.arange(self.rows.start, self.rows.stop, device=self.device)[:, None]
        starts = torch.tensor(self.starts, device=self.device)[:, None]
        return rows, starts + torch.arange(self.width, device=self.device)

    @cached_property
    def seen(self) -> Tensor | None:
        """Which keys a query sees, [B, 1, W, keys]; None: all."""
        if self.even and self.width == 1:
            return None
        keys = torch.arange(self.seen_keys, device=self.device)
        return (keys <= self.places[1][..., None])[:, None]


class RowCache:
    """The past of R rows in the layers of a module.

    Attributes:
        lengths: tokens that each row has read.
        longest: tokens that each may come to have; they choose its list of longrope.
    """

    def __init__(self, module: torch.nn.Module, rows: int, rope: Rope | None = None) -> None:
        """Make room for R rows, all empty, in the mixers and attention layers of a module.

        Args:
            module: a stack, or a block of layers.
            rows: R.
            rope: position embedding of its attention layers.
        """
        self.lengths, self.longest = [0] * rows, [0] * rows
        self._room = 0
        self._pasts: dict[Any, MambaPast | AttentionPast] = {}
        for one in module.modules():
            if isinstance(one, MambaMixer):
                self._pasts[one] = MambaPast(one, rows)
            elif isinstance(one, SelfAttention):
                self._pasts[one] = AttentionPast(one, rows)
        self._rope = rope
        self._frequencies = self._frequencies_of(rope)
        self.window: Window | None = None

    def _frequencies_of(self, rope: Rope | None) -> Tensor | None:
        """Return those of short rows and, with longrope, of long ones, [1 or 2, pairs]."""
        layers = [one for one in self._pasts.values() if isinstance(one, AttentionPast)]
        if rope is None or not layers:
            return None
        lengths = (0, rope.original_length + 1) if rope.scaling is RopeScaling.longrope else (0,)
        self._dtype, head_dim = layers[0].keys.dtype, layers[0].keys.shape[3]
        return torch.stack([frequencies(rope, head_dim, length) for length in lengths])

    def of(self, layer: Any) -> Any:
        """Return the past of a layer."""
        return self._pasts[layer]

    def open(self, rows: slice, width: int, counts: Sequence[int] | None) -> None:
        """Begin a pass that reads `width` tokens for each of some rows, see `Window`."""
        starts = tuple(self.lengths[rows])
        device = next(iter(self._pasts.values())).device if self._pasts else torch.device("cpu")
        kept = None if counts is None else tuple(counts)
        turning = self._turning(rows, starts, width, device)
        self.window = Window(rows, starts, width, kept, device, turning)
        if self.window.seen_keys > self._room:
            self._room = -(-max(self.window.seen_keys, 2 * self._room) // _BLOCK) * _BLOCK
            for past in self._pasts.values():
                past.make_room(self._room)

    def _turning(
        self, rows: slice, starts: tuple[int, ...], width: int, device: torch.device
    ) -> tuple[Tensor, Tensor] | None:
        """Return cosine and sine of the new tokens, as `Window` has them."""
        rope, by_length = self._rope, self._frequencies
        if rope is None or by_length is None:
            return None
        if len(by_length) > 1:
            by_length = by_length[[int(uses_long(rope, one)) for one in self.longest[rows]]]
        positions = torch.tensor(starts)[:, None] + torch.arange(width)
        of_pairs = angles(by_length[:, None], positions).flatten(0, 1)[:, None, None]
        cosine, sine = (f(of_pairs) * rope.magnitude for f in (torch.cos, torch.sin))
        return cosine.to(device, self._dtype), sine.to(device, self._dtype)

    def close(self, counts: Sequence[int]) -> None:
        """End a pass: the rows keep the first tokens of its window, as many as `counts` says."""
        window = self.window
        assert window is not None, "no pass has begun"
        if window.counts is None:
            kept = window.as_counts(counts)
            for past in self._pasts.values():
                past.keep(window, kept)
        for place, count in zip(range(window.rows.start, window.rows.stop), counts, strict=True):
            self.lengths[place] += count
        self.window = None

    def bytes_of(self, row: int) -> int:
        """Count the bytes of what a row has read, without the room that was made for more."""
        if not self.lengths[row]:
            return 0
        return sum(past.bytes_of(self.lengths[row]) for past in self._pasts.values())

    def clear(self, row: int, longest: int = 0) -> None:
        """Forget what a row has read, and say how many tokens it may come to have."""
        self.lengths[row], self.longest[row] = 0, longest
        for past in self._pasts.values():
            past.clear(row)

    def move(self, source: int, target: int) -> None:
        """Give a row the past of another one."""
        length = self.lengths[target] = self.lengths[source]
        self.longest[target] = self.longest[source]
        for past in self._pasts.values():
            past.move(source, target, length)

    def swap(self, one: int, other: int) -> None:
        """Let two rows change places."""
        for numbers in (self.lengths, self.longest):
            numbers[one], numbers[other] = numbers[other], numbers[one]
        for past in self._pasts.values():
            past.swap(one, other)

    def states(self) -> list[Tensor]:
        """Return the states that a token overwrites, which keys and values are not."""
        pasts = [past for past in self._pasts.values() if isinstance(past, MambaPast)]
        return [state for past in pasts for state in (past.inputs, past.state)]


class MambaPast:
    """Of a Mamba mixer: the latest inputs of the convolution, and the state of the scan.

    The state sums over the whole past: it is float32 whatever the weights are.
    """

    def __init__(self, mixer: Any, rows: int) -> None:
        self._taps = mixer.conv1d_weight.squeeze(1).float().t().contiguous()
        self._bias = mixer.conv1d_bias.float()
        self._a = -torch.exp(mixer.A_log.float())
        self._d, self._dt_bias = mixer.D.float(), mixer.dt_bias.float()
        self._groups, self._chunk = mixer.ngroups_local_tp, mixer.chunk_size
        heads, width, state = mixer.nheads_local_tp, mixer.headdim, mixer.d_state
        weight = mixer.conv1d_weight
        of_groups = self._groups * state  # channels of b, and of c
        self._inner, self._heads, self._width, self._state = heads * width, heads, width, state
        self._packed = [self._inner, self._inner + 2 * of_groups, heads]  # z, x and b and c, dt
        self._convolved = [self._inner, of_groups, of_groups]
        self.inputs = weight.new_zeros(rows, len(self._taps) - 1, len(weight))  # [R, K-1, C]
        self.state = torch.zeros(rows, heads, width, state, device=weight.device)  # [R, H, P, N]
        self._unkept: tuple[Tensor, ...] = ()
        self.device = weight.device

    def read(self, packed: Tensor, window: Window) -> Tensor:
        """Map z, x, b, c, dt of a window, [B * W, width], to the gated scan output [B * W, H * P].

        The same map as `ops.mixer.mixer_forward`.
        """
        width = window.width
        if width == 1 and window.counts is not None and window.kept is None:
            return self._read_one(packed, window)
        batch = len(packed) // width
        z, xbc, dt = packed.view(batch, width, -1).split(self._packed, dim=-1)
        past = self.inputs[window.rows]
        inputs = torch.cat((past, xbc.to(past.dtype)), dim=1)
        convolved = window_conv(inputs, self._taps, self._bias)
        x, b, c = convolved.split(self._convolved, dim=-1)
        y = self._scan(
            x.view(batch, width, self._heads, self._width),
            F.softplus(dt.float() + self._dt_bias),
            b.view(batch, width, self._groups, self._state),
            c.view(batch, width, self._groups, self._state),
            inputs,
            window,
        )
        gated = y.reshape(batch, width, self._inner) * F.silu(z.float())
        return gated.to(packed.dtype).view(batch * width, self._inner)

    def _read_one(self, packed: Tensor, window: Window) -> Tensor:
        """Do what `read` does where each row keeps the one token that it is given."""
        batch = len(packed)
        z, xbc, dt = packed.split(self._packed, dim=-1)
        past = self.inputs[window.rows]
        inputs = torch.cat((past, xbc.to(past.dtype)[:, None]), dim=1)
        past.copy_(inputs[:, 1:])
        x, b, c = window_conv(inputs, self._taps, self._bias).split(self._convolved, dim=-1)
        y = step(
            self.state[window.rows],
            x.view(batch, self._heads, self._width),
            F.softplus(dt.float() + self._dt_bias),
            self._a,
            b.reshape(batch * self._groups, 1, self._state),
            c.reshape(batch * self._groups, 1, self._state),
            self._d,
        )
        return (y.view(batch, self._inner) * F.silu(z.float())).to(packed.dtype)

    def _scan(
        self, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, inputs: Tensor, window: Window
    ) -> Tensor:
        state = self.state[window.rows]
        if window.counts is None or window.width <= FEW:
            y = window_scan(state, x, dt, self._a, b, c, self._d)
            self._unkept = (x, dt, b, inputs)
            if window.counts is not None:
                self.keep(window, window.kept)
            return y
        kept = window.kept
        if kept is not None:  # a step of size 0 neither decays the state nor adds to it
            dt = dt * (torch.arange(window.width, device=x.device) < kept[:, None])[..., None]
        y, last = chunked_scan(
            x, dt, self._a, b, c, chunk=self._chunk, d=self._d, initial_state=state
        )
        state.copy_(last)
        self._keep_inputs(window, inputs, kept)
        return y

    def keep(self, window: Window, kept: Tensor | None) -> None:
        """Take the first tokens of the latest window in: `kept` [B] of them, None: all."""
        x, dt, b, inputs = self._unkept
        advance(self.state[window.rows], x, dt, self._a, b, kept)
        self._keep_inputs(window, inputs, kept)
        self._unkept = ()

    def _keep_inputs(self, window: Window, inputs: Tensor, kept: Tensor | None) -> None:
        target = self.inputs[window.rows]
        if kept is None:
            target.copy_(inputs[:, window.width :])
            return
        place = kept[:, None] + torch.arange(target.shape[1], device=kept.device)
        torch.gather(inputs, 1, place[..., None].expand_as(target), out=target)

    def tensors(self) -> tuple[Tensor, ...]:
        return self.inputs, self.state

    def bytes_of(self, length: int) -> int:
        """Count the bytes of a row; its length changes nothing."""
        return sum(tensor[0].nbytes for tensor in self.tensors())

    def make_room(self, length: int) -> None:
        """Nothing: a state is as large as ever."""

    def clear(self, row: int) -> None:
        self.inputs[row] = 0
        self.state[row] = 0

    def move(self, source: int, target: int, length: int) -> None:
        for tensor in self.tensors():
            tensor[target] = tensor[source]

    def swap(self, one: int, other: int) -> None:
        for tensor in self.tensors():
            tensor[[one, other]] = tensor[[other, one]]


class AttentionPast:
    """Of an attention layer: keys and values of all tokens, [R, kv_heads, room, D] each."""

    def __init__(self, attention: Any, rows: int) -> None:
        heads = attention.num_query_groups_per_partition
        weight = attention.linear_qkv.weight
        shape = (rows, heads, 0, attention.hidden_size_per_attention_head)
        self.device, kind = weight.device, attention.config.params_dtype  # weights may be FP8 codes
        self.keys, self.values = (
            torch.empty(shape, dtype=kind, device=self.device) for _ in range(2)
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, window: Window) -> Tensor:
        """Add the keys and values of a window, and attend.

        Args:
            query: of B rows and W tokens, one row after the other: whatever has the elements of
                [B * W, heads * D] in that order.
            key: likewise, of [B * W, kv_heads * D].
            value: like key.
            window: of the pass.

        Returns:
            [B * W, heads * D].
        """
        width = window.width
        for kept, new in ((self.keys, key), (self.values, value)):
            by_row = new.reshape(-1, width, kept.shape[1], kept.shape[3])
            if window.even:
                start = window.starts[0]
                kept[window.rows, :, start : start + width] = by_row.transpose(1, 2)
            else:
                rows, positions = window.places
                kept[rows, :, positions] = by_row
        seen, batch = slice(window.seen_keys), window.rows.stop - window.rows.start
        return cached_attention(
            query.reshape(batch, width, -1, self.keys.shape[3]).transpose(1, 2),
            self.keys[window.rows, :, seen],
            self.values[window.rows, :, seen],
            None if window.begins else window.seen,
            causal=window.begins,
        )

    def keep(self, window: Window, kept: Tensor | None) -> None:
        """Nothing: what lies behind the end of a row is not seen."""

    def tensors(self) -> tuple[Tensor, ...]:
        return self.keys, self.values

    def bytes_of(self, length: int) -> int:
        """Count the bytes of the keys and values of a row of so many tokens."""
        return sum(tensor[0, :, :1].nbytes * length for tensor in self.tensors())

    def make_room(self, length: int) -> None:
        """Grow to as many tokens a row."""
        rows, heads, had, width = self.keys.shape
        larger = []
        for tensor in self.tensors():
            new = tensor.new_zeros(rows, heads, length, width)
            new[:, :, :had] = tensor
            larger.append(new)
        self.keys, self.values = larger

    def clear(self, row: int) -> None:
        """Nothing: what lies behind the end of a row is not seen."""

    def move(self, source: int, target: int, length: int) -> None:
        for tensor in self.tensors():
            tensor[target, :, :length] = tensor[source, :, :length]

    def swap(self, one: int, other: int) -> None:
        for tensor in self.tensors():
            tensor[[one, other]] = tensor[[other, one]]
