"""Mamba-1 and Mamba-2 in float64 numpy, a step at a time, straight from the papers' equations: every site of a model.

Shares no code with the package; reads a transformers state dict.
Letters as in the papers: b batch, l position, h head, p d_head, n d_state.
"""
import numpy as np


def silu(x): return x/(1 + np.exp(-x))
def softplus(x): return np.logaddexp(0, x)
def rms(x, weight, eps): return x/np.sqrt((x**2).mean(-1, keepdims=True) + eps)*weight


def weights(hf):
    return {k: v.detach().double().cpu().numpy() for k, v in hf.state_dict().items()}


def convolve(x, kernel, bias):
    "Causal depthwise convolution: x (b, l, c), kernel (c, width)."
    width, out = kernel.shape[1], np.zeros_like(x)
    for lag in range(width):
        out[:, lag:] += x[:, :x.shape[1] - lag]*kernel[:, width - 1 - lag]
    return out + (0 if bias is None else bias)


def scan(x, dt, A, B, C, D, every=True):
    "x (b,l,h,p), dt (b,l,h), A (h,) or (h,n), B and C (b,l,h,n): y, all decays, and all writes and states if `every`."
    b, l, h, p = x.shape
    decay = np.exp(dt[..., None]*(A if A.ndim == 2 else A[:, None]))            # b l h n or b l h 1
    S, y, states, writes = np.zeros((b, h, p, B.shape[-1])), np.zeros_like(x), [], []
    for t in range(l):
        W = dt[:, t, :, None, None]*x[:, t, :, :, None]*B[:, t, :, None, :]
        S = decay[:, t, :, None, :]*S + W
        y[:, t] = np.einsum('bhpn,bhn->bhp', S, C[:, t]) + D[:, None]*x[:, t]
        if every:
            states.append(S)
            writes.append(W)
    return y, (decay if A.ndim == 2 else decay[..., 0]), *(np.stack(v, 1) if every else None for v in (writes, states))


def show(site, **values):
    for name, v in values.items(): site(f'ssm.{name}', v)


def mamba2_block(w, c, u, site, every):
    b, l, _ = u.shape
    inner, g, n, h = int(c.expand*c.hidden_size), c.n_groups, c.state_size, c.num_heads
    proj = site('ssm.in_proj', u @ w['in_proj.weight'].T)
    z, xBC, dt = np.split(proj, [inner, 2*inner + 2*g*n], -1)
    xBC = site('ssm.conv', silu(convolve(xBC, w['conv1d.weight'][:, 0], w.get('conv1d.bias'))))
    x, B, C = np.split(xBC, [inner, inner + g*n], -1)
    B, C = (np.repeat(v.reshape(b, l, g, n), h//g, 2) for v in (B, C))
    x, dt = x.reshape(b, l, h, -1), softplus(dt + w['dt_bias'])
    y, decay, write, state = scan(x, dt, -np.exp(w['A_log']), B, C, w['D'], every)
    gate = silu(z).reshape(x.shape)
    show(site, x=x, dt=dt, B=B, C=C, decay=decay, write=write, state=state, y=y, gate=gate)
    gated = (y*gate).reshape(b, l, g, -1)
    return rms(gated, w['norm.weight'].reshape(g, -1), c.layer_norm_epsilon).reshape(b, l, inner)


def mamba1_block(w, c, u, site, every):
    inner, n = int(c.expand*c.hidden_size), c.state_size
    x, z = np.split(site('ssm.in_proj', u @ w['in_proj.weight'].T), 2, -1)
    x = site('ssm.conv', silu(convolve(x, w['conv1d.weight'][:, 0], w.get('conv1d.bias'))))
    dt, B, C = np.split(x @ w['x_proj.weight'].T, [int(c.time_step_rank), int(c.time_step_rank) + n], -1)
    dt = softplus(dt @ w['dt_proj.weight'].T + w['dt_proj.bias'])
    B, C = (np.repeat(v[:, :, None], inner, 2) for v in (B, C))
    x, gate = x[..., None], silu(z)[..., None]
    y, decay, write, state = scan(x, dt, -np.exp(w['A_log']), B, C, w['D'], every)
    show(site, x=x, dt=dt, B=B, C=C, decay=decay, write=write, state=state, y=y, gate=gate)
    return (y*gate)[..., 0]


def run(hf, ids, every=True):
    "The logits of a Mamba-1 or Mamba-2 causal model, ids (b, l), and all sites if `every`: states of all steps are large."
    w, c, sites = weights(hf), hf.config, {}
    block = mamba2_block if c.model_type == 'mamba2' else mamba1_block
    r = sites['embed'] = w['backbone.embeddings.weight'][np.asarray(ids)]
    for i in range(c.num_hidden_layers):
        def site(name, v, i=i):
            if every: sites[f'blocks.{i}.{name}'] = v
            return v
        prefix = f'backbone.layers.{i}.mixer.'
        lw = {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}
        site('resid_pre', r)
        u = site('mixer_in', rms(r, w[f'backbone.layers.{i}.norm.weight'], c.layer_norm_epsilon))
        out = site('mixer_out', site('ssm.out_proj_in', block(lw, c, u, site, every)) @ lw['out_proj.weight'].T)
        site('ssm.out', out)
        r = site('resid_post', r + out)
    head = w.get('lm_head.weight', w['backbone.embeddings.weight'])
    sites['logits'] = rms(r, w['backbone.norm_f.weight'], c.layer_norm_epsilon) @ head.T
    return sites
