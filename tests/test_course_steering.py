"""Wrong answers to the exercises of unit 8, and what their checks say about them; see test_course.py."""
from functools import cache

import numpy as np
import torch
from scipy.stats import binomtest

from circuitbench import checks_steering as checks
from circuitbench.scores import NeutralText, nats, perplexity_ratio


@cache
@torch.no_grad()
def means(layer=4, pooled=False, last=False):
    "Means of the two groups of verses, read by the package."
    site, out = f'blocks.{layer}.resid_post', []
    for kind in ('with', 'without'):
        seen = [checks.shipped().run_with_cache(v, site)[1][site][0] for v in checks.verses()[kind]]
        out.append(torch.cat(seen).mean(0) if pooled else torch.stack([x[-1] if last else x.mean(0) for x in seen]).mean(0))
    return out


def differences():
    (a, b), minus = means(), lambda pair: (pair[0] - pair[1],)
    return [((b - a,), 'other way'), (minus(means(pooled=True)), 'long verses count more'), (minus(means(last=True)), 'last token'), (minus(means(3)), 'behind block 3'),
            ((a,), 'mean without them is missing'), ((40*(a - b),), 'sum over the verses'), (((a - b)/(a - b).norm(),), 'has length 1'), ((torch.zeros(40, 256),), 'over the verses, too'), ((...,), 'not there yet')]


def costs():
    def with_slip(slip):
        def cost(clean, pushed, ids):
            if slip == 'raw': p, q = clean, pushed
            else: p, q = clean.log_softmax(-1), pushed.log_softmax(-1)
            w, d = clean.softmax(-1), p - q
            kl = {'back': lambda: (q.exp()*-d).sum(-1).mean(), 'sum': lambda: (w*d).sum(), 'row': lambda: (w*d).sum((1, 2)).mean(), 'bits': lambda: (w*d).sum(-1).mean()/np.log(2),
                  'cross': lambda: -(w*q).sum(-1).mean(), 'vocabulary': lambda: (w*d).mean()}.get(slip, lambda: (w*d).sum(-1).mean())()
            at = lambda v, k: v[:, :ids.shape[1] - k].gather(2, ids[:, k:, None])
            lost = at(d, 1)
            ratio = {'upside': (-lost.mean()).exp(), 'own': at(d, 0).mean().exp(), 'log': lost.mean(), 'pushed': (-at(q, 1).mean()).exp(), 'losses': at(q, 1).mean()/at(p, 1).mean(),
                     'ratios': lost.exp().mean(), 'kl': kl.exp()}.get(slip, lost.mean().exp())
            return None if slip == 'nothing' else (kl, ratio)
        return (cost,)
    said = {'back': 'wrong way round', 'sum': 'sum of KL', 'row': 'of a row', 'bits': 'in bits', 'cross': 'cross-entropy', 'raw': 'log_softmax', 'vocabulary': 'vocabulary too', 'upside': 'upside down', 'own': 'shift by one',
            'log': 'log of the ratio', 'pushed': 'perplexity of the pushed', 'losses': 'ratio of losses', 'ratios': 'ratios of single tokens', 'kl': 'exp of the KL', 'nothing': 'Expected two numbers'}
    return [(with_slip(slip), phrase) for slip, phrase in said.items()]


def intervals():
    def wilson(z=1.96, root=True, divided=True):
        def f(k, n):
            p = k/n
            half, c = z*np.sqrt(p*(1 - p)/n + root*z*z/(4*n*n)), 1 + divided*z*z/n
            return (p + z*z/(2*n) - half)/c, (p + z*z/(2*n) + half)/c
        return f
    def wald(k, n): half = 1.96*np.sqrt(k/n*(1 - k/n)/n); return k/n - half, k/n + half
    def agresti(k, n): c, m = (k + 1.92)/(n + 3.84), n + 3.84; half = 1.96*np.sqrt(c*(1 - c)/m); return c - half, c + half
    good = wilson()
    return [((wald,), 'textbook interval'), ((lambda k, n: np.clip(wald(k, n), 0, 1),), 'cut at 0 and 1'), ((wilson(1),), 'standard error'), ((wilson(1.645),), '90 %'), ((wilson(root=False),), 'In the root'),
            ((wilson(divided=False),), 'division by'), ((agresti,), 'Agresti'), ((lambda k, n: binomtest(k, n).proportion_ci(),), 'Clopper'), ((lambda k, n: np.multiply(100, good(k, n)),), 'percent'),
            ((lambda k, n: good(k, n)[::-1],), 'exchanged'), ((lambda k, n: k/n,), 'two numbers'), ((lambda k, n: None,), 'two numbers')]


def randoms():
    g = lambda seed: torch.Generator().manual_seed(seed)
    normal = lambda v, seed: torch.randn(len(v), generator=g(seed))
    fit = lambda x, v: x*v.norm()/x.norm()
    return [((lambda v, s: fit(torch.rand(len(v), generator=g(s)), v),), 'above 0'), ((normal,), 'divide by its own length'), ((lambda v, s: normal(v, s)*v.norm(),), 'divide by its own length'),
            ((lambda v, s: fit(normal(v, s), torch.ones(1)),), 'of length 1'), ((lambda v, s: fit(torch.randn(len(v)), v),), 'same seed'), ((lambda v, s: fit(normal(v, 0), v),), 'All seeds'),
            ((lambda v, s: v[torch.randperm(len(v), generator=g(s))],), 'another order'), ((lambda v, s: fit(v + normal(v, s), v),), 'alike'), ((lambda v, s: fit(normal(v[:5], s), v),), 'has shape (5,)')]


def searches():
    def bisect(price, want, far=True, keep=True, most=12):
        low, high = 0., 1.
        while far and price(high) < want: high *= 2
        for _ in range(most):
            half = (low + high)/2
            if (price(half) < want) == keep: low = half
            else: high = half
        return (low + high)/2
    def endless(price, want):
        while price(1.) < want: pass
    def doubled(price, want):
        s = 1.
        while price(s) < want: s *= 2
        return s
    return [((lambda p, w: w,), 'the KL, not'), ((lambda p, w: w/p(1.),), 'in proportion'), ((lambda p, w: (w/p(1.))**.5,), 'with the square'), ((lambda p, w: bisect(p, w, far=False),), 'does not go that far'),
            ((doubled,), 'first strength that costs too much'), ((lambda p, w: bisect(p, w, keep=False),), 'Which half'), ((endless,), 'does the loop end'), ((lambda p, w: bisect(p, w, most=2),), 'Which half'), ((lambda p, w: None,), 'return something')]


def lefts():
    size = lambda change: change.flatten(1).norm(dim=1)
    first = lambda x: torch.cat([torch.ones(1, *x.shape[1:]).to(x), x])
    kept = lambda d: first(d.cumprod(0))
    def right(change, d): w = (kept(d)*size(change)).norm(dim=1); return w/w[0]
    return [((lambda c, d: right(c, d)*size(c).norm(),), 'share of step 0'), ((lambda c, d: first(d.mean(1).cumprod(0)),), 'Mean decays'), ((lambda c, d: kept(d).mean(1),), 'count alike'),
            ((lambda c, d: (kept(d)*size(c)).sum(1)/size(c).sum(),), 'do not add up'), ((lambda c, d: right(c, d)**2,), 'root is missing'), ((lambda c, d: (first(d)*size(c)).norm(dim=1)/size(c).norm(),), 'Each step alone'),
            ((lambda c, d: 1 - right(c, d),), 'what is lost'), ((lambda c, d: right(c, d.flip(0)),), 'last step comes first'), ((lambda c, d: right(c, d)[1:],), 'Step 0'), ((lambda c, d: kept(d),), 'by head')]


def picks():
    def pair(f): return (lambda hits, some: f(hits, some, hits[:, some].mean(1), hits[:, ~some].mean(1)),)
    return [(pair(lambda h, s, on, off: (on.max(), off.max())), 'chosen twice'), (pair(lambda h, s, on, off: (on[h.mean(1).argmax()], off[h.mean(1).argmax()])), 'choose by all'),
            (pair(lambda h, s, on, off: (on.max(), h[on.argmax()].mean())), 'chosen by included'), (pair(lambda h, s, on, off: (on[off.argmax()], off.max())), 'sets are exchanged'),
            (pair(lambda h, s, on, off: (off[on.argmax()], on.max())), 'two numbers are exchanged'), (pair(lambda h, s, on, off: (on.max(), off.mean())), 'mean over all'),
            (pair(lambda h, s, on, off: (h[on.argmax(), s].sum(), h[on.argmax(), ~s].sum())), 'counts'), (pair(lambda h, s, on, off: (on[on.argmin()], off[on.argmin()])), 'worst'), (pair(lambda h, s, on, off: on.max()), 'two numbers')]


@cache
@torch.no_grad()
def honest():
    "A report that the check accepts, measured by the package."
    from circuitbench.edit import add
    model, (a, b) = checks.shipped(), means()
    e, length = add('blocks.4.resid_post', 5*(a - b)), 5*float((a - b).norm())
    share = lambda group, edit=(): checks.speaks(model.generate(checks.rows()[group], checks.NEW, edit=edit).text).mean()
    counted = NeutralText(model, checks.rows()['neutral'])
    counted.half, counted._start = True, lambda ids: checks.READ                     # where texts are written
    price = counted.cost(lambda ids, length: model_under(model, e))
    success = share('test', e)
    return dict(claim=f'{success*60:.0f} of 60 texts; prompting comes near', n=60, strength=length, success=success, interval=tuple(binomtest(round(60*success), 60).proportion_ci(method='wilson')),
                clean=share('test'), random=.02, prompted=.48, kl=nats(price), ratio=perplexity_ratio(price), chosen_on='neutral verses', side_effect='5 % fewer different tokens'), share('choose', e)


def model_under(model, edit):
    "A context in which every run has an edit."
    from contextlib import contextmanager
    class Under:
        silent = ()
        @contextmanager
        def of_run(self, *_): yield edit
    @contextmanager
    def under():
        model.standing.append(one := Under())
        try: yield
        finally: model.standing.remove(one)
    return under()


def reports():
    good, tuned = honest()
    less = lambda k: ({n: v for n, v in good.items() if n != k},)
    other = lambda **k: (good | k,)
    return [((...,), 'Expected a dict'), (less('interval'), '`interval` is missing'), (other(side_effect=None), '`side_effect` is missing'), (other(n=20), 'twenty'), (other(n=720), 'tokens are no cases'), (other(success=100*good['success']), 'between 0 and 1'),
            (other(success=tuned), 'twenty beginnings of the dose'), (other(strength=5.), 'length of what is added'), (other(interval=tuple(binomtest(round(20*good['success']), 20).proportion_ci(method='wilson'))), 'of 20 beginnings'),
            (other(interval=(.5, .9)), 'not that of Wilson'), (other(clean=0.), 'without a push'), (other(random=good['success']), 'mean of the random'), (other(prompted=good['success']), 'after the text of'),
            (other(kl=good['ratio'], ratio=good['kl']), 'exchanged'), (other(kl=.1), 'neutral verses say'), (other(chosen_on='the test set'), 'then the test is none'), (other(side_effect='none seen'), 'has no number'),
            (other(claim='Steering works, prompting comes near, 40 of 60'), "'works'"), (other(claim='Texts speak of Egypt'), 'has no number'), (other(claim='40 of 60 texts speak of Egypt'), 'silent about prompting')]


def test_an_honest_report_is_whole():
    assert checks.report(honest()[0]).ok


WRONG = {'difference': differences, 'cost': costs, 'wilson': intervals, 'random_like': randoms, 'strength_at': searches, 'left_of': lefts, 'picked': picks, 'report': reports}
