"""Wrong answers to unit 6 of the course, sparse autoencoders, and what its checks say about them; `test_course.py` runs them."""
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from circuitbench import checks_coders as checks
from circuitbench.edit import mean, splice, zero
from circuitbench.measure import token_loss
from circuitbench.planted import recovery


# -- exercise 1 -------------------------------------------------------------------------
def read(slip=''):
    "A student's share of rows that are read without a mistake, their slips as options."
    def superposed(D, z, k):
        x = z @ D
        scores = {'magnitude': np.abs(x @ D.T), 'inverse': x @ np.linalg.pinv(D), 'z': z, 'lowest': -x @ D.T}.get(slip, x @ D.T)
        hit = np.take_along_axis(z, np.argsort(-scores, 1)[:, :k], 1) > 0
        right = hit.all(1)
        return {'directions': hit.mean(), 'any': hit.any(1).mean(), 'missed': 1 - right.mean(), 'number': right.sum(), 'rows': right, 'none': None}.get(slip, right.mean())
    return superposed


def in_place(D, z, k):
    D *= -1
    return 1.


def superposition():
    said = {'magnitude': 'rank by magnitude', 'inverse': 'pseudo-inverse', 'z': 'look at z itself', 'lowest': 'lowest scores', 'directions': 'all k are', 'any': 'one direction at least', 'missed': 'something is missed',
            'number': 'not the share', 'rows': 'A value for each row', 'none': 'is None'}
    return [((read(slip),), phrase) for slip, phrase in said.items()] + [((in_place,), 'changes what it is given'), ((lambda D, z, k: z @ D.T,), 'stops with ValueError')]


# -- exercise 2 -------------------------------------------------------------------------
def encoder(slip=''):
    def encode(x, W, b, c, k):
        x = x if slip == 'no b_dec' else x + c if slip == 'plus b_dec' else x - c
        p = x @ W + (0 if slip == 'no b_enc' else b)
        if slip == 'dense': return p.relu()
        if slip == 'batch':
            return torch.where(p >= p.flatten().topk(k*len(x)).values[-1], p, 0).relu()
        rank = {'magnitude': p.abs(), 'magnitude, ReLU': p.abs(), 'smallest': -p}.get(slip, p)
        i = rank.topk({'fewer': k - 1, 'more': k + 1}.get(slip, k)).indices
        v = p.gather(1, i)
        if slip not in ('no ReLU', 'magnitude'): v = v.relu()
        if slip == 'values': return v
        if slip == 'ones': v = (v > 0).float()
        z = torch.zeros_like(p).scatter(1, i, v)
        return {'turned': z.T, 'none': None}.get(slip, z)
    return encode


def decoder(slip=''):
    return lambda z, D, c: z @ D + {'': c, 'no bias': 0, 'off': -c}[slip]


def halves():
    said = {'no b_dec': 'is not taken from x', 'plus b_dec': 'it is taken off', 'no b_enc': 'bias of the encoder', 'dense': 'No latent is set to 0', 'batch': 'BatchTopK', 'no ReLU': 'Without the ReLU',
            'magnitude': 'rank by magnitude', 'magnitude, ReLU': 'pushes out', 'smallest': 'k smallest', 'fewer': 'too few', 'more': 'too many', 'values': 'among 12 zeros', 'ones': 'stands 1',
            'turned': 'wrong order', 'none': 'is None'}
    return [((encoder(slip), decoder()), phrase) for slip, phrase in said.items()] + [
        ((encoder(), decoder('no bias')), 'not added back'), ((encoder(), decoder('off')), 'here it is added back'), ((encoder(), lambda z, D, c: z @ D.T), 'stops with RuntimeError')]


# -- exercise 3 -------------------------------------------------------------------------
def measured(slip=''):
    def metrics(x, y, z):
        e, c, on = (x - y).square().sum(1), (x - x.mean(0)).square().sum(1), z > 0
        fvu, l0, dead = e.sum()/c.sum(), on.sum(1).double().mean(), (~on.any(0)).double().mean()
        fvu = {'explained': 1 - fvu, 'raw': e.sum()/x.square().sum(), 'one mean': e.sum()/(x - x.mean()).square().sum(), 'ratios': (e/c).mean(), 'lengths': e.sqrt().sum()/c.sqrt().sum(), 'root': fvu.sqrt(),
               'mse': (x - y).square().mean(), 'error': e.mean(), 'rows': e.sum()/(x - x.mean(1, keepdim=True)).square().sum(), 'upside': 1/fvu}.get(slip, fvu)
        l0 = {'l1': z.sum(1).mean(), 'part': on.double().mean(), 'sum': on.sum(), 'per latent': on.sum(0).double().mean(), 'most': on.sum(1).max()}.get(slip, l0)
        dead = {'count': (~on.any(0)).sum(), 'alive': 1 - dead, 'zeros': (~on).double().mean(), 'once': (on.sum(0) <= 1).double().mean(), 'tokens': (~on.any(1)).double().mean()}.get(slip, dead)
        return {'two': (fvu, l0), 'none': None}.get(slip, (fvu, l0, dead))
    return metrics


def three_numbers():
    said = {'explained': '1 - FVU', 'raw': 'squares of x itself', 'one mean': 'each coordinate has its own', 'ratios': 'mean of ratios', 'lengths': 'lengths, not squares', 'root': 'root of the FVU',
            'mse': 'mean squared error', 'error': 'error of a token', 'rows': 'mean of each row', 'upside': 'Upside down', 'l1': 'their sum (L1)', 'part': 'not their share', 'sum': 'not a sum',
            'per latent': 'firings a latent', 'most': 'largest number', 'count': 'number of dead latents', 'alive': 'that are alive', 'zeros': 'share of zeros', 'once': 'fires once', 'tokens': 'share of tokens',
            'two': 'three results', 'none': 'returns nothing'}
    return [((measured(slip),), phrase) for slip, phrase in said.items()]


# -- exercise 4 -------------------------------------------------------------------------
def stepped(slip=''):
    def gradients(x, W, D, k):
        p = x @ W
        z = encoder()(x, W, 0, 0, k)
        r = {'no 2': 1, 'sign': -2}.get(slip, 2)*(z @ D - x)/{'sum': 1, 'entries': x.numel()}.get(slip, len(x))
        mask = {'all': torch.ones_like(p), 'positive': p > 0, 'negative': encoder('no ReLU')(x, W, 0, 0, k) != 0, 'z': z}.get(slip, z > 0)
        enc, G = x.T @ ((r @ D.T)*mask), (p.relu() if slip == 'dense' else z).T @ r
        along = {'columns': (G*D).sum(0)*D, 'whole': (G*D).sum()*D}.get(slip, (G*D).sum(1, keepdim=True)*D)
        dec = {'free': G, 'plus': G + along, 'along': along}.get(slip, G - along)
        return {'none': None, 'one': enc, 'turned': (enc.T, dec)}.get(slip, (enc, dec))
    return gradients


def steps():
    said = {'no 2': 'factor of 2', 'sign': 'sign is turned', 'sum': 'divide by their number', 'entries': 'all entries', 'all': 'active latents only', 'positive': 'every positive latent', 'negative': 'is negative passes',
            'z': 'slope of an active latent', 'dense': 'with all latents', 'columns': 'project columns', 'whole': 'whole matrix', 'free': 'keep norm 1', 'plus': 'is added', 'along': 'which is to go',
            'none': 'returns nothing', 'one': 'two results', 'turned': 'wrong order'}
    return [((stepped(slip),), phrase) for slip, phrase in said.items()]


# -- exercise 5 -------------------------------------------------------------------------
def cosine(slip=''):
    def max_cosine(found, true):
        a = true if slip in ('inner', 'true') else F.normalize(true, dim=1)
        c = a @ (found if slip in ('inner', 'found') else F.normalize(found, dim=1)).T
        if slip == 'signed': return c.amax(1).mean()
        c = c.abs()
        return {'mean of found': c.amax(0).mean(), 'most': c.max(), 'all': c.mean(), 'least': c.amax(1).min(), 'each': c.amax(1), 'pairs': recovery(found, true).mcc}.get(slip, c.amax(1).mean())
    return max_cosine


def cosines():
    said = {'inner': 'Inner products', 'true': 'true rows have other lengths', 'found': 'rows found have other', 'signed': 'other sign', 'mean of found': 'over what was found', 'most': 'largest of all', 'all': 'mean of all cosines',
            'least': 'least of the largest', 'each': 'A value for each', 'pairs': 'One to one'}
    return [((cosine(slip),), phrase) for slip, phrase in said.items()]


# -- exercise 6 -------------------------------------------------------------------------
def claimed(slip=''):
    def description(strings, fires, words):
        form = {'blank': str, 'case': lambda s: s.strip().lower()}.get(slip, str.strip)
        says = torch.tensor([form(s) in words for s in strings])
        n, named, fired, hit = len(says), int(says.sum()), int(fires.sum()), int((says & fires).sum())
        if slip == 'zero': return hit/named, hit/fired
        if slip == 'silent': return hit/max(1, named), hit/fired
        if slip == 'nan': return np.float64(hit)/named if named else np.nan, hit/fired
        p, r = hit/max(1, named), hit/max(1, fired)
        return {'exchanged': (r, p), 'accuracy': (float((says == fires).double().mean()), r), 'of all': (hit/n, hit/n), 'counts': (hit, hit), 'named': (p, named/n), 'missed': (1 - p, 1 - r), 'none': None,
                'one': p}.get(slip, (p, r))
    return description


def claims():
    said = {'blank': 'begin with their blank', 'case': 'Upper and lower', 'zero': 'name no token your function divides by 0', 'silent': 'never fires your function divides by 0', 'nan': 'NaN', 'exchanged': 'are exchanged', 'accuracy': 'share of all tokens that is right', 'of all': 'shares of all tokens',
            'counts': 'numbers of tokens', 'named': 'second is the share', 'missed': 'wrong or missed', 'none': 'returns nothing', 'one': 'has shape ()'}
    return [((claimed(slip),), phrase) for slip, phrase in said.items()]


# -- exercise 7 -------------------------------------------------------------------------
@cache
@torch.no_grad()
def losses(over='all'):
    model, sae, ids = checks.shipped(), checks.coder(), checks._held()[0]
    source = model.run_with_cache(ids, sae.site)[1][sae.site]
    edits = (), splice(sae.site, sae), zero(sae.site), mean(sae.site, source, over=over)
    return [float(token_loss(model.run(ids, e).logits, ids))/(ids.numel() - len(ids)) for e in edits]


def saved(slip=''):
    clean, sae, *low = losses('batch' if slip == 'batch' else 'all')
    two = [(v - sae)/(v - clean) for v in low]
    made = {'exchanged': two[::-1], 'lost': [1 - v for v in two], 'gains': [v - sae for v in low], 'losses': low, 'zero': [two[0]]*2, 'mean': [two[1]]*2, 'no clean': [sae/v for v in low], 'part': [1 - sae/v for v in low],
            'unspliced': [1., 1.], 'percent': [100*v for v in two], 'one': two[0], 'none': None}
    return lambda model, coder, ids: made.get(slip, two)


def splices():
    said = {'exchanged': 'zero first', 'lost': 'what is lost', 'gains': 'Losses, not shares', 'losses': 'losses themselves', 'zero': 'against zero', 'mean': 'Both are against the mean', 'no clean': 'where is the clean run',
            'part': 'part of the ablated loss', 'unspliced': 'Nothing is spliced', 'percent': 'percent', 'one': 'two results', 'none': 'returns nothing', 'batch': 'at each position'}
    return [((saved(slip),), phrase) for slip, phrase in said.items()]


WRONG = {'superposed': superposition, 'topk_coder': halves, 'coder_metrics': three_numbers, 'topk_gradients': steps, 'max_cosine': cosines, 'description': claims, 'loss_recovered': splices}
RIGHT = {'superposed': lambda: (read(),), 'topk_coder': lambda: (encoder(), decoder()), 'coder_metrics': lambda: (measured(),), 'topk_gradients': lambda: (stepped(),), 'max_cosine': lambda: (cosine(),),
         'description': lambda: (claimed(),), 'loss_recovered': lambda: (saved(),)}


@pytest.mark.parametrize('name', RIGHT)
def test_right_answers_are_right(name):
    found = getattr(checks, name)(*RIGHT[name]())
    assert found.ok, found.says
