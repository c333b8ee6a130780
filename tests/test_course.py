"""The course: every unit runs and its checks agree with its solutions, students get no solution, and a check says what is wrong with a wrong answer."""
import importlib
import json
import os
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from circuitbench import course
from circuitbench.course import BEGIN, END, exercises, read_unit, slides, student_version

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


@pytest.mark.parametrize('path', UNITS, ids=lambda p: p.stem)
def test_a_student_gets_no_solution_and_runs_up_to_the_first_exercise(path, tmp_path):
    given, slide = student_version(path, tmp_path/path.name), slides(path, tmp_path/'slides.html').read_text()
    nb, text = read_unit(given), given.read_text()
    assert BEGIN not in text and END not in text and course.TEACHER not in text
    for e in exercises(read_unit(path)):
        inside = re.findall(f'{BEGIN}\n(.*?){END}', e.solution, re.S)
        for line in {s.strip() for part in inside for s in part.splitlines()} - {''}:
            if len(line) > 12 and line not in e.stub:
                assert json.dumps(line)[1:-1] not in text, line
                assert line not in slide, line
    for c in nb['cells']:
        if course.is_check(c) or course.YOURS in c['source']: assert not c['outputs'], c['source']
    first = next(i for i, c in enumerate(nb['cells']) if course.is_check(c))
    nb['cells'] = nb['cells'][:first + 1]
    cells, error = executed(course.write_unit(tmp_path/'first.ipynb', nb))
    assert error is None or course.YOURS[6:25] in error, error
    if error is None: assert said(cells[-1])[0].startswith('Not yet.')


@pytest.mark.parametrize('name', [e.name for p in UNITS for e in exercises(read_unit(p))])
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


def test_marks_that_do_not_pair_are_refused():
    for source in (f'{BEGIN}\nx = 1', f'x = 1\n{END}', f'{BEGIN}\n{BEGIN}\n{END}'):
        with pytest.raises(ValueError, match='SOLUTION'): course.cleared(source)


WRONG = {}
