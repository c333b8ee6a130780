"""Open up state-space models and SSM-attention hybrids, the recurrent state after every step included."""

__version__ = "0.1.0"

from circuitbench.circuit import Circuit, extract_circuit
from circuitbench.edit import Edit, Edits
from circuitbench.hook import HookedModel
from circuitbench.listen import Cache, Generation, Output
from circuitbench.load import load_model
from circuitbench.sae import SAE
from circuitbench.site import SiteError
from circuitbench.steer import Steered, steer
from circuitbench.train import train_sae

__all__ = [
    "Cache", "Circuit", "Edit", "Edits", "Generation", "HookedModel", "Output", "SAE", "SiteError", "Steered",
    "extract_circuit", "load_model", "steer", "train_sae"]
