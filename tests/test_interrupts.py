"""Long jobs that are interrupted at random moments, by Ctrl-C and by kill -9, and begun again: the end is the same."""
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

JOB = """
import signal, sys, time
from pathlib import Path
import torch
signal.signal(signal.SIGINT, signal.default_int_handler)          # ignored where the tests run in the background
torch.set_num_threads(1)
from circuitbench.direction import given_direction
from circuitbench.interventions import plan
from circuitbench.load import load_model
from circuitbench.plan_search import as_candidates, search_plans
from circuitbench.scores import log_prob
from circuitbench.store import collect
from circuitbench.stored import store_states
from circuitbench.train import train_sae
kind, folder = sys.argv[1], Path(sys.argv[2])
model, g = load_model('mock://mamba2-tiny'), torch.Generator().manual_seed(0)
texts = ['Hello there, said the king to the people of the land. '*30 + str(i) for i in range(30)]
print('begun', flush=True)
if kind == 'train':
    sae = train_sae(model, layer=0, k=4, expansion=4, tokens=24_000, text=texts, context=64, batch_size=64,
                    checkpoint=folder/'at.safetensors', every=20, progress=False)
    sae.save(folder/'sae')
elif kind == 'collect': collect(model, ['blocks.0.resid_post', 'blocks.1.ssm.y'], texts, folder/'acts', 64, shard=500, progress=False)
elif kind == 'states': store_states(model, torch.randint(1, 257, (1, 4000), generator=g), folder/'states', piece=20, progress=False)
elif kind == 'search':
    ids = torch.randint(1, 257, (4, 60), generator=g)
    found = search_plans(model, ids, log_prob(7), as_candidates(given_direction(model, torch.randn(32, generator=g), 'resid_post', i % 2) for i in range(6)),
                         ids, budget=150, most=10., checkpoint=folder/'trials.jsonl', progress=False)
    (folder/'found.txt').write_text('\\n'.join(f'{t.steps} {t.score!r} {t.kl!r}' for t in found.trials[:150]) if not found.note else found.note)
    if found.note: sys.exit(130)
print('done', flush=True)
"""
RESULT = {'train': 'sae/sae_weights.safetensors', 'collect': 'acts', 'states': 'states', 'search': 'found.txt'}


def start(kind, folder):
    child = subprocess.Popen([sys.executable, '-c', JOB, kind, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == 'begun\n', child.stderr.read()
    return child


def content(path):
    files = [path] if path.is_file() else sorted(p for p in path.rglob('*') if p.is_file())
    return {str(p.relative_to(path.parent)): p.read_bytes() for p in files}


@pytest.mark.slow
@pytest.mark.parametrize('how', [signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize('kind', list(RESULT))
def test_a_job_that_is_stopped_at_random_ends_the_same(kind, how, tmp_path):
    whole, part, rng = tmp_path/'whole', tmp_path/'part', random.Random(f'{kind} {how}')
    whole.mkdir(), part.mkdir()
    child = start(kind, whole)
    ready = time.perf_counter()
    out, err = child.communicate()
    took = time.perf_counter() - ready
    assert child.returncode == 0 and out == 'done\n', err
    stopped = 0
    for _ in range(8):
        child = start(kind, part)
        try: child.wait(rng.uniform(.05, .6)*took)
        except subprocess.TimeoutExpired:
            child.send_signal(how)
            stopped += 1
        out, err = child.communicate()
        if out == 'done\n':
            if stopped: break
            shutil.rmtree(part), part.mkdir()                         # faster than the first: stopped sooner
            took /= 4
            continue
        assert child.returncode != 0
        if how == signal.SIGINT: assert 'KeyboardInterrupt' in err or child.returncode == 130, err
        if stopped == 4: break
    assert stopped > 0
    child = start(kind, part)
    out, err = child.communicate()
    assert child.returncode == 0 and out == 'done\n', err
    assert not [p for p in part.rglob('*.tmp') if how == signal.SIGINT]
    want, got = content(whole/RESULT[kind]), content(part/RESULT[kind])
    assert sorted(n for n in got if not n.endswith('.tmp')) == sorted(want) and all(got[n] == want[n] for n in want)


@pytest.mark.slow
def test_an_export_that_is_stopped_leaves_the_old_file(tmp_path):
    "A page and a circuit written again and again while Ctrl-C comes at random: what lies there is always whole."
    code = f'''
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from circuitbench.circuit import extract_circuit
from circuitbench.load import load_model
from circuitbench.pairs import Pairs
m = load_model('mock://mamba2-tiny')
one = torch.randint(1, 257, (1, 8)), torch.randint(1, 257, (1, 8))
c = extract_circuit(m, Pairs(*one, *(torch.tensor([i]) for i in (7, 7, 9))), progress=False)
c.to_json(sys.argv[1]), c.to_html(sys.argv[2])
print('begun', flush=True)
while True: c.to_json(sys.argv[1]), c.to_html(sys.argv[2])
'''
    from circuitbench.circuit import Circuit
    rng, files = random.Random(0), (tmp_path/'c.json', tmp_path/'c.html')
    for how in (signal.SIGINT, signal.SIGKILL, signal.SIGINT):
        child = subprocess.Popen([sys.executable, '-c', code, *map(str, files)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert child.stdout.readline() == 'begun\n'
        time.sleep(rng.uniform(.05, .8))
        child.send_signal(how)
        child.communicate()
        assert len(Circuit.from_json(files[0]).graph.nodes) > 3 and files[1].read_text(encoding='utf-8').rstrip().endswith('</html>')
