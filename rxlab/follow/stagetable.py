"""Times, CPUs and ranks of the stages of many packets: the table that the join fills stage by stage."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rxlab.follow.asof import pick
from rxlab.follow.clockfit import NAT
from rxlab.follow.together import beside
from rxlab.read.columns import Columns
from rxlab.stages import STAGE_INDEX, STAGE_NAMES


@dataclass
class StageTable:
    """One row per packet or skb, one column per stage; each column lies together in memory, for it is filled as a whole.

    Attributes
    ----------
    time : int64 array, dims (row, stage), nanoseconds of CLOCK_MONOTONIC, NaT where not seen
    cpu : int16 array, dims (row, stage), -1 where not seen
    rank : int64 array, dims (row, stage), -1 where not seen
        Global order of the event behind each stage.
    """

    time: np.ndarray
    cpu: np.ndarray
    rank: np.ndarray

    @classmethod
    def blank(cls, n: int) -> StageTable:
        """Return a table of `n` rows in which nothing was seen."""
        shape = (n, len(STAGE_NAMES))
        return cls(
            np.full(shape, NAT, np.int64, order="F"),
            np.full(shape, -1, np.int16, order="F"),
            np.full(shape, -1, np.int64, order="F"),
        )

    def set_stage(self, stage: str, events: Columns, row: np.ndarray) -> None:
        """Write one stage from the event row found for each row of the table (-1: none)."""
        at = STAGE_INDEX[stage]
        self.time[:, at] = pick(events["time"], row, NAT)
        self.cpu[:, at] = pick(events["cpu"], row, -1)
        self.rank[:, at] = pick(events["rank"], row, -1)

    def unset(self, stage: str, rows: np.ndarray) -> None:
        """Forget a stage of the given rows (a mask): what was linked may be another packet's."""
        at = STAGE_INDEX[stage]
        self.time[rows, at], self.cpu[rows, at], self.rank[rows, at] = NAT, -1, -1

    def take(self, row: np.ndarray) -> StageTable:
        """Return the given rows as a new table, blank where the row is -1."""
        taken = StageTable.blank(len(row))
        times = beside(_take_into, taken.time, self.time, row, NAT)
        _take_into(taken.cpu, self.cpu, row, -1)
        _take_into(taken.rank, self.rank, row, -1)
        times()
        return taken

    def seen(self, stage: str) -> np.ndarray:
        """Tell for each row whether the stage was seen."""
        return self.rank[:, STAGE_INDEX[stage]] >= 0


def _take_into(target: np.ndarray, source: np.ndarray, row: np.ndarray, missing: int) -> None:
    for stage in range(target.shape[1]):
        target[:, stage] = pick(source[:, stage], row, missing)
