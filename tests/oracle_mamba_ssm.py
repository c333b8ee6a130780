"""mamba_ssm's models in float64 numpy, from its own config.json and tensor names: one pass over whole prompts, no cache.

Written from the equations in its sources (`MixerModel`, `Mamba`, `Mamba2`, `MHA`); shares no code with the package.
Also writes random checkpoints: every tensor's name and shape as those modules make them.
"""
import math

import numpy as np
import torch
from oracle import convolve, rms, scan, silu, softplus

MAMBA1 = dict(d_state=16, d_conv=4, expand=2, dt_rank='auto', conv_bias=True, bias=False)
MAMBA2 = dict(d_state=128, d_conv=4, expand=2, headdim=64, ngroups=1, conv_bias=True, bias=False, dt_limit=(0., math.inf))
MHA = dict(num_heads_kv=None, head_dim=None, qkv_proj_bias=True, out_proj_bias=True, softmax_scale=None, d_conv=0, rotary_emb_dim=0,
           rotary_emb_base=10000., rotary_emb_interleaved=False)


def kinds(config):
    "For each block its kind and the settings of its mixer."
    ssm = dict(config.get('ssm_cfg') or {})
    kind = ssm.pop('layer', 'Mamba1')
    attn = MHA | (config.get('attn_cfg') or {})
    attention = config.get('attn_layer_idx') or []
    return [('MHA', attn) if i in attention else (kind, {'Mamba1': MAMBA1, 'Mamba2': MAMBA2}[kind] | ssm) for i in range(config['n_layer'])]


def vocabulary(config):
    n, m = config['vocab_size'], config.get('pad_vocab_size_multiple', 8)
    return n if n % m == 0 else n + m - n % m


# -- the checkpoint ----------------------------------------------------------------------
def shapes(config):
    "Every tensor's shape by its name in pytorch_model.bin."
    D, out = config['d_model'], {}
    def linear(name, n_out, n_in, bias):
        out[f'{name}.weight'] = n_out, n_in
        if bias: out[f'{name}.bias'] = n_out,
    def conv(name, n, width, bias):
        out[f'{name}.weight'] = n, 1, width
        if bias: out[f'{name}.bias'] = n,
    out['backbone.embedding.weight'] = vocabulary(config), D
    for i, (kind, s) in enumerate(kinds(config)):
        m = f'backbone.layers.{i}.mixer'
        out[f'backbone.layers.{i}.norm.weight'] = D,
        if kind == 'MHA':
            q = s['num_heads']
            kv, d = s['num_heads_kv'] or q, s['head_dim'] or D//q
            linear(f'{m}.in_proj', d*(q + 2*kv), D, s['qkv_proj_bias'])
            if s['d_conv']: conv(f'{m}.conv1d', d*(q + 2*kv), s['d_conv'], True)
            linear(f'{m}.out_proj', D, d*q, s['out_proj_bias'])
            continue
        E, N = s['expand']*D, s['d_state']
        if kind == 'Mamba1':
            R = math.ceil(D/16) if s['dt_rank'] == 'auto' else s['dt_rank']
            out |= {f'{m}.A_log': (E, N), f'{m}.D': (E,)}
            linear(f'{m}.in_proj', 2*E, D, s['bias'])
            conv(f'{m}.conv1d', E, s['d_conv'], s['conv_bias'])
            linear(f'{m}.x_proj', R + 2*N, E, False)
            linear(f'{m}.dt_proj', E, R, True)
        else:
            H, G = E//s['headdim'], s['ngroups']
            out |= {f'{m}.dt_bias': (H,), f'{m}.A_log': (H,), f'{m}.D': (H,)}
            linear(f'{m}.in_proj', 2*E + 2*G*N + H, D, s['bias'])
            conv(f'{m}.conv1d', E + 2*G*N, s['d_conv'], s['conv_bias'])
            out[f'{m}.norm.weight'] = E,
        linear(f'{m}.out_proj', D, E, s['bias'])
    out['backbone.norm_f.weight'] = D,
    out['lm_head.weight'] = vocabulary(config), D
    return out


def checkpoint(config, seed=0, dtype=torch.float32):
    "A random state dict; tied weights share their memory, as they do in mamba_ssm's own."
    rand, out = torch.Generator().manual_seed(seed), {}
    for name, shape in shapes(config).items():
        r = torch.randn(shape, generator=rand, dtype=torch.float64)
        if name.endswith('norm.weight') or name.endswith('norm_f.weight'): r = 1 + .3*r
        elif name.endswith('A_log'): r = .5 + .5*r
        elif name.endswith(('dt_bias', 'dt_proj.bias')): r = r - 1
        elif name.endswith('embedding.weight') or len(shape) == 1: r = .5*r
        elif 'conv1d' in name: r = .5*r
        else: r = r*shape[-1]**-.5
        out[name] = r.to(dtype)
    if config.get('tie_embeddings', True): out['lm_head.weight'] = out['backbone.embedding.weight']
    return out


# -- the equations -----------------------------------------------------------------------
def split(x, *sizes): return np.split(x, np.cumsum(sizes)[:-1], -1)
def linear(w, name, x): return x @ w[f'{name}.weight'].T + w.get(f'{name}.bias', 0)


def mamba1(w, s, u):
    E, N = w['A_log'].shape
    x, z = split(linear(w, 'in_proj', u), E, E)
    x = silu(convolve(x, w['conv1d.weight'][:, 0], w.get('conv1d.bias')))
    R = w['dt_proj.weight'].shape[1]
    dt, B, C = split(x @ w['x_proj.weight'].T, R, N, N)
    dt = softplus(linear(w, 'dt_proj', dt))
    B, C = (np.repeat(v[:, :, None], E, 2) for v in (B, C))
    y, *_ = scan(x[..., None], dt, -np.exp(w['A_log']), B, C, w['D'], every=False)
    return linear(w, 'out_proj', y[..., 0]*silu(z))


def mamba2(w, s, u):
    (b, l, D), H, G, N = u.shape, len(w['A_log']), s['ngroups'], s['d_state']
    E = s['expand']*D
    z, xBC, dt = split(linear(w, 'in_proj', u), E, E + 2*G*N, H)
    x, B, C = split(silu(convolve(xBC, w['conv1d.weight'][:, 0], w.get('conv1d.bias'))), E, G*N, G*N)
    dt = np.clip(softplus(dt + w['dt_bias']), *s['dt_limit'])
    B, C = (np.repeat(v.reshape(b, l, G, N), H//G, 2) for v in (B, C))
    y, *_ = scan(x.reshape(b, l, H, s['headdim']), dt, -np.exp(w['A_log']), B, C, w['D'], every=False)
    gated = (y.reshape(b, l, E)*silu(z)).reshape(b, l, G, E//G)
    return linear(w, 'out_proj', rms(gated, w['norm.weight'].reshape(G, -1), 1e-5).reshape(b, l, E))


def turned(x, position, s):
    "One head's vectors (b, d), the first entries turned pair by pair."
    r, out = s['rotary_emb_dim'], x.copy()
    for j in range(r//2):
        first, second = (2*j, 2*j + 1) if s['rotary_emb_interleaved'] else (j, j + r//2)
        angle = position/s['rotary_emb_base']**(2*j/r)
        out[:, first] = x[:, first]*np.cos(angle) - x[:, second]*np.sin(angle)
        out[:, second] = x[:, first]*np.sin(angle) + x[:, second]*np.cos(angle)
    return out


def mha(w, s, u):
    (b, l, D), Q = u.shape, s['num_heads']
    K, d = s['num_heads_kv'] or Q, s['head_dim'] or D//Q
    qkv = linear(w, 'in_proj', u)
    if s['d_conv']: qkv = convolve(qkv, w['conv1d.weight'][:, 0], w['conv1d.bias'])
    q, k, v = (x.reshape(b, l, -1, d) for x in split(qkv, Q*d, K*d, K*d))
    scale, mixed = s['softmax_scale'] or 1/math.sqrt(d), np.zeros((b, l, Q, d))
    for h in range(Q):
        g = h//(Q//K)
        keys = [turned(k[:, t, g], t, s) for t in range(l)]
        for t in range(l):
            query = turned(q[:, t, h], t, s)
            score = np.stack([(query*keys[j]).sum(-1)*scale for j in range(t + 1)], -1)
            e = np.exp(score - score.max(-1, keepdims=True))
            mixed[:, t, h] = np.einsum('bj,bjd->bd', e/e.sum(-1, keepdims=True), v[:, :t + 1, g])
    return linear(w, 'out_proj', mixed.reshape(b, l, Q*d))


def run(config, tensors, ids):
    "Logits (b, l, V) of ids (b, l)."
    w = {k: v.detach().double().numpy() for k, v in tensors.items()}
    r = w['backbone.embedding.weight'][np.asarray(ids)]
    for i, (kind, s) in enumerate(kinds(config)):
        prefix = f'backbone.layers.{i}.'
        lw = {k.removeprefix(f'{prefix}mixer.'): v for k, v in w.items() if k.startswith(f'{prefix}mixer.')}
        r = r + {'Mamba1': mamba1, 'Mamba2': mamba2, 'MHA': mha}[kind](lw, s, rms(r, w[f'{prefix}norm.weight'], 1e-5))
    return rms(r, w['backbone.norm_f.weight'], 1e-5) @ w['lm_head.weight'].T
