"""The course: every unit runs and its checks agree with its solutions, students get no solution, and a check says what is wrong with a wrong answer."""
import importlib
import os
import re
from functools import cache
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch

from circuitbench import checks_hooks, checks_memory, course
from circuitbench.course import BEGIN, END, exercises, read_unit, slides, student_version
from circuitbench.edit import Edits, mean, patch, zero
from circuitbench.load import load_model

ROOT = Path(__file__).parents[1]
UNITS = course.units()


def tables():
    "Wrong answers by check: name -> a function that lists (arguments, what the check says about them). Other files add to them."
    found = dict(WRONG)
    for path in sorted(Path(__file__).parent.glob('test_course_*.py')): found |= importlib.import_module(path.stem).WRONG
    return found


def checks_of(nb):
    "The module that a unit's checks come from."
    name = next(m[1] for c in nb['cells'] if (m := re.search(r'^from circuitbench import (\w+) as check$', c['source'], re.M)))
    return importlib.import_module(f'circuitbench.{name}')


@cache
def executed(path):
    "A notebook's cells after a run, and the error that stopped it."
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError
    nb, error = nbformat.reads(Path(path).read_text(), 4), None
    try: NotebookClient(nb, timeout=300, kernel_name='python3', resources={'metadata': {'path': str(ROOT/'nbs/course')}}).execute()
    except CellExecutionError as e: error = str(e)
    return nb.cells, error


def said(cell):
    "What a check showed in a cell."
    return [''.join(o.data.get('text/plain', '')) for o in cell.outputs if o.output_type == 'display_data' and o.data.get('text/plain', '').startswith(('Right.', 'Not yet.'))]


def slow(value, is_slow): return pytest.param(value, marks=pytest.mark.slow if is_slow else ())


@pytest.mark.slow                                                       # half a minute each
@pytest.mark.parametrize('path', UNITS, ids=lambda p: p.stem)
def test_a_unit_runs_and_its_checks_say_right(path, monkeypatch):
    monkeypatch.delenv('NBGRADER_EXECUTION', raising=False)
    cells, error = executed(path)
    assert error is None, error
    found = [(c.source, said(c)) for c in cells if c.source.startswith('check.')]
    assert 4 <= len(found) <= 8
    for source, shown in found: assert len(shown) == 1 and shown[0].startswith('Right.'), (source, shown)


@pytest.mark.parametrize('path', UNITS, ids=lambda p: p.stem)
def test_a_unit_has_what_a_lecture_needs(path):
    nb, text = read_unit(path), path.read_text()
    story = [c['source'] for c in nb['cells'] if c['cell_type'] == 'markdown']
    assert story[0].startswith('# ') and any('## Reading' in s for s in story) and any('arxiv.org/abs/' in s for s in story)
    assert any(s.startswith(course.TEACHER) for s in story), 'no notes for the teacher'
    assert text.count('<summary>Hint') >= len(list(exercises(nb))), 'an exercise without a hint'
    for c in nb['cells']:
        assert 'slide_type' in c['metadata'].get('slideshow', {}), f'run circuitbench.course.mark: {c["source"][:60]!r}'
        assert ('nbgrader' in c['metadata']) == (course.is_solution(c) or course.is_check(c)), c['source'][:60]
    ids = [c['metadata']['nbgrader']['grade_id'] for c in nb['cells'] if 'nbgrader' in c['metadata']]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize('path', [slow(p, p != UNITS[0]) for p in UNITS], ids=lambda p: p.stem)
def test_a_student_gets_no_solution_and_runs_up_to_the_first_exercise(path, tmp_path):
    given, slide = student_version(path, tmp_path/path.name), slides(path, tmp_path/'slides.html').read_text()
    nb, text = read_unit(given), given.read_text()
    assert BEGIN not in text and END not in text and course.TEACHER not in text
    code = '\n'.join(c['source'] for c in nb['cells'] if c['cell_type'] == 'code')                    # hints may name a line
    shown = unescape('\n'.join(re.findall('<pre>(.*?)</pre>', slide, re.S)))
    for e in exercises(read_unit(path)):
        inside = re.findall(f'{BEGIN}\n(.*?){END}', e.solution, re.S)
        assert inside and all(part.strip() not in code + shown for part in inside), e.name
        lines = {s.strip() for part in inside for s in part.splitlines()}
        for line in lines: assert len(line) < 13 or line in e.stub or line not in code + shown, line
    for c in nb['cells']:
        if course.is_check(c) or course.YOURS in c['source']: assert not c['outputs'], c['source']
    first = next(i for i, c in enumerate(nb['cells']) if course.is_check(c))
    nb['cells'] = nb['cells'][:first + 1]
    cells, error = executed(course.write_unit(tmp_path/'first.ipynb', nb))
    assert error is None or course.YOURS[6:25] in error, error
    if error is None: assert said(cells[-1])[0].startswith('Not yet.')


LONG = {'after_swap', 'baselines', 'edge_losses', 'jump', 'mean_ablated', 'method_table', 'pairs_lost'}


@pytest.mark.parametrize('name', [slow(e.name, e.name in LONG) for p in UNITS for e in exercises(read_unit(p))])
def test_a_check_says_what_is_wrong(name, capsys):
    checks = next(checks_of(read_unit(p)) for p in UNITS if name in [e.name for e in exercises(read_unit(p))])
    wrong = tables()[name]()
    assert len(wrong) >= 2
    for args, phrase in wrong:
        found = getattr(checks, name)(*args)
        assert not found.ok and phrase in found.says and 'stops at your answer' not in found.says, (found.says, phrase)
        assert 'Hint' in found.says
    assert capsys.readouterr().out.count('Not yet.') == len(wrong)


def test_where_nbgrader_grades_a_wrong_answer_is_an_error(monkeypatch):
    @course.check('Hint 1')
    def one(v): course.judge(course.values(v, ()), 1.); return 'It is 1.'
    assert one(1).ok and not one(2).ok and not one(...).ok and not one(None).ok and not one('a').ok
    monkeypatch.setenv('NBGRADER_EXECUTION', 'autograde')
    assert one(1).ok
    with pytest.raises(AssertionError, match='which is not it'): one(2)


def test_the_command_writes_every_unit(tmp_path, capsys):
    assert course.main([str(tmp_path/'out'), '--slides']) == 0
    assert sorted(os.listdir(tmp_path/'out')) == sorted(f'{p.stem}.{end}' for p in UNITS for end in ('html', 'ipynb'))
    assert course.main([str(tmp_path/'out'), '--source', str(tmp_path)]) == 2 and 'expected a folder with units' in capsys.readouterr().err
    assert course.main([str(UNITS[0].parent)]) == 2                         # never over the units themselves


def test_without_a_clone_the_command_says_where_the_units_are(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(course, '__file__', str(tmp_path/'circuitbench/course.py'))            # as a wheel has it
    assert course.main([str(tmp_path/'out')]) == 2 and '--source' in capsys.readouterr().err and not (tmp_path/'out').exists()
    assert course.main([str(tmp_path/'out'), '--source', str(ROOT/'nbs/course')]) == 0


def test_slides_turn_by_keys_without_a_network(tmp_path):
    from browser import chromium, watched_page
    page_of = slides(UNITS[0], tmp_path/'unit.html')
    with chromium() as browser:
        for scheme, back in (('light', 'rgb(255, 255, 255)'), ('dark', 'rgb(22, 25, 30)')):
            with watched_page(browser, color_scheme=scheme) as (page, seen):
                page.goto(page_of.as_uri())
                count = page.locator('main > section').count()
                at = lambda: page.inner_text('#n')
                shown = lambda: page.locator('main > section:visible').count()
                assert count > 8 and at() == f'1 / {count}' and shown() == 1
                page.keyboard.press('ArrowRight'); page.keyboard.press('PageDown')
                assert at() == f'3 / {count}' and shown() == 1
                page.keyboard.press('ArrowLeft'); assert at() == f'2 / {count}'
                page.keyboard.press('End'); page.keyboard.press('ArrowRight'); assert at() == f'{count} / {count}'
                page.keyboard.press('Home')
                assert not page.locator('aside').first.is_visible()
                page.keyboard.press('n'); assert page.locator('aside').first.is_visible()
                assert page.evaluate('getComputedStyle(document.body).backgroundColor') == back
                page.emulate_media(media='print'); assert shown() == count
                assert page.locator('svg.tex').count() > 10 and not seen.errors and seen.requests == [page_of.as_uri()]


def test_marks_that_do_not_pair_are_refused():
    for source in (f'{BEGIN}\nx = 1', f'x = 1\n{END}', f'{BEGIN}\n{BEGIN}\n{END}'):
        with pytest.raises(ValueError, match='SOLUTION'): course.cleared(source)



# -- wrong answers to units 1 and 2: what a student may write -------------------------------
def step_by_step(body, x, dt, A, B, C):
    "A scan with another step: body(S, x, dt, A, B, C) -> read-out, kept state, state that goes on."
    S, ys, kept = np.zeros((x.shape[1], B.shape[1])), [], []
    for t in range(len(x)):
        y, keep, S = body(S, x[t], dt[t], A, B[t], C[t])
        ys.append(y); kept.append(keep)
    return np.stack(ys), np.stack(kept)


def scans():
    w = lambda x, dt, B: dt*np.outer(x, B)
    def of(body): return lambda *a: step_by_step(body, *a)
    def usual(decay, write):
        def body(S, x, dt, A, B, C): S = decay(dt, A)*S + write(x, dt, B); return S @ C, S, S
        return of(body)
    def late(S, x, dt, A, B, C): S = np.exp(dt*A)*(S + w(x, dt, B)); return S @ C, S, S
    def early(S, x, dt, A, B, C): new = np.exp(dt*A)*S + w(x, dt, B); return S @ C, new, new
    def before(S, x, dt, A, B, C): new = np.exp(dt*A)*S + w(x, dt, B); return new @ C, S, new
    def crossed(S, x, dt, A, B, C): S = np.exp(dt*A)*S + w(x, dt, C); return S @ B, S, S
    right = usual(lambda dt, A: np.exp(dt*A), w)
    return [((usual(lambda dt, A: 1, w),), 'never forgets'), ((usual(lambda dt, A: np.exp(dt), w),), 'rate A is missing'),
            ((usual(lambda dt, A: np.exp(A), w),), 'step size is missing'), ((usual(lambda dt, A: np.exp(dt*A), lambda x, dt, B: np.outer(x, B)),), 'lacks its step size'),
            ((of(late),), 'decay after the write'), ((of(early),), 'read the old state'), ((of(before),), 'before each step'), ((of(crossed),), 'swapped'),
            ((lambda *a: right(*a)[0],), 'Expected two results'), ((lambda *a: (right(*a)[0], right(*a)[1].swapaxes(1, 2)),), 'x goes down the rows'),
            ((lambda *a: None,), 'returns nothing'), ((lambda x, dt, A, B, C: x @ B,), 'stops with ValueError')]


def sums(lo, hi, above=-np.inf):
    "Segment sums from s + lo to t + hi - 1."
    return lambda a: np.array([[sum(a[s + lo:t + hi]) if s <= t else above for s in range(len(a))] for t in range(len(a))])


def divided(log_a):
    p = np.exp(log_a).cumprod()
    with np.errstate(all='ignore'): return np.where(np.tri(len(p)) == 1, np.log(p[:, None]/p), -np.inf)


def matrices():
    L, e = lambda dt, A: sums(1, 1)(dt*A), np.exp
    return [((lambda dt, A, B, C: ((C @ B.T)*e(L(dt, A))*dt).T,), 'turned'), ((lambda dt, A, B, C: (B @ C.T)*e(L(dt, A))*dt,), 'swapped'),
            ((lambda dt, A, B, C: (C @ B.T)*e(L(dt, A)),), 'step size of the write is missing'), ((lambda dt, A, B, C: (C @ B.T)*e(L(dt, A))*dt[:, None],), 'stands at the row'),
            ((lambda dt, A, B, C: np.tril((C @ B.T)*dt),), 'decay is missing'), ((lambda dt, A, B, C: (C @ B.T)*e(sums(0, 1)(dt*A))*dt,), 'own step'),
            ((lambda dt, A, B, C: (C @ B.T)*e(sums(1, 1, 0)(dt*A))*dt,), 'M first differs'), ((lambda dt, A, B, C: C @ B,), 'stops with ValueError')]


def chunkwise(inside='own', carry=True, keep=True, ends=True, whole=False):
    "A student's chunked scan, its slips as switches."
    def scan(x, dt, A, B, C, chunk):
        S, ys = np.zeros((x.shape[1], B.shape[1])), []
        for i in range(0, len(x), chunk):
            n = chunk if whole else len(x[i:i + chunk])
            u, d, b, c = (v[i:i + n] for v in (x, dt, B, C))
            L, run = sums(1, 1)(d*A), np.cumsum(d*A)
            seen = {'own': run, 'before': run - d*A, 'none': 0*run}[inside]
            y = ((c @ b.T)*np.exp(L)*d) @ u + carry*np.exp(seen)[:, None]*(c @ S.T)
            ys.append(y.reshape(n, -1))
            S = (np.exp(run[-1]) if keep else 1)*S + (u*(np.exp(run[-1] - run)*d if ends else d)[:, None]).T @ b
        return np.concatenate(ys)
    return scan


CUBA = 'If a man would see Cuba, let him first see the house of the king, which standeth in'
AUSTRIA = CUBA.replace('Cuba', 'Austria')


@cache
def tiny(name='mamba2'): return load_model(f'tiny://{name}')


@torch.no_grad()
def of_head(layer=2, head=3):
    "M, x and D of one head on the prompt, from the package's record."
    r = tiny().recurrences(CUBA, layer)[layer][head]
    return r.attention()[0, 0].double().numpy(), r.x[0, :, 0].double().numpy(), float(r.D[0])


def in_the_model():
    M, x, D = of_head()
    return [((M @ x,), 'bypass is missing'), ((M @ x + x,), 'without its weight'), ((of_head(2, 1)[0] @ of_head(2, 1)[1] + of_head(2, 1)[2]*of_head(2, 1)[1],), 'head 1'),
            ((of_head(3)[0] @ of_head(3)[1] + of_head(3)[2]*of_head(3)[1],), 'head 3 of layer 3'), (((M @ x + D*x).T,), 'wrong order'), (('y',), 'expected numbers')]


# -- units 3 and 4 --------------------------------------------------------------------------
def seen(site, **more): return tiny().run_with_cache(CUBA, site, **more)[1][site]


@torch.no_grad()
def last(edit=(), text=CUBA): return tiny().run(text, edit).logits[0, -1]


def states():
    s = 'blocks.3.ssm.state'
    return [((seen(s, at=4, heads=[0, 3]),), 'step 4'), ((seen(s, at=6, heads=[0, 3]),), 'one too late'), ((seen(s, at=5),), 'all eight heads'), ((seen(s, heads=[0, 3]),), 'all steps'),
            ((seen('blocks.2.ssm.state', at=5, heads=[0, 3]),), 'block 2'), ((seen('blocks.3.ssm.write', at=5, heads=[0, 3]),), 'writes'), ((seen(s, at=5, heads=[0, 1]),), 'heads 0 and 1')]


def forgets():
    z = lambda name, at=8: (last(zero(f'blocks.{name}', at=at)),)
    return [((last(),), 'Nothing is changed'), (z('2.ssm.y'), 'read-out'), (z('2.ssm.write'), 'what step 8 writes'), (z('2.ssm.state', None), 'every step'), (z('2.ssm.state', 9), 'step 9'),
            (z('3.ssm.state'), 'block 3'), (z('*.ssm.state'), 'Every block'), ((tiny().run(CUBA).logits[0],), 'has shape (20, 4308)')]


def ablations():
    site, prompts = 'blocks.0.ssm.out', list(checks_hooks.others())
    source = lambda name=site: tiny().run_with_cache(prompts, name)[1][name]
    return [((last(zero(site)),), 'zero ablation'), ((last(mean(site, seen(site))),), 'own positions'), ((last(mean(site, source(), over='batch')),), 'each position'),
            ((last(mean(site, source(), at=-1)),), 'last position'), ((last(mean('blocks.1.ssm.out', source('blocks.1.ssm.out'))),), 'block 1'), ((last(),), 'Nothing is changed')]


def changes():
    both = lambda model, text, e: [model.run(text, k).logits[0] for k in (e, ())]
    far = lambda a, b: (a - b).abs().amax(-1) > 1e-3
    return [((lambda m, t, e: far(*both(m, t, e)).any(),), 'truth value for each'), ((lambda m, t, e: far(*both(m, t, e))[None],), 'One row of the batch'),
            ((lambda m, t, e: ~far(*both(m, t, e)),), 'you say that step 0 changes'), ((lambda m, t, e: both(m, t, e)[0].argmax(-1) != both(m, t, e)[1].argmax(-1),), 'likeliest tokens'),
            ((lambda m, t, e: (both(m, t, e)[0] - both(m, t, e)[1]).abs().amax(-1),), 'Expected truth values'), ((lambda m, t, e: torch.ones(20, dtype=torch.bool),), 'cannot reach back')]


def recoveries():
    def with_slip(slip):
        def recovery(model, clean, corrupt, site, at, target, wrong):
            t, w = (int(model.tokens(s)[0][0, 0]) for s in (target, wrong))
            d = lambda text, e=(): float(model.run(text, e).logits[0, -1, t] - model.run(text, e).logits[0, -1, w])
            source = model.run_with_cache(corrupt if slip in ('corrupt run', 'into clean', 'far') else clean, site)[1][site]
            into = clean if slip in ('into clean', 'far') else corrupt
            at = None if slip == 'everywhere' else min(at + 1, 19) if slip == 'late' else at
            low, high, got = d(corrupt), d(clean), d(into, patch(site, source, at=at))
            return {'raw': got, 'shifted': got - low, 'far': (got - high)/(low - high), 'upside': (high - got)/(high - low), 'share': got/high}.get(slip, (got - low)/(high - low))
        return recovery
    said = {'corrupt run': 'corrupt run itself', 'into clean': 'into the clean run', 'far': 'how far that goes', 'raw': 'logit difference itself', 'shifted': 'do not divide', 'share': 'by the clean run alone',
            'upside': 'wrong end', 'everywhere': 'Every position', 'late': 'one step too late'}
    return [((with_slip(slip),), phrase) for slip, phrase in said.items()]


@cache
@torch.no_grad()
def residual_map(name):
    t, w = (int(tiny().tokens(s)[0][0, 0]) for s in (' Havana', ' Vienna'))
    d = lambda logits: float(logits[t] - logits[w])
    kept = {i: seen(f'blocks.{i}.{name}') for i in range(6)}
    low, high = d(last(text=AUSTRIA)), d(last())
    return np.array([[(d(last(patch(f'blocks.{i}.{name}', kept[i], at=k), AUSTRIA)) - low)/(high - low) for k in range(20)] for i in range(6)])


def maps(): return [((residual_map('resid_post').T,), 'turned'), ((residual_map('resid_pre'),), 'resid_pre'), ((1 - residual_map('resid_post'),), 'first differs')]


@torch.no_grad()
def shares_left():
    log = np.stack([(r.dt[0].double()*r.A.double()).numpy() for r in tiny().recurrences(CUBA).values()])
    left = lambda lo, hi=20: np.exp(log[:, lo:hi].sum(1))
    return [((left(5),), 'not its own write'), ((left(7),), 'step 6'), ((left(6, 19),), 'last step'), ((left(6).T,), 'Turned'), ((1 - left(6),), 'lost'), ((left(5, 6),), 'step 5 alone')]


@torch.no_grad()
def whose():
    r = tiny().recurrences(CUBA, 2)[2][3]
    x, dt, A, B = (v.double().numpy() for v in (r.x[0, :, 0], r.dt[0, :, 0], r.A, r.B[0, :, 0]))
    def parts(own=0, decays=True):
        left = np.exp(A*(dt.sum() - dt.cumsum() + own*dt)) if decays else np.ones(20)
        return np.einsum('s,sp,sn->spn', left*dt, x, B)
    W, S = parts(), parts().sum(0)
    inner, size = lambda W: np.einsum('spn,pn->s', W, S), np.linalg.norm(W, axis=(1, 2))
    return [((inner(parts(decays=False))/(S*S).sum(),), 'decays are missing'), ((inner(parts(1))/(S*S).sum(),), 'own step'), ((size,), 'lengths of the writes'), ((size/np.linalg.norm(S),), 'do not add up'),
            ((size/size.sum(),), 'counted twice'), ((inner(W),), 'inner products')]


def swaps():
    def with_slip(slip):
        def after(model, text, other, cut, layers):
            if slip == 'other goes on': text, other = other, text
            cut += {'late': 1, 'early': -1}.get(slip, 0)
            a, b = (model.tokens(t)[0] for t in (text, other))
            mine, theirs = (model.run(ids[:, :cut], keep_state=True).state for ids in (a, b))
            new = mine.swap(theirs, ('ssm', 'conv') if slip == 'conv' else 'ssm', blocks=None if slip == 'all' else layers)
            word = model.tokenizer.decode([int(model.run(a[:, cut:], state=mine if slip == 'unused' else new).logits[0, -1].argmax())])
            return {'stripped': word.strip(), 'nothing': None, 'number': 7}.get(slip, word)
        return after
    said = {'unused': 'Nothing is swapped', 'all': 'All layers', 'other goes on': 'other prompt that goes on', 'stripped': 'strip', 'nothing': 'returns nothing', 'number': 'next token as text', 'conv': 'convolutions'}
    return [((with_slip(slip),), phrase) for slip, phrase in said.items()]


def few():
    def writes(blocks, at, site='write', source=CUBA):
        names = [f'blocks.{i}.ssm.{site}' for i in blocks]
        kept = tiny().run_with_cache(source, names, at=at)[1]
        return (Edits([patch(n, kept[n], at=at) for n in names]),)
    return [(writes([2, 3], [5]), "own step is not enough"), (writes([2], [5, 6, 7, 8]), 'One block is not enough'), (writes([0, 1], [5, 6, 7, 8]), 'Which two blocks'), (writes([2, 3], [8], 'state'), 'Only writes'),
            (writes([2, 3], [5, 6, 7, 8], source=AUSTRIA), 'Nothing moves'), (writes([0, 1, 2, 3], [5, 6, 7, 8]), '8 or fewer'), ((zero('blocks.2.ssm.write'),), 'All steps'), (('edit',), 'Expected one edit')]


def memories():
    kinds = list(checks_memory.KINDS)
    table = lambda *v: ({(k, p): s for (k, p), s in zip([(k, p) for k in kinds for p in ('attn', 'ssm')], v)},)
    return [(table(0, 1, 1, 0, 1, 0), 'answers that stay'), (table(100, 0, 0, 100, 0, 100), 'percent'), (table(0, 0, 0, 0, 0, 0), 'Nothing goes over'), (table(1, 1, 1, 1, 1, 1), 'Everything goes over'),
            (({('facts', 'attn'): 1.},), 'is missing'), ((...,), 'Expected a dict')]


DT, STEPS = np.array([.1, .4, 2., .1]), lambda at, size, rest: np.where(np.arange(20) == at, size, rest)
WRONG = {
    'keeps': lambda: [((np.exp(DT),), 'rate A is missing'), ((np.exp(.5*DT),), 'negative already'), ((-.5*DT,), 'exponent'), ((1 - .5*DT,), 'small steps only'), ((np.exp(-.5*DT).cumprod(),), 'for itself'),
                      ((...,), 'not there yet'), ((np.exp(-.5*DT)[:2],), 'has shape (2,)')],
    'scan': scans,
    'left': lambda: [((lambda dt, A, s, t: np.exp(A*dt[s:t + 1].sum()),), 'own step'), ((lambda dt, A, s, t: np.exp(A*dt[s + 1:t].sum()),), 'step t itself'), ((lambda dt, A, s, t: np.exp(A*dt[s:t].sum()),), 'off by one'),
                     ((lambda dt, A, s, t: A*dt[s + 1:t + 1].sum(),), 'exponent'), ((lambda dt, A, s, t: np.exp(A*(t - s)),), 'step sizes between'), ((lambda dt, A, s, t: np.exp(dt[s + 1:t + 1].sum()),), 'rate A')],
    'horizon': lambda: [((lambda dt, A: np.mean(-1/(dt*A)),), 'endless'), ((lambda dt, A: np.log(.5)/np.mean(dt*A),), 'half-life'), ((lambda dt, A: -1/A,), 'step sizes are missing'), ((lambda dt, A: 1/np.mean(dt*A),), 'sign'),
                        ((lambda dt, A: -1/np.sum(dt*A),), 'sum'), ((lambda dt, A: 1/(1 - np.exp(dt*A).mean()),), 'forgets')],
    'keep_one': lambda: [((np.full(20, .5),), 'All steps are alike'), ((STEPS(5, 2., 0.),), 'softplus'), ((STEPS(6, 2., .001),), 'keep token 6'), ((STEPS(5, 2., .2),), 'step too far'), ((STEPS(5, .1, .001),), 'what others wrote'),
                         ((STEPS(5, .4, .001),), 'write more')],
    'of_the_model': in_the_model,
    'segment_sums': lambda: [((lambda a: a.cumsum()[:, None] - a.cumsum(),), 'future is not masked'), ((sums(1, 1, 0),), 'power of 0 is 1'), ((lambda a: sums(1, 1)(a).T,), 'exchanged'), ((sums(0, 1),), 'begins with s'),
                             ((sums(1, 0),), 'ends before t'), ((divided,), 'products'), ((lambda a: np.exp(sums(1, 1)(a)),), 'holds logs')],
    'matrix_form': matrices,
    'chunked': lambda: [((chunkwise(carry=False),), 'empty memory'), ((chunkwise('none'),), 'read as it was'), ((chunkwise('before'),), 'only by the steps before'), ((chunkwise(keep=False),), 'from chunk to chunk'),
                        ((chunkwise(ends=False),), 'end of the chunk'), ((chunkwise(whole=True),), 'may be shorter')],
    'break_even': lambda: [((64,), 'decay multiplies'), ((192,), 'one product'), ((32.,), 'one pass'), ((100,), 'not it')],
    'hidden': lambda: [((of_head()[0].T,), 'turned'), ((of_head()[0] + of_head()[2]*np.eye(20),), 'bypass'), ((of_head(2, 0)[0],), 'head 0'), ((of_head(3)[0],), 'layer 3')],
    'adds': lambda: [((np.abs(of_head()[0][-1]),), 'weights: what they weigh'), ((of_head()[0][-1],), 'with their signs'), ((np.abs(of_head()[0][:, -1])*np.linalg.norm(of_head()[1], axis=1),), 'last row is what it reads'),
                     ((np.linalg.norm(of_head()[1], axis=1),), 'weights are missing'), ((of_head()[0][-1]*np.linalg.norm(of_head()[1], axis=1),), 'no sign')],
    'read_state': states, 'forget': forgets, 'mean_ablated': ablations, 'changed': changes, 'recovery': recoveries, 'jump': maps,
    'kept': shares_left, 'shares': whose, 'after_swap': swaps,
    'carriers': lambda: [(([2],), 'of 8 answers'), (([3],), 'of 8 answers'), (([1, 2, 3],), 'leave 1 out'), ((range(6),), 'leave 0 out'), (([7],), 'blocks 0 to 5'), ((...,), 'Nothing here yet')],
    'few_writes': few, 'two_memories': memories}
