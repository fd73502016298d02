"""A keyed permutation that is computed, not stored: any position at once, in constant memory. Imports no torch.

A Feistel network on pairs (left, right), left below a and right below b, where a · b is at least the count and hardly
more. Each round adds a hash of one half to the other, which can be undone whatever the hash. A result that isn't below
the count is permuted again until one is (cycle walking). Both are from Black and Rogaway, Ciphers with Arbitrary Finite
Domains, 2002 (doi 10.1007/3-540-45760-7_9). This is no cipher: nobody tries to guess the key.
"""

import math
from typing import TypeVar, overload

import numpy as np

# A few samples need many rounds: after 12, the orders of 8 samples are 9 % away from equally likely, which two more
# rounds halve. Many samples need 6.
ROUNDS = 24
MASK = (1 << 64) - 1

Numbers = TypeVar("Numbers", int, np.ndarray)  # below 2^64: integers, or uint64 of one dimension


@overload
def permuted(positions: int, count: int, seed: int, epoch: int) -> int: ...
@overload
def permuted(positions: np.ndarray, count: int, seed: int, epoch: int | np.ndarray) -> np.ndarray: ...
def permuted(positions: int | np.ndarray, count: int, seed: int, epoch: int | np.ndarray) -> int | np.ndarray:
    """The numbers at these positions, each below count, of a permutation of 0 .. count - 1.

    It depends on count, seed and epoch alone, and is the same in all versions and on all machines.
    positions: an integer, for which so is the result; or int64 of any shape, for which it is int64 of that shape.
    epoch: one for all positions, or an array of one for each.

    >>> permuted(np.arange(8), count=8, seed=1, epoch=0).tolist()
    [1, 6, 2, 4, 7, 3, 0, 5]
    >>> permuted(2_900_000_000, count=3_600_000_000, seed=1, epoch=0)
    203367955
    """
    key = mix(seed & MASK)
    if isinstance(positions, int):
        assert isinstance(epoch, int)
        number = feistel(positions, count, mix((key + epoch) & MASK))
        while number >= count:
            number = feistel(number, count, mix((key + epoch) & MASK))
        return number
    numbers = positions.astype(np.uint64).reshape(-1)
    keys = np.broadcast_to(mix(np.array(epoch, dtype=np.uint64).reshape(-1) + np.uint64(key)), numbers.shape)
    outside = np.arange(len(numbers))
    while len(outside):
        numbers[outside] = feistel(numbers[outside], count, keys[outside])
        outside = outside[numbers[outside] >= count]
    return numbers.astype(np.int64).reshape(positions.shape)


def feistel(numbers: Numbers, count: int, keys: Numbers) -> Numbers:
    """A permutation of 0 .. a · b - 1 by each number's key."""
    a, b = halves(count)
    left, right = numbers // b, numbers % b
    for number in range(ROUNDS):
        keys = (keys + 0xD1B54A32D192ED03) & MASK  # any odd number
        if number % 2:
            right = (right + mix(left ^ keys) % b) % b
        else:
            left = (left + mix(right ^ keys) % a) % a
    return left * b + right


def halves(count: int) -> tuple[int, int]:
    """Sizes a and b with a · b at least count. a is even: sums modulo odd sizes make even permutations alone."""
    a = math.isqrt(count - 1) + 1
    a += a % 2
    return a, -(-count // a)


def mix(x: Numbers) -> Numbers:
    """The splitmix64 hash (Steele et al. 2014, doi 10.1145/2660193.2660195)."""
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)
