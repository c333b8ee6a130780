"""Names, folders and files that are right, and those that are not."""
import json
from pathlib import Path

import pytest
import torch

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
    assert torch.equal(again.run('Hello').logits, model.run('Hello').logits)
    assert load_model(str(tmp_path), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_folder_without_a_tokenizer_takes_ids(tmp_path, model):
    model.hf.save_pretrained(tmp_path)
    bare = load_model(str(tmp_path))
    assert torch.equal(bare.run([1, 2]).logits, model.run([1, 2]).logits) and bare.generate([1, 2], 2).text == []
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


def test_code_in_a_folder_is_never_run(tmp_path):
    load_model('mock://mamba2-tiny').hf.save_pretrained(tmp_path)
    (tmp_path/'modeling_evil.py').write_text(f'open({str(tmp_path/"ran")!r}, "w").close()\nclass Evil: pass\n')
    path, evil = tmp_path/'config.json', 'modeling_evil.Evil'
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {'auto_map': {'AutoModelForCausalLM': evil, 'AutoConfig': evil}}))
    load_model(str(tmp_path))
    path.write_text(json.dumps(config | {'model_type': 'evil', 'auto_map': {'AutoConfig': evil}}))
    with pytest.raises(ValueError, match="type 'evil'"): load_model(str(tmp_path))
    assert not (tmp_path/'ran').exists()


@pytest.mark.parametrize('name', ['tiny://nobody', 'mock://gpt-tiny', 'http://x', 'no/such-folder-here', ''])
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
