"""Conformance: what every family has to do, on random checkpoints of several shapes, against transformers' own code."""
import numpy as np
import pytest
import torch
from checkpoints import SHAPES, in_float64, random_model
from exact import float64
from oracle_titans import fits

from circuitbench.edit import add, apply, meta
from circuitbench.hook import HookedModel
from circuitbench.site import BLOCK_SITES, PER_STEP, families, short

GATED_ATTENTION = 'qwen3-next', 'qwen3-5', 'titans'               # attn.z is after a gate that has no site; Titans: see its oracle
CASES = [(family, shape) for family in SHAPES for shape in range(len(SHAPES[family]))]


def top(x): return float(x.detach().abs().max())
def rms(x): return float(x.detach().double().pow(2).mean().sqrt())
def tilt(x): return x + torch.randn(x.shape[2:], generator=torch.Generator().manual_seed(0))   # norms take a constant away
def tokens(batch, length, seed=0): return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(seed))
def shared_bias(model, i):
    "Of an output projection that both branches share (Hymba)."
    bias = model.blocks[i].mamba.out_proj.bias if model.adapter.family == 'hymba' else None
    return 0 if bias is None else bias.double().numpy()
def of(model, site): return [n for n in model._names if short(n) == site]


@pytest.fixture(scope='module', params=CASES, ids=lambda c: f'{c[0]}-{c[1]}')
def model(request):
    return HookedModel(random_model(*request.param))


def test_every_family_is_here(): assert set(SHAPES) == set(families()) and all(len(s) >= 3 for s in SHAPES.values())


def test_logits_equal_the_reference(model):
    ids = tokens(2, 64)
    theirs = model.hf(ids, use_cache=False).logits
    for ours in (model.run(ids).logits, model.run_with_cache(ids, '*')[0].logits):
        assert top(ours - theirs) <= 1e-5*top(theirs)
    assert torch.equal(model.run(ids, backend='transformers').logits, theirs)


def test_bf16(model):
    ids = tokens(2, 64)
    other = HookedModel(in_float64(model.hf).to(torch.bfloat16))
    theirs = other.hf(ids, use_cache=False).logits
    ours, cache = other.run_with_cache(ids, '*')
    off = (ours.logits - theirs).float().norm(dim=-1)/theirs.float().norm(dim=-1)
    assert off.median() <= 2e-2                               # of a token: a tie between experts may fall either way
    assert all(v.dtype in (torch.bfloat16, torch.float32) for v in cache.values())


def test_gradients_equal_the_reference(model):
    ids = tokens(2, 21)
    leaf = []
    def cut(m, args, out): return leaf.append(out.detach().requires_grad_()) or leaf[0]
    with model.hf.get_input_embeddings().register_forward_hook(cut): theirs = model.hf(ids, use_cache=False).logits
    want = torch.autograd.grad(theirs[0, -1, 3], leaf[0])[0]
    for names in ('embed', '*'):
        out, cache = model.run_with_cache(ids, names, grad=True)
        got = cache.grad(out.logits[0, -1, 3])['embed']*model.ends['embed'].scale
        assert top(got - want) <= 1e-4*top(want), names


def test_cached_generation_equals_the_whole(model):
    "From a few tokens before a chunk of 64 ends to a few after it."
    ids = tokens(2, 54)
    names = [n for n in model._names if n != 'logits']
    made = model.generate(ids, 20, names=names, eos_token_id=None)
    out, cache = model.run_with_cache(made.tokens[:, :-1], '*')
    assert made.tokens.shape == (2, 74) and torch.equal(out.logits[:, 53:].argmax(-1), made.tokens[:, 54:])
    for n in names:
        assert made.cache.positions(n) == list(range(73)), n
        assert top(made.cache[n] - cache[n]) <= 1e-4*max(1, top(cache[n])), n


@pytest.mark.parametrize('side', ['left', 'right'])
def test_padding_does_not_matter(model, side):
    rows, n = [tokens(1, k, seed=k)[0].tolist() for k in (5, 14)], 14
    pad = lambda r, fill: [fill]*(n - len(r)) + r if side == 'left' else r + [fill]*(n - len(r))
    ids, mask = torch.tensor([pad(r, 0) for r in rows]), torch.tensor([pad([1]*len(r), 0) for r in rows])
    names = [n for n in model.site_names() if short(n) != 'attn.pattern']
    out, cache = model.run_with_cache(ids, names, mask=mask)
    for i, r in enumerate(rows):
        alone, own = model.run_with_cache([r], names)
        here = mask[i].bool()
        assert top(out.logits[i][here] - alone.logits[0]) <= 1e-5*top(alone.logits)
        for n_ in own: assert top(cache[n_][i][here] - own[n_][0]) <= 2e-5*max(1, top(own[n_])), n_


def test_each_site_passes_once_with_its_shape(model, request):
    "All in one run; of each family's first shape each in a run of its own, too."
    ids, first = tokens(2, 21), request.node.callspec.params['model'][1] == 0
    window = getattr(model.config, 'window', 0) if getattr(model.config, 'form', '') == 'mac' else 0     # Titans, segment after segment
    by_segment = [n for n in model._names if window and short(n) in model.inside and short(n) not in PER_STEP]
    segments = [min(window, 21 - t) for t in range(0, 21, window)] if window else []
    for names in [model._names, *([n] for n in model._names if first)]:
        seen = {}
        def note(n, seen=seen): return lambda x: seen.setdefault(n, []).append(tuple(x.shape)) or x.clone()
        model.run(ids, edit=[apply(n, note(n)) for n in names])
        for n in names:
            want = model.site_shape(n, 2, 21)
            if n in by_segment:
                assert [p[1] for p in seen[n]] == segments and {(*p[:1], *p[2:-1]) for p in seen[n]} == {(*want[:1], *want[2:-1])}, n
                continue
            assert seen[n] == ([(2, 1, *want[2:])]*21 if short(n) in PER_STEP else [want]), n


def test_a_state_edit_reaches_the_present_and_what_follows(model):
    ids, t = tokens(2, 21), 8
    for name in of(model, 'ssm.state'):
        i = name.split('.')[1]
        cut = add(name, torch.zeros(()), at=t)                                  # the scan is cut at the same step in both runs
        want, before = model.run_with_cache(ids, f'blocks.{i}.ssm.y', edit=cut)
        got, after = model.run_with_cache(ids, f'blocks.{i}.ssm.y', edit=apply(name, tilt, at=t))
        dy = (after[f'blocks.{i}.ssm.y'] - before[f'blocks.{i}.ssm.y']).abs().amax((0, 2, 3))
        d = (got.logits - want.logits).abs().amax((0, 2))
        assert top(dy[:t]) == 0 and dy[t] > 1e-3 and top(d[:t]) <= 1e-6*top(want.logits) and top(d[t:]) > 1e-4, name


WAYS = {'mixer_in': 'mixer_out', 'mlp_in': 'mlp_out', 'attn.q': 'attn.out', 'attn.k': 'attn.out', 'attn.v': 'attn.out',
        'ssm.in_proj': 'ssm.out', 'ssm.conv': 'ssm.out'}


def test_what_a_branch_reads_changes_what_it_adds(model):
    ids = tokens(2, 21)
    _, before = model.run_with_cache(ids, model.site_names())
    for name in (n for n in model._names if short(n) in WAYS):
        end = name.removesuffix(short(name)) + WAYS[short(name)]
        _, after = model.run_with_cache(ids, end, edit=apply(name, tilt, at=3))
        assert top(after[end] - before[end]) > 1e-4, (name, end)


def test_sites_fit_together(model):
    "The equations between the sites of a block, in float64 numpy."
    ids = tokens(2, 21)
    out, cache = model.run_with_cache(ids, '*')
    sites = {n: v.double().numpy() for n, v in cache.items()}
    before = {n: v.double().numpy() for n, v in model.run_with_cache(ids, 'blocks.*', at=meta())[1].items()} if model.meta else {}
    close = lambda a, b, what: np.testing.assert_allclose(a, b, rtol=0, atol=3e-6*max(1, np.abs(b).max()), err_msg=what)
    assert torch.equal(cache['logits'], out.logits) or top(cache['logits'] - out.logits) < 1e-5
    checked = set()
    for i in range(model.n_layers):
        s, m = ({short(n): v for n, v in d.items() if n.startswith(f'blocks.{i}.')} for d in (sites, before))
        if i: close(s['resid_pre'], sites[f'blocks.{i - 1}.resid_post'], 'the residual stream goes on')
        elif model.adapter.family != 'rwkv7': close(s['resid_pre'], sites['embed'], 'the residual stream begins')
        if {'ssm.out', 'attn.out'} <= set(s) and not model.adapter.beside: close(s['mixer_out'], s['ssm.out'] + s['attn.out'] + shared_bias(model, i), 'two branches')
        elif 'mixer_out' in s: close(s['mixer_out'], s['ssm.out' if 'ssm.out' in s else 'attn.out'], 'one branch')
        after = s['resid_mid'] if 'resid_mid' in s else s['resid_post']
        if 'mixer_out' in s: close(after, s['resid_pre'] + s['mixer_out'], 'the mixer adds')
        if 'resid_mid' in s: close(s['resid_post'], s['resid_mid'] + s['mlp_out'], 'the MLP adds')
        elif 'mixer_out' not in s: close(s['resid_post'], s['resid_pre'] + s['mlp_out'], 'an MLP alone')
        if 'attn.pattern' in s:
            extra = model.adapter.keys(model.config, 0) + model.meta                 # columns that are seen from everywhere
            columns = np.arange(s['attn.pattern'].shape[-1]) - extra
            each = model.adapter.keys(model.config, 1) - model.adapter.keys(model.config, 0)
            assert np.abs(np.where((columns//each > np.arange(21)[:, None])[:, None], s['attn.pattern'], 0)).max() == 0
            np.testing.assert_allclose(s['attn.pattern'].sum(-1), 1, atol=1e-5)
        if 'attn.v' in s and model.adapter.family not in GATED_ATTENTION:
            v = np.concatenate([m['attn.v'], s['attn.v']], 1) if m else s['attn.v']
            v = v.repeat(s['attn.z'].shape[2]//v.shape[2], 2)
            close(s['attn.z'], np.einsum('bqhk,bkhd->bqhd', s['attn.pattern'], v), 'z = pattern v')
        if model.adapter.family == 'lfm2' and 'ssm.conv' in s:
            (B, C, x), mixer = np.split(s['ssm.in_proj'], 3, -1), model.blocks[i].conv
            K, Bx = mixer.conv.weight.double().numpy()[:, 0], B*x
            c = np.zeros_like(Bx) + (0 if mixer.conv.bias is None else mixer.conv.bias.double().numpy())
            for lag in range(K.shape[1]): c[:, lag:] += K[:, -1 - lag]*Bx[:, :Bx.shape[1] - lag]
            close(s['ssm.conv'], c, 'conv(B x)')
            close(s['ssm.out_proj_in'], C*s['ssm.conv'], 'C conv')
        if model.adapter.family == 'titans': fits(model, i, s, close)
        elif 'ssm.state' in s and 'ssm.dt' in s:
            dt, x, B, C, decay = (s[f'ssm.{n}'] for n in ('dt', 'x', 'B', 'C', 'decay'))
            write = np.einsum('blhp,blhn->blhpn', dt[..., None]*x, B)
            decay = decay[..., None, None] if decay.ndim == 3 else decay[:, :, :, None]
            S = m['ssm.state'][:, -1] if m else np.zeros_like(write[:, 0])
            for t in range(write.shape[1]):
                S = decay[:, t]*S + write[:, t]
                close(s['ssm.state'][:, t], S, 'h = a h + dt x B')
            mixer = model.blocks[i].get_submodule(model.points[i]['ssm'].module)
            D = next(iter(mixer.D.parameters())) if isinstance(mixer.D, torch.nn.Module) else mixer.D
            D = D.double().numpy()
            close(s['ssm.write'], write, 'dt x B')
            close(s['ssm.y'], np.einsum('blhpn,blhn->blhp', s['ssm.state'], C) + D[:, None]*x, 'y = h C + D x')
            if s['ssm.y'].shape[3] == 1 and model.adapter.family != 'hymba': close(s['ssm.out_proj_in'], (s['ssm.y']*s['ssm.gate'])[..., 0], 'gated')
        if 'ssm.erase' in s and model.adapter.family != 'rwkv7':              # whose removal reads a key without a site
            S, a = np.zeros_like(s['ssm.write'][:, 0]), s['ssm.decay']
            for t in range(a.shape[1]):
                S = S*(a[:, t, ..., None, None] if a.ndim == 3 else a[:, t, :, None])
                S = S - np.einsum('bhpn,bhn,bhm->bhpm', S, s['ssm.B'][:, t], s['ssm.erase'][:, t]) + s['ssm.write'][:, t]
                close(s['ssm.state'][:, t], S, 'h = a h (1 - k e) + beta v k')
            close(s['ssm.y'], np.einsum('blhpn,blhn->blhp', s['ssm.state'], s['ssm.C']), 'y = h q')
            rate = s['ssm.erase']/np.where(np.abs(s['ssm.B']) < 1e-6, np.nan, s['ssm.B'])         # beta, the same for all channels
            beta = np.nanmedian(rate, -1, keepdims=True)
            close(s['ssm.write'], (beta*s['ssm.x'])[..., None]*s['ssm.B'][..., None, :], 'beta v k')
        checked |= set(s)
    assert checked >= {short(n) for n in model._names} - {'embed', 'logits'} and checked <= set(BLOCK_SITES)


@pytest.mark.slow
def test_long_prompts_are_as_exact_as_the_reference(model):
    ids = tokens(1, 1024)
    twin = in_float64(model.hf)
    with float64(twin), torch.no_grad(): truth = twin(ids, use_cache=False).logits
    theirs, ours = model.hf(ids, use_cache=False).logits, model.run(ids).logits
    print(f'{model.adapter.family}: ours {rms(ours - truth):.1e}, transformers {rms(theirs - truth):.1e}')
    assert rms(ours - truth) <= 1.1*rms(theirs - truth)
