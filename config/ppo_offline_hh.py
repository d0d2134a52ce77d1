# One-step PPO on the labels of HH, with the loss settings of HALOs (clip 0.5, gamma 0.99, lam 0.95, critic 0.01, KL 0.1).
# Never run here: no result is claimed.
#     torchrun --nproc_per_node=4 ppo.py config/ppo_offline_hh.py
model = 'out/sft_hh/model'
data = 'hh'
dtype = 'bfloat16'
offline = True
kl_coef = 0.1
clip = 0.5
value_clip = None
vf_coef = 0.01
gamma = 0.99
lam = 0.95
batch_size = 64
minibatch_size = 64
ppo_epochs = 1
optimizer = 'RMSprop'
lr = 5e-7
out_dir = 'out/ppo_offline_hh'
