"""Base optimizers and the four steps of Layca in plain numpy float64, written from their papers."""

from collections.abc import Callable

import numpy as np

Array = np.ndarray
Direction = Callable[[Array], Array]  # gradient of one tensor -> descent step at lr 1, remembering what it needs


def sgd(momentum: float = 0.0, nesterov: bool = False) -> Direction:
    buffer: list[Array] = []

    def direction(gradient: Array) -> Array:
        if not momentum:
            return gradient
        buffer[:] = [momentum * buffer[0] + gradient if buffer else gradient]
        return gradient + momentum * buffer[0] if nesterov else buffer[0]

    return direction


def adam(beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Direction:
    state = {"t": 0, "m": 0.0, "v": 0.0}

    def direction(gradient: Array) -> Array:
        state["t"] += 1
        state["m"] = beta1 * state["m"] + (1 - beta1) * gradient
        state["v"] = beta2 * state["v"] + (1 - beta2) * gradient**2
        mean = state["m"] / (1 - beta1 ** state["t"])
        square = state["v"] / (1 - beta2 ** state["t"])
        return mean / (np.sqrt(square) + eps)

    return direction


def rmsprop(alpha: float = 0.99, eps: float = 1e-8) -> Direction:
    state = {"v": 0.0}

    def direction(gradient: Array) -> Array:
        state["v"] = alpha * state["v"] + (1 - alpha) * gradient**2
        return gradient / (np.sqrt(state["v"]) + eps)

    return direction


def adagrad(eps: float = 1e-10) -> Direction:
    state = {"sum": 0.0}

    def direction(gradient: Array) -> Array:
        state["sum"] = state["sum"] + gradient**2
        return gradient / (np.sqrt(state["sum"]) + eps)

    return direction


def layca(weights: Array, initial: Array, step: Array, lr: float) -> Array:
    """Project, normalise, update, retract (arXiv 1806.01603)."""
    step = step - (step * weights).sum() / (weights**2).sum() * weights
    step = step * np.linalg.norm(weights) / np.linalg.norm(step)
    weights = weights - lr * step
    return weights * np.linalg.norm(initial) / np.linalg.norm(weights)
