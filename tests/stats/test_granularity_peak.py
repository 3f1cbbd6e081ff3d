"""The bootstrap of the peak: it covers the truth, it has no opinion on a flat line, and it is surer with more episodes."""

import numpy as np
import pytest

from libra_ray.stats.granularity_peak import estimate_peak, paired_difference, success_draws
from libra_ray.stats.intervals import wilson

INVERTED_U = {2: 0.45, 4: 0.6, 6: 0.7, 10: 0.8, 16: 0.72, 32: 0.6, 64: 0.5, 100: 0.4}
FLAT = dict.fromkeys(INVERTED_U, 0.6)
RISING = dict(zip(INVERTED_U, np.linspace(0.2, 0.9, 8), strict=True))


def _measured(curve, rng, *, seeds=3, episodes=60, between=0.03, tasks=2):
    """Outcomes of a curve with a known truth; seeds differ by `between`."""
    return {
        n: [
            [rng.random(episodes) < np.clip(rate + shift, 0, 1) for _ in range(tasks)]
            for shift in rng.normal(0, between, size=seeds)
        ]
        for n, rate in curve.items()
    }


def test_the_interval_covers_the_true_peak():
    rng = np.random.default_rng(0)
    peaks = [estimate_peak(_measured(INVERTED_U, rng), draws=500) for _ in range(60)]
    covered = np.mean([peak.n.low <= 10 <= peak.n.high for peak in peaks])
    assert covered >= 0.9
    assert np.mean([peak.inverted_u for peak in peaks]) > 0.9, "such a curve is seen"
    assert all(peak.shares[10] == max(peak.shares.values()) for peak in peaks[:1])


def test_contrasts_cover_the_true_differences():
    rng = np.random.default_rng(1)
    covered = []
    for _ in range(60):
        peak = estimate_peak(_measured(INVERTED_U, rng), draws=500)
        covered.append(peak.rise.low <= 0.35 <= peak.rise.high)
        covered.append(peak.fall.low <= 0.40 <= peak.fall.high)
    assert np.mean(covered) >= 0.9


@pytest.mark.parametrize(("curve", "at_most"), [(FLAT, 0.1), (RISING, 0.0)])
def test_what_is_no_inverted_u_is_not_called_one(curve, at_most):
    rng = np.random.default_rng(2)
    peaks = [estimate_peak(_measured(curve, rng), draws=300) for _ in range(40)]
    assert np.mean([peak.inverted_u for peak in peaks]) <= at_most
    widths = [np.log(peak.n.high / peak.n.low) for peak in peaks]
    if curve is FLAT:
        assert np.median(widths) > np.log(8), "a flat line has its peak anywhere"
    else:
        assert all(peak.n.high == pytest.approx(100) for peak in peaks)


def test_shares_are_a_distribution_and_the_reference_is_the_published_one():
    peak = estimate_peak(_measured(INVERTED_U, np.random.default_rng(3)))
    assert sum(peak.shares.values()) == pytest.approx(1)
    assert peak.reference == 10
    without = {n: cell for n, cell in _measured(INVERTED_U, np.random.default_rng(3)).items() if n != 10}
    assert estimate_peak(without).reference in without


def test_one_seed_has_the_uncertainty_of_its_episodes():
    """Without other seeds the bootstrap is a binomial one, which Wilson's interval is close to."""
    episodes = np.arange(200) < 140
    low, high = np.quantile(success_draws([[episodes]], np.random.default_rng(0)), [0.025, 0.975])
    bounds = wilson(140, 200)
    assert (low, high) == pytest.approx((bounds.low, bounds.high), abs=0.02)


def test_seeds_that_differ_widen_the_interval():
    rng = np.random.default_rng(0)
    same = success_draws([[np.arange(100) < 50]] * 4, rng)
    apart = success_draws([[np.arange(100) < k] for k in (20, 40, 60, 80)], rng)
    assert apart.std() > 2 * same.std()


def test_nonsense_is_refused():
    cell = [[np.ones(3, bool)]]
    with pytest.raises(ValueError, match="at least three"):
        estimate_peak({2: cell, 4: cell})
    with pytest.raises(ValueError, match="as many tasks"):
        success_draws([[np.ones(3, bool)], []], np.random.default_rng(0))


class TestPairedDifference:
    """What one controller adds to another on the same episodes."""

    @staticmethod
    def _pairs(rng, gain):
        """Three seeds, two tasks of 30 episodes: the first succeeds wherever the second does, and in `gain` of the others."""
        pairs = []
        for _ in range(3):
            second = [rng.random(30) < 0.4 for _ in range(2)]
            pairs.append(([task | (rng.random(30) < gain / 0.6) for task in second], second))
        return pairs

    def test_the_same_controller_adds_nothing(self):
        pairs = [(second, second) for _, second in self._pairs(np.random.default_rng(0), 0.2)]
        found = paired_difference(pairs)
        assert (found.value, found.low, found.high) == (0, 0, 0)

    def test_what_one_gains_the_other_loses(self):
        pairs = self._pairs(np.random.default_rng(1), 0.2)
        there, back = paired_difference(pairs), paired_difference([(second, first) for first, second in pairs])
        assert (there.value, there.low, there.high) == pytest.approx((-back.value, -back.high, -back.low))

    def test_the_interval_covers_the_truth(self):
        rng = np.random.default_rng(2)
        found = [paired_difference(self._pairs(rng, 0.2), draws=400) for _ in range(60)]
        assert sum(e.low <= 0.2 <= e.high for e in found) >= 51

    def test_pairs_of_other_shapes_are_refused(self):
        uneven = [np.ones(3, bool), np.ones(4, bool)]
        with pytest.raises(ValueError, match="equally many"):
            paired_difference([(uneven, uneven)])
        with pytest.raises(ValueError, match="shapes"):
            paired_difference([])
