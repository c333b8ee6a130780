"""State patches equal one run per patch; gradients of states equal finite differences; every family."""
import pytest
import torch

from circuitbench.edit import add, patch
from circuitbench.load import load_model
from circuitbench.patching import StatePatches, by_ends, patch_states, state_gradients
from circuitbench.site import families

FAMILIES = [f for f in sorted(families()) if f not in ('llama', 'lfm2', 'titans')]  # without a recurrence, or with one that is not linear


def metric(x): return x[:, 5] - x[:, 9]


@pytest.fixture(scope='module', params=FAMILIES)
def case(request):
    torch.set_num_threads(1)
    model, g = load_model(f'mock://{request.param}-tiny'), torch.Generator().manual_seed(3)
    clean = torch.randint(1, 200, (1, 12), generator=g)
    corrupt = clean.clone()
    corrupt[0, 4] = 77
    return model, clean, corrupt


def by_hand(model, clean, corrupt, r):
    "One run for each patch."
    source = model.run_with_cache(clean, 'ssm.state')[1]
    def _one(layer, t, s, head):
        site = f'blocks.{layer}.ssm.state'
        edit = patch(site, source[site][:, [s]], at=t, heads=None if head == 'all' else int(head))
        return float(metric(model.run(corrupt, edit=edit).logits[:, -1]))
    return torch.tensor([[[_one(i, t, s, h) for h in r.heads] for t, s in zip(r.steps, r.source_steps)] for i in r.layers])


@pytest.mark.parametrize('heads', ['all', [0, 3]])
def test_every_patch_equals_a_run_of_its_own(case, heads):
    model, clean, corrupt = case
    if heads != 'all': heads = [min(h, model.sizes['head'] - 1) for h in heads]
    r = patch_states(model, clean, corrupt, metric=metric, steps=[0, 4, 5, 9, 11], heads=heads, progress=False)
    want = by_hand(model, clean, corrupt, r)
    assert torch.allclose(r.effects, want, atol=1e-4) and r.exact.all() and (r.effects - r.patched).abs().max() > 1e-3
    assert (r.effects[:, 0] == r.patched).all()                            # before the prompts differ
    assert not any('forward' in b.__dict__ or b._forward_pre_hooks or b._forward_hooks for b in model.blocks)


def test_small_batches_change_nothing(case):
    model, clean, corrupt = case
    ask = dict(metric=metric, steps=[4, 7, 10], heads='all', progress=False)
    assert torch.allclose(patch_states(model, clean, corrupt, rows=1, **ask).effects,
                          patch_states(model, clean, corrupt, **ask).effects, atol=1e-5)


@pytest.mark.parametrize('family', FAMILIES)
def test_gradients_of_states_are_finite_differences(family):
    model, ids = load_model(f'mock://{family}-tiny', dtype=torch.float64), torch.arange(3, 15)[None]
    model.hf.config._experts_implementation = 'eager'                      # a grouped product knows no float64
    i = next(iter(model.recurrences(ids)))
    site, at = f'blocks.{i}.ssm.state', [2, 7, 11]
    g = state_gradients(model, ids, metric, i, at)[i]
    out, cache = model.run_with_cache(ids, site, grad=True, at=at)
    assert torch.allclose(g, cache.grad(metric(out.logits[:, -1]).sum())[site].to(g), rtol=1e-4, atol=1e-5*float(g.abs().max()))
    for k, t in enumerate(at):
        size = float(g[:, k].norm())
        step = 1e-3/size                                                   # transformers rounds its norms to float32
        nudge = step*g[:, [k]]/size
        up, down = (float(metric(model.run(ids, edit=add(site, sign*nudge, at=t)).logits[:, -1])) for sign in (1, -1))
        assert abs((up - down)/(2*step) - size) <= 2e-2*size


def test_prompts_of_different_lengths_are_aligned():
    model = load_model('mock://falcon-h1-tiny')
    clean, corrupt = torch.tensor([[3, 4, 5, 60, 61, 7, 8]]), torch.tensor([[3, 4, 5, 70, 7, 8]])
    with pytest.raises(ValueError, match=r'got prompts of 7 \(clean\) and 6 \(corrupt\) tokens.*by_ends'):
        patch_states(model, clean, corrupt, metric=metric)
    pairs = by_ends(corrupt[0].tolist(), clean[0].tolist())
    assert pairs == [(0, 0), (1, 1), (2, 2), (4, 5), (5, 6)]
    r = patch_states(model, clean, corrupt, metric=metric, align=pairs, heads='all', progress=False)
    assert r.steps == (0, 1, 2, 4, 5) and r.source_steps == (0, 1, 2, 5, 6)
    assert torch.allclose(r.effects, by_hand(model, clean, corrupt, r), atol=1e-4)
    assert by_ends([1, 2], [1, 2]) == [(0, 0), (1, 1)] and by_ends([1, 1], [1]) == [(0, 0)]


def test_a_screen_runs_the_patches_of_the_largest_derivative():
    model, g = load_model('mock://mamba2-tiny'), torch.Generator().manual_seed(5)
    a, b = torch.randint(1, 200, (2, 1, 16), generator=g)
    ask = dict(metric=metric, progress=False)
    r, whole = patch_states(model, a, b, screen=.1, **ask), patch_states(model, a, b, **ask)
    n = -(-r.effects.numel()//10)
    assert int(r.exact.sum()) == n and torch.allclose(r.effects[r.exact], whole.effects[r.exact], atol=1e-5)
    estimate = (r.effects - r.patched)[~r.exact].abs()
    moved = (whole.effects - whole.patched).abs()
    assert len({*moved.flatten().topk(n//2).indices.tolist()} & {*r.exact.flatten().nonzero()[:, 0].tolist()}) >= .7*(n//2)
    assert estimate.max() < 2*moved[r.exact].max()


def test_answers_are_those_of_the_two_runs_unless_named():
    model = load_model('mock://mamba2-tiny')
    a, b = [5, 9, 3, 8], [5, 7, 3, 8]
    best = [int(model.run(x).logits[0, -1].argmax()) for x in (a, b)]
    r = patch_states(model, a, b, progress=False, heads='all')
    assert best[0] == best[1] or r.clean >= 0 >= r.patched
    named = patch_states(model, a, b, target=17, wrong=23, progress=False, heads='all')
    assert abs(named.clean - float(model.run(a).logits[0, -1, 17] - model.run(a).logits[0, -1, 23])) < 1e-5
    p = patch_states(model, a, b, target=17, metric='log_prob', progress=False, heads='all')
    assert abs(p.clean - float(model.run(a).logits[0, -1].log_softmax(-1)[17])) < 1e-5


def test_a_file_holds_it_all(tmp_path):
    model = load_model('mock://mamba2-tiny')
    r = patch_states(model, [5, 9, 3], [5, 7, 3], target=1, wrong=2, progress=False)
    back = StatePatches.load(r.save(tmp_path/'p.safetensors'))
    assert repr(back) == repr(r) and torch.equal(back.effects, r.effects) and back.heads == r.heads and back.top(3) == r.top(3)
    assert [p.name for p in tmp_path.iterdir()] == ['p.safetensors']
    (tmp_path/'q').write_bytes(b'no')
    with pytest.raises(ValueError, match='expected a file of StatePatches.save'): StatePatches.load(tmp_path/'q')


@pytest.mark.parametrize('change, message', [
    (dict(steps=[9]), 'got step 9, expected one of the 3 steps'), (dict(steps=[]), 'got no steps'), (dict(heads=99), "got heads=99, expected 'each'"),
    (dict(layers=7), 'got block 7, expected one with a recurrence: 0-1'), (dict(metric='loss'), "got metric='loss', expected 'logit_diff'"),
    (dict(target=[1, 2]), 'got an answer of 2 tokens, expected one token'), (dict(screen=0.), 'got screen=0.0'),
    (dict(align=[(0, 9)]), 'got step 0, expected one of the 3 steps')])
def test_what_cannot_be_asked_is_named(change, message):
    model = load_model('mock://mamba2-tiny')
    with pytest.raises(ValueError, match=message):
        patch_states(model, [5, 9, 3], [5, 7, 3], **dict(target=1, wrong=2, progress=False) | change)


def test_an_exception_takes_everything_off():
    model = load_model('mock://mamba2-tiny')
    def broken(x):
        if len(x) > 1: raise RuntimeError('a metric that fails')
        return x[:, 0]
    with pytest.raises(RuntimeError): patch_states(model, [5, 9, 3], [5, 7, 3], metric=broken, progress=False)
    assert not any('forward' in b.__dict__ or b._forward_pre_hooks for b in model.blocks)
