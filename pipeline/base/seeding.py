"""Random streams as functions of a position, so that no generator state has to be carried along or saved."""

import hashlib
import struct
import zlib


def stream_seed(seed: int, purpose: str, *position: int) -> int:
    """Return a 63-bit seed for one use at one position, e.g. ``stream_seed(0, "dropout", step, rank)``."""
    # hashed, because neighbouring integers as seeds give related streams in some generators
    numbers = struct.pack(f"<{2 + len(position)}q", seed, zlib.crc32(purpose.encode()), *position)
    return int.from_bytes(hashlib.blake2b(numbers, digest_size=8).digest(), "little") >> 1
