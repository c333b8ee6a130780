"""The trained models of known mechanism: they do their task, and every cut and swap costs what their cards say."""
import hashlib
import json
import math
import socket

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from circuitbench.edit import Edits, patch, zero
from circuitbench.graph import model_graph
from circuitbench.hook import HookedModel
from circuitbench.pairs import accuracy
from circuitbench.site import families
from circuitbench.taps import cut_tap
from circuitbench.trained import (
    TRUTH,
    chain_oracle,
    chains,
    cut_scores,
    interchange,
    load_trained,
    markov_draws,
    node_scores,
    oracle_kl,
    oracle_skill,
    recall_draws,
    score_label,
    task_score,
    trained_card,
    trained_draws,
    trained_labels,
    trained_models,
)

NAMES = trained_models()
RECALL = [n for n in NAMES if trained_card(n)['task'] == 'recall']
MQAR = [n for n in NAMES if n.startswith('mqar-trained-')]
FRESH = 12345                                                           # no draw of training or of the cards


@pytest.fixture(scope='module', params=NAMES)
def opened(request):
    "Name, card, model and 256 fresh pairs."
    torch.set_num_threads(1)
    name = request.param
    return name, trained_card(name), load_trained(name), trained_draws(name, 256, FRESH)


def near(got, said, n=256):
    "Are two shares as close as draws let them be?"
    return abs(got - said) <= .01 + 4*math.sqrt(max(said*(1 - said), .001)/n)


def test_what_ships():
    assert {*NAMES} >= {'mqar-trained-0', 'mqar-trained-1', 'mqar-trained-2', 'mqar-trained-3', 'markov-trained', 'mqar-mamba1-trained', 'hybrid-trained'}
    sizes = {n: sum(p.stat().st_size for p in (TRUTH/n).iterdir()) for n in NAMES}
    assert all(size < 160_000 for size in sizes.values()) and sum(sizes.values()) < 1.5e6
    for n in NAMES: assert {p.name for p in (TRUTH/n).iterdir()} >= {'model.safetensors', 'config.json', 'card.json'}
    weights = {hashlib.sha256((TRUTH/n/'model.safetensors').read_bytes()).hexdigest() for n in NAMES}
    assert len(weights) == len(NAMES)                                   # seeds are not copies of each other


def test_loads_whole_in_float32_without_a_network(opened, monkeypatch):
    name, card, _, _ = opened
    def refuse(*args, **kwargs): raise AssertionError('a connection')
    monkeypatch.setattr(socket.socket, 'connect', refuse)
    monkeypatch.setattr(socket, 'getaddrinfo', refuse)
    model = load_trained(name)
    hf, info = AutoModelForCausalLM.from_pretrained(TRUTH/name, output_loading_info=True, local_files_only=True, dtype=torch.float32)
    assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']
    assert model.dtype == torch.float32 and model.name == card['name'] == name
    assert type(hf).__name__ == {'mamba2': 'Mamba2ForCausalLM', 'mamba1': 'MambaForCausalLM', 'mamba2attn': 'Mamba2AttnForCausalLM'}[card['family']]
    weights = {**hf.state_dict()}
    assert all(torch.equal(v, weights[k]) for k, v in model.hf.state_dict().items())


def test_does_its_task_on_fresh_draws(opened):
    name, card, model, pairs = opened
    score = task_score(model, card['task'], pairs)
    assert score >= (.99 if card['task'] == 'recall' else card['floor']['score'])
    assert accuracy(model, pairs) >= .99 if card['task'] == 'recall' else accuracy(model, pairs) > .97
    with torch.no_grad(): plain = model.hf(pairs.clean, use_cache=False).logits[torch.arange(256), pairs.at].argmax(-1)
    assert float((plain == pairs.target).float().mean()) == accuracy(model, pairs)          # transformers says the same


def test_cuts_cost_what_the_card_says(opened):
    name, card, model, pairs = opened
    whole, cut = cut_scores(model, card['task'], pairs)
    assert cut.keys() == card['taps'].keys() == card['taps_measured'].keys()
    for tap, score in cut.items():
        assert near(score, card['taps_measured'][tap]) if card['task'] == 'recall' else abs(score - card['taps_measured'][tap]) < .05 + .1*abs(score), tap
        label = card['taps'][tap]
        if label is True: assert score < .6
        if label is False: assert whole - score < .03
    heads = node_scores(model, card['task'], pairs)
    assert heads.keys() == card['nodes'].keys()
    for node, score in heads.items():
        assert near(score, card['nodes_measured'][node]) if card['task'] == 'recall' else abs(score - card['nodes_measured'][node]) < .05, node
        if card['nodes'][node]: assert score < .6


@pytest.mark.parametrize('name', MQAR)
def test_recall_needs_three_taps(name):
    card = trained_card(name)
    assert {k for k, v in card['taps'].items() if v} == {'x@0', 'B@1', 'C@0'}
    assert {k for k, v in card['taps'].items() if v is None} == {'x@1'}
    assert card['taps_measured']['B@1'] < .2 and card['taps_measured']['C@0'] < .2
    assert card['swaps']['state, last step of the context'] > .99
    assert max(v for k, v in card['swaps'].items() if 'of head' in k) < .9


def test_labels_follow_the_rule_of_the_card(opened):
    name, card, model, _ = opened
    for tap, label in card['taps'].items():
        assert label in (None, score_label(card['score'], card['taps_measured'][tap]))
    assert sum(v is not None for v in card['taps'].values()) >= len(card['taps']) - 2 or name not in MQAR


def test_labels_are_named_as_parts(opened):
    "By the graph: every label belongs to a node; nodes at hand look back 0 tokens."
    name, card, model, _ = opened
    labels, nodes = trained_labels(name), {n.name for n in model_graph(model, lags=True).nodes}
    assert labels['embed'] and labels['logits'] and {*labels.values()} <= {True, False, None}
    assert all(k in nodes or f'{k}@0' in nodes for k in labels) and all(n in labels or n.removesuffix('@0') in labels for n in nodes)
    layer = model.recurrent()[0]
    if card['family'] == 'mamba1': return
    for tap, label in card['taps'].items():
        c, lag = tap.split('@')
        named = {k: v for k, v in labels.items() if k.startswith(f'{layer}.ssm.{c}[') and k.endswith(f']@{lag}')}
        assert len(named) == (model.sizes['head'] if c == 'x' else 1) and {*named.values()} == {label}
    assert {k for k in labels if k.startswith(f'{layer}.ssm[')} == {f'{layer}.ssm[{h}]' for h in range(model.sizes['head'])}


@pytest.mark.parametrize('name', RECALL)
def test_swaps_move_the_answer_as_often_as_the_card_says(name):
    card, model, pairs = trained_card(name), load_trained(name), trained_draws(name, 256, FRESH, same_keys=True)
    state, last = f'blocks.{model.recurrent()[0]}.ssm.state', pairs.clean.shape[1] - 1
    swaps = card['swaps']
    assert near(interchange(model, pairs, state, last - 1), swaps['state, last step of the context'])
    assert near(interchange(model, pairs, state, last), swaps['state, step of the answer'])
    if 'hybrid' in name:
        keys_values = interchange(model, pairs, ('blocks.1.attn.k', 'blocks.1.attn.v'), slice(0, last))
        assert keys_values > .99 and interchange(model, pairs, state, last - 1) < .02
        for part in ('blocks.0.ssm.y', 'blocks.1.attn.z'): assert accuracy(model, pairs, zero(part)) < .3
    else: assert swaps['state, step of the answer'] > .9


def test_another_convolution_is_another_model():
    "The cut is the tap's: by hand, on the weights of transformers' own model."
    name, pairs = 'mqar-trained-0', recall_draws(n=128, seed=FRESH)
    hf = AutoModelForCausalLM.from_pretrained(TRUTH/name, dtype=torch.float32).eval()
    c = hf.config
    inner, n = c.num_heads*c.head_dim, c.state_size
    for component, lag, rows in (('x', 0, slice(0, inner)), ('B', 1, slice(inner, inner + n)), ('C', 0, slice(inner + n, None)), ('B', 2, slice(inner, inner + n))):
        weight = hf.backbone.layers[0].mixer.conv1d.weight
        old = weight.detach().clone()
        with torch.no_grad(): weight[rows, 0, 3 - lag] = 0
        with torch.no_grad(): by_hand = float((hf(pairs.clean, use_cache=False).logits[:, -1].argmax(-1) == pairs.target).float().mean())
        with torch.no_grad(): weight.copy_(old)
        model = load_trained(name)
        with cut_tap(model, 0, component, lag): assert accuracy(model, pairs) == pytest.approx(by_hand, abs=.01)


def test_other_models_recall_one_step_later():
    needed = lambda name, what: {k for k, v in trained_card(name)[what].items() if v}
    assert needed('mqar-late-trained', 'taps') == {'x@1', 'B@2', 'C@0'}
    assert needed('mqar-mamba1-trained', 'taps') == {'x@0', 'x@1', 'x@2'}
    assert needed('mqar-mamba1-trained', 'nodes') == {'0.ssm', '0.ssm.x@1', '0.ssm.B@2', '0.ssm.C@0'}
    for name in ('mqar-late-trained', 'mqar-mamba1-trained'):           # the last pair is written with the question: 1 of 8
        assert trained_card(name)['swaps']['state, last step of the context'] == pytest.approx(7/8, abs=.04)


@pytest.mark.parametrize('lag', range(4))
def test_a_tap_of_mamba1_is_its_four_uses(lag):
    "x, B, C and dt as they are without the tap, put together, are the run without it."
    model, pairs = load_trained('mqar-mamba1-trained'), recall_draws(n=64, seed=FRESH)
    sites = tuple(f'blocks.0.ssm.{p}' for p in ('x', 'B', 'C', 'dt'))
    with cut_tap(model, 0, 'x', lag): out, cut = model.run_with_cache(pairs.clean, sites)
    together = model.run(pairs.clean, Edits(patch(s, cut[s]) for s in sites)).logits
    assert torch.allclose(together, out.logits, atol=1e-4) and not torch.allclose(together, model.run(pairs.clean).logits, atol=1e-2)


def test_chains_are_predicted_as_by_counting():
    card, model, ids = trained_card('markov-trained'), load_trained('markov-trained'), chains(64, 512, FRESH)
    kl = oracle_kl(model, ids)
    assert float(kl.mean()) <= card['floor']['kl_mean'] and float(kl.max()) <= card['floor']['kl_worst']
    assert oracle_skill(model, ids) >= card['floor']['score']


# -- draws and oracle --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize('same', [False, True])
@pytest.mark.parametrize('keys, values, pairs', [(32, 32, 8), (4, 2, 4), (5, 9, 1)])
def test_recall_draws(keys, values, pairs, same):
    p = recall_draws(keys, values, pairs, 300, 7, same)
    assert p.clean.shape == p.corrupt.shape == (300, 2*pairs + 1) and (p.at == 2*pairs).all()
    for ids, answers in ((p.clean, p.target), (p.corrupt, p.wrong)):
        for row, answer in zip(ids.tolist(), answers.tolist(), strict=True):
            told = dict(zip(row[:-1:2], row[1::2], strict=True))
            assert len(told) == pairs and max(told) < keys <= min(told.values()) and max(told.values()) < keys + values
            assert told[row[-1]] == answer
    assert (p.target != p.wrong).all()
    assert torch.equal(p.clean[:, ::2], p.corrupt[:, ::2]) == same
    again, other = recall_draws(keys, values, pairs, 300, 7, same), recall_draws(keys, values, pairs, 300, 8, same)
    assert torch.equal(p.clean, again.clean) and torch.equal(p.corrupt, again.corrupt) and not torch.equal(p.clean, other.clean)


def test_oracle_counts():
    ids = torch.from_numpy(np.random.default_rng(0).integers(2, size=(20, 30)))
    for beta in (.5, 1., 3.):
        got = chain_oracle(ids, beta)
        for row, probabilities in zip(ids.tolist(), got.tolist(), strict=True):
            for t, p in enumerate(probabilities):
                after = [row[s + 1] for s in range(t) if row[s] == row[t]]
                assert p == pytest.approx((sum(after) + beta)/(len(after) + 2*beta), abs=1e-6)


def test_the_oracle_is_the_best_guess_of_what_comes_next():
    "By the chains themselves: its log loss is less than that of other pseudo-counts."
    ids = chains(64, 4000, 3)
    def loss(beta):
        p = chain_oracle(ids, beta)[:, :-1]
        return -float(torch.where(ids[:, 1:] == 1, p, 1 - p).log().mean())
    assert loss(1.) < min(loss(.5), loss(2.))
    half = chains(64, 4000, 3, beta=.3)
    first = lambda beta: -float((lambda p: torch.where(half[:, 1:] == 1, p, 1 - p).log().mean())(chain_oracle(half, beta)[:, :-1]))
    assert first(.3) < first(1.)


def test_markov_draws():
    p = markov_draws(40, 200, 5, margin=.2)
    clean, corrupt = (chain_oracle(ids)[:, -1] for ids in (p.clean, p.corrupt))
    assert torch.equal(p.clean[:, -1], p.corrupt[:, -1]) and (p.at == 39).all() and p.clean.shape == (200, 40)
    assert ((clean > .5).long() == p.target).all() and ((corrupt > .5).long() == p.wrong).all()
    assert (clean - .5).abs().min() >= .2 - 1e-6 and (corrupt - .5).abs().min() >= .2 - 1e-6
    seen = {(int(s), int(a)) for s, a in zip(p.clean[:, -1], p.target, strict=True)}
    assert len(seen) == 4                                               # no symbol gives the answer away
    assert torch.equal(p.clean, markov_draws(40, 200, 5, margin=.2).clean)


def test_rule():
    assert score_label(1., .49) is True and score_label(1., .981) is False
    assert score_label(1., .5) is None and score_label(1., .97) is None and score_label(.99, .995) is False


def test_what_is_not_there_is_named():
    for f in (trained_card, load_trained, trained_draws, trained_labels):
        with pytest.raises(ValueError, match="got 'mqar', expected one of .*mqar-trained-0"): f('mqar')
    for kwargs, message in ((dict(pairs=9, keys=8), 'got pairs=9, expected 1 to keys, which is 8'), (dict(values=1), 'got values=1, expected 2')):
        with pytest.raises(ValueError, match=message): recall_draws(**kwargs)
    with pytest.raises(ValueError, match='got length=3'): markov_draws(3)
    with pytest.raises(ValueError, match='margin=0.5'): markov_draws(margin=.5)


def test_scores_on_models_that_know_nothing():
    "A random model recalls nothing and predicts chains worse than one who counts."
    torch.manual_seed(0)
    random = HookedModel(AutoModelForCausalLM.from_config(families()['mamba2'].small(64)))
    assert accuracy(random, recall_draws(n=128)) < .2 and len(cut_scores(random, 'recall', recall_draws(n=8))[1]) == 12
    coin = HookedModel(AutoModelForCausalLM.from_config(families()['mamba2'].small(2)))
    with torch.no_grad(): coin.hf.lm_head.weight.zero_()
    assert abs(oracle_skill(coin, chains(32, 64))) < 1e-5


def test_cards_are_plain():
    for n in NAMES:
        text = (TRUTH/n/'card.json').read_text()
        card = json.loads(text)
        assert card['command'] == f'python bench/train_truth.py {n}' and {'procedure', 'seed', 'whole', 'taps'} <= {*card}
        assert not any(word in text for word in ('/work', '/tmp', 'NaN'))
