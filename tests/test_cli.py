"""The command line: bad input is one line and status 2, with nothing left behind."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launching import SMALL, batchcam, environment
from PIL import Image

from distributed_batchcam import compute_prototypes, create_model
from distributed_batchcam.cli import run
from distributed_batchcam.config import RunConfig, make_config
from distributed_batchcam.data import load_data, load_prototypes, random_selection, save_prototype_images
from distributed_batchcam.errors import InputError
from distributed_batchcam.runtime import EMULATED_BF16
from distributed_batchcam.trainer import _allow_double_backward


def image_folder(root: Path, classes: dict[str, int]) -> Path:
    for name, count in classes.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            Image.new("RGB", (12, 12), (20 * index, 100, 50)).save(root / name / f"{index}.png")
    return root


BAD_FLAGS = [
    (["--modle", "resnet18"], "unknown option '--modle'; did you mean --model"),
    (["--model", "resnt18"], "unknown model 'resnt18'; did you mean resnet18"),
    (["--dataset", "mnits"], "unknown dataset 'mnits'; did you mean mnist"),
    (["--objective", "bcpl"], "unknown objective 'bcpl'"),
    (["--epochs", "-1"], "--epochs '-1': input should be greater than 0"),
    (["--lr", "nan"], "--lr 'nan': input should be a finite number"),
    (["--weight", "0"], "--weight 0 makes bcpl_l1 a baseline"),
    (["--epochs"], "argument --epochs: expected one argument"),
    (["digits"], "'digits' belongs to no option"),
    (["--batch-size", "100000"], "--batch-size 100000 is larger than the training set of 1,29"),
    (["--image-size", "2"], "simple_cnn needs images of at least 4×4 pixels"),
    (["--model", "convnextv2_tiny", "--image-size", "8"], "convnextv2_tiny cannot take 8×8 images"),
    (["--target-layer", "conv3"], "unknown target layer of simple_cnn 'conv3'; did you mean conv2"),
    (["--precision", "fp16"], "--precision fp16 needs a GPU"),
    (["--sync-batchnorm"], "--sync-batchnorm needs GPUs"),
    (["--valid-size", "5"], "valid"),
    (["--prototypes", "/nowhere"], "/nowhere"),
    (["--objective", "bcpl_l1+pls"], "unknown objective 'pls'; did you mean psl"),
    (["--objective", "rrr"], "--objective rrr needs --masks FOLDER: digits brings no masks of its own"),
    (["--objective", "psl+rrr_g"], "--objective psl+rrr_g needs --masks FOLDER"),
    (["--objective", "rrr", "--masks", "/nowhere"], "no folder /nowhere; name the one with the masks"),
    (["--objective", "rrr", "--dataset", "decoy_digits", "--compile"], "leave --compile out"),
    (["--dataset", "mnist", "--data-root", "/nowhere"], "/nowhere"),
    (["--config", "/nowhere.yaml"], "cannot read configuration /nowhere.yaml"),
]


@pytest.mark.parametrize(("flags", "message"), BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_bad_input_is_one_line_with_status_2_and_leaves_nothing(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(["train", *SMALL, "--out", str(out), *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("batchcam: error: ")
    assert message in said
    assert "\n" not in said
    assert not out.exists()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks for a GPU that Linux CI does not have")
def test_a_missing_gpu_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert run(["train", "--device", "cuda"]) == 2
    assert "no GPU is visible" in capsys.readouterr().err


def test_out_that_is_a_file_or_another_run_or_full_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, other, full = tmp_path / "file", tmp_path / "other", tmp_path / "full"
    file.write_text("mine")
    other.mkdir()
    (other / "config.yaml").write_text("epochs: 3\n")
    full.mkdir()
    (full / "thesis.tex").write_text("mine")
    for out, message in (
        (file, "is a file"),
        (other, "holds another run"),
        (full, "is not empty"),
        (file / "x", "file"),
    ):
        assert run(["train", *SMALL, "--out", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert file.read_text() == "mine"
    assert [path.name for path in full.iterdir()] == ["thesis.tex"]
    assert (other / "config.yaml").read_text() == "epochs: 3\n"


def test_a_class_without_a_training_image_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = image_folder(tmp_path / "data", {"cat": 8, "dog": 8})
    (root / "owl").mkdir()
    assert run(["train", "--dataset", "imagefolder", "--data-root", str(root), "--out", str(tmp_path / "run")]) == 2
    assert "owl" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = image_folder(tmp_path / "data", {"cat": 12, "dog": 12})
    whole = (root / "cat/3.png").read_bytes()
    (root / "cat/3.png").write_bytes(whole[: len(whole) // 2])
    options = ["--image-size", "16", "--batch-size", "4", "--valid-size", "2"]
    assert (
        run(["train", "--dataset", "imagefolder", "--data-root", str(root), *options, "--out", str(tmp_path / "r")])
        == 2
    )
    said = capsys.readouterr().err
    assert "3.png" in said
    assert said.count("\n") == 1
    assert not (tmp_path / "r").exists()


def test_a_folder_of_coloured_images_with_odd_class_names_trains_and_evaluates(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data", {"<script>alert(1)<": 12, "$\\frac{": 12, "naïve 猫": 12})
    out = tmp_path / "run"
    options = ["--image-size", "16", "--batch-size", "8", "--valid-size", "3", "--epochs", "1", "--device", "cpu"]
    arguments = ["train", "--dataset", "imagefolder", "--data-root", str(root), "--out", str(out), *options]
    assert run(arguments) == 0
    assert run(["evaluate", str(out), "--device", "cpu"]) == 0
    assert run(["evaluate", str(out), "--device", "cpu", "--split", "valid"]) == 0
    streamed = [*arguments[:6], str(tmp_path / "streamed"), *options, "--cache-images", "no", "--workers", "2"]
    assert run(streamed) == 0
    losses = [(path / "metrics.jsonl").read_text().splitlines()[0] for path in (out, tmp_path / "streamed")]
    assert json.loads(losses[0])["loss"] == json.loads(losses[1])["loss"]  # cached or streamed: the same images
    moved = tmp_path / "moved"
    shutil.move(root, moved)
    assert run(["evaluate", str(out), "--device", "cpu", "--data-root", str(moved)]) == 0
    assert run(["evaluate", str(out), "--device", "cpu"]) == 2


def test_unknown_commands_and_folders_that_are_no_runs_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["trian"]) == 2
    assert "unknown command 'trian'; did you mean train?" in capsys.readouterr().err
    assert run(["evaluate", str(tmp_path)]) == 2
    assert "is not a run directory" in capsys.readouterr().err


def test_help_names_every_command_and_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([]) == 0
    overview = capsys.readouterr().out
    assert all(command in overview for command in ("train", "evaluate", "doctor"))
    with pytest.raises(SystemExit) as exit_:
        run(["train", "--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name.replace('_', '-')}" in text for name in RunConfig.model_fields)


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys; from distributed_batchcam.cli import run; run([]); "
        "heavy = {'torch', 'timm', 'accelerate', 'torchvision', 'ray', 'wandb', 'matplotlib', 'sklearn'}; "
        "sys.exit(' '.join(sorted(heavy & set(sys.modules))) or 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert result.returncode == 0, result.stderr


def test_help_of_train_lists_the_objectives() -> None:
    said = " ".join(batchcam("train", "--help").stdout.split())
    assert "contrastive, psl, psl_margin, pdl, rrr, rrr_g)" in said


def test_input_gradients_with_shared_batch_statistics_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.SyncBatchNorm, "convert_sync_batchnorm", lambda model: model)  # GPUs only
    model = create_model("simple_cnn", image_size=16)
    config = make_config({"objective": "rrr", "sync_batchnorm": True})
    with pytest.raises(InputError, match="--objective rrr differentiates the network twice: leave --sync-batchnorm"):
        _allow_double_backward(config, model)


def test_prototypes_of_a_data_set_are_images_that_train_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new folder" / "prototypes"
    assert run(["prototypes", "--dataset", "digits", "--image-size", "16", "--out", str(out)]) == 0
    assert f"10 prototypes of 1,438 images in {out}" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == [f"{digit}.png" for digit in range(10)]
    data = load_data("digits", image_size=16, valid_size=0)
    expected = compute_prototypes(data.train.images.double() / 255, data.train.targets, 10)
    torch.testing.assert_close(load_prototypes(out, data.classes, 16).double(), expected, rtol=0, atol=0.51 / 255)
    assert run(["train", *SMALL, "--epochs", "1", "--prototypes", str(out), "--out", str(tmp_path / "run")]) == 0


def test_prototypes_of_a_few_images_are_drawn_by_the_seed(tmp_path: Path) -> None:
    def drawn(name: str, *flags: str) -> torch.Tensor:
        out = tmp_path / name
        assert run(["prototypes", "--dataset", "digits", "--per-class", "2", "--out", str(out), *flags]) == 0
        return load_prototypes(out, tuple("0123456789"), 8)

    first, same, other = drawn("a"), drawn("b", "--seed", "0"), drawn("c", "--seed", "1")
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    images = load_data("digits", valid_size=0).train
    images = images.subset(random_selection(images.targets, 2, tuple("0123456789"), 1))
    expected = compute_prototypes(images.images.double() / 255, images.targets, 10)
    found = load_prototypes(tmp_path / "c", tuple("0123456789"), expected.shape[1])
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=0.51 / 255)


def test_prototypes_of_classes_with_odd_names(tmp_path: Path) -> None:
    root = image_folder(tmp_path / "data", {"<script>alert(1)<": 12, "$\\frac{": 12, "naïve 猫": 12})
    for index, path in enumerate(sorted(root.rglob("*.png"))):
        image = Image.new("RGB", (12, 12), (20, 100, 50))
        image.putpixel((index % 12, 3), (255, 255, 255))
        image.save(path)
    out, data = tmp_path / "prototypes", ["--dataset", "imagefolder", "--data-root", str(root), "--image-size", "12"]
    assert run(["prototypes", *data, "--out", str(out)]) == 0
    options = ["--batch-size", "8", "--valid-size", "3", "--epochs", "1", "--device", "cpu", "--objective", "psl"]
    assert run(["train", *data, *options, "--prototypes", str(out), "--out", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize("support", ["0.4", "0.9"], ids=["nowhere below", "everywhere below"])
def test_prototypes_without_an_inside_or_an_outside_are_refused_for_psl(
    support: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "prototypes"
    folder.mkdir()
    save_prototype_images(folder, 0.5 + 0.3 * torch.rand(10, 16, 16), tuple("0123456789"))
    flags = ["--objective", "psl", "--support", support, "--prototypes", str(folder), "--out", str(tmp_path / "run")]
    assert run(["train", *SMALL, *flags]) == 2
    said = capsys.readouterr().err.strip()
    assert f"0, 1, 2, 3, 4, 5, 6, 7, 8, 9 are below the support {support} everywhere or nowhere" in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


def test_prototypes_that_training_images_do_not_depart_from_are_refused_for_pdl(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["train", *SMALL, "--objective", "pdl", "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.strip()
    assert "depart from the prototypes by 0.00 standard deviations at most" in said
    assert "nowhere by more than --departure 0.36: name another, or prototypes of images that are known" in said
    assert "\n" not in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset", "digist"], "unknown dataset 'digist'; did you mean digits"),
        (["--dataset", "digits", "--per-class", "1000"], "class '0' has 142 image(s), not 1000; choose fewer"),
        (["--dataset", "digits", "--per-class", "0"], "argument --per-class: must be at least 1, got 0"),
        (["--dataset", "digits", "--image-size", "0"], "argument --image-size: must be at least 1, got 0"),
        (["--dataset", "mnist", "--data-root", "/nowhere"], "/nowhere"),
        ([], "the following arguments are required: --dataset"),
    ],
)
def test_prototypes_that_cannot_be_are_one_line_and_leave_nothing(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["prototypes", *flags, "--out", str(tmp_path / "prototypes")]) == 2
    said = capsys.readouterr().err.strip()
    assert message in said
    assert "\n" not in said
    assert list(tmp_path.iterdir()) == []


def test_prototypes_overwrite_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "3.png").write_text("mine")
    assert run(["prototypes", "--dataset", "digits", "--out", str(tmp_path)]) == 2
    assert "exists already: name a new folder" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_doctor_says_what_is_there_and_what_to_do_about_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", "--data-root", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("ok       torch: ") for line in lines)
    assert any(line.startswith("missing  data: mnist: not in") for line in lines)
    assert all(line.startswith(("ok       ", "missing  ")) for line in lines)


@pytest.mark.parametrize(("capability", "emulated"), [("AVX2", True), ("AVX512", False), ("SVE256", False)])
def test_bf16_on_a_cpu_that_only_emulates_it_is_said_to_be_slow(
    capability: str, emulated: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    options = ["train", "--epochs", "1", "--batch-size", "512", "--device", "cpu", "--precision"]
    assert run([*options, "bf16", "--out", str(tmp_path / "bf16")]) == 0
    assert (EMULATED_BF16 in capsys.readouterr().err) == emulated
    assert run([*options, "no", "--out", str(tmp_path / "no")]) == 0
    assert EMULATED_BF16 not in capsys.readouterr().err
    assert run(["doctor"]) == 0
    assert (f"missing  bf16 on the cpu: {EMULATED_BF16}" in capsys.readouterr().out) == emulated


def test_a_traceback_never_reaches_a_user_with_bad_input() -> None:
    result = batchcam("train", "--model", "resnt18")
    assert result.returncode == 2
    assert result.stderr.startswith("batchcam: error: unknown model 'resnt18'")
    assert "Traceback" not in result.stderr


def test_the_handler_of_sigterm_is_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run(["train", "--epochs", "many"]) == 2
    assert signal.getsignal(signal.SIGTERM) is before
