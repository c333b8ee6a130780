"""RWKV-7 against the `rwkv` package and float64 numpy: both layouts, cache, padding, gradients, half precision, files that are wrong; and its tokenizer."""
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from oracle_rwkv7 import Net, archive, hub, hub_config
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from circuitbench.hook import HookedModel
from circuitbench.layout import from_pth
from circuitbench.models import rwkv7
from circuitbench.models.rwkv7 import Rwkv7Config, Rwkv7ForCausalLM
from circuitbench.seam import swapped
from circuitbench.world import END, WorldTokenizer, world_tokenizer

SHAPES = {
    'usual': dict(), 'narrow heads, no first v': dict(head=32, ffn=200, first_v=False, seed=1), 'bf16': dict(dtype=torch.bfloat16, seed=2),
    'one layer, one head': dict(layers=1, width=64, ffn=64, seed=3)}


NEAR = 1e-4      # the first token of a prompt is ill-conditioned: its read-out is tiny before the group norm


def tokens(n, batch=None, vocab=97, seed=0):
    ids = torch.randint(0, vocab, (batch or 1, n), generator=torch.Generator().manual_seed(seed))
    return ids if batch else ids[0].tolist()


def kept(out): return getattr(out, rwkv7.CACHE)    # transformers renamed it in 5.24


def gap(a, b): return float((a.double() - b.double()).abs().max())


def run(hf, ids, **kwargs):
    with torch.no_grad(): return hf(torch.as_tensor(ids)[None] if isinstance(ids, list) else ids, **kwargs)


@pytest.fixture(scope='session')
def files(tmp_path_factory):
    "One `.pth` a shape."
    folder = tmp_path_factory.mktemp('pth')
    made = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        made[name] = folder/f'{i}.pth'
        torch.save(archive(**shape), made[name])
    return made


REFERENCE = '''
import json, os, sys
os.environ.update(RWKV_V7_ON='1', RWKV_JIT_ON='0', RWKV_CUDA_ON='0')
import torch
from rwkv.model import RWKV
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
job = json.load(open(sys.argv[1]))
out = {}
for name, (path, ids) in job['models'].items():
    logits, state = RWKV(model=path, strategy='cpu fp32').forward(ids, None, full_output=True)
    out[name] = logits.float(), [s.float() for s in state]
tok = TRIE_TOKENIZER(job['vocabulary'])
torch.save(dict(models=out, ids=[tok.encode(t) for t in job['texts']]), sys.argv[2])
'''
TEXTS = [
    'The Eiffel tower is in the city of', '', ' ', '\n\n', 'a', '你好，世界！こんにちは 안녕하세요', 'naïve café — “quotes” … ½ €', '😀👩‍👩‍👧‍👦🏳️‍🌈', '  \t\tdef f(x):\r\n    return x**2\n\n\n',
    'User: hi\n\nAssistant:', '\x00\x01\x7f', '0123456789'*30, '='*300, ' '*500, 'ab'*400, '<|endoftext|>', 'Ünïcödé\u0301 \u200b\ufeff\U0010ffff', 'İstanbul ẞ ﬁ', 'حروف عربية और हिन्दी ไทย']


@pytest.fixture(scope='session')
def vocabulary():
    import importlib.util
    return Path(importlib.util.find_spec('rwkv').origin).parent/'rwkv_vocab_v20230424.txt'


@pytest.fixture(scope='session')
def reference(files, vocabulary, tmp_path_factory):
    "What the `rwkv` package says of every file and text, asked in a process of its own."
    folder = tmp_path_factory.mktemp('reference')
    job = dict(models={n: [str(p).removesuffix('.pth'), tokens(40)] for n, p in files.items()}, vocabulary=str(vocabulary), texts=TEXTS)
    (folder/'job.json').write_text(json.dumps(job))
    done = subprocess.run([sys.executable, '-c', REFERENCE, str(folder/'job.json'), str(folder/'out.pt')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return torch.load(folder/'out.pt', weights_only=True)


@pytest.fixture(scope='session')
def model(files): return from_pth(files['usual'])


@pytest.fixture
def folder(tmp_path):
    "A folder as the Hub has it, made of the tensors of an archive."
    def _make(w, legacy=False, **changes):
        save_file(hub(w, legacy), tmp_path/'model.safetensors', {'format': 'pt'})
        (tmp_path/'config.json').write_text(json.dumps(hub_config(w) | changes))
        return tmp_path
    return _make


# -- logits ------------------------------------------------------------------------------
@pytest.mark.parametrize('name', SHAPES)
def test_logits_and_state_equal_the_reference_package(name, files, reference):
    hf, (logits, state) = from_pth(files[name], torch.float32), reference['models'][name]
    out = run(hf, tokens(40), use_cache=True)
    assert logits.std() > .5 and gap(out.logits[0], logits) < 5e-5
    for i, layer in enumerate(kept(out).layers):
        assert layer.recurrent_states[0].dtype == torch.float32
        assert gap(layer.recurrent_states[0][0], state[3*i + 1]) < 5e-5
        for j, shift in enumerate((0, 2)): assert gap(layer.conv_states[j][0, :, 0], state[3*i + shift]) < 5e-5


@pytest.mark.parametrize('name', ['usual', 'narrow heads, no first v'])
def test_both_layouts_equal_numpy_over_512_tokens(name, files, folder):
    w, ids = archive(**SHAPES[name]), tokens(512)
    narrow = SHAPES[name].get('head', 64) != 64
    here = AutoModelForCausalLM.from_pretrained(folder(w), dtype=torch.float32)
    assert type(here) is Rwkv7ForCausalLM
    original, there = run(from_pth(files[name]), ids).logits[0], run(here, ids).logits[0]
    truth = Net(w)(ids)
    assert gap(original, truth) < 1e-4
    # heads that are not 64 wide have another eps in this layout, and that is seen
    assert gap(there, Net(w, group_eps=32e-5)(ids) if narrow else truth) < 1e-4
    assert torch.equal(original, there) != narrow
    if narrow: assert torch.equal(run(AutoModelForCausalLM.from_pretrained(folder(w, group_norm_eps=64e-5)), ids).logits[0], original)


def test_in_float64_it_is_the_equations(tmp_path):
    "Also where a removal key is tiny before it is normalised: float32 would not show which eps stands there."
    w = archive()
    w['blocks.1.att.k_k'][..., :64] *= 1e-8
    torch.save(w, tmp_path/'x.pth')
    assert gap(run(from_pth(tmp_path/'x.pth', torch.float64), tokens(80)).logits[0], Net(w)(tokens(80))) < 1e-12


def test_every_point_within_a_block_equals_numpy(model):
    net, ids, heard = Net(archive(), every=True), tokens(30), {}
    net(ids)
    at = dict(resid_pre=('', 0), mixer_in=('attn_norm', 1), **{'ssm.conv': ('attn.token_shift', 1), 'ssm.gate': ('attn.g_lora', 1)},
              **{'ssm.out_proj_in': ('attn.o_proj', 0), 'ssm.out': ('attn.o_proj', 1)}, resid_mid=('resid_mid', 1), mlp_in=('ffn_norm', 1),
              mlp_out=('ffn', 1), resid_post=('', 1), mixer_out=('attn', 1))
    handles = []
    for i, block in enumerate(model.model.layers):
        for site, (path, side) in at.items():
            def _hear(m, args, out, name=f'blocks.{i}.{site}', side=side):
                heard[name] = (out[0] if isinstance(out, tuple) else out) if side else args[0]
            handles.append(block.get_submodule(path).register_forward_hook(_hear))
        for c in 'rkv':
            def _hear(m, args, out, name=f'blocks.{i}.{c}'): heard[name] = out
            handles.append(block.get_submodule(f'attn.{c}_proj').register_forward_hook(_hear))
    run(model, ids)
    for h in handles: h.remove()
    for i in range(3): heard[f'blocks.{i}.ssm.in_proj'] = torch.cat([heard.pop(f'blocks.{i}.{c}') for c in 'rkv'], -1)
    assert len(heard) == 3*(len(at) + 1)
    for name, x in heard.items(): assert gap(x[0], torch.from_numpy(net.sites[name]).reshape(x[0].shape)) < 1e-4, name


def test_the_recurrence_is_one_function_that_can_be_swapped(model):
    "The scan gets the six tensors of the equations, and what a replacement returns is what goes on."
    net, ids, calls = Net(archive(), every=True), tokens(30), []
    net(ids)
    def _make(live, original):
        def _scan(v, k, r, log_w, kappa, erase, state):
            y, S = original(v, k, r, log_w, kappa, erase, state)
            calls.append(dict(x=v, B=k, C=r, decay=log_w.exp(), erase=erase, y=y))
            return y*(len(calls) < 3), S
        return _scan
    clean = run(model, ids).logits
    with swapped(rwkv7, {'rwkv7_scan': _make}, None): changed = run(model, ids).logits
    assert len(calls) == 3 and not torch.allclose(clean, changed) and torch.equal(clean, run(model, ids).logits)
    for i, call in enumerate(calls):
        for name, x in call.items(): assert gap(x[0], torch.from_numpy(net.sites[f'blocks.{i}.ssm.{name}'])) < 1e-4, name


# -- files -------------------------------------------------------------------------------
def test_shards_older_files_and_saving_again(model, folder, tmp_path):
    ids = tokens(20)
    want = run(model, ids).logits
    old = AutoModelForCausalLM.from_pretrained(folder(archive(), legacy=True))
    assert torch.equal(run(old, ids).logits, want)
    old.save_pretrained(tmp_path/'new', max_shard_size='200KB')
    shards = sorted((tmp_path/'new').glob('*.safetensors'))
    names = {n for s in shards for n in load_file(s)}
    assert len(shards) > 3 and names == set(hub(archive()))
    again, info = AutoModelForCausalLM.from_pretrained(tmp_path/'new', dtype=torch.float32, output_loading_info=True)
    assert torch.equal(run(again, ids).logits, want) and not any(info[k] for k in ('missing_keys', 'unexpected_keys', 'mismatched_keys'))
    model.save_pretrained(tmp_path/'pth')                                    # the original layout, saved in this one, keeps its eps
    assert AutoConfig.from_pretrained(tmp_path/'pth').group_norm_eps == 64e-5


def test_what_is_missing_is_noticed_and_made_new_and_nothing_else(folder):
    w = archive()
    del w['blocks.1.att.k_k'], w['blocks.2.att.w0']
    hf, info = AutoModelForCausalLM.from_pretrained(folder(w), dtype=torch.float32, output_loading_info=True)
    assert set(map(str, info['missing_keys'])) == {'model.layers.1.attn.k_k', 'model.layers.2.attn.w_lora.lora.2.bias'}
    state = hf.state_dict()
    assert all(torch.equal(state[n], t) for n, t in hub(w).items()) and len(state) == len(hub(w)) + 2
    assert state['model.layers.1.attn.k_k'].unique().item() == pytest.approx(.85)


def test_a_new_model_forgets_at_many_rates():
    bias = Rwkv7ForCausalLM(rwkv7.small(31)).model.layers[1].attn.w_lora.lora[2].bias.detach()
    assert bias.min() == -6 and bias.max() == 0 and len(bias.unique()) == 16


def test_a_loaded_model_needs_its_file_no_more(files, tmp_path):
    path = tmp_path/'x.pth'
    path.write_bytes(files['usual'].read_bytes())
    hf = from_pth(path)
    with path.open('r+b') as f: f.write(b'\0'*path.stat().st_size)
    assert all(torch.equal(hf.state_dict()[n], t) for n, t in hub(archive()).items())


def test_the_config_of_the_hub_is_read(folder):
    c = AutoConfig.from_pretrained(folder(archive()))
    assert type(c) is Rwkv7Config and (c.num_heads, c.decay_low_rank_dim, c.v_low_rank_dim, c.gate_low_rank_dim) == (2, 8, 5, 12)
    c = AutoConfig.from_pretrained(folder(archive(vocab=65536, layers=1 + 1, width=64)))
    assert c.eos_token_id == c.bos_token_id == c.pad_token_id == 0
    usual = {768: (64, 64, 32, 128), 2048: (96, 128, 64, 224)}               # 2.5, 2.5, 1.7 and 5 times the root of the width
    assert tuple(getattr(Rwkv7Config(hidden_size=768), f'{n}_low_rank_dim') for n in ('decay', 'a', 'v', 'gate')) == usual[768]


@pytest.mark.parametrize('field, value', [('attn', {'layers': [1]}), ('hidden_act', 'gelu'), ('norm_first', False), ('norm_bias', False),
                                          ('value_dim', [256, 128]), ('head_dim', 48)])
def test_variants_that_are_not_served_are_refused(field, value):
    with pytest.raises(ValueError, match='got .*expected'): Rwkv7Config(hidden_size=128, **{field: value})


@pytest.mark.parametrize('name', ['usual', 'narrow heads, no first v'])
def test_every_site_equals_the_float64_loop(files, name):
    "All that HookedModel shows, against a token at a time in numpy; the first token is ill-conditioned before its group norm."
    w, ids = torch.load(files[name], weights_only=True), tokens(40)
    net = Net(w, every=True)
    net(ids)
    opened = HookedModel(from_pth(files[name], torch.float32))
    out, cache = opened.run_with_cache([ids], '*')
    assert set(cache) <= set(net.sites) and len(cache) == 2 + 19*opened.n_layers
    for site, want in ((n, torch.from_numpy(net.sites[n])) for n in cache):
        got = cache[site][0].double()
        assert got.shape == want.shape, site
        assert gap(got, want) <= 5e-5*max(1, float(want.abs().max())), site


def test_everything_wrong_with_an_archive_is_named(tmp_path):
    w = archive()
    for n in ('blocks.0.att.r_k', 'blocks.1.att.w1', 'ln_out.bias', 'blocks.0.ln0.weight'): del w[n]
    w['blocks.1.ffn.s_emb.weight'], w['blocks.2.att.x_r'] = torch.zeros(3), torch.zeros(1, 1, 5)
    w['blocks.2.ffn.key.weight'], w['blocks.2.att.a1'] = w['blocks.2.ffn.key.weight'].T, w['blocks.2.att.a1'].T
    torch.save(w, tmp_path/'x.pth')
    with pytest.raises(ValueError) as err: from_pth(tmp_path/'x.pth')
    want = {'blocks.0.att.r_k missing', 'blocks.1.att.w1 missing', 'ln_out.bias missing', 'blocks.0.ln0.weight missing', 'blocks.2.att.x_r of shape (1, 1, 5)',
            'blocks.1.ffn.s_emb.weight unknown', 'blocks.2.ffn.key.weight of shape (128, 320)', 'blocks.2.att.a1 of shape (6, 128)'}
    assert set(re.findall(r'[\w.]+ (?:missing|unknown|of shape \([\d, ]+\))', str(err.value))) == want


def test_other_shapes_of_vectors_and_dtypes_are_taken(tmp_path):
    usual = {n: t.to(torch.float16 if 'ffn' in n else t.dtype) for n, t in archive().items()}
    w = {n: t.flatten() if t.shape[:2] == (1, 1) else t[None] if t.dim() == 1 else t for n, t in usual.items()}
    torch.save(w, tmp_path/'x.pth', _use_new_zipfile_serialization=False)    # an archive of the old kind, which cannot be mapped
    hf = from_pth(tmp_path/'x.pth')
    assert {p.dtype for p in hf.parameters()} == {torch.float32} and not any(p.is_meta for p in hf.parameters())
    assert all(torch.equal(hf.state_dict()[n], t.float()) for n, t in hub(usual).items()) and len(hub(usual)) == len(hf.state_dict())
    assert next(from_pth(tmp_path/'x.pth', torch.bfloat16).parameters()).dtype == torch.bfloat16


class Evil:
    "Unpickled, it would make a folder."
    def __init__(self, where): self.where = where
    def __reduce__(self): return Path.mkdir, (self.where,)


@pytest.mark.parametrize('kind', ['zip', 'old', 'bare'])
def test_nothing_is_unpickled_that_could_be_code(kind, tmp_path):
    bad, made = tmp_path/'bad.pth', tmp_path/'made'
    data = {**archive(), 'x': Evil(made)}
    if kind == 'bare': bad.write_bytes(pickle.dumps(data['x'], protocol=2))
    else: torch.save(data, bad, _use_new_zipfile_serialization=kind == 'zip')
    with pytest.raises(ValueError, match='no plain archive of tensors'): from_pth(bad)
    assert not made.exists()
    (pickle.loads(bad.read_bytes()) if kind == 'bare' else torch.load(bad, weights_only=False))    # it is malicious indeed
    assert made.exists()


@pytest.mark.parametrize('content', [b'', b'no archive', {'emb.weight': 3}, [torch.zeros(2)], {}, {'emb.weight': torch.zeros(2, dtype=torch.int)}], ids=str)
def test_what_is_no_archive_of_tensors_is_refused(content, tmp_path):
    if isinstance(content, bytes): (tmp_path/'x.pth').write_bytes(content)
    else: torch.save(content, tmp_path/'x.pth')
    with pytest.raises(ValueError, match='no plain archive of tensors|expected the tensors of RWKV-7'): from_pth(tmp_path/'x.pth')
    with pytest.raises(ValueError, match='FileNotFoundError'): from_pth(tmp_path/'y.pth')


def test_a_damaged_archive_is_refused(files, tmp_path):
    data = files['usual'].read_bytes()
    (tmp_path/'x.pth').write_bytes(data[:len(data)//2])
    with pytest.raises(ValueError, match='no plain archive of tensors'): from_pth(tmp_path/'x.pth')


MEMORY = '''
import sys, threading, time
import psutil
from circuitbench.layout import from_pth
from_pth(sys.argv[1])
rss, peak, done = psutil.Process().memory_info, [0], threading.Event()
def watch():
    while not done.wait(.0003): peak[0] = max(peak[0], rss().rss)
before, thread = rss().rss, threading.Thread(target=watch)
thread.start()
hf = from_pth(sys.argv[2])
done.set(); thread.join()
print(peak[0] - before)
'''


def test_loading_needs_the_weights_and_little_more_than_the_file(files, tmp_path):
    w = archive(vocab=120_000)
    torch.save(w, tmp_path/'x.pth')
    done = subprocess.run([sys.executable, '-c', MEMORY, str(files['usual']), str(tmp_path/'x.pth')], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 1 < int(done.stdout)/(tmp_path/'x.pth').stat().st_size < 2.3


# -- cache and padding -------------------------------------------------------------------
def test_cached_generation_is_generation(model):
    ids, options = tokens(9, batch=3), dict(do_sample=False, eos_token_id=None)
    fast = model.generate(ids, max_new_tokens=64, **options)
    assert torch.equal(fast, model.generate(ids, max_new_tokens=64, use_cache=False, **options)) and len(set(fast[0, 9:].tolist())) > 5
    beams = model.generate(ids, max_new_tokens=12, num_beams=4, **options)
    assert torch.equal(beams, model.generate(ids, max_new_tokens=12, num_beams=4, use_cache=False, **options)) and not torch.equal(beams, fast[:, :21])
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    padded = model.generate(ids, attention_mask=mask, max_new_tokens=12, **options)
    assert torch.equal(padded[1, 9:], model.generate(ids[1:2, 4:], max_new_tokens=12, **options)[0, 5:])
    embeds = model.model.embeddings(ids)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=12, **options), fast[:, 9:21])


@pytest.mark.parametrize('cuts', [(1,), (20,), (64, 65), tuple(range(1, 80))])
def test_a_prompt_in_pieces_is_the_prompt(model, cuts):
    ids = tokens(80, batch=2)
    whole, cache, parts = run(model, ids, use_cache=True), DynamicCache(config=model.config), []
    for lo, hi in zip((0, *cuts), (*cuts, 80)): parts.append(run(model, ids[:, lo:hi], cache=cache).logits)
    assert gap(torch.cat(parts, 1), whole.logits) < NEAR
    for a, b in zip(cache.layers, kept(whole).layers): assert gap(a.recurrent_states[0], b.recurrent_states[0]) < NEAR


@pytest.mark.parametrize('old', ['past_key_values', 'cache_params'])
def test_the_cache_may_be_named_as_before(model, old):
    ids = tokens(12, batch=1)
    first = kept(run(model, ids[:, :7], use_cache=True))
    assert gap(run(model, ids[:, 7:], **{old: first}).logits, run(model, ids).logits[:, 7:]) < NEAR


@pytest.mark.parametrize('side', ['left', 'right', 'both', 'within'])
def test_padding_changes_nothing(model, side):
    "Logits at the tokens, and what is carried on, are those of the prompt without padding."
    keep = dict(left=[0]*5 + [1]*15, right=[1]*15 + [0]*5, both=[0]*3 + [1]*15 + [0]*2, within=[1]*6 + [0]*5 + [1]*9)[side]
    mask = torch.tensor([keep, [1]*20])
    ids, more = tokens(20, batch=2), tokens(6, batch=2, seed=1)
    out = run(model, ids, attention_mask=mask, use_cache=True)
    after = run(model, more, cache=kept(out), attention_mask=torch.cat([mask, torch.ones(2, 6)], 1)).logits
    for row in range(2):
        real = mask[row].bool()
        alone = run(model, torch.cat([ids[row, real], more[row]])[None]).logits[0]
        assert gap(out.logits[row, real], alone[:real.sum()]) < NEAR and gap(after[row], alone[real.sum():]) < NEAR


def test_a_mask_that_does_not_fit_is_refused(model):
    for shape in ((2, 5), (1, 4), (1, 1, 5, 5)):
        with pytest.raises(ValueError, match=r'got an attention_mask of shape .*expected \(1, 5\)'): model(torch.ones(1, 5).long(), attention_mask=torch.ones(shape))
    for kwargs in ({}, dict(input_ids=torch.ones(1, 5).long(), inputs_embeds=torch.ones(1, 5, 128))):
        with pytest.raises(ValueError, match='input_ids and inputs_embeds'): model(**kwargs)


# -- gradients and half precision --------------------------------------------------------
def test_gradients_equal_finite_differences_also_through_a_cache():
    import copy
    hf = Rwkv7ForCausalLM(rwkv7.small(31))
    for p in hf.parameters(): torch.nn.init.normal_(p, std=.4)
    hf = copy.deepcopy(hf).double().eval()
    x = torch.randn(2, 12, 32, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1]*12, [0]*3 + [1]*9])
    whole = lambda x: hf(inputs_embeds=x, attention_mask=mask).logits*mask[..., None]
    assert torch.autograd.gradcheck(whole, x, fast_mode=True)
    def _pieces(x):
        first = hf(inputs_embeds=x[:, :7], attention_mask=mask[:, :7], use_cache=True)
        return torch.cat([first.logits, hf(inputs_embeds=x[:, 7:], attention_mask=mask, cache=kept(first)).logits], 1)*mask[..., None]
    score = lambda f: torch.autograd.grad(f(x).sin().sum(), x)[0]
    assert score(whole).abs().min(-1).values[mask.bool()].min() > 0 and torch.allclose(score(whole), score(_pieces), atol=1e-10)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in _trained(hf))


def _trained(hf):
    ids = tokens(9, batch=2, vocab=31)
    hf(ids, labels=ids).loss.backward()
    return hf.parameters()


@pytest.mark.parametrize('dtype, tol', [(torch.bfloat16, 2e-2), (torch.float16, 6e-3)])
def test_half_precision_stays_near_float64(files, dtype, tol):
    ids = tokens(200)
    truth = Net({n: t.to(dtype) for n, t in archive().items()})(ids)
    out = run(from_pth(files['usual'], dtype), ids, use_cache=True)
    assert out.logits.dtype == dtype and kept(out).layers[0].recurrent_states[0].dtype == torch.float32
    assert float((out.logits[0].double() - truth).norm()/truth.norm()) < tol


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_the_recurrence_runs_in_float32_whatever_the_weights_are(files, dtype):
    "Decay and removal key reach it unrounded: a length of one to seven digits, and decays that half precision cannot tell apart."
    seen = []
    def _make(live, original):
        def _scan(*args):
            seen.append(args[:6])
            return original(*args)
        return _scan
    with swapped(rwkv7, {'rwkv7_scan': _make}, None): run(from_pth(files['usual'], dtype), tokens(200))
    for args in seen:
        assert {x.dtype for x in args} == {torch.float32}
        v, k, r, log_w, kappa, erase = args
        assert gap(kappa.norm(dim=-1), torch.ones(())) < 1e-6 and log_w.max() < 0
        assert not torch.equal(log_w, log_w.to(dtype).float()) and not torch.equal(erase, erase.to(dtype).float())


# -- the tokenizer -----------------------------------------------------------------------
@pytest.fixture(scope='session')
def tok(vocabulary): return world_tokenizer(vocabulary.parent)


def encode(tok, text): return tok(text, add_special_tokens=False)['input_ids']


def test_ids_equal_the_reference_package(tok, reference):
    assert encode(tok, TEXTS[0]) == [6699, 304, 25740, 109, 39990, 4600, 4596, 22590, 30449, 4706] and encode(tok, '\n\n') == [261]
    assert [encode(tok, t) for t in TEXTS] == reference['ids']
    assert [tok.decode(encode(tok, t)) for t in TEXTS] == TEXTS and tok(TEXTS)['input_ids'] == reference['ids']


def test_the_tokenizer_is_a_transformers_tokenizer(tok, tmp_path):
    assert (len(tok), tok.vocab_size, tok.pad_token_id, tok.eos_token_id, tok.bos_token_id) == (65530, 65530, 0, 0, 0)
    text = f'one{END}two'
    assert encode(tok, text)[1] == 0 and tok.decode(encode(tok, text)) == text and tok.decode(encode(tok, text), skip_special_tokens=True) == 'onetwo'
    assert 0 not in tok(text, split_special_tokens=True)['input_ids']
    assert tok.decode([65533, 65535]) == '' and tok.decode(256) == tok.decode([256]) == '\ufffd'
    assert tok.decode(torch.tensor(encode(tok, '世界'))) == '世界'
    whole = range(1, 65530)
    assert tok.convert_tokens_to_ids(tok.convert_ids_to_tokens(whole)) == [*whole]
    tok.save_pretrained(tmp_path)
    for again in (world_tokenizer(tmp_path), WorldTokenizer.from_pretrained(tmp_path)):
        assert again.get_vocab() == tok.get_vocab() and encode(again, TEXTS[5]) == encode(tok, TEXTS[5])
    batch = tok(['a', TEXTS[0]], padding=True, return_tensors='pt')
    assert batch['attention_mask'].sum(1).tolist() == [1, 10]


@pytest.mark.parametrize('piece', ['x', ' ', '世', 'word ', '='])
def test_work_grows_with_the_text_and_not_faster(tok, piece):
    "Looks into the vocabulary are counted, not seconds."
    class Counting(dict):
        looks = 0
        def __contains__(self, key):
            Counting.looks += 1
            return super().__contains__(key)
    ids, counts = tok._ids, []
    try:
        tok._ids = Counting(ids)
        for n in (2_000, 8_000):
            Counting.looks = 0
            tok._tokenize(piece*n)
            counts.append(Counting.looks)
    finally: tok._ids = ids
    assert 0 < counts[1] < 4.2*counts[0] and counts[1] < 128*8_000*len(piece.encode())


@pytest.mark.parametrize('line', ['x', '1', "1 'a'", "1 'a' 2", "1 3 1", "-1 'a' 1", "1 __import__('os').mkdir('made') 1", "1 ('a') b 1", "2 'a' 1\n2 'b' 1", "1 'a' 1\n2 'a' 1", "1 '' 0", "1 'a' 1"])
def test_wrong_vocabularies_are_refused(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'v.txt').write_text(line)
    with pytest.raises(ValueError, match='got .*expected'): world_tokenizer(tmp_path/'v.txt')
    with pytest.raises(ValueError, match='expected a folder with rwkv_vocab'): world_tokenizer(tmp_path)
    assert not (tmp_path/'made').exists()
