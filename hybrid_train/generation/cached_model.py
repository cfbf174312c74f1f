"""A model that reads on where its rows ended, under any layout, and drafts with its MTP block.

Dimensions: R rows, B rows of a pass, W tokens of a window, H hidden, V vocabulary with its padding.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hybrid_train.megatron.data_parallel import complete_parameters, is_fsdp
from hybrid_train.megatron.hybrid import Hybrid
from hybrid_train.megatron.row_cache import RowCache
from hybrid_train.megatron.window_pass import ChunkPass, DraftPass, bound_head
from hybrid_train.model.quantized import unwrapped
from hybrid_train.ops.logits import LabelScores
from hybrid_train.runtime import ranks
from hybrid_train.schema.problems import UserError
from hybrid_train.training.network import Network

# Below so many multiplications a pass is a row of operations that are each over before several
# threads have met: with two of them a model of 3M parameters took 1.2 to 5 times as long.
_WORTH_THREADS = 32_000_000


class CachedModel:
    """The part of a model that this process holds, with the past of R rows.

    All processes of a pipeline and of a tensor-parallel group call its methods alike. What only the
    last pipeline stage knows is None on the others.
    """

    def __init__(self, network: Network, rows: int) -> None:
        """Make room for empty rows.

        Args:
            network: in eval mode while this is in use; its weights do not change meanwhile.
            rows: R.

        Raises:
            UserError: on all processes, if the layout does not let tokens be read one by one, or
                it is not said how a layer reads them.
        """
        self._chunks: list[Hybrid] = [unwrapped(chunk) for chunk in network.chunks]  # type: ignore[misc]
        _require_whole(network, self._chunks[0].config)
        if network.optimizer is not None:
            complete_parameters(network.chunks)  # as some of them are read before any pass
        self.device = network.device
        self._pipeline = network.groups.pp
        self._weights = sum(p.numel() for chunk in self._chunks for p in chunk.parameters())
        with torch.inference_mode():
            self._passes = ranks.all_or_none(
                lambda: [ChunkPass(chunk, rows) for chunk in self._chunks]
            )
            last = self._chunks[-1]
            has_block = last.post_process and last.mtp_process and last.runs_mtp
            self._head = bound_head(last) if last.post_process else None
            self._drafts = ranks.all_or_none(lambda: DraftPass(last, rows) if has_block else None)
            shape = (rows, 1, last.config.hidden_size)
            # What the MTP block made of the last token of each row: a chain of drafts begins there.
            self._latest = torch.zeros(shape, dtype=last.config.params_dtype, device=self.device)

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row has read."""
        return self._passes[0].cache.lengths

    def read(
        self, rows: slice, tokens: Sequence[Sequence[int]], counts: Sequence[int] | None
    ) -> Tensor | None:
        """Read a window of tokens for each of some rows.

        Args:
            rows: which, one behind the other.
            tokens: of each row, [B, W]; what a row does not keep may be anything.
            counts: how many each row keeps; None: `keep` says it.

        Returns:
            Hidden states after the final norm, [B, W, H], on the last pipeline stage.
        """
        ids = torch.tensor(tokens, device=self.device)
        hidden = None
        with self._working(ids.numel()):
            for chunk, run in zip(self._chunks, self._passes, strict=True):
                run.cache.open(rows, ids.shape[1], counts)
                hidden = self._through(chunk, run, ids)
        if counts is not None:
            self._close(counts)
        return hidden

    def _through(self, chunk: Hybrid, run: ChunkPass, ids: Tensor) -> Tensor | None:
        """Run a chunk of the pipeline: hidden states of the last one, None of the others."""
        given = ids
        if not chunk.pre_process:
            shape = (*ids.shape, chunk.config.hidden_size)
            given = torch.empty(shape, dtype=chunk.config.params_dtype, device=self.device)
            dist.recv(given, group=self._pipeline, group_src=self._beside(-1))
        made = run(given)
        if chunk.post_process:
            return made
        dist.send(made.contiguous(), group=self._pipeline, group_dst=self._beside(1))
        return None

    def _beside(self, step: int) -> int:
        return int((self._pipeline.rank() + step) % self._pipeline.size())

    def keep(self, counts: Sequence[int]) -> None:
        """Say how many tokens of the window that was read last each row keeps."""
        with torch.inference_mode():
            self._close(counts)

    def _close(self, counts: Sequence[int]) -> None:
        for run in self._passes:
            run.cache.close(counts)

    def logits(self, hidden: Tensor) -> Tensor:
        """Return logits [B, W, V] of hidden states [B, W, H]; on the last pipeline stage."""
        assert self._head is not None, "the head is on the last stage"
        with self._working(hidden.shape[0] * hidden.shape[1]):
            return self._head(hidden)

    def label_scores(self, hidden: Tensor, labels: Tensor, places: Tensor) -> Tensor:
        """Return what the distributions at some places say of labels; on the last pipeline stage.

        Args:
            hidden: of a window, [B, W, H].
            labels: token ids, [T].
            places: numbers of tokens, rows before window; one may come with several labels, [T].

        Returns:
            Log-probability, nats, and 1 where the label is the greedy token, [T, 2].
        """
        with self._working(len(labels)):
            return self._chunks[-1].head().read(hidden, LabelScores(labels), places)

    def learn(
        self,
        rows: slice,
        hidden: Tensor | None,
        following: Sequence[Sequence[int]],
        counts: Sequence[int],
    ) -> None:
        """Give the MTP block the true states of tokens that rows have kept.

        Args:
            rows: which.
            hidden: of the window, [B, W, H]; None on a stage that has no block.
            following: the token behind each, [B, W].
            counts: how many each row has kept.
        """
        if hidden is None:
            return
        assert self._drafts is not None, "the model has no MTP block"
        ids = torch.tensor(following, device=self.device)
        with self._working(ids.numel()):
            self._drafts.cache.open(rows, ids.shape[1], counts)
            made = self._drafts(hidden, ids)
            self._drafts.cache.close(counts)
            last = torch.tensor(counts, device=self.device) - 1
            self._latest[rows, 0] = made[torch.arange(len(counts), device=self.device), last]

    def propose(self, rows: slice, length: int, vocab_size: int) -> Tensor | None:
        """Draft so many tokens for each of some rows, [B, length]: the most likely ones.

        The block is fed its own states; what its cache learns on the way is forgotten.
        """
        if self._drafts is None or self._head is None:
            return None
        batch, cache = rows.stop - rows.start, self._drafts.cache
        hidden, lengths = self._latest[rows], list(cache.lengths)
        drafts: list[Tensor] = []
        with self._working(batch):
            states = [(state, state[rows].clone()) for state in cache.states()]
            for number in range(length):
                if number:
                    cache.open(rows, 1, [1] * batch)
                    hidden = self._drafts(hidden, drafts[-1])
                    cache.close([1] * batch)
                drafts.append(self._head(hidden)[..., :vocab_size].argmax(-1))
            cache.lengths[:] = lengths
            for state, before in states:
                state[rows] = before
        return torch.cat(drafts, dim=1)

    def bytes_of(self, row: int) -> int:
        """Count the bytes that the layers of this process keep of a row."""
        return sum(cache.bytes_of(row) for cache in self._all_caches())

    def clear(self, row: int, longest: int = 0) -> None:
        """Empty a row, and say how many tokens it may come to have."""
        with torch.inference_mode():
            for cache in self._all_caches():
                cache.clear(row, longest)

    def move(self, source: int, target: int) -> None:
        """Give a row the past of another one."""
        with torch.inference_mode():
            for cache in self._all_caches():
                cache.move(source, target)
            self._latest[target] = self._latest[source]

    def swap(self, one: int, other: int) -> None:
        """Let two rows change places."""
        with torch.inference_mode():
            for cache in self._all_caches():
                cache.swap(one, other)
            self._latest[[one, other]] = self._latest[[other, one]]

    def _all_caches(self) -> list[RowCache]:
        drafts = [] if self._drafts is None else [self._drafts.cache]
        return [run.cache for run in self._passes] + drafts

    @contextlib.contextmanager
    def _working(self, tokens: int) -> Iterator[None]:
        with torch.inference_mode(), _threads_for(self._weights * tokens):
            yield


@contextlib.contextmanager
def _threads_for(multiplications: int) -> Iterator[None]:
    """Work in one thread where more would only wait for each other."""
    before = torch.get_num_threads()
    if before == 1 or multiplications >= _WORTH_THREADS:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _require_whole(network: Network, config: Any) -> None:
    """Refuse layouts under which tokens cannot be read one by one.

    Raises:
        UserError: on all processes.
    """
    if reason := why_not_cached(network, config):
        error = UserError(f"generation cannot use this layout: {reason}")
        error.on_all_ranks = True
        raise error


def why_not_cached(network: Network, config: Any) -> str:
    """Say why a layout cannot read tokens one by one; an empty text where it can.

    Such layouts split tokens, keep weights elsewhere, or know one shape of a pass.

    Args:
        network: under that layout.
        config: of its model, as Megatron has it.
    """
    reason = ""
    if network.groups.cp.size() > 1:
        reason = f"parallel.context = {network.groups.cp.size()}: a token that is read by itself "
        reason += "cannot be split over processes; set parallel.context=1"
    elif any(map(is_fsdp, network.chunks)):
        reason = "parallel.fsdp = true: no process holds the weights between two steps; set "
        reason += "parallel.fsdp=false, or generate from a checkpoint of the run"
    elif config.tp_comm_overlap or config.cuda_graph_impl != "none":
        reason = "parallel.overlap_tensor and gpu.cuda_graphs keep memory for passes of a fixed "
        reason += "number of tokens; set parallel.overlap_tensor=false gpu.cuda_graphs=none, or "
        reason += "generate from a checkpoint of the run"
    return reason
