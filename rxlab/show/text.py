"""Plain text for a terminal: the life of one packet, the slowest ones, a verification."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset import schema, stats
from rxlab.errors import RxlabError, UsageError
from rxlab.show.plots import microseconds, packet_steps
from rxlab.stages import STAGE_INDEX, STAGES


def _packets(tree: xr.DataTree) -> xr.Dataset:
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
    frames = _packets(tree)["pcap_frame"].values
    rows = np.flatnonzero(frames == frame)
    if not len(rows):
        seen = frames[frames > 0]
        span = f"{seen.min()} to {seen.max()}, received packets only" if len(seen) else "no packets"
        raise UsageError("no such packet", where="--packet", found=str(frame), expected=f"a frame number of {span}")
    return int(rows[0])


def packet_life(tree: xr.DataTree, frame: int) -> str:
    """Return the life of one packet hop by hop: time, CPU, kernel function and file, and what became of it."""
    row = row_of_frame(tree, frame)
    everything = _packets(tree)
    packets = everything.isel(packet=row)

    def word(name: str) -> str:
        return schema.meanings(everything[name]).get(int(packets[name]), "?")

    flow = int(packets["flow"])
    label = str(tree["flows"].to_dataset()["label"].values[flow]) if flow >= 0 else "no flow"
    lines = [
        f"frame {frame}  {label}  {int(packets['wire_len'])} bytes on the wire, {int(packets['payload_len'])} payload",
        f"status {word('status')}, path {word('path_kind')}, reader {word('attribution')}"
        + (f", tid {int(packets['tid'])} ({word('comm')})" if int(packets["tid"]) >= 0 else ", no reader seen"),
        "",
    ]
    if int(packets["t0_stage"]) < 0 or np.isnat(packets["time"].values).all():
        return "\n".join([*lines, "No stage of this packet was seen: the status says why."])
    lines.append(f"{'since first':>12} {'this hop':>10}  cpu  {'stage':<18} kernel function (file)")
    steps = packet_steps(tree, row)
    for step in steps:
        stage = STAGES[STAGE_INDEX[step["stage"]]]
        since = step["start_ns"] + step["latency_ns"]
        lines.append(
            f"{microseconds(since):>12} {microseconds(step['latency_ns']):>10}  {step['cpu']:>3}  "
            f"{stage.name:<18} {stage.function} ({stage.source})"
        )
    lines += [
        "",
        f"{len(steps)} events recorded on this path; each cost about 0.5 to 0.7 us, which these times include.",
    ]
    return "\n".join(lines)


def slowest_packets(tree: xr.DataTree, n: int) -> str:
    """Return the `n` slowest usable packets (all, where there are fewer) and the hop that took longest in each."""
    if n < 1:
        raise UsageError("no number of packets", where="--slowest", found=str(n), expected="1 or more")
    packets, hops = _packets(tree), tree["hops"].to_dataset()
    rows = np.flatnonzero(stats.usable(packets))
    total = hops["latency"].sel(hop="total_latency").values[rows]
    rows, total = rows[~np.isnan(total)], total[~np.isnan(total)]
    chosen = np.argsort(-total, kind="stable")[:n]
    rows, total = rows[chosen], total[chosen]
    steps = hops.isel(hop=np.flatnonzero(hops["hop_kind"].values == "step"), packet=rows)
    # The step from the NIC's stamp lies before total_latency.
    latency = np.where(
        np.isnan(steps["latency"].values) | (steps["hop_from"].values == STAGE_INDEX["nic"]),
        -np.inf,
        steps["latency"].values,
    )
    worst = latency.argmax(axis=1)
    before, cpu, frames = steps["hop_from"].values, packets["cpu"].values[rows], packets["pcap_frame"].values[rows]
    lines = [f"{'frame':>9} {'total':>10}  slowest hop"]
    for at, hop in enumerate(worst.tolist()):
        stage = STAGE_INDEX[str(steps["hop"].values[hop])]
        lines.append(
            f"{frames[at]:>9} {microseconds(float(total[at])):>10}  {STAGES[int(before[at, hop])].name} -> "
            f"{STAGES[stage].name}: {microseconds(float(latency[at, hop]))} on cpu {int(cpu[at, stage])}"
        )
    return "\n".join(lines)


def verification_text(result: Mapping[str, Any]) -> str:
    """Return a verification as lines for a person."""
    lines = [
        f"verdict            {result['verdict']}" + (f" ({'; '.join(result['reasons'])})" if result["reasons"] else ""),
        f"data packets       {result['data_packets']}",
        f"complete           {result['complete']:.4f}",
        f"flagged            {result['flagged']}",
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
