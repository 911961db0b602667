"""A grid of configurations x repetitions x arms, in random order, as run directories; can be taken up again.

One cell after the other: apply its settings (journal), record, restore. Each repetition is a block with every configuration and
arm once, shuffled inside, so that slow drifts of the machine fall on all alike and a sweep cut short is still balanced.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from rxlab.errors import HostSettingError, UsageError
from rxlab.host.access import HostAccess
from rxlab.host.journal import Transaction, apply
from rxlab.host.kinds import check_keys
from rxlab.host.settings import Setting, parse_settings
from rxlab.host.topology import resolve_intents
from rxlab.host.undo import interrupt_later
from rxlab.record.capture import capture, note_restored
from rxlab.record.recording import ARM_OF
from rxlab.record.runfolder import unused_removed
from rxlab.record.testbed import Testbed
from rxlab.record.workload import Command, Workload
from rxlab.rundir import RUN_JSON, SWEEP_JSON, RunDir, open_rundir, read_json, write_json

# Words of the experiment for fields of the workload.
ALIASES = {"app_cpu": "server_cpu", "load": "rate"}
WORKLOAD_KEYS = {entry.name for entry in fields(Workload)} | ALIASES.keys()
RECORDING_KEYS = {"idle"}
ORDERS = ("shuffled", "blocked")
WARM_UP = ".warm-up"


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
    labels : Mapping
        Where the configuration lies on the named axes of the sweep (``{"rps": "on"}``); empty where it has none.
    """

    index: int
    configuration: Mapping[str, Any]
    repetition: int
    arm: str
    labels: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of the run directory."""
        return f"c{self.index:02d}-r{self.repetition:02d}-{self.arm}"


def plan_sweep(
    configurations: Sequence[Mapping[str, Any]],
    *,
    reps: int,
    arms: Sequence[str],
    seed: int = 1,
    order: str = "shuffled",
    labels: Sequence[Mapping[str, Any]] | None = None,
) -> list[Cell]:
    """Return all cells of a sweep in the order they are recorded; the same for the same arguments.

    `order` "blocked" records all repetitions of a configuration before the next one: for settings that are dear to change.
    """
    if order not in ORDERS:
        raise UsageError(f"unknown order {order!r}", expected=", ".join(ORDERS))
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
            Cell(index, dict(configuration), repetition, ARM_OF[arm], dict(labels[index]) if labels else {})
            for index, configuration in enumerate(configurations)
            for arm in arms
        ]
        shuffle(block)
        cells += block
    return sorted(cells, key=lambda cell: cell.index) if order == "blocked" else cells


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
        kind = next((kind for kind in (int, float, str) if kinds[key].startswith(kind.__name__)), None)
        is_other = isinstance(value, bool | float | list) if kind is int else isinstance(value, bool | list)
        try:
            if value is not None and kind is not None and (is_other or (kind is str and not isinstance(value, str))):
                raise ValueError(value)
            typed[key] = kind(value) if kind in (int, float) and value is not None else value
        except (ValueError, TypeError):
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
    order: str = "shuffled",
    labels: Sequence[Mapping[str, Any]] | None = None,
    warm_up: int = 0,
    retries: int = 0,
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
    seed, order, labels
        See :func:`plan_sweep`.
    warm_up : int
        Runs made, and thrown away, before the first one that counts.
    retries : int
        How often a run that lost packets or events, or ended early, is recorded again; the last one is kept as it is.
    transaction : Transaction, optional
        The testbed's journal; one of its own when not given, to which the two permissions belong.
    progress : callable, optional
        Called before each run with its number from 0, how many there are, and its cell.

    Yields
    ------
    RunDir
        In the order of :func:`plan_sweep`.
    """
    cells = plan_sweep(configurations, reps=reps, arms=arms, seed=seed, order=order, labels=labels)
    folder = Path(out)
    described = workload.describe() if workload is not None else None
    content = {"configurations": configurations, "arms": arms, "seed": seed, "order": order, "workload": described}
    own = apply(allow_system_changes=allow_system_changes, yes_this_nic=yes_this_nic)
    iface = testbed.dst.iface if testbed is not None else iface
    netns = testbed.dst.netns if testbed is not None else netns
    with own if transaction is None else nullcontext(transaction) as journal:
        engine = Engine(
            folder,
            testbed,
            iface,
            netns,
            workload,
            journal,
            retries,
            capture_options,
            partial(remember_repeated, folder),
        )
        with unused_removed(folder), planned(folder, content | {"labels": labels or []}, reps):
            yield from record_cells(engine, cells, warm_up=warm_up, progress=progress)


def record_cells(
    engine: Engine,
    cells: Sequence[Cell],
    *,
    warm_up: int = 0,
    progress: Callable[[int, int, Cell], None] | None = None,
) -> Iterator[RunDir]:
    """Record cells one after the other, yielding each run; those that are complete are yielded as they are.

    Parameters are those of :func:`sweep`.
    """
    for configuration in {cell.index: cell.configuration for cell in cells}.values():
        engine.settings_of(configuration)
    is_warm = not warm_up
    for number, cell in enumerate(cells):
        if progress is not None:
            progress(number, len(cells), cell)
        finished = complete_run(engine.folder / cell.name)
        if finished is None:
            if not is_warm:
                engine.warm_up(replace(cell, arm="untraced"), warm_up)
                is_warm = True
            finished = engine.record(cell)
        yield finished


@dataclass(frozen=True)
class Engine:
    """What all cells of one sweep are recorded with.

    Attributes
    ----------
    on_repeated : callable
        Told of each degraded run that is thrown away: its cell and its problems.
    holds_host : bool
        Whether settings of the whole host are this sweep's to write. Where several workers share a host, somebody else holds
        them for all, and each run only checks that they are in force before and after it.
    """

    folder: Path
    testbed: Testbed | None
    iface: str | None
    netns: str | None
    workload: Workload | Command | None
    journal: Transaction
    retries: int
    capture_options: Mapping[str, Any]
    on_repeated: Callable[[Cell, Sequence[str]], None]
    holds_host: bool = True

    def settings_of(self, configuration: Mapping[str, Any]) -> list[Setting]:
        """Return the host settings of a configuration, found on this host; raises for what cannot be set."""
        settings, changes, _ = split_configuration(configuration)
        near = reader_cpu(with_fields(self.workload, changes))
        with interrupt_later(), HostAccess(self.netns) as access:
            wanted = resolve_intents(settings, near, access)
            return parse_settings(wanted, self.iface, self.netns, access=access)

    def record(self, cell: Cell) -> RunDir:
        """Record one cell, again while it is degraded and tries are left; sweep.json remembers each run thrown away."""
        path = self.folder / cell.name
        for attempt in range(self.retries + 1):
            recorded = self.record_once(path, cell)
            if recorded.run["status"] == "complete" or attempt == self.retries:
                break
            self.on_repeated(cell, recorded.run.get("problems") or [])
            shutil.rmtree(path)
        return recorded

    def record_once(self, path: Path, cell: Cell) -> RunDir:
        """Apply one cell's settings, record it, and restore."""
        _, changes, recording = split_configuration(cell.configuration)
        labels = {"labels": dict(cell.labels)} if cell.labels else {}
        settings = self.settings_of(cell.configuration)
        held = [] if self.holds_host else [setting for setting in settings if setting.netns is None]
        check_held(held)
        with self.journal.change([setting for setting in settings if setting not in held]):
            recorded = capture(
                path,
                iface=self.iface,
                netns=self.netns,
                testbed=self.testbed,
                workload=with_fields(self.workload, changes),
                events=cell.arm,
                configuration=cell.configuration,
                sweep={"cell": cell.name, "repetition": cell.repetition, **labels},
                transaction=self.journal,
                **{**self.capture_options, **recording},
            )
        try:
            check_held(held)
        except HostSettingError:
            shutil.rmtree(path)  # it is not what its configuration says
            raise
        return note_restored(recorded, self.journal)

    def warm_up(self, cell: Cell, times: int) -> None:
        """Record a cell and throw it away: caches, clocks and frequencies are then as they stay."""
        path = self.folder / WARM_UP
        for _ in range(times):
            shutil.rmtree(path, ignore_errors=True)
            try:
                self.record_once(path, cell)
            finally:
                shutil.rmtree(path, ignore_errors=True)


def check_held(settings: Sequence[Setting]) -> None:
    """Raise when a setting of the whole host that somebody else holds for this sweep is not in force."""
    with interrupt_later(), HostAccess(None) as access:
        for setting in settings:
            now = setting.canonical(setting.read(access))
            if now != setting.wanted:
                raise HostSettingError(
                    "a setting that is held for the whole sweep is not in force",
                    where=setting.label,
                    found=now,
                    expected=setting.wanted,
                    do="Is the process that started the sweep alive? Then go on with --resume.",
                )


def reader_cpu(workload: Workload | Command | None) -> int | None:
    """Return the CPU the receiving application is pinned to, None where it is not or nobody knows."""
    return workload.pinned().server_cpu if isinstance(workload, Workload) and workload.migrate is None else None


def complete_run(path: Path) -> RunDir | None:
    """Return the run of a cell when it is complete; remove what an earlier, broken attempt left."""
    if not (path / RUN_JSON).exists():
        return None
    run = open_rundir(path)
    if run.run["status"] == "complete":
        return run
    shutil.rmtree(path)
    return None


def remember_plan(folder: Path, content: Mapping[str, Any], reps: int) -> None:
    """Write sweep.json, or check that the one that is there is of the same sweep. More repetitions may be asked for later."""
    path = folder / SWEEP_JSON
    plain = json.loads(json.dumps(content))
    earlier = read_json(path) if path.exists() else {}
    for key, value in plain.items() if earlier else ():
        if earlier.get(key) != value:
            raise UsageError(
                "another sweep is there",
                where=str(path),
                found=f"{key} {earlier.get(key)}",
                expected=str(value),
                do="Choose another -o.",
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, {**plain, "repetitions": reps, "repeated": earlier.get("repeated", [])})


@contextmanager
def planned(folder: Path, content: dict[str, Any], reps: int) -> Iterator[None]:
    """Keep the plan in sweep.json while its cells are recorded, and afterwards unless an error came before the first run."""
    is_first = not (folder / SWEEP_JSON).exists()
    remember_plan(folder, content, reps)
    try:
        yield
    except BaseException:
        if is_first and not any(folder.glob(f"*/{RUN_JSON}")):
            (folder / SWEEP_JSON).unlink(missing_ok=True)
        raise


def remember_repeated(folder: Path, cell: Cell, problems: Sequence[str]) -> None:
    """Note in sweep.json that a degraded run was thrown away, and why."""
    plan = read_json(folder / SWEEP_JSON)
    plan["repeated"].append({"cell": cell.name, "problems": list(problems)})
    write_json(folder / SWEEP_JSON, plan)
