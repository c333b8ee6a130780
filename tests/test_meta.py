"""Meta tokens: rows of the blocks before the prompt, numbered apart from it."""
import copy

import pytest
import torch

from circuitbench.edit import add, meta, patch, zero
from circuitbench.hook import HookedModel
from circuitbench.load import load_model


def top(x): return float(x.detach().abs().max())


@pytest.fixture(scope='module')
def hymba(): return load_model('mock://hymba-tiny')


def test_reading_them_is_reading_the_model(hymba, ids):
    _, cache = hymba.run_with_cache(ids, ['resid_pre', 'ssm.state', 'ssm.y'], at=meta())
    M = hymba.config.num_memory_tokens
    assert cache.positions('blocks.0.resid_pre') == list(range(M))
    assert torch.equal(cache['blocks.0.resid_pre'], hymba.hf.model.memory_tokens.expand(2, -1, -1))
    _, few = hymba.run_with_cache(ids, ['ssm.state', 'ssm.y'], at=meta([3, -3]))
    for n in few: assert few.positions(n) == [1, 3] and top(few[n] - cache[n][:, [1, 3]]) < 1e-6
    _, whole = hymba.run_with_cache(ids, ['resid_pre', 'ssm.state'])
    assert all(whole.positions(n) == list(range(21)) for n in whole)


def test_a_changed_meta_token_is_an_edit_of_its_row(hymba, ids):
    "Patching the stream at a meta token before the first block is changing that token in the model."
    other = copy.deepcopy(hymba.hf)
    with torch.no_grad(): other.model.memory_tokens[2] += 1
    want = other(ids, use_cache=False).logits
    got = hymba.run(ids, edit=add('blocks.0.resid_pre', torch.ones(()), at=meta(2))).logits
    assert top(got - want) <= 1e-5*top(want) < top(want - hymba.run(ids).logits)


def test_a_state_at_a_meta_token_goes_on_into_the_prompt(hymba, ids):
    name = 'blocks.0.ssm.state'
    delta = torch.randn(2, 1, *hymba.site_shape(name, 1, 1)[2:], generator=torch.Generator().manual_seed(0))
    sites = [f'blocks.0.ssm.{s}' for s in ('state', 'decay')]
    _, before = hymba.run_with_cache(ids, sites)
    _, last = hymba.run_with_cache(ids, sites, at=meta(3))
    _, after = hymba.run_with_cache(ids, sites, edit=add(name, delta, at=meta(3)))
    want = before['blocks.0.ssm.decay'].cumprod(1)[:, :, :, None]*delta
    assert top(after[name] - before[name] - want) < 1e-5
    _, same = hymba.run_with_cache(ids, sites, edit=patch(name, last[name], at=meta(3)))
    assert top(same[name] - before[name]) < 1e-6
    without = hymba.run(ids, edit=zero('ssm.state', at=meta(3)) | zero('ssm.out', at=meta()))
    assert top(without.logits - hymba.run(ids).logits) > 1e-3


def test_they_hold_while_generating(hymba, ids):
    edit = zero('blocks.1.ssm.state', at=meta(3)) | add('blocks.2.resid_pre', torch.ones(()), at=meta([0, 1]))
    made = hymba.generate(ids, 5, edit=edit, names='blocks.*.ssm.y')
    out, cache = hymba.run_with_cache(made.tokens[:, :-1], 'blocks.*.ssm.y', edit=edit)
    assert torch.equal(out.logits[:, 20:].argmax(-1), made.tokens[:, 21:])
    assert all(top(made.cache[n] - cache[n]) < 1e-4 for n in cache)


def test_errors(hymba, ids):
    with pytest.raises(ValueError, match='expected -4 to 3'): hymba.run(ids, edit=zero('ssm.y', at=meta(4)))
    with pytest.raises(ValueError, match='meta tokens have no embed'): hymba.run(ids, edit=zero('embed', at=meta(1)))
    with pytest.raises(ValueError, match='of 0 meta tokens'): load_model('mock://mamba2-tiny').run(ids, edit=zero('ssm.y', at=meta(0)))
    assert HookedModel(hymba.hf).meta == 4
