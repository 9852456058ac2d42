"""The one error that tells a person what to mend, and how a script ends with it.

Bad input of any kind (a flag, a file, a device that is not there) raises `InputError`
with one sentence: what was found, where, and what to do. `run_script` prints that
sentence and exits with 2; everything else is a bug and keeps its traceback. Output that
cannot be written is no reason to stop: the script goes on, and ends with 2 as well.
"""

import argparse
import math
import os
import re
import signal
import sys
import tempfile
from contextlib import contextmanager


class InputError(Exception):
    """Bad input; the message is one sentence, on one line, for the person at the keyboard."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the defaults that a flag has, unless its own help tells of them."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with whole flag names only, defaults shown, and errors as one sentence."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Defaults)

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def number(kind, low, high=math.inf, low_allowed=True):
    """An argparse type: an int or float from `low` (or just above it) to `high`; ints have at most 63 bits."""
    high = min(high, 2**63 - 1) if kind is int else high

    def parse(text):
        value = kind(text)
        if not (low <= value <= high) or (value == low and not low_allowed) or not math.isfinite(value):
            bounds = f" {'at least' if low_allowed else 'above'} {low}" if low > -math.inf else ""
            bounds += f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text} is out of range: give a finite number{bounds}")
        return value
    parse.__name__ = kind.__name__  # argparse's "invalid int value"
    return parse


def check_choice(flag, value, choices):
    """The value; raises InputError where it is none of the choices."""
    if value not in choices:
        raise InputError(f"--{flag} is {value}: choose one of {', '.join(choices)}")
    return value


class Output:
    """A standard stream in which nothing that fails raises: it is kept in `failure`, and the next write is tried again.

    stream: None where the shell has closed it; ends_with_reader: whether a pipe that nobody reads ends the script.
    """

    def __init__(self, name, stream, ends_with_reader):
        self.name, self.ends_with_reader, self.failure = name, ends_with_reader, None
        # Open for reading: it refuses each write, and a file with data in it can't take its number.
        self.stream = open(os.devnull) if stream is None else stream
        if getattr(self.stream, "errors", None) == "strict" and hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")  # a name that the stream's encoding lacks is no failure

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def write(self, text):
        """As the stream's own."""
        return self._try(self.stream.write, text)

    def flush(self):
        """As the stream's own."""
        self._try(self.stream.flush)

    def _try(self, action, *arguments):
        try:
            return action(*arguments)
        except OSError as error:
            self.failure = error
            if self.ends_with_reader and isinstance(error, BrokenPipeError):
                sys.exit(1)
        except RuntimeError:
            pass  # a signal's handler speaks in the middle of a write, where Python lets nobody in

    def leave(self):
        """Make sure that Python, which flushes the stream once more as it exits, finds nothing to complain about."""
        try:
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run_script(main, outlasts_reader=False):
    """Run a script's `main`; bad input, and output that failed, end with one sentence on stderr and exit code 2, Ctrl-C
    with 130 and none.

    A closed stdout (`... | head` has read enough) ends the script at once with 1, unless it `outlasts_reader`.
    """
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # as a script sets it for the time of its imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = outputs = (Output("output", sys.stdout, not outlasts_reader),
                                        Output("error", sys.stderr, False))
    try:
        code = _exit_code(main) or _exit_code(sys.stdout.flush)
        failed = [output for output in outputs if output.failure]
        if failed and not code:
            reason = failed[0].failure.strerror or "it is closed"
            print(f"error: standard {failed[0].name} could not be written ({reason}), all else was done: send it "
                  "elsewhere, or free some space", file=sys.stderr)
            code = 2
    finally:
        for output in outputs:
            output.leave()
        sys.stdout, sys.stderr = streams
    if "TORCHELASTIC_RUN_ID" in os.environ:  # gloo's threads may still let go of tensors, which aborts an ending Python
        os._exit(code)
    if code:
        sys.exit(code)


def _exit_code(main):
    """The exit code that a function ends with, its error on stderr."""
    try:
        main()
        return 0
    except InputError as error:
        if str(error):  # else another process of the run says it
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if re.search(r"shared memory\(shm\)|out of shared memory|DataLoader worker \(pid", str(error)):
            print(f"error: the processes that load data have ended, or ran out of shared memory "
                  f"({str(error).splitlines()[0]}): make /dev/shm larger, or take fewer --workers, such as 0",
                  file=sys.stderr)
            return 2
        said = "out of memory|can't allocate memory|_ALLOC_FAILED"  # a GPU's, a CPU's, a GPU's libraries'
        if not isinstance(error, MemoryError) and not re.search(said, str(error)):
            raise
        reason = (str(error) or "out of memory").splitlines()[0]
        print(f"error: the memory does not hold this ({reason}): take a smaller --batch_size, with train.py the same "
              "in pieces by --micro_batch, or another --device", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as stop:
        return stop.code or 0


def check_regular(path):
    """Raise InputError where `path`, its links followed, is there but is no regular file.

    A pipe without a writer is waited for without end, a device may never end, and neither can be read twice.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(f"{path} is a folder, a pipe or a device, not a regular file: name a file, and save there "
                         "what a command gives")


@contextmanager
def replacing(path, mode="wb", **options):
    """A file that takes `path`'s place in one step when the block ends well, else leaves no trace.

    Written beside its target under a temporary name, synced, then renamed; a link stays one, to the new file.
    Raises InputError where the folder or the disk does not let it be written, or the target is no regular file.
    """
    target, temporary = os.path.realpath(path), None
    folder = os.path.dirname(target)
    try:
        if os.path.exists(target) and not os.path.isfile(target):
            raise OSError(0, "it is a folder, a pipe or a device, not a regular file")
        os.makedirs(folder, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=os.path.basename(target) + ".", suffix=".tmp", dir=folder)
        with os.fdopen(descriptor, mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's 0600 would lock colleagues out
        os.replace(temporary, target)
        temporary = None
    except (OSError, RuntimeError) as error:
        reason = _why_not_written(error)
        if not reason:
            raise
        raise InputError(f"{path} could not be written ({reason}): free some space or name another folder") from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _why_not_written(error):
    """The reason of a failed write in words, or None for an error of another kind."""
    if isinstance(error, RuntimeError):
        if "inline_container.cc" not in str(error):
            return None
        # torch.save's zip writer stumbles at its end over what the OSError before left out.
        error = error.__context__ if isinstance(error.__context__, OSError) else error
    return getattr(error, "strerror", None) or str(error)


def leftovers(folder, names):
    """Paths of what `replacing` left in a folder when it was killed; names: pattern of the targets' names."""
    with os.scandir(folder) as entries:
        return [entry.path for entry in entries if entry.is_file(follow_symlinks=False)
                and re.fullmatch(rf"({names})\.[a-z0-9_]{{8}}\.tmp", entry.name)]
