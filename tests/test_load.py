"""Names, folders and files that are right, and those that are not."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3_5Config, Qwen3_5ForConditionalGeneration

from circuitbench.edit import zero
from circuitbench.hook import HookedModel
from circuitbench.load import byte_tokenizer, load_model
from circuitbench.site import SiteError, families


def test_mock_models_are_the_same_every_time(model):
    again = load_model(model.name)
    assert all(torch.equal(a, b) for a, b in zip(model.hf.state_dict().values(), again.hf.state_dict().values()))


def test_loading_does_not_touch_the_random_state():
    torch.manual_seed(3)
    want = torch.rand(1)
    torch.manual_seed(3)
    load_model('mock://mamba2-tiny')
    assert torch.equal(torch.rand(1), want)


@pytest.mark.parametrize('alias, site', [
    ('out_proj_in', 'ssm.out_proj_in'), ('x_proj', 'ssm.in_proj'), ('ssm_y', 'ssm.y'), ('hidden_state_h', 'ssm.state'),
    ('conv1d', 'ssm.conv'), ('hook_resid_post', 'resid_post'), (None, 'ssm.out_proj_in')])
def test_hook_points_of_the_first_api(alias, site):
    assert load_model('mock://mamba2-tiny', hook_point=alias).hook_point == site


def test_a_folder_round_trip(tmp_path, model):
    model.hf.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    again = load_model(str(tmp_path))
    assert all(torch.equal(v, again.hf.state_dict()[k]) for k, v in model.hf.state_dict().items())
    assert torch.allclose(again.run('Hello').logits, model.run('Hello').logits, atol=1e-5)
    assert load_model(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_folder_without_a_tokenizer_takes_ids(tmp_path, model):
    model.hf.save_pretrained(tmp_path)
    bare = load_model(str(tmp_path))
    assert torch.allclose(bare.run([1, 2]).logits, model.run([1, 2]).logits, atol=1e-5) and bare.generate([1, 2], 2).text == []
    with pytest.raises(ValueError, match='no tokenizer'): bare.run('Hello')


def damage(folder: Path, how: str):
    weights, config = folder/'model.safetensors', folder/'config.json'
    if how == 'cut': weights.write_bytes(weights.read_bytes()[:-500])
    elif how == 'rubbish': weights.write_bytes(b'not tensors at all')
    elif how == 'gone': weights.unlink()
    elif how == 'other shape': config.write_text(json.dumps(json.loads(config.read_text()) | {'hidden_size': 48}))
    elif how == 'more layers': config.write_text(json.dumps(json.loads(config.read_text()) | {'num_hidden_layers': 5}))
    elif how == 'other family': config.write_text(json.dumps({'model_type': 'gpt2'}))
    elif how == 'no type': config.write_text('{}')
    elif how == 'cut config': config.write_text(config.read_text()[:90])


@pytest.mark.parametrize('how', ['cut', 'rubbish', 'gone', 'other shape', 'more layers', 'other family', 'no type', 'cut config'])
def test_damaged_folders_are_value_errors(tmp_path, how):
    load_model('mock://mamba2-tiny').hf.save_pretrained(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(ValueError, match='got .*expected') as err: load_model(str(tmp_path))
    assert len(str(err.value).splitlines()) <= 2 and 'Hub' not in str(err.value)


def test_every_wrong_tensor_is_named(tmp_path):
    load_model('mock://mamba2-tiny').hf.save_pretrained(tmp_path)
    tensors = load_file(tmp_path/'model.safetensors')
    lost = 'backbone.layers.0.mixer.D', 'backbone.layers.1.norm.weight'
    for n in lost: del tensors[n]
    tensors |= {'backbone.layers.0.mixer.extra': torch.zeros(2), 'backbone.norm_f.weight': torch.zeros(31)}
    save_file(tensors, tmp_path/'model.safetensors', metadata={'format': 'pt'})
    with pytest.raises(ValueError, match='missing: .*; not expected: .*; misshapen: .*') as err: load_model(str(tmp_path))
    assert all(n in str(err.value) for n in (*lost, 'mixer.extra', r'norm_f.weight (31,) for (32,)'))


def test_shards(tmp_path):
    model = load_model('mock://jamba-tiny')
    model.hf.save_pretrained(tmp_path, max_shard_size='30KB')
    assert len(list(tmp_path.glob('*.safetensors'))) > 3
    assert torch.equal(load_model(str(tmp_path), device='auto').run([1, 2, 3]).logits, model.run([1, 2, 3]).logits)


def test_weights_in_bf16_and_a_recurrence_in_float32(tmp_path, recurrent):
    recurrent.hf.save_pretrained(tmp_path)
    weights = {k: v.to(torch.bfloat16) for k, v in load_file(tmp_path/'model.safetensors').items()}
    save_file(weights, tmp_path/'model.safetensors', metadata={'format': 'pt'})
    path = tmp_path/'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'dtype': 'bfloat16'}))
    half = load_model(str(tmp_path), dtype='auto')
    _, cache = half.run_with_cache([1, 2, 3], ['ssm.state', 'mixer_in'])
    assert half.dtype == torch.bfloat16 and cache['blocks.0.mixer_in'].dtype == torch.bfloat16
    assert cache['blocks.0.ssm.state'].dtype == torch.float32
    whole = load_model(str(tmp_path))
    assert whole.dtype == torch.float32 and not torch.equal(whole.run([1, 2]).logits, half.run([1, 2]).logits.float())


def test_a_device_map_of_accelerate(tmp_path):
    "Blocks whose weights are brought from the disk when they run: sites and edits are those of the whole model."
    model = load_model('mock://falcon-h1-tiny')
    model.hf.save_pretrained(tmp_path)
    where = {'model.embed_tokens': 'cpu', 'model.layers.0': 'disk', 'model.layers.1': 'cpu', 'model.final_layernorm': 'cpu',
             'model.rotary_emb': 'cpu', 'lm_head': 'disk'}
    spread = load_model(str(tmp_path), device_map=where)
    assert any(p.device.type == 'meta' for p in spread.hf.parameters()) and spread.device.type == 'cpu'
    edit = 2*zero('blocks.0.ssm.state', at=2) | zero('blocks.1.ssm.gate', at=3)
    (want, a), (got, b) = (m.run_with_cache([5, 6, 7, 8, 9], '*', edit=edit) for m in (model, spread))
    assert torch.allclose(got.logits, want.logits, atol=1e-6) and all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)
    with pytest.raises(ValueError, match='one of them'): load_model(str(tmp_path), device='cpu', device_map='auto')


def test_a_model_that_is_already_in_memory():
    model = load_model('mock://mamba2-tiny')
    with torch.no_grad(): model.hf.lm_head.weight[5] += 1
    hf = model.hf
    hf.backbone = torch.ao.quantization.quantize_dynamic(hf.backbone, {torch.nn.Linear}, dtype=torch.qint8)
    opened = HookedModel.from_module(hf, model.tokenizer, name='quantised')
    assert type(hf.backbone.layers[0].mixer.in_proj) is not torch.nn.Linear and opened.name == 'quantised'
    out, cache = opened.run_with_cache('Hello', '*')
    assert torch.allclose(out.logits, hf(out.tokens, use_cache=False).logits, atol=1e-5)
    assert torch.equal(cache['logits'], out.logits) and opened.generate('Hello', 3).text[0]


def test_the_language_model_of_a_checkpoint_with_a_vision_tower(tmp_path):
    "Qwen3.5 is published with one; its tensors are not opened, and not called superfluous."
    text = families()['qwen3-5'].small(257).to_dict()
    vision = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=32, patch_size=4, num_position_embeddings=16)
    marks = dict(image_token_id=250, video_token_id=251, vision_start_token_id=252, vision_end_token_id=253)
    whole = Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **marks)).eval()
    whole.save_pretrained(tmp_path)
    assert any('visual' in n for n in load_file(tmp_path/'model.safetensors'))
    ids = torch.arange(1, 13)[None]
    assert torch.allclose(load_model(str(tmp_path)).run(ids).logits, whole(input_ids=ids).logits, atol=1e-5)


def cached(home: Path, repository: str, write):
    "A repository in the Hub's cache, as if it had been downloaded."
    folder = home/'hub'/f"models--{repository.replace('/', '--')}"
    (folder/'refs').mkdir(parents=True)
    (folder/'refs/main').write_text('0'*40)
    snapshot = folder/'snapshots'/('0'*40)
    snapshot.mkdir(parents=True)
    write(snapshot)


def test_ids_of_the_hub(tmp_path):
    "transformers' layout, mamba_ssm's and a .pth, by the names under which a user would ask for them."
    import oracle_mamba_ssm as upstream
    from oracle_rwkv7 import archive
    mamba = dict(d_model=24, n_layer=2, vocab_size=45, ssm_cfg={}, rms_norm=True, residual_in_fp32=True, fused_add_norm=True, pad_vocab_size_multiple=8)
    cached(tmp_path, 'tiiuae/tiny-falcon', load_model('mock://falcon-h1-tiny').hf.save_pretrained)
    def mamba_ssm(folder):
        (folder/'config.json').write_text(json.dumps(mamba))
        torch.save(upstream.checkpoint(mamba), folder/'pytorch_model.bin')
    cached(tmp_path, 'state-spaces/mamba-tiny', mamba_ssm)
    cached(tmp_path, 'BlinkDL/rwkv7-g1', lambda folder: torch.save(archive(), folder/'rwkv7-g1-tiny.pth'))
    code = """from circuitbench import load_model
for name in ('tiiuae/tiny-falcon', 'state-spaces/mamba-tiny', 'BlinkDL/rwkv7-g1/rwkv7-g1-tiny.pth'):
    model = load_model(name, device='cpu')
    print(model.adapter.family, tuple(model.run([1, 2, 3]).logits.shape), model.tokenizer)"""
    env = os.environ | {'HF_HOME': str(tmp_path), 'HF_HUB_OFFLINE': '1'}
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=env)
    assert out.returncode == 0, out.stderr
    assert out.stdout.splitlines() == ['falcon-h1 (1, 3, 257) None', 'mamba1 (1, 3, 48) None', 'rwkv7 (1, 3, 97) None']


class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (self.path, 'w')


@pytest.mark.parametrize('name', ['model.pth', 'pytorch_model.bin'])
def test_a_pickle_that_is_no_archive_of_tensors_is_refused(tmp_path, name):
    load_model('mock://mamba2-tiny').hf.save_pretrained(tmp_path)
    (tmp_path/'model.safetensors').unlink()
    torch.save({'w': torch.zeros(2), 'evil': Evil(str(tmp_path/'ran'))}, tmp_path/name)
    with pytest.raises(ValueError, match='got .*expected'): load_model(str(tmp_path/name if name.endswith('pth') else tmp_path))
    assert not (tmp_path/'ran').exists()


def test_another_transformers_is_refused_with_words():
    code = "import transformers; transformers.__version__ = '4.57.1'; from circuitbench import load_model"
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert "got transformers 4.57.1, expected >=5.23,<6" in out.stderr.splitlines()[-1]


def test_code_in_a_folder_is_never_run(tmp_path):
    load_model('mock://mamba2-tiny').hf.save_pretrained(tmp_path)
    (tmp_path/'modeling_evil.py').write_text(f'open({str(tmp_path/"ran")!r}, "w").close()\nclass Evil: pass\n')
    path, evil = tmp_path/'config.json', 'modeling_evil.Evil'
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {'auto_map': {'AutoModelForCausalLM': evil, 'AutoConfig': evil}}))
    load_model(str(tmp_path))
    path.write_text(json.dumps(config | {'model_type': 'evil', 'auto_map': {'AutoConfig': evil}}))
    with pytest.raises(ValueError, match="type 'evil'.*Adding a family"): load_model(str(tmp_path))
    path.write_text(json.dumps(config | {'model_type': 'bambo'}))
    with pytest.raises(ValueError, match="nearest: bamba"): load_model(str(tmp_path))
    assert not (tmp_path/'ran').exists()


@pytest.mark.parametrize('name', ['tiny://nobody', 'mock://gpt-tiny', 'http://x', 'no/such-folder-here', 'no/such/file.pth', ''])
def test_unknown_names_list_the_choices(name, monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')
    with pytest.raises(ValueError, match='expected'): load_model(name)


def test_an_unknown_hook_point_names_the_nearest():
    with pytest.raises(SiteError, match='ssm.out'): load_model('mock://mamba2-tiny', hook_point='out_proj')


def test_the_byte_tokenizer_takes_any_text():
    tok, text = byte_tokenizer(), 'naïve 日本 \t\n\x00 🙂'
    assert tok.decode(tok(text)['input_ids']) == text and max(tok(text)['input_ids']) < len(tok) == 257


def test_every_family_has_a_mock():
    assert {load_model(f'mock://{f}-tiny').adapter.family for f in families()} == set(families())
