"""The error that tells a person what to mend, and how a script ends with it.

Bad input of any kind (a flag, a file, a device that is missing) raises `InputError` with one
sentence: what was found, where, and what to do. `run_script` prints that sentence and exits with
2; everything else is a bug and keeps its traceback. If output cannot be written, the script
carries on, and exits with 2 as well.
"""

import argparse
import math
import os
import re
import signal
import sys


class InputError(Exception):
    """Bad input; the message is one sentence, on one line, for the person at the keyboard."""

    def __init__(self, message):
        super().__init__(" ".join(str(message).splitlines()))


def left_out(module, instead):
    """A module's `__getattr__`: calling a name that was left out says in one sentence what to use.

    instead: {name: what to use}. The names can be imported, so a file that imports more than it
    calls works.
    """

    def find(name):
        if name not in instead:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")

        def refuse(*_, **__):
            raise InputError(f"{module}.{name} is left out here: {instead[name]}")

        return refuse

    return find


class _Defaults(argparse.ArgumentDefaultsHelpFormatter):
    """Adds a flag's default to its help, unless the help mentions it already."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class ArgumentParser(argparse.ArgumentParser):
    """argparse without abbreviated flags, with defaults in the help, and errors as one sentence."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False, formatter_class=_Defaults)

    def error(self, message):
        raise InputError(f"{message} (see {self.prog} --help)")


def number(kind, low, high=math.inf, low_allowed=True):
    """An argparse type: an int or float from `low` to `high`; ints have at most 63 bits.

    low_allowed: False excludes `low` itself.
    """
    high = min(high, 2**63 - 1) if kind is int else high

    def parse(text):
        """The number that a text names; raises what argparse turns into a message."""
        value = kind(text)
        if (
            not (low <= value <= high)
            or (value == low and not low_allowed)
            or not math.isfinite(value)
        ):
            bounds = f" {'at least' if low_allowed else 'above'} {low}" if low > -math.inf else ""
            bounds += f" and at most {high}" if high < math.inf else ""
            raise argparse.ArgumentTypeError(
                f"{text} is out of range: give a finite number{bounds}"
            )
        return value

    parse.__name__ = kind.__name__  # argparse's "invalid int value"
    return parse


def path_type(text):
    """An argparse type: a path, or a name within one; raises ArgumentTypeError if it is empty.

    An unset shell variable (`--output "$OUT"`) would otherwise name the current folder.
    """
    if not text.strip():
        raise argparse.ArgumentTypeError("it is empty: give a name, or leave the flag out")
    return text


def check_choice(flag, value, choices):
    """Return the value; raises InputError if it is none of the choices."""
    if value not in choices:
        raise InputError(f"--{flag} is {value}: choose one of {', '.join(choices)}")
    return value


def refuse_useless(options, rules):
    """Raise InputError for a flag that was given, but does nothing.

    rules: (whether these flags do nothing, their names, in which case, as "without --serve"), ...
    """
    for useless, flags, case in rules:
        for flag in flags if useless else ():
            if getattr(options, flag) is not None and getattr(options, flag) is not False:
                raise InputError(f"--{flag} does nothing {case}: leave it out, or change the other")


class Output:
    """A standard stream that never raises: `failure` keeps the last error, later writes try again.

    stream: None if the shell has closed it.
    ends_with_reader: whether a pipe that no one reads any more ends the script.
    """

    def __init__(self, name, stream, ends_with_reader):
        self.name, self.ends_with_reader, self.failure = name, ends_with_reader, None
        # A closed stream becomes one that refuses every write. Left closed, its file number would
        # go to the next file that is opened, and prints would end up there.
        self.stream = open(os.devnull) if stream is None else stream
        if getattr(self.stream, "errors", None) == "strict" and hasattr(self.stream, "reconfigure"):
            # File names may have characters that the stream's encoding lacks.
            self.stream.reconfigure(errors="backslashreplace")

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
            pass  # a signal's handler prints during a write, which Python refuses

    def leave(self):
        """Leave nothing unwritten: Python flushes the stream again at exit, and would complain."""
        try:
            self.stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run_script(main, outlasts_reader=False):
    """Run a script's `main` and exit with its code, printing one sentence on stderr if it failed.

    Exit codes: 2 for bad input or output that could not be written, 130 without a sentence for
    Ctrl-C. A closed stdout (`... | head` has read enough) ends the script at once with 1, unless
    `outlasts_reader`.
    """
    # The scripts let Ctrl-C end them quietly during their imports.
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    streams = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = outputs = (
        Output("output", sys.stdout, not outlasts_reader),
        Output("error", sys.stderr, False),
    )
    try:
        code = _exit_code(main) or _exit_code(sys.stdout.flush)
        failed = [output for output in outputs if output.failure]
        if failed and not code:
            reason = failed[0].failure.strerror or "it is closed"
            print(
                f"error: standard {failed[0].name} could not be written ({reason}), all else was "
                "done: send it elsewhere, or free some space",
                file=sys.stderr,
            )
            code = 2
    finally:
        for output in outputs:
            output.leave()
        sys.stdout, sys.stderr = streams
    # gloo's threads may still be freeing tensors, and that aborts a Python that is shutting down.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os._exit(code)
    if code:
        sys.exit(code)


def _exit_code(main):
    """Run a function, print its error on stderr, and return the exit code."""
    try:
        main()
        return 0
    except InputError as error:
        if str(error):  # otherwise another process of the run prints it
            print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, MemoryError) as error:
        if re.search(
            r"shared memory\(shm\)|out of shared memory|DataLoader worker \(pid", str(error)
        ):
            print(
                "error: the processes that load data have ended, or ran out of shared memory "
                f"({str(error).splitlines()[0]}): make /dev/shm larger, or take fewer --workers, "
                "such as 0",
                file=sys.stderr,
            )
            return 2
        # The messages of a GPU, a CPU, and a GPU's libraries.
        said = "out of memory|can't allocate memory|_ALLOC_FAILED"
        if not isinstance(error, MemoryError) and not re.search(said, str(error)):
            raise
        reason = (str(error) or "out of memory").splitlines()[0]
        print(
            f"error: the memory does not hold this ({reason}): take a smaller --batch_size, with "
            "train.py the same in pieces by --micro_batch, or another --device",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as stop:
        return stop.code or 0
