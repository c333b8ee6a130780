"""The browser of latents, as an exported page and live in JupyterLab, and the page of a whole SAE."""
import re

import pytest
import torch
from browser import CONTRAST, chromium, faults, jupyter_lab, notebook_page, watched_page

from circuitbench.dashboard import dashboard
from circuitbench.latent import SAEInspector, latent_order
from circuitbench.load import load_model
from circuitbench.report import LatentReport, Ranked, window_start
from circuitbench.train import train_sae

DRAWN = "performance.getEntriesByName('drawn')[0].startTime"


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
        value = float(marked.get_attribute('title').split(' = ')[1])
        assert value == pytest.approx(float(shown.report.peak[first, 0]), rel=.01)
        assert seen.errors == []


# -- the page of a whole SAE ---------------------------------------------------------
N, TOP, PARTS, EACH, WINDOW = 2048, 20, 5, 4, 32


@pytest.fixture(scope='module')
def large():
    "A report on 2,048 latents with 40 contexts of 32 tokens each, of random numbers."
    g = torch.Generator().manual_seed(0)
    rand, whole = (lambda *s: torch.rand(*s, generator=g)), (lambda n, *s: torch.randint(n, s, generator=g))
    rows, pos = 200, 256
    text, peak = whole(3000, rows, pos).int(), 9*rand(N, TOP).sort(1, descending=True).values
    at = whole(rows*pos, N, TOP + PARTS*EACH)
    acts = rand(N, TOP + PARTS*EACH, WINDOW)*(rand(N, TOP + PARTS*EACH, WINDOW) > .8)
    spot = (at - window_start(at, pos, WINDOW))[..., None]
    high = torch.cat([peak, peak[:, :1]*rand(N, PARTS*EACH)], 1)[..., None]
    acts = (acts*high).scatter(2, spot, high)
    ranked = lambda n, k: Ranked(whole(n, N, k), rand(N, k).sort(1, descending=True).values)
    frequency = rand(N)**4/10
    frequency[::100] = 0
    words = {i: f' w{i}' for i in range(3000)} | {7: '\n', 8: ' </script><b>', 9: ' "quoted" & sharp', 10: ' ¬ünï'}
    return LatentReport(
        'a model', 'blocks.3.ssm.out_proj_in', text, WINDOW, frequency, rand(N), peak, at[:, :TOP].int(), acts[:, :TOP],
        whole(500, N, 32).float(), peak[:, 0]/32, ranked(3000, 10), ranked(3000, 10), words, rows*pos, rand(N, PARTS + 1),
        at[:, TOP:].view(N, PARTS, EACH).int(), acts[:, TOP:].view(N, PARTS, EACH, WINDOW), at[:, :5].int(),
        ranked(N, 8), ranked(N, 8), tuple(f'head {h}' for h in range(8)), rand(N, 8) - .5, ('kl', 'stream', 'raised'),
        rand(N, 3, 33), {5: 'words of the sea', 6: '<i>not a tag</i>'}, {5: (.9, .5)})


@pytest.fixture(scope='module')
def whole_page(large, tmp_path_factory): return dashboard(large, tmp_path_factory.mktemp('page')/'all.html')


def drawn(page, address):
    page.goto(address)
    page.locator('.dash[data-ready]').wait_for()


def test_thousands_of_latents_open_and_only_those_in_sight_are_drawn(browser, whole_page, large):
    assert whole_page.stat().st_size < 15e6
    with watched_page(browser, viewport={'width': 1280, 'height': 900}) as (page, seen):
        drawn(page, whole_page.as_uri())
        order = latent_order(large)
        assert page.locator('.dash').get_attribute('data-ready') == str(len(order)) == '2027'
        assert page.locator('.row').count() < 40 and page.locator('#dash *').count() < 2500
        assert page.inner_text('h3') == f'Latent {order[0]}' and page.locator('.row b').first.inner_text() == str(order[0])
        page.locator('.list').evaluate('e => { e.scrollTop = e.scrollHeight }')
        page.wait_for_function("j => [...document.querySelectorAll('.row b')].at(-1).textContent == j", arg=str(order[-1]))
        assert page.locator('.row').count() < 40
        print(f'{whole_page.stat().st_size/1e6:.1f} MB, drawn after {page.evaluate(DRAWN):.0f} ms')
        assert seen.errors == [] and seen.requests == [whole_page.as_uri()]


@pytest.mark.parametrize('theme', ['light', 'dark'])
def test_a_page_of_latents_can_be_read_by_all(browser, whole_page, theme):
    with watched_page(browser, color_scheme=theme, viewport={'width': 1280, 'height': 900}, bypass_csp=True) as (page, _):
        drawn(page, whole_page.as_uri())
        assert page.locator('article svg').count() > 2 and faults(page, grave=True) == []


def test_search_narrows_the_list_and_a_click_shows_a_latent(browser, whole_page, large):
    with watched_page(browser, viewport={'width': 1280, 'height': 900}) as (page, seen):
        drawn(page, whole_page.as_uri())
        for sort in ('most frequent', 'rarest', 'strongest', 'number', 'best told by its label'):
            page.locator('select').select_option(sort)
            for text in ('w2999', 'W12', 'the sea', '17', ''):
                page.locator('input[type=search]').fill(text)
                want = latent_order(large, sort, text)
                assert page.locator('.row b').all_inner_texts()[:8] == [str(j) for j in want[:8]], (sort, text)
                said = f'{len(want):,} of 2,027' if text else '2,027 latents'
                assert page.inner_text('.count') == said
        page.locator('input[type=search]').fill('no such thing')
        assert page.locator('.row').count() == 0 and page.inner_text('.count') == '0 of 2,027'
        page.locator('input[type=search]').fill('the sea')
        page.locator('.row').first.click()
        assert page.inner_text('h3') == 'Latent 5' and page.inner_text('.label') == 'words of the sea'
        assert page.locator('.row[aria-selected=true] b').inner_text() == '5' and page.url.endswith('#latent=5')
        assert 'by the label in 90% of cases, by the label of another in 50%' in page.inner_text('article')
        assert seen.errors == []


def test_a_latent_is_shown_as_the_report_has_it(browser, whole_page, large):
    with watched_page(browser, viewport={'width': 1280, 'height': 900}) as (page, seen):
        drawn(page, whole_page.as_uri() + '#latent=6')
        assert page.inner_text('h3') == 'Latent 6' and page.inner_text('.label') == '<i>not a tag</i>'
        assert page.locator('article .tk').count() == 6 + 5*2
        page.get_by_role('button', name='Show all').click()
        assert page.locator('article .tk').count() == 20 + 5*2
        shown = lambda s: s.replace('\n', '⏎')
        contexts = large.top(6) + [c for part in reversed(large.drawn(6)) for c in part[:2]]
        for strip, c in zip(page.locator('article .tk').all(), contexts):
            tokens = strip.locator('span')
            assert [t.strip() for t in tokens.all_inner_texts()] == [shown(t).strip() for t in c.tokens]
            said = [tokens.nth(k).get_attribute('data-t').rsplit(': ')[-1] for k in (0, c.at, 31)]
            for text, k in zip(said, (0, c.at, 31)):
                value = 0. if text == 'does not fire' else float(text)
                assert value == pytest.approx(c.acts[k], abs=float(large.peak[6, 0])/250, rel=6e-3)
            assert strip.locator('.mk').count() == 1 and tokens.nth(c.at).get_attribute('class') == 'mk'
        text = page.inner_text('article')
        for words in ('Drawn at random, by activation', 'Tokens that it raises', 'What writes it', 'head 7',
                      'KL of the next token, nats', 'Closest in direction', 'On the same tokens'): assert words in text
        raised = page.locator('.bars').first.locator('span:nth-child(3n+1)').all_inner_texts()
        assert [t.replace('·', ' ').replace('⏎', '\n') for t in raised] == large.raised(6)
        near = [int(b) for b in page.locator('.near').first.locator('b').all_inner_texts()]
        assert near == large.near.index[6].tolist()
        page.locator('.near button').first.click()
        assert page.inner_text('h3') == f'Latent {near[0]}'
        page.goto(whole_page.as_uri() + '#latent=100')
        page.get_by_text('Fires on none of').wait_for()                           # a latent that never fires
        assert seen.errors == []


def test_the_page_by_keyboard(browser, whole_page, large):
    with watched_page(browser, viewport={'width': 1280, 'height': 900}) as (page, seen):
        drawn(page, whole_page.as_uri())
        order = latent_order(large)
        page.locator('.list').focus()
        for key, k in (('ArrowDown', 1), ('ArrowDown', 2), ('PageDown', 12), ('ArrowUp', 11), ('Home', 0), ('End', 2026), ('ArrowDown', 2026)):
            page.keyboard.press(key)
            assert page.inner_text('h3') == f'Latent {order[k]}'
            assert page.locator('.list').get_attribute('aria-activedescendant') == f'latent-{order[k]}'
            assert page.locator(f'#latent-{order[k]}').is_visible()
        page.locator('input[type=search]').fill(str(order[40]))
        page.keyboard.press('Enter')
        assert page.inner_text('h3') == f'Latent {latent_order(large, search=str(order[40]))[0]}'
        tokens = page.locator('article .tk').first.locator('span')
        tokens.first.focus()
        page.keyboard.press('ArrowRight')
        assert page.evaluate('document.activeElement.dataset.t') == tokens.nth(1).get_attribute('data-t') == page.inner_text('.dash > output')
        assert seen.errors == []


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [1280, 800, 480])
def test_the_page_reads_in_both_themes_and_widths(browser, whole_page, scheme, width):
    with watched_page(browser, color_scheme=scheme, viewport={'width': width, 'height': 900}) as (page, seen):
        drawn(page, whole_page.as_uri())
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        ratios = page.evaluate(CONTRAST)
        assert len(ratios) > 500 and not [r for r in ratios if r[0] < 4.5]
        page.locator('.row').nth(2).click()
        if width < 820:
            page.wait_for_function("() => document.querySelector('h3').getBoundingClientRect().top < 40")
            page.get_by_role('button', name='List').click()
        page.locator('#theme').click()
        assert not [r for r in page.evaluate(CONTRAST) if r[0] < 4.5] and seen.errors == []


def test_without_a_script_it_says_so(browser, whole_page):
    with watched_page(browser, java_script_enabled=False) as (page, _):
        page.goto(whole_page.as_uri())
        assert 'allow scripts' in page.inner_text('#dash') and 'How often they fire' in page.inner_text('main')


def test_a_damaged_page_says_so(browser, whole_page, tmp_path):
    broken = re.sub(r'(id="dash-data">)[^<]{40}', r'\1', whole_page.read_text(encoding='utf-8'))
    (tmp_path/'a.html').write_text(broken, encoding='utf-8')
    with watched_page(browser) as (page, seen):
        page.goto((tmp_path/'a.html').as_uri())
        page.get_by_text('cannot be drawn here').wait_for()
        assert seen.errors


@pytest.mark.slow
def test_search_and_order_live_in_jupyterlab(browser, tmp_path):
    training = 'layer=1, k=8, expansion=4, tokens=1000, batch_size=100, progress=False'
    cells = ['import torch\nfrom circuitbench.load import load_model\nfrom circuitbench.train import train_sae\n'
             'from circuitbench.latent import SAEInspector\n'
             f"torch.set_num_threads(1)\nmodel = load_model('mock://mamba2-tiny')\nsae = train_sae(model, {training})",
             'shown = SAEInspector(sae.report(model, tokens=1000), model=model, sae=sae)\nshown']
    with jupyter_lab(tmp_path) as lab, notebook_page(browser, lab, cells) as (page, seen):
        page.get_by_text('Where it is highest').first.wait_for()
        sort, latent, show = (page.locator('.jp-OutputArea select').nth(i) for i in (0, 1, 2))
        offered = lambda: latent.evaluate('e => e.options[0].text + e.options[1].text')
        before = offered()
        sort.select_option('strongest')
        page.wait_for_function('([e, old]) => e.options[0].text + e.options[1].text != old',
                               arg=[latent.element_handle(), before])
        number = latent.evaluate('e => e.options[3].text').split(':')[0]
        latent.select_option(index=3)
        page.get_by_text(f'Latent {number} of').first.wait_for()
        for part, words in (('random, by activation', 'contexts drawn at random'), ('neighbours', 'Closest in direction'),
                            ('what writes it', 'At each peak'), ('effect over steps', 'its effect over the next steps'),
                            ('highest', 'Where it is highest')):
            show.select_option(part)
            page.get_by_text(words).first.wait_for()
        search = page.locator('.jp-OutputArea input[type=text]').first
        search.fill('no such token')
        search.press('Enter')
        page.get_by_text('No latent matches.').first.wait_for()
        search.fill('')
        search.press('Enter')
        page.get_by_text('Where it is highest').first.wait_for()
        assert seen.errors == []
