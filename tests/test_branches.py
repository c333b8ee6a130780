"""Features of two branches: co-activation against scikit-learn, partners by brute force, planted overlap, controls that must be flat."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import jaccard_score, matthews_corrcoef

from circuitbench.branches import branch_sites, branch_view, compare_branches, to_residual, train_branches
from circuitbench.coder import Place, SAEConfig
from circuitbench.edit import patch
from circuitbench.latent import latent_report
from circuitbench.load import load_model
from circuitbench.partners import FOUND, Partners, coactivation, compare_dictionaries, firings
from circuitbench.planted import planted, recovery
from circuitbench.sae import SAE
from circuitbench.stream import heard, shipped_text, token_rows
from circuitbench.trainer import Trainer

QUICK = dict(k=4, expansion=4, tokens=8000, batch_size=200, context=64, progress=False)


def sparse(z):
    "Dense activations (n, tokens) as `firings` has them."
    latent, token = z.nonzero(as_tuple=True)
    return firings(token, latent, z[latent, token], tuple(z.shape))


def random_codes(n, tokens, rate=.05, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, tokens, generator=g)*(torch.rand(n, tokens, generator=g) < rate)


def directions(n, d, seed=0): return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


@pytest.fixture(scope='module')
def hybrid(): return load_model('mock://falcon-h1-tiny')


@pytest.fixture(scope='module')
def text(): return list(shipped_text())[:500]


@pytest.fixture(scope='module')
def coders(hybrid, text): return train_branches(hybrid, 1, text=text, **QUICK)


# -- firing together -----------------------------------------------------------------------
def test_co_activation_is_scikit_learns_and_numpys():
    a, b = random_codes(7, 400, .2), random_codes(5, 400, .1, 1)
    b[4], a[6] = 0, 0                                                     # never fires
    A, B = a.numpy(), b.numpy()
    want = {'phi': lambda u, v: matthews_corrcoef(u > 0, v > 0), 'jaccard': lambda u, v: jaccard_score(u > 0, v > 0),
            'correlation': lambda u, v: np.corrcoef(u, v)[0, 1]}
    for measure, f in want.items():
        got = coactivation(sparse(a), sparse(b), slice(2, 7), measure).numpy()
        assert np.allclose(got[:4, :4], [[f(u, v) for v in B[:4]] for u in A[2:6]], atol=1e-5)
        assert not got[4].any() and not got[:, 4].any()
    with pytest.raises(ValueError, match='got measure=.*expected one of'): coactivation(sparse(a), sparse(b), slice(0, 7), 'cosine')


def test_firings_come_in_any_order():
    z = random_codes(6, 50, .3)
    latent, token = z.nonzero(as_tuple=True)
    mix = torch.randperm(len(token))
    assert torch.equal(firings(token[mix], latent[mix], z[latent, token][mix], (6, 50)).to_dense(), z)


# -- partners ------------------------------------------------------------------------------
@pytest.mark.parametrize('measure', ['phi', 'jaccard', 'correlation'])
def test_partners_are_those_of_all_pairs(measure):
    z = [random_codes(60, 3000), random_codes(45, 3000, seed=1)]
    R = [directions(60, 24), directions(45, 24, 1)]
    z[1][:12], R[1][:12] = z[0][20:32], F.normalize(R[0][20:32] + .3*directions(12, 24, 2), dim=1)
    z[0][3, 9:] = 0                                                       # too rare
    r = compare_dictionaries(R, [sparse(v) for v in z], 50, measure=measure)
    cos = (R[0] @ R[1].T).double().numpy()
    fires = [v.numpy() if measure == 'correlation' else v.numpy() > 0 for v in z]
    if measure == 'jaccard': act = np.array([[np.logical_and(u, v).sum()/np.logical_or(u, v).sum() for v in fires[1]] for u in fires[0]])
    else: act = np.corrcoef(np.concatenate(fires))[:60, 60:]
    live = [(v > 0).sum(1).numpy() >= 10 for v in z]
    hidden = ~(live[0][:, None] & live[1])
    cos[hidden], act[hidden] = -np.inf, -np.inf
    both = np.where((cos >= r.cosine) & (act >= r.together), cos, -np.inf)
    for s, axis, ok in ((r.a, 1, live[0]), (r.b, 0, live[1])):
        assert np.allclose(s.cosine[ok], cos.max(axis)[ok], atol=1e-5) and (s.nearest.numpy() == cos.argmax(axis))[ok].all()
        assert np.allclose(s.together[ok], act.max(axis)[ok], atol=1e-5) and (s.partner.numpy() == act.argmax(axis))[ok].all()
        want = np.where(both.max(axis) > -np.inf, both.argmax(axis), -1)
        assert (s.match.numpy() == want).all()
    assert FOUND[r.found(0)[3]] == 'rare' and (r.a.match[20:32] == torch.arange(12)).all()


@pytest.mark.parametrize('control', ['mixture', 'rotation'])
def test_what_has_nothing_in_common_is_found_in_none(control):
    R, z = [directions(300, 32), directions(250, 32, 1)], [sparse(random_codes(n, 6000, .02, i)) for i, n in enumerate((300, 250))]
    r = compare_dictionaries(R, z, 60, control=control)
    assert r.count(0)['both'] <= 1 and r.count(1)['both'] <= 1 and max(s.chance for s in r.sides) < .01
    for s in r.sides:                                                     # a threshold is passed by 1% in the control
        for v, limit in ((s.chance_cosine, r.cosine), (s.chance_together, r.together)): assert (v >= limit).float().mean() < .05
        for v, limit in ((s.cosine, r.cosine), (s.together, r.together)): assert (v >= limit).float().mean() < .05


def test_the_mixture_knows_that_all_directions_lie_in_few():
    "Directions of both coders lie close to three axes: by a rotation half of them would count as alike."
    few = torch.cat([10*torch.eye(3), torch.zeros(3, 61)], 1)
    R = [F.normalize(directions(200, 3, i) @ few + directions(200, 64, i + 5)*3, dim=1) for i in (0, 1)]
    z = [sparse(random_codes(200, 4000, .03, i)) for i in (0, 1)]
    passed = {c: float((r.a.cosine >= r.cosine).float().mean()) for c in ('mixture', 'rotation')
              for r in [compare_dictionaries(R, z, 40, control=c)]}
    assert passed['mixture'] < .1 < .5 < passed['rotation']


def test_direction_and_tokens_are_told_apart():
    R, z = [directions(80, 48), directions(80, 48, 1)], [random_codes(80, 8000, .03, i) for i in (0, 1)]
    R[1][:30] = R[0][:30]                                                 # 0-29 same direction; 20-49 same tokens
    z[1][20:50] = z[0][20:50]
    r = compare_dictionaries(R, [sparse(v) for v in z], 80)
    kind = [FOUND[k] for k in r.found(0)]
    assert kind[20:30] == ['both']*10 and kind[30:50].count('same tokens') == 20
    assert kind[:20].count('same direction') >= 18 and kind[50:].count('one') >= 27    # 1% pass a threshold by chance
    assert r.share(0) == r.share(1) == 10/80
    assert r.examples(0, 'both', 99) and {*r.examples(0, 'both', 99)} == {*range(20, 30)}


def test_trained_coders_find_the_planted_overlap():
    "Two branches with 40 features each, 16 of them common: coders are trained on what the branches add."
    common, own = 16, 24
    data = planted(d=48, n=common + 2*own, k=4, rows=40_000, seed=1)
    z, R = data.codes(), data.directions
    keep = [torch.arange(common + own), torch.cat([torch.arange(common), torch.arange(common + own, common + 2*own)])]
    x = [z[:, i] @ R[i] for i in keep]
    saes = []
    for i, v in enumerate(x):
        t = Trainer(SAEConfig(48, 64, 2, 'embed', activation='batchtopk'), v[:4096], 300, seed=i)
        for batch in (v.split(512)*5)[:300]: t.step(batch)
        saes.append(t.sae())
    r = compare_dictionaries([s.W_dec for s in saes], [sparse(s.encode(v[:10_000]).T) for s, v in zip(saes, x)], 100)
    for side, (sae, which) in enumerate(zip(saes, keep)):
        found = recovery(sae.W_dec, R[which])
        good = [(p, int(i) < common) for p, c, i in zip(found.pairs, found.cosine, which) if c > .9]
        both = r.found(side) == 0
        assert len(good) >= 36 and sum(bool(both[p]) == truth for p, truth in good) >= len(good) - 1
        assert abs(r.count(side)['both'] - common) <= 2 and r.sides[side].chance < .02


def test_the_report_comes_back_and_shows_itself(tmp_path):
    R, z = [directions(40, 16), directions(30, 16, 1)], [sparse(random_codes(n, 2000, .05, n)) for n in (40, 30)]
    r = compare_dictionaries(R, z, 40, names=('ssm', 'attn'), model='m')
    again = Partners.load(r.save(tmp_path/'r.safetensors'))
    assert repr(again) == repr(r) and torch.equal(again.b.match, r.b.match) and again.a.chance == r.a.chance
    assert 'found by both' in repr(r) and len(r.plot().axes) == 2
    (tmp_path/'bad').write_bytes(b'nothing')
    with pytest.raises(ValueError, match='cannot be read'): Partners.load(tmp_path/'bad')
    with pytest.raises(ValueError, match='got kind='): r.examples(0, 'none')


def test_too_little_is_refused():
    R, z = [directions(4, 8), directions(4, 8)], [sparse(random_codes(4, 30, .1)), sparse(random_codes(4, 30, .1))]
    with pytest.raises(ValueError, match='got 30 tokens.*expected more'): compare_dictionaries(R, z, 10)
    with pytest.raises(ValueError, match='got control='): compare_dictionaries(R, z, 10, control='noise')


# -- branches of models --------------------------------------------------------------------
def test_sites_of_parallel_and_interleaved_hybrids(hybrid):
    assert branch_sites(hybrid, [0, 1]) == ['blocks.0.ssm.out', 'blocks.1.ssm.out', 'blocks.0.attn.out', 'blocks.1.attn.out']
    assert branch_sites(hybrid, 1, ('ssm.out_proj_in', 'attn.z')) == ['blocks.1.ssm.out_proj_in', 'blocks.1.attn.z']
    jamba = load_model('mock://jamba-tiny')
    ssm = {n for n in jamba.site_names('ssm.out')}
    assert set(branch_sites(jamba, range(jamba.n_layers))) == ssm | {*jamba.site_names('attn.out')}
    with pytest.raises(ValueError, match='none with attn.out; expected one of 2'): branch_sites(jamba, [0, 1])
    for wrong in (9, [], [-1]):
        with pytest.raises(ValueError, match='expected some of 0 to'): branch_sites(hybrid, wrong)


@pytest.mark.parametrize('family', ['falcon-h1', 'jamba', 'bamba', 'granite-hybrid', 'nemotron-h', 'qwen3-next', 'olmo-hybrid', 'llama'])
def test_directions_go_the_models_own_way(family):
    "A direction that is added at a site changes what the branch adds by what `to_residual` says."
    model, ids = load_model(f'mock://{family}-tiny'), torch.arange(20, 29)[None]
    seen = 0
    for inner, out in (('ssm.out_proj_in', 'ssm.out'), ('attn.z', 'attn.out')):
        if inner not in model.adapter.inside and not any(n.endswith(inner) for n in model.site_names()): continue
        site, = [n for n in model.site_names(inner)][:1]
        end = f'blocks.{site.split(".")[1]}.{out}'
        x = heard(model, [site, end], ids)
        v = torch.randn(x[site].shape, generator=torch.Generator().manual_seed(0))
        try: want = to_residual(model, site, v.flatten(0, 1).flatten(1))
        except ValueError as err:
            assert 'not linear' in str(err)
            continue
        _, after = model.run_with_cache(ids, end, edit=patch(site, x[site] + v))
        change = (after[end] - x[end])[0]
        assert torch.allclose(change, want, atol=1e-4*float(want.abs().max() + x[end].abs().max()))
        assert torch.equal(to_residual(model, end, want), want)
        seen += 1
    assert seen or family in ('qwen3-next', 'olmo-hybrid')
    inside = [n for n in model.site_names() if n.endswith(('.ssm.y', '.attn.q'))]
    with pytest.raises(ValueError, match='not linear; expected'): to_residual(model, inside[0], torch.zeros(1, 8))


def test_both_branches_see_the_same_tokens_in_the_same_order(hybrid, text, coders):
    for branch, site in (('ssm', 'blocks.1.ssm.out'), ('attn', 'blocks.1.attn.out')):
        alone = train_branches(hybrid, 1, (branch,), text=text, **QUICK)
        assert list(alone) == [site] and coders[site].cfg == alone[site].cfg
        assert all(torch.equal(p, q) for p, q in zip(alone[site].parameters(), coders[site].parameters()))


def test_the_coders_are_good_and_measured_where_asked(hybrid, text):
    sae = train_branches(hybrid, 0, text=text, held=text[-50:], **QUICK)['blocks.0.attn.out']
    assert sae.metrics.fve > .4 and sae.check(hybrid) == 'blocks.0.attn.out' and (sae.cfg.k, sae.d_sae) == (4, 4*sae.d_in)


def test_a_coder_against_itself_is_found_whole(hybrid, text, coders):
    ssm, attn = coders.values()
    r = compare_branches(hybrid, ssm, ssm, text, tokens=6000, context=64)
    live = r.found(0) != 4
    assert r.share(0) == 1 and torch.equal(r.a.match[live], live.nonzero()[:, 0]) and r.a.cosine[live].min() > .999
    r = compare_branches(hybrid, ssm, attn, text, tokens=6000, context=64)
    x = torch.cat([heard(hybrid, attn.site, rows)[attn.site].flatten(0, 1)
                   for rows in token_rows(hybrid, text, 64, 6000).split(20)])
    assert torch.allclose(r.b.frequency, (attn.encode(x) > 0).float().mean(0), atol=2e-4) and r.tokens == len(x)
    assert r.share(0) < .5


def test_sites_of_other_widths_meet_in_the_residual_stream(hybrid, text):
    "The coder of `attn.z` is the one of `attn.out` pulled back through the output matrix: same latents, other site."
    z = train_branches(hybrid, 1, ('attn.z',), text=text, **QUICK)['blocks.1.attn.z']
    out = SAE(SAEConfig(32, z.d_sae, 4, 'blocks.1.attn.out', hybrid.name))
    W = to_residual(hybrid, 'blocks.1.attn.z', torch.eye(z.d_in))                    # (d_z, d_model)
    back = torch.linalg.pinv(W.double()).float()
    for name, v in dict(W_dec=z.W_dec @ W, W_enc=back @ z.W_enc, b_enc=z.b_enc, b_dec=z.b_dec @ W).items(): getattr(out, name).data = v.contiguous()
    r = compare_branches(hybrid, z, out, text, tokens=5000, context=64)
    live = r.found(0) < 4
    assert W.shape == (z.d_in, 32) and r.a.cosine[live].min() > .999 and r.share(0) == 1


def test_the_view_shows_every_class_with_its_tokens(hybrid, text, coders):
    ssm, attn = coders.values()
    r = compare_branches(hybrid, ssm, attn, text, tokens=6000, context=64)
    pages = [latent_report(hybrid, s, text, tokens=3000, context=64) for s in (ssm, attn)]
    html, bare = branch_view(r, pages), branch_view(r)
    assert all(site in html for site in (ssm.site, attn.site)) and 'control' in html and html.count('<table') > bare.count('<table') - 1
    kind = next(k for k in FOUND if r.count(0)[k])
    words = pages[0].words(r.examples(0, kind)[0])
    assert words and repr(words[0]).replace("'", '&#x27;') in html


def test_wrong_coders_are_refused(hybrid, coders):
    ssm, _ = coders.values()
    two = SAE(SAEConfig(64, 64, 4, 'blocks.0.ssm.out', hybrid.name, shape=(32,), beside=(Place('blocks.1.ssm.out', (32,)),)))
    y = SAE(SAEConfig(64, 64, 4, 'blocks.1.ssm.y', hybrid.name, shape=hybrid.site_shape('blocks.1.ssm.y', 1, 1)[2:]))
    with pytest.raises(ValueError, match='expected a coder that reads one vector'): compare_branches(hybrid, two, ssm)
    with pytest.raises(ValueError, match='not linear'): compare_branches(hybrid, ssm, y)
    with pytest.raises(ValueError, match='expected its own model'): compare_branches(load_model('mock://jamba-tiny'), ssm, ssm)


@pytest.mark.slow
def test_branches_of_the_shipped_hybrid_share_less_with_each_other_than_with_themselves():
    model = load_model('tiny://hybrid')
    text = list(shipped_text())[:9000]
    first, again = (train_branches(model, 2, text=text, tokens=60_000, seed=s, progress=False) for s in (0, 1))
    ssm, attn = first.values()
    across = compare_branches(model, ssm, attn).share(0)
    within = compare_branches(model, ssm, again[ssm.site]).share(0)
    assert across < .05 < .3 < within
