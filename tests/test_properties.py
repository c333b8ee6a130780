"""Laws that hold for any position, head, strength, site and shape, looked for by hypothesis."""
import gc
import threading

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from circuitbench.direction import Direction, given_direction
from circuitbench.edit import add, apply, edited, live, positions, scale, zero
from circuitbench.load import load_model
from circuitbench.site import BLOCK_SITES, canonical, resolve
from circuitbench.state import State

FAMILIES = 'mamba1', 'mamba2', 'jamba', 'falcon-h1', 'hymba', 'rwkv7', 'qwen3-next'
MODELS = {}
settings.register_profile('here', max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('here')


def mock(family):
    if family not in MODELS: MODELS[family] = load_model(f'mock://{family}-tiny')
    return MODELS[family]


def draw(*shape, seed=0): return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- positions ---------------------------------------------------------------------------
index = st.integers(-12, 12)
step = st.one_of(st.none(), st.integers(1, 5))
bound = st.one_of(st.none(), st.integers(-9, 12))
at_any = st.one_of(st.none(), index, st.builds(slice, bound, bound, step), st.lists(index, max_size=5).map(tuple))


@given(at_any, st.integers(1, 12))
def test_positions_are_numpys(at, n):
    "In a prompt, positions choose what the same index chooses of an array; those outside it choose nothing."
    everything, got = np.arange(n), positions(at, 0, n, n)[0]
    if at is None: want = everything
    elif isinstance(at, slice):
        within = [None if i is None else max(i + n, 0) if i < 0 else i for i in (at.start, at.stop)]
        want = everything[slice(*within, at.step)] if all(i is None or -n <= i for i in (at.start, at.stop)) else None
    else: want = np.unique([everything[i] for i in np.atleast_1d(at).astype(int).tolist() if -n <= i < n])
    if want is not None: assert got == want.tolist()


@given(at_any, st.integers(1, 12), st.lists(st.integers(1, 4), min_size=1, max_size=5))
def test_positions_do_not_depend_on_how_a_run_is_cut(at, prompt, pieces):
    "A prompt read at once, and the same in pieces, have the same positions with the same ranks."
    total = sum(pieces)
    whole, cut, lo = positions(at, 0, total, prompt), ([], []), 0
    for n in pieces:
        for part, more in zip(cut, positions(at, lo, lo + n, prompt)): part += more
        lo += n
    assert cut == whole


# -- edits -------------------------------------------------------------------------------
heads_any = st.one_of(st.none(), st.integers(0, 3), st.lists(st.integers(0, 3), min_size=1, max_size=3, unique=True).map(tuple))
strength = st.floats(-3, 3, allow_nan=False)


@given(at_any, heads_any, strength)
def test_an_edit_is_an_interpolation_where_it_is_and_nothing_elsewhere(at, heads, s):
    x, f = draw(2, 7, 4, 5).double(), torch.tanh
    got = edited(s*apply('ssm.y', f, at=at, heads=heads), x)
    want, some = x.numpy().copy(), positions(at, 0, 7, 7)[0]
    chosen = np.ix_(range(2), some, range(4) if heads is None else np.atleast_1d(heads))
    want[chosen] += s*(np.tanh(want[chosen]) - want[chosen])
    assert np.allclose(got.numpy(), want, atol=1e-12)


@given(strength, strength, at_any)
def test_strengths_multiply_and_zero_is_dropped(a, b, at):
    x, e = draw(1, 6, 3), scale('resid_post', 2., at=at)
    assert torch.allclose(edited(a*(b*e), x), edited((a*b)*e, x), atol=1e-5)
    assert len(live(0*e)) == 0 and len(live(a*e)) == (a != 0)


@given(at_any, at_any, at_any)
def test_edits_in_a_row_are_associative_and_those_apart_commute(p, q, r):
    x = draw(1, 6, 4)
    a, b, c = (apply('resid_post', f, at=at) for f, at in ((torch.sin, p), (torch.exp, q), (torch.tanh, r)))
    def run(edits):
        out = x
        for e in edits: out = edited(e, out)
        return out
    assert torch.equal(run((a | b) | c), run(a | (b | c)))
    if not {*positions(p, 0, 6, 6)[0]} & {*positions(q, 0, 6, 6)[0]}: assert torch.equal(run(a | b), run(b | a))


# -- runs --------------------------------------------------------------------------------
@st.composite
def places(draw_):
    "A family, a site of its first block with a pos axis, and a position of a prompt of 9 tokens."
    family = draw_(st.sampled_from(FAMILIES))
    names = [n for n in mock(family).site_names('blocks.0.*') if not n.endswith(('attn.pattern', 'mlp.experts'))]
    return family, draw_(st.sampled_from(names)), draw_(st.integers(0, 8))


IDS = torch.tensor([[5, 9, 41, 7, 200, 9, 3, 77, 12]])


@settings(max_examples=40)
@given(places())
def test_an_edit_changes_nothing_before_it(place):
    family, site, t = place
    model = mock(family)
    clean, changed = model.run(IDS).logits, model.run(IDS, edit=scale(site, 1.7, at=t)).logits
    assert torch.allclose(clean[:, :t], changed[:, :t], atol=2e-5)
    assert torch.isfinite(changed).all()
    assert torch.equal(model.run(IDS, edit=0*zero(site, at=t)).logits, clean)


@settings(max_examples=25)
@given(st.sampled_from(FAMILIES), st.integers(1, 8))
def test_a_run_that_goes_on_from_a_state_is_the_whole_run(family, cut):
    model = mock(family)
    state = model.run(IDS[:, :cut], keep_state=True).state
    assert torch.allclose(model.run(IDS[:, cut:], state=state).logits, model.run(IDS).logits[:, cut:], atol=1e-4)


@settings(max_examples=25)
@given(st.sampled_from(FAMILIES), st.integers(1, 8), st.floats(0, 1))
def test_states_swap_mix_and_are_kept(tmp_path_factory, family, n, share):
    model = mock(family)
    a, b = (model.run(x[:, :n], keep_state=True).state for x in (IDS, IDS.flip(1)))
    same = lambda s, t: all(torch.equal(v, t.ssm[i]) for i, v in s.ssm.items())
    assert same(a.swap(b).swap(a), a) and same(a.mix(b, 0.), a) and same(a.mix(b, 1.), b)
    mixed = a.mix(b, share)
    for i, v in mixed.ssm.items(): assert torch.allclose(v, (1 - share)*a.ssm[i] + share*b.ssm[i], atol=1e-4)
    path = tmp_path_factory.mktemp('state')/'s.safetensors'
    mixed.save(path)
    again = State.load(path)
    assert same(again, mixed) and torch.equal(again.tokens, mixed.tokens) and again.family == family


# -- names -------------------------------------------------------------------------------
@given(st.sampled_from(FAMILIES), st.data())
def test_a_name_means_itself_and_a_glob_what_holds_it(family, data):
    names = mock(family).site_names('*')
    name = data.draw(st.sampled_from(names))
    assert resolve(name, names) == [name] and canonical(canonical(name)) == canonical(name)
    if name.startswith('blocks.'):
        _, i, short = name.split('.', 2)
        assert short in BLOCK_SITES
        assert name in resolve(f'blocks.*.{short}', names) and name in resolve(f'blocks.{i}.*', names)


@given(st.text(max_size=30))
def test_any_text_is_a_site_or_refused_in_a_sentence(text):
    names = mock('mamba2').site_names('*')
    try: found = resolve(text, names)
    except KeyError as err: assert str(err).strip('"\'').startswith('got site')
    else: assert found and {*found} <= {*names}


# -- directions --------------------------------------------------------------------------
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=4), st.integers(0, 50))
def test_directions_are_vectors(tmp_path_factory, factors, seed):
    model, rng = mock('mamba2'), np.random.default_rng(seed)
    v = [rng.normal(size=32) for _ in factors]
    d = [given_direction(model, torch.tensor(x), 'resid_post', 1) for x in v]
    total, want = sum((k*x for k, x in zip(factors[1:], d[1:])), factors[0]*d[0]), sum(k*x for k, x in zip(factors, v))
    assert np.allclose(total.vector.numpy(), want, atol=1e-4) and np.isclose(total.norm, np.linalg.norm(want), atol=1e-4)
    left = d[0].orthogonal(*d[1:])
    assert all(abs(float(left.vector.double() @ torch.tensor(x))) < 1e-4*np.linalg.norm(x)*max(1, left.norm) for x in v[1:])
    path = tmp_path_factory.mktemp('direction')/'d.safetensors'
    total.save(path)
    again = Direction.load(path)
    assert torch.equal(again.vector, total.vector) and (again.site, again.model, again.source) == (total.site, total.model, total.source)


# -- threads, several models, a long use --------------------------------------------------
def test_two_models_and_four_threads_do_not_meet():
    "Runs of several threads, each with an edit of its own, give what they give alone."
    models = [mock('mamba2'), mock('rwkv7')]
    jobs = [(m, scale('blocks.1.ssm.y', 1 + k/4, at=[k])) for k in range(4) for m in models]
    alone = [m.run(IDS, edit=e).logits for m, e in jobs]
    found, failed = [None]*len(jobs), []
    def work(some):
        try:
            for _ in range(5):
                for k in some: found[k] = jobs[k][0].run(IDS, edit=jobs[k][1]).logits
        except Exception as err: failed.append(err)
    threads = [threading.Thread(target=work, args=(range(i, len(jobs), 4),)) for i in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert not failed and all(torch.equal(a, b) for a, b in zip(alone, found))


def hooks(hf): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in hf.modules())


@pytest.mark.slow
@pytest.mark.parametrize('family', ['mamba2', 'hymba', 'qwen3-next'])
def test_a_thousand_runs_leave_no_memory_behind(family):
    "Edits, reads, gradients, generation and runs that fail, in turn: memory, hooks and objects stay as they are."
    model = mock(family)
    block = next(i for i in model.recurrent())
    v = draw(model.sizes['d_model'])
    state, here = f'blocks.{block}.ssm.state', f'blocks.{block}.resid_post'
    def once(i):
        kind = i % 5
        if kind == 0: model.run_with_cache(IDS, '*')
        elif kind == 1: model.run(IDS, edit=add(here, v, at=i % 9) | zero(state, at=3))
        elif kind == 2:
            out, cache = model.run_with_cache(IDS, here, grad=True)
            cache.grad(out.logits[0, -1, 5])
        elif kind == 3: model.generate(IDS, 4, edit=scale(here, 1.1))
        else:
            with pytest.raises(ZeroDivisionError): model.run(IDS, edit=apply(here, lambda x: 1/0))
    for i in range(200): once(i)
    gc.collect()
    before, objects, hooked = psutil.Process().memory_info().rss, len(gc.get_objects()), hooks(model.hf)
    for i in range(1000): once(i)
    gc.collect()
    grown = psutil.Process().memory_info().rss - before
    assert hooks(model.hf) == hooked and len(gc.get_objects()) < objects + 500 and grown < 16 << 20, f'{grown/2**20:.1f} MiB more'


@given(st.sampled_from(FAMILIES), st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=30)
def test_what_is_read_has_the_shape_that_the_table_says(family, pos, batch):
    model, ids = mock(family), IDS[:, :pos].expand(batch, -1)
    cache = model.run_with_cache(ids, '*')[1]
    for n in model.site_names('*'):
        if not n.endswith('attn.pattern'): assert cache[n].shape == model.site_shape(n, batch, pos), n
