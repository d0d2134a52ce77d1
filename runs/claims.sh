#!/usr/bin/env bash
# The papers' claims on the toy world: every trial, verdicts, tables, plots. Options are those of runs/claims.py; resumable.
#     runs/claims.sh                        all, into out/claims: at most 40 minutes on two CPU cores
#     runs/claims.sh --quick                a smaller grid, into out/claims_quick: at most 4 minutes
#     runs/claims.sh --seeds='11 12 13'     other seeds
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python}" runs/claims.py "$@"
