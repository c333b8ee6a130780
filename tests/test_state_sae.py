"""Coders of a head's matrices: what they read, the replace-the-write test, and views; against numpy, plain edits and planted atoms."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from circuitbench import state_sae as module
from circuitbench.atoms import atom_report, atom_table, atom_view, write_test_view
from circuitbench.coder import SAEConfig
from circuitbench.edit import Edit, zero
from circuitbench.load import load_model
from circuitbench.matrices import atoms_of, matrices, matrix_site, state_fit, strongest
from circuitbench.sae import SAE
from circuitbench.state_sae import WriteTest, replace_writes, train_state_sae, wilson
from circuitbench.stream import shipped_text, token_rows
from circuitbench.trainer import Trainer

torch.set_num_threads(1)
MODELS = 'mock://mamba2-tiny', 'mock://rwkv7-tiny', 'mock://falcon-h1-tiny'


@pytest.fixture(scope='module', params=MODELS)
def model(request): return load_model(request.param)


@pytest.fixture(scope='module')
def mamba(): return load_model('mock://mamba2-tiny')


def coder(model, layer=1, site='ssm.write', rank1=True, k=4, d_sae=48, unit=True, heads='shared', seed=0):
    "A coder with random weights, none of them zero."
    name, shape, heads = matrix_site(model, layer, site, heads)
    cfg = SAEConfig(shape[0]*shape[1], d_sae, k, name, model.name, model.adapter.family, shape, heads=heads, rank1=rank1,
                    normalize='constant_norm_rescale' if unit else 'none')
    sae, make = SAE(cfg, seed), torch.Generator().manual_seed(seed)
    for n in ('b_enc', 'b_dec'): getattr(sae, n).data = .1*torch.randn(getattr(sae, n).shape, generator=make)
    return sae


def held(model, context, rows): return token_rows(model, shipped_text('held'), context, context*rows).long()


# -- rank-1 coders ---------------------------------------------------------------------------
@pytest.mark.parametrize('unit', (False, True))
def test_a_rank1_coder_is_the_bilinear_form_that_numpy_computes(mamba, unit):
    sae, x = coder(mamba, unit=unit), torch.randn(20, 16, 8)*torch.logspace(-3, 3, 20)[:, None, None]
    p = {n: v.double().numpy() for n, v in sae.named_parameters()}
    want, sizes = np.zeros((20, 16, 8)), []
    for i, S in enumerate(x.double().numpy()):
        size = np.linalg.norm(S)/np.sqrt(128) if unit else 1.
        pre = np.array([v @ (S/size - p['b_dec'].reshape(16, 8)) @ w for v, w in zip(p['enc_v'], p['enc_w'])]) + p['b_enc']
        top = np.argsort(-pre)[:4]
        z = np.maximum(pre[top], 0)
        want[i] = (sum(a*np.outer(p['dec_v'][j], p['dec_w'][j]) for a, j in zip(z, top)) + p['b_dec'].reshape(16, 8))*size
        sizes.append((z.max()*size, top[0]))
    got = sae(x).double().numpy()
    assert np.abs(got - want).max(axis=(1, 2)) == pytest.approx(0, abs=1e-3*np.abs(want).max()) and np.allclose(got, want, rtol=1e-3, atol=1e-5*np.abs(want).max(axis=(1, 2), keepdims=True))
    value, latent = strongest(sae, x.flatten(1))
    assert latent.tolist() == [j for _, j in sizes] and np.allclose(value.numpy(), [s for s, _ in sizes], rtol=1e-4)
    rows = atoms_of(sae, latent)
    assert torch.equal(rows, sae.W_dec[latent]) and torch.linalg.matrix_rank(rows.view(-1, 16, 8)).eq(1).all()


def planted_atoms(n=24, shape=(12, 10), k=2, rows=6000, seed=0):
    g = torch.Generator().manual_seed(seed)
    v, w = (F.normalize(torch.randn(n, d, generator=g), dim=1) for d in shape)
    atoms = torch.einsum('np,nq->npq', v, w)
    index = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(rows)])
    value = .5 + torch.rand(rows, k, generator=g)
    return atoms, torch.einsum('rk,rkpq->rpq', value, atoms[index])


def test_planted_atoms_are_found_and_a_flat_coder_cut_to_rank_one_does_no_better():
    from scipy.optimize import linear_sum_assignment
    atoms, x = planted_atoms()
    found = {}
    for rank1 in (True, False):
        cfg = SAEConfig(120, 48, 2, 'blocks.0.ssm.state', shape=(12, 10), heads=(0,), rank1=rank1)
        t, g = Trainer(cfg, x[:2048], 264, dead_after=2000, resample=2000), torch.Generator().manual_seed(0)
        for _ in range(264): t.step(x[torch.randint(len(x), (256,), generator=g)])
        u, s, vh = torch.linalg.svd(t.sae().W_dec.view(-1, 12, 10))
        found[rank1] = torch.einsum('np,nq->npq', u[:, :, 0], vh[:, 0])
    cos = {r: np.abs(torch.einsum('apq,fpq->af', atoms, f).numpy()) for r, f in found.items()}
    match = {r: c[linear_sum_assignment(c, maximize=True)] for r, c in cos.items()}
    assert match[True].min() >= .95, match
    assert match[True].mean() >= match[False].mean() - .01, match


def test_a_coder_of_matrices_is_saved_and_loaded(mamba, tmp_path):
    sae, x = coder(mamba), torch.randn(3, 4, 16, 8)
    again = SAE.load(sae.save(tmp_path/'sae'))
    assert again.cfg == sae.cfg and torch.equal(again(x), sae(x))
    assert torch.allclose(sae(7*x), 7*sae(x), rtol=1e-4, atol=1e-5), 'the size of a matrix is undone'


# -- what is read ----------------------------------------------------------------------------
@pytest.mark.parametrize('site', ('ssm.write', 'ssm.state'))
def test_sampled_matrices_are_those_of_the_model(model, site):
    ids = held(model, 24, 3)
    name, shape, heads = matrix_site(model, 1, site, [1, 0])
    _, cache = model.run_with_cache(ids, name)
    true = cache[name][:, :, [1, 0]].flatten(0, 2).flatten(1)
    got = torch.cat(list(matrices(model, name, ids, heads, 4, 90, seed=3)))
    near = torch.cdist(got.double(), true.double()).min(1)
    assert got.shape == (90, shape[0]*shape[1]) and near.values.max() < 1e-4*true.norm(dim=1).mean()
    again = torch.cat(list(matrices(model, name, ids, heads, 4, 90, seed=3)))
    assert torch.equal(got, again)
    if site == 'ssm.write': assert torch.linalg.matrix_rank(got.view(-1, *shape), rtol=1e-4).max() == 1


def test_sampling_keeps_one_step_in_so_many_and_little_memory(mamba):
    name, ids = 'blocks.0.ssm.state', held(mamba, 32, 8)
    _, cache = mamba.run_with_cache(ids, name)
    got, true = torch.cat(list(matrices(mamba, name, ids, (0,), 8, 32))), cache[name][:, :, 0].flatten(0, 1).flatten(1)
    place = torch.cdist(got.double(), true.double()).argmin(1)
    assert len(got) == 32 and len(place.unique()) == 32
    for row in range(8):
        steps = (place[place//32 == row] % 32).sort().values
        assert steps.diff().eq(8).all() and len(steps) == 4, 'one step in eight of each row'


def test_batches_have_one_size():
    x = torch.arange(100.).split([7, 30, 1, 62])
    got = list(module._batches(x, 16))
    assert [len(b) for b in got] == [16]*6 and torch.equal(torch.cat(got), torch.arange(96.))
    assert [len(b) for b in module._batches([torch.arange(32.)], 16)] == [16, 16]


def test_the_fit_is_what_numpy_computes(model):
    ids, sae = held(model, 32, 4), coder(model)
    name, shape, heads = matrix_site(model, 1)
    fit = state_fit(model, sae, ids, tokens=32, every=4, context=32)
    _, cache = model.run_with_cache(ids, name, at=slice(2, None, 4))
    x = cache[name].flatten(0, 1).flatten(2)                                  # token, head, d_in
    y = sae(x).reshape(x.shape)
    z = sae.encode(x)
    x, y = x.double().numpy(), y.double().numpy()
    err = ((x - y)**2).sum(2)
    var = ((x - x.mean(0))**2).sum(2)
    assert fit.matrices == x.shape[0]*x.shape[1] == 32*len(heads)
    assert fit.fvu == pytest.approx(err.sum()/var.sum(), rel=1e-4)
    assert list(fit.heads.values()) == pytest.approx((err.sum(0)/var.sum(0)).tolist(), rel=1e-4)
    assert fit.relative == pytest.approx((err/(x**2).sum(2)).mean(), rel=1e-4)
    assert fit.l0 == pytest.approx(float((z > 0).sum(-1).float().mean()))
    assert fit.dead == pytest.approx(float((~(z > 0).any(0).any(0)).float().mean()))
    assert torch.allclose(sae.frequency, (z > 0).float().mean((0, 1)))
    best, atoms = z.argmax(-1), sae.W_dec.double().numpy()
    a = atoms[best.numpy()]
    cos = (x*a).sum(2)/np.sqrt((x**2).sum(2))
    s = z.max(-1).values.double().numpy()*np.sqrt((x**2).sum(2)/x.shape[2])
    assert fit.cosine == pytest.approx(cos.mean(), rel=1e-4)
    assert fit.one_atom == pytest.approx((((x - s[..., None]*a)**2).sum(2)/(x**2).sum(2)).mean(), rel=1e-4)


def test_the_fit_is_saved_and_loaded(mamba, tmp_path):
    fit = state_fit(mamba, coder(mamba), held(mamba, 32, 2), tokens=16, every=4, context=32)
    assert type(fit).load(fit.save(tmp_path/'fit.json')) == fit and 'rank-1' in repr(fit) and fit.plot()


# -- training --------------------------------------------------------------------------------
RUN = dict(tokens=1024, batch_size=64, lr=1e-2, context=32, held=64, d_sae=48, k=4, progress=False)


@pytest.mark.parametrize('site,rank1', (('ssm.write', True), ('ssm.write', False), ('ssm.state', True)))
def test_training_lowers_the_error_and_measures(model, site, rank1):
    sae = train_state_sae(model, 1, site, rank1=rank1, **RUN)
    name, shape, heads = matrix_site(model, 1, site)
    before = state_fit(model, coder(model, site=site, rank1=rank1), tokens=128, context=32)
    after = state_fit(model, sae, tokens=128, context=32)
    assert after.relative < .9*before.relative
    m = sae.metrics
    assert (sae.cfg.heads, sae.cfg.shape, sae.cfg.rank1) == (heads, shape, rank1) and sae.frequency.shape == (48,)
    assert m.tokens == 64 and m.trained == 1024 and m.fve < 1 and m.l0 <= 4


def test_one_head_alone_and_the_same_seed_the_same_coder(mamba):
    a, b = (train_state_sae(mamba, 0, heads=2, seed=5, **RUN) for _ in range(2))
    assert a.cfg.heads == (2,) and all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_without_unit_the_weights_act_on_matrices_as_they_are(mamba):
    sae = train_state_sae(mamba, 0, unit=False, **RUN)
    assert sae.cfg.normalize == 'none' and sae.metrics.fve > 0


def test_an_interrupt_keeps_what_was_trained(mamba, monkeypatch):
    step = Trainer.step
    def stop(after):
        def _step(self, *args):
            if self.step_no == after: raise KeyboardInterrupt
            return step(self, *args)
        return _step
    monkeypatch.setattr(Trainer, 'step', stop(3))
    sae = train_state_sae(mamba, 1, **RUN)
    assert sae.metrics.note == 'stopped after 192 of 4,096 matrices' and sae.metrics.trained == 48
    monkeypatch.setattr(Trainer, 'step', stop(0))
    with pytest.raises(KeyboardInterrupt): train_state_sae(mamba, 1, **RUN)
    monkeypatch.setattr(Trainer, 'step', step)
    def no(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(module, 'core_metrics', no)
    assert train_state_sae(mamba, 1, **RUN).metrics is None


def test_own_text_is_held_out_in_part_or_said_not_to_be(mamba):
    sae = train_state_sae(mamba, 1, text=torch.randint(257, (640,)), **RUN)
    assert not sae.metrics.note
    short = train_state_sae(mamba, 1, text=torch.randint(257, (40,)), **RUN)
    assert 'too short to hold out' in short.metrics.note


# -- the test of use -------------------------------------------------------------------------
def kl(clean: Tensor, other: Tensor) -> Tensor:
    p, q = (v.double().log_softmax(-1) for v in (clean, other))
    return (p.exp()*(p - q)).sum(-1)


@pytest.fixture(scope='module')
def tested(model):
    sae, flat = coder(model), coder(model, rank1=False, seed=1)
    return model, sae, flat, replace_writes(model, sae, n=12, flat=flat, steps=10, context=24, per_row=3, progress=False)


def test_a_write_in_its_own_place_changes_nothing(model):
    ids, name = held(model, 24, 1), 'blocks.1.ssm.write'
    _, cache = model.run_with_cache(ids, name, at=9)
    state = model.run(ids[:, :9], keep_state=True).state
    write = cache[name][0, 0, 1]
    assert module._continued(model, ids[:, 9:], state, name, 9, 1, torch.stack([write, write])).max() < 1e-10
    edit = Edit(name, lambda x, where: write[None, None, None], pos=9, head=(1,))
    assert torch.allclose(model.run(ids, edit=edit).logits, model.run(ids).logits, atol=1e-5)


def test_each_replacement_is_that_edit_of_a_whole_run(tested):
    model, sae, flat, r = tested
    rows, name, shape = held(model, 24, 4), 'blocks.1.ssm.write', sae.cfg.shape
    assert r.names == ('deletion', 'atom', 'random', 'other atom', 'flat, SVD', 'reconstruction') and r.kl.shape == (12, 6, 10)
    for i in range(12):
        row, t, h = (int(v[i]) for v in (r.row, r.position, r.head))
        ids, end = rows[row:row + 1], t + 10
        out, cache = model.run_with_cache(ids[:, :end], name, at=t)
        write, clean = cache[name][0, 0, h], out.logits[0, t:end]
        assert float(r.norm[i]) == pytest.approx(float(write.norm()), rel=1e-4)
        cut = model.run(ids[:, :end], edit=zero(name, at=t, heads=h)).logits[0, t:end]
        z = sae.encode(write[None])[0]*write.norm()/write.numel()**.5
        j = int(z.argmax())
        atom = torch.outer(sae.dec_v[j], sae.dec_w[j])
        assert j == int(r.latent[i]) and float(r.value[i]) == pytest.approx(float(z[j]), rel=1e-4)
        assert float(r.cosine[i]) == pytest.approx(float(F.cosine_similarity(atom.flatten(), write.flatten(), dim=0)), abs=1e-4)
        i_flat = int(flat.encode(write[None])[0].argmax())
        u, s, v = np.linalg.svd(flat.W_dec[i_flat].double().view(shape).numpy())
        cut_row = torch.tensor(s[0]*np.outer(u[:, 0], v[0])).float()*flat.encode(write[None])[0].max()*write.norm()/write.numel()**.5
        def put(m, ids=ids, t=t, h=h, end=end):
            edit = Edit(name, lambda x, where: m[None, None, None].expand_as(x), pos=t, head=(h,))
            return model.run(ids[:, :end], edit=edit).logits[0, t:end]
        want = {'deletion': cut, 'atom': put(z[j]*atom), 'flat, SVD': put(cut_row), 'reconstruction': put(sae(write[None])[0])}
        for n, logits in want.items():
            got = r.kl[i, r.names.index(n)]
            assert torch.allclose(got, kl(clean, logits), rtol=.05, atol=2e-10), (n, got, kl(clean, logits))


def test_controls_have_the_norm_of_the_atom_and_rank_one(mamba):
    sae, flat, make = coder(mamba), coder(mamba, rank1=False), torch.Generator().manual_seed(0)
    write = torch.outer(torch.randn(16), torch.randn(8)).flatten()
    for how in ('activation', 'projection'):
        new, about = module._replacements(sae, flat, write[None], write[None], how, make)
        new, (j, value, size, _) = {n: v[0] for n, v in new.items()}, about[0].tolist()
        for n in ('atom', 'random', 'other atom'):
            assert torch.linalg.matrix_rank(new[n].view(16, 8)) == 1
            assert float(new[n].norm()) == pytest.approx(abs(float(value)), rel=1e-4)
        assert new['deletion'].eq(0).all() and float(size) == pytest.approx(float(write.norm()))
        assert not torch.allclose(new['other atom'], new['atom'], rtol=.1)
    best = min(np.linalg.norm(write.numpy() - c*atoms_of(sae, torch.tensor([int(j)]))[0].numpy()) for c in np.linspace(-3*float(size), 3*float(size), 4001))
    assert float((write - new['atom']).norm()) == pytest.approx(best, rel=1e-4), 'projection is the best length'


def test_a_coder_of_states_reads_the_state_after_the_write(mamba):
    sae = coder(mamba, site='ssm.state')
    r = replace_writes(mamba, sae, n=6, steps=8, context=24, heads=[1, 2], progress=False)
    rows = held(mamba, 24, 2)
    for i in range(6):
        _, cache = mamba.run_with_cache(rows[int(r.row[i])][None], ['ssm.state', 'ssm.write'], at=int(r.position[i]))
        read = cache['blocks.1.ssm.state'][0, 0, int(r.head[i])]
        assert int(sae.encode(read[None])[0].argmax()) == int(r.latent[i])
        assert float(r.norm[i]) == pytest.approx(float(cache['blocks.1.ssm.write'][0, 0, int(r.head[i])].norm()), rel=1e-4)
    assert {*r.head.tolist()} <= {1, 2} and 'reconstruction' not in r.names


def test_shares_and_intervals_are_counted_by_hand_and_by_scipy(tested):
    from scipy.stats import binomtest
    r = tested[-1]
    total = r.kl.sum(-1).numpy()
    for n in ('deletion', 'random', 'flat, SVD'):
        hits = int((total[:, 1] < total[:, r.names.index(n)]).sum())
        ci = binomtest(hits, 12).proportion_ci(method='wilson')
        assert r.share(n) == pytest.approx((hits/12, ci.low, ci.high))
        at = int((r.kl[:, 1, 0] < r.kl[:, r.names.index(n), 0]).sum())
        assert r.share(n, steps=1)[0] == pytest.approx(at/12)
    for hits, n in ((0, 7), (7, 7), (282, 320)):
        ci = binomtest(hits, n).proportion_ci(method='wilson')
        assert wilson(hits, n) == pytest.approx((ci.low, ci.high))
    value, low, high = r.median('atom')
    assert value == pytest.approx(np.median(total[:, 1])) and total[:, 1].min() <= low <= value <= high <= total[:, 1].max()
    heads = [r.share('deletion', head=int(h)) for h in r.head.unique()]
    counts = [int((r.head == h).sum()) for h in r.head.unique()]
    assert sum(s[0]*c for s, c in zip(heads, counts)) == pytest.approx(12*r.share('deletion')[0])


def test_the_test_prints_saves_plots_and_repeats(tested, tmp_path):
    model, sae, flat, r = tested
    again = replace_writes(model, sae, n=12, flat=flat, steps=10, context=24, per_row=3, progress=False)
    assert torch.equal(again.kl, r.kl) and torch.equal(again.latent, r.latent)
    loaded = WriteTest.load(r.save(tmp_path/'test.safetensors'))
    assert repr(loaded) == repr(r) and torch.equal(loaded.kl, r.kl) and loaded.names == r.names
    assert '88.1%' in repr(r) and all(n in repr(r) for n in r.names)
    assert len(r.plot().axes) == 2
    page = write_test_view(r)
    assert 'flat, SVD' in page and '<svg' in page
    (tmp_path/'other.safetensors').write_bytes(b'no')
    with pytest.raises(ValueError, match='WriteTest.save'): WriteTest.load(tmp_path/'other.safetensors')


def test_an_interrupt_gives_what_was_measured(mamba, monkeypatch):
    run, calls = module._continued, []
    def _stop(*args):
        calls.append(1)
        if len(calls) > 5: raise KeyboardInterrupt
        return run(*args)
    monkeypatch.setattr(module, '_continued', _stop)
    assert len(replace_writes(mamba, coder(mamba), n=12, steps=8, context=24, progress=False).kl) == 5


def test_a_text_of_few_rows_gives_more_writes_of_each(mamba):
    r = replace_writes(mamba, coder(mamba), torch.randint(257, (48,)), n=11, steps=8, context=24, progress=False)
    assert torch.bincount(r.row).tolist() == [6, 5] and r.position.max() <= 16


# -- wrong inputs ----------------------------------------------------------------------------
def test_sites_heads_and_coders_that_do_not_fit_are_refused_in_a_sentence(mamba):
    flat, rank1 = coder(mamba, rank1=False), coder(mamba)
    vectors = SAE(SAEConfig(64, 128, 4, 'blocks.1.ssm.y', mamba.name, shape=(4, 16)))
    whole = SAE(SAEConfig(4*16*8, 64, 4, 'blocks.1.ssm.write', mamba.name, shape=(4, 16, 8)))
    part = coder(mamba, heads=[0, 1])
    for call, match in (
            (lambda: train_state_sae(mamba, 1, 'ssm.y'), 'no matrix'),
            (lambda: train_state_sae(mamba, 1, 'resid_post'), 'no matrix'),
            (lambda: train_state_sae(mamba, 5), 'got block 5'),
            (lambda: train_state_sae(mamba, 1, heads=4), 'some of 0 to 3'),
            (lambda: train_state_sae(mamba, 1, heads=[]), 'some of 0 to 3'),
            (lambda: train_state_sae(mamba, 1, heads=[1, 1]), 'some of 0 to 3'),
            (lambda: train_state_sae(mamba, 1, heads='each'), 'some of 0 to 3'),
            (lambda: train_state_sae(mamba, 1, every=0), 'every=0'),
            (lambda: train_state_sae(mamba, 1, tokens=10), 'more tokens'),
            (lambda: train_state_sae(mamba, 1, k=9000), 'got k=9000'),
            (lambda: replace_writes(mamba, flat), 'rank-1 atoms'),
            (lambda: replace_writes(mamba, vectors), 'rank-1 atoms'),
            (lambda: replace_writes(mamba, rank1, flat=rank1), 'expected a flat coder'),
            (lambda: replace_writes(mamba, rank1, flat=coder(mamba, layer=0, rank1=False)), 'expected a flat coder'),
            (lambda: replace_writes(mamba, part, heads=3), 'that the coder reads'),
            (lambda: replace_writes(mamba, rank1, coefficient='best'), 'projection'),
            (lambda: replace_writes(mamba, rank1, steps=0), 'got steps=0'),
            (lambda: replace_writes(mamba, rank1, n=0), 'got n=0'),
            (lambda: replace_writes(load_model('mock://rwkv7-tiny'), rank1), 'its own model'),
            (lambda: state_fit(mamba, whole), "one of a head's matrix"),
            (lambda: state_fit(mamba, vectors), "one of a head's matrix"),
            (lambda: atom_report(mamba, flat), 'rank-1 atoms')):
        with pytest.raises(ValueError, match=match): call()
    with pytest.raises(ValueError, match='one row of'): matrix_site(load_model('mock://mamba1-tiny'), 0)


# -- views -----------------------------------------------------------------------------------
def test_the_report_names_where_atoms_are_strongest(model):
    sae, rows = coder(model), held(model, 24, 6)
    report = atom_report(model, sae, rows, tokens=144, every=3, context=24, contexts=3, window=8, lags=6)
    name, _, heads = matrix_site(model, 1)
    _, cache = model.run_with_cache(rows, name, at=slice(0, None, 3))
    z = sae.encode(cache[name])                                               # row, step, head, latent
    assert torch.allclose(report.frequency, (z > 0).float().mean((0, 1)).T)
    for j in (0, 7, 33):
        best = z[..., j].flatten(1).max(1).values.sort(descending=True).values[:3]
        assert torch.allclose(report.peak[j], best, rtol=1e-4, atol=1e-6)
        for i in range(3):
            if report.peak[j, i] <= 0: continue
            row, step, head = ((z[..., j] - report.peak[j, i]).abs() < 1e-6).nonzero()[0].tolist()
            assert int(report.head[j, i]) == heads[head]
            assert int(report.ids[j, i, int(report.mark[j, i])]) == int(rows[row, 3*step])


def test_persistence_is_how_a_change_of_the_state_fades(mamba):
    "In Mamba-2 a change of the state at one step is exactly what the decays leave of it later."
    ids, h = held(mamba, 24, 1), 2
    report = atom_report(mamba, coder(mamba), ids, tokens=24, context=24, lags=9)
    left = torch.zeros(24, 10, dtype=torch.float64)
    states = lambda edit: mamba.run_with_cache(ids, 'blocks.1.ssm.state', edit=edit)[1]['blocks.1.ssm.state'][0, :, h].double()
    clean = states(())
    for t in range(24):
        change = (states(zero('blocks.1.ssm.write', at=t, heads=h)) - clean).flatten(1).norm(dim=1)
        left[t, :24 - t] = (change[t:]/change[t])[:10] if 24 - t >= 10 else F.pad(change[t:]/change[t], (0, 0))
    want = [float(left[:24 - lag, lag].mean()) for lag in range(10)]
    assert report.persistence[h, 0].tolist() == pytest.approx(want, rel=1e-3)
    assert torch.equal(report.lasting(3), report.persistence[:, 0])


def test_where_keys_decay_apart_an_atom_lasts_as_its_keys_do():
    model = load_model('mock://rwkv7-tiny')
    ids, sae = held(model, 24, 2), coder(model)
    report = atom_report(model, sae, ids, tokens=48, context=24, lags=5)
    decay = model.run_with_cache(ids, 'blocks.1.ssm.decay')[1]['blocks.1.ssm.decay'].double().numpy()     # row pos head key
    w = sae.dec_w[4].double().numpy()
    for lag in range(6):
        left = np.mean([np.prod(decay[:, t + 1:t + 1 + lag], axis=1) for t in range(24 - lag)], axis=(0, 1))
        assert report.lasting(4)[:, lag].tolist() == pytest.approx(((left*w**2).sum(1)/(w**2).sum()).tolist(), rel=1e-4)


def test_views_are_pages_of_their_own(model):
    sae = coder(model)
    sae.b_enc[5] = -1e6                                                       # it never acts
    report = atom_report(model, sae, held(model, 24, 4), tokens=96, context=24, window=8, lags=6)
    page, none = atom_view(report, report.order()[0], contexts=2), atom_view(report, 5)
    assert page.count('<svg') >= 3 and 'Written at' in page and 'What is left of a write' in page
    assert 'acts on none' in none and 'Written at' not in none and 5 not in report.order()
    listed = atom_table(report)
    assert all(f'<td>{j}</td>' in listed for j in report.order()[:20])
    assert f'{report.words(report.order()[0])[0]!r}' in listed.replace('&#x27;', "'").replace('&quot;', '"').replace('&lt;', '<').replace('&gt;', '>').replace('&amp;', '&')
    with pytest.raises(ValueError, match='got atom 999'): atom_view(report, 999)
    assert '48 atoms' in repr(report)
