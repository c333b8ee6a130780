"""What a release consists of: the wheel, its files and its behaviour where nothing of this checkout is at hand; imports."""
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CFG = ConfigParser(delimiters=['='])
CFG.read(ROOT/'settings.ini')
CFG = CFG['DEFAULT']
NO_NETWORK = """
import socket
def refused(*args, **kwargs): raise AssertionError(f'the network was asked for: {args}')
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = socket.create_connection = refused
"""


def python(code, executable=sys.executable, **options):
    out = subprocess.run([executable, '-c', code], capture_output=True, text=True, **options)
    assert out.returncode == 0, out.stderr
    return out.stdout


def loaded(code, **options):
    "Top-level names of the modules that are loaded after some code."
    return set(python(f"{code}\nimport sys; print(*{{m.split('.')[0] for m in sys.modules}})", **options).split())


def test_the_package_alone_imports_nothing_heavy():
    assert not loaded('import circuitbench') & {'torch', 'transformers', 'numpy', 'scipy', 'ipywidgets', 'IPython', 'matplotlib'}


@pytest.mark.slow
def test_what_only_some_need_is_imported_when_it_is_used():
    rare = {'matplotlib', 'sklearn', 'pandas', 'datasets', 'sae_lens', 'gguf', 'networkx', 'nbdev', 'fastcore'}
    mine = loaded('from circuitbench import *') - loaded('import torch; from transformers import AutoModelForCausalLM, GenerationMixin')
    assert 'circuitbench' in mine and not mine & rare


def test_importing_asks_no_network():
    free = {k: v for k, v in os.environ.items() if k not in ('HF_HUB_OFFLINE', 'TRANSFORMERS_OFFLINE')}
    everything = "import circuitbench, pkgutil, importlib\nfor m in pkgutil.iter_modules(circuitbench.__path__): importlib.import_module('circuitbench.' + m.name)"
    python(f'{NO_NETWORK}\nfrom circuitbench import *\n{everything}', env=free)
    with pytest.raises(AssertionError, match='the network was asked for'):                 # the guard guards
        python(f"{NO_NETWORK}\nfrom huggingface_hub import HfApi; HfApi().model_info('gpt2')", env=free)


@pytest.mark.slow
def test_a_verb_stays_a_verb_though_a_module_has_its_name():
    python('import circuitbench.steer, circuitbench.cli\nfrom circuitbench import steer\nassert steer is circuitbench.steer.__globals__["steer"]')
    python('from circuitbench.steer import Steered\nimport circuitbench\nassert circuitbench.Steered is Steered and callable(circuitbench.steer)')
    python("import circuitbench\nassert set(circuitbench.__all__) <= set(dir(circuitbench)) and not hasattr(circuitbench, 'no_such_name')")


@pytest.mark.slow
def test_every_family_is_known_however_the_package_is_entered():
    known = python('from circuitbench.load import load_model\nfrom circuitbench.site import families\nprint(*families())')
    assert len(known.split()) > 15
    assert python('from circuitbench.site import families\nprint(*families())') == known
    python("from circuitbench import HookedModel\nfrom transformers import AutoModelForCausalLM, MambaConfig\n"
           "HookedModel(AutoModelForCausalLM.from_config(MambaConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1)))")


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    "The wheel of a copy of the tree, built with what is installed: nothing is fetched, nothing stale is in it."
    where = tmp_path_factory.mktemp('build')
    shutil.copytree(ROOT/'circuitbench', where/'circuitbench', ignore=shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints'))
    for name in ('setup.py', 'settings.ini', 'pyproject.toml', 'MANIFEST.in', 'LICENSE', 'README.md', 'CHANGELOG.md', 'THIRD_PARTY.md'):
        shutil.copy(ROOT/name, where)
    subprocess.run([sys.executable, '-m', 'build', '--wheel', '--no-isolation', '--outdir', where/'dist', where], check=True,
                   capture_output=True, text=True)
    return next((where/'dist').glob('*.whl'))


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as z: sizes = {i.filename: i.file_size for i in z.infolist()}
    info = f"{CFG['lib_name'].replace('-', '_')}-{CFG['version']}.dist-info"
    assert {n.split('/')[0] for n in sizes} == {'circuitbench', info}
    tracked = subprocess.run(['git', 'ls-files', 'circuitbench'], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert set(tracked) <= set(sizes), 'files of the package that package_data in setup.py does not name'
    assert not [n for n in sizes if n.startswith('circuitbench/') and Path(n).suffix not in
                {'.py', '.typed', '.js', '.md', '.json', '.jsonl', '.xz', '.safetensors'}]
    assert {f'{info}/licenses/LICENSE', f'{info}/licenses/THIRD_PARTY.md', f'{info}/entry_points.txt'} <= set(sizes)
    assert sum(n for f, n in sizes.items() if f.split('/')[1] in ('tiny', 'saes', 'truth')) < 60e6
    assert wheel.stat().st_size < 60e6


@pytest.fixture(scope='module')
def away(wheel, tmp_path_factory):
    "A folder elsewhere, with the Python of a virtual environment in it where the wheel is installed."
    where = tmp_path_factory.mktemp('elsewhere')
    venv = where/'venv'
    subprocess.run([sys.executable, '-m', 'venv', venv], check=True)
    site = Path(python("import sysconfig; print(sysconfig.get_path('purelib'), end='')", venv/'bin/python'))
    # what it depends on is taken from here: the .pth files there, of which one leads to the checkout, are not read
    (site/'dependencies.pth').write_text('\n'.join({sysconfig.get_path('purelib'), sysconfig.get_path('platlib')}))
    subprocess.run([venv/'bin/python', '-m', 'pip', 'install', '--quiet', '--no-index', '--no-deps', wheel], check=True, capture_output=True)
    return where


@pytest.mark.slow
def test_the_wheel_works_where_the_checkout_is_not(away):
    venv = away/'venv'
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'HF_HUB_OFFLINE': '1'}
    says = python("from circuitbench import load_model; import circuitbench, sys\nmodel = load_model('tiny://mamba2')\n"
                  "print(circuitbench.__file__, *sys.path, sep='\\n')\nprint(model.generate('In the beginning God created the', 2).text[0])",
                  venv/'bin/python', cwd=away, env=env).splitlines()
    assert says[0].startswith(str(venv)) and str(ROOT) not in says[1:-1] and says[-1].strip()
    out = subprocess.run([venv/'bin/circuitbench', 'models'], cwd=away, env=env, capture_output=True, text=True)
    assert out.returncode == 0 and 'tiny://mamba2' in out.stdout and 'mock://rwkv7-tiny' in out.stdout, out.stderr


USER = """
from circuitbench import Circuit, Edit, HookedModel, SAE, Steered, extract_circuit, load_model, steer, train_sae
from circuitbench.edit import zero

model: HookedModel = load_model('tiny://mamba2')
edit: Edit = zero('blocks.1.ssm.out')
out, cache = model.run_with_cache('In the beginning', 'blocks.*.ssm.out', edit=edit)
shape: tuple[int, ...] = tuple(cache['blocks.1.ssm.out'].shape) + tuple(out.logits.shape)
sae: SAE = train_sae(model, layer=1, k=8, expansion=2, tokens=2_000)
circuit: Circuit = extract_circuit(model, prompt='In the', target=' beginning')
pushed: Steered = steer(model, prompt='In the', feature_id=4, strength=2.0, sae=sae, layer=1)
print(model.generate('In the beginning', 4).text[0], circuit.top_layers(n=3), pushed.delta_norm, shape)
"""
WRONG = """
from circuitbench import load_model, no_such_name   # attr-defined
from circuitbench.edit import zero
model: int = load_model('tiny://mamba2')            # assignment
zero(3)                                             # arg-type
zero('logits').no_such_method()                     # attr-defined
"""


@pytest.mark.slow
def test_a_users_script_is_typed(away):
    (away/'user.py').write_text(USER)
    (away/'wrong.py').write_text(WRONG)
    (away/'mypy.ini').write_text('[mypy]\nstrict = True\n[mypy-transformers.*,huggingface_hub.*]\nfollow_imports = skip\n')   # minutes of it
    out = subprocess.run([sys.executable, '-m', 'mypy', '--python-executable', away/'venv/bin/python', 'user.py', 'wrong.py'],
                         cwd=away, capture_output=True, text=True)
    found = [line for line in out.stdout.splitlines() if ': error:' in line]
    want = [(i, line.split('# ')[1]) for i, line in enumerate(WRONG.splitlines(), 1) if '# ' in line]
    assert [(int(e.split(':')[1]), e.rsplit('[')[-1][:-1]) for e in found if e.startswith('wrong.py')] == want, out.stdout
    assert len(found) == len(want), out.stdout + out.stderr
