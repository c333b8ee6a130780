"""Activations that a coder reads: of one document each, every token once, mixed, kept on disk, and gone on with bit for bit."""
import errno
import gzip
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import zlib
from itertools import islice
from pathlib import Path

import pytest
import torch
from torch import nn

from circuitbench import shards
from circuitbench.edit import meta
from circuitbench.load import load_model
from circuitbench.shards import Shard
from circuitbench.shuffle import Part, drawn, filled, grouped, taken
from circuitbench.site import SiteError
from circuitbench.store import ActivationStore, cached, collect, shuffled, stream
from circuitbench.stored import weights_hash
from circuitbench.stream import activations, document_rows, documents, heard, passages, shipped_text, token_rows

Y, OUT, STATE = 'blocks.0.ssm.y', 'blocks.1.ssm.out_proj_in', 'blocks.1.ssm.state'


@pytest.fixture(scope='module')
def small(): return load_model('mock://mamba2-tiny')


def texts(lengths, seed=0):
    "Documents of given lengths in tokens."
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 250, (n,), generator=g) for n in lengths]


def near(a, b, tol=1e-4): return a.shape == b.shape and float((a.float() - b.float()).abs().max()) <= tol*max(1e-6, float(b.abs().max()))


def files(folder): return {p.name: p.read_bytes() for p in Path(folder).iterdir()}


def numbered(n, size, start=0):
    "Parts of numbered rows."
    return [{'row': x, 'double': 2.*x[:, None].expand(-1, 3)} for x in torch.arange(start, start + n).split(size)]


def rows_of(batches): return [x for b in batches for x in b['row'].tolist()]


# -- documents -----------------------------------------------------------------------
def test_documents_of_every_source(tmp_path):
    three = ['one line\nand another', 'zwei: äöü', 'three']
    table = [{'id': i, 'body': t} for i, t in enumerate(three)]
    (tmp_path/'folder'/'deep').mkdir(parents=True)
    for name, t in zip(('a.txt', 'b.md', 'deep/c'), three): (tmp_path/'folder'/name).write_text(t, encoding='utf-8')
    (tmp_path/'folder'/'.hidden').write_bytes(b'\xff')
    lines = '\n\n'.join(json.dumps(r) for r in table)
    (tmp_path/'t.jsonl').write_text(lines)
    (tmp_path/'plain.jsonl').write_text('\n'.join(map(json.dumps, three)))
    with gzip.open(tmp_path/'t.jsonl.gz', 'wt', encoding='utf-8') as f: f.write(lines)
    with gzip.open(tmp_path/'a.txt.gz', 'wt', encoding='utf-8') as f: f.write('|'.join(three))
    class Table(list):
        column_names, asked = ['id', 'body'], []
        def select_columns(self, columns):
            self.asked.append(columns)
            return self
    for source, options in [(three, {}), (iter(three), {}), (lambda: iter(three), {}), (tuple(three), {}), (table, dict(column='body')), (Table(table), dict(column='body')), (tmp_path/'folder', {}),
                            ([tmp_path/'folder'/'a.txt', tmp_path/'folder'/'b.md', 'three'], {}), (tmp_path/'t.jsonl', dict(column='body')), (tmp_path/'t.jsonl.gz', dict(column='body')),
                            (tmp_path/'plain.jsonl', {}), ('|'.join(three), dict(split='|')), (tmp_path/'a.txt.gz', dict(split='|'))]:
        assert list(documents(source, **options)) == three, source
    assert Table.asked == [['body']]
    assert list(documents('one text')) == ['one text'] and list(documents(tmp_path/'folder'/'a.txt')) == three[:1]
    ids = torch.arange(6).view(2, 3)
    for source in (ids, [[0, 1, 2], [3, 4, 5]], ids.numpy(), [{'text': [0, 1, 2]}, {'text': [3, 4, 5]}]): assert [d.tolist() for d in documents(source)] == ids.tolist()
    assert [d.tolist() for d in documents(ids[0])] == [[0, 1, 2]]


def test_a_file_is_split_wherever_its_pieces_end(tmp_path):
    rng = random.Random(0)
    parts = [''.join(rng.choices('ab<ä\n', k=rng.randrange(400_000))) for _ in range(12)]
    path = tmp_path/'long.txt'
    path.write_text('<|end|>'.join(parts), encoding='utf-8')
    assert list(documents(path, split='<|end|>')) == parts == list(documents('<|end|>'.join(parts), split='<|end|>'))


def test_no_text_means_the_passages_of_the_shipped_models():
    few = list(islice(passages('train'), 3))
    assert list(islice(documents(), 3)) == few and ''.join(few) == ''.join(f'{t}\n' for t in islice(shipped_text('train'), 60))
    assert all(len(p.splitlines()) == 20 for p in few)


@pytest.mark.parametrize('source, error, message', [
    (3, TypeError, 'got a int, expected documents'), ({'train': ['a']}, TypeError, 'got a dict, expected documents; of a dataset of several splits, one'), ([None], TypeError, 'got a NoneType as document 0'),
    (['a', [[1]]], TypeError, r'got a tensor of shape \(1, 1\) as document 1'), ([[.5]], TypeError, 'got a tensor of shape'), ([{'body': 'a', 'id': 1}], ValueError, "got column 'text', expected one of body, id"),
    (Path('nowhere.txt'), ValueError, 'got nowhere.txt, which cannot be read'), ('tests', ValueError, r"got 'tests', the name of a file or folder; expected Path\('tests'\), or \['tests'\] as text")])
def test_what_is_no_document(source, error, message, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    with pytest.raises(error, match=message): list(documents(source))


def test_files_that_cannot_be_read(tmp_path, monkeypatch):
    (tmp_path/'a.bin').write_bytes(b'\xff\xfe\x00')
    (tmp_path/'b.jsonl').write_text('{"text": "a"}\n{"text": ')
    (tmp_path/'c.txt.gz').write_bytes(gzip.compress(b'text'*1000)[:-20])
    (tmp_path/'d.txt.gz').write_bytes(b'no gzip')
    (tmp_path/'e.parquet').write_bytes(b'PAR1')
    (tmp_path/'empty').mkdir()
    for name, message in [('a.bin', 'a.bin, which cannot be read .* expected text, .jsonl or .parquet'), ('b.jsonl', 'b.jsonl, line 2 is no JSON'), ('c.txt.gz', 'c.txt.gz, which cannot be read'),
                          ('d.txt.gz', 'd.txt.gz, which cannot be read'), ('empty', 'a folder without files')]:
        with pytest.raises(ValueError, match=message): list(documents(tmp_path/name))
    monkeypatch.setitem(sys.modules, 'pyarrow', None)
    with pytest.raises(ValueError, match='e.parquet, expected pyarrow to read it with: pip install pyarrow; or .jsonl'): list(documents(tmp_path/'e.parquet'))


def test_parquet(tmp_path):
    import pyarrow as pa
    from pyarrow.parquet import write_table
    write_table(pa.table({'body': [f'text {i}' for i in range(700)], 'ids': [[i, 1] for i in range(700)]}), tmp_path/'t.parquet', row_group_size=100)
    assert list(documents(tmp_path/'t.parquet', column='body')) == [f'text {i}' for i in range(700)]
    assert [d.tolist() for d in documents(tmp_path, column='ids')] == [[i, 1] for i in range(700)]
    with pytest.raises(ValueError, match="got column 'text', expected one of body, ids"): list(documents(tmp_path/'t.parquet'))
    (tmp_path/'t.parquet').write_bytes(b'PAR1')
    with pytest.raises(ValueError, match='t.parquet, which cannot be read'): list(documents(tmp_path/'t.parquet'))


def test_datasets():
    import datasets
    table = datasets.Dataset.from_dict({'text': ['one', 'two', 'three'], 'n': [1, 2, 3]})
    for source in (table, table.to_iterable_dataset(), table['text']): assert list(documents(source)) == ['one', 'two', 'three']
    with pytest.raises(TypeError, match='of a dataset of several splits, one'): list(documents(datasets.DatasetDict(train=table)))


# -- rows ----------------------------------------------------------------------------
def test_rows_hold_every_token_once_and_one_document_each(small):
    docs = texts([100, 3, 0, 40, 41, 1, 80, 17, 200])
    made = list(document_rows(small, docs, 40, 160))
    got = [r[:n].tolist() for rows in made for r, n in zip(rows.ids, rows.lengths.tolist())]
    assert sorted(got) == sorted(p.tolist() for d in docs if len(d) for p in d.split(40))
    assert all(rows.ids.shape[1] == max(rows.lengths) and rows.ids.numel() <= 160 for rows in made)
    again = list(document_rows(small, docs, 40, 160))
    assert all(torch.equal(a.ids, b.ids) and torch.equal(a.lengths, b.lengths) for a, b in zip(made, again, strict=True))
    assert [tuple(r.ids.shape) for r in document_rows(small, docs[:1], 64, 1)] in ([(1, 64), (1, 36)], [(1, 36), (1, 64)])


def test_rows_of_text_are_what_the_tokenizer_makes_of_each(small):
    docs = [p[:150] for p in islice(passages('held'), 5)] + ['', 'x', 'ä']
    got = {bytes(r[:n].tolist()) for rows in document_rows(small, docs, 1000, 10_000) for r, n in zip(rows.ids.clamp(max=255), rows.lengths)}
    assert got == {bytes(min(255, i) for i in small.tokenizer(d)['input_ids']) for d in docs if d}


def test_filling_is_little_where_there_is_much_to_choose_from(small):
    docs = texts([random.Random(i).randrange(1, 200) for i in range(2000)])
    made = list(document_rows(small, docs, 64, 1024))
    assert sum(r.ids.numel() for r in made) < 1.05*sum(map(len, docs))


def test_a_position_is_that_of_its_document_alone(model):
    "In every family, for every site of its first and last block; the untouched transformers model gives the logits."
    docs = texts([50, 9, 33, 1, 24])
    last = model.n_layers - 1
    sites = [n for n in model.site_names('*') if 'key' not in model._site(n).axes and n.split('.')[1:2] in ([], ['0'], [str(last)])]
    for rows in document_rows(model, docs, 24, 120):
        got = heard(model, sites, rows.ids)
        assert list(got) == sites
        for b, n in enumerate(rows.lengths.tolist()):
            alone = model.run_with_cache(rows.ids[b:b + 1, :n], sites)[1]
            assert all(near(got[s][b, :n], alone[s][0]) for s in sites)
            with torch.no_grad(): theirs = model.hf(input_ids=rows.ids[b:b + 1, :n].long()).logits[0]
            assert near(got['logits'][b, :n], theirs, 1e-3)


# -- one run -------------------------------------------------------------------------
def test_each_site_alone_ends_the_run_with_it(model):
    ids, seen = texts([17])[0][None], []
    _, cache = model.run_with_cache(ids, '*')
    hooks = [b.register_forward_pre_hook(lambda m, args, i=i: seen.append(i)) for i, b in enumerate(model.blocks)]
    try:
        for name in (n for n in model.site_names('*') if n.split('.')[1:2] in ([], ['1'])):
            seen.clear()
            assert near(heard(model, name, ids)[name], cache[name]), name
            block = model.n_layers - 1 if name == 'logits' else -1 if name == 'embed' else int(name.split('.')[1])
            assert seen == list(range(block + 1)) or seen == list(range(block)) and name.endswith('resid_pre'), name
    finally:
        for h in hooks: h.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.hf.modules())
    assert near(model.run(ids).logits, cache['logits'])


def test_parts_of_sites(recurrent):
    ids, state = texts([30])[0][None], f'blocks.{recurrent.recurrent()[-1]}.ssm.state'
    for at in (None, 5, -1, [3, 29, 8], 'every:7', slice(10, 20, 3)):
        got, (_, cache) = heard(recurrent, [state, 'embed'], ids, at, [1, 0], torch.bfloat16), recurrent.run_with_cache(ids, [state, 'embed'], at=at, heads=[1, 0], dtype=torch.bfloat16)
        assert all(torch.equal(got[n], cache[n]) for n in cache) and set(got) == set(cache)
    with pytest.raises(ValueError, match='chooses none of the 30 positions'): heard(recurrent, state, ids, [])


def test_several_sites_in_one_run(small):
    runs = []
    hook = small.blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    source = stream(small, [Y, OUT, STATE], texts([64]*6), 32, size=128, at='every:4')
    parts = [p.load() for p in source.parts()]
    hook.remove()
    assert len(runs) == 3 == len(parts) and all(set(p) == {Y, OUT, STATE, 'tokens'} for p in parts)


def test_what_train_uses_is_as_it_was(small):
    rows = token_rows(small, shipped_text('held'), 32, 200)
    for name in (OUT, STATE, 'logits', 'embed'): assert torch.equal(activations(small, name, rows), small.run_with_cache(rows, name)[1][name].flatten(2))


# -- mixing --------------------------------------------------------------------------
@pytest.mark.parametrize('n, size, batch, buffer', [(1000, 37, 16, 100), (1000, 300, 7, 21), (64, 1, 64, 192), (50, 50, 10, 1000), (33, 4, 8, 24), (5, 2, 1, 3)])
@pytest.mark.parametrize('prefetch', [True, False])
def test_each_row_once_an_epoch_under_all_keys(n, size, batch, buffer, prefetch):
    batches = list(shuffled(numbered(n, size), batch, buffer, seed=1, epochs=2, prefetch=prefetch))
    first = batches[:-(-n//batch)]
    assert sorted(rows_of(first)) == sorted(rows_of(batches[len(first):])) == list(range(n))
    assert n < 10 or rows_of(first) != rows_of(batches[len(first):]) != list(range(n))
    assert all(len(b['row']) == batch for b in first[:-1]) and len(first[-1]['row']) == (n - 1) % batch + 1
    assert all(torch.equal(b['double'], 2.*b['row'][:, None].expand(-1, 3)) for b in batches)


def test_the_order_follows_from_the_seed_alone():
    order = lambda **options: rows_of(shuffled(numbered(500, 30), 16, **dict(buffer=120, seed=3) | options))
    assert order() == order() == order(prefetch=False) != order(seed=4)
    assert order(seed=4) != order(buffer=240)
    assert order() == rows_of(shuffled([Part(len(p['row']), lambda p=p: p) for p in numbered(500, 30)], 16, 120, 3))


def test_the_order_is_mixed():
    "Where a row comes has little to do with where it came from, within the reach of the buffer."
    order = torch.tensor(rows_of(shuffled(numbered(20_000, 100), 64, 60_000)))
    at = torch.empty(20_000).index_copy_(0, order, torch.arange(20_000.))
    corr = lambda a, b: float(torch.corrcoef(torch.stack([a, b]))[0, 1])
    assert abs(corr(at, torch.arange(20_000.))) < .03 and abs(corr(at[:-1], at[1:])) < .03
    gaps = torch.tensor(rows_of(shuffled(numbered(20_000, 100), 64, 3000))).diff().abs()
    assert (gaps < 2).float().mean() < .01                                      # neighbours, also with a small buffer
    reach = (torch.tensor(rows_of(shuffled(numbered(20_000, 100), 64, 3000))) - torch.arange(20_000)).abs()
    assert int(reach.max()) < 3000


@pytest.mark.parametrize('prefetch', [True, False])
def test_the_buffer_is_what_is_in_memory(prefetch):
    loaded, given, most = [0], 0, 0
    def part(i):
        def load():
            loaded[0] += 20
            return {'row': torch.arange(i, i + 20)}
        return Part(20, load)
    for b in shuffled([part(i) for i in range(0, 5000, 20)], 25, 600, prefetch=prefetch):
        most = max(most, loaded[0] - given)                                     # made and not yet given out
        given += len(b['row'])
    assert given == 5000 and 200 <= most <= 600 + 3*20 + 25


def test_parts_that_do_not_go_together():
    with pytest.raises(ValueError, match=r'got a part of a \(2,\) float32, b \(3,\) float32'): next(shuffled([{'a': torch.zeros(2), 'b': torch.zeros(3)}], 1))
    with pytest.raises(ValueError, match='expected keys'): next(shuffled([{}], 1))
    for other in ({'b': torch.zeros(4)}, {'a': torch.zeros(4, 1)}, {'a': torch.zeros(4, dtype=torch.long)}, {'a': torch.zeros(4), 'b': torch.zeros(4)}):
        with pytest.raises(ValueError, match='expected 4 rows as in a'): list(shuffled([{'a': torch.zeros(4)}, other], 2))
    with pytest.raises(ValueError, match='expected 3 rows'): next(shuffled([Part(3, lambda: {'a': torch.zeros(2)})], 1))


@pytest.mark.parametrize('options, message', [
    (dict(batch_size=0), 'got batch_size=0, expected a whole number from 1'), (dict(batch_size=True), 'got batch_size=True'), (dict(batch_size=8, buffer=23), 'got buffer=23, expected a whole number from 24 up, three batches'),
    (dict(batch_size=2.), 'got batch_size=2.0'), (dict(batch_size=2, epochs=0), 'got epochs=0'), (dict(batch_size=41), 'got 40 rows, expected a batch of 41 at least')])
def test_batches_that_do_not_fit(options, message):
    with pytest.raises(ValueError, match=message): next(shuffled(numbered(40, 10), **options))


def test_an_iterator_serves_one_epoch():
    assert sorted(rows_of(shuffled(iter(numbered(40, 10)), 8))) == list(range(40))
    run = shuffled(iter(numbered(40, 10)), 8, epochs=2)
    assert len(list(islice(run, 5))) == 5
    with pytest.raises(ValueError, match='an iterator can be read once'): next(run)
    assert rows_of(shuffled(lambda epoch: iter(numbered(4, 2, 10*epoch)), 4, epochs=3, buffer=12))[::4] != [] and sorted(rows_of(shuffled(lambda epoch: iter(numbered(4, 2, 10*epoch)), 4, epochs=2, buffer=12))) == [0, 1, 2, 3, 10, 11, 12, 13]
    assert len(list(islice(shuffled(numbered(40, 10), 8, epochs=None), 23))) == 23


# -- going on ------------------------------------------------------------------------
@pytest.mark.parametrize('n, size, batch, buffer', [(300, 11, 16, 100), (100, 40, 30, 90), (64, 8, 64, 192)])
def test_going_on_from_every_batch(n, size, batch, buffer):
    make = lambda: shuffled(numbered(n, size), batch, buffer, seed=5, epochs=2)
    whole = [b['row'].tolist() for b in make()]
    for k in range(len(whole) + 1):
        run = make()
        assert [b['row'].tolist() for b in islice(run, k)] == whole[:k]
        state = json.loads(json.dumps(run.state_dict()))
        run.close()
        again = make()
        again.load_state_dict(state)
        assert [b['row'].tolist() for b in again] == whole[k:]
        assert [b['row'].tolist() for b in run] == whole[k:]                    # closed, it goes on too


def test_going_on_makes_two_blocks_at_most():
    made = []
    def part(i):
        def load():
            made.append(i)
            return {'row': torch.arange(10*i, 10*i + 10)}
        return Part(10, load)
    run = shuffled([part(i) for i in range(200)], 10, 300)                      # blocks of 100 rows
    run.load_state_dict(shuffled([part(i) for i in range(200)], 10, 300).state_dict() | {'given': 150})
    next(run)
    run.close()
    assert 130 <= min(made) and sorted(set(made)) == sorted(made) and len(made) <= 30 + 1


def test_states_of_other_batches():
    run = shuffled(numbered(100, 10), 8, 60)
    next(run)
    state = run.state_dict()
    for other, message in [(shuffled(numbered(100, 10), 16, 60), 'with batch_size=8, expected batch_size=16'), (shuffled(numbered(100, 10), 8, 90), 'buffer=60'), (shuffled(numbered(100, 10), 8, 60, seed=2), 'seed=0, expected seed=2')]:
        with pytest.raises(ValueError, match=message): other.load_state_dict(state)
    with pytest.raises(ValueError, match='got a state without given'): run.load_state_dict({k: v for k, v in state.items() if k != 'given'})


def trained(batches, steps, start=None):
    "A small coder after some steps, with its optimizer."
    torch.manual_seed(0)
    coder = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 64))
    adam = torch.optim.Adam(coder.parameters(), lr=1e-2)
    if start:
        coder.load_state_dict(start[0])
        adam.load_state_dict(start[1])
        batches.load_state_dict(start[2])
    for x in islice(batches, steps):
        x = x[OUT]
        adam.zero_grad()
        (coder(x) - x).square().mean().backward()
        adam.step()
    return coder.state_dict(), adam.state_dict(), batches.state_dict()


@pytest.mark.parametrize('kind', ['stream', 'disk'])
def test_a_training_goes_on_bit_for_bit(kind, small, tmp_path):
    docs = texts([random.Random(i).randrange(1, 90) for i in range(30)])
    def batches():
        if kind == 'stream': return stream(small, OUT, docs, 32, size=128).batches(32, seed=2, epochs=3, buffer=300)
        return collect(small, OUT, docs, tmp_path/'a', 32, size=128, shard=200, progress=False).batches(32, seed=2, epochs=3, buffer=300)
    whole = trained(batches(), 60)
    saved = tmp_path/'state.pt'
    torch.save(trained(batches(), 47), saved)
    again = trained(batches(), 13, torch.load(saved, weights_only=True))
    assert all(torch.equal(whole[0][n], again[0][n]) for n in whole[0]) and whole[2] == again[2]
    assert all(torch.equal(a['exp_avg_sq'], b['exp_avg_sq']) for a, b in zip(whole[1]['state'].values(), again[1]['state'].values()))


# -- threads -------------------------------------------------------------------------
def test_no_thread_stays():
    n = threading.active_count()
    for _ in shuffled(numbered(4000, 10), 8, 300): break
    assert threading.active_count() == n
    run = shuffled(numbered(4000, 10), 8, 300)
    next(run)
    run.close()
    assert threading.active_count() == n
    with shuffled(numbered(4000, 10), 8, 300) as run: next(run)
    assert threading.active_count() == n and len(list(shuffled(numbered(400, 10), 8, 300))) == 50 and threading.active_count() == n


def test_the_next_rows_are_made_while_a_batch_is_in_use():
    made, later = [], threading.Event()
    def part(i):
        def load():
            made.append((i, threading.current_thread() is threading.main_thread()))
            if i >= 10: later.set()
            return {'row': torch.arange(10*i, 10*i + 10)}
        return Part(10, load)
    parts = [part(i) for i in range(100)]
    with shuffled(parts, 10, 300) as run:
        next(run)                                                               # of the first block, parts 0 to 9
        assert later.wait(60)                                                   # nobody asks for more
    assert not any(main for _, main in made) and max(made)[0] < 20
    made.clear()
    next(shuffled(parts, 10, 300, prefetch=False))
    assert all(main for _, main in made) and max(made)[0] == 9


def test_an_error_in_the_thread_is_raised_where_the_batches_are_used():
    def part(i):
        def load():
            if i == 70 and broken: raise OSError('the disk went away')
            return {'row': torch.arange(10*i, 10*i + 10)}
        return Part(10, load)
    n, broken = threading.active_count(), [1]
    run, whole = shuffled([part(i) for i in range(100)], 10, 300), rows_of(shuffled(numbered(1000, 10), 10, 300))
    got = []
    with pytest.raises(OSError, match='the disk went away'):
        for b in run: got += b['row'].tolist()
    assert 400 < len(got) < 720 and threading.active_count() == n
    with pytest.raises(OSError, match='the disk went away'): next(run)          # not an early end
    broken.clear()
    assert got + rows_of(run) == whole                                          # and it goes on when the disk is back


STOPPED = """
import os, signal, sys, threading, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)                        # ignored where the tests run in the background
sys.path.insert(0, sys.argv[1])                                                 # the module alone, which needs no other
from shuffle import Part, shuffled
def part(i):
    def load():
        time.sleep(.05)
        return {'row': torch.arange(i, i + 10)}
    return Part(10, load)
parts = [part(i) for i in range(0, 10**6, 10)]
threading.Timer(.3, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
try: next(shuffled(parts, 5, 10**6))                                            # hours
except KeyboardInterrupt: print('interrupted', [t.name for t in threading.enumerate() if 'circuitbench' in t.name])
left = shuffled(parts[:2] + [Part(10**5, part(0).load)] + parts, 5, 60)           # nobody closes it
next(left)
print('end')
"""


def test_a_process_ends():
    "After Ctrl-C while it waits for rows, and with batches that nobody closed."
    out = subprocess.run([sys.executable, '-c', STOPPED, str(Path(shards.__file__).parent)], capture_output=True, text=True, timeout=300)
    assert out.returncode == 0 and out.stdout == 'interrupted []\nend\n' and 'Error' not in out.stderr, out.stderr


# -- streams -------------------------------------------------------------------------
def test_a_stream_gives_what_the_model_has(small):
    "Each token with what the run of its document alone has there."
    docs = texts([60, 7, 33, 1, 90])
    source = stream(small, [Y, OUT, STATE], docs, 32, size=64, dtype=torch.float64)
    got = [torch.cat(v) for v in zip(*[(b['tokens'], b[Y], b[OUT], b[STATE]) for b in source.batches(40, buffer=120, keys=['tokens', Y, OUT, STATE])])]
    assert got[1].shape[1:] == source.shapes[Y] == (4, 16) and got[3].shape[1:] == source.shapes[STATE] and len(got[0]) == 191
    rows = [r for d in docs for r in d.split(32)]
    want = [torch.cat(rows), *(torch.cat([small.run_with_cache(r[None], n)[1][n][0] for r in rows]).double() for n in (Y, OUT, STATE))]
    order = lambda t: sorted(range(len(t[0])), key=lambda i: (int(t[0][i]), [round(float(v), 3) for v in t[2][i][:4]]))
    a, b = order(got), order(want)
    assert torch.equal(got[0][a].long(), want[0][b]) and all(near(x[a], y[b]) for x, y in zip(got[1:], want[1:]))


@pytest.mark.parametrize('at, chosen', [('every:8', lambda n: range(0, n, 8)), (-1, lambda n: [n - 1]), ([0, 5, 20], lambda n: [p for p in (0, 5, 20) if p < n]), (slice(1, None), lambda n: range(1, n))])
def test_chosen_positions_are_those_of_each_row(at, chosen, small):
    docs = texts([30, 4, 21, 1])
    got = torch.cat([p.load()['tokens'] for p in stream(small, Y, docs, 32, at=at).parts()])
    rows = sorted(docs, key=len, reverse=True)
    assert got.tolist() == [int(d[p]) for d in rows for p in chosen(len(d))]


def test_limits_are_exact_and_no_more_text_is_read(small):
    read = []
    def endless():
        for i in range(10**9):
            read.append(i)
            yield f'text number {i} '*20
    for tokens, at in [(1000, None), (333, 'every:4')]:
        read.clear()
        source = stream(small, Y, endless, 64, tokens=tokens, at=at, size=256)
        assert sum(len(b[Y]) for b in source.batches(100)) == tokens and len(read) < 2000
    assert len(next(stream(small, Y, endless, 64, size=256).batches(100, buffer=400))[Y]) == 100


def test_heavy_sites_are_run_in_smaller_portions():
    model = load_model('tiny://mamba2')
    assert stream(model, 'blocks.1.ssm.y').size == 4096 and stream(model, 'blocks.1.ssm.state').size == 512
    assert stream(model, 'blocks.1.ssm.state', at='every:8').size == 4096 and stream(model, 'ssm.state', heads=0, dtype=torch.bfloat16).size == 1024*128//96
    shape = {k: tuple(v.shape[1:]) for k, v in next(stream(model, ['blocks.1.ssm.state', 'blocks.1.resid_post'], 'Some text. '*50, heads=[2, 0], dtype=torch.float16).batches(20)).items()}
    assert shape == {'blocks.1.ssm.state': (2, 64, 64), 'blocks.1.resid_post': (256,)}


def test_several_models_read_the_same_tokens(small):
    tuned = load_model('mock://mamba2-tiny')
    with torch.no_grad(): tuned.blocks[0].mixer.out_proj.weight.mul_(2)
    docs = texts([40, 13, 90])
    batch = next(stream({'a': small, 'b': tuned}, {'a': [Y, OUT], 'b': OUT}, docs, 32).batches(143, keys=['*', 'tokens']))
    assert set(batch) == {f'a::{Y}', f'a::{OUT}', f'b::{OUT}', 'tokens'}
    alone = [next(stream(m, OUT, docs, 32).batches(143, buffer=10**6))[OUT] for m in (small, tuned)]
    order = lambda x: x[x[:, 0].argsort()]
    assert near(order(batch[f'a::{OUT}']), order(alone[0])) and near(order(batch[f'b::{OUT}']), order(alone[1])) and not near(order(alone[0]), order(alone[1]))
    assert set(next(stream([small, load_model('mock://rwkv7-tiny')], 'blocks.1.resid_post', docs).batches(9))) == {'mock://mamba2-tiny::blocks.1.resid_post', 'mock://rwkv7-tiny::blocks.1.resid_post'}
    with pytest.raises(ValueError, match='got 2 models of 1 names'): stream([small, tuned], Y, docs)
    with pytest.raises(ValueError, match='got .*, whose tokenizers differ'): stream([small, load_model('tiny://mamba2')], Y, docs)


@pytest.mark.parametrize('options, message', [
    (dict(sites='nothing'), 'nothing'), (dict(context=0), 'got context=0'), (dict(tokens=0), 'got tokens=0'), (dict(size=1.5), 'got size=1.5'), (dict(at=meta(0)), 'meta tokens'), (dict(at=[]), 'chooses none of the 256'),
    (dict(at=[700]), 'chooses none'), (dict(heads=999), 'got heads='), (dict(at='odd'), 'every:N'), (dict(sites='attn.pattern'), 'whose rows grow')])
def test_requests_that_do_not_fit(options, message):
    with pytest.raises((ValueError, SiteError), match=message): stream(load_model('mock://jamba-tiny'), **dict(sites='blocks.0.ssm.y', text='text') | options)


def test_texts_that_are_too_little(small):
    for empty in ('', [], ['', ''], [torch.zeros(0)], iter(())):
        with pytest.raises(ValueError, match='got a text without a token, expected some'): next(stream(small, Y, empty).batches(8))
    with pytest.raises(ValueError, match='got 4 rows, expected a batch of 8 at least; ways out: more text'): next(stream(small, Y, 'text').batches(8))
    with pytest.raises(ValueError, match='got a text without a token at '): next(stream(small, Y, 'text', at=[9]).batches(8))
    run = stream(small, Y, iter(['some text', 'and more']), size=16).batches(8, epochs=2)
    with pytest.raises(ValueError, match='an iterator can be read once'): list(run)
    small.tokenizer, kept = None, small.tokenizer
    try:
        with pytest.raises(ValueError, match='no tokenizer; give a tensor of token ids'): next(stream(small, Y, 'text').batches(1))
    finally: small.tokenizer = kept
    with pytest.raises(ValueError, match='got token ids from 1 to 999, expected 0 to 256'): next(stream(small, Y, torch.tensor([1, 999])).batches(1))


def test_numbers_that_are_not_finite(small):
    model = load_model('mock://mamba2-tiny')
    with torch.no_grad(): model.blocks[0].mixer.out_proj.weight.mul_(1e5)
    with pytest.raises(ValueError, match=r'got numbers at blocks.0.resid_post of mock://mamba2-tiny that are not finite in torch.float16, .* ways out: dtype=torch.bfloat16'):
        next(stream(model, 'blocks.0.resid_post', 'some text', dtype=torch.float16).batches(2))
    assert next(stream(model, 'blocks.0.resid_post', 'some text', dtype=torch.bfloat16).batches(2))['blocks.0.resid_post'].dtype == torch.bfloat16
    with torch.no_grad(): model.blocks[0].mixer.out_proj.weight[0, 0] = float('nan')
    with pytest.raises(ValueError, match='not finite'): next(stream(model, 'blocks.0.resid_post', 'some text').batches(2))


# -- on disk -------------------------------------------------------------------------
DOCS = texts([random.Random(i).randrange(1, 90) for i in range(60)], 7)
ASKED = dict(context=32, size=128, shard=300, progress=False)


@pytest.fixture
def store(small, tmp_path): return collect(small, [Y, OUT], DOCS, tmp_path/'a', **ASKED)


def test_what_is_stored_is_what_the_stream_gives(store, small):
    parts = [p.load() for p in stream(small, [Y, OUT], DOCS, 32, size=128).parts()]
    assert all(torch.equal(store[:][k], torch.cat([p[k] for p in parts])) for k in (Y, OUT, 'tokens'))
    assert store.tokens == sum(map(len, DOCS)) and store.complete and store.shapes == {Y: (4, 16), OUT: (64,)}
    batches = list(store.batches(64, keys=[OUT, 'tokens'], buffer=400))
    ids, x = (torch.cat([b[k] for b in batches]) for k in ('tokens', OUT))
    assert all(set(b) == {OUT, 'tokens'} for b in batches) and set(next(store.batches(8))) == {Y, OUT}
    sort = lambda ids, x: [(int(i), r.numpy().tobytes()) for i, r in zip(ids, x)]
    assert sorted(sort(ids, x)) == sorted(sort(store[:]['tokens'], store[:][OUT])) and not torch.equal(ids, store[:]['tokens'])
    for lo, hi in [(0, 10), (290, 700), (-5, None), (5, 5)]: assert not len(range(*slice(lo, hi).indices(store.tokens))) or torch.equal(store[lo:hi][OUT], store[:][OUT][lo:hi])
    with pytest.raises(ValueError, match='expected neighbours'): store[::2]


def test_the_manifest_says_what_is_there(store, small):
    note = json.loads((store.folder/'manifest.json').read_text())
    assert note['about']['models'] == {'mock://mamba2-tiny': weights_hash(small)} and note['about']['context'] == 32 and note['tokens'] == store.tokens and note['complete']
    assert note['tensors'] == {Y: {'shape': [4, 16], 'dtype': 'float32'}, OUT: {'shape': [64], 'dtype': 'float32'}, 'tokens': {'shape': [], 'dtype': 'int32'}}
    assert len(note['shards']) > 3 and sum(s['tokens'] for s in note['shards']) == store.tokens
    for s in note['shards']:
        data = (store.folder/s['file']).read_bytes()
        assert (s['bytes'], s['crc32']) == (len(data), f'{zlib.crc32(data):08x}')
    back = ActivationStore.open(str(store.folder))
    assert back.shards == store.shards and repr(back) == repr(store) and f'{store.tokens:,} tokens' in repr(store) and back.text == note['text']
    assert [*files(store.folder)] and not [p for p in files(store.folder) if p.startswith('.')]
    other = collect(small, [Y, OUT], [*DOCS[:-1], DOCS[-1] + 1], store.folder.with_name('b'), **ASKED)
    assert other.text != store.text


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_the_bytes(dtype, store, small, tmp_path):
    half = collect(small, [Y, OUT], DOCS, tmp_path/'half', **ASKED, dtype=dtype)
    assert torch.equal(half[:][OUT], store[:][OUT].to(dtype)) and half.tensors[OUT] == ((64,), str(dtype)[6:])
    size = lambda s: sum(x.bytes for x in s.shards)
    assert size(half) < .55*size(store)


def test_reading_takes_blocks_from_everywhere_and_no_more_than_the_buffer(store, monkeypatch):
    asked, given, most = [], 0, 0
    read = ActivationStore._read
    monkeypatch.setattr(ActivationStore, '_read', lambda self, s, lo, hi, keys: asked.append((s.file, lo, hi, keys)) or read(self, s, lo, hi, keys))
    for b in store.batches(16, buffer=480, keys=OUT):
        most = max(most, sum(hi - lo for _, lo, hi, _ in asked) - given)
        given += len(b[OUT])
    assert given == store.tokens and most <= 480 + 3*10 + 16 and all(hi - lo <= 10 and keys == (OUT,) for _, lo, hi, keys in asked)
    assert {f for f, *_ in asked[:30]} == {s.file for s in store.shards}


def test_seeds_and_epochs(store):
    order = lambda **options: torch.cat([b[OUT] for b in store.batches(32, buffer=300, **options)])
    assert torch.equal(order(seed=1), order(seed=1, prefetch=False)) and not torch.equal(order(seed=1), order(seed=2))
    two = order(seed=1, epochs=2)
    assert torch.equal(two[:store.tokens], order(seed=1)) and not torch.equal(two[store.tokens:], two[:store.tokens])
    state = store.batches(32, buffer=300).state_dict()
    with pytest.raises(ValueError, match='source'): store.batches(32, buffer=300, keys=OUT).load_state_dict(state)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from test_store import ASKED, DOCS, OUT, Y, collect, load_model
model, calls = load_model('mock://mamba2-tiny'), []
def stop(module, args):
    calls.append(1)
    if len(calls) == 14: os.kill(os.getpid(), signal.SIGKILL)
model.blocks[0].register_forward_pre_hook(stop)
collect(model, [Y, OUT], DOCS, sys.argv[2], **ASKED)
"""


def at_run(model, n, do):
    "A hook that does something in the n-th run from now."
    calls = []
    def hook(module, args):
        calls.append(1)
        if len(calls) == n: do()
    return model.blocks[0].register_forward_pre_hook(hook), calls


def interrupt(): raise KeyboardInterrupt


@pytest.mark.parametrize('how', ['ctrl-c', pytest.param('kill', marks=pytest.mark.slow)])
def test_an_interrupted_call_goes_on_to_the_same_files(how, store, small, tmp_path):
    part = tmp_path/'part'
    if how == 'kill':
        child = subprocess.run([sys.executable, '-c', KILLED, str(Path(__file__).parent), str(part)], capture_output=True, text=True)
        assert child.returncode == -signal.SIGKILL, child.stderr
    else:
        hook, _ = at_run(small, 14, interrupt)
        with pytest.raises(KeyboardInterrupt): collect(small, [Y, OUT], DOCS, part, **ASKED)
        hook.remove()
        assert not [t for t in threading.enumerate() if 'ThreadPool' in t.name]
    there = ActivationStore.open(part)
    assert not there.complete and 300 <= there.tokens < store.tokens and 'so far' in repr(there)
    assert torch.equal(there[:][OUT], store[:there.tokens][OUT]) and len(next(there.batches(32))[OUT]) == 32
    hook, runs = at_run(small, 0, None)
    assert collect(small, [Y, OUT], DOCS, part, **ASKED).complete
    hook.remove()
    made = sum(1 for _ in stream(small, Y, DOCS, 32, size=128).parts())
    assert len(runs) <= made - 3*len(there.shards) and files(part) == files(store.folder)


def test_a_full_disk_leaves_what_was_written(store, small, tmp_path):
    "A limit on the size of files stands for the end of the disk."
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    hook, _ = at_run(small, 14, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard)))
    try:
        with pytest.raises(OSError, match=r'; \d+ tokens are in .*part and can be read, and the same call goes on from there') as full: collect(small, [Y, OUT], DOCS, tmp_path/'part', **ASKED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        hook.remove()
    there = ActivationStore.open(tmp_path/'part')
    assert full.value.errno == errno.EFBIG and 300 <= there.tokens < store.tokens and f'; {there.tokens} tokens are' in str(full.value)
    assert not [p for p in files(tmp_path/'part') if p.endswith('.tmp')] and torch.equal(there[:][OUT], store[:there.tokens][OUT])
    assert collect(small, [Y, OUT], DOCS, tmp_path/'part', **ASKED).complete and files(tmp_path/'part') == files(store.folder)


def test_a_disk_that_is_full(store, small, tmp_path, monkeypatch):
    def full(tensors, path): raise shards.SafetensorError('Error while serializing: I/O error: No space left on device (os error 28)')
    with monkeypatch.context() as m:
        m.setattr(shards, 'save_file', full)
        with pytest.raises(OSError, match='No space left .* 0 tokens are in .*b and can be read, and the same call goes on') as err: collect(small, [Y, OUT], DOCS, tmp_path/'b', **ASKED)
        assert err.value.errno == errno.ENOSPC
    assert collect(small, [Y, OUT], DOCS, tmp_path/'b', **ASKED).complete and files(tmp_path/'b') == files(store.folder)
    need = shutil.disk_usage(tmp_path).free//(128*4) + 10**6
    hook = small.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail('it was run'))
    with pytest.raises(ValueError, match='GiB to write, expected at most the .* GiB that are free in .*; ways out: fewer tokens'): collect(small, [Y, OUT], DOCS, tmp_path/'c', tokens=need)
    hook.remove()
    assert not (tmp_path/'c').exists()


def test_damaged_shards_are_named_and_the_others_can_be_used(store, small):
    good, names = files(store.folder), [s.file for s in store.shards]
    def flip(path):
        data = bytearray(path.read_bytes())
        data[-50] ^= 4
        path.write_bytes(data)
    def cut(path): os.truncate(path, 1000)
    for harm, said in [(flip, 'another checksum'), (cut, '1,000 bytes of'), (Path.unlink, 'is lost')]:
        harm(store.folder/names[1])
        with pytest.raises(ValueError, match=f'of whose {len(names)} shards 1 cannot be used .{names[1]} .*{said}.* ways out: skip=True'): ActivationStore.open(store.folder)
        assert list(store.damaged()) == [names[1]] and (list(store.damaged(verify=False)) == [names[1]] or harm is flip)
        rest = ActivationStore.open(store.folder, skip=True)
        assert rest.tokens == store.tokens - store.shards[1].tokens == sum(len(b[OUT]) for b in rest.batches(32))
        if harm is not flip:
            with pytest.raises(ValueError, match=f'{names[1]}, which cannot be read .*ways out: ActivationStore.open'): list(store.batches(32))
        runs = []
        hook = small.blocks[0].register_forward_pre_hook(lambda *_, runs=runs: runs.append(1))
        assert collect(small, [Y, OUT], DOCS, store.folder, **ASKED).complete and files(store.folder) == good
        hook.remove()
        assert 0 < len(runs) <= 5                                               # the one shard alone
    for name in names[1:7:2]: flip(store.folder/name)
    collect(small, [Y, OUT], DOCS, store.folder, **ASKED)
    assert files(store.folder) == good
    (store.folder/'.00001.safetensors.1.tmp').write_bytes(b'of a call that was killed')
    collect(small, [Y, OUT], DOCS, store.folder, **ASKED)
    assert files(store.folder) == good


def test_a_finished_call_runs_nothing(store, small):
    hook = small.blocks[0].register_forward_pre_hook(lambda *_: pytest.fail('it was run'))
    again = collect(small, [Y, OUT], DOCS, store.folder, **ASKED)
    hook.remove()
    assert again.shards == store.shards and again.complete


def test_a_folder_for_something_else(store, small, tmp_path):
    good, other = files(store.folder), load_model('mock://mamba2-tiny')
    with torch.no_grad(): other.blocks[1].mixer.out_proj.weight[0, 0] += .5
    assert store.check(small) is store and store.check({'any': small}) is store
    with pytest.raises(ValueError, match='got mock://mamba2-tiny, weights .*, expected the model from which .* was collected: mock://mamba2-tiny, weights'): store.check(other)
    for m, sites, docs, change, message in [
            (other, [Y, OUT], DOCS, {}, 'for other models'), (small, [Y], DOCS, {}, 'for other sites'), (small, [Y, OUT], DOCS, dict(context=16), r'for other context .32., expected the same .16.'),
            (small, [Y, OUT], DOCS, dict(at='every:2'), 'for other at'), (small, [Y, OUT], DOCS, dict(tokens=500), 'for other limit .None., expected the same .500'), (small, [Y, OUT], DOCS, dict(dtype=torch.float16), 'for other dtype'),
            (small, [Y, OUT], DOCS, dict(shard=100), 'for other shard'), (small, [Y, OUT], DOCS[::-1], {}, 'got other text than that of 00000.safetensors')]:
        with pytest.raises(ValueError, match=f'{message}.*another folder, or overwrite=True'): collect(m, sites, docs, store.folder, **ASKED | change)
        assert files(store.folder) == good
    again = collect(other, OUT, DOCS[:20], store.folder, **ASKED, overwrite=True)
    assert again.tokens == sum(map(len, DOCS[:20])) and len(files(store.folder)) == len(again.shards) + 1
    (tmp_path/'mine').mkdir()
    (tmp_path/'mine'/'thesis.tex').write_text('all of it')
    for overwrite in (False, True):
        with pytest.raises(ValueError, match=r'holds other things \(thesis.tex\)'): collect(small, Y, DOCS, tmp_path/'mine', overwrite=overwrite, progress=False)
    assert files(tmp_path/'mine') == {'thesis.tex': b'all of it'}


def test_other_text_is_seen_while_going_on(store, small, tmp_path):
    lost = store.folder/store.shards[-1].file
    lost.unlink()
    for docs, message in [(DOCS[:-1] + [DOCS[-1] + 1], 'got other text than that of'), (DOCS[:30], 'got other text than that of')]:
        with pytest.raises(ValueError, match=message): collect(small, [Y, OUT], docs, store.folder, **ASKED)
    assert collect(small, [Y, OUT], DOCS, store.folder, **ASKED).complete and lost.exists()


def test_folders_that_are_no_store(tmp_path):
    for text in (None, 'no json', '[]', '{}', '{"format": "circuitbench.activations"}', json.dumps({'format': 'circuitbench.states', 'shards': []})):
        if text is not None: (tmp_path/'manifest.json').write_text(text)
        with pytest.raises(ValueError, match='which cannot be read .*; expected a folder of collect'): ActivationStore.open(tmp_path)


def test_too_little_and_unknown(store, small, tmp_path):
    with pytest.raises(ValueError, match=f'got {store.tokens} tokens in .*, expected a batch of 10000 at least; ways out: a smaller batch_size'): store.batches(10_000)
    for key in ('blocks.9.ssm.y', 'other::blocks.0.ssm.y', 'resid_post'):
        with pytest.raises(SiteError, match='got .*blocks.0.ssm.y|got .*expected one of blocks 0'): store.batches(8, keys=key)
    with pytest.raises(ValueError, match='got a text without a token'): collect(small, Y, '', tmp_path/'new', progress=False)
    assert collect(small, Y, 'some text', tmp_path/'new', progress=False).tokens == 9     # the folder is not spoilt


def test_rows_of_any_origin(tmp_path):
    whole = cached(numbered(1000, 30), tmp_path/'a', {'pairs': 'of numbers'}, shard=200, progress=False)
    assert sorted(rows_of(whole.batches(50, keys=['row', 'double']))) == list(range(1000)) and whole.about['pairs'] == 'of numbers'
    def stopping():
        yield from numbered(500, 30)
        raise OSError(5, 'no more')
    with pytest.raises(OSError, match='no more.* tokens are in .*b and can be read') as err: cached(stopping(), tmp_path/'b', {'pairs': 'of numbers'}, shard=200, progress=False)
    assert err.value.errno == 5 and ActivationStore.open(tmp_path/'b').tokens == 420
    cached(numbered(1000, 30), tmp_path/'b', {'pairs': 'of numbers'}, shard=200, progress=False)
    assert files(tmp_path/'a') == files(tmp_path/'b')
    with pytest.raises(ValueError, match='other text'): cached(numbered(1000, 30, 1), tmp_path/'a', {'pairs': 'of numbers'}, shard=200, progress=False)
    with pytest.raises(ValueError, match='for other pairs'): cached(numbered(1000, 30), tmp_path/'a', {'pairs': 'of words'}, shard=200, progress=False)
    with pytest.raises(ValueError, match='got no rows'): cached([], tmp_path/'c', progress=False)


def test_hashes_see_one_number(small):
    other = load_model('mock://mamba2-tiny')
    assert weights_hash(other) == weights_hash(small)
    name, p = random.Random(0).choice([*other.hf.named_parameters()])
    with torch.no_grad(): p.view(-1)[-1] += 1e-3
    assert weights_hash(other) != weights_hash(small) and weights_hash(load_model('mock://mamba2-tiny', dtype=torch.bfloat16)) != weights_hash(small)


def test_small_pieces():
    assert sorted(drawn(10, 1).tolist()) == list(range(10)) and drawn(10, 1).tolist() == drawn(10, 1).tolist() != drawn(10, 2).tolist()
    parts = [Part(n, lambda n=n: {'x': torch.full((n,), n)}) for n in (3, 0, 2, 4)]
    assert [[p.rows for p in g] for g in grouped(parts, 5)] == [[3, 2], [4]]
    assert filled(parts[:1] + parts[2:])['x'].tolist() == [3]*3 + [2]*2 + [4]*4 and filled(parts, over=lambda: True) is None
    assert taken({'x': torch.arange(5)}, torch.tensor([4, 0]))['x'].tolist() == [4, 0]
    with pytest.raises(AttributeError): Shard('a', 1, 1, 'b', 'c').tokens = 2
