"""That gloo's threads yield: those that wait for sockets under no name of their own."""

import subprocess
import sys

import pytest

SCRIPT = """
import os, platform, select, threading, time, _thread
from txcore.launch.gloo_threads import _EPOLL, yield_to_compute

tids = {}

def wait_for_sockets(name):
    tids[name] = threading.get_native_id()
    if name == "named":
        open(f"/proc/self/task/{tids[name]}/comm", "w").write("event_engine")
    select.epoll().poll(60)

def sleep(name):
    tids[name] = threading.get_native_id()
    time.sleep(60)

_thread.start_new_thread(wait_for_sockets, ("gloo",))
_thread.start_new_thread(wait_for_sockets, ("named",))
_thread.start_new_thread(sleep, ("asleep",))

def call_of(name):
    if name in tids:
        return open(f"/proc/self/task/{tids[name]}/syscall").read().split()[0]

epoll = [str(number) for number in _EPOLL[platform.machine()]]
while call_of("gloo") not in epoll or call_of("named") not in epoll or "asleep" not in tids:
    time.sleep(0.01)
lowered = yield_to_compute()
assert tids["gloo"] in lowered, (tids, lowered)
assert lowered is yield_to_compute()  # once a process
for name, tid in {**tids, "main": os.getpid()}.items():
    print(name, os.sched_getscheduler(tid) == os.SCHED_IDLE)
os._exit(0)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="thread classes are Linux's")
def test_only_unnamed_threads_that_wait_for_sockets_yield():
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60)

    assert run.returncode == 0, run.stderr
    told = dict(line.split() for line in run.stdout.splitlines())
    assert told == {"gloo": "True", "named": "False", "asleep": "False", "main": "False"}


def test_no_thread_yields_where_the_system_does_not_tell(monkeypatch):
    from txcore.launch import gloo_threads

    monkeypatch.setattr(gloo_threads.platform, "machine", lambda: "unknown")
    assert gloo_threads.yield_to_compute.__wrapped__() == ()
