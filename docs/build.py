"""The site: lays the pages out in _docs/pages, builds them into _docs/html, checks every link.

python docs/build.py
"""
import ast
import json
import os
import re
import shutil
import sys
from itertools import groupby
from pathlib import Path
from time import perf_counter

from links import main as check_links
from reference import Module, page, read_modules

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
NBS, PAGES, EXTRA, HTML = ROOT/'nbs', *(ROOT/'_docs'/x for x in ('pages', 'extra', 'html'))
REPO = 'circuitbench/circuitbench'
GIT = f'https://github.com/{REPO}/blob/main'
# Names of notebooks that in prose mostly mean something else: a site, an argument, a model, another package.
WORDS = set('course delta exact gguf held measure persistence plan planted report scan scores site state step '
            'sweep'.split())


def notebooks() -> dict[str, Path]:
    "Every notebook by its place in nbs, without the ending."
    places = sorted(p.relative_to(NBS) for p in NBS.rglob('*.ipynb'))
    return {p.with_suffix('').as_posix(): NBS/p for p in places if not any(x.startswith(('.', '_')) for x in p.parts)}


def read(path: Path) -> dict: return json.loads(path.read_text(encoding='utf8'))


def said(nb: dict) -> tuple[str, str]:
    "A notebook's title and the sentence below it."
    text = next((''.join(c['source']) for c in nb['cells'] if c['cell_type'] == 'markdown'), '')
    title, blurb = re.search(r'^# (.+)', text, re.M), re.search(r'^> (.+)', text, re.M)
    return title[1].strip() if title else '', blurb[1].strip() if blurb else ''


def links_between(text: str, name: str, books: dict[str, Path]) -> str:
    "Makes links of the names of other notebooks in backticks, in prose alone; a floor's with or without its number."
    short = {k.split('/')[-1]: k for k in books}
    floors = {k[3:]: k for k in books if re.match(r'\d\d_', k) and k[3:] not in WORDS and not 10 < int(k[:2]) < 28}
    def one(m):
        inner = m[1].removeprefix('nbs/').removesuffix('.ipynb')
        to = inner if inner in books else short.get(inner if re.match(r'\d\d_', inner) or '.ipynb' in m[1] else '', '')
        if not to and name != 'index': to = floors.get(m[1].removeprefix('circuitbench.'), '')
        if not to or to == name: return m[0]
        return f'[{m[0]}]({os.path.relpath(to, Path(name).parent)}.ipynb)'
    parts = re.split(r'(^```.*?^```|\[[^\]\n]*\]\([^)\n]*\))', text, flags=re.M | re.S)
    return ''.join(x if i % 2 else re.sub(r'(?<!`)`([^`\n]+)`(?!`)', one, x) for i, x in enumerate(parts))


def neighbours(modules: dict[str, Module]) -> dict[str, str]:
    "Notebook of a floor -> the floors that it builds on and those that build on it, as links."
    books = {n.removeprefix('circuitbench.'): m.notebook for n, m in modules.items()}
    on = {m.notebook: sorted({books[k] for k in imported(m) if k in books}) for m in modules.values()}
    listed = lambda names: ', '.join(f'<a href="{n}.html">{n[3:]}</a>' for n in names)
    out = {}
    for n, below in on.items():
        above = sorted(k for k, v in on.items() if n in v)
        said = [f'Builds on {listed(below)}.'] if below else []
        more = f' and {len(above) - 12} more' if len(above) > 12 else ''
        if above: said.append(f'Used by {listed(above[:12])}{more}.')
        out[n] = ' '.join(said)
    return out


def imported(module: Module) -> set[str]:
    "What a module imports from its own package, by name within it."
    found = set()
    up = module.name.split('.')[1:-1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = up[:len(up) - node.level + 1] + (node.module.split('.') if node.module else [])
            found |= {'.'.join(base), *('.'.join([*base, a.name]) for a in node.names)}
    return found


def bar(name: str, module: Module | None, near: str) -> str:
    "The line below a title: the module's page, the file, where the notebook runs, and the floors next to it."
    up, out = '../'*name.count('/'), []
    if module: out.append(f'<a href="{up}reference/{module.name}.html">Reference of <code>{module.name}</code></a>')
    out.append(f'<a href="{up}notebooks/{name}.ipynb" download>Download the notebook</a>')
    if '/' in name or name == 'index':
        out.append(f'<a class="badge" href="https://colab.research.google.com/github/{REPO}/blob/main/nbs/{name}.ipynb">'
                   'Open in Colab</a>')
        out.append(f'<a class="badge" href="https://mybinder.org/v2/gh/{REPO}/main?labpath=nbs/{name}.ipynb">'
                   'Open in Binder</a>')
    return f'\n\n<p class="bar">{" ".join(out)}</p>\n' + (f'<p class="near">{near}</p>\n' if near else '')


def staged(name: str, nb: dict, books: dict[str, Path], module: Module | None, near: str = '') -> dict:
    "A notebook as it goes to Sphinx: links and the bar put in, directives of the export taken out."
    cells, titled = [], False
    for c in nb['cells']:
        text = ''.join(c['source'])
        if c['cell_type'] == 'markdown':
            text = links_between(text, name, books)
            if not titled and (head := re.search(r'^# .+(\n+> .+)?', text, re.M)):
                text, titled = text[:head.end()] + bar(name, module, near) + text[head.end():], True
        elif c['cell_type'] == 'code':
            marks = re.findall(r'^#\| *(.+)\n?', text, re.M)
            if any(m.startswith(('default_exp', 'hide')) for m in marks) and not c['outputs']: continue
            if any(m.startswith('echo: false') for m in marks): c['metadata']['tags'] = ['remove-input']
            text = re.sub(r'^#\|.*\n?', '', text, flags=re.M)
            if only_imports(text): c['metadata']['tags'] = ['hide-input']
            for o in c['outputs']:                       # a widget's picture is its HTML
                if len(o.get('data', {})) > 1: o['data'].pop('application/vnd.jupyter.widget-view+json', None)
        cells.append(c | {'source': text})
    nb['metadata'].pop('widgets', None)
    return nb | {'cells': cells}


def only_imports(text: str) -> bool:
    "Is a cell nothing but imports, six lines of them or more?"
    try: body = ast.parse(text).body
    except SyntaxError: return False                                   # a magic
    return text.count('\n') > 4 and all(isinstance(x, ast.Import | ast.ImportFrom) for x in body)


def toctree(entries: list[str], *options: str) -> str:
    "A directive of MyST; entries are places, or `title <place>`."
    return '\n'.join(['```{toctree}', *options, '', *entries, '```', ''])


def listed(title: str, intro: str, names: list[str], books: dict[str, Path], number: bool = False) -> str:
    "A page that lists notebooks with the sentence below each title."
    rows, entries = [], []
    for n in names:
        head, blurb = said(read(books[n]))
        if number: head = f'{n[:2]} {head}'
        rows.append(f'| [{head}]({n}.ipynb) | {blurb.replace("|", chr(92) + "|")} |')
        entries.append(f'{head} <{n}>')
    table = '\n'.join(['| notebook | what it tells |', '|---|---|', *rows])
    return f'# {title}\n\n{intro}\n\n{table}\n\n{toctree(entries, ":hidden:")}'


def floors_page(floors: list[str], books: dict[str, Path]) -> str:
    "The package as a book: the parts that book.md names, and in each its notebooks in order."
    intro, *parts = re.split(r'^## (\d\d)-(\d\d) ', (HERE/'book.md').read_text(encoding='utf8'), flags=re.M)
    out = ['# The floors', '', intro]
    for low, high, text in zip(*[iter(parts)]*3):
        title, about = text.split('\n', 1)
        out.append('#' + listed(title, about.strip(), [n for n in floors if low <= n[:2] <= high], books, number=True))
    return links_between('\n'.join(out), 'floors', books)


def stories(folder: str, books: dict[str, Path]) -> list[str]: return [n for n in books if n.startswith(folder + '/')]


def sites_page() -> str:
    "Shipped models, and the families with their sites, from the package's own tables."
    from circuitbench import load  # noqa: F401, registers the families
    from circuitbench.shipped import shipped_models
    from circuitbench.site import BLOCK_SITES, MODEL_SITES, family_table
    cards = ['| model | architecture | weights, MB | bits a byte, held out |', '|---|---|---|---|']
    for m in shipped_models():
        bits = next((f'{v:.3f}' for k, v in m.figures.items() if 'bits' in k), '')
        link = f'[`tiny://{m.name}`]({GIT}/circuitbench/tiny/{m.name})'
        cards.append(f'| {link} | {m.model_type} | {m.size/1e6:.1f} | {bits} |')
    axes = ['| site | axes | meaning |', '|---|---|---|']
    axes += [f'| `{n}` | {" ".join(s.axes)} | {s.meaning} |' for n, s in (MODEL_SITES | BLOCK_SITES).items()]
    return '\n'.join(['# Models and sites', '', '## Models that ship with the package', '', *cards, '',
                      '## Families', '', '```{raw} html', family_table(), '```', '',
                      'What the sites hold in each family is told in [Families and their sites](families.ipynb).', '',
                      '## Sites', '', *axes, ''])


def bench_page(books: dict[str, Path]) -> str:
    "Tables of measurements where they stand: front page and families, with machine and date."
    texts = {n: '\n'.join(''.join(c['source']) for c in read(books[n])['cells'] if c['cell_type'] == 'markdown')
             for n in ('index', 'families')}
    part = lambda n, title: re.search(rf'^## {title}\n(.*?)(?=^## |\Z)', texts[n], re.M | re.S)[1].strip()
    return '\n\n'.join(['# Measurements', 'Each table names its command, its machine and its date.', '## The package',
                        links_between(part('index', 'Measured'), 'bench', books), '## Families',
                        links_between(part('families', 'What it costs'), 'bench', books)]) + '\n'


def lay_out() -> None:
    "Writes every page that Sphinx reads."
    for folder in (PAGES, EXTRA): shutil.rmtree(folder, ignore_errors=True)
    books, modules = notebooks(), read_modules(ROOT)
    made, near = {m.notebook: m for m in modules.values()}, neighbours(modules)
    for name, path in books.items():
        (PAGES/name).parent.mkdir(parents=True, exist_ok=True)
        nb = staged(name, read(path), books, made.get(name), near.get(name, ''))
        if name == 'index':
            nb['cells'].append(dict(cell_type='markdown', id='toc', metadata={}, source=contents(books)))
        (PAGES/f'{name}.ipynb').write_text(json.dumps(nb), encoding='utf8')
        copy = EXTRA/'notebooks'/f'{name}.ipynb'
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    floors = [n for n in books if re.match(r'\d\d_', n)]
    howto = [n for n in books if n.startswith('adding_')]
    write = lambda name, text: (PAGES/f'{name}.md').write_text(text, encoding='utf8')
    write('tutorials', listed('Tutorials', 'Stories, each run from top to bottom.', stories('tutorials', books), books))
    if course := stories('course', books): write('course', listed('Course', 'Units in order.', course, books))
    write('howto', listed('How to', 'One thing each.', howto, books))
    write('floors', floors_page(floors, books))
    (PAGES/'reference').mkdir()
    for m in modules.values(): (PAGES/'reference'/f'{m.name}.rst').write_text(page(m, modules), encoding='utf8')
    write('reference', reference_page(modules))
    write('sites', sites_page())
    write('bench', bench_page(books))
    write('changelog', (ROOT/'CHANGELOG.md').read_text(encoding='utf8'))
    for name in ('glossary', 'about'):
        write(name, links_between((HERE/f'{name}.md').read_text(encoding='utf8'), name, books))


def contents(books: dict[str, Path]) -> str:
    "The navigation."
    learn = ['gallery', 'tutorials', *(['course'] if stories('course', books) else []), 'howto', 'floors']
    tables = ['sites', 'families', 'truth_table', 'bench']
    return '\n'.join([toctree(learn, ':hidden:', ':caption: Learn'),
                      toctree(['reference', 'glossary'], ':hidden:', ':caption: Look up'),
                      toctree(tables, ':hidden:', ':caption: Tables'),
                      toctree(['changelog', 'about'], ':hidden:', ':caption: The project')])


def reference_page(modules: dict[str, Module]) -> str:
    "The list of all modules, in the order of their floors."
    order = sorted(modules.values(), key=lambda m: m.notebook)
    rows = ['| floor | module | what it does |', '|---|---|---|']
    for floor, ms in groupby(order, key=lambda m: m.notebook[:2]):
        rows += [f'| {floor} | [`{m.name}`](reference/{m.name}.rst) | '
                 f'{" ".join(m.doc.split()).replace("|", chr(92) + "|")} |' for m in ms]
    head = '# API reference\n\nMade from the source of every exported module: signatures, docstrings, and the ' \
           'comments beside the parameters.\n\n'
    entries = [f'{m.name.removeprefix("circuitbench.")} <reference/{m.name}>' for m in order]
    return head + '\n'.join(rows) + '\n\n' + toctree(entries, ':hidden:')


def accessible(html: str) -> str:
    "Captions of the navigation say their level, and what scrolls can be reached by keys."
    html = html.replace('class="caption" role="heading"', 'class="caption" role="heading" aria-level="2"')
    return re.sub(r'<pre(?=[ >])(?![^>]*tabindex)', '<pre tabindex="0"', html)


def main() -> int:
    "Builds the site; returns how many links are broken, or Sphinx's own status."
    from sphinx.cmd.build import main as sphinx
    start = perf_counter()
    lay_out()
    shutil.rmtree(HTML, ignore_errors=True)
    trees = str(ROOT/'_docs'/'doctrees')
    strict = ['-q', '-W', '--keep-going', '-n']
    status = sphinx([*strict, '-b', 'html', '-c', str(HERE), '-d', trees, str(PAGES), str(HTML)])
    if status: return status
    for path in HTML.rglob('*.html'): path.write_text(accessible(path.read_text(encoding='utf8')), encoding='utf8')
    (HTML/'.nojekyll').touch()
    broken = check_links(str(HTML), str(ROOT/'_docs'/'external.txt'))
    size = sum(p.stat().st_size for p in HTML.rglob('*') if p.is_file())
    print(f'{HTML.relative_to(ROOT)}: {size/1e6:.0f} MB in {perf_counter() - start:.0f} s')
    return broken


if __name__ == '__main__':
    sys.exit(bool(main()))
