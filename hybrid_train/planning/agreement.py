"""Whether the ranks of a run make the same calls to each other: what differs is a deadlock.

Each rank has its list of calls in the order in which it makes them. Collectives of a group must be
the same on all its members, one by one; what is sent must be received, pair by pair; and no rank
may wait in one group for another that waits in a second one. The first fault of each group and of
each pair is named. A rank that did not reach the end has made its calls up to there: what it would
have called then is not held against it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

SEND, RECEIVE, ALL_TO_ALL = "send", "recv", "all-to-all"

Group = tuple[str, tuple[int, ...]]  # name, ranks of the run


@dataclass(frozen=True)
class Call:
    """One call of one rank.

    Attributes:
        kind: "all-reduce"; SEND and RECEIVE are those of two ranks.
        group: who takes part.
        given: sizes and formats of what the rank gives, "float32[128, 64]".
        taken: the same of what it gets.
        bytes: that it gives.
        peer: rank of the run that it sends to or receives from, or that it all comes from.
        splits: rows given to each member and taken from each, in an all-to-all.
    """

    kind: str
    group: Group
    given: tuple[str, ...]
    taken: tuple[str, ...] = ()
    bytes: int = 0
    peer: int | None = None
    splits: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    @property
    def of_two(self) -> bool:
        """Whether it is one side of a transfer between two ranks."""
        return self.kind in (SEND, RECEIVE)

    def __str__(self) -> str:
        what = f"{self.kind} of {' + '.join(self.given or self.taken) or 'nothing'}"
        if self.kind == ALL_TO_ALL and self.splits is not None:
            return f"{what} in rows {list(self.splits[0])}, for rows {list(self.splits[1])}"
        if self.peer is None:
            return what
        return f"{what} {'to' if self.kind == SEND else 'from'} rank {self.peer}"


Calls = Mapping[int, Sequence[Call]]  # by rank of the run


def faults(calls: Calls, unfinished: Collection[int] = ()) -> Iterator[str]:
    """Yield what the ranks do not agree in, a sentence each; nothing if they run to their end.

    Args:
        calls: of every rank.
        unfinished: ranks whose calls end because something stopped them.
    """
    found = [*_collectives(calls, unfinished), *_transfers(calls, unfinished)]
    yield from found or _circle(calls)


def _collectives(calls: Calls, unfinished: Collection[int]) -> Iterator[str]:
    """Compare the members of each group, call by call; yield its first difference."""
    groups = dict.fromkeys(one.group for own in calls.values() for one in own if not one.of_two)
    for group in groups:
        lists = {
            rank: [one for one in calls[rank] if one.group == group and not one.of_two]
            for rank in group[1]
            if rank in calls
        }
        for number, position in enumerate(zip_longest(*lists.values()), start=1):
            row = {
                rank: one
                for rank, one in zip(lists, position, strict=True)
                if one is not None or rank not in unfinished
            }
            if not _agree(row, group[1]):
                yield _difference(group, number, row)
                break


def _agree(row: Mapping[int, Call | None], ranks: Sequence[int]) -> bool:
    """Tell whether the calls that the members of a group make at one position are one."""
    made = {ranks.index(rank): one for rank, one in row.items() if one is not None}
    if len(made) < len(row) or len({(one.kind, one.peer) for one in made.values()}) > 1:
        return False
    if all(one.splits is None for one in made.values()):
        return len({(one.given, one.taken) for one in made.values()}) <= 1
    return all(
        giver.splits is not None
        and taker.splits is not None
        and giver.splits[0][to] == taker.splits[1][source]
        for source, giver in made.items()
        for to, taker in made.items()
    )


def _difference(group: Group, number: int, row: Mapping[int, Call | None]) -> str:
    """Name the ranks on both sides: who makes the call of the first, and who another or none."""
    by_words: dict[str, list[int]] = {}
    for rank, one in row.items():
        by_words.setdefault("no further call" if one is None else str(one), []).append(rank)
    sides = "; ".join(f"{_named(ranks)}: {words}" for words, ranks in by_words.items())
    return f"call {number} of group {group[0]} (ranks {_list(group[1])}) differs: {sides}"


def _transfers(calls: Calls, unfinished: Collection[int]) -> Iterator[str]:
    """Compare what each rank sends to another with what that one receives; yield the first fault.

    Transfers of a pair are matched in their order, as NCCL does, which knows no tags.
    """
    pairs = dict.fromkeys(
        (one.group, *((rank, one.peer) if one.kind == SEND else (one.peer, rank)))
        for rank, own in calls.items()
        for one in own
        if one.of_two
    )
    for group, sender, receiver in pairs:
        if sender not in calls or receiver not in calls:
            continue
        sent = [one for one in calls[sender] if _is(one, SEND, group, receiver)]
        received = [one for one in calls[receiver] if _is(one, RECEIVE, group, sender)]
        for number, (out, back) in enumerate(zip_longest(sent, received), start=1):
            if (out is None and sender in unfinished) or (back is None and receiver in unfinished):
                break
            if out is None or back is None or out.given != back.taken:
                yield (
                    f"transfer {number} from rank {sender} to rank {receiver} in group {group[0]} "
                    f"differs: {out or 'nothing is sent'}; {back or 'nothing is received'}"
                )
                break


def _is(one: Call, kind: str, group: Group, peer: int) -> bool:
    return (one.kind, one.group, one.peer) == (kind, group, peer)


def _circle(calls: Calls) -> Iterator[str]:
    """Let all ranks go on until each waits for another; yield who waits where, if any does.

    Transfers do not count: they are given in batches, whose order says nothing.
    """
    left = {rank: [one for one in own if not one.of_two] for rank, own in calls.items()}
    at = dict.fromkeys(left, 0)
    waiting = set(left)
    while waiting:
        rank = waiting.pop()
        if at[rank] == len(left[rank]):
            continue
        group = left[rank][at[rank]].group
        members = [one for one in group[1] if one in left]
        if all(at[one] < len(left[one]) and left[one][at[one]].group == group for one in members):
            for one in members:
                at[one] += 1
            waiting.update(members)
    stuck = {rank: left[rank][at[rank]] for rank in sorted(left) if at[rank] < len(left[rank])}
    if stuck:
        places = (
            f"rank {rank} in its call {at[rank] + 1}, {one} of group {one.group[0]} "
            f"(ranks {_list(one.group[1])})"
            for rank, one in stuck.items()
        )
        yield f"ranks wait for each other in different groups: {'; '.join(places)}"


def bytes_by_kind(calls: Calls) -> dict[str, tuple[int, int]]:
    """Return calls and bytes given, by kind, of all ranks together; most bytes first."""
    found: dict[str, tuple[int, int]] = {}
    for own in calls.values():
        for one in own:
            number, given = found.get(one.kind, (0, 0))
            found[one.kind] = number + 1, given + one.bytes
    return dict(sorted(found.items(), key=lambda pair: -pair[1][1]))


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {_list(ranks)}"


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks))
