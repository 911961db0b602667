"""Random recipes of the whole space that the simulator spans, and what may not be in one world together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from rxlab.stages import STAGE_INDEX
from tests.simulate import Recipe, World, simulate


def random_world(seed: int, n: int = 2000, **fixed: Any) -> tuple[Recipe, World]:
    """Draw a world; `fixed` are parameters that are not drawn.

    Few addresses make their reuse frequent; where that many packets wait that one would be used while it is in use there are more.
    """
    rng = np.random.default_rng(seed)
    recipe = replace(Recipe(seed=seed, n=n, **_drawn(rng, n)), **fixed)
    world, n_addresses = simulate(**vars(recipe)), recipe.n_addresses
    while _used_twice(n_addresses, world):
        n_addresses *= 4
    if n_addresses == recipe.n_addresses:
        return recipe, world
    recipe = replace(recipe, n_addresses=n_addresses)
    return recipe, simulate(**vars(recipe))


def _drawn(rng: np.random.Generator, n: int) -> dict[str, Any]:
    """Return parameters that a world can have together."""

    def one(*values: Any) -> Any:
        return values[rng.integers(len(values))]

    recipe: dict[str, Any] = {
        "proto": one("tcp", "udp"), "rps": one(False, True), "stamp": one("tap", "bracket"),
        "mean_gap_ns": one(2_000, 4_000, 8_000, 15_000, 30_000, 100_000), "work_ns": one(1_500, 5_000, 25_000),
        "max_payload": one(31, 64, 1000), "peek": one(False, False, False, True), "polling": one(False, False, True),
        "n_addresses": one(16, 64, 300, 4096), "lock_every": one(0, 0, 3), "rings": one(0, 0, 0, 1),
        "lost_share": one(0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5), "lost_burst": float(one(1, 5, 30, 300)),
    }  # fmt: skip
    if recipe["proto"] == "tcp":
        recipe |= {"gro": one(1, 1, 4), "read_size": one(10, 700, 65_536, 65_536, 65_536)}
        if recipe["read_size"] == 10:
            recipe["max_payload"] = 64
        kind = one("merge", "flows", "swap", "plain")
        if kind == "merge":
            recipe |= {"merge_share": one(0.1, 0.3), "behind_ack": one(False, True), "repeat_share": one(0.0, 0.05)}
        elif kind == "flows":
            recipe |= {"flows": one(2, 4, 8), "readers": one(1, 2), "repeat_share": one(0.0, 0.05)}
        elif kind == "swap":
            recipe |= {"swap_share": one(0.02, 0.1), "repeat_share": one(0.0, 0.05), "swap_depth": one(1, 3)}
    else:
        recipe |= {"flows": one(1, 6), "sockets": one(1, 1, 3), "drop_share": one(0.0, 0.0, 0.02, 0.2)}
        recipe["shared"] = one(False, True)
        recipe["readers"] = one(1, 2, 3) if recipe["shared"] else min(recipe["sockets"], one(1, 3))
        recipe["stall_share"] = one(0.0, 0.02, 0.1)
        recipe["behind"] = one(False, True)
        if recipe["sockets"] > 1:
            recipe["closes"] = one(0, n // 2)
    if rng.random() < 0.3:
        length = n * recipe["mean_gap_ns"]
        recipe["blind"] = tuple(
            (int(rng.integers(0, 1 + recipe.get("readers", 1))), first, first + int(one(50_000, 400_000, 3_000_000)))
            for first in sorted(rng.integers(0, length, rng.integers(1, 4)).tolist())
        )
    recipe["entries"] = one(False, False, True)
    return recipe


def _used_twice(n_addresses: int, world: World) -> bool:
    """Tell whether an skb address was given to a packet while another that had it was not yet read."""
    stages = world.truth["stages"]
    born = stages[:, STAGE_INDEX["driver_rx"]]
    gone = np.maximum(stages[:, STAGE_INDEX["netif_receive_skb"]], world.truth["returned"])
    return bool((np.maximum.accumulate(gone)[:-n_addresses] > born[n_addresses:]).any())
