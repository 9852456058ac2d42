"""Files and folders that are written whole or not at all, and the lock on a run's folder."""

import hashlib
import os
import re
import secrets
import shutil
import socket
import tempfile
import weakref
from contextlib import contextmanager, suppress

from runtime.errors import InputError

HOST = re.sub(r"[^A-Za-z0-9]", "_", socket.gethostname())[:40]
OWN = secrets.token_hex(4)  # distinguishes this process from an earlier one with its number
# The end of a temporary file's name, after the target's name.
TEMPORARY = r"\.(?P<host>\w+)-(?P<process>\d+)-(?P<own>[0-9a-f]{8})-[a-z0-9_]{8}\.tmp"
HASHED_BYTES = 2**20  # at a time
_cleared = set()  # folders whose leftovers were removed

# A run's files, written by `replacing`.
FILES = r"(checkpoint|model_best|Epoch-\d+-model)\.pth\.tar|log\.jsonl|run\.json|rst_val_.*"


def check_regular(path, shown=None):
    """Raise InputError if `path` exists (links followed) but is not a regular file.

    Reading a pipe without a writer waits for ever, a device may never end, and neither can be read
    twice. shown: how the message names the path (default: the path).
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise InputError(
            f"{shown or path} is a folder, a pipe or a device, not a regular file: save a "
            "command's output to a file, and name that"
        )


def remove_leftovers(folder, names=None):
    """Remove the temporary files that killed processes left in a folder.

    names: a pattern of file names that only the caller may write; their temporary files go in any
    case. Those from another machine stay, since their process may still be alive.
    """
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found = re.fullmatch(rf"(?P<target>.+){TEMPORARY}", entry.name)
            if (
                found
                and entry.is_file(follow_symlinks=False)
                and (names and re.fullmatch(names, found["target"]) or not _may_live(found))
            ):
                with suppress(OSError):  # another process was quicker
                    os.unlink(entry.path)


def _may_live(found):
    """Whether the process named in a temporary file's name may still be writing it."""
    process = int(found["process"])
    if found["host"] != HOST or os.name == "nt":  # os.kill on Windows would end the process
        return True
    if process == os.getpid():
        return found["own"] == OWN
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


@contextmanager
def replacing(path, mode="wb", **options):
    """Open a file that replaces `path` in one step if the block succeeds, and vanishes if it fails.

    It is written beside its target under a temporary name, synced, then renamed. A symbolic link
    stays one and points to the new file. Temporary files of killed processes are removed. Raises
    InputError if the folder or the disk cannot be written, or the target is not a regular file.
    """
    target, temporary = os.path.realpath(path), None
    folder = os.path.dirname(target)
    try:
        if os.path.exists(target) and not os.path.isfile(target):
            raise OSError(0, "it is a folder, a pipe or a device, not a regular file")
        os.makedirs(folder, exist_ok=True)
        if folder not in _cleared:
            _cleared.add(folder)
            remove_leftovers(folder)
        prefix = f"{os.path.basename(target)[:40]}.{HOST}-{os.getpid()}-{OWN}-"
        descriptor, temporary = tempfile.mkstemp(prefix=prefix, suffix=".tmp", dir=folder)
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
        raise InputError(
            f"{path} could not be written ({reason}): free some space or name another folder"
        ) from error
    finally:
        if temporary is not None and os.path.exists(temporary):
            os.unlink(temporary)


def _why_not_written(error):
    """The reason of a failed write in words; None if the error is of another kind."""
    if isinstance(error, RuntimeError):
        if "inline_container.cc" not in str(error):
            return None
        # torch.save's zip writer fails when it closes, because of an earlier OSError.
        error = error.__context__ if isinstance(error.__context__, OSError) else error
    return getattr(error, "strerror", None) or str(error)


def append(path, line):
    """Append a line to a text file; raises InputError if it cannot be written or is not regular."""
    check_regular(path)
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line)
    except OSError as error:
        raise InputError(
            f"{path} could not be written ({error.strerror}): name another file"
        ) from error


def check_new(path, flag):
    """Raise InputError, naming the flag, unless a folder can be made there, or an empty one is."""
    try:
        occupied = os.path.lexists(path) and not (os.path.isdir(path) and not os.listdir(path))
    except OSError:  # a folder that may not be read
        occupied = True
    if occupied:
        raise InputError(
            f"{flag} {path!r} is there and not an empty folder, and nothing in it is replaced: "
            "name a new one"
        )
    above = os.path.dirname(os.path.realpath(path))
    while not os.path.exists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above) or not os.access(above, os.W_OK):
        raise InputError(f"{flag} {path!r} cannot be written: name a folder that may be")


@contextmanager
def new_folder(path, flag):
    """Yield a temporary folder, which is renamed to `path` if the block succeeds, or else removed.

    Raises InputError as `check_new` does, and if the disk cannot be written.
    """
    check_new(path, flag)
    target = os.path.realpath(path)
    temporary = f"{target}.{OWN}.tmp"
    try:
        os.makedirs(temporary)
        yield temporary
        if os.path.isdir(target):
            os.rmdir(target)
        os.rename(temporary, target)
    except OSError as error:
        raise InputError(
            f"{flag} {path!r} could not be written ({error.strerror}): free some space or name "
            "another folder"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def hash_file(path):
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    check_regular(path)
    with open(path, "rb") as file:
        while part := file.read(HASHED_BYTES):
            digest.update(part)
    return digest.hexdigest()


def lock(folder, flag="--logger_name"):
    """Create the run folder and lock it until the process ends; return what the caller must keep.

    Temporary files of a killed run are removed; other files stay, whatever their name. Raises
    InputError, naming the flag, if another living run holds the folder; and if one of a run's files
    there is a folder, a pipe or a device, on which reading or writing would fail later or wait for
    ever.
    """
    path = os.path.join(folder, ".lock")
    try:
        os.makedirs(folder, exist_ok=True)
        for name in (".lock", "checkpoint.pth.tar", "model_best.pth.tar", "log.jsonl", "run.json"):
            check_regular(os.path.join(folder, name))
        held = open(path, "a")
    except OSError as error:
        raise InputError(
            f"{flag} {folder} cannot be written ({error.strerror}): name another folder"
        ) from error
    try:
        import fcntl  # missing on Windows, where folders are not locked

        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _keep_from_children(held)
    except ImportError:
        pass
    except BlockingIOError as error:
        held.close()
        raise InputError(
            f"{flag} {folder}: another run is writing there: wait for it, or name another folder"
        ) from error
    except OSError:
        pass  # a file system without locks
    remove_leftovers(folder, FILES)
    return held


def _keep_from_children(held):
    """Close a locked file in processes forked from now on.

    The workers of a killed run live on for some seconds. With the file open they would keep the
    lock, and the run could not be resumed.
    """
    reference = weakref.ref(held)

    def close():
        if (file := reference()) is not None:
            file.close()

    os.register_at_fork(after_in_child=close)


def check_held(held):
    """Raise InputError if a folder that `lock` locked has been deleted or moved.

    A folder of that name may by now be another run's. held: what `lock` returned; None: no folder.
    """
    if held is None:
        return
    try:
        if os.path.samestat(os.fstat(held.fileno()), os.stat(held.name)):
            return
    except FileNotFoundError:
        pass
    raise InputError(
        f"{os.path.dirname(held.name)} was deleted or moved while this run wrote to it, so "
        "nothing more is saved: put it back and go on with --resume auto, or start the run again"
    )
