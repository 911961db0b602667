"""What the join takes and gives for a part of a recording: all of it, or a slab with what it takes over from those before."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, fields

import numpy as np

from rxlab.follow.feeding import Earlier
from rxlab.follow.hidden import Hidden
from rxlab.follow.kernelpath import KernelPath
from rxlab.follow.pairing import Pairs, StampPlace
from rxlab.follow.stagetable import StageTable
from rxlab.follow.status import Evidence, FlowsSoFar
from rxlab.read.columns import Columns


@dataclass(frozen=True)
class Part:
    """A part of a recording, all of it or a slab with what it takes over from those before.

    Attributes
    ----------
    events : mapping of str to Columns
        As on newer kernels (older.py).
    recorded : set of str
        The events of which the recording has any.
    span : tuple of int, nanoseconds of CLOCK_MONOTONIC
        The first and the last event of the recording.
    received : Columns, dims (packet,)
        As :func:`rxlab.follow.received.received_packets` gives them, by row.
    hidden, lossy, unseen, blind
        :func:`rxlab.follow.hidden.hidden_windows`.
    so_far : FlowsSoFar
    earlier : Earlier
    place : StampPlace or None
        Where the stamps were taken, None: to be found.
    known : Known or None
        What is known of packets that earlier slabs had.
    pieces : Columns or None
        What of the streams had come before (:func:`rxlab.follow.repeats.merged_pieces`).
    known_cpus : mapping of str to integer array or None
        CPUs on which earlier parts saw an event.
    """

    events: Mapping[str, Columns]
    recorded: Set[str]
    span: tuple[int, int]
    received: Columns
    hidden: Hidden
    lossy: Hidden
    unseen: Hidden
    blind: np.ndarray
    so_far: FlowsSoFar
    earlier: Earlier
    place: StampPlace | None = None
    known: Known | None = None
    pieces: Columns | None = None
    known_cpus: Mapping[str, np.ndarray] | None = None


@dataclass(frozen=True)
class Known:
    """What earlier slabs told of the packets of a part; arrays have dims (packet,).

    Attributes
    ----------
    path : KernelPath
        The skbs found before.
    event : int64 array
        Row of `path`, -1 where unmatched, -2 for a packet that no earlier slab had.
    is_ambiguous, is_freed : bool arrays
    call_rank : int64 array
        Rank of the receive call, -1 where none or not certain to stay.
    is_counted : bool array
        An earlier slab has told of it.
    is_merged, is_late : bool arrays
        As that slab saw them among their neighbours (:func:`rxlab.follow.status.merged_and_late`).
    last_read_cpu : int16 array
        As it saw that (:func:`rxlab.follow.readerfacts.reader_facts`).
    is_doubted, is_contested : bool arrays
        As that slab left them without a reader, with calls around that are not all at hand any more
        (:class:`rxlab.follow.consumption.Consumption`).
    """

    path: KernelPath
    event: np.ndarray
    is_ambiguous: np.ndarray
    is_freed: np.ndarray
    call_rank: np.ndarray
    is_counted: np.ndarray
    is_merged: np.ndarray
    is_late: np.ndarray
    last_read_cpu: np.ndarray
    is_doubted: np.ndarray
    is_contested: np.ndarray

    def of_packets(self) -> tuple[np.ndarray, ...]:
        """Return all arrays of dims (packet,), in order."""
        return tuple(getattr(self, each.name) for each in fields(self) if each.name != "path")


@dataclass(frozen=True)
class Followed:
    """The packets of a part, followed: their stages and variables, the stages each must show, and by what they were judged.

    ``is_merged`` and ``is_late`` are :func:`rxlab.follow.status.merged_and_late`.
    """

    rows: StageTable
    columns: Columns
    required: np.ndarray
    evidence: Evidence
    pairs: Pairs
    is_merged: np.ndarray
    is_late: np.ndarray
