"""Directions, against hooks and autograd on the bare model, float64 numpy and scikit-learn."""
import math
import os
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from test_steer import Coder
from test_sweep import bare, rest

from circuitbench.coder import Place, SAEConfig
from circuitbench.direction import (
    Direction,
    gathered,
    given_direction,
    latent_direction,
    mean_difference,
    pca_difference,
    probe_direction,
    site_of,
    state_difference,
    steepest,
)
from circuitbench.edit import live
from circuitbench.load import load_model
from circuitbench.sae import SAE
from circuitbench.site import SiteError

FAMILIES = ['mamba2', 'llama', 'rwkv7', 'hymba']
DRAW = torch.Generator().manual_seed(0)
POSITIVE, NEGATIVE = ([torch.randint(257, (n,), generator=DRAW) for n in (5, 9, 3, 7, 4, 6)] for _ in range(2))
IDS = [5, 9, 41, 7, 200, 9, 3]
SITE = 'blocks.1.resid_post'


@pytest.fixture(scope='module', params=FAMILIES)
def model(request): return load_model(f'mock://{request.param}-tiny')


@pytest.fixture(scope='module')
def mamba2(): return load_model('mock://mamba2-tiny')


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hooked(model, layer, change, run):
    "What `run()` gives with a plain hook that changes what a block gives, rows of the prompt alone."
    def _hook(module, args, out):
        x = out[0] if isinstance(out, tuple) else out
        skip = model.meta if x.shape[1] > 1 else 0                       # the meta tokens come with the prompt
        new = torch.cat([x[:, :skip], change(x[:, skip:])], 1)
        return (new, *out[1:]) if isinstance(out, tuple) else new
    handle = model.blocks[layer].register_forward_hook(_hook)
    try: return run()
    finally: handle.remove()


def seen(model, layer, prompts):
    "A block's output on each prompt, (pos, d_model), float64."
    out = []
    with torch.no_grad():
        for p in prompts: hooked(model, layer, lambda x: out.append(x[0].double().numpy()) or x, lambda p=p: model.hf(p[None]))
    return out


def same(got, want, rel=1e-5):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape and np.abs(got - want).max() <= rel*np.abs(want).max()


# -- ways to find one --------------------------------------------------------------------
@pytest.mark.parametrize('at, rows', [(-1, [-1]), (None, slice(None)), ([0, -2], [0, -2]), (slice(1, None), slice(1, None))])
def test_means_are_those_of_activations_taken_by_a_hook(model, at, rows):
    a, b = (np.stack([x[rows].mean(0) for x in seen(model, 1, p)]) for p in (POSITIVE, NEGATIVE))
    same(gathered(model, POSITIVE, SITE, at), a)
    d = mean_difference(model, POSITIVE, NEGATIVE[:4], 'resid_post', 1, at)
    same(d.vector, a.mean(0) - b[:4].mean(0))
    assert (d.site, d.model, d.heads, d.data) == (SITE, model.name, None, '6 against 4 prompts') and bare(model)


def test_the_principal_axis_is_that_of_both_ways_round(model):
    a, b = (np.stack([x[-1] for x in seen(model, 0, p)]) for p in (POSITIVE, NEGATIVE))
    axis = PCA(1).fit(np.concatenate([a - b, b - a])/2).components_[0]      # as repeng's pca_center
    axis *= np.sign((a - b).mean(0) @ axis)
    d = pca_difference(model, POSITIVE, NEGATIVE, 'resid_post', 0)
    same(d.vector, axis*((a - b).mean(0) @ axis), 1e-4)
    assert d.norm == pytest.approx((a - b).mean(0) @ axis, rel=1e-4) and d.vector @ torch.tensor((a - b).mean(0)).float() > 0


@pytest.mark.parametrize('penalty', [.1, 1., 30.])
def test_the_probe_is_that_of_scikit_learn(model, penalty):
    a, b = (np.stack([x[-1] for x in seen(model, 1, p)]) for p in (POSITIVE, NEGATIVE[:5]))
    x, y = np.concatenate([a, b]), [1]*6 + [0]*5
    scaled = StandardScaler().fit(x)
    probe = LogisticRegression(C=1/penalty, tol=1e-10, max_iter=100_000).fit(scaled.transform(x), y)
    normal = probe.coef_[0]/scaled.scale_
    normal /= np.linalg.norm(normal)
    same(probe_direction(model, POSITIVE, NEGATIVE[:5], 'resid_post', 1, penalty=penalty).vector,
         normal*((a.mean(0) - b.mean(0)) @ normal), 1e-4)


def test_a_channel_that_does_not_vary_takes_no_part_in_the_probe():
    model = load_model('mock://mamba2-tiny')
    model.hf.backbone.embeddings.weight.data[:, 5] = .7
    x = np.stack([model.hf.backbone.embeddings.weight[p[-1]].double().numpy() for p in [*POSITIVE, *NEGATIVE]])
    scaled = StandardScaler().fit(x)
    scaled.scale_[5] = 1                                                    # the mean of many .7 is not .7 to the last bit
    normal = LogisticRegression(tol=1e-10, max_iter=100_000).fit(scaled.transform(x), [1]*6 + [0]*6).coef_[0]/scaled.scale_
    d = probe_direction(model, POSITIVE, NEGATIVE, 'embed')
    same(d.unit.vector, normal/np.linalg.norm(normal), 1e-4)
    assert d.vector[5].abs() < 1e-9*d.norm


def test_the_gradient_is_that_of_autograd_and_of_finite_differences(model):
    metric = lambda logits: logits[17] - 2*logits[30]
    def _gradient(ids):
        leaf = []
        def _leaf(x): return leaf.append(x.detach().requires_grad_()) or leaf[0]
        value = metric(hooked(model, 0, _leaf, lambda: model.hf(ids[None])).logits[0, -1])
        return torch.autograd.grad(value, leaf[0])[0][0].double().numpy()
    total = [_gradient(ids) for ids in POSITIVE[:3]]
    for at, rows in ((-1, [-1]), (None, slice(None))):
        with torch.no_grad(): d = steepest(model, POSITIVE[:3], metric, 'resid_post', 0, at)
        same(d.vector, np.mean([g[rows].mean(0) for g in total], 0), 1e-4)
    ids, v, n = POSITIVE[0], draw(model.sizes['d_model']), len(POSITIVE[0])

    def _moved(eps):
        with torch.no_grad():
            push = lambda x: torch.cat([x[:, :-1], x[:, -1:] + eps*v], 1)
            return float(metric(hooked(model, 0, push, lambda: model.hf(ids[None])).logits[0, -1]))
    slope = (_moved(.01) - _moved(-.01))/.02
    g = steepest(model, [ids], metric, 'resid_post', 0, n - 1)
    assert float(g.vector.cpu() @ v) == pytest.approx(slope, rel=2e-2, abs=2e-3*g.norm) and bare(model)


def test_states_and_their_heads_are_those_of_the_equations(mamba2):
    end = lambda p: oracle.run(mamba2.hf, p[None].numpy())['blocks.1.ssm.state'][0, -1]
    a, b = (np.stack([end(p) for p in prompts]) for prompts in (POSITIVE, NEGATIVE))
    same(mean_difference(mamba2, POSITIVE, NEGATIVE, 'ssm.state', 1).vector, a.mean(0) - b.mean(0), 1e-4)
    d = mean_difference(mamba2, POSITIVE, NEGATIVE, 'ssm.state', 1, heads=[3, 1])
    same(d.vector, (a.mean(0) - b.mean(0))[[3, 1]], 1e-4)
    assert d.heads == (3, 1) and d.check(mamba2).vector.shape == (2, 16, 8)
    same(state_difference(mamba2, POSITIVE[0], layer=1).vector, a[0], 1e-4)
    d = state_difference(mamba2, POSITIVE[0], NEGATIVE[0], layer=1, heads=2)
    same(d.vector, (a[0] - b[0])[[2]], 1e-4)
    out = mamba2.run(NEGATIVE[0], edit=d.push(d.norm, at=-1), keep_state=True)
    want = b[0].copy()
    want[2] = a[0][2]
    same(out.state.ssm[1][0], want, 1e-4)                                   # the memory that goes on is the other's


def test_the_gradient_at_a_state_moves_the_metric(mamba2):
    metric = lambda logits: logits[17] - logits[30]
    d = steepest(mamba2, [IDS], metric, 'ssm.state', 1, heads=[3, 1])
    sites, w, eps = oracle.run(mamba2.hf, np.array([IDS])), d.unit.vector.double().numpy(), 1e-4

    def _moved(s):
        y = sites['blocks.1.ssm.y'].copy()
        y[0, -1, [3, 1]] += s*np.einsum('hpn,hn->hp', w, sites['blocks.1.ssm.C'][0, -1, [3, 1]])
        out = rest(mamba2.hf, sites, y)[0, -1]
        return out[17] - out[30]
    assert d.norm == pytest.approx((_moved(eps) - _moved(-eps))/(2*eps), rel=1e-3)


def test_a_latent_is_its_row_of_the_decoder(mamba2):
    tiny, sae = load_model('tiny://mamba2'), SAE.load('tiny://mamba2/blocks.3.ssm.write')
    atom = sae.dec_v[3].double().numpy()[:, None]*sae.dec_w[3].double().numpy()
    d = latent_direction(tiny, sae, 3)
    assert d.heads == tuple(range(8)) and d.vector.shape == (8, 64, 64) == d.check(tiny).vector.shape
    same(d.vector, np.stack([atom]*8))
    d = latent_direction(tiny, sae, 3, heads=[2, 3])
    same(d.vector, np.stack([atom]*2))
    assert d.heads == (2, 3) and d.push(1.).head == (2, 3)
    plain = SAE(SAEConfig(32, 40, 4, SITE, model=mamba2.name))
    same(latent_direction(mamba2, plain, 7).vector, plain.W_dec[7])
    across = SAE(SAEConfig(32, 40, 4, 'blocks.0.mixer_in', model=mamba2.name, writes=(Place('blocks.0.ssm.out_proj_in', (64,)),)))
    d = latent_direction(mamba2, across, 7)
    same(d.vector, across.W_dec[7])
    assert d.site == 'blocks.0.ssm.out_proj_in'
    theirs = Coder(64, 'blocks.1.ssm.out_proj_in')                           # the least that an SAE must be
    d = latent_direction(mamba2, theirs, 7)
    same(d.vector, theirs.W_dec[7])
    assert d.site == 'blocks.1.ssm.out_proj_in' and latent_direction(mamba2, Coder(64, 'out_proj_in'), 7, layer=0).site.startswith('blocks.0')


def test_prompts_are_texts_or_ids():
    tiny = load_model('tiny://mamba2')
    text = [' He sang for joy', ' And all the people']
    ids = [tiny.tokens(t)[0][0] for t in text]
    read = lambda p: gathered(tiny, p, 'blocks.3.resid_post')
    assert torch.equal(read(text), read(ids)) and torch.equal(read(text), read([i.tolist() for i in ids]))
    assert torch.equal(read(text[0]), read(text)[:1]) and torch.equal(read(ids[0]), read(ids[0].tolist()))
    assert torch.equal(read(ids[0]), read(text)[:1]) and torch.equal(read(iter(text)), read(text))


# -- edits -------------------------------------------------------------------------------
@torch.no_grad()
def test_a_push_is_a_hook_that_adds(model):
    v, ids = draw(model.sizes['d_model']), torch.tensor([IDS])
    d = given_direction(model, v, 'resid_post', 1)
    step = 40*(v.double()/v.double().norm()).float()
    added = lambda x: x + step
    logits = model.run(ids, edit=d.push(40)).logits
    same(logits, hooked(model, 1, added, lambda: model.hf(ids).logits))
    assert (logits - model.run(ids).logits).abs().max() > .1
    assert torch.equal(model.run(ids, edit=d.push(0)).logits, model.run(ids).logits) and not live(d.push(0))
    last = lambda x: torch.cat([x[:, :-1], x[:, -1:] + step], 1)
    same(model.run(ids, edit=d.push(40, at=-1)).logits, hooked(model, 1, last, lambda: model.hf(ids).logits))
    write = lambda: model.hf.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    for strength in (40, -40):
        want = hooked(model, 1, lambda x: x + strength/40*step, write)      # noqa: B023
        assert torch.equal(model.generate(ids, 8, edit=d.push(strength)).tokens, want)
    assert not torch.equal(want, write()) and bare(model)


def test_a_push_into_heads_of_a_state_is_what_the_equations_say(mamba2):
    w = draw(2, 16, 8)
    d = given_direction(mamba2, w, 'ssm.state', 1, heads=[3, 1])
    sites = oracle.run(mamba2.hf, np.array([IDS]))
    y = sites['blocks.1.ssm.y'].copy()
    add = 5*w.double().numpy()/np.linalg.norm(w.double().numpy())
    y[0, -1, [3, 1]] += np.einsum('hpn,hn->hp', add, sites['blocks.1.ssm.C'][0, -1, [3, 1]])
    got = mamba2.run(IDS, edit=d.push(5, at=-1)).logits[0, -1].numpy()
    same(got, rest(mamba2.hf, sites, y)[0, -1], 1e-4)
    assert np.abs(got - mamba2.run(IDS).logits[0, -1].numpy()).max() > 1e-2


@pytest.mark.parametrize('site, heads', [('resid_post', None), ('ssm.state', None), ('ssm.state', [2, 3]), ('ssm.dt', [0, 2])])
def test_what_lies_along_it_is_taken_away(mamba2, site, heads):
    name, at = site_of(mamba2, site, 1), dict(at=-1)
    x = mamba2.run_with_cache(IDS, name, heads=heads, **at)[1][name][0, 0].double().numpy()
    d = given_direction(mamba2, draw(*x.shape), site, 1, heads)
    u = d.vector.double().numpy()/d.norm
    got = mamba2.run_with_cache(IDS, name, edit=d.project_out(-1), **at)[1][name][0, 0].double().numpy()
    whole = mamba2.run_with_cache(IDS, name, **at)[1][name][0, 0].double().numpy()
    want = whole.copy()
    want[slice(None) if heads is None else heads] = x - (x*u).sum()*u
    same(got, want)
    assert np.abs(want - whole).max() > 1e-3*np.abs(whole).max()


# -- algebra -----------------------------------------------------------------------------
def test_algebra(mamba2):
    a, b, c = (given_direction(mamba2, draw(32, seed=s), 'resid_post', 1, source=n) for s, n in enumerate('abc'))
    x, y, z = (d.vector.double().numpy() for d in (a, b, c))
    same((2*a - b + c*.5).vector, 2*x - y + z/2)
    same((-a).vector, -x)
    same(a.unit.vector, x/np.linalg.norm(x))
    assert a.norm == pytest.approx(np.linalg.norm(x)) and (a - a).norm == 0 and (1*a).source == 'a'
    cos = x @ y/np.linalg.norm(x)/np.linalg.norm(y)
    assert a.cosine(b) == pytest.approx(cos) == (-3*a).cosine(-b) and a.cosine(a) == pytest.approx(1, abs=1e-12)
    assert (2*a - b).source == '2*(a) + -1*(b)' and 'blocks.1.resid_post' in repr(a)
    for others in ((b,), (b, c), (b, c, b - 2*c), (1e-9*b, 1e9*c)):         # dependent ones, and of any length
        basis = np.stack([y, z][:min(len(others), 2)], 1)
        same(a.orthogonal(*others).vector, x - basis @ np.linalg.lstsq(basis, x, rcond=None)[0])
    assert a.orthogonal(a, b).norm == 0 == (b + 3*c).orthogonal(b, c).norm  # no dust that `unit` would blow up
    half = replace(a, vector=a.vector.half())
    assert half.unit.vector.dtype == torch.half and (half + a).vector.dtype == torch.half
    grown = draw(32).requires_grad_()
    assert not Direction(grown, SITE, 'm', 's').vector.requires_grad


# -- files -------------------------------------------------------------------------------
def test_a_file_read_in_a_fresh_process_is_the_same(mamba2, tmp_path):
    d = given_direction(mamba2, draw(2, 16, 8), 'ssm.state', 1, [3, 1], 'a "source" - ü', 'data\n')
    kept = [d, replace(d, vector=d.vector.bfloat16()), replace(d, heads=None, vector=d.vector.double().transpose(0, 2))]
    paths = [str(d.save(tmp_path/f'd{i}')) for i, d in enumerate(kept)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ['d0', 'd1', 'd2']
    code = ('import sys, torch; from circuitbench.direction import Direction; read = map(Direction.load, sys.argv[2:]);'
            'torch.save([[d.vector, d.site, d.model, d.source, d.data, d.heads] for d in read], sys.argv[1])')
    env = os.environ | {'PYTHONPATH': os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, '-c', code, str(tmp_path/'out'), *paths], check=True, env=env)
    for d, (vector, *said) in zip(kept, torch.load(tmp_path/'out', weights_only=True)):
        assert vector.dtype == d.vector.dtype and torch.equal(vector, d.vector)
        assert said == [d.site, d.model, d.source, d.data, d.heads]


def test_an_interrupt_loses_nothing(mamba2, tmp_path, monkeypatch):
    old, new = (given_direction(mamba2, draw(32, seed=s), 'resid_post', 1) for s in (0, 1))
    path = old.save(tmp_path/'d')
    def _stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(os, 'replace', _stop)
    with pytest.raises(KeyboardInterrupt): new.save(path)
    assert torch.equal(Direction.load(path).vector, old.vector) and [p.name for p in tmp_path.iterdir()] == ['d']


def test_damaged_files_and_others_are_refused(mamba2, tmp_path):
    d = given_direction(mamba2, draw(32), 'resid_post', 1)
    whole = d.save(tmp_path/'d').read_bytes()
    model = mamba2.run(IDS, keep_state=True).state
    model.save(tmp_path/'state')
    torch.save({'vector': d.vector}, tmp_path/'torch')
    (tmp_path/'pickle').write_bytes(pickle.dumps({'vector': [1., 2.]}))
    (tmp_path/'nan').write_bytes(whole[:-4] + b'\xff\xff\xff\xff')
    (tmp_path/'heads').write_bytes(whole.replace(b'\\"heads\\": null', b'\\"heads\\": 3.75'))
    (tmp_path/'source').write_bytes(whole.replace(b'\\"source\\": \\"a vector\\"', b'\\"source\\": 1234567890'))
    for n in (0, 7, 100, len(whole) - 1): (tmp_path/f'cut{n}').write_bytes(whole[:n])
    for path in tmp_path.iterdir():
        if path.name == 'd': continue
        with pytest.raises(ValueError, match='expected a file of Direction.save'): Direction.load(path)
    with pytest.raises(FileNotFoundError): Direction.load(tmp_path/'none')


# -- errors ------------------------------------------------------------------------------
def test_errors_of_directions(mamba2):
    make = lambda v=1., site='resid_post', layer=1, **kw: given_direction(mamba2, torch.full((32,), v), site, layer, **kw)
    d, zero = make(), make() - make()
    other = load_model('mock://mamba1-tiny')
    cases = [
        (lambda: d + make(layer=0), 'got a direction of blocks.0.resid_post.*expected one of blocks.1.resid_post'),
        (lambda: d.cosine(given_direction(mamba2, draw(64), 'out_proj_in', 1)), r'out_proj_in, of shape \(64,\)'),
        (lambda: d.orthogonal(replace(d, model='tiny://mamba1')), 'tiny://mamba1'),
        (lambda: d.orthogonal(), 'got no directions'),
        (lambda: d.check(other), 'got a direction of mock://mamba2-tiny, expected one of mock://mamba1-tiny'),
        (lambda: replace(d, vector=draw(31)).check(mamba2), r'shape \(31,\), expected \(32,\) for blocks.1.resid_post'),
        (lambda: replace(d, site='resid_post').check(mamba2), 'got no layer for blocks'),
        (lambda: replace(d, site='blocks.*.resid_post').check(mamba2), 'got no layer for blocks'),
        (lambda: replace(d, heads=[0]).check(mamba2), 'resid_post, which has no heads'),
        (lambda: replace(d, site='blocks.1.ssm.state', heads=[4]).check(mamba2), 'has 4 heads'),
        (lambda: replace(d, heads=[]), 'each once'), (lambda: replace(d, heads=[1, 1]), 'each once'),
        (lambda: replace(d, heads=-1), 'each 0 or more'),
        (lambda: zero.unit, 'length 0, expected a length of more than 0'), (lambda: zero.push(1.), 'length 0'),
        (lambda: zero.project_out(), 'length 0'), (lambda: d.cosine(zero), 'length 0'),
        (lambda: make(0.), 'length 0, expected more'), (lambda: make(math.nan), 'a vector at .* not finite'),
        (lambda: make(math.inf), 'not finite'), (lambda: 1e39*d, 'not finite'), (lambda: d.push(1e39), 'not finite'),
        (lambda: d.push(math.nan), 'got strength=nan, expected a finite number'), (lambda: d.push(math.inf), 'strength=inf'),
        (lambda: d.push('1'), "strength='1'"), (lambda: d.push(True), 'strength=True'), (lambda: math.nan*d, 'a factor=nan'),
        (lambda: given_direction(mamba2, draw(31), 'resid_post', 1), '31 numbers, expected 32 for blocks.1.resid_post'),
        (lambda: given_direction(mamba2, draw(16, 8), 'ssm.state', 1), '128 numbers, expected 512'),
        (lambda: given_direction(mamba2, draw(16, 8), 'ssm.state', 1, heads=[4]), 'has 4 heads'),
        (lambda: site_of(mamba2, 'resid_post'), 'got no layer for blocks.*0 to 1'), (lambda: site_of(mamba2, SITE, 0), 'got layer 0 for'),
        (lambda: site_of(mamba2, 'resid_post', 2), 'got layer 2, expected 0 to 1'), (lambda: site_of(mamba2, SITE, True), 'got layer True'),
        (lambda: site_of(mamba2, 'blocks.1.ssm.*'), 'means several'), (lambda: site_of(mamba2, 'embed', 1), 'got layer 1 for embed'),
        (lambda: mean_difference(load_model('mock://llama-tiny'), POSITIVE, NEGATIVE, 'attn.pattern', 1), 'fixed width')]
    for call, match in cases:
        with pytest.raises(ValueError, match=match): call()
    with pytest.raises(SiteError): site_of(mamba2, 'attn.z', 1)
    with pytest.raises(SiteError): replace(d, site='blocks.7.resid_post').check(mamba2)
    for call in (lambda: d + 1, lambda: d.cosine(d.vector), lambda: Direction([1.], SITE, 'm', 's'),
                 lambda: Direction(torch.ones(3, dtype=torch.long), SITE, 'm', 's'), lambda: Direction(torch.ones(3), 7, 'm', 's')):
        with pytest.raises(TypeError, match='expected'): call()


def test_errors_of_the_ways(mamba2):
    empty, metric = torch.zeros(0, dtype=torch.long), lambda logits: logits[3]
    ways = [mean_difference, pca_difference, probe_direction]
    sets, pair = (POSITIVE, NEGATIVE), [torch.ones(2, 3).long()]
    for way in ways:
        for (a, b), more, match in [
            (([], NEGATIVE), {}, 'got no prompts'), ((POSITIVE, []), {}, 'got no prompts'),
            (([*POSITIVE, empty], NEGATIVE), {}, 'empty prompt'), ((POSITIVE, POSITIVE), {}, 'length 0.*does not vary'),
            (sets, dict(at=50), 'got position 50'), (sets, dict(at=slice(9, 9)), 'chooses no position'),
            (sets, dict(heads=[0]), 'no heads'), (sets, dict(site='ssm.state', heads=9), 'has 4 heads'),
            ((pair, NEGATIVE), {}, 'got 2 prompts in the place of one'), (sets, dict(layer=None), 'got no layer')]:
            with pytest.raises(ValueError, match=match): way(mamba2, a, b, **dict(site='resid_post', layer=1) | more)
    for call, match in [
        (lambda: pca_difference(mamba2, POSITIVE, NEGATIVE[:5], 'resid_post', 1), 'got 6 and 5 prompts, expected pairs'),
        (lambda: probe_direction(mamba2, POSITIVE, NEGATIVE, 'resid_post', 1, penalty=0), 'got penalty=0, expected more than 0'),
        (lambda: probe_direction(mamba2, POSITIVE, NEGATIVE, 'resid_post', 1, penalty=math.nan), 'got penalty=nan'),
        (lambda: steepest(mamba2, [], metric, 'resid_post', 1), 'got no prompts'),
        (lambda: steepest(mamba2, [IDS], lambda logits: logits, 'resid_post', 1), 'expected a tensor without axes'),
        (lambda: steepest(mamba2, [IDS], lambda logits: 3., 'resid_post', 1), 'got 3.0 from the metric'),
        (lambda: steepest(mamba2, [IDS], metric, 'resid_post', 1, at=0), 'length 0'),     # the last block hands nothing on
        (lambda: state_difference(mamba2, [[1, 2], [3, 4]], layer=1), 'got 2 prompts, expected one'),
        (lambda: state_difference(mamba2, IDS, IDS, layer=1), 'length 0'), (lambda: state_difference(mamba2, IDS, layer=2), '0 to 1'),
        (lambda: gathered(mamba2, [], SITE), 'got no prompts')]:
        with pytest.raises(ValueError, match=match): call()
    with pytest.raises(SiteError): state_difference(load_model('mock://llama-tiny'), IDS, layer=1)
    broken = load_model('mock://mamba2-tiny')
    broken.hf.backbone.layers[0].mixer.out_proj.weight.data[0] = math.nan
    for way in ways:
        with pytest.raises((ValueError, RuntimeError), match='finite|converge'): way(broken, POSITIVE, NEGATIVE, 'resid_post', 0)


def test_errors_of_latents(mamba2):
    sae = SAE(SAEConfig(32, 40, 4, SITE, model=mamba2.name))
    other = SAE(SAEConfig(32, 40, 4, SITE, model='tiny://mamba1'))
    narrow = SAE(SAEConfig(31, 40, 4, SITE, model=mamba2.name))
    for args, match in [((sae, 40), 'got latent 40, expected 0 to 39'), ((sae, -1), 'latent -1'), ((sae, True), 'latent True'),
                        ((sae, 3., ), 'latent 3.0'), ((other, 3), 'got an SAE of tiny://mamba1'), ((narrow, 3), r'expected \(32,\)'),
                        ((sae, 3, 0), 'got layer 0'), ((sae, 3, None, [0]), r'got heads=\(0,\), expected some'),
                        ((Coder(64, SITE, 'another'), 3), 'got an SAE of another'), ((Coder(64, SITE), 3), '64 numbers, expected 32'),
                        ((Coder(64, SITE), 40), '0 to 39')]:
        with pytest.raises(ValueError, match=match): latent_direction(mamba2, *args)
    with pytest.raises(ValueError, match='got heads'): latent_direction(
        load_model('tiny://mamba2'), SAE.load('tiny://mamba2/blocks.3.ssm.write'), 3, heads=[8])
