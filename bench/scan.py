"""Our chunked scans against transformers' CPU path and the plain loop, and a whole forward against the matmul peak.

Scans run forward and backward; the whole forward is four layers of d_model 768.

    python bench/scan.py [--quick] [--json OUT]
"""
import torch
import torch.nn.functional as F
from timing import alternate, options, table
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from circuitbench.hook import HookedModel
from circuitbench.models import mamba2  # noqa: F401, registers the family
from circuitbench.scan import scan_loop, selective_chunk, ssd_chunk

SHAPES = {'mamba2 24x64x128': (24, 64, 128), 'mamba1 1536x16': (1536, 1, 16), 'hymba 3200x16': (3200, 1, 16)}


def inputs(length, h, p, n):
    "A scan's inputs laid out as in transformers: Mamba-1 has the channels of x and dt before the positions."
    mamba1 = p == 1
    A = -torch.arange(1., n + 1).expand(h, n).contiguous() if mamba1 else -torch.arange(1., h + 1)
    rows = lambda *size: torch.randn(1, *size, length).movedim(-1, 1) if mamba1 else torch.randn(1, length, *size)
    return dict(x=rows(h, p), dt=F.softplus(rows(h) - 3), A=A,
                B=torch.randn(1, length, 1, n)*.3, C=torch.randn(1, length, 1, n)*.3, D=torch.ones(h))


def theirs(v, mamba1):
    if not mamba1: return modeling_mamba2.mamba2_chunk_scan(v['x'], v['dt'], v['A'], v['B'], v['C'], 256, D=v['D'])
    x, dt, B, C = v['x'][..., 0], v['dt'], v['B'][:, :, 0], v['C'][:, :, 0]
    x, dt, B, C = (t.transpose(1, 2) for t in (x, dt, B, C))
    return modeling_mamba.mamba_selective_scan(x, dt, v['A'], B, C, D=v['D']).transpose(1, 2)[..., None]


def calls_on(v, mamba1):
    "The three forms of the scan as calls without arguments."
    chunked = selective_chunk if mamba1 else ssd_chunk
    return {'ours': lambda: chunked(**v)[0], 'transformers': lambda: theirs(v, mamba1),
            'loop': lambda: scan_loop(**v)[0]}


def measured(f, v, backward):
    "A call that runs f alone, or with the gradients of all inputs."
    def forward():
        with torch.no_grad(): return f()
    def both():
        for t in v.values(): t.requires_grad_()
        torch.autograd.grad(f().sum(), list(v.values()))
        for t in v.values(): t.requires_grad_(False)
    return both if backward else forward


def scans(o):
    rows = []
    for name, shape in SHAPES.items():
        mamba1 = shape[1] == 1
        for length in (64, 256) if o.quick else (64, 256, 1024, 4096):
            v = inputs(length, *shape)
            calls = calls_on(v, mamba1)
            off = float((calls['ours']() - calls['transformers']()).abs().max())
            for backward in (False, True):
                # the graph of a loop takes minutes and gigabytes, and transformers' Mamba-1 is one
                slow = ('loop', 'transformers') if mamba1 else ('loop',)
                left_out = slow if backward and length > 256 else ()
                run = {k: measured(f, v, backward) for k, f in calls.items() if k not in left_out}
                t = alternate(run, o.seconds, 3)
                row = dict(scan=name, length=length,
                           what='fwd+bwd' if backward else 'forward', ours_ms=t['ours']*1e3)
                for k in ('transformers', 'loop'): row[f'{k}_ms'] = t[k]*1e3 if k in t else '-'
                for k in ('transformers', 'loop'): row[f'x_{k}'] = t[k]/t['ours'] if k in t else '-'
                rows.append(row | dict(off=off))
                print('.', end='', flush=True)
    table(rows, o, 'scans')


def whole(o):
    layers, d, inner, n, h, q = 4, 768, 1536, 128, 24, 64
    config = Mamba2Config(vocab_size=1000, hidden_size=d, num_hidden_layers=layers, num_heads=h, head_dim=64,
                          state_size=n, n_groups=1)
    model = HookedModel(Mamba2ForCausalLM(config))
    a, b = torch.randn(2048, 2048), torch.randn(2048, 2048)
    rows = []
    for length in (64, 256) if o.quick else (64, 256, 1024, 2048):
        ids = torch.randint(0, 1000, (1, length))
        calls = {'ours': lambda ids=ids: model.run(ids), 'transformers': lambda ids=ids: model.hf(ids, use_cache=False),
                 'matmul': lambda: a @ b}
        with torch.no_grad(): t = alternate(calls, 2*o.seconds, 5)
        peak = 2*2048**3/t['matmul']
        # projections, and the four matrix products of a chunked scan: C B^T, (L * CB) x, x^T B, C S
        products = d*(2*inner + 2*n + h) + inner*d + min(q, length)*(n + inner) + 2*n*inner
        flop = layers*length*2*products + 2*length*d*1000
        rows.append(dict(
            length=length, ours_ms=t['ours']*1e3, transformers_ms=t['transformers']*1e3,
            ratio=t['transformers']/t['ours'], peak_gflops=peak/1e9,
            ours_of_peak=flop/t['ours']/peak, transformers_of_peak=flop/t['transformers']/peak))
    table(rows, o, 'whole forward, 4 layers, d_model 768')


if __name__ == '__main__':
    o = options(__doc__.splitlines()[0])
    whole(o)
    scans(o)
