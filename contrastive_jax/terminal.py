"""Standard output and standard error whose loss does not end what a command computes."""

import errno
import io
import os

# What a closed terminal and a pipe that nobody reads any more answer.
_GONE = (errno.EIO, errno.EPIPE)


class _Lasting(io.FileIO):
  """A descriptor whose writes are dropped once nobody is there to read them."""

  def write(self, data: memoryview) -> int | None:
    try:
      return super().write(data)
    except OSError as error:
      if error.errno not in _GONE:
        raise
      return len(data)


def lasting(stream: io.TextIOBase | None, descriptor: int) -> io.TextIOBase:
  """Returns a stream on the same descriptor that goes on without its reader.

  A terminal may be closed and `command | head` ends early, while a run is to write its checkpoint or to go on.
  Characters that the stream cannot show, as names of files may hold them, are written as escapes.

  Args:
    stream: `sys.stdout` or `sys.stderr`. What is no text stream of a descriptor, such as that of a notebook, is
      returned as it is.
    descriptor: that of the stream, in whose place nothing is written where it is closed.
  """
  if stream is None:
    return open(os.devnull, "w")
  if type(stream) is not io.TextIOWrapper:
    return stream
  stream.flush()
  return io.TextIOWrapper(
    io.BufferedWriter(_Lasting(descriptor, "w", closefd=False)),
    encoding=stream.encoding,
    errors="backslashreplace",
    line_buffering=stream.line_buffering,
    write_through=stream.write_through,
  )
