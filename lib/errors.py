"""Errors that a person can act on: where it is, what was found, what was expected, and the command that fixes it."""

import errno
import os
import traceback

OUTPUT_CLOSED = 141  # the exit code where the reader of the output has gone (`| head`): as a shell says of SIGPIPE


class StudyError(Exception):
    """Bad input. Carries the four things a reader needs; `exit_code` is what the command line exits with."""

    exit_code = 2

    def __init__(self, where: str, found: str, expected: str, fix: str = ""):
        self.where, self.found, self.expected, self.fix = where, found, expected, fix
        super().__init__(f"{where}: {found}\n  expected: {expected}" + f"\n  fix: {fix}" * bool(fix))

    def __reduce__(self):  # pickled between processes with its parts, not with the joined message
        return type(self), (self.where, self.found, self.expected, self.fix)


class MissingError(StudyError):
    """Something the run needs is not on this machine (GPU, memory, license, key, model, package extra)."""

    exit_code = 3


class OutOfMemory(StudyError):
    """A device had no memory left for a step: its member ends as `out_of_memory`, the others go on."""

    exit_code = 1


def failure_status(error: BaseException) -> str:
    """The status of a member that this exception ended: out_of_memory or failed."""
    names = {cls.__name__ for cls in type(error).__mro__}  # by name: torch must not be imported for it
    return "out_of_memory" if names & {"OutOfMemory", "OutOfMemoryError", "MemoryError"} else "failed"


def describe_os_error(error: OSError) -> tuple[str, int]:
    """(what to say, exit code) of an error of the operating system that reached the command line."""
    if isinstance(error, BrokenPipeError):  # else the interpreter, ending, would flush what is left and complain
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return "", OUTPUT_CLOSED
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
        expected = "a folder that can be written, with space left"
        fix = "free space or correct its permissions, then rerun the same command (what is done stays done)"
        missing = MissingError(error.filename or "writing a file", error.strerror, expected, fix)
        return str(missing), missing.exit_code
    frames = traceback.extract_tb(error.__traceback__)
    place = f"  ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}", 1
