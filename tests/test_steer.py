"""Steering, against hooks on the bare model, float64 numpy and decoding a token at a time without a cache."""
import math

import numpy as np
import oracle
import pytest
import torch
from test_sweep import bare, rest

from circuitbench.direction import given_direction
from circuitbench.load import load_model
from circuitbench.sae import SAE, SAEConfig
from circuitbench.scores import kl_divergence
from circuitbench.site import SiteError
from circuitbench.steer import Steered, steer, steer_view, sweep_view
from circuitbench.steer_board import SteerInspector

TEXT = 'Hello you'
IDS = [5, 9, 41, 7, 200, 9, 3]


@pytest.fixture
def model(mamba):
    "What is checked here against hooks and equations of a Mamba block; `test_verbs` is for the other families."
    return mamba


def vector(n, seed=0): return torch.randn(n, generator=torch.Generator().manual_seed(seed))


def unit(v): return v/v.norm()


class Coder:
    "The least that an SAE must be."
    def __init__(self, d, site, model=None): self.W_dec, self.site, self.model = 3*vector(40*d).view(40, d), site, model


class Hooked:
    "The bare model with a push by a plain hook: at the input of the output projection, or at the mixer's output."
    def __init__(self, model, layer, site, push, at=slice(None)):
        mixer = model.blocks[layer].mixer
        def added(x):
            x = x.clone()
            x[:, at] += push
            return x
        if site == 'mixer_out': self.handle = mixer.register_forward_hook(lambda m, a, out: added(out))
        else: self.handle = mixer.out_proj.register_forward_pre_hook(lambda m, a: (added(a[0]),))
        self.hf = model.hf

    def __enter__(self): return lambda ids: self.hf(torch.as_tensor(ids)).logits.detach()
    def __exit__(self, *_): self.handle.remove()


def kl_numpy(a, b):
    "KL of softmax(a) and softmax(b), float64."
    p, q = (v - v.max(-1, keepdims=True) for v in (np.asarray(a, np.float64), np.asarray(b, np.float64)))
    p, q = (v - np.log(np.exp(v).sum(-1, keepdims=True)) for v in (p, q))
    return (np.exp(p)*(p - q)).sum(-1)


# -- the forward pass --------------------------------------------------------------------
@pytest.mark.parametrize('site', ['out_proj_in', 'mixer_out'])
@pytest.mark.parametrize('strength', [2., -.5, 100.])
def test_the_change_is_that_of_a_plain_hook(model, site, strength):
    d = model.site_shape(model.site_names(site)[0], 1, 1)[-1]
    out = steer(model, IDS, vector=vector(d), strength=strength, layer=1, site=site, max_new_tokens=0)
    clean = model.hf(torch.tensor([IDS])).logits[0]
    with Hooked(model, 1, site, strength*unit(vector(d))) as run: pushed = run([IDS])[0]
    assert out.delta_norm == pytest.approx(float((pushed - clean)[-1].norm()), rel=1e-3) and out.delta_norm > 0
    np.testing.assert_allclose(out.kl, kl_numpy(clean, pushed), rtol=1e-3, atol=2e-4)
    assert torch.allclose(out.steered_logits, pushed[-1], atol=1e-3)
    assert torch.allclose(out.clean_logits, clean[-1], atol=1e-3)
    assert out.kl_mean == pytest.approx(float(out.kl.mean())) and bare(model)


def test_a_push_at_heads_is_that_of_the_equations(model):
    sites = oracle.run(model.hf, np.array([IDS]))
    h, p = model.sizes['head'], model.sizes['d_head']
    out = steer(model, IDS, vector=vector(h*p), strength=3., layer=1, site='ssm.y', max_new_tokens=0)
    y = sites['blocks.1.ssm.y'] + 3*unit(vector(h*p).double()).view(h, p).numpy()
    want = rest(model.hf, sites, y)[0]
    assert out.delta_norm == pytest.approx(np.linalg.norm(want[-1] - sites['logits'][0, -1]), rel=2e-3)
    np.testing.assert_allclose(out.kl, kl_numpy(sites['logits'][0], want), rtol=5e-3, atol=1e-3)
    lengths = np.linalg.norm(sites['blocks.1.ssm.y'][0].reshape(len(IDS), -1), axis=1)
    assert out.scale == pytest.approx(lengths.mean(), rel=1e-3)


def test_a_push_on_the_state_accumulates(model):
    shape = model.site_shape('blocks.1.ssm.state', 1, 1)[2:]
    v = vector(math.prod(shape))
    out = steer(model, IDS, vector=v, strength=2., layer=1, site='ssm.state', max_new_tokens=0)
    sites, w = oracle.run(model.hf, np.array([IDS])), oracle.weights(model.hf)
    decay, C, x = (sites[f'blocks.1.ssm.{k}'] for k in ('decay', 'C', 'x'))
    decay = decay if decay.ndim == 4 else decay[..., None]
    S, y = np.zeros((1, *shape)), np.zeros_like(x)
    for t in range(len(IDS)):
        S = decay[:, t, :, None]*S + sites['blocks.1.ssm.write'][:, t] + 2*unit(v.double()).view(shape).numpy()
        y[:, t] = np.einsum('bhpn,bhn->bhp', S, C[:, t]) + w['backbone.layers.1.mixer.D'][:, None]*x[:, t]
    want = rest(model.hf, sites, y)[0]
    assert out.delta_norm == pytest.approx(np.linalg.norm(want[-1] - sites['logits'][0, -1]), rel=3e-3)


def test_kl_in_float64():
    a, b = 5*vector(3*4*50).view(3, 4, 50), 5*vector(3*4*50, 1).view(3, 4, 50)
    np.testing.assert_allclose(kl_divergence(a, b), kl_numpy(a, b), rtol=1e-10)
    assert (kl_divergence(a, a) == 0).all() and kl_divergence(a, a + 1e-4).min() >= 0
    assert kl_divergence(a.bfloat16(), b.bfloat16()).dtype == torch.float64


def test_strength_zero_is_the_clean_run_bit_for_bit(model):
    out = steer(model, TEXT, vector=vector(64), strength=0, layer=1, max_new_tokens=8)
    assert torch.equal(out.steered_logits, out.clean_logits)
    assert torch.equal(out.clean_logits, model.run(TEXT).logits[0, -1])
    assert out.delta_norm == 0 and out.kl_mean == 0 and (out.text_kl == 0).all()
    assert len(out.text_kl) == len(out.text_tokens) == 8
    assert out.steered_text == out.clean_text == model.generate(TEXT, 8).text[0]


# -- the text ----------------------------------------------------------------------------
LAST = len(TEXT) - 1
AT = [(None, range(99)), ([2], [2]), (slice(-2, None), range(LAST - 1, 99)), ([-1, LAST + 3], [LAST, LAST + 3]),
      (slice(1, None, 3), range(1, 99, 3)), (slice(1, -2), range(1, LAST - 1))]


@pytest.mark.parametrize('at, chosen', AT)
def test_the_text_is_that_of_decoding_without_a_cache(model, at, chosen):
    n, more = len(TEXT), 7
    out = steer(model, TEXT, vector=vector(64), strength=6., layer=0, at=at, max_new_tokens=more)
    ids = model.tokens(TEXT)[0]
    def pushed():
        here = [p for p in chosen if p < ids.shape[1]]
        with Hooked(model, 0, 'out_proj_in', 6*unit(vector(64)), here) as run: return run(ids)
    delta = float((pushed() - model.hf(ids).logits)[0, -1].norm())
    assert out.delta_norm == pytest.approx(delta, rel=1e-3, abs=1e-4)
    for _ in range(more):
        logits = pushed()
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert out.text_tokens == tuple(model.strings(ids[0, n:]))
    assert out.steered_text == model.tokenizer.decode(ids[0, n:], skip_special_tokens=True)
    np.testing.assert_allclose(out.text_kl, kl_numpy(model.hf(ids).logits, pushed())[0, n - 1:-1], rtol=5e-3, atol=1e-3)
    assert out.text_kl[0] == pytest.approx(float(out.kl[-1]), rel=1e-3, abs=1e-5)


def test_the_edit_can_be_used_again(model):
    out = steer(model, TEXT, vector=vector(64), strength=3., layer=1, max_new_tokens=4)
    assert torch.equal(model.run(TEXT, edit=out.edit).logits[0, -1], out.steered_logits)
    assert model.generate(TEXT, 4, edit=out.edit).text[0] == out.steered_text
    more = out.again(-5.)
    fresh = steer(model, TEXT, vector=vector(64), strength=-5., layer=1, max_new_tokens=4)
    assert torch.equal(more.steered_logits, fresh.steered_logits) and torch.equal(more.text_kl, fresh.text_kl)
    assert more.strength == -5
    assert more.clean_text is out.clean_text and more.again(3.).steered_text == out.steered_text


def test_sampled_texts_share_their_draws(model):
    kw = dict(vector=vector(64), layer=1, max_new_tokens=10, do_sample=True)
    for seed in (None, 3):
        out = steer(model, TEXT, strength=0., seed=seed, **kw)
        assert out.steered_text == out.clean_text
    first, second = (steer(model, TEXT, strength=4., seed=3, **kw) for _ in range(2))
    assert first.steered_text == second.steered_text


def test_a_greedy_text_leaves_the_random_numbers_alone(model):
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    steer(model, TEXT, vector=vector(64), layer=1, max_new_tokens=3)
    assert torch.equal(torch.rand(3), want)


# -- latents -----------------------------------------------------------------------------
def test_a_latent_is_its_decoder_row_of_length_one(model):
    coder = Coder(64, 'blocks.1.ssm.out_proj_in')
    out = steer(model, TEXT, 7, 2., coder, max_new_tokens=3)
    same = steer(model, TEXT, vector=coder.W_dec[7], strength=2., layer=1, max_new_tokens=3)
    assert torch.equal(out.steered_logits, same.steered_logits) and out.label == 'latent 7' and out.site == coder.site
    shape = model.site_shape('blocks.0.ssm.y', 1, 1)[2:]
    by_head = Coder(math.prod(shape), 'blocks.0.ssm.y', model.name)
    kw = dict(strength=2., layer=0, max_new_tokens=0)
    y = steer(model, TEXT, vector=by_head.W_dec[3].view(shape), site='ssm.y', **kw)
    assert steer(model, TEXT, feature_id=3, sae=by_head, **kw).delta_norm == y.delta_norm > 0


def test_the_call_of_the_quick_start(model):
    sae = SAE(SAEConfig(64, 512, 32, 'blocks.1.ssm.out_proj_in', model=model.name))
    out = steer(model, prompt='Hello', feature_id=42, strength=2.0, sae=sae, layer=1)
    assert isinstance(out, Steered) and out.delta_norm > 0 and len(out.kl) == 5 and len(out.text_kl) == 30
    assert out.tokens == tuple('Hello')
    assert out.clean_text in repr(out).replace('\\\\', '\\') or repr(out.clean_text) in repr(out)
    moved = out.moved(3)
    p, q = out.clean_logits.double().softmax(-1), out.steered_logits.double().softmax(-1)
    assert abs(moved[0][2] - moved[0][1]) == pytest.approx(float((p - q).abs().max())) and len(moved) == 3


# -- what cannot be ----------------------------------------------------------------------
SITE = 'blocks.1.ssm.out_proj_in'


def plain(v, **kw): return dict(feature_id=None, sae=None, vector=v) | kw


@pytest.mark.parametrize('kw, says', [
    (dict(strength=math.nan), 'finite'), (dict(strength=math.inf), 'finite'), (dict(strength='2'), 'finite'),
    (dict(strength=True), 'finite'), (dict(feature_id=40), '0 to 39'), (dict(feature_id=-1), '0 to 39'),
    (dict(feature_id=1.5), '0 to 39'), (dict(feature_id=None), 'neither'), (dict(vector=vector(64)), 'both'),
    (dict(sae=None), 'no SAE'), (dict(layer=0), 'same layer'), (dict(layer=2), '0 to 1'), (dict(layer=-1), '0 to 1'),
    (dict(sae=Coder(64, SITE, 'another')), 'SAE of another'), (dict(sae=Coder(63, SITE)), '63 numbers, expected 64'),
    (dict(site='mixer_out'), 'for an SAE of'), (dict(prompt=''), 'empty prompt'),
    (dict(prompt=['a', 'b']), '2 prompts'), (dict(at=99), 'position 99'),
    (dict(at=[-10]), 'position -10'), (dict(max_new_tokens=-1), 'max_new_tokens'),
    (plain(vector(64)), 'no layer'), (plain(torch.zeros(64), layer=1), 'length 0'),
    (plain(torch.full((64,), math.nan), layer=1), 'not finite'), (plain(vector(9), layer=1), '9 numbers'),
    (plain(vector(9), layer=7), '0 to 1'), (plain(vector(9), site='blocks.*.resid_*', layer=1), 'several'),
    (plain(vector(64), site=SITE, layer=0), 'same layer')])
def test_bad_input_is_said_in_one_or_two_lines(model, kw, says):
    kw = dict(prompt=TEXT, feature_id=7, sae=Coder(64, SITE)) | kw
    with pytest.raises(ValueError, match=says) as e: steer(model, **kw)
    assert str(e.value).count('\n') < 2 and len(str(e.value)) < 240 and bare(model)


def test_an_sae_of_another_model_layer_or_site(model):
    make = lambda **kw: SAE(SAEConfig(**dict(d_in=64, d_sae=128, k=4, site=SITE, model=model.name) | kw))
    misfits = [(make(model='tiny://other'), {}), (make(), dict(layer=0)), (make(), dict(site='mixer_out')),
               (make(d_in=32), {})]
    for sae, kw in misfits:
        with pytest.raises(ValueError): steer(model, TEXT, 3, sae=sae, **kw)
    with pytest.raises(SiteError): steer(model, TEXT, vector=vector(9), layer=0, site='attn.z')
    with pytest.raises(SiteError): steer(model, TEXT, 3, sae=Coder(9, 'blocks.1.attn.z'))


def test_no_hook_stays_after_an_exception(model):
    out = steer(model, TEXT, vector=vector(64), layer=1, max_new_tokens=2)
    with pytest.raises(ValueError): out.again(math.nan)
    with pytest.raises((TypeError, ValueError)): steer(model, TEXT, vector=vector(64), layer=1, nonsense_option=3)
    assert bare(model) and steer(model, TEXT, vector=vector(64), layer=1, max_new_tokens=2).delta_norm == out.delta_norm


def test_a_model_without_a_tokenizer():
    model = load_model('mock://mamba2-tiny')
    model.tokenizer = None
    out = steer(model, [1, 2, 3], vector=vector(64), layer=0, max_new_tokens=3)
    assert out.prompt == '1 2 3' and len(out.clean_text.split()) == 3 and steer_view(out)


# -- views -------------------------------------------------------------------------------
@pytest.fixture(scope='module')
def pushed():
    return steer(load_model('mock://mamba2-tiny'), 'A <b>', vector=vector(64), strength=40., layer=1, max_new_tokens=10)


def test_view_figure_and_pages(pushed, tmp_path):
    html = steer_view(pushed)
    assert 'A &lt;b&gt;' in html and '<b>' not in html and 'steered' in html and html == steer_view(pushed)
    assert steer_view(pushed.again(0)).count('<mark>') == 0 < html.count('<mark>')
    short = steer(load_model('mock://mamba2-tiny'), 'A', vector=vector(64), layer=1, max_new_tokens=0)
    assert 'Steered text' not in steer_view(short) and math.isnan(short.text_kl_mean) and short.plot()
    pushed.plot().savefig(tmp_path/'p.png')
    one = pushed.to_html(tmp_path/'one.html').read_text()
    many = pushed.to_html(tmp_path/'many.html', [-4, 0, 2]).read_text()
    assert 'type="range"' not in one and many.count('data-k="') == 4 and many.count(' hidden>') == 3
    assert len(many) < 300_000
    assert {p.name for p in tmp_path.iterdir()} == {'p.png', 'one.html', 'many.html'}
    with pytest.raises(ValueError, match='no push'): sweep_view([])


def test_a_page_is_written_whole_or_not_at_all(pushed, tmp_path):
    with pytest.raises(ValueError, match='finite'): pushed.to_html(tmp_path/'x.html', [math.nan])
    assert list(tmp_path.iterdir()) == []


def begins_with(look, out):
    "Does an inspector show what a result says?"
    assert isinstance(look, SteerInspector) and tuple(look.result['steered']) == out.text_tokens and look.about['tokens'] == [*out.tokens]
    np.testing.assert_allclose(look.result['kl'], out.text_kl, rtol=1e-3, atol=1e-6)
    assert look.result['mean_kl'] == pytest.approx(out.text_kl_mean, rel=1e-3, abs=1e-7)
    d, = look.directions.values()
    assert (d.site, d.source) == (out.site, out.label)
    assert look.rows[0].strength == out.strength and d.norm == pytest.approx(1, rel=1e-6)


@pytest.mark.parametrize('at, chosen', AT)
def test_the_inspector_begins_with_the_result(model, at, chosen):
    kw = dict(vector=vector(64), layer=0, at=at, max_new_tokens=7)
    out = steer(model, TEXT, strength=6., **kw)
    look = out.inspect()
    begins_with(look, out)
    n = len(TEXT)
    assert look.result['clean_ids'] == model.generate(TEXT, 7).tokens[0, n:].tolist() and look.settings['new'] == 7
    with look.plan.on(model): planned = model.run(TEXT).logits[0]
    np.testing.assert_allclose(kl_numpy(model.run(TEXT).logits[0], planned), out.kl, rtol=1e-3, atol=1e-6)
    begins_with(look.set(out.label, strength=-3.).set(out.label, strength=6.), out)
    more = steer(model, TEXT, strength=-3., **kw)
    begins_with(out.again(-3.).inspect(), more)
    assert look.set(out.label, strength=-3.).result['steered_ids'] == model.generate(TEXT, 7, edit=more.edit).tokens[0, n:].tolist()


@pytest.mark.parametrize('options', [dict(do_sample=True, seed=2), dict(do_sample=True), dict(repetition_penalty=1.3), dict(no_repeat_ngram_size=1)])
def test_the_inspector_writes_under_the_options_of_the_call(model, options):
    out = steer(model, TEXT, vector=vector(64), strength=4., layer=1, max_new_tokens=9, **options)
    look = out.inspect()
    begins_with(look, out)
    assert look.set(out.label, strength=0.).result['steered_ids'] == look.result['clean_ids']
    assert model.tokenizer.decode(look.result['clean_ids'], skip_special_tokens=True) == out.clean_text


def test_the_inspector_of_a_latent_of_a_state_and_of_no_text(model):
    coder = Coder(64, 'blocks.1.ssm.out_proj_in')
    ids = steer(model, IDS, 7, 2., coder, max_new_tokens=5)
    begins_with(ids.inspect(), ids)
    shape = model.site_shape('blocks.1.ssm.state', 1, 1)[2:]
    state = steer(model, TEXT, vector=vector(math.prod(shape)), strength=2., layer=1, site='ssm.state', max_new_tokens=5)
    begins_with(state.inspect(), state)
    assert state.inspect().rows[0].kind == 'push'
    none = steer(model, TEXT, vector=vector(64), strength=0., layer=1, max_new_tokens=0)
    look = none.inspect()
    assert look.result['steered_ids'] == look.result['clean_ids'] and len(look.result['kl']) == 24 and look.about['directions'][0]['reach'] == 8
    with pytest.raises(ValueError, match='num_beams=1'): steer(model, TEXT, vector=vector(64), layer=1, max_new_tokens=3, num_beams=2).inspect()


def test_more_rows_beside_the_push(pushed):
    other = given_direction(load_model('mock://mamba2-tiny'), vector(32, 1), 'resid_post', 0, source='another')
    look = pushed.inspect(limit=90, directions=[other], score='a')
    reach = lambda look: [c['reach'] for c in look.about['directions']]
    assert [r.name for r in look.rows] == ['a vector', 'another'] and reach(look) == [90, 4] and look.about['score'] == "probability of 'a'"
    assert tuple(look.result['steered']) == pushed.text_tokens and look.set('another', strength=3.).result['rows'][1]['strength'] == 3
    assert reach(pushed.inspect()) == [80] and reach(pushed.inspect(limit=1)) == [40]
    with pytest.raises(ValueError, match='a name of its own'): pushed.inspect(directions={'a vector': other})
    with pytest.raises(TypeError, match='expected a Direction'): pushed.inspect(directions=[3])
