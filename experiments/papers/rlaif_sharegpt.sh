#!/usr/bin/env bash
# DPO on AI feedback (2402.12366) with Llama-2-7B: SFT on a tenth of ShareGPT; two answers of it to each of 20,000 prompts; a judge
# labels them; DPO on the labels; AlpacaEval's instructions answered before and after, and judged against each other. Its finding:
# much of what feedback brings, SFT on a stronger teacher's answers brings, too. alpaca_eval takes model_outputs.json for its own score.
#     JUDGE=https://HOST JUDGE_MODEL=NAME experiments/papers/rlaif_sharegpt.sh    on all GPUs of this machine
#     DRY=1 experiments/papers/rlaif_sharegpt.sh                                  each step here, with stand-ins; paper.sh has all options
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0" >&2; exit 2; }
source "$(dirname "$0")/paper.sh"
if [ "$JUDGE" = none ]; then
    echo 'error: here the judge makes the training data: set JUDGE and JUDGE_MODEL' >&2
    exit 2
fi
train sft.py sft_sharegpt sft "--data=$SHAREGPT_DATA" ${MODEL[@]+"${MODEL[@]}"}
answers sft sampled "--data=$SHAREGPT_DATA" --split=train --n=2 "--n_examples=$N_SAMPLED"
step "$OUT/labels/report.json" "$PYTHON" label.py "--answers=$OUT/sft/sampled/samples.jsonl" "--endpoint=$JUDGE" \
    "--judge_model=$JUDGE_MODEL" "--out_dir=$OUT/labels"
train dpo.py rlaif_sharegpt dpo "--model=$OUT/sft/model" "--data=$OUT/labels/annotations.json"
for name in sft dpo; do
    answers $name answers "--data=$EVAL_DATA" "--n_examples=$((N_TEST < 805 ? N_TEST : 805))" --temperature=0.7
done
judge dpo "--against=$OUT/sft/answers/samples.jsonl"
row
