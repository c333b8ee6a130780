"""What length costs: a state, attention, and a hybrid's two branches, from 256 to 32,768 tokens.

    python bench/length.py [--quick] [--json OUT]

Four blocks of d_model 512 each, as in bench/families.py, the logits of the last position. `us` is microseconds a token,
`MiB` what the process takes on top of the model at most. `states` keeps the state of all blocks after 32 steps. Lengths
beyond 4,096 are run once. The branches are those of the hybrid's blocks, timed within one run.
"""
import statistics
import time
from contextlib import ExitStack
from functools import partial

import torch
from families import opened, peak
from timing import alternate, options, table

LENGTHS = 256, 1024, 2048, 4096, 8192, 16384, 32768


def branches(model, ids, times=3):
    "Median seconds that the SSM branches and the attention branches of all blocks take in a run."
    spent, started, kinds = [], {}, ('ssm', 'attn')
    def before(m, args, kwargs): started[m] = time.perf_counter()
    def after(kind): return lambda m, args, out: spent[-1].__setitem__(kind, spent[-1][kind]
                                                                      + time.perf_counter() - started[m])
    with ExitStack() as stack:
        for block, points in zip(model.blocks, model.points):
            for kind in kinds:
                module = block.get_submodule(points[kind].module)
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(after(kind)).remove)
        for _ in range(times):
            spent.append(dict.fromkeys(kinds, 0.))
            model.run(ids, last=True)
    return {k: statistics.median(s[k] for s in spent) for k in kinds}


def once(call):
    "Seconds of a single call: the long ones take minutes."
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@torch.no_grad()
def main(o):
    models, rows = {k: opened(k, o.quick) for k in ('mamba2', 'falcon-h1', 'llama')}, []
    for length in (32, 64) if o.quick else LENGTHS:
        ids, long = torch.randint(0, 257, (1, length)), length > 4096
        at = f'every:{length//32}'
        calls = {k: partial(m.run, ids, last=True) for k, m in models.items()}
        calls['states'] = partial(models['mamba2'].run_with_cache, ids, 'ssm.state', at=at)
        t = {k: once(f) for k, f in calls.items()} if long else alternate(calls, o.seconds, 5)
        mib = {k: '-' if length > 16384 else peak(f) for k, f in calls.items()}
        parts, us = branches(models['falcon-h1'], ids, 1 if long else 5), 1e6/length
        rows.append(dict(tokens=length, mamba2_us=t['mamba2']*us, mamba2_MiB=mib['mamba2'], states_us=t['states']*us,
                         states_MiB=mib['states'], llama_us=t['llama']*us, llama_MiB=mib['llama'],
                         hybrid_us=t['falcon-h1']*us, its_ssm_us=parts['ssm']*us, its_attn_us=parts['attn']*us))
        table(rows[-1:], o, f'{length} tokens')
    table(rows, o, 'by length')


if __name__ == '__main__':
    main(options(__doc__.splitlines()[0]))
