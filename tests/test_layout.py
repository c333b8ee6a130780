"""mamba_ssm's checkpoints, written in its own layout, against a float64 oracle of its equations; and the hybrid model itself."""
import json
import math
import pickle
import warnings
from types import SimpleNamespace

import numpy as np
import oracle_mamba_ssm as oracle
import pytest
import torch
from exact import float64
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, Mamba2Config, MambaConfig
from transformers.models.mamba2 import modeling_mamba2

from circuitbench.hook import HookedModel
from circuitbench.layout import from_mamba_ssm, is_mamba_ssm, read_archive
from circuitbench.models import mamba2attn
from circuitbench.models.mamba2attn import ADAPTER, Mamba2AttnConfig, Mamba2AttnForCausalLM, small
from circuitbench.seam import ATTENTION, MAMBA2, swapped

torch.set_num_threads(1)

SHARED = dict(d_model=32, n_layer=2, vocab_size=61, rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8)
SHARED2 = SHARED | dict(d_intermediate=0, attn_layer_idx=[], attn_cfg={}, pad_vocab_size_multiple=16, tie_embeddings=True)
SSM = dict(layer='Mamba2', d_state=8, headdim=16, chunk_size=8)
MHA = dict(causal=True, d_conv=4, head_dim=12, num_heads=4, out_proj_bias=False, qkv_proj_bias=False, rotary_emb_dim=6)   # the published keys
def hybrid(ssm=(), attn=(), **changes):
    return SHARED2 | dict(n_layer=3, attn_layer_idx=[1], ssm_cfg=SSM | dict(ssm), attn_cfg=MHA | dict(attn)) | changes


CASES = {
    'mamba1 as published': SHARED | dict(ssm_cfg={}),
    'mamba1, only what has no default': dict(d_model=32, n_layer=2, vocab_size=61),
    'mamba1, odd sizes': SHARED | dict(d_model=18, pad_vocab_size_multiple=1, tie_embeddings=False,
                                       ssm_cfg=dict(layer='Mamba1', d_state=5, d_conv=3, expand=3, dt_rank=3, conv_bias=False)),
    'mamba1, biases': SHARED | dict(n_layer=3, ssm_cfg=dict(bias=True, d_state=1, dt_rank='auto', dt_min=.01, dt_init='constant')),
    'mamba2 as published': SHARED2 | dict(ssm_cfg=dict(layer='Mamba2')),
    'mamba2, groups': SHARED2 | dict(ssm_cfg=SSM | dict(ngroups=2)),
    'mamba2, odd sizes': SHARED2 | dict(d_model=18, tie_embeddings=False, ssm_cfg=SSM | dict(d_state=7, d_conv=3, expand=3, headdim=9, ngroups=3, conv_bias=False)),
    'mamba2, biases': SHARED2 | dict(n_layer=3, ssm_cfg=SSM | dict(bias=True, ngroups=4, d_ssm=64)),
    'mamba2, dt_limit': SHARED2 | dict(ssm_cfg=SSM | dict(dt_limit=[.2, .5])),
    'hybrid as published': hybrid(),
    'hybrid, shared keys': hybrid(dict(ngroups=2), dict(num_heads_kv=2)),
    'hybrid, one key head, no conv': hybrid(attn=dict(num_heads_kv=1, d_conv=0)),
    'hybrid, biases': hybrid(dict(bias=True), dict(qkv_proj_bias=True, out_proj_bias=True, softmax_scale=.4), attn_layer_idx=[2, 0]),
    'hybrid, defaults of MHA': hybrid(attn_cfg=dict(causal=True, num_heads=4)),
    'hybrid, interleaved': hybrid(attn=dict(rotary_emb_interleaved=True, rotary_emb_base=500., rotary_emb_dim=12, d_conv=2)),
    'hybrid, all turned, first block': hybrid(dict(conv_bias=False), dict(rotary_emb_dim=12), attn_layer_idx=[0, 1], tie_embeddings=False),
    'hybrid, odd sizes': hybrid(dict(d_state=7, d_conv=3, expand=3, headdim=9, ngroups=3), dict(num_heads=3, head_dim=10, d_conv=3), d_model=18)}
PLAIN = [c for c in CASES if 'bias' not in c]           # transformers puts the input projection's bias onto padding
HYBRID = [c for c in CASES if c.startswith('hybrid')]


def ids(batch, length, seed=0): return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))
def gap(a, b): return float(np.abs(np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)).max())


def load(config, tensors, folder, **options):
    "Through files, as a user has them: the model and what transformers says about the tensors."
    torch.save(tensors, folder/'pytorch_model.bin')
    (folder/'config.json').write_text(json.dumps(config))
    config = json.loads((folder/'config.json').read_text())
    assert is_mamba_ssm(config)
    made, tensors = from_mamba_ssm(config, read_archive(folder/'pytorch_model.bin'))
    return AutoModelForCausalLM._model_mapping[type(made)].from_pretrained(None, config=made, state_dict=tensors, output_loading_info=True, **options)


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    "name -> (model, its oracle), made once."
    made = {}
    def _model(name, dtype=torch.float32):
        if (name, dtype) not in made:
            tensors = oracle.checkpoint(CASES[name], dtype=dtype)
            hf, info = load(CASES[name], tensors, tmp_path_factory.mktemp('m'), dtype=dtype)
            assert not any(info.values())
            made[name, dtype] = hf.requires_grad_(False), lambda x: oracle.run(CASES[name], tensors, x.numpy())
        return made[name, dtype]
    return _model


# -- the same numbers --------------------------------------------------------------------
@pytest.mark.parametrize('name', CASES)
def test_logits_equal_the_oracle(model, name):
    hf, truth = model(name)
    x = ids(2, 37)
    want, got = truth(x), hf(x, use_cache=False).logits
    assert got.shape == (2, 37, oracle.vocabulary(CASES[name])) and gap(got, want) <= 1e-5*np.abs(want).max()


@pytest.mark.parametrize('name', CASES)
def test_in_float64_nothing_but_rounding_is_left(model, name):
    hf, truth = model(name, torch.float64)
    x = ids(2, 21)
    with float64(hf.backbone.layers[0]): got = hf(x, use_cache=False).logits
    want = truth(x)
    assert got.dtype == torch.float64 and gap(got, want) <= 1e-11*np.abs(want).max()


@pytest.mark.parametrize('name', [c for c in CASES if 'dt_limit' not in c])     # transformers' decoding step knows no limit
def test_pieces_and_single_steps_equal_the_whole(model, name):
    hf, truth = model(name)
    x = ids(2, 84)
    want = truth(x)
    longer = [] if name.startswith('mamba1') else [[2, 1, 31, 50]]      # transformers' Mamba-1 starts every longer piece anew
    for pieces in ([20, *[1]*64], [1]*84, *longer):
        cache, got = DynamicCache(config=hf.config), []
        for piece in x.split(pieces, 1): got.append(hf(piece, **{mamba2attn._CACHE: cache}).logits)
        assert gap(torch.cat(got, 1), want) <= 1e-5*np.abs(want).max(), pieces


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('name', PLAIN)
def test_padded_prompts_equal_single_ones(model, name, side):
    hf, truth = model(name)
    rows, n = [ids(1, k, seed=k)[0] for k in (3, 14, 9)], 14
    pad = lambda r, fill: torch.cat([fill*torch.ones(n - len(r)), r] if side == 'left' else [r, fill*torch.ones(n - len(r))]).long()
    x, mask = torch.stack([pad(r, 7) for r in rows]), torch.stack([pad(torch.ones(len(r)), 0) for r in rows])
    got = hf(x, attention_mask=mask, use_cache=False).logits
    for i, r in enumerate(rows):
        want = truth(r[None])[0]
        assert gap(got[i][mask[i].bool()], want) <= 1e-5*np.abs(want).max()


@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
@pytest.mark.parametrize('name', [c for c in HYBRID if c in PLAIN])
def test_left_padded_batches_are_decoded_as_single_prompts(model, name, attention):
    hf, truth = model(name)
    hf.set_attn_implementation(attention)
    rows, n = [ids(1, k, seed=k)[0] for k in (2, 14, 9)], 14
    x = torch.stack([torch.cat([torch.full((n - len(r),), 7), r]) for r in rows])
    mask = torch.stack([torch.arange(n) >= n - len(r) for r in rows]).long()
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True)
    batch = hf.generate(x, attention_mask=mask, **options)
    for i, r in enumerate(rows):
        whole = truth(torch.cat([r, batch.sequences[i, n:-1]])[None])[0][len(r) - 1:]
        got = torch.stack(batch.logits, 1)[i]
        assert gap(got, whole) <= 1e-5*np.abs(whole).max() and torch.equal(got.argmax(-1), batch.sequences[i, n:])


@pytest.mark.parametrize('name', HYBRID)
def test_beam_search_reorders_what_is_kept(model, name):
    hf, _ = model(name)
    options = dict(max_new_tokens=10, num_beams=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    with_cache, without = (hf.generate(ids(2, 9), use_cache=cache, **options) for cache in (True, False))
    assert with_cache.shape == (2, 19) and torch.equal(with_cache, without)


@pytest.mark.parametrize('name', CASES)
def test_opened_it_knows_biases_and_limits_that_transformers_forgets(model, name):
    "Padding on the left under biased projections, and the bounds of the step size while decoding."
    hf, truth = model(name)
    opened, rows = HookedModel(hf), [ids(1, k, seed=k)[0] for k in (3, 14)]
    x, mask = torch.stack([torch.cat([torch.full((14 - len(r),), 7), r]) for r in rows]), torch.stack([torch.arange(14) >= 14 - len(r) for r in rows]).long()
    got = opened.run(x, mask=mask).logits
    for i, r in enumerate(rows):
        want = truth(r[None])[0]
        assert gap(got[i, 14 - len(r):], want) <= 1e-5*np.abs(want).max()
    made = opened.generate(x[1:], 20, eos_token_id=None)
    assert np.array_equal(truth(made.tokens[:, :-1])[0, 13:].argmax(-1), made.tokens[0, 14:])


# -- the hybrid --------------------------------------------------------------------------
def test_derivatives_equal_the_oracle(model):
    "Along a random direction of every tensor at once, by a central difference of the oracle."
    name, x, eps = 'hybrid, shared keys', ids(2, 15), 1e-6
    tensors = oracle.checkpoint(CASES[name], dtype=torch.float64)
    config, ours = from_mamba_ssm(CASES[name], tensors)
    hf = Mamba2AttnForCausalLM.from_pretrained(None, config=config, state_dict=ours, dtype=torch.float64)
    rand = torch.Generator().manual_seed(1)
    step = {n: torch.randn(p.shape, generator=rand, dtype=torch.float64) for n, p in hf.named_parameters()}
    with float64(hf.backbone.layers[0]): score = hf(x, use_cache=False).logits.sin().sum()
    grads = torch.autograd.grad(score, list(hf.parameters()))
    got = sum(float((g*d).sum()) for g, d in zip(grads, step.values()))
    named = {n.replace('embeddings', 'embedding'): d for n, d in step.items()}
    named['lm_head.weight'] = named['backbone.embedding.weight']
    ends = [np.sin(oracle.run(CASES[name], {n: t + sign*eps*named[n] for n, t in tensors.items()}, x.numpy())).sum() for sign in (1, -1)]
    assert got == pytest.approx((ends[0] - ends[1])/(2*eps), rel=1e-6) and all(float(g.abs().max()) > 0 for g in grads)


@pytest.mark.parametrize('t', [0, 8, 20])
def test_a_token_changes_nothing_before_it_and_everything_after(model, t):
    hf, _ = model('hybrid, shared keys')
    x = ids(1, 21)
    other = x.clone()
    other[0, t] = x[0, t] % 60 + 1
    d = (hf(x).logits - hf(other).logits)[0].abs().amax(-1)
    assert (d[:t] <= 1e-5).all() and (d[t:] > 1e-4).all()


def test_training_goes_through_checkpoints_of_blocks():
    torch.manual_seed(0)
    hf, x = Mamba2AttnForCausalLM(small(61)).train(), ids(2, 12)
    def grads():
        hf.zero_grad()
        hf(x, labels=x).loss.backward()
        return [p.grad.clone() for p in hf.parameters()]
    plain = grads()
    with warnings.catch_warnings():                         # transformers 5.24 has a new name for it
        warnings.simplefilter('ignore')
        hf.gradient_checkpointing_enable()
        again = grads()
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in plain) and all(torch.allclose(a, b) for a, b in zip(plain, again))


def test_a_new_model_is_drawn_everywhere():
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(small(61))
    assert type(hf) is Mamba2AttnForCausalLM and hf.lm_head.weight is hf.backbone.embeddings.weight
    for n, p in hf.named_parameters():
        assert torch.isfinite(p).all() and (p.dim() == 1 or float(p.detach().std()) > 1e-3), n


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_saved_in_the_layout_of_transformers(tmp_path, model, dtype):
    hf, _ = model('hybrid, biases')
    hf = type(hf)(hf.config).to(dtype).eval() if dtype != torch.float32 else hf
    hf.save_pretrained(tmp_path)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype, output_loading_info=True)
    assert type(again) is type(hf) and not any(info.values()) and AutoConfig.from_pretrained(tmp_path).to_dict() == again.config.to_dict()
    assert again.config.attn_layer_idx == [0, 2] and torch.equal(again(ids(1, 9)).logits, hf(ids(1, 9)).logits)


def test_bf16_stays_near_the_oracle(tmp_path):
    "What blocks add is scaled to .3, as trained ones keep it."
    config = CASES['hybrid, shared keys']
    tensors = {n: (.3*t if 'out_proj' in n else t).bfloat16() for n, t in oracle.checkpoint(config).items()}
    hf, _ = load(config, tensors, tmp_path, dtype=torch.bfloat16)
    want = oracle.run(config, tensors, ids(2, 64).numpy())
    off = np.linalg.norm(hf(ids(2, 64)).logits.detach().double().numpy() - want, axis=-1)/np.linalg.norm(want, axis=-1)
    assert hf.backbone.layers[1].mixer.in_proj.weight.dtype == torch.bfloat16 and np.median(off) < 2e-2


class Listens:
    "A tap that keeps what it hears of one site."
    def __init__(self, site): self.site, self.heard = site, []
    def wants(self, site): return site == self.site
    def stops(self, length): return []
    def reads(self, site, length, stops): return []
    def note(self, kind, **inputs): pass
    def __call__(self, site, x):
        if site == self.site: self.heard.append(x)
        return x


@pytest.mark.parametrize('attention', ['eager', 'sdpa'])
@pytest.mark.parametrize('name', HYBRID)
def test_sites_are_inputs_and_outputs_of_modules(model, name, attention):
    "q, k, v, the pattern and z fit together, and the swapped functions change no logit."
    hf, truth = model(name)
    hf.set_attn_implementation(attention)
    c, x, seen = hf.config, ids(2, 13), {}
    i, d = c.attn_layer_idx[0], c.attn_head_dim
    mixer, tap = hf.backbone.layers[i].mixer, Listens('attn.pattern')
    live = SimpleNamespace(tap=None, state=None, length=13, limit=(0., math.inf))
    hooks = [getattr(mixer, s).register_forward_hook(lambda m, a, out, s=s: seen.update({s: out})) for s in 'qkv']
    hooks += [mixer.out_proj.register_forward_pre_hook(lambda m, a: seen.update(z=a[0]))]
    hooks += [mixer.register_forward_pre_hook(lambda m, a: setattr(live, 'tap', tap)), mixer.register_forward_hook(lambda m, a, out: setattr(live, 'tap', None))]
    with swapped(modeling_mamba2, MAMBA2, live), swapped(mamba2attn, ATTENTION, live): got = hf(x, use_cache=False).logits
    for h in hooks: h.remove()
    want, (pattern,) = truth(x), tap.heard
    assert gap(got, want) <= 1e-5*np.abs(want).max()
    size = ADAPTER.sizes(c)
    assert seen['q'].shape == (2, 13, size['q_head'], d) and seen['k'].shape == seen['v'].shape == (2, 13, size['kv_head'], d)
    assert pattern.shape == (2, 13, size['q_head'], 13) and gap(pattern.sum(-1), np.ones(pattern.shape[:3])) < 1e-5
    assert float(pattern.transpose(1, 2).triu(1).abs().max()) == 0
    v = seen['v'].repeat_interleave(size['q_head']//size['kv_head'], 2)
    assert gap(torch.einsum('bthk,bkhd->bthd', pattern, v).flatten(2), seen['z']) < 1e-5
    s = dict(oracle.kinds(CASES[name])[i][1])
    turn = lambda x, h: np.stack([oracle.turned(x[:, t, h].double().numpy(), t, s) for t in range(13)], 1)
    score = np.einsum('btd,bkd->btk', turn(seen['q'], 1), turn(seen['k'], size['kv_head']//size['q_head']))*(s['softmax_scale'] or d**-.5)
    ratio = np.log(pattern[:, 12, 1].double().numpy())
    assert gap(ratio - ratio[:, :1], score[:, 12] - score[:, 12, :1]) < 1e-4        # its logarithms are the scores, up to a constant


def test_the_adapter_points_at_modules():
    hf = Mamba2AttnForCausalLM(small(61))
    for i, block in enumerate(hf.get_submodule(ADAPTER.layers)):
        for point in ADAPTER.points(hf.config, i).values(): block.get_submodule(point.module)
        sites = ADAPTER.block_sites(hf.config, i)
        assert ('attn.pattern' in sites) == (i == 1) and ('ssm.state' in sites) == (i != 1)
    for point in ADAPTER.ends(hf.config).values(): hf.get_submodule(point.module)


@pytest.mark.parametrize('changes, message', [
    (dict(attn_layer_idx=[]), 'attn_layer_idx'), (dict(attn_layer_idx=[3]), 'attn_layer_idx'), (dict(attn_layer_idx=[1, 1]), 'attn_layer_idx'),
    (dict(attn_layer_idx=[-1]), 'attn_layer_idx'), (dict(attn_num_heads_kv=3), 'attn_num_heads_kv=3'), (dict(attn_rotary_emb_dim=14), 'attn_rotary_emb_dim=14'),
    (dict(attn_rotary_emb_dim=3), 'even'), (dict(attn_d_conv=-1), 'attn_d_conv'), (dict(hidden_act='relu'), 'hidden_act'), (dict(attn_num_heads=0, attn_num_heads_kv=None), 'attn_num_heads=0')])
def test_configurations_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=f'got .*{message}.*'): small(61, **changes)


# -- settings ----------------------------------------------------------------------------
def test_whose_config_it_is():
    assert all(map(is_mamba_ssm, CASES.values()))
    for other in ({}, dict(model_type='mamba', d_model=1, n_layer=1), dict(d_model=4), small(61).to_dict(), MambaConfig().to_dict()): assert not is_mamba_ssm(other)


def test_every_setting_is_carried_over():
    one, _ = from_mamba_ssm(SHARED | dict(vocab_size=50277, residual_in_fp32=False, tie_embeddings=False, ssm_cfg=dict(
        d_state=9, d_conv=3, expand=3, dt_rank=7, bias=True, conv_bias=False, dt_min=.01, dt_max=.2, dt_init='constant', dt_scale=2., dt_init_floor=1e-3)), {})
    assert type(one) is MambaConfig
    want = dict(vocab_size=50280, hidden_size=32, num_hidden_layers=2, state_size=9, conv_kernel=3, expand=3, time_step_rank=7, use_bias=True,
                use_conv_bias=False, residual_in_fp32=False, tie_word_embeddings=False, time_step_min=.01, time_step_max=.2, time_step_floor=1e-3,
                time_step_init_scheme='constant', time_step_scale=2., layer_norm_epsilon=1e-5, intermediate_size=96, eos_token_id=0)
    assert {k: getattr(one, k) for k in want} == want
    two, _ = from_mamba_ssm(SHARED2 | dict(vocab_size=50277, ssm_cfg=dict(
        layer='Mamba2', d_state=9, d_conv=3, expand=4, headdim=8, ngroups=4, bias=True, conv_bias=False, chunk_size=32, dt_limit=[.1, math.inf])), {})
    assert type(two) is Mamba2Config
    want = dict(vocab_size=50288, hidden_size=32, num_hidden_layers=2, state_size=9, conv_kernel=3, expand=4, head_dim=8, num_heads=16, n_groups=4, use_bias=True,
                use_conv_bias=False, chunk_size=32, residual_in_fp32=True, tie_word_embeddings=True, layer_norm_epsilon=1e-5, eos_token_id=0)
    assert {k: getattr(two, k) for k in want} == want and tuple(two.time_step_limit) == (.1, math.inf)
    three, _ = from_mamba_ssm(hybrid(attn=dict(num_heads_kv=2, softmax_scale=.3, rotary_emb_base=7.)), {})
    assert type(three) is Mamba2AttnConfig
    want = dict(attn_layer_idx=[1], attn_num_heads=4, attn_num_heads_kv=2, attn_head_dim=12, attn_d_conv=4, attn_rotary_emb_dim=6, attn_rotary_emb_base=7.,
                attn_rotary_emb_interleaved=False, attn_softmax_scale=.3, attn_qkv_proj_bias=False, attn_out_proj_bias=False)
    assert {k: getattr(three, k) for k in want} == want
    bare, _ = from_mamba_ssm(hybrid(attn_cfg=dict(causal=True, num_heads=4)), {})
    assert (bare.attn_head_dim, bare.attn_num_heads_kv, bare.attn_d_conv, bare.attn_rotary_emb_dim, bare.attn_qkv_proj_bias) == (8, 4, 0, 0, True)
    empty, _ = from_mamba_ssm({}, {})
    assert type(empty) is MambaConfig and (empty.hidden_size, empty.num_hidden_layers, empty.vocab_size, empty.state_size) == (2560, 64, 50280, 16)


def test_the_published_hybrid_has_its_shapes():
    config = dict(d_model=2560, d_intermediate=0, n_layer=64, vocab_size=50277, ssm_cfg=dict(layer='Mamba2'), attn_layer_idx=[9, 18, 27, 36, 45, 56], attn_cfg=dict(
        causal=True, d_conv=4, head_dim=128, num_heads=30, out_proj_bias=False, qkv_proj_bias=False, rotary_emb_dim=64), rms_norm=True, residual_in_fp32=True,
        fused_add_norm=True, pad_vocab_size_multiple=16, tie_embeddings=True)
    tensors = {n: torch.empty(s, device='meta') for n, s in oracle.shapes(config).items()}
    tensors['lm_head.weight'] = tensors['backbone.embedding.weight']
    made, ours = from_mamba_ssm(config, tensors)
    with torch.device('meta'): hf = AutoModelForCausalLM.from_config(made)
    assert {n: p.shape for n, p in hf.named_parameters()} == {n: t.shape for n, t in ours.items()} and made.to_dict() == Mamba2AttnConfig().to_dict() | {
        k: v for k, v in made.to_dict().items() if k == 'time_step_limit'}


@pytest.mark.parametrize('config, message', [
    (SHARED2 | dict(d_intermediate=64), 'd_intermediate=64, expected 0'), (SHARED | dict(rms_norm=False), 'rms_norm=False, expected True'),
    (SHARED | dict(hidden_size=3), 'hidden_size, expected only d_model'), (SHARED | dict(d_model=0), 'd_model=0'), (SHARED | dict(n_layer='two'), "n_layer='two'"),
    (SHARED | dict(pad_vocab_size_multiple=0), 'pad_vocab_size_multiple=0'), (SHARED | dict(residual_in_fp32='yes'), 'residual_in_fp32'),
    (SHARED | dict(ssm_cfg='Mamba2'), "ssm_cfg='Mamba2', expected a value like {}"), (SHARED | dict(ssm_cfg=dict(layer='Mamba3')), "layer='Mamba3', expected one of"),
    (SHARED | dict(ssm_cfg=dict(headdim=8)), 'headdim, expected only layer'), (SHARED | dict(ssm_cfg=dict(expand=1.5)), 'expand=1.5'),
    (SHARED | dict(ssm_cfg=dict(dt_rank='half')), "dt_rank='half'"), (SHARED | dict(attn_layer_idx=[1], attn_cfg=MHA), "layer='Mamba1'"),
    (SHARED2 | dict(ssm_cfg=SSM | dict(D_has_hdim=True)), 'D_has_hdim=True, expected False'), (SHARED2 | dict(ssm_cfg=SSM | dict(rmsnorm=False)), 'rmsnorm=False'),
    (SHARED2 | dict(ssm_cfg=SSM | dict(norm_before_gate=True)), 'norm_before_gate=True'), (SHARED2 | dict(ssm_cfg=SSM | dict(d_ssm=32)), 'd_ssm=32, expected 64'),
    (SHARED2 | dict(ssm_cfg=SSM | dict(headdim=24)), 'headdim=24'), (SHARED2 | dict(ssm_cfg=SSM | dict(ngroups=3)), 'ngroups=3'),
    (SHARED2 | dict(ssm_cfg=SSM | dict(dt_limit=.5)), 'dt_limit=0.5'), (SHARED2 | dict(ssm_cfg=SSM | dict(bias='no')), "bias='no', expected a value like False"),
    (SHARED2 | dict(ssm_cfg=SSM | dict(dt_limit=['a', 1])), "dt_limit=['a', 1]"), (hybrid(attn_layer_idx=[1, 'a']), "attn_layer_idx=[1, 'a']"), (hybrid(attn=dict(d_conv=None)), 'd_conv=None'),
    (hybrid(attn=dict(causal=False)), 'causal=False, expected True'), (hybrid(attn_cfg=dict(num_heads=4)), 'causal=False, expected True'),
    (hybrid(attn=dict(mlp_dim=256)), 'mlp_dim=256, expected 0'), (hybrid(attn_cfg=dict(causal=True)), 'num_heads=None'), (hybrid(attn=dict(window=3)), 'window, expected only'),
    (hybrid(attn_cfg=dict(causal=True, num_heads=5)), 'num_heads=5 without head_dim'), (hybrid(attn=dict(num_heads_kv=3)), 'attn_num_heads_kv=3'),
    (hybrid(attn_layer_idx=[7]), 'attn_layer_idx'), (hybrid(attn=dict(rotary_emb_dim=16)), 'attn_rotary_emb_dim=16')])
def test_what_cannot_be_said_in_transformers_is_refused(config, message):
    with pytest.raises(ValueError) as err: from_mamba_ssm(config, {})
    assert str(err.value).startswith('got ') and message in ' '.join(str(err.value).split())


# -- tensors and files -------------------------------------------------------------------
@pytest.mark.parametrize('name', ['mamba1 as published', 'mamba2, groups', 'hybrid as published'])
def test_parameters_are_the_pages_of_the_file(tmp_path, name):
    "Nothing is copied: loading a model takes no memory beyond the file's own pages."
    torch.save(oracle.checkpoint(CASES[name]), tmp_path/'pytorch_model.bin')
    config, tensors = from_mamba_ssm(CASES[name], read_archive(tmp_path/'pytorch_model.bin'))
    hf = AutoModelForCausalLM._model_mapping[type(config)].from_pretrained(None, config=config, state_dict=tensors, dtype=torch.float32)
    assert {n: p.data_ptr() for n, p in hf.named_parameters()} == {n: t.data_ptr() for n, t in tensors.items()}


@pytest.mark.parametrize('name', ['mamba1 as published', 'mamba2, groups', 'hybrid as published'])
def test_missing_extra_and_misshapen_tensors_are_named(tmp_path, name):
    last = CASES[name]['n_layer'] - 1
    whole, lost, odd = oracle.checkpoint(CASES[name]), f'backbone.layers.{last}.mixer.D', 'backbone.layers.0.mixer.out_proj.weight'
    _, info = load(CASES[name], {n: t for n, t in whole.items() if n != lost}, tmp_path)
    assert info['missing_keys'] == {lost} and not info['unexpected_keys']
    _, info = load(CASES[name], whole | {'backbone.layers.0.mlp.fc1.weight': torch.ones(2)}, tmp_path)
    assert info['unexpected_keys'] == {'backbone.layers.0.mlp.fc1.weight'} and not info['missing_keys']
    _, info = load(CASES[name], whole | {odd: whole[odd][:, :-1].clone()}, tmp_path, ignore_mismatched_sizes=True)
    assert [k for k, *_ in info['mismatched_keys']] == [odd]
    with pytest.raises(RuntimeError, match='size mismatch|ignore_mismatched_sizes'): load(CASES[name], whole | {odd: whole[odd][:, :-1].clone()}, tmp_path)


def test_tied_weights_have_to_be_equal():
    config = CASES['mamba2, groups']
    tensors = oracle.checkpoint(config)
    copy = tensors | {'lm_head.weight': tensors['lm_head.weight'].clone()}
    assert 'lm_head.weight' not in from_mamba_ssm(config, copy)[1]
    copy['lm_head.weight'][3, 3] += 1
    with pytest.raises(ValueError, match='lm_head.weight that differs'): from_mamba_ssm(config, copy)
    assert 'lm_head.weight' in from_mamba_ssm(config | dict(tie_embeddings=False), copy)[1]
    old = tensors | {'backbone.layers.1.mixer.rotary_emb.inv_freq': torch.ones(3)}       # flash_attn once saved its table of angles
    assert not any('rotary' in n for n in from_mamba_ssm(config, old)[1])


@pytest.mark.parametrize('kind', ['zip', 'before torch 1.6', 'safetensors'])
def test_files_are_read_as_they_were_written(tmp_path, kind):
    tensors = oracle.checkpoint(CASES['mamba2, groups'] | dict(tie_embeddings=False)) | {'half': torch.ones(3).half(), 'scalar': torch.tensor(2.)}
    path = tmp_path/('model.safetensors' if kind == 'safetensors' else 'pytorch_model.bin')
    if kind == 'safetensors': save_file(tensors, path)
    else: torch.save(tensors, path, _use_new_zipfile_serialization=kind == 'zip')
    got = read_archive(str(path))
    assert got.keys() == tensors.keys() and all(torch.equal(got[n], t) and got[n].dtype == t.dtype for n, t in tensors.items())


class Attack:
    "Pickled, it makes a file when it is unpickled."
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')


@pytest.mark.parametrize('kind', ['attack', 'attack among tensors', 'attack without torch', 'module', 'list', 'numbers', 'nested', 'text', 'empty', 'cut', 'no file', 'folder', 'safetensors'])
def test_what_is_no_archive_is_refused_and_not_run(tmp_path, kind):
    path, mark = tmp_path/('x.safetensors' if kind == 'safetensors' else 'x.bin'), tmp_path/'was run'
    objects = {'attack': Attack(mark), 'attack among tensors': {'a': torch.ones(2), 'b': Attack(mark)}, 'module': torch.nn.Linear(2, 2),
               'list': [torch.ones(2)], 'numbers': {'a': torch.ones(2), 'step': 3}, 'nested': {'model': {'a': torch.ones(2)}}}
    if kind in objects: torch.save(objects[kind], path)
    elif kind == 'attack without torch': path.write_bytes(pickle.dumps(Attack(mark), protocol=2))
    elif kind in ('text', 'safetensors'): path.write_text('not an archive')
    elif kind == 'empty': path.touch()
    elif kind == 'folder': path.mkdir()
    elif kind == 'cut':
        torch.save({'a': torch.ones(9999)}, path)
        path.write_bytes(path.read_bytes()[:20_000])
    with pytest.raises(ValueError) as err: read_archive(path)
    assert str(err.value).startswith(f"got '{path}', which is no plain archive of tensors (") and 'expected' in str(err.value)
    assert not mark.exists()
