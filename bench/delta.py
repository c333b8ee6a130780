"""The chunked delta rules against the plain loop and transformers' CPU path, forward and backward.

RWKV-7 has no counterpart in transformers; Kimi's there keeps a tensor of all pairs of steps by channel.

    python bench/delta.py [--quick] [--json OUT]
"""
import torch
import torch.nn.functional as F
from timing import alternate, options, table
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from circuitbench.delta import delta_chunk, delta_loop


def inputs(kind, length, heads, size):
    "Arguments of the recurrence, and of transformers' function."
    r = lambda *s: torch.randn(1, length, heads, *s)
    v, q, k = r(size), F.normalize(r(size), dim=-1), F.normalize(r(size), dim=-1)
    if kind == 'rwkv7':
        log_w, rate = -.6065*torch.sigmoid(r(size)*3 - 2), torch.sigmoid(r(size))
        return dict(v=v, k=r(size)*.3, r=r(size), log_w=log_w, kappa=k, erase=rate*k, decayed=False), None
    beta, g = torch.sigmoid(r()), -F.softplus(r(size) if kind.startswith('kimi') else r())
    if kind == 'kimi steep': g = 10*g
    ours = dict(v=beta[..., None]*v, k=k, r=q/size**.5, log_w=g, kappa=k, erase=beta, decayed=True)
    return ours, dict(query=q, key=k, value=v, g=g, beta=beta)


def measured(f, args, backward):
    "A call that runs f alone, or with the gradients of all inputs."
    leaves = [t for t in args.values() if isinstance(t, torch.Tensor)]
    def forward():
        with torch.no_grad(): return f(**args)[0]
    def both():
        for t in leaves: t.requires_grad_()
        torch.autograd.grad(f(**args)[0].sum(), leaves)
        for t in leaves: t.requires_grad_(False)
    return both if backward else forward


def rules(o):
    rows = []
    shapes = [('rwkv7', 12, 64), ('rwkv7', 32, 64), ('gated', 12, 64), ('gated', 32, 64), ('gated', 32, 128),
              ('kimi', 12, 64), ('kimi steep', 12, 64)]
    for kind, heads, size in shapes[:1] + shapes[2:3] if o.quick else shapes:
        for length in (64, 256) if o.quick else (64, 256, 1024):
            ours, theirs = inputs(kind, length, heads, size)
            other = qwen.torch_chunk_gated_delta_rule if kind == 'gated' else kimi.chunk_kimi_delta_attention
            forms = {'ours': (delta_chunk, ours), 'loop': (delta_loop, ours)}
            if theirs: forms['transformers'] = (other, theirs)
            off = float((delta_chunk(**ours)[0] - delta_loop(**ours)[0]).abs().max())
            for backward in (False, True):
                # the graph of a long loop, or of all pairs by channel, takes gigabytes
                heavy = {'loop'} | ({'transformers'} if kind != 'gated' else set())
                left_out = heavy if backward and length > 256 else set()
                t = alternate({k: measured(*f, backward) for k, f in forms.items() if k not in left_out}, o.seconds, 3)
                row = dict(rule=f'{kind} {heads}x{size}x{size}', length=length,
                           what='fwd+bwd' if backward else 'forward', ours_ms=t['ours']*1e3)
                for k in ('transformers', 'loop'): row[f'{k}_ms'] = t[k]*1e3 if k in t else '-'
                for k in ('transformers', 'loop'): row[f'x_{k}'] = t[k]/t['ours'] if k in t else '-'
                rows.append(row | dict(off=off))
                print('.', end='', flush=True)
    table(rows, o, 'delta rules')


if __name__ == '__main__': rules(options(__doc__.splitlines()[0]))
