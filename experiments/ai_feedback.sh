#!/bin/sh
# AI feedback from end to end: SFT -> answers -> labels of a judge -> DPO on them -> win rate of the result over SFT.
#
#     sh experiments/ai_feedback.sh                     # the toy world, judged by a reward model trained here: under three minutes
#
# The same with a real model, real data and an endpoint (a server of your own, or a hosted model with NANOPREF_API_KEY):
#
#     OUT=out/rlaif RUN="torchrun --nproc_per_node=4 --" MODEL=EleutherAI/pythia-2.8b DATA=hh N=2 \
#     SFT=config/sft_hh.py DPO=config/dpo_hh.py FLAGS="--dtype=bfloat16" PROMPTS="--n_examples=20000 --split=train" \
#     JUDGE="--endpoint=https://HOST --judge_model=NAME" sh experiments/ai_feedback.sh
#
# A finished step is not done again, and a killed one goes on: run the same command.
set -eu
[ $# -eq 0 ] || { echo "error: $0 takes variables, which its first lines list, and no arguments: $*" >&2; exit 2; }
cd "$(dirname "$0")/.."
OUT=${OUT:-out/ai_feedback}      # where everything goes
RUN=${RUN:-python}               # python, or torchrun --nproc_per_node=4 --
MODEL=${MODEL:-toy}              # what SFT starts from
DATA=${DATA:-toy}                # demonstrations, prompts, and the reward model's pairs
SFT=${SFT:-config/sft_toy.py}
REWARD=${REWARD:-config/reward_toy.py}
DPO=${DPO:-config/dpo_toy.py}
FLAGS=${FLAGS:-}                 # of every training script
N=${N:-40}                       # answers to a prompt that are compared with each other (the toy world has 6 prompts)
PROMPTS=${PROMPTS:-}             # flags of sample.py for the answers to be judged
TEST=${TEST:---split=test}       # flags of sample.py for the answers that decide who wins
LENGTH=${LENGTH:-48}             # tokens of an answer
JUDGE=${JUDGE:-}                 # flags of label.py; none: a reward model trained on DATA
WIN=${WIN:-}                     # the judge of the win rate; none: gold on the toy world, else JUDGE

step() {  # a folder, the file that says it is done, and the command that makes it
    if [ -e "$OUT/$1/$2" ] && ! grep -qs '"failed": [1-9]' "$OUT/$1/$2"; then echo "== $1: done before"; else echo "== $1"; dir=$1; shift 2; "$@" --out_dir="$OUT/$dir"; fi
}
step sft model $RUN sft.py "$SFT" --model="$MODEL" --data="$DATA" $FLAGS
if [ -z "$JUDGE" ]; then
    step reward model $RUN reward.py "$REWARD" --model="$OUT/sft/model" --data="$DATA" $FLAGS
    JUDGE="--reward_model=$OUT/reward/model"
fi
[ -n "$WIN" ] || if [ "$DATA" = toy ]; then WIN=--gold=toy; else WIN=$JUDGE; fi
step answers model_outputs.json $RUN sample.py --model="$OUT/sft/model" --data="$DATA" --n="$N" --max_new_tokens="$LENGTH" $PROMPTS
step labels report.json python label.py --answers="$OUT/answers/samples.jsonl" $JUDGE
step dpo model $RUN dpo.py "$DPO" --model="$OUT/sft/model" --data="$OUT/labels/annotations.json" $FLAGS
for who in sft dpo; do
    step "test_$who" model_outputs.json $RUN sample.py --model="$OUT/$who/model" --data="$DATA" --n="$N" --seed=1 \
        --max_new_tokens="$LENGTH" $TEST
done
step wins report.json python label.py --answers="$OUT/test_dpo/samples.jsonl" --against="$OUT/test_sft/samples.jsonl" $WIN
echo "== the win rate of $OUT/dpo/model over $OUT/sft/model, with its 95% interval, is above and in $OUT/wins/report.json"
