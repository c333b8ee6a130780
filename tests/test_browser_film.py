"""The player of states in a real browser: as a file without a model, and live in JupyterLab."""
import re

import numpy as np
import pytest
import torch
from browser import CONTRAST, chromium, jupyter_lab, notebook_page, set_theme, watched_page

from circuitbench.draw import RAMPS, Scale
from circuitbench.film import StateFilm, film_states
from circuitbench.load import load_model
from circuitbench.patching import patch_states

PROMPT = list(range(5, 25))

# Colours at the middles of the cells of a canvas: (row, column, rgb).
PIXELS = """(c, [rows, cols]) => { const g = c.getContext('2d'), w = c.width / cols, h = c.height / rows;
  return Array.from({length: rows}, (_, i) => Array.from({length: cols}, (_, j) =>
    [...g.getImageData(Math.floor((j + .5) * w), Math.floor((i + .5) * h), 1, 1).data].slice(0, 3))) }"""


@pytest.fixture(scope='module')
def browser():
    with chromium() as b: yield b


@pytest.fixture(scope='module')
def film(tmp_path_factory):
    "A film from its file, with patches of one of its two layers."
    model, other = load_model('mock://mamba2-tiny'), [5, 6, 99, *PROMPT[3:]]
    patches = patch_states(model, other, PROMPT, target=6, wrong=5, layers=[1], progress=False)
    made = film_states(model, PROMPT, patches=patches, cells=8)
    return StateFilm.load(made.save(tmp_path_factory.mktemp('film')/'a.safetensors'))


@pytest.fixture(scope='module')
def address(film, tmp_path_factory):
    return film.to_html(tmp_path_factory.mktemp('page')/'a.html', layer=1, step=3, head=2).as_uri()


def opened(page, address):
    page.goto(address)
    page.locator('.film[data-frames]').wait_for()


def at_step(page, t): page.locator(f'.film[data-step="{t}"]').wait_for()


def put(page, t):
    page.locator('.step').evaluate("(e, t) => { e.value = t; e.dispatchEvent(new Event('input')) }", t)
    at_step(page, t)


def frames(page): return int(page.locator('.film').get_attribute('data-frames'))


def colours(picture, high, dark=False):
    "What a picture is painted with."
    return RAMPS[True][dark][Scale(-high, high, True).index(picture.double().numpy())]


def painted(page, film, layer, step, head, dark=False):
    "Are the enlarged state and the write painted as the film says, within a place of the palette?"
    i = film.layers.index(layer)
    high, wrote = float(film.state_limit[i].max()), max(float(film.write(layer, t, head).abs().max()) for t in range(20))
    for name, picture, limit in (('.one', film.state(layer, step, head), high), ('.wrote', film.write(layer, step, head), wrote)):
        got = np.array(page.locator(name).evaluate(PIXELS, list(picture.shape)))
        if np.abs(got - colours(picture, limit, dark)).max() > 4: return False
    return True


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_the_slider_paints_the_states(browser, film, address, scheme):
    with watched_page(browser, color_scheme=scheme) as (page, seen):
        opened(page, address)
        dark = scheme == 'dark'
        assert painted(page, film, 1, 3, 2, dark) and not painted(page, film, 1, 4, 2, dark)
        for t in (4, 19, 0):
            put(page, t)
            assert painted(page, film, 1, t, 2, dark) and f'step {t} of 19' in page.inner_text('.now')
            assert page.locator('.tk .mk').count() == 1 and page.locator('.tk span').nth(t).get_attribute('class') == 'mk'
        page.locator('.layer').select_option('0')
        page.wait_for_function("() => document.querySelector('.a').textContent.includes('layer 0')")
        assert painted(page, film, 0, 0, 2, dark) and not page.locator('.map').is_visible()
        assert 'No patches of layer 0, but of 1' in page.inner_text('.patches')
        assert seen.errors == [] and seen.requests == [address]


def test_the_theme_button_repaints(browser, film, address):
    with watched_page(browser, color_scheme='light') as (page, seen):
        opened(page, address)
        n = frames(page)
        page.locator('#theme').click()
        page.wait_for_function('n => +document.querySelector(".film").dataset.frames > n', arg=n)
        assert painted(page, film, 1, 3, 2, dark=True) and seen.errors == []
        assert not [r for r in page.evaluate(CONTRAST) if r[0] < 4.5]


def test_playing_paints_each_step_once_and_stops_at_the_end(browser, film, address):
    with watched_page(browser) as (page, seen):
        opened(page, address)
        page.locator('.speed').select_option('1000')
        n = frames(page)
        page.locator('.film button').click()
        page.locator('.film button', has_text='Play').wait_for()
        assert page.locator('.film').get_attribute('data-step') == '19' and painted(page, film, 1, 19, 2)
        page.wait_for_timeout(100)
        assert frames(page) - n == 16 + 1                              # steps 4 to 19, and once at rest
        page.locator('.film').focus()
        page.keyboard.press(' ')                                       # from the end it begins anew
        page.wait_for_function('n => +document.querySelector(".film").dataset.frames >= n', arg=n + 17 + 20)
        page.locator('.film button', has_text='Play').wait_for()
        at_step(page, 19)
        assert seen.errors == []


def test_keys_step_and_choose(browser, film, address):
    with watched_page(browser) as (page, seen):
        opened(page, address)
        page.locator('.film').focus()
        for key, t, head in (('ArrowRight', 4, 2), ('ArrowLeft', 3, 2), ('ArrowDown', 3, 3), ('ArrowDown', 3, 3), ('Home', 0, 3), ('ArrowLeft', 0, 3), ('ArrowUp', 0, 2), ('End', 19, 2)):
            page.keyboard.press(key)
            at_step(page, t)
            page.locator('.b', has_text=f'head {head}').wait_for()
        page.locator('.step').focus()
        page.keyboard.press('ArrowLeft')
        at_step(page, 18)                                              # the slider takes one step, not two
        page.keyboard.press(' ')
        at_step(page, 19)
        page.locator('.step[aria-valuetext^="step 19, token"]').wait_for()
        assert seen.errors == []


def test_a_click_enlarges_a_head_and_hover_says_its_numbers(browser, film, address):
    with watched_page(browser) as (page, seen):
        opened(page, address)
        box = page.locator('.grid').bounding_box()
        size = box['width']/4                                          # four heads beside each other
        page.mouse.move(box['x'] + size*.5, box['y'] + box['height'] - size*.4)
        assert page.inner_text('output.cells').startswith('head 0, ')
        page.mouse.down(), page.mouse.up()
        page.locator('.b', has_text='head 0').wait_for()
        assert painted(page, film, 1, 3, 0)
        for name, picture in (('.one', film.state(1, 3, 0)), ('.wrote', film.write(1, 3, 0))):
            box, (rows, cols) = page.locator(name).bounding_box(), picture.shape
            for i, j in ((0, 0), (5, 2), (7, 7)):
                page.mouse.move(box['x'] + box['width']*(j + .5)/cols, box['y'] + box['height']*(i + .5)/rows)
                said = page.inner_text('output.cells')
                value = float(re.search(r': (-?[\d.e+-]+)', said)[1].rstrip('.'))
                assert abs(value - float(picture[i, j])) <= 6e-3*abs(float(picture[i, j])), said
                assert f'd_head {2*i}–{2*i + 1}, d_state {j}' in said and '(mean of the block)' in said


def test_a_head_is_chosen_and_said_in_the_rows(browser, film, address):
    with watched_page(browser) as (page, seen):
        opened(page, address)
        page.locator('.rows').scroll_into_view_if_needed()
        page.locator('.rows').hover(position={'x': 20, 'y': 20*2 + 10})     # below the names of the columns
        said, i = page.inner_text('output.said'), film.layers.index(1)
        assert said.startswith(f'head 1 keeps {float(f"{film.decay[i, 3, 1, 0]:.3g}"):g}, horizon ')
        assert f'writes {float(f"{film.write_norms[i, 3, 1]:.3g}"):g}; would say ' in said
        page.locator('.rows').click(position={'x': 20, 'y': 20*2 + 10})
        page.locator('.b', has_text='head 1').wait_for()
        page.locator('.film summary').click()
        page.locator('.film details tr').last.wait_for()
        row = page.locator('.film details tr').nth(2).locator('td').all_inner_texts()
        assert page.locator('.film details tr').count() == 1 + 4 and row[:2] == ['1', f'{float(f"{film.decay[i, 3, 1, 0]:.3g}"):g}']
        put(page, 5)
        page.wait_for_function("was => document.querySelectorAll('.film details tr')[2].cells[4].innerText != was", arg=row[4])
        assert seen.errors == []


def test_a_click_on_the_patch_map_jumps(browser, film, address):
    with watched_page(browser) as (page, seen):
        opened(page, address)
        box = page.locator('.map').bounding_box()
        width = (box['width'] - 40)/20
        page.locator('.map').scroll_into_view_if_needed()
        spot = {'x': 40 + 11.5*width, 'y': 18*1.5}
        page.locator('.map').hover(position=spot)
        said, value = page.inner_text('output.patched'), float(film.patches.recovery[0, 11, 1])
        assert said.startswith('head 1, step 11 ') and abs(float(said.split('recovery ')[1]) - value) <= .006*abs(value)
        page.locator('.map').click(position=spot)
        at_step(page, 11)
        page.locator('.b', has_text='head 1').wait_for()
        assert painted(page, film, 1, 11, 1) and seen.errors == []
        page.locator('.tk span').nth(2).click()
        at_step(page, 2)


@pytest.mark.parametrize('width', [1100, 600, 380])
def test_it_fits_the_page(browser, address, width):
    with watched_page(browser, viewport={'width': width, 'height': 900}) as (page, seen):
        opened(page, address)
        page.locator('.film summary').click()
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        assert not [r for r in page.evaluate(CONTRAST) if r[0] < 4.5] and seen.errors == []


def test_a_long_film_of_many_heads_stays_small_on_the_page(browser, tmp_path):
    L, T, H, R, C = 1, 512, 64, 16, 16
    g, one = torch.Generator().manual_seed(0), torch.ones(L, H)
    rand = lambda *shape: torch.rand(*shape, generator=g)
    film = StateFilm('random', tuple(f' {t}' for t in range(T)), (0,), tuple(map(str, range(H))), (64, 128), 'mean', (),
                     (2*rand(L, T, H, R, C) - 1).half(), one, one, rand(L, T, H, R).half(), rand(L, T, H, C).half(), one,
                     rand(L, T, H), rand(L, T, H), rand(L, T, H, 1).expand(-1, -1, -1, 3), one[..., None].expand(-1, -1, 3))
    path = film.to_html(tmp_path/'big.html', step=400)
    with watched_page(browser) as (page, seen):
        opened(page, path.as_uri())
        page.locator('.speed').select_option('1000')
        n = frames(page)
        page.locator('.film button').click()
        page.locator('.film button', has_text='Play').wait_for()
        assert frames(page) - n in (111, 112) and page.locator('.film').get_attribute('data-step') == '511'
        assert page.locator('.film *').count() < 700 and seen.errors == []          # most of them tokens


CELLS = ["""from circuitbench.film import StateInspector
from circuitbench.load import load_model
look = StateInspector(load_model('mock://mamba2-tiny'), list(range(5, 25)), step=3)
look""", "look.step = 7"]


@pytest.mark.slow
def test_it_is_live_in_jupyterlab(browser, tmp_path):
    with jupyter_lab(tmp_path) as lab, notebook_page(browser, lab, CELLS) as (page, seen):
        at_step(page, 7)                                               # set from the second cell
        page.locator('.film').focus()
        page.keyboard.press('ArrowRight'), page.keyboard.press('ArrowDown')
        at_step(page, 8)
        page.locator('.b', has_text='head 1').wait_for()
        page.locator('.jp-CodeCell .cm-content').last.click()
        page.keyboard.press('Control+A')
        page.keyboard.type('print(look)')
        page.keyboard.press('Shift+Enter')
        page.locator('.jp-OutputArea-output', has_text='StateInspector(layer 0 · step 8 · head 1 of').last.wait_for()
        for theme in ('JupyterLab Dark', 'JupyterLab Light'):
            set_theme(page, theme)
            page.wait_for_function("""dark => { const g = document.querySelector('.film .one').getContext('2d');
                const [r, b] = [0, 2].map(k => [...g.getImageData(0, 0, 400, 400).data].filter((_, i) => i % 4 == k).reduce((s, x) => s + x));
                return dark == (getComputedStyle(document.querySelector('.film')).backgroundColor == 'rgb(22, 25, 30)') && r + b > 0 }""", arg='Dark' in theme)
        assert page.locator('.still').count() == 1 and not page.locator('.still').is_visible() and seen.errors == []
