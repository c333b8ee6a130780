"""Probes against scikit-learn, edits against runs by hand, attribution against differences, tasks on planted features and on noise."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score

from circuitbench.baseline import compare
from circuitbench.coder import Place, SAEConfig
from circuitbench.edit import apply
from circuitbench.evaluate import Result, vectors
from circuitbench.load import load_model
from circuitbench.sae import SAE
from circuitbench.sae_tasks import (
    _held,
    absorbed,
    absorption,
    balanced,
    code_ends,
    dense_probes,
    logistic,
    probing_tasks,
    sparse_probing,
    word_tokens,
)
from circuitbench.targeted import SCR, TPP, Unlearning, attribution, cue_prompts, scr, tpp, unlearn, without
from circuitbench.task import tables
from circuitbench.train import train_sae

SITE = 'blocks.1.ssm.out_proj_in'


@pytest.fixture(scope='module')
def mamba2(): return load_model('mock://mamba2-tiny')


def random_sae(d_in=64, d_sae=96, k=5, site=SITE, seed=1, **kw):
    "A coder with no weight left at its start."
    sae, make = SAE(SAEConfig(d_in, d_sae, k, site, **kw)), torch.Generator().manual_seed(seed)
    for name, p in sae.named_parameters():
        if 'dec' not in name or name == 'b_dec': p.data = .3*torch.randn(p.shape, generator=make)
    return sae


def signed(d=32, site='embed'):
    "A latent for either sign of each coordinate: i, and d + i."
    sae = SAE(SAEConfig(d, 2*d, d, site, activation='relu'))
    sae.W_dec.data = torch.cat([torch.eye(d), -torch.eye(d)])
    sae.W_enc.data = sae.W_dec.data.T.contiguous()
    return sae


def embedded(vectors, noise=.05, seed=0):
    "A model whose first tokens have these embeddings (n, 32), and some noise."
    model = load_model('mock://mamba2-tiny')
    make = torch.Generator().manual_seed(seed)
    rows = vectors + noise*torch.randn(vectors.shape, generator=make)
    model.hf.get_input_embeddings().weight.data[:len(rows)] = rows
    return model


KINDS = {
    'one': lambda: random_sae(),
    'heads': lambda: random_sae(16, 40, 3, 'blocks.0.ssm.y', shape=(16,), heads=(0, 3)),
    'state': lambda: random_sae(128, 40, 3, 'blocks.1.ssm.state', shape=(16, 8), heads=(1, 2)),
    'transcoder': lambda: random_sae(32, 80, 4, 'blocks.1.mixer_in', writes=(Place(SITE, (64,)),)),
    'crosscoder': lambda: random_sae(128, 160, 6, 'blocks.0.ssm.out_proj_in', shape=(64,), beside=(Place(SITE, (64,)),)),
    'jumprelu': lambda: random_sae(activation='jumprelu'),
    'layer norm': lambda: random_sae(normalize='layer_norm')}


# -- latents at the end of a prompt ------------------------------------------------------
@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_what_latents_add_is_the_reconstruction(mamba2, kind):
    "Prompts of three lengths one by one; what latents add, and the bias, is what the coder gives."
    sae, prompts = KINDS[kind](), ['In the beginning', 'And God said', 'Let there be', 'light']
    coded = code_ends(mamba2, sae, prompts)
    rows = coded.target.shape[1]//sae.cfg.d_out
    assert coded.latents == sae.d_sae*rows and rows == max(1, len(sae.cfg.heads))
    for i, p in enumerate(prompts):
        x, t = (v[0, -1] for v in vectors(mamba2, sae, mamba2.tokens(p)[0]))
        assert torch.allclose(coded.target[i], t.flatten(), atol=1e-6)
        y = torch.zeros(rows, sae.cfg.d_out)
        for v, j in zip(coded.value[i], coded.index[i]): y[j//sae.d_sae] += v*sae.W_dec[j % sae.d_sae]
        if kind == 'layer norm': y = y + sae.b_dec*x.std(-1, keepdim=True) + x.mean(-1, keepdim=True)
        else: y = y + sae.b_dec
        assert torch.allclose(y, sae(x).reshape(rows, -1), atol=1e-5)
    dense = torch.zeros(4, coded.latents).scatter_add(1, coded.index, coded.value)
    assert torch.allclose(coded.columns(range(coded.latents)).float(), dense)
    some = torch.tensor([True, False, True, True])
    assert torch.allclose(coded.mean(some), dense[some].double().mean(0)) and torch.allclose(coded.mean(torch.tensor([1, 2])), dense[1:3].double().mean(0))


# -- probes ------------------------------------------------------------------------------
@pytest.mark.parametrize('n, d', [(90, 20), (40, 70)])
def test_probes_are_scikit_learns(n, d):
    rng = np.random.default_rng(n)
    y = rng.permutation(np.arange(n) % 3)
    x = rng.normal(size=(n, d)) + rng.normal(size=(3, d))[y] + 5
    w, at = dense_probes(torch.from_numpy(x), torch.from_numpy(y), 3, ridge=.1)
    alpha = .1*np.square(x - x.mean(0)).sum()/n
    for c in range(3):
        theirs = Ridge(alpha=alpha).fit(x, 2.*(y == c) - 1).coef_
        assert np.abs(w[c].numpy() - theirs/np.linalg.norm(theirs)).max() < 1e-8
        score = x @ w[c].numpy()
        assert float(at[c]) == pytest.approx((score[y == c].mean() + score[y != c].mean())/2)
    two = (y == 0)[:, None] & np.array([True, False, True]) ^ (rng.random((n, 3)) < .2)
    few = x[:, :3] - 5 + two
    for t in (y == 0, y != 2):
        w, b = logistic(torch.from_numpy(few), torch.from_numpy(t))
        theirs = LogisticRegression(class_weight='balanced', tol=1e-10, max_iter=10_000).fit(few, t)
        assert np.abs(w.numpy() - theirs.coef_[0]).max() < 1e-5 and float(b) == pytest.approx(theirs.intercept_[0], abs=1e-5)
        said = few @ w.numpy() + float(b) > 0
        assert balanced(torch.from_numpy(said), torch.from_numpy(t)) == pytest.approx(balanced_accuracy_score(t, said))


def test_a_probe_of_what_divides_exactly_is_finite():
    x = torch.arange(-8., 8)[:, None] + .5
    w, b = logistic(100*x, x[:, 0] > 0)
    assert w.isfinite().all() and b.isfinite() and balanced(100*x.double() @ w + b > 0, x[:, 0] > 0) == 1


# -- sparse probing ----------------------------------------------------------------------
def one_token(n, classes, seed=0):
    "n prompts of one token each, a class after the other."
    return [[i] for i in range(n)], [str(i % classes) for i in range(n)]


def test_a_latent_that_tells_a_class_is_found_and_noise_is_not():
    prompts, labels = one_token(160, 4)
    x = torch.zeros(160, 32)
    x[torch.arange(160), torch.arange(160) % 4] = 3
    model = embedded(x)
    told = sparse_probing(model, signed(), {'class': (prompts, labels)})
    r = told.tasks['class']
    assert r['sae_top_1_test_accuracy'] == r['llm_test_accuracy'] == r['llm_top_1_test_accuracy'] == 1
    assert r['shuffled_top_5_test_accuracy'] < .7 and told.figures()['sae_top_2_test_accuracy'] == 1
    noise = sparse_probing(embedded(0*x, noise=1.), signed(), {'class': (prompts, labels)}).tasks['class']
    assert all(v < .7 for v in noise.values())
    both = torch.where(torch.arange(160)[:, None] % 2 > 0, 3., 0.)*F.one_hot(torch.arange(160)//2 % 2, 32)
    halves = sparse_probing(embedded(both), signed(), {'odd': (prompts, [str(i % 2) for i in range(160)])}).tasks['odd']
    assert .7 < halves['sae_top_1_test_accuracy'] < .8 and halves['sae_top_2_test_accuracy'] > .97    # half of it each


def test_tasks_that_cannot_be_probed(mamba2):
    prompts = [[i] for i in range(20)]
    for labels, words in (('a'*20, '1 classes'), ('ab'*9 + 'cc', r"\['c'\] of fewer than 8"), ('a'*5, '5 labels for 20')):
        with pytest.raises(ValueError, match=words): sparse_probing(mamba2, random_sae(), {'x': (prompts, list(labels))})


def test_the_tasks_are_what_they_say():
    tasks = probing_tasks(160)
    assert {*tasks} == {'country', 'name', 'testament', 'question', 'kind'}
    capital = dict(map(tuple, tables()['facts']))
    for prompts, labels in tasks.values(): assert len(prompts) == len(labels) <= 160 and len({*labels}) > 1 and len({*prompts}) > .9*len(prompts)
    assert all(c in p or capital[c] in p for p, c in zip(*tasks['country']))
    assert all(p.count(c) == 1 for p, c in zip(*tasks['name'])) and not any(p[-1] in '.?' for p in tasks['question'][0])


# -- absorption --------------------------------------------------------------------------
def test_the_fraction_is_what_the_formula_says():
    rng = np.random.default_rng(0)
    value, index = torch.from_numpy(rng.random((50, 6))), torch.from_numpy(np.stack([rng.permutation(12)[:6] for _ in range(50)]))
    onto, needed, main = torch.from_numpy(rng.normal(size=12)), torch.from_numpy(rng.random(50)*2), [2, 5]
    part, full = absorbed(value, index, onto, main, needed, share=.4, most=2)
    seen = set()
    for v, j, s, got, all_of_it in zip(value.tolist(), index.tolist(), needed.tolist(), part.tolist(), full.tolist()):
        m = sum(a*float(onto[i]) for a, i in zip(v, j) if i in main)
        a = sum(sorted((max(a*float(onto[i]), 0) for a, i in zip(v, j) if i not in main))[-2:])
        taken = m < s and a >= .4*s
        assert got == pytest.approx(a/(a + max(m, 0)) if taken else 0)
        assert all_of_it == (taken and not {*main} & {*j})
        seen.add((taken, all_of_it))
    assert len(seen) == 3


def test_absorption_that_was_planted_is_found():
    """80 tokens of a class along one direction, 20 of which have a latent of their own that took it over.

    The latent of the class is silent there; each of the twenty is too rare to be a main latent.
    """
    own, n = 20, 80
    x = torch.zeros(160, 32)
    x[:n, 0] = 2
    x[torch.arange(own)*4, 1 + torch.arange(own)] = 2
    model, sae = embedded(x, noise=.02), SAE(SAEConfig(32, 1 + own, 1, 'embed', activation='relu'))
    sae.W_dec.data.zero_(), sae.W_enc.data.zero_()
    sae.W_dec[0, 0], sae.W_enc[0, 0] = 1, 1
    for i in range(own):
        sae.W_enc[1 + i, 0] = -1.2                                                       # silences the latent of the class
        sae.W_enc[1 + i, 1 + i], sae.b_enc[1 + i] = 2**.5, -.2                           # and fires in its place
        sae.W_dec[1 + i, [0, 1 + i]] = .5**.5
    labels = ['in']*n + ['out']*80
    r = absorption(model, sae, range(160), labels)
    test = _held(torch.tensor([0]*n + [1]*80), 0)
    taken = int(test[torch.arange(own)*4].sum())
    share = taken/int(test[:n].sum())
    assert r.classes['in']['split'] == 1 and r.classes['in']['probe'] == 1 and taken > 1
    assert r.classes['in']['fraction'] == pytest.approx(share) == r.classes['in']['full']
    sae.W_enc[1:1 + own, 0] = 0                                                          # both fire: it is shared, not taken
    both = absorption(model, sae, range(160), labels).classes['in']
    assert both['full'] == 0 and both['fraction'] <= share
    sae.b_enc[1:] -= 9                                                                   # none of its own: nothing is absorbed
    assert absorption(model, sae, range(160), labels).classes['in']['fraction'] == 0


def test_a_feature_that_is_split_is_counted():
    x = torch.zeros(160, 32)
    x[torch.arange(80), torch.arange(80) % 3] = 2                                        # three latents, a third each
    r = absorption(embedded(x), signed(), range(160), ['in']*80 + ['out']*80)
    assert r.classes['in']['split'] == 3 and r.figures()['classes'] == 2


def test_a_class_that_the_model_does_not_know_is_left_out(mamba2):
    r = absorption(mamba2, random_sae(), range(200), ['ab'[i % 2] for i in range(200)])
    assert r.figures()['mean_absorption_fraction_score'] is None and r.figures()['classes'] == 0 and 'knows no class' in repr(r)
    for call in (lambda: absorption(mamba2, random_sae(), [1, 2]), lambda: absorption(mamba2, random_sae(), [1, 2], ['a']),
                 lambda: word_tokens(mamba2), lambda: absorption(mamba2, random_sae(), [1, 2], ['a', 'b'])):
        with pytest.raises(ValueError, match='got'): call()


def test_words_of_the_vocabulary():
    model = load_model('tiny://mamba2')
    ids, letters = word_tokens(model)
    words = [model.tokenizer.decode([i]) for i in ids]
    assert len(ids) > 2000 and all(w[0] == ' ' and w[1:].isalpha() and w[1].lower() == c for w, c in zip(words, letters))


# -- targeted edits ----------------------------------------------------------------------
def test_a_latent_of_one_class_alone_is_a_perfect_target():
    prompts, labels = one_token(160, 4)
    x = torch.zeros(160, 32)
    x[torch.arange(160), torch.arange(160) % 4] = 3
    r = tpp(embedded(x), signed(), prompts, labels, ns=(1, 3))
    assert r.probe == 1 and r.by_n['1']['intended'] == .5 and r.by_n['1']['unintended'] == 0
    assert r.figures()['tpp_threshold_1_total_metric'] == .5 and r.by_n['1']['random'] < .15
    turn = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(3)))[0]
    mixed = signed()
    mixed.W_dec.data, mixed.W_enc.data = mixed.W_dec @ turn, turn.T @ mixed.W_enc           # the same, but no latent for a class
    other = tpp(embedded(x), mixed, prompts, labels, ns=(1, 3))
    assert other.by_n['1']['total'] < .25 and isinstance(other, TPP)


def test_a_cue_is_taken_out():
    "The cue is twice as strong as what is asked for: a probe fitted where both go together reads mostly the cue."
    a, b = [i % 2 > 0 for i in range(160)], [i % 4 > 1 for i in range(160)]
    x = torch.zeros(160, 32)
    x[:, 0], x[:, 1] = torch.tensor(a)*2. - 1, torch.tensor(b)*4. - 2
    r = scr(embedded(x), signed(), [[i] for i in range(160)], a, b, ns=(2,))
    assert r.biased[0] < .6 and r.unbiased == (1, 1) and r.biased[1] == 1
    assert r.by_n['2']['dir1'] == r.by_n['2']['metric'] == r.figures()['scr_metric_threshold_2'] == 1
    assert r.by_n['2']['dir2'] is None and r.by_n['2']['random'] < .3 and isinstance(r, SCR)
    with pytest.raises(ValueError, match='3 kinds|fewer than 8'): scr(embedded(x), signed(), [[i] for i in range(160)], a, [u and v for u, v in zip(a, b)])
    prompts, who, what = cue_prompts(3000)
    assert min(sum(u == p and v == q for u, v in zip(who, what)) for p in (0, 1) for q in (0, 1)) >= 8
    assert all(tables()['objects'][0 if v else 1] in p for p, v in zip(prompts, what))


@torch.no_grad()
@pytest.mark.parametrize('kind', KINDS)
def test_without_some_latents(mamba2, kind):
    "The run's activation is the clean one less what those latents add, and nothing else before it."
    sae, ids = KINDS[kind](), torch.randint(0, 257, (2, 7), generator=torch.Generator().manual_seed(0))
    x, t = vectors(mamba2, sae, ids)
    z = sae.encode(x.reshape(-1, sae.d_in)).view(*x.shape[:3], -1)
    rows = x.shape[2]
    chosen = torch.tensor(sorted({int(r*sae.d_sae + z[..., r, :].sum((0, 1)).argmax()) for r in range(rows)} | {0}))
    scale = x.std(-1, keepdim=True) if kind == 'layer norm' else 1
    keep = torch.zeros(rows, sae.d_sae)
    keep.view(-1)[chosen] = 1
    less = t - (z*keep) @ sae.W_dec*scale
    edits = without(mamba2, sae, ids, chosen)
    names = [p.site for p in sae.cfg.out]
    _, cache = mamba2.run_with_cache(ids, names, edit=edits, heads=sae.cfg.heads or None)
    if kind == 'state':                                                                  # later steps go on from the first
        assert torch.allclose(cache[names[0]][:, 0].flatten(2), less[:, 0], atol=1e-5)
        assert not torch.allclose(cache[names[0]][:, 1].flatten(2), t[:, 1], atol=1e-3)
    else:
        got = torch.cat([cache[n].flatten(3) if sae.cfg.heads else cache[n].flatten(2)[:, :, None] for n in names[:1]], -1)
        assert torch.allclose(got, less[..., :got.shape[-1]], atol=1e-5)
    assert torch.equal(mamba2.run(ids, edit=without(mamba2, sae, ids, torch.tensor([], dtype=torch.long))).logits.isfinite(),
                       torch.ones(2, 7, 257, dtype=torch.bool))


@pytest.mark.parametrize('kind', ['one', 'heads', 'transcoder', 'jumprelu', 'layer norm'])
def test_attribution_is_the_slope_of_taking_a_latent_out(kind):
    "Against differences: what the log-odds lose for a fiftieth of each latent."
    model, sae = load_model('mock://mamba2-tiny'), KINDS[kind]().double()
    model.hf.double()
    ids, answer = torch.randint(0, 257, (3, 6), generator=torch.Generator().manual_seed(1)), [5, 17, 200]
    found = attribution(model, sae, list(zip(ids, answer)))
    top = found.abs().topk(4).indices
    assert top.numel() == 4 and found.abs()[top].min() > 0
    def odds(edit):
        logits = model.run(ids, edit=edit).logits[:, -1]
        p = logits.softmax(-1)[range(3), answer]
        return float((p/(1 - p)).log().mean())
    with torch.no_grad():
        for j in top:
            edit = without(model, sae, ids, j[None])
            assert (odds(-.02*edit) - odds(.02*edit))/.04 == pytest.approx(float(found[j]), rel=1e-3)


def test_attribution_of_a_crosscoder_adds_its_places_and_that_of_a_state_its_steps(mamba2):
    ids = torch.randint(0, 257, (1, 5), generator=torch.Generator().manual_seed(1))
    for kind in ('crosscoder', 'state'):
        found = attribution(mamba2, KINDS[kind](), [(ids[0], 9)])
        assert found.isfinite().all() and found.count_nonzero() > 3


# -- one fact ----------------------------------------------------------------------------
def test_unlearning_counts_answers(mamba2, tmp_path):
    r = unlearn(mamba2, random_sae(), 'Japan', n=3, others=6, draws=2)
    assert len(r.latents) == 3 and r.prompts[1] == 6 and {*r.accuracy} == {'before', 'after', 'random'}
    assert all(0 <= v <= 1 for pair in r.accuracy.values() for v in pair) and 'prompts about Japan' in repr(r)
    assert Unlearning.load(r.save(tmp_path/'r.json')) == r == Result.load(tmp_path/'r.json')
    same = unlearn(mamba2, random_sae(), 'Japan', n=3, others=6, draws=2)
    assert same == r
    with pytest.raises(ValueError, match='a country'): unlearn(mamba2, random_sae(), 'Atlantis')


@torch.no_grad()
def test_what_is_judged_is_the_next_token(mamba2):
    from circuitbench.targeted import _answers, _asked
    from circuitbench.task import facts
    asked = _asked(mamba2, facts('held', 5))
    right, nats = [], []
    for x, y in asked:
        logp = mamba2.hf(input_ids=x[None]).logits[0, -1].double().log_softmax(-1).numpy()
        right.append(logp.argmax() == y)
        nats.append(-logp[y])
    assert _answers(mamba2, asked) == pytest.approx((np.mean(right), np.mean(nats)), rel=1e-5)
    zero = lambda ids: apply(SITE, torch.zeros_like)
    assert _answers(mamba2, asked, zero)[1] != pytest.approx(np.mean(nats))


def test_results_are_saved_plotted_and_compared(mamba2, tmp_path):
    prompts, labels = one_token(64, 4)
    sae = random_sae(site='embed', d_in=32)
    four = [i % 2 > 0 for i in range(64)], [i % 4 > 1 for i in range(64)]
    for r in (tpp(mamba2, sae, prompts, labels), scr(mamba2, sae, prompts, *four), sparse_probing(mamba2, sae, {'x': (prompts, labels)}),
              absorption(mamba2, sae, range(64), labels)):
        assert type(r).load(r.save(tmp_path/'r.json')) == r and r.plot().axes and repr(r)
    table = compare(mamba2, sae, torch.arange(200), 200, measure=tpp, context=20, prompts=prompts, labels=labels, ns=(2,))
    assert 'tpp_threshold_2_total_metric' in repr(table) and {'neurons', 'random dictionary'} <= {*table.rows}


# -- a trained coder ---------------------------------------------------------------------
@pytest.mark.slow
def test_a_trained_coder_does_better_than_a_random_one():
    model = load_model('tiny://mamba2')
    sae = train_sae(model, layer=2, tokens=60_000, progress=False)
    drawn = compare(model, sae, measure=tpp, ns=(10,), tokens=4096)
    assert drawn['SAE'].by_n['10']['total'] > .1 + max(drawn['random dictionary'].by_n['10']['total'], drawn['SAE'].by_n['10']['random'])
    core = compare(model, sae, tokens=4096)
    assert core['SAE'].fvu < core['PCA 32'].fvu and core['SAE'].ce_loss_score > core['random dictionary'].ce_loss_score
    r = unlearn(model, sae, 'Egypt', n=20, others=40)
    assert r.nats['after'][0] > 3*max(r.nats['before'][0], r.nats['random'][0]) and r.accuracy['after'][1] > .9
    assert r.nats['after'][0] - r.nats['before'][0] > 5*(r.nats['after'][1] - r.nats['before'][1])
