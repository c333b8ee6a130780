"""The report of a prompt in a real browser: nothing asked of the network, no errors, no serious fault that axe-core finds."""
import pytest
from browser import chromium, faults, watched_page

from circuitbench import cli

PROMPT = ['--prompt', 'Question: what is the capital of France? Answer:', '--target', ' Paris']


@pytest.mark.slow
@pytest.mark.parametrize('model', ['tiny://mamba2', 'tiny://hybrid', 'tiny://rwkv7', 'tiny://transformer'])
def test_a_report_can_be_read_by_all(model, tmp_path):
    out = tmp_path/'r.html'
    assert cli.main(['report', model, *PROMPT, '--out', str(out)]) == 0
    found = []
    with chromium() as browser:
        for theme in ('light', 'dark'):
            with watched_page(browser, color_scheme=theme, viewport=dict(width=1200, height=900), bypass_csp=True) as (page, seen):
                page.goto(out.as_uri())
                found += [(theme, *v) for v in faults(page, grave=True)]
                assert not [r for r in seen.requests if not r.startswith(('file:', 'data:', 'blob:'))]
                assert page.evaluate('document.documentElement.scrollWidth <= window.innerWidth')
    assert not found, '\n'.join(map(str, found[:20]))
