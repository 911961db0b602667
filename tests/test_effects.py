"""Settings, their interactions, ranks and the order of the runs against planted truth."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from rxlab.dataset import effects, stats

SETTINGS = {"rps": ["off", "on"], "gro": ["off", "on"], "load": [1000, 4000, 8000]}


def _sweep(rng, reps=5, *, rps=1.0, gro=1.0, both=1.0, spread=0.01) -> xr.DataArray:
    """A full grid whose `rps=on` and `gro=on` multiply the latency, and once more together; `load` does nothing."""
    shape = (*(len(values) for values in SETTINGS.values()), reps)
    logs = np.log(10_000) + rng.normal(0, spread, shape)
    logs[1] += np.log(rps)
    logs[:, 1] += np.log(gro)
    logs[1, 1] += np.log(both)
    return xr.DataArray(np.exp(logs), dims=(*SETTINGS, "repetition"), coords=SETTINGS)


def _named(found, *settings, level=None):
    return next(e for e in found if e.settings == settings and (level is None or e.levels[-1] == level))


def test_planted_effects_and_their_interaction_come_back():
    found = effects.find_effects(_sweep(np.random.default_rng(1), rps=0.8, gro=1.1, both=1.2))
    assert len(found) == 4 + 1 + 2 + 2  # main: 1 + 1 + 2; interactions: rps-gro 1, with load 2 each
    rps, gro, both = _named(found, "rps"), _named(found, "gro"), _named(found, "rps", "gro")
    # Averaged over the other setting, half of the interaction is in each main effect.
    assert rps.ratio == pytest.approx(0.8 * np.sqrt(1.2), rel=0.01)
    assert gro.ratio == pytest.approx(1.1 * np.sqrt(1.2), rel=0.01)
    assert both.ratio == pytest.approx(1.2, rel=0.02)
    assert all(effect.is_known for effect in (rps, gro, both))
    assert not any(effect.is_known for effect in found if "load" in effect.settings)
    assert rps.cells == 6
    assert _named(found, "load", level=8000).baselines == (1000,)
    assert rps.words == "rps=on against off"
    assert both.words == "rps=on with gro=on"


def test_a_missing_configuration_is_left_out_of_both_sides():
    values = _sweep(np.random.default_rng(2), rps=0.5)
    values[1, 0, 0] = np.nan
    values[0, 0, 0] *= 100  # its partner is gone, so this must not count
    rps = _named(effects.find_effects(values), "rps")
    assert rps.cells == 5
    assert rps.ratio == pytest.approx(0.5, rel=0.02)


def test_one_run_each_gives_ratios_without_a_claim():
    found = effects.find_effects(_sweep(np.random.default_rng(3), reps=1, rps=0.5))
    assert np.isnan([effect.p_corrected for effect in found]).all()
    assert np.isnan([effect.low for effect in found]).all()
    assert not any(effect.is_known for effect in found)


def test_effects_cover_and_seldom_cry_wolf():
    rng = np.random.default_rng(4)
    families = [effects.find_effects(_sweep(rng, reps=4, rps=0.9)) for _ in range(150)]
    rps = [_named(family, "rps") for family in families]
    assert 0.90 <= np.mean([e.low <= 0.9 <= e.high for e in rps]) <= 0.99
    assert all(effect.is_known for effect in rps)
    others = [any(e.is_known for e in family if e.settings != ("rps",)) for family in families]
    assert np.mean(others) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 150)


def test_ranks_say_what_is_sure():
    rng = np.random.default_rng(5)
    truth = {"slow": 12_000, "fast": 10_000, "as fast": 10_010, "slowest": 20_000}
    groups = {label: value * np.exp(rng.normal(0, 0.01, 6)) for label, value in truth.items()}
    ranks = effects.rank(groups, quantile=0.99)
    assert {r.label: (r.first, r.last) for r in ranks} == {
        "fast": (1, 2),
        "as fast": (1, 2),
        "slow": (3, 3),
        "slowest": (4, 4),
    }
    assert ranks[0].against_best is None
    assert ranks[-1].against_best.ratio == pytest.approx(2, rel=0.03)
    assert ranks[-1].against_best.verdict == stats.WORSE
    assert ranks[-1].against_best.quantile == 0.99


def test_ranks_of_equal_configurations_are_open():
    rng = np.random.default_rng(6)
    wrong = 0
    for _ in range(150):
        ranks = effects.rank({f"c{i}": 1e4 * np.exp(rng.normal(0, 0.02, 5)) for i in range(4)})
        wrong += any((r.first, r.last) != (1, 4) for r in ranks)
    assert wrong / 150 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 150)


def _order(rng, *, drift=1.0, carry=1.0, n=20, blocked=False):
    labels = ["a", "b"] * (n // 2)
    rng.shuffle(labels)
    if blocked:
        labels.sort()
    logs = np.log(1e4) + rng.normal(0, 0.01, n) + np.log(drift) * np.linspace(0, 1, n)
    logs += np.array([0.2 if label == "b" else 0.0 for label in labels])
    logs[1:] += np.array([np.log(carry) if label == "b" else 0.0 for label in labels[:-1]])
    shuffled = rng.permutation(n)  # given in any order: the start times say which came first
    starts = np.arange(n)[shuffled] * 10**9
    return [labels[i] for i in shuffled], starts, np.exp(logs[shuffled])


def test_a_drift_and_what_is_left_behind_are_found():
    found = effects.check_order(*_order(np.random.default_rng(7), drift=1.1))
    assert found.p_drift < 0.05
    assert found.low <= 1.1 <= found.high
    assert not found.p_carry < 0.05
    assert found.confounded < 0.3
    left = effects.check_order(*_order(np.random.default_rng(8), carry=1.05))
    assert left.p_carry < 0.05


def test_no_order_effect_is_seldom_seen():
    rng = np.random.default_rng(9)
    found = [effects.check_order(*_order(rng)) for _ in range(300)]
    alarms = np.mean([min(one.p_drift, one.p_carry) < 0.05 for one in found])
    assert alarms <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 300)
    assert np.mean([one.low <= 1 <= one.high for one in found]) == pytest.approx(0.95, abs=0.03)


def test_configurations_one_after_the_other_are_confounded_with_time():
    assert effects.check_order(*_order(np.random.default_rng(10), blocked=True)).confounded > 0.7
    assert not effects.check_order(["a", "b"], [0, 1], [1.0, 2.0]).is_known
