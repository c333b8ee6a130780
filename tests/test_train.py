"""Training of sparse coders: gradients against autograd and formulas in float64, a step against Adam by hand, what training finds, exports, checkpoints, processes."""
import json
import sys
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import circuitbench.train as train_module
from circuitbench.activation import ACTIVATIONS, Activation, jump, register_activation
from circuitbench.checkpoint import read_state, said, tensorboard, wandb_run, write_state
from circuitbench.coder import Place, SAEConfig
from circuitbench.edit import patch
from circuitbench.gradient import sparse_axes
from circuitbench.load import load_model
from circuitbench.measure import evaluate, rows_of
from circuitbench.recipe import Recipe
from circuitbench.sae import SAE
from circuitbench.sparse import choose, dots, written
from circuitbench.sparse import rows_of as sums_of
from circuitbench.stream import activations, token_rows
from circuitbench.train import train_sae, train_saes
from circuitbench.trainer import Trainer

SITE = 'blocks.1.ssm.out_proj_in'
HERE = Place('blocks.0.resid_post', (12,))


def make(seed=0): return torch.Generator().manual_seed(seed)
def top(x): return float(x.detach().abs().max())


KINDS = {
    'topk': dict(), 'batchtopk': dict(activation='batchtopk'), 'jumprelu': dict(activation='jumprelu'),
    'relu': dict(activation='relu'), 'gated': dict(activation='gated'),
    'matryoshka': dict(prefixes=(8, 24, 64)), 'matryoshka batchtopk': dict(activation='batchtopk', prefixes=(16, 64)),
    'matryoshka relu': dict(activation='relu', prefixes=(16, 64)),
    'transcoder': dict(writes=(HERE,)), 'skip transcoder': dict(writes=(HERE,), skip=True, activation='batchtopk'),
    'jumprelu transcoder': dict(writes=(HERE,), activation='jumprelu'),
    'crosscoder': dict(shape=(4,), beside=(HERE,)), 'crosscoder batchtopk': dict(shape=(4,), beside=(HERE,), activation='batchtopk'),
    'rank 1': dict(shape=(4, 4), rank1=True), 'rank 1 jumprelu': dict(shape=(4, 4), rank1=True, activation='jumprelu'),
    'tied': dict(), 'tied rank 1': dict(shape=(8, 2), rank1=True, activation='batchtopk')}


def trainer(kind, n=400, seed=0, steps=50, **recipe):
    "A trainer of rows of width 16 with no weight left at its start, and the rows."
    cfg = SAEConfig(16, 64, 4, SITE, **KINDS[kind])
    x = torch.randn(n, 16, generator=make(seed))*torch.linspace(.5, 3, 16) + 1
    y = (x[:, :12].abs() + .3*x[:, 4:]) if cfg.writes else None
    t = Trainer(cfg, x, steps, y, tied=kind.startswith('tied'), **recipe)
    for name, p in t.w.items():
        if name not in ('D', 'dec_v', 'dec_w'): p += .1*torch.randn(p.shape, generator=make(len(name)))*(name != 'threshold')
    return t, x, y


# -- sums over pairs -----------------------------------------------------------------
@pytest.mark.parametrize('floor', [0., .3, 1., 50.])
def test_batchtopk_chooses_as_numpy_sorts(floor):
    pre = torch.randn(37, 50, generator=make())
    token, latent, value = choose(pre, 5, batch=True, floor=floor)
    flat = pre.numpy().ravel()
    want = np.sort(np.argsort(-flat)[:37*5])
    assert np.array_equal((token*50 + latent).numpy(), want) and np.array_equal(value.numpy(), flat[want])
    few = torch.where(torch.rand(37, 50, generator=make(1)) < .02, pre, -1.)                # fewer positive than wanted
    assert len(choose(few, 5, True, floor).value) == (few > 0).sum()


def test_topk_chooses_as_numpy_sorts_and_leaves_out_what_is_negative():
    pre = torch.randn(37, 50, generator=make()) - 1.5
    token, latent, value = choose(pre, 5)
    want = [(t, j) for t, row in enumerate(pre.numpy()) for j in sorted(np.argsort(-row)[:5]) if row[j] > 0]
    assert list(zip(token.tolist(), latent.tolist())) == want and torch.equal(value, pre[token, latent])
    tied = torch.ones(3, 50)
    assert len(choose(tied, 5).value) == 15 and len(choose(tied, 5, batch=True).value) == 15
    assert len(choose(-tied, 5).value) == len(choose(-tied, 5, batch=True).value) == 0


def test_sums_over_pairs_are_matrix_products():
    pre, D, x = (torch.randn(*s, generator=make(i)) for i, s in enumerate([(30, 40), (40, 7), (30, 7)]))
    token, latent, value = pairs = choose(pre, 4, batch=True)
    z = torch.zeros(30, 40).index_put((token, latent), value).double()
    assert top(written(pairs, D, 30) - z @ D.double()) < 1e-5
    a, b = sums_of(latent, 40, (value, token, x), (torch.ones_like(value), token, x))
    assert top(a - z.T @ x.double()) < 1e-5 and top(b - (z > 0).double().T @ x.double()) < 1e-5
    assert top(dots(latent, token, D, x) - (x @ D.T)[token, latent]) < 1e-5


def test_the_derivative_of_a_jump_is_the_rectangles():
    p, theta = torch.randn(200, 6, generator=make()).double(), torch.rand(6, generator=make(1)).double()
    up, eps = torch.randn(200, 6, generator=make(2)).double(), .3
    p.requires_grad_(), theta.requires_grad_()
    z, l0 = jump(p, theta, eps)
    ((z*up).sum() + 7*l0).backward()
    P, T, U = p.detach().numpy(), theta.detach().numpy(), up.numpy()
    kernel = (np.abs((P - T)/eps) < .5).astype(float)
    assert np.allclose(z.detach(), P*(P > T)) and float(l0.detach()) == pytest.approx((P > T).sum(1).mean())
    assert np.allclose(p.grad, U*(P > T))
    assert np.allclose(theta.grad, -(T/eps*kernel*U).sum(0) - 7*(kernel/eps).sum(0)/200)


# -- gradients -----------------------------------------------------------------------
def dense_loss(t, w, x, y, dead):
    "The loss of a trainer as its definition says, dense, of float64 weights."
    cfg, kind = t.cfg, t.cfg.activation
    outer = lambda v, u: torch.einsum('np,nq->npq', v, u).flatten(1)
    D = outer(w['dec_v'], w['dec_w']) if cfg.rank1 else w['D']
    E = D if t.recipe.tied else outer(w['enc_v'], w['enc_w']) if cfg.rank1 else w['E']
    bias = w['b_gate'] if kind == 'gated' else w['b_enc']
    pre = (x if cfg.writes else x - w['b_dec']) @ E.T + bias
    paid = 0.
    if kind == 'topk': z = pre.relu()*torch.zeros_like(pre).scatter(1, pre.topk(cfg.k).indices, 1.)
    if kind == 'batchtopk': z = pre.relu()*(pre >= pre.flatten().topk(cfg.k*len(pre)).values[-1])
    if kind == 'relu': z, paid = pre.relu(), t.l1*pre.relu().sum(1).mean()/t.var**.5
    if kind == 'gated':
        p = pre - bias
        z, paid = (pre > 0)*(p*w['r_mag'].exp() + w['b_mag']).relu(), t.l1*pre.relu().sum(1).mean()/t.var**.5
    if kind == 'jumprelu': z = pre*(pre > w['threshold'])
    base = w['b_dec'] + (x @ w['W_skip'].T if cfg.skip else 0)
    ends = cfg.prefixes or (cfg.d_sae,)
    loss = sum((y - base - z[:, :e] @ D[:e]).square().sum(1).mean() for e in ends)/len(ends)
    if kind == 'gated': loss = loss + (y - base.detach() - pre.relu() @ D.detach()).square().sum(1).mean()
    if dead:
        wanted, silent = x.shape[1]//2, pre[:, :dead]
        spare = torch.zeros_like(silent).scatter(1, (i := silent.topk(min(wanted, dead)).indices), silent.gather(1, i))
        rest = (y - base - z @ D).detach()
        loss = loss + t.recipe.aux*min(1, dead/wanted)*(spare @ D[:dead] - rest).square().sum(1).mean()
    return loss/t.var + paid


@pytest.mark.parametrize('dead', [0, 3, 30])
@pytest.mark.parametrize('kind', [k for k in KINDS if 'jumprelu' not in k])
def test_gradients_equal_autograds(kind, dead):
    t, x, y = trainer(kind, aux=.3, dead_after=100)
    t.silent[:dead] = 1000
    x = x[:50]*t.s_in
    y = x if y is None else y[:50]*t.s_out
    w = {n: p.double().clone().requires_grad_() for n, p in t.w.items()}
    want = torch.autograd.grad(dense_loss(t, w, x.double(), y.double(), dead), list(w.values()))
    slope = t.gradients(x, y)
    for (n, p), g in zip(w.items(), want):
        if n in ('D', 'dec_v', 'dec_w'): g = g - (g*p).sum(1, keepdim=True)*p
        assert top(slope.grads[n] - g) < 2e-5*max(1, top(g)), n
    assert slope.figures['dead'] == dead/64


@pytest.mark.parametrize('kind', ['jumprelu', 'rank 1 jumprelu', 'jumprelu transcoder'])
def test_gradients_of_jumprelu_equal_its_formula(kind):
    "Numpy, straight-through: the threshold gets -(theta/eps) K of each activation's pull and -1/eps K of L0's."
    t, x, y = trainer(kind, l0=.7, width=.8)
    x = x[:50]*t.s_in
    y = x if y is None else y[:50]*t.s_out
    slope, cfg = t.gradients(x, y), t.cfg
    w = {n: p.double().numpy() for n, p in t.full.items()}
    X, Y, eps, theta = x.double().numpy(), y.double().numpy(), .8*t.level, w['threshold']
    p = (X if cfg.writes else X - w['b_dec']) @ w['E'].T + w['b_enc']
    on, kernel = p > theta, (np.abs(p - theta) < eps/2)/eps
    rest = Y - (p*on) @ w['D'] - w['b_dec']
    g = -2*rest/(len(X)*t.var)
    pull, l0 = g @ w['D'].T, on.sum(1).mean()
    d_l0 = .7*2*(l0/cfg.k - 1)/cfg.k/len(X)
    assert np.allclose(slope.grads['threshold'], -(kernel*(theta*pull + d_l0)).sum(0), atol=1e-5)
    assert np.allclose(slope.grads['b_enc'], (pull*on).sum(0), atol=1e-5)
    b_dec = g.sum(0) - (0 if cfg.writes else (pull*on).sum(0) @ w['E'])
    assert np.allclose(slope.grads['b_dec'], b_dec, atol=1e-5)
    if not cfg.rank1:
        dD = (p*on).T @ g
        assert np.allclose(slope.grads['D'], dD - (dD*w['D']).sum(1, keepdims=True)*w['D'], atol=1e-5)
        assert np.allclose(slope.grads['E'], (pull*on).T @ (X if cfg.writes else X - w['b_dec']), atol=1e-5)
    assert slope.figures['l0'] == pytest.approx(l0)


def test_steps_are_adams_by_hand():
    "Numpy: three steps of Adam (.9, .999), gradient norm clipped at 1, learning rate warmed up, rows put back to norm 1."
    t, x, _ = trainer('topk', steps=40, lr=.01)
    w = {n: p.double().numpy().copy() for n, p in t.w.items()}
    m, v = ({n: np.zeros_like(p) for n, p in w.items()} for _ in range(2))
    for i in range(1, 4):
        batch = x[50*i:50*i + 50]
        grads = {n: g.double().numpy() for n, g in t.gradients(batch*t.s_in, batch*t.s_in).grads.items()}
        norm = max(1, np.sqrt(sum((g**2).sum() for g in grads.values())))
        for n, g in grads.items():
            m[n], v[n] = .9*m[n] + .1*g/norm, .999*v[n] + .001*(g/norm)**2
            w[n] -= .01*min(1, i/2)*m[n]/(1 - .9**i)/(np.sqrt(v[n]/(1 - .999**i)) + 1e-8)
        w['D'] /= np.linalg.norm(w['D'], axis=1, keepdims=True)
        t.step(batch)
        for n in w: assert np.allclose(t.w[n], w[n], atol=2e-5), (i, n)


@pytest.mark.parametrize('kind', [k for k, v in KINDS.items() if v.get('activation') not in ('batchtopk', 'jumprelu')])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(kind):
    (t, x, y), (u, _, _) = (trainer(kind, aux=.3, dead_after=60, accumulate=n) for n in (1, 4))
    for i in range(0, 300, 50):
        a, b = (s.step(x[i:i + 50], None if y is None else y[i:i + 50]) for s in (t, u))
    assert all(a[n] == pytest.approx(b[n], rel=1e-3) for n in a) and torch.equal(t.silent, u.silent)
    for n in t.w: assert top(t.w[n] - u.w[n]) < 1e-3, n


def test_half_precision_of_the_product_is_close():
    (t, x, _), (u, _, _) = (trainer('topk', bfloat16=b) for b in (False, True))
    a, b = (s.step(x[:100]) for s in (t, u))
    assert a['fvu'] == pytest.approx(b['fvu'], rel=.02) and a['fvu'] != b['fvu'] and u.w['E'].dtype == torch.float32


@pytest.mark.parametrize('kind, want', [
    ({}, {0: .2, 4: 1, 49: 1, 75: .5, 99: .02}), (dict(warmup=0, decay=0), {0: 1, 99: 1}),
    (dict(warmup=.1, decay=.2), {0: .1, 9: 1, 80: 1, 90: .5, 95: .25}),
    (dict(cosine=True), {50: 1, 75: .5, 99: .5 - .5*np.cos(.02*np.pi)})])
def test_the_learning_rate_follows_its_schedule(kind, want):
    for step, rate in want.items(): assert Recipe(**kind).rate(step, 100) == pytest.approx(rate), step


# -- what training finds -------------------------------------------------------------
def planted(n, d=32, m=48, active=3, seed=7):
    "Rows made of m known directions, `active` at a time; the directions and how much of each."
    g = make(seed)
    rows = F.normalize(torch.randn(m, d, generator=g), dim=1)
    which, size = torch.rand(n, m, generator=g).topk(active).indices, 1 + torch.rand(n, active, generator=g)
    z = torch.zeros(n, m).scatter(1, which, size)
    return z @ rows + .5 + .01*torch.randn(n, d, generator=g), rows, z


def mcc(rows, found):
    "Mean cosine of true and found directions, matched one to one."
    from scipy.optimize import linear_sum_assignment
    cosine = (F.normalize(rows, dim=1) @ F.normalize(found, dim=1).T).numpy()
    return cosine[linear_sum_assignment(-cosine)].mean()


def fit(t, x, y=None, batch=256):
    for i in range(0, len(x) - batch + 1, batch): figures = t.step(x[i:i + batch], None if y is None else y[i:i + batch])
    return figures


def fvu(sae, x, y): return float((sae(x).reshape(y.shape) - y).square().sum()/(y - y.mean(0)).square().sum())
def l0(sae, x): return float((sae.encode(x) > 0).float().sum(-1).mean())


@pytest.mark.parametrize('kind', ['topk', 'batchtopk', 'jumprelu'])
def test_planted_directions_are_found_at_the_l0_that_is_asked_for(kind):
    x, rows, _ = planted(60_000)
    t = Trainer(SAEConfig(32, 64, 3, SITE, activation=kind), x[:4096], len(x)//256, lr=.02)
    start = mcc(rows, t.w['D'])
    fit(t, x)
    sae = t.sae(x[:4096])
    assert start < .6 and mcc(rows, sae.W_dec) > .95
    other = planted(4000, seed=7)[0]                                                   # same directions, the first rows
    assert l0(sae, other) == pytest.approx(3, rel=.02)
    assert l0(t.sae(), other) == pytest.approx(3, rel=.1)


def test_random_directions_are_not_the_planted_ones():
    assert mcc(planted(10)[1], torch.randn(64, 32, generator=make(9))) < .6


def test_planted_outer_products_are_found_as_they_are():
    _, _, z = planted(80_000)
    v, w = F.normalize(torch.randn(48, 8, generator=make(1)), dim=1), F.normalize(torch.randn(48, 8, generator=make(2)), dim=1)
    atoms = torch.einsum('np,nq->npq', v, w).flatten(1)
    t = Trainer(SAEConfig(64, 64, 3, 'blocks.0.ssm.state', shape=(8, 8), rank1=True), z[:4096] @ atoms, len(z)//256, lr=.02)
    x = (z @ atoms).view(-1, 8, 8)
    fit(t, x)
    sae = t.sae()
    assert mcc(atoms, sae.W_dec) > .95
    assert top(sae.dec_v.norm(dim=1) - 1) < 1e-5 and top(sae.dec_w.norm(dim=1) - 1) < 1e-5
    assert torch.linalg.matrix_rank(sae.W_dec.view(-1, 8, 8)).max() == 1


def test_the_first_latents_of_a_matryoshka_coder_explain_more_alone():
    x, _, _ = planted(30_000)
    def alone(**kind):
        t = Trainer(SAEConfig(32, 64, 3, SITE, **kind), x[:4096], len(x)//256)
        fit(t, x)
        sae = t.sae()
        z = sae.encode(x[:2000])
        z[:, 16:] = 0
        return float((sae.decode(z) - x[:2000]).square().sum()/(x[:2000] - x[:2000].mean(0)).square().sum())
    assert alone(prefixes=(16, 64)) < alone() - .05


@pytest.mark.parametrize('kind', ['topk', 'batchtopk'])
def test_a_transcoder_learns_what_is_written_and_a_skip_takes_the_linear_part(kind):
    x, _, z = planted(20_000)
    directions = torch.randn(48, 24, generator=make(3))
    there = (Place('blocks.0.mixer_out', (24,)),)
    y = 5*(z > 1.5).float() @ directions
    t = Trainer(SAEConfig(32, 128, 3, SITE, writes=there, activation=kind), x[:4096], len(x)//256, y[:4096], lr=.02)
    fit(t, x, y)
    plain = fvu(t.sae(x[:4096]), x[:2000], y[:2000])
    ones = torch.cat([x, torch.ones(len(x), 1)], 1)
    linear = y - ones @ torch.linalg.lstsq(ones, y).solution
    assert plain < .9*float(linear.square().sum()/(y - y.mean(0)).square().sum())
    y = y + 3*x @ torch.randn(32, 24, generator=make(4))
    t = Trainer(SAEConfig(32, 128, 3, SITE, writes=there, activation=kind, skip=True), x[:4096], len(x)//256, y[:4096], lr=.02)
    u = Trainer(SAEConfig(32, 128, 3, SITE, writes=there, activation=kind), x[:4096], len(x)//256, y[:4096], lr=.02)
    fit(t, x, y), fit(u, x, y)
    assert fvu(t.sae(x[:4096]), x[:2000], y[:2000]) < fvu(u.sae(x[:4096]), x[:2000], y[:2000])


def test_no_place_of_a_crosscoder_dominates():
    "Two places made of the same causes, one a thousand times the other: both are explained, by the same latents."
    x, rows, z = planted(40_000)
    other = F.normalize(torch.randn(48, 24, generator=make(3)), dim=1)
    both = torch.cat([x, 1000*(z @ other)], 1)
    cfg = SAEConfig(56, 64, 3, SITE, shape=(32,), beside=(Place('blocks.0.mixer_out', (24,)),), activation='batchtopk')
    t = Trainer(cfg, both[:4096], len(both)//256)
    fit(t, both)
    sae = t.sae(both[:4096])
    assert top(sae.W_dec.norm(dim=1) - 1) < 1e-5
    for got, want in zip(sae.split(sae(both[:2000])), sae.split(both[:2000])):
        assert float((got - want).square().sum()/(want - want.mean(0)).square().sum()) < .15
    here, there = sae.split(sae.W_dec)
    pairs = (F.normalize(here, dim=1) @ rows.T).max(1).indices
    assert (F.normalize(there, dim=1)*other[pairs]).sum(1).median() > .9


@pytest.mark.parametrize('options, revived', [(dict(aux=0), False), (dict(aux=1/8), True), (dict(aux=0, resample=3000), True)])
@pytest.mark.parametrize('kind', ['topk', 'jumprelu', 'matryoshka'])
def test_dead_latents_are_brought_back(kind, options, revived):
    x, _, _ = planted(20_000)
    cfg = SAEConfig(32, 64, 3, SITE, **{**KINDS[kind], **(dict(prefixes=(48, 64)) if kind == 'matryoshka' else {})})
    t = Trainer(cfg, x[:4096], len(x)//256, dead_after=2000, lr=.02, **options)
    t.w['b_enc'][:40] -= 6                                                             # no data makes these fire
    fit(t, x)
    dead = int((t.silent[:40] > 2000).sum())
    assert dead < 20 if revived else dead == 40


def test_resampled_latents_begin_at_the_errors_and_without_momentum():
    t, x, _ = trainer('topk', dead_after=10**6)
    for _ in range(3): t.step(x)
    t.silent[:5] = 2*10**6
    rest = torch.randn(400, 16, generator=make(5))
    assert t.resample(x*t.s_in, rest) == 5 and not t.silent[:5].any()
    near = F.normalize(t.w['D'][:5], dim=1) @ F.normalize(rest, dim=1).T
    assert (near.max(1).values > 1 - 1e-5).all() and top(F.normalize(t.w['E'][:5], dim=1) - t.w['D'][:5]) < 1e-5
    assert len(set(near.max(1).indices.tolist())) == 5
    assert top(t.w['E'][:5].norm(dim=1) - t.w['E'][5:].norm(dim=1).mean()) < 1e-5
    for p in (t.w['D'], t.w['E'], t.w['b_enc']):
        assert not t.adam.state[p]['exp_avg'][:5].any() and t.adam.state[p]['exp_avg'][5:].any()
    assert t.resample(x*t.s_in, rest) == 0
    t.step(x)


# -- the coder that comes out --------------------------------------------------------
@pytest.mark.parametrize('kind', KINDS)
def test_the_exported_coder_is_the_trained_one(kind):
    "Float64, from the weights at training scale: activations times what each adds, and the reconstruction."
    t, x, y = trainer(kind, lr=.01)
    for i in range(0, 400, 100): t.step(x[i:i + 100], None if y is None else y[i:i + 100])
    cfg, w, sae = t.cfg, {n: p.double() for n, p in t.full.items()}, t.sae()
    X = (x*t.s_in).double()
    pre = (X if cfg.writes else X - w['b_dec']) @ w['E'].T + w['b_gate' if cfg.activation == 'gated' else 'b_enc']
    if cfg.activation == 'topk': z = pre.relu()*torch.zeros_like(pre).scatter(1, pre.topk(4).indices, 1.)
    if cfg.activation == 'batchtopk': z = pre*(pre > t.threshold())
    if cfg.activation == 'jumprelu': z = pre*(pre > w['threshold'])
    if cfg.activation == 'relu': z = pre.relu()
    if cfg.activation == 'gated': z = (pre > 0)*((pre - w['b_gate'])*w['r_mag'].exp() + w['b_mag']).relu()
    want = z @ w['D'] + w['b_dec'] + (X @ w['W_skip'].T if cfg.skip else 0)
    got = sae(x).reshape(len(x), -1)
    wrong = ((got*t.s_out - want).abs().max(1).values > 1e-3).float().mean()                # a tie may fall the other way
    assert wrong < .01
    adds = sae.encode(x)[:, :, None]*sae.W_dec*t.s_out
    assert ((adds - z[:, :, None]*w['D']).abs().amax((1, 2)) > 1e-3).float().mean() < .01
    norm = sae.W_dec.norm(dim=1)
    assert top(norm - 1) < 1e-5 if kind != 'crosscoder' else float(norm.mean()) == pytest.approx(1)
    if kind.startswith('tied'): assert top(F.normalize(sae.W_enc.T, dim=1) - sae.W_dec) < 1e-5


def test_thresholds_are_set_on_the_rows_that_are_given():
    for kind in ('batchtopk', 'jumprelu', 'crosscoder batchtopk', 'jumprelu transcoder'):
        t, x, y = trainer(kind, n=6000)
        for i in range(0, 2000, 100): t.step(x[i:i + 100], None if y is None else y[i:i + 100])
        assert l0(t.sae(x[2000:]), x[2000:]) == pytest.approx(4, abs=.05), kind


# -- an activation of one's own --------------------------------------------------------
def share(p, w, k): return p.relu()*(p >= .3*p.amax(-1, keepdim=True))
def steep(p, w, k): return (p - w['b_low']).relu()*w['r_gain'].exp()


OWN = {'share': Activation(share, ranks=True), 'steep': Activation(steep, lengths={'b_enc': -1., 'b_low': .5}, factors={'r_gain': .25}),
       **{f'like_{name}': replace(ACTIVATIONS[name]) for name in ('topk', 'batchtopk', 'gated')}}


@pytest.fixture
def own():
    for name, activation in OWN.items(): assert register_activation(name, activation) is ACTIVATIONS[name]
    yield
    for name in OWN: ACTIVATIONS.pop(name, None)


def by_formula(kind, p, w):
    "What the activations of one's own are in float64; p has the bias."
    if kind == 'steep': return (p > w['b_low'])*(p - w['b_low'])*torch.exp(w['r_gain'])
    return torch.where(p >= .3*p.max(1, keepdim=True).values, p, 0.).clamp(min=0)


@pytest.mark.parametrize('more', [dict(), dict(prefixes=(16, 64)), dict(writes=(HERE,), skip=True), dict(shape=(4,), beside=(HERE,)),
                                  dict(shape=(4, 4), rank1=True), dict(tied=True)])
@pytest.mark.parametrize('kind', ['share', 'steep'])
def test_an_activation_of_ones_own_is_trained_exported_and_kept(own, kind, more, tmp_path):
    "Its gradient, the coder that comes out and the one that is read again, against float64 and the formula."
    tied = more.get('tied', False)
    cfg = SAEConfig(16, 64, 4, SITE, activation=kind, **{n: v for n, v in more.items() if n != 'tied'})
    x = torch.randn(400, 16, generator=make())*torch.linspace(.5, 3, 16) + 1
    y = (x[:, :12].abs() + .3*x[:, 4:]) if cfg.writes else None
    t = Trainer(cfg, x, 50, y, tied=tied, lr=.01)
    if kind == 'steep':
        assert top(t.w['b_low'] - .5*t.level) < 1e-6 and top(t.w['r_gain'] - .25) == 0
    for i in range(0, 400, 100): t.step(x[i:i + 100], None if y is None else y[i:i + 100])
    X, Y = ((v*s).double() for v, s in ((x, t.s_in), (x if y is None else y, t.s_out)))
    w = {n: p.double().requires_grad_() for n, p in t.w.items()}
    outer = lambda v, u: torch.einsum('np,nq->npq', v, u).flatten(1)
    D, E = (outer(w[f'{n}_v'], w[f'{n}_w']) if cfg.rank1 else w.get(to, w.get('D')) for n, to in (('dec', 'D'), ('enc', 'E')))
    pre = (X if cfg.writes else X - w['b_dec']) @ E.T + w['b_enc']
    z, base = by_formula(kind, pre, w), w['b_dec'] + (X @ w['W_skip'].T if cfg.skip else 0)
    errors = [(Y - base - z[:, :e] @ D[:e]).square().sum(1).mean()/t.var for e in cfg.prefixes or (64,)]
    loss = sum(errors)/len(errors) + t.l1*z.sum(1).mean()/t.var**.5
    slope = t.gradients(x*t.s_in, Y.float())
    for (n, p), g in zip(w.items(), torch.autograd.grad(loss, list(w.values()))):
        if n in ('D', 'dec_v', 'dec_w'): g = g - (g*p).sum(1, keepdim=True)*p
        assert top(slope.grads[n] - g) < 2e-5*max(1, top(g)), n
    assert float(slope.figures['loss']) == pytest.approx(float(loss.detach()), rel=1e-5)
    sae = t.sae()
    assert top(sae.encode(x)[:, :, None]*sae.W_dec*t.s_out - z[:, :, None]*D) < 1e-3
    assert top(sae(x).reshape(len(x), -1)*t.s_out - z @ D - base) < 1e-3
    back = SAE.load(sae.save(tmp_path/'sae'))
    assert equal(back, sae) and back.cfg.activation == kind and torch.equal(back.encode(x), sae.encode(x))
    value, index = back.codes(x)
    assert torch.equal(back.encode(x).gather(1, index), value) and torch.equal((value > 0).sum(1), (back.encode(x) > 0).sum(1))


def test_saelens_has_no_architecture_for_an_activation_of_ones_own(own, tmp_path):
    for keys, name in ((dict(), 'own'), (dict(writes=(HERE,)), 'own_transcoder'), (dict(writes=(HERE,), skip=True), 'own_skip_transcoder')):
        sae = SAE(SAEConfig(16, 64, 4, SITE, activation='share', **keys))
        with pytest.raises(ValueError, match=f'got a share coder, {name!r} in the file, which SAELens lacks; expected saelens=False'):
            sae.save(tmp_path/'theirs', saelens=True)
        assert not (tmp_path/'theirs').exists()
        assert json.loads((sae.save(tmp_path/'ours')/'cfg.json').read_text())['architecture'] == name
    for keys in (dict(writes=(HERE,)), dict(writes=(HERE,), activation='gated'), dict(shape=(4, 4), rank1=True)):
        with pytest.raises(ValueError, match='SAELens lacks'): SAE(SAEConfig(16, 64, 4, SITE, **keys)).save(tmp_path/'theirs', saelens=True)
    for kind, name in (('like_topk', 'topk'), ('like_gated', 'gated'), ('like_batchtopk', 'jumprelu')):
        like = SAE(SAEConfig(16, 64, 4, SITE, activation=kind)).save(tmp_path/'like', saelens=True)
        assert json.loads((like/'cfg.json').read_text())['architecture'] == name and SAE.load(like).cfg.activation == kind
    for name in OWN: del ACTIVATIONS[name]                                                  # in a process that does not know it
    assert SAE.load(like).cfg.activation == 'jumprelu'
    with pytest.raises(ValueError, match="got activation='share', expected one of .*topk.*register_activation"): SAE.load(tmp_path/'ours')


@pytest.mark.parametrize('kind', ['topk', 'batchtopk', 'gated'])
def test_a_copy_of_an_activation_is_as_the_first(own, kind):
    x = torch.randn(400, 16, generator=make())
    a, b = (Trainer(SAEConfig(16, 64, 4, SITE, activation=name), x, 9) for name in (kind, f'like_{kind}'))
    for t in (a, b): t.step(x), t.step(x)
    a, b = a.sae(x), b.sae(x)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters())) and torch.equal(a.encode(x), b.encode(x))


def test_names_and_activations_that_cannot_be(own):
    ours = 'topk.*batchtopk.*jumprelu.*relu.*gated.*share'
    for name, words in (('share', ours), ('topk', ours), ('my own', ours)):
        with pytest.raises(ValueError, match=f'got name {name!r}.*{words}'): register_activation(name, OWN['share'])
    with pytest.raises(ValueError, match='got name .relu.'): register_activation('relu', OWN['share'], replace=True)
    assert register_activation('share', OWN['steep'], replace=True) is ACTIVATIONS['share']
    with pytest.raises(ValueError, match=f"got activation='sahre', expected one of .*{ours}"): SAEConfig(16, 64, 4, SITE, activation='sahre')
    for wrong in (lambda p, w, k: p, lambda p, w, k: F.softplus(p), lambda p, w, k: p.relu()[:, :3], lambda p, w, k: p.relu()/p):
        with pytest.raises(ValueError, match='got wrong, whose z is negative'): register_activation('wrong', Activation(wrong))
    with pytest.raises(ValueError, match='expected active and weights'): register_activation('wrong', replace(OWN['share'], saelens='relu'))
    assert 'wrong' not in ACTIVATIONS
    for keys, words in ((dict(chooses='all'), "chooses='all'"), (dict(saelens='share'), "saelens='share'"), (dict(chooses='token'), 'None for'),
                        (dict(active=None), 'None for'), (dict(lengths={}), r'lengths \[\]'), (dict(lengths={'threshold': 1.}), 'threshold'),
                        (dict(lengths={'b_dec': 0.}), 'b_dec'), (dict(lengths={'b_enc': 0., 'k': 1.}), "'k'"), (dict(factors={'b_low': 1.}), 'b_low'),
                        (dict(lengths={'b_gate': 0.}), 'without training='), (dict(chooses='batch', factors={'r_gain': 0.}), "chooses='batch'")):
        with pytest.raises(ValueError, match=words) as err: Activation(**dict(active=share) | keys)
        assert len(str(err.value).splitlines()) == 1


# -- bad input -----------------------------------------------------------------------
def test_rows_that_cannot_be_trained_on_say_so():
    x, cfg = torch.randn(100, 16, generator=make()), SAEConfig(16, 64, 4, SITE)
    nan = x.clone()
    nan[3, 2] = torch.nan
    trans = SAEConfig(16, 64, 4, SITE, writes=(HERE,))
    for call, words in (
            (lambda: Trainer(cfg, nan, 5), 'not finite or all the same'),
            (lambda: Trainer(cfg, torch.ones(100, 16), 5), 'not finite or all the same'),
            (lambda: Trainer(cfg, torch.zeros(100, 16), 5), 'not finite or all the same'),
            (lambda: Trainer(cfg, x[:, :5], 5), r'\(100, 5\).*\(n, 16\)'),
            (lambda: Trainer(trans, x, 5), 'no y'), (lambda: Trainer(cfg, x, 5, x), 'got y'),
            (lambda: Trainer(trans, x, 5, x[:, :12], tied=True), 'tied'),
            (lambda: Trainer(cfg, x, 5, lr=0), 'lr=0'), (lambda: Trainer(cfg, x, 5, warmup=2), 'warmup=2'),
            (lambda: Trainer(cfg, x, 5, accumulate=0), 'accumulate=0'), (lambda: Trainer(cfg, x, 5, aux=-1), 'aux=-1'),
            (lambda: Trainer(SAEConfig(16, 64, 4, SITE, normalize='layer_norm'), x, 5), 'layer_norm'),
            (lambda: SAEConfig(16, 8, 9, SITE), 'd_sae, which is 8')):
        with pytest.raises(ValueError, match=words) as err: call()
        assert len(str(err.value).splitlines()) == 1
    with pytest.raises(TypeError, match='rate'): Trainer(cfg, x, 5, rate=1)
    t = Trainer(cfg, x, 5)
    before = {n: p.clone() for n, p in t.w.items()}
    with pytest.raises(ValueError, match='as they were'): t.step(nan)
    assert all(torch.equal(t.w[n], p) for n, p in before.items()) and t.step_no == 0 and not t.silent.any()
    assert np.isfinite(t.step(x)['loss'])


# -- checkpoints ---------------------------------------------------------------------
def same(a, b): return set(a) == set(b) and all(torch.equal(a[n], b[n]) if isinstance(a[n], torch.Tensor) else a[n] == b[n] for n in a)


@pytest.mark.parametrize('kind', KINDS)
def test_a_trainer_goes_on_from_a_file_bit_for_bit(kind, tmp_path):
    options = dict(aux=.1, dead_after=150, resample=200, steps=12)
    batch = lambda t, x, y, i: t.step(x[100*i:100*i + 100], None if y is None else y[100*i:100*i + 100])
    whole, x, y = trainer(kind, n=800, **options)
    whole.w['b_gate' if kind == 'gated' else 'b_enc'][:20] -= 5
    figures = [batch(whole, x, y, i) for i in range(3)]
    write_state(tmp_path/'run', whole.state_dict())
    figures = [batch(whole, x, y, i) for i in range(3, 8)]
    other = trainer(kind, n=800, seed=1, **options)[0]
    other.load_state_dict(read_state(tmp_path/'run'))
    assert [batch(other, x, y, i) for i in range(3, 8)] == figures
    assert same(whole.state_dict(), other.state_dict())
    a, b = whole.sae(), other.sae()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_states_of_other_coders_are_refused(tmp_path):
    t = trainer('topk')[0]
    with pytest.raises(ValueError, match='without w.threshold'): trainer('jumprelu')[0].load_state_dict(t.state_dict())
    small = Trainer(SAEConfig(16, 32, 4, SITE), torch.randn(99, 16), 5)
    with pytest.raises(ValueError, match='another w.D'): t.load_state_dict(small.state_dict())


@pytest.fixture(scope='module')
def model(): return load_model('mock://mamba2-tiny', hook_point='out_proj_in')


IDS = torch.randint(257, (12_000,), generator=make(11))                                # less to read than text


def short(model, **kw):
    usual = dict(layer=1, k=8, expansion=2, tokens=3000, batch_size=128, context=64, text=IDS, progress=False)
    return train_sae(model, **usual | kw)


def equal(a, b): return a.cfg == b.cfg and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def stop_at(n):
    def callback(step, figures):
        if step == n: raise KeyboardInterrupt
    return callback


@pytest.mark.parametrize('kind', [dict(), dict(activation='batchtopk', resample=True, aux=0), dict(activation='jumprelu'),
                                  dict(site='mixer_in', writes='mixer_out', skip=True)])
def test_an_interrupted_training_goes_on_bit_for_bit(model, kind, tmp_path):
    path = tmp_path/'deep'/'run'
    whole = short(model, **kind)
    ended = short(model, **kind, checkpoint=path, callback=stop_at(13))
    assert ended.metrics.note == 'stopped after 1,664 of 3,000 tokens' and not equal(ended, whole)
    again = short(model, **kind, checkpoint=path)
    assert equal(again, whole) and again.metrics.trained == 3000 and again.metrics.note == ''
    assert [p.name for p in path.parent.iterdir()] == ['run']
    assert equal(short(model, **kind, checkpoint=path), whole)                           # at its end, it is there at once


def test_a_training_that_is_killed_goes_on_from_its_last_checkpoint(model, tmp_path):
    class Killed(BaseException): pass
    def kill(step, figures):
        if step == 17: raise Killed
    with pytest.raises(Killed): short(model, checkpoint=tmp_path/'run', every=5, callback=kill)
    assert read_state(tmp_path/'run')['step'] == 15
    assert equal(short(model, checkpoint=tmp_path/'run', every=5), short(model))


def test_a_half_done_step_is_not_written(model, tmp_path, monkeypatch):
    real = Trainer._normalise
    def normalise(self):
        if self.step_no == 12: raise KeyboardInterrupt
        real(self)
    monkeypatch.setattr(Trainer, '_normalise', normalise)
    sae = short(model, checkpoint=tmp_path/'run', every=10)
    assert 'stopped after 1,536' in sae.metrics.note and read_state(tmp_path/'run')['step'] == 10
    monkeypatch.undo()
    assert equal(short(model, checkpoint=tmp_path/'run', every=10), short(model))


def test_checkpoints_of_other_trainings_are_refused_and_kept(model, tmp_path):
    path = tmp_path/'run'
    short(model, checkpoint=path, callback=stop_at(3))
    before = path.read_bytes()
    for kw, words in ((dict(k=4), 'k=8, not 4'), (dict(lr=1e-3), 'lr=0.005, not 0.001'), (dict(layer=0), 'blocks.1'),
                      (dict(text='And it came to pass. '*500), 'source'), (dict(batch_size=64), 'steps=24, not 47'),
                      (dict(tokens=6000), 'steps'), (dict(lr=.005, batch_size=127), 'batch_size=128')):
        with pytest.raises(ValueError, match=words) as err: short(model, checkpoint=path, **kw)
        assert len(str(err.value).splitlines()) == 1 and path.read_bytes() == before
    other = load_model(model.name, hook_point='out_proj_in')
    with torch.no_grad(): other.blocks[1].mixer.in_proj.weight[0, 0] += 1
    with pytest.raises(ValueError, match='source'): short(other, checkpoint=path)
    for junk in (b'junk', before[:-9], json.dumps({'format': 1}).encode()):
        path.write_bytes(junk)
        with pytest.raises(ValueError, match='cannot be read'): short(model, checkpoint=path)
        assert path.read_bytes() == junk


def test_ctrl_c_while_writing_keeps_the_coder_and_the_file(model, tmp_path, monkeypatch):
    def write(*args): raise KeyboardInterrupt
    short(model, checkpoint=tmp_path/'run', callback=stop_at(5))
    monkeypatch.setattr(train_module, 'write_state', write)
    assert equal(short(model, checkpoint=tmp_path/'run'), short(model))
    assert read_state(tmp_path/'run')['step'] == 5


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    write_state(tmp_path/'run', {'a': torch.ones(3), 'b': {'c': 2, 'd': 'x'}, 'e': [1, [2]]})
    assert same(read_state(tmp_path/'run')['b'], {'c': 2, 'd': 'x'}) and read_state(tmp_path/'run')['e'] == [1, [2]]
    monkeypatch.setattr('circuitbench.checkpoint.save_file', lambda tensors, path, meta: (path.write_bytes(b'half'), 1/0))
    with pytest.raises(ZeroDivisionError): write_state(tmp_path/'run', {'a': torch.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ['run'] and read_state(tmp_path/'run')['a'].tolist() == [1, 1, 1]


# -- several coders ------------------------------------------------------------------
def batches_of(model, sites=(SITE,), n=24, size=128):
    rows = token_rows(model, torch.randint(257, (n*size,), generator=make()), 64)
    x = {s: activations(model, s, rows).flatten(0, 1) for s in sites}
    return [{s: v[i*size:i*size + size] for s, v in x.items()} for i in range(n)]


def test_coders_of_one_pass_are_those_of_passes_of_their_own(model, tmp_path):
    sites = SITE, 'blocks.0.resid_post'
    configs = [SAEConfig(64, 128, 4, SITE), SAEConfig(64, 128, 8, SITE, activation='batchtopk'), SAEConfig(32, 64, 4, sites[1])]
    batches = batches_of(model, sites)
    together = train_saes(model, configs, batches, progress=False)
    alone = [train_saes(model, [c], batches, progress=False)[0] for c in configs]
    assert all(equal(a, b) for a, b in zip(together, alone))
    by_hand = Trainer(configs[2], torch.cat([b[sites[1]] for b in batches]), 24)
    for b in batches: by_hand.step(b[sites[1]])
    assert equal(by_hand.sae(), together[2])
    generator = (b for b in batches)
    assert equal(train_saes(model, configs[:1], generator, steps=24, progress=False)[0], together[0])
    begun = dict(progress=False, steps=24, checkpoint=tmp_path/'run')
    train_saes(model, configs, batches, callback=stop_at(7), **begun)
    assert all(equal(a, b) for a, b in zip(train_saes(model, configs, iter(batches), **begun), together))


def test_coders_of_a_store_are_measured(model):
    from circuitbench.store import stream
    source = stream(model, [SITE, 'blocks.0.ssm.y'], 'In the beginning God created the heaven and the earth. '*300, tokens=8000)
    configs = [SAEConfig(64, 256, 8, SITE, model.name), SAEConfig(16, 64, 4, 'blocks.0.ssm.y', model.name, heads=(0, 2))]
    seen = []
    saes = train_saes(model, configs, source.batches(200), steps=40, held='And the earth was without form. '*50, progress=False,
                      callback=lambda step, figures: seen.append(figures))
    assert [s.metrics.trained for s in saes] == [8000]*2 and min(s.metrics.fve for s in saes) > .4
    assert len(seen) == 40 and {n.split('/')[0] for n in seen[-1]} == {f'0 {SITE} k8', '1 blocks.0.ssm.y k4'}


def test_batches_that_cannot_be_trained_on_say_so(model):
    cfg, batches = SAEConfig(64, 128, 4, SITE), batches_of(model, n=2)
    for call, words in (
            (lambda: train_saes(model, [SAEConfig(32, 64, 4, 'blocks.0.resid_post')], batches), 'blocks.0.resid_post'),
            (lambda: train_saes(model, [cfg], []), 'no batches'), (lambda: train_saes(model, [cfg], iter(batches)), 'steps='),
            (lambda: train_saes(model, [SAEConfig(32, 64, 4, SITE)], batches), r'\(32,\)'),
            (lambda: train_saes(model, [cfg], [{SITE: b[SITE]*torch.inf} for b in batches]), 'not finite')):
        with pytest.raises(ValueError, match=words) as err: call()
        assert len(str(err.value).splitlines()) == 1


def test_rows_of_a_batch_by_hand():
    x = {'blocks.0.ssm.y': torch.randn(5, 4, 3), 'a::embed': torch.randn(5, 2), 'b::embed': torch.randn(5, 2).bfloat16()}
    cross = SAEConfig(4, 8, 2, 'embed', 'a', beside=(Place('embed', (2,), 'b'),), writes=(Place('blocks.0.ssm.y', (4, 3)),))
    read, write = rows_of(cross, x)
    assert torch.equal(read, torch.cat([x['a::embed'], x['b::embed'].float()], 1)) and torch.equal(write, x['blocks.0.ssm.y'].flatten(1))
    heads = SAEConfig(3, 8, 2, 'blocks.0.ssm.y', heads=(3, 1))
    assert torch.equal(rows_of(heads, x)[0], torch.stack([r[h] for r in x['blocks.0.ssm.y'] for h in (3, 1)]))
    assert torch.equal(rows_of(heads, {'blocks.0.ssm.y': x['blocks.0.ssm.y'][:, [3, 1]]})[0], rows_of(heads, x)[0])


# -- one call ------------------------------------------------------------------------
@pytest.mark.parametrize('activation', ACTIVATIONS)
def test_every_activation_in_one_call(model, activation):
    sae = short(model, activation=activation, tokens=12_000, expansion=4)
    assert sae.cfg.activation == activation and sae.metrics.fve > (.2 if activation == 'relu' else .5)
    assert sae.metrics.l0 == pytest.approx(8, rel=.3) and top(sae.W_dec.norm(dim=1) - 1) < 1e-5


def test_an_activation_of_ones_own_in_one_call(model, own, tmp_path):
    sae = short(model, activation='share', tokens=12_000, expansion=4, checkpoint=tmp_path/'run')
    assert sae.metrics.fve > .5 and 1 < sae.metrics.l0 < 9 and 'share' in str(sae)
    assert equal(SAE.load(sae.save(tmp_path/'sae')), sae)


@pytest.mark.parametrize('kw, reads, writes, rows', [
    (dict(site='blocks.0.resid_post', beside=['blocks.1.resid_post', 'embed']), ['blocks.0.resid_post', 'blocks.1.resid_post', 'embed'], [], 1),
    (dict(layer=0, site='mixer_in', writes='mixer_out'), ['blocks.0.mixer_in'], ['blocks.0.mixer_out'], 1),
    (dict(layer=1, site='ssm.y', heads='shared'), ['blocks.1.ssm.y'], [], 4),
    (dict(layer=1, site='ssm.y', heads=[0, 3]), ['blocks.1.ssm.y'], [], 2),
    (dict(layer=1, site='ssm.state', rank1=True, prefixes=(32, 256)), ['blocks.1.ssm.state'], [], 4)])
def test_every_kind_in_one_call_and_its_metrics_by_hand(model, kw, reads, writes, rows):
    sae = short(model, **dict(layer=None, k=4, tokens=2000) | kw)
    cfg = sae.cfg
    assert [p.site for p in cfg.reads] == reads and [p.site for p in cfg.writes] == writes and max(1, len(cfg.heads)) == rows
    ids = token_rows(model, torch.randint(257, (200,), generator=make(5)), 50)
    got = evaluate(model, sae, ids, context=50)
    names = list(dict.fromkeys(p.site for p in (*cfg.reads, *cfg.writes)))
    logits, cache = model.run_with_cache(ids, names)
    part = lambda n: cache[n][:, :, list(cfg.heads)].flatten(0, 2).flatten(1) if cfg.heads else cache[n].flatten(0, 1).flatten(1)
    x, t = (torch.cat([part(p.site) for p in places], 1) for places in (cfg.reads, cfg.out))
    y = sae(x).reshape(t.shape)
    assert got.fve == pytest.approx(1 - float((t - y).square().sum()/(t - t.mean(0)).square().sum()), abs=1e-4)
    assert got.l0 == pytest.approx(l0(sae, x)) and sae.frequency.sum() == pytest.approx(got.l0, rel=1e-5)
    loss = lambda edit: float(F.cross_entropy(model.run(ids, edit=edit).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten().long()))
    assert got.loss_clean == pytest.approx(loss(()), abs=1e-4)
    if 'state' not in cfg.site:
        edits = []
        for p, v in zip(cfg.out, sae.split(y)):
            full = cache[p.site].clone()
            if cfg.heads: full[:, :, list(cfg.heads)] = v.view(*ids.shape, rows, *p.shape)
            else: full = v.view_as(full)
            edits.append(patch(p.site, full))
        assert got.loss_spliced == pytest.approx(loss(edits), abs=1e-4)


def test_numbers_and_sites_that_cannot_be(model):
    for kw, words in (
            (dict(tokens=100), '100 tokens, expected a batch of 128'), (dict(activation='relu6'), 'relu6'),
            (dict(prefixes=(4, 8)), 'prefixes'), (dict(skip=True), 'skip'), (dict(heads='shared'), 'which has none'),
            (dict(site='ssm.y', heads=[7]), '0 to 3'), (dict(beside='ssm.state', site='ssm.y', rank1=True), 'rank1'),
            (dict(clip=0), 'clip=0'), (dict(writes='mixer_out', tied=True), 'tied')):
        with pytest.raises(ValueError, match=words) as err: short(model, **kw)
        assert len(str(err.value).splitlines()) == 1
    with pytest.raises(TypeError, match='speed'): short(model, speed=3)


def test_constant_and_broken_activations_are_named(model, monkeypatch):
    for value, words in ((1., 'all the same'), (torch.nan, 'not finite')):
        def heard(m, names, ids, value=value): return {n: torch.full((*ids.shape, 64), value) for n in names}
        monkeypatch.setattr('circuitbench.measure.heard', heard)
        with pytest.raises(ValueError, match=f'{SITE}.*{words}'): short(model)


def test_progress_says_what_matters_and_is_quiet_if_asked(model, capsys):
    short(model)
    assert capsys.readouterr().err == ''
    short(model, progress=True)
    err = capsys.readouterr().err
    assert all(word in err for word in (f'SAE of {SITE}', 'loss', 'FVU', 'L0', 'dead', '<'))
    assert said(dict(loss=.5, fvu=.25, l0=8, dead=.125)) == 'loss 0.500, FVU 0.250, L0 8.0, dead 12.5%'


def test_callbacks_import_their_packages_when_they_are_made(monkeypatch, tmp_path):
    for package, call in (('torch.utils.tensorboard', lambda: tensorboard(tmp_path)), ('wandb', wandb_run)):
        monkeypatch.setitem(sys.modules, package, None)
        with pytest.raises(ImportError, match='pip install'): call()
    noted = []
    class Writer:
        def __init__(self, folder): noted.append(folder)
        def add_scalar(self, *args): noted.append(args)
        def flush(self): noted.append('flushed')
    monkeypatch.setitem(sys.modules, 'torch.utils.tensorboard', types.SimpleNamespace(SummaryWriter=Writer))
    tensorboard(tmp_path)(3, {'loss': .5})
    assert noted == [str(tmp_path), ('loss', .5, 3), 'flushed']
    run = types.SimpleNamespace(log=lambda figures, step: noted.append((figures, step)))
    monkeypatch.setitem(sys.modules, 'wandb', types.SimpleNamespace(init=lambda **options: noted.append(options) or run))
    wandb_run(project='p')(4, {'l0': 8.})
    assert noted[-2:] == [{'project': 'p'}, ({'l0': 8.}, 4)]


# -- where latents start -------------------------------------------------------------
def test_what_axes_explain_is_compared_with_noise():
    "k of d numbers of a Gaussian row explain p + 2 z phi(z): scipy's truncated second moment."
    from scipy.stats import norm
    g = torch.Generator().manual_seed(0)
    for d, k in ((40, 3), (64, 16), (24, 20)):
        x = torch.randn(4000, d, generator=g)
        z = norm.ppf(1 - k/d/2)
        noise = 2*norm.expect(lambda v: v*v, lb=z)
        top_k = np.sort(np.abs(x.numpy()).ravel())[::-1][:k*len(x)]
        got = np.square(top_k).sum()/np.square(x.numpy()).sum()
        rows, excess = sparse_axes(x, k, 30)
        assert got == pytest.approx(noise, abs=.01) and excess == pytest.approx((got - noise)/max(1e-6, 1 - noise), abs=1e-2)
        assert len(rows) == 30 and ((rows != 0).sum(1) == 1).all() and len({(int(r.abs().argmax()), float(r.sum())) for r in rows}) == 30


def test_latents_start_along_axes_where_these_are_sparse_alone():
    g = torch.Generator().manual_seed(0)
    sparse = torch.randn(3000, 32, generator=g)*(torch.rand(3000, 32, generator=g) < .1)
    turn = torch.linalg.qr(torch.randn(32, 32, generator=g)).Q
    def first(x, **recipe): return Trainer(SAEConfig(32, 96, 4, SITE), x, 100, **recipe).w['D']
    along = lambda D: int((D.abs() > .999).any(1).sum())
    assert along(first(sparse)) == 48 and along(first(sparse, axes=False)) == 0
    for x in (sparse @ turn, torch.randn(3000, 32, generator=g)):
        assert torch.equal(first(x), first(x, axes=False)) and along(first(x, axes=True)) == 48
    fvu = []
    for axes in (None, False):
        t = Trainer(SAEConfig(32, 96, 4, SITE), sparse, 60, axes=axes)
        for i in range(60): figures = t.step(sparse[i*50:i*50 + 50])
        fvu.append(figures['fvu'])
    assert fvu[0] < .5*fvu[1]


# -- several processes ---------------------------------------------------------------
def joined(rank, world, port):
    "accelerate's, in one of several processes on this machine."
    import os
    os.environ |= dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    from accelerate import Accelerator
    return Accelerator(cpu=True)


def in_two_processes(f, kind, folder):
    import socket

    import torch.multiprocessing as mp
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    mp.spawn(f, (2, port, kind, str(folder)), nprocs=2)


def process(rank, world, port, kind, out):
    "One process of a data-parallel training: its half of each batch."
    acc, x = joined(rank, world, port), planted(6000)[0]
    t = Trainer(SAEConfig(32, 64, 3, SITE, **kind), x[rank:1000 + rank], 40, accelerator=acc, dead_after=600, aux=.1, resample=1500)
    start = {n: p.clone() for n, p in t.w.items()}
    for i in range(0, 6000, 200):
        figures = t.step(x[i + rank:i + 200:world])
        if i == 1200: early = {n: p.clone() for n, p in t.w.items()}, figures
    torch.save((start, early, t.state_dict(), figures), f'{out}/{rank}')
    model = load_model('mock://mamba2-tiny', hook_point='out_proj_in')
    train_sae(model, layer=1, k=4, expansion=2, tokens=1000, batch_size=100, context=50, progress=False, accelerator=acc,
              checkpoint=f'{out}/run').save(f'{out}/sae{rank}')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize('kind', [dict(), dict(activation='gated')])
def test_two_processes_are_as_one_with_the_joint_batch(kind, tmp_path):
    from circuitbench.sae import SAE
    in_two_processes(process, kind, tmp_path)
    (start, early, a, figures), (other, _, b, others) = (torch.load(tmp_path/str(r), weights_only=True) for r in (0, 1))
    assert same(start, other) and same(a, b) and figures == others and a['step_no'] == 30
    x = planted(6000)[0]
    t = Trainer(SAEConfig(32, 64, 3, SITE, **kind), x[:1000], 40, dead_after=600, aux=.1)     # before any latent is redrawn
    assert same(t.w, start)
    for i in range(0, 1400, 200): one = t.step(x[i:i + 200])
    for n, p in t.w.items(): assert top(p - early[0][n]) < 1e-4 < top(p - start[n]), n
    assert all(one[n] == pytest.approx(early[1][n], rel=1e-4) for n in one)
    saes = [SAE.load(tmp_path/f'sae{r}') for r in (0, 1)]
    assert equal(*saes) and saes[0].metrics.fve > 0 and {p.name for p in tmp_path.iterdir()} >= {'run.0', 'run.1'}


def part_of_latents(rank, world, port, kind, out):
    "One process of a training whose latents are spread: it holds half of them, and is given whole batches."
    acc, x = joined(rank, world, port), planted(6000)[0]
    t = Trainer(SAEConfig(32, 64, 3, SITE, **kind), x[:1000], 40, accelerator=acc, shard=True, dead_after=600)
    assert all(len(p) == 32 for n, p in t.w.items() if n != 'b_dec') and len(t.w) > 2
    figures = [t.step(x[i:i + 200]) for i in range(0, 4000, 200)]
    t.sae(x[:1000]).save(f'{out}/whole{rank}')
    torch.save((t.state_dict(), figures, t.threshold(x[:1000])), f'{out}/{rank}')
    back = Trainer(SAEConfig(32, 64, 3, SITE, **kind), x[:1000], 40, accelerator=acc, shard=True, dead_after=600, resample=1500)
    back.load_state_dict(t.state_dict())
    more = [back.step(x[i:i + 200]) for i in range(4000, 6000, 200)]
    assert all(f['loss'] < figures[0]['loss'] for f in more)
    model = load_model('mock://mamba2-tiny', hook_point='out_proj_in')
    train_sae(model, layer=1, k=4, expansion=2, tokens=1000, batch_size=100, context=50, progress=False, accelerator=acc,
              shard=True, checkpoint=f'{out}/run').save(f'{out}/sae{rank}')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize('kind', [dict(), dict(activation='batchtopk'), dict(prefixes=(16, 48, 64)), dict(shape=(8, 4), rank1=True)])
def test_latents_spread_over_two_processes_are_as_in_one(kind, tmp_path):
    from circuitbench.sae import SAE
    in_two_processes(part_of_latents, kind, tmp_path)
    parts, figures, threshold = zip(*(torch.load(tmp_path/str(r), weights_only=True) for r in (0, 1)))
    x = planted(6000)[0]
    t = Trainer(SAEConfig(32, 64, 3, SITE, **kind), x[:1000], 40, dead_after=600)
    want = [t.step(x[i:i + 200]) for i in range(0, 4000, 200)]
    assert figures[0] == figures[1] and any(f['dead'] > 0 for f in want)
    for got, one in zip(figures[0], want):
        for n in one: assert got[n] == pytest.approx(one[n], rel=2e-3, abs=1e-5), n
    for n, p in t.w.items():
        whole = parts[0][f'w.{n}'] if n == 'b_dec' else torch.cat([s[f'w.{n}'] for s in parts])
        assert top(whole - p) < 5e-3*top(p), n
    saes = [SAE.load(tmp_path/f'whole{r}') for r in (0, 1)]
    assert equal(*saes) and threshold[0] == threshold[1] == pytest.approx(t.threshold(x[:1000]), rel=1e-2)
    assert top(saes[0](x[:50]) - t.sae(x[:1000])(x[:50])) < .05
    saes = [SAE.load(tmp_path/f'sae{r}') for r in (0, 1)]
    assert equal(*saes) and saes[0].metrics.fve > 0


def test_latents_that_cannot_be_spread_are_refused():
    x = planted(1000)[0]
    for given, kind in ((None, {}), (types.SimpleNamespace(num_processes=2, process_index=0), dict(activation='jumprelu'))):
        with pytest.raises(ValueError, match='got shard=True'): Trainer(SAEConfig(32, 64, 3, SITE, **kind), x, 40, accelerator=given, shard=True)
    with pytest.raises(ValueError, match='got 65 latents for 2 processes, expected a multiple, as 66'):
        Trainer(SAEConfig(32, 65, 3, SITE), x, 40, accelerator=types.SimpleNamespace(num_processes=2, process_index=0), shard=True)
