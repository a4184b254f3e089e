"""Batch-CAM: train image classifiers whose Grad-CAM explanations look like class prototypes.

The public names load on first use, so that importing the package costs nothing and the
mathematics needs torch alone (no Accelerate, timm, Ray or W&B).
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cam import grad_cam
    from .class_sums import ClassCams, class_cams
    from .explain_run import explain, explain_classes
    from .explanation_files import save_explanations
    from .explanations import Explanations
    from .models import create_model
    from .objectives import BatchCAMLoss, ContrastiveCAMLoss, PrototypeLoss
    from .prototypes import compute_prototypes
    from .right_reasons import MaskedGradCAMLoss, PrototypeDepartureLoss, PrototypeSupportLoss, RightReasonsLoss

__version__ = "0.1.0"

_HOMES = {
    "grad_cam": "cam",
    "class_cams": "class_sums",
    "ClassCams": "class_sums",
    "compute_prototypes": "prototypes",
    "PrototypeLoss": "objectives",
    "BatchCAMLoss": "objectives",
    "ContrastiveCAMLoss": "objectives",
    "PrototypeDepartureLoss": "right_reasons",
    "PrototypeSupportLoss": "right_reasons",
    "RightReasonsLoss": "right_reasons",
    "MaskedGradCAMLoss": "right_reasons",
    "create_model": "models",
    "explain": "explain_run",
    "explain_classes": "explain_run",
    "Explanations": "explanations",
    "save_explanations": "explanation_files",
}

__all__ = [
    "BatchCAMLoss",
    "ClassCams",
    "ContrastiveCAMLoss",
    "Explanations",
    "MaskedGradCAMLoss",
    "PrototypeDepartureLoss",
    "PrototypeLoss",
    "PrototypeSupportLoss",
    "RightReasonsLoss",
    "class_cams",
    "compute_prototypes",
    "create_model",
    "explain",
    "explain_classes",
    "grad_cam",
    "save_explanations",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
