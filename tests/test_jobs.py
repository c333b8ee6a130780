"""Files of jobs: everything is checked first, what is done stays done, what was stopped goes on."""
import json

import pytest
import torch
from safetensors.torch import load_file

from circuitbench import cli, jobs
from circuitbench.jobs import read_config, run_config
from circuitbench.load import load_model
from circuitbench.train import train_sae

HEAD = 'out = "results"\nmodel = "mock://mamba2-tiny"\n'
TRAIN = HEAD + '[[job]]\nname = "coders"\nkind = "train_sae"\nlayer = 0\ntokens = 3000\nevery = 2\nsweep = { k = [2, 4], seed = [0, 1] }\n'


def config(folder, text):
    (folder/'c.toml').write_text(text)
    return folder/'c.toml'


def quiet(text): pass


def test_a_sweep_is_every_combination_and_each_the_functions_own(tmp_path):
    out, tasks = read_config(config(tmp_path, TRAIN))
    assert out == tmp_path/'results' and [t.name for t in tasks] == ['coders/k=2,seed=0', 'coders/k=2,seed=1', 'coders/k=4,seed=0', 'coders/k=4,seed=1']
    done = run_config(tmp_path/'c.toml', quiet)
    alone = train_sae(load_model('mock://mamba2-tiny'), layer=0, tokens=3000, k=4, seed=1, progress=False)
    kept = load_file(out/'coders'/'k=4,seed=1'/'sae'/'sae_weights.safetensors')
    assert torch.equal(kept['W_enc'], alone.W_enc) and done['coders/k=4,seed=1']['fve'] == pytest.approx(alone.metrics.fve)
    assert not list(out.rglob('checkpoint*')) and not list(out.rglob('*.tmp'))


def test_what_is_done_is_passed_over_and_what_was_stopped_goes_on(tmp_path, monkeypatch):
    "Stopped in the second training after its checkpoint: the first is not run again, the second ends as if nothing had been."
    file, calls, real = config(tmp_path, TRAIN), [], jobs.train_sae
    def stopping(model, **options):
        calls.append(options['seed'])
        def stop(step, figures):
            if len(calls) == 2 and step == 4: raise KeyboardInterrupt
        return real(model, **options, callback=stop)
    monkeypatch.setattr(jobs, 'train_sae', stopping)
    with pytest.raises(KeyboardInterrupt): run_config(file, quiet)
    assert len(calls) == 2 and [p.parent.name for p in tmp_path.rglob('result.json')] == ['k=2,seed=0'] and list(tmp_path.rglob('checkpoint*'))
    said = []
    results = run_config(file, said.append)
    assert said[0].endswith('done before') and len(results) == 4 and len(calls) == 5
    whole = train_sae(load_model('mock://mamba2-tiny'), layer=0, tokens=3000, k=2, seed=1, progress=False)
    assert torch.equal(load_file(tmp_path/'results'/'coders'/'k=2,seed=1'/'sae'/'sae_weights.safetensors')['W_dec'], whole.W_dec)


def test_the_table_of_a_stopped_truth_job_goes_on_by_case(tmp_path, monkeypatch):
    file = config(tmp_path, 'out = "r"\n[[job]]\nkind = "truth"\ncase = ["mqar-compiled", "mqar-untidy"]\nmethod = ["random"]\npairs = 4\n'.replace('mqar-untidy', second()))
    real, asked = jobs.truth_table, []
    def stopping(chosen, cases, *args, **options):
        asked.append(cases)
        if len(asked) == 2: raise KeyboardInterrupt
        return real(chosen, cases, *args, **options)
    monkeypatch.setattr(jobs, 'truth_table', stopping)
    with pytest.raises(KeyboardInterrupt): run_config(file, quiet)
    run_config(file, quiet)
    assert asked == [['mqar-compiled'], [second()], [second()]]
    from circuitbench.truth import TruthTable
    assert [r.case for r in TruthTable.load(tmp_path/'r'/'truth'/'table.json').rows] == ['mqar-compiled', second()]


def second():
    from circuitbench.truth import truth_names
    return next(n for n in truth_names() if n != 'mqar-compiled')


def test_a_report_job_writes_page_and_data(tmp_path):
    run_config(config(tmp_path, HEAD + '[[job]]\nkind = "report"\nprompt = "Hello there"\ntarget = "e"\n'), quiet)
    folder = tmp_path/'results'/'report'
    assert sorted(p.name for p in folder.iterdir()) == ['report.html', 'report.json', 'result.json', 'task.json']
    assert json.loads((folder/'report.json').read_text())['prompt'] == 'Hello there'


BAD = {'not TOML': ('out = ', 'cannot be read as TOML'), 'nothing': ('', r'without \[\[job\]\]'), 'no folder': ('[[job]]\nkind = "truth"\n', 'got out=None'),
       'a job that is a number': ('out = "r"\njob = [1]\n', 'expected a table'), 'another kind': (HEAD + '[[job]]\nkind = "trian_sae"\n', 'expected one of'),
       'a slip': (HEAD + '[[job]]\nkind = "train_sae"\nlayr = 1\n', "'layer' is near"), 'a slip above': ('outt = "r"\n[[job]]\nkind = "truth"\n', "'out' is near"),
       'a sweep of no list': (HEAD + '[[job]]\nkind = "train_sae"\nsweep = { k = 3 }\n', 'expected lists'), 'twice': (HEAD + '[[job]]\nkind = "train_sae"\nk = 2\nsweep = { k = [3] }\n', 'twice'),
       'two of a name': (HEAD + '[[job]]\nkind = "train_sae"\n[[job]]\nkind = "train_sae"\n', 'two tasks named'), 'a way out': (HEAD + '[[job]]\nkind = "train_sae"\nname = "../x"\n', 'a folder can have'),
       'no prompt': (HEAD + '[[job]]\nkind = "report"\ntarget = "e"\n', "without 'prompt'"), 'no model': ('out = "r"\n[[job]]\nkind = "train_sae"\n', 'got model=None')}


@pytest.mark.parametrize('text, message', BAD.values(), ids=BAD)
def test_what_cannot_be_is_said_before_anything_runs(text, message, tmp_path, capsys):
    with pytest.raises(ValueError, match=message): run_config(config(tmp_path, text), quiet)
    assert [p.name for p in tmp_path.iterdir()] == ['c.toml']
    assert cli.main(['run', str(tmp_path/'c.toml')]) == 2 and 'circuitbench: got' in capsys.readouterr().err


def test_results_of_another_task_are_not_overwritten(tmp_path):
    short = HEAD + '[[job]]\nkind = "truth"\ncase = ["mqar-compiled"]\nmethod = ["random"]\npairs = 4\n'
    run_config(config(tmp_path, short), quiet)
    before = (tmp_path/'results'/'truth'/'result.json').read_bytes()
    with pytest.raises(ValueError, match='which were begun there'): run_config(config(tmp_path, short.replace('pairs = 4', 'pairs = 5')), quiet)
    assert (tmp_path/'results'/'truth'/'result.json').read_bytes() == before
