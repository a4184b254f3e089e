import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from distributed_batchcam.data import DATASETS, Data, load_data
from distributed_batchcam.data import datasets as module
from distributed_batchcam.data.images import FileImages, TensorImages
from distributed_batchcam.errors import InputError

PARTS = ("train", "valid", "test")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def refuse(*args: object, **options: object) -> None:
        raise URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", refuse)


@pytest.fixture
def mnist(tmp_path, write_mnist):
    return write_mnist(tmp_path)


def rows(part):
    """The images of a part as a set, to compare parts by what is in them."""
    return {(part[i].numpy().tobytes(), int(part.targets[i])) for i in range(len(part))}


# --- what every data set has in common ---------------------------------------------------------------------


def test_unknown_name_offers_the_nearest():
    with pytest.raises(InputError, match=r"unknown dataset 'fashon_mnist'; did you mean fashion_mnist"):
        load_data("fashon_mnist")


def test_registry_has_the_promised_names():
    decoys = ["decoy_digits", "decoy_mnist", "decoy_fashion_mnist"]
    assert list(DATASETS) == ["digits", "mnist", "fashion_mnist", "cifar10", "imagefolder", *decoys]
    assert all(len(spec.mean) == len(spec.std) == spec.channels for spec in DATASETS.values())


@pytest.mark.parametrize(
    ("options", "matter"),
    [
        ({"image_size": 0}, "image size must be from 1 to 4096"),
        ({"image_size": 4097}, "image size must be from 1 to 4096"),
        ({"valid_size": -1}, "validation size must be 0"),
        ({"valid_size": 9}, "9 validation images cannot be held out of 1438 .* from 10 to 1428"),
        ({"valid_size": 1429}, "1429 validation images cannot be held out of 1438 .* from 10 to 1428"),
        ({"limit": 0}, "limit of images must be at least 1"),
        ({"limit": 9}, "limit of 9 images leaves classes without one; 10 at least"),
        ({"cache_images": "no"}, "always held in memory"),
        ({"cache_images": "maybe"}, "unknown value of cache_images 'maybe'"),
    ],
)
def test_option_out_of_range_is_refused(options, matter):
    with pytest.raises(InputError, match=matter) as caught:
        load_data("digits", **options)
    assert "\n" not in str(caught.value)


def test_default_validation_part_is_a_tenth_and_stratified(mnist):
    data = load_data("mnist", data_root=mnist)
    assert [len(data.train), len(data.valid), len(data.test)] == [180, 20, 50]
    assert torch.bincount(data.valid.targets).tolist() == [2] * 10
    whole = load_data("mnist", data_root=mnist, valid_size=0).train
    assert rows(data.train) | rows(data.valid) == rows(whole)
    assert not rows(data.train) & rows(data.valid)


def test_default_validation_part_is_at_most_5000(tmp_path, write_mnist, monkeypatch):
    monkeypatch.setattr(module, "_MAX_VALID_SIZE", 15)
    assert len(load_data("mnist", data_root=write_mnist(tmp_path)).valid) == 15


def test_default_validation_part_has_every_class(tmp_path, write_mnist):
    assert len(load_data("mnist", data_root=write_mnist(tmp_path, train=50)).valid) == 10


def test_validation_size_is_what_was_asked_for(mnist):
    data = load_data("mnist", data_root=mnist, valid_size=33)
    assert [len(data.train), len(data.valid)] == [167, 33]


@pytest.mark.parametrize("options", [{}, {"limit": 20}, {"image_size": 20}])
def test_without_validation_part_the_test_part_serves(mnist, options):
    data = load_data("mnist", data_root=mnist, valid_size=0, **options)
    assert data.valid is data.test


def test_split_does_not_depend_on_the_runs_seed(mnist):
    torch.manual_seed(1)
    first = load_data("mnist", data_root=mnist)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = load_data("mnist", data_root=mnist)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(getattr(first, part).images, getattr(second, part).images) for part in PARTS)


def test_limit_bounds_every_part_and_keeps_every_class(mnist):
    data = load_data("mnist", data_root=mnist, limit=15)
    for part in PARTS:
        images = getattr(data, part)
        assert len(images) == 15
        assert torch.bincount(images.targets, minlength=10).min() == 1
    whole = load_data("mnist", data_root=mnist)
    assert all(rows(getattr(data, part)) <= rows(getattr(whole, part)) for part in PARTS)


@pytest.mark.parametrize("size", [9, 28, 50])
def test_images_are_resized_once_and_rounded(mnist, size, monkeypatch):
    monkeypatch.setattr("distributed_batchcam.data.images._CHUNK_VALUES", 7 * size * size)
    native = load_data("mnist", data_root=mnist)
    data = load_data("mnist", data_root=mnist, image_size=size)
    assert data.image_size == size
    assert data.train.shape == (1, size, size)
    for part in PARTS:
        images = getattr(native, part).images.double()
        exact = F.interpolate(images, size=(size, size), mode="bilinear", antialias=True)
        read = getattr(data, part).images
        assert read.dtype == torch.uint8
        assert (read.double() - exact).abs().max() <= 0.5 + 1e-4
        assert torch.equal(getattr(data, part).targets, getattr(native, part).targets)


def test_more_images_than_memory_are_refused(mnist, monkeypatch):
    monkeypatch.setattr(module, "_MEMORY_BYTES", 250 * 784 - 1)
    with pytest.raises(InputError, match=r"choose a smaller image size or a limit$"):
        load_data("mnist", data_root=mnist)
    monkeypatch.setattr(module, "_MEMORY_BYTES", 250 * 784)
    load_data("mnist", data_root=mnist)
    load_data("mnist", data_root=mnist, valid_size=0)  # the test part counts once


def test_normalisation_is_per_channel(mnist):
    data = load_data("mnist", data_root=mnist)
    colour = Data("x", ("a", "b"), 2, 4, (0.1, 0.5), (0.2, 0.4), data.train, data.valid, data.test, None)
    images = torch.rand(3, 2, 4, 4)
    expected = torch.stack([(images[:, 0] - 0.1) / 0.2, (images[:, 1] - 0.5) / 0.4], 1)
    torch.testing.assert_close(colour.normalize(images), expected)
    assert colour.normalize(images.double()).dtype == torch.float64
    assert colour.normalize(images.to("meta")).device.type == "meta"
    assert colour.num_classes == 2


def test_normalisation_first_used_in_inference_serves_in_training():
    data = load_data("digits", limit=10)
    images = torch.rand(1, 1, 28, 28, requires_grad=True)
    with torch.inference_mode():
        data.normalize(images)
    data.normalize(images).sum().backward()
    torch.testing.assert_close(images.grad, torch.full_like(images, 1 / data.std[0]))


# --- digits ------------------------------------------------------------------------------------------------


def test_digits_need_no_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BATCHCAM_DATA", str(tmp_path / "gone"))
    data = load_data("digits")
    assert (data.name, data.channels, data.image_size, data.data_root) == ("digits", 1, 28, None)
    assert data.classes == tuple("0123456789")
    assert [len(data.train), len(data.valid), len(data.test)] == [1295, 143, 359]
    assert all(torch.bincount(getattr(data, part).targets).min() > 0 for part in PARTS)
    assert os.listdir(tmp_path) == []


def test_digits_have_their_own_test_part_and_levels():
    from sklearn.datasets import load_digits

    data = load_data("digits", image_size=8, valid_size=0)
    images = torch.cat([data.train.images, data.test.images])
    assert (images.min(), images.max()) == (0, 255)
    assert torch.bincount(images.flatten().long()).count_nonzero() == 17
    found = load_digits()
    expected = {
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(target))
        for image, target in zip(found.images, found.target, strict=True)
    }
    assert rows(data.train) | rows(data.test) == expected


def test_constants_of_digits_are_those_of_the_training_part():
    data = load_data("digits", valid_size=0)
    values = data.train.images.double() / 255
    assert data.mean[0] == pytest.approx(float(values.mean()), abs=1e-4)
    assert data.std[0] == pytest.approx(float(values.std()), abs=1e-4)


# --- MNIST and Fashion-MNIST -------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "folder", "label", "mean"),
    [("mnist", "MNIST", "9", 0.1307), ("fashion_mnist", "FashionMNIST", "Ankle boot", 0.286)],
)
def test_idx_files_are_read_and_nothing_is_written(tmp_path, write_mnist, name, folder, label, mean, suffix):
    root = write_mnist(tmp_path, folder, suffix=suffix)
    before = sorted(root.rglob("*"))
    data = load_data(name, data_root=root, valid_size=0)
    assert sorted(root.rglob("*")) == before
    assert (data.classes[9], data.mean, data.channels, data.data_root) == (label, (mean,), 1, root)
    random = np.random.default_rng(0)
    for part, count in (("train", 200), ("test", 50)):
        images = getattr(data, part)
        expected = random.integers(0, 256, (count, 28, 28)).astype(np.uint8)
        assert torch.equal(images.images, torch.from_numpy(expected)[:, None])
        assert torch.equal(images.targets, torch.arange(count) % 10)


def test_the_variable_names_the_root(mnist, monkeypatch):
    monkeypatch.setenv("BATCHCAM_DATA", str(mnist))
    assert load_data("mnist").data_root == mnist


def test_torchvision_and_sklearn_stay_out_where_they_are_not_needed(mnist):
    script = (
        "import sys; from distributed_batchcam.data import load_data; load_data('mnist', image_size=14)\n"
        "print([name for name in ('torchvision', 'sklearn', 'pandas') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "BATCHCAM_DATA": str(mnist), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "[]\n"


def test_no_download_is_tried_where_the_files_are(mnist, monkeypatch, capsys):
    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("tried to download")

    monkeypatch.setattr("torchvision.datasets.MNIST", refuse)
    load_data("mnist", data_root=mnist)
    assert capsys.readouterr() == ("", "")


def test_failed_download_says_what_is_missing_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BATCHCAM_DATA", raising=False)
    with pytest.raises(InputError, match=r"mnist: MNIST/raw/train-images.*not found in .*data.*no network") as caught:
        load_data("mnist")
    assert "--data-root" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_only_missing_files_are_downloaded(tmp_path, write_mnist, monkeypatch):
    import torchvision

    class Download:
        def __init__(self, root: Path, download: bool) -> None:
            assert download
            write_mnist(root, train=30)

    monkeypatch.setattr(torchvision.datasets, "MNIST", Download)
    root = write_mnist(tmp_path, test=20)
    for lost in root.glob("MNIST/raw/train*"):
        lost.unlink()
    data = load_data("mnist", data_root=root, valid_size=0)
    assert [len(data.train), len(data.test)] == [30, 20]
    assert os.listdir(root) == ["MNIST"]


def test_named_folder_that_is_not_there_is_not_downloaded_into(tmp_path, capsys):
    with pytest.raises(InputError, match="no folder"):
        load_data("mnist", data_root=tmp_path / "gone")
    assert capsys.readouterr().err == ""
    assert os.listdir(tmp_path) == []


def test_images_and_labels_of_different_counts(mnist, write_idx):
    write_idx(mnist / "MNIST/raw/train-labels-idx1-ubyte.gz", np.arange(199) % 10)
    with pytest.raises(InputError, match=r"train-images-.*holds 200 images, .*train-labels-.* 199 labels"):
        load_data("mnist", data_root=mnist)


def test_label_out_of_range(mnist, write_idx):
    write_idx(mnist / "MNIST/raw/t10k-labels-idx1-ubyte.gz", np.arange(50) % 11)
    with pytest.raises(InputError, match=r"t10k-labels-.* holds the label 10; labels go to 9"):
        load_data("mnist", data_root=mnist)


def test_class_without_a_training_image_is_named(tmp_path, write_mnist, write_idx):
    root = write_mnist(tmp_path, "FashionMNIST")
    write_idx(root / "FashionMNIST/raw/train-labels-idx1-ubyte.gz", np.arange(200) % 9)
    with pytest.raises(InputError, match="no training image of class Ankle boot"):
        load_data("fashion_mnist", data_root=root, valid_size=0)
    with pytest.raises(InputError, match="class 'Ankle boot' has 0 image"):
        load_data("fashion_mnist", data_root=root)


def test_images_of_another_size(mnist, write_idx):
    write_idx(mnist / "MNIST/raw/train-images-idx3-ubyte.gz", np.zeros((200, 27, 28)))
    with pytest.raises(InputError, match="images of 27×28, not 28×28"):
        load_data("mnist", data_root=mnist)


def test_damaged_file_is_named(mnist):
    path = mnist / "MNIST/raw/train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz cannot be read"):
        load_data("mnist", data_root=mnist)


@pytest.mark.parametrize(("name", "folder"), [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_the_real_files_have_the_documented_constants(name, folder):
    root = os.environ.get("BATCHCAM_DATA")
    if not root or not Path(root, folder).is_dir():
        pytest.skip(f"needs the real {folder} in $BATCHCAM_DATA")
    data = load_data(name)
    assert [len(data.train), len(data.valid), len(data.test)] == [55_000, 5_000, 10_000]
    whole = torch.cat([data.train.images, data.valid.images]).double() / 255
    assert float(whole.mean()) == pytest.approx(data.mean[0], abs=1e-4)
    assert float(whole.std()) == pytest.approx(data.std[0], abs=1e-4)


# --- CIFAR-10 ----------------------------------------------------------------------------------------------


class Trap:
    """A pickle that tells when it is loaded."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A small CIFAR-10 whose md5 sums torchvision is told; as pixels, the numbers of the images."""
    from torchvision.datasets import CIFAR10

    monkeypatch.chdir(tmp_path)
    root = tmp_path / "sets"
    folder = root / CIFAR10.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)

    def write(name: str, content: object) -> str:
        data = pickle.dumps(content)
        (folder / name).write_bytes(data)
        return hashlib.md5(data).hexdigest()

    def batch() -> dict[str, object]:
        return {
            "data": random.integers(0, 256, (20, 3072), dtype=np.uint8),
            "labels": [i % 10 for i in range(20)],
        }

    names = [[f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]]
    train, test = ([[name, write(name, batch())] for name in part] for part in names)
    monkeypatch.setattr(CIFAR10, "train_list", train)
    monkeypatch.setattr(CIFAR10, "test_list", test)
    labels = {"label_names": [f"thing {i}" for i in range(10)]}
    meta = {"filename": "batches.meta", "key": "label_names", "md5": write("batches.meta", labels)}
    monkeypatch.setattr(CIFAR10, "meta", meta)
    return root


def test_cifar_is_read(cifar):
    data = load_data("cifar10", data_root=cifar, valid_size=0)
    assert (data.channels, data.image_size, data.classes[3]) == (3, 32, "thing 3")
    assert [len(data.train), len(data.test)] == [100, 20]
    expected = np.random.default_rng(0).integers(0, 256, (20, 3072), dtype=np.uint8)
    assert torch.equal(data.train.images[:20], torch.from_numpy(expected).view(20, 3, 32, 32))
    assert data.train.targets[:12].tolist() == [*range(10), 0, 1]
    assert data.train.targets.dtype == torch.int64


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_damaged_cifar_is_refused_before_it_is_unpickled(cifar, name):
    (cifar / "cifar-10-batches-py" / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(InputError, match=r"cifar10: a file in .*cifar-10-batches-py is damaged"):
        load_data("cifar10", data_root=cifar)
    assert not Path("unpickled").exists()


def test_missing_cifar_file_is_named(cifar):
    (cifar / "cifar-10-batches-py" / "data_batch_3").unlink()
    before = sorted(cifar.rglob("*"))
    with pytest.raises(InputError, match=r"cifar10: cifar-10-batches-py/data_batch_3 not found .*no network"):
        load_data("cifar10", data_root=cifar)
    assert sorted(cifar.rglob("*")) == before


def test_cifar_archive_is_unpacked_without_a_download(cifar, monkeypatch):
    from torchvision.datasets import CIFAR10

    folder = cifar / CIFAR10.base_folder
    archive = cifar / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder, CIFAR10.base_folder)
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    assert len(load_data("cifar10", data_root=cifar, valid_size=0).train) == 100
    assert sorted(os.listdir(cifar)) == [CIFAR10.base_folder, CIFAR10.filename]


# --- folders of images -------------------------------------------------------------------------------------


def test_image_folder_without_parts_is_split(tmp_path, write_images):
    root = write_images(tmp_path, ("ant", "bee", "cow"), count=20)
    data = load_data("imagefolder", data_root=root, image_size=8)
    assert (data.classes, data.channels, data.data_root) == (("ant", "bee", "cow"), 3, root)
    counts = [torch.bincount(getattr(data, part).targets).tolist() for part in PARTS]
    assert counts[2] == [4, 4, 4]
    assert [sum(count) for count in counts] == [44, 4, 12]
    assert min(counts[1]) == 1
    assert not rows(data.train) & rows(data.test)


def test_image_folder_has_224_pixels_by_default(tmp_path, write_images):
    assert load_data("imagefolder", data_root=write_images(tmp_path)).train.shape == (3, 224, 224)


def test_image_folder_brings_its_parts(tmp_path, write_images):
    for name, count in (("train", 6), ("val", 4), ("test", 5)):
        write_images(tmp_path / name, count=count)
    data = load_data("imagefolder", data_root=tmp_path, image_size=8)
    assert [len(data.train), len(data.valid), len(data.test)] == [12, 8, 10]
    paper = load_data("imagefolder", data_root=tmp_path, image_size=8, valid_size=0)
    assert paper.valid is paper.test
    assert [len(paper.train), len(paper.test)] == [12, 10]
    with pytest.raises(InputError, match="brings 8 validation images of its own"):
        load_data("imagefolder", data_root=tmp_path, image_size=8, valid_size=4)


def test_val_folder_alone_is_the_test_part(tmp_path, write_images):
    for name, count in (("train", 10), ("val", 4)):
        write_images(tmp_path / name, count=count)
    data = load_data("imagefolder", data_root=tmp_path, image_size=8)
    assert [len(data.train), len(data.valid), len(data.test)] == [18, 2, 8]


def test_images_in_memory_and_streamed_are_the_same(tmp_path, write_images):
    root = write_images(tmp_path, count=40)
    cached = load_data("imagefolder", data_root=root, image_size=8, cache_images="yes")
    streamed = load_data("imagefolder", data_root=root, image_size=8, cache_images="no")
    for part in PARTS:
        decoded, files = getattr(cached, part), getattr(streamed, part)
        assert isinstance(decoded, TensorImages)
        assert isinstance(files, FileImages)
        assert torch.equal(decoded.images, torch.stack([files[i] for i in range(len(files))]))
        assert torch.equal(decoded.targets, files.targets)


def test_images_are_cached_up_to_a_limit(tmp_path, write_images, monkeypatch):
    root = write_images(tmp_path, count=10)
    needed = 20 * 3 * 8 * 8
    for limit, kind in ((needed, TensorImages), (needed - 1, FileImages)):
        monkeypatch.setattr(module, "_AUTO_CACHE_BYTES", limit)
        data = load_data("imagefolder", data_root=root, image_size=8)
        assert all(type(getattr(data, part)) is kind for part in PARTS)
    monkeypatch.setattr(module, "_MEMORY_BYTES", needed - 1)
    with pytest.raises(InputError, match="or do not cache them"):
        load_data("imagefolder", data_root=root, image_size=8, cache_images="yes")


def test_limit_spares_the_decoding(tmp_path, write_images):
    root = write_images(tmp_path, count=20)
    for folder in ("cat", "dog"):
        (root / folder / "9.png").write_bytes(b"damaged")  # the last by name
    assert len(load_data("imagefolder", data_root=root, image_size=8, limit=2).train) == 2


def test_damaged_image_is_named_when_it_is_read(tmp_path, write_images):
    root = write_images(tmp_path)
    for path in (root / "cat").iterdir():
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(InputError, match=r"image .*cat/\d\.png cannot be read"):
        load_data("imagefolder", data_root=root, image_size=8)
    streamed = load_data("imagefolder", data_root=root, image_size=8, cache_images="no")
    with pytest.raises(InputError, match=r"image .*cat/\d\.png cannot be read"):
        streamed.train[0]


def test_all_modes_become_rgb(tmp_path, write_images):
    root = write_images(tmp_path)
    Image.new("L", (9, 7)).save(root / "cat" / "grey.png")
    Image.new("RGBA", (9, 7)).save(root / "cat" / "alpha.png")
    assert load_data("imagefolder", data_root=root, image_size=8).train.shape == (3, 8, 8)


def test_class_with_too_few_images_is_named(tmp_path, write_images):
    write_images(tmp_path, ("many",))
    write_images(tmp_path, ("one",), count=1)
    with pytest.raises(InputError, match=r"class 'one' has 1 image.* for test; .*bring a test/ folder"):
        load_data("imagefolder", data_root=tmp_path)
    write_images(tmp_path, ("one",), count=2)
    with pytest.raises(InputError, match=r"class 'one' has 1 image.* for validation; .*validation size to 0"):
        load_data("imagefolder", data_root=tmp_path)
    load_data("imagefolder", data_root=tmp_path, valid_size=0)


def test_image_folder_is_not_looked_for_elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BATCHCAM_DATA", raising=False)
    with pytest.raises(InputError, match=r"no folder .*data; .*--data-root"):
        load_data("imagefolder")
