# KTO, arXiv:2402.01306, on single answers made from the pairs of Anthropic HH. HALOs launches such runs on 4 GPUs with FSDP;
# it gives no time for this setting.
#     torchrun --nproc_per_node=4 dpo.py config/kto_hh.py
model = 'out/sft_hh/model'
data = 'hh'
dtype = 'bfloat16'
loss = 'kto'
beta = 0.1
optimizer = 'RMSprop'
lr = 5e-7
out_dir = 'out/kto_hh'
