# Online PPO on the toy world (text/toy.py) with its gold reward, from the model of sft_toy.py: a minute on a laptop. Not a paper's experiment.
#     torchrun --nproc_per_node=2 ppo.py config/ppo_toy.py
model = 'out/sft_toy/model'
data = 'toy'
reward_model = 'gold'
loss = 'ppo'
kl_coef = 0.1
n_examples = 4096
batch_size = 256
sample_batch = 256
minibatch_size = 64
ppo_epochs = 2
lr = 5e-4
lr_schedule = 'linear'
max_new_tokens = 48
log_every = 256
out_dir = 'out/ppo_toy'
