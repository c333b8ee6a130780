"""Sparse autoencoders: coder, file, training (autograd, planted directions), metrics (numpy), and what latents do."""
import json
import struct

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

import circuitbench.folder as folder_module
import circuitbench.latent as latent_module
import circuitbench.train as train_module
from circuitbench.coder import Place
from circuitbench.edit import clamp, splice, zero
from circuitbench.latent import (
    LatentReport,
    SAEInspector,
    latent_order,
    latent_report,
    latent_table,
    latent_view,
    logit_effect,
    overview,
)
from circuitbench.load import load_model
from circuitbench.sae import SAE, Metrics, SAEConfig, hook_name
from circuitbench.site import SiteError
from circuitbench.sparse import geometric_median, unit_gradient
from circuitbench.stream import activations, shipped_text, token_rows
from circuitbench.train import evaluate, train_sae
from circuitbench.trainer import Trainer

SITE = 'blocks.1.ssm.out_proj_in'
WEIGHTS = 'sae_weights.safetensors'


@pytest.fixture
def model(mamba):
    "What is checked here against hooks and equations of a Mamba block; `test_verbs` is for the other families."
    return mamba


def top(x): return float(x.detach().abs().max())


def random_sae(d_in=12, d_sae=40, k=5, **kw):
    "An SAE with no weight left at its start."
    sae, make = SAE(SAEConfig(d_in, d_sae, k, kw.pop('site', SITE), **kw)), torch.Generator().manual_seed(1)
    for p in (sae.W_enc, sae.b_enc, sae.b_dec): p.data = torch.randn(p.shape, generator=make)
    return sae


def clean(model): return not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def short(model, **kw):
    "A training of a second."
    usual = dict(layer=1, k=8, expansion=4, tokens=6000, batch_size=128, context=64, progress=False)
    return train_sae(model, **usual | kw)


@pytest.fixture(scope='module')
def mamba2(): return load_model('mock://mamba2-tiny')


@pytest.fixture(scope='module')
def trained(mamba2): return short(mamba2)


# -- the coder -----------------------------------------------------------------------
def test_k_is_kept_exactly():
    sae, x = random_sae(), torch.randn(300, 12)
    pre = (x.double() - sae.b_dec) @ sae.W_enc.double() + sae.b_enc
    assert torch.equal((sae.encode(x) > 0).sum(-1), (pre > 0).sum(-1).clamp(max=5))
    sae.b_enc.data += 100                                                       # all positive: then k of them, ties too
    assert ((sae.encode(x) > 0).sum(-1) == 5).all()
    sae.W_enc.data.zero_(), sae.b_enc.data.fill_(1.)
    assert ((sae.encode(x) > 0).sum(-1) == 5).all()
    sae.b_enc.data.fill_(-1.)
    assert not sae.encode(x).any() and torch.equal(sae(x), sae.b_dec.expand(300, 12))


def test_long_inputs_go_in_parts_and_decoders_agree():
    sae, x = random_sae(8, 2**14, 4), torch.randn(3, 700, 8)                           # 1,024 rows at a time
    z = sae.encode(x)
    assert torch.allclose(torch.cat([sae.encode(r) for r in x]), z.flatten(0, 1).view_as(z).flatten(0, 1), atol=1e-5)
    assert z.shape == (3, 700, 2**14) and top(sae(x) - sae.decode(z)) < 1e-4
    assert top(sae.decode(z) - (z @ sae.W_dec + sae.b_dec)) < 1e-4
    dense = torch.randn(3, 2**14)
    assert torch.equal(sae.decode(dense), dense @ sae.W_dec + sae.b_dec)
    assert torch.equal(sae.decode(torch.zeros(2, 2**14)), sae.b_dec.expand(2, 8))


def test_gradients_pass_through_the_coder():
    sae = random_sae().double()
    x = torch.randn(4, 12, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(sae, x) and torch.autograd.gradcheck(lambda x: sae.decode(sae.encode(x)), x)


def test_axes_after_pos_are_one(mamba2):
    sae = random_sae(64, 96, 4, site='blocks.0.ssm.y', shape=(4, 16), model=mamba2.name)
    ids = torch.arange(12)[None]
    x = mamba2.run_with_cache(ids, sae.site)[1][sae.site]
    assert x.shape == (1, 12, 4, 16) and sae(x).shape == x.shape
    assert torch.equal(sae.encode(x), sae.encode(x.flatten(2)))
    assert sae.feature(3).direction.shape == (4, 16)
    _, spliced = mamba2.run_with_cache(ids, sae.site, edit=splice(sae.site, sae))
    assert top(spliced[sae.site] - sae(x)) < 1e-5
    _, held = mamba2.run_with_cache(ids, sae.site, edit=clamp(sae.site, sae, 3, 7.))
    want = x + (7 - sae.encode(x)[..., 3])[..., None, None]*sae.W_dec[3].view(4, 16)
    assert top(held[sae.site] - want) < 1e-5


@pytest.mark.parametrize('wrong', [dict(k=41), dict(k=0), dict(d_in=0), dict(shape=(3, 5))])
def test_configurations_that_cannot_be(wrong):
    with pytest.raises(ValueError, match='expected'): SAEConfig(**(dict(d_in=12, d_sae=40, k=5, site=SITE) | wrong))


def test_check_says_what_does_not_fit(mamba2):
    sae = random_sae(64, 96, 4, model=mamba2.name)
    assert sae.check(mamba2) == sae.check(mamba2, layer=1, site='out_proj_in') == SITE
    for call, words in (
            (lambda: sae.check(load_model('mock://mamba1-tiny')), 'mock://mamba2-tiny for mock://mamba1-tiny'),
            (lambda: sae.check(mamba2, layer=0), 'layer 0'),
            (lambda: sae.check(mamba2, site='ssm.y'), 'ssm.y'),
            (lambda: random_sae(65, 96, 4).check(mamba2), r'\(65,\).*\(64,\)'),
            (lambda: sae.feature(96), '0 to 95'),
            (lambda: sae.encode(torch.zeros(3, 63)), r'\(3, 63\)'),
            (lambda: sae.decode(torch.zeros(3, 95)), '96')):
        with pytest.raises(ValueError, match=words) as err: call()
        assert len(str(err.value).splitlines()) == 1
    with pytest.raises(SiteError, match='nearest'): random_sae(site='blocks.1.ssm.nothing').check(mamba2)


# -- the file ------------------------------------------------------------------------
def read_safetensors(path):
    "The tensors of a float32 safetensors file, by its specification."
    raw = path.read_bytes()
    n, = struct.unpack('<Q', raw[:8])
    head = json.loads(raw[8:8 + n])
    assert all(v['dtype'] == 'F32' for k, v in head.items() if k != '__metadata__')
    part = lambda a, b: np.frombuffer(raw[8 + n + a:8 + n + b], '<f4')
    return {k: part(*v['data_offsets']).reshape(v['shape']) for k, v in head.items() if k != '__metadata__'}


def saelens_topk(cfg, w, x):
    "Activations and reconstruction as SAELens' topk computes them, in float64."
    w = {k: v.astype(float) for k, v in w.items()}
    norm = np.linalg.norm(w['W_dec'], axis=1) if cfg.get('rescale_acts_by_decoder_norm') else np.ones(cfg['d_sae'])
    p = ((x - w['b_dec'] if cfg.get('apply_b_dec_to_input', True) else x) @ w['W_enc'] + w['b_enc'])*norm
    a = np.zeros_like(p)
    for row, out in zip(p, a):
        best = np.argsort(row)[-cfg['k']:]
        out[best] = np.maximum(row[best], 0)
    return a, (a/norm) @ w['W_dec'] + w['b_dec']


def test_the_file_read_by_hand_gives_the_same(trained, mamba2, tmp_path):
    folder = trained.save(tmp_path/'a'/'sae')
    assert sorted(p.name for p in folder.iterdir()) == ['cfg.json', WEIGHTS, 'sparsity.safetensors']
    cfg, w = json.loads((folder/'cfg.json').read_text()), read_safetensors(folder/WEIGHTS)
    assert set(w) == {'W_enc', 'b_enc', 'W_dec', 'b_dec'} and w['W_enc'].shape == (64, 256)
    assert w['W_dec'].shape == (256, 64)
    assert (cfg['architecture'], cfg['d_in'], cfg['d_sae'], cfg['k'], cfg['dtype']) == ('topk', 64, 256, 8, 'float32')
    assert cfg['metadata']['sae_lens_version'].split('.')[0] == '6' and cfg['metadata']['model_name'] == mamba2.name
    assert cfg['metadata']['hook_name'] == 'blocks.1.mixer.out_proj.hook_in'
    assert cfg['metadata']['circuitbench']['site'] == SITE
    x = activations(mamba2, SITE, torch.randint(257, (2, 30), generator=torch.Generator().manual_seed(3))).flatten(0, 1)
    a, y = saelens_topk(cfg, w, x.double().numpy())
    assert np.abs(trained.encode(x).numpy() - a).max() < 1e-4 and np.abs(trained(x).numpy() - y).max() < 1e-4
    sparsity = read_safetensors(folder/'sparsity.safetensors')['sparsity']
    assert sparsity.shape == (256,) and np.allclose(10.**sparsity, trained.frequency, atol=1e-6)


def test_load_gives_back_every_bit(trained, tmp_path):
    back = SAE.load(trained.save(tmp_path/'sae'))
    assert back.cfg == trained.cfg and back.metrics == trained.metrics
    assert top(back.frequency - trained.frequency) < 1e-6
    for (n, p), (m, q) in zip(trained.named_parameters(), back.named_parameters()):
        assert n == m and torch.equal(p, q) and not q.requires_grad
    again = SAE.load(back.save(tmp_path/'again'))
    for f in ('cfg.json', WEIGHTS): assert (tmp_path/'sae'/f).read_bytes() == (tmp_path/'again'/f).read_bytes()
    assert again.metrics == trained.metrics


def test_a_failed_save_leaves_the_old_file_and_nothing_else(trained, tmp_path, monkeypatch):
    folder = random_sae().save(tmp_path/'sae')
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    def fail(*args, **kw): raise KeyboardInterrupt
    monkeypatch.setattr(folder_module.json, 'dumps', fail)
    with pytest.raises(KeyboardInterrupt): trained.save(folder)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ['sae']
    trained.save(folder)                                                               # replaced as a whole
    assert SAE.load(folder).cfg == trained.cfg and [p.name for p in tmp_path.iterdir()] == ['sae']
    (folder/'notes.txt').write_text('mine')
    with pytest.raises(ValueError, match='notes.txt'): trained.save(folder)
    assert (folder/'notes.txt').read_text() == 'mine'
    with pytest.raises(ValueError, match='a file'): trained.save(folder/'notes.txt')


def rewrite(folder, change):
    "Write other weights into an SAE's folder."
    save_file(change(dict(random_sae().named_parameters())), folder/WEIGHTS)


@pytest.mark.parametrize('harm, words', [
    (lambda f: (f/'cfg.json').unlink(), 'cannot be read'),
    (lambda f: (f/'cfg.json').write_text('{"architecture": "to'), 'cannot be read'),
    (lambda f: (f/'cfg.json').write_text('[]'), 'cannot be read'),
    (lambda f: (f/'cfg.json').write_bytes(b'\xff\xfe\x00'), 'cannot be read'),
    (lambda f: (f/WEIGHTS).write_bytes(b'x'*40), 'cannot be read'),
    (lambda f: (f/WEIGHTS).write_bytes((f/WEIGHTS).read_bytes()[:-8]), 'cannot be read'),
    (lambda f: rewrite(f, lambda w: {'W_enc': w['W_enc']}), 'W_dec of shape None'),
    (lambda f: rewrite(f, lambda w: w | {'W_enc': w['W_enc'].T.contiguous()}), r'W_enc of shape \(40, 12\)'),
    (lambda f: rewrite(f, lambda w: w | {'threshold': torch.zeros(40)}), 'threshold'),
    (lambda f: rewrite(f, lambda w: {n: p*torch.nan for n, p in w.items()}), 'not finite'),
    (lambda f: change(f, architecture='jumprelu'), 'threshold of shape None'),
    (lambda f: change(f, normalize_activations='by_hand'), 'by_hand'),
    (lambda f: change(f, k=None), 'whole number k'),
    (lambda f: change(f, metadata={'circuitbench': {'metrics': {'fve': 1}}}), 'Metrics|metrics'),
    (lambda f: change(f, k=50), 'k=50'),
    (lambda f: change(f, metadata={'circuitbench': {'site': 3}}), 'site 3'),
    (lambda f: (f/'sparsity.safetensors').write_bytes(b'junk'), 'cannot be read')])
def test_damaged_files_say_so(tmp_path, harm, words):
    folder = random_sae().save(tmp_path/'sae')
    harm(folder)
    with pytest.raises(ValueError, match=words) as err: SAE.load(folder)
    assert len(str(err.value).splitlines()) == 1


def change(folder, **keys):
    cfg = json.loads((folder/'cfg.json').read_text())
    (folder/'cfg.json').write_text(json.dumps(cfg | keys))


@pytest.mark.parametrize('keys', [
    dict(rescale_acts_by_decoder_norm=True), dict(apply_b_dec_to_input=False),
    dict(rescale_acts_by_decoder_norm=True, apply_b_dec_to_input=False)])
def test_variants_of_other_writers_are_folded(tmp_path, keys):
    sae = random_sae()
    sae.W_dec.data *= torch.rand(40, 1) + .5
    folder = sae.save(tmp_path/'sae')
    change(folder, **keys, metadata={'sae_lens_version': '6.0.0', 'hook_name': 'blocks.1.hook_out'})
    back, x = SAE.load(folder), torch.randn(50, 12)
    cfg = json.loads((folder/'cfg.json').read_text())
    a, y = saelens_topk(cfg, read_safetensors(folder/WEIGHTS), x.double().numpy())
    assert np.abs(back.encode(x).numpy() - a).max() < 1e-4 and np.abs(back(x).numpy() - y).max() < 1e-4
    assert back.site == 'blocks.1.resid_post' and back.cfg.model == '' and back.metrics is None


@pytest.mark.parametrize('site, want', [
    ('blocks.3.resid_post', 'blocks.3.hook_out'), ('blocks.3.mixer_out', 'blocks.3.mixer.hook_out'), ('embed', 'embed'),
    ('blocks.3.ssm.state', 'blocks.3.mixer.hook_ssm_state'), ('blocks.3.ssm.y', 'blocks.3.ssm.y')])
def test_hook_names_are_the_bridges(site, want): assert hook_name(site) == want


# -- training ------------------------------------------------------------------------
def test_decoder_rows_keep_norm_one_and_their_gradient_is_orthogonal(trained):
    assert top(trained.W_dec.norm(dim=1) - 1) < 1e-5
    rows, grad = F.normalize(torch.randn(20, 9), dim=1), torch.randn(20, 9)
    flat = unit_gradient(grad.clone(), rows)
    assert top((flat*rows).sum(1)) < 1e-6 and top(flat + (grad*rows).sum(1, keepdim=True)*rows - grad) < 1e-6


def planted(n, d=32, m=48, active=3, seed=7):
    "Data (n, d) made of m known directions, `active` at a time, and the directions."
    make = torch.Generator().manual_seed(seed)
    rows = F.normalize(torch.randn(m, d, generator=make), dim=1)
    which, size = torch.rand(n, m, generator=make).topk(active).indices, 1 + torch.rand(n, active, generator=make)
    z = torch.zeros(n, m).scatter(1, which, size)
    return z @ rows + .5 + .01*torch.randn(n, d, generator=make), rows


def found(directions, rows): return float((rows @ directions.T).max(1).values.mean())


def fit(x, t, batch=256):
    for part in x.split(batch): figures = t.step(part)
    return figures


def test_planted_directions_are_found_and_random_ones_fail():
    x, rows = planted(120_000)
    t = Trainer(SAEConfig(32, 64, 3, SITE), x[:4096], 469, dead_after=5000)
    start = found(t.w['D'], rows)
    figures = fit(x, t)
    assert found(t.w['D'], rows) > .97 and float(figures['loss']) < .05
    assert start < .6
    assert found(F.normalize(torch.randn(64, 32, generator=torch.Generator().manual_seed(9)), dim=1), rows) < .6


def test_geometric_median_stands_outliers():
    x = torch.cat([torch.randn(200, 3), torch.full((40, 3), 1e4)])
    assert geometric_median(x).norm() < 1 < x.mean(0).norm()
    assert top(geometric_median(torch.ones(5, 3)) - 1) < 1e-6                          # all points in one place


def test_the_call_that_everyone_makes_first(model):
    model = load_model(model.name, hook_point='out_proj_in')
    sae = train_sae(model, layer=1, k=32, expansion=8, tokens=2048, batch_size=64)
    assert (sae.d_sae, sae.k, sae.site, sae.layer) == (8*model.sizes['d_inner'], 32, SITE, 1)
    assert sae.cfg.family == model.adapter.family
    m = sae.metrics
    assert m.trained == 2048 and m.tokens >= 1024 and 0 < m.l0 <= 32 and 0 <= m.dead < 1 and m.fve > 0
    assert 'clean' in repr(m)
    assert clean(model) and not any(p.requires_grad for p in sae.parameters())


def test_training_explains_the_activations_and_repeats_itself(trained, mamba2):
    start = evaluate(mamba2, SAE(trained.cfg), tokens=1024, context=64)
    assert trained.metrics.fve > .45 > start.fve and trained.metrics.l0 <= 8
    again = short(mamba2)
    assert all(torch.equal(p, q) for p, q in zip(trained.parameters(), again.parameters()))
    assert not torch.equal(short(mamba2, seed=1).W_dec, trained.W_dec)


@pytest.mark.parametrize('site', [
    'blocks.0.ssm.y', 'blocks.1.resid_post', 'blocks.0.ssm.conv', 'embed', 'blocks.0.ssm.state', 'H3'])
def test_other_sites(model, site, capsys):
    sae = short(model, layer=0 if site == 'H3' else None, site=site, k=4, expansion=1, tokens=256, batch_size=64,
                context=32, text='In the beginning. '*40)
    shape = model.site_shape(sae.site, 1, 1)[2:]
    assert sae.cfg.shape == shape and sae.check(model) and torch.isfinite(torch.tensor(sae.metrics.loss_spliced))
    assert capsys.readouterr().err == ''                                               # progress=False is quiet


def test_half_precision_models(mamba2):
    half = load_model('mock://mamba2-tiny', dtype=torch.bfloat16)
    sae = short(half, tokens=2000)
    assert sae.W_dec.dtype == torch.float32 and sae.metrics.fve > .2
    spliced = half.run_with_cache([1, 2, 3], SITE, edit=splice(SITE, sae))[1][SITE]
    assert spliced.dtype == torch.bfloat16 and spliced.isfinite().all()
    assert sae.report(half, tokens=500).frequency.sum() > 0


def test_numbers_text_and_sites_that_cannot_be(mamba2):
    for kw, words in (
            (dict(k=2000), 'd_sae, which is 256'), (dict(k=0), 'k=0'), (dict(tokens=0), 'tokens=0'),
            (dict(tokens=-5), 'tokens=-5'), (dict(layer=2), '0 to 1'), (dict(layer=-1), '0 to 1'),
            (dict(layer=None), 'layer=0 to 1'), (dict(text=''), '0 tokens'), (dict(text=[]), '0 tokens'),
            (dict(batch_size=0), 'batch_size=0'), (dict(lr=float('nan')), 'lr=nan'), (dict(expansion=0), 'expansion=0'),
            (dict(layer=0, site=SITE), '0 sites'), (dict(aux=-1), 'aux=-1'), (dict(context=1), 'context=1'),
            (dict(text=torch.tensor([1, 999])), '999')):
        with pytest.raises(ValueError, match=words): short(mamba2, **kw)
    with pytest.raises(SiteError, match='nearest'): train_sae(mamba2, layer=1, site='ssm.nothing')
    with pytest.raises(TypeError, match='int among the lines'): train_sae(mamba2, layer=1, text=['a', 3])
    assert clean(mamba2)


def test_a_short_text_is_read_again_and_says_so(mamba2):
    sae = train_sae(mamba2, layer=1, k=4, expansion=2, tokens=500, batch_size=50, text='Hello there', progress=False)
    assert sae.metrics.trained == 500 and 'too short' in sae.metrics.note and 'too short' in repr(sae.metrics)
    assert sae.cfg.context == 11
    lines = short(mamba2, tokens=500, batch_size=50, context=16, text=(f'line {i}' for i in range(99)))
    assert lines.metrics.note == '' and lines.metrics.trained == 500


def test_ctrl_c_keeps_what_was_learned(mamba2, monkeypatch):
    real, steps = Trainer.step, []
    def step(self, x, y=None):
        if len(steps) == 5: raise KeyboardInterrupt
        steps.append(1)
        return real(self, x, y)
    monkeypatch.setattr(Trainer, 'step', step)
    sae = train_sae(mamba2, layer=1, k=4, expansion=2, tokens=1000, batch_size=50, context=32, progress=False)
    assert sae.metrics.trained == 250 and sae.metrics.note == 'stopped after 250 of 1,000 tokens'
    assert sae.metrics.fve == sae.metrics.fve
    def never(*args): raise KeyboardInterrupt
    monkeypatch.undo()
    monkeypatch.setattr(train_module, 'evaluate', never)                               # a second one, while measuring
    assert short(mamba2, tokens=300).metrics is None and 'explained' not in repr(short(mamba2, tokens=300))
    monkeypatch.setattr(train_module, 'heard', never)
    with pytest.raises(KeyboardInterrupt): train_sae(mamba2, layer=1, tokens=600, progress=False)
    assert clean(mamba2)


def test_the_pool_holds_each_token_once(mamba2):
    rows = token_rows(mamba2, torch.randint(257, (4000,), generator=torch.Generator().manual_seed(0)), 32)
    cfg = SAEConfig(64, 128, 4, SITE)
    batches = lambda rows, tokens: [b[SITE] for b in train_module._stream(mamba2, cfg, rows, 64, tokens, 0)]
    got = torch.cat(batches(rows, rows.numel()))
    want = activations(mamba2, SITE, rows).flatten(0, 1)
    assert got.shape == want.shape and not torch.equal(got, want)
    assert torch.allclose(got.sort(0).values, want.sort(0).values, atol=1e-4)
    sizes = [len(b) for b in batches(rows[:3], 300)]
    assert sum(sizes) == 300 and max(sizes) == 64


# -- metrics -------------------------------------------------------------------------
def test_metrics_equal_numpy_and_replacement_by_hand(trained, mamba2):
    rows = token_rows(mamba2, torch.randint(257, (640,), generator=torch.Generator().manual_seed(5)), 64)
    m = evaluate(mamba2, trained, rows, context=64)
    x = activations(mamba2, SITE, rows).flatten(0, 1)
    y, z, x64 = trained(x).double().numpy(), trained.encode(x).numpy(), x.double().numpy()
    assert abs(m.fve - (1 - ((x64 - y)**2).sum()/((x64 - x64.mean(0))**2).sum())) < 1e-6
    assert m.l0 == pytest.approx((z > 0).sum(1).mean()) and m.dead == pytest.approx((~(z > 0).any(0)).mean())
    assert m.tokens == 640
    assert np.allclose(trained.frequency, (z > 0).mean(0))
    def loss(replace):
        "The loss with the output projection's input replaced by hand."
        handle = mamba2.blocks[1].mixer.out_proj.register_forward_pre_hook(lambda module, args: (replace(args[0]),))
        try: logits = mamba2.hf(rows.long(), use_cache=False).logits.double().numpy()
        finally: handle.remove()
        logits = logits[:, :-1] - logits.max(-1, keepdims=True)[:, :-1]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        return -np.take_along_axis(logp, rows[:, 1:, None].long().numpy(), -1).mean()
    assert abs(m.loss_clean - loss(lambda x: x)) < 1e-4 and abs(m.loss_zero - loss(torch.zeros_like)) < 1e-4
    assert abs(m.loss_spliced - loss(lambda x: trained.decode(trained.encode(x)))) < 1e-4
    assert clean(mamba2)


def test_a_perfect_and_an_empty_coder():
    full = Metrics(1, 3, 0, loss_clean=2., loss_spliced=2., loss_zero=4., tokens=10)
    assert full.recovered == 1 and Metrics(0, 0, 1, 2., 4., 4., 10).recovered == 0
    harmless = Metrics(.5, 3, 0, 2., 2.01, 2.005, 10)
    assert harmless.recovered is None and 'not defined' in repr(harmless) and 'zeroed 2.0050' in repr(harmless)


# -- what latents do -----------------------------------------------------------------
@pytest.fixture(scope='module')
def report(trained, mamba2): return latent_report(mamba2, trained, tokens=2000, contexts=4, window=16, context=50)


def test_the_report_equals_counting_over_everything(trained, mamba2, report):
    rows = token_rows(mamba2, shipped_text('held'), 50, 2000)
    z = trained.encode(activations(mamba2, SITE, rows))
    fired = (z > 0).float()
    assert report.tokens == 2000 and torch.allclose(report.frequency, fired.mean((0, 1)))
    assert torch.allclose(report.mean, z.sum((0, 1))/fired.sum((0, 1)).clamp(min=1), atol=1e-5)
    assert torch.allclose(report.peak, z.amax(1).topk(4, 0).values.T, atol=1e-6)
    for j in range(0, 256, 25):
        counts = np.histogram(z[..., j][z[..., j] > 0], np.arange(33)*float(report.width[j]))[0]
        assert counts.tolist() == report.counts[j].tolist()
        for c in range(4):                                     # each window is a piece of a row, with these activations
            at = (rows.unfold(1, 16, 1) == report.ids[j, c]).all(-1).nonzero()
            assert len(at)
            assert any(torch.allclose(z[r, s:s + 16, j], report.acts[j, c], atol=1e-6) for r, s in at.tolist())
            assert float(report.acts[j, c].max()) == pytest.approx(float(report.peak[j, c]), abs=1e-6)


def test_parts_do_not_matter(trained, mamba2, report, monkeypatch):
    monkeypatch.setattr(latent_module, '_CELLS', 3*50*256)                             # 3 rows at a time
    parts = latent_report(mamba2, trained, tokens=2000, contexts=4, window=16, context=50)
    assert torch.allclose(parts.peak, report.peak, atol=1e-5) and torch.allclose(parts.mean, report.mean, atol=1e-5)
    assert torch.equal(parts.counts, report.counts) and torch.equal(parts.frequency, report.frequency)
    assert torch.equal(parts.up.index, report.up.index)


def test_logit_effect_is_the_derivative_where_the_norm_stands_still(model):
    "A step across the final stream leaves its length alone to first order: the logits move by the effect over it."
    ids, short = torch.arange(1, 9)[None], 'ssm.out_proj_in'
    final = model.run_with_cache(ids, 'blocks.1.resid_post')[1]['blocks.1.resid_post'][0, -1].double()
    out = model.blocks[1].mixer.out_proj.weight.double()
    d = torch.randn(out.shape[1], dtype=torch.double, generator=torch.Generator().manual_seed(0))
    toward = final @ out
    d -= (d @ toward)/(toward @ toward)*toward                                       # out d is orthogonal to the stream
    effect = logit_effect(model, f'blocks.1.{short}', d[None].float())[0].double()
    norm = [m for m in model.hf.backbone.children() if hasattr(m, 'variance_epsilon')][0]
    head = model.hf.lm_head.weight.double()
    logits = lambda x: head @ (norm.weight.double()*x/(x.square().mean() + norm.variance_epsilon).sqrt())
    step = (logits(final + 1e-5*(out @ d)) - logits(final - 1e-5*(out @ d)))/2e-5
    want = (step - step.mean())*(final.square().mean() + norm.variance_epsilon).sqrt()
    assert top(effect - want) < 1e-4*top(want)
    assert logit_effect(model, 'blocks.0.ssm.y', torch.zeros(1, model.sizes['d_inner'])) is None
    assert logit_effect(model, 'blocks.0.mixer_in', torch.zeros(1, model.sizes['d_model'])) is None


def test_latents_are_ordered_and_searched(report):
    by = latent_order(report)
    alive = report.frequency[report.frequency > 0]
    assert torch.equal(report.frequency[by], alive.sort(descending=True).values)
    assert latent_order(report, 'rarest')[0] in [j for j in by if report.frequency[j] == report.frequency[by[-1]]]
    assert report.peak[latent_order(report, 'strongest')[0], 0] == report.peak.max()
    assert latent_order(report, 'number') == sorted(by)
    hits = latent_order(report, search='Q')
    assert hits
    raised = lambda j: [report.strings[i] for i in report.up.index[j].tolist()]
    assert all('q' in ''.join(report.words(j) + raised(j)).lower() for j in hits)
    assert latent_order(report, search='no such token') == []
    with pytest.raises(ValueError, match='most frequent'): latent_order(report, 'loudest')


def test_views_say_what_the_report_holds(report, trained, mamba2):
    j = latent_order(report)[0]
    html = latent_view(report, j, contexts=2)
    assert f'Latent {j} of {SITE}' in html and html.count('class="tk"') == 2 and html.count('class=mk') == 2
    assert 'Tokens that it raises' in html
    assert '2,000 tokens' in html and 'http' not in html and str(j) in latent_table(report, [j])
    assert 'never fire' in overview(report)
    for wrong in (-1, 256):
        with pytest.raises(ValueError, match='0 to 255'): latent_view(report, wrong)
    other = random_sae(64, 80, 3, site='blocks.0.ssm.y', shape=(4, 16), model=mamba2.name)
    other.b_enc.data[:5] = -1e6
    there = latent_report(mamba2, other, 'Let there be light. '*20, tokens=200)
    assert there.up is None and 'not linear' in latent_view(there, latent_order(there)[0])
    assert 'fires on none' in latent_view(there, 2)
    assert there.dead >= 5/80 and isinstance(there, LatentReport)


def test_the_inspector_follows_search_and_order(report):
    shown = SAEInspector(report)
    assert shown.values['latent'] == latent_order(report)[0]
    shown.set(sort='strongest')
    kept = shown.values['latent']
    assert kept in latent_order(report, 'strongest')[:200]
    shown.set(search='no such token')
    assert 'No latent matches' in shown.html
    shown.set(search='')
    assert 'Where it is highest' in shown.html
    shown.set(latent=latent_order(report, 'strongest')[3], contexts=1)
    assert shown.html.count('class="tk"') == 1


def test_an_sae_of_another_model_is_refused_everywhere(trained):
    other = load_model('mock://mamba1-tiny')
    for call in (lambda: latent_report(other, trained), lambda: evaluate(other, trained),
                 lambda: trained.inspect(other)):
        with pytest.raises(ValueError, match='mock://mamba2-tiny for mock://mamba1-tiny'): call()


def test_zero_edit_and_splice_of_zero_agree(mamba2):
    "A coder whose latents never fire and whose bias is 0 puts zeros in the activation's place."
    sae, ids = random_sae(64, 96, 4, model=mamba2.name), torch.arange(1, 20)[None]
    sae.b_enc.data.fill_(-1e9), sae.b_dec.data.zero_()
    assert torch.equal(mamba2.run(ids, edit=splice(SITE, sae)).logits, mamba2.run(ids, edit=zero(SITE)).logits)


@pytest.mark.parametrize('kind', [dict(), dict(writes=(Place('embed', (5,)),)), dict(shape=(4, 3), rank1=True, normalize='constant_norm_rescale')])
def test_a_topk_coder_with_one_threshold_is_jumprelu(kind, tmp_path):
    sae, g = SAE(SAEConfig(**(dict(d_in=12, d_sae=40, k=3, site='embed') | kind)), 1), torch.Generator().manual_seed(0)
    for p in sae.parameters(): p.data += .1*torch.randn(p.shape, generator=g)
    x = 5*torch.randn(3000, 12, generator=g)
    jump = sae.with_threshold(x)
    z = jump.encode(x)
    assert jump.cfg.activation == 'jumprelu' and (z > 0).sum() == 3*3000 and jump.threshold.unique().numel() == 1
    scaled = x/x.norm(dim=1, keepdim=True)*12**.5 if 'normalize' in kind else x
    pre = ((scaled if 'writes' in kind else scaled - sae.b_dec) @ sae.W_enc + sae.b_enc).double().numpy()
    least = np.sort(pre.ravel())[::-1][3*3000 - 1]
    assert np.allclose(z.numpy(), pre*(pre >= least), atol=1e-4)
    back = SAE.load(jump.save(tmp_path/'sae'))
    assert torch.equal(back.encode(x), z)
    if 'writes' in kind: assert json.loads((tmp_path/'sae'/'cfg.json').read_text())['architecture'] == 'jumprelu_transcoder'
    with pytest.raises(ValueError, match='got a jumprelu coder, expected a topk one'): jump.with_threshold(x)
