"""SAELens' format: folders that sae-lens wrote give what it recorded, folders that we write are read by plain torch."""
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from circuitbench.activation import ACTIVATIONS
from circuitbench.coder import Metrics, Place, SAEConfig
from circuitbench.folder import architecture, hook_name, read_folder, site_name, write_folder
from circuitbench.sae import SAE

HERE = Path(__file__).parent/'data'/'saelens'                            # bench/saelens_roundtrip.py --fixtures writes it
FIXTURES = sorted(p.name for p in HERE.iterdir() if p.is_dir())
WEIGHTS = 'sae_weights.safetensors'


def top(a, b): return float((a.double() - b.double()).detach().abs().max())


def changed(folder, to, weights=None, **keys):
    "A copy of a folder with other keys in cfg.json (None takes one away) and other tensors."
    shutil.copytree(folder, to)
    cfg = json.loads((to/'cfg.json').read_text()) | keys
    (to/'cfg.json').write_text(json.dumps({k: v for k, v in cfg.items() if v is not None}))
    if weights: save_file(weights(load_file(to/WEIGHTS)), to/WEIGHTS)
    return to


# -- what sae-lens wrote -------------------------------------------------------------
def test_the_fixtures_are_all_there():
    assert len(FIXTURES) == 25 and {'topk', 'jumprelu', 'gated', 'standard', 'checkpoint-batchtopk'} < {*FIXTURES}


@pytest.mark.parametrize('name', FIXTURES)
def test_what_sae_lens_wrote_gives_what_it_computed(name):
    sae, said = SAE.load(HERE/name), load_file(HERE/name/'truth.safetensors')
    assert sae.b_dec.dtype == torch.float32                              # half precision too
    a, y = sae.encode(said['x']), sae(said['x'])
    assert said['a'].any() and said['y'].any()
    assert torch.equal(a > 0, said['a'] > 0)
    for ours, theirs in ((a, said['a']), (y, said['y'])): assert top(ours, theirs) < 1e-6*max(1., top(theirs, 0*theirs))


def test_what_its_metadata_say_is_kept():
    sae = SAE.load(HERE/'topk')
    assert (sae.site, sae.cfg.model, sae.cfg.context, sae.k) == ('blocks.1.resid_post', 'org/model', 64, 3)
    assert SAE.load(HERE/'old-topk').cfg == sae.cfg and SAE.load(HERE/'checkpoint-batchtopk').k == 3
    assert SAE.load(HERE/'standard-hook_z').site == 'blocks.1.attn.z'
    trans = SAE.load(HERE/'transcoder')
    assert trans.cfg.writes == (Place('blocks.1.mlp_out', (5,)),) and not trans.cfg.skip
    assert SAE.load(HERE/'checkpoint-topk').frequency.shape == (12,)


@pytest.mark.parametrize('hook, site', [
    ('blocks.3.hook_out', 'blocks.3.resid_post'), ('blocks.3.hook_resid_pre', 'blocks.3.resid_pre'),
    ('blocks.3.mixer.hook_ssm_state', 'blocks.3.ssm.state'), ('blocks.3.attn.hook_z', 'blocks.3.attn.z'),
    ('backbone.layers.3', 'blocks.3.resid_post'), ('model.layers.12.mlp', 'blocks.12.mlp_out'),
    ('hook_embed', 'embed'), ('transformer.h.3', 'transformer.h.3'), (None, '')])
def test_sites_of_hooks(hook, site): assert site_name(hook) == site


def test_an_sae_of_an_unknown_place_is_read_and_saved_again(tmp_path):
    meta = {'sae_lens_version': '6.54.12', 'hook_name': 'transformer.h.3', 'hook_head_index': 2}
    sae = SAE.load(changed(HERE/'topk', tmp_path/'a', metadata=meta))
    assert sae.site == 'transformer.h.3' and sae.layer is None and sae.cfg.heads == (2,)
    assert SAE.load(sae.save(tmp_path/'b')).cfg == sae.cfg
    assert json.loads((tmp_path/'b'/'cfg.json').read_text())['metadata']['hook_head_index'] == 2


# -- other shapes of the same file ---------------------------------------------------
def same_as(name, folder):
    said, sae = load_file(HERE/name/'truth.safetensors'), SAE.load(folder)
    return top(sae.encode(said['x']), said['a']) < 1e-6 and top(sae(said['x']), said['y']) < 1e-6


def test_thresholds_of_other_writers(tmp_path):
    logs = lambda w: {n: p for n, p in w.items() if n != 'threshold'} | {'log_threshold': w['threshold'].log()}
    assert same_as('jumprelu', changed(HERE/'jumprelu', tmp_path/'log', logs))
    one = lambda w: w | {'threshold': torch.tensor(.05)}
    all12 = lambda w: w | {'threshold': torch.full((12,), .05)}
    a, b = (SAE.load(changed(HERE/'jumprelu', tmp_path/n, f)) for n, f in (('one', one), ('all', all12)))
    assert torch.equal(a.threshold, b.threshold) and a.threshold.shape == (12,)


@pytest.mark.parametrize('dtype', ['float32', 'torch.float32', None])
def test_names_of_dtypes(tmp_path, dtype): assert same_as('topk', changed(HERE/'topk', tmp_path/'a', dtype=dtype))


def test_tensors_take_the_dtype_that_the_file_names(tmp_path):
    mixed = lambda w: {n: p if n == 'b_dec' else p.bfloat16() for n, p in w.items()}
    sae = SAE.load(changed(HERE/'jumprelu', tmp_path/'a', mixed, dtype='torch.bfloat16'))
    assert {p.dtype for p in sae.parameters()} == {torch.float32}
    assert torch.equal(sae.W_dec, load_file(HERE/'jumprelu'/'sae_weights.safetensors')['W_dec'].bfloat16().float())
    assert SAE.load(changed(HERE/'topk', tmp_path/'b', dtype='float64')).b_dec.dtype == torch.float64
    folded = SAE.load(changed(HERE/'topk-norms', tmp_path/'c', dtype='bfloat16'))      # not rounded a second time
    assert folded.b_dec.dtype == torch.float32 and top(folded.W_dec.norm(dim=1), torch.ones(12)) < 1e-6
    back = SAE.load(sae.save(tmp_path/'d'))
    assert all(torch.equal(p, q) and p.dtype == q.dtype for p, q in zip(sae.parameters(), back.parameters()))


@pytest.mark.parametrize('version', ['5.11.0', None])
def test_a_missing_architecture_is_standard_before_version_6_alone(tmp_path, version):
    meta = {'sae_lens_version': version, 'hook_name': 'blocks.1.hook_out'}
    assert same_as('standard', changed(HERE/'standard', tmp_path/'a', architecture=None, metadata=meta))
    with pytest.raises(ValueError, match='no architecture'):
        SAE.load(changed(HERE/'standard', tmp_path/'b', architecture=None))


@pytest.mark.parametrize('name, keys, words', [
    ('topk', dict(architecture='abstopk'), "'abstopk', whose latents may be negative"),
    ('topk', dict(architecture='temporal'), "'temporal'.*not supported"),
    ('topk', dict(architecture='matching_pursuit'), "'matching_pursuit'.*not supported"),
    ('topk', dict(architecture='novel'), "'novel', which is not known"),
    ('topk', dict(k=13), 'k=13'), ('topk', dict(k=3.), 'whole number k'), ('topk', dict(k=None), 'whole number k'),
    ('topk', dict(d_in=True), 'whole number d_in'), ('topk', dict(d_sae=None), 'whole number d_sae'),
    ('topk', dict(d_in=5), 'of shape'), ('topk', dict(dtype='fp32'), "'fp32', expected one of"),
    ('topk', dict(normalize_activations='covariance_whitening'), 'without activation_whitening'),
    ('topk', dict(normalize_activations='sphere'), "'sphere'"), ('topk', dict(reshape_activations='spiral'), "'spiral'"),
    ('topk', dict(metadata=['a']), 'cannot be read'), ('topk', dict(metadata={'circuitbench': 3, 'sae_lens_version': '6.0'}), 'is wrong'),
    ('old-standard', dict(activation_fn='tanh-relu'), "'tanh-relu'"),
    ('transcoder', dict(apply_b_dec_to_input=True), 'in a transcoder'),
    ('jumprelu', dict(architecture='standard'), 'threshold of shape'), ('standard', dict(architecture='gated'), 'of shape None'),
    ('checkpoint-topk', dict(d_sae=11), r'sparsity.safetensors of shape \(12,\)')])
def test_what_cannot_be_read_says_so_in_a_line(tmp_path, name, keys, words):
    with pytest.raises(ValueError, match=words) as err: SAE.load(changed(HERE/name, tmp_path/'a', **keys))
    assert len(str(err.value).splitlines()) == 1


def test_scaling_factors_and_pickles_are_refused(tmp_path):
    two = changed(HERE/'topk', tmp_path/'a', lambda w: w | {'scaling_factor': torch.full((12,), 2.)})
    with pytest.raises(ValueError, match='scaling_factor'): SAE.load(two)
    (two/WEIGHTS).rename(two/'sae_weights.pt')
    with pytest.raises(ValueError, match='sae_weights.pt is a pickle'): SAE.load(two)


# -- what we write -------------------------------------------------------------------
def plain(folder, x):
    "Activations and outputs of a folder in float64, by the arithmetic of the architecture that its cfg.json names."
    cfg = json.loads((folder/'cfg.json').read_text())
    w = {n: p.double() for n, p in load_file(folder/WEIGHTS).items()}
    x, arch, how = x.double(), cfg['architecture'], cfg['normalize_activations']
    z, undo = x, lambda y: y
    if how == 'layer_norm':
        mean, std = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        z, undo = (x - mean)/(std + 1e-5), lambda y: y*std + mean
    if how == 'constant_norm_rescale':
        size = cfg['d_in']**.5/x.pow(2).sum(1, keepdim=True).sqrt()
        z, undo = x*size, lambda y: y/size
    if cfg['apply_b_dec_to_input']: z = z - w['b_dec']
    if arch == 'gated':
        a = (z @ w['W_enc'] + w['b_gate'] > 0)*torch.clamp(z @ (w['W_enc']*w['r_mag'].exp()) + w['b_mag'], min=0)
    else:
        p = z @ w['W_enc'] + w['b_enc']
        a = torch.clamp(p, min=0)
        if arch == 'topk': a[p < p.sort(1, descending=True).values[:, cfg['k'] - 1:cfg['k']]] = 0
        if 'jumprelu' in arch: a[p <= w['threshold']] = 0
    y = a @ w['W_dec'] + w['b_dec']
    if 'transcoder' in arch: return a, y + (x @ w['W_skip'].T if 'skip' in arch else 0)
    return a, undo(y)


def random_sae(**keys):
    "An SAE with no weight left at its start, for 6 numbers at a site."
    sae = SAE(SAEConfig(**(dict(d_in=6, d_sae=20, k=3, site='blocks.1.ssm.y', model='org/model') | keys)))
    make = torch.Generator().manual_seed(5)
    for name, p in sorted(sae.named_parameters()):
        p.copy_(torch.randn(p.shape, generator=make)*.4)
        if name == 'threshold': p.abs_()
    return sae


TABLE = {f'{a} {n}': dict(activation=a, normalize=n) for a in ACTIVATIONS for n in ('none', 'layer_norm', 'constant_norm_rescale')}
OUT = (Place('blocks.1.mlp_out', (4,)),)
TABLE |= {f'{a} transcoder{" skip"*s} {n}': dict(activation=a, writes=OUT, skip=s, normalize=n)
          for a in ('batchtopk', 'jumprelu', 'relu') for s in (False, True) for n in ('none', 'layer_norm')}
TABLE |= {'crosscoder': dict(shape=(4,), beside=(Place('blocks.2.ssm.y', (2,)),)), 'heads': dict(shape=(2, 3), heads=(0, 1))}
TABLE |= {f'rank-1 {a}': dict(shape=(2, 3), heads=(1,), rank1=True, activation=a) for a in ('topk', 'batchtopk', 'relu')}


@pytest.mark.parametrize('keys', TABLE.values(), ids=TABLE)
def test_what_we_write_gives_the_same_by_the_formats_own_arithmetic(tmp_path, keys):
    sae = random_sae(**keys).flat().double()
    folder, x = sae.save(tmp_path/'sae'), torch.randn(50, 6, dtype=torch.double, generator=torch.Generator().manual_seed(2))
    a, y = plain(folder, x)
    assert a.any() and top(sae.encode(x), a) < 1e-12 and top(sae(x).flatten(1), y) < 1e-12
    cfg = json.loads((folder/'cfg.json').read_text())
    known = {'standard', 'topk', 'jumprelu', 'gated', 'transcoder', 'skip_transcoder', 'jumprelu_transcoder', 'jumprelu_skip_transcoder'}
    assert cfg['architecture'] in known and cfg['dtype'] == 'float64'
    assert {n: tuple(p.shape) for n, p in load_file(folder/WEIGHTS).items()} == wanted_shapes(cfg)
    assert cfg['metadata']['sae_lens_version'].startswith('6.') and cfg['apply_b_dec_to_input'] is ('transcoder' not in cfg['architecture'])
    back = SAE.load(folder)
    assert back.cfg == sae.cfg and all(torch.equal(p, getattr(back, n)) for n, p in sae.named_parameters())


def wanted_shapes(cfg):
    "The tensors that sae-lens asks for, no more and no fewer."
    d_in, d_sae, arch = cfg['d_in'], cfg['d_sae'], cfg['architecture']
    d_out = cfg.get('d_out', d_in)
    shapes = {'W_enc': (d_in, d_sae), 'W_dec': (d_sae, d_out), 'b_dec': (d_out,)}
    if arch == 'gated': return shapes | dict.fromkeys(('b_gate', 'b_mag', 'r_mag'), (d_sae,))
    shapes['b_enc'] = (d_sae,)
    if 'jumprelu' in arch: shapes['threshold'] = (d_sae,)
    if 'skip' in arch: shapes['W_skip'] = (d_out, d_in)
    return shapes


def test_a_latent_at_its_threshold_is_silent():
    sae = random_sae(activation='jumprelu')
    sae.W_enc.copy_(torch.eye(6, 20)), sae.b_enc.zero_(), sae.b_dec.zero_(), sae.threshold.fill_(.5)
    sae.threshold[1] = -1.
    x = torch.tensor([[.5, -.5, .5000001, 0., 0., 0.]])
    assert sae.encode(x)[0, :3].tolist() == [0., 0., x[0, 2].item()]


def test_ours_alone_are_named_so_that_sae_lens_refuses_them(tmp_path):
    for keys in (dict(shape=(2, 3), rank1=True), dict(writes=OUT), dict(writes=OUT, activation='gated')):
        folder = random_sae(**keys).save(tmp_path/'sae')
        assert json.loads((folder/'cfg.json').read_text())['architecture'] in ('rank1_topk', 'topk_transcoder', 'gated_transcoder')
        assert SAE.load(folder).cfg == random_sae(**keys).cfg
    with pytest.raises(ValueError, match='expected one of'): architecture('topk', False, True)


def test_metrics_and_frequencies_come_back(tmp_path):
    sae = random_sae()
    sae.metrics, sae.frequency = Metrics(.9, 3, .1, 2., 2.1, 3., 4096, 9000), torch.rand(20)
    folder = sae.save(tmp_path/'sae')
    sparsity = load_file(folder/'sparsity.safetensors')['sparsity']
    assert top(sparsity, (sae.frequency + 1e-10).log10()) < 1e-6 and sparsity.dtype == torch.float32
    assert json.loads((folder/'cfg.json').read_text())['metadata']['l0'] == 3
    back = SAE.load(folder)
    assert back.metrics == sae.metrics and top(back.frequency, sae.frequency) < 1e-6


def test_hook_names_are_there_and_back():
    for site in ('resid_pre', 'resid_post', 'mixer_in', 'mixer_out', 'ssm.state', 'ssm.out_proj_in', 'ssm.write', 'attn.z', 'mlp_out', 'ssm.B'):
        assert site_name(hook_name(f'blocks.7.{site}')) == f'blocks.7.{site}'


# -- a folder is written whole or not at all -----------------------------------------
def test_a_disk_that_takes_no_more_leaves_the_old_folder(tmp_path):
    folder = random_sae().save(tmp_path/'sae')
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    sae, limit = SAE.load(folder), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limit[1]))
    try:
        with pytest.raises(OSError, match='does not take.*nothing was changed'): sae.save(folder)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before and [p.name for p in tmp_path.iterdir()] == ['sae']


def test_folders_of_something_else_are_not_replaced(tmp_path):
    folder = random_sae().save(tmp_path/'sae')
    (folder/'notes.txt').write_text('mine')
    with pytest.raises(ValueError, match='notes.txt'): random_sae().save(folder)
    with pytest.raises(ValueError, match='a file'): random_sae().save(folder/'notes.txt')
    (folder/'notes.txt').unlink(), (folder/'README.md').write_text('a card')
    random_sae(k=2).save(folder)
    assert (folder/'README.md').read_text() == 'a card' and SAE.load(folder).k == 2
    write_folder(folder, {'d_in': 1}, {'a': torch.zeros(1)}, card='another')
    assert (folder/'README.md').read_text() == 'another'


def test_what_is_read_is_one_form():
    read = read_folder(HERE/'checkpoint-matryoshka_batchtopk-scaled')
    assert (read.activation, read.transcoder, read.skip, read.normalize) == ('jumprelu', False, False, 'none')
    assert top(read.weights['W_dec'].norm(dim=1), torch.ones(12)) < 1e-6
    assert set(read.weights) == {'W_enc', 'b_enc', 'W_dec', 'b_dec', 'threshold'}
