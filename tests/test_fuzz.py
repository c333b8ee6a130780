"""Files that are damaged in many ways: each is refused in a sentence or read, none crashes the process or runs code."""
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent/'fuzz.py'


def fuzz(inputs, *formats):
    "In a process of its own, which a crash would end."
    done = subprocess.run([sys.executable, '-P', str(FUZZ), '--inputs', str(inputs), *formats], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if ' refused ' in line]
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return lines


def test_damaged_files_are_refused_or_read():
    lines = fuzz(25)
    assert len(lines) > 20
    assert all(int(line.split(' refused ')[0].split()[-1]) > 0 for line in lines if not line.startswith('registry'))   # which notes what is damaged


@pytest.mark.slow
def test_thousands_of_damaged_files_are_refused_or_read():
    fuzz(400)


class Evil:
    def __init__(self, path): self.path = path
    def __reduce__(self): return Path.write_text, (self.path, 'ran')


def test_a_loader_that_runs_code_would_be_seen(tmp_path):
    "The watch that the fuzzer keeps: it hears a pickle that is loaded, and sees nothing in a good file."
    (tmp_path/'evil').write_bytes(pickle.dumps(Evil(tmp_path/'ran')))
    code = ('import sys; sys.path.insert(0, sys.argv[1]); import fuzz, pickle; sys.addaudithook(fuzz.watch); '
            'pickle.loads(open(sys.argv[2], "rb").read()); print(fuzz.ALARM)')
    done = subprocess.run([sys.executable, '-c', code, str(FUZZ.parent), str(tmp_path/'evil')], capture_output=True, text=True)
    assert 'pickle.find_class' in done.stdout and (tmp_path/'ran').exists()
