"""Wrong answers to unit 5 of the course, attribution and its failures, and what its checks say about them; `test_course.py` runs them."""
from functools import cache

import numpy as np
import torch

from circuitbench import checks_attribution as checks
from circuitbench.edit import patch, zero
from circuitbench.frozen import frozen_norms
from circuitbench.load import load_model
from circuitbench.pairs import logit_diff

CUBA = 'If a man would see Cuba, let him first see the house of the king, which standeth in'
AUSTRIA, NIGERIA = CUBA.replace('Cuba', 'Austria'), CUBA.replace('Cuba', 'Nigeria')
STATES = [f'blocks.{i}.ssm.state' for i in range(6)]


# -- exercises 1 to 4 -------------------------------------------------------------------
def estimates():
    def with_slip(slip):
        def estimate(model, clean, corrupt, site, metric):
            if slip == 'other way': clean, corrupt = corrupt, clean
            with torch.no_grad(): best, source = model.run_with_cache(clean, site)
            out, cache_ = model.run_with_cache(corrupt, site, grad=True)
            [g] = torch.autograd.grad(metric(out), [cache_[site]])
            b, a = source[site], cache_[site].detach()
            change = {'source': b, 'turned': a - b, 'base': a}.get(slip, b - a)*g
            span = {'raw': 1., 'share': metric(best)}.get(slip, metric(best) - metric(out))
            if slip == 'all': return change.sum()/span
            if slip == 'batch': return change.sum(-1)/span
            if slip == 'channels': return change[0]/span
            if slip == 'nothing': return None
            return (change.sum(-1)[0].abs() if slip == 'size' else change.sum(-1)[0])/span
        return estimate
    said = {'raw': 'Not divided', 'turned': 'sign is turned', 'other way': 'gradient is that of the clean run', 'source': 'subtract the corrupt one',
            'base': 'difference to the clean one is missing', 'size': 'keep the sign', 'share': 'clean run alone', 'all': 'One number for all steps', 'batch': 'row 0', 'channels': 'each channel', 'nothing': 'is None'}
    return [((with_slip(slip),), phrase) for slip, phrase in said.items()]


def rank_correlations():
    rank, c = lambda v: np.ravel(v).argsort().argsort(), lambda a, b: np.corrcoef(np.ravel(a), np.ravel(b))[0, 1]
    return [((c,), 'take their ranks first'), ((lambda a, b: c(a.ravel().argsort(), b.ravel().argsort()),), 'who comes first'), ((lambda a, b: c(rank(abs(a)), rank(abs(b))),), 'Ranks of magnitudes'),
            ((lambda a, b: np.corrcoef(rank(a), rank(b)),), 'beside its diagonal'), ((lambda a, b: c(rank(a), b),), 'one of the two only'), ((lambda a, b: c(a.argsort().argsort(), b.argsort().argsort()),), 'flatten first'),
            ((lambda a, b: c(rank(a), rank(b))**2,), 'has a sign'), ((lambda a, b: None,), 'is None')]


def alphas(n, slip): return [{'left': k/n, 'right': (k + 1)/n}.get(slip, (k + .5)/n) for k in range(n)]


def integrals():
    def with_slip(slip):
        def integrated(model, clean, corrupt, site, steps, metric):
            with torch.no_grad(): (best, b), (out, a) = (model.run_with_cache(t, site) for t in (clean, corrupt))
            total = 0
            for al in alphas(steps, slip):
                x = (a[site] + (0 if slip == 'end' else al)*(b[site] - a[site])).requires_grad_()
                g = torch.autograd.grad(metric(model.run(corrupt, patch(site, x))), [x])[0]
                total = g if slip == 'last' else g/steps if slip == 'last, divided' else total + (g if slip == 'sum' else g/steps)
            got = (total*(a[site] - b[site] if slip == 'turned' else b[site] - a[site])).sum(-1)
            return (got.sum() if slip == 'all' else got[0])/(1. if slip == 'raw' else metric(best) - metric(out))
        return integrated
    said = {'left': 'begin at 0', 'right': 'end at 1', 'sum': 'A sum over the steps', 'end': 'slope at the corrupt end', 'raw': 'Not divided', 'turned': 'sign is turned', 'last': 'last step alone: add',
            'last, divided': 'last step alone, divided', 'all': 'One number for all steps'}
    return [((with_slip(slip),), phrase) for slip, phrase in said.items()]


def eap_igs():
    def with_slip(slip):
        def eap_ig(model, clean, corrupt, sites, steps, metric):
            names = ['embed', *sites]
            with torch.no_grad(): (best, b), (out, a) = (model.run_with_cache(t, names) for t in (clean, corrupt))
            total = [0]*len(sites)
            for al in alphas(steps, slip):
                if slip == 'each':
                    xs = [(a[s] + al*(b[s] - a[s])).requires_grad_() for s in sites]
                    gs = [torch.autograd.grad(metric(model.run(corrupt, patch(s, x))), [x])[0] for s, x in zip(sites, xs)]
                else:
                    x = (a['embed'] + al*(b['embed'] - a['embed'])).requires_grad_()
                    there, c = model.run_with_cache(corrupt, sites, edit=() if slip == 'end' else patch('embed', x), grad=True)
                    gs = torch.autograd.grad(metric(there), [c[s] for s in sites])
                total = [g if slip == 'last' else g/steps if slip == 'last, divided' else t + (g if slip == 'sum' else g/steps) for t, g in zip(total, gs)]
            scores = torch.stack([(t*(b[s] - a[s])*(-1 if slip == 'turned' else 1)).sum(-1)[0] for t, s in zip(total, sites)])
            if slip == 'order': scores = scores.flip(0)
            return (scores.T if slip == 'axes' else scores)/(1. if slip == 'raw' else metric(best) - metric(out))
        return eap_ig
    said = {'left': 'begin at 0', 'right': 'end at 1', 'sum': 'A sum over the steps', 'each': 'moved by itself', 'end': 'use the moved embedding', 'raw': 'Not divided', 'turned': 'sign is turned',
            'last': 'last step alone: add', 'last, divided': 'last step alone, divided', 'order': 'wrong order', 'axes': 'wrong order'}
    return [((with_slip(slip),), phrase) for slip, phrase in said.items()]


# -- exercise 5 -------------------------------------------------------------------------
def heads():
    def with_slip(slip):
        def head_scores(model, pairs, held):
            site, m = 'blocks.0.ssm.y', lambda o: getattr(logit_diff(pairs.last(o.logits), pairs), 'sum' if slip == 'sum' else 'mean')()
            here, there = pairs.corrupt, pairs.clean
            with torch.no_grad(): best, source = model.run_with_cache(there, site)
            with frozen_norms({'never': False, 'always': True, 'exchanged': not held}.get(slip, held)): out, c = model.run_with_cache(here, site, grad=True)
            [g] = torch.autograd.grad(m(out), [c[site]])
            change = (source[site] - c[site].detach())*g
            if slip == 'turned': change = -change
            if slip == 'exact':
                with torch.no_grad(): return torch.stack([m(model.run(here, patch(site, source[site], heads=[h]))) - m(out) for h in range(4)])/(m(best) - m(out))
            span = 1. if slip == 'raw' else (m(best) - m(out)).detach()/(len(pairs) if slip == 'sum' else 1)
            axes = {'steps': (0, 3), 'one': (0, 1, 2, 3)}.get(slip, (0, 1, 3))
            return (change.sum(axes).abs() if slip == 'size' else change.sum(axes))/span
        return head_scores
    said = {'never': 'never held', 'always': 'always held', 'exchanged': 'exchanged', 'raw': 'Not divided', 'turned': 'sign is turned', 'exact': 'exact patches', 'size': 'magnitudes', 'sum': 'sum over the pairs',
            'steps': 'sum over batch, pos and d_head', 'one': 'leave their axis'}
    return [((with_slip(slip),), phrase) for slip, phrase in said.items()]


# -- exercises 6 and 7 ------------------------------------------------------------------
@cache
def model(): return load_model('tiny://mamba2')


def losses(text, answer, edits):
    word = int(model().tokens(answer)[0][0, 0])
    with torch.no_grad(): p = [model().run(text, e).logits[0, -1].log_softmax(-1)[word] for e in ((), edits)]
    return float(p[0] - p[1])


@cache
def forgetting(what='typical', at=9):
    with torch.no_grad(): kept = model().run_with_cache({'corrupt': AUSTRIA}.get(what, list(checks.twenty())), STATES, at=at)[1]
    if what == 'zero': return [zero(n, at=at) for n in STATES]
    return [patch(n, {'typical': v.mean(0, keepdim=True), 'one': v[:1], 'corrupt': v}[what], at=at) for n, v in kept.items()]


@cache
def table(what='typical', at=9):
    e = forgetting(what, at)
    return np.array([[losses(NIGERIA, ' Abuja', [e[j] for j in {i, k}]) for k in range(6)] for i in range(6)])


def pair_tables():
    t = table()
    alone = t.diagonal()
    sums = alone[:, None] + alone
    return [((sums - np.diag(alone),), 'sum of what each loses alone'), ((sums,), 'counted twice'), ((np.repeat(alone[:, None], 6, 1),), 'block k is not used'), ((np.repeat(alone[None], 6, 0),), 'block i is not used'),
            ((np.diag(alone),), 'Nothing but the diagonal'), ((-t,), 'sign is turned'), ((table('zero'),), 'set to zero'), ((table('corrupt'),), 'corrupt prompt'), ((table(at=8),), 'too early'), ((table(at=10),), 'too late'),
            ((t - sums + np.diag(2*alone),), 'beyond the two alone'), ((alone,), 'has shape (6,)'), ((...,), 'not there yet')]


def by_baseline():
    def rows(text=CUBA, answer=' Havana', kinds=('zero', 'typical', 'corrupt'), at=9):
        return np.array([[losses(text, answer, e) for e in forgetting(w, at)] for w in kinds])
    r = rows()
    return [((r[[1, 0, 2]],), 'zero and typical'), ((r[[2, 1, 0]],), 'zero and corrupt'), ((r[[0, 2, 1]],), 'typical and corrupt'), ((r[[2, 0, 1]],), 'all three'), ((np.repeat(r[1:2], 3, 0),), 'All rows are those of typical'),
            ((rows(NIGERIA, ' Abuja'),), 'That is Nigeria'), ((-r,), 'sign is turned'), ((rows(at=8),), 'too early'), ((rows(at=10),), 'too late'), ((rows(kinds=('zero', 'one', 'corrupt')),), 'that of one prompt'),
            ((r/r.sum(1, keepdims=True),), 'shares of each row'), ((r.T,), 'wrong order'), ((r[:2],), 'has shape (2, 6)')]


WRONG = {'estimate': estimates, 'rank_correlation': rank_correlations, 'integrated': integrals, 'eap_ig': eap_igs, 'head_scores': heads, 'pairs_lost': pair_tables, 'baselines': by_baseline}


def test_held_norms_by_hand_are_those_of_autograd_and_of_patching():
    span = float(checks._heads('span'))
    assert np.abs(checks._held() - checks._heads('held')).max() < 1e-3*span and np.abs(checks._held() - checks._heads('exact')).max() < 1e-3*span
    assert np.abs(checks._held() - checks._heads('plain')).max() > .2*span   # which the unit is about
