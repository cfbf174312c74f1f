"""The watchdog: a process that hangs ends with its stack; signals are heard at once."""

import subprocess
import sys
import textwrap

from tests.jobs.command import ROOT


def run(body: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own: what hangs must not hang the tests."""
    program = textwrap.dedent("""
        import hashlib, signal, sys, threading, time
        from hybrid_train.runtime import heartbeat
        from hybrid_train.runtime.heartbeat import Watchdog
        said = []
        def hang(seen):
            beat = seen.beat
            print("hang", beat.step, beat.part, seen.waits, seen.stack, flush=True)
        def told(number, seen): print("told", number.name, seen.beat.part, flush=True)
        def tick(): said.append(1)
    """) + textwrap.dedent(body)
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=60
    )


def test_silence_ends_the_process_with_its_stack() -> None:
    ended = run("""
        def read_forever():
            time.sleep(60)
        with Watchdog(0.5, hang, told, tick):
            heartbeat.enter("data", 12)
            read_forever()
    """)
    assert ended.returncode == 75
    assert ended.stdout.startswith("hang 12 data False")
    assert "in read_forever" in ended.stdout


def test_signs_of_life_keep_it_alive() -> None:
    ended = run("""
        with Watchdog(1.0, hang, told, tick, tick_s=0.1):
            for step in range(30):
                heartbeat.enter("data", step)
                time.sleep(0.1)
        print("done", len(said) > 3)
    """)
    assert (ended.returncode, ended.stdout) == (0, "done True\n"), ended.stderr


def test_a_signal_is_heard_while_the_main_thread_is_busy_in_c() -> None:
    # Without Python bytecode no handler runs; other threads do, as they do beside a collective.
    ended = run("""
        signal.signal(signal.SIGTERM, lambda *_: print("handler", flush=True))
        with Watchdog(0, hang, told, tick):
            heartbeat.enter("reduce", 3)
            threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGTERM)).start()
            hashlib.pbkdf2_hmac("sha256", b"a", b"b", 3_000_000)  # one call into C, for a second
            print("main", flush=True)
    """)
    lines = ended.stdout.split("\n")
    assert lines.index("told SIGTERM reduce") < lines.index("handler")


def test_what_handled_wakeups_before_is_put_back() -> None:
    ended = run("""
        with Watchdog(0, hang, told, tick):
            pass
        print(signal.set_wakeup_fd(-1), threading.active_count())
    """)
    assert ended.stdout == "-1 1\n"
