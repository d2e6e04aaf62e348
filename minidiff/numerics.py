"""Two classic algorithms that NumPy does not have. No diffusion in here."""

import math

import numpy as np


def symmetric_beta_quantile(p: np.ndarray, a: float) -> np.ndarray:
    """x with P(X <= x) = p for X ~ Beta(a, a): the inverse regularised incomplete beta function, float64.

    For x <= 1/2 that is x^a / B(a, a) times the sum over k of (1 - a)(2 - a)…(k - a) / k! / (a + k) x^k
    (DLMF 8.17.7); 60 terms are exact to float64 there. The other half is its mirror image.
    """
    lower = np.minimum(p, 1 - p)
    whole = math.gamma(a) ** 2 / math.gamma(2 * a)  # B(a, a)
    k = np.arange(1, 60)
    terms = np.concatenate([[1], np.cumprod((k - a) / k)]) / (a + np.arange(60))
    x = np.minimum((lower * a * whole) ** (1 / a), 0.5)  # from the first term alone; 0 stays 0
    for _ in range(20):  # Newton in x^a, in which the distribution is almost a line
        error = x**a * np.polyval(terms[::-1], x) / whole - lower
        slope = (1 - x) ** (a - 1) / (a * whole)
        x = np.clip(x**a - error / slope, 0, 0.5**a) ** (1 / a)
    return np.where(p <= 0.5, x, 1 - x)


def solve_vandermonde(nodes, b) -> list[float]:
    """The weights w with sum_j nodes[j]^i w[j] = b[i] for all i, in float64 (Björck & Pereyra 1970).

    With them a step is exact for polynomials through the nodes. ValueError for a node that comes twice.
    """
    x, w = [float(node) for node in nodes], [float(value) for value in b]
    n = len(x)
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            w[i] -= x[k] * w[i - 1]
    for k in range(n - 2, -1, -1):
        for i in range(k + 1, n):
            gap = x[i] - x[i - k - 1]
            if gap == 0:
                raise ValueError("two steps have the same noise level: take fewer steps or a lower order")
            w[i] /= gap
        for i in range(k, n - 1):
            w[i] -= w[i + 1]
    return w
