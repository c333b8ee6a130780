"""Hymba against plain float64 loops, against identities of its equations, and through transformers' loading and generation."""
import copy
import json

import numpy as np
import oracle_hymba as oracle
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from circuitbench.hymba_rows import rotation
from circuitbench.models import hymba
from circuitbench.models.hymba import HymbaCache, HymbaConfig, HymbaForCausalLM, small
from circuitbench.seam import conv, conv_update, mamba1_scan, mamba1_state_update, swapped

torch.set_num_threads(1)

# layers that are global, windowed, owner, reader; a group of three
LARGE = dict(vocab_size=37, hidden_size=96, num_attention_heads=6, num_key_value_heads=2, intermediate_size=64, num_hidden_layers=7,
             mamba_d_state=4, mamba_dt_rank=5, num_memory_tokens=4, sliding_window=6, global_attn_idx=[0, 4, 6], kv_reuse_group=[[1, 2, 3]],
             rope=True, rope_type='ntk', max_position_embeddings=256, orig_max_position_embeddings=64)
CASES = {
    'three': {}, 'pair': dict(kv_reuse_group=[[1, 2], [3, 5]]), 'as many keys as queries': dict(num_key_value_heads=6), 'tied': dict(tie_word_embeddings=True),
    'no conv bias': dict(mamba_conv_bias=False), 'every other layer reads': dict(kv_reuse_group=None, kv_reuse_every_i_layer=2),
    'two of three read': dict(kv_reuse_group=None, kv_reuse_every_i_layer=3), 'plain rope': dict(rope_type=None), 'no rope': dict(rope=False),
    'relu2': dict(mlp_hidden_act='relu2'), 'biases': dict(mamba_proj_bias=True), 'no inner norms': dict(mamba_inner_layernorms=False),
    'no meta tokens': dict(num_memory_tokens=0), 'all global': dict(sliding_window=None), 'none global': dict(global_attn_idx=None), 'narrow conv': dict(mamba_d_conv=2),
    'odd sizes': dict(hidden_size=42, num_attention_heads=3, num_key_value_heads=1, mamba_expand=3, mamba_dt_rank='auto', num_memory_tokens=1)}


def draw(model, seed=0):
    "Random values for every parameter: ones and zeros would hide errors of order and bias."
    rand = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        r = torch.randn(p.shape, generator=rand, dtype=torch.float64)
        if 'norm' in name: r = 1 + .3*r
        elif 'A_log' in name: r = torch.arange(1., p.shape[1] + 1).log() + .3*r
        elif 'dt_proj.0.bias' in name: r = r - 1
        elif any(k in name for k in ('conv1d', 'memory', 'embed', 'lm_head', 'bias')): r = .5*r
        elif not name.endswith('D.0'): r = r*p.shape[-1]**-.5
        p.data.copy_(r)
    return model.eval().requires_grad_(False)


def make(dtype=torch.float64, seed=0, **changes): return draw(HymbaForCausalLM(HymbaConfig(**LARGE | changes)).to(dtype), seed)
def tokens(*shape, seed=0): return torch.randint(1, 37, shape, generator=torch.Generator().manual_seed(seed))
def logits(model, ids, **options): return model(torch.atleast_2d(ids), use_cache=False, **options).logits
def gap(a, b): return float((torch.as_tensor(a).detach().double() - torch.as_tensor(b).detach().double()).abs().max())


@torch.no_grad()
def pieces(model, ids, sizes, masks=None):
    "Logits of a prompt fed in pieces on one cache."
    cache, out, at = HymbaCache(model.config), [], 0
    for n in sizes:
        mask = None if masks is None else masks[:, :at + n]
        out.append(model(ids[:, at:at + n], attention_mask=mask, cache=cache).logits)
        at += n
    return torch.cat(out, 1)


@pytest.fixture(scope='module')
def model(): return make()


# -- the equations -----------------------------------------------------------------------
@pytest.mark.parametrize('case', CASES)
def test_logits_equal_numpy(case):
    model, ids = make(**CASES[case]), tokens(24)
    want = oracle.run(model, ids.tolist())
    assert gap(logits(model, ids)[0], want) < 1e-9*np.abs(want).max()
    assert gap(pieces(model, ids[None], [11, *[1]*13])[0], want) < 1e-9*np.abs(want).max()


@pytest.mark.parametrize('dtype, n, tol', [(torch.float32, 64, 1e-5), pytest.param(torch.float32, 512, 1e-4, marks=pytest.mark.slow), (torch.bfloat16, 64, 2e-2)])
def test_low_precision_stays_near_numpy(dtype, n, tol):
    "In bfloat16 what blocks add is scaled to .3, as trained ones keep it: else rounding the residual stream alone moves logits by 2e-2."
    model, ids = draw(HymbaForCausalLM(small(37)).double()), tokens(n)
    if dtype == torch.bfloat16:
        for block in model.model.layers:
            for w in (block.mamba.out_proj.weight, block.moe.experts[0].down_proj.weight): w.mul_(.3)
    model = model.to(dtype)
    want, got = oracle.run(model, ids.tolist()), logits(model, ids)
    assert got.dtype == torch.float32 and gap(got[0], want) < tol*np.abs(want).max()


def test_float64_stays_float64(model):
    assert logits(model, tokens(5)).dtype == torch.float64
    cache = model(tokens(1, 9), use_cache=True)[hymba.CACHE]
    assert {t.dtype for layer in cache.layers for t in (layer.conv_states[0], layer.recurrent_states[0])} == {torch.float64}
    half = draw(HymbaForCausalLM(small(37)).bfloat16())
    cache = half(tokens(1, 9), use_cache=True)[hymba.CACHE]
    half(tokens(1, 1), cache=cache)
    assert cache.layers[2].recurrent_states[0].dtype == torch.float32 and cache.layers[2].conv_states[0].dtype == torch.bfloat16


def test_the_published_layout():
    published = dict(
        attention_dropout=0., attn_hidden_size=-1, attn_implementation_new='flex', bos_token_id=1, calc_logits_for_entire_prompt=False,
        conv_dim={str(i): 3200 for i in range(32)}, eos_token_id=2, global_attn_idx=[0, 15, 31], hidden_act='silu', hidden_size=1600,
        initializer_range=.02, intermediate_size=5504, kq_head_dim=-1, kq_norm='none', kv_reuse_every_i_layer=-1,
        kv_reuse_group=[*([i, i + 1] for i in range(1, 15, 2)), [16, 17, 18], *([i, i + 1] for i in range(19, 31, 2))], kv_weight_reuse=False,
        layer_type=['h']*32, mamba_conv_bias=True, mamba_d_conv=4, mamba_d_state=16, mamba_dt_rank=100, mamba_expand=2, mamba_inner_layernorms=True,
        mamba_proj_bias=False, max_position_embeddings=8192, memory_tokens_interspersed_every=0, mlp_hidden_act='silu', model_type='hymba',
        num_attention_heads=25, num_experts=1, num_experts_per_tok=1, num_hidden_layers=32, num_key_value_heads=5, num_mamba=1, num_memory_tokens=128,
        orig_max_position_embeddings=2048, output_router_logits=False, pad_token_id=0, rms_norm_eps=1e-6, rope=True, rope_theta=10000., rope_type='ntk',
        router_aux_loss_coef=.001, seq_length=8192, sliding_window=1024, tie_word_embeddings=True, torch_dtype='bfloat16', use_cache=False,
        use_mamba_kernels=True, v_head_dim=128, vocab_size=32001, architectures=['HymbaForCausalLM'], transformers_version='4.44.0')
    config = HymbaConfig.from_dict(published)
    with torch.device('meta'): model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, HymbaForCausalLM)
    shapes = {n: tuple(p.shape) for n, p in model.state_dict().items() if n != 'lm_head.weight'}
    block = {'input_layernorm.weight': (1600,), 'pre_moe_layernorm.weight': (1600,), 'mamba.out_proj.weight': (1600, 3200),
             'mamba.conv1d.weight': (3200, 1, 4), 'mamba.conv1d.bias': (3200,), 'mamba.x_proj.0.weight': (132, 3200),
             'mamba.dt_proj.0.weight': (3200, 100), 'mamba.dt_proj.0.bias': (3200,), 'mamba.A_log.0': (3200, 16), 'mamba.D.0': (3200,),
             'mamba.dt_layernorm.weight': (100,), 'mamba.B_layernorm.weight': (16,), 'mamba.C_layernorm.weight': (16,),
             'mamba.pre_avg_layernorm1.weight': (3200,), 'mamba.pre_avg_layernorm2.weight': (3200,), 'moe.experts.0.gate_proj.weight': (5504, 1600),
             'moe.experts.0.up_proj.weight': (5504, 1600), 'moe.experts.0.down_proj.weight': (1600, 5504)}
    owners = [0, 1, 3, 5, 7, 9, 11, 13, 15, 16, 19, 21, 23, 25, 27, 29, 31]
    want = {'model.embed_tokens.weight': (32001, 1600), 'model.memory_tokens': (128, 1600), 'model.final_layernorm.weight': (1600,)}
    for i in range(32):
        want[f'model.layers.{i}.mamba.in_proj.weight'] = (8960 if i in owners else 8000, 1600)
        want |= {f'model.layers.{i}.{name}': shape for name, shape in block.items()}
    assert shapes == want and len(shapes) == 611
    assert sum(p.numel() for n, p in model.state_dict().items() if n != 'lm_head.weight') == 1_522_797_824
    assert model.lm_head.weight is model.model.embed_tokens.weight and not list(model.buffers())
    cos, _ = rotation(config, torch.tensor([[1]]), torch.float64)
    assert float(cos[0, 0, 0, 1]) == pytest.approx(np.cos(74534.83**(-1/32)), abs=1e-9)


# -- identities --------------------------------------------------------------------------
@pytest.mark.parametrize('t', [0, 9, 19])
def test_a_token_changes_nothing_before_it(model, t):
    ids = tokens(20)
    other = ids.clone()
    other[t] = ids[t] % 36 + 1
    a, b = logits(model, ids)[0], logits(model, other)[0]
    assert gap(a[:t], b[:t]) < 1e-12 if t else True
    assert all(gap(a[p], b[p]) > 1e-6 for p in range(t, 20))


def test_a_shift_of_all_positions_changes_nothing(model):
    ids, rows = tokens(20), torch.arange(24)[None]
    want = logits(model, ids)
    assert gap(logits(model, ids, position_ids=rows), want) == 0
    assert gap(logits(model, ids, position_ids=rows + 1000), want) < 1e-9
    assert gap(logits(model, ids, position_ids=rows[:, :20]), want) == 0            # one a token: meta tokens come before
    assert gap(logits(model, ids, position_ids=2*rows), want) > 1e-3


def test_each_branch_can_be_switched_off():
    ids, far = tokens(20), lambda m: [p for n, p in m.named_parameters() if any(k in n for k in ('A_log', 'conv1d', 'x_proj', 'dt_proj', 'D.0'))]
    only_attention, only_ssm = make(), make()
    for block in only_attention.model.layers: block.mamba.pre_avg_layernorm2.weight.zero_()
    for block in only_ssm.model.layers: block.mamba.pre_avg_layernorm1.weight.zero_()
    a, s = logits(only_attention, ids), logits(only_ssm, ids)
    for p in far(only_attention): p.add_(.1)
    for block in only_ssm.model.layers: block.mamba.in_proj.weight[:96].mul_(2)           # the queries
    assert gap(logits(only_attention, ids), a) == 0 and gap(logits(only_ssm, ids), s) == 0
    for p in far(only_ssm): p.add_(.1)
    for block in only_attention.model.layers: block.mamba.in_proj.weight[:96].mul_(2)
    assert gap(logits(only_attention, ids), a) > 1e-3 and gap(logits(only_ssm, ids), s) > 1e-3


def test_without_C_the_read_out_is_the_skip():
    model, ids, seen, parts = make(), tokens(20), {}, {}
    mixer = model.model.layers[2].mamba
    mixer.C_layernorm.weight.zero_()
    mixer.pre_avg_layernorm2.register_forward_pre_hook(lambda m, args: seen.update(y=args[0][0]))
    logits(model, ids)
    oracle.run(model, ids.tolist(), parts=parts)
    z = parts[2, 'p'][:, -192:]
    assert gap(seen['y'], mixer.D()[0].numpy()*parts[2, 'xc']*oracle.silu(z)) < 1e-10


def test_the_window_and_the_meta_tokens():
    "With one windowed layer and attention alone, a row hears W tokens back, no more, and every meta token."
    model = make(num_hidden_layers=1, global_attn_idx=[], kv_reuse_group=None)
    model.model.layers[0].mamba.pre_avg_layernorm2.weight.zero_()
    x = model.model.embed_tokens(tokens(1, 20)).requires_grad_()
    memory = model.model.memory_tokens.requires_grad_()
    out = model(inputs_embeds=x, use_cache=False).logits[0, 15, :].square().sum()
    dx, dm = torch.autograd.grad(out, (x, memory))
    heard = dx[0].norm(dim=-1)
    assert (heard[9:16] > 1e-8).all() and not heard[:9].any() and not heard[16:].any() and (dm.norm(dim=-1) > 1e-8).all()


@pytest.mark.parametrize('window', ['strict', 'upstream'])
def test_up_to_W_tokens_the_window_does_not_matter(window):
    model, ids = make(window=window), tokens(1, 6)
    everywhere = make(sliding_window=None)
    want = logits(everywhere, ids)
    assert gap(logits(model, ids), want) < 1e-12 and gap(pieces(model, ids, [3, 1, 1, 1]), want) < 1e-10
    longer = tokens(1, 8)
    assert gap(logits(model, longer), logits(everywhere, longer)) > 1e-6


@pytest.mark.parametrize('prompt', [1, 5, 13])
def test_past_the_window_strict_steps_are_the_full_pass_and_upstream_steps_see_one_less(prompt):
    ids, steps = tokens(1, 24), [prompt, *[1]*(24 - prompt)]
    strict, upstream = make(), make(window='upstream')
    full = logits(strict, ids)
    assert gap(logits(upstream, ids), full) == 0 and gap(pieces(strict, ids, steps), full) < 1e-10
    got = pieces(upstream, ids, steps)
    assert gap(got[0], oracle.run(upstream, ids[0].tolist(), prefill=prompt)) < 1e-9 and gap(got, full) > 1e-4


@pytest.mark.parametrize('reader', [2, 3])
def test_readers_use_the_keys_and_values_of_their_owner(reader):
    model, seen, ids = make(), [], tokens(1, 20)
    owner, mixer = model.model.layers[1], model.model.layers[reader].mamba
    owner.mamba.out_proj.weight.zero_()                                    # the owner's values reach others as values alone
    mixer.z.register_forward_hook(lambda m, args, out: seen.append(out))
    logits(model, ids)
    handle = owner.mamba.v.register_forward_hook(lambda m, args, out: 2*out)
    between = [model.model.layers[i].mamba for i in range(2, reader)]
    for m in between: m.out_proj.weight.zero_()
    logits(model, ids)
    handle.remove()
    logits(model, ids)
    assert gap(seen[1], 2*seen[2]) < 1e-12 and not hasattr(mixer, 'k') and not hasattr(mixer, 'v')
    assert mixer.in_proj.out_features == owner.mamba.in_proj.out_features - 2*16 - 2*32
    cache = model(ids, use_cache=True)[hymba.CACHE]
    assert cache.layers[reader].keys is None and cache.layers[1].keys.shape == (1, 2, 24, 16) and cache.layers[1].values.shape == (1, 2, 24, 32)


@pytest.mark.parametrize('window', ['strict', 'upstream'])
def test_meta_tokens_alone_can_be_run_once(window):
    model = make(window=window)
    start = HymbaCache(model.config)
    assert model(tokens(1, 0), cache=start).logits.shape == (1, 0, 37) and start.get_seq_length() == 0
    for seed in (0, 1):
        ids = tokens(1, 20, seed=seed)
        assert gap(model(ids, cache=copy.deepcopy(start)).logits, logits(model, ids)) < 1e-10
    bare = make(num_memory_tokens=0)
    bare.load_state_dict(model.state_dict(), strict=False)
    assert gap(logits(bare, ids), logits(model, ids)) > 1e-2


def test_the_scan_is_a_hidden_attention():
    rand = torch.Generator().manual_seed(0)
    r = lambda *s: torch.randn(*s, generator=rand, dtype=torch.float64)
    x, dt, B, C, A, D = r(1, 6, 15), r(1, 6, 15), r(1, 4, 15), r(1, 4, 15), -torch.rand(6, 4, generator=rand, dtype=torch.float64), r(6)
    y, step = hymba.mamba_selective_scan(x, dt, A, B, C, D, delta_softplus=True), F.softplus(dt)
    for i in range(15):
        for c in range(6):
            want = D[c]*x[0, c, i] + sum(
                C[0, m, i]*torch.exp(A[c, m]*step[0, c, j + 1:i + 1].sum())*B[0, m, j]*step[0, c, j]*x[0, c, j] for j in range(i + 1) for m in range(4))
            assert abs(y[0, c, i] - want) < 1e-10


def test_shared_heads_are_repeated_heads(model):
    wide, ids = make(num_key_value_heads=6), tokens(20)
    state = model.state_dict()
    for i, block in enumerate(model.model.layers):
        if not block.mamba.owns: continue
        w = block.mamba.in_proj.weight
        q, k, v, rest = w.split([96, 2*16, 2*32, len(w) - 192])
        repeat = lambda t, d: t.unflatten(0, (2, d)).repeat_interleave(3, 0).flatten(0, 1)
        state[f'model.layers.{i}.mamba.in_proj.weight'] = torch.cat([q, repeat(k, 16), repeat(v, 32), rest])
    wide.load_state_dict(state)
    assert gap(logits(wide, ids), logits(model, ids)) < 1e-12


# -- padding and pieces ------------------------------------------------------------------
def padded(rows, side, n=None):
    "Rows of different lengths as ids and mask; padding is token 0."
    n = n or max(map(len, rows))
    fill = lambda row, v: torch.cat([row.new_full((n - len(row),), v), row] if side == 'left' else [row, row.new_full((n - len(row),), v)])
    return torch.stack([fill(r, 0) for r in rows]), torch.stack([fill(torch.ones_like(r), 0) for r in rows])


LENGTHS = (20, 19, 18, 17, 16, 9, 3, 1)


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('case', ['three', 'no meta tokens', 'narrow conv'])
@pytest.mark.parametrize('cached', [False, True])
def test_a_padded_row_equals_the_row_alone(side, case, cached):
    model, rows = make(**CASES[case]), [tokens(n, seed=n) for n in LENGTHS]
    ids, mask = padded(rows, side, 21)
    got = model(ids, attention_mask=mask, use_cache=cached).logits
    eager = model(ids, attention_mask=mask, use_cache=cached, output_attentions=True).logits
    assert torch.isfinite(got).all() and torch.isfinite(eager).all() and gap(eager[mask.bool()], got[mask.bool()]) < 1e-10
    for row, real, out in zip(rows, mask.bool(), got): assert gap(out[real], logits(model, row)[0]) < 1e-10


@pytest.mark.parametrize('side', ['left', 'right'])
@pytest.mark.parametrize('window', ['strict', 'upstream'])
def test_padded_rows_go_on_as_if_alone(side, window):
    "After a padded prompt: steps, then another padded piece, then steps."
    model, first = make(window=window), [tokens(n, seed=n) for n in (12, 11, 5, 1)]
    then, second = tokens(4, 3, seed=99), [tokens(n, seed=n + 50) for n in (2, 7, 1, 5)]
    a, b = padded(first, side), padded(second, 'left' if side == 'right' else 'right')
    one, last = torch.ones(4, 3, dtype=torch.long), tokens(4, 2, seed=7)
    ids = torch.cat([a[0], then, b[0], last], 1)
    mask = torch.cat([a[1], one, b[1], one[:, :2]], 1)
    got = pieces(model, ids, [12, 1, 1, 1, 7, 1, 1], mask)
    for i in range(4):
        alone, n = torch.cat([first[i], then[i], second[i], last[i]])[None], len(first[i])
        want = pieces(model, alone, [n, 1, 1, 1, len(second[i]), 1, 1])
        assert gap(got[i][mask[i].bool()], want[0]) < 1e-10


@pytest.mark.parametrize('sizes', [[1]*24, [2, 22], [12, 12], [23, 1], [5, 1, 1, 7, 10], [3]*8])
def test_a_prompt_in_pieces_is_the_prompt(model, sizes):
    ids = tokens(2, 24)
    assert gap(pieces(model, ids, sizes), logits(model, ids)) < 1e-10
    ids, mask = padded([tokens(24), tokens(9, seed=1)], 'left')             # some pieces hold nothing but padding
    got = pieces(model, ids, sizes, mask)
    assert gap(got[1, 15:], logits(model, ids[1, 15:])[0]) < 1e-10 and gap(got[0], logits(model, ids[0])[0]) < 1e-10


def test_what_padding_holds_does_not_matter(model):
    ids, mask = padded([tokens(15), tokens(9, seed=1)], 'left')
    other = torch.where(mask.bool(), ids, 5)
    a, b = (logits(model, i, attention_mask=mask)[mask.bool()] for i in (ids, other))
    assert gap(a, b) == 0


@pytest.mark.parametrize('mask, message', [
    ([[1, 1, 0, 1, 1]], 'padding between tokens'), ([[1, 1, 1]], r'shape \(1, 3\), expected \(1, 5\)')])
def test_masks_that_cannot_be_meant_are_refused(model, mask, message):
    with pytest.raises(ValueError, match=message): model(tokens(1, 5), attention_mask=torch.tensor(mask))


def test_a_cache_with_padding_asks_for_its_mask(model):
    ids, mask = padded([tokens(8), tokens(5)], 'left')
    cache = HymbaCache(model.config)
    model(ids, attention_mask=mask, cache=cache)
    with pytest.raises(ValueError, match=r'expected one of shape \(2, 9\)'): model(tokens(2, 1), cache=cache)
    with pytest.raises(ValueError, match=r'expected \(2, 9\)'): model(tokens(2, 1), attention_mask=torch.ones(2, 1), cache=cache)
    cache.reset()
    assert gap(model(tokens(1, 8), cache=HymbaCache(model.config)).logits, model(tokens(1, 8).expand(2, -1), cache=cache).logits[:1]) < 1e-12


def test_arguments_that_do_not_fit_are_refused(model):
    with pytest.raises(TypeError, match='got a DynamicCache, expected HymbaCache'): model(tokens(1, 3), cache=DynamicCache(config=model.config))
    with pytest.raises(ValueError, match='cache_implementation'): model.generate(tokens(1, 3), cache_implementation='static', max_new_tokens=2)
    with pytest.raises(ValueError, match='neither or both'): model()
    with pytest.raises(ValueError, match=r'expected \(batch, 3\) or \(batch, 7\)'): model(tokens(1, 3), position_ids=torch.arange(5)[None])


# -- generation --------------------------------------------------------------------------
OPTIONS = dict(max_new_tokens=64, do_sample=False, eos_token_id=None, pad_token_id=0, return_dict_in_generate=True, output_logits=True)


def test_cached_generation_is_uncached_generation(model):
    ids = tokens(2, 5)
    cached, plain = (model.generate(ids, use_cache=use, **OPTIONS) for use in (True, False))
    assert torch.equal(cached.sequences, plain.sequences) and cached.sequences.shape == (2, 69)
    assert max(gap(a, b) for a, b in zip(cached.logits, plain.logits)) < 1e-5         # generate keeps logits in float32
    full = logits(model, cached.sequences)[:, 4:-1]
    assert torch.equal(full.argmax(-1), cached.sequences[:, 5:]) and cached[hymba.CACHE].get_seq_length() == 68


def test_upstream_generation_follows_its_own_window():
    model = make(window='upstream')
    ids = model.generate(tokens(1, 9), **OPTIONS | dict(max_new_tokens=20)).sequences[0]
    want = oracle.run(model, ids.tolist()[:-1], prefill=9)
    assert want[8:].argmax(-1).tolist() == ids.tolist()[9:]


@pytest.mark.parametrize('beams', [1, 3])
def test_a_padded_batch_generates_what_its_rows_generate_alone(model, beams):
    rows = [tokens(n, seed=n) for n in (12, 7, 2)]
    ids, mask = padded(rows, 'left')
    options = OPTIONS | dict(max_new_tokens=16, num_beams=beams)
    both = model.generate(ids, attention_mask=mask, **options).sequences[:, 12:]
    for row, got in zip(rows, both):
        for use in (True, False): assert torch.equal(model.generate(row[None], use_cache=use, **options).sequences[0, len(row):], got)


def test_generation_goes_on_from_a_cache(model):
    ids, cache = tokens(1, 10), HymbaCache(model.config)
    model(ids[:, :7], cache=cache)
    options = OPTIONS | dict(max_new_tokens=12)
    want = model.generate(ids, **options).sequences
    name = hymba.CACHE
    assert torch.equal(model.generate(ids, **{name: cache}, **options).sequences, want)
    chunked = model.generate(ids, prefill_chunk_size=4, **options).sequences
    assert torch.equal(chunked, want)


# -- through transformers ----------------------------------------------------------------
def upstream_folder(path, model, shards=1, **extra):
    "A folder as upstream saves it: tied weights once, names as they are, its own code named in the config."
    state = {k: v.contiguous() for k, v in model.state_dict().items() if k != 'lm_head.weight' or not model.config.tie_word_embeddings}
    config = LARGE | {k: getattr(model.config, k) for k in ('tie_word_embeddings', 'mamba_conv_bias')} | dict(
        model_type='hymba', architectures=['HymbaForCausalLM'], torch_dtype='bfloat16', layer_type=['h']*7, num_experts_per_tok=1, seq_length=8192,
        auto_map={'AutoConfig': 'configuration_hymba.HymbaConfig', 'AutoModelForCausalLM': 'modeling_hymba.HymbaForCausalLM'}, v_head_dim=128, **extra)
    (path/'config.json').write_text(json.dumps(config))
    names = sorted(state)
    files = {f'model-{i + 1:05}-of-{shards:05}.safetensors': names[i::shards] for i in range(shards)} if shards > 1 else {'model.safetensors': names}
    for file, part in files.items(): save_file({n: state[n] for n in part}, path/file, metadata={'format': 'pt'})
    if shards > 1:
        index = {'metadata': {'total_size': 0}, 'weight_map': {n: file for file, part in files.items() for n in part}}
        (path/'model.safetensors.index.json').write_text(json.dumps(index))


@pytest.mark.parametrize('shards', [1, 3])
@pytest.mark.parametrize('tied', [True, False])
def test_the_upstream_layout_loads(tmp_path, shards, tied):
    model, ids = make(tie_word_embeddings=tied), tokens(20)
    upstream_folder(tmp_path, model, shards)
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64, trust_remote_code=False, output_loading_info=True)
    assert isinstance(again, HymbaForCausalLM) and not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    assert gap(logits(again, ids), logits(model, ids)) == 0 and not again.training
    assert (again.lm_head.weight is again.model.embed_tokens.weight) == tied
    assert isinstance(AutoConfig.from_pretrained(tmp_path), HymbaConfig)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert gap(logits(half, ids), logits(model.bfloat16(), ids)) == 0


def test_what_is_saved_loads_again(tmp_path):
    model, ids = make(window='upstream', tie_word_embeddings=True), tokens(20)
    model.save_pretrained(tmp_path, max_shard_size='100KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 1
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert gap(logits(again, ids), logits(model, ids)) == 0
    assert again.config.window == 'upstream' and again.config.kv_reuse_group == [[1, 2, 3]] and again.config.num_memory_tokens == 4


def test_a_new_model_is_drawn_reasonably():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(small(37))
    mixer = model.model.layers[1].mamba
    assert gap(mixer.A_log()[0][3].exp(), torch.arange(1., 5)) < 1e-5 and (mixer.D()[0] == 1).all() and (mixer.B_layernorm.weight == 1).all()
    step = F.softplus(mixer.dt_proj[0]()[1])
    assert ((step > .0009) & (step < .11)).all() and .01 < float(model.model.memory_tokens.detach().std()) < .03 and mixer.conv1d()[0].std() > .01
    loss = model(tokens(2, 12), labels=tokens(2, 12)).loss
    loss.backward()
    assert gap(loss, np.log(37)) < .3 and all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_the_loss_is_the_next_token_loss(model):
    ids = tokens(2, 12)
    out = model(ids, labels=ids, use_cache=False)
    assert gap(out.loss, F.cross_entropy(out.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())) < 1e-5
    assert gap(model(ids, logits_to_keep=3).logits, out.logits[:, -3:]) < 1e-12 and isinstance(model(ids, return_dict=False), tuple)


def test_hidden_states_and_patterns(model):
    ids = tokens(2, 12)
    out = model(ids, use_cache=False, output_hidden_states=True, output_attentions=True)
    assert len(out.hidden_states) == 8 and gap(out.hidden_states[0], model.model.embed_tokens(ids)) == 0
    assert gap(model.lm_head(out.hidden_states[-1]), out.logits) == 0 and gap(out.logits, logits(model, ids)) < 1e-12
    assert len(out.attentions) == 7 and all(a.shape == (2, 6, 16, 16) and gap(a.sum(-1), torch.ones(2, 6, 16)) < 1e-12 for a in out.attentions)
    assert not out.attentions[1][:, :, 15, 4:9].any() and (out.attentions[1][:, :, 15, [*range(4), *range(9, 16)]] > 0).all()


def test_gradients_equal_finite_differences():
    model = draw(HymbaForCausalLM(small(37)).double())
    x = model.model.embed_tokens(tokens(2, 9)).requires_grad_()
    for mask in (None, torch.tensor([[1]*9, [0]*3 + [1]*6])):
        score = lambda x, mask=mask: model(inputs_embeds=x, attention_mask=mask, use_cache=False).logits[:, 3:].sin()
        assert torch.autograd.gradcheck(score, x, fast_mode=True)
    whole = torch.autograd.grad(model(inputs_embeds=x, use_cache=False).logits.sin().sum(), x)[0]
    for sizes in ([5, 4], [6, 1, 1, 1]):
        cache = HymbaCache(model.config)
        cut = torch.cat([model(inputs_embeds=part, cache=cache).logits for part in x.split(sizes, 1)], 1)
        assert gap(whole, torch.autograd.grad(cut.sin().sum(), x)[0]) < 1e-9*float(whole.abs().max())


@pytest.mark.parametrize('change, field', [
    (dict(memory_tokens_interspersed_every=512), 'memory_tokens_interspersed_every'), (dict(kq_norm='rms'), 'kq_norm'), (dict(kq_norm=None), 'kq_norm'),
    (dict(num_experts=8), 'num_experts'), (dict(num_mamba=2), 'num_mamba'), (dict(rope_type='dynamic'), 'rope_type'), (dict(mlp_hidden_act='gelu'), 'mlp_hidden_act'),
    (dict(hidden_act='relu'), 'hidden_act'), (dict(attention_dropout=.1), 'attention_dropout'), (dict(window='wide'), 'window'),
    (dict(num_attention_heads=5), 'num_attention_heads'), (dict(num_key_value_heads=4), 'num_attention_heads'), (dict(attn_hidden_size=64), 'attn_hidden_size'),
    (dict(kq_head_dim=8), 'kq_head_dim'), (dict(hidden_size=90), 'rope'), (dict(orig_max_position_embeddings=None), 'orig_max_position_embeddings'),
    (dict(kv_reuse_group=[[2, 1]]), 'kv_reuse_group'), (dict(kv_reuse_group=[[5, 7]]), 'kv_reuse_group')])
def test_what_cannot_be_done_is_refused(change, field):
    with pytest.raises(ValueError, match=f'got {field}=.*, expected'): HymbaConfig(**LARGE | change)


# -- what can be listened to -------------------------------------------------------------
class Tap:
    "Remembers what passes; changes what `edit` names."
    def __init__(self, edit=None): self.seen, self.edit = {}, edit or {}
    def wants(self, site): return True
    def __call__(self, site, x): return self.seen.setdefault(site, self.edit.get(site, lambda v: v)(x))
    def stops(self, length): return range(length)
    def reads(self, site, length, stops): return []
    def note(self, kind, **inputs): pass
    def at(self, site, x, t):
        self.seen.setdefault(site, []).append(x)
        return x


FUNCTIONS = {'mamba_selective_scan': mamba1_scan, 'mamba_selective_state_update': mamba1_state_update, 'causal_conv1d_fn': conv,
             'causal_conv1d_update': conv_update}


class Live:
    "What the replaced functions ask: which block runs, from which state."
    def __init__(self, model, layer, tap, length):
        self.tap = self.state = None
        self.length, mixer = length, model.model.layers[layer].mamba
        for block in model.model.layers: block.mamba.register_forward_pre_hook(self.before(tap if block.mamba is mixer else None), with_kwargs=True)
        mixer.register_forward_hook(lambda m, args, out: setattr(self, 'tap', None))

    def before(self, tap):
        def _before(m, args, kwargs):
            self.tap, cache = tap, kwargs['cache']
            self.state = None if cache is None else cache.get_recurrent_state(m.layer, state_idx=0)
        return _before


def test_every_part_of_the_scan_is_open():
    model, ids, parts, tap = make(), tokens(20), {}, Tap()
    live, want = Live(model, 2, tap, 24), logits(model, ids)
    with swapped(hymba, FUNCTIONS, live): got = logits(model, ids)
    oracle.run(model, ids.tolist(), parts=parts)
    inner = {name: torch.from_numpy(value) for (i, name), value in parts.items() if i == 2}
    seen = {k: v if isinstance(v, torch.Tensor) else torch.stack(v, 1) for k, v in tap.seen.items()}
    assert gap(got, want) < 1e-12
    for site, value in (('ssm.conv', inner['xc']), ('ssm.x', inner['xc'][..., None]), ('ssm.dt', inner['dt']), ('ssm.y', inner['y'][..., None]),
                        ('ssm.state', inner['states'][:, :, None]), ('ssm.B', inner['B'][:, None].expand(-1, 192, -1))):
        assert gap(seen[site][0], value) < 1e-10, site


@torch.no_grad()
def test_the_scan_is_open_while_decoding():
    model, ids, whole = make(), tokens(1, 12), Tap()
    with swapped(hymba, FUNCTIONS, Live(model, 2, whole, 16)): logits(model, ids)
    model, states, convs = make(), [], []
    live, cache, at = Live(model, 2, Tap(), 0), HymbaCache(model.config), 0
    for n in (5, 1, 1, 3, 1, 1):
        tap = Tap()
        live.length = n + 4*(not at)
        model.model.layers[2].mamba.register_forward_pre_hook(lambda m, args, kwargs, tap=tap: setattr(live, 'tap', tap), with_kwargs=True)
        with swapped(hymba, FUNCTIONS, live): model(ids[:, at:at + n], cache=cache)
        states += tap.seen['ssm.state']
        convs.append(tap.seen['ssm.conv'])
        at += n
    assert gap(torch.stack(states), torch.stack(whole.seen['ssm.state'])) < 1e-10
    assert gap(torch.cat(convs, 1), whole.seen['ssm.conv']) < 1e-10


def test_the_convolution_of_a_padded_prompt_is_seen_at_its_tokens():
    "In the order in which the columns came, tokens last."
    model, alone, both = make(), Tap(), Tap()
    ids, mask = padded([tokens(12), tokens(7, seed=1)], 'left')
    with swapped(hymba, FUNCTIONS, Live(model, 2, both, 16)): logits(model, ids, attention_mask=mask)
    model = make()
    with swapped(hymba, FUNCTIONS, Live(model, 2, alone, 11)): logits(model, ids[1, 5:])
    for site in ('ssm.conv', 'ssm.x', 'ssm.dt', 'ssm.y'): assert gap(both.seen[site][1, -7:], alone.seen[site][0, -7:]) < 1e-10, site
    assert gap(both.seen['ssm.state'][-1][1], alone.seen['ssm.state'][-1][0]) < 1e-10
    assert not both.seen['ssm.dt'][1, 4:9].any() and not both.seen['ssm.x'][1, 4:9].any()


def test_attention_can_be_replaced(model):
    ids, patterns = tokens(1, 12), []
    def shown(q, k, v, mask, scaling):
        patterns.append(hymba.attention_weights(q, k, mask, scaling))
        return (patterns[-1] @ v.repeat_interleave(3, 1)).transpose(1, 2)
    with swapped(hymba, {'attention': lambda live, original: shown}, None): got = logits(model, ids)
    want = model(ids, use_cache=False, output_attentions=True)
    assert gap(got, want.logits) < 1e-12 and max(gap(a, b) for a, b in zip(patterns, want.attentions)) < 1e-12


def test_the_parts_of_a_block_add_up():
    model, ids, seen = make(), tokens(1, 12), {}
    block = model.model.layers[3]
    for name in ('mamba', 'mamba.in_proj', 'mamba.q', 'mamba.z', 'mamba.attn_branch', 'mamba.ssm_branch', 'resid_mid', 'moe', 'input_layernorm', 'pre_moe_layernorm', ''):
        def keep(m, args, out, name=name): seen[name] = args[0], out[0] if isinstance(out, tuple) else out
        block.get_submodule(name).register_forward_hook(keep)
    logits(model, ids)
    before, after = seen['']
    out = {k: v[1] for k, v in seen.items()}
    assert gap(out['resid_mid'], before + out['mamba']) < 1e-12 and gap(after, out['resid_mid'] + out['moe']) < 1e-12
    assert gap(sum(block.mamba.out_proj(out[f'mamba.{b}_branch']) for b in ('attn', 'ssm')), out['mamba']) < 1e-12
    assert gap(seen['mamba'][0], out['input_layernorm']) == 0 and gap(seen['moe'][0], out['pre_moe_layernorm']) == 0
    parts = {}
    oracle.run(model, ids[0].tolist(), parts=parts)
    assert gap(out['mamba.in_proj'][0], parts[3, 'p']) < 1e-10 and gap(out['mamba.z'][0].flatten(1), parts[3, 'o']) < 1e-10
    assert gap(out['resid_mid'][0], parts[3, 'mid']) < 1e-10 and gap(out['mamba.q'][0].flatten(1), parts[3, 'p'][:, :96]) < 1e-10
    handle = block.resid_mid.register_forward_hook(lambda m, args, out: 0*out)           # what follows uses its output
    logits(model, ids)
    handle.remove()
    assert not seen[''][1].any()
