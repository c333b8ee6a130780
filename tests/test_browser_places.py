"""Every inspector of the gallery where people run notebooks: JupyterLab, Notebook 7, nbconvert's HTML, the site, saved pages.

In each place a control is moved and the picture must change, without an error in the console.
"""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from browser import READY, ROOT, chromium, faults, jupyter_lab, watched_page
from test_docs import tool

pytestmark = pytest.mark.slow

GALLERY = ROOT/'nbs'/'gallery.ipynb'
CODE = [c for c in json.loads(GALLERY.read_text())['cells'] if c['cell_type'] == 'code']
KEYS = ['ArrowRight', 'ArrowLeft', 'ArrowUp', 'ArrowDown']

# What of an element is seen: its words, drawings and pixels, but for its controls and what is hidden.
SEEN = """e => [e, ...e.querySelectorAll('*')].filter(x => x.checkVisibility() && !x.closest('label,select')).map(x => x.tagName == 'CANVAS' ? x.toDataURL()
  : x.tagName == 'IMG' ? x.src : x.closest('svg') ? x.outerHTML : [...x.childNodes].filter(n => n.nodeType == 3).map(n => n.data).join()).join('|')"""


@dataclass(frozen=True)
class Look:
    "Where the gallery shows an inspector, and what to move."
    cell: str     # the cell's id
    live: str     # the control where there is a kernel
    picture: str  # what must change there
    still: str    # the control where there is none
    key: str = 'ArrowRight'  # what moves it, or the value that is chosen in a menu


def _slider(name): return f'.widget-hslider:has(label:text-is("{name}")) .noUi-handle'


def _menu(name): return f'.widget-dropdown:has(label:text-is("{name}")) select'


LOOKS = {
    'HookInspector': Look('hook', _slider('block'), '.widget-html .cbv', '.sw input', 'ArrowLeft'),
    'SweepInspector': Look('sweep', _menu('value'), '.widget-html .cbv', '.sw select', 'change of the output'),
    'SAEInspector': Look('sae', _menu('show'), '.widget-html .cbv', '.sw select', 'neighbours'),
    'StateInspector': Look('film', '.film .step', '.film .one', 'input.step', 'ArrowLeft'),
    'CircuitInspector': Look('circuit', '.board .n', '.board .edges', 'input.n', 'ArrowLeft'),
    'SteerInspector': Look('steer', '.steer .row [type=range]', '.steer .steered', '[data-tab=code]', 'End'),
    'Inspector': Look('own', _slider('head'), '.widget-html .cbv', '.sw input'),
}


# What has the focus, if no outline shows it.
LOST = """() => { const e = document.activeElement, s = getComputedStyle(e)
  return e == document.body || s.outlineStyle != 'none' && parseFloat(s.outlineWidth) > 0 ? null : e.outerHTML.slice(0, 150) }"""


@pytest.fixture(scope='module')
def browser():
    with chromium() as b: yield b


def moved(control, key):
    "Moves a slider by a key, presses a button or chooses in a menu."
    kind = control.evaluate('e => e.tagName')
    if kind == 'SELECT': control.select_option(label=key)
    elif kind == 'BUTTON': control.click()
    else: control.press(key)


def changes(page, picture, control, key):
    "Moves a control and waits until the picture is another."
    control.scroll_into_view_if_needed()
    before = picture.evaluate(SEEN)
    assert before
    moved(control, key)
    page.wait_for_function(f'([e, was]) => ({SEEN})(e) !== was', arg=[picture.element_handle(), before])


# -- with a kernel ---------------------------------------------------------------------
@pytest.fixture(scope='module')
def server(tmp_path_factory):
    "Notebook 7 on loopback, which has JupyterLab beside it."
    with jupyter_lab(tmp_path_factory.mktemp('server'), 'notebook') as address: yield address


RUN = "() => jupyterapp.commands.execute('notebook:run-all-cells')"
DONE = """n => jupyterapp.shell.currentWidget.content.widgets.filter(c => c.model.type == 'code' && c.model.executionCount).length == n"""
SHOW = """async id => { const nb = jupyterapp.shell.currentWidget.content, i = nb.widgets.findIndex(c => c.model.sharedModel.id == id)
  nb.activeCellIndex = i; nb.deselectAll(); await nb.scrollToItem(i, 'start'); return i }"""
ACTIVE = '() => jupyterapp.shell.currentWidget.content.activeCellIndex'


@contextmanager
def opened(browser, server, place, name, cells):
    "A notebook, run from top to bottom in JupyterLab or Notebook 7."
    with watched_page(browser, viewport={'width': 1300, 'height': 1000}) as (page, seen):
        page.goto(f'{server[0]}/{"lab/tree" if place == "JupyterLab 4" else "notebooks"}/{name}?reset')
        page.locator('.jp-Notebook .jp-CodeCell .cm-content').first.wait_for()
        page.evaluate(READY)
        page.evaluate(RUN)
        page.wait_for_function(DONE, arg=cells, timeout=120_000)
        yield page, seen


@pytest.fixture(scope='module', params=['JupyterLab 4', 'Notebook 7'])
def place(request, browser, server):
    "The gallery with a kernel, and the errors that its page made beyond those of a notebook with a widget of ipywidgets."
    source = 'import ipywidgets\nipywidgets.Play()'
    plain = dict(cell_type='code', id='a', metadata={}, source=source, outputs=[], execution_count=None)
    body = json.loads(GALLERY.read_text())
    (server[1]/'plain.ipynb').write_text(json.dumps(body | dict(cells=[plain])))
    shutil.copy(GALLERY, server[1]/'gallery.ipynb')
    with opened(browser, server, request.param, 'plain.ipynb', 1) as (page, seen):
        page.locator('.widget-play').wait_for()
        page.wait_for_timeout(3000)
        own = set(seen.errors)
    with opened(browser, server, request.param, 'gallery.ipynb', len(CODE)) as (page, seen):
        yield page, lambda: [e for e in seen.errors if e not in own]


def output(page, cell):
    "The outputs of a cell, scrolled to."
    i = page.evaluate(SHOW, cell)
    box = page.locator(f'.jp-Notebook .jp-Cell[data-windowed-list-index="{i}"] .jp-Cell-outputArea')
    box.locator('.cbv-live').first.wait_for()
    return box, i


@pytest.mark.parametrize('name', LOOKS)
def test_a_control_moves_the_picture_in_a_notebook(place, name):
    page, errors = place
    box, _ = output(page, LOOKS[name].cell)
    changes(page, box.locator(LOOKS[name].picture).first, box.locator(LOOKS[name].live).first, LOOKS[name].key)
    assert box.locator('.still').count() == 1 and not box.locator('.still').is_visible()
    assert not errors()


@pytest.mark.parametrize('name', [k for k, v in LOOKS.items() if 'select' not in v.live])
def test_arrow_keys_move_the_slider_and_not_the_notebook(place, name):
    page, errors = place
    box, i = output(page, LOOKS[name].cell)
    slider = box.locator(LOOKS[name].live).first
    value = 'e => +(e.ariaValueNow ?? e.value)'
    slider.focus()
    for keys in (('ArrowLeft', 'ArrowRight'), ('ArrowUp', 'ArrowDown')):
        been = [slider.evaluate(value)]
        for key in (*keys, *keys[::-1]):                              # at an end one of the two moves nothing
            page.keyboard.press(key)
            page.wait_for_timeout(150)
            been.append(slider.evaluate(value))
            assert page.evaluate(ACTIVE) == i and slider.evaluate('e => e == document.activeElement')
        assert len({*been}) > 1 or name == 'StateInspector' and 'ArrowUp' in keys, (keys, been)   # there they choose a head
    assert not errors()


def test_living_inspectors_can_be_used_by_all(place):
    page, _ = place
    found = []
    for look in LOOKS.values():
        box, _ = output(page, look.cell)
        wide = "e => [...e.querySelectorAll('.cbv-live, .cbv-live .cbv')].every(x => x.getBoundingClientRect().right <= e.getBoundingClientRect().right)"
        assert box.evaluate(wide)
        found += faults(page, '.cbv-live')
    assert not found, '\n'.join(map(str, dict.fromkeys(found)))


# -- what other notebooks ask for --------------------------------------------------------
@pytest.mark.parametrize('name', [k for k, v in LOOKS.items() if v.cell in ('film', 'circuit', 'steer')])
def test_scripts_are_whole_and_ask_nothing_of_the_network(made, name):
    esm, css = (getattr(made[LOOKS[name].cell], k) for k in ('_esm', '_css'))
    assert 'export default' in esm and not re.search(r'^\s*import\b|\bimport\(|\brequire\(|\bdefine\(|\bfetch\(|XMLHttpRequest|WebSocket', esm, re.M)
    assert not [u for u in re.findall(r'https?://[^\s\'"`)]+', esm + css) if u != 'http://www.w3.org/2000/svg']
    rules = re.sub(r'@media[^{]*\{', '', re.sub(r'/\*.*?\*/', '', css))
    assert rules.count('.cbv') > 20 and not [r for r in re.findall(r'([^{}]+)\{[^{}]*\}', rules) if '.cbv' not in r]      # nothing else is styled


@pytest.mark.parametrize('name', LOOKS)
def test_a_widget_comes_with_its_picture(made, name):
    "A place without widgets shows the text/html beside them; one that runs no scripts, what stands in it as it is."
    live, _ = made[LOOKS[name].cell]._repr_mimebundle_()
    assert live['application/vnd.jupyter.widget-view+json']['version_major'] == 2 and len(live['text/html']) > 5000 and live['text/plain']
    bare = re.sub(r'<script.*?</script>|<style.*?</style>', '', live['text/html'], flags=re.S)
    assert re.search('<svg|<img|<table|class="tx"', bare)


def test_the_gallery_says_where_each_is_tested(made):
    text = ''.join(next(c for c in json.loads(GALLERY.read_text())['cells'] if c['id'] == 'places')['source'])
    rows = [[x.strip() for x in line.strip('| ').split('|')] for line in text.splitlines() if line.startswith('| `')]
    assert [r[0].strip('`') for r in rows] == list(LOOKS) and all(len(r) == 6 for r in rows)


# -- without a kernel ------------------------------------------------------------------
def closed(route, asked):
    "Answers what is asked of the network with nothing, and keeps the address."
    asked.append(route.request.url)
    route.fulfill(status=200, content_type='text/javascript', body='')


@pytest.fixture(scope='module')
def exported(tmp_path_factory):
    "The gallery by `jupyter nbconvert --to html`, as it is committed."
    folder = tmp_path_factory.mktemp('html')
    subprocess.run([sys.executable, '-m', 'nbconvert', '--to', 'html', '--output-dir', str(folder), str(GALLERY)],
                   check=True, capture_output=True)
    return folder/'gallery.html'


@pytest.fixture(scope='module')
def site(tmp_path_factory):
    "The gallery as a page of the site: SITE, where that is built, else a site of this page alone."
    if os.environ.get('SITE'): return (ROOT/os.environ['SITE']).resolve()/'gallery.html'
    from sphinx.cmd.build import main as sphinx
    sys.path.insert(0, str(ROOT/'docs'))
    build, pages = tool('build'), tmp_path_factory.mktemp('pages')
    staged = build.staged('gallery', build.read(GALLERY), {}, None)
    (pages/'gallery.ipynb').write_text(json.dumps(staged))
    (pages/'index.md').write_text('# Here\n\n```{toctree}\ngallery\n```\n')
    sys.path.remove(str(ROOT/'docs'))
    options = ['-q', '-W', '-b', 'html', '-c', str(ROOT/'docs'), '-D', 'html_extra_path=']
    assert sphinx([*options, str(pages), str(pages/'html')]) == 0
    return pages/'html'/'gallery.html'


@pytest.fixture(scope='module')
def made():
    "The inspectors of the gallery, by the cells' ids."
    space, found = {}, {}
    for c in CODE:
        tree = ast.parse(''.join(c['source']))
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, c['id'], 'exec'), space)
        if last is not None: found[c['id']] = eval(compile(ast.Expression(last.value), c['id'], 'eval'), space)
    return found


@pytest.mark.parametrize('where', ['exported', 'site'])
def test_a_control_moves_the_picture_without_a_kernel(browser, request, where):
    path, asked = request.getfixturevalue(where), []
    with watched_page(browser, viewport={'width': 1300, 'height': 1000}) as (page, seen):
        page.route(re.compile('^https?:'), lambda route: closed(route, asked))
        page.goto(path.as_uri())
        page.locator('.film[data-frames]').wait_for(), page.locator('.board[data-frames]').wait_for()
        for name, look in LOOKS.items():
            box = held(page, name)
            changes(page, box, box.locator('input' if name == 'SteerInspector' else look.still).first, look.key)
        assert not seen.errors and not [r for r in asked if '//cdnjs.cloudflare.com/' not in r or where == 'site']


def held(page, name):
    "The picture of an inspector in a page without a kernel."
    words = {'HookInspector': 'every site of one run', 'SweepInspector': 'Sweep of', 'SAEInspector': 'Latents of', 'Inspector': 'State sizes'}
    if name in words: return page.locator('.cbv:has(> .still)', has_text=words[name]).first
    return page.locator({'StateInspector': '.film', 'CircuitInspector': '.board', 'SteerInspector': '.sw:has([data-names*="20"])'}[name]).first


@pytest.mark.parametrize('name', LOOKS)
def test_a_saved_page_can_be_used_and_read_by_all(browser, made, tmp_path, name):
    look, found, fewer = LOOKS[name], [], {'SAEInspector': dict(latents=3)}
    path = made[look.cell].to_html(tmp_path/'page.html', **fewer.get(name, {}))
    for theme in ('light', 'dark'):
        with watched_page(browser, color_scheme=theme, viewport={'width': 1200, 'height': 900}, bypass_csp=True) as (page, seen):
            page.goto(path.as_uri())
            control = page.locator(look.still).first
            unseen = []
            for _ in range(60 if theme == 'light' else 0):            # every stop of the Tab key is seen
                page.keyboard.press('Tab')
                if (lost := page.evaluate(LOST)) is not None: unseen.append(lost)
            assert not unseen
            changes(page, page.locator('section').first, control, look.key)
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            found += [(theme, *v) for v in faults(page)]
            assert not seen.errors and not [r for r in seen.requests if not r.startswith(('file:', 'blob:'))]
            assert page.evaluate('document.documentElement.scrollWidth <= window.innerWidth')
            pictures = page.locator('svg:visible, canvas[role=img]:visible, img:visible')
            silent = pictures.evaluate_all("es => es.filter(e => !e.closest('[aria-hidden=true],.lg') && !(e.ariaLabel || e.alt)).map(e => e.outerHTML.slice(0, 120))")
            assert not silent
    assert not found, '\n'.join(map(str, dict.fromkeys(found)))


@pytest.mark.parametrize('name', ['StateInspector', 'CircuitInspector'])
def test_pictures_have_a_name_before_they_are_drawn(browser, made, tmp_path, name):
    path = made[LOOKS[name].cell].to_html(tmp_path/'page.html')
    with watched_page(browser, viewport={'width': 1200, 'height': 900}, bypass_csp=True) as (page, _):
        page.add_init_script('window.requestAnimationFrame = () => 0')
        page.goto(path.as_uri())
        box = page.locator('.film, .board').first
        box.wait_for()
        nameless = box.locator('[role=img], [role=group]').evaluate_all('es => es.filter(e => !e.ariaLabel).map(e => e.outerHTML.slice(0, 120))')
        assert not nameless and box.get_attribute('data-frames') is None
