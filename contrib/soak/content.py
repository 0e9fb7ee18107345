"""The contents of the served log: every byte follows from its log offset.

So received bytes can be checked without a second copy of the log.
"""

import random
import struct

# Bytes of a block. A block has its number, and then noise that is the same in every block.
BLOCK = 4096
_NUMBER = struct.Struct(">Q")

# The first bytes of the noise, which occur nowhere else in the log.
_MARK = 16

# This many bytes contain a complete number and the mark after it, wherever they start.
LOCATE = BLOCK + _NUMBER.size + _MARK


class Content:
    """The bytes of the log.

    A check detects bytes that are lost, repeated, moved or changed: within a block the noise is in
    the wrong position, and complete blocks have the wrong numbers.
    """

    def __init__(self, seed: int) -> None:
        self._noise = random.Random(seed).randbytes(BLOCK - _NUMBER.size)
        self._mark = self._noise[:_MARK]

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from the log offset `offset` on."""
        noise, pack = self._noise, _NUMBER.pack
        blocks = range(offset // BLOCK, (offset + count) // BLOCK + 1)
        skip = offset % BLOCK
        return b"".join([part for number in blocks for part in (pack(number), noise)])[
            skip : skip + count
        ]

    def locate(self, received: bytes | bytearray) -> int | None:
        """Return the log offset of `received`, which has at least LOCATE bytes.

        Returns None if these bytes are not in the log.
        """
        mark = received.find(self._mark, _NUMBER.size)
        if mark < 0:
            return None
        block = _NUMBER.unpack_from(received, mark - _NUMBER.size)[0]
        offset: int = block * BLOCK + _NUMBER.size - mark
        return offset if offset >= 0 else None
