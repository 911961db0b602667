"""Clock readings: CLOCK_REALTIME and CLOCK_MONOTONIC_RAW between CLOCK_MONOTONIC readings, and the NIC's clock with them.

The offset of two clocks is known to within half the width of the sandwich, so the narrowest of several is kept. Everything is
int64 ns.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Any

from rxlab.errors import ClockError
from rxlab.host.phc import PtpClock

N_SANDWICHES = 16
INTERVAL_S = 0.1
# With a NIC's clock the sandwiches are denser: a slew of CLOCK_MONOTONIC bends the map between two of them.
SANDWICHES_PER_PHC = 5

_MONO, _REAL, _RAW = time.CLOCK_MONOTONIC, time.CLOCK_REALTIME, time.CLOCK_MONOTONIC_RAW


def read_clocks(when: str) -> dict[str, Any]:
    """Return one reading for clock.json: the narrowest of 16 sandwiches of each kind.

    Parameters
    ----------
    when : str
        "before", "during" or "after" the recording.

    Returns
    -------
    dict
        ``{"when", "mono_before", "real", "mono_after", "raw_before", "raw", "raw_after"}``, ns: CLOCK_REALTIME between two
        readings of CLOCK_MONOTONIC, then CLOCK_MONOTONIC_RAW between two of CLOCK_MONOTONIC.
    """
    # Locals: the sandwich is narrower.
    gettime, clock_mono, clock_real, clock_raw = time.clock_gettime_ns, _MONO, _REAL, _RAW
    best_real: tuple[int, int, int] | None = None
    best_raw: tuple[int, int, int] | None = None
    for _ in range(N_SANDWICHES):
        first = gettime(clock_mono)
        real = gettime(clock_real)
        second = gettime(clock_mono)
        raw = gettime(clock_raw)
        third = gettime(clock_mono)
        if best_real is None or second - first < best_real[2] - best_real[0]:
            best_real = first, real, second
        if best_raw is None or third - second < best_raw[2] - best_raw[0]:
            best_raw = second, raw, third
    assert best_real is not None
    assert best_raw is not None
    names = ("mono_before", "real", "mono_after", "raw_before", "raw", "raw_after")
    return {"when": when, **dict(zip(names, (*best_real, *best_raw), strict=True))}


class ClockSampler:
    """Reads the clocks before, ten times a second during, and after the ``with`` block, in a thread.

    Parameters
    ----------
    interval_s : float
        Seconds between readings.
    phc : PtpClock, optional
        A NIC's clock to be compared with the system's at every reading; the sandwiches are then five times as dense.

    Attributes
    ----------
    readings : list of dict
        As :func:`read_clocks` returns them, in time order.
    cross_stamps : list of dict
        As :meth:`rxlab.host.phc.PtpClock.read` returns them, in time order.
    failure : str or None
        Why the NIC's clock could not be read any longer.
    """

    def __init__(self, interval_s: float = INTERVAL_S, phc: PtpClock | None = None) -> None:
        self.readings: list[dict[str, Any]] = []
        self.cross_stamps: list[dict[str, Any]] = []
        self.failure: str | None = None
        self._phc = phc
        self._interval_s = interval_s if phc is None else interval_s / SANDWICHES_PER_PHC
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="clock-sampler", daemon=True)

    def _sample(self) -> None:
        turn = 0
        while not self._stop.wait(self._interval_s):
            turn += 1
            self.readings.append(read_clocks("during"))
            if turn % SANDWICHES_PER_PHC == 0:
                self._cross("during")

    def _cross(self, when: str) -> None:
        if self._phc is None or self.failure is not None:
            return
        try:
            self.cross_stamps.append(self._phc.read(when))
        except ClockError as error:
            self.failure = error.line()

    def __enter__(self) -> ClockSampler:
        self.readings.append(read_clocks("before"))
        self._cross("before")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        self._cross("after")
        self.readings.append(read_clocks("after"))

    def to_json(self) -> dict[str, Any]:
        """Return the contents of clock.json."""
        return {"readings": self.readings, **({"phc": self.cross_stamps} if self._phc is not None else {})}
