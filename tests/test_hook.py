"""Every family: sites against a float64 model written apart, edits that propagate, generation, padding, gradients,
and hooks that go away.
"""
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import oracle
import pytest
import torch
from checkpoints import in_float64
from exact import float64

from circuitbench.edit import add, apply, mean, meta, patch, scale, zero
from circuitbench.hook import HookedModel
from circuitbench.load import load_model
from circuitbench.seam import attention_functions, home
from circuitbench.site import SiteError, families, short
from circuitbench.wiring import listening


def top(x): return float(x.detach().abs().max())


def tilt(x): return x + torch.randn(x.shape[2:], generator=torch.Generator().manual_seed(0))   # norms take a constant away


def firsts(names):
    "Each kind of site in the first block that has it."
    return list({short(n): n for n in reversed(list(names))}.values())


def outer(names):
    "Each kind of site in the first block that has it and in the last."
    return list(dict.fromkeys([*firsts(names), *firsts(list(names)[::-1])]))


@contextmanager
def kept(model):
    "What RWKV-7's removal looks for in its first block, normalise(k_raw k_k): it has no site. Empty for the others."
    kappa, mixer = [], getattr(model.blocks[0], 'attn', None)
    def note(m, args, out):
        heads = (out.double()*mixer.k_k.double()).unflatten(-1, mixer.heads)
        kappa.append(heads/heads.norm(dim=-1, keepdim=True))
    handle = mixer.k_proj.register_forward_hook(note) if model.adapter.family == 'rwkv7' else None
    yield kappa
    if handle: handle.remove()


def clean(model):
    "No hook is left and the module's functions are transformers' own."
    functions = [getattr(*home(model.module, name)) for name in model.adapter.functions]
    own = not any('<locals>' in getattr(f, '__qualname__', '') or isinstance(f, attention_functions) for f in functions)
    return own and not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def test_every_site_equals_the_float64_model(mamba, ids):
    truth = oracle.run(mamba.hf, ids)
    out, cache = mamba.run_with_cache(ids, '*')
    assert set(cache) == set(truth) == set(mamba._names)
    for name, want in truth.items():
        assert tuple(cache[name].shape) == want.shape == mamba.site_shape(name, *ids.shape), name
        assert top(cache[name].double() - torch.from_numpy(want)) <= 3e-6*max(1, abs(want).max()), name


def test_logits_equal_transformers(model, ids):
    theirs = model.hf(ids, use_cache=False).logits
    for ours in (model.run(ids).logits, model.run_with_cache(ids)[0].logits, model.run_with_cache(ids, '*')[0].logits):
        assert top(ours - theirs) <= 2e-5*top(theirs)           # within 1e-5 on the checkpoints of test_families
    assert torch.equal(model.run(ids, backend='transformers').logits, theirs)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_other_dtypes(mamba, ids, dtype):
    other = load_model(mamba.name, dtype=dtype)
    truth = torch.from_numpy(oracle.run(other.hf, ids)['logits'])
    ours, theirs = (other.run(ids, backend=b).logits.double() for b in ('circuitbench', 'transformers'))
    assert other.run_with_cache(ids, 'ssm.out_proj_in')[1]['blocks.0.ssm.out_proj_in'].dtype == dtype
    if dtype == torch.float64: assert top(ours - truth) < 1e-5     # A and the rms norms stay float32 in transformers
    else: assert top(ours - truth) <= 1.2*top(theirs - truth) < .2*top(truth)


def has_state(model): return 'ssm.state' in {short(n) for n in model._names}


def test_zero_strength_is_the_clean_run_bit_for_bit(model, ids):
    want = model.run(ids).logits
    for name in outer(model._names): assert torch.equal(model.run(ids, edit=0*zero(name)).logits, want), name
    s = torch.zeros((), requires_grad=True)
    kept = model.run(ids, edit=s*zero('blocks.0.ssm.state' if has_state(model) else 'blocks.0.resid_pre', at=4)).logits
    assert kept.requires_grad and top(kept - want) < 1e-5*top(want)


def test_an_identity_edit_changes_nothing_at_any_kind_of_site(model, ids):
    want = model.run(ids).logits
    for name in outer(model._names):
        got = model.run(ids, edit=apply(name, lambda x: x.clone())).logits
        assert top(got - want) < 1e-5*top(want), name


def test_an_edit_at_t_changes_nothing_before_t_and_something_after(model, ids):
    cut = add('blocks.*.ssm.state', torch.zeros(()), at=8) if has_state(model) else ()   # the scan is cut at the same step in both runs
    want = model.run(ids, edit=cut).logits
    for name in outer(model._names):
        change = (model.run(ids, edit=[apply(name, tilt, at=8), *cut]).logits - want).abs().amax((0, 2))
        # not zero before t, by rounding: B and C of one head each take the loop
        assert top(change[:8]) < 1e-5*top(want) and top(change[8:]) > 1e-4, name


def test_state_edit_goes_on_as_the_equations_say(recurrent, ids):
    "A change D of a state reaches step s as (the product of the decays) D, within one block with fixed inputs."
    name, t = 'blocks.0.ssm.state', 5
    shape = recurrent.site_shape(name, 2, 1)
    delta = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    with kept(recurrent) as kappa: _, before = recurrent.run_with_cache(ids, 'blocks.0.ssm.*')
    _, after = recurrent.run_with_cache(ids, ['blocks.0.ssm.state', 'blocks.0.ssm.y'], edit=add(name, delta, at=t))
    site, want = lambda n, s: before[f'blocks.0.ssm.{n}'][:, s].double(), [delta[:, 0].double()]
    learns = recurrent.adapter.family == 'titans'                           # whose next chunk takes its gradients elsewhere
    end = 8 if learns else ids.shape[1]
    for s in range(t + 1, end):
        a, D = site('decay', s), want[-1]
        left = D*(a[..., None, None] if a.dim() == 2 else a[:, :, None])
        if 'blocks.0.ssm.erase' in before:                                  # the removal looks for the key of the write
            found = D @ kappa[0][:, s, ..., None] if kappa else left @ site('B', s)[..., None]
            left = left - found*site('erase', s)[..., None, :]
        want.append(left)
    want = torch.stack(want, 1)
    assert top((after[name] - before[name])[:, t:end].double() - want) < 2e-5*max(1, top(before[name]))
    if learns: return                                                       # a deep memory is read otherwise: test_titans
    read = torch.einsum('blhpn,blhn->blhp', want, before['blocks.0.ssm.C'][:, t:].double())
    assert top((after['blocks.0.ssm.y'] - before['blocks.0.ssm.y'])[:, t:].double() - read) < 2e-5*max(1, top(read))


def test_edits_of_decay_and_write(recurrent, ids):
    _, forget = recurrent.run_with_cache(ids, 'blocks.0.ssm.state', edit=zero('blocks.0.ssm.decay', at=6))
    _, cache = recurrent.run_with_cache(ids, ['blocks.0.ssm.state', 'blocks.0.ssm.write'])
    forgotten = forget['blocks.0.ssm.state'][:, 6] - cache['blocks.0.ssm.write'][:, 6]
    assert (top(forgotten) < 1e-6) == (recurrent.adapter.family != 'rwkv7')    # there the removal looks into the undecayed state
    silence = zero('blocks.0.ssm.write') | (zero('blocks.0.ssm.write', at=meta()) if recurrent.meta else ())
    _, deaf = recurrent.run_with_cache(ids, 'blocks.0.ssm.state', edit=silence)
    if recurrent.adapter.family != 'titans': assert top(deaf['blocks.0.ssm.state']) == 0
    else:                                                                   # begins with weights that it has learned, and they fade
        fades = recurrent.run_with_cache(ids, 'blocks.0.ssm.decay')[1]['blocks.0.ssm.decay'].cumprod(1)[..., None, None]
        assert top(deaf['blocks.0.ssm.state'] - fades*recurrent.blocks[0].mixer.memory) < 1e-6


def test_heads_and_positions(recurrent, ids):
    out, cache = recurrent.run_with_cache(ids, ['ssm.y', 'ssm.state', 'resid_post'], at=[3, -1], heads=[0, 1])
    _, full = recurrent.run_with_cache(ids, ['ssm.y', 'ssm.state', 'resid_post'])
    assert cache.positions('blocks.0.ssm.state') == [3, 20]
    for n in cache:
        want, tol = full[n][:, [3, 20]], 5e-5 if 'resid' in n else 5e-6     # gated norms blow up the rounding of heads that say little
        assert top(cache[n] - (want if 'resid' in n else want[:, :, [0, 1]])) < tol*max(1, top(want)), n
    _, changed = recurrent.run_with_cache(ids, 'blocks.0.ssm.y', edit=scale('blocks.0.ssm.y', 2., at=3, heads=[0, 1]))
    want = full['blocks.0.ssm.y'].clone()
    want[:, 3, [0, 1]] *= 2
    assert top(changed['blocks.0.ssm.y'] - want) < 1e-5


def test_positions_come_ascending_and_once(recurrent, ids):
    _, full = recurrent.run_with_cache(ids, ['ssm.y', 'ssm.state'])
    _, cache = recurrent.run_with_cache(ids, ['ssm.y', 'ssm.state'], at=[7, 2, 7])
    for n in cache:
        assert cache.positions(n) == [2, 7] and top(cache[n] - full[n][:, [2, 7]]) < 5e-6*max(1, top(full[n])), n
    source = full['blocks.0.ssm.y'][:, [7, 2]]                                # rows as the positions are listed
    _, same = recurrent.run_with_cache(ids, 'blocks.0.ssm.y', edit=patch('blocks.0.ssm.y', source, at=[7, 2]))
    assert top(same['blocks.0.ssm.y'] - full['blocks.0.ssm.y']) < 1e-5


def test_prompts_may_be_arrays(model):
    want = model.run([[1, 2, 3], [4, 5, 6]]).logits
    assert torch.equal(model.run(np.array([[1, 2, 3], [4, 5, 6]])).logits, want)


def test_interchange_gives_the_other_run(model, ids):
    "Patch the whole residual stream after the last block and get the other run."
    other = ids.roll(1, 0)
    name = f'blocks.{model.n_layers - 1}.resid_post'
    want, source = model.run_with_cache(other, 'blocks.*.resid_post')
    got = model.run(ids, edit=patch(name, source[name])).logits
    assert top(got - want.logits) < 1e-5
    _, averaged = model.run_with_cache(ids, name, edit=mean(name, source[name]))
    assert top(averaged[name] - source[name].mean((0, 1))) < 1e-6


def test_generation_equals_uncached(model, ids):
    edit = add('embed', torch.full((), .2), at=[3, 22]) | scale(model.hook_point, 1.5, at=slice(20, None))
    if has_state(model): edit = add('ssm.state', torch.full((), .5), at=[3, 22]) | edit
    for e in ((), edit):
        gen = model.generate(ids, 6, edit=e, names='*')
        grown = ids
        for _ in range(6):
            reached = [x.at([p for p in x.pos if p < grown.shape[1]]) if isinstance(x.pos, tuple) else x for x in e]
            grown = torch.cat([grown, model.run(grown, edit=reached).logits[:, -1:].argmax(-1)], 1)
        assert torch.equal(gen.tokens, grown)
        _, cache = model.run_with_cache(grown[:, :-1], '*', edit=e)
        for n in cache:
            pos = gen.cache.positions(n)
            first = 20 if n == 'logits' else 0                 # transformers computes just a prompt's last logits
            assert pos == list(range(first, 26)) and gen.cache[n].shape[1] == len(pos), n
            assert top(gen.cache[n] - cache[n][:, pos]) < 5e-5*max(1, top(cache[n])), n
    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, 6).tokens, model.hf.generate(ids, **options))


def test_a_prompt_in_two_pieces_is_the_prompt(model, ids):
    "transformers alone starts Mamba-1's second piece from an empty state."
    ear = model._listener((), (), None, None, None, ids.shape, ids.shape[1], False)
    with listening(model, ear, 'circuitbench', cached=True), torch.no_grad():
        first = model.hf(ids[:, :9], use_cache=True)
        name = next(n for n in ('cache', 'past_key_values', 'cache_params') if n in first)
        place = {'position_ids': torch.arange(9, 21)[None]} if model.adapter.family == 'bamba' else {}   # it starts at 0 else
        second = model.hf(ids[:, 9:], **{name: first[name]}, **place, use_cache=True)
    want = model.run(ids).logits
    assert top(torch.cat([first.logits, second.logits], 1) - want) < 1e-5*top(want)


@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_does_not_matter(model, side):
    texts = ['A short one', 'A text that is rather longer than the first']
    out, cache = model.run_with_cache(texts, [model.hook_point, 'resid_post'], pad=side)
    for i, text in enumerate(texts):
        alone, own = model.run_with_cache(text, [model.hook_point, 'resid_post'])
        rows = out.mask[i].bool()
        assert max(top(out.logits[i][rows] - alone.logits[0]), top(out.last[i] - alone.logits[0, -1])) < 1e-5*top(alone.logits)
        for n in own: assert top(cache[n][i][rows] - own[n][0]) < 5e-5, n
    together, alone = model.generate(texts, 5), [model.generate(t, 5) for t in texts]
    assert together.text == [a.text[0] for a in alone]


def test_gradients_equal_finite_differences_in_float64(model, ids):
    exact = HookedModel(in_float64(model.hf))
    with float64(exact.hf):
        out, cache = exact.run_with_cache(ids, '*', grad=True)
        grads = cache.grad(out.logits[0, -1, 3])
        g, eps = torch.Generator().manual_seed(2), 1e-7
        for name in firsts(cache):                                         # whose gradients come through all blocks behind
            v = torch.randn(grads[name].shape, generator=g, dtype=torch.float64)
            up, down = (exact.run(ids, edit=add(name, sign*eps*v)).logits[0, -1, 3] for sign in (1, -1))
            want, got = (up - down)/(2*eps), (grads[name]*v).sum()
            assert abs(want - got) <= 2e-5*max(1, abs(want)), (name, float(want), float(got))


def test_a_gradient_does_not_depend_on_what_else_is_read(recurrent, ids):
    "A decay read alone is on the way to the read-outs, although the scan need not stop there to read it."
    out, every = recurrent.run_with_cache(ids, 'blocks.0.*', grad=True)
    want = every.grad(out.logits[0, -1, 3])
    for name in (n for n in want if '.ssm.' in n):
        out, cache = recurrent.run_with_cache(ids, name, grad=True)
        got = cache.grad(out.logits[0, -1, 3])[name]
        assert top(got - want[name]) <= 1e-4*max(1e-3, top(want[name])) and top(got) > 0, name


def test_nothing_stays_behind(model, ids):
    def fail(x): raise RuntimeError('stop')
    for name in firsts(model._names):
        with pytest.raises(RuntimeError, match='stop'): model.run(ids, edit=apply(name, fail))
        assert clean(model), name
    with pytest.raises(RuntimeError, match='stop'): model.generate(ids, 3, edit=apply(model.hook_point, fail, at=22))
    assert clean(model)
    model.run_with_cache(ids, '*')
    assert clean(model)


def test_errors_say_what_was_got_and_expected(mamba, ids):
    with pytest.raises(SiteError, match=r'expected one of blocks 0-1'): mamba.run_with_cache(ids, 'blocks.7.ssm.y')
    with pytest.raises(SiteError, match='nearest: .*ssm.state'): mamba.run_with_cache(ids, 'blocks.0.ssm.stat')
    with pytest.raises(SiteError, match='is not there'): mamba.run(ids, edit=zero('blocks.0.attn.q'))
    with pytest.raises(ValueError, match='got position 40 .* expected -21 to 20'):
        mamba.run(ids, edit=zero('ssm.y', at=40))
    with pytest.raises(ValueError, match='has no heads'): mamba.run(ids, edit=zero('resid_post', heads=1))
    with pytest.raises(ValueError, match='expected 0 to'): mamba.run_with_cache(ids, 'ssm.y', heads=999)
    with pytest.raises(ValueError, match='empty prompt'): mamba.run('')
    with pytest.raises(ValueError, match='token ids'): mamba.run([5, 9999])
    with pytest.raises(ValueError, match='backend'): mamba.run(ids, backend='jax')
    with pytest.raises(ValueError, match='cannot be listened to'):
        mamba.run_with_cache(ids, 'ssm.state', backend='transformers')
    with pytest.raises(ValueError, match='finite'): mamba.run(ids, edit=float('nan')*zero('ssm.y'))
    with pytest.raises(ValueError, match='backend'): mamba.generate(ids, 2, backend='jax')
    for heads in (-1, []):
        with pytest.raises(ValueError, match='expected'): mamba.run(ids, edit=zero('ssm.y', heads=heads))
        with pytest.raises(ValueError, match='expected 0 to'): mamba.run_with_cache(ids, 'ssm.y', heads=heads)
    unread = zero('ssm.y', at=22)                                             # of the last token, which is never read
    with pytest.raises(ValueError, match='got position 22'): mamba.generate(ids, 2, edit=unread)
    with pytest.raises(ValueError, match='empty prompt'): mamba.run([])
    with pytest.raises(TypeError, match='expected Edit'): mamba.run(ids, edit=['ssm.y'])
    assert clean(mamba)


def test_what_does_not_fit_is_refused_before_it_runs(mamba):
    endless = torch.zeros(1, 1, dtype=torch.long).expand(1, 2**27)
    with pytest.raises(ValueError, match=r'GiB .* free'): mamba.run(endless)
    share, mamba.share = mamba.share, 1e-9
    try:
        with pytest.raises(ValueError, match=r'ways out: at='): mamba.run_with_cache([1, 2, 3], 'ssm.state')
        mamba.run([1, 2, 3])
    finally: mamba.share = share


def test_families_are_what_the_design_names():
    assert {'mamba1', 'mamba2'} <= set(families())


def test_runs_of_several_threads_do_not_hear_each_other():
    models = [load_model(f'mock://{name}-tiny') for name in ('mamba2', 'falcon-h1', 'mamba2')]
    ids, site = [torch.arange(40 + i)[None] for i in range(12)], 'blocks.1.ssm.state'
    def run(i):
        edit = (zero(site, at=i),) if i % 2 else ()
        return models[i % 3].run_with_cache(ids[i], site, edit=edit)[1][site]
    alone = [run(i) for i in range(12)]
    with ThreadPoolExecutor(4) as threads: beside = list(threads.map(run, range(12)))
    assert all(torch.equal(a, b) for a, b in zip(alone, beside))
