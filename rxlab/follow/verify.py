"""The join against independent judges: the workload's own log, byte sums, kernel counters.

The application log (rundir.APP_LOG_FIELDS) holds for every receive call the clock before and after it, its tid, the bytes it
returned and the message they carry. A packet joined to the wrong call misses that window by a whole inter-packet gap, which
makes it a sharp test (alignment.md section 3).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rxlab.errors import FormatError
from rxlab.follow.clockfit import NAT
from rxlab.follow.gates import distinct_bytes
from rxlab.follow.join import Joined
from rxlab.follow.status import FLAGGED, NOT_COUNTED, TCP, UDP
from rxlab.read.columns import Columns
from rxlab.rundir import APP_LOG_FIELDS, APP_LOG_STRUCT, MESSAGE_HEADER, MESSAGE_MAGIC
from rxlab.stages import STAGE_INDEX, STATUSES

_RECV = STAGE_INDEX["recvmsg"]
# Counters are the whole host's, read before perf starts and after it stops: they may only be ahead, and only by the
# handshake and by what else the host does.
COUNTER_SLACK = 0.05
COUNTER_SLACK_MIN = 64


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

    Returns
    -------
    dict
        ``checked, complete, misjoined, flagged, data_packets, t1_minus_exit_ns, scm_minus_pcap_ns, byte_sums_equal,
        counters_agree, verdict, reasons, statuses``; what could not be checked is None.
    """
    columns = joined.packets
    names = np.asarray(STATUSES)[columns["status"]]
    counted = columns["is_data"] & ~np.isin(names, NOT_COUNTED)
    result: dict[str, Any] = {
        "checked": 0,
        "complete": float((names[counted] == "complete").mean()) if counted.any() else 0.0,
        "misjoined": None,
        "flagged": int((counted & np.isin(names, FLAGGED)).sum()),
        "data_packets": int(counted.sum()),
        "t1_minus_exit_ns": None,
        "scm_minus_pcap_ns": None,
        "byte_sums_equal": bool(joined.gates["bytes"]["ok"]) if "bytes" in joined.gates else None,
        "counters_agree": _compare_counters(joined, counters),
        "verdict": joined.verdict,
        "reasons": list(joined.reasons),
        "statuses": {name: int((names == name).sum()) for name in STATUSES if (names == name).any()},
    }
    if app_log is not None and len(app_log):
        call = calls_of_packets(joined, app_log, messages)
        _judge_calls(result, joined, app_log, call)
        result["byte_sums_equal"] = bool(result["byte_sums_equal"]) and _log_sums_equal(joined, app_log, call)
    return _with_judges(result)


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
    for number in np.unique(columns["flow"][columns["is_data"]]).tolist():
        if number < 0:
            continue
        proto, local, peer = (int(joined.flows[name][number]) for name in ("proto", "dport", "sport"))
        log = np.flatnonzero(
            (app_log["proto"] == proto) & (app_log["local_port"] == local) & (app_log["peer_port"] == peer)
        )
        rows = np.flatnonzero(columns["is_data"] & (columns["flow"] == number))
        if not len(log):
            continue
        if proto == TCP:
            call[rows] = _stream_calls(columns, rows, app_log, log)
        elif proto == UDP and messages is not None:
            order = log[np.argsort(app_log["seq"][log], kind="stable")]
            at = np.minimum(np.searchsorted(app_log["seq"][order], messages[rows]), len(order) - 1)
            found = (messages[rows] >= 0) & (app_log["seq"][order][at] == messages[rows])
            call[rows] = np.where(found, order[at], -1)
    return call


def _stream_calls(columns: Columns, rows: np.ndarray, app_log: np.ndarray, log: np.ndarray) -> np.ndarray:
    """Return the log row that returned the last byte of each TCP packet, by cumulative bytes."""
    log = log[app_log["ret"][log] > 0]
    if not len(log):
        return np.full(len(rows), -1, np.int64)
    # Several threads may call at once, and return in another order than they called: message numbers, where every call
    # begins with a message, tell the order of the stream.
    order = app_log["seq"] if (app_log["seq"][log] >= 0).all() else app_log["t0"]
    log = log[np.argsort(order[log], kind="stable")]
    end = np.cumsum(app_log["ret"][log].astype(np.int64))
    position = columns["position"][rows]
    last_byte = position - position.min() + columns["payload_len"][rows] - 1
    at = np.searchsorted(end, last_byte, side="right")
    return np.where(at < len(log), log[np.minimum(at, len(log) - 1)], -1)


def _judge_calls(result: dict[str, Any], joined: Joined, app_log: np.ndarray, call: np.ndarray) -> None:
    """Fill the counts that compare joined calls with true ones."""
    columns = joined.packets
    returned = joined.time[:, _RECV]
    names = np.asarray(STATUSES)[columns["status"]]
    # Rows that say of themselves that they cannot be trusted are counted as flagged, not as checked.
    checked = (call >= 0) & (returned != NAT) & ~np.isin(names, FLAGGED) & (names != "duplicate")
    rows = np.flatnonzero(checked)
    truth = app_log[call[rows]]
    right = (truth["t0"] <= returned[rows]) & (returned[rows] <= truth["t1"]) & (truth["tid"] == columns["tid"][rows])
    result["checked"] = len(rows)
    result["misjoined"] = int((~right).sum())
    result["misjoined_frames"] = columns["pcap_frame"][rows[~right]][:20].tolist()
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


def _log_sums_equal(joined: Joined, app_log: np.ndarray, call: np.ndarray) -> bool:
    """Tell whether the bytes the log says were returned equal the payload of the packets that carried them."""
    columns = joined.packets
    names = np.asarray(STATUSES)[columns["status"]]
    owners = columns["is_data"] & ~np.isin(names, ("duplicate", "dropped"))
    seen = {
        (int(joined.flows["sport"][f]), int(joined.flows["dport"][f]))
        for f in np.unique(columns["flow"][owners])
        if f >= 0
    }
    for peer, local in seen:
        log = (app_log["peer_port"] == peer) & (app_log["local_port"] == local)
        if not log.any():
            continue
        flow = [
            f for f in range(joined.flows.n) if (joined.flows["sport"][f], joined.flows["dport"][f]) == (peer, local)
        ]
        rows = np.flatnonzero(owners & np.isin(columns["flow"], flow))
        length = columns["payload_len"][rows].astype(np.int64)
        is_stream = bool((columns["proto"][rows] == TCP).all())
        wire = distinct_bytes(columns["position"][rows], length) if is_stream else int(length.sum())
        if wire != int(np.maximum(app_log["ret"][log], 0).astype(np.int64).sum()):
            return False
    return True


def _compare_counters(joined: Joined, counters: dict[str, Any] | None) -> dict[str, Any] | None:
    """Compare counter differences with what was joined: inter-processor interrupts of RPS per softnet_stat."""
    if not counters:
        return None
    rows = counters.get("softnet_stat") or []
    if not rows:
        return None
    counted = sum(int(row.get("received_rps", 0)) for row in rows)
    arrivals = joined.time[:, STAGE_INDEX["rps_ipi"]]
    # Several packets can share one IPI: distinct arrivals are what received_rps counts.
    seen = len(np.unique(arrivals[arrivals != NAT]))
    slack = max(COUNTER_SLACK_MIN, int(COUNTER_SLACK * counted))
    processed = sum(int(row.get("processed", 0)) for row in rows)
    received = int((joined.time[:, STAGE_INDEX["netif_receive_skb"]] != NAT).sum())
    return {
        "ok": seen <= counted and counted - seen <= slack and received <= processed,
        "received_rps": {"counter": counted, "joined": seen},
        "processed": {"counter": processed, "joined": received},
    }
