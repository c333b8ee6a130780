"""Views and the Inspector without a browser: what the strings say, what is refused, when is drawn."""
import base64
import gzip
import io
import json
import os
import re
from collections import Counter
from html import unescape
from html.parser import HTMLParser

import ipywidgets as widgets
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from circuitbench import view as cv
from circuitbench.chart import png
from circuitbench.draw import RAMPS, Scale, esc, num, numbers

RNG = np.random.default_rng(0)
MATRIX = RNG.normal(size=(60, 50))
EVERY = [
    cv.heatmap([[1., 2], [3, -4]]), cv.heatmap(MATRIX), cv.token_strip(['a', ' b'], [1, -1]), cv.token_strip(['a']),
    cv.bars(['a', 'b'], [1, -2], errors=[.1, .2]), cv.lines({'a': [1, 2], 'b': [2, 1, 3]}), cv.histogram(MATRIX),
    cv.table([[1, 'x']], ['n', 's']), cv.columns('<p>a</p>', '<p>b</p>'), cv.text_diff('a b', 'a c')]


def body(html): return html.replace(cv.STYLE, '')
def attribute(html, name): return re.findall(rf'{name}="([^"]*)"', html)


# -- text and numbers ---------------------------------------------------------------------

@pytest.mark.parametrize('html', EVERY)
def test_a_view_carries_one_style_and_loads_nothing(html):
    assert html.count(cv.STYLE) == 1 and html.startswith(cv.STYLE)
    assert not re.search(r'(src|href)="(?!data:|#)|url\(|<script|@import', html)


EVIL = '<script>alert(1)</script>"\'&'


@pytest.mark.parametrize('make', [
    lambda s: cv.heatmap([[1, 2]], rows=[s], cols=[s, s], title=s, xlabel=s, ylabel=s, unit=s),
    lambda s: cv.heatmap(MATRIX, rows=[s] * 60, title=s, xlabel=s, ylabel=s, unit=s),
    lambda s: cv.token_strip([s, s], [1, 2], title=s), lambda s: cv.bars([s], [1], title=s, xlabel=s),
    lambda s: cv.lines({s: [1, 2]}, title=s, xlabel=s, ylabel=s), lambda s: cv.histogram([1, 2], title=s, xlabel=s),
    lambda s: cv.table([[s]], [s], title=s), lambda s: cv.columns('', titles=[s]),
    lambda s: cv.text_diff(s, s + ' x', (s, s)), lambda s: cv.page(s, [(s, '')], lead=s)])
def test_every_text_is_escaped(make):
    tags, attributes, texts = Counter(), set(), []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attrs: (tags.update([tag]), attributes.update(k for k, _ in attrs))
    parser.handle_data = texts.append
    parser.feed(make(EVIL))
    assert 'script' not in tags and all(re.fullmatch('[a-z][a-zA-Z-]*', k) for k in attributes)
    assert EVIL.split('<')[1] in ''.join(texts)


def test_bytes_that_are_no_text_stay_visible():
    assert esc('a\x00\x1b\ud800') == 'a\\x00\\x1b\\ud800'
    strip = cv.token_strip([' a\n', '\t', '', '\udc80'])
    assert '·a⏎</span><br>' in strip and '⇥' in strip and '∅' in strip and r'\udc80' in strip
    strip.encode()


@pytest.mark.parametrize('x, text', [
    (0, '0'), (-3, '-3'), (1234, '1,234'), (1234.5, '1,234'), (.123456, '0.123'), (1.5e-7, '1.5e-7'), (2.5e9, '2.5e+9'),
    (float('nan'), 'NaN'), (float('inf'), 'inf'), (True, 'True'), (np.float32(.5), '0.5'), (np.int64(7), '7')])
def test_numbers_have_three_digits(x, text): assert num(x) == text


def test_tensors_of_any_kind_are_read():
    x = torch.tensor([[1., -2.], [.5, 3.]], dtype=torch.bfloat16, requires_grad=True)
    assert cv.heatmap(x) == cv.heatmap(x.detach().float().numpy()) == cv.heatmap(x.tolist())
    assert cv.histogram(x) == cv.histogram(x.detach().float().numpy())
    assert numbers(torch.tensor([2 ** 24 + 1]), 'x', 1)[0] == 2 ** 24 + 1


@pytest.mark.parametrize('call, says', [
    (lambda: cv.heatmap([]), r'values: got shape \(0,\); expected 2 axes'),
    (lambda: cv.heatmap(np.zeros((0, 3))), r'got shape \(0, 3\); expected 2 axes, not empty'),
    (lambda: cv.heatmap([1, 2]), r'got shape \(2,\); expected 2'),
    (lambda: cv.heatmap([[1, 2]], cols=['a']), 'cols: got 1; expected 2'),
    (lambda: cv.heatmap([[1]], limits=(1, 1)), r'limits: got \(1, 1\); expected'),
    (lambda: cv.heatmap([[1]], limits=(0, np.nan)), 'limits: got'),
    (lambda: cv.heatmap(np.zeros((1001, 1000))), 'got 1,001,000 cells; expected at most 1,000,000'),
    (lambda: cv.token_strip([]), 'tokens: got none'),
    (lambda: cv.token_strip(['a'], [1, 2]), 'values: got 2; expected 1'),
    (lambda: cv.token_strip(['a'], mark=[1]), r'mark: got \[1\]; expected indices of 1'),
    (lambda: cv.bars([], []), 'not empty'), (lambda: cv.bars(['a'], [1], errors=[1, 2]), 'errors: got 2; expected 1'),
    (lambda: cv.lines({}), 'series: got none'),
    (lambda: cv.lines({'a': [1]}, x=[1, 2]), "series 'a': got 1; expected 2"),
    (lambda: cv.lines({'a': [-1]}, log=True), 'no positive value'),
    (lambda: cv.lines({'a': [1]}, x=[np.inf]), 'x: got'),
    (lambda: cv.histogram([]), 'not empty'), (lambda: cv.histogram([np.nan]), 'none of them finite'),
    (lambda: cv.table([[1]], ['a', 'b']), 'a row of 1 cells; expected 2'), (lambda: cv.columns(), 'got no view'),
    (lambda: cv.columns('', titles=['a', 'b']), 'titles: got 2; expected 1'),
    (lambda: cv.page('', []), 'sections: got none')])
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says): call()


def test_what_is_no_number_is_a_type_error():
    with pytest.raises(TypeError, match='values: got list; expected numbers'): cv.heatmap([['a', 'b']])


# -- colours ------------------------------------------------------------------------------

def linear(rgb):
    c = np.asarray(rgb, float) / 255
    return np.where(c <= .04045, c / 12.92, ((c + .055) / 1.055) ** 2.4)


def luminance(rgb): return linear(rgb) @ [.2126, .7152, .0722]


def contrast(a, b):
    lo, hi = sorted((float(luminance(a)), float(luminance(b))))
    return (hi + .05) / (lo + .05)


def hexes(css): return [list(bytes.fromhex(h * (6 // len(h)))) for h in re.findall(r'#(\w+)', css)]


@pytest.mark.parametrize('signed', [False, True])
def test_text_reads_on_every_colour_of_both_themes(signed):
    s = Scale(-1, 1, signed)
    for i in range(1, 256):
        for ground, text in zip(hexes(s.fill(i)), hexes(s.ink(i))): assert contrast(ground, text) >= 4.5


def test_zero_is_neutral_and_lightness_is_monotone():
    for theme, (sequential, diverging) in enumerate(zip(RAMPS[False], RAMPS[True])):
        for zero in (sequential[1], diverging[128]): assert int(zero.max()) - int(zero.min()) <= 10      # no saturation
        toward = 1 if theme else -1                                                       # dark theme: lighter
        for ramp in (sequential[1::4], diverging[128::4], diverging[128:0:-4]):
            assert (toward * np.diff(luminance(ramp)) > 0).all()


# Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB
BLIND = {'protan': [[.152286, 1.052583, -.204868], [.114503, .786281, .099216], [-.003882, -.048116, 1.051998]],
         'deutan': [[.367322, .860646, -.227968], [.280085, .672501, .047413], [-.01182, .04294, .968881]],
         'tritan': [[1.255528, -.076749, -.178779], [-.078411, .930809, .147602], [.004733, .691367, .3039]]}


@pytest.mark.parametrize('kind', BLIND)
def test_signs_differ_for_colour_blind_readers(kind):
    for ramp in RAMPS[True]:
        seen = np.clip(linear(ramp) @ np.array(BLIND[kind]).T, 0, 1) ** (1 / 2.2)
        for i in range(40, 128): assert np.linalg.norm(seen[128 + i] - seen[128 - i]) > .15


def test_scale_is_chosen_by_the_sign_of_the_values():
    of = lambda v, *a: Scale.of(np.array(v, float), *a)
    assert (of([1, 5]).lo, of([1, 5]).hi, of([1, 5]).signed) == (0, 5, False)
    assert (of([-1, 5]).lo, of([-1, 5]).hi, of([-1, 5]).signed) == (-5, 5, True)
    assert (of([1, 5], True).lo, of([-1, 5], False).lo) == (-5, -1)
    assert (of([1], None, (2, 4)).lo, of([-1], True, (-1, 3)).lo) == (2, -3)
    for v in ([0, 0], [np.nan], [np.inf]): assert of(v).lo < of(v).hi
    assert of([0, 0]).index(np.zeros(1)) == 1 and of([0, 0], True).index(np.zeros(1)) == 128


def test_legend_gives_ends_and_what_is_missing():
    html = body(cv.heatmap([[-2, np.nan, 9, .5]], limits=(-1, 3), signed=False, unit='nats'))
    assert re.search(r'>-1 <b .*?</b> 3 nats<', html)
    assert '1 not a number (grey)' in html and '2 beyond the scale' in html
    assert 'beyond' not in cv.heatmap([[1, 2]]) and 'not a number' not in cv.heatmap([[1, 2]])


@pytest.mark.parametrize('html', EVERY)
def test_what_a_host_leaves_without_style_and_drawing_is_legible(html):
    texts, skip = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, _: skip.append(tag) if tag in ('svg', 'style') else None
    parser.handle_endtag = lambda tag: skip.pop() if tag in skip else None
    parser.handle_data = lambda s: texts.append(s) if 'style' not in skip else None     # a drawing's text outlives it
    parser.feed(html.split('<details>')[0])
    assert len(''.join(texts)) < 250
    assert ('<svg' in html) == ('untrusted notebook' in ''.join(texts))


# -- heat maps ----------------------------------------------------------------------------

def test_small_heatmap_draws_each_cell_with_its_value():
    html = body(cv.heatmap([[1, -2, np.nan]], cols=list('abc'), ylabel='layer', xlabel='head', title='T'))
    assert html.count('<rect') == 3 and html.count('var(--nan)') == 1
    assert json.loads(unescape(attribute(html, 'data-l')[0])) == [None, ['a', 'b', 'c'], 'layer', 'head', '']
    about = attribute(html, 'aria-label')[0]
    assert about == 'T: 1 by 3 values, least -2 at layer 0, head b, largest 1 at layer 0, head a'
    assert '<details>' in html and '(a sample)' not in html


def test_large_heatmap_is_one_picture_with_the_right_pixels():
    v = MATRIX.copy()
    v[3, 4], v[0, 0] = np.nan, 0
    html = cv.heatmap(v, rows=[f'r{i}' for i in range(60)], title='T')
    assert html.count('<image') == 2 and html.count('<rect') == 1         # light, dark; the ground of NaN
    assert len(html) < 60_000 and '(a sample)' in html
    most = np.nanmax(np.abs(v))
    for data, ramp in zip(re.findall(r'base64,([^"]+)"/>', html), RAMPS[True]):
        seen = (imread(io.BytesIO(base64.b64decode(data)), format='png') * 255).round().astype(int)
        assert seen.shape == (60, 50, 4)
        assert seen[3, 4, 3] == 0 and (np.delete(seen[..., 3].ravel(), 3 * 50 + 4) == 255).all()
        place = np.abs(seen[:, :, None, :3] - ramp[1:].astype(int)).sum(-1).argmin(-1)   # nearest colour
        back = np.where(seen[..., 3] > 0, (place / 127 - 1) * most, np.nan)
        assert np.nanmax(np.abs(back - v)) <= most / 127 and np.isnan(back[3, 4])
        assert (seen[0, 0, :3] == ramp[128]).all()
    halves = np.frombuffer(base64.b64decode(attribute(html, 'data-v')[0]), '<f2').astype(float).reshape(60, 50)
    scale = float(attribute(html, 'data-n')[0].split()[2])
    assert np.nanmax(np.abs(halves * scale - v) / np.maximum(np.abs(v), 1e-3)) < 1e-3


def test_the_switch_to_a_picture_is_at_two_thousand_cells():
    assert '<image' not in cv.heatmap(np.ones((40, 50))) and '<image' in cv.heatmap(np.ones((40, 51)))


def test_long_label_lists_are_thinned_and_the_table_is_bounded():
    html = body(cv.heatmap(np.ones((300, 400))))
    assert html.count('<i ') < 60 and html.count('<td') <= 12 * 13


def test_infinite_values_do_not_break_the_scale():
    html = body(cv.heatmap([[np.inf, 1, -np.inf]]))
    assert '2 beyond the scale' in html and attribute(html, 'data-n') == ['1 3 1']
    assert np.frombuffer(base64.b64decode(attribute(html, 'data-v')[0]), '<f2').tolist() == [np.inf, 1, -np.inf]


# -- the other views ----------------------------------------------------------------------

def test_tokens_are_coloured_marked_and_reachable():
    html = body(cv.token_strip(['a', 'b', 'c'], [0, 1, np.nan], mark=[-2]))
    spans = re.findall(r'<span [^>]*>', html)[:3]
    assert [attribute(s, 'tabindex')[0] for s in spans] == ['0', '-1', '-1']         # one tab stop, arrows from there
    assert [unescape(attribute(s, 'title')[0]) for s in spans] == ["0: 'a' = 0", "1: 'b' = 1", "2: 'c' = NaN"]
    assert ['mk' in s for s in spans] == [False, True, False]
    assert 'style' not in re.findall(r'<span [^>]*>', body(cv.token_strip(['a'])))[0]


def test_bars_start_at_zero_and_print_their_values():
    html = body(cv.bars(['a', 'b', 'c'], [3, -1, np.nan], errors=[1, 0, 0]))
    x, width = ([float(s) for s in attribute(html, k)] for k in (' x', ' width'))
    assert (x, width) == ([200, 0], [600, 200])                     # the axis runs from -1 to 3 + 1
    assert {'3', '-1', 'NaN'} <= set(attribute(html, 'data-s'))
    assert attribute(html, 'data-t') == ['a: 3 ± 1', 'b: -1 ± 0']
    assert attribute(html, 'fill') == ['var(--s1)', 'var(--s0)']
    assert 'var(--s2)' in cv.bars(['a'], [1]) and '<rect' in cv.bars(['a'], [0])


def test_lines_leave_gaps_and_say_so():
    html = body(cv.lines({'a': [1, 2, np.nan, 4]}, xlabel='step'))
    curve = next(d for d in attribute(html, ' d') if d.startswith('M0.0 '))
    assert curve == 'M0.0 1000.0L333.3 666.7h0M1000.0 0.0h0' and '1 values left out (not finite)' in html
    assert attribute(html, 'data-t') == ['a, step 0: 1', 'a, step 1: 2', 'a, step 3: 4']
    logged = body(cv.lines({'a': [1, 10, 100, 0]}, log=True))
    assert 'M0.0 1000.0L333.3 500.0L666.7 0.0' in logged and 'not positive' in logged
    assert '<path' in cv.lines({'one': [5]}) and '<path' in cv.lines({'flat': [5, 5]})


def test_histogram_counts_as_numpy_does():
    v = np.append(RNG.normal(size=500), [np.nan, np.inf])
    html, (n, _) = body(cv.histogram(v, bins=20)), np.histogram(v[:500], 20)
    heights = [float(h) for h in attribute(html, ' height')]
    assert np.allclose(heights, 1000 * n[n > 0] / n.max(), atol=.06)
    assert '502 values, 2 not finite' in html
    assert '2 outside the intervals' in cv.histogram([1, 2, 30, 40], bins=[0, 1, 2, 3])
    assert len(attribute(body(cv.histogram(v, bins=20, log=True)), ' height')) == (n > 0).sum()


def test_table_is_cut_and_says_so():
    html = body(cv.table([[i, 'x'] for i in range(30)], ['n', 's'], limit=10))
    assert html.count('<tr>') == 11 and '20 more rows' in html and '<td class="n">9</td><td>x</td>' in html


def test_text_diff_marks_only_what_differs():
    html = body(cv.text_diff('the cat sat', 'the dog sat\n', titles=('a', 'b')))
    assert re.findall('<mark>(.*?)</mark>', html, re.S) == ['cat', 'dog', '\n']
    assert '1 words of the first text and 1 of the second differ' in html
    assert '<mark>' not in cv.text_diff('same', 'same').replace(cv.STYLE, '') and '(empty)' in cv.text_diff('', 'a')


# -- pages --------------------------------------------------------------------------------

def test_page_has_one_style_a_structure_and_a_policy():
    html = cv.page('Title', [('One', EVERY[0]), ('Two', EVERY[1] + EVERY[2])], lead='Lead')
    assert html.count(cv.STYLE) == 1 and "default-src 'none'" in html and '<html lang="en">' in html
    assert html.count('<h1') == 1 and html.count('<h2') == 2
    assert '<a href="#s2">Two</a>' in html and 'href="#main"' in html
    assert '<nav' not in cv.page('T', [('One', '')])


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = cv.save_page(tmp_path / 'a.html', 'T', [('A', 'one')])
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(os, 'replace', stop)
    with pytest.raises(KeyboardInterrupt): cv.save_page(path, 'T', [('A', 'two')])
    assert 'one' in path.read_text() and os.listdir(tmp_path) == ['a.html']
    with pytest.raises(FileNotFoundError): cv.save_page(tmp_path / 'no' / 'a.html', 'T', [('A', 'one')])


# -- the inspector ------------------------------------------------------------------------

class Counted:
    "A view that counts how often it is drawn."
    def __init__(self): self.calls = []
    def __call__(self, layer=2, head=0, name='x'):
        self.calls.append((layer, head, name))
        if layer == 13: raise ValueError('layer 13 <is> missing')
        return f'<p>{layer}.{head}.{name}</p>'


def test_setting_draws_and_only_a_change_does():
    view = Counted()
    i = cv.Inspector(view, 'T', layer=(0, 20), head=(0, 3), name='x')
    assert i.values == {'layer': 2, 'head': 0, 'name': 'x'} and '2.0.x' in i.html and len(view.calls) == 1
    assert '5.1.x' in i.set(layer=5, head=1).html and len(view.calls) == 2        # two controls, one drawing
    i.set(layer=5), i.html, i.controls['head'].set_trait('value', 1)
    assert len(view.calls) == 2
    i.controls['layer'].value = 7
    assert '7.1.x' in i.html and len(view.calls) == 3
    assert repr(i) == 'Inspector(T, layer 7 · head 1 · name x)'


def test_an_error_is_shown_in_place_and_raised_without_a_kernel():
    i = cv.Inspector(Counted(), layer=(0, 20))
    with pytest.raises(ValueError, match='layer 13'): i.set(layer=13)
    assert 'ValueError: layer 13 &lt;is&gt; missing' in i.html and 'role="alert"' in i.html
    with pytest.raises(ValueError, match='layer 13'):
        i.set(layer=3)
        i.controls['layer'].value = 13
    assert '4.0' in i.set(layer=4).html


def test_moves_are_gathered_while_a_loop_runs():
    import asyncio
    view, seen = Counted(), []

    async def kernel():
        i = cv.Inspector(view, layer=(0, 20), delay=.02)
        for k in range(3, 9): i.controls['layer'].value = k
        seen.append(len(view.calls))
        await asyncio.sleep(.1)
        seen.append(list(view.calls))
        i.controls['layer'].value = 13                                # an error of a move stays in the page
        await asyncio.sleep(.1)
        seen.append(i.html)
        i.controls['layer'].value = 9                                 # asking for the picture does not wait
        seen.append(i.html)
        with pytest.raises(ValueError): i.set(layer=13)               # code that sets gets its error
    asyncio.run(kernel())
    assert seen[0] == 1 and seen[1] == [(2, 0, 'x'), (8, 0, 'x')]
    assert 'layer 13' in seen[2] and '9.0' in seen[3]


def test_short_forms_make_labelled_controls():
    given = widgets.IntText(4, description='mine', tooltip='tip')
    i = cv.Inspector(lambda **v: '', a=(0, 5), b=(0., 1.), c=(0, 10, 2), d=['p', 'q'], e={'P': 1, 'Q': 2}, f=True,
                     long_name='t', g=given)
    kinds = [type(w).__name__ for w in i.controls.values()]
    assert kinds == ['IntSlider', 'FloatSlider', 'IntSlider', 'Dropdown', 'Dropdown', 'Checkbox', 'Text', 'IntText']
    assert i.values == dict(a=0, b=0., c=0, d='p', e=1, f=True, long_name='t', g=4)
    assert i.controls['long_name'].description == 'long name' and i.controls['a'].tooltip == 'a, 0 to 5'
    assert all(w.description and w.tooltip for w in i.controls.values()) and given.tooltip == 'tip'


def test_bad_controls_are_named():
    for spec in ([], {}, 3, None, (1,), (1, 'a')):
        with pytest.raises(TypeError, match=r'a: got .*; expected a widget'): cv.Inspector(lambda a: '', a=spec)
    with pytest.raises(ValueError, match='range 3 to 1'): cv.Inspector(lambda a: '', a=(3, 1))
    i = cv.Inspector(lambda a: '', a=(0, 1))
    make = lambda: cv.Inspector(lambda a: '', a=(0, 1), play=['b'])
    for call in (lambda: i.set(b=1), lambda: i.update('b', max=1), make):
        with pytest.raises(ValueError, match=r"got the control 'b'; expected one of \['a'\]"): call()
    for value in (2, -1, 'x', .5):
        with pytest.raises(ValueError, match=r'a: got .*; expected 0 to 1'): i.set(a=value)
    menu = cv.Inspector(lambda a: '', a=['p', 'q'])
    with pytest.raises(ValueError, match=r"a: got 'z'; expected one of \['p', 'q'\]"): menu.set(a='z')
    with pytest.raises(ValueError, match='a: got 9; expected 0 to 1'): cv.Inspector(lambda a=9: '', a=(0, 1))
    with pytest.raises(TypeError, match='argument'): cv.Inspector(lambda a: '', b=True)


def test_ranges_follow_other_controls():
    heads, view = [4, 2], Counted()
    i = cv.Inspector(lambda layer, head=0: view(layer, head), layer=(0, 1), head=(0, 3),
                     depends={'head': lambda v: {'max': heads[v['layer']] - 1}})
    i.set(layer=0, head=3)
    count = len(view.calls)
    assert '1.1' in i.set(layer=1).html and i.controls['head'].max == 1 and len(view.calls) == count + 1
    j = cv.Inspector(lambda layer, name: f'{layer}.{name}', layer=(0, 1), name=['p', 'q'],
                     depends={'name': lambda v: {'options': list('pq' if v['layer'] else 'qrs')}})
    assert j.set(name='q').values['name'] == 'q' and j.set(layer=1).values['name'] == 'q'
    assert j.set(layer=0).values['name'] == 'q' and j.set(name='s', layer=0).values['name'] == 's'
    assert j.set(layer=1).values['name'] == 'p'                     # what is no longer there gives way to the first
    assert i.set(layer=0, head=3).values == {'layer': 0, 'head': 3}  # allowed by the layer that is set before it
    assert i.update('layer', max=0).controls['layer'].max == 0
    k = cv.Inspector(lambda step: f'<p>{step}</p>', step=(0, 3))
    assert '<p>10</p>' in k.update('step', min=10, max=20).html and k.values == {'step': 10}


def test_play_walks_its_slider():
    i = cv.Inspector(Counted(), layer=(0, 9), play=['layer'])
    play = i.children[0].children[0].children[0]
    assert isinstance(play, widgets.Play) and play.max == 9 and play.value == 2
    play.value = 6
    assert i.values['layer'] == 6 and '6.0' in i.html


def test_saved_output_shows_without_a_kernel():
    i = cv.Inspector(Counted(), 'My <title>', layer=(0, 20))
    saved, _ = i._repr_mimebundle_()
    assert set(saved) >= {'text/html', 'text/plain', 'application/vnd.jupyter.widget-view+json'}
    assert all(s in saved['text/html'] for s in ('2.0.x', 'layer 2', 'My &lt;title&gt;'))
    assert saved['text/plain'] == 'Inspector(My <title>, layer 2)' and saved['text/html'].count(cv.STYLE) == 1


def test_views_that_are_not_seen_at_first_travel_packed():
    runs = '<p>runs</p><script type="module">1</script>'
    html = body(cv.switch(['<p>a</p>', cv.STYLE + '<p>b</p>', runs], ['x', 'y', 'z'], 'it'))
    assert '<p>a</p></div>' in html and f'hidden>{runs}</div>' in html                       # what is put in later would not run
    data = re.search(r'<script type="text/plain">(.+?)</script>', html)[1]
    assert json.loads(gzip.decompress(base64.b64decode(data))) == {'1': '<p>b</p>'}
    assert '<script' not in cv.switch(['<p>a</p>'], ['x'], 'it')


def test_a_small_picture_carries_the_colours_that_it_has():
    index = np.array([[3, 200], [0, 3]], np.uint8)
    data = png(index, RAMPS[True][0])
    seen = (imread(io.BytesIO(data), format='png') * 255).round().astype(int)
    assert len(data) < 150 and seen[1, 0, 3] == 0 and (seen[0, :, :3] == RAMPS[True][0][[3, 200]]).all()


def test_current_picture_goes_to_a_file(tmp_path):
    i = cv.Inspector(Counted(), 'T', layer=(0, 20)).set(layer=6)
    text = i.to_html(tmp_path / 'i.html').read_text()
    assert '6.0.x' in text and '<h2 id="s1">layer 6</h2>' in text and text.count(cv.STYLE) == 1
