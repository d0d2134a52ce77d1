# The former name of beta_dpo_hh.py, beta-DPO; runs that were begun under it go on in their folder.
#     torchrun --nproc_per_node=4 dpo.py config/betadpo_hh.py
from config.beta_dpo_hh import *

out_dir = 'out/betadpo_hh'
