"""What the state carries from step to step as a part of a circuit: on the bare models, and as the derivative of a run of edges."""
import warnings

import pytest
import torch
from test_attribute import derivative, near
from test_subgraph import PAIRS, heard, hooks, plain

from circuitbench.attribute import attribute
from circuitbench.circuit import Circuit, extract_circuit
from circuitbench.edit import patch
from circuitbench.exact import exact
from circuitbench.graph import model_graph
from circuitbench.load import load_model
from circuitbench.pairs import logit_diff
from circuitbench.subgraph import run_edges

STATES = ['mamba1', 'mamba2', 'jamba', 'falcon-h1', 'hymba', 'rwkv7', 'qwen3-next', 'kimi-linear', 'olmo-hybrid']
STEPS = [(2, 5), (2, 4), (4, 4), (0, 5)]


@pytest.fixture(scope='module', params=STATES)
def family(request): return load_model(f'mock://{request.param}-tiny')


def first(model):
    "The last recurrent head that the graph of a model names, of its first block with one."
    names = [n.name for n in model_graph(model).nodes if n.kind == 'head' and n.branch == 'ssm']
    return [n for n in names if n.partition('.')[0] == names[0].partition('.')[0]][-1]


@pytest.fixture(scope='module')
def graph(family): return model_graph(family, carried={first(family): STEPS})


def carried(g): return [k for k, n in enumerate(g.nodes) if n.port == 'state']


def test_nodes_and_edges(family, graph):
    name = first(family)
    block, head = name.partition('.')[0], name.partition('ssm')[2]
    assert [graph.nodes[k].name for k in carried(graph)] == [f'{block}.ssm.state{head}@{a}>{b}' for a, b in STEPS]
    for k in carried(graph):
        to = [graph.nodes[b].name for a, b in graph.edges.tolist() if a == k]
        assert to == [name] and f'embed->{graph.nodes[k].name}' in graph.names
    ports = {n.port for n in graph.nodes if n.kind == 'port' and n.block == int(block) and n.branch == 'ssm'}
    assert {'write', 'C', 'decay', 'state'} <= ports and not ports & {'x', 'B', 'dt'}


@torch.no_grad()
def test_both_ends(family, graph):
    keep = torch.ones(len(graph), dtype=torch.bool)
    assert near(run_edges(family, PAIRS, graph, keep), plain(family, PAIRS.clean), 1e-5)
    assert near(run_edges(family, PAIRS, graph, ~keep), plain(family, PAIRS.corrupt), 1e-5)


@torch.no_grad()
def test_all_that_is_written_is_the_write(family):
    "With every pair of steps a node, those and nothing else bring the writes of a head."
    name, steps = first(family), PAIRS.clean.shape[1]
    g = model_graph(family, carried={name: [(a, b) for b in range(steps) for a in range(b + 1)]})
    node = g.nodes[carried(g)[0]]
    other = family.run_with_cache(PAIRS.corrupt, node.site)[1][node.site]
    want = PAIRS.last(family.run(PAIRS.clean, edit=patch(node.site, other, heads=node.heads)).logits)
    cut = torch.isin(g.edges[:, 0], torch.tensor(carried(g)))
    assert near(run_edges(family, PAIRS, g, ~cut), want, 1e-5) and not near(want, plain(family, PAIRS.clean), 1e-4)
    rest = torch.tensor([g.nodes[a].name == f'{node.block}.ssm.write{name.partition("ssm")[2]}' for a in g.edges[:, 0].tolist()])
    assert near(run_edges(family, PAIRS, g, ~rest), plain(family, PAIRS.clean), 1e-5)


@pytest.mark.parametrize('frozen', [False, True], ids=['plain', 'frozen'])
@pytest.mark.parametrize('ablation', ['patch', 'mean'])
def test_scores_are_the_derivative_of_a_run_of_edges(family, graph, ablation, frozen):
    ours = attribute(family, PAIRS, graph, method='eap', frozen=frozen, ablation=ablation, progress=False).edges
    want, some = derivative(family, graph, frozen, ablation), ~graph.inner
    assert near(ours[some], want[some], 1e-4)
    mine = torch.isin(graph.edges[:, 1], torch.tensor(carried(graph)))
    assert near(ours[mine], want[mine], 1e-3) and want[mine].abs().max() > 0


def test_what_goes_in_comes_out(family, graph):
    found = attribute(family, PAIRS, graph, steps=2, progress=False)
    into, out = (torch.zeros(len(graph.nodes)).index_add(0, graph.edges[:, end], found.edges) for end in (1, 0))
    some = [k for k, one in enumerate(graph.by_edges) if one and graph.nodes[k].port != 'rest']
    assert near(out[some], into[some], 1e-4) and near(found.nodes[some], into[some], 1e-4)


def test_the_ports_are_those_without_steps(family, graph):
    "Pairs of steps and the rest of a write sum to the write of a graph whose steps are other ones."
    name = first(family)
    other = model_graph(family, carried={name: [(7, 8)]})
    a, b = ({n: v for n, v in zip(g.names, attribute(family, PAIRS, g, method='eap', progress=False).edges.tolist())} for g in (graph, other))
    block = name.partition('.')[0]
    head = name.partition('ssm')[2]
    def total(by): return sum(v for k, v in by.items() if k.startswith('embed->') and k.endswith(f'write{head}') or f'->{block}.ssm.state' in k and k.startswith('embed'))
    assert total(a) == pytest.approx(total(b), rel=1e-3, abs=1e-6)


# -- Mamba-2 by hand -----------------------------------------------------------------------
@torch.no_grad()
def test_one_pair_of_steps_of_mamba2_by_hand():
    "The read-out of step 5 finds what the counterfactual wrote at step 2, the clean run's decays between; nothing else changes."
    model = load_model('mock://mamba2-tiny')
    g, m, base = model_graph(model, carried={'1.ssm[2]': [(2, 5)]}), model.blocks[1].mixer, plain(model, PAIRS.clean)
    made = []
    for ids in (PAIRS.clean, PAIRS.corrupt):
        u, = heard(model.hf, ids, m.in_proj)
        wide = (u @ m.in_proj.weight.T).double()
        xBC, dt = wide[..., 64:64 + m.conv_dim], wide[..., 64 + m.conv_dim:]
        taps, past = m.conv1d.weight[:, 0].double(), torch.nn.functional.pad(xBC, (0, 0, 3, 0))
        xBC = sum(past[:, k:k + xBC.shape[1]]*taps[:, k] for k in range(4)) + (0 if m.conv1d.bias is None else m.conv1d.bias.double())
        xBC = torch.nn.functional.silu(xBC)
        dt = torch.nn.functional.softplus(dt + m.dt_bias.double())
        n = (m.conv_dim - 64)//2
        made.append((xBC[..., :64].unflatten(2, (4, 16)), xBC[..., 64:64 + n].unflatten(2, (2, -1)), xBC[..., 64 + n:].unflatten(2, (2, -1)), dt))
    (x, B, C, dt), (x2, B2, _, dt2) = made
    decay = torch.exp(-(dt[:, 3:6, 2]*m.A_log[2].double().exp()).sum(1))
    def found(x, B, dt): return (dt[:, 2, 2]*decay*(B[:, 2, 1]*C[:, 5, 1]).sum(1))[:, None]*x[:, 2, 2]
    change = torch.zeros(3, PAIRS.clean.shape[1], 64)
    change[:, 5, 32:48] = (found(x2, B2, dt2) - found(x, B, dt)).float()
    def into(y): return y + change
    with hooks((m.norm, into)): want = plain(model, PAIRS.clean)
    keep = torch.ones(len(g), dtype=torch.bool)
    keep[g.edge('1.ssm.state[2]@2>5->1.ssm[2]')] = False
    got = run_edges(model, PAIRS, g, keep)
    assert near(got - base, want - base, 1e-3) and not near(want, base, 1e-5)
    score = exact(model, PAIRS, g, edges=[g.edge('1.ssm.state[2]@2>5->1.ssm[2]')], nodes=False, progress=False).edges
    lost = float((logit_diff(base, PAIRS) - logit_diff(want, PAIRS)).mean())
    assert float(score[~score.isnan()][0]) == pytest.approx(lost, abs=1e-5)


# -- as others use it ----------------------------------------------------------------------
def test_a_circuit_with_steps(tmp_path):
    model = load_model('mock://mamba2-tiny')
    g = model_graph(model, carried={'0.ssm[1]': [(1, 6), (2, 6)]})
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                    # random weights favour nothing
        found = extract_circuit(model, PAIRS, graph=g, progress=False)
    again = Circuit.from_json(found.to_json(tmp_path/'c.json'), model)
    assert again.graph.nodes == found.graph.nodes and torch.equal(again.keep, found.keep)
    assert again.faithfulness().value == pytest.approx(found.faithfulness().value)
    assert '0.ssm.state[1]@1>6' in found.to_networkx(whole=True)


@pytest.mark.parametrize('asked, said', [
    ({'0.ssm[1]': [(3, 2)]}, 'got carried={\'0.ssm[1]\': [(3, 2)]}'), ({'0.ssm[9]': [(1, 2)]}, 'heads that keep a state'), ({'1.attn[0]': [(1, 2)]}, 'heads that keep a state'),
    ({'mlp': [(1, 2)]}, 'expected a recurrent head'), ({'0.ssm[1]': []}, 'expected a recurrent head')])
def test_steps_that_are_refused(asked, said):
    with pytest.raises(ValueError) as err: model_graph(load_model('mock://mamba2-tiny'), carried=asked)
    assert said in str(err.value)


def test_lags_and_steps_do_not_go_together():
    with pytest.raises(ValueError, match='one of them'): model_graph(load_model('mock://mamba2-tiny'), lags=True, carried={'0.ssm[1]': [(1, 2)]})
