#!/usr/bin/env bash
# Ra-DPO (2505.20359) on HH with Pythia-2.8B, beside DPO and TDPO: accuracy, KL on held-out answers, win rates. Its claim: DPO's
# accuracy or more, at a lower KL than TDPO. All at the learning rate of config/radpo2_hh.py.
#     JUDGE=https://HOST JUDGE_MODEL=NAME experiments/papers/radpo_hh.sh     on all GPUs of this machine
#     LOSSES='dpo radpo2' JUDGE=none experiments/papers/radpo_hh.sh          two of the rows, no judge
#     DRY=1 experiments/papers/radpo_hh.sh                                   each step here, with stand-ins; paper.sh has all options
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0" >&2; exit 2; }
source "$(dirname "$0")/paper.sh"
train sft.py sft_hh sft "--data=$HH_DATA" ${MODEL[@]+"${MODEL[@]}"}
chosen
for loss in ${LOSSES:-dpo tdpo1 tdpo2 radpo1 radpo2}; do
    hh radpo2_hh "$loss" --loss=$loss
done
row
