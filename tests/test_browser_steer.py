"""The board of directions in a real browser: as a saved file, with its messages heard by the test, and live in JupyterLab."""
import json

import pytest
from browser import CONTRAST, chromium, jupyter_lab, notebook_page, set_theme, watched_page

from circuitbench.direction import latent_direction, state_difference
from circuitbench.load import load_model
from circuitbench.sae import SAE
from circuitbench.steer_board import SteerInspector

FRANCE, EGYPT = (f' Question: what is the capital of {land}?' for land in ('France', 'Egypt'))
ROWS = {'latent 878': dict(strength=2., kind='chosen', at=[4, 5]), 'France to Egypt': dict(strength=1.)}
CODE = """from circuitbench.direction import latent_direction, state_difference
from circuitbench.load import load_model
from circuitbench.sae import SAE
from circuitbench.steer_board import SteerInspector
model, coder = load_model('tiny://mamba2'), SAE.load('tiny://mamba2/blocks.3.resid_post')
france, egypt = (f' Question: what is the capital of {land}?' for land in ('France', 'Egypt'))
directions = {'latent 878': latent_direction(model, coder, 878), 'France to Egypt': state_difference(model, egypt, france, layer=2, heads=3)}
look = SteerInspector(model, france, directions, new=8)
look"""


@pytest.fixture(scope='module')
def browser():
    with chromium() as b: yield b


@pytest.fixture(scope='module')
def board():
    model, coder = load_model('tiny://mamba2'), SAE.load('tiny://mamba2/blocks.3.resid_post')
    ds = {'latent 878': latent_direction(model, coder, 878), 'France to Egypt': state_difference(model, EGYPT, FRANCE, layer=2, heads=3)}
    return SteerInspector(model, FRANCE, ds, ROWS, new=10).dose('France to Egypt', [0., .5, 1.]).persist('France to Egypt')


@pytest.fixture(scope='module')
def address(board, tmp_path_factory): return board.to_html(tmp_path_factory.mktemp('page')/'a.html').as_uri()


@pytest.fixture(scope='module')
def heard(board, tmp_path_factory):
    "The same page, but what it says is kept in `told`, and the test may answer through `view`."
    path = board.to_html(tmp_path_factory.mktemp('page')/'b.html')
    start = ("const state = JSON.parse(document.getElementById('steer-state').textContent);"
             "window.told = []; window.view = mount(document.getElementById('steer'), {error: '', busy: '', ...state}, m => told.push(structuredClone(m)))")
    text = path.read_text()
    assert text.count('\nshow()</script>') == 1
    path.write_text(text.replace('\nshow()</script>', f'\n{start}</script>'))
    return path.as_uri()


def opened(page, address):
    page.goto(address)
    page.locator('.steer[data-written]').wait_for()


def row(page, k): return page.locator('.steer .row').nth(k)


def told(page, n):
    page.wait_for_function('n => told.length >= n', arg=n)
    return page.evaluate('told')


def slide(page, k, *values):
    for v in values: row(page, k).locator('[type=range]').evaluate("(e, v) => { e.value = v; e.dispatchEvent(new Event('input')) }", v)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1280, 800, 420])
def test_a_saved_page_shows_the_last_state_and_stands_still(browser, board, address, width, scheme):
    with watched_page(browser, viewport={'width': width, 'height': 900}, color_scheme=scheme) as (page, seen):
        opened(page, address)
        for k, s in (('clean', 'Paris'), ('steered', 'Cairo')):
            shown = page.locator(f'.{k}').inner_text().replace('⏎', '')
            assert s in shown and shown.split() == ''.join(board.result[k]).split()
        marked = page.locator('.steered mark').all_inner_texts()
        assert [board.result['steered'][i].strip() for i in board.result['marks'][1]] == [s.strip(' ⏎\n') for s in marked]
        titles = page.locator('.steered > *').evaluate_all('all => all.map(e => e.title)')
        assert all(f'KL {float(f"{v:.3g}"):g}'[:6] in t for v, t in zip(board.result['kl'], titles) if v > 1e-3) and len(titles) == 10
        assert f'{board.result["mean_kl"]:.3g} nats a token' in page.inner_text('.numbers') and f'{board.result["ratio"]:.3g}' in page.inner_text('.numbers')
        assert 'without a kernel' in page.inner_text('.still-note') and not page.locator('.stop').is_visible()
        assert page.locator('.rows :is(input,select):enabled, .strip button:enabled, .new:enabled').count() == 0
        assert [row(page, k).locator('[type=range]').input_value() for k in (0, 1)] == ['2', '1']
        assert row(page, 0).locator('.kind').input_value() == 'chosen' and page.locator('.strip [aria-pressed=true]').all_inner_texts() == ['·the', '·capital']
        for tab, text in (('persist', 'share of the write'), ('code', board.code.split('\n')[0]), ('dose', 'KL along the clean text')):
            page.locator(f'.tabs [data-tab={tab}]').click()
            assert text in page.locator('.pane').inner_text()
            assert page.evaluate('document.documentElement.scrollWidth') <= width
            assert not [r for r in page.evaluate(CONTRAST) if r[0] < 4.5]
        assert seen.errors == [] and seen.requests == [address]


def test_moves_are_gathered_into_one_message(browser, board, heard):
    with watched_page(browser) as (page, seen):
        opened(page, heard)
        page.clock.install()
        slide(page, 1, -1, 2, 3)
        assert row(page, 1).locator('[type=number]').input_value() == '3' and page.evaluate('told') == []
        page.clock.run_for(200)
        slide(page, 1, -2.5)
        page.clock.run_for(200)
        assert page.evaluate('told') == []
        page.clock.run_for(100)
        (message,) = page.evaluate('told')
        want = json.loads(json.dumps(board.settings))
        want['rows'][1]['strength'] = -2.5
        assert message == dict(do='set', **want) and seen.errors == []


def test_each_control_says_what_it_sets(browser, heard):
    with watched_page(browser) as (page, seen):
        opened(page, heard)
        a, b, n = row(page, 0), row(page, 1), 0
        def _said(k):
            nonlocal n
            n += 1
            return told(page, n)[-1]['rows'][k]
        a.locator('[type=checkbox]').uncheck()
        assert not _said(0)['on'] and 'off' in a.inner_text()
        a.locator('[type=checkbox]').check()
        assert _said(0)['on']
        a.locator('.l select').select_option('1')
        assert _said(0)['layer'] == 1
        a.locator('.l select').select_option('3')
        assert _said(0)['layer'] is None
        b.locator('.h select').select_option('0')
        assert _said(1)['head'] == 0
        b.locator('[type=number]').fill('6.5')
        assert _said(1)['strength'] == 6.5 and b.locator('[type=range]').input_value() == '6.5'
        a.locator('.kind').select_option('ablate')
        assert _said(0)['kind'] == 'ablate' and a.locator('[type=range]').is_disabled()
        page.locator('.new').fill('30')
        assert told(page, n + 1)[-1]['new'] == 30
        page.locator('.new').fill('0')
        page.evaluate('document.activeElement.blur()')
        assert page.locator('.new').input_value() == '30' and seen.errors == []


def test_tokens_are_picked_in_the_strip(browser, heard):
    with watched_page(browser) as (page, seen):
        opened(page, heard)
        token = lambda t: page.locator('.strip button').nth(t)
        token(5).click()
        token(1).click()
        assert told(page, 1)[-1]['rows'][0]['at'] == [1, 4] and row(page, 0).locator('.said').inner_text() == 'at 1 ":", 4 " the"'
        page.locator('.which').select_option('1')
        token(6).click()
        assert told(page, 2)[-1]['rows'][1]['at'] == [6] and page.locator('.strip [aria-pressed=true]').count() == 1
        page.locator('.which').select_option('0')
        token(1).press('Enter')
        token(4).press(' ')
        assert told(page, 3)[-1]['rows'][0]['at'] == [] and 'no token is chosen' in row(page, 0).inner_text()
        row(page, 0).locator('.kind').select_option('push')
        assert page.locator('.which').input_value() == '1' and token(0).is_enabled()
        row(page, 1).locator('.kind').select_option('push')
        assert token(0).is_disabled() and 'Every token is pushed' in page.inner_text('.hint') and seen.errors == []


def test_written_tokens_are_picked_all_at_once(browser, heard):
    with watched_page(browser) as (page, seen):
        opened(page, heard)
        later = page.locator('.strip .later')
        assert later.is_visible() and later.get_attribute('aria-pressed') == 'false'
        later.click()
        got = told(page, 1)[-1]['rows'][0]
        assert got['later'] and got['at'] == [4, 5] and later.get_attribute('aria-pressed') == 'true' and later.locator('i').count() == 1
        assert row(page, 0).locator('.said').inner_text() == 'at 4 " the", 5 " capital", every token that is written'
        for t in (4, 5): page.locator('.strip button').nth(t).click()
        assert told(page, 2)[-1]['rows'][0]['at'] == [] and 'does nothing' not in row(page, 0).inner_text()
        page.locator('.which').select_option('1')
        assert not later.is_visible()                                      # a state is written once
        assert seen.errors == []


def test_what_the_kernel_says_is_shown(browser, board, heard):
    with watched_page(browser) as (page, seen):
        opened(page, heard)
        page.evaluate("view.set({busy: 'writing'}); view.live({steered: [' A'], show: {clean: '<span> B</span>', steered: '<mark> A</mark>', legend: '', numbers: ''}})")
        assert page.inner_text('.steered').strip() == 'A' and page.inner_text('.busy') == 'writing' and page.locator('.steer').get_attribute('data-written') == '1'
        page.locator('.stop').click()
        assert told(page, 1) == [dict(do='stop')]
        page.evaluate("view.set({busy: '', error: 'RuntimeError: no more'})")
        assert page.locator('.steer .er').first.inner_text() == 'RuntimeError: no more' and 'Cairo' in page.inner_text('.steered')
        page.evaluate("view.set({error: ''})")
        assert not page.locator('.steer > .er').is_visible()
        page.locator('.go').click()
        page.locator('[data-tab=persist]').click()
        assert page.locator('.of option:enabled').all_inner_texts() == ['France to Egypt']
        page.locator('.go').click()
        assert told(page, 3)[1:] == [dict(do='dose', name='latent 878'), dict(do='persist', name='France to Egypt')]
        changed = json.loads(json.dumps(board.settings))
        changed['rows'][0] |= dict(strength=-3., kind='push')
        page.evaluate('s => view.set({settings: s})', changed)
        assert row(page, 0).locator('[type=range]').input_value() == '-3' and row(page, 0).locator('.kind').input_value() == 'push'
        slide(page, 0, 1)                                                  # what is being moved here is not moved back
        page.evaluate('s => view.set({settings: s})', changed)
        assert row(page, 0).locator('[type=range]').input_value() == '1' and seen.errors == []


def test_the_code_is_copied(browser, board, heard):
    with watched_page(browser) as (page, seen):
        page.context.grant_permissions(['clipboard-read', 'clipboard-write'])
        opened(page, heard)
        page.locator('[data-tab=dose]').press('ArrowLeft')
        page.locator('.copy').click()
        page.locator('.copied', has_text='Copied').wait_for()
        assert page.evaluate('navigator.clipboard.readText()') == board.code and seen.errors == []


@pytest.mark.slow
def test_it_is_live_in_jupyterlab(browser, tmp_path):
    cells = [CODE, "look.set('latent 878', strength=1.)"]
    with jupyter_lab(tmp_path) as lab, notebook_page(browser, lab, cells[:1]) as (page, seen):
        live = page.locator('.steer').first
        live.locator('.steered', has_text='Paris').wait_for()
        board = lambda text: page.locator('.jp-OutputArea-output', has_text=text)
        at = row(page, 1).locator('[type=range]')
        at.evaluate("e => { e.value = 1; e.dispatchEvent(new Event('input')) }")
        live.locator('.steered', has_text='Cairo').wait_for()
        page.wait_for_function("() => document.querySelector('.steer').dataset.busy == ''")
        page.locator('.new').first.fill('300')
        page.wait_for_function("() => +document.querySelector('.steer').dataset.written > 12")
        at.evaluate("e => { e.value = 0; e.dispatchEvent(new Event('input')) }")        # while it writes
        live.locator('.steered', has_text='Paris').wait_for()
        page.locator('.stop').first.click()
        page.wait_for_function("() => document.querySelector('.steer').dataset.busy == ''")
        page.locator('.new').first.fill('4')
        page.wait_for_function("() => document.querySelectorAll('.steer .steered > *').length == 4")
        page.locator('[data-tab=persist]').first.click()
        page.locator('.go').first.click()
        live.locator('.chart', has_text='share of the write').wait_for()
        page.locator('.jp-CodeCell .cm-content').first.click()
        page.keyboard.press('Escape')
        page.keyboard.press('b')
        page.keyboard.press('Enter')
        page.keyboard.type("look.set('France to Egypt', strength=1.)\nprint(len(look.plan), len(model.standing), look.result['steered'])")
        page.keyboard.press('Shift+Enter')
        board("1 0 [' Answer', ':', ' Cairo', '.']").last.wait_for()
        live.locator('.steered', has_text='Cairo').wait_for()
        for theme, ground in (('JupyterLab Dark', 'rgb(22, 25, 30)'), ('JupyterLab Light', 'rgb(255, 255, 255)')):
            set_theme(page, theme)
            page.wait_for_function("c => getComputedStyle(document.querySelector('.steer')).backgroundColor == c", arg=ground)
        assert at.input_value() == '1' and not page.locator('.still').first.is_visible() and seen.errors == []
