"""A second observer inside the kernel: bpftrace, on the same tracepoints as perf but reading the buffers themselves.

At ``netif_receive_skb`` it reads the packet's own number out of the skb (UDP: the message's sequence number in the payload; TCP:
the sequence number of the segment), at ``skb_copy_datagram_iovec`` the stretch of the stream the skb holds, and at
``sock_recv_length`` who received how much on which connection. Its handlers run before perf's on the same hit of the
tracepoint, so each of its records comes a few microseconds before the perf event it belongs to (alignment.md 3).

A program on a tracepoint stands before perf's events of it (``perf_trace_run_bpf_submit``: no result, no event), and a program
that interrupts another on its CPU does not run: receiving in a softirq during a program of the reader's hid 5 to 13 % of the
packets from perf, without a LOST record. So it watches the softirq's half ("links") or the reader's ("calls"), never both.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from rxlab.follow.clockfit import NAT
from rxlab.follow.join import Joined
from rxlab.read.columns import Columns
from rxlab.rundir import APP_LOG_FIELDS
from rxlab.stages import STAGE_INDEX, STATUSES

# struct iphdr: protocol at 9; TCP: sequence number at 4; UDP: payload at 8, whose message has its number at 8. Stream offsets:
# skb->len is what the TCP header's sequence number is followed by, at the time of a copy.
BEGIN = 'BEGIN {{ printf("ready\\n"); }}'
PROGRAMS = {
    "links": """
tracepoint:net:netif_receive_skb /str(args->name) == "{iface}"/ {{
  $skb = (struct sk_buff *)args->skbaddr;
  $ip = (uint8 *)$skb->data;
  if (*$ip >> 4 == 4) {{
    $th = $ip + (*$ip & 15) * 4;
    if (*($ip + 9) == 6) {{ printf("R %llu %d %llx %u\\n", nsecs, cpu, (uint64)args->skbaddr, bswap(*(uint32 *)($th + 4))); }}
    if (*($ip + 9) == 17) {{ printf("R %llu %d %llx %u\\n", nsecs, cpu, (uint64)args->skbaddr, *(uint32 *)($th + 16)); }}
  }}
}}
""",
    "calls": """
tracepoint:skb:skb_copy_datagram_iovec {{
  $skb = (struct sk_buff *)args->skbaddr;
  $seq = bswap(*(uint32 *)($skb->head + $skb->transport_header + 4));
  printf("C %llu %d %llx %u %u\\n", nsecs, tid, (uint64)args->skbaddr, $seq, $skb->len);
}}
tracepoint:sock:sock_recv_length /args->family == 2 && args->ret > 0 && (args->flags & 2) == 0/ {{
  $sk = (struct sock *)args->sk;
  printf("L %llu %d %d %d %d %d\\n", nsecs, tid, args->ret, args->protocol,
    $sk->__sk_common.skc_num, bswap($sk->__sk_common.skc_dport));
}}
""",
}
START_SECONDS = 30.0


@contextmanager
def watching(half: str, iface: str, out: Path) -> Iterator[None]:
    """Let bpftrace write what it sees of one half to `out` while the block runs."""
    argv = ["bpftrace", "-B", "line", "-e", (BEGIN + PROGRAMS[half]).format(iface=iface)]
    environment = {"BPFTRACE_PERF_RB_PAGES": "16384", "PATH": "/usr/sbin:/usr/bin:/sbin:/bin"}
    with out.open("wb") as stream:
        process = subprocess.Popen(argv, stdout=stream, stderr=subprocess.STDOUT, env=environment)
        try:
            deadline = time.monotonic() + START_SECONDS
            while b"ready" not in out.read_bytes():
                assert process.poll() is None, out.read_text(errors="replace")
                assert time.monotonic() < deadline, "bpftrace did not start"
                time.sleep(0.05)
            yield
        finally:
            process.terminate()
            process.wait(30)


class Seen:
    """What the witness wrote: ``received`` (time, cpu, skbaddr, number), ``copied`` (time, tid, skbaddr, seq, len), ``calls``
    (time, tid, ret, proto, local, peer); int64 arrays with one row per record."""

    def __init__(self, path: Path) -> None:
        rows: dict[str, list[list[int]]] = {"R": [], "C": [], "L": []}
        hexadecimal = {"R": 2, "C": 2, "L": -1}
        for line in path.read_text(errors="replace").splitlines():
            kind, *fields = line.split() or [""]
            assert kind != "Lost", line
            if kind in rows:
                base = hexadecimal[kind]
                rows[kind].append([int(f, 16) if at == base else int(f) for at, f in enumerate(fields)])
        wide = {"R": 4, "C": 5, "L": 6}
        # Kernel addresses are above the largest int64: they wrap, as perf's are made to.
        tables = {
            kind: np.array(found, np.uint64).reshape(-1, wide[kind]).view(np.int64) for kind, found in rows.items()
        }
        self.received, self.copied, self.calls = tables["R"], tables["C"], tables["L"]

    def app_log(self) -> np.ndarray:
        """Return the receive calls as a log like the workload's own: each between its record and the same task's next."""
        calls = self.calls[np.lexsort((self.calls[:, 0], self.calls[:, 1]))]
        log = np.zeros(len(calls), np.dtype(list(APP_LOG_FIELDS)))
        same = np.append(calls[1:, 1] == calls[:-1, 1], False)
        log["t0"] = calls[:, 0]
        log["t1"] = np.where(same, np.append(calls[1:, 0], 0), np.iinfo(np.int64).max)
        for at, name in enumerate(("tid", "ret", "proto", "local_port", "peer_port"), start=1):
            log[name] = calls[:, at]
        log["seq"] = -1
        return log


def judge(joined: Joined, events: Mapping[str, Columns], seen: Seen, numbers: np.ndarray) -> dict[str, Any]:
    """Hold the middle links of a join against the witness.

    Parameters
    ----------
    joined : Joined
    events : mapping of str to Columns
    seen : Seen
    numbers : int64 array, dims (packet,)
        What the witness should have read in each packet: the message's number (UDP) or the sequence number (TCP).

    Returns
    -------
    dict
        ``links_checked, links_wrong`` (packet <-> skb at netif_receive_skb), ``copies_checked, copies_wrong`` (the copy is from
        an skb that holds the packet's bytes).
    """
    status = np.asarray(STATUSES)[joined.packets["status"]]
    usable = joined.packets["is_data"] & np.isin(status, ("complete", "dropped", "no_reader", "incomplete"))
    rx_time = joined.time[:, STAGE_INDEX["netif_receive_skb"]]
    rows = np.flatnonzero(usable & (rx_time != NAT))
    at = _record_of(
        joined.packets["skb"][rows].view(np.int64),
        rx_time[rows],
        seen.received[:, 2],
        seen.received[:, 0],
        events["net:netif_receive_skb"],
    )
    found = at >= 0
    wrong = seen.received[at[found], 3] != (numbers[rows[found]] & 0xFFFFFFFF)
    result = {"links_checked": int(found.sum()), "links_wrong": int(wrong.sum())}
    copy_time = joined.time[:, STAGE_INDEX["copy"]]
    rows = np.flatnonzero(usable & (copy_time != NAT))
    if not len(rows) or not len(seen.copied):
        return result | {"copies_checked": 0, "copies_wrong": 0}
    event = events["skb:skb_copy_datagram_iovec"]
    order = np.argsort(event["time"], kind="stable")
    first = np.searchsorted(event["time"][order], copy_time[rows])
    # Two CPUs may copy in the same nanosecond.
    others = event["cpu"][order[first]] != joined.cpu[rows, STAGE_INDEX["copy"]]
    taken = order[np.where(others, np.minimum(first + 1, len(order) - 1), first)]
    at = _record_of(
        event["skbaddr"][taken].astype(np.uint64).view(np.int64),
        copy_time[rows],
        seen.copied[:, 2],
        seen.copied[:, 0],
        event,
    )
    found = at >= 0
    begin, length = seen.copied[at[found], 3], seen.copied[at[found], 4]
    offset = (joined.packets["seq"][rows[found]].astype(np.int64) - begin) & 0xFFFFFFFF
    wrong = offset >= length
    return result | {"copies_checked": int(found.sum()), "copies_wrong": int(wrong.sum())}


def _record_of(
    address: np.ndarray, time_ns: np.ndarray, seen_address: np.ndarray, seen_time: np.ndarray, event: Columns
) -> np.ndarray:
    """Return the witness's record of each of perf's events, by address and time; -1 where it has none.

    The program runs before perf's, so it is the last record of the address before the event. Where perf has an earlier event of
    the address after that record, the record is that event's, and the witness missed this one (it does, where an interrupt's
    program ran inside it).
    """
    if not len(seen_time):
        return np.full(len(time_ns), -1, np.int64)
    record = _last_before(address, time_ns, seen_address, seen_time)
    perf_address = event["skbaddr"].astype(np.uint64).view(np.int64)
    earlier = _last_before(address, time_ns - 1, perf_address, event["time"])
    taken = (record >= 0) & (earlier >= 0) & (event["time"][earlier] >= seen_time[record])
    return np.where(taken, -1, record)


def _last_before(
    address: np.ndarray, time_ns: np.ndarray, known_address: np.ndarray, known_time: np.ndarray
) -> np.ndarray:
    """Return the last known row of each address up to each time; -1 where there is none."""
    order = np.lexsort((known_time, known_address))
    key = np.stack([known_address[order], known_time[order]], axis=1)
    merged = np.concatenate([key, np.stack([address, time_ns], axis=1)])
    ranked = np.lexsort((merged[:, 1], merged[:, 0]))
    is_known = ranked < len(key)
    last = np.maximum.accumulate(np.where(is_known, np.arange(len(ranked)), -1))
    found = np.full(len(merged), -1, np.int64)
    found[ranked] = np.where(last >= 0, ranked[np.maximum(last, 0)], -1)
    found = found[len(key) :]
    good = found >= 0
    good[good] = key[found[good], 0] == address[good]
    return np.where(good, order[np.maximum(found, 0)], -1)
