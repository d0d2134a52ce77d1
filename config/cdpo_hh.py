# Conservative DPO (Mitchell, 2023) with label smoothing 0.1 in the setting of dpo_hh.py. The note names no hardware; the
# code is that of DPO: 4 A100 80GB, about 2 h 45 min.
#     torchrun --nproc_per_node=4 dpo.py config/cdpo_hh.py
model = 'out/sft_hh/model'
data = 'hh'
dtype = 'bfloat16'
loss = 'cdpo'
beta = 0.1
label_smoothing = 0.1
optimizer = 'RMSprop'
lr = 5e-7
out_dir = 'out/cdpo_hh'
