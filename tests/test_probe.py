"""Probes against scikit-learn on states that the model itself gives, planted labels, and controls that must find nothing."""
import random

import numpy as np
import pytest
import torch
from sklearn.linear_model import RidgeClassifier

from circuitbench.load import load_model
from circuitbench.probe import ProbeResult, probe_states, probe_view, random_twin
from circuitbench.ridge import cross_validated, ridge_scores, split
from circuitbench.task import tables

A, B = 50, 90


def planted(n=48, seed=0, lengths=(12,), place=4, fill=150):
    "Random ids in which the token at `place` is A or B, and which."
    rng = random.Random(seed)
    rows = [[rng.randrange(100, 100 + fill) for _ in range(lengths[i % len(lengths)])] for i in range(n)]
    labels = [rng.choice('ab') for _ in rows]
    for row, x in zip(rows, labels): row[place] = A if x == 'a' else B
    return rows, labels


def by_sklearn(X, y, fold, ridge):
    "Cross-validated accuracy of scikit-learn's ridge classifier with the same penalty."
    right = []
    for f in set(fold.tolist()):
        seen = fold != f
        alpha = ridge*np.square(X[seen] - X[seen].mean(0)).sum(1).mean()
        right.append(RidgeClassifier(alpha=alpha).fit(X[seen], y[seen]).predict(X[~seen]) == y[~seen])
    return np.concatenate(right).mean()


@pytest.mark.parametrize('classes, ridge', [(2, 1e-3), (2, 1.), (3, .01), (7, .1)])
def test_the_probe_is_scikit_learns(classes, ridge):
    rng = np.random.default_rng(classes)
    y = rng.permutation(np.arange(70) % classes)
    X = rng.normal(size=(70, 200)) + 3*rng.normal(size=(classes, 200))[y]*(rng.random(200) < .1) + 5
    fold = split(torch.from_numpy(y), range(70), 5)
    K, sides = torch.from_numpy(X @ X.T), torch.from_numpy(2.*(y[:, None] == np.arange(classes)) - 1)
    scores, f = ridge_scores(K, sides, fold, ridge).numpy(), fold.numpy()
    seen = f != 0
    alpha = ridge*np.square(X[seen] - X[seen].mean(0)).sum(1).mean()
    theirs = RidgeClassifier(alpha=alpha).fit(X[seen], y[seen]).decision_function(X[~seen])
    assert np.allclose(scores[~seen][:, -1] if classes == 2 else scores[~seen], theirs, atol=1e-8)
    ours = float(cross_validated(K, torch.from_numpy(y)[:, None], fold, ridge))
    assert abs(ours - by_sklearn(X, y, f, ridge)) < 1e-6 and ours > 1.2/classes


def test_folds_have_their_share_and_groups_stay_together():
    y = torch.tensor([0]*40 + [1]*20)
    fold = split(y, range(60), 5, seed=3)
    assert all((y[fold == f].bincount() == torch.tensor([8, 4])).all() for f in range(5))
    groups = [i % 12 for i in range(60)]
    fold = split(y, groups, 4)
    assert all(len({int(fold[i]) for i in range(60) if groups[i] == g}) == 1 for g in range(12)) and len(fold.unique()) == 4
    assert not torch.equal(split(y, range(60), 5, 0), split(y, range(60), 5, 1))


@pytest.mark.parametrize('family', ['mamba1', 'mamba2', 'falcon-h1', 'qwen3-next', 'rwkv7', 'hymba'])
def test_every_cell_is_scikit_learn_on_the_states_of_each_prompt(family):
    "Prompts of three lengths one by one, padded by nothing, states from the cache; meta tokens are no steps."
    model = load_model(f'mock://{family}-tiny')
    prompts, labels = planted(36, lengths=(9, 11, 14), place=3)
    layer = model.recurrent()[-1]
    at = {'read': 3, 'next': lambda words: 4, 'end': -1}
    r = probe_states(model, prompts, labels, layer, at=at, folds=4, random_weights=False, shuffles=2, progress=False)
    y = np.array([x == 'b' for x in labels]).astype(int)
    fold = split(torch.from_numpy(y), range(36), 4).numpy()
    names, found = [f'blocks.{layer}.ssm.state', f'blocks.{layer}.resid_pre'], []
    for p in prompts:
        _, c = model.run_with_cache([p], names, at=[3, 4, len(p) - 1])
        found.append([c[n][0].double() for n in names])
    S, stream = (torch.stack(x).numpy() for x in zip(*found))
    one = S.shape[3] == 1                                                  # heads are channels
    assert r.heads == (('all',) if one else tuple(map(str, range(S.shape[2]))))
    for j in range(3):
        each = [S[:, j].reshape(36, -1)] if one else [S[:, j, h].reshape(36, -1) for h in range(S.shape[2])]
        assert [by_sklearn(X, y, fold, .01) for X in each] == pytest.approx(r.accuracy[0, j].tolist(), abs=1e-6)
        assert by_sklearn(stream[:, j], y, fold, .01) == pytest.approx(float(r.stream[0, j]), abs=1e-6)


def test_all_heads_as_one_are_their_joined_states():
    model = load_model('mock://mamba2-tiny')
    prompts, labels = planted(30)
    r = probe_states(model, prompts, labels, 1, 'all', [6], random_weights=False, progress=False)
    y = np.array([x == 'b' for x in labels]).astype(int)
    X = model.run_with_cache(prompts, 'blocks.1.ssm.state', at=6)[1]['blocks.1.ssm.state'].flatten(1).double().numpy()
    assert by_sklearn(X, y, split(torch.from_numpy(y), range(30)).numpy(), .01) == pytest.approx(float(r.accuracy), abs=1e-6)


def test_a_label_in_one_head_is_found_there_once_it_was_read():
    "The other heads of the layer write nothing."
    model = load_model('mock://mamba2-tiny')
    mixer, d_inner, d_head = model.blocks[0].mixer, model.sizes['d_inner'], model.sizes['d_head']
    with torch.no_grad():
        for h in range(model.sizes['head']):
            if h == 2: continue
            rows = slice(h*d_head, (h + 1)*d_head)
            mixer.in_proj.weight[d_inner:][rows] = 0                       # z before x
            mixer.conv1d.weight[rows] = 0
            mixer.conv1d.bias[rows] = 0
    prompts, labels = planted(80, place=4, fill=4)
    r = probe_states(model, prompts, labels, 0, shuffles=20, progress=False)
    state = model.run_with_cache(prompts, 'blocks.0.ssm.state', at=8)[1]['blocks.0.ssm.state']
    assert [bool(state[:, :, h].any()) for h in range(4)] == [False, False, True, False]
    assert r.accuracy[0, 4, 2] > .95 and {h for *_, h, _ in r.top(4)} == {'2'}
    assert (r.accuracy[0, :4] <= r.noise).all() and (r.accuracy[0, :, [0, 1, 3]] <= r.chance + 1e-6).all()
    assert (r.shuffled.mean(-1) - .5).abs().max() < .1 and r.noise < .85
    assert (r.random[0, :4] <= r.noise + .05).all() and r.stream[0, 4] == 1 and (r.stream[0, :4] <= r.noise).all()


@pytest.mark.parametrize('family', ['rwkv7', 'falcon-h1'])
def test_prompts_that_begin_alike_cannot_be_told_apart(family):
    "The lengths give the label away, and so would the rounding of their runs: without care these states say it always."
    model = load_model(f'mock://{family}-tiny')
    start, rng = list(range(20, 30)), random.Random(0)
    rows = [start + [rng.randrange(100, 250) for _ in range(4 + 9*(i % 2))] for i in range(40)]
    r = probe_states(model, rows, [i % 2 for i in range(40)], at=[0, 5, 9], progress=False)
    assert (r.accuracy == r.accuracy[0, 0, 0]).all() and r.accuracy.max() <= .5
    assert (r.shuffled == r.shuffled[0, 0, 0]).all() and (r.random == .5).all() and (r.stream == .5).all()
    assert r.words == tuple(model.strings(torch.tensor(start))[t] for t in (0, 5, 9))


def test_which_name_came_first_is_known_once_it_was_read():
    "In a trained model, wordings that the probe has not seen."
    model, rng, t = load_model('tiny://mamba2'), random.Random(0), tables()
    texts, labels, groups = [], [], []
    for first, second in (('Mary', 'John'), ('John', 'Mary')):
        for wording in t['indirect_object']:
            for _ in range(8):
                text = wording.replace('{0}', first).replace('{1}', second)
                text = text.format(a='Ruth', b='Paul', place=rng.choice(t['places']), object=rng.choice(t['objects']))
                texts.append(text[:text.rindex(' ')])
                labels.append(first)
                groups.append(wording)
    r = probe_states(model, texts, labels, 3, at=[0, 2, 5, -1], groups=groups, folds=4, progress=False)
    assert (r.accuracy[0, 0] == .5).all()                                  # the wording's first word
    assert r.accuracy[0, 1:].mean() > .9 and (r.accuracy[0, 1:].amax(1) == 1).all()
    assert r.random[0, 1:].mean() < r.accuracy[0, 1:].mean() - .2
    assert (r.shuffled.mean((0, 2, 3)) - .5).abs().max() < .06 and r.noise < .9
    assert (r.selectivity[0, 1:].mean() > .4) and r.words[0] == ''


def test_the_same_seed_gives_the_same_and_files_keep_it(tmp_path):
    model = load_model('mock://hymba-tiny')
    prompts, labels = planted(24)
    ask = lambda **k: probe_states(model, prompts, labels, at=[2, -1], folds=3, shuffles=4, progress=False, **k)
    r = ask()
    again, back = ask(), ProbeResult.load(r.save(tmp_path/'a.safetensors'))
    for other in (again, back):
        assert all(torch.equal(getattr(r, k), getattr(other, k)) for k in ('accuracy', 'shuffled', 'random', 'stream'))
        assert repr(other) == repr(r) and (other.folds, other.ridge, other.seed) == (3, .01, 0)
    assert not torch.equal(ask(seed=1).shuffled, r.shuffled)
    plain = ask(random_weights=False)
    assert plain.random is None and ProbeResult.load(plain.save(tmp_path/'b.safetensors')).random is None
    assert torch.equal(plain.accuracy, r.accuracy) and 'random weights' not in probe_view(plain).split('Best cells')[0]
    page = r.to_html(tmp_path/'a.html').read_text()
    assert page.startswith('<!doctype html>') and 'random weights' in page and f'Layer {r.layers[-1]}' in page
    axes, _ = r.plot(r.layers[0]).axes[0], r.plot(head='all')
    assert [x.get_text() for x in axes.get_legend().get_texts()] == ['state', 'stream', 'shuffled labels', 'random weights']
    (tmp_path/'c.safetensors').write_bytes(b'no')
    with pytest.raises(ValueError, match='expected a file of ProbeResult.save'): ProbeResult.load(tmp_path/'c.safetensors')


def test_the_interval_is_wilsons():
    "Newcombe 1998, table I: 81 of 263, and 0 of 20."
    one = lambda k, n: ProbeResult('', ('a', 'b'), (n - 1, 1), (0,), ('0',), ('',), ('0',), 5, .01, 0, torch.full((1, 1, 1), k/n),
                                   torch.zeros(1, 1, 1, 1), None, torch.zeros(1, 1)).interval.flatten().tolist()
    assert one(81, 263) == pytest.approx([.2553, .3662], abs=1e-4) and one(0, 20) == pytest.approx([0, .1611], abs=1e-4)


def test_random_weights_are_the_same_numbers_elsewhere():
    model = load_model('mock://falcon-h1-tiny')
    before = {n: p.clone() for n, p in model.hf.named_parameters()}
    twin = dict(random_twin(model).hf.named_parameters())
    for n, p in model.hf.named_parameters():
        assert torch.equal(p, before[n]) and torch.equal(twin[n].flatten().sort()[0], p.flatten().sort()[0])
        assert torch.equal(twin[n], p) == (p.dim() < 2)


@pytest.mark.parametrize('ask, message', [
    (dict(labels='ab'), 'got 2 labels for 12 prompts'), (dict(labels=['a']*12), r"got the labels \['a'\], expected at least two"),
    (dict(labels=['a']*10 + ['b']*2), "got class 'b' in 2 prompts or groups, expected at least 3"),
    (dict(groups=[0]*12), "got class 'a' in 1 prompts or groups"), (dict(groups=[0]), 'got 1 groups for 12 prompts'),
    (dict(at=[8]), "got step 8 as '8' of prompt 0, expected -8 to 7"), (dict(at={'far': lambda words: -9}), "got step -9 as 'far'"),
    (dict(at=[]), 'got no steps'), (dict(heads=9), 'got heads=9'), (dict(heads=[]), r'got heads=\[\]'), (dict(layers=9), 'got block 9'),
    (dict(folds=1), 'got folds=1'), (dict(shuffles=0), 'shuffles=0'), (dict(ridge=0), 'got ridge=0')])
def test_what_cannot_be_probed_is_named(ask, message):
    model, (prompts, _) = load_model('mock://mamba2-tiny'), planted(12, lengths=(8,))
    with pytest.raises(ValueError, match=message):
        probe_states(model, prompts, **dict(labels='ab'*6, folds=3, progress=False) | ask)


def test_cells_that_are_not_there_are_named():
    r = ProbeResult('', ('a', 'b'), (5, 5), (1,), ('0',), ('',), ('0',), 5, .01, 0, torch.ones(1, 1, 1), torch.zeros(1, 1, 1, 1), None,
                    torch.zeros(1, 1))
    with pytest.raises(ValueError, match=r'got layer 0 and head None, expected some of \[1\]'): probe_view(r, 0)
    with pytest.raises(ValueError, match="got layer None and head 3"): r.plot(head=3)
