import pytest
import torch

from circuitbench.load import load_model
from circuitbench.site import families

torch.set_num_threads(1)


@pytest.fixture(scope='session', params=sorted(families()))
def model(request):
    "A random model of each registered family."
    return load_model(f'mock://{request.param}-tiny')


def has_state(adapter):
    "Does a block of this family have a recurrent state?"
    try: config = adapter.small(257)
    except ImportError: return 'ssm.state' in adapter.inside            # transformers is too old for it: loading it says so
    return any('ssm.state' in adapter.block_sites(config, i) for i in range(config.num_hidden_layers))


@pytest.fixture(scope='session', params=[name for name, adapter in families().items() if has_state(adapter)])
def recurrent(request):
    "The same, families with a recurrence."
    return load_model(f'mock://{request.param}-tiny')


@pytest.fixture(scope='session', params=['mamba1', 'mamba2'])
def mamba(request):
    "The two for which `oracle` computes every site."
    return load_model(f'mock://{request.param}-tiny')


@pytest.fixture
def ids():
    return torch.randint(0, 257, (2, 21), generator=torch.Generator().manual_seed(0))
