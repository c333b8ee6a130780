"""Hidden attention and its folded form: against float64 numpy, the model's own output, and runs with frozen norms in which a token's part is taken out."""
import re

import numpy as np
import psutil
import pytest
import torch
from checkpoints import SHAPES, random_model
from torch import nn
from torch.nn import functional as F

from circuitbench import hidden as module
from circuitbench.edit import Edit, meta, zero
from circuitbench.hidden import attention_view, folded_attention, hidden_attention
from circuitbench.hook import HookedModel
from circuitbench.load import load_model
from circuitbench.record import Mamba
from circuitbench.site import families
from circuitbench.taps import mixer_of

FAMILIES = [f for f in sorted(families()) if f not in ('llama', 'lfm2', 'titans')]  # without a recurrence, or with one that is not linear
IDS = torch.randint(1, 60, (1, 40), generator=torch.Generator().manual_seed(3))


def opened(family, shape=0):
    torch.set_num_threads(1)
    model = HookedModel(random_model(family, shape))
    return model, model.recurrent()[-1]


def near(a, b, tol=1e-5): return float((a - b).abs().max()) <= tol*float(b.abs().max())


@pytest.mark.parametrize('family', ['mamba1', 'mamba2'])
@pytest.mark.parametrize('rows', [slice(None), [199, 3, 64, 65, 130], [150]])
def test_rows_equal_the_formula_in_float64(family, rows):
    "Steep and gentle decays, more rows than a block."
    ids = torch.randint(1, 200, (1, 200), generator=torch.Generator().manual_seed(1))
    model = load_model(f'mock://{family}-tiny')
    r = model.recurrences(ids, 1)[1]
    r = Mamba(r.x, r.dt*torch.linspace(.1, 30, r.heads), r.A, r.B, r.C, r.D)
    got, at = r.attention(rows)[0], list(range(200))[rows] if isinstance(rows, slice) else rows
    dt, A, B, C = (v.double().numpy() for v in (r.dt[0], r.A, r.B[0], r.C[0]))
    A = A.reshape(r.heads, -1)
    for h in (0, r.heads//2, r.heads - 1):
        g, want = h*B.shape[1]//r.heads, np.zeros((len(at), 200))
        for i, t in enumerate(at):
            for j in range(t + 1):
                want[i, j] = (C[t, g]*np.exp(A[h]*dt[j + 1:t + 1, h].sum())*B[j, g]).sum()*dt[j, h]
        assert np.abs(got[h].numpy() - want).max() <= 1e-6*np.abs(want).max()


@pytest.mark.parametrize('family', FAMILIES)
def test_rows_by_blocks_are_those_of_the_record(family, monkeypatch):
    model, layer = opened(family)
    hidden, whole = hidden_attention(model, IDS, layer), model.recurrences(IDS, layer)[layer].attention()[0]
    monkeypatch.setattr(module, '_BLOCK', 7*hidden.record.heads*hidden.record.length)
    m = model.meta
    assert near(hidden.rows(), whole[:, m:]) and near(hidden.matrix(1), whole[1, m:])
    assert near(hidden.rows([-1, 5]), whole[:, [5 + m, 39 + m]]) and near(hidden.rows(slice(3, 9), [1, 0]), whole[[1, 0], 3 + m:9 + m])
    some = hidden_attention(model, IDS, layer, [1, 0])
    assert some.heads == (1, 0) and near(some.rows('every:10', 0), whole[:1, m::10]) and len(hidden.columns) == m + 40
    values, rows, columns = hidden._head(0, 10)
    step = -(-(40 + m)//10)
    assert values.shape == (-(-40//step), -(-(40 + m)//step)) and (len(rows), len(columns)) == values.shape
    for i, j in np.ndindex(*values.shape):
        square = whole[0, m:][i*step:(i + 1)*step, j*step:(j + 1)*step]
        assert abs(values[i, j] - square.flatten()[square.abs().argmax()]) <= 1e-5*whole[0].abs().max()


def test_meta_tokens_are_columns_in_front():
    model, layer = opened('hymba')
    hidden, whole = hidden_attention(model, IDS, layer), model.recurrences(IDS, layer)[layer].attention()[0]
    assert hidden.columns[3:5] == ['meta 3', f'0 {int(IDS[0, 0])}']
    assert near(hidden.rows(meta(2)), whole[:, [2]]) and near(hidden.rows(0), whole[:, [4]])
    with pytest.raises(ValueError, match='got at=4, expected some of 0 to 3'): hidden.rows(meta(4))
    folded = folded_attention(model, IDS, layer)
    assert near(folded.contributions(meta()).sum(1) + folded.constant(meta()), folded.out[:4])


@pytest.mark.parametrize('family, shape, conv', [(f, k, conv) for f in FAMILIES for k in range(len(SHAPES[f])) for conv in [True, False][:2 - bool(k)]])
def test_contributions_and_constant_are_the_output(family, shape, conv):
    "Every recurrent block of every shape, weights and biases all drawn."
    model, _ = opened(family, shape)
    for layer in model.recurrent():
        folded = folded_attention(model, IDS, layer, conv=conv)
        _, cache = model.run_with_cache(IDS, f'blocks.{layer}.ssm.out')
        out, c, rest = cache['ssm.out'][0], folded.contributions(None), folded.constant()
        assert near(c.sum(1) + rest, out) and not c[0, model.meta + 1:].any()
        unit = F.normalize(out, dim=-1)
        assert near(folded.along(), (c*unit[:, None]).sum(-1)) and near(folded.norms(), c.norm(dim=-1))
        assert near(folded.along().sum(1) + (rest*unit).sum(1), out.norm(dim=1))
        d = torch.randn(model.sizes['d_model'], generator=torch.Generator().manual_seed(0))
        assert near(folded.along(d, [7, -1]), c[[7, -1]] @ d)
        parts = [folded[h] for h in folded.heads]
        assert near(sum(p.contributions([9])for p in parts), c[[9]])
        assert near(sum(p.constant() - p.bias for p in parts) + folded.bias, rest, 1e-4) or not rest.any()


def test_constants_are_the_biases():
    "Without biases there is none; a family's bias alone makes one."
    model, layer = opened('mamba2')
    mixer = mixer_of(model, layer)
    assert folded_attention(model, IDS, layer).constant().abs().max() > 1e-3
    mixer.conv1d.bias.zero_()
    assert not folded_attention(model, IDS, layer).constant().any()
    model, layer = opened('rwkv7')
    mixer_of(model, layer).g_norm.bias.zero_()
    assert not folded_attention(model, IDS, layer).constant().any()


class Frozen(nn.Module):
    "A gated norm whose scales are those of an earlier call."
    def __init__(self, norm, gate_first):
        super().__init__()
        self.norm, self.first, self.scale = norm, gate_first, None
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon
    def forward(self, y, z):
        h, g = y.float(), F.silu(z.float())
        if self.first: h = h*g
        groups = h.unflatten(-1, (-1, getattr(self.norm, 'group_size', h.shape[-1])))
        if self.scale is None: self.scale = torch.rsqrt(groups.square().mean(-1, keepdim=True) + self.variance_epsilon)
        h = self.weight*(groups*self.scale).flatten(-2)
        return h if self.first else h*g


class FrozenGroups(nn.Module):
    "RWKV-7's norm of each head, whose scales are those of an earlier call."
    def __init__(self, norm):
        super().__init__()
        self.norm, self.scale = norm, None
    def forward(self, y):
        h = y.unflatten(-1, (self.norm.num_groups, -1))
        if self.scale is None: self.scale = torch.rsqrt(h.var(-1, unbiased=False, keepdim=True) + self.norm.eps)
        return ((h - h.mean(-1, keepdim=True))*self.scale).flatten(1)*self.norm.weight + self.norm.bias


def frozen(family):
    "A model whose last recurrent block keeps the scales of its norm from the run of IDS."
    model, layer = opened(family)
    mixer = mixer_of(model, layer)
    if family == 'mamba2': mixer.norm = Frozen(mixer.norm, True)
    if family == 'qwen3-5': mixer.norm = Frozen(mixer.norm, False)
    if family == 'rwkv7': mixer.g_norm = FrozenGroups(mixer.g_norm)
    _, cache = model.run_with_cache(IDS, f'blocks.{layer}.*')
    assert near(cache['ssm.out'], opened(family)[0].run_with_cache(IDS, f'blocks.{layer}.ssm.out')[1]['ssm.out'])
    return model, layer, {k.split('.', 2)[2]: v[0] for k, v in cache.items()}


@pytest.mark.parametrize('family', ['mamba1', 'mamba2', 'jamba', 'qwen3-5', 'rwkv7'])
@pytest.mark.parametrize('s', [0, 11, 38])
def test_a_steps_part_is_what_its_write_was_worth(family, s):
    "The model's own tail, its norm held, with the write of step s left out: readers after s lose c(t, s)."
    model, layer, clean = frozen(family)
    folded = folded_attention(opened(family)[0], IDS, layer, conv=False)
    _, cache = model.run_with_cache(IDS, f'blocks.{layer}.ssm.out', zero(f'blocks.{layer}.ssm.write', s))
    lost, c = clean['ssm.out'] - cache['ssm.out'][0], folded.contributions(None)[:, s]
    c[:s + 1], lost[s] = 0, 0
    assert c.abs().max() > 1e-5 and float((lost - c).abs().max()) <= 1e-6*float(clean['ssm.out'].abs().max())


@pytest.mark.parametrize('family', ['mamba1', 'mamba2', 'qwen3-5'])
@pytest.mark.parametrize('s', [0, 11, 37])
def test_a_tokens_part_is_what_its_place_in_the_kernel_was_worth(family, s):
    "What steps s to s+3 write, computed by hand without token s in the convolution and with the slope held."
    model, layer, clean = frozen(family)
    mixer, inner = mixer_of(model, layer), model.sizes['d_inner']
    u = clean['ssm.in_proj']
    rows = {'mamba1': slice(0, inner), 'mamba2': slice(inner, 2*inner), 'qwen3-5': slice(u.shape[-1] - inner, None)}[family]
    u, w = u[:, rows].double(), mixer.conv1d.weight[slice(-inner, None) if family == 'qwen3-5' else slice(0, inner), 0].double()
    b = 0. if mixer.conv1d.bias is None else mixer.conv1d.bias[:inner].double()
    x = clean['ssm.x'].clone()
    for t in range(s, min(s + 4, 40)):
        z = b + sum(w[:, 3 - k]*u[t - k] for k in range(4) if t >= k)
        x[t] -= (torch.sigmoid(z)*w[:, 3 - (t - s)]*u[s]).float().view(x[t].shape)
    folded = folded_attention(opened(family)[0], IDS, layer)
    _, cache = model.run_with_cache(IDS, f'blocks.{layer}.ssm.out', Edit(f'blocks.{layer}.ssm.x', lambda v, where: x[None]))
    lost, c = clean['ssm.out'] - cache['ssm.out'][0], folded.contributions(None)[:, s]
    assert c.abs().max() > 1e-2 and near(lost, c, 2e-5) and not c[:s].any()


@pytest.mark.parametrize('s', [0, 11, 37])
def test_a_tokens_part_in_the_token_shift(s):
    "The values of steps s and s + 1 by hand, token s left out of both layers' shifts, the mixing share held."
    model, layer, clean = frozen('rwkv7')
    mixer, first = mixer_of(model, layer), mixer_of(model, 0)
    u, u0 = clean['mixer_in'], model.run_with_cache(IDS, 'blocks.0.mixer_in')[1]['mixer_in'][0]
    v = clean['ssm.x'].flatten(1).clone()
    for t, late in ((s, False), (s + 1, True)):
        before = u[t - 1] if t else torch.zeros_like(u[0])
        share = torch.sigmoid(mixer.v_lora(u[t] + (before - u[t])*mixer.x_v[0, 0]))
        part = lambda m, x, late=late: m.v_proj(x*(m.x_v[0, 0] if late else 1 - m.x_v[0, 0]))
        v[t] -= (1 - share)*part(mixer, u[s]) + share*part(first, u0[s])
    folded = folded_attention(opened('rwkv7')[0], IDS, layer)
    edit = Edit(f'blocks.{layer}.ssm.x', lambda x, where: v.view(x.shape))
    _, cache = model.run_with_cache(IDS, f'blocks.{layer}.ssm.out', edit)
    lost, c = (clean['ssm.out'] - cache['ssm.out'][0])[s + 2:], folded.contributions(None)[s + 2:, s]   # the bonus is earlier
    assert c.abs().max() > 1e-3 and float((lost - c).abs().max()) <= 2e-5*float(clean['ssm.out'].abs().max())


def test_mamba1_in_groups_of_heads(monkeypatch):
    "More heads than one group, more rows than one block."
    model, layer = opened('mamba1')
    wide = HookedModel(random_model('mamba1', 0))
    folded = folded_attention(wide, IDS, layer)
    whole = folded.along()
    monkeypatch.setattr(module, '_GROUP', 16)
    monkeypatch.setattr(module, '_BLOCK', 40*16*7)
    assert near(folded.along(), whole) and near(folded._all(None, 10)[0], module._largest(whole, 4))


def test_numbers_and_vectors_in_half_precision():
    "A bfloat16 model: the sum is right to the precision of its own output."
    hf = random_model('mamba2', 0).to(torch.bfloat16)
    model = HookedModel(hf)
    folded = folded_attention(model, IDS, 1)
    assert folded.contributions(-1).dtype == torch.float32
    assert near(folded.contributions(None).sum(1) + folded.constant(), folded.out, 2e-2)


def test_pictures_and_pages(tmp_path):
    model = load_model('tiny://mamba2')
    hidden = hidden_attention(model, 'And the elders of Cuba were <b> gathered', 3, [3, 0])
    page, n = hidden.view(0), len(hidden.words)
    assert page == attention_view(hidden, 0) and 'Hidden attention of block 3, head 0' in page and re.search(f'data-n="{n} {n} ', page)
    assert '<b>' not in page.split('data-n')[1]
    assert hidden.plot(3).axes[0].images[0].get_array().shape == (n, n) and '$' not in repr(hidden)
    made = hidden.to_html(tmp_path/'hidden.html').read_text()
    assert 'Head 3' in made and 'Head 0' in made
    folded = folded_attention(model, 'And the elders of Cuba were gathered in', 3)
    assert folded.plot().axes[0].images[0].get_array().shape == (len(folded.words),)*2
    assert 'What each token adds to block 3, along its output' in folded.to_html(tmp_path/'folded.html').read_text()
    small = attention_view(hidden_attention(model, [5]*300, 0), 0, cells=50)
    assert 'data-n="50 50 ' in small and '6 ' in small


def test_what_is_not_there_is_named(monkeypatch):
    model = load_model('mock://mamba2-tiny')
    hidden, folded = hidden_attention(model, IDS, 0, [1, 2]), folded_attention(model, IDS, 0)
    for ask, message in [
            (lambda: hidden.rows(40), 'got at=40, expected some of 0 to 39'), (lambda: hidden.rows([]), 'got at='),
            (lambda: hidden.rows(meta(0)), 'got at=0, expected none: there are no meta tokens'),
            (lambda: hidden.rows(0, 3), r'got heads=\(3,\), expected some of 1, 2'), (lambda: folded[9], r'got heads=\(9,\)'),
            (lambda: folded.along(torch.ones(3)), r'got a direction of shape \(3,\), expected \(32,\)'),
            (lambda: hidden.view(1, 0), 'got cells=0'), (lambda: hidden_attention(model, [[1], [2]], 0), 'got 2 prompts, expected one'),
            (lambda: hidden_attention(model, IDS, 0, 9), 'got heads='), (lambda: hidden_attention(model, IDS, 7), 'got block 7'),
            (lambda: folded_attention(load_model('mock://llama-tiny'), IDS, 0), 'there is none')]:
        with pytest.raises(ValueError, match=message): ask()
    monkeypatch.setattr(psutil, 'virtual_memory', lambda: type('M', (), dict(available=2**10)))
    with pytest.raises(ValueError, match='got 40 rows of 2 heads, .* ask for fewer rows or heads'): hidden.rows()
    assert hidden.rows([3], 1).shape == (1, 1, 40)
