"""The laws of the edit algebra, against plain tensor arithmetic."""
import pytest
import torch

from circuitbench.edit import (
    Edit,
    Edits,
    add,
    apply,
    check_at,
    edited,
    live,
    mean,
    patch,
    positions,
    project_out,
    resample,
    scale,
    zero,
)

x = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(0))
other = torch.randn(2, 6, 4, 3, generator=torch.Generator().manual_seed(1))
EDITS = [zero('s'), scale('s', -2.), add('s', torch.ones(3)), patch('s', other), mean('s', other),
         project_out('s', torch.tensor([1., 2., 3.])), resample('s', other)]
ROWS = {'None': range(6), '2': [2], '-1': [5], '[1, 4]': [1, 4], 'slice(3, None, None)': [3, 4, 5],
        'every:2': [0, 2, 4]}                                                # str(at) -> positions


@pytest.mark.parametrize('e', EDITS, ids=lambda e: e.label)
@pytest.mark.parametrize('at', [None, 2, -1, [1, 4], slice(3, None), 'every:2'], ids=str)
@pytest.mark.parametrize('heads', [None, 1, [0, 3]], ids=str)
def test_an_edit_is_the_formula_where_it_applies_and_nothing_elsewhere(e, at, heads):
    full = edited(e, x)
    got = edited((.3*e).at(at).heads(heads), x)
    chosen = torch.zeros(6, 4, dtype=torch.bool)
    for r in ROWS[str(at)]: chosen[r, [1] if heads == 1 else heads or list(range(4))] = True
    assert torch.equal(got[:, ~chosen], x[:, ~chosen])
    assert torch.allclose(got[:, chosen], (x + .3*(full - x))[:, chosen], atol=1e-6)


def test_full_strength_gives_the_replacement_itself():
    assert torch.equal(edited(patch('s', other), x), other)


def test_nothing_is_changed_in_place():
    before = x.clone()
    for e in EDITS: edited(e.at([0, 3]).heads(2), x)
    assert torch.equal(x, before)


def test_algebra():
    e, g, h = EDITS[:3]
    assert list((e | g) | h) == list(e | (g | h)) == [e, g, h]
    assert (2*(3*e)).s == (6*e).s and list(2*(e | g)) == [2*e, 2*g]
    assert live(0*e | g | 0.*h) == Edits((g,)) and live(None) == () and live(e) == (e,)
    s = torch.tensor(0.)
    assert live(s*e)
    assert repr(.5*zero('blocks.0.ssm.y', at=3, heads=[1])) == '0.5*zero(blocks.0.ssm.y, at=3, heads=(1,))'


def test_slope_is_attribution_and_its_mean_the_exact_effect():
    metric = lambda v: (v**3).sum()
    def slope(s):
        s = torch.tensor(s, requires_grad=True)
        return torch.autograd.grad(metric(edited(s*patch('s', other), x)), s)[0]
    assert torch.allclose(slope(0.), (3*x**2*(other - x)).sum(), rtol=1e-5)
    nodes = [.5 - (3/5)**.5/2, .5, .5 + (3/5)**.5/2]                     # Gauss-Legendre, exact for a cubic
    exact = metric(other) - metric(x)
    assert torch.allclose(sum(w*slope(t) for w, t in zip([5/18, 8/18, 5/18], nodes)), exact, rtol=1e-4)


def test_positions_while_text_grows():
    assert positions(-1, 9, 10, 5) == ([], []) and positions(-1, 4, 5, 5) == ([4], [0])
    assert positions(check_at([7, 2, 7]), 0, 10, 10) == ([2, 7], [1, 0])
    assert positions(slice(-2, None), 0, 8, 5) == ([3, 4, 5, 6, 7], [0, 1, 2, 3, 4])


@pytest.mark.parametrize('call, message', [
    (lambda: zero('s', at='odd'), 'every:N'),
    (lambda: zero('s', at=3.5), 'expected None, an int'),
    (lambda: float('inf')*zero('s'), 'finite'),
    (lambda: project_out('s', torch.zeros(3)), 'norm 0'),
    (lambda: mean('s', x, over='heads'), "'all', 'batch', 'pos'"),
    (lambda: edited(patch('s', other[:, :2]), x), '2 positions'),
    (lambda: edited(apply('s', lambda v: v[..., :2]), x), 'gave shape'),
    (lambda: edited(zero('s', heads=9), x), 'expected 0 to 3'),
    (lambda: live([3]), 'expected Edit')])
def test_errors(call, message):
    with pytest.raises((ValueError, TypeError), match=message): call()


def test_a_tensor_may_be_a_position_list():
    assert zero('s', at=torch.tensor([1, 2])).pos == (1, 2) and isinstance(zero('s'), Edit)


def test_a_vector_of_another_width_is_refused_in_a_sentence():
    with pytest.raises(ValueError, match=r'got a vector of shape \(5,\) for resid_post, expected one that fits \(1, 3, 4\)'):
        edited(add('resid_post', torch.ones(5)), torch.zeros(1, 3, 4))
