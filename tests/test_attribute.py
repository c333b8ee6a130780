"""Pairs, metrics and attribution: against derivatives of float64 equations, a plain loop over hooks on the bare transformer, and a circuit set by hand."""
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_subgraph import BESIDE, PAIRS, RESTS, Norm, heard, llama_circuit, mamba2_circuit, others, rest_of
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from circuitbench.attribute import attribute
from circuitbench.edit import patch
from circuitbench.exact import exact
from circuitbench.exchange import instead, means
from circuitbench.frozen import frozen_norms
from circuitbench.graph import model_graph
from circuitbench.hook import HookedModel
from circuitbench.load import load_model
from circuitbench.pairs import Pairs, as_pairs, ends, likeness, log_prob, logit_diff, metric_of, resampled
from circuitbench.site import families
from circuitbench.subgraph import run_edges
from circuitbench.task import Prompt, facts

LEVEL = Pairs(PAIRS.clean, PAIRS.corrupt, torch.tensor([8, 8, 8]), PAIRS.target, PAIRS.wrong)      # prompts of one length


@pytest.fixture(scope='module', params=sorted(families()))
def family(request): return load_model(f'mock://{request.param}-tiny')


@pytest.fixture(scope='module')
def graphs(family): return model_graph(family), model_graph(family, lags=True)


@pytest.fixture(scope='module')
def scored(family, graphs):
    "Scores of the graph without lags or with them, made once for all tests that only look at them."
    made = {}
    def get(lags, **kw):
        key = lags, *sorted((dict(frozen=True, ablation='patch', method='eap') | kw).items())
        if key not in made: made[key] = eap(family, graphs[lags], **kw)
        return made[key]
    return get


@pytest.fixture(scope='module')
def mamba2(): return load_model('mock://mamba2-tiny')


@pytest.fixture(scope='module')
def tiny(): return load_model('tiny://mamba2')


def eap(model, g, pairs=PAIRS, **kw): return attribute(model, pairs, g, **dict(method='eap', progress=False) | kw)


def near(a, b, tol):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return float((a - b).abs().max()) <= tol*float(b.abs().max())


def kinds(g): return [g.nodes[i] for i in g.edges[:, 0].tolist()]


def shared_keys(g):
    "Inner edges of keys and values that several heads have in common."
    served = torch.bincount(g.edges[:, 0], minlength=len(g.nodes))
    return torch.tensor([n.kind == 'port' and n.branch == 'attn' and int(served[g.index[n.name]]) > 1 for n in kinds(g)])


def unmasked(g):
    "Inner edges that a mask of floats leaves alone: those of shared keys and values, and of what is heard beside the ports."
    return shared_keys(g) | torch.tensor([n.port == 'rest' for n in kinds(g)])


# -- the derivative of a run of edges ------------------------------------------------------
def derivative(model, g, frozen=False, ablation='patch'):
    "Of the metric by how much of each edge is kept, at all of all."
    keep = torch.ones(len(g), requires_grad=True)
    with frozen_norms(frozen): value = logit_diff(run_edges(model, PAIRS, g, keep, ablation, tokens=10**6), PAIRS).mean()
    return torch.autograd.grad(value, keep)[0]


@pytest.mark.parametrize('ablation, frozen', [('patch', False), ('patch', True), ('mean', False), ('zero', False), *(pytest.param(a, True, marks=pytest.mark.slow) for a in ('mean', 'zero'))])
def test_scores_are_the_derivative_of_a_run_of_edges(family, graphs, scored, ablation, frozen):
    g = graphs[0]
    ours, want = scored(False, frozen=frozen, ablation=ablation).edges, derivative(family, g, frozen, ablation)
    some = ~unmasked(g)
    assert near(ours[some], want[some], 1e-4) and want[some].abs().max() > 1e-2


@pytest.mark.parametrize('frozen', [False, True], ids=['plain', 'frozen'])
def test_scores_by_lag_are_derivatives_too(family, graphs, scored, frozen):
    "Of the edges of the stream."
    g = graphs[1]
    assert near(scored(True, frozen=frozen).edges[~g.inner], derivative(family, g, frozen)[~g.inner], 1e-4)


@pytest.mark.parametrize('ablation', ['mean', 'zero'])
@pytest.mark.parametrize('name', ['mamba2', 'rwkv7', 'jamba'])
def test_scores_by_lag_with_another_ablation(name, ablation):
    model = load_model(f'mock://{name}-tiny')
    g = model_graph(model, lags=True)
    assert near(eap(model, g, frozen=False, ablation=ablation).edges[~g.inner], derivative(model, g, False, ablation)[~g.inner], 1e-4)


@pytest.mark.parametrize('frozen', [False, True], ids=['plain', 'frozen'])
def test_lags_sum_to_their_port(graphs, scored, frozen):
    whole, lagged = (dict(zip(g.names, scored(lags, frozen=frozen).edges.tolist())) for lags, g in enumerate(graphs))
    inner = dict(zip(graphs[0].names, graphs[0].inner.tolist()))
    total = {}
    for name, v in lagged.items(): total[name.partition('@')[0]] = total.get(name.partition('@')[0], 0) + v
    outer = [n for n in whole if not inner[n]]
    assert near([total[n] for n in outer], [whole[n] for n in outer], 1e-4)


def test_what_goes_into_a_lag_comes_out_of_it(graphs, scored):
    "A lag's edges to its heads share what its edges from the stream bring."
    g, found = graphs[1], scored(True)
    into, out = (torch.zeros(len(g.nodes)).index_add(0, g.edges[:, end], found.edges) for end in (1, 0))
    ports = [k for k, n in enumerate(g.nodes) if n.kind == 'port']
    if ports: assert near(out[ports], into[ports], 1e-4) and near(found.nodes[ports], into[ports], 1e-4)


@pytest.mark.parametrize('name', ['mamba2', 'falcon-h1', 'rwkv7', 'olmo-hybrid', 'hymba', 'llama'])
def test_finite_differences_of_a_run_of_edges(name):
    model = load_model(f'mock://{name}-tiny', dtype=torch.float64)
    model.hf.config._experts_implementation = 'eager'                      # a grouped product knows no float64
    g = model_graph(load_model(f'mock://{name}-tiny'))
    ours, h = eap(model, g, frozen=False).edges, .001
    some = [e for e in ours.abs().topk(4).indices.tolist() + list(range(3, len(g), len(g)//4)) if not unmasked(g)[e]]
    for e in some:
        ends = []
        for s in (1 + h, 1 - h):
            keep = torch.ones(len(g))
            keep[e] = s
            with torch.no_grad(): ends.append(float(logit_diff(run_edges(model, PAIRS, g, keep, tokens=10**6), PAIRS).mean()))
        assert float(ours[e]) == pytest.approx((ends[0] - ends[1])/(2*h), abs=2e-3*float(ours.abs().max())), g.names[e]


@pytest.mark.parametrize('name, i, way', RESTS)
def test_what_is_heard_beside_the_ports_is_scored_by_its_slope(name, i, way):
    "All of it, the edge of one writer, and the edge to each head: by hand on the bare model, a little past the clean stream and before it."
    model = load_model(f'mock://{name}-tiny', dtype=torch.float64)
    model.hf.config._experts_implementation = 'eager'
    g, h = model_graph(load_model(f'mock://{name}-tiny')), .003          # parts of these models stay in float32
    rest, heads = rest_of(model, g, i)
    found, name = eap(model, g, frozen=False), g.nodes[rest].name
    (e, pre), (e2, pre2) = (heard(model.hf, ids, model.blocks[0], model.blocks[i]) for ids in (PAIRS.clean, PAIRS.corrupt))
    gap = lambda v: float((v[torch.arange(3), PAIRS.target] - v[torch.arange(3), PAIRS.wrong]).mean())
    slope = lambda change, mine: (gap(way(model, i, pre + h*change, mine)) - gap(way(model, i, pre - h*change, mine)))/(2*h)
    everyone = [*range(len(heads))]
    assert float(found.nodes[rest]) == pytest.approx(slope(pre - pre2, everyone), abs=1e-4)
    assert float(found.edges[g.edge(f'embed->{name}')]) == pytest.approx(slope(e - e2, everyone), abs=1e-4)
    inner = [float(found.edges[g.edge(f'{name}->{g.nodes[k].name}')]) for k in heads]
    assert inner == pytest.approx([slope(pre - pre2, [k]) for k in everyone], abs=1e-4) and max(map(abs, inner)) > 1e-3


# -- the derivative of the equations, float64 ----------------------------------------------
def slope(circuit, name, h=1e-5):
    "Of the metric by one edge."
    row, at = np.arange(len(PAIRS)), PAIRS.at.numpy()
    gap = lambda logits: (logits[row, at, PAIRS.target.numpy()] - logits[row, at, PAIRS.wrong.numpy()]).mean()
    return (gap(circuit(lambda n: 1 + h*(n == name))) - gap(circuit(lambda n: 1 - h*(n == name))))/(2*h)


@pytest.mark.parametrize('frozen', [False, True], ids=['plain', 'frozen'])
@pytest.mark.parametrize('ablation, lags', [('patch', False), ('patch', True), ('mean', False), ('zero', False), ('position-mean', False), ('resample', False)])
def test_scores_of_mamba2_are_slopes_of_the_equations(mamba2, ablation, lags, frozen):
    "Inner edges, groups of heads and taps included; norms held still at the scales of the clean run, if they are."
    g, other, norm = model_graph(mamba2, lags), others(mamba2.hf, PAIRS, ablation), Norm(still=frozen)
    circuit = lambda on: mamba2_circuit(mamba2.hf, PAIRS.clean.numpy(), other, on, lags, norm)
    circuit(lambda n: 1.)                                                  # the run whose scales are kept
    ours = eap(mamba2, g, frozen=frozen, ablation=ablation).edges
    one_tap = lambda e: lags and bool(g.inner[e]) and g.nodes[g.edges[e, 0]].port in ('dt', 'gate')     # scored by what enters, exchanged by value
    some = [e for e in range(0, len(g), 7 if lags else 3) if not one_tap(e)]
    assert len({g.nodes[i].port for i in g.edges[some, 0].tolist()}) >= 4
    assert near(ours[some], [slope(circuit, g.names[e]) for e in some], 1e-4)


@pytest.mark.parametrize('frozen', [False, True], ids=['plain', 'frozen'])
@pytest.mark.parametrize('lags', [False, True], ids=['whole', 'lags'])
def test_scores_of_a_transformer_are_slopes_of_the_equations(lags, frozen):
    "Every edge, those of shared keys and values too."
    model, other, norm = load_model('mock://llama-tiny'), {}, Norm(still=frozen)
    g = model_graph(model, lags)
    llama_circuit(model.hf, PAIRS.corrupt.numpy(), {}, lambda n: True, other)
    circuit = lambda on: llama_circuit(model.hf, PAIRS.clean.numpy(), other, on, norm=norm)
    circuit(lambda n: 1.)
    ours = eap(model, g, frozen=frozen).edges
    want = [slope(circuit, n.replace('@0', '')) for n in g.names]
    linear = [e for e in range(len(g)) if not (lags and g.inner[e])]       # a lag's inner edge moves its port to first order alone
    assert near(ours[linear], np.array(want)[linear], 1e-4)
    if not lags: assert near(ours, want, 1e-4)


# -- the same by a plain loop over hooks on the bare transformer -----------------------------
@contextmanager
def still(on):
    "Norms of the bare model that divide by numbers."
    def forward(self, x): return self.weight*(x*torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach())
    own = LlamaRMSNorm.forward
    try:
        if on: LlamaRMSNorm.forward = forward
        yield
    finally: LlamaRMSNorm.forward = own


def listened(hf, ids, start=None):
    "A bare run: logits, and what enters and leaves the modules; the embedding as given, if it is."
    seen, handles = {}, []
    def keep(name): return lambda m, args, out: seen.update({name: (args[0] if args else None, out)})
    if start is not None: handles.append(hf.model.embed_tokens.register_forward_hook(lambda m, args, out: start))
    handles.append(hf.model.embed_tokens.register_forward_hook(keep('embed')))
    for i, block in enumerate(hf.model.layers):
        parts = dict(pre=block.input_layernorm, mid=block.post_attention_layernorm, mlp=block.mlp, q=block.self_attn.q_proj, k=block.self_attn.k_proj, v=block.self_attn.v_proj, o=block.self_attn.o_proj)
        handles += [m.register_forward_hook(keep((i, k))) for k, m in parts.items()]
    handles.append(hf.model.norm.register_forward_hook(keep('last')))
    try: return hf(ids, use_cache=False).logits, seen
    finally:
        for h in handles: h.remove()


def written(hf, seen):
    "What each writer adds to the stream: the embedding, heads by their columns, MLPs."
    out, d = {'embed': seen['embed'][1]}, hf.config.head_dim
    for i, block in enumerate(hf.model.layers):
        z, W = seen[i, 'o'][0], block.self_attn.o_proj.weight
        out |= {f'{i}.attn[{h}]': z[..., h*d:(h + 1)*d] @ W[:, h*d:(h + 1)*d].T for h in range(hf.config.num_attention_heads)}
        out[f'{i}.mlp'] = seen[i, 'mlp'][1]
    return out


def by_loop(hf, pairs, steps, frozen):
    "Edge attribution with integrated gradients of the inputs: step k at k/steps of the way from the counterfactual to the clean prompt."
    d, H, K = hf.config.head_dim, hf.config.num_attention_heads, hf.config.num_key_value_heads
    with torch.no_grad(): a, b = (listened(hf, ids)[1] for ids in (pairs.clean, pairs.corrupt))
    change = {n: (v - written(hf, b)[n]) for n, v in written(hf, a).items()}
    scores, row = {}, torch.arange(len(pairs))
    for k in range(1, steps + 1):
        e = (b['embed'][1] + k/steps*(a['embed'][1] - b['embed'][1])).requires_grad_()
        with still(frozen): logits, seen = listened(hf, pairs.clean, e)
        value = (logits[row, pairs.at, pairs.target] - logits[row, pairs.at, pairs.wrong]).mean()
        back = lambda out, into, g=None: torch.autograd.grad(out, into, g, retain_graph=True)[0]
        readers, order = {}, list(change)
        for i, block in enumerate(hf.model.layers):
            before = [n for n in order if n == 'embed' or int(n[0]) < i]
            for port, many in (('q', H), ('k', K), ('v', K)):
                g, W = back(value, seen[i, port][1]), getattr(block.self_attn, f'{port}_proj').weight
                for h in range(many):
                    cols = slice(h*d, (h + 1)*d)
                    readers[f'{i}.attn.{port}[{h}]'] = back(seen[i, 'pre'][1], seen[i, 'pre'][0], g[..., cols] @ W[cols]), before
                moved = (a[i, port][1] - b[i, port][1])                        # within the block: a port through one head
                gz = back(value, seen[i, 'o'][0])
                for h in range(H):
                    only = torch.zeros_like(gz)
                    only[..., h*d:(h + 1)*d] = gz[..., h*d:(h + 1)*d]
                    through, n = moved*back(seen[i, 'o'][0], seen[i, port][1], only), h*many//H
                    name = f'{i}.attn.{port}[{n}]->{i}.attn[{h}]'
                    scores[name] = scores.get(name, 0) + float(through[..., n*d:(n + 1)*d].sum())/steps
            g = back(value, seen[i, 'mlp'][1])
            readers[f'{i}.mlp'] = back(seen[i, 'mlp'][1], seen[i, 'mid'][0], g), [*before, *(f'{i}.attn[{h}]' for h in range(H))]
        readers['logits'] = back(value, seen['last'][0]), order
        for r, (g, some) in readers.items():
            for n in some: scores[f'{n}->{r}'] = scores.get(f'{n}->{r}', 0) + float((change[n]*g).sum())/steps
    return scores


@pytest.mark.parametrize('frozen', [False, True], ids=['plain', 'frozen'])
@pytest.mark.parametrize('steps', [0, 1, 3, 5])
def test_scores_of_a_transformer_are_those_of_a_plain_loop(steps, frozen):
    "Without steps it is EAP."
    model = load_model('mock://llama-tiny')
    found = attribute(model, PAIRS, method='eap-ig' if steps else 'eap', steps=steps or 1, frozen=frozen, progress=False)
    want = by_loop(model.hf, PAIRS, steps or 1, frozen)
    assert {*found.graph.names} == {*want}
    assert near(found.edges, [want[n] for n in found.graph.names], 1e-4)
    assert found.method == ('eap-ig' if steps else 'eap') + f' ({steps} steps)'*bool(steps) + ', norms frozen'*frozen


# -- nodes ---------------------------------------------------------------------------------
@pytest.mark.parametrize('kw', [dict(method='eap', frozen=False), dict(method='eap'), dict(steps=3), dict(method='eap', ablation='zero')], ids=['plain', 'frozen', 'ig', 'zero'])
def test_a_node_is_the_sum_of_its_edges(family, graphs, scored, kw):
    "Of those that leave it: also of what heads hear beside their ports, which is scored by those that enter."
    g, found = graphs[0], scored(False, **dict(method='eap-ig') | kw)
    total = torch.zeros(len(g.nodes)).index_add(0, g.edges[:, 0], found.edges)
    some = [*range(family.adapter.family in BESIDE, len(g.nodes) - 1)]     # there the embedding has ways that are no edges
    assert near(found.nodes[some], total[some], 1e-4)
    assert found.nodes.isnan().nonzero()[:, 0].tolist() == [len(g.nodes) - 1] and not found.edges.isnan().any()


def test_nodes_are_derivatives_by_hooks(mamba2):
    "Of the bare model, by how far the input of an output matrix, or the columns of a port, are taken towards the counterfactual."
    g, hf, row = model_graph(mamba2), mamba2.hf, torch.arange(3)
    nodes = eap(mamba2, g, frozen=False).nodes
    for i, block in enumerate(mamba2.blocks):
        seen = []
        handle = block.mixer.out_proj.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            for ids in (PAIRS.clean, PAIRS.corrupt): hf(ids, use_cache=False)
        handle.remove()
        keep = torch.ones(4, requires_grad=True)
        mixed = lambda m, args, seen=seen, keep=keep: (seen[1] + keep.repeat_interleave(16)*(args[0] - seen[1]),)
        handle = block.mixer.out_proj.register_forward_pre_hook(mixed)
        logits = hf(PAIRS.clean, use_cache=False).logits[row, PAIRS.at]
        handle.remove()
        want = torch.autograd.grad((logits[row, PAIRS.target] - logits[row, PAIRS.wrong]).mean(), keep)[0]
        assert near(nodes[[g.index[f'{i}.ssm[{h}]'] for h in range(4)]], want, 1e-4)


def test_a_small_change_is_exact():
    "Where the counterfactual differs by little, what is attributed is what an exchange does; plain and with integrated gradients."
    model = load_model('mock://mamba2-tiny', dtype=torch.float64)
    E, g = model.hf.backbone.embeddings.weight, model_graph(load_model('mock://mamba2-tiny'))
    with torch.no_grad(): E[7] = E[5] + 1e-3*torch.randn(E.shape[1], generator=torch.Generator().manual_seed(0))
    clean = PAIRS.clean.clone()
    clean[:, 3] = 5
    pairs = Pairs(clean, torch.where(clean == 5, 7, clean), PAIRS.at, PAIRS.target, PAIRS.wrong)
    some = list(range(0, len(g), 9))
    truth = exact(model, pairs, g, edges=some, progress=False)
    for kw in (dict(method='eap'), dict(steps=2)):
        found = eap(model, g, pairs, **dict(method='eap-ig', frozen=False) | kw)
        assert near(found.edges[some], truth.edges[some], 2e-2) and near(found.nodes[:-1], truth.nodes[:-1], 2e-2)


# -- a circuit set by hand, of four heads behind one norm ------------------------------------
KEYS = VALUES = 8
HEADS, WIDE = 4, 8


@pytest.fixture(scope='module')
def mqar():
    "Recall by head 0, read alone; head 1 forgets, heads 2 and 3 remember the same and are not read. Prompts and those whose values are the next."
    hf = Mamba2ForCausalLM(Mamba2Config(
        vocab_size=16, hidden_size=32, num_hidden_layers=1, num_heads=HEADS, head_dim=WIDE, state_size=KEYS, n_groups=1, expand=1, conv_kernel=4,
        chunk_size=8, use_bias=False, tie_word_embeddings=False, layer_norm_epsilon=1e-5, pad_token_id=0, bos_token_id=0, eos_token_id=0)).requires_grad_(False)
    b, m, n, scale = hf.backbone, hf.backbone.layers[0].mixer, torch.arange(8), (25/32)**.5
    for p in (b.embeddings, hf.lm_head, m.in_proj, m.conv1d, m.out_proj): p.weight.zero_()
    for p in (m.conv1d.bias, m.D): p.zero_()
    for p in (b.layers[0].norm, b.norm_f, m.norm): p.weight.fill_(1.)
    b.embeddings.weight[torch.arange(16), torch.arange(16)] = 1.                       # the token, a constant, room for the answer
    b.embeddings.weight[:, 16] = 1.
    z, x, B, C, dt = m.in_proj.weight.split([32, 32, KEYS, KEYS, HEADS])
    z[:, 16] = 4*scale
    x[torch.arange(32), KEYS + (torch.arange(32) + torch.arange(32)//8) % VALUES] = 6*scale     # each head in an order of its own
    B[n, n] = C[n, n] = 6*scale
    dt[:, KEYS:16] = 20*scale                                                          # write on values
    m.dt_bias.fill_(-15.)
    m.A_log.copy_(torch.tensor([-20, np.log(2), -20, -20]))
    m.conv1d.weight[:32, 0, 3] = m.conv1d.weight[40:, 0, 3] = m.conv1d.weight[32:40, 0, 2] = 1.     # B looks at the token before
    m.out_proj.weight[17 + n, n] = 1.
    hf.lm_head.weight[8 + n, 17 + n] = 1.
    make, rows, answer = np.random.default_rng(0), [], []
    for _ in range(256):
        keys, values = make.permutation(KEYS)[:6], make.integers(0, VALUES, 6)
        ask = make.permutation(6)[:3][0]
        rows.append(np.r_[np.stack([keys, 8 + values], 1).ravel(), keys[ask]])
        answer.append(8 + values[ask])
    clean, answer = torch.tensor(np.array(rows)), torch.tensor(answer)
    other = lambda v: torch.where(v < 8, v, 8 + (v - 9) % 8)
    return HookedModel(hf, name='mqar'), Pairs(clean, other(clean), torch.full((256,), 12), answer, other(answer))


def test_frozen_norms_give_the_effects_that_an_exchange_has(mqar):
    "In the reference's convention, the metric with a head's read-out exchanged minus the clean one."
    model, pairs = mqar
    site, row = 'blocks.0.ssm.y', torch.arange(256)
    logits = model.hf(pairs.clean).logits[:, -1]
    assert (logits.argmax(-1) == pairs.target).all()
    other = model.run_with_cache(pairs.corrupt, site)[1][site]
    metric = lambda out: out[row, 12, pairs.target] - out[row, 12, pairs.wrong]
    clean = metric(model.run(pairs.clean).logits)
    truth = [float((metric(model.run(pairs.clean, edit=patch(site, other, heads=h)).logits) - clean).mean()) for h in range(HEADS)]
    assert truth == pytest.approx([-10.337, 0, 0, 0], abs=2e-3)

    def attributed(frozen):
        with frozen_norms(frozen): out, cache = model.run_with_cache(pairs.clean, site, grad=True)
        g = torch.autograd.grad(metric(out.logits).sum(), cache._paths[site][-1][0])[0]
        return ((other - cache[site])*g).sum((1, 3)).mean(0).tolist()
    assert attributed(True) == pytest.approx(truth, abs=1e-3)
    plain = attributed(False)
    assert abs(plain[0] - truth[0]) > 3 and min(abs(v) for v in plain[2:]) > .1


def test_frozen_norms_give_ports_and_heads_their_due(mqar):
    model, pairs = mqar
    truth = exact(model, pairs, edges=False, progress=False)
    g, frozen, plain = truth.graph, eap(model, truth.graph, pairs), eap(model, truth.graph, pairs, frozen=False)
    x, heads = ([g.index[f'0.ssm{s}[{h}]'] for h in range(HEADS)] for s in ('.x', ''))
    assert truth.nodes[x].tolist() == pytest.approx([10.337, 0, 0, 0], abs=2e-3)
    for some in (x, heads): assert frozen.nodes[some].tolist() == pytest.approx(truth.nodes[some].tolist(), abs=1e-3)
    assert frozen.edges[[g.edge(f'0.ssm.x[{h}]->0.ssm[{h}]') for h in range(HEADS)]].tolist() == pytest.approx([10.337, 0, 0, 0], abs=2e-3)
    assert (plain.nodes[x] - truth.nodes[x]).abs().max() > 3 and plain.nodes[x[2:]].abs().min() > .1
    assert frozen.top_nodes(3)[0][1] == pytest.approx(10.337, abs=2e-3) and frozen.clean == pytest.approx(5.168, abs=1e-3) == -frozen.corrupt


# -- frozen norms --------------------------------------------------------------------------
def test_every_norm_held_still_is_a_fixed_scale():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    w, bias = torch.rand(8, dtype=torch.float64) + .5, torch.randn(8, dtype=torch.float64)
    scales = {'layer': 1/(x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt(), 'rms': 1/(x.square().mean(-1, keepdim=True) + 1e-5).sqrt()}
    groups = 1/(x.view(3, 2, 4).var(-1, correction=0, keepdim=True) + 1e-5).sqrt().expand(3, 2, 4).reshape(3, 8)
    centred, by_group = x - x.mean(-1, keepdim=True), (x.view(3, 2, 4) - x.view(3, 2, 4).mean(-1, keepdim=True)).view(3, 8)
    cases = [(lambda: F.layer_norm(x, (8,), w, bias), centred*scales['layer'].detach()*w + bias), (lambda: F.layer_norm(x, (8,)), centred*scales['layer'].detach()),
             (lambda: F.rms_norm(x, (8,), w, 1e-5), x*scales['rms'].detach()*w), (lambda: F.group_norm(x, 2, w, bias), by_group*groups.detach()*w + bias),
             (lambda: x*torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5), x*scales['rms'].detach()),
             (lambda: x*(x.square().mean(-1, keepdim=True) + 1e-5).rsqrt(), x*scales['rms'].detach()), (lambda: F.group_norm(x, 2), by_group*groups.detach())]
    g = torch.randn(3, 8, dtype=torch.float64)
    for f, want in cases:
        with frozen_norms(): held = f()
        free = f()
        assert torch.allclose(held, free) and torch.allclose(held, want)
        a, b, c = (torch.autograd.grad(v, x, g, retain_graph=True)[0] for v in (held, want, free))
        assert torch.allclose(a, b) and not torch.allclose(a, c, atol=1e-3)
    with frozen_norms(False): assert torch.allclose(torch.autograd.grad(cases[0][0](), x, g)[0], torch.autograd.grad(cases[0][0](), x, g)[0])


def test_values_of_frozen_runs_are_those_of_plain_ones(family):
    with torch.no_grad():
        with frozen_norms(): held = family.run(PAIRS.clean).logits
        assert near(held, family.hf(PAIRS.clean, use_cache=False).logits, 1e-5)


# -- what does not change the scores, and what is refused ------------------------------------
@pytest.mark.parametrize('lags', [False, True], ids=['whole', 'lags'])
def test_positions_sum_to_the_scores(family, graphs, lags):
    g = graphs[lags]
    whole, apart = eap(family, g, LEVEL), eap(family, g, LEVEL, by_position=True)
    assert apart.edges.shape == (len(g), 9) and near(apart.edges.sum(1), whole.edges, 1e-4)
    assert near(apart.nodes[:-1], whole.nodes[:-1], 1e-4) and [n for n, _ in apart.top_edges(3)] == [n for n, _ in whole.top_edges(3)]


def test_positions_are_those_that_are_read(mamba2):
    "Prompts alike up to token 4 score nothing before it, and into the logits nothing but at the answer."
    same = Pairs(PAIRS.clean, torch.cat([PAIRS.clean[:, :4], PAIRS.corrupt[:, 4:]], 1), LEVEL.at, PAIRS.target, PAIRS.wrong)
    g = model_graph(mamba2)
    edges = eap(mamba2, g, same, by_position=True).edges
    assert edges[:, :4].abs().max() < 1e-6*edges.abs().max() and (edges[:, 4].abs().max() > 1e-3)
    assert edges[g.edges[:, 1] == len(g.nodes) - 1, :8].abs().max() == 0


@pytest.mark.parametrize('kw', [dict(steps=2), dict(method='eap'), dict(metric='kl', steps=2), dict(metric='log_prob', ablation='mean', steps=2)], ids=['ig', 'eap', 'kl', 'mean'])
@pytest.mark.parametrize('name', ['mamba2', 'hymba', 'nemotron-h'])
def test_small_batches_and_the_order_of_pairs_change_nothing(name, kw):
    model = load_model(f'mock://{name}-tiny')
    g = model_graph(model)
    want, small, turned = (attribute(model, p, g, tokens=t, progress=False, **kw) for p, t in ((PAIRS, 2048), (PAIRS, 1), (PAIRS[[2, 0, 1]], 18)))
    for found in (small, turned):
        assert near(found.edges, want.edges, 1e-4) and near(found.nodes[:-1], want.nodes[:-1], 1e-4) and found.pairs == 3 and not found.note
        assert found.clean == pytest.approx(want.clean, abs=1e-4) and found.corrupt == pytest.approx(want.corrupt, abs=1e-4)


def test_the_ends_of_the_metric(mamba2):
    "Clean, and with everything exchanged."
    clean, corrupt = (PAIRS.last(mamba2.hf(ids).logits).detach() for ids in (PAIRS.clean, PAIRS.corrupt))
    gap = lambda out: float((out[torch.arange(3), PAIRS.target] - out[torch.arange(3), PAIRS.wrong]).mean())
    found = attribute(mamba2, PAIRS, steps=1, progress=False)
    assert (found.clean, found.corrupt) == pytest.approx((gap(clean), gap(corrupt)), abs=1e-4)
    assert repr(found).startswith(f'eap-ig (1 steps), norms frozen on mock://mamba2-tiny, 3 pairs: metric {gap(clean):.3f} clean, {gap(corrupt):.3f} with everything exchanged\n')
    assert len(repr(found).splitlines()) == 6 and len(found.top_edges(10**6)) == len(found.graph) and len(found.top_nodes()) == 10
    zeroed = attribute(mamba2, PAIRS, method='eap', ablation='zero', progress=False)
    with torch.no_grad():
        handle = mamba2.hf.backbone.embeddings.register_forward_hook(lambda m, args, out: out*0)
        try: empty = gap(PAIRS.last(mamba2.hf(PAIRS.clean).logits))
        finally: handle.remove()
    assert zeroed.corrupt == pytest.approx(empty, abs=1e-4)


def test_means_are_over_the_tokens_of_the_prompts(mamba2):
    seen = []
    handle = mamba2.blocks[1].mixer.out_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad(): mamba2.hf(PAIRS.clean)
    handle.remove()
    name = 'blocks.1.ssm.out_proj_in'
    rows = torch.cat([seen[0][i, :int(a) + 1] for i, a in enumerate(PAIRS.at)])
    for names in ([name], [name, name]):
        found = means(mamba2, PAIRS, names)
        assert found[name].shape == (1, 1, 64) and torch.allclose(found[name][0, 0], rows.mean(0), atol=1e-5)
    assert torch.equal(instead(mamba2, PAIRS, [name], 'mean', found)[name], found[name]) and (instead(mamba2, PAIRS, [name], 'zero')[name] == 0).all()
    assert torch.equal(instead(mamba2, PAIRS, [name])[name], mamba2.run_with_cache(PAIRS.corrupt, name)[1][name])


def test_arguments_that_are_refused(mamba2):
    llama = load_model('mock://llama-tiny')
    for kw, said in ((dict(graph=model_graph(llama)), 'got a graph of mock://llama-tiny, expected one of mock://mamba2-tiny'),
                     (dict(method='acdc'), r"got method='acdc', expected one of \['eap', 'eap-ig'\]"), (dict(steps=0), 'got steps=0, expected 1 or more'),
                     (dict(steps=2.5), 'got steps=2.5'), (dict(ablation='noise'), r"got ablation='noise', expected one of \['patch', 'mean', 'position-mean', 'zero', 'resample'\]"),
                     (dict(metric='loss'), "got metric='loss'"), (dict(by_position=True), 'got prompts of 6 to 9 tokens, expected one length'),
                     (dict(metric=lambda logits, pairs: logits), r'got a metric of shape \(3, 257\), expected \(3,\), a number a pair'),
                     (dict(metric=lambda logits, pairs: logit_diff(logits, pairs).mean()), r'got a metric of shape \(\)'),
                     (dict(metric=lambda logits, pairs: torch.ones(len(pairs))), 'does not depend on the logits')):
        with pytest.raises(ValueError, match=said): attribute(mamba2, PAIRS, progress=False, **kw)


def test_gradients_that_are_not_finite_are_named():
    model = load_model('mock://mamba2-tiny')
    gone = lambda logits, pairs: logit_diff(logits, pairs)/(logit_diff(logits, pairs) - logit_diff(logits, pairs))
    with pytest.raises(ValueError, match=r'got gradients at blocks\.\d\.\S+ that are not finite'): eap(model, model_graph(model), metric=gone)
    with torch.no_grad(): model.blocks[1].mixer.out_proj.weight[3, 5] = torch.inf
    with pytest.raises(ValueError, match=r'got values at blocks\.1\.resid_post that are not finite'): eap(model, model_graph(load_model('mock://mamba2-tiny')))


def stops_at(call, answer=200):
    "The logit difference, interrupted the n-th time that it is asked about the pair of an answer."
    seen = [0]
    def metric(logits, pairs):
        seen[0] += answer in pairs.target
        if seen[0] == call and answer in pairs.target: raise KeyboardInterrupt
        return logit_diff(logits, pairs)
    return metric


@pytest.mark.parametrize('kw, call', [(dict(method='eap'), 1), (dict(method='eap'), 2), *((dict(method='eap-ig', steps=3), n) for n in (1, 2, 3, 4))])
def test_an_interrupt_keeps_the_pairs_that_were_done(mamba2, kw, call):
    "The third is given up as a whole: in its counterfactual, its clean run, a step of its integral."
    g = model_graph(mamba2)
    found, want = eap(mamba2, g, metric=stops_at(call), tokens=9, **kw), eap(mamba2, g, PAIRS[:2], **kw)
    assert found.note == 'interrupted after 2 of 3 pairs' and found.pairs == 2
    assert near(found.edges, want.edges, 1e-4) and near(found.nodes[:-1], want.nodes[:-1], 1e-4)
    assert (found.clean, found.corrupt) == pytest.approx((want.clean, want.corrupt), abs=1e-4)


def test_an_interrupt_before_anything_is_one(mamba2):
    with pytest.raises(KeyboardInterrupt): eap(mamba2, model_graph(mamba2), metric=stops_at(2, 5), tokens=9)


def test_nothing_is_left_on_the_model(family, graphs):
    eap(family, graphs[0])
    assert not any(m._forward_hooks or m._forward_pre_hooks or 'forward' in m.__dict__ for m in family.hf.modules())


# -- pairs ---------------------------------------------------------------------------------
def of(clean=((1, 2), (3, 4)), corrupt=((1, 5), (3, 6)), at=(1, 1), target=(7, 8), wrong=(8, 7)): return Pairs(*map(torch.tensor, (clean, corrupt, at, target, wrong)))


@pytest.mark.parametrize('kw, said', [
    (dict(corrupt=((1, 5, 2), (3, 6, 2))), r'got clean \(2, 2\) and corrupt \(2, 3\)'), (dict(clean=(1, 2), corrupt=(1, 2)), r'expected \(n, pos\) of one shape'),
    (dict(clean=((),)*2, corrupt=((),)*2), 'positions below 0'), (dict(at=(1,)), r'got at of shape \(1,\), expected \(2,\)'), (dict(target=(7, 8, 9)), 'got target of shape'),
    (dict(wrong=((8,), (7,))), 'got wrong of shape'), (dict(at=(1, 2)), 'got at up to 2, expected positions below 2'), (dict(at=(-1, 1)), 'expected positions below 2'),
    (dict(wrong=(8, 8)), 'got wrong = target in pair 1, expected two answers')])
def test_pairs_that_are_refused(kw, said):
    with pytest.raises(ValueError, match=said): of(**kw)
    with pytest.raises(ValueError): Pairs(*(torch.zeros(0, *s, dtype=torch.long) for s in ((2,), (2,), (), (), ())))


def test_other_prompts_as_counterfactuals():
    "Each is another prompt, as long where there is one, else longer."
    at = torch.tensor([2, 2, 3, 1, 3, 2])
    some = Pairs(torch.arange(24).view(6, 4), torch.zeros(6, 4, dtype=torch.long), at, torch.arange(6), torch.arange(6) + 9)
    drawn = {seed: [int(row[0])//4 for row in resampled(some, seed).corrupt] for seed in range(30)}
    for rows in drawn.values():
        assert all(j != i for i, j in enumerate(rows)) and rows[2] == 4 and rows[4] == 2 and all(at[j] == 2 for j in (rows[0], rows[1], rows[5]))
    assert len({rows[3] for rows in drawn.values()}) == 5 and drawn[3] == [int(r[0])//4 for r in resampled(some, 3).corrupt]
    with pytest.raises(ValueError, match='expected several'): resampled(some[:1])


def test_some_pairs():
    p = PAIRS
    assert len(p) == 3 and repr(p) == '3 pairs of up to 9 tokens' and repr(p[1]) == '1 pair of up to 6 tokens'
    for rows, want, pos in ((1, [1], 6), (slice(1, 3), [1, 2], 8), ([2, 0], [2, 0], 9), (-1, [2], 8), (slice(None, None, 2), [0, 2], 9)):
        some = p[rows]
        assert torch.equal(some.clean, p.clean[want][:, :pos]) and torch.equal(some.corrupt, p.corrupt[want][:, :pos])
        for k in ('at', 'target', 'wrong'): assert torch.equal(getattr(some, k), getattr(p, k)[want])
    for tokens, sizes in ((1, [1, 1, 1]), (9, [1, 1, 1]), (18, [2, 1]), (26, [2, 1]), (27, [3]), (10**6, [3])):
        parts = list(p.batches(tokens))
        assert [len(b) for b in parts] == sizes and torch.cat([b.target for b in parts]).tolist() == p.target.tolist()
        assert all(b.clean.shape[1] == int(b.at.max()) + 1 for b in parts)
    first, rest = p.split(1)
    assert first.target.tolist() == [5] and rest.target.tolist() == [17, 200]
    for n in (0, 3, -1):
        with pytest.raises(ValueError, match=f'got n={n} of 3 pairs, expected 1 to 2'): p.split(n)
    logits = torch.randn(3, 9, 257).double()
    assert torch.equal(p.last(logits), torch.stack([logits[i, a] for i, a in enumerate(p.at.tolist())]).float()) and p.to('cpu').note == p.note


def test_padding_changes_nothing(mamba2):
    "Whatever stands behind the answer."
    clean, corrupt = PAIRS.clean.clone(), PAIRS.corrupt.clone()
    for row, a in enumerate(PAIRS.at.tolist()): clean[row, a + 1:], corrupt[row, a + 1:] = 0, 9
    other, g = Pairs(clean, corrupt, PAIRS.at, PAIRS.target, PAIRS.wrong), model_graph(mamba2)
    assert not torch.equal(clean, PAIRS.clean)
    for ablation in ('patch', 'mean'): assert near(eap(mamba2, g, other, ablation=ablation).edges, eap(mamba2, g, ablation=ablation).edges, 1e-5)


def test_prompts_with_their_counterfactuals(tiny):
    some = facts(n=6, seed=1)
    p, ids = as_pairs(tiny, some), lambda t: tiny.tokenizer(t, add_special_tokens=False)['input_ids']
    assert len(p) == 6 and p.note == 'counterfactuals of facts' and len({*p.at.tolist()}) > 1
    for i, s in enumerate(some):
        n = int(p.at[i]) + 1
        assert p.clean[i, :n].tolist() == ids(s.text) and p.corrupt[i, :n].tolist() == ids(s.corrupt)
        assert [int(p.target[i]), int(p.wrong[i])] == [ids(s.target)[0], ids(s.wrong)[0]] and not p.clean[i, n:].any() and not p.corrupt[i, n:].any()
    one = as_pairs(tiny, some[0])
    assert len(one) == 1 and one.target.tolist() == p.target[:1].tolist()
    again = as_pairs(tiny, p)
    assert again is not None and torch.equal(again.clean, p.clean) and again.note == p.note


def test_texts_with_counterfactuals_as_given(tiny):
    text, other = ' Question: what is the capital of France? Answer:', ' Question: what is the capital of Egypt? Answer:'
    ids = lambda t: tiny.tokenizer(t, add_special_tokens=False)['input_ids']
    given, guessed = as_pairs(tiny, text, ' Paris', other, ' Cairo'), as_pairs(tiny, text, ' Paris', other)
    for p in (given, guessed): assert p.clean.tolist() == [ids(text)] and p.corrupt.tolist() == [ids(other)] and p.target.tolist() == [ids(' Paris')[0]] and p.note == 'counterfactuals as given'
    assert given.wrong.tolist() == [ids(' Cairo')[0]]
    with torch.no_grad(): best = tiny.hf(torch.tensor([ids(other)])).logits[0, -1].topk(2).indices.tolist()
    assert guessed.wrong.tolist() == [best[best[0] == ids(' Paris')[0]]]
    same = as_pairs(tiny, text, best[0], other)                            # the model's own answer is the target: the second best
    assert same.wrong.tolist() == [best[1]]
    two = as_pairs(tiny, [text, text], [' Paris', ' Paris'], [other, other], [' Cairo', ' Rome'])
    assert len(two) == 2 and two.wrong.tolist() == [ids(' Cairo')[0], ids(' Rome')[0]]
    by_ids = as_pairs(tiny, ids(text), ids(' Paris')[0], ids(other), ids(' Cairo')[0])
    assert torch.equal(by_ids.clean, given.clean) and torch.equal(by_ids.wrong, given.wrong) and by_ids.target.tolist() == given.target.tolist()


def test_a_counterfactual_that_is_made(tiny):
    "One token is another, the answer is what the model says then, and no exchange of that token by itself was better found by luck."
    text = ' Question: what is the capital of France? Answer:'
    a, b = (as_pairs(tiny, text, ' Paris', seed=s) for s in (0, 0))
    assert torch.equal(a.corrupt, b.corrupt) and a.wrong.tolist() == b.wrong.tolist() and a.note == b.note
    (at,) = (a.clean != a.corrupt)[0].nonzero()[:, 0].tolist()
    assert a.note.startswith('counterfactual made: ') and f' at {at}, of ' in a.note
    with torch.no_grad():
        clean, corrupt = (tiny.hf(v).logits[0, -1] for v in (a.clean, a.corrupt))
        assert int(clean.argmax()) == int(a.target[0]) and int(corrupt.argmax()) == int(a.wrong[0])
        gap = lambda out: float(out[a.target[0]] - out.masked_fill(torch.arange(len(out)) == a.target[0], -torch.inf).max())
        tried = a.clean.repeat(40, 1)
        g = torch.Generator().manual_seed(9)
        tried[torch.arange(40), torch.randint(tried.shape[1], (40,), generator=g)] = torch.randint(1, tiny.sizes['d_vocab'], (40,), generator=g)
        assert gap(corrupt) < np.median([gap(out) for out in tiny.hf(tried).logits[:, -1]])
    for ids in ([5], [5, 9, 41]):                                          # a model without text; one token alone
        p = as_pairs(load_model('mock://mamba2-tiny'), ids, 17)
        assert (p.clean != p.corrupt).sum() == 1 and p.target.tolist() == [17] != p.wrong.tolist() and 17 not in p.corrupt
    assert 'and so on for 2 prompts' in as_pairs(tiny, [text, text + ' Paris'], [' Paris', '.']).note


def test_pairs_from_text_that_are_refused(tiny):
    with pytest.raises(ValueError, match='got no target'): as_pairs(tiny, 'In Egypt')
    with pytest.raises(ValueError, match=r'got a prompt of \d+ tokens with a counterfactual of \d+, expected as many'): as_pairs(tiny, 'In Egypt', ' Cairo', 'In the land of Goshen')
    for p in (Prompt('In Egypt', ' Cairo'), Prompt('In Egypt', ' Cairo', wrong=' Rome'), Prompt('In Egypt', ' Cairo', corrupt='In Rome')):
        with pytest.raises(ValueError, match='got a prompt without a counterfactual'): as_pairs(tiny, [facts(n=1)[0], p])
    with pytest.raises(ValueError, match='got wrong = target'): as_pairs(tiny, 'In Egypt', ' Cairo', 'In France', ' Cairo')


# -- metrics -------------------------------------------------------------------------------
def test_metrics_by_hand():
    g = torch.Generator().manual_seed(0)
    logits, base, row = torch.randn(3, 257, generator=g), torch.randn(3, 257, generator=g), torch.arange(3)
    assert torch.allclose(logit_diff(logits, PAIRS), logits[row, PAIRS.target] - logits[row, PAIRS.wrong])
    assert torch.allclose(log_prob(logits, PAIRS), torch.log(logits.exp()[row, PAIRS.target]/logits.exp().sum(1)), atol=1e-5)
    kl = likeness(base, PAIRS)
    want = -F.kl_div(logits.log_softmax(-1), base.log_softmax(-1), log_target=True, reduction='none').sum(1)
    assert torch.allclose(kl(logits, PAIRS), want, atol=1e-5) and (want < 0).all() and kl(base, PAIRS).abs().max() < 1e-5
    for some in ([1], [2, 0]): assert torch.allclose(kl(logits[some], PAIRS[some]), want[some], atol=1e-5)          # by prompt, not by row


def test_metrics_by_name(mamba2):
    own = lambda logits, pairs: logits[:, 0]
    assert metric_of('logit_diff', mamba2, PAIRS) is logit_diff and metric_of('log_prob', mamba2, PAIRS) is log_prob and metric_of(own, mamba2, PAIRS) is own
    clean, corrupt = ends(mamba2, PAIRS, metric_of('kl', mamba2, PAIRS))
    a, b = (mamba2.hf(ids).logits[torch.arange(3), PAIRS.at].log_softmax(-1).detach() for ids in (PAIRS.clean, PAIRS.corrupt))
    assert clean.abs().max() < 1e-5 and torch.allclose(corrupt, -(a.exp()*(a - b)).sum(1), atol=1e-4)
    with pytest.raises(ValueError, match=r"got metric='loss', expected one of \['logit_diff', 'log_prob', 'kl'\] or a function"): metric_of('loss', mamba2, PAIRS)


def test_ends(mamba2):
    clean, corrupt = ends(mamba2, PAIRS, logit_diff)
    for ids, v in ((PAIRS.clean, clean), (PAIRS.corrupt, corrupt)):
        out = mamba2.hf(ids).logits[torch.arange(3), PAIRS.at].detach()
        assert torch.allclose(v, out[torch.arange(3), PAIRS.target] - out[torch.arange(3), PAIRS.wrong], atol=1e-4)
    calls = []
    def bad_at(n):
        def metric(logits, pairs):
            calls.append(0)
            return logit_diff(logits, pairs)*(torch.nan if len(calls) == n else 1)
        return metric
    for n, said in ((1, 'clean'), (2, 'corrupt')):
        calls.clear()
        with pytest.raises(ValueError, match=f'not a finite number a pair on the {said} prompts'): ends(mamba2, PAIRS, bad_at(n))
    with pytest.raises(ValueError, match='on the clean prompts'): ends(mamba2, PAIRS, lambda logits, pairs: logits)
