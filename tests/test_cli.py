"""The command line: what it prints, what it leaves behind, and what it leaves behind when stopped."""
import json
import re
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from circuitbench import cli
from circuitbench.edit import patch
from circuitbench.load import load_model
from circuitbench.prompt_report import prompt_report
from circuitbench.truth import TruthTable


def test_models_lists_what_loads(capsys):
    from circuitbench.load import load_model
    assert cli.main(['models']) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines() if '://' in line.split()[0]]
    assert {'tiny://mamba2', 'mock://mamba2-tiny', 'mock://mamba1-tiny'} <= set(names)
    for name in names: load_model(name)


def test_sites_prints_the_table(capsys):
    assert cli.main(['sites', 'mock://mamba2-tiny']) == 0
    out = capsys.readouterr().out
    assert 'ssm.state' in out and 'd_state=8' in out


@pytest.mark.parametrize('argv', [['sites', 'mock://nobody-tiny'], ['quickstart', '--model', 'tiny://nobody'],
                                  ['quickstart', '--model', 'mock://mamba2-tiny', '--prompt', '', '--tokens', '2000']])
def test_errors_are_one_line_and_exit_code_2(argv, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 2
    err = [line for line in capsys.readouterr().err.splitlines() if line.startswith('circuitbench: got')]
    assert len(err) == 1 and not list(tmp_path.iterdir())


def test_an_interrupt_leaves_no_file(tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs): raise KeyboardInterrupt
    monkeypatch.setattr(cli, 'prompt_report', stop)
    out = tmp_path/'look.html'
    assert cli.main(['quickstart', '--model', 'mock://mamba2-tiny', '--tokens', '1000', '--out', str(out)]) == 130
    assert 'interrupted' in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_quickstart_on_a_random_model(tmp_path, capsys):
    out = tmp_path/'look.html'
    assert cli.main(['quickstart', '--model', 'mock://mamba2-tiny', '--tokens', '2000', '--out', str(out)]) == 0
    html, said = out.read_text(), capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ['look.html'] and '[6/6]' in said and 'try next' in said
    for heading in ('Inside one run', 'Sparse features', 'The layers behind the answer', 'Turning one feature up'):
        assert f'>{heading}<' in html
    assert not re.search(r'(src|href)="?https?:', html)


def test_the_entry_point_runs(capsys):
    (script,) = entry_points(group='console_scripts', name='circuitbench')
    assert script.load() is cli.main
    with pytest.raises(SystemExit) as end: cli.main(['--help'])
    assert end.value.code == 0 and 'quickstart' in capsys.readouterr().out


def test_truth_prints_and_saves_its_table(tmp_path, capsys):
    out = tmp_path/'table.json'
    argv = ['truth', '--case', 'mqar-compiled', '--method', 'random', '--method', 'EAP-IG, norms frozen', '--pairs', '16', '--out', str(out)]
    assert cli.main(argv) == 0
    said, table = capsys.readouterr().out, TruthTable.load(out)
    assert [r.method for r in table.rows] == ['random', 'EAP-IG, norms frozen'] and str(out) in said
    assert table.rows[1].edge_auroc == 1 > table.rows[0].edge_auroc


PROMPT = ['--prompt', 'Question: what is the capital of France? Answer:', '--target', ' Paris']


@pytest.mark.parametrize('model, prompt', [('tiny://mamba2', PROMPT), ('tiny://transformer', PROMPT), ('mock://rwkv7-tiny', ['--prompt', 'Hello there', '--target', 'e'])])
def test_a_report_is_a_page_and_the_same_numbers_as_json(model, prompt, tmp_path, capsys):
    page, data = tmp_path/'r.html', tmp_path/'r.json'
    assert cli.main(['report', model, *prompt, '--out', str(page), '--json', str(data)]) == 0
    html, body, said = page.read_text(), json.loads(data.read_text()), capsys.readouterr().out
    real = load_model(model)
    p = real.run(prompt[1]).last[0].double().softmax(-1)
    assert [n['token'] for n in body['next']] == real.strings(p.topk(3).indices) and abs(body['next'][0]['probability'] - float(p.max())) < 1e-4
    assert body['model'] == model and body['sites'] == real.site_names('*')
    assert body['circuit']['graph']['answers'][0].strip() in prompt[3]
    assert (body['states'] is None) == (not real.recurrent()) == ('Where the answer is carried' not in html)
    assert (body['coder'] is None) == (not model.startswith('tiny://')) == ('Sparse features' not in html)
    for heading in ('Inside one run', 'The layers behind the answer', 'Turning one feature up', 'Every site'): assert f'>{heading}<' in html
    assert not re.search(r'(src|href)="?https?:', html) and str(page) in said and str(data) in said and len(list(tmp_path.iterdir())) == 2


def test_a_report_of_two_prompts_that_do_not_fit_is_refused(tmp_path, capsys):
    assert cli.main(['report', 'tiny://mamba2', *PROMPT, '--corrupt', 'Hello', '--out', str(tmp_path/'r.html')]) == 2
    assert 'circuitbench: got' in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_states_of_a_report_are_patches(tmp_path):
    "The strongest patch it names is what a run with that state put in gives."
    found = prompt_report(load_model('tiny://mamba2'), PROMPT[1], PROMPT[3])
    m, p, (layer, step, head, value) = found.model, found.circuit.pairs, found.patches.top(1)[0]
    site = f'blocks.{layer}.ssm.state'
    states = m.run_with_cache(p.clean, site)[1][site]
    last = m.run(p.corrupt, edit=patch(site, states, at=step, heads=int(head))).last[0]
    assert abs(float(last[p.target[0]] - last[p.wrong[0]]) - value) < 1e-3


def test_completion_knows_every_command(capsys):
    assert cli.main(['completion', 'bash']) == 0
    out = capsys.readouterr().out
    assert all(c in out for c in cli._COMMANDS) and '--strength' in out


@pytest.mark.parametrize('command', [*cli._COMMANDS])
def test_help_teaches(command, capsys):
    with pytest.raises(SystemExit) as end: cli.main([command, '--help'])
    said = capsys.readouterr().out
    assert end.value.code == 0 and f'Example:\n  circuitbench {command}' in said


def test_the_course_is_written(tmp_path, capsys):
    assert cli.main(['course', str(tmp_path/'c')]) == 0
    made = sorted(p.name for p in (tmp_path/'c').iterdir())
    assert made == sorted(p.name for p in (Path(__file__).parents[1]/'nbs'/'course').glob('*.ipynb')) and made
    assert not any('BEGIN SOLUTION' in p.read_text() for p in (tmp_path/'c').iterdir())
