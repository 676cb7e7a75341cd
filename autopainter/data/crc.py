"""CRC-32 of joined byte strings from the CRC-32 of each, as zlib's crc32_combine computes it.

A CRC is a polynomial over GF(2) modulo P, its bits reflected: appending n bytes multiplies what stood before by
x^(8n).
"""

import functools
from collections.abc import Iterable

_POLYNOMIAL = 0xEDB88320  # of zlib.crc32, reflected
_ONE = 1 << 31  # the polynomial 1


def concatenated(parts: Iterable[tuple[int, int]]) -> int:
    """CRC-32 of byte strings joined, from (CRC-32, length) of each of them."""
    whole = 0
    for checksum, length in parts:
        whole = _multiply(_power(length), whole) ^ checksum
    return whole


def _multiply(a: int, b: int) -> int:
    """Product modulo P of two reflected polynomials."""
    product = 0
    while a:
        if a & _ONE:
            product ^= b
        a = (a << 1) & 0xFFFFFFFF
        b = (b >> 1) ^ (_POLYNOMIAL if b & 1 else 0)
    return product


@functools.lru_cache(maxsize=4096)
def _power(length: int) -> int:
    """x^(8 length) modulo P."""
    power, square = _ONE, _ONE >> 8
    while length:
        if length & 1:
            power = _multiply(power, square)
        square = _multiply(square, square)
        length >>= 1
    return power
