#!/usr/bin/env bash
# Dr. DPO (2407.07880), table 1: accuracy on HH's test split after training with 0 to 40% of the labels flipped, DPO and Dr. DPO
# (there: DPO 63.6 -> 55.2%, Dr. DPO 66.2 -> 58.8%), with Pythia-2.8B; and win rates against the chosen answers.
#     JUDGE=https://HOST JUDGE_MODEL=NAME experiments/papers/drdpo_hh.sh     on all GPUs of this machine
#     FLIPS='0 0.2' JUDGE=none experiments/papers/drdpo_hh.sh                two columns of the table, no judge
#     DRY=1 experiments/papers/drdpo_hh.sh                                   each step here, with stand-ins; paper.sh has all options
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0" >&2; exit 2; }
source "$(dirname "$0")/paper.sh"
train sft.py sft_hh sft "--data=$HH_DATA" ${MODEL[@]+"${MODEL[@]}"}
chosen
for flips in ${FLIPS:-0 0.1 0.2 0.3 0.4}; do
    for loss in dpo drdpo; do
        hh drdpo_hh "$loss-$flips" --loss=$loss "--noise_rate=$flips"
    done
done
row
