"""Accuracy of the whole model at length, judged by a float64 step-by-step model written apart: ours beside a float32 loop and beside transformers."""
import oracle
import pytest
import torch
import torch.nn.functional as F
from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

from circuitbench.hook import HookedModel
from circuitbench.load import load_model  # noqa: F401, registers the families
from circuitbench.seam import swapped


def plain_mamba2(live, original):
    "The recurrence of Mamba-2 step by step in float32, in transformers' place."
    def scan(x, dt, A, B, C, chunk_size, D=None, dt_bias=None, dt_softplus=False, dt_limit=None, **kwargs):
        dt, S, ys = F.softplus(dt + dt_bias), x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[-1]), []
        B, C = (v.repeat_interleave(x.shape[2]//v.shape[2], 2) for v in (B, C))
        for t in range(x.shape[1]):
            S = torch.exp(dt[:, t]*A)[..., None, None]*S + (dt[:, t, :, None]*x[:, t])[..., None]*B[:, t, :, None]
            ys.append((S*C[:, t, :, None]).sum(-1))
        return torch.stack(ys, 1) + D[:, None]*x
    return scan


def plain_mamba1(live, original):
    "The same for Mamba-1."
    def scan(x, dt, A, B, C, D=None, z=None, delta_bias=None, **kwargs):
        dt, S, ys = F.softplus(dt + delta_bias[:, None]), x.new_zeros(*x.shape[:2], A.shape[-1]), []
        for t in range(x.shape[2]):
            S = torch.exp(dt[..., t, None]*A)*S + (dt[..., t]*x[..., t])[..., None]*B[:, None, :, t]
            ys.append((S*C[:, None, :, t]).sum(-1))
        return (torch.stack(ys, -1) + D[:, None]*x)*F.silu(z)
    return scan


CASES = {
    'mamba2': (lambda layers: Mamba2ForCausalLM(Mamba2Config(vocab_size=1000, hidden_size=768, num_hidden_layers=layers, num_heads=24, head_dim=64, state_size=128, n_groups=1)),
               'mamba2_chunk_scan', plain_mamba2),
    'mamba1': (lambda layers: MambaForCausalLM(MambaConfig(vocab_size=1000, hidden_size=768, num_hidden_layers=layers, state_size=16)), 'mamba_selective_scan', plain_mamba1)}


def errors(family, length, layers=4):
    "Largest error of the logits against float64: ours, ours with every site listened to, a float32 loop, transformers; and the largest logit."
    make, name, plain = CASES[family]
    torch.manual_seed(0)
    model = HookedModel(make(layers))
    ids = torch.randint(0, 1000, (1, length))
    truth = torch.from_numpy(oracle.run(model.hf, ids, every=False)['logits'])
    off = lambda logits: float((logits.double() - truth).abs().max())
    every = [n for n in model._names if not n.endswith(('.write', '.state', '.decay'))]
    with torch.no_grad():
        with swapped(model.module, {name: plain}, None): loop = off(model.hf(ids, use_cache=False).logits)
        listening = off(model.run_with_cache(ids, every)[0].logits)
        states = off(model.run_with_cache(ids, 'ssm.state', at='every:32', heads=[0])[0].logits)
        return dict(ours=off(model.run(ids).logits), listening=listening, states=states, loop=loop,
                    transformers=off(model.hf(ids, use_cache=False).logits), largest=float(truth.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize('family, length', [('mamba2', 64), ('mamba2', 256), ('mamba2', 2048), ('mamba1', 64), ('mamba1', 512)])
def test_error_at_length(family, length, capsys):
    e = errors(family, length)
    with capsys.disabled(): print(f'\n{family} at length {length}:', {k: f'{v:.2g}' for k, v in e.items()})
    assert max(e['ours'], e['listening'], e['states']) <= 1.5*e['loop']
    if length <= 64:                                       # some CPUs' matrix products alone are off by more than 1e-5
        assert abs(e['ours'] - e['transformers']) <= 1e-5*e['largest']
        assert e['ours'] <= max(1e-5*e['largest'], 1.1*e['transformers'])
