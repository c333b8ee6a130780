"""Trains the sparse autoencoders that ship in circuitbench/saes, measures them as they ship, and writes their cards.

    python bench/train_saes.py [MODEL ...] [--tokens 400000] [--only resid_post,ssm.out_proj_in,state] [--out FOLDER]

For each shipped model: the residual stream and, where it has one, the gated SSM output of a middle block (BatchTopK,
saved as the JumpReLU coder that it is on new text); where the state is a matrix, the writes of all heads of that block
with atoms of rank one. bfloat16 is what ships and what is measured, on verses that no shipped model has seen.
"""
import argparse
import os
from pathlib import Path

import torch

from circuitbench.evaluate import core_metrics
from circuitbench.load import load_model
from circuitbench.state_sae import replace_writes, train_state_sae
from circuitbench.stream import shipped_text
from circuitbench.train import train_sae

os.environ['HF_HUB_OFFLINE'] = '1'
BLOCKS = {'mamba2': 3, 'mamba1': 3, 'rwkv7': 2, 'hybrid': 1, 'jamba': 2, 'transformer': 2}
VECTORS = {'resid_post': dict(k=16, expansion=4), 'ssm.out_proj_in': dict(k=32, expansion=2)}
MATRICES = 'mamba2', 'rwkv7', 'hybrid'

CARD = '''# {id}

A sparse autoencoder of `{site}` in `tiny://{model}` (circuitbench): {kind},
{d_in} -> {d_sae:,} latents, about {k} active; bfloat16, {size:.2f} MB.

```python
from circuitbench.sae import SAE
sae = SAE.load('tiny://{model}/{id}')
```

## Figures

On {held} held-out tokens, by `python bench/train_saes.py {model} --tokens {asked}`, on the weights as they ship:

```
{metrics}
```
{more}
## Training

{tokens:,} tokens of the mixture that the shipped models read (King James text, facts, indirect objects, strings that
repeat), {recipe}.

## Limits

A small dictionary of a toy model. Latents have no meaning by themselves: a name is a claim, to be tested on contexts
that were not looked at.
'''


def saved(sae, model, out, asked, recipe, more=''):
    "Rounds, measures and writes one coder; its figures."
    sae = sae.to(torch.bfloat16)
    site, name = sae.cfg.site, model.name.removeprefix('tiny://')
    metrics = core_metrics(model, sae, shipped_text('held'), tokens=16_384)
    sae.metrics = metrics.short(sae.metrics.trained, sae.metrics.seconds)
    size = sum(p.numel()*2 for p in sae.parameters())/1e6
    kind = f'{sae.cfg.activation}{", atoms of rank one, one dictionary for all heads" if sae.cfg.rank1 else ""}'
    card = CARD.format(id=site, site=site, model=name, kind=kind, d_in=sae.d_in, d_sae=sae.d_sae, k=sae.k, size=size,
                       held=f'{16_384:,}', metrics=metrics, more=more, tokens=sae.metrics.trained,
                       asked=asked, recipe=recipe)
    folder = sae.save(Path(out, name, site), card=card)
    print(folder, f'{size:.2f} MB', metrics, more, sep='\n', flush=True)


def main(names, only, tokens, out):
    for name in names:
        model, block = load_model(f'tiny://{name}'), BLOCKS[name]
        for site, sizes in VECTORS.items():
            if site not in only or f'blocks.{block}.{site}' not in model.site_names(): continue
            sae = train_sae(model, layer=block, site=site, tokens=tokens, activation='batchtopk', **sizes)
            saved(sae, model, out, tokens, 'batches of 512, Adam from 5e-3, AuxK 1/4, one seed')
        if name in MATRICES and 'state' in only:
            # each token gives a matrix of each head
            sae = train_state_sae(model, block, tokens=tokens//16, k=8, d_sae=1024)
            test = replace_writes(model, sae)
            more = f'\nA write replaced by its atom:\n\n```\n{test}\n```\n'
            saved(sae, model, out, tokens, 'batches of 256 matrices of all heads, Adam from 5e-3, AuxK 1/4', more)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument('models', nargs='*', default=list(BLOCKS), help='all of them if none is named')
    p.add_argument('--tokens', type=int, default=400_000)
    p.add_argument('--only', default='resid_post,ssm.out_proj_in,state')
    p.add_argument('--out', type=Path, default=Path(__file__).parents[1]/'circuitbench'/'saes')
    o = p.parse_args()
    if unknown := {*o.models} - {*BLOCKS}: p.error(f'got {sorted(unknown)}, expected some of {list(BLOCKS)}')
    main(o.models, o.only.split(','), o.tokens, o.out)
