"""Plain NumPy (float64) twins of the methods with local training, each written from its paper and from nothing else.

x is the server's model [p], y_m worker m's model after H local steps, delta_m = x - y_m the outer gradient, which the
server subtracts. `problem.rows(k, m)` are cut into H equal parts, one for each local step. A local learning rate is a
number or a function of the step s = k H + t, never of an optimizer's own count. `asked` [K, M] are the workers that
participate (None: all); an absent worker keeps its optimizer's state and its memory. As in `twins.py`, `lr` multiplies
a sum over workers, so lr M is the paper's learning rate of the mean.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.laws.twins import History, Problem, Rate, grid, largest_entries, rate, square

Update = Callable[[np.ndarray, np.ndarray, Any, float, int], tuple[np.ndarray, Any]]
Compressor = Callable[[np.ndarray], np.ndarray]


class Optimizer(NamedTuple):
    """init(p) -> state; update(y, g, state, lr, s) -> (y, state)."""

    init: Callable[[int], Any]
    update: Update


def sgd(momentum: float = 0.0, nesterov: bool = False) -> Optimizer:
    """trace <- g + momentum trace; y <- y - lr trace, or y - lr (g + momentum trace) with Nesterov (PyTorch, optax)."""

    def update(y: np.ndarray, g: np.ndarray, trace: np.ndarray, lr: float, s: int) -> Any:
        trace = g + momentum * trace
        return y - lr * (g + momentum * trace if nesterov else trace), trace

    return Optimizer(np.zeros, update)


def adamw(b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8, weight_decay: float = 1e-4) -> Optimizer:
    """AdamW (Loshchilov, Hutter, Algorithm 2): the decay is apart from the moments, and is multiplied by lr.

    The bias correction counts the steps that this state has really taken; it falls behind s for absent workers.
    """

    def update(y: np.ndarray, g: np.ndarray, state: Any, lr: float, s: int) -> Any:
        n, mu, nu = state[0] + 1, b1 * state[1] + (1 - b1) * g, b2 * state[2] + (1 - b2) * g**2
        direction = mu / (1 - b1**n) / (np.sqrt(nu / (1 - b2**n)) + eps) + weight_decay * y
        return y - lr * direction, (n, mu, nu)

    return Optimizer(lambda p: (0, np.zeros(p), np.zeros(p)), update)


def fedopt(kind: str, b1: float = 0.9, b2: float = 0.99, tau: float = 1e-3) -> Optimizer:
    """FedAdam and FedYogi (Reddi et al., ICLR 2021, Algorithm 2), of d = -Delta: no bias correction, v_{-1} = tau^2."""

    def update(y: np.ndarray, d: np.ndarray, state: Any, lr: float, s: int) -> Any:
        m, v = b1 * state[0] + (1 - b1) * d, state[1]
        v = b2 * v + (1 - b2) * d**2 if kind == "adam" else v - (1 - b2) * d**2 * np.sign(v - d**2)
        return y - lr * m / (np.sqrt(v) + tau), (m, v)

    return Optimizer(lambda p: (np.zeros(p), np.full(p, tau**2)), update)


def chunked_top_k(chunk: int, k: int, quantize: Compressor = lambda v: v) -> Compressor:
    """The k largest |v| of every `chunk` consecutive coordinates, their values quantized together (one radius).

    Of equal ones the lowest index goes first. The last chunk may be short. Zeros are kept too if a chunk has fewer than
    k other values: the length of a message does not depend on the data.
    """

    def compress(v: np.ndarray) -> np.ndarray:
        starts = range(0, v.size, chunk)
        index = np.concatenate([start + largest_entries(v[start : start + chunk], k) for start in starts])
        out = np.zeros_like(v)
        out[index] = quantize(v[index])
        return out

    return compress


def statistical_grid(bits: int, sigmas: float) -> Compressor:
    """MuLoCo's bins, symmetric about the mean: 2^b of them over mean +- sigmas std (unbiased), decoded by bin means."""

    def compress(v: np.ndarray) -> np.ndarray:
        n, mean = 2**bits, v.mean()
        std = np.sqrt(np.sum((v - mean) ** 2) / max(v.size - 1, 1))
        if std == 0:
            return np.full_like(v, mean)
        codes = np.clip(np.floor((v - mean) / (2 * sigmas * std / n) + n // 2), 0, n - 1)
        return np.array([v[codes == code].mean() for code in codes])

    return compress


class Run:
    """What the methods share: the local training of a round, and the record of a run."""

    def __init__(
        self,
        problem: Problem,
        rounds: int,
        steps: int,
        local_lr: Rate,
        inner: Optimizer | None = None,
        *,
        proximal: float = 0.0,
        keep: bool = True,
        asked: np.ndarray | None = None,
    ) -> None:
        self.problem, self.steps, self.local_lr, self.proximal, self.keep = problem, steps, local_lr, proximal, keep
        self.inner, self.workers = inner or sgd(), problem.num_workers
        self.asked = np.ones((rounds, self.workers), bool) if asked is None else asked
        self.x = np.array(problem.theta0)
        self.states = [self.inner.init(self.x.size) for _ in range(self.workers)]
        self.zeros = np.zeros((self.workers, self.x.size))
        self.losses, self.sents, self.xs = [], [], [self.x]

    def total_lr(self, k: int) -> float:
        return sum(rate(self.local_lr, k * self.steps + t) for t in range(self.steps))

    def train(self, k: int, corrections: np.ndarray | None = None) -> np.ndarray:
        """delta [M, p] of round k, zero for absent workers; g = grad_m(y) + proximal (y - x) + correction_m."""
        deltas, losses = np.zeros_like(self.zeros), []
        for m in range(self.workers):
            rows = self.problem.rows(k, m)
            parts = [None] * self.steps if rows is None else np.split(rows, self.steps)
            losses.append(self.problem.grad(m, self.x, parts[0])[0])
            if not self.asked[k, m]:
                continue
            y, state = self.x, self.states[m] if self.keep else self.inner.init(self.x.size)
            for t, part in enumerate(parts):
                s = k * self.steps + t
                g = self.problem.grad(m, y, part)[1] + self.proximal * (y - self.x)
                g = g if corrections is None else g + corrections[m]
                y, state = self.inner.update(y, g, state, rate(self.local_lr, s), s)
            self.states[m], deltas[m] = state, self.x - y
        self.losses.append(np.mean(losses))
        return deltas

    def step(self, x: np.ndarray, sent: np.ndarray) -> None:
        self.x = x
        self.xs.append(x)
        self.sents.append(sent)

    def history(self) -> History:
        return History(np.array(self.losses), np.array(self.sents), np.array(self.xs))


def local_steps(
    problem: Problem, rounds: int, *, lr: Rate, difference: bool = False, server: Any = None, **local: Any
) -> History:
    """Local SGD, FedAvg, FedProx: x <- x - lr sum_m u_m, u_m = delta_m / (sum of the round's step sizes), or delta_m.

    A sum of step sizes of zero gives u_m = 0.
    """
    run = Run(problem, rounds, **local)
    for k in range(rounds):
        total = run.total_lr(k)
        delta = run.train(k).sum(axis=0)
        u = delta if difference else delta / total if total else np.zeros_like(delta)
        run.step(run.x - rate(lr, k) * u, run.asked[k])
    return run.history()


def diloco(
    problem: Problem,
    rounds: int,
    *,
    lr: float | None,
    inner: Optimizer | None = None,
    outer: Optimizer | None = None,
    compressor: Compressor | None = None,
    decay: float = 1.0,
    **local: Any,
) -> History:
    """DiLoCo (2311.08105, Algorithm 1): x <- Nesterov(x, mean_m delta_m), outer lr 0.7, momentum 0.9; inner AdamW.

    With a compressor, MuLoCo and SparseLoCo: a = decay e_m + delta_m, q_m = C(a), e_m = a - q_m; the mean of the q_m.
    The decay acts on the old error, before delta_m is added. The mean is over the workers of the round.
    """
    run = Run(problem, rounds, inner=inner or adamw(), **local)
    outer, e = outer or sgd(0.9, nesterov=True), run.zeros
    state = outer.init(run.x.size)
    for k in range(rounds):
        q, asked = run.train(k), run.asked[k]
        if compressor:
            a = decay * e + q
            q = np.array([compressor(each) for each in a]) * asked[:, None]
            e = np.where(asked[:, None], a - q, e)
        mean = q.sum(axis=0) / asked.sum()
        x, state = outer.update(run.x, mean, state, 0.7 if lr is None else lr * asked.sum(), k)
        run.step(x, asked)
    return run.history()


def sparse_loco(
    problem: Problem, rounds: int, *, lr: float | None, chunk: int, k: int, bits: int, decay: float, **local: Any
) -> History:
    """SparseLoCo (2508.15706, Algorithm 1): e <- decay e + delta; q = Q(TopK(e)); e <- e - q; x <- x - mean q."""
    given: Any = {"compressor": chunked_top_k(chunk, k, grid(bits)), "decay": decay, "outer": sgd()}
    return diloco(problem, rounds, lr=1 / problem.num_workers if lr is None else lr, **given, **local)


def lazy_diloco(
    problem: Problem,
    rounds: int,
    *,
    lr: float | None,
    bits: int,
    xi: float,
    window: int,
    max_silence: int,
    **local: Any,
) -> History:
    """DiLoCo with LAQ's message and rule (twins.lazy_quantized) on delta_m.

    send iff ||innovation||^2 >= (xi / D) sum_d ||G_{k-d}||^2 + 3 (error + last error), or after max_silence silent rounds
    G_k = sum_m h_m / M is what the outer optimizer is given. First uploads are forced.
    """
    run = Run(problem, rounds, inner=adamw(), **local)
    outer, workers = sgd(0.9, nesterov=True), problem.num_workers
    state, h, last_error = outer.init(run.x.size), run.zeros, np.zeros(workers)
    motion, silence = [0.0] * window, np.full(workers, max_silence)
    for k in range(rounds):
        target = run.train(k) - h
        innovation = np.array([grid(bits)(each) for each in target])
        error = square(target - innovation)
        threshold = xi / window * sum(motion) + 3 * (error + last_error)
        sent = (square(innovation) >= threshold) | (silence >= max_silence)
        h = np.where(sent[:, None], h + innovation, h)
        last_error, silence = np.where(sent, error, last_error), np.where(sent, 0, silence + 1)
        given = h.sum(axis=0) / workers
        motion = [square(given), *motion[:-1]]
        x, state = outer.update(run.x, given, state, 0.7 if lr is None else lr * workers, k)
        run.step(x, sent)
    return run.history()


def scaffold(problem: Problem, rounds: int, *, lr: float | None = None, **local: Any) -> History:
    """SCAFFOLD (1910.06378, Algorithm 1, option II), as printed; server learning rate lr M / (sum of step sizes), or 1.

    y <- y - local_lr (g_m(y) - c_m + c); c_m+ = c_m - c + (x - y) / (sum of the step sizes)
    x <- x + mean_S (y - x); c <- c + (|S| / M) mean_S (c_m+ - c_m); absent workers keep c_m.
    """
    run = Run(problem, rounds, **local)
    c_m, c = run.zeros, run.zeros[0]
    for k in range(rounds):
        asked, total = run.asked[k], run.total_lr(k)
        delta = run.train(k, c - c_m)
        new = np.where(asked[:, None], c_m - c + delta / total, c_m)
        server_lr = 1.0 if lr is None else lr * problem.num_workers / total
        x = run.x - server_lr * delta.sum(axis=0) / asked.sum()
        c = c + (new - c_m).sum(axis=0) / problem.num_workers
        c_m = new
        run.step(x, asked)
    return run.history()


def fed_adaptive(problem: Problem, rounds: int, *, kind: str, lr: float, tau: float, **local: Any) -> History:
    """FedAdam and FedYogi: the server's step is of the mean of delta_m; see `fedopt`."""
    run, server = Run(problem, rounds, **local), fedopt(kind, tau=tau)
    state = server.init(run.x.size)
    for k in range(rounds):
        mean = run.train(k).sum(axis=0) / run.asked[k].sum()
        x, state = server.update(run.x, mean, state, lr, k)
        run.step(x, run.asked[k])
    return run.history()
