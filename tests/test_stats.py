"""Statistics against planted truth: intervals cover, false alarms are rare, hops are named and add up."""

from __future__ import annotations

import numpy as np
import pytest
from joined_builder import NAT, make_host, make_joined, make_run
from scipy.signal import lfilter
from scipy.stats import norm

from rxlab.dataset import stats, store
from rxlab.errors import RxlabError
from rxlab.stages import STAGE_INDEX


def _series(rng, n, *, rho=0.0, spread=0.4, median=10_000.0):
    """Log-normal latencies whose logarithm is a stationary AR(1) series."""
    noise = rng.standard_normal(n + 300)
    return median * np.exp(spread * lfilter([np.sqrt(1 - rho**2)], [1, -rho], noise)[300:])


def _runs(rng, n_runs, *, median=10_000.0, between=0.01, n=2000):
    return [_series(rng, n, rho=0.5, spread=0.3, median=median * np.exp(rng.normal(0, between))) for _ in range(n_runs)]


@pytest.mark.parametrize("rho", [0.0, 0.9])
@pytest.mark.parametrize("quantile", stats.QUANTILES)
def test_within_run_interval_covers_whatever_the_correlation(rho, quantile):
    rng = np.random.default_rng(7)
    truth = 10_000 * np.exp(0.4 * norm.ppf(quantile))
    estimates = [stats.quantile_interval(_series(rng, 4000, rho=rho), quantile) for _ in range(400)]
    covered = np.mean([e.low <= truth <= e.high for e in estimates])
    assert 0.92 <= covered <= 0.985


def test_correlation_widens_the_interval():
    rng = np.random.default_rng(3)
    widths = [
        np.mean([e.high - e.low for e in (stats.quantile_interval(_series(rng, 4000, rho=r), 0.5) for _ in range(50))])
        for r in (0.0, 0.9)
    ]
    assert widths[1] > 2 * widths[0]


def test_repetition_interval_is_students():
    rng = np.random.default_rng(5)
    covered = np.mean(
        [
            e.low <= 1e4 <= e.high
            for e in (stats.over_repetitions(1e4 * np.exp(rng.normal(0, 0.1, 3))) for _ in range(2000))
        ]
    )
    assert 0.935 <= covered <= 0.965
    assert np.isnan(stats.over_repetitions([5.0]).low)


def test_one_run_each_gives_an_interval_but_no_verdict():
    rng = np.random.default_rng(17)
    for comparison in stats.compare(_runs(rng, 1), _runs(rng, 1, median=20_000.0)):
        assert comparison.verdict == stats.CANNOT_TELL
        assert comparison.kind == "within one run"
        assert comparison.ratio_low < 2 < comparison.ratio_high or comparison.ratio == pytest.approx(2, rel=0.1)
        assert np.isnan(comparison.p_value)
        assert comparison.more_repetitions is None


def test_the_sign_and_size_of_a_difference():
    runs = [np.full(100, v) for v in (1000.0, 1001.0, 1002.0)]
    half = [run / 2 for run in runs]
    median = stats.compare(runs, half)[0]
    assert (median.verdict, median.ratio) == (stats.BETTER, pytest.approx(0.5))
    assert median.difference == pytest.approx(-500.5, rel=1e-3)
    assert stats.compare(half, runs)[0].verdict == stats.WORSE
    assert stats.compare(runs, runs)[0].verdict == stats.CANNOT_TELL


def test_more_repetitions_are_fewer_for_a_larger_difference():
    rng = np.random.default_rng(19)
    a = _runs(rng, 5, between=0.03)
    needed = [
        stats.compare(a, [run * factor for run in _runs(np.random.default_rng(23), 5, between=0.03)])[
            0
        ].more_repetitions
        for factor in (1.05, 1.5)
    ]
    assert needed[0] > needed[1] >= 2


def test_holm_by_hand():
    base = stats.compare(*[[np.full(50, 1.0 + i + k) for i in range(3)] for k in (0, 1)], quantiles=(0.5,))[0]
    given = [stats.replace(base, p_value=p) for p in (0.04, 0.01, np.nan, 0.03)]
    assert [c.p_corrected for c in stats.correct(given)] == pytest.approx([0.06, 0.03, np.nan, 0.06], nan_ok=True)
    assert [c.verdict == stats.CANNOT_TELL for c in stats.correct(given)] == [True, False, True, True]


def test_nothing_to_compare_is_an_error():
    with pytest.raises(RxlabError, match="nothing to compare"):
        stats.compare([], [np.ones(5)])
    with pytest.raises(RxlabError, match="nothing to compare"):
        stats.compare([np.empty(0)], [np.ones(5)])


def _tree(seed, **changes):
    return store.build(make_joined(2000, seed=seed, **changes), run=make_run(), host=make_host())


def test_quantile_table_counts_usable_packets_and_claims_no_far_tail():
    joined = make_joined(1000, lost_rows=range(10))
    joined.time[20, STAGE_INDEX["wakeup"]] = NAT
    table = stats.quantile_table(store.build(joined, run=make_run(), host=make_host()))
    assert int(table.n.sel(hop="total_latency")) == 990
    assert int(table.n.sel(hop="wakeup")) == 989
    exact = np.sort(joined.truth[10:, STAGE_INDEX["copy"]])
    row = table.sel(hop="copy")
    assert float(row.latency.sel(quantile=0.5)) == exact[494]
    assert float(row.latency_low.sel(quantile=0.5)) < exact[494] < float(row.latency_high.sel(quantile=0.5))
    assert float(row.latency.sel(quantile=1.0)) == exact[-1]
    assert np.isnan(row.latency_low.sel(quantile=[0.999, 1.0])).all()
    assert np.isnan(table.latency.sel(hop="hardirq")).all()


def test_two_speeds_are_two_modes_and_one_is_one():
    rng = np.random.default_rng(29)
    two = stats.find_modes(np.r_[rng.lognormal(9, 0.1, 6000), rng.lognormal(9.7, 0.1, 4000)])
    assert len(two) == 2
    assert two[0].center == pytest.approx(np.exp(9), rel=0.1)
    assert two[1].share == pytest.approx(0.4, abs=0.02)
    assert all(len(stats.find_modes(rng.lognormal(9, 0.4, 3000))) == 1 for _ in range(100))
    assert len(stats.find_modes(np.full(500, 7.0))) == 1
    assert stats.find_modes(np.ones(10)) == []


def test_no_values_give_no_number():
    empty = stats.quantile_interval(np.array([np.nan]), 0.5)
    assert np.isnan(empty.value)
    assert empty.n == 0


def test_locality_is_the_share_of_packets_processed_where_they_are_read():
    near, far = _tree(1, path_kind="backlog_rps"), _tree(2)
    assert stats.locality(near) == {"same_cpu": 1, "same_core": 1, "same_llc": 1, "same_node": 1}
    assert stats.locality(far) == {"same_cpu": 0, "same_core": 0, "same_llc": 1, "same_node": 1}


@pytest.mark.parametrize("n", [2, 3])
def test_repetitions_that_say_nothing_get_no_interval_and_no_verdict(n):
    rng = np.random.default_rng(7)
    runs = [np.full(100, level) + rng.normal(0, 1, 100) for level in (1e3, 1e6, 1e9)[:n]]
    estimate = stats.estimate_quantile(runs, 0.5)
    assert np.isnan([estimate.low, estimate.high]).all()
    for found in stats.compare(runs, [10 * run for run in runs]):
        assert np.isnan([found.ratio_low, found.ratio_high, found.difference_low, found.difference_high]).all()
        assert found.verdict == stats.CANNOT_TELL


def test_two_equal_runs_give_no_verdict_either():
    rng = np.random.default_rng(8)
    a, b = ([rng.normal(level, 1, 200) for _ in range(2)] for level in (1e4, 2e4))
    assert {found.verdict for found in stats.compare(a, b)} == {stats.CANNOT_TELL}
