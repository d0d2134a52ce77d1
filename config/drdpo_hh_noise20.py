# Dr. DPO, arXiv:2407.07880, the label-noise experiment: 20% of the training pairs flipped, evaluation pairs never.
# The authors' noise runs cut prompts at their end, not at their start: add --truncation=end for their exact protocol.
# The original ran on 4 A100 80GB in about 2 h 45 min. Add --loss=dpo for its baseline.
# When beta' helps: many flipped labels and a run that is too long for DPO; a smaller beta does nearly the same. At beta' = 1 nothing stops the
# margins, so stop early or add --beta_prime=4 or more (docs/evidence.md).
#     torchrun --nproc_per_node=4 dpo.py config/drdpo_hh_noise20.py
model = 'out/sft_hh/model'
data = 'hh'
dtype = 'bfloat16'
loss = 'drdpo'
beta = 0.1
noise_rate = 0.2
optimizer = 'RMSprop'
lr = 5e-7
out_dir = 'out/drdpo_hh_noise20'
