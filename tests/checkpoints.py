"""Random models of every family in several shapes, each tensor random, so that a forgotten term or a wrong order shows."""
import copy

import torch
from transformers import AutoModelForCausalLM

from circuitbench.site import families

# what differs from the family's small configuration: odd sizes, grouped heads, several chunks, biases on and off
SHAPES = {
    'mamba1': [{}, dict(hidden_size=18, expand=3, state_size=5, conv_kernel=3, time_step_rank=3, use_conv_bias=False), dict(use_bias=True, num_hidden_layers=3, state_size=1, tie_word_embeddings=False)],
    'mamba2': [{}, dict(hidden_size=24, num_heads=3, head_dim=16, n_groups=3, state_size=7, conv_kernel=3, use_conv_bias=False), dict(use_bias=True, n_groups=1, num_hidden_layers=3, tie_word_embeddings=False)],
    'falcon-mamba': [{}, dict(hidden_size=18, expand=3, state_size=5, conv_kernel=3, time_step_rank=3, use_conv_bias=False), dict(use_bias=True, num_hidden_layers=3, state_size=2)],
    'jamba': [{}, dict(num_experts=1, hidden_size=36, mamba_expand=1, mamba_d_state=5, mamba_d_conv=3, mamba_dt_rank=3, num_key_value_heads=1, mamba_conv_bias=False), dict(num_experts=4, num_experts_per_tok=2, mamba_proj_bias=True, num_key_value_heads=4, attn_layer_period=2, attn_layer_offset=1)],
    'falcon-h1': [{}, dict(mamba_rms_norm=True, mamba_norm_before_gate=False, mamba_proj_bias=True, attention_bias=True, mlp_bias=True, projectors_bias=True), dict(mamba_rms_norm=True, mamba_norm_before_gate=True, hidden_size=40, mamba_d_ssm=45, mamba_n_heads=3, mamba_d_head=15, mamba_n_groups=1, mamba_d_state=7, mamba_d_conv=3, num_key_value_heads=4, mamba_conv_bias=False), dict(num_hidden_layers=3, head_dim=10, mamba_n_groups=4)],
    'bamba': [{}, dict(hidden_size=36, mamba_n_heads=3, mamba_d_head=24, mamba_n_groups=1, mamba_d_state=7, mamba_d_conv=3, mamba_conv_bias=False), dict(num_hidden_layers=4, attn_layer_indices=[0, 3], mamba_n_groups=4, attention_bias=True, mlp_bias=True, mamba_proj_bias=True, num_key_value_heads=1)],
    'zamba2': [{}, dict(use_shared_attention_adapter=False, use_mem_rope=False, mamba_ngroups=1, hidden_size=36, mamba_d_state=7, mamba_d_conv=3), dict(num_mem_blocks=2, layers_block_type=['hybrid', 'mamba', 'hybrid', 'hybrid'], mamba_ngroups=4, add_bias_linear=True, use_conv_bias=False)],
    'nemotron-h': [{}, dict(hidden_size=24, mamba_num_heads=3, mamba_head_dim=10, n_groups=1, ssm_state_size=7, conv_kernel=3, head_dim=7, use_conv_bias=False, mlp_bias=True), dict(layers_block_type=['attention', 'mamba', 'moe', 'mamba'], n_routed_experts=4, moe_intermediate_size=24, moe_shared_expert_intermediate_size=24, n_groups=4, mamba_proj_bias=True), dict(layers_block_type=['moe', 'mamba', 'attention', 'moe'], moe_latent_size=12, mlp_bias=True, n_routed_experts=6, num_experts_per_tok=3, n_group=3, topk_group=2, routed_scaling_factor=1.7, moe_intermediate_size=20, moe_shared_expert_intermediate_size=24)],
    'granite-hybrid': [{}, dict(num_local_experts=0, hidden_size=36, mamba_n_heads=3, mamba_d_head=24, mamba_n_groups=1, mamba_d_state=7, mamba_d_conv=3, mamba_conv_bias=False), dict(num_local_experts=4, num_experts_per_tok=2, mamba_n_groups=4, attention_bias=True, mamba_proj_bias=True, position_embedding_type='rope')],
    'hymba': [{}, dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=3, mamba_expand=4, mamba_d_state=5, mamba_d_conv=3, mamba_conv_bias=False, mamba_inner_layernorms=False, kv_reuse_group=[[0, 2], [3, 4]], global_attn_idx=[1]), dict(num_key_value_heads=4, mamba_proj_bias=True, mlp_hidden_act='relu2', num_memory_tokens=3, tie_word_embeddings=False, rope_type=None)],
    'mamba2attn': [{}, dict(hidden_size=24, num_heads=3, head_dim=16, n_groups=3, state_size=7, conv_kernel=3, use_conv_bias=False, attn_layer_idx=[0, 2], attn_num_heads=3, attn_num_heads_kv=1, attn_head_dim=10, attn_rotary_emb_dim=0, attn_d_conv=0), dict(use_bias=True, n_groups=1, tie_word_embeddings=False, attn_num_heads_kv=4, attn_rotary_emb_dim=12, attn_d_conv=3)],
    'qwen3-next': [{}, dict(hidden_size=36, linear_conv_kernel_dim=3, linear_num_key_heads=4, linear_key_head_dim=6, attention_bias=True), dict(num_experts=0, linear_num_key_heads=1, linear_value_head_dim=7, layer_types=['full_attention', 'linear_attention'], num_hidden_layers=2)],
    'qwen3-5': [{}, dict(hidden_size=36, linear_conv_kernel_dim=3, linear_num_key_heads=4, linear_key_head_dim=6, attention_bias=True), dict(linear_num_key_heads=1, linear_value_head_dim=7, layer_types=['full_attention', 'linear_attention'], num_hidden_layers=2, tie_word_embeddings=True)],
    'olmo-hybrid': [{}, dict(hidden_size=40, linear_conv_kernel_dim=3, linear_num_key_heads=4, linear_key_head_dim=6, attention_bias=True, linear_allow_neg_eigval=False), dict(linear_num_key_heads=1, linear_value_head_dim=7, layer_types=['full_attention', 'linear_attention'], num_hidden_layers=2)],
    'kimi-linear': [{}, dict(hidden_size=36, linear_conv_kernel_dim=3, linear_num_heads=3, linear_head_dim=10, q_lora_rank=6, attention_bias=True), dict(layer_types=['full_attention', 'linear_attention'], mlp_layer_types=['sparse', 'dense'], num_hidden_layers=2, n_shared_experts=2)],
    'rwkv7': [{}, dict(hidden_size=36, head_dim=12, intermediate_size=50, num_hidden_layers=3, decay_low_rank_dim=3, a_low_rank_dim=7), dict(hidden_size=64, head_dim=64, tie_word_embeddings=True, group_norm_eps=64e-5)],
    'titans': [{}, dict(form='mac', hidden_size=36, num_attention_heads=3, memory_heads=4, memory_chunk=3, memory_conv=3, window=7, num_persistent=2, memory_expand=2), dict(memory_depth=1, memory_chunk=1, num_persistent=0, window=5, memory_heads=4, tie_word_embeddings=True), dict(form='mac', memory_depth=1, memory_chunk=16, num_persistent=0, num_hidden_layers=3)],
    'lfm2': [{}, dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=1, conv_L_cache=4, conv_bias=True, full_attn_idxs=[0, 2], tie_word_embeddings=False), dict(head_dim=10, num_hidden_layers=2, full_attn_idxs=[1], conv_L_cache=2, conv_bias=True, block_auto_adjust_ff_dim=True, block_multiple_of=20)],
    'llama': [{}, dict(hidden_size=36, num_key_value_heads=1, head_dim=10, num_attention_heads=3), dict(num_key_value_heads=4, attention_bias=True, mlp_bias=True, tie_word_embeddings=True)]}


_BRANCH_ENDS = tuple(f'{n}_proj{w}' for n in ('out', 'o', 'down') for w in ('', '.weight'))   # small: a model that is not chaotic


def randomise(hf, seed=0):
    "Draws every parameter: matrices to keep the scale of what passes, norms around 1, the rest around their start."
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            noise = torch.randn(p.shape, generator=g)
            if name.endswith('A_log') or p.dim() == 1: p.add_(.2*noise)
            elif 'conv1d' in name: p.copy_(.5*noise)
            elif 'embed' in name: p.copy_(noise)
            else: p.copy_(noise*p.shape[-1]**-.5*(.3 if name.endswith(_BRANCH_ENDS) else 1))
    return hf.eval().requires_grad_(False)


def random_model(family, shape=0, seed=0, vocab=61):
    "A random transformers model of a family in one of its shapes, a number or what differs from the small one."
    config = families()[family].small(vocab, **(shape if isinstance(shape, dict) else SHAPES[family][shape]))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return randomise(AutoModelForCausalLM.from_config(config), seed)


def in_float64(hf):
    "A copy in float64; experts one by one, since their grouped product knows no float64."
    twin = copy.deepcopy(hf).double()
    twin.config._experts_implementation = 'eager'
    return twin
