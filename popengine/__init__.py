"""popengine: Partition-guided Online Pruning (arXiv 2602.06822) in plain PyTorch.

    import popengine

    engine = popengine.load("path/or/hub-id")
    for piece in engine.stream("Why is the sky blue?"):
        print(piece.text, end="")

Names are resolved on first use, so that `import popengine` does not import PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from popengine.engine.loading import load as load
    from popengine.engine.sampling_settings import Sampling as Sampling
    from popengine.studies.settings import PruningSettings as PruningSettings
    from weights.errors import InputError as InputError

__version__ = "0.1.0"
__all__ = ["InputError", "PruningSettings", "Sampling", "__version__", "load"]

PUBLIC = {
    "load": "popengine.engine.loading",
    "PruningSettings": "popengine.studies.settings",
    "Sampling": "popengine.engine.sampling_settings",
    "InputError": "weights.errors",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(PUBLIC[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *PUBLIC])
