"""The site: the checker of links finds what is broken, the reference says what the source says, pages can be read by all."""
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from browser import chromium, faults, watched_page

ROOT = Path(__file__).parents[1]


def tool(name):
    "A module of docs/."
    spec = importlib.util.spec_from_file_location(f'docs_{name}', ROOT/'docs'/f'{name}.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_broken_links_and_anchors_are_found(tmp_path):
    (tmp_path/'sub').mkdir()
    (tmp_path/'a.html').write_text('<h1 id="top">A</h1><a href="sub/b.html#here">b</a><a href="sub/b.html#no">x</a>'
                                   '<a href="c.html">x</a><a href="https://example.org/">e</a>')
    (tmp_path/'sub'/'b.html').write_text('<p id="here"></p><a href="../a.html#top">a</a><a href="#gone">x</a>'
                                         '<script src="https://example.org/x.js"></script>')
    bad, outside, n = tool('links').check(tmp_path)
    assert sorted(bad) == ['a.html: c.html is no file', 'a.html: sub/b.html#no has no such anchor',
                           'sub/b.html: #gone has no such anchor',
                           'sub/b.html: loads https://example.org/x.js from elsewhere']
    assert outside == ['https://example.org/', 'https://example.org/x.js'] and n == 5


@pytest.mark.parametrize('name', ['edit', 'attribute', 'view', 'scan'])
def test_the_reference_has_every_public_name_and_parameter(name):
    reference = tool('reference')
    modules = reference.read_modules(ROOT)
    page = reference.page(modules[f'circuitbench.{name}'], modules)
    module = importlib.import_module(f'circuitbench.{name}')
    for public in module.__all__:
        head = re.search(rf'^\.\. py:\w+:: {public}\b(.*)$', page, re.M)
        assert head or f'``{public}``' in page, public
        value = getattr(module, public)
        if inspect.isfunction(value) and value.__module__ == module.__name__:
            for p in inspect.signature(value).parameters: assert re.search(rf'[(*, ]{p}\b', head[1]), (public, p)


def test_comments_of_parameters_are_shown():
    reference = tool('reference')
    modules = reference.read_modules(ROOT)
    page = reference.page(modules['circuitbench.edit'], modules)
    assert ':param at: numbered from 0 among the meta tokens; None is all' in page


@pytest.fixture(scope='module')
def site():
    "The built site (SITE, where it is built already); the build fails on a warning or a broken link."
    if os.environ.get('SITE'): return (ROOT/os.environ['SITE']).resolve()
    done = subprocess.run([sys.executable, 'docs/build.py'], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return ROOT/'_docs'/'html'


@pytest.mark.slow
def test_pages_have_no_serious_fault_in_both_themes(site):
    found = []
    with chromium() as browser:
        for theme in ('light', 'dark'):
            for name in ('index', 'tutorials/two_memories', 'reference/circuitbench.edit', 'glossary'):
                with watched_page(browser, color_scheme=theme, viewport=dict(width=1300, height=900)) as (page, seen):
                    page.goto((site/f'{name}.html').as_uri())
                    found += [(theme, name, *v) for v in faults(page, grave=True)]
                    assert not [r for r in seen.requests if not r.startswith('file:')]
    assert not found, '\n'.join(map(str, found[:20]))


@pytest.mark.slow
def test_pictures_follow_the_switch_of_the_page(site):
    ink = "() => getComputedStyle(document.querySelector('.cbv')).color"
    with chromium() as browser, watched_page(browser, color_scheme='light') as (page, _):
        page.goto((site/'00_draw.html').as_uri())
        colors = {}
        for theme in ('light', 'dark'):
            page.evaluate('t => document.body.dataset.theme = t', theme)
            colors[theme] = page.evaluate(ink)
    assert colors['light'] == 'rgb(27, 29, 33)' and colors['dark'] == 'rgb(232, 234, 237)'
