"""What a recurrence's inputs say without the model: y = M x + D x, the product of the transitions, states; every family."""
import pytest
import torch

from circuitbench.edit import add
from circuitbench.load import load_model
from circuitbench.record import Mamba
from circuitbench.site import families, short

FAMILIES = [f for f in sorted(families()) if f not in ('llama', 'lfm2', 'titans')]  # without a recurrence, or with one that is not linear


@pytest.fixture(scope='module', params=FAMILIES)
def run(request):
    torch.set_num_threads(1)
    model = load_model(f'mock://{request.param}-tiny')
    ids = torch.randint(1, 200, (2, 70), generator=torch.Generator().manual_seed(2))
    _, cache = model.run_with_cache(ids, ['ssm.y', 'ssm.x', 'ssm.state'])
    return model, ids, model.recurrences(ids), cache


def near(a, b, tol=1e-5): return float((a - b).abs().max()) <= tol*float(b.abs().max())


def test_every_block_with_a_state_has_a_record(run):
    model, _, found, cache = run
    assert [f'blocks.{i}.ssm.state' for i in found] == [n for n in cache if short(n) == 'ssm.state']
    assert all(r.length == 70 + model.meta and r.heads == model.heads(f'blocks.{i}.ssm.state') for i, r in found.items())


def test_read_outs_are_hidden_attention_times_what_is_written(run):
    model, _, found, cache = run
    for i, r in found.items():
        x, M = (r.x if isinstance(r, Mamba) else r.v), r.attention()
        y = (M @ x.transpose(1, 2)).transpose(1, 2)
        if isinstance(r, Mamba): y = y + r.D[:, None]*x
        assert near(y[:, model.meta:], cache[f'blocks.{i}.ssm.y'])
        assert (M.triu(1) == 0).all()


@pytest.mark.parametrize('rows, heads', [(7, 0), (slice(30, 41), [1]), ([3, 69, 20], [1, 0])])
def test_rows_and_heads_on_demand_are_those_of_the_whole(run, rows, heads):
    _, _, found, _ = run
    r = found[min(found)]
    whole = r.attention()[:, [heads] if isinstance(heads, int) else heads]
    assert near(r[heads].attention(rows), whole[:, :, [rows] if isinstance(rows, int) else rows], 2e-5)


def test_states_are_those_of_the_run(run):
    model, _, found, cache = run
    for i, r in found.items():
        assert near(r.states([t + model.meta for t in (0, 3, 4, 69)]), cache[f'blocks.{i}.ssm.state'][:, [0, 3, 4, 69]])


@pytest.mark.parametrize('t', [0, 33, 69])
def test_a_change_of_a_state_is_carried_by_the_product_of_the_transitions(run, t):
    "The read-outs of the edited run minus those of the clean one."
    model, ids, found, cache = run
    for i, r in list(found.items())[:2]:
        S = cache[f'blocks.{i}.ssm.state'][:, t]
        change = torch.randn(S.shape, generator=torch.Generator().manual_seed(t))*S.std()
        _, moved = model.run_with_cache(ids, f'blocks.{i}.ssm.y', edit=add(f'blocks.{i}.ssm.state', change[:, None], at=t))
        want = moved[f'blocks.{i}.ssm.y'] - cache[f'blocks.{i}.ssm.y']
        got = torch.cat([torch.zeros_like(want[:, :t]), r.carried(change, t + model.meta)], 1)
        assert float((got - want).abs().max()) <= 1e-5*float(moved[f'blocks.{i}.ssm.y'].abs().max())


@pytest.mark.parametrize('ask, message', [
    (lambda r: r[9999], 'got heads=.*expected some of 0 to'), (lambda r: r[[]], 'got heads=.*expected some of'),
    (lambda r: r.attention(70), 'got rows=.*expected some of 0 to 69'), (lambda r: r.attention([]), 'got rows=.*expected'),
    (lambda r: r.states([5, 5]), 'expected ascending steps from 0 to 69'), (lambda r: r.states([-1]), 'expected ascending steps'),
    (lambda r: r.carried(torch.zeros(1, 2, 2, 2), 70), 'expected some of 0 to 69')])
def test_what_is_not_there_is_named(ask, message):
    for family in ('mamba2', 'rwkv7'):
        model = load_model(f'mock://{family}-tiny')
        with pytest.raises(ValueError, match=message): ask(model.recurrences(torch.arange(1, 71)[None], 0)[0])
    with pytest.raises(ValueError, match='got block 5, expected one with a recurrence: 0'): model.recurrences([1, 2], 5)
    with pytest.raises(ValueError, match='there is none'): load_model('mock://llama-tiny').recurrences([1, 2], 0)
