"""ICC profiles built from white point, primaries and transfer curve.

Computed in exact fractions up to the last rounding, so that equal numbers give equal bytes on every processor.
"""

import struct
from collections.abc import Sequence
from fractions import Fraction

__all__ = ["SRGB_CURVE", "gamma_curve", "grey_profile", "rgb_profile", "table_curve"]

Chromaticity = tuple[Fraction, Fraction]  # x and y of CIE 1931
Vector = tuple[Fraction, Fraction, Fraction]
Matrix = tuple[Vector, Vector, Vector]  # rows

_D50: Vector = (Fraction(0xF6D6, 65536), Fraction(1), Fraction(0xD32D, 65536))  # as ICC rounds it
_BRADFORD: Matrix = (
    (Fraction("0.8951"), Fraction("0.2664"), Fraction("-0.1614")),
    (Fraction("-0.7502"), Fraction("1.7135"), Fraction("0.0367")),
    (Fraction("0.0389"), Fraction("-0.0685"), Fraction("1.0296")),
)


def gamma_curve(exponent: Fraction) -> bytes:
    """light = value ** exponent"""
    return b"para" + bytes(8) + _fixed([exponent])


# IEC 61966-2-1: ((value + 0.055) / 1.055) ** 2.4 above 0.04045, else value / 12.92
SRGB_CURVE = (
    b"para\0\0\0\0\0\3\0\0"
    + struct.pack(">i", round(Fraction("2.4") * 65536))
    + struct.pack(">4i", *(round(Fraction(n) * 65536) for n in ("1000/1055", "55/1055", "100/1292", "0.04045")))
)


def table_curve(light: Sequence[int]) -> bytes:
    """light / 65535 at evenly spaced values"""
    return b"curv\0\0\0\0" + struct.pack(f">I{len(light)}H", len(light), *light)


def grey_profile(curve: bytes) -> bytes:
    """A grey scale, black to white."""
    return _profile(b"GRAY", {b"wtpt": _xyz(_D50), b"kTRC": curve})


def rgb_profile(white: Chromaticity, primaries: Sequence[Chromaticity], curves: Sequence[bytes]) -> bytes:
    """`primaries`, `curves`: of red, green and blue. Raises ValueError for numbers that span no colours."""
    if not white[1] or not all(y for _, y in primaries):
        raise ValueError("a chromaticity without luminance")
    light = _of_chromaticity(white)
    columns = _transposed(tuple(map(_of_chromaticity, primaries)))  # type: ignore[arg-type]
    amounts = _times(_inverse(columns), light)
    cones, cones_d50 = _times(_BRADFORD, light), _times(_BRADFORD, _D50)
    if not all(cones) or not all(amounts):
        raise ValueError("no white of these primaries")
    scaled = tuple(
        tuple(x * after / before for x in row) for row, before, after in zip(_BRADFORD, cones, cones_d50, strict=True)
    )
    adaptation = _product(_inverse(_BRADFORD), scaled)  # type: ignore[arg-type]
    colorants = _transposed(_product(adaptation, columns))
    tags = {b"wtpt": _xyz(_D50), b"chad": b"sf32\0\0\0\0" + _fixed([x for row in adaptation for x in row])}
    for name, colorant, amount, curve in zip(b"rgb", colorants, amounts, curves, strict=True):
        tags[bytes([name]) + b"XYZ"] = _xyz(tuple(amount * x for x in colorant))
        tags[bytes([name]) + b"TRC"] = curve
    return _profile(b"RGB ", tags)


def _profile(space: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"desc": _text("Colours of the original"), b"cprt": _text("No copyright, use freely")} | tags
    places: dict[bytes, int] = {}
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, value in tags.items():
        if value not in places:  # equal curves are stored once
            places[value] = start + len(body)
            body += value + bytes(-len(value) % 4)
        table += name + struct.pack(">II", places[value], len(value))
    date = struct.pack(">6H", 2000, 1, 1, 0, 0, 0)
    head = struct.pack(">I4xI", start + len(body), 0x04200000) + b"mntr" + space + b"XYZ " + date + b"acsp"
    return (head.ljust(68, b"\0") + _fixed(_D50)).ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def _text(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return b"mluc\0\0\0\0" + struct.pack(">II4sII", 1, 12, b"enUS", len(encoded), 28) + encoded


def _xyz(vector: Sequence[Fraction]) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(vector)


def _fixed(numbers: Sequence[Fraction]) -> bytes:
    try:
        return struct.pack(f">{len(numbers)}i", *(round(number * 65536) for number in numbers))
    except struct.error:
        raise ValueError("numbers too large for a profile") from None


def _of_chromaticity(place: Chromaticity) -> Vector:
    """XYZ of luminance 1"""
    x, y = place
    return x / y, Fraction(1), (1 - x - y) / y


def _times(matrix: Matrix, vector: Vector) -> Vector:
    a, b, c = (sum((x * y for x, y in zip(row, vector, strict=True)), Fraction(0)) for row in matrix)
    return a, b, c


def _product(left: Matrix, right: Matrix) -> Matrix:
    a, b, c = (_times(left, column) for column in _transposed(right))
    return _transposed((a, b, c))


def _transposed(matrix: Matrix) -> Matrix:
    a, b, c = zip(*matrix, strict=True)
    return a, b, c


def _inverse(matrix: Matrix) -> Matrix:
    (a, b, c), (d, e, f), (g, h, i) = matrix
    determinant = a * (e * i - f * h) - b * (d * i - f * g) + c * (d * h - e * g)
    if not determinant:
        raise ValueError("primaries on one line")
    rows = (
        (e * i - f * h, c * h - b * i, b * f - c * e),
        (f * g - d * i, a * i - c * g, c * d - a * f),
        (d * h - e * g, b * g - a * h, a * e - b * d),
    )
    p, q, r = (tuple(x / determinant for x in row) for row in rows)
    return p, q, r  # type: ignore[return-value]
