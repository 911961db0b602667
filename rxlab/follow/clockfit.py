"""Clock readings -> the map between CLOCK_REALTIME (pcap software stamps) and CLOCK_MONOTONIC (perf -k).

REALTIME - MONOTONIC is constant while the kernel slews the clock (measured: +-5 ns over 7 s at +-100 ppm) and changes only at
steps, so the map is one integer per segment; the packets are used only to verify it, never to estimate it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rxlab.errors import ClockError
from rxlab.read.columns import Columns

# Two sandwiches differ by less than this unless the clock was stepped between them (repeatability measured: 5 ns; widths 40-50 ns).
STEP_THRESHOLD_NS = 200

# The quantiles a residual is reported by (docs/schema.md, /clocks).
RESIDUAL_QUANTILES = (0.0, 0.01, 0.5, 0.99, 1.0)

NAT = np.iinfo(np.int64).min


@dataclass(frozen=True)
class ClockMap:
    """Piecewise constant map of CLOCK_REALTIME onto CLOCK_MONOTONIC.

    Attributes
    ----------
    segments : Columns, dims (segment,)
        ``start_real`` (int64 ns of CLOCK_REALTIME; the first is the smallest int64) and ``offset`` (CLOCK_REALTIME -
        CLOCK_MONOTONIC, int64 ns). Where the clocks drift against each other (`method`) also ``anchor`` (int64 ns of the
        pcap's clock at which the offset holds) and ``slope`` (float64, change of the offset per ns); with cross-stamps
        ``bound`` of each segment (int64 ns). With hardware stamps the NIC's clock stands for CLOCK_REALTIME.
    uncertain : int64 array, dims (step, 2), nanoseconds of CLOCK_REALTIME
        The intervals in which a step happened: the offset is unknown there.
    bound_ns : int
        Largest possible error of a converted stamp: half of what all sandwiches of a segment leave open.
    residual : dict of float to float
        Quantile -> pcap stamp minus the event it is taken at, in nanoseconds; filled once packets are matched.
    stamp_position : str
        Where the pcap stamp was taken: "bracket", "tap", "nic" or "unknown" (alignment: not one place).
    stamp_evidence : dict
        Fractions behind `stamp_position`.
    method : {"readings", "cross_stamps", "brackets", "envelope"}
        Clock readings; cross-stamps of a NIC's clock; events on both sides of each stamp; or one side only, and then every
        converted stamp is early by the unknown smallest delay: times are excess over the fastest packet.
    flags : tuple of str
        What is wrong with a fitted map (:class:`rxlab.follow.envelope.Envelope`).
    perf_clock : str
        The clock perf recorded with; empty where perf.data does not say (no ``-k``).
    axis_offset : int or None
        CLOCK_REALTIME - CLOCK_MONOTONIC where the pcap's clock is another one.
    leap_s, nic_offset_ns : int or None
        How far a NIC's clock is ahead of CLOCK_REALTIME: whole seconds (37: TAI), and the rest.
    """

    segments: Columns
    uncertain: np.ndarray
    bound_ns: int
    residual: dict[float, float] = field(default_factory=dict)
    stamp_position: str = "unknown"
    stamp_evidence: dict[str, Any] = field(default_factory=dict)
    method: str = "readings"
    flags: tuple[str, ...] = ()
    perf_clock: str = "CLOCK_MONOTONIC"
    axis_offset: int | None = None
    leap_s: int | None = None
    nic_offset_ns: int | None = None

    @property
    def offset_ns(self) -> int:
        """The one constant of the run's CLOCK_REALTIME axis: the first segment's offset, unless the NIC's clock stamped."""
        return int(self.segments["offset"][0]) if self.axis_offset is None else self.axis_offset

    def to_monotonic(self, real_ns: np.ndarray) -> np.ndarray:
        """Convert CLOCK_REALTIME ns to CLOCK_MONOTONIC ns; NaT (smallest int64) stays NaT."""
        segment = np.searchsorted(self.segments["start_real"], real_ns, side="right") - 1
        segment = np.maximum(segment, 0)
        offset = self.segments["offset"][segment]
        if "slope" in self.segments:
            away = np.where(real_ns == NAT, 0, real_ns - self.segments["anchor"][segment])
            offset = offset + np.rint(away * self.segments["slope"][segment]).astype(np.int64)
        return np.where(real_ns == NAT, NAT, real_ns - offset)

    def to_realtime(self, monotonic_ns: np.ndarray) -> np.ndarray:
        """Convert CLOCK_MONOTONIC ns to the CLOCK_REALTIME of the first segment's offset; NaT stays NaT.

        One constant for the whole run, so that durations on the result are exact across a step.
        """
        return np.where(monotonic_ns == NAT, NAT, monotonic_ns + self.offset_ns)

    def inside_step(self, real_ns: np.ndarray) -> np.ndarray:
        """Tell for each CLOCK_REALTIME stamp whether it lies in an interval in which the clock was stepped."""
        flagged = np.zeros(len(real_ns), bool)
        for low, high in self.uncertain:
            flagged |= (real_ns >= low) & (real_ns <= high)
        return flagged


def fit_constant(readings: list[dict[str, int]], *, where: str = "clock.json") -> ClockMap:
    """Fit one offset per segment to CLOCK_MONOTONIC / CLOCK_REALTIME / CLOCK_MONOTONIC sandwiches.

    Parameters
    ----------
    readings : list of dict
        Keys ``mono_before``, ``real``, ``mono_after``: int nanoseconds, in the order taken.
    where : str
        Named in errors.

    Raises
    ------
    ClockError
        There is no usable reading, or a sandwich runs backwards.
    """
    try:
        before = np.array([reading["mono_before"] for reading in readings], np.int64)
        real = np.array([reading["real"] for reading in readings], np.int64)
        after = np.array([reading["mono_after"] for reading in readings], np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise ClockError("clock reading is malformed", where=where, found=str(error)) from None
    if not len(real):
        raise ClockError("no clock readings", where=where, expected="at least one before and one after the capture")
    width = after - before
    if width.min() < 0:
        raise ClockError("a clock sandwich runs backwards", where=where, found=f"{width.min()} ns wide")
    offset = real - (before + width // 2)
    # Wide sandwiches (the reader was preempted inside) say little: a step counts only beyond both half widths.
    slack = STEP_THRESHOLD_NS + width[1:] // 2 + width[:-1] // 2
    steps = np.flatnonzero(np.abs(np.diff(offset)) > slack)
    edges = np.concatenate(([0], steps + 1, [len(real)]))
    offsets = np.empty(len(edges) - 1, np.int64)
    bound = 0
    for index, (low, high) in enumerate(zip(edges[:-1], edges[1:], strict=True)):
        offsets[index], open_ns = _common_offset(real[low:high] - after[low:high], real[low:high] - before[low:high])
        bound = max(bound, open_ns)
    starts = np.concatenate(([NAT], real[steps + 1])).astype(np.int64)
    uncertain = np.stack([real[steps], real[steps + 1]], axis=1) if len(steps) else np.empty((0, 2), np.int64)
    return ClockMap(Columns({"start_real": starts, "offset": offsets}), np.sort(uncertain, axis=1), bound)


def _common_offset(low: np.ndarray, high: np.ndarray) -> tuple[int, int]:
    """Return the offset that every sandwich allows, and how far it may be off.

    Each sandwich says that the offset lies between `low` and `high`, and it is one constant: it lies where all of them overlap
    (Marzullo 1984). Where they do not, the clock was stepped by less than the threshold, and the bound covers both.
    """
    least, most = int(low.max()), int(high.min())
    beyond = int((high - low).min()) if most < least else 0
    return (least + most) // 2, abs(most - least) // 2 + 1 + beyond
