"""A recording laid end to end with itself until it is large: what the join costs at a million events and more."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from rxlab.read.columns import Columns

GAP_NS = 1_000_000


def laid_end_to_end(
    events: Mapping[str, Columns], packets: Columns, n_events: int
) -> tuple[dict[str, Columns], Columns]:
    """Repeat a recording until it has about `n_events` events; times, ranks, frames and TCP streams go on.

    Parameters
    ----------
    events : mapping of str to Columns
    packets : Columns
        Both directions, stamps on a clock that runs like the events'.
    n_events : int
    """
    seen = {name: columns for name, columns in events.items() if columns.n}
    total = sum(columns.n for columns in seen.values())
    times = max(1, round(n_events / total))
    first = min(int(columns["time"].min()) for columns in seen.values())
    last = max(int(columns["time"].max()) for columns in seen.values())
    span = max(last - first, int(packets["time"].max() - packets["time"].min())) + GAP_NS
    ranks = max(int(columns["rank"].max()) for columns in seen.values()) + 1
    step = np.arange(times, dtype=np.int64)
    laid = {
        name: _repeated(columns, times).with_columns(
            time=_shifted(columns["time"], span * step), rank=_shifted(columns["rank"], ranks * step)
        )
        for name, columns in seen.items()
    }
    # A stream's next turn begins where this one ended.
    is_tcp = packets["proto"] == 6
    seq = packets["seq"].astype(np.int64)
    turn = int((seq + packets["payload_len"] - seq[is_tcp].min())[is_tcp].max()) + 2 if is_tcp.any() else 0
    moved = (_shifted(seq, turn * step) % 2**32).astype(packets["seq"].dtype)
    frames = int(packets["frame"].max())
    return laid, _repeated(packets, times).with_columns(
        time=_shifted(packets["time"], span * step),
        frame=_shifted(packets["frame"], frames * step),
        seq=np.where(np.tile(is_tcp, times), moved, np.tile(packets["seq"], times)),
    )


def _repeated(columns: Columns, times: int) -> Columns:
    return Columns({name: np.concatenate([array] * times) for name, array in columns.items()}, columns.attrs)


def _shifted(column: np.ndarray, by: np.ndarray) -> np.ndarray:
    return (column[None, :] + by[:, None]).ravel()
