"""What the three knock-outs do to states and read-outs, in every family."""
import pytest
import torch

from circuitbench.knockout import cut_pairs, drop_write, skip_step
from circuitbench.load import load_model
from circuitbench.record import Mamba
from circuitbench.site import families

FAMILIES = [f for f in sorted(families()) if f not in ('llama', 'lfm2', 'titans')]  # without a recurrence, or with one that is not linear
IDS = torch.arange(3, 23)[None]


@pytest.fixture(scope='module', params=FAMILIES)
def case(request):
    torch.set_num_threads(1)
    model = load_model(f'mock://{request.param}-tiny')
    return model, next(iter(model.recurrences(IDS)))


def near(a, b, tol=1e-5): return float((a - b).abs().max()) <= tol*max(1., float(b.abs().max()))


def test_a_skipped_step_leaves_the_state(case):
    model, i = case
    site = f'blocks.{i}.ssm.state'
    _, c = model.run_with_cache(IDS, site, skip_step(model, i, [5, 9], heads=0))
    S, clean = c[site], model.run_with_cache(IDS, site)[1][site]
    for t in (5, 9): assert near(S[:, t, :1], S[:, t - 1, :1]) and not near(S[:, t, 1:], S[:, t - 1, 1:], 1e-7)
    assert near(S[:, :, 1:], clean[:, :, 1:])


def test_a_dropped_write_is_the_step_without_it(case):
    model, i = case
    names = [f'blocks.{i}.ssm.state', f'blocks.{i}.ssm.write']
    _, clean = model.run_with_cache(IDS, names)
    _, c = model.run_with_cache(IDS, names[0], drop_write(i, 5))
    assert near(c[names[0]][:, 5], clean[names[0]][:, 5] - clean[names[1]][:, 5])


def test_cut_pairs_take_their_share_out_of_the_read_outs(case):
    "All sources cut leave the skip alone; none before the source changes."
    model, i = case
    site = f'blocks.{i}.ssm.y'
    edit = cut_pairs(model, IDS, i, range(20), [4, 17], heads=[1])
    _, c = model.run_with_cache(IDS, [site, f'blocks.{i}.ssm.x'], edit)
    clean, r = model.run_with_cache(IDS, site)[1][site], model.recurrences(IDS, i)[i]
    rest = r.D[1]*c[f'blocks.{i}.ssm.x'][:, [4, 17], 1] if isinstance(r, Mamba) else torch.zeros_like(c[site][:, [4, 17], 1])
    if model.meta: rest = c[site][:, [4, 17], 1]                           # what the meta tokens wrote is left
    assert near(c[site][:, [4, 17], 1], rest, 1e-4*float(clean.abs().max()))
    others = [t for t in range(20) if t not in (4, 17)]
    assert torch.equal(c[site][:, others], clean[:, others]) and torch.equal(c[site][:, :, 0], clean[:, :, 0])
    later = cut_pairs(model, IDS, i, [9], range(20))
    changed = model.run_with_cache(IDS, site, later)[1][site]
    assert near(changed[:, :9], clean[:, :9], 1e-6) and not near(changed[:, 9:], clean[:, 9:], 1e-7)


@pytest.mark.parametrize('ask, message', [
    (dict(sources=[20], targets=[1]), r'got sources=\[20\], expected some of 0 to 19'), (dict(sources=[1], targets=[]), 'got targets='),
    (dict(sources=[1], targets=[2], heads=99), 'got heads='), (dict(sources=[1], targets=[2], layer=9), 'got block 9')])
def test_what_is_not_there_is_named(ask, message):
    model = load_model('mock://mamba2-tiny')
    with pytest.raises(ValueError, match=message): cut_pairs(model, IDS, **dict(layer=0) | ask)
