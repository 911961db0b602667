"""Plain text for a terminal: the slowest packets, a verification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset import stats
from rxlab.dataset.accessor import RunAccessor
from rxlab.errors import RxlabError, UsageError
from rxlab.show.style import microseconds


def packets_of(tree: xr.DataTree) -> xr.Dataset:
    """Return /packets, refusing a run that has none."""
    if "packets" not in tree.children:
        raise RxlabError(
            "this run has no packets to show: it was recorded without trace",
            found=f"arm {tree.attrs.get('arm', 'unknown')}",
            expected="a traced run",
            do="Name a run recorded with --events std.",
        )
    return tree["packets"].to_dataset()


def row_of_frame(tree: xr.DataTree, frame: int) -> int:
    """Return the row of a packet given its frame number, as Wireshark shows it."""
    frames = packets_of(tree)["pcap_frame"].values
    rows = np.flatnonzero(frames == frame)
    if not len(rows):
        seen = frames[frames > 0]
        near = np.sort(seen[np.argsort(np.abs(seen - frame), kind="stable")[:2]]).tolist()
        span = (
            f"that of a received packet, as {' and '.join(map(str, near))}, up to {seen.max()}" if len(near) else "none"
        )
        raise UsageError("no such packet", where="--packet", found=str(frame), expected=f"a frame number, {span}")
    return int(rows[0])


def slowest_packets(tree: xr.DataTree, n: int) -> str:
    """Return the `n` slowest usable packets (all, where there are fewer) and the hop that made each slow, as lines."""
    if n < 1:
        raise UsageError("no number of packets", where="--slowest", found=str(n), expected="1 or more")
    packets_of(tree)
    found = RunAccessor(tree).slowest(n)
    lines = [f"{'frame':>9} {'total':>10}  the hop that made it slow"]
    for at in range(found.sizes["packet"]):
        one = found.isel(packet=at)
        lines.append(
            f"{int(one['frame']):>9} {microseconds(float(one['total_latency'])):>10}  {one['hop_from'].item()} -> "
            f"{one['slowest_hop'].item()}: {microseconds(float(one['hop_latency']))} on cpu {int(one['cpu'])}, "
            f"usually {microseconds(float(one['usual_latency']))}"
        )
    left = stats.left_out(packets_of(tree))
    if left:
        lines.append("left out: " + ", ".join(f"{count} {name}" for name, count in left.items()))
    return "\n".join(lines)


def verification_text(result: Mapping[str, Any]) -> str:
    """Return a verification as lines for a person."""
    lines = [
        f"verdict            {result['verdict']}" + (f" ({'; '.join(result['reasons'])})" if result["reasons"] else ""),
        f"data packets       {result['data_packets']}",
        f"complete           {result['complete']:.4f}",
        f"flagged            {result['flagged']}",
        f"trusted            {result['trusted']}",
    ]
    if result["misjoined"] is None:
        lines.append("misjoined          not checked: the run has no app.log")
    else:
        lines.append(
            f"misjoined          {result['misjoined']} of {result['checked']} checked against the application's log"
        )
    lines.append(f"byte sums equal    {_answer(result['byte_sums_equal'])}")
    counters = result["counters_agree"]
    lines.append(f"counters agree     {_answer(counters and counters['ok'])}")
    for key, text in (("t1_minus_exit_ns", "log t1 - recvmsg"), ("scm_minus_pcap_ns", "SCM - pcap stamp")):
        found = result[key]
        if found and found.get("n"):
            lines.append(f"{text:<18} p1 {found['p1']} ns, p50 {found['p50']} ns, p99 {found['p99']} ns")
    lines.append("statuses           " + ", ".join(f"{name} {n}" for name, n in result["statuses"].items()))
    return "\n".join(lines)


def _answer(value: bool | None) -> str:
    return "not checked" if value is None else "yes" if value else "NO"
