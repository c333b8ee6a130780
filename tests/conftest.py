import pytest
import torch

from circuitbench.load import load_model
from circuitbench.site import families

torch.set_num_threads(1)


@pytest.fixture(scope='session', params=sorted(families()))
def model(request):
    "A random model of each registered family."
    return load_model(f'mock://{request.param}-tiny')


@pytest.fixture
def ids():
    return torch.randint(0, 257, (2, 21), generator=torch.Generator().manual_seed(0))
