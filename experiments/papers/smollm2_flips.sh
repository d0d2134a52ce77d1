#!/usr/bin/env bash
# Dr. DPO's claim with a pretrained model and real pairs, on one GPU: SmolLM2-135M on HH harmless-base, {DPO, Dr. DPO, DPO at beta / 4} x
# {0, 20, 40%} flipped labels x five seeds, each with its own SFT model. Equal beta and learning rate; accuracy on all held-out pairs.
#     experiments/papers/smollm2_flips.sh                          resumable: a run whose result is there is skipped
#     LR=1e-5 OUT=out/flips_1e-5 experiments/papers/smollm2_flips.sh
#     DRY=1 MODEL=FOLDER HH=FILE experiments/papers/smollm2_flips.sh    32 pairs, 2 steps, one seed, on this machine's CPU
#     PRINT=1 experiments/papers/smollm2_flips.sh                  only print the commands
# By FLOPs this is half an hour of an H200; a model of this size waits for its host, so expect 2 to 2.5 minutes a run, 1.5 to 2 hours in all.
# What a run leaves is $OUT/results/NAME.jsonl (its metrics) and .config.json; its model goes. The table is written after every seed.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0" >&2; exit 2; }
[ $# -eq 0 ] || { echo "error: $0 takes variables, which its first lines list, and no arguments: $*" >&2; exit 2; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python} PRINT=${PRINT:-0} DRY=${DRY:-0}
MODEL=${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}
DATA=hh_harmless
[ -z "${HH:-}" ] || DATA=hh:$HH
BETA=${BETA:-0.1} LR=${LR:-5e-6}
SHARED=(--batch_size=64 --max_length=512 --max_prompt_length=256 --dtype=bfloat16 --warmup_steps=20)
N_TEST=100000  # all there are
if [ "$DRY" = 1 ]; then
    OUT=${OUT:-out/smollm2_flips_dry} SEEDS=${SEEDS:-1} FLIPS=${FLIPS:-0 0.2 0.4} N_TEST=8
    SHARED=(--batch_size=16 --n_examples=32 --max_length=96 --max_prompt_length=48 --dtype=float32 --warmup_steps=1)
fi
OUT=${OUT:-out/smollm2_flips} SEEDS=${SEEDS:-1 2 3 4 5} FLIPS=${FLIPS:-0 0.2 0.4}
# the authors' noise runs cut prompts at the end
SHARED+=("--data=$DATA" --truncation=end "--n_eval_examples=$N_TEST" --eval_every=none)
export NANOPREF_CACHE=${NANOPREF_CACHE:-$OUT/cache}

# train NAME SCRIPT OPTIONS...: into $OUT/NAME, unless $OUT/results/NAME.jsonl is there
train() {
    local name=$1
    shift
    [ ! -e "$OUT/results/$name.jsonl" ] || { echo "# done: $name"; return; }
    echo "\$ $PYTHON $* --out_dir=$OUT/$name"
    [ "$PRINT" = 0 ] || return 0
    "$PYTHON" "$@" "--out_dir=$OUT/$name"
    mkdir -p "$OUT/results"
    cp "$OUT/$name/config.json" "$OUT/results/$name.config.json"
    mv "$OUT/$name/metrics.jsonl" "$OUT/results/$name.jsonl"
}

grep -A 2 "^smollm2_flips: " experiments/papers/expected.txt
for seed in $SEEDS; do
    train "sft-$seed" sft.py "--model=$MODEL" "--seed=$seed" --lr=1e-5 "${SHARED[@]}"
    for flips in $FLIPS; do
        for method in dpo drdpo quarter; do
            loss=(--loss=dpo "--beta=$BETA")
            [ "$method" != drdpo ] || loss=(--loss=drdpo "--beta=$BETA")
            [ "$method" != quarter ] || loss=(--loss=dpo "--beta=$("$PYTHON" -c "print($BETA / 4)")")
            train "$method-$flips-$seed" dpo.py "--model=$OUT/sft-$seed/model" "--seed=$seed" "${loss[@]}" "--lr=$LR" \
                "--noise_rate=$flips" --cache_ref --do_first_eval=false "${SHARED[@]}"
            rm -rf "${OUT:?}/$method-$flips-$seed"
        done
    done
    [ "$PRINT" = 1 ] || "$PYTHON" -m experiments.papers.flips_table "$OUT" "$SEEDS" "$FLIPS"
done
