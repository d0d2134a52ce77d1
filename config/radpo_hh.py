# The former name of radpo2_hh.py, Ra-DPO2; runs that were begun under it go on in their folder.
#     torchrun --nproc_per_node=4 dpo.py config/radpo_hh.py
from config.radpo2_hh import *

out_dir = 'out/radpo_hh'
