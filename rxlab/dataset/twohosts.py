"""Two hosts' captures as labelled data: every packet's interval, and how the two clocks go together."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from rxlab.dataset import schema
from rxlab.dataset.store import laid, save
from rxlab.dataset.twohostschema import WAYS
from rxlab.follow.crossings import CROSSINGS
from rxlab.follow.join import Joined
from rxlab.follow.twohosts import TwoHosts, align_two_hosts
from rxlab.read.columns import Columns
from rxlab.read.payload import with_digests
from rxlab.read.pcap import read_pcap
from rxlab.read.pcapfile import NAT

# Instants at which the difference of the clocks is told.
N_INSTANTS = 200


def compare_captures(
    sender: Columns, receiver: Columns, *, received: np.ndarray | None = None, clock_error: int | None = None
) -> TwoHosts:
    """Align two captures that :func:`rxlab.read_pcap` read (:func:`rxlab.follow.twohosts.align_two_hosts`)."""
    there, here = with_digests(sender, receiver)
    return align_two_hosts(there, here, received=received, clock_error=clock_error)


def analyze_two_captures(
    sender_pcap: str | os.PathLike[str],
    receiver_pcap: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    clock_error: int | None = None,
) -> xr.DataTree:
    """Lay out the one-way latencies between two hosts of which nothing but captures is there; with `out`, save them."""
    sender, receiver = read_pcap(Path(sender_pcap)), read_pcap(Path(receiver_pcap))
    found = compare_captures(sender, receiver, clock_error=clock_error)
    attrs = {
        "schema_version": schema.SCHEMA_VERSION,
        "Conventions": schema.CONVENTIONS,
        "title": "rxlab: one-way latencies between two hosts, as intervals",
    }
    tree = xr.DataTree.from_dict({"/": xr.Dataset(attrs=attrs), **groups_of(found, sender, receiver)})
    schema.validate(tree)
    if out is not None:
        save(tree, out)
    return tree


@dataclass(frozen=True)
class BesideRun:
    """What a sender's capture adds to a run."""

    found: TwoHosts
    sender: Columns
    receiver: Columns

    @property
    def groups(self) -> dict[str, xr.Dataset]:
        """/crossings and /twohosts."""
        return groups_of(self.found, self.sender, self.receiver)

    def joined(self, joined: Joined) -> Joined:
        """Return a join whose packets have the intervals of their one-way latencies."""
        frames = np.asarray(joined.packets["pcap_frame"])
        intervals = intervals_of_frames(frames, self.found, self.sender, self.receiver)
        return replace(joined, packets=joined.packets.with_columns(**intervals))


def compare_with_sender(
    receiver: Columns,
    received: np.ndarray,
    sender_pcap: str | os.PathLike[str],
    clock_error: int | None,
    has_nic_stamps: bool,
) -> BesideRun:
    """Align a run's packets, of which it is known which came in, with a capture of the host that sent them."""
    sender = read_pcap(Path(sender_pcap))
    if has_nic_stamps:
        # In one file received packets carry the NIC's clock and sent ones CLOCK_REALTIME.
        receiver = receiver.with_columns(time=np.where(received, receiver["time"], NAT))
    found = compare_captures(sender, receiver, received=received, clock_error=clock_error)
    return BesideRun(found, sender, receiver)


def groups_of(found: TwoHosts, sender: Columns, receiver: Columns) -> dict[str, xr.Dataset]:
    """Lay out /crossings and /twohosts."""
    parts = [
        _of_way(way, side, came, went)
        for way, (side, came, went) in enumerate(((found.forward, receiver, sender), (found.reverse, sender, receiver)))
    ]
    values = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    crossings = xr.Dataset({name: laid("crossings", name, value) for name, value in values.items()})
    return {"crossings": crossings, "twohosts": _summary(found, receiver)}


def _of_way(way: int, side: Columns, came: Columns, went: Columns) -> dict[str, np.ndarray]:
    rows = side["arrived"]
    return {
        "time": came["time"][rows].view("datetime64[ns]"),
        "frame": came["frame"][rows],
        "way": np.full(len(rows), way),
        **{name: came[name][rows] for name in ("proto", "sport", "dport", "payload_len")},
        **_interval(side, went),
    }


def _interval(side: Columns, went: Columns) -> dict[str, np.ndarray]:
    """Return the variables of packets' intervals."""
    first = side["first"]
    return {
        "oneway_min": _or_nan(side["least"]),
        "oneway_max": _or_nan(side["most"]),
        "sender_frame": np.where(first >= 0, went["frame"][first], 0),
        "crossing": side["status"],
    }


def _or_nan(values: np.ndarray | int) -> np.ndarray:
    known = np.asarray(values)
    return np.where(known == NAT, np.nan, known.astype(np.float64))


def _summary(found: TwoHosts, receiver: Columns) -> xr.Dataset:
    """Lay out /twohosts."""
    time = receiver["time"][receiver["time"] != NAT]
    instants = np.linspace(0, int(np.ptp(time)), N_INSTANTS).astype(np.int64) + int(time.min())
    least, largest = found.bounds.at(instants)
    known = np.concatenate((least[least != NAT], largest[largest != NAT]))
    origin = int(known[0]) if len(known) else 0
    sides = (found.forward, found.reverse)
    counts = [np.bincount(side["status"], minlength=len(CROSSINGS)) for side in sides]
    medians = [
        [float(np.median(known)) if len(known := side[name][side[name] != NAT]) else np.nan for side in sides]
        for name in ("least", "most")
    ]
    values: dict[str, Any] = {
        "instant": instants.view("datetime64[ns]"),
        "offset_min": _or_nan(np.where(least == NAT, NAT, least - origin)),
        "offset_max": _or_nan(np.where(largest == NAT, NAT, largest - origin)),
        "offset_origin": origin,
        "drift": found.bounds.reference.drift * 1e6,
        "wander": found.bounds.wander * 1e6,
        "width_min": _or_nan(found.width_ns[0]),
        "width_median": _or_nan(found.width_ns[1]),
        "clock_error": np.nan if found.bounds.clock_error is None else float(found.bounds.clock_error),
        "flags": " ".join(found.bounds.flags),
        "way": WAYS,
        "found": CROSSINGS,
        "packets": np.stack(counts),
        "unseen": found.n_unseen,
        "median_min": medians[0],
        "median_max": medians[1],
    }
    return xr.Dataset({name: laid("twohosts", name, value) for name, value in values.items()})


def facts_of(tree: xr.DataTree) -> dict[str, Any]:
    """Return /twohosts as plain values, ready for JSON: numbers are None where they are not known."""

    def number(value: Any) -> float | None:
        return float(value) if np.isfinite(value) else None

    hosts = tree["twohosts"].to_dataset()
    facts: dict[str, Any] = {f"{name}_ns": number(hosts[name]) for name in ("width_min", "width_median", "clock_error")}
    facts |= {"drift_ppm": number(hosts["drift"]), "wander_ppm": number(hosts["wander"])}
    facts["flags"] = str(hosts["flags"].item()).split()
    for way, name in enumerate(WAYS):
        facts[name] = {
            "packets": dict(zip(CROSSINGS, hosts["packets"].values[way].tolist(), strict=True)),
            "unseen": int(hosts["unseen"][way]),
            "median_min_ns": number(hosts["median_min"][way]),
            "median_max_ns": number(hosts["median_max"][way]),
        }
    return facts


def intervals_of_frames(
    frames: np.ndarray, found: TwoHosts, sender: Columns, receiver: Columns
) -> dict[str, np.ndarray]:
    """Return the variables of the intervals of a run's packets, by their frame numbers in the receiver's capture (0: none)."""
    row = np.where(frames > 0, frames - int(receiver["frame"][0]), -1)
    absent = {"oneway_min": np.nan, "oneway_max": np.nan, "sender_frame": 0, "crossing": 0}
    columns = {}
    for name, values in _interval(found.forward, sender).items():
        of_row = np.full(receiver.n + 1, absent[name], values.dtype)
        of_row[found.forward["arrived"]] = values
        # The last row stands for packets without a frame.
        columns[name] = of_row[row]
    return columns
