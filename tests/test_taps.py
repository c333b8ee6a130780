"""Taps of the short convolution: cut by us and by hand, in every family, and on a model whose taps are known."""
import copy
from contextlib import ExitStack

import pytest
import torch
from checkpoints import SHAPES, random_model
from transformers import Mamba2Config, Mamba2ForCausalLM

from circuitbench.hidden import folded_attention, hidden_attention
from circuitbench.hook import HookedModel
from circuitbench.load import load_model
from circuitbench.models.rwkv7 import Rwkv7TokenShift
from circuitbench.site import families
from circuitbench.taps import components, conv_taps, cut_tap, mixer_of, written_by_lag

FAMILIES = [f for f in sorted(families()) if f not in ('llama', 'lfm2', 'titans')]  # without a recurrence, or with one that is not linear
CONVOLVED = [f for f in FAMILIES if f != 'rwkv7']
IDS = torch.randint(1, 60, (1, 24), generator=torch.Generator().manual_seed(3))


def opened(family, shape=0):
    torch.set_num_threads(1)
    model = HookedModel(random_model(family, shape))
    return model, model.recurrent()[-1]


@pytest.mark.parametrize('family, shape', [(f, k) for f in CONVOLVED for k in range(len(SHAPES[f]))])
def test_all_taps_cut_but_the_present_are_a_kernel_of_one_column(family, shape):
    model, layer = opened(family, shape)
    other, taps = HookedModel(copy.deepcopy(model.hf)), conv_taps(model, layer)
    kernel, clean = mixer_of(model, layer).conv1d.weight, model.run(IDS).logits
    mixer_of(other, layer).conv1d.weight[:, :, :-1] = 0
    with ExitStack() as stack:
        for component in taps.channels:
            for lag in range(1, taps.kernel.shape[1]): stack.enter_context(cut_tap(model, layer, component, lag))
        cut = model.run(IDS).logits
        assert torch.equal(cut, other.run(IDS).logits) and not torch.allclose(cut, clean, atol=1e-4)
        assert torch.equal(model.run(IDS, backend='transformers').logits, other.run(IDS, backend='transformers').logits)
    assert mixer_of(model, layer).conv1d.weight is kernel and torch.equal(model.run(IDS).logits, clean)


@pytest.mark.parametrize('family', CONVOLVED)
def test_a_tap_is_its_column_at_its_channels(family):
    "By the sites: only those of the component move, and of a head only that head's."
    model, layer = opened(family)
    sites = [f'blocks.{layer}.ssm.{s}' for s in ('conv', 'x', 'B', 'C')]
    _, clean = model.run_with_cache(IDS, sites)
    for component, channels in components(model, layer).items():
        with cut_tap(model, layer, component, 1): _, cut = model.run_with_cache(IDS, sites)
        moved = (cut[sites[0]] != clean[sites[0]]).any(0).any(0).nonzero().flatten().tolist()
        assert moved and {*moved} <= {*channels} and len(moved) > .9*len(channels)
        with cut_tap(model, layer, component, 1, factor=1.): assert torch.equal(model.run(IDS).logits, model.run(IDS).logits)
        groups = {h: [h] for h in range(model.sizes['head'])}
        if component != 'x':
            keys, width = len(channels)//model.sizes['d_state'], model.sizes['d_state']
            each = model.sizes['head']//keys
            groups = {h: [g for g in groups if g//each == h//each] for h in groups}
        heads = groups[1]
        with cut_tap(model, layer, component, 1, heads): _, cut = model.run_with_cache(IDS, sites)
        site = f'blocks.{layer}.ssm.{component}'
        changed = (cut[site] != clean[site]).transpose(0, 2).flatten(1).any(1).nonzero().flatten().tolist()
        assert changed == heads
        if len(heads) > 1:
            assert width and len(heads) == each
            with pytest.raises(ValueError, match='which share their'), cut_tap(model, layer, component, 1, heads[0]): pass


def test_the_names_of_delta_nets():
    model, layer = opened('qwen3-next')
    for name, site in (('v', 'x'), ('k', 'B'), ('q', 'C')):
        with cut_tap(model, layer, name, 2): a = model.run(IDS).logits
        with cut_tap(model, layer, site, 2): b = model.run(IDS).logits
        assert torch.equal(a, b)


class _Shift(Rwkv7TokenShift):
    "A token shift, written out, whose blend c has its two terms multiplied by (now, before)."
    def __init__(self, c, now, before):
        super().__init__()
        self.factors = [(now, before) if k == c else (1., 1.) for k in range(6)]
    def forward(self, u, before, share):
        return torch.cat([a*u*(1 - s) + b*before*s for s, (a, b) in zip(share, self.factors, strict=True)], -1)


@pytest.mark.parametrize('lag', [0, 1])
@pytest.mark.parametrize('c', range(6))
def test_a_cut_of_the_token_shift(c, lag):
    model, layer = opened('rwkv7')
    other, clean = HookedModel(copy.deepcopy(model.hf)), model.run(IDS).logits
    other.blocks[layer].attn.token_shift = _Shift(c, *(.25 if k == lag else 1. for k in (0, 1)))
    with cut_tap(model, layer, 'rwkvag'[c], lag, factor=.25): cut = model.run(IDS).logits
    assert torch.allclose(cut, other.run(IDS).logits, atol=1e-5) and not torch.allclose(cut, clean, atol=1e-5)
    assert torch.equal(model.run(IDS).logits, clean)


@pytest.mark.parametrize('family, component', [('mamba2', 'B'), ('mamba1', 'x'), ('qwen3-5', 'q'), ('rwkv7', 'k'), ('hymba', 'x')])
def test_cuts_hold_while_generating_and_come_off_after_an_exception(family, component):
    model, layer = opened(family)
    clean = model.generate(IDS, 6).tokens
    with cut_tap(model, layer, component, 1), cut_tap(model, layer, component, 0):
        cut = model.generate(IDS, 6).tokens
        assert torch.equal(cut[:, -6:-1], model.run(cut[:, :-1]).logits[:, -6:-1].argmax(-1)[:, :5])
    with pytest.raises(RuntimeError, match='on purpose'), cut_tap(model, layer, component, 1): raise RuntimeError('on purpose')
    assert torch.equal(model.generate(IDS, 6).tokens, clean)


@pytest.mark.parametrize('family, shape', [(f, k) for f in FAMILIES for k in range(len(SHAPES[f]))])
def test_parts_sum_to_what_is_written(family, shape):
    model, layer = opened(family, shape)
    r, parts, bias = written_by_lag(model, IDS, layer)
    x = (r.x if hasattr(r, 'x') else r.v)[0]
    total = parts.sum(0) if bias is None else parts.sum(0) + bias
    assert float((total - x).abs().max()) < 3e-6*float(x.abs().max())
    for lag in range(len(parts)): assert not parts[lag, :lag].any() and parts[lag, lag:].any()
    conv = getattr(mixer_of(model, layer), 'conv1d', None)
    assert (bias is None) == (conv is None or conv.bias is None)


def test_what_is_not_there_is_named():
    model = load_model('mock://mamba2-tiny')
    for ask, message in [(dict(component='w'), "got component='w', expected one of x, B, C"), (dict(lag=4), 'got lag=4, expected 0 to 3'), (dict(heads=7), 'got heads=.7., expected some of 0 to 3'),
                         (dict(layer=5), 'got block 5')]:
        with pytest.raises(ValueError, match=message), cut_tap(model, **dict(layer=0, component='B', lag=1) | ask): pass
    with pytest.raises(ValueError, match='expected one of x$'), cut_tap(load_model('mock://mamba1-tiny'), 0, 'B', 1): pass
    with pytest.raises(ValueError, match='token shifts have no heads'), cut_tap(load_model('mock://rwkv7-tiny'), 0, 'k', 1, 0): pass
    with pytest.raises(ValueError, match='got 2 prompts, expected one'): written_by_lag(model, [[1, 2], [3, 4]], 0)
    with pytest.raises(ValueError, match='got block 0, expected one with a recurrence'): conv_taps(load_model('mock://llama-tiny'), 0)


KEYS = VALUES = 8


@pytest.fixture(scope='module')
def recall():
    """Multi-query recall with weights set by hand: head 0 writes a value where the key before it says, and reads with the
    key at hand; heads 1 to 3 are decoys. Tokens 0-7 are keys, 8-15 values."""
    V, d, heads, p, n = KEYS + VALUES, 32, 4, VALUES, KEYS
    hf = Mamba2ForCausalLM(Mamba2Config(
        vocab_size=V, hidden_size=d, num_hidden_layers=1, num_heads=heads, head_dim=p, state_size=n, n_groups=1, expand=1,
        conv_kernel=4, chunk_size=8, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0))
    m, inner, size = hf.backbone.layers[0].mixer, heads*p, (25/32)**.5      # the norm's scale on 25 of 32 channels
    with torch.no_grad():
        for w in (hf.backbone.embeddings.weight, hf.lm_head.weight, m.in_proj.weight, m.conv1d.weight, m.conv1d.bias, m.out_proj.weight, m.D, m.A_log): w.zero_()
        hf.backbone.embeddings.weight[range(V), range(V)] = 1
        hf.backbone.embeddings.weight[:, V] = 1
        hf.lm_head.weight[range(KEYS, V), range(V + 1, V + 1 + VALUES)] = 1
        z, x, B, C, dt = m.in_proj.weight.split([inner, inner, n, n, heads])
        z[:, V], dt[:, KEYS:V] = 4*size, 20*size
        for h in range(heads): x[range(h*p, (h + 1)*p), range(KEYS, V)] = 6*size
        B[range(n), range(n)] = C[range(n), range(n)] = 6*size
        m.conv1d.weight[:inner, 0, -1] = m.conv1d.weight[inner + n:, 0, -1] = m.conv1d.weight[inner:inner + n, 0, -2] = 1
        m.conv1d.weight += .05*torch.rand(m.conv1d.weight.shape, generator=torch.Generator().manual_seed(0))*(m.conv1d.weight == 0)
        m.dt_bias.fill_(-15)
        m.A_log.fill_(-9)
        m.A_log[1] = .7
        m.out_proj.weight[range(V + 1, V + 1 + p), range(p)] = 1
    g = torch.Generator().manual_seed(1)
    rows = []
    for _ in range(64):
        keys, values = torch.randperm(KEYS, generator=g)[:6], KEYS + torch.randint(VALUES, (6,), generator=g)
        ask = int(torch.randint(6, (1,), generator=g))
        rows.append(([*torch.stack([keys, values], 1).flatten().tolist(), int(keys[ask])], int(values[ask]), 2*ask + 1))
    return HookedModel(hf), torch.tensor([r[0] for r in rows]), torch.tensor([r[1] for r in rows]), [r[2] for r in rows]


def test_recall_needs_three_taps_and_no_other(recall):
    model, ids, answer, _ = recall
    score = lambda: float((model.run(ids).logits[:, -1].argmax(-1) == answer).float().mean())
    assert score() == 1
    for component in 'xBC':
        for lag in range(4):
            with cut_tap(model, 0, component, lag): cut = score()
            assert cut < .4 if (component, lag) in (('x', 0), ('B', 1), ('C', 0)) else cut == 1, (component, lag, cut)


def test_recall_is_seen_in_the_rows(recall):
    "The step that the query reads, and the token whose part argues for the answer, are the value asked for."
    model, ids, answer, where = recall
    for row, token, place in list(zip(ids, answer, where, strict=True))[:8]:
        hidden = hidden_attention(model, row, 0)
        assert int(hidden.rows(-1, 0)[0, 0].abs().argmax()) == place
        folded = folded_attention(model, row, 0)
        others = model.hf.lm_head.weight[8:].mean(0)
        assert int(folded.along(model.hf.lm_head.weight[token] - others, -1)[0].argmax()) == place
        assert not folded[[1, 2, 3]].contributions(-1).any()               # the decoys are not read out
