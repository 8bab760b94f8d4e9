"""The data is what the files say; a bad folder is refused; all ranks read the same."""

import gzip
import pathlib
import queue
import subprocess
import sys
import threading

import fake_mnist
import numpy as np
import pytest
from data import dataset, download, idx


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No mirror can be reached, and no folder is named."""
    monkeypatch.setattr(download, "MIRRORS", ("http://127.0.0.1:9/",))
    monkeypatch.delenv("http_proxy", raising=False)
    monkeypatch.delenv("HTTP_PROXY", raising=False)
    monkeypatch.delenv("TXCORE_DATA", raising=False)


def assert_well_formed(data, train, test):
    for images, labels, count in (
        (data.train_images, data.train_labels, train),
        (data.test_images, data.test_labels, test),
    ):
        assert images.shape == (count, 28, 28, 1)
        assert images.dtype == np.float32
        assert labels.shape == (count,)
        assert labels.dtype == np.int32
        assert set(np.unique(labels)) <= set(range(10))


@pytest.mark.parametrize("packed", [True, False], ids=["gzip", "plain"])
@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_files_in_a_folder(tmp_path, capsys, name, packed):
    data = dataset.load(name, fake_mnist.write(tmp_path, packed=packed))
    assert data.name == "mnist"
    assert_well_formed(data, 30, 10)
    want = (fake_mnist.images(10).astype(np.float64) / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(data.test_images[..., 0], want, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(data.train_labels, fake_mnist.labels(30))
    assert capsys.readouterr() == ("", "")


PLACES = {
    "dots": "{}",
    "torchvision": "MNIST/raw/{}",
    "nested": "some/where/{}",
    "a folder each": "{0}/{0}",
}


@pytest.mark.parametrize("packed", [True, False], ids=["gzip", "plain"])
@pytest.mark.parametrize("place", PLACES)
def test_files_under_other_usual_names(tmp_path, place, packed):
    """The same values as under the usual names, never MNIST's own or the digits."""
    for name, data in fake_mnist.contents().items():
        spelled = name.replace("-idx", ".idx") if place == "dots" else name
        path = tmp_path / PLACES[place].format(spelled)
        path = path.with_name(f"{path.name}.gz") if packed else path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(data) if packed else data)
    assert_same(dataset.load("auto", tmp_path), fake_mnist.write(tmp_path / "usual"))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("given", ["folder", "file"])
def test_keras_file(tmp_path, save, given):
    path = fake_mnist.write_npz(tmp_path / "keras", save)
    data = dataset.load("auto", path if given == "file" else tmp_path)
    folder = fake_mnist.write(tmp_path / "usual")
    assert_same(data, folder)


def assert_same(data, folder):
    want = dataset.load("mnist", folder)
    assert data.name == "mnist"
    for name in ("train_images", "train_labels", "test_images", "test_labels"):
        np.testing.assert_array_equal(getattr(data, name), getattr(want, name))


BAD_NPZ = {
    "11 labels": ({"y_test": fake_mnist.labels(11)}, ":x_test: required one image for each of the "
                  "11 labels in mnist.npz:y_test, found 10 images"),
    "label -1": ({"y_train": np.full(30, -1)}, ":y_train: required labels of 0 to 9, found -1"),
    "20x20": ({"x_train": fake_mnist.images(30, 20)}, ":x_train: required images of 28x28 pixels"),
}  # fmt: skip


@pytest.mark.parametrize("arrays, text", BAD_NPZ.values(), ids=BAD_NPZ)
def test_a_bad_keras_file(tmp_path, arrays, text):
    path = fake_mnist.write_npz(tmp_path, np.savez, **arrays)
    with pytest.raises(idx.DataError) as error:
        dataset.load("auto", tmp_path)
    assert str(error.value).startswith(f"{path}{text}")


def test_the_real_files(mnist_dir):
    data = dataset.load("mnist", mnist_dir)
    assert_well_formed(data, 60_000, 10_000)
    assert abs(data.train_images.mean(dtype=np.float64)) < 1e-3
    assert abs(data.train_images.std(dtype=np.float64) - 1) < 1e-3
    assert data.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert data.test_labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]


def test_the_folder_comes_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TXCORE_DATA", str(fake_mnist.write(tmp_path / "files")))
    assert dataset.load("mnist").name == "mnist"


def test_the_folder_is_data_mnist_by_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_mnist.write(tmp_path / "data" / "mnist")
    assert dataset.load("mnist").name == "mnist"


def test_digits():
    from sklearn.datasets import load_digits

    data = dataset.load("digits")
    assert data.name == "digits"
    assert_well_formed(data, 1437, 360)
    assert abs(data.train_images.mean()) < 1e-3
    assert abs(data.train_images.std() - 1) < 1e-3
    digits = load_digits()
    labels = np.concatenate([data.train_labels, data.test_labels])
    np.testing.assert_array_equal(labels, digits.target)
    # The corners of bilinear upsampling are the corners of the original.
    pixels = data.test_images[..., 0] * dataset.DIGITS_STD + dataset.DIGITS_MEAN
    for row, col in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        want = digits.images[-360:, row, col] / 16
        np.testing.assert_allclose(pixels[:, row, col], want, atol=0.5 / 255 + 1e-6)


def test_digits_are_the_same_each_time():
    first, second = dataset.load("digits"), dataset.load("digits")
    np.testing.assert_array_equal(first.train_images, second.train_images)


def test_upsampling_keeps_a_plane_and_its_centre():
    plane = np.add.outer(2.0 * np.arange(8), 3.0 * np.arange(8))
    got = dataset._upsample(plane[np.newaxis], 28)[0]
    # A linear function is kept exactly between the centres of the outermost pixels.
    places = (np.arange(28) + 0.5) * 8 / 28 - 0.5
    want = np.add.outer(2 * places, 3 * places)
    np.testing.assert_allclose(got[2:-2, 2:-2], want[2:-2, 2:-2], rtol=1e-12)
    np.testing.assert_allclose(got + got[::-1, ::-1], 2 * plane.mean(), rtol=1e-12)


def test_digits_can_be_told_apart():
    """The nearest training image has the right label far above chance (0.1)."""
    data = dataset.load("digits")
    train = data.train_images.reshape(1437, -1)
    test = data.test_images.reshape(360, -1)
    distance = (train**2).sum(1) - 2 * test @ train.T
    assert (data.train_labels[distance.argmin(1)] == data.test_labels).mean() > 0.95


def test_auto_falls_back_to_the_digits_and_says_so_in_one_line(tmp_path, capsys):
    data = dataset.load("auto", tmp_path / "none")
    assert data.name == "digits"
    captured = capsys.readouterr()
    assert captured.out == ""
    progress, notice = captured.err.splitlines()
    assert progress.startswith("downloading http://127.0.0.1:9/train-images")
    assert notice.startswith("no MNIST, so this uses scikit-learn's 8x8 digits instead (")
    assert "required a download from one of 1 mirrors" in notice
    assert "TXCORE_DATA" in notice


def test_auto_falls_back_where_nothing_can_be_written(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert dataset.load("auto", tmp_path / "file" / "folder").name == "digits"
    assert "required a folder to write to" in capsys.readouterr().err


def test_mnist_insists(tmp_path):
    with pytest.raises(idx.DataError, match=r"required a download .*; check the network"):
        dataset.load("mnist", tmp_path / "none")


def changed(**files):
    """The right files with some replaced (by "train_images" and so on) or, by None, left out."""
    result = fake_mnist.contents()
    keys = ("train_images", "train_labels", "test_images", "test_labels")
    for key, name in zip(keys, fake_mnist.NAMES, strict=True):
        if key in files:
            result[name] = files[key]
    return {name: data for name, data in result.items() if data is not None}


ELEVEN = fake_mnist.labels(30)
ELEVEN[[17, 20]] = 11, 12
BAD_FOLDERS = {
    "30 images, 29 labels": (
        changed(train_labels=fake_mnist.idx_bytes(fake_mnist.labels(29))),
        "train-images-idx3-ubyte.gz: required one image for each of the 29 labels in "
        "train-labels-idx1-ubyte.gz, found 30 images; take both files from the same source",
    ),
    "10 test images, 11 labels": (
        changed(test_labels=fake_mnist.idx_bytes(fake_mnist.labels(11))),
        "t10k-images-idx3-ubyte.gz: required one image for each of the 11 labels in "
        "t10k-labels-idx1-ubyte.gz, found 10 images",
    ),
    "label 11": (
        changed(train_labels=fake_mnist.idx_bytes(ELEVEN)),
        "train-labels-idx1-ubyte.gz: required labels of 0 to 9, found 11 as label 17; "
        "give a folder with the files of MNIST or of a set made like it",
    ),
    "test label 255": (
        changed(test_labels=fake_mnist.idx_bytes(np.full(10, 255, np.uint8))),
        "t10k-labels-idx1-ubyte.gz: required labels of 0 to 9, found 255 as label 0",
    ),
    "20x20": (
        changed(train_images=fake_mnist.idx_bytes(fake_mnist.images(30, 20))),
        "train-images-idx3-ubyte.gz: required images of 28x28 pixels, found 20x20",
    ),
    "20x20 for the test": (
        changed(test_images=fake_mnist.idx_bytes(fake_mnist.images(10, 20))),
        "t10k-images-idx3-ubyte.gz: required images of 28x28 pixels, found 20x20",
    ),
    "images for labels": (
        changed(train_labels=fake_mnist.idx_bytes(fake_mnist.images(30))),
        "train-labels-idx1-ubyte.gz: required magic number 0x00000801 (uint8, 1 dims), "
        "found 0x00000803",
    ),
    "truncated": (
        changed(train_images=fake_mnist.contents()[fake_mnist.NAMES[0]][:-5]),
        "train-images-idx3-ubyte.gz: required 23520 bytes of data for shape [30, 28, 28], "
        "found 23515",
    ),
    "empty": (
        changed(test_images=b""),
        "t10k-images-idx3-ubyte.gz: required a header of 16 bytes, found 0 bytes",
    ),
}


@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_a_part_of_a_set(tmp_path, name):
    """MNIST's own labels fit the images of every set made like it: none is completed by them."""
    fake_mnist.write(tmp_path, changed(test_labels=None))
    with pytest.raises(idx.DataError) as error:
        dataset.load(name, tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: required all four files of a set, found t10k-images-idx3-ubyte.gz and no "
        "t10k-labels-idx1-ubyte; put t10k-labels-idx1-ubyte of the same set there, or name a new "
        "folder to download MNIST to"
    )


@pytest.mark.parametrize("name", ["auto", "mnist"])
@pytest.mark.parametrize("files, text", BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folder(tmp_path, files, text, name):
    """Files that are there but bad are an error, also for "auto": no silent fallback."""
    fake_mnist.write(tmp_path, files)
    with pytest.raises(idx.DataError) as error:
        dataset.load(name, tmp_path)
    assert str(error.value).startswith(f"{tmp_path}/{text}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["auto", "mnist"])
@pytest.mark.parametrize("file", ["mnist_train.csv", "mnist.pkl.gz", "MNIST/processed/training.pt"])
def test_data_in_another_form_is_refused_by_name(tmp_path, name, file):
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).touch()
    with pytest.raises(idx.DataError) as error:
        dataset.load(name, tmp_path)
    assert str(error.value) == (
        f"{tmp_path}: required the four files of MNIST or mnist.npz, found {file}, which is not "
        "read here; put the four files there, or name an empty folder to download them to"
    )


def test_unknown_name():
    with pytest.raises(ValueError, match="required one of auto, mnist, digits, given 'cifar'"):
        dataset.load("cifar")


@pytest.mark.parametrize("name", ["digits", "auto"])
def test_no_scikit_learn(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(idx.DataError, match=r"install txcore\[examples\], or name a folder"):
        dataset.load(name, tmp_path)


class Ranks:
    """Runs `load` on two ranks in threads; `agree` and `barrier` need both to come."""

    def __init__(self, name, folders):
        self.meeting = threading.Barrier(2, timeout=20)
        self.said: queue.Queue[str] = queue.Queue()
        self.results = ["", ""]
        threads = [
            threading.Thread(target=self.run, args=(name, rank, folder))
            for rank, folder in enumerate(folders)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def barrier(self, name):
        self.meeting.wait()

    def run(self, name, rank, folder):
        def agree(own):
            if rank == 0:
                self.said.put(own)
            self.meeting.wait()
            return own if rank == 0 else self.said.get(timeout=20)

        hooks = {"rank": rank, "barrier": self.barrier, "agree": agree}
        try:
            self.results[rank] = dataset.load(name, folder, **hooks).name
        except idx.DataError as error:
            self.results[rank] = str(error)


@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_ranks_with_files(tmp_path, name):
    fake_mnist.write(tmp_path)
    assert Ranks(name, [tmp_path] * 2).results == ["mnist"] * 2


@pytest.mark.parametrize("name", ["auto", "digits"])
def test_ranks_without_files(tmp_path, capsys, name):
    assert Ranks(name, [tmp_path] * 2).results == ["digits"] * 2
    assert capsys.readouterr().err.count("no MNIST") == (name == "auto")


def test_rank_1_follows_rank_0_to_the_digits(tmp_path):
    fake_mnist.write(tmp_path / "1")
    assert Ranks("auto", [tmp_path / "0", tmp_path / "1"]).results == ["digits"] * 2


def test_rank_1_has_damaged_files_that_it_does_not_need(tmp_path):
    fake_mnist.write(tmp_path / "1", changed(train_images=b""))
    assert Ranks("auto", [tmp_path / "0", tmp_path / "1"]).results == ["digits"] * 2


def test_rank_1_has_no_files_where_rank_0_has(tmp_path):
    fake_mnist.write(tmp_path / "0")
    first, second = Ranks("auto", [tmp_path / "0", tmp_path / "1"]).results
    assert first == "mnist"
    assert f"{tmp_path / '1'}: required train-images-idx3-ubyte.gz or" in second
    assert f"run `python examples/mnist/download.py --data-dir {tmp_path / '1'}`" in second


@pytest.mark.parametrize("name", ["auto", "mnist"])
def test_all_ranks_fail_where_rank_0_has_damaged_files(tmp_path, name):
    fake_mnist.write(tmp_path / "0", changed(train_labels=b""))
    fake_mnist.write(tmp_path / "1")
    first, second = Ranks(name, [tmp_path / "0", tmp_path / "1"]).results
    assert first.startswith(f"{tmp_path}/0/train-labels-idx1-ubyte.gz: required a header")
    assert second == f"rank 0 has no data: {first}"


def test_all_ranks_fail_where_rank_0_cannot_download(tmp_path):
    first, second = Ranks("mnist", [tmp_path] * 2).results
    assert "required a download from one of 1 mirrors" in first
    assert second == f"rank 0 has no data: {first}"


def test_no_jax_is_imported():
    code = "import sys; from data import batches, dataset; assert 'jax' not in sys.modules"
    folder = pathlib.Path(download.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, timeout=60)
