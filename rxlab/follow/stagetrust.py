"""Which stages of a run can be trusted: how many packets leave each of them in doubt."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rxlab.follow.clockfit import NAT
from rxlab.follow.status import FLAGGED
from rxlab.read.columns import Columns
from rxlab.stages import STAGE_NAMES, STATUSES

# What a stage can be: no packet of the run must show it; or as the run itself (dataset/schema.py names the codes from here).
STAGE_VERDICTS = ("not_required", "trusted", "degraded", "refused")
MAX_DOUBTFUL = 0.01
_FLAGGED = [STATUSES.index(name) for name in FLAGGED]


def doubtful_stages(required: np.ndarray, time: np.ndarray, columns: Columns) -> np.ndarray:
    """Count per stage the data packets that leave it in doubt.

    A trusted row (its reader is named without doubt) leaves in doubt only the required stages that it does not show; of
    any other flagged row no stage is to be believed. A packet without a reader, a dropped one or a repeat is no doubt.

    Parameters
    ----------
    required : bool array, dims (packet, stage)
    time : int64 array, dims (packet, stage), NaT where not seen
    columns : Columns, dims (packet,)
        ``status``, ``is_data``, ``trusted``.

    Returns
    -------
    int64 array, dims (stage,)
    """
    rows = np.flatnonzero(columns["is_data"] & np.isin(columns["status"], _FLAGGED))
    believed = columns["trusted"][rows, None] & (time[rows] != NAT)
    return (required[rows] & ~believed).sum(axis=0).astype(np.int64)


def stage_verdicts(coverage: Mapping[str, np.ndarray] | Columns, verdict: str) -> np.ndarray:
    """Return the verdict on each stage, codes of :data:`STAGE_VERDICTS`: a refused run has no trusted stage.

    Parameters
    ----------
    coverage : Columns, dims (stage,)
        ``expected`` and ``doubtful``.
    verdict : str
        The run's.

    Returns
    -------
    int8 array, dims (stage,)
    """
    code = {name: number for number, name in enumerate(STAGE_VERDICTS)}
    expected, doubtful = np.asarray(coverage["expected"]), np.asarray(coverage["doubtful"])
    is_good = doubtful <= MAX_DOUBTFUL * expected
    told = np.where(is_good, code["trusted"], code["degraded"])
    if verdict == "refused":
        told = np.full(len(expected), code["refused"])
    return np.where(expected > 0, told, code["not_required"]).astype(np.int8)


def doubt_text(doubted: int, certain: int, coverage: Columns) -> list[str]:
    """Return which stages degrade a run, and how many flagged data packets do (`certain`: their reader is), as one clause."""
    degraded = np.flatnonzero(stage_verdicts(coverage, "degraded") == STAGE_VERDICTS.index("degraded"))
    if not len(degraded):
        return []
    stages = ", ".join(
        f"{STAGE_NAMES[at]} {100 * coverage['doubtful'][at] / coverage['expected'][at]:.1f} %"
        for at in degraded.tolist()
    )
    return [
        f"{doubted} data packets are flagged (the reader of {certain} is certain all the same); in doubt are {stages}"
    ]
