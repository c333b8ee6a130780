"""Nodes and edges: held against finite differences of the model, its configuration, and sums of what its modules write."""
import pytest
import torch

from circuitbench.edit import add, patch
from circuitbench.graph import Graph, Node, model_graph, shares
from circuitbench.load import load_model
from circuitbench.site import families

IDS = torch.randint(1, 257, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope='module', params=sorted(families()))
def family(request): return load_model(f'mock://{request.param}-tiny')


@pytest.fixture(scope='module')
def graphs(family): return model_graph(family), model_graph(family, lags=True)


def stage(model, n): return 'logits' if n.kind == 'logits' else f'blocks.{n.block}.resid_{"mid" if n.reads % 2 else "pre"}'


# -- of every family -----------------------------------------------------------------------
def test_names_are_unique_and_edges_go_forward(family, graphs):
    for g in graphs:
        names = [n.name for n in g.nodes]
        assert len({*names}) == len(names) and names[0] == 'embed' and names[-1] == 'logits' and g.model == family.name
        assert len({*g.names}) == len(g) == len(g.edges) and (g.edges[:, 0] < g.edges[:, 1]).all()
        assert (g.edges[1:, 1] >= g.edges[:-1, 1]).all()                       # readers in order
        assert {g.nodes[i].kind for i in g.writers} <= {'embed', 'head', 'whole'}
        assert {g.nodes[i].kind for i in g.readers} <= {'port', 'whole', 'logits'}
        assert g.index['embed'] == 0 and [g.edge(n) for n in g.names[::7]] == list(range(0, len(g), 7))
        assert not g.lags or all((n.lag is not None) == (n.kind == 'port' and n.port != 'rest') for n in g.nodes)


def test_edges_are_all_that_the_depth_allows(family, graphs):
    "Each pair of nodes that a way through the stream joins, and each port with its heads: counted anew from the names."
    for g in graphs:
        want = set()
        for b in g.nodes:
            for a in g.nodes:
                if a.kind in ('embed', 'head', 'whole') and b.kind in ('port', 'whole', 'logits') and before(family, a, b): want.add(f'{a.name}->{b.name}')
                if a.kind == 'port' and b.kind == 'head' and (a.block, a.branch) == (b.block, b.branch) and serves(family, a, b): want.add(f'{a.name}->{b.name}')
        assert {*g.names} == want
        assert [n for n, k in zip(g.names, g.inner.tolist()) if k] == [n for n in g.names if g.nodes[g.index[n.split('->')[0]]].kind == 'port']


def before(model, a, b):
    "Is a writer done before a reader reads: in an earlier block, or a mixer before the MLP that comes after it in the same block."
    if a.block != b.block: return a.block < b.block
    return 'resid_mid' in model.adapter.block_sites(model.config, a.block) and b.branch == 'mlp' and a.branch in ('ssm', 'attn', 'mixer')


def serves(model, a, b):
    if a.heads is None or b.heads is None: return True
    of, have = (model.sizes['q_head'] if a.branch == 'attn' else model.sizes['head']), model.heads(a.site)
    return b.heads[0]//(of//have) in a.heads


def test_what_a_port_reads_back_to_is_what_moves_it(family, graphs):
    "The stream before a block is moved at token 4: the ports that look k tokens back move at 4 + k, and no other reader does."
    g = graphs[1]
    for i in range(family.n_layers):
        ports = [n for n in g.nodes if n.kind == 'port' and n.port != 'rest' and n.block == i]
        if not ports: continue
        sites = list(dict.fromkeys(n.site for n in ports))
        push = torch.randn(family.sizes['d_model'], generator=torch.Generator().manual_seed(i))
        with torch.no_grad():
            clean, moved = (family.run_with_cache(IDS, sites, edit=edit)[1] for edit in ((), add(f'blocks.{i}.resid_pre', push).at(4)))
        for site in sites:                                                       # a step size may be clamped in one head, not in all
            lags = {}
            for n in ports:
                if n.site == site: lags.setdefault(n.heads, []).append(n.lag)
            at = ((moved[site] - clean[site]).flatten(2).abs().amax((0, 2)) > 0).nonzero()[:, 0].tolist()
            assert all([4 + k for k in seen] == at for seen in lags.values()), site


DELTA = ['0.ssm', '1.ssm', '2.ssm']
MORE = {'rwkv7': DELTA[:2], 'kimi-linear': DELTA, 'olmo-hybrid': DELTA, 'qwen3-next': [*DELTA, '3.attn'], 'qwen3-5': [*DELTA, '3.attn']}


def test_a_head_hears_the_stream_through_its_ports_alone(family, graphs):
    "Its ports held at their values, the stream before the block is moved: what the head writes stays, but where it has a port for the rest."
    for g in graphs: assert [*g.beside] == MORE.get(family.adapter.family, [])
    g, moves = graphs[0], []
    for i in range(family.n_layers):
        nodes = [n for n in g.nodes if n.block == i and n.port != 'rest']
        ports, heads = (list(dict.fromkeys(n.site for n in nodes if n.kind == kind)) for kind in ('port', 'head'))
        if not heads: continue
        push = add(f'blocks.{i}.resid_pre', torch.randn(family.sizes['d_model'], generator=torch.Generator().manual_seed(i)))
        with torch.no_grad():
            clean = family.run_with_cache(IDS, ports + heads)[1]
            moved = family.run_with_cache(IDS, heads, edit=[push, *(patch(s, clean[s]) for s in ports)])[1]
        moves += ['.'.join(s.split('.')[1:3]) for s in heads if (moved[s] - clean[s]).abs().max() > 1e-5*clean[s].abs().max()]
    assert sorted(moves) == MORE.get(family.adapter.family, [])


def test_what_is_heard_beside_the_ports_is_one_more_port(family, graphs):
    "Of each such branch one, with and without lags: it reads what its block reads, and all heads of the branch have it."
    for g in graphs:
        some = [n for n in g.nodes if n.port == 'rest']
        assert [n.name for n in some] == [f'{b}.rest' for b in MORE.get(family.adapter.family, [])]
        for n in some:
            heads = [m for m in g.nodes if m.kind == 'head' and (m.block, m.branch) == (n.block, n.branch)]
            assert (n.kind, n.site, n.heads, n.lag, n.reads, n.writes) == ('port', heads[0].site, None, None, 2*n.block, None) and len(heads) > 1
            assert [e for e in g.names if e.startswith(f'{n.name}->')] == [f'{n.name}->{m.name}' for m in heads]
            before = ['embed', *(m.name for m in g.nodes if m.kind in ('head', 'whole') and m.block < n.block)]
            assert [e for e in g.names if e.endswith(f'->{n.name}')] == [f'{a}->{n.name}' for a in before]


def test_heads_that_share_a_port_have_the_same_value(family, graphs):
    g = graphs[0]
    sites = list(dict.fromkeys(n.site for n in g.nodes if n.kind == 'port'))
    if not sites: return
    with torch.no_grad(): cache = family.run_with_cache(IDS, sites)[1]
    for site in sites:
        groups = [n.heads for n in g.nodes if n.kind == 'port' and n.site == site]
        if groups == [None]: continue
        assert sorted(h for heads in groups for h in heads) == list(range(cache[site].shape[2]))     # each head once
        firsts = [cache[site][:, :, heads[0]] for heads in groups]
        for heads, v in zip(groups, firsts): assert all(torch.equal(cache[site][:, :, h], v) for h in heads)
        assert not any(torch.equal(a, b) for k, a in enumerate(firsts) for b in firsts[:k])


def test_the_writers_sum_to_the_stream(family, graphs):
    "Of each head the columns of the output matrix that are its own; a bias would be missing, and no family here has one."
    g = graphs[0]
    wanted = [n.site for n in g.nodes if n.kind in ('embed', 'head', 'whole')] + [f'blocks.{i}.{s}' for i in range(family.n_layers) for s in ('resid_pre', 'resid_post')]
    with torch.no_grad(): cache = family.run_with_cache(IDS, list(dict.fromkeys(wanted)))[1]
    total, done = cache[g.nodes[0].site].clone(), set()
    for n in g.nodes:
        if n.kind not in ('head', 'whole') or n.site in done: continue
        done.add(n.site)
        if n.branch == 'block': total += cache[n.site] - cache[f'blocks.{n.block}.resid_pre']
        elif n.heads is None: total += cache[n.site]
        else: total += shares(family, n, cache[n.site]).sum(0)
    last = cache[f'blocks.{family.n_layers - 1}.resid_post']
    assert (total - last).abs().max() <= 1e-5*last.abs().max()


# -- of one, by hand -----------------------------------------------------------------------
def test_the_graph_of_mamba2_written_out():
    "Two blocks of four heads in two groups."
    g = model_graph(load_model('mock://mamba2-tiny'))
    ports = [f'{{}}.ssm.{s}[{k}]' for s, n in (('x', 4), ('B', 2), ('C', 2), ('dt', 4), ('gate', 4)) for k in range(n)]
    heads = [f'{{}}.ssm[{h}]' for h in range(4)]
    block = lambda i: [n.format(i) for n in ports + heads]
    assert [n.name for n in g.nodes] == ['embed', *block(0), *block(1), 'logits']
    own = lambda p, h: int(p.split('[')[1][0]) == (h//2 if '.B' in p or '.C' in p else h)
    inner = [f'{p}->{h}'.format(i, i) for i in (0, 1) for k, h in enumerate(heads) for p in ports if own(p, k)]
    outer = [f'embed->{p}'.format(i) for i in (0, 1) for p in ports] + [f'{h.format(0)}->{p.format(1)}' for h in heads for p in ports]
    ends = ['embed->logits'] + [f'{h.format(i)}->logits' for i in (0, 1) for h in heads]
    assert sorted(g.names) == sorted([*inner, *outer, *ends]) and len(g) == 145
    lagged = model_graph(load_model('mock://mamba2-tiny'), lags=True)                # four taps; gate and step see no other token
    want = [f'{p}@{k}'.format(0) for p in ports for k in range(1 if '.dt' in p or '.gate' in p else 4)]
    assert [n.name for n in lagged.nodes if n.kind == 'port' and n.block == 0] == want


def test_the_edges_of_rwkv7_counted():
    "Two blocks of two heads with six ports each and one beside them, and an MLP: into a block, within it, into MLPs, into the logits."
    g = model_graph(load_model('mock://rwkv7-tiny'))
    ports, inner = 2*6 + 1, 2*(6 + 1)
    assert len(g) == ports*1 + ports*(1 + 3) + 2*inner + (3 + 6) + 7
    assert repr(g) == f'Graph of mock://rwkv7-tiny: {len(g)} edges, 1 embed, 26 ports, 4 heads, 2 whole, 1 logits'


@pytest.mark.parametrize('family', ['mamba1', 'mamba2', 'jamba', 'bamba', 'falcon-h1', 'zamba2', 'nemotron-h', 'qwen3-next', 'rwkv7'])
def test_lags_are_the_width_of_the_convolution(family):
    model = load_model(f'mock://{family}-tiny')
    taps = {'rwkv7': {2}}.get(family) or {m.weight.shape[-1] for m in model.hf.modules() if isinstance(m, torch.nn.Conv1d)}
    found = {}
    for n in model_graph(model, lags=True).nodes:
        if n.kind == 'port' and n.port in ('x', 'B', 'C') and n.branch == 'ssm': found.setdefault((n.site, n.heads), []).append(n.lag)
    assert {len(v) for v in found.values()} == taps and len(taps) == 1


def test_parallel_branches_do_not_read_each_other():
    g = model_graph(load_model('mock://falcon-h1-tiny'))
    for name in g.names:
        a, b = name.split('->')
        if a.split('.')[0] == b.split('.')[0] and a.count('.') == 1: assert b.endswith('mlp') and ('.ssm[' in a or '.attn[' in a)
    assert g.edge('0.ssm[0]->0.mlp') >= 0 and g.edge('0.attn[3]->0.mlp') >= 0


def test_queries_are_their_own_and_keys_shared():
    g = model_graph(load_model('mock://llama-tiny'))
    into = {h: sorted(n.split('->')[0] for n in g.names if n.endswith(f'->0.attn[{h}]')) for h in range(4)}
    assert into == {h: sorted([f'0.attn.q[{h}]', f'0.attn.k[{h//2}]', f'0.attn.v[{h//2}]']) for h in range(4)}


def test_what_is_taken_as_one_is_said():
    said = {f: model_graph(load_model(f'mock://{f}-tiny')) for f in ('zamba2', 'lfm2', 'kimi-linear', 'mamba2')}
    assert said['zamba2'].note == 'taken as one: 1.block, 3.block' and said['lfm2'].note == 'taken as one: 0.ssm, 2.ssm'
    assert said['kimi-linear'].note == 'taken as one: 3.attn' and not said['mamba2'].note
    assert repr(said['mamba2']) == 'Graph of mock://mamba2-tiny: 145 edges, 1 embed, 32 ports, 8 heads, 1 logits'
    assert repr(said['zamba2']).endswith('2 whole, 1 logits; taken as one: 1.block, 3.block')


def test_the_share_of_a_head_is_its_columns():
    model = load_model('mock://mamba2-tiny')
    n = next(n for n in model_graph(model).nodes if n.name == '1.ssm[2]')
    seen = []
    handle = model.blocks[1].mixer.out_proj.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad(): model.hf(IDS)
    handle.remove()
    W = model.blocks[1].mixer.out_proj.weight
    want = seen[0][..., 32:48] @ W[:, 32:48].T
    assert torch.allclose(shares(model, n, seen[0])[2], want, atol=1e-6)


# -- small things --------------------------------------------------------------------------
def test_edges_between_some_nodes():
    g = model_graph(load_model('mock://mamba2-tiny'))
    some = g.edges_of(['embed', '0.ssm.x[1]', '0.ssm[1]', 'logits'])
    names = [n for n, k in zip(g.names, some.tolist()) if k]
    assert sorted(names) == ['0.ssm.x[1]->0.ssm[1]', '0.ssm[1]->logits', 'embed->0.ssm.x[1]', 'embed->logits']
    assert not g.edges_of([]).any() and not g.edges_of(['embed']).any()
    assert g.edge(' embed -> logits ') == g.names.index('embed->logits')


@pytest.mark.parametrize('name', ['embed', 'embed->nowhere', 'logits->embed', 'embed->0.ssm[0]', '0.ssm.x[0]->0.ssm[1]', 'embed->logits->logits', ''])
def test_an_edge_that_is_not_there(name):
    g = model_graph(load_model('mock://mamba2-tiny'))
    with pytest.raises(ValueError, match='expected one of 145, such as'): g.edge(name)


def test_a_node_that_is_not_there():
    with pytest.raises(ValueError, match="got node '9.ssm'"): model_graph(load_model('mock://mamba2-tiny')).edges_of(['embed', '9.ssm'])


def test_a_graph_by_hand():
    nodes = Node('embed', 'embed', -1, '', 'blocks.0.resid_pre', writes=0), Node('logits', 'logits', 1, '', 'blocks.0.resid_post', reads=2)
    g = Graph('none', nodes, torch.tensor([[0, 1]]))
    assert g.names == ['embed->logits'] and g.writers == [0] and g.readers == [1] and not g.inner.any() and nodes[0].port == ''
    assert Node('0.ssm.B[0]@1', 'port', 0, 'ssm', 'blocks.0.ssm.B', (0, 1), 1, reads=0).port == 'B'


@pytest.mark.parametrize('lags', [False, True])
def test_a_graph_is_found_where_gradients_are_off(lags):
    model = load_model('mock://mamba2-tiny')
    want = model_graph(model, lags).names
    with torch.no_grad(): assert model_graph(model, lags).names == want


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
@pytest.mark.parametrize('name', ['mamba2', 'mamba1', 'falcon-h1', 'bamba', 'hymba', 'rwkv7', 'olmo-hybrid', 'qwen3-5', 'llama'])
def test_the_graph_is_the_same_in_another_precision(name, dtype):
    "Models that keep a step or their stream in float32 round in float64 too."
    assert model_graph(load_model(f'mock://{name}-tiny', dtype=dtype), lags=True).names == model_graph(load_model(f'mock://{name}-tiny'), lags=True).names
