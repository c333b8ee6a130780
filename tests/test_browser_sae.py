"""The browser of latents, as an exported page and live in JupyterLab."""
import pytest
from browser import CONTRAST, chromium, jupyter_lab, notebook_page, watched_page

from circuitbench.latent import SAEInspector, latent_order
from circuitbench.load import load_model
from circuitbench.train import train_sae


@pytest.fixture(scope='module')
def browser():
    with chromium() as b: yield b


@pytest.fixture(scope='module')
def shown():
    model = load_model('mock://mamba2-tiny')
    sae = train_sae(model, layer=1, k=8, expansion=4, tokens=4000, batch_size=128, context=64, progress=False)
    return SAEInspector(sae.report(model, tokens=2000))


@pytest.fixture(scope='module')
def exported(shown, tmp_path_factory):
    shown.set(sort='strongest')
    return shown.to_html(tmp_path_factory.mktemp('page')/'latents.html', latents=6).as_uri()


@pytest.mark.parametrize('scheme, width', [('light', 1100), ('dark', 1100), ('light', 400)])
def test_exported_page_reads_in_both_themes_and_widths(browser, exported, scheme, width):
    with watched_page(browser, color_scheme=scheme, viewport={'width': width, 'height': 900}) as (page, seen):
        page.goto(exported)
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        ratios = page.evaluate(CONTRAST)
        assert len(ratios) > 500 and not [r for r in ratios if r[0] < 4.5]
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        assert seen.errors == [] and seen.requests == [exported]


def test_latents_unfold_and_tokens_read_out_by_keyboard(browser, exported, shown):
    with watched_page(browser, viewport={'width': 1100, 'height': 900}) as (page, seen):
        page.goto(exported)
        first = latent_order(shown.report, 'strongest')[0]
        fold = page.locator('details:has(> summary)', has_text=f'Latent {first} of').last
        fold.locator('> summary').focus()
        page.keyboard.press('Enter')
        assert fold.evaluate('d => d.open') and fold.get_by_text('Where it is highest').is_visible()
        tokens = fold.locator('.tk').first.locator('span')
        tokens.first.focus()
        page.keyboard.press('ArrowRight')
        said = fold.locator('output').first.inner_text()
        assert said.startswith('1: ') and ' = ' in said
        marked = fold.locator('.tk').first.locator('.mk')
        assert marked.count() == 1
        value = float(marked.get_attribute('data-t').split(' = ')[1])
        assert value == pytest.approx(float(shown.report.peak[first, 0]), rel=.01)
        assert seen.errors == []


@pytest.mark.slow
def test_search_and_order_live_in_jupyterlab(browser, tmp_path):
    training = 'layer=1, k=8, expansion=4, tokens=1000, batch_size=100, progress=False'
    cells = ['import torch\nfrom circuitbench.load import load_model\nfrom circuitbench.train import train_sae\n'
             f"torch.set_num_threads(1)\nmodel = load_model('mock://mamba2-tiny')\nsae = train_sae(model, {training})",
             'shown = sae.inspect(model, tokens=1000)\nshown']
    with jupyter_lab(tmp_path) as lab, notebook_page(browser, lab, cells) as (page, seen):
        page.get_by_text('Where it is highest').first.wait_for()
        sort, latent = (page.locator('.jp-OutputArea select').nth(i) for i in (0, 1))
        offered = lambda: latent.evaluate('e => e.options[0].text + e.options[1].text')
        before = offered()
        sort.select_option('strongest')
        page.wait_for_function('([e, old]) => e.options[0].text + e.options[1].text != old',
                               arg=[latent.element_handle(), before])
        number = latent.evaluate('e => e.options[3].text').split(':')[0]
        latent.select_option(index=3)
        page.get_by_text(f'Latent {number} of').first.wait_for()
        search = page.locator('.jp-OutputArea input[type=text]').first
        search.fill('no such token')
        search.press('Enter')
        page.get_by_text('No latent matches.').first.wait_for()
        search.fill('')
        search.press('Enter')
        page.get_by_text('Where it is highest').first.wait_for()
        assert seen.errors == []
