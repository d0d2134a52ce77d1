#!/usr/bin/env bash
# Several machines under Slurm: one torchrun a node; they find one another through a port of the first node. From the repository:
#
#     sbatch --nodes=2 --gpus-per-node=4 experiments/slurm.sh dpo.py config/drdpo_hh.py --save_every=9984
#
# Two minutes before the time is up Slurm sends SIGUSR1. The script then saves, and ends with SAVED; the job goes back into the
# queue, and the same command goes on from that checkpoint. A run that ends by itself ends the job, with its exit code.
# out_dir must lie on a file system that all nodes see. Not tried on a cluster; tests/parts/test_slurm.py plays Slurm.
#SBATCH --job-name=nanopref
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --output=slurm-%j.log
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --requeue
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0" >&2; exit 2; }
if [ $# -eq 0 ] || [ -z "${SLURM_JOB_NODELIST:-}" ]; then
    echo 'error: give it to Slurm, with a script and its options: sbatch experiments/slurm.sh dpo.py config/drdpo_hh.py' >&2
    exit 2
fi
set -u

SAVED=75   # the exit code of a training script that was told to stop and has saved
FAILED=1   # what torchrun makes of any exit code of its workers that is not 0
PER_NODE=${PER_NODE:-${SLURM_GPUS_ON_NODE:-1}}   # processes on each node
PORT=${PORT:-$((20000 + SLURM_JOB_ID % 20000))}
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

if [ -f .venv/bin/activate ]; then source .venv/bin/activate; fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # torch 2.13: else a node that comes back does not find the others

# torchrun itself must outlive the signal that is meant for its workers: a signal that bash ignores stays ignored in it, while
# a training script puts its own handler in place
srun --kill-on-bad-exit=1 bash -c 'trap "" USR1; exec torchrun "$@"' torchrun --nnodes="$SLURM_NNODES" \
    --nproc_per_node="$PER_NODE" --rdzv_backend=c10d --rdzv_id="$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" \
    --rdzv_endpoint="$FIRST:$PORT" "$@" &
step=$!
stopped=0
trap 'stopped=1; scancel --signal=USR1 "$SLURM_JOB_ID.0"' USR1
trap 'kill -TERM $step' TERM

wait $step
code=$?
while kill -0 $step 2>/dev/null; do  # a signal ends wait before the step has ended
    wait $step
    code=$?
done
if [ $stopped -eq 1 ] && { [ $code -eq $SAVED ] || [ $code -eq $FAILED ]; }; then
    echo "time is up: job $SLURM_JOB_ID goes back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
