"""Build a run's DataTree from the join, save it, open it.

Everything is laid out column-wise with NumPy: no loop over packets. Names, dims, dtypes and attributes come from
:mod:`rxlab.dataset.schema`.
"""

from __future__ import annotations

import ipaddress
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset import schema
from rxlab.dataset.moves import reader_moves
from rxlab.dataset.steering import delivered, predicted_cpus, rps_maps
from rxlab.dataset.variables import flag_attrs
from rxlab.dataset.writing import write, written
from rxlab.errors import FormatError, RxlabError
from rxlab.follow.stagetrust import stage_verdicts
from rxlab.read.columns import Columns
from rxlab.read.pyperfjson import read_pyperf
from rxlab.rundir import (
    APP_LOG,
    APP_LOG_FIELDS,
    CLIENT_LOG,
    CLIENT_LOG_FIELDS,
    MOVE_FIELDS,
    MOVES_LOG,
    PYPERF_JSON,
    RunDir,
)
from rxlab.stages import ORDER, PATH_KINDS, STAGE_INDEX, STAGE_NAMES, STATUSES, TOTALS

NAT = np.iinfo(np.int64).min  # what NumPy's NaT is, so that timestamps need no mask to become datetime64

# Packets are processed in blocks of this many rows where temporaries are float64 tables.
BLOCK = 1 << 18


def build(
    joined: Any,
    *,
    run: Mapping[str, Any],
    host: Mapping[str, Any],
    counters: Mapping[str, Any] | None = None,
    app_latency: Mapping[str, Any] | None = None,
    beside: Mapping[str, xr.Dataset] | None = None,
    rows: slice = slice(None),
) -> xr.DataTree:
    """Lay a run out as labelled groups.

    Parameters
    ----------
    joined : rxlab.follow.join.Joined or None
        One row per received packet; None for a run recorded without trace, whose tree has only /app and /counters.
    run, host, counters : dict
        Contents of run.json, host.json and counters.json.
    app_latency : dict, optional
        ``"server"``, ``"client"`` and ``"moves"``: the workload's own logs as arrays with named fields (:func:`read_app_logs`).
    beside : dict, optional
        Groups that are laid out already (:func:`rxlab.dataset.twohosts.groups_of`).
    rows : slice, optional
        Only these packets in /packets and /hops; the other groups tell of all.

    Returns
    -------
    xarray.DataTree
        Groups as docs/schema.md says; valid by :func:`rxlab.dataset.schema.validate`.
    """
    groups: dict[str, xr.Dataset] = {"/": xr.Dataset(attrs=_root_attrs(joined, run, host))}
    if joined is not None:
        offset = int(joined.clock.offset_ns)
        groups |= packet_groups(joined, run, host, rows)
        groups["flows"] = _flows(joined)
        groups["coverage"] = _coverage(joined)
        groups["clocks"] = _clocks(joined.clock, offset)
        moves = _moves(joined, app_latency or {}, offset)
        if moves.sizes["move"]:
            groups["moves"] = moves
    if counters:
        groups["counters"] = _counters(counters.get("difference", counters))
    if app_latency:
        groups["app"] = _app(app_latency, run)
    tree = xr.DataTree.from_dict({**groups, **(beside or {})})
    schema.validate(tree)
    return tree


def packet_groups(
    joined: Any, run: Mapping[str, Any], host: Mapping[str, Any], rows: slice = slice(None)
) -> dict[str, xr.Dataset]:
    """Lay out /packets and /hops of some packets."""
    if rows != slice(None):
        joined = replace(joined, time=joined.time[rows], cpu=joined.cpu[rows], packets=joined.packets.take(rows))
    return {"packets": _packets(joined, run, host, int(joined.clock.offset_ns)), "hops": _hops(joined)}


def save(tree: xr.DataTree, path: str | os.PathLike[str]) -> Path:
    """Write a tree as netCDF4, compressed, mode 0600, whole or not at all."""
    with written(path) as temporary:
        write(tree, temporary)
    return Path(path)


def open_dataset(path: str | os.PathLike[str]) -> xr.DataTree:
    """Open a saved run lazily, checking its schema version.

    The same as ``xarray.open_datatree(path)``, with clearer errors.
    """
    if not Path(path).is_file():
        raise FormatError("no such dataset", where=str(path), do="Make one with 'rxlab analyze RUN -o RUN.nc'.")
    try:
        tree = xr.open_datatree(path, engine="h5netcdf")
    except OSError as error:
        raise FormatError("not a netCDF4 file", where=str(path), found=str(error)) from None
    try:
        schema.check_version(tree.attrs, str(path))
    except RxlabError:
        tree.close()
        raise
    return tree


def read_app_logs(rundir: RunDir) -> dict[str, Any]:
    """Read app.log, client.log, moves.log and pyperf.json where the run has them.

    Returns
    -------
    dict of str to structured array or Columns
        ``"server"``, ``"client"``, ``"moves"``: fields as in :mod:`rxlab.rundir`; a record cut short at the end is left out.
        ``"pyperf"``: :func:`rxlab.read.pyperfjson.read_pyperf`.
    """
    logs: dict[str, Any] = {}
    for key, name, fields in (
        ("server", APP_LOG, APP_LOG_FIELDS),
        ("client", CLIENT_LOG, CLIENT_LOG_FIELDS),
        ("moves", MOVES_LOG, MOVE_FIELDS),
    ):
        if rundir.has(name):
            dtype = np.dtype(list(fields))
            content = rundir.file(name).read_bytes()
            logs[key] = np.frombuffer(content, dtype, count=len(content) // dtype.itemsize)
    if rundir.has(PYPERF_JSON):
        logs["pyperf"] = read_pyperf(rundir.file(PYPERF_JSON))
    return logs


def _root_attrs(joined: Any, run: Mapping[str, Any], host: Mapping[str, Any]) -> dict[str, Any]:
    attrs = {
        "schema_version": schema.SCHEMA_VERSION,
        "Conventions": schema.CONVENTIONS,
        "title": "rxlab: received packets followed from the NIC to recvmsg()",
        "arm": str(run.get("arm", "")),
        "configuration": json.dumps(run.get("configuration") or {}, sort_keys=True),
        "workload": json.dumps(run.get("workload") or {}, sort_keys=True),
        "command": json.dumps(run.get("command") or []),
        "iface": str(run.get("iface") or ""),
        "testbed": int((run.get("testbed") or {}).get("kind") == "veth"),
        "start_ns": np.int64(run.get("start_ns") or 0),
        "stop_ns": np.int64(run.get("stop_ns") or 0),
        "hostname": str(host.get("hostname", "")),
        "kernel": str(host.get("kernel", "")),
        "lost": np.int64((run.get("perf") or {}).get("lost") or 0),
    }
    if joined is not None:
        attrs["verdict"] = str(joined.verdict)
        attrs["reasons"] = "; ".join(joined.reasons)
        attrs["gates"] = json.dumps(joined.gates, sort_keys=True, default=int)
    return attrs


def laid(group: str, name: str, values: Any, **attrs: Any) -> xr.Variable:
    """Return a variable of the schema: its dims, dtype and attributes around these values."""
    spec = schema.variable(group, name)
    if spec.dtype == "str":
        data = np.asarray(values, dtype=object if len(spec.dims) else None)
    elif spec.dtype.startswith("datetime64"):
        data = np.asarray(values).astype(spec.dtype, copy=False)
    else:
        data = np.asarray(values).astype(spec.dtype, copy=False)
    return xr.Variable(spec.dims, data, {**spec.attrs(), **attrs})


def _on_real_axis(time_mono: np.ndarray, offset: int) -> np.ndarray:
    """Shift int64 CLOCK_MONOTONIC ns to the CLOCK_REALTIME axis as datetime64[ns]; NAT stays NaT."""
    return np.where(time_mono == NAT, NAT, time_mono + offset).view("datetime64[ns]")


def _packets(joined: Any, run: Mapping[str, Any], host: Mapping[str, Any], offset: int) -> xr.Dataset:
    columns: Columns = joined.packets
    time = np.asarray(joined.time)
    variables: dict[str, xr.Variable] = {
        "stage": laid("packets", "stage", STAGE_NAMES),
        "time": laid("packets", "time", _on_real_axis(time, offset)),
        "cpu": laid("packets", "cpu", joined.cpu),
    }
    direct = (
        "flow", "direction", "wire_len", "payload_len", "seq", "skb", "socket", "tid", "rx_queue", "rps_cpu", "waker_cpu",
        "reader_cpu", "gro_segments", "pcap_frame", "path_kind", "t0_stage", "attribution", "status", "is_data", "trusted",
        "last_read_cpu", "sleep_cpu", "reader_kind", "handshake", "forwards",
    )  # fmt: skip
    for name in direct:
        variables[name] = laid("packets", name, columns[name])
    variables["pcap_time"] = laid(
        "packets", "pcap_time", np.asarray(columns["pcap_time"], np.int64).view("datetime64[ns]")
    )
    categories = columns.attrs.get("categories", {})
    for name, first in (("comm", ()), ("drop_reason", ("none",))):
        words = list(categories.get(name, ())) or list(first)
        if name in columns:
            codes = flag_attrs(words, schema.variable("packets", name).dtype) if words else {}
            variables[name] = laid("packets", name, columns[name], **codes)
    for name in ("oneway_min", "oneway_max", "sender_frame", "crossing"):
        if name in columns:
            variables[name] = laid("packets", name, columns[name])
    stack_cpu = joined.cpu[:, STAGE_INDEX["netif_receive_skb"]]
    for name in ("sleep_time", "established_time", "accept_time"):
        variables[name] = laid("packets", name, _on_real_axis(columns[name], offset))
    predicted = predicted_cpus(columns, rps_maps(host, str(run.get("iface"))))
    variables["rps_predicted"] = laid("packets", "rps_predicted", predicted)
    variables["rfs_delivered"] = laid("packets", "rfs_delivered", delivered(stack_cpu, columns["last_read_cpu"]))
    for name, same in _locality(stack_cpu, columns["reader_cpu"], host.get("cpus") or []).items():
        variables[name] = laid("packets", name, same)
    return xr.Dataset(variables)


def _locality(left: np.ndarray, right: np.ndarray, cpus: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """Compare two CPU columns by CPU, core, last level cache and node: int8, 1 same, 0 different, -1 unknown."""
    size = 1 + max([int(cpu["cpu"]) for cpu in cpus] + [int(left.max(initial=0)), int(right.max(initial=0))])
    place = {name: np.full(size, -1, np.int64) for name in ("cpu", "core", "llc", "node")}
    place["cpu"][:] = np.arange(size)
    package_of = {int(cpu["cpu"]): int(cpu.get("package") or 0) for cpu in cpus}
    for cpu in cpus:
        number = int(cpu["cpu"])
        if cpu.get("core") is not None:  # core ids repeat in every package
            place["core"][number] = package_of[number] * 65536 + int(cpu["core"])
        for name in ("llc", "node"):
            if isinstance(cpu.get(name), (int, np.integer)):
                place[name][number] = int(cpu[name])
    known = (left >= 0) & (right >= 0)
    same = {}
    for name, of_cpu in place.items():
        a, b = of_cpu[np.maximum(left, 0)], of_cpu[np.maximum(right, 0)]
        same[f"same_{name}"] = np.where(known & (a >= 0) & (b >= 0), a == b, -1).astype(np.int8)
    return same


def hop_latencies(time: np.ndarray, path_kind: np.ndarray, t0_stage: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the latency of every hop and the stage it starts at.

    Parameters
    ----------
    time : int64 array, dims (packet, stage), ns of one clock
        ``NAT`` where a stage was not seen.
    path_kind : int8 array, dims (packet,)
        Index into ``stages.PATH_KINDS``: fixes the order of the stages.
    t0_stage : int8 array, dims (packet,)
        Index into ``stages.STAGE_NAMES``, start of total_latency; -1 none.

    Returns
    -------
    latency : float64 array, dims (packet, hop), ns
        NaN where one of the two stages was not seen. May be negative: nothing is hidden.
    hop_from : int8 array, dims (packet, hop)
    """
    n = len(time)
    latency = np.full((n, len(schema.HOP_NAMES)), np.nan)
    hop_from = np.full((n, len(schema.HOP_NAMES)), -1, np.int8)
    for begin in range(0, n, BLOCK):
        rows = slice(begin, min(begin + BLOCK, n))
        _steps(time[rows], path_kind[rows], latency[rows], hop_from[rows])
        _totals(time[rows], path_kind[rows], t0_stage[rows], latency[rows], hop_from[rows])
    return latency, hop_from


def _steps(time: np.ndarray, path_kind: np.ndarray, latency: np.ndarray, hop_from: np.ndarray) -> None:
    for kind in np.unique(path_kind):
        rows = np.flatnonzero(path_kind == kind)
        last_time = np.full(len(rows), NAT)
        last_stage = np.full(len(rows), -1, np.int8)
        for name in ORDER[PATH_KINDS[kind]]:
            stage = STAGE_INDEX[name]
            at = time[rows, stage]
            is_seen = at != NAT
            if stage:  # the nic stage ends no hop
                is_hop = is_seen & (last_stage >= 0)
                hop = stage - 1
                latency[rows[is_hop], hop] = (at[is_hop] - last_time[is_hop]).astype(np.float64)
                hop_from[rows[is_hop], hop] = last_stage[is_hop]
            last_time = np.where(is_seen, at, last_time)
            last_stage = np.where(is_seen, np.int8(stage), last_stage)


def _totals(
    time: np.ndarray, path_kind: np.ndarray, t0_stage: np.ndarray, latency: np.ndarray, hop_from: np.ndarray
) -> None:
    is_rps = np.isin(path_kind, [PATH_KINDS.index("napi_rps"), PATH_KINDS.index("backlog_rps")])
    for hop, (name, end, start, _) in enumerate(TOTALS, start=len(schema.STEP_NAMES)):
        from_stage = t0_stage if start == "t0_stage" else np.full(len(time), STAGE_INDEX[start], np.int8)
        begin = np.where(from_stage >= 0, time[np.arange(len(time)), np.maximum(from_stage, 0)], NAT)
        stop = time[:, STAGE_INDEX[end]]
        is_seen = (begin != NAT) & (stop != NAT)
        if name == "rps_latency":
            is_seen &= is_rps
        latency[is_seen, hop] = (stop[is_seen] - begin[is_seen]).astype(np.float64)
        hop_from[is_seen, hop] = from_stage[is_seen]


def _hops(joined: Any) -> xr.Dataset:
    columns = joined.packets
    latency, hop_from = hop_latencies(
        np.asarray(joined.time), np.asarray(columns["path_kind"]), np.asarray(columns["t0_stage"])
    )
    kinds = ["step"] * len(schema.STEP_NAMES) + ["total"] * len(schema.TOTAL_NAMES)
    data = {"latency": laid("hops", "latency", latency), "hop_from": laid("hops", "hop_from", hop_from)}
    coords = {"hop": laid("hops", "hop", schema.HOP_NAMES), "hop_kind": laid("hops", "hop_kind", kinds)}
    return xr.Dataset(data, coords)


def address_text(ip_version: int, high: int, low: int) -> str:
    """Return an address of the columns (IPv4 in the low word) as text; empty without an IP version."""
    if ip_version == 4:
        return str(ipaddress.IPv4Address(int(low) & 0xFFFFFFFF))
    if ip_version == 6:
        return str(ipaddress.IPv6Address((int(high) << 64) | int(low)))
    return ""


def _flows(joined: Any) -> xr.Dataset:
    flows: Columns = joined.flows
    rows = range(flows.n)
    src = [address_text(flows["ip_version"][i], flows["src_hi"][i], flows["src_lo"][i]) for i in rows]
    dst = [address_text(flows["ip_version"][i], flows["dst_hi"][i], flows["dst_lo"][i]) for i in rows]
    of_packet = np.asarray(joined.packets["flow"])
    values = {
        "label": list(flows.attrs.get("labels") or [""] * flows.n),
        "src": src,
        "dst": dst,
        "sport": flows["sport"],
        "dport": flows["dport"],
        "proto": flows["proto"],
        "packets": np.bincount(of_packet[of_packet >= 0], minlength=flows.n),
    }
    return xr.Dataset({name: laid("flows", name, value) for name, value in values.items()})


def _coverage(joined: Any) -> xr.Dataset:
    columns: Columns = joined.coverage
    expected = np.asarray(columns["expected"], np.int64)
    matched = np.asarray(columns["matched"], np.int64)
    absent, status = np.zeros(len(STAGE_NAMES), np.int64), np.asarray(joined.packets["status"])
    with np.errstate(invalid="ignore"):
        fraction = np.where(expected > 0, matched / expected, np.nan)
    values = {
        "stage": STAGE_NAMES,
        "cause": STATUSES,
        "expected": expected,
        "matched": matched,
        "fraction": fraction,
        "missing": np.stack([np.asarray(columns[s], np.int64) if s in columns else absent for s in STATUSES], axis=1),
        "doubtful": columns["doubtful"],
        "verdict": stage_verdicts(columns, joined.verdict),
        "packets": np.bincount(status, minlength=len(STATUSES)),
        "trusted": np.bincount(status[np.asarray(joined.packets["trusted"], bool)], minlength=len(STATUSES)),
    }
    return xr.Dataset({name: laid("coverage", name, value) for name, value in values.items()})


def _clocks(clock: Any, offset: int) -> xr.Dataset:
    segments = clock.segments
    start = np.asarray(segments["start_real"], np.int64)
    offsets = np.asarray(segments["offset"], np.int64)
    residual = np.full(len(schema.RESIDUAL_QUANTILES), np.nan)
    given = dict(clock.residual) if clock.residual is not None else {}
    for index, quantile in enumerate(schema.RESIDUAL_QUANTILES):
        residual[index] = given.get(quantile, np.nan)
    bound = np.nan if clock.bound_ns is None else float(clock.bound_ns)
    values = {
        "axis_offset": offset,
        "start": start.view("datetime64[ns]"),
        "offset": offsets,
        "drift": np.asarray(segments["slope"] if "slope" in segments else np.zeros(len(offsets))) * 1e6,
        "segment_bound": np.asarray(segments["bound"] if "bound" in segments else np.full(len(offsets), bound), float),
        "bound": bound,
        "method": clock.method,
        "flags": " ".join(clock.flags),
        "perf_clock": clock.perf_clock,
        "nic_ahead": np.nan if clock.leap_s is None else float(clock.leap_s * 10**9 + clock.nic_offset_ns),
        "quantile": np.array(schema.RESIDUAL_QUANTILES),
        "residual": residual,
        "stamp_position": clock.stamp_position,
    }
    return xr.Dataset({name: laid("clocks", name, value) for name, value in values.items()})


def _padded(rows: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """Return rows of unequal length as one int64 table, zeros at the end: ERR and MIS lines have one number for all CPUs."""
    table = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        table[index, : len(row)] = row
    return table


def _counters(difference: Mapping[str, Any]) -> xr.Dataset:
    interrupts: Mapping[str, Any] = difference.get("interrupts") or {}
    softirqs: Mapping[str, Any] = difference.get("softirqs") or {}
    softnet: Sequence[Mapping[str, int]] = difference.get("softnet_stat") or []
    cpu_time: Sequence[Mapping[str, int]] = difference.get("cpu_time_ns") or []
    lists = [row["cpus"] for row in interrupts.values()] + list(softirqs.values())
    numbers = [int(row["cpu"]) for row in (*softnet, *cpu_time)]
    n_cpus = max([len(row) for row in lists] + [number + 1 for number in numbers] + [0])
    values: dict[str, Any] = {"cpu": np.arange(n_cpus)}
    if interrupts:
        values |= {"irq": list(interrupts), "irq_label": [str(row.get("label", "")) for row in interrupts.values()]}
        values["interrupts"] = _padded([row["cpus"] for row in interrupts.values()], n_cpus)
    if softirqs:
        values |= {"softirq": list(softirqs), "softirqs": _padded(list(softirqs.values()), n_cpus)}
    for per_cpu, names, table in ((softnet, "softnet_field", "softnet"), (cpu_time, "cpu_mode", "cpu_time")):
        if per_cpu:
            fields = [name for name, value in per_cpu[0].items() if name != "cpu" and isinstance(value, int)]
            content = np.zeros((len(fields), n_cpus), np.int64)
            for row in per_cpu:
                content[:, int(row["cpu"])] = [int(row.get(name) or 0) for name in fields]
            values |= {names: fields, table: content}
    if nstat := difference.get("nstat"):
        values |= {"nstat_name": list(nstat), "nstat": [int(value) for value in nstat.values()]}
    if ethtool := {
        f"{iface}:{name}": int(n)
        for iface, table in (difference.get("ethtool") or {}).items()
        for name, n in table.items()
    }:
        values |= {"ethtool_name": list(ethtool), "ethtool": list(ethtool.values())}
    return xr.Dataset({name: laid("counters", name, value) for name, value in values.items()})


def _moves(joined: Any, logs: Mapping[str, Any], offset: int) -> xr.Dataset:
    found = reader_moves(np.asarray(joined.time), np.asarray(joined.cpu), joined.packets, logs.get("moves"))
    found["time"] = (found["time"] + offset).view("datetime64[ns]")
    return xr.Dataset({name: laid("moves", name, column) for name, column in found.items()})


def _app(logs: Mapping[str, Any], run: Mapping[str, Any]) -> xr.Dataset:
    variables: dict[str, xr.Variable] = {}
    # `sent` is the clock of the sending host: another host's CLOCK_MONOTONIC says nothing here.
    is_remote = bool((run.get("workload") or {}).get("remote"))
    if (server := logs.get("server")) is not None:
        returned, sent = np.asarray(server["t1"], np.int64), np.asarray(server["sent"], np.int64)
        variables["received"] = laid("app", "received", returned)
        variables["message_flow"] = laid("app", "message_flow", server["flow"])
        if not is_remote:
            usable = (sent > 0) & (np.asarray(server["ret"]) > 0)
            variables["one_way_latency"] = laid(
                "app", "one_way_latency", np.where(usable, (returned - sent).astype(np.float64), np.nan)
            )
    if (client := logs.get("client")) is not None:
        intended, replied = np.asarray(client["intended"], np.int64), np.asarray(client["replied"], np.int64)
        variables["intended"] = laid("app", "intended", intended)
        if (replied > 0).any():
            for name, start in (
                ("round_trip_latency", intended),
                ("service_latency", np.asarray(client["sent"], np.int64)),
            ):
                variables[name] = laid("app", name, np.where(replied > 0, (replied - start).astype(np.float64), np.nan))
    if (pyperf := logs.get("pyperf")) is not None:
        names = np.array(pyperf.attrs["categories"]["benchmark"], object)
        variables["benchmark_time"] = laid("app", "benchmark_time", pyperf["value"])
        variables["benchmark"] = laid("app", "benchmark", names[pyperf["benchmark"]])
    return xr.Dataset(variables)
