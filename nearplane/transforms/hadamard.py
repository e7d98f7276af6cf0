"""Make rotations of any order: orthogonal matrices that spread every direction evenly and are fast to apply.

A rotation is ``diag(±1) · (S ⊗ C) · diag(±1)``. S is Sylvester's Hadamard matrix of order 2ᵏ, applied by k butterflies. C is a
small dense core: a Hadamard matrix if one of Paley's two constructions gives its order (12, 20, 28, 36, ...: 576 = 16 · 36).
Then all entries of the rotation are ±1/√n. Otherwise C is a random orthogonal matrix of the odd factor of n, or of order n
next to a small power of two. Nothing is tabulated: Paley's matrices follow from the quadratic character of a finite field.
Signs and random matrices follow from a seed.

``online`` makes the rotations that a runtime applies to activations, without a random number generator. A checkpoint stores
only their seed, which must give the same signs with any release of torch.
"""

import hashlib
from dataclasses import dataclass, replace
from itertools import product
from math import pi, sqrt

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

# Without a Hadamard core, a power of two below this spreads too little to be worth the structure.
LEAST_POWER = 8


@dataclass(frozen=True)
class Rotation:
    """An orthogonal matrix R of order n, float64, stored as factors."""

    left: Float[Tensor, "n"]
    power: int
    core: Float[Tensor, "m m"]
    right: Float[Tensor, "n"]
    flat: bool  # all entries are ±1/√n, up to the mirror
    mirror: Float[Tensor, "n"] | None = None  # a unit vector v; I - 2 v vᵀ is the last factor

    @property
    def order(self) -> int:
        """The order n."""
        return len(self.left)

    def apply(self, x: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
        """Compute ``x R`` in the dtype and on the device of ``x``."""
        left, core, right = (part.to(x) for part in (self.left, self.core, self.right))
        parts = (x * left).reshape(*x.shape[:-1], self.power, len(core)) @ core
        y = butterflies(parts).flatten(-2) * right
        if self.mirror is None:
            return y
        mirror = self.mirror.to(x)
        return y - 2 * (y @ mirror)[..., None] * mirror

    @property
    def inverse(self) -> "Rotation":
        """The inverse Rᵀ of a rotation without a mirror."""
        assert self.mirror is None
        return replace(self, left=self.right, core=self.core.T, right=self.left)

    @property
    def matrix(self) -> Float[Tensor, "n n"]:
        """The dense matrix R."""
        return self.apply(torch.eye(self.order, dtype=torch.float64))

    def __str__(self) -> str:
        kind, m = "Hadamard" if self.flat else "random orthogonal", len(self.core)
        if m == 1 or self.power == 1:
            return f"{kind} {self.order}"
        return f"Hadamard {self.power} x {kind} {m}"


def rotation(n: int, seed: int, *, keeps_mean: bool = False) -> Rotation:
    """Make a random rotation.

    Args:
        n: its order.
        seed: seed of its signs, and of its core if that is random.
        keeps_mean: keep the vector of ones where it is, ``R 1 = 1``, so that R commutes with subtracting a mean.
    """
    generator = torch.Generator().manual_seed(seed)
    power, core = _hadamard_core(n)
    flat = core is not None
    if core is None:
        power = n & -n if n & -n >= LEAST_POWER else 1
        core = _random_orthogonal(n // power, generator)
    left, right = (_signs(n, generator) for _ in range(2))
    plain = Rotation(left, power, core, right, flat)
    if not keeps_mean:
        return plain
    # R = R₀ M with the mirror M that exchanges 1 and R₀ᵀ 1: then R 1 = R₀ R₀ᵀ 1 = 1.
    ones = torch.ones(n, dtype=torch.float64)
    difference = ones - plain.apply(ones)
    length = float(difference.norm())
    return Rotation(left, power, core, right, flat, difference / length) if length > 1e-9 else plain


def online(n: int, seed: int) -> Rotation:
    """Make the rotation of activations of width n: signs, then S ⊗ C.

    The signs are the bits, lowest first, of SHAKE-256 of the text "nearplane n seed". C is Paley's Hadamard matrix, or where
    there is none, Hartley's matrix ``(cos + sin)(2πij/m) / √m``.
    """
    power, core = _hadamard_core(n)
    flat = core is not None
    if core is None:
        power = n & -n
        angle = torch.arange(n // power).double().outer(torch.arange(n // power).double()) * (2 * pi * power / n)
        core = (angle.cos() + angle.sin()) / sqrt(n // power)
    bits = torch.tensor(list(hashlib.shake_256(f"nearplane {n} {seed}".encode()).digest(-(-n // 8))))
    left = ((bits[:, None] >> torch.arange(8)) & 1).flatten()[:n].double() * 2 - 1
    return Rotation(left, power, core, torch.ones(n, dtype=torch.float64), flat)


def hadamard(n: int) -> Float[Tensor, "n n"] | None:
    """Return a Hadamard matrix of ±1 of order n; None if Sylvester and Paley give none."""
    if n == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    matrix = _paley(n)
    if matrix is None and n % 2 == 0:
        half = hadamard(n // 2)
        matrix = None if half is None else torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]).to(half), half)
    return matrix


def butterflies(x: Float[Tensor, "*rows p m"]) -> Float[Tensor, "*rows p m"]:
    """Multiply the last axis but one by Sylvester's matrix of order p, divided by √p."""
    *rows, p, m = x.shape
    half = 1
    while half < p:
        a, b = x.reshape(*rows, p // (2 * half), 2, half, m).unbind(-3)
        x = torch.stack((a + b, a - b), -3).reshape(*rows, p, m)
        half *= 2
    return x / sqrt(p)


def _hadamard_core(n: int) -> tuple[int, Float[Tensor, "m m"] | None]:
    """Find a Hadamard matrix C of order n / p, for the largest power of two p in n that allows one.

    Returns p, and C over the root of its order. C is Paley's, or 1 for a power of two. If there is no C, returns (1, None).
    """
    power = n & -n
    if power == n:
        return n, torch.ones(1, 1, dtype=torch.float64)
    while power:
        core = _paley(n // power)
        if core is not None:
            return power, core / sqrt(len(core))
        power //= 2
    return 1, None


def _signs(n: int, generator: torch.Generator) -> Float[Tensor, "n"]:
    """Draw n signs of ±1."""
    return torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1


def _random_orthogonal(n: int, generator: torch.Generator) -> Float[Tensor, "n n"]:
    """Draw a uniformly random orthogonal matrix: Q of a Gaussian matrix, with the signs of R's diagonal."""
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    result: Tensor = q * r.diagonal().sign()
    return result


def _paley(n: int) -> Float[Tensor, "n n"] | None:
    """Return Paley's Hadamard matrix: order q + 1 for a prime power q ≡ 3 (mod 4), 2 (q + 1) for q ≡ 1 (Paley 1933)."""
    if n % 4:
        return None
    first, second = _prime_power(n - 1), _prime_power(n // 2 - 1)
    if first is not None:  # n - 1 ≡ 3 (mod 4)
        return torch.eye(n, dtype=torch.float64) + _bordered(*first)
    if second is None or (n // 2 - 1) % 4 != 1:
        return None
    a, b = (torch.tensor(rows, dtype=torch.float64) for rows in ([[1, 1], [1, -1]], [[1, -1], [-1, -1]]))
    return torch.kron(_bordered(*second), a) + torch.kron(torch.eye(n // 2, dtype=torch.float64), b)


def _bordered(p: int, k: int) -> Float[Tensor, "n n"]:
    """Return the conference matrix of GF(q), q = pᵏ: χ(a - b) for all pairs, bordered by ±1, zero on the diagonal."""
    q = p**k
    digits = torch.arange(q)[:, None] // p ** torch.arange(k) % p
    difference = ((digits[:, None] - digits) % p * p ** torch.arange(k)).sum(-1)
    border = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    border[0, 1:] = 1
    border[1:, 0] = 1 if q % 4 == 1 else -1
    border[1:, 1:] = _character(p, k)[difference]
    return border


def _character(p: int, k: int) -> Shaped[Tensor, "q"]:
    """Return χ of every element of GF(pᵏ): 0 for 0, 1 for squares, -1 for the rest.

    The base-p digits of an element's number are the coefficients of a polynomial. Squares are the even powers of x, modulo the
    first polynomial that makes x primitive.
    """
    q = p**k
    for tail in product(range(p), repeat=k):  # x^k = tail[0] + tail[1] x + ...
        powers, element = list[tuple[int, ...]](), (1, *(0,) * (k - 1))
        while len(powers) < q - 1 and (not powers or element != powers[0]):
            powers.append(element)
            element = tuple((low + element[-1] * t) % p for low, t in zip((0, *element[:-1]), tail, strict=True))
        if tail[0] and len(powers) == q - 1:  # with tail[0] ≠ 0, x has an inverse: its powers come round to 1
            break
    character = torch.zeros(q, dtype=torch.float64)
    for i, element in enumerate(powers):
        character[sum(digit * p**j for j, digit in enumerate(element))] = 1 - 2 * (i % 2)
    return character


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with q = pᵏ for an odd prime p; None for any other q."""
    p = next((d for d in range(3, int(sqrt(max(q, 0))) + 1, 2) if q % d == 0), q)
    if q < 3 or q % 2 == 0:
        return None
    k = 0
    while q % p == 0:
        q, k = q // p, k + 1
    return (p, k) if q == 1 else None
