"""Write the shared sections of the factories' docstrings: Args, Returns, Raises and Example.

The docstring of a factory in `laqjax/algorithms` has two parts. The text above `Args:` is written by hand in the source
file: method, equation and reference. This script generates everything from `Args:` on. It uses the tables below, and
`EXAMPLE_ARGUMENTS` in `laqjax/algorithms/_shared.py`. It reads the source files only and does not import laqjax.

    python docs/docstrings.py            rewrite the files (also: make docstrings)
    python docs/docstrings.py --check    change nothing, name every factory that is out of date and exit with 1
"""

import argparse
import ast
import sys
import textwrap
from pathlib import Path

ALGORITHMS = Path(__file__).parents[1] / "laqjax" / "algorithms"
WIDTH = 120

SCHEDULE = "or an optax schedule (a function of the round)"
XI = (
    "Weights xi_d >= 0 of the last D model steps in the threshold. One number is the sum of D equal weights. An array "
    "[window] holds the weights themselves, newest step first."
)
C = "Weight >= 0 of the threshold (c / window) sum_d motion_d of the LASG and CADA papers. `lr` and M do not change it."
OPTIMIZER = (
    "Server optimizer: a function from the learning rate to an optax transformation, such as `optax.adam`, or a "
    "transformation. A transformation uses its own learning rate instead of `lr`."
)
SAMPLER = (
    "Minibatch sampler, `laqjax.samplers.BlockSampler(size)` or `laqjax.samplers.ShuffleSampler(size)`, with `size` "
    "examples per worker and round. None: full gradients."
)
LOCAL_LR = (
    f"Learning rate > 0 of the server, {SCHEDULE}. The step acts on the SUM of the workers' vectors. None: "
    "num_local_steps * local_lr / "
)
CONTRACTIVE = "Contractive compressor C of the uplink, such as `laqjax.compressors.top_k(k)`."
UNBIASED = "Unbiased compressor Q of the uplink, such as `laqjax.compressors.qsgd(levels)`."

# Description of every argument. An argument of one name means the same in every factory.
ARGUMENTS = {
    "oracle": "Loss and gradient of a worker, from `laqjax.oracles.from_loss` or `problem.oracle()`.",
    "lr": f"Learning rate > 0, {SCHEDULE}. The step acts on the SUM of the workers' vectors, not on their mean. With "
    "SGD, divide a learning rate that is meant for the mean by M.",
    "num_workers": "Number M of workers, at least 1.",
    "bits": "Number b of bits per coordinate of a message, from 1 to 16.",
    "downlink_bits": "Number of bits per coordinate of the model step on the downlink, from 1 to 16 (None: `bits`).",
    "min_bits": "Smallest number of bits per coordinate that may be chosen, at least 1.",
    "max_bits": "Largest number of bits per coordinate that may be chosen, at most 16.",
    "xi": XI,
    "c": C,
    "window": "Number D of past rounds whose model steps enter the threshold, at least 1.",
    "max_silence": "Number C of consecutive silent rounds after which a worker must send, at least 1 (None: no limit).",
    "rescale_short_history": "If True, scale the weights by window / max(round, 1) until `window` rounds have passed, "
    "as the authors' program does. The default is False.",
    "force_first_upload": "If True, every worker sends in round 0. If False, the rule decides in round 0 too, as in "
    "the authors' program. The default is True.",
    "padded_window": "Length of the buffer for the history, at least `window` (None: `window`). Algorithms with "
    "buffers of one length share one compiled program, even if their windows differ.",
    "smoothness": "Smoothness constant L_m >= 0 of every worker's loss f_m, an array [M].",
    "period": "Number of rounds from one snapshot of the model to the next, at least 1.",
    "compressor": CONTRACTIVE,
    "downlink_compressor": "Contractive compressor C_down of the downlink, such as `laqjax.compressors.top_k(k)`.",
    "zeta": "Factor >= 0 of the gradient's change in the rule. A larger value means fewer uploads.",
    "damping": "Factor lambda in (0, 1] of d_m in the update of the memory h_m.",
    "scaling": "Factor nu in (0, 1] of d_m in the direction of the step.",
    "probability": "Probability of a full round, in (0, 1].",
    "eta": "Weight of the newest gradient in the momentum v_m, in (0, 1].",
    "estimate_momentum": "Momentum a of the estimates, in (0, 1]. The paper uses 1 / (2 omega + 1), where omega bounds "
    "the variance of the compressor: E ||Q(x) - x||^2 <= omega ||x||^2.",
    "mvr_momentum": "Momentum b of DASHA-MVR, in (0, 1]. A `sampler` requires it. None: h_m is the gradient.",
    "momentum": "Momentum factor of u_m, in [0, 1].",
    "levels": "Number of levels beside zero into which the norm is divided, from 1 to 65535.",
    "density": "Expected share of the coordinates that a message keeps, in (0, 1].",
    "k": "Number of coordinates in a message, at least 1. Another number compiles another program.",
    "num_local_steps": "Number of local gradient steps per round, at least 1.",
    "local_lr": "Learning rate > 0 of the local steps, or a schedule: a function of the step round * num_local_steps + t.",
    "inner": "Inner optimizer of the local steps: a function from the step size to an optax transformation, such as "
    "`optax.adamw`, or a transformation; see `laqjax.oracles.with_local_steps`.",
    "keep_optimizer_state": "If True, a worker keeps the state of its inner optimizer from round to round. If False, it "
    "starts anew in every round. The default is True.",
    "decay": "Share of the compression error that a worker keeps, in [0, 1].",
    "chunk": "Number of consecutive coordinates in a chunk, at least 2. Another number compiles another program.",
    "b1": "Decay of the first moment m, in [0, 1].",
    "b2": "Decay of the second moment v, in [0, 1].",
    "tau": "Term > 0 beside the root of v, in units of a change of the model.",
    "num_participants": "Number of workers that participate in a round, from 1 to `num_workers`. They are drawn "
    "without replacement. None: all workers.",
    "optimizer": f"{OPTIMIZER} The default is plain SGD, as in the papers.",
    "sampler": SAMPLER,
}

XI_OR_C = {
    "xi": f"{XI} None: 0.8, or unused if `c` is given.",
    "c": f"{C} It replaces `xi`, so give one of them only. None: the threshold uses `xi`.",
}
AMSGRAD = {"optimizer": f"{OPTIMIZER} The default is AMSGrad without bias correction, as in the paper."}
LOCAL = {
    "lr": f"{LOCAL_LR}(number of participants), which makes the new model the average of their local models.",
    "sampler": f"{SAMPLER} `size` must be a multiple of `num_local_steps`, since local steps share no examples.",
}
DIFFERENCES = {
    "lr": f"Learning rate > 0 of the outer optimizer, {SCHEDULE}. It acts on the SUM of the workers' vectors. None: "
    "0.7 / (number of participants), the step of the paper on their mean.",
    "local_lr": "Learning rate > 0 of the inner optimizer, or a schedule: a function of the step round * num_local_steps + "
    "t. None for an `inner` that is a transformation.",
    "optimizer": f"{OPTIMIZER} The default is SGD with Nesterov momentum 0.9, as in the paper.",
    "sampler": f"{SAMPLER} `size` must be a multiple of `num_local_steps`, since local steps share no examples.",
}
FEDOPT = {
    "lr": f"Learning rate > 0 of the server, {SCHEDULE}. It acts on m / (sqrt(v) + tau), whatever M is.",
    "sampler": DIFFERENCES["sampler"],
}
# Descriptions that differ in some factories: factory -> argument -> text.
SPECIAL_ARGUMENTS: dict[str, dict[str, str]] = {
    "lag_ps": XI_OR_C,
    "lasg_wk1": XI_OR_C,
    "lasg_wk2": XI_OR_C,
    "lasg_ps": XI_OR_C,
    "cada1": AMSGRAD,
    "cada2": AMSGRAD,
    "iag_random": {
        "smoothness": f"{ARGUMENTS['smoothness']} At least one of them must be positive.",
    },
    "ef_bv": {"compressor": "Compressor C of the uplink, contractive or unbiased, from `laqjax.compressors`."},
    "diana": {"compressor": UNBIASED},
    "marina": {"compressor": UNBIASED},
    "dasha": {"compressor": UNBIASED},
    "sign_sgd": {
        "lr": f"Learning rate > 0, {SCHEDULE}. The step acts on the SIGN of the SUM over workers, whatever M is.",
    },
    "diloco": DIFFERENCES
    | {
        "compressor": "Compressor C of the uplink, with error feedback, such as "
        "`laqjax.compressors.statistical_grid(bits)`. None: full precision, without error feedback.",
        "decay": "Share of the compression error that a worker keeps, in [0, 1]. Without a compressor it is not used.",
    },
    "sparse_loco": DIFFERENCES
    | {
        "lr": f"Learning rate > 0 of the outer optimizer, {SCHEDULE}. It acts on the SUM of the workers' vectors. None: "
        "1 / (number of participants).",
        "optimizer": f"{OPTIMIZER} The default is plain SGD, as in the paper.",
        "k": "Number of coordinates that a chunk sends, from 1 to `chunk`. Another number compiles another program.",
        "bits": "Number b of bits of each value that is sent, from 1 to 16.",
    },
    "lazy_diloco": DIFFERENCES
    | {
        "lr": f"Learning rate > 0 of the outer optimizer, {SCHEDULE}. It acts on the SUM of the workers' vectors. None: "
        "0.7 / M, the step of the paper on their mean.",
    },
    "scaffold": LOCAL
    | {
        "lr": f"{LOCAL_LR}M, which makes the new model the average of the participants' local models.",
    },
    "fedadam": FEDOPT,
    "fedyogi": FEDOPT,
    "fedavg": LOCAL,
    "fedpaq": LOCAL,
    "fedlaq": LOCAL
    | {
        "lr": f"{LOCAL_LR}M, which makes the new model the average of the local models that the memories represent.",
        "max_silence": "Number C of silent rounds in a row after which a worker must send, at least 1 (None: no "
        "limit). Only rounds in which the worker participates count.",
        "force_first_upload": "If True, every worker sends in the first round in which it participates. If False, the "
        "rule decides there too. The default is True.",
    },
}
SPECIAL_EXAMPLES = {name: {"compressor": "laqjax.compressors.qsgd(15)"} for name in ("diana", "marina", "dasha")}
SPECIAL_ERRORS = {"dasha": "`sampler` is given without `mvr_momentum`"}


def read_examples(folder: Path) -> dict[str, str]:
    """Read the example arguments of the library.

    Args:
        folder: folder with the source of `laqjax.algorithms`.

    Returns:
        Source text of one value for every argument without a default.

    Raises:
        ValueError: `_shared.py` has no dictionary `EXAMPLE_ARGUMENTS`.
    """
    for node in ast.parse((folder / "_shared.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXAMPLE_ARGUMENTS":
            return ast.literal_eval(node.value)
    raise ValueError(f"{folder / '_shared.py'}: must assign a dictionary to EXAMPLE_ARGUMENTS")


def find_factories(tree: ast.Module) -> list[ast.FunctionDef]:
    """Return the public functions of a module that are annotated to return an `Algorithm`, in their order."""
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]
    return [node for node in functions if node.returns is not None and ast.unparse(node.returns) == "Algorithm"]


def build_sections(factory: ast.FunctionDef, examples: dict[str, str]) -> str:
    """Build the generated part of a docstring.

    Args:
        factory: definition of the factory.
        examples: source text of an example value, by argument.

    Returns:
        Lines from `Args:` to the end of the example, without an indent and without a final newline.

    Raises:
        ValueError: a table has no entry for an argument.
    """
    name, positional = factory.name, [*factory.args.posonlyargs, *factory.args.args]
    arguments = [argument.arg for argument in (*positional, *factory.args.kwonlyargs)]
    defaults = zip(factory.args.kwonlyargs, factory.args.kw_defaults, strict=True)
    required = [argument.arg for argument, default in defaults if default is None]
    descriptions = ARGUMENTS | SPECIAL_ARGUMENTS.get(name, {})
    examples = examples | SPECIAL_EXAMPLES.get(name, {})
    for table, needed, where in ((descriptions, arguments, "ARGUMENTS"), (examples, required, "EXAMPLE_ARGUMENTS")):
        for argument in needed:
            if argument not in table:
                raise ValueError(f"{name}: argument {argument} must have an entry in {where}")
    errors = ["A number is out of its range", "`oracle` is not an oracle", "the parts cannot be combined"]
    errors += ["both `xi` and `c` are given"] * ({"xi", "c"} <= set(arguments))
    errors += [text for factory_name, text in SPECIAL_ERRORS.items() if factory_name == name]
    values = ", ".join(["oracle", *(f"{argument}={examples[argument]}" for argument in required)])
    call = [f">>> laqjax.algorithms.{name}({values}).num_workers"]
    if len(call[0]) + 8 > WIDTH:
        call = [
            f">>> laqjax.algorithms.{name}(",
            *(f"...     {line}" for line in textwrap.wrap(values, WIDTH - 16)),
            "... ).num_workers",
        ]
    lines = ["Args:", *(_wrap_entry(f"{argument}: {descriptions[argument]}") for argument in arguments)]
    lines += ["", "Returns:", "    The algorithm, a pytree whose leaves are its numbers."]
    lines += ["", "Raises:", _wrap_entry(f"ValueError: {', '.join(errors[:-1])}, or {errors[-1]}.")]
    lines += ["", "Example:", "    >>> import laqjax", "    >>> oracle = laqjax.problems.Softmax(20, 3).oracle()"]
    return "\n".join([*lines, *(f"    {line}" for line in call), "    4"])


def _wrap_entry(text: str) -> str:
    """Wrap an entry of a section to the line width; the docstring's own indent of 4 is not part of the text yet."""
    return textwrap.fill(
        text,
        WIDTH - 4,
        initial_indent=" " * 4,
        subsequent_indent=" " * 8,
        break_long_words=False,
        break_on_hyphens=False,
    )


def update_source(source: str, examples: dict[str, str]) -> tuple[str, list[str]]:
    """Replace the generated sections of all factories in a source file.

    Args:
        source: text of the file.
        examples: source text of an example value, by argument.

    Returns:
        The new text, and the names of the factories whose docstring changed.

    Raises:
        ValueError: a factory has no docstring, or a table has no entry for one of its arguments.
    """
    lines, changed = source.encode().splitlines(keepends=True), []  # positions of `ast` count bytes
    for factory in reversed(find_factories(ast.parse(source))):  # from the last one up: earlier positions stay valid
        statement = factory.body[0]
        literal = ast.get_source_segment(source, statement) or ""
        if ast.get_docstring(factory) is None or not literal.startswith('"""') or statement.end_lineno is None:
            raise ValueError(f'{factory.name}: must have a docstring in """, with method, equation and reference')
        written_by_hand = literal.removesuffix('"""').partition("\n    Args:\n")[0].rstrip()
        sections = textwrap.indent(build_sections(factory, examples), " " * 4)
        replacement = f'{written_by_hand}\n\n{sections}\n    """'
        if replacement == literal:
            continue
        changed.insert(0, factory.name)
        first, last = statement.lineno - 1, statement.end_lineno - 1
        before, after = lines[first][: statement.col_offset], lines[last][statement.end_col_offset :]
        lines[first : last + 1] = [before + replacement.encode() + after]
    return b"".join(lines).decode(), changed


def update_files(folder: Path, *, write: bool) -> list[str]:
    """Bring the docstrings of all factories in a folder up to date.

    Args:
        folder: folder with the source of `laqjax.algorithms`.
        write: whether the files are rewritten; otherwise they stay as they are.

    Returns:
        "FILE: FACTORY" for every docstring that was out of date.

    Raises:
        ValueError: a factory has no docstring, or a table has no entry for one of its arguments.
    """
    examples, outdated = read_examples(folder), []
    for path in sorted(folder.glob("*.py")):
        source, changed = update_source(path.read_text(encoding="utf-8"), examples)
        outdated += [f"{path.name}: {name}" for name in changed]
        if write and changed:
            path.write_text(source, encoding="utf-8")
    return outdated


def main() -> int:
    """Run the command line and return the exit code."""
    parser = argparse.ArgumentParser(description="Write the shared sections of the factories' docstrings.")
    parser.add_argument("folder", nargs="?", type=Path, default=ALGORITHMS, help="default: laqjax/algorithms")
    parser.add_argument("--check", action="store_true", help="only report what is out of date")
    arguments = parser.parse_args()
    try:
        outdated = update_files(arguments.folder, write=not arguments.check)
    except ValueError as error:
        sys.exit(f"error: {error}")
    for line in outdated:
        print(f"{line}: docstring is out of date; run `make docstrings`" if arguments.check else f"{line}: rewritten")
    return int(arguments.check and bool(outdated))


if __name__ == "__main__":
    sys.exit(main())
