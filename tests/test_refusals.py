"""Refused calls folded into the call before them: the rows that every call looked at alone gives."""

from __future__ import annotations

import numpy as np
import pytest

from rxlab.follow import queues
from rxlab.follow.join import Joined, join
from tests.simulate import World, simulate
from tests.slab_builder import differences


def joined(world: World, rng: np.random.Generator, missing: float) -> Joined:
    """Join a world of which some events are missing, and nobody says so."""
    events = dict(world.events)
    for name in ("sock:sk_data_ready", "sock:sock_recv_length", "sched:sched_switch"):
        events[name] = events[name].take(rng.random(events[name].n) >= missing)
    return join(events, world.packets, world.clock, world.machine)


@pytest.mark.parametrize("missing", [0, 0.02, 0.3])
def test_folding_changes_nothing(missing: float, monkeypatch: pytest.MonkeyPatch) -> None:
    agree = []

    def close_in(*given: object) -> object:
        bounds = queues_close_in(*given)
        agree.append(bounds.agree)
        return bounds

    queues_close_in = queues.close_in
    for seed in range(6):
        world = simulate(
            seed=seed, proto="udp", polling=True, n=120, sockets=1 + seed % 2, flows=2, drop_share=0.1 * (seed % 3),
            mean_gap_ns=(3_000, 9_000)[seed % 2], readers=1, peek=seed == 5, entries=seed > 2,
        )  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(queues, "close_in", close_in)
            folded = joined(world, np.random.default_rng(seed), missing)
        with monkeypatch.context() as patch:
            patch.setattr(queues, "fold_refusals", lambda *given: None)
            alone = joined(world, np.random.default_rng(seed), missing)
        assert differences(alone, folded) == {}
    # Bounds that contradict each other are where folded calls must be looked at alone.
    assert all(agree) == (missing == 0)
