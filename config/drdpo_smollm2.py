# Dr. DPO, arXiv:2407.07880, of SmolLM2-135M-Instruct on UltraFeedback; machines and limits as in dpo_smollm2.py. No result is claimed.
# When beta' helps: many flipped labels and a run that is too long for DPO; a smaller beta does nearly the same. At beta' = 1 nothing stops the
# margins, so stop early or add --beta_prime=4 or more (docs/evidence.md).
#     python dpo.py config/drdpo_smollm2.py
model = 'HuggingFaceTB/SmolLM2-135M-Instruct'  # or the folder that make real leaves: out/real/SmolLM2-135M-Instruct
data = 'ultrafeedback'
chat = True
dtype = 'bfloat16'
loss = 'drdpo'
beta = 0.1
batch_size = 32
max_length = 1024
max_prompt_length = 512
max_tokens = 2048  # leaves room on 8 GB
lr = 5e-6  # ten times the rate for billions of weights
lr_schedule = 'linear'
warmup_steps = 50
eval_every = 9984
out_dir = 'out/drdpo_smollm2'
