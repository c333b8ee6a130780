"""What each expert adds: against the equations of every family's mixture in float64 numpy, and against transformers' bare models."""
import copy

import numpy as np
import pytest
import torch
from checkpoints import SHAPES, in_float64, random_model
from exact import float64

from circuitbench.edit import apply, patch, zero
from circuitbench.hook import HookedModel
from circuitbench.load import load_model
from circuitbench.site import families, short

CASES = [('jamba', 0), ('jamba', 2), ('nemotron-h', 2), ('nemotron-h', 3), ('granite-hybrid', 0), ('granite-hybrid', 2), ('qwen3-next', 0),
         ('qwen3-next', dict(decoder_sparse_step=2, mlp_only_layers=[3], norm_topk_prob=False, num_experts_per_tok=3)), ('kimi-linear', 0),
         ('kimi-linear', dict(n_shared_experts=2, num_local_experts=6, n_group=2, topk_group=1, num_experts_per_tok=3, norm_topk_prob=False))]
MIXTURE = {'jamba': 'feed_forward', 'nemotron-h': 'mixer', 'granite-hybrid': 'block_sparse_moe', 'qwen3-next': 'mlp', 'kimi-linear': 'mlp'}


def top(x): return float(x.detach().abs().max())
def tokens(batch=2, length=17): return torch.randint(1, 61, (batch, length), generator=torch.Generator().manual_seed(3))
def sites(model): return [n for n in model._names if short(n) == 'mlp.experts']
def mixture(model, name, hf=None): return (hf or model.hf).get_submodule(f'{model.adapter.layers}.{name.split(".")[1]}.{MIXTURE[model.adapter.family]}')
def scale(model): return getattr(model.config, 'residual_multiplier', 1.)
def softmax(s): return (e := np.exp(s - s.max(-1, keepdims=True)))/e.sum(-1, keepdims=True)
def sigmoid(s): return 1/(1 + np.exp(-s))
def best(s, k): return s >= np.sort(s, -1)[..., -k, None]
def number(p): return p.detach().double().numpy()


@pytest.fixture(scope='module', params=CASES, ids=lambda c: f'{c[0]}-{c[1] if isinstance(c[1], int) else "odd"}')
def model(request):
    hf = random_model(*request.param)
    for name, b in hf.named_buffers():                                    # what balances the load between experts
        if name.endswith('e_score_correction_bias'): b.copy_(.3*torch.randn(b.shape, generator=torch.Generator().manual_seed(1)))
    return HookedModel(hf)


def routed(family, c, router, x):
    "The weight of each expert at each token, 0 where it is not chosen."
    s, k = x @ number(router.weight).T, c.num_experts_per_tok
    if family == 'granite-hybrid': return softmax(np.where(best(s, k), s, -np.inf))
    if family in ('jamba', 'qwen3-next'):
        w = np.where(best(softmax(s), k), softmax(s), 0)
        return w/w.sum(-1, keepdims=True) if family == 'qwen3-next' and c.norm_topk_prob else w
    choice = sigmoid(s) + number(router.e_score_correction_bias)
    groups = choice.reshape(*s.shape[:-1], c.n_group, -1)
    open_ = best(np.sort(groups, -1)[..., -2:].sum(-1), c.topk_group)[..., None]
    w = np.where(best(np.where(open_, groups, -np.inf).reshape(s.shape), k), sigmoid(s), 0)
    return c.routed_scaling_factor*(w/w.sum(-1, keepdims=True) if c.norm_topk_prob else w)


def equations(model, name, x):
    "What each expert adds, (batch, pos, expert, d_model) in float64 numpy."
    family, c, mix = model.adapter.family, model.config, mixture(model, name)
    w = routed(family, c, mix.router if hasattr(mix, 'router') else mix.gate, x)
    latent = getattr(c, 'moe_latent_size', None)
    if latent: x = x @ number(mix.fc1_latent_proj.weight).T + number(mix.fc1_latent_proj.bias)
    out = []
    for e in range(w.shape[-1]):
        if family == 'nemotron-h': h = np.maximum(x @ number(mix.experts.up_proj[e]).T, 0)**2
        else:
            gate, up = np.split(x @ number(mix.experts.gate_up_proj[e]).T, 2, -1)
            h = gate*sigmoid(gate)*up
        out.append(w[..., e, None]*(h @ number(mix.experts.down_proj[e]).T))
    out = np.stack(out, 2)
    return scale(model)*(out @ number(mix.fc2_latent_proj.weight).T if latent else out)


def beside(model, name, x):
    "What the MLP adds besides its routed experts."
    family, mix, x = model.adapter.family, mixture(model, name), torch.from_numpy(x)
    twin = lambda m: copy.deepcopy(m).double()
    if family == 'jamba': return 0
    if family == 'granite-hybrid': return scale(model)*number(twin(model.blocks[int(name.split('.')[1])].shared_mlp)(x))
    if family == 'qwen3-next': return sigmoid(number(twin(mix.shared_expert_gate)(x)))*number(twin(mix.shared_expert)(x))
    bias = getattr(getattr(mix, 'fc2_latent_proj', None), 'bias', None)
    return number(twin(mix.shared_experts)(x)) + (0 if bias is None else number(bias))


def test_families_with_experts_are_here():
    assert {f for f in SHAPES for s in range(len(SHAPES[f])) if any(type(m).__name__.endswith('Experts') for m in random_model(f, s).modules())} == {*MIXTURE}


def test_blocks_with_experts_have_the_site(model):
    have = {n.split('.')[1] for n in sites(model)}
    assert have == {str(i) for i, b in enumerate(model.blocks) if any(type(m).__name__.endswith('Experts') for m in b.modules())} and have
    assert not {*sites(model)} & {*model.site_names()}                                  # read only when named


def test_it_is_what_the_equations_say(model):
    ids = tokens()
    _, cache = model.run_with_cache(ids, [*sites(model), 'mlp_in', 'mlp_out'])
    for n in sites(model):
        x, parts, total = (cache[n.replace('mlp.experts', s)].double().numpy() for s in ('mlp_in', 'mlp.experts', 'mlp_out'))
        want = equations(model, n, x)
        assert parts.shape == want.shape == model.site_shape(n, 2, 17)
        np.testing.assert_allclose(parts, want, rtol=0, atol=3e-6*np.abs(want).max(), err_msg=n)
        assert ((parts == 0).all(-1) == (want == 0).all(-1)).all() and ((parts != 0).any(-1).sum(-1) == model.config.num_experts_per_tok).all()
        np.testing.assert_allclose(parts.sum(2) + beside(model, n, x), total, rtol=0, atol=3e-6*np.abs(total).max(), err_msg=n)


def test_an_expert_without_weight_is_an_expert_set_to_zero(model):
    ids, e, t = tokens(), 1, [2, 5, 11]
    for n in sites(model):
        _, cache = model.run_with_cache(ids, n)
        def less(m, args, kwargs):
            x, index, w = (*args, *kwargs.values())
            here = torch.zeros(2, 17, dtype=torch.bool).index_fill(1, torch.tensor(t), True).view(-1, 1)
            return (x, index, w.masked_fill(here & (index == e), 0)), {}
        with mixture(model, n).experts.register_forward_pre_hook(less, with_kwargs=True): want = model.hf(ids, use_cache=False).logits
        got, clean = model.run(ids, edit=zero(n, at=t, heads=e)).logits, model.run(ids).logits
        assert top(got - want) <= 2e-5*top(want) and top(got[:, :2] - clean[:, :2]) <= 1e-6*top(clean)
        chosen = cache[n][:, t, e].abs().amax() > 0
        assert (top(got - clean) > 1e-4*top(clean)) == bool(chosen)


def test_replacing_a_part_is_the_same_change_of_the_bare_sum(model):
    "Of an expert that the router has not chosen too."
    ids, g = tokens(), torch.Generator().manual_seed(7)
    for n in sites(model):
        x = model.run_with_cache(ids, n.replace('mlp.experts', 'mlp_in'))[1][n.replace('mlp.experts', 'mlp_in')].double().numpy()
        part, new = torch.from_numpy(equations(model, n, x)[:, :, 0]), torch.randn(2, 17, 1, model.config.hidden_size, generator=g)
        change = ((new[:, :, 0] - part)/scale(model)).float()
        with mixture(model, n).register_forward_hook(lambda m, a, out, change=change: out + change.view(out.shape)): want = model.hf(ids, use_cache=False).logits
        got, cache = model.run_with_cache(ids, n, edit=patch(n, new, heads=0))
        assert top(got.logits - want) <= 3e-5*top(want) and torch.equal(cache[n][:, :, :1], new)


def test_at_an_edited_position_the_sum_is_that_of_the_parts(model):
    ids, n = tokens(), sites(model)[-1]
    _, before = model.run_with_cache(ids, n.replace('mlp.experts', 'mlp_out'))
    out = n.replace('mlp.experts', 'mlp_out')
    _, after = model.run_with_cache(ids, [out, n], edit=zero(n, at=4))
    assert not after[n][:, 4].any() and torch.equal(after[out][:, 5:], before[out][:, 5:]) and torch.equal(after[out][:, :4], before[out][:, :4])
    if model.adapter.family == 'jamba': assert not after[out][:, 4].any()               # nothing beside them: exactly 0


def test_gradients_equal_the_bare_models(model):
    ids, names = tokens(), sites(model)
    out, cache = model.run_with_cache(ids, ['embed', *names], grad=True)
    got, leaf, hooks = cache.grad(out.logits[:, -1, 3].sum()), {}, []
    for n in names:
        leaf[n] = torch.zeros(model.site_shape(n, *ids.shape), requires_grad=True)
        add = lambda m, a, out, n=n: out + (leaf[n].sum(2)/scale(model)).view(out.shape)
        hooks.append(mixture(model, n).register_forward_hook(add))
    try:
        start = []
        def cut(m, a, out): return start.append(out.detach().requires_grad_()) or start[0]
        hooks.append(model.hf.get_input_embeddings().register_forward_hook(cut))
        metric = model.hf(ids, use_cache=False).logits[:, -1, 3].sum()
    finally:
        for h in hooks: h.remove()
    *want, embed = torch.autograd.grad(metric, [*leaf.values(), start[0]])
    for n, w in zip(names, want): assert top(w) > 0 and top(got[n] - w) <= 1e-4*top(w), n
    assert top(got['embed']*model.ends['embed'].scale - embed) <= 1e-4*top(embed)       # the parts are on the way once


def test_the_derivative_of_a_strength_is_a_finite_difference(model):
    ids, twin, e = tokens(), in_float64(model.hf), 1
    wide = HookedModel(twin)
    n = sites(model)[-1]
    def logit(keep):
        def less(m, args, kwargs):
            x, index, w = (*args, *kwargs.values())
            return (x, index, torch.where(index == e, keep*w, w)), {}
        with float64(twin), mixture(wide, n).experts.register_forward_pre_hook(less, with_kwargs=True):
            return float(twin(ids, use_cache=False).logits[:, 9:, 3].sum())
    s = torch.tensor(.5, dtype=torch.float64, requires_grad=True)
    slope, = torch.autograd.grad(wide.run(ids, edit=s*zero(n, heads=e), grad=True).logits[:, 9:, 3].sum(), s)
    want = (logit(.5 - 1e-4) - logit(.5 + 1e-4))/2e-4
    assert abs(float(slope) - want) <= 1e-4*abs(want) + 1e-9, (float(slope), want)


def test_nobody_asks_and_nothing_changes(model):
    ids, names = tokens(), sites(model)
    theirs, ours = model.hf(ids, use_cache=False).logits, model.run(ids).logits
    assert torch.equal(model.run(ids, backend='transformers').logits, theirs)
    assert torch.equal(model.run_with_cache(ids, names)[0].logits, ours)                # who only reads leaves the sum alone
    assert torch.equal(model.run_with_cache(ids, names, backend='transformers')[0].logits, theirs)
    assert torch.equal(model.run(ids, edit=[0*zero(n) for n in names]).logits, ours)
    experts = [mixture(model, n).experts for n in names]
    def fail(x): raise RuntimeError('stop')
    with pytest.raises(RuntimeError, match='stop'): model.run(ids, edit=apply(names[-1], fail))
    assert not any(m._forward_hooks or m._forward_pre_hooks for x in experts for m in x.modules())
    calls = []
    for x in experts: x.forward = lambda *a, f=x.forward: calls.append(len(a[0])) or f(*a)
    try:
        model.run_with_cache(ids)
        assert calls == [34]*len(experts)                                               # once a block, on the tokens
    finally:
        for x in experts: del x.forward
    assert torch.equal(model.run(ids).logits, ours)


def test_one_expert_is_read_by_its_number(model):
    ids, n = tokens(), sites(model)[0]
    whole, one = (model.run_with_cache(ids, n, heads=h)[1][n] for h in (None, [1]))
    assert torch.equal(one, whole[:, :, 1:2])
    with pytest.raises(ValueError, match='heads'): model.run(ids, edit=zero(n, heads=model.heads(n)))


@pytest.mark.parametrize('how', ['batched_mm', 'eager'])
def test_every_way_of_computing_gives_the_same(model, how):
    ids, names, before = tokens(), sites(model), model.hf.config._experts_implementation
    _, want = model.run_with_cache(ids, names)
    model.hf.set_experts_implementation(how)
    try: out, got = model.run_with_cache(ids, names)
    finally: model.hf.set_experts_implementation(before)
    for n in names: assert top(got[n] - want[n]) <= 1e-5*top(want[n])


def test_a_model_without_experts_has_no_site():
    model = load_model('tiny://jamba')                                                  # one MLP a block
    assert 'expert' not in model.sizes and not sites(model)
    assert all('mlp.experts' not in a.block_sites(c, i) for f, a in families().items() if f not in MIXTURE for c in [a.small(61)] for i in range(c.num_hidden_layers))
