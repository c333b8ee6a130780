"""Sweeps by ablation, against hooks on the bare model, the equations in float64 numpy, and a circuit set by hand."""
import json
import math

import numpy as np
import oracle
import pytest
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

from circuitbench.ablate import ablated, cases, cells, running_means, sheet
from circuitbench.hook import HookedModel
from circuitbench.load import load_model
from circuitbench.site import SiteError
from circuitbench.sweep import STRONGEST, Sweep, SweepInspector, sweep_sites, sweep_view

PROMPT = [5, 9, 41, 7, 200, 9, 3]


@pytest.fixture
def model(mamba):
    "What is checked here against hooks and equations of a Mamba block; `test_verbs` is for the other families."
    return mamba


def bare(model): return not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())


def diff(logits, target, wrong): return float(logits[-1, target] - logits[-1, wrong])


# -- truth in plain torch and in numpy ---------------------------------------------------
def without(hf, module, put, ids):
    "Logits of the bare model with a module's output replaced."
    handle = module.register_forward_hook(lambda m, args, out: put(out))
    try: return hf(torch.as_tensor(ids)).logits.detach()
    finally: handle.remove()


PUT = {'zero': torch.zeros_like, 'mean': lambda out: out.mean(1, keepdim=True).expand_as(out)}


@pytest.mark.parametrize('ablation', PUT)
def test_effects_are_those_of_a_hook_on_the_bare_model(model, ablation):
    c = sweep_sites(model, PROMPT, 17, 30, sites='mixer_out', ablation=ablation, progress=False)
    clean = model.hf(torch.tensor([PROMPT])).logits[0]
    assert c.clean == pytest.approx(diff(clean, 17, 30), abs=1e-3) and c.sites == ('mixer_out',)
    for i, block in enumerate(model.blocks):
        out = without(model.hf, block.mixer, PUT[ablation], [PROMPT])[0]
        assert float(c.effects[i, 0]) == pytest.approx(diff(clean, 17, 30) - diff(out, 17, 30), abs=2e-3)
        assert float(c.norms[i, 0]) == pytest.approx(float((out - clean).norm()/clean.norm()), rel=1e-3)
    assert bare(model)


def rest(hf, sites, y):
    "Logits from the read-out of the last block on, float64."
    w, c, i = oracle.weights(hf), hf.config, hf.config.num_hidden_layers - 1
    gated, mixer = y*sites[f'blocks.{i}.ssm.gate'], f'backbone.layers.{i}.mixer.'
    b, n = gated.shape[:2]
    if c.model_type == 'mamba2':
        weight = w[mixer + 'norm.weight'].reshape(c.n_groups, -1)
        gated = oracle.rms(gated.reshape(b, n, c.n_groups, -1), weight, c.layer_norm_epsilon)
    r = sites[f'blocks.{i}.resid_pre'] + gated.reshape(b, n, -1) @ w[mixer + 'out_proj.weight'].T
    head = w.get('lm_head.weight', w['backbone.embeddings.weight'])
    return oracle.rms(r, w['backbone.norm_f.weight'], c.layer_norm_epsilon) @ head.T


def data_means(hf, rows):
    "The mean of each site of the last block over rows of tokens."
    sites, i = oracle.run(hf, rows), hf.config.num_hidden_layers - 1
    return {k: sites[f'blocks.{i}.ssm.{k}'].mean((0, 1), keepdims=True) for k in ('x', 'dt', 'B', 'C', 'state', 'y')}


def by_hand(hf, ids, site, how, heads=slice(None)):
    "Logits with one site of the last block ablated ('zero', 'mean', or rows of other tokens), from the equations."
    sites, i = oracle.run(hf, np.asarray(ids)), hf.config.num_hidden_layers - 1
    v = {k: sites[f'blocks.{i}.ssm.{k}'] for k in ('x', 'dt', 'B', 'C', 'state', 'y')}
    w = oracle.weights(hf)
    A, D = -np.exp(w[f'backbone.layers.{i}.mixer.A_log']), w[f'backbone.layers.{i}.mixer.D']
    new = v[site].copy()
    if not isinstance(how, str): value = data_means(hf, how)[site]
    else: value = new.mean(1, keepdims=True)*(how == 'mean')
    new[:, :, heads] = value[:, :, heads]
    v[site] = new
    if site in ('x', 'dt', 'B', 'C'): v['y'] = oracle.scan(v['x'], v['dt'], A, v['B'], v['C'], D)[0]
    if site == 'state': v['y'] = np.einsum('blhpn,blhn->blhp', new, v['C']) + D[:, None]*v['x']
    return rest(hf, sites, v['y'])


@pytest.mark.parametrize('how', ['zero', 'mean'])
def test_effects_inside_the_recurrence_are_those_of_the_equations(model, how):
    inside = ['x', 'dt', 'B', 'C', 'state', 'y']
    last = model.n_layers - 1
    kw = dict(sites=[f'ssm.{s}' for s in inside], ablation=how, layers=last, progress=False)
    c = sweep_sites(model, PROMPT, 17, 30, **kw)
    clean = oracle.run(model.hf, np.array([PROMPT]))['logits'][0]
    for s in inside:
        out, j = by_hand(model.hf, [PROMPT], s, how)[0], c.sites.index(f'ssm.{s}')
        assert float(c.effects[0, j]) == pytest.approx(diff(clean, 17, 30) - diff(out, 17, 30), abs=3e-3), s
        assert float(c.norms[0, j]) == pytest.approx(np.linalg.norm(out - clean)/np.linalg.norm(clean), rel=2e-3), s
    assert c.layers == (last,) and bare(model)


# -- a circuit set by hand ---------------------------------------------------------------
KEYS, VALUES, HEADS, INNER = 8, 8, 4, 32
CONST, ANSWER = KEYS + VALUES, KEYS + VALUES + 1                                  # places in the residual stream


@pytest.fixture(scope='module')
def mqar():
    """Recall of the value that followed a key, set by hand in a real Mamba-2 of one block.

    Head 0 writes the present value under the key before it and is read by the present key. Decoys: head 1 forgets at
    every write, heads 2 and 3 remember as head 0 does, and none of the three is read.
    """
    hf = Mamba2ForCausalLM(Mamba2Config(
        vocab_size=KEYS + VALUES, hidden_size=32, num_hidden_layers=1, num_heads=HEADS, head_dim=VALUES,
        state_size=KEYS, n_groups=1, expand=1, conv_kernel=4, chunk_size=8, use_bias=False, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=0, eos_token_id=0)).requires_grad_(False)
    b, m = hf.backbone, hf.backbone.layers[0].mixer
    for p in (b.embeddings, hf.lm_head, m.in_proj, m.conv1d, m.out_proj): p.weight.zero_()
    for p in (m.conv1d.bias, m.D): p.zero_()
    key, value = torch.arange(KEYS), KEYS + torch.arange(VALUES)
    b.embeddings.weight[torch.arange(KEYS + VALUES), torch.arange(KEYS + VALUES)] = 1.
    b.embeddings.weight[:, CONST] = 1.
    z, x, B, C, dt = m.in_proj.weight.split([INNER, INNER, KEYS, KEYS, HEADS])   # after the norm a 1 is a 4
    z[:, CONST] = 1.
    x[torch.arange(INNER), KEYS + torch.arange(INNER) % VALUES] = 1.
    B[key, key] = C[key, key] = 1.
    dt[:, value] = 5.5                                                            # write on values, hold on keys
    m.dt_bias.fill_(-20.)
    m.A_log.copy_(torch.tensor([-12., 2., -12., -12.]))
    m.conv1d.weight[:INNER, 0, 3] = m.conv1d.weight[INNER + KEYS:, 0, 3] = 1.                  # x and C: this token
    m.conv1d.weight[INNER:INNER + KEYS, 0, 2] = 1.                                            # B: the one before
    m.out_proj.weight[ANSWER + torch.arange(VALUES), torch.arange(VALUES)] = 1.             # of head 0 alone
    hf.lm_head.weight[value, ANSWER + torch.arange(VALUES)] = 1.
    return HookedModel(hf, name='mqar, compiled')


@pytest.fixture(scope='module')
def recall():
    "Prompts of six pairs and a key, and what followed it; another value to tell it from."
    rng = np.random.default_rng(0)
    keys, values = np.stack([rng.permutation(KEYS)[:6] for _ in range(24)]), rng.integers(0, VALUES, (24, 6)) + KEYS
    ask = rng.integers(0, 6, 24)
    row = np.arange(24)
    prompts = np.concatenate([np.stack([keys, values], -1).reshape(24, 12), keys[row, ask][:, None]], 1)
    answer = values[row, ask]
    return prompts, answer, KEYS + (answer - KEYS + 1) % VALUES


SITES = ('x', 'B', 'C', 'state', 'y')


def auroc(score, truth):
    "Share of (true, false) pairs in the right order, ties one half."
    a, b = score[truth][:, None], score[~truth][None]
    return float((a > b).mean() + .5*(a == b).mean())


# The mean over a prompt of a state that only grows still holds the answer, and so does the mean of its read-out.
IN_CIRCUIT = {'zero': SITES, 'data': SITES, 'mean': ('x', 'B', 'C')}


@pytest.mark.parametrize('how', IN_CIRCUIT)
def test_a_compiled_circuit_is_found_and_random_scores_do_not_find_it(mqar, recall, how):
    prompts, answer, wrong = recall
    rng = np.random.default_rng(1)
    data = np.stack([rng.integers(0, KEYS, 128), rng.integers(KEYS, KEYS + VALUES, 128)], 1).reshape(2, 128)
    row = np.arange(len(prompts))
    clean = oracle.run(mqar.hf, prompts)['logits'][:, -1]
    assert (clean.argmax(-1) == answer).all()
    gap = lambda logits: (logits[row, answer] - logits[row, wrong]).mean()
    names, truth, effect = [], [], []
    for s in SITES:                                                                # every ablation, exactly
        for h in range(HEADS):
            out = by_hand(mqar.hf, prompts, s, data if how == 'data' else how, [h])[:, -1]
            names.append(f'ssm.{s}[{h}]')
            truth.append((out.argmax(-1) == answer).mean() < .9)
            effect.append(gap(clean) - gap(out))
    circuit = {n for n, t in zip(names, truth) if t}
    assert circuit == {f'ssm.{s}[0]' for s in IN_CIRCUIT[how]}
    kw = dict(sites=[f'ssm.{s}' for s in SITES], ablation=how, data=torch.tensor(data), progress=False)
    c = sweep_sites(mqar, prompts, answer, wrong, heads='each', **kw)
    ours = np.array([float(c.effects[0, c.sites.index(n)]) for n in names])
    np.testing.assert_allclose(ours, effect, atol=1e-3)
    if how == 'mean': return                                       # it costs size, not the answer: nothing to rank
    assert {e.site for e in c.top(len(circuit))} == circuit and auroc(ours, np.array(truth)) == 1
    random = [auroc(np.random.default_rng(i).normal(size=20), np.array(truth)) for i in range(200)]
    assert .4 < np.mean(random) < .6 and max(random) < 1


@pytest.mark.parametrize('how', IN_CIRCUIT)
def test_the_answer_needs_no_decoy(mqar, recall, how):
    kw = dict(sites=['ssm.x', 'ssm.state', 'ssm.y'], ablation=how, data=torch.arange(256) % 16, progress=False)
    c = sweep_sites(mqar, *recall, heads=[1, 2, 3], **kw)
    assert c.clean > 1 and (c.effects <= .01*c.clean).all()


# -- the score ---------------------------------------------------------------------------
@pytest.mark.parametrize('n', [1, 3])
def test_the_score_of_a_target_is_the_loss_of_transformers(model, n):
    target, other = [17, 4, 99][:n], [30, 31]
    whole = [PROMPT + target, PROMPT + other]
    labels = [[-100]*len(PROMPT) + target, [-100]*len(PROMPT) + other]
    losses = [float(model.hf(torch.tensor([w]), labels=torch.tensor([v])).loss) for w, v in zip(whole, labels)]
    logs = [-n*losses[0], -2*losses[1]]
    kw = dict(sites='mixer_out', progress=False)
    assert sweep_sites(model, PROMPT, target, metric='log_prob', **kw).clean == pytest.approx(logs[0], abs=2e-3)
    c = sweep_sites(model, PROMPT, target, other, **kw)
    assert c.clean == pytest.approx(logs[0] - logs[1], abs=4e-3)
    assert ('sequence' in c.note) == (n > 1) == ('sequence' in repr(c))
    assert c.tokens == (tuple(map(lambda i: model.tokenizer.decode([i]), target)),)


def test_the_effect_on_a_sequence_is_that_of_the_loss(model):
    target = [17, 4, 99]
    c = sweep_sites(model, PROMPT, target, metric='log_prob', ablation='zero', sites='mixer_out', progress=False)
    whole = torch.tensor([PROMPT + target])
    def score(logits):
        return sum(float(logits[0, len(PROMPT) - 1 + j].log_softmax(-1)[t]) for j, t in enumerate(target))
    for i, block in enumerate(model.blocks):
        gone = score(without(model.hf, block.mixer, torch.zeros_like, whole))
        assert float(c.effects[i, 0]) == pytest.approx(score(model.hf(whole).logits) - gone, abs=3e-3)


def test_without_a_wrong_answer_the_best_other_token_stands_against(model):
    logits = model.hf(torch.tensor([PROMPT])).logits[0, -1]
    best, second = logits.topk(2).indices.tolist()
    kw = dict(sites='mixer_out', progress=False)
    for target, other in ((best, second), (second, best), (17, best)):
        c = sweep_sites(model, PROMPT, target, **kw)
        assert c.wrong == ((model.tokenizer.decode([other]),),)
        assert c.clean == pytest.approx(float(logits[target] - logits[other]), abs=1e-3)


def test_text_is_a_continuation_with_a_blank_between_words():
    mock = load_model('mock://mamba2-tiny')
    told = lambda p, t: bytes(model_text(mock, cases(mock, p, t)[0].target), 'utf8')
    assert told('Paris is the capital of', 'France') == b' France' == told('Paris is the capital of', ' France')
    assert told('Paris is the capital of ', 'France') == b'France' and told('(', 'x') == b' x'
    assert told('(x', ')') == b')'
    ids = mock.tokens('The')[0][0].tolist()
    assert cases(mock, ids, 'end')[0].text == 'The' and told(ids, 'end') == b' end'
    assert cases(mock, ['a', 'b'], ['c', [1, 2]])[1].target == (1, 2)
    assert cases(mock, ['a', 'b'], 3, [4, None])[1].wrong == ()


def model_text(model, ids): return model.tokenizer.decode(list(ids))


# -- batches, prompts of different lengths, data ----------------------------------------
def test_several_prompts_are_the_mean_of_each_alone(model):
    prompts, targets, wrongs = [PROMPT, PROMPT[:3], [1, 2, 3, 4, 5]], [17, [4, 99], 8], [30, [31, 2, 6], None]
    for ablation in ('mean', 'zero'):
        kw = dict(ablation=ablation, progress=False)
        both = sweep_sites(model, prompts, targets, wrongs, **kw)
        alone = [sweep_sites(model, *row, **kw) for row in zip(prompts, targets, wrongs)]
        assert both.clean == pytest.approx(np.mean([c.clean for c in alone]), abs=2e-3)
        for what in ('effects', 'norms'):
            want = torch.stack([getattr(c, what) for c in alone]).mean(0)
            assert torch.allclose(getattr(both, what), want, atol=5e-3), (ablation, what)


def test_cells_in_one_batch_are_those_in_many(model, monkeypatch):
    import circuitbench.sweep as module
    want = sweep_sites(model, PROMPT, 17, 30, progress=False)
    monkeypatch.setattr(module, '_LOGITS', 1)
    monkeypatch.setattr(module, '_MEANS', 1)
    got = sweep_sites(model, PROMPT, 17, 30, progress=False)
    assert torch.allclose(got.effects, want.effects, atol=2e-3) and torch.allclose(got.norms, want.norms, atol=1e-3)


def test_data_ablation_puts_the_mean_of_the_texts(model):
    data = torch.arange(2*128) % 250
    c = sweep_sites(model, PROMPT, 17, 30, sites='mixer_out', ablation='data', data=data, progress=False)
    rows = data.view(2, 128)
    for i, block in enumerate(model.blocks):
        seen = []
        handle = block.mixer.register_forward_hook(lambda m, a, out, seen=seen: seen.append(out.mean((0, 1))))
        model.hf(rows)
        handle.remove()
        clean = model.hf(torch.tensor([PROMPT])).logits[0]
        out = without(model.hf, block.mixer, lambda o, s=seen: s[0].expand_as(o), [PROMPT])[0]
        assert float(c.effects[i, 0]) == pytest.approx(diff(clean, 17, 30) - diff(out, 17, 30), abs=5e-3)
    shipped = sweep_sites(model, PROMPT, 17, 30, sites='mixer_out', ablation='data', progress=False)
    assert shipped.effects.isfinite().all() and not torch.allclose(shipped.effects, c.effects)


def test_means_leave_padding_out_and_keep_no_states(model):
    ids, weight = torch.tensor([PROMPT, [5, 9, 0, 0, 0, 0, 0]]), torch.tensor([[1.]*7, [1.]*2 + [0.]*5])
    m = running_means(model, ['blocks.0.ssm.state', 'blocks.1.mixer_out'], ids, weight)
    for name, v in m.items():
        for r, n in ((0, 7), (1, 2)):
            held = model.run_with_cache(ids[r:r + 1, :n], name)[1][name]
            assert torch.allclose(v[r], held.mean(1), atol=1e-4)


def test_a_function_of_the_output_is_a_metric(model):
    def sure(out): return out.last.log_softmax(-1).amax(-1)
    c = sweep_sites(model, [PROMPT, PROMPT[:2]], metric=sure, sites='mixer_out', ablation='zero', progress=False)
    best = lambda logits: float(logits[0, -1].log_softmax(-1).max())
    clean = [best(model.hf(torch.tensor([p])).logits) for p in (PROMPT, PROMPT[:2])]
    assert c.metric == 'sure' and c.clean == pytest.approx(np.mean(clean), abs=1e-3) and c.tokens == ((), ())
    out = [best(without(model.hf, model.blocks[1].mixer, torch.zeros_like, [p])) for p in (PROMPT, PROMPT[:2])]
    assert float(c.effects[1, 0]) == pytest.approx(np.mean(clean) - np.mean(out), abs=2e-3)
    top = sweep_sites(model, PROMPT, metric=lambda out: out.logits.max(), sites='mixer_out', progress=False)
    assert top.metric == '<lambda>'
    with pytest.raises(ValueError, match='one a prompt'):
        sweep_sites(model, PROMPT, metric=lambda out: out.logits[0, -1], progress=False)


def test_the_call_of_the_quick_start(model):
    c = sweep_sites(model, prompt='Paris is the capital of', target='France', progress=False)
    assert model.hook_point in c.sites and {'ssm.conv', 'ssm.state', 'ssm.y', 'mixer_out'} <= set(c.sites)
    assert c.effects.isfinite().all()
    assert [n for n, _ in c.top_layers(n=3)] == sorted(range(2), key=lambda i: -float(c.effects[i].abs().max()))
    assert c.prompts == ('Paris is the capital of',) and ''.join(c.tokens[0]) == ' France' and bare(model)


def test_columns_are_what_is_asked_for(model):
    names = lambda **kw: [c.site for c in cells(model, **kw)]
    assert names(sites=['H1', 'hidden_state_h'], layers=[1]) == ['ssm.state', 'ssm.out_proj_in']
    assert names(sites='blocks.1.ssm.*', heads=[0]).count('ssm.B[0]') == 1
    assert len(names(sites='ssm.y', heads='each')) == 2*model.sizes['head']
    assert {c.layer for c in cells(model, ['blocks.0.ssm.y', 'blocks.1.mixer_out'])} == {0, 1}
    c = sweep_sites(model, PROMPT, 17, sites=['blocks.0.ssm.y', 'blocks.1.mixer_out'], progress=False)
    assert c.effects.isnan().tolist() == [[False, True], [True, False]] and '-' in repr(c) and len(c.top(9)) == 2


# -- what cannot be ----------------------------------------------------------------------
@pytest.mark.parametrize('kw, says', [
    (dict(target=''), 'empty target'), (dict(target=[]), 'empty target'), (dict(prompt=''), 'empty prompt'),
    (dict(prompt=[]), 'empty prompt'), (dict(target=None), 'no target'), (dict(target=257), '0 to 256'),
    (dict(wrong=17), 'which is the target'), (dict(ablation='knock'), "'data'"), (dict(metric='loss'), 'log_prob'),
    (dict(layers=2), '0 to 1'), (dict(layers=[0, -1]), '0 to 1'), (dict(heads=[999]), "heads='each'"),
    (dict(heads='all'), "heads='each'"), (dict(sites='embed'), 'in no layer'), (dict(sites=[]), 'expected some'),
    (dict(wrong=''), 'empty wrong'),
    (dict(prompt=[[1, 2], [3, 4]], target=[1, 2, 3]), 'one each'), (dict(ablation='data', data=''), 'at least 2')])
def test_bad_input_is_said_in_one_or_two_lines(model, kw, says):
    kw = dict(prompt=PROMPT, target=17, progress=False) | kw
    with pytest.raises(ValueError, match=says) as e: sweep_sites(model, **kw)
    assert str(e.value).count('\n') < 2 and len(str(e.value)) < 240 and bare(model)


def test_a_site_that_is_not_there_and_text_without_a_tokenizer(model, mqar):
    with pytest.raises(SiteError, match='nearest'): sweep_sites(model, PROMPT, 17, sites='attn.q', progress=False)
    with pytest.raises(ValueError, match='no tokenizer'): sweep_sites(mqar, [1, 2], 'x', progress=False)
    assert mqar.name in repr(sweep_sites(mqar, [1, 9, 1], 9, progress=False))


def test_no_hook_stays_after_an_exception(model):
    def broken(out): raise RuntimeError('a metric that fails')
    with pytest.raises(RuntimeError): sweep_sites(model, PROMPT, metric=broken, progress=False)
    wrong, some = {f'blocks.{i}.ssm.y': torch.zeros(1) for i in range(2)}, cells(model, 'ssm.y', heads=[0])
    with pytest.raises(IndexError): ablated(model, some, torch.tensor([PROMPT]), means=wrong)
    assert bare(model)
    sweep_sites(model, PROMPT, 17, sites='mixer_out', progress=False)


# -- the result --------------------------------------------------------------------------
@pytest.fixture(scope='module')
def found():
    mock = load_model('mock://mamba2-tiny')
    return sweep_sites(mock, ['A cat', 'The "dog"\n & <b>'], ['sat', 'ran'], progress=False)


def test_json_round_trip_and_schema(found, tmp_path):
    path = found.to_json(tmp_path/'c.json')
    back, body = Sweep.from_json(path), json.loads(path.read_text())
    assert torch.equal(back.effects, found.effects) and torch.equal(back.norms, found.norms)
    assert repr(back) == repr(found)
    for k in ('model', 'prompts', 'tokens', 'wrong', 'layers', 'sites', 'clean', 'note', 'hook_point'):
        assert getattr(back, k) == getattr(found, k)
    assert body['format'] == 'circuitbench.sweep' and body['version'] == 1
    assert len(body['effects']) == len(body['layers'])
    assert [p.name for p in tmp_path.iterdir()] == ['c.json']


def test_json_keeps_what_is_not_a_number_and_refuses_other_files(found, tmp_path):
    effects, norms = torch.tensor([[1., math.nan]]), torch.tensor([[.1, math.nan]])
    sites = 'ssm.y', 'mlp_out'
    holes = Sweep('m', ('p',), (('t',),), ((),), 'f', 'zero', (0,), sites, effects, norms, math.nan)
    back = Sweep.from_json(holes.to_json(tmp_path/'h.json'))
    assert torch.equal(back.effects.isnan(), holes.effects.isnan()) and math.isnan(back.clean)
    assert 'NaN' not in (tmp_path/'h.json').read_text()
    whole = json.loads(found.to_json(tmp_path/'w.json').read_text())
    less = {k: v for k, v in whole.items() if k != 'sites'}
    damaged = [[], {'format': 'x'}, less, whole | {'effects': [[1.]]}, whole | {'version': 2}]
    for text in ('', *map(json.dumps, damaged)):
        (tmp_path/'d.json').write_text(text)
        with pytest.raises(ValueError, match='expected a file that Sweep.to_json wrote'):
            Sweep.from_json(tmp_path/'d.json')
    with pytest.raises(ValueError, match='cannot be read'): Sweep.from_json(tmp_path/'nothing')


def test_a_file_is_written_whole_or_not_at_all(found, tmp_path, monkeypatch):
    path = found.to_json(tmp_path/'c.json')
    before = path.read_text()
    def full(*args): raise OSError('no space')
    monkeypatch.setattr('os.replace', full)
    with pytest.raises(OSError): found.to_json(path)
    assert path.read_text() == before and [p.name for p in tmp_path.iterdir()] == ['c.json']


def test_ranks(found):
    every = found.top(99)
    assert len(every) == found.effects.numel()
    assert [abs(e.effect) for e in every] == sorted((abs(e.effect) for e in every), reverse=True)
    assert found.top(1, 'norm')[0].norm == float(found.norms.max())
    y = found.effects[:, found.sites.index('ssm.y')]
    assert abs(found.top_layers(1, site='ssm.y')[0][1]) == float(y.abs().max())
    for bad in (lambda: found.top(by='size'), lambda: found.top_layers(site='ssm.z'),
                lambda: sweep_view(found, 'size'), lambda: sweep_view(found, site='x')):
        with pytest.raises(ValueError, match='expected one of'): bad()


def test_view_figure_and_page(found, tmp_path):
    html = sweep_view(found)
    assert STRONGEST in html and 'ssm.state' in html and '<b> &' not in html and 'Values as a table' in html
    assert html != sweep_view(found, 'norm') != sweep_view(found, 'norm', 'ssm.y') and html == sweep_view(found)
    found.plot().savefig(tmp_path/'c.png')
    found.plot('norm').savefig(tmp_path/'c.svg')
    page = found.to_html(tmp_path/'c.html').read_text()
    assert page.count('<style>') == 2 and len(page) < 100_000 and 'http' not in page.replace('http-equiv', '')
    assert len({p.name for p in tmp_path.iterdir()}) == 3


def test_inspector_controls(found):
    look = found.inspect(value='norm', cells=3)
    assert isinstance(look, SweepInspector) and look.values == {'value': 'norm', 'site': STRONGEST, 'cells': 3}
    assert look.html == sweep_view(found, 'norm', cells=3) != look.set(site='ssm.B').html
    with pytest.raises(ValueError, match='expected one of'): look.set(site='ssm.z')


def test_a_sheet_lays_out_prompts_and_answers(model):
    s = sheet(cases(model, [[1, 2, 3], [4, 5]], [[6, 7], 8], [[9, 10, 11], 12]))
    assert s.ids.tolist() == [[1, 2, 3, 6, 0], [1, 2, 3, 9, 10], [4, 5, 0, 0, 0]] and s.first.tolist() == [0, 2]
    assert s.weight.sum(1).tolist() == [3, 3, 2] and s.mask.sum(1).tolist() == [4, 5, 2] and s.terms.shape == (6, 7)
