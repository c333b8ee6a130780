"""What loading a folder costs in peak memory and time, and one prompt through it.

    python bench/loading.py                 a 200 MB Mamba-2 in float32 and in bf16, and the 1.5 B Hymba in bf16
    python bench/loading.py --quick         the small ones alone

The folders are random weights in the published layout, in a temporary folder. Each is loaded in a process of its own;
peak memory is counted from the start of loading, over what the imports had taken, mapped pages included (Linux).
"""
import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from families import peak

from circuitbench.load import families, load_model


def written(family, folder, dtype, **sizes):
    "A random checkpoint in shards of 1 GB, made tensor by tensor."
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, initialization
    config, old = families()[family].small(**dict(vocab_size=32001) | sizes), torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with initialization.no_init_weights(): hf = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config)
        with torch.no_grad():
            for p in hf.parameters(): p.normal_(std=.02)
        hf.tie_weights()
        hf.save_pretrained(folder, max_shard_size='1GB')
    finally: torch.set_default_dtype(old)


def loaded(folder, dtype):
    "Loads, runs, and prints the figures as JSON."
    kept, start = [], time.perf_counter()
    took = peak(lambda: kept.append(load_model(folder, dtype=getattr(torch, dtype))))
    spent, model = time.perf_counter() - start, kept[0]
    weights = sum(p.numel()*p.element_size() for p in model.hf.parameters())/2**20
    start = time.perf_counter()
    with torch.no_grad(): ran = peak(lambda: model.run(torch.arange(1, 129)[None]))
    print(json.dumps(dict(parameters=f'{sum(p.numel() for p in model.hf.parameters()):,}', weights_MiB=weights,
                          load_peak_MiB=took, load_s=spent, run_peak_MiB=ran,
                          run_s=time.perf_counter() - start)))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--quick', action='store_true')
    ap.add_argument('--load', nargs=2, metavar=('FOLDER', 'DTYPE'))
    a = ap.parse_args()
    if a.load: return loaded(*a.load)
    wide = dict(hidden_size=1024, num_heads=32, head_dim=64, state_size=128, n_groups=1, num_hidden_layers=4)
    jobs = [('mamba2', torch.float32, 'float32', wide), ('mamba2', torch.float32, 'bfloat16', wide)]
    if not a.quick:
        from circuitbench.hymba_rows import PUBLISHED
        jobs.append(('hymba', torch.bfloat16, 'bfloat16', PUBLISHED))
    for family, stored, dtype, sizes in jobs:
        with tempfile.TemporaryDirectory() as folder:
            written(family, folder, stored, **sizes)
            size = sum(p.stat().st_size for p in Path(folder).glob('*.safetensors'))/2**20
            out = subprocess.run([sys.executable, __file__, '--load', folder, dtype], capture_output=True, text=True)
        if out.returncode: sys.exit(out.stderr)
        row = json.loads(out.stdout.splitlines()[-1])
        row['peak_beyond_weights_over_size'] = (row['load_peak_MiB'] - row['weights_MiB'])/size
        print(f'{family}, {size:.0f} MiB of {stored} read as {dtype}: ' + ', '.join(
            f'{k} {v:.3g}' if isinstance(v, float) else f'{k} {v}' for k, v in row.items()), flush=True)


if __name__ == '__main__':
    main()
