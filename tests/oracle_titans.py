"""The memory of Titans in float64 numpy: one token after the other, its gradient written out entry by entry."""
import numpy as np


def silu(z): return z/(1 + np.exp(-z))
def slope(z): return 1/(1 + np.exp(-z)) + z*np.exp(-z)/(1 + np.exp(-z))**2


def recall(W, q, deep):
    "What weights W (row, d_state) give for a key."
    if not deep: return W @ q
    units = len(W)//2
    return q + sum(silu(W[j] @ q)*W[units + j] for j in range(units))


def gradient(W, k, v, deep):
    "d |M(k) - v|^2 / dW."
    error, out = recall(W, k, deep) - v, np.zeros_like(W)
    if not deep: return 2*np.outer(error, k)
    units = len(W)//2
    for j in range(units):
        z = W[j] @ k
        out[units + j] = 2*silu(z)*error
        out[j] = 2*slope(z)*(error @ W[units + j])*k
    return out


def memory(v, k, q, decay, theta, eta, W, deep, chunk, S=None, clip=None):
    """Every site of one row of a batch: v, k, q (pos, head, size), gates (pos, head), W (head, row, d_state).

    A dictionary of surprise, momentum, state (pos, head, row, d_state) and y (pos, head, d_head).
    """
    W, S = W.copy(), np.zeros_like(W) if S is None else S.copy()
    out = dict(surprise=[], momentum=[], state=[], y=[])
    for t in range(len(v)):
        if t % chunk == 0: anchor = W.copy()
        G = np.stack([gradient(anchor[h], k[t, h], v[t, h], deep) for h in range(len(W))])
        if clip is not None: G = G*np.array([min(1., clip/np.linalg.norm(g)) for g in G])[:, None, None]
        S = eta[t, :, None, None]*S - theta[t, :, None, None]*G
        W = decay[t, :, None, None]*W + S
        read = np.stack([recall(W[h], q[t, h], deep) for h in range(len(W))])
        for name, x in zip(out, (G, S, W, read)): out[name].append(x.copy())
    return {name: np.stack(x) for name, x in out.items()}


def attention(mixer, s, W, config):
    "What one row's attention gives by its own pattern: values of persistent tokens, of what is retrieved, of tokens."
    d, heads = config.hidden_size, config.num_attention_heads
    number = lambda p: p.detach().double().numpy()
    to_v = number(mixer.qkv_proj.weight)[2*d:]
    always = [] if mixer.persistent is None else list(number(mixer.persistent) @ to_v.T)
    rows = [v.reshape(-1) for v in s['attn.v']]
    if config.form == 'mac':
        asked, scale = s['mixer_in'] @ number(mixer.lookup.weight).T, number(mixer.lookup_norm.weight)
        pairs = []
        for t, row in enumerate(rows):
            begin = t - t % config.window
            then, h = W if begin == 0 else s['ssm.state'][begin - 1], []
            for i, q in enumerate(asked[t].reshape(config.memory_heads, -1)):
                x = recall(then[i], q/np.linalg.norm(q), config.memory_depth == 2)
                h.append(x/np.sqrt((x*x).mean() + config.rms_norm_eps)*scale)
            pairs += [to_v @ np.concatenate(h), row]
        rows = pairs
    v = np.stack(always + rows).reshape(-1, heads, d//heads)
    return np.einsum('qhk,khd->qhd', s['attn.pattern'], v)


def fits(model, i, sites, close):
    "Compares the sites (batch first, numpy) of block i with the equations."
    mixer, c = model.blocks[i].mixer, model.config
    W = mixer.memory.detach().double().numpy()
    for b in range(len(sites['ssm.x'])):
        s = {n: v[b] for n, v in sites.items()}
        want = memory(*(s[f'ssm.{n}'] for n in 'x B C decay dt eta'.split()), W, c.memory_depth == 2, c.memory_chunk,
                      clip=c.max_surprise)
        for name, x in want.items(): close(s[f'ssm.{name}'], x, name)
        close(s['ssm.write'], s['ssm.momentum'], 'the momentum is written')
        close(s['attn.z'], attention(mixer, s, W, c), 'z = pattern v')
        q, k, v = (x.reshape(s['ssm.B'].shape) for x in np.split(s['ssm.conv'], 3, -1))
        unit = lambda x: x/np.linalg.norm(x, axis=-1, keepdims=True)
        for name, x in (('ssm.C', unit(q)), ('ssm.B', unit(k)), ('ssm.x', v)): close(s[name], x, name)
        close(s['attn.out'], s['attn.z'].reshape(len(k), -1) @ mixer.attn_proj.weight.detach().double().numpy().T, 'attn.out')
        norm = lambda x, m: x/np.sqrt((x*x).mean(-1, keepdims=True) + c.rms_norm_eps)*m.weight.detach().double().numpy()
        gate = silu(norm(s['ssm.y'], mixer.memory_norm)).reshape(len(k), -1)
        close(s['ssm.out_proj_in'], norm(s['attn.out'], mixer.attn_norm)*gate, 'the memory gates the attention')
