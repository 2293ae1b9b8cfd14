"""Plain NumPy (float64) twins of the library's algorithms, each written from its paper and from nothing else.

A twin shares no code with the library, so a fault has to be made twice to go unseen. The papers minimize a mean over
workers; here f = sum_m f_m, so the server adds where a paper averages: theta^{k+1} = theta^k - lr sum_m (...).
Arrays over workers are [M, p]. Memories h start at zero, so what a paper sends uncompressed before round 0 is sent in
round 0 through the compressor. Where the library's documented contract differs from a paper, a comment says so.
"""

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Rows = np.ndarray | None
Rate = float | Callable[[int], float]
Compressor = Callable[[np.ndarray], np.ndarray]
Update = Callable[[np.ndarray, int], np.ndarray]
Optimizer = Callable[[], Update]
Server = Optimizer | None  # None: plain SGD, theta -= lr direction


class Problem(NamedTuple):
    """Worker m's loss and gradient on the rows it draws; None stands for its whole shard."""

    theta0: np.ndarray  # [p]
    num_workers: int
    grad: Callable[[int, np.ndarray, Rows], tuple[float, np.ndarray]]
    rows: Callable[[int, int], Rows]


class History(NamedTuple):
    """What a run leaves: loss [K] at theta^k (mean over all workers), sent [K, M], theta [K + 1, p]."""

    loss: np.ndarray
    sent: np.ndarray
    theta: np.ndarray


# ---------------------------------------------------------------------------------------------------------- servers


def rate(lr: Rate, k: int) -> float:
    return lr(k) if callable(lr) else lr


def sgd(lr: Rate) -> Optimizer:
    """step = -lr direction."""
    return lambda: lambda direction, k: -rate(lr, k) * direction


def momentum(lr: Rate, beta: float, nesterov: bool = False) -> Optimizer:
    """optax.trace: t = g + beta t; step = -lr t, with Nesterov -lr (g + beta t)."""

    def start() -> Update:
        trace = 0.0

        def update(direction: np.ndarray, k: int) -> np.ndarray:
            nonlocal trace
            trace = direction + beta * trace
            return -rate(lr, k) * (direction + beta * trace if nesterov else trace)

        return update

    return start


def adam(lr: Rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """Kingma and Ba 2015, as optax: bias correction, eps outside the root."""

    def start() -> Update:
        first, second, count = 0.0, 0.0, 0

        def update(direction: np.ndarray, k: int) -> np.ndarray:
            nonlocal first, second, count
            count += 1
            first = b1 * first + (1 - b1) * direction
            second = b2 * second + (1 - b2) * direction**2
            return -rate(lr, k) * (first / (1 - b1**count)) / (np.sqrt(second / (1 - b2**count)) + eps)

        return update

    return start


def amsgrad(lr: Rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8) -> Optimizer:
    """CADA's server as in its authors' program: no bias correction, vhat = max(vhat, v), eps outside the root."""

    def start() -> Update:
        first, second, largest = 0.0, 0.0, 0.0

        def update(direction: np.ndarray, k: int) -> np.ndarray:
            nonlocal first, second, largest
            first = b1 * first + (1 - b1) * direction
            second = b2 * second + (1 - b2) * direction**2
            largest = np.maximum(largest, second)
            return -rate(lr, k) * first / (np.sqrt(largest) + eps)

        return update

    return start


# ------------------------------------------------------------------------------------------------------ compressors


def identity(x: np.ndarray) -> np.ndarray:
    return x


def grid(bits: int) -> Compressor:
    """LAQ's: step = 2 R / (2^b - 1), codes = floor(x / step + 2^(b-1)), decoded value step (codes - (2^b - 1) / 2)."""

    def compress(x: np.ndarray) -> np.ndarray:
        radius = np.max(np.abs(x))
        if radius == 0:  # the grid has no width, so it holds only zero
            return np.zeros_like(x)
        step = 2 * radius / (2**bits - 1)
        codes = np.floor(x / step + 2 ** (bits - 1))
        return step * (codes - (2**bits - 1) / 2)

    return compress


def largest_entries(x: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest |x|; of equal ones the lowest index goes first."""
    return np.argsort(-np.abs(x), kind="stable")[:k]


def top_k(k: int) -> Compressor:
    def compress(x: np.ndarray) -> np.ndarray:
        kept = np.zeros_like(x)
        indices = largest_entries(x, k)
        kept[indices] = x[indices]
        return kept

    return compress


def scaled_sign(x: np.ndarray) -> np.ndarray:
    """||x||_1 / p sign(x); one bit has no zero, so an exact zero counts as +1."""
    return np.mean(np.abs(x)) * np.where(x >= 0, 1.0, -1.0)


# ----------------------------------------------------------------------------------------------- rounds and records


def each(compressor: Compressor, vectors: np.ndarray) -> np.ndarray:
    """The compressor applied to every worker's vector on its own."""
    return np.array([compressor(vector) for vector in vectors])


def square(vectors: np.ndarray) -> np.ndarray:
    """Squared norm over the last axis."""
    return np.sum(vectors**2, axis=-1)


def draw(problem: Problem, k: int) -> list[Rows]:
    return [problem.rows(k, m) for m in range(problem.num_workers)]


def gradients(problem: Problem, theta: np.ndarray, rows: list[Rows]) -> tuple[float, np.ndarray]:
    """Mean of the workers' losses, and their gradients [M, p], all at one model."""
    losses, vectors = zip(*[problem.grad(m, theta, rows[m]) for m in range(problem.num_workers)], strict=True)
    return float(np.mean(losses)), np.array(vectors)


def gradients_apart(problem: Problem, thetas: np.ndarray, rows: list[Rows]) -> np.ndarray:
    """Gradients [M, p], worker m's at its own model thetas[m]."""
    return np.array([problem.grad(m, thetas[m], rows[m])[1] for m in range(problem.num_workers)])


class Trace:
    """The model, the server's optimizer, and the record of a run."""

    def __init__(self, problem: Problem, lr: Rate, server: Server) -> None:
        self.theta = np.array(problem.theta0, dtype=np.float64)
        self.zeros = np.zeros((problem.num_workers, self.theta.size))  # a memory at the start; never changed in place
        self.everybody = np.ones(problem.num_workers, dtype=bool)
        self.update = (sgd(lr) if server is None else server)()
        self.losses, self.sents, self.thetas = [], [], [self.theta]

    def record(self, loss: float, sent: np.ndarray, theta: np.ndarray) -> None:
        self.losses.append(loss)
        self.sents.append(np.array(sent, dtype=bool))
        self.theta = theta
        self.thetas.append(theta)

    def advance(self, k: int, loss: float, sent: np.ndarray, direction: np.ndarray) -> np.ndarray:
        """The server makes its step and the round closes; gives the step."""
        step = self.update(direction, k)
        self.record(loss, sent, self.theta + step)
        return step

    def history(self) -> History:
        return History(np.array(self.losses), np.array(self.sents), np.array(self.thetas))


class LazyRule:
    """Who uploads, and the last D squared steps that the answer rests on.

    xi: a number is the sum of the weights, an array holds xi_d itself, newest step first; or c, exactly one of the two.
    window: D. max_silence: rounds of silence after which a worker is forced to send; None: never. rescale_short_history: before round D a number
    xi is shared among the k steps there are. force_first_upload: True: a worker's first upload does not ask the rule.

    xi: change >= sum_d xi_d ||theta^{k+1-d} - theta^{k-d}||^2 / (lr^2 M^2) + errors      (LAG 15, LAQ 7)
    c:  change >= (c / D) sum_d ||theta^{k+1-d} - theta^{k-d}||^2                         (LASG, CADA)
    Steps before round 0 are zero. LAG's paper and program skip on equality; the library's contract is >=, as in the
    authors' LAQ and CADA programs, so a worker with change 0 sends as long as nothing has moved.
    """

    def __init__(
        self,
        problem: Problem,
        lr: Rate,
        server: Server,
        *,
        window: int,
        xi: Any = None,
        c: float | None = None,
        max_silence: int | None = None,
        rescale_short_history: bool = False,
        force_first_upload: bool = True,
    ) -> None:
        if (xi is None) == (c is None):
            raise ValueError("the rule takes exactly one of xi and c")
        if not isinstance(force_first_upload, bool | np.bool_):
            raise ValueError(force_first_upload)
        if rescale_short_history and np.ndim(xi) > 0:
            raise ValueError("rescale_short_history shares out a number xi; an array already says every weight")
        self.xi, self.c, self.window, self.max_silence, self.rescale_short_history = (
            xi,
            c,
            window,
            max_silence,
            rescale_short_history,
        )
        self.forced_first = force_first_upload
        # With plain SGD and a constant lr, step / lr is the direction; otherwise the direction itself is measured.
        self.constant_lr = lr if server is None and not callable(lr) else None
        self.num_workers = problem.num_workers
        self.motions: deque[Any] = deque([0.0] * window, maxlen=window)  # newest first
        self.silence = np.zeros(problem.num_workers, dtype=int)
        self.ever_sent = np.zeros(problem.num_workers, dtype=bool)

    def threshold(self, k: int) -> float:
        motions = np.array(self.motions)
        if self.c is not None:
            return self.c / self.window * np.sum(motions)
        if np.ndim(self.xi) > 0:
            weights = np.asarray(self.xi, dtype=np.float64)
        else:
            weights = self.xi / (min(max(k, 1), self.window) if self.rescale_short_history else self.window)
        return np.sum(weights * motions) / self.num_workers**2

    def should_send(
        self, k: int, change: np.ndarray, errors: float | np.ndarray = 0.0, asked: np.ndarray | None = None
    ) -> np.ndarray:
        """Who sends in round k [M]. Workers that are not asked stay as they are."""
        sent = change >= self.threshold(k) + errors
        if self.max_silence is not None:
            sent = sent | (self.silence >= self.max_silence)
        if self.forced_first:
            sent = sent | ~self.ever_sent
        asked = np.ones(self.num_workers, dtype=bool) if asked is None else asked
        sent = sent & asked
        self.silence = np.where(sent, 0, np.where(asked, self.silence + 1, self.silence))
        self.ever_sent = self.ever_sent | sent
        return sent

    def remember(self, direction: np.ndarray, step: np.ndarray) -> None:
        if self.c is not None:
            self.motions.appendleft(square(step))
        elif self.constant_lr is not None:
            self.motions.appendleft(square(step) / self.constant_lr**2)
        else:
            self.motions.appendleft(square(direction))


def keep(sent: np.ndarray, new: np.ndarray, old: np.ndarray) -> np.ndarray:
    """The new row for workers that sent, the old one for the others."""
    return np.where(sent[:, None], new, old)


# --------------------------------------------------------------------------------- gradient descent and the LAG family


def gd(problem: Problem, rounds: int, *, lr: Rate, server: Server = None) -> History:
    """theta^{k+1} = theta^k - lr sum_m g_m(theta^k)."""
    trace = Trace(problem, lr, server)
    for k in range(rounds):
        loss, g = gradients(problem, trace.theta, draw(problem, k))
        trace.advance(k, loss, trace.everybody, g.sum(axis=0))
    return trace.history()


def qgd(problem: Problem, rounds: int, *, lr: Rate, bits: int, server: Server = None) -> History:
    """LAQ paper (Sun et al. 2019), QGD: Q_m^k = Q_m^{k-1} + grid(g_m - Q_m^{k-1}); everybody sends in every round."""
    trace = Trace(problem, lr, server)
    h = trace.zeros
    for k in range(rounds):
        loss, g = gradients(problem, trace.theta, draw(problem, k))
        h = h + each(grid(bits), g - h)
        trace.advance(k, loss, trace.everybody, h.sum(axis=0))
    return trace.history()


def lag_wk(problem: Problem, rounds: int, *, lr: Rate, server: Server = None, **rule: Any) -> History:
    """LAG-WK (Chen et al., NeurIPS 2018, 15a): change = ||g_m(theta^k) - g_m(theta_hat_m)||^2, the latter in memory."""
    trace, lazy = Trace(problem, lr, server), LazyRule(problem, lr, server, **rule)
    h = trace.zeros
    for k in range(rounds):
        loss, g = gradients(problem, trace.theta, draw(problem, k))
        sent = lazy.should_send(k, square(g - h))
        h = keep(sent, g, h)
        step = trace.advance(k, loss, sent, h.sum(axis=0))
        lazy.remember(h.sum(axis=0), step)
    return trace.history()


def lag_ps(
    problem: Problem, rounds: int, *, lr: Rate, smoothness: np.ndarray, server: Server = None, **rule: Any
) -> History:
    """LAG-PS (15b): the server asks m iff L_m^2 ||theta_hat_m - theta^k||^2 >= threshold.

    theta_hat_m, the model of m's last upload, starts at theta^0. The answer rests on models alone, so a worker that is
    not asked computes nothing.
    """
    trace, lazy = Trace(problem, lr, server), LazyRule(problem, lr, server, **rule)
    h, theta_hat = trace.zeros, trace.theta + trace.zeros
    for k in range(rounds):
        loss, g = gradients(problem, trace.theta, draw(problem, k))
        sent = lazy.should_send(k, np.asarray(smoothness) ** 2 * square(theta_hat - trace.theta))
        h, theta_hat = keep(sent, g, h), keep(sent, trace.theta, theta_hat)
        step = trace.advance(k, loss, sent, h.sum(axis=0))
        lazy.remember(h.sum(axis=0), step)
    return trace.history()


def iag_cyclic(problem: Problem, rounds: int, *, lr: Rate, server: Server = None) -> History:
    """Cyclic IAG (Blatt, Hero, Gauchman 2007): worker k mod M refreshes its gradient, the others' old ones are used.

    The paper starts from one gradient of everybody; here the memory starts at zero as everywhere.
    """
    trace = Trace(problem, lr, server)
    h = trace.zeros
    for k in range(rounds):
        loss, g = gradients(problem, trace.theta, draw(problem, k))
        sent = np.arange(problem.num_workers) == k % problem.num_workers
        h = keep(sent, g, h)
        trace.advance(k, loss, sent, h.sum(axis=0))
    return trace.history()


# --------------------------------------------------------------------------------------------------- LAQ and its kin


def lazy_quantized(
    problem: Problem,
    rounds: int,
    measure: Callable[[int, np.ndarray], tuple[float, np.ndarray]],
    *,
    lr: Rate,
    bits: int,
    server: Server,
    bits_down: int | None = None,
    asked: np.ndarray | None = None,
    **rule: Any,
) -> History:
    """LAQ (Sun et al., NeurIPS 2019, Alg. 2), on whatever vectors `measure(k, theta)` gives.

    dQ_m = grid(g_m - h_m), e_m = g_m - h_m - dQ_m
    send iff ||dQ_m||^2 >= sum_d xi_d ||theta^{k+1-d} - theta^{k-d}||^2 / (lr^2 M^2) + 3 (||e_m||^2 + ||e_hat_m||^2)
             or silence_m >= limit;   if sent: h_m += dQ_m, e_hat_m = e_m
    theta^{k+1} = theta^k - lr sum_m h_m, with bits_down theta^k + grid_down(-lr sum_m h_m)
    """
    trace, lazy = Trace(problem, lr, server), LazyRule(problem, lr, server, **rule)
    down = identity if bits_down is None else grid(bits_down)
    h, last_error_sq = trace.zeros, np.zeros(problem.num_workers)
    for k in range(rounds):
        loss, g = measure(k, trace.theta)
        innovation = each(grid(bits), g - h)
        error_sq = square(g - h - innovation)
        errors = 3 * (error_sq + last_error_sq)
        sent = lazy.should_send(
            k, square(innovation), errors, None if asked is None else np.asarray(asked[k], dtype=bool)
        )
        h = keep(sent, h + innovation, h)
        last_error_sq = np.where(sent, error_sq, last_error_sq)
        direction = h.sum(axis=0)
        step = down(trace.update(direction, k))
        trace.record(loss, sent, trace.theta + step)
        lazy.remember(direction, step)
    return trace.history()


def on_rows(problem: Problem) -> Callable[[int, np.ndarray], tuple[float, np.ndarray]]:
    return lambda k, theta: gradients(problem, theta, draw(problem, k))


def laq(problem: Problem, rounds: int, *, lr: Rate, bits: int, server: Server = None, **rule: Any) -> History:
    """LAQ, and on minibatches SLAQ: its gradient is that on the round's rows, everything else is the same."""
    return lazy_quantized(problem, rounds, on_rows(problem), lr=lr, bits=bits, server=server, **rule)


slaq = laq


def two_laq(
    problem: Problem, rounds: int, *, lr: Rate, bits: int, bits_down: int, server: Server = None, **rule: Any
) -> History:
    """LAQ with the step quantized on its way down, without an error memory; the rule sees the quantized step."""
    measure = on_rows(problem)
    return lazy_quantized(problem, rounds, measure, lr=lr, bits=bits, bits_down=bits_down, server=server, **rule)


def partial(
    problem: Problem,
    rounds: int,
    *,
    member: str,
    asked: np.ndarray,
    lr: Rate,
    bits: int = 4,
    server: Server = None,
    **rule: Any,
) -> History:
    """Partial participation: asked [K, M] take part in round k, and of the others the server uses the memory.

    "gd" in the innovation form: h_m = g_m for those asked, theta -= lr sum_m h_m. "laq": a worker that is not asked
    keeps its memory, its error and its silence; a forced first upload waits for the first round that asks the worker.
    """
    if member == "laq":
        return lazy_quantized(problem, rounds, on_rows(problem), lr=lr, bits=bits, server=server, asked=asked, **rule)
    if member != "gd":
        raise ValueError(member)
    trace = Trace(problem, lr, server)
    h = trace.zeros
    for k in range(rounds):
        loss, g = gradients(problem, trace.theta, draw(problem, k))
        sent = np.asarray(asked[k], dtype=bool)
        h = keep(sent, g, h)
        trace.advance(k, loss, sent, h.sum(axis=0))
    return trace.history()


# ---------------------------------------------------------------------------------------- LASG and CADA: minibatches


def lasg_wk1(problem: Problem, rounds: int, *, lr: Rate, period: int, server: Server = None, **rule: Any) -> History:
    """LASG-WK1 (Chen, Sun, Yin 2020): the variance-reduced difference to a snapshot, renewed every `period` rounds.

    delta_m^k = g_m(theta^k; rows) - g_m(snapshot; rows), change = ||delta_m^k - delta_m at m's last upload||^2
    The authors' program makes everybody send when the snapshot is renewed; here only the bound forces.
    """
    trace, lazy = Trace(problem, lr, server), LazyRule(problem, lr, server, **rule)
    h, delta_hat, snapshot = trace.zeros, trace.zeros, trace.theta
    for k in range(rounds):
        if k % period == 0:
            snapshot = trace.theta
        rows = draw(problem, k)
        loss, g = gradients(problem, trace.theta, rows)
        delta = g - gradients(problem, snapshot, rows)[1]
        sent = lazy.should_send(k, square(delta - delta_hat))
        h, delta_hat = keep(sent, g, h), keep(sent, delta, delta_hat)
        step = trace.advance(k, loss, sent, h.sum(axis=0))
        lazy.remember(h.sum(axis=0), step)
    return trace.history()


def lasg_wk2(problem: Problem, rounds: int, *, lr: Rate, server: Server = None, **rule: Any) -> History:
    """LASG-WK2: change = ||g_m(theta^k; rows) - g_m(theta_hat_m; rows)||^2, theta_hat_m as in LAG-PS."""
    trace, lazy = Trace(problem, lr, server), LazyRule(problem, lr, server, **rule)
    h, theta_hat = trace.zeros, trace.theta + trace.zeros
    for k in range(rounds):
        rows = draw(problem, k)
        loss, g = gradients(problem, trace.theta, rows)
        sent = lazy.should_send(k, square(g - gradients_apart(problem, theta_hat, rows)))
        h, theta_hat = keep(sent, g, h), keep(sent, trace.theta, theta_hat)
        step = trace.advance(k, loss, sent, h.sum(axis=0))
        lazy.remember(h.sum(axis=0), step)
    return trace.history()


lasg_ps = lag_ps  # LASG-PS is LAG-PS: its rule reads no gradient, so minibatches change nothing but what is sent


def cada1(
    problem: Problem, rounds: int, *, lr: Rate, c: float, period: int, server: Server = None, **rule: Any
) -> History:
    """CADA1 (Chen, Guo, Sun, Yin 2021): the rule of LASG-WK1 in the c convention, with the AMSGrad server."""
    return lasg_wk1(problem, rounds, lr=lr, c=c, period=period, server=server or amsgrad(lr), **rule)


def cada2(problem: Problem, rounds: int, *, lr: Rate, c: float, server: Server = None, **rule: Any) -> History:
    """CADA2: the rule of LASG-WK2 in the c convention, with the AMSGrad server."""
    return lasg_wk2(problem, rounds, lr=lr, c=c, server=server or amsgrad(lr), **rule)


# ------------------------------------------------------------------------------- compressed differences to a memory


def ef21(problem: Problem, rounds: int, *, lr: Rate, compressor: Compressor, server: Server = None) -> History:
    """EF21 (Richtarik, Sokolov, Fatkhullin 2021, Alg. 2): h_m += C(g_m - h_m); theta -= lr sum_m h_m."""
    trace = Trace(problem, lr, server)
    h = trace.zeros
    for k in range(rounds):
        loss, g = gradients(problem, trace.theta, draw(problem, k))
        h = h + each(compressor, g - h)
        trace.advance(k, loss, trace.everybody, h.sum(axis=0))
    return trace.history()


def clag(
    problem: Problem, rounds: int, *, lr: Rate, compressor: Compressor, zeta: float, server: Server = None
) -> History:
    """CLAG (Richtarik et al. 2022, 3PC): h_m += C(g_m - h_m) iff ||g_m - h_m||^2 > zeta ||g_m - g_m of round k-1||^2.

    The inequality is strict, so zeta = 0 is EF21 but for a worker whose memory is already exact. Round 0 has no
    gradient before it: everybody sends.
    """
    trace = Trace(problem, lr, server)
    h, previous = trace.zeros, None
    for k in range(rounds):
        loss, g = gradients(problem, trace.theta, draw(problem, k))
        sent = trace.everybody if previous is None else square(g - h) > zeta * square(g - previous)
        h = keep(sent, h + each(compressor, g - h), h)
        previous = g
        trace.advance(k, loss, sent, h.sum(axis=0))
    return trace.history()


def ef_bv(
    problem: Problem,
    rounds: int,
    *,
    lr: Rate,
    compressor: Compressor,
    damping: float,
    scaling: float,
    server: Server = None,
) -> History:
    """EF-BV (Condat, Yi, Richtarik 2022, Alg. 1), lambda = damping, nu = scaling.

    d_m = C(g_m - h_m); theta -= lr sum_m (h_m + nu d_m); h_m += lambda d_m. lambda = nu = 1 is EF21.
    """
    trace = Trace(problem, lr, server)
    h = trace.zeros
    for k in range(rounds):
        loss, g = gradients(problem, trace.theta, draw(problem, k))
        d = each(compressor, g - h)
        trace.advance(k, loss, trace.everybody, (h + scaling * d).sum(axis=0))
        h = h + damping * d
    return trace.history()


def diana(
    problem: Problem, rounds: int, *, lr: Rate, compressor: Compressor, damping: float, server: Server = None
) -> History:
    """DIANA (Mishchenko et al. 2019): EF-BV with nu = 1; its alpha is the damping."""
    return ef_bv(problem, rounds, lr=lr, compressor=compressor, damping=damping, scaling=1.0, server=server)


def vr_marina(
    problem: Problem, rounds: int, *, lr: Rate, compressor: Compressor, coins: np.ndarray, server: Server = None
) -> History:
    """VR-MARINA (Gorbunov et al. 2021, Alg. 2).

    a^k = sum_m g_m(theta^k) on the full shards if coin^k, else
    a^k = a^{k-1} + sum_m C(g_m(theta^k; rows) - g_m(theta^{k-1}; rows)), both models on the rows of round k
    """
    trace = Trace(problem, lr, server)
    whole: list[Rows] = [None] * problem.num_workers
    aggregate = trace.zeros[0]
    for k in range(rounds):
        rows = draw(problem, k)
        loss, g = gradients(problem, trace.theta, rows)
        if k == 0 or coins[k]:
            aggregate = gradients(problem, trace.theta, whole)[1].sum(axis=0)
        else:
            before = gradients(problem, trace.thetas[-2], rows)[1]
            aggregate = aggregate + each(compressor, g - before).sum(axis=0)
        trace.advance(k, loss, trace.everybody, aggregate)
    return trace.history()


def marina(
    problem: Problem, rounds: int, *, lr: Rate, compressor: Compressor, coins: np.ndarray, server: Server = None
) -> History:
    """MARINA (Alg. 1): a^k = sum_m g_m(theta^k) if coin^k, else a^{k-1} + sum_m C(g_m(theta^k) - g_m(theta^{k-1}))."""
    trace = Trace(problem, lr, server)
    aggregate, previous = trace.zeros[0], trace.zeros
    for k in range(rounds):
        rows = draw(problem, k)
        if any(drawn is not None for drawn in rows):
            raise ValueError("MARINA takes full gradients; on minibatches it is VR-MARINA")
        loss, g = gradients(problem, trace.theta, rows)
        aggregate = g.sum(axis=0) if k == 0 or coins[k] else aggregate + each(compressor, g - previous).sum(axis=0)
        previous = g
        trace.advance(k, loss, trace.everybody, aggregate)
    return trace.history()


def ef21_sgdm(
    problem: Problem, rounds: int, *, lr: Rate, compressor: Compressor, momentum: float, server: Server = None
) -> History:
    """EF21-SGDM (Fatkhullin, Tyurin, Richtarik 2023, Alg. 1), eta = momentum.

    v_m = (1 - eta) v_m + eta g_m, v_m = g_m in round 0; h_m += C(v_m - h_m); theta -= lr sum_m h_m
    """
    trace = Trace(problem, lr, server)
    h, v = trace.zeros, trace.zeros
    for k in range(rounds):
        loss, g = gradients(problem, trace.theta, draw(problem, k))
        v = g if k == 0 else (1 - momentum) * v + momentum * g
        h = h + each(compressor, v - h)
        trace.advance(k, loss, trace.everybody, h.sum(axis=0))
    return trace.history()


def dasha(
    problem: Problem,
    rounds: int,
    *,
    lr: Rate,
    compressor: Compressor,
    a: float,
    momentum: float | None = None,
    server: Server = None,
) -> History:
    """DASHA (Tyurin, Richtarik 2023, Alg. 1) and, with b = momentum, DASHA-MVR.

    h_m^k = g_m(theta^k); MVR: h_m^k = g_m(theta^k; rows) + (1 - b) (h_m^{k-1} - g_m(theta^{k-1}; rows)), same rows
    estimate_m += C(h_m^k - h_m^{k-1} - a (estimate_m - h_m^{k-1})); theta -= lr sum_m estimate_m
    Before round 0 both are zero, and h_m^0 is the gradient.
    """
    trace = Trace(problem, lr, server)
    h, estimate = trace.zeros, trace.zeros
    for k in range(rounds):
        rows = draw(problem, k)
        loss, new_h = gradients(problem, trace.theta, rows)
        if momentum is not None and k > 0:
            new_h = new_h + (1 - momentum) * (h - gradients(problem, trace.thetas[-2], rows)[1])
        estimate = estimate + each(compressor, new_h - h - a * (estimate - h))
        h = new_h
        trace.advance(k, loss, trace.everybody, estimate.sum(axis=0))
    return trace.history()


def ef21_p(
    problem: Problem, rounds: int, *, lr: Rate, compressor: Compressor, down: Compressor, server: Server = None
) -> History:
    """EF21-P (Gruntkowska, Tyurin, Richtarik 2023) with EF21 on the way up.

    h_m += C(g_m(w) - h_m); x -= lr sum_m h_m; w += C_down(x - w). The workers know only w, so that is the record.
    """
    trace = Trace(problem, lr, server)
    h, x = trace.zeros, trace.theta
    for k in range(rounds):
        w = trace.theta
        loss, g = gradients(problem, w, draw(problem, k))
        h = h + each(compressor, g - h)
        x = x + trace.update(h.sum(axis=0), k)
        trace.record(loss, trace.everybody, w + down(x - w))
    return trace.history()


# ------------------------------------------------------------------------------------------- signs and error feedback


def sign_sgd(problem: Problem, rounds: int, *, lr: Rate, server: Server = None) -> History:
    """signSGD with majority vote (Bernstein et al. 2018, Alg. 3): theta -= lr sign(sum_m sign(g_m)), sign(0) = 0."""
    trace = Trace(problem, lr, server)
    for k in range(rounds):
        loss, g = gradients(problem, trace.theta, draw(problem, k))
        trace.advance(k, loss, trace.everybody, np.sign(np.sign(g).sum(axis=0)))
    return trace.history()


def error_feedback(
    problem: Problem, rounds: int, *, lr: Rate, compressor: Compressor, server: Server = None
) -> History:
    """p_m = g_m + e_m; theta -= lr sum_m C(p_m); e_m = p_m - C(p_m).

    The papers keep e in units of the step, p_m = lr g_m + e_m. With a constant lr that is the same algorithm.
    """
    trace = Trace(problem, lr, server)
    e = trace.zeros
    for k in range(rounds):
        loss, g = gradients(problem, trace.theta, draw(problem, k))
        p = g + e
        message = each(compressor, p)
        e = p - message
        trace.advance(k, loss, trace.everybody, message.sum(axis=0))
    return trace.history()


def ef_sign_sgd(problem: Problem, rounds: int, *, lr: Rate, server: Server = None) -> History:
    """EF-signSGD (Karimireddy et al. 2019, Alg. 1): C(p) = ||p||_1 / d sign(p)."""
    return error_feedback(problem, rounds, lr=lr, compressor=scaled_sign, server=server)


def topk_ef(problem: Problem, rounds: int, *, lr: Rate, k: int, server: Server = None) -> History:
    """Sparsified SGD with memory (Stich, Cordonnier, Jaggi 2018, Alg. 1): C = top-k."""
    return error_feedback(problem, rounds, lr=lr, compressor=top_k(k), server=server)


def dgc(problem: Problem, rounds: int, *, lr: Rate, k: int, momentum: float, server: Server = None) -> History:
    """Deep gradient compression (Lin et al. 2018, sections 3.2 and 3.3), without clipping and warm-up.

    u_m = momentum u_m + g_m; v_m += u_m; the k largest entries of v_m are sent; there u_m and v_m become zero
    """
    trace = Trace(problem, lr, server)
    u, v = trace.zeros, trace.zeros
    for round_index in range(rounds):
        loss, g = gradients(problem, trace.theta, draw(problem, round_index))
        u = momentum * u + g
        v = v + u
        chosen = np.zeros(v.shape, dtype=bool)
        for m in range(problem.num_workers):
            chosen[m, largest_entries(v[m], k)] = True
        message = np.where(chosen, v, 0.0)
        u, v = np.where(chosen, 0.0, u), np.where(chosen, 0.0, v)
        trace.advance(round_index, loss, trace.everybody, message.sum(axis=0))
    return trace.history()


# ------------------------------------------------------------------------------------------------------- local steps


def pseudo_gradients(
    problem: Problem, steps: int, local_lr: float
) -> Callable[[int, np.ndarray], tuple[float, np.ndarray]]:
    """g_m = (theta - theta_local) / (steps local_lr) after `num_local_steps` local gradient steps from theta.

    The round's rows are cut into `num_local_steps` equal parts in order, one a step. The loss is that of the first step.
    """

    def measure(k: int, theta: np.ndarray) -> tuple[float, np.ndarray]:
        losses, vectors = [], []
        for m, rows in enumerate(draw(problem, k)):
            parts = [None] * steps if rows is None else np.split(rows, steps)
            losses.append(problem.grad(m, theta, parts[0])[0])
            local = theta
            for part in parts:
                local = local - local_lr * problem.grad(m, local, part)[1]
            vectors.append((theta - local) / (steps * local_lr))
        return float(np.mean(losses)), np.array(vectors)

    return measure


def fedavg(
    problem: Problem, rounds: int, *, steps: int, local_lr: float, lr: Rate | None = None, server: Server = None
) -> History:
    """FedAvg (McMahan et al. 2017, Alg. 1), uniform weights; with the default lr theta becomes the mean local model."""
    trace = Trace(problem, steps * local_lr / problem.num_workers if lr is None else lr, server)
    measure = pseudo_gradients(problem, steps, local_lr)
    for k in range(rounds):
        loss, g = measure(k, trace.theta)
        trace.advance(k, loss, trace.everybody, g.sum(axis=0))
    return trace.history()


def fedlaq(
    problem: Problem,
    rounds: int,
    *,
    steps: int,
    local_lr: float,
    lr: Rate,
    bits: int,
    server: Server = None,
    **rule: Any,
) -> History:
    """LAQ on FedAvg's pseudo-gradients."""
    measure = pseudo_gradients(problem, steps, local_lr)
    return lazy_quantized(problem, rounds, measure, lr=lr, bits=bits, server=server, **rule)
