"""How long one write into a state lasts: against the bare models, stepped with a changed cache, and float64 numpy."""
import math
from dataclasses import replace

import numpy as np
import oracle
import pytest
import torch
from oracle_rwkv7 import Net, archive

from circuitbench import persistence as module
from circuitbench.direction import given_direction
from circuitbench.edit import add
from circuitbench.hook import HookedModel
from circuitbench.lasting import _fallen, continued, heads_lasting, horizons, left
from circuitbench.layout import from_pth
from circuitbench.load import load_model
from circuitbench.persistence import Persistence, fit, persistence, persistence_view
from circuitbench.record import Delta
from circuitbench.seam import cache_name, cache_of
from circuitbench.write_or_push import write_or_push

FAMILIES = ['mamba1', 'mamba2', 'rwkv7', 'qwen3-next', 'olmo-hybrid', 'kimi-linear', 'jamba', 'falcon-h1', 'hymba']
IDS = torch.randint(0, 257, (1, 21), generator=torch.Generator().manual_seed(0))
AT, N = 6, 9


@pytest.fixture(scope='module', params=FAMILIES)
def family(request): return load_model(f'mock://{request.param}-tiny')


def direction(model, layer=None, seed=0, heads=None):
    layer = model.recurrent()[0] if layer is None else layer
    shape = model.site_shape(f'blocks.{layer}.ssm.state', 1, 1)[2:]
    shape = shape if heads is None else (len(heads), *shape[1:])
    return given_direction(model, torch.randn(shape, generator=torch.Generator().manual_seed(seed)), 'ssm.state', layer, heads)


def close(a, b, rtol=1e-3): return float((a.double() - b.double()).abs().max()) <= rtol*float(b.double().abs().max()) + 1e-12


def states(cache, turned):
    "The recurrent states in a cache of transformers by block, (head, d_head, d_state)."
    found = {i: getattr(layer, 'recurrent_states', {}).get(0) for i, layer in enumerate(cache.layers)}
    return {i: (S[0][:, None] if S.dim() == 3 else S[0].mT if turned else S[0]).clone() for i, S in found.items() if S is not None}


@torch.no_grad()
def stepped(model, layer, change, ids=IDS, at=AT, n=N):
    "The bare model, a token at a time from `at` on, after a change of the state before it: logits and states after each."
    turned, seen = model.adapter.turned, []
    cache = cache_of(model.hf(input_ids=ids[:, :at], use_cache=True))
    S = cache.layers[layer].recurrent_states[0]
    S += (change[:, 0] if S.dim() == 3 else change.mT if turned else change)[None].to(S)
    for t in range(at, at + n + 1):
        out = model.hf(input_ids=ids[:, t:t + 1], use_cache=True, **{cache_name(model.hf): cache})
        seen.append((out.logits[0, -1].double(), states(cache_of(out), turned)))
    return seen


def test_prediction_and_measurement_equal_the_bare_model_with_a_changed_cache(family):
    "A change made before a token is another one after it: that one is what is written."
    layer = family.recurrent()[0]
    before = 3*direction(family, layer).vector
    was, now = stepped(family, layer, 0*before), stepped(family, layer, before)
    change = [b[1][layer] - a[1][layer] for a, b in zip(was, now)]
    d = given_direction(family, change[0], 'ssm.state', layer)
    p = persistence(family, IDS[0], d, at=AT, n=N)
    norms = torch.stack([c.flatten(1).norm(dim=1) for c in change])
    assert close(p.predicted, norms) and close(p.measured, norms) and p.strength == pytest.approx(d.norm)
    later = torch.stack([torch.stack([(b[1][i] - a[1][i]).norm() for i in p.later]) for a, b in zip(was, now)]) if p.later else p.later_change
    assert p.later == tuple(i for i in family.recurrent() if i > layer) and p.later_change.shape == later.shape
    assert not p.later or close(p.later_change, later, 1e-2)
    a, b = (torch.stack([row[0] for row in rows]).log_softmax(-1) for rows in (was, now))
    kl = (a.exp()*(a - b)).sum(-1)
    assert close(p.kl, kl, 2e-2) and kl.max() > 1e-8
    best = a.argmax(-1, keepdim=True)
    assert close(p.target, (b - a).gather(1, best)[:, 0], 1e-2)
    assert close(p.state, torch.stack([row[1][layer].flatten(1).norm(dim=1) for row in was]))


def test_within_the_layer_the_prediction_is_exact(family):
    d = direction(family)
    p = persistence(family, IDS[0], d, 5., at=AT, n=N)
    assert p.fit.state == pytest.approx(1, abs=1e-6) and p.fit.read_out == pytest.approx(1, abs=1e-6)
    assert close(p.predicted, p.measured, 1e-4) and close(p.predicted_y, p.measured_y, 1e-4)


def test_the_read_outs_are_all_that_the_logits_see(family):
    "The predicted change, added to the read-outs of a clean run, gives the logits of the run with the write."
    d = direction(family, heads=None)
    p = persistence(family, IDS[0], d, 5., at=AT, n=N)
    clean = family.run(IDS[:, :AT + N + 1]).logits[0, AT:].double().log_softmax(-1)
    edit = add(d.site.replace('state', 'y'), p.predicted_y[None].float(), at=range(AT, AT + N + 1))
    moved = family.run(IDS[:, :AT + N + 1], edit=edit).logits[0, AT:].double().log_softmax(-1)
    assert close(p.kl, (clean.exp()*(clean - moved)).sum(-1), 2e-2)


@pytest.mark.parametrize('name', ['mamba1', 'mamba2'])
def test_what_is_left_equals_the_product_of_decays_in_numpy(name):
    model = load_model(f'mock://{name}-tiny')
    sites = oracle.run(model.hf, IDS.numpy())
    for layer in model.recurrent():
        heads = [3, 1] if name == 'mamba2' else [7, 0, 11]
        d = direction(model, layer, heads=heads)
        p = persistence(model, IDS[0], d, 2., at=AT, n=N)
        decay, C = (sites[f'blocks.{layer}.ssm.{s}'][0][AT:AT + N + 1, heads] for s in ('decay', 'C'))
        change = 2*d.unit.vector.double().numpy()
        kept = np.ones_like(decay)
        kept[1:] = decay[1:].cumprod(0)
        now = change*(kept[..., None, None] if kept.ndim == 2 else kept[:, :, None])
        assert np.allclose(p.predicted, np.sqrt((now**2).sum((2, 3))), rtol=1e-4)
        assert np.allclose(p.predicted_y, np.einsum('thpn,thn->thp', now, C), rtol=1e-3, atol=1e-5)
        assert p.heads == tuple(heads)


def test_rwkv7_equals_numpy_a_token_at_a_time(tmp_path):
    w = archive()
    torch.save(w, tmp_path/'x.pth')
    model, layer, ids = HookedModel(from_pth(tmp_path/'x.pth', torch.float32)), 1, IDS[0]%97
    before, runs = 20*direction(model, layer).vector.double().numpy(), []
    for scale in (0, 1):
        net = Net(w, every=True)
        for t in ids[:AT]: net.step(int(t))
        net.S[layer] = net.S[layer] + scale*before
        for t in ids[AT:AT + N + 1]: net.step(int(t))
        runs.append(net.sites)
    gap = lambda name: torch.from_numpy(runs[1][name] - runs[0][name])[AT:]
    state = gap(f'blocks.{layer}.ssm.state')
    p = persistence(model, ids, given_direction(model, state[0], 'ssm.state', layer), at=AT, n=N)
    assert close(p.predicted, state.flatten(2).norm(dim=2)) and close(p.measured, p.predicted)
    assert close(p.predicted_y, gap(f'blocks.{layer}.ssm.y')) and close(p.measured_y, p.predicted_y)
    assert close(p.later_change[:, 0], gap(f'blocks.{layer + 1}.ssm.state').flatten(1).norm(dim=1), 1e-2)


def test_heads_that_are_not_written_and_layers_below_do_not_move():
    model = load_model('mock://mamba2-tiny')
    p = persistence(model, IDS[0], direction(model, 1, heads=[2]), 3., at=AT, n=N)
    assert p.heads == (2,) and p.measured.shape == (N + 1, 1) and p.later == ()
    assert p.later_change.shape == (N + 1, 0) and p.kl[0] > 0


@pytest.mark.parametrize('name', ['mamba2', 'hymba', 'kimi-linear'])
def test_in_pieces_it_is_the_same(name, monkeypatch):
    model = load_model(f'mock://{name}-tiny')
    d, runs = direction(model), []
    for at in (0, AT):
        for cells in (2**25, 1):
            monkeypatch.setattr(module, '_CELLS', cells)
            runs.append(persistence(model, IDS[0], d, 5., at=at, n=N))
        a, b = runs[-2:]
        assert all(close(getattr(b, k), getattr(a, k), 1e-3) for k in ('measured', 'measured_y', 'state', 'later_change'))
        assert close(b.kl, a.kl, 1e-2) and a.tokens == b.tokens


def test_text_and_continuation():
    model = load_model('mock://mamba2-tiny')
    d, prompt = direction(model), IDS[0, :8]
    said = model.generate(prompt, 5).tokens[0]
    whole, at = continued(model, prompt, n=5)
    assert at == 7 and torch.equal(whole[0], said)
    own, given = (persistence(model, prompt, d, 2., n=5, text=t) for t in (None, said[8:]))
    assert torch.equal(own.kl, given.kl) and own.n == 5 and own.tokens == tuple(model.strings(said[7:]))
    inner = persistence(model, said, d, 2., at=-6, n=5)
    assert close(inner.kl, own.kl, 1e-4) and inner.at == 7
    named = persistence(model, prompt, d, 2., n=5, target=int(said[8]))
    assert named.target[0] == pytest.approx(float(own.target[0]))


# -- R^2 -----------------------------------------------------------------------------------
def made(measured, predicted, kl, y, later):
    t = lambda v: torch.tensor(v, dtype=torch.float64)
    heads = (0,)
    return Persistence('m', 'blocks.0.ssm.state', 'd', 1., heads, 0, tuple('abcd'), t(predicted)[:, None], t(measured)[:, None],
                       t(y)[:, None, None], t(y)[:, None, None], torch.ones(4, 1), t(kl), torch.zeros(4), (1,), t(later)[:, None])


def test_r2_is_what_it_says_in_numpy():
    rows = [([4., 2., 1., .5], [4., 2.2, .9, .5], [1e-2, 2e-3, 1e-3, 1e-12], [1., .5, .3, .2], [1., 2., 3., 4.]),
            ([3., 2., 1., .4], [3., 2.1, .9, .5], [3e-2, 2e-3, 4e-3, 1e-4], [2., .9, .3, .1], [2., 2., 5., 4.])]
    r2 = lambda m, p: 1 - ((m - p)**2).sum()/((m - m.mean())**2).sum()
    found = fit([made(*r) for r in rows])
    m, p, kl, y, later = (np.array([r[k] for r in rows]) for k in range(5))
    assert found.state == pytest.approx(r2(m.ravel(), p.ravel())) and found.read_out == 1 and found.writes == 2
    some = slice(0, 3)                                                     # the last step of the first is rounding
    a, b, c = (np.log(v[:, some]).mean(0) for v in (kl, y, later))
    assert found.logits == pytest.approx(r2(a, 2*b + (a - 2*b).mean()))
    assert found.later[0][0] == 1 and found.later[0][1] == pytest.approx(r2(c, b + (c - b).mean()))
    exact = made([1., .5, .25, .1], [1., .5, .25, .1], [1e-2, .25e-2, .0625e-2, 1e-4], [1., .5, .25, .1], [2., 1., .5, .2])
    assert exact.fit.state == 1 and exact.fit.logits == pytest.approx(1) and exact.fit.later[0][1] == pytest.approx(1)
    assert exact.lasts() == 1 and exact.lasts(.2) == 3 and exact.lasts(.01) == math.inf
    with pytest.raises(ValueError, match='got writes of 0'): fit([])


# -- horizons --------------------------------------------------------------------------------
def followed(record, first, share):
    "In numpy: every write's key through dense transitions; mean steps until it has fallen (steps seen over falls), share that has not."
    cut = lambda v: v[0].double().numpy()[first:]
    wide = lambda v: np.repeat(v, record.heads//v.shape[1], 1)
    if isinstance(record, Delta):
        k, w, kappa, e = cut(record.k), np.exp(cut(record.log_w)), cut(record.kappa), cut(record.erase)
        e = e if e.ndim == 3 else e[..., None]*k
        eye = np.eye(k.shape[-1])
        def G(t, h):
            W, R = np.diag(np.broadcast_to(w[t, h], k.shape[-1])), np.outer(kappa[t, h], e[t, h])
            return W @ (eye - R) if record.decayed else W - R
    else:
        k, dt, A = wide(cut(record.B)), cut(record.dt), record.A.double().numpy()
        G = lambda t, h: np.diag(np.broadcast_to(np.exp(dt[t, h]*A[h]), k.shape[-1]))
    T, out = len(k), []
    for h in range(record.heads):
        seen = fell = 0
        for t in range(T - 1):
            row = k[t, h]
            for s in range(t + 1, T):
                row, seen = row @ G(s, h), seen + 1
                if np.linalg.norm(row) <= share*np.linalg.norm(k[t, h]):
                    fell += 1
                    break
        out.append((seen/fell if fell else np.inf, 1 - fell/(T - 1)))
    return np.array(out).T


def test_horizons_equal_writes_followed_one_by_one(family):
    layer = family.recurrent()[0]
    table = horizons(family, IDS[0, :14], .7, layer)
    record = family.recurrences(IDS[0, :14], layer)[layer]
    steps, outlast = followed(record, family.meta, .7)
    assert np.allclose(table.steps[0], steps, rtol=1e-4) and np.allclose(table.outlast[0], outlast, atol=1e-6)
    assert table.steps.shape == (1, record.heads) and table.layers == (layer,)


@pytest.mark.parametrize('share', [.5, 1/math.e])
@pytest.mark.parametrize('name', ['mamba1', 'mamba2', 'rwkv7'])
def test_a_head_whose_decay_is_set_by_hand_has_the_horizon_that_follows(name, share):
    model, keep = load_model(f'mock://{name}-tiny'), .8
    head, size, soft = 1, -math.log(keep), math.log(math.expm1(1.))        # decay exp(-size), softplus(soft) = 1
    if name == 'mamba2':
        m = model.blocks[0].mixer
        m.in_proj.weight.data[-m.num_heads + head] = 0
        m.dt_bias.data[head], m.A_log.data[head] = soft, math.log(size)
    elif name == 'mamba1':
        m = model.blocks[0].mixer
        m.dt_proj.weight.data[head], m.dt_proj.bias.data[head], m.A_log.data[head] = 0, soft, math.log(size)
    else:                                                                  # w = exp(-exp(-1/2) sigmoid(...)), and no removal
        rows, share_of = slice(16, 32), size*math.exp(.5)
        for part, bias in (('w_lora', math.log(share_of/(1 - share_of))), ('a_lora', -60.)):
            last = getattr(model.blocks[0].attn, part).lora[2]
            last.weight.data[rows], last.bias.data[rows] = 0, bias
        model.blocks[0].attn.k_a.data[rows] = 0                            # keys as they are
    want = math.ceil(math.log(share)/math.log(keep))
    ids = IDS[0].repeat(4)
    table = horizons(model, ids, share, 0)
    T = len(ids)
    fallen = T - want
    seen = fallen*want + want*(want - 1)//2                                # those that outlast the text count while they are seen
    assert float(table.steps[0, head]) == pytest.approx(seen/fallen)
    assert (0, head, float(table.steps[0, head])) in heads_lasting(model, ids, (want, want + 1), share, 0)


def test_what_is_not_written_is_not_counted():
    model = load_model('mock://mamba2-tiny')
    record = model.recurrences(IDS, 0)[0]
    full = _fallen(record, 0, .5)
    wide = lambda v: torch.cat([v[:, :8], v], 1)
    B = torch.cat([0*record.B[:, :8], record.B], 1)
    later = _fallen(replace(record, x=wide(record.x), dt=wide(record.dt), B=B, C=wide(record.C)), 0, .5)
    assert torch.equal(full[0], later[0]) and torch.equal(full[1], later[1])
    assert all((v == 0).all() for v in _fallen(replace(record, B=0*record.B), 0, .5))


# -- one write or many pushes -------------------------------------------------------------
@torch.no_grad()
def test_write_and_push_at_equal_kl_are_runs_of_the_bare_model():
    model, n = load_model('mock://mamba2-tiny'), 8
    state, stream = direction(model, 0, heads=[1, 3]), given_direction(model, torch.randn(model.sizes['d_model']), 'resid_post', 0)
    prompts, token = [IDS[0, :7], IDS[0, 5:16]], 9
    both = write_or_push(model, state, stream, prompts, token, n, kl=1e-4)
    assert both.ways == ('write', 'push', 'random write', 'random push') and both.kl.shape == both.score.shape == (4, n + 1)
    assert both.kl[:2].mean(1).numpy() == pytest.approx([1e-4]*2, rel=2e-3) and both.strengths[:2] == both.strengths[2:]
    kls, scores = [], []
    for p in prompts:
        ids, at = model.generate(p, n).tokens, len(p) - 1
        def pushed(module, args, out, at=at):
            new = out.clone()
            new[:, at:] += both.strengths[1]*stream.unit.vector
            return new
        clean = model.hf(ids).logits[0, at:].double().log_softmax(-1)
        hook = model.blocks[0].register_forward_hook(pushed)
        moved = model.hf(ids).logits[0, at:].double().log_softmax(-1)
        hook.remove()
        kls.append((clean.exp()*(clean - moved)).sum(-1))
        scores.append((moved - clean)[:, token])
    assert close(both.kl[1], torch.stack(kls).mean(0), 2e-2) and close(both.score[1], torch.stack(scores).mean(0), 1e-2)
    one = torch.stack([persistence(model, p, state, both.strengths[0], n=n, target=token).kl for p in prompts]).mean(0)
    assert close(both.kl[0], one, 1e-2)
    target = torch.stack([persistence(model, p, state, both.strengths[0], n=n, target=token).target for p in prompts]).mean(0)
    assert close(both.score[0], target, 1e-2)


def test_without_a_kl_the_write_is_as_it_is():
    model = load_model('mock://mamba2-tiny')
    state, stream = 30*direction(model, 0), given_direction(model, torch.ones(model.sizes['d_model']), 'resid_post', 0)
    both = write_or_push(model, state, stream, [IDS[0, :7]], lambda x: x[..., 3], n=4, texts=[IDS[0, 7:11]])
    assert both.strengths[0] == pytest.approx(state.norm)
    assert float(both.kl[0].mean()) == pytest.approx(float(both.kl[1].mean()), rel=2e-3)
    clean = model.run(IDS[:, :11]).logits[0, 6:, 3]
    assert close(both.clean, clean, 1e-4)
    assert 'pushed at every token' in repr(both) and 'random push' in both.view() and len(both.plot().axes[0].lines) == 4


# -- what is refused, and how it looks -------------------------------------------------------
def test_what_is_refused():
    model = load_model('mock://mamba2-tiny')
    d, ids = direction(model), IDS[0, :8]
    stream = given_direction(model, torch.ones(model.sizes['d_model']), 'resid_post', 0)
    for call, said in [
            (lambda: persistence(model, ids, stream, 1.), 'expected a direction of ssm.state'),
            (lambda: persistence(load_model('mock://rwkv7-tiny'), ids, d, 1.), 'got a direction of'),
            (lambda: persistence(model, ids, d, math.inf), 'got strength=inf'),
            (lambda: persistence(model, ids, d, math.nan), 'got strength=nan'),
            (lambda: persistence(model, ids, d, 0), 'got strength=0'),
            (lambda: persistence(model, ids, d, 1., n=0), 'got n=0'),
            (lambda: persistence(model, ids, d, 1., n=2.5), 'got n=2.5'),
            (lambda: persistence(model, ids, d, 1., at=8), 'expected a token of the prompt, -8 to 7'),
            (lambda: persistence(model, ids, d, 1., at=-9), 'expected a token of the prompt, -8 to 7'),
            (lambda: persistence(model, ids, d, 1., n=4, text=[1, 2]), 'got 2 tokens after token 7, expected n=4'),
            (lambda: persistence(model, IDS[0].view(3, 7), d, 1.), 'got 3 prompts'),
            (lambda: persistence(model, ids, d, 1., target=9999), 'got token ids'),
            (lambda: horizons(model, ids, 1.), 'got share=1.0'),
            (lambda: horizons(model, [3]), 'one token'),
            (lambda: heads_lasting(model, ids, (5, 2)), 'got steps=(5, 2)'),
            (lambda: left(model.recurrences(ids, 0)[0], d.vector, 5, 3), 'got step 5 and 3 more'),
            (lambda: write_or_push(model, stream, stream, [ids], 3), 'expected a direction of ssm.state'),
            (lambda: write_or_push(model, d, d, [ids], 3), 'another site than the state'),
            (lambda: write_or_push(model, d, stream, [], 3), 'got 0 prompts'),
            (lambda: write_or_push(model, d, stream, [ids], 3, kl=-1), 'got kl=-1'),
            (lambda: write_or_push(model, d, stream, [ids], 3, kl=1e6), 'got kl=1e+06, which no strength'),
            (lambda: write_or_push(model, d, stream, [ids], 3, n=0), 'got n=0')]:
        with pytest.raises(ValueError) as err: call()
        assert said in str(err.value), (said, str(err.value))
    with pytest.raises(TypeError, match='expected a Direction'): persistence(model, ids, d.vector, 1.)


def test_it_prints_draws_and_is_kept(tmp_path):
    model = load_model('mock://mamba2-tiny')
    p = persistence(model, IDS[0], direction(model), 5., at=AT, n=N)
    again = Persistence.load(p.save(tmp_path/'p.safetensors'))
    assert torch.equal(again.predicted, p.predicted) and again.later == p.later and repr(again) == repr(p)
    assert 'R^2 of 1 write: state 1.000000' in repr(p) and f'  {N:5}' in repr(p)
    page = persistence_view(p)
    assert all(k in page for k in ('What each head keeps', 'state, predicted', 'KL of the next token'))
    assert [line.get_label() for line in p.plot().axes[0].lines] == list(p.curves)
    table = horizons(model, IDS[0])
    assert 'layer 0' in repr(table) and 'The longest' in table.view()
    assert [r[:3] for r in table.rows()] == heads_lasting(model, IDS[0], 0)[::-1]
    with pytest.raises(ValueError, match='cannot be read'): Persistence.load(__file__)
