"""Ways to choose edges: on models whose circuit is known, against plain autograd and numpy on the bare model, and against a pass in the open."""
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from circuitbench.apart import with_experts
from circuitbench.attribute import attribute
from circuitbench.graph import model_graph
from circuitbench.judge import auroc
from circuitbench.load import load_model
from circuitbench.pairs import Pairs, logit_diff
from circuitbench.passes import eap_ig_activations, flow_routes, grad_drop, importances
from circuitbench.search import acdc, learned_masks
from circuitbench.subgraph import run_edges
from circuitbench.truth import random_scores, truth

torch.set_num_threads(1)
TIDY = 'mqar-compiled', 'shift-recall-compiled', 'delta-recall-compiled', 'hybrid-carry-match', 'hybrid-carry-match-parallel', 'recall-mamba1-compiled'
SLOW = 'delta-recall-compiled', 'hybrid-carry-match', 'hybrid-carry-match-parallel'       # where a fit takes seconds
TIDY_FIRST = [pytest.param(n, marks=[pytest.mark.slow]*(n in SLOW)) for n in TIDY]
METHODS = acdc, learned_masks, eap_ig_activations, flow_routes, grad_drop
QUIET = dict(progress=False)


def some_pairs(n=3, pos=9, seed=3):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(1, 257, shape, generator=g)
    return Pairs(draw(n, pos), draw(n, pos), torch.tensor([8, 5, 7][:n]), torch.tensor([5, 17, 200][:n]), torch.tensor([9, 30, 41][:n]))


PAIRS = some_pairs()


def bare(model): return not any(m._forward_hooks or m._forward_pre_hooks or 'forward' in m.__dict__ for m in model.hf.modules())


def near(a, b, tol=1e-4): return float((a - b).abs().max()) <= tol*float(b.abs().max())


# -- where the circuit is known ------------------------------------------------------------
@pytest.mark.parametrize('name', TIDY)
def test_random_scores_find_no_circuit(name):
    case = truth(name, 24, seed=1)
    found = [auroc(random_scores(case.model, case.pairs, case.graph, seed).edges, case.edges) for seed in range(10)]
    assert .35 < np.mean(found) < .65


@pytest.mark.parametrize(('metric', 'threshold'), [('kl', .01), ('logit_diff', .1)])
@pytest.mark.parametrize('name', TIDY)
def test_acdc_keeps_what_is_in_the_circuit_and_drops_what_is_not(name, metric, threshold):
    case = truth(name, 24, seed=1)
    found = acdc(case.model, case.pairs, case.graph, metric, threshold, **QUIET)
    kept = (found.edges >= threshold).tolist()
    assert [n for n, k, label in zip(case.graph.names, kept, case.edges) if label is not None and k != label] == []
    runs = int(found.note.split('; ')[-1].split()[0])
    assert runs < 70                                                         # what is cut off is not tested
    assert auroc(found.edges, case.edges) == 1. and bare(case.model)


@pytest.mark.parametrize('name', TIDY_FIRST)
def test_learned_masks_open_the_circuit(name):
    case = truth(name, 24, seed=1)
    found = learned_masks(case.model, case.pairs, case.graph, **QUIET)
    assert auroc(found.edges, case.edges) >= .95 and auroc(found.nodes, case.nodes) >= .9
    keep = found.edges >= sorted(found.edges.tolist())[-len(case.graph)//3]                # a third of the edges does it
    with torch.no_grad(): alone = float(logit_diff(run_edges(case.model, case.pairs, case.graph, keep), case.pairs).mean())
    assert abs(alone - found.clean) < .3*(found.clean - found.corrupt) and bare(case.model)


@pytest.mark.parametrize('name', TIDY_FIRST)
def test_other_methods_on_the_tidy_cases(name):
    case = truth(name, 12, seed=1)
    assert auroc(eap_ig_activations(case.model, case.pairs, case.graph, steps=3, **QUIET).edges.abs(), case.edges) >= .95
    assert auroc(grad_drop(case.model, case.pairs, case.graph, plain=True, **QUIET).edges, case.edges) >= .85
    alone = auroc(grad_drop(case.model, case.pairs, case.graph, **QUIET).edges, case.edges)
    assert alone >= (.85 if case.model.n_layers == 1 else .8)                # of two blocks, one drop each: what goes through both is lost
    assert .45 <= auroc(flow_routes(case.model, case.pairs, case.graph, **QUIET).edges, case.edges) < .95


# -- acdc, against a pass in the open ------------------------------------------------------
def plain_acdc(model, pairs, graph, threshold):
    "The same in the open: every edge is tested by a run of its own, and all that is cut off is exchanged in it."
    value = lambda keep: float(logit_diff(run_edges(model, pairs, graph, keep), pairs).mean())
    keep, tested = torch.ones(len(graph), dtype=torch.bool), {}
    now, into = value(keep), {}
    for e, (_, b) in enumerate(graph.edges.tolist()): into.setdefault(b, []).append(e)
    for r in sorted(into, reverse=True):
        out = keep & (graph.edges[:, 0] == r)
        for e in reversed(into[r]):
            keep[e] = False
            if r < len(graph.nodes) - 1 and not out.any():
                now = value(keep)                                            # heads that share a norm hear it
                continue
            tested[e] = now - value(keep)
            if tested[e] < threshold: now -= tested[e]
            else: keep[e] = True
    return keep, tested


@pytest.mark.parametrize(('name', 'threshold'), [('mamba2', .1), ('llama', .1), ('llama', .4)])
@torch.no_grad()
def test_acdc_is_a_pass_in_the_open(name, threshold):
    model = load_model(f'mock://{name}-tiny')
    g = model_graph(model)
    keep, tested = plain_acdc(model, PAIRS, g, threshold)
    found = acdc(model, PAIRS, g, 'logit_diff', threshold, **QUIET)
    assert (found.edges >= threshold).tolist() == keep.tolist() and 0 < int(keep.sum()) < len(g)
    best = [0.]*(len(g.nodes) - 1) + [np.inf]
    for e in sorted(range(len(g)), key=lambda e: (-int(g.edges[e, 1]), -e)):
        a, b = g.edges[e].tolist()
        want = min(max(0., tested.get(e, 0.)), best[b])
        assert float(found.edges[e]) == pytest.approx(want, abs=2e-4), g.names[e]
        if keep[e]: best[a] = max(best[a], want)
    alone = float(logit_diff(run_edges(model, PAIRS, g, keep), PAIRS).mean())
    assert f'{int(keep.sum())} of {len(g)} edges kept' in found.note and f'metric {alone:.4g} with these alone' in found.note
    assert [float(v) for v in found.nodes[:-1]] == pytest.approx([float(found.edges[g.edges[:, 0] == k].max()) for k in range(len(g.nodes) - 1)])
    assert found.nodes[-1].isnan() and found.pairs == 3


def test_acdc_in_small_batches_and_from_fewer_edges():
    model = load_model('mock://mamba2-tiny')
    g = model_graph(model)
    kw = dict(graph=g, metric='logit_diff', threshold=.1, **QUIET)
    whole, one = acdc(model, PAIRS, **kw), acdc(model, PAIRS, tokens=1, **kw)
    assert torch.allclose(whole.edges, one.edges, atol=1e-4)
    begin = torch.rand(len(g), generator=torch.Generator().manual_seed(0)) < .3
    before = begin.clone()
    fewer = acdc(model, PAIRS, begin=begin, **kw)
    assert (fewer.edges[~begin] == 0).all() and torch.equal(begin, before) and bare(model)
    assert int(fewer.note.split('; ')[-1].split()[0]) <= 2*int(begin.sum()) + 1


# -- which edges a mask of float moves -----------------------------------------------------
@pytest.mark.parametrize(('name', 'lags'), [('llama', False), ('mamba2', False), ('mamba2', True), ('rwkv7', True), ('falcon-h1', False), ('jamba', True)])
@torch.no_grad()
def test_masks_are_learned_where_masks_count(name, lags):
    "An edge without a mask of its own gets the smaller score of its ends; a run does not hear it."
    from circuitbench.search import _unmasked
    model = load_model(f'mock://{name}-tiny')
    g = model_graph(model, lags)
    some, keep = _unmasked(g), torch.full((len(g),), .5)
    base = run_edges(model, PAIRS, g, keep)
    assert torch.allclose(run_edges(model, PAIRS, g, keep.masked_fill(some, 0.)), base) and not (some & ~g.inner).any()
    inner = (g.inner & ~some).nonzero()[:, 0].tolist()
    for e in inner[::max(1, len(inner)//12)]:
        less = keep.clone()
        less[e] = 0.
        if g.nodes[int(g.edges[e, 1])].writes is not None: assert not torch.equal(run_edges(model, PAIRS, g, less), base), g.names[e]


def test_scores_of_edges_without_a_mask_are_those_of_their_ends():
    model = load_model('mock://llama-tiny')
    g = model_graph(model)
    found = learned_masks(model, PAIRS, g, steps=5, **QUIET)
    score = dict(zip(g.names, found.edges.tolist()))
    into = max(v for n, v in score.items() if n.endswith('->1.attn.k[1]'))
    out = max(v for n, v in score.items() if n.startswith('1.attn[3]->'))
    assert score['1.attn.k[1]->1.attn[3]'] == pytest.approx(min(into, out))
    assert score['1.attn.q[3]->1.attn[3]'] != pytest.approx(min(max(v for n, v in score.items() if n.endswith('->1.attn.q[3]')), out))


def test_the_first_step_of_learning_is_the_gradient():
    "From one place all masks go the way of the loss: up where the answer is lost without the edge by more than the price."
    model = load_model('mock://mamba2-tiny')
    g = model_graph(model)
    found = learned_masks(model, PAIRS, g, steps=1, lr=.1, price=.003, start=.6, **QUIET)
    keep = torch.full((len(g),), .6, requires_grad=True)
    base, gone = (logit_diff(run_edges(model, PAIRS, g, torch.full((len(g),), v, dtype=torch.bool)), PAIRS).detach() for v in (True, False))
    loss = (logit_diff(run_edges(model, PAIRS, g, keep), PAIRS) - base).abs().mean()/(base - gone).abs().mean() + .003*keep.sum()
    slope = torch.autograd.grad(loss, keep)[0]
    clear = slope.abs() > 1e-5
    want = torch.tensor(.6).logit() - .1*slope.sign()                               # Adam's first step is lr
    assert torch.allclose(found.edges.logit()[clear], want[clear], atol=1e-3) and clear.float().mean() > .9


# -- Llama by plain autograd ---------------------------------------------------------------
class Bare:
    "A run of the bare model with hooks: every node's value, patches in it, and blocks whose contribution is held."
    def __init__(self, hf, ids, patches=None, held=None):
        self.seen, patches, held, c = {}, patches or {}, held or {}, hf.config
        self.H, self.K, self.d, self.L = c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.num_hidden_layers
        def out(name):
            def hook(m, args, y):
                y = patches[name] if name in patches else y
                if not y.requires_grad: y = y.requires_grad_()
                self.seen[name] = y
                return y
            return hook
        def into(name):
            def hook(m, args):
                x = patches[name] if name in patches else args[0]
                if not x.requires_grad: x = x.requires_grad_()
                self.seen[name] = x
                return (x, *args[1:])
            return hook
        with ExitStack() as stack:
            on = lambda m, f, pre=False: stack.callback((m.register_forward_pre_hook if pre else m.register_forward_hook)(f).remove)
            on(hf.model.embed_tokens, out('embed'))
            on(hf.model.norm, into('last'), True)
            for i, block in enumerate(hf.model.layers):
                on(block.input_layernorm, into(f'{i}.pre'), True)
                on(block.post_attention_layernorm, into(f'{i}.mid'), True)
                for s in 'qkv': on(getattr(block.self_attn, f'{s}_proj'), out(f'{i}.{s}'))
                on(block.self_attn.o_proj, into(f'{i}.z'), True)
                on(block.mlp, out(f'{i}.mlp'))
                if i in held: on(block, lambda m, args, y, i=i: args[0] + held[i] if torch.is_tensor(y) else (args[0] + held[i], *y[1:]))
            self.logits = hf(ids, use_cache=False).logits
        self.o = [b.self_attn.o_proj.weight for b in hf.model.layers]

    def writers(self):
        "What each adds, by name."
        out = {'embed': self.seen['embed']}
        for i in range(self.L):
            z, d = self.seen[f'{i}.z'], self.d
            out |= {f'{i}.attn[{h}]': z[..., h*d:(h + 1)*d] @ self.o[i][:, h*d:(h + 1)*d].T for h in range(self.H)}
            out[f'{i}.mlp'] = self.seen[f'{i}.mlp']
        return out


def scores_by_hand(run, metric, clean, corrupt, graph):
    "Edges of a run: change times gradient, that of each reader by its own way from the stream."
    back = lambda y, x, g: torch.autograd.grad(y, x, g, retain_graph=True, allow_unused=True)[0]
    zero = lambda x, g: torch.zeros_like(x) if g is None else g
    top = lambda x: zero(x, torch.autograd.grad(metric, x, retain_graph=True, allow_unused=True)[0])
    one = lambda g, h, d: torch.cat([v if k == h else torch.zeros_like(v) for k, v in enumerate(g.split(d, -1))], -1)
    now, els, s, d = clean.writers(), corrupt.writers(), run.seen, run.d
    G, inner = {'logits': top(s['last'])}, {}
    for i in range(run.L):
        G[f'{i}.mlp'] = zero(s[f'{i}.mid'], back(s[f'{i}.mlp'], s[f'{i}.mid'], top(s[f'{i}.mlp'])))
        for port, many in (('q', run.H), ('k', run.K), ('v', run.K)):
            x = s[f'{i}.{port}']
            for k in range(many):
                G[f'{i}.attn.{port}[{k}]'] = zero(s[f'{i}.pre'], back(x, s[f'{i}.pre'], one(top(x), k, d)))
                for h in range(k*run.H//many, (k + 1)*run.H//many):
                    g = zero(x, back(s[f'{i}.z'], x, one(top(s[f'{i}.z']), h, d)))
                    change = clean.seen[f'{i}.{port}'] - corrupt.seen[f'{i}.{port}']
                    inner[f'{i}.attn.{port}[{k}]->{i}.attn[{h}]'] = float((change*one(g, k, d)).detach().sum())
    named = (n.split('->') for n in graph.names)
    return torch.tensor([inner[f'{a}->{b}'] if f'{a}->{b}' in inner else float(((now[a] - els[a])*G[b]).detach().sum()) for a, b in named])


def stands_in(corrupt, ablation, hf):
    "A counterfactual run, with zeros or the means over all tokens of the clean prompts as its values."
    if ablation == 'patch': return corrupt
    every, here = Bare(hf, PAIRS.clean), torch.arange(PAIRS.clean.shape[1]) <= PAIRS.at[:, None]
    for name, v in corrupt.seen.items():
        corrupt.seen[name] = torch.zeros_like(v) if ablation == 'zero' else every.seen[name][here].mean(0).expand_as(v).detach()
    return corrupt


def the_metric(run, pairs): return logit_diff(pairs.last(run.logits), pairs).sum()


def test_eap_by_hand_is_attribute():
    "The hand that the next tests rely on."
    model = load_model('mock://llama-tiny')
    g, (clean, corrupt) = model_graph(model), (Bare(model.hf, ids) for ids in (PAIRS.clean, PAIRS.corrupt))
    want = scores_by_hand(clean, the_metric(clean, PAIRS), clean, corrupt, g)/len(PAIRS)
    assert near(attribute(model, PAIRS, g, method='eap', frozen=False, **QUIET).edges, want)


@pytest.mark.parametrize('ablation', ['patch', 'mean', 'zero'])
def test_integrated_activations_by_plain_autograd(ablation):
    model, steps = load_model('mock://llama-tiny'), 3
    g, (clean, corrupt) = model_graph(model), (Bare(model.hf, ids) for ids in (PAIRS.clean, PAIRS.corrupt))
    corrupt = stands_in(corrupt, ablation, model.hf)
    blocks = range(clean.L)
    groups = [(['embed'], lambda n: n == 'embed')]
    for i in blocks:
        groups += [([f'{i}.q', f'{i}.k', f'{i}.v'], lambda n, i=i: n.startswith(f'{i}.attn.')),
                   ([f'{i}.z'], lambda n, i=i: n.startswith(f'{i}.attn[')), ([f'{i}.mlp'], lambda n, i=i: n == f'{i}.mlp')]
    want = torch.zeros(len(g))
    for sites, mine in groups:
        own = torch.tensor([mine(n.split('->')[0]) for n in g.names])
        for k in range(1, steps + 1):
            part = {s: (corrupt.seen[s] + k/steps*(clean.seen[s] - corrupt.seen[s])).detach() for s in sites}
            run = Bare(model.hf, PAIRS.clean, part)
            want[own] += scores_by_hand(run, the_metric(run, PAIRS), clean, corrupt, g)[own]/steps/len(PAIRS)
    found = eap_ig_activations(model, PAIRS, g, steps=steps, frozen=False, ablation=ablation, **QUIET)
    assert near(found.edges, want) and bare(model) and found.pairs == 3
    if ablation != 'patch': return
    assert not near(attribute(model, PAIRS, g, steps=steps, frozen=False, **QUIET).edges, want, .05)
    assert near(eap_ig_activations(model, PAIRS, g, steps=steps, frozen=False, tokens=1, **QUIET).edges, want)
    base, gone = (float(the_metric(r, PAIRS).detach())/3 for r in (clean, corrupt))
    assert (found.clean, found.corrupt) == pytest.approx((base, gone), abs=1e-4)


@pytest.mark.parametrize('plain, ablation', [(False, 'patch'), (True, 'patch'), (True, 'mean'), (False, 'zero')])
def test_gradients_with_a_block_dropped_by_plain_autograd(plain, ablation):
    "Each block in turn adds what it added, as a constant; magnitudes of each pair, then means."
    model = load_model('mock://llama-tiny')
    g, total = model_graph(model), 0
    for p in range(len(PAIRS)):
        one = PAIRS[p]
        clean, corrupt = Bare(model.hf, one.clean), stands_in(Bare(model.hf, one.corrupt), ablation, model.hf)
        stream = [clean.seen[f'{i}.pre'] for i in range(clean.L)] + [clean.seen['last']]
        drops = [{i: (stream[i + 1] - stream[i]).detach()} for i in range(clean.L)] + [{}]*plain
        runs = [Bare(model.hf, one.clean, held=held) for held in drops]
        total = total + sum(scores_by_hand(r, the_metric(r, one), clean, corrupt, g).abs() for r in runs)
    passes = torch.tensor([clean.L + plain - (not n.endswith('->logits')) for n in g.names])
    found = grad_drop(model, PAIRS, g, plain=plain, frozen=False, ablation=ablation, **QUIET)
    assert near(found.edges, total/passes/len(PAIRS)) and bare(model) and (found.nodes[:-1] >= 0).all()


def test_one_block_has_nothing_else_to_drop():
    case = truth('mqar-compiled', 3, seed=1)
    found = grad_drop(case.model, case.pairs, case.graph, **QUIET)
    one = [attribute(case.model, case.pairs[i], case.graph, method='eap', **QUIET).edges.abs() for i in range(3)]
    assert torch.allclose(found.edges, sum(one)/3)


# -- flow routes in numpy ------------------------------------------------------------------
def shares_by_hand(parts):
    "parts (part, ..., d)."
    y = parts.sum(0)
    near_ = np.maximum(0, np.abs(y).sum(-1) - np.abs(y - parts).sum(-1))
    return near_/near_.sum(0)


def test_importances_of_two_writers():
    "y = (3, 1): 4 - |(0, 2)| and 4 - |(3, -1)|, which is none."
    parts = torch.tensor([[3., -1.], [0., 2.]])
    assert importances(parts).tolist() == [1., 0.]
    assert importances(torch.tensor([[3., 0.], [0., 1.]])).tolist() == [.75, .25]
    assert importances(torch.tensor([[1., 1.], [-1., -1.]])).tolist() == [.5, .5]                # nothing of which they could be parts
    many = torch.randn(5, 2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(importances(many).sum(0), torch.ones(2, 3))
    assert np.allclose(importances(many).numpy(), shares_by_hand(many.numpy()), atol=1e-6)


@pytest.mark.parametrize('name', ['mamba2', 'llama', 'zamba2', 'falcon-h1', 'rwkv7', 'hymba'])
@pytest.mark.parametrize('lags', [False, True], ids=['whole', 'lags'])
def test_what_flows_into_a_reader_is_what_it_passes_on(name, lags):
    model = load_model(f'mock://{name}-tiny')
    g = model_graph(model, lags)
    found = flow_routes(model, PAIRS, g, **QUIET)
    into = torch.zeros(len(g.nodes)).index_add_(0, g.edges[:, 1], found.edges)
    out = torch.zeros(len(g.nodes)).index_add_(0, g.edges[:, 0], found.edges)
    assert float(into[-1]) == pytest.approx(1, abs=1e-5) and found.nodes[-1].isnan()
    assert torch.allclose(out[:-1], found.nodes[:-1], atol=1e-5)
    held = [k for k in g.readers if g.nodes[k].kind == 'port' or g.nodes[k].branch == 'mlp']
    assert torch.allclose(into[held], found.nodes[held], atol=1e-5)
    if not lags: assert found.nodes[0] == pytest.approx(1, abs=1e-4)                            # all of it comes from the embedding
    assert torch.allclose(flow_routes(model, PAIRS, g, tokens=1, **QUIET).edges, found.edges, atol=1e-5) and bare(model)


@torch.no_grad()
def test_flow_of_a_transformer_in_numpy():
    model = load_model('mock://llama-tiny')
    g, run = model_graph(model), Bare(model.hf, PAIRS.clean)
    u = {n: v.double().numpy() for n, v in run.writers().items()}
    found, want, rows = dict(zip(g.names, flow_routes(model, PAIRS, g, **QUIET).edges.tolist())), {}, np.arange(3)
    part = lambda names: dict(zip(names, shares_by_hand(np.stack([u[n] for n in names]))))
    every, low = list(u), ['embed', *(f'0.attn[{h}]' for h in range(4)), '0.mlp']
    last, mid, pre = part(every), part([*low, *(f'1.attn[{h}]' for h in range(4))]), part(low)
    at = PAIRS.at.numpy()
    for n in every: want[f'{n}->logits'] = last[n][rows, at].mean()
    for n in mid: want[f'{n}->1.mlp'] = (last['1.mlp']*mid[n])[rows, at].mean()
    for h in range(4):
        flow = (last[f'1.attn[{h}]'] + last['1.mlp']*mid[f'1.attn[{h}]'])[rows, at]              # at the answer alone
        for s in 'qkv': want[f'1.attn.{s}[{h//(1 if s == "q" else 2)}]->1.attn[{h}]'] = flow.mean()/3
        for n in low:
            want[f'{n}->1.attn.q[{h}]'] = (flow/3*pre[n][rows, at]).mean()
            seen = np.array([pre[n][r, :t + 1].mean() for r, t in enumerate(at)])
            for s in 'kv':
                edge = f'{n}->1.attn.{s}[{h//2}]'
                want[edge] = want.get(edge, 0) + (flow/3*seen).mean()
    assert len(want) == 11 + 10 + 12 + 48
    for n, v in want.items(): assert found[n] == pytest.approx(v, abs=1e-5), n


# -- of all ---------------------------------------------------------------------------------
@pytest.mark.parametrize('f, name', [
    pytest.param(f, name, marks=[pytest.mark.slow]*(name in ('hymba', 'qwen3-next') and f in (eap_ig_activations, grad_drop)), id=f'{f.__name__}-{name}')
    for f in METHODS for name in ('mamba1', 'rwkv7', 'zamba2', 'hymba', 'jamba', 'qwen3-next')])
def test_every_method_scores_every_kind_of_graph(f, name):
    model = load_model(f'mock://{name}-tiny')
    less = {'threshold': .3, 'metric': 'logit_diff'} if f is acdc else {'steps': 2} if 'steps' in f.__annotations__ else {}
    begin = {'begin': torch.arange(len(model_graph(model))) % 9 == 0} if f is acdc else {}
    found = f(model, PAIRS, **less, **begin, **QUIET)
    assert found.edges.shape == (len(found.graph),) and found.edges.isfinite().all() and found.nodes[:-1].isfinite().all()
    assert found.pairs == 3 and found.clean != found.corrupt and found.method and bare(model)


@pytest.mark.parametrize('f', METHODS, ids=lambda f: f.__name__)
def test_an_interrupt_leaves_what_was_done(f):
    model = load_model('mock://mamba2-tiny')
    g, calls = model_graph(model), [0]
    late = {acdc: 14, learned_masks: 8, eap_ig_activations: 60, flow_routes: 99, grad_drop: 7}[f]
    def metric(logits, pairs):
        calls[0] += 1
        if calls[0] == late: raise KeyboardInterrupt
        return logit_diff(logits, pairs)
    small = {'tokens': 9} if f is eap_ig_activations else {}
    found = f(model, PAIRS, g, metric, **small, **QUIET)
    if f is acdc: assert found.note.startswith('interrupted: undecided edges are NaN') and 0 < int((~found.edges.isnan()).sum()) < len(g)
    elif f is not flow_routes: assert found.note.startswith('interrupted after') and found.edges.isfinite().all()
    assert bare(model)


def test_errors():
    model, g = load_model('mock://llama-tiny'), model_graph(load_model('mock://mamba2-tiny'))
    for f in METHODS:
        with pytest.raises(ValueError, match='got a graph of mock://mamba2-tiny, expected one of mock://llama-tiny'): f(model, PAIRS, g, **QUIET)
        with pytest.raises(ValueError, match="got metric='loss'"): f(model, PAIRS, metric='loss', **QUIET)
    for f in (acdc, learned_masks, eap_ig_activations, grad_drop):
        with pytest.raises(ValueError, match="got ablation='noise'"): f(model, PAIRS, ablation='noise', **QUIET)
    with pytest.raises(ValueError, match='got threshold=0, expected more than 0'): acdc(model, PAIRS, threshold=0, **QUIET)
    with pytest.raises(ValueError, match=r'got \(3,\) edges, expected \(106,\)'): acdc(model, PAIRS, begin=torch.ones(3, dtype=torch.bool), **QUIET)
    with pytest.raises(ValueError, match='got steps=0, expected more than 0'): eap_ig_activations(model, PAIRS, steps=0, **QUIET)
    jamba = load_model('mock://jamba-tiny')
    for f in (eap_ig_activations, flow_routes):
        with pytest.raises(ValueError, match='without latents, experts and steps'): f(jamba, PAIRS, with_experts(jamba, model_graph(jamba)), **QUIET)
    with pytest.raises(ValueError, match='got share=-1, expected more than 0'): learned_masks(model, PAIRS, share=-1, **QUIET)
    with pytest.raises(ValueError, match=r'got start=1.0, expected less than 1'): learned_masks(model, PAIRS, start=1., **QUIET)
    assert bare(model)
