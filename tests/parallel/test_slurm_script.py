"""configs/launch/slurm.sbatch under stand-ins for SLURM's commands, which fail with the messages of the real ones."""

import os
import shlex
import stat
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Each call of `dsv3 run` takes the next line of `plan`: exit code, step of the checkpoint that it leaves, message.
SRUN = """#!/usr/bin/env bash
echo "srun $*" >> calls
case "$*" in
  *" doctor "*) cat check >&2; [[ ! -s check ]]; exit ;;
esac
IFS='|' read -r code step message < plan
sed -i 1d plan
[[ -n $step ]] && mkdir -p "runs/nano/checkpoints/step=$step.ckpt"
echo "output of the run"
[[ -n $message ]] && printf '%b' "$message" >&2
exit "$code"
"""
SCONTROL = """#!/usr/bin/env bash
if [[ $1 == show ]]; then printf 'n%s\\n' 1 2 3; else echo "scontrol $*" >> calls; fi
"""
SBATCH = '#!/usr/bin/env bash\necho "sbatch $*" >> calls\n'
DSV3 = f'#!/usr/bin/env bash\nexec {shlex.quote(sys.executable)} -m dsv3_lightning "$@"\n'
ABORTED = (
    "srun: error: {node}: task 9: Aborted (core dumped)\\nsrun: Terminating StepId=4711.0\\n"
    "slurmstepd: error: *** STEP 4711.0 ON n1 CANCELLED AT 2026-11-28T10:00:00 ***\\n"
    "srun: error: n1: tasks 0-7: Killed\\n"
)
LOST = (
    "srun: error: Node failure on n3\\nsrun: Job step aborted: Waiting up to 32 seconds for job step to finish.\\n"
    "slurmstepd: error: *** STEP 4711.0 ON n1 CANCELLED AT 2026-11-28T10:00:00 DUE TO NODE FAILURE, SEE SLURMCTLD "
    "LOG FOR DETAILS ***\\n"
)


class Job:
    """A job of 3 nodes with 8 tasks each, in a folder of its own."""

    def __init__(self, folder):
        self.folder = folder
        for name, text in {"srun": SRUN, "scontrol": SCONTROL, "sbatch": SBATCH, "dsv3": DSV3}.items():
            path = folder / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def start(self, *plan, check="", **environment):
        (self.folder / "plan").write_text("".join(f"{line}\n" for line in plan))
        (self.folder / "check").write_text(check)
        slurm = {"SLURM_JOB_ID": "4711", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_NUM_NODES": "3",
                 "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_PARTITION": "gpu", "SLURM_CPUS_PER_TASK": "8"}  # fmt: skip
        return subprocess.run(
            ["bash", str(ROOT / "configs/launch/slurm.sbatch"), "nano"], cwd=self.folder, text=True,
            capture_output=True, timeout=60, env=os.environ | slurm | environment
            | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def calls(self, program):
        lines = (self.folder / "calls").read_text().splitlines()
        return [line for line in lines if line.startswith(program) and " doctor " not in line]

    def state(self):
        path = self.folder / "dsv3-4711.state"
        return path.read_text() if path.exists() else None


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


def test_success_ends_the_job_and_leaves_no_state(job):
    done = job.start("0|4|")
    assert done.returncode == 0 and "output of the run" in done.stdout
    assert job.calls("srun") == [
        "srun --kill-on-bad-exit=1 dsv3 run nano trainer.devices=8 trainer.num_nodes=3",
    ]
    assert not job.calls("scontrol") and not job.calls("sbatch") and job.state() is None


def test_a_crash_is_tried_again_as_long_as_checkpoints_get_newer(job):
    done = job.start(*(f"134|{step}|" for step in (10, 20, 30, 40, 50)), "0|60|")
    assert done.returncode == 0 and len(job.calls("srun")) == 6
    assert "exit code 134; starting again from step 50 (failure 0 of 3 without a newer checkpoint)" in done.stderr


def test_three_failures_in_a_row_without_a_newer_checkpoint_are_the_end(job):
    done = job.start("134|10|", "137||", "134||", "1||", "0||")
    assert done.returncode == 1 and len(job.calls("srun")) == 4
    assert "stopped: 3 failures in a row without a checkpoint newer than step 10 (exit code 1)" in done.stderr


def test_checkpoints_from_before_the_job_are_no_progress(job):
    (job.folder / "runs/nano/checkpoints/step=500.ckpt").mkdir(parents=True)
    (job.folder / "runs/nano/checkpoints/step=600.ckpt.new").mkdir()  # was never finished
    done = job.start("134||", "134||", "134||", "0||")
    assert done.returncode == 134 and "newer than step 500" in done.stderr


@pytest.mark.parametrize("code", [143, 138])
def test_preemption_queues_the_job_again(job, code):
    done = job.start(f"{code}|10|")
    assert done.returncode == code and job.calls("scontrol") == ["scontrol requeue 4711"]
    assert len(job.calls("srun")) == 1


def test_a_job_that_is_stopped_before_each_checkpoint_is_not_queued_for_ever(job):
    codes = [job.start("143||").returncode for _ in range(3)]
    assert codes == [143] * 3 and len(job.calls("scontrol")) == 2


def test_a_mistake_in_the_settings_is_not_tried_again(job):
    message = "srun: error: n1: task 0: Exited with exit code 2\\nsrun: error: n2: tasks 8-15: Killed\\n"
    done = job.start(f"137||{message}", "0||")
    assert done.returncode == 2 and len(job.calls("srun")) == 1


def test_a_spare_takes_the_place_of_the_node_that_failed_first(job):
    done = job.start("134||" + ABORTED.format(node="n2"), "0|10|", SPARES="1")
    assert done.returncode == 0 and "leaving out n2" in done.stderr and "leaving out n1" not in done.stderr
    words = "dsv3 run nano trainer.devices=8 trainer.num_nodes=2"
    assert job.calls("srun") == [
        f"srun --kill-on-bad-exit=1 --nodes=2 --ntasks=16 {words}",
        f"srun --kill-on-bad-exit=1 --nodes=2 --ntasks=16 --exclude=n2 {words}",
    ]


def test_without_a_spare_a_node_that_fails_first_twice_is_excluded_from_a_new_job(job):
    done = job.start(*["134||" + ABORTED.format(node="n2")] * 2, "0||")
    assert done.returncode == 1 and len(job.calls("srun")) == 2
    (submitted,) = job.calls("sbatch")
    assert submitted.endswith(f"{ROOT / 'configs/launch/slurm.sbatch'} nano")
    for option in ("--dependency=afterany:4711", "--exclude=n2", "--nodes=3", "--partition=gpu"):
        assert option in submitted


def test_a_node_that_slurm_reports_as_lost_is_left_out_at_once(job):
    done = job.start("137||" + LOST, "0|10|", SPARES="1")
    assert done.returncode == 0 and "--exclude=n3" in job.calls("srun")[1]


def test_a_node_that_fails_the_test_is_left_out_before_the_start(job):
    done = job.start("0|1|", check="n2: device 3: not done in time\nsrun: error: n2: task 1: Exited with exit code 1\n",
                     SPARES="1")  # fmt: skip
    assert done.returncode == 0 and "leaving out n2" in done.stderr
    assert "--exclude=n2" in job.calls("srun")[0]


def test_if_every_node_fails_the_test_it_is_not_the_nodes(job):
    done = job.start(
        "0||", check="".join(f"srun: error: n{n}: task {n}: Exited with exit code 127\n" for n in (1, 2, 3))
    )
    assert done.returncode == 1 and "every node failed the test" in done.stderr
    assert not job.calls("srun") and not job.calls("sbatch")


def test_nodes_left_out_stay_so_when_the_job_is_queued_again(job):
    job.start("134|10|" + ABORTED.format(node="n2"), "143|20|", SPARES="1")
    done = job.start("0|30|", SPARES="1")
    assert done.returncode == 0 and "--exclude=n2" in job.calls("srun")[-1]
