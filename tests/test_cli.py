"""The command line: what it prints, what it leaves behind, and what it leaves behind when stopped."""
import re
from importlib.metadata import entry_points

import pytest

from circuitbench import cli
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
    monkeypatch.setattr(cli, 'extract_circuit', stop)
    out = tmp_path/'look.html'
    assert cli.main(['quickstart', '--model', 'mock://mamba2-tiny', '--tokens', '1000', '--out', str(out)]) == 130
    assert 'interrupted' in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_quickstart_on_a_random_model(tmp_path, capsys):
    out = tmp_path/'look.html'
    assert cli.main(['quickstart', '--model', 'mock://mamba2-tiny', '--tokens', '2000', '--out', str(out)]) == 0
    html, said = out.read_text(), capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ['look.html'] and '[5/5]' in said and 'try next' in said
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
