"""The join against independent judges: the workload's own log, byte sums, kernel counters.

The application log (rundir.APP_LOG_FIELDS) holds for every receive call the clock before and after it, its tid, the bytes it
returned and the message they carry. A packet joined to the wrong call misses that window by a whole inter-packet gap, which
makes it a sharp test (alignment.md section 3).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rxlab.errors import FormatError
from rxlab.follow.asof import pick
from rxlab.follow.clockfit import NAT
from rxlab.follow.gates import distinct_bytes
from rxlab.follow.join import Joined
from rxlab.follow.kernelpath import event_columns
from rxlab.follow.status import FLAGGED, NOT_COUNTED, TCP, UDP
from rxlab.read.columns import Columns
from rxlab.rundir import APP_LOG_FIELDS, APP_LOG_STRUCT, MESSAGE_HEADER, MESSAGE_MAGIC
from rxlab.stages import STAGE_INDEX, STATUSES

_RECV = STAGE_INDEX["recvmsg"]
# Counters are the whole host's, read before perf starts and after it stops: they may only be ahead, and only by the
# handshake and by what else the host does.
COUNTER_SLACK = 0.05
COUNTER_SLACK_MIN = 64
NET_RX_VEC = 3  # include/linux/interrupt.h: NET_RX_SOFTIRQ
# The counters also run while perf starts and stops, and in blind windows: a recording must show half of what they counted.
NET_RX_SEEN = 0.5
MAX_ACTIONS = 4  # handlers that share one interrupt line are each entered, the line counts once
_STREAM_ROOM = (
    1 << 42
)  # above any number of bytes or messages of one connection: (connection, byte) becomes one sortable key


def read_app_log(path: Path) -> np.ndarray:
    """Read ``app.log`` as a structured array, dims (call,), in file order.

    Raises
    ------
    FormatError
        The size is not a multiple of one record. A log cut by a kill is salvaged by the caller's choice, never silently.
    """
    size = path.stat().st_size
    if size % APP_LOG_STRUCT.size:
        raise FormatError(
            "application log is cut",
            where=str(path),
            found=f"{size} bytes",
            expected=f"a multiple of {APP_LOG_STRUCT.size}",
            do="Record the run again; its ground truth is incomplete.",
        )
    return np.fromfile(path, np.dtype(list(APP_LOG_FIELDS)))


def message_of_packets(pcap: Path, offset: np.ndarray, payload_offset: np.ndarray, caplen: np.ndarray) -> np.ndarray:
    """Return the sequence number of the built-in workload's message at the start of each packet's payload, -1 where none.

    Parameters
    ----------
    offset : int64 array, dims (packet,)
        File offset of each packet's bytes.
    payload_offset, caplen : integer arrays, dims (packet,)
    """
    content = np.memmap(pcap, np.uint8, mode="r")
    room = (payload_offset >= 0) & (offset >= 0) & (payload_offset.astype(np.int64) + MESSAGE_HEADER.size <= caplen)
    start = np.where(room, offset + payload_offset, 0)
    room &= start + MESSAGE_HEADER.size <= len(content)
    header = (
        content[np.where(room, start, 0)[:, None] + np.arange(MESSAGE_HEADER.size)[None, :]] if room.any() else None
    )
    if header is None:
        return np.full(len(offset), -1, np.int64)
    fields = np.ascontiguousarray(header).view(
        np.dtype([("magic", "<u4"), ("flow", "<i4"), ("seq", "<i8"), ("sent", "<i8")])
    )[:, 0]
    return np.where(room & (fields["magic"] == MESSAGE_MAGIC), fields["seq"], -1)


def verify_join(
    joined: Joined,
    app_log: np.ndarray | None,
    *,
    messages: np.ndarray | None = None,
    counters: dict[str, Any] | None = None,
    events: Mapping[str, Columns] | None = None,
) -> dict[str, Any]:
    """Compare a join with the workload's log and with the counters.

    Parameters
    ----------
    joined : Joined
    app_log : structured array, dims (call,), or None
        As :func:`read_app_log` gives it. Without it only what needs no truth is reported.
    messages : int64 array, dims (packet,), optional
        :func:`message_of_packets` of the joined rows; identifies UDP datagrams.
    counters : dict, optional
        The ``difference`` part of counters.json.
    events : mapping of str to Columns, optional
        The recording itself, whose interrupts and softirqs the kernel counted too.

    Returns
    -------
    dict
        ``checked, complete, misjoined, trusted, flagged, data_packets, t1_minus_exit_ns, scm_minus_pcap_ns, byte_sums_equal,
        counters_agree, verdict, reasons, statuses, left_out`` (data packets that statistics do not use, by status); what could not be checked is None.
    """
    columns = joined.packets
    names = np.asarray(STATUSES)[columns["status"]]
    counted = columns["is_data"] & ~np.isin(names, NOT_COUNTED)
    result: dict[str, Any] = {
        "checked": 0,
        "complete": float((names[counted] == "complete").mean()) if counted.any() else 0.0,
        "misjoined": None,
        "trusted": int(columns["trusted"].sum()),
        "flagged": int((counted & np.isin(names, FLAGGED)).sum()),
        "data_packets": int(counted.sum()),
        "t1_minus_exit_ns": None,
        "scm_minus_pcap_ns": None,
        "byte_sums_equal": bool(joined.gates["bytes"]["ok"]) if "bytes" in joined.gates else None,
        "counters_agree": _compare_counters(joined, counters, events or {}),
        "verdict": joined.verdict,
        "reasons": list(joined.reasons),
        "statuses": _counts(names),
        "left_out": _counts(names[columns["is_data"] & ~((names == "complete") & columns["trusted"])]),
    }
    if app_log is not None and len(app_log):
        call = calls_of_packets(joined, app_log, messages)
        _judge_calls(result, joined, app_log, call)
        result["byte_sums_equal"] = bool(result["byte_sums_equal"]) and _log_sums_equal(joined, app_log)
    return _with_judges(result)


def _counts(names: np.ndarray) -> dict[str, int]:
    """Count statuses, in the order of their table."""
    return {name: int((names == name).sum()) for name in STATUSES if (names == name).any()}


def _with_judges(result: dict[str, Any]) -> dict[str, Any]:
    """Take back a verdict of "trusted" that a judge contradicts."""
    counters = result["counters_agree"]
    against = {
        f"{result['misjoined']} packets joined to another call than the log says": bool(result["misjoined"]),
        "bytes read differ from bytes on the wire": result["byte_sums_equal"] is False,
        "the kernel's counters do not agree with the join": counters is not None and not counters["ok"],
    }
    reasons = [reason for reason, holds in against.items() if holds]
    if reasons and result["verdict"] == "trusted":
        result["verdict"] = "degraded"
    result["reasons"] += reasons
    return result


def calls_of_packets(joined: Joined, app_log: np.ndarray, messages: np.ndarray | None) -> np.ndarray:
    """Return the log row of the call that truly returned each packet's last byte, -1 where the log does not say.

    TCP by cumulative bytes of the connection, UDP by the message number in the payload.
    """
    columns = joined.packets
    call = np.full(columns.n, -1, np.int64)
    group_of_call, group_of_flow = _connections(joined, app_log)
    group = np.where(columns["is_data"] & (columns["flow"] >= 0), pick(group_of_flow, columns["flow"], -1), -1)
    streams = np.flatnonzero((group >= 0) & (columns["proto"] == TCP))
    call[streams] = _stream_calls(columns, streams, group[streams], app_log, group_of_call)
    if messages is not None:
        datagrams = np.flatnonzero((group >= 0) & (columns["proto"] == UDP) & (messages >= 0))
        # A message that the network doubled was read twice, and the log does not say which call had which.
        same = np.stack([group[datagrams], messages[datagrams]])
        _, number, count = np.unique(same, axis=1, return_inverse=True, return_counts=True)
        datagrams = datagrams[count[number.reshape(-1)] == 1]
        call[datagrams] = _datagram_calls(messages[datagrams], group[datagrams], app_log, group_of_call)
    return call


def _connections(joined: Joined, app_log: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number the connections of the log; return the number of each call and of each flow (-1: none).

    A call is on the flow of its protocol and ports; of several that used the same ports one after the other, on the last that had begun
    when it returned.
    """
    of_call = [app_log[name].astype(np.int64) for name in ("proto", "local_port", "peer_port")]
    ports_of_flow = [joined.flows[name].astype(np.int64) for name in ("proto", "dport", "sport")]
    key, flow_key = (proto << 32 | local << 16 | peer for proto, local, peer in (of_call, ports_of_flow))
    known, of_ports = np.unique(key, return_inverse=True)
    at = np.minimum(np.searchsorted(known, flow_key), len(known) - 1)
    mine = np.flatnonzero(known[at] == flow_key)
    mine = mine[np.argsort(at[mine], kind="stable")]
    again = np.unique(at[mine][1:][np.diff(at[mine]) == 0])
    ahead = np.zeros(len(of_ports), np.int64)
    if len(again):
        began = np.full(len(flow_key), np.iinfo(np.int64).max, np.int64)
        flow, stamp = joined.packets["flow"], joined.clock.to_monotonic(joined.packets["pcap_time"])
        np.minimum.at(began, flow[flow >= 0], stamp[flow >= 0])
        mine = mine[np.lexsort((began[mine], at[mine]))]
        for ports in again.tolist():
            calls, begins = np.flatnonzero(of_ports == ports), began[mine[at[mine] == ports]]
            ahead[calls] = np.maximum(np.searchsorted(begins, app_log["t1"][calls], side="right") - 1, 0)
    has_flow = np.isin(of_ports, at[mine])
    row = np.where(has_flow, np.searchsorted(at[mine], of_ports) + ahead, -1)
    group = np.where(has_flow, pick(mine, row, 0), len(flow_key) + of_ports)
    of_flow = np.full(len(flow_key), -1, np.int64)
    of_flow[mine] = mine
    return group, of_flow


def _stream_calls(
    columns: Columns, rows: np.ndarray, group: np.ndarray, app_log: np.ndarray, group_of_call: np.ndarray
) -> np.ndarray:
    """Return the log row that returned the last byte of each TCP packet, by cumulative bytes of its connection."""
    log = np.flatnonzero((app_log["ret"] > 0) & (app_log["proto"] == TCP))
    if not len(log) or not len(rows):
        return np.full(len(rows), -1, np.int64)
    # Several threads may call at once, and return in another order than they called: message numbers, where every call
    # begins with a message, tell the order of the stream.
    unnumbered = np.bincount(group_of_call[log], weights=app_log["seq"][log] < 0, minlength=group_of_call.max() + 1)
    order = np.where(unnumbered[group_of_call[log]] == 0, app_log["seq"][log], app_log["t0"][log])
    log = log[np.lexsort((order, group_of_call[log]))]
    owner, returned = group_of_call[log], app_log["ret"][log].astype(np.int64)
    heads = np.flatnonzero(np.diff(owner, prepend=-1))
    before = np.cumsum(returned) - returned
    end = before + returned - before[heads][np.searchsorted(heads, np.arange(len(log)), side="right") - 1]
    position = columns["position"][rows]
    first = np.full(columns["flow"].max() + 1, np.iinfo(np.int64).max, np.int64)
    np.minimum.at(first, columns["flow"][rows], position)
    last_byte = position - first[columns["flow"][rows]] + columns["payload_len"][rows] - 1
    wanted = group * _STREAM_ROOM + np.clip(last_byte, 0, _STREAM_ROOM - 1)
    at = np.searchsorted(owner * _STREAM_ROOM + np.minimum(end, _STREAM_ROOM - 1), wanted, side="right")
    found = np.minimum(at, len(log) - 1)
    return np.where((at < len(log)) & (owner[found] == group), log[found], -1)


def _datagram_calls(
    messages: np.ndarray, group: np.ndarray, app_log: np.ndarray, group_of_call: np.ndarray
) -> np.ndarray:
    """Return the log row that returned each datagram, by its message number."""
    log = np.flatnonzero((app_log["proto"] == UDP) & (app_log["seq"] >= 0))
    if not len(log):
        return np.full(len(messages), -1, np.int64)
    key = group_of_call[log] * _STREAM_ROOM + app_log["seq"][log]
    order = np.argsort(key, kind="stable")
    wanted = group * _STREAM_ROOM + messages
    at = np.minimum(np.searchsorted(key[order], wanted), len(log) - 1)
    return np.where(key[order][at] == wanted, log[order[at]], -1)


def _judge_calls(result: dict[str, Any], joined: Joined, app_log: np.ndarray, call: np.ndarray) -> None:
    """Fill the counts that compare joined calls with true ones."""
    columns = joined.packets
    returned = joined.time[:, _RECV]
    # Rows that say of themselves that they cannot be trusted are counted as flagged, not as checked.
    checked = (call >= 0) & columns["trusted"]
    names = np.asarray(STATUSES)[columns["status"]]
    rows = np.flatnonzero(checked)
    truth = app_log[call[rows]]
    right = (truth["t0"] <= returned[rows]) & (returned[rows] <= truth["t1"]) & (truth["tid"] == columns["tid"][rows])
    result["checked"] = len(rows)
    # A datagram that was dropped is not one that somebody read. (A dropped segment's bytes are: they are sent again.)
    dropped = (names == "dropped") & (columns["proto"] == UDP) & columns["is_data"]
    resurrected = np.flatnonzero(dropped & (call >= 0))
    wrong = np.sort(np.concatenate([rows[~right], resurrected]))
    result["dropped_but_read"], result["misjoined"] = len(resurrected), len(wrong)
    result["misjoined_frames"] = columns["pcap_frame"][wrong][:20].tolist()
    if len(rows):
        result["t1_minus_exit_ns"] = _quantiles(truth["t1"][right] - returned[rows][right])
    stamped = (truth["scm_time"] > 0) & (columns["proto"][rows] == UDP)
    if stamped.any():
        difference = truth["scm_time"][stamped] - columns["pcap_time"][rows[stamped]]
        result["scm_minus_pcap_ns"] = {**_quantiles(difference), "equal": int((difference == 0).sum())}


def _quantiles(values: np.ndarray) -> dict[str, int]:
    if not len(values):
        return {"n": 0}
    low, middle, high = np.percentile(values - values[0], [1, 50, 99]) + values[0]
    return {"n": len(values), "p1": int(low), "p50": int(middle), "p99": int(high)}


def _log_sums_equal(joined: Joined, app_log: np.ndarray) -> bool:
    """Tell whether the bytes the log says were returned equal the payload of the packets that carried them."""
    columns = joined.packets
    names = np.asarray(STATUSES)[columns["status"]]
    group_of_call, group_of_flow = _connections(joined, app_log)
    group = pick(group_of_flow, np.maximum(columns["flow"], -1), -1)
    owners = columns["is_data"] & ~np.isin(names, ("duplicate", "dropped")) & (group >= 0)
    # A datagram left in the queue of a socket whose owner went away is in no log; of a segment some bytes may have been read.
    owners &= ~((names == "no_reader") & (columns["proto"] == UDP))
    rows = np.flatnonzero(owners)
    n_groups = group_of_call.max() + 1
    length, is_stream = columns["payload_len"][rows].astype(np.int64), columns["proto"][rows] == TCP
    stream_bytes = distinct_bytes(columns["flow"][rows], columns["position"][rows], length, joined.flows.n)
    wire = np.bincount(group[rows[~is_stream]], weights=length[~is_stream], minlength=n_groups)
    is_stream_flow = (joined.flows["proto"] == TCP) & (group_of_flow >= 0)
    np.add.at(wire, group_of_flow[is_stream_flow], stream_bytes[is_stream_flow])
    read = np.bincount(group_of_call, weights=np.maximum(app_log["ret"], 0), minlength=n_groups)
    seen = np.zeros(n_groups, bool)
    seen[group[rows]] = True
    return bool((wire[seen] == read[seen]).all())


def _compare_counters(
    joined: Joined, counters: dict[str, Any] | None, events: Mapping[str, Columns]
) -> dict[str, Any] | None:
    """Compare counter differences with what was joined and recorded.

    ``received_rps`` and ``processed`` of softnet_stat with the joined IPIs and packets; NET_RX softirqs per CPU and interrupts
    per line with the events of the recording, which may not show more than the kernel counted.
    """
    rows = (counters or {}).get("softnet_stat") or []
    if not counters or not rows:
        return None
    counted = sum(int(row.get("received_rps", 0)) for row in rows)
    arrivals = joined.time[:, STAGE_INDEX["rps_ipi"]]
    # Several packets can share one IPI: distinct arrivals are what received_rps counts.
    seen = len(np.unique(arrivals[arrivals != NAT]))
    slack = max(COUNTER_SLACK_MIN, int(COUNTER_SLACK * counted)) + _in_blind_windows(joined, counted)
    processed = sum(int(row.get("processed", 0)) for row in rows)
    received = int((joined.time[:, STAGE_INDEX["netif_receive_skb"]] != NAT).sum())
    result: dict[str, Any] = {
        "ok": seen <= counted and counted - seen <= slack and received <= processed,
        "received_rps": {"counter": counted, "joined": seen},
        "processed": {"counter": processed, "joined": received},
    }
    for name, (agrees, figures) in _compare_interrupts(counters, events).items():
        result[name] = figures
        result["ok"] = result["ok"] and agrees
    return result


def _in_blind_windows(joined: Joined, counted: int) -> int:
    """Return how many of the counted IPIs may have come while perf was blind: its packets are linked to none, the kernel counts on."""
    stack = joined.time[:, STAGE_INDEX["netif_receive_skb"]]
    stack = stack[stack != NAT]
    blind = int(joined.gates.get("blind", {}).get("window_ns", 0))
    if not blind or not len(stack):
        return 0
    return min(counted, counted * blind // max(int(stack.max() - stack.min()), 1))


def _compare_interrupts(
    counters: dict[str, Any], events: Mapping[str, Columns]
) -> dict[str, tuple[bool, dict[str, int]]]:
    """Compare softirqs and interrupts counted by the kernel with the recorded ones: whether they agree, and both sums."""
    found: dict[str, tuple[bool, dict[str, int]]] = {}
    softirq, handler = (event_columns(events, name) for name in ("irq:softirq_entry", "irq:irq_handler_entry"))
    net_rx = (counters.get("softirqs") or {}).get("NET_RX")
    if softirq.n and net_rx:
        recorded = np.bincount(softirq["cpu"][softirq["vec"] == NET_RX_VEC], minlength=len(net_rx))
        enough = recorded.sum() >= NET_RX_SEEN * sum(net_rx) - COUNTER_SLACK_MIN
        agrees = len(recorded) == len(net_rx) and bool((recorded <= net_rx).all()) and bool(enough)
        found["net_rx"] = agrees, {"counter": int(sum(net_rx)), "events": int(recorded.sum())}
    lines = counters.get("interrupts") or {}
    if handler.n and lines:
        recorded = np.bincount(handler["irq"])
        told = {int(irq): sum(line["cpus"]) for irq, line in lines.items() if str(irq).isdigit()}
        shared = [(told[irq], int(n)) for irq, n in enumerate(recorded) if n and irq in told]
        figures = {"counter": sum(n for n, _ in shared), "events": sum(n for _, n in shared)}
        found["irqs"] = all(n <= counter * MAX_ACTIONS for counter, n in shared), figures
    return found
