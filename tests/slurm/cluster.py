"""A real SLURM on this machine: munged, slurmctld and some slurmd, all in one folder.

python -m tests.slurm.cluster FOLDER    starts it, says how to use it, stops it on Ctrl-C
"""

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
SBIN = ("/usr/sbin", "/usr/local/sbin")  # where Debian puts daemons, and few have it in their PATH
START_S = 30  # far beyond what it takes
GRACE_S = 60  # from the order to leave to the kill; a save takes a second here
KILL_WAIT_S = 20  # the same for scancel and the time limit
CREDENTIAL_S = 5  # a job that was requeued waits as long as a credential lives

CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire={credential_s}
SlurmUser={user}
SlurmdUser={user}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd_%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd_%n.log
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
JobRequeue=1
KillWait={kill_wait_s}
SlurmdTimeout=5
InactiveLimit=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=100000,batch_sched_delay=0
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime={grace_s} MaxTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Say why a SLURM cannot be started here; None if it can."""
    absent = [name for name in PROGRAMS if which(name) is None]
    if absent:
        return f"needs {', '.join(absent)}; tests/install_system_parts.sh installs them"
    return None


def which(program: str) -> str | None:
    return shutil.which(program, path=os.pathsep.join([os.environ["PATH"], *SBIN]))


@dataclass
class Cluster:
    """Daemons that run, and the commands that talk to them."""

    folder: Path
    nodes: tuple[str, ...] = ("n1", "n2")
    proctrack: str = "linuxproc"  # or pgid; cgroup needs rights that few containers have
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Variables under which sbatch and its like find this cluster."""
        return {**os.environ, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def start(self) -> None:
        for name in ("state", "spool", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True)
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        (self.folder / "slurm.conf").write_text(self._config())
        files = {"key": "key", "socket": "socket", "pid": "pid", "log": "log", "seed": "seed"}
        named = [f"--{word}-file={self.folder}/munge.{end}" for word, end in files.items()]
        named[1] = f"--socket={self.folder}/munge.socket"
        self._start("munged", "munged", "--foreground", "--force", *named)
        wait_until(lambda: (self.folder / "munge.socket").exists(), "munged is up")
        self._start("slurmctld", "slurmctld", "-D")
        for node in self.nodes:
            self.start_node(node)
        wait_until(lambda: self.node_states() == ["idle"] * len(self.nodes), "all nodes are idle")

    def start_node(self, name: str) -> None:
        self._start(name, "slurmd", "-D", "-N", name)

    def kill_node(self, name: str) -> None:
        """Kill the daemon of a node and all that it started, as a power failure would."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        for process in self._processes(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, 9)
        daemon.wait()

    def workers(self, name: str) -> list[int]:
        """List the processes of runs on a node."""
        return [
            process
            for process in self._processes(name)
            if b"hybrid_train\0resume" in read(process, "cmdline")
            and b"torch.distributed.run" not in read(process, "cmdline")
        ]

    def _processes(self, name: str) -> list[int]:
        """List all processes that know that they are on a node, and what SLURM has above them."""
        known = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
        mark = f"SLURMD_NODENAME={name}\0".encode()
        conf = f"SLURM_CONF={self.folder}/slurm.conf\0".encode()
        tasks = [p for p in known if mark in (text := read(p, "environ")) and conf in text]
        return [*{parent(p) for p in tasks if b"slurmstepd" in read(parent(p), "cmdline")}, *tasks]

    def stop(self) -> None:
        self.run("scancel", f"--user={user()}", check=False)
        for name in self.nodes:
            for process in self._processes(name):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, 9)
        for name in reversed(list(self._daemons)):
            daemon = self._daemons.pop(name)
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()

    def run(self, *command: str, check: bool = True) -> str:
        """Run a command of SLURM and return what it prints."""
        done = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, check=False
        )
        assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def node_states(self) -> list[str]:
        return self.run("sinfo", "--noheader", "-N", "-p", "low", "-o", "%t", check=False).split()

    def job(self, number: str) -> dict[str, str]:
        """Return what scontrol shows of a job."""
        words = self.run("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def state(self, number: str) -> str:
        return self.job(number)["JobState"]

    def _start(self, name: str, program: str, *words: str) -> None:
        path = which(program)
        assert path is not None
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [path, *words], env=self.environment, stdout=log, stderr=log, start_new_session=True
            )

    def _config(self) -> str:
        host = socket.gethostname().partition(".")[0]
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2"
            for node in self.nodes
        ]
        return CONFIG.format(
            host=host,
            folder=self.folder,
            user=user(),
            controller_port=free_port(),
            proctrack=self.proctrack,
            nodes="\n".join(lines),
            grace_s=GRACE_S,
            kill_wait_s=KILL_WAIT_S,
            credential_s=CREDENTIAL_S,
        )


def user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def read(process: int, file: str) -> bytes:
    """Return a file of a process in /proc; nothing if it is gone."""
    try:
        return Path(f"/proc/{process}/{file}").read_bytes()
    except OSError:
        return b""


def parent(process: int) -> int:
    """Return the parent of a process, 0 if it is gone."""
    fields = read(process, "stat").rpartition(b")")[2].split()
    return int(fields[1]) if fields else 0


def wait_until(happened: Callable[[], bool], what: str, timeout_s: float = START_S) -> None:
    """Poll until something is so."""
    deadline = time.monotonic() + timeout_s
    while not happened():
        assert time.monotonic() < deadline, f"after {timeout_s:.0f} s it is not so that {what}"
        time.sleep(0.2)


@contextlib.contextmanager
def running(folder: Path, proctrack: str = "linuxproc") -> Iterator[Cluster]:
    cluster = Cluster(folder, proctrack=proctrack)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


if __name__ == "__main__":
    place = Path(sys.argv[1]).absolute()
    with running(place), contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={place}/slurm.conf   # then sinfo, sbatch ...; Ctrl-C stops it")
        while True:
            time.sleep(1)
