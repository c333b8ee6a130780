import pytest
import torch

from circuitbench.load import load_model
from circuitbench.site import families

torch.set_num_threads(1)


@pytest.fixture(scope='session', params=sorted(families()))
def model(request):
    "A random model of each registered family."
    return load_model(f'mock://{request.param}-tiny')


@pytest.fixture(scope='session', params=sorted(set(families()) - {'llama'}))
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
