"""Plans, against the bare model with plain hooks and recurrences written out here, a token at a time and without a cache."""
import json
import math
import subprocess
import sys
import threading
import warnings
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cache
from importlib import import_module

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from test_sweep import bare
from transformers import Mamba2ForCausalLM, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import Cache

from circuitbench import interventions
from circuitbench.direction import Direction, given_direction
from circuitbench.edit import meta
from circuitbench.hook import HookedModel
from circuitbench.interventions import Interventions, plan
from circuitbench.load import load_model
from circuitbench.models.mamba2 import small
from circuitbench.sae import SAE, SAEConfig
from circuitbench.site import SiteError
from circuitbench.step import Step, Token, When, ablate, decay, fires, hold, points, push, swap, write

FAMILIES = ['mamba2', 'llama', 'falcon-h1', 'rwkv7', 'hymba']
TEXTS = ['Hello you', 'Oh', 'say it']
RESID = 'blocks.0.resid_post'
LATE = 'blocks.1.resid_post'


@cache
def mock(family): return load_model(f'mock://{family}-tiny')


@pytest.fixture(autouse=True)
def nothing_is_left():
    "Whatever a test does, no plan, hook or patch of transformers stays."
    plain = Cache.reorder_cache
    yield
    assert Cache.reorder_cache is plain
    for family in ('mamba2', 'llama', 'rwkv7', 'jamba'): assert bare(mock(family)) and not mock(family).standing


def numbers(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def along(model, site=RESID, seed=0, heads=None):
    "A direction of random numbers, and itself of length 1 in float64."
    shape = model.site_shape(site, 1, 1)[2:]
    if heads: shape = (len(heads), *shape[1:])
    d = given_direction(model, numbers(*shape, seed=seed), site, heads=heads)
    return d, d.vector.double()/d.vector.double().norm()


@cache
def coder(family, site=RESID, seed=0):
    sae = SAE(SAEConfig(mock(family).sizes['d_model'], 64, 16, site, model=mock(family).name), seed=seed)
    sae.b_enc.data, sae.b_dec.data = .1*numbers(64, seed=seed + 1), .1*numbers(sae.d_in, seed=seed + 2)
    return sae


def encoded(sae, x):
    "The latents of a TopK coder in float64 numpy, from the definition."
    pre = (x.double().numpy() - sae.b_dec.double().numpy()) @ sae.W_enc.double().numpy() + sae.b_enc.double().numpy()
    kept = np.sort(pre, -1)[..., -sae.k:-sae.k + 1]
    return torch.from_numpy(np.where(pre >= kept, np.maximum(pre, 0), 0))


# -- the bare model ----------------------------------------------------------------------
def parts(out): return out if isinstance(out, tuple) else (out,)


class Bare:
    "The bare model; `hooks` are {block: f(x (batch, pos, d) of its output)}, `state` a function of each step of a recurrence."
    def __init__(self, model, hooks=(), state=None):
        self.model, self.hooks, self.state = model, dict(hooks), state

    def __enter__(self):
        self.stack, model = ExitStack(), self.model
        hook = lambda handle: self.stack.callback(handle.remove)
        for i, f in self.hooks.items():
            def _out(m, args, out, f=f):
                x, *rest = parts(out)
                new = torch.cat([x[:, :model.meta], f(x[:, model.meta:])], 1)
                return (new, *rest) if isinstance(out, tuple) else new
            hook(model.blocks[i].register_forward_hook(_out))
        if self.state:
            for i, b in enumerate(model.blocks):
                hook(b.register_forward_pre_hook(lambda m, args, i=i: setattr(self, 'block', i)))
            self.stack.enter_context(by_hand(model, lambda t, a, S: self.state(self.block, t - model.meta, a, S)))
        return self

    def __exit__(self, *_): self.stack.close()

    @torch.no_grad()
    def logits(self, ids, mask=None): return self.model.hf(ids, attention_mask=mask, use_cache=False).logits

    def generate(self, ids, mask=None, **options):
        options = dict(max_new_tokens=6, do_sample=False, pad_token_id=0, use_cache=False) | options
        with torch.no_grad():
            return self.model.hf.generate(ids, attention_mask=torch.ones_like(ids) if mask is None else mask, **options)


def mamba2_steps(change):
    "Mamba-2's recurrence as transformers calls it, in float64, a step at a time."
    def _scan(x, dt, A, B, C, chunk_size, D=None, dt_bias=None, initial_states=None, dt_softplus=False, dt_limit=(0., math.inf),
              return_final_states=False, **_):
        dtype, (x, dt, A, B, C) = x.dtype, (v.double() for v in (x, dt, A, B, C))
        dt = F.softplus(dt + dt_bias.double()).clamp(*dt_limit)
        B, C = (v.repeat_interleave(x.shape[2]//v.shape[2], 2) for v in (B, C))
        S, y = x.new_zeros(len(x), *x.shape[2:], B.shape[-1]), torch.zeros_like(x)
        for t in range(x.shape[1]):
            a = torch.exp(dt[:, t]*A)
            W = dt[:, t, :, None, None]*x[:, t, ..., None]*B[:, t, :, None]
            S = change(t, a[..., None, None], lambda a, S=S, W=W: a*S + W)
            y[:, t] = (S*C[:, t, :, None]).sum(-1) + D.double()[:, None]*x[:, t]
        y = y.to(dtype)
        return (y, S.float()) if return_final_states else y
    return _scan


def mamba1_steps(change):
    "Mamba-1's, channels before positions, gated."
    def _scan(x, dt, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False, **_):
        dtype, (x, dt, A, B, C) = x.dtype, (v.double() for v in (x, dt, A, B, C))
        dt = F.softplus(dt + delta_bias.double()[:, None])
        S, y = x.new_zeros(*x.shape[:2], 1, A.shape[1]), torch.zeros_like(x)
        for t in range(x.shape[2]):
            W = ((dt*x)[..., t, None]*B[:, None, :, t])[:, :, None]
            S = change(t, torch.exp(dt[..., t, None]*A)[:, :, None], lambda a, S=S, W=W: a*S + W)
            y[..., t] = (S[:, :, 0]*C[:, None, :, t]).sum(-1) + D.double()*x[..., t]
        y = (y*F.silu(z.double())).to(dtype)
        return (y, S[:, :, 0].float()) if return_last_state else y
    return _scan


def rwkv7_steps(change):
    "RWKV-7's: S diag(w) - (S kappa) erase^T + v k^T."
    def _scan(v, k, r, log_w, kappa, erase, state=None):
        dtype, (v, k, r, w, kappa, erase) = v.dtype, (u.double() for u in (v, k, r, log_w.exp(), kappa, erase))
        S, y = v.new_zeros(len(v), *v.shape[2:], k.shape[-1]), torch.zeros_like(v)
        for t in range(v.shape[1]):
            more = v[:, t, ..., None]*k[:, t, :, None]
            gone = (S*kappa[:, t, :, None]).sum(-1, keepdim=True)*erase[:, t, :, None]
            S = change(t, w[:, t, :, None], lambda a, S=S, more=more, gone=gone: a*S - gone + more)
            y[:, t] = (S*r[:, t, :, None]).sum(-1)
        return y.to(dtype), S.float()
    return _scan


STEPS = {'mamba2_chunk_scan': mamba2_steps, 'mamba_selective_scan': mamba1_steps, 'rwkv7_scan': rwkv7_steps}


@contextmanager
def by_hand(model, change):
    "The bare model with its recurrence, and nothing else, written out; change(t, decay, step) gives the state after step t."
    name = next(n for n in STEPS if n in model.adapter.functions)
    module = import_module(model.adapter.module)
    plain = getattr(module, name)
    setattr(module, name, STEPS[name](change))
    try: yield
    finally: setattr(module, name, plain)


def put(at, f, rows=slice(None)):
    "A hook: f at some positions of some rows."
    def _hook(x):
        x = x.clone()
        for p in at:
            if p < x.shape[1]: x[rows, p] = f(x[rows, p].double()).to(x)
        return x
    return _hook


def greedy(model, ids, more, logits):
    "Decoding without a cache: the tokens, and the logits of each step."
    seen = []
    for _ in range(more):
        out = logits(ids)
        seen.append(out[:, -1])
        ids = torch.cat([ids, out[:, -1:].argmax(-1)], 1)
    return ids, torch.stack(seen, 1)


def under(model, steps, prompt, **kw):
    with steps.on(model): return model.run(prompt, **kw).logits


def close(a, b, tol=2e-4):
    "True; AssertionError says where they differ."
    torch.testing.assert_close(a.double(), b.double(), rtol=tol, atol=tol)
    return True


# -- each kind of step -------------------------------------------------------------------
@pytest.mark.parametrize('family', FAMILIES)
@pytest.mark.parametrize('kind', ['push', 'ablate', 'hold'])
def test_a_step_is_a_hook_on_the_bare_model_of_a_padded_batch(family, kind):
    model = mock(family)
    d, u = along(model)
    sae = coder(family)
    row = sae.W_dec[5].double()
    step, f = {'push': (push(d, -3.), lambda x: x - 3*u), 'ablate': (ablate(d), lambda x: x - (x @ u)[:, None]*u),
               'hold': (hold(sae, 5, 2.), lambda x: x + (2 - encoded(sae, x)[:, 5:6])*row)}[kind]
    ids, mask = model.tokens(TEXTS, 'left')
    with Bare(model, {0: put(range(99), f)}) as plain: want = plain.logits(ids, mask)
    got = under(model, plan(step), TEXTS, pad='left')
    real = mask.bool()
    assert close(got[real], want[real])
    assert (got - model.run(TEXTS, pad='left').logits)[real].abs().max() > 1e-2
    edits = plan(step).edits(model, TEXTS)
    assert close(model.run(TEXTS, edit=edits, pad='left').logits[real], want[real])


@pytest.mark.parametrize('family', ['llama', 'falcon-h1'])
def test_a_push_of_some_heads(family):
    model, site = mock(family), 'blocks.1.attn.z'
    d, u = along(model, site, heads=(2, 0))
    step = push(d, 4.)
    assert step.heads == (2, 0)
    def _before(m, args):
        z = args[0].unflatten(-1, (4, -1)).clone()
        z[:, :, [2, 0]] += (4*u).to(z)
        return (z.flatten(2),)
    handle = model.blocks[1].self_attn.o_proj.register_forward_pre_hook(_before)
    try: want = model.hf(model.tokens('Hello')[0]).logits
    finally: handle.remove()
    assert close(under(model, plan(step), 'Hello'), want)


@pytest.mark.parametrize('family', ['mamba2', 'falcon-h1', 'rwkv7', 'hymba', 'jamba'])
@pytest.mark.parametrize('kind', ['write', 'swap', 'decay', 'push'])
def test_a_step_on_the_memory_is_the_recurrence_changed_by_hand(family, kind):
    model = mock(family)
    layer = model.recurrent()[1]
    d, u = along(model, f'blocks.{layer}.ssm.state')
    step = {'write': write(d, 3., at=-2), 'swap': swap(d, at=-2), 'decay': decay(layer, 4.), 'push': push(d, .5, at='prompt')}[kind]
    ids, mask = model.tokens(TEXTS, 'left')
    n, pad = ids.shape[1], (~mask.bool()).sum(1)
    def _change(block, t, a, S):
        if block != layer or t < 0: return S(a)
        if kind == 'decay': return S(torch.where((t >= pad).view(-1, *[1]*(a.dim() - 1)), a**.25, a))
        S = S(a)
        if kind == 'push': return S + (t >= pad).view(-1, 1, 1, 1)*.5*u
        if t == n - 2: S = S + 3*u if kind == 'write' else d.vector.double().expand_as(S)
        return S
    with Bare(model, state=_change) as plain: want = plain.logits(ids, mask)
    got = under(model, plan(step), TEXTS, pad='left')
    real = mask.bool()
    assert close(got[real], want[real])
    assert (got - model.run(TEXTS, pad='left').logits)[real].abs().max() > 1e-4


def test_a_write_and_a_decay_against_mamba2_in_float64():
    model, ids, layer = mock('mamba2'), [[5, 9, 41, 7, 200, 9, 3]], 1
    from test_sweep import rest
    d, u = along(model, 'blocks.1.ssm.state', heads=(1, 3))
    sites, w = oracle.run(model.hf, np.array(ids)), oracle.weights(model.hf)
    a, C, x, W = (sites[f'blocks.{layer}.ssm.{k}'] for k in ('decay', 'C', 'x', 'write'))
    a, S, y = a.copy(), np.zeros(W[:, 0].shape), np.zeros_like(x)
    a[:, :, 2] **= 1/5
    for t in range(7):
        S = a[:, t, :, None, None]*S + W[:, t]
        if t == 4: S[:, [1, 3]] += -2*u.numpy()
        y[:, t] = np.einsum('bhpn,bhn->bhp', S, C[:, t]) + w[f'backbone.layers.{layer}.mixer.D'][:, None]*x[:, t]
    got = under(model, plan(write(d, -2., at=4), decay(layer, 5., heads=2)), ids)
    np.testing.assert_allclose(got.numpy(), rest(model.hf, sites, y), rtol=1e-4, atol=1e-4)


def test_a_write_costs_nothing_after_its_step(monkeypatch):
    model, calls = mock('mamba2'), []
    d, _ = along(model, 'blocks.1.ssm.state')
    plain = Direction.push
    def _push(self, strength):
        edit = plain(self, strength)
        return replace(edit, f=lambda x, where: calls.append(where.pos) or edit.f(x, where))
    monkeypatch.setattr(Direction, 'push', _push)
    with plan(write(d, 3.)).on(model): model.generate('Hello', 8)
    assert calls == [[4]]
    calls.clear()
    with plan(write(d, 3., at=7)).on(model): model.generate('Hello', 8)
    assert calls == [[7]]


def test_strength_zero_is_the_clean_run_bit_for_bit():
    model = mock('mamba2')
    d, s = along(model)[0], along(model, 'blocks.1.ssm.state')[0]
    assert torch.equal(under(model, plan(push(d, 0.), write(s, 0, at=2), push(d, -0.)), 'Hello'), model.run('Hello').logits)


# -- where -------------------------------------------------------------------------------
PROMPT = 'Hello you'
PLACES = [(None, range(99)), ('prompt', range(9)), ('generated', range(9, 99)), ('last', [8]), (Token('l'), [2, 3]),
          (slice(2, 5), range(2, 5)), (slice(-3, None), range(6, 99)), (slice(3, -2), range(3, 7)), ('every:2', range(0, 99, 2)),
          (3, [3]), (-1, [8]), ([1, -2], [1, 7]), (10, [10]), ([0, 9, 12], [0, 9, 12]), (slice(10, 12), range(10, 12)),
          (torch.tensor([4, 2]), [2, 4])]


@pytest.mark.parametrize('at, chosen', PLACES, ids=[str(a) for a, _ in PLACES])
@pytest.mark.parametrize('family', ['mamba2', 'llama', 'hymba'])
def test_places_in_a_text_that_is_decoded_without_a_cache(family, at, chosen):
    model = mock(family)
    d, u = along(model)
    ids, more = model.tokens(PROMPT)[0], 5
    with Bare(model, {0: put(chosen, lambda x: x + 8*u)}) as plain: want, logits = greedy(model, ids, more, plain.logits)
    steps = plan(push(d, 8., at=at))
    with steps.on(model): out = model.generate(PROMPT, more, names='logits')
    assert torch.equal(out.tokens, want)
    assert close(out.cache['logits'][:, -more:], logits)
    assert torch.equal(model.generate(PROMPT, more, edit=steps.edits(model, PROMPT)).tokens, want)


@pytest.mark.parametrize('family', ['mamba2', 'llama', 'rwkv7', 'hymba'])
def test_roles_in_a_padded_batch_are_those_of_each_text(family):
    model = mock(family)
    d, more = along(model)[0], 5
    steps = plan(push(d, 6., at='last'), ablate(d, at='generated'), push(along(model, LATE, 3)[0], 5., at=Token('y')))
    with steps.on(model): out = model.generate(['Hello you', 'Oy', 'say it'], more)
    for text, row in zip(['Hello you', 'Oy', 'say it'], out.tokens):
        with steps.on(model): one = model.generate(text, more)
        assert torch.equal(row[-more:], one.tokens[0, -more:])


@pytest.mark.parametrize('pad', ['left', 'right'])
def test_the_last_token_of_each_row_on_either_side_of_padding(pad):
    model = mock('mamba2')
    d, u = along(model)
    with plan(push(d, 6., at='last')).on(model): got = model.run(TEXTS, pad=pad)
    for r, text in enumerate(TEXTS):
        ids = model.tokens(text)[0]
        with Bare(model, {0: put([len(text) - 1], lambda x: x + 6*u)}) as plain: want = plain.logits(ids)
        assert close(got.last[r], want[0, -1])


def test_the_prompt_may_end_before_the_text_does():
    model = mock('llama')
    d, u = along(model)
    ids = model.tokens(PROMPT)[0]
    for at, chosen in (('prompt', range(4)), ('last', [3]), ('generated', range(4, 9)), (-1, [3]), (slice(-3, None), range(1, 9)),
                       (slice(-9, -1, 2), [0, 2])):
        with Bare(model, {0: put(chosen, lambda x: x + 8*u)}) as plain: want = plain.logits(ids)
        with plan(push(d, 8., at=at)).on(model, length=4): assert close(model.run(PROMPT).logits, want)
        assert close(model.run(PROMPT, edit=plan(push(d, 8., at=at)).edits(model, PROMPT, 4)).logits, want)


@pytest.mark.parametrize('family', ['mamba2', 'llama', 'falcon-h1', 'rwkv7', 'hymba'])
def test_rows_with_steps_of_their_own_are_single_runs(family):
    model = mock(family)
    d, e = along(model)[0], along(model, LATE, 1)[0]
    own = [push(d, 5.), hold(coder(family), 3, 4.), push(e, -7., at='generated')]
    if model.recurrent(): own[1] = write(along(model, f'blocks.{model.recurrent()[0]}.ssm.state')[0], 4.)
    both = ablate(d, at='generated')
    rows = [Step(**vars(s) | dict(rows=r)) for r, s in enumerate(own)]
    with plan(*rows, both).on(model): out = model.generate(TEXTS, 5, names='logits')
    for r, text in enumerate(TEXTS):
        with plan(own[r], both).on(model): one = model.generate(text, 5, names='logits')
        assert torch.equal(out.tokens[r, -5:], one.tokens[0, -5:])
        assert close(out.cache['logits'][r, -5:], one.cache['logits'][0, -5:])


@pytest.mark.parametrize('family', ['mamba2', 'llama'])
def test_a_schedule_while_generating(family):
    model, by = mock(family), (2., -1., .25)
    d, u = along(model)
    ids, more = model.tokens(PROMPT)[0], 6
    def _hook(x):
        x = x.clone()
        for p in range(x.shape[1]): x[:, p] += (4*(1 if p < 9 else by[min(p - 9, 2)])*u).to(x)
        return x
    with Bare(model, {0: _hook}) as plain: want, logits = greedy(model, ids, more, plain.logits)
    with plan(push(d, 4., schedule=by)).on(model): out = model.generate(PROMPT, more, names='logits')
    assert torch.equal(out.tokens, want)
    assert close(out.cache['logits'][:, -more:], logits)


def test_the_order_of_steps_is_kept():
    model = mock('mamba2')
    d, u = along(model)
    e = d + 2*along(model, seed=1)[0]
    v = e.vector.double()/e.vector.double().norm()
    take, add = lambda x: x - (x @ u)[:, None]*u, lambda x: x + 9*v
    ids = model.tokens(PROMPT)[0]
    for steps, f in (((ablate(d), push(e, 9.)), lambda x: add(take(x))), ((push(e, 9.), ablate(d)), lambda x: take(add(x)))):
        with Bare(model, {0: put(range(99), f)}) as plain: want = plain.logits(ids)
        assert close(under(model, plan(*steps), PROMPT), want)
        assert close(under(model, plan(steps[0]) | steps[1], PROMPT), under(model, plan(*steps), PROMPT), 0)


# -- conditions --------------------------------------------------------------------------
def halfway(x, row=0):
    "A number that some of the tokens are above and some are not, the first not among them."
    return float(x[row].double().sort().values[-3:-1].mean())


@pytest.mark.parametrize('lasts', [False, True])
@pytest.mark.parametrize('family', ['mamba2', 'llama', 'rwkv7', 'hymba'])
def test_a_condition_holds_now_or_from_then_on(family, lasts):
    model, sae, more = mock(family), coder(family), 6
    d, u = along(model, LATE, 1)
    probe, v = along(model, RESID, 2)
    ids, mask = model.tokens(TEXTS, 'left')
    with Bare(model, {0: lambda x: seen.update(x=x.double()) or x}) as plain:
        seen = {}
        plain.logits(ids, mask)
    above = halfway(seen['x'] @ v)
    latent = int(((encoded(sae, seen['x'])[0] > .3).double().mean(0) - .4).abs().argmin())
    for when, read in ((points(3*probe, above, lasts), lambda x: x @ v > above),
                       (fires(sae, latent, .3, lasts), lambda x: encoded(sae, x)[..., latent] > .3)):
        now, true = {}, []
        def _look(x, read=read, now=now):
            on = read(x.double())
            on[:, :mask.shape[1]] &= mask.bool()
            now['on'] = on.int().cummax(1).values.bool() if lasts else on
            return x
        def _act(x, now=now, true=true):
            true.append(now['on'])
            return torch.where(now['on'][..., None], x + (7*u).to(x), x)
        def _logits(ids):
            longer = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], 1)
            return plain.logits(ids, longer)
        with Bare(model, {0: _look, 1: _act}) as plain: want, logits = greedy(model, ids, more, _logits)
        with plan(push(d, 7., when=when)).on(model): out = model.generate(TEXTS, more, names='logits')
        assert true[-1].any() and not true[-1].all()
        assert torch.equal(out.tokens, want)
        assert close(out.cache['logits'][:, -more:], logits)


def test_a_condition_on_the_state_is_read_step_by_step():
    model = mock('mamba2')
    s, u = along(model, 'blocks.0.ssm.state')
    d, v = along(model, LATE)
    ids = model.tokens(PROMPT)[0]
    states = oracle.run(model.hf, ids.numpy())['blocks.0.ssm.state']
    part = np.einsum('blhpn,hpn->bl', states, u.numpy())
    above = halfway(torch.from_numpy(part))
    on = [p for p in range(9) if part[0, p] > above]
    assert 0 < len(on) < 9
    with Bare(model, {1: put(on, lambda x: x + 5*v)}) as plain: want = plain.logits(ids)
    assert close(under(model, plan(push(d, 5., when=points(s, above))), PROMPT), want)
    state = plan(push(s, 5., at=[2], when=points(s, part[0, 2] - 1e-3)), push(s, 5., at=[4], when=points(s, 99.)))
    with pytest.warns(UserWarning, match='never true'): got = under(model, state, PROMPT)
    assert close(got, under(model, plan(write(s, 5., at=2)), PROMPT))


def test_edits_of_a_plan_can_be_used_again():
    "A condition that came true in one run is not true in the next."
    model = mock('mamba2')
    d, probe = along(model, LATE)[0], along(model, RESID, 2)[0]
    above = halfway(model.run_with_cache(PROMPT, RESID)[1][RESID] @ probe.unit.vector)
    edits = plan(push(d, 7., when=points(probe, above, lasts=True))).edits(model, PROMPT)
    first = model.run(PROMPT, edit=edits).logits
    assert torch.equal(model.run(PROMPT, edit=edits).logits, first)
    longer = model.generate(PROMPT, 4, edit=edits).tokens
    assert torch.equal(model.generate(PROMPT, 4, edit=edits).tokens, longer)


def test_a_condition_that_is_never_true_is_said_once_at_the_end():
    model = mock('llama')
    d, probe = along(model, LATE)[0], along(model)[0]
    never, always = points(probe, 1e6), points(probe, -1e6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        with plan(push(d, 1., when=never), push(d, 1., when=always), push(d, 1., at=40)).on(model):
            model.run('Hello')
            model.generate('Hello', 3)
            assert not said
        assert [str(w.message).split(';')[0] for w in said] == [f'never true: {never!r}', 'no text reached position 40']
        assert {w.filename for w in said} == {__file__}
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with plan(push(d, 1., when=always), push(d, 1., at=6)).on(model):
            model.run('Hello')
            model.generate('Hello', 3)
        with plan(push(d, 1., when=never)).on(model): pass                 # nothing was run


# -- beams and samples -------------------------------------------------------------------
def searched(family, texts, start=20, **options):
    "A plan, and the same on the bare model: a lasting condition, steps of one row, a write; what both generate."
    model = mock(family)
    ids, mask = model.tokens(texts, 'left')
    B, n = ids.shape
    real = torch.ones_like(ids) if mask is None else mask
    d, u = along(model, LATE, 1)
    own, w = along(model, LATE, 3)
    long, layer, now, seen, kinds = float(model.run_with_cache(texts, LATE)[1][LATE].norm(dim=-1).mean()), None, {}, {}, set()
    if model.recurrent():
        layer = model.recurrent()[-1]
        s, z = along(model, f'blocks.{layer}.ssm.state', 4)
    def _look(x):
        seen['x'] = x.double()
        on = x.double() @ v > above
        on[:, :n] &= real.repeat_interleave(len(x)//B, 0).bool()
        now['on'] = on.int().cummax(1).values.bool()
        kinds.update(now['on'][:, -1].tolist())
        return x
    def _act(x):
        x = torch.where(now['on'][..., None], x + (2*long*u).to(x), x)
        x[len(x)//B*(B - 1):, n:] += (1.5*long*w).to(x)
        return x
    def _change(block, t, a, S): return S(a) + 5*z if block == layer and t == n - 1 else S(a)
    plain = Bare(model, {0: _look, 1: _act}, _change if layer is not None else None)
    def _search():
        if 'seed' in options: torch.manual_seed(options['seed'])
        with plain: return plain.generate(ids, mask, **{k: v for k, v in options.items() if k != 'seed'})
    probe, v, above = None, along(model)[1], math.inf
    _search()
    for seed in range(start, start + 70):                                             # a probe that some of the texts trip
        probe, v = along(model, RESID, seed)
        part = seen['x'] @ v
        above = float(part[:, :n][real.repeat_interleave(len(part)//B, 0).bool()].max()) + 1e-3
        if .05 < (part[:, n:] > above).double().mean() < .5: break
    kinds.clear()
    want = _search()
    assert kinds == {True, False}
    steps = plan(push(d, 2*long, when=points(probe, above, lasts=True)), push(own, 1.5*long, rows=B - 1, at='generated'))
    if layer is not None: steps |= write(s, 5.)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with steps.on(model): got = model.generate(texts, 6, **options).tokens
    return model, want, got, steps


SEARCHES = [(texts, start) for start in (100, 300) for texts in ('Hello you', ['Hello you', 'Oh'])]


@pytest.mark.parametrize('family', ['mamba2', 'llama', 'rwkv7', 'jamba', 'hymba', 'falcon-h1'])
def test_beam_search_is_that_of_the_bare_model_without_a_cache(family, monkeypatch):
    moved = 0
    for texts, start in SEARCHES:
        model, want, got, _ = searched(family, texts, start, num_beams=3)
        assert torch.equal(got, want)
        moved += not torch.equal(model.generate(texts, 6, num_beams=3).tokens, want)
    assert moved
    monkeypatch.setattr(interventions._Gate, 'reorder', lambda self, rows: None)
    def _wrong(texts, start):
        _, want, got, _ = searched(family, texts, start, num_beams=3)
        return not torch.equal(got, want)
    assert any(_wrong(*s) for s in reversed(SEARCHES))                     # such beams do change places


def test_beams_of_a_padded_batch_of_a_model_with_biases():
    "Each is as if searched alone; transformers lets padding into the convolution here."
    torch.manual_seed(0)
    model = HookedModel(Mamba2ForCausalLM(small(257, use_bias=True)), mock('mamba2').tokenizer)
    both = model.generate(['Hello you', 'Oh'], 6, num_beams=3).tokens
    assert torch.equal(both[1, -6:], model.generate('Oh', 6, num_beams=3).tokens[0, -6:])


@pytest.mark.parametrize('family', ['mamba2', 'llama', 'rwkv7'])
@pytest.mark.parametrize('options', [dict(num_beams=3, num_return_sequences=3), dict(do_sample=True, num_return_sequences=3, seed=4),
                                     dict(do_sample=True, num_beams=2, num_return_sequences=2, seed=4)], ids=['beams', 'samples', 'both'])
def test_several_texts_of_a_prompt(family, options):
    _, want, got, _ = searched(family, ['Hello you', 'say'], **options)
    assert torch.equal(got, want)


# -- standing plans ----------------------------------------------------------------------
def test_nested_plans_apply_from_the_outermost_and_then_a_run_s_own_edits():
    model = mock('mamba2')
    d, u = along(model)
    e, v = along(model, seed=1)
    f = lambda x: x + 5*u - ((x + 5*u) @ v)[:, None]*v + 2*v
    ids = model.tokens(PROMPT)[0]
    with Bare(model, {0: put(range(99), f)}) as plain: want = plain.logits(ids)
    with plan(push(d, 5.)).on(model) as outer:
        assert outer.steps[0].kind == 'push'
        with plan(ablate(e)).on(model): assert close(model.run(PROMPT, edit=e.push(2.)).logits, want)
        assert len(model.standing) == 1
    assert not model.standing


def test_nothing_stands_after_an_exception():
    model = mock('mamba2')
    d, probe = along(model, LATE)[0], along(model)[0]
    clean, steps = model.run(PROMPT).logits, plan(push(d, 5., when=points(probe, -1e6, lasts=True)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        with pytest.raises(RuntimeError, match='mine'), steps.on(model):
            model.generate(PROMPT, 2, num_beams=2)
            raise RuntimeError('mine')
        with pytest.raises((TypeError, ValueError)), steps.on(model): model.generate(PROMPT, 2, nonsense_option=3)
        with pytest.raises(ValueError, match='empty prompt'), steps.on(model), steps.on(model): model.run('')
    assert torch.equal(model.run(PROMPT).logits, clean)


class After(StoppingCriteria):
    "Stops, or is interrupted, after some tokens."
    def __init__(self, length, error=None): self.length, self.error = length, error

    def __call__(self, ids, scores, **_):
        if ids.shape[1] >= self.length and self.error: raise self.error
        return torch.full((len(ids),), ids.shape[1] >= self.length)


@pytest.mark.parametrize('beams', [1, 3])
def test_generation_that_is_stopped_half_way(beams):
    model = mock('llama')
    d, probe = along(model, LATE)[0], along(model)[0]
    steps = plan(push(d, 5., when=points(probe, -1e6, lasts=True)))
    clean = model.run(PROMPT).logits
    with steps.on(model): whole = model.generate(PROMPT, 8, num_beams=beams).tokens
    with steps.on(model): out = model.generate(PROMPT, 8, num_beams=beams, stopping_criteria=StoppingCriteriaList([After(12)]))
    assert out.tokens.shape == (1, 12) and len(out.text) == 1
    if beams == 1: assert torch.equal(out.tokens, whole[:, :12])
    with pytest.raises(KeyboardInterrupt), steps.on(model):
        model.generate(PROMPT, 8, num_beams=beams, stopping_criteria=StoppingCriteriaList([After(12, KeyboardInterrupt())]))
    assert torch.equal(model.run(PROMPT).logits, clean)
    with steps.on(model):                                                  # a plan goes on standing where the error was caught
        try: model.generate(PROMPT, 8, stopping_criteria=StoppingCriteriaList([After(12, KeyboardInterrupt())]))
        except KeyboardInterrupt: pass
        assert torch.equal(model.generate(PROMPT, 8, num_beams=beams).tokens, whole)


def test_beams_of_several_threads_keep_their_conditions():
    jobs = {}
    for family in ('mamba2', 'llama'):
        model = mock(family)
        d, probe = along(model, LATE, 1)[0], along(model, RESID, 2)[0]
        above = float((model.run_with_cache(PROMPT, RESID)[1][RESID] @ probe.unit.vector).max())
        jobs[model] = plan(push(d, 9., when=points(probe, above, lasts=True)))
    def _search(model, found):
        with warnings.catch_warnings(), jobs[model].on(model):
            warnings.simplefilter('ignore')
            found.append(model.generate(PROMPT, 6, num_beams=3).tokens)
    alone, together = {m: [] for m in jobs}, {m: [] for m in jobs}
    for m in jobs: _search(m, alone[m])
    threads = [threading.Thread(target=lambda m=m: [_search(m, together[m]) for _ in range(4)]) for m in jobs]
    for t in threads: t.start()
    for t in threads: t.join()
    assert all(len(together[m]) == 4 and torch.equal(t, alone[m][0]) for m in jobs for t in together[m])


class Beside(StoppingCriteria):
    "While one searches, another thread searches the bare model."
    def __call__(self, ids, scores, **_):
        thread = threading.Thread(target=lambda: mock('llama').hf.generate(mock('llama').tokens('Oh')[0], num_beams=3, max_new_tokens=2, pad_token_id=0))
        thread.start()
        thread.join()
        return torch.zeros(len(ids), dtype=torch.bool)


def test_a_search_of_the_bare_model_in_another_thread_moves_no_condition():
    for texts, start in SEARCHES:
        _, want, got, _ = searched('falcon-h1', texts, start, num_beams=3, stopping_criteria=StoppingCriteriaList([Beside()]))
        assert torch.equal(got, want)


def test_a_run_that_goes_on_from_a_state_has_positions_that_count_on():
    model = mock('mamba2')
    d = along(model)[0]
    steps = plan(push(d, 5., at=[2, 7]), write(along(model, 'blocks.1.ssm.state')[0], 3., at=1))
    with steps.on(model):
        want = model.run(PROMPT).logits
    with plan(*steps.steps[1:], push(d, 5., at=2)).on(model): first = model.run(PROMPT[:5], keep_state=True)
    with steps.on(model): then = model.run(PROMPT[5:], state=first.state)
    assert close(torch.cat([first.logits, then.logits], 1), want)


# -- files -------------------------------------------------------------------------------
def everything(family='mamba2'):
    model = mock(family)
    d, s, sae = along(model)[0], along(model, 'blocks.1.ssm.state', heads=(2,))[0], coder(family)
    probe, other = along(model, RESID, 2)[0], coder(family, LATE, 5)
    return plan(push(d, 5., at='every:2', schedule=(1, .5)), hold(sae, 3, 1.5, at=slice(1, -1), rows=[0]),
                ablate(along(model, LATE, 2)[0], when=points(probe, .1, lasts=True)), write(s, 2., at=Token('l')),
                swap(along(model, 'blocks.0.ssm.state')[0], at=-1), decay(1, 3., [0, 1], at='prompt'),
                hold(other, 7, 2., at=[1, 2], when=fires(sae, 3, .05)))


def test_a_saved_plan_does_the_same_in_a_fresh_process(tmp_path):
    model, steps = mock('mamba2'), everything()
    with steps.on(model): want = model.generate(['Hello', 'all'], 6, names='logits')
    assert steps.save(tmp_path/'a'/'plan') == tmp_path/'a'/'plan'
    code = ('import sys, torch, warnings; from circuitbench.interventions import Interventions; from circuitbench.load import load_model\n'
            'torch.set_num_threads(1); model = load_model("mock://mamba2-tiny"); steps = Interventions.load(sys.argv[1])\n'
            'with steps.on(model): out = model.generate(["Hello", "all"], 6, names="logits")\n'
            'torch.save((out.tokens, out.cache["logits"], repr(steps)), sys.argv[2])')
    subprocess.run([sys.executable, '-c', code, tmp_path/'a'/'plan', tmp_path/'out'], check=True, timeout=120)
    tokens, logits, said = torch.load(tmp_path/'out', weights_only=True)
    assert torch.equal(tokens, want.tokens) and said == repr(steps)
    assert close(logits, want.cache['logits'], 1e-6)
    again = Interventions.load(tmp_path/'a'/'plan')
    assert again.steps[1].coder is again.steps[6].when.coder and again.steps[1].coder is not again.steps[6].coder
    assert [vars(s)['at'] for s in again.steps] == [vars(s)['at'] for s in steps.steps]
    plan().save(tmp_path/'a'/'plan')
    assert len(Interventions.load(tmp_path/'a'/'plan')) == 0 and repr(plan()) == 'no step'


def damage(folder, how):
    body = json.loads((folder/'plan.json').read_text())
    if how == 'no plan': (folder/'plan.json').unlink()
    elif how == 'no vectors': (folder/'vectors.safetensors').unlink()
    elif how == 'half the vectors': (folder/'vectors.safetensors').write_bytes((folder/'vectors.safetensors').read_bytes()[:200])
    elif how == 'no coder': (folder/'coder0').rename(folder/'elsewhere')
    elif how == 'half the plan': (folder/'plan.json').write_text((folder/'plan.json').read_text()[:300])
    else:
        if how == 'another version': body['version'] = 2
        if how == 'another format': body['format'] = 'x'
        if how == 'another kind': body['steps'][0]['kind'] = 'shove'
        if how == 'a strength of NaN': body['steps'][0]['value'] = math.nan
        if how == 'a missing field': del body['steps'][0]['site']
        if how == 'one field more': body['steps'][0]['colour'] = 1
        if how == 'another role': body['steps'][0]['at'] = 'middle'
        if how == 'a vector that is not there': body['steps'][0]['direction']['vector'] = '99'
        if how == 'a list': body = [body]
        (folder/'plan.json').write_text(json.dumps(body))


@pytest.mark.parametrize('how', [
    'no plan', 'no vectors', 'half the vectors', 'no coder', 'half the plan', 'another version', 'another format', 'another kind',
    'a strength of NaN', 'a missing field', 'one field more', 'another role', 'a vector that is not there', 'a list'])
def test_a_damaged_folder_is_said(how, tmp_path):
    everything().save(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(ValueError, match='cannot be read .*Interventions.save'): Interventions.load(tmp_path)


# -- what cannot be ----------------------------------------------------------------------
D = lambda **kw: along(mock('mamba2'), **kw)[0]
STATE = 'blocks.1.ssm.state'
NEVER = [
    (lambda: push(D(), math.nan), 'strength=nan'), (lambda: push(D(), math.inf), 'strength=inf'), (lambda: push(D(), '2'), 'finite'),
    (lambda: push(D(), True), 'finite'), (lambda: hold(coder('mamba2'), 3, math.nan), 'value=nan'), (lambda: push(0*D(), 1.), 'length'),
    (lambda: ablate(0*D()), 'length'), (lambda: points(0*D(), 1.), 'length'), (lambda: points(D(), math.nan), 'above=nan'),
    (lambda: fires(coder('mamba2'), 64), '0 to 63'), (lambda: fires(coder('mamba2'), -1), '0 to 63'), (lambda: hold(coder('mamba2'), 64, 1.), '0 to 63'),
    (lambda: hold(coder('mamba2'), 1.5, 1.), '0 to 63'), (lambda: push(D(), 1., at='middle'), "'middle', expected one of"),
    (lambda: push(D(), 1., at='every:0'), 'every:N'), (lambda: push(D(), 1., at=[]), 'at=()'), (lambda: push(D(), 1., at=meta(0)), 'prompt or after'),
    (lambda: push(D(), 1., rows=[]), 'rows=()'), (lambda: push(D(), 1., rows=-1), 'from 0'), (lambda: push(D(), 1., schedule=[math.nan]), 'schedule=nan'),
    (lambda: push(D(), 1., at='last', schedule=[1.]), 'generated ones'), (lambda: write(D(), 1.), 'ssm.state or ssm.write'),
    (lambda: write(D(site=STATE), 1., at='prompt'), 'written once'), (lambda: write(D(site=STATE), 1., at=[1, 2]), 'written once'),
    (lambda: swap(D()), 'ssm.state'), (lambda: swap(D(site=STATE), at=None), 'written once'), (lambda: decay(0, 0.), 'more than 0'),
    (lambda: decay(0, -1.), 'more than 0'), (lambda: decay(0, 2., heads=[]), 'heads=()'), (lambda: points(D(site=STATE, heads=(1,)), 1.), 'whole site'),
    (lambda: Step('shove', RESID), "'shove', expected"), (lambda: When(RESID, math.inf, D()), 'above=inf'),
    (lambda: hold(SAE(SAEConfig(32, 64, 8, RESID, normalize='layer_norm')), 1, 1.), 'rescales'),
    (lambda: hold(SAE(SAEConfig(16*8, 64, 8, STATE, shape=(16, 8), heads=(0, 1))), 1, 1.), 'several heads')]


@pytest.mark.parametrize('make, says', NEVER, ids=[str(i) for i in range(len(NEVER))])
def test_a_step_that_cannot_be(make, says):
    with pytest.raises(ValueError) as err: make()
    assert says in str(err.value) and str(err.value).startswith('got ') and len(str(err.value)) < 240


def test_a_plan_is_made_of_steps():
    with pytest.raises(TypeError, match='got Direction in a plan'): plan(D())
    with pytest.raises(TypeError, match='got Direction in a plan'): plan() | D()
    with pytest.raises(TypeError): push(D(), 1., where=3)


MISFITS = [(lambda: push(along(mock('llama'))[0], 1.), 'mock://llama-tiny'), (lambda: hold(coder('llama'), 1, 1.), 'mock://llama-tiny'),
           (lambda: push(D(), 1., when=fires(coder('llama'), 1)), 'mock://llama-tiny'),
           (lambda: push(Direction(numbers(9), RESID, mock('mamba2').name, 'v'), 1.), 'shape (9,), expected (32,)'),
           (lambda: push(Direction(numbers(32), 'blocks.*.resid_post', mock('mamba2').name, 'v'), 1.), 'blocks.*'),
           (lambda: push(Direction(numbers(32), 'blocks.0.ssm.y', mock('mamba2').name, 'v'), 1.), 'shape (32,), expected (4, 16)'),
           (lambda: decay(1, 2., heads=[4]), 'heads [4] of blocks.1.ssm.decay, expected 0 to 3'),
           (lambda: push(D(), 1., when=points(D(site=LATE), 1.)), 'earlier site'),
           (lambda: push(D(), 1., when=points(D(site='logits'), 1.)), 'earlier site'),
           (lambda: push(D(site='blocks.1.mixer_in'), 1., when=fires(coder('mamba2', LATE), 1)), 'earlier site')]


@pytest.mark.parametrize('make, says', MISFITS, ids=[str(i) for i in range(len(MISFITS))])
def test_a_step_of_another_model_site_or_width(make, says):
    steps, model = plan(make()), mock('mamba2')
    for use in (lambda: steps.check(model), lambda: steps.edits(model, PROMPT), lambda: steps.on(model).__enter__()):
        with pytest.raises(ValueError) as err: use()
        assert says in str(err.value) and not model.standing


def test_a_site_that_the_model_lacks():
    with pytest.raises(SiteError): plan(decay(0, 2.)).check(mock('llama'))
    with pytest.raises(SiteError): plan(decay(7, 2.)).check(mock('mamba2'))
    with pytest.raises(SiteError): plan(push(Direction(numbers(32), 'blocks.0.attn.out', mock('mamba2').name, 'v'), 1.)).check(mock('mamba2'))


OUTSIDE = [(dict(at=-10), 'positions from -9'), (dict(at=[0, -10]), 'positions from -9'), (dict(at=Token('z')), "Token(text='z')"),
           (dict(at=Token('H'), rows=1), "Token(text='H')"), (dict(rows=2), 'rows [2] for 2 prompts')]


@pytest.mark.parametrize('where, says', OUTSIDE, ids=[str(w) for w, _ in OUTSIDE])
def test_a_place_outside_the_text(where, says):
    model, steps = mock('mamba2'), plan(push(D(), 1., **where))
    with steps.on(model), pytest.raises(ValueError) as err: model.run(['Hello you', 'Oh'], pad='left')
    assert says in str(err.value)
    with pytest.raises(ValueError): steps.edits(model, ['Hello you', 'Oh'])


def test_a_text_that_ends_before_the_prompt_does():
    model = mock('mamba2')
    with plan(push(D(), 1., at=7)).on(model, length=9), pytest.raises(ValueError, match='position 7'): model.run('Hello')
    with plan(push(D(), 1.)).on(model, length=0), pytest.raises(ValueError, match='length=0'): model.run('Hello')


APART = [(dict(at=1), dict(at=2)), (dict(rows=0), dict(rows=[1, 2])), (dict(at='prompt'), dict(at='generated')), (dict(at='last'), dict(at='generated')),
         (dict(at=-1), dict(at=[0, 1])), (dict(at=Token('H')), dict(at=Token('e'))), (dict(at=slice(0, 3)), dict(at=slice(3, None))),
         (dict(at='generated', rows=0), dict(at='generated', rows=1)), (dict(at=-1), dict(at='generated')), (dict(at='every:2'), dict(at=slice(1, None, 2)))]
AT_ONCE = [({}, {}), (dict(at=1), dict(at=[1, 2])), (dict(at='last'), {}), (dict(at='generated'), dict(at='generated')), (dict(rows=[0, 1]), dict(rows=1)),
           (dict(at=Token('H')), dict(at=Token('H'))), (dict(rows=0), {})]
IN_A_RUN = [(dict(at=-1), dict(at=8)), (dict(at='last'), dict(at='prompt')), (dict(at='last'), dict(at=-1)), (dict(at=Token('H')), dict(at=0)),
            (dict(at='generated'), dict(at=[3, 12])), (dict(at=slice(2, None)), dict(at='generated')), (dict(at='every:2'), dict(at=[4]))]


def pair(a, b, values=(1., 2.), sae=None): return [hold(sae or coder('mamba2'), 3, v, **kw) for v, kw in zip(values, (a, b))]


@pytest.mark.parametrize('a, b', APART)
def test_holds_that_do_not_meet(a, b):
    steps = plan(*pair(a, b))
    assert len(steps) == 2 and steps.edits(mock('mamba2'), ['Hello you', 'Hey there', 'He is ill'])


@pytest.mark.parametrize('a, b', AT_ONCE)
def test_holds_that_contradict_in_any_prompt(a, b):
    with pytest.raises(ValueError, match='one activation of the latent'): plan(*pair(a, b))
    with pytest.raises(ValueError, match='one activation of the latent'): plan(pair(a, b)[0]) | pair(a, b)[1]
    plan(*pair(a, b, (2., 2.)), pair(a, b, sae=coder('mamba2', LATE, 5))[0])
    plan(hold(coder('mamba2'), 3, 1., **a), hold(coder('mamba2'), 4, 2., **b))


@pytest.mark.parametrize('a, b', IN_A_RUN)
def test_holds_that_contradict_in_this_prompt(a, b):
    steps, model = plan(*pair(a, b)), mock('mamba2')
    with steps.on(model), pytest.raises(ValueError, match='one activation of the latent'): model.run(PROMPT)
