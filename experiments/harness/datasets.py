"""Data of the experiments: one string names a data set; `laqjax.partition_data` splits it over the workers.

    mnist                                   the copy in this repository
    idx:DIR                                 four IDX files under MNIST's names, raw, .gz or .xz
    tfds:NAME, tfds:NAME@DIR                image classification through TensorFlow Datasets
    libsvm:PATH, libsvm-regression:PATH     sparse text, converted to dense arrays
    synthetic-linear?workers=10&seed=1      also synthetic-logistic; keys: the arguments of `synthetic`
    npz:FILE                                arrays x and y, optionally x_test and y_test
    csv:FILE                                numbers under a header; y is the column y, label or target, or the last one
    FILE.py:load                            load() returns (x, y), (x, y, x_test, y_test) or a `Dataset`

In the last three, integers y are class ids >= 0. With FILE.py:load, x and y may be any pytrees of arrays [n, ...].
All arrays are NumPy arrays on the host, in the dtype of the file; the oracle casts them tile by tile.
"""

import gzip
import hashlib
import inspect
import lzma
import math
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
import polars as pl

from experiments.harness import user_code
from experiments.harness.arguments import parse_literal, suggest
from laqjax import check_number

MNIST_FOLDER = Path(__file__).parents[1] / "mnist"
MNIST_MD5 = {  # of the files inside the .xz; every IDX set uses these names
    "train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
    "train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
    "t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
    "t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
}
FLOAT32_MAX = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Dataset:
    """Training set, and test set where there is one."""

    name: str
    x: Any  # [n, features]: uint8 for images (flattened), float otherwise; or a pytree of arrays [n, ...]
    y: Any  # [n]: int32 class ids, or float targets for regression; or a pytree
    x_test: Any = None  # as x
    y_test: Any = None
    num_classes: int | None = None  # None where y are no class ids

    def __post_init__(self) -> None:
        self._check("train", self.x, self.y)
        if (self.x_test is None) != (self.y_test is None):
            raise ValueError(f"{self.name}: x_test and y_test must come together")
        if self.x_test is not None:
            self._check("test", self.x_test, self.y_test)

    def _check(self, part: str, x: Any, y: Any) -> None:
        where, k = f"{self.name} ({part})", self.num_classes
        for key, tree in (("x", x), ("y", y)):
            if text := [a.flat[0] for a in jax.tree.leaves(tree) if a.dtype.kind in "OSU" and a.size]:
                raise ValueError(
                    f"{where}: {key} holds {text[0]!r}: must be numbers; make class ids from 0 on by "
                    "numpy.unique(y, return_inverse=True)[1]"
                )
        leaves: list[np.ndarray] = jax.tree.leaves((x, y))
        shapes = f"x {_shapes(x)} and y {_shapes(y)}".replace("'", "")
        if len({a.shape[:1] for a in leaves}) != 1 or leaves[0].ndim == 0 or (k is not None and np.ndim(y) != 1):
            raise ValueError(f"{where}: {shapes}: must have one label per row of x")
        if any(a.size == 0 for a in leaves):
            raise ValueError(f"{where}: {shapes}: no samples or no features")
        if [a.shape[1:] for a in jax.tree.leaves(x)] != [a.shape[1:] for a in jax.tree.leaves(self.x)]:
            raise ValueError(f"{where}: x {_shapes(x)}: must have rows as in train, {_shapes(self.x)}")
        if not all(np.isfinite(a).all() for a in leaves):
            raise ValueError(f"{where}: NaN or infinity in the data")
        # an invalid label would pass unnoticed later: one_hot makes it a zero row, indexing clamps it
        if k is not None and (y.dtype != np.int32 or y.min() < 0 or y.max() >= k):
            raise ValueError(f"{where}: {y.dtype} labels in {y.min()}..{y.max()}: must be int32 labels in 0..{k - 1}")


def _shapes(tree: Any) -> Any:
    return jax.tree.map(np.shape, tree)


def load(name: str) -> Dataset:
    """Load the data set of a name; the module's docstring lists the forms."""
    if name == "mnist":
        try:
            return _load_idx(name, MNIST_FOLDER, MNIST_MD5)
        except (ValueError, FileNotFoundError) as error:
            remedy = "restore it from the repository: git checkout -- experiments/mnist"
            raise type(error)(f"{error}; {remedy}") from error
    kind, _, argument = name.partition(":")
    loaders: dict[str, Callable[[str, Path], Dataset]] = {"idx": _load_idx, "tfds": _load_tfds, "npz": _load_npz}
    loaders |= {"csv": _load_csv, "libsvm": _load_libsvm, "libsvm-regression": _load_libsvm}
    if kind in loaders and argument:
        return loaders[kind](name, Path(argument))
    if name.startswith("synthetic-"):
        return _load_synthetic(name)
    if user_code.is_user_reference(name):
        made = user_code.call_user_function(name)
        if isinstance(made, Dataset):
            return made
        if not isinstance(made, tuple) or len(made) not in (2, 4):
            raise ValueError(f"{name} returned {made!r:.80}: must be (x, y), (x, y, x_test, y_test) or a Dataset")
        return _infer_dataset(name, *made)
    known = ("mnist", *loaders, "synthetic-linear", "synthetic-logistic")
    raise ValueError(
        f"dataset = {name!r}: must be mnist, idx:DIR, tfds:NAME[@DIR], libsvm:PATH, libsvm-regression:PATH, npz:FILE, "
        "csv:FILE, FILE.py:load, synthetic-linear[?KEY=VALUE&...] or synthetic-logistic[?KEY=VALUE&...]"
        f"{suggest(kind.partition('?')[0], known)}"
    )


def _infer_dataset(name: str, x: Any, y: Any, x_test: Any = None, y_test: Any = None) -> Dataset:
    """Make a data set of arrays, in which flat integers are class ids."""
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
            raise ValueError(f"{name}: an array holds Python objects: must be numbers, classes from 0 on") from None
        raise ValueError(f"{path} is damaged, or no .npz file: {error}") from None
    if not {"x", "y"} <= arrays.keys() <= {"x", "y", "x_test", "y_test"}:
        raise ValueError(f"{name}: arrays {sorted(arrays)}: must be x and y, and optionally x_test and y_test")
    return _infer_dataset(name, **arrays)


def _load_csv(name: str, path: Path) -> Dataset:
    table = pl.read_csv(path, infer_schema_length=None)
    text = [column for column, kind in table.schema.items() if not kind.is_numeric()]
    if text or table.width < 2:
        raise ValueError(f"{name}: columns without numbers: {text}: must be two or more of numbers under a header")
    target = next((column for column in ("y", "label", "target") if column in table.columns), table.columns[-1])
    return _infer_dataset(name, table.drop(target).to_numpy().astype(np.float32), table[target].to_numpy())


def _read_bytes(path: Path) -> bytes:
    """Read a file, and decompress it if its suffix is .gz or .xz."""
    decompress = {".gz": gzip.decompress, ".xz": lzma.decompress}.get(path.suffix, bytes)
    content = path.read_bytes()
    try:
        return decompress(content)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _load_idx(name: str, folder: Path, md5: Mapping[str, str] | None = None) -> Dataset:
    arrays = []
    for stem in MNIST_MD5:
        path = next((p for end in ("", ".gz", ".xz") if (p := folder / f"{stem}{end}").is_file()), None)
        if path is None:
            raise FileNotFoundError(f"{name}: no {stem}, raw, .gz or .xz, in {folder}")
        content = _read_bytes(path)
        if md5 and hashlib.md5(content, usedforsecurity=False).hexdigest() != md5[stem]:
            raise ValueError(f"{path} is damaged: the MD5 of its content is not {md5[stem]}")
        arrays.append(_parse_idx(content, path))
    x, y, x_test, y_test = arrays
    y, y_test = y.astype(np.int32), y_test.astype(np.int32)
    return Dataset(name, _flatten(x), y, _flatten(x_test), y_test, int(y.max(initial=0)) + 1)


def _parse_idx(content: bytes, path: Path) -> np.ndarray:
    """Parse IDX of unsigned bytes: 0, 0, 8, ndim, the sizes as big-endian uint32, then the data in C order."""
    if content[:3] != b"\0\0\x08" or len(content) < 8:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    start = 4 + 4 * content[3]
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise ValueError(f"{path} is damaged: shape {shape} but {len(content) - start} bytes of data")
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _flatten(images: np.ndarray) -> np.ndarray:
    return images.reshape(len(images), math.prod(images.shape[1:]))


def _load_tfds(name: str, path: Path) -> Dataset:
    """Load the splits "train" and, where there is one, "test" of a set with the features "image" and "label".

    Prepared files are read without TensorFlow. TFDS stores a set in a shuffled order, so that the contiguous shards of
    tfds:mnist are not those of mnist.
    """
    try:
        import tensorflow_datasets as tfds  # here: optional, and a second to import
    except ImportError as error:
        raise ImportError(f"{name}: install the package tensorflow-datasets ({error})") from error
    dataset, _, folder = name.removeprefix("tfds:").partition("@")
    where = folder or "TFDS's default folder"
    try:
        builder: Any = tfds.builder(dataset, data_dir=folder or None)
    except (ValueError, AssertionError) as error:  # AssertionError: a version that does not exist
        reason = str(error).strip().split("\n")[0]  # the next lines list all sets that TFDS knows
        raise ValueError(
            f"{name}: neither known to TFDS nor prepared in {where}; check NAME[/CONFIG][:VERSION] and the folder "
            f"(TFDS: {reason})"
        ) from error
    prepare = f"`tfds build {dataset} --file_format array_record --data_dir DIR`"
    if not builder.is_prepared():
        if find_spec("tensorflow") is None:
            raise ImportError(
                f"{name}: not prepared in {where}, and preparing it takes TensorFlow; install the package tensorflow, or "
                f"run {prepare} where it is installed and load tfds:{dataset}@DIR"
            )
        builder.download_and_prepare(file_format="array_record")  # TFDS's own default cannot be read below
    try:
        sources = builder.as_data_source()
    except NotImplementedError as error:
        raise ValueError(
            f"{name}: prepared in {where} as {builder.info.file_format.value}, which only TensorFlow reads; run {prepare} "
            f"with another folder and load tfds:{dataset}@DIR"
        ) from error
    features = dict(builder.info.features.items())
    num_classes = getattr(features.get("label"), "num_classes", None)
    if "image" not in features or features["image"].np_dtype != np.uint8 or num_classes is None:
        raise ValueError(f"{name}: features {features}: must have image (uint8) and label (classes)")
    if "train" not in sources:
        raise ValueError(f"{name}: splits {sorted(sources)}: must have a split train")
    test = _read_source(name, sources["test"]) if "test" in sources else (None, None)
    return Dataset(name, *_read_source(name, sources["train"]), *test, num_classes)


def _read_source(name: str, source: Any) -> tuple[np.ndarray, np.ndarray]:
    rows = range(len(source))
    parts = [rows[i : i + 1024] for i in rows[::1024]]  # twice as fast as single records
    examples = [(example["image"], example["label"]) for part in parts for example in source.__getitems__(part)]
    if len(shapes := {image.shape for image, _ in examples}) != 1:
        raise ValueError(f"{name}: images of shapes {sorted(shapes)[:4]}: must have one shape")
    return _flatten(np.stack([image for image, _ in examples])), np.array([label for _, label in examples], np.int32)


def _load_libsvm(name: str, path: Path) -> Dataset:
    """Load a file, or a folder with train[.*] and optionally test[.*]. Class labels become ids in sorted order."""
    files, classes = [path], name.startswith("libsvm:")
    if path.is_dir():
        files = [file for stem in ("train", "test") for end in ("", ".*") for file in path.glob(stem + end)]
        if [file.name.split(".")[0] for file in files] not in (["train"], ["train", "test"]):
            got = sorted(file.name for file in files)
            raise ValueError(f"{name}: files {got}: must be one train or train.*, and at most one test or test.*")
    parts = [_parse_libsvm(file, classes) for file in files]
    num_features = max((max(row, default=0) for _, rows in parts for row in rows), default=0)
    labels, arrays = np.unique(parts[0][0]), []
    for targets, rows in parts:
        x, y = np.zeros((len(rows), num_features), np.float32), np.array(targets, np.float32)
        for i, row in enumerate(rows):
            x[i, np.array([*row], int) - 1] = [*row.values()]
        if classes:
            if unknown := set(targets) - set(labels):
                raise ValueError(f"{name}: test labels {sorted(unknown)} do not occur in train")
            y = np.searchsorted(labels, targets).astype(np.int32)
        arrays += [x, y]
    return Dataset(name, *arrays, num_classes=len(labels) if classes else None)


def _parse_libsvm(path: Path, classes: bool) -> tuple[list[float], list[dict[int, float]]]:
    """Parse the targets and rows {column (from 1): value}; blank lines and # comments are skipped."""
    targets, rows = [], []
    for number, line in enumerate(_read_bytes(path).decode(errors="replace").split("\n"), start=1):
        if not (words := line.partition("#")[0].split()):
            continue
        try:
            target, row = _parse_float32(words[0]), {}
            if classes and not target.is_integer():
                raise ValueError(f"label {words[0]} is not a class; libsvm-regression: reads targets")
            for word in words[1:]:
                index, _, value = word.partition(":")
                if not (value and index.isdecimal() and int(index) > next(reversed(row), 0)):
                    raise ValueError(f"{word!r}: must be INDEX:VALUE, indices ascending from 1")
                row[int(index)] = _parse_float32(value)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        targets.append(target)
        rows.append(row)
    return targets, rows


def _parse_float32(text: str) -> float:
    if not abs(value := float(text)) <= FLOAT32_MAX:  # False for NaN too
        raise ValueError(f"{text} is not a finite float32")
    return value


def _load_synthetic(name: str) -> Dataset:
    kind, _, query = name.removeprefix("synthetic-").partition("?")
    settings = {item.partition("=")[0]: item.partition("=")[2] for item in query.split("&") if item}
    known = [*inspect.signature(synthetic).parameters][1:]
    for key in settings:
        if key not in known:
            raise ValueError(f"{name}: key {key!r}: must be one of {', '.join(known)}{suggest(key, known)}")
    return synthetic(kind, **{key: parse_literal(text) for key, text in settings.items()})


def synthetic(
    kind: str,
    workers: int = 10,
    samples: int = 50,
    features: int = 20,
    condition: float = 100.0,
    heterogeneity: float = 0.0,
    seed: int = 0,
    noise: float = 0.1,
) -> Dataset:
    """Make a random linear or logistic problem with a given condition number and a given spread of the workers.

    The pooled Gram matrix X'X / (M N) has eigenvalues in geometric progression from 1 / condition to 1. L_m, the
    largest eigenvalue of worker m's X_m'X_m / N, grows geometrically with m over `heterogeneity` decades, up to
    sampling; 0 gives all workers the same distribution. The spread is smaller where `samples` is not well above
    `features`, since the condition number of the whole has precedence.

    Args:
        kind: "linear" (float targets) or "logistic" (classes 0 and 1).
        workers: M; worker m has rows m N to (m + 1) N of x, as in the contiguous partition.
        samples: N, rows of each worker.
        features: columns of x (float64), at most M N.
        condition: condition number >= 1.
        heterogeneity: about log10(max L_m / min L_m), >= 0.
        seed: seed of the data.
        noise: standard deviation relative to the signal's; in "logistic" it flips labels near the boundary.
    """
    name = f"synthetic-{kind}"
    if kind not in ("linear", "logistic"):
        raise ValueError(f"{name}: kind = {kind!r}: must be linear or logistic")

    def check(key: str, value: Any, dtype: Any, minimum: float, maximum: float = np.inf) -> Any:
        return check_number(f"{name}: {key}", value, dtype, minimum=minimum, maximum=maximum).item()

    workers, samples = check("workers", workers, np.int64, 1), check("samples", samples, np.int64, 1)
    n = workers * samples
    features = check("features", features, np.int64, 1, n)
    condition = check("condition", condition, np.float64, 1, 1 if features == 1 else np.inf)
    heterogeneity, noise = check("heterogeneity", heterogeneity, np.float64, 0), check("noise", noise, np.float64, 0)
    rng = np.random.default_rng(check("seed", seed, np.int64, 0))
    scale = np.sqrt(10.0 ** (heterogeneity * np.linspace(-1, 0, workers)))
    raw = np.repeat(scale, samples)[:, None] * rng.standard_normal((n, features))
    # one matrix on the right for all workers (raw -> orthonormal columns -> spectrum -> rotated axes) fixes the pooled
    # Gram matrix and keeps the scales of the workers
    orthonormal = np.linalg.qr(raw).Q
    rotation = np.linalg.qr(rng.standard_normal((features, features))).Q
    x = orthonormal * np.sqrt(n * np.geomspace(1 / condition, 1, features)) @ rotation
    signal = x @ rng.standard_normal(features)
    y = signal / np.sqrt(np.mean(signal**2)) + noise * rng.standard_normal(n)
    if kind == "linear":
        return Dataset(name, x, y)
    return Dataset(name, x, (y > 0).astype(np.int32), num_classes=2)
