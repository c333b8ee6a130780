"""A close look at one node: its numbers sum to the node's score, and each is a derivative on the bare model with that part alone moved at that token."""
import re
import warnings

import pytest
import torch
from test_apart import IDS, MIXED, coder, latents
from test_attribute import near
from test_subgraph import PAIRS, heard, hooks

from circuitbench.apart import with_experts, with_latents
from circuitbench.attribute import attribute
from circuitbench.circuit import extract_circuit
from circuitbench.closeup import closeup, node_by_position
from circuitbench.edit import apply
from circuitbench.frozen import frozen_norms
from circuitbench.graph import model_graph
from circuitbench.load import load_model
from circuitbench.pairs import logit_diff

PAIR = PAIRS[:1]
T = PAIR.clean.shape[1]
STEPS = [(2, 5), (2, 4), (0, 5)]


def carrying(model):
    "A graph in which the last recurrent head of the first block that has some carries a few steps."
    heads = [n for n in model_graph(model).nodes if n.kind == 'head' and n.branch == 'ssm']
    return model_graph(model, carried={[n.name for n in heads if n.block == heads[0].block][-1]: STEPS})


def finer(site): return lambda model: with_latents(model, model_graph(model), coder(model, site), IDS)
def experts(model): return with_experts(model, model_graph(model))
def lagged(model): return model_graph(model, lags=True)


PLAIN = [(name, 'plain', model_graph) for name in ('mamba2', 'mamba1', 'jamba', 'rwkv7', 'hymba', 'qwen3-next', 'zamba2', 'llama')]
SHARED = [*((name, 'lags', lagged) for name in ('mamba2', 'rwkv7', 'kimi-linear')), *((name, 'steps', carrying) for name in ('mamba1', 'mamba2', 'rwkv7', 'hymba', 'kimi-linear'))]
SITES = [('mamba2', 'blocks.1.resid_pre'), ('mamba2', 'blocks.1.ssm.out_proj_in'), ('jamba', 'blocks.0.mlp_out'), ('falcon-h1', 'blocks.1.attn.z'), ('rwkv7', 'blocks.1.resid_mid'), ('hymba', 'blocks.1.resid_pre')]
APART = [*((name, 'experts', experts) for name in MIXED), *((name, site, finer(site)) for name, site in SITES)]


@pytest.fixture(scope='module')
def case(request):
    name, _, graph = request.param
    model = load_model(f'mock://{name}-tiny')
    return model, graph(model)


def cases(some): return pytest.mark.parametrize('case', some, indirect=True, ids=[f'{name}-{what}' for name, what, _ in some])


def some(g):
    "The first node of each kind, and all that are finer parts."
    one = {}
    for n in g.nodes: one.setdefault((n.branch, n.kind, n.port, n.lag), n)
    return dict.fromkeys(n for n in [*one.values(), *(n for n in g.nodes if n.kind in ('latent', 'expert') or n.steps)] if n.kind != 'logits')


@cases(PLAIN + SHARED + APART)
def test_positions_sum_to_the_score_of_the_node(case):
    model, g = case
    nodes = attribute(model, PAIR, g, method='eap', progress=False).nodes
    top = float(nodes.nan_to_num().abs().max())
    for n in some(g):
        v = node_by_position(model, PAIRS, g, n.name)
        assert v.shape == (T,) and float(v.sum()) == pytest.approx(float(nodes[g.index[n.name]]), abs=2e-5*top), n.name


@cases(APART)
def test_parts_of_a_site_sum_to_the_site(case):
    "Latents with what they leave over, experts with what is beside them."
    model, g = case
    by = {}
    for n in g.nodes:
        if n.kind == 'latent': by.setdefault(n.site, []).append(n.name)
        if n.kind == 'expert': by.setdefault(f'blocks.{n.block}.mlp_out', []).append(n.name)
    for site, mine in by.items():
        other = model.run_with_cache(PAIR.corrupt, site)[1][site]
        with frozen_norms(): out, cache = model.run_with_cache(PAIR.clean, site, grad=True)
        slope = cache.grad(logit_diff(PAIR.last(out.logits), PAIR).sum())[site]
        whole = ((cache[site].detach() - other)*slope)[0].flatten(1).sum(1)
        assert near(sum(node_by_position(model, PAIR, g, name) for name in mine), whole, 1e-4) and float(whole.abs().max()) > 1e-3


@cases(SHARED)
def test_a_port_without_its_lag_or_steps_is_the_sum_over_them(case):
    model, g = case
    base = next(n.name.partition('@')[0] for n in g.nodes if (n.lag or n.steps) and n.name.startswith('0.ssm'))
    parts = [node_by_position(model, PAIR, g, n.name) for n in g.nodes if n.name.partition('@')[0] == base]
    assert len(parts) > 1 and near(node_by_position(model, PAIR, g, base), sum(parts), 1e-5)


def slopes(model, site, change):
    "Of the metric by how much of a change (batch, pos, ...) is made at each position, norms held still."
    s = torch.zeros(T, requires_grad=True)
    put = apply(site, lambda x: x + s.view(-1, *[1]*(x.dim() - 2))*change)
    with frozen_norms(): logits = model.run(PAIR.clean, edit=put, grad=True).logits
    return torch.autograd.grad(logit_diff(PAIR.last(logits), PAIR).sum(), s)[0]


def at(model, *sites): return [[c[s] for s in sites] for c in (model.run_with_cache(ids, [*sites])[1] for ids in (PAIR.clean, PAIR.corrupt))]


@pytest.mark.parametrize('name, site', [s for s in SITES if not s[1].endswith('resid_mid')])    # an edit there is heard by one of its two readers
def test_a_latent_by_hand(name, site):
    "Its own row of the decoder moved at one token, and what no chosen latent holds."
    model = load_model(f'mock://{name}-tiny')
    g = finer(site)(model)
    node, sae = g.nodes[latents(g)[0]], g.coders[g.nodes[latents(g)[0]].site]
    write = lambda x, k: ((x.flatten(2) - sae.b_dec) @ sae.W_enc[:, k] + sae.b_enc[k]).clamp_min(0)[..., None]*sae.W_dec[k]
    (x,), (x2,) = at(model, node.site)
    moved = {k: (write(x2, k) - write(x, k)).view(x.shape).detach() for k in IDS}
    moved['rest'] = x2 - x - sum(moved.values())
    label, wants = node.name.partition('[')[0], {k: -slopes(model, node.site, change) for k, change in moved.items()}
    for k, want in wants.items(): assert near(node_by_position(model, PAIR, g, f'{label}[{k}]'), want, 1e-4), k
    assert sum(float(v.abs().max()) > 1e-4 for v in wants.values()) > 2


@pytest.mark.parametrize('name', MIXED)
def test_an_expert_by_hand(name):
    "And what its block adds beside its experts."
    model = load_model(f'mock://{name}-tiny')
    g = experts(model)
    block = min(n.block for n in g.nodes if n.kind == 'expert')
    (a, whole), (b, whole2) = at(model, f'blocks.{block}.mlp.experts', f'blocks.{block}.mlp_out')
    best = int((b - a).square().sum((0, 1, 3)).argmax())
    want = -slopes(model, f'blocks.{block}.mlp_out', (b - a)[:, :, best])
    assert near(node_by_position(model, PAIR, g, f'{block}.mlp[{best}]'), want, 1e-4) and float(want.abs().max()) > 1e-5
    if f'{block}.mlp.rest' in g.index:
        want = -slopes(model, f'blocks.{block}.mlp_out', whole2 - b.sum(2) - whole + a.sum(2))
        assert near(node_by_position(model, PAIR, g, f'{block}.mlp.rest'), want, 1e-4) and float(want.abs().max()) > 1e-5


def test_a_block_and_a_head_by_hand():
    model = load_model('mock://zamba2-tiny')
    g = model_graph(model)
    n = next(n for n in g.nodes if n.branch == 'block' and n.block > 0)
    (x, y), (x2, y2) = at(model, f'blocks.{n.block}.resid_pre', n.site)
    assert near(node_by_position(model, PAIR, g, n.name), -slopes(model, n.site, y2 - x2 - y + x), 1e-4)
    model = load_model('mock://mamba2-tiny')
    (z,), (z2,) = at(model, site := 'blocks.1.ssm.out_proj_in')
    change = torch.zeros_like(z)
    change[..., 32:48] = (z2 - z)[..., 32:48]
    assert near(node_by_position(model, PAIR, model_graph(model), '1.ssm[2]'), -slopes(model, site, change), 1e-4)


def test_a_carried_step_by_hand():
    "The stream before a block of Mamba-2 moved at one token, heard by the write of step 2 alone, and found by step 5 alone."
    model = load_model('mock://mamba2-tiny')
    g, block, m = model_graph(model, carried={'1.ssm[2]': [(2, 5)]}), model.blocks[1], model.blocks[1].mixer
    pair = PAIRS[1:2]                                                      # answered at step 5, in the last block
    (x,), (x2,) = (heard(model.hf, ids, block) for ids in (pair.clean, pair.corrupt))
    s = torch.zeros(6, requires_grad=True)
    def parts(x):
        wide = block.norm(x) @ m.in_proj.weight.T
        xBC, dt = wide[..., 64:64 + m.conv_dim], torch.nn.functional.softplus(wide[..., 64 + m.conv_dim:] + m.dt_bias)
        past = torch.nn.functional.pad(xBC, (0, 0, 3, 0))
        xBC = sum(past[:, k:k + 6]*m.conv1d.weight[:, 0, k] for k in range(4)) + (0 if m.conv1d.bias is None else m.conv1d.bias)
        x, B, C = torch.nn.functional.silu(xBC).split([64, 2*m.ssm_state_size, 2*m.ssm_state_size], -1)
        return x[:, 2, 32:48], B[:, 2].view(len(x), 2, -1)[:, 1], C[:, 5].view(len(x), 2, -1)[:, 1].detach(), dt[:, :, 2]
    with frozen_norms():
        u, B, C, dt = parts(x + s[:, None]*(x2 - x))
        decay = torch.exp(-dt[:, 3:6].detach().sum(1)*m.A_log[2].exp())
        found = (dt[:, 2]*decay*(B*C).sum(1))[:, None]*u
        def into(y):
            y = y.clone()
            y[:, 5, 32:48] += found - found.detach()
            return y
        with hooks((m.norm, into)): logits = model.hf(pair.clean, use_cache=False).logits
    want, = torch.autograd.grad(logit_diff(pair.last(logits), pair).sum(), s)
    got = node_by_position(model, pair, g, '1.ssm.state[2]@2>5')
    assert near(got, -want, 1e-3) and want[:3].abs().min() > 0 and not want[3:].any() and not got[3:].any()


def test_it_is_what_the_inspector_tells():
    "Of each node of a circuit with latents, on the colour strip that opens beside the picture."
    model = load_model('mock://mamba2-tiny')
    g = finer('blocks.1.resid_pre')(model)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                    # random weights favour nothing
        found = extract_circuit(model, PAIR, graph=g, method='eap', budgets=(), progress=False)
    look = found.inspect()
    for name in [g.nodes[k].name for k in latents(g)]:
        said = [float(v.replace('−', '-').replace(',', '')) for v in re.findall(r'title="[^"]* = ([^"]+)"', look.told(name))]
        assert len(said) == T and sum(said) == pytest.approx(float(found.nodes[g.index[name]]), rel=.02, abs=2e-4)


def test_names_and_graphs_that_are_refused():
    model, other = load_model('mock://mamba2-tiny'), load_model('mock://jamba-tiny')
    g = model_graph(model)
    with pytest.raises(ValueError, match='expected one such as'): closeup(model, PAIRS, g, '9.ssm[0]')
    with pytest.raises(ValueError, match="got node '0.ssm'"): node_by_position(model, PAIRS, g, '0.ssm')
    with pytest.raises(ValueError, match='got a graph of'): node_by_position(other, PAIRS, g, '0.ssm[0]')
