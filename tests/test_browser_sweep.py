"""Circuits and steering in a real browser: their pages without a kernel, their inspectors in JupyterLab."""
from html import unescape

import pytest
import torch
from browser import CONTRAST, MIDDLE, chromium, jupyter_lab, notebook_page, watched_page

from circuitbench.draw import esc
from circuitbench.load import load_model
from circuitbench.steer import steer
from circuitbench.sweep import sweep_sites

STRENGTHS = [-4, 0, 2, 4]


@pytest.fixture(scope='module')
def browser():
    with chromium() as b: yield b


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
    "A sweep and a push as pages, and the results they show."
    folder, model = tmp_path_factory.mktemp('pages'), load_model('mock://mamba2-tiny')
    circuit = sweep_sites(model, 'Paris is the capital of', 'France', progress=False)
    v = torch.randn(64, generator=torch.Generator().manual_seed(0))
    push = steer(model, 'Hello', vector=v, strength=2., layer=1, max_new_tokens=12)
    written = circuit.to_html(folder/'sweep.html'), push.to_html(folder/'steer.html', STRENGTHS)
    return circuit, written[0].as_uri(), push, written[1].as_uri()


@pytest.mark.parametrize('which', [1, 3], ids=['circuit', 'steer'])
@pytest.mark.parametrize('scheme, width', [('light', 1100), ('dark', 1100), ('light', 400)])
def test_pages_read_in_both_themes_and_widths(browser, pages, which, scheme, width):
    with watched_page(browser, color_scheme=scheme, viewport={'width': width, 'height': 900}) as (page, seen):
        page.goto(pages[which])
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        ratios = page.evaluate(CONTRAST)
        assert len(ratios) > 40 and not [r for r in ratios if r[0] < 4.5]
        assert page.evaluate('document.documentElement.scrollWidth') <= width                    # no sideways scrolling
        assert seen.errors == [] and seen.requests == [pages[which]]


def test_a_sweep_reads_out_its_values(browser, pages):
    circuit, url = pages[:2]
    with watched_page(browser) as (page, seen):
        page.goto(url)
        svg = page.locator('svg.cells').first
        read = lambda part: part.evaluate("e => e.closest('figure').querySelector('output').textContent")
        page.mouse.move(*svg.locator('rect').first.evaluate(MIDDLE))
        layer, site, value = circuit.layers[0], circuit.sites[0], float(circuit.effects[0, 0])
        said = read(svg)
        assert said.startswith(f'layer {layer}, site {site}: ')
        assert float(said.split(': ')[1]) == pytest.approx(value, rel=.01)
        svg.focus()
        for key in ('ArrowDown', 'ArrowRight'): page.keyboard.press(key)
        assert read(svg).startswith(f'layer {circuit.layers[1]}, site {circuit.sites[1]}: ')
        bar = page.locator('rect.bar').first
        page.mouse.move(*bar.evaluate(MIDDLE))
        assert read(bar).startswith('layer 0: ') and seen.errors == []


def test_a_push_slides_without_a_kernel(browser, pages):
    push, url = pages[2:]
    with watched_page(browser) as (page, seen):
        page.goto(url)
        slider, shown = page.locator('input[type=range]'), page.locator('[data-k]:visible')
        text = lambda: shown.locator('.tx').all_text_contents()
        said = lambda p: [unescape(esc(t)) for t in (p.clean_text, p.steered_text)]
        assert shown.count() == 1 and text() == said(push) and 'strength 2 ' in shown.text_content()
        slider.focus()
        for k, key in ((3, 'ArrowRight'), (2, 'ArrowLeft'), (1, 'ArrowLeft')):
            page.keyboard.press(key)
            page.wait_for_function('([e, s]) => e.ariaValueText == s', arg=[slider.element_handle(), str(STRENGTHS[k])])
            now = push.again(STRENGTHS[k])
            assert shown.count() == 1 and text() == said(now)
            assert slider.get_attribute('aria-valuetext') == str(STRENGTHS[k])
            assert page.locator('.sw label b').text_content() == str(STRENGTHS[k])
        assert shown.locator('mark').count() == 0 and page.locator('mark').count() > 0  # strength 0 marks nothing
        page.locator('.tk:visible span[title]').nth(1).hover()
        assert "1: 'e' = 0" in shown.locator('output').first.text_content() and seen.errors == []


CODE = """import torch
from circuitbench.load import load_model
from circuitbench.sweep import sweep_sites
from circuitbench.steer import steer
model = load_model('mock://mamba2-tiny')
circuit = sweep_sites(model, 'Paris is', 'a', progress=False)
push = steer(model, 'Hello', vector=torch.ones(64), strength=2., layer=1, max_new_tokens=4)"""


@pytest.mark.slow
def test_inspectors_in_jupyterlab(browser, tmp_path):
    cells = [CODE, 'circuit.inspect()', 'push.inspect()']
    with jupyter_lab(tmp_path) as lab, notebook_page(browser, lab, cells) as (page, seen):
        cell = lambda k: page.locator('.jp-CodeCell').nth(k)
        live = lambda k: cell(k).locator('.cbv-live')
        live(2).wait_for(timeout=45_000)
        title = live(1).locator('figcaption').first
        assert title.text_content() == 'Effect on logit_diff'
        live(1).locator('select').first.select_option(label='change of the output')
        changed = "e => e.querySelector('figcaption').textContent.startsWith('Change of the output')"
        page.wait_for_function(changed, arg=live(1).element_handle())
        page.wait_for_function("e => e.querySelector('.steer').dataset.written == 4", arg=live(2).element_handle())
        slider, number = (live(2).locator(f'.row input[type={kind}]') for kind in ('range', 'number'))
        assert slider.input_value() == number.input_value() == '2' and 'blocks.1.ssm.out_proj_in' in live(2).locator('.row').text_content()
        slider.press('ArrowRight')
        assert number.input_value() == '2.1'
        page.keyboard.press('Escape')
        live(2).locator('[data-tab=code]').click()
        page.wait_for_function("e => e.querySelector('pre').textContent.includes('push(d0, 2.1*d0.norm)')", arg=live(2).element_handle())
        assert not seen.errors
