"""What the state costs: reading it at chosen steps, and going on from an edited one.

    python bench/state.py [--quick] [--json OUT]

Models of four blocks of d_model 512, as in bench/families.py. Peak memory is what the process takes on top of the model
and the prompt; `asked` is the size of the states that are kept.
"""
import random
from functools import partial

import torch
from families import opened, peak
from timing import alternate, options, table

from circuitbench.edit import zero

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


if __name__ == '__main__':
    o = options(__doc__.splitlines()[0])
    reading(o, *(64, 4) if o.quick else (2048, 32))
    editing(o, 64 if o.quick else 2048)
