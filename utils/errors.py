"""One kind of error for what a user can put right, and the wrapper that prints it as one sentence."""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one clear sentence: which file or frame, what is wrong, what to do."""


def command_line(main: Callable[..., None] | None = None, *, resumes: bool = False) -> Callable[..., None]:
    """Wrap an entry point: UserError, Ctrl-C and files that do not open end with one line on stderr, no traceback, and status 2
    (Ctrl-C 130).

    `resumes`: the same command given again goes on where it stopped, which is then said.
    """
    if main is None:
        return functools.partial(command_line, resumes=resumes)

    @functools.wraps(main)
    def run(*args, **kwargs):
        try:
            main(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt:
            print("stopped" + "; the same command continues from here" * resumes, file=sys.stderr)
            raise SystemExit(130) from None
        except OSError as error:
            if error.errno == errno.ENOSPC:
                said = f"the disk is full while writing {error.filename or 'a file'}; free space and run the same command again"
                said += ", it continues from the last finished step" * resumes
            elif error.filename and error.strerror:  # the user's file, not our mistake
                said = f"{error.filename} cannot be read or written ({error.strerror}); put that right and run it again"
            else:
                raise
            print(f"error: {said}", file=sys.stderr)
            raise SystemExit(2) from None

    return run
