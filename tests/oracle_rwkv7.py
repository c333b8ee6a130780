"""RWKV-7 in float64 numpy, a token at a time, straight from the paper's equations, and random checkpoints in the upstream layout.

Shares no code with the package; reads the tensors of an original `.pth`.
"""
import numpy as np
import torch


def archive(layers=3, width=128, head=64, ffn=320, vocab=97, ranks=(8, 6, 5, 12), first_v=True, dtype=torch.float32, seed=0):
    "A random checkpoint as the training code writes it: every tensor random, also those that training starts at zero."
    g = torch.Generator().manual_seed(seed)
    normal = lambda *s, scale=1., mean=0.: mean + scale*torch.randn(*s, generator=g)
    uniform = lambda *s, low=0., high=1.: low + (high - low)*torch.rand(*s, generator=g)
    matrix = lambda out, into: normal(out, into, scale=into**-.5)
    w = {'emb.weight': normal(vocab, width)}
    for i in range(layers):
        b = f'blocks.{i}.'
        for n in ('ln0', 'ln1', 'ln2') if i == 0 else ('ln1', 'ln2'):
            w[f'{b}{n}.weight'], w[f'{b}{n}.bias'] = normal(width, scale=.2, mean=1.), normal(width, scale=.2)
        for c in 'rwkvag': w[f'{b}att.x_{c}'] = uniform(1, 1, width)
        for c, rank in zip('wavg', ranks):
            if c == 'v' and i == 0 and not first_v: continue
            if c != 'g': w[f'{b}att.{c}0'] = uniform(1, 1, width, low=-5., high=3.) if c == 'w' else normal(1, 1, width)
            w[f'{b}att.{c}1'], w[f'{b}att.{c}2'] = normal(width, rank, scale=width**-.5), normal(rank, width, scale=rank**-.5)
        w[f'{b}att.k_k'], w[f'{b}att.k_a'] = normal(1, 1, width, scale=.3, mean=.8), normal(1, 1, width, scale=.3, mean=.9)
        w[f'{b}att.r_k'] = normal(width//head, head, scale=head**-.5)
        for n in ('receptance', 'key', 'value', 'output'): w[f'{b}att.{n}.weight'] = matrix(width, width)
        w[f'{b}att.ln_x.weight'], w[f'{b}att.ln_x.bias'] = normal(width, scale=.2, mean=1.), normal(width, scale=.2)
        w[f'{b}ffn.x_k'] = uniform(1, 1, width)
        w[f'{b}ffn.key.weight'], w[f'{b}ffn.value.weight'] = matrix(ffn, width), matrix(width, ffn)
    w['ln_out.weight'], w['ln_out.bias'] = normal(width, scale=.2, mean=1.), normal(width, scale=.2)
    w['head.weight'] = matrix(vocab, width)
    return {n: t.to(dtype) for n, t in w.items()}


HUB = {'emb': 'model.embeddings', 'head': 'lm_head', 'ln_out': 'model.norm', 'ln0': 'pre_norm', 'ln1': 'attn_norm', 'ln2': 'ffn_norm',
       'att.ln_x': 'attn.g_norm', 'att.receptance': 'attn.r_proj', 'att.key': 'attn.k_proj', 'att.value': 'attn.v_proj', 'att.output': 'attn.o_proj'}


def hub(w, legacy=False):
    "The tensors of an archive in the layout of the Hub; `legacy` has the six token-shift shares in one tensor."
    out = {}
    for name, t in w.items():
        if name.startswith('blocks.0.att.v') and name[-1] in '012': continue
        *block, rest = name.split('.', 2) if name.startswith('blocks') else (name,)
        stem, _, kind = rest.rpartition('.')
        if kind in ('weight', 'bias'): rest = f'{HUB.get(stem, stem)}.{kind}'
        elif rest[-1] in '12': rest, t = f'attn.{rest[-2]}_lora.lora.{2*int(rest[-1]) - 2}.weight', t.T.contiguous()
        elif rest[-1] == '0': rest, t = f'attn.{rest[-2]}_lora.lora.2.bias', t.flatten()
        else:
            if not rest.startswith('att.x_') and rest != 'att.r_k': t = t.flatten()
            rest = rest.replace('att.', 'attn.')
        out[f'model.layers.{block[1]}.{rest}' if block else rest] = t
    if legacy:
        for i in range(1 + max(int(n.split('.')[2]) for n in out if n.startswith('model.layers'))):
            at = f'model.layers.{i}.attn.x_'
            out[f'{at}x'] = torch.cat([out.pop(f'{at}{c}').flatten()[None] for c in 'rwkvag'])
    return out


def hub_config(w):
    "The config.json that belongs to `hub(w)`, with what published ones hold besides."
    at = 'blocks.1.att.'
    heads, head = w['blocks.0.att.r_k'].shape
    rank = {c: w[f'{at}{c}1'].shape[1] for c in 'wavg'}
    return dict(model_type='rwkv7', architectures=['RWKV7ForCausalLM'], hidden_size=heads*head, head_dim=head, num_heads=None,
                auto_map={'AutoConfig': 'modeling_rwkv7.RWKV7Config', 'AutoModelForCausalLM': 'modeling_rwkv7.RWKV7ForCausalLM'},
                num_hidden_layers=1 + max(int(n.split('.')[1]) for n in w if n.startswith('blocks')), value_dim=[heads*head]*9,
                intermediate_size=w['blocks.0.ffn.key.weight'].shape[0], hidden_ratio=4., hidden_act='sqrelu', decay_low_rank_dim=rank['w'],
                a_low_rank_dim=rank['a'], v_low_rank_dim=rank['v'], gate_low_rank_dim=rank['g'], norm_eps=1e-5, norm_bias=True,
                norm_first=True, attn=None, fuse_norm=False, attn_mode='chunk', vocab_size=w['emb.weight'].shape[0], bos_token_id=1,
                eos_token_id=2, tie_word_embeddings=False, torch_dtype='float32', max_position_embeddings=2048, use_cache=True)


def sigmoid(x): return 1/(1 + np.exp(-x))


def norm(x, weight, bias, eps=1e-5):
    return (x - x.mean())/np.sqrt(x.var() + eps)*weight + bias


class Net:
    "One sequence, one token after another; `weights` are the tensors of a `.pth`; `sites` holds every tensor on the way if `every`."
    def __init__(self, weights, group_eps=64e-5, every=False):
        self.w = {n: t.detach().double().numpy() for n, t in weights.items()}
        self.heads, self.n = self.w['blocks.0.att.r_k'].shape
        self.layers = 1 + max(int(n.split('.')[1]) for n in self.w if n.startswith('blocks'))
        self.group_eps, self.every = group_eps, every
        self.reset()

    def reset(self):
        d = self.w['emb.weight'].shape[1]
        self.u, self.q, self.S = ([np.zeros(s) for _ in range(self.layers)] for s in (d, d, (self.heads, self.n, self.n)))
        self.kept = {}

    def keep(self, name, v):
        if self.every: self.kept.setdefault(name, []).append(v)
        return v

    def mixer(self, i, u, v_first):
        p = lambda name: self.w[f'blocks.{i}.att.{name}']
        flat = lambda name: p(name).reshape(-1)
        keep = lambda name, v: self.keep(f'blocks.{i}.ssm.{name}', v)
        by_head = lambda v: v.reshape(self.heads, self.n)
        old, self.u[i] = self.u[i], u
        m = {c: u + (old - u)*flat(f'x_{c}') for c in 'rwkvag'}
        keep('conv', np.concatenate([m[c] for c in 'rwkvag']))
        r, k, v = p('receptance.weight') @ m['r'], p('key.weight') @ m['k'], p('value.weight') @ m['v']
        keep('in_proj', np.concatenate([r, k, v]))
        w = np.exp(-np.exp(-.5)*sigmoid(flat('w0') + np.tanh(m['w'] @ p('w1')) @ p('w2')))
        a = sigmoid(flat('a0') + m['a'] @ p('a1') @ p('a2'))
        g = sigmoid(m['g'] @ p('g1')) @ p('g2')
        if i == 0: v_first = v
        else: v = v + (v_first - v)*sigmoid(flat('v0') + m['v'] @ p('v1') @ p('v2'))
        removal, k = k*flat('k_k'), k*(1 + (a - 1)*flat('k_a'))
        out, y, writes, erase = np.zeros_like(v), np.zeros_like(v), np.zeros_like(self.S[i]), np.zeros_like(v)
        self.S[i] = self.S[i].copy()
        for h in range(self.heads):
            at = slice(h*self.n, (h + 1)*self.n)
            kappa = removal[at]/max(np.sqrt((removal[at]**2).sum()), 1e-12)
            S, erase[at], writes[h] = self.S[i][h], kappa*a[at], np.outer(v[at], k[at])
            S = S*w[at][None] - np.outer(S @ kappa, erase[at]) + writes[h]
            self.S[i][h], y[at] = S, S @ r[at]
            out[at] = norm(y[at], flat('ln_x.weight')[at], flat('ln_x.bias')[at], self.group_eps)
            out[at] += (r[at]*k[at]*p('r_k')[h]).sum()*v[at]
        for name, x in dict(x=v, B=k, C=r, decay=w, erase=erase, y=y, gate=g).items(): keep(name, by_head(x))
        keep('write', writes)
        keep('state', self.S[i])
        return keep('out', p('output.weight') @ keep('out_proj_in', out*g)), v_first

    def step(self, token):
        "The logits after one more token."
        ln = lambda name, x: norm(x, self.w[f'{name}.weight'], self.w[f'{name}.bias'])
        x, v_first = ln('blocks.0.ln0', self.keep('embed', self.w['emb.weight'][token])), None
        for i in range(self.layers):
            keep = lambda name, v, i=i: self.keep(f'blocks.{i}.{name}', v)
            out, v_first = self.mixer(i, keep('mixer_in', ln(f'blocks.{i}.ln1', keep('resid_pre', x))), v_first)
            x = keep('resid_mid', x + keep('mixer_out', out))
            q = keep('mlp_in', ln(f'blocks.{i}.ln2', x))
            old, self.q[i] = self.q[i], q
            m = q + (old - q)*self.w[f'blocks.{i}.ffn.x_k'].reshape(-1)
            inner = np.maximum(self.w[f'blocks.{i}.ffn.key.weight'] @ m, 0)**2
            x = keep('resid_post', x + keep('mlp_out', self.w[f'blocks.{i}.ffn.value.weight'] @ inner))
        return self.keep('logits', self.w['head.weight'] @ ln('ln_out', x))

    def __call__(self, ids):
        "The logits at every position, (pos, vocab)."
        self.reset()
        return torch.from_numpy(np.stack([self.step(t) for t in ids]))

    @property
    def sites(self):
        "Everything kept by site name, (pos, ...)."
        return {n: np.stack(v) for n, v in self.kept.items()}
