"""A grid of configurations x repetitions x arms, in random order, as run directories; can be taken up again.

One cell after the other: apply its settings (journal), record, restore. Each repetition is a block with every configuration and
arm once, shuffled inside, so that slow drifts of the machine fall on all alike and a sweep cut short is still balanced.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from rxlab.errors import UsageError
from rxlab.host.access import HostAccess
from rxlab.host.journal import Transaction, apply
from rxlab.host.settings import check_keys, parse_settings
from rxlab.host.undo import interrupt_later
from rxlab.record.capture import capture, note_restored
from rxlab.record.recording import ARM_OF
from rxlab.record.testbed import Testbed
from rxlab.record.workload import Command, Workload
from rxlab.rundir import RUN_JSON, RunDir, open_rundir, read_json, write_json

SWEEP_JSON = "sweep.json"
# Words of the experiment for fields of the workload.
ALIASES = {"app_cpu": "server_cpu", "load": "rate"}
WORKLOAD_KEYS = {entry.name for entry in fields(Workload)} | ALIASES.keys()
RECORDING_KEYS = {"idle"}


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes
    ----------
    index : int
        Position of `configuration` in the list the sweep was given.
    configuration : Mapping
        Host settings, fields of the workload (``flows``, ``app_cpu``, ``load``, …) and ``idle``, by name.
    repetition : int
        Counted from 0.
    arm : str
        "untraced", "pcap", "min", "std" or "full".
    """

    index: int
    configuration: Mapping[str, Any]
    repetition: int
    arm: str

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return f"c{self.index:02d}-r{self.repetition:02d}-{self.arm}"


def plan_sweep(
    configurations: Sequence[Mapping[str, Any]], *, reps: int, arms: Sequence[str], seed: int = 1
) -> list[Cell]:
    """Return all cells of a sweep in the order they are recorded; the same for the same arguments."""
    if not configurations or reps < 1 or not arms:
        raise UsageError("an empty sweep", expected="a configuration, a repetition and an arm at least")
    for arm in arms:
        if arm not in ARM_OF:
            raise UsageError(f"unknown arm {arm!r}", expected=", ".join(ARM_OF))
    for configuration in configurations:
        check_keys(split_configuration(configuration)[0])
    shuffle = random.Random(seed).shuffle
    cells: list[Cell] = []
    for repetition in range(reps):
        block = [
            Cell(index, dict(configuration), repetition, ARM_OF[arm])
            for index, configuration in enumerate(configurations)
            for arm in arms
        ]
        shuffle(block)
        cells += block
    return cells


def split_configuration(
    configuration: Mapping[str, Any],
) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Sort a configuration into host settings, fields of the workload, and options of the capture."""
    settings: dict[str, Any] = {}
    workload: dict[str, Any] = {}
    recording: dict[str, Any] = {}
    for key, value in configuration.items():
        if key in WORKLOAD_KEYS:
            workload[ALIASES.get(key, key)] = value
        else:
            (recording if key in RECORDING_KEYS else settings)[key] = value
    return settings, workload, recording


def with_fields(workload: Workload | Command | None, changes: Mapping[str, Any]) -> Workload | Command | None:
    """Return the workload with some fields changed; text, as a command line gives it, becomes the field's type."""
    if not changes:
        return workload
    if not isinstance(workload, Workload):
        raise UsageError(
            f"{', '.join(changes)} can only be varied with the built-in workload", do="Leave out the command."
        )
    kinds = {entry.name: str(entry.type) for entry in fields(Workload)}
    typed: dict[str, Any] = {}
    for key, value in changes.items():
        kind = next((kind for kind in (int, float) if kinds[key].startswith(kind.__name__)), None)
        try:
            typed[key] = kind(value) if kind is not None and value is not None else value
        except ValueError:
            raise UsageError(f"workload: {key} cannot be {value!r}") from None
    return replace(workload, **typed)


def sweep(
    out: str | os.PathLike[str],
    configurations: Sequence[Mapping[str, Any]],
    *,
    testbed: Testbed | None = None,
    iface: str | None = None,
    netns: str | None = None,
    workload: Workload | Command | None = None,
    reps: int = 3,
    arms: Sequence[str] = ("untraced", "std"),
    seed: int = 1,
    transaction: Transaction | None = None,
    allow_system_changes: bool = False,
    yes_this_nic: bool = False,
    progress: Callable[[int, int, Cell], None] | None = None,
    **capture_options: Any,
) -> Iterator[RunDir]:
    """Record a sweep, yielding each run when it is there.

    Called again with the same arguments it goes on where it was stopped: runs that are complete are yielded as they are, any
    other is recorded anew.

    Parameters
    ----------
    out : path
        Folder for ``sweep.json`` and one run directory per cell.
    configurations : sequence of mapping
        See :class:`Cell`.
    testbed, iface, netns, workload, capture_options
        As :func:`rxlab.record.capture.capture` takes them.
    reps : int
        Repetitions of each configuration and arm.
    transaction : Transaction, optional
        The testbed's journal; one of its own when not given, to which the two permissions belong.
    progress : callable, optional
        Called before each run with its number from 0, how many there are, and its cell.

    Yields
    ------
    RunDir
        In the order of :func:`plan_sweep`.
    """
    cells = plan_sweep(configurations, reps=reps, arms=arms, seed=seed)
    folder = Path(out)
    remember_plan(folder, configurations, reps=reps, arms=arms, seed=seed)
    own = apply(allow_system_changes=allow_system_changes, yes_this_nic=yes_this_nic)
    iface = testbed.dst.iface if testbed is not None else iface
    netns = testbed.dst.netns if testbed is not None else netns
    with own if transaction is None else nullcontext(transaction) as journal:
        for number, cell in enumerate(cells):
            if progress is not None:
                progress(number, len(cells), cell)
            path = folder / cell.name
            finished = complete_run(path)
            if finished is None:
                finished = record_cell(path, cell, testbed, iface, netns, workload, journal, capture_options)
            yield finished


def record_cell(
    path: Path,
    cell: Cell,
    testbed: Testbed | None,
    iface: str | None,
    netns: str | None,
    workload: Workload | Command | None,
    journal: Transaction,
    capture_options: Mapping[str, Any],
) -> RunDir:
    """Apply one cell's settings, record it, and restore."""
    settings, changes, recording = split_configuration(cell.configuration)
    with ExitStack() as stack:
        with interrupt_later():
            with HostAccess(netns) as access:
                parsed = parse_settings(settings, iface, netns, access=access)
            stack.enter_context(journal.change(parsed))
        recorded = capture(
            path,
            iface=iface,
            netns=netns,
            testbed=testbed,
            workload=with_fields(workload, changes),
            events=cell.arm,
            configuration=cell.configuration,
            sweep={"cell": cell.name, "repetition": cell.repetition},
            transaction=journal,
            **{**capture_options, **recording},
        )
    return note_restored(recorded, journal)


def complete_run(path: Path) -> RunDir | None:
    """Return the run of a cell when it is complete; remove what an earlier, broken attempt left."""
    if not (path / RUN_JSON).exists():
        return None
    run = open_rundir(path)
    if run.run["status"] == "complete":
        return run
    shutil.rmtree(path)
    return None


def remember_plan(
    folder: Path, configurations: Sequence[Mapping[str, Any]], *, reps: int, arms: Sequence[str], seed: int
) -> None:
    """Write sweep.json, or check that the one that is there is of the same sweep. More repetitions may be asked for later."""
    content = {"configurations": [dict(entry) for entry in configurations], "arms": list(arms), "seed": seed}
    path = folder / SWEEP_JSON
    if path.exists():
        earlier = read_json(path)
        for key, value in content.items():
            if earlier.get(key) != value:
                raise UsageError(
                    "another sweep is there",
                    where=str(path),
                    found=f"{key} {earlier.get(key)}",
                    expected=str(value),
                    do="Choose another -o.",
                )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {**content, "repetitions": reps})
