"""What a cluster's daemons read: slurm.conf, gres.conf, a key, a hosts file, and devices that stand for GPUs."""

from __future__ import annotations

import os
import secrets
import stat
from dataclasses import dataclass
from pathlib import Path

LONGEST_FOLDER = 80
"""Characters: the path of a socket in it may have 107."""

SLURM_CONF = """\
ClusterName=convoy
SlurmctldHost=controller({controller})
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A requeued job is held back until its credential has expired: 120 s if nothing is said.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/%n.log
JobCompType=jobcomp/filetxt
JobCompLoc={folder}/log/jobs
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
MailProg=/bin/true
# The nodes have the CPUs that are claimed here, not those of the machine.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
# A job is started when it is submitted, not some seconds later.
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
FirstJobId={first_job_id}
JobRequeue=1
KillWait=15
SlurmdTimeout=10
MinJobAge=300
ReturnToService=2
GresTypes=gpu
"""
NODE = "NodeName={name} NodeHostname={name} NodeAddr={address} Port={port} CPUs={cpus} RealMemory=4000{gres}\n"
PARTITIONS = """\
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""


@dataclass(frozen=True)
class Configuration:
    """Of one cluster. `ports` are the controller's and one for each node."""

    ports: list[int]
    cpus: int
    gpus: int
    first_job_id: int | None
    separate_networks: bool

    @property
    def nodes(self) -> list[str]:
        return [f"n{i}" for i in range(1, len(self.ports))]

    @property
    def addresses(self) -> dict[str, str]:
        """Each has one of its own, so that no node takes another's name for its own."""
        network = "10.77.0" if self.separate_networks else "127.0.1"
        return {"controller": f"{network}.100"} | {name: f"{network}.{i}" for i, name in enumerate(self.nodes, 1)}

    def write(self, folder: Path) -> None:
        assert len(str(folder)) <= LONGEST_FOLDER, f"too long for the sockets in it: {folder}"
        folder.chmod(0o755)  # munged refuses a socket that not everybody can reach
        for name in ("etc", "log", "state", "spool", "networks", "dev"):
            (folder / name).mkdir()
        (folder / "etc" / "slurm.conf").write_text(self._slurm_conf(folder))
        (folder / "etc" / "gres.conf").write_text(self._gres_conf(folder))
        hosts = [f"{address} {name}\n" for name, address in self.addresses.items()]
        (folder / "hosts").write_text("".join(hosts) + Path("/etc/hosts").read_text())
        (folder / "munge.key").write_bytes(secrets.token_bytes(128))
        (folder / "munge.key").chmod(0o600)

    def _slurm_conf(self, folder: Path) -> str:
        # So that two clusters' jobs have different ids, and what is derived from these, like a port, differs, too.
        first_job_id = self.first_job_id or 100 * self.ports[0]
        general = SLURM_CONF.format(
            folder=folder,
            controller=self.addresses["controller"],
            controller_port=self.ports[0],
            first_job_id=first_job_id,
        )
        gres = f" Gres=gpu:{self.gpus}" if self.gpus else ""
        nodes = (
            NODE.format(name=name, address=self.addresses[name], port=port, cpus=self.cpus, gres=gres)
            for name, port in zip(self.nodes, self.ports[1:], strict=True)
        )
        return general + "".join(nodes) + PARTITIONS

    def _gres_conf(self, folder: Path) -> str:
        """Only with devices are concurrent jobs told apart by CUDA_VISIBLE_DEVICES; these are all /dev/null."""
        for i in range(self.gpus):
            device = folder / "dev" / f"nvidia{i}"
            os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        if not self.gpus:
            return ""
        return f"NodeName=n[1-{len(self.nodes)}] Name=gpu File={folder}/dev/nvidia[0-{self.gpus - 1}] AutoDetect=off\n"
