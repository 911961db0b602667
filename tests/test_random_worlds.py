"""The join on random worlds of the simulator's whole space: what it calls trusted is true, stage by stage."""

from __future__ import annotations

import os

import pytest

from tests.random_worlds import random_world
from tests.test_join import run, wrong


@pytest.mark.parametrize(
    ("seed", "n"),
    [
        # A reader preempted, or waiting for a lock, with a datagram in hand: its switch-in is the one before.
        (8, 150),
        (10, 150),
        # The copy was lost, and the reader waited for a lock before its call returned; the first of several calls is not the last.
        (6, 150),
        (446, 150),
        # Asleep for a lock with a datagram in hand, while the other reader returned a later one.
        (58, 150),
        # Of the one datagram only the stamp is known, taken long before it was queued.
        (55, 150),
        # So many packets of one length that the stamps fit anywhere.
        (343, 150),
        (123, 300),
        # The softirq after netif_rx fell into a blind window.
        (353, 150),
        # skb addresses whose new life began in a blind window.
        (425, 600),
    ],
)
def test_what_once_was_wrong(seed: int, n: int) -> None:
    _, world = random_world(seed, n)
    joined = run(world)
    assert not wrong(joined, world).any()
    assert not (world.lost and joined.verdict == "trusted")


@pytest.mark.skipif(
    not os.environ.get("RXLAB_LONG"), reason="RXLAB_LONG=1 draws a million trusted packets of random worlds"
)
def test_long_draw_of_random_worlds() -> None:
    """A million packets called trusted, in worlds with and without losses: at most one in 100,000 wrong."""
    first, count = int(os.environ.get("RXLAB_SEED", "10000")), int(os.environ.get("RXLAB_TRUSTED", "1000000"))
    trusted = bad = known = found = n_worlds = 0
    while trusted < count:
        recipe, world = random_world(first + n_worlds)
        joined = run(world)
        believed, false = joined.packets["trusted"], int(wrong(joined, world).sum())
        if false:
            print(f"seed {first + n_worlds}: {false} of {believed.sum()} wrong: {recipe}", flush=True)
        assert not (world.lost and joined.verdict == "trusted")
        trusted, bad, n_worlds = trusted + int(believed.sum()), bad + false, n_worlds + 1
        known += int(world.truth["knowable"].sum())
        found += int((world.truth["knowable"] & believed).sum())
    print(f"{n_worlds} worlds: {trusted} trusted, {bad} wrong, {found} of {known} knowable packets trusted")
    assert bad <= trusted * 1e-5
    assert found >= 0.5 * known
