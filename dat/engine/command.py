"""What every command does around its work: errors become one line, other processes are told."""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import torch

from dat.engine.peers import current_watch
from dat.utils.errors import UserError


def main_guard(main: Callable[[], None]) -> None:
    """Runs a command: UserError and OSError become one line and exit code 1, Ctrl-C exit code 130.

    Any other exception is a defect of the program and keeps its traceback. Under torchrun the other processes are told
    and end with this error too; a process that fails because another one did says what that one said.
    """
    try:
        main()
    except (UserError, OSError) as error:
        if os.environ.get("DAT_TRACEBACK"):
            traceback.print_exc()
        _fail(f"error: {error_line(error)}", 1, tell=error_line(error))
    except KeyboardInterrupt:
        _fail("interrupted; train.resume=true goes on from the last checkpoint", 130, tell="interrupted")
    except Exception as error:
        watch = current_watch()
        if watch is None:
            raise
        reason = watch.reason()
        if reason is not None:
            _fail(f"error: {reason}", 1)
        _fail(traceback.format_exc(), 1, tell=f"{type(error).__name__}: {error_line(error)}")
    finally:
        # also where a command ends by sys.exit
        watch = current_watch()
        if watch is not None:
            watch.done()
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _fail(message: str, code: int, tell: str = "") -> NoReturn:
    """Prints a message and ends with an exit code; the other processes, if there are any, are told the error."""
    print(message, file=sys.stderr)
    watch = current_watch()
    if watch is None:
        sys.exit(code)
    watch.failed(tell)
    sys.stdout.flush()
    sys.stderr.flush()
    # taking down a process group in which others have failed may never return
    os._exit(code)


def error_line(error: BaseException) -> str:
    """What main_guard says of an error, without line breaks and not longer than a person reads."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error).strip()
    # a loader's worker passes its error on as the text of a whole traceback
    if "Original Traceback" in text:
        text = text.splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split())
    return text if len(text) <= 1000 else f"{text[:1000]} ..."
