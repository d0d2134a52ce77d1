# Sourced by the *_hh.sh and rlaif_sharegpt.sh beside it: how a procedure's steps are launched, skipped, tried and printed.
#   GPUS=4              how many; else all that nvidia-smi lists
#   JUDGE, JUDGE_MODEL  address and model name of an OpenAI-compatible server; its key in NANOPREF_API_KEY
#   JUDGE=none          leaves the judge out, and with it the win rates
#   DRY=1               every step on this machine's CPU with stand-ins: the toy model, 32 examples, a judge that counts letters.
#                       HH=FILE names a file of HH pairs, such as its harmless-base/train.jsonl.gz; else the toy world's
#   PRINT=1             only print the commands
# A step whose result is there is skipped, so the same command continues. The table row comes last, from experiments/papers/row.py.
[ -n "${BASH_VERSION:-}" ] || { echo "error: this script needs bash: bash $0" >&2; exit 2; }
[ $# -eq 0 ] || { echo "error: $0 takes variables, which the first lines of experiments/papers/paper.sh list, and no arguments: $*" >&2; exit 2; }
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
NAME=$(basename "$0" .sh)
PYTHON=${PYTHON:-python}
DRY=${DRY:-0}
PRINT=${PRINT:-0}
OUT=out/paper/$NAME
JUDGE=${JUDGE:-}
JUDGE_MODEL=${JUDGE_MODEL:-}
SMALL=()   # more options of what trains
N_TEST=8552 N_ANSWERS=512 N_SAMPLED=20000 TOKENS=256 TYPE=bfloat16  # held-out pairs, prompts answered, sampled, tokens, dtype
HH_DATA=hh SHAREGPT_DATA=sharegpt EVAL_DATA=alpaca_eval
MODEL=()   # what is trained first, where it is not the config's own
if [ "$DRY" = 1 ]; then
    OUT=out/paper_dry/$NAME
    GPUS=1 N_TEST=16 N_ANSWERS=8 N_SAMPLED=24 TOKENS=12 TYPE=float32
    SMALL=(--n_examples=32 --batch_size=16 --max_length=192 --max_prompt_length=96 --max_tokens=4096 --warmup_steps=2
           --log_every=1000)
    HH_DATA=${HH:+hh:$HH}
    HH_DATA=${HH_DATA:-toy}
    SHAREGPT_DATA=$HH_DATA EVAL_DATA=$HH_DATA
    MODEL=(--model=toy)
    JUDGE=http://127.0.0.1:${DRY_PORT:-8765} JUDGE_MODEL=letters
else
    GPUS=${GPUS:-$( (nvidia-smi -L 2>/dev/null || true) | wc -l)}
fi
if [ "$PRINT" = 0 ] && [ "$GPUS" = 0 ]; then
    echo "error: no GPU here; DRY=1 $0 tries every step with stand-ins, PRINT=1 prints the commands" >&2
    exit 2
fi
if [ -z "$JUDGE" ] || { [ "$JUDGE" != none ] && [ -z "$JUDGE_MODEL" ]; }; then
    if [ "$PRINT" = 0 ]; then
        echo "error: set JUDGE=http://... and JUDGE_MODEL=NAME for the win rates, or JUDGE=none to leave them out" >&2
        exit 2
    fi
    JUDGE=http://127.0.0.1:8000 JUDGE_MODEL=NAME
fi

# step RESULT COMMAND...: run and print a command, unless its result is there
step() {
    local result=$1
    shift
    if [ "$PRINT" = 0 ] && [ -e "$result" ] && ! grep -qs '"failed": [1-9]' "$result"; then  # verdicts that are missing
        echo "# done: $result"
        return
    fi
    echo "\$ $*"
    [ "$PRINT" = 1 ] || "$@"
}

# on all GPUs: LAUNCH SCRIPT OPTIONS
if [ "$GPUS" -gt 1 ]; then
    LAUNCH=("$PYTHON" -m torch.distributed.run "--nproc_per_node=$GPUS" --)
else
    LAUNCH=("$PYTHON")
fi

# train SCRIPT CONFIG NAME OPTIONS...: into $OUT/NAME
train() {
    local script=$1 config=$2 name=$3
    shift 3
    step "$OUT/$name/model" "${LAUNCH[@]}" "$script" "config/$config.py" "--out_dir=$OUT/$name" "--dtype=$TYPE" "$@" \
        ${SMALL[@]+"${SMALL[@]}"}
}

# answers NAME WHERE OPTIONS...: of the model $OUT/NAME/model, into $OUT/NAME/WHERE
answers() {
    local name=$1 where=$2
    shift 2
    step "$OUT/$name/$where/model_outputs.json" "${LAUNCH[@]}" sample.py "--model=$OUT/$name/model" "--generator=$name" \
        "--max_new_tokens=$TOKENS" "--dtype=$TYPE" "--out_dir=$OUT/$name/$where" "$@"
}

# judge NAME OPTIONS...: answers of $OUT/NAME, into $OUT/NAME/judged; JUDGE=none: nothing
judge() {
    local name=$1
    shift
    [ "$JUDGE" = none ] || step "$OUT/$name/judged/report.json" "$PYTHON" label.py "--answers=$OUT/$name/answers/samples.jsonl" \
        "--endpoint=$JUDGE" "--judge_model=$JUDGE_MODEL" "--out_dir=$OUT/$name/judged" "$@"
}

# hh CONFIG NAME OPTIONS...: train on HH from the SFT model, answer test prompts, judge them against the chosen answers
hh() {
    local config=$1 name=$2
    shift 2
    train dpo.py "$config" "$name" "--data=$HH_DATA" "--model=$OUT/sft/model" "--n_eval_examples=$N_TEST" --eval_every=none "$@"
    answers "$name" answers "--data=$HH_DATA" --split=test "--n_examples=$N_ANSWERS"
    judge "$name" "--against=$OUT/chosen.jsonl"
}

# row: the table, of everything above
row() {
    echo "\$ $PYTHON -m experiments.papers.row $OUT"
    [ "$PRINT" = 1 ] || "$PYTHON" -m experiments.papers.row "$OUT"
}

# chosen: the chosen answers of HH's test split, for the judge to compare with
chosen() {
    step "$OUT/chosen.jsonl" "$PYTHON" -m experiments.papers.chosen "--data=$HH_DATA" "--out=$OUT/chosen.jsonl"
}

grep -A 2 "^$NAME: " experiments/papers/expected.txt
if [ "$DRY" = 1 ] && [ "$PRINT" = 0 ]; then
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} NANOPREF_CACHE=$OUT/cache
    "$PYTHON" -m experiments.papers.judge "${DRY_PORT:-8765}" &
    trap 'kill %1 2>/dev/null || true' EXIT
fi
