"""What the state costs: reading it at chosen steps, going on from an edited one, patching every one of them.

    pip install -r bench/requirements.txt
    python bench/state.py [--quick] [--json OUT] [--only reading,editing,sweep,gradient]

Reading and editing on models of four blocks of d_model 512, as in bench/families.py. Peak memory is what the process
takes on top of the model and the prompt; `asked` is the size of the states that are kept. A sweep is timed by the
patch: `naive` is one run with an edit of its own, `lens` TransformerLens' patch of one write on its eager scan, both
over a few patches spread evenly; `off` is the largest difference between a sweep and the naive runs.
"""
import os
import random
import statistics
import tempfile
import time
from functools import partial
from importlib.util import find_spec

import torch
from families import opened, peak
from timing import alternate, options, table
from transformers import Mamba2Config, Mamba2ForCausalLM

from circuitbench.edit import patch, zero
from circuitbench.hook import HookedModel
from circuitbench.load import byte_tokenizer, load_model
from circuitbench.patching import patch_states, state_gradients

os.environ['HF_HUB_OFFLINE'] = '1'

FAMILIES = 'mamba1', 'mamba2', 'falcon-h1', 'qwen3-next', 'rwkv7'


def reading(o, length, count):
    "The states of all blocks at `count` steps, anywhere or at even distances, against the same run without."
    rows = []
    for family in FAMILIES:
        model, ids = opened(family, o.quick), torch.randint(0, 257, (1, length))
        anywhere = sorted(random.Random(0).sample(range(length), count))
        keep = partial(lambda m, ids, at: m.run_with_cache(ids, 'ssm.state', at=at), model, ids)
        calls = {'run': partial(model.run, ids), 'anywhere': partial(keep, anywhere),
                 'even': partial(keep, f'every:{length//count}')}
        with torch.no_grad(): t, mib = alternate(calls, o.seconds, 3), {k: peak(f) for k, f in calls.items()}
        asked = sum(v.numel()*v.element_size() for v in keep(anywhere)[1].values())/2**20
        rows.append(dict(family=family, run_ms=t['run']*1e3, anywhere_ms=t['anywhere']*1e3, x=t['anywhere']/t['run'],
                         even_ms=t['even']*1e3, x_even=t['even']/t['run'], run_MiB=mib['run'],
                         anywhere_MiB=mib['anywhere'], asked_MiB=asked))
        print('.', end='', flush=True)
    table(rows, o, f'states after {count} steps of {length}')


def editing(o, length):
    "A run whose states are edited at one step in the middle, in one block and in all."
    rows = []
    for family in FAMILIES:
        model, ids = opened(family, o.quick), torch.randint(0, 257, (1, length))
        block = next(i for i in range(model.n_layers) if 'ssm' in model.points[i])
        calls = {'run': partial(model.run, ids)} | {
            k: partial(model.run, ids, edit=zero(site, at=length//2))
            for k, site in (('one', f'blocks.{block}.ssm.state'), ('all', 'ssm.state'))}
        with torch.no_grad(): t = alternate(calls, o.seconds, 3)
        rows.append(dict(family=family, run_ms=t['run']*1e3, one_block_ms=t['one']*1e3, x=t['one']/t['run'],
                         all_blocks_ms=t['all']*1e3, x_all=t['all']/t['run']))
        print('.', end='', flush=True)
    table(rows, o, f'one step of {length} edited')


def swept(o):
    "(name, model, length, layer, steps): all steps of the shipped model, every 16th of the large one."
    if o.quick: return [('mock', load_model('mock://mamba2-tiny'), 32, 1, range(0, 32, 8))]
    config = Mamba2Config(vocab_size=50288, hidden_size=768, num_hidden_layers=24, num_heads=24, head_dim=64,
                          state_size=128, n_groups=1, tie_word_embeddings=True)
    torch.manual_seed(0)
    large = HookedModel(Mamba2ForCausalLM(config), name='24 layers of 768')
    return [('tiny://mamba2', load_model('tiny://mamba2'), 256, 3, range(256)),
            ('24 layers of 768', large, 256, 12, range(8, 256, 16))]


def sweep(o):
    "Every (step, head) of a middle layer patched: by the patch, against one run each; in turn, medians of rounds."
    rows = []
    for name, model, length, layer, steps in swept(o):
        ids = torch.randint(0, model.sizes['d_vocab'], (2, 1, length))
        site, metric, steps = f'blocks.{layer}.ssm.state', lambda x: x[:, 5] - x[:, 9], list(steps)
        with torch.no_grad(): clean = model.run_with_cache(ids[0], site, at=steps)[1][site]
        few = [(steps[i], h) for i, h in zip(range(0, len(steps), max(1, len(steps)//6)), range(6))]
        edits = [patch(site, clean[:, [steps.index(t)]], at=t, heads=h) for t, h in few]
        patched = partial(patch_states, model, *ids, metric=metric, layers=layer, steps=steps, progress=False)
        n = len(steps)*model.sizes['head']
        calls = {'ours': (patched, n), 'screened': (partial(patched, screen=.05), n),
                 'naive': (partial(one_by_one, model, ids[1], edits, metric), len(few))}
        if find_spec('transformer_lens'): calls['lens'] = lens_patch(model, ids, layer, few), len(few)
        times, got = {k: [] for k in calls}, {}
        for _ in range(1 if o.quick else 3):
            for k, (call, count) in calls.items():
                start = time.perf_counter()
                got[k] = call()
                times[k].append((time.perf_counter() - start)/count*1e3)
        ms = {k: statistics.median(v) for k, v in times.items()}
        ours, screened = got['ours'], got['screened']
        off = max(abs(v - float(ours.effects[0, steps.index(t), h])) for v, (t, h) in zip(got['naive'], few))
        moved = (ours.effects - ours.patched).abs().flatten()
        top = {*moved.topk(min(20, n)).indices.tolist()}
        kept = len(top & {*screened.exact.flatten().nonzero()[:, 0].tolist()})/len(top)
        lens = ms.get('lens')
        rows.append(dict(
            model=name, patches=n, ours_ms=ms['ours'], naive_ms=ms['naive'], x_naive=ms['naive']/ms['ours'],
            lens_ms=lens or '-', x_lens=lens/ms['ours'] if lens else '-', screened_ms=ms['screened'],
            x_screen=ms['ours']/ms['screened'], of_top_20=kept, off=off))
        print('.', end='', flush=True)
    table(rows, o, f'patching states of one layer, {length} tokens; by the patch')


@torch.no_grad()
def one_by_one(model, ids, edits, metric):
    "A run for each edit."
    return [float(metric(model.run(ids, edit=e).logits[:, -1])) for e in edits]


def lens_patch(model, ids, layer, few):
    "A call that replaces writes of one head by TransformerLens' nearest means, each on its eager scan."
    from transformer_lens.model_bridge import TransformerBridge
    with tempfile.TemporaryDirectory() as folder:
        model.hf.save_pretrained(folder)
        (model.tokenizer or byte_tokenizer()).save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, device='cpu')
    for b in bridge.blocks: b.mixer.eager_scan = True
    name = f'blocks.{layer}.mixer.hook_ssm_write'
    @torch.no_grad()
    def without(t, h):
        def swap(write, hook):
            write = write.clone()
            write[:, t, h] = 0
            return write
        bridge.run_with_hooks(ids[1], fwd_hooks=[(name, swap)], use_cache=False)
    return lambda: [without(t, h) for t, h in few]


def gradient(o, length):
    "d metric / d state after 32 steps of the shipped model, from one backward pass: time and memory."
    model = load_model('mock://mamba2-tiny' if o.quick else 'tiny://mamba2')
    ids, at = torch.randint(0, model.sizes['d_vocab'], (1, length)), list(range(0, length, length//32))
    call = partial(state_gradients, model, ids, lambda x: x[:, 5] - x[:, 9], at=at)
    start = time.perf_counter()
    g = call()
    took = time.perf_counter() - start
    asked = sum(v.numel()*v.element_size() for v in g.values())/2**20
    every = model.sizes['head']*model.sizes['d_head']*model.sizes['d_state']*4*length*len(g)/2**20
    table([dict(tokens=length, steps=len(at), seconds=took, peak_MiB=peak(call), asked_MiB=asked,
                all_states_MiB=every)], o, 'gradients of states')


if __name__ == '__main__':
    o = options(__doc__.splitlines()[0], only='reading,editing,sweep,gradient')
    if 'reading' in o.only: reading(o, *(64, 4) if o.quick else (2048, 32))
    if 'editing' in o.only: editing(o, 64 if o.quick else 2048)
    if 'sweep' in o.only: sweep(o)
    if 'gradient' in o.only: gradient(o, 64 if o.quick else 4096)
