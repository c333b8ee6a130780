"""The prompts: splits do not overlap, draws repeat, and every answer is one token of the shipped tokenizer."""
import random

import pytest
from tokenizers import Tokenizer

from circuitbench.load import tiny_path
from circuitbench.task import fact_pairs, facts, indirect_object, induction, tables, text, training_line


@pytest.fixture(scope='module')
def tok():
    return Tokenizer.from_file(str(tiny_path('mamba2')/'tokenizer.json'))


def test_text_splits_are_the_whole_text_once():
    held, train = text('held'), text('train')
    assert len(held) == 623 and len(train) == 30479
    assert held[0].startswith('In the beginning') and train[-1].endswith('you all. Amen.')
    assert len(set(held) & set(train)) == 9    # the text repeats itself, word for word


def test_fact_splits_are_disjoint_and_complete():
    held, train = set(fact_pairs('held')), set(fact_pairs('train'))
    t = tables()
    assert not held & train and len(held) + len(train) == len(t['facts'])*len(t['wordings'])
    assert len(held) == 5*len(t['facts'])
    # every wording is seen in training with most facts, every fact in most wordings
    assert all(sum(j == k for _, j in train) >= 60 for k in range(len(t['wordings'])))


def test_training_lines_never_hold_a_held_out_fact():
    t, rng = tables(), random.Random(1)
    held = {t['wordings'][j].format(c=t['facts'][i][0], p=t['facts'][i][1]) for i, j in fact_pairs('held')}
    assert not held & {training_line('facts', rng) for _ in range(3000)}


def test_training_lines_never_hold_a_held_out_combination():
    rng = random.Random(1)
    lines = [training_line('indirect_object', rng) for _ in range(3000)]
    assert not any(line.startswith(p.text) for p in indirect_object(200) for line in lines)


@pytest.mark.parametrize('make', [lambda s: facts(n=20, seed=s), lambda s: indirect_object(20, seed=s), lambda s: induction(20, seed=s)])
def test_draws_repeat_by_seed(make):
    assert make(3) == make(3) != make(4)


@pytest.mark.parametrize('kind', ['facts', 'indirect_object', 'induction'])
def test_answers_are_one_token_and_pairs_are_aligned(kind, tok):
    for p in {'facts': lambda: facts('held') + facts('train', n=300), 'indirect_object': lambda: indirect_object(200), 'induction': lambda: induction(100)}[kind]():
        ids = tok.encode(p.text).ids
        for answer in (p.target, p.wrong):
            assert len(tok.encode(answer).ids) == 1
        assert tok.encode(p.text + p.target).ids == ids + tok.encode(p.target).ids
        corrupt = tok.encode(p.corrupt).ids
        assert len(corrupt) == len(ids) and corrupt != ids and p.wrong != p.target


def test_induction_answers_follow_the_string():
    for p in induction(50, length=12):
        for t, answer in ((p.text, p.target), (p.corrupt, p.wrong)):
            symbols = t.split()
            first = symbols.index(symbols[-1])
            assert symbols[first + 1] == answer.strip()


def test_indirect_object_answer_is_the_name_said_once():
    for p in indirect_object(100):
        assert p.text.count(p.target) == 1 and p.text.count(p.wrong) == 2
        assert p.corrupt.count(p.target) == 2 and p.corrupt.count(p.wrong) == 1


@pytest.mark.parametrize('call', [lambda: text('test'), lambda: facts('all'), lambda: facts(n=0), lambda: facts(n=10_000),
                                  lambda: facts(wording='no'), lambda: induction(1, length=2), lambda: induction(1, length=63),
                                  lambda: training_line('sums', random.Random(0))])
def test_bad_input_says_what_was_expected(call):
    with pytest.raises(ValueError, match='expected|see'):
        call()
