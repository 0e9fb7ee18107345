"""What the served file holds: bytes that follow from where they are, so that a check needs no second copy of them."""

import random
import struct

# bytes: a block's number, then the same noise in each
BLOCK = 1024
_NUMBER = struct.Struct(">Q")
# bits below it for the number of a block, which last for a pebibyte
_GENERATION = 40
# bytes of noise that are found nowhere else
_MARK = 16

# so many bytes hold a number and the mark behind it, wherever they begin
LOCATE = BLOCK + _NUMBER.size + _MARK


class Content:
    """The bytes of a file, and of those that follow it in rotations: each of these is a `generation`.

    Whatever is lost, doubled, moved or changed shows: within a block the noise is not where it should be, and whole
    blocks have the wrong numbers.
    """

    def __init__(self, seed: int) -> None:
        self._noise = random.Random(seed).randbytes(BLOCK - _NUMBER.size)
        self._mark = self._noise[:_MARK]

    def read(self, generation: int, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset`."""
        noise, pack, first = self._noise, _NUMBER.pack, generation << _GENERATION
        blocks = range(first + offset // BLOCK, first + (offset + count) // BLOCK + 1)
        skip = offset % BLOCK
        return b"".join([part for number in blocks for part in (pack(number), noise)])[
            skip : skip + count
        ]

    def locate(self, received: bytes | bytearray) -> tuple[int, int] | None:
        """Return the generation and the offset that `received`, at least LOCATE bytes, comes from; None: it is from no file of ours."""
        mark = received.find(self._mark, _NUMBER.size)
        if mark < 0:
            return None
        number = _NUMBER.unpack_from(received, mark - _NUMBER.size)[0]
        generation, block = number >> _GENERATION, number & ((1 << _GENERATION) - 1)
        offset = block * BLOCK + _NUMBER.size - mark
        return (generation, offset) if offset >= 0 else None
