"""Films of states against float64 numpy and the sites of a run that keeps them all."""
import json
import struct

import numpy as np
import pytest
import torch

from circuitbench.edit import apply
from circuitbench.film import StateFilm, StateInspector, film_states, film_view
from circuitbench.load import load_model
from circuitbench.memory import horizon, state_lens, unembed
from circuitbench.patching import patch_states
from circuitbench.pictures import pool, read_alone
from circuitbench.site import families
from circuitbench.upper import base_run

PROMPT = list(range(5, 25))
FAMILIES = [f for f in sorted(families()) if f not in ('llama', 'lfm2', 'titans')]  # without a recurrence, or with one that is not linear


def pooled(x, cells, how):
    "(row, column) in float64, block by block."
    cut = lambda n: [(i*n//min(n, cells), (i + 1)*n//min(n, cells)) for i in range(min(n, cells))]
    one = (lambda b: b.mean()) if how == 'mean' else lambda b: b.flat[np.abs(b).argmax()]
    return np.array([[one(x[a:b, c:d]) for c, d in cut(x.shape[1])] for a, b in cut(x.shape[0])])


def close(got, want, size=None):
    "Equal to half precision of the largest entry."
    size = np.abs(want).max() if size is None else size
    return np.abs(np.asarray(got, dtype=float) - want).max() <= 2e-3*size + 1e-12


@pytest.mark.parametrize('how', ['mean', 'largest'])
@pytest.mark.parametrize('family', FAMILIES)
def test_a_film_is_the_pooled_run(family, how):
    model = load_model(f'mock://{family}-tiny')
    film = film_states(model, PROMPT, cells=3, pool=how)
    sites = ('ssm.state', 'ssm.write', 'ssm.decay')
    _, cache = model.run_with_cache(PROMPT, sites)
    assert film.layers == tuple(model.recurrent()) and len(film.tokens) == 20
    for i, layer in enumerate(film.layers):
        state, write, decay = (cache[f'blocks.{layer}.{s}'][0].double().numpy() for s in sites)
        if film.heads == ('all',):                                         # step channel 1 d_state: one picture
            state, write, decay = state[:, None, :, 0], write[:, None, :, 0], decay.reshape(20, 1, -1)
        decay = decay.reshape(20, len(film.heads), -1)
        tau = horizon(model.recurrences(PROMPT, layer)[layer])[0].numpy().reshape(len(film.heads), -1)
        for h, name in enumerate(film.heads):
            whole = np.abs([pooled(s, 3, how) for s in state[:, h]]).max()
            wrote = np.abs([pooled(w, 3, how) for w in write[:, h]]).max()
            for t in range(20):
                assert close(film.state(layer, t, name), pooled(state[t, h], 3, how), whole)
                assert close(film.write(layer, t, name), pooled(write[t, h], 3, how), wrote)
            kept = np.stack([decay[:, h].mean(1), decay[:, h].min(1), decay[:, h].max(1)], 1)
            assert np.allclose(film.decay[i, :, h], kept, rtol=1e-4, atol=1e-7)
            assert np.allclose(film.horizon[i, h, 1:], [tau[h].min(), tau[h].max()], rtol=1e-4)
            assert tau[h].min() <= film.horizon[i, h, 0] <= tau[h].max()
            inside = np.abs(film.states[i, :, h].double().numpy()) <= float(film.state_limit[i, h]/film.state_scale[i, h])*(1 + 1e-3)
            assert inside.mean() >= .98
        norm = lambda x: np.sqrt((x**2).sum((2, 3)))
        assert np.allclose(film.state_norms[i], norm(state), rtol=1e-3) and np.allclose(film.write_norms[i], norm(write), rtol=1e-3)


def test_blocks_are_near_equal_and_signs_are_kept():
    x = torch.randn(2, 7, 10, generator=torch.Generator().manual_seed(0))
    for how in ('mean', 'largest'):
        for cells in (1, 3, 7, 16):
            assert all(np.allclose(a, pooled(b, cells, how), atol=1e-6) for a, b in zip(pool(x, 2, cells, how), x.double().numpy()))
    with pytest.raises(ValueError, match="got pool='median', expected one of .'mean', 'largest'."): pool(x, 2, 3, 'median')
    with pytest.raises(ValueError, match='got cells=0, expected at least 1'): pool(x, 2, 0)


@pytest.mark.parametrize('family', ['mamba2', 'jamba', 'hymba', 'rwkv7', 'qwen3-next', 'kimi-linear', 'falcon-h1'])
def test_what_heads_would_say_is_the_lens(family):
    model = load_model(f'mock://{family}-tiny')
    film = film_states(model, PROMPT)
    for layer in film.layers[:2]:
        if film.heads == ('all',):                                         # all channels, as a run without the skip
            r = model.recurrences(PROMPT, layer)[layer]
            y = r.y()[:, model.meta:] - r.D[:, None]*r.x[:, model.meta:]
            _, cache = model.run_with_cache(PROMPT, f'blocks.{layer}.ssm.out', apply(f'blocks.{layer}.ssm.y', lambda _, y=y: y, at=slice(None)))
            want = unembed(model, cache[f'blocks.{layer}.ssm.out'])[0][:, None]
        else: want = state_lens(model, PROMPT, layer).logits
        best = want.topk(5)
        for h, head in enumerate(film.heads):
            for t in (0, 9, 19):
                words, logits = zip(*film.top(layer, t, head))
                assert np.allclose(logits, best.values[t, h], atol=1e-3)
                assert list(words) == model.strings(best.indices[t, h])


def test_rows_are_read_in_parts(monkeypatch):
    model = load_model('mock://mamba2-tiny')
    base = base_run(model, torch.tensor([PROMPT]), [1])
    whole = read_alone(model, base, 1, range(4))
    monkeypatch.setitem(model.sizes, 'd_inner', 2**25)                     # so wide that each head is a run of its own
    runs = []
    monkeypatch.setattr(model, 'run_with_cache', lambda *a, f=model.run_with_cache: runs.append(len(a[0])) or f(*a))
    assert torch.allclose(read_alone(model, base, 1, range(4))[1], whole[1], atol=1e-4) and runs == [1, 1, 1, 1]


@pytest.fixture(scope='module')
def film():
    model, other = load_model('mock://falcon-h1-tiny'), [5, 6, 99, *PROMPT[3:]]
    patches = patch_states(model, other, PROMPT, target=6, wrong=5, layers=[1], progress=False)
    return film_states(model, PROMPT, layers=[1, 0], heads=[2, 0], patches=patches)


def test_some_layers_and_heads(film):
    model = load_model('mock://falcon-h1-tiny')
    every = film_states(model, PROMPT, lens=False)
    assert film.layers == (1, 0) and film.heads == ('2', '0') and every.top() == [] and len(film.top()) == 5
    for layer in (0, 1):
        for head in (0, 2):
            assert close(film.state(layer, 7, head), every.state(layer, 7, head).numpy())
            assert torch.allclose(film.write(layer, 7, head), every.write(layer, 7, head), atol=1e-6)
    one = film_states(load_model('mock://mamba1-tiny'), PROMPT, heads=[3, 9, 4], lens=False)
    assert one.shape[0] == 3 and one.heads == ('all',)


def test_a_film_comes_back_from_its_file(film, tmp_path):
    path = film.save(tmp_path/'a.safetensors')
    again = StateFilm.load(path)
    assert [p.name for p in tmp_path.iterdir()] == ['a.safetensors'] and repr(again) == repr(film)
    for name in film.__dataclass_fields__:
        a, b = getattr(film, name), getattr(again, name)
        if isinstance(a, torch.Tensor): assert a.dtype == b.dtype and torch.equal(a, b), name
        elif name != 'patches': assert a == b, name
    assert repr(again.patches) == repr(film.patches) and torch.equal(again.patches.effects, film.patches.effects)
    assert again.patch_steps == tuple(range(20))


def test_a_damaged_file_is_refused(film, tmp_path):
    data = film.to_bytes()
    size, = struct.unpack('<Q', data[:8])
    note = json.loads(data[8:8 + size])
    def _with(change):
        head = json.loads(json.dumps(note))
        inner = json.loads(head['__metadata__']['circuitbench'])
        change(inner)
        head['__metadata__']['circuitbench'] = json.dumps(inner)
        text = json.dumps(head).encode()
        text += b' '*(-len(text) % 8)
        return struct.pack('<Q', len(text)) + text + data[8 + size:]
    damaged = {'short': data[:-9], 'empty': b'', 'text': b'hello'*9, 'kind': _with(lambda n: n.update(format='x')),
               'lost': _with(lambda n: n.pop('layers')), 'heads': _with(lambda n: n.update(heads=['0'])),
               'tokens': _with(lambda n: n.update(tokens=['x']*20))}
    for name, content in damaged.items():
        (tmp_path/name).write_bytes(content)
        with pytest.raises(ValueError, match='which cannot be read'): StateFilm.load(tmp_path/name)


def test_what_is_not_there_is_named(film):
    model = load_model('mock://falcon-h1-tiny')
    for ask, say in {('layers', 9): 'got block 9, expected one with a recurrence', ('heads', 99): r'got heads=\[99\], expected some of 0 to', ('heads', ()): r'got heads=\[\]',
                     ('layers', ()): 'got no layers', ('pool', 'max'): "got pool='max'", ('patches', film.patches): None}.items():
        if say:
            with pytest.raises(ValueError, match=say): film_states(model, PROMPT, lens=False, **{ask[0]: ask[1]})
        else:
            with pytest.raises(ValueError, match='got patches of .* expected one of them to be'): film_states(model, PROMPT[1:], lens=False, patches=ask[1])
    with pytest.raises(ValueError, match='got 2 prompts, expected one'): film_states(model, [PROMPT, PROMPT])
    for bad, say in {'layer': r'got layer 7, expected one of \[1, 0\]', 'head': r"got head 7, expected one of \['2', '0'\]"}.items():
        for ask in (film.state, film.write, film.top, lambda f=film, **k: film_view(f, **k), lambda f=film, **k: StateInspector(f, **k)):
            with pytest.raises(ValueError, match=say): ask(**{bad: 7})
    with pytest.raises(ValueError, match='got step 20, expected 0 to 19'): film.plot(20)
    with pytest.raises(ValueError, match='got a model without a prompt'): StateInspector(model)
    with pytest.raises(ValueError, match='got a film with pool'): StateInspector(film, pool='mean')


def test_the_still_picture_says_the_numbers(film):
    said = film_view(film, 1, 7, 0)
    assert said.count('<img') == 4 and "States of layer 1 after step 7" in said and 'recovery of logit_diff' in said
    assert f'{float(film.write_norms[0, 7, 1]):.3g}' in said and '7 ' + film.tokens[7] + ' ◂' in said.replace('&#x27;', "'")
    assert 'recovery' not in film_view(film, 0)
    figure = film.plot(7, 0)
    shown = [ax.images[0].get_array() for ax in figure.axes if ax.images and ax.get_title().startswith('head')]
    assert np.allclose(shown[1], film.state(0, 7, 0)) and len(shown) == 2


def test_an_inspector_follows_and_keeps_its_picture(film):
    look = StateInspector(film, layer=1, step=-3, head=0)
    assert (look.layer, look.step, look.head) == (1, 17, '0')
    look.step, look.head = 4, '2'
    bundle, _ = look._repr_mimebundle_()
    assert 'application/vnd.jupyter.widget-view+json' in bundle and 'after step 4' in bundle['text/html']
    with pytest.raises(ValueError, match='got step 20'): look.step = 20
    assert look.step == 4 and look.data == film.to_bytes()
    made = StateInspector(load_model('mock://falcon-h1-tiny'), PROMPT, layers=[0], lens=False)
    assert made.film.layers == (0,) and made.film.said is None
