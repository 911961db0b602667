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
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rxlab.errors import FormatError, HostSettingError, UsageError
from rxlab.host.access import HostAccess
from rxlab.host.cpulist import online_cpus
from rxlab.host.kinds import HOST_WIDE, KINDS, canonical_value
from rxlab.host.settings import parse_settings
from rxlab.host.topology import resolve_intents
from rxlab.record.ports import captured_port, check_place
from rxlab.record.recording import ARM_OF, IDLE_CHOICES
from rxlab.record.sweep import (
    ORDERS,
    RECORDING_KEYS,
    WORKLOAD_KEYS,
    Cell,
    plan_sweep,
    reader_cpu,
    split_configuration,
    with_fields,
)
from rxlab.record.workload import Command, Workload

SPECS = Path(__file__).with_name("specs")
COMMAND_KEYS = ("command", "server", "server_port", "pyperf")
PLACES = ("any", "testbed", "iface")


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
    check_place(iface, testbed)
    if not elsewhere:
        check_host(spec, testbed=testbed, iface=iface)
    return spec
