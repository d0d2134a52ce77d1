# SimPO, arXiv:2405.14734, in the setting of dpo_hh.py: no reference model, so less memory and time. beta and gamma as in the
# paper's range; the paper itself trained 7B and 8B models on 8 H100.
#     torchrun --nproc_per_node=4 dpo.py config/simpo_hh.py
model = 'out/sft_hh/model'
data = 'hh'
dtype = 'bfloat16'
loss = 'simpo'
beta = 2.0
gamma = 1.0
optimizer = 'RMSprop'
lr = 5e-7
out_dir = 'out/simpo_hh'
