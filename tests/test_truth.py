"""Statistics against known truth: simulated sweeps with planted effects, drawn again and again.

A draw is a sweep of two configurations, 5 or 10 repetitions each, runs of correlated packets whose medians differ from run to
run. The suite draws few of them, with limits as wide as chance makes them; ``RXLAB_LONG=1`` draws 4,000 and prints the record.
"""

from __future__ import annotations

import os

import numpy as np
import pytest
from joined_builder import make_host, make_joined, make_run
from scipy.signal import lfilter
from scipy.stats import norm

from rxlab.dataset import explain, stats, store

IS_LONG = os.environ.get("RXLAB_LONG") == "1"
DRAWS = 4000 if IS_LONG else 80
PACKETS = 2000
PACKETS_OF_TAIL = 5000  # 50 of them beyond p99; the built-in workload sends 20,000
SPREAD = 0.3  # of the packets, on the log scale
BETWEEN = 0.01  # of the runs


def _run(rng, median=10_000.0, tail=1.0, n=PACKETS):
    """One run: log-normal, AR(1) in time; values beyond p95 are `tail` times slower."""
    noise = lfilter([np.sqrt(0.75)], [1, -0.5], rng.standard_normal(n + 50))[50:]
    slower = np.where(noise > norm.ppf(0.95), tail, 1.0)
    return median * np.exp(rng.normal(0, BETWEEN) + SPREAD * noise) * slower


def _runs(rng, reps, **planted):
    return [_run(rng, **planted) for _ in range(reps)]


def _truth(quantile, median=10_000.0):
    return median * np.exp(SPREAD * norm.ppf(quantile))


def _near(share, target, low, high):
    """Return limits of a share: `low` to `high`, and as much beyond as three standard errors of the draws."""
    chance = 0 if IS_LONG else 3 * np.sqrt(target * (1 - target) / DRAWS)
    return low - chance <= share <= high + chance


@pytest.mark.parametrize("reps", [5, 10])
def test_intervals_cover_and_nothing_is_found_where_nothing_is(reps):
    rng = np.random.default_rng(100 + reps)
    ratios, estimates, alarms = [], [], 0
    for _ in range(DRAWS):
        a, b = _runs(rng, reps), _runs(rng, reps)
        family = stats.compare(a, b)
        alarms += any(one.verdict != stats.CANNOT_TELL for one in family)
        ratios.append([one.ratio_low <= 1 <= one.ratio_high for one in family])
        found = [stats.estimate_quantile(a, level) for level in stats.QUANTILES]
        estimates.append([e.low <= _truth(q) <= e.high for e, q in zip(found, stats.QUANTILES, strict=True)])
    of_ratios, of_estimates = np.mean(ratios, axis=0), np.mean(estimates, axis=0)
    print(f"{reps} repetitions: ratios cover {of_ratios}, quantiles {of_estimates}, false alarms {alarms / DRAWS:.4f}")
    assert all(_near(share, 0.95, 0.93, 0.97) for share in (*of_ratios, *of_estimates))
    assert _near(alarms / DRAWS, 0.05, 0.0, 0.05)


@pytest.mark.parametrize("reps", [5, 10])
def test_a_planted_shift_of_the_tail_is_found_with_the_right_interval(reps):
    rng, n = np.random.default_rng(200 + reps), PACKETS_OF_TAIL
    found = [stats.compare(_runs(rng, reps, n=n), _runs(rng, reps, n=n, tail=1.05)) for _ in range(DRAWS)]
    seen = np.mean([family[2].verdict == stats.WORSE for family in found])
    wrong = np.mean([family[2].verdict == stats.BETTER or family[0].verdict != stats.CANNOT_TELL for family in found])
    covered = np.mean(
        [
            [family[0].ratio_low <= 1 <= family[0].ratio_high, family[2].ratio_low <= 1.05 <= family[2].ratio_high]
            for family in found
        ],
        axis=0,
    )
    print(f"{reps} repetitions: 5 % at p99 found in {seen:.4f}, median or sign wrong in {wrong:.4f}, covered {covered}")
    if reps == 10:
        assert seen >= 0.8
    assert _near(wrong, 0.05, 0.0, 0.05)
    assert all(_near(share, 0.95, 0.93, 0.97) for share in covered)


@pytest.mark.parametrize("quantile", [0.5, 0.99])
def test_explain_names_a_planted_hop_and_adds_up(quantile):
    rng = np.random.default_rng(300)
    hops = ["softirq", "netif_receive_skb", "tcp_rcv", "waking", "switch_in", "copy"]
    draws = 300 if IS_LONG else 4
    named, off = 0, []
    for draw in range(draws):
        hop = hops[draw % len(hops)]
        seeds = rng.integers(0, 2**31, 10)
        sides = [
            [
                store.build(make_joined(PACKETS, seed=int(seed), steps=steps), run=make_run(), host=make_host())
                for seed in some
            ]
            for some, steps in ((seeds[:5], {}), (seeds[5:], {hop: 4000}))
        ]
        found = explain.explain(*sides, quantile=quantile)
        named += str(found.hop.values[np.argmax(np.abs(found.difference.values))]) == hop
        totals = [
            [stats.quantile_interval(stats.hop_values(tree, "total_latency"), quantile).value for tree in side]
            for side in sides
        ]
        truth = np.mean(totals[1]) - np.mean(totals[0])
        off.append(abs(float(found.difference.sum()) / truth - 1))
    print(f"p{100 * quantile:g}: hop named in {named} of {draws}, sum off by at most {max(off):.2e}")
    assert named == draws
    assert max(off) < 0.01
