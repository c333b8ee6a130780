"""HookInspector in a real browser: as a file, and live in JupyterLab."""
import pytest
from browser import chromium, jupyter_lab, notebook_page, watched_page

from circuitbench.load import load_model


@pytest.fixture(scope='module')
def browser():
    with chromium() as b: yield b


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('site', ['ssm.state', 'ssm.out_proj_in', 'ssm.dt', 'embed', 'logits'])
def test_a_file_shows_the_site(browser, tmp_path, scheme, site):
    path = load_model('mock://mamba2-tiny').inspect('Paris is', site=site).to_html(tmp_path/'look.html')
    with watched_page(browser, color_scheme=scheme) as (page, seen):
        page.goto(path.as_uri())
        assert page.locator('.tk span').count() == 8 and page.locator('svg').count() >= 1
        assert site in page.inner_text('body')
        assert not seen.errors and [r for r in seen.requests if not r.startswith('file:')] == []


@pytest.mark.slow
def test_a_slider_moves_the_state_in_jupyterlab(browser, tmp_path):
    code = "from circuitbench.load import load_model\nload_model('mock://mamba2-tiny').inspect('Paris is', site='ssm.state', position=3)"
    with jupyter_lab(tmp_path) as lab, notebook_page(browser, lab, [code]) as (page, seen):
        picture = page.locator('.cbv-live figcaption')
        picture.filter(has_text="after token '3 ").wait_for()
        page.locator('.noUi-handle[aria-valuenow="3.0"]').first.press('ArrowRight')
        picture.filter(has_text="after token '4 ").wait_for()
        assert not seen.errors
