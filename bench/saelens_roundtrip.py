"""Round trips with SAELens, both directions: the largest difference of activations and outputs, case by case.

In float32 two orders of the same arithmetic differ by rounding, so the limit is relative: 1e-6 of the largest value
where that is above 1. In float64 it is 1e-12, and no difference of formats hides below it.

    python bench/saelens_roundtrip.py                                   the table; exits with 1 above the limit
    python bench/saelens_roundtrip.py --hub                             through a stand-in of the Hub, on loopback
    python bench/saelens_roundtrip.py --fixtures tests/data/saelens     writes the small folders that the tests read

Needs an environment with sae-lens beside circuitbench: sae-lens requires an older TransformerLens than the development
environment has, so it gets its own (`pip install torch sae-lens; pip install --no-deps -e .`, then what is missing).
"""
import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import sae_lens
import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.training.activation_scaler import ActivationScaler
from sae_lens.training.sae_trainer import SAETrainer
from safetensors.torch import load_file, save_file

from circuitbench.coder import Place, SAEConfig
from circuitbench.sae import SAE

LIMITS = {'float32': 1e-6, 'float64': 1e-12}
META = {'model_name': 'org/model', 'hook_name': 'blocks.1.hook_out', 'context_size': 64, 'prepend_bos': False}
PLAIN = 'standard', 'topk', 'jumprelu', 'gated'
HALF = 'bfloat16', 'float16'
TRANS = 'transcoder', 'skip_transcoder', 'jumprelu_transcoder', 'jumprelu_skip_transcoder'


def data(n, d, seed=1): return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)) + .2


@torch.no_grad()
def filled(sae, seed=0):
    "Random weights everywhere: rows of any norm, thresholds that matter, one latent in ten or so active."
    make = torch.Generator().manual_seed(seed)
    for name, p in sorted(sae.named_parameters()):
        w = torch.randn(p.shape, generator=make)
        scale = p.shape[1]**-.5 if p.dim() == 2 else .3
        if name == 'W_dec': w *= .5 + torch.rand(len(w), 1, generator=make)
        p.copy_(w.abs() if name == 'threshold' else w*scale - float(name in ('b_enc', 'b_gate')))
    return sae


# -- what sae-lens writes ------------------------------------------------------------
def theirs(arch, sizes, hook=META['hook_name'], **keys):
    "A case: sae-lens makes an SAE of random weights and saves it."
    def write(folder, dtype='float32'):
        d_in, d_sae, k, d_out = sizes
        own = {'k': k} if arch == 'topk' else {'d_out': d_out} if arch in TRANS else {}
        cls, config = get_sae_class(arch)
        meta = META | {'hook_name': hook} | ({'hook_name_out': 'blocks.1.hook_mlp_out'} if arch in TRANS else {})
        if arch in TRANS: own['apply_b_dec_to_input'] = False
        cfg = config.from_dict({'architecture': arch, 'd_in': d_in, 'd_sae': d_sae, 'metadata': meta,
                                'dtype': dtype, **own, **keys})
        filled(cls(cfg)).save_model(folder)
        return sae_lens.SAE.load_from_disk(folder, dtype=dtype)            # half precision is compared in float32
    return write


def checkpoint(arch, sizes, steps=60, **keys):
    "A case: sae-lens trains, and the checkpoint in the middle is read; the truth is its own file for inference."
    def write(folder, dtype='float32'):
        d_in, d_sae, k, _ = sizes
        cls, config = get_sae_training_class(arch)
        own = {'k': k} if 'topk' in arch else {}
        if 'matryoshka' in arch: own['matryoshka_widths'] = [d_sae//4, d_sae//2, d_sae]
        torch.manual_seed(0)
        sae = cls(config.from_dict({'architecture': arch, 'd_in': d_in, 'd_sae': d_sae, 'metadata': META,
                                     'dtype': dtype, **own, **keys}))
        mix, make = torch.randn(d_in, d_in)/d_in**.5, torch.Generator().manual_seed(3)
        def batches():
            while True: yield (torch.randn(64, d_in, generator=make) @ mix + .2).to(sae.dtype)
        with tempfile.TemporaryDirectory() as tmp:
            settings = SAETrainerConfig(64*steps, 64, lr=1e-2, lr_end=1e-2, n_checkpoints=1, checkpoint_path=tmp,
                                        n_batches_for_norm_estimate=5)
            SAETrainer(settings, sae, batches()).fit()
            found, = Path(tmp).iterdir()
            (found/'trainer_state.pt').unlink(missing_ok=True)
            shutil.copytree(found, folder)
            return inference(folder, Path(tmp)/'inference')
    return write


def inference(folder, to):
    "The SAE that sae-lens makes of a checkpoint."
    sae, scaler = sae_lens.TrainingSAE.load_from_disk(folder), ActivationScaler()
    scaler.load(folder/'activation_scaler.json')
    if scaler.scaling_factor is not None: sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    if (w := scaler.whitening) is not None: sae.fold_activation_whitening(w.mean, w.matrix, w.inverse_matrix)
    sae.save_inference_model(to)
    return sae_lens.SAE.load_from_disk(to)


def old(arch, sizes, change, tensors=None):
    "A case: the file of a version before 6, made of a new one."
    def write(folder, dtype='float32'):
        theirs(arch, sizes)(folder, dtype)
        cfg = json.loads((folder/'cfg.json').read_text())
        meta = cfg.pop('metadata')
        cfg |= {k: v for k, v in meta.items() if k not in ('sae_lens_version', 'sae_lens_training_version')}
        (folder/'cfg.json').write_text(json.dumps(change(cfg)))
        if tensors:
            save_file(tensors(load_file(folder/'sae_weights.safetensors')), folder/'sae_weights.safetensors')
        return sae_lens.SAE.load_from_disk(folder)
    return write


def old_topk(cfg):
    "Keys as they were."
    rest = {k: v for k, v in cfg.items() if k not in ('architecture', 'k', 'rescale_acts_by_decoder_norm', 'hook_name')}
    return rest | {'activation_fn_str': 'topk', 'activation_fn_kwargs': {'k': cfg['k']}, 'hook_point': cfg['hook_name']}


def their_cases(sizes):
    cases = {}
    for arch in PLAIN:
        cases[arch] = theirs(arch, sizes)
        cases[f'{arch}-b_dec_not_read'] = theirs(arch, sizes, apply_b_dec_to_input=False)
        for how in ('layer_norm', 'constant_norm_rescale'):
            cases[f'{arch}-{how}'] = theirs(arch, sizes, normalize_activations=how)
        for dtype in HALF: cases[f'{arch}-{dtype}'] = theirs(arch, sizes, dtype=dtype)
    cases['topk-norms'] = theirs('topk', sizes, rescale_acts_by_decoder_norm=True)
    cases['topk-norms-bfloat16'] = theirs('topk', sizes, rescale_acts_by_decoder_norm=True, dtype='bfloat16')
    cases['jumprelu-b_dec_not_read-layer_norm'] = theirs('jumprelu', sizes, apply_b_dec_to_input=False,
                                                         normalize_activations='layer_norm')
    cases['standard-hook_z'] = theirs('standard', sizes, hook='blocks.1.attn.hook_z', reshape_activations='hook_z')
    for arch in TRANS:
        cases[arch] = theirs(arch, sizes)
        cases[f'{arch}-layer_norm'] = theirs(arch, sizes, normalize_activations='layer_norm')
    cases['old-standard'] = old('standard', sizes, lambda c: {k: v for k, v in c.items() if k != 'architecture'})
    cases['old-topk'] = old('topk', sizes, old_topk)
    cases['old-scaling_factor'] = old('standard', sizes, lambda c: c | {'normalize_activations': False},
                                      lambda w: w | {'scaling_factor': torch.ones(len(w['b_enc']))})
    cases['checkpoint-topk'] = checkpoint('topk', sizes)
    cases['checkpoint-jumprelu'] = checkpoint('jumprelu', sizes, l0_coefficient=.1)
    cases['checkpoint-standard'] = checkpoint('standard', sizes)
    cases['checkpoint-gated'] = checkpoint('gated', sizes)
    for arch in ('topk', 'batchtopk', 'matryoshka_batchtopk'):
        for norms in (True, False):
            for how in ('none', 'expected_average_only_in'):
                name = f'checkpoint-{arch}{"" if norms else "-norms_left"}{"" if how == "none" else "-scaled"}'
                cases[name] = checkpoint(arch, sizes, rescale_acts_by_decoder_norm=norms, normalize_activations=how)
    for arch in ('standard', 'gated'):
        for read in (True, False):
            cases[f'checkpoint-{arch}-whitened{"" if read else "-b_dec_not_read"}'] = checkpoint(
                arch, sizes, normalize_activations='covariance_whitening', apply_b_dec_to_input=read)
    return cases


@torch.no_grad()
def truth(sae, sizes, name):
    "Inputs, and what sae-lens makes of them, heads flattened."
    x = data(16 if sizes[0] < 10 else 256, sizes[0]).to(sae.dtype)
    if 'hook_z' not in name: return x, sae.encode(x), sae(x)
    heads = x.view(len(x), 2, -1)
    return x, sae.encode(heads), sae(heads).flatten(1)


# -- what we write -------------------------------------------------------------------
def our_cases(sizes):
    d_in, d_sae, k, d_out = sizes
    site, out = 'blocks.1.resid_post', (Place('blocks.1.mlp_out', (d_out,)),)
    cases = {}
    for kind in ('topk', 'batchtopk', 'jumprelu', 'relu', 'gated'):
        cfg = cases[kind] = SAEConfig(d_in, d_sae, k, site, 'org/model', 'mamba2', context=64, activation=kind)
        for how in ('layer_norm', 'constant_norm_rescale'): cases[f'{kind}-{how}'] = replace(cfg, normalize=how)
        if kind in ('batchtopk', 'jumprelu', 'relu'):
            cases[f'{kind} transcoder'] = replace(cfg, writes=out)
            cases[f'{kind} skip transcoder'] = replace(cfg, writes=out, skip=True)
            cases[f'{kind} skip transcoder-layer_norm'] = replace(cfg, writes=out, skip=True, normalize='layer_norm')
        half = Place('blocks.2.resid_post', (d_in//2,))
        cases[f'{kind} crosscoder'] = replace(cfg, shape=(d_in//2,), beside=(half,))
        cases[f'{kind} heads'] = replace(cfg, site='blocks.1.ssm.y', shape=(2, d_in//2), heads=(1,))
    for kind in ('topk', 'batchtopk', 'relu'):
        cases[f'{kind} rank-1, flat()'] = SAEConfig(d_in, d_sae, k, 'blocks.1.ssm.state', shape=(2, d_in//2),
                                                    heads=(0, 1), rank1=True, activation=kind)
    return cases


def cleaned(sae):
    "Random weights with rows of norm 1, as a coder has them."
    for name in ('dec_v', 'dec_w', 'W_dec'):
        if name in sae._parameters: sae._parameters[name] /= sae._parameters[name].norm(dim=1, keepdim=True)
    return sae


# -- the table -----------------------------------------------------------------------
def top(a, b): return float((a.double() - b.double()).detach().abs().max())


def read_theirs(name, write, sizes, tmp, dtype):
    "Largest differences of activations and outputs, and the largest value, of an SAE that sae-lens wrote."
    folder = tmp/'theirs'/f'{name}-in-{dtype}'
    x, a, y = truth(write(folder, dtype), sizes, name)
    sae = SAE.load(folder)
    if name.endswith(HALF): sae = sae.float()
    assert sae.b_dec.dtype == x.dtype, folder
    return top(sae.encode(x), a), top(sae(x).flatten(1), y), max(top(a, 0*a), top(y, 0*y))


def read_ours(name, cfg, sizes, tmp, dtype):
    "The same of an SAE that we wrote; what sae-lens saves of it again must be ours to the bit."
    folder, sae = tmp/'ours'/f'{name}-in-{dtype}', cleaned(filled(SAE(cfg))).to(getattr(torch, dtype)).flat()
    sae.save(folder)
    back, x = sae_lens.SAE.load_from_disk(folder), data(256, sizes[0]).to(sae.b_dec)
    back.save_model(folder.with_name(f'{folder.name}-again'))
    again = SAE.load(folder.with_name(f'{folder.name}-again'))
    assert again.cfg == sae.cfg and all(torch.equal(p, getattr(again, n)) for n, p in sae.named_parameters()), folder
    a, y = back.encode(x), back(x)
    return top(sae.encode(x), a), top(sae(x).flatten(1), y), max(top(a, 0*a), top(y, 0*y))


def table(sizes, tmp):
    rows, ways = [], (('sae-lens to ours', their_cases, read_theirs), ('ours to sae-lens', our_cases, read_ours))
    for way, made, read in ways:
        for name, case in made(sizes).items():
            single = read(name, case, sizes, tmp, 'float32')
            double = (None,)*3 if name.endswith(HALF) else read(name, case, sizes, tmp, 'float64')
            rows.append((way, name, single, double))
    return rows


FIXTURES = ('standard', 'topk', 'jumprelu', 'gated', 'topk-b_dec_not_read', 'gated-b_dec_not_read',
            'standard-layer_norm', 'jumprelu-constant_norm_rescale', 'topk-bfloat16', 'jumprelu-float16', 'topk-norms',
            'standard-hook_z', 'transcoder', 'skip_transcoder-layer_norm', 'jumprelu_transcoder',
            'jumprelu_skip_transcoder', 'old-standard', 'old-topk', 'old-scaling_factor', 'checkpoint-topk',
            'checkpoint-gated', 'checkpoint-batchtopk',
            'checkpoint-batchtopk-norms_left-scaled', 'checkpoint-matryoshka_batchtopk-scaled',
            'checkpoint-gated-whitened-b_dec_not_read')


def fixtures(root):
    "Small folders as sae-lens writes them, each with the inputs, activations and outputs that it computes."
    sizes = 6, 12, 3, 5
    shutil.rmtree(root, ignore_errors=True)
    for name in FIXTURES:
        x, a, y = truth(their_cases(sizes)[name](root/name), sizes, name)
        said = {'x': x, 'a': a.to_dense(), 'y': y}
        save_file({n: v.contiguous() for n, v in said.items()}, root/name/'truth.safetensors')
    for file in root.rglob('*.safetensors'): file.chmod(0o644)
    (root/'README.md').write_text(f'Written by sae-lens {sae_lens.__version__} on random weights and data: `python '
                                  'bench/saelens_roundtrip.py --fixtures tests/data/saelens`.\n')


# -- the Hub -------------------------------------------------------------------------
def hub():
    "Starts a stand-in of the Hub, and this script as its client."
    sys.path.insert(0, str(Path(__file__).parents[1]/'tests'))
    from hub_server import Hub
    server = Hub()
    with tempfile.TemporaryDirectory() as tmp:
        env = os.environ | dict(HF_ENDPOINT=server.url, HF_HUB_OFFLINE='0', HF_HUB_DISABLE_XET='1', HF_HOME=tmp,
                                HF_TOKEN=server.token, HF_HUB_DISABLE_PROGRESS_BARS='1', NO_PROXY='127.0.0.1,localhost',
                                no_proxy='127.0.0.1,localhost')
        return subprocess.run([sys.executable, __file__, '--hub-client'], env=env).returncode


def hub_client():
    "What we push, sae-lens loads; what sae-lens uploads, we load: largest differences of codes, outputs, frequencies."
    from sae_lens import upload_saes_to_huggingface

    from circuitbench.hub import from_hub, push_to_hub
    sizes, worst = (48, 192, 8, 40), 0.
    cases = {name.replace(' ', '_'): cfg for name, cfg in our_cases(sizes).items() if not cfg.rank1}
    ours = {name: cleaned(filled(SAE(cfg))) for name, cfg in cases.items()}
    for sae in ours.values(): sae.frequency = torch.rand(192)
    push_to_hub(ours, 'org/ours', license='mit')
    x = data(256, sizes[0])
    print(f'{"":40}{"codes":>10}{"outputs":>10}{"frequency":>11}')
    for name, sae in ours.items():
        back, _, sparsity = sae_lens.SAE.from_pretrained_with_cfg_and_sparsity('org/ours', name)
        row = top(sae.encode(x), back.encode(x)), top(sae(x).flatten(1), back(x)), top(10**sparsity, sae.frequency)
        print(f'{"ours from_pretrained: " + name:60}' + ''.join(f'{v:10.1e}' for v in row))
        worst = max(worst, *row)
    with tempfile.TemporaryDirectory() as tmp:
        theirs = {}
        for name, write in their_cases(sizes).items():
            if not name.startswith(('checkpoint', 'old')) and not name.endswith(HALF):
                write(Path(tmp)/name)
                theirs[name] = Path(tmp)/name
        upload_saes_to_huggingface(theirs, 'org/theirs', show_progress=False)
        for name, folder in theirs.items():
            x, a, y = truth(sae_lens.SAE.load_from_disk(folder), sizes, name)
            sae = from_hub('org/theirs', name)
            row = top(sae.encode(x), a), top(sae(x).flatten(1), y)
            print(f'{"theirs from_hub: " + name:60}' + ''.join(f'{v:10.1e}' for v in row))
            worst = max(worst, *row)
    print(f'{len(ours)} of ours and {len(theirs)} of theirs, at most {worst:.1e}')
    return worst > 2e-6                                             # values of up to 3; see the limit of the table


def main():
    args = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    args.add_argument('--fixtures', type=Path)
    args.add_argument('--hub', action='store_true')
    args.add_argument('--hub-client', action='store_true', help=argparse.SUPPRESS)
    args = args.parse_args()
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    if args.hub: return hub()
    if args.hub_client: return hub_client()
    if args.fixtures:
        fixtures(args.fixtures)
        return 0
    with tempfile.TemporaryDirectory() as tmp: rows = table((48, 192, 8, 40), Path(tmp))
    print(f'{"":18}{"":48}{"float32":>9}{"":10}{"":9}{"float64":>11}')
    print(f'{"":18}{"case":48}{"codes":>9}{"outputs":>10}{"largest":>9}{"codes":>11}{"outputs":>10}')
    number = lambda v: '' if v is None else f'{v:.1e}'
    for way, name, (a, y, size), (a64, y64, _) in rows:
        print(f'{way:18}{name:48}{number(a):>9}{number(y):>10}{size:9.1f}{number(a64):>11}{number(y64):>10}')
    for way in dict.fromkeys(r[0] for r in rows):
        mine = [r for r in rows if r[0] == way]
        print(f'{way}: {len(mine)} cases, at most {max(max(r[2][:2]) for r in mine):.1e} in float32 and '
              f'{max(max(r[3][0] or 0, r[3][1] or 0) for r in mine):.1e} in float64')
    over = lambda figures, dtype: figures[0] is not None and max(figures[:2]) > LIMITS[dtype]*max(1., figures[2])
    bad = [f'{way}: {name}' for way, name, single, double in rows if over(single, 'float32') or over(double, 'float64')]
    print(f'above 1e-6 of the largest value in float32, or 1e-12 in float64: {", ".join(bad) or "none"}')
    return bool(bad)


if __name__ == '__main__': sys.exit(main())
