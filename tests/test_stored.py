"""States on disk are those of one run, however the prompt was cut, interrupted or cut off by a full disk; and of transformers' own cache."""
import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest
import torch

from circuitbench import file
from circuitbench.edit import meta
from circuitbench.file import beside
from circuitbench.load import load_model
from circuitbench.seam import CACHE
from circuitbench.site import SiteError
from circuitbench.state import from_cache
from circuitbench.stored import StoredStates, store_states


def ids(rows=1, length=150, seed=1): return torch.randint(1, 200, (rows, length), generator=torch.Generator().manual_seed(seed))


def near(a, b, tol=1e-4): return a.shape == b.shape and float((a - b).abs().max()) <= tol*max(1e-6, float(b.abs().max()))


def store(model, prompt, folder, *args, **options): return store_states(model, prompt, folder, *args, progress=False, **options)


def files(folder): return {p.name: p.read_bytes() for p in folder.iterdir()}


# -- what is stored ------------------------------------------------------------------
def test_pieces_are_one_run(recurrent, tmp_path):
    x = ids(2)
    _, cache = recurrent.run_with_cache(x, 'ssm.state')
    stored = store(recurrent, x, tmp_path/'a', piece=37)
    assert list(stored) == list(cache) and stored.complete and stored.available == tuple(range(150))
    assert all(near(stored[n], cache[n]) for n in cache)
    assert stored.shapes == {n: tuple(v.shape) for n, v in cache.items()}
    whole = store(recurrent, x, tmp_path/'b')                                # in one piece
    assert whole.piece == 512 and all(torch.equal(whole[n], cache[n]) for n in cache)


@pytest.mark.parametrize('family', ['mamba1', 'mamba2'])
def test_pieces_of_64_are_the_run_bit_for_bit(family, tmp_path):
    model = load_model(f'mock://{family}-tiny')
    _, cache = model.run_with_cache(ids(2), 'ssm.state')
    stored = store(model, ids(2), tmp_path/'a', piece=64)
    assert all(torch.equal(stored[n], cache[n]) for n in cache)


@pytest.mark.parametrize('family', ['mamba1', 'mamba2', 'falcon-h1', 'jamba', 'qwen3-next'])
def test_a_step_is_what_transformers_caches_after_it(family, tmp_path):
    "By a run of the untouched model over the prompt up to that step."
    model, x = load_model(f'mock://{family}-tiny'), ids(1, 50)
    stored = store(model, x, tmp_path/'a', piece=16)
    for t in (0, 15, 16, 49):
        with torch.no_grad(): out = model.hf(x[:, :t + 1], use_cache=True)
        theirs = from_cache(out[CACHE], x[:, :t + 1], turned=model.adapter.turned).ssm
        assert theirs and all(near(stored.get(i, at=t)[:, 0], S, 1e-3) for i, S in theirs.items())


def test_chosen_steps_heads_and_layers(recurrent, tmp_path):
    layer, heads = recurrent.recurrent()[-1], [1, 0]
    name = f'blocks.{layer}.ssm.state'
    for k, (at, steps) in enumerate([([-1, 3, 70], [3, 70, 149]), ('every:40', [0, 40, 80, 120]), (slice(10, 13), [10, 11, 12]), (99, [99])]):
        _, cache = recurrent.run_with_cache(ids(), name, at=at, heads=heads)
        stored = store(recurrent, ids(), tmp_path/str(k), layer, at, heads, piece=32)
        assert list(stored) == [name] and stored.steps == stored.available == tuple(steps) == tuple(cache.positions(name))
        assert near(stored[name], cache[name]) and near(stored.get(layer, steps[-1], 0), cache[name][:, -1:, 1:])
        assert {p.suffix for p in stored.folder.iterdir()} == {'.json', '.safetensors'}
        assert stored.state.length == min(150, (steps[-1]//32 + 1)*32)         # the rest is not run


def test_any_site_with_positions(tmp_path):
    model = load_model('mock://falcon-h1-tiny')
    sites = ['ssm.write', 'resid_pre', 'resid_post', 'ssm.B', 'attn.k', 'embed', 'logits']      # some of them are one tensor
    _, cache = model.run_with_cache(ids(), sites, heads=1)
    stored = store(model, ids(), tmp_path/'a', heads=1, sites=sites, piece=40)
    assert set(stored) == set(cache) and all(near(stored[n], cache[n]) for n in cache)
    assert near(stored['blocks.0.hook_resid_pre'], cache['embed']) and near(stored['logits'], cache['logits'])
    llama = load_model('mock://llama-tiny')                                  # keys alone go from piece to piece
    _, cache = llama.run_with_cache(ids(), 'blocks.1.resid_post')
    assert near(store(llama, ids(), tmp_path/'b', sites='blocks.1.resid_post', piece=40).get(1), cache['blocks.1.resid_post'])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_what_is_stored_is_rounded_and_the_run_is_not(dtype, tmp_path):
    model = load_model('mock://mamba2-tiny')
    exact, rounded = store(model, ids(), tmp_path/'a', piece=16), store(model, ids(), tmp_path/'b', piece=16, dtype=dtype)
    assert all(torch.equal(rounded[n], exact[n].to(dtype)) for n in exact)
    size = lambda s: sum(p.stat().st_size for p in s.folder.glob('0*'))
    assert size(rounded) < .55*size(exact)


def test_double_precision_stays(tmp_path):
    model = load_model('mock://mamba1-tiny', dtype=torch.float64)
    _, cache = model.run_with_cache(ids(), 'ssm.state')
    stored = store(model, ids(), tmp_path/'a', piece=37)
    assert stored.get(0).dtype == torch.float64 and all(near(stored[n], cache[n], 1e-10) for n in cache)


def test_parts_are_what_a_slice_of_all_is(tmp_path):
    model = load_model('mock://mamba2-tiny')
    stored = store(model, ids(2), tmp_path/'a', piece=40)
    whole = stored[f'blocks.{model.n_layers - 1}.ssm.state']
    for at in (0, -1, [149, 5, 6, 7, 39, 40], 'every:7', slice(30, 95, 2), slice(-3, None)):
        rows = [at] if isinstance(at, int) else sorted(at) if isinstance(at, list) else slice(None, None, 7) if isinstance(at, str) else at
        assert torch.equal(stored.get(model.n_layers - 1, at), whole[:, rows])
        assert torch.equal(stored.get('blocks.1.ssm.state', at, [3, 1]), stored.get(1)[:, rows][:, :, [3, 1]])
    pieces = list(stored.pieces())
    assert [t for steps, _ in pieces for t in steps] == list(range(150)) and len(pieces) == 4
    assert torch.equal(torch.cat([p['blocks.0.ssm.state'] for _, p in pieces], 1), stored.get(0))


def test_it_prints_its_shape_and_loads_back(tmp_path):
    model = load_model('mock://jamba-tiny')
    stored = store(model, ids(2), tmp_path/'a', at='every:10')
    back = StoredStates.load(str(tmp_path/'a'))
    assert repr(back) == repr(stored) and '15 steps of 2 x 150 tokens' in repr(stored) and '(2, 15, ' in repr(stored)
    assert torch.equal(back.tokens, ids(2)) and back.family == 'jamba' and back.steps == stored.steps
    with pytest.raises(AttributeError): back.piece = 3


# -- interrupts and full disks -------------------------------------------------------
CALL = """
import signal, sys, torch
from circuitbench.load import load_model
from circuitbench.stored import store_states
torch.set_num_threads(1)
model, x = load_model(f'mock://{sys.argv[1]}-tiny'), torch.randint(1, 200, (1, 300), generator=torch.Generator().manual_seed(1))
def call(folder): return store_states(model, x, folder, at='every:2', piece=4, progress=False)
"""


KILLED = CALL + """
import os
calls = []
def stop(module, args):
    calls.append(1)
    if len(calls) == 30: os.kill(os.getpid(), signal.SIGKILL)
model.blank
model.blocks[0].register_forward_pre_hook(stop)
call(sys.argv[2])
"""


@pytest.mark.parametrize('family, how', [('falcon-h1', signal.SIGINT), pytest.param('hymba', signal.SIGKILL, marks=pytest.mark.slow)])
def test_an_interrupted_call_goes_on_to_the_same_files(family, how, tmp_path):
    model, x, part = load_model(f'mock://{family}-tiny'), ids(1, 300), tmp_path/'part'
    if how == signal.SIGKILL:
        child = subprocess.run([sys.executable, '-c', KILLED, family, str(part)])
        assert child.returncode == -signal.SIGKILL
    else:
        calls = []
        def stop(module, args):
            calls.append(1)
            if len(calls) == 30: signal.raise_signal(signal.SIGINT)
        assert model.blank is not None                                      # made once, by a run that is not counted
        handle, before = model.blocks[0].register_forward_pre_hook(stop), signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            with pytest.raises(KeyboardInterrupt): store(model, x, part, at='every:2', piece=4)
        finally: handle.remove(), signal.signal(signal.SIGINT, before)
    there = StoredStates.load(part)
    assert not there.complete and 12 <= len(there.available) < 150 and f'{len(there.available)} of 150 steps' in repr(there)
    early = {n: there[n] for n in there}
    whole = store(model, x, tmp_path/'whole', at='every:2', piece=4)
    assert all(torch.equal(early[n], whole[n][:, :early[n].shape[1]]) for n in whole)
    with pytest.raises(ValueError, match='got step 298; expected some of the .* so far'): there.get(model.recurrent()[0], at=298)
    runs = []
    hook = model.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    assert store(model, x, part, at='every:2', piece=4).complete
    hook.remove()
    assert len(runs) <= 75 - 5                                              # what was there was not run again
    assert files(part) == files(tmp_path/'whole')
    _, cache = model.run_with_cache(x, 'ssm.state', at='every:2')
    assert all(near(there[n], cache[n]) for n in cache)


FULL = CALL + """
import errno, os, resource, subprocess
from pathlib import Path
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
base, limit = Path(sys.argv[2]), resource.getrlimit(resource.RLIMIT_FSIZE)
if sys.argv[3] == 'disk': subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=8m', 'tmpfs', str(base)], check=True)
whole, part, calls = base/'whole', base/'part', []
def fill(module, args):
    calls.append(1)
    if len(calls) != 30: return
    if sys.argv[3] == 'limit': return resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))
    try:
        with open(base/'filler', 'wb', 0) as f:
            while True: f.write(bytes(2**12))
    except OSError: pass
model.blank
hook = model.blocks[0].register_forward_pre_hook(fill)
try: call(part)
except OSError as err: full = err
hook.remove()
assert full.errno == {'disk': errno.ENOSPC, 'limit': errno.EFBIG}[sys.argv[3]], full
from circuitbench.stored import StoredStates
there = StoredStates.load(part)
assert len(there.available) == 58 and f'58 of 150 steps are in {part}' in str(full), full
early = {n: there[n] for n in there}
assert not [p for p in os.listdir(part) if p.endswith('.tmp')]
if sys.argv[3] == 'disk':
    try: call(part)
    except ValueError as err: assert 'ways out' in str(err), err
    else: raise AssertionError('the full disk was not noticed')
    (base/'filler').unlink()
else: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
call(part), call(whole)
read = lambda folder: {p.name: p.read_bytes() for p in folder.iterdir()}
assert read(part) == read(whole)
assert all(torch.equal(early[n], there[n][:, :58]) for n in there)
print('good')
"""


def may_mount(): return subprocess.run(['unshare', '-rm', 'mount', '-t', 'tmpfs', 'tmpfs', '/mnt'], capture_output=True).returncode == 0


@pytest.mark.parametrize('how', ['limit', pytest.param('disk', marks=pytest.mark.slow)])
def test_a_full_disk_leaves_what_was_written(how, tmp_path, monkeypatch, capsys):
    "A limit on the size of files, and where a file system may be made, one that fills up."
    if how == 'disk' and not may_mount(): pytest.skip('no file system may be mounted here; the other case runs everywhere')
    if how == 'disk':
        out = subprocess.run(['unshare', '-rm', sys.executable, '-c', FULL, 'falcon-h1', str(tmp_path), how], capture_output=True, text=True)
        assert out.stdout.strip() == 'good', out.stderr
        return
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    monkeypatch.setattr(sys, 'argv', ['-c', 'falcon-h1', str(tmp_path), how])
    try: exec(FULL, {})
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert capsys.readouterr().out.strip() == 'good'


def test_too_much_for_the_disk_is_said_before_anything_is_run(tmp_path):
    model = load_model('mock://mamba2-tiny')
    assert model.blank is not None                                           # one token, run to see what the model remembers
    hook = model.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail('it was run'))
    rows = shutil.disk_usage(tmp_path).free//(2**14*2*4*16*8*4) + 1           # two layers of four heads of 16 x 8 numbers
    x = torch.zeros(1, 1, dtype=torch.long).expand(rows, 2**14)
    with pytest.raises(ValueError, match=r'got 2 sites, 16384 steps of [\d.]+ GiB to write, .* GiB that are free in .*; ways out: at="every:N", heads=, dtype=torch.bfloat16, fewer layers'):
        store(model, x, tmp_path/'a')
    hook.remove()
    assert not [*(tmp_path/'a').iterdir()]


def test_files_that_are_damaged_or_lost_are_made_again(tmp_path):
    model = load_model('mock://falcon-h1-tiny')
    stored = store(model, ids(), tmp_path/'a', piece=16)
    good = files(stored.folder)
    def cut(name): os.truncate(stored.folder/name, 100)
    def drop(name): (stored.folder/name).unlink()
    for harm, name, left in [(cut, '000003.safetensors', 150), (drop, '000003.safetensors', 48), (drop, '000000.safetensors', 0), (drop, '000009.safetensors', 144)]:
        harm(name)
        assert len(stored.available) == left
        if harm is cut:
            with pytest.raises(ValueError, match='000003.safetensors, which cannot be read .* writes it again'): stored.get(0)
        else: drop('state.safetensors')
        if left == 0:
            with pytest.raises(ValueError, match='expected some of the 0 steps there so far'): stored.get(0)
        assert store(model, ids(), stored.folder, piece=16).complete and files(stored.folder) == good
    (stored.folder/'.000001.safetensors.1.tmp').write_bytes(b'of a call that was killed')
    drop('000009.safetensors')
    store(model, ids(), stored.folder)                                       # the folder's own piece
    assert files(stored.folder) == good


# -- what is refused -----------------------------------------------------------------
def test_a_folder_for_something_else(tmp_path):
    model, other = load_model('mock://mamba2-tiny'), load_model('mock://mamba2-tiny')
    with torch.no_grad(): other.hf.backbone.layers[1].mixer.out_proj.weight.mul_(1.01)
    a = tmp_path/'a'
    asked = dict(layers=[0, 1], at='every:2', heads=[0, 1], dtype=torch.bfloat16, piece=32)
    kept = store(model, ids(), a, **asked)
    good = files(a)
    for m, x, change, message in [
            (other, ids(), {}, 'another model'), (model, ids(seed=2), {}, r'another prompt \(150 tokens\)'), (model, ids(1, 149), {}, 'another prompt .*same .149 tokens'),
            (model, ids(), dict(at='every:3'), r'another at= \(0, 2, 4'), (model, ids(), dict(layers=1), 'another sites'), (model, ids(), dict(sites='ssm.write'), 'another sites'),
            (model, ids(), dict(heads=None), r'another heads= \(\(0, 1\)\), expected the same \(None\)'), (model, ids(), dict(dtype=None), 'another dtype= .bfloat16'),
            (model, ids(), dict(piece=16), r'another piece= \(32\), expected the same \(16\)')]:
        with pytest.raises(ValueError, match=f'got .*a, which was written for {message}.*another folder, or overwrite=True'): store(m, x, a, **asked | change)
        assert files(a) == good
    again = store(other, ids(seed=2), a, overwrite=True, piece=64)
    _, cache = other.run_with_cache(ids(seed=2), 'ssm.state')
    assert all(torch.equal(again[n], cache[n]) for n in cache) and again.steps != kept.steps and len(files(a)) == 3 + 2


def test_a_folder_with_other_things(tmp_path):
    model = load_model('mock://mamba2-tiny')
    (tmp_path/'thesis.tex').write_text('all of it')
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r'holds other things \(thesis.tex\); expected a new folder'): store(model, ids(), tmp_path, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.tex']
    with pytest.raises(ValueError, match='expected a folder of store_states'): StoredStates.load(tmp_path)
    for text in ('{}', '[]', 'no json', json.dumps({'format': 'circuitbench.states'}), json.dumps({'format': 'something else'})):
        (tmp_path/'states.json').write_text(text)
        with pytest.raises(ValueError, match='expected a folder of store_states'): StoredStates.load(tmp_path)
    with pytest.raises(ValueError, match='expected a folder of store_states'): store(model, ids(), tmp_path, overwrite=True)
    assert (tmp_path/'thesis.tex').exists()
    with pytest.raises(OSError): store(model, ids(), tmp_path/'thesis.tex')


@pytest.mark.parametrize('options, message', [
    (dict(at=150), 'got position 150 in at='), (dict(at=[-151]), 'expected -150 to 149'), (dict(at=slice(200, 300)), 'chooses none of the 150 positions'), (dict(at=[]), 'chooses none'),
    (dict(heads=99), 'got heads='), (dict(heads=[]), 'got heads='), (dict(layers=2), r'got layers=\[2\], expected some of those with ssm.state: 0'), (dict(layers=[]), r'got layers=\[\]'),
    (dict(piece=0), 'got piece=0'), (dict(at=meta(0)), 'meta'), (dict(sites='attn.pattern'), r'got blocks.2.attn.pattern, whose rows grow')])
def test_requests_that_do_not_fit(options, message, tmp_path):
    with pytest.raises(ValueError, match=message): store(load_model('mock://jamba-tiny'), ids(), tmp_path/'a', **options)
    assert not (tmp_path/'a').exists()


def test_prompts_and_sites_that_do_not_fit(tmp_path):
    model = load_model('tiny://mamba2')
    with pytest.raises(ValueError, match='different lengths'): store(model, ['one', 'and a longer one'], tmp_path/'a')
    with pytest.raises(SiteError, match='not there'): store(model, 'one', tmp_path/'a', sites='attn.q')
    with pytest.raises(ValueError, match='got positions of meta tokens'): store(load_model('mock://hymba-tiny'), ids(), tmp_path/'a', at=meta(0))


def test_reads_that_do_not_fit(tmp_path):
    model = load_model('mock://mamba2-tiny')
    stored = store(model, ids(), tmp_path/'a', at='every:2', heads=[1, 3], sites=['ssm.state', 'ssm.write'])
    name = 'blocks.0.ssm.state'
    for args, message in [((name, 3), 'got step 3; expected some of the 75 steps there: 0, 2, 4'), ((name, [-1]), 'got step -1'), ((name, 150), 'got step 150'),
                          ((name, slice(1, 2)), 'chooses none'), ((name, []), 'chooses none'), ((name, meta()), 'got step Meta'), ((name, None, 0), r'got heads=\[0\], expected some of those that are stored: 1, 3'),
                          ((name, None, []), 'got heads'), ((7,), 'got block 7, expected one that is stored: 0-1'), ((0,), 'got 0, which means 2 sites')]:
        with pytest.raises(ValueError, match=message): stored.get(*args)
    with pytest.raises(SiteError, match='nearest'): stored['blocks.0.ssm.y']
    assert torch.equal(stored.get(name, None, 3), stored[name][:, :, 1:])


# -- the file ------------------------------------------------------------------------
def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path/'a.txt'
    with beside(path) as new: new.write_text('old')
    with pytest.raises(KeyboardInterrupt), beside(path) as new:
        new.write_text('ne')
        raise KeyboardInterrupt
    assert files(tmp_path) == {'a.txt': b'old'}
    script = f"import os, signal, sys\nsys.path.insert(0, {os.path.dirname(file.__file__)!r})\nfrom file import beside\nwith beside({str(path)!r}) as new:\n new.write_text('ne')\n os.kill(os.getpid(), signal.SIGKILL)"
    assert subprocess.run([sys.executable, '-c', script]).returncode == -signal.SIGKILL and path.read_text() == 'old'
