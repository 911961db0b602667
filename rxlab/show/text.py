"""Plain text for a terminal: the slowest packets, a verification."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset import stats
from rxlab.dataset.accessor import RunAccessor
from rxlab.dataset.run import open_run
from rxlab.dataset.twohostschema import WAYS
from rxlab.errors import RxlabError, UsageError
from rxlab.follow.steering import reader_moves
from rxlab.show.facts import moves_text
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


def analysis_text(result: Mapping[str, Any]) -> str:
    """Return what an analysis (:func:`rxlab.pipeline.analyze_run`) came to, as lines for a person."""
    followed = f"  complete {result['complete']:.4f}  verdict {result['verdict']}" if "left_out" in result else ""
    if not followed and "one_way" not in result:
        followed = f"  verdict {result['verdict']}"
    lines = [f"dataset: {result['dataset']}  packets {result['packets']}{followed}"]
    if result.get("left_out"):
        left = ", ".join(f"{count} {name}" for name, count in result["left_out"].items())
        lines.append(f"statistics leave out {sum(result['left_out'].values())} data packets: {left}")
    lines += [f"because {reason}" for reason in result["reasons"]]
    return "\n".join([*lines, *(twohost_lines(result["one_way"]) if "one_way" in result else [])])


def twohost_lines(found: Mapping[str, Any]) -> list[str]:
    """Return what two hosts' captures say together (:func:`rxlab.dataset.twohosts.facts_of`), as lines for a person."""
    lines = []
    for way in WAYS:
        told = found[way]
        total = sum(told["packets"].values())
        if not total - told["packets"]["absent"]:
            lines.append(f"one way {way}: no packet was found where it left")
            continue
        low, high = told["median_min_ns"], told["median_max_ns"]
        median = (
            f"at least {microseconds(low)}" if high is None else f"between {microseconds(low)} and {microseconds(high)}"
        )
        kinds = ", ".join(
            f"{n:,} {name}" for name, n in told["packets"].items() if n and name not in ("absent", "matched")
        )
        lines.append(
            f"one way {way}: {total - told['packets']['absent']:,} of {total:,} packets found where they left"
            f"{f' ({kinds})' if kinds else ''}, median latency {median}; of {told['unseen']:,} that left nothing arrived"
        )
    if found["width_median_ns"] is None:
        lines.append(
            "packets of one direction only: latencies are the excess over the fastest packet's, without an upper end"
        )
    else:
        lines.append(
            f"intervals are {microseconds(found['width_median_ns'])} wide in the median, {microseconds(found['width_min_ns'])} at least: "
            + (
                "as the clocks were said to agree"
                if found["clock_error_ns"] is not None
                else "the fastest round trip is left open"
            )
        )
    drift = found["drift_ppm"]
    clocks = "how the clocks drift is not known" if drift is None else f"the clocks drift by {drift:+.3f} ppm"
    lines.append(clocks + (f"; flagged {', '.join(found['flags'])}" if found["flags"] else ""))
    return lines


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


def reader_moves_text(path: str | os.PathLike[str]) -> str:
    """Return when the readers of a traced run changed their CPU and how long packets were processed elsewhere, as lines."""
    run = open_run(path)
    return moves_text(reader_moves(run.perf.events, run.joined), run.joined.flows.attrs["labels"])
