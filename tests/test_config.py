"""Configuration: YAML and flags give one validated result, or one line of what is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from distributed_batchcam.config import RunConfig, make_config
from distributed_batchcam.errors import InputError


def test_resolved_yaml_repeats_the_configuration(tmp_path: Path) -> None:
    config = make_config(
        {"lr": "3e-3", "model": "resnet18", "ssim_exponents": ["1", "2", "0.5"], "pretrained": "w.pt"}
        | {"objective": "bcpl_l1+0.5rrr", "masks": "drawn/masks", "support": "0.1"}
    )
    tracked = make_config({"tracker": "wandb", "group": "a sweep", "tags": ["a", "b c"]})
    file = tmp_path / "config.yaml"
    for one in (config, tracked):
        file.write_text(one.to_yaml())
        assert make_config({}, file) == one


def test_flags_go_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("epochs: 7\nlr: 1e-2\n")
    config = make_config({"epochs": "2"}, file)
    assert (config.epochs, config.lr) == (2, 0.01)


def test_an_empty_file_is_all_defaults(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("# nothing yet\n")
    assert make_config({}, file) == RunConfig()


def test_every_option_has_a_line_of_documentation() -> None:
    undocumented = [name for name, field in RunConfig.model_fields.items() if not field.description]
    assert not undocumented


BAD = [
    ({"epoch": 3}, "unknown option 'epoch'; did you mean epochs"),
    ({"epochs": 0}, "--epochs 0: input should be greater than 0"),
    ({"epochs": 2.5}, "--epochs 2.5"),
    ({"epochs": True}, "--epochs True: needs a value"),
    ({"lr": float("nan")}, "--lr nan: input should be a finite number"),
    ({"lr": "fast"}, "--lr 'fast'"),
    ({"weight": -1}, "--weight -1"),
    ({"weight": float("inf")}, "--weight inf"),
    ({"weight": 0}, "--weight 0 makes bcpl_l1 a baseline"),
    ({"class_weight": 0, "objective": "baseline"}, "--class-weight 0 leaves nothing"),
    ({"batch_size": 0}, "--batch-size 0"),
    ({"batch_size": 10, "accumulate": 3}, "--batch-size 10 cannot be cut into --accumulate 3"),
    ({"objective": "bcpl_l3"}, "unknown objective 'bcpl_l3'; did you mean bcpl_l2 or bcpl_l1"),
    ({"objective": "bcpl_l1+pls"}, "unknown objective 'pls'; did you mean psl"),
    ({"objective": "baseline+psl"}, "objective 'baseline+psl': baseline adds nothing"),
    ({"objective": "psl+2psl"}, "objective 'psl+2psl' must name each loss once"),
    ({"objective": 3}, "--objective 3"),
    ({"objective": "bcpl_l1+10psl", "weight": 0}, "--weight 0 makes bcpl_l1+10psl a baseline"),
    ({"support": 0}, "--support 0"),
    ({"support": 1}, "--support 1"),
    ({"masks": True}, "--masks True: needs a value"),
    ({"dataset": "mnits"}, "unknown dataset 'mnits'; did you mean mnist"),
    ({"precision": "fp8"}, "--precision 'fp8': input should be 'no', 'fp16' or 'bf16'"),
    ({"momentum": 1.0}, "--momentum 1.0"),
    ({"margin": 0}, "--margin 0"),
    ({"ssim_exponents": [1, 1]}, "--ssim-exponents"),
    ({"seed": -1}, "--seed -1"),
    ({"resume": "auto"}, "--resume auto needs --out"),
    ({"tags": ["a"]}, "--tags is for --tracker wandb"),
    ({"group": "a", "tracker": "tensorboard"}, "--group is for --tracker wandb"),
    ({"tracker": "wandb", "tags": ["a", "b" * 65]}, "--tags 'bbb"),
    ({"tracker": "wandb", "tags": "a"}, "--tags 'a': input should be a valid tuple"),
    ({"tracker": "wandb", "group": ""}, "--group '': string should have at least 1 character"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_values_are_one_line_that_names_the_option(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        make_config(options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("!!python/object/apply:os.system ['touch ran']", "is not plain YAML in line 1"),
        ("lr: [1, 2", "is not plain YAML"),
        ("- a\n- b", "must hold 'option: value' lines, not a list"),
        ("epohcs: 3", "unknown option in"),
    ],
)
def test_bad_yaml_is_refused_and_never_run(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(InputError) as caught:
        make_config({}, file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_is_named() -> None:
    with pytest.raises(InputError, match=r"cannot read configuration nowhere\.yaml: No such file"):
        make_config({}, Path("nowhere.yaml"))


def test_saved_configuration_is_plain_yaml_without_the_place_of_the_run() -> None:
    saved = yaml.safe_load(RunConfig(out=Path("x")).to_yaml())
    assert saved.keys() == RunConfig.model_fields.keys() - {"out", "resume"}
