"""The picture of a circuit in a real browser: as a file without a kernel, and live in JupyterLab."""
import json
import random

import pytest
from browser import CONTRAST, chromium, jupyter_lab, notebook_page, set_theme, watched_page

from circuitbench.board import CircuitInspector, board_data, board_view

NOTE = '<p>Moves the <b>answer</b>.</p>'


def circuit(blocks=3, heads=4, seed=0, kept=100, lags=False, ablation='patch', method='eap'):
    "A hybrid of two branches and an MLP with random scores, large between nodes that matter."
    pick, nodes, edges = random.Random(seed), [], []
    def node(name, kind, block, branch='', port='', of=(), lag=None, reads=None, writes=None): nodes.append(dict(id=name, kind=kind, block=block, branch=branch, port=port, of=list(of), lag=lag, reads=reads, writes=writes))
    node('embed', 'embed', -1, writes=0)
    for i in range(blocks):
        for h in range(heads):
            for lag in (range(3) if lags else [None]): node(f'{i}.ssm.x[{h}]' + ('' if lag is None else f'@{lag}'), 'port', i, 'ssm', 'x', [h], lag, reads=2*i)
            node(f'{i}.ssm.gate[{h}]', 'port', i, 'ssm', 'gate', [h], reads=2*i)
        node(f'{i}.ssm.B[0]', 'port', i, 'ssm', 'B', range(heads), reads=2*i)
        for h in range(heads): node(f'{i}.ssm[{h}]', 'head', i, 'ssm', of=[h], writes=2*i + 1)
        for p in 'qkv': node(f'{i}.attn.{p}[0]', 'port', i, 'attn', p, [0], reads=2*i)
        node(f'{i}.attn[0]', 'head', i, 'attn', of=[0], writes=2*i + 1)
        node(f'{i}.mlp', 'whole', i, 'mlp', reads=2*i + 1, writes=2*i + 2)
    node('logits', 'logits', blocks, reads=2*blocks)
    worth = {}
    weight = lambda n: worth.setdefault((n['block'], n['branch'], *n['of'][:1]), pick.lognormvariate(0, 1.3)*(3 if n['block'] < 0 or n['block'] == blocks else 1))
    for k, b in enumerate(nodes):
        for a in nodes[:k]:
            stream = a['writes'] is not None and b['reads'] is not None and a['writes'] <= b['reads']
            inside = a['kind'] == 'port' and b['kind'] == 'head' and (a['block'], a['branch']) == (b['block'], b['branch']) and b['of'][0] in a['of']
            if stream or inside: edges.append(dict(source=a['id'], target=b['id'], score=weight(a)*weight(b)*pick.gauss(.5, 1)))
    for n in nodes: n['score'] = sum(e['score'] for e in edges if n['id'] in (e['source'], e['target']))
    on = set(pruned(edges, ranked(edges)[:kept])) if ablation == 'patch' else set(ranked(edges)[:kept])
    for i, e in enumerate(edges): e['kept'] = i in on
    said = dict(model='by hand', prompts=['Paris is the capital of'], counterfactuals=['Rome is the capital of'], answers=[' France'], wrong=[' Italy'],
                metric='logit_diff', method=method, ablation=ablation, clean=3., corrupt=-2., curve=[[.05, .2], [.2, .7], [.6, .95], [1., 1.]])
    return dict(format='circuitbench.circuit', version=2, directed=True, multigraph=False, graph=said, nodes=nodes, edges=edges)


def ranked(edges): return sorted(range(len(edges)), key=lambda i: -abs(edges[i]['score']))


def pruned(edges, some):
    "Those of some edges that lie on a way from the embedding to the logits."
    def reach(start, a, b):
        here = {start}
        while True:
            more = {edges[i][b] for i in some if edges[i][a] in here} - here
            if not more: return here
            here |= more
    down, up = reach('embed', 'source', 'target'), reach('logits', 'target', 'source')
    return [i for i in some if edges[i]['source'] in down and edges[i]['target'] in up]


BODY, OTHER = circuit(), circuit(seed=1, method='exact')
N = len(BODY['edges'])


@pytest.fixture(scope='module')
def browser():
    with chromium() as b: yield b


@pytest.fixture(scope='module')
def address(tmp_path_factory):
    return CircuitInspector(BODY, details={'1.ssm[2]': NOTE}).to_html(tmp_path_factory.mktemp('board')/'a.html').as_uri()


@pytest.fixture(scope='module')
def compared(tmp_path_factory):
    return CircuitInspector(BODY, compare=OTHER).to_html(tmp_path_factory.mktemp('board')/'two.html').as_uri()


def opened(page, address):
    page.goto(address)
    page.locator('.board[data-frames]').wait_for()


def settled(page, act):
    "Does something and waits for the next picture."
    n = page.locator('.board').get_attribute('data-frames')
    act()
    page.wait_for_function('n => document.querySelector(".board").dataset.frames > +n', arg=n)


def put(page, n): settled(page, lambda: page.locator('.count').evaluate("(e, n) => { e.value = n; e.dispatchEvent(new Event('input')) }", n))
def drawn(page): return int(page.locator('.board').get_attribute('data-edges'))
def nodes(page): return page.locator('.node:not(.off)').evaluate_all("a => a.map(e => e.getAttribute('aria-label').split(',')[0])")
def node(page, name): return page.locator(f'.node[aria-label^="{name},"]')


def saved(page, kind):
    with page.expect_download() as d: page.locator(f'[data-save={kind}]').click()
    return d.value.path().read_bytes()


def lit(page, canvas='.edges'):
    "How many points of the drawing are painted."
    return page.locator(canvas).evaluate("c => c.getContext('2d').getImageData(0, 0, c.width, c.height).data.filter((v, i) => i % 4 == 3 && v).length")


@pytest.mark.parametrize('scheme, width', [('light', 1300), ('dark', 1300), ('light', 400), ('dark', 400), ('light', 800)])
def test_it_reads_in_both_themes_and_widths(browser, address, compared, scheme, width):
    for url in (address, compared):
        with watched_page(browser, color_scheme=scheme, viewport={'width': width, 'height': 900}) as (page, seen):
            opened(page, url)
            node(page, '1.ssm[2]').click()
            page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
            page.locator('.rows tr').nth(5).wait_for()
            ratios = page.evaluate(CONTRAST)
            assert len(ratios) > 60 and not [r for r in ratios if r[0] < 4.5]
            assert page.evaluate('document.documentElement.scrollWidth') <= width
            assert lit(page) > 2000 and seen.errors == [] and seen.requests == [url]
            boxes = page.locator('.node').evaluate_all('a => a.map(e => e.getBoundingClientRect()).map(r => [r.left, r.top, r.right, r.bottom])')
            assert len(boxes) > 20 and min(b[0] for b in boxes) >= 0 and max(b[2] for b in boxes) <= width
            for i, (l, t, r, b) in enumerate(boxes):
                assert all(r <= k[0] or k[2] <= l or b <= k[1] or k[3] <= t for k in boxes[:i])        # no node over another


def test_the_slider_takes_the_largest_and_moves_the_marker(browser, address):
    with watched_page(browser, viewport={'width': 1300, 'height': 900}) as (page, seen):
        opened(page, address)
        first = drawn(page)
        assert first == sum(e['kept'] for e in BODY['edges'])
        here = lambda: float(page.locator('path.here').get_attribute('data-n'))
        for n in (5, 80, 250, N):
            put(page, n)
            order = ranked(BODY['edges'])[:n]
            want = pruned(BODY['edges'], order) or order
            assert drawn(page) == len(want) and here() == n
            assert set(nodes(page)) >= {'logits'} or n == 5
        low = "() => { const c = document.querySelector('.edges'); return c.getContext('2d').getImageData(0, c.height - 60, c.width, 20).data.some(v => v) }"
        page.wait_for_function(low)                                    # out of sight while it moves, painted soon after
        before = here()
        page.locator('.n').focus()
        settled(page, lambda: page.keyboard.press('Home'))
        assert here() == 1 < before
        put(page, round(.2*N))
        assert page.inner_text('.faith') == '0.70' and '≈' not in page.inner_text('.kept')              # a measured size
        put(page, round((round(.2*N)*round(.6*N))**.5))
        assert page.inner_text('.faith') in ('0.82', '0.83') and '≈' in page.inner_text('.kept')        # half way between two
        put(page, 3)
        assert 'not measured' in page.inner_text('.kept')
        settled(page, lambda: page.locator('.given').click())
        assert drawn(page) == first and seen.errors == []


def test_a_click_shows_the_edges_and_the_detail(browser, address):
    with watched_page(browser, viewport={'width': 1300, 'height': 900}) as (page, seen):
        opened(page, address)
        assert page.locator('.side h4').inner_text() == 'Strongest parts'
        put(page, N)
        node(page, '1.ssm[2]').click()
        assert page.locator('.side h3').inner_text() == '1.ssm[2]' and page.locator('.side .told').inner_html() == NOTE
        into = [e for e in BODY['edges'] if e['target'] in ('1.ssm[2]', '1.ssm.x[2]', '1.ssm.gate[2]')]
        out = [e for e in BODY['edges'] if e['source'] == '1.ssm[2]']
        assert page.locator('.side h4').all_inner_texts() == [f'Edges in: {len(into)}', f'Edges out: {len(out)}']
        best = max(into, key=lambda e: abs(e['score']))
        row = page.locator('.side .list').first.locator('button').first
        assert row.get_attribute('title') == f"{best['source']} → {best['target']}"
        assert float(row.locator('b').inner_text().replace('−', '-')) == pytest.approx(best['score'], rel=.01)
        assert lit(page, '.over') > 200 and float(page.locator('.edges').evaluate('e => getComputedStyle(e).opacity')) < .3
        page.keyboard.press('Escape')
        assert lit(page, '.over') == 0 and page.locator('.side h3').count() == 0 and seen.errors == []


def test_keys_walk_the_nodes_by_score(browser, address):
    with watched_page(browser, viewport={'width': 1300, 'height': 900}) as (page, seen):
        opened(page, address)
        scores = {n['id']: abs(n['score']) for n in BODY['nodes']}
        order = nodes(page)
        assert order == sorted(order, key=lambda n: -scores[n]) and len(order) > 8
        page.locator('.node').first.focus()
        page.keyboard.press('Tab')
        at = page.evaluate("document.activeElement.getAttribute('aria-label')")
        assert at.split(',')[0] == order[1] and page.inner_text('.tip') == at
        page.keyboard.press('Enter')
        assert page.locator('.side h3').inner_text() == order[1] and page.locator('.node[aria-pressed=true]').count() == 1
        page.locator('.side .pin').focus()
        settled(page, lambda: page.keyboard.press('Enter'))
        assert page.evaluate('document.activeElement.textContent') == 'Unpin' and seen.errors == []     # the focus stays


def test_hiding_and_pinning(browser, address):
    with watched_page(browser, viewport={'width': 1300, 'height': 900}) as (page, seen):
        opened(page, address)
        put(page, 100)
        name = next(n for n in nodes(page) if '.ssm[' in n)
        node(page, name).click()
        settled(page, lambda: page.locator('.side .hide').click())
        own = [n['id'] for n in BODY['nodes'] if n['id'] == name or n['kind'] == 'port' and n['of'] == [int(name[-2])] and n['id'].startswith(name[:5])]
        keep = [i for i in ranked(BODY['edges'])[:100] if not {BODY['edges'][i]['source'], BODY['edges'][i]['target']} & {*own}]
        assert drawn(page) == len(pruned(BODY['edges'], keep)) and node(page, name).count() == 0
        settled(page, lambda: page.locator('.chips button', has_text=f'hidden {name}').click())
        assert drawn(page) == len(pruned(BODY['edges'], ranked(BODY['edges'])[:100]))
        settled(page, lambda: page.locator('.only').check())
        put(page, 12)
        there = set(nodes(page))
        off = next(n['id'] for n in BODY['nodes'] if n['kind'] == 'head' and n['id'] not in there)
        assert node(page, off).count() == 0
        put(page, N)
        node(page, off).click()
        settled(page, lambda: page.locator('.side .pin').click())
        put(page, 12)
        assert node(page, off).count() == 1 and page.locator('.node.held').count() == 1 and seen.errors == []


def test_filters_and_branches(browser, address):
    with watched_page(browser, viewport={'width': 1300, 'height': 900}) as (page, seen):
        opened(page, address)
        put(page, N)
        settled(page, lambda: page.locator('.find').fill('1.MLP, 0.attn.k'))
        touch = [e for e in BODY['edges'] if any(w in e[k] for w in ('1.mlp', '0.attn.k') for k in ('source', 'target'))]
        assert drawn(page) == len(touch)
        settled(page, lambda: page.locator('.find').fill(''))
        settled(page, lambda: page.locator('[data-branch=ssm]').uncheck())
        left = [i for i, e in enumerate(BODY['edges']) if '.ssm' not in e['source'] + e['target']]
        assert drawn(page) == len(pruned(BODY['edges'], left)) and not any('.ssm' in n for n in nodes(page)) and seen.errors == []


def test_an_edge_says_its_name(browser, address):
    with watched_page(browser, viewport={'width': 1300, 'height': 900}) as (page, seen):
        opened(page, address)
        put(page, N)
        box, known = page.locator('.scene').bounding_box(), {f"{e['source']} → {e['target']}": e['score'] for e in BODY['edges']}
        said = set()
        page.locator('.scene').scroll_into_view_if_needed()
        box = page.locator('.scene').bounding_box()
        for x in range(80, int(box['width']), 25):
            page.mouse.move(box['x'] + x, box['y'] + 44)
            if page.locator('.tip').is_visible(): said.add(page.inner_text('.tip'))
        assert len(said) > 3
        for text in said:
            name, value = text.rsplit('   ', 1)
            assert float(value.replace('−', '-')) == pytest.approx(known[name], rel=.04)
        assert seen.errors == []


def test_downloads_hold_the_picture(browser, address):
    with watched_page(browser, viewport={'width': 1300, 'height': 900}, accept_downloads=True) as (page, seen):
        opened(page, address)
        put(page, 60)
        svg, png, body = saved(page, 'svg').decode(), saved(page, 'png'), json.loads(saved(page, 'json'))
        assert svg.startswith('<svg') and 20 < svg.count('<path') <= drawn(page) and 'logits' in svg and 'var(' not in svg and 'NaN' not in svg
        assert png[:8] == b'\x89PNG\r\n\x1a\n' and len(png) > 20_000
        kept = {i for i, e in enumerate(body['edges']) if e['kept']}
        assert kept == set(pruned(BODY['edges'], ranked(BODY['edges'])[:60])) and body['graph'] == BODY['graph']
        plain = lambda b: [{k: v for k, v in n.items() if k != 'score'} for n in b['nodes']]
        assert plain(body) == plain(BODY) and {k: v for k, v in body.items() if not isinstance(v, list | dict)} == {k: v for k, v in BODY.items() if not isinstance(v, list | dict)}
        assert [e['score'] for e in body['edges']] == pytest.approx([e['score'] for e in BODY['edges']], rel=1e-6)
        page.goto('about:blank')
        page.set_content(svg)
        assert page.locator('svg text').count() > 20 and seen.errors == []


def test_two_circuits_are_compared(browser, compared):
    a, b = ({i for i, e in enumerate(c['edges']) if e['kept']} for c in (BODY, OTHER))
    with watched_page(browser, viewport={'width': 1300, 'height': 900}, accept_downloads=True) as (page, seen):
        opened(page, compared)
        assert drawn(page) == len(a | b) and 'only eap' in page.inner_text('.lg') and 'only exact' in page.inner_text('.lg')
        page.locator('.rows summary').click()
        page.locator('.rows tr').nth(len(a | b)).wait_for()
        last = page.locator('.rows td:last-child').all_inner_texts()
        assert [last.count(s) for s in ('both', 'eap', 'exact')] == [len(a & b), len(a - b), len(b - a)]
        for value, body, on in (('0', BODY, a), ('1', OTHER, b)):
            settled(page, lambda value=value: page.locator('.which').select_option(value))
            assert drawn(page) == len(on) and 'only eap' not in page.inner_text('.lg')
            assert [e['score'] for e in json.loads(saved(page, 'json'))['edges']] == pytest.approx([e['score'] for e in body['edges']], rel=1e-6)
        assert seen.errors == []


# Moves of the slider, the next one after the picture of the one before: pictures drawn, elements before and after.
MOVES = """async sizes => { const e = document.querySelector('.count'), box = document.querySelector('.board'), first = +box.dataset.frames, before = box.querySelectorAll('*').length
  for (const n of sizes) { const was = box.dataset.frames; e.value = n; e.dispatchEvent(new Event('input'))
    while (box.dataset.frames == was) await new Promise(requestAnimationFrame) }
  return [+box.dataset.frames - first, before, box.querySelectorAll('*').length] }"""


def test_a_move_at_two_thousand_edges_is_one_drawing(browser, tmp_path):
    big = circuit(blocks=8, heads=7, lags=True, kept=100)
    assert len(big['edges']) > 8000
    path = CircuitInspector(big).to_html(tmp_path/'big.html')
    assert path.stat().st_size < 250_000
    with watched_page(browser, viewport={'width': 1300, 'height': 900}) as (page, seen):
        opened(page, path.as_uri())
        settled(page, lambda: page.locator('.count').fill('3300'))
        frames, before, after = page.evaluate(MOVES, [3300 + 25*k for k in range(1, 12)])
        assert 1500 < drawn(page) < 2300 and frames == 11 and seen.errors == []
        assert after - before < 100 and after < 2500                 # edges are strokes, not elements


def test_what_is_no_circuit_is_refused():
    for bad, say in (({}, "without 'nodes'"), ({**BODY, 'edges': []}, 'got 0 edges'), ({**BODY, 'nodes': BODY['nodes'][1:]}, 'without'), ([], 'got list')):
        with pytest.raises(ValueError, match=say): board_data(bad)
    with pytest.raises(ValueError, match='two of one graph'): board_data(BODY, circuit(blocks=2))
    with pytest.raises(ValueError, match='got details of'): board_data(BODY, details={'9.mlp': ''})
    with pytest.raises(ValueError, match='got node'): board_view(BODY, node='9.mlp')
    with pytest.raises(ValueError, match=f'0 to {N} edges'): CircuitInspector(BODY, size=N + 1)
    look = CircuitInspector(BODY)
    with pytest.raises(ValueError): look.node = '9.mlp'
    look.node = '1.ssm[0]'
    assert look.node in repr(look) and json.dumps(look.node)[1:-1] in look.html


# -- by position, and finer nodes --------------------------------------------------------
def at_tokens(body, words, kept=60, seed=0):
    "A circuit by hand by position: each edge matters at two of the last five tokens, those of the logits at the last."
    pick, T, body = random.Random(seed), len(words), {**body, 'graph': {**body['graph'], 'words': words}}
    edges = []
    for e in body['edges']:
        at = {T - 1} if e['target'] == 'logits' else set(pick.sample(range(T - 5, T), 2))
        edges.append({**e, 'scores': [e['score']*pick.random()*(t in at) for t in range(T)]})
    body['edges'] = edges
    on = forward(body, ranked_at(body)[:kept])
    for i, e in enumerate(edges): e |= dict(score=sum(e['scores']), kept_at=[t for j, t in on if j == i], kept=any(j == i for j, _ in on))
    return body


def ranked_at(body):
    "(edge, position) by magnitude."
    T = len(body['edges'][0]['scores'])
    return sorted(((i, t) for i in range(len(body['edges'])) for t in range(T)), key=lambda j: (-abs(body['edges'][j[0]]['scores'][j[1]]), j))


def forward(body, some):
    "Those on a way from the embedding to the logits, where a node's value at a token is heard at it and later ones."
    edges, T, nodes = body['edges'], len(body['edges'][0]['scores']), [n['id'] for n in body['nodes']]
    on = {}
    for i, t in some: on.setdefault((edges[i]['source'], t), []).append((edges[i]['target'], t))
    steps = {(n, t): on.get((n, t), []) + [(n, t + 1)]*(t + 1 < T) for n in nodes for t in range(T)}
    back = {}
    for a, to in steps.items():
        for b in to: back.setdefault(b, []).append(a)
    def reach(start, steps):
        here, left = {*start}, [*start]
        while left:
            for b in steps.get(left.pop(), []):
                if b not in here: here.add(b); left.append(b)
        return here
    down, up = reach([('embed', t) for t in range(T)], steps), reach([('logits', t) for t in range(T)], back)
    return [(i, t) for i, t in some if (edges[i]['source'], t) in down and (edges[i]['target'], t) in up]


def kept_at(body): return {(i, t) for i, e in enumerate(body['edges']) for t in e['kept_at']}


def owner(body):
    "Node -> what it is drawn as: a port of one head is a mark of the head, others are a pill by their name without lag."
    ends, kinds = {}, {n['id']: n['kind'] for n in body['nodes']}
    for e in body['edges']:
        if kinds[e['source']] == 'port': ends.setdefault(e['source'], set()).add(e['target'])
    return {n: n if k != 'port' else min(ends[n]) if len(ends[n]) == 1 else n.partition('@')[0] for n, k in kinds.items()}


def chips(page):
    "(name, position) -> box of what is drawn by position."
    rows = page.locator('.node').evaluate_all("a => a.map(e => [e.getAttribute('aria-label'), e.offsetLeft, e.offsetTop, e.offsetLeft + e.offsetWidth, e.offsetTop + e.offsetHeight])")
    out = {}
    for said, *box in rows:
        name, _, at = said.partition(' at ')
        out[name, int(at.split()[0])] = box
    return out


def by(page, layout): settled(page, lambda: page.locator(f'[data-by={layout}]').click())


@pytest.fixture(scope='module')
def real():
    from circuitbench.circuit import extract_circuit
    from circuitbench.load import load_model
    prompt = ' Question: what is the capital of France? Answer:'
    return extract_circuit(load_model('tiny://mamba2'), prompt, ' Paris', by_position=True, budgets=(.002, .005), progress=False).to_dict()


@pytest.fixture(scope='module')
def real_address(real, tmp_path_factory): return CircuitInspector(real).to_html(tmp_path_factory.mktemp('board')/'real.html').as_uri()


def test_tokens_are_columns_and_layers_rows(browser, real, real_address):
    own, on, words = owner(real), kept_at(real), real['graph']['words']
    block = {n['id']: n['block'] for n in real['nodes']}
    with watched_page(browser, viewport={'width': 1280, 'height': 800}) as (page, seen):
        opened(page, real_address)
        assert page.locator('[data-by][aria-pressed=true]').inner_text() == 'by position' and not page.locator('.few').is_visible()
        assert drawn(page) == len(on) > 50
        there = chips(page)
        want = {(own[real['edges'][i][k]], t) for i, t in on for k in ('source', 'target')}
        assert want <= {*there} and all(name == 'embed' for name, _ in {*there} - want)
        boxes = [*there.values()]
        for i, (l, t, r, b) in enumerate(boxes): assert all(r <= k[0] or k[2] <= l or b <= k[1] or k[3] <= t for k in boxes[:i])
        for (a, s), p in there.items():                                # columns from left to right, layers from below
            for (b, t), q in there.items():
                if s < t: assert p[2] <= q[0]
                if '[' in a and '[' in b and block.get(a, 0) < block.get(b, 0): assert p[1] > q[1]
        live = {t for _, t in there}
        assert page.locator('.word').all_inner_texts() == [w.strip() for t, w in enumerate(words) if t not in live]
        labels = page.locator('.node[aria-label^="embed "]').evaluate_all('a => a.map(e => [e.offsetLeft, e.textContent])')
        assert [s for _, s in sorted(labels)] == [words[t].strip() for t in sorted(live)]
        assert any(len({t for n, t in there if n == name}) > 1 for name, _ in there if name not in ('embed', 'logits'))
        by(page, 'head')
        assert drawn(page) == len({i for i, _ in on}) and page.locator('.few').is_visible() and page.locator('.word').count() == 0
        best = max((n for n in real['nodes'] if n['kind'] == 'head'), key=lambda n: abs(n['score']))['id']
        assert [n for n in nodes(page) if n.endswith(']')][0] == best and page.locator('.side .list').first.inner_text().startswith(best)
        by(page, 'position')
        assert chips(page) == there and drawn(page) == len(on)
        assert seen.errors == [] and seen.requests == [real_address]


def test_the_slider_goes_over_edges_at_tokens(browser, real, real_address):
    with watched_page(browser, viewport={'width': 1280, 'height': 800}, accept_downloads=True) as (page, seen):
        opened(page, real_address)
        order = ranked_at(real)
        assert int(page.locator('.count').get_attribute('max')) == len(order)
        for n in (30, 300, 1500):
            put(page, n)
            want = set(forward(real, order[:n]))
            assert drawn(page) == len(want) and len(want) < n
            body = json.loads(saved(page, 'json'))
            assert kept_at(body) == want and all(e['kept'] == bool(e['kept_at']) for e in body['edges'])
            for e, f in zip(body['edges'], real['edges']): assert e['scores'] == pytest.approx(f['scores'], rel=1e-6) and e['score'] == pytest.approx(f['score'], rel=1e-6)
        share, faithful = real['graph']['curve'][0]
        put(page, round(share*len(order)))
        assert page.inner_text('.faith') == f'{faithful:.2f}' and '≈' not in page.inner_text('.kept')
        by(page, 'head')
        want = forward(real, order[:round(share*len(order))])
        assert drawn(page) == len({i for i, _ in want}) and page.inner_text('.faith') == f'{faithful:.2f}' and seen.errors == []


def test_a_click_on_a_chip_shows_its_edges_there(browser, real, real_address):
    own, on, edges = owner(real), kept_at(real), real['edges']
    last = len(real['graph']['words']) - 1
    name = own[max((e for e in edges if e['target'] == 'logits' and last in e['kept_at']), key=lambda e: abs(e['scores'][last]))['source']]
    with watched_page(browser, viewport={'width': 1280, 'height': 800}) as (page, seen):
        opened(page, real_address)
        page.locator(f'.node[aria-label^="{name} at {last} "]').click()
        assert page.locator('.side h3').inner_text() == name and f'at {last} {json.dumps(real["graph"]["words"][last])}' in page.inner_text('.side .note')
        into = [i for i, e in enumerate(edges) if own[e['target']] == name]
        out = [i for i, e in enumerate(edges) if e['source'] == name]
        said = [f'{title}: {sum((i, last) in on for i in some)} of {len(some)}' for title, some in (('Edges in', into), ('Edges out', out))]
        assert page.locator('.side h4').all_inner_texts() == said
        best = max((i for i in out if (i, last) in on), key=lambda i: abs(edges[i]['scores'][last]))
        row = page.locator('.side .list').nth(1).locator('button').first
        assert row.get_attribute('title').startswith(f"{edges[best]['source']} → {edges[best]['target']} at {last}")
        assert float(row.locator('b').inner_text().replace('−', '-')) == pytest.approx(edges[best]['scores'][last], rel=.01)
        assert page.locator('.node[aria-pressed=true]').count() == 1 and lit(page, '.over') > 200
        settled(page, lambda: page.locator('.side .hide').click())
        left = [(i, t) for i, t in on if name not in (own[edges[i]['source']], own[edges[i]['target']])]
        assert drawn(page) == len(forward(real, left) or left) and not any(n == name for n, _ in chips(page))
        settled(page, lambda: page.locator('.chips button').click())
        settled(page, lambda: page.locator('.find').fill(name))
        want = {(i, t) for i, t in on if name in edges[i]['source'] or name in edges[i]['target']}
        assert drawn(page) == len(want) and seen.errors == []


def test_by_position_in_files(browser, real, real_address):
    with watched_page(browser, viewport={'width': 1280, 'height': 800}, accept_downloads=True) as (page, seen):
        opened(page, real_address)
        svg, png = saved(page, 'svg').decode(), saved(page, 'png')
        own = owner(real)
        inside = sum(own[real['edges'][i]['source']] == own[real['edges'][i]['target']] for i, _ in kept_at(real))
        rails = svg.count('class="rail"')
        assert svg.count('<path') == drawn(page) - inside + rails and rails > 2 and 'NaN' not in svg and 'var(' not in svg
        assert all(w.strip() in svg for w in real['graph']['words']) and len(png) > 20_000 and seen.errors == []


@pytest.mark.parametrize('scheme, width', [('light', 1280), ('dark', 420)])
def test_a_long_prompt_is_narrow_where_nothing_happens(browser, tmp_path, scheme, width):
    words = [f' word{i}' for i in range(100)]
    body, other = at_tokens(circuit(), words), at_tokens(circuit(seed=1, method='exact'), words, seed=1)
    url = CircuitInspector(body, compare=other).to_html(tmp_path/'long.html').as_uri()
    with watched_page(browser, color_scheme=scheme, viewport={'width': width, 'height': 800}) as (page, seen):
        opened(page, url)
        assert drawn(page) == len(kept_at(body) | kept_at(other))
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate('document.documentElement.scrollWidth') <= width
        assert not [r for r in page.evaluate(CONTRAST) if r[0] < 4.5]
        gaps = page.locator('.word').evaluate_all('a => a.map(e => [e.textContent, e.title])')
        assert gaps[0][0] == '0–94' and 'word0 word1' in gaps[0][1]
        there = chips(page)
        assert min(b[0] for b in there.values()) < 200 and {t for _, t in there} <= {*range(95, 100)}
        if width < 500: assert page.evaluate("(e => e.scrollWidth > e.clientWidth)(document.querySelector('.scene'))")
        for value, one in (('0', body), ('1', other)):
            settled(page, lambda value=value: page.locator('.which').select_option(value))
            assert drawn(page) == len(kept_at(one))
        assert lit(page) > 2000 and seen.errors == [] and seen.requests == [url]


def finer():
    "A circuit with what a state carries, a port for all else, latents of the stream and experts."
    nodes = []
    def node(name, kind, branch='', port='', reads=None, writes=None, **more): nodes.append(dict(id=name, kind=kind, block=0, branch=branch, port=port, lag=None, steps=None, latent=None, reads=reads, writes=writes, score=1.) | more)
    node('embed', 'embed', block=-1, writes=0)
    for a in (1, 2): node(f'0.ssm.state[0]@{a}>4', 'port', 'ssm', 'state', reads=0, steps=[a, 4])
    for h in (0, 1): node(f'0.ssm.write[{h}]', 'port', 'ssm', 'write', reads=0)
    node('0.ssm.rest', 'port', 'ssm', 'rest', reads=0)
    for h in (0, 1): node(f'0.ssm[{h}]', 'head', 'ssm', writes=.5)
    for k in (878, 12, None): node(f'0.resid_mid.latent[{"rest" if k is None else k}]', 'latent', 'stream', reads=.5, writes=1, latent=k)
    for k in (0, 3): node(f'0.mlp[{k}]', 'expert', 'mlp', reads=1, writes=2)
    node('logits', 'logits', block=1, reads=2)
    edges = []
    for k, b in enumerate(nodes):
        for a in nodes[:k]:
            stream = a['writes'] is not None and b['reads'] is not None and a['writes'] <= b['reads'] and not (a['writes'] <= .5 <= b['reads'] and b['kind'] != 'latent' and a['kind'] in ('head', 'embed') and b['reads'] > .5)
            inside = a['kind'] == 'port' and b['kind'] == 'head' and (a['port'] == 'rest' or a['id'].partition('@')[0][-2] == b['id'][-2])
            if stream or inside: edges.append(dict(source=a['id'], target=b['id'], score=1. + len(edges)/50, kept=True))
    return dict(format='circuitbench.circuit', version=2, directed=True, multigraph=False, graph=dict(model='by hand', ablation='patch', words=['Paris', ' is', ' the', ' capital', ' of']), nodes=nodes, edges=edges)


@pytest.mark.parametrize('positions', [False, True])
def test_latents_experts_and_carried_steps(browser, tmp_path, positions):
    body = finer()
    if positions:
        for e in body['edges']: e |= dict(scores=[0]*4 + [e['score']], kept_at=[4])
    url = CircuitInspector(body, node='0.ssm.state[0]').to_html(tmp_path/'finer.html').as_uri()
    with watched_page(browser, viewport={'width': 1280, 'height': 900}) as (page, seen):
        opened(page, url)
        assert drawn(page) == len(body['edges']) and page.locator('.side h3').inner_text() == '0.ssm[0]'
        at = page.locator('.node').evaluate_all("a => Object.fromEntries(a.map(e => [e.getAttribute('aria-label').split(/,| at /)[0], [e.offsetTop, e.firstChild.data, getComputedStyle(e).borderTopColor]]))")
        assert [at[f'0.resid_mid.latent[{k}]'][1] for k in (878, 12, 'rest')] == ['878', '12', 'rest'] and [at[f'0.mlp[{k}]'][1] for k in (0, 3)] == ['0', '3']
        rows = [at[n][0] for n in ('logits', '0.mlp[3]', '0.resid_mid.latent[878]', '0.ssm[1]', '0.ssm.rest', 'embed')]
        assert rows == sorted(rows) and len({*rows}) == 6
        assert len({at[n][2] for n in ('0.mlp[3]', '0.resid_mid.latent[878]', '0.ssm[1]')}) == 3
        assert page.locator('[data-branch]').evaluate_all('a => a.map(e => e.dataset.branch)') == ['ssm', 'stream', 'mlp']
        assert 'stream' in page.locator('.label').nth(1).inner_text()
        head = page.locator('.node[aria-label^="0.ssm[0]"]').bounding_box()
        said = []
        for x in range(int(head['width'])):
            page.mouse.move(head['x'] + x, head['y'] + head['height'] + 15)
            if page.locator('.tip').is_visible(): said.append(page.inner_text('.tip'))
        assert [*dict.fromkeys(s for s in said if '→' not in s)] == [
            '0.ssm.state[0]@1>4: carried from step 1 " is" to step 4 " of"', '0.ssm.state[0]@2>4: carried from step 2 " the" to step 4 " of"',
            '0.ssm.write[0]: all other writes', '0.ssm.rest: heard beside the other ports']
        assert page.locator('.side .list').first.locator('span', has_text='state 1>4').count() == 1
        settled(page, lambda: page.locator('[data-branch=stream]').uncheck())
        left = [e for e in body['edges'] if 'latent' not in e['source'] + e['target']]
        assert drawn(page) == len(pruned(left, range(len(left))) or left) and seen.errors == []


def test_a_close_look_at_a_part_of_a_site(browser, tmp_path):
    "Latents and what they leave over: the numbers on each strip sum to the score of the node that was chosen."
    import warnings

    from test_closeup import PAIR, finer

    from circuitbench.circuit import extract_circuit
    from circuitbench.load import load_model
    model = load_model('mock://mamba2-tiny')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')                                    # random weights favour nothing
        found = extract_circuit(model, PAIR, graph=finer('blocks.0.resid_post')(model), method='eap', budgets=(), progress=False)
    look, names = found.inspect(), [n.name for n in found.graph.nodes if n.kind == 'latent']
    for name in names: look.told(name)
    with watched_page(browser, viewport={'width': 1280, 'height': 900}) as (page, seen):
        opened(page, look.to_html(tmp_path/'finer.html').as_uri())
        said = []
        for name in names:
            node(page, name).click()
            page.locator('.side h3', has_text=name).wait_for()
            said.append(page.locator('.told .tk span').evaluate_all("a => a.map(e => +e.title.split(' = ').pop().replace('−', '-'))"))
            assert len(said[-1]) == 9 and sum(said[-1]) == pytest.approx(float(found.nodes[found.graph.index[name]]), rel=.02, abs=2e-4)
        assert len({tuple(v) for v in said}) == len(names) and seen.errors == []


def test_circuits_of_different_positions_are_not_compared():
    body = at_tokens(circuit(), [' a']*8)
    with pytest.raises(ValueError, match='got circuits by 8 and 0 positions'): board_data(body, BODY)
    with pytest.raises(ValueError, match='got circuits by 8 and 9 positions'): board_data(body, at_tokens(circuit(), [' a']*9))
    assert CircuitInspector(body, size=8*N).size == 8*N
    with pytest.raises(ValueError, match=f'0 to {8*N} edges'): CircuitInspector(body, size=8*N + 1)
    assert f'of {8*N:,} edges at positions' in repr(CircuitInspector(body))



CELLS = ["""import json
from circuitbench.board import CircuitInspector, board_view
body = json.load(open('body.json'))
look = CircuitInspector(body, detail=lambda name: f'<p>asked of {name}: {1/(name != "0.mlp")}</p>')
look""", 'look.node = "1.ssm[2]"', """from IPython.display import HTML
HTML('<div id="plain">' + board_view(body) + '</div>')"""]


@pytest.mark.slow
def test_it_is_live_in_jupyterlab(browser, tmp_path):
    (tmp_path/'body.json').write_text(json.dumps(BODY))
    with jupyter_lab(tmp_path) as lab, notebook_page(browser, lab, CELLS) as (page, seen):
        live = page.locator('.cbv-live .board')
        live.locator('.told', has_text='asked of 1.ssm[2]: 1.0').wait_for()             # set from the second cell
        live.locator('.node[aria-label^="0.mlp,"]').click()
        live.locator('.told .er', has_text='ZeroDivisionError').wait_for()
        live.locator('.count').fill('40')
        page.locator('.cbv-live .board[data-n="40"]').wait_for()
        page.locator('#plain .board[data-n=given]').wait_for()                          # and as plain HTML, beside it
        page.wait_for_timeout(300)
        page.locator('.jp-CodeCell .cm-content').last.click()
        page.keyboard.press('Control+A')
        page.keyboard.type('print(look.node, look.size)')
        page.keyboard.press('Shift+Enter')
        page.locator('.jp-OutputArea-output', has_text='0.mlp 40').last.wait_for()
        for theme in ('JupyterLab Dark', 'JupyterLab Light'):
            set_theme(page, theme)
            back = 'rgb(22, 25, 30)' if 'Dark' in theme else 'rgb(255, 255, 255)'
            page.wait_for_function("back => getComputedStyle(document.querySelector('.cbv-live .board')).backgroundColor == back", arg=back)
        assert page.locator('.still').count() == 1 and not page.locator('.still').is_visible() and seen.errors == []
