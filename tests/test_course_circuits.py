"""Wrong answers to unit 7 of the course, circuits and truth, and what its checks say about them; `test_course.py` runs them."""
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from circuitbench import checks_circuits as checks
from circuitbench.choose import largest
from circuitbench.circuit import extract_circuit
from circuitbench.counterfactuals import asked_of, case, two_paths
from circuitbench.edit import patch
from circuitbench.graph import model_graph
from circuitbench.judge import auprc, auroc
from circuitbench.load import load_model
from circuitbench.pairs import accuracy, as_pairs, ends, log_prob, logit_diff
from circuitbench.subgraph import run_edges
from circuitbench.task import facts, indirect_object
from circuitbench.truth import methods, truth


# -- exercise 1 -------------------------------------------------------------------------
def changes(at='value', by=1, answers='new', inplace=False, every=False):
    "A student's counterfactuals, their slips as options."
    def other_value(ids):
        new, row = ids if inplace else ids.clone(), torch.arange(len(ids))
        k = 2*(ids[:, :-1:2] == ids[:, -1:]).int().argmax(1) + 1
        k = {'value': k, 'key': k - 1, 'last': torch.full_like(k, 11), 'first': torch.full_like(k, 1), 'query': torch.full_like(k, 12)}[at]
        old, low = ids[row, k].clone(), 0 if at in ('key', 'query') else 8
        if every: new[:, 1:-1:2] = 8 + (ids[:, 1:-1:2] - 8 + 1) % 8
        else: new[row, k] = old + 1 if by == 'on' else low + (old - low + by) % 8
        return {'new': (new, new[row, k]), 'old': (new, old), 'from 0': (new, new[row, k] - 8), 'none': new, 'three': (new, old, old)}[answers]
    return other_value


def values_changed():
    return [((lambda ids: (ids, ids[:, -1]),), 'Nothing is changed'), ((changes(inplace=True),), 'changes the prompts that it is given'), ((changes(every=True),), 'only one may be'),
            ((changes('key'),), 'key in front of the value'), ((changes('query'),), 'key that is asked for'), ((changes('last'),), 'last value of each prompt'), ((changes('first'),), 'first value of each prompt'),
            ((changes(by='on'),), 'no token 16'), ((changes(by=-1),), 'not the next one'), ((changes(answers='old'),), 'answers to the clean prompts'), ((changes(answers='from 0'),), 'values begin at 8'),
            ((changes(answers='none'),), 'two results'), ((changes(answers='three'),), 'two results'), ((lambda ids: ids[:, 99],), 'stops with IndexError')]


# -- exercise 2 -------------------------------------------------------------------------
def faithful(slip=''):
    def alone(model, pairs, inside):
        outside = [p for p in ('x', 'B', 'C', 'dt', 'gate') if (p in inside) == (slip == 'exchanged') or slip == 'all']
        sites = [f'blocks.0.ssm.{p}' for p in outside]
        cache = model.run_with_cache(pairs.clean if slip == 'clean cache' else pairs.corrupt, sites)[1]
        def m(ids, edit=()):
            logits = pairs.last(model.run(ids, edit).logits)
            return float((logits.gather(1, pairs.target[:, None])[:, 0] if slip == 'target' else logit_diff(logits, pairs)).mean())
        low, high, got = m(pairs.corrupt), m(pairs.clean), m(pairs.clean, [patch(s, cache[s]) for s in sites])
        return {'raw': got, 'shifted': got - low, 'share': got/high, 'turned': (high - got)/(high - low), 'none': None, 'all three': (low, high, got)}.get(slip, (got - low)/(high - low))
    return alone


def by_hand():
    said = {'raw': 'metric itself', 'shifted': 'do not divide', 'share': 'clean run alone', 'turned': 'wrong end', 'exchanged': 'patch what should stay clean', 'clean cache': 'Always 1', 'all': 'Always 0',
            'target': 'logit of the answer alone', 'none': 'is None', 'all three': 'has shape (3,)'}
    return [((faithful(slip),), phrase) for slip, phrase in said.items()]


# -- exercise 3 -------------------------------------------------------------------------
@cache
def start():
    return largest(methods()['EAP, norms as they are'](case().model, case().pairs, case().graph).edges, 20)


@cache
@torch.no_grad()
def carried(keep):
    "Faithfulness of edges by number."
    c, mask = case(), torch.zeros(len(case().graph), dtype=torch.bool)
    mask[list(keep)] = True
    value = logit_diff(run_edges(c.model, c.pairs, c.graph, mask), c.pairs).mean()
    clean, corrupt = (v.mean() for v in ends(c.model, c.pairs, logit_diff))
    return float((value - corrupt)/(clean - corrupt))


def losses():
    have = tuple(start().nonzero()[:, 0].tolist())
    out = lambda keep, e: tuple(k for k in keep if k != e)
    without = np.array([carried(out(have, e)) for e in have])
    true = carried(have) - without
    pile = carried(have) - np.array([carried(have[i + 1:]) for i in range(20)])
    return [((without,), 'asked is the loss'), ((-true,), 'sign is turned'), ((np.zeros(20),), 'Nothing is lost anywhere'), ((pile,), 'never put one back'),
            ((true[::-1],), 'another order'), ((np.zeros(83),), 'A number for every edge'), ((true[:7],), 'has shape (7,)'), ((...,), 'not there yet')]


# -- exercises 4 and 5 ------------------------------------------------------------------
def ranks(slip=''):
    def ranked(scores, labels):
        left = np.array([v is not None or slip.startswith('None') for v in labels])
        s = np.asarray(scores) if slip == 'signed' else np.abs(scores)
        s, y = s[left], np.array([v is True or (v is None and slip == 'None inside') for v in labels])[left]
        a, b = s[y][:, None], s[~y]
        area = ((a > b) + {'ties 0': 0, 'ties 1': 1}.get(slip, .5)*(a == b)).mean()
        if slip == 'turned': area = 1 - area
        above = np.greater if slip == 'strict' else np.greater_equal
        precision = np.mean([y[above(s, v)].mean() if above(s, v).any() else 1. for v in (s if slip == 'all edges' else s[y])])
        if slip == 'one size': precision = checks.recovery(s, y)
        return {'exchanged': (precision, area), 'one': area}.get(slip, (area, precision))
    return ranked


def rankings():
    said = {'signed': 'rank by magnitude', 'None outside': 'counted as outside', 'None inside': 'counted as inside', 'turned': 'ranks above', 'ties 0': 'you count 0', 'ties 1': 'you count 1', 'all edges': 'precision over all edges',
            'one size': 'precision at one size', 'strict': 'the edge itself too', 'exchanged': 'AUROC first', 'one': 'two results'}
    return [((ranks(slip),), phrase) for slip, phrase in said.items()]


@cache
def scored():
    "Scores and labels by case and way."
    known = {name: truth(name, n=16, seed=1) for name in checks.CASES}
    return {(name, way): (methods()[way](c.model, c.pairs, c.graph).edges, c.edges) for name, c in known.items() for way in checks.WAYS}


def table(measure=auroc, sign=False): return {k: measure(e if sign else e.abs(), labels) for k, (e, labels) in scored().items()}


def tables():
    some = dict(table())
    del some[checks.CASES[1], checks.WAYS[2]]
    return [((...,), 'Expected a dict'), ((list(table().values()),), 'Expected a dict'), ((some,), 'is missing'), ((table(auprc),), 'average precision'), (({k: 100*v for k, v in table().items()},), 'percent'),
            ((table(sign=True),), 'signs'), (({k: 1 - v for k, v in table().items()},), 'Turned'), (({k: v/2 for k, v in table().items()},), 'first differs')]


# -- exercises 6 and 7 ------------------------------------------------------------------
@cache
def kept(of, ablation='position-mean', metric=log_prob):
    "Faithfulness of the path or the model without each part."
    two, out = two_paths(), []
    whole = torch.ones_like(two.path)
    with torch.no_grad(): m = lambda keep: float(metric(run_edges(two.model, two.pairs, two.graph, keep, ablation), two.pairs).mean())
    for name in two.parts:
        rest = (two.graph.edges != two.graph.index[name]).all(1)
        out.append((m(rest & two.path if of == 'path' else rest) - m(~whole))/(m(whole) - m(~whole)))
    return np.array(out)


def gaps():
    gap = lambda *how: kept('model', *how) - kept('path', *how)
    two = two_paths()
    whole = checks.share(two, two.path, None, 'position-mean', log_prob)
    return [((kept('path'),), 'what the circuit keeps'), ((kept('model'),), 'what does the circuit keep'), ((-gap(),), 'sign is turned'), ((whole - kept('path'),), 'what the circuit loses'), ((gap('patch'),), 'exchanges with the counterfactual'),
            ((gap('position-mean', logit_diff),), 'logit differences'), ((gap('mean'),), 'mean over all positions'), ((gap()[:2],), 'has shape (2,)'), ((np.zeros(4),), 'first differs')]


@cache
def circuits():
    "Three small circuits of tiny://mamba2, and the eight prompts that none was found on."
    model = load_model('tiny://mamba2')
    graph, twelve = model_graph(model), as_pairs(model, facts(n=12, seed=3))
    find = lambda some: extract_circuit(model, some, graph=graph, method='eap', budgets=(), progress=False).top(125)
    return {'first': find(twelve[:1]), 'four': find(twelve[:4]), 'another': find(as_pairs(model, indirect_object(n=2, seed=3)))}, twelve


def places():
    found, twelve = circuits()
    of = lambda f, **more: {k: f(c) for k, c in found.items()} | {'random': 0.} | more
    right = of(lambda c: c.faithfulness(pairs=twelve[4:], draws=2).value)
    ask = lambda answer: (answer, found)
    return [(ask(...), 'Expected a dict'), (ask({'first': 1.}), 'is missing'), (ask({k: v for k, v in right.items() if k != 'random'}), "'random' is missing"),
            (ask(of(lambda c: c.faithfulness(pairs=twelve[4:], draws=2))), 'is an interval'), (ask(of(lambda c: c.faithfulness(draws=2).value)), 'that each was found on'),
            (ask(of(lambda c: c.completeness(pairs=twelve[4:], draws=2).value)), 'completeness'), (ask(of(lambda c: c.faithfulness(pairs=twelve, draws=2).value)), 'all twelve prompts'),
            (ask(right | {'random': 1.}), 'carry everything'), (ask(right | {'random': .4}), 'carry 0.40'), (ask(right | {'first': 7.}), 'first differs')]


WRONG = {'other_value': values_changed, 'alone': by_hand, 'edge_losses': losses, 'ranked': rankings, 'method_table': tables, 'backup': gaps, 'elsewhere': places}
RIGHT = {'other_value': lambda: (changes(),), 'alone': lambda: (faithful(),), 'ranked': lambda: (ranks(),), 'method_table': lambda: (table(),), 'backup': lambda: (kept('model') - kept('path'),)}


@pytest.mark.parametrize('name', RIGHT)
def test_right_answers_are_right(name):
    assert getattr(checks, name)(*RIGHT[name]()).ok


@pytest.mark.parametrize('what, port', [('value', 'x'), ('query', 'C'), ('keys', 'B')])
def test_each_question_is_answered_by_one_port(what, port):
    pairs, c = asked_of(what), case()
    assert ((pairs.clean != pairs.corrupt).sum(1) == (2 if what == 'keys' else 1)).all() and (pairs.wrong != pairs.target).all()
    assert accuracy(c.model, replace(pairs, clean=pairs.corrupt, target=pairs.wrong, wrong=pairs.target)) == 1.
    for p in 'xBC': assert abs(faithful()(c.model, pairs, [p]) - (p == port)) < 1e-4
    with pytest.raises(ValueError, match="'keys'"): asked_of('colour')


def test_either_head_of_the_two_paths_answers_alone():
    two = two_paths()
    assert accuracy(two.model, two.pairs) == 1.
    for gone in (0, 1):
        site = 'blocks.0.ssm.x'
        zeroed = [patch(site, torch.zeros(1, two.pairs.clean.shape[1], 1, 1), heads=[gone])]
        assert accuracy(two.model, two.pairs, zeroed) == 1.
    both = [patch(site, torch.zeros(1, two.pairs.clean.shape[1], 1, 1))]
    assert accuracy(two.model, two.pairs, both) < .3
