"""A difference is split into hops, CPUs and attribution classes that add up; the cost of recording is stated and taken off by name."""

from __future__ import annotations

import numpy as np
import pytest
from joined_builder import make_host, make_joined, make_run

from rxlab.dataset import explain, stats, store
from rxlab.errors import UsageError
from rxlab.stages import ATTRIBUTIONS


def _tree(seed, n=2000, running=0.0, **changes):
    """A run; of the share `running` of its packets the reader was running already."""
    joined = make_joined(n, seed=seed, **changes)
    is_running = np.random.default_rng(seed).random(n) < running
    joined.packets["attribution"][is_running] = ATTRIBUTIONS.index("running")
    return store.build(joined, run=make_run(), host=make_host())


def _total(trees, quantile):
    totals = [stats.quantile_interval(stats.hop_values(tree, "total_latency"), quantile).value for tree in trees]
    return float(np.mean(totals))


@pytest.mark.parametrize("quantile", [0.5, 0.99])
@pytest.mark.parametrize("by", explain.PARTS)
def test_parts_add_up_to_the_difference(by, quantile):
    a = [_tree(seed) for seed in range(3)]
    b = [_tree(seed, steps={"switch_in": 4500}, running=0.3) for seed in range(3, 6)]
    found = explain.explain(a, b, quantile=quantile, by=by)
    difference = _total(b, quantile) - _total(a, quantile)
    assert float(found.total) == pytest.approx(difference, rel=0.01)
    assert float(found.difference.sum()) == pytest.approx(float(found.total))


@pytest.mark.parametrize("hop", ["switch_in", "netif_receive_skb", "copy"])
@pytest.mark.parametrize("quantile", [0.5, 0.99])
def test_the_planted_hop_is_named(hop, quantile):
    a = [_tree(seed) for seed in range(2)]
    b = [_tree(seed, steps={hop: 4500}) for seed in range(2, 4)]
    found = explain.explain(a, b, quantile=quantile)
    assert str(found.hop.values[np.argmax(np.abs(found.difference.values))]) == hop


def test_the_cpu_that_carries_it_is_named():
    # The builder's CPU 1 has the stages from wakeup on; copy gets longer.
    a, b = [_tree(1, n=6000)], [_tree(2, n=6000, steps={"copy": 6000})]
    found = explain.explain(a, b, by="cpu")
    assert found.cpu.values.tolist() == [0, 1]
    assert float(found.difference.sel(cpu=1)) == pytest.approx(3900, rel=0.1)
    assert abs(float(found.difference.sel(cpu=0))) < 300


def test_attribution_classes_carry_their_share():
    found = explain.explain([_tree(1, n=6000)], [_tree(2, n=6000, running=0.25)], by="attribution")
    total = _total([_tree(2, n=6000, running=0.25)], 0.5)
    assert float(found.a.sel(attribution="running")) == 0
    assert float(found.b.sel(attribution="running")) == pytest.approx(total / 4, rel=0.2)
    assert float(found.b.sum()) == pytest.approx(total)


def test_an_unknown_part_is_a_usage_error():
    with pytest.raises(UsageError, match="hop, cpu, attribution"):
        explain.contributions(_tree(1, n=100), 0.5, by="flow")


def _runs(rng, median, reps=5):
    return [median * np.exp(rng.normal(0, 0.002) + 0.2 * rng.standard_normal(3000)) for _ in range(reps)]


def test_the_bias_of_recording_is_what_was_planted():
    rng = np.random.default_rng(3)
    # Untraced +1 us, traced +1.5 us: half of the effect more.
    bias = explain.tracing_bias((_runs(rng, 10_000), _runs(rng, 15_000)), (_runs(rng, 11_000), _runs(rng, 16_500)))
    assert bias.effect == pytest.approx(1000, rel=0.1)
    assert bias.low < 500 < bias.high
    assert bias.is_large
    same = explain.tracing_bias((_runs(rng, 10_000), _runs(rng, 15_000)), (_runs(rng, 20_000), _runs(rng, 25_000)))
    assert not same.is_large
    assert explain.tracing_bias((_runs(rng, 1e4), []), (_runs(rng, 1e4), _runs(rng, 1e4))) is None


def test_the_bias_is_of_the_geometric_means_that_the_tables_show():
    """One slow run in three: its arithmetic mean would be 2 us above what the table says."""
    exact = [
        [np.full(500, median) for median in medians] for medians in ([8_000, 8_000, 8_000], [8_000, 8_000, 27_000])
    ]
    bias = explain.tracing_bias((exact[0], exact[0]), (exact[0], exact[1]))
    assert bias.effect == 0
    assert bias.bias == pytest.approx(12_000 - 8_000)  # (8 * 8 * 27) ** (1/3) = 12
    # The delta method: the standard deviation of three logarithms, times the mean, over the root of 3.
    error = 12_000 * np.std(np.log([8, 8, 27]), ddof=1) / np.sqrt(3)
    assert (bias.high - bias.low) / 2 == pytest.approx(4.302653 * error, rel=1e-5)


def test_the_cost_per_event_takes_the_recording_off():
    rng = np.random.default_rng(4)
    trees = [_tree(seed) for seed in range(2)]
    # Eleven stages of the builder's path, 0.5 us each.
    cost = explain.cost_per_event(_runs(rng, 10_000), _runs(rng, 15_500), trees)
    assert cost.value == pytest.approx(500, rel=0.05)
    assert cost.low < 500 < cost.high
    parts = explain.contributions(trees[0], 0.5)
    less = explain.less_recording(parts, cost.value)
    assert float(less.sum()) == pytest.approx(float(parts.sum()) - 10 * cost.value)
    assert float(less.sel(hop="hardirq")) == 0
    assert "estimated" in less.attrs["long_name"]


def test_a_hop_that_only_one_configuration_has_is_shown():
    found = explain.explain([_tree(1)], [_tree(2, path_kind="backlog_rps")])
    assert float(found.a.sel(hop="rps_ipi")) == 0
    assert float(found.difference.sel(hop="rps_ipi")) == pytest.approx(2500, rel=0.15)
    assert np.isnan(found.low).all()
