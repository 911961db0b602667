"""Small synthetic joins of known latencies: the planted truth of the dataset tests.

A look-alike of ``rxlab.follow.join.Joined`` made from a table of step latencies per packet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import xarray as xr

from rxlab.read.columns import Columns
from rxlab.stages import ATTRIBUTIONS, ORDER, PATH_KINDS, READER_KINDS, STAGE_INDEX, STAGE_NAMES, STATUSES

NAT = np.iinfo(np.int64).min
OFFSET = 1_790_000_000_123_456_789  # CLOCK_REALTIME - CLOCK_MONOTONIC
START = 5_000_000_000_001  # CLOCK_MONOTONIC of the first packet

# Median step latencies in ns by path kind, in that kind's order of stages; the first stage has none.
STEPS: dict[str, dict[str, float]] = {
    "backlog": {
        "driver_rx": 0, "softirq_raise": 700, "softirq": 900, "netif_receive_skb": 1200, "tcp_rcv": 900, "data_ready": 800,
        "waking": 700, "wakeup": 900, "switch_in": 1500, "copy": 2100, "recvmsg": 900,
    },
    "backlog_rps": {
        "driver_rx": 0, "softirq_raise": 700, "softirq": 900, "rps_ipi": 2500, "netif_receive_skb": 1900, "tcp_rcv": 900,
        "data_ready": 800, "waking": 700, "wakeup": 900, "switch_in": 1500, "copy": 2100, "recvmsg": 900,
    },
    "napi": {
        "hardirq": 0, "softirq_raise": 1082, "softirq": 1392, "driver_rx": 900, "netif_receive_skb": 800, "tcp_rcv": 900,
        "data_ready": 800, "waking": 700, "wakeup": 900, "switch_in": 1500, "copy": 2100, "recvmsg": 900,
    },
}  # fmt: skip


def make_joined(
    n: int = 400,
    *,
    path_kind: str = "backlog",
    steps: Mapping[str, float] | None = None,
    spread: float = 0.2,
    seed: int = 1,
    gap_ns: int = 50_000,
    lost_rows: Sequence[int] = (),
    cpus: tuple[int, int] = (0, 1),
) -> SimpleNamespace:
    """Return a join of `n` data packets whose step latencies are log-normal around `steps`, whole nanoseconds.

    ``lost_rows`` are packets whose stages from `data_ready` on were not seen. ``joined.truth`` keeps the planted steps,
    int64, dims (packet, stage).
    """
    rng = np.random.default_rng(seed)
    medians = {**STEPS[path_kind], **(steps or {})}
    order = [name for name in ORDER[path_kind] if name in medians]
    time = np.full((n, len(STAGE_NAMES)), NAT)
    truth = np.zeros((n, len(STAGE_NAMES)), np.int64)
    now = START + np.arange(n, dtype=np.int64) * gap_ns + rng.integers(0, gap_ns // 4, n)
    for name in order:
        step = np.rint(medians[name] * np.exp(spread * rng.standard_normal(n))).astype(np.int64)
        now = now + step
        time[:, STAGE_INDEX[name]] = now
        truth[:, STAGE_INDEX[name]] = step
    cpu = np.where(time == NAT, -1, cpus[0]).astype(np.int16)
    for name in ("switch_in", "copy", "recvmsg", "wakeup") + (
        ("netif_receive_skb", "tcp_rcv", "data_ready") if "rps" in path_kind else ()
    ):
        cpu[:, STAGE_INDEX[name]] = cpus[1]
    status = np.full(n, STATUSES.index("complete"), np.int8)
    lost = np.asarray(lost_rows, np.int64)
    for name in ("data_ready", "waking", "wakeup", "switch_in", "copy", "recvmsg"):
        time[lost, STAGE_INDEX[name]] = NAT
        cpu[lost, STAGE_INDEX[name]] = -1
    status[lost] = STATUSES.index("lost")
    return SimpleNamespace(
        time=time,
        cpu=cpu,
        packets=_packets(n, path_kind, order[0], time, cpu, status, lost, cpus),
        flows=_flows(),
        coverage=_coverage(time, order, lost),
        clock=make_clock(),
        gates={"order": {"ok": True, "violations": 0}, "bytes": {"ok": True, "violations": 0}},
        verdict="trusted",
        reasons=[],
        truth=truth,
        order=order,
    )


def make_clock() -> SimpleNamespace:
    """Return a clock map of one segment with a 25 ns bound."""
    segments = Columns({"start_real": np.array([NAT]), "offset": np.array([OFFSET])})
    residual = {0.0: 380.0, 0.01: 391.0, 0.5: 402.0, 0.99: 455.0, 1.0: 600.0}
    return SimpleNamespace(
        segments=segments,
        bound_ns=25,
        residual=residual,
        stamp_position="bracket",
        offset_ns=OFFSET,
        method="readings",
        flags=(),
        perf_clock="CLOCK_MONOTONIC",
        leap_s=None,
        nic_offset_ns=None,
    )


def _packets(
    n: int,
    path_kind: str,
    first: str,
    time: np.ndarray,
    cpu: np.ndarray,
    status: np.ndarray,
    lost: np.ndarray,
    cpus: tuple[int, int],
) -> Columns:
    reader = np.full(n, cpus[1], np.int16)
    reader[lost] = -1
    tid = np.where(reader >= 0, 4242, -1).astype(np.int32)
    attribution = np.where(reader >= 0, ATTRIBUTIONS.index("own_wake"), 0).astype(np.int8)

    def full(value: Any, dtype: Any) -> np.ndarray:
        return np.full(n, value, dtype)

    arrays = {
        "flow": (np.arange(n) % 2).astype(np.int32),
        "direction": full(0, np.int8),
        "wire_len": full(130, np.uint32),
        "payload_len": full(64, np.int32),
        "seq": (np.arange(n) * 64).astype(np.uint32),
        "skb": (0xFFFF_8880_0000_0000 + np.arange(n, dtype=np.uint64) % 16 * 256).astype(np.uint64),
        "socket": full(0xFFFF_8881_0000_0040, np.uint64),
        "tid": tid,
        "comm": np.where(reader >= 0, 0, -1).astype(np.int32),
        "rx_queue": full(0, np.int16),
        "rps_cpu": full(cpus[1] if "rps" in path_kind else -1, np.int16),
        "waker_cpu": np.where(reader >= 0, cpu[:, STAGE_INDEX["waking"]], -1).astype(np.int16),
        "reader_cpu": reader,
        "gro_segments": full(1, np.int16),
        "pcap_time": time[:, STAGE_INDEX[first]] + OFFSET + 402,
        "pcap_frame": np.arange(1, n + 1, dtype=np.int64),
        "path_kind": full(PATH_KINDS.index(path_kind), np.int8),
        "t0_stage": full(STAGE_INDEX[first], np.int8),
        "attribution": attribution,
        "status": status,
        "is_data": full(True, bool),
        "trusted": reader >= 0,
        "last_read_cpu": np.where(reader >= 0, cpus[1], -1).astype(np.int16),
        "sleep_time": np.where(reader >= 0, time[:, STAGE_INDEX[first]] - 7_000, NAT),
        "sleep_cpu": reader.copy(),
        "handshake": full(0, np.int8),
        "forwards": full(0, np.int8),
        "established_time": full(NAT, np.int64),
        "accept_time": full(NAT, np.int64),
        "reader_kind": np.where(reader >= 0, READER_KINDS.index("syscall"), 0).astype(np.int8),
        "skb_hash": full(0x40000000, np.int64),
        "l4_hash": full(1, np.int8),
        "drop_reason": full(0, np.int16),
    }
    return Columns(arrays, {"categories": {"comm": ["rx server"], "drop_reason": ["none", "SOCKET_RCVBUFF"]}})


def _flows() -> Columns:
    arrays = {
        "ip_version": np.array([4, 6], np.uint8),
        "src_hi": np.array([0, 0xFD00 << 48], np.uint64),
        "src_lo": np.array([0x0A000001, 1], np.uint64),
        "dst_hi": np.array([0, 0xFD00 << 48], np.uint64),
        "dst_lo": np.array([0x0A000002, 2], np.uint64),
        "sport": np.array([40000, 40001], np.uint16),
        "dport": np.array([7000, 7000], np.uint16),
        "proto": np.array([6, 6], np.uint8),
    }
    return Columns(arrays, {"labels": ["10.0.0.1:40000>10.0.0.2:7000 tcp", "[fd00::1]:40001>[fd00::2]:7000 tcp"]})


def _coverage(time: np.ndarray, order: Sequence[str], lost: np.ndarray) -> Columns:
    arrays = {name: np.zeros(len(STAGE_NAMES), np.int64) for name in ("expected", "matched", "doubtful", *STATUSES)}
    for name in order:
        stage = STAGE_INDEX[name]
        arrays["expected"][stage] = len(time)
        arrays["matched"][stage] = int((time[:, stage] != NAT).sum())
        arrays["lost"][stage] = len(time) - arrays["matched"][stage]
        arrays["doubtful"][stage] = arrays["lost"][stage]
    return Columns(arrays)


def plant_steering(tree: xr.DataTree, delivered: int, elsewhere: int, on_target: int, off_target: int) -> xr.DataTree:
    """Return the tree with so many data packets delivered by RFS and not, and on and off the RPS target; of the rest nothing is known."""
    packets = tree["packets"].to_dataset().load()
    rows = np.flatnonzero(packets["is_data"].values)
    stack = packets["cpu"].sel(stage="netif_receive_skb").values[rows]
    flags, target = np.full(packets.sizes["packet"], -1, np.int8), np.full(packets.sizes["packet"], -1, np.int16)
    flags[rows[:delivered]], flags[rows[delivered : delivered + elsewhere]] = 1, 0
    target[rows[:on_target]] = stack[:on_target]
    target[rows[on_target : on_target + off_target]] = 1 - stack[on_target : on_target + off_target]
    packets["rfs_delivered"].values[:], packets["rps_predicted"].values[:] = flags, target
    tree["packets"].dataset = packets
    return tree


def make_run(**changes: Any) -> dict[str, Any]:
    """Return a run.json of a traced testbed run."""
    return {
        "schema_version": 1, "status": "complete", "problems": [], "command": ["rxlab", "capture", "--testbed"],
        "testbed": {"kind": "veth"}, "iface": "rx0", "arm": "std", "workload": {"name": "pingpong", "proto": "tcp", "size": 64},
        "configuration": {"rps_cpus": "0"}, "start_ns": START + OFFSET, "stop_ns": START + OFFSET + 10**9,
        "perf": {"version": "6.1", "argv": ["perf"], "exit_code": 0, "events": [], "missing_events": [], "lost": 0},
        "tcpdump": {"version": "4.99", "argv": ["tcpdump"], "exit_code": 0, "captured": 400, "received": 400, "dropped": 0},
        "idle": {"asked": "auto", "spinners": True}, **changes,
    }  # fmt: skip


def make_host(n_cpus: int = 2) -> dict[str, Any]:
    """Return a host.json of one package whose CPUs share the last level cache."""
    cpus = [{"cpu": cpu, "core": cpu, "package": 0, "llc": 0, "node": 0, "online": True} for cpu in range(n_cpus)]
    return {
        "schema_version": 1,
        "kernel": "6.1.0",
        "hostname": "lab-machine",
        "cpus": cpus,
        "ifaces": {},
        "sysctls": {},
        "governor": "performance",
        "irqbalance": False,
    }


def make_counters() -> dict[str, Any]:
    """Return a counters.json of two CPUs."""
    softnet = [
        {"cpu": cpu, "processed": 500, "dropped": 0, "time_squeeze": 0, "received_rps": 400 * cpu} for cpu in range(2)
    ]
    times = [
        {"cpu": cpu, "user": 10_000_000, "system": 20_000_000, "idle": 900_000_000, "softirq": 5_000_000}
        for cpu in range(2)
    ]
    difference = {
        "interrupts": {"LOC": {"label": "Local timer interrupts", "cpus": [10, 12]}, "ERR": {"label": "", "cpus": [0]}},
        "softirqs": {"NET_RX": [400, 300], "TIMER": [4, 3]},
        "softnet_stat": softnet,
        "cpu_time_ns": times,
        "nstat": {"TcpInSegs": 800},
        "ethtool": {"rx0": {"rx_queue_0_xdp_packets": 0}},
    }
    return {"schema_version": 1, "before": {}, "after": {}, "difference": difference}


def make_app_logs(
    latency_ns: np.ndarray, *, flow: int = 0, round_trip_ns: np.ndarray | None = None
) -> dict[str, Columns]:
    """Return server and client logs whose one-way latencies are these, one message every 100 us."""
    latency = np.rint(np.asarray(latency_ns)).astype(np.int64)
    n = len(latency)
    sent = START + np.arange(n, dtype=np.int64) * 100_000
    server = {
        "t0": sent - 5_000, "t1": sent + latency, "seq": np.arange(n), "sent": sent, "scm_time": np.zeros(n, np.int64), "tid": np.full(n, 4242, np.int32),
        "ret": np.full(n, 64, np.int32), "flow": np.full(n, flow, np.int32),
    }  # fmt: skip
    trip = 2 * latency if round_trip_ns is None else np.rint(round_trip_ns).astype(np.int64)
    client = {
        "intended": sent.copy(),
        "sent": sent + 300,
        "replied": sent + trip,
        "seq": np.arange(n),
        "flow": np.full(n, flow, np.int32),
        "size": np.full(n, 64, np.int32),
    }
    return {"server": Columns(server), "client": Columns(client)}
