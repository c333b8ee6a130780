"""Deeper views of latents: contexts by interval (counted over everything), neighbours (dense numpy), writers (sums and slices
by hand), effects (two whole runs), labels (planted), the file, the inspector on what was saved, and the page's numbers."""
import gzip
import json
import re
from base64 import b64decode
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import circuitbench.browse as browse_module
import circuitbench.latent as latent_module
from circuitbench.browse import (
    PARTS,
    SAEInspector,
    effect_view,
    interval_view,
    latent_view,
    neighbour_view,
    writers_view,
)
from circuitbench.coder import Place
from circuitbench.dashboard import dashboard
from circuitbench.edit import add
from circuitbench.effects import add_effects, latent_effects
from circuitbench.label import (
    Detection,
    add_labels,
    examples_of,
    marked,
    score_labels,
    token_judge,
    token_label,
    unseen_contexts,
)
from circuitbench.latent import closest, latent_activations, latent_order, latent_report
from circuitbench.load import load_model
from circuitbench.report import Context, LatentReport, Ranked
from circuitbench.sae import SAE, SAEConfig
from circuitbench.site import short
from circuitbench.stream import activations
from circuitbench.writers import add_writers, latent_writers, site_parts

SITE, POS, WINDOW = 'blocks.1.ssm.out_proj_in', 50, 12


def top(x): return float(x.detach().abs().max())


def coder(model, site=SITE, d_sae=40, k=5, **kw):
    "A coder with random weights."
    shape = kw.pop('shape', None) or model.site_shape(site, 1, 1)[3 if kw.get('heads') else 2:]
    d_in = torch.Size(shape).numel() + sum(p.width for p in kw.get('beside', ()))
    sae, g = SAE(SAEConfig(d_in, d_sae, k, site, shape=shape, model=model.name, **kw)), torch.Generator().manual_seed(1)
    for name, p in sae.named_parameters():
        if name.startswith('b_'): p.data = .3*torch.randn(p.shape, generator=g)
    return sae


def text(tokens=2000): return torch.randint(0, 257, (tokens,), generator=torch.Generator().manual_seed(2))


def read(model, sae, tokens=2000, **kw):
    options = dict(context=POS, window=WINDOW, contexts=4, intervals=5, drawn=3, neighbours=6) | kw
    return latent_report(model, sae, text(tokens), tokens, **options)


@pytest.fixture(scope='module')
def mamba2(): return load_model('mock://mamba2-tiny')


@pytest.fixture(scope='module')
def sae(mamba2): return coder(mamba2)


@pytest.fixture(scope='module')
def report(mamba2, sae): return read(mamba2, sae)


@pytest.fixture(scope='module')
def z(mamba2, sae):
    "All activations, (tokens, d_sae)."
    return sae.encode(activations(mamba2, SITE, text().view(-1, POS))).flatten(0, 1)


# -- contexts by interval, counted over everything -----------------------------------
def test_intervals_hold_equally_many_firings(report, z):
    values = z.double().numpy()
    assert report.sampled == 2000 and report.drawn_at.shape == (40, 5, 3)
    for j in range(40):
        fired = np.sort(values[:, j][values[:, j] > 0])
        n = len(fired)
        assert n >= 10
        want = [fired[-(-q*n//5)] for q in range(5)] + [fired[-1]]
        assert np.allclose(report.edges[j], want, rtol=1e-5)
        for q in range(5):
            places = [i for i in report.drawn_at[j, q].tolist() if i >= 0]
            assert len({*places}) == len(places) == min(3, sum(r*5//n == q for r in range(n)))
            assert all(want[q]*(1 - 1e-5) <= values[i, j] <= want[q + 1]*(1 + 1e-5) for i in places)


def test_drawn_contexts_are_pieces_of_the_text_with_their_activations(report, z):
    words = [report.strings[i] for i in text().tolist()]
    for j in (0, 17, 39):
        assert len(report.drawn(j)) == 5
        for c in [c for part in report.drawn(j) for c in part] + report.top(j):
            assert list(c.tokens) == words[c.first:c.first + WINDOW] and c.first//POS == (c.first + WINDOW - 1)//POS
            assert np.allclose(c.acts, z[c.first:c.first + WINDOW, j], atol=1e-5) and c.acts[c.at] > 0
        for c in report.quiet(j):
            assert list(c.tokens) == words[c.first:c.first + WINDOW] and c.first//POS == (c.first + WINDOW - 1)//POS
            assert not z[c.first:c.first + WINDOW, j].any()
    assert sum(len(report.quiet(j)) for j in range(40)) > 300


def test_what_is_drawn_is_uniform(mamba2, sae, z):
    "Over 200 seeds each firing of an interval comes up as often as another (chi-square, 4 deviations)."
    fired = latent_module._Firings(2**20)
    fired.add(0, z.view(-1, POS, 40))
    kept, seen = fired.sorted(40), []
    for seed in range(200): seen.append(kept.draw(5, 3, torch.Generator().manual_seed(seed))[1][7, 2])
    count = torch.bincount(torch.cat(seen), minlength=2000)
    order = z[:, 7].argsort(stable=True)[-int((z[:, 7] > 0).sum()):]
    n = len(order)
    inside = order[[r for r in range(n) if r*5//n == 2]]
    assert count.sum() == count[inside].sum() == 600
    want = 600/len(inside)
    chi = float(((count[inside] - want)**2/want).sum())
    assert abs(chi - len(inside)) < 4*(2*len(inside))**.5 + .5*len(inside)


def test_a_full_store_keeps_whole_rows_at_random(mamba2, sae, z, monkeypatch):
    monkeypatch.setattr(latent_module, '_FIRINGS', 3000)
    small = read(mamba2, sae)
    assert 0 < small.sampled <= 1000 and small.sampled % POS == 0
    rows = {int(i)//POS for i in small.drawn_at.flatten() if i >= 0}
    assert len(rows)*POS <= small.sampled and rows != set(range(len(rows)))       # not simply the first ones
    for j in range(0, 40, 7):
        for c in [c for part in small.drawn(j) for c in part]:
            assert np.allclose(c.acts, z[c.first:c.first + WINDOW, j], atol=1e-5)
    monkeypatch.setattr(latent_module, '_FIRINGS', 1)
    assert read(mamba2, sae).sampled == POS                                       # one row stays


def test_rare_and_dead_latents(mamba2):
    sae = coder(mamba2)
    sae.b_enc.data[3] = -1e6
    report = read(mamba2, sae)
    assert report.frequency[3] == 0 and report.top(3) == [] and report.words(3) == []
    assert not any(report.drawn(3)) and report.edges[3].isnan().all() and len(report.quiet(3)) == 15
    assert 'fires on none' in latent_view(report, 3) and 'holds none' in interval_view(report, 3)
    fires = torch.zeros(1, 40, 2)
    fires[0, 5, 0], fires[0, 9, 0] = 1., 2.
    kept = latent_module._Firings(100)
    kept.add(0, fires)
    edges, at = kept.sorted(2).draw(5, 2, torch.Generator())
    assert edges[0].tolist() == [1, 2, 2, 2, 2, 2] and at[0].tolist() == [[5, -1], [-1, -1], [9, -1], [-1, -1], [-1, -1]]


# -- neighbours, against dense numpy -------------------------------------------------
def test_neighbours_equal_dense_numpy(report, sae, z):
    W, on = sae.W_dec.double().numpy(), (z > 0).double().numpy()
    W = W/np.linalg.norm(W, axis=1, keepdims=True)
    both = on.T @ on
    either = on.sum(0)[:, None] + on.sum(0) - both
    for side, want in ((report.near, W @ W.T), (report.together, both/either)):
        np.fill_diagonal(want, -9)
        assert side.index.shape == (40, 6)
        assert np.allclose(side.value, -np.sort(-want, 1)[:, :6], atol=1e-5)
        assert np.allclose(np.take_along_axis(want, side.index.numpy(), 1), side.value, atol=1e-5)


def test_neighbours_in_parts(report, sae, monkeypatch):
    monkeypatch.setattr(latent_module, '_CELLS', 7*40)
    assert torch.allclose(closest(sae.W_dec, 6).value, report.near.value, atol=1e-6)
    lonely = torch.zeros(1, 20, 3)
    lonely[0, 2, 0] = lonely[0, 3, 1] = 1
    fired = latent_module._Firings(99)
    fired.add(0, lonely)
    assert latent_module._together(fired.sorted(3), 2).index.tolist() == [[-1, -1]]*3


# -- writers -------------------------------------------------------------------------
SUMS = 'resid_post', 'resid_pre', 'mixer_out', 'ssm.out', 'attn.out', 'ssm.out_proj_in', 'ssm.y', 'attn.z'


@pytest.mark.parametrize('family', ['mamba2', 'rwkv7', 'falcon-h1', 'jamba', *(
    pytest.param(f, marks=pytest.mark.slow) for f in ('mamba1', 'hymba', 'granite-hybrid', 'qwen3-next', 'nemotron-h'))])
def test_parts_sum_to_the_preactivation(family):
    model = load_model(f'mock://{family}-tiny')
    last, seen = model.n_layers - 1 - (family == 'nemotron-h'), 0                  # whose last block is an MLP alone
    for site in (f'blocks.{last}.{s}' for s in SUMS):
        if site not in model.site_names('*') or not (parts := site_parts(model, site)): continue
        sae = coder(model, site)
        report = read(model, sae, 400, contexts=3)
        found = latent_writers(model, sae, report, [0, 7, 31])
        x = activations(model, site, text(400).view(-1, POS)).flatten(0, 1)
        want = sae.pre(x)[report.at[[0, 7, 31]].long(), torch.tensor([[0], [7], [31]])]
        assert found.values.shape == (3, 3, len(parts)) and len(parts) <= 64
        assert top(found.pre - want) < 1e-4 and top(found.rest) < 1e-4*top(found.pre), site
        seen += 1
    assert seen >= 4


def test_a_head_is_a_slice_and_a_block_is_what_it_added(mamba2):
    "In float64, from the activations alone, with the means over the rows that the module says."
    for site, sources in (('blocks.1.ssm.y', ['blocks.1.ssm.y']),
                          ('blocks.1.resid_post', ['blocks.0.resid_pre', 'blocks.0.ssm.out', 'blocks.1.ssm.out'])):
        sae = coder(mamba2, site)
        report = read(mamba2, sae, 400)                                            # 8 rows: all are in the mean
        found, rows = latent_writers(mamba2, sae, report, 5), text(400).view(-1, POS)
        w = sae.W_enc[:, 5].double()
        x = [activations(mamba2, s, rows).flatten(0, 1).double() for s in sources]
        if len(x) == 1: x, w = x[0].view(400, 4, 16).unbind(1), w.view(4, 16)
        else: w = [w]*3
        want = torch.stack([(part - part.mean(0))[report.at[5].long()] @ v for part, v in zip(x, w)], -1)
        assert top(found.values[0] - want) < 1e-4*top(want)
        assert found.tokens[0] == tuple(report.words(5))


def test_out_of_a_branch_the_heads_are_found_before_its_matrix(mamba2):
    sae = coder(mamba2, 'blocks.1.ssm.out')
    report = read(mamba2, sae, 400)
    found, w = latent_writers(mamba2, sae, report, 9), sae.W_enc[:, 9].double()
    x = activations(mamba2, SITE, text(400).view(-1, POS)).flatten(0, 1).double().view(400, 4, 16)
    M = mamba2.blocks[1].mixer.out_proj.weight.double().T.view(4, 16, -1)
    want = torch.einsum('nhi,hio,o->nh', (x - x.mean(0))[report.at[9].long()], M, w)
    assert found.names == ('head 0', 'head 1', 'head 2', 'head 3') and top(found.values[0] - want) < 1e-4*top(want)


@pytest.mark.parametrize('kw', [
    dict(activation='gated'), dict(activation='jumprelu'), dict(normalize='layer_norm'),
    dict(normalize='constant_norm_rescale'), dict(writes=(Place('blocks.1.ssm.out', (32,)),)),
    dict(beside=(Place('blocks.0.ssm.out', (32,)),))], ids=lambda kw: next(iter(kw)) + str(next(iter(kw.values())))[:9])
def test_every_kind_of_coder_has_writers(mamba2, kw):
    d = mamba2.sizes['d_model']
    kw = {k: tuple(Place(p.site, (d,)) for p in v) if k in ('writes', 'beside') else v for k, v in kw.items()}
    sae = coder(mamba2, **kw)
    report = read(mamba2, sae, 400)
    found = latent_writers(mamba2, sae, report)
    assert top(found.rest) < 1e-4*top(found.pre)
    if 'beside' in kw: assert found.names == (SITE, 'blocks.0.ssm.out')
    if sae.cfg.activation in ('topk', 'jumprelu'):                                 # where it fires, it is the activation
        fires = report.peak[list(found.latents)] > 0
        assert torch.allclose(found.pre[fires], report.peak[list(found.latents)][fires], atol=1e-4)
    effect = latent_effects(mamba2, sae, report, [2], steps=4)
    assert effect.values.isfinite().all()


def test_heads_that_are_read_apart(mamba2):
    sae = coder(mamba2, 'blocks.1.ssm.y', heads=(0, 2, 3))
    report = read(mamba2, sae, 400)
    x = mamba2.run_with_cache(text(400).view(-1, POS), 'blocks.1.ssm.y')[1]['blocks.1.ssm.y'][:, :, [0, 2, 3]]
    by_head = sae.encode(x.flatten(0, 1))                                          # (tokens, head, d_sae)
    assert torch.allclose(latent_activations(mamba2, sae, text(400).view(-1, POS)).flatten(0, 1), by_head.amax(1))
    assert torch.allclose(report.frequency, (by_head.amax(1) > 0).float().mean(0))
    found = latent_writers(mamba2, sae, report, 4)
    assert found.apart and found.names == ('head 0', 'head 2', 'head 3')
    assert torch.allclose(found.values[0], by_head[report.at[4].long(), :, 4], atol=1e-5) and top(found.rest) == 0
    report = add_writers(mamba2, sae, report)
    best = (0, 2, 3)[int(report.written[4].argmax())]
    effect = latent_effects(mamba2, sae, report, 4, steps=3, places=[100])
    _, change = two_runs(mamba2, report, 'blocks.1.ssm.y', sae.W_dec[4]*report.mean[4], 100, 3, head=best)
    assert np.allclose(effect.values[0, 1, 0], change, rtol=1e-3, atol=1e-6)


def test_a_site_that_is_no_sum_says_so(mamba2):
    sae = coder(mamba2, 'blocks.1.ssm.in_proj')
    report = read(mamba2, sae, 400)
    with pytest.raises(ValueError, match='has heads or is a sum'): latent_writers(mamba2, sae, report)
    assert add_writers(mamba2, sae, report) is report
    assert 'does not say' in writers_view(report, 0)


def test_what_the_parts_miss_is_shown():
    "In Zamba2 a shared block adds to what a block reads, not to the stream."
    model = load_model('mock://zamba2-tiny')
    sae = coder(model, f'blocks.{model.n_layers - 1}.resid_post')
    report = add_writers(model, sae, read(model, sae, 400))
    assert report.writers[-1] == 'the rest' and top(report.written[:, -1]) > .1


def test_some_latents_of_a_report_after_others(mamba2, sae, report):
    one = add_writers(mamba2, sae, report, 5)
    assert one.written[5].isfinite().all() and one.written[6].isnan().all() and report.written is None
    both = add_writers(mamba2, sae, one, [6])
    assert torch.equal(both.written[5], one.written[5]) and both.written[6].isfinite().all()
    assert torch.allclose(both.written[[5, 6]], add_writers(mamba2, sae, report).written[[5, 6]], atol=1e-5)
    a = add_effects(mamba2, sae, one, 5, steps=3, progress=False)
    b = add_effects(mamba2, sae, a, 6, steps=3, progress=False)
    assert torch.equal(a.effects[5], b.effects[5]) and a.effects[6].isnan().all() and b.effects[6].isfinite().all()


# -- effects, against two whole runs -------------------------------------------------
def two_runs(model, report, site, vector, place, steps, before=64, head=None):
    "KL and the norm of the change of the last stream at a place and the next steps, in float64."
    ids = report.text.flatten()[max(0, place - before):place + steps + 1][None].long()
    at, last = min(before, place), f'blocks.{model.n_layers - 1}.resid_post'
    shape = model.site_shape(site, 1, 1)[3 if head is not None else 2:]
    edit = add(site, vector.view(1, 1, *shape) if head is None else vector.view(1, 1, 1, *shape), at=at, heads=head)
    a, x = model.run_with_cache(ids, last)
    b, y = model.run_with_cache(ids, last, edit=edit)
    p, q = (o.logits[0, at:].double().log_softmax(-1).numpy() for o in (a, b))
    return (np.exp(p)*(p - q)).sum(-1), (y[last] - x[last])[0, at:].double().norm(dim=-1).numpy()


@pytest.mark.parametrize('family, site', [
    ('mamba2', 'blocks.0.ssm.out_proj_in'), ('rwkv7', 'blocks.0.resid_post'), ('falcon-h1', 'blocks.0.attn.out'),
    ('hymba', 'blocks.0.resid_pre'), ('mamba1', 'blocks.0.ssm.y')])
def test_effects_equal_two_runs_by_hand(family, site):
    model = load_model(f'mock://{family}-tiny')
    sae = coder(model, site)
    report = read(model, sae, 400)
    found = latent_effects(model, sae, report, [1, 8], steps=6, places=[10, 200], strength=5.)
    for k, j in enumerate((1, 8)):
        for n, place in enumerate((10, 200)):
            kl, change = two_runs(model, report, site, 5*sae.W_dec[j], place, 6)
            assert np.allclose(found.values[k, 0, n], kl, rtol=2e-2, atol=2e-6), (j, place)
            assert np.allclose(found.values[k, 1, n], change, rtol=2e-3, atol=1e-4)
    assert float(found.mean[:, 0].max()) > 1e-5 and found.strength.tolist() == [5, 5]


def test_raised_logits_and_the_last_block(mamba2, sae, report):
    found = latent_effects(mamba2, sae, report, [3], steps=5, places=[70])
    assert found.curves == ('kl', 'stream', 'raised') and float(found.values[0, 1, 0, 0]) > 0
    assert top(found.values[0, :, 0, 1:]) == 0 and float(found.later[0]) == 0      # nothing above the last block remembers
    ids = report.text.flatten()[6:76][None].long()
    clean, pushed = (mamba2.run(ids, edit=e).logits[0, 64].double() for e in ((), add(SITE, report.mean[3]*sae.W_dec[3], at=64)))
    moved = pushed - clean
    assert float(found.values[0, 2, 0, 0]) == pytest.approx(float(moved[report.up.index[3]].mean() - moved.mean()), rel=1e-3)


@pytest.mark.parametrize('family', ['mamba2', 'mamba1', 'rwkv7', 'qwen3-next', 'hymba'])
@pytest.mark.parametrize('place', [0, 30])
def test_the_share_left_in_a_state_is_what_two_runs_say(family, place):
    model = load_model(f'mock://{family}-tiny')
    site = next(n for n in model.site_names('*') if short(n) == 'ssm.state')
    sae = coder(model, site, 6, 2)
    report = read(model, sae, 100)
    found = latent_effects(model, sae, report, [0, 4], steps=5, places=[place])
    ids = report.text.flatten()[:place + 6][None].long()
    for k, j in enumerate((0, 4)):
        D = 100*sae.W_dec[j].view(model.site_shape(site, 1, 1)[2:])                # linear: large, against rounding
        a, b = (model.run_with_cache(ids, site, edit=e)[1][site][0, place:] for e in ((), add(site, D, at=place)))
        want = (b - a).double().flatten(1).norm(dim=1)/100
        assert np.allclose(found.values[k, found.curves.index('kept'), 0], want, rtol=2e-3, atol=1e-5)


def test_effects_that_cannot_be(mamba2, sae, report):
    for kw, words in ((dict(latents=40), '0 to 39'), (dict(places=[1990]), '0 to 1967'), (dict(steps=0), 'steps')):
        with pytest.raises(ValueError, match=words): latent_effects(mamba2, sae, report, **{'latents': 1} | kw)
    other = read(mamba2, coder(mamba2, d_sae=41), 400)
    for call in (latent_effects, latent_writers):
        with pytest.raises(ValueError, match='41 latents, expected .* 40'): call(mamba2, sae, other)
    short_text = read(mamba2, sae, 20, context=10)
    assert latent_effects(mamba2, sae, short_text, 0, places=1).values.shape[-1] == 19


def test_figures(mamba2, sae, report):
    effect, found = latent_effects(mamba2, sae, report, [3, 4], steps=5), latent_writers(mamba2, sae, report, [3, 4])
    axes = effect.plot([4]).axes
    assert len(axes) == 3 and np.allclose(axes[1].lines[0].get_ydata(), effect.mean[1, 1])
    bars = found.plot(4).axes[0].patches
    assert np.allclose([b.get_height() for b in bars], found.values[1].mean(0), atol=1e-6)
    assert 'latent 3' in repr(effect) and 'head' in repr(found) and found.top(3, 1)[0][0] in repr(found)


# -- the file ------------------------------------------------------------------------
@pytest.fixture(scope='module')
def full(mamba2, sae, report):
    "A report with everything in it."
    more = add_effects(mamba2, sae, add_writers(mamba2, sae, report), range(20), steps=4, progress=False)
    named = add_labels(more, token_label, progress=False)
    return score_labels(named, token_judge, progress=False)


def same(a, b):
    if isinstance(a, Ranked): return torch.equal(a.index, b.index) and torch.equal(a.value, b.value)
    return torch.equal(a.nan_to_num(-5), b.nan_to_num(-5)) if isinstance(a, torch.Tensor) else a == b


def test_a_report_comes_back_from_its_file(full, report, tmp_path):
    for n, r in enumerate((full, report)):
        back = LatentReport.load(r.save(tmp_path/f'{n}.safetensors'))
        assert all(same(v, getattr(back, k)) for k, v in vars(r).items()) and repr(back) == repr(r)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith('.')] == []
    bad = tmp_path/'bad.safetensors'
    bad.write_bytes((tmp_path/'0.safetensors').read_bytes()[:-100])
    for write in (lambda: None, lambda: save_file({'a': torch.ones(2)}, bad), lambda: bad.write_text('{}')):
        write()
        with pytest.raises(ValueError, match=r'bad.safetensors.*expected a file of LatentReport.save'): LatentReport.load(bad)


# -- the inspector on what was saved -------------------------------------------------
def test_the_inspector_needs_no_model_for_what_is_saved(full, tmp_path):
    shown = SAEInspector(LatentReport.load(full.save(tmp_path/'a.safetensors')))
    j = shown.values['latent']
    texts = ['Where it is highest', 'drawn at random', 'Closest in direction', 'head 3', 'effect over the next steps']
    for part, words in zip(PARTS, texts):
        shown.set(show=part)
        assert words in shown.html and f'Latent {j}' in shown.html
    k = next(j for j in latent_order(full) if j >= 20)
    shown.set(latent=k)
    assert 'The report does not say: add_effects' in shown.html
    label = full.labels[k]
    shown.set(search=label)
    assert shown.values['latent'] in [j for j, s in full.labels.items() if label in s]
    shown.set(sort='best told by its label', search='')
    best = max(full.scores.values())[0]
    assert full.scores[latent_order(full, 'best told by its label')[0]][0] == best


def test_with_a_model_it_adds_what_is_looked_at(mamba2, sae, report, monkeypatch):
    calls = []
    for name in ('add_writers', 'add_effects'):
        def counted(own, name):
            def call(*args, **kw):
                calls.append((name, args[3]))
                return own(*args, **kw)
            return call
        monkeypatch.setattr(browse_module, name, counted(getattr(browse_module, name), name))
    shown = SAEInspector(report, model=mamba2, sae=sae)
    j = shown.values['latent']
    assert calls == []
    shown.set(show=PARTS[3])
    assert calls == [('add_writers', j)] and 'At each peak' in shown.html and 'at all means' in shown.html
    shown.set(show=PARTS[4])
    shown.set(show=PARTS[3]), shown.set(show=PARTS[4])
    assert calls == [('add_writers', j), ('add_effects', j)] and shown.report.effects[j].isfinite().all()
    with pytest.raises(ValueError, match='both or neither'): SAEInspector(report, model=mamba2)
    with pytest.raises(ValueError, match='latents'): SAEInspector(report, model=mamba2, sae=coder(mamba2, d_sae=41))


def test_views_say_what_the_report_holds(full):
    j = next(iter(full.scores))
    html = interval_view(full, j, contexts=2)
    assert html.count('class="tk"') == 10 and html.count('class=mk') == 10
    neighbours = neighbour_view(full, j)
    assert all(f'>{i}<' in neighbours for i in full.near.index[j].tolist())
    assert full.labels[j].replace('"', '&quot;') in latent_view(full, j)
    assert 'logarithmic' not in effect_view(full, 0) and 'KL of the next token' in effect_view(full, 0)
    for view in (interval_view, neighbour_view, writers_view, effect_view):
        with pytest.raises(ValueError, match='0 to 39'): view(full, 40)
        assert 'http' not in view(full, 1)


# -- labels --------------------------------------------------------------------------
def planted(n=6, rows=40, pos=60, window=10, noise=0.):
    "Latents that each fire on one word, or on any word with a probability."
    g, words = torch.Generator().manual_seed(0), [f' word{i}' for i in range(30)]
    ids = torch.randint(0, 30, (rows, pos), generator=g, dtype=torch.int32)
    on = torch.stack([ids == i for i in range(n)], -1)
    if noise: on = torch.rand(rows, pos, n, generator=g) < noise
    acts = on*(1 + torch.rand(rows, pos, n, generator=g))
    class Given:
        W_dec = torch.randn(n, 8, generator=g)
        check = staticmethod(lambda model: 'blocks.0.ssm.y')
    fired = latent_module._Firings(2**20)
    fired.add(0, acts)
    more = latent_module._by_interval(fired.sorted(n), pos, window, 5, 4, 2, 0)
    peak, at, around = (v.transpose(0, 1).contiguous() for v in latent_module._highest(acts, 4, window))
    return LatentReport('a model', 'blocks.0.ssm.y', ids, window, on.float().mean((0, 1)), acts.sum((0, 1))/on.sum((0, 1)),
                        peak, at.int(), around, torch.ones(n, 32), torch.ones(n), strings=dict(enumerate(words)), **more)


def test_the_token_labeller_finds_planted_words():
    named = add_labels(planted(), token_label, progress=False)
    assert named.labels == {j: f'" word{j}"' for j in range(6)}
    scored = score_labels(named, token_judge, progress=False)
    assert all(found == 1 for found, _ in scored.scores.values())
    assert all(abs(other - .5) < .35 for _, other in scored.scores.values())
    seen = Detection.of(scored)
    assert abs(np.mean(seen.other) - .5) < .15 and 'own label         1.000' in repr(seen) and '100%' in repr(scored)
    with pytest.raises(ValueError, match='expected one of token_label'): token_judge('the sea', [])


def test_labels_of_latents_without_meaning_score_like_the_control():
    scored = score_labels(add_labels(planted(24, noise=.05), token_label, progress=False), token_judge, progress=False)
    seen = Detection.of(scored)
    gain = np.subtract(seen.found, seen.other)
    assert len(gain) == 24 and abs(gain.mean()) < 4*gain.std()/24**.5 + .05


@pytest.mark.parametrize('judge, want', [
    (lambda label, contexts: [True]*len(contexts), .5), (lambda label, contexts: [False]*len(contexts), .5)])
def test_a_judge_that_does_not_look_scores_a_half(judge, want):
    scored = score_labels(add_labels(planted(), token_label, progress=False), judge, progress=False)
    assert all(pair == (want, want) for pair in scored.scores.values())


def test_balanced_accuracy_is_what_counting_says():
    "The judge says yes to every third context; which of them hold the word is known."
    report = add_labels(planted(), token_label, progress=False)
    told = []
    def judge(label, contexts):
        said = [k % 3 == 0 for k in range(len(contexts))]
        told.append((label, contexts, said))
        return said
    scored = score_labels(report, judge, progress=False)
    assert len(told) == 12
    for k, (j, (found, other)) in enumerate(scored.scores.items()):
        (label, contexts, said), (other_label, same_contexts, _) = told[2*k:2*k + 2]
        assert label == report.labels[j] != other_label and contexts == same_contexts
        yes, said = np.array([f' word{j}' in c.tokens for c in contexts]), np.array(said)
        assert yes.sum()*2 == len(yes) and found == other
        assert found == pytest.approx((said[yes].mean() + (~said[~yes]).mean())/2)


def test_no_context_of_the_judge_is_near_what_the_labeller_saw():
    report = planted()
    for j in range(6):
        fires, quiet = unseen_contexts(report, j)
        assert len(fires) == len(quiet) > 2
        shown = examples_of(report, j)
        assert len(shown) == 4 + 5
        for c in fires:
            assert all(abs(c.first - s.first) >= 10 for s in shown) and f' word{j}' in c.tokens
        assert not any(f' word{j}' in c.tokens for c in quiet) and not any(any(c.acts) for c in fires + quiet)


def test_labels_are_kept_and_gone_on_with(tmp_path):
    report, path, asked = planted(), tmp_path/'labels.json', []
    def label(examples):
        if len(asked) == 3: raise ConnectionError('the service is away')
        asked.append(examples)
        return f' a  thing\nof {len(asked)} '
    with pytest.raises(ConnectionError): add_labels(report, label, path=path, progress=False)
    kept = json.loads(path.read_text())
    assert kept['labels'] == {str(j): f'a thing of {j + 1}' for j in range(3)} and kept['labeller'] == 'label'
    asked.clear()
    done = add_labels(report, label, latents=range(5), path=path, progress=False)
    assert len(asked) == 2 and done.labels[0] == 'a thing of 1' and done.labels[4] == 'a thing of 2'
    scored = score_labels(done, lambda s, cs: [True]*len(cs), path=path, name='yes', progress=False)
    assert set(json.loads(path.read_text())['scores']) == {str(j) for j in scored.scores} and len(scored.scores) == 5
    again = add_labels(report, label, latents=range(5), path=path, progress=False)
    assert again.labels == done.labels and again.scores == scored.scores and [p.name for p in tmp_path.iterdir()] == ['labels.json']
    for other, kw, words in ((replace(report, site='blocks.1.ssm.y'), {}, 'blocks.0.ssm.y'), (report, dict(name='b'), 'labeller')):
        with pytest.raises(ValueError, match=words): add_labels(other, label, path=path, progress=False, **kw)
    with pytest.raises(ValueError, match='yes'): score_labels(done, token_judge, path=path, progress=False)
    path.write_text('{"labels": 3')
    with pytest.raises(ValueError, match='cannot be read'): add_labels(report, label, path=path, progress=False)


def test_an_interrupt_keeps_the_labels():
    asked = []
    def label(examples):
        if len(asked) == 2: raise KeyboardInterrupt
        asked.append(0)
        return 'x'
    assert add_labels(planted(), label, progress=False).labels == {0: 'x', 1: 'x'}


def test_labellers_and_judges_that_answer_wrongly():
    report = planted()
    for said in ('', '  ', None, 3):
        with pytest.raises(TypeError, match='expected a text'): add_labels(report, lambda e, said=said: said, progress=False)
    with pytest.raises(ValueError, match='two that differ'): score_labels(report, token_judge, progress=False)
    named = add_labels(report, token_label, progress=False)
    with pytest.raises(ValueError, match='1 answers'): score_labels(named, lambda s, cs: [True], progress=False)
    with pytest.raises(ValueError, match='0 to 5'): add_labels(report, token_label, [6], progress=False)


def test_marked_texts():
    c = Context(('a', ' b', ' c'), (1., .2, 0.), 0)
    assert marked(c) == '<<a>> b c' and marked(c, above=.2) == '<<a>><< b>> c'
    assert marked(Context(('a',), (0.,), 0)) == 'a'


# -- the page ------------------------------------------------------------------------
def unpacked(path):
    "What a page holds, read by the format's description."
    html = path.read_text(encoding='utf-8')
    raw = gzip.decompress(b64decode(re.search(r'id="dash-data">([^<]*)<', html)[1]))
    size = int.from_bytes(raw[:4], 'little')
    about, data = json.loads(raw[4:4 + size]), raw[4 + size:]
    arrays = {k: np.frombuffer(data, '<' + kind if kind != 'u1' else kind, int(np.prod(shape)), at).reshape(shape)
              for k, (kind, at, shape) in about['parts'].items()}
    return html, about, arrays


def test_the_page_holds_the_report(full, tmp_path):
    html, about, a = unpacked(dashboard(full, tmp_path/'page.html'))
    assert 'http' not in re.sub(r'http-equiv|<script type="text/plain".*?</script>', '', html) and 'src=' not in html
    assert about['labels'] == {str(j): s for j, s in full.labels.items()} and about['writers'] == list(full.writers)
    strings, (top, (Q, D)) = about['strings'], (about['top'], about['intervals'])
    assert (top, Q, D) == (4, 5, 3) and a['start'].shape == (40, 19) and len(a['text']) <= 2000
    assert np.array_equal(a['frequency'], full.frequency) and np.array_equal(a['counts'], full.counts)
    for j in range(40):
        want = full.top(j) + [c for part in full.drawn(j) for c in part]
        got = [c for c in range(19) if a['start'][j, c] >= 0]
        assert len(got) == len(want)
        for c, w in zip(got, want):
            at = a['start'][j, c]
            assert [strings[i] for i in a['text'][at:at + WINDOW]] == list(w.tokens) and a['spot'][j, c] == w.at
            acts = a['acts'][j, c]/255*a['peak'][j]
            assert np.abs(acts - w.acts).max() <= max(full.peak[j, 0]/255, 0)
            assert ((acts > 0) == (np.array(w.acts) > 0)).all()                    # a firing stays one
        assert [strings[i] for i in a['up'][j]] == full.raised(j)
    assert np.array_equal(a['near'], full.near.index) and np.allclose(a['near_by'], full.near.value, atol=1e-3)
    effects = a['effects'].astype(float)*a['effects_high'][..., None]
    known = full.effects[:20].numpy()
    assert np.allclose(effects[:20], known, rtol=2e-3, atol=1e-3*np.abs(known).max(-1, keepdims=True))
    assert np.isnan(effects[20:]).all()


def test_a_page_of_little(mamba2, report, tmp_path):
    bare = replace(report, drawn_at=None, drawn_acts=None, quiet_at=None, edges=None, together=None, near=None, up=None, down=None)
    html, about, a = unpacked(dashboard(bare, tmp_path/'page.html', 'A <title>', contexts=2))
    assert about['intervals'] == [0, 0] and a['start'].shape == (40, 2) and 'A &lt;title&gt;' in html and 'up' not in a
    assert '</script><' not in ''.join(about['strings'])
