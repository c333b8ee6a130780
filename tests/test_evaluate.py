"""Metrics of coders against NumPy and runs with plain hooks, baselines against scikit-learn, recovery against all permutations."""
import json
from itertools import permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA

import circuitbench.evaluate as module
from circuitbench.baseline import Comparison, baselines, compare
from circuitbench.coder import Place, SAEConfig
from circuitbench.edit import apply
from circuitbench.evaluate import CoreMetrics, Result, core_metrics, sites_of, vectors
from circuitbench.load import load_model
from circuitbench.planted import Recovery, planted, recovery
from circuitbench.sae import SAE
from circuitbench.trainer import Trainer

SITE = 'blocks.1.ssm.out_proj_in'


@pytest.fixture(scope='module')
def mamba2(): return load_model('mock://mamba2-tiny')


def some_ids(rows=4, pos=12, seed=0): return torch.randint(0, 257, (rows, pos), generator=torch.Generator().manual_seed(seed))


def random_sae(d_in=64, d_sae=96, k=5, site=SITE, seed=1, **kw):
    "A coder with no weight left at its start."
    sae, make = SAE(SAEConfig(d_in, d_sae, k, site, **kw)), torch.Generator().manual_seed(seed)
    for name, p in sae.named_parameters():
        if 'dec' not in name or name == 'b_dec': p.data = .3*torch.randn(p.shape, generator=make)
    return sae


def eye(d, site=SITE, gain=1., **kw):
    "A coder that gives back what it reads, times a gain: ReLU latents for either sign."
    sae = SAE(SAEConfig(d, 2*d, d, site, activation='relu', **kw))
    sae.W_dec.data = torch.cat([torch.eye(d), -torch.eye(d)])
    sae.W_enc.data = gain*sae.W_dec.data.T.contiguous()
    return sae


def by_hand(sae, x, bias_in=True):
    "Activations and reconstruction of a TopK coder in float64."
    w = {n: p.detach().double().numpy() for n, p in sae.named_parameters()}
    p = (x - w['b_dec'] if bias_in else x) @ w['W_enc'] + w['b_enc']
    z = np.zeros_like(p)
    for row, out in zip(p, z):
        top = np.argsort(row)[-sae.k:]
        out[top] = np.maximum(row[top], 0)
    return z, z @ w['W_dec'] + w['b_dec']


def losses(logits, ids, clean):
    "Nats a token, and KL of the clean distribution from this one, in float64."
    logp, base = (v.double().log_softmax(-1).numpy() for v in (logits, clean))
    ce = -np.take_along_axis(logp[:, :-1], ids[:, 1:, None].numpy(), -1).mean()
    return ce, (np.exp(base)*(base - logp)).sum(-1).mean()


def hooked(model, ids, value, block=1):
    "Logits with another tensor as the input of a block's out_proj, by a plain hook."
    handle = model.blocks[block].mixer.out_proj.register_forward_pre_hook(lambda m, args: (value.to(args[0]),))
    try: return model.hf(input_ids=ids).logits
    finally: handle.remove()


# -- core metrics ------------------------------------------------------------------------
@torch.no_grad()
def test_every_figure_is_numpys_and_every_loss_that_of_a_hooked_run(mamba2):
    ids, sae = some_ids(2, 24), random_sae()
    m = core_metrics(mamba2, sae, ids, ids.numel(), 24)
    x = mamba2.run_with_cache(ids, SITE)[1][SITE]
    rows = x.flatten(0, 1).double().numpy()
    z, y = by_hand(sae, rows)
    err, var = np.square(rows - y).sum(), np.square(rows - rows.mean(0)).sum()
    norm = lambda v: np.linalg.norm(v, axis=1)
    dots, freq = (rows*y).sum(1), (z > 0).mean(0)
    want = {'explained_variance': 1 - err/var, 'fvu': err/var, 'mse': err/48, 'cossim': (dots/norm(rows)/norm(y)).mean(),
            'l2_ratio': (norm(y)/norm(rows)).mean(), 'relative_reconstruction_bias': np.square(y).sum()/dots.sum(),
            'l0': (z > 0).sum()/48, 'l1': z.sum()/48, 'frac_alive': (freq > 0).mean(), 'dead': (freq == 0).mean(),
            'freq_over_1_percent': (freq > .01).mean(), 'freq_over_10_percent': (freq > .1).mean()}
    for name, value in want.items(): assert getattr(m, name) == pytest.approx(value, rel=1e-5), name
    clean, put = mamba2.hf(input_ids=ids).logits, lambda v: hooked(mamba2, ids, v)
    spliced = put(torch.from_numpy(y).float().view_as(x))
    for name, logits in (('sae', spliced), ('zero', put(0*x)), ('mean', put(x.mean((0, 1)).expand_as(x))),
                         ('resample', put(x.flip(0))), ('clean', clean)):
        ce, kl = losses(logits, ids, clean)
        assert m.ce[name] == pytest.approx(ce, rel=1e-5)
        if name != 'clean': assert m.kl[name] == pytest.approx(kl, rel=1e-4)
    assert m.parts == pytest.approx({f'head {h}': 1 - np.square((rows - y)[:, c]).sum()/np.square((rows - rows.mean(0))[:, c]).sum()
                                     for h in range(4) for c in [slice(16*h, 16*h + 16)]}, rel=1e-5)
    assert m.tokens == m.rows == 48


@torch.no_grad()
def test_what_keeps_all_keeps_all_and_what_keeps_nothing_is_ablation(model):
    "Of each family."
    name = [n for n in model.site_names(model.hook_point)][-1]
    d = torch.Size(model.site_shape(name, 1, 1)[2:]).numel()
    full, ids = eye(d, name, shape=model.site_shape(name, 1, 1)[2:]), some_ids(2, 9)
    m = core_metrics(model, full, ids, 18, 9)
    assert m.explained_variance > 1 - 1e-6 and m.kl['sae'] < 1e-5 and m.cossim == pytest.approx(1) == m.l2_ratio
    assert m.recovered('zero') in (None, pytest.approx(1, abs=1e-3))
    full.b_enc.data -= 1e9
    m = core_metrics(model, full, ids, 18, 9)
    assert (m.ce['sae'], m.kl['sae']) == (m.ce['zero'], m.kl['zero']) and m.frac_alive == m.l0 == 0
    assert m.relative_reconstruction_bias is None
    full.b_dec.data = vectors(model, full, ids)[1].mean((0, 1, 2))
    m = core_metrics(model, full, ids, 18, 9)
    assert m.kl['sae'] == pytest.approx(m.kl['mean'], rel=1e-3, abs=1e-6) and abs(m.explained_variance) < 1e-6


def test_scores_are_shares_of_what_ablation_costs():
    ce, kl = dict(clean=2., sae=2.3, zero=4., mean=3., resample=2.01), dict(sae=.2, zero=.8, mean=.5, resample=.1)
    m = CoreMetrics('m', SITE, .8, 1., .9, 1., 1., 8, 4., .9, .5, .1, ce, kl, {}, 100, 100)
    assert m.ce_loss_score == pytest.approx(1.7/2) and m.recovered('mean') == pytest.approx(.7)
    assert m.recovered('resample') is None and m.kl_div_score == pytest.approx(.75)          # it costs less than 1%
    with pytest.raises(ValueError, match="'zero', 'mean' or 'resample'"): m.recovered('nothing')


@torch.no_grad()
def test_heads_are_rows(mamba2):
    site, ids = 'blocks.0.ssm.y', some_ids(2, 10)
    sae = random_sae(16, 40, 3, site, shape=(16,), heads=(0, 3))
    m, x = core_metrics(mamba2, sae, ids, 20, 10), mamba2.run_with_cache(ids, site)[1][site]
    rows = x[:, :, [0, 3]].double().flatten(0, 1).numpy()
    z, y = by_hand(sae, rows.reshape(-1, 16))
    y = y.reshape(rows.shape)
    err, var = np.square(rows - y).sum((0, 2)), np.square(rows - rows.mean(0)).sum((0, 2))
    assert m.parts == pytest.approx({'head 0': 1 - err[0]/var[0], 'head 3': 1 - err[1]/var[1]}, rel=1e-5)
    assert m.explained_variance == pytest.approx(1 - err.sum()/var.sum(), rel=1e-5)
    assert (m.tokens, m.rows) == (20, 40) and m.l0 == pytest.approx((z > 0).sum()/40)
    def put(v):
        v = v.clone()
        v[:, :, [0, 3]] = torch.from_numpy(y).view(2, 10, 2, 16).to(v)
        return v
    clean, spliced = mamba2.run(ids).logits, mamba2.run(ids, edit=apply(site, put)).logits
    assert (m.ce['sae'], m.kl['sae']) == pytest.approx(losses(spliced, ids, clean), rel=1e-4)


@torch.no_grad()
def test_a_transcoder_is_measured_where_it_writes(mamba2):
    ids, out = some_ids(2, 10), Place(SITE, (64,))
    sae = random_sae(32, 80, 4, 'blocks.1.mixer_in', writes=(out,))
    x, t = (mamba2.run_with_cache(ids, s)[1][s] for s in ('blocks.1.mixer_in', SITE))
    _, y = by_hand(sae, x.flatten(0, 1).double().numpy(), bias_in=False)
    rows = t.flatten(0, 1).double().numpy()
    m, clean = core_metrics(mamba2, sae, ids, 20, 10), mamba2.hf(input_ids=ids).logits
    assert m.explained_variance == pytest.approx(1 - np.square(rows - y).sum()/np.square(rows - rows.mean(0)).sum(), rel=1e-5)
    spliced = hooked(mamba2, ids, torch.from_numpy(y).view_as(t))
    assert (m.ce['sae'], m.kl['sae']) == pytest.approx(losses(spliced, ids, clean), rel=1e-4)
    assert m.ce['zero'] == pytest.approx(losses(hooked(mamba2, ids, 0*t), ids, clean)[0], rel=1e-5)
    assert m.site == f'blocks.1.mixer_in to {SITE}' and len(m.parts) == 4


@torch.no_grad()
def test_a_crosscoder_is_measured_at_once_and_place_by_place(mamba2):
    ids, sites = some_ids(2, 10), ['blocks.0.ssm.out_proj_in', SITE]
    sae = random_sae(128, 160, 6, sites[0], shape=(64,), beside=(Place(SITE, (64,)),))
    x = [mamba2.run_with_cache(ids, s)[1][s] for s in sites]
    rows = torch.cat(x, -1).flatten(0, 1).double().numpy()
    _, y = by_hand(sae, rows)
    part = lambda i: (rows[:, 64*i:64*i + 64], y[:, 64*i:64*i + 64])
    explained = lambda a, b: 1 - np.square(a - b).sum()/np.square(a - a.mean(0)).sum()
    clean = mamba2.hf(input_ids=ids).logits
    whole = core_metrics(mamba2, sae, ids, 20, 10)
    assert whole.explained_variance == pytest.approx(explained(rows, y), rel=1e-5)
    assert whole.parts == pytest.approx({s: explained(*part(i)) for i, s in enumerate(sites)}, rel=1e-5)
    for i in (0, 1):
        m = core_metrics(mamba2, sae, ids, 20, 10, place=i)
        assert m.explained_variance == pytest.approx(explained(*part(i)), rel=1e-5)
        spliced = hooked(mamba2, ids, torch.from_numpy(part(i)[1]).view(2, 10, 64), i)
        assert (m.ce['sae'], m.kl['sae']) == pytest.approx(losses(spliced, ids, clean), rel=1e-4)
    both = mamba2.blocks[0].mixer.out_proj.register_forward_pre_hook(lambda m, a: (torch.from_numpy(part(0)[1]).view(2, 10, 64).to(a[0]),))
    try: spliced = hooked(mamba2, ids, torch.from_numpy(part(1)[1]).view(2, 10, 64))
    finally: both.remove()
    assert (whole.ce['sae'], whole.kl['sae']) == pytest.approx(losses(spliced, ids, clean), rel=1e-4)
    table = compare(mamba2, {'cross': sae}, ids, 20, context=10)
    assert [n for n in table.rows if n.startswith('cross')] == ['cross', *(f'cross at {s}' for s in sites)]
    assert table[f'cross at {SITE}'] == core_metrics(mamba2, sae, ids, 20, 10, place=1)


@torch.no_grad()
def test_a_state_that_is_replaced_goes_on_from_what_it_got(mamba2):
    "Half of each state: what was written n steps ago is halved n times, as in a run whose states are halved one by one."
    site, ids = 'blocks.0.ssm.state', some_ids(2, 8)
    shape = mamba2.site_shape(site, 1, 1)[3:]
    heads = tuple(range(mamba2.heads(site)))
    sae = eye(shape[0]*shape[1], site, gain=.5, shape=shape, heads=heads)
    m, clean = core_metrics(mamba2, sae, ids, 16, 8), mamba2.run(ids).logits
    assert m.explained_variance < 1 and m.l2_ratio == pytest.approx(.5)
    halved = mamba2.run(ids, edit=apply(site, lambda S: S/2)).logits
    assert (m.ce['sae'], m.kl['sae']) == pytest.approx(losses(halved, ids, clean), rel=1e-4)


def test_sums_do_not_depend_on_how_rows_are_grouped(mamba2, monkeypatch):
    ids, sae = some_ids(9, 10), random_sae()
    one = core_metrics(mamba2, sae, ids, 90, 10)
    monkeypatch.setattr(module, 'chunked', lambda model, sae, rows: rows.split(2))
    many = core_metrics(mamba2, sae, ids, 90, 10)
    drop = lambda m: {k: v for k, v in m.figures().items() if 'resample' not in k}
    assert drop(many) == pytest.approx(drop(one), rel=1e-5)
    assert many.ce['resample'] != one.ce['clean']


def test_groups_are_of_two_rows_or_more_and_bounded(mamba2):
    sae = random_sae()
    sizes = [len(c) for c in module.chunked(mamba2, sae, torch.zeros(7, 2**16, dtype=torch.int32))]
    assert sizes == [3, 2, 2]
    assert len(module.chunked(mamba2, sae, some_ids(1, 5))) == 1
    assert core_metrics(mamba2, sae, some_ids(1, 12), 12, 12).ce['resample'] is None


def test_what_does_not_belong_together_is_refused(mamba2):
    ids, place = some_ids(2, 10), Place(SITE, (64,), 'another')
    broken = load_model('mock://mamba2-tiny')
    broken.blocks[0].mixer.in_proj.weight.data[:] = torch.nan
    for call, words in (
            (lambda: core_metrics(mamba2, random_sae(site='embed', d_in=32), torch.full((2, 10), 7), 20, 10), 'do not vary'),
            (lambda: core_metrics(broken, random_sae(), ids, 20, 10), 'not finite'),
            (lambda: core_metrics(mamba2, random_sae(model='another'), ids), 'for mock://mamba2-tiny'),
            (lambda: sites_of(mamba2, random_sae(128, shape=(64,), beside=(place,))), 'in another'),
            (lambda: sites_of(mamba2, random_sae(128, shape=(64,), beside=(Place('blocks.0.mixer_in', (64,)),))), r'\(32,\)'),
            (lambda: core_metrics(mamba2, random_sae(), ids, place=1), '0 to 0'),
            (lambda: core_metrics(mamba2, random_sae(), ''), 'at least 2'),
            (lambda: compare(mamba2, {}), 'no coder')):
        with pytest.raises(ValueError, match=words) as err: call()
        assert len(str(err.value).splitlines()) == 1


# -- results -----------------------------------------------------------------------------
def test_results_print_are_saved_and_loaded(mamba2, tmp_path):
    ids = some_ids(2, 10)
    table = compare(mamba2, {'mine': random_sae()}, ids, 20, context=10)
    one, found = table['mine'], recovery(torch.eye(4, 6), torch.eye(5, 6))
    for r in (table, one, found):
        assert type(r).load(r.save(tmp_path/'r.json')) == r == Result.load(tmp_path/'r.json')
        assert r.plot().axes and json.loads((tmp_path/'r.json').read_text())['format'].startswith('circuitbench.')
    assert 'explained_variance' in repr(one) and all(n in repr(table) and n in table.view() for n in table.rows)
    assert len(table.plot('kl_div_with_sae').axes[0].patches) == len(table.rows)
    with pytest.raises(ValueError, match='expected one of'): table.plot('nothing')
    for text in ('{', '{"format": "circuitbench.Nothing"}', '{"format": "circuitbench.Recovery"}', '[1]'):
        (tmp_path/'r.json').write_text(text)
        with pytest.raises(ValueError, match='cannot be read'): Result.load(tmp_path/'r.json')
    with pytest.raises(ValueError, match='a Recovery'): CoreMetrics.load(found.save(tmp_path/'r.json'))


# -- baselines ---------------------------------------------------------------------------
@pytest.mark.parametrize('pos', [100, 20])                                                # more rows than coordinates, and fewer
def test_pca_is_scikit_learns(mamba2, pos):
    ids, sae = some_ids(2, pos), random_sae(k=6)
    x = vectors(mamba2, sae, ids)[0].reshape(-1, 64)
    l0 = round(float((sae.encode(x) > 0).sum(-1).double().mean()))
    found = baselines(mamba2, sae, ids, ids.numel(), pos)
    assert list(found) == [f'PCA {l0}', f'PCA {2*l0}', 'random dictionary', 'neurons']
    for r in (l0, 2*l0):
        theirs = PCA(r, svd_solver='full').fit(x.double().numpy())
        want = theirs.inverse_transform(theirs.transform(x.double().numpy()))
        assert np.abs(found[f'PCA {r}'](x).numpy() - want).max() < 1e-4*np.abs(want).max()
        assert (found[f'PCA {r}'].encode(x) > 0).sum(-1).max() == r
        assert torch.allclose(found[f'PCA {r}'].W_dec.norm(dim=1), torch.ones(2*r), atol=1e-5)


def test_neurons_and_the_random_dictionary(mamba2):
    ids, sae = some_ids(4, 40), random_sae(k=6, d_sae=200)
    x = vectors(mamba2, sae, ids)[0].reshape(-1, 64)
    found = baselines(mamba2, sae, ids, 160, 40, seed=3)
    middle = x.numpy() - x.numpy().mean(0)
    keep = np.argsort(-np.abs(middle), 1)[:, :found['neurons'].k]
    want = x.numpy().mean(0) + np.where([[j in row for j in range(64)] for row in keep], middle, 0)
    assert np.abs(found['neurons'](x).numpy() - want).max() < 1e-4
    drawn = found['random dictionary']
    assert drawn.W_dec.shape == (200, 64) and torch.allclose(drawn.W_enc.T/drawn.W_enc.norm(dim=0)[:, None], drawn.W_dec, atol=1e-5)
    error = lambda: float((drawn(x) - x).square().sum())
    best, gain = error(), drawn.W_enc.data.clone()
    for scale in (.9, 1.1):
        drawn.W_enc.data = scale*gain
        assert error() > best
    assert not torch.equal(baselines(mamba2, sae, ids, 160, 40, seed=4)['random dictionary'].W_dec, drawn.W_dec)


def test_a_transcoder_stands_beside_reduced_rank_regression(mamba2):
    ids = some_ids(4, 60)
    sae = random_sae(32, 80, 4, 'blocks.1.mixer_in', writes=(Place(SITE, (64,)),))
    x, t = (v.reshape(240, -1).double().numpy() for v in vectors(mamba2, sae, ids))
    found = baselines(mamba2, sae, ids, 240, 60)
    r = min(int(n.split()[-1]) for n in found)
    a, b = x - x.mean(0), t - t.mean(0)
    fit = a @ np.linalg.lstsq(a, b, rcond=None)[0]
    u, s, v = np.linalg.svd(fit, full_matrices=False)
    want = t.mean(0) + (u[:, :r]*s[:r]) @ v[:r]
    y = found[f'linear map of rank {r}'](torch.from_numpy(x).float()).numpy()
    assert np.abs(y - want).max() < 1e-3*np.abs(want).max() and 'neurons' not in found
    assert 'no random dictionary' in compare(mamba2, sae, ids, 240, context=60).note


def test_a_comparison_is_each_measurement_alone(mamba2):
    ids, a, b = some_ids(4, 30), random_sae(k=5), random_sae(k=5, seed=7)
    heads = random_sae(16, 40, 3, 'blocks.0.ssm.y', shape=(16,), heads=(0, 3))
    table = compare(mamba2, {'a': a, 'b': b, 'heads': heads}, ids, 120, context=30)
    for name, sae in (('a', a), ('b', b), ('heads', heads)): assert table[name] == core_metrics(mamba2, sae, ids, 120, 30)
    assert sum(n.startswith('neurons') for n in table.rows) == 2                           # of two places, not of three coders
    assert all(table[n].explained_variance > 0 for n in table.rows if n.startswith('PCA'))
    assert set(compare(mamba2, a, ids, 120, against=False, context=30).rows) == {'SAE'}
    @torch.no_grad()
    def size(model, sae, by=1): return recovery(sae.W_dec[:4], sae.W_dec[:4*by])
    table = compare(mamba2, a, ids, 120, measure=size, by=2, context=30)
    assert isinstance(table, Comparison) and table['neurons'].mcc == pytest.approx(.5)


# -- known directions --------------------------------------------------------------------
def test_planted_rows_are_sums_of_k_directions():
    p = planted(20, 50, 4, rows=3000, seed=5)
    z = p.codes().double().numpy()
    assert np.abs(z @ p.directions.double().numpy() - p.x.double().numpy()).max() < 1e-5
    assert ((z > 0).sum(1) == 4).all() and .5 <= z[z > 0].min() and z.max() <= 1.5
    assert np.allclose(np.linalg.norm(p.directions.numpy(), axis=1), 1, atol=1e-5)
    assert torch.equal(planted(20, 50, 4, rows=3000, seed=5).x, p.x) and not torch.equal(planted(20, 50, 4, 3000, seed=6).x, p.x)
    noisy = planted(20, 50, 4, rows=3000, noise=.1, seed=5)
    assert float((noisy.x - p.x).norm(dim=1).mean()/p.x.norm(dim=1).mean()) == pytest.approx(.1, rel=1e-4)
    share = (planted(8, 30, 1, rows=30_000, skew=1.).codes() > 0).double().mean(0)
    want = 1/np.arange(1, 31)
    assert np.abs(share.numpy() - want/want.sum()).max() < .01
    with pytest.raises(ValueError, match='1 to n'): planted(8, 4, 5)


def test_a_coder_does_not_start_from_what_was_planted():
    "Of the same seed and size, torch's generator would give the planted directions themselves."
    p = planted(32, 64, 3, rows=100)
    assert recovery(SAE(SAEConfig(32, 64, 3, 'embed')).W_dec, p.directions).mcc < .6


def test_the_pairing_is_the_best_of_all_permutations():
    rng = np.random.default_rng(0)
    for found, true in ((5, 5), (6, 4), (3, 5)):
        a, b = (torch.from_numpy(rng.normal(size=(n, 7))) for n in (found, true))
        cos = np.abs(F.normalize(b, dim=1).numpy() @ F.normalize(a, dim=1).numpy().T)
        big, small = max(found, true), min(found, true)
        square = cos if true <= found else cos.T
        best = max(sum(square[i, j] for i, j in enumerate(p)) for p in permutations(range(big), small))
        r = recovery(a, b)
        assert r.mcc == pytest.approx(best/true) and sum(p < 0 for p in r.pairs) == max(0, true - found)
        assert r.nearest == pytest.approx(cos.max(1).mean()) and r.nearest >= r.mcc


def test_permuted_and_flipped_dictionaries_are_found_and_random_ones_are_not():
    p = planted(24, 40, 3, rows=2000)
    make = torch.Generator().manual_seed(1)
    order, sign = torch.randperm(40, generator=make), torch.randint(0, 2, (40, 1), generator=make)*2. - 1
    r = recovery(3*sign*p.directions[order], p.directions)
    assert r.mcc == pytest.approx(1) and r.above == 1 and r.pairs == tuple(order.argsort().tolist())
    assert [np.sign(c) for c in r.cosine] == sign[order.argsort(), 0].tolist()
    drawn = recovery(torch.randn(40, 24, generator=make), p.directions)
    assert drawn.mcc < .6 and drawn.above < .05 and abs(drawn.mcc - drawn.random) < .05
    z = p.codes()
    codes = recovery(z.T[order] + 5, z.T, center=True)
    assert codes.mcc == pytest.approx(1) and recovery(z.T[order] + 5, z.T).mcc < .9
    other = np.corrcoef(z[:, 0].numpy(), z[:, 1].numpy())[0, 1]
    assert recovery(z.T[1:2], z.T[:1], center=True).cosine == (pytest.approx(other),)
    assert isinstance(r, Recovery)
    with pytest.raises(ValueError, match='one width'): recovery(torch.eye(3), torch.eye(4))


def test_training_finds_what_was_planted():
    p, make = planted(24, 40, 2, rows=20_000), torch.Generator().manual_seed(0)
    trainer = Trainer(SAEConfig(24, 80, 2, 'embed'), p.x[:4096], steps=250, lr=.02)
    start = recovery(trainer.sae().W_dec, p.directions).mcc
    for _ in range(250): trainer.step(p.x[torch.randint(len(p.x), (512,), generator=make)])
    sae = trainer.sae()
    r = recovery(sae.W_dec, p.directions)
    assert r.mcc > .95 and start < .65 and r.random < .65
    with torch.no_grad(): assert recovery(sae.encode(p.x[:2000]).T, p.codes()[:2000].T, center=True).mcc > .9


def test_the_embedding_is_known_where_it_is_read(mamba2):
    "A coder whose latents are the rows of the embedding has one of them on each token, and explains all."
    rows = mamba2.hf.get_input_embeddings().weight.detach()
    sae = SAE(SAEConfig(32, 257, 1, 'embed'))
    sae.W_dec.data = F.normalize(rows, dim=1)
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    m = core_metrics(mamba2, sae, some_ids(4, 16), 64, 16)
    assert m.explained_variance > 1 - 1e-5 and m.l0 == 1 and m.kl['sae'] < 1e-5
    assert recovery(sae.W_dec, rows).mcc == pytest.approx(1)
