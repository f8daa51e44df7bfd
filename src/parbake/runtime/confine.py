"""What a process gives up before it runs somebody else's code: the network, privileges, its user.

``python -m parbake.runtime.confine FD OPTIONS`` is a runner that has. It happens before anything large is imported:
Linux lets only a process with one thread leave its network, and libraries for numbers start threads of their own.
Nothing here concerns a model, so a runner that stands by has done it long before it is needed.
"""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Final

import msgspec
from msgspec import Struct

from parbake.errors import SettingsError

_CLONE_NEWNET: Final = 0x40000000
_CLONE_NEWUSER: Final = 0x10000000
_PR_SET_DUMPABLE: Final = 4
_PR_CAPBSET_DROP: Final = 24
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522
_MOST_CAPABILITIES: Final = 64


class Confinement(Struct, frozen=True):
    """What runners keep."""

    network: bool = False
    """Whether they see the network."""
    user: str = ""
    """Who they are; "": whoever started the server."""


class User(Struct, frozen=True):
    """Somebody with an account here."""

    name: str
    uid: int
    gid: int
    home: str


def find_user(name: str) -> User:
    """The account of that name. Raises `SettingsError` where there is none, or this process may not become it."""
    import pwd

    try:
        found = pwd.getpwnam(name)
    except KeyError as error:
        raise SettingsError(f"there is no user {name!r} here", hint="runner_user names an account") from error
    if os.geteuid() != 0:
        raise SettingsError(
            f"runners cannot be {name!r}: only a server that runs as root can start them as somebody else",
            hint="leave runner_user out, and run the server as a user of its own",
        )
    if found.pw_uid == 0:
        raise SettingsError(f"{name!r} is root, as the server is", hint="runner_user names another account")
    return User(found.pw_name, found.pw_uid, found.pw_gid, found.pw_dir)


def confine(wanted: Confinement) -> tuple[str, ...]:
    """Give up what is not wanted, for good; gives in words what this platform did not let go of.

    Raises OSError where the user cannot be changed: whoever was told to be another must not go on as root.
    """
    linux = _Linux() if sys.platform == "linux" else None
    kept: list[str] = []
    network = wanted.network
    if linux is not None:
        linux.no_new_privileges()
        # As root it needs nothing else; and whoever is no longer root could not do it this way.
        network = network or linux.leave(_CLONE_NEWNET) == ""
    if wanted.user:
        if linux is not None:
            linux.drop_bounds()
        _become(find_user(wanted.user))
        if linux is not None:
            linux.own_proc()
    if linux is None:
        if not network:
            kept.append("the network: only Linux can take it from a process")
        return tuple(kept)
    if not network and (why := linux.leave_as_nobody_special()):
        kept.append(f"the network: {why}")
    if why := linux.drop_capabilities():
        kept.append(f"capabilities: {why}")
    return tuple(kept)


def _become(user: User) -> None:
    os.initgroups(user.name, user.gid)
    os.setgid(user.gid)
    os.setuid(user.uid)
    # Caches of libraries go there; root's are closed to it.
    os.environ["HOME"] = user.home


class _Linux:
    """The system calls that Python has no names for. See the manual pages prctl(2), unshare(2), capabilities(7)."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)

    def no_new_privileges(self) -> None:
        """From now on no program that is started can do more than this one: setuid bits count for nothing."""
        self._prctl(_PR_SET_NO_NEW_PRIVS, 1)

    def leave(self, what: int) -> str:
        """Move into namespaces of our own; gives why not, or ""."""
        if self._libc.unshare(what) == 0:
            return ""
        return os.strerror(ctypes.get_errno())

    def leave_as_nobody_special(self) -> str:
        """Leave the network with a user namespace, which needs no privilege; gives why not, or ""."""
        uid, gid = os.getuid(), os.getgid()
        if why := self.leave(_CLONE_NEWUSER | _CLONE_NEWNET):
            return f"unshare: {why}"
        try:
            # In there we are who we were; only the names were lost on the way.
            for name, text in (
                ("setgroups", "deny"),
                ("gid_map", f"{gid} {gid} 1"),
                ("uid_map", f"{uid} {uid} 1"),
            ):
                descriptor = os.open(f"/proc/self/{name}", os.O_WRONLY)
                try:
                    os.write(descriptor, text.encode())
                finally:
                    os.close(descriptor)
        except OSError:
            # It sees itself as nobody then, and may do what it could before.
            return ""
        return ""

    def drop_bounds(self) -> None:
        """No program that is started can have a capability again."""
        for number in range(_MOST_CAPABILITIES):
            self._prctl(_PR_CAPBSET_DROP, number)

    def drop_capabilities(self) -> str:
        """Have none from now on, be it root or not; gives why not, or ""."""
        self.drop_bounds()
        self._prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
        header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
        nothing = (ctypes.c_uint32 * 6)()
        if self._libc.capset(header, nothing) == 0:
            return ""
        return os.strerror(ctypes.get_errno())

    def own_proc(self) -> None:
        """Have the files in /proc/self again, which a change of user gave to root."""
        self._prctl(_PR_SET_DUMPABLE, 1)

    def _prctl(self, option: int, value: int) -> None:
        self._libc.prctl(
            option, ctypes.c_ulong(value), ctypes.c_ulong(0), ctypes.c_ulong(0), ctypes.c_ulong(0)
        )


def main() -> int:
    """Entry point of a runner; gives its exit status."""
    kept = confine(msgspec.json.decode(sys.argv[2], type=Confinement))

    from parbake.runtime import runner

    return runner.main(int(sys.argv[1]), kept)


if __name__ == "__main__":
    os._exit(main())
