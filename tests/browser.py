"""Helpers for tests in a real browser: a Chromium page that is watched, and a JupyterLab on loopback.

    with chromium() as browser, jupyter_lab(tmp_path) as lab, notebook_page(browser, lab, [code]) as (page, seen):
        page.locator('.noUi-handle').press('ArrowRight')
        ...
        assert not seen.errors
"""
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

FLAGS = ['--no-sandbox', '--disable-gpu', '--disable-background-networking', '--disable-component-update',
         '--no-first-run']
ROOT = Path(__file__).resolve().parents[1]

READY = '''async () => {
    await jupyterapp.restored;
    const nb = jupyterapp.shell.currentWidget;
    await nb.context.ready;
    await nb.sessionContext.ready;
    await nb.sessionContext.session.kernel.info;
}'''

# Contrast of each piece of text against what is painted under it.
CONTRAST = """() => {
  const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = css => { paint.clearRect(0, 0, 1, 1); paint.fillStyle = css; paint.fillRect(0, 0, 1, 1);
                        return [...paint.getImageData(0, 0, 1, 1).data] };
  const light = ([r, g, b]) => [r, g, b].map(c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
                                        .reduce((s, c, i) => s + c * [.2126, .7152, .0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) { const c = rgba(getComputedStyle(e).backgroundColor);
                                                         if (c[3] > 250) return c } return [255, 255, 255, 255] };
  const out = [];
  for (const e of document.querySelectorAll('body *')) {
    const own = [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim());
    if (e.closest('svg,style,script') || !(own || e.dataset.s)) continue;
    const [a, b] = [light(rgba(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    out.push([(a + .05) / (b + .05), e.tagName + ' ' + e.textContent.slice(0, 30)]);
  }
  return out }"""

# The middle of an element, scrolled into view.
MIDDLE = """e => { e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();
                   return [r.left + r.width / 2, r.top + r.height / 2] }"""

# Boards and films that can be seen have been drawn once.
DRAWN = """() => { const seen = s => [...document.querySelectorAll(s)].filter(e => e.clientWidth);
  return seen('.board-root, .film-root').every(e => e.querySelector('.board, .film')) && seen('.board, .film').every(e => e.dataset.frames) }"""


@dataclass
class Seen:
    "What a page did besides showing itself."
    errors: list = field(default_factory=list)      # console errors and uncaught exceptions
    requests: list = field(default_factory=list)    # addresses asked for, but for data: ones


@contextmanager
def chromium():
    "A Chromium from the system's packages."
    path = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    if path is None: pytest.fail('no chromium on this machine: apt-get install chromium')
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=FLAGS)
        try: yield browser
        finally: browser.close()


@contextmanager
def watched_page(browser, **options):
    "A page and what was seen of it; options are those of a browser context, such as `color_scheme='dark'`."
    context, seen = browser.new_context(**options), Seen()
    context.set_default_timeout(90_000)                        # a machine may be busy
    page = context.new_page()
    page.on('console', lambda m: m.type == 'error' and seen.errors.append(m.text))
    page.on('pageerror', lambda e: seen.errors.append(str(e)))
    page.on('request', lambda r: r.url.startswith('data:') or seen.requests.append(r.url))
    try: yield page, seen
    finally: context.close()


def faults(page, within=None, grave=False):
    "What axe-core finds on a page, or within a selector, once its views are drawn; grave leaves out what is neither serious nor critical."
    page.wait_for_function(DRAWN)
    found = Axe().run(page, context=within and {'include': [[within]]}).response['violations']
    return [(v['impact'], v['id'], x['html'][:200]) for v in found if not grave or v['impact'] in ('serious', 'critical') for x in v['nodes']]


@contextmanager
def jupyter_lab(folder: Path, app='jupyterlab'):
    """The address of a JupyterLab that serves a folder on loopback without a token, with settings of its own.

    app='notebook' starts Notebook 7 instead, whose server has JupyterLab too.
    """
    home = Path(folder) / '.jupyter-home'
    (home / 'labconfig').mkdir(parents=True)
    news = {'disabledExtensions': {'@jupyterlab/apputils-extension:announcements': True}}     # its dialog covers all
    (home / 'labconfig' / 'page_config.json').write_text(json.dumps(news))
    places = ('JUPYTER_CONFIG_DIR', 'JUPYTER_DATA_DIR', 'JUPYTER_RUNTIME_DIR', 'JUPYTERLAB_SETTINGS_DIR',
              'JUPYTERLAB_WORKSPACES_DIR', 'IPYTHONDIR')
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')]))
    env = os.environ | dict.fromkeys(places, str(home)) | {'PYTHONPATH': path, 'JUPYTER_PREFER_ENV_PATH': '1'}
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        port = s.getsockname()[1]
    args = ['--no-browser', '--allow-root', '--ServerApp.ip=127.0.0.1', f'--ServerApp.port={port}',
            '--ServerApp.port_retries=0', '--IdentityProvider.token=', '--PasswordIdentityProvider.hashed_password=',
            f'--ServerApp.root_dir={folder}', '--LabApp.expose_app_in_browser=True',
            '--JupyterNotebookApp.expose_app_in_browser=True']
    log = open(home / 'log', 'w+')
    command = [sys.executable, '-m', app, *args]
    server = subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    try:
        url, until = f'http://127.0.0.1:{port}', time.monotonic() + 60
        while not _answers(url + '/api'):
            if server.poll() is not None or time.monotonic() > until:
                pytest.fail(f'{app} did not start:\n' + (home / 'log').read_text()[-3000:])
            time.sleep(.1)
        yield url, Path(folder)
    finally:
        server.terminate()
        try: server.wait(20)
        except subprocess.TimeoutExpired: server.kill()
        log.close()


def _answers(url):
    try: return urllib.request.urlopen(url, timeout=2).status == 200
    except OSError: return False


@contextmanager
def notebook_page(browser, lab, cells, name='inspect.ipynb', **options):
    "A notebook of code cells in JupyterLab, each run with Shift+Enter; yields the page when the last one is done."
    url, folder = lab
    code = [dict(cell_type='code', id=f'c{i}', metadata={}, source=s, outputs=[], execution_count=None)
            for i, s in enumerate(cells)]
    kernel = {'kernelspec': {'name': 'python3', 'display_name': 'Python 3', 'language': 'python'}}
    (folder / name).write_text(json.dumps(dict(cells=code, metadata=kernel, nbformat=4, nbformat_minor=5)))
    options = {'viewport': {'width': 1200, 'height': 900}} | options
    with watched_page(browser, **options) as (page, seen):
        page.goto(f'{url}/lab/tree/{name}')
        page.locator('.jp-Notebook .jp-CodeCell .cm-content').first.wait_for()
        page.evaluate(READY)                                   # keys pressed before the kernel listens are lost
        page.locator('.jp-Notebook .jp-CodeCell .cm-content').first.click()
        for _ in cells: page.keyboard.press('Shift+Enter')
        last = page.locator('.jp-CodeCell .jp-InputPrompt').nth(len(cells) - 1)
        page.wait_for_function('e => /\\d/.test(e.textContent)', arg=last.element_handle(), timeout=120_000)
        yield page, seen


def set_theme(page, name):
    "Switch JupyterLab to `JupyterLab Light` or `JupyterLab Dark`."
    page.evaluate("name => jupyterapp.commands.execute('apputils:change-theme', {theme: name})", name)
    page.wait_for_function("dark => document.body.dataset.jpThemeLight === String(!dark)", arg='Dark' in name)
