"""What a sweep will do and take: its runs, duration, size and what takes a link down, said before anything runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rxlab.host.kinds import HOST_WIDE, KINDS, normal_key
from rxlab.record.estimate import Estimate, estimate_run
from rxlab.record.ports import captured_port
from rxlab.record.runfolder import check_space
from rxlab.record.spec import Spec
from rxlab.record.sweep import Cell, complete_run, split_configuration, with_fields
from rxlab.record.workload import Command, Workload


def estimate(workload: Workload | Command | None, cell: Cell) -> Estimate:
    """Reckon the duration and the size of one run of a plan (:func:`rxlab.record.estimate.estimate_run`)."""
    return estimate_run(with_fields(workload, split_configuration(cell.configuration)[1]), cell.arm)


def check_disk(folder: Path, workload: Workload | Command | None, cells: Iterable[Cell]) -> None:
    """Refuse a plan whose runs, those that are not there yet, would not fit on the disk."""
    missing = [cell for cell in cells if not (folder / cell.name).is_dir()]
    check_space(folder, sum(estimate(workload, cell).bytes for cell in missing))


def plan_lines(spec: Spec, testbed: bool | str) -> Iterator[str]:
    """Yield the plan as text: what varies, every run in its order, what it does to the host, duration and size."""
    cells = spec.cells()
    reckoned = [estimate(spec.workload, cell) for cell in cells]
    yield f"{spec.name}: {spec.title}"
    for axis, labels in spec.axes.items():
        yield f"  {axis}: {', '.join(map(str, labels))}"
    for cell in cells:
        yield f"{cell.name}: {cell_text(cell)}"
    yield from host_lines(spec.configurations, testbed)
    seconds = sum(one.seconds for one in reckoned) + spec.warm_up * min(one.seconds for one in reckoned)
    yield (
        f"{len(cells)} runs, {len(spec.configurations)} configurations x {spec.repetitions} repetitions x "
        f"{len(spec.arms)} arms ({', '.join(spec.arms)}), {spec.order}: about {duration_text(seconds)}, "
        f"about {sum(one.bytes for one in reckoned) / 1e6:.0f} MB"
    )


def host_lines(configurations: Iterable[Mapping[str, Any]], testbed: bool | str) -> Iterator[str]:
    """Yield a line with the settings of the host itself that are changed, and one with those that take the link down.

    Settings of the veth testbed go away with it; those of an interface or a cabled port are the host's.
    """
    keys = {
        key: normal_key(key).partition(":")[0] for wanted in configurations for key in split_configuration(wanted)[0]
    }
    is_veth = bool(testbed) and captured_port(testbed) is None
    if hosts := sorted(key for key, kind in keys.items() if not is_veth or KINDS[kind].scope in HOST_WIDE):
        yield f"changes settings of the host, put back at the end, so it needs --allow-system-changes: {', '.join(hosts)}"
    if dropping := sorted(key for key, kind in keys.items() if KINDS[kind].drops_link):
        yield f"the link may go down for a moment, at each change and to restore: {', '.join(dropping)}"


def cell_text(cell: Cell) -> str:
    """Return what one run is, for people."""
    place = ", ".join(f"{axis}={label}" for axis, label in cell.labels.items()) or "host as it is"
    return f"{cell.arm}, {place}, repetition {cell.repetition + 1}"


def duration_text(seconds: float) -> str:
    """Return a duration as ``1 h 02 min``, ``3 min 20 s`` or ``12 s``."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


class Progress:
    """Says before each run what it is and how much time is left, reckoned from the runs so far."""

    def __init__(self, spec: Spec, folder: Path, say: Callable[[str], None]) -> None:
        self._say, self._folder = say, folder
        self._reckoned = {cell.name: estimate(spec.workload, cell).seconds for cell in spec.cells()}
        self._last: tuple[float, str] | None = None
        self._took = self._expected = 0.0

    def __call__(self, number: int, total: int, cell: Cell) -> None:
        """Say it; the progress callback of :func:`rxlab.record.sweep.sweep`."""
        now = time.monotonic()
        if self._last is not None:
            self._took += now - self._last[0]
            self._expected += self._reckoned[self._last[1]]
        is_there = complete_run(self._folder / cell.name) is not None
        self._last = None if is_there else (now, cell.name)
        names = list(self._reckoned)
        pace = self._took / self._expected if self._expected else 1.0
        left = duration_text(pace * sum(self._reckoned[name] for name in names[number:]))
        self._say(f"[{number + 1}/{total}] {cell_text(cell)}" + (": there already" if is_there else f" ({left} left)"))
