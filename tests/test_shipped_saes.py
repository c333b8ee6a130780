"""The coders that ship: they load by name, fit their model, reach the figures of their cards on a sample, and are small."""
import pytest
import torch

from circuitbench.browse import PARTS, SAEInspector
from circuitbench.evaluate import core_metrics
from circuitbench.load import load_model
from circuitbench.registry import SAES, released
from circuitbench.sae import SAE
from circuitbench.stream import shipped_text

torch.set_num_threads(1)
NAMES = [r.name for r in released() if r.name.startswith('tiny://')]


def test_each_model_has_a_coder_of_each_kind_and_all_are_small():
    have = {}
    for name in NAMES:
        model, _, place = name.removeprefix('tiny://').partition('/')
        have.setdefault(model, set()).add(place.split('.', 2)[2])
    vectors = {'resid_post', 'ssm.out_proj_in'}
    assert have == {**dict.fromkeys(('mamba2', 'rwkv7', 'hybrid'), vectors | {'ssm.write'}), **dict.fromkeys(('mamba1', 'jamba'), vectors),
                    'transformer': {'resid_post'}}
    assert sum(f.stat().st_size for f in SAES.rglob('*') if f.is_file()) < 15e6


@pytest.mark.parametrize('name', [pytest.param(n, marks=pytest.mark.slow) if n.endswith('write') else n for n in NAMES])
def test_a_coder_reaches_the_figures_of_its_card(name):
    sae, model = SAE.load(name), load_model('/'.join(name.split('/')[:3]))
    assert sae.check(model) == sae.site and sae.cfg.model == model.name
    m = core_metrics(model, sae, list(shipped_text('held'))[::7], tokens=1024)
    said = sae.metrics
    assert m.explained_variance == pytest.approx(said.fve, abs=.04) and m.l0 == pytest.approx(said.l0, rel=.1)
    assert m.ce['sae'] - m.ce['clean'] == pytest.approx(said.loss_spliced - said.loss_clean, abs=.1)
    card = (SAES/name.removeprefix('tiny://')/'README.md').read_text()
    assert f"SAE.load('{name}')" in card and f'{said.fve:.4f}' in card


def test_a_shipped_coder_opens_in_every_view():
    model, sae = load_model('tiny://mamba2'), SAE.load('tiny://mamba2/blocks.3.ssm.out_proj_in')
    shown = SAEInspector(sae.report(model, tokens=2048), model=model, sae=sae)
    latent = int(shown.report.frequency.argmax())
    for part in PARTS: assert f'atent {latent}' in shown.set(latent=latent, show=part).html
    half = sae.to(torch.bfloat16).report(model, tokens=2048)
    assert half.peak.dtype == torch.float32 and half.frequency.argmax() == latent
