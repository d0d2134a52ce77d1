# Dr. DPO on the toy world (text/toy.py), from the model of sft_toy.py: 20 seconds on a laptop. Not a paper's experiment.
# When beta' helps: many flipped labels and a run that is too long for DPO; a smaller beta does nearly the same. At beta' = 1 nothing stops the
# margins, so stop early or add --beta_prime=4 or more (docs/evidence.md).
#     torchrun --nproc_per_node=2 dpo.py config/drdpo_toy.py
model = 'out/sft_toy/model'
data = 'toy'
loss = 'drdpo'
beta = 4.0
lr = 5e-4
lr_schedule = 'linear'
warmup_steps = 10
log_every = 1024
max_new_tokens = 48
out_dir = 'out/drdpo_toy'
