"""Data for the experiments: one string names a dataset; `laqjax.partition_data` deals it out to the workers.

    mnist                                   the copy in this repository
    idx:DIR                                 four IDX files under MNIST's names, raw, .gz or .xz
    tfds:NAME, tfds:NAME@DIR                image classification through TensorFlow Datasets
    libsvm:PATH, libsvm-regression:PATH     sparse text, made dense
    synthetic-linear?workers=10&seed=1      also synthetic-logistic; keys as in `synthetic` (workers: M)
    npz:FILE                                arrays x, y and perhaps x_test, y_test
    csv:FILE                                a table with heads; the column y, label or target, else the last, is y
    FILE.py:load                            load() returns (x, y), (x, y, x_test, y_test) or a `Dataset`

In the last three y of integers are class ids, from 0 on. With FILE.py:load x and y may be any pytrees of arrays [n, ...].
Everything here is NumPy on the host. Arrays keep the dtype they are stored in; the oracle casts tile by tile.
"""

import gzip
import hashlib
import lzma
import math
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from experiments.harness import cli, user_code

MNIST_FOLDER = Path(__file__).parents[1] / "mnist"
MNIST_MD5 = {  # of the files inside the .xz; every IDX set uses these names
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
KINDS = ("mnist", "idx", "tfds", "libsvm", "libsvm-regression", "npz", "csv", "synthetic-linear", "synthetic-logistic")
SYNTHETIC_INTEGERS = ("workers", "samples", "features", "seed")
SYNTHETIC_FLOATS = ("condition", "heterogeneity", "noise")
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Dataset:
    """A training set, and a test set where there is one.

    Raises:
        ValueError: x and y disagree in length, a part is empty or not finite, or a label is not a class id.
    """

    name: str
    x: Any  # [n, features]: uint8 for images (flattened), float otherwise; or a pytree of arrays [n, ...]
    y: Any  # [n]: int32 class ids, or float targets for regression; or a pytree
    x_test: Any = None  # as x
    y_test: Any = None
    num_classes: int | None = None  # None where y are no class ids

    def __post_init__(self) -> None:
        self._check("train", self.x, self.y)
        if self.x_test is not None and self.y_test is not None:
            self._check("test", self.x_test, self.y_test)
        elif self.x_test is not None or self.y_test is not None:
            raise ValueError(f"{self.name}: x_test and y_test must come together")

    def _check(self, part: str, x: Any, y: Any) -> None:
        where, k = f"{self.name} ({part})", self.num_classes
        for key, tree in (("x", x), ("y", y)):
            if text := [a.flat[0] for a in jax.tree.leaves(tree) if a.dtype.kind in "OSU" and a.size]:
                raise ValueError(
                    f"{where}: {key} holds {text[0]!r}: expected numbers; classes are whole numbers from 0 on, as of "
                    "numpy.unique(y, return_inverse=True)[1]"
                )
        leaves: list[np.ndarray] = jax.tree.leaves((x, y))
        if len({a.shape[:1] for a in leaves}) != 1 or leaves[0].ndim == 0 or (k is not None and np.ndim(y) != 1):
            raise ValueError(
                f"{where}: expected one label per row of x, got x {_shapes(x)} and y {_shapes(y)}".replace("'", "")
            )
        if any(a.size == 0 for a in leaves):
            raise ValueError(f"{where}: no samples or no features, x has shape {_shapes(x)}")
        if [a.shape[1:] for a in jax.tree.leaves(x)] != [a.shape[1:] for a in jax.tree.leaves(self.x)]:
            raise ValueError(f"{where}: expected rows as in train, of {_shapes(self.x)}, got {_shapes(x)}")
        if not all(np.isfinite(a).all() for a in leaves):
            raise ValueError(f"{where}: NaN or infinity in the data")
        # A label out of range would pass unnoticed later: one_hot makes it a zero row, indexing clamps it.
        if k is not None and (y.dtype != np.int32 or y.min() < 0 or y.max() >= k):
            got = f"{y.dtype} in {y.min()}..{y.max()}"
            raise ValueError(f"{where}: expected int32 labels in 0..{k - 1}, got {got}")


def _shapes(tree: Any) -> Any:
    return jax.tree.map(np.shape, tree)


def load(name: str) -> Dataset:
    """Reads the dataset that a command line names; the module's docstring lists the forms.

    Raises:
        ValueError: the name has none of these forms, or the data are damaged.
        FileNotFoundError: a file is missing.
        ImportError: a `tfds:` name needs a package that is not installed.
    """
    kind, _, argument = name.partition(":")
    if name == "mnist":
        try:
            return _load_idx(name, MNIST_FOLDER, MNIST_MD5)
        except (ValueError, FileNotFoundError) as error:
            remedy = "restore it from the repository: git checkout -- experiments/mnist"
            raise type(error)(f"{error}; {remedy}") from error
    if kind == "idx" and argument:
        return _load_idx(name, Path(argument))
    if kind == "tfds" and argument:
        return _load_tfds(name, *argument.partition("@")[::2])
    if kind in ("libsvm", "libsvm-regression") and argument:
        return _load_libsvm(name, Path(argument), classes=kind == "libsvm")
    if name.startswith("synthetic-"):
        return _load_synthetic(name)
    if kind == "npz" and argument:
        return _load_npz(name, Path(argument))
    if kind == "csv" and argument:
        return _load_csv(name, Path(argument))
    if user_code.is_user_reference(name):
        made = user_code.call_user_function(name)
        if isinstance(made, Dataset):
            return made
        if not isinstance(made, tuple) or len(made) not in (2, 4):
            raise ValueError(f"{name} returned {made!r:.80}: expected (x, y), (x, y, x_test, y_test) or a Dataset")
        return _infer_dataset(name, *made)
    raise ValueError(
        f"dataset {name!r}: expected mnist, idx:DIR, tfds:NAME[@DIR], libsvm:PATH, libsvm-regression:PATH, npz:FILE, "
        "csv:FILE, FILE.py:load, synthetic-linear[?KEY=VALUE&...] or synthetic-logistic[?KEY=VALUE&...]"
        f"{cli.suggest(kind.partition('?')[0], KINDS)}"
    )


def _infer_dataset(name: str, x: Any, y: Any, x_test: Any = None, y_test: Any = None) -> Dataset:
    """Of somebody's arrays: flat whole numbers from 0 on are classes."""
    x, y, x_test, y_test = jax.tree.map(np.asarray, (x, y, x_test, y_test))
    if not (np.ndim(y) == 1 and hasattr(y, "dtype") and np.issubdtype(y.dtype, np.integer)):
        return Dataset(name, x, y, x_test, y_test)
    y, y_test = (a if a is None else a.astype(np.int32) for a in (y, y_test))
    return Dataset(name, x, y, x_test, y_test, int(y.max(initial=0)) + 1)


def _load_npz(name: str, path: Path) -> Dataset:
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    except (TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:  # TypeError: an .npy file
        if "Object arrays" in str(error):
            raise ValueError(
                f"{name}: an array holds Python objects: expected arrays of numbers, classes from 0 on"
            ) from None
        raise ValueError(f"{path} is damaged, or no .npz file: {error}") from None
    if not {"x", "y"} <= arrays.keys() <= {"x", "y", "x_test", "y_test"}:
        raise ValueError(f"{name}: expected arrays x and y, and perhaps x_test and y_test; got {sorted(arrays)}")
    return _infer_dataset(name, **arrays)


def _load_csv(name: str, path: Path) -> Dataset:
    table = pl.read_csv(path, infer_schema_length=None)
    text = [column for column, kind in table.schema.items() if not kind.is_numeric()]
    if text or not table.width > 1:
        raise ValueError(f"{name}: expected two or more columns of numbers under one line of heads; not so: {text}")
    target = next((column for column in ("y", "label", "target") if column in table.columns), table.columns[-1])
    return _infer_dataset(name, table.drop(target).to_numpy().astype(np.float32), table[target].to_numpy())


def _decompress(path: Path) -> bytes:
    """The content of a file, unpacked as its suffix says."""
    unpack = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix, bytes)
    packed = path.read_bytes()
    try:
        return unpack(packed)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _load_idx(name: str, folder: Path, md5: Mapping[str, str] | None = None) -> Dataset:
    arrays = []
    for stem in MNIST_MD5:
        path = next((p for end in ("", ".gz", ".xz") if (p := folder / f"{stem}{end}").is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{name}: no {stem}, raw, .gz or .xz, in {folder}")
        content = _decompress(path)
        if md5 and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5[stem]:
            raise ValueError(f"{path} is damaged: the MD5 of its content is not {md5[stem]}")
        arrays.append(_parse_idx(content, path))
    x, y, x_test, y_test = arrays
    num_classes = int(y.max(initial=0)) + 1
    return Dataset(
        name, _flatten_images(x), y.astype(np.int32), _flatten_images(x_test), y_test.astype(np.int32), num_classes
    )


def _parse_idx(content: bytes, path: Path) -> np.ndarray:
    """IDX of unsigned bytes: 0, 0, 8, ndim, the sizes as big-endian uint32, then the data in C order."""
    if content[:3] != b"\0\0\x08" or len(content) < 8:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path} is damaged: shape {shape} but {len(content) - start} bytes of data")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _flatten_images(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), math.prod(images.shape[1:]))


def _load_tfds(name: str, dataset: str, folder: str) -> Dataset:
    """The splits "train" and, where there is one, "test" of a set with the features "image" and "label".

    Prepared files are read without TensorFlow. TFDS stores a set in a shuffled order of its own, so the
    contiguous shards of tfds:mnist are not those of mnist.
    """
    try:
        import tensorflow_datasets as tfds  # here: optional, and a second to import
    except ImportError as error:
        raise ImportError(f"{name}: install the package tensorflow-datasets ({error})") from error
    where = folder or "TFDS's default folder"
    try:
        builder: Any = tfds.builder(dataset, data_dir=folder or None)
    except (ValueError, AssertionError) as error:  # the latter for a version that does not exist
        reason = str(error).strip().split("\n")[0]  # then comes a list of all sets that TFDS knows
        raise ValueError(
            f"{name}: neither known to TFDS nor prepared in {where}. Check NAME[/CONFIG][:VERSION] and "
            f"the folder (TFDS says: {reason})"
        ) from error
    prepare = f"`tfds build {dataset} --file_format array_record --data_dir DIR`"
    if not builder.is_prepared():
        if find_spec("tensorflow") is None:
            raise ImportError(
                f"{name}: not prepared in {where}, and preparing it takes TensorFlow. Install the package "
                f"tensorflow, or run {prepare} where it is installed and load tfds:{dataset}@DIR"
            )
        builder.download_and_prepare(file_format="array_record")  # TFDS's own default cannot be read below
    try:
        sources = builder.as_data_source()
    except NotImplementedError as error:
        raise ValueError(
            f"{name}: prepared in {where} as {builder.info.file_format.value}, which only TensorFlow reads. "
            f"Run {prepare} with another folder and load tfds:{dataset}@DIR"
        ) from error
    features = dict(builder.info.features.items())
    num_classes = getattr(features.get("label"), "num_classes", None)
    if "image" not in features or features["image"].np_dtype != np.uint8 or num_classes is None:
        raise ValueError(f"{name}: expected features image (uint8) and label (classes), got {features}")
    if "train" not in sources:
        raise ValueError(f"{name}: expected a split train, got {sorted(sources)}")
    test = _read_source(name, sources["test"]) if "test" in sources else (None, None)
    return Dataset(name, *_read_source(name, sources["train"]), *test, num_classes)


def _read_source(name: str, source: Any) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for start in range(0, len(source), 1024):  # by batches: record by record takes twice as long
        for example in source.__getitems__(range(start, min(start + 1024, len(source)))):
            images.append(example["image"])
            labels.append(example["label"])
    shapes = {image.shape for image in images}
    if len(shapes) != 1:
        raise ValueError(f"{name}: expected images of one shape, got {sorted(shapes)[:4]}")
    return _flatten_images(np.stack(images)), np.array(labels, np.int32)


def _load_libsvm(name: str, path: Path, classes: bool) -> Dataset:
    """A file, or a folder with train[.*] and perhaps test[.*]. Class labels become ids in sorted order."""
    files = [path]
    if path.is_dir():
        files = [file for stem in ("train", "test") for end in ("", ".*") for file in path.glob(stem + end)]
        if [file.name.split(".")[0] for file in files] not in (["train"], ["train", "test"]):
            got = sorted(file.name for file in files)
            raise ValueError(f"{name}: expected one train or train.*, at most one test or test.*, got {got}")
    parts = [_parse_libsvm(file, classes) for file in files]
    num_features = max(max(columns, default=0) for _, _, columns, _ in parts)
    labels = np.unique(parts[0][0])
    arrays = []
    for targets, rows, columns, values in parts:
        x = np.zeros((len(targets), num_features), np.float32)
        x[rows, np.array(columns, int) - 1] = values
        y = np.array(targets, np.float32)
        if classes:
            if unknown := set(targets) - set(labels):
                raise ValueError(f"{name}: test labels {sorted(unknown)} do not occur in train")
            y = np.searchsorted(labels, targets).astype(np.int32)
        arrays += [x, y]
    x, y, x_test, y_test = arrays if len(arrays) == 4 else (*arrays, None, None)
    return Dataset(name, x, y, x_test, y_test, len(labels) if classes else None)


def _parse_libsvm(path: Path, classes: bool) -> tuple[list[float], list[int], list[int], list[float]]:
    """Targets [n], and the row, column (from 1) and value of each entry. Skips blank lines and # comments."""
    targets, rows, columns, values = [], [], [], []
    for number, line in enumerate(_decompress(path).decode(errors="replace").split("\n"), start=1):
        tokens = line.partition("#")[0].split()
        if not tokens:
            continue
        try:
            target = _parse_float32(tokens[0])
            if classes and not target.is_integer():
                raise ValueError(f"label {tokens[0]} is not a class; libsvm-regression: reads targets")
            last = 0
            for token in tokens[1:]:
                index, _, value = token.partition(":")
                if not (value and index.isdecimal() and int(index) > last):
                    raise ValueError(f"expected INDEX:VALUE, indices ascending from 1, got {token!r}")
                last = int(index)
                rows.append(len(targets))
                columns.append(last)
                values.append(_parse_float32(value))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        targets.append(target)
    return targets, rows, columns, values


def _parse_float32(text: str) -> float:
    value = float(text)
    if not abs(value) <= FLOAT32_MAX:  # this way round NaN is caught too
        raise ValueError(f"{text} is not a finite float32")
    return value


def _load_synthetic(name: str) -> Dataset:
    kind, _, query = name.removeprefix("synthetic-").partition("?")
    settings: dict[str, Any] = {}
    for item in query.split("&") if query else ():
        key, _, text = item.partition("=")
        if key not in SYNTHETIC_INTEGERS + SYNTHETIC_FLOATS:
            known = ", ".join(SYNTHETIC_INTEGERS + SYNTHETIC_FLOATS)
            hint = cli.suggest(key, SYNTHETIC_INTEGERS + SYNTHETIC_FLOATS)
            raise ValueError(f"{name}: unknown key {key!r}, expected one of {known}{hint}")
        try:
            value = int(text) if key in SYNTHETIC_INTEGERS else float(text)
        except ValueError as error:
            raise ValueError(f"{name}: {key}: {error}") from None
        settings["num_workers" if key == "workers" else key] = value
    return synthetic(kind, **settings)


def synthetic(
    kind: str,
    num_workers: int = 10,
    samples: int = 50,
    features: int = 20,
    condition: float = 100.0,
    heterogeneity: float = 0.0,
    seed: int = 0,
    noise: float = 0.1,
) -> Dataset:
    """A random linear or logistic problem with a chosen condition number and a chosen spread of the workers.

    The pooled Gram matrix X'X / (M N) has eigenvalues in geometric progression from 1 / condition to 1.
    L_m, the largest eigenvalue of worker m's X_m'X_m / N, grows geometrically with m over `heterogeneity`
    decades, up to sampling; 0 gives every worker the same distribution. Where `samples` is not well above
    `features` the spread comes out smaller, as the condition number of the whole has precedence.

    Args:
        kind: "linear" (float targets) or "logistic" (classes 0 and 1).
        num_workers: M; worker m owns rows m N to (m + 1) N of x, as the contiguous partition cuts them.
        samples: N, of each worker.
        features: columns of x (float64), at most M N.
        condition: >= 1.
        heterogeneity: >= 0, about log10(max L_m / min L_m).
        seed: the same seed gives the same data.
        noise: standard deviation relative to the signal's; in "logistic" it flips labels near the boundary.

    Raises:
        ValueError: an argument is out of its range.
    """
    n = num_workers * samples
    for argument, value, valid, expected in (
        ("kind", kind, kind in ("linear", "logistic"), "linear or logistic"),
        ("num_workers", num_workers, num_workers >= 1, "at least 1"),
        ("samples", samples, samples >= 1, "at least 1"),
        ("features", features, 1 <= features <= n, f"1 to num_workers * samples = {n}"),
        ("condition", condition, 1 <= condition < math.inf, "finite and at least 1"),
        ("condition", condition, features > 1 or condition == 1, "1 where there is one feature"),
        ("heterogeneity", heterogeneity, 0 <= heterogeneity < math.inf, "finite and at least 0"),
        ("noise", noise, 0 <= noise < math.inf, "finite and at least 0"),
        ("seed", seed, seed >= 0, "at least 0"),
    ):
        if not valid:
            raise ValueError(f"synthetic {argument}={value!r}: expected {expected}")
    rng = np.random.default_rng(seed)
    scale = np.sqrt(10.0 ** (heterogeneity * np.linspace(-1, 0, num_workers)))
    raw = np.repeat(scale, samples)[:, None] * rng.standard_normal((n, features))
    # One matrix on the right for all workers, raw -> orthonormal columns -> spectrum -> rotated axes, fixes
    # the pooled Gram matrix and leaves the workers their scales.
    orthonormal = np.linalg.qr(raw).Q
    rotation = np.linalg.qr(rng.standard_normal((features, features))).Q
    x = orthonormal * np.sqrt(n * np.geomspace(1 / condition, 1, features)) @ rotation
    signal = x @ rng.standard_normal(features)
    y = signal / np.sqrt(np.mean(signal**2)) + noise * rng.standard_normal(n)
    if kind == "linear":
        return Dataset("synthetic-linear", x, y)
    return Dataset("synthetic-logistic", x, (y > 0).astype(np.int32), num_classes=2)
