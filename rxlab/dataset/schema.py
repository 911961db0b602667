"""The contract of the dataset: SCHEMA, one table, and validate().

The only place that names dims and units. ``docs/schema.md`` prints this table (``python -m rxlab.dataset.schema``) and a
test keeps the two equal.
"""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset.twohostschema import crossing_variables, interval_variables, twohost_variables
from rxlab.dataset.variables import Variable
from rxlab.errors import SchemaError
from rxlab.follow.stagetrust import MAX_DOUBTFUL, STAGE_VERDICTS
from rxlab.stages import ATTRIBUTIONS, HANDSHAKES, PATH_KINDS, READER_KINDS, STAGE_NAMES, STATUSES, TOTALS

SCHEMA_VERSION = 1
CONVENTIONS = "CF-1.11"

REAL, MONO = "CLOCK_REALTIME", "CLOCK_MONOTONIC"
SAME_FLAGS = ("unknown", "different", "same")  # values -1, 0, 1
DELIVERIES = ("unknown", "elsewhere", "delivered")  # values -1, 0, 1
DIRECTIONS = ("rx", "tx")
VERDICTS = ("absent", "untraced", "trusted", "degraded", "refused")
RESIDUAL_QUANTILES = (0.0, 0.01, 0.5, 0.99, 1.0)

# Steps are named by the stage they end at; the first stage of the path ends nothing.
STEP_NAMES: tuple[str, ...] = STAGE_NAMES[1:]
TOTAL_NAMES: tuple[str, ...] = tuple(name for name, *_ in TOTALS)
HOP_NAMES: tuple[str, ...] = STEP_NAMES + TOTAL_NAMES


def _packets() -> list[Variable]:
    p, ps = ("packet",), ("packet", "stage")
    task = "-1: no reader seen"

    def v(name: str, dims: tuple[str, ...], dtype: str, units: str, *rest: Any, **more: Any) -> Variable:
        return Variable("packets", name, dims, dtype, units, *rest, **more)

    return [
        v("stage", ("stage",), "str", "", "", "stage of the path", "label; the stage table of docs/schema.md"),
        v("time", ps, "datetime64[ns]", "", REAL, "time at the stage",
          "perf stamp of the stage's event, CLOCK_MONOTONIC ns plus /clocks axis_offset", "NaT: the stage was not seen for this packet"),
        v("cpu", ps, "int16", "1", "", "CPU at the stage", "CPU on which the stage's event was raised", "-1: the stage was not seen"),
        v("flow", p, "int32", "1", "", "flow", "row of /flows: a direction of a TCP connection, or of a UDP 5-tuple", "-1: not an IP packet"),
        v("direction", p, "int8", "1", "", "direction", "received by this host or sent by it", flags=DIRECTIONS),
        v("wire_len", p, "int64", "byte", "", "length on the wire", "frame length, link layer header included", "-1: no pcap packet"),
        v("payload_len", p, "int32", "byte", "", "payload", "bytes of layer 4 payload, from the IP length; a datagram in IP fragments has all of its bytes at the one that completed it, the others 0", "-1: unknown"),
        v("seq", p, "int64", "1", "", "TCP sequence number", "as in the header, not unwrapped", "0: not TCP"),
        v("skb", p, "uint64", "1", "", "skb address", "kernel address of the socket buffer; reused, so no identity by itself", "0: no skb event"),
        v("socket", p, "uint64", "1", "", "socket address", "kernel address of the receiving socket; of a handshake, the listener", "0: not seen"),
        v("tid", p, "int32", "1", "", "reader thread", "thread that consumed the bytes; of a handshake's ACK, the one its listener woke", task),
        v("comm", p, "int32", "1", "", "reader's name", "comm of tid at that time, code of the attribute flag_meanings", task),
        v("rx_queue", p, "int16", "1", "", "rx queue", "queue that received the packet", "-1: the driver did not say"),
        v("rps_cpu", p, "int16", "1", "", "RPS target CPU", "CPU that RPS or RFS chose", "-1: not moved"),
        v("rps_predicted", p, "int16", "1", "", "CPU predicted for RPS", "CPU that get_rps_cpu() takes by the packet's hash and the queue's rps_cpus, without RFS",
          "-1: RPS off, or the hash is not known"),
        v("last_read_cpu", p, "int16", "1", "", "CPU of the last read", "CPU on which a receive call last returned from the packet's socket before the packet was steered: what RFS aims at",
          "-1: not seen"),
        v("rfs_delivered", p, "int8", "1", "", "RFS delivered", "whether netif_receive_skb ran on last_read_cpu", "-1: one of the two is unknown", flags=DELIVERIES, first_flag=-1),
        v("waker_cpu", p, "int16", "1", "", "CPU that woke the reader", "CPU of the stage waking", "-1: no wake of its own"),
        v("reader_cpu", p, "int16", "1", "", "CPU of the reader", "CPU on which the receive call returned", task),
        *(
            v(f"same_{what}", p, "int8", "1", "", f"same {words}", f"{words} of netif_receive_skb against {words} of reader_cpu",
              "-1: one of the two is unknown", flags=SAME_FLAGS, first_flag=-1)
            for what, words in (("cpu", "CPU"), ("core", "core"), ("llc", "last level cache"), ("node", "NUMA node"))
        ),
        v("gro_segments", p, "int16", "1", "", "segments in the skb", "wire segments that GRO merged into this packet's skb", "0: unknown"),
        v("pcap_time", p, "datetime64[ns]", "", REAL, "capture stamp",
          "software stamp of tcpdump; where it is taken is /clocks stamp_position, it is never a stage", "NaT: no pcap packet"),
        v("pcap_frame", p, "int64", "1", "", "frame number", "1-based number in rx.pcap, as Wireshark shows it", "0: no pcap packet"),
        v("path_kind", p, "int8", "1", "", "path kind", "how the packet entered the kernel; it fixes the order of stages", flags=PATH_KINDS),
        v("t0_stage", p, "int8", "1", "", "first kernel stage seen", "start of total_latency: code of a stage", "-1: no kernel stage seen", flags=STAGE_NAMES),
        v("forwards", p, "int8", "1", "", "times forwarded", "other devices of the host by which it came in again (bridge, routing, veth) on its way to the socket: part of the step after netif_receive_skb"),
        v("handshake", p, "int8", "1", "", "part in the handshake", "SYN, SYN-ACK, or the ACK that completes it: its stages from data_ready on are the listener's", flags=HANDSHAKES),
        v("established_time", p, "datetime64[ns]", "", REAL, "connection established", "sock:inet_sock_set_state to ESTABLISHED while this packet was processed",
          "NaT: not this packet's doing, or the event was not recorded"),
        v("accept_time", p, "datetime64[ns]", "", REAL, "connection accepted", "return of the accept() that took the connection this ACK completed",
          "NaT: no such packet, not recorded (events full), or not to be told"),
        v("sleep_time", p, "datetime64[ns]", "", REAL, "reader went to sleep", "sched_switch that took the reader off the CPU, asleep, before the switch_in of this packet",
          "NaT: it did not sleep, or that was not seen"),
        v("sleep_cpu", p, "int16", "1", "", "CPU the reader slept on", "CPU of that sched_switch", "-1: as sleep_time"),
        v("reader_kind", p, "int8", "1", "", "how it was read", "receive system call, or a request in an io_uring", flags=READER_KINDS),
        v("attribution", p, "int8", "1", "", "attribution", "why the reader ran when it did", flags=ATTRIBUTIONS),
        v("status", p, "int8", "1", "", "status", "what became of the packet; statistics use complete rows", flags=STATUSES),
        v("trusted", p, "bool", "1", "", "trusted",
          "the call that read the packet is named without doubt: status complete, or lost or blind with stages that were not delivered; never in a refused run"),
        v("is_data", p, "bool", "1", "", "carries payload", "payload a reader can consume; the denominator of completeness"),
        *interval_variables("packets", optional=True),
        v("drop_reason", p, "int16", "1", "", "drop reason", "reason of skb:kfree_skb, code of the attribute flag_meanings", "0: not dropped", True),
    ]  # fmt: skip


def _hops() -> list[Variable]:
    ph = ("packet", "hop")
    return [
        Variable("hops", "hop", ("hop",), "str", "", "", "hop", "a step is named by the stage it ends at; totals are " + ", ".join(TOTAL_NAMES)),
        Variable("hops", "hop_kind", ("hop",), "str", "", "", "kind of hop",
                 "step: between consecutive seen stages of the packet, steps add up; total: a named latency over several steps"),
        Variable("hops", "latency", ph, "float64", "ns", MONO, "latency of the hop", "from the stage hop_from to the stage the hop is named by; totals: "
                 + "; ".join(f"{name}: from {text.replace(' -> ', ' to ')}" for name, _, _, text in TOTALS), "NaN: one of its two stages was not seen"),
        Variable("hops", "hop_from", ph, "int8", "1", "", "stage the hop starts at", "code of a stage: the last stage seen before it", "-1: the hop is missing",
                 flags=STAGE_NAMES),
    ]  # fmt: skip


def _flows() -> list[Variable]:
    f = ("flow",)
    return [
        Variable("flows", "label", f, "str", "", "", "flow", "source > destination, protocol"),
        Variable("flows", "src", f, "str", "", "", "source address", "IPv4 or IPv6 text"),
        Variable("flows", "dst", f, "str", "", "", "destination address", "IPv4 or IPv6 text"),
        Variable("flows", "sport", f, "int32", "1", "", "source port", "0 without ports"),
        Variable("flows", "dport", f, "int32", "1", "", "destination port", "0 without ports"),
        Variable("flows", "proto", f, "int16", "1", "", "IP protocol", "6 TCP, 17 UDP"),
        Variable("flows", "packets", f, "int64", "1", "", "packets", "rows of /packets with this flow"),
    ]


def _coverage() -> list[Variable]:
    s, c = ("stage",), ("cause",)
    return [
        Variable("coverage", "stage", s, "str", "", "", "stage of the path", "as in /packets"),
        Variable("coverage", "cause", c, "str", "", "", "cause", "why a stage is missing: the packet's status"),
        Variable("coverage", "expected", s, "int64", "1", "", "packets expected", "packets whose path kind and attribution require the stage"),
        Variable("coverage", "matched", s, "int64", "1", "", "packets matched", "of those, packets with the stage seen"),
        Variable("coverage", "fraction", s, "float64", "1", "", "share matched", "matched / expected", "NaN: no packet requires the stage"),
        Variable("coverage", "missing", ("stage", "cause"), "int64", "1", "", "packets missing", "expected packets without the stage, by cause"),
        Variable("coverage", "doubtful", s, "int64", "1", "", "packets in doubt",
                 "expected packets that leave the stage in doubt: flagged rows, of the trusted ones among them only those that miss it"),
        Variable("coverage", "verdict", s, "int8", "1", "", "verdict on the stage",
                 f"degraded: more than {MAX_DOUBTFUL:.0%} of the expected packets leave it in doubt", flags=STAGE_VERDICTS),
        Variable("coverage", "packets", c, "int64", "1", "", "packets", "rows of /packets with this status"),
        Variable("coverage", "trusted", c, "int64", "1", "", "packets trusted", "of those, rows that are trusted"),
    ]  # fmt: skip


def _clocks() -> list[Variable]:
    g = ("segment",)
    return [
        Variable("clocks", "axis_offset", (), "int64", "ns", f"{REAL} - {MONO}", "constant of the time axis",
                 "added to CLOCK_MONOTONIC to give /packets time; subtract it to convert back exactly"),
        Variable("clocks", "start", g, "datetime64[ns]", "", "pcap", "start of the segment", "instant of the pcap's clock from which the segment's offset holds",
                 "NaT: from the beginning"),
        Variable("clocks", "offset", g, "int64", "ns", f"pcap - {MONO}", "offset of the segment",
                 "from CLOCK_MONOTONIC to the pcap's clock (CLOCK_REALTIME, with hardware stamps the NIC's) at the segment's start"),
        Variable("clocks", "drift", g, "float64", "1e-6", f"pcap - {MONO}", "drift in the segment", "change of offset with time, ppm; 0 where one constant holds"),
        Variable("clocks", "segment_bound", g, "float64", "ns", "", "error bound of the segment", "as bound, of this segment alone"),
        Variable("clocks", "bound", (), "float64", "ns", "", "error bound",
                 "|error of a converted stamp| is at most this: half width of a reading plus its spread, or plus interpolation; of an envelope, up to one constant",
                 "NaN: no clock readings"),
        Variable("clocks", "method", (), "str", "", "", "how the map was found",
                 "readings: CLOCK_REALTIME read; cross_stamps: the NIC's clock read; brackets: events around each stamp; envelope: events after each stamp, so that times are excess over the fastest packet"),
        Variable("clocks", "flags", (), "str", "", "", "what is wrong with the map", "words, separated by spaces; empty where nothing is"),
        Variable("clocks", "perf_clock", (), "str", "", "", "clock of the recording", "the clock perf stamped by before conversion to CLOCK_MONOTONIC; empty where the recording does not say"),
        Variable("clocks", "nic_ahead", (), "float64", "ns", "NIC - CLOCK_REALTIME", "how far the NIC's clock is ahead", "at the last cross-stamp; 37e9: it runs on TAI",
                 "NaN: no hardware stamps"),
        Variable("clocks", "quantile", ("quantile",), "float64", "1", "", "quantile", "label of residual"),
        Variable("clocks", "residual", ("quantile",), "float64", "ns", "", "residual", "capture stamp minus the event it is taken at, after the fit, quantiles",
                 "NaN: no matched packet"),
        Variable("clocks", "stamp_position", (), "str", "", "", "where tcpdump's stamp is taken",
                 "bracket: inside netif_rx; tap: just after netif_receive_skb; nic: by the NIC; unknown"),
    ]  # fmt: skip


def _counters() -> list[Variable]:
    d = "difference of the counter, after the run minus before"

    def v(name: str, dims: tuple[str, ...], dtype: str, units: str, title: str, text: str) -> Variable:
        return Variable("counters", name, dims, dtype, units, "", title, text, "absent: not readable on the host", True)

    return [
        v("cpu", ("cpu",), "int64", "1", "CPU", "label"),
        v("irq", ("irq",), "str", "", "interrupt", "label of /proc/interrupts"),
        v("irq_label", ("irq",), "str", "", "interrupt's device", "last columns of /proc/interrupts"),
        v("interrupts", ("irq", "cpu"), "int64", "1", "interrupts", f"/proc/interrupts: {d}"),
        v("softirq", ("softirq",), "str", "", "softirq", "label of /proc/softirqs"),
        v("softirqs", ("softirq", "cpu"), "int64", "1", "softirqs", f"/proc/softirqs: {d}"),
        v(
            "softnet_field",
            ("softnet_field",),
            "str",
            "",
            "softnet_stat field",
            "processed, dropped, time_squeeze, received_rps, ...",
        ),
        v("softnet", ("softnet_field", "cpu"), "int64", "1", "softnet_stat", f"/proc/net/softnet_stat: {d}"),
        v("cpu_mode", ("cpu_mode",), "str", "", "CPU mode", "user, system, softirq, idle, ... of /proc/stat"),
        v("cpu_time", ("cpu_mode", "cpu"), "float64", "ns", "CPU time", f"/proc/stat: {d}; resolution one tick"),
        v("nstat_name", ("nstat_name",), "str", "", "protocol counter", "label"),
        v("nstat", ("nstat_name",), "int64", "1", "protocol counters", f"/proc/net/snmp and netstat: {d}"),
        v("ethtool_name", ("ethtool_name",), "str", "", "driver counter", "interface:name"),
        v("ethtool", ("ethtool_name",), "int64", "1", "driver counters", f"ethtool -S: {d}"),
    ]


def _app() -> list[Variable]:
    def v(name: str, dim: str, dtype: str, units: str, title: str, text: str, missing: str) -> Variable:
        return Variable("app", name, (dim,), dtype, units, MONO if units == "ns" else "", title, text, missing, True)

    return [
        v("received", "message", "int64", "ns", "receive call returned", "clock read just after the server's receive call", "never"),
        v("message_flow", "message", "int32", "1", "flow of the workload", "number the client gave the connection", "-1: unknown"),
        v("one_way_latency", "message", "float64", "ns", "message latency, send to receive",
          "from the client's intended send time to the return of the server's receive call", "NaN: no send time, or the clocks are two hosts'"),
        v("intended", "request", "int64", "ns", "intended send time", "when the schedule wanted the request sent", "never"),
        v("round_trip_latency", "request", "float64", "ns", "request latency, send to reply",
          "from the intended send time to the arrival of the reply", "NaN: no reply"),
        v("service_latency", "request", "float64", "ns", "request latency without queueing at the client",
          "from the actual send time to the arrival of the reply", "NaN: no reply"),
        v("benchmark_time", "benchmark_value", "float64", "ns", "time of one loop", "value measured by the pyperf script that was the workload, warm-ups left out", "never"),
        v("benchmark", "benchmark_value", "str", "", "benchmark", "name pyperf has for it", "never"),
    ]  # fmt: skip


def _moves() -> list[Variable]:
    m = ("move",)
    return [
        Variable("moves", "time", m, "datetime64[ns]", "", REAL, "time of the move",
                 "the system call that moved the reader had returned (moves.log); without that log, the reader first ran on the new CPU"),
        Variable("moves", "tid", m, "int32", "1", "", "reader thread", "thread that moved"),
        Variable("moves", "flow", m, "int32", "1", "", "flow", "row of /flows that it reads"),
        Variable("moves", "cpu", m, "int16", "1", "", "new CPU", "CPU the reader moved to"),
        Variable("moves", "from_cpu", m, "int16", "1", "", "old CPU", "CPU it came from"),
        Variable("moves", "packets", m, "int64", "1", "", "packets until the next move", "data packets of the flow steered between this move and the next"),
        Variable("moves", "lag_packets", m, "float64", "1", "", "lag in packets",
                 "data packets of the flow steered after the move and before the first whose stack ran on the new CPU", "NaN: none came there before the next move"),
        Variable("moves", "lag", m, "float64", "ns", MONO, "lag", "from the move to the steering (driver_rx, else netif_receive_skb) of the first packet whose stack ran on the new CPU",
                 "NaN: as lag_packets"),
    ]  # fmt: skip


def _sweep() -> list[Variable]:
    base = ("...", "repetition", "arm")
    q = (*base, "hop", "quantile")
    return [
        Variable("sweep", "latency", q, "float64", "ns", MONO, "latency quantile", "quantile of /hops latency of one run; of /app in arms without trace", "NaN: no run, or not seen"),
        Variable("sweep", "latency_low", q, "float64", "ns", MONO, "lower end", "of the 95 % interval within the run", "NaN: as latency"),
        Variable("sweep", "latency_high", q, "float64", "ns", MONO, "upper end", "of the 95 % interval within the run", "NaN: as latency"),
        Variable("sweep", "count", (*base, "hop", "bucket"), "int64", "1", "", "packets", "packets in the latency bucket; merges by adding", "0: no run"),
        Variable("sweep", "coverage", (*base, "stage"), "float64", "1", "", "share matched", "as /coverage fraction", "NaN: no run or no trace"),
        Variable("sweep", "lost", base, "float64", "1", "", "events lost", "perf's LOST count", "NaN: no run or no trace"),
        Variable("sweep", "clock_bound", base, "float64", "ns", "", "error bound", "as /clocks bound", "NaN: no run or no trace"),
        Variable("sweep", "verdict", base, "int8", "1", "", "verdict of the run", "of the join's gates; untraced runs have none", "absent: no run", flags=VERDICTS),
        Variable("sweep", "packets", base, "float64", "1", "", "IP packets received", "IpInReceives and Ip6InReceives of the network namespace", "NaN: no run"),
        Variable("sweep", "softirqs_per_hardirq", base, "float64", "1", "", "NET_RX softirqs per hard IRQ", "on all CPUs, against the interface's own interrupts", "NaN: no run, or no interrupt"),
        Variable("sweep", "call_ipis_per_packet", base, "float64", "1", "", "function call IPIs per packet", "/proc/interrupts 'Function call interrupts': RPS sends them; whole host", "NaN: no run, or not counted"),
        Variable("sweep", "reschedule_ipis_per_packet", base, "float64", "1", "", "reschedule IPIs per packet", "/proc/interrupts 'Rescheduling interrupts': a wakeup on another CPU; whole host", "NaN: no run, or not counted"),
        Variable("sweep", "wakeups_per_packet", base, "float64", "1", "", "wakeups per data packet", "distinct instants of stage waking, per usable packet", "NaN: no run or no trace"),
        Variable("sweep", "on_reader_cpu", base, "float64", "1", "", "packets on the reader's CPU", "share of usable packets whose stack ran on the CPU they were read on", "NaN: no run or no trace"),
        Variable("sweep", "rfs_delivered", base, "float64", "1", "", "delivered as RFS wants", "share of usable packets whose stack ran on /packets last_read_cpu; without RFS so many are there by chance", "NaN: no run or no trace, or of no packet known"),
        Variable("sweep", "on_rps_target", base, "float64", "1", "", "on the RPS target", "share of usable packets whose stack ran on /packets rps_predicted", "NaN: no run or no trace, or of no packet known (RPS off)"),
        Variable("sweep", "moves", base, "float64", "1", "", "moves of readers", "rows of /moves", "NaN: no run or no trace"),
        Variable("sweep", "moves_followed", base, "float64", "1", "", "moves followed", "share of moves after which packets came to the reader's new CPU before it moved on", "NaN: no move"),
        Variable("sweep", "lag_packets", (*base, "quantile"), "float64", "1", "", "lag behind the reader in packets", "quantile of /moves lag_packets", "NaN: no move followed"),
        Variable("sweep", "lag", (*base, "quantile"), "float64", "ns", MONO, "lag behind the reader", "quantile of /moves lag", "NaN: no move followed"),
        Variable("sweep", "cpu_time_per_packet", (*base, "cpu_mode", "cpu"), "float64", "ns", "", "CPU time per packet", "/proc/stat over IP packets received; spinners count as user", "NaN: no run"),
        Variable("sweep", "softnet", (*base, "softnet_field", "cpu"), "float64", "1", "", "softnet_stat", "difference over the run", "NaN: no run"),
        Variable("sweep", "interrupts", (*base, "queue", "cpu"), "float64", "1", "", "interrupts of the queue", "difference over the run", "NaN: no run; absent: no queue has one", True),
    ]  # fmt: skip


SCHEMA: tuple[Variable, ...] = (
    *_packets(),
    *_hops(),
    *_flows(),
    *_coverage(),
    *_clocks(),
    *_counters(),
    *_app(),
    *_moves(),
    *twohost_variables(),
    *crossing_variables(),
    *_sweep(),
)
BY_PATH: dict[str, Variable] = {variable.path: variable for variable in SCHEMA}
GROUPS: tuple[str, ...] = tuple(dict.fromkeys(variable.group for variable in SCHEMA))
# A run recorded without trace has only what needs no trace.
TRACE_GROUPS = ("packets", "hops", "flows", "coverage", "clocks")


def variable(group: str, name: str) -> Variable:
    """Return the schema's entry for ``group/name``, or say which names are near."""
    try:
        return BY_PATH[f"{group}/{name}"]
    except KeyError:
        near = difflib.get_close_matches(f"{group}/{name}", BY_PATH, n=3)
        raise SchemaError(
            "no such variable in the schema", where=f"{group}/{name}", expected=", ".join(near) or None
        ) from None


def check_version(attrs: Any, where: str) -> None:
    """Refuse a dataset without a schema version or with a newer one."""
    version = attrs.get("schema_version")
    if version is None:
        raise SchemaError(
            "not an rxlab dataset",
            where=where,
            found="no attribute schema_version",
            do="Make one with 'rxlab analyze RUN -o RUN.nc'.",
        )
    if int(version) > SCHEMA_VERSION:
        raise SchemaError(
            "written by a newer rxlab",
            where=where,
            found=f"schema_version {int(version)}",
            expected=f"at most {SCHEMA_VERSION}",
            do="Upgrade rxlab: pip install --upgrade rxlab.",
        )


def validate(tree: xr.DataTree) -> None:
    """Check a run's tree against SCHEMA.

    Raises
    ------
    SchemaError
        The first thing that is wrong, with what is right. Variables beyond the schema are welcome where they carry
        ``long_name`` and, if numeric, ``units``.
    """
    check_version(tree.attrs, "dataset")
    groups = set(tree.children)
    if groups.intersection(TRACE_GROUPS):
        for group in TRACE_GROUPS:
            if group not in groups:
                raise SchemaError(
                    "group is missing",
                    where=f"/{group}",
                    found=", ".join(sorted(groups)),
                    expected=", ".join(TRACE_GROUPS),
                )
    for group in sorted(groups.intersection(GROUPS)):
        _validate_group(tree.children[group].to_dataset(inherit=False), group)
    if "packets" in groups and tree["packets"].sizes["packet"] != tree["hops"].sizes["packet"]:
        sizes = {group: tree[group].sizes["packet"] for group in ("packets", "hops")}
        raise SchemaError(
            "groups differ in their packets",
            where="/packets and /hops",
            found=str(sizes),
            expected="the same rows in the same order",
        )


def _validate_group(dataset: xr.Dataset, group: str) -> None:
    known = {v.name: v for v in SCHEMA if v.group == group}
    for name, spec in known.items():
        if name in dataset.variables:
            _validate_variable(dataset[name], spec)
        elif not spec.optional:
            near = difflib.get_close_matches(name, [str(n) for n in dataset.variables], n=1)
            raise SchemaError(
                "variable is missing",
                where=spec.path,
                found=near[0] if near else None,
                expected=f"{name}({', '.join(spec.dims)}), {spec.definition}",
            )
    for key, array in dataset.data_vars.items():
        name = str(key)
        if name not in known and (
            "long_name" not in array.attrs or (array.dtype.kind in "iuf" and "units" not in array.attrs)
        ):
            near = difflib.get_close_matches(name, known, n=1)
            raise SchemaError(
                "variable beyond the schema without long_name and units",
                where=f"{group}/{name}",
                found=f"attributes {sorted(map(str, array.attrs))}",
                do=f"Did you mean {near[0]!r}?" if near else "Set attrs['long_name'] and attrs['units'].",
            )


def _validate_variable(array: xr.DataArray, spec: Variable) -> None:
    if tuple(map(str, array.dims)) != spec.dims:
        raise SchemaError("wrong dims", where=spec.path, found=str(tuple(array.dims)), expected=str(spec.dims))
    dtype = array.dtype
    is_right = dtype.kind in "OUT" if spec.dtype == "str" else dtype == np.dtype(spec.dtype)
    if not is_right:
        raise SchemaError("wrong dtype", where=spec.path, found=str(dtype), expected=spec.dtype)
    if spec.units and array.attrs.get("units") != spec.units:
        raise SchemaError(
            "wrong units",
            where=spec.path,
            found=repr(array.attrs.get("units")),
            expected=repr(spec.units),
            do="Convert the values, then set the attribute.",
        )
    if spec.clock and array.attrs.get("clock") != spec.clock:
        raise SchemaError(
            "wrong clock", where=spec.path, found=repr(array.attrs.get("clock")), expected=repr(spec.clock)
        )
    if not array.attrs.get("long_name"):
        raise SchemaError("no long_name", where=spec.path, expected=repr(spec.long_name))


def meanings(array: xr.DataArray) -> dict[int, str]:
    """Return code -> meaning of a coded variable, from its CF attributes."""
    values = np.atleast_1d(array.attrs["flag_values"])
    return dict(zip(map(int, values), str(array.attrs["flag_meanings"]).split(), strict=True))


def markdown_table() -> str:
    """Return SCHEMA as Markdown tables, one per group."""
    lines: list[str] = []
    for group in GROUPS:
        lines += [f"### /{group}" if group != "sweep" else "### A sweep", ""]
        lines += [
            "| variable | dims | dtype | units | clock | title | definition | may be missing |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for v in SCHEMA:
            if v.group == group:
                name = f"`{v.name}`" + (" (optional)" if v.optional else "")
                text = v.definition + (f". Codes from {v.first_flag}: {', '.join(v.flags)}" if v.flags else "")
                dims = ", ".join(v.dims) or "scalar"
                lines.append(
                    f"| {name} | {dims} | {v.dtype} | {v.units} | {v.clock} | {v.long_name} | {text} | {v.missing} |"
                )
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(markdown_table(), end="")
