"""Stands in for the folder runtime/ where Python finds it here instead: `python tools/plot.py` says how a tool is run."""

import sys

sys.stderr.write('error: run a tool in the folder of the project: python -m tools.plot, tools.report or tools.bench\n')
sys.exit(2)
