#!/usr/bin/env bash
# beta-DPO (2407.08639) on HH with Pythia-2.8B, beside DPO, at two betas: win rates against the chosen answers, and accuracy.
# Its claim: more wins than DPO, and less that depends on beta.
#     JUDGE=https://HOST JUDGE_MODEL=NAME experiments/papers/beta_dpo_hh.sh   on all GPUs of this machine
#     BETAS=0.1 JUDGE=none experiments/papers/beta_dpo_hh.sh                  one beta, no judge
#     DRY=1 experiments/papers/beta_dpo_hh.sh                                 each step here, with stand-ins; paper.sh has all options
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0" >&2; exit 2; }
source "$(dirname "$0")/paper.sh"
train sft.py sft_hh sft "--data=$HH_DATA" ${MODEL[@]+"${MODEL[@]}"}
chosen
for beta in ${BETAS:-0.1 0.5}; do
    hh dpo_hh "dpo-$beta" "--beta=$beta"
    hh beta_dpo_hh "beta_dpo-$beta" "--beta=$beta"
done
row
