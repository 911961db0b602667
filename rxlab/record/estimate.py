"""How long a run will take and how large it will be, reckoned before it is recorded."""

from __future__ import annotations

from dataclasses import dataclass

from rxlab.record.workload import Command, Workload

# From the runs of data/ (two virtual CPUs); what is reckoned with them is printed as "about". A traced run also holds what the
# rest of the machine did meanwhile.
ROUND_TRIP_SECONDS = 120e-6
RUN_SECONDS = {"untraced": 1.3, "pcap": 2.2, "min": 3.5, "std": 3.5, "full": 4.0}
RUN_BYTES = {"untraced": 150_000, "pcap": 160_000, "min": 800_000, "std": 1_200_000, "full": 1_800_000}
BYTES_PER_SECOND = {"untraced": 0, "pcap": 0, "min": 500_000, "std": 1_000_000, "full": 1_500_000}
BYTES_PER_MESSAGE = {"untraced": 100, "pcap": 400, "min": 2_500, "std": 4_500, "full": 6_500}


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take."""

    seconds: float
    bytes: int


def estimate_run(load: Workload | Command | None, arm: str, duration: float | None = None) -> Estimate:
    """Reckon the duration and the size of one run.

    Of a command and of live traffic only the time is known, and of that no more than the `duration` they are recorded for: they
    count as so many seconds, or one, of nothing but what the machine does anyway.
    """
    start = RUN_SECONDS[arm]
    if not isinstance(load, Workload):
        seconds = duration or 1.0
        return Estimate(start + seconds, RUN_BYTES[arm] + int(seconds * BYTES_PER_SECOND[arm]))
    per_second = load.rate if load.mode == "open" else load.flows / ROUND_TRIP_SECONDS
    limits = [load.messages * load.flows / per_second] if load.messages else []
    seconds = min([*limits, *([load.duration] if load.duration else [])])
    per_run = RUN_BYTES[arm] + seconds * (BYTES_PER_SECOND[arm] + per_second * BYTES_PER_MESSAGE[arm])
    return Estimate(start + seconds, int(per_run))
