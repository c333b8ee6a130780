"""Circuits whose edges are told apart by position: runs, scores, choice, files."""
import warnings

import numpy as np
import pytest
import torch
from test_attribute import LEVEL, near, unmasked
from test_subgraph import heard, hooks

from circuitbench.attribute import attribute
from circuitbench.choose import largest, pruned
from circuitbench.circuit import Circuit, extract_circuit
from circuitbench.edit import patch
from circuitbench.frozen import frozen_norms
from circuitbench.graph import model_graph
from circuitbench.load import load_model
from circuitbench.pairs import Pairs, logit_diff
from circuitbench.site import families
from circuitbench.subgraph import run_edges

POS = LEVEL.clean.shape[1]


@pytest.fixture(scope='module', params=sorted(families()))
def family(request): return load_model(f'mock://{request.param}-tiny')


@pytest.fixture(scope='module', params=[False, True], ids=['whole', 'lags'])
def graph(family, request): return model_graph(family, lags=request.param)


@torch.no_grad()
def plain(model, ids): return model.hf(ids, use_cache=False).logits[:, -1]


@torch.no_grad()
def test_the_same_at_all_positions(family, graph):
    "Edges that are kept at every position or at none are whole edges."
    keep = torch.rand(len(graph), generator=torch.Generator().manual_seed(2)) < .7
    for some in (keep, torch.ones_like(keep)):
        assert near(run_edges(family, LEVEL, graph, some[:, None].expand(-1, POS)), run_edges(family, LEVEL, graph, some), 1e-5)


def test_scores_are_the_derivative_of_a_run(family):
    g = model_graph(family)
    keep = torch.ones(len(g), POS, requires_grad=True)
    with frozen_norms(): value = logit_diff(run_edges(family, LEVEL, g, keep, tokens=10**6), LEVEL).mean()
    want, = torch.autograd.grad(value, keep)
    ours, some = attribute(family, LEVEL, g, method='eap', by_position=True, progress=False).edges, ~unmasked(g)
    assert near(ours[some], want[some], 1e-4) and want[some].abs().max() > 1e-3


# -- by hand -------------------------------------------------------------------------------
@torch.no_grad()
def test_one_edge_at_one_position():
    "What a port of Mamba-2 hears of a head at one token."
    model = load_model('mock://mamba2-tiny')
    g, m0, block, m1 = model_graph(model), model.blocks[0].mixer, model.blocks[1], model.blocks[1].mixer
    (x, z), (_, z2) = (heard(model.hf, ids, block, m0.out_proj) for ids in (LEVEL.clean, LEVEL.corrupt))
    head = slice(48, 64)
    seen = block.norm(x + (z2 - z)[..., head] @ m0.out_proj.weight[:, head].T) @ m1.in_proj.weight.T
    def put(out):
        out = out.clone()
        out[:, 4, 96:112] = seen[:, 4, 96:112]
        return out
    with hooks((m1.in_proj, put)): want = plain(model, LEVEL.clean)
    keep = torch.ones(len(g), POS, dtype=torch.bool)
    keep[g.edge('0.ssm[3]->1.ssm.x[2]'), 4] = False
    base = plain(model, LEVEL.clean)
    got = run_edges(model, LEVEL, g, keep)
    assert near(got, want, 1e-6) and not near(want, base, 1e-5)


@torch.no_grad()
@pytest.mark.parametrize('name', ['mamba2', 'llama', 'falcon-h1'])
def test_from_a_port_to_a_head_at_some_positions(name):
    "The head sees the counterfactual's value of its port there, also where other heads share the port and do not."
    model = load_model(f'mock://{name}-tiny')
    g, at, base, moved = model_graph(model), [2, 3, 6], plain(model, LEVEL.clean), 0
    for e in g.inner.nonzero()[:, 0].tolist()[::2]:
        port, head = (g.nodes[k] for k in g.edges[e].tolist())
        other = model.run_with_cache(LEVEL.corrupt, port.site)[1][port.site]
        shared = port.branch == 'ssm' and head.heads is not None           # here each head has its own row of the port
        edit = patch(port.site, other, at, head.heads if shared else port.heads)
        z = model.run_with_cache(LEVEL.clean, head.site, edit=edit)[1][head.site]
        if port.branch == 'attn': want = model.run(LEVEL.clean, edit=patch(head.site, z, heads=head.heads)).logits[:, -1]
        else: want = model.run(LEVEL.clean, edit=edit).logits[:, -1]
        keep = torch.ones(len(g), POS, dtype=torch.bool)
        keep[e, at] = False
        assert near(run_edges(model, LEVEL, g, keep), want, 1e-5), g.names[e]
        moved += not near(want, base, 1e-5)
    assert moved > 3


# -- choosing ------------------------------------------------------------------------------
def by_search(g, keep):
    "Edges at positions on a way from the embedding to the logits, by walking all of them."
    E, T = keep.shape
    edges = g.edges.tolist()
    into = {(b, t): [(a, e) for e, (a, c) in enumerate(edges) if c == b and keep[e, t]] for b in range(len(g.nodes)) for t in range(T)}
    def down(a, t, seen):
        "Is what a node has at t reached? Anything that entered it until then counts."
        if a == 0: return True
        return any(down(w, s, seen) for s in range(t + 1) for w, _ in into[a, s])
    def up(b, t):
        if b == len(g.nodes) - 1: return True
        return any(up(c, s) for e, (a, c) in enumerate(edges) if a == b for s in range(t, T) if keep[e, s])
    return np.array([[bool(keep[e, t]) and down(a, t, ()) and up(b, t) for t in range(T)] for e, (a, b) in enumerate(edges)])


@pytest.mark.parametrize('seed', range(4))
def test_pruning_by_position(seed):
    g = model_graph(load_model('mock://mamba2-tiny'))
    keep = torch.rand(len(g), 3, generator=torch.Generator().manual_seed(seed)) < .06
    assert (pruned(g, keep).numpy() == by_search(g, keep)).all()
    flat = keep.any(1)
    assert (pruned(g, flat[:, None].expand(-1, 1)).view(-1) == pruned(g, flat)).all()


def test_the_largest_by_position():
    v = torch.tensor([[1., -5., 0.], [torch.nan, 3., -4.]])
    assert largest(v, 2).tolist() == [[False, True, False], [False, False, True]]
    assert largest(v[:, 1], 1).tolist() == [True, False]


# -- a circuit -----------------------------------------------------------------------------
def test_a_circuit_by_position(tmp_path):
    model = load_model('tiny://mamba2')
    prompt, answer = ' Question: what is the capital of France? Answer:', ' Paris'
    whole, found = (extract_circuit(model, prompt, answer, by_position=p, progress=False) for p in (False, True))
    assert found.keep.shape == (len(found.graph), int(found.pairs.at[0]) + 1) and found.by_position and not whole.by_position
    assert found.faithfulness().value > .85 and near(found.totals, whole.scores, 1e-4)
    assert len(found) < .02*found.keep.numel() and ' at ' in found.top_edges(1)[0][0]
    again = Circuit.from_json(found.to_json(tmp_path/'c.json'), model)
    assert torch.equal(again.keep, found.keep) and torch.equal(again.scores, found.scores) and again.curve == found.curve
    assert found.compare(again)['edges in common'] == 1 and set(found.parts()) == set(again.parts())
    assert 'edges by position' in repr(found) and found.plot() is not None
    lost = dict(found.minimality())
    assert max(lost.values()) > .1
    with pytest.raises(ValueError, match='by position'): found.greedy(5)
    with pytest.raises(ValueError, match='two of one graph'): found.compare(whole)


def test_positions_that_are_refused():
    model = load_model('mock://mamba2-tiny')
    g = model_graph(model)
    uneven = Pairs(LEVEL.clean, LEVEL.corrupt, torch.tensor([8, 5, 7]), LEVEL.target, LEVEL.wrong)
    with pytest.raises(ValueError, match='one length'): run_edges(model, uneven, g, torch.ones(len(g), POS, dtype=torch.bool))
    with pytest.raises(ValueError, match='by position'): run_edges(model, LEVEL, g, torch.ones(len(g), POS + 1, dtype=torch.bool))
    steps = model_graph(model, carried={'0.ssm[1]': [(1, 2)]})
    with pytest.raises(ValueError, match='without steps'): attribute(model, LEVEL, steps, by_position=True, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ValueError, match='by_position=True'): extract_circuit(model, LEVEL, method='exact', by_position=True)
