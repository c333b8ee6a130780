"""Titans: its memory against numpy and against the delta rule, what an edit of each part does, what it keeps between calls."""
import numpy as np
import oracle_titans as oracle
import pytest
import torch
from checkpoints import random_model
from transformers import AutoModelForCausalLM, DynamicCache

from circuitbench.delta import delta_chunk
from circuitbench.edit import apply, scale, zero
from circuitbench.hook import HookedModel
from circuitbench.load import load_model
from circuitbench.models.titans import TitansConfig, small
from circuitbench.titans_memory import Memory, chunk_starts, recall, surprise, titans_loop, titans_scan

FORMS = ['mag', 'mac']
KINDS = [(False, 1), (False, 5), (True, 1), (True, 4), (True, 32)]         # deep, tokens of a chunk


def inputs(deep, batch=2, length=13, heads=3, n=4, units=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    v, k, q = draw(3, batch, length, heads, n)
    decay, theta, eta = torch.sigmoid(draw(3, batch, length, heads))
    W, S, A = draw(3, batch, heads, 2*units if deep else n, n)/2
    k, q = (torch.nn.functional.normalize(x, dim=-1) for x in (k, q))
    return v, k, q, decay, theta/4, eta, Memory(W, S, A)


def starts(batch, length, chunk): return chunk_starts(torch.arange(length).expand(batch, length), chunk)
def tokens(length, batch=1, seed=0): return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))
def opened(form='mag', **changes): return HookedModel(random_model('titans', dict(form=form) | changes))


@pytest.mark.parametrize('clip', [None, 3.])
@pytest.mark.parametrize('deep, chunk', KINDS)
def test_loop_and_scan_equal_numpy(deep, chunk, clip):
    *x, memory = inputs(deep)
    begins = starts(2, 13, chunk)
    (y, states), (fast, end) = titans_loop(*x, memory, deep, begins, states=True, clip=clip), titans_scan(*x, memory, deep, begins, clip=clip)
    for b in range(2):
        want = oracle.memory(*(v[b].numpy() for v in x), memory.weights[b].numpy(), deep, chunk, memory.momentum[b].numpy(), clip)
        if clip: assert 0 < (np.linalg.norm(want['surprise'], axis=(2, 3)) > clip - 1e-9).mean() < 1         # some are cut, some are not
        for got, name in ((y[b], 'y'), (states[b], 'state'), (fast[b], 'y')): np.testing.assert_allclose(got, want[name], atol=1e-12)
        for got, name in ((end.weights[b], 'state'), (end.momentum[b], 'momentum')): np.testing.assert_allclose(got, want[name][-1], atol=1e-12)


@pytest.mark.parametrize('deep', [False, True])
def test_the_surprise_is_the_gradient_of_the_loss(deep):
    v, k, _, _, _, _, memory = inputs(deep)
    W = memory.weights.clone().requires_grad_()
    loss = (recall(W, k[:, 3, :, None], deep)[:, :, 0] - v[:, 3]).square().sum()
    assert torch.allclose(surprise(W, k[:, 3], v[:, 3], deep), torch.autograd.grad(loss, W)[0], atol=1e-12)
    by_hand = oracle.gradient(memory.weights[1, 2].numpy(), k[1, 3, 2].numpy(), v[1, 3, 2].numpy(), deep)
    np.testing.assert_allclose(surprise(W, k[:, 3], v[:, 3], deep)[1, 2].detach(), by_hand, atol=1e-12)


@pytest.mark.parametrize('clip', [None, 3.])
@pytest.mark.parametrize('deep, chunk', KINDS)
def test_the_scan_has_the_loops_gradient(deep, chunk, clip):
    *x, memory = inputs(deep)
    leaves = [v.requires_grad_() for v in (*x, memory.weights, memory.momentum)]
    weigh = torch.randn(2, 13, 3, 4, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    grads = [torch.autograd.grad((f(*x, memory, deep, starts(2, 13, chunk), clip=clip)[0]*weigh).sum(), leaves) for f in (titans_loop, titans_scan)]
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in zip(*grads))


def test_the_gradient_is_a_finite_difference():
    *x, memory = inputs(True, batch=1, length=5, heads=1, n=2, units=2)
    leaves = [v.requires_grad_() for v in (*x, memory.weights)]
    run = lambda *v: titans_scan(*v[:6], Memory(v[6], memory.momentum, memory.anchor), True, starts(1, 5, 2))[0]
    assert torch.autograd.gradcheck(run, leaves)


def test_one_layer_without_momentum_is_the_gated_delta_rule():
    v, k, q, decay, theta, _, memory = inputs(False)
    y, end = titans_scan(v, k, q, decay, theta, torch.zeros_like(theta), memory._replace(momentum=0*memory.momentum), False, starts(2, 13, 1))
    beta = 2*theta
    want, S = delta_chunk(beta[..., None]*v, k, q, decay.log(), k, beta, memory.weights)
    assert torch.allclose(y, want, atol=1e-10) and torch.allclose(end.weights, S, atol=1e-10)


@pytest.mark.parametrize('deep, chunk', KINDS)
def test_padding_in_a_row_is_passed_over(deep, chunk):
    *x, memory = inputs(deep)
    real = torch.ones(2, 13, dtype=torch.bool)
    real[0, :4], real[1, 9:] = False, False
    begins = chunk_starts((real.cumsum(1) - 1).clamp(min=0), chunk, real)
    for f in (titans_loop, titans_scan):
        y, end = f(*x, memory, deep, begins, real)
        for b in range(2):
            some, here = [v[b:b + 1, real[b]] for v in x], Memory(*(v[b:b + 1] for v in memory))
            alone, last = titans_loop(*some, here, deep, starts(1, 9, chunk))
            assert torch.allclose(y[b, real[b]], alone[0]) and torch.allclose(end.weights[b], last.weights[0]) and torch.allclose(end.momentum[b], last.momentum[0])


def fed(model, ids, **edits):
    "The numpy memory of block 0 under a run's own inputs: f of W or S at a step, as `oracle.memory` would have it."
    sites = [f'blocks.0.ssm.{n}' for n in 'x B C decay dt eta'.split()]
    _, cache = model.run_with_cache(ids, sites)
    v, k, q, decay, theta, eta = (cache[n][0].double().numpy() for n in sites)
    c, W = model.config, model.blocks[0].mixer.memory.double().numpy()
    S, deep, states = np.zeros_like(W), c.memory_depth == 2, []
    for t in range(len(v)):
        if t % c.memory_chunk == 0: anchor = W.copy()
        G = np.stack([oracle.gradient(anchor[h], k[t, h], v[t, h], deep) for h in range(len(W))])
        G = edits.get('surprise', lambda x, t: x)(G, t)
        S = edits.get('momentum', lambda x, t: x)(eta[t, :, None, None]*S - theta[t, :, None, None]*G, t)
        W = edits.get('state', lambda x, t: x)(decay[t, :, None, None]*W + edits.get('write', lambda x, t: x)(S, t), t)
        states.append(W)
    return np.stack(states)


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('name', ['surprise', 'momentum', 'write', 'state'])
def test_what_is_edited_at_a_step_is_gone_on_from(form, name):
    "Tripled at step 5: block 0 of MAG goes on as numpy does, of MAC until the attention of the next segment has read it."
    model, ids = opened(form, memory_chunk=3, window=8), tokens(17)
    _, cache = model.run_with_cache(ids, 'blocks.0.ssm.state', edit=scale(f'blocks.0.ssm.{name}', 3., at=5))
    want = fed(model, ids, **{name: lambda x, t: 3*x if t == 5 else x})
    clean = fed(model, ids)
    upto = 17 if form == 'mag' else 8
    np.testing.assert_allclose(cache['blocks.0.ssm.state'][0, :upto], want[:upto], atol=3e-5)
    changed = np.abs(want - clean).max((1, 2, 3)) > 1e-4
    assert not changed[:5].any() and changed[5:8].all()


@pytest.mark.parametrize('form', FORMS)
def test_a_surprise_is_cut_where_the_model_says_so(form):
    ids, sites = tokens(17), [f'blocks.0.ssm.{n}' for n in 'x B C decay dt eta surprise state y'.split()]
    norms = opened(form).run_with_cache(ids, sites[6])[1][sites[6]].flatten(3).norm(dim=3)
    clip = norms.median().item()
    assert norms.max() > 1.2*clip
    model = opened(form, max_surprise=clip)
    _, cache = model.run_with_cache(ids, sites)
    s, mixer, c = {n.split('.')[-1]: cache[n][0].double().numpy() for n in sites}, model.blocks[0].mixer, model.config
    want = oracle.memory(*(s[n] for n in 'x B C decay dt eta'.split()), mixer.memory.double().numpy(), True, c.memory_chunk, clip=clip)
    for name in ('surprise', 'state', 'y'): np.testing.assert_allclose(s[name], want[name], atol=3e-5, err_msg=name)
    norms = np.linalg.norm(s['surprise'], axis=(2, 3))
    assert norms.max() < 1.0001*clip and .05 < (norms < .999*clip).mean() < .95
    with pytest.raises(ValueError, match='max_surprise=-1'): opened(form, max_surprise=-1.)


def test_a_write_goes_once_and_momentum_goes_on():
    "Erasing the write of a step leaves the next one's momentum as it was; erasing the momentum does not."
    model, ids = opened(memory_depth=1, memory_chunk=32), tokens(12)
    site = 'blocks.0.ssm.momentum'
    clean, write, momentum = (model.run_with_cache(ids, site, edit=e)[1][site][0] for e in (
        (), zero('blocks.0.ssm.write', at=5), zero(site, at=5)))
    assert torch.allclose(clean, write, atol=1e-6) and not torch.allclose(clean[6], momentum[6], atol=1e-6) and (momentum[5] == 0).all()


def test_gates_can_be_edited():
    "With no step nothing is learned: the weights only fade, by the decays."
    model, ids = opened(), tokens(12)
    _, cache = model.run_with_cache(ids, ['blocks.0.ssm.state', 'blocks.0.ssm.decay'], edit=zero('blocks.0.ssm.dt'))
    fades = cache['blocks.0.ssm.decay'][0].double().numpy().cumprod(0)[..., None, None]
    np.testing.assert_allclose(cache['blocks.0.ssm.state'][0], fades*model.blocks[0].mixer.memory.double().numpy(), atol=1e-6)


def test_between_segments_only_the_memory_speaks():
    "Without steps, and without a convolution that looks back, a segment of MAC knows nothing of the ones before it."
    model = opened('mac', window=6, memory_conv=1)
    a, b = tokens(18), torch.cat([tokens(6, seed=3), tokens(18)[:, 6:]], 1)
    off = [zero('ssm.dt'), apply('ssm.decay', torch.ones_like)]
    (one, two), (free, other) = ([model.run(x, edit=e).logits[0, 6:] for x in (a, b)] for e in (off, ()))
    assert torch.allclose(one, two, atol=1e-6) and float((free - other).abs().max()) > 1e-3


def test_beyond_the_window_only_the_memory_speaks():
    model = opened('mag', window=3, memory_conv=1, num_hidden_layers=2)
    a, b = tokens(18), torch.cat([tokens(2, seed=3), tokens(18)[:, 2:]], 1)
    off = [zero('ssm.dt'), apply('ssm.decay', torch.ones_like)]
    (one, two), (free, other) = ([model.run(x, edit=e).logits[0, 6:] for x in (a, b)] for e in (off, ()))
    assert torch.allclose(one, two, atol=1e-6) and float((free - other).abs().max()) > 1e-3


@pytest.mark.parametrize('form', FORMS)
def test_pieces_with_padding_equal_the_whole(form):
    "Rows whose chunks and segments begin at other columns, in pieces of any size."
    hf, ids = random_model('titans', dict(form=form, memory_chunk=3, window=5)), tokens(23, 3)
    mask = torch.ones(3, 23, dtype=torch.long)
    mask[1, :4], mask[2, :1] = 0, 0
    with torch.no_grad():
        whole, cache, parts, at = hf(ids, attention_mask=mask, use_cache=False).logits, DynamicCache(config=hf.config), [], 0
        for n in (7, 1, 9, 1, 5):
            parts.append(hf(ids[:, at:at + n], attention_mask=mask[:, :at + n], cache=cache).logits)
            at += n
        assert torch.allclose(torch.cat(parts, 1)[mask.bool()], whole[mask.bool()], atol=2e-5)
        with pytest.raises(ValueError, match='got no attention_mask for a cache with padding'): hf(ids[:, :1], cache=cache)
        with pytest.raises(ValueError, match='expected .3, 24.'): hf(ids[:, :1], cache=cache, attention_mask=mask[:, :5])


@pytest.mark.parametrize('form', FORMS)
def test_a_state_is_gone_on_from_with_its_momentum(form, tmp_path):
    "Cut within a chunk and a segment; through a file; the momentum is part of what is carried."
    model, ids = opened(form, memory_chunk=4, window=6), tokens(21, 2)
    whole, state = model.run(ids).logits, model.run(ids[:, :9], keep_state=True).state
    state.save(tmp_path/'s.safetensors')
    again = type(state).load(tmp_path/'s.safetensors')
    assert torch.allclose(model.run(ids[:, 9:], state=again).logits, whole[:, 9:], atol=2e-5)
    forgetful = state.map(torch.zeros_like, 'conv')
    assert not torch.allclose(model.run(ids[:, 9:], state=forgetful).logits, whole[:, 9:], atol=1e-3)


@pytest.mark.parametrize('form', FORMS)
def test_beams_carry_their_own_memory(form):
    "The best of three beams is as likely as it says, run anew."
    hf, ids = random_model('titans', dict(form=form, window=5)), tokens(9)
    out = hf.generate(ids, max_new_tokens=6, num_beams=3, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_scores=True, length_penalty=0.)
    with torch.no_grad(): logp = hf(out.sequences, use_cache=False).logits.log_softmax(-1)
    total = sum(float(logp[0, t - 1, out.sequences[0, t]]) for t in range(9, 15))
    assert abs(total - float(out.sequences_scores[0])) < 1e-3


@pytest.mark.parametrize('form', FORMS)
def test_a_folder_holds_it(form, tmp_path):
    hf, ids = random_model('titans', dict(form=form)), tokens(20)
    hf.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(again(ids).logits, hf(ids).logits) and again.config.form == form
    model = load_model(str(tmp_path))
    assert model.adapter.family == 'titans' and torch.allclose(model.run(ids).logits, hf(ids, use_cache=False).logits, atol=1e-5)


@pytest.mark.parametrize('form', FORMS)
def test_a_new_model_learns(form):
    "Some steps on one batch, all parameters reached by the gradient."
    torch.manual_seed(0)
    hf, ids = AutoModelForCausalLM.from_config(small(61, form=form)).train(), tokens(24, 2)
    opt, losses = torch.optim.AdamW(hf.parameters(), 1e-2), []
    for _ in range(8):
        loss = hf(ids, labels=ids, use_cache=False).loss
        opt.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in hf.parameters())
        opt.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - .3


def test_states_of_a_few_steps_are_all_that_is_kept():
    model = opened()
    _, cache = model.run_with_cache(tokens(30), ['ssm.state', 'ssm.surprise'], at=[4, 20])
    _, whole = model.run_with_cache(tokens(30), ['ssm.state', 'ssm.surprise'])
    for n in cache: assert cache[n].shape[1] == 2 and torch.allclose(cache[n], whole[n][:, [4, 20]], atol=1e-5)
    with pytest.raises(ValueError, match='not linear'): model.recurrences(tokens(9))


@pytest.mark.parametrize('wrong, message', [
    (dict(form='mal'), "got form='mal', expected 'mag' or 'mac'"), (dict(memory_depth=3), 'got memory_depth=3'),
    (dict(memory_heads=3), 'a divisor of hidden_size 256'), (dict(window=0), '1 or more'), (dict(num_persistent=-1), '0 or more'),
    (dict(num_attention_heads=256), 'heads of an even size')])
def test_sizes_that_do_not_fit_are_named(wrong, message):
    with pytest.raises(ValueError, match=message): TitansConfig(**wrong)
