"""Every notebook, top to bottom, each in a process of its own, since some register models and change settings.

python tests/notebooks.py [PART_OF_A_NAME ...]
"""
import os
import sys
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

os.environ.setdefault('OMP_NUM_THREADS', '1')      # one thread each, as many at once as there are cores
os.environ.setdefault('HF_HUB_OFFLINE', '1')

import torch  # noqa: E402, F401
import transformers  # noqa: E402, F401  the slow imports once, before the processes part
from nbdev.test import test_nb  # noqa: E402

ROOT = Path(__file__).parents[1]
LIMIT = 900                                        # seconds that one notebook may take before it counts as stuck

def run(path: Path) -> tuple[bool, float]:
    "Executes a notebook; whether it went through, and the seconds it took."
    sys.argv[:] = [str(path)]
    return test_nb(path, skip_flags=['notest'], basepath=ROOT)

def order(path: Path) -> tuple:
    "Stories before floors: the longest go first, so that none is left alone at the end."
    return path.parent == ROOT/'nbs', -path.stat().st_size

def main(*parts: str) -> int:
    "Runs the notebooks whose path holds one of the parts (all, without parts); returns how many failed."
    found = (p for p in (ROOT/'nbs').rglob('*.ipynb') if not any(x.startswith(('.', '_')) for x in p.parts[-2:]))
    paths = sorted((p for p in found if not parts or any(x in str(p) for x in parts)), key=order)
    start, failed = perf_counter(), []
    with get_context('fork').Pool(os.cpu_count() or 1, maxtasksperchild=1) as pool:
        runs = [pool.apply_async(run, (p,)) for p in paths]
        for p, r in zip(paths, runs):
            good, took = r.get(timeout=LIMIT*len(paths))
            if not good: failed.append(p.name)
            print(f'{"ok" if good else "FAILED":7}{took:5.0f} s  {p.relative_to(ROOT)}', flush=True)
    print(f'{len(paths)} notebooks in {perf_counter() - start:.0f} s; failed: {", ".join(failed) or "none"}')
    return len(failed)

if __name__ == '__main__':
    sys.exit(bool(main(*sys.argv[1:])))
