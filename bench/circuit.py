"""Circuits: what scores cost, beside a run, a naive loop and TransformerLens; how faithful they are; what size costs.

    pip install -r bench/requirements.txt
    python bench/circuit.py [--quick] [--json OUT] [--only anchor,eap,memory,exact,faithful,scale]
    python bench/circuit.py --only big          (once, 5 minutes: scores of a random model of 1.5 B)

`anchor` and the speed beside TransformerLens 4.3 are on a random Llama with as many keys as queries, which is what its
attribution takes; it goes pair by pair and position by position, its gradients are taken on the corrupt run, norms as
they are, so ours are given the pairs the other way round. `run` is one recorded forward pass with its backward pass
over the same prompts in the same batches. `naive` exchanges head after head, prompt after prompt.
"""
import os
import statistics
import tempfile
import time
from functools import partial
from importlib.util import find_spec

import torch
from families import peak
from timing import alternate, options, table
from transformers import LlamaConfig, LlamaForCausalLM, Mamba2Config, Mamba2ForCausalLM

from circuitbench.attribute import attribute
from circuitbench.circuit import extract_circuit
from circuitbench.edit import Edit
from circuitbench.exact import exact
from circuitbench.graph import model_graph
from circuitbench.hook import HookedModel
from circuitbench.judge import BUDGETS
from circuitbench.load import load_model
from circuitbench.pairs import Pairs, as_pairs, logit_diff
from circuitbench.task import facts, indirect_object, induction

os.environ['HF_HUB_OFFLINE'] = '1'
MODELS = 'mamba2', 'hybrid', 'jamba', 'rwkv7'
TASKS = {'facts': facts, 'indirect object': indirect_object, 'induction': induction}
EAP = dict(method='eap', progress=False)


def run(model, pairs, tokens=2048):
    "One recorded forward pass and its backward pass over all pairs."
    for b in pairs.batches(tokens):
        out, cache = model.run_with_cache(b.clean, 'embed', grad=True)
        cache.grad(logit_diff(b.last(out.logits), b).sum())


def llama(o):
    "A random Llama, in a folder for TransformerLens and open for us; pairs of random tokens."
    torch.manual_seed(0)
    d, n = (64, 2) if o.quick else (512, 6)
    config = LlamaConfig(vocab_size=2000, hidden_size=d, intermediate_size=2*d, num_hidden_layers=n,
                         tie_word_embeddings=False, num_attention_heads=8, num_key_value_heads=8,
                         max_position_embeddings=256)
    hf = LlamaForCausalLM(config).eval()
    for p in hf.parameters():
        if p.dim() > 1: torch.nn.init.normal_(p, std=p.shape[1]**-.5)
    ids = torch.randint(0, 2000, (2, 4, 16))
    pairs = Pairs(*ids, torch.full((4,), 15), torch.arange(4), torch.arange(4) + 9)
    return hf, pairs


def theirs(bridge, pairs, granularity='edge'):
    "TransformerLens' attribution, pair by pair, since its metric sees one example."
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch
    total = {}
    for i in range(len(pairs)):
        b = pairs[i]
        metric = lambda logits, b=b: logit_diff(b.last(logits), b).sum()
        got = attribution_patch(bridge, b.clean, b.corrupt, metric, EdgeAttributionConfig(granularity))
        for (a, r), v in got.edge_scores.items():
            key = _name(a), _name(r)
            total[key] = total.get(key, 0.) + float(v)/len(pairs)
    return total


def _name(n):
    "A node of TransformerLens by the name that it has here, its position left out."
    heads = {'attn_head_out': 'attn', 'q_input': 'attn.q', 'k_input': 'attn.k', 'v_input': 'attn.v'}
    if n.kind in heads: return f'{n.layer}.{heads[n.kind]}[{n.head}]'
    return f'{n.layer}.mlp' if n.kind.startswith('mlp') else n.kind


def anchor(o):
    "Every edge's score against TransformerLens', and the time of both."
    if not find_spec('transformer_lens'): return print('\nanchor: transformer-lens is not installed')
    from transformer_lens.model_bridge import TransformerBridge
    hf, pairs = llama(o)
    model = HookedModel.from_module(hf, name='llama')
    graph = model_graph(model)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_pretrained(folder)
        byte = load_model('mock://llama-tiny').tokenizer
        byte.save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, device='cpu')
    turned = Pairs(pairs.corrupt, pairs.clean, pairs.at, pairs.target, pairs.wrong)
    ours = partial(attribute, model, turned, graph, frozen=False, **EAP)
    want, got = theirs(bridge, pairs), ours()
    mine = {tuple(n.split('->')): -v for n, v in zip(graph.names, got.edges.tolist())}
    off = max(abs(mine[k] - v) for k, v in want.items())/max(map(abs, want.values()))
    t = alternate({'ours': ours, 'lens': partial(theirs, bridge, pairs)}, o.seconds, 3)
    table([dict(edges=len(want), off=off, ours_ms=t['ours']*1e3, lens_ms=t['lens']*1e3, x=t['lens']/t['ours'])], o,
          'EAP over the edges of a Llama, TransformerLens 4.3; off: largest difference over the largest score')


def eap(o):
    "Scores of all edges against one recorded run over the same prompts."
    rows = []
    for name in MODELS[:1] if o.quick else MODELS:
        model = load_model(f'tiny://{name}')
        pairs, graph = as_pairs(model, facts(n=8 if o.quick else 100, seed=1)), model_graph(model)
        calls = {'run': partial(run, model, pairs), 'eap': partial(attribute, model, pairs, graph, **EAP),
                 'ig': partial(attribute, model, pairs, graph, method='eap-ig', progress=False)}
        t = alternate(calls, o.seconds, 3)
        rows.append(dict(model=name, edges=len(graph), run_ms=t['run']*1e3, eap_ms=t['eap']*1e3,
                         x_run=t['eap']/t['run'], ig5_ms=t['ig']*1e3, x_run_ig=t['ig']/t['run']))
        print('.', end='', flush=True)
    table(rows, o, f'scores of all edges, {len(pairs)} prompts')


def memory(o):
    "Most memory on top of the model, as the number of edges grows at the same prompts."
    rows, model = [], load_model('tiny://mamba2')
    pairs = as_pairs(model, facts(n=8 if o.quick else 100, seed=1))
    for lags in (False, True):
        graph = model_graph(model, lags)
        rows.append(dict(edges=len(graph), nodes=len(graph.nodes),
                         MiB=peak(partial(attribute, model, pairs, graph, **EAP)),
                         run_MiB=peak(partial(run, model, pairs))))
    table(rows, o, 'most memory that scores take')


def exact_nodes(o):
    "Every head exchanged: side by side, one run a head, and one run a head and prompt."
    rows = []
    for name in MODELS[:1] if o.quick else MODELS:
        model = load_model(f'tiny://{name}')
        pairs, graph = as_pairs(model, facts(n=4 if o.quick else 32, seed=1)), model_graph(model)
        heads = [n for n in graph.nodes if n.kind == 'head']
        ours = partial(exact, model, pairs, graph, edges=False, nodes=[n.name for n in heads], progress=False)
        fast, slow = [spent(ours)], 0.
        for i in range(0, len(pairs), 4):                                  # in turn: a drift in speed meets both
            slow += spent(partial(naive, model, pairs[i:i + 4], heads, 1))
            fast.append(spent(ours))
        mine, batched = statistics.median(fast), spent(partial(naive, model, pairs, heads, len(pairs)))
        rows.append(dict(model=name, heads=len(heads), ours_s=mine, naive_s=slow,
                         x_naive=slow/mine, batched_s=batched))
        print('.', end='', flush=True)
    table(rows, o, f'exact effects of all heads, {len(pairs)} prompts, processor time; batched: naive with all at once')


def spent(call):
    "Seconds of processor time: what others do on the machine counts little."
    start = time.process_time()
    call()
    return time.process_time() - start


@torch.no_grad()
def naive(model, pairs, heads, size):
    "Head after head, in batches of a size: the counterfactual's value is read, and put in."
    for i in range(0, len(pairs), size):
        b = pairs[i:i + size]
        for n in heads:
            value = model.run_with_cache(b.corrupt, n.site)[1][n.site]
            logit_diff(b.last(model.run(b.clean, edit=Edit(n.site, partial(put, model, n, value))).logits), b)


def put(model, n, value, x, where):
    "A head's part of what passes its site, exchanged."
    if n.heads is None: return value
    new, many = x.clone(), model.sizes['q_head' if n.branch == 'attn' else 'head']
    by_head = lambda v: v.flatten(2).unflatten(2, (many, -1))
    for h in n.heads: by_head(new)[:, :, h] = by_head(value)[:, :, h]
    return new


def faithful(o):
    "Circuits of each task in each shipped model, found on some prompts, measured on others."
    rows = []
    for name in MODELS[:1] if o.quick else MODELS:
        model = load_model(f'tiny://{name}')
        for task, draw in TASKS.items():
            n = 8 if o.quick else 64
            pairs = as_pairs(model, draw(n=n, seed=3))
            seen, held = pairs.split(n//2)
            c = extract_circuit(model, seen, progress=False)
            f = c.faithfulness(pairs=held)
            curve = dict(c.curve)
            rows.append(dict(model=name, task=task, edges=len(c.graph), kept=len(c), share=len(c)/len(c.graph),
                             at_2=curve[.02], at_5=curve[.05], at_10=curve[.1], held_out=f.value, low=f.low,
                             high=f.high, cpr=c.cpr, cmd=c.cmd))
            print('.', end='', flush=True)
    table(rows, o, f'circuits by EAP-IG with norms frozen; faithfulness at shares of {len(BUDGETS)} budgets')


def scale(o):
    "Time and memory of node and edge scores of a random Mamba-2 against layers, heads and length."
    rows = []
    base = dict(layers=4, heads=8, length=64)
    for change in ({}, {'layers': 8}, {'layers': 16}, {'heads': 16}, {'heads': 32}, {'length': 128}, {'length': 256}):
        model = shaped(**(size := base | change))
        pairs = drawn(model, 4, size['length'])
        graph = model_graph(model)
        call = partial(attribute, model, pairs, graph, **EAP)
        t = alternate({'run': partial(run, model, pairs), 'eap': call}, min(o.seconds, 2.), 2)
        rows.append(size | dict(edges=len(graph), run_ms=t['run']*1e3, eap_ms=t['eap']*1e3, x=t['eap']/t['run'],
                                MiB=peak(call)))
        print('.', end='', flush=True)
        if o.quick: break
    table(rows, o, 'EAP against size: random Mamba-2, d_model 64 a head, 4 prompts')


def shaped(layers, heads, length=0, d_model=None, state=64, vocab=2000):
    "A random Mamba-2."
    d = d_model or 32*heads
    config = Mamba2Config(vocab_size=vocab, hidden_size=d, num_hidden_layers=layers, expand=2, num_heads=heads,
                          n_groups=1, head_dim=2*d//heads, state_size=state, chunk_size=64)
    return HookedModel.from_module(Mamba2ForCausalLM(config), name='random')


def drawn(model, n, length):
    ids = torch.randint(0, model.sizes['d_vocab'], (2, n, length))
    return Pairs(*ids, torch.full((n,), length - 1), torch.arange(n), torch.arange(n) + 9)


def big(o):
    "Scores of all nodes and edges of a random model of 1.5 B parameters, two prompts of 64 tokens, once."
    layers, heads, d = (2, 8, 128) if o.quick else (48, 64, 2048)
    model = shaped(layers, heads, d_model=d, state=128, vocab=50_288)
    pairs, graphs = drawn(model, 2, 64), []
    calls = dict(graph=lambda: graphs.append(model_graph(model)), forward=lambda: model.run(pairs.clean),
                 run=lambda: run(model, pairs, 64),
                 eap=lambda: attribute(model, pairs, graphs[0], tokens=64, **EAP))
    cost = {}
    for name, call in calls.items():
        cost[f'{name}_s'] = spent(lambda f=call, name=name: cost.update({f'{name}_MiB': peak(f)}))
        print('.', end='', flush=True)
    size = dict(billions=sum(p.numel() for p in model.hf.parameters())/1e9, layers=layers, heads=heads,
                nodes=len(graphs[0].nodes), edges=len(graphs[0]))
    table([size | cost], o,
          'EAP of a random Mamba-2, two prompts of 64 tokens; run: forward and backward; s of processor time, once')


if __name__ == '__main__':
    o = options(__doc__.splitlines()[0], only='anchor,eap,memory,exact,faithful,scale')
    parts = dict(anchor=anchor, eap=eap, memory=memory, exact=exact_nodes, faithful=faithful, scale=scale, big=big)
    for name, part in parts.items():
        if name in o.only.split(','): part(o)
