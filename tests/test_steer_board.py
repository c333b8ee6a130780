"""The board of directions: what it writes against generate and float64 numpy, its code, its messages, what goes wrong."""
import asyncio
import json

import numpy as np
import pytest
import torch

from circuitbench.direction import Direction, given_direction, state_difference
from circuitbench.draw import esc, num
from circuitbench.edit import Edit
from circuitbench.interventions import plan, push, write
from circuitbench.load import load_model
from circuitbench.steer_board import SteerInspector
from circuitbench.steer_rows import SteerRow, placed, steer_code

PROMPT = list(range(5, 17))
FAMILIES = ['mamba1', 'mamba2', 'rwkv7', 'hymba', 'jamba', 'qwen3-next']


def vector(model, site, layer, seed=0, heads=None):
    g = torch.Generator().manual_seed(seed)
    shape = model.site_shape(f'blocks.{layer}.{site}', 1, 1)[2:]
    shape = shape if heads is None else (len(heads), *shape[1:])
    return given_direction(model, torch.randn(shape, generator=g), site, layer, heads)


@pytest.fixture(scope='module')
def model(): return load_model('mock://mamba2-tiny')


@pytest.fixture(scope='module')
def directions(model):
    return {'a push': vector(model, 'resid_post', 0), 'a state': vector(model, 'ssm.state', 1, 1, [2])}


@pytest.fixture
def board(model, directions):
    made = SteerInspector(model, PROMPT, directions, new=8)
    made.sent = []
    made.send = lambda content, buffers=None: made.sent.append(json.loads(json.dumps(content, allow_nan=False)))
    return made


def own(out): return out.tokens[0, out.prompt:].tolist()


def told(board, **content): board._handle_custom_msg(json.loads(json.dumps(content)), [])


def settings(board, **changes):
    "What the browser would send: the rows as they are, some changed by number."
    rows = json.loads(json.dumps(board.settings))['rows']
    for k, row in changes.items(): rows[int(k[1:])] |= row
    return dict(do='set', rows=rows, new=board.settings['new'])


def kl_and_ratio(model, board):
    "Of each token of the steered text, by whole runs in float64 numpy, and the ratio of perplexities."
    text = board.result['steered_ids']
    ids = torch.tensor([[*PROMPT, *text]])
    edits = board.plan.edits(model, ids, len(PROMPT))
    p, q = (model.run(ids, e).logits[0, len(PROMPT) - 1:-1].double().numpy() for e in ((), edits))
    p, q = (v - np.log(np.exp(v - v.max(-1, keepdims=True)).sum(-1, keepdims=True)) - v.max(-1, keepdims=True) for v in (p, q))
    own = lambda v: -v[np.arange(len(text)), text].mean()
    return (np.exp(p)*(p - q)).sum(-1), np.exp(own(p))/np.exp(own(q))


@pytest.mark.parametrize('family', FAMILIES)
def test_the_texts_are_those_of_generate(family):
    model = load_model(f'mock://{family}-tiny')
    layer = model.recurrent()[-1]
    ds = {'a': vector(model, 'resid_post', 0), 'b': vector(model, 'ssm.state', layer, 1)}
    board = SteerInspector(model, PROMPT, ds, {'a': dict(strength=1.5), 'b': dict(strength=2., at=4)}, new=10)
    assert board.result['clean_ids'] == own(model.generate(PROMPT, 10))
    with board.plan.on(model): assert board.result['steered_ids'] == own(model.generate(PROMPT, 10))
    assert board.result['steered'] == model.strings(torch.tensor(board.result['steered_ids'])) and len(board.plan) == 2
    assert model.standing == [] and board.result['mean_kl'] > 1e-3
    kl, ratio = kl_and_ratio(model, board)
    assert np.allclose(board.result['kl'], kl, rtol=2e-3, atol=1e-5)
    assert np.isclose(board.result['mean_kl'], kl.mean(), rtol=2e-3) and np.isclose(board.result['ratio'], ratio, rtol=2e-3)


SETTINGS = [dict(repetition_penalty=1.4), dict(no_repeat_ngram_size=1), dict(suppress_tokens=[*range(0, 257, 2)]), dict(bad_words_ids=[[7], [9, 9]]),
            dict(forced_eos_token_id=33), dict(sequence_bias=[[[33], 4.]]), dict(repetition_penalty=1.2, min_new_tokens=4), dict(max_length=3)]


@pytest.mark.parametrize('family', ['mamba2', 'rwkv7', 'jamba', 'hymba'])
@pytest.mark.parametrize('wanted', SETTINGS, ids=lambda s: ', '.join(s))
def test_the_texts_follow_the_generation_config(family, wanted):
    model = load_model(f'mock://{family}-tiny')
    plain = own(model.generate(PROMPT, 12))
    for k, v in wanted.items(): setattr(model.hf.generation_config, k, v)
    model.hf.generation_config.eos_token_id = ends = [plain[6], 250]
    board = SteerInspector(model, PROMPT, {'a': vector(model, 'resid_post', 0)}, {'a': dict(strength=2.)}, new=12)
    clean = own(model.generate(PROMPT, 12))
    assert board.result['clean_ids'] == clean and (clean != plain or len(clean) < 12)
    assert not {*clean[:-1]} & {*ends}
    with board.plan.on(model): assert board.result['steered_ids'] == own(model.generate(PROMPT, 12))
    kl, ratio = kl_and_ratio(model, board)                                 # of what the model says, before the settings
    assert np.allclose(board.result['kl'], kl, rtol=2e-3, atol=1e-5) and np.isclose(board.result['ratio'], ratio, rtol=2e-3)
    assert board.set(new=5).result['clean_ids'] == own(model.generate(PROMPT, 5))
    with board.plan.on(model): assert board.result['steered_ids'] == own(model.generate(PROMPT, 5))


def test_a_penalty_on_repeats_is_that_of_the_equation(model):
    "By hand: logits of tokens that were there, divided where positive and multiplied where negative."
    board = SteerInspector(model, PROMPT, {'a': vector(model, 'resid_post', 0)}, {'a': dict(strength=1.)}, new=10, repetition_penalty=1.5)
    for key, edited in ('clean_ids', False), ('steered_ids', True):
        ids = torch.tensor([PROMPT])
        for _ in range(10):
            logits = model.run(ids, board.plan.edits(model, ids, len(PROMPT)) if edited else ()).logits[0, -1]
            seen = ids[0].unique()
            logits[seen] = torch.where(logits[seen] > 0, logits[seen]/1.5, logits[seen]*1.5)
            ids = torch.cat([ids, logits.argmax()[None, None]], 1)
        assert ids[0, len(PROMPT):].tolist() == board.result[key]
    made = dict(model=model, directions=board.directions)
    exec(board.code, made)
    assert own(made['out']) == board.result['steered_ids'] and 'repetition_penalty=1.5' in board.code


OPTIONS = [dict(do_sample=True, seed=3), dict(do_sample=True, temperature=1.7, top_k=20, seed=5), dict(stop_strings=['e', 'a']), dict(bad_words_ids=[[33]])]


@pytest.mark.parametrize('options', OPTIONS, ids=lambda s: ', '.join(s))
def test_the_texts_follow_the_options(options):
    model = load_model('tiny://mamba2')
    prompt = ' Question: what is the capital of France?'
    if 'stop_strings' in options: options = options | dict(tokenizer=model.tokenizer)
    ds = {'a': vector(model, 'resid_post', 1)}
    state = torch.random.get_rng_state()
    board = SteerInspector(model, prompt, ds, {'a': dict(strength=4.)}, new=14, **options)
    assert torch.equal(state, torch.random.get_rng_state())
    assert board.result['clean_ids'] == own(model.generate(prompt, 14, **options))
    with board.plan.on(model): want = own(model.generate(prompt, 14, **options))
    assert board.result['steered_ids'] == want and ('stop_strings' in options) == (len(want) < 14)
    assert board.set('a', strength=1.).set('a', strength=4.).result['steered_ids'] == want
    made = dict(model=model, directions=ds, tokenizer=model.tokenizer)
    exec(board.code, made)
    assert own(made['out']) == want


def test_draws_without_a_seed_are_shared_by_both_texts(model, directions):
    board = SteerInspector(model, PROMPT, directions, new=10, do_sample=True)
    assert board.result['clean_ids'] == board.result['steered_ids'] and f'seed={board.seed}' in board.code


@pytest.mark.parametrize('options', [dict(num_beams=3), dict(num_return_sequences=2, do_sample=True)])
def test_what_is_not_written_token_by_token_is_refused(model, directions, options):
    with pytest.raises(ValueError, match='num_beams=1'): SteerInspector(model, PROMPT, directions, new=4, **options)


@pytest.mark.parametrize('at', [[], [3, 5], [11, 14, 15]])
def test_every_written_token_can_be_pushed_alone(board, model, directions, at):
    board.set('a push', strength=2., kind='chosen', at=at, later=True)
    d = directions['a push']
    def _add(x, where):
        share = torch.tensor([float(p >= len(PROMPT) or p in at) for p in where.pos])
        return x + share[:, None]*2*d.vector
    assert board.result['steered_ids'] == own(model.generate(PROMPT, 8, edit=Edit('blocks.0.resid_post', _add)))
    assert 'every token that is written' in board.html and board.result['steered_ids'] != board.result['clean_ids']
    board.set('a push', later=False)
    with board.plan.on(model): assert board.result['steered_ids'] == own(model.generate(PROMPT, 8))


def test_without_a_step_both_texts_are_one(board):
    assert len(board.plan) == 0 and board.result['clean'] == board.result['steered'] and board.result['kl'] == [0.]*8
    assert board.result['ratio'] == 1 and board.result['marks'] == [[], []]
    board.set('a push', strength=3.).set('a push', on=False)
    assert len(board.plan) == 0 and board.result['kl'] == [0.]*8


def same(a, b):
    "Are two plans of the same steps?"
    one = lambda s: (s.kind, s.site, s.value, s.heads, s.at, s.rows, s.when, s.schedule)
    return [*map(one, a.steps)] == [*map(one, b.steps)] and all(torch.equal(s.direction.vector, t.direction.vector) for s, t in zip(a.steps, b.steps))


@pytest.mark.parametrize('rows', [
    [], [('a', dict(strength=.3))], [('a', dict(strength=-2., kind='chosen', at=[1, 3]))], [('a', dict(kind='ablate', layer=1))],
    [('a', dict(strength=1., layer=1)), ('s', dict(strength=1.))], [('a', dict(strength=1., kind='chosen', at=[13, 2]))], [('s', dict(strength=2., head=0, at=-2, layer=0))],
    [('all', dict(strength=1.5, head=3)), ('s', dict(kind='push', strength=.1))], [('all', dict(strength=1., kind='chosen')), ('two', dict(strength=1., head=3))]])
def test_the_code_makes_the_plan_and_the_text(model, rows):
    ds = {'a': vector(model, 'resid_post', 0), 's': vector(model, 'ssm.state', 1, 1, [2]), 'all': vector(model, 'ssm.state', 0, 2), 'two': vector(model, 'ssm.state', 1, 3, [1, 3])}
    board = SteerInspector(model, PROMPT, ds, dict(rows), new=6)
    made = dict(model=model, directions=ds)
    exec(board.code, made)
    assert same(made['steps'], board.plan) and len(board.plan) == len(rows) and made['prompt'] == PROMPT
    assert model.strings(made['out'].tokens[0, len(PROMPT):]) == board.result['steered']


def test_the_code_of_a_shipped_model_writes_the_text(capsys):
    model = load_model('tiny://mamba2')
    egypt, france = (f' Question: what is the capital of {land}?' for land in ('Egypt', 'France'))
    ds = {"Egypt's": state_difference(model, egypt, france, 2, 3)}
    board = SteerInspector(model, france, ds, {"Egypt's": dict(strength=1.)}, new=6, score=' Answer')
    assert ' Cairo' in board.result['steered'] and ' Paris' in board.result['clean']
    made = dict(model=model, directions=ds)
    exec(board.code, made)
    assert capsys.readouterr().out.rstrip('\n') == ''.join(board.result['steered']).rstrip('\n')
    old = plan(write(ds["Egypt's"], ds["Egypt's"].norm, at=8))
    assert same(old, made['steps'])
    board.dose("Egypt's", [0., 1.])
    want = [float(model.run(france, old.edits(model, france) if s else ()).logits[0, -1].double().softmax(-1)[model.tokens(' Answer')[0][0, 0]]) for s in (0, 1)]
    shown = board.charts['dose']['html']
    assert "probability of &#x27; Answer&#x27;" in shown and np.allclose(board.charts['dose']['scores'], want, rtol=1e-4)


def test_a_placed_direction_is_the_part_that_is_named(model):
    every = vector(model, 'ssm.state', 0, 2)
    part = placed(every, SteerRow('x', head=3, layer=1))
    assert torch.equal(part.vector, every.vector[3:4]) and part.heads == (3,) and part.site == 'blocks.1.ssm.state'
    one = placed(vector(model, 'ssm.state', 1, 1, [2]), SteerRow('x', head=0))
    assert one.heads == (0,) and torch.equal(one.vector, vector(model, 'ssm.state', 1, 1, [2]).vector)
    assert 'vector=' in steer_code([SteerRow('x', strength=1., head=3)], {'x': every}, 'a', 1)


def test_a_message_changes_the_texts_and_each_token_is_sent(board, model, directions):
    told(board, **settings(board, r0=dict(strength=2., kind='chosen', at=[3, 5])))
    with plan(push(directions['a push'], 2*directions['a push'].norm, at=(3, 5))).on(model): out = model.generate(PROMPT, 8)
    want = model.strings(out.tokens[0, out.prompt:])
    assert board.result['steered'] == want and board.error == '' and board.busy == ''
    live = [m['live']['steered'] for m in board.sent]
    assert live == [want[:k] for k in range(1, 9)]
    assert [len(m['live']['kl']) for m in board.sent] == [*range(1, 9)] and board.sent[-1]['live']['kl'] == board.result['kl']
    assert board.settings['rows'][0]['at'] == [3, 5] and board.rows[0].at == (3, 5)


def test_each_new_token_is_one_run_of_each_model(board, model, monkeypatch):
    runs, plain = [], model.run
    monkeypatch.setattr(model, 'run', lambda *args, **kwargs: runs.append(args[0].shape[-1]) or plain(*args, **kwargs))
    board.set('a push', strength=1.)                                       # the clean text is known
    assert runs == [12] + [1]*2*7
    runs.clear()
    board.set(new=10)
    assert runs.count(12) == 1 and runs.count(1) == 2*9 + 2


def during(board, *steps):
    "Sends messages on a running loop: each when a condition of the board holds; waits for the end."
    async def _until(holds):
        while not holds(): await asyncio.sleep(0)
    async def _all():
        for holds, content in steps:
            await _until(holds)
            told(board, **content)
        await _until(lambda: not board.busy)
    asyncio.run(_all())


def test_a_changed_setting_ends_what_is_written(board, model):
    first, second = settings(board, r0=dict(strength=3.)), settings(board, r1=dict(strength=1., at=[4]))
    during(board, (lambda: True, first), (lambda: len(board.sent) == 3, second))
    lives = [m['live'] for m in board.sent]
    assert [v['rows'][0]['strength'] for v in lives] == [3.]*3 + [0.]*8 and len(lives[3]['steered']) == 1
    with board.plan.on(model): out = model.generate(PROMPT, 8)
    assert board.result['steered'] == model.strings(out.tokens[0, out.prompt:]) and len(board.plan) == 1
    assert model.standing == [] and board.error == ''


def test_between_two_tokens_the_model_is_clean(board, model):
    clean, seen = model.run(PROMPT).logits, []
    def _look():
        if len(board.sent) == 4: seen.append(model.standing == [] and torch.equal(model.run(PROMPT).logits, clean))
        return len(board.sent) == 4
    during(board, (lambda: True, settings(board, r0=dict(strength=3.))), (_look, dict(do='stop')))
    assert seen == [True] and len(board.sent) == 4 and board.busy == ''
    assert board.result['steered'] == board.result['clean']                # the last whole text stays
    during(board, (lambda: True, settings(board)))
    assert board.result['kl'] != [0.]*8 and len(board.sent) == 12


BAD = [(dict(do='jump'), 'expected set, dose, persist or stop'), (dict(do='dose', name='none'), "expected one of ['a push', 'a state']"),
       (dict(do='set', rows=[], new=8), 'got 0 rows, expected 2'), (dict(do='persist', name='a push'), 'expected a direction of a state'), ({}, 'got None'), (dict(do='set'), 'KeyError')]


@pytest.mark.parametrize('content, said', BAD)
def test_a_wrong_message_is_answered_in_a_sentence(board, content, said):
    before = board.set('a push', strength=1.).result
    told(board, **content)
    assert said in board.error and board.result == before and board.busy == ''
    told(board, **settings(board))
    assert board.error == ''


@pytest.mark.parametrize('row, said', [(dict(strength=float('nan')), 'finite'), (dict(strength='2'), 'finite'), (dict(kind='write'), 'expected one of'), (dict(layer=7), 'expected one of'),
                                       (dict(head=0), 'none'), (dict(at=999), '-12 to 511'), (dict(later=1), 'True or False'), (dict(on=1), 'True or False'), (dict(colour='red'), 'colour=')])
def test_settings_that_cannot_be_change_nothing(board, row, said):
    before = board.set('a push', strength=1.).settings
    with pytest.raises(ValueError, match=said): board.set('a push', **row)
    assert board.settings == before and len(board.plan) == 1


def test_what_cannot_be_made(model, directions):
    for args, kind in ((([PROMPT, PROMPT], directions), ValueError), ((PROMPT, {}), ValueError), ((PROMPT, {'a': 3}), TypeError), ((PROMPT, directions, {'b': {}}), ValueError)):
        with pytest.raises(kind, match='expected'): SteerInspector(model, *args)
    other = Direction(directions['a push'].vector, 'blocks.0.resid_post', 'another', 'x')
    with pytest.raises(ValueError, match='expected one of'): SteerInspector(model, PROMPT, other)
    for reach in (0, float('inf'), {'a push': -1}, {'none': 1}, {'a push': '3'}):
        with pytest.raises(ValueError, match='more than 0|finite|one of'): SteerInspector(model, PROMPT, directions, reach=reach)
    board = SteerInspector(model, PROMPT, [*directions.values(), directions['a push']], new=2)
    assert [*board.directions] == ['a vector', 'a vector (2)', 'a vector (3)']
    for wrong in (lambda: board.set(strength=1.), lambda: board.set('a vector'), lambda: board.set(new=0), lambda: board.set('none', on=False)):
        with pytest.raises(ValueError, match='expected'): wrong()


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize('loop', [False, True])
def test_a_run_that_fails_leaves_the_last_texts_and_a_clean_model(board, model, monkeypatch, error, loop):
    before, clean, plain, runs = board.set('a push', strength=1.).result, model.run(PROMPT).logits, model.run, []
    def _run(*args, **kwargs):
        if len(runs) == 5: raise error('no more')
        runs.append(args)
        return plain(*args, **kwargs)
    monkeypatch.setattr(model, 'run', _run)
    content = settings(board, r0=dict(strength=4.))
    if loop: during(board, (lambda: True, content))
    else:
        with pytest.raises(error, match='no more'): board.set('a push', strength=4.)
    assert board.error == f'{error.__name__}: no more' and board.busy == '' and board.result == before
    monkeypatch.undo()
    assert model.standing == [] and torch.equal(model.run(PROMPT).logits, clean)
    assert board.settings['rows'][0]['strength'] == 4. and 'no more' not in board.html
    assert board.set(new=8).error == '' and board.result['rows'][0]['strength'] == 4.


def test_strengths_beyond_all_numbers_are_said(board):
    before = board.result
    told(board, **settings(board, r0=dict(strength=1e38)))
    assert 'not finite' in board.error and board.result == before


def test_dose_is_kl_along_the_clean_text(board, model, directions):
    board.set('a state', strength=1., at=4)
    board.dose('a push', [-2., 0., 1.5])
    ids = torch.tensor([[*PROMPT, *board.result['clean_ids']]])[:, :-1]
    clean = model.run(ids).logits[0, 11:].double().log_softmax(-1).numpy()
    got = iter(board.charts['dose']['kl'])
    for s in (-2., 0., 1.5):
        steps = plan(*[push(directions['a push'], s*directions['a push'].norm)]*bool(s), *board.plan.steps)
        other = model.run(ids, steps.edits(model, ids, 12)).logits[0, 11:].double().log_softmax(-1).numpy()
        assert np.isclose(next(got), (np.exp(clean)*(clean - other)).sum(-1).mean(), rtol=1e-4, atol=1e-9)
    assert not board.charts['dose']['stale'] and board.set('a state', on=False).charts['dose']['stale']
    with pytest.raises(ValueError, match='no strength'): board.set('a push', kind='ablate').dose('a push')


def test_persistence_is_the_product_of_the_decays(board, model, directions):
    board.set('a state', strength=1., at=4).persist('a state')
    ids = torch.tensor([[*PROMPT, *board.result['clean_ids']]])
    _, cache = model.run_with_cache(ids, 'blocks.1.ssm.decay')
    share = np.cumprod(np.r_[1., cache['blocks.1.ssm.decay'][0, 5:, 2].double().flatten().numpy()])
    assert np.allclose(board.charts['persist']['shares'], share, rtol=1e-5) and len(share) == 16
    assert f'{share[-1]:.3g}' in board.charts['persist']['html']


def test_the_picture_and_the_file_say_the_last_state(board, tmp_path):
    board.set('a push', strength=1.5, kind='chosen', at=[2]).dose('a push', [0., 1.])
    for text in (board.html, board.to_html(tmp_path/'a.html').read_text()):
        assert f'push at chosen tokens, 1.5 × length, at 2 {esc(repr(board.about["tokens"][2]))}' in text and 'blocks.0.resid_post' in text
        assert 'KL along the clean text' in text and f'KL {num(board.result["kl"][0])} nats' in text
    assert 'SteerInspector' in repr(board) and 'text/html' in board._repr_mimebundle_()[0]
