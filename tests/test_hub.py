"""Sharing: repositories in a folder and on a stand-in of the Hub (real HTTP, client in a process of its own), the card, registered names."""
import json
import multiprocessing
import os
import shutil
import struct
import zlib
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
import yaml
from hub_server import Hub
from safetensors.torch import load_file

import circuitbench.registry as registry
from circuitbench.card import card_metrics, frequency_figure, metrics_figure, model_card, png_bytes
from circuitbench.coder import Metrics, Place, SAEConfig
from circuitbench.hub import from_hub, push_to_hub
from circuitbench.registry import (
    download,
    hub_name,
    ids_in,
    locate,
    register,
    registry_folder,
    released,
    sae_ids,
    unregister,
)
from circuitbench.sae import SAE

CFG, WEIGHTS, FIXTURES = 'cfg.json', 'sae_weights.safetensors', Path(__file__).parent/'data'/'saelens'


def small(seed=0, measured=True, **keys):
    "An SAE of random weights; figures are drawn of one that has been measured."
    sae = SAE(SAEConfig(**(dict(d_in=6, d_sae=20, k=3, site='blocks.1.ssm.y', model='org/model', family='mamba2') | keys)), seed)
    make = torch.Generator().manual_seed(seed)
    for _, p in sorted(sae.named_parameters()): p.copy_(torch.randn(p.shape, generator=make))
    if not measured: return sae
    sae.metrics = Metrics(.9 - seed/100, 3., .1, 3., 3.1, 4., 4096, 200_000)
    sae.frequency = torch.rand(20, generator=make)*(torch.rand(20, generator=make) > .2)
    return sae


def bare(seed=0): return small(seed, False)
def same(a, b): return a.cfg == b.cfg and all(torch.equal(p, getattr(b, n)) for n, p in a.named_parameters())
def tree(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv('CIRCUITBENCH_HOME', str(tmp_path/'home'))
    return tmp_path/'home'


# -- a folder as a repository --------------------------------------------------------
def test_a_folder_takes_the_layout_of_a_repository(tmp_path):
    saes = {'layer_1/k_3': small(), 'layer_1/k_3_jump': small(1, activation='jumprelu')}
    push = push_to_hub(saes, tmp_path/'repo', license='mit', datasets=['org/text'], about='Made for a test.')
    files = tree(tmp_path/'repo')
    assert set(files) == {'README.md', 'figures/metrics.png'} | {
        f'{i}/{f}' for i in saes for f in (CFG, WEIGHTS, 'sparsity.safetensors')} | {f'figures/frequency/{i}.png' for i in saes}
    assert push.added == tuple(saes) and push.where == str(tmp_path/'repo') and 'layer_1/k_3_jump' in repr(push)
    for i, sae in saes.items():
        assert same(from_hub(tmp_path/'repo', i), sae) and same(SAE.load(tmp_path/'repo'/i), sae)
    assert ids_in(tmp_path/'repo') == sorted(saes)


def test_pushing_again_leaves_what_is_there(tmp_path):
    repo, first = tmp_path/'repo', bare()
    push_to_hub({'a': first}, repo)
    when = {p: p.stat().st_mtime_ns for p in repo.rglob('*') if p.is_file()}
    push = push_to_hub({'a': first}, repo)
    assert (push.added, push.unchanged, push.where) == ((), ('a',), '') and 'nothing had changed' in repr(push)
    assert {p: p.stat().st_mtime_ns for p in repo.rglob('*') if p.is_file()} == when
    push_to_hub({'b': bare(1), 'a': first}, repo)
    assert (repo/'a'/WEIGHTS).stat().st_mtime_ns == when[repo/'a'/WEIGHTS]
    before = tree(repo)
    with pytest.raises(ValueError, match='got b, under which .* holds other SAEs.*replace=True') as err:
        push_to_hub({'b': bare(2), 'c': bare(3)}, repo)
    assert tree(repo) == before and len(str(err.value).splitlines()) == 1
    assert push_to_hub({'b': bare(2)}, repo, replace=True).added == ('b',) and same(from_hub(repo, 'b'), bare(2))


def test_one_sae_is_named_by_its_site_and_a_root_may_hold_one(tmp_path):
    push_to_hub(bare(), tmp_path/'one')
    assert ids_in(tmp_path/'one') == ['blocks.1.ssm.y'] and same(from_hub(tmp_path/'one'), bare())
    push_to_hub({'.': bare()}, str(tmp_path/'root'))
    assert ids_in(tmp_path/'root') == ['.'] and same(SAE.load(tmp_path/'root'), bare())


def test_folders_are_pushed_as_they_are_but_checkpoints_become_what_sae_lens_reads(tmp_path):
    names = ['topk-norms', 'gated', 'checkpoint-batchtopk', 'checkpoint-batchtopk-norms_left-scaled']
    push_to_hub({n: FIXTURES/n for n in names}, tmp_path/'repo')
    for name in names[:2]:
        for f in (CFG, WEIGHTS): assert (tmp_path/'repo'/name/f).read_bytes() == (FIXTURES/name/f).read_bytes()
    for name in names:
        cfg, said = json.loads((tmp_path/'repo'/name/CFG).read_text()), load_file(FIXTURES/name/'truth.safetensors')
        if 'checkpoint' in name: assert (cfg['architecture'], cfg['normalize_activations']) == ('jumprelu', 'none')
        sae = from_hub(tmp_path/'repo', name)
        assert (sae(said['x']) - said['y']).abs().max() < 1e-6
    assert not (tmp_path/'repo'/'gated'/'truth.safetensors').exists()


@pytest.mark.parametrize('saes, words', [
    ({}, 'no SAE'), ({'../a': None}, "id '../a'"), ({'a//b': None}, "id 'a//b'"), ({'/a': None}, "id '/a'"), ({'': None}, "id ''"),
    ({'a': Path('/nowhere/at/all')}, 'no folder'), ({'a': 'no-such-name'}, 'registered name')])
def test_what_cannot_be_pushed(tmp_path, home, saes, words):
    with pytest.raises(ValueError, match=words): push_to_hub(saes, tmp_path/'repo')
    assert not (tmp_path/'repo').exists()


def test_what_can_be_no_repository(tmp_path):
    with pytest.raises(ValueError, match='ORG/NAME of the Hub, or a folder such as ./mine'): push_to_hub(bare(), 'mine')
    (tmp_path/'file').write_text('')
    with pytest.raises(ValueError, match='which is a file'): push_to_hub(bare(), tmp_path/'file')
    with pytest.raises(TypeError, match='name or the folder'): push_to_hub({'a': 3}, tmp_path/'repo')


def test_a_push_that_is_interrupted_changes_nothing(tmp_path, monkeypatch):
    push_to_hub({'a': bare()}, tmp_path/'repo')
    before, copy = tree(tmp_path/'repo'), shutil.copyfile
    def fail(source, target):
        if Path(source).name == WEIGHTS: raise KeyboardInterrupt
        return copy(source, target)
    monkeypatch.setattr('shutil.copyfile', fail)
    with pytest.raises(KeyboardInterrupt): push_to_hub({'a': bare(1)}, tmp_path/'repo', replace=True)
    assert tree(tmp_path/'repo') == before


def test_repositories_without_an_sae_and_with_pickles_say_so(tmp_path):
    repo = tmp_path/'repo'
    push_to_hub({'good': bare(), 'also': bare(1)}, repo)
    (repo/'old').mkdir()
    (repo/'old'/CFG).write_text('{}'), (repo/'old'/'sae_weights.pt').write_bytes(b'pickle')
    (tmp_path/'empty').mkdir()
    for call, words in (
            (lambda: from_hub(repo), 'several SAEs; expected one of also, good'),
            (lambda: from_hub(repo, 'none'), "id 'none', which is not there; expected one of also, good"),
            (lambda: from_hub(repo, 'old'), 'old/sae_weights.pt is a pickle, which may run code.*also, good'),
            (lambda: from_hub(tmp_path/'empty'), 'holds no SAE'), (lambda: from_hub(tmp_path/'nowhere'), 'no folder'),
            (lambda: SAE.load(repo), 'no SAE itself; expected one of those in it: also, good'),
            (lambda: SAE.load(repo/'old'), 'sae_weights.pt is a pickle')):
        with pytest.raises(ValueError, match=words) as err: call()
        assert len(str(err.value).splitlines()) == 1


def test_ids_are_the_folders_that_hold_both_files():
    files = ['README.md', f'a/{CFG}', f'a/{WEIGHTS}', f'a/b/{CFG}', f'a/b/{WEIGHTS}', f'c/{CFG}', f'd/{WEIGHTS}', f'e/x{CFG}', f'e/{WEIGHTS}']
    assert sae_ids(files) == ['a', 'a/b'] and sae_ids([CFG, WEIGHTS]) == ['.']


# -- the card ------------------------------------------------------------------------
def cfg_of(sae, tmp): return json.loads((sae.save(tmp)/CFG).read_text())


def parts(card):
    _, front, body = card.split('---\n', 2)
    return yaml.safe_load(front), body


def test_the_card_says_what_was_measured(tmp_path):
    cfgs = {'topk': cfg_of(small(), tmp_path/'a'), 'rank1': cfg_of(small(shape=(2, 3), heads=(1,), rank1=True, site='blocks.0.ssm.state'), tmp_path/'b'),
            'trans': cfg_of(small(writes=(Place('blocks.1.mlp_out', (4,)),), activation='batchtopk', skip=True), tmp_path/'c'),
            'cross': cfg_of(small(shape=(4,), beside=(Place('blocks.2.ssm.y', (2,), 'tiny://rwkv7'),)), tmp_path/'d'),
            'foreign': json.loads((FIXTURES/'gated'/CFG).read_text())}
    front, body = parts(model_card(cfgs, 'org/my-saes', 'mit', ['org/text'], 'About it.'))
    assert front == {'library_name': 'saelens', 'tags': ['saelens', 'sparse-autoencoder', 'mamba2', 'circuitbench'],
                     'base_model': ['org/model'], 'license': 'mit', 'datasets': ['org/text']}
    table = {r[0].strip('`'): r[1:] for line in body.splitlines() if line.startswith('| `') for r in [[c.strip() for c in line.strip('|').split('|')]]}
    assert set(table) == set(cfgs)
    assert table['topk'] == ['`blocks.1.ssm.y`', 'topk', '6', '20', '3.0', '0.9000', '0.900', '3.0000 / 3.1000 / 4.0000', '10.0%', '4,096', '200,000']
    assert table['rank1'][1] == 'topk, rank-1 atoms, heads 1'
    assert table['trans'][:2] == ['`blocks.1.ssm.y` to `blocks.1.mlp.hook_out`', 'batchtopk, skip transcoder']
    assert table['cross'][:2] == ['`blocks.1.ssm.y` + `blocks.2.ssm.y`', 'topk, crosscoder'] and 'tiny://rwkv7' in body
    assert table['foreign'][1:4] == ['gated', '6', '12'] and table['foreign'][5:] == ['-']*6
    assert "SAE.load('org/my-saes:cross')" in body and "SAE.from_pretrained('org/my-saes', 'cross')" in body
    assert 'no architecture for `rank1`' in body and body.startswith('\n# my-saes\n\nAbout it.\n')


def test_what_a_person_wrote_into_the_card_stays(tmp_path):
    cfgs = {'a': cfg_of(small(), tmp_path/'a')}
    mine = '---\nlicense: apache-2.0\ntags: [mine]\nbase_model: org/other\nextra: {kept: 1}\n---\n# Ours\n\nWords before.\n'
    front, body = parts(model_card(cfgs, 'org/x', old=mine))
    assert front['license'] == 'apache-2.0' and front['extra'] == {'kept': 1} and front['library_name'] == 'saelens'
    assert front['tags'][0] == 'mine' and 'saelens' in front['tags'] and front['base_model'] == ['org/other', 'org/model']
    assert body.startswith('\n# Ours\n\nWords before.\n\n<!-- circuitbench: begin -->')
    once = model_card(cfgs, 'org/x', old=mine) + '\nWords after.\n'
    twice = model_card(cfgs | {'b': cfgs['a']}, 'org/x', old=once)
    assert '`b`' in twice and twice.endswith('\nWords after.\n') and twice.count('circuitbench: begin') == 1
    assert model_card(cfgs | {'b': cfgs['a']}, 'org/x', old=twice) == twice
    assert parts(model_card(cfgs, 'org/x'))[0].get('license') is None
    for bad in ('---\na: [\n---\n', '---\n- a\n---\n'):
        with pytest.raises(ValueError, match='front matter'): model_card(cfgs, 'org/x', old=bad)


def test_metrics_of_a_file_that_lacks_some_are_none():
    assert card_metrics({}) is None and card_metrics({'metadata': {'circuitbench': {'metrics': {'fve': 1}}}}) is None


def size_of(png):
    "Width, height and whether it has content, by the format's specification."
    assert png[:8] == b'\x89PNG\r\n\x1a\n' and png[12:16] == b'IHDR'
    data, at = b'', 8
    while at < len(png):
        n, kind = struct.unpack('>I4s', png[at:at + 8])
        if kind == b'IDAT': data += png[at + 8:at + 8 + n]
        at += 12 + n
    return *struct.unpack('>II', png[16:24]), len(set(zlib.decompress(data)))


def test_figures_are_png_and_hold_the_numbers():
    fig = frequency_figure(torch.tensor([0., 0., .1, .1, .5]), 'layer 1')
    assert sum(p.get_height() for p in fig.axes[0].patches) == 3 and '2 of 5 latents never fire' in fig.axes[0].get_title()
    many = metrics_figure({'a': Metrics(.9, 3, .1, 3., 3.1, 4., 10), 'b': Metrics(-.2, 3, 0., 3., 3.1, 2.9, 10)})
    bars = [[round(p.get_width(), 6) for p in ax.patches] for ax in many.axes]
    assert bars == [[-.2, .9], [0, .9], [0, .1]] and 'not defined' in [t.get_text() for t in many.axes[1].texts]
    for f in (fig, many):
        width, height, values = size_of(png_bytes(f))
        assert width > 300 and height > 100 and values > 10 and png_bytes(f) == png_bytes(f)


# -- names ---------------------------------------------------------------------------
def test_registered_names(tmp_path, home):
    folder = small().save(tmp_path/'sae')
    made = register('mine', folder)
    assert (made.site, made.model, made.architecture, made.d_in, made.d_sae, made.l0, made.fve) == ('blocks.1.ssm.y', 'org/model', 'topk', 6, 20, 3., .9)
    assert same(SAE.load('mine'), small()) and locate('mine') == folder and registry_folder() == home/'saes'
    assert released()['mine'] == made and 'mine' in repr(released()) and json.loads((home/'saes'/'mine.json').read_text())['where'] == str(folder)
    register('mine', folder)                                                          # the same again is no conflict
    other = small(1).save(tmp_path/'other')
    with pytest.raises(ValueError, match="'mine', which is taken.*replace=True"): register('mine', other)
    assert register('mine', other, replace=True).where == str(other) and same(SAE.load('mine'), small(1))
    register('alias', 'mine')
    assert locate('alias') == other
    unregister('mine')
    shipped = [f'tiny://{f.parent.relative_to(registry.SAES).as_posix()}' for f in sorted(registry.SAES.rglob(CFG))]
    with pytest.raises(ValueError, match=f"'mine', expected a registered name: {', '.join(shipped)}, alias;"): SAE.load('mine')
    with pytest.raises(ValueError, match='alias'): unregister('mine')
    assert [p.name for p in (home/'saes').iterdir()] == ['alias.json'] and same(SAE.load('alias'), small(1))
    register('alias', 'alias')
    assert locate('alias') == other


def test_a_damaged_entry_is_named_and_the_others_are_usable(tmp_path, home):
    folder = small().save(tmp_path/'sae')
    register('good', folder), register('bad', folder)
    (home/'saes'/'bad.json').write_text('{"name": ')
    assert 'damaged' in released()['bad'].note and same(SAE.load('good'), small())
    with pytest.raises(ValueError, match="'bad', which is damaged.*register it anew"): SAE.load('bad')
    register('bad', folder, replace=True)
    assert same(SAE.load('bad'), small())


@pytest.mark.parametrize('name', ['a/b', 'a:b', '../a', '', '.a', 'a b'])
def test_names_that_cannot_be_registered(tmp_path, home, name):
    with pytest.raises(ValueError, match='letters, digits'): register(name, small().save(tmp_path/'sae'))


def test_what_is_no_sae_is_not_registered(tmp_path, home):
    for where, words in ((tmp_path/'none', 'no folder'), (tmp_path, 'no SAE')):
        with pytest.raises(ValueError, match=words): register('x', where)
    (tmp_path/'sae').mkdir(), (tmp_path/'sae'/CFG).write_text('{}'), (tmp_path/'sae'/WEIGHTS).write_bytes(b'')
    with pytest.raises(ValueError, match='cannot be read'): register('x', tmp_path/'sae')
    assert not list(home.rglob('*.json'))


def test_a_shipped_sae_has_a_name(tmp_path, home, monkeypatch):
    monkeypatch.setattr(registry, 'SAES', tmp_path/'saes')
    with pytest.raises(ValueError, match='there is none'): SAE.load('tiny://mamba2/blocks.2.ssm.y')
    small().save(tmp_path/'saes'/'mamba2'/'blocks.2.ssm.y')
    assert same(SAE.load('tiny://mamba2/blocks.2.ssm.y'), small()) and released().rows[0].name == 'tiny://mamba2/blocks.2.ssm.y'
    with pytest.raises(ValueError, match='tiny://mamba2/blocks.2.ssm.y'): SAE.load('tiny://mamba2')
    with pytest.raises(ValueError, match='expected'): SAE.load('tiny://../../etc')


@pytest.mark.parametrize('name, want', [
    ('org/repo', ('org/repo', None)), ('org/repo:a', ('org/repo', 'a')), ('org/repo/a/b', ('org/repo', 'a/b')), ('o.r-g/r_e.p:a/b.c', ('o.r-g/r_e.p', 'a/b.c'))])
def test_names_of_the_hub(name, want): assert hub_name(name) == want


@pytest.mark.parametrize('name', ['org/re po', 'org/repo/a:b', '://x', 'a:b'])
def test_what_is_no_name(name, home):
    with pytest.raises(ValueError, match='expected'): locate(name)


# -- the Hub -------------------------------------------------------------------------
# The functions below run in a process of their own, whose HF_ENDPOINT is the stand-in on loopback.
def client_push(seeds, repo, measured=False, **keys):
    push = push_to_hub({i: small(s, measured) for i, s in seeds.items()}, repo, **keys)
    return push.added, push.unchanged, push.where


def client_load(name, *args):
    sae = SAE.load(name) if not args else from_hub(name, *args)
    return sae.cfg, {n: p.detach().numpy() for n, p in sae.named_parameters()}, sae.metrics, None if sae.frequency is None else sae.frequency.numpy()


def client_ids(repo): return ids_in(repo)
def client_register(*args): return register(*args)
def client_path(*args): return str(download(*args))


def client(hub, folder, **env):
    "A process that talks to the stand-in."
    own = dict(HF_ENDPOINT=hub.url, HF_HUB_OFFLINE='0', HF_HUB_DISABLE_XET='1', HF_TOKEN=hub.token, HF_HOME=str(folder/'hf'),
               HF_HUB_DISABLE_PROGRESS_BARS='1', CIRCUITBENCH_HOME=str(folder/'home'), NO_PROXY='127.0.0.1,localhost', no_proxy='127.0.0.1,localhost') | env
    kept = {k: os.environ.get(k) for k in own}
    os.environ.update(own)
    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))
    pool.submit(client_ids, '.').result()                                              # started with this environment
    for k, v in kept.items(): os.environ.pop(k) if v is None else os.environ.__setitem__(k, v)
    return pool


@pytest.fixture(scope='module')
def hub():
    made = Hub()
    yield made
    made.close()


@pytest.fixture(scope='module')
def place(tmp_path_factory): return tmp_path_factory.mktemp('client')


@pytest.fixture(scope='module')
def ask(hub, place):
    with client(hub, place) as pool: yield lambda f, *args, **keys: pool.submit(f, *args, **keys).result()


@pytest.fixture(autouse=True)
def quiet(request):
    yield
    if 'hub' in request.fixturenames: request.getfixturevalue('hub').fail.clear()


def loaded(said, seed, measured=False):
    "Is it, to the bit, the SAE of a seed?"
    (cfg, weights, metrics, frequency), sae = said, small(seed, measured)
    rate = frequency is None and sae.frequency is None or (abs(frequency - sae.frequency.numpy()) < 1e-6).all()
    return cfg == sae.cfg and metrics == sae.metrics and rate and all((weights[n] == p.numpy()).all() for n, p in sae.named_parameters())


def test_a_push_is_one_commit_and_is_loaded_back(hub, ask):
    added, unchanged, where = ask(client_push, {'a': 0, 'deep/b': 1}, 'org/first', measured=True, license='mit')
    assert (added, unchanged) == (('a', 'deep/b'), ()) and where.startswith(f'{hub.url}/org/first/commit/')
    assert len(hub.repos['org/first']) == 2                                           # the empty one, and ours
    files = hub.head('org/first')
    assert {f'{i}/{f}' for i in ('a', 'deep/b') for f in (CFG, WEIGHTS, 'sparsity.safetensors')} < set(files)
    assert 'figures/metrics.png' in files and 'figures/frequency/deep/b.png' in files
    assert "from_pretrained('org/first', 'a')" in files['README.md'].decode()
    assert any(c == 'PUT' and p.startswith('/lfs/') for c, p in hub.log)               # weights went through LFS
    for name, args in (('org/first:a', ()), ('org/first/a', ()), ('org/first', ('a',))): assert loaded(ask(client_load, name, *args), 0, True)
    assert loaded(ask(client_load, 'org/first:deep/b'), 1, True) and ask(client_ids, 'org/first') == ['a', 'deep/b']
    wanted = [p for c, p in hub.log if c == 'GET' and '/resolve/' in p]
    assert not any('README' in p or 'figures' in p for p in wanted)                    # only the files of one SAE


def test_pushing_again_sends_nothing_and_overwrites_nothing(hub, ask):
    ask(client_push, {'a': 0}, 'org/again')
    n, sent = len(hub.repos['org/again']), len(hub.objects)
    assert ask(client_push, {'a': 0}, 'org/again') == ((), ('a',), '')
    assert (len(hub.repos['org/again']), len(hub.objects)) == (n, sent)
    with pytest.raises(ValueError, match='got a, under which org/again holds other SAEs'): ask(client_push, {'a': 1, 'b': 2}, 'org/again')
    assert len(hub.repos['org/again']) == n
    hub.put('org/again', {'README.md': hub.head('org/again')['README.md'].replace(b'# again\n', b'# again\n\nMine.\n'), 'mine.txt': b'kept'})
    added, unchanged, _ = ask(client_push, {'a': 0, 'b': 2}, 'org/again')
    card = hub.head('org/again')['README.md'].decode()
    assert (added, unchanged) == (('b',), ('a',)) and 'Mine.' in card and '| `a` |' in card and '| `b` |' in card
    assert hub.head('org/again')['mine.txt'] == b'kept'
    ask(client_push, {'a': 3}, 'org/again', replace=True)
    assert loaded(ask(client_load, 'org/again:a'), 3)


def test_revisions(hub, ask):
    ask(client_push, {'a': 0}, 'org/old')
    ask(client_push, {'a': 1}, 'org/old', replace=True)
    first = hub.sha('org/old', 1)
    assert loaded(ask(client_load, 'org/old', 'a', first), 0) and loaded(ask(client_load, 'org/old', 'a'), 1)
    with pytest.raises(ValueError, match="no revision 'v9'"): ask(client_load, 'org/old', 'a', 'v9')
    ask(client_register, 'pinned', 'org/old:a', first)
    assert loaded(ask(client_load, 'pinned'), 0)


def test_what_the_hub_does_not_have_is_said_with_what_it_has(hub, ask):
    ask(client_push, {'a': 0, 'b': 1}, 'org/some')
    hub.put('org/none', {'config.json': b'{}', 'model.safetensors': b'x'})
    hub.put('org/pickle', {'x/cfg.json': b'{}', 'x/sae_weights.pt': b'\x80\x04', 'y/cfg.json': b'{}'})
    hub.put('org/broken', {'a/cfg.json': b'{}', f'a/{WEIGHTS}': b'junk'})
    for args, words in (
            (('org/some:c',), "id 'c', which is not there; expected one of a, b"), (('org/some',), 'several SAEs; expected one of a, b'),
            (('org/none',), 'holds no SAE'), (('org/none:a',), 'holds no SAE'), (('org/pickle:x',), 'x/sae_weights.pt is a pickle'),
            (('org/pickle:y',), 'holds no SAE'), (('org/nowhere:a',), 'none of that name'), (('org/nowhere',), 'none of that name'),
            (('org/broken:a',), 'cannot be read'), (('org/some', '../a'), "id '../a'")):
        with pytest.raises(ValueError, match=words) as err: ask(client_load, *args)
        assert len(str(err.value).splitlines()) == 1, words
    assert not any(p.endswith('.pt') for c, p in hub.log if '/resolve/' in p)           # never downloaded


@pytest.mark.parametrize('part, status', [('/lfs/', 403), ('/commit/', 403), ('/preupload/', 403), ('/api/repos/create', 403)])
def test_a_push_that_fails_changes_nothing(hub, ask, part, status):
    repo = f'org/fails{abs(hash(part))}'
    if 'create' not in part: ask(client_push, {'a': 0}, repo)
    before = hub.repos.get(repo, [])[:]
    hub.fail = {part: status}
    with pytest.raises(ValueError, match='did not do as asked.*nothing was changed there') as err: ask(client_push, {f'b{part.strip("/")[:3]}': 40 + len(part)}, repo)
    assert hub.repos.get(repo, []) == before and len(str(err.value).splitlines()) == 1


def test_a_commit_of_someone_else_in_between_is_not_overwritten(hub, ask):
    ask(client_push, {'a': 0}, 'org/race')
    real = hub.at
    def at(repo, revision):                                                           # another commit, just before ours
        if hub.log[-1][1].endswith('/commit/main'): hub.put('org/race', {'theirs.txt': b'x'})
        return real(repo, revision)
    hub.at = at
    try:
        with pytest.raises(ValueError, match='A commit has happened since|did not do as asked'): ask(client_push, {'b': 1}, 'org/race')
    finally: hub.at = real
    assert 'theirs.txt' in hub.head('org/race') and f'b/{CFG}' not in hub.head('org/race')


def test_without_a_right_token_nothing_is_pushed(hub, ask):
    with pytest.raises(ValueError, match='did not do as asked'): ask(client_push, {'a': 0}, 'org/secret', token='hf_wrong')
    assert 'org/secret' not in hub.repos


def test_offline_the_cache_is_used_and_what_it_lacks_is_said(hub, ask, place):
    ask(client_push, {'a': 0, 'b': 1}, 'org/cached')
    assert loaded(ask(client_load, 'org/cached:a'), 0)
    with client(hub, place, HF_HUB_OFFLINE='1') as pool:
        n = len(hub.log)
        run = lambda f, *args: pool.submit(f, *args).result()
        assert loaded(run(client_load, 'org/cached:a'), 0) and loaded(run(client_load, 'org/cached'), 0)
        for name, words in (('org/cached:b', "id 'b', which is not there; expected one of a|not in the cache"), ('org/unseen:a', 'HF_HUB_OFFLINE is set|not in the cache')):
            with pytest.raises(ValueError, match=words): run(client_load, name)
        with pytest.raises(ValueError, match='HF_HUB_OFFLINE'): run(client_push, {'c': 1}, 'org/cached')
        assert len(hub.log) == n
