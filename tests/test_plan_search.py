"""Search for plans: its judge against plain hooks, its moves against every plan of a small space, files and budgets."""
import itertools
import json

import pytest
import torch
from test_subgraph import bare, hooks

from circuitbench import plan_search
from circuitbench.direction import Direction, mean_difference
from circuitbench.load import load_model
from circuitbench.plan_search import Candidate, Trial, as_candidates, propose, search_plans
from circuitbench.sae import SAE, SAEConfig
from circuitbench.scores import NeutralText, Score, judged, log_prob, prefers

PROMPTS = [[5, 9, 41, 7], [5, 9, 30, 7, 8]]
TEXT = torch.randint(1, 257, (2, 12), generator=torch.Generator().manual_seed(0))
QUIET = dict(progress=False, text=TEXT)


@pytest.fixture(scope='module')
def model(): return load_model('mock://mamba2-tiny')


def directions(model, n=4):
    g = torch.Generator().manual_seed(1)
    return [Direction(torch.randn(model.sizes['d_model'], generator=g), f'blocks.{k % 2}.resid_post', model.name, f'draw {k}') for k in range(n)]


def score(model, prompts): return torch.stack([model.run(p).logits[0, -1, 7] - model.run(p).logits[0, -1, 9] for p in prompts])


@torch.no_grad()
def by_hand(model, candidates, steps):
    "Score and KL with plain hooks on the bare model: pushes at every token."
    def put(i, v): return model.blocks[i], lambda out: (out[0] + v, *out[1:]) if isinstance(out, tuple) else out + v
    pairs = [put(int(candidates[k].direction.site.split('.')[1]), candidates[k].direction.vector*s) for k, s in steps]
    last = lambda p: model.hf(torch.tensor([p]), use_cache=False).logits[0, -1]
    after = lambda: model.hf(TEXT, use_cache=False).logits[:, 5:].double().log_softmax(-1)
    clean = after()
    with hooks(*pairs):
        value = torch.stack([last(p)[7] - last(p)[9] for p in PROMPTS]).mean()
        now = after()
    return float(value), float((clean.exp()*(clean - now)).sum(-1).mean())


@pytest.mark.parametrize('score', [score, prefers(7, 9)], ids=['alone', 'together'])
def test_a_trial_is_a_run_of_the_bare_model_with_hooks(model, score):
    found = search_plans(model, PROMPTS, score, directions(model), method='random', budget=6, most=10., **QUIET)
    assert len(found.trials) == 6 == len({t.steps for t in found.trials}) and bare(model) and not model.standing
    for t in found.trials: assert (t.score, t.kl) == pytest.approx(by_hand(model, found.candidates, t.steps), rel=1e-4, abs=1e-5)
    assert found.clean == pytest.approx(by_hand(model, found.candidates, ())[0], abs=1e-5)


def test_the_beam_finds_the_best_plan_of_a_small_space(model):
    "Every plan of up to two of four directions at two strengths, run; the beam needs less than half of the runs."
    some, strengths = as_candidates(directions(model)), (.5, 1.)
    every = [(k, s) for k in range(4) for v in strengths for s in (v, -v)]
    plans = [(a,) for a in every] + [p for p in itertools.combinations(every, 2) if p[0][0] != p[1][0]]
    values = {tuple(sorted(p)): by_hand(model, some, p) for p in plans}
    most = sorted(kl for _, kl in values.values())[len(values)//2]
    best = max(v for v, kl in values.values() if kl <= most)
    found = search_plans(model, PROMPTS, score, some, most=most, budget=len(plans)*2//5, strengths=strengths, depth=2, width=3, **QUIET)
    assert found.best.kl <= most and found.best.score >= best - .02*abs(best - found.clean)
    front = found.front()
    assert front[0].steps == () and all(a.kl < b.kl and a.score < b.score for a, b in itertools.pairwise(front))
    assert all(any(f.kl <= t.kl and f.score >= t.score for f in front) for t in found.trials)


@pytest.mark.parametrize('method', ['beam', 'random', 'single'])
def test_a_seed_and_a_file_give_the_same_search(model, method, tmp_path):
    some, options = directions(model), dict(method=method, budget=9, seed=3, **QUIET)
    whole = search_plans(model, PROMPTS, score, some, **options)
    calls, stop = [], 5
    def once(model, prompts):
        calls.append(1)
        if len(calls) == stop + 2: raise KeyboardInterrupt                 # the first call is the clean score
        return score(model, prompts)
    part = search_plans(model, PROMPTS, once, some, checkpoint=tmp_path/'trials', **options)
    assert part.note == 'interrupted' and [t.steps for t in part.trials] == [t.steps for t in whole.trials[:stop]]
    calls.clear()
    stop = 99
    rest = search_plans(model, PROMPTS, once, some, checkpoint=tmp_path/'trials', **options)
    assert len(calls) == 1 + 4 and rest.trials == whole.trials             # what had been run was not run again
    assert len((tmp_path/'trials').read_text().splitlines()) == 10
    with pytest.raises(ValueError, match='another search'): search_plans(model, PROMPTS, score, some[:2], checkpoint=tmp_path/'trials', **options)


def alone(score):
    "The same numbers, told by a function that knows nothing of rows."
    return lambda model, prompts: score(model, prompts)


def places(model):
    "Pushes and writes, at whole sites and at heads, and what their scores are of."
    g, some = torch.Generator().manual_seed(2), directions(model, 3)
    for site, heads in (('ssm.state', None), ('ssm.state', (1, 0)), ('ssm.y', (0,)), ('ssm.write', None)):
        shape = list(model.site_shape(f'blocks.1.{site}', 1, 1)[2:])
        if heads: shape[0] = len(heads)
        some.append(Direction(torch.randn(shape, generator=g), f'blocks.1.{site}', model.name, f'draw of {site}', heads=heads))
    return some


def same(a, b):
    "Two searches: the same plans in the same order, the same numbers, the same winner."
    assert [t.steps for t in a.trials] == [t.steps for t in b.trials] and a.best.steps == b.best.steps
    for key in ('score', 'kl'):
        assert [getattr(t, key) for t in a.trials] == pytest.approx([getattr(t, key) for t in b.trials], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize('name, method', [('mamba2-tiny', 'beam'), ('mamba2-tiny', 'random'), ('mamba2-tiny', 'single'), ('mamba1-tiny', 'beam'),
                                          ('rwkv7-tiny', 'beam'), ('falcon-h1-tiny', 'beam'), ('hymba-tiny', 'random')])
def test_plans_side_by_side_score_as_they_do_alone(name, method):
    model, prompts = load_model(f'mock://{name}'), [*PROMPTS, [3, 4, 8, 9]]
    some, text = places(model), [TEXT[0], TEXT[1, :7], TEXT[1]]
    for s in (prefers([7, 8, 9], 5), log_prob([7, torch.tensor([8, 9, 3]), torch.tensor([5, 6])])):
        both = [search_plans(model, prompts, f, some, text, method, 10., 21, seed=4, progress=False) for f in (s, alone(s))]
        same(*both)
        assert len(both[0].trials) == 21 and len({round(t.score, 4) for t in both[0].trials}) > 15
    assert bare(model) and not model.standing


def test_judged_text_is_written_side_by_side(model):
    s = judged(lambda t: sum(map(ord, t)) % 97, 4)
    same(*(search_plans(model, PROMPTS, f, directions(model), TEXT, 'random', 10., 10, strengths=(20., 40.), progress=False) for f in (s, alone(s))))


@pytest.mark.parametrize('first, then', [(0, 1), (1, 0)])
def test_files_are_of_one_kind_whether_plans_ran_alone_or_not(model, first, then, tmp_path):
    scores, options = (prefers(7, 9), alone(prefers(7, 9))), dict(method='random', seed=3, most=10., **QUIET)
    whole = search_plans(model, PROMPTS, scores[then], directions(model), budget=19, **options)
    search_plans(model, PROMPTS, scores[first], directions(model), budget=11, checkpoint=tmp_path/'t', **options)
    lines = (tmp_path/'t').read_text()
    rest = search_plans(model, PROMPTS, scores[then], directions(model), budget=19, checkpoint=tmp_path/'t', **options)
    same(rest, whole)
    assert (tmp_path/'t').read_text().startswith(lines) and len((tmp_path/'t').read_text().splitlines()) == 20
    assert [json.loads(x) for x in lines.splitlines()[1:]] == [[[list(e) for e in t.steps], t.score, t.kl] for t in rest.trials[:11]]


def test_how_many_plans_run_at_once(model, monkeypatch):
    "Eight; fewer where prompts are long, or the text is; one where a score is a function of prompts alone."
    seen, read, s, costs = [], [], prefers(7, 9), NeutralText.costs
    def _batch(model, ids, which, n):
        seen.append((len(ids), list(which), n))
        return s.batch(model, ids, which, n)
    def _costs(self, under, n, before=None):
        read.append(n)
        return costs(self, under, n, before)
    monkeypatch.setattr(NeutralText, 'costs', _costs)
    counted = Score('counted', s.f, True, _batch)
    def most(score):
        seen.clear(), read.clear()
        search_plans(model, PROMPTS, score, directions(model), TEXT, 'random', budget=19, progress=False)
        return [k for k, which, n in seen if which == [0]*k], read
    assert most(counted) == ([8, 8, 3], [8, 8, 3]) and seen[0][2] == 2 and seen[1][1] == [1]*8
    monkeypatch.setattr(plan_search, '_TOKENS', 3*TEXT.numel())
    assert most(counted) == ([8, 8, 3], [3, 3, 2, 3, 3, 2, 3])
    monkeypatch.setattr(plan_search, '_TOKENS', 25)                        # the longest prompt has five
    assert most(counted) == ([5, 5, 5, 4], [1]*19)
    monkeypatch.setattr(plan_search, '_TOKENS', 1)
    assert most(counted) == ([], [1]*19) and most(alone(s)) == ([], [1]*19)


def test_budgets(model):
    assert len(search_plans(model, PROMPTS, score, directions(model), budget=7, **QUIET).trials) == 7
    assert len(search_plans(model, PROMPTS, score, directions(model), seconds=0, **QUIET).trials) == 0
    alone = search_plans(model, PROMPTS, score, directions(model), method='single', budget=99, strengths=(1.,), **QUIET)
    assert sorted(t.steps for t in alone.trials) == [((k, s),) for k in range(4) for s in (-1., 1.)]


def test_nothing_is_better_than_harm(model):
    found = search_plans(model, PROMPTS, lambda m, p: -torch.ones(2)*bool(m.standing), directions(model), budget=5, **QUIET)
    assert found.best == Trial((), 0., 0.) and len(found.plan()) == 0 and 'nothing' in repr(found)


def test_states_are_written_once(model):
    d = mean_difference(model, [PROMPTS[0]], [PROMPTS[1]], 'ssm.state', 1, heads=[2])
    step = Candidate(d, d.norm).step(2.)
    assert (step.kind, step.at, step.value) == ('write', 'last', pytest.approx(2*d.norm))


def test_proposals_are_the_slope_of_the_metric(model):
    "By finite differences of a push on the bare model."
    site = 'blocks.0.resid_post'
    coder = SAE(SAEConfig(32, 24, 4, site, model=model.name, family='mamba2', shape=(32,), activation='relu'), 1)
    metric = lambda logits: logits[7] - logits[9]
    got = propose(model, PROMPTS, metric, [coder], 6)
    assert [abs(c.slope) for c in got] == sorted((abs(c.slope) for c in got), reverse=True) and len(got) == 6
    with torch.no_grad():
        seen = torch.cat([model.run_with_cache(p, site)[1][site][0] for p in PROMPTS])
        high = (((seen - coder.b_dec) @ coder.W_enc) + coder.b_enc).clamp_min(0).amax(0)
    for c in got[:3]:
        k = int(c.direction.source.split()[1])
        assert c.scale == pytest.approx(float(high[k]), rel=1e-4)
        h = .02
        up, down = (by_hand(model, as_candidates([c.direction]), ((0, s*c.scale),))[0] for s in (h, -h))
        assert c.slope == pytest.approx((up - down)/(2*h), rel=.02)


def test_errors(model):
    some = directions(model)
    for kw, said in ((dict(method='best'), "got method='best'"), (dict(budget=0), 'got budget=0'), (dict(candidates=[]), 'got no candidates'), (dict(prompts=[]), 'got no prompts'),
                     (dict(score=lambda m, p: torch.zeros(3)), r'got a score of shape \(3,\)'),
                     (dict(candidates=[Direction(torch.ones(32), 'blocks.0.resid_post', 'another', 'x')]), 'got a direction of another')):
        with pytest.raises(ValueError, match=said): search_plans(model, **dict(prompts=PROMPTS, score=score, candidates=some, **QUIET) | kw)
    assert bare(model) and not model.standing


def test_the_file_is_plain(model, tmp_path):
    search_plans(model, PROMPTS, score, directions(model), budget=3, checkpoint=tmp_path/'t', **QUIET)
    head, *rows = map(json.loads, (tmp_path/'t').read_text().splitlines())
    assert head['method'] == 'beam' and len(rows) == 3 and all(len(r) == 3 for r in rows)
