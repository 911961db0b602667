"""UDP datagrams that NAPI hands up as one list: whose sk_data_ready is whose."""

from __future__ import annotations

import numpy as np

from rxlab.follow.asof import AsOf

_NEVER = np.iinfo(np.int64).max


def first_rank(events: list[tuple[np.ndarray, np.ndarray]], rank: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Return the rank of the first event after each rank, of any kind and in the same group; the largest int64 where none.

    Each kind is ranks and groups, in order of rank as recorded: looked at one by one, they need not be sorted into one.
    """
    first = np.full(len(rank), _NEVER)
    for ranks, groups in events:
        if len(ranks):
            index = AsOf(ranks, groups)
            np.minimum(first, index.rank_of(index.first_after(rank, group), _NEVER), out=first)
    return first


def ready_of_batches(
    skbs: tuple[np.ndarray, np.ndarray, np.ndarray],
    found: np.ndarray,
    ready: AsOf,
    received: AsOf,
    is_datagram: np.ndarray,
    breaks: list[tuple[np.ndarray, np.ndarray]],
) -> np.ndarray:
    """Give the data_ready calls after a batch of datagrams to those they were for.

    NAPI hands skbs up in lists (napi_gro_complete, GRO_NORMAL: net/core/gro.c), and all of a list pass netif_receive_skb before
    the first is queued to its socket (__netif_receive_skb_list_core). As many calls as datagrams are theirs in order. Fewer, since
    Linux 6.10: the first datagram's, whose queue was empty; whose a second one is cannot be told.

    Parameters
    ----------
    skbs : three arrays, dims (skb,)
        Rank and CPU (int64) of netif_receive_skb, and whether NAPI handed the skb up.
    found : int64 array, dims (skb,)
        The first call after each skb, -1: none before the CPU's next skb.
    ready, received : AsOf
        The calls, and netif_receive_skb of all skbs, by CPU.
    is_datagram : bool array, dims (skb,)
    breaks : list of pairs of arrays
        Ranks and CPUs of the events that are not within a batch.

    Returns
    -------
    int64 array, dims (skb,)
        The call of each skb, -1: none.
    """
    rank, cpu, is_napi = skbs
    if not is_napi.any():
        return found
    order = np.lexsort((rank, cpu))
    rank, cpu, is_napi = rank[order], cpu[order], is_napi[order]
    following = received.rank_of(received.first_after(rank, cpu), _NEVER)
    unbroken = first_rank(breaks, rank, cpu) > following
    joined = np.zeros(len(order), bool)
    joined[1:] = (unbroken & is_napi)[:-1] & is_napi[1:] & (following[:-1] == rank[1:])
    batch = np.cumsum(~joined) - 1
    size = np.bincount(batch[is_datagram[order]], minlength=batch[-1] + 1)
    several = np.flatnonzero((size >= 2)[batch] & is_datagram[order])
    if not len(several):
        return found
    mine, heads = batch[several], np.flatnonzero(np.diff(batch[several], prepend=-1))
    number = np.arange(len(several)) - np.repeat(heads, np.diff(np.append(heads, len(several))))
    last = np.flatnonzero(np.diff(batch, append=batch[-1] + 1))[mine]
    call, calls = ready.first_after(rank[last], cpu[last]), np.full(len(several), -1, np.int64)
    n_calls = np.zeros(len(several), np.int64)
    for turn in range(int(size.max())):
        call = np.where(ready.rank_of(call, _NEVER) < following[last], call, -1)
        n_calls += call >= 0
        calls = np.where(number == turn, call, calls)
        call = np.where(call >= 0, ready.first_after(ready.rank_of(call, _NEVER - 1), cpu[last]), -1)
    found = found.copy()
    found[order[several]] = np.where((number == 0) | (n_calls == size[mine]), calls, -1)
    return found
