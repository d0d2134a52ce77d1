# beta-DPO, arXiv:2407.08639: a fifth of the pairs filtered, beta follows the margins. The original ran on 4 A100 80GB in
# about 2 h 45 min. Statistics are those of the whole step, and evaluation does not change them.
#     torchrun --nproc_per_node=4 dpo.py config/beta_dpo_hh.py
model = 'out/sft_hh/model'
data = 'hh'
dtype = 'bfloat16'
loss = 'beta_dpo'
beta = 0.1
rho = 0.2
a = 0.6
optimizer = 'RMSprop'
lr = 5e-7
out_dir = 'out/beta_dpo_hh'
