# Dr. DPO, arXiv:2407.07880, with its default beta' = 1, on Anthropic HH without label noise. The original ran on 4 A100 80GB
# in about 2 h 45 min. Its weights were taken per GPU and microbatch; here they are those of the whole step, as in eq. 12.
# When beta' helps: many flipped labels and a run that is too long for DPO; a smaller beta does nearly the same. At beta' = 1 nothing stops the
# margins, so stop early or add --beta_prime=4 or more (docs/evidence.md).
#     torchrun --nproc_per_node=4 dpo.py config/drdpo_hh.py
model = 'out/sft_hh/model'
data = 'hh'
dtype = 'bfloat16'
loss = 'drdpo'
beta = 0.1
optimizer = 'RMSprop'
lr = 5e-7
out_dir = 'out/drdpo_hh'
