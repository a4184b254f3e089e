"""Imports point one way, and the mathematics needs torch alone.

The table below is the rule. It is checked by parsing, so a module is judged whether or not what it
imports is installed; a new module fails here until it has a place in the table.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import distributed_batchcam

PACKAGE = Path(distributed_batchcam.__file__).parent

# A module may import from the lines above its own, and within its own package (`data`, `report`).
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "checks", "collectives", "malloc"),
    ("cam",),
    ("class_sums", "distances", "prototypes", "metrics"),
    ("cam_loss",),
    ("right_reasons",),
    ("objectives",),
    ("heads",),
    ("models", "data"),
    ("config", "explainer"),
    ("measures",),
    ("evaluation", "explanations", "checkpoint", "runtime", "optim", "cuda_graph"),
    ("meter", "debug", "panel", "wandb_process"),
    ("agreement", "signals", "run_lock"),
    ("heartbeat",),
    ("tracking", "report", "run_directory", "training_state"),
    ("checkpoint_writer", "bad_steps"),
    ("evaluation_files", "explanation_files"),
    ("results", "run_data"),
    ("trainer",),
    ("evaluate_run", "doctor"),
    ("explain_run",),
    ("cli",),
    ("__main__",),
)
HEIGHT = {module: height for height, layer in enumerate(LAYERS) for module in layer}
CORE = [module for layer in LAYERS[:6] for module in layer]
HEAVY = (
    *("ray", "wandb", "timm", "accelerate", "torchvision", "matplotlib", "sklearn", "pydantic"),
    *("tensorboard", "safetensors", "yaml", "PIL", "tqdm"),
)


def imports(tree: ast.Module, package: str) -> Iterator[str]:
    """Absolute names of all that a module of `package` imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            # `from . import cam` names a module, `from .cam import grad_cam` stands in one.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(module: str, source: str) -> list[str]:
    """What `module` (dotted, without the package's name) must not import."""
    top = module.split(".")[0]
    if top not in HEIGHT:
        return [f"{module} has no place in LAYERS: add it to the table in {Path(__file__).name}"]
    is_package = (PACKAGE / Path(*module.split(".")) / "__init__.py").exists()
    here = ".".join(["distributed_batchcam", *module.split(".")][: None if is_package else -1])
    found = []
    for name in imports(ast.parse(source), here):
        root, *inner = name.split(".")
        if root in ("tune", "benchmarks") and (root, top) != ("tune", "cli"):
            found.append(f"{module} imports {root}, which stands on top of the package")
        elif root != "distributed_batchcam":
            if top in CORE and root != "torch" and root not in sys.stdlib_module_names:
                found.append(f"{module} imports {root}: it must need torch and the standard library alone")
        elif not inner or inner[0] not in HEIGHT:
            # Public names come from the package's front door, which may lead anywhere.
            if inner != ["__version__"]:
                found.append(f"{module} imports {name}: import it from the module where it stands")
        elif inner[0] != top and HEIGHT[inner[0]] >= HEIGHT[top]:
            found.append(f"{module} imports {inner[0]}, which is not in a layer below")
    return found


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name:  # The front door itself: see the tests on the lazy import.
            found[name] = path
    return found


@pytest.mark.parametrize("module", modules())
def test_imports_point_one_way(module: str) -> None:
    assert violations(module, modules()[module].read_text(encoding="utf-8")) == []


def test_every_core_module_is_there() -> None:
    assert set(CORE) <= set(modules())


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("cam", "from .checks import check_targets\nimport math, torch.nn as nn", None),
        ("objectives", "from distributed_batchcam.cam import grad_cam\nfrom . import class_sums", None),
        ("data.loader", "from .datasets import load\nfrom distributed_batchcam.errors import InputError", None),
        ("trainer", "import wandb\nfrom distributed_batchcam import __version__", None),
        ("cam", "from .objectives import Objective", "cam imports objectives, which is not in a layer below"),
        ("cam", "def f():\n    from . import trainer", "cam imports trainer, which is not in a layer below"),
        ("class_sums", "from .distances import ssim", "imports distances, which is not in a layer below"),
        ("objectives", "import distributed_batchcam.models as m", "objectives imports models"),
        ("models", "from .trainer import Trainer", "models imports trainer"),
        ("trainer", "import distributed_batchcam.cli", "trainer imports cli"),
        ("data.loader", "from distributed_batchcam.models import create_model", "data.loader imports models"),
        ("objectives", "from distributed_batchcam import BatchCAMLoss", "import it from the module where"),
        ("distances", "import numpy as np", "distances imports numpy: it must need torch"),
        ("checks", "try:\n    import pydantic\nexcept ImportError: pass", "checks imports pydantic"),
        ("objectives", "def f():\n    import timm", "objectives imports timm"),
        ("cli", "def f():\n    from tune.sweep import sweep", None),
        ("trainer", "from tune.space import Space", "trainer imports tune, which stands on top"),
        ("novelty", "", "novelty has no place in LAYERS: add it to the table in test_imports.py"),
    ],
)
def test_rule_finds_what_breaks_it(module: str, source: str, complaint: str | None) -> None:
    found = violations(module, source)
    if complaint is None:
        assert found == []
    else:
        assert len(found) == 1
        assert complaint in found[0]


def run(code: str) -> None:
    finished = subprocess.run(
        [sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr


def test_importing_the_package_imports_no_torch() -> None:
    run(
        "import sys, distributed_batchcam as b\n"
        "assert b.__version__ and 'BatchCAMLoss' in dir(b)\n"
        f"heavy = {('torch', 'numpy', *HEAVY)!r}\n"
        "assert not (found := [name for name in heavy if name in sys.modules]), found"
    )


def test_core_works_where_nothing_but_torch_is_installed() -> None:
    run(
        f"import sys; sys.modules.update(dict.fromkeys({HEAVY!r}))\n"
        "import torch\n"
        "from distributed_batchcam import (\n"
        "    BatchCAMLoss, ContrastiveCAMLoss, MaskedGradCAMLoss, PrototypeDepartureLoss, PrototypeLoss,\n"
        "    PrototypeSupportLoss, RightReasonsLoss, class_cams, compute_prototypes, grad_cam)\n"
        "from distributed_batchcam.objectives import CAMLossOptions, OBJECTIVES, Objective\n"
        "images, targets = torch.rand(4, 1, 6, 6), torch.tensor([0, 1, 2, 0])\n"
        "prototypes = compute_prototypes(images, targets, 3)\n"
        "features = torch.cat([images.requires_grad_(), images.square()], 1)\n"
        "logits = features.mean((2, 3)) @ torch.rand(2, 3)\n"
        "assert grad_cam(logits, features).shape == (4, 6, 6)\n"
        "assert class_cams(logits, features, targets, 3).maps.shape == (3, 6, 6)\n"
        "losses = PrototypeLoss(prototypes), BatchCAMLoss(prototypes), ContrastiveCAMLoss()\n"
        "means = torch.rand_like(prototypes)\n"
        "for loss in (*losses, PrototypeSupportLoss(prototypes), PrototypeDepartureLoss(prototypes, means)):\n"
        "    assert loss(logits, features, targets, images).isfinite()\n"
        "masks = torch.ones(4, 6, 6)\n"
        "for loss in (RightReasonsLoss(), MaskedGradCAMLoss()):\n"
        "    assert loss(logits, features, targets, images, masks=masks).isfinite()\n"
        "options = CAMLossOptions(class_means=lambda: means)\n"
        "for name in OBJECTIVES:\n"
        "    parts = Objective(name, prototypes, options=options)(logits, features, targets, images, masks=masks)\n"
        "    parts.total.backward(retain_graph=True)\n"
    )


def test_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'grad_cams'"):
        _ = distributed_batchcam.grad_cams


def test_every_public_name_is_where_the_front_door_says() -> None:
    pytest.importorskip("timm", reason="create_model stands beside timm's models")
    for name in distributed_batchcam.__all__:
        assert getattr(distributed_batchcam, name).__name__ == name
