"""Open up state-space models and SSM-attention hybrids, the recurrent state after every step included."""

__version__ = "0.1.0"

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:                                        # what a type checker and an editor read
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

# name -> its module, imported when the name is first asked for: torch and transformers take seconds
_HOME = {
    "Circuit": "circuit", "extract_circuit": "circuit", "Edit": "edit", "Edits": "edit", "HookedModel": "hook",
    "Cache": "listen", "Generation": "listen", "Output": "listen", "load_model": "load", "SAE": "sae",
    "SiteError": "site", "Steered": "steer", "steer": "steer", "train_sae": "train"}


if not TYPE_CHECKING:                                    # to a type checker it would be every name
    def __getattr__(name: str) -> object:
        "A public name, on its first use."
        if name not in _HOME: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]: return sorted({*globals(), *__all__})


class _Package(ModuleType):
    "This package, in which `steer` is the verb though a module has its name."

    def __setattr__(self, name: str, value: object) -> None:
        "Importing a submodule sets it here under its name; where that is a public name, what it names is set."
        public = name in _HOME and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if public else value)


sys.modules[__name__].__class__ = _Package
