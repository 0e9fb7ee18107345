"""The contents of the served file: every byte follows from its position.

So received bytes can be checked without a second copy of the file.
"""

import random
import struct

# Bytes of a block. A block has a number, and then noise that is the same in every block.
BLOCK = 1024
_NUMBER = struct.Struct(">Q")
# The number's lower bits count the blocks, and the bits from this one on are the generation. This
# is enough for files of a pebibyte.
_GENERATION = 40
# The first bytes of the noise, which occur nowhere else in the file.
_MARK = 16

# This many bytes contain a complete number and the mark after it, wherever they start.
LOCATE = BLOCK + _NUMBER.size + _MARK


class Content:
    """The bytes of a file and of its successors after rotations; each file is a `generation`.

    A check detects bytes that are lost, repeated, moved or changed: within a block the noise is in
    the wrong position, and complete blocks have the wrong numbers.
    """

    def __init__(self, seed: int) -> None:
        self._noise = random.Random(seed).randbytes(BLOCK - _NUMBER.size)
        self._mark = self._noise[:_MARK]

    def read(self, generation: int, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset` on, of that generation."""
        noise, pack, first = self._noise, _NUMBER.pack, generation << _GENERATION
        blocks = range(first + offset // BLOCK, first + (offset + count) // BLOCK + 1)
        skip = offset % BLOCK
        return b"".join([part for number in blocks for part in (pack(number), noise)])[
            skip : skip + count
        ]

    def locate(self, received: bytes | bytearray) -> tuple[int, int] | None:
        """Return the generation and the offset of `received`, which has at least LOCATE bytes.

        Returns None if these bytes are in no generation.
        """
        mark = received.find(self._mark, _NUMBER.size)
        if mark < 0:
            return None
        number = _NUMBER.unpack_from(received, mark - _NUMBER.size)[0]
        generation, block = number >> _GENERATION, number & ((1 << _GENERATION) - 1)
        offset = block * BLOCK + _NUMBER.size - mark
        return (generation, offset) if offset >= 0 else None
