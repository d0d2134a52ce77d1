# The former name of tdpo2_hh.py, TDPO2; runs that were begun under it go on in their folder.
#     torchrun --nproc_per_node=4 dpo.py config/tdpo_hh.py
from config.tdpo2_hh import *

out_dir = 'out/tdpo_hh'
