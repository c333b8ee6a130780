"""A state is all that a model remembers: a run that goes on from it is the whole run, in every family."""
import numpy as np
import pytest
import torch

from circuitbench.edit import scale, zero
from circuitbench.load import load_model
from circuitbench.site import families, short
from circuitbench.state import State, average

FAMILIES = sorted(families())


@pytest.fixture(scope='module', params=FAMILIES)
def model(request):
    torch.set_num_threads(1)
    return load_model(f'mock://{request.param}-tiny')


def ids(rows=2, length=20, seed=1): return torch.randint(1, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


def near(a, b, tol=1e-4): return float((a - b).abs().max()) <= tol*max(1e-6, float(b.abs().max()))


def has_state(model): return any(short(n) == 'ssm.state' for n in model._names)


@pytest.mark.parametrize('cut', [1, 9, 19])
def test_a_run_in_two_pieces_is_the_run(model, cut):
    x = ids()
    whole, first = model.run(x).logits, model.run(x[:, :cut], keep_state=True)
    second = model.run(x[:, cut:], state=first.state, keep_state=True)
    assert near(torch.cat([first.logits, second.logits], 1), whole)
    assert second.state.length == 20 and torch.equal(second.state.tokens, x) and first.state.length == cut
    again = model.run(x[:, cut:], state=first.state).logits               # a state is not used up
    assert torch.equal(again, second.logits)


def test_the_state_is_that_of_the_last_step(model):
    x = ids()
    out, cache = model.run_with_cache(x, 'ssm.state', at=-1, keep_state=True) if has_state(model) else (model.run(x, keep_state=True), {})
    for name, S in cache.items(): assert near(out.state.ssm[int(name.split('.')[1])], S[:, 0])
    assert len(out.state.ssm) == len(cache)


def test_positions_count_on(model):
    "Reads and edits name positions of the whole text, also from the end."
    x = ids()
    site = 'ssm.state' if has_state(model) else 'resid_mid'
    edit = (zero(site, at=12) | scale(site, 2., at=-2))
    whole, far = model.run_with_cache(x, site, edit=edit, at=[3, 12, -1])
    first = model.run(x[:, :9], keep_state=True).state
    rest, near_by = model.run_with_cache(x[:, 9:], site, edit=edit, at=[3, 12, -1], state=first)
    assert near(rest.logits, whole.logits[:, 9:])
    for name in far:
        assert near_by.positions(name) == [12, 19] and near(near_by[name], far[name][:, 1:])


def test_padding_before_a_state(model):
    x, mask = ids(2, 23), torch.ones(2, 23, dtype=torch.long)
    mask[1, :3] = 0
    whole = model.run(x, mask=mask).logits
    first = model.run(x[:, :9], mask=mask[:, :9], keep_state=True).state
    assert near(model.run(x[:, 9:], state=first).logits, whole[:, 9:])
    with pytest.raises(ValueError, match="expected pad='left'"): model.run(x, mask=mask.flip(1), keep_state=True)


def test_generation_goes_on_from_a_state(model):
    x = ids()
    want = model.generate(x, 5)
    state = model.run(x[:, :9], keep_state=True).state
    site = 'ssm.state' if has_state(model) else 'resid_mid'
    got = model.generate(x[:, 9:], 5, state=state, names=site, at=[8, 19, 21])
    assert torch.equal(got.tokens, want.tokens) and got.prompt == 20 and got.text == want.text
    assert all(got.cache.positions(n) == [19, 21] for n in got.cache)
    logits = model.run(got.tokens).logits
    assert torch.equal(logits[:, 19:-1].argmax(-1), got.tokens[:, 20:])


def test_a_file_holds_it_all(model, tmp_path):
    state = model.run(ids(), keep_state=True).state
    state.save(tmp_path/'s.safetensors')
    back = State.load(tmp_path/'s.safetensors')
    assert torch.equal(model.run([[5, 9]]*2, state=back).logits, model.run([[5, 9]]*2, state=state).logits)
    assert repr(back) == repr(state) and [p.name for p in tmp_path.iterdir()] == ['s.safetensors']


def test_every_part_of_another_state_is_the_other_state(model):
    a, b = (model.run(ids(1, n, seed), keep_state=True).state for n, seed in ((20, 1), (14, 2)))
    both = a.swap(b, ('ssm', 'conv', 'attn'))
    assert both.length == 14
    assert torch.equal(model.run([7, 3], state=both).logits, model.run([7, 3], state=b).logits)
    for parts in ('ssm', 'conv', 'attn'):
        mixed = model.run([7, 3], state=a.swap(b, parts)).logits
        assert torch.isfinite(mixed).all()
        changes = bool(getattr(a, parts))
        assert torch.equal(mixed, model.run([7, 3], state=a).logits) != changes


@pytest.mark.parametrize('family', FAMILIES)
def test_the_gradient_of_the_first_state_is_a_finite_difference(family):
    model = load_model(f'mock://{family}-tiny', dtype=torch.float64)
    model.hf.config._experts_implementation = 'eager'                    # a grouped product knows no float64
    state = model.run(ids(1), keep_state=True).state
    assert bool(state.ssm) == has_state(model)
    for i in list(state.ssm)[:1]:
        step, start = 1e-3*float(state.ssm[i].norm()), state.ssm[i].double().requires_grad_()
        def metric(S, i=i):
            return model.run([7, 3, 11], state=state.map(lambda _: S, blocks=i), grad=True).logits[0, -1, :50].square().sum()
        g, = torch.autograd.grad(metric(start), start)
        up, down = (float(metric((start + k*step*g/g.norm()).detach()).detach()) for k in (1, -1))
        assert abs((up - down)/(2*step) - float(g.norm())) < 1e-2*float(g.norm())


def test_mixtures_are_linear():
    model = load_model('mock://falcon-h1-tiny')
    a, b = (model.run(ids(1, 20, seed), keep_state=True).state for seed in (1, 2))
    for i in a.ssm:
        want = .75*a.ssm[i].double().numpy() + .25*b.ssm[i].double().numpy()
        assert np.allclose(a.mix(b, .25).ssm[i], want, atol=1e-6)
        assert np.allclose(average([a, b, b]).ssm[i], (a.ssm[i] + 2*b.ssm[i])/3, atol=1e-6)
        some = a.swap(b, 'ssm', heads=[1, 3]).ssm[i]
        assert torch.equal(some[:, [0, 2]], a.ssm[i][:, [0, 2]]) and torch.equal(some[:, [1, 3]], b.ssm[i][:, [1, 3]])
    assert torch.equal(a.mix(b, 0).ssm[0], a.ssm[0]) and torch.equal(a.mix(b, 1.).ssm[0], b.ssm[0])
    assert torch.allclose(a.mix(b, .5, 'attn').attn[0][0], (a.attn[0][0] + b.attn[0][0])/2, atol=1e-6)
    assert all((v == 0).all() for v in a.map(torch.zeros_like).ssm.values())


def test_rows_of_a_batch():
    model = load_model('mock://jamba-tiny')
    state, x = model.run(ids(1, 9), keep_state=True).state, ids(3, 6, 4)
    whole = torch.cat([model.run(torch.cat([state.tokens[0], row])[None]).logits[:, 9:] for row in x])
    assert near(model.run(x, state=state).logits, whole)


@pytest.mark.parametrize('wrong, message', [
    (lambda m, a, b: a.swap(b, 'keys'), "got parts=.*expected some of"), (lambda m, a, b: a.swap(b, heads=9), 'expected 0 to 3'),
    (lambda m, a, b: a.swap(b, heads=[]), 'expected 0 to 3'), (lambda m, a, b: a.swap(b, blocks=7), 'got block 7, expected some of'),
    (lambda m, a, b: a.mix(b, .5, 'attn'), 'got attn of block 0'), (lambda m, a, b: a.swap(b, 'attn', blocks=0), 'expected prompts of one length'),
    (lambda m, a, b: average([]), 'at least one'), (lambda m, a, b: m.run(ids(3), state=m.run(ids(2), keep_state=True).state), 'expected 1 or 3'),
    (lambda m, a, b: a.swap(load_model('mock://mamba2-tiny').run([1, 2], keep_state=True).state), 'got a state of mamba2, expected one of falcon-h1'),
    (lambda m, a, b: load_model('mock://mamba2-tiny').run([1], state=a), 'got a state of falcon-h1, expected one of mamba2'),
    (lambda m, a, b: m.run([1], state=a, backend='transformers'), 'expected the default backend'),
    (lambda m, a, b: m.run([1], state=a.map(lambda S: S[..., :3])), 'got a state whose ssm in block 0 is')])
def test_what_does_not_fit_is_named(wrong, message):
    m = load_model('mock://falcon-h1-tiny')
    a, b = (m.run(ids(1, n), keep_state=True).state for n in (9, 5))
    with pytest.raises(ValueError, match=message): wrong(m, a, b)


def test_files_that_are_no_states(tmp_path):
    (tmp_path/'x').write_bytes(b'no tensors')
    with pytest.raises(ValueError, match='no safetensors file'): State.load(tmp_path/'x')
    with pytest.raises(FileNotFoundError): State.load(tmp_path/'y')
    from safetensors.torch import save_file
    save_file({'a': torch.zeros(2)}, tmp_path/'z')
    with pytest.raises(ValueError, match='State.save'): State.load(tmp_path/'z')
