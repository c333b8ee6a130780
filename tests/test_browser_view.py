"""Views, pages and the Inspector in a real browser."""
import json
import re

import numpy as np
import pytest
from browser import CONTRAST, MIDDLE, chromium, jupyter_lab, notebook_page, set_theme, watched_page

from circuitbench import view as cv

RNG = np.random.default_rng(0)


@pytest.fixture(scope='module')
def browser():
    with chromium() as b: yield b


@pytest.fixture(scope='module')
def demo(tmp_path_factory):
    "A page with every view on it."
    words = ['The', ' capital', ' of', '\n', ' France']
    wave = np.outer(np.sin(np.arange(60) / 9), np.cos(np.arange(50) / 5))
    wave[2, 1] = np.nan
    sections = [
        ('Tokens', cv.token_strip(words, [0, 1, -2, 0, 3.5], mark=[2]) + cv.token_strip(words)),
        ('Heat maps', cv.heatmap([[1, -2], [np.nan, 3]])
         + cv.heatmap(wave, rows=[f'r{i}' for i in range(60)], unit='nats')),
        ('Charts', cv.columns(cv.bars(['a', 'b'], [1, -2], errors=[.2, .1]), cv.histogram(RNG.normal(size=500)))
         + cv.lines({'one': [1, 2, 3], 'two': [3, 2, 1]})),
        ('Texts', cv.text_diff('a b c', 'a c d') + cv.table([[1, 'x']], ['n', 's']))]
    return cv.save_page(tmp_path_factory.mktemp('page') / 'demo.html', 'Demo', sections, lead='All of them.').as_uri()


@pytest.mark.parametrize('scheme, width', [('light', 1100), ('dark', 1100), ('light', 400)])
def test_page_reads_in_both_themes_and_widths(browser, demo, scheme, width):
    with watched_page(browser, color_scheme=scheme, viewport={'width': width, 'height': 900}) as (page, seen):
        page.goto(demo)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        ratios = page.evaluate(CONTRAST)
        assert len(ratios) > 60 and not [r for r in ratios if r[0] < 4.5]
        assert page.evaluate('document.documentElement.scrollWidth') <= width                    # no sideways scrolling
        shown = [page.locator(f'image.{k}').evaluate('e => getComputedStyle(e).display') for k in ('lt', 'dk')]
        assert shown == (['inline', 'none'] if scheme == 'light' else ['none', 'inline'])
        assert seen.errors == [] and seen.requests == [demo]


def test_switch_goes_to_the_other_theme_and_back(browser, demo):
    for scheme in ('light', 'dark'):
        with watched_page(browser, color_scheme=scheme) as (page, seen):
            page.goto(demo)
            ground = lambda: page.evaluate('getComputedStyle(document.body).backgroundColor')
            seen_first = ground()
            for key in ('Tab', 'Tab', 'Enter'): page.keyboard.press(key)                    # past the skip link
            other = ground()
            assert not [r for r in page.evaluate(CONTRAST) if r[0] < 4.5]
            page.locator('#theme').click()
            assert {seen_first, other} == {'rgb(255, 255, 255)', 'rgb(22, 25, 30)'} and ground() == seen_first
            assert seen.errors == []


def test_keyboard_reaches_tokens_and_reads_them_out(browser, demo):
    with watched_page(browser) as (page, seen):
        page.goto(demo)
        focused = lambda: page.evaluate('document.activeElement.title')
        for _ in range(20):
            page.keyboard.press('Tab')
            if focused(): break
        assert focused() == "0: 'The' = 0"
        out = page.locator('figure').first.locator('output')
        assert out.text_content() == "0: 'The' = 0"
        page.keyboard.press('ArrowRight'), page.keyboard.press('ArrowRight')
        assert focused() == "2: ' of' = -2" == out.text_content()
        page.keyboard.press('Tab')                                    # one stop for the whole strip
        assert focused() == "0: 'The'"
        page.keyboard.press('Shift+Tab')
        assert focused() == "2: ' of' = -2"
        page.locator('figure').first.locator('span[title]').last.hover()
        assert out.text_content() == "4: ' France' = 3.5" and seen.errors == []


def test_charts_read_out_their_values(browser, demo):
    with watched_page(browser) as (page, seen):
        page.goto(demo)
        said = {'rect.bar': 'a: 1 ± 0.2', 'path.pt': 'one, x 0: 1', 'svg.cells rect': 'row 0, column 0: 1 '}
        for what, says in said.items():
            part = page.locator(what).first
            page.mouse.move(*part.evaluate(MIDDLE))
            assert part.evaluate("e => e.closest('figure').querySelector('output').textContent") == says
        assert seen.errors == []


def test_a_picture_reads_out_its_values(browser, demo):
    wave = np.outer(np.sin(np.arange(60) / 9), np.cos(np.arange(50) / 5))
    with watched_page(browser) as (page, seen):
        page.goto(demo)
        svg = page.locator('svg[data-v]', has=page.locator('image'))
        svg.scroll_into_view_if_needed()
        out, box = page.locator('figure', has=svg).locator('output'), svg.bounding_box()
        for i, j in ((0, 0), (10, 20), (59, 49)):
            page.mouse.move(box['x'] + box['width'] * (j + .5) / 50, box['y'] + box['height'] * (i + .5) / 60)
            where, value = re.fullmatch(r'row (r\d+, column \d+): (\S+) nats', out.text_content()).groups()
            assert where == f'r{i}, column {j}' and abs(float(value) - wave[i, j]) <= .006 * abs(wave[i, j])
        page.mouse.move(box['x'] + box['width'] * 1.5 / 50, box['y'] + box['height'] * 2.5 / 60)
        assert out.text_content() == 'row r2, column 1: NaN nats'
        svg.focus()
        page.keyboard.press('ArrowUp'), page.keyboard.press('ArrowLeft')
        assert out.text_content().startswith('row r1, column 0: ') and seen.errors == []


CELL = """
from circuitbench.view import Inspector, heatmap
import numpy as np

def state(step=3, head=0, name='x'):
    if step == 5: raise ValueError('no <step> 5')
    wave = np.outer(np.sin(np.arange(12) + step), np.cos(np.arange(16) * (head + 1)))
    return heatmap(wave, title=f'{name} {step} {head}')

Inspector(state, 'The state', step=(0, 9), head=(0, 3), name='x', play=['step'])
"""


@pytest.mark.slow
def test_inspector_in_jupyterlab(browser, tmp_path):
    with jupyter_lab(tmp_path) as lab, notebook_page(browser, lab, [CELL]) as (page, seen):
        caption = page.locator('.cbv-live figcaption')
        caption.filter(has_text='x 3 0').wait_for()
        first = page.locator('.cbv-live svg.cells').inner_html()
        step = page.locator('.noUi-handle').first
        step.press('ArrowRight')
        caption.filter(has_text='x 4 0').wait_for()
        assert page.locator('.cbv-live svg.cells').inner_html() != first
        step.press('ArrowRight')                                       # an error stands where the picture stood
        page.locator('.cbv-live [role=alert]', has_text='ValueError: no <step> 5').wait_for()
        step.press('ArrowRight')
        caption.filter(has_text='x 6 0').wait_for()
        page.locator('.noUi-handle').nth(1).press('ArrowRight')
        caption.filter(has_text='x 6 1').wait_for()
        page.locator('.widget-text input').fill('y')
        page.keyboard.press('Enter')
        caption.filter(has_text='y 6 1').wait_for()
        page.locator('.widget-play button').first.click()
        caption.filter(has_text='y 9 1').wait_for()                    # it walks to the end
        for theme in ('JupyterLab Dark', 'JupyterLab Light'):
            set_theme(page, theme)
            ground = page.locator('.cbv-live .cbv').first.evaluate('e => getComputedStyle(e).backgroundColor')
            assert ground == ('rgb(22, 25, 30)' if 'Dark' in theme else 'rgb(255, 255, 255)')
        assert page.locator('.still').count() == 1 and not page.locator('.still').is_visible()
        assert seen.errors == []
        assert all(re.match(r'(http://127\.0\.0\.1:|blob:)', u) for u in seen.requests)


@pytest.mark.slow
def test_saved_inspector_shows_without_its_kernel(browser, tmp_path):
    with jupyter_lab(tmp_path) as lab:
        with notebook_page(browser, lab, [CELL]) as (page, _):
            page.locator('.jp-OutputArea .noUi-handle').first.wait_for()
            page.evaluate("jupyterapp.commands.execute('docmanager:save')")
            saved = json.loads((tmp_path / 'inspect.ipynb').read_text())
        assert 'widgets' not in saved['metadata'] and len(saved['cells'][0]['outputs']) == 2
        for trusted, source in ((True, CELL), (False, CELL + '# changed')):    # a changed notebook is not trusted
            saved['cells'][0]['source'] = source
            (tmp_path / f'{trusted}.ipynb').write_text(json.dumps(saved))
            with watched_page(browser) as (page, _):
                page.goto(f'{lab[0]}/lab/tree/{trusted}.ipynb')
                page.locator('.jp-OutputArea figcaption', has_text='x 3 0').wait_for()
                assert page.locator('.noUi-handle').count() == 0
