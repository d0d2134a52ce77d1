# A reward model on the toy world (text/toy.py), from the model of sft_toy.py: 20 seconds on a laptop. Not a paper's experiment.
#     torchrun --nproc_per_node=2 reward.py config/reward_toy.py
model = 'out/sft_toy/model'
data = 'toy'
n_epochs = 2
lr = 1e-3
lr_schedule = 'linear'
warmup_steps = 10
log_every = 1024
out_dir = 'out/reward_toy'
