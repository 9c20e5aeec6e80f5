"""Whether a codec is worth its time on a link. Pure arithmetic."""

from __future__ import annotations


def pays(link_bytes_per_s: float, encode_bytes_per_s: float, decode_bytes_per_s: float, ratio: float) -> bool:
    """Whether a transfer is over sooner with the codec than without.

    Coding, sending and decoding of successive frames overlap, so that the slowest of the three sets the pace.

    Args:
        link_bytes_per_s: of the wire.
        encode_bytes_per_s: of the codec, in uncompressed bytes.
        decode_bytes_per_s: likewise.
        ratio: encoded bytes per uncompressed byte.

    Raises:
        ValueError: a speed or ratio that is not above zero.
    """
    numbers = (link_bytes_per_s, encode_bytes_per_s, decode_bytes_per_s, ratio)
    if not all(number > 0 for number in numbers):
        raise ValueError(f"speeds and ratio must be above zero, not {numbers}")
    coded = max(1 / encode_bytes_per_s, ratio / link_bytes_per_s, 1 / decode_bytes_per_s)
    return coded < 1 / link_bytes_per_s
