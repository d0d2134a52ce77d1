# IPO, arXiv:2310.12036, log-ratios per token, in the setting of dpo_hh.py. The paper names no hardware for a language model;
# the code is that of DPO: 4 A100 80GB, about 2 h 45 min.
#     torchrun --nproc_per_node=4 dpo.py config/ipo_hh.py
model = 'out/sft_hh/model'
data = 'hh'
dtype = 'bfloat16'
loss = 'ipo'
beta = 0.1
optimizer = 'RMSprop'
lr = 5e-7
out_dir = 'out/ipo_hh'
