"""What every family costs: the bare reference, ours with no listener, ours with all ssm sites, in time and peak memory.

    python bench/families.py [--quick] [--json OUT]

The reference is transformers' own code; of the families that transformers lacks, it is the same model run bare. All ssm
sites are those that run_with_cache reads unless told otherwise: all but the state and the write of every step, each as
large as the length times the memory. Peak memory is what the process takes on top of the model and the prompt.
"""
import ctypes
import re
from pathlib import Path

import torch
from timing import alternate, options, table
from transformers import AutoModelForCausalLM

from circuitbench.hook import HookedModel
from circuitbench.load import load_model
from circuitbench.site import families

MAMBA1 = dict(hidden_size=512, num_hidden_layers=4, state_size=16, time_step_rank=32)
ATTENTION = dict(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2)
SSD = dict(mamba_n_heads=16, mamba_d_head=64, mamba_d_state=64, mamba_n_groups=1, mamba_chunk_size=256)
DELTA = dict(ATTENTION, num_hidden_layers=4, head_dim=64, linear_key_head_dim=64, linear_value_head_dim=64,
             linear_num_key_heads=4, linear_num_value_heads=8)
SIZES = {                                            # four blocks of d_model 512 each, in the proportions of the family
    'mamba1': MAMBA1, 'falcon-mamba': MAMBA1,
    'mamba2': dict(hidden_size=512, num_hidden_layers=4, num_heads=16, head_dim=64, state_size=64, n_groups=1,
                   chunk_size=256),
    'jamba': dict(ATTENTION, num_hidden_layers=4, num_experts=2, mamba_d_state=16, mamba_dt_rank=32),
    'falcon-h1': dict(ATTENTION, num_hidden_layers=4, mamba_d_ssm=1024) | SSD,
    'bamba': dict(ATTENTION, num_hidden_layers=4) | SSD,
    'zamba2': dict(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=8,
                   n_mamba_heads=16, mamba_d_state=64, mamba_ngroups=1, chunk_size=256),
    'nemotron-h': dict(ATTENTION, head_dim=64, mamba_num_heads=16, mamba_head_dim=64, ssm_state_size=64, n_groups=1,
                       chunk_size=256, layers_block_type=['mamba', 'mlp', 'attention', 'mamba']),
    'granite-hybrid': dict(ATTENTION, num_hidden_layers=4, shared_intermediate_size=1024,
                           layer_types=['linear_attention', 'full_attention'] + ['linear_attention']*2) | SSD,
    'qwen3-next': DELTA | dict(moe_intermediate_size=256, shared_expert_intermediate_size=256), 'qwen3-5': DELTA,
    'olmo-hybrid': {k: v for k, v in DELTA.items() if k != 'head_dim'},
    'kimi-linear': dict(hidden_size=512, intermediate_size=1024, moe_intermediate_size=256, num_attention_heads=8,
                        num_key_value_heads=8, kv_lora_rank=64, qk_rope_head_dim=16, qk_nope_head_dim=64, v_head_dim=64,
                        linear_head_dim=64, linear_num_heads=8),
    'hymba': dict(hidden_size=512, intermediate_size=1024, num_attention_heads=8, num_key_value_heads=2),
    'rwkv7': dict(hidden_size=512, num_hidden_layers=4, head_dim=64, intermediate_size=2048),
    'titans': dict(hidden_size=512, num_hidden_layers=4, num_attention_heads=8, memory_heads=8, window=64,
                   memory_chunk=16, intermediate_size=1024),
    'mamba2attn': dict(hidden_size=512, num_hidden_layers=4, num_heads=16, head_dim=64, state_size=64, n_groups=1,
                       chunk_size=256, attn_num_heads=8, attn_num_heads_kv=2, attn_head_dim=64, attn_rotary_emb_dim=32),
    'lfm2': dict(hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
                 num_key_value_heads=2, layer_types=['conv', 'full_attention', 'conv', 'conv']),
    'llama': dict(ATTENTION, num_hidden_layers=4)}
_trim = ctypes.CDLL(None).malloc_trim


def peak(call):
    "MiB that the process takes at most while the call runs, on top of what it held (Linux)."
    status = lambda key: int(re.search(rf'{key}:\s+(\d+)', Path('/proc/self/status').read_text())[1])/1024
    _trim(0)
    Path('/proc/self/clear_refs').write_text('5')               # the high-water mark begins anew
    before = status('VmRSS')
    call()
    return status('VmHWM') - before


def opened(family, quick):
    "A random model of the family."
    if quick: return load_model(f'mock://{family}-tiny')
    torch.manual_seed(0)
    hf = AutoModelForCausalLM.from_config(families()[family].small(257, **SIZES.get(family, {})))
    return HookedModel(hf, name=family)


def main(o):
    ids, rows = torch.randint(0, 257, (1, 64 if o.quick else 512)), []
    for family in families():
        model = opened(family, o.quick)
        calls = {'bare': lambda m=model: m.hf(ids, use_cache=False), 'ours': lambda m=model: m.run(ids)}
        sites = [n for n in model.site_names() if '.ssm.' in n]
        if sites: calls['sites'] = lambda m=model, s=sites: m.run_with_cache(ids, s)
        with torch.no_grad():
            t, mib = alternate(calls, o.seconds, 3), {k: peak(f) for k, f in calls.items()}
        get = lambda d, k, by=1.: d[k]*by if k in d else '-'
        rows.append(dict(family=family, bare_ms=t['bare']*1e3, ours_ms=t['ours']*1e3, x=t['ours']/t['bare'],
                         all_ssm_ms=get(t, 'sites', 1e3), x_all=get(t, 'sites', 1/t['bare']),
                         sites=len(sites), bare_MiB=mib['bare'], ours_MiB=mib['ours'], all_MiB=get(mib, 'sites')))
        print('.', end='', flush=True)
    table(rows, o, f'{ids.shape[1]} tokens, four blocks of d_model {"32" if o.quick else "512"}; x: times bare')


if __name__ == '__main__':
    main(options(__doc__.splitlines()[0]))
