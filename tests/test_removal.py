"""Concepts taken out: by hooks on the bare models, and in their weights."""
import pytest
import torch
import torch.nn.functional as F
from test_subgraph import bare, hooks
from transformers import AutoModelForCausalLM

from circuitbench.direction import Direction
from circuitbench.interventions import Interventions, ablate, fires, push
from circuitbench.load import load_model
from circuitbench.removal import Removal, bake, find_removals, removed
from circuitbench.sae import SAE
from circuitbench.stream import token_rows
from circuitbench.task import Prompt, facts

PLACES = [('mamba2', 'ssm.out_proj_in'), ('mamba2', 'ssm.out'), ('llama', 'mlp_out'), ('llama', 'attn.z'), ('llama', 'attn.out'), ('jamba', 'mlp_out'), ('falcon-h1', 'ssm.out_proj_in'), ('falcon-h1', 'mlp_out'),
          ('rwkv7', 'ssm.out_proj_in')]


def direction(model, site, seed=0, block=1):
    name = f'blocks.{block}.{site}'
    return Direction(torch.randn(model.site_shape(name, 1, 1)[2:], generator=torch.Generator().manual_seed(seed)), name, model.name, 'a draw')


@pytest.mark.parametrize('name, site', PLACES)
def test_baked_is_edited(name, site):
    model = load_model(f'mock://{name}-tiny')
    if name == 'jamba' and site == 'mlp_out': block = next(i for i in range(model.n_layers) if 'mlp.experts' not in model.adapter.block_sites(model.config, i))
    else: block = 1
    plan, ids = Interventions((ablate(direction(model, site, block=block)),)), torch.randint(1, 257, (2, 11))
    before = {n: p.clone() for n, p in model.hf.named_parameters()}
    baked = bake(model, plan)
    with torch.no_grad():
        with plan.on(model): want = model.run(ids).logits
        assert baked.off < 1e-5 and (baked.model.run(ids).logits - want).abs().max() < 1e-5*want.abs().max()
        assert (want - model.run(ids).logits).abs().max() > 1e-3*want.abs().max()
    assert all(torch.equal(p, before[n]) for n, p in model.hf.named_parameters()) and bare(model)


def test_meta_tokens_are_baked_too():
    "Which edits leave alone."
    model = load_model('mock://hymba-tiny')
    assert .001 < bake(model, Interventions((ablate(direction(model, 'mixer_out')),))).off < .5


@torch.no_grad()
def test_a_direction_of_the_stream_is_gone_from_all_that_writes_so_far():
    model = load_model('mock://mamba2-tiny')
    d = direction(model, 'resid_post', block=0)
    baked, u, ids = bake(model, Interventions((ablate(d),))), d.unit.vector, torch.randint(1, 257, (2, 11))
    x = [b for b in baked.model.run_with_cache(ids, 'resid_post')[1].values()]
    assert (x[0] @ u).abs().max() < 1e-5 and (x[1] @ u).abs().max() > 1e-2
    W = model.blocks[0].mixer.out_proj.weight
    assert torch.allclose(baked.model.blocks[0].mixer.out_proj.weight, W - torch.outer(u, u @ W), atol=1e-6)
    E = model.hf.get_input_embeddings().weight
    assert torch.allclose(baked.model.hf.get_input_embeddings().weight, E - torch.outer(E @ u, u), atol=1e-6) and 0 < baked.off < 1


def test_a_baked_model_is_one_of_transformers(tmp_path):
    model = load_model('tiny://mamba2')
    baked, text = bake(model, Interventions((ablate(direction(model, 'ssm.out', block=2)),))), ' The king of Egypt'
    baked.save(tmp_path)
    again, ids = load_model(str(tmp_path)), model.tokens(text)[0]
    with torch.no_grad():
        assert torch.equal(again.run(text).logits, baked.model.run(text).logits)
        plain = AutoModelForCausalLM.from_pretrained(tmp_path)(ids, use_cache=False).logits
        assert (plain - baked.model.run(text).logits).abs().max() < 1e-4*plain.abs().max()


@torch.no_grad()
def test_what_is_measured_by_hand():
    "Log-probabilities, right answers and loss of the bare model, the direction projected out by a hook."
    model = load_model('tiny://mamba2')
    d, text = direction(model, 'resid_post', block=3), token_rows(model, None, 32, 128)
    asked, others = facts('held')[:3], facts('held')[7:11]
    def state():
        out = []
        for ps in (asked, others):
            last = torch.stack([model.hf(model.tokens(p.text)[0], use_cache=False).logits[0, -1] for p in ps]).double()
            target = torch.tensor([int(model.tokens(p.target)[0][0, 0]) for p in ps])
            out += [float(last.log_softmax(-1).gather(1, target[:, None]).mean()), float((last.argmax(1) == target).double().mean())]
        logits = model.hf(text.long(), use_cache=False).logits[:, :-1]
        return [*out, float(F.cross_entropy(logits.flatten(0, 1).double(), text[:, 1:].long().flatten()))]
    before, u = state(), d.unit.vector
    def put(out):
        x = out[0] if isinstance(out, tuple) else out
        new = x - (x @ u)[..., None]*u
        return (new, *out[1:]) if isinstance(out, tuple) else new
    with hooks((model.blocks[3], put)): after = state()
    got = removed(model, Interventions((ablate(d),)), asked, others, text)
    pairs = list(zip(before, after))
    for a, b in zip((got.concept, got.neighbours, got.right, got.loss), (pairs[0], pairs[2], pairs[3], pairs[4])): assert a == pytest.approx(b, abs=1e-4)
    assert got.selectivity == pytest.approx(before[0] - after[0] - before[2] + after[2], abs=1e-4)


def test_the_best_is_found_and_leaves_its_neighbours():
    model = load_model('tiny://mamba2')
    every = facts('train')
    asked, others = [p for p in every if p.target == ' Cairo'], [p for p in every if p.target != ' Cairo'][::150]
    found = find_removals(model, asked[:4], others, token_rows(model, None, 32, 64), ['resid_post', 'ssm.out_proj_in'], [2, 3], progress=False)
    assert len(found) == 4 and [r.selectivity for r in found] == sorted((r.selectivity for r in found), reverse=True)
    assert isinstance(found[0], Removal) and found[0].direction.site == 'blocks.3.resid_post' and found[0].selectivity > 3


def test_errors():
    model = load_model('tiny://mamba2')
    d, coder = direction(model, 'ssm.out', block=5), SAE.load('tiny://mamba2/blocks.3.resid_post')
    for step in (push(d, 1.), ablate(d, at=[1]), ablate(d, rows=[0]), ablate(d, when=fires(coder, 3)), ablate(d, schedule=(1., .5))):
        with pytest.raises(ValueError, match='expected an ablation everywhere'): bake(model, Interventions((step,)))
    with pytest.raises(ValueError, match='expected a site of the stream'): bake(model, Interventions((ablate(direction(model, 'ssm.conv')),)))
    jamba = load_model('mock://jamba-tiny')
    mixed = next(i for i in range(4) if 'mlp.experts' in jamba.adapter.block_sites(jamba.config, i))
    with pytest.raises(ValueError, match='ends with one matrix'): bake(jamba, Interventions((ablate(direction(jamba, 'mlp_out', block=mixed)),)))
    one = [Prompt('a', ' b', ' c', 'd', 'facts')]
    with pytest.raises(ValueError, match='got 0 and 1 prompts'): find_removals(model, [], one, torch.ones(1, 4, dtype=torch.long))
    with pytest.raises(ValueError, match='expected some of model.sites'): find_removals(model, one, one, torch.ones(1, 4, dtype=torch.long), ['mlp_out'])
