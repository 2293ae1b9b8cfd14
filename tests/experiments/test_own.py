"""Files of the user's in the commands: data, problems, algorithms; and what is said when they are wrong."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import equinox as eqx
import jax
import numpy as np
import optax
import polars as pl
import pytest

from experiments import compare, sweep, tune
from experiments.figures import drawing, style
from experiments.harness import comparison, datasets, grid, user_code

EXAMPLES = Path(__file__).parents[2] / "experiments" / "examples"
OWN = """
import numpy as np, jax, jax.numpy as jnp, laqjax, optax
from flax import linen as nn

def load():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 3)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64), x[:8], (x[:8, 0] > 0).astype(np.int64)

def make(data):
    margin = lambda w, x, y: (2 * y.astype(x.dtype) - 1) * (x @ w)
    return (lambda w, x, y: jax.nn.softplus(-margin(w, x, y)), lambda seed: np.zeros(3, np.float32),
            lambda w, x, y: jnp.mean(margin(w, x, y) > 0))

def slow(oracle, *, lr, num_workers, patience=3, sampler=None):
    return laqjax.algorithms.laq(oracle, lr=lr, num_workers=num_workers, max_silence=patience, window=1)

class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.relu(nn.Conv(2, (3, 3), strides=2)(x)).reshape(len(x), -1))

def images():
    rng = np.random.default_rng(0)
    y = rng.integers(0, 2, 80)
    x = (rng.normal(size=(80, 6, 6, 1)) + y[:, None, None, None]).astype(np.float32)
    return x[:64], y[:64], x[64:], y[64:]

def cnn(data):
    return (lambda w, x, y: optax.softmax_cross_entropy_with_integer_labels(Net().apply(w, x), y),
            lambda seed: Net().init(jax.random.key(seed), data.x[:1]),
            lambda w, x, y: jnp.mean(Net().apply(w, x).argmax(axis=1) == y))

def average(data):
    return (lambda w, x, y: jnp.mean((x @ w - y.astype(x.dtype)) ** 2)), lambda seed: np.zeros(3, np.float32)

def wrong(data):
    return data.nothing

def key(data):
    return lambda w, x, y: w["a"], lambda seed: np.zeros(3), None or (lambda w, x, y: 0.5)

def number(data):
    return 3

nothing = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of the user's, under a name of its own: modules are read once."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / f"own_{tmp_path.name.replace('-', '_')}.py"
    path.write_text(OWN)
    return path


def run(*given: str) -> pl.DataFrame:
    sweep.main([*given, "--workers", "4", "--compute-ms", "1", "--out", "out"])
    return pl.read_parquet("out/points.parquet")


def test_data_problem_and_algorithm_of_ones_own(own: Path) -> None:
    task = ["--dataset", f"{own}:load", "--problem", f"{own}:make", "--algorithm", f"{own}:slow", "--lr", "0.5"]
    task += ["--rounds", "40", "--eval-every", "10", "--target-accuracy", "0.6", "0.95"]
    table = run(*task, "--set", "patience", "1", "5")
    assert table["patience"].to_list() == [1, 5]
    assert table["reached"].all()
    assert (table["rounds_0.95"] % 10 == 0).all()
    assert table["f_star"].is_null().all()
    assert table["uploads_end"][0] > table["uploads_end"][1]
    settings = grid.parse_settings(
        tune.Settings, [*task, "--set", "patience", "1", "5", "--trials", "4", "--batch-size", "2"], None
    )
    tune.run(replace(settings, data=replace(settings.data, workers=(4,)), out=Path("tuned")))
    trials = pl.read_parquet("tuned/trials.parquet")
    assert trials["patience"].is_between(1, 5).all()
    assert len(trials) == 4


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--problem", "{}:key"], "{}:key, loss: "),
        (["--problem", "{}:wrong"], "{}:wrong: AttributeError: 'Dataset' object has no attribute 'nothing' (line 38)"),
        (["--problem", "{}:average"], "error: loss_fn(params, x, y) returned "),
        (["--problem", "{}:average"], "average inside the loss, since the oracle averages by the weights (points 0-1)"),
        (["--problem", "{}:average", "--algorithm", "sgd", "--minibatch", "2"], "do not average inside the loss"),
        (
            ["--problem", "{}:number"],
            "{}:number returned 3: must be functions (loss, start) or (loss, start, accuracy)",
        ),
        (["--problem", "{}:nothing"], "{}:nothing: {} has no function nothing"),
        (["--problem", "none.py:make"], "none.py is missing: must be FILE.py:NAME"),
        (["--algorithm", "{}:slow", "--set", "pace", "3"], "--set pace: must be an argument of {}:slow"),
        (["--algorithm", "{}:slow", "--set", "patience", "-3"], "{}:slow: ValueError: max_silence = -3: must be"),
        (["--dataset", "{}:slow"], "{}:slow: TypeError: slow() missing 1 required positional argument: 'oracle'"),
        (["--dataset", "{}:nothing"], "{}:nothing: {} has no function nothing"),
    ],
)
def test_what_is_wrong_in_it_is_said(given: list[str], said: str, own: Path) -> None:
    task = ["--dataset", f"{own}:load", "--problem", f"{own}:make", *(word.format(own) for word in given)]
    with pytest.raises(SystemExit) as stop:
        run(*task, "--lr", "0.01", "0.02", *([] if "--algorithm" in given else ["-b", "4", "-C", "5", "-D", "1"]))
    assert said.format(own, own) in str(stop.value)
    assert not Path("out").exists()


def test_a_file_that_cannot_be_read(own: Path) -> None:
    own.write_text("x = 1\ny = 1 / 0\n")
    with pytest.raises(ValueError, match=r"cannot be read: ZeroDivisionError: division by zero \(line 2\)"):
        user_code.load_user_function(f"{own}:make")


def test_npz_and_csv(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 3)).astype(np.float32), np.array([0, 1, 2, 0, 1, 2])
    np.savez(tmp_path / "a.npz", x=x, y=y, x_test=x[:2], y_test=y[:2])
    data = datasets.load(f"npz:{tmp_path / 'a.npz'}")
    np.testing.assert_array_equal(data.x, x)
    assert (data.num_classes, data.y.dtype, len(data.x_test)) == (3, np.int32, 2)
    np.savez(tmp_path / "b.npz", x=x, z=y)
    with pytest.raises(ValueError, match=r"arrays \['x', 'z'\]: must be x and y"):
        datasets.load(f"npz:{tmp_path / 'b.npz'}")
    for labels in (np.array(list("abcabc")), np.array(list("abcabc"), object)):
        np.savez(tmp_path / "t.npz", x=x, y=labels)
        with pytest.raises(ValueError, match=r"npz:.*t\.npz.*: must be .*numbers.*from 0 on"):
            datasets.load(f"npz:{tmp_path / 't.npz'}")
    (tmp_path / "c.npz").write_bytes(b"PK..")
    with pytest.raises(ValueError, match=r"is damaged, or no \.npz file"):
        datasets.load(f"npz:{tmp_path / 'c.npz'}")
    pl.DataFrame(x, schema=["a", "b", "c"]).insert_column(1, pl.Series("label", y)).write_csv(tmp_path / "a.csv")
    data = datasets.load(f"csv:{tmp_path / 'a.csv'}")
    np.testing.assert_allclose(data.x, x)
    assert data.y.tolist() == y.tolist()
    (tmp_path / "b.csv").write_text("a,b\n1,2\nx,3\n")
    with pytest.raises(ValueError, match=r"columns without numbers: \['a'\]: must be two or more of numbers"):
        datasets.load(f"csv:{tmp_path / 'b.csv'}")


@pytest.mark.long
def test_a_flax_cnn_in_sweep_tune_and_compare(
    own: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a smoothness constant there is no step of theory: no column, no marker, no word of it."""
    task = ["--dataset", f"{own}:images", "--problem", f"{own}:cnn", "--partition", "dirichlet:1", "--workers", "4"]
    task += ["--rounds", "40", "--eval-every", "10", "--target-accuracy", "0.7", "--compute-ms", "1"]
    sweep.main([*task, "-b", "4", "8", "-C", "5", "-D", "3", "--lr", "0.05", "--out", "swept"])
    table = pl.read_parquet("swept/points.parquet")
    assert table["reached"].all()
    tune.run(grid.parse_settings(tune.Settings, [*task, "--trials", "3", "--batch-size", "2", "--out", "tuned"], None))
    assert len(pl.read_parquet("tuned/trials.parquet")) == 3
    given = ["--algorithm", "laq", "lag_ps", "sgd", "--xi", "0.4", "-b", "4", "--num-lrs", "3", "--batch-size", "8"]
    compare.run(grid.parse_settings(comparison.Settings, [*task, *given, "--out", "compared"], None))
    best = pl.read_parquet("compared/best.parquet").filter(pl.col("cheapest in") == "bits up")
    assert best["method"].to_list() == ["laq", "sgd"]
    assert best["goal"].unique().to_list() == ["test accuracy >="]
    said = capsys.readouterr().out
    assert "left out, since L_m is not known here: lag_ps" in said
    assert "gain over" not in said
    assert "theory" not in said
    assert not [name for name in best.columns if "theory" in name and best[name].count()]
    figures = dict(drawing.build_figures(*drawing.read_tables(Path("compared"))))
    specs = str([style.to_spec(figure) for figure in figures.values()])
    assert "laq (lazy)" in specs
    assert "sgd (stochastic)" in specs
    assert "theory" not in specs


def test_the_example_of_a_loop_takes_few_steps() -> None:
    from experiments.examples import data_parallel

    np.testing.assert_allclose(data_parallel.smooth([3.0, 2.0, 1.0]), [2.0])
    np.testing.assert_allclose(data_parallel.smooth([*range(12)]), [4.5, 5.5, 6.5])
    with pytest.raises(ValueError, match="steps = 0: must be a whole number >= 1"):
        data_parallel.main(steps=0)


def test_the_language_model() -> None:
    """Rows of text and the bytes that follow; a prediction does not see later bytes; the methods of the example exist."""
    from experiments.examples import diloco, language_model

    x, y, x_test, y_test = language_model.load()
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])
    assert len(x_test) == len(y_test) > len(x) / 20
    assert x.max() < language_model.VOCABULARY
    assert len(language_model.text_digest()) == 12
    model = eqx.filter_jit(language_model.LanguageModel)(jax.random.key(0))
    one, other = (eqx.filter_jit(model)(x[0].copy()) for x in (x, np.where(np.arange(64) == 40, 7, x)))
    np.testing.assert_array_equal(one[:40], other[:40])
    assert not np.array_equal(one[40], other[40])
    for name in (*diloco.EVERY_STEP, *diloco.LOW_BIT, "DiLoCo, H = 10"):
        assert isinstance(diloco.make_optimizer(name, 10, diloco.Settings())[0], optax.GradientTransformation)
    with pytest.raises(ValueError, match="seeds = 0: must be a whole number >= 1"):
        diloco.main(diloco.Settings(seeds=0))


@pytest.mark.long
def test_the_methods_of_the_diloco_example(tmp_path: Path) -> None:
    """All methods for a few steps on four devices; a second call reads them from the folder."""
    command = [sys.executable, "-m", "experiments.examples.diloco", "--quick", "--out", str(tmp_path / "here")]
    for begin in ("AdamW each step, seed 0", ""):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stdout.strip().startswith(begin or "211,328 parameters")
    table = pl.read_parquet(tmp_path / "here-quick" / "table.parquet")
    assert len(table) == 6
    assert table["loss"].is_between(1, 6).all()
    assert (tmp_path / "here-quick" / "diloco.png").exists()


@pytest.mark.long
@pytest.mark.parametrize("name", ["flax_cnn", "equinox_transformer"])
def test_the_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the README has them, with few rows and rounds."""
    monkeypatch.chdir(tmp_path)
    path = shutil.copy(EXAMPLES / f"{name}.py", tmp_path / f"{name}_here.py")
    data = ["--dataset", f"{path}:load" if name == "equinox_transformer" else "mnist"]
    given = [
        "--quick",
        "--problem",
        f"{path}:make",
        *data,
        "--partition",
        "unequal:2" if name == "equinox_transformer" else "dirichlet:0.5",
    ]
    given += ["-b", "4", "8", "-C", "5", "-D", "3", "--lr", "0.05", "--rounds", "4", "--eval-every", "2"]
    table = run(*given, "--target-accuracy", "0.999")
    assert table["bits"].to_list() == [4, 8]
    assert table["final_loss"].is_finite().all()
    assert table["accuracy"].is_between(0, 1).all()
