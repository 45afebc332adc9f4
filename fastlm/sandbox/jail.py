"""Namespaces, limits and a system-call filter for `fastlm.sandbox.worker`: system calls through
ctypes, on Linux x86-64.

`enter` moves the process into namespaces of its own: a user without rights outside, no network, and
a read-only root in memory that holds the standard library and nothing else of the machine.
`drop_privileges` then sets limits, gives up all capabilities and admits only the system calls of
`ALLOWED`. Each raises `MissingFeature` with the step that the machine refuses.
"""

import ctypes
import errno
import os
import resource
import struct

NOBODY = 65534
NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000,
)  # fmt: skip
CLONE_THREAD = 0x10000
NAMESPACES = NEWNS | NEWCGROUP | NEWUTS | NEWIPC | NEWUSER | NEWPID | NEWNET | 0x80
NOSUID, NODEV, REMOUNT, RDONLY, BIND, REC, PRIVATE, DETACH = 2, 4, 32, 1, 4096, 16384, 1 << 18, 2
RECURSIVE, SET_READ_ONLY = 0x8000, 1  # of mount_setattr
NO_NEW_PRIVS, SECCOMP, DUMPABLE, DEATH_SIGNAL = 38, 22, 4, 1  # of prctl
PIVOT_ROOT, CAPSET, MOUNT_SETATTR = 155, 126, 442
WRITES = 0o3 | os.O_CREAT | os.O_TRUNC | 0o20000000  # of open: any of them can change a file
FILES_OPEN = 64
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

# System calls that a Python program and its threads need, by number (x86-64).
ALLOWED = {
    "read": 0, "write": 1, "close": 3, "stat": 4, "fstat": 5, "lstat": 6, "poll": 7, "lseek": 8,
    "mmap": 9, "mprotect": 10, "munmap": 11, "brk": 12, "rt_sigaction": 13, "rt_sigprocmask": 14,
    "rt_sigreturn": 15, "ioctl": 16, "pread64": 17, "pwrite64": 18, "readv": 19, "writev": 20,
    "access": 21, "pipe": 22, "select": 23, "sched_yield": 24, "mremap": 25, "madvise": 28,
    "dup": 32, "dup2": 33, "pause": 34, "nanosleep": 35, "getitimer": 36, "alarm": 37,
    "setitimer": 38, "getpid": 39, "sendto": 44, "recvfrom": 45, "shutdown": 48,
    "exit": 60, "wait4": 61, "uname": 63, "fcntl": 72, "flock": 73, "fsync": 74, "fdatasync": 75,
    "getcwd": 79, "chdir": 80, "fchdir": 81, "readlink": 89, "gettimeofday": 96, "getrlimit": 97,
    "getrusage": 98, "sysinfo": 99, "times": 100, "getuid": 102, "getgid": 104, "geteuid": 107,
    "getegid": 108, "getppid": 110, "rt_sigpending": 127, "sigaltstack": 131, "gettid": 186,
    "time": 201, "futex": 202, "sched_getaffinity": 204, "getdents64": 217, "set_tid_address": 218,
    "restart_syscall": 219, "clock_gettime": 228, "clock_getres": 229, "clock_nanosleep": 230,
    "exit_group": 231, "epoll_wait": 232, "epoll_ctl": 233, "newfstatat": 262, "readlinkat": 267,
    "faccessat": 269, "pselect6": 270, "ppoll": 271, "set_robust_list": 273, "epoll_pwait": 281,
    "eventfd2": 290, "epoll_create1": 291, "dup3": 292, "pipe2": 293, "getrandom": 318,
    "membarrier": 324, "statx": 332, "rseq": 334, "faccessat2": 439,
}  # fmt: skip
# These change files: admitted only if all writable files are the program's own.
WRITING = {
    "open": 2, "truncate": 76, "ftruncate": 77, "rename": 82, "mkdir": 83, "rmdir": 84, "creat": 85,
    "link": 86, "unlink": 87, "symlink": 88, "chmod": 90, "fchmod": 91, "utime": 132,
    "mkdirat": 258, "unlinkat": 263, "renameat": 264, "linkat": 265, "symlinkat": 266,
    "fchmodat": 268, "utimensat": 280, "fallocate": 285, "renameat2": 316, "copy_file_range": 326,
}  # fmt: skip
# These fail with "not permitted", all others with "not implemented".
REFUSED = {
    "clone": 56, "fork": 57, "vfork": 58, "execve": 59, "execveat": 322, "kill": 62, "tkill": 200,
    "socket": 41, "connect": 42, "bind": 49, "ptrace": 101, "process_vm_readv": 310,
    "process_vm_writev": 311, "pidfd_open": 434, "mount": 165, "unshare": 272, "setns": 308,
    "chroot": 161,
}  # fmt: skip
OPENAT, CLONE, PRLIMIT, TGKILL, SOCKETPAIR = 257, 56, 302, 234, 53

_libc = ctypes.CDLL(None, use_errno=True)


class MissingFeature(Exception):
    """Raised for a feature that this machine lacks, with the step that failed."""


def enter(library: str) -> None:
    """Move this process into namespaces with a root of ``library``, read-only, and a ``/tmp``.

    `isolate_child` gives children their own process namespace.
    """
    proc = os.open("/proc", os.O_PATH)
    if os.geteuid() == 0:  # first, while it can still read a library below /root
        unshare("a mount namespace", NEWNS)
        _new_root(library)
        become_nobody()
        _new_user(proc)
    else:
        _new_user(proc)
        _new_root(library)
    os.close(proc)


def _new_user(proc: int) -> None:
    user, group = os.geteuid(), os.getegid()
    unshare("a user namespace", NEWUSER | NEWNS | NEWNET | NEWIPC | NEWUTS | NEWCGROUP)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        try:
            file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
            os.write(file, text.encode())
            os.close(file)
        except OSError as error:
            raise MissingFeature(f"a user namespace ({name}: {error.strerror})") from None


def _new_root(library: str) -> None:
    masked = [os.path.join(library, name) for name in ("site-packages", "dist-packages")]
    masked = [path for path in masked if os.path.isdir(path)]
    mount(None, "/", None, REC | PRIVATE)
    descriptors = {
        path: os.open(path, os.O_PATH) for path in [library, *DEVICES]
    }  # /tmp may hold it
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, "mode=755,size=1m")
    for path, fd in descriptors.items():
        target = "/tmp" + path
        if path == library:
            os.makedirs(target)
        else:
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.close(os.open(target, os.O_CREAT | os.O_WRONLY, 0o666))
        mount(f"/proc/self/fd/{fd}", target, None, BIND | REC)
        os.close(fd)
    for path in masked:
        mount("tmpfs", "/tmp" + path, "tmpfs", NOSUID | NODEV, "mode=755,size=4k")
    os.makedirs("/tmp/tmp", exist_ok=True)
    os.chdir("/tmp")
    _check_call("private root: pivot_root", _libc.syscall(PIVOT_ROOT, b".", b"."))
    _check_call("private root: umount", _libc.umount2(b".", DETACH))
    os.chdir("/")
    read_only = struct.pack("4Q", SET_READ_ONLY, 0, 0, 0)
    done = _libc.syscall(MOUNT_SETATTR, -100, b"/", RECURSIVE, read_only, len(read_only))
    _check_call("a read-only root: mount_setattr (Linux 5.12)", done)


def isolate_child(disk: int) -> None:
    """Give the next child its own process namespace and an empty ``/tmp`` of ``disk`` bytes."""
    unshare("a process namespace", NEWPID | NEWNS)
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, f"mode=777,size={disk},nr_inodes=1024")
    os.chdir("/tmp")


def become_nobody() -> None:
    """Become the user nobody if the process is root: limits on processes do not apply to root."""
    if os.geteuid() == 0:
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        except OSError as error:
            raise MissingFeature(f"a user without rights (setresuid: {error.strerror})") from None
        _libc.prctl(DUMPABLE, 1, 0, 0, 0)  # otherwise its /proc files belong to root


def unshare(feature: str, flags: int) -> None:
    _check_call(f"{feature}: unshare", _libc.unshare(flags))


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    texts = [None if text is None else text.encode() for text in (source, target, kind)]
    done = _libc.mount(*texts, ctypes.c_ulong(flags), data.encode())
    _check_call(f"private root: mount of {target}", done)


def die_with_parent() -> None:
    _libc.prctl(DEATH_SIGNAL, 9, 0, 0, 0)


def drop_privileges(memory: int, seconds: int, file: int, threads: int, isolated: bool) -> None:
    """Set limits, and permanently give up capabilities and all calls that are not `ALLOWED`."""
    limits = {
        resource.RLIMIT_AS: memory,
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_FSIZE: file if isolated else 0,
        resource.RLIMIT_NOFILE: FILES_OPEN,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if isolated:  # counted in the user namespace: worker, its child, this process, the tests
        limits[resource.RLIMIT_NPROC] = 4 + threads
    for name, value in limits.items():
        hard = resource.getrlimit(name)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))
    no_capabilities = struct.pack("6I", 0, 0, 0, 0, 0, 0)
    header = struct.pack("Ii", 0x20080522, 0)
    _check_call("capabilities: capset", _libc.syscall(CAPSET, header, no_capabilities))
    _check_call("no_new_privs", _libc.prctl(NO_NEW_PRIVS, 1, 0, 0, 0))
    install_filter(isolated)


def install_filter(isolated: bool) -> None:
    """Install the filter of system calls.

    Threads are admitted only if the namespace counts them. Opening a file for writing is admitted
    only if all writable files are the program's own.
    """
    rules: dict[int, tuple[int, int, int] | None] = dict.fromkeys(ALLOWED.values())
    rules[TGKILL] = (0, 0xFFFFFFFF, os.getpid())  # abort() signals itself
    rules[PRLIMIT] = (0, 0xFFFFFFFF, 0)
    rules[SOCKETPAIR] = (0, 0xFFFFFFFF, 1)  # AF_UNIX; asyncio wakes itself by one
    if isolated:
        rules.update(dict.fromkeys([*WRITING.values(), OPENAT]))
        rules[CLONE] = (0, CLONE_THREAD | NAMESPACES, CLONE_THREAD)
    else:
        rules[OPENAT] = (2, WRITES, 0)
    program = assemble_bpf(rules, [nr for nr in REFUSED.values() if nr not in rules])
    buffer = ctypes.create_string_buffer(program)
    fprog = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    _check_call("a filter of system calls: seccomp", _libc.prctl(SECCOMP, 2, fprog, 0, 0))


def assemble_bpf(rules: dict[int, tuple[int, int, int] | None], refused: list[int]) -> bytes:
    """Return a BPF program that admits calls in ``rules`` if (argument, mask, value) matches."""
    load, mask, jump_equal, jump_at_least, give = 0x20, 0x54, 0x15, 0x35, 0x06
    allow, kill, fail = 0x7FFF0000, 0x80000000, 0x00050000

    def step(code: int, value: int, true: int = 0, false: int = 0) -> bytes:
        return struct.pack("HBBI", code, true, false, value)

    lines = [
        step(load, 4),  # the architecture
        step(jump_equal, 0xC000003E, 1, 0),  # x86-64
        step(give, kill),
        step(load, 0),  # the number of the call
        step(jump_at_least, 0x40000000, 0, 1),  # the x32 calls
        step(give, kill),
    ]
    for number, condition in rules.items():
        if condition is None:
            lines += [step(jump_equal, number, 0, 1), step(give, allow)]
            continue
        argument, bits, value = condition
        lines += [
            step(jump_equal, number, 0, 5),
            step(load, 16 + 8 * argument),  # its low half; flags and process ids have 32 bits
            step(mask, bits),
            step(jump_equal, value, 0, 1),
            step(give, allow),
            step(give, fail | errno.EPERM),
        ]
    for number in refused:
        lines += [step(jump_equal, number, 0, 1), step(give, fail | errno.EPERM)]
    return b"".join([*lines, step(give, fail | errno.ENOSYS)])


def _check_call(step: str, result: int) -> None:
    if result != 0:
        raise MissingFeature(f"{step}: {os.strerror(ctypes.get_errno())}")
