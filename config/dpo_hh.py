# DPO, arXiv:2305.18290: Pythia-2.8B on Anthropic HH. The original ran on 4 A100 80GB in about 2 h 45 min.
#     torchrun --nproc_per_node=4 dpo.py config/dpo_hh.py
model = 'out/sft_hh/model'
data = 'hh'
dtype = 'bfloat16'
loss = 'dpo'
beta = 0.1
optimizer = 'RMSprop'
lr = 5e-7
out_dir = 'out/dpo_hh'
