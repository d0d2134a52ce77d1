# A reward model of HH, as in arXiv:2204.05862 and dpo-rlaif's reward_trainer: Pythia-2.8B from its SFT model, one epoch.
#     torchrun --nproc_per_node=4 reward.py config/reward_hh.py
model = 'out/sft_hh/model'
data = 'hh'
dtype = 'bfloat16'
lr = 1e-5
lr_schedule = 'cosine'
warmup_steps = 50
center_coef = 0.01
out_dir = 'out/reward_hh'
