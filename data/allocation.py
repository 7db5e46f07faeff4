"""How the C library treats the memory of pictures, which come and go a thousand times a second."""

import ctypes
import functools

# Names of the settings in malloc.h of glibc.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
# Of what is freed, so many bytes stay with the process; what is larger than the second is mapped by itself. They are
# the most that glibc comes to by itself, once large arrays were freed. With less, a train step maps its own anew.
_KEPT, _MAPPED = 64 << 20, 32 << 20


@functools.cache
def keep_freed_memory() -> None:
  """Lets glibc keep the memory of freed pictures for the next ones, where this is glibc.

  As it comes, it gives most of it back to the system, whose pages are then made zero and mapped again for every
  picture: a tenth of the time that a photograph takes.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt is not None:
    mallopt(_TRIM_THRESHOLD, _KEPT)
    mallopt(_MMAP_THRESHOLD, _MAPPED)
