"""Logistic regression with a Gaussian prior around given coefficients, by Newton's method. Knows no feature's name."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def sigmoid(x: Floats) -> Floats:
    out: Floats = 1.0 / (1.0 + np.exp(-np.clip(x, -40.0, 40.0)))
    return out


def fit(x: Floats, y: Floats, *, centre: Floats, strength: Floats, iterations: int = 50) -> Floats:
    """(D,) coefficients b that minimise Σ log-loss(y, x b) + ½ Σ strength (b - centre)².

    ``x`` (N, D), ``y`` (N,) in [0, 1], ``strength`` (D,) of which none may be 0: then there is one minimum, with or
    without data. Steps that do not lower the loss are halved.
    """
    b = centre.astype(np.float64).copy()
    loss = _loss(x, y, b, centre, strength)
    for _ in range(iterations):
        p = sigmoid(x @ b)
        gradient = x.T @ (p - y) + strength * (b - centre)
        hessian = (x * (p * (1.0 - p))[:, None]).T @ x + np.diag(strength)
        step = np.linalg.solve(hessian, gradient)
        for _ in range(30):
            moved = _loss(x, y, b - step, centre, strength)
            if moved <= loss:
                break
            step *= 0.5
        b -= step
        if loss - moved < 1e-10 * (1.0 + abs(loss)):
            break
        loss = moved
    return b


def _loss(x: Floats, y: Floats, b: Floats, centre: Floats, strength: Floats) -> float:
    z = x @ b
    return float((np.logaddexp(0.0, z) - y * z).sum() + 0.5 * (strength * (b - centre) ** 2).sum())
