"""MNIST's files are found under their usual names, or refused by name: two sets never mix."""

import os
import re

import pytest
from data import files, idx

FIRST = files.NAMES[0]


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(folder):
    return {
        name: path.relative_to(folder).as_posix() for name, path in files.locate(folder).items()
    }


def refusal(folder):
    with pytest.raises(idx.DataError) as error:
        files.locate(folder)
    text = str(error.value)
    assert text.startswith(f"{folder}: required ")
    assert "\n" not in text
    return text.removeprefix(f"{folder}: ")


@pytest.mark.parametrize(
    "spelling",
    [
        "train-images-idx3-ubyte",
        "train-images.idx3-ubyte",
        "train_images_idx3_ubyte",
        "train-images-idx3.ubyte",
        "Train-Images-IDX3-ubyte",
        "train-images.idx3-ubyte.gz",
    ],
)
def test_spellings(tmp_path, spelling):
    touch(tmp_path, spelling)
    assert found(tmp_path) == {FIRST: spelling}


def test_all_names_and_those_of_the_test_set(tmp_path):
    touch(tmp_path, *files.NAMES[:2], "test-images-idx3-ubyte", "test-labels.idx1-ubyte.gz")
    assert sorted(found(tmp_path)) == sorted(files.NAMES)


def test_nothing(tmp_path):
    assert files.locate(tmp_path / "absent") == files.locate(tmp_path) == {}
    touch(tmp_path, "README.md", "train.py", "log.jsonl", ".mnist.npz", f".{FIRST}.gz.1a.part")
    assert files.locate(tmp_path) == {}


def test_the_gzip_file_of_both(tmp_path):
    touch(tmp_path, FIRST, f"{FIRST}.gz")
    assert found(tmp_path) == {FIRST: f"{FIRST}.gz"}


def test_the_folder_itself_then_torchvisions_then_the_rest(tmp_path):
    touch(tmp_path, f"a/{FIRST}", f"MNIST/raw/{FIRST}", f"FashionMNIST/raw/{FIRST}")
    assert found(tmp_path) == {FIRST: f"MNIST/raw/{FIRST}"}
    touch(tmp_path, FIRST)
    assert found(tmp_path) == {FIRST: FIRST}


def test_two_sets_are_refused(tmp_path):
    touch(tmp_path, f"FashionMNIST/raw/{FIRST}.gz", f"KMNIST/raw/{FIRST}.gz")
    assert refusal(tmp_path) == (
        f"required one file of {FIRST}, found FashionMNIST/raw/{FIRST}.gz and KMNIST/raw/{FIRST}.gz"
        "; name the folder of the one to take, with --data-dir or TXCORE_DATA"
    )


@pytest.mark.parametrize("second", ["train-images.idx3-ubyte", "train_images_idx3_ubyte.gz"])
def test_two_spellings_in_one_folder_are_refused(tmp_path, second):
    touch(tmp_path, FIRST, second)
    assert f"required one file of {FIRST}, found " in refusal(tmp_path)


def test_keras_file_beside_the_others_is_refused(tmp_path):
    touch(tmp_path, FIRST, "mnist.npz")
    assert refusal(tmp_path).startswith(
        f"required one file of MNIST, found mnist.npz and {FIRST}; name the folder of the one"
    )


def test_a_folder_with_a_files_name(tmp_path):
    """So Kaggle's archive has it: train-images-idx3-ubyte/train-images-idx3-ubyte, and dots."""
    touch(tmp_path, f"{FIRST}/{FIRST}", "train-images.idx3-ubyte")
    assert found(tmp_path) == {FIRST: "train-images.idx3-ubyte"}
    (tmp_path / "train-images.idx3-ubyte").unlink()
    assert found(tmp_path) == {FIRST: f"{FIRST}/{FIRST}"}


@pytest.mark.parametrize(
    "name",
    [
        *("mnist_test.csv", "train.parquet", "data/mnist.pkl.gz", "digits.mat", "training.pt"),
        *("emnist-letters-train-images-idx3-ubyte.gz", "train/3/17.png", "other.npz", "MNIST.zip"),
    ],
)
def test_what_is_not_read_is_refused_by_name(tmp_path, name):
    touch(tmp_path, "README.md", name)
    assert f"found {name}, which is not read here; put the four files there" in refusal(tmp_path)
    touch(tmp_path, FIRST)
    assert found(tmp_path) == {FIRST: FIRST}


def test_a_file_for_a_folder(tmp_path):
    touch(tmp_path, FIRST, "set.npz")
    assert files.locate(tmp_path / "set.npz") == {"mnist.npz": tmp_path / "set.npz"}
    with pytest.raises(idx.DataError, match=r"required a folder, or a file like mnist\.npz"):
        files.locate(tmp_path / FIRST)


def test_links_are_followed_once(tmp_path):
    touch(tmp_path, f"store/{FIRST}")
    (tmp_path / "again").symlink_to(tmp_path / "store")
    (tmp_path / "store" / "up").symlink_to(tmp_path)
    os.link(tmp_path / "store" / FIRST, tmp_path / "other")
    assert [*found(tmp_path)] == [FIRST]
    (tmp_path / "view").mkdir()
    (tmp_path / "view" / "to").symlink_to(tmp_path / "store")
    assert found(tmp_path / "view") == {FIRST: f"to/{FIRST}"}


def test_a_folder_of_everything(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_MOST_FILES", 5)
    touch(tmp_path, *(f"deep/er/{i}" for i in range(6)))
    assert re.match("required at most 5 files, found more; name the folder", refusal(tmp_path))
