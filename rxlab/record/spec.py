"""A sweep as a TOML file: what varies, the workload, the arms; checked whole before anything runs.

::

    title = "RPS off and on"
    repetitions = 3
    arms = ["std"]                    # "untraced" is always there: it gives the verdict

    [settings]                        # host settings; a list varies, anything else is fixed
    rps_cpus = ["off", "same-core"]

    [axes.rfs]                        # an axis of your own: each label stands for several settings
    off = { rps_sock_flow_entries = 0, rps_flow_cnt = 0 }
    on = { rps_sock_flow_entries = 32768, rps_flow_cnt = 32768 }

    [workload]                        # fields of the built-in workload, or command = [...] (pyperf = true: a pyperf script)
    mode = "open"
    load = [2000, 8000, 32000]
"""

from __future__ import annotations

import difflib
import itertools
import os
import shlex
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rxlab.errors import FormatError, HostSettingError, UsageError
from rxlab.host.access import HostAccess
from rxlab.host.cpulist import online_cpus
from rxlab.host.journal import apply
from rxlab.host.kinds import HOST_WIDE, KINDS, canonical_value
from rxlab.host.settings import parse_settings
from rxlab.host.topology import resolve_intents
from rxlab.record.ports import captured_port, open_testbed
from rxlab.record.recording import ARM_OF, IDLE_CHOICES
from rxlab.record.sweep import (
    ORDERS,
    RECORDING_KEYS,
    WORKLOAD_KEYS,
    Cell,
    complete_run,
    plan_sweep,
    reader_cpu,
    split_configuration,
    sweep,
    with_fields,
)
from rxlab.record.workload import Command, Workload
from rxlab.rundir import SWEEP_JSON, RunDir

SPECS = Path(__file__).with_name("specs")
COMMAND_KEYS = ("command", "server", "server_port", "pyperf")
PLACES = ("any", "testbed", "iface")

# What a plan is reckoned with, from the runs of data/ (two virtual CPUs); it is printed as "about". A traced run also holds
# what the rest of the machine did meanwhile.
ROUND_TRIP_SECONDS = 120e-6
RUN_SECONDS = {"untraced": 1.3, "pcap": 2.2, "min": 3.5, "std": 3.5, "full": 4.0}
RUN_BYTES = {"untraced": 150_000, "pcap": 160_000, "min": 800_000, "std": 1_200_000, "full": 1_800_000}
BYTES_PER_SECOND = {"untraced": 0, "pcap": 0, "min": 500_000, "std": 1_000_000, "full": 1_500_000}
BYTES_PER_MESSAGE = {"untraced": 100, "pcap": 400, "min": 2_500, "std": 4_500, "full": 6_500}


@dataclass(frozen=True)
class Spec:
    """A sweep as its file says it.

    Attributes
    ----------
    name, title : str
    axes : mapping
        Name of each axis to ``{label: settings and workload fields}``, in the file's order.
    fixed : mapping
        Settings that do not vary.
    workload : Workload or Command
        As it is where no axis says otherwise.
    repetitions, arms, order, seed, warm_up, retries, idle
        As :func:`rxlab.record.sweep.sweep` takes them.
    place : {"any", "testbed", "iface"}
        Where the sweep makes sense: a veth has no interrupt to move.
    """

    name: str
    title: str
    axes: Mapping[str, Mapping[Any, Mapping[str, Any]]]
    fixed: Mapping[str, Any]
    workload: Workload | Command
    repetitions: int = 3
    arms: Sequence[str] = ("untraced", "std")
    order: str = "shuffled"
    seed: int = 1
    warm_up: int = 1
    retries: int = 2
    idle: str = "auto"
    place: str = "any"

    @property
    def labels(self) -> list[dict[str, Any]]:
        """Where each configuration lies on the axes, the last axis running fastest."""
        return [
            dict(zip(self.axes, labels, strict=True)) for labels in itertools.product(*map(list, self.axes.values()))
        ]

    @property
    def configurations(self) -> list[dict[str, Any]]:
        """All combinations, in the order of `labels`."""
        found = []
        for labels in self.labels:
            configuration = dict(self.fixed)
            for axis, label in labels.items():
                configuration |= self.axes[axis][label]
            found.append(configuration)
        return found

    def cells(self) -> list[Cell]:
        """Return the runs in the order they are recorded."""
        return plan_sweep(
            self.configurations,
            reps=self.repetitions,
            arms=self.arms,
            seed=self.seed,
            order=self.order,
            labels=self.labels,
        )


def load_spec(source: str | os.PathLike[str]) -> Spec:
    """Read a spec by path, or a shipped one by name; everything that can be wrong without looking at a host is found here.

    Raises
    ------
    FormatError, UsageError, HostSettingError
        One line that names the file and the key.
    """
    path = Path(source)
    if not path.exists() and (SPECS / f"{path.name}.toml").is_file() and path.parent == Path():
        path = SPECS / f"{path.name}.toml"
    try:
        content = tomllib.loads(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        shipped = ", ".join(sorted(entry.stem for entry in SPECS.glob("*.toml")))
        raise FormatError(
            "no such sweep spec", where=str(source), expected=f"a TOML file or one of {shipped}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise FormatError("not valid TOML", where=str(path), found=str(error)) from None
    return parse_spec(content, path)


def parse_spec(content: Mapping[str, Any], path: Path) -> Spec:
    """Return the spec that a parsed TOML document means; `path` is named in errors."""
    known = ("title", "repetitions", "arms", "order", "seed", "warm_up", "retries", "idle", "place")
    _check_names(content, (*known, "settings", "axes", "workload"), str(path))
    options = {key: content[key] for key in known if key in content and key != "arms"}
    _check_options(options, path)
    tables = {name: _table(content, name, path) for name in ("settings", "axes", "workload")}
    axes, fixed = _axes(tables, path)
    spec = Spec(
        **{"title": path.stem, **options},
        name=path.stem,
        axes=axes,
        fixed=fixed,
        workload=_workload(tables["workload"], path),
        arms=_arms(content.get("arms", ["std"]), path),
    )
    spec.cells()
    for configuration in spec.configurations:
        _, changes, recording = split_configuration(configuration)
        with_fields(spec.workload, changes)
        _check_options(recording, path)
    return spec


def _table(content: Mapping[str, Any], name: str, path: Path) -> dict[str, Any]:
    table = content.get(name, {})
    if not isinstance(table, dict):
        raise UsageError("not a table", where=f"{path}: {name}", found=repr(table), expected=f"[{name}]")
    return table


def _check_names(found: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in found:
        if key not in known:
            close = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
            raise UsageError(f"unknown key {key!r}", where=where, expected="one of " + ", ".join(close or known))


def _check_options(options: Mapping[str, Any], path: Path) -> None:
    for key, least in {"repetitions": 1, "seed": 0, "warm_up": 0, "retries": 0}.items():
        value = options.get(key, least)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise UsageError(
                "not a count", where=f"{path}: {key}", found=repr(value), expected=f"an integer from {least}"
            )
    for key, choices in {"order": ORDERS, "idle": IDLE_CHOICES, "place": PLACES}.items():
        if options.get(key, choices[0]) not in choices:
            raise UsageError(
                f"unknown {key}", where=f"{path}: {key}", found=repr(options[key]), expected=", ".join(choices)
            )


def _arms(arms: Any, path: Path) -> tuple[str, ...]:
    if not isinstance(arms, list) or not all(arm in ARM_OF for arm in arms):
        raise UsageError(
            "unknown arms", where=f"{path}: arms", found=repr(arms), expected=f"a list of {', '.join(ARM_OF)}"
        )
    return tuple(dict.fromkeys(["untraced", *(ARM_OF[arm] for arm in arms)]))


def _workload(table: Mapping[str, Any], path: Path) -> Workload | Command:
    """Return the workload without what varies: lists are axes, except the words of a command."""
    _check_names(table, sorted({*WORKLOAD_KEYS, *COMMAND_KEYS}), f"{path}: workload")
    if "command" in table:
        argv = table["command"]
        _check_names(table, COMMAND_KEYS, f"{path}: workload with a command")
        if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
            raise UsageError("not a command", where=f"{path}: workload.command", found=repr(argv), expected="words")
        is_pyperf = table.get("pyperf", False)
        if not isinstance(is_pyperf, bool):
            raise UsageError(
                "not a switch", where=f"{path}: workload.pyperf", found=repr(is_pyperf), expected="true or false"
            )
        return Command(argv, shlex.split(table.get("server", "")), table.get("server_port"), pyperf=is_pyperf)
    fixed = {key: value for key, value in table.items() if not isinstance(value, list)}
    built = with_fields(Workload(), split_configuration(fixed)[1])
    assert isinstance(built, Workload)
    return built


def _axes(
    tables: Mapping[str, Mapping[str, Any]], path: Path
) -> tuple[dict[str, dict[Any, dict[str, Any]]], dict[str, Any]]:
    """Return what varies, by axis, and the host settings that do not."""
    axes: dict[str, dict[Any, dict[str, Any]]] = {}
    fixed: dict[str, Any] = {}
    for name, labels in tables["axes"].items():
        if not isinstance(labels, dict) or not labels or not all(isinstance(entry, dict) for entry in labels.values()):
            raise UsageError(
                "not an axis", where=f"{path}: axes.{name}", expected="LABEL = { SETTING = VALUE, ... } lines"
            )
        axes[name] = {label: {key: _plain(value) for key, value in entry.items()} for label, entry in labels.items()}
    for table in ("settings", "workload"):
        for key, value in tables[table].items():
            if key in COMMAND_KEYS:
                continue
            if table == "settings" and key in WORKLOAD_KEYS - KINDS.keys() - RECORDING_KEYS:
                raise UsageError(
                    "a field of the workload", where=f"{path}: settings.{key}", do="Put it under [workload]."
                )
            if isinstance(value, list):
                axes[key] = _one_setting(key, value, f"{path}: {table}.{key}")
            elif table == "settings":
                fixed[key] = _plain(value)
    _check_overlap(axes, fixed, path)
    return axes, fixed


def _one_setting(key: str, values: Sequence[Any], where: str) -> dict[Any, dict[str, Any]]:
    labels = [_plain(value) for value in values]
    if not labels or len(set(labels)) < len(labels):
        raise UsageError("values to vary must be there and differ", where=where, found=repr(list(values)))
    return {label: {key: label} for label in labels}


def _check_overlap(axes: Mapping[str, Mapping[Any, Mapping[str, Any]]], fixed: Mapping[str, Any], path: Path) -> None:
    """Refuse a setting that two places of the file want to set, and an axis named like a dimension of every sweep."""
    owner: dict[str, str] = dict.fromkeys(fixed, "settings")
    reserved = ("repetition", "arm", "hop", "quantile", "bucket", "stage", "cpu", "queue", "cpu_mode", "softnet_field")
    for axis, labels in axes.items():
        if axis in reserved:
            raise UsageError("the dataset has a dimension of this name", where=f"{path}: {axis}", do="Rename the axis.")
        for key in {key for entry in labels.values() for key in entry}:
            if key in owner:
                raise UsageError("set in two places", where=f"{path}: {key}", found=f"{owner[key]} and {axis}")
            owner[key] = axis


def _plain(value: Any) -> Any:
    """Return a TOML value as a setting's word: on and off instead of true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def check_host(spec: Spec, *, testbed: bool | str, iface: str | None, access: HostAccess | None = None) -> bool:
    """Check a spec against this machine without changing it, and tell whether it would change the host itself.

    CPUs must be online, intents must have a CPU that they mean, and an interface must have what is to be set. The testbed's
    own interface is checked when it is made, before the first run.
    """
    port = captured_port(testbed)
    is_veth = bool(testbed) and port is None
    if spec.place != "any" and is_veth != (spec.place == "testbed"):
        raise UsageError(
            "this sweep makes no sense here",
            where=spec.name,
            expected="--iface IF or --testbed ports:IF1,IF2" if is_veth else "--testbed",
        )
    if isinstance(spec.workload, Workload) and iface not in (None, "lo") and not spec.workload.remote:
        raise UsageError(
            "no traffic would cross the interface: a local client talks to itself over lo",
            where=f"--iface {iface}",
            expected='--remote ssh:HOST, or [workload] command = ["..."]',
        )
    if access is None:
        with HostAccess(None) as opened:
            return check_host(spec, testbed=testbed, iface=iface, access=opened)
    cpus, is_host_wide = online_cpus(access), False
    for configuration in spec.configurations:
        settings, changes, _ = split_configuration(configuration)
        load = with_fields(spec.workload, changes)
        near = reader_cpu(load)
        for name in ("server_cpu", "client_cpu") if isinstance(load, Workload) else ():
            cpu = getattr(load, name)
            if cpu not in (None, -1) and cpu not in cpus and not (name == "client_cpu" and load.remote):  # type: ignore[union-attr]
                raise HostSettingError(
                    "no such CPU online", where=name, found=str(cpu), expected=", ".join(map(str, cpus))
                )
        wanted = resolve_intents(settings, near, access)
        for key, value in wanted.items():
            kind = key.partition(":")[0].strip()
            kind = kind if kind in KINDS else kind.replace("_", "-")
            canonical_value(kind, str(value), cpus)
            is_host_wide |= KINDS[kind].scope in HOST_WIDE or not is_veth
        if not is_veth:
            parse_settings(wanted, port or iface, access=access)
    return is_host_wide


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take."""

    seconds: float
    bytes: int


def estimate(spec: Spec, cell: Cell) -> Estimate:
    """Reckon the duration and the size of one run; a command's are not known and count as one second of nothing."""
    load = with_fields(spec.workload, split_configuration(cell.configuration)[1])
    start = RUN_SECONDS[cell.arm]
    if not isinstance(load, Workload):
        return Estimate(start + 1.0, RUN_BYTES[cell.arm] + BYTES_PER_SECOND[cell.arm])
    per_second = load.rate if load.mode == "open" else load.flows / ROUND_TRIP_SECONDS
    limits = [load.messages * load.flows / per_second] if load.messages else []
    seconds = min([*limits, *([load.duration] if load.duration else [])])
    per_run = RUN_BYTES[cell.arm] + seconds * (BYTES_PER_SECOND[cell.arm] + per_second * BYTES_PER_MESSAGE[cell.arm])
    return Estimate(start + seconds, int(per_run))


def plan_lines(spec: Spec) -> Iterator[str]:
    """Yield the plan as text: what varies, every run in its order, duration and size."""
    cells = spec.cells()
    reckoned = [estimate(spec, cell) for cell in cells]
    yield f"{spec.name}: {spec.title}"
    for axis, labels in spec.axes.items():
        yield f"  {axis}: {', '.join(map(str, labels))}"
    for cell in cells:
        yield f"{cell.name}: {cell_text(cell)}"
    seconds = sum(one.seconds for one in reckoned) + spec.warm_up * min(one.seconds for one in reckoned)
    yield (
        f"{len(cells)} runs, {len(spec.configurations)} configurations x {spec.repetitions} repetitions x "
        f"{len(spec.arms)} arms ({', '.join(spec.arms)}), {spec.order}: about {duration_text(seconds)}, "
        f"about {sum(one.bytes for one in reckoned) / 1e6:.0f} MB"
    )


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


def record_spec(
    spec: Spec,
    out: str | os.PathLike[str],
    *,
    testbed: bool | str,
    iface: str | None = None,
    resume: bool = False,
    allow_system_changes: bool = False,
    yes_this_nic: bool = False,
    say: Callable[[str], None] = print,
    **capture_options: Any,
) -> list[RunDir]:
    """Record all runs of a spec into a folder; with `resume` only those that are missing.

    Returns
    -------
    list of RunDir
        In the order of the plan; the last of a cell's tries even when it is degraded.
    """
    folder = Path(out)
    check_resume(folder, resume)
    if check_host(spec, testbed=testbed, iface=iface) and not allow_system_changes:
        raise HostSettingError(
            "this sweep changes settings of the host itself",
            where=spec.name,
            do="Nothing was changed. Give --allow-system-changes to have them changed and put back.",
        )
    progress = Progress(spec, folder, say)
    with ExitStack() as stack:
        journal = stack.enter_context(apply(allow_system_changes=allow_system_changes, yes_this_nic=yes_this_nic))
        bed = stack.enter_context(open_testbed(testbed, registry=journal)) if testbed else None
        recorded = sweep(
            folder,
            spec.configurations,
            testbed=bed,
            iface=None if testbed else iface,
            workload=spec.workload,
            reps=spec.repetitions,
            arms=spec.arms,
            seed=spec.seed,
            order=spec.order,
            labels=spec.labels,
            warm_up=spec.warm_up,
            retries=spec.retries,
            transaction=journal,
            progress=progress,
            idle=spec.idle,
            **capture_options,
        )
        runs = []
        for run in recorded:
            for problem in run.run.get("problems") or []:
                say(f"  {run.path.name}: {problem}")
            runs.append(run)
    return runs


def check_resume(folder: Path, resume: bool) -> None:
    """Refuse to go on with a sweep that is there unless that is asked for."""
    if (folder / SWEEP_JSON).exists() and not resume:
        raise UsageError(
            "a sweep is there already", where=str(folder), do="Go on with --resume, or choose another --out."
        )


class Progress:
    """Says before each run what it is and how much time is left, reckoned from the runs so far."""

    def __init__(self, spec: Spec, folder: Path, say: Callable[[str], None]) -> None:
        self._say, self._folder = say, folder
        self._reckoned = {cell.name: estimate(spec, cell).seconds for cell in spec.cells()}
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


def plan_spec(
    source: str | os.PathLike[str],
    *,
    testbed: bool | str = False,
    iface: str | None = None,
    reps: int | None = None,
    remote: str | None = None,
    elsewhere: bool = False,
) -> Spec:
    """Read a spec, with what the command line says instead of the file, and check it against this host.

    `elsewhere`: other machines record it, and each checks it against itself.
    """
    spec = load_spec(source)
    if remote is not None:
        workload = with_fields(spec.workload, {"remote": remote})
        assert workload is not None
        spec = replace(spec, workload=workload)
    if reps is not None:
        spec = replace(spec, repetitions=reps)
    if bool(iface) == bool(testbed):
        raise UsageError("where shall the sweep run", expected="either --iface IF or --testbed")
    if not elsewhere:
        check_host(spec, testbed=testbed, iface=iface)
    return spec
