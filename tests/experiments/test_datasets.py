import gzip
import io
import lzma
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.harness import datasets
from experiments.harness.datasets import Dataset, load, synthetic
from laqjax.partition import partition_data

IDX_STEMS = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)


@pytest.fixture(scope="module")
def mnist():
    return load("mnist")


# Dataset


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": np.zeros(2, np.int32)}, r"train.*\(3, 2\).*\(2,\).*one label per row"),
        ({"y": np.zeros((3, 1), np.int32)}, "train.*one label per row"),
        ({"x": np.zeros((0, 2)), "y": np.zeros(0, np.int32)}, "train.*no samples"),
        ({"x": np.zeros((3, 0))}, "train.*no features"),
        ({"x": np.full((3, 2), np.nan)}, "train.*NaN or infinity"),
        ({"y": np.array([0, 1, np.inf]), "num_classes": None}, "train.*NaN or infinity"),
        ({"y": np.array([0, 1, 2], np.int32)}, r"train.*int32 labels in 0\.\.2: must be int32 labels in 0\.\.1"),
        ({"y": np.array([0, 1, -1], np.int32)}, r"train.*int32 labels in -1\.\.1: must"),
        ({"y": np.array([0, 1, 1], np.int64)}, "train.*int64 labels.*must be int32"),
        ({"x_test": np.zeros((1, 2))}, "must come together"),
        ({"y_test": np.zeros(1, np.int32)}, "must come together"),
        (
            {"x_test": np.zeros((1, 3)), "y_test": np.zeros(1, np.int32)},
            r"test.*x \(1, 3\): must have rows as in train, \(3, 2\)",
        ),
        ({"x_test": np.zeros((1, 2)), "y_test": np.full(1, 2, np.int32)}, r"test.*must be int32 labels in 0\.\.1"),
    ],
)
def test_dataset_refuses_inconsistent_data(changes, message):
    good = {"x": np.zeros((3, 2)), "y": np.array([0, 1, 1], np.int32), "num_classes": 2}
    Dataset("toy", **good)
    with pytest.raises(ValueError, match=f"toy .*{message}|toy: .*{message}"):
        Dataset("toy", **(good | changes))


@pytest.mark.parametrize("name", ["", "mnistt", "mnist:x", "idx:", "tfds:", "libsvm:", "tsv:f", "synthetic"])
def test_unknown_names_list_the_forms(name):
    with pytest.raises(ValueError, match="must be mnist, idx:DIR, tfds:NAME") as raised:
        load(name)
    assert repr(name) in str(raised.value)


# IDX files


def test_mnist_is_the_original(mnist):
    assert mnist.x.shape == (60000, 784)
    assert mnist.x_test.shape == (10000, 784)
    assert mnist.x.dtype == mnist.x_test.dtype == np.uint8
    assert mnist.y.dtype == mnist.y_test.dtype == np.int32
    assert mnist.num_classes == 10
    assert mnist.y[:5].tolist() == [5, 0, 4, 1, 9]
    assert mnist.y_test[:5].tolist() == [7, 2, 1, 0, 4]
    assert np.bincount(mnist.y).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert round(mnist.x.mean() / 255, 4) == 0.1307


def idx_bytes(array):
    array = np.asarray(array, np.uint8)
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def test_mnist_says_which_file_to_restore(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "MNIST_FOLDER", tmp_path)
    path = tmp_path / "train-images-idx3-ubyte.xz"
    remedy = "; restore it from the repository: git checkout -- experiments/mnist"
    with pytest.raises(FileNotFoundError, match=f"no train-images-idx3-ubyte.*{remedy}"):
        load("mnist")
    sound = lzma.compress(idx_bytes(np.zeros((2, 28, 28))))
    path.write_bytes(sound[:-9])
    with pytest.raises(ValueError, match=f"{path} is damaged: .*{remedy}"):
        load("mnist")
    path.write_bytes(sound)  # but not MNIST
    with pytest.raises(ValueError, match=f"{path} is damaged: the MD5 .* not 6bbc9ace.*{remedy}"):
        load("mnist")


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.default_rng(0)
    x, x_test = rng.integers(0, 256, (7, 4, 3)), rng.integers(0, 256, (2, 4, 3))
    arrays = [x, np.arange(7) % 3, x_test, np.array([2, 0])]
    for stem, array in zip(IDX_STEMS, arrays, strict=True):
        (tmp_path / stem).write_bytes(idx_bytes(array))
    return tmp_path, arrays


@pytest.mark.parametrize(
    ("suffix", "pack"), [("", bytes), (".gz", gzip.compress), (".xz", lzma.compress)], ids=["raw", "gz", "xz"]
)
def test_idx_reads_what_was_written(idx_folder, suffix, pack):
    folder, (x, y, x_test, y_test) = idx_folder
    for stem in IDX_STEMS:
        content = (folder / stem).read_bytes()
        (folder / stem).unlink()
        (folder / f"{stem}{suffix}").write_bytes(pack(content))
    data = load(f"idx:{folder}")
    assert data.name == f"idx:{folder}"
    assert data.num_classes == 3
    np.testing.assert_array_equal(data.x, x.reshape(7, 12))
    np.testing.assert_array_equal(data.y, y)
    np.testing.assert_array_equal(data.x_test, x_test.reshape(2, 12))
    np.testing.assert_array_equal(data.y_test, y_test)
    assert data.x.dtype == np.uint8
    assert data.y.dtype == np.int32


@pytest.mark.parametrize(
    ("stem", "content", "message"),
    [
        (IDX_STEMS[0], b"", "not an IDX file"),
        (IDX_STEMS[0], b"\0\0\x08", "not an IDX file"),
        (IDX_STEMS[0], b"\0\0\x08\0\x01", "not an IDX file"),
        (IDX_STEMS[0], b"\0\0\x0d\x01\0\0\0\0", "not an IDX file"),  # floats
        (IDX_STEMS[0], idx_bytes(np.zeros((7, 4, 3)))[:-1], r"damaged: shape \[7, 4, 3\] but 83 bytes"),
        (IDX_STEMS[0], idx_bytes(np.zeros((7, 4, 3))) + b"x", r"damaged: shape \[7, 4, 3\] but 85 bytes"),
        (IDX_STEMS[0], idx_bytes(np.zeros((0, 4, 3))), "one label per row"),
        (IDX_STEMS[1], idx_bytes(np.zeros(6)), "one label per row"),
        (IDX_STEMS[3], idx_bytes([0, 3]), r"test.*must be int32 labels in 0\.\.2"),
    ],
)
def test_idx_refuses_damaged_files(idx_folder, stem, content, message):
    folder, _ = idx_folder
    (folder / stem).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        load(f"idx:{folder}")
    assert str(folder) in str(raised.value)


def test_idx_names_what_is_missing_or_broken(idx_folder):
    folder, _ = idx_folder
    path = folder / IDX_STEMS[2]
    packed = gzip.compress(path.read_bytes())
    path.unlink()
    with pytest.raises(FileNotFoundError, match=IDX_STEMS[2]):
        load(f"idx:{folder}")
    for content in (packed[:-9], b"no gzip", packed[:12] + b"\xff" * 20 + packed[32:]):
        path.with_name(f"{path.name}.gz").write_bytes(content)
        with pytest.raises(ValueError, match=f"{IDX_STEMS[2]}.gz is damaged"):
            load(f"idx:{folder}")


# LIBSVM text


def test_libsvm_is_made_dense(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("# a comment\n+1 1:0.5 3:-2e1  # another\n\n-1 2:7\r\n-1\n1 4:0.25")
    data = load(f"libsvm:{path}")
    expected = [[0.5, 0, -20, 0], [0, 7, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0.25]]
    np.testing.assert_array_equal(data.x, np.array(expected, np.float32))
    assert data.x.dtype == np.float32
    assert data.y.tolist() == [1, 0, 0, 1]  # -1 -> 0, +1 -> 1
    assert data.num_classes == 2
    assert data.x_test is None
    assert data.y_test is None


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("train.txt", "test.txt.gz")])
def test_libsvm_folder(tmp_path, train, test):
    pack = gzip.compress if test.endswith(".gz") else bytes
    (tmp_path / train).write_text("7 1:1\n2 2:1\n5 1:3\n7 1:1\n")
    (tmp_path / test).write_bytes(pack(b"5 5:2\n2 1:4\n"))
    (tmp_path / "training-notes").write_text("not data")
    data = load(f"libsvm:{tmp_path}")
    assert data.x.shape == (4, 5)  # as wide as the wider of the two
    np.testing.assert_array_equal(data.x_test, [[0, 0, 0, 0, 2], [4, 0, 0, 0, 0]])
    assert data.y.tolist() == [2, 0, 1, 2]  # 2, 5, 7 in sorted order
    np.testing.assert_array_equal(data.y_test, [1, 0])
    assert data.num_classes == 3
    (tmp_path / test).unlink()
    assert load(f"libsvm:{tmp_path}").x_test is None


def test_libsvm_folder_must_be_unambiguous(tmp_path):
    with pytest.raises(ValueError, match=r"files \[\]: must be one train "):
        load(f"libsvm:{tmp_path}")
    for name in ("train.txt", "train"):
        (tmp_path / name).write_text("1 1:1\n")
    with pytest.raises(ValueError, match=r"files \['train', 'train.txt'\]: must"):
        load(f"libsvm:{tmp_path}")


def test_libsvm_regression_keeps_targets(tmp_path):
    path = tmp_path / "data"
    path.write_text("0.25 1:1\n-3 1:2\n")
    data = load(f"libsvm-regression:{path}")
    assert data.y.tolist() == [0.25, -3]
    assert data.y.dtype == np.float32
    assert data.num_classes is None
    with pytest.raises(ValueError, match=r"data, line 1: label 0.25 is not a class.*libsvm-regression:"):
        load(f"libsvm:{path}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("1 1:abc", "could not convert .*'abc'"),
        ("one 1:1", "could not convert .*'one'"),
        ("1 1:nan", "nan is not a finite float32"),
        ("1 1:-inf", "-inf is not a finite float32"),
        ("1 1:1e39", "1e39 is not a finite float32"),
        ("nan 1:1", "nan is not a finite float32"),
        ("1 0:1", "'0:1': .*ascending from 1"),
        ("1 -2:1", "'-2:1': .*ascending from 1"),
        ("1 3:1 2:1", "'2:1': .*ascending from 1"),
        ("1 3:1 3:1", "'3:1': .*ascending from 1"),
        ("1 3", "'3': must be INDEX:VALUE"),
        ("1 3:", "'3:': must be INDEX:VALUE"),
        ("1 x:1", "'x:1': must be INDEX:VALUE"),
    ],
)
@pytest.mark.parametrize("kind", ["libsvm", "libsvm-regression"])
def test_libsvm_names_the_malformed_line(tmp_path, kind, line, message):
    path = tmp_path / "data"
    path.write_text(f"1 1:1\n\n{line}\n2 1:1\n")
    with pytest.raises(ValueError, match=f"data, line 3: .*{message}"):
        load(f"{kind}:{path}")


def test_libsvm_refuses_missing_empty_and_unseen(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        load(f"libsvm:{tmp_path / 'absent'}")
    train, test = tmp_path / "train", tmp_path / "test"
    train.write_text("# nothing\n")
    with pytest.raises(ValueError, match="no samples"):
        load(f"libsvm:{train}")
    train.write_text("1 1:1\n3 1:1\n")
    test.write_text("1 1:1\n2 1:1\n")
    with pytest.raises(ValueError, match=r"test labels \[2.0\] do not occur in train"):
        load(f"libsvm:{tmp_path}")
    np.testing.assert_array_equal(load(f"libsvm-regression:{tmp_path}").y_test, [1, 2])


# Synthetic problems


def smoothness(x):
    """[M, N, d] -> L_m [M]."""
    return np.array([np.linalg.norm(own, 2) ** 2 / len(own) for own in x])


@pytest.mark.parametrize("heterogeneity", [0, 1, 2])
@pytest.mark.parametrize("condition", [1, 100, 1e6])
def test_synthetic_has_the_condition_and_the_spread_asked_for(condition, heterogeneity):
    data = synthetic("linear", 10, 200, 20, condition, heterogeneity, seed=1)
    assert data.x.shape == (2000, 20)
    eigenvalues = np.linalg.eigvalsh(data.x.T @ data.x / 2000)
    np.testing.assert_allclose(eigenvalues, np.geomspace(1 / condition, 1, 20), rtol=1e-7)
    of_worker = smoothness(partition_data(data.x, data.y, 10, "contiguous").x)
    slope = np.polyfit(np.arange(10) / 9, np.log10(of_worker), 1)[0]
    assert slope == pytest.approx(heterogeneity, abs=0.2)
    if heterogeneity:
        assert of_worker.argmin() < 2
        assert of_worker.argmax() == 9
    else:
        assert of_worker.max() < 1.6 * of_worker.min()


def test_synthetic_targets():
    exact = synthetic("linear", 4, 100, 5, 10, 1, seed=3, noise=0)
    assert np.mean(exact.y**2) == pytest.approx(1)
    np.testing.assert_allclose(exact.x @ np.linalg.lstsq(exact.x, exact.y)[0], exact.y, atol=1e-10)
    assert exact.num_classes is None
    noisy = synthetic("linear", 4, 100, 5, 10, 1, seed=3, noise=0.5)
    np.testing.assert_array_equal(noisy.x, exact.x)
    assert np.std(noisy.y - exact.y) == pytest.approx(0.5, rel=0.1)
    for noise, targets in ((0, exact.y), (0.5, noisy.y)):
        classes = synthetic("logistic", 4, 100, 5, 10, 1, seed=3, noise=noise)
        np.testing.assert_array_equal(classes.x, exact.x)
        np.testing.assert_array_equal(classes.y, targets > 0)
        assert classes.y.dtype == np.int32
        assert classes.num_classes == 2


@pytest.mark.parametrize("kind", ["linear", "logistic"])
def test_synthetic_by_name(kind):
    query = "condition=1e3&heterogeneity=1.5&workers=3&samples=7&features=4&seed=5&noise=0.2"
    by_name = load(f"synthetic-{kind}?{query}")
    by_call = synthetic(kind, 3, 7, 4, 1000.0, 1.5, seed=5, noise=0.2)
    assert by_name.name == f"synthetic-{kind}"
    np.testing.assert_array_equal(by_name.x, by_call.x)
    np.testing.assert_array_equal(by_name.y, by_call.y)
    assert not np.array_equal(by_call.x, synthetic(kind, 3, 7, 4, 1000.0, 1.5, seed=6, noise=0.2).x)
    np.testing.assert_array_equal(load(f"synthetic-{kind}").x, synthetic(kind).x)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("synthetic-cubic", "kind = 'cubic': must be linear or logistic"),
        ("synthetic-linear?wrokers=3", "key 'wrokers': must be one of workers, .*noise; did you mean 'workers'"),
        ("synthetic-linear?", None),
        ("synthetic-linear?samples=2.5", "samples = 2.5: must be a whole number"),
        ("synthetic-linear?condition=x", "condition = 'x': must be"),
        ("synthetic-linear?workers=0", "workers = 0: must be a whole number >= 1"),
        ("synthetic-linear?samples=0", "samples = 0: must be a whole number >= 1"),
        ("synthetic-linear?features=0", "features = 0: must be a whole number >= 1 and <= 500"),
        ("synthetic-linear?features=7&workers=2&samples=3", "features = 7: must be a whole number >= 1 and <= 6"),
        ("synthetic-linear?condition=0.5", "condition = 0.5: must be a finite number >= 1"),
        ("synthetic-linear?condition=nan", "condition = nan: must be a finite number"),
        ("synthetic-linear?condition=inf", "condition = inf: must be a finite number"),
        ("synthetic-linear?features=1&condition=2", "condition = 2: must be a finite number >= 1 and <= 1"),
        ("synthetic-linear?features=1&condition=1", None),
        ("synthetic-linear?heterogeneity=-1", "heterogeneity = -1: must be a finite number >= 0"),
        ("synthetic-linear?heterogeneity=inf", "heterogeneity = inf: must be a finite number"),
        ("synthetic-linear?noise=-1", "noise = -1: must be a finite number >= 0"),
        ("synthetic-linear?noise=inf", "noise = inf: must be a finite number"),
        ("synthetic-linear?seed=-1", "seed = -1: must be a whole number >= 0"),
    ],
)
def test_synthetic_refuses_what_it_cannot_make(name, message):
    if message is None:
        load(name)
        return
    with pytest.raises(ValueError, match=message):
        load(name)


# Partitions

SCHEMES = ["contiguous", "shuffled", "sorted", "dirichlet:0.3", "unequal:3"]
USES_ALL = ("dirichlet", "unequal")


def numbered(n, num_classes=5):
    """Rows that carry their own number, from 1 so that padding (0) differs: x [n, 2, 1], y [n]."""
    number = np.arange(1, n + 1, dtype=np.int32)
    return np.stack([number, -number], axis=1)[..., None], (number * 7 % num_classes).astype(np.int32)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(n=st.integers(12, 80), num_workers=st.integers(1, 4), seed=st.integers(0, 99))
@pytest.mark.parametrize("scheme", SCHEMES)
def test_partition_deals_each_sample_at_most_once(scheme, n, num_workers, seed):
    x, y = numbered(n)
    shards = partition_data(x, y, num_workers, scheme, seed)
    assert shards.x.dtype == x.dtype
    assert shards.y.dtype == y.dtype
    assert shards.weight.dtype == np.float32
    assert shards.x.shape == (*shards.weight.shape, 2, 1)
    assert shards.y.shape == shards.weight.shape
    assert len(shards.weight) == num_workers
    real = shards.weight == 1
    assert (shards.weight[~real] == 0).all()
    assert not shards.x[~real].any()
    assert not shards.y[~real].any()
    numbers = shards.x[real][:, 0, 0]
    assert len(set(numbers.tolist())) == len(numbers)
    np.testing.assert_array_equal(shards.x[real], x[numbers - 1])
    np.testing.assert_array_equal(shards.y[real], y[numbers - 1])
    assert len(numbers) == (n if scheme.startswith(USES_ALL) else n // num_workers * num_workers)
    sizes = real.sum(axis=1)
    assert sizes.min() >= 1
    assert sizes.max() == shards.weight.shape[1]
    # real rows come first: minibatches rely on it
    np.testing.assert_array_equal(real, np.arange(real.shape[1]) < sizes[:, None])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_partition_is_a_function_of_the_seed(scheme):
    x, y = numbered(60)
    first, again, other = (partition_data(x, y, 4, scheme, seed) for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    same = first.x.shape == other.x.shape and np.array_equal(first.x, other.x)
    assert same == (scheme in ("contiguous", "sorted"))


def test_contiguous_is_a_view_in_file_order(mnist):
    shards = partition_data(mnist.x, mnist.y, 10, "contiguous")
    assert shards.x.shape == (10, 6000, 784)
    assert np.shares_memory(shards.x, mnist.x)
    assert np.shares_memory(shards.y, mnist.y)
    np.testing.assert_array_equal(shards.y.reshape(-1), mnist.y)
    np.testing.assert_array_equal(shards.x[3, 17], mnist.x[3 * 6000 + 17])
    assert shards.weight.sum() == 60000
    x, y = numbered(11)
    numbers = partition_data(x, y, 3, "contiguous").x[..., 0, 0]
    assert numbers.tolist() == [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def test_shuffled_mixes_and_sorted_is_stable():
    x, y = numbered(60)
    shuffled = partition_data(x, y, 4, "shuffled", seed=3).x[..., 0, 0].reshape(-1)
    assert not np.array_equal(shuffled, x[:, 0, 0])
    assert abs(np.corrcoef(shuffled, x[:, 0, 0])[0, 1]) < 0.4
    by_label = partition_data(x, y, 5, "sorted")
    assert by_label.y.tolist() == [[label] * 12 for label in range(5)]
    assert (np.diff(by_label.x[..., 0, 0], axis=1) > 0).all()


def test_dirichlet_skews_as_alpha_shrinks():
    x, y = numbered(6000, num_classes=10)

    def class_shares(alpha):
        shards = partition_data(x, y, 6, f"dirichlet:{alpha}")
        counts = np.array(
            [np.bincount(own[w == 1], minlength=10) for own, w in zip(shards.y, shards.weight, strict=True)]
        )
        return counts / counts.sum(axis=0)  # [M, 10]: who holds a class

    np.testing.assert_allclose(class_shares(1e6), 1 / 6, atol=0.01)
    assert (class_shares(1e-3).max(axis=0) > 0.99).all()
    # E[sum of squared shares] = (1 + alpha) / (1 + M alpha)
    assert np.mean((class_shares(1) ** 2).sum(axis=0)) == pytest.approx(2 / 7, rel=0.35)
    # classes are split independently of one another
    assert len(set(class_shares(1e-3).argmax(axis=0))) > 1


def test_dirichlet_leaves_nobody_empty():
    x, y = numbered(20, num_classes=1)
    sizes = partition_data(x, y, 20, "dirichlet:0.001").weight.sum(axis=1)
    assert sizes.tolist() == [1] * 20
    sizes = partition_data(x, y, 4, "dirichlet:0.001").weight.sum(axis=1)
    assert sorted(sizes) == [1, 1, 1, 17]


def test_unequal_sizes_are_geometric():
    x, y = numbered(7000)
    shards = partition_data(x, y, 3, "unequal:4", seed=2)
    assert shards.weight.sum(axis=1).tolist() == [1000, 2000, 4000]
    assert np.ptp(shards.x[0, :1000, 0, 0]) > 6000  # shuffled: the first worker sees both ends of the file
    assert partition_data(x, y, 7, "unequal:1").weight.sum(axis=1).tolist() == [1000] * 7
    assert partition_data(x, y, 1, "unequal:5").weight.sum() == 7000


@pytest.mark.parametrize(
    ("num_workers", "scheme", "message"),
    [
        (0, "contiguous", "num_workers = 0: must be 1 to 12"),
        (13, "shuffled", "num_workers = 13: must be 1 to 12"),
        (-1, "dirichlet:1", "num_workers = -1: must be 1 to 12"),
        (2, "", "scheme = '': must be contiguous, shuffled, sorted, dirichlet:ALPHA or unequal:RATIO"),
        (2, "random", "scheme = 'random': must be contiguous"),
        (2, "shufled", r"scheme = 'shufled': must be contiguous.*; did you mean 'shuffled'\?"),
        (2, "sorted:3", "scheme = 'sorted:3': must be contiguous"),
        (2, "dirichlet", "scheme = 'dirichlet': must be dirichlet:ALPHA"),
        (2, "dirichlet:", "scheme = 'dirichlet:': must be dirichlet:ALPHA"),
        (2, "dirichlet:x", "scheme = 'dirichlet:x': must be dirichlet:ALPHA"),
        (2, "dirichlet:0", "scheme = 'dirichlet:0': must be dirichlet:ALPHA, ALPHA finite and above 0"),
        (2, "dirichlet:-1", "scheme = 'dirichlet:-1': must be dirichlet:ALPHA"),
        (2, "dirichlet:inf", "scheme = 'dirichlet:inf': must be dirichlet:ALPHA"),
        (2, "dirichlet:nan", "scheme = 'dirichlet:nan': must be dirichlet:ALPHA"),
        (2, "unequal:0.5", "scheme = 'unequal:0.5': must be unequal:RATIO, RATIO finite and at least 1"),
        (2, "unequal:inf", "scheme = 'unequal:inf': must be unequal:RATIO"),
        (12, "unequal:100", "scheme = 'unequal:100' for 12 samples, 12 workers: must be a smaller ratio"),
    ],
)
def test_partition_refuses(num_workers, scheme, message):
    x, y = numbered(12)
    with pytest.raises(ValueError, match=message):
        partition_data(x, y, num_workers, scheme)


def test_partition_refuses_mismatched_and_unclassed_labels():
    x, y = numbered(12)
    with pytest.raises(ValueError, match=r"x and y of shapes .*\(11,\).*: must be of one length"):
        partition_data(x, y[:11], 2, "contiguous")
    with pytest.raises(ValueError, match=r"y of dtype float64: must be integer labels"):
        partition_data(x, y.astype(np.float64), 2, "dirichlet:1")
    partition_data(x, y.astype(np.float64), 2, "sorted")


# TensorFlow Datasets: the sets are really prepared and read, offline and without TensorFlow


def prepare(folder, name, features, splits):
    """Writes a TFDS dataset as `tfds build --file_format array_record` does; splits: name -> examples."""
    tfds = pytest.importorskip("tensorflow_datasets")

    def info(self):
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def split_generators(self, _):
        return {split: iter(list(enumerate(examples))) for split, examples in splits.items()}

    builder = type(
        "Prepared",
        (tfds.core.GeneratorBasedBuilder,),
        {
            "name": name,
            "VERSION": tfds.core.Version("1.0.0"),
            "_info": info,
            "_split_generators": split_generators,
            "_generate_examples": lambda self: iter(()),
        },
        skip_registration=True,  # so that TFDS knows no more than the files
    )
    builder(data_dir=folder).download_and_prepare(file_format="array_record")


def png(pixels):
    """TFDS encodes arrays with TensorFlow, but takes encoded files as they are."""
    image = pytest.importorskip("PIL.Image").fromarray(pixels)
    file = io.BytesIO()
    image.save(file, "PNG")
    file.seek(0)
    return file


def example(number, shape=(4, 3)):
    return {"image": png(np.full(shape, number % 256, np.uint8)), "label": number % 3}


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """A folder with the set "toy_digits": 1030 grey images of 4 x 3 (more than one batch), 5 in the test."""
    tfds = pytest.importorskip("tensorflow_datasets")
    folder = tmp_path_factory.mktemp("tfds")
    image, label = tfds.features.Image(shape=(4, 3, 1)), tfds.features.ClassLabel(num_classes=3)
    splits = {"train": [example(i) for i in range(1030)], "test": [example(i) for i in range(5)]}
    prepare(folder, "toy_digits", {"image": image, "label": label}, splits)
    return folder


def test_tfds_reads_prepared_files_without_tensorflow(digits, monkeypatch):
    class Block:
        @staticmethod
        def find_spec(name, path=None, target=None):
            assert name.partition(".")[0] != "tensorflow"

    monkeypatch.setattr(sys, "meta_path", [Block, *sys.meta_path])
    data = load(f"tfds:toy_digits@{digits}")
    assert data.name == f"tfds:toy_digits@{digits}"
    assert data.x.shape == (1030, 12)
    assert data.x.dtype == np.uint8
    assert data.y.dtype == np.int32
    assert data.num_classes == 3
    assert data.x_test is not None
    assert data.y_test is not None
    for x, y, n in ((data.x, data.y, 1030), (data.x_test, data.y_test, 5)):
        # in TFDS's own order, so compare as sets
        pairs = sorted(zip(x[:, 0].tolist(), y.tolist(), strict=True))
        assert pairs == sorted((i % 256, i % 3) for i in range(n))
        assert (x == x[:, :1]).all()


def test_tfds_default_folder(digits, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(digits))
    assert load("tfds:toy_digits:1.0.0").x.shape == (1030, 12)


def test_tfds_colour_without_a_test_split(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    image, label = tfds.features.Image(shape=(4, 3, 3)), tfds.features.ClassLabel(num_classes=3)
    pixels = np.arange(36, dtype=np.uint8).reshape(4, 3, 3)
    examples = [{"image": png(pixels), "label": 2}]
    prepare(tmp_path, "toy_colours", {"image": image, "label": label}, {"train": examples})
    data = load(f"tfds:toy_colours@{tmp_path}")
    np.testing.assert_array_equal(data.x, pixels.reshape(1, 36))
    assert data.y.tolist() == [2]
    assert data.x_test is None


def test_tfds_refuses_what_is_no_image_classification(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    image, label = tfds.features.Image(shape=(None, None, 1)), tfds.features.ClassLabel(num_classes=3)
    both = {"image": image, "label": label}
    prepare(tmp_path, "toy_sizes", both, {"train": [example(1), example(2, (3, 4))]})
    with pytest.raises(ValueError, match=r"images of shapes \[\(3, 4, 1\), \(4, 3, 1\)\]: must have one shape"):
        load(f"tfds:toy_sizes@{tmp_path}")
    prepare(tmp_path, "toy_heldout", both, {"validation": [example(1)]})
    with pytest.raises(ValueError, match=r"splits \['validation'\]: must have a split train"):
        load(f"tfds:toy_heldout@{tmp_path}")
    prepare(tmp_path, "toy_unlabelled", {"image": image}, {"train": [{"image": example(1)["image"]}]})
    with pytest.raises(ValueError, match=r"must have image \(uint8\) and label"):
        load(f"tfds:toy_unlabelled@{tmp_path}")
    picture = {"picture": example(1)["image"], "label": 1}
    prepare(tmp_path, "toy_pictures", {"picture": image, "label": label}, {"train": [picture]})
    with pytest.raises(ValueError, match=r"must have image \(uint8\) and label"):
        load(f"tfds:toy_pictures@{tmp_path}")
    number = {"image": np.float32(1), "label": 1}
    prepare(tmp_path, "toy_scalars", {"image": np.float32, "label": label}, {"train": [number]})
    with pytest.raises(ValueError, match=r"must have image \(uint8\) and label"):
        load(f"tfds:toy_scalars@{tmp_path}")
    prepare(tmp_path, "toy_targets", {"image": image, "label": np.int64}, {"train": [example(1)]})
    with pytest.raises(ValueError, match=r"label \(classes\)"):
        load(f"tfds:toy_targets@{tmp_path}")


def test_tfds_other_formats_say_what_to_run(digits, tmp_path):
    folder = tmp_path / "toy_digits" / "1.0.0"
    folder.mkdir(parents=True)
    for file in (digits / "toy_digits" / "1.0.0").iterdir():
        content = file.read_bytes()
        if file.name == "dataset_info.json":
            content = content.replace(b"array_record", b"tfrecord")
        (folder / file.name.replace("array_record", "tfrecord")).write_bytes(content)
    message = "as tfrecord, which only TensorFlow reads; run `tfds build toy_digits --file_format "
    with pytest.raises(ValueError, match=message):
        load(f"tfds:toy_digits@{tmp_path}")


@pytest.mark.parametrize("name", ["mnst", "mnist:9.9.9", "mnist/no_config", "toy_digits", "two words", ""])
def test_tfds_unknown_names_give_one_line(tmp_path, name):
    pytest.importorskip("tensorflow_datasets")
    with pytest.raises(ValueError, match="neither known to TFDS nor prepared in") as raised:
        load(f"tfds:{name}@{tmp_path}")
    message = str(raised.value)
    assert message.startswith(f"tfds:{name}@{tmp_path}: ")
    assert "\n" not in message
    assert len(message) < 600


def test_tfds_without_the_packages_it_needs(tmp_path, monkeypatch):
    pytest.importorskip("tensorflow_datasets")
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)
    with pytest.raises(
        ImportError, match=r"not prepared in .*install the package tensorflow, or run `tfds build mnist "
    ):
        load(f"tfds:mnist@{tmp_path}")
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)
    with pytest.raises(ImportError, match="tfds:mnist: install the package tensorflow-datasets"):
        load("tfds:mnist")


def test_tfds_prepares_in_a_format_that_it_can_read(tmp_path, monkeypatch):
    """A set that TFDS knows and that is not there yet. This one needs no TensorFlow: pretend to have it."""
    tfds = pytest.importorskip("tensorflow_datasets")

    class LaqjaxFreshSet(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        __module__ = "test_datasets"  # TFDS looks for the files of a module with dots, which needs another package

        def _info(self):
            image, label = tfds.features.Image(shape=(4, 3, 1)), tfds.features.ClassLabel(num_classes=3)
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, _):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                yield i, example(i)

    monkeypatch.setattr(datasets, "find_spec", lambda name: object() if name == "tensorflow" else None)
    assert sorted(load(f"tfds:laqjax_fresh_set@{tmp_path}").x[:, 0]) == list(range(6))
    monkeypatch.setattr(datasets, "find_spec", lambda name: None)  # prepared now
    assert len(load(f"tfds:laqjax_fresh_set@{tmp_path}").x) == 6
