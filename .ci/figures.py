"""Prints the figures of RELEASING.md: what a release weighs, and what importing it takes.

    python .ci/figures.py dist/*      sizes of the files that are named, and the time of an import, median of 5
"""
import re
import subprocess
import sys
from pathlib import Path
from statistics import median

_LINE = re.compile(r'import time:\s+(\d+) \|\s+\d+ \|\s*(\S+)')


def imported(code: str) -> dict[str, int]:
    "Microseconds of each module's own execution in a fresh interpreter."
    out = subprocess.run([sys.executable, '-X', 'importtime', '-c', code], capture_output=True, text=True, check=True)
    return {name: int(took) for took, name in _LINE.findall(out.stderr)}


def processed(code: str) -> float:
    "Seconds of processor time that a fresh interpreter takes for it, whatever else the machine does."
    ask = f'{code}\nimport time; print(time.process_time())'
    return float(subprocess.run([sys.executable, '-c', ask], capture_output=True, text=True, check=True).stdout)


def main(paths: list[str]) -> None:
    "Sizes, then times; what `import torch` brings is left out of them."
    for path in map(Path, paths): print(f'{path.name}: {path.stat().st_size/1e6:.1f} MB')
    torch = {*imported('import torch')}
    rows = {'import circuitbench': [], 'all public names': [], 'of this circuitbench itself': []}
    for _ in range(5):
        beyond = lambda code: {n: t for n, t in imported(code).items() if n not in torch}
        rows['import circuitbench'].append(sum(beyond('import circuitbench').values()))
        every = beyond('from circuitbench import *')
        rows['all public names'].append(sum(every.values()))
        mine = (t for n, t in every.items() if n.split('.')[0] == 'circuitbench')
        rows['of this circuitbench itself'].append(sum(mine))
    for name, took in rows.items(): print(f"{name}, beyond torch's own: {median(took)/1e3:,.0f} ms")
    for code in ('import torch', 'from circuitbench import *'):
        print(f'{code}: {median(processed(code) for _ in range(5)):.2f} s of processor time')


if __name__ == '__main__': main(sys.argv[1:])
