"""Hymba in float64 numpy: one prompt, loops over rows, heads and channels, straight from the equations.

Shares no code with the package; reads a state dict. h hidden, H query heads, K key-value heads, d and dv their widths, E channels,
N state columns, R step-size rank, M meta tokens, W window.
"""
import numpy as np


def silu(x): return x/(1 + np.exp(-x))
def softplus(x): return np.log1p(np.exp(-abs(x))) + np.maximum(x, 0)


def weights(hf): return {k: v.detach().double().cpu().numpy() for k, v in hf.state_dict().items()}


def norm(x, g, eps): return np.array([g*row/np.sqrt(np.mean(row*row) + eps) for row in x])


def turn(vector, position, c):
    "A head's vector with its pairs (j, j + d/2) turned."
    d, out = len(vector), vector.copy()
    if not c.rope: return out
    base = c.rope_theta
    if c.rope_type == 'ntk':
        f = 2
        base = base*(f*c.max_position_embeddings/c.orig_max_position_embeddings - (f - 1))**(d/(d - 2))
    for j in range(d//2):
        angle = position*base**(-2*j/d)
        a, b = vector[j], vector[j + d//2]
        out[j], out[j + d//2] = a*np.cos(angle) - b*np.sin(angle), b*np.cos(angle) + a*np.sin(angle)
    return out


def producer(c, i):
    if c.kv_reuse_group:
        for group in c.kv_reuse_group:
            if i in group and i != group[0]: return group[0]
        return i
    every = c.kv_reuse_every_i_layer
    return i - i % every if every > 0 else i


def attend(c, q, k, v, window, prefill):
    "q (L, H, d), k (L, K, d), v (L, K, dv): (L, H dv); a row after `prefill` text tokens sees one token less."
    L, H, d = q.shape
    M, out = c.num_memory_tokens, np.zeros((L, H, v.shape[2]))
    for p in range(L):
        reach = window if window is None or p < M + prefill else window - 1
        keys = [j for j in range(p + 1) if reach is None or p - j <= reach or j < M]
        for a in range(H):
            g = a//(H//k.shape[1])
            s = np.array([q[p, a] @ k[j, g] for j in keys])/np.sqrt(d)
            e = np.exp(s - s.max())
            out[p, a] = sum(w*v[j, g] for w, j in zip(e/e.sum(), keys))
    return out.reshape(L, -1)


def ssm(c, w, xs, z):
    "The gated read-out (L, E) of the convolution's input xs and the gate z, and the parts on the way."
    L, E = xs.shape
    width, R, N = c.mamba_d_conv, c.mamba_dt_rank, c.mamba_d_state
    kernel, bias, eps = w['conv1d.weight'][:, 0], w.get('conv1d.bias', np.zeros(E)), c.rms_norm_eps
    xc = np.zeros((L, E))
    for t in range(L):
        for i in range(width):
            if t - (width - 1) + i >= 0: xc[t] += kernel[:, i]*xs[t - (width - 1) + i]
    xc = silu(xc + bias)
    dbc = xc @ w['x_proj.0.weight'].T
    dt, B, C = dbc[:, :R], dbc[:, R:R + N], dbc[:, R + N:]
    if c.mamba_inner_layernorms:
        dt, B, C = (norm(v, w[f'{n}_layernorm.weight'], eps) for v, n in ((dt, 'dt'), (B, 'B'), (C, 'C')))
    dt = softplus(dt @ w['dt_proj.0.weight'].T + w['dt_proj.0.bias'])
    A, S, y = -np.exp(w['A_log.0']), np.zeros((E, N)), np.zeros((L, E))
    states = []
    for t in range(L):
        for m in range(N): S[:, m] = np.exp(dt[t]*A[:, m])*S[:, m] + dt[t]*B[t, m]*xc[t]
        y[t] = sum(C[t, m]*S[:, m] for m in range(N)) + w['D.0']*xc[t]
        states.append(S.copy())
    return y*silu(z), dict(xc=xc, dt=dt, B=B, C=C, A=A, y=y, states=np.array(states))


def run(hf, ids, prefill=None, parts=None):
    """Logits (n, V) of one prompt; the rows after the first `prefill` tokens see one token less of the window, if given.

    A dict `parts` is filled with (layer, name) -> value.
    """
    w, c = weights(hf), hf.config
    n = len(ids)
    M, h, H, K, prefill = c.num_memory_tokens, c.hidden_size, c.num_attention_heads, c.num_key_value_heads, n if prefill is None else prefill
    E = c.mamba_expand*h
    d, dv, L, kv = h//H, E//H, M + n, {}
    x = np.concatenate([w['model.memory_tokens'] if M else np.zeros((0, h)), w['model.embed_tokens.weight'][np.asarray(ids)]])
    for i in range(c.num_hidden_layers):
        prefix = f'model.layers.{i}.'
        lw = {k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)}
        mw = {k.removeprefix('mamba.'): v for k, v in lw.items() if k.startswith('mamba.')}
        u = norm(x, lw['input_layernorm.weight'], c.rms_norm_eps)
        p = u @ mw['in_proj.weight'].T + mw.get('in_proj.bias', 0)
        owns, at = producer(c, i) == i, h
        q = p[:, :h].reshape(L, H, d)
        if owns:
            k, at = p[:, at:at + K*d].reshape(L, K, d), at + K*d
            v, at = p[:, at:at + K*dv].reshape(L, K, dv), at + K*dv
            kv[i] = np.array([[turn(k[t, g], t, c) for g in range(K)] for t in range(L)]), v
        xs, z = p[:, at:at + E], p[:, at + E:at + 2*E]
        assert at + 2*E == p.shape[1]
        q = np.array([[turn(q[t, a], t, c) for a in range(H)] for t in range(L)])
        everywhere = c.sliding_window is None or i in (c.global_attn_idx or [])
        o = attend(c, q, *kv[producer(c, i)], None if everywhere else c.sliding_window, prefill)
        y, inner = ssm(c, mw, xs, z)
        one, two = norm(o, mw['pre_avg_layernorm1.weight'], c.rms_norm_eps), norm(y, mw['pre_avg_layernorm2.weight'], c.rms_norm_eps)
        x = x + ((one + two)/2) @ mw['out_proj.weight'].T + mw.get('out_proj.bias', 0)
        if parts is not None: parts.update({(i, name): value for name, value in dict(inner, p=p, o=o, gated=y, mid=x).items()})
        f = norm(x, lw['pre_moe_layernorm.weight'], c.rms_norm_eps)
        up = f @ lw['moe.experts.0.up_proj.weight'].T
        act = np.maximum(up, 0)**2 if c.mlp_hidden_act == 'relu2' else silu(f @ lw['moe.experts.0.gate_proj.weight'].T)*up
        x = x + act @ lw['moe.experts.0.down_proj.weight'].T
    head = w.get('lm_head.weight', w['model.embed_tokens.weight'])
    return norm(x, w['model.final_layernorm.weight'], c.rms_norm_eps)[M:] @ head.T
