"""Installs the wheel beside the lowest and the newest of what it needs, on every supported Python, and tests it there.

    python .ci/matrix.py                         all of it, torch from the index of CPU builds
    python .ci/matrix.py --only 3.11 lowest      one cell
    python .ci/matrix.py --registry              torch from where the rest comes from: on Linux a build for CUDA, 3 to
                                                 6 GB a cell, of which the tests use what runs on the CPU

Needs uv, which takes the interpreters that it finds and fetches the others.
"""
import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from configparser import ConfigParser
from datetime import date
from os import environ
from pathlib import Path
from shutil import copytree, ignore_patterns

ROOT = Path(__file__).parents[1]
PYTHONS, ENDS = ('3.11', '3.12', '3.13'), ('lowest', 'newest')
TESTS = 'test_verbs.py', 'test_hook.py', 'test_scan.py', 'test_load.py', 'test_state.py', \
    'test_tiny.py::test_weights_are_all_there'
SHOWN = 'torch', 'transformers', 'numpy', 'scipy', 'safetensors', 'ipywidgets'


def run(*command, **options) -> str:
    "What a command prints; RuntimeError with the end of it if it fails."
    command = [str(c) for c in command]
    out = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)
    if out.returncode:
        said = '\n'.join(out.stdout.splitlines()[-40:])
        raise RuntimeError(f'{" ".join(command[:3])} ended with {out.returncode}:\n{said}')
    return out.stdout


def requirements() -> list[str]:
    "What settings.ini asks for, without extras."
    cfg = ConfigParser(delimiters=['='])
    cfg.read(ROOT/'settings.ini', encoding='utf-8')
    return cfg['DEFAULT']['requirements'].split()


def cell(python: str, end: str, wheel: Path, options: list[str], tests: Iterable[str]) -> list[str]:
    "One row of the table."
    with tempfile.TemporaryDirectory(prefix='matrix-') as folder:
        box = Path(folder)
        venv, home = box/'venv', box/'venv/bin/python'
        pip = lambda *args: run('uv', 'pip', 'install', '--python', home, *args)
        run('uv', 'venv', '--python', python, venv)
        how = 'lowest-direct' if end == 'lowest' else 'highest'
        pip(*requirements(), *options, '--only-binary', ':all:', '--resolution', how)
        pip('--no-deps', wheel)
        pip('pytest', 'accelerate', 'setuptools', *options)
        env = {k: v for k, v in environ.items() if k != 'PYTHONPATH'} | {'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
        ask = (f"import platform, torch; from importlib.metadata import version\n"
               f"print(platform.python_version(), '{end}', torch.__version__, *map(version, {SHOWN[1:]}))")
        row = run(home, '-c', ask, env=env).split()
        copytree(ROOT/'tests', box/'tests', ignore=ignore_patterns('__pycache__'))
        try:
            tests = [f'tests/{t}' for t in tests]
            said = run(home, '-m', 'pytest', '-q', '-m', 'not slow', '-p', 'no:cacheprovider', *tests, cwd=box, env=env)
            run(venv/'bin/circuitbench', 'models', cwd=box, env=env)
            run(venv/'bin/circuitbench', 'quickstart', '--tokens', '4000', '--out', box/'page.html', cwd=box, env=env)
        except RuntimeError as err:
            print(err, file=sys.stderr)
            return [*row, 'failed', '']
        passed = re.findall(r'\d+ (?:passed|skipped|xfailed)', said)
        return [*row, ', '.join(passed) or 'passed', 'runs']


def main() -> None:
    "Prints the table, row by row."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--only', nargs=2, metavar=('PYTHON', 'END'), help='3.11 lowest, for example')
    parser.add_argument('--registry', action='store_true', help='torch from the registry, not the CPU index')
    parser.add_argument('--wheel', type=Path, help='circuitbench, already built')
    parser.add_argument('--tests', nargs='+', default=TESTS, metavar='FILE', help='fewer or others, of tests/')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.wheel is None: run('uv', 'build', '--out-dir', folder, ROOT)        # by way of the sdist
        wheel = args.wheel or next(Path(folder).glob('*.whl'))
        print(f"{date.today()}, {wheel.name}\n\n| Python | end | {' | '.join(SHOWN)} | tests | quickstart |")
        print('|' + '---|'*(len(SHOWN) + 4), flush=True)
        cells = [tuple(args.only)] if args.only else [(p, e) for p in PYTHONS for e in ENDS]
        rows, options = [], [] if args.registry else ['--torch-backend', 'cpu']
        for python, end in cells:
            rows.append(cell(python, end, wheel, options, args.tests))
            print(f"| {' | '.join(rows[-1])} |", flush=True)
    sys.exit(any('failed' in r for r in rows))


if __name__ == '__main__': main()
