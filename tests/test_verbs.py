"""SAEs, circuits and steering on families other than the Mambas, at the site that each has by default."""
import pytest
import torch

from circuitbench.edit import add, zero
from circuitbench.load import load_model
from circuitbench.site import short
from circuitbench.steer import steer
from circuitbench.sweep import sweep_sites
from circuitbench.train import train_sae

FAMILIES = 'falcon-h1', 'jamba', 'hymba', 'rwkv7', 'nemotron-h', 'zamba2', 'qwen3-next', 'kimi-linear', 'lfm2', 'llama'
TEXT = 'the cat sat on the mat and the dog lay by the door\n'*60


@pytest.fixture(scope='module', params=FAMILIES)
def model(request): return load_model(f'mock://{request.param}-tiny')


def test_an_sae_of_the_default_site(model):
    sae = train_sae(model, layer=0, k=4, expansion=2, tokens=4000, text=TEXT, progress=False)
    assert sae.site == f'blocks.0.{model.hook_point}' and sae.W_dec.shape[1] == model.site_shape(sae.site, 1, 1)[2]
    x = model.run_with_cache('the cat sat on the mat', sae.site)[1][sae.site][0]
    assert float((sae(x) - x).pow(2).mean()/(x - x.mean(0)).pow(2).mean()) < .8       # better than the mean, after a second
    out = steer(model, 'the cat', feature_id=3, strength=5., sae=sae, layer=0, max_new_tokens=3)
    push = 5*sae.W_dec[3]/sae.W_dec[3].norm()
    steered = model.generate('the cat', 3, edit=add(sae.site, push.detach()))
    assert out.steered_text == steered.text[0] and float(out.delta_norm) > 0


def test_the_effects_of_a_circuit_are_those_of_edits(model):
    site = model.hook_point
    found = sweep_sites(model, [5, 9, 41, 7, 200], 17, 30, sites=site, ablation='zero', progress=False)
    diff = lambda out: float(out.last[0, 17] - out.last[0, 30])
    clean = diff(model.run([5, 9, 41, 7, 200]))
    assert found.clean == pytest.approx(clean, abs=1e-3)
    for name in (n for n in model._names if short(n) == site):
        effect = clean - diff(model.run([5, 9, 41, 7, 200], edit=zero(name)))
        row = found.layers.index(int(name.split('.')[1]))
        assert float(found.effects[row, 0]) == pytest.approx(effect, abs=2e-3), name
    assert torch.isfinite(torch.tensor([score for _, score in found.top_layers(n=2)])).all()
