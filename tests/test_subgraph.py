"""Runs of a subgraph and exact scores: against circuits of Mamba-2 and Llama in float64 numpy, and hooks on the bare models."""
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch

from circuitbench.edit import patch
from circuitbench.exact import exact
from circuitbench.exchange import instead, means
from circuitbench.graph import model_graph
from circuitbench.load import load_model
from circuitbench.pairs import Pairs, logit_diff, resampled
from circuitbench.plan import Plan
from circuitbench.site import families
from circuitbench.subgraph import run_edges, run_plan, start_of


def some_pairs(n=3, pos=9, seed=3):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(1, 257, shape, generator=g)
    return Pairs(draw(n, pos), draw(n, pos), torch.tensor([8, 5, 7][:n]), torch.tensor([5, 17, 200][:n]), torch.tensor([9, 30, 41][:n]))


PAIRS = some_pairs()


@pytest.fixture(scope='module', params=sorted(families()))
def family(request): return load_model(f'mock://{request.param}-tiny')


@pytest.fixture(scope='module', params=[False, True], ids=['whole', 'lags'])
def graph(family, request): return model_graph(family, lags=request.param)


@pytest.fixture(scope='module')
def nodes(family):
    "Every node's exact score, of the graph without lags."
    return exact(family, PAIRS, model_graph(family), edges=False, progress=False).nodes


@torch.no_grad()
def plain(model, ids): return model.hf(ids, use_cache=False).logits[torch.arange(3), PAIRS.at]


def all_of(g): return torch.ones(len(g), dtype=torch.bool)


def near(a, b, tol=1e-5): return float((a - b).abs().max()) <= tol*float(b.abs().max())


def bare(model): return not any(m._forward_hooks or m._forward_pre_hooks or 'forward' in m.__dict__ for m in model.hf.modules())


# Families in which the embedding goes further beside the stream: to blocks that hear it again (zamba2), as first values (rwkv7).
BESIDE = 'zamba2', 'rwkv7'


# -- both ends, every family ---------------------------------------------------------------
def test_all_edges_are_the_clean_run_and_none_the_counterfactual(family, graph):
    clean, corrupt = plain(family, PAIRS.clean), plain(family, PAIRS.corrupt)
    with torch.no_grad():
        assert near(run_edges(family, PAIRS, graph, all_of(graph)), clean)
        assert near(run_edges(family, PAIRS, graph, ~all_of(graph)), corrupt)
        for ablation in ('zero', 'mean'): assert near(run_edges(family, PAIRS, graph, all_of(graph), ablation), clean)
    assert not near(clean, corrupt, 1e-2) and bare(family)


def test_masks_in_float(family, graph):
    "At both ends they are the masks of bool; inner edges that float masks leave alone are kept."
    keep = torch.rand(len(graph), generator=torch.Generator().manual_seed(4)) < .7
    kind = [graph.nodes[i] for i in graph.edges[:, 0].tolist()]
    keep |= torch.tensor([n.kind == 'port' and (n.branch == 'attn' or n.lag is not None or n.port == 'rest') for n in kind])
    if keep.all(): keep[0] = False                                          # of few edges
    with torch.no_grad():
        want = run_edges(family, PAIRS, graph, keep)
        assert near(run_edges(family, PAIRS, graph, keep.float(), tokens=10**6), want)
    assert not near(want, plain(family, PAIRS.clean), 1e-3)


def test_a_writer_without_any_edge_is_a_writer_exchanged(family, nodes):
    "Nodes are exchanged at their own sites; without its edges a head, an MLP or the embedding is heard by nobody."
    g = model_graph(family)
    base = float(logit_diff(plain(family, PAIRS.clean), PAIRS).mean())
    writers = g.writers[family.adapter.family in BESIDE:]
    for k in writers[::max(1, len(writers)//5)]:
        with torch.no_grad(): out = run_edges(family, PAIRS, g, g.edges[:, 0] != k)
        assert float(nodes[k]) == pytest.approx(base - float(logit_diff(out, PAIRS).mean()), abs=1e-4), g.nodes[k].name
    assert torch.isnan(nodes).nonzero()[:, 0].tolist() == [len(g.nodes) - 1]


def test_a_port_without_its_edges_is_a_port_exchanged(family, nodes):
    "Cut off from the stream before it, and cut off from the heads behind it."
    g = model_graph(family)
    ports = [k for k, n in enumerate(g.nodes) if n.kind == 'port']
    if not ports: return
    base = float(logit_diff(plain(family, PAIRS.clean), PAIRS).mean())
    for k in dict.fromkeys([*ports[::max(1, len(ports)//6)], *(k for k in ports if g.nodes[k].port == 'rest')]):
        first_values = family.adapter.family == 'rwkv7' and g.nodes[k].port == 'x' and g.nodes[k].block > 0     # which come beside the stream
        for end in (0,) if first_values else (0, 1):
            with torch.no_grad(): out = run_edges(family, PAIRS, g, g.edges[:, end] != k)
            assert float(nodes[k]) == pytest.approx(base - float(logit_diff(out, PAIRS).mean()), abs=1e-4), (g.nodes[k].name, end)


@torch.no_grad()
def test_heads_without_any_edge_in_are_heads_of_the_counterfactual(family, graph):
    "All that enters the ports of a branch is exchanged, or all between its ports and its heads: nothing else brings them the stream."
    sites = dict.fromkeys((n.site, n.block, n.branch) for n in graph.nodes if n.kind == 'head')
    other, clean = family.run_with_cache(PAIRS.corrupt, [s for s, _, _ in sites])[1], plain(family, PAIRS.clean)
    for site, block, branch in sites:
        want = PAIRS.last(family.run(PAIRS.clean, edit=patch(site, other[site])).logits)
        ports, heads = ([k for k, n in enumerate(graph.nodes) if n.kind == kind and (n.block, n.branch) == (block, branch)] for kind in ('port', 'head'))
        handed_on = (family.adapter.family, branch, block) in (('rwkv7', 'ssm', 1), ('hymba', 'attn', 1))       # first values, keys of the block before
        for into in () if handed_on else (ports, heads):
            if into == heads and graph.lags: continue                              # there an inner edge exchanges a stream, not a value
            cut = torch.isin(graph.edges[:, 1], torch.tensor(into))
            assert near(run_edges(family, PAIRS, graph, ~cut), want) and not near(want, clean, 1e-4), site


@pytest.mark.parametrize('name', ['mamba2', 'hymba', 'zamba2', 'llama'])
@pytest.mark.parametrize('ablation', ['patch', 'mean', 'position-mean', 'zero', 'resample'])
def test_small_batches_change_nothing(name, ablation):
    model = load_model(f'mock://{name}-tiny')
    g = model_graph(model)
    keep = torch.rand(len(g), generator=torch.Generator().manual_seed(5)) < .6
    with torch.no_grad():
        want = run_edges(model, PAIRS, g, keep, ablation)
        assert near(run_edges(model, PAIRS, g, keep, ablation, tokens=1), want)
        mean = means(model, PAIRS, list(dict.fromkeys([n.site for n in g.nodes if n.kind != 'logits'] + [f'blocks.{i}.resid_pre' for i in range(model.n_layers)])))
        if ablation == 'mean': assert near(run_edges(model, PAIRS, g, keep, ablation, mean), want)


# -- Mamba-2 in float64 numpy --------------------------------------------------------------
COLUMNS = {'x': 4, 'B': 2, 'C': 2, 'dt': 4, 'gate': 4}                             # ports of the mock; groups serve two heads


def shift(v, lag): return np.concatenate([np.zeros_like(v[:, :lag]), v[:, :v.shape[1] - lag]], 1)


class Norm:
    "The norm of the equations; `still`: once it has seen a run, it divides by the scales of that run."
    def __init__(self, still=False): self.still, self.scales = still, {}

    def __call__(self, x, weight, eps, key):
        scale = 1/np.sqrt((x**2).mean(-1, keepdims=True) + eps)
        return x*(self.scales.setdefault(key, scale) if self.still else scale)*weight


def mamba2_circuit(hf, ids, other, on, lags, norm=None):
    """Logits of the circuit whose kept edges `on(name)` says, or how much of each is kept.

    Each port reads a stream of its own, the sum of all writers as they are or as they would be otherwise; with lags, one for
    each tap of the convolution. An inner edge that is lost shows its head the port's other value; a tap's, the tap of a stream in
    which all is otherwise.
    """
    w, c = oracle.weights(hf), hf.config
    E = w['backbone.embeddings.weight']
    writers, inner, g, n, H = [('embed', E[ids], other['embed'])], int(c.expand*c.hidden_size), c.n_groups, c.state_size, c.num_heads
    p, norm, mix = inner//H, norm or Norm(), lambda s, a, b: s*a + (1 - s)*b
    def stream(reader): return sum(mix(on(f'{name}->{reader}'), now, els) for name, now, els in writers)
    for i in range(c.num_hidden_layers):
        lw = {k.removeprefix(f'backbone.layers.{i}.mixer.'): v for k, v in w.items()}
        kernel, bias, width = lw['conv1d.weight'][:, 0], lw['conv1d.bias'], lw['conv1d.weight'].shape[-1]
        project = lambda r, i=i, lw=lw: norm(r, w[f'backbone.layers.{i}.norm.weight'], c.layer_norm_epsilon, i) @ lw['in_proj.weight'].T
        gone = sum(els for _, _, els in writers)
        starts = {'gate': 0, 'x': inner, 'B': 2*inner, 'C': 2*inner + g*n, 'dt': 2*inner + 2*g*n}
        wide = {'gate': p, 'x': p, 'B': n, 'C': n, 'dt': 1}
        def port(name, h, i=i, width=width, project=project, gone=gone, starts=starts, wide=wide):
            "A port as a head sees it."
            k = h*COLUMNS[name]//H
            cols = slice(starts[name] + k*wide[name], starts[name] + (k + 1)*wide[name])
            node, head = f'{i}.ssm.{name}[{k}]', f'{i}.ssm[{h}]'
            taps = [f'{node}@{lag}' for lag in range(width if name in 'xBC' else 1)] if lags else [node]
            els, shown = other[f'blocks.{i}.ssm.{name}'][:, :, h], [on(f'{t}->{head}') for t in taps]
            if len(taps) == 1: return mix(shown[0], value(name, [project(stream(taps[0]))[..., cols]], cols, h), els)
            return value(name, [project(mix(s, stream(t), gone))[..., cols] for s, t in zip(shown, taps)], cols, h)
        def value(name, rows, cols, h, lw=lw, kernel=kernel, bias=bias, width=width):
            if name == 'dt': return oracle.softplus(rows[0][..., 0] + lw['dt_bias'][h])
            if name == 'gate': return oracle.silu(rows[0])
            ch = slice(cols.start - inner, cols.stop - inner)
            rows = rows if lags else rows*width                                 # of one stream, or a stream for each tap
            return oracle.silu(sum(shift(v, lag)*kernel[ch, width - 1 - lag] for lag, v in enumerate(rows)) + bias[ch])
        x, B, C, dt, gate = (np.stack([port(name, h) for h in range(H)], 2) for name in ('x', 'B', 'C', 'dt', 'gate'))
        y = oracle.scan(x, dt, -np.exp(lw['A_log']), B, C, lw['D'], every=False)[0]
        gated = (y*gate).reshape(*ids.shape, g, -1)
        z = norm(gated, lw['norm.weight'].reshape(g, -1), c.layer_norm_epsilon, f'{i}.gated').reshape(*ids.shape, H, p)
        W, els = lw['out_proj.weight'].reshape(-1, H, p), other[f'blocks.{i}.ssm.out_proj_in']
        els = els.reshape(*els.shape[:2], H, p)
        writers += [(f'{i}.ssm[{h}]', z[:, :, h] @ W[:, h].T, els[:, :, h] @ W[:, h].T) for h in range(H)]
    return norm(stream('logits'), w['backbone.norm_f.weight'], c.layer_norm_epsilon, 'last') @ E.T


def others(hf, pairs, ablation):
    "What each site is otherwise: on the counterfactual, on another prompt, the mean over the tokens of the clean prompts or over these at a position, 0."
    ids = {'patch': pairs.corrupt, 'resample': resampled(pairs).corrupt}.get(ablation, pairs.clean)
    sites = oracle.run(hf, ids.numpy())
    if ablation in ('patch', 'resample'): return sites
    if ablation == 'zero': return {k: np.zeros_like(v[:1, :1]) for k, v in sites.items()}
    here = np.arange(pairs.clean.shape[1]) <= pairs.at.numpy()[:, None]
    if ablation == 'mean': return {k: v[here].mean(0)[None, None] for k, v in sites.items()}
    return {k: np.stack([v[here[:, t], t].mean(0) for t in range(v.shape[1])])[None] for k, v in sites.items()}


def off_by(model, pairs, g, keep, ablation, truth):
    with torch.no_grad(): ours = run_edges(model, pairs, g, keep, ablation).double().numpy()
    want = np.broadcast_to(truth, (*pairs.clean.shape, truth.shape[-1]))[np.arange(len(pairs)), pairs.at.numpy()]
    return np.abs(ours - want).max()/max(1, np.abs(want).max())


@pytest.mark.parametrize('lags', [False, True], ids=['whole', 'lags'])
@pytest.mark.parametrize('ablation', ['patch', 'mean', 'position-mean', 'zero', 'resample'])
def test_any_circuit_of_mamba2_is_that_of_the_equations(ablation, lags):
    model = load_model('mock://mamba2-tiny')
    g, other, make, ids = model_graph(model, lags), others(model.hf, PAIRS, ablation), np.random.default_rng(0), PAIRS.clean.numpy()
    truths = []
    for share in (0., .1, .5, .5, .9, .97, 1.):
        keep = make.random(len(g)) < share
        on = dict(zip(g.names, keep.tolist())).__getitem__
        truths.append(mamba2_circuit(model.hf, ids, other, on, lags))
        assert off_by(model, PAIRS, g, torch.tensor(keep), ablation, truths[-1]) < 1e-5, share
    assert np.abs(truths[1] - truths[-1]).max() > .1*np.abs(truths[-1]).max()


def test_each_kind_of_edge_of_mamba2_alone():
    "One edge lost or one kept, residual and inner, of each port, at each lag: seven decimals apart where another edge is taken."
    model = load_model('mock://mamba2-tiny')
    other, ids = others(model.hf, PAIRS, 'patch'), PAIRS.clean.numpy()
    for lags, names in ((False, ['embed->1.ssm.B[1]', '0.ssm[2]->1.ssm.dt[3]', '1.ssm.C[0]->1.ssm[1]', '0.ssm.gate[1]->0.ssm[1]', '0.ssm[3]->logits']),
                        (True, ['0.ssm[1]->1.ssm.x[2]@3', 'embed->0.ssm.B[0]@1', '1.ssm.B[0]@1->1.ssm[1]', '0.ssm.C[1]@0->0.ssm[2]', '1.ssm.dt[0]@0->1.ssm[0]'])):
        g = model_graph(model, lags)
        for name in names:
            keep = all_of(g)
            keep[g.edge(name)] = False
            assert off_by(model, PAIRS, g, keep, 'patch', mamba2_circuit(model.hf, ids, other, lambda n, name=name: n != name, lags)) < 1e-5, name
            assert off_by(model, PAIRS, g, ~keep, 'patch', mamba2_circuit(model.hf, ids, other, lambda n, name=name: n == name, lags)) < 1e-5, name


# -- Llama in float64 numpy ----------------------------------------------------------------
def rope(v, theta):
    "v (b, l, d)."
    half, t = v.shape[-1]//2, np.arange(v.shape[1])[:, None]
    angle = t*theta**(-np.arange(half)/half)
    a, b, cos, sin = v[..., :half], v[..., half:], np.cos(angle), np.sin(angle)
    return np.concatenate([a*cos - b*sin, b*cos + a*sin], -1)


def llama_circuit(hf, ids, other, on, note=None, norm=None):
    "The same of a transformer with keys shared by two heads; `note` takes what each node writes or shows."
    w, c = oracle.weights(hf), hf.config
    H, K, d, eps = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.rms_norm_eps
    note, norm, mix = {} if note is None else note, norm or Norm(), lambda s, a, b: s*a + (1 - s)*b
    note['embed'] = w['model.embed_tokens.weight'][ids]
    done = ['embed']
    els = lambda node: other[node] if other else np.zeros_like(note[node])
    def stream(reader): return sum(mix(on(f'{n}->{reader}'), note[n], els(n)) for n in done)
    for i in range(c.num_hidden_layers):
        lw = {k.removeprefix(f'model.layers.{i}.'): v for k, v in w.items()}
        for port, many in (('q', H), ('k', K), ('v', K)):
            for h in range(many):
                node = f'{i}.attn.{port}[{h}]'
                v = norm(stream(node), lw['input_layernorm.weight'], eps, i) @ lw[f'self_attn.{port}_proj.weight'][h*d:(h + 1)*d].T
                note[node] = v if port == 'v' else rope(v, c.rope_parameters['rope_theta'])
        for h in range(H):
            ports = [f'{i}.attn.{port}[{h*many//H}]' for port, many in (('q', H), ('k', K), ('v', K))]
            q, k, v = (mix(on(f'{n}->{i}.attn[{h}]'), note[n], els(n)) for n in ports)
            s = np.where(np.tri(ids.shape[1], dtype=bool), q @ k.swapaxes(1, 2)/d**.5, -np.inf)
            s = np.exp(s - s.max(-1, keepdims=True))
            note[f'{i}.attn[{h}]'] = s/s.sum(-1, keepdims=True) @ v @ lw['self_attn.o_proj.weight'][:, h*d:(h + 1)*d].T
        done += [f'{i}.attn[{h}]' for h in range(H)]
        u = norm(stream(f'{i}.mlp'), lw['post_attention_layernorm.weight'], eps, f'{i}.mlp')
        note[f'{i}.mlp'] = (oracle.silu(u @ lw['mlp.gate_proj.weight'].T)*(u @ lw['mlp.up_proj.weight'].T)) @ lw['mlp.down_proj.weight'].T
        done.append(f'{i}.mlp')
    return norm(stream('logits'), w['model.norm.weight'], eps, 'last') @ w['lm_head.weight'].T


@pytest.mark.parametrize('ablation', ['patch', 'zero'])
def test_any_circuit_of_a_transformer_is_that_of_the_equations(ablation):
    "Shared keys lost for one of their heads included."
    model = load_model('mock://llama-tiny')
    g, make, ids, other = model_graph(model), np.random.default_rng(1), PAIRS.clean.numpy(), {}
    if ablation == 'patch': llama_circuit(model.hf, PAIRS.corrupt.numpy(), {}, lambda n: True, other)
    cuts = [[n] for n in ('0.attn.k[1]->0.attn[2]', '1.attn.v[0]->1.attn[1]', '1.attn.q[3]->1.attn[3]', '0.attn[1]->0.mlp', '0.mlp->1.attn.k[0]', '1.mlp->logits')]
    masks = [np.array([n not in cut for n in g.names]) for cut in cuts] + [make.random(len(g)) < s for s in (0, .2, .5, .5, .8, .95)]
    for keep in masks:
        truth = llama_circuit(model.hf, ids, other, dict(zip(g.names, keep.tolist())).__getitem__)
        assert off_by(model, PAIRS, g, torch.tensor(keep), ablation, truth) < 1e-5, keep.sum()


# -- by hooks on the bare model ------------------------------------------------------------
@contextmanager
def hooks(*pairs):
    "Forward hooks (module, out -> out) or pre-hooks where the function is named `into`, gone afterwards."
    handles = [m.register_forward_pre_hook(lambda m, args, f=f: (f(args[0]), *args[1:])) if f.__name__ == 'into' else
               m.register_forward_hook(lambda m, args, out, f=f: f(out)) for m, f in pairs]
    try: yield
    finally:
        for h in handles: h.remove()


@torch.no_grad()
def heard(hf, ids, *modules):
    "The inputs of some modules in a bare run."
    seen = {}
    handles = [m.register_forward_pre_hook(lambda m, args, k=k: seen.update({k: args[0].clone()})) for k, m in enumerate(modules)]
    hf(ids, use_cache=False)
    for h in handles: h.remove()
    return [seen[k] for k in range(len(modules))]


PORTS = {'gate[1]': slice(16, 32), 'x[2]': slice(96, 112), 'B[0]': slice(128, 136), 'C[1]': slice(152, 160), 'dt[3]': slice(163, 164)}    # z | x | B | C | dt


@pytest.fixture(scope='module')
def mamba2(): return load_model('mock://mamba2-tiny')


@pytest.mark.parametrize('port', PORTS)
@pytest.mark.parametrize('writer', ['embed', '0.ssm[0]', '0.ssm[3]'])
@torch.no_grad()
def test_one_edge_by_hand(mamba2, port, writer):
    "The stream before the block with one writer exchanged, through norm and matrix by hand, into the columns of one port."
    hf, (first, block) = mamba2.hf, mamba2.blocks
    pre, z = heard(hf, PAIRS.clean, block, first.mixer.out_proj)
    z2, = heard(hf, PAIRS.corrupt, first.mixer.out_proj)
    E = hf.backbone.embeddings.weight
    h = None if writer == 'embed' else int(writer[-2])
    cols = slice(None) if h is None else slice(16*h, 16*h + 16)
    change = E[PAIRS.corrupt] - E[PAIRS.clean] if h is None else (z2 - z)[..., cols] @ first.mixer.out_proj.weight[:, cols].T
    new = block.norm(pre + change) @ block.mixer.in_proj.weight.T
    def put(out):
        out = out.clone()
        out[..., PORTS[port]] = new[..., PORTS[port]]
        return out
    with hooks((block.mixer.in_proj, put)): want = plain(mamba2, PAIRS.clean)
    g = model_graph(mamba2)
    keep = all_of(g)
    keep[g.edge(f'{writer}->1.ssm.{port}')] = False
    assert near(run_edges(mamba2, PAIRS, g, keep), want) and not near(want, plain(mamba2, PAIRS.clean), 1e-5)


@pytest.fixture(scope='module')
def lagged(mamba2):
    "The graph by lag and every node's exact score."
    g = model_graph(mamba2, lags=True)
    return g, exact(mamba2, PAIRS, g, edges=False, progress=False).nodes


@pytest.mark.parametrize('lag', range(4))
@pytest.mark.parametrize('port', ['x[2]', 'B[0]', 'C[1]'])
@torch.no_grad()
def test_one_lag_by_hand(mamba2, lagged, port, lag, monkeypatch):
    "All that a port reads at one lag from the counterfactual: one tap of the convolution, by its weight."
    hf, (_, block) = mamba2.hf, mamba2.blocks
    pre, pre2 = (heard(hf, ids, block)[0] for ids in (PAIRS.clean, PAIRS.corrupt))
    u, u2 = (block.norm(r) @ block.mixer.in_proj.weight.T for r in (pre, pre2))
    d = torch.zeros_like(u)
    d[:, lag:, PORTS[port]] = (u2 - u)[:, :9 - lag, PORTS[port]]
    kernel, conv = block.mixer.conv1d.weight[:, 0, 3 - lag], slice(64, 160)              # of in_proj's columns those that are convolved
    more, taps = (d[..., conv]*kernel).transpose(1, 2), block.mixer.conv1d.weight.squeeze(1)
    def convolved(x, w, bias, activation=None, **kwargs):
        out = torch.nn.functional.conv1d(torch.nn.functional.pad(x, (3, 0)), w[:, None], bias, groups=len(w))
        return torch.nn.functional.silu(out + more*torch.equal(w, taps))                 # in this block alone
    with monkeypatch.context() as m:
        m.setattr(sys.modules[type(hf).__module__], 'causal_conv1d_fn', convolved)
        want = plain(mamba2, PAIRS.clean)
    (g, nodes), name = lagged, f'1.ssm.{port}@{lag}'
    keep = g.edges[:, 1] != g.index[name]
    assert (~keep).sum() == 5 and near(run_edges(mamba2, PAIRS, g, keep), want) and not near(want, plain(mamba2, PAIRS.clean), 1e-5)
    assert float(nodes[g.index[name]]) == pytest.approx(float((logit_diff(plain(mamba2, PAIRS.clean), PAIRS) - logit_diff(want, PAIRS)).mean()), abs=1e-5)


@pytest.mark.parametrize('ablation', ['patch', 'zero', 'mean'])
@torch.no_grad()
def test_nodes_of_mamba2_by_hooks(mamba2, ablation):
    g, hf = model_graph(mamba2), mamba2.hf
    found = exact(mamba2, PAIRS, g, edges=False, ablation=ablation, progress=False)
    base = logit_diff(plain(mamba2, PAIRS.clean), PAIRS)
    assert found.clean == pytest.approx(float(base.mean()), abs=1e-5) and torch.isnan(found.edges).all() and found.method == f'exact ({ablation})'
    assert found.corrupt == pytest.approx(float(logit_diff(plain(mamba2, PAIRS.corrupt), PAIRS).mean()), abs=1e-5)
    here = torch.arange(9) <= PAIRS.at[:, None]
    def otherwise(clean, corrupt): return {'patch': corrupt, 'zero': torch.zeros_like(clean), 'mean': clean[here].mean(0).expand_as(clean)}[ablation]
    for i, block in enumerate(mamba2.blocks):
        m = block.mixer
        (z, u), (z2, u2) = (heard(hf, ids, m.out_proj, m.in_proj) for ids in (PAIRS.clean, PAIRS.corrupt))
        new = otherwise(z, z2)
        for h in range(4):
            def into(x, h=h, new=new): return torch.cat([x[..., :16*h], new[..., 16*h:16*h + 16], x[..., 16*h + 16:]], -1)
            with hooks((m.out_proj, into)): out = plain(mamba2, PAIRS.clean)
            assert float(found.nodes[g.index[f'{i}.ssm[{h}]']]) == pytest.approx(float((base - logit_diff(out, PAIRS)).mean()), abs=1e-5)
        if ablation != 'patch': continue                                          # a port's own value: silu and convolution lie between
        for port, cols in PORTS.items():
            def put(out, cols=cols, new=u2 @ m.in_proj.weight.T): return torch.cat([out[..., :cols.start], new[..., cols], out[..., cols.stop:]], -1)
            with hooks((m.in_proj, put)): out = plain(mamba2, PAIRS.clean)
            want = float((base - logit_diff(out, PAIRS)).mean())
            assert float(found.nodes[g.index[f'{i}.ssm.{port}']]) == pytest.approx(want, abs=1e-5)
            lost = logit_diff(run_edges(mamba2, PAIRS, g, g.edges[:, 1] != g.index[f'{i}.ssm.{port}']), PAIRS)
            assert float((base - lost).mean()) == pytest.approx(want, abs=1e-5)


@torch.no_grad()
def test_nodes_of_a_transformer_by_hooks():
    model = load_model('mock://llama-tiny')
    g, hf = model_graph(model), model.hf
    nodes, base = exact(model, PAIRS, g, edges=False, progress=False).nodes, logit_diff(plain(model, PAIRS.clean), PAIRS)
    for i, block in enumerate(model.blocks):
        at, mlp = block.self_attn, block.mlp.down_proj
        seen = [heard(hf, PAIRS.corrupt, m)[0] for m in (at.o_proj, mlp, at.q_proj)]
        cases = [(f'{i}.attn[{h}]', at.o_proj, slice(8*h, 8*h + 8), seen[0], True) for h in range(4)] + [(f'{i}.mlp', mlp, slice(0, 48), seen[1], True)]
        cases += [(f'{i}.attn.{p}[{h}]', m, slice(8*h, 8*h + 8), seen[2] @ m.weight.T, False) for p, m, n in (('q', at.q_proj, 4), ('k', at.k_proj, 2), ('v', at.v_proj, 2)) for h in range(n)]
        for name, m, cols, new, before in cases:
            def into(x, cols=cols, new=new): return torch.cat([x[..., :cols.start], new[..., cols], x[..., cols.stop:]], -1)
            def put(x, into=into): return into(x)
            with hooks((m, into if before else put)): out = plain(model, PAIRS.clean)
            assert float(nodes[g.index[name]]) == pytest.approx(float((base - logit_diff(out, PAIRS)).mean()), abs=1e-5), name


# -- what heads hear beside their named ports, on the bare models -------------------------------
@torch.no_grad()
def written(hf, ids, modules, block=None, stream=None):
    "The outputs of some modules in a bare run, in which a block may be given another stream."
    seen = {}
    handles = [m.register_forward_hook(lambda m, args, out, k=k: seen.update({k: out.clone()})) for k, m in enumerate(modules)]
    def into(x): return x if stream is None else stream
    with hooks((hf if block is None else block, into)): hf(ids, use_cache=False)
    for h in handles: h.remove()
    return [seen[k] for k in range(len(modules))]


@contextmanager
def called(model, i, *names):
    "The keyword and other arguments of the rule of one block, the i-th to call it; what `change` makes of them is run instead."
    home = sys.modules[type(model.hf).__module__]
    name = next(n for n in names if hasattr(home, n))
    rule = getattr(home, name)
    seen = SimpleNamespace(calls=[], change=rule)
    def run(*args, **kw):
        seen.calls.append((args, kw))
        return (seen.change if len(seen.calls) == i + 1 else rule)(*args, **kw)
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(home, name, run)
        yield seen


@torch.no_grad()
def bonus_and_look_up(model, i, stream, heads):
    "RWKV-7 adds (r k r_k) v to the normed read-out, whatever the recurrence is given, and has kappa look up what is removed."
    m, some = model.blocks[i].attn, torch.isin(torch.arange(2), torch.tensor(heads))[:, None]
    parts = [m.r_proj, m.k_proj, m.v_proj, m.a_lora, *([m.v_lora] if i else [])]
    def made(stream):
        with called(model, i, 'rwkv7_scan') as seen: r, k, v, a, *mix = written(model.hf, PAIRS.clean, parts, model.blocks[i], stream)
        if mix: v = v + (written(model.hf, PAIRS.clean, [model.blocks[0].attn.v_proj])[0] - v)*torch.sigmoid(mix[0])
        r, k, v = (x.unflatten(2, (2, 16)) for x in (r, k*(1 + (torch.sigmoid(a) - 1)*m.k_a), v))
        return (r*k*m.r_k).sum(3, keepdim=True)*v, seen.calls[i][0][4]
    (new, kappa), (old, _), (g,) = made(stream), made(None), written(model.hf, PAIRS.clean, [m.g_lora])
    def into(x): return x + ((new - old)*some).flatten(2)*g
    with called(model, i, 'rwkv7_scan') as seen, hooks((m.o_proj, into)):
        rule = seen.change
        seen.change = lambda v, k, r, log_w, own, *more: rule(v, k, r, log_w, torch.where(some, kappa, own), *more)
        return plain(model, PAIRS.clean)


@torch.no_grad()
def output_gate(model, i, stream, heads):
    "Attention of Qwen3-Next: the second half of each head's part of q_proj gates what the head gives."
    q = model.blocks[i].self_attn.q_proj
    new, = written(model.hf, PAIRS.clean, [q], model.blocks[i], stream)
    def put(out):
        out = out.unflatten(2, (4, 2, 8)).clone()
        out[:, :, heads, 1] = new.unflatten(2, (4, 2, 8))[:, :, heads, 1]
        return out.flatten(2)
    with hooks((q, put)): return plain(model, PAIRS.clean)


def unit(x): return x/(x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


@torch.no_grad()
def rate_and_look_up(model, i, stream, heads):
    "Delta nets write beta v where k says, and take away beta k times what k looks up: ports are v, k of the write, and beta k; beta of the write and the k that looks up are not."
    rules, some = ('torch_chunk_gated_delta_rule', 'chunk_kimi_delta_attention'), torch.isin(torch.arange(4), torch.tensor(heads))
    with called(model, i, *rules) as seen: written(model.hf, PAIRS.clean, [], model.blocks[i], stream)
    (_, look, _), rate = seen.calls[i][0], seen.calls[i][1]['beta']
    def change(q, k, v, *, g, beta, **kw):
        q, k, new = (unit(x).repeat_interleave(4//x.shape[2], 2) for x in (q, k, look))
        new, write, S, y = torch.where(some[:, None], new, k), torch.where(some, rate, beta), v.new_zeros(1), []
        for t in range(v.shape[1]):
            S = S*g[:, t].exp().view(*g.shape[:1], 4, -1, 1)
            found = (S*new[:, t, :, :, None]).sum(2)
            S = S + k[:, t, :, :, None]*(write[:, t, :, None]*v[:, t] - beta[:, t, :, None]*found)[:, :, None]
            y.append((S*q[:, t, :, :, None]).sum(2)*q.shape[3]**-.5)
        return torch.stack(y, 1), None
    with called(model, i, *rules) as seen:
        seen.change = change
        return plain(model, PAIRS.clean)


RESTS = [('rwkv7', 0, bonus_and_look_up), ('rwkv7', 1, bonus_and_look_up), ('qwen3-5', 3, output_gate), ('qwen3-next', 3, output_gate), ('qwen3-5', 1, rate_and_look_up),
         ('qwen3-next', 0, rate_and_look_up), ('olmo-hybrid', 2, rate_and_look_up), ('kimi-linear', 1, rate_and_look_up)]


def rest_of(model, g, i):
    "The port of what the heads of a block hear beside the others, and its heads."
    rest, = [k for k, n in enumerate(g.nodes) if n.port == 'rest' and n.block == i]
    return rest, [k for k, n in enumerate(g.nodes) if n.kind == 'head' and n.block == i and n.branch == g.nodes[rest].branch]


@pytest.mark.parametrize('name, i, way', RESTS)
@torch.no_grad()
def test_what_is_heard_beside_the_ports_by_hand(name, i, way):
    "All that enters it, the edge of one writer, and the edge to one head; ports by lag in second blocks."
    model = load_model(f'mock://{name}-tiny')
    g, (first, block) = model_graph(model, lags=i == 1), (model.blocks[0], model.blocks[i])
    rest, heads = rest_of(model, g, i)
    (e, pre), (e2, pre2) = (heard(model.hf, ids, first, block) for ids in (PAIRS.clean, PAIRS.corrupt))
    everyone, clean = [*range(len(heads))], plain(model, PAIRS.clean)
    one, alone = g.edge(f'embed->{g.nodes[rest].name}'), g.edge(f'{g.nodes[rest].name}->{g.nodes[heads[1]].name}')
    cases = [(g.edges[:, 1] == rest, pre2, everyone), (g.edges[:, 0] == rest, pre2, everyone)]
    cases += [(torch.arange(len(g)) == one, pre + e2 - e, everyone), (torch.arange(len(g)) == alone, pre2, [1])]
    for cut, stream, mine in cases:
        want = way(model, i, stream, mine)
        assert near(run_edges(model, PAIRS, g, ~cut), want) and not near(want, clean, 1e-4), int(cut.sum())


@torch.no_grad()
def test_a_shared_key_and_an_output_gate_together():
    "One head of two loses the key, all lose the gate: of a run with both the columns of that head, the others of a run with the gate alone."
    model = load_model('mock://qwen3-5-tiny')
    g, block = model_graph(model), model.blocks[3]
    m, (pre2,) = block.self_attn, heard(model.hf, PAIRS.corrupt, block)
    (gate, key), seen = written(model.hf, PAIRS.corrupt, [m.q_proj, m.k_proj]), []
    def gated(out): return torch.cat([out.unflatten(2, (4, 2, 8))[:, :, :, :1], gate.unflatten(2, (4, 2, 8))[:, :, :, 1:]], 3).flatten(2)
    def keyed(out): return torch.cat([key[..., :8], out[..., 8:]], -1)
    for more in ((), ((m.k_proj, keyed),)):
        with hooks((m.q_proj, gated), *more): seen.append(heard(model.hf, PAIRS.clean, m.o_proj)[0])
    def into(x): return torch.cat([seen[0][..., :8], seen[1][..., 8:16], seen[0][..., 16:]], -1)
    with hooks((m.o_proj, into)): want = plain(model, PAIRS.clean)
    keep = g.edges[:, 1] != g.index['3.attn.rest']
    keep[g.edge('3.attn.k[0]->3.attn[1]')] = False
    assert near(run_edges(model, PAIRS, g, keep), want) and not near(output_gate(model, 3, pre2, [0, 1, 2, 3]), want, 1e-4)


# -- exact scores --------------------------------------------------------------------------
@pytest.mark.parametrize('name', ['mamba2', 'hymba', 'zamba2', 'rwkv7', 'nemotron-h', 'kimi-linear'])
def test_exact_edges_are_runs_without_them(name):
    "Blocks below are not run again in the one, all of it in the other."
    model = load_model(f'mock://{name}-tiny')
    g = model_graph(model, lags=name == 'rwkv7')
    some = list(range(0, len(g), max(1, len(g)//12)))
    found = exact(model, PAIRS, g, edges=some, nodes=False, progress=False)
    base = logit_diff(plain(model, PAIRS.clean), PAIRS).mean()
    for e in some:
        keep = all_of(g)
        keep[e] = False
        with torch.no_grad(): lost = logit_diff(run_edges(model, PAIRS, g, keep), PAIRS).mean()
        assert float(found.edges[e]) == pytest.approx(float(base - lost), abs=1e-4), g.names[e]
    assert found.edges.isnan().sum() == len(g) - len(some) and found.nodes.isnan().all() and found.pairs == 3 and bare(model)


def test_exact_in_small_batches_and_another_metric():
    model = load_model('mock://mamba2-tiny')
    g = model_graph(model)
    kw = dict(graph=g, edges=[0, 40, 100], metric='log_prob', progress=False)
    a, b = exact(model, PAIRS, **kw), exact(model, PAIRS, tokens=1, **kw)
    assert torch.allclose(a.nodes, b.nodes, atol=1e-5, equal_nan=True) and torch.allclose(a.edges, b.edges, atol=1e-5, equal_nan=True)
    target = plain(model, PAIRS.clean).log_softmax(-1)[torch.arange(3), PAIRS.target]
    assert a.clean == pytest.approx(float(target.mean()), abs=1e-5)
    assert 'exact (patch) on mock://mamba2-tiny, 3 pairs' in repr(a)


def test_edges_that_were_not_scored_do_not_lead():
    model = load_model('mock://mamba2-tiny')
    g = model_graph(model)
    found = exact(model, PAIRS, g, edges=[0, 40, 100], progress=False)
    best = max((0, 40, 100), key=lambda e: abs(float(found.edges[e])))
    assert found.top_edges(1) == [(g.names[best], float(found.edges[best]))] and 'nan' not in repr(found)


def test_exact_interrupted_keeps_what_was_done():
    model, calls = load_model('mock://mamba2-tiny'), [0]
    g = model_graph(model)
    def metric(logits, pairs):
        calls[0] += 1
        if calls[0] > 2 + 4: raise KeyboardInterrupt                                 # both ends, four edges
        return logit_diff(logits, pairs)
    found = exact(model, PAIRS, g, metric, nodes=False, progress=False)
    done = exact(model, PAIRS, g, edges=list(range(4)), nodes=False, progress=False)
    assert found.note.startswith('interrupted') and int((~found.edges.isnan()).sum()) == 4 and bare(model)
    assert torch.allclose(found.edges[:4], done.edges[:4])


def test_a_start_saves_blocks_and_changes_nothing():
    model = load_model('mock://mamba2-tiny')
    g = model_graph(model)
    other = instead(model, PAIRS, list(dict.fromkeys(n.site for n in g.nodes if n.kind != 'logits')))
    start, runs = start_of(model, PAIRS, g, other), []
    handle = model.blocks[0].mixer.register_forward_hook(lambda m, args, out: runs.append(0))
    for name, below in (('0.ssm[1]->1.ssm.x[0]', 0), ('1.ssm.B[0]->1.ssm[1]', 0), ('embed->0.ssm.x[1]', 1)):
        keep = all_of(g)
        keep[g.edge(name)] = False
        plan = Plan(g, keep)
        with torch.no_grad(): alone = run_plan(model, PAIRS, plan, other)
        runs.clear()
        with torch.no_grad(): assert torch.allclose(run_plan(model, PAIRS, plan, other, start), alone, atol=1e-5)
        assert len(runs) == below
    handle.remove()
    assert bare(model)


# -- what is refused -----------------------------------------------------------------------
def test_errors_and_hooks_that_are_gone():
    model, g = load_model('mock://mamba2-tiny'), model_graph(load_model('mock://mamba2-tiny'))
    with pytest.raises(ValueError, match='got a graph of mock://mamba2-tiny, expected one of mock://llama-tiny'):
        run_edges(load_model('mock://llama-tiny'), PAIRS, g, all_of(g))
    with pytest.raises(ValueError, match='got a graph of mock://mamba2-tiny'): exact(load_model('mock://llama-tiny'), PAIRS, g)
    with pytest.raises(ValueError, match=r'got \(3,\) edges, expected \(145,\)'): run_edges(model, PAIRS, g, torch.ones(3, dtype=torch.bool))
    for f in (lambda: run_edges(model, PAIRS, g, all_of(g), 'noise'), lambda: exact(model, PAIRS, g, ablation='noise')):
        with pytest.raises(ValueError, match=r"got ablation='noise', expected one of \['patch', 'mean', 'position-mean', 'zero', 'resample'\]"): f()
    with pytest.raises(ValueError, match="got metric='loss'"): exact(model, PAIRS, g, 'loss')
    def stop(m, args, out): raise RuntimeError('stop')
    handle = model.blocks[1].mixer.register_forward_hook(stop)
    with pytest.raises(RuntimeError, match='stop'): run_edges(model, PAIRS, g, ~all_of(g))
    handle.remove()
    assert bare(model)
