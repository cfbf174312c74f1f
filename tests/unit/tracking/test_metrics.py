"""Names of metrics and how values are shown."""

import pytest

from hybrid_train.tracking.metrics import (
    GROUPS,
    METRICS,
    expert_load,
    metric,
    mtp_loss,
    show,
    show_duration,
    show_step_time,
    tag,
)


def test_the_fixed_fields_of_metrics_jsonl_are_in_the_list() -> None:
    fixed = {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "step_time_s"}
    assert fixed <= METRICS.keys()


def test_members_of_families_are_found() -> None:
    assert metric(mtp_loss(2)) is METRICS["mtp_loss_{}"]
    assert metric(expert_load(12)) is METRICS["expert_load_{}"]
    assert metric(expert_load(2, in_mtp=True)) is METRICS["expert_load_mtp_{}"]
    assert metric(f"validation_{mtp_loss(1)}") is METRICS["validation_mtp_loss_{}"]


@pytest.mark.parametrize("name", ["los", "mtp_loss", "mtp_loss_x", "loss_1", ""])
def test_an_unknown_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no metric; add it to"):
        metric(name)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (45.4, "45s"),
        (59.7, "1m00s"),
        (130, "2m10s"),
        (3900, "1h05m"),
        (2 * 86400 + 3 * 3600, "2d03h"),
        (float("inf"), "?"),
    ],
)
def test_durations_are_short(seconds: float, text: str) -> None:
    assert show_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.0123, "12ms"), (1.234, "1.23s"), (12.34, "12.3s")]
)
def test_step_times_have_three_digits_at_most(seconds: float, text: str) -> None:
    assert show_step_time(seconds) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("tokens", 2_048_000, "2.05M"),
        ("loss", 4.32109, "4.3211"),
        ("lr", 3e-4, "3.00e-04"),
        ("mfu", 0.3414, "34.1%"),
        ("expert_load_3", 1.256, "1.26"),
    ],
)
def test_values_are_shown_in_their_own_way(name: str, value: float, text: str) -> None:
    assert show(name, value) == text


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("loss", "loss/loss"),
        ("validation_loss", "loss/validation_loss"),
        ("loss/web", "loss/loss/web"),
        ("lr", "optimizer/lr"),
        ("lr/generator", "optimizer/lr/generator"),
        ("expert_load_mtp_2", "routing/expert_load_mtp_2"),
        ("tokens_per_s", "speed/tokens_per_s"),
        ("tokens/web", "progress/tokens/web"),
        ("own/loss_average", "hooks/own/loss_average"),
    ],
)
def test_trackers_show_metrics_in_groups(name: str, shown: str) -> None:
    assert tag(name) == shown


def test_every_metric_has_one_group_and_no_two_share_a_tag() -> None:
    names = [metric.name for group in GROUPS.values() for metric in group]
    assert len(names) == len(set(names)) == len(METRICS)
    members = [name.replace("{}", "1") for name in names]
    assert len({tag(name) for name in members}) == len(members)
