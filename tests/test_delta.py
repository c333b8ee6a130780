"""The delta rules: loop, chunks and sites against float64 numpy, an identity and transformers' own functions."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from circuitbench.delta import delta, delta_chunk, delta_loop
from circuitbench.rule import gated_delta_chunk, gated_delta_step, kimi_chunk, kimi_step, tapped_delta


def inputs(l, wide=True, fade=.6, short=False, h=3, p=5, n=6, b=2, forget=False, dtype=torch.float64, seed=0):
    "`fade`: the steepest log-decay; `forget`: every third step keeps nothing; `short`: the removal key as a multiple."
    rand = torch.Generator().manual_seed(seed)
    r, u = (lambda *s, f=f: f(*s, generator=rand, dtype=torch.float64) for f in (torch.randn, torch.rand))
    kappa = F.normalize(r(b, l, h, n), dim=-1)
    v = dict(v=r(b, l, h, p), k=kappa if short else r(b, l, h, n), r=r(b, l, h, n),
             log_w=-fade*(u(b, l, h, n) if wide else u(b, l, h)), kappa=kappa,
             erase=u(b, l, h) if short else kappa*u(b, l, h, n))
    if forget: v['log_w'][:, 2::3] = -torch.inf
    return {k: t.to(dtype) for k, t in v.items()}


def state(h=3, p=5, n=6, b=2): return torch.randn(b, h, p, n, dtype=torch.float64, generator=torch.Generator().manual_seed(9))


def truth(v, k, r, log_w, kappa, erase, start=None, decayed=False):
    "Every read-out and every state, one entry of the equation after another."
    v, k, r, log_w, kappa, erase = (t.detach().double().numpy() for t in (v, k, r, log_w, kappa, erase))
    if erase.ndim == 3: erase = erase[..., None]*k
    keep = np.exp(log_w if log_w.ndim == 4 else log_w[..., None])
    b, l, h, p = v.shape
    S = np.zeros((b, h, p, k.shape[-1])) if start is None else start.detach().double().numpy().copy()
    y, states = np.zeros_like(v), np.zeros((b, l, h, p, k.shape[-1]))
    for t in range(l):
        left = S*keep[:, t, :, None, :]
        found = np.einsum('bhpn,bhn->bhp', left if decayed else S, kappa[:, t])
        S = left - np.einsum('bhp,bhn->bhpn', found, erase[:, t]) + np.einsum('bhp,bhn->bhpn', v[:, t], k[:, t])
        y[:, t], states[:, t] = np.einsum('bhpn,bhn->bhp', S, r[:, t]), S
    return torch.from_numpy(y), torch.from_numpy(states)


def near(got, want, tol=1e-10): return float((got - want).detach().double().abs().max()) <= tol*max(1., float(want.abs().max()))
def far(got, want): return float((got.double() - want).square().mean().sqrt())


CASES = [dict(wide=w, fade=f, short=s) for w in (False, True) for f in (.6, 3., 25., 2000.) for s in (False, True)]
CASES += [dict(wide=w, forget=True, short=s) for w in (False, True) for s in (False, True)]
case = pytest.mark.parametrize('case', CASES, ids=lambda c: '-'.join(map(str, c.values())))
decayed = pytest.mark.parametrize('decayed', [False, True])


@case
@decayed
@pytest.mark.parametrize('l', [1, 2, 3, 31, 32, 33, 70])
def test_loop_and_chunks_equal_numpy(l, case, decayed):
    v, S0 = inputs(l, **case), state()
    for start in (None, S0):
        y, states = truth(**v, start=start, decayed=decayed)
        got, every = delta_loop(**v, state=start, decayed=decayed, states=True)
        assert near(got, y) and near(every, states)
        for chunk in (None, 1, 5, 64):
            got, S = delta_chunk(**v, state=start, decayed=decayed, chunk=chunk)
            assert near(got, y) and near(S, states[:, -1])


@decayed
@pytest.mark.parametrize('wide', [False, True])
def test_a_long_sequence_in_many_groups_of_chunks(wide, decayed):
    "Many heads: the chunks do not fit one group; d_head wider and narrower than d_state."
    for p, n in ((16, 4), (4, 16)):
        v = inputs(150, wide, h=40, p=p, n=n)
        y, states = truth(**v, decayed=decayed)
        for chunk in (16, 128):
            got, S = delta_chunk(**v, decayed=decayed, chunk=chunk)
            assert near(got, y) and near(S, states[:, -1])


@case
@decayed
def test_gradients_equal_those_of_the_loop(case, decayed):
    v, S0 = {k: t.requires_grad_() for k, t in inputs(41, **case).items()}, state().requires_grad_()
    def grads(f):
        y, S = f(**v, state=S0, decayed=decayed)
        return torch.autograd.grad(y.sin().sum() + S.cos().sum(), [*v.values(), S0])
    loop = grads(delta_loop)
    for f in (delta_chunk, lambda **v: delta_chunk(**v, chunk=8)):
        assert all(near(a, b, 1e-9) for a, b in zip(grads(f), loop))


@decayed
@pytest.mark.parametrize('case', [dict(wide=False), dict(wide=True), dict(wide=True, fade=25.), dict(wide=False, short=True)], ids=str)
def test_gradients_equal_finite_differences(case, decayed):
    v = {k: t.requires_grad_() for k, t in inputs(11, b=1, h=2, p=3, n=4, **case).items()}
    S0 = state(2, 3, 4, 1).requires_grad_()
    for chunk in (4, 16):
        assert torch.autograd.gradcheck(lambda *a, chunk=chunk: delta_chunk(*a, decayed, chunk), (*v.values(), S0), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *a: delta_chunk(*a, decayed, 4), (*v.values(), S0), fast_mode=True)


@decayed
@pytest.mark.parametrize('wide', [False, True])
def test_the_gradient_of_a_decay_of_zero_is_zero(wide, decayed):
    v = {k: t.requires_grad_() for k, t in inputs(50, wide, forget=True).items()}
    for f in (delta_loop, delta_chunk):
        grads = torch.autograd.grad(f(**v, decayed=decayed)[0].square().sum(), list(v.values()))
        assert all(torch.isfinite(g).all() for g in grads)
        assert not grads[3][:, 2::3].any() and grads[3][:, 3].any()


@case
@decayed
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_scanned_in_float32(dtype, case, decayed):
    v = inputs(100, dtype=dtype, **case)
    y, states = truth(**v, decayed=decayed)                 # of the rounded inputs
    for f in (delta_loop, delta_chunk):
        got, S = f(**v, decayed=decayed)
        assert got.dtype == S.dtype == torch.float32 and near(got, y, 5e-6) and near(S, states[:, -1], 5e-6)


@decayed
@pytest.mark.parametrize('wide', [False, True])
def test_two_pieces_are_the_whole(wide, decayed):
    v = inputs(90, wide)
    y, states = truth(**v, decayed=decayed)
    y1, S = delta(**{k: t[:, :37] for k, t in v.items()}, decayed=decayed)
    y2, S = delta(**{k: t[:, 37:] for k, t in v.items()}, state=S, decayed=decayed)
    assert near(torch.cat([y1, y2], 1), y) and near(S, states[:, -1])


def test_no_state_of_every_step_is_kept():
    "Nor a tensor of all pairs of steps by channel: peak memory grows with L x model width."
    for case in (dict(wide=False, short=True), dict(wide=True), dict(wide=True, fade=25.)):
        v, sizes = inputs(512, h=8, p=64, n=64, b=1, dtype=torch.float32, **case), []
        class Sizes(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None, sizes=sizes):
                out = func(*args, **(kwargs or {}))
                if isinstance(out, torch.Tensor): sizes.append(out.untyped_storage().nbytes())
                return out
        with torch.no_grad(), Sizes(): delta_chunk(**v)
        assert max(sizes) < 512*8*64*64*4/16


@pytest.mark.parametrize('scan', [delta_loop, delta_chunk, delta])
def test_autocast_does_not_reach_the_recurrence(scan):
    x = inputs(40, dtype=torch.float32)
    want = scan(**x)
    with torch.autocast('cpu', torch.bfloat16): got = scan(**x)
    assert all(torch.equal(a, b) for a, b in zip(got, want))


# what is listened to

@case
@decayed
@pytest.mark.parametrize('stops', [[0], [5, 6, 7], [0, 40, 79], list(range(80))])
def test_stops_change_nothing_and_see_every_step(stops, case, decayed):
    v, seen = inputs(80, **case), {}
    y, states = truth(**v, decayed=decayed)
    order = []
    def tap(name, x, t):
        order.append((t, name))
        return seen.setdefault((name, t), x)
    got, S = delta(**v, decayed=decayed, stops=stops, tap=tap)
    assert near(got, y) and near(S, states[:, -1])
    assert order == [(t, name) for t in stops for name in ('decay', 'write', 'state')]
    for t in stops:
        assert near(seen['state', t], states[:, t]) and near(seen['decay', t], v['log_w'][:, t].exp())
        assert near(seen['write', t], torch.einsum('bhp,bhn->bhpn', v['v'][:, t], v['k'][:, t]))


@case
@decayed
@pytest.mark.parametrize('stops', [[], [6, 50]])
@pytest.mark.parametrize('reads', [[0], [5, 6, 7, 9, 50], list(range(0, 80, 3))])
def test_reads_change_nothing_and_see_every_state(stops, reads, case, decayed):
    v, seen = inputs(80, **case), {}
    y, states = truth(**v, decayed=decayed)
    def tap(name, x, t): return seen.update({t + i: x[:, i].clone() for i in range(x.shape[1])}) if name == 'states' else x
    got, S = delta(**v, decayed=decayed, stops=stops, tap=tap, reads=reads)
    assert near(got, y) and near(S, states[:, -1])
    assert {*reads} - {*stops} <= {*seen} and all(near(S, states[:, t]) for t, S in seen.items())


def transition(v, t, decayed):
    "The matrix by which step t multiplies the state from the right, (batch, head, d_state, d_state), float64 numpy."
    k, kappa, erase, w = (v[n][:, t].double().numpy() for n in ('k', 'kappa', 'erase', 'log_w'))
    if erase.ndim == 2: erase = erase[..., None]*k
    W = np.exp(w if w.ndim == 3 else w[..., None])[..., None]*np.eye(k.shape[-1])
    outer = kappa[..., :, None]*erase[..., None, :]
    return W - (W @ outer if decayed else outer)


@decayed
@pytest.mark.parametrize('case', [dict(wide=False), dict(wide=True), dict(wide=True, fade=25.), dict(wide=False, short=True)], ids=str)
def test_a_change_of_the_state_travels_by_the_product_of_transitions(case, decayed):
    v, change = inputs(60, **case), state()
    y, states = truth(**v, decayed=decayed)
    tap = lambda name, x, t: x + change if name == 'state' and t == 20 else seen.setdefault((name, t), x)
    seen = {}
    got, S = delta(**v, decayed=decayed, stops=[20, 33], tap=tap)
    assert near(got[:, :20], y[:, :20])
    D = change.numpy()
    for t in range(20, 60):
        if t > 20: D = D @ transition(v, t, decayed)
        if t == 33: assert near(seen['state', 33], states[:, 33] + torch.from_numpy(D))
        assert near(got[:, t], y[:, t] + torch.from_numpy(np.einsum('bhpn,bhn->bhp', D, v['r'][:, t].numpy())))
    assert near(S, states[:, -1] + torch.from_numpy(D))


@case
@decayed
def test_the_read_out_is_its_hidden_attention(case, decayed):
    "y_t = sum_j v_j (k_j . T_{j+1} ... T_t r_t), the reader carried backwards."
    v = inputs(40, **case)
    y, _ = delta(**v, decayed=decayed)
    T = [transition(v, t, decayed) for t in range(40)]
    for t in (0, 7, 39):
        reader, want = v['r'][:, t].numpy()[..., None], 0
        for j in range(t, -1, -1):
            want = want + (v['k'][:, j].numpy()[..., None, :] @ reader)[..., 0]*v['v'][:, j].numpy()
            reader = T[j] @ reader
        assert near(y[:, t], torch.from_numpy(want))


@decayed
def test_the_removal_sees_the_edited_decay(decayed):
    v, w = inputs(30, False), torch.tensor([[.3, -1., 2.]]).double().expand(2, 3)
    changed = {**v, 'log_w': v['log_w'].clone()}
    got, _ = delta(**v, decayed=decayed, stops=[11], tap=lambda name, x, t: w if name == 'decay' else x)
    S = torch.zeros(2, 3, 5, 6).double()
    for t in range(30):                                     # plain torch, a step at a time: a decay below 0 has no log
        keep = w if t == 11 else changed['log_w'][:, t].exp()
        left = S*keep[..., None, None]
        found = ((left if decayed else S)*v['kappa'][:, t, :, None]).sum(-1)
        S = left - found[..., None]*v['erase'][:, t, :, None] + v['v'][:, t, ..., None]*v['k'][:, t, :, None]
        assert near(got[:, t], (S*v['r'][:, t, :, None]).sum(-1))


class Ear:
    "A tap: `edits` site -> function, stops where asked, keeps what passes."
    def __init__(self, edits=None, stops=(), grad=False): self.edits, self._stops, self.grad, self.seen = edits or {}, stops, grad, {}
    def wants(self, site): return True
    def stops(self, length): return [t for t in self._stops if t < length]
    def reads(self, site, length, stops): return []
    def note(self, kind, **inputs): pass
    def at(self, site, x, t): return self(site, x, t)
    def __call__(self, site, x, t=None):
        x = self.edits.get(site, lambda x: x)(x)
        if self.grad: x = x.view_as(x)
        self.seen[site if t is None else (site, t)] = x
        return x


def gated(l, b=2, h=4, groups=1, p=5, n=6, wide=False, fade=1., dtype=torch.float32, seed=0):
    "Arguments of transformers' functions."
    rand = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=rand)
    g = -fade*F.softplus(r(b, l, h, n) if wide else r(b, l, h))
    v = dict(query=r(b, l, h//groups, n), key=r(b, l, h//groups, n), value=r(b, l, h, p), g=g, beta=r(b, l, h).sigmoid())
    return {k: t.to(dtype) for k, t in v.items()}


def equation(query, key, value, g, beta, unit=True):
    "transformers' arguments as those of the recurrence: v, k, r, log_w, kappa, erase."
    groups = value.shape[2]//key.shape[2]
    q, k, v, g, beta = (t.detach().double() for t in (query, key, value, g, beta))
    if unit: q, k = (t/(t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    q, k = (t.repeat_interleave(groups, 2) for t in (q/k.shape[-1]**.5, k))
    return beta[..., None]*v, k, q, g, k, beta


THEIRS = dict(gated_chunk=(gated_delta_chunk, qwen.torch_chunk_gated_delta_rule, False),
              gated_step=(gated_delta_step, qwen.torch_recurrent_gated_delta_rule, False),
              kimi_chunk=(kimi_chunk, kimi.chunk_kimi_delta_attention, True),
              kimi_step=(kimi_step, kimi.recurrent_kimi_delta_attention, True))
makers = pytest.mark.parametrize('make, theirs, wide', THEIRS.values(), ids=THEIRS)
still = SimpleNamespace(tap=None)


@makers
@pytest.mark.parametrize('l', [1, 2, 31, 65, 130])
@pytest.mark.parametrize('fade', [.1, 1., 8.])
@pytest.mark.parametrize('unit', [False, True])
def test_the_replacements_equal_transformers(make, theirs, wide, l, fade, unit):
    S0 = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1))
    for groups in (1,) if wide else (1, 2, 4):
        v = gated(l, groups=groups, wide=wide, fade=fade)
        if not unit: v['key'] = v['key']/3
        for start in (None, S0):
            options = dict(initial_state=start, output_final_state=True, use_qk_l2norm_in_kernel=unit)
            for live in (still, SimpleNamespace(tap=Ear()), SimpleNamespace(tap=Ear(stops=sorted({0, l//2})))):
                (y, S), (y1, S1) = make(live, theirs)(**v, **options), theirs(**v, **options)
                assert y.shape == y1.shape and S.shape == S1.shape and y.dtype == y1.dtype and S.dtype == S1.dtype
                assert near(y, y1.double(), 1e-5) and near(S, S1.double(), 1e-5)
        assert make(still, theirs)(**v, initial_state=None, output_final_state=False)[1] is None


@makers
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_replacements_keep_dtypes(make, theirs, wide, dtype):
    v = gated(40, wide=wide, dtype=dtype)
    options = dict(initial_state=None, output_final_state=True, use_qk_l2norm_in_kernel=True)
    (y, S), (y1, S1) = make(still, theirs)(**v, **options), theirs(**v, **options)
    assert y.dtype == y1.dtype == dtype and S.dtype == S1.dtype == torch.float32
    assert near(y, y1.double(), 1e-2) and near(S, S1.double(), 1e-5)


@makers
@pytest.mark.parametrize('fade', [.3, 8.])
def test_the_replacements_have_transformers_gradients(make, theirs, wide, fade):
    for groups in (1,) if wide else (1, 2):
        v = {k: t.requires_grad_() for k, t in gated(45, groups=groups, wide=wide, fade=fade).items()}
        S0 = torch.randn(2, 4, 6, 5, generator=torch.Generator().manual_seed(1)).requires_grad_()
        def grads(f, v=v, S0=S0):
            y, S = f(**v, initial_state=S0, output_final_state=True, use_qk_l2norm_in_kernel=True)
            return torch.autograd.grad(y.sin().sum() + S.cos().sum(), [*v.values(), S0])
        for a, b in zip(grads(make(still, theirs)), grads(theirs)): assert near(a/b.abs().max(), (b/b.abs().max()).double(), 1e-4)


def test_packed_sequences_are_refused():
    for make in (gated_delta_chunk, gated_delta_step):
        with pytest.raises(ValueError, match='got cu_seqlens'): make(still, None)(**gated(4), cu_seqlens=torch.tensor([0, 2, 4]))


@makers
def test_the_sites_hold_the_terms_of_the_equation(make, theirs, wide):
    v = gated(20, groups=1 if wide else 2, wide=wide)
    bv, k, q, g, _, beta = equation(**v)
    y, states = truth(bv, k, q, g, k, beta, decayed=True)
    ear = Ear(stops=[3, 11])
    make(SimpleNamespace(tap=ear), None)(**v, initial_state=None, output_final_state=True, use_qk_l2norm_in_kernel=True)
    want = {'ssm.x': v['value'].double(), 'ssm.B': k, 'ssm.C': q, 'ssm.decay': g.exp(), 'ssm.erase': beta[..., None]*k, 'ssm.y': y}
    for t in (3, 11): want['ssm.state', t], want['ssm.write', t] = states[:, t], torch.einsum('bhp,bhn->bhpn', bv[:, t], k[:, t])
    assert set(want) == set(ear.seen)
    for site, x in want.items(): assert ear.seen[site].shape == x.shape and near(ear.seen[site], x, 1e-5), site


@pytest.mark.parametrize('wide', [False, True])
def test_what_an_edit_of_each_site_means(wide):
    v = gated(30, wide=wide)
    bv, k, q, g, kappa, beta = equation(**v)
    erase, full = beta[..., None]*k, dict(initial_state=None, output_final_state=True, use_qk_l2norm_in_kernel=True)
    half = lambda x: x/2
    want = {'ssm.x': (bv/2, k, q, g, kappa, erase), 'ssm.B': (bv, k/2, q, g, kappa, erase),   # the removal key stays
            'ssm.C': (bv, k, q/2, g, kappa, erase), 'ssm.erase': (bv, k, q, g, kappa, erase/2),
            'ssm.decay': (bv, k, q, g - np.log(2), kappa, erase)}
    for site, equal in want.items():
        stops = range(30) if site == 'ssm.decay' else ()
        y, S = gated_delta_chunk(SimpleNamespace(tap=Ear({site: half}, stops)), None)(**v, **full)
        y1, states = truth(*equal, decayed=True)
        assert near(y, y1, 1e-5) and near(S.mT, states[:, -1], 1e-5), site


def test_a_decay_edited_at_some_steps_only():
    v = inputs(30)
    def half(x):
        x = x.clone()
        x[:, [4, 9]] = 0
        return x
    y, S = tapped_delta(Ear({'ssm.decay': half}, [4, 9]), **v)
    log_w = v['log_w'].clone()
    log_w[:, [4, 9]] = -torch.inf
    y1, states = truth(**{**v, 'log_w': log_w})
    assert near(y, y1) and near(S, states[:, -1])


@decayed
@pytest.mark.parametrize('stops', [(), (2, 7)])
@pytest.mark.parametrize('wide', [False, True])
def test_gradients_of_every_site(wide, stops, decayed):
    "Of a tensor on the way, stopped at or not, equal to those of the loop's arguments."
    v = {k: t.requires_grad_() for k, t in inputs(25, wide).items()}
    ear = Ear(stops=stops, grad=True)
    y, S = tapped_delta(ear, **v, decayed=decayed)
    score = lambda y, S: y.sin().sum() + S.cos().sum()
    names = ['ssm.x', 'ssm.B', 'ssm.C', 'ssm.decay', 'ssm.erase']
    got = torch.autograd.grad(score(y, S), [ear.seen[n] for n in names])
    want = torch.autograd.grad(score(*delta_loop(**v, decayed=decayed)), [v[n] for n in ('v', 'k', 'r', 'log_w', 'erase')])
    for n, a, b in zip(names, got, want): assert near(a*v['log_w'].exp() if n == 'ssm.decay' else a, b, 1e-9), n


# how exact

def rounding(v, decayed, *others):
    "The distance from float64 numpy of the chunked form, and of others."
    y, _ = truth(**v, decayed=decayed)
    with torch.no_grad(): return far(delta_chunk(**v, decayed=decayed)[0], y), *(far(f(), y) for f in others)


def long(kind, fade, l=1024, h=2, n=64):
    a = gated(l, 1, h, 1, n, n, kind == 'kimi', fade)
    bv, k, q, g, kappa, beta = (t.float() for t in equation(**a))
    if kind != 'rwkv': return dict(v=bv, k=k, r=q, log_w=g, kappa=kappa, erase=beta), True, (q*n**.5, k, a['value'], g, beta)
    log_w = -.6065*torch.sigmoid(torch.randn(1, l, h, n, generator=torch.Generator().manual_seed(2))*3 - 2)
    return dict(v=bv, k=a['key'], r=q*8, log_w=log_w, kappa=kappa, erase=beta[..., None]*kappa), False, None


@pytest.mark.slow
@pytest.mark.parametrize('kind, fade', [('rwkv', 1.), ('gated', .01), ('gated', 1.), ('gated', 10.), ('kimi', .01), ('kimi', 1.), ('kimi', 10.)])
def test_a_long_sequence_is_as_exact_as_the_loop_and_transformers(kind, fade):
    v, decayed, args = long(kind, fade)
    theirs = qwen.torch_chunk_gated_delta_rule if kind == 'gated' else kimi.chunk_kimi_delta_attention
    others = [lambda: delta_loop(**v, decayed=decayed)[0]]
    if args is not None: others.append(lambda: theirs(*args)[0])
    ours, *rest = rounding(v, decayed, *others)
    print(f'{kind} {fade}: ours {ours:.2e}, loop and transformers', *(f'{x:.2e}' for x in rest))
    assert ours <= 1.5*min(rest)


@pytest.mark.slow
@pytest.mark.parametrize('kind, fade', [('rwkv', 1.), ('gated', .01), ('gated', 10.), ('kimi', 1.), ('kimi', 10.)])
def test_gradients_in_float32_over_a_long_sequence(kind, fade):
    v, decayed, _ = long(kind, fade, 512, 1, 32)
    def grads(f, dtype):
        w = {k: t.detach().to(dtype).requires_grad_() for k, t in v.items()}
        y, S = f(**w, decayed=decayed)
        return torch.autograd.grad(y.sin().sum() + S.cos().sum(), list(w.values()))
    for name, a, b in zip(v, grads(delta_chunk, torch.float32), grads(delta_loop, torch.float64)):
        assert float((a.double() - b).norm()/b.norm()) < 1e-4, name
