"""Effects of plans, against hooks on the bare transformers model, float64 numpy, scipy's bootstrap and a grid of strengths."""
import json
import math

import numpy as np
import oracle
import pytest
import scipy.stats
import torch

from circuitbench.direction import given_direction, state_difference
from circuitbench.effect import calibrate, dose_response, judged, keywords, log_prob, measure, prefers, random_control
from circuitbench.interventions import Token, ablate, decay, fires, hold, plan, push, swap, write
from circuitbench.load import load_model
from circuitbench.sae import SAE, SAEConfig
from circuitbench.scores import NeutralText, Outcome, Score, by_length, nats, perplexity_ratio, prompt_rows, scored
from circuitbench.site import families

SITE = 'blocks.1.mixer_out'
PROMPTS = [torch.tensor(p) for p in ([5, 9, 41, 7, 200], [9, 3, 77], [8, 8, 100, 4, 11], [60, 61, 62, 63, 64, 65, 66])]
TEXT = [torch.tensor(t) for t in np.random.default_rng(0).integers(0, 257, (5, 12))] + [torch.tensor([4, 250, 17, 90, 33, 21, 6])]


@pytest.fixture(scope='module')
def model(): return load_model('mock://mamba2-tiny')


@pytest.fixture(scope='module')
def wrong(model):
    "Towards a token that `own` does not have."
    return given_direction(model, model.hf.get_output_embeddings().weight[99], SITE)


@pytest.fixture(scope='module')
def own(model):
    "What the bare model writes itself: the further a push goes, the less likely it is."
    rows = [p.tolist() for p in PROMPTS]
    for row in rows:
        while len(row) < 12: row.append(int(logits(model, row)[-1].argmax()))
    return [torch.tensor(r) for r in rows]


def vector(n, seed=0): return torch.randn(n, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope='module')
def direction(model): return given_direction(model, vector(32), SITE)


def bare(model): return not model.standing and not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def logits(model, ids, direction=None, strength=0., at=slice(None)):
    "Of the bare model with a push by a plain hook, (pos, d_vocab), float64."
    def added(m, args, out):
        out = out.clone()
        if direction is not None: out[:, at] += strength*direction.vector/direction.vector.norm()
        return out
    handle = model.blocks[1].mixer.register_forward_hook(added)
    try: return model.hf(torch.as_tensor(ids)[None]).logits[0].detach().double().numpy()
    finally: handle.remove()


def logp(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def costs(model, rows, start, direction, strength, at):
    "KL and loss of log-likelihood at each token that is measured, of all rows, by numpy."
    kl, loss = [], []
    for ids in rows:
        s = start(len(ids))
        p, q = (logp(v)[s - 1:] for v in (logits(model, ids), logits(model, ids, direction, strength, at(s))))
        kl += (np.exp(p)*(p - q)).sum(-1).tolist()
        loss += [a[t] - b[t] for a, b, t in zip(p, q, ids[s:].tolist())]
    return np.mean(kl), np.exp(np.mean(loss))


# -- scores ------------------------------------------------------------------------------
@pytest.mark.parametrize('strength', [0., 3.])
def test_scores_of_one_token_are_those_of_a_hook(model, direction, strength):
    target, other = [17, 30, 250, 4], 99
    with plan(push(direction, strength)).on(model):
        a, b = log_prob(target)(model, PROMPTS), prefers(target, other)(model, PROMPTS)
    want = [logits(model, p, direction, strength)[-1] for p in PROMPTS]
    np.testing.assert_allclose(a, [logp(v)[t] for v, t in zip(want, target)], atol=2e-3)
    np.testing.assert_allclose(b, [v[t] - v[other] for v, t in zip(want, target)], atol=2e-3)
    assert a.shape == b.shape == (4,) and bare(model)


@pytest.mark.parametrize('at', ['generated', 'last', 'prompt', None])
def test_a_text_of_several_tokens_is_taken_for_generated(model, direction, at):
    targets = [torch.tensor([17, 0, 30]), torch.tensor([250, 4]), torch.tensor([1]), torch.tensor([0, 0, 0])]    # 0 ends a text
    with plan(push(direction, 3., at=at)).on(model): got = log_prob(targets)(model, PROMPTS)
    for p, t, value in zip(PROMPTS, targets, got):
        n = len(p)
        where = {'generated': slice(n, None), 'last': slice(n - 1, n), 'prompt': slice(n), None: slice(None)}[at]
        lp = logp(logits(model, torch.cat([p, t]), direction, 3., where))[n - 1:-1]
        assert float(value) == pytest.approx(sum(lp[i, k] for i, k in enumerate(t.tolist())), abs=5e-3)


@pytest.mark.parametrize('family', sorted(families()))
def test_families_write_a_given_text_as_they_read_it(family):
    model, (p, t) = load_model(f'mock://{family}-tiny'), (torch.tensor([[5, 9, 41], [7, 200, 8]]), torch.tensor([17, 0, 30, 8]))
    with torch.no_grad(): lp = logp(model.hf(torch.cat([p, t.expand(2, -1)], 1)).logits[:, 2:-1].double().numpy())
    np.testing.assert_allclose(log_prob(t)(model, list(p)), lp[:, range(4), t].sum(1), atol=5e-3)


def test_targets_are_texts_ids_or_one_for_each_prompt(model):
    a = log_prob('é!')(model, ['Hello', 'you there'])
    ids = model.tokenizer('é!', add_special_tokens=False)['input_ids']
    assert len(ids) == 3
    for text, value in zip(['Hello', 'you there'], a):
        p = model.tokenizer(text, add_special_tokens=False)['input_ids']
        lp = logp(logits(model, p + ids))[len(p) - 1:-1]
        assert float(value) == pytest.approx(sum(lp[i, k] for i, k in enumerate(ids)), abs=2e-3)
    assert torch.equal(log_prob(['a', 'b'])(model, ['xy', 'xz'])[:1], log_prob('a')(model, ['xy', 'xz'])[:1])


def test_text_is_judged_as_a_decoding_token_by_token_writes_it(model, direction):
    seen = []
    def _keep(text):
        seen.append(text)
        return len(text)
    where = plan(push(direction, 5.))
    with where.on(model): lengths = judged(_keep, 4)(model, PROMPTS[:2])
    texts = []
    for p in PROMPTS[:2]:
        ids = p.tolist()
        for _ in range(4): ids.append(int(logits(model, ids, direction, 5.)[-1].argmax()))
        texts.append(model.tokenizer.decode(ids[len(p):], skip_special_tokens=True))
    assert seen == texts and lengths.tolist() == [float(len(t)) for t in texts] and bare(model)


def test_keywords_are_whole_words_in_any_case():
    class Writer:                                                        # what it writes is known
        tokenizer, name, sizes = object(), 'a writer', {'d_vocab': 5}
        def tokens(self, p): return torch.tensor([[p]]), None
        def generate(self, ids, n):
            return type('G', (), {'text': [['The KING spoke', 'kings', 'a vi-king', '"king"', ''][int(i)] for i in ids[:, 0]]})
    assert keywords(['king', ' queen'], 5)(Writer(), range(5)).tolist() == [1, 0, 1, 1, 0]


# -- cost --------------------------------------------------------------------------------
WHERE = {'generated': lambda s: slice(s, None), 'last': lambda s: slice(s - 1, s), 'prompt': slice, None: lambda s: slice(None)}


@pytest.mark.parametrize('at', WHERE)
def test_kl_and_perplexity_are_those_of_numpy(model, direction, at):
    e = measure(model, push(direction, 4., at=at), PROMPTS, log_prob(7), TEXT, controls=0, progress=False)
    kl, ratio = costs(model, TEXT, lambda n: n//2, direction, 4., WHERE[at])
    assert e.steered.kl.value == pytest.approx(kl, rel=5e-3, abs=1e-6) and kl > 1e-4
    assert e.steered.ratio.value == pytest.approx(ratio, rel=1e-3) and e.steered.touched == 1
    assert e.clean.kl.value == 0 and e.clean.ratio.value == 1 and e.clean.touched == 0
    assert 'second halves' in e.text and bare(model)


def test_without_text_the_prompts_are_read_whole(model, direction):
    e = measure(model, push(direction, 4.), PROMPTS, log_prob(7), controls=0, progress=False)
    kl, ratio = costs(model, PROMPTS, lambda n: 1, direction, 4., lambda s: slice(None))
    assert (e.steered.kl.value, e.steered.ratio.value) == (pytest.approx(kl, rel=5e-3), pytest.approx(ratio, rel=1e-3))


def test_a_prompt_that_asks_for_it_goes_before_prompts_and_text(model):
    ask, score = torch.tensor([3, 70, 71]), prefers(17, 99)
    e = measure(model, plan(), PROMPTS, score, TEXT, controls=0, prompted=ask, progress=False)
    want = [logits(model, torch.cat([ask, p]))[-1] for p in PROMPTS]
    np.testing.assert_allclose(e.prompted.scores, [v[17] - v[99] for v in want], atol=2e-3)
    kl, loss = [], []
    for t in TEXT:
        s = len(t)//2
        p, q = logp(logits(model, t))[s - 1:], logp(logits(model, torch.cat([ask, t])))[3 + s - 1:]
        kl += (np.exp(p)*(p - q)).sum(-1).tolist()
        loss += [a[k] - b[k] for a, b, k in zip(p, q, t[s:].tolist())]
    assert e.prompted.kl.value == pytest.approx(np.mean(kl), rel=5e-3)
    assert e.prompted.ratio.value == pytest.approx(np.exp(np.mean(loss)), rel=1e-3) and 'prompting' in repr(e)


def test_batches_and_kept_logits_change_nothing(model, direction, monkeypatch):
    from circuitbench import scores
    under = lambda ids, n: plan(push(direction, 4., at='generated')).on(model, n)
    whole = NeutralText(model, TEXT)
    first, again = whole.cost(under), whole.cost(under)
    monkeypatch.setattr(scores, '_KEPT', 0)
    parts = NeutralText(model, TEXT)
    parts.batches = [([i], t[None]) for i, t in enumerate(TEXT)]
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(parts.cost(under), first, rtol=2e-3, atol=1e-5)
    assert whole.kept and not parts.kept


def test_a_token_that_the_text_lacks_is_no_error_and_is_told(model, direction):
    words, early = ['ab?cdefgh', 'abxcdefgh', 'abcdefg?h'], given_direction(model, vector(32), 'blocks.0.mixer_out')
    e = measure(model, push(early, 4., at=Token('?')), ['why?', 'who?'], log_prob(7), words, controls=1, progress=False)
    assert e.steered.touched == pytest.approx(1/3) and '33% touched' in repr(e)
    with pytest.raises(ValueError, match="got Token"):
        measure(model, push(direction, 4., at=Token('?')), ['why', 'who?'], log_prob(7), words, progress=False)


def test_batches_are_bounded_and_hold_every_row_once(model):
    rows = [torch.full((n,), i) for i, n in enumerate([3, 7, 3, 3, 40, 7, 3, 3])]
    got = list(by_length(model, rows, 9))
    assert sorted(i for some, _ in got for i in some) == list(range(8)) and len(got) == 2 + 2 + 1
    assert all(ids.numel() <= 9 or len(ids) == 1 for _, ids in got)
    assert all(torch.equal(ids[k], rows[i]) for some, ids in got for k, i in enumerate(some))


def test_intervals_are_those_of_scipy():
    make = np.random.default_rng(3)
    scores, cost = make.normal(1, 2, 60), np.c_[make.gamma(2, .1, 40)*20, np.full(40, 20.), make.normal(2, 3, 40), make.integers(5, 30, 40)]
    o = Outcome.of('x', scores, cost, True)
    options = dict(method='percentile', n_resamples=4000, rng=np.random.default_rng(0))
    def _like(ours, data, of, paired=True):
        theirs = scipy.stats.bootstrap(data, of, paired=paired, vectorized=False, **options).confidence_interval
        width = theirs.high - theirs.low
        assert abs(ours.low - theirs.low) < .15*width and abs(ours.high - theirs.high) < .15*width
    _like(o.score, (scores,), np.mean)
    _like(o.success, ((scores > 0).astype(float),), np.mean)
    _like(o.kl, (cost[:, 0], cost[:, 1]), lambda a, b: a.sum()/b.sum())
    _like(o.ratio, (cost[:, 2], cost[:, 3]), lambda a, b: math.exp(a.sum()/b.sum()))
    assert o.score.value == pytest.approx(scores.mean()) and o.kl.value == pytest.approx(cost[:, 0].sum()/800)
    assert nats(cost) == o.kl.value and perplexity_ratio(cost) == o.ratio.value
    assert perplexity_ratio(np.array([[1, 1, 1e4, 1]])) == math.inf


# -- random plans ------------------------------------------------------------------------
def test_random_directions_have_the_length_and_differ_by_seed(model, direction):
    state = state_difference(model, PROMPTS[0], PROMPTS[1], 1, [0, 2])
    p = plan(push(direction, 3.), push(direction, -1., at='last'), write(state, .7), ablate(direction, at='prompt'))
    a, b, again = (random_control(model, p, PROMPTS, s) for s in (0, 1, 0))
    for old, x, y, z in zip(p.steps, a.steps, b.steps, again.steps):
        assert x.kind == old.kind and x.value == old.value and x.at == old.at and x.heads == old.heads
        assert x.direction.norm == pytest.approx(old.direction.norm, rel=1e-6) and x.direction.vector.shape == old.direction.vector.shape
        assert torch.equal(x.direction.vector, z.direction.vector) and not torch.equal(x.direction.vector, y.direction.vector)
        assert abs(x.direction.cosine(old.direction)) < .7
    assert a.steps[0].direction is a.steps[1].direction is a.steps[3].direction is not a.steps[2].direction
    with a.on(model): changed = model.run(PROMPTS[0]).logits
    assert not torch.allclose(changed, model.run(PROMPTS[0]).logits) and bare(model)


@pytest.mark.parametrize('activation', ['topk', 'relu'])
def test_a_hold_moves_each_token_by_as_much_along_another_latent(model, activation):
    coder = SAE(SAEConfig(d_in=32, d_sae=16, site='blocks.0.resid_post', k=4, activation=activation), seed=1)
    coder.W_dec.mul_(torch.linspace(.5, 2, 16)[:, None])
    p = plan(hold(coder, 3, 5., when=fires(coder, 2, -1.)))
    new = random_control(model, p, PROMPTS, 4).steps[0]
    x = vector(6*32).view(1, 6, 32)
    z = coder.encode(x)[0, :, 3].double().numpy()
    change = (new.value - new.coder.encode(x)[0, :, 3].double().numpy())[:, None]*new.coder.W_dec[3].double().numpy()
    np.testing.assert_allclose(np.linalg.norm(change, axis=1), abs(5 - z)*float(coder.W_dec[3].norm()), rtol=1e-5)
    rows = coder.W_dec/coder.W_dec.norm(dim=1, keepdim=True)
    cosines = (rows @ new.coder.W_dec[3])/new.coder.W_dec[3].norm()
    assert cosines.max() == pytest.approx(1, abs=1e-5) and int(cosines.argmax()) != 3
    assert new.when is p.steps[0].when and torch.equal(torch.cat([new.coder.W_dec[:3], new.coder.W_dec[4:]]), torch.cat([coder.W_dec[:3], coder.W_dec[4:]]))
    seen = {int((rows @ random_control(model, p, PROMPTS, s).steps[0].coder.W_dec[3]).argmax()) for s in range(12)}
    assert len(seen) > 3 and 3 not in seen


def test_in_the_place_of_a_swap_a_vector_as_long_is_written(model):
    state = state_difference(model, PROMPTS[3], None, 1, [1, 3])
    new = random_control(model, plan(swap(state)), PROMPTS, 2).steps[0]
    moves = [state.vector.double().numpy() - oracle.run(model.hf, p[None])['blocks.1.ssm.state'][0, -1, [1, 3]] for p in PROMPTS[:3]]
    mean = np.mean([np.linalg.norm(m) for m in moves])                    # the last prompt's own state is not moved but for rounding
    assert new.kind == 'write' and new.at == 'last' and new.heads == (1, 3)
    three = random_control(model, plan(swap(state)), PROMPTS[:3], 2).steps[0]
    assert three.value == pytest.approx(mean, rel=1e-4) and torch.equal(three.direction.vector, new.direction.vector)


def test_a_decay_acts_at_other_heads(model, direction):
    p = plan(decay(1, 3., heads=[0, 1]))
    new = [random_control(model, p, PROMPTS, s).steps[0] for s in range(8)]
    assert all(s.kind == 'decay' and s.value == 3 and len({*s.heads}) == 2 and max(s.heads) < 4 for s in new)
    assert len({tuple(sorted(s.heads)) for s in new}) > 1
    e = measure(model, decay(1, 3.), PROMPTS, log_prob(7), TEXT, controls=3, progress=False)
    assert not e.controls and 'nothing to draw at random' in repr(e)


# -- everything side by side ---------------------------------------------------------------
def test_an_effect_tells_all_of_it(model, direction, tmp_path):
    p, score = plan(push(direction, 3.)), prefers(17, 99)
    e = measure(model, p, PROMPTS, score, TEXT, controls=3, seed=5, prompted='ask', progress=False)
    clean, steered = (np.array([v[17] - v[99] for v in (logits(model, q, direction, s)[-1] for q in PROMPTS)]) for s in (0, 3.))
    np.testing.assert_allclose(e.clean.scores, clean, atol=2e-3)
    np.testing.assert_allclose(e.steered.scores, steered, atol=2e-3)
    assert e.gain.value == pytest.approx((steered - clean).mean(), abs=2e-3) and e.steered.success.value == (steered > 0).mean()
    for k, c in enumerate(e.controls):
        other = random_control(model, p, PROMPTS, 5*2**16 + k).steps[0].direction
        want = [v[17] - v[99] for v in (logits(model, q, other, 3.)[-1] for q in PROMPTS)]
        np.testing.assert_allclose(c.scores, want, atol=2e-3)
    assert e.above == sum(steered.mean() > c.score.value for c in e.controls) and len({c.score.value for c in e.controls}) == 3
    assert json.loads(json.dumps(e.to_dict()))['steered']['kl']['value'] == e.steered.kl.value
    lines = repr(e).splitlines()
    assert len(lines) == 7 and lines[2].startswith('clean') and lines[5].startswith('3 random') and 'of 3 random plans' in lines[6]


def test_an_interrupt_keeps_what_is_done(model, direction):
    def _stops(after):
        calls = iter(range(99))
        def _score(m, p):
            if next(calls) >= after: raise KeyboardInterrupt
            return log_prob(7)(m, p)
        return _score
    p = push(direction, 3.)
    e = measure(model, p, PROMPTS, _stops(4), TEXT, controls=5, progress=False)
    assert len(e.controls) == 2 and 'interrupted' in repr(e) and bare(model)
    with pytest.raises(KeyboardInterrupt): measure(model, p, PROMPTS, _stops(1), TEXT, progress=False)
    make = lambda s: push(direction, s)
    d = dose_response(model, make, [1, 2, 3], PROMPTS, _stops(3), TEXT, progress=False)
    assert d.strengths == (1, 2) and 'interrupted' in repr(d)
    c = calibrate(model, make, PROMPTS, _stops(2), 1e6, TEXT, progress=False)
    assert [t.strength for t in c.trials] == [1, 2] and c.strength == 2 and 'interrupted' in repr(c) and bare(model)
    with pytest.raises(KeyboardInterrupt): calibrate(model, make, PROMPTS, _stops(0), 2., TEXT, progress=False)


# -- strengths -----------------------------------------------------------------------------
def test_the_strength_found_is_the_grid_s(model, wrong, own):
    grid = np.arange(.2, 6, .2)
    ratios = np.array([costs(model, own, lambda n: n//2, wrong, s, lambda s: slice(None))[1] for s in grid])
    limit = float(ratios[17] + ratios[18])/2
    first = int(np.argmax(ratios > limit))
    assert limit > 1.1 and first == 18 and ratios[:3].max() < 1 and (np.diff(ratios[3:]) > 0).all()
    make = lambda s: push(wrong, s)
    for bounds in (dict(), dict(high=25.), dict(low=.8), dict(low=.9, high=4.)):
        c = calibrate(model, make, PROMPTS, log_prob(7), limit, own, tolerance=.01, progress=False, **bounds)
        assert grid[17] - .01*grid[18] <= c.strength <= grid[18], bounds
        assert c.found.ratio.value <= limit and all(t.ratio.value > limit for t in c.trials if t.strength > c.strength)
        assert c.trials == tuple(sorted(c.trials, key=lambda t: t.strength)) and 'monotone' not in repr(c)
    at = c.found.strength
    assert c.found.score.value == pytest.approx(np.mean([logp(logits(model, p, wrong, at)[-1])[7] for p in PROMPTS]), abs=2e-3)
    assert f'{at:.4g}' in repr(c) and json.dumps(c.to_dict())


def test_what_recovers_further_up_does_not_count(model, wrong, own):
    make = lambda s: push(wrong, 6*math.sin(s))                            # outside around pi/2, clean again at pi
    limit = costs(model, own, lambda n: n//2, wrong, 3., lambda s: slice(None))[1]
    c = calibrate(model, make, PROMPTS, log_prob(7), limit, own, high=math.pi, tolerance=.01, progress=False)
    assert math.asin(.5)*.98 < c.strength < math.asin(.5) + 1e-4 and 'monotone' not in repr(c)
    wide = calibrate(model, make, PROMPTS, log_prob(7), 100*limit, own, high=math.pi, progress=False)
    assert wide.strength == math.pi and 'even 3.142, the largest tried, stays within' in repr(wide)
    assert 'not monotone: it falls from 1.571 to 3.142' in repr(wide)


def test_ends_are_told(model, direction, wrong, own):
    score = log_prob(7)
    still = calibrate(model, lambda s: push(direction, s, at=Token('?')), ['a?'], score, 1.1, ['abcdef'], high=8., progress=False)
    assert still.strength == 8 and 'none of them does anything' in repr(still) and 'largest tried, stays within' in repr(still)
    wild = calibrate(model, lambda s: push(wrong, 50.), PROMPTS, score, 1.001, own, progress=False)
    assert wild.strength == 0 and wild.found is None and 'smallest tried, is outside' in repr(wild) and len(wild.trials) == 40
    with pytest.raises(ValueError, match='got low=500'): calibrate(model, lambda s: push(wrong, s), PROMPTS, score, 1.001, own, low=500., progress=False)


def test_a_ratio_that_is_no_number_is_outside(model, direction, monkeypatch):
    of = Outcome.of
    def _lost(name, scores, cost, signed, strength): return of(name, scores, cost if strength < 3 else math.nan*cost, signed, strength)
    monkeypatch.setattr(Outcome, 'of', _lost)
    c = calibrate(model, lambda s: push(direction, s), PROMPTS, log_prob(7), 1e9, TEXT, tolerance=.05, progress=False)
    assert 2.8 <= c.strength < 3 and all(math.isnan(t.ratio.value) and t.touched == 1 for t in c.trials if t.strength >= 3)


def test_a_dose_response_is_measured_at_each_strength(model, direction, tmp_path):
    d = dose_response(model, lambda s: push(direction, s), [4, 1, 2., 4], PROMPTS, prefers(17, 99), TEXT, progress=False)
    assert d.strengths == (1, 2, 4)
    for o in d.outcomes:
        want = [v[17] - v[99] for v in (logits(model, p, direction, o.strength)[-1] for p in PROMPTS)]
        np.testing.assert_allclose(o.scores, want, atol=2e-3)
        kl, ratio = costs(model, TEXT, lambda n: n//2, direction, o.strength, lambda s: slice(None))
        assert (o.kl.value, o.ratio.value) == (pytest.approx(kl, rel=5e-3), pytest.approx(ratio, rel=1e-3))
        assert o.score.low <= o.score.value <= o.score.high and o.kl.low <= o.kl.value <= o.kl.high
    page = d.to_html(tmp_path/'dose.html').read_text()
    assert 'logit of token 17 over token 99' in page and page.count('<figure') >= 3
    ax = d.plot().axes
    np.testing.assert_allclose(ax[1].lines[0].get_ydata(), [o.kl.value for o in d.outcomes])
    assert len(ax) == 3 and json.dumps(d.to_dict()) and len(repr(d).splitlines()) == 7


# -- errors --------------------------------------------------------------------------------
def test_what_cannot_be_is_refused(model, direction):
    p, score, quiet = push(direction, 1.), log_prob(7), dict(progress=False)
    make = lambda s: push(direction, s)
    def refused(match, f, *args, kind=ValueError, **more):
        with pytest.raises(kind, match=match): f(*args, **more)
        assert bare(model)
    refused('got no prompts', measure, model, p, [], score, **quiet)
    refused('got no prompts', log_prob(7), model, [])
    refused('got 2 prompts in the place of one', prompt_rows, model, [torch.zeros(2, 3)])
    refused(r'shape \(4, 2\), expected a tensor of shape \(4,\)', measure, model, p, PROMPTS, lambda m, r: torch.zeros(4, 2), **quiet)
    refused('that is a float', scored, lambda m, r: 3., model, PROMPTS)
    refused('got a score None', measure, model, p, PROMPTS, None, kind=TypeError, **quiet)
    refused('plan that is a list', measure, model, [p], PROMPTS, score, kind=TypeError, **quiet)
    refused('got rows in the step', measure, model, push(direction, 1., rows=[0]), PROMPTS, score, **quiet)
    refused('got controls=-1', measure, model, p, PROMPTS, score, controls=-1, **quiet)
    refused('row of 1 token', measure, model, p, [[5]], score, **quiet)
    refused('row of 1 token', measure, model, p, PROMPTS, score, [[5]], **quiet)
    refused("got target ''", log_prob(''), model, PROMPTS)
    refused('got target 3.5', log_prob(3.5), model, PROMPTS)
    refused('token ids from 999 to 999', log_prob(999), model, PROMPTS)
    refused('got 2 targets for 4 prompts', log_prob([1, 2]), model, PROMPTS)
    refused('got a target of 2 tokens', prefers('ab', 'c'), model, PROMPTS)
    refused('got words', keywords, [])
    for bad in (1., .5, math.nan, math.inf): refused('got ratio=', calibrate, model, make, PROMPTS, score, bad, **quiet)
    for bad in (0., 1., math.nan): refused('got tolerance=', calibrate, model, make, PROMPTS, score, tolerance=bad, **quiet)
    for bad in (-1., math.nan, True): refused('got low=', calibrate, model, make, PROMPTS, score, low=bad, **quiet)
    for bad in (2., 1., math.inf): refused('got high=', calibrate, model, make, PROMPTS, score, low=2., high=bad, **quiet)
    refused('got strength=nan', dose_response, model, make, [1., math.nan], PROMPTS, score, **quiet)
    refused('got no strengths', dose_response, model, make, [], PROMPTS, score, **quiet)


def test_a_condition_that_is_never_true_is_told_of_prompts_alone(model, direction):
    coder = SAE(SAEConfig(d_in=32, d_sae=16, site='blocks.0.resid_post', k=4), seed=1)
    never = push(direction, 1., when=fires(coder, 2, 1e6))
    with pytest.warns(UserWarning, match='never true') as seen:
        measure(model, never, PROMPTS, Score('s', log_prob(7).f), TEXT, controls=0, progress=False)
    assert len(seen) == 1
