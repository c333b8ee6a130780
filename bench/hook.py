"""What listening costs, beside the bare transformers model and TransformerLens on the same weights.

Runs that listen to nothing, to one residual stream, to every ssm site but the states, and to states.

    pip install -r bench/requirements.txt && python bench/hook.py [--quick] [--json OUT]
"""
import os
import tempfile

import torch
from timing import alternate, options, table
from transformers import Mamba2Config, Mamba2ForCausalLM

from circuitbench.load import byte_tokenizer, load_model

os.environ['HF_HUB_OFFLINE'] = '1'


def lens(folder):
    "The same weights in TransformerLens, with the eager scan where states are wanted."
    from transformer_lens.model_bridge import TransformerBridge
    return TransformerBridge.boot_transformers(folder, device='cpu')


def untouched(model, ids):
    "The bare transformers model as a call."
    return lambda: model.hf(ids, use_cache=False)


def calls(model, bridge, ids, layer):
    "What is timed, ours and theirs under the same name."
    inside = [n for n in model.site_names(f'blocks.{layer}.ssm.*') if not n.endswith(('state', 'write'))]
    all_inside = [f'blocks.*.{n.split(".", 2)[2]}' for n in inside]
    some = [0, ids.shape[1]//3, ids.shape[1]//2, -1]

    def ours(names, **options): return lambda: model.run_with_cache(ids, names, **options)

    def theirs(wanted, eager=False):
        def run():
            for b in bridge.blocks: b.mixer.eager_scan = eager
            return bridge.run_with_cache(ids, names_filter=wanted, use_cache=False)[1]
        return run

    bare, residual, mixer = lambda: bridge(ids, use_cache=False), f'blocks.{layer}.hook_out', f'blocks.{layer}.mixer.'
    return {
        'the bare model, twice': (untouched(model, ids), None),  # how far apart the same call may come out
        'nothing, backend=transformers': (lambda: model.run(ids, backend='transformers'), bare),
        'nothing': (lambda: model.run(ids), bare),
        'one residual stream': (ours(f'blocks.{layer}.resid_post'), theirs(lambda n: n == residual)),
        'ssm sites of a block, no states': (ours(inside), theirs(lambda n: n.startswith(mixer))),
        'ssm sites of all blocks, no states': (ours(all_inside), theirs(lambda n: '.mixer.' in n)),
        'states at 4 steps, all blocks': (ours('ssm.state', at=some), None),
        'all states': (ours('ssm.state'), theirs(lambda n: n.endswith('hook_ssm_state'), eager=True)),
    }


def measure(model, bridge, ids, o):
    "A row a call: ours, the bare model and TransformerLens in turn."
    rows = []
    for name, (ours, peer) in calls(model, bridge, ids, model.n_layers//2).items():
        timed = {'ours': ours, 'bare': untouched(model, ids)} | ({'lens': peer} if peer else {})
        t = alternate(timed, 2*o.seconds, 3)
        lens_ms, x_lens = (t['lens']*1e3, t['ours']/t['lens']) if peer else ('-', '-')
        rows.append(dict(listens_to=name, ours_ms=t['ours']*1e3, bare_ms=t['bare']*1e3, x_bare=t['ours']/t['bare'],
                         lens_ms=lens_ms, x_lens=x_lens))
        print('.', end='', flush=True)
    return rows


def added(o):
    "What a run with backend='transformers' adds to the bare call, measured where the call itself is short."
    model, ids = load_model('mock://mamba2-tiny'), torch.arange(4)[None]
    calls = {'ours': lambda: model.run(ids, backend='transformers'), 'bare': untouched(model, ids)}
    with torch.no_grad(): t = alternate(calls, o.seconds, 100)
    print(f"\na run with backend='transformers' adds {(t['ours'] - t['bare'])*1e3:.2f} ms, whatever the model's size")


def main(o):
    for layers, d, h, n, length in [(2, 128, 4, 32, 64)] if o.quick else [(4, 768, 24, 128, t) for t in (256, 1024)]:
        config = Mamba2Config(vocab_size=257, hidden_size=d, num_hidden_layers=layers, num_heads=h, head_dim=2*d//h,
                              state_size=n, n_groups=1)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            Mamba2ForCausalLM(config).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            rows = measure(load_model(folder), lens(folder), torch.randint(0, 257, (1, length)), o)
        table(rows, o, f'{layers} layers, d_model {d}, {h} heads, state {n}, length {length}; x: ours over theirs')
    added(o)


if __name__ == '__main__':
    main(options(__doc__.splitlines()[0]))
