"""The clock map on readings of known truth."""

from __future__ import annotations

import numpy as np
import pytest

from rxlab.errors import ClockError
from rxlab.follow.clockfit import NAT, fit_constant

OFFSET = 1_790_000_000_123_456_789


def readings(offsets: list[int], width: int = 44, start: int = 10**12) -> list[dict[str, int]]:
    rows = []
    for number, offset in enumerate(offsets):
        before = start + number * 100_000_000
        rows.append({"mono_before": before, "real": before + width // 2 + offset, "mono_after": before + width})
    return rows


def test_constant_offset_is_exact_to_the_nanosecond() -> None:
    clock = fit_constant(readings([OFFSET] * 5))
    assert clock.offset_ns == OFFSET
    assert clock.segments.n == 1
    assert clock.bound_ns <= 25
    stamps = np.array([OFFSET + 123, NAT])
    assert clock.to_monotonic(stamps).tolist() == [123, NAT]
    assert clock.to_realtime(np.array([123, NAT])).tolist() == [OFFSET + 123, NAT]


@pytest.mark.parametrize("step", [1_000, -250_000_000, 37_000_000_000])
def test_step_is_found_at_its_place(step: int) -> None:
    taken = readings([OFFSET] * 4 + [OFFSET + step] * 4)
    clock = fit_constant(taken)
    assert clock.segments["offset"].tolist() == [OFFSET, OFFSET + step]
    inside = (taken[3]["real"] + taken[4]["real"]) // 2
    flags = clock.inside_step(np.array([taken[0]["real"], inside, taken[7]["real"]]))
    assert flags.tolist() == [False, True, False]
    # Either side of the step converts by its own segment.
    assert clock.to_monotonic(np.array([taken[1]["real"]]))[0] == taken[1]["mono_before"] + 22
    if step > 0:
        assert clock.to_monotonic(np.array([taken[6]["real"]]))[0] == taken[6]["mono_before"] + 22


def test_a_preempted_reading_is_not_a_step() -> None:
    taken = readings([OFFSET] * 6)
    taken[2]["mono_after"] += 3_000_000  # the reader was switched out inside the sandwich
    clock = fit_constant(taken)
    assert clock.segments.n == 1
    assert clock.offset_ns == OFFSET
    assert clock.bound_ns <= 30


def test_sandwiches_that_overlap_leave_less_open_than_the_narrowest() -> None:
    taken = readings([OFFSET] * 2, width=40)
    # Both contain the offset: one near its beginning, one near its end.
    for row, share in zip(taken, (4, 36), strict=True):
        row["real"] = row["mono_before"] + share + OFFSET
    clock = fit_constant(taken)
    assert abs(clock.offset_ns - OFFSET) <= 4
    assert clock.bound_ns <= 6


def test_a_step_below_the_threshold_is_inside_the_bound() -> None:
    clock = fit_constant(readings([OFFSET] * 4 + [OFFSET + 150] * 4))
    assert clock.segments.n == 1
    assert max(abs(clock.offset_ns - OFFSET), abs(clock.offset_ns - OFFSET - 150)) <= clock.bound_ns


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        ([], "no clock readings"),
        ([{"mono_before": 1}], "malformed"),
        ([{"mono_before": 5, "real": 9, "mono_after": 4}], "backwards"),
    ],
)
def test_bad_readings_are_refused(taken: list[dict[str, int]], message: str) -> None:
    with pytest.raises(ClockError, match=message):
        fit_constant(taken)
