# beta-DPO on the toy world (text/toy.py), from the model of sft_toy.py: 20 seconds on a laptop. Not a paper's experiment.
#     torchrun --nproc_per_node=2 dpo.py config/beta_dpo_toy.py
model = 'out/sft_toy/model'
data = 'toy'
loss = 'beta_dpo'
beta = 4.0
rho = 0.2
a = 0.05
lr = 5e-4
lr_schedule = 'linear'
warmup_steps = 10
log_every = 1024
max_new_tokens = 48
out_dir = 'out/beta_dpo_toy'
