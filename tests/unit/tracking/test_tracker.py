"""The fan-out hands everything to everybody."""

from collections.abc import Mapping

from hybrid_train.tracking.trackers import FanOut


class Recorder:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Mapping[str, float]]] = []
        self.closed = False

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.seen.append((step, metrics))

    def close(self) -> None:
        self.closed = True


def test_every_tracker_gets_every_step_and_is_closed() -> None:
    recorders = [Recorder(), Recorder()]
    trackers = FanOut(recorders)
    trackers.log(1, {"loss": 2.0})
    trackers.log(2, {"loss": 1.0})
    trackers.close()
    assert [r.seen for r in recorders] == [[(1, {"loss": 2.0}), (2, {"loss": 1.0})]] * 2
    assert all(r.closed for r in recorders)


def test_without_trackers_nothing_happens() -> None:
    FanOut().log(1, {"loss": 2.0})
    FanOut().close()
