"""Latents of sparse coders as parts of a circuit: by hooks on the bare models, and as the derivative of a run of edges."""
import warnings

import pytest
import torch
from test_attribute import derivative, near
from test_subgraph import PAIRS, heard, hooks, plain

from circuitbench.apart import apart, into_stream, with_experts, with_latents
from circuitbench.attribute import attribute
from circuitbench.circuit import Circuit, extract_circuit
from circuitbench.edit import patch
from circuitbench.exact import exact
from circuitbench.graph import model_graph
from circuitbench.load import load_model
from circuitbench.pairs import logit_diff
from circuitbench.sae import SAE, SAEConfig
from circuitbench.subgraph import run_edges

IDS = [1, 4, 9]
PLACES = [('mamba2', 'blocks.1.resid_pre'), ('mamba2', 'blocks.0.resid_post'), ('mamba2', 'blocks.1.resid_post'), ('mamba2', 'blocks.1.ssm.out_proj_in'), ('mamba2', 'blocks.0.ssm.out'),
          ('mamba2', 'blocks.0.mixer_out'), ('jamba', 'blocks.1.resid_mid'), ('jamba', 'blocks.0.mlp_out'), ('falcon-h1', 'blocks.1.attn.z'), ('falcon-h1', 'blocks.0.ssm.out_proj_in'),
          ('hymba', 'blocks.1.resid_pre'), ('rwkv7', 'blocks.1.resid_mid'), ('rwkv7', 'blocks.1.ssm.out_proj_in'), ('llama', 'blocks.0.attn.out'), ('llama', 'blocks.1.mlp_out')]


def coder(model, site, seed=0, activation='relu', **more):
    "Random rows, most latents active now and then."
    shape = model.site_shape(site, 1, 1)[2:]
    width = torch.Size(shape).numel()
    sae = SAE(SAEConfig(width, 24, 4, site, model=model.name, family=model.adapter.family, shape=shape, activation=activation, **more), seed)
    g = torch.Generator().manual_seed(seed)
    sae.b_dec.data = torch.randn(width, generator=g)*.1
    return sae


@pytest.fixture(scope='module', params=PLACES, ids=lambda p: f'{p[0]}-{p[1][7:]}')
def case(request):
    name, site = request.param
    model = load_model(f'mock://{name}-tiny')
    return model, with_latents(model, model_graph(model), coder(model, site), IDS)


def latents(g): return [k for k, n in enumerate(g.nodes) if n.kind == 'latent']


def test_nodes_and_edges(case):
    model, g = case
    mine = latents(g)
    assert [g.nodes[k].latent for k in mine] == [*IDS, None] and mine == list(range(mine[0], mine[0] + 4))
    node, whole = g.nodes[mine[0]], model_graph(model)
    before = {a for a, b in g.edges.tolist() if b in mine}
    after = {b for a, b in g.edges.tolist() if a in mine}
    assert before and after and all(a < mine[0] for a in before) and all(b > mine[-1] for b in after)
    if node.branch == 'stream':                                            # nobody hears past them
        assert not any(a < mine[0] and b > mine[-1] for a, b in g.edges.tolist())
        assert len(g.nodes) == len(whole.nodes) + 4
    else: assert not any(n.block == node.block and n.branch == node.branch and n.kind != 'latent' for n in g.nodes)


@torch.no_grad()
def test_both_ends(case):
    model, g = case
    keep, clean = torch.ones(len(g), dtype=torch.bool), plain(model, PAIRS.clean)
    for ablation in ('patch', 'mean', 'zero'): assert near(run_edges(model, PAIRS, g, keep, ablation), clean, 1e-5)
    first = model.adapter.family == 'rwkv7'                                # first values come beside the stream
    if not first or g.nodes[latents(g)[0]].site.endswith('out_proj_in'): assert near(run_edges(model, PAIRS, g, ~keep), plain(model, PAIRS.corrupt), 1e-5)


@torch.no_grad()
def test_parts_sum_to_the_value(case):
    model, g = case
    node = g.nodes[latents(g)[0]]
    x = model.run_with_cache(PAIRS.clean, node.site)[1][node.site]
    parts = apart(g, node, x)
    sae = g.coders[node.site]
    rows = x.flatten(2).double() - sae.b_dec.double()
    z = (rows @ sae.W_enc.double() + sae.b_enc.double()).clamp_min(0)
    for k, i in enumerate(IDS): assert near(parts[k], z[..., i, None]*sae.W_dec[i].double(), 1e-5)
    assert near(parts.sum(0), x.flatten(2), 1e-5)


@torch.no_grad()
def test_a_latent_without_any_edge_is_a_latent_exchanged(case):
    "It writes what it writes on the counterfactual, all others what they do on the clean prompt; nothing hears of that but what comes after."
    model, g = case
    for k in latents(g):
        n = g.nodes[k]
        x, other = (model.run_with_cache(ids, n.site)[1][n.site] for ids in (PAIRS.clean, PAIRS.corrupt))
        i = k - latents(g)[0]
        new = x + (apart(g, n, other)[i] - apart(g, n, x)[i]).view(x.shape)
        if n.site.endswith('resid_mid'): want = PAIRS.last(model.run(PAIRS.clean, edit=patch(n.site, new)).logits)    # a hook would miss one of its two ways
        else:
            with hooks_at(model, n.site, new): want = plain(model, PAIRS.clean)
        got = run_edges(model, PAIRS, g, g.edges[:, 0] != k)
        assert near(got, want, 1e-5), n.name
        assert n.latent is not None or not near(want, plain(model, PAIRS.clean), 1e-3)


def hooks_at(model, site, value):
    "The value in the place of a site, by a hook on the bare module."
    i, name = int(site.split('.')[1]), site.split('.', 2)[2]
    block, point = model.blocks[i], model.points[i][name]
    if point.module: module = block.get_submodule(point.module)
    else: module = block
    scale = 1 if name in ('resid_pre', 'resid_post') else point.scale
    rows = value.flatten(2)/scale
    meta = model.meta
    def put(out):
        first = out[0] if isinstance(out, tuple) else out
        new = torch.cat([first[:, :meta], rows], 1) if meta else rows
        return (new.view(first.shape), *out[1:]) if isinstance(out, tuple) else new.view(first.shape)
    def into(x): return (torch.cat([x[:, :meta], rows], 1) if meta else rows).view(x.shape)
    return hooks((module, into if point.side == 'in' else put))


@pytest.mark.parametrize('frozen', [False, True], ids=['plain', 'frozen'])
@pytest.mark.parametrize('ablation', ['patch', 'mean'])
def test_scores_are_the_derivative_of_a_run_of_edges(case, ablation, frozen):
    model, g = case
    ours, want = attribute(model, PAIRS, g, method='eap', frozen=frozen, ablation=ablation, progress=False), derivative(model, g, frozen, ablation)
    some = ~g.inner
    assert near(ours.edges[some], want[some], 1e-4)
    for end in (0, 1):
        mine = torch.isin(g.edges[:, end], torch.tensor(latents(g)))
        assert near(ours.edges[mine], want[mine], 1e-3) and want[mine].abs().max() > 0


def test_positions_sum_to_the_scores(case):
    model, g = case
    level = type(PAIRS)(PAIRS.clean, PAIRS.corrupt, torch.tensor([8, 8, 8]), PAIRS.target, PAIRS.wrong)
    whole, by = (attribute(model, level, g, method='eap', by_position=p, progress=False) for p in (False, True))
    assert near(by.edges.sum(1), whole.edges, 1e-4) and near(by.nodes[:-1], whole.nodes[:-1], 1e-4)


@torch.no_grad()
def test_edges_of_one_latent_by_hand():
    "A head that it does not hear, and a port that does not hear it, in Mamba-2."
    model = load_model('mock://mamba2-tiny')
    sae = coder(model, 'blocks.1.resid_pre')
    g, m0, m1, base = with_latents(model, model_graph(model), sae, IDS), model.blocks[0].mixer, model.blocks[1].mixer, plain(model, PAIRS.clean)
    (x, z), (_, z2) = (heard(model.hf, ids, model.blocks[1], m0.out_proj) for ids in (PAIRS.clean, PAIRS.corrupt))
    write = lambda x: ((x - sae.b_dec) @ sae.W_enc[:, 4] + sae.b_enc[4]).clamp_min(0)[..., None]*sae.W_dec[4]
    head = slice(32, 48)
    without = x + (z2 - z)[..., head] @ m0.out_proj.weight[:, head].T
    def into(v): return v - write(x) + write(without)
    with hooks((model.blocks[1], into)): want = plain(model, PAIRS.clean)
    keep = torch.arange(len(g)) != g.edge('0.ssm[2]->1.resid_pre.latent[4]')
    assert near(run_edges(model, PAIRS, g, keep), want, 1e-5) and not near(want, base, 1e-5)
    lost = exact(model, PAIRS, g, edges=[int((~keep).nonzero())], nodes=False, progress=False).edges
    assert float(lost[~keep]) == pytest.approx(float((logit_diff(base, PAIRS) - logit_diff(want, PAIRS)).mean()), abs=1e-5)
    x2, = heard(model.hf, PAIRS.corrupt, model.blocks[1])
    seen = model.blocks[1].norm(x - write(x) + write(x2)) @ m1.in_proj.weight.T
    def put(out): return torch.cat([out[..., :96], seen[..., 96:112], out[..., 112:]], -1)
    with hooks((m1.in_proj, put)): want = plain(model, PAIRS.clean)
    keep = torch.arange(len(g)) != g.edge('1.resid_pre.latent[4]->1.ssm.x[2]')
    assert near(run_edges(model, PAIRS, g, keep), want, 1e-5) and not near(want, base, 1e-5)


@torch.no_grad()
def test_two_coders_at_once():
    model = load_model('mock://falcon-h1-tiny')
    g = with_latents(model, model_graph(model), coder(model, 'blocks.1.resid_pre'), IDS)
    g = with_latents(model, g, coder(model, 'blocks.1.mlp_out', 1), [2, 3])
    g = with_latents(model, g, coder(model, 'blocks.1.resid_mid', 2), [5])
    keep, clean = torch.ones(len(g), dtype=torch.bool), plain(model, PAIRS.clean)
    assert near(run_edges(model, PAIRS, g, keep), clean, 1e-5) and near(run_edges(model, PAIRS, g, ~keep), plain(model, PAIRS.corrupt), 1e-5)
    assert '1.resid_pre.latent[4]->1.resid_mid.latent[5]' in g.names and '1.resid_pre.latent[4]->1.mlp.latent[2]' not in g.names
    with torch.enable_grad(): assert near(attribute(model, PAIRS, g, method='eap', frozen=False, progress=False).edges[~g.inner], derivative(model, g)[~g.inner], 1e-4)


def test_a_circuit_of_latents(tmp_path):
    model = load_model('mock://mamba2-tiny')
    sae = coder(model, 'blocks.1.resid_pre')
    g = with_latents(model, model_graph(model), sae, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                    # random weights favour nothing
        found = extract_circuit(model, PAIRS, graph=g, progress=False)
    again = Circuit.from_json(found.to_json(tmp_path/'c.json'), model, coders=[sae])
    assert again.graph.nodes == g.nodes and again.faithfulness().value == pytest.approx(found.faithfulness().value)
    assert found.top_nodes(4, 'latent') and 'stream' in found.by_branch()
    with pytest.raises(ValueError, match='no coder of it'): Circuit.from_json(tmp_path/'c.json', model).faithfulness()
    with pytest.raises(ValueError, match='another coder'): Circuit.from_json(tmp_path/'c.json', model, coders=[coder(model, 'blocks.1.resid_pre', 1)])


def test_coders_that_are_refused():
    model = load_model('mock://jamba-tiny')
    g = model_graph(model)
    fine = coder(model, 'blocks.1.resid_mid')
    for bad, ids, said in ((coder(model, 'blocks.0.resid_pre'), IDS, 'later site'), (coder(model, 'blocks.0.ssm.conv'), IDS, 'plain autoencoder of one of'),
                           (fine, [24], 'some of 0 to 23'), (fine, [], 'some of 0 to 23'), (fine, [True, 'a'], 'some of 0 to 23'),
                           (coder(model, 'blocks.1.resid_mid', normalize='layer_norm'), IDS, 'norm of its own')):
        with pytest.raises(ValueError, match=said): with_latents(model, g, bad, ids)
    with pytest.raises(ValueError, match='one for each site'): with_latents(model, with_latents(model, g, fine, IDS), fine, [2])
    other = load_model('mock://mamba2-tiny')
    with pytest.raises(ValueError, match='expected its own model'): with_latents(other, model_graph(other), fine, IDS)


def test_what_latents_are_in_the_stream():
    model = load_model('mock://falcon-h1-tiny')
    g = with_latents(model, model_graph(model), coder(model, 'blocks.0.ssm.out_proj_in'), IDS)
    n = g.nodes[latents(g)[0]]
    _, cache = model.run_with_cache(PAIRS.clean, ['blocks.0.ssm.out_proj_in', 'blocks.0.ssm.out'])
    assert near(into_stream(model, n, apart(g, n, cache['blocks.0.ssm.out_proj_in'])).sum(0), cache['blocks.0.ssm.out'], 1e-5)


# -- experts -------------------------------------------------------------------------------
MIXED = ['jamba', 'nemotron-h', 'granite-hybrid', 'qwen3-next', 'kimi-linear']


@pytest.fixture(scope='module', params=MIXED)
def mixed(request):
    model = load_model(f'mock://{request.param}-tiny')
    return model, with_experts(model, model_graph(model))


def test_experts_are_nodes(mixed):
    model, g = mixed
    whole = model_graph(model)
    some = [n for n in g.nodes if n.kind == 'expert']
    blocks = {n.block for n in some}
    assert blocks == {i for i in range(model.n_layers) if 'mlp.experts' in model.adapter.block_sites(model.config, i)}
    for i in blocks:
        mine, old = [n for n in some if n.block == i], whole.nodes[whole.index[f'{i}.mlp']]
        assert len(mine) - (mine[-1].name == f'{i}.mlp.rest') == model.heads(f'blocks.{i}.mlp.experts') and f'{i}.mlp' not in g.index
        assert all((n.reads, n.writes) == (old.reads, old.writes) for n in mine)


@torch.no_grad()
def test_both_ends_with_experts(mixed):
    model, g = mixed
    keep, clean = torch.ones(len(g), dtype=torch.bool), plain(model, PAIRS.clean)
    for ablation in ('patch', 'mean', 'zero'): assert near(run_edges(model, PAIRS, g, keep, ablation), clean, 1e-5)
    assert near(run_edges(model, PAIRS, g, ~keep), plain(model, PAIRS.corrupt), 1e-5)


@torch.no_grad()
def test_an_expert_without_any_edge_is_an_expert_exchanged(mixed):
    model, g = mixed
    found = exact(model, PAIRS, g, edges=False, nodes=[n.name for n in g.nodes if n.kind == 'expert'], progress=False).nodes
    base = logit_diff(plain(model, PAIRS.clean), PAIRS)
    for k, n in enumerate(g.nodes):
        if n.kind != 'expert': continue
        experts, out = f'blocks.{n.block}.mlp.experts', f'blocks.{n.block}.mlp_out'
        a, b = (model.run_with_cache(ids, [experts, out])[1] for ids in (PAIRS.clean, PAIRS.corrupt))
        if n.heads: change = (b[experts] - a[experts])[:, :, n.heads[0]]
        else: change = b[out] - b[experts].sum(2) - a[out] + a[experts].sum(2)
        want = PAIRS.last(model.run(PAIRS.clean, edit=patch(out, a[out] + change)).logits)
        assert near(run_edges(model, PAIRS, g, g.edges[:, 0] != k), want, 1e-5), n.name
        assert float(found[k]) == pytest.approx(float((base - logit_diff(want, PAIRS)).mean()), abs=1e-4), n.name


@torch.no_grad()
def test_one_edge_into_an_expert(mixed):
    "All experts hear the clean prompt but one, which hears the counterfactual's embedding; its router too."
    model, g = mixed
    n = next(n for n in g.nodes if n.kind == 'expert' and n.block > 0)
    experts, out = f'blocks.{n.block}.mlp.experts', f'blocks.{n.block}.mlp_out'
    mid = n.stream
    embed = [model.run_with_cache(ids, 'blocks.0.resid_pre')[1]['blocks.0.resid_pre'] for ids in (PAIRS.clean, PAIRS.corrupt)]
    x = model.run_with_cache(PAIRS.clean, [mid, experts, out])[1]
    moved = model.run_with_cache(PAIRS.clean, [experts], edit=patch(mid, x[mid] + embed[1] - embed[0]))[1][experts]
    want = PAIRS.last(model.run(PAIRS.clean, edit=patch(out, x[out] + (moved - x[experts])[:, :, 0])).logits)
    keep = torch.arange(len(g)) != g.edge(f'embed->{n.name}')
    assert near(run_edges(model, PAIRS, g, keep), want, 1e-5)


@pytest.mark.parametrize('ablation', ['patch', 'mean'])
def test_scores_of_experts_are_the_derivative_of_a_run_of_edges(mixed, ablation):
    model, g = mixed
    ours, want = attribute(model, PAIRS, g, method='eap', ablation=ablation, progress=False), derivative(model, g, True, ablation)
    some = ~g.inner
    assert near(ours.edges[some], want[some], 1e-4)
    into = torch.tensor([g.nodes[b].kind == 'expert' for b in g.edges[:, 1].tolist()])
    assert near(ours.edges[into], want[into], 1e-3) and want[into].abs().max() > 0


def test_experts_that_are_not_there():
    model = load_model('mock://mamba2-tiny')
    with pytest.raises(ValueError, match='with experts'): with_experts(model, model_graph(model))
