"""README and docs are true: Python blocks run, lines are those of the files, commands exist and take what they are given."""

import ast
import doctest
import functools
import importlib
import inspect
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import tyro

import laqjax
from experiments.harness import cli
from laqjax import types
from laqjax._core import wire_format

pytestmark = pytest.mark.optimized  # the examples run on all of MNIST

ROOT = Path(__file__).parents[2]
TEXTS = {path.name: path.read_text() for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))}  # fmt: skip
QUOTE = re.compile(r'```python title="(.*?)"\n(.*?)```', re.DOTALL)
PLACES = ("DIR", "FILE", "HOST", "example.org", "127.0.0.1:", "{1..8}", "part-", "--shard")  # of the reader's
HOURS = ("experiments.compare", "reproduce laq-nn", "examples.diloco")  # or a quarter of one, on a CPU


def block(page: str, word: str) -> str:
    return next(code for code in re.findall(r"```python\n(.*?)```", TEXTS[page], re.DOTALL) if word in code)


def fenced(kinds: str) -> Iterator[str]:
    for text in TEXTS.values():
        yield from re.findall(rf"```(?:{kinds})\n(.*?)```", text, re.DOTALL)


def commands() -> list[str]:
    """Return every `python -m experiments.NAME ...` of the texts, as one would type it.

    `python -m experiments` alone is tested in test_terminal.py.
    """
    found = [line for code in fenced("console|bash") for line in code.splitlines()]
    found += [code for text in TEXTS.values() for code in re.findall(r"`(python -m [^`]*)`", text)]
    found = [line.replace("$i/8", "1/8").replace("$i", "1") for line in found]
    matches = (re.search(r"python -m experiments\..*", re.sub(r"\s+[#>].*", "", line)) for line in found)
    return sorted({match[0].strip() for match in matches if match})


@pytest.fixture(scope="module")
def used() -> dict[str, Any]:
    """The names of the first example, after it ran."""
    names: dict[str, Any] = {}
    exec(block("own.md", "datasets.load").replace("rounds=200", "rounds=5"), names)  # the same, however long it runs
    return names


# ---- Python -----------------------------------------------------------------------------------------------------


def test_the_first_lines_need_the_package_alone(capsys: pytest.CaptureFixture[str]) -> None:
    code = block("README.md", "import")
    exec(code, {})
    said = re.findall(r"\d+ uploads, \d+ bits", capsys.readouterr().out)
    assert said == re.findall(r"\d+ uploads, \d+ bits", code)
    assert len(said) == 2
    assert not re.search("experiments|datasets", code)


def test_getting_started(capsys: pytest.CaptureFixture[str]) -> None:
    code = block("start.md", "from_loss")
    exec(code, {})
    assert capsys.readouterr().out.splitlines() == re.findall(r"^# (.*)", code, re.MULTILINE)


def test_use_it(used: dict[str, Any], mnist: laqjax.Shards) -> None:
    assert int(used["out"].state.round) == 10
    assert used["params"]["weight"].shape == (10, 784)
    np.testing.assert_array_equal(used["shards"].x, mnist.x)


def test_a_loop_of_your_own(used: dict[str, Any]) -> None:
    names = dict(used)
    exec(block("own.md", "step = jax.jit(alg.step)"), names)  # it asserts that the loop is the run
    assert int(names["state"].round) == 10


@pytest.mark.long
def test_your_own_model(used: dict[str, Any]) -> None:
    names = dict(used)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # a user's, not the tests'
        exec(block("own.md", "import flax"), names)
    assert jax.tree.structure(names["trained"]) == jax.tree.structure(names["params"])
    loss = names["out"].info.loss
    assert loss[-1] < 0.8 * loss[0]


def test_your_own_method(used: dict[str, Any]) -> None:
    names = dict(used)
    exec(block("own.md", "class Half"), names)
    one, many, alg = names["one"], names["many"], names["algs"][0]
    np.testing.assert_array_equal(many.info.sent[:, 0], one.info.sent)
    assert 0 < one.info.sent[1:].mean() < 1
    like = names["oracle"].ravel(names["start"])
    assert set(one.info.bits_up[one.info.sent]) == {16 * like.size}
    key = jax.random.key(0)
    keys = types.RoundKeys(key, key, key, jax.numpy.int32(1), jax.numpy.int32(0))
    payload = alg.compressor.encode(like, keys)
    data = wire_format.to_bytes(alg.compressor, payload, like)
    assert len(data) == wire_format.message_bytes(alg.compressor.wire_fields(payload, like)) == 2 * like.size
    np.testing.assert_array_equal(
        wire_format.from_bytes(alg.compressor, data, like), alg.compressor.decode(payload, like)
    )


def test_your_own_method_is_the_example_of_the_protocols() -> None:
    """The page begins with the definitions that run as a doctest in laqjax/types.py."""
    examples = doctest.DocTestParser().get_examples(types.__doc__ or "")
    definitions = [example.source for example in examples[: -len(("oracle", "ones", "shards", "alg", "out", "bits"))]]
    code = block("own.md", "class Half")
    assert "".join(definitions).split() == code[: code.index("\n\nalgs = ")].split()


ON_FOUR_DEVICES = """
import numpy as np
assert jax.device_count() == mesh.size == 4
assert len(out.state.workers.memory_state.sharding.device_set) == 4
jax.tree.map(np.testing.assert_array_equal, state, jax.device_get(alone))
"""


@pytest.mark.distributed
def test_many_devices(tmp_path: Path) -> None:
    """The examples of docs/mesh.md, lazy_aggregate.md and diloco.md on four devices: the first example's run of one device, and a message of each device."""
    script = tmp_path / "script.py"
    first = block("own.md", "datasets.load").replace("rounds=200", "rounds=5") + "alone = out.state\n"
    mesh, lazy = block("mesh.md", "laqjax.sharding.make_mesh"), block("lazy_aggregate.md", "lazy_aggregate")
    script.write_text(first + mesh + ON_FOUR_DEVICES + lazy + block("diloco.md", "diloco_optimizer"))
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, script], env=os.environ | flags, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("[ True  True  True  True]") == 2


def test_a_federation(used: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("flwr")
    from laqjax.federation import testing

    monkeypatch.chdir(tmp_path)
    Path("results").mkdir()
    names = dict(used)
    text = block("federation.md", "federation.client_app").replace("rounds=100", "rounds=3")
    exec(
        text.replace(', compilation_cache_dir=Path("results/programs")', ""), names
    )  # JAX's cache is one for the whole process
    grid = testing.InProcessGrid(names["client"], range(10))
    names["server"](grid, grid.contexts[100])
    assert Path("results/server.npz").exists()


@pytest.fixture
def as_a_user() -> Iterator[None]:
    """JAX's own promotion of dtypes and ranks."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("as_a_user")
def test_a_strategy_for_flower() -> None:
    pytest.importorskip("flwr")
    names: dict[str, Any] = {}
    exec(block("flower.md", "LazyStrategy(").replace("num_rounds=10", "num_rounds=3").replace("[10]", "[3]"), names)
    result = names["result"]
    losses = [metrics["train_loss"] for metrics in result.train_metrics_clientapp.values()]
    assert losses == sorted(losses, reverse=True)
    assert result.evaluate_metrics_clientapp.keys() == {1, 2, 3}
    exec(block("flower.md", "with_local_steps("), names)
    assert names["alg"].oracle.num_local_steps == 5


@pytest.mark.usefixtures("as_a_user")
def test_a_worker_with_state(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flwr")
    code = block("flower.md", "class Scaffold")
    exec(code, {})
    fedavg, scaffold = map(float, capsys.readouterr().out.split())
    assert f"{fedavg:.2f} away" in code
    assert scaffold < 1e-4


def test_no_other_python_stands_in_the_texts() -> None:
    written = {name: len(re.findall(r"```python\n", text)) for name, text in TEXTS.items()}
    ran = {
        "README.md": 1,
        "start.md": 1,
        "own.md": 4,
        "mesh.md": 1,
        "lazy_aggregate.md": 1,
        "diloco.md": 1,
        "federation.md": 1,
        "flower.md": 3,
    }
    assert {name: number for name, number in written.items() if number} == ran


QUOTED = [(page, *found) for page, text in TEXTS.items() for found in QUOTE.findall(text)]


@functools.cache
def code_of(file: str) -> str:
    """Return the lines of a file that hold code, without comments and docstrings, each after a newline."""
    text = (ROOT / file).read_text()
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            lines[token.start[0] - 1] = lines[token.start[0] - 1][: token.start[1]]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or 0) - node.lineno + 1)
    return "".join(f"\n{line.rstrip()}" for line in lines if line.strip()) + "\n"


@pytest.mark.parametrize(("page", "file", "lines"), QUOTED)
def test_lines_are_those_of_the_file(page: str, file: str, lines: str) -> None:
    assert lines in (ROOT / file).read_text(), f"{page} quotes what {file} no longer holds"
    code = [line for line in (re.sub(r"\s*#.*", "", line) for line in lines.splitlines()) if line]
    assert code
    assert "\n" + "\n".join(code) + "\n" in code_of(file), f"{page} quotes what is no code of {file}"


def test_the_pages_build_and_fetch_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    site, quiet = tmp_path / "site", os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(site)]
    built = subprocess.run(command, cwd=ROOT, env=quiet, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    pages = {page.name: page.read_text() for page in site.glob("*.html")}
    assert {page.with_suffix(".html").name for page in (ROOT / "docs").glob("*.md")} <= set(pages)
    assert {"contributing.html", "changelog.html"} <= set(pages)
    assert (site / "search" / "search_index.js").read_text().startswith("var __index")  # pages from disk load a script
    for text in pages.values():
        assert not re.search(r'<(script|img|iframe)[^>]*src="(https?:)?//', text)
        assert not re.search(r'<link[^>]*rel="(stylesheet|preconnect|preload)"[^>]*href="(https?:)?//', text)
    assert pages["algorithm.html"].count("<math") > 20
    assert "bits per coordinate of a message" in pages["api.html"]  # of the docstrings that are completed when imported
    factories = [
        name for name, f in vars(laqjax.algorithms).items() if ">>> laqjax.alg" in (getattr(f, "__doc__", "") or "")
    ]
    assert [name for name in factories if f'id="laqjax.algorithms.{name}"' not in pages["api.html"]] == []


def test_links_lead_somewhere() -> None:
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for path, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text()):
            there = page.parent / path if path else page
            assert there.exists(), f"{page.name}: {path}"
            heads = re.findall(r"^#+ (.*)", there.read_text(), re.MULTILINE) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads]
            assert not anchor or anchor in slugs, f"{page.name}: {path}#{anchor}"


# ---- commands ---------------------------------------------------------------------------------------------------


class Parsed(BaseException):
    """The command line took what it was given."""


def idle(f: Any) -> Any:
    """Return a function of the same signature that does nothing; settings as they are."""
    return functools.wraps(f)(lambda *args, **given: None) if inspect.isfunction(f) else f


def parse_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `terminal.cli` read the command line, call nothing, and raise `Parsed`."""
    parse = cli.parse_cli

    def stop(what: Any, *args: Any, **given: Any) -> None:
        parse({k: idle(v) for k, v in what.items()} if isinstance(what, dict) else idle(what), *args, **given)
        raise Parsed

    monkeypatch.setattr(cli, "parse_cli", stop)


@pytest.mark.parametrize("command", commands())
def test_commands_take_what_they_are_given(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, module, *arguments = shlex.split(command)
    if module in ("experiments.federated", "experiments.deployment"):
        pytest.importorskip("flwr")
    monkeypatch.chdir(ROOT)
    if ".examples." in module:
        tyro.cli(idle(importlib.import_module(module).main), args=arguments)  # SystemExit for what it does not take
        return
    parse_only(monkeypatch)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.delitem(sys.modules, module, raising=False)  # put back afterwards
    monkeypatch.delitem(sys.modules, f"{module}.__main__", raising=False)
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


def test_make_has_these_targets() -> None:
    named = {name for text in TEXTS.values() for words in re.findall(r"(?:\$ |`)make ([a-z -]+)", text) for name in words.split()}  # fmt: skip
    assert named <= set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.distributed
@pytest.mark.parametrize("program", ["flower-superlink", "flower-supernode"])
def test_flower_has_these_options(program: str) -> None:
    pytest.importorskip("flwr")
    (said,) = {line[3:] for code in fenced("console") for line in code.splitlines() if line[3:].startswith(program + " ") and "node-1" not in line}  # fmt: skip
    script = Path(sys.executable).with_name(program)
    told = subprocess.run([script, "--help"], capture_output=True, text=True, check=True).stdout
    assert not [option for option in re.findall(r"--[a-z-]+", said) if option not in told]


@pytest.mark.long
@pytest.mark.parametrize("command", [c for c in commands() if not any(word in c for word in PLACES + HOURS)])
def test_commands_run(command: str, tmp_path: Path) -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in tracked.splitlines():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    ran = subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=tmp_path, capture_output=True, text=True, check=False)  # fmt: skip
    assert ran.returncode == 0, ran.stdout + ran.stderr
