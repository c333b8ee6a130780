"""The shipped models: they load without a network, are small, and reach their figures on a sample."""
import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from circuitbench.load import tiny_path
from circuitbench.shipped import bits_per_byte, score, shipped_models
from circuitbench.task import text

NAMES = ('mamba2', 'mamba1', 'hybrid', 'jamba', 'rwkv7', 'titans', 'transformer')


@pytest.fixture(scope='module', params=NAMES)
def shipped(request):
    torch.set_num_threads(1)
    path = tiny_path(request.param)
    return request.param, AutoModelForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv('HF_HUB_OFFLINE', '1')


def test_sizes():
    models = shipped_models()
    assert {m.name for m in models} >= set(NAMES)
    assert all(m.size <= 8e6 for m in models)
    folder = models[0].path.parent
    size = lambda f: sum(p.stat().st_size for p in f.rglob('*') if p.is_file())
    assert size(folder) - size(folder/'transformer') < 42.5e6 and size(folder/'transformer') < 4e6 and size(folder/'titans') < 2.6e6


def test_weights_are_all_there(shipped):
    name, model, _ = shipped
    assert model.dtype == torch.float32 and 1e6 <= sum(p.numel() for p in model.parameters()) <= 4e6
    _, info = AutoModelForCausalLM.from_pretrained(tiny_path(name), output_loading_info=True)
    assert not info['missing_keys'] and not info['unexpected_keys'] and not info['mismatched_keys']


def test_text_is_predicted_as_well_as_the_card_says(shipped):
    name, model, tok = shipped
    sample = text('held')[::12]
    got = bits_per_byte(lambda ids: model(ids, use_cache=False), sample, tok)
    said = {m.name: m for m in shipped_models()}[name].figures['bits']
    assert abs(got - said) < .08


@pytest.mark.parametrize('kind', ['facts', 'indirect_object', 'induction'])
def test_prompts_are_answered_as_often_as_the_card_says(shipped, kind):
    name, model, tok = shipped
    said = {m.name: m for m in shipped_models()}[name].figures[kind]
    got = score(lambda ids: model(ids, use_cache=False), kind, 60, tok)
    assert abs(got - said) <= 3*math.sqrt(max(said*(1 - said), .01)/60)


def test_the_log_ends_with_the_finished_model():
    for m in shipped_models():
        rows = [json.loads(line) for line in (m.path/'log.jsonl').read_text().splitlines()]
        assert rows[-1] == m.figures and all(a['step'] <= b['step'] for a, b in zip(rows, rows[1:]))
        assert m.figures['final'] == ('-' not in m.name)
        if m.figures['final']: assert (m.path/'card.md').is_file()


@pytest.mark.parametrize('line', ['', 'a', 'Paris is\n\nthe  capital', 'é ☃ \x00\x7f <eos', '\tx\n y', '12 sheep'])
def test_tokenizer_takes_any_text_and_adds_only_a_space_before_a_line(shipped, line):
    _, _, tok = shipped
    back = tok.decode(tok(line)['input_ids'])
    assert back == line or back == '\n'.join(f' {part}' if part and not part[0].isspace() else part for part in line.split('\n'))


def test_a_word_is_one_token_at_the_start_and_inside(shipped):
    _, _, tok = shipped
    assert tok('Paris')['input_ids'] == tok(' Paris')['input_ids'] == tok('in Paris')['input_ids'][1:] == tok('in\nParis')['input_ids'][2:]


def test_bits_of_a_uniform_model_are_known(shipped):
    _, _, tok = shipped
    lines, vocab = text('held')[:30], len(tok)
    ids = tok('\n'.join(lines) + '\n')['input_ids']
    want = (len(ids) - 1)*math.log2(vocab)/len(('\n'.join(lines) + '\n').encode())
    got = bits_per_byte(lambda x: torch.zeros(*x.shape, vocab), lines, tok)
    assert abs(got - want) < 1e-4


def test_bits_read_every_token_once_with_its_context(shipped):
    "A model that knows the next token only when it has seen at least `stride` tokens, or all there are."
    _, _, tok = shipped
    lines = text('held')[:30]
    ids = torch.tensor(tok('\n'.join(lines) + '\n')['input_ids'])
    seen = []

    def model(x):
        windows = ids.unfold(0, x.shape[1], 1)
        start = int((windows == x[0]).all(1).nonzero()[0])
        seen.append((start, x.shape[1]))
        out = torch.zeros(1, x.shape[1], len(tok))
        out[0, torch.arange(x.shape[1]), ids[start+1:start+1+x.shape[1]]] = 100.
        return out

    assert bits_per_byte(model, lines, tok) < 1e-3
    assert seen[0] == (0, 256) and all(b[0] - a[0] == 128 for a, b in zip(seen, seen[1:]))


def test_unknown_names_and_missing_tokenizers():
    with pytest.raises(ValueError, match='expected one of .*mamba2'):
        tiny_path('mamba3')
    with pytest.raises(ValueError, match='unknown kind'):
        score(lambda ids: ids, 'sums', tokenizer=object())
    with pytest.raises(ValueError, match='tokenizer'):
        score(lambda ids: ids, 'facts')
