"""What is said of a memory, against float64 numpy and the model's own modules."""
import base64
import json
import re
from html import unescape

import numpy as np
import pytest
import torch

from circuitbench.edit import apply
from circuitbench.load import load_model
from circuitbench.memory import (
    directions_view,
    horizon,
    lens_view,
    mean_distance,
    memory_view,
    retention,
    singular_vectors,
    sink_share,
    stable_rank,
    state_lens,
    unembed,
)
from circuitbench.record import Delta
from circuitbench.site import families

PROMPT = list(range(5, 25))


@pytest.mark.parametrize('family', ['mamba1', 'mamba2', 'qwen3-next', 'rwkv7'])
def test_horizon_retention_distance_and_sink_equal_numpy(family):
    model = load_model(f'mock://{family}-tiny')
    r = model.recurrences(PROMPT, 0)[0]
    if isinstance(r, Delta):
        log, size = r.log_w, np.linalg.norm(r.v.numpy(), axis=-1)*np.linalg.norm(r.k.numpy(), axis=-1)
    else: log, size = (r.dt*r.A if r.A.dim() == 1 else r.dt[..., None]*r.A), r.dt.numpy()
    log = log.double().numpy()
    assert np.allclose(horizon(r), -1/log.mean(1), rtol=1e-4)
    left = np.stack([np.exp(log[:, t + 1:].sum(1)) for t in range(len(PROMPT))], 1)
    assert np.allclose(retention(r), left, rtol=1e-4, atol=1e-7)
    assert np.allclose(sink_share(r), size[:, 0]/size.sum(1), rtol=1e-4)
    M = r.attention().numpy().astype(float)
    want = [[sum((i - j)*abs(m[i, j]) for i in range(20) for j in range(i + 1))/np.abs(m).sum() for m in one[:3]] for one in M]
    assert np.allclose(mean_distance(torch.from_numpy(M))[:, :3], want)
    some = r.attention([4, 19])
    size = np.abs(some.numpy())
    assert np.allclose(mean_distance(some, [4, 19]), (size*(np.array([[4], [19]]) - np.arange(20))).sum((2, 3))/size.sum((2, 3)), rtol=1e-4)


def test_ranks_and_directions_equal_numpy():
    S = torch.randn(3, 4, 8, 6, generator=torch.Generator().manual_seed(0))
    s = np.linalg.svd(S.double().numpy(), compute_uv=False)
    assert np.allclose(stable_rank(S), (s**2).sum(-1)/s[..., 0]**2, rtol=1e-4)
    value, u, v = singular_vectors(S, 6)
    assert np.allclose(value, s, atol=1e-4) and torch.allclose(u*value[..., None, :] @ v.mT, S, atol=1e-4)
    one = torch.randn(8, 1) @ torch.randn(1, 6)
    assert abs(float(stable_rank(one)) - 1) < 1e-4 and stable_rank(torch.zeros(2, 2)).isnan()
    with pytest.raises(ValueError, match='got n=7, expected 1 to 6'): singular_vectors(S, 7)


@pytest.mark.parametrize('family', sorted(families()))
def test_the_last_residual_gives_the_logits(family):
    model = load_model(f'mock://{family}-tiny')
    last = f'blocks.{model.n_layers - 1}.resid_post'
    out, cache = model.run_with_cache([PROMPT, PROMPT[::-1]], last)
    assert torch.allclose(unembed(model, cache[last]), out.logits, atol=1e-4)


@pytest.mark.parametrize('query', [None, 0, 13])
def test_the_lens_is_the_rest_of_the_block_and_the_unembedding(query):
    model = load_model('mock://mamba2-tiny')
    look = state_lens(model, PROMPT, 1, [0, 7, 13], query)
    r = model.recurrences(PROMPT, 1)[1]
    for k, t in enumerate(look.steps):
        q = t if query is None else query
        for h in (0, 3):
            said = (r.states([t])[0, 0, h] @ r[h].C[0, q, 0])
            def alone(y, h=h, said=said):
                out = torch.zeros_like(y)
                out[:, 0, h] = said
                return out
            _, cache = model.run_with_cache(PROMPT, 'blocks.1.ssm.out', apply('blocks.1.ssm.y', alone, at=q), at=q)
            want = model.hf.lm_head(model.hf.backbone.norm_f(cache['blocks.1.ssm.out']))[0, 0]
            assert torch.allclose(look.logits[k, h], want, atol=1e-4)
    assert look.queries == ((0, 7, 13) if query is None else (query,)*3) and len(look.top(2)[0][0]) == 2


@pytest.mark.parametrize('family', ['jamba', 'hymba', 'rwkv7', 'qwen3-next'])
def test_the_lens_of_a_query_agrees_with_the_own_one(family):
    model = load_model(f'mock://{family}-tiny')
    layer = next(iter(model.recurrences(PROMPT)))
    assert torch.allclose(state_lens(model, PROMPT, layer, [11]).logits, state_lens(model, PROMPT, layer, [11], 11).logits, atol=1e-3)


def test_steps_that_are_not_there():
    model = load_model('mock://mamba2-tiny')
    with pytest.raises(ValueError, match='got step 20, expected some of 0 to 19'): state_lens(model, PROMPT, 0, [20])
    with pytest.raises(ValueError, match='got step -1'): state_lens(model, PROMPT, 0, [1], -1)
    with pytest.raises(ValueError, match='got block 9'): state_lens(model, PROMPT, 9)


def maps(html):
    "The values, row labels and column labels of each heat map, as its hover reads them."
    out = []
    for size, halves, labels in re.findall(r'data-n="([^"]*)" data-v="([^"]*)" data-l="([^"]*)"', html):
        rows, cols, k = map(float, size.split())
        v = np.frombuffer(base64.b64decode(halves), '<f2').astype(float)*k
        out.append((v.reshape(int(rows), int(cols)), *json.loads(unescape(labels))[:2]))
    return out


@pytest.mark.parametrize('family', ['mamba1', 'mamba2', 'rwkv7', 'qwen3-next', 'hymba', 'jamba'])
def test_the_maps_show_the_quantities(family):
    model = load_model(f'mock://{family}-tiny')
    records, words = model.recurrences([PROMPT]), model.strings(torch.tensor(PROMPT))
    one = lambda v, f: v if v.dim() == 1 else f(v)
    three = maps(memory_view(records, words))
    for k, (i, r) in enumerate(records.items()):
        tau = one(horizon(r)[0], lambda v: v.sort(-1)[0][..., (v.shape[-1] - 1)//2])
        want = tau.log10(), mean_distance(r.attention())[0], sink_share(r)[0]
        for (value, rows, _), w in zip(three, want, strict=True):
            assert rows[k] == str(i) and np.allclose(value[k], w, rtol=2e-3, atol=2e-3*np.abs(value).max())
    (kept, _, steps), (rank, _, _) = maps(memory_view(records, words, i))
    left = retention(r)[0]
    assert np.allclose(kept, (left if left.dim() == 2 else left.mean(-1)).T, atol=2e-3)
    assert np.allclose(rank, stable_rank(r.states(range(r.length))[0]).T, rtol=2e-3)
    assert len(steps) == r.length == 20 + model.meta and steps[-1] == f'19 {words[-1]}'
    assert steps[:model.meta] == [f'meta {t}' for t in range(model.meta)]
    with pytest.raises(ValueError, match='got layer 99'): memory_view(records, words, 99)


def test_directions_are_turned_alike():
    "Where each is written, to within a sign that changes only with the direction."
    model = load_model('mock://rwkv7-tiny')
    S = model.recurrences(PROMPT, 0)[0].states(range(20))[0, :, 1]
    page = directions_view(S, n=2)
    (value, rows, steps), = maps(page)
    _, _, vt = np.linalg.svd(S.double().numpy())
    assert rows is None and steps == [str(t) for t in range(20)]
    assert np.allclose(np.abs(value.T), np.abs(vt[:, 0]), atol=5e-3) and (np.diff(value.T, axis=0)**2).sum(1).max() <= 2.01
    assert 'singular value 2' in page and 'singular value 3' not in page


def test_the_table_of_a_lens_says_what_the_lens_says(tmp_path):
    model = load_model('tiny://mamba2')
    look = state_lens(model, 'And the elders of Cuba were gathered in', 3, [2, 4, 7], 7)
    page, best = lens_view(look, [3, 0], n=2), look.top(2)
    cells = [tuple(map(unescape, c)) for c in re.findall(r'<td data-t="([^"]*)" style="[^"]*">([^<]*)</td>', page)]
    assert [word for _, word in cells] == [row[h][0][0] for row in best for h in (3, 0)]
    assert cells[-1][0].startswith(f"step 7  in, head 0: ' Havana' {best[2][0][0][1]:.1f}, {best[2][0][1][0]!r} ")
    assert 'query and gate of step 7' in page and 'of each step' in lens_view(state_lens(model, [5, 6], 3))
    assert 'Havana' in look.to_html(tmp_path/'lens.html').read_text()
    figure = look.plot(0)
    assert [t.get_text() for t in figure.axes[0].texts][-1] == 'Havana' and figure.axes[0].images[0].get_array().shape == (1, 3)
    with pytest.raises(ValueError, match=r'got heads=\[8\], expected some of 0 to 7'): lens_view(look, 8)
    with pytest.raises(ValueError, match=r'got heads=\[\]'): look.plot([])
