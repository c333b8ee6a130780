"""What the state costs: reading it at chosen steps, going on from an edited one, patching every one of them.

    pip install -r bench/requirements.txt && python bench/state.py [--quick] [--json OUT] [--only reading,editing,sweep]

Reading and editing on models of four blocks of d_model 512, as in bench/families.py. Peak memory is what the process
takes on top of the model and the prompt; `asked` is the size of the states that are kept. A sweep is timed by the
patch: `naive` is one run with an edit of its own, `lens` TransformerLens' patch of one write on its eager scan, both
over a few patches spread evenly.
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
from circuitbench.patching import patch_states

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
    "(name, model, length, layer, steps): all steps of the shipped model, every 32nd of the large one."
    if o.quick: return [('mock', load_model('mock://mamba2-tiny'), 32, 1, range(0, 32, 8))]
    config = Mamba2Config(vocab_size=50288, hidden_size=768, num_hidden_layers=24, num_heads=24, head_dim=64,
                          state_size=128, n_groups=1, tie_word_embeddings=True)
    torch.manual_seed(0)
    large = HookedModel(Mamba2ForCausalLM(config), name='24 layers of 768')
    return [('tiny://mamba2', load_model('tiny://mamba2'), 256, 3, range(256)),
            ('24 layers of 768', large, 256, 12, range(16, 256, 32))]


def sweep(o):
    "Every (step, head) of a middle layer patched: by the patch, against one run each."
    rows = []
    for name, model, length, layer, steps in swept(o):
        ids = torch.randint(0, model.sizes['d_vocab'], (2, 1, length))
        site, metric = f'blocks.{layer}.ssm.state', lambda x: x[:, 5] - x[:, 9]
        start = time.perf_counter()
        ours = patch_states(model, *ids, metric=metric, layers=layer, steps=steps, progress=False)
        took = (time.perf_counter() - start)/ours.effects.numel()
        start = time.perf_counter()
        screened = patch_states(model, *ids, metric=metric, layers=layer, steps=steps, screen=.05, progress=False)
        screen = (time.perf_counter() - start)/ours.effects.numel()
        with torch.no_grad(): clean = model.run_with_cache(ids[0], site, at=list(steps))[1][site]
        few = [(list(steps)[i], h) for i, h in zip(range(0, len(steps), max(1, len(steps)//6)), range(6))]
        edits = [patch(site, clean[:, [list(steps).index(t)]], at=t, heads=h) for t, h in few]
        naive, off = [], 0.
        for (t, h), e in zip(few, edits):
            start = time.perf_counter()
            with torch.no_grad(): value = float(metric(model.run(ids[1], edit=e).logits[:, -1]))
            naive.append(time.perf_counter() - start)
            off = max(off, abs(value - float(ours.effects[0, list(steps).index(t), h])))
        moved = lambda r: (r.effects - r.patched).abs().flatten()
        top = {*moved(ours).topk(20).indices.tolist()} if ours.effects.numel() >= 20 else set()
        kept = len(top & {*screened.exact.flatten().nonzero()[:, 0].tolist()})/max(1, len(top))
        lens = lens_patch(model, ids, layer, few) if find_spec('transformer_lens') else None
        naive = statistics.median(naive)
        rows.append(dict(
            model=name, patches=ours.effects.numel(), ours_ms=took*1e3, naive_ms=naive*1e3, x_naive=naive/took,
            lens_ms=lens*1e3 if lens else '-', x_lens=lens/took if lens else '-', screened_ms=screen*1e3,
            x_screen=took/screen, of_top_20=kept, off=off))
        print('.', end='', flush=True)
    table(rows, o, f'patching states of one layer, {length} tokens; by the patch')


def lens_patch(model, ids, layer, few):
    "Median seconds of TransformerLens' nearest: one write of one head replaced, on its eager scan."
    from transformer_lens.model_bridge import TransformerBridge
    with tempfile.TemporaryDirectory() as folder:
        model.hf.save_pretrained(folder)
        (model.tokenizer or byte_tokenizer()).save_pretrained(folder)
        bridge = TransformerBridge.boot_transformers(folder, device='cpu')
    for b in bridge.blocks: b.mixer.eager_scan = True
    name, times = f'blocks.{layer}.mixer.hook_ssm_write', []
    for t, h in few:
        def swap(write, hook, t=t, h=h):
            write = write.clone()
            write[:, t, h] = 0
            return write
        start = time.perf_counter()
        with torch.no_grad(): bridge.run_with_hooks(ids[1], fwd_hooks=[(name, swap)], use_cache=False)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == '__main__':
    o = options(__doc__.splitlines()[0], only='reading,editing,sweep')
    if 'reading' in o.only: reading(o, *(64, 4) if o.quick else (2048, 32))
    if 'editing' in o.only: editing(o, 64 if o.quick else 2048)
    if 'sweep' in o.only: sweep(o)
