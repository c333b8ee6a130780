"""Measures of an order: against scipy and scikit-learn's definitions by brute force, simulation, numpy, and draws from known distributions."""
import numpy as np
import pytest
import torch
from scipy.stats import mannwhitneyu

from circuitbench.judge import BUDGETS, Interval, auprc, auroc, bootstrap, cmd, cpr, faithfulness_of, recovery

trapezoid = getattr(np, 'trapezoid', None) or np.trapz                          # its name before numpy 2


def draw(seed, n=40, ties=True):
    "Scores, with ties, and labels of which some are true and some are not."
    make = np.random.default_rng(seed)
    scores = make.integers(0, 8, n).astype(float) if ties else make.normal(size=n)
    labels = make.random(n) < make.uniform(.1, .9)
    labels[:2] = True, False
    return scores, labels


# -- against a circuit ---------------------------------------------------------------------
@pytest.mark.parametrize('ties', [True, False])
@pytest.mark.parametrize('seed', range(20))
def test_auroc(seed, ties):
    s, y = draw(seed, ties=ties)
    a, b = s[y], s[~y]
    by_pairs = np.mean([(u > v) + .5*(u == v) for u in a for v in b])
    assert auroc(s, y) == pytest.approx(by_pairs) == pytest.approx(mannwhitneyu(a, b).statistic/(len(a)*len(b)))
    assert auroc(-s, y) == pytest.approx(1 - by_pairs) == pytest.approx(auroc(s, ~y)) and auroc(3*s + 1, y) == pytest.approx(by_pairs)


@pytest.mark.parametrize('ties', [True, False])
@pytest.mark.parametrize('seed', range(20))
def test_auprc(seed, ties):
    "At each threshold that is a score: precision, weighted by how much recall it adds."
    s, y = draw(seed, ties=ties)
    total, last = 0., 0.
    for t in sorted({*s}, reverse=True):
        kept = s >= t
        recall = y[kept].sum()/y.sum()
        total, last = total + (recall - last)*y[kept].mean(), recall
    assert auprc(s, y) == pytest.approx(total)
    if not ties: assert auprc(s, y) == pytest.approx(np.mean([y[s >= v].mean() for v in s[y]]))


@pytest.mark.parametrize('seed', range(6))
def test_recovery_is_what_a_tie_broken_at_random_finds(seed):
    s, y = draw(seed, n=24)
    make, n = np.random.default_rng(seed), int(y.sum())
    order = np.argsort(-(s + make.random((20000, len(s)))*.5), axis=1)[:, :n]              # whole numbers apart, ties in any order
    assert recovery(s, y) == pytest.approx(y[order].mean(), abs=.005)
    distinct = s + make.permutation(len(s))*1e-3
    assert recovery(distinct, y) == pytest.approx(y[np.argsort(-distinct)[:n]].mean())


def test_perfect_and_worst_orders():
    y = [True]*3 + [False]*5
    for f in (auroc, auprc, recovery): assert f(range(8, 0, -1), y) == 1
    assert auroc(range(8), y) == 0 == recovery(range(8), y) and auprc(range(8), y) == pytest.approx((1/6 + 2/7 + 3/8)/3)
    for f, chance in ((auroc, .5), (auprc, 3/8), (recovery, 3/8)): assert f([2.]*8, y) == pytest.approx(chance)


def test_random_scores_find_nothing():
    make, y = np.random.default_rng(0), np.arange(60) < 20
    rows = make.normal(size=(3000, 60))
    assert np.mean([auroc(s, y) for s in rows]) == pytest.approx(.5, abs=.01)
    assert np.mean([recovery(s, y) for s in rows]) == pytest.approx(1/3, abs=.01)


@pytest.mark.parametrize('f', [auroc, auprc, recovery])
def test_unlabelled_parts_are_left_out_and_missing_scores_come_last(f):
    s, y = draw(3)
    want = f(s, y)
    mixed, labels = np.r_[s, 99., -99.], [*y.tolist(), None, None]
    assert f(mixed, labels) == want == f(mixed, torch.tensor([*y.tolist(), torch.nan, torch.nan])) == f(mixed, np.array([*y, np.nan, np.nan]))
    lost = s.copy()
    lost[:2] = np.nan
    low = s.copy()
    low[:2] = -1e9
    assert f(lost, y) == f(low, y)


@pytest.mark.parametrize('f', [auroc, auprc, recovery])
def test_scores_may_come_as_anything(f):
    s, y = draw(5)
    want = f(s, y)
    assert want == f(s.tolist(), y.tolist()) == f(torch.tensor(s), torch.tensor(y)) == f(torch.tensor(s, requires_grad=True), y)
    assert f(torch.tensor(s).view(4, 10), y) == want == f(torch.tensor(s).half(), y)


@pytest.mark.parametrize('f', [auroc, auprc, recovery])
def test_scores_keep_their_precision(f):
    "Numbers that differ in float64 do not tie; half precision of either kind is taken."
    assert f([1., 1 + 1e-12], [False, True]) == 1 == f(np.array([1., 1 + 1e-12]), [False, True])
    s, y = draw(5)
    assert f(torch.tensor(s).bfloat16(), y) == f(s, y)


@pytest.mark.parametrize('f', [auroc, auprc, recovery])
def test_labels_that_are_refused(f):
    with pytest.raises(ValueError, match='got 3 scores of 2 labels, expected as many'): f([1, 2, 3], [True, False])
    with pytest.raises(ValueError, match='got 2 of 2 labels true, expected some that are and some that are not'): f([1, 2], [True, True])
    with pytest.raises(ValueError, match='got 0 of 2 labels true'): f([1, 2, 3], [False, None, False])
    with pytest.raises(ValueError, match='got 0 of 0 labels true'): f([1], [None])


# -- by what the best carry ----------------------------------------------------------------
@pytest.mark.parametrize('seed', range(5))
def test_areas(seed):
    f = np.random.default_rng(seed).normal(.6, .5, 10)
    assert len(BUDGETS) == 10 and BUDGETS[0] == .001 and BUDGETS[-1] == 1
    assert cpr(BUDGETS, f) == pytest.approx(trapezoid(f, BUDGETS)) and cmd(BUDGETS, f) == pytest.approx(trapezoid(np.abs(1 - f), BUDGETS))
    assert cpr(BUDGETS, torch.tensor(f)) == pytest.approx(cpr(BUDGETS, f.tolist()))
    x = np.sort(np.random.default_rng(seed + 9).random(10))
    assert cpr(x, f) == pytest.approx(trapezoid(f, x))


def test_areas_of_known_curves():
    x = np.linspace(0, 1, 11)
    assert cpr(x, x) == pytest.approx(.5) == pytest.approx(cmd(x, x)) and cpr(x, 1 + x) == pytest.approx(1.5) and cmd(x, 1 + x) == pytest.approx(.5)
    assert cmd(x, np.ones(11)) == 0 and cmd(x, 2*(x > .35)) == pytest.approx(1)             # above the model is as far as below


@pytest.mark.parametrize('x, y', [([.5, .5], [1, 1]), ([1, 0], [1, 1]), ([0, .5, 1], [1, 1]), ([.5], [1]), ([], []), ([0, 1.1], [1, 1]), ([-.1, 1], [1, 1])])
def test_curves_that_are_refused(x, y):
    for f in (cpr, cmd):
        with pytest.raises(ValueError, match='expected one each, ascending from 0 to 1'): f(x, y)


def test_faithfulness():
    assert faithfulness_of(3., 5., 1.) == .5 and faithfulness_of(5., 5., 1.) == 1 and faithfulness_of(1., 5., 1.) == 0
    assert faithfulness_of(6., 5., 1.) == 1.25 and faithfulness_of(-1., -3., 1.) == .5
    assert torch.equal(faithfulness_of(torch.tensor([1., 3.]), torch.tensor(5.), torch.tensor(1.)), torch.tensor([0., .5]))
    for whole, empty in ((2., 2.), (float('nan'), 1.)):
        with pytest.raises(ValueError, match='the counterfactual does not change the answer'): faithfulness_of(1., whole, empty)


# -- intervals -----------------------------------------------------------------------------
def test_an_interval_of_a_mean_covers_it_as_often_as_it_says():
    make = np.random.default_rng(0)
    found = [bootstrap(make.exponential(2, 60), draws=300, seed=i) for i in range(300)]
    assert .88 < np.mean([i.low <= 2 <= i.high for i in found]) < .98
    narrow = [bootstrap(make.normal(2, 1, 60), draws=300, share=.5, seed=i) for i in range(300)]
    assert .42 < np.mean([i.low <= 2 <= i.high for i in narrow]) < .58


def test_an_interval_is_that_of_the_normal_for_many():
    x = np.random.default_rng(1).normal(3, 2, 2000)
    found = bootstrap(x, draws=4000)
    half = 1.96*x.std()/2000**.5
    assert found.value == pytest.approx(x.mean()) and (found.low, found.high) == pytest.approx((x.mean() - half, x.mean() + half), abs=.01)
    assert bootstrap(torch.tensor(x), draws=50) == bootstrap(x, draws=50) != bootstrap(x, draws=50, seed=1)
    assert repr(Interval(.12345, -1., 2.)) == '0.123 [-1.000, 2.000]'


def test_an_interval_of_a_statistic_of_rows():
    "Scores and labels drawn together; draws in which it cannot be had are left out."
    make = np.random.default_rng(2)
    y = make.random(200) < .5
    rows = np.stack([y + make.normal(size=200), y], 1)
    found = bootstrap(rows, of=lambda r: auroc(r[:, 0], r[:, 1] > .5), draws=300)
    assert found.low < found.value == auroc(rows[:, 0], y) < found.high and found.low > .6
    ratio = bootstrap(np.array([0., 0., 1.]), of=lambda r: np.nan if not r.any() else r.mean(), draws=200)
    assert np.isfinite([ratio.low, ratio.high]).all() and ratio.low >= 1/3
    nothing = bootstrap([1., 2.], of=lambda r: np.nan, draws=20)
    assert np.isnan([nothing.value, nothing.low, nothing.high]).all() and bootstrap([4.]) == Interval(4., 4., 4.)


def test_an_interval_without_rows():
    for rows in ([], torch.zeros(0, 3)):
        with pytest.raises(ValueError, match='got no rows'): bootstrap(rows)
