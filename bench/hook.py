"""What listening costs: runs that listen to nothing, to one residual stream, to every ssm site but the states, and to all states, beside the bare transformers model and TransformerLens.

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


def calls(model, bridge, ids, layer):
    "What is timed, ours and theirs under the same name."
    inside = [n for n in model.site_names(f'blocks.{layer}.ssm.*') if not n.endswith(('state', 'write'))]
    state = [f'blocks.{i}.ssm.state' for i in range(model.n_layers)]

    def theirs(wanted, eager):
        for b in bridge.blocks: b.mixer.eager_scan = eager
        return bridge.run_with_cache(ids, names_filter=wanted, use_cache=False)[1]

    residual, mixer = f'blocks.{layer}.hook_out', f'blocks.{layer}.mixer.'
    return {
        'bare transformers': (lambda: model.hf(ids, use_cache=False), None),
        'no listener, backend=transformers': (lambda: model.run(ids, backend='transformers'), lambda: bridge(ids, use_cache=False)),
        'no listener': (lambda: model.run(ids), lambda: bridge(ids, use_cache=False)),
        'one residual stream': (lambda: model.run_with_cache(ids, f'blocks.{layer}.resid_post'), lambda: theirs(lambda n: n == residual, False)),
        'every ssm site of a block but states': (lambda: model.run_with_cache(ids, inside), lambda: theirs(lambda n: n.startswith(mixer), False)),
        'every ssm site of all blocks but states': (lambda: model.run_with_cache(ids, [f'blocks.*.{n.split(".", 2)[2]}' for n in inside]),
                                                    lambda: theirs(lambda n: '.mixer.' in n, False)),
        'state of 4 steps, all blocks': (lambda: model.run_with_cache(ids, state, at=[0, ids.shape[1]//3, ids.shape[1]//2, -1]), None),
        'all states': (lambda: model.run_with_cache(ids, state), lambda: theirs(lambda n: n.endswith('hook_ssm_state'), True)),
    }


def main(o):
    for layers, d, h, n, length in [(2, 128, 4, 32, 64)] if o.quick else [(4, 768, 24, 128, 256), (4, 768, 24, 128, 1024)]:
        config = Mamba2Config(vocab_size=257, hidden_size=d, num_hidden_layers=layers, num_heads=h, head_dim=2*d//h, state_size=n, n_groups=1)
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            Mamba2ForCausalLM(config).save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            model, bridge, ids = load_model(folder), lens(folder), torch.randint(0, 257, (1, length))
            rows = []
            for name, (ours, peer) in calls(model, bridge, ids, layers//2).items():
                t = alternate({'ours': ours, 'bare': lambda: model.hf(ids, use_cache=False)} | ({'lens': peer} if peer else {}), 2*o.seconds, 3)
                rows.append(dict(run=name, ours_ms=t['ours']*1e3, bare_ms=t['bare']*1e3, x_bare=t['ours']/t['bare'],
                                 lens_ms=t['lens']*1e3 if peer else '-', x_lens=t['ours']/t['lens'] if peer else '-'))
                print('.', end='', flush=True)
        table(rows, o, f'{layers} layers, d_model {d}, {h} heads, state {n}, length {length}; x_ is ours divided by theirs')


if __name__ == '__main__':
    main(options(__doc__.splitlines()[0]))
