"""The commands behind the README's tables: each runs, small; and, where LAG's data are at hand, its counts."""

import json
import os
import re
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

import laqjax
from experiments import plots, reproduce
from experiments.harness import cli, comparison
from experiments.harness.search_spaces import MEMBERS
from experiments.reproduce import family, lag, laq
from experiments.reproduce.__main__ import main
from laqjax import rules, types
from laqjax.algorithms import _shared

SIZES = {"linear": (7, 10, 13), "logistic": (9, 6, 8)}  # rows of the three sets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Six little sets, one of each problem with more features than its fellows."""
    rng = np.random.default_rng(0)
    for problem, numbers in lag.SETS.items():
        for i, number in enumerate(numbers):
            rows, features = SIZES[problem][i], lag.FEATURES[problem] + 2 * i
            x, y = rng.normal(size=(rows, features)), rng.choice([-1.0, 1.0], rows)
            (tmp_path / f"data{number}").mkdir()
            np.savetxt(tmp_path / f"data{number}" / "data.txt", x)
            np.savetxt(tmp_path / f"data{number}" / "y.txt", y)
    return tmp_path


@pytest.mark.parametrize("problem", lag.SETS)
def test_sets_are_cut_to_common_features_and_equal_parts(problem: str, folder: Path) -> None:
    shards = lag.read(folder, problem, 3)
    rows = [n // 3 for n in SIZES[problem] for _ in range(3)]
    assert shards.x.shape == (9, max(rows), lag.FEATURES[problem])
    assert shards.y.shape == shards.weight.shape == (9, max(rows))
    np.testing.assert_array_equal(shards.weight, np.arange(max(rows)) < np.array(rows)[:, None])
    for i, number in enumerate(lag.SETS[problem]):
        x, y = (np.loadtxt(folder / f"data{number}" / name) for name in ("data.txt", "y.txt"))
        for part in range(3):
            m, n = 3 * i + part, rows[3 * i]
            at = slice(part * n, (part + 1) * n)
            np.testing.assert_array_equal(shards.x[m, :n], x[at, : lag.FEATURES[problem]])
            np.testing.assert_array_equal(shards.y[m, :n], y[at])
            assert not np.any(shards.x[m, n:])


def test_a_missing_file_is_named(folder: Path) -> None:
    (folder / "data29" / "y.txt").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"data29/y\.txt is missing: must be a file in the data folder of the LAG authors"
    ):
        lag.read(folder, "linear", 3)


def test_lag_without_data_names_the_option() -> None:
    with pytest.raises(ValueError, match="--data is not given: must be the data folder of the LAG authors"):
        lag.lag_table()


def test_nobody_uploads_in_the_first_ten_rounds(folder: Path, x64: None) -> None:
    """The authors' LAGs step along memories of ones until the history is full; GD starts one step down the ones."""
    shards = lag.read(folder, "logistic", 3)
    algs = lag.make_algorithms("logistic", shards)
    for name in ("LAG-WK", "LAG-PS"):
        alg, state = algs[name]
        info = laqjax.run(alg, state, shards, 14, jax.random.key(0), metrics=["params"], chunk_size=14).info
        assert not info.sent[:10].any()
        assert info.sent[10:].any()
        expected = -float(alg.lr) * 9 * np.arange(11)[:, None] * np.ones(34)
        np.testing.assert_allclose(info.extra["params"][:11], expected, rtol=1e-12)
    alg, state = algs["GD"]
    np.testing.assert_allclose(state.params, -alg.lr * jnp.ones(34))


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where f* and results are kept."""
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.long
def test_the_whole_table_of_little_sets(folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One problem, coarsely: the command writes its tables and figures."""
    monkeypatch.setattr(lag, "SETS", {"logistic": lag.SETS["logistic"]})
    monkeypatch.setattr(lag, "OPTIMUM_ROUNDS", {"logistic": 300})
    monkeypatch.setattr(lag, "TOLERANCE", 1e-1)
    recorded = {("logistic", m): lag.RECOMPUTED["logistic", 9] for m in (9, 18)}
    monkeypatch.setattr(lag, "RECOMPUTED", recorded)
    lag.lag_table(folder)
    out = home / "results" / "lag"
    table = pl.read_csv(out / "table.csv")
    assert table["method"].to_list() == ["GD", "LAG-WK", "LAG-PS", "Cyc-IAG", "Num-IAG"] * 2
    assert table["workers"].to_list() == [9] * 5 + [18] * 5
    assert min(table["uploads"]) > 0
    assert {path.name for path in out.iterdir()} >= {"table.parquet", "masks.parquet", "run.json", "panels.png"}
    assert not jax.config.jax_enable_x64  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.long
@pytest.mark.parametrize(("command", "bits"), [(laq.logistic, 4), (laq.network, 8)])
def test_laq_and_its_rivals(command: Any, bits: int, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rounds in (7, 12)[bits // 8 :]:  # it goes on to more
        command(laq.Settings(home, rounds=rounds, num_starts=2, quick=True))
    scored = pl.read_parquet(home / "curves.parquet").drop_nans("accuracy")
    assert scored.group_by("point").agg("round")["round"].to_list() == [[0, 12]] * 8
    table = pl.read_csv(home / "table.csv")
    assert table["method"].unique(maintain_order=True).to_list() == ["LAQ", "TWO-LAQ", "GD", "QGD", "LAG"]
    cost = {(row["method"], row["cost"]): row["mean"] for row in table.iter_rows(named=True)}
    p = 7850 if bits == 4 else 159010
    assert cost["GD", "uploads"] == cost["QGD", "uploads"] == 120
    assert cost["GD", "bits up"] == cost["GD", "as b p"] == 120 * 32 * p
    assert cost["QGD", "as b p"] == 120 * bits * p < cost["QGD", "bits up"]
    assert cost["LAQ", "as b p"] == bits * p * cost["LAQ", "uploads"]
    said = capsys.readouterr().out
    assert "cost at the end, over 2 start(s)" in said
    with cli.command_line(["--json"]):
        command(laq.Settings(home, rounds=12, num_starts=2, quick=True))
    printed = json.loads(capsys.readouterr().out)
    assert json.loads((home / "result.json").read_text()) == printed
    ((title, shown),) = printed["tables"].items()
    assert title in said
    assert [row["mean"] for row in shown] == table["mean"].to_list()
    assert {path.stem for path in home.glob("*.png")} == {"loss", "uploads"}  # one accuracy after round 0 is no curve
    # Vega numbers the clip paths of a process
    drawn = lambda: {path: re.sub(r"clip\d+", "clip", path.read_text()) for path in home.glob("*.svg")}  # noqa: E731
    before = drawn()
    plots.main(home)
    assert before == drawn()


def test_a_published_value_lies_inside_the_starts_or_not() -> None:
    ends = {"": 110.0, "_least": 100.0, "_most": 120.0}
    row = {"method": "GD"} | {f"{c}_1{e}": v for c in ("rounds", "uploads", "bits_up", "bits") for e, v in ends.items()}
    published = {"GD": {"rounds": 100, "uploads": 121, "paper_bits": 3300}}
    table = reproduce.compare_with_published(pl.DataFrame([row]), "1", published, {"GD": 30})
    found = {row["cost"]: (row["mean"], row["difference"], row["inside"]) for row in table.iter_rows(named=True)}
    assert found == {
        "rounds": (110, "+10.0%", "yes"),
        "uploads": (110, "-9.1%", "no"),
        "bits up": (110, None, None),
        "as b p": (3300, "+0.0%", "yes"),
        "up + down": (110, None, None),
    }


@pytest.mark.long
def test_the_stochastic_methods(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("SGD", "SLAQ", "SLAQ, half the errors")  # --quick takes every second one
    every = laq.stochastic_methods
    monkeypatch.setattr(laq, "stochastic_methods", lambda *given: {n: a for n, a in every(*given).items() if n in few})
    laq.slaq(home, rounds=3, quick=True)
    table = pl.read_csv(home / "table.csv")
    assert table["method"].to_list() == ["SGD", "SLAQ, half the errors"]
    assert table["uploads"][0] == 30
    assert table["f"].is_between(0.5, 2.4).all()


@pytest.mark.parametrize("every", [len(MEMBERS) // 2, pytest.param(1, marks=pytest.mark.long)])
def test_the_family_at_the_steps_of_theory(every: int, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = comparison.MethodGrids.first
    monkeypatch.setattr(comparison.MethodGrids, "first", lambda self: first(self)[::every])
    family.family(rounds=20, target=0.05)
    table = pl.read_csv(home / "results" / "family" / "table.csv")
    assert len(table) == len(range(0, len(MEMBERS), every))
    assert dict(table.select("method", "uploads").iter_rows())["gd"] in range(10, 210, 10)
    assert table["f - f* at the end"].is_between(0, 1).all()


@pytest.mark.long
def test_heterogeneity(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(family, "DECADES", (0, 1.5))
    monkeypatch.setattr(family, "ALPHAS", (0.1, 10))
    family.heterogeneity(target=1e-2)
    table = pl.read_csv(home / "results" / "heterogeneity" / "heterogeneity.csv")
    assert table["value"].to_list() == [0, 1.5, 0.1, 10]
    assert (table["gd"] % 10 == 0).all()
    assert (table["laq"] < table["gd"]).all()
    assert table["laq saves"].to_list() == pytest.approx((1 - table["laq"] / table["gd"]).to_list())
    assert table["spread"][:2].is_sorted()


@pytest.mark.long
@pytest.mark.parametrize("name", ["laq-logistic", "laq-nn", "slaq", "lag", "heterogeneity", "family"])
def test_every_table_is_quick(name: str, folder: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command line of each table, with the folder that it names."""
    monkeypatch.setattr(lag, "OPTIMUM_ROUNDS", {"logistic": 300})
    monkeypatch.setattr("sys.argv", ["reproduce", name, "--quick", *(["--data", str(folder)] if name == "lag" else [])])
    main()
    out = home / "results" / f"{name}-quick"
    assert {path.name for path in out.iterdir()} >= {"result.json", "run.json", "summary.csv"}


def test_half_the_errors_is_between_the_rule_and_none() -> None:
    one, zeros, key = jnp.float32(1), jnp.zeros(1), jax.random.key(0)
    make = partial(
        types.UploadContext,
        params=zeros,
        keys=types.RoundKeys(key, key, key, jnp.int32(5), jnp.int32(0)),
        lr=jnp.float32(0.1),
        num_workers=2,
        gradient_at=lambda *given, **more: zeros,
        grad=zeros,
        round=jnp.int32(0),
        target=zeros,
        decoded=zeros,
        target_sq=jnp.float32(5),
        error_sq=one,
    )
    rule = _shared.make_lazy_rule(rules.make_history(0.8, 1, np.float32), rules.InnovationChange())
    # the paper's rule asks for 3 (1 + 1) = 6, the half for 3
    for change, sends in ((7, (True, True)), (4, (False, True)), (2, (False, False))):
        evidence = make(decoded_sq=jnp.float32(change))
        decided = [
            r.should_send((zeros, None), (one, None), evidence)[0]
            for r in (rule, replace(rule, error_weight=np.asarray(1.5, np.float32)))
        ]
        assert tuple(map(bool, decided)) == sends


DATA = os.environ.get("LAQJAX_LAG_DATA")
EXACT = {
    ("linear", 9): {"GD": 5283, "LAG-PS": 1756},
    ("linear", 18): {"GD": 10548, "LAG-PS": 3610},
    ("logistic", 9): {"GD": 33309, "LAG-PS": 14419, "LAG-WK": 584},
    ("logistic", 18): {"GD": 65322, "LAG-PS": 29968, "LAG-WK": 1098},
}
CYCLIC = {("linear", 9): 5270, ("linear", 18): 10523, ("logistic", 9): 33300, ("logistic", 18): 65289}
CHAOTIC = {("linear", 9): 398, ("linear", 18): 664}
RANDOM = {("linear", 9): 3466, ("linear", 18): 5283, ("logistic", 9): 22113, ("logistic", 18): 30540}


@cache
def counts(data: str, tmp: Path) -> dict[tuple[str, int], dict[str, int]]:
    """The table, as `experiments.reproduce lag` makes it."""
    lag.lag_table(Path(data), tmp)
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for problem, workers, method, uploads, *_ in pl.read_parquet(tmp / "table.parquet").iter_rows():
        found.setdefault((problem, workers), {})[method] = uploads
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], dict[str, int]]:
    return counts(str(DATA), tmp_path_factory.mktemp("lag"))


@pytest.mark.long
@pytest.mark.skipif(not DATA, reason="LAQJAX_LAG_DATA names no folder of the LAG authors' data")
@pytest.mark.parametrize("problem", EXACT)
def test_the_uploads_of_the_lag_paper(problem: tuple[str, int], found: dict[tuple[str, int], dict[str, int]]) -> None:
    got = found[problem]
    assert {name: got[name] for name in EXACT[problem]} == EXACT[problem]
    assert abs(got["Cyc-IAG"] - CYCLIC[problem]) <= 5
    # random: other draws than the authors', whose own count is one sample (seen: at most 8.4 % less; GD needs 1.5 to
    # 2.1 times as many)
    assert abs(got["Num-IAG"] / RANDOM[problem] - 1) < 0.15
    if problem in CHAOTIC:
        # the rule is a threshold on the rounding of the gradients near the optimum: a change of lr by 1 part in 1e15
        # moves these counts by 10 and more either way (seen: 377 to 430, and 654 to 674)
        assert abs(got["LAG-WK"] / CHAOTIC[problem] - 1) < 0.1
