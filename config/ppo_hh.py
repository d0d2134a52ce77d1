# Online PPO on HH with the settings that arXiv:2403.17031 lists for TL;DR (there at temperature 0.7; here always 1).
# Never run here: no result is claimed.
#     torchrun --nproc_per_node=4 ppo.py config/ppo_hh.py
model = 'out/sft_hh/model'
data = 'hh'
reward_model = critic = 'out/reward_hh/model'
dtype = 'bfloat16'
kl_coef = 0.05
missing_eos_penalty = 1.0
batch_size = 512
minibatch_size = 512
ppo_epochs = 4
lr = 3e-6
lr_schedule = 'linear'
sample_batch = 128
out_dir = 'out/ppo_hh'
