"""Sparse autoencoders side by side with SAELens: speed of a step, quality at equal tokens, planted dictionaries.

    python bench/sae.py [--quick] [--json OUT] [--only speed,collect,quality,planted]

Where sae-lens is installed (it needs an environment of its own, see bench/saelens_roundtrip.py) it runs in the same
process, in turn; else its columns are missing. Its sparse activations do not train on a CPU (6.54). `bare` is a loop by
hand: dense products, autograd, fused Adam, decoder rows put back to norm 1. `collect` compares the forward pass of
transformers with collecting while the same rows pass.
"""
import os
import statistics
import time
from functools import partial
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from timing import alternate, options, table
from torch import nn

from circuitbench.baseline import baselines
from circuitbench.coder import SAEConfig
from circuitbench.load import load_model
from circuitbench.planted import planted, recovery
from circuitbench.store import stream
from circuitbench.stream import activations, shipped_text, token_rows
from circuitbench.trainer import Trainer

os.environ['HF_HUB_OFFLINE'] = '1'
SITE = 'blocks.2.ssm.out_proj_in'


class Bare(nn.Module):
    "A TopK coder by hand, as short as it can be and as fast as dense products allow."
    def __init__(self, d_in, d_sae, k, lr=5e-3):
        super().__init__()
        self.k, rows = k, F.normalize(torch.randn(d_sae, d_in), dim=1)
        self.W_enc, self.W_dec = nn.Parameter(rows.T.clone()), nn.Parameter(rows)
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(d_sae)), nn.Parameter(torch.zeros(d_in))
        self.adam = torch.optim.Adam(self.parameters(), lr=lr, fused=True)

    def step(self, x):
        value, index = torch.addmm(self.b_enc, x - self.b_dec, self.W_enc).topk(self.k, sorted=False)
        z = torch.zeros(len(x), len(self.b_enc)).scatter(1, index, value.relu())
        (x - torch.addmm(self.b_dec, z, self.W_dec)).square().sum(1).mean().backward()
        nn.utils.clip_grad_norm_(self.parameters(), 1.)
        self.adam.step()
        self.adam.zero_grad()
        with torch.no_grad(): self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)


def lens(d_in, d_sae, k, samples, batch, data=None, lr=3e-4, kind='topk', window=1000, **keys):
    "SAELens' trainer with its defaults, or None where it is not installed; `data` yields batches."
    if not find_spec('sae_lens'): return None
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.training.sae_trainer import SAETrainer
    cls, config = {'topk': (TopKTrainingSAE, TopKTrainingSAEConfig),
                   'batchtopk': (BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig)}[kind]
    sae = cls(config(d_in=d_in, d_sae=d_sae, k=k, dtype='float32', device='cpu', **keys))
    steps = samples//batch
    cfg = SAETrainerConfig(total_training_samples=samples, train_batch_size_samples=batch, lr=lr, lr_end=lr/10,
                           lr_decay_steps=steps//5, dead_feature_window=window, n_batches_for_norm_estimate=20)
    return SAETrainer(cfg, sae, data or iter(()))


def speed(o):
    "One step at d_in 1536, 8 times as many latents, 4,096 rows, float32."
    rows = []
    for d_in, batch in ((64, 256),) if o.quick else ((512, 512), (1536, 4096)):
        d_sae, k = 8*d_in, 32
        x = planted(d_in, d_sae, k, batch, noise=.1).x
        ours = Trainer(SAEConfig(d_in, d_sae, k, 'blocks.0.resid_post'), x, 1000)
        sparse = Trainer(SAEConfig(d_in, d_sae, k, 'blocks.0.resid_post', activation='batchtopk'), x, 1000)
        calls = {'ours': partial(ours.step, x), 'batchtopk': partial(sparse.step, x),
                 'bare': partial(Bare(d_in, d_sae, k).step, x)}
        if theirs := lens(d_in, d_sae, k, 10**9, batch):
            calls['lens'] = partial(theirs.step, x)
            calls['lens_batchtopk'] = partial(lens(d_in, d_sae, k, 10**9, batch, kind='batchtopk').step, x)
        t = alternate(calls, o.seconds, 3)
        more = {f'{name}_ms': t[name]*1e3 for name in calls if name.startswith('lens')}
        ratios = dict(x_lens=t['lens']/t['ours'], x_lens_batch=t['lens_batchtopk']/t['batchtopk']) if theirs else {}
        rows.append(dict(d_in=d_in, d_sae=d_sae, batch=batch, ours_ms=t['ours']*1e3, batchtopk_ms=t['batchtopk']*1e3,
                         bare_ms=t['bare']*1e3, x_bare=t['bare']/t['ours']) | more | ratios)
        print('.', end='', flush=True)
    table(rows, o, 'one step of training')


def collect(o):
    "Activations collected from a stream, against transformers' forward pass over the same rows."
    model = load_model('mock://mamba2-tiny' if o.quick else 'tiny://mamba2')
    tokens = 2048 if o.quick else 32_768
    ids = token_rows(model, shipped_text(), 256, tokens).long()
    sites = [f'blocks.{i}.ssm.out_proj_in' for i in range(model.n_layers)]
    def bare():
        with torch.no_grad():
            for part in ids.split(16): model.hf(part, use_cache=False)
    def ours(sites): return sum(len(next(iter(b.values()))) for b in stream(model, sites, ids).batches(1024))

    calls = {'bare': bare, 'one': partial(ours, sites[-1:]), 'all': partial(ours, sites)}
    t = alternate(calls, o.seconds, 3)
    table([dict(tokens=ids.numel(), bare_per_s=ids.numel()/t['bare'], last_block_per_s=ids.numel()/t['one'],
                x=t['bare']/t['one'], all_blocks_per_s=ids.numel()/t['all'], x_all=t['bare']/t['all'])], o,
          'collecting activations')


def score(sae, x):
    "Variance explained, L0 and share of latents that never fire, of any coder with encode and decode."
    with torch.no_grad():
        z = torch.cat([sae.encode(part) for part in x.split(2048)])
        y = torch.cat([sae.decode(part) for part in z.split(2048)])
    err = (x - y.reshape(x.shape)).double().square().sum()/(x - x.mean(0)).double().square().sum()
    return dict(fvu=float(err), l0=float((z > 0).sum(1).float().mean()), dead=float((z.sum(0) == 0).float().mean()))


def batches(x, batch, seed):
    "Rows in a shuffled order, again and again."
    make = torch.Generator().manual_seed(seed)
    while True: yield from x[torch.randperm(len(x), generator=make)].split(batch)[:len(x)//batch]


def quality(o):
    """Both trained on the same stored activations of tiny://mamba2, three seeds; SAELens also at larger learning rates.

    Below them what needs no training, with as many numbers a token: principal components, a random dictionary, neurons.
    """
    model, tokens = load_model('mock://mamba2-tiny' if o.quick else 'tiny://mamba2'), 8192 if o.quick else 200_000
    site = 'blocks.1.ssm.out_proj_in' if o.quick else SITE
    take = lambda split, n: torch.cat([activations(model, site, part).flatten(0, 1) for part in
                                       token_rows(model, shipped_text(split), 256, n).long().split(16)])
    with torch.no_grad(): x, held = take('train', tokens), take('held', 32_768 if not o.quick else 2048)
    d_in, k, batch = x.shape[1], 32, 512
    d_sae, steps, rows = 8*d_in, len(x)//batch, []
    def ours(seed, **keys):
        t = Trainer(SAEConfig(d_in, d_sae, k, site, activation=keys.pop('activation', 'topk')), x[:4096], steps,
                    seed=seed, dead_after=max(len(x)//10, 10*batch), **keys)
        for b, _ in zip(batches(x, batch, seed), range(steps)): t.step(b)
        return t.sae(x[:8192])
    def theirs(seed, lr, kind='topk'):
        torch.manual_seed(seed)
        t = lens(d_in, d_sae, k, len(x), batch, batches(x, batch, seed), lr, kind, window=max(len(x)//10//batch, 10),
                 normalize_activations='expected_average_only_in')
        t.fit()
        return t.sae
    made = {'ours topk': ours, 'ours topk, resampled': partial(ours, resample=True),
            'ours batchtopk': partial(ours, activation='batchtopk')}
    if find_spec('sae_lens'):
        made |= {f'sae-lens topk, lr {lr:g}': partial(theirs, lr=lr) for lr in (3e-4, 1e-3, 3e-3)}
        made |= {'sae-lens batchtopk, lr 0.001': partial(theirs, lr=1e-3, kind='batchtopk')}
    plain = [baselines(model, ours(0), tokens=16_384, seed=seed) for seed in range(1 if o.quick else 3)]
    made |= {name: lambda seed, name=name: plain[seed][name] for name in plain[0]}
    for name, make in made.items():
        start = time.perf_counter()
        got = [score(make(seed), held) for seed in range(1 if o.quick else 3)]
        fvu = sorted(g['fvu'] for g in got)
        rows.append(dict(coder=name, fvu=statistics.median(fvu), least=fvu[0], most=fvu[-1],
                         l0=statistics.median(g['l0'] for g in got), dead=statistics.median(g['dead'] for g in got),
                         seconds=(time.perf_counter() - start)/len(got)))
        print('.', end='', flush=True)
    table(rows, o, f'{len(x)} tokens of {site}, {d_sae} latents, k {k}; measured on {len(held)} held-out tokens')


def recovered(o):
    "A dictionary that is known: 256 directions in 64 dimensions, 4 of them a row."
    p, k, batch = planted(64, 256, 4, 20_000 if o.quick else 200_000, noise=.05), 4, 1024
    steps, rows = len(p.x)//batch*(1 if o.quick else 3), []
    for d_sae in (256, 512):
        def ours(activation, d_sae=d_sae, resample=False):
            t = Trainer(SAEConfig(64, d_sae, k, 'blocks.0.resid_post', activation=activation), p.x[:4096], steps,
                        dead_after=20*batch, resample=resample)
            for b, _ in zip(batches(p.x, batch, 0), range(steps)): t.step(b)
            return t.sae(p.x[:8192])
        def theirs(lr, d_sae=d_sae):
            t = lens(64, d_sae, k, steps*batch, batch, batches(p.x, batch, 0), lr, window=20)
            t.fit()
            return t.sae
        made = {f'ours {a}{", resampled"*r}': partial(ours, a, resample=r and 50*batch)
                for a in ('topk', 'batchtopk') for r in (False, True)}
        if find_spec('sae_lens'): made |= {f'sae-lens topk, lr {lr:g}': partial(theirs, lr) for lr in (3e-4, 3e-3)}
        for name, make in made.items():
            sae = make()
            with torch.no_grad(): mcc = recovery(F.normalize(sae.W_dec.detach(), dim=1), p.directions).mcc
            rows.append(dict(coder=name, d_sae=d_sae, mcc=mcc) | score(sae, p.x[:20_000]))
            print('.', end='', flush=True)
    table(rows, o, 'planted dictionary of 256 directions in 64 dimensions')


if __name__ == '__main__':
    o = options(__doc__.splitlines()[0], only='speed,collect,quality,planted')
    for name, part in {'speed': speed, 'collect': collect, 'quality': quality, 'planted': recovered}.items():
        if name in o.only: part(o)
