"""Loop and chunked scans against float64 numpy, at the shapes and values where such code breaks."""
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from circuitbench.scan import scan, scan_loop, segments, selective_chunk, ssd_chunk
from circuitbench.seam import short_conv


def inputs(l, h=6, p=4, n=5, g=1, b=2, mamba1=False, dtype=torch.float64, dt=None, seed=0):
    rand = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=rand, dtype=torch.float64)
    A = -torch.rand(*((h, n) if mamba1 else (h,)), generator=rand, dtype=torch.float64)*8
    step = F.softplus(r(b, l, h) - 1) if dt is None else torch.full((b, l, h), dt, dtype=torch.float64)
    v = dict(x=r(b, l, h, 1 if mamba1 else p), dt=step, A=A, B=r(b, l, g, n), C=r(b, l, g, n), D=r(h))
    return {k: t.to(dtype) for k, t in v.items()}


def truth(v):
    a = {k: t.detach().double().numpy() for k, t in v.items()}
    heads = lambda m: np.repeat(m, a['x'].shape[2]//m.shape[2], 2)
    y, _, _, states = oracle.scan(a['x'], a['dt'], a['A'], heads(a['B']), heads(a['C']), a['D'])
    return torch.from_numpy(y), torch.from_numpy(states)


def near(got, want, tol=1e-10): return float((got.double() - want).abs().max()) <= tol*max(1., float(want.abs().max()))


@pytest.mark.parametrize('l', [1, 2, 63, 64, 65, 200, 300])
@pytest.mark.parametrize('g', [1, 2, 6])
def test_ssd_equals_numpy(l, g):
    v = inputs(l, g=g)
    y, states = truth(v)
    for f in (scan_loop, ssd_chunk, lambda **v: ssd_chunk(**v, chunk=16)):
        got, S = f(**v)
        assert near(got, y) and near(S, states[:, -1])
    assert near(scan_loop(**v, states=True)[1], states)


@pytest.mark.parametrize('l', [1, 2, 16, 17, 70])
@pytest.mark.parametrize('chunk', [None, 1, 16])
def test_selective_equals_numpy(l, chunk):
    v = inputs(l, mamba1=True)
    y, states = truth(v)
    got, S = selective_chunk(**v, chunk=chunk)
    assert near(got, y) and near(S, states[:, -1])
    assert near(scan_loop(**v)[0], y)


@pytest.mark.parametrize('mamba1', [False, True])
@pytest.mark.parametrize('dt', [0., 1e-8, 50., 1e4])
def test_extreme_steps(mamba1, dt):
    "Nothing forgotten, nearly nothing, everything at once: no overflow, no nan."
    v = inputs(130, mamba1=mamba1, dt=dt)
    y, states = truth(v)
    got, S = (selective_chunk if mamba1 else ssd_chunk)(**v)
    assert torch.isfinite(got).all() and near(got, y) and near(S, states[:, -1])


@pytest.mark.parametrize('mamba1', [False, True])
def test_a_scan_in_two_pieces_is_the_scan(mamba1):
    v = inputs(90, mamba1=mamba1)
    f = selective_chunk if mamba1 else ssd_chunk
    cut = lambda a, b: {k: t if k in 'AD' else t[:, a:b] for k, t in v.items()}
    y1, S = f(**cut(0, 37))
    y2, S = f(**cut(37, 90), state=S)
    y, states = truth(v)
    assert near(torch.cat([y1, y2], 1), y) and near(S, states[:, -1])


@pytest.mark.parametrize('mamba1', [False, True])
def test_gradients_equal_the_loop_and_finite_differences(mamba1):
    v = {k: t.requires_grad_() for k, t in inputs(21, mamba1=mamba1, b=1).items()}
    S0 = torch.randn(1, 6, 1 if mamba1 else 4, 5, dtype=torch.float64, requires_grad=True)
    f = (lambda *a: selective_chunk(*a, chunk=8)) if mamba1 else (lambda *a: ssd_chunk(*a, chunk=8))
    assert torch.autograd.gradcheck(f, (*v.values(), S0), fast_mode=True)
    score = lambda out: out[0].sin().sum() + out[1].cos().sum()
    ours, loop = (torch.autograd.grad(score(g(*v.values(), S0)), (*v.values(), S0)) for g in (f, scan_loop))
    assert all(near(a, b.double()) for a, b in zip(ours, loop))


@pytest.mark.parametrize('mamba1', [False, True])
@pytest.mark.parametrize('stops', [[0], [5, 6, 7], [0, 40, 79], list(range(80))])
def test_stops_change_nothing_and_see_every_state(mamba1, stops):
    v = inputs(80, mamba1=mamba1)
    y, states = truth(v)
    seen = {}
    def tap(name, x, t): return seen.setdefault((name, t), x)
    got, S = scan(**v, stops=stops, tap=tap)
    assert near(got, y) and near(S, states[:, -1])
    assert sorted({t for _, t in seen}) == stops and all(near(seen['state', t], states[:, t]) for t in stops)


@pytest.mark.parametrize('mamba1', [False, True])
@pytest.mark.parametrize('stops', [[], [0], [6, 50], [70, 79]])
@pytest.mark.parametrize('reads', [[0], [5, 6, 7, 9, 50], [0, 40, 79], list(range(80)), list(range(0, 80, 3))])
def test_reads_change_nothing_and_see_every_state(mamba1, stops, reads):
    v, seen = inputs(80, mamba1=mamba1), {}
    y, states = truth(v)
    def tap(name, x, t): return seen.update({t + i: x[:, i].clone() for i in range(x.shape[1])}) if name == 'states' else x
    got, S = scan(**v, stops=stops, tap=tap, reads=reads)
    assert near(got, y) and near(S, states[:, -1])
    assert {*reads} - {*stops} <= {*seen} and all(near(S, states[:, t]) for t, S in seen.items())


@pytest.mark.parametrize('seed', range(20))
def test_segments_cover_every_step_once_and_every_look(seed):
    rng = np.random.default_rng(seed)
    length, most = int(rng.integers(1, 90)), int(rng.integers(1, 9))
    stops, reads = (rng.choice(length, int(rng.integers(0, length + 1)), replace=False).tolist() for _ in range(2))
    cuts = segments(length, stops, reads, most)
    assert [t for _, lo, hi in cuts for t in range(lo, hi)] == list(range(length))
    assert [lo for kind, lo, _ in cuts if kind == 'stop'] == sorted(stops)
    seen = {t for kind, lo, hi in cuts for t in (range(lo, hi) if kind == 'states' else [hi - 1] if kind == 'read' else [])}
    assert {*reads} - {*stops} <= seen and all(hi - lo <= most for kind, lo, hi in cuts if kind == 'states')


@pytest.mark.parametrize('mamba1', [False, True])
@pytest.mark.parametrize('dtype, tol', [(torch.float32, 1e-5), (torch.bfloat16, 1e-5), (torch.float16, 1e-5)])
def test_low_precision_inputs_are_scanned_in_float32(mamba1, dtype, tol):
    v = inputs(150, mamba1=mamba1, dtype=dtype)
    y, states = truth(v)                                    # of the rounded inputs
    got, S = (selective_chunk if mamba1 else ssd_chunk)(**v)
    assert S.dtype == torch.float32 and near(got, y, tol) and near(S, states[:, -1], tol)


def test_no_state_of_every_step_is_kept():
    "Peak memory of a scan grows with L x model width, not with L x state."
    v, sizes = inputs(512, h=8, p=16, n=64, b=1, dtype=torch.float32), []
    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor): sizes.append(out.untyped_storage().nbytes())
            return out
    with torch.no_grad(), Sizes(): ssd_chunk(**v)
    every_state = 512*8*16*64*4
    assert max(sizes) < every_state/8


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match='got d_head 4'): selective_chunk(**inputs(5))


@pytest.mark.parametrize('l', [1, 2, 3, 4, 50])
@pytest.mark.parametrize('width', [1, 2, 4])
@pytest.mark.parametrize('dtype, tol', [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_the_short_convolution_equals_numpy(l, width, dtype, tol):
    rand = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*s, generator=rand, dtype=torch.float64).to(dtype) for s in ((2, l, 6), (6, width), (6,)))
    want = lambda b: torch.from_numpy(oracle.convolve(*(v.double().numpy() for v in (x, weight)), b))
    got = short_conv(x, weight)
    assert got.dtype == dtype and near(got, want(None), tol)
    assert near(short_conv(x, weight, bias), want(bias.double().numpy()), tol)


def test_the_short_convolution_has_exact_gradients():
    rand = torch.Generator().manual_seed(0)
    args = [torch.randn(*s, generator=rand, dtype=torch.float64, requires_grad=True) for s in ((2, 7, 3), (3, 4), (3,))]
    assert torch.autograd.gradcheck(short_conv, args) and torch.autograd.gradgradcheck(short_conv, args)
