"""Installs the wheel beside the lowest and the newest of what it needs, on every supported Python, and tests it there.

    python .ci/matrix.py                         all of it, torch from the index of CPU builds
    python .ci/matrix.py --only 3.11 lowest      one cell
    python .ci/matrix.py --torch DIR             torch from the wheels in DIR, one for each Python
"""
import argparse
import re
import subprocess
import sys
import tempfile
import zipfile
from configparser import ConfigParser
from datetime import date
from os import environ
from pathlib import Path
from shutil import copytree, ignore_patterns

ROOT = Path(__file__).parents[1]
PYTHONS, ENDS = ('3.11', '3.12', '3.13'), ('lowest', 'newest')
TESTS = 'test_verbs.py', 'test_hook.py', 'test_scan.py', 'test_load.py', 'test_tiny.py::test_weights_are_all_there'
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


def torch_options(wheels: Path | None, python: str, box: Path) -> tuple[list[str], list[str]]:
    "Requirements and options that bring torch for the CPU."
    if wheels is None: return [], ['--torch-backend', 'cpu']
    tag = f"-cp{python.replace('.', '')}-"
    wheel = next((w for w in sorted(wheels.glob('torch-*.whl')) if tag in w.name), None)
    if wheel is None: raise ValueError(f'got no wheel torch-*{tag}*.whl in {wheels}')
    with zipfile.ZipFile(wheel) as z: meta = z.read(next(n for n in z.namelist() if n.endswith('.dist-info/METADATA')))
    names = re.findall(r'^Requires-Dist: ((?:nvidia|cuda|triton)[\w.-]*)', meta.decode(), re.M)
    (box/'overrides').write_text(''.join(f"{n}; sys_platform == 'none'\n" for n in sorted(set(names))))
    return [f'torch @ {wheel.resolve().as_uri()}'], ['--overrides', str(box/'overrides')]


def hollow(lib: Path) -> None:
    """Puts libraries of the names that a torch for CUDA loads beside it, each function of which says 'no device'.

    Where no torch for the CPU is at hand, this spares several GB of CUDA; what runs on the CPU is that torch's own.
    """
    mine = [p for p in lib.glob('*.so*') if p.is_file()]
    wanted = {n for p in mine for n in re.findall(r'NEEDED.*\[(lib(?:cu|nv|nccl).*?)\]', run('readelf', '-d', p))}
    missing = wanted - {p.name for p in mine}
    if not missing: return
    rows = [line.split() for p in mine for line in run('readelf', '-W', '--dyn-syms', p).splitlines()]
    asked = {m[1] for r in rows if len(r) > 7 and r[6] == 'UND' and (m := re.match(_CUDA, r[7]))}
    versions = {lib: name for p in mine for lib, name in re.findall(_NEEDS, run('readelf', '-W', '-V', p))}
    source, script = lib/'hollow.c', lib/'hollow.map'
    source.write_text(''.join(f'long {name}(void) {{ return 100; }}\n' for name in sorted(asked)))   # cudaErrorNoDevice
    for name in missing:
        script.write_text(f'{versions[name]} {{ global: *; }};' if name in versions else '{ global: *; };')
        run('gcc', '-w', '-shared', '-fPIC', '-fno-builtin', f'-Wl,-soname,{name},--version-script,{script}', '-o',
            lib/name, source)


_CUDA = r'((?:__cu|cu|nv|nccl)\w+)(@.*)?$'
_NEEDS = r'File: (\S+)\s+Cnt: \d+\n.*?Name: (\S+)'


def cell(python: str, end: str, wheel: Path, wheels: Path | None) -> list[str]:
    "One row of the table."
    with tempfile.TemporaryDirectory(prefix='matrix-') as folder:
        box = Path(folder)
        venv, home = box/'venv', box/'venv/bin/python'
        pip = lambda *args: run('uv', 'pip', 'install', '--python', home, *args)
        run('uv', 'venv', '--python', python, venv)
        torch, options = torch_options(wheels, python, box)
        wanted = [r for r in requirements() if not (torch and r.startswith('torch>'))]
        how = 'lowest-direct' if end == 'lowest' else 'highest'
        pip(*torch, *wanted, *options, '--only-binary', ':all:', '--resolution', how)
        pip('--no-deps', wheel)
        pip('pytest', 'accelerate', 'setuptools', *options, *torch)
        if torch: hollow(next(venv.glob('lib/python*/site-packages'))/'torch/lib')
        env = {k: v for k, v in environ.items() if k != 'PYTHONPATH'} | {'HF_HUB_OFFLINE': '1', 'OMP_NUM_THREADS': '1'}
        ask = f"from importlib.metadata import version; print(*map(version, {SHOWN}))"
        row = [python, end, *run(home, '-c', ask).split()]
        copytree(ROOT/'tests', box/'tests', ignore=ignore_patterns('__pycache__'))
        try:
            tests = [f'tests/{t}' for t in TESTS]
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
    parser.add_argument('--torch', type=Path, metavar='DIR', help='wheels of torch; what CUDA brings is hollow')
    parser.add_argument('--wheel', type=Path, help='circuitbench, already built')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.wheel is None: run('uv', 'build', '--out-dir', folder, ROOT)        # by way of the sdist
        wheel = args.wheel or next(Path(folder).glob('*.whl'))
        print(f"{date.today()}, {wheel.name}\n\n| Python | end | {' | '.join(SHOWN)} | tests | quickstart |")
        print('|' + '---|'*(len(SHOWN) + 4), flush=True)
        cells = [tuple(args.only)] if args.only else [(p, e) for p in PYTHONS for e in ENDS]
        rows = []
        for python, end in cells:
            rows.append(cell(python, end, wheel, args.torch))
            print(f"| {' | '.join(rows[-1])} |", flush=True)
    sys.exit(any('failed' in r for r in rows))


if __name__ == '__main__': main()
