import shutil

import pytest

from distributed_batchcam.data.folders import read_folders
from distributed_batchcam.errors import InputError


def test_classes_are_the_sorted_folder_names(tmp_path, write_images):
    write_images(tmp_path, ("zebra", "ant", "Bee"), count=2)
    write_images(tmp_path, (".hidden",))
    (tmp_path / "notes.txt").touch()
    (tmp_path / "ant" / "notes.txt").touch()
    (tmp_path / "ant" / "._0.png").touch()
    shutil.copytree(tmp_path / "ant", tmp_path / "ant" / "more")
    shutil.copytree(tmp_path / "ant", tmp_path / "ant" / ".thumbnails")
    parts = read_folders(tmp_path, 8)
    assert parts.classes == ("Bee", "ant", "zebra")
    assert (parts.test, parts.valid) == (None, None)
    names = [str(path.relative_to(tmp_path)) for path in parts.train.paths]
    assert names == [
        *("Bee/0.png", "Bee/1.png", "ant/0.png", "ant/1.png", "ant/more/0.png", "ant/more/1.png"),
        *("zebra/0.png", "zebra/1.png"),
    ]
    assert parts.train.targets.tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    assert parts.train[0].shape == parts.train.shape == (3, 8, 8)


@pytest.mark.parametrize(
    ("held_out", "test", "valid"),
    [
        (("test",), "test", None),
        (("val",), "val", None),
        (("valid",), "valid", None),
        (("test", "val"), "test", "val"),
        (("test", "valid"), "test", "valid"),
    ],
)
def test_part_folders_serve_as_parts(tmp_path, write_images, held_out, test, valid):
    for count, name in enumerate(("train", *held_out), start=1):
        write_images(tmp_path / name, count=count)
    write_images(tmp_path / "documentation")
    parts = read_folders(tmp_path, 8)

    def folder(part):
        return None if part is None else {path.relative_to(tmp_path).parts[0] for path in part.paths}

    assert parts.classes == ("cat", "dog")
    assert folder(parts.train) == {"train"}
    assert folder(parts.test) == {test}
    assert folder(parts.valid) == (valid and {valid})


def test_class_may_be_called_test(tmp_path, write_images):
    assert read_folders(write_images(tmp_path, ("test", "control")), 8).classes == ("control", "test")


def test_both_names_of_the_validation_part_are_one_too_many(tmp_path, write_images):
    for name in ("train", "val", "valid"):
        write_images(tmp_path / name)
    with pytest.raises(InputError, match="both valid/ and val/"):
        read_folders(tmp_path, 8)


@pytest.mark.parametrize("part", ["test", "val"])
def test_parts_must_have_the_same_classes(tmp_path, write_images, part):
    for name in ("train", "val", "test"):
        write_images(tmp_path / name)
    shutil.move(tmp_path / part / "cat", tmp_path / part / "cow")
    with pytest.raises(InputError, match=f"{part} and .*train differ .*missing cat; extra cow"):
        read_folders(tmp_path, 8)


def test_empty_class_folder_is_named(tmp_path, write_images):
    write_images(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").touch()
    with pytest.raises(InputError, match=r"class folder .*empty holds no image"):
        read_folders(tmp_path, 8)


def test_fewer_than_two_classes_are_refused(tmp_path, write_images):
    with pytest.raises(InputError, match="holds no folder"):
        read_folders(tmp_path, 8)
    write_images(tmp_path, ("cat",))
    with pytest.raises(InputError, match="holds only the folder 'cat'"):
        read_folders(tmp_path, 8)


def test_train_folder_alone_is_told_what_it_lacks(tmp_path, write_images):
    write_images(tmp_path / "train")
    with pytest.raises(InputError, match=r"only the folder 'train'.*train/ beside test/"):
        read_folders(tmp_path, 8)
