"""Models compiled by hand: every label is held against what happens when the node is taken away or exchanged, on the real model."""
import copy

import numpy as np
import oracle
import pytest
import torch

from circuitbench.compile import compile, untidy, verified
from circuitbench.edit import patch, zero
from circuitbench.graph import model_graph
from circuitbench.pairs import accuracy
from circuitbench.program import DECOYS, NAMES, Compiled, Recall, recall_pairs
from circuitbench.taps import cut_tap

torch.set_num_threads(1)
GUESS = .5                                                      # attention without a match says one of the values there are
MADE = {}


def made(via, **changes) -> Compiled:
    "Each model once; the carrier is not the first head, nor does the first attention head match."
    key = via, *changes.items()
    if key not in MADE: MADE[key] = compile(Recall(via, **dict(carrier=2, match=1) | changes))
    return MADE[key]


def pairs_of(c, n=128, seed=5): return recall_pairs(c.program, n, seed)


def answer_in(context, key):
    "The value that stands last behind a key, -1 where it does not occur."
    found = [b for a, b in zip(context[::2].tolist(), context[1::2].tolist()) if a == key]
    return found[-1] if found else -1


# -- it does what it says ------------------------------------------------------------------
@pytest.mark.parametrize('via', DECOYS)
def test_every_answer_is_right(via):
    for c in (made(via), made(via, carrier=0, match=0)):
        assert accuracy(c.model, pairs_of(c, 512)) == 1. and verified(c).note.endswith('accuracy 1.000 on 512 prompts')
    assert c.name == NAMES[via] and c.name in repr(c) and len(c.vocabulary) == c.hf.config.vocab_size


@pytest.mark.parametrize('via', DECOYS)
@pytest.mark.parametrize('shape', [dict(keys=5, values=11, pairs=4, heads=3, carrier=1), dict(keys=12, values=6, pairs=12, heads=6),
                                   dict(heads=1, carrier=0), dict(heads=2, carrier=1, d_model=192, kernel=2)])
def test_other_sizes(via, shape):
    c = made(via, **shape)
    assert accuracy(c.model, pairs_of(c)) == 1.


@pytest.mark.parametrize('via', DECOYS)
def test_the_model_is_that_of_transformers(via):
    "The bare forward pass, and the path on which everything listens."
    c = made(via)
    pairs = pairs_of(c)
    hf = copy.deepcopy(c.hf)
    assert (hf(pairs.clean).logits[:, -1].argmax(-1) == pairs.target).all()
    assert torch.allclose(hf(pairs.clean).logits[:, -1], c.model.run(pairs.clean).logits[:, -1], atol=1e-3)


@pytest.mark.parametrize('via', ['conv', 'state', 'channels'])
def test_the_equations_in_float64_give_the_same(via):
    c = made(via)
    pairs = pairs_of(c, 32)
    want = oracle.run(c.hf, pairs.clean.numpy())['logits'][:, -1]
    assert (want.argmax(-1) == pairs.target.numpy()).all()
    np.testing.assert_allclose(c.model.run(pairs.clean).logits[:, -1].numpy(), want, atol=2e-3)


@pytest.mark.parametrize('via', ['state', 'attention', 'parallel'])
def test_without_a_convolution(via):
    c = made(via, kernel=1)
    assert accuracy(c.model, pairs_of(c)) == 1.


# -- heads, one by one ---------------------------------------------------------------------
HEADS = {'ssm': 'ssm.y', 'attn': 'attn.z', 'mlp': 'mlp_out'}


def heads_of(c):
    "(node, its read-out zeroed)."
    for node in c.labels:
        block, _, rest = node.partition('.')
        branch, _, h = rest.rstrip(']').partition('[')
        if branch in HEADS and '.' not in rest: yield node, zero(f'blocks.{block}.{HEADS[branch]}', heads=[int(h)] if h else None)


@pytest.mark.parametrize('via', DECOYS)
def test_without_a_head_of_the_circuit_no_answer_and_without_a_decoy_all(via):
    c = made(via)
    pairs, kinds = pairs_of(c), set()
    for node, edit in heads_of(c):
        got = accuracy(c.model, pairs, edit)
        assert (got < GUESS and ('ssm' not in node or via in ('attention', 'parallel') or got == 0)) if c.labels[node] else got == 1, node
        kinds.add(c.labels[node])
    assert kinds == ({True} if via == 'channels' else {True, False})
    decoys = [e for n, e in heads_of(c) if not c.labels[n]]
    assert accuracy(c.model, pairs, decoys) == 1.                # all at once


def test_without_the_channels_that_carry_no_answer_and_without_others_all():
    c = made('channels')
    pairs, first = pairs_of(c), 2*8 + 8*2
    assert f'channels {first} to {first + 7}' in c.note
    gone = lambda channels: accuracy(c.model, pairs, zero('blocks.0.ssm.y', heads=channels))
    assert gone(range(first, first + 8)) == 0
    assert gone([h for h in range(48) if not first <= h < first + 8]) == 1.


# -- ports: taken away, and exchanged ------------------------------------------------------
PORTS = ('x', 'B', 'C', 'dt', 'gate', 'decay', 'erase')


@pytest.mark.parametrize('via', DECOYS)
def test_ports_are_in_the_circuit_where_they_are_labelled(via):
    "In it: dead without, and another answer with the other prompt's. Out: nothing happens. Unscored: dead or not without, nothing on exchange."
    c = made(via)
    pairs, seen = pairs_of(c), set()
    for node in dict.fromkeys(n.partition('@')[0] for n in c.labels):
        block, _, rest = node.partition('.')
        branch, _, port = rest.partition('.')
        if branch not in ('ssm', 'attn') or port in ('', 'rest'): continue
        port, _, h = port.rstrip(']').partition('[')
        site, label = f'blocks.{block}.{branch}.{port}', c.label(node)
        heads = None if not h or port in 'BC' and via != 'delta' else [int(h)]
        _, cache = c.model.run_with_cache(pairs.corrupt, site)
        exchanged = accuracy(c.model, pairs, patch(site, cache[site], heads=heads))
        without = accuracy(c.model, pairs, zero(site, heads=heads))
        if label: assert without < GUESS and exchanged < .8, node
        elif label is False: assert without == 1 and exchanged == 1, node
        elif port != 'erase': assert exchanged == 1, node
        seen.add(label)
    assert seen >= ({True, None} if via == 'channels' else {True, False, None})


@pytest.mark.parametrize('via', ['conv', 'delta', 'channels'])
def test_taps_one_by_one(via):
    c = made(via)
    pairs, seen = pairs_of(c), []
    names = dict(x='v', B='k', C='r', erase='a', decay='w', gate='g') if via == 'delta' else dict(x='x', B='B', C='C')
    for node, label in c.labels.items():
        if '.ssm.' not in node or '@' not in node: continue
        port, lag = node.split('.')[2].split('@')
        port, _, h = port.rstrip(']').partition('[')
        if via == 'channels': continue                           # taps there are of channels, not of B and C
        heads = [int(h)] if h and port == 'x' and via == 'conv' else None
        if heads is None and h and int(h) != (c.program.carrier if via == 'delta' else 0): continue
        with cut_tap(c.model, 0, names[port], int(lag), heads): got = accuracy(c.model, pairs)
        if label is not None: assert got < GUESS if label else got == 1, (node, got)
        seen.append(label)
    if via == 'channels':
        mixer, n = c.model.blocks[0].mixer, 8
        kernel = mixer.conv1d.weight
        for rows, lag in ((slice(0, n), 0), (slice(n, 2*n), 1), (slice(2*n + 16, 2*n + 24), 0)):
            kept = kernel[rows, 0, -1 - lag].clone()
            kernel[rows, 0, -1 - lag] = 0
            assert accuracy(c.model, pairs) == 0
            kernel[rows, 0, -1 - lag] = kept
            others = [k for k in range(4) if k != lag]
            kept = kernel[rows].clone()
            for k in others: kernel[rows, 0, -1 - k] = 0
            assert accuracy(c.model, pairs) == 1
            kernel[rows] = kept
        assert accuracy(c.model, pairs) == 1
        return
    assert True in seen and False in seen


# -- what is in the memory -----------------------------------------------------------------
@pytest.mark.parametrize('via', ['conv', 'state', 'delta', 'channels'])
def test_the_state_of_the_carrier_brings_the_other_prompts_value(via):
    c = made(via)
    pairs = pairs_of(c)
    step, site = pairs.clean.shape[1] - 2, f'blocks.{1 if via == "state" else 0}.ssm.state'
    _, cache = c.model.run_with_cache(pairs.corrupt, site, at=[step])
    wanted = torch.tensor([answer_in(row[:-1], int(q)) for row, q in zip(pairs.corrupt, pairs.clean[:, -1])])
    asked = wanted >= 0
    n = c.model.sizes['head']
    carrier = range(32, 40) if via == 'channels' else [2]
    for heads in (carrier, [h for h in range(n) if h not in carrier]):
        out = c.model.run(pairs.clean, patch(site, cache[site], at=[step], heads=heads)).logits[:, -1].argmax(-1)
        assert asked.sum() > 50 and (out[asked] == (wanted if heads is carrier else pairs.target)[asked]).all()


@pytest.mark.parametrize('via', ['attention', 'parallel'])
def test_hybrids_keep_the_pairs_in_the_cache_of_attention_and_not_in_the_state(via):
    c = made(via)
    pairs = pairs_of(c)
    last = pairs.clean.shape[1] - 1
    sites = ['blocks.1.attn.k', 'blocks.1.attn.v']
    states = [f'blocks.{i}.ssm.state' for i in c.model.recurrent()]
    _, cache = c.model.run_with_cache(pairs.corrupt, [*sites, *states])
    cut = lambda names: [patch(n, cache[n], at=list(range(last)) if '.attn.' in n else [last - 1]) for n in names]
    wanted = torch.tensor([answer_in(row[:-1], int(q)) for row, q in zip(pairs.corrupt, pairs.clean[:, -1])])
    asked = wanted >= 0
    out = c.model.run(pairs.clean, cut(sites)).logits[:, -1].argmax(-1)
    assert asked.sum() > 50 and (out[asked] == wanted[asked]).all()
    late = [(ids[:, -3] == pairs.clean[:, -1]) for ids in (pairs.clean, pairs.corrupt)]      # that step's own read-out moves with it
    early = (~late[0] & ~late[1]).nonzero()[:, 0]
    out = c.model.run(pairs.clean, cut(states)).logits[:, -1].argmax(-1)
    assert len(early) > 50 and (out == pairs.target)[early].all()


@pytest.mark.parametrize('via', ['attention', 'parallel'])
def test_a_match_does_not_depend_on_where_it_is(via):
    "Rotations of queries and keys leave it alone: the same pairs, behind any number of others, attended to alike."
    c = made(via, keys=40, pairs=30)
    assert accuracy(c.model, pairs_of(c)) == 1.
    pairs = pairs_of(made(via), 8)
    _, cache = made(via).model.run_with_cache(pairs.clean, 'blocks.1.attn.pattern')
    row = cache['blocks.1.attn.pattern'][:, -1, 1]
    where = torch.tensor([ids[:-1].tolist().index(int(ids[-1])) + 1 for ids in pairs.clean])
    assert (row.argmax(1) == where).all() and row.amax(1).min() > .95


def test_without_the_removal_both_values_are_heard():
    c = made('delta')
    pairs = pairs_of(c, 256)
    got = accuracy(c.model, pairs, zero('blocks.0.ssm.erase', heads=[2]))
    assert .2 < got < .8                                         # a tie of two
    out = c.model.run(pairs.clean, zero('blocks.0.ssm.erase', heads=[2])).logits[:, -1].topk(2).indices
    assert (out == pairs.target[:, None]).any(1).all()
    _, cache = c.model.run_with_cache(pairs.clean, 'blocks.0.ssm.state', at=[-2])
    held = lambda h: (cache['blocks.0.ssm.state'][:, 0, h].abs() > .1).sum((1, 2))
    assert c.program.kinds[0] == 'keeps' and (held(0) == 6).all() and (held(2) == 5).all()


# -- labels --------------------------------------------------------------------------------
@pytest.mark.parametrize('via', DECOYS)
def test_the_labels_are_of_all_nodes_of_the_graph(via):
    c = made(via, heads=5)
    names = {n if n in c.labels else n.removesuffix('@0') for n in model_graph(c.model, lags=True).index}
    assert names == {*c.labels}
    for node in model_graph(c.model).index: c.label(node)
    assert c.label('0.mlp' if '0.mlp' in c.labels else 'embed') is ('0.mlp' not in c.labels)


def test_labels_by_name():
    c = made('conv')
    assert c.label('0.ssm.B[0]') is True and c.label('0.ssm.B[0]@0') is False and c.label('0.ssm.dt[2]@0') is None
    assert c.label('0.ssm[2]') and not c.label('0.ssm[1]')
    assert {*c.nodes()} == {'embed', 'logits', '0.ssm[2]', '0.ssm.x[2]@0', '0.ssm.B[0]@1', '0.ssm.C[0]@0'}
    with pytest.raises(ValueError, match='got node'): c.label('0.ssm[9]')


# -- less tidy -----------------------------------------------------------------------------
@pytest.mark.parametrize('via', DECOYS)
def test_a_rotation_leaves_the_answers_and_every_axis_holds_something(via):
    c = made(via)
    turned, pairs = untidy(c), pairs_of(c)
    a, b = (m.model.run(pairs.clean).logits[:, -1] for m in (c, turned))
    assert torch.allclose(a, b, atol=1e-3) and turned.labels == c.labels and 'rotated' in turned.note
    table = turned.hf.get_input_embeddings().weight
    assert (table.abs() > 1e-4).float().mean() > .95 and not torch.equal(untidy(c, seed=1).hf.lm_head.weight, turned.hf.lm_head.weight)
    assert accuracy(c.model, pairs) == 1.                        # the first is as it was


@pytest.mark.parametrize('via', DECOYS)
def test_with_loud_decoys_and_noise_the_circuit_is_the_same(via):
    c = untidy(made(via), loud=2., noise=.01)
    pairs = pairs_of(c)
    assert 'decoys times 2' in c.note and 'noise of 0.01' in c.note
    for node, edit in heads_of(c):
        got = accuracy(c.model, pairs, edit)
        assert got < GUESS if c.labels[node] else got > .97, (node, got)


def test_loud_decoys_are_louder():
    norms = []
    for c in (made('conv'), untidy(made('conv'), rotate=False, loud=4.)):
        pairs = pairs_of(c, 8)
        clean = c.model.run_with_cache(pairs.clean, 'blocks.0.ssm.out')[1]['blocks.0.ssm.out']
        norms.append(float(clean[:, -1].norm(dim=1).mean()))
        out = c.hf.backbone.layers[0].mixer.out_proj.weight.unflatten(1, (4, -1))
        norms.append(float(out[:, 2].norm()))
    assert norms[2] > 3*norms[0] and norms[1] == norms[3]


def test_too_much_noise_is_said():
    with pytest.raises(ValueError, match='got accuracy .*expected 0.99 or more'): untidy(made('conv'), noise=1.)
    with pytest.raises(ValueError, match='expected 1 or more'): verified(untidy(made('state'), noise=.2, floor=0.))


# -- prompts and programs ------------------------------------------------------------------
@pytest.mark.parametrize('via', ['conv', 'delta'])
def test_prompts(via):
    program = Recall(via, keys=9, values=5, pairs=7)
    pairs = recall_pairs(program, 300, seed=2)
    for ids, answer in ((pairs.clean, pairs.target), (pairs.corrupt, pairs.wrong)):
        assert [answer_in(row[:-1], int(row[-1])) for row in ids] == answer.tolist() and (pairs.at == 14).all()
        keys = ids[:, :-1:2]
        assert (ids[:, 1::2] >= 9).all() and (keys < 9).all()
        assert [len({*row.tolist()}) for row in keys] == [7 - (via == 'delta')]*300
        if via == 'delta': assert all(ids[i, :-1][ids[i, :-1] == ids[i, -1]].numel() == 2 for i in range(300))
    again, other = recall_pairs(program, 300, seed=2), recall_pairs(program, 300, seed=3)
    assert torch.equal(again.clean, pairs.clean) and not torch.equal(other.clean, pairs.clean)
    assert torch.equal(torch.get_rng_state(), (compile(program), torch.get_rng_state())[1])


@pytest.mark.parametrize('kw, says', [
    (dict(via='x'), "'conv'"), (dict(carrier=4), '0 to 3'), (dict(decoys=('quiet',)), "'unread'"), (dict(decoys=()), 'some of'),
    (dict(via='delta', decoys=('forgets',)), "'keeps'"), (dict(pairs=9), 'number of keys'), (dict(values=1), 'two or more'),
    (dict(match=2), '0 or 1'), (dict(kernel=1), '2 or more')])
def test_programs_that_cannot_be(kw, says):
    with pytest.raises(ValueError, match=says): Recall(**kw)


def test_a_width_that_is_too_small():
    with pytest.raises(ValueError, match='got d_model=40, expected a multiple of 4 from'): compile(Recall(d_model=40))
