"""Every file that the package reads, damaged in thousands of ways: it is refused in a sentence, or read; nothing else.

python tests/fuzz.py [--inputs 1000] [--seed 0] [FORMAT ...]     # prints a line a format, and what went wrong
"""
import argparse
import faulthandler
import json
import math
import os
import random
import resource
import shutil
import struct
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

os.environ |= {'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}

import torch  # noqa: E402
import transformers  # noqa: E402

from circuitbench.checkpoint import read_state, write_state  # noqa: E402
from circuitbench.circuit import Circuit, extract_circuit  # noqa: E402
from circuitbench.course import student_version  # noqa: E402
from circuitbench.direction import Direction, given_direction  # noqa: E402
from circuitbench.evaluate import CoreMetrics, core_metrics  # noqa: E402
from circuitbench.film import StateFilm, film_states  # noqa: E402
from circuitbench.gguf_file import read_control_vector, write_control_vector  # noqa: E402
from circuitbench.interventions import Interventions, fires, hold, plan, push  # noqa: E402
from circuitbench.latent import latent_report  # noqa: E402
from circuitbench.load import load_model  # noqa: E402
from circuitbench.pairs import Pairs  # noqa: E402
from circuitbench.partners import Partners, compare_dictionaries, firings  # noqa: E402
from circuitbench.patching import StatePatches, patch_states  # noqa: E402
from circuitbench.persistence import Persistence, persistence  # noqa: E402
from circuitbench.plan_search import as_candidates, search_plans  # noqa: E402
from circuitbench.probe import ProbeResult, probe_states  # noqa: E402
from circuitbench.registry import register, released  # noqa: E402
from circuitbench.report import LatentReport  # noqa: E402
from circuitbench.sae import SAE  # noqa: E402
from circuitbench.scores import log_prob  # noqa: E402
from circuitbench.shards import ActivationStore  # noqa: E402
from circuitbench.site import SiteError  # noqa: E402
from circuitbench.state import State  # noqa: E402
from circuitbench.store import collect  # noqa: E402
from circuitbench.stored import StoredStates, store_states  # noqa: E402
from circuitbench.sweep import Sweep, sweep_sites  # noqa: E402
from circuitbench.train import train_sae  # noqa: E402
from circuitbench.truth import TruthTable, methods, truth_names, truth_table  # noqa: E402
from circuitbench.world import FILE as VOCABULARY  # noqa: E402
from circuitbench.world import world_tokenizer  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import oracle_mamba_ssm  # noqa: E402
from oracle_rwkv7 import archive  # noqa: E402
from test_layout import CASES  # noqa: E402

IDS = torch.tensor([[5, 9, 41, 7, 200, 9, 3, 11], [5, 9, 40, 7, 200, 9, 3, 11]])
QUIET = dict(progress=False)
TEXT = ['Hello there, said the king to the people of the land. '*8]*4


class Kit:
    "What the samples are made from, each made once."
    def __init__(self):
        self.model = load_model('mock://mamba2-tiny')
        self.sae = train_sae(self.model, layer=0, k=4, expansion=2, tokens=600, text=TEXT, context=32, batch_size=64, **QUIET)
        g = torch.Generator().manual_seed(0)
        self.stream = given_direction(self.model, torch.randn(32, generator=g), 'resid_post', 0)
        shape = self.model.site_shape('blocks.1.ssm.state', 1, 1)[2:]
        self.memory = given_direction(self.model, torch.randn(shape, generator=g), 'ssm.state', 1)


def samples(kit):
    "name -> (writes a good file or folder to a path, reads it)."
    m, sae, d = kit.model, kit.sae, kit.stream
    clean, corrupt = IDS[:1], IDS[1:]
    pairs = Pairs(clean, corrupt, *(torch.tensor([i]) for i in (7, 7, 9)))
    texts = [TEXT[0][i:i + 30] for i in range(12)]
    plans = lambda: plan(push(d, 2., when=fires(sae, 3)), hold(sae, 5, 0.))
    hf = lambda p: (m.hf.save_pretrained(p), m.tokenizer.save_pretrained(p))
    search = lambda p: search_plans(m, IDS, log_prob(7), as_candidates([d]), IDS, method='random', budget=3, most=10., checkpoint=p, **QUIET)
    def saved(make): return lambda p: make().save(p)
    def home(f):
        def _at(p):
            os.environ['CIRCUITBENCH_HOME'] = str(p)
            return f(p)
        return _at
    def registered(p):
        there = Path(p).with_name('coder')
        if not there.exists(): sae.save(there)
        register('mine', there)
    return {
        'direction': (d.save, Direction.load),
        'plan': (saved(plans), Interventions.load),
        'state': (saved(lambda: m.run(IDS, keep_state=True).state), State.load),
        'stored states': (lambda p: store_states(m, IDS[0], p, **QUIET), lambda p: StoredStates.load(p)[0]),
        'patches': (saved(lambda: patch_states(m, clean[0], corrupt[0], target=7, wrong=9, **QUIET)), StatePatches.load),
        'film': (saved(lambda: film_states(m, IDS[0], lens=False, cells=2)), StateFilm.load),
        'probe': (saved(lambda: probe_states(m, texts, [i % 2 for i in range(12)], 0, folds=2, shuffles=1, random_weights=False, **QUIET)), ProbeResult.load),
        'persistence': (saved(lambda: persistence(m, IDS[0], kit.memory, n=4)), Persistence.load),
        'coder': (sae.save, SAE.load),
        'latent report': (saved(lambda: latent_report(m, sae, TEXT, 200, context=32)), LatentReport.load),
        'metrics': (saved(lambda: core_metrics(m, sae, IDS, IDS.numel(), 8)), CoreMetrics.load),
        'partners': (saved(lambda: _compared(sae)), Partners.load),
        'activations': (lambda p: collect(m, 'blocks.0.resid_post', TEXT, p, 32, **QUIET), lambda p: [*ActivationStore.open(p).batches(32)][:1]),
        'checkpoint': (lambda p: write_state(p, {'a': {'x': torch.randn(4), 'n': 3}, 'words': ['a', 'b'], 'rate': .1}), read_state),
        'circuit': (lambda p: extract_circuit(m, pairs, **QUIET).to_json(p), Circuit.from_json),
        'truth table': (saved(lambda: truth_table({'random': methods()['random']}, truth_names()[:1], 4, **QUIET)), TruthTable.load),
        'sweep': (lambda p: sweep_sites(m, IDS[0], 7, **QUIET).to_json(p), Sweep.from_json),
        'control vector': (lambda p: write_control_vector(p, [replace(d, site='blocks.1.resid_post')], m), lambda p: read_control_vector(p, m)),
        'search': (search, search),
        'registry': (home(registered), home(lambda p: released())),
        'model folder': (hf, lambda p: load_model(str(p)).run(IDS)),
        'mamba_ssm folder': (_mamba_ssm, lambda p: load_model(str(p)).run(IDS % 61)),
        'rwkv archive': (lambda p: torch.save(archive(1 + 1, 32, 16, 40), _into(p)/'x.pth'), lambda p: load_model(str(p/'x.pth')).run(IDS % 97)),
        'vocabulary': (lambda p: (_into(p)/VOCABULARY).write_text(WORDS), lambda p: len(world_tokenizer(p))),
        'unit': (lambda p: shutil.copy(UNIT, p), lambda p: student_version(p, p.with_name('out.ipynb'))),
    }


WORDS = ''.join(f'{i + 1} {bytes([i])!r} 1\n' for i in range(256)) + "257 'the' 3\n"
UNIT = min((Path(__file__).parents[1]/'nbs'/'course').glob('*.ipynb'))


def _into(p):
    p.mkdir(exist_ok=True)
    return p


def _mamba_ssm(p):
    config = CASES['mamba2 as published']
    (_into(p)/'config.json').write_text(json.dumps(config))
    torch.save(oracle_mamba_ssm.checkpoint(config), p/'pytorch_model.bin')


def _compared(sae):
    "A coder beside itself, on random firings."
    token, latent = torch.randint(400, (2000,)), torch.randint(sae.d_sae, (2000,))
    z = firings(*torch.stack([token, latent]).unique(dim=1), torch.rand(torch.stack([token, latent]).unique(dim=1).shape[1]), (sae.d_sae, 400))
    return compare_dictionaries((sae.W_dec, sae.W_dec), (z, z), 50)


# -- damage ------------------------------------------------------------------------------
ODD = (None, True, -1, 0, 1, 2**31, 10**15, 1e308, math.nan, math.inf, '', 'x', '../../etc/passwd', '\x00', 'é'*99, [], {}, [[]], [None], {'a': 1}, 'float64', 'blocks.9.ssm.state')


def mutated(value, r):
    "A JSON value with something in it changed, lost or added."
    if isinstance(value, dict | list) and value and r.random() < .85:
        keys = [*value] if isinstance(value, dict) else [*range(len(value))]
        k, new = r.choice(keys), value.copy()
        kind = r.random()
        if kind < .12: del new[k]
        elif kind < .2 and isinstance(new, dict): new[r.choice(['x', '__class__', 'format'])] = r.choice(ODD)
        elif kind < .2: new.append(r.choice(ODD))
        else: new[k] = mutated(value[k], r)
        return new
    if isinstance(value, str) and value[:1] in '{[' and r.random() < .8:                # JSON in a string of JSON
        try: return json.dumps(mutated(json.loads(value), r))
        except ValueError: pass
    if isinstance(value, list) and r.random() < .3: return value*2
    if isinstance(value, int | float) and not isinstance(value, bool) and r.random() < .4: return r.choice([-value, value + 1, value*1000, str(value), float(value)])
    return r.choice(ODD)


def damaged(raw: bytes, name: str, r, others) -> bytes:
    "The bytes of a file with something wrong."
    kind = r.random()
    if kind < .5 and name.endswith('safetensors') or raw[8:9] == b'{' and kind < .5:
        size, = struct.unpack('<Q', raw[:8])
        head = json.dumps(mutated(json.loads(raw[8:8 + size]), r)).encode()
        head += b' '*(-len(head) % 8)
        return struct.pack('<Q', len(head)) + head + raw[8 + size:]
    if kind < .6 and raw[:1] in b'{[':
        lines = raw.decode().splitlines() if raw.count(b'\n{') else [raw.decode()]
        i = r.randrange(len(lines))
        try: lines[i] = json.dumps(mutated(json.loads(lines[i]), r))
        except ValueError: pass
        return '\n'.join(lines).encode()
    at, n = r.randrange(len(raw) + 1), r.choice([1, 2, 8, 64, 999])
    junk = r.randbytes(n)
    return r.choice([
        lambda: raw[:at], lambda: b'', lambda: raw + junk, lambda: raw[:at] + junk + raw[at:], lambda: raw[:at] + junk + raw[at + n:],
        lambda: raw[:at] + raw[at + n:], lambda: raw[:at] + bytes(n) + raw[at + n:], lambda: r.choice(others), lambda: raw + raw,
        lambda: bytes(b ^ (r.random() < .002)*(1 << r.randrange(8)) for b in raw[:4000]) + raw[4000:]])()


# -- a run -------------------------------------------------------------------------------
ALARM = []


def watch(event, args):
    "Notes whatever would run code of a file."
    if event in ('pickle.find_class', 'os.system', 'subprocess.Popen', 'socket.connect'): ALARM.append((event, str(args)[:200]))


def files_of(path): return sorted(p for p in path.rglob('*') if p.is_file()) if path.is_dir() else [path]


def fuzz(name, write, read, inputs, seed, others):
    "How many damaged inputs were refused and read, and those that did anything else."
    counts, bad = Counter(), []
    with tempfile.TemporaryDirectory() as tmp:
        good, work = Path(tmp)/'good'/'it', Path(tmp)/'work'/'it'
        good.parent.mkdir(), work.parent.mkdir()
        write(good)
        read(good)                                                     # the good one is read, and lazy imports are done
        pool, r = [p.read_bytes() for p in files_of(good)], random.Random(f'{name} {seed}')
        others += [b for b in pool if len(b) < 10**6]
        for i in range(inputs):
            shutil.rmtree(work.parent)
            shutil.copytree(good.parent, work.parent)
            if good.is_dir() and r.random() < .05: r.choice(files_of(work)).unlink()
            else:
                p = r.choice(files_of(work))
                p.write_bytes(damaged(p.read_bytes(), p.name, r, others))
            ALARM.clear()
            try: repr(read(work))
            except (ValueError, SiteError, FileNotFoundError) as err:
                counts['refused'] += 1
                if len(str(err)) < 8: bad.append((i, f'no sentence: {err!r}'))
            except Exception as err: bad.append((i, f'{type(err).__name__}: {str(err)[:300]}'))      # noqa: BLE001
            else: counts['read'] += 1
            if ALARM: bad.append((i, f'ran something: {ALARM[0]}'))
    return counts, bad


def main(*argv):
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('formats', nargs='*')
    p.add_argument('--inputs', type=int, default=1000)
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--show', type=int, default=5, help='of what went wrong, a format')
    o = p.parse_args(argv)
    faulthandler.enable()
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_AS, (16 << 30, 16 << 30))
    table, failed, others = samples(Kit()), 0, [b'\x80\x04\x95', b'{}', b'[]', b'null']
    sys.addaudithook(watch)
    for name in o.formats or table:
        counts, bad = fuzz(name, *table[name], o.inputs, o.seed, others)
        failed += len(bad)
        print(f'{name:15}{counts["refused"]:6} refused {counts["read"]:6} read {len(bad):6} wrong', flush=True)
        kinds = Counter(text[:110] for _, text in bad)
        for text, n in kinds.most_common(o.show): print(f'    {n} x {text}  (first: input {next(i for i, t in bad if t.startswith(text))})')
    return failed


if __name__ == '__main__': sys.exit(bool(main(*sys.argv[1:])))
